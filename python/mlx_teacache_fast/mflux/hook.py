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
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
from mflux.models.common.schedulers import FlowMatchEulerDiscreteScheduler, LinearScheduler, SeedVR2EulerScheduler

from ..distributed import Branches, others_wanted
from ..errors import (
    AlreadyPatchedError,
    IncompatibleModelError,
    InternalStateError,
    NoBenefitWarning,
    TeaCacheValueError,
    TeaCacheWarning,
    UntestedVersionWarning,
    version_of,
    warn_caller,
)
from ..policy import Policy
from ..record import metadata
from ..record.stats import Stats
from ..step.captured import Arguments
from ..step.engine import Engine, Listener
from ..step.generation import Generation
from ..step.tap import Step
from .family import Family

NEWEST_VERIFIED_MFLUX = "0.24.0"

_HOOK = "_mlx_teacache_fast"  # the pipeline's attribute


class Hook:
    """Gating of one pipeline, as its handle says, to whose stats finished generations are added.

    With ``branches`` each of two processes computes one branch of the guidance.

    Set on the instance are ``generate_image``, and ``__getstate__``, by which copies of the pipeline are ungated.
    """

    def __init__(self, flux: Any, family: Family, handle: Any, branches: Branches | None = None) -> None:
        self.family = family
        self.branches = branches
        self.handle = handle
        self.policy: Policy = handle.policy
        self.stats: Stats = handle.stats
        self.is_live = False
        self.listener: Listener | None = None  # of what the model predicts
        self.short_schedule_told = False
        self._flux = weakref.ref(flux)
        own = vars(flux).get(family.runs)  # a method that somebody has set on the instance
        if own is not None and getattr(own, "__self__", None) is not flux:
            raise IncompatibleModelError(
                f"{family.runs} of this {type(flux).__name__} was replaced by somebody else's function, which would "
                f"run past the gate: call apply() first, and wrap {family.runs} afterwards"
            )
        self._own = None if own is None else own.__func__
        # The hook is there first and goes last: an interrupted apply() or restore() can be gone on with.
        self._set = {_HOOK: self, family.runs: self._replacement(flux), "__getstate__": self._state}

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
            if name == self.family.runs and self._own is not None:
                object.__setattr__(flux, name, types.MethodType(self._own, flux))
            else:
                object.__delattr__(flux, name)

    def _state(self) -> dict[str, Any]:
        """What ``copy``, ``deepcopy`` and ``pickle`` see of the pipeline's attributes."""
        state = {name: value for name, value in vars(self._flux()).items() if name not in self._set}
        if self._own is not None:
            state[self.family.runs] = types.MethodType(self._own, self._flux())
        return state

    def _replacement(self, flux: Any) -> Callable[..., Any]:
        current = getattr(flux, self.family.runs)

        # Not the bound method: a cycle through the pipeline would keep gigabytes until the garbage collector runs.
        def generate_image(*args: Any, **kwargs: Any) -> Any:
            return self._generate(*args, **kwargs)

        functools.update_wrapper(generate_image, current)
        del generate_image.__wrapped__  # type: ignore[attr-defined]  # the pipeline
        generate_image.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
        return generate_image

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        flux: Any = self._flux()
        generate_image = self._own or getattr(type(flux), self.family.runs)
        if not self.is_live:  # restored, and called by somebody who wrapped generate_image in between
            return generate_image(flux, *args, **kwargs)
        check_alone(flux)
        try:
            given = _named(generate_image, flux, *args, **kwargs)
        except InternalStateError:
            if self.family.schedule is not None:
                raise
            # Of a subclass's (*args, **kwargs), where what is given by place has no name.
            given = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        given = {n: p.default for n, p in inspect.signature(generate_image).parameters.items()} | given
        for name in LEAVES_OUT:
            if given.get(name):
                raise TeaCacheValueError(refused_argument(name, given[name], f"this {type(flux).__name__}"))
        run, started = _Run(self, flux, given), perf_counter()
        view = _view(run)
        if self.family.is_on_class:
            generate_image = _on_view(generate_image, view)
        if self.family.schedule is not None:
            sigmas = [float(sigma) for sigma in self.family.schedule(flux, given)]
            run.begin(len(sigmas) - 1, len(sigmas) - 1, lambda: sigmas)
        with nullcontext() if self.branches is None else others_wanted():
            image = generate_image(view, *args, **kwargs)
        run.finish(image, perf_counter() - started)
        return image


def refused_argument(name: str, value: object, what: str) -> str:
    """What to say of one of LEAVES_OUT."""
    return f"{name}={value!r} is mflux's own way to leave out steps, and {what} is gated: leave out either"


def check_alone(flux: Any) -> None:
    """Raises AlreadyPatchedError where mlx-teacache skips steps of the pipeline."""
    if (handle := vars(flux).get("_teacache_handle")) is not None:
        raise AlreadyPatchedError(
            f"mlx-teacache gates this {type(flux).__name__} too, and only one can decide: call restore() on either "
            "handle",
            handle,
        )


def hook_of(flux: Any) -> Hook | None:
    """Of a gated pipeline."""
    return cast(Hook | None, vars(flux).get(_HOOK))


class _Run:
    """One call of ``generate_image``: what its view of the pipeline has of its own."""

    def __init__(self, hook: Hook, flux: Any, given: dict[str, Any]) -> None:
        self.hook = hook
        self.flux = flux
        self._given = given  # generate_image's arguments
        # Of each loop that mflux has begun: one, but for a generate_image of the user's, or one that tries again.
        self._engines: list[Engine] = []
        self._seeds: list[Any] = []
        self._steps: dict[str, Step] = {}  # of the last one, by what the pipeline calls for them
        self._config: Any = None
        self._seed: Any = None

    # ---- What the view has in place of the pipeline's

    @property
    def callbacks(self) -> Any:
        """The pipeline's registry, and before its own callbacks ours."""
        own = self.flux.callbacks
        registry = copy.copy(own)  # with its lists, to which callbacks may be added
        registry.before_loop_callbacks = lambda: [self, *own.before_loop_callbacks()]
        registry.in_loop_callbacks = lambda: [self, *own.in_loop_callbacks()]
        return registry

    @property
    def module(self) -> Any:
        """In place of what the pipeline calls for a step."""
        return None if getattr(self.flux, self.hook.family.module) is None else _Called(self)

    def made(self, name: str, *given: Any) -> Callable[..., mx.array]:
        """In place of a factory: what mflux's returns, gated. Its first argument is the transformer."""
        make, (transformer, *others) = getattr(self.flux, name), given
        own: Callable[..., mx.array] = make(*given)
        # A function of somebody else may hide mflux's compiled one: then no array of its trace may get out.
        is_mfluxs = getattr(own, "__globals__", {}).get("__name__", "").startswith("mflux.")
        is_traced = type(own) is _COMPILED or not is_mfluxs
        is_compiled = type(own) is _COMPILED or (is_traced and self.hook.policy.cache == "residual")
        branches, is_several = self.hook.branches, self.hook.family.is_several
        steps: list[Step] = []

        def step(*by_place: Any, **by_name: Any) -> mx.array:
            if not self._engines:
                return own(*by_place, **by_name)
            if not steps:  # the factory may be called before the loop begins
                of, how = lambda t: make(t, *others), dict(is_traced=is_traced, is_compiled=is_compiled)
                ours = own
                if branches is not None and is_several:  # a message must not become a constant of a graph
                    ours, how["is_compiled"] = branches.exchanged(own), False
                elif branches is not None:
                    ours = branches.split(of, lambda: transformer, is_compiled=is_compiled)
                steps.append(self._engines[-1].through(of, lambda: transformer, ours, **how))
            return steps[0](**dict(zip(self.hook.family.positional, by_place, strict=True)), **by_name)

        return step

    def called(self, name: str, *args: Any, **kwargs: Any) -> mx.array:
        """In place of a method that is a step, or of a call of the module."""
        flux, family = self.flux, self.hook.family
        own = getattr(flux, name)
        if not self._engines:
            return cast(mx.array, own(*args, **kwargs))
        if name == family.module:
            given = _named(type(own).__call__, own, *args, **kwargs)
            make: Any = lambda module: module  # noqa: E731
        else:
            given = _named(getattr(type(flux), name), flux, *args, **kwargs)
            make = lambda transformer: getattr(_with_transformer(flux, family, transformer), name)  # noqa: E731
        if name not in self._steps:
            of = functools.partial(getattr, flux, family.transformer)
            now: Any = lambda **arguments: getattr(flux, name)(**arguments)  # noqa: E731
            if (branches := self.hook.branches) is not None:
                now = branches.exchanged(now) if family.is_several else branches.split(make, of, is_compiled=False)
            self._steps[name] = self._engines[-1].through(make, of, now, is_traced=False, is_compiled=False)
        return self._steps[name](**given)

    # ---- A loop, from its begin to its end

    def call_before_loop(self, config: Any, seed: Any = None, **_: Any) -> None:
        """mflux's callback: the schedule is known now."""
        family, skipped = self.hook.family, config.init_time_step

        def sigmas() -> Any:
            if family.sigmas is not None:
                return list(family.sigmas(self.flux, config, self._given))[skipped:]
            return list(getattr(config.scheduler, "sigmas", ()))[skipped:]

        self._config, self._seed = config, seed
        self.begin(max(0, config.num_inference_steps - skipped), config.num_inference_steps, sigmas)

    def begin(self, num_steps: int, num_inference_steps: int, sigmas: Callable[[], Any]) -> None:
        """A loop of so many steps, of so many that were asked for; ``sigmas`` are known at the first one."""
        hook, config, family = self.hook, self._config, self.hook.family
        if not hook.is_live:  # restored while the generation was being prepared
            return
        policy = hook.policy
        too_short = policy.rule.check_schedule(num_steps, num_inference_steps)
        if too_short is not None and not hook.short_schedule_told:
            hook.short_schedule_told = True
            _warn(too_short, NoBenefitWarning)
        if policy.cache == "output":
            if family.is_euler is not None:
                is_euler = family.is_euler(self._given)
            else:
                is_euler = getattr(type(getattr(config, "scheduler", None)), "step", None) in _EULER
            policy = replace(policy, corrector=policy.rho(getattr(config, "guidance", 1.0)) if is_euler else 0.0)
        num_tokens = getattr(config, "height", 1024) * getattr(config, "width", 1024) // 256
        more: Any = dict(num_tokens=num_tokens, plans=hook.handle.plans)
        if (branches := hook.branches) is not None:
            branches.check_arguments(self._given)
            own_sigmas, sigmas = sigmas, lambda: branches.sigmas(own_sigmas())
            more["decided"] = branches.decided
        generation = Generation(policy, num_steps, sigmas, **more)
        self._steps = {}
        how: Any = dict(is_several=family.is_several, changes=family.changes, listener=hook.listener)
        self._engines.append(Engine(generation, family.tap, **how))
        self._seeds.append(self._seed)

    def call_in_loop(self, **_: Any) -> None:
        """mflux's callback: a step is done."""
        if self._engines:
            self._engines[-1].end_step()
            if self.hook.branches is not None:
                self.hook.branches.end_step()

    def finish(self, image: Any, seconds: float) -> None:
        """Statistics and metadata of a finished picture, which is not lost, whatever happens here."""
        hook = self.hook
        counted, pictured, notes = [], [], []
        if not self._engines and hook.is_live:
            notes.append(
                f"this generation was not gated: {hook.family.runs} did not tell mflux's callbacks of its loop"
            )
        try:
            for engine, seed in zip(self._engines, self._seeds, strict=True):
                generation = engine.generation
                if generation.index == generation.num_steps:
                    counted.append(generation.stats(seconds if len(self._engines) == 1 else None))
                    if len(self._engines) == 1 or seed == getattr(image, "seed", None):
                        pictured.append((generation.policy, counted[-1]))
                elif generation.index == 0:
                    steps = " or ".join((*hook.family.factories, *hook.family.methods) or (hook.family.module,))
                    notes.append(
                        f"this generation was not gated: {hook.family.runs} ran its {generation.num_steps} steps "
                        f"without this {type(self.flux).__name__}'s {steps}"
                    )
                else:
                    notes.append(
                        f"this generation is not counted: {generation.index} of its {generation.num_steps} steps went "
                        "through the gate"
                    )
            if len(pictured) == 1 and hook.policy.save_metadata:  # else: of which one is the picture?
                more = {"variant_id": hook.handle.variant_id, "pipeline": type(self.flux).__name__}
                more["scheduler"] = self._given.get("scheduler", getattr(self._config, "_scheduler_str", None))
                metadata.add_to(image, metadata.record(*pictured[0], **more))
        except Exception as error:
            counted = []
            notes.append(f"this generation is not counted: {error!r}")
        for note in notes:
            _warn(note, TeaCacheWarning)
        hook.stats.commit(*counted)  # last: an interrupted generation does not count


# generate_image's arguments by which mflux itself leaves out steps.
LEAVES_OUT = ("step_cache_ratio", "teacache_ratio", "use_step_cache")
# Steps that are linear in the noise.
_EULER = [s.step for s in (LinearScheduler, FlowMatchEulerDiscreteScheduler, SeedVR2EulerScheduler)]
_COMPILED: Any = type(mx.compile(lambda: None))  # of no Python function, whatever isinstance says


def _warn(message: str, category: type[Warning]) -> None:
    try:
        warn_caller(message, category)
    except TeaCacheWarning:  # where warnings are errors
        print(message, file=sys.stderr)


class _Called:
    """Stands for a module in a generation: to call it is a step, and all else is the module's."""

    def __init__(self, run: _Run) -> None:
        object.__setattr__(self, "_run", run)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return cast(_Run, self._run).called(self._run.hook.family.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._run.flux, self._run.hook.family.module), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(self._run.flux, self._run.hook.family.module), name, value)


def _named(method: Any, *args: Any, **kwargs: Any) -> Arguments:
    """The arguments of a call by name, but for the first one."""
    try:
        signature = inspect.signature(method)
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:  # which says what is wrong
        method(*args, **kwargs)
        raise
    named: Arguments = {}
    for name, value in [*bound.items()][1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise InternalStateError(
                f"{method.__qualname__} was replaced by a function that does not name its arguments"
            )
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def _with_transformer(flux: Any, family: Family, transformer: Any) -> Any:
    """A copy of the pipeline, ungated."""
    copied = copy.copy(flux)
    setattr(copied, family.transformer, transformer)
    return copied


class _View:
    """A pipeline in one generation, with its ``__dict__``: all is the pipeline's, but for what the run has."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run.flux, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._run.flux, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._run.flux, name)


def _delegated(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._run.flux, name)(*args)


_DICT = "__contains__ __delitem__ __getitem__ __iter__ __len__ __setitem__ get items keys pop values"


@functools.cache
def _view_class(kind: Any, family: Family) -> Any:
    about: dict[str, Any] = {"__slots__": ("_run",), "__module__": kind.__module__, "__doc__": kind.__doc__}
    if issubclass(kind, dict):  # as nn.Module is, of its arrays and children
        about |= {name: _delegated(name) for name in _DICT.split()}
    if family.schedule is None:
        about["callbacks"] = property(lambda self: self._run.callbacks)
    about[family.runs] = property(
        lambda self: types.MethodType(getattr(type(self._run.flux), family.runs), self)
    )  # ungated
    for name in (*family.factories, *family.methods):
        way = "made" if name in family.factories else "called"
        if hasattr(kind, name):
            about[name] = property(lambda self, n=name, w=way: functools.partial(getattr(self._run, w), n))  # type: ignore[misc]
    if not (family.factories or family.methods):
        about[family.module] = property(lambda self: self._run.module)
    return type(kind.__name__, (_View, kind), about)


def _view(run: _Run) -> Any:
    kind = _view_class(cast(Any, type(run.flux)), run.hook.family)
    view = (dict if issubclass(kind, dict) else object).__new__(kind)  # a class's own may give its one instance
    object.__setattr__(view, "_run", run)
    object.__setattr__(view, "__dict__", vars(run.flux))
    return view


def _on_view(function: Any, view: Any) -> Any:
    """A method that looks others up on its class, by the class's name: with the view of that name."""
    owner = next((kind for kind in type(view).__mro__ if function in vars(kind).values()), None)
    if owner is None:  # of somebody else
        return function
    names = function.__globals__ | {owner.__name__: view}
    bound = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


@functools.cache
def warn_if_untested() -> None:
    """Once in a process, if mflux is newer than what was verified, or another package has its place."""
    installed = version_of("mflux")
    if installed is None:
        warn_caller(
            "no package of the name mflux is installed: a fork that has its place was not verified with this package",
            UntestedVersionWarning,
        )
    elif _numbers(installed) > _numbers(NEWEST_VERIFIED_MFLUX):
        warn_caller(
            f"mflux {installed} is newer than {NEWEST_VERIFIED_MFLUX}, the newest that was verified with this package",
            UntestedVersionWarning,
        )


def _numbers(v: str) -> tuple[int, ...]:
    return tuple(int(part) for part in v.split(".") if part.isdigit())
