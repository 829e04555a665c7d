"""What ``apply`` sets on a pipeline, and what a generation of it runs on. No class and no module is changed.

A generation runs mflux's own ``generate_image`` on a view of the pipeline: an object that is the pipeline in all but
what the generation needs of its own. So generations know nothing of each other, whichever threads they run in, and an
interrupted one leaves nothing behind: the pipeline and its transformer were never changed.
"""

import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
from mflux.models.common.schedulers import FlowMatchEulerDiscreteScheduler, LinearScheduler, SeedVR2EulerScheduler

from ..errors import IncompatibleModelError, NoBenefitWarning, TeaCacheWarning, UntestedVersionWarning, warn_caller
from ..policy import Policy
from ..record import metadata
from ..record.stats import Stats
from ..step.engine import Engine
from ..step.generation import Generation
from .family import Family

NEWEST_VERIFIED_MFLUX = "0.24.0"

_HOOK = "_mlx_teacache_fast"  # the pipeline's attribute


class Hook:
    """Gating of one pipeline, as its handle says, to whose stats finished generations are added.

    Set on the instance are ``generate_image``, and ``__getstate__``, by which copies of the pipeline are ungated.
    """

    def __init__(self, flux: Any, family: Family, handle: Any) -> None:
        self.family = family
        self.handle = handle
        self.policy: Policy = handle.policy
        self.stats: Stats = handle.stats
        self.is_live = False
        self.short_schedule_told = False
        self._flux = weakref.ref(flux)
        own = vars(flux).get("generate_image")  # a method that somebody has set on the instance
        if own is not None and getattr(own, "__self__", None) is not flux:
            raise IncompatibleModelError(
                f"generate_image of this {type(flux).__name__} was replaced by somebody else's function, which would "
                "run past the gate: call apply() first, and wrap generate_image afterwards"
            )
        self._own = None if own is None else own.__func__
        # The hook is there first and goes last: an interrupted apply() or restore() can be gone on with.
        self._set = {_HOOK: self, "generate_image": self._replacement(flux), "__getstate__": self._state}

    def install(self) -> None:
        flux = self._flux()
        for name, value in self._set.items():
            object.__setattr__(flux, name, value)
        self.is_live = True

    def undo(self) -> None:
        """Take back everything. May be called again, also after an interruption."""
        self.is_live = False
        flux = self._flux()
        for name, value in reversed(self._set.items()):
            if flux is None or vars(flux).get(name) is not value:
                continue  # gone, or replaced by somebody else: not ours to change
            if name == "generate_image" and self._own is not None:
                object.__setattr__(flux, name, types.MethodType(self._own, flux))
            else:
                object.__delattr__(flux, name)

    def _state(self) -> dict[str, Any]:
        """What ``copy``, ``deepcopy`` and ``pickle`` see of the pipeline's attributes."""
        state = {name: value for name, value in vars(self._flux()).items() if name not in self._set}
        if self._own is not None:
            state["generate_image"] = types.MethodType(self._own, self._flux())
        return state

    def _replacement(self, flux: Any) -> Callable[..., Any]:
        current = flux.generate_image

        # Not the bound method: a cycle through the pipeline would keep gigabytes until the garbage collector runs.
        def generate_image(*args: Any, **kwargs: Any) -> Any:
            return self._generate(*args, **kwargs)

        functools.update_wrapper(generate_image, current)
        del generate_image.__wrapped__  # type: ignore[attr-defined]  # the pipeline
        generate_image.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
        return generate_image

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        flux: Any = self._flux()
        generate_image = self._own or type(flux).generate_image
        if not self.is_live:  # restored, and called by somebody who wrapped generate_image in between
            return generate_image(flux, *args, **kwargs)
        run = _Run(self, flux)
        started = perf_counter()
        image = generate_image(_view(run), *args, **kwargs)
        run.finish(image, perf_counter() - started)
        return image


def hook_of(flux: Any) -> Hook | None:
    """Of a gated pipeline."""
    return cast(Hook | None, vars(flux).get(_HOOK))


class _Run:
    """One call of ``generate_image``: what its view of the pipeline has of its own."""

    def __init__(self, hook: Hook, flux: Any) -> None:
        self.hook = hook
        self.flux = flux
        # Of each loop that mflux has begun: one, but for a generate_image of the user's.
        self._engines: list[Engine] = []
        self._step: Any = None  # of the last one, where the pipeline calls its transformer
        self._config: Any = None

    # ---- What the view has in place of the pipeline's

    @property
    def callbacks(self) -> Any:
        """The pipeline's registry, and before its own callbacks ours."""
        own = self.flux.callbacks
        registry = copy.copy(own)  # with its lists, to which callbacks may be added
        registry.before_loop_callbacks = lambda: [self, *own.before_loop_callbacks()]
        return registry

    @property
    def transformer(self) -> Any:
        transformer = self.flux.transformer
        return transformer if self.hook.family.factories or transformer is None else _Transformer(self)

    def made(self, name: str, transformer: Any) -> Callable[..., mx.array]:
        """In place of a factory: what mflux's returns, gated."""
        make = getattr(self.flux, name)
        own: Callable[..., mx.array] = make(transformer)
        if not self._engines:
            return own
        # A function of somebody else may hide mflux's compiled one: then no array of its trace may get out.
        is_mfluxs = getattr(own, "__globals__", {}).get("__name__", "").startswith("mflux.")
        is_traced = type(own) is _COMPILED or not is_mfluxs
        is_compiled = type(own) is _COMPILED or (is_traced and self.hook.policy.cache == "residual")
        return self._engines[-1].through(make, lambda: transformer, own, is_traced=is_traced, is_compiled=is_compiled)

    def called(self, *args: Any, **kwargs: Any) -> mx.array:
        """In place of a call of the transformer."""
        transformer = self.flux.transformer
        if self._step is None:
            return cast(mx.array, transformer(*args, **kwargs))
        given = inspect.signature(type(transformer).__call__).bind(transformer, *args, **kwargs).arguments
        noise: mx.array = self._step(**dict([*given.items()][1:]))
        return noise

    # ---- A loop, from its begin to its end

    def call_before_loop(self, config: Any, **_: Any) -> None:
        """mflux's callback: the schedule is known now."""
        hook, flux = self.hook, self.flux
        if not hook.is_live:  # restored while the generation was being prepared
            return
        num_steps = max(0, config.num_inference_steps - config.init_time_step)
        too_short = hook.policy.rule.check_schedule(num_steps, config.num_inference_steps)
        if too_short is not None and not hook.short_schedule_told:
            hook.short_schedule_told = True
            _warn(too_short, NoBenefitWarning)

        def sigmas() -> Any:
            return list(getattr(config.scheduler, "sigmas", ()))[config.init_time_step :]

        policy = hook.policy
        if policy.cache == "output":
            is_linear = getattr(type(config.scheduler), "step", None) in _EULER
            rho = policy.rho(getattr(config, "guidance", 1.0))
            policy = replace(policy, corrector=rho if is_linear else 0.0)
        num_tokens = getattr(config, "height", 1024) * getattr(config, "width", 1024) // 256
        generation = Generation(policy, num_steps, sigmas, num_tokens=num_tokens, plans=hook.handle.plans)
        engine = Engine(generation, hook.family.tap)
        self._config = config
        if not hook.family.factories:
            own: Any = lambda **arguments: flux.transformer(**arguments)  # noqa: E731
            self._step = engine.through(lambda t: t, lambda: flux.transformer, own, is_traced=False, is_compiled=False)
        self._engines.append(engine)

    def finish(self, image: Any, seconds: float) -> None:
        """Statistics and metadata of a finished picture, which is not lost, whatever happens here."""
        hook = self.hook
        counted, notes = [], []
        if not self._engines and hook.is_live:
            notes.append("this generation was not gated: generate_image did not tell mflux's callbacks of its loop")
        try:
            for engine in self._engines:
                generation = engine.generation
                if generation.index == generation.num_steps:
                    counted.append(generation.stats(seconds if engine is self._engines[-1] else None))
                else:
                    notes.append(
                        f"this generation is not counted: {generation.index} of its {generation.num_steps} steps went "
                        "through the gate"
                    )
            if counted and hook.policy.save_metadata:
                more = {"variant_id": hook.handle.variant_id, "pipeline": type(self.flux).__name__}
                more["scheduler"] = getattr(self._config, "_scheduler_str", None)
                metadata.add_to(image, metadata.record(self._engines[-1].generation.policy, counted[-1], **more))
        except Exception as error:
            counted = []
            notes.append(f"this generation is not counted: {error!r}")
        for note in notes:
            _warn(note, TeaCacheWarning)
        hook.stats.commit(*counted)  # last: an interrupted generation does not count


# Steps that are linear in the noise.
_EULER = [s.step for s in (LinearScheduler, FlowMatchEulerDiscreteScheduler, SeedVR2EulerScheduler)]
_COMPILED: Any = type(mx.compile(lambda: None))  # of no Python function, whatever isinstance says


def _warn(message: str, category: type[Warning]) -> None:
    try:
        warn_caller(message, category)
    except TeaCacheWarning:  # where warnings are errors
        print(message, file=sys.stderr)


class _Transformer:
    """Stands for the transformer in a generation: to call it is a step, and all else is the transformer's."""

    def __init__(self, run: _Run) -> None:
        object.__setattr__(self, "_run", run)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return cast(_Run, self._run).called(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run.flux.transformer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._run.flux.transformer, name, value)


class _View:
    """A pipeline in one generation, with its ``__dict__``: all is the pipeline's, but for what the run has."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run.flux, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._run.flux, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._run.flux, name)

    callbacks = property(lambda self: self._run.callbacks)
    transformer = property(lambda self: self._run.transformer)
    generate_image = property(lambda self: types.MethodType(type(self._run.flux).generate_image, self))  # ungated


def _delegated(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._run.flux, name)(*args)


# nn.Module is a dict of its arrays and children.
_DICT = "__contains__ __delitem__ __getitem__ __iter__ __len__ __setitem__ get items keys pop values"
for _name in _DICT.split():
    setattr(_View, _name, _delegated(_name))


@functools.cache
def _view_class(kind: Any, factories: tuple[str, ...]) -> Any:
    about = {"__slots__": ("_run",), "__module__": kind.__module__, "__doc__": kind.__doc__}
    own = {
        name: property(lambda self, name=name: functools.partial(self._run.made, name))  # type: ignore[misc]
        for name in factories
        if hasattr(kind, name)
    }
    return type(kind.__name__, (_View, kind), about | own)


def _view(run: _Run) -> Any:
    kind = _view_class(cast(Any, type(run.flux)), run.hook.family.factories)
    view = kind.__new__(kind)
    object.__setattr__(view, "_run", run)
    object.__setattr__(view, "__dict__", vars(run.flux))
    return view


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
