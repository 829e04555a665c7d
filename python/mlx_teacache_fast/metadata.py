"""How a gated picture was made, in the picture's own metadata; and reading it again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import arguments
from .errors import TeaCacheValueError
from .stats import GenerationStats

if TYPE_CHECKING:
    from .handle import Handle

KEY = "mlx_teacache_fast"  # in mflux's metadata, which is JSON in a picture's EXIF and in .metadata.json files


@dataclass(frozen=True, slots=True)
class Metadata:
    """How a gated picture was made.

    Attributes:
        settings: Arguments of ``apply``: ``apply(flux, **settings)`` decides in the same way.
        steps: What was decided, 1 for each active step that was computed and 0 for each skipped one:
            ``apply(flux, steps=steps)``, with the settings' ``forecast`` and ``cache``, repeats just that, also where
            another machine's rounding would decide differently.
        variant_id: The model whose coefficients were in use.
        pipeline: mflux's class.
        versions: Of this package, MLX and mflux, by their names.
        mflux: What mflux says of the picture: prompt, seed, steps, guidance, ... ; and the scheduler, of which it says
            nothing in FLUX.1's pictures.
    """

    settings: dict[str, Any]
    steps: str
    variant_id: str
    pipeline: str
    versions: dict[str, str]
    mflux: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        rows = {"pipeline": self.pipeline, "variant": self.variant_id}
        rows |= {"steps": self.steps, "skipped": f"{self.steps.count('0')} of {len(self.steps)}"}
        rows |= {name: str(value) for name, value in self.settings.items() if name != "steps"}
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        said_above = {"steps", "mflux_version"}
        rows |= {n: str(v) for n, v in self.mflux.items() if v is not None and n not in said_above}
        width = max(map(len, rows)) + 2
        return "\n".join(f"{name.ljust(width)}{' '.join(value.split())}" for name, value in rows.items())


def add_to(image: Any, handle: "Handle", generation: GenerationStats, *, pipeline: str, scheduler: str | None) -> None:
    """Have mflux write, whenever it saves ``image`` (a ``GeneratedImage``), how it was gated."""
    from . import __version__

    record = {
        "variant_id": handle.variant_id,
        "pipeline": pipeline,
        "scheduler": scheduler,
        "settings": handle.settings,
        "steps": arguments.plan_text(tuple(step.kind != "skipped" for step in generation.steps)),
        "versions": {KEY: __version__, "mlx": mx.__version__},  # type: ignore[attr-defined]
    }
    if isinstance(parameters := getattr(image, "generation_parameters", None), dict):
        parameters[KEY] = record
    elif hasattr(image, "_get_metadata"):  # mflux 0.20; anything else is not mflux's picture
        own = image._get_metadata
        image._get_metadata = lambda: own() | {KEY: record}


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
    data = _json(path) if path.suffix == ".json" else _exif(path)
    record = data.get(KEY) if isinstance(data, dict) else None
    if record is None:
        raise TeaCacheValueError(f"{path} does not say that it was made with gating: it has no {KEY!r} metadata")
    try:
        own = {name: value for name, value in data.items() if name != KEY}
        versions = {str(name): str(version) for name, version in record["versions"].items()}
        return Metadata(
            settings=_settings(record["settings"]),
            steps=arguments.plan_text(arguments.plan(record["steps"])) if record["steps"] else "",
            variant_id=str(record["variant_id"]),
            pipeline=str(record["pipeline"]),
            versions=versions | {"mflux": str(data.get("mflux_version"))},
            mflux={"scheduler": record["scheduler"]} | own,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeaCacheValueError(f"{path} has {KEY!r} metadata that cannot be understood: {error!r}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, or not even UTF-8
        return None


def _exif(path: Path) -> Any:
    from .support import require_mflux

    require_mflux()
    from mflux.utils.metadata_reader import MetadataReader

    with path.open("rb"):  # mflux says of a missing file only that it has no metadata
        pass
    try:
        return MetadataReader.read_exif_metadata(path)
    except Exception:  # of other programs' metadata: struct.error, RecursionError, ...
        return None


def _settings(record: Any) -> dict[str, Any]:
    if unknown := set(record) - set(arguments.SETTINGS):
        raise ValueError(f"{', '.join(sorted(unknown))}: no argument of apply()")
    record = arguments.BEFORE_FORECASTS | record
    return {name: arguments.SETTINGS[name](value) for name, value in record.items()}
