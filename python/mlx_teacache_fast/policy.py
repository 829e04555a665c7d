"""What a user asks of a gated pipeline, as frozen values: here is each setting's default, check and help text, once.

``apply``, the options of ``run``, files, pictures and traces all hold a ``Policy`` and nothing else.
"""

import numbers
import operator
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, cast

from .errors import InvalidStepWindowError, TeaCacheValueError, shown
from .files import from_json, members, to_json
from .models import DEFAULT_THRESHOLD, Coefficients, Variant

FLOAT32_MAX = 3.4028234663852886e38
_INT32_MAX = 2**31 - 1
MAX_STEPS = 10_000  # of a generation; an endless iterator is no plan

Mode = Literal["quality", "balanced", "fast"]
DEFAULT_MODE: Mode = "balanced"

# Each mode's tolerance. What they give on the demonstration model: docs/forecasting.md.
MODES: dict[Mode, float] = {"quality": 0.05, "balanced": 0.1, "fast": 0.2}

Cache = Literal["residual", "output"]
CACHES: tuple[Cache, ...] = ("residual", "output")
MAX_ORDER = 2


# ---- Checks: each returns the value in one form, or says the rule and what was given

Check = Callable[[str, Any], Any]  # of a setting's name and value


def step_count(name: str, value: object) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(cast(Any, value))
    except (TypeError, ValueError):
        count = -1
    if count < 0:
        raise TeaCacheValueError(f"{name} must be a whole number of steps, 0 or more, got {shown(value)}")
    return min(count, _INT32_MAX)  # the gate's integer; no schedule is as long


def _number(rule: str, accepts: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not accepts(cast(float, value)):
            raise TeaCacheValueError(f"{name} must be {rule}, got {shown(value)}")
        return float(value)

    return check


_part = _number("a number from 0.0 to 1.0", lambda part: 0 <= part <= 1)


def _one_of(rule: str, choices: tuple[Any, ...]) -> Check:
    def check(name: str, value: Any) -> Any:
        if type(value) is not type(choices[0]) or value not in choices:
            raise TeaCacheValueError(f"{name} must be {rule}, got {shown(value)}")
        return value

    return check


def _floats(count: int, rule: str) -> Check:
    def check(name: str, value: Any) -> tuple[float, ...]:
        try:
            found = () if isinstance(value, str) else tuple(float(number) for number in islice(value, count + 1))
        except (IndexError, OverflowError, TypeError, ValueError):  # IndexError: MLX's, of an array without a shape
            found = ()
        are_finite = all(abs(number) <= FLOAT32_MAX for number in found)  # false for NaN
        if len(found) != count or not are_finite or (count == 2 and found[0] > found[1]):
            raise TeaCacheValueError(f"{name} must be {rule}, got {shown(value)}")
        return found

    return check


def _plan(name: str, value: Any) -> str:
    try:
        given = islice(value, MAX_STEPS + 1)
        entries = [{"0": 0, "1": 1}.get(e, 2) if isinstance(value, str) else operator.index(e) for e in given]
    except (IndexError, TypeError, ValueError):
        entries = []
    if not entries or set(entries) - {0, 1} or len(entries) > MAX_STEPS:
        raise TeaCacheValueError(f'{name} must be a 1 or 0 for each active step, such as "1101", got {shown(value)}')
    if not entries[0]:
        raise TeaCacheValueError(
            f"{name} must begin with a computed step (1), got {shown(value)}: there is nothing to reuse"
        )
    return as_text(entries)


def as_text(plan: Iterable[object]) -> str:
    """Which steps compute, as digits."""
    return "".join("1" if computes else "0" for computes in plan)


# ---- The values


def _setting(default: Any, check: Check, says: str, flag: str | None = None, **option: Any) -> Any:
    """A field of a rule or of ``Policy``.

    Args:
        default: ``MISSING`` where it must be given; None where it may be left out.
        check: Of a value that is given.
        says: The help text of ``run``'s option, and what documentation is made of.
        flag: Of that option, if it is not the field's name.
        **option: argparse's; ``type`` turns text into a value to check.
    """
    return field(default=default, metadata={"check": check, "says": says, "flag": flag, "option": option})


_N: dict[str, Any] = {"metavar": "N", "type": int}


def _budget(default: Any) -> Any:
    return _setting(
        default,
        _number("a share of the steps above 0.0 and up to 1.0", lambda share: 0 < share <= 1),
        "at most this share of the steps is computed, planned before the run: as published for the model; or the "
        "first, the last, and others evenly over the noise that a picture of that size shows. Beside a tolerance, that "
        "says which of them are needed",
        metavar="SHARE",
        type=float,
    )


@dataclass(frozen=True)
class _Checked:
    """Its fields are checked when it is made."""

    def __post_init__(self) -> None:
        for f in settings(type(self)):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                object.__setattr__(self, f.name, f.metadata["check"](f.name, value))


def settings(*kinds: type) -> list[Field[Any]]:
    """The fields of rules, and of ``Policy`` without its rule; of two of one name the last one."""
    return [*{f.name: f for kind in kinds for f in fields(kind) if f.metadata}.values()]


def _names(*kinds: type) -> set[str]:
    return {f.name for f in settings(*kinds)}


@dataclass(frozen=True, kw_only=True)
class Gate(_Checked):
    """TeaCache's rule: a step is skipped while its input has hardly changed since the last one that computed.

    Attributes:
        {settings}
    """

    # fmt: off
    rel_l1_thresh: float | None = _setting(
        None, _part,
        "TeaCache's gate instead of a tolerance: accumulated distance, 0 to 1, at which a step is computed again; a "
        "higher one skips more, 0 skips nothing (default: the model's own, 0.17 to 0.30; "
        f"{DEFAULT_THRESHOLD:g} with coefficients of yours)",
        "--threshold", metavar="T", type=float)
    coefficients: Coefficients | None = _setting(
        None, _floats(5, "five finite numbers of float32's range, fourth degree first"),
        "polynomial of the relative distance, fourth degree first, in plain decimals (default: the model's own)",
        metavar=("C4", "C3", "C2", "C1", "C0"), nargs=5, type=float)
    calibrated_range: tuple[float, float] | None = _setting(
        None, _floats(2, "two finite numbers, the lower first, or None"),
        "distances that these coefficients were fitted on; a larger one computes (default: the model's own, and no "
        "limits with coefficients of yours)", metavar=("LOW", "HIGH"), nargs=2, type=float)
    skip_first_n_steps: int = _setting(
        1, step_count, "of the gate: so many first steps are always computed (default: 1)", "--skip-first", **_N)
    skip_last_n_steps: int = _setting(
        1, step_count, "of the gate: so many last steps are always computed (default: 1)", "--skip-last", **_N)
    max_consecutive_skips: int = _setting(  # 8 is mlx-teacache's
        8, step_count, "of the gate: a step is computed after so many skipped ones; 0 skips nothing (default: 8)", **_N)
    max_skips: int | None = _setting(
        None, step_count, "of the gate: at most so many skipped steps a picture (default: no limit)", **_N)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrated_range is not None and self.coefficients is None:
            raise TeaCacheValueError("calibrated_range belongs to coefficients of yours: give them too")

    def of_model(self, variant: Variant) -> "Gate":
        """With the model's values in place of those that are left open; TeaCacheValueError if it has none."""
        threshold = self.rel_l1_thresh
        if self.coefficients is None and variant.coefficients is None and threshold != 0:
            raise TeaCacheValueError(
                f"no coefficients are known for {variant.display_name}: rel_l1_thresh wants some of yours beside it, "
                "which mlx-teacache-fast tune fits; a tolerance, a budget and steps need none"
            )
        if threshold is None:
            threshold = variant.rel_l1_thresh if self.coefficients is None else DEFAULT_THRESHOLD
        own = self if self.coefficients is not None else variant
        polynomial = {name: getattr(own, name) for name in ("coefficients", "calibrated_range")}
        return replace(self, rel_l1_thresh=threshold, **polynomial)

    @property
    def skips_nothing(self) -> str | None:
        """Why, if so."""
        if self.rel_l1_thresh == 0:
            return "rel_l1_thresh=0.0 turns gating off"
        limit = next((n for n in ("max_skips", "max_consecutive_skips") if getattr(self, n) == 0), None)
        return limit and f"{limit}=0 skips nothing"

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> str | None:
        """Why nothing can be skipped of so many active steps, if so."""
        first, last = self.skip_first_n_steps, self.skip_last_n_steps
        if num_steps == 0 or self.rel_l1_thresh == 0 or num_steps - first - last > 1:
            return None
        return (
            f"no possible skip: skip_first_n_steps={first} and skip_last_n_steps={last} leave "
            f"{max(0, num_steps - first - last)} eligible of active_num_steps={num_steps} to decide on, and one "
            "has to be computed before another can reuse it"
        )

    def __str__(self) -> str:
        return "the model's threshold" if self.rel_l1_thresh is None else f"rel_l1_thresh {self.rel_l1_thresh:g}"


# Of a tolerance: so many first steps compute, for two values are no trend, and their errors grow the most; and from a
# computed step to the next one it is so many at most. Chosen on the demonstration model (docs/forecasting.md).
WARM_UP = 4
LONGEST_GAP = 5
RHO = 0.75  # of the corrector, with a tolerance: 0.5 to 1 are about as good, with guidance and without


@dataclass(frozen=True, kw_only=True)
class Tolerance(_Checked):
    """A step is skipped while its forecast is expected to miss what would be computed by less than this.

    How fast forecasts go wrong is seen at the computed steps, so that this needs to know neither model nor schedule.

    Attributes:
        {settings}
    """

    # fmt: off
    tolerance: float | None = _setting(
        None, _part,
        "relative L1 distance, 0 to 1, by which a skipped step's forecast may miss, as far as earlier misses tell: a "
        f"higher one skips more and is less faithful, 0 skips nothing (default: {MODES[DEFAULT_MODE]:g})",
        metavar="T", type=float)
    mode: Mode | None = _setting(
        None, _one_of(", ".join(map(repr, MODES)), tuple(MODES)),
        f"the tolerance by name: {', '.join(f'{m} {x:g}' for m, x in MODES.items())} (default: {DEFAULT_MODE})",
        choices=tuple(MODES))
    budget: float | None = _budget(None)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None and self.tolerance is not None:
            raise TeaCacheValueError("mode and tolerance both set the tolerance: leave out either")
        if self.tolerance is None:
            object.__setattr__(self, "tolerance", MODES[self.mode or DEFAULT_MODE])
            object.__setattr__(self, "mode", None)

    @property
    def skips_nothing(self) -> str | None:
        """Why, if so."""
        return "tolerance=0.0 computes all" if self.tolerance == 0 else None

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> str | None:
        """Why nothing can be skipped of so many active steps, if so."""
        if num_steps == 0 or self.tolerance == 0 or num_steps > WARM_UP + 1 or self.budget is not None:
            return None
        return (
            f"no possible skip: the first {WARM_UP} steps and the last one compute, and the schedule has "
            f"active_num_steps={num_steps}"
        )

    def __str__(self) -> str:
        return f"tolerance {self.tolerance:g}" + ("" if self.budget is None else f", budget {self.budget:g}")


@dataclass(frozen=True, kw_only=True)
class Budget(_Checked):
    """A share of the steps computes, planned when the schedule is known; nothing is measured.

    Attributes:
        {settings}
    """

    budget: float = _budget(MISSING)

    @property
    def skips_nothing(self) -> str | None:
        return "budget=1.0 computes all" if self.budget == 1 else None

    def check_schedule(self, num_steps: int, num_inference_steps: int) -> None:
        """Any will do."""

    def __str__(self) -> str:
        return f"budget {self.budget:g}"


@dataclass(frozen=True, kw_only=True)
class Steps(_Checked):
    """Which steps compute is said beforehand; nothing is measured.

    Attributes:
        {settings}
    """

    # fmt: off
    steps: str = _setting(
        MISSING, _plan,
        "which active steps are computed (1) and skipped (0), one digit for each, such as 1101, instead of measuring; "
        "the first must be 1", metavar="1101...")
    # fmt: on

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


Rule = Steps | Budget | Tolerance | Gate
RULES: tuple[type[Rule], ...] = (Tolerance, Gate, Budget, Steps)


@dataclass(frozen=True, kw_only=True)
class Policy(_Checked):
    """How to gate a pipeline.

    Attributes:
        rule: Which steps compute: ``Tolerance``, ``Gate``, ``Budget`` or ``Steps``, each with its own settings only.
        {settings}
    """

    rule: Rule = Tolerance()
    # fmt: off
    forecast: int = _setting(
        1, _one_of(f"an order from 0 (reuse) to {MAX_ORDER}", tuple(range(MAX_ORDER + 1))),
        "what a skipped step gets: 0 reuses what the last computed step made, 1 and 2 extrapolate the last two or "
        "three over sigma, guarded: never much further than the gap between them (default: 1)", **_N)
    cache: Cache = _setting(
        "output", _one_of(" or ".join(map(repr, CACHES)), CACHES),
        "what is reused or extrapolated: the residual of the transformer's blocks, or the output, the noise "
        "prediction, which takes little memory (default: output)", choices=CACHES)
    corrector: float | None = _setting(
        None, _part,
        "share of the error gathered in skipped steps that the next computed one takes back, with Euler schedulers and "
        f"the output cache (default: {RHO:g} with a tolerance, 0.5 with a budget of 0.3 or more and guidance of 5 or "
        "less, else 0)",
        metavar="SHARE", type=float)
    save_metadata: bool = _setting(
        True, _one_of("True or False", (True, False)),
        "whether pictures say in their metadata how they were gated (default: they do)",
        "--no-metadata", action="store_false")
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rule, RULES):
            raise TeaCacheValueError(f"rule must be a Tolerance, a Gate, a Budget or Steps, got {shown(self.rule)}")
        if self.corrector and self.cache == "residual":
            raise TeaCacheValueError('corrector changes the noise prediction, and cache="residual" keeps none')

    @classmethod
    def of(cls, default: type[Rule] = Tolerance, /, **given: Any) -> Self:
        """From settings of one flat name space, as ``apply`` takes them; None leaves one out that has no default.

        Args:
            default: The kind of rule where no setting says which.
            **given: The settings.

        Raises:
            TeaCacheValueError: One has the wrong type or value, is unknown, or cannot count beside another.
        """
        if not any(default is rule for rule in RULES):
            raise TeaCacheValueError(f"default must be a kind of rule, such as Tolerance, got {shown(default)}")
        known = {f.name: f for f in settings(*RULES, cls)}
        if unknown := sorted(given.keys() - known.keys()):
            raise TeaCacheValueError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
        asked = given.keys()
        given = {n: v for n, v in given.items() if v is not None or known[n].default not in (None, MISSING)}
        asked_of_rules = _names(*RULES) & given.keys()
        fitting = [rule for rule in RULES if asked_of_rules <= _names(rule)]
        if not fitting:
            kind = next(rule for rule in RULES if _names(rule) & given.keys())
            first = next(name for name in given if name in _names(kind))
            wrong = ", ".join(name for name in given if name in asked_of_rules - _names(kind))
            raise TeaCacheValueError(f"{first} says which steps compute, and {wrong} cannot count: leave out either")
        kind = min(fitting, key=lambda rule: len(_names(rule))) if asked_of_rules else default
        named = {"rel_l1_thresh", "coefficients"}
        if kind is Gate and default is not Gate and not named & asked and "calibrated_range" not in given:
            limits = ", ".join(name for name in given if name in _names(Gate))
            raise TeaCacheValueError(f"{limits}: of TeaCache's gate, which rel_l1_thresh or coefficients ask for")
        of_rule = {name: given.pop(name) for name in _names(kind) & given.keys()}
        return cls(rule=kind(**of_rule), **given)

    def rho(self, guidance: float) -> float:
        """The corrector's share."""
        if self.corrector is not None or self.cache == "residual":
            return self.corrector or 0.0
        if isinstance(self.rule, Tolerance):
            return RHO
        # With wider gaps or more guidance it makes the worst pictures worse (docs/forecasting.md).
        return 0.5 if isinstance(self.rule, Budget) and self.rule.budget >= 0.3 and guidance <= 5 else 0.0

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
        if not isinstance(about, dict | None):
            raise TeaCacheValueError(f"about must be a dict or None, got {shown(about)}")
        to_json(path, "policy", {"policy": self.flat, "about": about or {}}, force=force)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or one of another version.
            OSError: It cannot be read.
        """
        data = from_json(path, "policy")
        try:
            return cls.of(**members({"about": {}} | data, policy=dict, about=dict)["policy"])
        except ValueError as error:
            raise TeaCacheValueError(f"{path} is not a policy: {error}") from error


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
        nominal = nominal_num_inference_steps
        of = "" if nominal is None else f" of num_inference_steps={shown(nominal)}"
        raise InvalidStepWindowError(
            f"skip_first_n_steps={first} and skip_last_n_steps={last} leave no step to gate: the schedule has {active} "
            f"active{of}; use {first + last + 2} or more active steps"
        )


def described(indent: str, *kinds: type) -> str:
    """The settings of these and their texts, as a docstring has them."""
    texts = {f.name: f.metadata["says"] for f in settings(*kinds)}
    lines = [f"{name}: {text[0].upper()}{text[1:]}." for name, text in texts.items()]
    wrapped = [textwrap.fill(line, 120, initial_indent=indent, subsequent_indent=indent + "    ") for line in lines]
    return "\n".join(wrapped).removeprefix(indent)


for _kind in (*RULES, Policy):
    _kind.__doc__ = (_kind.__doc__ or "").replace("{settings}", described(" " * 8, _kind))
