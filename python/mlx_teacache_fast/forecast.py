"""What a skipped step gets: the last computed steps' values, extrapolated over sigma.

The extrapolation is the polynomial through the last ``order + 1`` computed values (TaylorSeer, arXiv 2503.06923, makes
one of finite differences over the step index; sigma's steps are uneven). Order 0 is TeaCache's reuse.
"""

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

Cache = Literal["residual", "output"]
CACHES: tuple[Cache, ...] = ("residual", "output")
MAX_ORDER = 2

DEFAULT_FORECAST = 0
DEFAULT_CACHE: Cache = "residual"

# The sum of the weights' magnitudes: by so much may a forecast be larger than what it is made of, and its error larger
# than theirs. Wide gaps after narrow ones make it large; then the next lower order takes over.
MAX_GAIN = 8.0


def weights(sigma: float, known: Sequence[float], order: int) -> list[float]:
    """Of the values at ``known`` sigmas for the value at ``sigma``.

    Args:
        sigma: Where the forecast is.
        known: Sigmas of the computed steps, the latest first.
        order: Of the polynomial, 0 to 2: as high as ``known`` and the guard allow.

    Returns:
        list[float]: ``order + 1`` numbers, which add up to 1; 0 where a value is not used, all 0 without any.
    """
    found = [0.0] * (order + 1)
    for n in range(min(order + 1, len(known)), 0, -1):
        nodes = known[:n]
        if len(set(nodes)) < n:  # a schedule that stands still
            continue
        lagrange = [_basis(sigma, nodes, i) for i in range(n)]
        if n == 1 or sum(map(abs, lagrange)) <= MAX_GAIN:
            found[:n] = lagrange
            break
    return found


def _basis(sigma: float, nodes: Sequence[float], i: int) -> float:
    """Lagrange's polynomial that is 1 at node ``i`` and 0 at the others."""
    product = 1.0
    for j, node in enumerate(nodes):
        if j != i:
            product *= (sigma - node) / (nodes[i] - node)
    return product


def reuse(x: mx.array, weights: mx.array, residuals: Sequence[mx.array]) -> mx.array:
    """``x`` plus the residuals' forecast, rounded once, as ``ops.gate`` does it."""
    return (x.astype(mx.float32) + combined(weights, residuals)).astype(mx.result_type(x, residuals[0]))


def combined(weights: mx.array, values: Sequence[mx.array]) -> mx.array:
    """``sum_k weights[k] * values[k]``, in float32.

    Args:
        weights: float32 ``(K,)``.
        values: K arrays of one shape.
    """
    total = weights[0] * values[0].astype(mx.float32)
    for k in range(1, len(values)):
        total = total + weights[k] * values[k].astype(mx.float32)
    return total
