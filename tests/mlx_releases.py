"""The wheel with each release of MLX: `make wheel`, `make test-mlx`.

What the wheel contains, and then for each release of mlx_releases.json a clean environment in build/wheel/, with the
wheel installed: the tests of gate, branch and versions, and of pictures: threshold 0 to the bit, and a gated one.
"""

import argparse
import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
UV = os.environ.get("UV", "uv")
TABLE = ROOT / "python" / "mlx_teacache_fast" / "mlx_releases.json"
RELEASES: dict[str, dict[str, str]] = json.loads(TABLE.read_text())["releases"]
TESTS = ["test_gate.py", "test_branch.py", "test_versions.py", "test_apply_flux2.py"]
PICTURES = "not test_apply_flux2 or threshold_zero or test_stats"


def check_contents(wheel: Path) -> None:
    """Exits with what is missing or too much."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        (metadata,) = (n for n in sizes if n.endswith(".dist-info/METADATA"))
        asked = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    extensions = {n: size for n, size in sizes.items() if n.endswith((".so", ".dylib"))}
    for mlx in RELEASES:
        mine = [n for n in extensions if re.fullmatch(rf"mlx_teacache_fast/mlx_{re.escape(mlx)}/_ext\.[\w.-]+\.so", n)]
        if len(mine) != 1:
            sys.exit(f"{wheel.name} must have one extension for mlx {mlx}, got {mine}")
        print(f"mlx {mlx}: {extensions.pop(mine[0]) / 1e6:.2f} MB")
    if extensions:
        sys.exit(f"{wheel.name} must have no other library, got {sorted(extensions)}")
    for name in ("_ext.pyi", "py.typed", "mlx_releases.json", "demo/tiny_klein.safetensors"):
        if f"mlx_teacache_fast/{name}" not in sizes:
            sys.exit(f"{wheel.name} lacks {name}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, asks for {asked[0]}")


def tested(wheel: Path, mlx: str) -> bool:
    print(f"\n==== mlx {mlx}", flush=True)
    environment, overrides = WORK / f"venv-{mlx}", WORK / f"overrides-{mlx}.txt"
    # mflux asks for one MLX, for its CUDA build and for torch on Linux.
    cpu = "" if sys.platform == "darwin" else "[cpu]"
    overrides.write_text(f"mlx{cpu}=={mlx}\ntorch ; sys_platform == 'never'\n")
    python = environment / "bin" / "python"
    install = [UV, "pip", "install", "--quiet", "--python", str(python), "--overrides", str(overrides)]
    packages = [f"{wheel}[demo]", "hypothesis>=6.100", "pytest>=9", "pytest-timeout>=2.3", "mlx-teacache==0.14.1"]
    for command in (
        [UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
        install + packages,
    ):
        if subprocess.run(command, cwd=ROOT.anchor).returncode:  # in ROOT, pyproject.toml's overrides would hold
            return False
    versions = "import mlx.core as m, importlib.metadata as i; print('mlx', m.__version__, 'mflux', i.version('mflux'))"
    pytest = ["-m", "pytest", "-q", "-k", PICTURES, "-m", "not slow and not gpu", *(f"tests/{name}" for name in TESTS)]
    return not any(subprocess.run([str(python), *args], cwd=ROOT).returncode for args in (["-c", versions], pytest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the wheel's")
    parser.add_argument("releases", nargs="*", metavar="MLX", default=list(RELEASES), help="default: %(default)s")
    args = parser.parse_args()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted(args.folder.resolve().glob(f"mlx_teacache_fast-*-{tag}-{tag}-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{args.folder} must have one wheel for {tag}, got {[w.name for w in wheels]}: run make wheel")
    check_contents(wheels[0])
    results = {mlx: tested(wheels[0], mlx) for mlx in args.releases}
    print()
    for mlx, good in results.items():
        print(f"mlx {mlx}: {'passed' if good else 'FAILED'}")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
