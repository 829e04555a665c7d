"""Does apply_teacache do what mlx-teacache does, with Qwen-Image, Qwen-Image-2512 and Z-Image?

mflux's own generate_image and classes, with the small transformers of the tests (three or four blocks, random weights,
bfloat16, 16 steps, guidance 4). The same pictures are gated by mlx-teacache and by this package; compared are what each
step is, the distance that the gate measured in it, and the latents after it. mlx-teacache runs all steps eagerly, this
package as mflux does: Z-Image's compiled, and eagerly on an M1 or M2. Both are compared. Eagerly all must be equal;
compiled, mflux rounds otherwise, and the last column has how far that alone takes its latents.

    python bench/bench_agreement.py
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

# By variant: mflux's class and name of the model, thresholds, and what is given beside them. With random weights
# Z-Image's own polynomial skips nothing.
MODELS: dict[str, tuple[str, str, tuple[float, ...], dict[str, Any]]] = {
    "qwen-image": ("QwenImage", "Qwen/Qwen-Image", (0.4, 0.6, 1.0), {}),
    "qwen-image-2512": ("QwenImage", "qwen-image", (0.25, 0.5, 1.0), {}),
    "z-image-base": ("ZImage", "z-image", (0.3, 0.5, 0.9), {"coefficients": (0.0, 0.0, 0.0, 0.25, 0.0)}),
}


def pictures(
    flux: Any, given: list[dict[str, Any]], apply: Callable[..., Any] | None = None, **how: Any
) -> tuple[list[Any], list[mx.array]]:
    """The decision of each step of all pictures, where ``apply`` gates them, and the latents after it."""
    decisions, latents = [], []
    handle = apply(flux, **how) if apply else None
    for arguments in given:
        flux.generate_image(**arguments)
        latents += [a.astype(mx.float32) for a in flux.recorder.latents]
        decisions += handle.stats.last_generation.decisions if handle else []
    if handle:
        handle.restore()
    return decisions, latents


def apart(a: list[mx.array], b: list[mx.array]) -> float:
    return float(mx.abs(mx.stack(a) - mx.stack(b)).max().item())


def measure(variant: str, seeds: int, ways: Sequence[str] = ("eager", "compiled")) -> list[dict[str, Any]]:
    """A row for each way to run our steps, as far as mflux has it, and threshold."""
    import mlx_teacache
    from mflux.models.common.config.model_config import ModelConfig
    from other_pipelines import PIPELINES, eager

    import mlx_teacache_fast as tc

    warnings.simplefilter("ignore")
    name, model, thresholds, more = MODELS[variant]
    small = next(small for small in PIPELINES if str(small) == name)
    arguments = small.arguments(ROOT / "docs" / "demo.png") | {"guidance": 4.0, "num_inference_steps": 16}
    given = [arguments | {"seed": seed} for seed in range(1, seeds + 1)]
    rows = []
    with small.pipeline() as flux:
        flux.model_config = ModelConfig.from_name(model)
        with eager():
            _, plain = pictures(flux, given)
        theirs = {t: pictures(flux, given, mlx_teacache.apply_teacache, rel_l1_thresh=t, **more) for t in thresholds}
        for way in ways if small.is_compiled else ways[:1]:
            with eager() if way == "eager" else nullcontext():
                rounding = apart(plain, pictures(flux, given)[1])
                for threshold, (decisions, latents) in theirs.items():
                    ours, our_latents = pictures(flux, given, tc.apply_teacache, rel_l1_thresh=threshold, **more)
                    pairs = list(zip(decisions, ours, strict=True))
                    measured = [(a.rel_l1, b.rel_l1) for a, b in pairs if None not in (a.rel_l1, b.rel_l1)]
                    row = {"variant": variant, "way": way, "threshold": threshold, "steps": len(pairs)}
                    row["skipped"] = sum(a.decision == "skipped" for a in decisions)
                    row["equal"] = sum(a.decision == b.decision for a, b in pairs)
                    row["distances"] = max(abs(a - b) for a, b in measured)
                    row["latents"] = apart(latents, our_latents)
                    row["largest"] = mx.abs(mx.stack(latents)).max().item()
                    rows.append(row | {"mflux": rounding})
    return rows


def main() -> None:
    parser = common.parser(__doc__, quick="one picture for each row")
    parser.add_argument("--pictures", type=int, default=8, help="for each row (default 8)")
    args = common.parse(parser, pictures=1)
    if args.pictures < 1:
        parser.error("--pictures must be at least 1")
    results = [row for variant in MODELS for row in measure(variant, args.pictures)]
    numbers = {"pictures": args.pictures, "results": results}
    common.finish(args, common.collect(args, numbers, "mflux", "mlx-teacache"), report)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    print(f"\n{data['pictures']} pictures for each row; the greatest difference of all steps, and the largest latent\n")
    lines = [["model", "our steps", "threshold", "skipped", "equal", "distances", "latents", "mflux, no gate"]]
    for row in data["results"]:
        cells = [row["variant"], row["way"], f"{row['threshold']:g}"]
        cells += [f"{row[name]} of {row['steps']}" for name in ("skipped", "equal")]
        cells += [f"{row['distances']:.1e}", f"{row['latents']:.2g} of {row['largest']:.1f}", f"{row['mflux']:.2g}"]
        lines.append(cells)
    common.print_table(lines, left=2)
    eager = [row for row in data["results"] if row["way"] == "eager"]
    holds = all(row["equal"] == row["steps"] and row["latents"] == 0 for row in eager)
    print(f"\nEagerly every decision and every bit of the latents is equal: {'holds' if holds else 'does not hold'}")


if __name__ == "__main__":
    main()
