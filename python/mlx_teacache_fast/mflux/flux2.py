"""FLUX.2: mflux compiles its steps, but on some Macs and with a key-value cache."""

from typing import Any

import mlx.core as mx
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

from ..step.captured import Arguments
from ..step.tap import Signal, Tap
from .family import Command, Family, Model, idle_joint, idle_single


def _signal(block: Any, *, hidden_states: mx.array, temb_mod_params_img: Any, **_others: Any) -> Signal:
    shift, scale, _gate = temb_mod_params_img[0]
    return Signal(hidden_states, shift, scale, block.norm1.eps)


def _extracts(arguments: Arguments) -> bool:
    """Whether the step makes the keys and values of reference images, whose tokens later steps do not see."""
    cache = arguments.get("kv_cache")
    return cache is not None and cache.is_extracting


FLUX2 = Family(
    commands={
        "mflux-generate-flux2": Command(pipeline=Flux2Klein, repeats=True, leaves_out_steps=True),
        "mflux-generate-flux2-edit": Command(pipeline=Flux2KleinEdit, repeats=True),
    },
    models={
        "flux2-klein-4b": Model(variant="flux2-klein-4b"),
        "flux2-klein-9b": Model(variant="flux2-klein-9b"),
        "flux2-klein-9b-kv": Model(variant="flux2-klein-9b", fitted=False),
        "flux2-klein-base-4b": Model(variant="flux2-klein-base-4b"),
        "flux2-klein-base-9b": Model(variant="flux2-klein-base-9b"),
    },
    tap=Tap(
        signal=_signal,
        n_tokens=lambda arguments: int(arguments["latents"].shape[1]),
        idle={"transformer_blocks": idle_joint, "single_transformer_blocks": idle_single},
        makes_cache=_extracts,
    ),
    factories=("_predict", "_cached_predict"),
)
