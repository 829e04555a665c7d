"""What does a conditional cost inside a compiled step, computed and skipped, and what do the other ways cost?

A step is front, body and tail; its output is the next step's input, and each step is evaluated before the next begins.
All kinds compute the same decision, from the front's result:

    plain      one mx.compile, the body always: the limit of a computed step. Without the body: of a skipped one
    branch     one mx.compile with the body in ops.branch: one read of the decision on the host
    split      front, body and tail compiled by themselves, and an `if` between them that reads the decision
    where      one mx.compile, the body always, and mx.where for the result

The kinds take turns, each time in another order, in several processes. `more` is a step's time less that of the limit
in the same turn: for the branch this is its read and, on a GPU, handing arrays from stream to stream, during which
the GPU waits. It should not grow with the body. `first` is the first call, which traces and compiles (MLX keeps fused
kernels on disk, so a second run on the same machine takes less).

    python bench/bench_branch.py
    python bench/bench_branch.py --device gpu --tokens 4096 --channels 3072 --dtype bfloat16 --layers 1 8
"""

import math
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import common
import mlx.core as mx
from common import DTYPES

from mlx_teacache_fast import ops

COMPUTED, SKIPPED = ("plain", "branch", "split", "where"), ("no body", "branch", "split", "where")
KINDS = [(name, False) for name in COMPUTED] + [(name, True) for name in SKIPPED]
NAMES = {
    "plain": "plain mx.compile",
    "no body": "plain mx.compile without the body",
    "branch": "branch",
    "split": "split graphs, if on the host",
    "where": "mx.where",
}

Step = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]  # x, limit -> the next x, the decision


class Reads:
    of_split = 0


def make_steps(tokens: int, channels: int, dtype: mx.Dtype, layers: int) -> dict[str, Step]:
    def normal(*shape: int, seed: int, size: float) -> mx.array:
        return (size * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)

    weights = [normal(channels, channels, seed=i, size=math.sqrt(2 / channels)) for i in range(layers)]
    shift, cached = normal(channels, seed=layers, size=1.0), normal(tokens, channels, seed=layers + 1, size=0.1)
    mx.eval(weights, shift, cached)  # what is lazy when it is captured is computed at every call

    def front(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        h = 0.5 * x + shift
        return h, h + cached, mx.mean(mx.abs(h)) < limit

    # A matrix product first and last: mx.compile fuses nothing of the body with front or tail, in no kind.
    def body(h: mx.array) -> mx.array:
        h = h @ weights[0]
        for w in weights[1:]:
            h = mx.maximum(h, 0) @ w
        return h

    def tail(y: mx.array) -> mx.array:
        return 0.25 * y

    def plain(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
        h, _, skip = front(x, limit)
        return tail(body(h)), skip

    def no_body(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
        _, reused, skip = front(x, limit)
        return tail(reused), skip

    captured = ops.Body(lambda h: [body(h)])

    def branch(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
        h, reused, skip = front(x, limit)
        (y,) = ops.branch(skip, [reused], captured, [h])
        return tail(y), skip

    def where(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
        h, reused, skip = front(x, limit)
        return tail(mx.where(skip, reused, body(h))), skip

    compiled_front, compiled_body, compiled_tail = mx.compile(front), mx.compile(body), mx.compile(tail)

    def split(x: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
        h, reused, skip = compiled_front(x, limit)
        mx.eval(h, reused, skip)
        Reads.of_split += 1
        return compiled_tail(reused if skip.item() else compiled_body(h)), skip

    compiled: dict[str, Step] = {"plain": plain, "no body": no_body, "branch": branch, "where": where}
    return {name: mx.compile(step) for name, step in compiled.items()} | {"split": split}


def run(step: Step, x: mx.array, limit: mx.array, steps: int) -> tuple[float, mx.array]:
    """Microseconds of a step, and the last output."""
    mx.synchronize()
    start = perf_counter()
    for _ in range(steps):
        x, skip = step(x, limit)
        mx.eval(x, skip)
    mx.synchronize()
    return 1e6 * (perf_counter() - start) / steps, x


def measure(
    tokens: int, channels: int, dtype: str, layers: int, steps: int, process: int
) -> list[list[dict[str, float]]]:
    """For each turn and each of KINDS the microseconds of a step, and how often ops.branch read on the host.

    ``first_us`` is that of the first call, which traces and compiles. What a process's very first compilation costs
    falls on another function; which kind comes first differs from process to process.
    """
    mx.eval(mx.compile(lambda a: mx.exp(a) @ a)(mx.ones((2, 2))))
    compiled = make_steps(tokens, channels, DTYPES[dtype], layers)
    x = mx.random.normal((tokens, channels), key=mx.random.key(0)).astype(DTYPES[dtype])
    limits = {False: mx.array(-1.0), True: mx.array(math.inf)}
    mx.eval(x, *limits.values())
    turns = []
    kinds = range(len(KINDS))
    first = {k: run(compiled[KINDS[k][0]], x, limits[KINDS[k][1]], 1)[0] for k in common.orders(kinds, process)}
    for turn in range(1 + len(KINDS)):  # the first one is not counted
        results: dict[int, dict[str, float]] = {}
        outputs: dict[int, mx.array] = {}
        for k in common.orders(kinds, turn + len(KINDS) * process):
            name, skipped = KINDS[k]
            ops.reset_counters()
            Reads.of_split = 0
            us, outputs[k] = run(compiled[name], x, limits[skipped], steps)
            reads = (Reads.of_split + ops.counters()["reads"]) / steps
            results[k] = {"us": us, "reads": reads, "first_us": first[k]}
        for k, (name, skipped) in enumerate(KINDS):
            limit = outputs[KINDS.index(("no body", True) if skipped else ("plain", False))]
            if not mx.allclose(outputs[k], limit, rtol=0.02, atol=0.02).item():
                raise RuntimeError(f"{name}, {'skipped' if skipped else 'computed'}: its output is not the limit's")
        if turn > 0:
            turns.append([results[k] for k in range(len(KINDS))])
    return turns


def main() -> None:
    parser = common.parser(__doc__, quick="100 steps")
    parser.add_argument("--tokens", type=int, default=16, help="rows of the activation (default 16)")
    parser.add_argument("--channels", type=int, default=64, help="of the activation (default 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=(1, 8), help="matrix products of the body (default 1 and 8)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of a kind in each turn (default 200)")
    parser.add_argument("--repetitions", type=int, default=6, help=f"processes, of {len(KINDS)} turns each (default 6)")
    args = common.parse(parser, steps=100)
    if min(args.tokens, args.channels, *args.layers, args.steps, args.repetitions) < 1:
        parser.error("--tokens, --channels, --layers, --steps and --repetitions must be at least 1")
    if args.measure:
        shape = args.tokens, args.channels, args.dtype
        common.answer({n: measure(*shape, n, args.steps, args.process) for n in args.layers})

    processes = common.in_fresh_processes(args.repetitions)
    rows = []
    for layers in args.layers:
        turns = [process[str(layers)] for process in processes]
        for k, (name, skipped) in enumerate(KINDS):
            limit = KINDS.index(("no body", True) if skipped else ("plain", False))
            more = [turn[k]["us"] - turn[limit]["us"] for process in turns for turn in process]
            row = {"layers": layers, "kind": name, "skipped": skipped, "turns": len(turns[0])}
            row |= {"us": statistics.median(turn[k]["us"] for process in turns for turn in process)}
            row |= {"first_ms": statistics.median(process[0][k]["first_us"] for process in turns) / 1e3}
            row |= {"more_us": statistics.quantiles(more, n=4)}
            row |= {"host_reads": max(turn[k]["reads"] for process in turns for turn in process)}
            to = {"limit": limit} | {other: KINDS.index((other, skipped)) for other in ("split", "where")}
            for other, j in to.items():
                row[f"to_{other}"] = common.summary([[t[k]["us"] / t[j]["us"] for t in p] for p in turns])
            rows.append(row)
    numbers = {name: getattr(args, name) for name in ("tokens", "channels", "dtype", "steps", "repetitions")}
    common.finish(args, common.collect(args, numbers | {"rows": rows}), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    for layers in dict.fromkeys(row["layers"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["layers"] == layers]
        print(
            f"\n{data['dtype']}, S = {data['tokens']}, D = {data['channels']}, {layers} matrix "
            f"product{'s'[: layers > 1]} in the body; {data['repetitions']} processes with {rows[0]['turns']} turns of "
            f"{data['steps']} steps\n"
        )
        heads = ["more, us", "quartiles", "to the limit", "to split", "to where"]
        lines = [["step", "us", *heads, "host reads", "first, ms"]]
        for row in rows:
            low, middle, high = row["more_us"]
            ratios = [common.ratio_cell(row[f"to_{other}"]) for other in ("limit", "split", "where")]
            cells = [
                f"{middle:.1f}",
                f"{low:.1f} to {high:.1f}",
                *(r if row["kind"] == "branch" else "" for r in ratios),
            ]
            if row["kind"] in ("plain", "no body"):
                cells = len(heads) * [""]
            cells[2:3] = [ratios[0]] if cells[0] else [""]
            label = f"{'skipped' if row['skipped'] else 'computed'}: {NAMES[row['kind']]}"
            first = "" if row["skipped"] and row["kind"] != "no body" else f"{row['first_ms']:.1f}"
            lines.append([label, f"{row['us']:.1f}", *cells, f"{row['host_reads']:g}", first])
        common.print_table(lines, left=1)
    print(f"\n{common.NOISE_NOTE}")


if __name__ == "__main__":
    main()
