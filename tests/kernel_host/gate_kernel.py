"""Runs metal/gate.metal on a ``Case`` as csrc/gate_metal.cpp does, by the shared header's indices and grid."""

import contextlib
import ctypes
import fcntl
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from gate_cases import Case

from .host import HERE, In, InOut, Library, Out, Run, build, compile_file

ROOT = HERE.parent.parent
INCLUDES = (ROOT / "metal", ROOT / "csrc")
METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


def kernel_text(kernel: str = "gate.metal") -> str:
    """What MLX compiles at run time, but for the instantiations or signatures."""
    spec = importlib.util.spec_from_file_location("embed_kernel", ROOT / "cmake" / "embed_kernel.py")
    assert spec
    assert spec.loader
    embed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(embed)
    text: str = embed.amalgamate([ROOT / f for f in ("csrc/gate_decision.h", "metal/gate_params.h", f"metal/{kernel}")])
    return text


class Variant(NamedTuple):
    """Template arguments of the kernel, in its order."""

    x: str
    modulation: str
    residual: str
    modulates: bool
    branches: int
    terms: int
    packs: int
    aligned: bool
    one_dispatch: bool

    @property
    def arguments(self) -> str:
        return ", ".join(str(a).lower() for a in self)

    @property
    def name(self) -> str:
        return "gate_" + self.arguments.replace(", ", "_")


class Grid(NamedTuple):
    threads: int
    rows_per_group: int
    groups: int
    packs: int


@dataclass
class Result:
    modulated: mx.array
    reused: list[mx.array]
    state: mx.array
    partials: np.ndarray
    counter: int
    runs: list[Run] = field(default_factory=list)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Test processes share the folder: the first one builds, the others find it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Header:
    """metal/gate_params.h, by way of gate_host.cpp."""

    def __init__(self, folder: Path) -> None:
        path = folder / "gate_host.so"
        with alone_in(folder):
            if not path.exists():
                flags = ["-std=c++20", "-O1", "-fPIC", "-shared", *(f"-I{d}" for d in INCLUDES)]
                compile_file([*flags, str(HERE / "gate_host.cpp")], path)
        self._library = ctypes.CDLL(str(path))
        self.partials: int = self._library.gate_host_partials()
        self.max_residuals: int = self._library.gate_host_max_residuals()
        self.cuda_threads: int = self._library.gate_host_cuda_threads()

    def buffer(self, name: str) -> int:
        index: int = self._library.gate_host_buffer(name.encode())
        assert index >= 0, name
        return index

    def grid(self, rows: int, channels: int, max_threads: int = 0, *, cuda: bool = False) -> Grid:
        out = (ctypes.c_uint * 4)()
        self._library.gate_host_grid(cuda, rows, channels, max_threads, out)
        return Grid(*out)

    def cuda_kernel(self) -> tuple[str, list[str], list[str]]:
        """The CUDA kernel's body, inputs and outputs."""
        self._library.gate_host_cuda.restype = ctypes.c_char_p
        body, inputs, outputs = (self._library.gate_host_cuda(i).decode() for i in range(3))
        return body, inputs.split(), outputs.split()

    def params(self, case: Case, grid: Grid, in_place: bool) -> np.ndarray:
        shift, _ = case.modulation
        shift = shift if shift.ndim == 3 else shift[:, None]
        low, high = case.calibrated_range or (0.0, 0.0)
        numbers = [*case.coefficients, low, high, case.threshold, case.eps]
        out = np.zeros(256, np.uint8)
        size = self._library.gate_host_params(
            (ctypes.c_uint * 5)(*case.x.shape, *shift.shape[:2]),
            (ctypes.c_float * 9)(*numbers),
            case.calibrated_range is not None,
            case.max_consecutive_skips,
            in_place,
            (ctypes.c_uint * 4)(*grid),
            out.ctypes.data_as(ctypes.c_void_p),
        )
        return out[:size]


def to_raw(a: mx.array) -> np.ndarray:
    """The array's memory; bfloat16 as its bits."""
    flat = mx.contiguous(a).reshape(-1)
    return np.array(flat.view(mx.uint16) if a.dtype == mx.bfloat16 else flat)


def from_raw(a: np.ndarray, dtype: mx.Dtype, shape: Sequence[int]) -> mx.array:
    got = mx.array(a)
    return (got.view(mx.bfloat16) if dtype == mx.bfloat16 else got).reshape(shape)


def raw_type(dtype: mx.Dtype) -> type[np.generic]:
    return {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}[dtype]


def at_offset(raw: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
    """The same elements ``offset`` bytes into a larger array of NaN bits, and that offset."""
    if offset == 0:
        return raw, 0
    larger = np.full(raw.nbytes + 64, 0xFF, np.uint8)
    larger[offset : offset + raw.nbytes] = raw.view(np.uint8)
    return larger[: (offset + raw.nbytes + 15) // 16 * 16].view(raw.dtype), offset


class GateKernel:
    """The kernel's text, built for some variants."""

    def __init__(
        self,
        folder: Path,
        variants: Iterable[Variant],
        *,
        mode: Any = "check",
        metal_version: int = 320,
        text: str = "",
    ) -> None:
        lines = [f'instantiate_kernel("{v.name}", gate, {v.arguments})' for v in sorted(set(variants))]
        text = (text or kernel_text()) + "\n" + "\n".join(lines) + "\n"
        self.header = Header(folder)
        with alone_in(folder):
            self.library: Library = build(text, folder, mode=mode, metal_version=metal_version)

    def run(
        self,
        case: Case,
        *,
        one_dispatch: bool = True,
        max_threads: int = 0,
        offset: int = 0,
        donate: bool = True,
        counter: int = 0,
        **options: Any,
    ) -> Result:
        """One gate.

        Args:
            case: Its arguments.
            one_dispatch: Whether the last threadgroup decides, or a second dispatch.
            max_threads: What the pipeline admits, if less than usual.
            offset: Bytes before x in its buffer, as where x is a slice.
            donate: Whether ``modulated`` has the anchor's memory.
            counter: Its value before.
            options: Of ``Library.run``.
        """
        header, (batches, tokens, channels) = self.header, case.x.shape
        grid = header.grid(batches * tokens, channels, max_threads)
        variant = variant_of(case, grid.packs, one_dispatch=one_dispatch, offset=offset)
        mod_type, reused_type = result_types(case)
        size = case.x.size
        modulates = case.shift is not None
        donate &= modulates
        shift, scale = case.modulation
        x, x_offset = at_offset(to_raw(case.x), offset)
        anchor = to_raw(case.anchor)
        modulated = anchor if donate else np.zeros(size, raw_type(mod_type))
        reused = [np.zeros(size, raw_type(reused_type)) for _ in case.residuals]
        new_state = np.zeros(8, np.float32)
        partials = np.zeros(header.partials * grid.groups, np.uint32)
        count = np.full(1, counter, np.uint32)
        params = header.params(case, grid, donate)

        nothing = np.zeros(1, np.float32)
        b = header.buffer
        bound: dict[int, Any] = {
            b("x"): In(x, x_offset, case.x.nbytes),
            b("shift"): In(to_raw(shift)),
            b("scale"): In(to_raw(scale)),
            # Metal may reorder accesses by different arguments, so a donated anchor must be read as `modulated`.
            b("anchor"): In(np.frombuffer(b"\xff" * anchor.nbytes, anchor.dtype) if donate else anchor),
            b("weights"): In(to_raw(case.weights)),
            b("state"): In(to_raw(case.state)),
            b("force"): In(np.full(1, case.force, np.int32)),
            b("modulated"): InOut(modulated) if donate else Out(modulated if modulates else nothing),
            b("new_state"): Out(new_state),
            b("reused0"): Out(reused[0] if reused else nothing),
            b("reused1"): Out(reused[-1] if reused else nothing),
            b("partials"): Out(partials),
            b("counter"): InOut(count),
            b("params"): In(params),
        }
        residuals = [to_raw(term) for branch in case.residuals for term in branch] or [to_raw(case.x)]
        for i in range(header.max_residuals):
            bound[b("residual0") + i] = In(residuals[i if i < len(residuals) else 0])
        runs = [self.library.run(variant.name, bound, grid.groups, grid.threads, **options)]
        if not one_dispatch:
            second = {b(name): bound[b(name)] for name in ("state", "force", "new_state", "params")}
            second[b("partials")] = In(partials)
            runs.append(self.library.run("gate_decide_sums", second, 1, 256, **options))
        return Result(
            from_raw(modulated, mod_type, case.x.shape) if modulates else case.x,
            [from_raw(r, reused_type, case.x.shape) for r in reused],
            mx.array(new_state),
            partials.view(np.float32),
            int(count[0]),
            runs,
        )


def result_types(case: Case) -> tuple[mx.Dtype, mx.Dtype]:
    return mx.result_type(case.x, case.modulation[0]), mx.result_type(case.x, mx.zeros(0, case.residual_dtype))


def variant_of(case: Case, packs: int, *, one_dispatch: bool = True, offset: int = 0) -> Variant:
    """The variant that csrc/gate_metal.cpp takes."""
    return Variant(
        METAL_TYPES[case.x.dtype],
        METAL_TYPES[case.modulation[0].dtype],
        METAL_TYPES[case.residual_dtype],
        case.shift is not None,
        len(case.residuals),
        len(case.residuals[0]) if case.residuals else 0,
        packs,
        case.x.shape[2] % 8 == 0 and offset % 16 == 0,
        one_dispatch,
    )
