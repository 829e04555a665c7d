"""The gate in plain MLX: the rules as text to read, and the oracle of the fused op's tests.

Source: TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108); the rules around it (calibrated range, anchor on every step,
numerical misses, streak limit) follow mlx-teacache 0.14.1 (Apache-2.0).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

# What mean|anchor| is held above, so that an anchor of zeros gives a huge distance and not a division by zero.
MIN_ANCHOR_MEAN = 1e-12


def gate(
    x: mx.array,
    shift: mx.array | None,
    scale: mx.array | None,
    anchor: mx.array,
    *,
    residuals: Sequence[Sequence[mx.array]],
    weights: mx.array,
    state: mx.array,
    force: mx.array,
    coefficients: Sequence[float],
    threshold: float,
    calibrated_range: tuple[float, float] | None = None,
    max_consecutive_skips: int = 8,
    eps: float = 1e-6,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, list[mx.array], mx.array]:
    """What ``ops.gate`` computes, written with MLX's own ops: many passes over the data instead of one.

    Arguments, results and rounding are those of ``ops.gate``; nothing is checked here. No value is read on the host,
    so it works inside ``mx.compile``. Sums run in MLX's order and the polynomial has no fused multiply-add: the
    distance and its price agree with the op's to float32 rounding, not to the bit.

    Source: TeaCache (Liu et al., CVPR 2025), sections 3.2 and 3.3.

    Returns:
        tuple: ``modulated``, ``reused`` (one array per branch), ``state``.
    """
    context: AbstractContextManager[Any] = nullcontext() if stream is None else mx.stream(stream)
    with context:
        modulated = x if shift is None or scale is None else _modulate(x, shift, scale, eps)
        reused = [_reuse(x, terms, weights[branch]) for branch, terms in enumerate(residuals)]
        if threshold <= 0:
            return modulated, reused, mx.concatenate([mx.array([0.0, 0.0, mx.nan, mx.nan]), state[4:]])
        rel = _relative_l1(modulated, anchor)
        price, is_above = _price(rel, coefficients, calibrated_range)
        may_skip = mx.logical_not(is_above) & (state[4] + price < threshold) & (state[5] < max_consecutive_skips)
        return modulated, reused, _decide(state, force, mx.all(mx.isfinite(modulated)), rel, price, may_skip)


def _modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    if shift.ndim == 2:
        shift = shift[:, None]
    if scale.ndim == 2:
        scale = scale[:, None]
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is large against the deviation.
    wide = x.astype(mx.float32)
    centered = wide - mx.mean(wide, axis=-1, keepdims=True)
    variance = mx.mean(centered * centered, axis=-1, keepdims=True)
    normed = (centered * mx.rsqrt(variance + eps)).astype(x.dtype)
    return (1 + scale) * normed + shift


def _reuse(x: mx.array, terms: Sequence[mx.array], weights: mx.array) -> mx.array:
    total = x.astype(mx.float32)
    for k, term in enumerate(terms):
        total = total + weights[k] * term.astype(mx.float32)
    return total.astype(mx.result_type(x, terms[0]))


def _relative_l1(current: mx.array, anchor: mx.array) -> mx.array:
    change = _mean(mx.abs(current - anchor))
    return change / mx.maximum(_mean(mx.abs(anchor)), MIN_ANCHOR_MEAN)


def _mean(a: mx.array) -> mx.array:
    # Row by row first: one running float32 sum over 50 million elements would lose the small ones.
    return mx.mean(mx.mean(a.astype(mx.float32), axis=-1))


def _price(
    rel: mx.array, coefficients: Sequence[float], calibrated_range: tuple[float, float] | None
) -> tuple[mx.array, mx.array]:
    """The polynomial's value, at least 0, NaN where it is not finite; and whether ``rel`` is above the range."""
    at = rel
    is_above = mx.array(False)
    if calibrated_range is not None:
        low, high = calibrated_range
        at = mx.clip(rel, low, high)
        is_above = rel > high
    c4, c3, c2, c1, c0 = coefficients
    price = (((c4 * at + c3) * at + c2) * at + c1) * at + c0
    return mx.where(mx.isfinite(price), mx.maximum(price, 0), mx.nan), is_above


def _decide(
    state: mx.array, force: mx.array, finite: mx.array, rel: mx.array, price: mx.array, may_skip: mx.array
) -> mx.array:
    acc, streak = state[4], state[5]
    had_anchor, had_residual = state[6] != 0, state[7] != 0
    priced = mx.isfinite(rel) & mx.isfinite(price)

    # Exactly one of forced, miss, seed, skip and compute is true.
    forced = force != 0
    gated = mx.logical_not(forced)
    comparable = gated & finite & had_anchor & had_residual
    seed = gated & finite & mx.logical_not(had_anchor & had_residual)
    miss = gated & mx.logical_not(seed | (comparable & priced))
    skip = comparable & priced & may_skip
    compute = comparable & priced & mx.logical_not(may_skip)

    kind = mx.where(forced, 1, mx.where(skip, 2, mx.where(miss, 3, 0)))
    new_acc = mx.where(skip, acc + price, mx.where(miss | compute, 0, acc))
    new_streak = mx.where(skip, streak + 1, mx.where(forced, streak, 0))
    advanced = finite & (gated | (force == 1))
    has_anchor = had_anchor | advanced
    has_residual = mx.where(seed | compute, True, mx.where(miss, False, had_residual))
    nan = mx.array(mx.nan, mx.float32)
    measured_rel = mx.where(comparable & mx.isfinite(rel), rel, nan)
    measured_price = mx.where(comparable & priced, price, nan)
    slots = skip, kind, measured_rel, measured_price, new_acc, new_streak, has_anchor, has_residual
    return mx.stack([slot.astype(mx.float32) for slot in slots])
