"""What holds for the gate's kernel on every GPU: the cases, and checks of a kernel that runs them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import (
    MISS,
    SHAPES,
    Case,
    assert_modulated_close,
    assert_reused_close,
    assert_state_matches_numpy,
    digest,
    given,
    modulate_float64,
    random_case,
    row_case,
    to_numpy,
)

from .gate_kernel import Result, result_types


class Kernel(Protocol):
    def run(self, case: Case, **options: Any) -> Result: ...


# ---- The cases. Each shape's reason beside it; those of SHAPES besides.

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}

LONG_ROWS = {
    (1, 2, 12288): "two packs in each thread",
    (1, 2, 40_000): "too long to be held: read in every pass",
}
MANY_ROWS = {
    (1, 130, 72): "several rows in a threadgroup, and fewer in the last",
    (3, 50, 64): "batches end inside a threadgroup's rows",
}


def mixed(x: mx.Dtype, modulation: mx.Dtype, residual: mx.Dtype) -> Case:
    case = random_case((2, 5, 72), x, residual_dtype=residual)
    shift, scale = case.shift.astype(modulation), case.scale.astype(modulation)
    return replace(case, shift=shift, scale=scale, anchor=case.anchor.astype(mx.result_type(case.x, shift)))


def of_each_token(case: Case) -> Case:
    b, n, d = case.x.shape
    shift, scale = (mx.random.normal((b, n, d), key=mx.random.key(i)).astype(case.x.dtype) for i in (1, 2))
    return replace(case, shift=shift, scale=0.3 * scale)


def of_no_batch(case: Case) -> Case:
    return replace(case, shift=case.shift[:1], scale=case.scale[:1])


Build = Callable[[], Case]
CASES: dict[str, tuple[Build, dict[str, Any]]] = {}
for _name, _t in DTYPES.items():
    for _shape in [*SHAPES, *LONG_ROWS, *MANY_ROWS]:
        CASES[f"{_name} {_shape}"] = (lambda s=_shape, t=_t: random_case(s, t), {})
        CASES[f"{_name} {_shape}, given modulated"] = (lambda s=_shape, t=_t: given(random_case(s, t)), {})
    for _d in (255, 256):
        CASES[f"{_name} modulation of each token, {_d}"] = (
            lambda d=_d, t=_t: of_each_token(random_case((2, 5, d), t)),
            {},
        )
    CASES[f"{_name} one modulation for all batches"] = (lambda t=_t: of_no_batch(random_case((3, 50, 64), t)), {})
    CASES[f"{_name} few threads: four packs each"] = (lambda t=_t: random_case((1, 3, 3072), t), {"max_threads": 128})
    CASES[f"{_name} too few threads to hold a row"] = (lambda t=_t: random_case((1, 3, 3072), t), {"max_threads": 64})
    CASES[f"{_name} x begins anywhere"] = (lambda t=_t: random_case((1, 4, 64), t), {"offset": 4})
    CASES[f"{_name} x begins at a word"] = (lambda t=_t: random_case((1, 4, 64), t), {"offset": 16})
    CASES[f"{_name} given modulated, x begins anywhere"] = (
        lambda t=_t: given(random_case((1, 4, 64), t)),
        {"offset": 4},
    )
    CASES[f"{_name} an anchor that is not donated"] = (lambda t=_t: random_case((1, 4, 64), t), {"donate": False})
CASES["nothing reused"] = lambda: random_case((2, 3, 72), mx.bfloat16, branches=0, terms=0), {}
CASES["nothing reused, a row too long to be held"] = (
    lambda: random_case((1, 3, 3072), branches=0, terms=0),
    {"max_threads": 64},
)
for _branches in (1, 2):
    for _terms in (1, 2, 3, 4):
        CASES[f"{_branches} branches of {_terms} terms"] = (
            lambda b=_branches, k=_terms: random_case((2, 3, 72), mx.bfloat16, branches=b, terms=k),
            {},
        )
for _x in DTYPES:
    for _m in DTYPES:
        for _r in DTYPES:
            if not _x == _m == _r:
                CASES[f"mixed {_x} {_m} {_r}"] = (
                    lambda x=_x, m=_m, r=_r: mixed(DTYPES[x], DTYPES[m], DTYPES[r]),
                    {},
                )


# ---- Values


def assert_right(result: Result, case: Case) -> None:
    """Against numpy in float64, and against the CPU's op: reuse to the bit, the rest but for the order of sums."""
    on_cpu = case.run()
    mod_type, reused_type = result_types(case)
    assert result.modulated.dtype == mod_type
    assert all(r.dtype == reused_type for r in result.reused)
    for got, expected in zip(result.reused, on_cpu[1], strict=True):
        assert digest(got) == digest(expected)
    assert_modulated_close(result.modulated, on_cpu[0], case)
    state, expected_state = np.array(result.state), np.array(on_cpu[2])
    if case.x.size == 0:
        assert state.tolist() == pytest.approx(expected_state.tolist(), nan_ok=True)
        return
    assert_modulated_close(result.modulated, modulate_float64(case), case)
    assert_reused_close(result.reused, case)
    assert_state_matches_numpy(result.state, result.modulated, case)
    assert state[[0, 1, 5, 6, 7]].tolist() == expected_state[[0, 1, 5, 6, 7]].tolist()


def check_a_rule(kernel: Kernel, name: str) -> None:
    case, expected = row_case(name)
    assert kernel.run(case).state.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def check_not_finite(kernel: Kernel, value: float, dtype: mx.Dtype) -> None:
    """First and last row of a group's rows; first and last element of a pair, of a thread's pack and of a row."""
    case = of_each_token(random_case((2, 5, 256), dtype))
    rows = np.array(case.shift.astype(mx.float32)).reshape(10, 256)
    for row in (0, 9):
        for column in (0, 1, 7, 8, 255):
            changed = rows.copy()
            changed[row, column] = value
            result = kernel.run(replace(case, shift=mx.array(changed.reshape(2, 5, 256)).astype(dtype)))
            assert result.state[1].item() == MISS
            wrong = np.argwhere(~np.isfinite(to_numpy(result.modulated).reshape(10, 256)))
            assert wrong.tolist() == [[row, column]]
            signal = replace(given(case), x=result.modulated)
            assert kernel.run(signal).state[1].item() == MISS


def check_exact_statistics(kernel: Kernel, dtype: mx.Dtype) -> None:
    """Small integers whose row sums are multiples of 64: mean and variance are exact in any order of summation."""
    x = np.random.default_rng(11).integers(-8, 9, (2, 40, 64)).astype(np.float32)
    x[..., 0] -= np.remainder(x.sum(-1), 64)
    case = replace(random_case((2, 40, 64), dtype), x=mx.array(x).astype(dtype))
    assert digest(kernel.run(case).modulated) == digest(case.run()[0])


def check_a_large_mean(kernel: Kernel, dtype: mx.Dtype) -> None:
    case = random_case((1, 7, 64), dtype, mean=60.0, deviation=0.5)
    assert_modulated_close(kernel.run(case).modulated, modulate_float64(case), case)


def check_given_decides_alike(kernel: Kernel, dtype: mx.Dtype) -> None:
    """The same elements in the same order: the same state to the bit."""
    for shape in ((2, 5, 255), (1, 130, 72), (1, 2, 12288)):
        case = random_case(shape, dtype)
        result = kernel.run(case)
        signal = replace(given(case), x=result.modulated)
        assert digest(kernel.run(signal).state) == digest(result.state)


# ---- Faults put into a text

Mutate = Callable[[str], str]


def swap(old: str, new: str, count: int = 1) -> Mutate:
    """All of the ``count`` places where ``old`` stands; another number is an error, so that no mutant is a no-op."""

    def mutate(text: str) -> str:
        assert text.count(old) == count, f"{text.count(old)} times: {old}"
        return text.replace(old, new)

    return mutate


def nth(old: str, new: str, n: int) -> Mutate:
    """The ``n``-th place only, from 1."""

    def mutate(text: str) -> str:
        parts = text.split(old)
        assert len(parts) > n, old
        return old.join(parts[:n]) + new + old.join(parts[n:])

    return mutate


def both(*mutations: Mutate) -> Mutate:
    def mutate(text: str) -> str:
        for m in mutations:
            text = m(text)
        return text

    return mutate
