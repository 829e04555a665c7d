"""The runtime's own tests: each alarm is raised by its fault and by nothing else; values and counts are exact."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernel_host import In, InOut, KernelError, Library, Out, build, lint, why_no_lint, why_unavailable
from kernel_host.host import is_clang

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

PATH = Path(__file__).with_name("kernels_under_test.metal")
TEXT = PATH.read_text()

# Kernels that come as a fault and its correct twin; what is said of the fault.
ALARMS = {
    "bounds": r"out-of-bounds: write of buffer\(1\) byte 256 \(\+4\) by thread 63 of threadgroup 0 at .*has 256 bytes",
    "far_bounds": r"out-of-bounds: read of buffer\(0\) byte",
    "threadgroup_bounds": "out-of-bounds: write of threadgroup a byte 256",
    "binding": r"out-of-bounds: read of buffer\(7\) \(not bound\)",
    "initialised": r"uninitialised: read of buffer\(1\)",
    "threadgroup_initialised": r"uninitialised: read of threadgroup a byte 0 \(\+4\) by thread 63",
    "input": r"read-only: write of buffer\(0\)",
    "barrier": "race: .* of threadgroup a",
    "barrier_flags": "race: .* of threadgroup a",
    "device_barrier_flags": r"race: .* of buffer\(2\)",
    "barrier_before_reuse": "race: .* of threadgroup a",
    "simd_barrier": "race: .* of threadgroup a",
    "sum_is_no_barrier": "race: .* of threadgroup a",
    "same_barrier": "divergent: threadgroup_barrier at kernels_.* and at kernels_",
    "barrier_of_all": "divergent: threadgroup_barrier at .* is not reached by a thread that has returned",
    "simd_of_all": "divergent: simd_sum at .* is not reached by a thread that has returned",
    "same_simd_operation": "divergent: simd_(sum|max) at .* and simd_(sum|max) at",
    "barrier_or_simd": "deadlock: thread .* waits at",
    "relaxed": "order: an atomic operation with an order other than relaxed",
    "atomic_bounds": r"out-of-bounds: atomic operation on buffer\(3\) byte 8",
    "atomic_initialised": r"uninitialised: atomic operation on buffer\(2\) byte 0",
    "atomic_or_plain": r"race: .*buffer\(3\)",
    "threadgroup_size": "threadgroup memory: 32772 bytes with a, Metal has 32 KiB",
    "alignment": r"misaligned: access as .*, alignment 16, to buffer\(0\) byte",
    "struct_alignment": r"misaligned: access as .*Eight.*, alignment 16, to buffer\(1\) byte",
    "threadgroup_alignment": "misaligned: access as .*, alignment 16, to threadgroup a byte",
    "atomic_alignment": r"misaligned: .* buffer\(3\) byte 2",
}
needs_gcc = pytest.mark.skipif(is_clang(), reason="clang does not check where a class is copied from or to")
CLASS_ALIGNMENT = {"alignment", "struct_alignment", "threadgroup_alignment"}
FAULTS = {
    "kNoRelease",
    "kNoAcquire",
    "kAcquireForRelease",
    "kReleaseForAcquire",
    "kThreadgroupScope",
    "kThreadgroupFlags",
    "kFenceBeforeData",
}
SEEDS = range(120)
N_GROUPS = 6  # of the kernels in which the last threadgroup adds


def instantiations() -> str:
    lines = []
    for name in [*ALARMS, "groups_apart", "in_place"]:
        lines += [f'instantiate_kernel("{name}_{right}", {name}, {right})' for right in ("true", "false")]
    for fault in ["kRight", "kBarrierWithoutDevice", *FAULTS]:
        lines += [f'instantiate_kernel("last_adds_{fault}", last_adds, {fault}, true)']
        lines += [f'instantiate_kernel("last_adds_atomics_{fault}", last_adds_atomics, {fault})']
    lines += ['instantiate_kernel("last_adds_not_coherent", last_adds, kRight, false)']
    for t in ("half", "bfloat"):
        lines += [f'instantiate_kernel("{t}_to_float", convert, {t}, float)']
        lines += [f'instantiate_kernel("float_to_{t}", convert, float, {t})']
        lines += [f'instantiate_kernel("{t}_arithmetic", arithmetic, {t})']
    return "\n".join(["", *lines, ""])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel_host")


@pytest.fixture(scope="session")
def checked(folder: Path) -> Library:
    return build(TEXT + instantiations(), folder, path=PATH)


@pytest.fixture(scope="session")
def fast(folder: Path) -> Library:
    return build(TEXT + instantiations(), folder, path=PATH, mode="fast")


def buffers() -> dict[int, Any]:
    return {
        0: In(np.arange(64, dtype=np.float32)),
        1: Out(np.zeros(64, np.float32)),
        2: Out(np.zeros(64, np.float32)),
        3: InOut(np.zeros(2, np.uint32)),
    }


# ---- Alarms


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_gcc) if n in CLASS_ALIGNMENT else n for n in ALARMS])
def test_fault_is_reported(checked: Library, name: str) -> None:
    for seed in range(6):
        with pytest.raises(KernelError, match=ALARMS[name]):
            checked.run(f"{name}_false", buffers(), 1, 64, seed=seed, preempt=4 * (seed % 3))


@pytest.mark.parametrize("name", ALARMS)
def test_correct_twin_is_not(checked: Library, name: str) -> None:
    for seed in range(30):
        checked.run(f"{name}_true", buffers(), 1, 64, seed=seed, preempt=4 * (seed % 3))


def test_report_has_file_and_line(checked: Library) -> None:
    line = 1 + TEXT[: TEXT.index("// line of the fault")].count("\n")
    with pytest.raises(KernelError, match=rf" at \S+:{line}[, ]"):
        checked.run("bounds_false", buffers(), 1, 64)


def test_groups_that_write_the_same(checked: Library) -> None:
    for seed in range(10):
        checked.run("groups_apart_true", buffers(), 4, 16, seed=seed)
        with pytest.raises(KernelError, match=r"race: write of buffer\(1\) .* of threadgroup"):
            checked.run("groups_apart_false", buffers(), 4, 16, seed=seed)


# ---- Order between threadgroups


def last_adds(library: Library, name: str, seed: int) -> float:
    total = np.zeros(1, np.float32)
    bound = {1: Out(total), 2: InOut(np.zeros(N_GROUPS, np.float32)), 3: InOut(np.zeros(1, np.uint32))}
    library.run(name, bound, N_GROUPS, 32, seed=seed, resident_groups=1 + seed % N_GROUPS)
    return float(total[0])


TOTAL = N_GROUPS * (N_GROUPS + 1) / 2


def test_messages_pass_with_release_and_acquire(checked: Library) -> None:
    for seed in SEEDS:
        assert last_adds(checked, "last_adds_kRight", seed) == TOTAL
        assert last_adds(checked, "last_adds_atomics_kRight", seed) == TOTAL


@pytest.mark.parametrize("fault", sorted(FAULTS | {"kBarrierWithoutDevice"}))
def test_plain_data_with_a_wrong_fence_is_a_race(checked: Library, fault: str) -> None:
    for seed in SEEDS:
        try:  # pytest.raises takes longer than the run
            last_adds(checked, f"last_adds_{fault}", seed)
        except KernelError as error:
            assert "race: read of buffer(2)" in str(error)  # noqa: PT017
        else:
            pytest.fail(f"no race with seed {seed}")


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_atomic_data_with_a_wrong_fence_may_be_old(checked: Library, fault: str) -> None:
    totals = {last_adds(checked, f"last_adds_atomics_{fault}", seed) for seed in SEEDS}
    assert len(totals) > 1


def test_data_of_another_group_is_coherent(checked: Library) -> None:
    for seed in range(10):
        with pytest.raises(KernelError, match=r"not coherent: read of buffer\(2\)"):
            last_adds(checked, "last_adds_not_coherent", seed)


# ---- Buffers


def test_two_indices_of_one_array(checked: Library) -> None:
    for seed in range(10):
        a = np.arange(64, dtype=np.float32)
        run = checked.run("in_place_true", {0: In(a), 1: Out(a)}, 2, 32, seed=seed)
        np.testing.assert_array_equal(a, np.arange(64) + 1)
        assert (run.read, run.written) == ({0: 256, 1: 0}, {0: 0, 1: 256})
        with pytest.raises(KernelError, match=r"race: .* of buffer\([01]\)"):
            checked.run("in_place_false", {0: In(a), 1: Out(a)}, 2, 32, seed=seed)


def test_arrays_that_overlap(checked: Library) -> None:
    both = np.zeros(80, np.float32)
    checked.run("in_place_true", {0: In(both[:16]), 1: Out(both[16:32])}, 1, 16)
    with pytest.raises(KernelError, match="race"):
        checked.run("in_place_true", {0: In(both[:64]), 1: Out(both[16:])}, 2, 32)


def test_an_index_keeps_its_rights(checked: Library) -> None:
    a = np.zeros(64, np.float32)
    with pytest.raises(KernelError, match=r"read-only: write of buffer\(0\)"):
        checked.run("input_false", {0: In(a), 1: Out(a)}, 1, 64)


def test_offset(checked: Library) -> None:
    x, y = np.arange(70, dtype=np.float32), np.full(70, 7, np.float32)
    checked.run("bounds_true", {0: In(x, offset=24), 1: Out(y, offset=16, size=256)}, 1, 64)
    np.testing.assert_array_equal(y, np.concatenate([np.full(4, 7), x[6:], np.full(2, 7)]))
    with pytest.raises(KernelError, match="out-of-bounds: read"):
        checked.run("bounds_true", {0: In(x, offset=28), 1: Out(y)}, 1, 64)


@needs_gcc
def test_offset_keeps_its_alignment(checked: Library) -> None:
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    checked.run("alignment_true", {0: In(x, offset=16), 1: Out(y)}, 1, 64)
    with pytest.raises(KernelError, match="misaligned"):
        checked.run("alignment_true", {0: In(x, offset=4), 1: Out(y)}, 1, 64)


@needs_gcc
@pytest.mark.parametrize("mode", ["checked", "fast"])
def test_misaligned_access_ends_the_run_in_both_modes(mode: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(KernelError, match=r"misaligned: .* at kernels_under_test\.metal:\d+"):
        request.getfixturevalue(mode).run("alignment_false", buffers(), 1, 64)


def test_what_is_not_written_is_nan(checked: Library) -> None:
    y = np.zeros(64, np.float32)
    checked.run("groups_apart_true", {1: Out(y)}, 1, 16)
    assert (y[:16] == np.arange(16)).all()
    assert np.isnan(y[16:]).all()


def test_struct_is_larger_than_its_buffer(checked: Library) -> None:
    bound = {0: In(np.zeros(1, np.float32)), 1: Out(np.zeros(1, np.float16)), 2: In(np.ones(1, np.uint16))}
    with pytest.raises(KernelError, match=r"out-of-bounds: 4 bytes of buffer\(2\), which has 2 bytes"):
        checked.run("float_to_half", bound, 1, 1)


def test_unknown_kernel(checked: Library) -> None:
    with pytest.raises(KeyError, match=r"no kernel nothing, there are: .*bounds_true"):
        checked.run("nothing", {}, 1, 1)


def test_bytes_are_counted(checked: Library, fast: Library) -> None:
    n = 96
    bound = {
        0: In(np.zeros(4 * n, np.uint32)),
        1: In(np.zeros(n, np.float16)),
        2: Out(np.zeros(n, np.float16)),
        3: InOut(np.zeros(1, np.uint32)),
    }
    for check in (True, False):
        run = checked.run("traffic", bound, 3, 32, check=check)
        assert run.read == {0: 16 * n, 1: 2 * n + 2 * n // 4, 2: 0, 3: 4 * n}
        assert run.written == {0: 0, 1: 0, 2: 2 * n, 3: 4 * n}
    assert fast.run("traffic", bound, 3, 32).read == {}


# ---- Values


def nearest_bfloat(x: np.ndarray) -> np.ndarray:
    """Bits of the bfloat nearest to finite float32 values, ties to even, from distances in float64."""
    bits = x.view(np.uint32)
    down = (bits >> 16).astype(np.uint16)
    exponent_of_infinity = 2.0**128

    def magnitude(b: np.ndarray) -> np.ndarray:
        value = (b.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.where(np.isinf(value), exponent_of_infinity, np.abs(value))

    below = np.abs(x.astype(np.float64)) - magnitude(down)
    above = magnitude(down + np.uint16(1)) - np.abs(x.astype(np.float64))
    up = (above < below) | ((above == below) & (down % 2 == 1))
    return np.asarray(down + up, np.uint16)


def convert(library: Library, kernel: str, values: np.ndarray, to: Any) -> np.ndarray:
    result = np.zeros(values.size, to)
    bound = {0: In(values), 1: Out(result), 2: In(np.array([values.size], np.uint32))}
    library.run(kernel, bound, 4, 256, check=False)
    return result


@pytest.mark.parametrize("mode", ["checked", "fast"])
class TestValues:
    @pytest.fixture
    def library(self, mode: str, request: pytest.FixtureRequest) -> Any:
        return request.getfixturevalue(mode)

    def test_every_bfloat(self, library: Library) -> None:
        every = np.arange(65536, dtype=np.uint16)
        got = convert(library, "bfloat_to_float", every, np.uint32)
        np.testing.assert_array_equal(got, every.astype(np.uint32) << 16)

    def test_float_to_bfloat(self, library: Library) -> None:
        """Each bfloat, just above, around the middle to the next, and just below it."""
        upper = np.arange(65536, dtype=np.uint32)[:, None] << 16
        bits = upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        x = bits.reshape(-1).view(np.float32)
        got = convert(library, "float_to_bfloat", x, np.uint16)
        nan = np.isnan(x)
        assert np.isnan((got[nan].astype(np.uint32) << 16).view(np.float32)).all()
        finite = np.isfinite(x)
        np.testing.assert_array_equal(got[finite], nearest_bfloat(x[finite]))
        infinite = np.isinf(x)
        np.testing.assert_array_equal(got[infinite].astype(np.uint32) << 16, x[infinite].view(np.uint32))

    def test_every_half(self, library: Library) -> None:
        every = np.arange(65536, dtype=np.uint16).view(np.float16)
        got = convert(library, "half_to_float", every, np.float32)
        np.testing.assert_array_equal(got, every.astype(np.float32))

    @pytest.mark.filterwarnings("ignore:overflow")
    def test_float_to_half(self, library: Library) -> None:
        every = np.arange(65536, dtype=np.uint16).view(np.float16)
        finite = every[np.isfinite(every)].astype(np.float32)
        step = np.spacing(np.abs(finite).astype(np.float16)).astype(np.float32)
        middle = finite + np.copysign(step, finite) / 2  # exact in float32
        near = [np.nextafter(v, np.float32(to)) for v in (finite, middle) for to in (-np.inf, np.inf)]
        x = np.concatenate([finite, middle, *near, np.array([np.inf, -np.inf, np.nan], np.float32)])
        got = convert(library, "float_to_half", x, np.float16)
        np.testing.assert_array_equal(got, x.astype(np.float16))

    @pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
    def test_half_rounds_each_operation(self, library: Library) -> None:
        r = np.random.default_rng(0)
        a, b = (r.integers(0, 65536, 65536, np.uint16).view(np.float16) for _ in range(2))
        c = np.zeros_like(a)
        library.run("half_arithmetic", {0: In(a), 1: In(b), 2: Out(c)}, 256, 256, check=False)
        np.testing.assert_array_equal(c, a * b + a)

    def test_bfloat_rounds_each_operation(self, library: Library) -> None:
        r = np.random.default_rng(0)
        a, b = (r.normal(0, 1, 65536).astype(np.float32) for _ in range(2))
        a_bits, b_bits = nearest_bfloat(a), nearest_bfloat(b)
        c = np.zeros_like(a_bits)
        library.run("bfloat_arithmetic", {0: In(a_bits), 1: In(b_bits), 2: Out(c)}, 256, 256, check=False)
        a, b = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (a_bits, b_bits))
        product = (nearest_bfloat(a * b).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(c, nearest_bfloat(product + a))

    @pytest.mark.parametrize("width", [8, 32, 64])
    @pytest.mark.parametrize("threads", [1, 7, 31, 33, 40, 64])
    def test_lanes(self, library: Library, threads: int, width: int) -> None:
        out = [np.zeros(threads, np.int32) for _ in range(4)]
        library.run("lanes", {i: Out(a) for i, a in enumerate(out)}, 1, threads, simd_width=width)
        i = np.arange(threads)
        groups = [i[at : at + width] for at in range(0, threads, width)]
        np.testing.assert_array_equal(out[0], np.concatenate([np.full(g.size, (g + 1).sum()) for g in groups]))
        np.testing.assert_array_equal(out[1], np.concatenate([np.full(g.size, g.max()) for g in groups]))
        np.testing.assert_array_equal(out[2], np.where(i ^ 1 < threads, i ^ 1, i))
        np.testing.assert_array_equal(out[3], np.where(i < width, 3, 0) + 12)

    def test_positions(self, library: Library) -> None:
        at = np.zeros(8 * 6 * 6, np.uint32)
        library.run("positions", {0: Out(at)}, (2, 3, 2), (4, 2, 3))
        np.testing.assert_array_equal(at, np.arange(at.size))


# ---- Building

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def one_kernel(body: str) -> str:
    parameters = "device float* y [[buffer(0)]], uint i [[thread_position_in_threadgroup]]"
    return f"{HEAD}[[kernel]] void one({parameters}) {{\n{body}\n}}\n"


def test_metal_version(folder: Path) -> None:
    text = one_kernel("y[i] = __METAL_VERSION__;")
    for version in (310, 320):
        y = np.zeros(1, np.float32)
        build(text, folder, mode="fast", metal_version=version).run("one", {0: Out(y)}, 1, 1)
        assert y[0] == version


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("atomic_thread_fence(mem_flags::mem_device, memory_order_relaxed);", "atomic_thread_fence"),
        pytest.param("y[i] = y[i] * 0.5;", "double", marks=pytest.mark.skipif(is_clang(), reason="clang accepts it")),
        ("static_assert(sizeof(double) == 8);", "poisoned"),
        ("bfloat b = y[i];", "conversion"),
        ("}\n[[kernel]] void two(uint n [[thread_position_in_nowhere]]) {", "thread_position_in_nowhere"),
    ],
)
def test_text_that_does_not_compile(folder: Path, body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"kernel\.metal:[345]:.*{message}"):
        build(one_kernel(body), folder, metal_version=310)


def test_threadgroup_declaration_that_is_not_understood(folder: Path) -> None:
    message = "kernel.metal: not `threadgroup <type> <name>[<size>];`: threadgroup float a[4], b;"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(one_kernel("  threadgroup float a[4], b;"), folder)


@pytest.mark.skipif(why_no_lint() is not None, reason=str(why_no_lint()))
@pytest.mark.parametrize(
    "fault",
    [
        "device float* p = a;",
        "threadgroup float* p = y;",
        "thread float* p = &a[0];",
        "takes_device(a);",
        "device float* p = reinterpret_cast<device float*>(a);",
    ],
)
def test_lint_finds_mixed_address_spaces(folder: Path, fault: str) -> None:
    head = HEAD + "inline void takes_device(device const float*) {}\n"
    text = one_kernel(f"threadgroup float a[4];\ntakes_device(y);\n{fault}").replace(HEAD, head)
    (found,) = lint(text, folder)
    assert found.startswith("kernel.metal:7:")
    assert lint(text.replace(fault, "threadgroup float* p = a;"), folder) == []


@pytest.mark.skipif(why_no_lint() is not None, reason=str(why_no_lint()))
def test_lint_of_correct_kernels(folder: Path) -> None:
    assert lint(TEXT + instantiations(), folder, path=PATH) == []
