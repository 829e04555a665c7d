"""What the commands share: exit codes, kinds of arguments, how warnings are shown."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

from .. import support
from .._command import BAD_INPUT, interrupted_at_once
from .._command import PROG as PROG
from ..errors import IncompatibleModelError, TeaCacheError, TeaCacheValueError, TeaCacheWarning, one_line
from ..policy import MAX_STEPS


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def number(kind: type[int] | type[float], rule: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):  # every comparison with NaN is false
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text[:200]}")
        return value

    return convert


DEMO = "demo"  # the embedded model's name, where a model is asked for

# Kinds of options, as argparse's keywords.
COUNT: dict[str, Any] = dict(
    metavar="N", type=number(int, f"a whole number from 1 to {MAX_STEPS}", lambda n: 1 <= n <= MAX_STEPS)
)
FILE: dict[str, Any] = dict(metavar="FILE", type=Path)
GUIDANCE: dict[str, Any] = dict(
    metavar="G", type=number(float, "a finite number of at least 1", lambda g: 1 <= g < math.inf)
)
SEED: dict[str, Any] = dict(
    metavar="N", type=number(int, "a whole number from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64), default=1
)

QUANTIZE: dict[str, Any] = dict(metavar="BITS", type=int, choices=(3, 4, 5, 6, 8))  # mflux's


def beside(output: Path, suffix: str) -> Path:
    """The file of ``--output``'s name with another ending. Raises TeaCacheValueError if it has no name."""
    if not output.name:
        raise TeaCacheValueError(f"--output must be the path of a file, got '{output}'")
    return output.with_suffix(suffix)


def flag(setting: Field[Any]) -> str:
    return setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"


def add_setting(parser: argparse.ArgumentParser, setting: Field[Any]) -> None:
    """The option of a policy's setting; not in the namespace unless it is given."""
    name, option = setting.name, dict(setting.metadata["option"])
    convert: Any = option.get("type", str)

    def checked(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text  # which the check refuses, and says what it wants
        try:
            return setting.metadata["check"](name, value)
        except TeaCacheValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    if not option.keys() & {"action", "choices", "nargs"}:
        option["type"] = checked
    parser.add_argument(flag(setting), dest=name, default=argparse.SUPPRESS, help=setting.metadata["says"], **option)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """For imports of mflux: transformers, which it imports, misses PyTorch in its log. Nothing here does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with interrupted_at_once(True):
            yield
    finally:
        logging.disable(before)


def require_mflux() -> None:
    """Raises TeaCacheError where mflux cannot be imported: no fault of what the user typed."""
    try:
        support.require_mflux()
    except IncompatibleModelError as error:
        raise TeaCacheError(str(error)) from error


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """This package's warnings, each text once, above the progress bar instead of across it."""
    from tqdm import tqdm

    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, TeaCacheWarning):
            show_others(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            tqdm.write(f"{PROG}: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        show_others = warnings.showwarning
        warnings.simplefilter("always", TeaCacheWarning)
        warnings.showwarning = show
        yield
