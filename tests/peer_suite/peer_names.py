"""The names that mlx-teacache 0.4.1's unit tests import, for this package.

``install`` puts ``mlx_teacache`` and its modules into ``sys.modules``, ahead of any that is installed. What decides,
counts, warns and raises is this package; what is here brings the tests' fake objects to it.
"""

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import mlx.core as mx
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mlx import nn

import mlx_teacache_fast as ours
from mlx_teacache_fast import ops
from mlx_teacache_fast.mflux.hook import hook_of
from mlx_teacache_fast.record.stats import Kind, step_record
from mlx_teacache_fast.step.generation import Generation

# docs/mlx-teacache.md says why.
NOT_HERE = ("CalibrationError", "MissingGenerationContextError", "StatsFrozenError", "TransformerShapeError")


class NotHere(Exception):
    """Stands for classes that this package does not have, so that the tests' files can be imported."""


# ---- A gated pipeline around what a test does


class Transformer(nn.Module):  # type: ignore[misc, name-defined]
    def __call__(self, t: int, config: Any, hidden_states: mx.array) -> mx.array:
        return hidden_states


class Gated:
    """One of mflux's pipelines, without weights and gated by ``apply_teacache``; its loop is a function of a test."""

    def __init__(
        self, stats: ours.Stats, first: int = 1, last: int = 1, threshold: float = 0.0, on_instance: bool = False
    ) -> None:
        self.flux = flux = pipeline(Flux1, "dev")
        if on_instance:
            flux.generate_image = types.MethodType(type(flux).generate_image, flux)
        with warnings.catch_warnings(action="ignore"):
            self.handle = ours.apply_teacache(
                flux,
                rel_l1_thresh=threshold,
                skip_first_n_steps=first,
                skip_last_n_steps=last,
                save_metadata=False,  # the tests' functions return no picture
            )
        self.hook = cast(Any, hook_of(flux))
        self.hook.stats = stats

    def generate(self, loop: Callable[[Any], Any]) -> Any:
        """``loop`` is called with what a generation runs on."""
        self.flux.loop = loop
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "this generation is not counted")  # some tests stop after a step
                return self.flux.generate_image()
        finally:
            del self.flux.loop


def begin(view: Any, config: Any) -> Generation:
    """What mflux does before its loop, and the generation that comes of it."""
    for callback in view.callbacks.before_loop_callbacks():
        callback.call_before_loop(config=config)
    return cast(Generation, view._run._engines[-1].generation)


def pipeline(base: Any, model: str) -> Any:
    class Pipeline(base):  # type: ignore[misc]
        def __init__(self) -> None:  # not mflux's, which loads weights
            nn.Module.__init__(self)  # type: ignore[attr-defined]
            self.model_config = ModelConfig.from_name(model)
            self.transformer = Transformer()
            self.callbacks = CallbackRegistry()

        def generate_image(self) -> Any:
            return self.loop(self)

    return Pipeline()


def schedule(num_inference_steps: int, init_time_step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_inference_steps=num_inference_steps, init_time_step=init_time_step, scheduler=None)


# ---- gate, cache


class TeaCacheState(SimpleNamespace):
    """What tests set and read of the state between two steps."""

    previous_mod_input: mx.array | None = None
    accumulated_distance = 0.0
    step_counter = 0

    def reset_for_new_generation(self, *, num_steps: int) -> None:
        vars(self).clear()


def gate(
    modulated: mx.array,
    anchor: mx.array | None,
    *,
    coefficients: Sequence[float] = (0, 0, 0, 1, 0),
    threshold: float = 1.0,
    accumulated: float = 0.0,
    force: int | mx.array = 0,
) -> list[float]:
    """The state after ``ops.gate``. An ``x`` of zeros has no variance, so that its modulated input is the shift."""
    shape = (1, -1, modulated.shape[-1])
    shift = modulated.reshape(shape)
    x = mx.zeros_like(shift)
    seeded = float(anchor is not None)  # 0.4.1 has anchor and residual of the same step, or neither
    _, _, state = ops.gate(
        x,
        shift,
        x,
        x if anchor is None else anchor.reshape(shape),
        residuals=[[x]],
        weights=mx.ones((1, 1)),
        state=mx.array([0, 0, 0, 0, accumulated, 0, seeded, seeded]),
        force=mx.array(force, dtype=mx.int32),
        coefficients=coefficients,
        threshold=threshold,
    )
    return cast(list[float], state.tolist())


def poly_eval(coefficients: Sequence[float], x: float) -> float:
    """The price of (1, x) after (1, 0), whose distance is ``x``."""
    return gate(mx.array([[1.0, x]]), mx.array([[1.0, 0.0]]), coefficients=coefficients)[3]


def mean_abs_rel_l1(current: mx.array, previous: mx.array) -> float:
    return gate(current, previous)[2]


def gate_step(
    state: TeaCacheState,
    *,
    rel_l1_thresh: float,
    coefficients: Sequence[float],
    skip_first: int,
    skip_last: int,
    num_steps: int,
    step_idx: int,
    mod_in: mx.array,
) -> SimpleNamespace:
    policy = ours.Policy(rule=ours.Gate(skip_first_n_steps=skip_first, skip_last_n_steps=skip_last))
    generation = Generation(policy, num_steps, list)
    for _ in range(step_idx):
        generation.record("computed")
    after = gate(
        mod_in,
        state.previous_mod_input,
        coefficients=coefficients,
        threshold=rel_l1_thresh,
        accumulated=state.accumulated_distance,
        force=generation.force(),
    )
    step = step_record(step_idx, after)
    state.accumulated_distance = step.accumulated
    return SimpleNamespace(
        kind=step.kind,
        should_compute=not after[0],
        should_update_cache=step.kind == "computed" and bool(after[7]),  # whether its residual may be reused
        rel_l1=step.rel_l1,
        predicted_distance=step.predicted,
        accumulated_distance=step.accumulated,
    )


# ---- stats


def step_decision(
    step_idx: int, timestep: float, rel_l1: float | None, accumulated_distance: float, decision: Kind
) -> ours.StepRecord:
    return ours.StepRecord(step_idx, decision, rel_l1, None, accumulated_distance)


class TeaCacheStats(ours.Stats):
    """A test's steps wait here until it finalizes them: then they are the steps of a gated pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[ours.StepRecord] = []
        self._freeze = self.freeze

    @property
    def total_steps_seen(self) -> int:
        return self.total_steps

    @property
    def cfg_fallback_steps(self) -> int:
        return self.count(cast(Kind, "cfg-fallback"))

    def record(self, step: ours.StepRecord) -> None:
        self.waiting.append(step)

    def discard_current_generation(self) -> None:
        self.waiting = []

    def finalize_last_generation(self, *, num_inference_steps: int, cfg_was_active: bool) -> None:
        Gated(self).generate(lambda view: self.play(begin(view, schedule(num_inference_steps))))

    def play(self, generation: Generation) -> None:
        steps, self.waiting = self.waiting, []
        for step in steps:
            generation.record(step.kind)


# ---- lifecycle


class GenerationContext(SimpleNamespace):
    active_num_steps: int | None = None


def active_step_count(config: Any) -> int:
    return cast(int, Gated(ours.Stats()).generate(lambda view: begin(view, config).num_steps))


class GenerationContextCallback:
    """Runs generations: one to its end, where this package warns of short schedules, and one that is interrupted."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._gated = gated_as(handle, ours.Stats())  # a test counts only what it records itself
        self._config: Any = None

    def call_before_loop(self, *, config: Any, **_: Any) -> None:
        # mflux's configuration always has an init_time_step; some of the tests' have none.
        self._config = schedule(config.num_inference_steps, getattr(config, "init_time_step", 0))

        def loop(view: Any) -> int:
            generation = begin(view, self._config)
            while not generation.is_over:
                generation.record("computed")
            return generation.num_steps

        self._handle._gen_ctx.active_num_steps = self._gated.generate(loop)
        self._handle._state.no_benefit_warned = self._gated.hook.short_schedule_told

    def call_after_loop(self, **_: Any) -> None:
        """Nothing of this package is called then."""

    def call_interrupt(self, **_: Any) -> None:
        stats = self._handle._state.stats

        def loop(view: Any) -> None:
            stats.play(begin(view, self._config))
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            gated_as(self._handle, stats).generate(loop)


def gated_as(handle: Any, stats: ours.Stats) -> Gated:
    """With the settings of a test's handle."""
    window = handle.skip_first_n_steps, handle.skip_last_n_steps
    return Gated(stats, *window, getattr(handle, "rel_l1_thresh", 0.2))


def wrap_generate_image(flux: Any, handle: Any) -> None:
    stats, original, callbacks = handle._state.stats, flux.generate_image, getattr(flux, "callbacks", None)
    on_instance = "generate_image" in vars(flux)
    restored = Gated(ours.Stats(), on_instance=on_instance)
    restored.handle.restore()
    handle._generate_image_was_instance_attr = "generate_image" in vars(restored.flux)
    gated = Gated(stats, on_instance=on_instance)
    before = dict(vars(gated.flux))

    def loop(view: Any) -> Any:
        try:
            return original()
        finally:  # the steps of a test that fails come before the failure
            stats.play(begin(view, schedule(len(stats.waiting))))

    def generate_image() -> Any:
        if getattr(flux, "callbacks", None) is not callbacks:  # the test has replaced them
            gated.flux.callbacks = CallbackRegistry()
        try:
            return gated.generate(loop)
        finally:
            if vars(gated.flux) == before:  # nothing of a generation is left
                handle._gen_ctx.active_num_steps = None

    flux.generate_image = generate_image


def flux1_forward_with_gate(
    inner: Any, handle: Any, *, t: int, config: Any, hidden_states: mx.array, **_: Any
) -> mx.array:
    """The step that follows on ``step_counter`` others. The tests have a threshold of 0: mflux's forward runs."""
    cache = handle._state.cache
    nominal = config.num_inference_steps
    config = schedule(nominal, nominal - handle._gen_ctx.active_num_steps)

    def loop(view: Any) -> mx.array:
        generation = begin(view, config)
        while True:
            noise: mx.array = view.transformer(t, config, hidden_states)
            if generation.index > cache.step_counter:
                cache.step_counter = generation.index
                return noise

    return cast(mx.array, gated_as(handle, handle._state.stats).generate(loop))


# ---- errors, and all names


class AlreadyPatchedError(ours.AlreadyPatchedError):
    """The tests make it of values. Here ``apply`` raises it, called twice."""

    def __new__(cls, *, variant_id: str, rel_l1_thresh: float) -> Any:
        flux = pipeline(Flux2Klein, variant_id)
        with warnings.catch_warnings(action="ignore"):
            ours.apply_teacache(flux, rel_l1_thresh=rel_l1_thresh)
            try:
                ours.apply_teacache(flux)
            except ours.AlreadyPatchedError as error:
                return error


def install() -> None:
    public = {name: getattr(ours, name) for name in ours.__all__}
    all_names = public | dict.fromkeys(NOT_HERE, NotHere)
    lifecycle = dict(
        GenerationContext=GenerationContext,
        GenerationContextCallback=GenerationContextCallback,
        PendingFinalize=SimpleNamespace,  # the tests set it, nothing here reads it
        wrap_generate_image=wrap_generate_image,
        _active_step_count=active_step_count,
    )
    modules: dict[str, dict[str, Any]] = {
        "": public,
        ".cache": dict(TeaCacheState=TeaCacheState),
        ".gate": dict(gate_step=gate_step, mean_abs_rel_l1=mean_abs_rel_l1, poly_eval=poly_eval),
        ".errors": all_names | dict(AlreadyPatchedError=AlreadyPatchedError),
        ".stats": all_names | dict(StepDecision=step_decision, TeaCacheStats=TeaCacheStats, _Staging=NotHere),
        ".integrations": {},
        ".integrations.mflux": {},
        ".integrations.mflux.forward": dict(flux1_forward_with_gate=flux1_forward_with_gate),
        ".integrations.mflux.lifecycle": lifecycle,
    }
    for name, names in modules.items():
        module = sys.modules[f"mlx_teacache{name}"] = ModuleType(f"mlx_teacache{name}")
        vars(module).update(names)
