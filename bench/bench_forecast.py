"""What does the guard of forecasts do, and where should the computed steps of a budget lie?

The demonstration model's pictures against plain mflux's: no times. These tables are where the constants come from:
REACH and MAX_GAIN of step/forecast.py, and SIGMA_EXPONENT of step/rules.py.

    python bench/bench_forecast.py --json build/forecast.json       # 8 minutes on two cores, with a faster BLAS
"""

import argparse
import functools
import itertools
import logging
import math
import statistics
import warnings
from typing import Any

import common

BUDGETS = (0.5, 0.4, 0.3, 0.2)
EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FREE = {"reach": math.inf, "max_gain": math.inf}
FORECASTS: dict[str, tuple[int, dict[str, float]]] = {
    "reuse": (0, {}),
    "order 1, free": (1, FREE),
    "order 1": (1, {}),
    "order 2, free": (2, FREE),
    "order 2, reach only": (2, {"max_gain": math.inf}),
    "order 2": (2, {}),
}


def row(flux: Any, plain: dict[str, Any], options: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """PSNR and computed steps of the prompts' pictures when gated in this way; ``plain`` has mflux's."""
    import mlx_teacache_fast as tc
    from mlx_teacache_fast.mflux.pictures import generate, psnr

    with tc.apply(flux, **how) as handle:
        found = [min(99.0, psnr(picture, generate(flux, prompt, 1, options))) for prompt, picture in plain.items()]
    computed = (handle.stats.total_steps - handle.stats.skipped_count) / len(plain)
    about = {"steps": options["num_inference_steps"], "guidance": options["guidance"], "computed": computed}
    return about | {"psnr": statistics.mean(found), "worst": min(found)}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from mlx_teacache_fast import demo
    from mlx_teacache_fast.mflux.pictures import generate, progress_bar
    from mlx_teacache_fast.step import forecast, generation, rules

    flux = demo.pipeline()
    captions = [caption for group in flux.captions.values() for caption in group]
    prompts = captions[2 :: len(captions) // args.n_prompts][: args.n_prompts]
    which: list[dict[str, Any]] = [{"mode": "balanced"}, {"mode": "fast"}, *({"budget": b} for b in BUDGETS)]
    rows: list[dict[str, Any]] = []
    pictures = len(args.guidance) * (1 + len(which) * len(FORECASTS) + len(BUDGETS) * len(EXPONENTS)) * len(prompts)
    exponent, weights = rules.SIGMA_EXPONENT, forecast.weights
    with progress_bar(flux, pictures * sum(args.steps)) as bar:
        for steps, guidance in itertools.product(args.steps, args.guidance):
            bar.set_description_str(f"{steps} steps, guidance {guidance:g}")
            options = {"num_inference_steps": steps, "guidance": guidance, "height": 128, "width": 128}
            plain = {prompt: generate(flux, prompt, 1, options) for prompt in prompts}
            for how, (name, (order, guard)) in itertools.product(which, FORECASTS.items()):
                generation.weights = functools.partial(weights, **guard)
                about = {"which": " ".join(map(str, *how.items())), "forecast": name}
                rows.append(row(flux, plain, options, how | {"forecast": order}) | about)
            generation.weights = weights
            for budget, rules.SIGMA_EXPONENT in itertools.product(BUDGETS, EXPONENTS):
                about = {"which": f"budget {budget}", "exponent": rules.SIGMA_EXPONENT}
                rows.append(row(flux, plain, options, {"budget": budget}) | about)
            rules.SIGMA_EXPONENT = exponent
    return rows


def table(rows: list[dict[str, Any]], column: str) -> None:
    """A line for each schedule and choice of steps, a column for each value of ``column``; the best in each line."""
    rows = [r for r in rows if column in r]
    names = list(dict.fromkeys(r[column] for r in rows))
    lines = [["steps", "guidance", "computed", "", *map(str, names)]]
    for key in dict.fromkeys((r["steps"], r["guidance"], r["which"]) for r in rows):
        here = {r[column]: r for r in rows if (r["steps"], r["guidance"], r["which"]) == key}
        cells = [f"{here[n]['psnr']:.1f} ({here[n]['worst']:.1f})" for n in names]
        lines.append([str(key[0]), f"{key[1]:g}", f"{here[names[0]]['computed']:.1f}", key[2], *cells])
    common.print_table(lines)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    print(f"\nPSNR in dB against all steps: mean of {data['n_prompts']} pictures (worst)")
    print("\nThe guard: reuse, and forecasts of the output without it (free) and with it\n")
    table(data["rows"], "forecast")
    print("\nThe rule: how much denser the computed steps are where sigma changes faster (exponent), order 1\n")
    table(data["rows"], "exponent")


def main() -> None:
    p = common.parser(__doc__, quick="2 prompts, 25 steps")
    p.add_argument("--n-prompts", type=int, default=6, metavar="N", help="default 6")
    p.add_argument("--steps", type=int, nargs="+", default=[50, 25], help="default 50 25")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0], help="default 1 4")
    args = common.parse(p, n_prompts=2, steps=[25])
    logging.disable(logging.WARNING)  # transformers, which mflux imports, misses PyTorch
    warnings.simplefilter("ignore")
    names = {name: getattr(args, name) for name in ("n_prompts", "steps", "guidance")}
    common.finish(args, common.collect(args, names | {"rows": measure(args)}, "mflux"), report)


if __name__ == "__main__":
    main()
