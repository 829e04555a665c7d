"""Which steps a rule computes, as far as that is known before the run."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from ..plans import PublishedPlans, placed
from ..policy import LONGEST_GAP, WARM_UP, Budget, Gate, Rule, Steps, Tolerance
from ..record.stats import Kind

# A large picture shows its shapes through more noise than a small one, by the root of its tokens. This times that root
# is by how much the odds of sigma are divided to have the noise as a picture shows it: chosen on the demonstration
# model, in all of its regimes (docs/forecasting.md).
SEEN = 3 / 8


def planned(
    rule: Rule, sigmas: Callable[[], Sequence[float]], num_tokens: int, plans: PublishedPlans | None
) -> tuple[bool, ...] | None:
    """For each step whether it computes; None where that is decided from step to step.

    ``sigmas`` gives the schedule, of the active steps; ``rule`` has its model's values; the others are ``budgeted``'s.
    """
    match rule:
        case Steps():
            return rule.plan
        case Budget():
            return budgeted(sigmas(), rule.budget, num_tokens, plans)
        case Gate(rel_l1_thresh=0) | Tolerance(tolerance=0):
            return (True,) * len(sigmas())
    return None


class Watch:
    """A tolerance in one generation: it watches by how much the forecast misses what is computed.

    The miss by the way travelled since the step before that computed, in sigma, is a speed; as long as the speed times
    the way stays below the tolerance, steps are skipped. Nothing is measured at a skipped one. Where a step is wider
    than the schedule's mean, an error in it weighs more in the picture: there less is tolerated, by the square root of
    that. A gap is at most one step longer than either of the two before it.

    With a plan a step computes only where one of the plan's is left by then; what is saved can be used later.

    Args:
        tolerance: On the forecast's relative L1 distance from what would be computed.
        sigmas: The schedule, of the active steps and the one after them.
        plan: A budget's.
    """

    def __init__(self, tolerance: float, sigmas: Sequence[float], plan: Sequence[bool] | None = None) -> None:
        self._tolerance = tolerance
        self._sigmas = sigmas
        self._allowed = list(accumulate(plan)) if plan is not None else [len(sigmas)] * len(sigmas)
        self._count = 0
        self._speed = math.inf
        self._computed = [0, 0, 0]  # the last three of these steps, the latest first

    def decide(self, index: int) -> tuple[Kind, float | None]:
        """The kind of a step, and the miss that is expected of its forecast, weighed by the step's width."""
        sigmas, (last, *before) = self._sigmas, self._computed
        num_steps = len(sigmas) - 1
        if self._count >= self._allowed[index]:
            return "skipped", None
        if index < WARM_UP or index == num_steps - 1:
            return "forced", None
        mean_width = abs(sigmas[-1] - sigmas[0]) / num_steps
        width = abs(sigmas[index + 1] - sigmas[index]) / mean_width if mean_width > 0 else 1.0
        expected = self._speed * abs(sigmas[index] - sigmas[last]) * math.sqrt(max(1.0, width))
        if not math.isfinite(expected):
            return "computed", None
        gaps = last - before[0], before[0] - before[1]
        is_near = index - last < min(LONGEST_GAP, *(gap + 1 for gap in gaps))
        return "skipped" if is_near and expected < self._tolerance else "computed", expected

    def computed(self, index: int, miss: float) -> None:
        """The step was; not finite where there was no forecast to compare with."""
        travelled = abs(self._sigmas[index] - self._sigmas[self._computed[0]])
        self._speed = miss / travelled if travelled > 0 else math.inf
        self._count += 1
        self._computed = [index, *self._computed[:2]]


def budgeted(
    sigmas: Sequence[float], budget: float, num_tokens: int, plans: PublishedPlans | None = None
) -> tuple[bool, ...]:
    """For each step whether it computes: as published; or the first, the last, and others evenly over the noise seen.

    Args:
        sigmas: Of the active steps of the schedule.
        budget: Share of them that may be computed, above 0 and at most 1; two of them always are.
        num_tokens: Of the picture.
        plans: Published for the model.
    """
    num_steps = len(sigmas)
    count = min(num_steps, max(2, math.floor(budget * num_steps + 1e-9)))
    if num_steps <= 2:
        return (True,) * num_steps
    if plans is not None:
        return placed(plans, sigmas, count)
    wanted = [abs(b - a) for a, b in pairwise(seen(sigma, num_tokens) for sigma in sigmas)][
        1:
    ]  # of all but the first and the last
    share = _shares(wanted, count - 2)
    plan = [True]
    due = 0.5
    for part in share:
        due += part
        plan.append(due >= 1 - 1e-9)
        due -= plan[-1]
    return (*plan, True)


def seen(sigma: float, num_tokens: int) -> float:
    """The noise as a picture of so many tokens shows it, 0 to 1."""
    sigma = min(1.0, max(0.0, sigma))
    return sigma / (sigma + SEEN * math.sqrt(num_tokens) * (1 - sigma))


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
