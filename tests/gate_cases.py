"""A call of ``ops.gate`` as data, random ones, and bounds on what may differ: for every test of the gate."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_teacache_fast import ops

COMPUTED, FORCED, SKIPPED, MISS = range(4)
GATED, LEADING, TRAILING = range(3)
NAN = math.nan
INF = math.inf

# Distance from 1 to the next number: a correctly rounded result is off by at most half of it, relatively.
EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}

# Each shape's reason beside it.
SHAPES = {
    (1, 1, 1): "one element: the variance is exactly 0",
    (1, 1, 3): "a row shorter than any SIMD width",
    (2, 1, 64): "one row per batch element: shift and scale change at every row",
    (1, 7, 64): "an odd number of rows: no thread count but 1 and 7 divides it",
    (2, 5, 255): "each row ends in a part of a vector, and the next row starts unaligned",
    (1, 3, 3072): "FLUX's width",
    (1, 2, 20001): "a row longer than a threadgroup, or than a buffer on the stack",
    (1, 0, 64): "no rows",
    (0, 3, 64): "no batch",
    (1, 3, 0): "no columns",
}


@dataclass(frozen=True)
class Case:
    """Arguments of one call; ``replace`` changes some of them."""

    x: mx.array
    shift: mx.array | None
    scale: mx.array | None
    anchor: mx.array
    residuals: list[list[mx.array]]
    weights: mx.array
    state: mx.array
    force: int = GATED
    coefficients: tuple[float, ...] = (0.0, 0.0, 2.0, 0.5, 0.01)
    threshold: float = 0.9
    calibrated_range: tuple[float, float] | None = None
    max_consecutive_skips: int = 8
    eps: float = 1e-6

    @property
    def modulation(self) -> tuple[mx.array, mx.array]:
        """Shift and scale as the kernels are given them: x stands in where it is the modulated input."""
        return (self.x, self.x) if self.shift is None or self.scale is None else (self.shift, self.scale)

    @property
    def residual_dtype(self) -> mx.Dtype:
        return self.residuals[0][0].dtype if self.residuals else self.x.dtype

    @property
    def arrays(self) -> dict[str, Any]:
        names = ("x", "shift", "scale", "anchor", "residuals", "weights", "state")
        return {name: getattr(self, name) for name in names} | {"force": mx.array(self.force, mx.int32)}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "coefficients": self.coefficients,
            "threshold": self.threshold,
            "calibrated_range": self.calibrated_range,
            "max_consecutive_skips": self.max_consecutive_skips,
            "eps": self.eps,
        }

    def run(self, gate: Callable[..., Any] = ops.gate) -> tuple[mx.array, list[mx.array], mx.array]:
        modulated, reused, state = gate(**self.arrays, **self.options)
        mx.eval(modulated, reused, state)
        return modulated, reused, state


def make_state(acc: float = 0.25, streak: float = 2, has_anchor: float = 1, has_residual: float = 1) -> mx.array:
    # Slots 0 to 3 report the last step and are not read: NaN shows it if they are.
    return mx.array([NAN, NAN, NAN, NAN, acc, streak, has_anchor, has_residual], mx.float32)


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """What mflux computes: ``norm1`` is nn.LayerNorm(affine=False, eps=1e-6)."""
    if shift.ndim == 2:
        shift = shift[:, None]
    if scale.ndim == 2:
        scale = scale[:, None]
    return (1 + scale) * mx.fast.layer_norm(x, None, None, 1e-6) + shift


def random_case(
    shape: tuple[int, int, int],
    dtype: mx.Dtype = mx.float32,
    *,
    branches: int = 1,
    terms: int = 1,
    residual_dtype: mx.Dtype | None = None,
    seed: int = 0,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Case:
    rng = np.random.default_rng(seed)
    b, _, d = shape

    def normal(size: tuple[int, ...], to: mx.Dtype) -> mx.array:
        return mx.array(rng.standard_normal(size, np.float32)).astype(to)

    x = (mean + deviation * normal(shape, mx.float32)).astype(dtype)
    before = (x + 0.1 * deviation * normal(shape, mx.float32)).astype(dtype)
    shift, scale = normal((b, 1, d), dtype), 0.3 * normal((b, 1, d), dtype)
    residuals = [[normal(shape, residual_dtype or dtype) for _ in range(terms)] for _ in range(branches)]
    weights = normal((branches, terms), mx.float32)
    return Case(x, shift, scale, modulate(before, shift, scale), residuals, weights, make_state())


def given(case: Case) -> Case:
    """The same distance, asked of the modulated input itself."""
    x = case.run()[0]
    return replace(case, x=x, shift=None, scale=None, residuals=[], weights=mx.zeros((0, 0)))


def to_numpy(a: mx.array) -> np.ndarray:
    """The same numbers in float64: exact for float32, float16 and bfloat16."""
    return np.array(a.astype(mx.float32)).astype(np.float64)


def digest(*arrays: mx.array) -> str:
    """Equal where all bits are; short, since pytest compares long values line by line, for minutes where CI is set."""
    sha = hashlib.sha256()
    for a in arrays:
        sha.update(np.array(a.view(mx.uint8) if a.size else mx.zeros(0, mx.uint8)).tobytes())
    return sha.hexdigest()


def assert_same_bits(got: tuple[Any, Any, mx.array], expected: tuple[Any, Any, mx.array]) -> None:
    for a, b in zip([got[0], *got[1], got[2]], [expected[0], *expected[1], expected[2]], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert digest(a) == digest(b)


def rounded(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    # By way of float32: a double rounding differs from one rounding about once in 2^13 numbers, by one unit.
    with np.errstate(over="ignore"):
        return mx.array(a.astype(np.float32)).astype(dtype)


def modulate_float64(case: Case) -> mx.array:
    """LayerNorm in float64, then the roundings of the contract."""
    if case.shift is None:
        return case.x
    x = to_numpy(case.x)
    if x.size == 0:
        return modulate(case.x, case.shift, case.scale)
    centered = x - x.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + case.eps)
    shift = case.shift if case.shift.ndim == 3 else case.shift[:, None]
    scale = case.scale if case.scale.ndim == 3 else case.scale[:, None]
    return (1 + scale) * rounded(normed, case.x.dtype) + shift


def assert_modulated_close(got: mx.array, expected: mx.array, case: Case) -> None:
    """Equal, but where float32 statistics round x's normalised value to its neighbour.

    Statistics: a float32 sum of n numbers in 8 lanes or more walks sqrt(n / 8) steps of 2^-24, so r = 2^-23 sqrt(n / 8)
    (two deviations) for the mean over mean|x|, and r / 2 for 1 / deviation. A neighbour of normed is one unit away,
    which the roundings of product and sum may widen by one of theirs each: 4 e (|m| + |shift|), e the coarser epsilon.
    In float16 and bfloat16 a neighbour is met once in r / e numbers, so at most one percent (and two) may differ.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if case.shift is None:
        assert digest(got) == digest(expected)
        return
    if got.size == 0:
        return
    shift = to_numpy(case.shift if case.shift.ndim == 3 else case.shift[:, None])
    scale = to_numpy(case.scale if case.scale.ndim == 3 else case.scale[:, None])
    x, a, b = to_numpy(case.x), to_numpy(got), to_numpy(expected)
    epsilon = max(EPSILON[case.x.dtype], EPSILON[got.dtype], EPSILON[case.scale.dtype])
    r = 2.0**-23 * math.sqrt(max(x.shape[-1] / 8, 1))
    deviation = np.sqrt(x.var(-1, keepdims=True) + case.eps)
    mean_error = r * np.abs(x).mean(-1, keepdims=True) / deviation * np.abs(1 + scale)
    bound = (4 * epsilon + r) * (np.abs(b) + np.abs(shift)) + mean_error
    assert np.all(np.abs(a - b) <= bound), f"off by {np.max(np.abs(a - b) / np.maximum(bound, 1e-30)):.3g} bounds"
    if case.x.dtype != mx.float32:
        assert np.count_nonzero(a != b) <= 2 + 0.01 * a.size


def assert_reused_close(got: list[mx.array], case: Case) -> None:
    """Float32 sums of K products: 2 K + 1 roundings of 2^-24, then one to the output's dtype."""
    assert len(got) == len(case.residuals)
    weights = to_numpy(case.weights)
    x = to_numpy(case.x)
    for branch, terms in enumerate(case.residuals):
        products = [weights[branch, k] * to_numpy(term) for k, term in enumerate(terms)]
        expected = x + sum(products)
        size = np.abs(x) + sum(np.abs(product) for product in products)
        assert got[branch].shape == case.x.shape
        assert got[branch].dtype == mx.result_type(case.x, terms[0])
        bound = (2 * len(terms) + 1) * 2.0**-24 * size + 0.5 * EPSILON[got[branch].dtype] * np.abs(expected)
        # float16 is subnormal below 2^-14: half a unit there is 2^-25.
        assert np.all(np.abs(to_numpy(got[branch]) - expected) <= bound * 1.001 + 2.0**-25)


def assert_state_matches_numpy(state: mx.array, modulated: mx.array, case: Case) -> None:
    """rel and p of a step without a range, from the op's own ``modulated``.

    A float32 sum of numbers of one sign is off by about 2^-24 times the square root of its longest run, which is a
    row's share of a lane: 2e-6 covers 1,000. The polynomial adds its slope times that, and a rounding for each term.
    """
    difference = to_numpy(mx.abs(modulated - case.anchor)).mean()
    rel = difference / max(np.abs(to_numpy(case.anchor)).mean(), 1e-12)
    powers = rel ** np.arange(4, -1, -1)
    terms = np.array(case.coefficients) * powers
    got = np.array(state)
    assert got[2] == pytest.approx(rel, rel=2e-6, abs=1e-30)
    assert got[3] == pytest.approx(max(terms.sum(), 0), abs=1e-5 * np.abs(terms).sum())


def hand_case(dtype: mx.Dtype = mx.bfloat16) -> Case:
    return Case(
        x=mx.array([[[1, 3, 1, 3]]], dtype),
        shift=mx.full((1, 4), 0.25, dtype),
        scale=mx.full((1, 4), 0.5, dtype),
        anchor=mx.array([[[-1, 1.5, -1, 1.5]]], dtype),
        residuals=[[mx.full((1, 1, 4), 0.5, dtype), mx.full((1, 1, 4), 0.25, dtype)]],
        weights=mx.array([[2.0, -1.0]]),
        state=make_state(),
        coefficients=(0, 0, 0, 2, 0.1),
        threshold=1.0,
    )


# ---- Every rule of csrc/gate_decision.h. The hand case has rel = 0.2; a constant polynomial makes p = 0.5 exact.

HALF = (0.0, 0.0, 0.0, 0.0, 0.5)
LINEAR = (0.0, 0.0, 0.0, 1.0, 0.0)
REL = float(np.float32(0.2))
ROWS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "skips below the threshold": ({}, [1, SKIPPED, REL, 0.5, 0.75, 3, 1, 1]),
    "computes at the threshold": ({"threshold": 0.75}, [0, COMPUTED, REL, 0.5, 0, 0, 1, 1]),
    "computes above the threshold": ({"threshold": 0.5}, [0, COMPUTED, REL, 0.5, 0, 0, 1, 1]),
    "skips up to the limit": ({"state": make_state(streak=7)}, [1, SKIPPED, REL, 0.5, 0.75, 8, 1, 1]),
    "computes at the limit": ({"state": make_state(streak=8)}, [0, COMPUTED, REL, 0.5, 0, 0, 1, 1]),
    "a limit of one": ({"max_consecutive_skips": 1}, [0, COMPUTED, REL, 0.5, 0, 0, 1, 1]),
    "a negative price is none": ({"coefficients": (0, 0, 0, -1, 0)}, [1, SKIPPED, REL, 0, 0.25, 3, 1, 1]),
    "above the range computes": ({"calibrated_range": (0.05, 0.1)}, [0, COMPUTED, REL, 0.5, 0, 0, 1, 1]),
    "above the range is priced at its end": (
        {"calibrated_range": (0.05, 0.125), "coefficients": LINEAR},
        [0, COMPUTED, REL, 0.125, 0, 0, 1, 1],
    ),
    "below the range is priced at its start": (
        {"calibrated_range": (0.5, 0.75), "coefficients": LINEAR},
        [1, SKIPPED, REL, 0.5, 0.75, 3, 1, 1],
    ),
    "inside the range": (
        {"calibrated_range": (0.125, 0.75), "coefficients": LINEAR},
        [1, SKIPPED, REL, REL, 0.25 + REL, 3, 1, 1],
    ),
    "seeds without an anchor": ({"state": make_state(has_anchor=0)}, [0, COMPUTED, NAN, NAN, 0.25, 0, 1, 1]),
    "seeds without a residual": ({"state": make_state(has_residual=0)}, [0, COMPUTED, NAN, NAN, 0.25, 0, 1, 1]),
    "seeds with neither": ({"state": mx.zeros(8)}, [0, COMPUTED, NAN, NAN, 0, 0, 1, 1]),
    "leading forced advances": (
        {"force": LEADING, "state": make_state(has_anchor=0, has_residual=0)},
        [0, FORCED, NAN, NAN, 0.25, 2, 1, 0],
    ),
    "leading forced leaves the rest": ({"force": LEADING}, [0, FORCED, NAN, NAN, 0.25, 2, 1, 1]),
    "leading forced, non-finite, no anchor": (
        {"force": LEADING, "shift": NAN, "state": make_state(has_anchor=0, has_residual=0)},
        [0, FORCED, NAN, NAN, 0.25, 2, 0, 0],
    ),
    "leading forced, non-finite, an anchor": (
        {"force": LEADING, "shift": INF, "state": make_state(has_residual=0)},
        [0, FORCED, NAN, NAN, 0.25, 2, 1, 0],
    ),
    "trailing forced, no anchor": (
        {"force": TRAILING, "state": make_state(has_anchor=0)},
        [0, FORCED, NAN, NAN, 0.25, 2, 0, 1],
    ),
    "trailing forced, an anchor": ({"force": TRAILING}, [0, FORCED, NAN, NAN, 0.25, 2, 1, 1]),
    "trailing forced, non-finite": ({"force": TRAILING, "shift": NAN}, [0, FORCED, NAN, NAN, 0.25, 2, 1, 1]),
    "NaN misses": ({"shift": NAN}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "infinity misses": ({"shift": -INF}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "NaN misses before it seeds": ({"shift": NAN, "state": make_state(has_anchor=0)}, [0, MISS, NAN, NAN, 0, 0, 0, 0]),
    "NaN in x misses": ({"x": NAN}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "infinity in x misses": ({"x": INF}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "a distance that is not finite misses": ({"anchor": INF}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "NaN in the anchor misses": ({"anchor": NAN}, [0, MISS, NAN, NAN, 0, 0, 1, 0]),
    "a price that is not finite misses": (
        {"coefficients": (0, 0, 0, 3e38, 3e38)},
        [0, MISS, REL, NAN, 0, 0, 1, 0],
    ),
    "a price of minus infinity misses": (
        {"coefficients": (0, 0, 0, -3e38, -3e38)},
        [0, MISS, REL, NAN, 0, 0, 1, 0],
    ),
    # mean|modulated| = 1.5 over the floor of 1e-12.
    "a zero anchor computes": (
        {"anchor": 0.0, "coefficients": LINEAR},
        [0, COMPUTED, 1.5e12, 1.5e12, 0, 0, 1, 1],
    ),
    "a zero anchor is above any range": (
        {"anchor": 0.0, "coefficients": LINEAR, "calibrated_range": (0.0, 0.125)},
        [0, COMPUTED, 1.5e12, 0.125, 0, 0, 1, 1],
    ),
    "off at threshold 0": ({"threshold": 0.0}, [0, COMPUTED, NAN, NAN, 0.25, 2, 1, 1]),
    "off below 0": ({"threshold": -1.0}, [0, COMPUTED, NAN, NAN, 0.25, 2, 1, 1]),
    "off comes before forced": (
        {"threshold": 0.0, "force": LEADING, "state": make_state(has_anchor=0, has_residual=0)},
        [0, COMPUTED, NAN, NAN, 0.25, 2, 0, 0],
    ),
    "off comes before a miss": ({"threshold": 0.0, "shift": NAN}, [0, COMPUTED, NAN, NAN, 0.25, 2, 1, 1]),
}


def with_element(a: mx.array, value: float) -> mx.array:
    flat = np.array(a.astype(mx.float32)).reshape(-1)
    flat[-1] = value
    return mx.array(flat.reshape(a.shape)).astype(a.dtype)


def row_case(name: str) -> tuple[Case, list[float]]:
    """The hand case with a row's changes, and the state that it must give."""
    changes, expected = ROWS[name]
    changes = {"coefficients": HALF} | changes
    case = hand_case()
    for field in ("x", "shift"):  # One element is enough.
        if field in changes:
            changes[field] = with_element(getattr(case, field), changes[field])
    if "anchor" in changes:
        value = changes["anchor"]
        changes["anchor"] = mx.zeros_like(case.anchor) if value == 0 else with_element(case.anchor, value)
    return replace(case, **changes), expected
