"""What the commands share: exit codes, kinds of arguments, and how warnings are shown."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from . import support
from .errors import IncompatibleModelError, TeaCacheError, TeaCacheWarning

PROG = "mlx-teacache-fast"
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def integer(rule: str, accepts: Callable[[int], bool]) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return convert


def number(rule: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not accepts(value):  # every comparison with NaN is false
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return convert


seed = integer("a whole number from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """No log messages below errors: transformers, which mflux imports, misses PyTorch. Nothing here does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
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


def one_line(message: object) -> str:
    return " ".join(str(message).split())
