"""The demo's output folder: refused before the work when it cannot be written, and never half-written."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import TeaCacheError, TeaCacheValueError


class OutputError(TeaCacheError):
    """A file or folder cannot be written; the message names it and the reason."""


def prepare_folder(folder: Path, names: Iterable[str], *, force: bool) -> list[Path]:
    """Create ``folder`` if need be and make sure that each name in it can be written.

    Returns:
        list[Path]: The files' paths, in the order of ``names``.
    Raises:
        TeaCacheValueError: One of them exists and ``force`` is not set.
        OutputError: The folder cannot be made or written, or one of the paths is itself a folder.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder")
        if not force:
            _refuse_existing(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"cannot write to {folder}: it is not a folder") from error
    except OSError as error:
        raise OutputError(f"cannot create the folder {folder}: {error.strerror}") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return paths


def write_file(path: Path, data: bytes, *, force: bool) -> None:
    """Write ``data`` to ``path`` whole or not at all: a temporary file in the same folder takes the name at the end.

    Raises:
        TeaCacheValueError: ``path`` exists and ``force`` is not set.
        OutputError: The system refuses, because the disk is full, for example.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
            if not force:
                _refuse_existing(path)  # again, because another program may have made it meanwhile
            os.replace(part, path)
        except BaseException:  # Ctrl-C included
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; nothing was left half-written") from error


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise TeaCacheValueError(f"{path} exists; --force overwrites it")
