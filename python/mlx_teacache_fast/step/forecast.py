"""What a skipped step gets: the last computed steps' values, extrapolated over sigma.

The extrapolation is the polynomial through the last ``order + 1`` computed values (TaylorSeer, arXiv 2503.06923, makes
one of finite differences over the step index; sigma's steps are uneven). Order 0 is TeaCache's reuse.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

# The guard, in two parts. A forecast that is far from the computed steps, measured by the gap between the last two of
# them, amplifies their errors, which are in turn those of earlier forecasts. So the distance is bent: it approaches
# REACH gaps, however far the step is. And the sum of the weights' magnitudes, by which errors can grow, keeps within
# MAX_GAIN, or a lower order takes over. Both were chosen on the demonstration model (docs/forecasting.md).
REACH = 1.0
MAX_GAIN = 4.0


def weights(
    sigma: float, known: Sequence[float], order: int, *, reach: float = REACH, max_gain: float = MAX_GAIN
) -> list[float]:
    """Of the values at ``known`` sigmas for the value at ``sigma``.

    Args:
        sigma: Where the forecast is.
        known: Sigmas of the computed steps, the latest first.
        order: Of the polynomial, 0 to 2: as high as ``known`` and the guard allow.
        reach, max_gain: The guard's; with ``math.inf`` there is none, and the forecast of a polynomial is exact.

    Returns:
        list[float]: ``order + 1`` numbers, which add up to 1; 0 where a value is not used, all 0 without any.
    """
    found = [0.0] * (order + 1)
    for n in range(min(order + 1, len(known)), 0, -1):
        nodes = known[:n]
        if len(set(nodes)) < n:  # a schedule that stands still
            continue
        at = nodes[0]
        if n > 1:
            gap = nodes[0] - nodes[1]
            distance = (sigma - nodes[0]) / gap
            at += gap * distance / math.hypot(1.0, distance / reach)
        lagrange = [_basis(at, nodes, i) for i in range(n)]
        if n <= 2 or sum(map(abs, lagrange)) <= max_gain:
            found[:n] = lagrange
            break
    return found


def correction(
    sigma: float, travel: float, from_sigma: float, gap: Sequence[tuple[float, float, Sequence[float]]], rho: float
) -> list[float]:
    """Of a computed value and those known before it, in what is handed on instead of the computed one.

    The steps skipped since the last computed one went by forecasts. What a straight line between the two computed
    values would have given there, less what the forecasts gave, is the error that the latents have gathered; a step
    that is linear in the value takes it back when the value is changed. No call of the model is needed for it.

    Args:
        sigma: Of the computed step.
        travel: Change of sigma in the computed step, not 0.
        from_sigma: Of the last computed step before it.
        gap: For each skipped step in between its sigma, the change of sigma in it, and the weights of its forecast.
        rho: Share of the error that is taken back.
    """
    new, *old = 0.0, *(0.0 for _ in gap[0][2])
    for at, change, weights in gap:
        part = (at - from_sigma) / (sigma - from_sigma)
        new += change * part
        old = [o - change * w for o, w in zip(old, weights, strict=True)]
        old[0] += change * (1 - part)
    return [1 + rho / travel * new, *(rho / travel * o for o in old)]


def corrected(weights: mx.array, noise: mx.array, history: Sequence[mx.array]) -> mx.array:
    """``noise`` with ``correction``'s weights of it and of the history: float32 ``(1 + K,)``."""
    return combined(weights, [noise, *history]).astype(noise.dtype)


@mx.compile
def miss_of(weights: mx.array, made: Sequence[mx.array], history: Sequence[Sequence[mx.array]]) -> mx.array:
    """By how much the forecast would have missed: L1 distance, and L1 norm of what was computed; float32 ``(2,)``.

    Args:
        weights: The forecast's, float32 ``(K,)``.
        made: What was computed, of each call of the transformer.
        history: Of each, the K values before it.
    """
    off = size = mx.array(0.0)
    for values, before in zip(made, history, strict=True):
        values = values.astype(mx.float32)
        # Row by row: one float32 sum of millions drifts on the CPU.
        off = off + mx.abs(values - combined(weights, before)).sum(axis=-1).sum()
        size = size + mx.abs(values).sum(axis=-1).sum()
    return mx.stack([off, size])


def _basis(sigma: float, nodes: Sequence[float], i: int) -> float:
    """Lagrange's polynomial that is 1 at node ``i`` and 0 at the others."""
    return math.prod(((sigma - node) / (nodes[i] - node) for j, node in enumerate(nodes) if j != i), start=1.0)


def reuse(x: mx.array, weights: mx.array, residuals: Sequence[mx.array]) -> mx.array:
    """``x`` plus the residuals' forecast, rounded once, as ``ops.gate`` does it."""
    return (x.astype(mx.float32) + combined(weights, residuals)).astype(mx.result_type(x, residuals[0]))


def combined(weights: mx.array, values: Sequence[mx.array]) -> mx.array:
    """``sum_k weights[k] * values[k]``, in float32; ``weights`` are float32 ``(K,)``, ``values`` of one shape."""
    total = weights[0] * values[0].astype(mx.float32)
    for k in range(1, len(values)):
        total = total + weights[k] * values[k].astype(mx.float32)
    return total
