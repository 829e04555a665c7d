"""How a gated picture was made, as its metadata say."""

from dataclasses import dataclass, field
from importlib.metadata import version
from types import NoneType
from typing import Any, Self

import mlx.core as mx

from ..errors import TeaCacheValueError, one_line
from ..files import members
from ..policy import Policy, Steps, as_text
from .stats import GenerationStats

KEY = "mlx_teacache_fast"  # in mflux's metadata, which is JSON in a picture's EXIF and in .metadata.json files


@dataclass(frozen=True, slots=True)
class Metadata:
    """How a gated picture was made.

    Attributes:
        policy: ``apply(flux, policy)`` decides in the same way. Its ``corrector`` is the share that was used.
        steps: What was decided, 1 for each active step that was computed and 0 for each skipped one:
            ``apply(flux, steps=steps)``, with the policy's ``forecast``, ``cache`` and ``corrector``, repeats it, also
            where another machine's rounding would decide differently.
        variant_id: The model that it was taken for.
        pipeline: mflux's class.
        versions: Of this package, MLX and mflux, by their names.
        mflux: What mflux says of the picture: prompt, seed, steps, guidance, ... ; and the scheduler, of which it says
            nothing in FLUX.1's pictures.
    """

    policy: Policy
    steps: str
    variant_id: str
    pipeline: str
    versions: dict[str, str]
    mflux: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        rows = {"pipeline": self.pipeline, "variant": self.variant_id}
        rows |= {"steps": self.steps, "skipped": f"{self.steps.count('0')} of {len(self.steps)}"}
        rows |= {n: str(v) for n, v in self.policy.flat.items() if n not in ("steps", "mode", "save_metadata")}
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        said_above = {"steps", "mflux_version"}
        rows |= {one_line(n): str(v) for n, v in self.mflux.items() if v is not None and n not in said_above}
        width = max(map(len, rows)) + 2
        return "\n".join(f"{name.ljust(width)}{one_line(value)}" for name, value in rows.items())

    @classmethod
    def of(cls, data: Any, where: str) -> Self:
        """From mflux's metadata of a picture, which errors name.

        Raises:
            TeaCacheValueError: They do not say, or not in a way that this version understands.
        """
        said = data.get(KEY) if isinstance(data, dict) else None
        if said is None:
            raise TeaCacheValueError(f"{where} does not say that it was made with gating: it has no {KEY!r} metadata")
        try:
            texts = dict.fromkeys(("steps", "variant_id", "pipeline"), str)
            members(said, policy=dict, versions=dict, scheduler=(str, NoneType), **texts)
            return cls(
                policy=Policy.of(**said["policy"]),
                steps=Steps(steps=said["steps"]).steps if said["steps"] else "",
                variant_id=said["variant_id"],
                pipeline=said["pipeline"],
                versions={name: str(v) for name, v in said["versions"].items()}
                | {"mflux": str(data.get("mflux_version"))},
                mflux={"scheduler": said["scheduler"]} | {name: v for name, v in data.items() if name != KEY},
            )
        except ValueError as error:
            raise TeaCacheValueError(f"{where} has {KEY!r} metadata that cannot be understood: {error}") from error


def record(policy: Policy, generation: GenerationStats, **more: Any) -> dict[str, Any]:
    """What ``Metadata.of`` reads; ``more`` are ``variant_id``, ``pipeline`` and ``scheduler``."""
    return more | {
        "policy": policy.flat,
        "steps": as_text(step.kind != "skipped" for step in generation.steps),
        "versions": {KEY: version("mlx-teacache-fast"), "mlx": mx.__version__},  # type: ignore[attr-defined]
    }


def add_to(image: Any, said: dict[str, Any]) -> None:
    """Have mflux write this whenever it saves ``image`` (a ``GeneratedImage``)."""
    if isinstance(parameters := getattr(image, "generation_parameters", None), dict):
        parameters[KEY] = said
    elif hasattr(image, "_get_metadata"):  # mflux 0.20; anything else is not mflux's picture
        own = image._get_metadata
        image._get_metadata = lambda: own() | {KEY: said}
