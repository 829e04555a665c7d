"""``apply``: its arguments, and the handle that says what happened and undoes it."""

import numbers
import operator
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from .errors import (
    AlreadyPatchedError,
    DisabledWarning,
    IncompatibleModelError,
    NoBenefitWarning,
    TeaCacheError,
    TeaCacheValueError,
    UncalibratedWarning,
)
from .stats import Stats
from .variants import DEFAULT_THRESHOLD, Coefficients, Variant

if TYPE_CHECKING:
    from .mflux.patch import Patch


_FLOAT32_MAX = 3.4028234663852886e38


class Handle:
    """A gated pipeline. As a context manager it restores the pipeline at the end.

    Attributes:
        variant_id: The model whose coefficients are in use.
        rel_l1_thresh: Threshold on the accumulated distance; 0 gates nothing.
        coefficients: Polynomial of the relative L1 distance, c4 first.
        calibrated_range: Distances that the polynomial was fitted on, or None.
        skip_first_n_steps, skip_last_n_steps: Steps that always compute, at either end.
        stats: Totals over finished generations, and the last one step by step. Kept after ``restore``.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        rel_l1_thresh: float,
        coefficients: Coefficients,
        calibrated_range: tuple[float, float] | None,
        skip_first_n_steps: int,
        skip_last_n_steps: int,
    ) -> None:
        self.variant_id = variant.variant_id
        self.rel_l1_thresh = rel_l1_thresh
        self.coefficients = coefficients
        self.calibrated_range = calibrated_range
        self.skip_first_n_steps = skip_first_n_steps
        self.skip_last_n_steps = skip_last_n_steps
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
    rel_l1_thresh: float | None = None,
    coefficients: Sequence[float] | None = None,
    skip_first_n_steps: int = 1,
    skip_last_n_steps: int = 1,
) -> Handle:
    """Skip denoising steps of an mflux FLUX.2 pipeline whose input has hardly changed since the step before.

    ``flux.generate_image`` is used as before: text-to-image and image-to-image, any guidance, one thread at a time.
    mflux's forward pass is its own; a step whose transformer blocks are skipped adds what they added last time.

    Args:
        flux: An mflux ``Flux2Klein`` (klein-4b, klein-9b, base-4b, base-9b).
        rel_l1_thresh: Higher skips more, 0.0 to 1.0; 0.0 skips nothing and is bit-equal to plain mflux. Default: the
            model's (0.17 for the base models), or 0.20 with your own ``coefficients``.
        coefficients: Five numbers, fourth degree first, in place of the model's polynomial of the relative L1 distance.
            They are used without a calibrated range.
        skip_first_n_steps: So many first steps always compute.
        skip_last_n_steps: So many last steps always compute.

    Returns:
        Handle: Use it as a context manager, or call its ``restore()``.

    Raises:
        TeaCacheValueError: An argument has the wrong type or value (a ``ValueError`` too).
        IncompatibleModelError: ``flux`` is not a pipeline that can be gated (a ``TypeError`` too).
        AlreadyPatchedError: ``flux`` is gated already; call ``restore()`` on its handle first.
    """
    first = _step_count("skip_first_n_steps", skip_first_n_steps)
    last = _step_count("skip_last_n_steps", skip_last_n_steps)
    own_coefficients = None if coefficients is None else _coefficients(coefficients)
    threshold = None if rel_l1_thresh is None else _threshold(rel_l1_thresh)

    try:
        from .mflux import patch
    except ImportError as error:
        raise IncompatibleModelError(
            f"apply needs mflux to gate a pipeline, and it cannot be imported ({error}). "
            'Fix: pip install "mlx-teacache-fast[mflux]"'
        ) from error

    variant = patch.match(flux)
    if (existing := patch.live_handle(flux)) is not None:
        raise AlreadyPatchedError(
            f"this {type(flux).__name__} is gated already ({existing!r}): call restore() on that handle first "
            "(this error has it as its attribute `handle`)",
            existing,
        )
    if threshold is None:
        threshold = variant.rel_l1_thresh if own_coefficients is None else DEFAULT_THRESHOLD
    if threshold == 0.0:
        warnings.warn("rel_l1_thresh=0.0 turns gating off: every step computes", category=DisabledWarning, stacklevel=2)
    elif variant.distilled and own_coefficients is None:
        warnings.warn(
            f"{variant.variant_id} is distilled to a few steps that differ too much for any to be skipped: "
            "expect no speedup",
            category=NoBenefitWarning,
            stacklevel=2,
        )
    if own_coefficients is None and threshold > 0 and (base := patch.finetuned_from(flux)) is not None:
        warnings.warn(
            f"{flux.model_config.model_name} is used with the coefficients of {variant.variant_id}, fitted on {base}: "
            "they may not fit it, compare a few pictures with ungated ones",
            category=UncalibratedWarning,
            stacklevel=2,
        )
    handle = Handle(
        variant,
        rel_l1_thresh=threshold,
        coefficients=own_coefficients or variant.coefficients,
        calibrated_range=variant.calibrated_range if own_coefficients is None else None,
        skip_first_n_steps=first,
        skip_last_n_steps=last,
    )
    patch.warn_if_untested()
    patch.Patch(flux, handle)
    return handle


def _step_count(name: str, value: object) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(cast(Any, value))
    except TypeError:
        count = -1
    if count < 0:
        raise TeaCacheValueError(f"{name} must be a whole number of steps, 0 or more, got {value!r}")
    return count


def _threshold(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= cast(float, value) <= 1:
        raise TeaCacheValueError(f"rel_l1_thresh must be a number from 0.0 to 1.0, got {value!r}")
    return float(value)


def _coefficients(value: object) -> Coefficients:
    try:
        five = tuple(float(c) for c in cast(Any, value)) if not isinstance(value, str) else ()
    except (OverflowError, TypeError, ValueError):
        five = ()
    if len(five) != 5 or not all(abs(c) <= _FLOAT32_MAX for c in five):  # false for NaN
        raise TeaCacheValueError(
            f"coefficients must be five finite numbers of float32's range, fourth degree first, got {value!r}"
        )
    return five
