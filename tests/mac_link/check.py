# /// script
# requires-python = ">=3.11"
# dependencies = ["ziglang==0.17.0", "lief==1.0.0", "cmake==4.4.4", "ninja==1.13.2"]
# ///
"""Compiles and links the extension for macOS on another system: `make check-mac`.

CMakeLists.txt is configured for macOS and compiles as it does there, against the macOS packages of MLX and nanobind of
each release in mlx_releases.json, with clang and Apple's public headers as zig carries them. Where CMake would install
it and where it looks for MLX is read. Then everything is linked and nothing may stay undefined. A library offers for
that:

    libmlx       what it exports: its headers also declare what is hidden
    libc++       what MLX's own binaries import, as this much is there on the oldest macOS that they are built for
    libobjc      the same
    CPython      what nanobind lists for Apple's linker
    libSystem    all that zig knows of it, whichever version of macOS it came with

That proves types, overloads, MLX's symbols and the floor in libc++. It does not prove that the extension loads on a
Mac, that the Metal kernels compile there, or what any of it does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import lief
import ziglang

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "check-mac"

MACOS = "14.0"  # the oldest that MLX has packages for
ZIG = Path(ziglang.__file__).with_name("zig")
TARGET = ["-target", f"aarch64-macos.{MACOS}"]
FLAGS = [
    f"-isystem '{HERE / 'shim'}'",
    # As Apple's clang: no operator delete with a size, and nothing in libc++ that is newer than MACOS.
    "-fno-sized-deallocation",
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
]
LIBCXX, LIBOBJC = "/usr/lib/libc++.1.dylib", "/usr/lib/libobjc.A.dylib"
WEAK_LOOKUP = -3  # in place of a library: any that has it, as with operator new, which a program may replace
# Mangled names of MLX, and of metal-cpp's tables of classes and selectors, which are in libmlx too.
IS_MLX = re.compile(r"3mlx4core|N(3MTL|2NS|2CA)7Private")


def run(command: Iterable[str | Path], cwd: str | Path = ROOT, **env: str) -> None:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=os.environ | env)
    if done.returncode:
        sys.exit(done.returncode)


def quiet(command: Iterable[str | Path], **env: str) -> None:
    done = subprocess.run(
        [str(c) for c in command], env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(done.stdout)


def zig_cache() -> dict[str, str]:
    return {"ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"), "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig")}


def readable(name: str) -> str:
    """The qualified name in a mangled one; c++filt, where there is one, says all of it."""
    parts, rest = [], re.sub(r"^__Z(T[ISV])?(N[KVRO]*)?", "", name)
    while length := re.match(r"\d+", rest):
        start, end = length.end(), length.end() + int(length[0])
        parts.append(rest[start:end])
        rest = rest[end:]
    return "::".join(parts) or name


def tool(name: str, command: str) -> Path:
    """A program for CMake. MLX's CMake files name a folder in Xcode, about which zig would warn for each file."""
    script = WORK / "bin" / name
    script.parent.mkdir(parents=True, exist_ok=True)
    drop = 'for a do shift; case $a in -F*) ;; *) set -- "$@" "$a" ;; esac; done'
    script.write_text(f'#!/bin/sh\n{drop}\nexec "{ZIG}" {command} "$@"\n')
    script.chmod(0o755)
    return script


def python_headers() -> Path:
    """This Python's headers. Debian's pyconfig.h finds the real one by the target, and has none for macOS."""
    source, headers = Path(sysconfig.get_path("include")), WORK / "python"
    shutil.copytree(source, headers, dirs_exist_ok=True)
    real = source.parent / str(sysconfig.get_config_var("MULTIARCH")) / source.name / "pyconfig.h"
    if real.exists():
        shutil.copy2(real, headers)  # with its time, or all is compiled again
    return headers


def packages(mlx: str, nanobind: str) -> Path:
    """The folder with the macOS packages, which any one Python version can unpack."""
    wanted = [f"mlx=={mlx}", f"mlx-metal=={mlx}", f"nanobind=={nanobind}"]
    folder = WORK / f"mlx-{mlx}" / "packages"
    complete = folder / "complete.txt"
    if not complete.exists() or complete.read_text().split() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        install = [os.environ.get("UV", "uv"), "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        install += ["--python", sys.executable, "--python-platform", "aarch64-apple-darwin"]
        install += ["--python-version", "3.12", "--target", str(folder), *wanted]
        run(install, cwd=ROOT.anchor, MACOSX_DEPLOYMENT_TARGET=MACOS)  # in ROOT, pyproject.toml's overrides would hold
        complete.write_text("\n".join(wanted))
    return folder


def compile_objects(folder: Path, headers: Path) -> list[Path]:
    """The extension's object files and nanobind's, by CMake's rules for macOS."""
    build = folder.with_name("build")
    env = {"PYTHONPATH": str(folder), **zig_cache()}
    options = {
        "CMAKE_SYSTEM_NAME": "Darwin",
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_CXX_COMPILER": tool("c++", " ".join(["c++", *TARGET])),
        "CMAKE_CXX_FLAGS": " ".join(FLAGS),
        "CMAKE_AR": tool("ar", "ar"),
        "CMAKE_RANLIB": tool("ranlib", "ranlib"),
        "CMAKE_INSTALL_NAME_TOOL": "unused",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": headers,
    }
    define = [f"-D{key}={value}" for key, value in options.items()]
    quiet(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *define], **env)
    installs = (build / "cmake_install.cmake").read_text()
    place = folder.parent.name.replace("-", "_", 1)
    for wanted in (f'/mlx_teacache_fast/{place}"', '-add_rpath "@loader_path/../../mlx/lib"'):
        if wanted not in installs:
            sys.exit(f"what CMake installs must have {wanted}, got\n{installs}")
    compiled = json.loads((build / "compile_commands.json").read_text())
    objects = [Path(build, c["output"]) for c in compiled]
    # The objects alone: Apple's linker options are not for zig.
    run(["ninja", "-C", build, "--quiet", *(o.relative_to(build) for o in objects)], **env)
    return objects


def binary(file: Path) -> lief.MachO.Binary:
    """Keep it in a variable: what comes out of it does not keep it alive."""
    parsed = lief.MachO.parse(file)
    assert parsed is not None, file
    arm64 = parsed.take(lief.MachO.Header.CPU_TYPE.ARM64)
    assert arm64 is not None, file
    return arm64


def undefined(objects: Iterable[Path]) -> dict[str, str]:
    """What the object files leave undefined, and the first of them that does."""
    wanted: dict[str, str] = {}
    defined = set()
    for file in objects:
        parsed = binary(file)
        for s in parsed.symbols:
            if s.raw_type & 0xE0:  # for the debugger
                continue
            if s.raw_type & 0x0E:
                defined.add(s.name)
            else:
                wanted.setdefault(s.name, file.name)
    return {name: file for name, file in wanted.items() if name not in defined}


def imports(file: Path) -> dict[str, set[str]]:
    """What an MLX binary takes from each library of the system."""
    found: dict[str, set[str]] = {LIBCXX: set(), LIBOBJC: set()}
    parsed = binary(file)
    for b in parsed.bindings:
        if b.has_library and b.library.name in found:
            found[b.library.name].add(b.symbol.name)
        elif b.library_ordinal == WEAK_LOOKUP and not IS_MLX.search(b.symbol.name):
            found[LIBCXX].add(b.symbol.name)
    return found


def exports(file: Path) -> set[str]:
    parsed = binary(file)
    return {e.symbol.name for e in parsed.dyld_exports_trie.exports if e.has_symbol}


def stub(name: str, install_name: str, offered: Iterable[str]) -> Path:
    """A library for the linker, by the names it has."""
    file = WORK / "stubs" / f"{name}.tbd"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\nexports:\n  - targets: [ arm64-macos ]\n"
        f"    symbols: [ {', '.join(sorted(offered))} ]\n...\n"
    )
    return file


def main() -> None:
    table = json.loads((ROOT / "python" / "mlx_teacache_fast" / "mlx_releases.json").read_text())
    rows = [(mlx, row["nanobind"]) for mlx, row in table["releases"].items()]
    folders = [packages(mlx, nanobind) for mlx, nanobind in rows]
    headers = python_headers()
    offered: dict[str, set[str]] = {}
    for folder in folders:
        for file in (folder / "mlx/lib/libmlx.dylib", *folder.glob("mlx/core.*.so")):
            for library, names in imports(file).items():
                offered.setdefault(library, set()).update(names)

    failed = False
    for (mlx, nanobind), folder in zip(rows, folders, strict=True):
        objects = compile_objects(folder, headers)
        libmlx = folder / "mlx/lib/libmlx.dylib"
        python = set((folder / "nanobind/cmake/darwin-ld-cpython.sym").read_text().split()) - {"-U"}
        libraries = [
            libmlx,
            stub("python", "python", python),
            stub("libc++", LIBCXX, offered[LIBCXX]),
            stub("libobjc", LIBOBJC, offered[LIBOBJC]),
        ]
        link = [ZIG, "cc", *TARGET, "-dynamiclib", "-o", folder.with_name("_ext.so"), *objects, *libraries]
        linked = subprocess.run(list(map(str, link)), env=os.environ | zig_cache(), text=True, capture_output=True)

        # The linker's answer has mangled names and, for a symbol that many use, several lines.
        wanted = undefined(objects)
        of_mlx = {name for name in wanted if IS_MLX.search(name)}
        unresolved = sorted(of_mlx - exports(libmlx))
        count = f"{len(of_mlx)} mlx symbols referenced, {len(unresolved)} unresolved"
        print(f"mlx {mlx}, nanobind {nanobind}: {count}", flush=True)  # before what the next one's compiler writes
        for name in unresolved:
            print(f"  {readable(name)}: used by {wanted[name]}, not exported by libmlx ({name})")
        if linked.returncode:
            print(f"  The linker says (a name of libc++ that MLX never imports is not known to be in macOS {MACOS}):")
            print(linked.stderr)
        failed |= bool(unresolved or linked.returncode)
    sys.exit(failed)


if __name__ == "__main__":
    main()
