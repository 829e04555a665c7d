"""Which forecast, what does its guard do, and where should the computed steps of a budget lie?

The demonstration model's pictures against plain mflux's in each regime (docs/forecasting.md): no times. These tables
are where the constants come from: REACH and MAX_GAIN of step/forecast.py, and SEEN of step/rules.py. "Damped": a line
of four fifths of the slope. "Of x0": a line through the clean picture as the model sees it, instead of its prediction;
it has no corrector, which at a budget of 0.2 nothing has.

    python bench/bench_forecast.py --json build/forecast.json       # half an hour on two cores, with a faster BLAS
    python bench/bench_forecast.py --regimes flux2-1024 --n-prompts 2 --steps 50 --guidance 4
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

BUDGETS = (0.4, 0.3, 0.2)
SEEN = (1 / 8, 3 / 16, 3 / 8, 3 / 4, 3 / 2)  # with the demonstration model's 64 tokens the first is sigma itself
FREE = {"reach": math.inf, "max_gain": math.inf}
DAMPED, OF_X0 = "order 1, damped", "order 1, of x0"
FORECASTS: dict[str, tuple[int, dict[str, float]]] = {
    "reuse": (0, {}),
    "order 1, free": (1, FREE),
    "order 1": (1, {}),
    DAMPED: (1, {}),
    OF_X0: (1, {}),
    "order 2, free": (2, FREE),
    "order 2, reach only": (2, {"max_gain": math.inf}),
    "order 2": (2, {}),
}


def row(flux: Any, plain: dict[Any, Any], options: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """PSNR and computed steps of the pictures when gated in this way; ``plain`` has mflux's by prompt and seed."""
    import mlx_teacache_fast as tc
    from mlx_teacache_fast.mflux.pictures import generate, psnr

    with tc.apply(flux, **how) as handle:
        found = [min(99.0, psnr(picture, generate(flux, *place, options))) for place, picture in plain.items()]
    computed = (handle.stats.total_steps - handle.stats.skipped_count) / len(plain)
    return {"computed": computed, "psnr": statistics.mean(found), "worst": min(found)}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import schedulers

    from mlx_teacache_fast import demo
    from mlx_teacache_fast.mflux.pictures import generate, progress_bar
    from mlx_teacache_fast.step import forecast, generation, rules

    flux = demo.pipeline()
    captions = [caption for group in flux.captions.values() for caption in group]
    prompts = captions[2 :: len(captions) // args.n_prompts][: args.n_prompts]
    places = [(prompt, seed) for seed in range(1, 1 + args.n_seeds) for prompt in prompts]
    which: list[dict[str, Any]] = [{"tolerance": 0.1}, *({"budget": b} for b in BUDGETS)]
    rows: list[dict[str, Any]] = []
    schedules = common.schedules(args)
    pictures = (1 + len(which) * len(FORECASTS) + len(BUDGETS) * len(SEEN)) * len(places)
    seen, weights = rules.SEEN, forecast.weights
    decide = generation.Generation.decide

    def decided(self: Any) -> Any:
        step = decide(self)
        schedulers.DataForecast.is_skipped = step is not None and step.kind == "skipped"
        return step

    def damped(sigma: float, known: Any, order: int) -> list[float]:
        last, *before = weights(sigma, known, order)
        return [0.2 + 0.8 * last, *(0.8 * w for w in before)] if known else [last, *before]

    generation.Generation.decide = decided  # type: ignore[method-assign]
    with progress_bar(flux, pictures * sum(steps for _, steps, _ in schedules)) as bar:
        for regime, steps, guidance in schedules:
            bar.set_description_str(f"{regime}, {steps} steps, guidance {guidance:g}")
            here = {"regime": regime, "steps": steps, "guidance": guidance}
            options = {"num_inference_steps": steps, "guidance": guidance, "height": 128, "width": 128}
            options |= demo.REGIMES[regime].options
            plain = {place: generate(flux, *place, options) for place in places}
            for how, (name, (order, guard)) in itertools.product(which, FORECASTS.items()):
                generation.weights = damped if name == DAMPED else functools.partial(weights, **guard)
                of_x0 = {"scheduler": schedulers.name(schedulers.DataForecast, regime)} if name == OF_X0 else {}
                about = here | {"which": " ".join(map(str, *how.items())), "forecast": name}
                rows.append(about | row(flux, plain, options | of_x0, how | {"forecast": order}))
            generation.weights = weights
            for budget, rules.SEEN in itertools.product(BUDGETS, SEEN):
                about = here | {"which": f"budget {budget}", "seen": rules.SEEN}
                rows.append(about | row(flux, plain, options, {"budget": budget}))
            rules.SEEN = seen
    return rows


def table(rows: list[dict[str, Any]], column: str) -> None:
    """A line for each schedule and choice of steps, a column for each value of ``column``; the best in each line."""
    of: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for r in common.with_regime(r for r in rows if column in r):
        of.setdefault((r["regime"], r["steps"], r["guidance"], r["which"]), {})[r[column]] = r
    names = list(next(iter(of.values())))
    lines = [["regime", "steps", "guidance", "computed", "", *map(str, names)]]
    for (regime, steps, guidance, which), here in of.items():
        cells = [f"{here[n]['psnr']:.1f} ({here[n]['worst']:.1f})" for n in names]
        lines.append([regime, str(steps), f"{guidance:g}", f"{here[names[0]]['computed']:.1f}", which, *cells])
    common.print_table(lines, left=1)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    n = data["n_prompts"] * data.get("n_seeds", 1)
    print(f"\nPSNR in dB against all steps: mean of {n} pictures (worst)")
    print("\nReuse, and forecasts of the output: without the guard (free), and with it\n")
    table(data["rows"], "forecast")
    if any("seen" in r for r in data["rows"]):  # files of before have another rule
        print("\nThe rule: for how much noise as a picture shows it the computed steps are spaced evenly, order 1\n")
        table(data["rows"], "seen")


def main() -> None:
    p = common.parser(__doc__, quick="2 prompts, 25 steps, two regimes")
    p.add_argument("--n-prompts", type=int, default=6, metavar="N", help="default 6")
    p.add_argument("--n-seeds", type=int, default=1, metavar="N", help="for each prompt, default 1")
    common.add_regimes(p)
    p.add_argument("--steps", type=int, nargs="+", default=[50, 25], help="default 50 25")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0], help="default 1 4")
    args = common.parse(p, n_prompts=2, steps=[25], regimes=common.QUICK_REGIMES)
    logging.disable(logging.WARNING)  # transformers, which mflux imports, misses PyTorch
    warnings.simplefilter("ignore")
    names = {name: getattr(args, name) for name in ("n_prompts", "n_seeds", "regimes", "steps", "guidance")}
    common.finish(args, common.collect(args, names | {"rows": measure(args)}, "mflux"), report)


if __name__ == "__main__":
    main()
