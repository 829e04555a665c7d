"""Reading how a picture was gated, and the policy of a picture or a file."""

import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import IncompatibleModelError, TeaCacheValueError, how_to_install
from .files import LARGEST_PICTURE, as_path, check_readable, parse, read_json
from .policy import Policy
from .record.metadata import Metadata

_EXIF, _COMMENT = 0x8769, 0x9286  # tags; mflux writes JSON as the user's comment


def read_metadata(path: str | Path) -> Metadata:
    """How a picture was made that mflux saved from a gated pipeline.

    Args:
        path: The picture, a PNG, JPEG or WebP with the metadata that mflux put into it, or the ``.metadata.json`` that
            it wrote beside it.

    Raises:
        TeaCacheValueError: The file does not say, or not in a way that this version understands.
        OSError: It cannot be read.
        IncompatibleModelError: Pillow is missing, which mflux needs too.
    """
    path = as_path("path", path)
    is_json = path.suffix.lower() == ".json"
    return Metadata.of(read_json(path, ".metadata.json") if is_json else _comment(path), str(path))


def read_policy(path: str | Path) -> Policy:
    """Of a file that ``Policy.to_json`` or ``tune`` wrote, or of a gated picture; errors as there."""
    path = as_path("policy", path)
    check_readable(path, LARGEST_PICTURE)
    if path.suffix.lower() != ".json":
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return read_metadata(path).policy
    elif path.name.lower().endswith(".metadata.json"):
        data = read_json(path, ".metadata.json")
        if not (isinstance(data, dict) and "format" in data):
            return Metadata.of(data, str(path)).policy
    return Policy.from_json(path)


def _comment(path: Path) -> Any:
    """What mflux wrote into a picture; None if it wrote nothing."""
    check_readable(path, LARGEST_PICTURE)
    try:
        from PIL import Image
    except ImportError as error:
        raise IncompatibleModelError(
            f"a picture is read with Pillow, which mflux needs too ({error}): {how_to_install('mflux')}"
        ) from error
    with path.open("rb") as stream, warnings.catch_warnings(action="ignore"):
        try:
            exif = Image.open(stream, formats=("PNG", "JPEG", "WEBP")).info.get("exif", b"").removeprefix(b"Exif\0\0")
        except Exception as error:
            raise TeaCacheValueError(f"{path} is no PNG, JPEG or WebP picture, or a damaged one") from error
    text = b""
    with suppress(KeyError, struct.error):  # damaged, or without the tag
        text = _user_comment(exif).removeprefix(b"ASCII\0\0\0")
    if not text.startswith(b"{"):
        return None  # another program's
    try:
        return parse(text)
    except ValueError as error:
        raise TeaCacheValueError(f"{path} has metadata that cannot be understood: {error}") from error


def _user_comment(exif: bytes) -> bytes:
    """Of TIFF's directories, in which an entry may claim any number of values: no other is looked at."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    size, at = 0, struct.unpack_from(f"{order}I", exif, 4)[0]
    for tag in (_EXIF, _COMMENT):
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        entries = [struct.unpack_from(f"{order}HHII", exif, at + 2 + 12 * i) for i in range(count)]
        size, at = {found: where for found, _, *where in entries}[tag]
    return exif[at : at + size]
