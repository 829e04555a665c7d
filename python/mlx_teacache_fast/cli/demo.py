"""``mlx-teacache-fast demo``: plain mflux against gated generation, on the embedded model."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

import mlx.core as mx

from .. import ops
from ..errors import TeaCacheValueError
from ..files import prepare_folder, write_files
from ..models import REGIMES, TINY_KLEIN
from ..policy import DEFAULT_MODE, MODES
from .shared import COUNT, GUIDANCE, PROG, SEED, number, quiet_logging, warnings_in_one_line

DEFAULT_PROMPTS = ("red apple", "panda face")
OUTPUT_NAMES = ("images.png", "plot.png")

MAX_PROMPTS = 100  # the plot is 255 pixels per prompt, and matplotlib draws at most 65535

HELP = "compare plain mflux with gated generation, on a tiny model in this package"

DESCRIPTION = """\
Generate pictures with plain mflux and again with steps skipped, and compare time and quality.

The model (TinyKlein, 5.8 M parameters, 12 MB) is part of this package: nothing is downloaded. It has FLUX.2 Klein's
architecture and runs in mflux's own pipeline, but it is a demonstration trained on emoji. Its speedups and its
quality numbers are not those of FLUX.
"""

EPILOG = """\
the files, in the output folder:
  images.png  a row per prompt: plain mflux, gated, and their difference, amplified
  plot.png    a row per prompt: by how much the forecast missed each computed step, the miss expected at the decision
              against the tolerance, and which steps were computed, skipped or forced (hatched: computed below the
              tolerance, because too many would be skipped in a row). With --threshold: the distance that the gate
              measured, and its sum against the threshold

the numbers:
  skipped  steps whose transformer blocks did not run: a forecast from the last computed ones stood in for them
  speedup  seconds of plain mflux / seconds gated, of generate_image as a whole
  bound    steps / (steps - skipped): the most that skipping these steps can give
  PSNR     of the gated picture against the plain one, in dB; higher is closer, above about 40 hard to see
  SSIM     structural similarity of the two, 1 for identical pictures

  MLX compiles its CPU kernels at first use, so a short generation of each kind goes before, untimed. The two kinds
  take turns in going first.

examples:
  mlx-teacache-fast demo
  mlx-teacache-fast demo "cat face" "blue heart" --guidance 1 --output hearts
  mlx-teacache-fast demo pizza --threshold 0.3 --force
  mlx-teacache-fast demo "cat face" --regime flux2-1024

exit code: 0 done, 1 failed, 2 bad input, 130 interrupted
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", default=list(DEFAULT_PROMPTS),
        help=f"what to draw, in words that the model knows (default: {' '.join(map(repr, DEFAULT_PROMPTS))})")
    parser.add_argument("--list-words", action="store_true", help="print the prompts and words that work, and stop")
    parser.add_argument("--steps", **COUNT, default=50, help="denoising steps per picture (default: %(default)s)")
    parser.add_argument(
        "--seed", **SEED, help="seed of the starting noise, the same for every picture (default: %(default)s)")
    parser.add_argument(
        "--guidance", **GUIDANCE, default=4.0,
        help="how strongly the prompt steers; above 1 every step runs the model twice, so 1 takes half the time and "
        "looks less sharp (default: %(default)g)")
    share = number(float, "a number from 0 to 1", lambda t: 0 <= t <= 1)
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--tolerance", metavar="T", type=share,
        help="miss that is expected of a skipped step's forecast at most: more skips with a higher one, none with 0 "
        f"(default: {MODES[DEFAULT_MODE]:g})")
    limit.add_argument(
        "--threshold", metavar="T", type=share,
        help="TeaCache's gate instead, with this accumulated distance at which a step is computed again (the model's "
        f"own is {TINY_KLEIN.rel_l1_thresh:g})")
    parser.add_argument(
        "--regime", choices=REGIMES, default="own",
        help="the schedule: a large picture shows its composition through more noise than a small one, so that other "
        f"schedules stand for other models: {'; '.join(f'{r.name}, {r.says}' for r in REGIMES.values())} "
        "(default: %(default)s)")
    parser.add_argument(
        "--size", metavar="PIXELS", default=128,
        type=number(int, "a multiple of 16 from 32 to 512", lambda n: 32 <= n <= 512 and n % 16 == 0),
        help="side of the pictures; the model was trained at 128 and draws badly at others (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="gpu" if ops.gpu_supported() else "cpu",
        help="where MLX computes (default here: %(default)s)")
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, default=Path("demo_output"),
        help="folder for images.png and plot.png, made if need be (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite those files where they exist")
    # fmt: on


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.prompts) > MAX_PROMPTS:
        raise TeaCacheValueError(f"at most {MAX_PROMPTS} prompts in one run, got {len(arguments.prompts)}")
    # mflux takes seconds to import, and only the demo needs it.
    with quiet_logging():
        from .. import demo
        from ..demo import report
        from ..demo.compare import Settings, check_prompts, compare

    with _on(arguments.device):
        flux = demo.pipeline()
    if arguments.list_words:
        print('Prompts that the demo model was trained on; their words may be combined ("green heart", "red car"):\n')
        for group, captions in flux.captions.items():
            print(f"{group}: {', '.join(captions)}")
        print(f"\nAll {len(flux.words)} words: {', '.join(flux.words)}")
        return 0
    check_prompts(flux, arguments.prompts)
    images, plot = prepare_folder(arguments.output, OUTPUT_NAMES, force=arguments.force)
    settings = Settings(**{setting.name: getattr(arguments, setting.name) for setting in fields(Settings)})
    with warnings_in_one_line(), _on(arguments.device):
        comparisons = compare(flux, arguments.prompts, settings, progress=True)
    files = {images: report.images_png(comparisons, settings), plot: report.plot_png(comparisons, settings)}
    try:
        write_files(files, force=arguments.force)  # first: stdout may be closed
    finally:
        print("\nTinyKlein, a tiny demonstration model: these numbers are not those of FLUX.")
        print(f"{report.settings_line(settings, comparisons[0].rule)}; an untimed warm-up of each kind went before\n")
        print(report.table(comparisons))
        print(f"\nspeedup: plain / gated seconds; bound: the most that the skipped steps can give ({PROG} demo --help)")
        if any(c.speedup > 1.05 * c.generation.bound for c in comparisons):
            print("A speedup above its bound is timing noise: something else used the processor.")
    for path in files:
        print(f"wrote {path}")
    return 0


def _on(name: str) -> AbstractContextManager[object]:
    device = mx.Device(mx.gpu if name == "gpu" else mx.cpu)
    if not mx.is_available(device):
        raise TeaCacheValueError(f"--device {name}: MLX has none here")
    return mx.stream(device)
