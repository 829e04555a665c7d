"""Unpacks MLX and the nanobind it was built with, for each release in mlx_releases.json, to compile against.

    python cmake/mlx_packages.py FOLDER [PLATFORM]

PLATFORM is a wheel's: the machine's own by default. Nothing is installed and nothing of it has to run here.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "python" / "mlx_teacache_fast" / "mlx_releases.json"


def releases() -> dict[str, str]:
    """MLX's releases and the nanobind of each."""
    return {mlx: row["nanobind"] for mlx, row in json.loads(TABLE.read_text())["releases"].items()}


def own_platform() -> str:
    """The oldest system that MLX has packages for."""
    return "macosx_14_0_arm64" if sys.platform == "darwin" else f"manylinux_2_35_{platform.machine()}"


def unpack(folder: Path, mlx: str, nanobind: str, wheel_platform: str) -> None:
    library = "mlx-metal" if wheel_platform.startswith("macosx") else "mlx-cpu"
    wanted = [f"mlx=={mlx}", f"{library}=={mlx}", f"nanobind=={nanobind}"]
    complete = folder / "complete.txt"
    if complete.exists() and complete.read_text().split() == wanted:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--upgrade"]
    subprocess.run([*pip, "--platform", wheel_platform, "--target", str(folder), *wanted], check=True)
    complete.write_text("\n".join(wanted))


def main() -> None:
    folder, *rest = sys.argv[1:]
    for mlx, nanobind in releases().items():
        unpack(Path(folder) / mlx, mlx, nanobind, *(rest or [own_platform()]))


if __name__ == "__main__":
    main()
