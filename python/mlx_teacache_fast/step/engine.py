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
from .captured import Arguments, Arrays, Captured, Function
from .forecast import combined, corrected, miss_of, reuse
from .generation import Generation
from .tap import Make, Signal, Step, Tap


class Engine:
    """The steps of one generation.

    Attributes:
        in_graph: Whether the decision stands in the graph of a step that mflux compiles; else it is read before.
    """

    in_graph = True

    def __init__(self, generation: Generation, tap: Tap) -> None:
        self.generation = generation
        self._tap = tap
        self._n_kept = generation.policy.forecast + 1
        self._keeps_residual = generation.policy.cache == "residual"
        self._state = mx.zeros(8)
        self._anchor: Arrays = []  # one, from the first step that is measured
        # What the last computed steps made, the latest first: the output, or for each call of the transformer a
        # residual, call by call. As many as the forecast's order wants; those of unknown steps have no weight.
        self._history: Arrays = []

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
                n = tap.n_tokens(arguments)
                made.append(left[:, :n] - entered.x[:, :n])
                return left

            noise = tap.through(make, get_transformer(), note, is_idle=False)(**arguments)
            return [*mx.depends([noise], made), *made]  # a residual that stays lazy would keep all tokens alive

        def forecast(arrays: Arrays, arguments: Arguments) -> Arrays:
            """The noise, of weights and history."""
            weights, *history = arrays
            if not keeps_residual:
                return [combined(weights, history).astype(history[0].dtype)]
            n, residuals = tap.n_tokens(arguments), self._of_each_call(history)

            def again(call: int, entered: Signal, left: mx.array) -> mx.array:
                return reuse(entered.x[:, :n], weights, residuals[call])

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
                if not found:
                    signal = tap.of_latents(entered, arguments)
                    found.extend(self._gate(signal, [anchor], state, force, residuals, weights))
                return cast(mx.array, found[1][call])

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

        run_compute: Any = Captured(compute) if is_compiled else compute
        run_forecast: Function = Captured(forecast) if is_compiled else forecast
        run_measure: Function = Captured(measure) if is_traced else measure
        run_body, run_gated = Captured(body), Captured(gated)

        def step(**arguments: Any) -> mx.array:
            if generation.settle() == "numerical-miss":
                self._history = []  # it must not be looked at
            plan, decided = generation.plan, generation.decide()
            if generation.is_over or (plan is not None and all(plan)):  # more steps than the schedule has are not ours
                noise = own(**arguments)
                generation.record("computed")
            elif tap.makes_cache(arguments):
                noise = own(**arguments)
                generation.record("forced", is_kept=not keeps_residual)
                if keeps_residual:  # its tokens are not those of later steps
                    generation.compute_next()
                else:
                    self._history = self._renewed([mx.array(noise)], [])
            elif decided is None and is_compiled and self.in_graph and self._anchor and self._history:
                history, correction = self._history, generation.correction()
                arrays = [generation.force(), generation.weights(), self._state, *self._anchor, *history]
                self._state, anchor, noise, *self._history = run_gated(arrays, arguments)
                self._anchor = [anchor]
                if correction is not None:
                    as_it_is = mx.array([1.0, *[0.0] * len(history)])
                    noise = corrected(mx.where(self._state[0] != 0, as_it_is, mx.array(correction)), noise, history)
                generation.record(self._state)
            else:
                weights, correction = generation.weights(), generation.correction()
                if decided is None:
                    self._state, anchor = run_measure([generation.force(), self._state, *self._anchor], arguments)
                    self._anchor = [anchor]
                    generation.record(self._state)
                    kind = generation.settle()
                else:
                    kind = decided.kind
                miss = None
                if kind != "skipped":
                    noise, *made = run_compute([], arguments)
                    if generation.watch is not None and self._history:
                        miss = miss_of(weights, made, self._of_each_call(self._history))
                    if correction is not None:
                        noise = corrected(mx.array(correction), noise, self._history)
                    if miss is not None:  # which is read before the next step
                        (noise,) = mx.depends([noise], [miss])
                    self._history = [] if kind == "numerical-miss" else self._renewed(made, self._kept(self._history))
                elif self._history:
                    (noise,) = run_forecast([weights, *self._history], arguments)
                else:
                    raise TeaCacheValueError(
                        "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
                    )
                if decided is not None:
                    generation.record(decided, is_kept=kind != "skipped", miss=miss)
            if generation.is_over:  # mflux's memory saver frees memory before it decodes the image
                self._anchor, self._history = [], []
            return noise

        return step

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
        x, shift, scale, eps = signal
        return ops.gate(
            x,
            shift,
            scale,
            anchor[0] if anchor else mx.zeros(x.shape, mx.result_type(x, shift)),
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
