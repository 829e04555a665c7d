"""metal/gate.cu as MLX compiles it, run on the CPU on a ``Case`` as csrc/gate_cuda.cpp does; and NVRTC."""

import ctypes
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from gate_cases import Case

from .gate_kernel import Header, Result, alone_in, at_offset, from_raw, kernel_text, raw_type, result_types, to_raw
from .host import In, Library, Out, build

CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t"}


class Variant(NamedTuple):
    """What csrc/gate_cuda.cpp gives as template arguments."""

    x: mx.Dtype
    modulation: mx.Dtype
    residual: mx.Dtype
    modulates: bool
    branches: int
    terms: int
    packs: int
    aligned: bool

    @property
    def name(self) -> str:
        return "gate_rows_" + "_".join(str(a).lower().replace("mlx.core.", "") for a in self)


def variant_of(case: Case, packs: int, offset: int = 0) -> Variant:
    """The variant that csrc/gate_cuda.cpp takes."""
    return Variant(
        case.x.dtype,
        case.modulation[0].dtype,
        case.residual_dtype,
        case.shift is not None,
        len(case.residuals),
        len(case.residuals[0]) if case.residuals else 0,
        packs,
        case.x.shape[2] % 8 == 0 and offset % 16 == 0,
    )


def promoted(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return a if a == b else mx.float32


def kernel_of(header: Header, variant: Variant) -> str:
    """The kernel around the body as MLX's fast::cuda_kernel writes it."""
    body, inputs, outputs = header.cuda_kernel()
    x, modulation, residual = variant[:3]
    dtypes = dict.fromkeys([*inputs, *outputs], mx.float32) | {"force": mx.int32}
    dtypes |= {"x": x, "shift": modulation, "scale": modulation}
    dtypes |= {"anchor": promoted(x, modulation), "modulated": promoted(x, modulation)}
    dtypes |= {name: residual for name in inputs if name.startswith("residual")}
    dtypes |= {name: promoted(x, residual) for name in outputs if name.startswith("reused")}
    parameters = []
    for name in inputs:
        parameters.append(f"    const {CUDA_TYPES[dtypes[name]]}* {name}")
        if f"{name}_strides" in body:
            parameters.append(f"    const __grid_constant__ Strides {name}_strides")
        assert f"{name}_shape" not in body
        assert f"{name}_ndim" not in body
    parameters += [f"    {CUDA_TYPES[dtypes[name]]}* {name}" for name in outputs]
    constants = "".join(f"  using {n} = {CUDA_TYPES[t]};\n" for n, t in zip("XMR", variant[:3], strict=True))
    for name, number in zip(("BRANCHES", "TERMS", "PACKS"), variant[4:7], strict=True):
        constants += f"  constexpr int {name} = {number};\n"
    for name, flag in (("MODULATES", variant.modulates), ("ALIGNED", variant.aligned)):
        constants += f"  constexpr bool {name} = {str(flag).lower()};\n"
    signature = ",\n".join(parameters)
    return (
        "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {variant.name}(\n{signature}) {{\n{constants}\n{body}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


PRELUDE = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'


class CudaGate:
    """The kernels' text, built for some variants."""

    def __init__(self, folder: Path, variants: Iterable[Variant], *, mode: Any = "check", text: str = "") -> None:
        self.header = Header(folder)
        kernels = {v.name: kernel_of(self.header, v) for v in variants}
        text = PRELUDE + (text or kernel_text("gate.cu")) + "namespace cooperative_groups {}\n"
        for name, kernel in sorted(kernels.items()):
            text += f'{kernel}instantiate_kernel("{name}", mlx::core::cu::{name})\n'
        with alone_in(folder):
            self.library: Library = build(text, folder, mode=mode, path="kernel.cu")
        body, inputs, outputs = self.header.cuda_kernel()
        names = [given for name in inputs for given in (name, f"{name}_strides") if given == name or given in body]
        self.places = [*names, *outputs]  # the kernel's parameters

    def run(self, case: Case, *, offset: int = 0, max_threads: int = 0, **options: Any) -> Result:
        """One gate.

        Args:
            case: Its arguments.
            offset: Bytes before x in its buffer, as where x is a slice.
            max_threads: Of a block, if less than usual.
            options: Of ``Library.run``.
        """
        header, (batches, tokens, channels) = self.header, case.x.shape
        grid = header.grid(batches * tokens, channels, max_threads, cuda=True)
        variant = variant_of(case, grid.packs, offset)
        mod_type, reused_type = result_types(case)
        x, x_offset = at_offset(to_raw(case.x), offset)
        n = len(case.residuals)
        modulates = case.shift is not None
        shift, scale = case.modulation
        results = {
            "modulated": np.zeros(case.x.size if modulates else 0, raw_type(mod_type)),
            "reused0": np.zeros(case.x.size if n > 0 else 0, raw_type(reused_type)),
            "reused1": np.zeros(case.x.size if n > 1 else 0, raw_type(reused_type)),
            "partials": np.zeros(header.partials * grid.groups, np.float32),
            "new_state": np.zeros(8, np.float32),
        }
        params = header.params(case, grid, in_place=False)
        state = to_raw(case.state)
        arrays = {
            "x": In(x, x_offset, case.x.nbytes),
            "shift": In(to_raw(shift)),
            "scale": In(to_raw(scale)),
            "anchor": In(to_raw(case.anchor)),
            "weights": In(to_raw(case.weights) if n else state),
            "state": In(state),
            "force": In(np.full(1, case.force, np.int32)),
            "launch": In(np.zeros(0, np.float32)),
        }
        residuals = [to_raw(term) for branch in case.residuals for term in branch] or [to_raw(case.x)]
        for i in range(header.max_residuals):
            arrays[f"residual{i}"] = In(residuals[i if i < len(residuals) else 0])
        runs = []
        for decides in (False, True):
            strides = np.zeros(20, np.int32)
            strides[: params.size // 4] = params.view(np.int32)
            strides[params.size // 4] = decides
            given = arrays | {"launch_strides": In(strides.view(np.int64))}
            given["sums"] = In(results["partials"] if decides else state)
            for name, array in results.items():  # of the other launch: without elements
                given[name] = Out(array if (name == "new_state") == decides else array[:0])
            groups, threads = (1, header.cuda_threads) if decides else (grid.groups, grid.threads)
            bound = dict(enumerate(given[name] for name in self.places))
            runs.append(self.library.run(variant.name, bound, groups, threads, **options))
        return Result(
            from_raw(results["modulated"], mod_type, case.x.shape) if modulates else case.x,
            [from_raw(results[f"reused{b}"], reused_type, case.x.shape) for b in range(n)],
            mx.array(results["new_state"]),
            results["partials"],
            0,
            runs,
        )


# ---- NVRTC


def nvrtc_folder() -> Path | None:
    """Where the nvidia-cuda-* packages of CUDA 13 are; None if NVRTC is not."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) / "cu13" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((f for f in folders if (f / "lib" / "libnvrtc.so.13").exists()), None)


class CompileError(Exception):
    pass


def compile_with_nvrtc(source: str, architecture: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """``source`` compiled as MLX does: what NVRTC made, SASS for ``sm_90`` and PTX for ``compute_90``, and its log."""
    folder = nvrtc_folder()
    assert folder is not None
    nvrtc = ctypes.CDLL(str(folder / "lib" / "libnvrtc.so.13"))
    header = Path(__file__).parent / "include/mlx/backend/cuda/device/utils.cuh"
    headers = (ctypes.c_char_p * 1)(header.read_bytes())
    names = (ctypes.c_char_p * 1)(b"mlx/backend/cuda/device/utils.cuh")
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gate.cu", 1, headers, names) == 0
    try:
        flags = ["--device-as-default-execution-space", f"--gpu-architecture={architecture}", *options]
        flags += [f"--include-path={path}" for path in (folder / "include", folder / "include" / "cccl")]
        c_flags = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        code = nvrtc.nvrtcCompileProgram(program, len(flags), c_flags)

        def get(what: str) -> bytes:
            size = ctypes.c_size_t()
            assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
            text = ctypes.create_string_buffer(size.value)
            assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
            return text.raw

        log = get("ProgramLog").rstrip(b"\0").decode()
        if code:
            raise CompileError(log)
        return get("CUBIN" if architecture.startswith("sm_") else "PTX"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
