"""What does one gated step cost, beside the plain-MLX gates and beside the memory traffic that no gate can avoid?

Rivals, measured in turn within a process, in several processes. All skip eight steps and compute the ninth:

    gate      ops.gate; anchor and state go from step to step, the decision is evaluated
    eager     mlx-teacache's gate as it runs eagerly: modulation, gate_step with its host reads, and x + residual where
              it skips. It knows one residual a branch. Its residual also covers the text tokens, which is left out
              here, in its favour
    compiled  the same arithmetic inside one mx.compile, without any check
    copy      the fewest bytes: x, anchor and residuals are read, modulated and each branch's result written, so half as
              many arrays of x's size are copied, by numpy into memory that is in use already; with 1, 2, 4, ... threads
              up to as many as the gate takes, the fastest counts

On a CPU the gate takes up to 8 threads, MLX's own ops one.

On a CPU MLX gives the memory of large arrays back to the system, which then maps every page anew: that takes longer
than the gate, and how long changes from run to run. So with glibc the processes here keep freed memory, for every
rival, as MLX itself does on a GPU. A second table has the default.

More branches and residuals than one, none (only the decision, apply's default), and none of a modulated input that is
given, are measured with the last dtype and the first width only.

A ratio is of two times of the same turn.

On a GPU (--device gpu) two times are taken:

    kernel    many gates, each with the anchor and the state of the one before, and all that they reuse, in one
              evaluation, divided by their number: what starting and awaiting the work costs is shared by all. The
              graph is built before. `copy` is mx.negative of 2.5 arrays, in place, chained likewise
              `eager` is here the arithmetic of `compiled`, op by op
    step      one gate at a time, and its decision read on the host. `nothing` is one number, negated and read

and `2 disp.` is the gate in two dispatches, as it runs before macOS 15. (On CUDA it always has two kernels.)
"""

import argparse
import importlib.util
import itertools
import os
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import common
import mlx.core as mx
import numpy as np
from common import DTYPES

from mlx_teacache_fast import ops
from mlx_teacache_fast.policy import Gate

TOKENS = (256, 1024, 4096, 16384)  # 256 x 256 to 2048 x 2048 pixels
CHANNELS = (3072, 4096)  # klein-4b and FLUX.1; klein-9b
MAX_SKIPS = Gate.max_consecutive_skips
THREADS = [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)]  # of a copy; the gate takes at most 8
DEFAULT_MEMORY = (4096, 3072)  # tokens and channels of what is measured without keeping memory, too
DISTRIBUTIONS = ("mlx-teacache", "numpy")
PEER = importlib.util.find_spec("mlx_teacache") is not None

# Of what a chain of gates writes: all that is reused is kept to the end, and MLX keeps the anchors until the GPU is
# done with them, so that here the next gate cannot write to where its anchor is.
CHAIN_BYTES = 1 << 30
MIN_CHAIN = 4
# glibc's: nothing is mapped by itself, nothing returned, and room for more is asked for in large pieces.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": f"{1 << 40}", "MALLOC_TOP_PAD_": f"{1 << 28}"}
LARGE_COPY = 1 << 29  # bytes: more than any chip's cache
SECONDS = 0.7  # for each shape in each process
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


class Shape(NamedTuple):
    tokens: int
    channels: int
    dtype: str
    branches: int  # of guidance
    terms: int  # residuals of each
    given: bool = False  # x is the modulated input

    def __str__(self) -> str:
        kind = "given modulated" if self.given else f"{self.branches} x {self.terms} residuals"
        return f"{self.tokens} x {self.channels} {self.dtype}, {kind}"

    @property
    def nbytes(self) -> int:
        return self.tokens * self.channels * DTYPES[self.dtype].size

    @property
    def traffic(self) -> int:
        """Arrays of x's size: x, the anchor and the residuals are read, the anchor and a result a branch written."""
        return 2 + self.branches * self.terms + (not self.given) + self.branches


class Inputs:
    """Two steps' worth of inputs, so that consecutive steps differ as in a real schedule."""

    def __init__(self, shape: Shape) -> None:
        dtype = DTYPES[shape.dtype]

        def normal(size: tuple[int, ...], seed: int, scale: float = 1.0) -> mx.array:
            return (scale * mx.random.normal(size, key=mx.random.key(seed))).astype(dtype)

        size = (1, shape.tokens, shape.channels)
        x = normal(size, 0)
        self.xs = [x, x + normal(size, 1, 0.05)]
        self.shift = None if shape.given else normal((1, 1, shape.channels), 2)
        self.scale = None if shape.given else normal((1, 1, shape.channels), 3, 0.3)
        numbers = iter(range(4, 99))
        self.residuals = [[normal(size, next(numbers)) for _ in range(shape.terms)] for _ in range(shape.branches)]
        weights = mx.array([float(k == 0) or -0.5 for k in range(shape.terms)])
        self.weights = mx.broadcast_to(weights, (shape.branches, shape.terms)) + 0 if shape.terms else mx.zeros((0, 0))
        self.force = mx.array(0, mx.int32)
        mx.eval(self.xs, [] if shape.given else [self.shift, self.scale], self.residuals, self.weights, self.force)


def plain_gate(
    x: Any, shift: Any, scale: Any, anchor: Any, *, residuals: Any, weights: Any, state: Any, **rules: Any
) -> Any:
    """mlx-teacache's arithmetic; state: accumulated distance, skips in a row, whether it skips."""
    modulated = _modulated(x, shift, scale)
    change, size = (mx.mean(mx.abs(a).astype(mx.float32)) for a in (modulated - anchor, anchor))
    rel = change / mx.maximum(size, 1e-12)
    price = 0.0
    for c in rules["coefficients"]:
        price = price * rel + c
    total = state[0] + mx.maximum(price, 0.0)
    skip = (total < rules["threshold"]) & (state[1] < MAX_SKIPS)
    new_state = mx.stack([mx.where(skip, total, 0.0), mx.where(skip, state[1] + 1, 0.0), skip])
    if residuals and len(residuals[0]) == 1:
        return modulated, [x + r for (r,) in residuals], new_state
    sums = [sum(weights[b, k] * r for k, r in enumerate(terms)) for b, terms in enumerate(residuals)]
    return modulated, [(x + s).astype(x.dtype) for s in sums], new_state


def _modulated(x: Any, shift: Any, scale: Any) -> Any:
    return x if shift is None else (1.0 + scale) * mx.fast.layer_norm(x, None, None, 1e-6) + shift


class GateStep:
    """One gated step of ``gate``, with what goes from step to step."""

    def __init__(self, inputs: Inputs, gate: Callable[..., Any], compiled: bool, dispatches: int = 1) -> None:
        self.inputs = inputs
        self.dispatches = dispatches
        self.index = 0
        self.anchor = mx.zeros_like(inputs.xs[0])
        self.state = mx.zeros(8 if gate is ops.gate else 3)

        def step(
            x: Any, shift: Any, scale: Any, anchor: Any, residuals: Any, weights: Any, state: Any, force: Any
        ) -> Any:
            return gate(
                x,
                shift,
                scale,
                anchor,
                residuals=residuals,
                weights=weights,
                state=state,
                force=force,
                coefficients=common.ALWAYS_SKIP,
                threshold=1.0,
            )

        self.step = mx.compile(step) if compiled else step

    def advance(self) -> Any:
        """The next step's graph; returns what it reuses."""
        i = self.inputs
        x = i.xs[self.index % 2]
        self.index += 1
        self.anchor, reused, self.state = self.step(
            x, i.shift, i.scale, self.anchor, i.residuals, i.weights, self.state, i.force
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
        modulated = _modulated(x, i.shift, i.scale)
        decision = self.gate_step(
            self.state,
            rel_l1_thresh=1.0,
            coefficients=common.ALWAYS_SKIP,
            skip_first=0,
            skip_last=0,
            num_steps=2**31,
            step_idx=self.index,
            mod_in=modulated,
        )
        self.index += 1
        if decision.should_update_cache:
            self.state.cached_residual = x  # the body's work, which is not measured
        mx.eval([] if decision.should_compute else [x + terms[0] for terms in i.residuals])


class Copy:
    def __init__(self, nbytes: int, threads: int, pool: ThreadPoolExecutor) -> None:
        self.source, self.target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        bounds = [len(self.source) * t // threads for t in range(threads + 1)]
        self.parts = [slice(a, b) for a, b in pairwise(bounds)]
        self.pool = pool

    def __call__(self) -> None:
        if len(self.parts) == 1:
            np.copyto(self.target, self.source)
        else:
            # copyto leaves the interpreter's lock while it copies.
            list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


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


def measure(rivals: dict[str, Callable[[], None]], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Milliseconds of each round. Interleaved: what disturbs the machine disturbs every rival.

    Args:
        rivals: Each is called once in a round.
        rounds: The fewest.
        seconds: As many rounds as fit into these, but up to 8 times the fewest.
    """
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    for round_index in range(-2, 8 * rounds):  # Two rounds to compile, to seed the gates and to touch the memory.
        if round_index >= rounds and time.perf_counter() > end:
            break
        for name, rival in common.orders(list(rivals.items()), 2 + round_index):
            n = 1
            if isinstance(rival, Chain):
                rival.prepare()
                n = rival.length
            mx.synchronize()
            start = time.perf_counter()
            rival()
            mx.synchronize()
            if round_index >= 0:
                samples[name].append(1e3 * (time.perf_counter() - start) / n)
    return samples


def measure_cpu(shape: Shape, rounds: int) -> dict[str, list[float]]:
    inputs = Inputs(shape)
    fewest = shape.nbytes * shape.traffic // 2
    with ThreadPoolExecutor(THREADS[-1]) as pool:
        rivals: dict[str, Callable[[], None]] = {"gate": GateStep(inputs, ops.gate, compiled=False)}
        if shape.terms <= 1 and PEER:
            rivals["eager"] = EagerStep(inputs)
        rivals["compiled"] = GateStep(inputs, plain_gate, compiled=True)
        rivals |= {f"copy_{n}": Copy(fewest, n, pool) for n in THREADS}
        return measure(rivals, rounds, SECONDS)


def chain_length(longest: int, shape: Shape) -> int:
    return max(MIN_CHAIN, min(longest, CHAIN_BYTES // ((1 + shape.branches) * shape.nbytes)))


def measure_gpu(shape: Shape, rounds: int, longest: int) -> dict[str, list[float]]:
    inputs = Inputs(shape)
    length = chain_length(longest, shape)
    gates: dict[str, Callable[[], GateStep]] = {
        "gate": lambda: GateStep(inputs, ops.gate, compiled=False),
        "two_dispatches": lambda: GateStep(inputs, ops.gate, compiled=False, dispatches=2),
        "compiled": lambda: GateStep(inputs, plain_gate, compiled=True),
    }
    if not mx.metal.is_available():
        del gates["two_dispatches"]
    rivals: dict[str, Callable[[], None]] = {f"kernel {n}": GateChain(make(), length) for n, make in gates.items()}
    rivals["kernel eager"] = GateChain(GateStep(inputs, plain_gate, compiled=False), length)
    rivals["kernel copy"] = CopyChain(shape.nbytes * shape.traffic // 2, length)
    rivals |= {f"step {n}": make() for n, make in gates.items()}
    if shape.terms == 1 and PEER:
        rivals["step eager"] = EagerStep(inputs)
    rivals["step nothing"] = Nothing()
    return measure(rivals, rounds, SECONDS)


def row_of(shape: Shape, processes: list[dict[str, list[float]]], gpu: bool) -> dict[str, Any]:
    """Median milliseconds of each rival, and the ratios that are quoted."""
    ms = {name: statistics.median(t for p in processes for t in p[name]) for name in processes[0]}
    if gpu:
        copy, gate, step = "kernel copy", "kernel gate", "step gate"
        over_gate = {n: f"kernel {n}" for n in ("two_dispatches", "eager", "compiled")}
        over_step = {"step_eager": "step eager", "step_compiled": "step compiled"}
    else:
        copy, gate, step = (
            min((name for name in ms if name.startswith("copy")), key=lambda name: ms[name]),
            "gate",
            "gate",
        )
        over_gate, over_step = {"eager": "eager", "compiled": "compiled"}, {}

    def ratio(a: str, b: str) -> dict[str, Any]:
        return common.summary([[x / y for x, y in zip(p[a], p[b], strict=True)] for p in processes])

    ratios = {"gate_over_copy": ratio(gate, copy)}
    ratios |= {f"{n}_over_gate": ratio(rival, gate) for n, rival in over_gate.items() if rival in ms}
    ratios |= {f"{n}_over_gate": ratio(rival, step) for n, rival in over_step.items() if rival in ms}
    traffic = shape.traffic * shape.nbytes / 1e6
    rates = {"gate_gb_per_s": traffic / ms[gate], "limit_gb_per_s": traffic / ms[copy]}
    return shape._asdict() | {"ms": ms, "limit_ms": ms[copy]} | rates | {"ratios": ratios}


def shape_of(row: dict[str, Any]) -> Shape:
    return Shape(**{name: row[name] for name in Shape._fields if name in row})


def exponents(rows: list[dict[str, Any]], gate: str) -> list[dict[str, Any]]:
    """For each kind of shape, by how much the gate's time grows with the tokens: ms ~ tokens ** exponent."""
    fits = []
    kinds = {shape_of(row)[1:]: None for row in rows}
    for kind in kinds:
        same = [row for row in rows if shape_of(row)[1:] == kind]
        if len(same) > 1:
            slope, _ = np.polyfit(np.log([r["tokens"] for r in same]), np.log([r["ms"][gate] for r in same]), 1)
            fits.append(dict(zip(Shape._fields[1:], kind, strict=True)) | {"exponent": float(slope)})
    return fits


def large_copy(rounds: int) -> float:
    """GB/s of the device's memory."""
    ms = statistics.median(measure({"copy": CopyChain(LARGE_COPY, 10)}, rounds)["copy"])
    return 2 * LARGE_COPY / ms / 1e6


# ---- Tables


CPU_TIMES = {name: name for name in ("gate", "eager", "compiled")} | {f"copy_{n}": f"copy x{n}" for n in (1, 2, 4, 8)}
KERNEL_TIMES = {f"kernel {n}": title for n, title in {"gate": "gate", "two_dispatches": "2 disp."}.items()}
KERNEL_TIMES |= {"kernel eager": "eager", "kernel compiled": "compiled", "kernel copy": "copy"}
STEP_TIMES = {"step gate": "gate", "step two_dispatches": "2 disp.", "step eager": "eager", "step compiled": "compiled"}
STEP_TIMES |= {"step nothing": "nothing"}
RATES = {"gate_gb_per_s": "GB/s", "limit_gb_per_s": "limit GB/s"}
CPU_RATIOS = {"gate_over_copy": "gate/copy", "eager_over_gate": "eager/gate", "compiled_over_gate": "compiled/gate"}
KERNEL_RATIOS = {
    "gate_over_copy": "gate/copy",
    "two_dispatches_over_gate": "2 disp./gate",
    "eager_over_gate": "eager/gate",
    "compiled_over_gate": "compiled/gate",
}
STEP_RATIOS = {"step_eager_over_gate": "eager/gate", "step_compiled_over_gate": "compiled/gate"}


def print_rows(
    rows: list[dict[str, Any]], times: dict[str, str], rates: dict[str, str], ratios: dict[str, str]
) -> None:
    times = {name: title for name, title in times.items() if any(name in row["ms"] for row in rows)}
    ratios = {name: title for name, title in ratios.items() if any(name in row["ratios"] for row in rows)}
    lines = [[*Shape._fields, *times.values(), *rates.values(), *ratios.values()]]
    for row in rows:
        cells = [f"{value}" for value in shape_of(row)]
        cells += [f"{row['ms'][name]:.3g}" if name in row["ms"] else "-" for name in times]
        cells += [f"{row[name]:.1f}" for name in rates]
        cells += [common.ratio_cell(row["ratios"][n]) if n in row["ratios"] else "-" for n in ratios]
        lines.append(cells)
    common.print_table(lines)


def parse() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        quick="256 to 4096 tokens, 3072 channels, bfloat16 with up to two branches and three terms, float32 at 4096",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="image tokens S (default: %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="channels D (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="default: %(default)s")
    parser.add_argument(
        "--branches",
        type=int,
        nargs="+",
        default=(1, 2),
        help="of guidance; more than 1 with the last dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--terms",
        type=int,
        nargs="+",
        default=(1, 2, 3),
        help="residuals of each; more than 1 likewise (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="in each process, of each shape; up to 8 times as many of a small one, in "
        f"{SECONDS:g} s (default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=4, help="processes (default: %(default)s)")
    parser.add_argument(
        "--chain", type=int, default=64, help="gates in one evaluation, on a GPU; fewer where large (default: 64)"
    )
    parser.add_argument("--default-memory", action="store_true", help=argparse.SUPPRESS)  # of this process
    short: dict[str, Any] = {"tokens": TOKENS[:3], "channels": CHANNELS[:1], "dtypes": ("float32", "bfloat16")}
    args = common.parse(parser, **short, rounds=3, repetitions=5)
    if min(*args.tokens, *args.channels, *args.branches, *args.terms, args.rounds, args.repetitions, args.chain) < 1:
        parser.error("all numbers must be at least 1")
    if max(args.branches) > 2 or max(args.terms) > 4:
        parser.error("--branches must be 1 or 2, --terms 1 to 4")
    # One residual in every dtype and width; more, and two branches, where most pictures are made.
    kinds = [(t, d, 1, 1) for t in args.dtypes for d in args.channels]
    more = [(2, 1), (1, 3)] if args.quick else list(itertools.product(args.branches, args.terms))
    more = [(0, 0), *more]  # 0: only the decision, as where the output is kept, apply's default
    kinds += [kind for b, k in more if (kind := (args.dtypes[-1], args.channels[0], b, k)) not in kinds]
    args.shapes = [Shape(s, d, t, b, k) for t, d, b, k in kinds for s in args.tokens]
    args.shapes += [Shape(s, args.channels[0], args.dtypes[-1], 0, 0, given=True) for s in args.tokens]
    if args.quick:
        args.shapes = [s for s in args.shapes if s.dtype != args.dtypes[0] or s.tokens == max(args.tokens)]
    if args.default_memory:
        args.shapes = [s for s in args.shapes if s[:2] == DEFAULT_MEMORY and s.terms == s.branches == 1]
    return args


def measured(args: argparse.Namespace) -> list[dict[str, list[float]] | None]:
    """For each shape the milliseconds of each round; None where there is too little memory."""
    results: list[dict[str, list[float]] | None] = []
    for shape in args.shapes:
        if needed_memory(shape, args) > 0.8 * available_memory():
            results.append(None)
        elif args.device == "gpu":
            results.append(measure_gpu(shape, args.rounds, args.chain))
        else:
            results.append(measure_cpu(shape, args.rounds))
        mx.clear_cache()
    return results


def needed_memory(shape: Shape, args: argparse.Namespace) -> int:
    """Bytes: inputs, anchors, results, the copies' sources and targets, and the eager gate's temporaries in float32."""
    arrays = 5 + 2 * shape.branches * (1 + shape.terms) + 3 * shape.traffic
    if args.device == "gpu":
        arrays += 3 + (1 + shape.branches) * chain_length(args.chain, shape)
    return shape.nbytes * arrays + shape.tokens * shape.channels * 6 * 4


def rows_of(args: argparse.Namespace, *options: str, **environment: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The shapes' rows, and what was left out."""
    processes = common.in_fresh_processes(args.repetitions, *options, **environment)
    rows, left_out = [], []
    shapes = [Shape(*shape) for shape in processes[0]["shapes"]]
    for shape, *results in zip(shapes, *(p["ms"] for p in processes), strict=True):
        if None in results:
            left_out.append(str(shape))
        else:
            rows.append(row_of(shape, results, args.device == "gpu"))
    return rows, left_out


def main() -> None:
    args = parse()
    if args.measure:
        common.answer({"shapes": args.shapes, "ms": measured(args)})
    gpu = args.device == "gpu"
    memory = large_copy(args.rounds) if gpu else None
    keep = KEEP_MEMORY if not gpu and platform.libc_ver()[0] == "glibc" else {}
    rows, left_out = rows_of(args, **keep)
    default = rows_of(args, "--default-memory")[0] if keep else []
    numbers: dict[str, Any] = {"rounds": args.rounds, "repetitions": args.repetitions, "memory_gb_per_s": memory}
    numbers |= {"environment": keep, "rows": rows, "default_memory_rows": default, "left_out": left_out}
    numbers["exponents"] = exponents(rows, "kernel gate" if gpu else "gate")
    common.finish(args, common.collect(args, numbers, *DISTRIBUTIONS), report)


def claims(data: dict[str, Any]) -> list[list[str]]:
    lines = []
    gpu = data["memory_gb_per_s"] is not None
    for row in data["rows"]:
        if shape_of(row) in [Shape(s, 3072, "bfloat16", 1, 1) for s in ((4096, 16384) if gpu else (4096,))]:
            at, ratios = f"{row['tokens']} x 3072 bfloat16", row["ratios"]
            # On CUDA, 85 % of the copy's bandwidth.
            limit = 1 / 0.85 if gpu and "kernel two_dispatches" not in row["ms"] else 2
            lines.append(common.claim(f"{at}: gate / copy", ratios["gate_over_copy"], at_most=limit))
            for name, limits in (("eager", 10), ("compiled", 3)):
                if f"{name}_over_gate" in ratios:
                    lines.append(common.claim(f"{at}: {name} / gate", ratios[f"{name}_over_gate"], at_least=limits))
    return lines


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    gpu = data["memory_gb_per_s"] is not None
    print(f"\nmedians of {data['repetitions']} processes with at least {data['rounds']} rounds each")
    if gpu:
        print("kernel: milliseconds of one of several gates in one evaluation; 'copy' moves the gate's fewest bytes")
        print("step:   milliseconds of one evaluation of one gate, with its decision read on the host")
        rate = data["memory_gb_per_s"]
        print(f"limit:  {LARGE_COPY >> 20} MiB are copied at {rate:.1f} GB/s; less may stay in the chip's cache")
        if any("kernel two_dispatches" in row["ms"] for row in data["rows"]):
            print("note:   before macOS 15 the gate always takes two dispatches")
        print("\nkernel\n")
        print_rows(data["rows"], KERNEL_TIMES, RATES, KERNEL_RATIOS)
        print("\nstep\n")
        print_rows(data["rows"], STEP_TIMES, {}, STEP_RATIOS)
    else:
        if data["environment"]:
            print(f"with {' '.join(f'{name}={value}' for name, value in data['environment'].items())}: memory is kept")
        print(
            "milliseconds; the gate has up to 8 threads, MLX's ops one; the fastest copy of the gate's fewest bytes\n"
        )
        print_rows(data["rows"], CPU_TIMES, RATES, CPU_RATIOS)
    if data["default_memory_rows"]:
        print("\nmemory is returned to the system after each use, as by default\n")
        print_rows(data["default_memory_rows"], CPU_TIMES, RATES, CPU_RATIOS)
    print(f"\n{common.NOISE_NOTE}")
    for name in data["left_out"]:
        print(f"left out, too little memory: {name}")
    if data["exponents"]:
        grows = [fit["exponent"] for fit in data["exponents"]]
        print(f"The gate's time grows as tokens ** {min(grows):.2f} to {max(grows):.2f} ({len(grows)} fits).")
    common.print_claims(claims(data))


if __name__ == "__main__":
    main()
