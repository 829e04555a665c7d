"""What the gate decided, step by step. Only finished generations are counted."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["computed", "forced", "skipped", "numerical-miss"]

# The order is the kind code in the gate's state; csrc/gate_decision.h has the same.
KINDS: tuple[Kind, ...] = ("computed", "forced", "skipped", "numerical-miss")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One denoising step.

    Attributes:
        index: Active step, from 0 (in image-to-image, steps that mflux leaves out are not counted).
        kind: ``computed``, ``forced`` (first and last steps), ``skipped`` or ``numerical-miss`` (computed).
        rel_l1: Relative L1 distance of the modulated input to the step before; None where not measured.
        predicted: The polynomial's value at ``rel_l1``, at least 0; None where not measured.
        accumulated: Sum of ``predicted`` since the last computed step, after this step's decision.
    """

    index: int
    kind: Kind
    rel_l1: float | None
    predicted: float | None
    accumulated: float


def bound(steps: int, skipped: int) -> float:
    """The speedup that no gating of these steps can exceed: ``steps / (steps - skipped)``; 1.0 for no steps."""
    return steps / (steps - skipped) if steps > skipped else 1.0


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One finished generation: its steps in order."""

    steps: tuple[StepRecord, ...]

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    def count(self, kind: Kind) -> int:
        """Number of steps of this kind."""
        return sum(step.kind == kind for step in self.steps)

    @property
    def skipped(self) -> int:
        return self.count("skipped")

    @property
    def bound(self) -> float:
        """``steps / (steps - skipped)``."""
        return bound(self.num_steps, self.skipped)


@dataclass(slots=True)
class Stats:
    """Totals over the generations that finished under one handle."""

    generations: int = 0
    computed_count: int = 0
    forced_count: int = 0
    skipped_count: int = 0
    numerical_miss_count: int = 0
    last_generation: GenerationStats | None = None

    @property
    def total_steps(self) -> int:
        return self.computed_count + self.forced_count + self.skipped_count + self.numerical_miss_count

    @property
    def bound(self) -> float:
        """``steps / (steps - skipped)`` over all generations: what the speedup cannot exceed."""
        return bound(self.total_steps, self.skipped_count)

    def commit(self, generation: GenerationStats) -> None:
        """Add a finished generation."""
        self.generations += 1
        self.computed_count += generation.count("computed")
        self.forced_count += generation.count("forced")
        self.skipped_count += generation.skipped
        self.numerical_miss_count += generation.count("numerical-miss")
        self.last_generation = generation


def step_record(index: int, state: list[float]) -> StepRecord:
    """The record of one step from the gate's state (eight numbers, see ``ops.gate``)."""
    _, kind, rel_l1, predicted, accumulated, *_ = state
    return StepRecord(
        index=index,
        kind=KINDS[int(kind)],
        rel_l1=rel_l1 if math.isfinite(rel_l1) else None,
        predicted=predicted if math.isfinite(predicted) else None,
        accumulated=accumulated,
    )
