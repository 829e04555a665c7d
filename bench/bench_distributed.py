"""What does guidance in parallel give? A computed step with guidance, by one process and by two, each on one core.

Whole images of the demonstration model's pipeline with random transformers, every step computed. A step's time ends
when its latents are evaluated. Two processes of MLX's ring, over loopback, stay for all kinds, which take turns: what
one process does, the first one does, and the other sleeps. A ratio is that of a turn, each kind by its fastest step,
since all of an image's do the same and what disturbs them only adds; printed are the median over all turns and that of
the fastest steps of all turns. Each pair of processes is pinned to two cores before it starts.

The limit of the ratio is 0.5; measured, it is a step without guidance, which is one branch. Both processes making one
branch at the same time, with no exchange, say what this machine's two cores take from each other: what guidance in
parallel adds to that is ours. The exchange is measured by itself too.

On the CPU, unless --device asks for a GPU, which the two would share. Where other programs take a core, times say
nothing: in each step the faster process waits, and MLX's ring keeps its core busy meanwhile. CPU time is left: of the
process that had less of it, for the other one waited.

    python bench/bench_distributed.py
    python bench/bench_distributed.py --models demo --sizes 256
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import bench_step
import common
import mlx.core as mx

DISTRIBUTIONS = ("mflux",)
KINDS = {
    "one": "one process",
    "two": "two processes",
    "branch": "one branch by one process: the limit",
    "apart": "one branch by each of two, no exchange",
}
RATIOS = (("two", "one"), ("branch", "one"), ("apart", "one"), ("two", "apart"), ("two_cpu", "one_cpu"))
BOTH = ("two", "apart")  # the first process alone makes the others
ANSWER = "seconds "  # before a rank's answer, among what mflux prints


def serve(model: str, size: int, steps: int) -> None:
    """A rank: of each kind on stdin an image's steps, or exchanges of a prediction: their seconds, and of CPU time."""
    import mlx_teacache_fast as tc

    warnings.simplefilter("ignore")
    group = tc.distributed.world()
    flux = bench_step.pipeline(model, mx.float32)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((perf_counter(), process_time()))

    class Clock:
        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mark()

    flux.callbacks.register(Clock())
    prediction = mx.zeros((1, (size // 16) ** 2, 128))
    for kind in map(str.strip, sys.stdin):
        marks.clear()
        if kind == "exchange":
            for _ in range(20):
                mx.eval(mx.distributed.all_gather(prediction, group=group))
                mark()
        else:
            guidance = 1.0 if kind in ("branch", "apart") else 4.0
            given = dict(num_inference_steps=steps, height=size, width=size, guidance=guidance)
            with tc.apply(flux, group=group if kind == "two" else None, steps="1" * steps):
                flux.generate_image(prompt="red apple", seed=1, **given)
        steps_after = pairwise(marks[1:])  # two that trace and compile
        print(ANSWER + json.dumps([[b - a for a, b in zip(*pair, strict=True)] for pair in steps_after]), flush=True)


class Pair:
    """Two ranks that ``serve``."""

    def __init__(self, scratch: Path, cores: list[int], case: str) -> None:
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(2)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            hosts = scratch / "hosts.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        self._logs = [scratch / f"log{rank}" for rank in range(2)]
        self._ranks = []
        for rank, log in enumerate(self._logs):
            env = os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            command = [sys.executable, *sys.argv, "--measure", "--case", case]
            with pinned(cores[rank % len(cores)]), log.open("w") as err:
                how: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True, bufsize=1)
                self._ranks.append(subprocess.Popen(command, env=env, **how))

    def ask(self, kind: str) -> list[list[list[float]]]:
        """Of the processes that make this kind the seconds of each step, and of its CPU time."""
        asked = self._ranks[: 2 if kind in (*BOTH, "exchange") else 1]
        for rank in asked:
            print(kind, file=rank.stdin, flush=True)
        return [self._answer(rank) for rank in asked]

    def _answer(self, rank: Any) -> Any:
        for line in rank.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        sys.exit(f"a process ended with exit code {rank.wait()}\n" + "\n".join(log.read_text() for log in self._logs))

    def end(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """What starts in the block has this core, before any library counts cores; where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measured(model: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    fastest: list[list[dict[str, float]]] = []  # of each pair in each turn
    exchanges = []
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair(Path(scratch), cores, json.dumps([model, size, args.steps]))
            try:
                turns = [common.orders(list(KINDS), turn) for turn in range(args.turns)]
                fastest.append([dict(of for kind in kinds for of in fastest_of(kind, pair)) for kinds in turns])
                exchanges += [seconds for seconds, _ in pair.ask("exchange")[0]]
            finally:
                pair.end()
    everything = [turn for turns in fastest for turn in turns]
    n_tokens = (size // 16) ** 2
    found: dict[str, Any] = {"model": model, "tokens": n_tokens, "cores": len(cores)}
    found["bytes"] = n_tokens * 128 * 4  # of a prediction in float32
    found["exchange_ms"] = 1e3 * statistics.median(exchanges)
    for kind in KINDS:
        found[f"{kind}_ms"] = 1e3 * statistics.median(turn[kind] for turn in everything)
        found[f"{kind}_fastest_ms"] = 1e3 * min(turn[kind] for turn in everything)
        found[f"{kind}_cpu_ms"] = 1e3 * statistics.median(turn[f"{kind}_cpu"] for turn in everything)
    for kind, other in RATIOS:
        ratio = common.summary([[turn[kind] / turn[other] for turn in turns] for turns in fastest])
        found[f"{kind}_to_{other}"] = ratio
    return found


def fastest_of(kind: str, pair: Pair) -> Iterator[tuple[str, float]]:
    """Of the slower process the step's seconds, and those of CPU time of the one that had less."""
    ranks = [zip(*steps, strict=True) for steps in pair.ask(kind)]
    seconds, cpu = zip(*[map(min, of_rank) for of_rank in ranks], strict=True)
    yield kind, max(seconds)
    yield f"{kind}_cpu", min(cpu)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, quick="the widest model, 2 pairs, 3 turns")
    models = [m for m in bench_step.MODELS if m != "demo"]
    parser.add_argument("--models", nargs="+", choices=bench_step.MODELS, default=models, help="default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="image side in pixels (default 256)")
    parser.add_argument("--steps", type=int, default=5, help="of each image (default 5)")
    parser.add_argument("--turns", type=int, default=4, help="of all kinds, by each pair (default 4)")
    parser.add_argument("--pairs", type=int, default=5, help="of processes, one after the other (default 5)")
    parser.set_defaults(device="cpu")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # of this process
    args = common.parse(parser, models=models[-1:], pairs=2, turns=3)
    if args.steps < 4 or min(args.turns, args.pairs) < 1 or any(size < 16 or size % 16 for size in args.sizes):
        parser.error("--steps must be at least 4, --turns and --pairs at least 1, --sizes multiples of 16")
    return args


def main() -> None:
    args = parse()
    if args.measure:
        serve(*args.case)
    else:
        results = [measured(model, size, args) for model in args.models for size in args.sizes]
        about = {"turns": args.turns, "pairs": args.pairs, "results": results}
        common.finish(args, common.collect(args, about, *DISTRIBUTIONS), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    print(f"\nA computed step with guidance 4, float32, {data['pairs']} pairs of processes, {data['turns']} turns\n")
    lines = [["model", "S", "", "ms", "to one process", "fastest, ms", "CPU, ms"]]
    claims = []
    for result in data["results"]:
        for kind, name in KINDS.items():
            ratio = "1" if kind == "one" else common.ratio_cell(result[f"{kind}_to_one"])
            ms, fastest, cpu = (f"{result[f'{kind}_{what}']:.2f}" for what in ("ms", "fastest_ms", "cpu_ms"))
            lines.append([result["model"], str(result["tokens"]), name, ms, ratio, fastest, cpu])
        exchange = f"the exchange alone, {result['bytes']} bytes each way"
        lines.append([result["model"], str(result["tokens"]), exchange, f"{result['exchange_ms']:.2f}", "", "", ""])
        name = f"{result['model']}, S = {result['tokens']}: two processes"
        if result["cores"] > 1:
            claims.append(common.claim(f"{name} to one, limit 0.5", result["two_to_one"], at_most=0.6))
            claims.append(common.claim(f"{name} to two without exchange", result["two_to_apart"], at_most=1.05))
        claims.append(common.claim(f"{name} to one, CPU time", result["two_cpu_to_one_cpu"], at_most=0.6))
    common.print_table(lines, left=3)
    print(f"\n{common.NOISE_NOTE}")
    if data["results"][0]["cores"] == 1:
        print("Both processes had the same core: but for CPU time this says nothing.")
    common.print_claims(claims)


if __name__ == "__main__":
    main()
