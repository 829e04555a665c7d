"""Which steps to compute when only so many may be: decided before the run."""

import math


def budgeted(num_steps: int, budget: float) -> tuple[bool, ...]:
    """For each step whether it computes: the first ones, the last one, and others at even distances in between.

    Args:
        num_steps: Active steps of the schedule.
        budget: Share of them that may be computed, above 0 and at most 1; two of them always are.
    """
    count = min(num_steps, max(2, math.floor(budget * num_steps + 1e-9)))
    first = max(1, min(WARM_UP, count - 1))  # the last of the steps at the beginning, counted from 1
    spaced = count - first
    rest = num_steps - first
    computed = (
        {*range(first), *(first - 1 + round(rest * (i + 1) / spaced) for i in range(spaced))} if spaced else set()
    )
    return tuple(i in computed or num_steps <= count for i in range(num_steps))


WARM_UP = 3  # a forecast of order 1 needs two computed steps, and the schedule's beginning changes most
