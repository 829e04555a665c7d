"""Builds the text of a .metal or .cu kernel as C++ and runs it, one fibre for each GPU thread (runtime.cpp).

``mode="check"`` reports what Metal leaves undefined or forbids, and counts bytes; ``mode="fast"`` only computes.
With g++; clang 15 or newer does too, but says nothing of a misaligned access to a whole vector or struct.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

HERE = Path(__file__).resolve().parent
MAX_BUFFERS = 31  # of a Metal kernel
SOURCES = [HERE / name for name in ("runtime.cpp", "runtime.h", "fibre.h", "memory_model.h")]
SOURCES += [HERE / "include" / name for name in ("metal_stdlib", "cuda_host.h")]

Array = npt.NDArray[Any]
Size = int | tuple[int, ...]


class KernelError(AssertionError):
    """What the checker found, one line for each problem."""


@dataclasses.dataclass(frozen=True)
class _Bound:
    array: Array
    offset: int = 0  # in bytes, as MLX binds an array that begins inside a buffer
    size: int | None = None  # in bytes; None: to the array's end


class In(_Bound):
    """An array that the kernel may only read."""


class Out(_Bound):
    """An array that the kernel writes; all bits are set before, a NaN in each floating type."""


class InOut(_Bound):
    """An array that the kernel reads and writes."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Bytes that the kernel read and wrote by buffer index, device and constant memory; empty in fast mode.

    They are those of the compiled accesses: a value that the text reads twice in a row may be read once.
    """

    read: dict[int, int]
    written: dict[int, int]


# ---- Building


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler: CXX, else g++, else clang++."""
    if cxx := os.environ.get("CXX"):
        return tuple(cxx.split())
    found = shutil.which("g++") or shutil.which("clang++")
    return (found,) if found else ()


@functools.cache
def is_clang() -> bool:
    command = [*compiler(), "-dM", "-E", "-x", "c++", os.devnull]
    return "__clang__" in subprocess.run(command, capture_output=True, text=True, check=False).stdout


def compile_file(arguments: Sequence[str], output: Path) -> None:
    """Runs the compiler; ``output`` appears when it is whole, whoever else makes it."""
    part = output.with_name(f"{output.name}.{os.getpid()}")
    command = [*compiler(), *arguments, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:20_000]}")
    part.replace(output)


def _flags(mode: str) -> list[str]:
    flags = ["-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    if sys.platform == "darwin":
        flags += ["-D_XOPEN_SOURCE=600", "-D_DARWIN_C_SOURCE", "-Wno-deprecated-declarations"]
    if not is_clang():
        flags += ["-fno-gnu-unique"]  # each library has its own statics
    if mode == "runtime":
        return [*flags, "-O2", "-Wall", "-Wextra"]
    # Casts between element types and words are the rule in kernels; an unknown attribute would become a buffer; what
    # is a double here is a float in Metal.
    flags += ["-fno-strict-aliasing", "-fno-exceptions", "-fsanitize=alignment"]
    flags += ["-Werror=attributes", "-Werror=return-type"]
    if not is_clang():  # where the warning is of half to float too
        flags += ["-Werror=double-promotion"]
    if mode == "fast":
        return [*flags, "-O2"]
    if is_clang():
        options = ["-tsan-distinguish-volatile=1", "-tsan-instrument-read-before-write=1"]
        return [*flags, "-O1", "-fsanitize=thread", *(f for o in options for f in ("-mllvm", o))]
    return [*flags, "-O1", "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]


_VARIABLE = re.compile(
    r"^(?P<indent>[ \t]*)(?:threadgroup|__shared__)\s+"
    r"(?P<type>(?:alignas\([^()]*\)\s*)?[A-Za-z_][\w:]*(?:\s*<[^<>;]*>)?)\s+"
    r"(?P<name>\w+)\s*(?P<dimensions>(?:\[[^\]]*\]\s*)*);",
    re.MULTILINE,
)
_UNREAD_VARIABLE = re.compile(r"^[ \t]*(?:threadgroup|__shared__)\s+[^*(&)]*;", re.MULTILINE)
_KERNEL = re.compile(r"(template\s*<[^{};]*>\s*)?(?:\[\[kernel\]\]|\bkernel)\s+void\s+(\w+)\s*\(")


def _as_cpp(text: str, path: str) -> str:
    """The one change of the text: declarations of threadgroup or shared variables. Line numbers stay."""

    def declaration(m: re.Match[str]) -> str:
        dimensions = m["dimensions"].strip()
        return f"{m['indent']}KERNEL_HOST_THREADGROUP_VARIABLE({m['name']}, {dimensions}, {m['type']});"

    text = _VARIABLE.sub(declaration, text)
    if unread := _UNREAD_VARIABLE.search(text):
        raise ValueError(f"{path}: not `threadgroup <type> <name>[<size>];`: {unread[0].strip()}")
    plain = [m[2] for m in _KERNEL.finditer(text) if not m[1]]  # Metal finds these by their names
    names = "".join(f'instantiate_kernel("{name}", {name})\n' for name in plain)
    return f'#line 1 "{path}"\n{text}\n{names}'


def _include_flags(include_dirs: Sequence[Path | str]) -> list[str]:
    return [f"-I{d}" for d in [HERE / "include", *include_dirs]]


def build(
    text: str,
    folder: Path | str,
    *,
    mode: Literal["check", "fast"] = "check",
    path: Path | str = "kernel.metal",
    metal_version: int = 320,
    include_dirs: Sequence[Path | str] = (),
) -> "Library":
    """Compiles a kernel's text, or finds in ``folder`` what an earlier call compiled from the same text.

    Args:
        text: The .metal file's text and its ``instantiate_kernel`` lines.
        folder: Where all files go. The runtime is compiled once for each folder.
        mode: "check" reports and counts; "fast" does neither, for real sizes.
        path: The name of ``text`` in error messages.
        metal_version: ``__METAL_VERSION__``, such as 310 or 320.
        include_dirs: Of the headers that the text includes; those are part of what must be the same.

    Raises:
        RuntimeError: The text does not compile; has the compiler's output.
        ValueError: A threadgroup variable's declaration is not understood.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = _as_cpp(text, str(path))
    headers = [h.read_text() for d in include_dirs for h in sorted(Path(d).glob("*.h"))]
    key = [*(s.read_text() for s in SOURCES), *headers, source, mode, str(metal_version), *compiler()]
    stem = folder / f"{mode}_{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}"
    library = stem.with_suffix(".so")
    if not library.exists():
        runtime = folder / "runtime.o"
        if not runtime.exists() or runtime.stat().st_mtime < max(s.stat().st_mtime for s in SOURCES):
            compile_file([*_flags("runtime"), "-c", str(HERE / "runtime.cpp")], runtime)
        generated, compiled = stem.with_suffix(".cpp"), stem.with_suffix(".o")
        generated.write_text(source)
        version = f"-D__METAL_VERSION__={metal_version}"
        compile_file([*_flags(mode), version, *_include_flags(include_dirs), "-c", str(generated)], compiled)
        libraries = [] if sys.platform == "darwin" else ["-ldl"]
        compile_file(["-shared", str(compiled), str(runtime), *libraries], library)
    return Library(library)


# ---- Running


class _Buffer(ctypes.Structure):
    """``Buffer`` of runtime.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("bytes", "offset", "size", "memory", "memory_offset", "granule")),
        *((name, ctypes.c_uint32) for name in ("initialised", "writable", "bound")),
        *((name, ctypes.c_uint64) for name in ("read", "written")),
    ]


class _Options(ctypes.Structure):
    """``Options`` of runtime.cpp."""

    _fields_ = [
        ("groups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("simd_width", "resident_groups")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("check", "weak", "preempt")),
    ]


def _triple(size: Size) -> tuple[int, ...]:
    return (*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3]


def _memories(buffers: Mapping[int, _Bound]) -> dict[int, tuple[int, int]]:
    """Of each buffer, its memory's number and its array's place there. Arrays that overlap share a memory."""
    places: dict[int, tuple[int, int]] = {}
    memory, begin, end = -1, 0, 0
    for index in sorted(buffers, key=lambda i: buffers[i].array.ctypes.data):
        array = buffers[index].array
        if memory < 0 or array.ctypes.data >= end:
            memory, begin, end = memory + 1, array.ctypes.data, array.ctypes.data
        end = max(end, array.ctypes.data + array.nbytes)
        places[index] = (memory, array.ctypes.data - begin)
    return places


class Library:
    """Compiled kernels. Made by ``build``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_checked = path.name.startswith("check")
        self._library = ctypes.CDLL(str(path))

    def run(
        self,
        kernel: str,
        buffers: Mapping[int, _Bound],
        groups: Size,
        threads: Size,
        *,
        seed: int = 0,
        simd_width: int = 32,
        resident_groups: int = 4,
        check: bool = True,
        weak: bool = True,
        preempt: int = 0,
    ) -> Run:
        """Runs a kernel once.

        Args:
            kernel: Its name in an ``instantiate_kernel`` line, or of the function if that is no template.
            buffers: In, Out or InOut by buffer index. Arrays that share memory do so in the kernel too, each with the
                rights of its own index.
            groups: Threadgroups in the grid, one to three axes.
            threads: Threads in a threadgroup, likewise.
            seed: Of the schedule: which groups start first, who runs next.
            simd_width: Lanes of a SIMD-group; the last one of a threadgroup may have fewer.
            resident_groups: Threadgroups that run at a time.
            check: Whether a library of mode "check" checks. Without, it counts only, at real sizes too.
            weak: Relaxed loads may see any value that the model allows, not only the newest.
            preempt: Another thread may run before one in so many plain accesses; 0: at synchronisation only.

        Raises:
            KernelError: The kernel did something that Metal leaves undefined or forbids.
        """
        c_buffers = (_Buffer * MAX_BUFFERS)()
        places = _memories(buffers)
        for index, b in buffers.items():
            array = b.array
            size = array.nbytes - b.offset if b.size is None else b.size
            if not array.flags.c_contiguous or (not isinstance(b, In) and not array.flags.writeable):
                raise ValueError(f"buffer {index} must be contiguous, and writable unless it is In")
            if not 0 <= b.offset <= b.offset + size <= array.nbytes:
                raise ValueError(f"buffer {index} has {array.nbytes} bytes, got offset {b.offset} and size {size}")
            memory, memory_offset = places[index]
            c_buffers[index] = _Buffer(
                data=array.ctypes.data,
                bytes=array.nbytes,
                offset=b.offset,
                size=size,
                memory=memory,
                memory_offset=memory_offset,
                granule=min(array.itemsize, 4) if array.dtype.kind in "biuf" else 1,
                initialised=not isinstance(b, Out),
                writable=not isinstance(b, In),
                bound=1,
            )
        options = _Options(
            groups=_triple(groups),
            threads=_triple(threads),
            simd_width=simd_width,
            resident_groups=resident_groups,
            seed=seed,
            check=check and self.is_checked,
            weak=weak,
            preempt=preempt,
        )
        text = ctypes.create_string_buffer(16384)
        code = self._library.kernel_host_run(
            kernel.encode(), c_buffers, ctypes.byref(options), text, ctypes.c_size_t(len(text))
        )
        if code == 2:
            raise KeyError(f"no kernel {kernel}, there are: {text.value.decode()}")
        if code:
            raise KernelError(self._with_lines(text.value.decode().strip()))
        counted = buffers if self.is_checked else ()
        return Run(
            read={i: c_buffers[i].read for i in counted},
            written={i: c_buffers[i].written for i in counted},
        )

    def _with_lines(self, text: str) -> str:
        """Addresses as file:line, innermost of inlined calls first."""
        return re.sub(r"pc\+(0x[0-9a-f]+)", lambda m: _source_lines(self.path, m[1]) or m[0], text)


@functools.cache
def _source_lines(library: Path, address: str) -> str:
    tool = shutil.which("addr2line")
    if tool is None:
        return ""
    command = [tool, "-i", "-e", str(library), address]
    frames = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return " < ".join(f.rsplit("/", 1)[-1].split(" (")[0] for f in frames if "metal_stdlib" not in f)


# ---- What may be missing


@functools.cache
def why_unavailable() -> str | None:
    """Why kernels cannot be run here, for a test's skip; None if they can."""
    if not compiler():
        return "kernels cannot be run here: no C++ compiler (g++ or clang++, or CXX)"
    if sys.platform.startswith("linux"):
        return None
    # Elsewhere a kernel with a barrier is tried, in a process of its own since a fibre switch may crash.
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode == 0:
        return None
    reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
    return f"kernels cannot be run on {sys.platform}: {reason}"


_PROBE = """
import tempfile
import numpy as np
from kernel_host import In, Out, build
text = '''
#include <metal_stdlib>
using namespace metal;
[[kernel]] void probe(device float* y [[buffer(0)]], uint i [[thread_position_in_threadgroup]]) {
  threadgroup float a[64];
  a[i] = float(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[63 - i];
}
'''
with tempfile.TemporaryDirectory() as folder:
    y = np.zeros(64, np.float32)
    build(text, folder).run("probe", {0: Out(y)}, 1, 64)
    assert (y == np.arange(64)[::-1]).all()
"""


def why_no_lint() -> str | None:
    """Why ``lint`` cannot be used here; None if it can."""
    return None if shutil.which("clang++") else "address spaces are not checked here: no clang++"


def warnings(
    text: str, folder: Path | str, *, path: Path | str = "kernel.metal", metal_version: int = 320
) -> list[str]:
    """Clang's of an optimised build, with -Wall: of unrolling that fails too, as Metal's compiler says them."""
    source = Path(folder) / "warnings.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(_as_cpp(text, str(path)))
    flags = [
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-fno-exceptions",
        "-c",
        "-o",
        str(source.with_suffix(".o")),
    ]
    flags += [f"-D__METAL_VERSION__={metal_version}", *_include_flags([])]
    done = subprocess.run(["clang++", *flags, str(source)], capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if re.search("(warning|error): ", line)]


_ADDRESS_SPACE = re.compile(r"(?:error|note): .*(?:address[_ ]space|'[^']*\b(?:device|threadgroup|constant)\b[^']*')")


def lint(
    text: str,
    folder: Path | str,
    *,
    path: Path | str = "kernel.metal",
    metal_version: int = 320,
    include_dirs: Sequence[Path | str] = (),
) -> list[str]:
    """Where pointers and references mix device, constant, threadgroup and thread, as clang's errors.

    Clang's C++ has no copy of a class from or to an address space, which Metal has: such errors are left out, and with
    them mistakes in the same statement. C-style casts may change the address space unseen.
    """
    source = Path(folder) / "lint.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(_as_cpp(text, str(path)))
    flags = ["-std=c++20", "-fsyntax-only", "-w", "-ferror-limit=0", "-ftemplate-backtrace-limit=1"]
    flags += ["-DKERNEL_HOST_LINT", f"-D__METAL_VERSION__={metal_version}", *_include_flags(include_dirs)]
    done = subprocess.run(["clang++", *flags, str(source)], capture_output=True, text=True, check=False)
    found = []
    for diagnosis in re.split(r"\n(?=\S+:\d+:\d+: error: )", done.stderr):
        first = diagnosis.split("\n", 1)[0]
        of_copy = re.search("no matching constructor|no viable|changes address space of 'this'", first)
        of_call = "no matching function for call" in first and _ADDRESS_SPACE.search(diagnosis, len(first))
        if not of_copy and (of_call or _ADDRESS_SPACE.search(first)):
            found.append(first)
    return found
