"""What a process of the command line does before anything else is imported: nothing, in other processes.

Ctrl-C ends it in one line while modules are imported, where Python may swallow a KeyboardInterrupt. Standard streams
that are closed are opened on nothing, so that no file takes their numbers, and show what they cannot encode replaced.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import TracebackType
from typing import Any, NoReturn

PROG = "mlx-teacache-fast"
FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141  # exit codes

_at_once = True


@contextmanager
def interrupted_at_once(at_once: bool) -> Iterator[None]:
    """Whether Ctrl-C ends the process in the block, or raises KeyboardInterrupt."""
    global _at_once
    before, _at_once = _at_once, at_once
    try:
        yield
    finally:
        _at_once = before


@contextmanager
def interrupted_as_in_python() -> Iterator[None]:
    """In the block Ctrl-C is Python's, as often as it comes: it may be a program's way to end a picture."""
    is_ours = signal.getsignal(signal.SIGINT) is _on_interrupt
    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _on_interrupt)


def _quit(message: str, code: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"{PROG}: error: {' '.join(message.split())}\n".encode())
    os._exit(code)


def _on_interrupt(*_: Any) -> None:
    global _at_once
    if _at_once:
        _quit("interrupted", INTERRUPTED)
    _at_once = True  # the second time
    raise KeyboardInterrupt


def _on_swallowed(what: Any) -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
        _quit("interrupted", INTERRUPTED)
    sys.__unraisablehook__(what)


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of an import: another MLX, or a variable of the environment."""
    if issubclass(kind, ImportError | ValueError):
        _quit(str(error), BAD_INPUT if issubclass(kind, ValueError) else FAILED)
    sys.__excepthook__(kind, error, trace)


def _begin() -> None:
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody chose to ignore it
        signal.signal(signal.SIGINT, _on_interrupt)
    sys.excepthook, sys.unraisablehook = _on_error, _on_swallowed


def imported() -> None:
    """All modules are imported: errors are the command's from now on."""
    if sys.excepthook is _on_error:
        sys.excepthook = sys.__excepthook__


def finish() -> None:
    """The work is done: Ctrl-C comes too late."""
    if is_one:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# The command as it is installed; or python -m, which has this name until it has found the module.
_name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
is_one = _name in (PROG, f"{PROG}.exe") or (_name == "-m" and ("-m", __package__) in pairwise(sys.orig_argv))
if is_one:
    _begin()
