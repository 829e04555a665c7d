"""One call of mflux's ``generate_image``: its schedule, and what was decided of each step."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import cast

import mlx.core as mx

from ..policy import Budget, Gate, Policy
from ..record.stats import KINDS, GenerationStats, Kind, StepRecord, step_record
from .forecast import weights
from .rules import planned

FORCES = (0, 1, 2)  # gated, leading forced, trailing forced; csrc/gate_decision.h has the same


class Generation:
    """What is known of a generation while it runs.

    Args:
        policy: With its model's values.
        num_steps: Active ones.
        sigmas: Gives the scheduler's of these steps; called at the first step, when mflux has set the schedule up.
    """

    def __init__(self, policy: Policy, num_steps: int, sigmas: Callable[[], Sequence[float]]) -> None:
        self.policy = policy
        self.num_steps = num_steps
        self._get_sigmas = sigmas
        self._known: list[int] = []  # computed steps whose results are kept, the latest first
        self._states: list[list[float] | Kind] = []  # the gate's after each step, or what it was without the gate
        self._last: mx.array | None = None  # the gate's state after the last step
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
        """For each step whether it computes; None where the gate decides."""
        return planned(self.policy.rule, lambda: self._sigmas)

    @cached_property
    def _sigmas(self) -> list[float]:
        """Of each active step; where a scheduler of the user's has not as many, the steps are taken to be even."""
        sigmas = [float(s) for s in self._get_sigmas()][: self.num_steps]
        return sigmas if len(sigmas) == self.num_steps else [float(-i) for i in range(self.num_steps)]

    def force(self) -> mx.array:
        """The gate's ``force`` for the step that comes next."""
        gate = cast(Gate, self.policy.rule)
        leading = self.index < gate.skip_first_n_steps
        trailing = self.index >= self.num_steps - gate.skip_last_n_steps
        trailing = trailing or (gate.max_skips is not None and self._skipped >= gate.max_skips)
        return mx.array(FORCES[1 if leading else 2 if trailing else 0], dtype=mx.int32)

    def compute_next(self) -> None:
        """Of a budget: the step that comes next computes too."""
        if isinstance(self.policy.rule, Budget) and self.plan is not None:
            self.plan = (*self.plan[: self.index], True, *self.plan[self.index + 1 :])

    def weights(self) -> mx.array:
        """Of the last ``forecast + 1`` computed steps, the latest first, in a forecast of the next step: float32."""
        known = [self._sigmas[i] for i in self._known]
        return mx.array(weights(self._sigmas[self.index], known, self.policy.forecast))

    def record(self, state: mx.array | Kind, *, is_kept: bool = False) -> None:
        """What the next step is: the gate's state, float32 ``(8,)``, or a kind where there is no gate.

        ``is_kept``: what the latter makes is kept for forecasts.
        """
        if isinstance(state, str):
            if is_kept:
                self._keep()
            self._states.append(state)
        else:
            self._last = state
        self._recorded_at.append(perf_counter())

    def settle(self) -> Kind | None:
        """Read what was decided of the last step, once; None if that is known already."""
        if self._last is None:
            return None
        values, self._last = cast(list[float], self._last.tolist()), None
        kind = KINDS[int(values[1])]
        if kind == "numerical-miss":
            self._known = []  # what was kept must not be looked at
        elif kind != "skipped":
            self._keep()
        self._skipped += kind == "skipped"
        self._states.append(values)
        return kind

    def _keep(self) -> None:
        self._known = [len(self._states), *self._known[: self.policy.forecast]]

    def stats(self, seconds: float | None) -> GenerationStats:
        """What happened; ``seconds`` is of the whole call, None where that is not known."""
        self.settle()
        times = [*(after - at for at, after in pairwise(self._recorded_at)), None]
        return GenerationStats(
            tuple(
                StepRecord(i, state, None, None, 0.0, t) if isinstance(state, str) else step_record(i, state, t)
                for i, (state, t) in enumerate(zip(self._states, times, strict=False))  # no step has one time: None
            ),
            seconds,
        )
