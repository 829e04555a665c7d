"""What ``apply`` changes on a pipeline, and how it is undone. Instances are patched, never classes or modules."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx

from .. import ops
from ..errors import (
    IncompatibleModelError,
    InvalidStepWindowError,
    NoBenefitWarning,
    PatchLostError,
    TeaCacheError,
    UntestedVersionWarning,
)
from ..handle import Handle
from ..stats import GenerationStats, StepRecord, step_record
from ..variants import VARIANTS, Variant
from . import flux2

NEWEST_VERIFIED_MFLUX = "0.24.0"

_HANDLE = "_mlx_teacache_fast_handle"
_ABSENT = object()


def match(flux: Any) -> Variant:
    """The variant of a pipeline, by its class and the aliases of its model configuration."""
    name = type(flux).__name__
    if not isinstance(flux, flux2.Flux2Klein):
        raise IncompatibleModelError(f"apply gates mflux's Flux2Klein pipelines, got {name}")
    aliases = getattr(getattr(flux, "model_config", None), "aliases", ())
    for alias in aliases:
        if alias in flux2.VARIANT_IDS:
            if flux.transformer is None:
                raise IncompatibleModelError(
                    f"this {name} has no transformer any more (mflux's low-memory mode drops it after a generation): "
                    "load the pipeline again"
                )
            return VARIANTS[alias]
    raise IncompatibleModelError(
        f"{name} has a model configuration with aliases {list(aliases)}, and apply knows {', '.join(flux2.VARIANT_IDS)}"
    )


def live_handle(flux: Any) -> Handle | None:
    """The handle of a gated pipeline."""
    handle: Handle | None = vars(flux).get(_HANDLE)
    return handle


def finetuned_from(flux: Any) -> str | None:
    """The model that a checkpoint was made from; None for that model itself, whose configuration names no base."""
    base: str | None = getattr(flux.model_config, "base_model", None)
    return base


@functools.cache
def warn_if_untested() -> None:
    """Once in a process, if mflux is newer than what was verified."""
    installed = version("mflux")
    if _numbers(installed) > _numbers(NEWEST_VERIFIED_MFLUX):
        warnings.warn(
            f"mflux {installed} is newer than {NEWEST_VERIFIED_MFLUX}, the newest that was verified with this package",
            category=UntestedVersionWarning,
            stacklevel=3,  # functools.cache adds no frame: the caller of apply()
        )


def _numbers(v: str) -> tuple[int, ...]:
    return tuple(int(part) for part in v.split(".") if part.isdigit())


class Generation:
    """One call of ``generate_image``: its number of active steps and what the gate said of each."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.states: list[mx.array | None] = []  # the gate's state after each step; None where gating is off

    def stats(self) -> GenerationStats:
        return GenerationStats(
            tuple(
                StepRecord(i, "computed", None, None, 0.0)
                if state is None
                else step_record(i, cast(list[float], state.tolist()))
                for i, state in enumerate(self.states)
            )
        )


class Patch:
    """Gating of one pipeline.

    Three things are set on the instance: ``generate_image``, so that only finished generations count and nothing
    outlives a failed one; ``_predict``, which mflux calls once a generation for the function that runs a step; and a
    callback that learns the schedule before the loop.
    """

    def __init__(self, flux: Any, handle: Handle) -> None:
        if mx.default_device() == mx.gpu and not ops.gpu_supported():
            raise TeaCacheError(
                "this build has no kernels for MLX's GPU: run on the CPU with mx.set_default_device(mx.cpu)"
            )
        handle._patch = self  # first, so that restore() undoes a patch that was interrupted
        self._handle = handle
        self._flux = weakref.ref(flux)
        self._generation: Generation | None = None
        self._short_schedule_told = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._wrap(flux, "generate_image", self._generate_image)
            self._wrap(flux, "_predict", self._predict)
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
            self._undo.pop()()

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
        enclosing = self._generation  # a callback may generate too
        self._generation = None
        try:
            image = original(*args, **kwargs)
            generation: Generation | None = self._generation
            if generation is not None:
                self._handle.stats.commit(generation.stats())
            return image
        finally:
            self._generation = enclosing

    def call_before_loop(self, config: Any, **_: Any) -> None:
        """mflux's callback: the schedule is known now."""
        if not self._undo:  # restored while a generation was being prepared
            return
        handle = self._handle
        num_steps = max(0, config.num_inference_steps - config.init_time_step)
        forced = handle.skip_first_n_steps + handle.skip_last_n_steps
        if handle.rel_l1_thresh > 0 and num_steps > 0:
            if forced >= num_steps:
                raise InvalidStepWindowError(
                    f"skip_first_n_steps={handle.skip_first_n_steps} and skip_last_n_steps={handle.skip_last_n_steps} "
                    f"leave no step to gate: the schedule has {num_steps} active "
                    f"of num_inference_steps={config.num_inference_steps}; use {forced + 2} or more active steps"
                )
            if num_steps - forced == 1 and not self._short_schedule_told:
                self._short_schedule_told = True
                warnings.warn(
                    f"nothing can be skipped in {num_steps} active steps: {forced} always compute, and one has to be "
                    "computed before another can reuse it",
                    category=NoBenefitWarning,
                    stacklevel=2,
                )
        self._generation = Generation(num_steps)

    def _predict(self, original: Callable[..., Any], transformer: Any) -> Callable[..., mx.array]:
        inner: Callable[..., mx.array] = original(transformer)
        generation = self._generation
        if generation is None:  # called by somebody else than generate_image
            return inner
        if self._handle.rel_l1_thresh <= 0:
            return _counted(inner, generation)
        return flux2.gated_predict(transformer, inner, self._handle, generation.num_steps, generation.states)


def _counted(inner: Callable[..., mx.array], generation: Generation) -> Callable[..., mx.array]:
    def predict(**step: Any) -> mx.array:
        noise = inner(**step)
        generation.states.append(None)
        return noise

    return predict


def _remove(registry: Any, callback: Any) -> None:
    if registry is not None:  # the pipeline, and its registry with it, may be gone
        registry.before_loop[:] = [c for c in registry.before_loop if c is not callback]
