"""What does guidance in parallel give? A computed step with guidance, by one process and by two, each on one core.

Whole images of the demonstration model's pipeline with random transformers, every step computed. A step's time ends
when its latents are evaluated, on both ranks. One process and two are measured in turn, a ratio is that of a turn, each
by its fastest step. The limit of the ratio is 0.5; measured, it is a step without guidance, which is one branch. The
exchange is measured by itself too.

The two processes are of one machine, over loopback, by MLX's ring. On a GPU, which they would share, it says nothing.
Where other programs take a core, neither does it.

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
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import bench_step
import common
import mlx.core as mx

DISTRIBUTIONS = ("mflux",)
KINDS = {"one": "one process", "two": "two processes", "branch": "one branch by one process: the limit"}


def measure(kind: str, model: str, size: int, steps: int, process: int) -> dict[str, float]:
    """Seconds of the fastest step, and of an exchange of its prediction where there is one."""
    import mlx_teacache_fast as tc

    warnings.simplefilter("ignore")
    group = tc.distributed.world()
    core = process if group is None else group.rank()
    if hasattr(os, "sched_setaffinity"):  # before MLX starts a thread that computes
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    flux = bench_step.pipeline(model, mx.float32)
    marks: list[float] = []

    class Clock:
        def call_before_loop(self, **_: Any) -> None:
            marks[:] = [perf_counter()]

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            marks.append(perf_counter())

    flux.callbacks.register(Clock())
    guidance = 1.0 if kind == "branch" else 4.0
    given = dict(num_inference_steps=steps, height=size, width=size, guidance=guidance)
    with tc.apply(flux, group=group, steps="1" * steps):
        for seed in (1, 2):  # the first image fills MLX's kernel cache
            flux.generate_image(prompt="red apple", seed=seed, **given)
    found = {"step": min(b - a for a, b in pairwise(marks[1:]))}
    if group is not None:
        prediction, exchanges = mx.zeros((1, (size // 16) ** 2, 128)), []
        mx.eval(prediction)
        for _ in range(20):
            start = perf_counter()
            mx.eval(mx.distributed.all_gather(prediction, group=group))
            exchanges.append(perf_counter() - start)
        found["exchange"] = statistics.median(exchanges)
    return found


def by_two_processes(*options: str) -> dict[str, float]:
    """What the first rank gives to ``common.answer``."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        held.close()
        command, env = [sys.executable, *sys.argv, "--measure", *options], os.environ | {"MLX_HOSTFILE": str(hosts)}
        how: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ranks = [subprocess.Popen(command, env=env | {"MLX_RANK": str(rank)}, **how) for rank in range(2)]
        said = [rank.communicate() for rank in ranks]
        for rank, (_, err) in zip(ranks, said, strict=True):
            if rank.returncode:
                sys.exit(f"a process ended with exit code {rank.returncode}\n{err}")
        answer: dict[str, float] = json.loads(said[0][0].splitlines()[-1])
        return answer


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, quick="the wide model, 2 turns")
    models = [m for m in bench_step.MODELS if m != "demo"]
    parser.add_argument("--models", nargs="+", choices=bench_step.MODELS, default=models, help="default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="image side in pixels (default 256)")
    parser.add_argument("--steps", type=int, default=6, help="of each image (default 6)")
    parser.add_argument("--turns", type=int, default=4, help="of all kinds (default 4)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # of this process
    args = common.parse(parser, models=["wide"], turns=2)
    if args.steps < 3 or args.turns < 1 or any(size < 16 or size % 16 for size in args.sizes):
        parser.error("--steps must be at least 3, --turns at least 1, --sizes multiples of 16")
    return args


def main() -> None:
    args = parse()
    if args.measure:
        common.answer(measure(*args.case, args.steps, args.process))
    results = []
    for model in args.models:
        for size in args.sizes:
            turns: list[dict[str, Any]] = []
            for turn in range(args.turns):
                seconds = {}
                for kind in common.orders(list(KINDS), turn):
                    case = "--case", json.dumps([kind, model, size])
                    if kind == "two":
                        seconds[kind] = by_two_processes(*case)
                    else:
                        (seconds[kind],) = common.in_fresh_processes(1, *case, first=turn)
                turns.append(seconds)
            result = {"model": model, "tokens": (size // 16) ** 2}
            result |= {f"{kind}_ms": 1e3 * statistics.median(t[kind]["step"] for t in turns) for kind in KINDS}
            result["exchange_ms"] = 1e3 * statistics.median(t["two"]["exchange"] for t in turns)
            for kind in ("two", "branch"):
                result[f"{kind}_to_one"] = common.summary([[t[kind]["step"] / t["one"]["step"]] for t in turns])
            results.append(result)
    common.finish(args, common.collect(args, {"turns": args.turns, "results": results}, *DISTRIBUTIONS), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    print(f"\nA computed step with guidance 4, float32, {data['turns']} turns\n")
    lines = [["model", "S", *(f"{name}, ms" for name in KINDS.values()), "to one process", "the limit", "exchange, ms"]]
    claims = []
    for result in data["results"]:
        ratio, limit = result["two_to_one"], result["branch_to_one"]
        cells = [result["model"], str(result["tokens"]), *(f"{result[f'{kind}_ms']:.2f}" for kind in KINDS)]
        cells += [common.ratio_cell(ratio), common.ratio_cell(limit), f"{result['exchange_ms']:.2f}"]
        lines.append(cells)
        claims.append(common.claim(f"{result['model']}, S = {result['tokens']}: two / one", ratio, at_most=0.6))
    common.print_table(lines, left=1)
    print(f"\n{common.NOISE_NOTE}")
    common.print_claims(claims)


if __name__ == "__main__":
    main()
