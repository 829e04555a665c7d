"""metal/gate.cu, the text that MLX compiles on NVIDIA's GPUs: run on the CPU, and compiled by NVRTC."""

import re
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
    Case,
    digest,
    given,
    random_case,
    row_case,
    to_numpy,
)

from kernel_host import KernelError, why_unavailable
from kernel_host.gate_checks import (
    CASES,
    DTYPES,
    Mutate,
    assert_right,
    both,
    check_a_large_mean,
    check_a_rule,
    check_exact_statistics,
    check_given_decides_alike,
    check_not_finite,
    nth,
    swap,
)
from kernel_host.gate_cuda_kernel import (
    PRELUDE,
    CudaGate,
    Variant,
    compile_with_nvrtc,
    kernel_of,
    nvrtc_folder,
    variant_of,
)
from kernel_host.gate_kernel import Header, kernel_text

needs_compiler = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")
needs_nvrtc = pytest.mark.skipif(
    nvrtc_folder() is None,
    reason="NVRTC is absent: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl",
)
NAMES = [name for name in CASES if not name.endswith("not donated")]  # MLX gives a kernel of its own fresh memory


def variant(header: Header, name: str) -> Variant:
    make, options = CASES[name]
    case = make()
    rows, channels = case.x.shape[0] * case.x.shape[1], case.x.shape[2]
    grid = header.grid(rows, channels, options.get("max_threads", 0), cuda=True)
    return variant_of(case, grid.packs, options.get("offset", 0))


@pytest.fixture(scope="session")
def header(folder: Path) -> Header:
    folder.mkdir(exist_ok=True)
    return Header(folder)


@pytest.fixture(scope="session")
def checked(folder: Path, header: Header) -> CudaGate:
    return CudaGate(folder, [variant(header, name) for name in NAMES])


# ---- Values


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_values(checked: CudaGate, name: str) -> None:
    make, options = CASES[name]
    case = make()
    results = [checked.run(case, seed=seed, preempt=16, **options) for seed in range(2)]
    assert_right(results[0], case)
    assert digest(results[0].modulated, results[0].state) == digest(results[1].modulated, results[1].state)


@needs_compiler
@pytest.mark.parametrize("name", ROWS)
def test_every_rule(folder: Path, name: str) -> None:
    check_a_rule(rule_kernel(folder), name)


@cache
def rule_kernel(folder: Path) -> CudaGate:
    case, _ = row_case("skips below the threshold")
    return CudaGate(folder, [variant_of(case, 1)])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite(checked: CudaGate, value: float, dtype: mx.Dtype) -> None:
    check_not_finite(checked, value, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_exact_statistics_give_the_cpu_bits(checked: CudaGate, dtype: mx.Dtype) -> None:
    check_exact_statistics(checked, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_large_mean(checked: CudaGate, dtype: mx.Dtype) -> None:
    check_a_large_mean(checked, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_given_the_modulated_input_it_decides_alike(checked: CudaGate, dtype: mx.Dtype) -> None:
    check_given_decides_alike(checked, dtype)


@needs_compiler
def test_grid(header: Header) -> None:
    """Every element belongs to one thread, in blocks that can be launched whatever their registers."""
    rng = np.random.default_rng(0)
    sizes = [(0, 0), (1, 1), (4096, 3072), (16384, 3072), (4096, 6144)]
    sizes += [(int(10 ** rng.uniform(0, 5)), int(10 ** rng.uniform(0, 5))) for _ in range(500)]
    for rows, channels in sizes:
        grid = header.grid(rows, channels, cuda=True)
        assert grid.threads % 32 == 0
        assert 32 <= grid.threads <= header.cuda_threads == 65536 // 256
        assert grid.groups >= 1
        assert (grid.groups - 1) * grid.rows_per_group <= max(rows - 1, 0) < grid.groups * grid.rows_per_group
        if grid.packs:
            assert grid.threads * grid.packs * 8 >= channels


@needs_compiler
def test_no_alarm_in_100_runs(checked: CudaGate, record_property: Callable[[str, object], None]) -> None:
    """Shuffled schedules, preemption at plain accesses; every run gives the same bits."""
    cases = [random_case((1, 130, 72), mx.bfloat16), random_case((2, 5, 255), mx.float16)]
    for case in cases:
        seen = set()
        for seed in range(50):
            result = checked.run(case, seed=seed, preempt=(0, 8, 64)[seed % 3], resident_groups=1 + seed % 7)
            seen.add(digest(result.modulated, *result.reused, result.state))
        assert len(seen) == 1
    record_property("cuda: checked runs without an alarm", 100)


@needs_compiler
def test_real_size(folder: Path, header: Header, record_property: Callable[[str, object], None]) -> None:
    """A picture of 1024 x 1024 pixels: values, and the bytes that go to and from memory or caches."""
    case = random_case((1, 4096, 3072), mx.bfloat16)
    variants = [variant_of(case, header.grid(4096, 3072, cuda=True).packs)]
    assert_right(CudaGate(folder, variants, mode="fast").run(case), case)

    counted = CudaGate(folder, variants)
    rows = counted.run(case, check=False).runs[0]
    places = counted.places
    for name in ("x", "anchor", "residual0"):
        assert rows.read[places.index(name)] == case.x.nbytes
    for name in ("modulated", "reused0"):
        assert rows.written[places.index(name)] == case.x.nbytes
    # Read for each row, from the L1 cache but for the first time on a multiprocessor.
    for name in ("shift", "scale"):
        assert rows.read[places.index(name)] == case.x.nbytes
    device = sum(rows.read[places.index(n)] for n in ("x", "anchor", "residual0")) + sum(rows.written.values())
    fewest = 5 * case.x.nbytes
    record_property("cuda: bytes of memory at 4096 x 3072, bfloat16", f"{device / fewest:.4f} of the fewest")
    assert device <= 1.001 * fewest


# ---- Faults put into the text, to see that values, schedules and the checker find them

BARRIER = "  __syncthreads();\n"
END_OF_ROW = "      if (column >= channels) {\n        continue;\n      }\n"
MUTANTS: dict[str, Mutate] = {
    "sum without its barrier": swap(BARRIER, ""),
    "mean and variance share their scratch": swap("scratch.of[kSumVariance]", "scratch.of[kSumMean]"),
    "both distances share their scratch": nth("scratch.of[kSumAnchor]", "scratch.of[kSumDiff]", 1),
    "barrier in divergent code": swap(BARRIER, "  if (threadIdx.x < 32) {\n  __syncthreads();\n  }\n"),
    "threads without columns return early": swap(
        "  const unsigned int stride =",
        "  if (threadIdx.x * kGatePack >= channels) {\n    return;\n  }\n  const unsigned int stride =",
    ),
    "every warp's sum assumed there": swap("lane < blockDim.x / kGateSimdWidth ?", "lane < kMaxWarps ?"),
    "one warp's sum forgotten": swap(
        "lane < blockDim.x / kGateSimdWidth ?", "lane + 1 < blockDim.x / kGateSimdWidth ?"
    ),
    "half a warp's sum": swap("distance = kGateSimdWidth / 2", "distance = kGateSimdWidth / 4"),
    "loads past a row's end": swap(": T(0.0f);", ": row[at];", 2),
    "the second of a pair stored past a row's end": swap(
        "      if (at + 1 < channels) {\n        row[at + 1]", "      {\n        row[at + 1]"
    ),
    "packs past a row's end": swap(END_OF_ROW, "", 3),
    "padding counts in the variance": swap("aligned || at + 1 < channels ?", "true ?"),
    "padding counts in the distance": swap("if (has_second) {", "if (true) {"),
    "16-byte loads of rows that are not": swap("  if (aligned) {", "  if (true) {", 2),
    "rows past the last": swap(
        "min(p.rows, (blockIdx.x + 1) * p.rows_per_group)", "(blockIdx.x + 1) * p.rows_per_group"
    ),
    "the first batch's modulation for all": swap("(row / p.tokens) * p.mod_batch_rows", "0"),
    "the anchor's first row": swap("load_pack<aligned>(anchor + begin,", "load_pack<aligned>(anchor,", 2),
    "terms of the other branch": swap("residuals.of[b * terms + t]", "residuals.of[t * branches + b]"),
    "weights of the other branch": swap("w[b * terms + t]", "w[t * branches + b]", 2),
    "one branch written twice": swap("reused[b] + begin", "reused[0] + begin"),
    "the norm is not rounded": swap("rounded<X>(__fmul_rn", "make_float2(__fmul_rn"),
    "1 + scale is not rounded": swap("rounded<M>(1.0f", "make_float2(1.0f"),
    "the product is not rounded": swap("rounded<O>(__fmul_rn", "make_float2(__fmul_rn"),
    "the difference is not rounded": swap("rounded<O>(m.x", "make_float2(m.x"),
    "reuse contracted": swap("__fadd_rn(change[i].x, term.x)", "__fmaf_rn(w[b * terms + t], r.x, change[i].x)"),
    "E[x2] - mean2": both(
        swap("make_float2(v.x - mean, v.y - mean)", "v"),
        swap(
            "scratch.of[kSumVariance]) / float(channels)", "scratch.of[kSumVariance]) / float(channels) - mean * mean"
        ),
    ),
    "infinities are numbers": swap("__fmaf_rn(m.y, 0.0f, sums.zeros)", "sums.zeros"),
    "a signal's anchor from the first row": swap("reinterpret_cast<const X*>(anchor + begin)", "anchor"),
    "a signal's packs overlap": swap("column += stride", "column += stride / 2"),
    "a signal is modulated": swap("if (!modulates)", "if (false)"),
    "the last block's sums forgotten": swap("g < p.groups;", "g + 1 < p.groups;"),
    "the anchor's flag lost": swap("from[6], from[7]}", "0.0f, from[7]}"),
}


@cache
def suspects() -> list[tuple[Case, dict[str, Any]]]:
    """Where the faults show: rows that end anywhere, several warps, batches, branches, a large mean, no number."""
    infinite = random_case((1, 2, 256), mx.bfloat16)
    shift = np.array(infinite.shift.astype(mx.float32))
    shift[..., 255] = np.inf
    first = random_case((3, 3, 264), mx.bfloat16, branches=2, terms=3)
    return [
        (first, {}),
        (given(replace(random_case((1, 300, 4104), mx.float16), anchor=random_case((1, 300, 4104), mx.float16).x)), {}),
        (random_case((2, 5, 255), mx.float16, branches=2, terms=3), {}),
        (random_case((1, 1031, 72), mx.bfloat16), {}),
        (random_case((1, 7, 64), mx.float32, mean=60.0, deviation=0.5, branches=1, terms=2), {}),
        (random_case((1, 7, 64), mx.bfloat16, mean=60.0, deviation=0.05), {}),
        (random_case((1, 7, 63), mx.float32, mean=60.0, deviation=0.5), {}),
        (replace(infinite, shift=mx.array(shift).astype(mx.bfloat16), state=mx.zeros(8)), {}),
        (random_case((1, 4, 64), mx.float32), {"offset": 4}),
    ]


def found(kernel: CudaGate, case: Case, options: dict[str, Any]) -> bool:
    bits = set()
    for seed in range(6):
        try:
            result = kernel.run(case, seed=seed, preempt=8, **options)
            bits.add(digest(result.modulated, *result.reused, result.state))
            if np.isfinite(to_numpy(case.modulation[0])).all():
                assert_right(result, case)
            else:
                assert result.state[1].item() == MISS
        except AssertionError:  # KernelError is one
            return True
    return len(bits) > 1


@needs_compiler
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i > 3 else []) for i, name in enumerate([None, *MUTANTS])]
)
def test_mutants(folder: Path, header: Header, name: str | None) -> None:
    text = kernel_text("gate.cu")
    variants = set()
    for case, options in suspects():
        grid = header.grid(case.x.shape[0] * case.x.shape[1], case.x.shape[2], cuda=True)
        variants.add(variant_of(case, grid.packs, options.get("offset", 0)))
    kernel = CudaGate(folder, variants, text=MUTANTS[name](text) if name else text)
    assert any(found(kernel, *suspect) for suspect in suspects()) == (name is not None)


@needs_compiler
def test_a_fault_is_named(folder: Path) -> None:
    case = random_case((3, 3, 264), mx.bfloat16)
    text = swap(BARRIER, "")(kernel_text("gate.cu"))
    kernel = CudaGate(folder, [variant_of(case, 1)], text=text)
    with pytest.raises(KernelError, match=r"gate\.cu:\d+"):
        kernel.run(case, preempt=8)


# ---- NVRTC

ARCHITECTURES = ["sm_80", "sm_90", "sm_90a", "sm_120", "sm_120a"]
BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
COMPILED = {
    "FLUX": Variant(BF16, BF16, BF16, True, 1, 1, 2, True),
    "FLUX, guidance": Variant(BF16, BF16, BF16, True, 2, 1, 2, True),
    "most registers": Variant(F32, F32, F32, True, 2, 4, 4, True),
    "mixed, unaligned, long rows": Variant(F16, F32, BF16, True, 1, 2, 0, False),
    "nothing reused": Variant(F16, F16, F16, True, 0, 0, 1, True),
    "given modulated": Variant(BF16, BF16, BF16, False, 0, 0, 2, True),
}


def source_of(header: Header, variant: Variant) -> str:
    return PRELUDE + kernel_text("gate.cu") + kernel_of(header, variant)


@needs_compiler
@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
def test_nvrtc_compiles(
    header: Header, name: str, architecture: str, record_property: Callable[[str, object], None]
) -> None:
    """Without a warning, without a spilled register, and a block of it can be launched."""
    binary, log = compile_with_nvrtc(
        source_of(header, COMPILED[name]), architecture, ["--ptxas-options=-v", "--ptxas-options=-warn-spills"]
    )
    assert binary.startswith(b"\x7fELF")
    assert "warning" not in log
    assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"]
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    assert registers * header.cuda_threads <= 65536
    record_property(f"cuda: registers, {name}, {architecture}", registers)


@needs_compiler
@needs_nvrtc
@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_contracted(header: Header, name: str) -> None:
    """Multiply and add stay two roundings but where the text says fma: squares and finiteness, and the polynomial."""
    variant = COMPILED[name]
    ptx = compile_with_nvrtc(source_of(header, variant), "compute_80")[0].decode()
    body = ptx[ptx.index(f"{variant.name}") :]
    of_rows = 2 * 8 * max(1, variant.packs) if variant.modulates else 8
    assert len(re.findall(r"\bfma\.", body)) == of_rows + 4
    assert not re.findall(
        r"\b(?:mad\.rn\.f|fma\.rn\.(?:b?f16|ftz)|div\.(?:full|approx)|sqrt\.approx|[a-z.]*\.ftz)", body
    )


@needs_compiler
@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("packs", [0, 1, 2, 4])
@pytest.mark.parametrize("residual", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("modulation", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("x", DTYPES.values(), ids=DTYPES)
def test_every_combination_compiles(
    header: Header, x: mx.Dtype, modulation: mx.Dtype, residual: mx.Dtype, packs: int, aligned: bool
) -> None:
    compile_with_nvrtc(source_of(header, Variant(x, modulation, residual, True, 2, 2, packs, aligned)), "sm_90")
