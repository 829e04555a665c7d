"""metal/gate.metal, the text that Macs compile, run on the CPU: values, synchronisation, and the bytes it moves."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import (
    MISS,
    ROWS,
    SHAPES,
    Case,
    assert_modulated_close,
    assert_reused_close,
    assert_state_matches_numpy,
    digest,
    modulate_float64,
    random_case,
    row_case,
    to_numpy,
)

from kernel_host import KernelError, why_unavailable
from kernel_host.gate_kernel import INCLUDES, GateKernel, Header, Result, Variant, kernel_text, result_types, variant_of
from kernel_host.host import lint, why_no_lint

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}

# ---- The cases. Each shape's reason beside it; those of SHAPES besides.

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
TWO_DISPATCHES = [n for n in CASES if n.split(" ", 1)[1] in map(str, [*SHAPES, *MANY_ROWS])]


@pytest.fixture(scope="session")
def header(folder: Path) -> Header:
    folder.mkdir(exist_ok=True)
    return GateKernel(folder, []).header


def variant(header: Header, name: str, one_dispatch: bool = True) -> Variant:
    make, options = CASES[name]
    case = make()
    grid = header.grid(case.x.shape[0] * case.x.shape[1], case.x.shape[2], options.get("max_threads", 0))
    return variant_of(case, grid.packs, one_dispatch=one_dispatch, offset=options.get("offset", 0))


@pytest.fixture(scope="session")
def checked(folder: Path, header: Header) -> GateKernel:
    return GateKernel(folder, [variant(header, name) for name in CASES])


@pytest.fixture(scope="session")
def two_dispatches(folder: Path, header: Header) -> GateKernel:
    """As compiled before Metal 3.2, where there are no fences of device scope."""
    return GateKernel(folder, [variant(header, n, one_dispatch=False) for n in TWO_DISPATCHES], metal_version=310)


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


@pytest.mark.parametrize("name", CASES)
def test_values(checked: GateKernel, name: str) -> None:
    make, options = CASES[name]
    case = make()
    results = [checked.run(case, seed=seed, preempt=16, **options) for seed in range(2)]
    assert_right(results[0], case)
    # Whatever the schedule, and whichever threadgroup is the last: the same bits.
    assert digest(results[0].modulated, results[0].state) == digest(results[1].modulated, results[1].state)
    grid = checked.header.grid(case.x.shape[0] * case.x.shape[1], case.x.shape[2])
    if "max_threads" not in options:
        assert results[0].counter == grid.groups


@pytest.mark.parametrize("name", TWO_DISPATCHES)
def test_values_of_two_dispatches(checked: GateKernel, two_dispatches: GateKernel, name: str) -> None:
    case = CASES[name][0]()
    result = two_dispatches.run(case, one_dispatch=False, preempt=16)
    assert_right(result, case)
    one = checked.run(case)
    assert digest(result.modulated, *result.reused) == digest(one.modulated, *one.reused)
    assert np.array(result.state) == pytest.approx(np.array(one.state), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", ROWS)
def test_every_rule(folder: Path, header: Header, name: str) -> None:
    kernel = rule_kernel(folder)
    case, expected = row_case(name)
    assert kernel.run(case).state.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@cache
def rule_kernel(folder: Path) -> GateKernel:
    case, _ = row_case("skips below the threshold")
    return GateKernel(folder, [variant_of(case, 1)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite(checked: GateKernel, value: float) -> None:
    """First and last row of a threadgroup's rows, first and last element of a thread's and of a row."""
    case = of_each_token(random_case((2, 5, 256), mx.bfloat16))
    rows = np.array(case.shift.astype(mx.float32)).reshape(10, 256)
    for row in (0, 9):
        for column in (0, 7, 8, 255):
            changed = rows.copy()
            changed[row, column] = value
            shift = mx.array(changed.reshape(2, 5, 256)).astype(mx.bfloat16)
            result = checked.run(replace(case, shift=shift))
            assert result.state[1].item() == MISS
            wrong = np.argwhere(~np.isfinite(to_numpy(result.modulated).reshape(10, 256)))
            assert wrong.tolist() == [[row, column]]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_exact_statistics_give_the_cpu_bits(checked: GateKernel, dtype: mx.Dtype) -> None:
    """Small integers whose row sums are multiples of 64: mean and variance are exact in any order of summation."""
    x = np.random.default_rng(11).integers(-8, 9, (2, 40, 64)).astype(np.float32)
    x[..., 0] -= np.remainder(x.sum(-1), 64)
    case = replace(random_case((2, 40, 64), dtype), x=mx.array(x).astype(dtype))
    assert digest(checked.run(case).modulated) == digest(case.run()[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_large_mean(checked: GateKernel, dtype: mx.Dtype) -> None:
    case = random_case((1, 7, 64), dtype, mean=60.0, deviation=0.5)
    assert_modulated_close(checked.run(case).modulated, modulate_float64(case), case)


def test_a_counter_that_does_not_start_at_zero_is_an_error(checked: GateKernel) -> None:
    """Why every evaluation has a counter of its own: a threadgroup would decide before the last one has finished."""
    with pytest.raises(KernelError, match="uninitialised: atomic operation"):
        checked.run(random_case((1, 130, 72), mx.bfloat16), counter=1)


def test_grid(header: Header) -> None:
    """Every element belongs to one thread, within Metal's limits."""
    rng = np.random.default_rng(0)
    sizes = [(0, 0), (1, 1), (4096, 3072), (16384, 4096)]
    sizes += [(int(10 ** rng.uniform(0, 5)), int(10 ** rng.uniform(0, 5))) for _ in range(500)]
    for rows, channels in sizes:
        for max_threads in (1024, 896, 64, 32):
            grid = header.grid(rows, channels, max_threads)
            assert grid.threads % 32 == 0
            assert 32 <= grid.threads <= max_threads
            assert grid.groups >= 1
            assert (grid.groups - 1) * grid.rows_per_group <= max(rows - 1, 0) < grid.groups * grid.rows_per_group
            if grid.packs:
                assert grid.threads * grid.packs * 8 >= channels
            else:
                assert channels > max_threads * 4 * 8


# ---- Synchronisation


def test_no_alarm_in_300_runs(checked: GateKernel, record_property: Callable[[str, object], None]) -> None:
    """Shuffled schedules, weak loads, preemption at plain accesses; every run gives the same bits."""
    cases = [
        (random_case((1, 130, 72), mx.bfloat16), 200),
        (random_case((3, 50, 64), mx.float32), 60),
        (random_case((2, 5, 255), mx.float16), 40),
    ]
    runs = 0
    for case, n in cases:
        seen = set()
        for seed in range(n):
            result = checked.run(case, seed=seed, preempt=(0, 8, 64)[seed % 3], resident_groups=1 + seed % 7)
            seen.add(digest(result.modulated, *result.reused, result.state))
            runs += 1
        assert len(seen) == 1
    assert runs == 300
    record_property("metal: checked runs without an alarm", runs)


@pytest.mark.skipif(why_no_lint() is not None, reason=why_no_lint() or "")
def test_address_spaces(tmp_path: Path) -> None:
    lines = 'instantiate_kernel("a", gate, bfloat, float, half, 2, 3, 1, true, true)\n'
    lines += 'instantiate_kernel("b", gate, half, half, half, 1, 1, 0, false, true)\n'
    assert lint(kernel_text() + "\n" + lines, tmp_path, include_dirs=INCLUDES) == []


# ---- Real size


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bf16", "f32"])
def test_real_size(folder: Path, dtype: mx.Dtype, record_property: Callable[[str, object], None]) -> None:
    """A picture of 1024 x 1024 pixels: values, and the bytes of device memory beside the fewest there are."""
    case = random_case((1, 4096, 3072), dtype)
    fast = GateKernel(folder, [variant_of(case, 1)], mode="fast")
    assert_right(fast.run(case), case)
    del fast

    counted = GateKernel(folder, [variant_of(case, 1)]).run(case, check=False)
    b = GateKernel(folder, []).header.buffer
    device = sum(n for i, n in [*counted.runs[0].read.items(), *counted.runs[0].written.items()] if i != b("params"))
    fewest = 5 * case.x.nbytes + 2 * case.shift.nbytes
    record_property(
        f"metal: bytes for each element at 4096 x 3072, {str(dtype).split('.')[-1]}",
        f"{device / case.x.size:.3f}, {device / fewest:.4f} of the fewest",
    )
    for name in ("x", "modulated", "residual0"):  # the donated anchor is read as `modulated`
        assert counted.runs[0].read[b(name)] == case.x.nbytes
    for name in ("modulated", "reused0"):
        assert counted.runs[0].written[b(name)] == case.x.nbytes
    assert device <= 1.02 * fewest
