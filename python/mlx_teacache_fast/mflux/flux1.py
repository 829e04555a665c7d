"""FLUX.1: mflux runs its steps eagerly, and its pipelines call the transformer themselves."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mflux.models.flux.variants.concept_attention.flux_concept import Flux1Concept
from mflux.models.flux.variants.concept_attention.flux_concept_from_image import Flux1ConceptFromImage
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.depth.flux_depth import Flux1Depth
from mflux.models.flux.variants.fill.flux_fill import Flux1Fill
from mflux.models.flux.variants.in_context.flux_in_context_dev import Flux1InContextDev
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.redux.flux_redux import Flux1Redux
from mflux.models.flux.variants.txt2img.flux import Flux1

from ..step.tap import Signal, Tap
from .family import Command, Family, Model, idle_joint, idle_single, tokens_of_size


def _signal(block: Any, *, hidden_states: mx.array, text_embeddings: mx.array, **_others: Any) -> Signal:
    modulation = block.norm1.linear(nn.silu(text_embeddings))  # type: ignore[attr-defined]  # as AdaLayerNormZero does
    shift, scale, *_gates = mx.split(modulation, 6, axis=1)
    return Signal(hidden_states, shift, scale, block.norm1.norm.eps)


_SPECIAL: dict[str, Any] = dict(fitted=False, text_to_image=False)
_DEV = "kontext fill redux depth controlnet-canny controlnet-upscaler fill-catvton"  # what is made from it

REFUSED: dict[type, str] = dict.fromkeys(
    (Flux1Concept, Flux1ConceptFromImage),
    "it returns attention maps beside the image, which a step whose blocks are skipped does not have",
)

FLUX1 = Family(
    commands={
        "mflux-generate": Command(pipeline=Flux1, repeats=True, leaves_out_steps=True),
        "mflux-generate-controlnet": Command(pipeline=Flux1Controlnet),
        "mflux-upscale-controlnet": Command(pipeline=Flux1Controlnet),
        "mflux-generate-depth": Command(pipeline=Flux1Depth),
        "mflux-generate-fill": Command(pipeline=Flux1Fill),
        # Its --config-from-metadata makes no picture again: mflux writes twice the width.
        "mflux-generate-in-context": Command(pipeline=Flux1InContextDev),
        "mflux-generate-in-context-catvton": Command(pipeline=Flux1InContextFill),
        "mflux-generate-in-context-edit": Command(pipeline=Flux1InContextFill),
        "mflux-generate-kontext": Command(pipeline=Flux1Kontext, repeats=True),
        "mflux-generate-redux": Command(pipeline=Flux1Redux, repeats=True),
    },
    models={
        "dev": Model(variant="flux1-dev"),
        "schnell": Model(variant="flux1-schnell"),
        "krea-dev": Model(variant="flux1-krea-dev"),
        **{f"dev-{name}": Model(variant="flux1-dev", **_SPECIAL) for name in _DEV.split()},
        "schnell-controlnet-canny": Model(variant="flux1-schnell", **_SPECIAL),
    },
    tap=Tap(
        signal=_signal,
        n_tokens=tokens_of_size,
        idle={"transformer_blocks": idle_joint, "single_transformer_blocks": idle_single},
    ),
)
