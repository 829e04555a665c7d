"""Full runs: what all that is tried is compared with, and what plans and the gate's polynomial follow from."""

import bisect
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import InternalStateError, TeaCacheWarning
from ..handle import apply
from ..mflux.pictures import Ending, Image, generate, predictions
from ..policy import Gate
from ..record.trace import Trace, replay
from .solve import Array

DEGREE = 4  # of the gate's polynomial
STEP = 0.2  # by which latents are moved along a prediction to see what it changes, in parts of their root mean square

Case = tuple[str, int]  # a prompt and a seed


@dataclass(frozen=True)
class FullRuns:
    """Of all cases; the first ones are to learn from.

    Attributes:
        pictures: With all steps.
        sigmas: Of each step and the one after the last.
        products: Of the cases to learn from: see ``Recorded``; in squared levels of 255.
        pairs: For each case, of consecutive steps, ``(n, 2)``: relative L1 distance of the gate's signal, and relative
            L1 change of the prediction.
        trace: Of the cases to learn from, with the gate that measured, and skipped nothing.
    """

    pictures: list[Image]
    sigmas: list[float]
    products: list[Array]
    pairs: list[Array]
    trace: Trace

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]]) -> Self:
        """Of each case's ``full_run``."""
        learnt = [run for run in runs if run["products"] is not None]
        traces = [Trace.of_record(run["trace"]) for run in learnt]
        return cls(
            [unpacked(run["picture"]) for run in runs],
            runs[0]["sigmas"],
            [np.array(run["products"]) for run in learnt],
            [np.array(run["pairs"]).reshape(-1, 2) for run in runs],
            replace(traces[0], generations=tuple(trace.generations[0] for trace in traces)),
        )


def full_run(flux: Any, end: Ending, case: Case, options: Mapping[str, Any], *, is_learnt: bool) -> dict[str, Any]:
    """Run all steps of a case.

    Args:
        flux: Not gated.
        end: Of its generations.
        case: Which.
        options: ``generate_image``'s.
        is_learnt: Whether it is to learn from.

    Returns:
        dict: For ``FullRuns.of``, of JSON's kinds and bytes; ``seconds`` that its picture took, and the look at its
            predictions.
    """
    start = perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TeaCacheWarning)  # nothing is to be skipped
        handle = apply(flux, rel_l1_thresh=1.0, coefficients=(0, 0, 0, 1, 0), max_consecutive_skips=0, forecast=0)
    with handle, predictions(flux, options.get("guidance") or 1.0) as recorder:
        picture = generate(flux, *case, options)
    if handle.stats.last_generation is None:
        raise InternalStateError("a generation did not go through the gate, and its steps are not known")
    seconds = perf_counter() - start
    values = recorder.values(end.latents.size)
    distances = [(s.index, s.rel_l1) for s in handle.stats.last_generation.steps if s.rel_l1 is not None]
    products = _products(end, flux, values, picture, case, options).tolist() if is_learnt else None
    return {
        "picture": packed(picture),
        "sigmas": recorder.sigmas,
        "products": products,
        "pairs": [(d, _change(values[k - 1], values[k])) for k, d in distances],
        "trace": handle.trace.record,
        "seconds": (seconds, perf_counter() - start - seconds),
    }


def packed(picture: Image) -> tuple[bytes, Any]:
    """For ``unpacked``, here or on another rank."""
    return picture.tobytes(), picture.shape


def unpacked(data: tuple[bytes, Any]) -> Image:
    pixels, shape = data
    return np.frombuffer(pixels, np.uint8).reshape(shape)


def _change(before: npt.NDArray[np.float32], now: npt.NDArray[np.float32]) -> float:
    return float(np.abs(now - before).mean() / np.abs(before).mean())


def _products(
    end: Ending, flux: Any, values: npt.NDArray[np.float32], picture: Image, case: Case, options: Mapping[str, Any]
) -> Array:
    """Mean products of what the picture changes by along each prediction, for as much of it as the latents have.

    Of the predictions themselves where the picture of other latents cannot be had.
    """
    latents, parts, changes = end.latents.astype(mx.float32), [], []
    for value in values:
        parts.append(STEP * float(mx.sqrt(mx.mean(latents**2)).item() / max(np.sqrt(np.mean(value**2)), 1e-12)))
        moved = latents + parts[-1] * mx.array(value).reshape(latents.shape)
        other = end.picture(moved.astype(end.latents.dtype), flux, *case, options)
        if other is None:
            return np.asarray(values.astype(np.float64) @ values.T.astype(np.float64) / values.shape[1])
        changes.append(other.astype(np.int16).ravel() - picture.ravel())
    blocks = np.array_split(np.stack(changes), math.ceil(picture.size / 2**20), axis=1)  # floats of all are gigabytes
    sums = sum(block.astype(np.float32) @ block.astype(np.float32).T for block in blocks)
    return np.asarray(sums / np.outer(parts, parts) / picture.size, np.float64)


# ---- The gate


def polynomial(runs: FullRuns) -> dict[str, Any]:
    """``coefficients`` and ``calibrated_range``, and how well they fit; empty for too few or equal steps."""
    n = len(runs.products)
    learnt, unseen = (np.concatenate([np.zeros((0, 2)), *part]) for part in (runs.pairs[:n], runs.pairs[n:]))
    learnt, unseen = (pairs[np.isfinite(pairs).all(axis=1)] for pairs in (learnt, unseen))
    if len(set(learnt[:, 0])) <= DEGREE + 1:
        return {}
    x, y = learnt.T
    fit = np.polyfit(x, y, DEGREE)
    found = {"coefficients": fit.tolist(), "calibrated_range": [float(x.min()), float(x.max())]}
    return found | {"r2": _r2(fit, learnt), "held_out_r2": _r2(fit, unseen)}


def _r2(fit: Any, pairs: Array) -> float | None:
    """Coefficient of determination."""
    x, y = pairs.T
    return float(1 - ((np.polyval(fit, x) - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()) if len(set(y)) > 1 else None


def threshold(trace: Trace, how: Mapping[str, Any], count: int) -> float | None:
    """The lowest of two digits with which the gate computes so many steps at most, in the mean; None if none does."""
    candidates = [digits * 10.0**exponent for exponent in (-4, -3, -2) for digits in range(10, 100)] + [1.0]
    how = {"max_consecutive_skips": Gate.max_consecutive_skips, **how}

    def is_enough(value: float) -> bool:
        again = replay(trace, rel_l1_thresh=value, **how)
        return statistics.mean(g.num_steps - g.skipped for g in again.generations) <= count

    found = bisect.bisect_left(candidates, True, key=is_enough)
    return round(candidates[found], 6) if found < len(candidates) else None
