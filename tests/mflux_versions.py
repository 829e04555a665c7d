"""Tests with the older versions of mflux, those that the pinned MLX admits: `make test-mflux`.

The newest is what `make test` runs with. Each older one gets an environment of its own in build/mflux/, made anew, with
this package and its extension as installed from here.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mflux"
UV = os.environ.get("UV", "uv")

VERSIONS = ("0.20.0", "0.21.0", "0.22.0", "0.23.0")
TESTS = (
    "test_apply_flux1",
    "test_apply_flux2",
    "test_apply_flux2_edit",
    "test_cli_run",
    "test_families",
    "test_metadata",
    "test_others",
    "test_regimes",
    "test_tolerance",
)
# mflux 0.20 to 0.23 ask for pillow>=12.3 and import PIL._typing, which cannot be imported in Pillow 13.
PILLOW = "pillow>=12.3,<13"
# mflux 0.21 and 0.22 run Qwen-Image-2.1 with a Metal kernel, on a CPU too.
NO_METAL = {"MFLUX_QWEN21_DISABLE_FUSED_PROLOGUE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", help=f"of mflux; all by default: {', '.join(VERSIONS)}"
    )
    versions = parser.parse_args().versions or VERSIONS
    results = {version: tested(version) for version in versions}
    print()
    for version, (line, _) in results.items():
        print(f"mflux {version}: {line}")
    sys.exit(not all(good for _, good in results.values()))


def tested(version: str) -> tuple[str, bool]:
    """What came of it, in words, and whether that is good."""
    print(f"\n==== mflux {version}", flush=True)
    environment, report = WORK / version, WORK / f"{version}.xml"
    report.unlink(missing_ok=True)
    packages = [".[demo]", f"mflux=={version}", PILLOW]
    # uv follows the overrides in pyproject.toml: MLX's build for the CPU, and no torch.
    for command in (
        [UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
        [UV, "pip", "install", "--quiet", "--python", str(environment), "--group", "test", *packages],
    ):
        if subprocess.run(command, cwd=ROOT).returncode:
            return "not installed", False
    path = [os.environ.get("PYTHONPATH", "")]
    if version.startswith("0.20."):
        path.insert(0, str(ROOT / "tests" / "no_torch"))
    started = perf_counter()
    code = subprocess.run(
        [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-n", "2", "-m", "not slow", f"--junitxml={report}"]
        + [f"tests/{name}.py" for name in TESTS],
        cwd=ROOT,
        env=os.environ | NO_METAL | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
    ).returncode
    seconds = perf_counter() - started
    if not report.exists():
        return f"pytest ended with {code}", False
    suite = ElementTree.parse(report).getroot()[0]
    total, failures, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s", code == 0


if __name__ == "__main__":
    main()
