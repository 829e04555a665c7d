"""Does the built extension load with MLX's CPU library and with its CUDA library, from one file? `make check-cuda`.

For each library it counts the MLX symbols that the extension takes from it and those that are not there, and loads the
extension with every symbol bound at once. CUDA's libmlx is loaded as far as that goes without a driver: the libraries
of NVIDIA that it names are empty here, and what it takes from them stays unbound. Nothing of it runs.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "check-cuda"
LOAD = """
import ctypes, os, sys
ctypes.CDLL(sys.argv[1], os.RTLD_LAZY | os.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2], os.RTLD_NOW)
loaded = {line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith("/libmlx.so")}
assert loaded == {os.path.realpath(sys.argv[1])}, loaded
"""


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def cuda_package(version: str) -> Path:
    """The folder that MLX's CUDA library is unpacked in, without the libraries of NVIDIA."""
    folder = WORK / f"mlx-{version}"
    if not (folder / "mlx/lib/libmlx.so").exists():
        install = [os.environ.get("UV", "uv"), "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        install += ["--python", sys.executable, "--target", str(folder), f"mlx-cuda-13=={version}"]
        subprocess.run(install, check=True, cwd=ROOT.anchor)  # in ROOT, pyproject.toml's overrides would hold
    return folder


def empty_libraries(libmlx: Path) -> Path:
    """A folder with an empty library for each of NVIDIA's that libmlx names."""
    folder = WORK / "empty"
    folder.mkdir(parents=True, exist_ok=True)
    for line in output_of("readelf", "-d", libmlx).splitlines():
        name = line.split("[")[-1].rstrip("]")
        if "NEEDED" in line and name.startswith(("libcu", "libnccl", "libnv")):
            command = ["c++", "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{name}", "-o", folder / name]
            subprocess.run(list(map(str, command)), check=True)
    return folder


def main() -> None:
    if not sys.platform.startswith("linux"):
        sys.exit("MLX's CUDA build is for Linux")
    version = importlib.metadata.version("mlx")
    found = importlib.util.find_spec("mlx_teacache_fast._ext")
    assert found is not None
    assert found.origin is not None
    extension = Path(found.origin)
    taken = {line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", extension).splitlines()}
    of_mlx = {name for name in taken if "3mlx4core" in name}
    cpu = Path(importlib.metadata.distribution("mlx-cpu").locate_file("mlx/lib/libmlx.so"))  # type: ignore[arg-type]
    cuda = cuda_package(version) / "mlx/lib/libmlx.so"
    failed = False
    for name, libmlx in (("CPU", cpu), ("CUDA", cuda)):
        exported = {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", libmlx).splitlines()}
        missing = sorted(of_mlx - exported)
        environment = os.environ | {"LD_LIBRARY_PATH": str(empty_libraries(cuda))}
        command = [sys.executable, "-c", LOAD, str(libmlx), str(extension)]
        loads = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(
            f"mlx {version}, {name}: {len(of_mlx)} mlx symbols referenced, {len(missing)} unresolved; "
            + ("loads" if loads.returncode == 0 else f"does not load\n{loads.stderr}")
        )
        for symbol in missing:
            print(f"  {symbol}")
        failed |= bool(missing) or loads.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
