"""Files: refused before the work when they cannot be written, and never half-written."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from .errors import OutputError, TeaCacheValueError


def prepare_folder(folder: Path, names: Iterable[str], *, force: bool) -> list[Path]:
    """Create ``folder`` if need be and make sure that each name in it can be written.

    Returns:
        list[Path]: The files' paths, in the order of ``names``.
    Raises:
        TeaCacheValueError: One of them exists and ``force`` is not set, or is a folder.
        OutputError: The folder cannot be made or written.
    """
    paths = [folder / name for name in names]
    for path in paths:
        check_writable(path, force=force, in_folder=False)
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


def write_file(path: Path, data: bytes, *, force: bool, how: str = "--force") -> None:
    """Write ``data`` to ``path`` whole or not at all: a temporary file in the same folder takes the name at the end.

    ``how`` says in the message what sets ``force``.

    Raises:
        TeaCacheValueError: ``path`` exists and ``force`` is not set.
        OutputError: The system refuses, because the disk is full, for example.
    """
    if not force:
        _refuse_existing(path, how)
    path = path.resolve()  # what a link leads to
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
            if not force:
                _refuse_existing(path, how)  # again, because another program may have made it meanwhile
            os.replace(part, path)
        except BaseException:  # Ctrl-C included
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; nothing was left half-written") from error


def _refuse_existing(path: Path, how: str = "--force") -> None:
    if os.path.lexists(path):
        raise TeaCacheValueError(f"{path} exists; {how} overwrites it")


def check_writable(path: Path, *, force: bool, how: str = "--force", in_folder: bool = True) -> None:
    """Before the work whose result ``path`` will hold.

    Raises:
        TeaCacheValueError: ``path`` exists and ``force`` is not set, or is no file; with ``in_folder`` also if its own
            folder does not exist.
        OutputError: It cannot be written.
    """
    if path.is_dir():
        raise TeaCacheValueError(f"cannot write {path}: it is a folder")
    if not force:
        _refuse_existing(path, how)
    if path.exists() and not path.is_file():
        raise TeaCacheValueError(f"cannot write {path}: it is no file")
    folder = path.resolve().parent  # where write_file makes the new one
    if in_folder and not folder.is_dir():
        raise TeaCacheValueError(f"cannot write {path}: there is no folder {path.parent}")
    if in_folder and not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: permission denied")


# ---- JSON

VERSION = 1


def to_json(path: Path, kind: str, data: dict[str, Any], *, force: bool) -> None:
    """Write ``data`` for ``from_json``; errors as for ``write_file``."""
    record = {"format": f"mlx-teacache-fast {kind}", "version": VERSION} | data
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_file(path, text.encode(), force=force, how="force=True")


def from_json(path: Path, kind: str) -> dict[str, Any]:
    """What ``to_json`` wrote.

    Raises:
        TeaCacheValueError: It is not such a file, or one of another version.
        OSError: It cannot be read.
    """
    name = f"mlx-teacache-fast {kind}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise TeaCacheValueError(f"{path} is not a {kind}: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != name:
        raise TeaCacheValueError(f'{path} is not a {kind}: it has no "format": "{name}"')
    if (version := data.pop("version", None)) != VERSION:
        raise TeaCacheValueError(f"{path} is a {kind} of version {version!r}, and this package reads {VERSION}")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
