"""Every pipeline of the table of families, small and without weights from the hub, by mflux's ``generate_image``.

FLUX.1's have one block of each kind and random weights, FLUX.2's the embedded model. A ``Case`` makes one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flux1_pipelines as flux1
import mlx.core as mx
import numpy as np
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mflux.utils.apple_silicon import AppleSiliconUtil
from mlx.nn.layers.base import Module

import mlx_teacache_fast as tc
from mlx_teacache_fast import demo

# Nothing is skipped: a threshold below which nothing stays, and one of 0.
NEVER: dict[str, Any] = dict(rel_l1_thresh=1e-9, coefficients=(0, 0, 0, 1, 0))
ALWAYS: dict[str, Any] = dict(rel_l1_thresh=0.5, coefficients=(0, 0, 0, 0, 0))  # the distance stays 0: gated steps skip
SKIPS = ["forced", "computed", "skipped", "skipped", "forced"]  # of ALWAYS in 5 steps


class TinyEdit(Flux2KleinEdit):
    """The embedded model's parts in mflux's edit pipeline: generate_image, _predict and _cached_predict are mflux's."""

    def _encode_prompt_pair(self, *, prompt: str, negative_prompt: str | None, guidance: float) -> Any:
        pair = (*self.text_encoder(prompt), None, None)
        return pair if guidance <= 1.0 else (*pair[:2], *self.text_encoder(negative_prompt))


def edit_pipeline(dtype: mx.Dtype = mx.float32) -> TinyEdit:
    tiny = demo.pipeline(dtype)
    edit = TinyEdit.__new__(TinyEdit)
    Module.__init__(edit)
    for name in ("callbacks", "tiling_config", "tokenizers", "bits", "lora_paths", "lora_scales"):
        setattr(edit, name, getattr(tiny, name))
    for name in ("compute_precision", "text_encoder", "vae", "transformer"):
        if hasattr(tiny, name):  # compute_precision: from mflux 0.22 on
            setattr(edit, name, getattr(tiny, name))
    edit.model_config = ModelConfig.flux2_klein_base_4b()
    return edit


@dataclass(frozen=True)
class Case:
    """A pipeline class, and whether mflux compiles its step here."""

    kind: type
    how: str = ""  # "uncompiled", as on some Macs; "cache": with keys and values of the reference images kept

    def __str__(self) -> str:
        return "-".join(filter(None, (self.kind.__name__, self.how)))

    @property
    def is_flux2(self) -> bool:
        return self.kind in (Flux2Klein, Flux2KleinEdit)

    @contextmanager
    def pipeline(self, dtype: mx.Dtype = mx.float32) -> Iterator[Any]:
        """With a ``recorder`` of the latents."""
        if not self.is_flux2:
            config = flux1.CONFIGS[self.kind]()
            controlnet = flux1.controlnet(config, dtype=dtype) if self.kind is Flux1Controlnet else None
            yield flux1.pipeline(self.kind, flux1.transformer(config, dtype=dtype), config, controlnet)
            return
        flux: Any = demo.pipeline(dtype) if self.kind is Flux2Klein else edit_pipeline(dtype)
        if self.how == "cache":
            flux.model_config = ModelConfig.flux2_klein_9b_kv()
        flux.recorder = flux1.Recorder()
        flux.callbacks.register(flux.recorder)
        before = AppleSiliconUtil.is_m1_or_m2
        try:
            if self.how == "uncompiled":
                AppleSiliconUtil.is_m1_or_m2 = staticmethod(lambda: True)
            yield flux
        finally:
            AppleSiliconUtil.is_m1_or_m2 = before

    def arguments(self, photo: Path, mask: Path) -> dict[str, Any]:
        """What ``generate_image`` is given in tests."""
        given: dict[str, Any] = dict(seed=1, num_inference_steps=5, height=64, width=64)
        if not self.is_flux2:
            return given | dict(prompt=flux1.PROMPT) | flux1.arguments(self.kind, photo, mask)
        return given | dict(prompt="red apple") | (dict(image_paths=[photo]) if self.kind is Flux2KleinEdit else {})


EDIT_CASES = [Case(Flux2KleinEdit, how) for how in ("", "uncompiled", "cache")]
CASES = [*map(Case, flux1.CONFIGS), Case(Flux2Klein), Case(Flux2Klein, "uncompiled"), *EDIT_CASES]
# One of each way in which a step is run.
FEW = [Case(Flux1), Case(Flux2Klein), Case(Flux2Klein, "uncompiled"), Case(Flux2KleinEdit, "cache")]
FEW_BY_DEFAULT = [pytest.param(case, marks=[] if case in FEW else [pytest.mark.slow]) for case in CASES]


def image_of(flux: Any, given: dict[str, Any]) -> np.ndarray:
    return np.asarray(flux.generate_image(**given).image)


def run(flux: Any, given: dict[str, Any]) -> tuple[np.ndarray, list[mx.array]]:
    """The image, and the latents after each step."""
    image = image_of(flux, given)
    return image, flux.recorder.latents


def same(a: tuple[np.ndarray, list[mx.array]], b: tuple[np.ndarray, list[mx.array]], steps: int | None = None) -> bool:
    """Whether all bits of the latents are equal, after so many first steps or all of them, and those of the image."""
    if len(a[1]) != len(b[1]) or not (steps or np.array_equal(a[0], b[0])):
        return False
    return all(mx.array_equal(x, y).item() for x, y in list(zip(a[1], b[1], strict=True))[:steps])


def kinds(handle: tc.Handle) -> list[str]:
    generation = handle.stats.last_generation
    assert generation is not None
    return [step.kind for step in generation.steps]
