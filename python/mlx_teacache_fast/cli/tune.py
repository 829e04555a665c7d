"""``mlx-teacache-fast tune``: the best policy for a model, number of steps, size and guidance of the user's own."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import TeaCacheValueError
from ..files import check_writable, write_file
from ..models import REGIMES
from ..policy import Policy, settings
from ..tuning.tuned import BUDGET, CANDIDATES, CURVE, Tuned
from . import ranks
from .shared import (
    COUNT,
    DEMO,
    FILE,
    GUIDANCE,
    PROG,
    QUANTIZE,
    SEED,
    add_setting,
    beside,
    number,
    quiet_logging,
    require_mflux,
    warnings_in_one_line,
)

HELP = "find how to gate a model of yours, at your steps, size and guidance"

DESCRIPTION = """\
Find how to gate a model of yours, at your number of steps, size and guidance: which policy gives the best pictures when
at most a share of the steps (--budget) may be computed.

First each prompt is run with all steps. From these runs the best plans of several budgets are solved for, and the
gate's polynomial is fitted; then plans, tolerances, the gate, the rule or plan of apply(flux, budget=...) and plain
mflux with fewer steps are run and compared with the full pictures, at last on prompts that were held out. It says at
the beginning how long it takes. FILE is written after every picture: Ctrl-C loses nothing, and --resume goes on.
Several processes that mlx.launch starts share the pictures, on one machine or more; rank 0 has FILE.
"""

EPILOG = """\
the files:
  FILE      a policy, JSON: the best within the budget, for apply(flux, "FILE") and run --policy FILE; with it all that
            was tried, and what it gave. MODEL can be such a file: the best one of another --budget, without a picture
  its .png  PSNR against computed steps, on the prompts tuned on and on those held out

the lines:
  plan         which steps compute is said beforehand: solved for, for this model and schedule
  budget       apply(flux, budget=...): as published for the model, or by a rule
  tolerance    apply(flux, tolerance=...): decided from step to step; it needs no tuning
  threshold    TeaCache's gate with the polynomial that was fitted, at about as many computed steps, and forecasts
  fewer steps  plain mflux; what is not above that is worthless
  PSNR (p10)   against the pictures with all steps, in dB: the mean, and the 10th percentile

how long it takes: as long as about 140 full pictures with the demo, and 90 else; with --quick 11

examples:
  mlx-teacache-fast tune demo --output demo.json
  mlx-teacache-fast tune flux2-klein-base-4b -q 8 --steps 50 --guidance 4 --quick --output klein.json
  mlx-teacache-fast tune dev -q 8 --steps 25 --guidance 3.5 --prompts mine.txt --budget 0.3 --output dev.json
  mlx-teacache-fast tune demo.json --budget 0.2 --output faster.json
  mlx.launch --hostfile hosts.json -- mlx-teacache-fast tune flux2-klein-base-4b -q 8 --output klein.json
  mlx-teacache-fast run --policy klein.json -- mflux-generate-flux2 --model flux2-klein-base-4b --steps 50 \\
      --guidance 4 --prompt "a red apple"

In Python: mlx_teacache_fast.tune(flux, prompts, ...) for any pipeline of mflux's.

exit code: 0 done, 1 failed, 2 bad input, 130 interrupted
"""

PROMPTS = (
    "a red apple on a wooden table, morning light",
    "a street market in the rain at night, neon signs",
    "portrait of an old fisherman with a grey beard, studio light",
    "a snow-covered mountain above a lake, aerial photograph",
    "watercolour of a fox asleep under an oak",
    "isometric drawing of a tiny kitchen, pastel colours",
    "a steam locomotive crossing a stone bridge, autumn",
    'a shop window with the words "OPEN LATE" in gold letters',
)
N_DEMO_PROMPTS = 12

_WEIGHTS = ("quantize", "lora_paths", "lora_scales")  # options of mflux's classes
_PICKING = ("model", "budget", "output", "force")  # what counts beside a file


def add_options(parser: argparse.ArgumentParser) -> None:
    share = number(float, "a number above 0 and below 1", lambda b: 0 < b < 1)
    # fmt: off
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"a name that mflux's --model takes, such as flux2-klein-base-4b, or a path; or {DEMO}, the one in here; "
        "or a FILE.json of this command")
    parser.add_argument("--base-model", metavar="NAME", help="the model that a checkpoint was made from, as for mflux")
    parser.add_argument("--quantize", "-q", **QUANTIZE, help="the weights' bits, as for mflux")
    parser.add_argument("--lora-paths", metavar="FILE", nargs="+", help="as for mflux")
    parser.add_argument("--lora-scales", metavar="S", nargs="+", type=float, help="as for mflux")
    parser.add_argument("--steps", **COUNT, default=50, help="of a picture (default: %(default)s)")
    parser.add_argument(
        "--size", **COUNT | {"metavar": "PIXELS"}, help=f"side of the pictures (default: 512, with {DEMO} 128)")
    parser.add_argument("--guidance", **GUIDANCE, help="as for mflux (default: 4, and 1 for distilled models)")
    parser.add_argument("--seed", **SEED, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--regime", choices=REGIMES, help=f"of {DEMO}: the schedule ({PROG} demo --help)")
    parser.add_argument(
        "--budget", metavar="SHARE", type=share, default=BUDGET,
        help="share of the steps that the policy may compute (default: %(default)s)")
    parser.add_argument(
        "--curve", metavar="SHARE", type=share, nargs="*", default=list(CURVE),
        help=f"shares for which all is measured, beside that one (default: {' '.join(map(str, CURVE))})")
    parser.add_argument(
        "--candidates", **COUNT, default=CANDIDATES, help="so many plans are run for each share (default: %(default)s)")
    add_setting(parser, next(setting for setting in settings(Policy) if setting.name == "forecast"))
    parser.add_argument(
        "--prompts", **FILE,
        help=f"a prompt in each line; default: {len(PROMPTS)} of ours, with {DEMO} {N_DEMO_PROMPTS} of its captions")
    parser.add_argument(
        "--held-out", **COUNT, default=3,
        help="the last N prompts are not tuned on, but compared at the end (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="the first two prompts, of which one is held out, and --budget alone")
    parser.add_argument("--output", **FILE, required=True, help="the policy, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with FILE if it is there; what it has is kept")
    parser.add_argument("--force", action="store_true", help="overwrite FILE and its .png")
    # fmt: on


def run(arguments: argparse.Namespace) -> int:
    group = distributed.world()
    is_first = group is None or group.rank() == 0
    output, plot = arguments.output, beside(arguments.output, ".png")
    if arguments.resume and arguments.force:
        raise TeaCacheValueError("--resume goes on with FILE and --force begins anew: leave out either")
    if plot == output:
        raise TeaCacheValueError(f"{output} is to be the plot beside the policy: give the policy another name")
    if is_first:
        for path in (output, plot):
            check_writable(path, force=arguments.force or arguments.resume)
        if arguments.resume and output.exists():
            Tuned.from_json(output)
        elif arguments.resume:
            print(f"{output} is not there: nothing to go on with, it begins anew", file=sys.stderr)
    if group is not None:
        others = ("run", "mflux", "at_end")  # no options of this command
        options = {name: str(value) for name, value in vars(arguments).items() if name not in others}
        with warnings_in_one_line():
            distributed.check_equal(group, "start", **distributed.installed(), **options)
    with quiet_logging(), ranks.said_once(group):
        require_mflux()
        _check(arguments)
        from ..demo._extra import demo_extra

        with demo_extra():
            import matplotlib  # noqa: F401  # before the work

            from ..tuning import report
            from ..tuning.tune import tune

    if _is_file(arguments.model) and not is_first:
        return 0
    if _is_file(arguments.model):
        tuned = Tuned.from_json(arguments.model)
        tuned.budget = arguments.budget
        if tuned.best() is None:
            raise TeaCacheValueError(f"{arguments.model} has nothing with a budget of {arguments.budget:g}")
        tuned.to_json(output, force=arguments.force)
    else:
        with warnings_in_one_line(), ranks.said_once(group):
            flux, prompts, given = _load(arguments)
            before = _written_at(output)
            try:
                tuned = tune(flux, prompts, path=output, progress=is_first, group=group, **given)
            except BaseException as error:  # Ctrl-C above all
                if is_first and _written_at(output) != before:  # the plot is of what the file has
                    write_file(plot, report.plot(Tuned.from_json(output)), force=True)
                if group is not None:
                    error.add_note(f"this was rank {group.rank()}; --resume goes on with {output} of rank 0")
                raise
        if not is_first:
            return 0
    write_file(plot, report.plot(tuned), force=arguments.force or arguments.resume)
    print(f"{report.heading(tuned)}; PSNR against all steps, dB\n\n{report.text(tuned)}\n")
    if (r2 := (tuned.polynomial or {}).get("held_out_r2")) is not None:
        print(f"The gate's polynomial has R² {r2:.2f} on the steps held out.")
    print(f"wrote {output} and {plot}: {PROG} run --policy {output}, or apply(flux, ...)")
    return 0


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _is_file(model: str) -> bool:
    return model.endswith(".json")


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before weights are loaded."""
    from ..mflux import names

    if _is_file(arguments.model):
        defaults = argparse.ArgumentParser()
        add_options(defaults)
        given = vars(defaults.parse_args([arguments.model, "--output", ""]))
        if wrong := [n for n, v in given.items() if n not in _PICKING and getattr(arguments, n) != v]:
            raise TeaCacheValueError(f"{arguments.model} has its own --{wrong[0].replace('_', '-')}")
        return
    if arguments.prompts is not None or arguments.model != DEMO:
        _split(arguments, _prompts(arguments, PROMPTS))
    of_demo = arguments.model == DEMO
    if not of_demo:
        names.find_text_to_image(arguments.model, arguments.base_model)
    for name in ("base_model", *_WEIGHTS) if of_demo else ("regime",):
        if getattr(arguments, name) is not None:
            whose = "the demonstration model" if of_demo else arguments.model
            raise TeaCacheValueError(f"{whose} takes no --{name.replace('_', '-')}")


def _load(arguments: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any]]:
    """The pipeline, the prompts to tune on, and the other arguments of ``tune``."""
    from ..mflux import families, names

    size = arguments.size or (128 if arguments.model == DEMO else 512)
    options = {"num_inference_steps": arguments.steps, "height": size, "width": size}
    if arguments.model == DEMO:
        from .. import demo
        from ..demo.compare import check_prompts

        flux: Any = demo.pipeline()
        captions = [caption for group in flux.captions.values() for caption in group]
        found = _prompts(arguments, captions[:: len(captions) // N_DEMO_PROMPTS][:N_DEMO_PROMPTS])  # of all groups
        check_prompts(flux, found)
        options |= REGIMES[arguments.regime or "own"].options
    else:
        weights = {name: getattr(arguments, name) for name in _WEIGHTS}
        flux = names.load(arguments.model, arguments.base_model, **weights)
        found = _prompts(arguments, PROMPTS)
    distilled = families.match(flux.model_config, type(flux)).variant.distilled
    options["guidance"] = arguments.guidance or (1.0 if distilled else 4.0)
    learnt, held_out = _split(arguments, found)
    given = ("budget", "candidates", "forecast", "force", "resume")
    options |= {name: getattr(arguments, name) for name in given if name in arguments}
    curve = [] if arguments.quick else arguments.curve
    return flux, learnt, {"held_out": held_out, "seeds": (arguments.seed,), "curve": curve, **options}


def _prompts(arguments: argparse.Namespace, ours: Sequence[str]) -> list[str]:
    """Of the file, or ours."""
    if arguments.prompts is None:
        return list(ours)
    try:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TeaCacheValueError(f"{arguments.prompts} is no text in UTF-8: {error}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _split(arguments: argparse.Namespace, found: list[str]) -> tuple[list[str], list[str]]:
    """To tune on, and held out."""
    n_held_out = 1 if arguments.quick else arguments.held_out
    found = found[:2] if arguments.quick else found
    if len(found) <= n_held_out:
        raise TeaCacheValueError(f"{len(found)} prompts, and --held-out {n_held_out} leaves none of them")
    return found[:-n_held_out], found[-n_held_out:]
