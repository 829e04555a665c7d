"""``Handle.summary``: finished generations as a table in text."""

import math
from collections.abc import Sequence

from .stats import KINDS, GenerationStats, bound


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
