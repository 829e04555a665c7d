"""The steps of one generation: decide, then mflux's own step, or a forecast.

A plan or a tolerance decides before the step. The gate decides in it: where mflux compiles its step, prelude, gate, and
a branch whose body is mflux's whole step are one graph; where mflux runs eagerly, its decision is read on the host.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from .. import ops
from ..errors import TeaCacheValueError
from ..policy import Gate
from ..record.stats import Kind, StepRecord
from .captured import Arguments, Arrays, Captured
from .forecast import combined, corrected, miss_of, reuse
from .generation import Generation
from .tap import Make, Signal, Step, Tap

Listener = Callable[[Generation, int, mx.array], None]


class Engine:
    """The steps of one generation.

    Args:
        generation: Its schedule, and what is decided.
        tap: Of its transformer.
        is_several: Whether a step is several calls, one for each branch of the guidance, until ``end_step``.
        changes: Arguments of a step: with other ones what was computed before is of no use.
        listener: Called with the generation, the call's number in its step, and the noise.

    Attributes:
        in_graph: Whether the decision stands in the graph of a step that mflux compiles; else it is read before.
    """

    in_graph = True

    def __init__(
        self,
        generation: Generation,
        tap: Tap,
        *,
        is_several: bool = False,
        changes: Sequence[str] = (),
        listener: Listener | None = None,
    ) -> None:
        self.generation = generation
        self._tap = tap
        self._is_several = is_several
        self._changes = changes
        self._listener = listener
        self._values: list[Any] | None = None  # of ``changes``
        self._call = 0  # of the step, that comes next
        self._n_kept = generation.policy.forecast + 1
        self._keeps_residual = generation.policy.cache == "residual"
        self._state = mx.zeros(8)
        self._anchor: Arrays = []  # one, from the first step that is measured
        # What the last computed steps made, the latest first, for each call of a step: the output, or for each of the
        # transformer's calls in it a residual, one after the other. As many as the forecast's order wants; those of
        # unknown steps have no weight.
        self._histories: list[Arrays] = []
        # Of the step, for all of its calls.
        self._way = "own"
        self._decided: StepRecord | None = None
        self._kind: Kind | None = None
        self._weights: Any = None
        self._correction: list[float] | None = None

    def through(
        self, make: Make, get_transformer: Callable[[], Any], own: Step, *, is_traced: bool, is_compiled: bool
    ) -> Step:
        """What stands for a function that mflux runs a step with.

        Args:
            make: Gives such a function of a transformer.
            get_transformer: The transformer, as it is at a step.
            own: mflux's.
            is_traced: Whether a graph is made of its prelude; else that runs as it is.
            is_compiled: Whether mflux compiles it.
        """
        tap, generation, keeps_residual = self._tap, self.generation, self._keeps_residual

        def compute(_: Arrays, arguments: Arguments) -> Arrays:
            """The noise, and what is kept of it."""
            if not keeps_residual:
                noise = own(**arguments)
                return [noise, mx.array(noise)]
            made: Arrays = []

            def note(call: int, entered: Signal, left: mx.array) -> mx.array:
                n = tap.n_first(arguments)
                made.append(left[:, :n] - entered.tokens[:, :n])
                return left

            noise = tap.through(make, get_transformer(), note, is_idle=False)(**arguments)
            return [*mx.depends([noise], made), *made]  # a residual that stays lazy would keep all tokens alive

        def forecast(arrays: Arrays, arguments: Arguments) -> Arrays:
            """The noise, of weights and history."""
            weights, *history = arrays
            if not keeps_residual:
                return [combined(weights, history).astype(history[0].dtype)]
            n, residuals = tap.n_first(arguments), self._of_each_call(history)

            def again(call: int, entered: Signal, left: mx.array) -> mx.array:
                return reuse(entered.tokens[:, :n], weights, residuals[call])

            return [tap.through(make, get_transformer(), again, is_idle=True)(**arguments)]

        def measure(arrays: Arrays, arguments: Arguments) -> Arrays:
            """State and anchor, of ``force`` and what they were."""
            force, state, *anchor = arrays
            after, _, state = self._gate(tap.measured(make, get_transformer(), arguments), anchor, state, force)
            return [state, after]

        def gated(arrays: Arrays, arguments: Arguments) -> Arrays:
            """A step as one graph: state and anchor, then what ``body`` returns."""
            force, weights, state, anchor, *history = arrays
            residuals = self._of_each_call(history) if keeps_residual else []
            found: list[Any] = []  # what the gate returned

            def again(call: int, entered: Signal, left: mx.array) -> mx.array:
                signal = entered.of(tap.n_tokens(arguments))
                if not found:
                    found.extend(self._gate(signal, [anchor], state, force, residuals, weights))
                return found[1][call] if found[1] else reuse(signal.tokens, weights, residuals[call])

            if keeps_residual:
                noise = tap.through(make, get_transformer(), again, is_idle=True)(**arguments)
            else:
                found.extend(self._gate(tap.measured(make, get_transformer(), arguments), [anchor], state, force))
                (noise,) = forecast([weights, *history], arguments)
            after, _, state = found
            computed = run_body.body(self._kept(history), arguments)
            return [state, after, *ops.branch(state, [noise, *history], *computed)]

        def body(kept: Arrays, arguments: Arguments) -> Arrays:
            """The noise, and the history after it; ``kept`` are all of the history but the oldest of each call."""
            noise, *made = run_compute([], arguments)
            return [noise, *self._renewed(made, kept)]

        run_compute = Captured(compute, is_eager=not is_compiled)
        run_forecast = Captured(forecast, is_eager=not is_compiled)
        run_measure = Captured(measure, is_eager=not is_traced)
        run_body, run_gated = Captured(body), Captured(gated)

        def own_step(call: int, arguments: Arguments) -> mx.array:
            """mflux's, of which nothing is kept but what must be."""
            noise = own(**arguments)
            if call == 0:
                generation.record("computed")
            return noise

        def first_step(call: int, arguments: Arguments) -> mx.array:
            """Of which nothing before it counts for what comes."""
            noise = own(**arguments)
            if call == 0:
                generation.restart()
                generation.record("forced", is_kept=not keeps_residual)
            if not keeps_residual:  # whose tokens are not those of later steps
                self._histories[call] = self._renewed([mx.array(noise)], [])
            return noise

        def graph_step(call: int, arguments: Arguments) -> mx.array:
            history, correction = self._histories[call], generation.correction()
            arrays = [generation.force(), generation.weights(), self._state, *self._anchor, *history]
            self._state, anchor, noise, *self._histories[call] = run_gated(arrays, arguments)
            self._anchor = [anchor]
            if correction is not None:
                as_it_is = mx.array([1.0, *[0.0] * len(history)])
                noise = corrected(mx.where(self._state[0] != 0, as_it_is, mx.array(correction)), noise, history)
            generation.record(self._state)
            return noise

        def host_step(call: int, arguments: Arguments) -> mx.array:
            decided = self._decided
            if call == 0:
                self._weights, self._correction = generation.weights(), generation.correction()
                if decided is None:
                    self._state, anchor = run_measure([generation.force(), self._state, *self._anchor], arguments)
                    self._anchor = [anchor]
                    generation.record(self._state)
                    self._kind = generation.settle()
                else:
                    self._kind = decided.kind
            history, miss = self._histories[call], None
            if self._kind == "skipped" and history:
                (noise,) = run_forecast([self._weights, *history], arguments)
            elif self._kind == "skipped" and call == 0:
                raise TeaCacheValueError(
                    "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
                )
            else:
                noise, *made = run_compute([], arguments)
                if generation.watch is not None and history:
                    now, before = (tap.of_latents(arrays, arguments) for arrays in (made, history))
                    miss = miss_of(self._weights, now, self._of_each_call(before))
                if self._correction is not None and history:
                    noise = corrected(mx.array(self._correction), noise, history)
                if miss is not None:  # which is read before the next step
                    (noise,) = mx.depends([noise], [miss])
                is_number = self._kind != "numerical-miss"
                self._histories[call] = self._renewed(made, self._kept(history)) if is_number else []
            if decided is not None and call == 0:
                generation.record(decided, is_kept=self._kind != "skipped", miss=miss)
            elif miss is not None and self._kind != "skipped":
                generation.missed(miss)
            return noise

        ways = {"own": own_step, "first": first_step, "graph": graph_step, "host": host_step}

        def step(**arguments: Any) -> mx.array:
            call, self._call = self._call, self._call + 1
            if call == 0:
                values, before = [arguments.get(name) for name in self._changes], self._values
                self._values = values
                is_new = before is not None and any(a is not b for a, b in zip(values, before, strict=True))
                if generation.settle() == "numerical-miss" or is_new:
                    self._histories = []  # it must not be looked at
                plan, self._decided = generation.plan, generation.decide()
                if generation.is_over or (plan is not None and all(plan)):
                    self._way = "own"  # more steps than the schedule has are not ours
                elif is_new or tap.makes_cache(arguments):
                    self._way = "first"
                elif (
                    self._decided is None
                    and not run_compute.is_eager
                    and not self._is_several
                    and self.in_graph
                    and generation.decided is None
                    and self._anchor
                    and any(self._histories)
                ):
                    self._way = "graph"
                else:
                    self._way = "host"
            if len(self._histories) == call:
                self._histories.append([])
            noise = ways[self._way](call, arguments)
            if self._listener is not None:
                self._listener(generation, call, noise)
            if not self._is_several:
                self.end_step()
            return noise

        return step

    def end_step(self) -> None:
        """No call of it comes any more."""
        self._call = 0
        if self.generation.is_over:  # mflux's memory saver frees memory before it decodes the image
            self._anchor, self._histories, self._values = [], [], None

    def _gate(
        self,
        signal: Signal,
        anchor: Arrays,
        state: mx.array,
        force: mx.array,
        residuals: Sequence[Arrays] = (),
        weights: Any = None,
    ) -> tuple[mx.array, list[mx.array], mx.array]:
        rule = cast(Gate, self.generation.policy.rule)
        x, shift, scale, eps, _ = signal
        if shift is None:  # then the gate only decides
            x, residuals = x.reshape(-1, *x.shape[-2:]), ()
        dtype = x.dtype if shift is None else mx.result_type(x, shift)
        return ops.gate(
            x,
            shift,
            scale,
            anchor[0] if anchor else mx.zeros(x.shape, dtype),
            residuals=list(residuals),
            weights=mx.broadcast_to(weights, (len(residuals), self._n_kept)) if residuals else mx.zeros((0, 0)),
            state=state,
            force=force,
            coefficients=cast(Any, rule.coefficients),
            threshold=cast(float, rule.rel_l1_thresh),
            calibrated_range=rule.calibrated_range,
            max_consecutive_skips=rule.max_consecutive_skips,
            eps=eps,
        )

    def _renewed(self, made: Arrays, kept: Arrays) -> Arrays:
        """The history after a step that made this, of what was kept of it; nothing is kept at first."""
        n = self._n_kept - 1
        return [a for i, m in enumerate(made) for a in (m, *(kept[i * n : (i + 1) * n] or n * [m]))]

    def _kept(self, history: Arrays) -> Arrays:
        return [a for of_call in self._of_each_call(history) for a in of_call[:-1]]

    def _of_each_call(self, history: Arrays) -> list[Arrays]:
        return [history[i : i + self._n_kept] for i in range(0, len(history), self._n_kept)]
