"""One call of ``generate_image``: its schedule, and what the gate said of each step."""

from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import Any, cast

import mlx.core as mx

from ..forecast import weights
from ..handle import Handle
from ..plans import budgeted
from ..stats import KINDS, GenerationStats, Kind, StepRecord, step_record

FORCES = (0, 1, 2)  # gated, leading forced, trailing forced; csrc/gate_decision.h has the same


class Generation:
    """What is known of a generation while it runs."""

    def __init__(self, handle: Handle, num_steps: int, config: Any) -> None:
        self.handle = handle
        self.config = config  # mflux's
        self.num_steps = num_steps  # active ones
        self.history_is_valid = True  # False after a numerical miss: what was kept must not be looked at
        self._known: list[int] = []  # computed steps whose results are kept, the latest first
        self._states: list[list[float] | Kind] = []  # the gate's after each step, or what it was without the gate
        self._last: mx.array | None = None  # the gate's state after the last step
        self._forces = [mx.array(force, dtype=mx.int32) for force in FORCES]
        self._recorded_at: list[float] = []  # perf_counter's seconds
        self._skipped = 0

    @property
    def index(self) -> int:
        """Of the step that comes next, from 0."""
        return len(self._recorded_at)

    def next_force(self) -> mx.array:
        """The gate's ``force`` for the step that comes next."""
        self._settle()
        handle = self.handle
        leading = self.index < handle.skip_first_n_steps
        trailing = self.index >= self.num_steps - handle.skip_last_n_steps
        trailing = trailing or (handle.max_skips is not None and self._skipped >= handle.max_skips)
        return self._forces[1 if leading else 2 if trailing else 0]

    @cached_property
    def plan(self) -> tuple[bool, ...] | None:
        """For each step whether it computes; None where the gate decides."""
        budget = self.handle.budget
        return self.handle.plan if budget is None else budgeted(self._sigmas, budget)

    @property
    def is_over(self) -> bool:
        """Whether all steps of the schedule are done."""
        return self.index >= self.num_steps

    @cached_property
    def _sigmas(self) -> list[float]:
        """Of each active step; where a scheduler of the user's has not as many, the steps are taken to be even."""
        first: int = self.config.init_time_step
        sigmas = [float(s) for s in getattr(self.config.scheduler, "sigmas", ())][first : first + self.num_steps]
        return sigmas if len(sigmas) == self.num_steps else [float(-i) for i in range(self.num_steps)]

    def weights(self) -> mx.array:
        """Of the last ``forecast + 1`` computed steps, the latest first, in a forecast of the next step: float32."""
        self._settle()
        known = [self._sigmas[i] for i in self._known]
        return mx.array(weights(self._sigmas[self.index], known, self.handle.forecast))

    def record(self, state: mx.array) -> None:
        """A step went through the gate, and this is its state, float32 ``(8,)``."""
        self._settle()
        self.history_is_valid = True
        self._last = state
        self._recorded_at.append(perf_counter())

    def record_kind(self, kind: Kind, *, is_kept: bool = False) -> None:
        """A step did not go through the gate; ``is_kept``: what it made is kept for forecasts."""
        self._settle()
        if is_kept:
            self._keep()
        self._states.append(kind)
        self._recorded_at.append(perf_counter())

    def _keep(self) -> None:
        self._known = [len(self._states), *self._known[: self.handle.forecast]]

    def _settle(self) -> None:
        """Read what was decided of the last step: it is evaluated, with the step's latents."""
        if self._last is None:
            return
        values, self._last = cast(list[float], self._last.tolist()), None
        kind = KINDS[int(values[1])]
        if kind == "numerical-miss":
            self.history_is_valid = False
            self._known = []
        elif kind != "skipped":
            self._keep()
        self._skipped += kind == "skipped"
        self._states.append(values)

    def stats(self, seconds: float) -> GenerationStats:
        """What happened; ``seconds`` is of the whole call."""
        self._settle()
        times = [*(after - at for at, after in pairwise(self._recorded_at)), None]
        return GenerationStats(
            tuple(
                StepRecord(i, state, None, None, 0.0, t) if isinstance(state, str) else step_record(i, state, t)
                for i, (state, t) in enumerate(zip(self._states, times, strict=False))  # no step has one time: None
            ),
            seconds,
        )
