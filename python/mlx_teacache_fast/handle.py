"""``apply``: its arguments, and the handle that says what happened and undoes it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from . import arguments, summary
from .errors import (
    AlreadyPatchedError,
    DisabledWarning,
    NoBenefitWarning,
    TeaCacheError,
    TeaCacheValueError,
    UncalibratedWarning,
    warn_caller,
)
from .forecast import DEFAULT_CACHE, DEFAULT_FORECAST, Cache
from .plans import Plan
from .stats import Stats
from .support import require_mflux
from .trace import Trace
from .variants import (
    DEFAULT_MAX_CONSECUTIVE_SKIPS,
    DEFAULT_MODE,
    DEFAULT_THRESHOLD,
    MODES,
    Calibration,
    Coefficients,
    Mode,
    Provenance,
    Variant,
)

if TYPE_CHECKING:
    from .mflux.patch import Patch


class Handle:
    """A gated pipeline. As a context manager it restores the pipeline at the end.

    Attributes:
        variant_id: The model whose coefficients are in use.
        calibrated: Whether they were fitted on this very model and pipeline; False with your own.
        rel_l1_thresh: Threshold on the accumulated distance; 0 gates nothing.
        coefficients: Polynomial of the relative L1 distance, c4 first.
        calibrated_range: Distances that the polynomial was fitted on, or None.
        provenance: Where the coefficients come from.
        skip_first_n_steps, skip_last_n_steps: Steps that always compute, at either end.
        max_consecutive_skips: A step computes after so many skipped ones.
        max_skips: So many steps of a generation are skipped at most; None for no limit.
        plan: For each active step whether it computes; None unless ``steps`` or ``plan`` was given.
        budget: Share of the steps that computes, planned when the schedule is known; None unless it was given.
        forecast: Order of the extrapolation over sigma that a skipped step gets; 0 reuses what there was last.
        cache: What is extrapolated: ``residual`` of the transformer's blocks, or ``output``, the noise prediction.
        save_metadata: Whether pictures say how they were made, when mflux saves them.
        stats: Totals over finished generations, and the last one step by step. Kept after ``restore``.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        calibrated: bool,
        rel_l1_thresh: float,
        coefficients: Coefficients,
        calibrated_range: tuple[float, float] | None,
        provenance: Provenance,
        skip_first_n_steps: int,
        skip_last_n_steps: int,
        max_consecutive_skips: int,
        max_skips: int | None,
        plan: tuple[bool, ...] | None,
        budget: float | None,
        forecast: int,
        cache: Cache,
        save_metadata: bool,
    ) -> None:
        self.variant_id = variant.variant_id
        self.calibrated = calibrated
        self.rel_l1_thresh = rel_l1_thresh
        self.coefficients = coefficients
        self.calibrated_range = calibrated_range
        self.provenance = provenance
        self.skip_first_n_steps = skip_first_n_steps
        self.skip_last_n_steps = skip_last_n_steps
        self.max_consecutive_skips = max_consecutive_skips
        self.max_skips = max_skips
        self.plan = plan
        self.budget = budget
        self.forecast = forecast
        self.cache: Cache = cache
        self.save_metadata = save_metadata
        self.stats = Stats()
        self._patch: Patch | None = None  # set by Patch, which it undoes

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and hasattr(self, name):
            raise AttributeError(f"{name} is fixed by apply(): call restore() and apply() again to change it")
        super().__setattr__(name, value)

    def restore(self) -> None:
        """Undo ``apply``: every attribute and callback of the pipeline is as before. May be called again."""
        if self._patch is not None:
            self._patch.undo()
            self._patch = None
            self.stats.freeze()

    @property
    def is_planned(self) -> bool:
        """Whether steps are planned before the run, and nothing is measured."""
        return self.plan is not None or self.budget is not None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments with which ``apply`` gates another pipeline of this model in the same way."""
        how: dict[str, Any] = {"forecast": self.forecast, "cache": self.cache}
        if self.plan is not None:
            return how | {"steps": arguments.plan_text(self.plan)}
        if self.budget is not None:
            return how | {"budget": self.budget}
        own: dict[str, Any] = {}
        if self.provenance.source == "user":
            own["coefficients"] = self.coefficients
            if self.calibrated_range is not None:
                limits = {"calibrated_range": self.calibrated_range}
                own["coefficients"] = {"coefficients": self.coefficients} | limits
        return (
            how
            | own
            | {
                "rel_l1_thresh": self.rel_l1_thresh,
                "skip_first_n_steps": self.skip_first_n_steps,
                "skip_last_n_steps": self.skip_last_n_steps,
                "max_consecutive_skips": self.max_consecutive_skips,
                "max_skips": self.max_skips,
            }
        )

    @property
    def trace(self) -> Trace:
        """The finished generations step by step, with these settings: for ``Trace.to_json`` and ``replay``."""
        return Trace(
            variant_id=self.variant_id,
            rel_l1_thresh=self.rel_l1_thresh,
            coefficients=self.coefficients,
            calibrated_range=self.calibrated_range,
            skip_first_n_steps=self.skip_first_n_steps,
            skip_last_n_steps=self.skip_last_n_steps,
            max_consecutive_skips=self.max_consecutive_skips,
            max_skips=self.max_skips,
            budget=self.budget,
            forecast=self.forecast,
            cache=self.cache,
            steps=None if self.plan is None else arguments.plan_text(self.plan),
            generations=self.stats.finished,
        )

    def summary(self) -> str:
        """The finished generations as a table to print: steps, distances, and seconds where they are known."""
        how = "steps as planned" if self.plan is not None else f"rel_l1_thresh {self.rel_l1_thresh:g}"
        if self.budget is not None:
            how = f"budget {self.budget:g}"
        if (self.forecast, self.cache) != (0, "residual"):  # TeaCache's
            how += f", forecast {self.forecast} of the {self.cache}"
        return f"{self.variant_id}, {how}\n{summary.table(self.stats.finished)}"

    def __enter__(self) -> Self:
        if self._patch is None:
            raise TeaCacheError(f"{self!r} gates nothing any more: call apply() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        live = "restored" if self._patch is None else "live"
        return f"<Handle {self.variant_id} rel_l1_thresh={self.rel_l1_thresh} {live}>"


def apply(
    flux: Any,
    *,
    mode: Mode | None = None,
    rel_l1_thresh: float | None = None,
    coefficients: Sequence[float] | str | Path | Calibration | Mapping[str, Any] | None = None,
    skip_first_n_steps: int = 1,
    skip_last_n_steps: int = 1,
    max_consecutive_skips: int = DEFAULT_MAX_CONSECUTIVE_SKIPS,
    max_skips: int | None = None,
    steps: str | Sequence[int] | None = None,
    budget: float | None = None,
    plan: str | Path | Plan | None = None,
    forecast: int | None = None,
    cache: Cache | None = None,
    save_metadata: bool = True,
) -> Handle:
    """Skip denoising steps of an mflux FLUX pipeline whose input has hardly changed since the step before.

    ``flux.generate_image`` is used as before, with all of its arguments; one thread at a time for each pipeline.
    mflux's forward pass is its own; a step whose transformer blocks are skipped gets a forecast of the noise prediction
    from the last computed ones.

    Args:
        flux: An mflux ``Flux1`` (dev, schnell, krea-dev), ``Flux1Controlnet``, ``Flux1Depth``, ``Flux1Fill``,
            ``Flux1InContextDev``, ``Flux1InContextFill``, ``Flux1Kontext``, ``Flux1Redux``, ``Flux2Klein`` or
            ``Flux2KleinEdit`` (klein-4b, klein-9b, klein-9b-kv, base-4b, base-9b).
        mode: The threshold by name: ``"balanced"``, the default, is the model's own; ``"quality"`` is 0.85 times as
            much, ``"fast"`` twice. What they give: docs/forecasting.md.
        rel_l1_thresh: The threshold itself: higher skips more, 0.0 to 1.0; 0.0 skips nothing and is bit-equal to plain
            mflux. The model's own is 0.17 for the base models, 0.20 with your ``coefficients`` unless they say.
        coefficients: In place of the model's polynomial of the relative L1 distance: five numbers, fourth degree first,
            used without a calibrated range; or what ``mlx-teacache-fast calibrate`` wrote, its file's path or the
            ``Calibration``.
        skip_first_n_steps: So many first steps always compute.
        skip_last_n_steps: So many last steps always compute.
        max_consecutive_skips: A step computes after so many skipped ones; 0 skips nothing.
        max_skips: So many steps of a generation are skipped at most. Default: no limit.
        steps: Which active steps compute (1) and which are skipped (0), for example ``"110101001"`` or a list: nothing
            is measured and no decision is read. Thresholds, limits and forced steps have no place beside it.
        budget: At most this share of the active steps computes, above 0.0 and up to 1.0, instead of measuring: the
            first and the last in any case, and others in between, the denser the more sigma changes. (Of an edit with a
            key-value cache the second one too, with ``cache="residual"``.) It stands alone, as ``steps`` does.
        plan: What ``mlx-teacache-fast search`` found, its file's path or the ``Plan``: ``steps``, with the ``forecast``
            and ``cache`` that they were found with.
        forecast: What a skipped step gets: 0 reuses what the last computed step made, 1 (the default) and 2 extrapolate
            the last two or three over sigma, by a polynomial of this order, guarded: never further than the gap between
            the last two, and by a lower order where there are fewer values or much would be amplified.
        cache: What is reused or extrapolated: ``"output"`` (the default), the noise prediction, guidance included
            (each of the ``forecast + 1`` kept is S x 64 numbers for FLUX.1, S x 128 for FLUX.2), or ``"residual"``,
            what the transformer's blocks added to the image tokens (S x D for each branch of the guidance).
            ``forecast=0, cache="residual"`` is TeaCache as published, and as of mlx-teacache.
        save_metadata: Pictures that mflux saves as PNG, JPEG or WebP say in their metadata how they were gated, for
            ``read_metadata``.

    Returns:
        Handle: Use it as a context manager, or call its ``restore()``.

    Raises:
        TeaCacheValueError: An argument has the wrong type or value (a ``ValueError`` too).
        IncompatibleModelError: ``flux`` is not a pipeline that can be gated (a ``TypeError`` too).
        AlreadyPatchedError: ``flux`` is gated already; call ``restore()`` on its handle first.
        OSError: The file of ``plan`` or ``coefficients`` cannot be read.
    """
    given = {name: value for name, value in locals().items() if name != "flux"}
    return _apply(flux, check_settings(**given))


def apply_teacache(flux: Any, **settings: Any) -> Handle:
    """``apply`` as mlx-teacache does it: steps that are skipped, and pictures, are those of its 0.14.1.

    A skipped step reuses the last residual: ``forecast=0, cache="residual"``, unless a ``plan`` says otherwise.

    Args:
        flux: As for ``apply``.
        **settings: ``apply``'s other arguments.

    Returns:
        Handle: As of ``apply``, whose errors this has too.
    """
    reuse = {} if settings.get("plan") is not None else {"forecast": 0, "cache": "residual"}
    return _apply(flux, check_settings(**reuse | settings))


class Settings(NamedTuple):
    """``apply``'s arguments, checked, with those that a file has."""

    mode: Mode | None
    rel_l1_thresh: float | None
    calibration: Calibration | None
    skip_first_n_steps: int
    skip_last_n_steps: int
    max_consecutive_skips: int
    max_skips: int | None
    plan: tuple[bool, ...] | None
    budget: float | None
    forecast: int
    cache: Cache
    save_metadata: bool

    @property
    def is_planned(self) -> bool:
        return self.plan is not None or self.budget is not None


def check_settings(**settings: Any) -> Settings:
    """What ``apply`` can say of its arguments before a pipeline is loaded: the errors are its."""
    given = inspect.signature(apply).bind(None, **settings)
    given.apply_defaults()
    value = given.arguments
    first = arguments.step_count("skip_first_n_steps", value["skip_first_n_steps"])
    last = arguments.step_count("skip_last_n_steps", value["skip_last_n_steps"])
    consecutive = arguments.consecutive_skips(value["max_consecutive_skips"])

    def checked(name: str, check: Callable[[Any], Any]) -> Any:
        return None if value[name] is None else check(value[name])

    own = checked("coefficients", arguments.calibration)
    mode = checked("mode", arguments.mode)
    threshold = checked("rel_l1_thresh", arguments.threshold)
    most = checked("max_skips", lambda number: arguments.step_count("max_skips", number))
    found = checked("plan", lambda plan: plan if isinstance(plan, Plan) else Plan.from_json(plan))
    planned = checked("steps", arguments.plan)
    budget = checked("budget", arguments.budget)
    order, kept = checked("forecast", arguments.forecast), checked("cache", arguments.cache)
    if not isinstance(value["save_metadata"], bool):
        raise TeaCacheValueError(f"save_metadata must be True or False, got {value['save_metadata']!r}")
    if mode is not None and threshold is not None:
        raise TeaCacheValueError("mode and rel_l1_thresh both set the threshold: leave out either")
    planned_by = [name for name in ("plan", "steps", "budget") if value[name] is not None]
    if planned_by:
        limits = (
            *((name, True) for name in planned_by[1:]),
            *((name, value[name] is not None) for name in ("mode", "rel_l1_thresh", "coefficients", "max_skips")),
            ("max_consecutive_skips", consecutive != DEFAULT_MAX_CONSECUTIVE_SKIPS),
            ("skip_first_n_steps", first != 1),
            ("skip_last_n_steps", last != 1),
        )
        if wrong := [name for name, is_given in limits if is_given]:
            raise TeaCacheValueError(
                f"{planned_by[0]} plans every step, and {', '.join(wrong)} cannot count: leave out either"
            )
    if found is not None:
        planned = arguments.plan(found.steps)
        order = found.forecast if order is None else order
        kept = found.cache if kept is None else kept
    return Settings(
        mode=mode,
        rel_l1_thresh=threshold,
        calibration=own,
        skip_first_n_steps=first,
        skip_last_n_steps=last,
        max_consecutive_skips=consecutive,
        max_skips=most,
        plan=planned,
        budget=budget,
        forecast=DEFAULT_FORECAST if order is None else order,
        cache=DEFAULT_CACHE if kept is None else kept,
        save_metadata=value["save_metadata"],
    )


def _apply(flux: Any, settings: Settings) -> Handle:
    require_mflux()
    from .mflux import patch

    # TeaCache as published takes the demonstration model for the one whose name it has, as mlx-teacache does.
    by_name = (settings.forecast, settings.cache) == (0, "residual")
    variant = patch.match(flux, by_name)
    if (existing := patch.live_handle(flux)) is not None:
        raise AlreadyPatchedError(
            f"this {type(flux).__name__} is gated already ({existing!r}): call restore() on that handle first "
            "(this error has it as its attribute `handle`)",
            existing,
        )
    own, threshold = settings.calibration, settings.rel_l1_thresh
    if threshold is None:
        default = variant.rel_l1_thresh
        if own is not None:
            default = DEFAULT_THRESHOLD if own.rel_l1_thresh is None else own.rel_l1_thresh
        threshold = min(1.0, default * MODES[settings.mode or DEFAULT_MODE])
    calibrated = own is None and patch.is_calibrated(flux)
    disabled = (
        ("rel_l1_thresh=0.0 turns gating off", not settings.is_planned and threshold == 0.0),
        ("max_skips=0 skips nothing", settings.max_skips == 0),
        ("max_consecutive_skips=0 skips nothing", settings.max_consecutive_skips == 0),
        ("the planned steps have no 0", settings.plan is not None and all(settings.plan)),
        ("budget=1.0 computes all", settings.budget == 1.0),
    )
    if reason := next((text for text, is_so in disabled if is_so), None):
        warn_caller(f"{reason}: every step computes", DisabledWarning)
    elif not settings.is_planned and own is None:
        if variant.distilled:
            warn_caller(
                f"{variant.variant_id} is distilled to a few steps that differ too much for any to be skipped: "
                "expect no speedup",
                NoBenefitWarning,
            )
        if not calibrated:
            warn_caller(patch.uncalibrated_message(flux, variant), UncalibratedWarning)
    handle = Handle(
        variant,
        calibrated=calibrated,
        rel_l1_thresh=threshold,
        coefficients=variant.coefficients if own is None else own.coefficients,
        calibrated_range=variant.calibrated_range if own is None else own.calibrated_range,
        provenance=variant.provenance if own is None else own.provenance,
        skip_first_n_steps=settings.skip_first_n_steps,
        skip_last_n_steps=settings.skip_last_n_steps,
        max_consecutive_skips=settings.max_consecutive_skips,
        max_skips=settings.max_skips,
        plan=settings.plan,
        budget=settings.budget,
        forecast=settings.forecast,
        cache=settings.cache,
        save_metadata=settings.save_metadata,
    )
    patch.warn_if_untested()
    patch.Patch(flux, handle)
    return handle
