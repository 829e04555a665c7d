"""What do skipped steps give for a whole picture, in time and quality, and what would fewer steps have given?

For each prompt, seed and guidance, in turn:

    plain mflux            all steps: the reference of time and quality
    ours, mlx-teacache     at each threshold
    evenly spaced          as many steps computed as ours computed of this very picture, at even distances
    fewer steps            plain mflux, run with only as many steps as ours computed

PSNR and SSIM are against plain mflux's picture of the same prompt, seed and guidance. Time is generate_image's, as a
ratio to plain mflux's in the same turn; 1 / bound, the share of computed steps, is its limit. Where ours skips nothing
the last two are plain mflux's picture. Before anything is timed, short pictures of each kind compile the kernels.

Several processes share the pictures. Each of them also makes the first one's first pictures, to see that they are the
same. It says how many there are, and after the first one how long they take: on two cores hours, with a faster BLAS
for MLX (LD_PRELOAD) 20 minutes; --quick 3 minutes.

    python bench/bench_generation.py --json build/generation.json --plot build/generation.png
    python bench/bench_generation.py --from build/generation.json --plot build/generation.png
    python bench/bench_generation.py --device gpu --model flux2-klein-base-4b --quantize 8
"""

import argparse
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
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import numpy as np

DISTRIBUTIONS = ("mflux", "mlx-teacache")
PLAIN, OURS, PEER, EVEN, FEWER = CONDITIONS = ("plain mflux", "ours", "mlx-teacache", "evenly spaced", "fewer steps")

FULL = {"n_prompts": 20, "n_seeds": 2, "steps": 50, "guidance": [1.0, 4.0], "thresholds": [0.17, 0.25, 0.4]}
FULL |= {"size": 128, "repetitions": 5}
FEW = {"n_prompts": 3, "n_seeds": 1, "repetitions": 3}
MODEL = FULL | FEW | {"n_prompts": 2, "repetitions": 2, "guidance": [4.0], "size": 512}
QUICK = FEW | {"steps": 25, "guidance": [1.0], "thresholds": [0.2, 0.4]}
PROMPTS = ["a red apple on a wooden table, morning light", "a street market in the rain at night, neon signs"]
Record = dict[str, Any]


def load(model: str | None, quantize: int | None) -> Any:
    """The demo's pipeline, or mflux's text-to-image pipeline of this name."""
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1
    from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

    from mlx_teacache_fast import demo

    if model is None:
        return demo.pipeline()
    return (Flux2Klein if is_flux2(model) else Flux1)(model_config=ModelConfig.from_name(model), quantize=quantize)


def is_flux2(model: str | None) -> bool:
    from mlx_teacache_fast.mflux import models

    return model is None or models.find(model).pipeline == "Flux2Klein"


def measure(args: argparse.Namespace) -> None:
    """Prints JSON lines: the seconds of each picture, and after each turn the list of its records."""
    from mlx_teacache_fast.demo.compare import WARM_UP_STEPS

    warnings.simplefilter("ignore")
    flux = load(args.model, args.quantize)
    out, sys.stdout = sys.stdout, sys.stderr  # for what mflux prints
    for g in args.guidance:
        turn(flux, (args.texts[0], 0, g), 0, args.size, WARM_UP_STEPS, [1.0], None)
    for i in turns(args)[args.process]:
        text, seed = places(args)[i]
        for g in args.guidance:
            records = turn(flux, (text, seed, g), i, args.size, args.steps, args.thresholds, out)
            print(json.dumps(records), file=out, flush=True)
    os._exit(0)  # see common.answer


def places(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompts and seeds."""
    return [(text, seed) for seed in range(args.n_seeds) for text in args.texts]


def turns(args: argparse.Namespace) -> list[list[int]]:
    """Which of ``places`` each process takes; the first one is everybody's."""
    n = len(places(args))
    of_process = [list(range(k, n, args.repetitions)) for k in range(min(n, args.repetitions))]
    return [mine if k == 0 else [0, *mine] for k, mine in enumerate(of_process)]


def turn(flux: Any, place: Any, index: int, size: int, steps: int, thresholds: list[float], out: Any) -> list[Record]:
    """Every condition's picture of a prompt, seed and guidance, in another order for each index."""
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc

    what = dict(zip(("prompt", "seed", "guidance"), place, strict=True))

    @cache  # two thresholds may compute as many steps
    def generate(condition: str, threshold: float | None = None, computed: int = steps) -> tuple[Any, Record]:
        context: AbstractContextManager[Any] = nullcontext()
        if condition in (OURS, PEER):
            context = (tc.apply if condition == OURS else apply_teacache)(flux, rel_l1_thresh=threshold)
        elif condition == EVEN:
            context = tc.apply(flux, steps=np.isin(range(steps), np.linspace(0, steps - 1, computed).round()).tolist())
        n = computed if condition == FEWER else steps
        with context as handle:
            start = perf_counter()
            generated = flux.generate_image(**what, num_inference_steps=n, height=size, width=size)
            seconds = perf_counter() - start
        n -= 0 if handle is None else handle.stats.skipped_count
        if out:
            print(seconds, file=out, flush=True)
        numbers = {"seconds": seconds, "computed": n, "skipped": steps - n, "bound": steps / n}
        return np.asarray(generated.image.convert("RGB")), numbers

    made = {(PLAIN, None): generate(PLAIN)} if index % 2 == 0 else {}
    for threshold in np.roll(thresholds, -index).tolist():
        for condition in (OURS, PEER)[:: (-1) ** index]:
            made[condition, threshold] = generate(condition, threshold)
        computed = made[OURS, threshold][1]["computed"]
        for condition in (EVEN, FEWER)[:: (-1) ** index]:
            made[condition, threshold] = generate(condition, None, computed) if computed < steps else generate(PLAIN)
    plain, _ = made[PLAIN, None] = generate(PLAIN)
    what["turn"] = index
    return [
        what | {"threshold": threshold, "condition": condition} | numbers | quality(plain, picture)
        for (condition, threshold), (picture, numbers) in made.items()
    ]


def quality(plain: Any, picture: Any) -> Record:
    """PSNR is None for identical pictures: JSON has no infinity."""
    from mlx_teacache_fast.demo.compare import Comparison
    from mlx_teacache_fast.stats import GenerationStats

    pair = Comparison("", plain, picture, 0, 0, 0, GenerationStats(()))
    psnr = pair.psnr if math.isfinite(pair.psnr) else None
    return {"psnr": psnr, "ssim": pair.ssim, "crc32": zlib.crc32(np.ascontiguousarray(picture))}


def in_processes(args: argparse.Namespace) -> list[Record]:
    """The records of all processes, with one bar on stderr for them."""
    from tqdm import tqdm

    numbers = [len(mine) * len(args.guidance) for mine in turns(args)]
    of_turn = 1 + 4 * len(args.thresholds)
    n_all = sum(numbers) * of_turn
    records: list[Record] = []
    print(f"at most {n_all} pictures; after the first, how long they take", file=sys.stderr)
    form = "{percentage:3.0f}%|{bar:20}| {n_fmt} of at most {total_fmt} pictures, {remaining} left"
    env = os.environ | {"TQDM_DISABLE": "1"}  # mflux's bars
    with tqdm(total=n_all, bar_format=form, dynamic_ncols=True) as bar:
        for process in range(len(numbers)):
            command = [sys.executable, *sys.argv, "--measure", "--process", str(process)]
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
                for value in map(json.loads, child.stdout or ()):
                    if isinstance(value, list):
                        records += [{"process": process} | record for record in value]
                        bar.update(-bar.n % of_turn)  # those that the turn did without
                        continue
                    bar.update()
                    if bar.n == 1:  # of gated pictures half the steps are skipped, say; guidance takes two branches
                        branches = [2 if g > 1 and is_flux2(args.model) else 1 for g in args.guidance]
                        whole = sum(numbers) * (1 + 2 * len(args.thresholds)) * statistics.mean(branches) / branches[0]
                        text = f"the first took {value:.1f} s: all take about {whole * value / 60:.0f} minutes"
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


def table_rows(data: Record) -> list[Record]:
    """Steps and quality are means over different pictures; times are over all."""
    rows = []
    of: dict[tuple[Any, ...], list[Record]] = {}
    for p in data["pictures"]:
        of.setdefault((p["guidance"], p["threshold"], p["condition"]), []).append(p)
    for (guidance, threshold, condition), pictures in of.items():
        different = list({p["turn"]: p for p in pictures}.values())
        psnr = [p["psnr"] for p in different if p["psnr"] is not None]
        row = {"guidance": guidance, "threshold": threshold, "condition": condition, "pictures": len(different)}
        row |= {name: statistics.mean(p[name] for p in different) for name in ("computed", "skipped", "ssim")}
        row |= {"psnr": statistics.mean(psnr) if psnr else None, "identical": len(different) - len(psnr)}
        row |= {"bound": data["steps"] / row["computed"], "seconds": statistics.median(p["seconds"] for p in pictures)}
        row["to_mflux"] = ratio(pictures, of[guidance, None, PLAIN])
        row["ours_to_it"] = ratio(of[guidance, threshold, OURS], pictures) if threshold else None
        rows.append(row)
    return sorted(rows, key=lambda r: (r["guidance"], r["threshold"] or 0, CONDITIONS.index(r["condition"])))


def claims(data: Record) -> list[list[str]]:
    at = [(f"guidance {r['guidance']:g}, threshold {r['threshold'] or 0:g}", r) for r in data["rows"]]
    return [common.claim(f"{a}: {OURS} / {PEER}", r["ours_to_it"], at_most=1) for a, r in at if r["condition"] == PEER]


def verdict(data: Record) -> list[str]:
    """Where another condition's pictures are closer to plain mflux's, and whether processes agree on pictures."""
    closer: dict[str, list[str]] = {}
    ours = {(r["guidance"], r["threshold"]): r["psnr"] for r in data["rows"] if r["condition"] == OURS}
    for r in data["rows"]:
        psnr = ours.get((r["guidance"], r["threshold"]))
        if r["condition"] in (PEER, EVEN, FEWER) and psnr and r["psnr"] and r["psnr"] - psnr > 0.05:
            at = f"guidance {r['guidance']:g}: {r['condition']} is closer to plain mflux than ours at threshold"
            closer.setdefault(at, []).append(f"{r['threshold']:g} (by {r['psnr'] - psnr:.1f} dB)")
    lines = [f"{text} {', '.join(at)}" for text, at in closer.items()] or ["No other condition has a better PSNR."]
    seen: dict[tuple[Any, ...], set[int]] = {}
    for p in data["pictures"]:
        seen.setdefault((p["condition"], p["threshold"], p["guidance"], p["turn"]), set()).add(p["crc32"])
    different = [f"Not the same picture in each process: {name}" for name, sums in seen.items() if len(sums) > 1]
    n = len({p["process"] for p in data["pictures"]})
    return lines + (different or [f"No picture differs between processes ({n})."] * (n > 1))


def report(data: Record) -> None:
    common.print_header(data)
    for guidance in data["guidance"]:
        rows = [r for r in data["rows"] if r["guidance"] == guidance]
        shape = f"{data['size']} pixels, guidance {guidance:g}, {rows[0]['pictures']} pictures"
        print(f"\n{data['model'] or 'demo model'}, {shape}\n")
        lines = [
            ["threshold", "", "seconds", "to mflux", "quartiles", "1 / bound", "computed", "skipped", "PSNR", "SSIM"]
        ]
        for r in rows:
            time, known = r["to_mflux"], r["condition"] == PLAIN
            cells = [f"{r['threshold']:g}" if r["condition"] == OURS else "", r["condition"], f"{r['seconds']:.2f}"]
            cells += ["", ""] if known else [common.ratio_cell(time), f"{time['low']:.2f} to {time['high']:.2f}"]
            cells += [f"{1 / r['bound']:.2f}", f"{r['computed']:.1f} of {data['steps']}", f"{r['skipped']:.1f}"]
            cells += ["identical" if r["psnr"] is None else f"{r['psnr']:.1f} dB", f"{r['ssim']:.4f}"]
            lines.append(cells)
        common.print_table(lines, left=2)
    print("\nSteps, PSNR and SSIM: means, PSNR without identical pictures.")
    print(common.NOISE_NOTE)
    print("\n" + "\n".join(verdict(data)))
    common.print_claims(claims(data))


STYLES: dict[str, Record] = {
    OURS: {"color": "#2f6fb0", "marker": "o", "zorder": 3},
    PEER: {"color": "#555555", "marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": ":"},
    EVEN: {"color": "#f08a24", "marker": "s"},
    FEWER: {"color": "#3a8f4d", "marker": "^"},
}


def plot(data: Record, path: Path) -> None:
    """Mean PSNR against mean computed steps, a panel for each guidance."""
    from matplotlib.figure import Figure

    n = len(data["guidance"])
    figure = Figure(figsize=(1 + 5.5 * n, 5), dpi=100, layout="constrained")
    figure.suptitle(f"{data['model'] or 'TinyKlein'}: pictures against plain mflux's with {data['steps']} steps")
    for axes, guidance in zip(figure.subplots(1, n, squeeze=False, sharey=True)[0], data["guidance"], strict=True):
        rows = [r for r in data["rows"] if r["guidance"] == guidance and r["skipped"] > 0]
        for condition, style in STYLES.items():
            points = sorted((r["computed"], r["psnr"]) for r in rows if r["condition"] == condition)
            axes.plot([x for x, _ in points], [y for _, y in points], label=condition, **style)
        marks: dict[float, str] = {}
        for row in (r for r in rows if r["condition"] == OURS):
            x = next((x for x in marks if abs(x - row["computed"]) < data["steps"] / 20), row["computed"])
            marks[x] = f"{marks[x]}, {row['threshold']:g}" if x in marks else f"{row['threshold']:g}"
        axes.secondary_xaxis("top").set_xticks(list(marks), labels=list(marks.values()), fontsize=8)
        axes.set_title(f"guidance {guidance:g}; at thresholds", fontsize=11)
        axes.set_xlabel(f"computed steps of {data['steps']}, mean")
        axes.grid(axis="y", color="#eeeeee")
    figure.axes[0].set_ylabel("PSNR in dB, mean (higher is closer)")
    figure.axes[0].legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def parse() -> argparse.Namespace:
    p = common.parser(__doc__, quick="3 prompts, 1 seed, 25 steps, 2 thresholds, guidance 1")
    p.add_argument("--model", metavar="NAME", help="one of mflux's FLUX.1 or FLUX.2 names; mflux fetches its weights")
    p.add_argument("--quantize", type=int, metavar="BITS", help="of the model's weights, as mflux's commands take it")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt in each line (default: the demo's captions)")
    p.add_argument("--n-prompts", type=int, metavar="N", help="default 20, of FILE all; with --model 2 of its own")
    p.add_argument("--n-seeds", type=int, metavar="N", help="for each prompt (default 2; with --model 1)")
    p.add_argument("--guidance", type=float, nargs="+", help="above 1: two branches (default 1 4; with --model 4)")
    p.add_argument("--thresholds", type=float, nargs="+", help="default 0.17 0.25 0.4")
    p.add_argument("--steps", type=int, help="of a whole picture (default 50)")
    p.add_argument("--size", type=int, help="side in pixels, a multiple of 16 (default 128; with --model 512)")
    p.add_argument("--repetitions", type=int, metavar="N", help="processes (default 5; with --model 2)")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write PSNR against computed steps to FILE, a PNG")
    p.add_argument("--from", dest="source", type=Path, metavar="FILE", help="table and plot of FILE; measure nothing")
    args = common.parse(p)
    defaults = FULL | (MODEL if args.model else {}) | (QUICK if args.quick else {})
    if args.prompts:
        del defaults["n_prompts"]
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.guidance, args.thresholds = sorted(set(args.guidance)), sorted(set(args.thresholds))
    if min(args.n_prompts or 1, args.n_seeds, args.repetitions, args.steps // 3, *args.guidance) < 1:
        p.error("--steps must be at least 3, and all other numbers but thresholds at least 1")
    if args.thresholds[0] <= 0 or args.thresholds[-1] > 1 or args.size < 16 or args.size % 16:
        p.error("--thresholds must be above 0 and at most 1, --size a multiple of 16")
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
            names = ("model", "quantize", "size", "steps", "guidance", "thresholds", "repetitions")
            data = common.collect(args, {name: getattr(args, name) for name in names}, *DISTRIBUTIONS)
            data |= {"prompts": args.texts, "pictures": in_processes(args)}
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
