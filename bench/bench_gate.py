"""What does one gated step cost, beside the plain-MLX gates and beside the memory traffic that no gate can avoid?

Rivals, measured interleaved in one process:

    gate      ops.gate, one branch with one residual; anchor and state go from step to step, the decision is evaluated
    eager     mlx-teacache's gate as it runs eagerly: modulation, gate_step with its host reads, x + residual. Its
              residual also covers the text tokens, which is left out here, in its favour
    compiled  this package's plain-MLX reference inside mx.compile
    copy      the fewest bytes: x, anchor and residual are read, modulated and reused written, so 2.5 arrays of x's
              size are copied, by numpy into memory that is in use already; with 1 and 2 threads, the faster counts
    fresh     the same copy into newly allocated memory: what a gate that does not reuse its inputs' memory must pay

On a GPU (--device gpu) two times are taken:

    kernel    many gates, each with the anchor and the state of the one before, and all that they reuse, in one
              evaluation, divided by their number: what starting and awaiting the work costs is shared by all. The
              graph is built before. `copy` is mx.negative of 2.5 arrays, in place, chained likewise
    step      one gate at a time, and its decision read on the host. `nothing` is one number, negated and read

and `2 disp.` is the gate in two dispatches, as it runs before macOS 15.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import numpy as np
from common import DTYPES

from mlx_teacache_fast import ops, reference
from mlx_teacache_fast.variants import VARIANTS

TOKENS = (1024, 4096, 16384)  # 512 x 512, 1024 x 1024 and 2048 x 2048 pixels
CHANNELS = (3072, 4096)  # klein-4b and FLUX.1; klein-9b
VARIANT = VARIANTS["flux2-klein-base-4b"]
TRAFFIC = 5  # arrays of x's size: three read, two written
DISTRIBUTIONS = ("mlx-teacache", "numpy")

# Of what a chain of gates writes, 2 arrays of x's size each: all that is reused is kept to the end, and MLX keeps the
# anchors until the GPU is done with them, so that here the next gate cannot write to where its anchor is.
CHAIN_BYTES = 1 << 30
MIN_CHAIN = 4
LARGE_COPY = 1 << 29  # bytes: more than any chip's cache
DISPATCHES = "MLX_TEACACHE_FAST_METAL_DISPATCHES"  # read at each evaluation


def available_memory() -> int:
    """Bytes that can be allocated without swapping; all of the memory where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(everything, int(mx.device_info().get("max_recommended_working_set_size", everything)))


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

    def __init__(self, inputs: Inputs, gate: Callable[..., Any], compiled: bool, dispatches: int = 1) -> None:
        self.inputs = inputs
        self.dispatches = dispatches
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

    def advance(self) -> Any:
        """The next step's graph; returns what it reuses."""
        i = self.inputs
        x = i.xs[self.index % 2]
        self.index += 1
        self.anchor, reused, self.state = self.step(
            x, i.shift, i.scale, self.anchor, i.residual, i.weights, self.state, i.force
        )
        return reused

    def __call__(self) -> None:
        os.environ[DISPATCHES] = str(self.dispatches)
        reused = self.advance()
        mx.eval(self.anchor, reused, self.state)
        self.state.tolist()  # state[0] would be one more op


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


# ---- On a GPU


class Chain(ABC):
    """Several steps in one evaluation; ``prepare`` builds their graph."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.outputs: list[mx.array] = []

    @abstractmethod
    def prepare(self) -> None: ...

    def __call__(self) -> None:
        mx.eval(self.outputs)
        self.outputs = []


class GateChain(Chain):
    def __init__(self, gate: GateStep, length: int) -> None:
        super().__init__(length)
        self.gate = gate

    def prepare(self) -> None:
        os.environ[DISPATCHES] = str(self.gate.dispatches)
        self.outputs = [self.gate.advance() for _ in range(self.length)]
        self.outputs += [self.gate.anchor, self.gate.state]


class CopyChain(Chain):
    """``nbytes`` read and written, by one thread for each few elements; MLX writes to where it reads."""

    def __init__(self, nbytes: int, length: int) -> None:
        super().__init__(length)
        self.array = mx.ones(nbytes // 4)
        mx.eval(self.array)

    def prepare(self) -> None:
        for _ in range(self.length):
            self.array = mx.negative(self.array)
        self.outputs = [self.array]


class Nothing:
    """What each evaluation costs that is awaited and read."""

    def __init__(self) -> None:
        self.number = mx.array(1.0)

    def __call__(self) -> None:
        self.number = mx.negative(self.number)
        self.number.item()


# ---- Measuring


def measure(rivals: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds. Interleaved: what disturbs the machine disturbs every rival."""
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for round_index in range(-2, rounds):  # Two rounds to compile, to seed the gates and to touch the memory.
        for name, rival in rivals.items():
            if isinstance(rival, Chain):
                rival.prepare()
            mx.synchronize()
            start = time.perf_counter()
            rival()
            mx.synchronize()
            if round_index >= 0:
                samples[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {n: ms / rival.length if isinstance(rival := rivals[n], Chain) else ms for n, ms in medians.items()}


def measure_cpu(tokens: int, channels: int, dtype: str, rounds: int, eager: bool) -> dict[str, Any]:
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


def chain_length(longest: int, nbytes: int) -> int:
    return max(MIN_CHAIN, min(longest, CHAIN_BYTES // (2 * nbytes)))


def measure_gpu(tokens: int, channels: int, dtype: str, rounds: int, eager: bool, longest: int) -> dict[str, Any]:
    inputs = Inputs(tokens, channels, DTYPES[dtype])
    length = chain_length(longest, inputs.nbytes)
    gates: dict[str, Callable[[], GateStep]] = {
        "gate": lambda: GateStep(inputs, ops.gate, compiled=False),
        "two_dispatches": lambda: GateStep(inputs, ops.gate, compiled=False, dispatches=2),
        "compiled": lambda: GateStep(inputs, reference.gate, compiled=True),
    }
    rivals: dict[str, Callable[[], None]] = {f"kernel {n}": GateChain(make(), length) for n, make in gates.items()}
    rivals["kernel copy"] = CopyChain(inputs.nbytes * TRAFFIC // 2, length)
    rivals |= {f"step {n}": make() for n, make in gates.items()}
    if eager:
        rivals["step eager"] = EagerStep(inputs)
    rivals["step nothing"] = Nothing()
    ms = measure(rivals, rounds)
    kernel, step = (
        {name.removeprefix(kind): t for name, t in ms.items() if name.startswith(kind)} for kind in ("kernel ", "step ")
    )
    traffic = TRAFFIC * inputs.nbytes
    return {
        "tokens": tokens,
        "channels": channels,
        "dtype": dtype,
        "rounds": rounds,
        "chain": length,
        "kernel_ms": kernel,
        "step_ms": step,
        "limit_gb_per_s": traffic / kernel["copy"] / 1e6,
        "gate_gb_per_s": traffic / kernel["gate"] / 1e6,
        "gate_over_copy": kernel["gate"] / kernel["copy"],
        "two_dispatches_over_gate": kernel["two_dispatches"] / kernel["gate"],
        "compiled_over_gate": kernel["compiled"] / kernel["gate"],
        "step_eager_over_gate": step["eager"] / step["gate"] if eager else None,
        "step_compiled_over_gate": step["compiled"] / step["gate"],
    }


def large_copy(rounds: int) -> float:
    """GB/s of the device's memory."""
    ms = measure({"copy": CopyChain(LARGE_COPY, 10)}, rounds)["copy"]
    return 2 * LARGE_COPY / ms / 1e6


# ---- Tables


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


KERNEL_COLUMNS = ("tokens", "channels", "dtype", "gates", "gate", "2 disp.", "compiled", "copy", "GB/s", "limit GB/s")
KERNEL_RATIOS = ("gate/copy", "2 disp./gate", "compiled/gate")
STEP_COLUMNS = ("tokens", "channels", "dtype", "gate", "2 disp.", "eager", "compiled", "nothing")
STEP_RATIOS = ("eager/gate", "compiled/gate")


def kernel_row(row: dict[str, Any]) -> list[str]:
    cells = [f"{row['tokens']}", f"{row['channels']}", row["dtype"], f"{row['chain']}"]
    cells += [f"{row['kernel_ms'][name]:.3f}" for name in ("gate", "two_dispatches", "compiled", "copy")]
    cells += [f"{row['gate_gb_per_s']:.1f}", f"{row['limit_gb_per_s']:.1f}"]
    return [*cells, *(f"{row[r]:.2f}" for r in ("gate_over_copy", "two_dispatches_over_gate", "compiled_over_gate"))]


def step_row(row: dict[str, Any]) -> list[str]:
    ms = row["step_ms"]
    cells = [f"{row['tokens']}", f"{row['channels']}", row["dtype"]]
    names = ("gate", "two_dispatches", "eager", "compiled", "nothing")
    cells += [f"{ms[name]:.3f}" if name in ms else "-" for name in names]
    cells += ["-" if row["step_eager_over_gate"] is None else f"{row['step_eager_over_gate']:.1f}"]
    return [*cells, f"{row['step_compiled_over_gate']:.1f}"]


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="image tokens S (default: %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="channels D (default: %(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=("float32", "bfloat16"), help="dtypes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each shape (default: %(default)s)")
    parser.add_argument(
        "--chain", type=int, default=64, help="gates in one evaluation, on a GPU; fewer where large (default: 64)"
    )
    parser.add_argument("--quick", action="store_true", help="1024 and 4096 tokens, 3072 channels, 7 rounds")
    args = common.parse(parser)
    if args.quick:
        args.tokens, args.channels, args.rounds = TOKENS[:2], CHANNELS[:1], 7
    if min(*args.tokens, *args.channels, args.rounds, args.chain) < 1:
        parser.error("--tokens, --channels, --rounds and --chain must be at least 1")
    return args


def main() -> None:
    args = parse()
    gpu = args.device == "gpu"
    eager = importlib.util.find_spec("mlx_teacache") is not None
    common.print_header(*DISTRIBUTIONS)
    memory = None
    if gpu:
        memory = large_copy(args.rounds)
        mx.clear_cache()
        print("kernel: milliseconds of one of several gates in one evaluation; 'copy' moves the gate's fewest bytes")
        print("step:   milliseconds of one evaluation of one gate, with its decision read on the host")
        print(f"medians of {args.rounds} rounds; GB/s: the gate's fewest bytes by the time of gate and of copy")
        print(f"limit:  {LARGE_COPY >> 20} MiB are copied at {memory:.1f} GB/s; less may stay in the chip's cache")
        if sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) < 15:
            print("note: before macOS 15 the gate always takes two dispatches")
    else:
        print("milliseconds, medians; 'copy' is the faster of one and two threads, and its bytes are the gate's fewest")
    if not eager:
        print("note: mlx-teacache is not installed, so there is no eager column")
    rows, skipped = [], []
    shapes = [(s, d, t) for t in args.dtypes for d in args.channels for s in args.tokens]
    for index, (tokens, channels, dtype) in enumerate(shapes, 1):
        name = f"{tokens} x {channels} {dtype}"
        # Inputs 3, anchors 3, three copies of 2.5 in and (two of them, and the fresh one) 2.5 out, and the eager gate's
        # temporaries, of which up to 6 are float32. On a GPU there are 3 more anchors, and all that a chain writes.
        itemsize = DTYPES[dtype].size
        arrays = 21 + (3 + 2 * chain_length(args.chain, tokens * channels * itemsize) if gpu else 0)
        needed = tokens * channels * (arrays * itemsize + 6 * 4)
        if needed > 0.8 * available_memory():
            skipped.append(f"{name}: needs about {needed / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} are free")
            continue
        print(f"[{index}/{len(shapes)}] {name} ...", file=sys.stderr, flush=True)
        if gpu:
            rows.append(measure_gpu(tokens, channels, dtype, args.rounds, eager, args.chain))
        else:
            rows.append(measure_cpu(tokens, channels, dtype, args.rounds, eager))
        mx.clear_cache()
    if gpu:
        print("\nkernel")
        common.print_table([[*KERNEL_COLUMNS, *KERNEL_RATIOS], *map(kernel_row, rows)])
        print("\nstep")
        common.print_table([[*STEP_COLUMNS, *STEP_RATIOS], *map(step_row, rows)])
    else:
        common.print_table([[*COLUMNS, *RATIOS], *map(table_row, rows)])
    for note in skipped:
        print(f"left out: {note}")
    numbers: dict[str, Any] = {"rows": rows, "left_out": skipped} | ({"memory_gb_per_s": memory} if gpu else {})
    common.write_json(args, numbers, *DISTRIBUTIONS)


if __name__ == "__main__":
    main()
