"""What ``apply`` changes on a pipeline, and how it is undone. Instances are patched, never classes or modules."""

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from importlib.metadata import version
from time import perf_counter
from typing import Any

import mlx.core as mx
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

from .. import metadata
from ..arguments import check_schedule
from ..errors import (
    IncompatibleModelError,
    NoBenefitWarning,
    PatchLostError,
    TeaCacheWarning,
    UntestedVersionWarning,
    warn_caller,
)
from ..handle import Handle
from ..variants import TINY_KLEIN, VARIANTS, Variant
from . import flux1, flux2
from .generation import Generation

NEWEST_VERIFIED_MFLUX = "0.24.0"

_HANDLE = "_mlx_teacache_fast_handle"
_ABSENT = object()


FAMILIES: tuple[Any, ...] = (flux1, flux2)


def match(flux: Any, by_name: bool = False) -> Variant:
    """The variant of a pipeline, by its class and the aliases of its model configuration (see ``match_config``)."""
    variant, _ = match_config(getattr(flux, "model_config", None), type(flux), by_name)
    if flux.transformer is None:
        raise IncompatibleModelError(
            f"this {type(flux).__name__} has no transformer any more (mflux's low-memory mode drops it after a "
            "generation): load the pipeline again"
        )
    return variant


def is_calibrated(flux: Any) -> bool:
    """Whether the variant's coefficients were fitted on this model, in text-to-image."""
    return match_config(flux.model_config, type(flux))[1]


def match_config(model_config: Any, pipeline_class: type, by_name: bool = False) -> tuple[Variant, bool]:
    """``match`` and ``is_calibrated`` of a pipeline that is not loaded yet.

    ``by_name`` takes the demonstration model for the one whose architecture it has, as mlx-teacache does.
    """
    name = pipeline_class.__name__
    if reason := next((f.REFUSED[pipeline_class] for f in FAMILIES if pipeline_class in f.REFUSED), None):
        raise IncompatibleModelError(f"apply cannot gate {name}: {reason}")
    family = next((f for f in FAMILIES if issubclass(pipeline_class, f.PIPELINES)), None)
    if family is None:
        gated = ", ".join(c.__name__ for f in FAMILIES for c in f.PIPELINES)
        raise IncompatibleModelError(f"apply gates mflux's {gated}, got {name}")
    aliases = getattr(model_config, "aliases", None) or ()
    if TINY_KLEIN.variant_id in aliases and not by_name:
        return TINY_KLEIN, True
    for alias in aliases:
        if alias in family.VARIANTS:
            variant_id, fitted = family.VARIANTS[alias]
            here = issubclass(pipeline_class, (Flux1, Flux2Klein)) and _finetuned_from(model_config) is None
            return VARIANTS[variant_id], fitted and here
    raise IncompatibleModelError(
        f"{name} has a model configuration with aliases {list(aliases)}, and apply knows {', '.join(family.VARIANTS)}"
    )


def uncalibrated_message(flux: Any, variant: Variant) -> str:
    """What to say of coefficients that were fitted on something else."""
    model, base = flux.model_config.model_name, _finetuned_from(flux.model_config)
    fitted_on = base if base is not None else f"{variant.variant_id} in text-to-image"
    used_in = model if base is not None else f"{type(flux).__name__} with {model}"
    return (
        f"{used_in} is used with the coefficients of {variant.variant_id}, fitted on {fitted_on}: "
        "they may not fit it, compare a few pictures with ungated ones"
    )


def live_handle(flux: Any) -> Handle | None:
    """The handle of a gated pipeline."""
    handle: Handle | None = vars(flux).get(_HANDLE)
    return handle


def _finetuned_from(model_config: Any) -> str | None:
    """The model that a checkpoint was made from; None for that model itself, whose configuration names no base."""
    base: str | None = getattr(model_config, "base_model", None)
    return base


@functools.cache
def warn_if_untested() -> None:
    """Once in a process, if mflux is newer than what was verified."""
    installed = version("mflux")
    if _numbers(installed) > _numbers(NEWEST_VERIFIED_MFLUX):
        warn_caller(
            f"mflux {installed} is newer than {NEWEST_VERIFIED_MFLUX}, the newest that was verified with this package",
            UntestedVersionWarning,
        )


def _numbers(v: str) -> tuple[int, ...]:
    return tuple(int(part) for part in v.split(".") if part.isdigit())


class Patch:
    """Gating of one pipeline.

    Set on the instance are: ``generate_image``, so that only finished generations count and nothing outlives a failed
    one; a callback that learns the schedule before the loop; and for FLUX.2 ``_predict``, which mflux calls once a
    generation for the function that runs a step. FLUX.1 has no such function: there ``generate_image`` has the
    transformer's calls go through the gate.
    """

    def __init__(self, flux: Any, handle: Handle) -> None:
        handle._patch = self  # first, so that restore() undoes a patch that was interrupted
        self._handle = handle
        self._flux = weakref.ref(flux)
        self._generation: Generation | None = None
        self._steps: Any = None  # of that generation
        self._is_awaited = False  # whether generate_image has been called and its loop has not begun
        self._depth = 0  # of generate_image's frame, for warnings
        self._short_schedule_told = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._wrap(flux, "generate_image", self._generate_image)
            for name in ("_predict", "_cached_predict"):
                if hasattr(flux, name):
                    self._wrap(flux, name, self._predict)
            registry = weakref.ref(flux.callbacks)
            self._undo.append(lambda: _remove(registry(), self))
            flux.callbacks.register(self)
            self._set(flux, _HANDLE, handle)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Take back everything, in reverse order."""
        while self._undo:
            self._undo[-1]()  # may be done twice: an interrupted restore() goes on where it was
            self._undo.pop()

    def _set(self, flux: Any, name: str, value: Any) -> None:
        before = vars(flux).get(name, _ABSENT)

        def undo() -> None:
            target = self._flux()
            if target is None or vars(target).get(name) is not value:
                return  # gone, or replaced by somebody else: not ours to change
            if before is _ABSENT:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)

        self._undo.append(undo)
        object.__setattr__(flux, name, value)

    def _wrap(self, flux: Any, name: str, wrapper: Callable[..., Any]) -> None:
        current = getattr(flux, name)
        original: Callable[..., Any]
        if name in vars(flux):
            original = current
        else:
            # Bound again at each call, to a weak reference: a cycle through the pipeline would keep gigabytes alive
            # until the garbage collector runs.
            attribute = next(vars(c)[name] for c in type(flux).__mro__ if name in vars(c))

            def original(*args: Any, **kwargs: Any) -> Any:
                target = self._flux()
                return attribute.__get__(target, type(target))(*args, **kwargs)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        functools.update_wrapper(replacement, current)
        del replacement.__wrapped__  # type: ignore[attr-defined]  # a bound method, and with it the pipeline
        replacement.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
        self._set(flux, name, replacement)

    # ---- During a generation

    def _generate_image(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flux: Any = self._flux()
        if not self._undo:  # restored, and called by somebody who wrapped generate_image in between
            return original(*args, **kwargs)
        if not any(callback is self for callback in flux.callbacks.before_loop):
            raise PatchLostError(
                "the pipeline's callbacks were replaced after apply(), so gating cannot follow the schedule: "
                "call restore() on the handle and apply() again"
            )
        enclosing = self._generation, self._steps  # a callback may generate too
        self._generation = self._steps = None
        self._is_awaited = True
        self._depth = _depth()
        started = perf_counter()
        try:
            if isinstance(flux, flux1.PIPELINES):
                with flux1.steps_through(flux.transformer, self._flux1_step):
                    image = original(*args, **kwargs)
            else:
                image = original(*args, **kwargs)
            self._account(flux, image, perf_counter() - started)
            return image
        finally:
            self._generation, self._steps = enclosing
            self._is_awaited = False

    def _account(self, flux: Any, image: Any, seconds: float) -> None:
        """Statistics and metadata of a finished picture, which is not lost, whatever happens here."""
        generation = self._generation
        if generation is None:
            return
        try:
            if generation.index == generation.num_steps:
                stats = generation.stats(seconds)
                if self._handle.save_metadata:
                    scheduler = getattr(generation.config, "_scheduler_str", None)
                    metadata.add_to(image, self._handle, stats, pipeline=type(flux).__name__, scheduler=scheduler)
                self._handle.stats.commit(stats)
                return
            message = (
                f"this generation is not counted: {generation.index} of its {generation.num_steps} steps went "
                "through the gate (was the transformer replaced in a callback?)"
            )
        except Exception as error:
            message = f"this generation is not counted: {error!r}"
        try:
            warnings.warn(message, category=TeaCacheWarning, stacklevel=4)  # the caller of generate_image
        except TeaCacheWarning:  # where warnings are errors
            print(message, file=sys.stderr)

    def call_before_loop(self, config: Any, **_: Any) -> None:
        """mflux's callback: the schedule is known now."""
        # Not if restored while a generation was being prepared, nor for one that is not ours: of another pipeline with
        # the same callbacks, or by the class's generate_image.
        if not self._undo or not self._is_awaited:
            return
        self._is_awaited = False
        handle = self._handle
        num_steps = max(0, config.num_inference_steps - config.init_time_step)
        check_schedule(
            num_steps,
            config.num_inference_steps,
            plan=handle.plan,
            rel_l1_thresh=0.0 if handle.is_planned else handle.rel_l1_thresh,  # with 0 any schedule will do
            skip_first_n_steps=handle.skip_first_n_steps,
            skip_last_n_steps=handle.skip_last_n_steps,
        )
        forced = handle.skip_first_n_steps + handle.skip_last_n_steps
        gated = not handle.is_planned and handle.rel_l1_thresh > 0
        if gated and num_steps - forced == 1 and not self._short_schedule_told:
            self._short_schedule_told = True
            warnings.warn(
                f"no possible skip: skip_first_n_steps={handle.skip_first_n_steps} and "
                f"skip_last_n_steps={handle.skip_last_n_steps} leave one eligible step of "
                f"active_num_steps={num_steps}, and it has to be computed before another can reuse it",
                category=NoBenefitWarning,
                stacklevel=_depth() - self._depth + 3,  # the caller of generate_image
            )
        self._generation = Generation(handle, num_steps, config)

    def _predict(self, original: Callable[..., Any], transformer: Any) -> Callable[..., mx.array]:
        inner: Callable[..., mx.array] = original(transformer)
        generation = self._generation
        if generation is None:  # called by somebody else than generate_image
            return inner
        if not self._handle.is_planned and self._handle.rel_l1_thresh <= 0:
            return _counted(inner, generation)
        if self._steps is None:
            self._steps = flux2.GatedSteps(transformer, generation)
        gated: Callable[..., mx.array] = self._steps.predict(inner)
        return gated

    def _flux1_step(self, forward: Callable[..., mx.array], **arguments: Any) -> mx.array:
        flux: Any = self._flux()
        generation = self._generation
        if generation is None or arguments["config"] is not generation.config:  # before the loop, or another pipeline's
            return forward(**arguments)
        if not self._handle.is_planned and self._handle.rel_l1_thresh <= 0:
            return _counted(forward, generation)(**arguments)
        if self._steps is None:
            self._steps = flux1.GatedStep(flux.transformer, generation)
        noise: mx.array = self._steps(forward, **arguments)
        return noise


def _depth() -> int:
    """Frames below the caller's."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _counted(inner: Callable[..., mx.array], generation: Generation) -> Callable[..., mx.array]:
    def predict(**step: Any) -> mx.array:
        noise = inner(**step)
        generation.record_kind("computed")
        return noise

    return predict


def _remove(registry: Any, callback: Any) -> None:
    if registry is not None:  # the pipeline, and its registry with it, may be gone
        registry.before_loop[:] = [c for c in registry.before_loop if c is not callback]
