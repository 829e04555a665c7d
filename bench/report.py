"""Makes docs/benchmarks.md, and its plots, of the JSON files in results/. Its numbers are those of the files.

python bench/report.py                       # after make bench-full
python bench/report.py --results build/bench --output build/bench/benchmarks.md
"""

import argparse
import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[1]

# In the order of the page; the question that each answers.
QUESTIONS = {
    "bench_generation": "What do skipped steps give for a whole picture, and what would fewer steps have given?",
    "bench_forecast": "Which forecast, what does its guard do, and where do the computed steps of a budget belong?",
    "bench_step": "What does one step cost?",
    "bench_families": "What does a step cost in mflux's other pipelines?",
    "bench_agreement": "Does apply_teacache do what mlx-teacache does?",
    "bench_gate": "What does the gate cost, beside other gates and the fewest bytes?",
    "bench_branch": "What does the conditional cost, beside other ways to leave work out?",
    "bench_memory": "How much memory does gating take?",
    "bench_distributed": "What do two processes give that compute a step's two branches?",
}

# What a table of the files in results/ alone does not say. The page's only words by hand.
NOTES = {
    "bench_generation": "The file in results/ is of five runs: 20 captions at 50 steps with guidance 4, 12 and fewer "
    "settings at all else; other work was on the machine's second core.",
    "bench_agreement": "The three decisions that differ are one picture's: there mlx-teacache's distances add up to "
    "0.29989, of 0.3, and it skips.",
    "bench_gate": "In float16, which no FLUX pipeline of mflux uses, this package's CPU gate is bound by conversions, "
    "not by memory. Where memory is returned after each use, a float32 result of this size (50 MB) is mapped anew at "
    "each step; below 32 MB glibc keeps it.",
    "bench_step": "What is left of a skipped step is mflux's prelude up to block 0, of which block 0's modulation is "
    "the largest part in a wide model, the gate, one read and a graph. That does not grow with the number of blocks. A "
    "step that a plan skips is the forecast alone.",
    "bench_memory": "mlx-teacache's peak is lower than ours because it gives up mflux's compiled step: mflux run "
    "eagerly takes less too. Above compiled mflux ours has the anchor, one [S, D], and what is kept of computed steps: "
    "by default one noise prediction besides the step's own, half a [S, D] in this model, 1/24 in FLUX.2 klein-4B.",
}


def page(results: dict[str, dict[str, Any]], output: Path, notes: dict[str, str]) -> str:
    common.MARKDOWN = True
    machines = " and ".join(sorted({data["machine"] for data in results.values()}))
    commits = ", ".join(sorted({data["commit"] or "unknown" for data in results.values()}))
    dates = sorted({data["date"] for data in results.values()})
    gpus = {data["device"] for data in results.values() if "gpu" in data["device"]}
    not_measured = "" if gpus else "a Mac's or NVIDIA's GPU (each script takes `--device gpu`), "
    blas = sorted({library for data in results.values() for library in data["preloaded"]})
    preloaded = [f"With {', '.join(blas)} preloaded (`LD_PRELOAD`): MLX's own products on a CPU take longer."] * bool(
        blas
    )
    parts = [
        "# Benchmarks",
        f"Made by `python bench/report.py` of the files in `results/`: {machines}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {commits}. `make bench` runs a short form on "
        "your machine, `make bench-full` all of it.",
        f"Not measured here: {not_measured}FLUX's real weights (`bench_generation.py --model`), sizes that two cores "
        "do not manage in a few hours. The demonstration model has 5.8 M parameters and draws emoji: its times and "
        "PSNR are not FLUX's.",
        *preloaded,
        "A ratio is of two times of the same turn; each script's `--help` says what is compared. " + common.NOISE_NOTE,
    ]
    for name, question in QUESTIONS.items():
        if name not in results:
            parts.append(f"## {question}\n\n`{name}.py`: not in this run.")
            continue
        module = importlib.import_module(name)
        data = results[name]
        parts.append(f"## {question}\n\n`{name}.py`")
        if hasattr(module, "plot"):
            picture = output.with_name(f"{output.stem}-{name.removeprefix('bench_')}.png")
            module.plot(data, picture)
            parts.append(f"![{question}]({picture.name})")
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            module.report(data)
        parts += [_with_breaks(text.getvalue()), notes.get(name, "")]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _with_breaks(text: str) -> str:
    """Lines that follow each other stay lines, but for those of tables."""
    lines = text.splitlines()
    followed = zip(lines, [*lines[1:], ""], strict=True)
    return "\n".join(a if not a or not b or a.startswith("|") else a + "  " for a, b in followed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help="default: results")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks.md", metavar="FILE", help="is replaced"
    )
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in args.results.glob("bench_*.json")}
    if not results:
        parser.error(f"{args.results} has no bench_*.json")
    notes = NOTES if args.results.resolve() == ROOT / "results" else {}
    args.output.write_text(page(results, args.output, notes), encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
