"""What was decided, step by step. Only finished generations are counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
        rel_l1: Relative L1 distance; None where not measured. With the gate of the modulated input to the step before;
            with a tolerance of the forecast to what was computed, in what is kept for forecasts.
        predicted: With the gate the polynomial's value at ``rel_l1``, at least 0; with a tolerance the ``rel_l1`` that
            was expected of this step's forecast, by which it was decided; None where there is none.
        accumulated: Sum of ``predicted`` since the last computed step, after this step's decision; with a tolerance
            ``predicted`` of a skipped step alone.
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
    step_idx = property(lambda self: self.index, doc="``index``.")
    decision = property(lambda self: self.kind, doc="``kind``.")
    accumulated_distance = property(lambda self: self.accumulated, doc="``accumulated``.")


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

    decisions = property(lambda self: self.steps, doc="``steps``: mlx-teacache's name.")


class Stats:
    """Totals over the generations that finished under one handle. Fixed by ``restore``, and so is a copy.

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

    computed_count = property(lambda self: self.count("computed"), doc="Steps of kind ``computed``.")
    forced_count = property(lambda self: self.count("forced"), doc="Steps of kind ``forced``.")
    skipped_count = property(lambda self: self.count("skipped"), doc="Steps of kind ``skipped``.")
    numerical_miss_count = property(lambda self: self.count("numerical-miss"), doc="Steps of kind ``numerical-miss``.")
    total_steps = property(lambda self: sum(g.num_steps for g in self._finished), doc="Of all generations.")

    @property
    def bound(self) -> float:
        """``steps / (steps - skipped)`` over all generations: what the speedup cannot exceed."""
        return bound(self.total_steps, self.skipped_count)

    # Names that mlx-teacache has for them.
    total_active_steps = property(lambda self: self.total_steps, doc="``total_steps``.")
    speedup_estimate = property(lambda self: self.bound, doc="``bound``.")

    def count(self, kind: Kind) -> int:
        """Number of steps of this kind."""
        return sum(generation.count(kind) for generation in self._finished)

    def commit(self, *generations: GenerationStats) -> None:
        """Add finished generations. One that ends after ``restore``, called by a callback, does not count."""
        if not self._frozen:
            self._finished += generations

    def freeze(self) -> None:
        """From now on nothing counts."""
        self._frozen = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_finished": list(self._finished), "_frozen": True}

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in KINDS)
        return f"<Stats of {self.generations} generations, {self.total_steps} steps: {counts}>"


def step_record(index: int, state: list[float], seconds: float | None = None) -> StepRecord:
    """The record of one step from the gate's state (eight numbers, see ``ops.gate``)."""
    _, kind, *measured, accumulated = state[:5]
    rel_l1, predicted = (value if math.isfinite(value) else None for value in measured)
    return StepRecord(index, KINDS[int(kind)], rel_l1, predicted, accumulated, seconds)


# ---- As a table in text


def table(generations: Sequence[GenerationStats]) -> str:
    """Lines of a name and its value. What was not measured is left out.

    The mean of a step leaves out each generation's first step, which compiles, and counts as computed every step whose
    blocks ran.
    """
    steps = [step for generation in generations for step in generation.steps]
    if not steps:
        return "no generation with a step has finished"
    counts = {kind: sum(step.kind == kind for step in steps) for kind in KINDS}
    skipped = counts["skipped"]
    rows = [
        ("generations", str(len(generations))),
        ("steps", f"{len(steps)}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())),
        ("skipped", f"{100 * skipped / len(steps):.1f} %"),
        ("bound", f"{bound(len(steps), skipped):.2f}x, the most that skipping these steps can give"),
    ]
    if distances := sorted(step.rel_l1 for step in steps if step.rel_l1 is not None):
        marks = [f"p{p} {percentile(distances, p):.4f}" for p in (10, 50, 90)]
        rows.append(("rel-L1", ", ".join([*marks, f"max {distances[-1]:.4f}"])))
    if seconds := [g.seconds for g in generations if g.seconds is not None]:
        rows.append(("seconds", f"{sum(seconds):.2f} in all, {sum(seconds) / len(seconds):.2f} a generation"))
    timed = [(s.kind == "skipped", s.seconds) for s in steps if s.seconds is not None and s.index > 0]
    computed = _mean([t for was_skipped, t in timed if not was_skipped])
    reused = _mean([t for was_skipped, t in timed if was_skipped])
    means = [f"{mean:.4f} {name}" for name, mean in (("computed", computed), ("skipped", reused)) if mean is not None]
    if means:
        rows.append(("seconds a step", ", ".join(means)))
    if computed is not None and reused is not None:
        rows.append(("seconds saved", f"{skipped * (computed - reused):.2f}, an estimate: skipped steps * difference"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def percentile(ascending: Sequence[float], p: int) -> float:
    """The least of these values that ``p`` % of them do not exceed (nearest rank)."""
    return ascending[max(0, math.ceil(p * len(ascending) / 100) - 1)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
