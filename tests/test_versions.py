"""The table of MLX's releases: what pyproject.toml pins, CMake checks before a build and ``__init__`` at import."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

from mlx_teacache_fast import _ext

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "cmake" / "versions.cmake"
TABLE = ROOT / "python" / "mlx_teacache_fast" / "mlx_releases.json"
PACKAGE = files("mlx_teacache_fast")


def table() -> dict[str, dict[str, str]]:
    releases: dict[str, dict[str, str]] = json.loads(TABLE.read_text())["releases"]
    return releases


def configure(mlx: str, nanobind: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "check.cmake"
    script.write_text(f'set(Python_EXECUTABLE python)\ninclude("{CHECK}")\ncheck_versions("{mlx}" "{nanobind}")\n')
    return subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH")


@needs_cmake
def test_cmake_takes_what_is_in_the_table(tmp_path: Path) -> None:
    for mlx, row in table().items():
        assert configure(mlx, row["nanobind"], tmp_path).returncode == 0


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
                "needed: nanobind 2.15.0 (whose registry is that of mlx 0.32.2)",
                "fix: python -m pip install nanobind==2.15.0",
            ],
        ),
        (
            "0.33.0",
            "3.1.0",
            [
                "found: mlx 0.33.0, nanobind 3.1.0",
                "needed: mlx 0.32.1 with nanobind 2.13.0; mlx 0.32.2 with nanobind 2.15.0; mlx 0.32.3 with nanobind "
                "3.1.0; mlx 0.32.4 with nanobind 3.1.0",
                "fix: python -m pip install mlx==0.32.2 nanobind==2.15.0",
            ],
        ),
    ],
)
def test_cmake_stops_at_another_version(mlx: str, nanobind: str, lines: list[str], tmp_path: Path) -> None:
    done = configure(mlx, nanobind, tmp_path)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert all(line in said for line in lines), done.stderr


def test_the_pins_agree() -> None:
    """pyproject.toml has mlx more than once (build, run time, Linux): all say what the table says."""
    text = (ROOT / "pyproject.toml").read_text()
    source_build = json.loads(TABLE.read_text())["source_build"]
    assert set(re.findall(r'"mlx(?:\[\w+\])?==([\d.]+)', text)) == {source_build}
    assert re.findall(r'"nanobind==([\d.]+)', text) == [table()[source_build]["nanobind"]]
    project = tomllib.loads(text)["project"]
    extra = project["optional-dependencies"]
    asked = [*project["dependencies"], *extra["cpu"], extra["cuda"][0].split(" ;")[0]]
    first, *_, last = table()
    major, minor, patch = last.split(".")
    wanted = f">={first},<{major}.{minor}.{int(patch) + 1}"
    assert asked == [f"mlx{wanted}", f"mlx[cpu]{wanted}", f"mlx[cuda13]{wanted}"]


def built_for() -> list[str]:
    return [mlx for mlx in table() if PACKAGE.joinpath(f"mlx_{mlx}").is_dir()]


def test_there_is_an_extension_for_each_release_or_for_one() -> None:
    assert built_for() == list(table()) or len(built_for()) == 1
    for mlx in built_for():
        assert len([f for f in PACKAGE.joinpath(f"mlx_{mlx}").iterdir() if f.name.startswith("_ext.")]) == 1


def test_the_stub_is_the_extensions() -> None:
    def plain(signature: str) -> str:
        return ast.unparse(ast.parse(f"{signature}: ..."))

    def expected(owner: object, node: ast.FunctionDef) -> str:
        function = getattr(owner, node.name)
        function = function.fget if isinstance(function, property) else function
        (overload,) = function.__nb_signature__
        return plain(overload[0])

    stub = ast.parse((ROOT / "python" / "mlx_teacache_fast" / "_ext.pyi").read_text())
    owners: list[tuple[object, ast.Module | ast.ClassDef]] = [(_ext, stub)]
    owners += [(getattr(_ext, n.name), n) for n in stub.body if isinstance(n, ast.ClassDef)]
    for owner, tree in owners:
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        for node in functions.values():
            node.decorator_list = []
            assert ast.unparse(node) == expected(owner, node)
        public = {name for name in vars(owner) if not name.startswith("_") or name in ("__init__", "__call__")}
        assert public - {"CapturedGraph"} == set(functions)


def test_another_mlx_is_refused_at_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", 'import mlx.core as mx; mx.__version__ = "0.33.0"; import mlx_teacache_fast'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: mlx_teacache_fast was built for mlx {', '.join(built_for())}, but mlx 0.33.0 is installed. "
        f"Fix: pip install mlx=={built_for()[-1]}"
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
            f'Fix: pip install "mlx[cuda13]=={version("mlx")}" for an NVIDIA GPU, or "mlx[cpu]=={version("mlx")}"',
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
        "mlx_releases.json",
        "demo/tiny_klein.safetensors",
        "demo/LICENSE-noto-emoji-Apache-2.0.txt",
        "demo/LICENSE-emoji-data-MIT.txt",
        "demo/train.py",
    ],
)
def test_the_installed_package_has(name: str) -> None:
    assert PACKAGE.joinpath(name).is_file()
