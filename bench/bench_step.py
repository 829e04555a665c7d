"""What one denoising step costs: mflux's compiled step, ours, and mlx-teacache's, on the embedded model.

Whole images through mflux's own generate_image, the kinds in turn and each time in another order, in several
processes. A step's time ends when its latents are evaluated. The first step of an image traces and compiles and is left
out. A ratio is that of two images of the same turn, each by its median step; printed are the median over all turns and
the quartiles. bench_branch.py measures the conditional by itself.

    python bench/bench_step.py
    python bench/bench_step.py --device gpu --size 256 --guidance 4 --repetitions 3
"""

import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import common
import mlx.core as mx

DISTRIBUTIONS = ("mflux", "mlx-teacache")
KINDS = {
    "mflux": "mflux's compiled step",
    "off": "ours, threshold 0",
    "computed": "ours, gated and computed",
    "skipped": "ours, skipped",
    "peer computed": "mlx-teacache, gated and computed",
    "peer skipped": "mlx-teacache, skipped",
}
TURNS = len(KINDS)  # in each process; each kind has each place once
ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)  # up to 8 in a row


def measure(size: int, guidance: float, steps: int) -> list[dict[str, float]]:
    """Median seconds of a step of each kind, for each turn in this process."""
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc
    from mlx_teacache_fast import demo

    warnings.simplefilter("ignore")
    flux = demo.pipeline()

    class Clock:
        def call_before_loop(self, **_: Any) -> None:
            self.marks = [perf_counter()]

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mx.synchronize()
            self.marks.append(perf_counter())

        def seconds(self) -> list[float]:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    clock = Clock()
    flux.callbacks.register(clock)

    def image(context: AbstractContextManager[Any]) -> tuple[list[float], list[str]]:
        with context as handle:
            flux.generate_image(
                prompt="red apple", seed=1, num_inference_steps=steps, height=size, width=size, guidance=guidance
            )
        last = None if handle is None else handle.stats.last_generation
        if last is None:
            kinds = ["computed"] * steps
        else:
            kinds = [getattr(s, "kind", None) or s.decision for s in getattr(last, "steps", None) or last.decisions]
        return clock.seconds()[1:], kinds[1:]

    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "mflux": nullcontext,
        "off": lambda: tc.apply(flux, rel_l1_thresh=0.0),
        "computed": lambda: tc.apply(flux, rel_l1_thresh=1e-9),
        "skipped": lambda: tc.apply(flux, rel_l1_thresh=1.0, coefficients=ALWAYS_SKIP),
        "peer computed": lambda: apply_teacache(flux, rel_l1_thresh=1e-9),
        "peer skipped": lambda: apply_teacache(flux, rel_l1_thresh=1.0, coefficients=ALWAYS_SKIP),
    }
    turns = []
    order = list(contexts)
    for turn in range(1 + TURNS):
        order = [*order[1:], order[0]]  # a drift of the machine's speed falls on each kind in turn
        seconds = {}
        for kind in order:
            times, step_kinds = image(contexts[kind]())
            skipped = kind.endswith("skipped")
            seconds[kind] = statistics.median(
                t for t, k in zip(times, step_kinds, strict=True) if (k == "skipped") == skipped
            )
        if turn > 0:  # the first turn fills MLX's kernel cache
            turns.append(seconds)
    return turns


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=128, help="image side in pixels, a multiple of 16 (default 128)")
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1 runs two branches a step (default 1)")
    parser.add_argument("--steps", type=int, default=8, help="of each image (default 8)")
    parser.add_argument("--repetitions", type=int, default=3, help="processes (default 3)")
    args = common.parse(parser)
    if args.measure:
        print("\n" + json.dumps(measure(args.size, args.guidance, args.steps)))
        return

    runs: list[dict[str, float]] = [turn for turns in common.in_fresh_processes(args.repetitions) for turn in turns]
    from mflux.utils.apple_silicon import AppleSiliconUtil

    tokens = (args.size // 16) ** 2
    common.print_header(*DISTRIBUTIONS)
    print(f"demo model, float32, S = {tokens}, D = 256, guidance {args.guidance:g}, {len(runs)} turns")
    if AppleSiliconUtil.is_m1_or_m2():
        print("note: mflux does not compile its step on this chip; what is called compiled below runs eagerly")
    lines = [["step", "ms", "to mflux", "quartiles"]]
    rows = []
    for kind, name in KINDS.items():
        ratios = [run[kind] / run["mflux"] for run in runs]
        ms = 1e3 * statistics.median(run[kind] for run in runs)
        lines.append([name, f"{ms:.2f}", *common.quartiles(ratios, 3)])
        rows.append({"kind": kind, "ms": ms, "to_mflux": ratios})
    print()
    common.print_table(lines, left=1)
    print("\nThe limit of a computed step is 1.000: mflux's own work.")
    shape = {"tokens": tokens, "channels": 256, "dtype": "float32", "guidance": args.guidance}
    common.write_json(args, shape | {"rows": rows}, *DISTRIBUTIONS)


if __name__ == "__main__":
    main()
