"""What the gate decided, step by step. Only finished generations are counted."""

import math
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["computed", "forced", "skipped", "numerical-miss"]

# The order is the kind code in the gate's state; csrc/gate_decision.h has the same.
KINDS: tuple[Kind, ...] = ("computed", "forced", "skipped", "numerical-miss")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One denoising step.

    Attributes:
        index: Active step, from 0 (in image-to-image, steps that mflux leaves out are not counted).
        kind: ``computed``, ``forced`` (first and last steps, and those after ``max_skips``), ``skipped`` or
            ``numerical-miss`` (computed).
        rel_l1: Relative L1 distance of the modulated input to the step before; None where not measured.
        predicted: The polynomial's value at ``rel_l1``, at least 0; None where not measured.
        accumulated: Sum of ``predicted`` since the last computed step, after this step's decision.
        seconds: Its evaluation, until the next step is under way, callbacks included; None where not known, as for a
            generation's last step. Not compared: records are equal if the same was decided.
    """

    index: int
    kind: Kind
    rel_l1: float | None
    predicted: float | None
    accumulated: float
    seconds: float | None = field(default=None, compare=False)

    # Names that mlx-teacache has for them.

    @property
    def step_idx(self) -> int:
        """``index``."""
        return self.index

    @property
    def decision(self) -> Kind:
        """``kind``."""
        return self.kind

    @property
    def accumulated_distance(self) -> float:
        """``accumulated``."""
        return self.accumulated


def bound(steps: int, skipped: int) -> float:
    """The speedup that no gating of these steps can exceed: ``steps / (steps - skipped)``; 1.0 for no steps."""
    return steps / (steps - skipped) if steps > skipped else 1.0


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One finished generation.

    Attributes:
        steps: In order.
        seconds: Of ``generate_image`` as a whole; None where not known. Not compared.
    """

    steps: tuple[StepRecord, ...]
    seconds: float | None = field(default=None, compare=False)

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

    @property
    def decisions(self) -> tuple[StepRecord, ...]:
        """``steps``: mlx-teacache's name."""
        return self.steps


class Stats:
    """Totals over the generations that finished under one handle. Fixed by ``restore``.

    Attributes:
        finished: These generations in order. They are kept: about 10 KB for 50 steps.
    """

    def __init__(self) -> None:
        self._finished: list[GenerationStats] = []
        self._frozen = False

    @property
    def finished(self) -> tuple[GenerationStats, ...]:
        return tuple(self._finished)

    @property
    def generations(self) -> int:
        return len(self._finished)

    @property
    def last_generation(self) -> GenerationStats | None:
        return self._finished[-1] if self._finished else None

    @property
    def computed_count(self) -> int:
        return self.count("computed")

    @property
    def forced_count(self) -> int:
        return self.count("forced")

    @property
    def skipped_count(self) -> int:
        return self.count("skipped")

    @property
    def numerical_miss_count(self) -> int:
        return self.count("numerical-miss")

    @property
    def total_steps(self) -> int:
        return sum(generation.num_steps for generation in self._finished)

    @property
    def bound(self) -> float:
        """``steps / (steps - skipped)`` over all generations: what the speedup cannot exceed."""
        return bound(self.total_steps, self.skipped_count)

    # Names that mlx-teacache has for them.

    @property
    def total_active_steps(self) -> int:
        """``total_steps``."""
        return self.total_steps

    @property
    def speedup_estimate(self) -> float:
        """``bound``."""
        return self.bound

    def count(self, kind: Kind) -> int:
        """Number of steps of this kind."""
        return sum(generation.count(kind) for generation in self._finished)

    def commit(self, generation: GenerationStats) -> None:
        """Add a finished generation. One that ends after ``restore``, called by a callback, does not count."""
        if not self._frozen:
            self._finished.append(generation)

    def freeze(self) -> None:
        """From now on nothing counts."""
        self._frozen = True

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in KINDS)
        return f"<Stats of {self.generations} generations, {self.total_steps} steps: {counts}>"


def step_record(index: int, state: list[float], seconds: float | None = None) -> StepRecord:
    """The record of one step from the gate's state (eight numbers, see ``ops.gate``)."""
    _, kind, rel_l1, predicted, accumulated, *_ = state
    return StepRecord(
        index=index,
        kind=KINDS[int(kind)],
        rel_l1=rel_l1 if math.isfinite(rel_l1) else None,
        predicted=predicted if math.isfinite(predicted) else None,
        accumulated=accumulated,
        seconds=seconds,
    )
