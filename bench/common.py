"""What the benchmarks share: their options, what they print of the machine, fresh processes, the JSON file."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_teacache_fast import ops

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


# ---- Options


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=DEVICES, default="cpu", help="gpu: the one that MLX uses (default: cpu)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    p.add_argument("--force", action="store_true", help="replace FILE if it exists")
    p.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # see in_fresh_processes
    return p


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """Its arguments, checked; the device is MLX's default then."""
    args = p.parse_args()
    if args.device == "gpu":
        reason = None
        if not mx.is_available(mx.Device(mx.gpu)):
            reason = "MLX has no GPU here"
        elif not ops.gpu_supported():
            reason = "this build of mlx-teacache-fast has no kernels for MLX's GPU"
        if reason:
            p.exit(2, f"{p.prog}: error: --device gpu: {reason}\n")
    mx.set_default_device(DEVICES[args.device])
    if args.json and args.json.exists() and not args.force:
        p.error(f"{args.json} exists: choose another name, or --force to replace it")
    return args


# ---- What is measured, and where

KINDS = {
    "mflux": "mflux",
    "off": "ours, threshold 0",
    "computed": "ours, gated and computed",
    "skipped": "ours, skipped",
    "peer computed": "mlx-teacache, gated and computed",
    "peer skipped": "mlx-teacache, skipped",
}
ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)  # up to 8 steps in a row


def contexts(flux: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """For each of KINDS what gates the pipeline in that way."""
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc

    always: dict[str, Any] = {"rel_l1_thresh": 1.0, "coefficients": ALWAYS_SKIP}
    return {
        "mflux": nullcontext,
        "off": lambda: tc.apply(flux, rel_l1_thresh=0.0),
        "computed": lambda: tc.apply(flux, rel_l1_thresh=1e-9),
        "skipped": lambda: tc.apply(flux, **always),
        "peer computed": lambda: apply_teacache(flux, rel_l1_thresh=1e-9),
        "peer skipped": lambda: apply_teacache(flux, **always),
    }


def machine() -> str:
    """Processor, cores and system in one line."""
    name = platform.processor() or platform.machine()
    system = platform.system()
    if sys.platform == "darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {system} {platform.machine()}"


def device() -> str:
    """MLX's default device; a GPU by its name too."""
    default = mx.default_device()
    return f"{default}" if default == mx.Device(mx.cpu) else f"{default} {mx.device_info().get('device_name', '')}"


def versions(*more: str) -> dict[str, str]:
    """Of Python, the package and MLX, and of ``more`` distributions."""

    def of(distribution: str) -> str:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version()} | {n: of(n) for n in ("mlx-teacache-fast", "mlx", *more)}


def collect(numbers: dict[str, Any], *distributions: str) -> dict[str, Any]:
    """The numbers, with what was measured where, and with which versions."""
    about = {"bench": Path(sys.argv[0]).stem, "date": f"{datetime.date.today()}", "machine": machine()}
    about["preloaded"] = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return about | {"device": device(), "versions": versions(*distributions)} | numbers


def print_header(data: dict[str, Any]) -> None:
    with_libraries = f", {', '.join(data['preloaded'])} preloaded" if data["preloaded"] else ""
    print(f"machine:  {data['machine']}, device {data['device']}{with_libraries}")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()))


MARKDOWN = False  # how print_table prints


def print_table(lines: list[list[str]], left: int = 0) -> None:
    """To the right, but for the first ``left`` columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        if MARKDOWN:
            print("| " + " | ".join(line) + " |")
            if i == 0:
                print("|" + "".join("---|" if k < left else "---:|" for k in range(len(line))))
            continue
        cells = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


NOISE = 0.1  # of the median: a ratio that another run may find further off is marked
NOISE_NOTE = "±: another run may find a ratio so much further off; where nothing is said, less than 10 %."


def summary(processes: list[list[float]]) -> dict[str, Any]:
    """A ratio's median and quartiles over all turns, and how far off another run may find it.

    Its ``noise`` is twice the standard error of the difference of two runs' medians, in parts of the median, from how
    the processes' own medians scatter: a process keeps its places in memory, its turns are not independent. None where
    there is one process.

    Args:
        processes: For each process the ratio in each of its turns.
    """
    medians = [statistics.median(turns) for turns in processes]
    everything = [ratio for turns in processes for ratio in turns]
    low, middle, high = statistics.quantiles(everything, n=4) if len(everything) > 1 else 3 * everything
    noise = None
    if len(medians) > 1:
        center = statistics.median(medians)
        deviation = 1.48 * statistics.median(abs(m - center) for m in medians)  # of a normal distribution
        noise = 2 * math.sqrt(2) * 1.25 * deviation / math.sqrt(len(medians)) / middle
    return {"median": middle, "low": low, "high": high, "noise": noise, "noisy": noise is None or noise > NOISE}


def ratio_cell(ratio: dict[str, Any], digits: int = 2) -> str:
    """A summary as a cell of a table, with its noise where that is large."""
    text = f"{ratio['median']:.{digits}f}"
    if not ratio["noisy"]:
        return text
    return f"{text} ±?" if ratio["noise"] is None else f"{text} ±{100 * ratio['noise']:.0f} %"


def finish(args: argparse.Namespace, data: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Writes the file that was asked for, and prints the report, which is made of nothing else."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    report(data)


def in_fresh_processes(count: int, *options: str, **environment: str) -> list[Any]:
    """This program with --measure and ``options``, ``count`` times: what each prints in its last line, as JSON."""
    results = []
    command, env = [sys.executable, *sys.argv, "--measure", *options], os.environ | environment
    for i in range(count):
        print(f"\rprocess {i + 1} of {count} ...", end="", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"\n{done.stderr}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print("\r" + 30 * " " + "\r", end="", file=sys.stderr)
    return results
