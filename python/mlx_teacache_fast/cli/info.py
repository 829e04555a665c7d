"""``mlx-teacache-fast info``: what is known of a model, and whether gating helps, without weights."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import TeaCacheValueError, one_line
from ..models import TINY_KLEIN, VARIANTS, Published, Variant
from ..pictures import read_metadata
from ..plans import published_plans
from ..policy import Policy
from ..record.stats import bound
from ..support import supported
from .shared import COUNT, DEMO, PROG, quiet_logging, require_mflux

HELP = "say how a model is gated, and whether that helps"

DESCRIPTION = """\
Say what is known of a model before its weights are loaded: which coefficients and threshold it is gated with, how many
steps were skipped elsewhere, and whether gating helps at the steps you want. Without MODEL: all pipelines and models.
"""

EPILOG = """\
the lines:
  calibrated    whether the gate's coefficients are published for this very model, and on which one they were fitted. If
                not, they are those of the model that it was made from: compare a few pictures with ungated ones
  threshold     of TeaCache's gate: accumulated distance at which a step is computed again (run --threshold)
  range         relative distances that the gate's polynomial was fitted on; a larger one computes
  published     skipped steps on real weights as published by mlx-teacache for its rules, which are also ours, on an M1
                Max; and the bound that follows: no speedup can exceed steps / (steps - skipped)
  plans         where it is published which steps to compute of this model, for run --budget; else a rule says
  helps         whether steps can be skipped at --steps

examples:
  mlx-teacache-fast info
  mlx-teacache-fast info flux2-klein-base-4b --steps 30
  mlx-teacache-fast info somebody/my-finetune --base-model dev
  mlx-teacache-fast info apple.png

exit code: 0 known, also where gating does not help; 1 failed; 2 unknown model or bad input
"""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".json")  # .json: mflux's .metadata.json


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="a name that mflux's --model takes, such as dev or flux2-klein-base-4b, or a hub name; nothing is "
        f"downloaded. Or {DEMO}, the one in here. Or a gated picture's file: says how it was made")
    parser.add_argument(
        "--base-model", metavar="NAME", help="the model that a checkpoint of another name was made from, as for mflux")
    parser.add_argument("--steps", **COUNT, help="denoising steps per picture (default: mflux's for the model)")
    # fmt: on


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is None and (arguments.base_model is not None or arguments.steps is not None):
        raise TeaCacheValueError("--steps and --base-model are about one model: name it")
    if arguments.model is not None and (picture := Path(arguments.model)).suffix.lower() in PICTURES:
        if arguments.steps is not None or arguments.base_model is not None:
            raise TeaCacheValueError("--steps and --base-model are about a model, not a picture")
        print(read_metadata(picture))
        return 0
    with quiet_logging():
        require_mflux()
        from ..mflux import names
    if arguments.model is None:
        print(f"mflux's pipelines, and the models that each can be gated with:\n\n{supported()}\n\n{_overview()}")
    else:
        if arguments.model == DEMO:
            if arguments.base_model is not None:
                raise TeaCacheValueError("the demonstration model takes no --base-model")
            config: Any = SimpleNamespace(model_name=DEMO, base_model=None, aliases=[TINY_KLEIN.variant_id])
            variant, calibrated, default = TINY_KLEIN, True, names.default_steps("flux2-klein-base-4b")
        else:
            config, (_, variant, calibrated) = names.find(arguments.model, arguments.base_model)
            default = names.default_steps(arguments.model, arguments.base_model)
        print(_about(config, variant, calibrated, arguments.steps, default))
    return 0


def _overview() -> str:
    rows = [("model", "threshold", "distances", "published skips")]
    for variant in VARIANTS.values():
        skips = ", ".join(f"{p.skipped} of {p.steps} at {p.rel_l1_thresh:g}" for p in variant.published)
        threshold = "none" if variant.rel_l1_thresh is None else f"{variant.rel_l1_thresh:g}"
        distances = "" if variant.coefficients is None else _range(variant)
        rows.append((variant.variant_id, threshold, distances, skips or "none known"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _about(config: Any, variant: Variant, calibrated: bool, steps: int | None, default: int) -> str:
    rows = [("model", one_line(config.model_name))]
    if config.base_model is not None:
        rows.append(("taken for", f"a checkpoint made from {config.base_model}"))
    rows += [
        ("variant", f"{variant.variant_id} ({variant.display_name})"),
    ]
    on = f", with coefficients fitted on {variant.fitted_on}" if variant.fitted_on else ""
    if (fit := variant.fit) is None:
        rows.append(("coefficients", "none known: a threshold wants some of yours"))
    else:
        rows += [
            ("calibrated", f"yes{on}" if calibrated else f"no: with the coefficients of {variant.variant_id}"),
            ("threshold", f"{variant.rel_l1_thresh:g}"),
            ("coefficients", fit.reference_url or "this package"),
        ]
        if fit.calibration_dataset is not None:
            rows.append(("", f"fitted on {fit.calibration_dataset}; R^2 {fit.fit_metric_value:.3f}"))
        rows.append(("range", _range(variant)))
    of = "" if calibrated else f"of {variant.variant_id}: "
    rows += [("published", of + _published(p)) for p in variant.published]
    rows += [("", url) for url in dict.fromkeys(p.url for p in variant.published)]
    plans = published_plans(config)
    rows.append(("plans", plans.source if plans else "none published"))
    asked = f"at {steps} steps" if steps is not None else f"at {default} steps, mflux's default"
    verdict, reason = _helps(variant, calibrated, steps or default)
    rows += [("helps", f"{asked}: {verdict}"), ("", reason)]
    return "\n".join(f"{name:14}{value}" for name, value in rows)


def _range(variant: Variant) -> str:
    limits = variant.calibrated_range
    return "any" if limits is None else f"{limits[0]:.4f} to {limits[1]:.4f}"


def _published(p: Published) -> str:
    return (
        f"{p.skipped} of {p.steps} steps skipped at threshold {p.rel_l1_thresh:g}, guidance {p.guidance:g}; "
        f"bound {bound(p.steps, p.skipped):.2f}x"
    )


def _helps(variant: Variant, calibrated: bool, steps: int) -> tuple[str, str]:
    """Whether ``apply``'s default settings skip anything in so many steps, and why."""
    if reason := Policy().rule.check_schedule(steps, steps):
        return "no", reason
    if variant.distilled:
        return "no", "it is distilled to a few steps that differ too much for any to be skipped"
    if not calibrated:
        return "perhaps", "nothing is published for this model"
    if variant is TINY_KLEIN:
        return "yes", f"{PROG} demo measures it"
    here = [p for p in variant.published if p.rel_l1_thresh == variant.rel_l1_thresh]
    if any(p.steps == steps for p in here):
        return "yes", "skips are published for it"
    known = " and ".join(str(p.steps) for p in here)
    return "perhaps", f"skips are published for {known} steps; with fewer, each differs more from the one before"
