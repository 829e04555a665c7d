"""Which steps a rule computes, as far as that is known before the run."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from ..policy import Budget, Gate, Steps

# How much denser the computed steps are where sigma changes faster: 0 spaces them evenly by step, 1 by sigma. Of these,
# 0.2 to 0.4 gave the best pictures of the demonstration model with 25 and 50 steps (docs/forecasting.md).
SIGMA_EXPONENT = 0.4


def planned(rule: Gate | Budget | Steps, sigmas: Callable[[], Sequence[float]]) -> tuple[bool, ...] | None:
    """For each step whether it computes; None where that is decided from step to step.

    ``sigmas`` gives the schedule, of the active steps; ``rule`` has its model's values.
    """
    match rule:
        case Steps():
            return rule.plan
        case Budget():
            return budgeted(sigmas(), rule.budget)
        case Gate(rel_l1_thresh=0):
            return (True,) * len(sigmas())
    return None


def budgeted(sigmas: Sequence[float], budget: float) -> tuple[bool, ...]:
    """For each step whether it computes: the first and the last one, and the denser in between the more sigma changes.

    Args:
        sigmas: Of the active steps of the schedule.
        budget: Share of them that may be computed, above 0 and at most 1; two of them always are.
    """
    num_steps = len(sigmas)
    count = min(num_steps, max(2, math.floor(budget * num_steps + 1e-9)))
    if num_steps <= 2:
        return (True,) * num_steps
    wanted = [abs(b - a) ** SIGMA_EXPONENT for a, b in pairwise(sigmas)][1:]  # of all but the first and the last
    share = _shares(wanted, count - 2)
    plan = [True]
    due = 0.5
    for part in share:
        due += part
        plan.append(due >= 1 - 1e-9)
        due -= plan[-1]
    return (*plan, True)


def _shares(wanted: Sequence[float], count: int) -> list[float]:
    """In proportion to ``wanted``, each at most 1, and ``count`` in all."""
    shares = [0.0] * len(wanted)
    rest = set(range(len(wanted)))
    while rest:
        left = count - sum(shares)
        total = sum(wanted[i] for i in rest)
        scale = left / total if total > 0 else 0.0
        full = {i for i in rest if wanted[i] * scale >= 1}
        for i in full or rest:
            shares[i] = min(1.0, wanted[i] * scale) if total > 0 else left / len(rest)
        rest = rest - full if full else set()
    return shares
