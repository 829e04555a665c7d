"""``mlx-teacache-fast run``: one of mflux's commands with gating on."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from .. import distributed
from .._command import FAILED, interrupted_as_in_python
from ..errors import TeaCacheError, TeaCacheValueError, one_line
from ..files import check_writable
from ..handle import Handle, gate, policy_of
from ..pictures import read_metadata
from ..policy import RULES, Policy, settings
from ..record.metadata import KEY
from ..record.trace import Trace
from . import ranks
from .shared import FILE, PROG, add_setting, quiet_logging, require_mflux, warnings_in_one_line

HELP = "run one of mflux's commands with gating on"

DESCRIPTION = """\
Run one of mflux's commands, with all of its own options, and skip denoising steps that can be forecast.

Write your usual command after "--". Pictures, progress bars and exit codes are mflux's; at the end a summary of the
steps is printed. It helps only where there are steps to skip: base models at 25 steps or more, not the distilled ones
that run 4 ("mlx-teacache-fast info MODEL" says which is which).
"""

EPILOG = """\
mflux's commands that can be gated:
{commands}

the summary, over all finished pictures:
  steps          how many were computed, forced (first and last ones), skipped, or numerical-miss: computed, because the
                 distance was no number
  bound          steps / (steps - skipped): the most that skipping these steps can give
  rel-L1         relative distance by which forecasts missed computed steps; with --threshold that of a step's input to
                 the one before: percentiles
  seconds saved  an estimate from the mean times of computed and skipped steps

examples:
  mlx-teacache-fast run -- mflux-generate-flux2 --model flux2-klein-base-4b --prompt "a red apple" --steps 50 \\
      --guidance 4
  mlx-teacache-fast run --tolerance 0.05 --trace apple.json -- mflux-generate --model dev --prompt "a red apple"
  mlx-teacache-fast run --steps 1110101010101010101010101 -- mflux-generate --model dev --steps 25 --prompt "apple"
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{PROG} run [options] -- COMMAND [its options]"
    parser.allow_abbrev = False
    for setting in settings(*RULES, Policy):
        add_setting(parser, setting)
    # fmt: off
    parser.add_argument(
        "--policy", **FILE,
        help=f"all of the above from a file of {PROG} tune, or as a gated picture was made")
    parser.add_argument(
        "--like", metavar="PICTURE", type=Path,
        help="--policy PICTURE, and with commands that have mflux's --config-from-metadata also prompt, model, seed, "
        "steps and size. What you give after COMMAND takes precedence")
    parser.add_argument(
        "--trace", **FILE,
        help="write every step of the finished pictures to FILE, as JSON for mlx_teacache_fast.Trace.from_json")
    # fmt: on
    parser.add_argument("--force", action="store_true", help="overwrite FILE where it exists")
    parser.add_argument(
        "--guidance-parallel",
        action="store_true",
        help="of two processes that mlx.launch starts, each computes one branch of the guidance; without it several "
        "processes share the seeds",
    )
    parser.add_argument("--verbose", action="store_true", help="of missing weights, show all that mflux says too")
    format_help = parser.format_help

    def with_epilog() -> str:  # made only when help is asked for
        parser.epilog = _epilog()
        return format_help()

    parser.format_help = with_epilog  # type: ignore[method-assign]


def _epilog() -> str:
    """With the table's commands; mflux takes seconds to import."""
    try:
        with quiet_logging():
            from ..mflux.families import COMMANDS
    except ImportError as error:
        names = f"(mflux cannot be imported: {error})"
    else:
        names = textwrap.fill(", ".join(COMMANDS), 110, break_on_hyphens=False)
    return EPILOG.format(commands=textwrap.indent(names, "  "))


def run(arguments: argparse.Namespace) -> int:
    """Returns mflux's exit code, or raises what ``cli.main`` says in one line."""
    if not arguments.mflux:
        raise TeaCacheValueError(
            f'no mflux command: it goes after "--", as in {PROG} run -- mflux-generate-flux2 --prompt "a red apple"'
        )
    group = distributed.world()
    branches = distributed.Branches(group) if arguments.guidance_parallel else None
    trace = None if arguments.trace is None else arguments.trace.absolute()  # a script may go to another folder
    if arguments.trace is not None and (group is None or group.rank() == 0):
        check_writable(arguments.trace, force=arguments.force)
    with quiet_logging(), ranks.said_once(group):
        require_mflux()
        from ..mflux import commands

        command, is_mfluxs = commands.find(arguments.mflux[0]), arguments.mflux[0] in commands.scripts()
    given = {s.name: getattr(arguments, s.name) for s in settings(*RULES, Policy) if s.name in arguments}
    like = None if arguments.like is None else read_metadata(arguments.like)
    beside = {name: given.pop(name) for name in ("save_metadata",) if name in given}  # counts beside a policy too
    if like is None:
        policy = policy_of(arguments.policy, given)
    else:
        if given or arguments.policy is not None:
            raise TeaCacheValueError("--like has all settings: leave out either it or them")
        policy = like.policy
        if (made_with := like.versions.get(KEY)) != (here := version("mlx-teacache-fast")):
            again = f"--steps {like.steps} --forecast {policy.forecast} --cache {policy.cache}"
            again += "" if policy.corrector is None else f" --corrector {policy.corrector:g}"
            print(
                one_line(
                    f"{PROG}: warning: version {made_with} of this package made the picture, and {here} may decide "
                    f"otherwise: {again} repeats its steps"
                ),
                file=sys.stderr,
            )
    policy = replace(policy, **beside)
    handles: list[Handle] = []
    code, rank = FAILED, None
    if group is not None:
        command_line = shlex.join(arguments.mflux)
        shown = None if like is None else like.mflux
        with warnings_in_one_line():
            rank = ranks.Rank(group, shares=branches is None, command=command_line, like=shown, **policy.flat)
        arguments.at_end.callback(rank.leave)
    try:
        with (
            warnings_in_one_line(),
            ranks.said_once(group),
            commands.called_as(arguments.mflux),
            commands.with_options_of(like, Path() if like is None else arguments.like.parent),
            commands.gating(
                lambda flux: handles.append(gate(flux, policy, branches)),
                policy,
                only=None if like is None else like.pipeline,
                seeds=None if rank is None else rank.seeds,
                is_written=rank is None or branches is None or rank.is_first,
                names_weights=is_mfluxs,
            ),
            nullcontext() if is_mfluxs else interrupted_as_in_python(),
        ):
            # None, as all of them return, is 0; --help and argparse raise SystemExit.
            code = int(commands.call(command) or 0)
        if not handles and not is_mfluxs:
            print(f"{PROG}: warning: no pipeline that can be gated was made, so nothing was skipped", file=sys.stderr)
    except ranks.NothingToDo:
        code = 0
    except SystemExit as stop:
        if rank is None:
            raise
        code = stop.code or 0 if isinstance(stop.code, int | None) else FAILED
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)  # as Python does
    except TeaCacheError as error:
        if arguments.verbose and error.__cause__ is not None:
            sys.excepthook(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
        raise
    except BrokenPipeError:
        raise
    except Exception as error:  # mflux's own errors look as they do without this package
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        for handle in handles:
            handle.restore()
        traces = [handle.trace for handle in handles]
        try:
            if rank is not None:
                code, traces = rank.finish(code, traces)
        finally:  # Ctrl-C may end the wait for the others
            if rank is None or rank.is_first:
                _report(traces, trace, force=arguments.force)
    return code


def _report(traces: Sequence[Trace], path: Path | None, *, force: bool) -> None:
    """Also after an error or Ctrl-C: earlier pictures of the same command are finished."""
    finished = [trace for trace in traces if trace.generations]
    suffixes = ["" if i == 0 else f"-{i + 1}" for i in range(len(finished))]  # mflux's commands make one pipeline
    paths = [] if path is None else [path.with_stem(path.stem + suffix) for suffix in suffixes]
    try:
        for path, one in zip(paths, finished, strict=False):  # first: stdout may be closed
            one.to_json(path, force=force)
    finally:
        for one in finished:
            print(f"\n{one.summary()}")
    for path in paths:
        print(f"wrote {path}")
