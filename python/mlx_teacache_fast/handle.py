"""``apply``: gating a pipeline by a policy, and the handle that says what happened and undoes it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from .distributed import Branches, Group
from .errors import (
    AlreadyPatchedError,
    DisabledWarning,
    IncompatibleModelError,
    NoBenefitWarning,
    TeaCacheError,
    TeaCacheValueError,
    UncalibratedWarning,
    shown,
    warn_caller,
)
from .models import VARIANTS, Provenance, Variant
from .pictures import read_policy
from .plans import PublishedPlans, published_plans
from .policy import MODES, RULES, Budget, Gate, Policy, Steps, Tolerance, described, settings
from .record.stats import Stats
from .record.trace import Trace
from .support import require_mflux

if TYPE_CHECKING:
    from .mflux.family import Family
    from .mflux.hook import Hook


class Handle:
    """A gated pipeline. As a context manager it restores the pipeline at the end.

    Attributes:
        policy: How it is gated, with the model's values in place of those that were left open.
        variant_id: The model that it is taken for; the gate uses its coefficients.
        calibrated: Whether these are published for this very model and pipeline; False with your own.
        provenance: Where what decides comes from.
        plans: Which steps others computed with this model, as published; a budget goes by them. None if nobody did.
        stats: Totals over finished generations, and the last one step by step. Kept after ``restore``.
    """

    def __init__(self, policy: Policy, variant: Variant, calibrated: bool, plans: PublishedPlans | None) -> None:
        rule, models = policy.rule, (variant.coefficients, variant.calibrated_range)
        own = isinstance(rule, Steps) or (
            isinstance(rule, Gate) and (rule.coefficients, rule.calibrated_range) != models
        )
        self.policy = policy
        self.plans = plans
        self.variant_id = variant.variant_id
        self.calibrated = calibrated and not own
        self.provenance = Provenance("user") if own else variant.provenance
        if isinstance(rule, Tolerance | Budget):
            published = plans if rule.budget is not None else None
            self.provenance = (
                Provenance("published", reference_url=published.source) if published else Provenance("rule")
            )
        self.stats = Stats()
        self._hook: Hook | None = None  # the last: with it the handle is made

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_hook") and not name.startswith("_"):
            raise AttributeError(f"{name} cannot be set on a handle: call restore() and apply() again")
        super().__setattr__(name, value)

    @property
    def rel_l1_thresh(self) -> float | None:
        """The policy's threshold, by mlx-teacache's name; None without the gate."""
        return self.policy.rule.rel_l1_thresh if isinstance(self.policy.rule, Gate) else None

    def restore(self) -> None:
        """Undo ``apply``: every attribute of the pipeline is as before. May be called again."""
        if self._hook is not None:
            self._hook.undo()
            self._hook = None
            self.stats.freeze()

    @property
    def trace(self) -> Trace:
        """The finished generations step by step, with the policy: for ``Trace.to_json`` and ``replay``."""
        return Trace(self.variant_id, self.policy, self.stats.finished)

    def summary(self) -> str:
        """The finished generations as a table to print: steps, distances, and seconds where they are known."""
        return self.trace.summary()

    def __enter__(self) -> Self:
        if self._hook is None:
            raise TeaCacheError(f"{self!r} gates nothing any more: call apply() again")
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """A copy could undo the original, or look live when that is restored."""
        raise TeaCacheError(
            "a handle belongs to its pipeline and cannot be copied or pickled: its policy, stats and trace can"
        )

    def __repr__(self) -> str:
        live = "restored" if self._hook is None else "live"
        return f"<Handle {self.variant_id}, {self.policy}, {live}>"


def apply(flux: Any, policy: Policy | str | Path | None = None, *, group: Group | None = None, **given: Any) -> Handle:
    """Skip denoising steps of an mflux pipeline where a forecast of what they would compute is good enough.

    ``flux.generate_image`` is used as before, with all of its arguments, also in several threads. A computed step is
    mflux's own, less what the corrector takes back; a skipped one gets a forecast of the noise prediction from the last
    computed ones. Copies of a gated pipeline are not gated.

    Args:
        flux: A pipeline of mflux: ``print(supported())`` lists the classes and models.
        policy: A ``Policy``; or the path of one, as ``Policy.to_json`` and ``mlx-teacache-fast tune`` write them, or of
            a gated picture. Instead of it, settings:
        group: Two processes that make each picture together, one for each branch of the guidance:
            ``mx.distributed.init()`` under ``mlx.launch -n 2`` (docs/distributed.md).
        **given:
            {settings}

    Returns:
        Handle: Use it as a context manager, or call its ``restore()``.

    Raises:
        TeaCacheValueError: A setting has the wrong type or value, or cannot count beside another (a ``ValueError``
            too).
        IncompatibleModelError: ``flux`` is not a pipeline that can be gated (a ``TypeError`` too).
        AlreadyPatchedError: ``flux`` is gated already; call ``restore()`` on its handle first.
        TeaCacheError: With ``group``, another process is gone.
        OSError: The file cannot be read.
    """
    return gate(flux, policy_of(policy, given), None if group is None else Branches(group))


def apply_teacache(flux: Any, **given: Any) -> Handle:
    """``apply`` as mlx-teacache does it: steps that are skipped, and pictures, are those of its 0.14.1.

    A skipped step reuses the last residual: ``forecast=0, cache="residual"``, unless the settings say otherwise.

    Args:
        flux: As for ``apply``.
        **given: Settings, as for ``apply``.

    Returns:
        Handle: As of ``apply``, whose errors this has too.
    """
    return gate(flux, Policy.of(Gate, **{"forecast": 0, "cache": "residual"} | given))


@contextmanager
def gate_all(policy: Policy | str | Path | None = None, **given: Any) -> Iterator[list[Handle]]:
    """Until the end of the block, every pipeline that is made and can be gated is gated.

    For programs that make their pipelines themselves: a server, a command. For that time the ``__init__`` of the
    pipelines' classes is wrapped.

    Args:
        policy: As for ``apply``; with ``given``.

    Yields:
        list[Handle]: Of the pipelines, in the order in which they were made; restored at the end.

    Raises:
        Exception: As of ``apply``: of the settings at once, of a pipeline where it is made.
    """
    policy = policy_of(policy, given)
    require_mflux()
    from .mflux.commands import gating

    handles: list[Handle] = []
    try:
        with gating(lambda flux: handles.append(gate(flux, policy)), policy):
            yield handles
    finally:
        for handle in handles:
            handle.restore()


def register(family: "Family") -> None:
    """Have ``apply`` and ``gate_all`` gate pipelines that are not mflux's, too: docs/families.md has an example.

    Args:
        family: What is to be known of them.

    Raises:
        TeaCacheValueError: Its classes do not have the methods that it names.
        IncompatibleModelError: mflux cannot be imported.
    """
    require_mflux()
    from .mflux import families

    families.register(family)


def _documented() -> None:
    """``help(apply)`` shows every setting, with its default and text."""
    apply.__doc__ = (apply.__doc__ or "").replace("{settings}", described(" " * 12, *RULES, Policy))
    named = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None if f.default is MISSING else f.default)
        for f in settings(*RULES, Policy)
    ]
    first = [p for name, p in inspect.signature(apply).parameters.items() if name != "given"]
    apply.__signature__ = inspect.signature(apply).replace(parameters=[*first, *named])  # type: ignore[attr-defined]


_documented()


def policy_of(policy: Policy | str | Path | None, given: dict[str, Any]) -> Policy:
    """What ``apply`` was asked for."""
    if policy is None:
        return Policy.of(**given)
    if given:
        raise TeaCacheValueError(f"a policy has all settings: leave out either it or {', '.join(given)}")
    if isinstance(policy, str) and policy in MODES:
        raise TeaCacheValueError(f"a policy is a Policy or a path, and {policy!r} a mode: mode={policy!r}")
    if isinstance(policy, str | PathLike):
        return read_policy(policy)
    if not isinstance(policy, Policy):
        raise TeaCacheValueError(f"policy must be a Policy, or the path of one or of a picture, got {shown(policy)}")
    return policy


def gate(flux: Any, policy: Policy, branches: Branches | None = None) -> Handle:
    """``apply``, of a policy."""
    require_mflux()
    from .mflux import families, hook

    # TeaCache as published takes the demonstration model for the one whose name it has, as mlx-teacache does.
    by_name = not isinstance(policy.rule, Tolerance) and (policy.forecast, policy.cache) == (0, "residual")
    found = families.match(getattr(flux, "model_config", None), type(flux), by_name)
    family, variant, calibrated = found
    if getattr(flux, family.transformer, None) is None:
        raise IncompatibleModelError(
            f"this {type(flux).__name__} has no transformer any more (mflux's low-memory mode drops it after a "
            "generation): load the pipeline again"
        )
    if (existing := hook.hook_of(flux)) is not None:
        raise AlreadyPatchedError(
            f"this {type(flux).__name__} is gated already ({existing.handle!r}): call restore() on that handle first "
            "(this error has it as its attribute `handle`)",
            existing.handle,
        )
    hook.check_alone(flux)
    policy = families.fitting(policy, found, type(flux).__name__)
    if branches is not None:
        if family.is_one_call or not (family.is_several or family.factories or family.methods):
            raise TeaCacheValueError(f"a step of {type(flux).__name__} is one call of its transformer: leave out group")
        if policy.cache == "residual":
            raise TeaCacheValueError('group is for cache="output": of the blocks\' residual nothing is exchanged')
        branches.check_pipeline(flux, policy, getattr(flux, family.transformer))
    handle = Handle(policy, variant, calibrated, published_plans(getattr(flux, "model_config", None)))
    handle._hook = hook.Hook(flux, family, handle, branches)
    if reason := policy.rule.skips_nothing:
        warn_caller(f"{reason}: every step computes", DisabledWarning)
    elif isinstance(policy.rule, Tolerance | Gate) and handle.provenance.source != "user":
        if variant.distilled:
            warn_caller(
                f"{variant.variant_id} is distilled to a few steps that differ too much for any to be skipped: "
                "expect no speedup",
                NoBenefitWarning,
            )
        if isinstance(policy.rule, Gate) and not calibrated:
            warn_caller(families.uncalibrated_message(flux, variant), UncalibratedWarning)
    elif isinstance(policy.rule, Gate):
        pair = policy.rule.coefficients, policy.rule.calibrated_range
        other = next((v for v in VARIANTS.values() if (v.coefficients, v.calibrated_range) == pair), None)
        if other is not None:  # as in a picture of another model
            name = getattr(getattr(flux, "model_config", None), "model_name", type(flux).__name__)
            warn_caller(
                f"{name} is used with another model's coefficients, those of "
                f"{other.variant_id}: they may not fit it, compare a few pictures with ungated ones",
                UncalibratedWarning,
            )
    hook.warn_if_untested()
    try:
        handle._hook.install()
    except BaseException:  # Ctrl-C included
        handle.restore()
        raise
    return handle
