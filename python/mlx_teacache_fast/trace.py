"""What happened step by step, as a file and for asking what another threshold would have done."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, Self, cast

import mlx.core as mx

from . import arguments, ops
from .errors import TeaCacheValueError
from .files import from_json, to_json
from .forecast import Cache
from .stats import KINDS, GenerationStats, StepRecord, step_record
from .variants import Coefficients


@dataclass(frozen=True, slots=True)
class Trace:
    """Finished generations of one handle, and the settings they were made with (see ``apply``)."""

    variant_id: str
    rel_l1_thresh: float
    coefficients: Coefficients
    calibrated_range: tuple[float, float] | None
    skip_first_n_steps: int
    skip_last_n_steps: int
    max_consecutive_skips: int
    max_skips: int | None
    steps: str | None
    generations: tuple[GenerationStats, ...]
    budget: float | None = None
    forecast: int = 0
    cache: Cache = "residual"

    def to_json(self, path: str | Path, force: bool = False) -> None:
        """Write a file for ``from_json``.

        Raises:
            TeaCacheValueError: The file exists and ``force`` is not set.
            OutputError: It cannot be written.
        """
        to_json(Path(path), "trace", asdict(self), force=force)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or one of another version.
            OSError: It cannot be read.
        """
        data = from_json(Path(path), "trace")
        try:
            return cls(**_settings(data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TeaCacheValueError(f"{path} is not a trace: {error}") from error


def replay(
    trace: Trace,
    *,
    rel_l1_thresh: float,
    coefficients: Sequence[float] | None = None,
    calibrated_range: tuple[float, float] | EllipsisType | None = ...,
    max_consecutive_skips: int | None = None,
) -> Trace:
    """Which steps other settings would have skipped, from the distances that were measured. Generates nothing.

    The gate itself decides again (``ops.gate``, on the CPU). With the trace's own settings the result equals the trace.
    With others it is an estimate: after the first step that is decided differently the latents would differ, and with
    them the distances of all later steps. Forced steps stay forced. A step at which no distance was measured, because
    it had nothing to compare with, computes.

    Args:
        trace: ``handle.trace`` or ``Trace.from_json``.
        rel_l1_thresh: 0.0 to 1.0, as for ``apply``.
        coefficients: Five numbers, fourth degree first; default: the trace's.
        calibrated_range: Lowest and highest distance that the coefficients hold for, or None; default: the trace's, and
            None with other ``coefficients``, as for ``apply``.
        max_consecutive_skips: Default: the trace's.

    Returns:
        Trace: With these settings and their decisions, without seconds.

    Raises:
        TeaCacheValueError: An argument has the wrong type or value, or the trace was made without the gate, with a
            threshold of 0 or planned ``steps``, so that it has no distances, and the new threshold is above 0.
    """
    limits = trace.calibrated_range if coefficients is None else None
    settings = replace(
        trace,
        rel_l1_thresh=arguments.threshold(rel_l1_thresh),
        coefficients=trace.coefficients if coefficients is None else arguments.coefficients(coefficients),
        calibrated_range=limits if calibrated_range is ... else arguments.calibrated_range(calibrated_range),
        max_consecutive_skips=trace.max_consecutive_skips
        if max_consecutive_skips is None
        else arguments.consecutive_skips(max_consecutive_skips),
    )
    if settings.rel_l1_thresh > 0 and (trace.rel_l1_thresh <= 0 or (trace.steps, trace.budget) != (None, None)):
        raise TeaCacheValueError("the trace has no distances to replay: they are measured only where the gate decides")
    return replace(settings, generations=tuple(_replayed(g, settings) for g in trace.generations))


def _replayed(generation: GenerationStats, settings: Trace) -> GenerationStats:
    states = []
    state = mx.array([0.0] * 8)
    skipped = 0
    for step in generation.steps:
        if step.kind == "computed" and step.rel_l1 is None:
            state = mx.array([0.0] * 8)  # it had nothing to compare with
        state = _decide(step, state, settings, capped=skipped == settings.max_skips)
        skipped += int(cast(list[float], state.tolist())[0])
        states.append(state)
    mx.eval(states)
    return GenerationStats(tuple(step_record(i, cast(list[float], s.tolist())) for i, s in enumerate(states)))


def _decide(step: StepRecord, state: mx.array, settings: Trace, capped: bool) -> mx.array:
    """The gate's state after a step whose distance is known.

    Two channels give the gate exactly this distance: with a scale of -1 the modulated input is the shift, (1, rel); the
    anchor is (1, 0); so the means are rel / 2 and 1 / 2. A distance that is no number stands for an input that is none.
    """
    missed = step.kind == "numerical-miss"
    rel = step.rel_l1 if step.rel_l1 is not None else math.nan if missed else 0.0
    x = mx.array([[[0.0, 0.0]]])
    *_, state = ops.gate(
        x,
        mx.array([[1.0, rel]]),
        mx.array([[-1.0, -1.0]]),
        mx.array([[[1.0, 0.0]]]),
        [[x]],
        mx.array([[1.0]]),
        state,
        mx.array(int(step.kind == "forced" or capped), dtype=mx.int32),
        coefficients=settings.coefficients,
        threshold=settings.rel_l1_thresh,
        calibrated_range=settings.calibrated_range,
        max_consecutive_skips=settings.max_consecutive_skips,
        stream=mx.Device(mx.cpu),
    )
    return state


# ---- Reading a file


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    data = {"budget": None} | arguments.BEFORE_FORECASTS | data
    if (unknown := set(data) ^ {f.name for f in fields(Trace)}) != set():
        raise ValueError(f"missing or unknown: {', '.join(sorted(unknown))}")
    return data | {
        "variant_id": str(data["variant_id"]),
        "calibrated_range": arguments.calibrated_range(data["calibrated_range"]),
        **{name: check(data[name]) for name, check in arguments.SETTINGS.items()},
        "coefficients": arguments.coefficients(data["coefficients"]),
        "generations": tuple(
            GenerationStats(
                tuple(_step(i, step) for i, step in enumerate(g["steps"])), _number("seconds", g["seconds"])
            )
            for g in data["generations"]
        ),
    }


def _step(index: int, data: dict[str, Any]) -> StepRecord:
    step = StepRecord(**data)
    if step.index != index or step.kind not in KINDS or step.accumulated is None:
        raise ValueError(f"step {index} is {data}")
    for name in ("rel_l1", "predicted", "accumulated", "seconds"):
        _number(name, data[name])
    return step


def _number(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf):
        return value
    raise ValueError(f"{name} must be a finite number or null, got {value!r}")
