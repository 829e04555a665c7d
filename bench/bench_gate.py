"""What does one gated step cost, beside the plain-MLX gates and beside the memory traffic that no gate can avoid?

Rivals, measured interleaved in one process:

    gate      ops.gate, one branch with one residual; anchor and state go from step to step, the decision is evaluated
    eager     mlx-teacache's gate as it runs eagerly: modulation, gate_step with its host reads, x + residual. Its
              residual also covers the text tokens, which is left out here, in its favour
    compiled  this package's plain-MLX reference inside mx.compile
    copy      the fewest bytes: x, anchor and residual are read, modulated and reused written, so 2.5 arrays of x's
              size are copied, by numpy into memory that is in use already; with 1 and 2 threads, the faster counts
    fresh     the same copy into newly allocated memory: what a gate that does not reuse its inputs' memory must pay
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_teacache_fast import ops, reference
from mlx_teacache_fast.variants import VARIANTS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOKENS = (1024, 4096, 16384)  # 512 x 512, 1024 x 1024 and 2048 x 2048 pixels
CHANNELS = (3072, 4096)  # klein-4b and FLUX.1; klein-9b
VARIANT = VARIANTS["flux2-klein-base-4b"]
TRAFFIC = 5  # arrays of x's size: three read, two written


def machine() -> str:
    """Processor, cores and system in one line."""
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    else:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    def of(distribution: str) -> str:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    names = ("mlx-teacache-fast", "mlx", "mlx-teacache", "numpy")
    return {"python": platform.python_version()} | {name: of(name) for name in names}


def available_memory() -> int:
    """Bytes that can be allocated without swapping; all of the memory where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Inputs:
    """Two steps' worth of inputs, so that consecutive steps differ as in a real schedule."""

    def __init__(self, tokens: int, channels: int, dtype: mx.Dtype) -> None:
        def normal(shape: tuple[int, ...], seed: int, size: float = 1.0) -> mx.array:
            return (size * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)

        shape = (1, tokens, channels)
        x = normal(shape, 0)
        self.xs = [x, x + normal(shape, 1, 0.05)]
        self.shift, self.scale = normal((1, 1, channels), 2), normal((1, 1, channels), 3, 0.3)
        self.residual = normal(shape, 4)
        self.weights = mx.ones((1, 1))
        self.force = mx.array(0, mx.int32)
        mx.eval(self.xs, self.shift, self.scale, self.residual, self.weights, self.force)
        self.nbytes = x.nbytes
        self.size = x.size


class GateStep:
    """One gated step of ``gate``, with what goes from step to step."""

    def __init__(self, inputs: Inputs, gate: Callable[..., Any], compiled: bool) -> None:
        self.inputs = inputs
        self.index = 0
        self.anchor = mx.zeros_like(inputs.xs[0])
        self.state = mx.zeros(8)

        def step(
            x: Any, shift: Any, scale: Any, anchor: Any, residual: Any, weights: Any, state: Any, force: Any
        ) -> Any:
            modulated, (reused,), state = gate(
                x,
                shift,
                scale,
                anchor,
                [[residual]],
                weights,
                state,
                force,
                coefficients=VARIANT.coefficients,
                threshold=VARIANT.rel_l1_thresh,
                calibrated_range=VARIANT.calibrated_range,
            )
            return modulated, reused, state

        self.step = mx.compile(step) if compiled else step

    def __call__(self) -> None:
        i = self.inputs
        x = i.xs[self.index % 2]
        self.index += 1
        self.anchor, reused, self.state = self.step(
            x, i.shift, i.scale, self.anchor, i.residual, i.weights, self.state, i.force
        )
        mx.eval(self.anchor, reused, self.state)
        self.state[0].item()


class EagerStep:
    """One gated step as mlx-teacache runs it eagerly."""

    def __init__(self, inputs: Inputs) -> None:
        from mlx_teacache._kernel.cache import TeaCacheState
        from mlx_teacache.gate import gate_step

        self.inputs = inputs
        self.index = 0
        self.state = TeaCacheState()
        self.gate_step = gate_step

    def __call__(self) -> None:
        i = self.inputs
        x = i.xs[self.index % 2]
        modulated = (1.0 + i.scale) * mx.fast.layer_norm(x, None, None, 1e-6) + i.shift
        decision = self.gate_step(
            self.state,
            rel_l1_thresh=VARIANT.rel_l1_thresh,
            coefficients=VARIANT.coefficients,
            skip_first=0,
            skip_last=0,
            num_steps=2**31,
            step_idx=self.index,
            mod_in=modulated,
            calibrated_range=VARIANT.calibrated_range,
        )
        self.index += 1
        if decision.should_update_cache:
            self.state.cached_residual = i.residual  # the body's work, which is not measured
        mx.eval(x + i.residual)


class Copy:
    """2.5 arrays of x's size, as bytes."""

    def __init__(self, nbytes: int, threads: int, pool: ThreadPoolExecutor, fresh: bool = False) -> None:
        self.source = np.ones(nbytes * TRAFFIC // 2, np.uint8)
        self.target = None if fresh else np.zeros_like(self.source)
        bounds = [len(self.source) * t // threads for t in range(threads + 1)]
        self.parts = [slice(a, b) for a, b in pairwise(bounds)]
        self.pool = pool

    def __call__(self) -> None:
        target = np.empty_like(self.source) if self.target is None else self.target
        if len(self.parts) == 1:
            np.copyto(target, self.source)
        else:
            # copyto leaves the interpreter's lock while it copies.
            list(self.pool.map(lambda part: np.copyto(target[part], self.source[part]), self.parts))


def measure(rivals: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds. Interleaved: what disturbs the machine disturbs every rival."""
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for round_index in range(-2, rounds):  # Two rounds to compile, to seed the gates and to touch the memory.
        for name, rival in rivals.items():
            start = time.perf_counter()
            rival()
            if round_index >= 0:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def run_shape(tokens: int, channels: int, dtype: str, rounds: int, eager: bool) -> dict[str, Any]:
    inputs = Inputs(tokens, channels, DTYPES[dtype])
    with ThreadPoolExecutor(2) as pool:
        rivals: dict[str, Callable[[], None]] = {"gate": GateStep(inputs, ops.gate, compiled=False)}
        if eager:
            rivals["eager"] = EagerStep(inputs)
        rivals["compiled"] = GateStep(inputs, reference.gate, compiled=True)
        rivals["copy_1_thread"] = Copy(inputs.nbytes, 1, pool)
        rivals["copy_2_threads"] = Copy(inputs.nbytes, 2, pool)
        rivals["copy_fresh"] = Copy(inputs.nbytes, 2, pool, fresh=True)
        ms = measure(rivals, rounds)
    limit = min(ms["copy_1_thread"], ms["copy_2_threads"])
    traffic = TRAFFIC * inputs.nbytes
    return {
        "tokens": tokens,
        "channels": channels,
        "dtype": dtype,
        "rounds": rounds,
        "ms": ms,
        "limit_ms": limit,
        "limit_gb_per_s": traffic / limit / 1e6,
        "gate_gb_per_s": traffic / ms["gate"] / 1e6,
        "gate_over_copy": ms["gate"] / limit,
        "eager_over_gate": ms["eager"] / ms["gate"] if eager else None,
        "compiled_over_gate": ms["compiled"] / ms["gate"],
    }


COLUMNS = (
    "tokens",
    "channels",
    "dtype",
    "gate",
    "eager",
    "compiled",
    "copy x1",
    "copy x2",
    "fresh",
    "GB/s",
    "limit GB/s",
)
RATIOS = ("gate/copy", "eager/gate", "compiled/gate")


def table_row(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    names = ("gate", "eager", "compiled", "copy_1_thread", "copy_2_threads", "copy_fresh")
    cells = [f"{row['tokens']}", f"{row['channels']}", row["dtype"]]
    cells += [f"{ms[name]:.2f}" if name in ms else "-" for name in names]
    cells += [f"{row['gate_gb_per_s']:.1f}", f"{row['limit_gb_per_s']:.1f}", f"{row['gate_over_copy']:.2f}"]
    cells += ["-" if row["eager_over_gate"] is None else f"{row['eager_over_gate']:.1f}"]
    return [*cells, f"{row['compiled_over_gate']:.1f}"]


def print_table(rows: list[dict[str, Any]]) -> None:
    lines = [[*COLUMNS, *RATIOS], *map(table_row, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="image tokens S (default: %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="channels D (default: %(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=("float32", "bfloat16"), help="dtypes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each shape (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="1024 and 4096 tokens, 3072 channels, 7 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.channels, args.rounds = TOKENS[:2], CHANNELS[:1], 7
    if min(*args.tokens, *args.channels, args.rounds) < 1:
        parser.error("--tokens, --channels and --rounds must be at least 1")
    if args.json and args.json.exists() and not args.force:
        parser.error(f"{args.json} exists: choose another name, or --force to replace it")
    return args


def main() -> None:
    args = parse()
    eager = importlib.util.find_spec("mlx_teacache") is not None
    print(f"machine:  {machine()}, device {mx.default_device()}")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print("milliseconds, medians; 'copy' is the faster of one and two threads, and its bytes are the gate's fewest")
    if not eager:
        print("note: mlx-teacache is not installed, so there is no eager column")
    rows, skipped = [], []
    shapes = [(s, d, t) for t in args.dtypes for d in args.channels for s in args.tokens]
    for index, (tokens, channels, dtype) in enumerate(shapes, 1):
        name = f"{tokens} x {channels} {dtype}"
        # Inputs 3, anchors 3, three copies of 2.5 in and (two of them, and the fresh one) 2.5 out, and the eager gate's
        # temporaries, of which up to 6 are float32.
        itemsize = DTYPES[dtype].size
        needed = tokens * channels * (21 * itemsize + 6 * 4)
        if needed > 0.8 * available_memory():
            skipped.append(f"{name}: needs about {needed / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} are free")
            continue
        print(f"[{index}/{len(shapes)}] {name} ...", file=sys.stderr, flush=True)
        rows.append(run_shape(tokens, channels, dtype, args.rounds, eager))
        mx.clear_cache()
    print_table(rows)
    for note in skipped:
        print(f"left out: {note}")
    if args.json:
        report = {"machine": machine(), "versions": versions(), "rows": rows, "left_out": skipped}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
