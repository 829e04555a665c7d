"""What do skipped steps give for a whole picture, in time and in quality, and what would fewer steps have given?

For each prompt, seed and guidance, in turn:

    plain mflux            all steps: the reference of time and quality
    ours, mlx-teacache     at each threshold
    evenly spaced          as many steps computed as ours computed of this very picture, at even distances
    fewer steps            plain mflux, run with only as many steps as ours computed

PSNR and SSIM are against plain mflux's picture of the same prompt, seed and guidance; time is that of generate_image, as
a ratio to plain mflux in the same turn; the bound of its inverse is steps / computed steps. Where ours skips nothing
the last two are plain mflux, and left out. Before anything is timed, a short picture of each kind compiles its kernels.

The first process generates all pictures. Later ones repeat some turns: for the time, and to check that the pictures are
the same. After the first picture it says how long the rest will take.

    python bench/bench_generation.py --json build/generation.json --plot build/generation.png
    python bench/bench_generation.py --quick
    python bench/bench_generation.py --from build/generation.json --plot build/generation.png
    python bench/bench_generation.py --device gpu --model flux2-klein-base-4b --quantize 8
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import numpy as np

DISTRIBUTIONS = ("mflux", "mlx-teacache")
PLAIN, OURS, PEER, EVEN, FEWER = CONDITIONS = ("plain mflux", "ours", "mlx-teacache", "evenly spaced", "fewer steps")

# Quick takes 25 steps and guidance 1 to stay within minutes on two cores.
FULL = {"n_prompts": 20, "n_seeds": 2, "steps": 50, "guidance": (1.0, 4.0), "thresholds": (0.15, 0.17, 0.25, 0.4, 0.6)}
FULL |= {"size": 128, "repetitions": 3, "timed": 3}
MODEL = FULL | {"n_prompts": 4, "n_seeds": 1, "guidance": (4.0,), "thresholds": (0.17, 0.25, 0.4), "size": 512}
MODEL |= {"repetitions": 2, "timed": 1}
QUICK = {"n_prompts": 4, "n_seeds": 1, "steps": 25, "guidance": (1.0,), "thresholds": (0.2, 0.4)}
QUICK |= {"repetitions": 2, "timed": 1}

PROMPTS = (
    "a red apple on a wooden table, morning light",
    "portrait of an old fisherman, film photograph",
    "a street market in the rain at night, neon signs",
    "a watercolour of a fox in a snowy forest",
)

Record = dict[str, Any]


# ---- What is measured: in a process of its own


def load(model: str | None, quantize: int | None) -> Any:
    """The pipeline: the demo's, or mflux's text-to-image with the weights of this name."""
    from mlx_teacache_fast import demo

    if model is None:
        return demo.pipeline()
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
    from mflux.models.flux.variants.txt2img.flux import Flux1

    pipeline = Flux2Klein if is_flux2(model) else Flux1
    return pipeline(model_config=ModelConfig.from_name(model), quantize=quantize)


def is_flux2(model: str | None) -> bool:
    from mlx_teacache_fast.mflux import models

    return model is None or models.find(model).pipeline == "Flux2Klein"


def measure(args: argparse.Namespace) -> None:
    """Prints a record for each picture, as soon as it is there."""
    from mlx_teacache import apply_teacache

    import mlx_teacache_fast as tc
    from mlx_teacache_fast.demo.compare import WARM_UP_STEPS, Comparison
    from mlx_teacache_fast.stats import GenerationStats, bound

    warnings.simplefilter("ignore")
    flux = load(args.model, args.quantize)

    def image(
        context: AbstractContextManager[Any], steps: int, prompt: str, seed: int, guidance: float
    ) -> tuple[Any, Record]:
        with context as handle:
            size = {"height": args.size, "width": args.size}
            start = perf_counter()
            generated = flux.generate_image(
                prompt=prompt, seed=seed, num_inference_steps=steps, guidance=guidance, **size
            )
            seconds = perf_counter() - start
        picture = np.asarray(generated.image.convert("RGB"))
        skipped = 0 if handle is None else handle.stats.skipped_count
        numbers = {"seconds": seconds, "computed": steps - skipped, "skipped": args.steps - steps + skipped}
        return picture, numbers | {"bound": bound(args.steps, numbers["skipped"]), "crc32": zlib.crc32(picture)}

    few = min(WARM_UP_STEPS, args.steps)
    for guidance in args.guidance:
        for context in (
            nullcontext(),
            tc.apply(flux, rel_l1_thresh=1.0),
            tc.apply(flux, steps=even_plan(few, 2)),
            apply_teacache(flux, rel_l1_thresh=1.0),
        ):
            image(context, few, args.texts[0], 0, guidance)

    turns = [(seed, prompt, g) for seed in range(args.n_seeds) for prompt in args.texts for g in args.guidance]
    for turn, (seed, prompt, guidance) in enumerate(turns[: args.turns]):
        pictures: dict[tuple[float | None, str], Any] = {}
        records: list[Record] = []
        controls: dict[tuple[str, int], tuple[Any, Record]] = {}  # two thresholds may skip as many steps

        def generate(
            condition: str, threshold: float | None = None, computed: int = 0, turn: int = turn, at: Any = turns[turn]
        ) -> int:
            context: AbstractContextManager[Any] = nullcontext()
            if condition == OURS:
                context = tc.apply(flux, rel_l1_thresh=threshold)
            elif condition == PEER:
                context = apply_teacache(flux, rel_l1_thresh=threshold)
            elif condition == EVEN:
                context = tc.apply(flux, steps=even_plan(args.steps, computed))
            seed, prompt, guidance = at
            n = computed if condition == FEWER else args.steps
            picture, numbers = controls.get((condition, computed)) or image(context, n, prompt, seed, guidance)
            if computed:
                controls[condition, computed] = picture, numbers
            return numbers["computed"]

        for threshold in rotated([None, *args.thresholds], turn):
            pass
    raise NotImplementedError
