"""What a step costs in each of mflux's other pipelines: as mflux runs it, computed, skipped by the gate, and by a plan.

mflux's own generate_image and classes, with the small transformers of the tests (three or four blocks, random weights,
bfloat16, guidance 4): so what a step costs beside its blocks weighs more here than in a real model. The kinds in turn,
each time in another order, in several processes. A ratio is that of two images of the same turn, each by its fastest
step. The limit of a computed step is mflux's own.

"Reads" are the gated pipeline's host reads a step: by a tolerance at a computed step, by a plan, by the gate.

    python bench/bench_families.py
"""

import ast
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

LIKE = dict(coefficients=(0, 0, 0, 1, 0))  # a polynomial of no model
KINDS: dict[str, dict[str, Any] | None] = {
    "mflux": None,
    "tolerance": dict(tolerance=1e-9),
    "gate": dict(rel_l1_thresh=1e-9, **LIKE),
    "skipped": dict(rel_l1_thresh=1, coefficients=(0,) * 5),
    "planned": dict(steps="1" + "0" * 7),
}
STEPS = 8


def measure(turns: int, process: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of a step of each kind and reads a step, of each pipeline and turn."""
    import other_pipelines

    import mlx_teacache_fast as tc
    from mlx_teacache_fast import ops
    from mlx_teacache_fast.step.generation import Generation

    warnings.simplefilter("ignore")
    marks: list[float] = []
    read: list[object] = []
    settle = Generation.settle
    Generation.settle = lambda self: read.append(kind := settle(self)) or kind  # type: ignore[method-assign]

    class Clock:
        def call_before_loop(self, **_: Any) -> None:
            marks[:] = [perf_counter()]

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mx.synchronize()
            marks.append(perf_counter())

    photo = ROOT / "docs" / "demo.png"
    found: dict[str, list[dict[str, float]]] = {}
    for small in other_pipelines.PIPELINES:
        given = small.arguments(photo) | dict(guidance=4.0, num_inference_steps=STEPS)
        with small.pipeline() as flux:
            flux.callbacks.register(Clock())
            measured = []
            for turn in range(1 + turns):
                one: dict[str, float] = {}
                for kind in common.orders(list(KINDS), turn + 2 * turns * process):
                    handle = None if (how := KINDS[kind]) is None else tc.apply(flux, **how)
                    read.clear()
                    ops.reset_counters()
                    flux.generate_image(**given)
                    kinds = ["computed"] * STEPS
                    if handle is not None:
                        handle.restore()
                        kinds = [step.kind for step in handle.stats.finished[-1].steps]
                        reads = sum(kind is not None for kind in read)
                        one[f"{kind} reads"] = reads / STEPS
                    is_skipped = kind in ("skipped", "planned")
                    of_step = [b - a for a, b in pairwise(marks)]
                    timed = list(zip(of_step, kinds, strict=True))[2:]  # the first two trace
                    one[kind] = min(t for t, k in timed if (k == "skipped") == is_skipped)
                if turn > 0:
                    measured.append(one)
        found[str(small)] = measured
    return found


def lines_of_rows() -> dict[str, int]:
    """By class: how many lines its row is."""
    source = (ROOT / "python" / "mlx_teacache_fast" / "mflux" / "others.py").read_text()
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "_row"]
    names = {call: ast.literal_eval(call.args[0]).rpartition(":")[2] for call in calls}
    return {name: (call.end_lineno or 0) - call.lineno + 1 for call, name in names.items()}


def main() -> None:
    parser = common.parser(__doc__, quick="two processes")
    parser.add_argument("--repetitions", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--turns", type=int, default=2, help="of all kinds in each process (default 2)")
    args = common.parse(parser, repetitions=2)
    if min(args.repetitions, args.turns) < 1:
        parser.error("--repetitions and --turns must be at least 1")
    if args.measure:
        common.answer(measure(args.turns, args.process))
    processes = common.in_fresh_processes(args.repetitions)
    rows = lines_of_rows()
    results = []
    for name in processes[0]:
        turns = [process[name] for process in processes]
        result: dict[str, Any] = {"pipeline": name, "lines": rows[name]}
        result["ms"] = {k: 1e3 * min(turn[k] for process in turns for turn in process) for k in KINDS}
        result["to_mflux"] = {
            k: common.summary([[turn[k] / turn["mflux"] for turn in process] for process in turns])
            for k in list(KINDS)[1:]
        }
        result["reads"] = {k: turns[0][0][f"{k} reads"] for k in ("tolerance", "planned", "gate")}
        results.append(result)
    numbers = {"repetitions": args.repetitions, "turns": args.turns, "results": results}
    common.finish(args, common.collect(args, numbers, "mflux"), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    print(f"\n{data['repetitions']} processes with {data['turns']} turns each; ms: the fastest of all\n")
    says = {
        "tolerance": "computed, tolerance",
        "gate": "computed, gate",
        "skipped": "skipped, gate",
        "planned": "planned",
    }
    lines = [["pipeline", "mflux, ms", *(f"{s} / mflux" for s in says.values()), "reads", "lines"]]
    for result in data["results"]:
        cells = [common.ratio_cell(result["to_mflux"][kind]) for kind in says]
        reads = ", ".join(f"{n:.1f}" for n in result["reads"].values())
        lines.append([result["pipeline"], f"{result['ms']['mflux']:.1f}", *cells, reads, str(result["lines"])])
    common.print_table(lines, left=1)
    print(f"\n{sum(r['lines'] for r in data['results']) / len(data['results']):.0f} lines a row on average.")
    print(f"\n{common.NOISE_NOTE}")
    common.print_claims(
        [
            common.claim(
                f"{result['pipeline']}: computed, tolerance / mflux", result["to_mflux"]["tolerance"], at_most=1.02
            )
            for result in data["results"]
        ]
    )


if __name__ == "__main__":
    main()
