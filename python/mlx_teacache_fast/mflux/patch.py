"""What ``apply`` changes on a pipeline, and how it is undone. Instances are patched, never classes or modules."""

import functools
import warnings
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx

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
        if alias in VARIANTS and alias in flux2.VARIANT_IDS:
            return VARIANTS[alias]
    raise IncompatibleModelError(
        f"{name} has a model configuration with aliases {list(aliases)}, and apply knows {', '.join(flux2.VARIANT_IDS)}"
    )


def live_handle(flux: Any) -> Handle | None:
    """The handle of a gated pipeline."""
    handle: Handle | None = vars(flux).get(_HANDLE)
    return handle


@functools.cache
def warn_if_untested() -> None:
    """Once in a process, if mflux is newer than what was verified."""
    installed = version("mflux")
    if _numbers(installed) > _numbers(NEWEST_VERIFIED_MFLUX):
        warnings.warn(
            f"mflux {installed} is newer than {NEWEST_VERIFIED_MFLUX}, the newest that was verified with this package",
            category=UntestedVersionWarning,
            stacklevel=4,
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
        if mx.default_device() == mx.gpu:
            raise TeaCacheError(
                "this build has no GPU kernel for the gate: run on the CPU with mx.set_default_device(mx.cpu)"
            )
        self._handle = handle
        self._flux = weakref.ref(flux)
        self._generation: Generation | None = None
        self._short_schedule_told = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._wrap(flux, "generate_image", self._generate_image)
            self._wrap(flux, "_predict", self._predict)
            self._register(flux.callbacks)
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
        object.__setattr__(flux, name, value)
        alive = weakref.ref(flux)

        def undo() -> None:
            target = alive()
            if target is None or vars(target).get(name) is not value:
                return  # gone, or replaced by somebody else: not ours to change
            if before is _ABSENT:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)

        self._undo.append(undo)

    def _wrap(self, flux: Any, name: str, wrapper: Callable[..., Any]) -> None:
        # The class's function and a weak reference instead of a bound method: a cycle through the pipeline would keep
        # gigabytes alive until the garbage collector runs.
        own = vars(flux).get(name)
        if own is not None:
            original = own
        else:
            unbound = getattr(type(flux), name)
            static = isinstance(_class_attribute(type(flux), name), staticmethod)
            alive = weakref.ref(flux)
            original = unbound if static else (lambda *args, **kwargs: unbound(alive(), *args, **kwargs))

        @functools.wraps(getattr(flux, name))
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        del replacement.__wrapped__  # the bound method, and with it the pipeline
        self._set(flux, name, replacement)

    def _register(self, callbacks: Any) -> None:
        callbacks.register(self)
        self._undo.append(lambda: _remove(callbacks.before_loop, self))

    # ---- During a generation

    def _generate_image(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flux: Any = self._flux()
        if not any(callback is self for callback in flux.callbacks.before_loop):
            raise PatchLostError(
                "the pipeline's callbacks were replaced after apply(), so gating cannot follow the schedule: "
                "call restore() on the handle and apply() again"
            )
        self._generation = None
        try:
            image = original(*args, **kwargs)
            generation: Generation | None = self._generation
            if generation is not None:
                self._handle.stats.commit(generation.stats())
            return image
        finally:
            self._generation = None

    def call_before_loop(self, config: Any, **_: Any) -> None:
        """mflux's callback: the schedule is known now."""
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


def _class_attribute(cls: type, name: str) -> Any:
    return next(vars(c)[name] for c in cls.__mro__ if name in vars(c))


def _remove(items: list[Any], item: Any) -> None:
    for i, candidate in enumerate(items):
        if candidate is item:
            del items[i]
            return
