"""The command line, ``mlx-teacache-fast``: its commands, errors in one line, and exit codes.

Each command has a file of its own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import IncompatibleModelError, TeaCacheError, TeaCacheValueError
from . import demo, info, run, tune
from .shared import BAD_INPUT, FAILED, INTERRUPTED, PROG, Parser, one_line

DESCRIPTION = """\
TeaCache step skipping on MLX: mflux's commands with fewer computed denoising steps. The demo shows
what it does, with a tiny model in this package.
"""


def _parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=DESCRIPTION, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"{PROG} {version('mlx-teacache-fast')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (run, info, tune, demo):
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
        int: Exit code: 0 done, 1 failed, 2 bad input, 130 interrupted; of ``run``, what mflux's command returns.
            Messages go to stderr, one line each, but for mflux's own.
    Raises:
        SystemExit: For ``--help`` and ``--version`` (0), for what the parser refuses (2), and when mflux's command
            raises it.
    """
    parser = _parser()
    own, mflux_command = run.split(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(own)
    arguments.mflux = mflux_command
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except (TeaCacheValueError, IncompatibleModelError) as error:
        code, message = BAD_INPUT, one_line(error)
    except (TeaCacheError, ImportError) as error:
        code, message = FAILED, one_line(error)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except OSError as error:  # stdout is a closed pipe or on a full disk, or the trace's file is
        code, message = FAILED, one_line(error)
        _give_up_stdout()
    print(f"{PROG} {arguments.command}: error: {message}", file=sys.stderr)
    return code


def _give_up_stdout() -> None:
    """What stdout cannot take is dropped: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
