"""``mlx-teacache-fast run``: one of mflux's FLUX commands with gating on."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import arguments as checks
from .cli_common import (
    FAILED,
    PROG,
    integer,
    number,
    quiet_logging,
    require_mflux,
    warnings_in_one_line,
)
from .errors import TeaCacheError, TeaCacheValueError
from .files import check_writable
from .forecast import CACHES, DEFAULT_CACHE, DEFAULT_FORECAST, MAX_ORDER
from .handle import Handle, check_settings
from .metadata import KEY, read_metadata
from .variants import DEFAULT_MAX_CONSECUTIVE_SKIPS, DEFAULT_MODE, DEFAULT_THRESHOLD, MODES

DESCRIPTION = """\
Run one of mflux's FLUX commands, with all of its own options, and skip denoising steps whose input has hardly changed.

Write your usual command after "--". Pictures, progress bars and exit codes are mflux's; at the end a summary of the
steps is printed. It helps only where there are steps to skip: base models at 25 steps or more, not the distilled ones
that run 4 ("mlx-teacache-fast info MODEL" says which is which).
"""

EPILOG = """\
mflux's commands that can be gated:
  mflux-generate                     mflux-generate-in-context
  mflux-generate-controlnet          mflux-generate-in-context-catvton
  mflux-generate-depth               mflux-generate-in-context-edit
  mflux-generate-fill                mflux-generate-kontext
  mflux-generate-flux2               mflux-generate-redux
  mflux-generate-flux2-edit          mflux-upscale-controlnet

the summary, over all finished pictures:
  steps          how many were computed, forced (first and last ones), skipped, or numerical-miss: computed, because the
                 distance was no number
  bound          steps / (steps - skipped): the most that skipping these steps can give
  rel-L1         relative distance of a step's input to the one before, as the gate measured it: percentiles
  seconds saved  an estimate from the mean times of computed and skipped steps

examples:
  mlx-teacache-fast run -- mflux-generate-flux2 --model flux2-klein-base-4b --prompt "a red apple" --steps 50 \\
      --guidance 4
  mlx-teacache-fast run --threshold 0.25 --trace apple.json -- mflux-generate --model dev --prompt "a red apple"
  mlx-teacache-fast run --plan 1110101010101010101010101 -- mflux-generate --model dev --steps 25 --prompt "a red apple"
  mlx-teacache-fast run --like apple.png -- mflux-generate-flux2 --seed 2
  mlx-teacache-fast run -- mflux-generate-flux2 --help      (mflux's own help)

exit code: mflux's own (0 done, 1 failed, 2 bad options); also 2 for what cannot be gated, 130 interrupted. mflux itself
says so and ends with 0 when Ctrl-C stops it in a step.
"""


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and mflux's command line: behind the first ``--`` of a ``run``."""
    if argv[:1] != ["run"]:
        return list(argv), []
    if "--" in argv:
        end = argv.index("--")
        return list(argv[:end]), list(argv[end + 1 :])
    return ["run", *(option for option in argv if option in ("-h", "--help"))], []  # run() says what is missing


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run one of mflux's FLUX commands with gating on",
        usage=f"{PROG} run [options] -- COMMAND [its options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--threshold",
        metavar="T",
        type=number("a number from 0 to 1", lambda t: 0 <= t <= 1),
        help="accumulated distance at which a step is computed again: a higher one skips more and is less faithful, 0 "
        f"skips nothing (default: the model's own, 0.17 to 0.30, or {DEFAULT_THRESHOLD:g} with --coefficients)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="the threshold by name, in parts of the model's own: "
        f"{', '.join(f'{name} {factor:g}' for name, factor in MODES.items())} (default: {DEFAULT_MODE})",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help=f"coefficients, their range and threshold from a file of {PROG} calibrate (default: the model's own)",
    )
    parser.add_argument(
        "--coefficients",
        metavar=("C4", "C3", "C2", "C1", "C0"),
        nargs=5,
        type=number("a finite number of float32's range", lambda c: abs(c) <= checks.FLOAT32_MAX),
        help="polynomial of the relative distance, fourth degree first, in plain decimals (default: the model's own)",
    )
    steps = integer("a whole number of steps, 0 or more", lambda n: n >= 0)
    parser.add_argument(
        "--skip-first",
        metavar="N",
        type=steps,
        help="so many first steps are always computed (default: 1)",
    )
    parser.add_argument(
        "--skip-last",
        metavar="N",
        type=steps,
        help="so many last steps are always computed (default: 1)",
    )
    parser.add_argument(
        "--max-consecutive-skips",
        metavar="N",
        type=steps,
        help=f"a step is computed after so many skipped ones (default: {DEFAULT_MAX_CONSECUTIVE_SKIPS})",
    )
    parser.add_argument(
        "--max-skips", metavar="N", type=steps, help="at most so many skipped steps a picture (default: no limit)"
    )
    parser.add_argument(
        "--budget",
        metavar="SHARE",
        type=number("a number above 0 and up to 1", lambda b: 0 < b <= 1),
        help="this share of the steps is computed, planned before the run, instead of measuring",
    )
    parser.add_argument(
        "--forecast",
        metavar="N",
        type=int,
        choices=range(MAX_ORDER + 1),
        help="what a skipped step gets: 0 reuses what the last computed step made, 1 and 2 extrapolate the last two or "
        f"three (default: {DEFAULT_FORECAST})",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        help="what is reused or extrapolated: the residual of the transformer's blocks, or the output, the noise "
        f"prediction, which takes little memory (default: {DEFAULT_CACHE})",
    )
    parser.add_argument(
        "--plan",
        metavar="1101...|FILE",
        type=_plan,
        help="which steps are computed (1) and skipped (0), one digit for each, instead of measuring; the first must "
        f"be 1, and neither threshold nor forced steps count. Or a file of {PROG} search",
    )
    parser.add_argument(
        "--like",
        metavar="PICTURE",
        type=Path,
        help="repeat how a gated PICTURE was made (or its .metadata.json): the options above and, with mflux-generate, "
        "-flux2, -flux2-edit, -kontext and -redux, also prompt, model, seed, steps and size, like mflux's "
        "--config-from-metadata, which knows nothing of the gate. What you give after COMMAND takes precedence",
    )
    parser.add_argument(
        "--no-metadata", action="store_true", help="pictures do not say in their metadata how they were gated"
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write every step of the finished pictures to FILE, as JSON for mlx_teacache_fast.Trace.from_json",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE where it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns mflux's exit code, or raises what ``cli.main`` says in one line."""
    if not arguments.mflux:
        raise TeaCacheValueError(
            f'no mflux command: it goes after "--", as in {PROG} run -- mflux-generate-flux2 --prompt "a red apple"'
        )
    if arguments.trace is not None:
        check_writable(arguments.trace, force=arguments.force)
    with quiet_logging():
        require_mflux()
        from .mflux import commands

        command = commands.find(arguments.mflux[0])
    if arguments.calibration is not None and arguments.coefficients is not None:
        raise TeaCacheValueError("--calibration and --coefficients are two polynomials: leave out either")
    given = dict(
        mode=arguments.mode,
        rel_l1_thresh=arguments.threshold,
        coefficients=arguments.calibration or arguments.coefficients,
        skip_first_n_steps=arguments.skip_first,
        skip_last_n_steps=arguments.skip_last,
        max_consecutive_skips=arguments.max_consecutive_skips,
        max_skips=arguments.max_skips,
        budget=arguments.budget,
        forecast=arguments.forecast,
        cache=arguments.cache,
        steps=arguments.plan if isinstance(arguments.plan, str) else None,
        plan=arguments.plan if isinstance(arguments.plan, Path) else None,
    )
    options = {name: value for name, value in given.items() if value is not None}
    like, folder = None, Path()
    if arguments.like is not None:
        if options:
            raise TeaCacheValueError("--like has all options of the gate: leave out either it or them")
        like = read_metadata(arguments.like)
        options = dict(like.settings)
        folder = arguments.like.parent
        if (made_with := like.versions.get(KEY)) != (here := version("mlx-teacache-fast")):
            again = f"--plan {like.steps} --forecast {options['forecast']} --cache {options['cache']}"
            print(
                f"{PROG}: warning: version {made_with} of this package made the picture, and {here} may decide "
                f"otherwise: {again} repeats its steps",
                file=sys.stderr,
            )
    options["save_metadata"] = not arguments.no_metadata
    check_settings(**options)  # before weights are loaded
    handles: list[Handle] = []
    try:
        with (
            warnings_in_one_line(),
            commands.called_as(arguments.mflux),
            commands.with_options_of(like, folder),
            commands.gating(options, handles, only=None if like is None else like.pipeline),
        ):
            return int(command() or 0)  # None, as all of them return, is 0; --help and argparse raise SystemExit
    except TeaCacheError:
        raise
    except Exception as error:  # mflux's own errors look as they do without this package
        sys.excepthook(type(error), error, error.__traceback__)
        return FAILED
    finally:
        for handle in handles:
            handle.restore()
        _report(handles, arguments.trace, force=arguments.force)


def _report(handles: Sequence[Handle], trace: Path | None, *, force: bool) -> None:
    """Also after an error or Ctrl-C: earlier pictures of the same command are finished."""
    finished = [handle for handle in handles if handle.stats.generations > 0]
    written = []
    for i, handle in enumerate(finished if trace is not None else ()):  # first: stdout may be closed
        assert trace is not None
        path = trace if i == 0 else trace.with_stem(f"{trace.stem}-{i + 1}")  # mflux's commands make one pipeline
        handle.trace.to_json(path, force=force)
        written.append(path)
    for handle in finished:
        print(f"\n{handle.summary()}")
    for path in written:
        print(f"wrote {path}")


def _plan(text: str) -> str | Path:
    if set(text) - {"0", "1"} and (Path(text).exists() or Path(text).suffix == ".json"):
        return Path(text)
    try:
        checks.plan(text)
    except TeaCacheValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("steps ")) from error
    return text
