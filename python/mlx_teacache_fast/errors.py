"""Typed errors and warnings. Bad values are ValueError too, so ``except ValueError`` keeps working.

All can be pickled and copied.
"""

import inspect
import reprlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class TeaCacheError(Exception):
    """Base class of every error that this package raises on purpose."""


class TeaCacheValueError(TeaCacheError, ValueError):
    """An argument has the wrong type or value; the message names the parameter and what was given."""


class InvalidStepWindowError(TeaCacheValueError):
    """The forced steps leave the gate no step to decide, or planned ``steps`` are not as many as the schedule has."""


class IncompatibleModelError(TeaCacheError, TypeError):
    """The object is not a pipeline whose steps can be skipped here."""


class AlreadyPatchedError(TeaCacheError):
    """``apply`` was called on a gated pipeline. ``handle`` is the live handle, whose ``restore()`` ends the gating.

    A handle belongs to a pipeline in this process: in an error that was pickled or copied it is None.
    """

    def __init__(self, message: str, handle: object = None) -> None:
        super().__init__(message)
        self.handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, vars(self) | {"handle": None}


class InternalStateError(TeaCacheError):
    """A step did not run mflux's forward pass as it was traced: something between wraps or replaces it, or a bug."""


class OutputError(TeaCacheError):
    """A file or folder cannot be written; the message names it and the reason."""


def how_to_install(extra: str) -> str:
    """The command for an extra of this package. On Linux mflux asks pip for MLX's CUDA build and for torch."""
    if sys.platform != "linux":
        return f'pip install ".[{extra}]", in a checkout'
    if version_of("mlx-cuda-13") is None:
        return f"uv sync --inexact --extra {extra}, in a checkout (pip install uv; pip would add gigabytes of CUDA)"
    return f'pip install ".[{extra},cuda]", in a checkout'


def version_of(package: str) -> str | None:
    """None where it is not installed under that name, as mflux where a fork has its place."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one_line(message: object) -> str:
    """Its text with single blanks, and what a terminal would obey instead of showing, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 20
_repr.maxstring = _repr.maxother = 200


def shown(value: object) -> str:
    """A value that was given, for an error's message: in one line, cut, and whatever it is."""
    try:
        return one_line(_repr.repr(value))
    except Exception:  # of a number with too many digits, or of a class of somebody else's
        return f"an object of {type(value).__name__}"


class TeaCacheWarning(UserWarning):
    """Base class of this package's warnings."""


class DisabledWarning(TeaCacheWarning):
    """The settings skip nothing: a tolerance or threshold of 0, a limit of 0 skips, a plan without a skipped step."""


class NoBenefitWarning(TeaCacheWarning):
    """Nothing can be skipped: a distilled model's few steps, or a schedule as short as the forced steps."""


class UncalibratedWarning(TeaCacheWarning):
    """The coefficients were fitted on something else: a checkpoint's base model, or another pipeline."""


class UntestedVersionWarning(TeaCacheWarning):
    """The installed mflux is newer than the newest one that was verified."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn of a call of this package: at the line of it, outside of the package and of mflux."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "mflux"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category=category, stacklevel=level + 1)
