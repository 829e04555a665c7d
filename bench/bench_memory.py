"""How much memory does gating take? Peak and active memory of MLX during the denoising loop, on the demo model.

Each number is from a process of its own, without MLX's cache of freed memory, so what is counted is what is allocated.
Peak is the most during the loop; active is what stays from step to step, weights and the gate's state included. Both
are printed in MiB, and above plain mflux in units of one activation, [S, D] in float32, with S = (size / 16)^2 image
tokens and D = 256. With several repetitions the largest counts.

mflux compiles its step (but on M1 and M2), and so does ours, with mflux's whole step as the body of a branch: above it
are the gate's anchor, one activation, and what is kept of computed steps: noise predictions, here half an activation
each, or residuals, one for each branch of the guidance. mlx-teacache runs the blocks eagerly, where mflux itself takes
less: mflux is measured so too.

    python bench/bench_memory.py
    python bench/bench_memory.py --device gpu --sizes 256 512 --guidance 4
"""

import argparse
import itertools
import json
import logging
import warnings
from typing import Any

import common
import mlx.core as mx

DISTRIBUTIONS = ("mflux", "mlx-teacache")
CHANNELS, ITEMSIZE = 256, 4
LATENT_CHANNELS = 128  # of a noise prediction, for each token; one is kept beside that which the step makes
KINDS = {"mflux": common.KINDS["mflux"], "eager": "mflux, not compiled"} | common.KINDS


def measure(kind: str, size: int, guidance: float, steps: int) -> dict[str, int]:
    """Bytes."""
    from mflux.utils.apple_silicon import AppleSiliconUtil

    from mlx_teacache_fast import demo

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    mx.set_cache_limit(0)
    flux = demo.pipeline()
    seen = {"peak": 0, "active": 0}

    class Meter:
        def call_before_loop(self, **_: Any) -> None:
            mx.reset_peak_memory()

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mx.synchronize()
            seen.update(peak=mx.get_peak_memory(), active=max(seen["active"], mx.get_active_memory()))

    flux.callbacks.register(Meter())
    if kind == "eager":
        AppleSiliconUtil.is_m1_or_m2 = lambda: True
    with common.contexts(flux)["mflux" if kind == "eager" else kind]():
        run = {"num_inference_steps": steps, "height": size, "width": size, "guidance": guidance}
        flux.generate_image(prompt="red apple", seed=1, **run)
    return seen


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, quick="128 pixels, 1 process for each number")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="pixels (default 128 256)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0], help="default 1 4")
    parser.add_argument("--steps", type=int, default=5, help="of each image (default 5)")
    parser.add_argument("--repetitions", type=int, default=2, help="processes for each number (default 2)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # of this process
    args = common.parse(parser, sizes=[128], repetitions=1)
    if any(size < 16 or size % 16 for size in args.sizes) or args.steps < 4 or args.repetitions < 1:
        parser.error("--sizes must be multiples of 16, --steps at least 4, --repetitions at least 1")
    return args


def main() -> None:
    args = parse()
    if args.measure:
        common.answer(measure(*args.case, args.steps))
    processes = {
        case: common.in_fresh_processes(args.repetitions, "--case", json.dumps(case))
        for case in itertools.product(KINDS, args.sizes, args.guidance)
    }
    rows = []
    for size, guidance, kind in itertools.product(args.sizes, args.guidance, KINDS):
        tokens = (size // 16) ** 2
        row: dict[str, Any] = {"size": size, "guidance": guidance, "tokens": tokens, "kind": kind}
        for what in ("peak", "active"):
            all_bytes, of_mflux = ([p[what] for p in processes[k, size, guidance]] for k in (kind, "mflux"))
            above = max(all_bytes) - max(of_mflux)
            row |= {f"{what}_bytes": max(all_bytes), f"{what}_above": above / (tokens * CHANNELS * ITEMSIZE)}
        rows.append(row)
    numbers = {"channels": CHANNELS, "dtype": "float32", "steps": args.steps, "rows": rows}
    common.finish(args, common.collect(args, numbers, *DISTRIBUTIONS), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    for size, guidance in dict.fromkeys((row["size"], row["guidance"]) for row in data["rows"]):
        rows = [row for row in data["rows"] if (row["size"], row["guidance"]) == (size, guidance)]
        print(
            f"\n{size} pixels, S = {rows[0]['tokens']}, D = {data['channels']}, {data['dtype']}, "
            f"guidance {guidance:g}, {data['steps']} steps\n"
        )
        lines = [["", "peak, MiB", "above mflux, [S, D]", "active, MiB", "above mflux, [S, D]"]]
        for row in rows:
            cells = [KINDS[row["kind"]]]
            for what in ("peak", "active"):
                above = "" if row["kind"] == "mflux" else f"{row[f'{what}_above']:.2f}"
                cells += [f"{row[f'{what}_bytes'] / 2**20:.2f}", above]
            lines.append(cells)
        common.print_table(lines, left=1)
    claims = []
    for row in data["rows"]:
        if row["kind"] in ("watched computed", "computed", "forecast"):
            above = row["peak_above"] - LATENT_CHANNELS / data["channels"]
            what = f"{row['size']} pixels, guidance {row['guidance']:g}: {KINDS[row['kind']]}"
            verdict = "holds" if above <= 1.01 else "does not hold"
            claims.append([f"{what}, above mflux and a noise prediction", "at most 1", f"{above:.2f}", verdict])
    common.print_claims(claims)


if __name__ == "__main__":
    main()
