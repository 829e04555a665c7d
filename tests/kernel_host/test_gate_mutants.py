"""Faults put into the kernel's text, one at a time, to see that values, schedules and the checker find them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import LEADING, Case, digest, given, random_case

from kernel_host import KernelError, why_unavailable
from kernel_host.gate_checks import Mutate, assert_right, both, nth, swap
from kernel_host.gate_kernel import GateKernel, Header, Variant, kernel_text, variant_of

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")

FENCE = "atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LAST_BARRIER = "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
END_OF_ROW = "      if (column >= channels) {\n        continue;\n      }\n"
READ_AGAIN = "xs[0] = load_pack<aligned>(x_row, column, channels);"
PARTIAL = "    device atomic_uint* partial = partials + kGatePartials * group;\n"

MUTANTS: dict[str, Mutate] = {
    # Synchronisation within a threadgroup
    "sum without its barrier": swap(BARRIER, ""),
    "sum with a barrier of nothing": swap(BARRIER, "threadgroup_barrier(mem_flags::mem_none);"),
    "sum with a barrier of device memory": swap(BARRIER, "threadgroup_barrier(mem_flags::mem_device);"),
    "mean and variance share their scratch": swap("scratch.of[kSumVariance]", "scratch.of[kSumMean]"),
    "both distances share their scratch": nth("scratch.of[kSumAnchor]", "scratch.of[kSumDiff]", 2),
    "barrier in divergent code": swap(BARRIER, f"if (at.sg == 0) {BARRIER}"),
    "simd_sum in divergent code": swap("  v = simd_sum(v);", "  if (v != 0.0f) {\n    v = simd_sum(v);\n  }"),
    "threads without columns return early": swap(
        "  const uint stride =", "  if (lid * kGatePack >= channels) {\n    return;\n  }\n  const uint stride ="
    ),
    "every SIMD-group's sum assumed there": swap("at.lane < at.n_sg ? scratch[at.lane] : 0.0f", "scratch[at.lane]"),
    "one SIMD-group's sum forgotten": swap("at.lane < at.n_sg ?", "at.lane + 1 < at.n_sg ?"),
    "scratch for one SIMD-group": swap("float of[kSums][kGateMaxSimdgroups];", "float of[kSums][1];"),
    # Between threadgroups
    "no release fence": nth(FENCE, "", 1),
    "no acquire fence": both(nth(FENCE, "", 3), nth(FENCE, "", 2)),
    "no fence at all": swap(FENCE, "", 3),
    "fences of threadgroup scope": swap("thread_scope_device", "thread_scope_threadgroup", 3),
    "fences of threadgroup memory": swap("(mem_flags::mem_device, memory", "(mem_flags::mem_threadgroup, memory", 3),
    "relaxed fences": swap("memory_order_seq_cst", "memory_order_relaxed", 3),
    "release fence before the partial sums": both(nth(FENCE, "", 1), swap(PARTIAL, PARTIAL + "    " + FENCE + "\n")),
    "partial sums after the count": both(
        swap("    atomic_store_explicit(partial, as_type<uint>(group_diff), memory_order_relaxed);\n", ""),
        swap(
            "      is_last = finished",
            "      atomic_store_explicit(partials + kGatePartials * group, as_type<uint>(group_diff), "
            "memory_order_relaxed);\n      is_last = finished",
        ),
    ),
    "no barrier before the last one decides": swap(LAST_BARRIER, ""),
    "that barrier without threadgroup memory": swap(LAST_BARRIER, "threadgroup_barrier(mem_flags::mem_device);"),
    "the last threadgroup is the next to last": swap("finished == p.groups - 1", "finished + 2 == p.groups"),
    "the last threadgroup never comes": swap("finished == p.groups - 1", "finished == p.groups"),
    "a count that is not atomic": swap(
        "atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);",
        "*reinterpret_cast<device uint*>(counter);\n      *reinterpret_cast<device uint*>(counter) = finished + 1;",
    ),
    "every threadgroup decides": swap("if (is_last == 1)", "if (is_last <= 1)"),
    "the last threadgroup's sums forgotten": swap("g < p.groups;", "g + 1 < p.groups;"),
    # Bounds and indices
    "loads past a row's end": swap(
        "p.v[i] = column + i < channels ? row[column + i] : T(0.0f);", "p.v[i] = row[column + i];"
    ),
    "stores past a row's end": swap("i < kGatePack && column + i < channels; i++", "i < kGatePack; i++"),
    "packs past a row's end": swap(END_OF_ROW, "", 3),
    "padding counts in the variance": swap("aligned || column + i < channels ? centered", "true ? centered"),
    "padding counts in the distance": swap("if (aligned || column + i < channels) {", "if (true) {"),
    "a signal's anchor from the first row": swap("reinterpret_cast<device const X*>(before + begin)", "before"),
    "a signal's packs overlap": swap("column += stride", "column += stride / 2"),
    "a signal is modulated": swap("if (!modulates)", "if (false)"),
    "packs overlap": swap(
        "const uint column = lid * kGatePack + k * stride;", "const uint column = lid * 4 + k * stride;", 3
    ),
    "16-byte loads of rows that are not": swap("  if (aligned) {", "  if (true) {", 2),
    "rows past the last": swap("min(p.rows, (group + 1) * p.rows_per_group)", "(group + 1) * p.rows_per_group"),
    "a threadgroup's last row forgotten": swap("row < end; row++", "row + 1 < end; row++"),
    "the first batch's modulation for all": swap("packs == 0 || mod != mod_at", "mod_at == ~size_t(0)"),
    "the scale of the first batch": swap("load_pack<aligned>(scale + mod,", "load_pack<aligned>(scale,"),
    "the anchor's first row": swap("load_pack<aligned>(before + begin,", "load_pack<aligned>(before,", 2),
    "terms of the other branch": swap("residuals[b * terms + t]", "residuals[t * branches + b]"),
    "weights of the other branch": swap("w[b * terms + t]", "w[t * branches + b]"),
    "one branch written twice": swap(
        "store_pack<aligned>(reused[b] + begin,", "store_pack<aligned>(reused[0] + begin,"
    ),
    "writes to an input": swap(
        "store_pack<aligned>(modulated + begin, column, channels, out);",
        "store_pack<aligned>(modulated + begin, column, channels, out);\n"
        "      const_cast<device X*>(x_row)[column] = xs[slot].v[0];",
    ),
    "a donated anchor read by its own pointer": swap(
        "p.in_place != 0 ? static_cast<device const O*>(modulated) : anchor", "anchor"
    ),
    "a long row's x not read again for the variance": nth(
        "xs[0] = load_pack<aligned>(x_row, column, channels);", "", 1
    ),
    "a long row's x not read again for the modulation": nth(
        "xs[0] = load_pack<aligned>(x_row, column, channels);", "", 2
    ),
    "a long row's anchor not read": swap("befores[0] = load_pack<aligned>(before + begin, column, channels);", ""),
    "a long row's modulation kept from its first pack": swap("packs == 0 || mod != mod_at", "mod != mod_at"),
    "a thread's second pack takes the first's place": swap("xs[held > 1 ? k : 0] = xp;", "xs[0] = xp;"),
    # Arithmetic
    "variance by one less": swap(
        "squares, scratch.of[kSumVariance], at) / float(channels)",
        "squares, scratch.of[kSumVariance], at) / float(channels - 1)",
    ),
    "variance in one pass": both(
        swap("const float centered = float(xp.v[i]) - mean;", "const float centered = float(xp.v[i]);"),
        swap("sqrt(variance + p.eps)", "sqrt(variance - mean * mean + p.eps)"),
    ),
    "half-precision mean": swap(
        "const float centered = float(xp.v[i]) - mean;", "const float centered = float(xp.v[i]) - float(half(mean));"
    ),
    "no epsilon": swap("precise::sqrt(variance + p.eps)", "precise::sqrt(variance)"),
    "product not rounded": swap("const O product = O(", "const float product = ("),
    "difference not rounded": swap("abs(float(O(float(m) - a)))", "abs(float(m) - a)"),
    "scale + 1 not rounded": both(
        swap("scales[slot].v[i] = M(1.0f + float(scales[slot].v[i]));", ""),
        swap("float(scales[slot].v[i]) * float(norm)", "(1.0f + float(scales[slot].v[i])) * float(norm)"),
    ),
    "reuse rounded twice": swap("Y(float(xp.v[i]) + change[i])", "Y(float(xp.v[i]) + float(Y(change[i])))"),
    "anchor read after it is overwritten": swap(
        "      Pack<O> out;\n#pragma unroll\n      for (int i = 0; i < kGatePack; i++) {\n        const X norm",
        "      store_pack<aligned>(modulated + begin, column, channels, Pack<O>{});\n"
        "      befores[slot] = load_pack<aligned>(before + begin, column, channels);\n"
        "      Pack<O> out;\n#pragma unroll\n      for (int i = 0; i < kGatePack; i++) {\n        const X norm",
    ),
    "elements that are not finite do not count": swap("gate_is_finite(float(m)) ? 0.0f : 1.0f", "0.0f"),
    "distances exchanged": swap("diff / count, anchor / count", "anchor / count, diff / count"),
    "polynomial from the other end": swap("rules.coefficients[i]);", "rules.coefficients[5 - i]);"),
    "accumulated and streak exchanged": swap("from[4], from[5], from[6]", "from[5], from[4], from[6]"),
}


# What goes unnoticed, and why.
SURVIVORS: dict[str, Mutate] = {
    # The release fence orders plain stores too; that Metal promises visibility to other threadgroups for atomic and
    # coherent(device) accesses only is not in the model where the reader's are atomic.
    "partial sums that are not atomic": swap(
        "atomic_store_explicit(partial, as_type<uint>(group_diff), memory_order_relaxed);",
        "*reinterpret_cast<device uint*>(partial) = as_type<uint>(group_diff);",
    ),
}


def cases() -> list[tuple[Case, dict[str, Any]]]:
    f32, bf16 = mx.float32, mx.bfloat16
    far = random_case((2, 5, 301), bf16, branches=2, terms=2, mean=4.0)  # rows end in a part of a pack
    long = random_case((1, 131, 1032), f32, branches=2, terms=2)
    return [
        (random_case((1, 131, 264), f32, branches=2, terms=2), {}),  # groups of two rows, one of one, idle threads
        (random_case((3, 51, 264), f32, branches=2, terms=2, mean=3000.0), {}),  # batches end inside a group's rows
        (random_case((1, 3, 264), f32, branches=2, terms=2, deviation=1e-3), {}),  # epsilon counts
        (far, {}),
        (replace(far, anchor=-2.7 * far.anchor[::-1]), {}),  # differences are no bfloat16 numbers
        (given(far), {}),
        (given(long), {"max_threads": 96}),  # two packs in each thread
        (long, {"max_threads": 96}),  # two packs in each thread
        (long, {"max_threads": 32}),  # too long to be held
        (random_case((1, 131, 264), f32, branches=2, terms=2), {"one_dispatch": False}),
    ]


@cache
def variants(header: Header) -> list[Variant]:
    found = []
    for case, options in cases():
        packs = header.grid(case.x.shape[0] * case.x.shape[1], case.x.shape[2], options.get("max_threads", 1024)).packs
        found.append(variant_of(case, packs, one_dispatch=options.get("one_dispatch", True)))
    return found


def run_suite(folder: Path, text: str) -> None:
    """Raises AssertionError, KernelError among them, if something is wrong with the kernel's text."""
    kernel = GateKernel(folder, variants(Header(folder)), text=text)
    for case, options in cases():
        seen = set()
        for seed in range(8 if not options else 2):
            schedule = dict(seed=seed, preempt=(0, 16)[seed % 2], resident_groups=(3, 7)[seed // 2 % 2])
            result = kernel.run(case, **options, **schedule)
            if seed == 0:
                assert_right(result, case)
            seen.add(digest(result.modulated, *result.reused, result.state))
        assert len(seen) == 1
    # An element that is not finite: a first step has no anchor after it.
    case = random_case((1, 131, 264), mx.float32, branches=2, terms=2)
    shift = np.array(case.shift)
    shift[..., -1] = np.nan
    first = replace(case, shift=mx.array(shift), state=mx.zeros(8), force=LEADING)
    assert kernel.run(first).state[6].item() == 0


def test_the_text_as_it_is(folder: Path) -> None:
    run_suite(folder, kernel_text())


@pytest.mark.parametrize("name", SURVIVORS)
def test_survivor_is_not_caught(folder: Path, name: str) -> None:
    run_suite(folder, SURVIVORS[name](kernel_text()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i > 3 else []) for i, name in enumerate(MUTANTS)]
)
def test_mutant_is_caught(folder: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    mutated = MUTANTS[name](kernel_text())
    with pytest.raises(AssertionError) as caught:
        run_suite(folder, mutated)
    found = str(caught.value).split(":")[0] if isinstance(caught.value, KernelError) else "values"
    record_property("metal: fault found", f"{name} ({found})")
