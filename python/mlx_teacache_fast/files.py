"""Files: refused before the work when they cannot be written, never half-written; and reading what anybody made."""

import codecs
import json
import os
import secrets
import signal
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .errors import OutputError, TeaCacheValueError, shown


def as_path(name: str, value: object) -> Path:
    """A path that was given as the argument ``name``. Raises TeaCacheValueError if it is none."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    with suppress(ValueError):  # a text that is no name in this system's encoding
        if isinstance(text, str) and b"\0" not in os.fsencode(text):
            return Path(text)
    raise TeaCacheValueError(f"{name} must be a path, got {shown(value)}")


# ---- Writing


def prepare_folder(folder: Path, names: Iterable[str], *, force: bool) -> list[Path]:
    """Create ``folder`` if need be and make sure that each name in it can be written.

    Returns:
        list[Path]: The files' paths, in the order of ``names``.
    Raises:
        TeaCacheValueError: One of them exists and ``force`` is not set, or is no file.
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


def write_files(files: Mapping[Path, bytes], *, force: bool, how: str = "--force") -> None:
    """Write files that belong together, each whole, and all of them or none.

    Temporary files in the same folders take the names at the end. A new file has the permissions of any new one, a
    replaced one keeps its own. ``how`` says in the message what sets ``force``.

    Raises:
        TeaCacheValueError: A file exists and ``force`` is not set, or is no regular file.
        OutputError: The system refuses, because the disk is full, for example.
    """
    moves: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            check_writable(path, force=force, how=how)
            target = path.resolve()  # what a link leads to
            part = _beside(target)
            moves.append((part, target))
            with part.open("xb") as file:
                if target.exists():
                    part.chmod(stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
        with uninterrupted():
            for path in files:
                check_writable(path, force=force, how=how)  # another program may have made it meanwhile
            _move(moves)
    except OSError as error:
        where = error.filename2 or path
        raise OutputError(f"cannot write {where}: {error.strerror}; nothing was left half-written") from error
    finally:
        for part, _ in moves:
            part.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, *, force: bool, how: str = "--force") -> None:
    """``write_files`` of one."""
    write_files({path: data}, force=force, how=how)


def _beside(target: Path) -> Path:
    """A name that no other process or thread uses."""
    return target.with_name(f".{secrets.token_hex(8)}.part")


def _move(moves: list[tuple[Path, Path]]) -> None:
    """From, to: all, or none where one cannot be moved."""
    with ExitStack() as tidy, ExitStack() as undo:
        for part, target in moves:
            back = target.unlink
            if target.exists():
                old = _beside(target)
                with suppress(OSError):  # not every file system has hard links
                    os.link(target, old)
                tidy.callback(old.unlink, missing_ok=True)
                back = partial(_restore, old, target)
            os.replace(part, target)
            undo.callback(back)
        undo.pop_all()


def _restore(old: Path, target: Path) -> None:
    if old.exists():
        os.replace(old, target)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C counts at the end of the block, and SIGTERM, with which mlx.launch ends its processes."""
    if threading.current_thread() is not threading.main_thread():
        yield  # it interrupts another thread
        return
    came: set[int] = set()
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, lambda number, _: came.add(number))
        yield
    finally:
        for signum, handler in before.items():  # SIGINT's last: it may raise at once
            signal.signal(signum, handler)
        for signum in before:
            if signum in came:
                signal.raise_signal(signum)


def check_writable(path: Path, *, force: bool, how: str = "--force", in_folder: bool = True) -> None:
    """Before the work whose result ``path`` will hold.

    Raises:
        TeaCacheValueError: ``path`` exists and ``force`` is not set, or is no regular file; with ``in_folder`` also if
            its own folder does not exist.
        OutputError: It cannot be written.
    """
    mode = None
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a link to itself
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise TeaCacheValueError(f"cannot write {path}: it is {'a folder' if stat.S_ISDIR(mode) else 'no file'}")
    if not force and os.path.lexists(path):
        raise TeaCacheValueError(f"{path} exists; {how} overwrites it")
    folder = path.resolve().parent  # where write_files makes the new one
    if in_folder and not folder.is_dir():
        raise TeaCacheValueError(f"cannot write {path}: there is no folder {path.parent}")
    if in_folder and not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: permission denied")


# ---- Reading

LARGEST_PICTURE = 1 << 30  # bytes
LARGEST_JSON = 1 << 26  # a trace of some thousand pictures


def check_readable(path: Path, largest: int) -> None:
    """Raises TeaCacheValueError if ``path`` is no regular file or above ``largest`` bytes, OSError if it is not there.

    Other kinds may never end, or wait for somebody to write.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise TeaCacheValueError(f"{path} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}")
    if status.st_size > largest:
        raise TeaCacheValueError(f"{path} must have at most {largest} bytes, got {status.st_size}")


VERSION = 1


def to_json(path: object, kind: str, data: dict[str, Any], *, force: bool) -> None:
    """Write ``data`` for ``from_json``; errors as for ``write_files``."""
    record = {"format": f"mlx-teacache-fast {kind}", "version": VERSION} | data
    target = as_path("path", path)
    if not isinstance(force, bool):
        raise TeaCacheValueError(f"force must be True or False, got {shown(force)}")
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except (RecursionError, TypeError, ValueError) as error:
        raise TeaCacheValueError(f"a {kind} must be of what JSON has: {error}") from error
    write_file(target, text.encode(), force=force, how="force=True")


def from_json(path: object, kind: str) -> dict[str, Any]:
    """What ``to_json`` wrote.

    Raises:
        TeaCacheValueError: It is not such a file, or one of another version.
        OSError: It cannot be read.
    """
    data = read_json(as_path("path", path), kind)
    name = f"mlx-teacache-fast {kind}"
    if not isinstance(data, dict) or data.pop("format", None) != name:
        raise TeaCacheValueError(f'{path} is not a {kind}: it has no "format": "{name}"')
    version = data.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise TeaCacheValueError(f"{path} is a {kind} of version {shown(version)}, and this package reads {VERSION}")
    return data


def read_json(path: Path, kind: str) -> Any:
    """The value of a file. Raises TeaCacheValueError if it has none, and says what it is; OSError."""
    check_readable(path, LARGEST_JSON)
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise TeaCacheValueError(f"{path} is not a {kind}: {error}") from error


def parse(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, which says what is wrong with it."""
    if len(data) > LARGEST_JSON or not data.strip():
        raise ValueError(f"it must have 1 to {LARGEST_JSON} bytes of text, got {len(data)}")
    if data.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte-order mark, and must be UTF-8 without one")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise ValueError("it is in UTF-16 or UTF-32, and must be in UTF-8")
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        raise ValueError(f"it {'is cut off' if is_cut else 'is no JSON'}: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def members(data: object, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """An object of a JSON file with the members ``kinds`` and no other; ValueError says what is wrong with it."""
    if not isinstance(data, dict):
        raise ValueError(f"an object with {', '.join(kinds)} is wanted, got {shown(data)}")
    if odd := [*(name for name in kinds if name not in data), *(name for name in data if name not in kinds)]:
        raise ValueError(f"missing or unknown: {', '.join(map(shown, odd))}")
    for name, kind in kinds.items():
        if not isinstance(data[name], kind):
            names = " or ".join(_JSON[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{name} must be {names}, got {shown(data[name])}")
    return data


_JSON = {dict: "an object", list: "a list", str: "a text", int: "a whole number", type(None): "null"}
