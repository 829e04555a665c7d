"""ops.gate against the plain-MLX reference, against numpy in float64, and against numbers written out by hand."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import (
    COMPUTED,
    EPSILON,
    FORCED,
    GATED,
    INF,
    LEADING,
    LINEAR,
    MISS,
    NAN,
    ROWS,
    SHAPES,
    SKIPPED,
    TRAILING,
    Case,
    assert_modulated_close,
    assert_reused_close,
    assert_same_bits,
    assert_state_matches_numpy,
    digest,
    given,
    hand_case,
    make_state,
    modulate,
    modulate_float64,
    random_case,
    row_case,
    to_numpy,
)

from mlx_teacache_fast import ops, reference
from mlx_teacache_fast.record.stats import KINDS

GATES = pytest.mark.parametrize("gate", [ops.gate, reference.gate], ids=["op", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])

# ---- One case by hand


@GATES
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_hand_computed(gate: Callable[..., Any], dtype: mx.Dtype) -> None:
    # Mean 2, deviations -1 and 1, variance 1: normed is +-0.9999995, which rounds to +-1.
    # modulated = (1 + 0.5) * normed + 0.25 = -1.25, 1.75. Against the anchor: |difference| = 0.25, mean|anchor| = 1.25.
    # rel = 0.25 / 1.25 = 0.2; p = 2 * 0.2 + 0.1 = 0.5; acc = 0.25 + 0.5 = 0.75 < 1: skip, the third in a row.
    # reused = x + 2 * 0.5 - 1 * 0.25 = 1.75, 3.75.
    case = hand_case(dtype)
    modulated, reused, state = case.run(gate)
    assert modulated.tolist() == [[[-1.25, 1.75, -1.25, 1.75]]]
    assert reused[0].tolist() == [[[1.75, 3.75, 1.75, 3.75]]]
    assert state.tolist() == pytest.approx([1, SKIPPED, 0.2, 0.5, 0.75, 3, 1, 1], rel=1e-6)


@GATES
@pytest.mark.parametrize("name", ROWS)
def test_state_transition(gate: Callable[..., Any], name: str) -> None:
    case, expected = row_case(name)
    _, _, state = case.run(gate)
    assert state.dtype == mx.float32
    assert state.shape == (8,)
    assert state.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_kind_codes_are_those_of_the_records() -> None:
    assert (KINDS[COMPUTED], KINDS[FORCED], KINDS[SKIPPED], KINDS[MISS]) == (
        "computed",
        "forced",
        "skipped",
        "numerical-miss",
    )


@GATES
def test_float16_overflow_misses(gate: Callable[..., Any]) -> None:
    # 1 + 65504 rounds to 65504 in float16; times normed = 1, plus 65504, it is beyond float16's largest number.
    large = mx.full((1, 4), 65504.0, mx.float16)
    case = replace(hand_case(mx.float16), scale=large, shift=large)
    assert case.run(gate)[2].tolist()[1] == MISS
    wide = {"shift": large.astype(mx.float32), "scale": large.astype(mx.float32)}
    case = replace(case, **wide, anchor=case.anchor.astype(mx.float32))
    assert case.run(gate)[2].tolist()[1] != MISS


@DTYPES
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_one_non_finite_element_anywhere_misses(value: float, dtype: mx.Dtype) -> None:
    # First and last row; the first vector, borders of vectors, and the part of one that ends the row.
    case = random_case((2, 3, 255), dtype)
    case = replace(case, scale=mx.repeat(case.scale, 3, axis=1), shift=mx.repeat(case.shift, 3, axis=1))
    rows = np.array(case.shift.astype(mx.float32)).reshape(6, 255)
    for row in (0, 5):
        for column in (0, 15, 16, 239, 240, 254):
            changed = rows.copy()
            changed[row, column] = value
            shift = mx.array(changed.reshape(2, 3, 255)).astype(dtype)
            modulated, _, state = replace(case, shift=shift).run()
            assert state.tolist()[1] == MISS
            wrong = np.argwhere(~np.isfinite(to_numpy(modulated).reshape(6, 255)))
            assert wrong.tolist() == [[row, column]]


@GATES
@pytest.mark.parametrize("garbage", [NAN, INF, 0.0])
@pytest.mark.parametrize("force", [GATED, LEADING, TRAILING])
def test_anchor_and_residual_do_not_count_before_they_exist(
    gate: Callable[..., Any], garbage: float, force: int
) -> None:
    case = replace(random_case((1, 7, 64)), state=mx.zeros(8), force=force)
    unwritten = replace(case, anchor=mx.full(case.x.shape, garbage), residuals=[[mx.full(case.x.shape, garbage)]])
    modulated, _, state = case.run(gate)
    got_modulated, _, got_state = unwritten.run(gate)
    assert digest(got_modulated) == digest(modulated)
    assert got_state.tolist() == pytest.approx(state.tolist(), nan_ok=True)


# ---- Values over dtypes and shapes


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    case = random_case(shape, dtype)
    modulated, reused, state = case.run()
    expected_modulated, expected_reused, expected_state = case.run(reference.gate)
    assert_modulated_close(modulated, expected_modulated, case)
    assert_modulated_close(modulated, modulate_float64(case), case)
    assert_reused_close(reused, case)
    assert_reused_close(expected_reused, case)
    got, expected = np.array(state), np.array(expected_state)
    if case.x.size == 0:
        # The mean of nothing is NaN: nothing was measured, so nothing is skipped.
        assert got.tolist() == pytest.approx([0, MISS, NAN, NAN, 0, 0, 1, 0], nan_ok=True)
        assert expected.tolist() == pytest.approx(got.tolist(), nan_ok=True)
        return
    assert_state_matches_numpy(state, modulated, case)
    assert got[[0, 1, 5, 6, 7]].tolist() == expected[[0, 1, 5, 6, 7]].tolist()
    # A percent of neighbours, at most, moves the means by a percent of epsilon, over a distance of about 0.1.
    assert got[[2, 3, 4]] == pytest.approx(expected[[2, 3, 4]], rel=max(1e-5, 0.1 * EPSILON[dtype]), abs=1e-6)


MIXED_DTYPES = [
    (mx.bfloat16, mx.float32, mx.float32),  # a timestep embedding kept in float32
    (mx.float16, mx.float32, mx.float32),
    (mx.float32, mx.bfloat16, mx.float32),  # 1 + scale is rounded to bfloat16 even so
    (mx.float32, mx.float16, mx.float32),
    (mx.bfloat16, mx.float16, mx.float32),  # no 16-bit type holds both
    (mx.float16, mx.bfloat16, mx.float32),
]


@pytest.mark.parametrize(("x", "modulation", "out"), MIXED_DTYPES, ids=lambda t: str(t).split(".")[-1])
def test_mixed_dtypes_promote_as_in_mlx(x: mx.Dtype, modulation: mx.Dtype, out: mx.Dtype) -> None:
    case = random_case((2, 5, 255), x)
    case = replace(case, shift=case.shift.astype(modulation), scale=case.scale.astype(modulation))
    case = replace(case, anchor=modulate(case.x * 1.1 + 0.1, case.shift, case.scale))
    modulated, reused, state = case.run()
    assert modulated.dtype == out == modulate(case.x, case.shift, case.scale).dtype
    assert_modulated_close(modulated, modulate(case.x, case.shift, case.scale), case)
    assert_modulated_close(modulated, case.run(reference.gate)[0], case)
    assert_reused_close(reused, case)
    assert_state_matches_numpy(state, modulated, case)


@DTYPES
@pytest.mark.parametrize(
    ("shift_shape", "scale_shape"),
    [((2, 64), (2, 64)), ((2, 1, 64), (2, 1, 64)), ((2, 5, 64), (2, 5, 64)), ((2, 64), (2, 1, 64))],
    ids=["BD", "B1D", "BSD", "BD with B1D"],
)
def test_ranks_of_shift_and_scale(shift_shape: tuple[int, ...], scale_shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(5)
    case = random_case((2, 5, 64), dtype)
    case = replace(
        case,
        shift=mx.array(rng.standard_normal(shift_shape, np.float32)).astype(dtype),
        scale=mx.array(rng.standard_normal(scale_shape, np.float32)).astype(dtype),
    )
    modulated, _, state = case.run()
    assert_modulated_close(modulated, case.run(reference.gate)[0], case)
    assert_modulated_close(modulated, modulate_float64(case), case)
    assert_state_matches_numpy(state, modulated, case)


def test_one_row_is_shared_over_the_sequence() -> None:
    """[B, D], [B, 1, D] and its repetition over S are the same modulation, to the bit."""
    case = random_case((2, 5, 255), mx.bfloat16)
    rows = case.run()
    assert_same_bits(replace(case, shift=case.shift[:, 0], scale=case.scale[:, 0]).run(), rows)
    full = {name: mx.repeat(getattr(case, name), 5, axis=1) for name in ("shift", "scale")}
    assert_same_bits(replace(case, **full).run(), rows)


@DTYPES
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_branches_and_terms(branches: int, terms: int, dtype: mx.Dtype) -> None:
    case = random_case((2, 3, 255), dtype, branches=branches, terms=terms)
    assert_reused_close(case.run()[1], case)
    wide = random_case((2, 3, 255), dtype, branches=branches, terms=terms, residual_dtype=mx.float32)
    assert_reused_close(wide.run()[1], wide)


@DTYPES
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_without_a_branch_it_only_decides(is_compiled: bool, dtype: mx.Dtype) -> None:
    case = random_case((2, 5, 255), dtype)
    nothing = replace(case, residuals=[], weights=mx.zeros((0, 0)))
    modulated, reused, state = call(compiled(nothing), nothing) if is_compiled else nothing.run()
    assert reused == []
    expected = case.run()
    assert (digest(modulated), digest(state)) == (digest(expected[0]), digest(expected[2]))
    by_reference = nothing.run(ops.reference.gate)
    assert by_reference[1] == []
    assert state.tolist() == pytest.approx(by_reference[2].tolist(), rel=1e-5)


def test_float16_residual_beside_bfloat16_is_float32() -> None:
    case = random_case((1, 3, 64), mx.bfloat16, residual_dtype=mx.float16)
    reused = case.run()[1]
    assert reused[0].dtype == mx.float32
    assert_reused_close(reused, case)


@DTYPES
@pytest.mark.parametrize("residual_dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
def test_one_term_of_weight_one_is_mlx_addition(dtype: mx.Dtype, residual_dtype: mx.Dtype) -> None:
    # Both round the float32 sum once, so nothing may differ: this is the reuse of TeaCache itself.
    case = random_case((2, 3, 255), dtype, residual_dtype=residual_dtype)
    case = replace(case, weights=mx.ones((1, 1)))
    expected = case.x + case.residuals[0][0]
    got = case.run()[1][0]
    assert got.dtype == expected.dtype
    assert digest(got) == digest(expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_every_16_bit_number_is_read_and_rounded_as_in_mlx(dtype: mx.Dtype) -> None:
    # All 65,536 patterns beside a permutation of them: subnormal numbers, infinities, overflow, ties.
    patterns = np.arange(2**16, dtype=np.uint16).reshape(1, 256, 256)
    shuffled = np.random.default_rng(4).permutation(patterns.reshape(-1)).reshape(patterns.shape)
    x = mx.array(patterns).view(dtype)
    for other in (shuffled, np.zeros_like(patterns)):
        residual = mx.array(other).view(dtype)
        case = replace(random_case((1, 256, 256), dtype), x=x, residuals=[[residual]], weights=mx.ones((1, 1)))
        np.testing.assert_array_equal(to_numpy(case.run()[1][0]), to_numpy(x + residual))


def test_nan_weight_gives_nan() -> None:
    # A NaN whose payload is all ones: rounding it to 16 bits by adding half a unit would carry into the sign.
    weights = mx.array(np.array([[0x7FFFFFFF]], np.uint32).view(np.float32))
    for dtype in EPSILON:
        case = replace(random_case((1, 3, 64), dtype), weights=weights)
        assert np.all(np.isnan(to_numpy(case.run()[1][0])))


def test_branches_do_not_mix() -> None:
    case = random_case((1, 7, 64), branches=2, terms=2)
    both = case.run()[1]
    for branch in range(2):
        alone = replace(case, residuals=[case.residuals[branch]], weights=case.weights[branch][None])
        assert digest(alone.run()[1][0]) == digest(both[branch])


# ---- x is the modulated input


@GATES
def test_given_the_modulated_input_by_hand(gate: Callable[..., Any]) -> None:
    # |difference| = 0.25 and 0.25, mean|anchor| = 1.25: as the hand case, which modulates x to this one.
    x = mx.array([[[-1.25, 1.75, -1.25, 1.75]]], mx.bfloat16)
    case = replace(hand_case(), x=x, shift=None, scale=None, residuals=[], weights=mx.zeros((0, 0)))
    modulated, reused, state = case.run(gate)
    assert modulated.tolist() == x.tolist()
    assert reused == []
    assert state.tolist() == pytest.approx([1, SKIPPED, 0.2, 0.5, 0.75, 3, 1, 1], rel=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_the_modulated_input_it_decides_alike(shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    """The same elements in the same order: the same state to the bit, and no second copy of the signal."""
    case = random_case(shape, dtype)
    signal = given(case)
    modulated, _, state = signal.run()
    assert digest(state) == digest(case.run()[2])
    assert digest(modulated) == digest(signal.x)
    expected = signal.run(reference.gate)[2]
    assert state.tolist() == pytest.approx(expected.tolist(), rel=1e-5, nan_ok=True)


@DTYPES
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_given_an_element_that_is_not_finite_it_misses(value: float, dtype: mx.Dtype) -> None:
    for column in (0, 31, 32, 254):
        signal = given(random_case((2, 3, 255), dtype))
        rows = np.array(signal.x.astype(mx.float32))
        rows[1, 2, column] = value
        assert replace(signal, x=mx.array(rows).astype(dtype)).run()[2].tolist()[1] == MISS


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_given_signals_step_by_step(dtype: mx.Dtype) -> None:
    """The last step's signal is the anchor, eager, lazy and compiled, and stays as it is."""
    case = given(random_case((1, 7, 255), dtype))
    noise = (0.1 * mx.random.normal((4, *case.x.shape), key=mx.random.key(1))).astype(dtype)

    def step(x: Any, anchor: Any, state: Any) -> Any:
        x, _, state = ops.gate(**case.arrays | {"x": x, "anchor": anchor, "state": state}, **case.options)
        return x, state

    def chain(step: Callable[..., Any], evaluate: bool) -> list[Any]:
        x, anchor, state = case.x, case.anchor, case.state
        kept = []
        for n in noise:
            x = x + n
            anchor, state = step(x, anchor, state)
            kept += [anchor, state]
            if evaluate:
                mx.eval(kept)
        mx.eval(kept)
        return kept

    lazy = chain(step, evaluate=False)
    assert digest(*chain(step, evaluate=True)) == digest(*lazy)
    assert digest(*chain(mx.compile(step), evaluate=False)) == digest(*lazy)
    x = case.x
    for n, anchor in zip(noise, lazy[::2], strict=True):
        x = x + n
        assert digest(anchor) == digest(x)


def test_given_a_view_is_packed_once() -> None:
    case = given(random_case((2, 5, 64)))
    for view in (strided, batch_inside, offset, every_second):
        assert_same_bits(replace(case, x=view(case.x), anchor=view(case.anchor)).run(), case.run())


def test_a_signal_and_an_input_that_is_its_own_modulation_are_not_merged() -> None:
    signal = given(random_case((1, 7, 64)))

    def step(x: Any, anchor: Any) -> Any:
        states = []
        for modulation in (None, x):
            changed = {"x": x, "shift": modulation, "scale": modulation, "anchor": anchor}
            states.append(-ops.gate(**signal.arrays | changed, **signal.options)[2])
        return states

    got, other = mx.compile(step)(signal.x, signal.anchor)
    assert digest(-got) == digest(signal.run()[2]) != digest(-other)


# ---- Statistics and rounding


def test_variance_is_two_pass_in_bfloat16() -> None:
    """A mean of 60 beside a deviation of 0.5: the float32 E[x^2] - E[x]^2 is off by enough to move elements."""
    case = random_case((1, 16, 3072), mx.bfloat16, mean=60.0, deviation=0.5)
    modulated, _, _ = case.run()
    expected = modulate_float64(case)
    assert_modulated_close(modulated, expected, case)
    assert np.count_nonzero(to_numpy(modulated) != to_numpy(expected)) <= 0.001 * modulated.size


def test_variance_is_two_pass_in_float32() -> None:
    """A mean of 10,000 beside a deviation of 1: E[x^2] = 10^8 has units of 8 in float32, so the difference is noise."""
    case = random_case((1, 4, 3072), mx.float32, mean=10_000.0)
    x = np.array(case.x)
    one_pass = (x * x).mean(-1, dtype=np.float32) - x.mean(-1, dtype=np.float32) ** 2
    assert np.all(np.abs(one_pass - 1) > 0.2)
    modulated, _, _ = case.run()
    expected = to_numpy(modulate_float64(case))
    # The mean is off by 2^-23 sqrt(3072 / 8) 10,000 = 0.023 (see assert_modulated_close), and |1 + scale| < 3.
    assert np.max(np.abs(to_numpy(modulated) - expected)) < 0.07


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_modulated_is_mflux_bit_for_bit_where_statistics_are_exact(dtype: mx.Dtype) -> None:
    # Small integers whose row sums are multiples of 64: mean and variance are exact in any order of summation, so
    # only the roundings of the contract remain.
    rng = np.random.default_rng(11)
    x = rng.integers(-8, 9, (2, 40, 64)).astype(np.float32)
    x[..., 0] -= np.remainder(x.sum(-1), 64)
    case = random_case((2, 40, 64), dtype)
    case = replace(case, x=mx.array(x).astype(dtype))
    expected = modulate(case.x, case.shift, case.scale)
    got = case.run()[0]
    assert got.dtype == expected.dtype
    assert digest(got) == digest(expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 64, 3072), (2, 33, 255)], ids=str)
def test_modulated_is_mflux_but_for_rare_neighbours(shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    case = random_case(shape, dtype, seed=3)
    expected = modulate(case.x, case.shift, case.scale)
    got = case.run()[0]
    assert_modulated_close(got, expected, case)
    # Float32 statistics of 3072 numbers differ by about 2^-22, against 2^-11 (float16): one element in 2,000.
    assert np.count_nonzero(to_numpy(got) != to_numpy(expected)) <= 2 + 0.002 * got.size


def test_epsilon_is_used() -> None:
    case = random_case((1, 3, 64))
    large = replace(case, eps=3.0)
    assert_modulated_close(large.run()[0], modulate_float64(large), large)
    assert digest(large.run()[0]) != digest(case.run()[0])


def test_difference_is_rounded_to_the_dtype() -> None:
    # 256 - 1.5 = 254.5 is not a bfloat16 number (its unit there is 1) and rounds to 254; the anchor's mean is 1.5.
    case = replace(
        hand_case(),
        scale=mx.full((1, 4), -1.0, mx.bfloat16),
        shift=mx.full((1, 4), 256.0, mx.bfloat16),
        anchor=mx.full((1, 1, 4), 1.5, mx.bfloat16),
        coefficients=LINEAR,
    )
    assert case.run()[2].tolist()[2] == pytest.approx(254 / 1.5, rel=1e-7)
    assert case.run(reference.gate)[2].tolist()[2] == pytest.approx(254 / 1.5, rel=1e-6)


def test_sums_are_float32_or_better() -> None:
    # A bfloat16 sum of ones stops at 256, a float16 sum at 2048; here 393,216 of them have to count.
    shape = (1, 128, 3072)
    ones = mx.ones(shape, mx.bfloat16)
    case = Case(
        x=ones,
        shift=mx.full((1, 3072), 1.25, mx.bfloat16),
        scale=mx.zeros((1, 3072), mx.bfloat16),
        anchor=ones,
        residuals=[[ones]],
        weights=mx.ones((1, 1)),
        state=make_state(),
    )
    assert case.run()[2].tolist()[2] == 0.25


# ---- Layouts


def packed(case: Case) -> Case:
    """The same numbers in arrays of their own."""

    def copy(a: mx.array) -> mx.array:
        return mx.array(np.array(a.astype(mx.float32))).astype(a.dtype)

    return replace(
        case,
        residuals=[[copy(term) for term in branch] for branch in case.residuals],
        **{name: copy(getattr(case, name)) for name in ("x", "shift", "scale", "anchor", "weights", "state")},
    )


def strided(a: mx.array) -> mx.array:
    """A view whose last axis is not the fastest."""
    out = mx.contiguous(mx.swapaxes(a, -1, -2))
    mx.eval(out)
    return mx.swapaxes(out, -1, -2)


def batch_inside(a: mx.array) -> mx.array:
    """A view whose rows are packed, but in the order [S, B, D]."""
    out = mx.contiguous(mx.swapaxes(a, 0, 1))
    mx.eval(out)
    return mx.swapaxes(out, 0, 1)


def offset(a: mx.array) -> mx.array:
    """A slice out of a larger array of NaN: every neighbour in memory is NaN."""
    parent = np.full([n + 5 for n in a.shape], np.nan, np.float32)
    inside = tuple(slice(2, 2 + n) for n in a.shape)
    parent[inside] = np.array(a.astype(mx.float32))
    whole = mx.array(parent).astype(a.dtype)
    mx.eval(whole)
    return whole[inside]


def every_second(a: mx.array) -> mx.array:
    """A slice with a step along the last axis, NaN between."""
    parent = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, np.float32)
    parent[..., ::2] = np.array(a.astype(mx.float32))
    whole = mx.array(parent).astype(a.dtype)
    mx.eval(whole)
    return whole[..., ::2]


@DTYPES
@pytest.mark.parametrize("view", [strided, batch_inside, offset, every_second])
@pytest.mark.parametrize("which", ["x", "shift", "scale", "anchor", "residuals", "weights", "all"])
def test_views(which: str, view: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> None:
    case = random_case((2, 5, 255), dtype, branches=2, terms=2)
    changes: dict[str, Any] = {}
    for name in ("x", "shift", "scale", "anchor", "weights"):
        if which in (name, "all"):
            changes[name] = view(getattr(case, name))
    if which in ("residuals", "all"):
        changes["residuals"] = [[view(term) for term in branch] for branch in case.residuals]
    if which == "all" and view in (offset, every_second):
        changes["state"] = view(case.state)
    assert_same_bits(replace(case, **changes).run(), case.run())


@DTYPES
def test_broadcast_views(dtype: mx.Dtype) -> None:
    shape = (2, 5, 64)
    case = random_case(shape, dtype)
    row = case.x[:1, :1]
    case = replace(
        case,
        x=mx.broadcast_to(row, shape),
        shift=mx.broadcast_to(case.shift, shape),
        scale=mx.broadcast_to(mx.array(0.5, dtype), shape),
        anchor=mx.broadcast_to(case.anchor[:, :1], shape),
        residuals=[[mx.broadcast_to(mx.array(2.0, dtype), shape)]],
        weights=mx.broadcast_to(mx.array(0.5), (1, 1)),
        state=mx.broadcast_to(mx.array(1.0), (8,)),
    )
    assert_same_bits(case.run(), packed(case).run())


def test_shift_and_scale_as_parts_of_one_projection() -> None:
    # mflux splits one [B, 1, 6 D] array: each part starts inside it, and its batch stride is 6 D.
    case = random_case((2, 5, 64), mx.bfloat16)
    projection = mx.random.normal((2, 1, 6 * 64), key=mx.random.key(2)).astype(mx.bfloat16)
    shift, scale, *_ = mx.split(projection, 6, axis=-1)
    case = replace(case, shift=shift, scale=scale)
    assert_same_bits(case.run(), packed(case).run())


def test_one_array_in_every_place() -> None:
    x = mx.random.normal((1, 7, 64), key=mx.random.key(3))
    case = replace(
        random_case((1, 7, 64)), x=x, shift=x, scale=x, anchor=x, residuals=[[x, x]], weights=mx.ones((1, 2))
    )
    assert_same_bits(case.run(), packed(case).run())


@DTYPES
def test_inputs_are_left_as_they_are(dtype: mx.Dtype) -> None:
    case = random_case((2, 5, 255), dtype, branches=2, terms=2)
    inputs = [case.x, case.shift, case.scale, case.anchor, *case.residuals[0], *case.residuals[1], case.weights]
    mx.eval(inputs, case.state)
    before = digest(*inputs, case.state)
    case.run()
    assert digest(*inputs, case.state) == before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_lazy_chain_is_the_same_as_step_by_step(dtype: mx.Dtype) -> None:
    """Steps left lazy hand temporaries over, whose memory the op may take for its outputs."""
    case = random_case((1, 7, 255), dtype)
    noise = mx.random.normal((6, *case.x.shape), key=mx.random.key(1)).astype(dtype)
    mx.eval(noise)

    def steps(evaluate: bool) -> list[Any]:
        x, anchor, residual, state = case.x, case.anchor, case.residuals[0][0], case.state
        kept = []
        for step in range(6):
            x = x + 0.1 * noise[step]
            changed = {"x": x, "anchor": anchor, "residuals": [[residual]], "weights": mx.ones((1, 1)), "state": state}
            anchor, (x,), state = ops.gate(**case.arrays | changed, **case.options)
            residual = 0.5 * residual
            kept.append(state)
            if evaluate:
                mx.eval(x, anchor, state, residual)
        mx.eval(x, anchor, kept)
        return [x, anchor, *kept]

    assert digest(*steps(evaluate=False)) == digest(*steps(evaluate=True))


def test_outputs_may_be_asked_for_alone() -> None:
    case = random_case((1, 7, 64))
    modulated, reused, state = case.run()
    for index, expected in enumerate([modulated, reused[0], state]):
        outputs = ops.gate(**case.arrays, **case.options)
        alone = [outputs[0], outputs[1][0], outputs[2]][index]
        assert digest(alone) == digest(expected)


# ---- Determinism

# Enough elements for more threads than one, in rows that no number of them divides. Prints each digest it has seen.
TWENTY_RUNS = """
import mlx.core
mlx.core.set_default_device(mlx.core.cpu)
import hashlib
import mlx.core as mx
from mlx_teacache_fast import ops

x, anchor, residual = mx.random.normal((3, 1, 611, 1025), key=mx.random.key(0)).astype(mx.bfloat16)
shift, scale = mx.random.normal((2, 1, 1025), key=mx.random.key(1)).astype(mx.bfloat16)
state = mx.array([0, 0, 0, 0, 0, 0, 1, 1], mx.float32)
seen = set()
for _ in range(20):
    modulated, (reused,), new_state = ops.gate(
        x, shift, scale, anchor, residuals=[[residual]], weights=mx.ones((1, 1)), state=state,
        force=mx.array(0, mx.int32), coefficients=(0, 0, 0, 1, 0), threshold=0.5,
    )
    outputs = b"".join(bytes(a.view(mx.uint8)) for a in (modulated, reused, new_state))
    seen.add(hashlib.sha256(outputs).hexdigest())
print(*seen)
"""


def test_same_bits_every_run_and_for_any_number_of_threads() -> None:
    digests = set()
    for threads in ("1", "2", "3", "7", None):
        environment = {name: v for name, v in os.environ.items() if name != "MLX_TEACACHE_FAST_NUM_THREADS"}
        if threads is not None:
            environment["MLX_TEACACHE_FAST_NUM_THREADS"] = threads
        done = subprocess.run([sys.executable, "-c", TWENTY_RUNS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.update(done.stdout.split())
    assert len(digests) == 1


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "2x", "", "99999999999"])
def test_a_number_of_threads_that_is_none(threads: str) -> None:
    program = "from mlx_teacache_fast import ops\nfrom test_gate import small_case\n"
    program += "import mlx.core as mx\nmx.set_default_device(mx.cpu)\ncase = small_case()\n"
    program += "for _ in range(2):\n try: ops.gate(**case.arrays, **case.options)\n except ValueError as e: print(e)"
    environment = os.environ | {"MLX_TEACACHE_FAST_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    message = f"[gate] MLX_TEACACHE_FAST_NUM_THREADS must be a whole number of at least 1, got {threads}\n"
    assert (done.stdout, done.stderr) == (2 * message, "")


# The rows' sums and 1 + scale, 64 MB for each thread, do not fit beside the outputs.
WITHOUT_MEMORY = """
import resource, mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_teacache_fast import ops
x, row = mx.zeros((1, 4, 1 << 24), mx.bfloat16), mx.zeros((1, 1 << 24), mx.bfloat16)
rest = dict(residuals=[], weights=mx.zeros((0, 0)), state=mx.zeros(8), force=mx.array(0), coefficients=[0] * 5)
mx.eval(x, row, rest["weights"], rest["state"], rest["force"])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 160_000_000, -1))
try:
    mx.eval(ops.gate(x, row, row, x, **rest, threshold=1.0)[2])
except MemoryError:
    print("no memory")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's address space")
def test_no_memory_for_the_threads_is_an_error() -> None:
    environment = os.environ | {"MLX_TEACACHE_FAST_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no memory\n"), done.stderr


AFTER_A_FAILURE = """
import mlx.core as mx
from mlx_teacache_fast import ops
mx.set_default_device(mx.cpu)
x = mx.linalg.inv(mx.zeros((1, 2, 2)), stream=mx.cpu)
modulated, (reused,), state = ops.gate(
    x, mx.zeros((1, 2)), mx.zeros((1, 2)), mx.zeros((1, 2, 2)), residuals=[[mx.zeros((1, 2, 2))]],
    weights=mx.ones((1, 1)), state=mx.zeros(8), force=mx.array(0, mx.int32), coefficients=(0, 0, 0, 1, 0),
    threshold=0.5,
)
for output in (modulated, reused, state):
    try:
        mx.eval(output)
        print("evaluated")
    except RuntimeError as error:
        print(type(error).__name__)
print(mx.sum(mx.ones(3)).item())
"""


def test_outputs_of_a_failed_evaluation() -> None:
    """The gate gives up its inputs when it is evaluated; another of its outputs afterwards must not touch freed memory.

    Whether the failure upstream is met before the gate or in it depends on the stream's thread, so only the end counts.
    """
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == "RuntimeError"
        assert done.stdout.splitlines()[-1] == "3.0"


# ---- Inside mx.compile


def compiled(case: Case, **kwargs: Any) -> Callable[..., Any]:
    branches, terms = len(case.residuals), len(case.residuals[0]) if case.residuals else 0

    def step(x: Any, shift: Any, scale: Any, anchor: Any, weights: Any, state: Any, force: Any, *flat: Any) -> Any:
        residuals = [list(flat[b * terms : (b + 1) * terms]) for b in range(branches)]
        rest = {"residuals": residuals, "weights": weights, "state": state, "force": force}
        modulated, reused, state = ops.gate(x, shift, scale, anchor, **rest, **case.options)
        return [modulated, *reused, state]

    return mx.compile(step, **kwargs)


def call(step: Callable[..., Any], case: Case) -> tuple[mx.array, list[mx.array], mx.array]:
    x, shift, scale, anchor, residuals, weights, state, force = case.arrays.values()
    flat = [term for branch in residuals for term in branch]
    modulated, *reused, state = step(x, shift, scale, anchor, weights, state, force, *flat)
    mx.eval(modulated, reused, state)
    return modulated, reused, state


@DTYPES
@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled_is_the_same_as_eager(shapeless: bool, dtype: mx.Dtype) -> None:
    case = random_case((2, 5, 255), dtype, branches=2, terms=2)
    step = compiled(case, shapeless=shapeless)
    for force in (GATED, LEADING, TRAILING):
        forced = replace(case, force=force)
        assert_same_bits(call(step, forced), forced.run())
    for shape in ((2, 9, 255), (1, 4, 64)):  # A second resolution, then another width.
        other = random_case(shape, dtype, branches=2, terms=2, seed=1)
        assert_same_bits(call(step, other), other.run())


def test_compiled_shapeless_with_rank_2_modulation() -> None:
    case = random_case((2, 5, 64))
    case = replace(case, shift=case.shift[:, 0], scale=case.scale[:, 0])
    step = compiled(case, shapeless=True)
    assert_same_bits(call(step, case), case.run())
    longer = random_case((2, 11, 64), seed=1)
    longer = replace(longer, shift=longer.shift[:, 0], scale=longer.scale[:, 0])
    assert_same_bits(call(step, longer), longer.run())


def test_reference_compiles() -> None:
    case = random_case((2, 5, 255))
    step = mx.compile(lambda arrays: reference.gate(**arrays, **case.options), shapeless=True)
    eager, fused = case.run(reference.gate), step(case.arrays)
    assert np.allclose(np.array(fused[0]), np.array(eager[0]), atol=1e-5)
    assert fused[2].tolist() == pytest.approx(eager[2].tolist(), rel=1e-5)


# With these every parameter shows in the outputs: rel_l1 is about 0.08, inside the range.
SENSITIVE: dict[str, Any] = {
    "coefficients": (1.0, 1.0, 1.0, 1.0, 0.01),
    "threshold": 0.9,
    "calibrated_range": (0.05, 0.4),
    "max_consecutive_skips": 8,
    "eps": 1e-6,
}
FLIPS: dict[str, dict[str, Any]] = {
    "c4": {"coefficients": (2.0, 1.0, 1.0, 1.0, 0.01)},
    "c3": {"coefficients": (1.0, 2.0, 1.0, 1.0, 0.01)},
    "c2": {"coefficients": (1.0, 1.0, 2.0, 1.0, 0.01)},
    "c1": {"coefficients": (1.0, 1.0, 1.0, 2.0, 0.01)},
    "c0": {"coefficients": (1.0, 1.0, 1.0, 1.0, 0.02)},
    "threshold": {"threshold": 0.3},
    "threshold off": {"threshold": 0.0},
    "range start": {"calibrated_range": (0.3, 0.4)},
    "range end": {"calibrated_range": (0.05, 0.06)},
    "max_consecutive_skips": {"max_consecutive_skips": 1},
    "eps": {"eps": 1e-2},
    "no range": {"calibrated_range": None},
}
# A range of zeros, which a gate without a range holds too.
FIRST = {"no range": {"calibrated_range": (0.0, 0.0)}}


def nodes_of_gates(outputs: list[mx.array]) -> int:
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return text.getvalue().count("TeaCacheGate")


@pytest.mark.parametrize("name", FLIPS)
def test_gates_that_differ_are_not_merged(name: str) -> None:
    """mx.compile merges equal nodes: is_equivalent has to look at every parameter, and to see equal ones as equal."""
    first = replace(random_case((1, 7, 64)), **(SENSITIVE | FIRST.get(name, {})))
    second = replace(first, **FLIPS[name])

    def step(x: Any, shift: Any, scale: Any, anchor: Any, residual: Any, weights: Any, state: Any, force: Any) -> Any:
        results = []
        for case in (first, second, first):
            rest = {"residuals": [[residual]], "weights": weights, "state": state, "force": force}
            m, (r,), s = ops.gate(x, shift, scale, anchor, **rest, **case.options)
            results += [-m, -r, -s]  # Only nodes whose outputs are used inside are merged.
        return results

    x, shift, scale, anchor, residuals, weights, state, force = first.arrays.values()
    got = mx.compile(step)(x, shift, scale, anchor, residuals[0][0], weights, state, force)
    assert nodes_of_gates(got) == 2
    results = [-a for a in got]
    mx.eval(results)
    expected_first, expected_second = first.run(), second.run()
    assert digest(*results[0:3]) != digest(*results[3:6]), "the parameter does not show: the test proves nothing"
    for i, expected in enumerate([expected_first, expected_second, expected_first]):
        modulated, reused, new_state = results[3 * i : 3 * i + 3]
        assert digest(modulated, reused) == digest(expected[0], *expected[1])
        np.testing.assert_array_equal(np.array(new_state), np.array(expected[2]))  # NaN may have changed its sign


# ---- What it refuses


def test_all_after_the_anchor_is_by_name() -> None:
    case = small_case()
    for gate in (ops.gate, reference.gate):
        with pytest.raises(TypeError):
            gate(*case.arrays.values(), **case.options)
        x, shift, scale, anchor, *_ = case.arrays.values()
        rest = {name: value for name, value in case.arrays.items() if name not in ("x", "shift", "scale", "anchor")}
        assert_same_bits(gate(x, shift, scale, anchor, **rest, **case.options), case.run(gate))


def small_case(**changes: Any) -> Case:
    return replace(random_case((2, 5, 64), branches=2, terms=2), **changes)


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


ONE = zeros(2, 5, 64)
ONLY_DECIDES: dict[str, Any] = {"residuals": [], "weights": zeros(0, 0), "state": make_state(), "force": mx.array(0)}
ONLY_DECIDES |= {"coefficients": LINEAR, "threshold": 1.0}
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": zeros(5, 64)}, "x must have shape (batch, tokens, channels), got (5,64)"),
    ({"x": zeros(2, 5, 64, dtype=mx.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"x": zeros(2, 5, 64, dtype=mx.complex64)}, "x must be float32, float16 or bfloat16, got complex64"),
    ({"shift": zeros(2, 64, dtype=mx.int32)}, "shift must be float32, float16 or bfloat16, got int32"),
    ({"shift": zeros(2, 63)}, "shift must have shape (2,64), (2,1,64) or (2,5,64), got (2,63)"),
    ({"shift": zeros(64)}, "shift must have shape (2,64), (2,1,64) or (2,5,64), got (64)"),
    ({"scale": zeros(2, 5, 64, dtype=mx.bool_)}, "scale must be float32, float16 or bfloat16, got bool"),
    ({"scale": zeros(2, 4, 64)}, "scale must have shape (2,64), (2,1,64) or (2,5,64), got (2,4,64)"),
    ({"scale": zeros(3, 1, 64)}, "scale must have shape (2,64), (2,1,64) or (2,5,64), got (3,1,64)"),
    (
        {"scale": zeros(2, 5, 64)},
        "shift and scale must have one shape and dtype, got float32 (2,1,64) and float32 (2,5,64)",
    ),
    (
        {"scale": zeros(2, 1, 64, dtype=mx.float16)},
        "shift and scale must have one shape and dtype, got float32 (2,1,64) and float16 (2,1,64)",
    ),
    ({"shift": None}, "shift and scale must be two arrays or both None, got None for shift"),
    ({"scale": None}, "shift and scale must be two arrays or both None, got None for scale"),
    (
        {"shift": None, "scale": None},
        "residuals must be empty where x is the modulated input (shift and scale None), got 2 branches",
    ),
    ({"anchor": zeros(1, 5, 64)}, "anchor must have x's shape (2,5,64), got (1,5,64)"),
    (
        {"anchor": zeros(2, 5, 64, dtype=mx.bfloat16)},
        "anchor must have the modulated input's dtype float32, got bfloat16",
    ),
    ({"residuals": []}, "weights must be float32 of shape (0,0), got float32 (2,2)"),
    ({"residuals": [[ONE]] * 3}, "residuals must be a list of at most 2 branches, got 3"),
    ({"residuals": [[], []]}, "a branch must have 1 to 4 residual terms, got 0"),
    ({"residuals": [[ONE] * 5] * 2}, "a branch must have 1 to 4 residual terms, got 5"),
    (
        {"residuals": [[ONE, ONE], [ONE]]},
        "every branch must have as many residual terms as the first, 2, got 1",
    ),
    (
        {"residuals": [[ONE, ONE], [ONE, zeros(2, 5, 32)]]},
        "residuals[1][1] must have x's shape (2,5,64), got (2,5,32)",
    ),
    (
        {"residuals": [[ONE, ONE.astype(mx.float16)], [ONE, ONE]]},
        "residuals[0][1] must have the first residual's dtype float32, got float16",
    ),
    (
        {"residuals": [[ONE.astype(mx.int8)] * 2] * 2},
        "residuals[0][0] must be float32, float16 or bfloat16, got int8",
    ),
    ({"weights": zeros(1, 2)}, "weights must be float32 of shape (2,2), got float32 (1,2)"),
    ({"weights": zeros(2, 2, dtype=mx.float16)}, "weights must be float32 of shape (2,2), got float16 (2,2)"),
    ({"state": zeros(7)}, "state must be float32 of shape (8), got float32 (7)"),
    ({"state": zeros(8, dtype=mx.int32)}, "state must be float32 of shape (8), got int32 (8)"),
    ({"coefficients": (1, 2, 3)}, "coefficients must be 5 numbers, c4 first, got 3"),
    ({"coefficients": (1, 2, 3, 4, NAN)}, "coefficients must be finite, got nan at 4"),
    ({"threshold": NAN}, "threshold must be finite, got nan"),
    ({"threshold": INF}, "threshold must be finite, got inf"),
    ({"calibrated_range": (0.5, 0.25)}, "calibrated_range must be (lo, hi) with lo <= hi, got (0.5, 0.25)"),
    ({"calibrated_range": (NAN, 0.25)}, "calibrated_range must be (lo, hi) with lo <= hi, got (nan, 0.25)"),
    ({"max_consecutive_skips": -1}, "max_consecutive_skips must not be negative, got -1"),
    ({"eps": -1.0}, "eps must be finite and not negative, got -1"),
    ({"eps": NAN}, "eps must be finite and not negative, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_value_errors(changes: dict[str, Any], message: str) -> None:
    case = small_case(**changes)
    with pytest.raises(ValueError, match=r"^\[gate\]") as raised:
        ops.gate(**case.arrays, **case.options)  # At the call: nothing is evaluated.
    assert str(raised.value) == f"[gate] {message}"


@pytest.mark.parametrize(
    ("force", "got"),
    [
        (mx.array([0]), "int32 (1)"),
        (mx.array(True), "bool ()"),
        (mx.array(0.0), "float32 ()"),
        (mx.array(0, mx.int64), "int64 ()"),
    ],
    ids=["int32 of rank 1", "bool", "float32", "int64"],
)
def test_force_must_be_an_int32_scalar(force: mx.array, got: str) -> None:
    case = small_case()
    with pytest.raises(ValueError, match=r"^\[gate\]") as raised:
        ops.gate(**case.arrays | {"force": force}, **case.options)
    assert str(raised.value) == f"[gate] force must be an int32 scalar, got {got}"


def test_more_rows_than_an_int_counts() -> None:
    def gate(*shape: int) -> mx.array:
        x, row = mx.zeros(shape), mx.zeros((1, 1, shape[-1]))
        return ops.gate(x, row, row, x, **ONLY_DECIDES)[2]

    for shape in ((65536, 32768, 0), (65536, 65536, 0)):
        with pytest.raises(ValueError) as raised:
            gate(*shape)
        got = str(shape).replace(" ", "")
        assert str(raised.value) == f"[gate] x must have fewer than 2^31 rows (batch * tokens), got {got}"
    assert gate(65536, 32767, 0).tolist()[:2] == [0, MISS]


@pytest.mark.parametrize("missing", ["coefficients", "threshold"])
def test_rules_have_no_defaults(missing: str) -> None:
    case = small_case()
    options = {name: value for name, value in case.options.items() if name != missing}
    with pytest.raises(TypeError, match="incompatible function arguments"):
        ops.gate(**case.arrays, **options)


def test_is_not_differentiable() -> None:
    case = small_case()

    def total(x: mx.array) -> mx.array:
        return ops.gate(**case.arrays | {"x": x}, **case.options)[0].sum()

    message = r"^\[gate\] is not differentiable: gate and skip steps at inference only$"
    with pytest.raises(RuntimeError, match=message):
        mx.grad(total)(case.x)
    with pytest.raises(RuntimeError, match=message):
        mx.jvp(total, [case.x], [case.x])


def test_has_no_vmap() -> None:
    case = small_case()

    def modulated(x: mx.array) -> mx.array:
        return ops.gate(**case.arrays | {"x": x}, **case.options)[0]

    with pytest.raises(RuntimeError, match=r"^\[gate\] has no vmap: one decision holds for the whole batch"):
        mx.vmap(modulated)(mx.stack([case.x, case.x]))


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="MLX can use a GPU here")
def test_a_gpu_stream_without_a_gpu_is_one_error() -> None:
    case = small_case()
    assert not ops.gpu_supported()
    for gpu in (mx.gpu, mx.Device(mx.gpu)):
        with pytest.raises(RuntimeError) as error:
            ops.gate(**case.arrays, **case.options, stream=gpu)
        assert str(error.value) == (
            "[gate] MLX has no GPU here: run on the CPU, with mx.set_default_device(mx.cpu) or stream=mx.cpu "
            f'(an NVIDIA GPU needs its driver and pip install "mlx[cuda13]=={mx.__version__}")'
        )


def test_stream_of_its_own() -> None:
    case = small_case()
    modulated, reused, state = ops.gate(**case.arrays, **case.options, stream=mx.new_stream(mx.cpu))
    mx.eval(modulated, reused, state)
    assert_same_bits((modulated, reused, state), case.run())
