"""What do skipped steps give for a whole picture, in time and quality, and what would fewer steps have given?

For each prompt, seed, regime (a schedule of the demonstration model: docs/forecasting.md), guidance and number of
steps, in turn:

    plain mflux             all steps: the reference of time and quality
    mlx-teacache            at each threshold
    ours, as mlx-teacache   the same gate and thresholds: a skipped step reuses the last residual
    ours, gate              the gate with the model's own polynomial, at multiples of its threshold, and forecasts
    ours                    as apply() is without arguments, at each tolerance
    ours, budget            steps planned by apply(budget=...)
    klein's plan            as many steps, those that were published for FLUX.2 klein base 9B
    budget, reuse           the same plan as ours, and the last residual again
    fewer steps             plain mflux, run with only as many steps as the budgets allow
    DPM-Solver++            as few steps of its second order (2M) instead of Euler's

PSNR and SSIM are against plain mflux's picture of the same prompt, seed, regime and guidance. Time is that of
generate_image, as a ratio to plain mflux's in the same turn; 1 / bound, the share of computed steps, is its limit.
Before anything is timed, short pictures of each kind compile the kernels.

Several processes share the pictures. Each of them also makes the first one's first pictures, to see that they are the
same. It says how many there are, and after the first one how long they take: on two cores hours, with a faster BLAS
for MLX (LD_PRELOAD) one and a half; --quick 3 minutes.

    python bench/bench_generation.py --regimes flux2-1024 --steps 50 --n-prompts 4 --n-seeds 1 --only "ours, budget"
    python bench/bench_generation.py --json build/generation.json --plot build/generation.png
    python bench/bench_generation.py --from build/generation.json --plot build/generation.png
    python bench/bench_generation.py --device gpu --model flux2-klein-base-4b --quantize 8
"""

import argparse
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import numpy as np

from mlx_teacache_fast.models import REGIMES
from mlx_teacache_fast.plans import PUBLISHED, placed, shifted
from mlx_teacache_fast.policy import DEFAULT_MODE, MODES, as_text

DISTRIBUTIONS = ("mflux", "mlx-teacache")
PLAIN, PEER, REUSE, GATE, OURS = CONDITIONS = [
    "plain mflux",
    "mlx-teacache",
    "ours, as mlx-teacache",
    "ours, gate",
    "ours",
]
BUDGET, PUBLISHED_PLAN, REUSED, FEWER, DPM = PLANNED = [
    "ours, budget",
    "klein's plan",
    "budget, reuse",
    "fewer steps",
    "DPM-Solver++",
]
DEFAULT = MODES[DEFAULT_MODE]  # tolerance
MULTIPLES = [1.0, 2.0, 3.0]  # of the model's own threshold
IN_FULL = 50, 4.0  # steps and guidance of the tables that the page shows: --from has the others

FULL = {"n_prompts": 10, "n_seeds": 2, "steps": [50, 25], "guidance": [1.0, 4.0], "thresholds": [0.17, 0.25, 0.4]}
FULL |= {
    "tolerances": [0.025, 0.05, 0.1, 0.2, 0.4],
    "budgets": [0.52, 0.4, 0.3, 0.2],
    "size": 128,
    "repetitions": 5,
    "regimes": list(REGIMES),
}
FEW = {"n_prompts": 3, "n_seeds": 1, "repetitions": 3}
MODEL = FULL | FEW | {"n_prompts": 2, "repetitions": 2, "steps": [50], "guidance": [4.0], "size": 512}
MODEL |= {"regimes": ["own"]}
QUICK = FEW | {"steps": [25], "guidance": [1.0], "thresholds": [0.17, 0.4], "budgets": [0.5, 0.3]}
QUICK |= {"tolerances": [0.05, 0.1, 0.2]}
QUICK |= {"regimes": common.QUICK_REGIMES}
PROMPTS = ["a red apple on a wooden table, morning light", "a street market in the rain at night, neon signs"]
Record = dict[str, Any]


def load(model: str | None, quantize: int | None) -> Any:
    """The demo's pipeline, or mflux's text-to-image pipeline of this name."""
    from mlx_teacache_fast import demo
    from mlx_teacache_fast.mflux import names

    return demo.pipeline() if model is None else names.load(model, quantize=quantize)


def is_flux2(model: str | None) -> bool:
    from mlx_teacache_fast.mflux import names

    return model is None or bool(names.find(model)[1].family.factories)


def measure(args: argparse.Namespace) -> None:
    """Prints JSON lines: the seconds of each picture, and after each turn the list of its records."""
    from mlx_teacache_fast.demo.compare import WARM_UP_STEPS

    warnings.simplefilter("ignore")
    flux = load(args.model, args.quantize)
    out, sys.stdout = sys.stdout, sys.stderr  # for what mflux prints
    for g in args.guidance:
        turn(flux, args, (args.regimes[0], WARM_UP_STEPS, g), 0, None)
    for i in turns(args)[args.process]:
        for schedule in common.schedules(args):
            print(json.dumps(turn(flux, args, schedule, i, out)), file=out, flush=True)
    os._exit(0)  # see common.answer


def places(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompts and seeds."""
    return [(text, seed) for seed in range(args.n_seeds) for text in args.texts]


def turns(args: argparse.Namespace) -> list[list[int]]:
    """Which of ``places`` each process takes; the first one is everybody's."""
    n = len(places(args))
    of_process = [list(range(k, n, args.repetitions)) for k in range(min(n, args.repetitions))]
    return [mine if k == 0 else [0, *mine] for k, mine in enumerate(of_process)]


def cases(args: argparse.Namespace, steps: int) -> list[tuple[str, Any]]:
    """Each condition with each of its settings."""
    counts = sorted({max(2, math.floor(b * steps + 1e-9)) for b in args.budgets}, reverse=True)
    settings = dict.fromkeys((PEER, REUSE), args.thresholds) | {GATE: MULTIPLES, OURS: args.tolerances}
    settings |= dict.fromkeys((BUDGET, PUBLISHED_PLAN, REUSED), args.budgets)
    settings |= dict.fromkeys((FEWER, DPM), counts)
    only = args.only or list(settings)
    return [(PLAIN, None), *((name, value) for name, values in settings.items() if name in only for value in values)]


def turn(flux: Any, args: argparse.Namespace, schedule: Any, index: int, out: Any) -> list[Record]:
    """Every condition's picture of one of ``places`` in a schedule of common's, in another order for each index."""
    import schedulers
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc
    from mlx_teacache_fast.mflux.pictures import generate

    prompt, seed = places(args)[index]
    regime, steps, guidance = schedule
    made = []
    for condition, setting in common.orders(cases(args, steps), index):
        context: AbstractContextManager[Any] = nullcontext()
        if condition == PEER:
            context = apply_teacache(flux, rel_l1_thresh=setting)
        elif condition == REUSE:
            context = tc.apply_teacache(flux, rel_l1_thresh=setting)
        elif condition == GATE:
            with tc.apply(flux, tc.Policy(rule=tc.Gate())) as of_the_model:
                threshold = of_the_model.rel_l1_thresh or 0.0
            context = tc.apply(flux, rel_l1_thresh=min(1.0, setting * threshold))
        elif condition == OURS:
            context = tc.apply(flux, tolerance=setting)
        elif condition == BUDGET:
            context = tc.apply(flux, budget=setting)
        elif condition == REUSED:
            context = tc.apply(flux, budget=setting, forecast=0, cache="residual")
        elif condition == PUBLISHED_PLAN:
            klein = PUBLISHED["flux2-klein-base-9b"]
            count = max(2, math.floor(setting * steps + 1e-9))
            its_schedule = klein.sigmas if steps == len(klein.sigmas) else shifted(steps, 8.7487)  # with 25 steps
            context = tc.apply(flux, steps=as_text(placed(klein, its_schedule, count)))
        n = setting if condition in (FEWER, DPM) else steps
        options = {"num_inference_steps": n, "guidance": guidance, "height": args.size, "width": args.size}
        other = schedulers.name(schedulers.DPMSolver, regime)
        options |= {"scheduler": other} if condition == DPM else REGIMES[regime].options
        with context as handle:
            start = perf_counter()
            picture = generate(flux, prompt, seed, options)
            seconds = perf_counter() - start
        n -= 0 if handle is None else handle.stats.skipped_count
        if out:
            print(seconds, file=out, flush=True)
        numbers = {"seconds": round(seconds, 4), "computed": n}
        made.append(({"condition": condition, "setting": setting} | numbers, picture))
    plain = next(picture for record, picture in made if record["condition"] == PLAIN)
    what = {"regime": regime, "guidance": guidance, "steps": steps, "turn": index}  # of places(): prompt and seed
    return [what | record | quality(plain, picture) for record, picture in made]


def quality(plain: Any, picture: Any) -> Record:
    """PSNR is None for identical pictures: JSON has no infinity."""
    from mlx_teacache_fast.demo.compare import Comparison
    from mlx_teacache_fast.policy import Tolerance
    from mlx_teacache_fast.record.stats import GenerationStats

    pair = Comparison("", plain, picture, 0, 0, Tolerance(), GenerationStats(()))
    psnr = round(pair.psnr, 4) if math.isfinite(pair.psnr) else None
    return {"psnr": psnr, "ssim": round(pair.ssim, 6), "crc32": zlib.crc32(np.ascontiguousarray(picture))}


def in_processes(args: argparse.Namespace) -> list[Record]:
    """The records of all processes, with one bar on stderr for them."""
    from tqdm import tqdm

    n_turns = sum(map(len, turns(args)))
    schedules = common.schedules(args)
    n_all = n_turns * sum(len(cases(args, steps)) for _, steps, _ in schedules)
    passes = [steps * (2 if g > 1 and is_flux2(args.model) else 1) for _, steps, g in schedules]  # branches of guidance
    whole = n_turns * sum(n * len(cases(args, s[1])) for n, s in zip(passes, schedules, strict=True))
    records: list[Record] = []
    print(f"{n_all} pictures; after the first, how long they take", file=sys.stderr)
    form = "{percentage:3.0f}%|{bar:20}| {n_fmt} of {total_fmt} pictures, {remaining} left"
    env = os.environ | {"TQDM_DISABLE": "1"}  # mflux's bars
    with tqdm(total=n_all, bar_format=form, dynamic_ncols=True) as bar:
        for process in range(len(turns(args))):
            command = [sys.executable, *sys.argv, "--measure", "--process", str(process)]
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
                for value in map(json.loads, child.stdout or ()):
                    if isinstance(value, list):
                        records += [{"process": process} | record for record in value]
                        continue
                    bar.update()
                    if bar.n == 1:  # of all pictures' steps about half are computed
                        minutes = whole / 2 / passes[0] * value / 60
                        text = f"the first took {value:.1f} s: all take about {minutes:.0f} minutes"
                        tqdm.write(text, file=sys.stderr)
            if child.returncode:
                sys.exit(f"process {process + 1} ended with exit code {child.returncode}")
    return records


def ratio(pictures: list[Record], references: list[Record]) -> Record:
    """Of seconds, turn by turn."""
    seconds = {(p["process"], p["turn"]): p["seconds"] for p in references}
    ratios: dict[int, list[float]] = {}
    for p in pictures:
        ratios.setdefault(p["process"], []).append(p["seconds"] / seconds[p["process"], p["turn"]])
    return common.summary(list(ratios.values()))


def as_table(pictures: list[Record]) -> Record:
    """Their names once, for a file that is a quarter as large."""
    columns = list(pictures[0])
    return {"columns": columns, "rows": [[p[name] for name in columns] for p in pictures]}


def pictures_of(data: Record) -> list[Record]:
    table = data["pictures"]
    return common.with_regime(dict(zip(table["columns"], row, strict=True)) for row in table["rows"])


def table_rows(data: Record) -> list[Record]:
    """Steps and quality are means over different pictures; times are over all."""
    rows = []
    of: dict[tuple[Any, ...], list[Record]] = {}
    for p in pictures_of(data):
        of.setdefault((p["regime"], p["steps"], p["guidance"], p["condition"], p["setting"]), []).append(p)
    for (*schedule, condition, setting), pictures in of.items():
        different = list({p["turn"]: p for p in pictures}.values())
        psnr = [p["psnr"] for p in different if p["psnr"] is not None]
        row = dict(zip(("regime", "steps", "guidance"), schedule, strict=True))
        row |= {"condition": condition, "setting": setting}
        row |= {"pictures": len(different), "identical": len(different) - len(psnr)}
        row |= {name: statistics.mean(p[name] for p in different) for name in ("computed", "ssim")}
        row["skipped"] = row["steps"] - row["computed"]
        row |= {"psnr": statistics.mean(psnr) if psnr else None, "worst": min(psnr) if psnr else None}
        row["p10"] = float(np.percentile(psnr, 10)) if psnr else None
        row |= {"bound": row["steps"] / row["computed"], "seconds": statistics.median(p["seconds"] for p in pictures)}
        row["to_mflux"] = ratio(pictures, of[*schedule, PLAIN, None])
        reused = of.get((*schedule, REUSE, setting)) if condition == PEER else None
        row["ours_to_it"] = ratio(reused, pictures) if reused else None
        rows.append(row)
    regimes, conditions = [*REGIMES], [*CONDITIONS, *PLANNED]

    def place(r: Record) -> tuple[Any, ...]:
        panel = (-r["steps"], r["guidance"], regimes.index(r["regime"]))
        return *panel, conditions.index(r["condition"]), -r["computed"]

    return sorted(rows, key=place)


def panels(data: Record) -> list[tuple[str, list[Record]]]:
    """The rows of each regime, number of steps and guidance."""
    found: dict[str, list[Record]] = {}
    for r in common.with_regime(data["rows"]):
        found.setdefault(f"{r['regime']}, {r['steps']} steps, guidance {r['guidance']:g}", []).append(r)
    return list(found.items())


def curve(rows: list[Record], *conditions: str) -> list[tuple[float, float]]:
    """Computed steps and PSNR of rows with a skipped step, the fewest steps first."""
    return sorted((r["computed"], r["psnr"]) for r in rows if r["condition"] in conditions and r["psnr"] is not None)


def claims(data: Record) -> list[list[str]]:
    """Time against mlx-teacache at the same settings."""
    return [
        common.claim(f"{panel}, threshold {r['setting']:g}: {REUSE} / {PEER}", r["ours_to_it"], at_most=1)
        for panel, rows in panels(data)
        for r in rows
        if r["ours_to_it"]
    ]


def at(rows: list[Record], condition: str, count: float) -> tuple[float, float, float] | None:
    """Computed steps, mean PSNR and 10th percentile of a condition at ``count`` computed steps, between its settings.

    Where none of its settings computes as many, or as few, those of the nearest. Settings of which a picture is
    identical are left out, for they have no PSNR.
    """
    found = [r for r in rows if r["condition"] == condition and r["identical"] == 0]
    if not found:
        return None
    points = sorted((r["computed"], r["psnr"], r["p10"]) for r in found)
    steps, mean, low = zip(*points, strict=True)
    n = min(max(count, steps[0]), steps[-1])
    return n, float(np.interp(n, steps, mean)), float(np.interp(n, steps, low))


def of_default(rows: list[Record]) -> Record | None:
    """Of a schedule's rows; None where it was not measured, or skipped nothing."""
    return next((r for r in rows if (r["condition"], r["setting"]) == (OURS, DEFAULT) and r["psnr"] is not None), None)


RIVALS = (BUDGET, GATE, PUBLISHED_PLAN, PEER, FEWER, DPM)


def at_equal_steps(data: Record) -> list[list[str]]:
    """A line for each schedule: the default, and what the others give with as many computed steps."""
    rivals = [name for name in RIVALS if name in {r["condition"] for r in data["rows"]}]
    lines = [["regime", "steps", "guidance", "computed", "by default", "worst", *rivals]]
    for _, rows in panels(data):
        if (r := of_default(rows)) is None:
            continue
        cells = [f"{r['computed']:.1f}", _pair(r["psnr"], r["p10"]), f"{r['worst']:.1f}"]
        for name in rivals:
            found = at(rows, name, r["computed"])
            other = "" if found is None or found[0] == r["computed"] else f"{found[0]:.1f}: "
            cells.append("" if found is None else other + _pair(*found[1:]))
        lines.append([r["regime"], str(r["steps"]), f"{r['guidance']:g}", *cells])
    return lines


def _pair(mean: float, low: float) -> str:
    return f"{mean:.1f} ({low:.1f})"


def quality_claims(data: Record) -> list[list[str]]:
    """Over all schedules; decibels have no noise: the same pictures come out each time."""
    schedules = [(rows, ours) for _, rows in panels(data) if (ours := of_default(rows)) is not None]
    lines = []
    for text, name, least in (("mean", "psnr", 52.0), ("10th percentile", "p10", 50.0)):
        if schedules and data["model"] is None:
            values = [ours[name] for _, ours in schedules]
            lines.append([f"the default's PSNR, {text}", f"at least {least:g} dB", *_range(values, least)])
    for rival in RIVALS:
        pairs = [(ours, its) for rows, ours in schedules if (its := at(rows, rival, ours["computed"])) is not None]
        for text, name, i in (("mean", "psnr", 1), ("10th percentile", "p10", 2)):
            # One that computes fewer steps than the default says something only where it is better.
            gains = [ours[name] - its[i] for ours, its in pairs if its[0] >= ours["computed"] or its[i] > ours[name]]
            if gains:
                lines.append(
                    [f"the default above {rival}, {text}, no more steps", "at least 0 dB", *_range(gains, 0.0)]
                )
    return lines


def _range(values: list[float], least: float) -> list[str]:
    n = sum(v >= least for v in values)
    verdict = f"{_holds(n == len(values))}: {n} of {len(values)} schedules compared"
    return [f"{min(values):.1f} to {max(values):.1f} dB", verdict]


def _holds(is_so: bool) -> str:
    return "holds" if is_so else "does not hold"


def verdict(data: Record) -> list[str]:
    """Pictures of the default that are not better than mlx-teacache's, and whether processes agree."""
    lines = []
    pictures = pictures_of(data)
    which = itemgetter("condition", "setting", "regime", "steps", "guidance", "turn")
    of = {which(p): p for p in pictures}
    threshold = min(data["thresholds"])
    better: dict[str, list[bool]] = {}
    for key, peer in of.items():
        if key[:2] == (PEER, threshold):
            if (ours := of.get((OURS, DEFAULT, *key[2:]))) is None:
                continue
            closer = (ours["psnr"] or math.inf) >= (peer["psnr"] or math.inf)
            better.setdefault(peer["regime"], []).append(closer and ours["computed"] <= peer["computed"])
    counts = [f"{sum(good)} of {len(good)} pictures ({regime})" for regime, good in better.items()]
    if counts:
        text = f"The default is at least as close as mlx-teacache at {threshold:g}, with no more computed steps, in "
        lines.append(f"{text}{', '.join(counts)}.")
    seen: dict[tuple[Any, ...], set[int]] = {}
    for p in pictures:
        seen.setdefault(which(p), set()).add(p["crc32"])
    different = [f"Not the same picture in each process: {name}" for name, sums in seen.items() if len(sums) > 1]
    n = len({p["process"] for p in pictures})
    return lines + (different or [f"No picture differs between processes ({n})."] * (n > 1))


def _setting(row: Record) -> str:
    value = row["setting"]
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def report(data: Record) -> None:
    common.print_header(data)
    if len(lines := at_equal_steps(data)) > 1:
        print("\nPSNR in dB, mean (10th percentile): as many computed steps as by default, or the nearest to that\n")
        common.print_table(lines, left=1)
    for panel, rows in panels(data):
        if common.MARKDOWN and (rows[0]["steps"], rows[0]["guidance"]) != IN_FULL:
            continue
        print(f"\n{data['model'] or 'demo model'}, {data['size']} pixels, {panel}, {rows[0]['pictures']} pictures\n")
        head = [
            "regime",
            "",
            "setting",
            "seconds",
            "to mflux",
            "1 / bound",
            "computed",
            "PSNR",
            "10 %",
            "worst",
            "SSIM",
        ]
        lines = [head]
        for r in rows:
            of_psnr = [f"{r[name]:.1f}" for name in ("psnr", "p10", "worst")] if r["psnr"] is not None else []
            psnr = of_psnr or ["identical", "", ""]
            time = "" if r["condition"] == PLAIN else common.ratio_cell(r["to_mflux"])
            cells = [r["regime"], r["condition"], _setting(r), f"{r['seconds']:.2f}", time, f"{1 / r['bound']:.2f}"]
            lines.append([*cells, f"{r['computed']:.1f} of {r['steps']}", *psnr, f"{r['ssim']:.4f}"])
        common.print_table(lines, left=2)
    if common.MARKDOWN:
        print("\nAll schedules' tables: `bench_generation.py --from FILE`, of the file in results/.")
    print("\nSteps, PSNR in dB and SSIM: means, PSNR without identical pictures; its 10th percentile, and the worst.")
    print(common.NOISE_NOTE)
    print("\n" + "\n".join(verdict(data)))
    common.print_claims([*quality_claims(data), *claims(data)])


STYLES: dict[str, Record] = {
    OURS: {"color": "#2f6fb0", "marker": "o", "zorder": 4},
    BUDGET: {"color": "#2f6fb0", "marker": "s", "linestyle": "--", "zorder": 3},
    GATE: {"color": "#8d5fb5", "marker": "o"},
    PEER: {"color": "#555555", "marker": "o", "fillstyle": "none"},
    PUBLISHED_PLAN: {"color": "#f08a24", "marker": "s", "linestyle": "--"},
    FEWER: {"color": "#3a8f4d", "marker": "^"},
    DPM: {"color": "#3a8f4d", "marker": "v", "linestyle": "--"},
}


def plot(data: Record, path: Path) -> None:
    """Mean PSNR against mean computed steps: a column for each regime, a row for each number of steps and guidance.

    Of more than four of these the ones that are IN_FULL.
    """
    from matplotlib.figure import Figure

    found = {(rows[0]["regime"], rows[0]["steps"], rows[0]["guidance"]): rows for _, rows in panels(data)}
    if len({key[1:] for key in found}) > 4:
        found = {key: rows for key, rows in found.items() if key[1:] == IN_FULL}
    regimes, counts = (list(dict.fromkeys(part)) for part in ((key[0] for key in found), (key[1:] for key in found)))
    size = (max(9.0, 1 + 3.6 * len(regimes)), 1.2 + 3 * len(counts))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(f"{data['model'] or 'TinyKlein'}: pictures against plain mflux's with all steps (higher is closer)")
    grid = figure.subplots(len(counts), len(regimes), squeeze=False, sharey=True)
    for (i, (steps, guidance)), (j, regime) in itertools.product(enumerate(counts), enumerate(regimes)):
        axes, rows = grid[i, j], found.get((regime, steps, guidance))
        axes.set_visible(rows is not None)
        for condition, style in STYLES.items() if rows else ():
            if points := curve(rows or [], condition):
                axes.plot(*zip(*points, strict=True), label=condition, **style)
        axes.set_title(f"{regime}, {steps} steps, guidance {guidance:g}", fontsize=11)
        axes.set_xlabel("computed steps, mean")
        axes.grid(axis="y", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR in dB, mean")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def parse() -> argparse.Namespace:
    p = common.parser(__doc__, quick="2 regimes, 3 prompts, 1 seed, 25 steps, 2 thresholds, 2 budgets, guidance 1")
    p.add_argument("--model", metavar="NAME", help="one of mflux's FLUX.1 or FLUX.2 names; mflux fetches its weights")
    p.add_argument("--quantize", type=int, metavar="BITS", help="of the model's weights, as mflux's commands take it")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt in each line (default: the demo's captions)")
    p.add_argument("--n-prompts", type=int, metavar="N", help="default 10, of FILE all; with --model 2 of its own")
    p.add_argument("--n-seeds", type=int, metavar="N", help="for each prompt (default 2; with --model 1)")
    common.add_regimes(p)
    p.set_defaults(regimes=None)  # of parse()
    p.add_argument("--guidance", type=float, nargs="+", help="above 1: two branches (default 1 4; with --model 4)")
    p.add_argument("--tolerances", type=float, nargs="+", help="default 0.025 0.05 0.1 0.2 0.4; 0.1 is always there")
    p.add_argument("--thresholds", type=float, nargs="+", help="default 0.17 0.25 0.4")
    p.add_argument("--budgets", type=float, nargs="+", help="default 0.52 0.4 0.3 0.2")
    p.add_argument("--steps", type=int, nargs="+", help="of a whole picture (default 50 25; with --model 50)")
    p.add_argument("--size", type=int, help="side in pixels, a multiple of 16 (default 128; with --model 512)")
    p.add_argument("--only", nargs="+", choices=[*CONDITIONS[1:], *PLANNED], help="measure these, and plain mflux")
    p.add_argument("--add", type=Path, metavar="FILE", help="of --json, from before: its pictures count too")
    p.add_argument("--repetitions", type=int, metavar="N", help="processes (default 5; with --model 2)")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write PSNR against computed steps to FILE, a PNG")
    p.add_argument("--from", dest="source", type=Path, metavar="FILE", help="table and plot of FILE; measure nothing")
    args = common.parse(p)
    defaults = FULL | (MODEL if args.model else {}) | (QUICK if args.quick else {})
    if args.prompts:
        del defaults["n_prompts"]
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.guidance, args.thresholds = sorted(set(args.guidance)), sorted(set(args.thresholds))
    args.tolerances = sorted({*args.tolerances, DEFAULT})
    args.budgets, args.steps = sorted(set(args.budgets), reverse=True), sorted(set(args.steps), reverse=True)
    if min(args.n_prompts or 1, args.n_seeds, args.repetitions, args.steps[-1] // 5, *args.guidance) < 1:
        p.error("--steps must be at least 5, and all other numbers but thresholds and budgets at least 1")
    if args.budgets[0] >= 1 or args.budgets[-1] <= 0:
        p.error("--budgets must be above 0 and below 1")
    if args.thresholds[0] <= 0 or args.thresholds[-1] > 1 or args.size < 16 or args.size % 16:
        p.error("--thresholds must be above 0 and at most 1, --size a multiple of 16")
    if args.model and args.regimes != ["own"]:
        p.error("--regimes are the demonstration model's: leave out --model")
    if args.source and args.json:
        p.error("--from measures nothing: leave out --json")
    if args.plot and args.plot.exists() and not args.force:
        p.error(f"{args.plot} exists: choose another name, or --force to replace it")
    return args


def prompts(args: argparse.Namespace) -> list[str]:
    from mlx_teacache_fast import demo
    from mlx_teacache_fast.demo.compare import check_prompts

    flux = demo.pipeline()
    captions = [caption for group in flux.captions.values() for caption in group]
    found = PROMPTS if args.model else captions[:: max(1, len(captions) // (args.n_prompts or 1))]  # of all groups
    if args.prompts:
        found = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    if len(found) < (args.n_prompts or 1):
        sys.exit(f"{Path(sys.argv[0]).name}: error: there are {len(found)} prompts: --prompts FILE takes your own")
    if not args.model:
        check_prompts(flux, found)
    return found[: args.n_prompts]


def main() -> None:
    logging.disable(logging.WARNING)  # transformers, which mflux imports, misses PyTorch
    from mflux.utils.exceptions import StopImageGenerationException

    from mlx_teacache_fast.errors import TeaCacheError

    args = parse()
    try:
        if args.source:
            data = json.loads(args.source.read_text())
            if data.get("bench") != "bench_generation":
                sys.exit(f"{args.source} is not from bench_generation.py --json")
        else:
            is_flux2(args.model)  # refuses a name that mflux does not know
            args.texts = prompts(args)
            if args.measure:
                measure(args)
                return
            names = (
                "model",
                "quantize",
                "size",
                "steps",
                "guidance",
                "thresholds",
                "budgets",
                "repetitions",
                "regimes",
            )
            data = common.collect(args, {name: getattr(args, name) for name in names}, *DISTRIBUTIONS)
            before = json.loads(args.add.read_text()) if args.add else {}
            data |= {name: before[name] for name in ("thresholds", "budgets") if before}  # of the claims
            old = pictures_of(before) if before else []
            first = 1 + max((p["process"] for p in old), default=-1)
            new = [p | {"process": first + p["process"]} for p in in_processes(args)]
            data |= {"prompts": args.texts, "pictures": as_table([*old, *new])}
            data["rows"] = table_rows(data)
        common.finish(args, data, report)
        if args.plot:
            plot(data, args.plot)
    except (TeaCacheError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except (KeyboardInterrupt, StopImageGenerationException):  # mflux makes the one of the other in its loop
        sys.exit(130)


if __name__ == "__main__":
    main()
