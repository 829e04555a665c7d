"""What one denoising step costs: mflux's compiled step, ours, and mlx-teacache's, on the embedded model.

Whole images through mflux's own generate_image, the kinds in turn and each time in another order, in several
processes. A step's time ends when its latents are evaluated. The first step of an image traces and compiles and is left
out. A ratio is that of two images of the same turn, each by its median step; printed are the median over all turns and
the quartiles. It runs on the CPU.

    python bench/bench_step.py
    python bench/bench_step.py --size 256 --guidance 4 --repetitions 3
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from time import perf_counter
from typing import Any

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
    import mlx.core as mx
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc
    from mlx_teacache_fast import demo

    warnings.simplefilter("ignore")
    mx.set_default_device(mx.cpu)
    flux = demo.pipeline()

    class Clock:
        def call_before_loop(self, **_: Any) -> None:
            self.marks = [perf_counter()]

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="image side in pixels, a multiple of 16 (default 128)")
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1 runs two branches a step (default 1)")
    parser.add_argument("--steps", type=int, default=8, help="of each image (default 8)")
    parser.add_argument("--repetitions", type=int, default=3, help="processes (default 3)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("\n" + json.dumps(measure(args.size, args.guidance, args.steps)))
        return

    runs: list[dict[str, float]] = []
    for i in range(args.repetitions):
        print(f"\rprocess {i + 1} of {args.repetitions} ...", end="", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *sys.argv, "--measure"], stdout=subprocess.PIPE, text=True, check=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip
        runs += json.loads(done.stdout.splitlines()[-1])
    print("\r", end="", file=sys.stderr)

    tokens = (args.size // 16) ** 2
    print(f"{platform.processor() or platform.machine()}, {platform.system()}, Python {platform.python_version()}")
    print(", ".join(f"{p} {version(p)}" for p in ("mlx", "mflux", "mlx-teacache", "mlx-teacache-fast")))
    print(f"demo model, float32, S = {tokens}, D = 256, guidance {args.guidance:g}, {len(runs)} turns\n")
    print(f"{'step':34}{'ms':>9}{'to mflux':>10}{'quartiles':>16}")
    for kind, name in KINDS.items():
        low, middle, high = statistics.quantiles((run[kind] / run["mflux"] for run in runs), n=4)
        ms = 1e3 * statistics.median(run[kind] for run in runs)
        print(f"{name:34}{ms:9.2f}{middle:10.3f}{low:9.3f}-{high:.3f}")
    print("\nThe limit of a computed step is 1.000: mflux's own work.")


if __name__ == "__main__":
    main()
