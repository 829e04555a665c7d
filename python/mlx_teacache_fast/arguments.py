"""Checks of what users pass. Each returns the value in one form or says the rule and what was given."""

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from .errors import InvalidStepWindowError, TeaCacheValueError
from .files import from_json
from .forecast import CACHES, MAX_ORDER, Cache
from .variants import MODES, Calibration, Coefficients, Mode

FLOAT32_MAX = 3.4028234663852886e38
_INT32_MAX = 2**31 - 1


def step_count(name: str, value: object) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(cast(Any, value))
    except TypeError:
        count = -1
    if count < 0:
        raise TeaCacheValueError(f"{name} must be a whole number of steps, 0 or more, got {value!r}")
    return count


def consecutive_skips(value: object) -> int:
    return min(step_count("max_consecutive_skips", value), _INT32_MAX)  # the gate's integer; no schedule is as long


def threshold(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= cast(float, value) <= 1:
        raise TeaCacheValueError(f"rel_l1_thresh must be a number from 0.0 to 1.0, got {value!r}")
    return float(value)


def coefficients(value: object) -> Coefficients:
    five: tuple[float, ...]
    try:
        five = tuple(float(c) for c in cast(Any, value)) if not isinstance(value, str) else ()
    except (OverflowError, TypeError, ValueError):
        five = ()
    if len(five) != 5 or not all(abs(c) <= FLOAT32_MAX for c in five):  # false for NaN
        raise TeaCacheValueError(
            f"coefficients must be five finite numbers of float32's range, fourth degree first, got {value!r}"
        )
    return five


def calibration(value: object) -> Calibration:
    """Five numbers; a file that ``calibrate`` wrote; or a ``Calibration``, also as a mapping."""
    if isinstance(value, Calibration):
        value = asdict(value)
    if isinstance(value, str | Path):
        value = from_json(Path(value), "calibration")
        value = {f.name: value.get(f.name) for f in fields(Calibration)}  # which says more than that
    if not isinstance(value, Mapping):
        return Calibration(coefficients(value))
    if set(value) - {f.name for f in fields(Calibration)} or "coefficients" not in value:
        raise TeaCacheValueError(f"coefficients must be five numbers, a file or a Calibration, got {dict(value)!r}")
    return Calibration(
        coefficients(value["coefficients"]),
        calibrated_range(value.get("calibrated_range")),
        None if value.get("rel_l1_thresh") is None else threshold(value["rel_l1_thresh"]),
        value.get("dataset"),
        value.get("r2"),
    )


def mode(value: object) -> Mode:
    if value not in tuple(MODES):
        raise TeaCacheValueError(f"mode must be {', '.join(map(repr, MODES))}, got {value!r}")
    return value


def plan(value: object) -> tuple[bool, ...]:
    entries = []
    if isinstance(value, str):
        entries = [{"0": 0, "1": 1}.get(e, 2) for e in value]
    else:
        try:
            entries = [operator.index(e) for e in cast(Any, value)]
        except TypeError:
            entries = []
    if not entries or set(entries) - {0, 1}:
        raise TeaCacheValueError(f'steps must be a 1 or 0 for each active step, such as "1101", got {value!r}')
    if not entries[0]:
        raise TeaCacheValueError(f"steps must begin with a computed step (1), got {value!r}: there is nothing to reuse")
    return tuple(bool(e) for e in entries)


def plan_text(entries: tuple[bool, ...]) -> str:
    return "".join("1" if computes else "0" for computes in entries)


def forecast(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ORDER:
        raise TeaCacheValueError(f"forecast must be an order from 0 (reuse) to {MAX_ORDER}, got {value!r}")
    return value


def cache(value: object) -> Cache:
    if value not in CACHES:
        raise TeaCacheValueError(f"cache must be {' or '.join(map(repr, CACHES))}, got {value!r}")
    return value


def budget(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < cast(float, value) <= 1:
        raise TeaCacheValueError(f"budget must be a share of the steps above 0.0 and up to 1.0, got {value!r}")
    return float(value)


def calibrated_range(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = (float(end) for end in cast(Any, value))
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -FLOAT32_MAX <= low <= high <= FLOAT32_MAX:
        raise TeaCacheValueError(
            f"calibrated_range must be two finite numbers, the lower first, or None, got {value!r}"
        )
    return low, high


def _calibration_setting(value: object) -> Coefficients | dict[str, Any]:
    """Of a picture, which names no file to read."""
    if not isinstance(value, Mapping):
        return coefficients(value)
    known = calibration(value)
    return {"coefficients": known.coefficients, "calibrated_range": known.calibrated_range}


# Of pictures and traces that do not say.
BEFORE_FORECASTS: dict[str, Any] = {"forecast": 0, "cache": "residual"}

# What ``apply`` takes, by name, from a file: each check returns the value in one form.
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "rel_l1_thresh": threshold,
    "coefficients": _calibration_setting,
    "skip_first_n_steps": lambda value: step_count("skip_first_n_steps", value),
    "skip_last_n_steps": lambda value: step_count("skip_last_n_steps", value),
    "max_consecutive_skips": consecutive_skips,
    "max_skips": lambda value: None if value is None else step_count("max_skips", value),
    "budget": lambda value: None if value is None else budget(value),
    "forecast": forecast,
    "cache": cache,
    "steps": lambda value: None if value is None else plan_text(plan(value)),
}


def check_step_window(
    active_num_steps: int,
    *,
    skip_first_n_steps: int = 1,
    skip_last_n_steps: int = 1,
    nominal_num_inference_steps: int | None = None,
) -> None:
    """Would a gated generation of so many steps be accepted? For asking before a model is loaded.

    Args:
        active_num_steps: Steps that mflux will run: ``num_inference_steps``, less those that image-to-image leaves out.
        skip_first_n_steps, skip_last_n_steps: As for ``apply``.
        nominal_num_inference_steps: ``num_inference_steps``, for the message.

    Raises:
        InvalidStepWindowError: The forced steps are as many as the active ones, or more; also for 0 active steps, which
            a gated generation accepts (an image-to-image strength of 1).
        TeaCacheValueError: An argument is not a whole number of steps.
    """
    active = step_count("active_num_steps", active_num_steps)
    first = step_count("skip_first_n_steps", skip_first_n_steps)
    last = step_count("skip_last_n_steps", skip_last_n_steps)
    if first + last >= active:
        of = "" if nominal_num_inference_steps is None else f" of num_inference_steps={nominal_num_inference_steps}"
        raise InvalidStepWindowError(
            f"skip_first_n_steps={first} and skip_last_n_steps={last} leave no step to gate: the schedule has {active} "
            f"active{of}; use {first + last + 2} or more active steps"
        )


def check_schedule(
    num_steps: int,
    num_inference_steps: int,
    *,
    plan: tuple[bool, ...] | None = None,
    rel_l1_thresh: float | None = None,
    skip_first_n_steps: int = 1,
    skip_last_n_steps: int = 1,
) -> None:
    """Do these settings of ``apply`` fit a schedule of ``num_steps`` active steps? InvalidStepWindowError if not."""
    if num_steps == 0:
        return
    if plan is not None:
        if len(plan) != num_steps:
            raise InvalidStepWindowError(
                f"steps plans {len(plan)} steps and the schedule has {num_steps} active of "
                f"num_inference_steps={num_inference_steps}: plan one entry for each active step"
            )
    elif rel_l1_thresh != 0:
        check_step_window(
            num_steps,
            skip_first_n_steps=skip_first_n_steps,
            skip_last_n_steps=skip_last_n_steps,
            nominal_num_inference_steps=num_inference_steps,
        )
