"""The command line, ``mlx-teacache-fast``: its commands, errors in one line, and exit codes.

Each command has a file of its own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version

from .._command import BAD_INPUT, CLOSED_PIPE, FAILED, INTERRUPTED, PROG, finish, imported, interrupted_at_once
from ..errors import IncompatibleModelError, TeaCacheError, TeaCacheValueError, one_line
from . import demo, info, report, run, tune
from .shared import Parser

DESCRIPTION = """\
TeaCache step skipping on MLX: mflux's commands with fewer computed denoising steps. The demo shows
what it does, with a tiny model in this package.
"""


def _parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=DESCRIPTION, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"{PROG} {version('mlx-teacache-fast')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (run, info, tune, demo, report):
        texts = {"help": command.HELP, "description": command.DESCRIPTION, "epilog": command.EPILOG}
        one = commands.add_parser(command.__name__.rpartition(".")[-1], formatter_class=layout, **texts)
        command.add_options(one)
        one.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's.
    Returns:
        int: Exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 nobody reads the output any more (as of
            other programs in a pipe); of ``run``, what mflux's command returns. Messages go to stderr, one line each,
            but for mflux's own.
    Raises:
        SystemExit: For ``--help`` and ``--version`` (0), for what the parser refuses (2), and in one process when
            mflux's command raises it.
    """
    imported()
    with ExitStack() as at_end:  # when all is said
        return _main(argv, at_end)


def _main(argv: Sequence[str] | None, at_end: ExitStack) -> int:
    command, code = PROG, 0
    messages: list[str] = []
    ending: SystemExit | None = None
    try:
        with interrupted_at_once(False):
            parser = _parser()
            own, mflux_command = run.split(sys.argv[1:] if argv is None else argv)
            arguments = parser.parse_args(own)
            arguments.mflux, arguments.at_end = mflux_command, at_end
            if arguments.command is None:
                parser.print_help()
            else:
                command = f"{PROG} {arguments.command}"
                code = arguments.run(arguments)
    except SystemExit as stop:
        ending = stop
    except (TeaCacheError, ImportError) as error:
        code = BAD_INPUT if isinstance(error, TeaCacheValueError | IncompatibleModelError) else FAILED
        messages = [str(error), *getattr(error, "__notes__", ())]
    except KeyboardInterrupt:
        code, messages = INTERRUPTED, ["interrupted"]
    except BrokenPipeError:  # who reads our output has seen enough
        code = CLOSED_PIPE
    except OSError as error:  # stdout is on a full disk, or the trace's file is
        code, messages = FAILED, [str(error)]
    try:
        print(end="", flush=True)
    except OSError as error:
        _give_up_stdout()
        if code == 0:
            code, messages = (CLOSED_PIPE, []) if isinstance(error, BrokenPipeError) else (FAILED, [str(error)])
    for message in messages:
        with suppress(OSError):
            print(f"{command}: error: {one_line(message)}", file=sys.stderr)
    finish()
    if ending is not None and code == 0:
        raise ending
    return code


def _give_up_stdout() -> None:
    """What stdout cannot take is dropped: Python would try again at exit, and complain."""
    with open(os.devnull, "w") as nowhere, suppress(OSError):  # where it is no file of the system's
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
