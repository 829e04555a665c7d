"""One call of mflux's ``generate_image``: its schedule, and what was decided of each step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import cast

import mlx.core as mx

from ..plans import PublishedPlans
from ..policy import Gate, Policy, Steps, Tolerance
from ..record.stats import GenerationStats, Kind, StepRecord, step_record
from .forecast import correction, weights
from .rules import Watch, budgeted, planned

FORCES = (0, 1, 2)  # gated, leading forced, trailing forced; csrc/gate_decision.h has the same


class Generation:
    """What is known of a generation while it runs.

    Args:
        policy: With its model's values, and the corrector's share of this generation.
        num_steps: Active ones.
        sigmas: Gives the scheduler's of these steps, and the one after them; called at the first step, when mflux has
            set the schedule up.
        num_tokens: Of the picture.
        plans: Published for the model.
        decided: Where several processes make the picture: what counts on all, of what each has measured.
    """

    def __init__(
        self,
        policy: Policy,
        num_steps: int,
        sigmas: Callable[[], Sequence[float]],
        *,
        num_tokens: int = 4096,
        plans: PublishedPlans | None = None,
        decided: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        self.policy = policy
        self.num_steps = num_steps
        self._get_sigmas = sigmas
        self._num_tokens = num_tokens
        self._plans = plans
        self.decided = decided
        self._known: list[int] = []  # computed steps whose results are kept, the latest first
        self._weights: list[float] = []  # of the forecast for the step that comes next
        self._gap: list[tuple[int, list[float]]] = []  # steps skipped since, and the weights of their forecasts
        self._records: list[StepRecord] = []
        self._last: mx.array | None = None  # of the last step: the gate's state, or what miss_of found
        self._recorded_at: list[float] = []  # perf_counter's seconds
        self._skipped = 0

    @property
    def index(self) -> int:
        """Of the step that comes next, from 0."""
        return len(self._recorded_at)

    @property
    def is_over(self) -> bool:
        """Whether all steps of the schedule are done."""
        return self.index >= self.num_steps

    @cached_property
    def plan(self) -> tuple[bool, ...] | None:
        """For each step whether it computes; None where that is decided from step to step."""
        return planned(self.policy.rule, lambda: self.sigmas[: self.num_steps], self._num_tokens, self._plans)

    @cached_property
    def watch(self) -> Watch | None:
        """Where a tolerance decides."""
        rule = self.policy.rule
        if not isinstance(rule, Tolerance):
            return None
        plan = rule.budget and budgeted(self.sigmas[: self.num_steps], rule.budget, self._num_tokens, self._plans)
        return Watch(cast(float, rule.tolerance), self.sigmas, plan or None)

    @cached_property
    def sigmas(self) -> list[float]:
        """The schedule's. Where a scheduler of the user's has not as many, the steps are taken to be even."""
        sigmas = [float(s) for s in self._get_sigmas()][: self.num_steps + 1]
        even = [1 - i / max(1, self.num_steps) for i in range(self.num_steps + 1)]
        sigmas = sigmas if len(sigmas) >= self.num_steps else even
        return sigmas if len(sigmas) > self.num_steps else [*sigmas, sigmas[-1]]  # whose last step goes nowhere

    def force(self) -> mx.array:
        """The gate's ``force`` for the step that comes next."""
        gate = cast(Gate, self.policy.rule)
        leading = self.index < gate.skip_first_n_steps
        trailing = self.index >= self.num_steps - gate.skip_last_n_steps
        trailing = trailing or (gate.max_skips is not None and self._skipped >= gate.max_skips)
        return mx.array(FORCES[1 if leading else 2 if trailing else 0], dtype=mx.int32)

    def restart(self) -> None:
        """What was kept is of no use any more."""
        self._known, self._gap = [], []

    def decide(self) -> StepRecord | None:
        """The step that comes next, but for what it measures; None where the gate decides, in the step itself."""
        kind: Kind
        expected = None
        if self.is_over:
            return None
        if self.plan is not None:
            kind = "computed" if self.plan[self.index] else "skipped"
        elif self.watch is not None:
            kind, expected = self.watch.decide(self.index)
        else:
            return None
        if kind == "skipped" and not self._known and not isinstance(self.policy.rule, Steps):
            kind = "computed"  # whatever a budget says: there is nothing to forecast from
        accumulated = expected if kind == "skipped" and expected is not None else 0.0
        return StepRecord(self.index, kind, None, expected, accumulated)

    def weights(self) -> mx.array:
        """Of the last ``forecast + 1`` computed steps, the latest first, in a forecast of the next step: float32."""
        known = [self.sigmas[i] for i in self._known]
        self._weights = weights(self.sigmas[self.index], known, self.policy.forecast)
        return mx.array(self._weights)

    def correction(self) -> list[float] | None:
        """Of the next step if it computes: see ``forecast.correction``; None where there is nothing to correct."""
        s, k = self.sigmas, self.index
        if not self.policy.corrector or not self._gap or s[k] in (s[k + 1], s[self._known[0]]):
            return None
        gap = [(s[j], s[j + 1] - s[j], w) for j, w in self._gap]
        return correction(s[k], s[k + 1] - s[k], s[self._known[0]], gap, self.policy.corrector)

    def record(
        self, step: StepRecord | mx.array | Kind, *, is_kept: bool = False, miss: mx.array | None = None
    ) -> None:
        """What the next step is: a kind, what ``decide`` said, or the gate's state after it, float32 ``(8,)``.

        Args:
            step: That.
            is_kept: What it computes is kept for forecasts.
            miss: What ``forecast.miss_of`` found, where it computed.
        """
        self._recorded_at.append(perf_counter())
        if isinstance(step, mx.array):
            self._last = step
            return
        step = StepRecord(len(self._records), step, None, None, 0.0) if isinstance(step, str) else step
        self._last = miss
        if step.index < self.num_steps and self.watch is not None and step.kind != "skipped" and miss is None:
            self.watch.computed(step.index, math.inf)
        self._add(step, is_kept=is_kept)

    def missed(self, miss: mx.array) -> None:
        """``miss_of`` another call of the model in the last step, which is one of the guidance's branches."""
        self._last = miss if self._last is None else self._last + miss

    def settle(self) -> Kind | None:
        """Read what was decided or measured of the last step, once; None if that is known already."""
        if self._last is None:
            return None
        last = self._last if self.decided is None else self.decided(self._last)
        measured, self._last = cast(list[float], last.tolist()), None
        if len(measured) > 2:
            step = step_record(len(self._records), measured)
            self._add(step, is_kept=step.kind != "skipped")
        else:
            (off, size), step = measured, self._records.pop()
            miss = off / max(size, 1e-12)
            is_number = math.isfinite(miss)
            step = replace(step, rel_l1=miss) if is_number else replace(step, kind="numerical-miss")
            cast(Watch, self.watch).computed(step.index, miss if is_number else math.inf)
            self._records.append(step)
        if step.kind == "numerical-miss":
            self.restart()  # what was kept must not be looked at
        return step.kind

    def _add(self, step: StepRecord, *, is_kept: bool) -> None:
        if step.kind == "skipped":
            self._skipped += 1
            self._gap.append((step.index, self._weights))
        elif is_kept:
            self._known = [step.index, *self._known[: self.policy.forecast]]
            self._gap = []
        self._records.append(step)

    def stats(self, seconds: float | None) -> GenerationStats:
        """What happened; ``seconds`` is of the whole call, None where that is not known."""
        self.settle()
        times = [*(after - at for at, after in pairwise(self._recorded_at)), None]
        steps = (replace(step, seconds=t) for step, t in zip(self._records, times, strict=False))  # no step, one time
        return GenerationStats(tuple(steps), seconds)
