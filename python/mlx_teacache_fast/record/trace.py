"""What happened step by step, as a file and for asking what another threshold would have done."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, Self, cast

import mlx.core as mx

from .. import ops
from ..errors import TeaCacheValueError, shown
from ..files import from_json, members, to_json
from ..policy import FLOAT32_MAX, Gate, Policy
from .stats import KINDS, GenerationStats, StepRecord, step_record, table


@dataclass(frozen=True, slots=True)
class Trace:
    """Finished generations of one handle, and the policy that they were made with, with its model's values."""

    variant_id: str
    policy: Policy
    generations: tuple[GenerationStats, ...]

    def to_json(self, path: str | Path, force: bool = False) -> None:
        """Write a file for ``from_json``.

        Raises:
            TeaCacheValueError: The file exists and ``force`` is not set.
            OutputError: It cannot be written.
        """
        to_json(path, "trace", self.record, force=force)

    @property
    def record(self) -> dict[str, Any]:
        """All of it in JSON's kinds, for ``of_record``."""
        generations = [{"steps": list(map(asdict, g.steps)), "seconds": g.seconds} for g in self.generations]
        return {"variant_id": self.variant_id, "policy": self.policy.flat, "generations": generations}

    @classmethod
    def of_record(cls, data: dict[str, Any]) -> Self:
        """Of what ``record`` is; TeaCacheValueError if it is none."""
        members(data, variant_id=str, policy=dict, generations=list)
        generations = tuple(map(_generation, data["generations"]))
        return cls(data["variant_id"], Policy.of(**data["policy"]), generations)

    def summary(self) -> str:
        """As a table to print: steps, distances, and seconds where they are known."""
        return f"{self.variant_id}, {self.policy}\n{table(self.generations)}"

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or one of another version.
            OSError: It cannot be read.
        """
        data = from_json(path, "trace")
        try:
            return cls.of_record(data)
        except ValueError as error:
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
        TeaCacheValueError: An argument has the wrong type or value; the trace is not the gate's, or was made with a
            threshold of 0 and the new one is above it, so that it has no distances.
    """
    if not isinstance(trace, Trace):
        raise TeaCacheValueError(f"trace must be a Trace, got {shown(trace)}")
    threshold = Gate(rel_l1_thresh=rel_l1_thresh).rel_l1_thresh
    rule = trace.policy.rule
    if not isinstance(rule, Gate) or threshold is None or (rule.rel_l1_thresh == 0 and threshold != 0):
        raise TeaCacheValueError(f"replay is of a trace of the gate with a threshold, and this is of {trace.policy}")
    new: dict[str, Any] = {"coefficients": coefficients, "max_consecutive_skips": max_consecutive_skips}
    new = {name: value for name, value in new.items() if value is not None} | {"rel_l1_thresh": rel_l1_thresh}
    if coefficients is not None or calibrated_range is not ...:
        new["calibrated_range"] = None if calibrated_range is ... else calibrated_range
    rule = replace(rule, **new)
    if rule.coefficients is None:
        raise TeaCacheValueError("the trace's policy has no coefficients: give them")
    generations = tuple(_replayed(g, rule) for g in trace.generations)
    return replace(trace, policy=replace(trace.policy, rule=rule), generations=generations)


def _replayed(generation: GenerationStats, rule: Gate) -> GenerationStats:
    records: list[StepRecord] = []
    state = mx.zeros(8)
    skipped = 0
    for step in generation.steps:
        if step.kind == "computed" and step.rel_l1 is None:
            state = mx.zeros(8)  # it had nothing to compare with
        state = _decide(step, state, rule, capped=skipped == rule.max_skips)
        records.append(step_record(len(records), cast(list[float], state.tolist())))
        skipped += records[-1].kind == "skipped"
    return GenerationStats(tuple(records))


def _decide(step: StepRecord, state: mx.array, rule: Gate, capped: bool) -> mx.array:
    """The gate's state after a step whose distance is known.

    Two channels give the gate exactly this distance: with a scale of -1 the modulated input is the shift, (1, rel); the
    anchor is (1, 0); so the means are rel / 2 and 1 / 2. A distance that is no number stands for an input that is none.
    """
    missed = step.kind == "numerical-miss"
    rel = step.rel_l1 if step.rel_l1 is not None else math.nan if missed else 0.0
    x = mx.array([[[0.0, 0.0]]])
    signal = x, mx.array([[1.0, rel]]), mx.array([[-1.0, -1.0]]), mx.array([[[1.0, 0.0]]])
    force = mx.array(int(step.kind == "forced" or capped), dtype=mx.int32)
    given: dict[str, Any] = {"coefficients": rule.coefficients, "threshold": rule.rel_l1_thresh}
    given |= {"calibrated_range": rule.calibrated_range, "max_consecutive_skips": rule.max_consecutive_skips}
    given |= {"residuals": [[x]], "weights": mx.array([[1.0]]), "state": state, "force": force}
    *_, state = ops.gate(*signal, **given, stream=mx.Device(mx.cpu))
    return state


# ---- Reading a file


def _generation(data: Any) -> GenerationStats:
    members(data, steps=list, seconds=object)
    steps = tuple(_step(i, step) for i, step in enumerate(data["steps"]))
    return GenerationStats(steps, _number("seconds", data["seconds"]))


def _step(index: int, data: Any) -> StepRecord:
    numbers = ("rel_l1", "predicted", "accumulated", "seconds")
    members(data, index=int, kind=str, **dict.fromkeys(numbers, object))
    step = StepRecord(**data | {name: _number(name, data[name]) for name in numbers})
    if step.index != index or step.kind not in KINDS or step.accumulated is None:
        raise ValueError(f"step {index} is {shown(data)}")
    return step


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX:
        return float(value)
    raise ValueError(f"{name} must be a number of float32's range or null, got {shown(value)}")
