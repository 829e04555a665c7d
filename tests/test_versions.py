"""The exact versions: written in pyproject.toml, checked by CMake before a build and by ``__init__`` at import."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from mlx_teacache_fast import _build

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "cmake" / "versions.cmake"


def table() -> dict[str, str]:
    return dict(re.findall(r'^ +"([\d.]+)=([\d.]+)"$', TABLE.read_text(), re.MULTILINE))


def configure(mlx: str, nanobind: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "check.cmake"
    script.write_text(f'set(Python_EXECUTABLE python)\ninclude("{TABLE}")\ncheck_versions("{mlx}" "{nanobind}")\n')
    return subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH")


@needs_cmake
def test_cmake_takes_what_is_in_the_table(tmp_path: Path) -> None:
    for mlx, nanobind in table().items():
        assert configure(mlx, nanobind, tmp_path).returncode == 0


@needs_cmake
@pytest.mark.parametrize(
    ("mlx", "nanobind", "lines"),
    [
        (
            "0.32.2",
            "2.14.0",
            [
                "nanobind does not match MLX.",
                "found: nanobind 2.14.0, mlx 0.32.2",
                "needed: nanobind 2.15.0 (the one that mlx 0.32.2 was built with)",
                "fix: python -m pip install nanobind==2.15.0",
            ],
        ),
        (
            "0.33.0",
            "3.1.0",
            [
                "This MLX is not in cmake/versions.cmake.",
                "found: mlx 0.33.0, nanobind 3.1.0",
                "needed: mlx 0.32.2 with nanobind 2.15.0; mlx 0.32.4 with nanobind 3.1.0",
                "fix: python -m pip install mlx==0.32.2 nanobind==2.15.0",
            ],
        ),
    ],
)
def test_cmake_stops_at_another_version(mlx: str, nanobind: str, lines: list[str], tmp_path: Path) -> None:
    done = configure(mlx, nanobind, tmp_path)
    assert done.returncode != 0
    said = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert all(line in said for line in lines), done.stderr


def test_the_pins_agree() -> None:
    """pyproject.toml has mlx more than once (build, run time, Linux): all say what the table and the build say."""
    text = (ROOT / "pyproject.toml").read_text()
    tomllib.loads(text)
    assert set(re.findall(r'"mlx(?:\[\w+\])?==([\d.]+)', text)) == {_build.MLX_VERSION}
    assert re.findall(r'"nanobind==([\d.]+)', text) == [_build.NANOBIND_VERSION]
    assert next(iter(table().items())) == (_build.MLX_VERSION, _build.NANOBIND_VERSION)


def test_another_mlx_is_refused_at_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", 'import mlx.core as mx; mx.__version__ = "0.33.0"; import mlx_teacache_fast'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: mlx_teacache_fast was built for mlx 0.32.2, but mlx 0.33.0 is installed. "
        "Fix: pip install mlx==0.32.2"
    )


NO_FILE = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"libcuda.so.1: {NO_FILE}", "driver, 580 or newer; or, to run on the CPU: pip uninstall mlx-cuda-13"),
        (
            "cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient for CUDA runtime version",
            "cannot be used here: cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient",
        ),
        (
            f"libmlx.so: {NO_FILE}",
            'Fix: pip install "mlx[cuda13]==0.32.2" for an NVIDIA GPU, or "mlx[cpu]==0.32.2"',
        ),
        (f"libc.so.7: {NO_FILE}", f"ImportError: libc.so.7: {NO_FILE}"),
    ],
)
def test_mlx_cannot_be_imported(message: str, said: str, tmp_path: Path) -> None:
    """What MLX says on Linux: its CUDA build without a driver and with an old one, and neither of its builds."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({message!r})")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_teacache_fast"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "_ext.pyi",
        "demo/tiny_klein.safetensors",
        "demo/LICENSE-noto-emoji-Apache-2.0.txt",
        "demo/LICENSE-emoji-data-MIT.txt",
        "demo/train.py",
    ],
)
def test_the_installed_package_has(name: str) -> None:
    assert files("mlx_teacache_fast").joinpath(name).is_file()
