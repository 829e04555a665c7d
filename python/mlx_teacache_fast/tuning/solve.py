"""Which steps to compute, solved for from full runs alone: what each prediction does to the picture at the end.

Euler's method adds the predictions up, weighted by the steps of sigma. So a plan's error at the end is a known linear
combination of the recorded predictions, and its size follows from the inner products of what they change in the
picture, without a call of the model. How the model answers to latents that have gone astray is only guessed at, so the
best few plans have to be run (docs/forecasting.md says how good the estimate is).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..step.forecast import correction, weights
from ..step.rules import seen

Array = npt.NDArray[np.float64]
Plan = tuple[bool, ...]  # for each step whether it computes
Proposal = tuple[Plan, float]  # with the corrector's share
Known = tuple[int, ...]  # the last computed steps, the latest first
# For each number of computed steps the least error so far, and the known steps from which it came.
Found = dict[Known, tuple[Array, list[Known | None]]]

# In a gated run predictions differ from the recorded ones, at each step otherwise. So an error that is a small
# difference of large parts is larger than it seems: to each prediction comes noise, this share of the mean square.
ASTRAY = 3e-4

# And what is made early grows in the steps that follow: by e to this times the share of noise that the picture shows,
# which is what a budget spaces its steps over. Both were chosen on the demonstration model.
GROWTH = 1.25

REACH = 3  # the longest gap, in mean gaps of the plan with the fewest steps
NEAR = 4  # a step moves so far at once
RHOS = (0.75, 0.5, 0.0)  # shares of the corrector that plans are solved with


class Recorded:
    """Full runs: what a plan's error follows from.

    Args:
        sigmas: Of each step and the one after the last, ``steps + 1``.
        products: For each run the mean products of what its predictions change, ``(steps, steps)``, float64.
        order: Of the forecast.
        num_tokens: Of the picture.
        astray, growth: As above.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        products: Sequence[Array],
        order: int,
        num_tokens: int,
        *,
        astray: float = ASTRAY,
        growth: float = GROWTH,
    ) -> None:
        self.sigmas = sigmas
        self._growth = [math.exp(growth * seen(sigma, num_tokens)) for sigma in sigmas]
        self.order = order
        self.num_steps = len(sigmas) - 1
        noise = [astray * np.trace(p) / self.num_steps * np.eye(self.num_steps) for p in products]
        self._products = np.stack([p + n for p, n in zip(products, noise, strict=True)])
        self._gap = functools.cache(self._of_gap)

    def errors(self, plan: Plan, rho: float) -> Array:
        """Mean squared error at the end, of each run; ``rho`` is the corrector's share."""
        computed = [i for i, computes in enumerate(plan) if computes]
        share = np.zeros(self.num_steps)
        known: Known = (0,)
        for end in (*computed[1:], self.num_steps):
            share += self._gap(known, end, rho)
            known = (end, *known[: self.order])
        errors: Array = np.maximum(np.einsum("i,rij,j->r", share, self._products, share), 1e-30)
        return errors

    def estimate(self, plan: Plan, rho: float) -> float:
        """-10 log10 of the error, mean over the runs: dB up to a constant."""
        return float(-10 * np.log10(self.errors(plan, rho)).mean())

    def proposals(self, rules: Mapping[int, Plan]) -> dict[int, list[Proposal]]:
        """For each number of computed steps what is worth running, the best ones first.

        ``rules`` are the budgets' own plans: what is solved for and these are improved, for each share of the
        corrector.
        """
        solved, found = {rho: self.solve(rules, rho) for rho in RHOS}, {}
        for count, rule in rules.items():
            starts = {rho: (solved[rho][count], rule) for rho in RHOS}
            optima = [sorted(((self.improved(p, rho), rho) for p in starts[rho]), key=self._cost) for rho in RHOS]
            found[count] = [proposal for of_rank in zip(*optima, strict=True) for proposal in of_rank]
        return found

    def near(self, proposal: Proposal) -> list[Proposal]:
        """With one step elsewhere, the best ones first."""
        plan, rho = proposal
        return sorted(((p, rho) for p in neighbours(plan)), key=self._cost)

    def _cost(self, proposal: Proposal) -> float:
        return -self.estimate(*proposal)

    def solve(self, like: Mapping[int, Plan], rho: float) -> dict[int, Plan]:
        """For each number of computed steps the plan whose gaps' errors add up to the least.

        Dynamic programming: the error of a gap depends on the last ``order + 1`` computed steps before it and on its
        end. That errors of several gaps may cancel is left to ``improved``.

        Args:
            like: For each number a plan with about that error, by which runs are weighed: all count alike in dB.
        """
        typical = np.mean([self.errors(plan, rho) for plan in like.values()], axis=0)
        products = np.einsum("r,rij->ij", 1 / typical, self._products)
        n, size = self.num_steps, max(like) + 2
        longest = math.ceil(REACH * n / min(like))
        found: Found = {(0,): (np.full(size, math.inf), [None] * size)}
        found[(0,)][0][1] = 0.0
        ending: list[list[Known]] = [[(0,)], *([] for _ in range(n))]
        for last in range(n):
            for known in ending[last]:
                for end in range(last + 1, min(last + longest, n) + 1):
                    share = self._gap(known, end, rho)
                    new = (end, *known[: self.order])
                    if new not in found:
                        found[new] = np.full(size, math.inf), [None] * size
                        ending[end].append(new)
                    errors, before = found[new]
                    through = found[known][0][:-1] + share @ products @ share
                    better = through < errors[1:]
                    errors[1:][better] = through[better]
                    for count in np.flatnonzero(better):
                        before[count + 1] = known
        return {count: self._traced(found, ending[n], count) for count in like}

    def improved(self, plan: Plan, rho: float) -> Plan:
        """Steps are moved while that makes the estimate better."""
        best = self.estimate(plan, rho)
        while True:
            value, near = max((self.estimate(p, rho), p) for p in (plan, *neighbours(plan)))
            if value <= best:
                return plan
            best, plan = value, near

    def _of_gap(self, known: Known, end: int, rho: float) -> Array:
        """Of each prediction in the error that is made between computed steps, ``(steps,)``.

        Args:
            known: The last computed steps, the latest first.
            end: The next one, or the number of steps.
            rho: The corrector's share.
        """
        sigmas, share = self.sigmas, np.zeros(self.num_steps)
        before = [sigmas[k] for k in known]
        gap = []
        for i in range(known[0] + 1, end):
            step, forecast = sigmas[i + 1] - sigmas[i], weights(sigmas[i], before, self.order)
            gap.append((sigmas[i], step, forecast))
            share[list(known)] += step * np.array(forecast[: len(known)])
            share[i] -= step
        if rho and gap and end < self.num_steps and sigmas[end] not in (sigmas[end + 1], before[0]):
            step = sigmas[end + 1] - sigmas[end]
            handed_on = correction(sigmas[end], step, before[0], gap, rho)
            share[[end, *known]] += step * np.array(handed_on[: 1 + len(known)])
            share[end] -= step
        return share * self._growth[known[0]]

    def _traced(self, found: Found, ends: Sequence[Known], count: int) -> Plan:
        at: Known | None = min(ends, key=lambda known: found[known][0][count + 1])
        computed, left = set(), count + 1
        while at is not None:
            computed.add(at[0])
            at, left = found[at][1][left], left - 1
        return tuple(i in computed for i in range(self.num_steps))


def neighbours(plan: Plan) -> Iterator[Plan]:
    """With one computed step, not the first, a little elsewhere."""
    for here in range(1, len(plan)):
        for there in range(max(1, here - NEAR), min(len(plan), here + NEAR + 1)):
            if plan[here] and not plan[there]:
                yield tuple((c and i != here) or i == there for i, c in enumerate(plan))
