"""metal/gate.metal, the text that Macs compile, run on the CPU: values, synchronisation, and the bytes it moves."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import (
    ROWS,
    SHAPES,
    digest,
    random_case,
    row_case,
)

from kernel_host import KernelError, why_unavailable
from kernel_host.gate_checks import (
    CASES,
    DTYPES,
    MANY_ROWS,
    assert_right,
    check_a_large_mean,
    check_a_rule,
    check_exact_statistics,
    check_given_decides_alike,
    check_not_finite,
)
from kernel_host.gate_kernel import INCLUDES, GateKernel, Header, Variant, kernel_text, variant_of
from kernel_host.host import lint, warnings, why_no_lint

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")

TWO_DISPATCHES = [
    n for n in CASES if n.split(" ", 1)[1].removesuffix(", given modulated") in map(str, [*SHAPES, *MANY_ROWS])
]


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
    check_a_rule(kernel, name)


@cache
def rule_kernel(folder: Path) -> GateKernel:
    case, _ = row_case("skips below the threshold")
    return GateKernel(folder, [variant_of(case, 1)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite(checked: GateKernel, value: float) -> None:
    check_not_finite(checked, value, mx.bfloat16)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_exact_statistics_give_the_cpu_bits(checked: GateKernel, dtype: mx.Dtype) -> None:
    check_exact_statistics(checked, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_large_mean(checked: GateKernel, dtype: mx.Dtype) -> None:
    check_a_large_mean(checked, dtype)


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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_given_the_modulated_input_it_decides_alike(checked: GateKernel, dtype: mx.Dtype) -> None:
    check_given_decides_alike(checked, dtype)


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
    lines = 'instantiate_kernel("a", gate, bfloat, float, half, true, 2, 3, 1, true, true)\n'
    lines += 'instantiate_kernel("b", gate, half, half, half, true, 1, 1, 0, false, true)\n'
    lines += 'instantiate_kernel("c", gate, half, half, half, false, 0, 0, 1, false, true)\n'
    assert lint(kernel_text() + "\n" + lines, tmp_path, include_dirs=INCLUDES) == []


@pytest.mark.skipif(why_no_lint() is not None, reason=why_no_lint() or "")
def test_no_warning(tmp_path: Path) -> None:
    """CI compiles for macOS with -Wall -Werror, where a loop that cannot be unrolled is an error."""
    variants = [("bfloat", "true", 1, 1, packs, aligned) for packs in (0, 1, 4) for aligned in ("true", "false")]
    variants += [
        ("float", "true", 2, 4, 2, "true"),
        ("half", "true", 0, 0, 1, "true"),
        ("half", "false", 0, 0, 1, "true"),
    ]
    lines = ""
    for i, (t, modulates, *rest) in enumerate(variants):
        arguments = ", ".join(map(str, [t, t, t, modulates, *rest, "true"]))
        lines += f'instantiate_kernel("variant_{i}", gate, {arguments})\n'
    assert warnings(f"{kernel_text()}\n{lines}", tmp_path, path="gate.metal") == []
    rolled = kernel_text().replace("#pragma unroll(held)", "#pragma unroll")
    assert any("loop not unrolled" in line for line in warnings(f"{rolled}\n{lines}", tmp_path))


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
