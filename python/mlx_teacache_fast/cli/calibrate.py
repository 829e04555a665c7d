"""``mlx-teacache-fast calibrate``: the gate's polynomial, fitted to the user's own model."""

import argparse
import io
from typing import Any

from ..errors import TeaCacheValueError
from ..files import check_writable, write_file
from . import shared
from .shared import FILE, GUIDANCE, PROG, quiet_logging, require_mflux, warnings_in_one_line

HELP = "fit the gate's polynomial to a model of yours"

DESCRIPTION = """\
Fit the gate's polynomial to a model of yours: by how much the noise prediction changes from step to step, from how much
block 0's modulated input does. Full pictures of several prompts are made; nothing is skipped, and the last prompts only
test the fit. A finetune or another number of steps may want its own.
"""

EPILOG = """\
the files:
  FILE      a policy, JSON: the five coefficients, the distances that they were fitted on, and a threshold that skips
            about a third of the steps. For apply(flux, "FILE") and run --policy FILE
  its .png  the pairs of steps and the polynomial

the numbers:
  R^2       share of the changes' variance that the polynomial explains, on held-out prompts. A low one is usual
            (mlx-teacache publishes 0.11 for base-4B): the gate then skips nearly at a rhythm, as --budget does
  skipped   share of the steps that a threshold skips, estimated from the distances of these runs

examples:
  mlx-teacache-fast calibrate demo --guidance 1 4 --output demo.json
  mlx-teacache-fast calibrate somebody/my-finetune --base-model dev -q 8 --steps 25 --guidance 3.5 --output mine.json

exit code: 0 done, 1 failed, 2 bad input, 130 interrupted
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser, held_out=3)
    says = "as for mflux; with several the polynomial is for all of them (default: 4, and 1 for distilled models)"
    parser.add_argument("--guidance", **GUIDANCE, nargs="+", help=says)
    parser.add_argument("--output", **FILE, required=True, help="the policy, as JSON")
    parser.add_argument("--plot", **FILE, help="default: the output's name, with .png")
    parser.add_argument("--force", action="store_true", help="overwrite both files")


def run(arguments: argparse.Namespace) -> int:
    plot = arguments.plot or arguments.output.with_suffix(".png")
    if plot.resolve() == arguments.output.resolve():
        raise TeaCacheValueError(
            f"{plot} cannot hold both the polynomial and its plot: give another --output or --plot"
        )
    for path in (arguments.output, plot):
        check_writable(path, force=arguments.force)
    with quiet_logging():
        require_mflux()
        shared.check(arguments)
        from ..demo._extra import demo_extra

        with demo_extra():
            import matplotlib  # noqa: F401  # before the work, whose plot would be lost

            from ..tune.calibrate import calibrate

    with warnings_in_one_line():
        flux, prompts, given = shared.load(arguments)
        fitted = calibrate(flux, prompts, guidances=arguments.guidance or [shared.default_guidance(flux)], **given)
    rule: Any = fitted.policy.rule
    fitted.to_json(arguments.output, force=arguments.force)
    drawn = io.BytesIO()
    fitted.plot().savefig(drawn, format="png")
    write_file(plot, drawn.getvalue(), force=arguments.force)
    print(f"{fitted.dataset}\n")
    print(f"coefficients  {' '.join(f'{c:.6g}' for c in rule.coefficients)}")
    print("range         {:.4f} to {:.4f}".format(*rule.calibrated_range))
    print(
        f"R^2           {fitted.held_out_r2:.3f} on {len(fitted.held_out)} held-out pairs of steps, "
        f"{fitted.r2:.3f} on the {len(fitted.pairs)} fitted"
    )
    for i, (threshold, share) in enumerate(fitted.shares):
        here = "  <- the file's threshold" if threshold == rule.rel_l1_thresh else ""
        print(f"{'skipped' if i == 0 else '':14}{share:4.0%} at threshold {threshold:.3g}{here}")
    if rule.rel_l1_thresh is None:
        print(f"{'':14}so few steps: no threshold skips a third of them, and the file has none")
    print(f"\nwrote {arguments.output} and {plot}: {PROG} run --policy {arguments.output}, or apply(flux, ...)")
    return 0
