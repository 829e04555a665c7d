"""What a user asks of a gated pipeline, as frozen values: here is each setting's default, check and help text, once.

``apply``, the options of ``run``, files, pictures and traces all hold a ``Policy`` and nothing else.
"""

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

from .errors import InvalidStepWindowError, TeaCacheValueError
from .files import from_json, to_json
from .models import DEFAULT_THRESHOLD, Coefficients, Variant

FLOAT32_MAX = 3.4028234663852886e38
_INT32_MAX = 2**31 - 1

Mode = Literal["quality", "balanced", "fast"]
DEFAULT_MODE: Mode = "balanced"

# Each mode's threshold, in parts of the model's own. What they give on the demonstration model: docs/forecasting.md.
MODES: dict[Mode, float] = {"quality": 0.85, "balanced": 1.0, "fast": 2.0}

Cache = Literal["residual", "output"]
CACHES: tuple[Cache, ...] = ("residual", "output")
MAX_ORDER = 2


# ---- Checks: each returns the value in one form, or says the rule and what was given


def step_count(name: str, value: object) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(cast(Any, value))
    except TypeError:
        count = -1
    if count < 0:
        raise TeaCacheValueError(f"{name} must be a whole number of steps, 0 or more, got {value!r}")
    return count


def _steps(name: str) -> Callable[[object], int]:
    return lambda value: step_count(name, value)


def _consecutive_skips(value: object) -> int:
    return min(step_count("max_consecutive_skips", value), _INT32_MAX)  # the gate's integer; no schedule is as long


def _threshold(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= cast(float, value) <= 1:
        raise TeaCacheValueError(f"rel_l1_thresh must be a number from 0.0 to 1.0, got {value!r}")
    return float(value)


def _coefficients(value: object) -> Coefficients:
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


def _calibrated_range(value: object) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in cast(Any, value))
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -FLOAT32_MAX <= low <= high <= FLOAT32_MAX:
        raise TeaCacheValueError(
            f"calibrated_range must be two finite numbers, the lower first, or None, got {value!r}"
        )
    return low, high


def _mode(value: object) -> Mode:
    if value not in tuple(MODES):
        raise TeaCacheValueError(f"mode must be {', '.join(map(repr, MODES))}, got {value!r}")
    return value


def _plan_text(value: object) -> str:
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
    return as_text(entries)


def as_text(plan: Any) -> str:
    """Which steps compute, as digits."""
    return "".join("1" if computes else "0" for computes in plan)


def _budget(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < cast(float, value) <= 1:
        raise TeaCacheValueError(f"budget must be a share of the steps above 0.0 and up to 1.0, got {value!r}")
    return float(value)


def _forecast(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ORDER:
        raise TeaCacheValueError(f"forecast must be an order from 0 (reuse) to {MAX_ORDER}, got {value!r}")
    return value


def _cache(value: object) -> Cache:
    if value not in CACHES:
        raise TeaCacheValueError(f"cache must be {' or '.join(map(repr, CACHES))}, got {value!r}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TeaCacheValueError(f"save_metadata must be True or False, got {value!r}")
    return value


# ---- The values


def _setting(default: Any, check: Callable[[Any], Any], says: str, flag: str, **option: Any) -> Any:
    """A field of a rule or of ``Policy``.

    Args:
        default: ``MISSING`` where it must be given; None where it may be left out.
        check: Of a value that is given.
        says: The help text of ``run``'s option, and what documentation is made of.
        flag: Of that option; ``option`` is argparse's, its ``type`` what turns text into a value to check.
    """
    return field(default=default, metadata={"check": check, "says": says, "flag": flag, "option": option})


@dataclass(frozen=True)
class _Checked:
    """Its fields are checked when it is made."""

    def __post_init__(self) -> None:
        for f in settings(type(self)):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                object.__setattr__(self, f.name, f.metadata["check"](value))


def settings(kind: type) -> tuple[Field[Any], ...]:
    """The fields of a rule, or of ``Policy`` without its rule."""
    return tuple(f for f in fields(kind) if f.metadata)


def _names(kind: type) -> set[str]:
    return {f.name for f in settings(kind)}


@dataclass(frozen=True, kw_only=True)
class Gate(_Checked):
    """TeaCache's rule: a step is skipped while its input has hardly changed since the last one that computed."""

    mode: Mode | None = _setting(
        None,
        _mode,
        f"the threshold by name, in parts of the model's own: {', '.join(f'{m} {x:g}' for m, x in MODES.items())} "
        f"(default: {DEFAULT_MODE})",
        "--mode",
        choices=tuple(MODES),
    )
    rel_l1_thresh: float | None = _setting(
        None,
        _threshold,
        "accumulated distance, 0 to 1, at which a step is computed again: a higher one skips more and is less "
        f"faithful, 0 skips nothing (default: the model's own, 0.17 to 0.30; {DEFAULT_THRESHOLD:g} with coefficients of yours)",
        "--threshold",
        metavar="T",
        type=float,
    )
    coefficients: Coefficients | None = _setting(
        None,
        _coefficients,
        "polynomial of the relative distance, fourth degree first, in plain decimals (default: the model's own)",
        "--coefficients",
        metavar=("C4", "C3", "C2", "C1", "C0"),
        nargs=5,
        type=float,
    )
    calibrated_range: tuple[float, float] | None = _setting(
        None,
        _calibrated_range,
        "distances that these coefficients were fitted on; beyond them a step computes (default: the model's own, and "
        "no limits with coefficients of yours)",
        "--calibrated-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
    )
    skip_first_n_steps: int = _setting(
        1,
        _steps("skip_first_n_steps"),
        "so many first steps are always computed (default: 1)",
        "--skip-first",
        metavar="N",
        type=int,
    )
    skip_last_n_steps: int = _setting(
        1,
        _steps("skip_last_n_steps"),
        "so many last steps are always computed (default: 1)",
        "--skip-last",
        metavar="N",
        type=int,
    )
    max_consecutive_skips: int = _setting(
        8,  # mlx-teacache's
        _consecutive_skips,
        "a step is computed after so many skipped ones; 0 skips nothing (default: 8)",
        "--max-consecutive-skips",
        metavar="N",
        type=int,
    )
    max_skips: int | None = _setting(
        None,
        _steps("max_skips"),
        "at most so many skipped steps a picture (default: no limit)",
        "--max-skips",
        metavar="N",
        type=int,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None and self.rel_l1_thresh is not None:
            raise TeaCacheValueError("mode and rel_l1_thresh both set the threshold: leave out either")
        if self.calibrated_range is not None and self.coefficients is None:
            raise TeaCacheValueError("calibrated_range belongs to coefficients of yours: give them too")

    def of_model(self, variant: Variant) -> "Gate":
        """With the model's values in place of those that are left open."""
        threshold = self.rel_l1_thresh
        if threshold is None:
            default = variant.rel_l1_thresh if self.coefficients is None else DEFAULT_THRESHOLD
            threshold = min(1.0, default * MODES[self.mode or DEFAULT_MODE])
        own = self if self.coefficients is not None else variant
        polynomial = {name: getattr(own, name) for name in ("coefficients", "calibrated_range")}
        return replace(self, mode=None, rel_l1_thresh=threshold, **polynomial)

    def is_models(self, variant: Variant) -> bool:
        """Whether the polynomial is the model's."""
        own = self.coefficients, self.calibrated_range
        return self.coefficients is None or own == (variant.coefficients, variant.calibrated_range)

    @property
    def skips_nothing(self) -> str | None:
        if self.rel_l1_thresh == 0:
            return "rel_l1_thresh=0.0 turns gating off"
        limit = next((n for n in ("max_skips", "max_consecutive_skips") if getattr(self, n) == 0), None)
        return None if limit is None else f"{limit}=0 skips nothing"

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> None:
        """Raises InvalidStepWindowError where the forced steps leave none of the active ones."""
        if num_steps > 0 and self.rel_l1_thresh != 0:
            check_step_window(
                num_steps,
                skip_first_n_steps=self.skip_first_n_steps,
                skip_last_n_steps=self.skip_last_n_steps,
                nominal_num_inference_steps=num_inference_steps,
            )

    def __str__(self) -> str:
        if self.rel_l1_thresh is None:
            return f"mode {self.mode or DEFAULT_MODE}"
        return f"rel_l1_thresh {self.rel_l1_thresh:g}"


@dataclass(frozen=True, kw_only=True)
class Budget(_Checked):
    """A share of the steps computes, planned when the schedule is known; nothing is measured."""

    budget: float = _setting(
        MISSING,
        _budget,
        "this share of the steps is computed, planned before the run, instead of measuring: the first and the last in "
        "any case, others in between, the denser the more sigma changes",
        "--budget",
        metavar="SHARE",
        type=float,
    )

    @property
    def skips_nothing(self) -> str | None:
        return "budget=1.0 computes all" if self.budget == 1 else None

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> None:
        """Any will do."""

    def __str__(self) -> str:
        return f"budget {self.budget:g}"


@dataclass(frozen=True, kw_only=True)
class Steps(_Checked):
    """Which steps compute is said beforehand; nothing is measured."""

    steps: str = _setting(
        MISSING,
        _plan_text,
        "which active steps are computed (1) and skipped (0), one digit for each, such as 1101, instead of measuring; "
        "the first must be 1",
        "--steps",
        metavar="1101...",
        type=str,
    )

    @property
    def plan(self) -> tuple[bool, ...]:
        """For each active step whether it computes."""
        return tuple(step == "1" for step in self.steps)

    @property
    def skips_nothing(self) -> str | None:
        return None if "0" in self.steps else "the planned steps have no 0"

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> None:
        """Raises InvalidStepWindowError where the schedule has another number of active steps."""
        if num_steps not in (0, len(self.steps)):
            raise InvalidStepWindowError(
                f"steps plans {len(self.steps)} steps and the schedule has {num_steps} active of "
                f"num_inference_steps={num_inference_steps}: plan one entry for each active step"
            )

    def __str__(self) -> str:
        return "steps as planned"


RULES = (Steps, Budget, Gate)  # the last one where no setting says which


@dataclass(frozen=True, kw_only=True)
class Policy(_Checked):
    """How to gate a pipeline.

    Attributes:
        rule: Which steps compute: ``Gate``, ``Budget`` or ``Steps``, each with its own settings only.
    """

    rule: Gate | Budget | Steps = Gate()
    forecast: int = _setting(
        1,
        _forecast,
        "what a skipped step gets: 0 reuses what the last computed step made, 1 and 2 extrapolate the last two or "
        "three over sigma, guarded: never much further than the gap between them (default: 1)",
        "--forecast",
        metavar="N",
        type=int,
    )
    cache: Cache = _setting(
        "output",
        _cache,
        "what is reused or extrapolated: the residual of the transformer's blocks, or the output, the noise "
        "prediction, which takes little memory (default: output)",
        "--cache",
        choices=CACHES,
    )
    save_metadata: bool = _setting(
        True,
        _flag,
        "whether pictures say in their metadata how they were gated (default: they do)",
        "--no-metadata",
        action="store_false",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rule, RULES):
            raise TeaCacheValueError(f"rule must be a Gate, a Budget or Steps, got {self.rule!r}")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From settings of one flat name space, as ``apply`` takes them; None leaves one out that has no default.

        Raises:
            TeaCacheValueError: One has the wrong type or value, is unknown, or cannot count beside another.
        """
        known = {f.name: f for kind in (cls, *RULES) for f in settings(kind)}
        if unknown := sorted(given.keys() - known.keys()):
            raise TeaCacheValueError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
        given = {n: v for n, v in given.items() if v is not None or known[n].default not in (None, MISSING)}
        kind, *others = [rule for rule in RULES if _names(rule) & given.keys()] or [Gate]
        if others:
            wrong = [name for name in given if any(name in _names(other) for other in others)]
            (planned_by,) = _names(kind)
            raise TeaCacheValueError(
                f"{planned_by} plans every step, and {', '.join(wrong)} cannot count: leave out either"
            )
        of_rule = {name: given.pop(name) for name in _names(kind) & given.keys()}
        return cls(rule=kind(**of_rule), **given)

    def of_model(self, variant: Variant) -> Self:
        """With the model's values in place of those that are left open."""
        return replace(self, rule=self.rule.of_model(variant)) if isinstance(self.rule, Gate) else self

    @property
    def flat(self) -> dict[str, Any]:
        """All settings by name, for ``of``, as JSON has them."""
        return {f.name: getattr(part, f.name) for part in (self.rule, self) for f in settings(type(part))}

    def __str__(self) -> str:
        how = str(self.rule)
        if (self.forecast, self.cache) != (0, "residual"):  # TeaCache's
            how += f", forecast {self.forecast} of the {self.cache}"
        return how

    def to_json(self, path: str | Path, force: bool = False, about: dict[str, Any] | None = None) -> None:
        """Write a file for ``from_json`` and ``apply(flux, path)``; ``about`` is for readers and does not count.

        Raises:
            TeaCacheValueError: The file exists and ``force`` is not set.
            OutputError: It cannot be written.
        """
        to_json(Path(path), "policy", {"policy": self.flat, "about": about or {}}, force=force)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or one of another version.
            OSError: It cannot be read.
        """
        return cls.from_record(from_json(Path(path), "policy").get("policy"), str(path))

    @classmethod
    def from_record(cls, record: Any, where: str) -> Self:
        """``of(**record)``, of a file that the error names."""
        try:
            return cls.of(**record)
        except (TypeError, ValueError) as error:
            raise TeaCacheValueError(f"{where} is not a policy: {error}") from error


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


def described(indent: str) -> str:
    """All settings and their texts, for documentation: of the rules, then of ``Policy``."""
    lines = [f"{f.name}: {f.metadata['says']}" for kind in (*RULES[::-1], Policy) for f in settings(kind)]
    return f"\n{indent}".join(lines)
