"""What the benchmarks share: their options, what they print of the machine, fresh processes, the JSON file."""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_teacache_fast import ops

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


# ---- Options


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """With the options that every benchmark has; ``quick`` says what its short form leaves out."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=DEVICES, help="default: gpu where MLX has one, else cpu")
    p.add_argument("--quick", action="store_true", help=quick)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    p.add_argument("--force", action="store_true", help="replace FILE if it exists")
    p.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # see in_fresh_processes
    p.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)  # which one of them
    return p


def parse(p: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Its arguments, checked; the device is MLX's default then. With --quick, ``quick`` are the defaults."""
    if p.parse_known_args()[0].quick:
        p.set_defaults(**quick)
    args = p.parse_args()
    args.device = args.device or ("gpu" if ops.gpu_supported() else "cpu")
    if args.device == "gpu" and not ops.gpu_supported():
        p.exit(2, f"{p.prog}: error: --device gpu: MLX has no GPU here\n")
    mx.set_default_device(DEVICES[args.device])
    if args.json and args.json.exists() and not args.force:
        p.error(f"{args.json} exists: choose another name, or --force to replace it")
    return args


QUICK_REGIMES = ["own", "flux2-1024"]


def add_regimes(p: argparse.ArgumentParser) -> None:
    from mlx_teacache_fast.models import REGIMES  # which an earlier version does not have

    says = f"schedules of the demonstration model, default {' '.join(REGIMES)}"
    p.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), metavar="NAME", help=says)


def schedules(args: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Regime, steps and guidance of each table, but for a guidance that stands for nothing in its regime."""
    from mlx_teacache_fast.models import REGIMES  # which an earlier version does not have

    everything = itertools.product([r for r in REGIMES if r in args.regimes], args.steps, args.guidance)
    found = [s for s in everything if REGIMES[s[0]].guidance in (None, s[2])]
    if not found:
        only = ", ".join(f"{name} has guidance {REGIMES[name].guidance:g} only" for name in args.regimes)
        sys.exit(f"{Path(sys.argv[0]).name}: error: nothing to measure: {only}")
    return found


def with_regime(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of files from before there were regimes had the model's own."""
    return [{"regime": "own"} | row for row in rows]


# ---- What is measured, and where

ROOT = Path(__file__).resolve().parents[1]

KINDS = {
    "mflux": "mflux",
    "off": "ours, threshold 0",
    "watched computed": "ours, computed, a tolerance",
    "computed": "ours, gated and computed",
    "kept": "ours, computed, residual kept",
    "forecast": "ours, skipped",
    "skipped": "ours, skipped, residual reused",
    "peer off": "mlx-teacache, threshold 0",
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
        "off": lambda: tc.apply_teacache(flux, rel_l1_thresh=0.0),
        "watched computed": lambda: tc.apply(flux, tolerance=1e-9),
        "computed": lambda: tc.apply(flux, rel_l1_thresh=1e-9),
        "kept": lambda: tc.apply_teacache(flux, rel_l1_thresh=1e-9),
        "forecast": lambda: tc.apply(flux, **always),  # of the output, as by default
        "skipped": lambda: tc.apply_teacache(flux, **always),
        "peer off": lambda: apply_teacache(flux, rel_l1_thresh=0.0),
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


def commit() -> str | None:
    """Of the sources, with ``-dirty`` where they differ from it; None where git does not say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def collect(args: argparse.Namespace, numbers: dict[str, Any], *distributions: str) -> dict[str, Any]:
    """The numbers, with what was measured where, and with which versions."""
    about = {"bench": Path(sys.argv[0]).stem, "date": f"{datetime.date.today()}", "commit": commit()}
    about |= {"quick": args.quick, "machine": machine(), "device": device()}
    about["preloaded"] = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return about | {"versions": versions(*distributions)} | numbers


def print_header(data: dict[str, Any]) -> None:
    with_libraries = f", {', '.join(data['preloaded'])} preloaded" if data["preloaded"] else ""
    print(f"machine:  {data['machine']}, device {data['device']}{with_libraries}")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()))
    print(f"commit:   {data['commit'] or 'unknown'}{', --quick' if data['quick'] else ''}")


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


# Student's t: so many standard errors hold 95 % of what so many processes may give; more of them: about 2.
T = {2: 12.7, 3: 4.3, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def summary(processes: list[list[float]]) -> dict[str, Any]:
    """A ratio's median, quartiles of all turns, and noise.

    The median is that of the processes' medians: a process keeps its places in memory, its turns are not independent.
    ``noise`` is how far off another run would find it, in parts of it, in 95 % of runs; None with one process.

    Args:
        processes: For each process the ratio in each of its turns.
    """
    medians = [statistics.median(turns) for turns in processes]
    everything = [ratio for turns in processes for ratio in turns]
    middle, n = statistics.median(medians), len(medians)
    low, _, high = statistics.quantiles(everything, n=4) if len(everything) > 1 else 3 * everything
    noise = T.get(n, 2.1) * math.sqrt(2 / n) * statistics.stdev(medians) / middle if n > 1 else None
    return {"median": middle, "low": low, "high": high, "noise": noise}


NOISE_NOTE = (
    "±: in 95 % of runs another one finds the ratio no further off. In (brackets) where that is over 10 %: too noisy "
    "to quote."
)


def is_noisy(ratio: dict[str, Any]) -> bool:
    return ratio["noise"] is None or ratio["noise"] > 0.1


def ratio_cell(ratio: dict[str, Any], digits: int = 2) -> str:
    """A summary as a cell of a table."""
    noise = "?" if ratio["noise"] is None else f"{100 * ratio['noise']:.0f}"
    text = f"{ratio['median']:.{digits}f} ±{noise} %"
    return f"({text})" if is_noisy(ratio) else text


def claim(text: str, ratio: dict[str, Any], *, at_most: float = math.inf, at_least: float = 0.0) -> list[str]:
    """A line of ``print_claims``: whether the ratio keeps to a limit, and whether by more than its noise."""
    middle, noise = ratio["median"], math.inf if ratio["noise"] is None else ratio["noise"]
    verdict = "holds" if at_least <= middle <= at_most else "does not hold"
    if not (at_least <= middle * (1 - noise) and middle * (1 + noise) <= at_most) and not (
        middle * (1 + noise) < at_least or middle * (1 - noise) > at_most
    ):
        verdict += ", within noise"
    limit = f"at most {at_most:g}" if at_most < math.inf else f"at least {at_least:g}"
    return [text, limit, ratio_cell(ratio, 3), verdict]


def print_claims(lines: list[list[str]]) -> None:
    if lines:
        print("\nWhat should hold\n")
        print_table([["", "", "measured", ""], *lines], left=2)


def orders(names: Sequence[Any], turn: int) -> list[Any]:
    """The names in the order of a turn: each has each place in turn, and after every other turn another before it."""
    k = turn // 2 % len(names)
    order = [*names[k:], *names[:k]]
    return order if turn % 2 == 0 else order[::-1]


def finish(args: argparse.Namespace, data: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Writes the file that was asked for, and prints the report, which is made of nothing else."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        part = args.json.with_name(f"{args.json.name}.part")
        text = json.dumps(data, indent=1, allow_nan=False)
        part.write_text(re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n")  # a list is a line
        part.replace(args.json)
    report(data)


def in_fresh_processes(count: int, *options: str, first: int = 0, **environment: str) -> list[Any]:
    """This program with --measure and ``options``, ``count`` times: what each gives to ``answer``."""
    results = []
    env = os.environ | environment
    for i in range(first, first + count):
        print(f"\rprocess {i + 1} ...", end="", file=sys.stderr, flush=True)
        command = [sys.executable, *sys.argv, "--measure", "--process", str(i), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"\nprocess {i + 1} ended with exit code {done.returncode}\n{done.stderr}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print("\r" + 30 * " " + "\r", end="", file=sys.stderr)
    return results


def answer(value: Any) -> NoReturn:
    """The end of a process with --measure. Not the interpreter's: MLX may abort there once threads have used it."""
    print("\n" + json.dumps(value), flush=True)
    os._exit(0)
