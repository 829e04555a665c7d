"""One call of ``generate_image``: its schedule, and what the gate said of each step."""

from itertools import pairwise
from time import perf_counter
from typing import Any, cast

import mlx.core as mx

from ..handle import Handle
from ..stats import GenerationStats, Kind, StepRecord, step_record

FORCES = (0, 1, 2)  # gated, leading forced, trailing forced; csrc/gate_decision.h has the same


class Generation:
    """What is known of a generation while it runs."""

    def __init__(self, handle: Handle, num_steps: int, config: Any) -> None:
        self.handle = handle
        self.config = config  # mflux's
        self.num_steps = num_steps  # active ones
        self._states: list[mx.array | Kind] = []  # the gate's state after each step, or what it was without the gate
        self._forces = [mx.array(force, dtype=mx.int32) for force in FORCES]
        self._recorded_at: list[float] = []  # perf_counter's seconds
        self._skipped = 0  # in all states but the last

    @property
    def index(self) -> int:
        """Of the step that comes next, from 0."""
        return len(self._states)

    def next_force(self) -> mx.array:
        """The gate's ``force`` for the step that comes next. To be asked once a step."""
        handle = self.handle
        leading = self.index < handle.skip_first_n_steps
        trailing = self.index >= self.num_steps - handle.skip_last_n_steps
        if handle.max_skips is not None and self._states:
            last = self._states[-1]  # evaluated with its step's latents
            self._skipped += 0 if isinstance(last, str) else int(cast(list[float], last.tolist())[0])
            trailing = trailing or self._skipped >= handle.max_skips
        return self._forces[1 if leading else 2 if trailing else 0]

    @property
    def is_over(self) -> bool:
        """Whether all steps of the schedule are done."""
        return len(self._states) >= self.num_steps

    def record(self, state: mx.array | Kind) -> None:
        """A step is done: its state (float32 ``(8,)``), or its kind if it did not go through the gate."""
        self._states.append(state)
        self._recorded_at.append(perf_counter())

    def stats(self, seconds: float) -> GenerationStats:
        """What happened; ``seconds`` is of the whole call."""
        times = [*(after - at for at, after in pairwise(self._recorded_at)), None]
        return GenerationStats(
            tuple(
                StepRecord(i, state, None, None, 0.0, t)
                if isinstance(state, str)
                else step_record(i, cast(list[float], state.tolist()), t)
                for i, (state, t) in enumerate(zip(self._states, times, strict=False))  # no step has one time: None
            ),
            seconds,
        )
