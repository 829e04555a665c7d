"""Reading how a picture was gated, and the policy of a picture or a file."""

import json
from pathlib import Path
from typing import Any

from .policy import Policy
from .record.metadata import Metadata
from .support import require_mflux


def read_metadata(path: str | Path) -> Metadata:
    """How a picture was made that mflux saved from a gated pipeline.

    Args:
        path: The picture, with the metadata that mflux put into it, or the ``.metadata.json`` that it wrote beside it.

    Raises:
        TeaCacheValueError: The file does not say, or not in a way that this version understands.
        OSError: It cannot be read.
        IncompatibleModelError: mflux cannot be imported, which reads a picture's metadata.
    """
    path = Path(path)
    if path.suffix == ".json":
        return Metadata.of(_json(path), str(path))
    require_mflux()
    from .mflux.pictures import exif

    return Metadata.of(exif(path), str(path))


def read_policy(path: str | Path) -> Policy:
    """Of a file that ``Policy.to_json`` or ``tune`` wrote, or of a gated picture; errors as there."""
    path = Path(path)
    is_picture = path.suffix != ".json" or path.name.endswith(".metadata.json")
    data = _json(path)
    if is_picture and not (isinstance(data, dict) and "format" in data):
        return read_metadata(path).policy
    return Policy.from_json(path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, or not even UTF-8
        return None
