"""mflux's FLUX.1 pipelines without weights from the hub: the real classes, and small random layers in them.

``generate_image`` and every forward pass are mflux's own. Its transformer has 3072 features, so each large linear layer
is replaced by a pair of thin ones; prompts come from mflux's cache of encoded prompts, the VAE is a stub.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.controlnet.transformer_controlnet import TransformerControlnet
from mflux.models.flux.variants.depth.flux_depth import Flux1Depth
from mflux.models.flux.variants.fill.flux_fill import Flux1Fill
from mflux.models.flux.variants.in_context.flux_in_context_dev import Flux1InContextDev
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.redux.flux_redux import Flux1Redux
from mflux.models.flux.variants.txt2img.flux import Flux1
from mlx import nn
from mlx.utils import tree_map_with_path

CONFIGS = {
    Flux1: ModelConfig.dev,
    Flux1Controlnet: ModelConfig.dev_controlnet_canny,
    Flux1Depth: ModelConfig.dev_depth,
    Flux1Fill: ModelConfig.dev_fill,
    Flux1InContextDev: ModelConfig.dev,
    Flux1InContextFill: ModelConfig.dev_fill_catvton,
    Flux1Kontext: ModelConfig.dev_kontext,
    Flux1Redux: ModelConfig.dev,
}
RANK = 64  # of the thin layers; also the group size of a quantised one
PROMPT = "a red apple"


def thin(module: Any) -> Any:
    """The module, with random weights and a pair of thin layers in place of each large one."""

    def replaced(path: str, layer: Any) -> Any:
        if not isinstance(layer, nn.Linear):
            return layer
        n_out, n_in = layer.weight.shape
        if path.endswith(("linear1", "proj_mlp")):
            n_out = RANK  # the inner size of a feed-forward
        elif path.endswith("linear2"):
            n_in = RANK
        elif "single_transformer_blocks" in path and path.endswith("proj_out"):
            n_in = 3072 + RANK
        if n_in <= 256 or n_out <= 256:
            return nn.Linear(n_in, n_out)
        return nn.Sequential(nn.Linear(n_in, RANK, bias=False), nn.Linear(RANK, n_out))

    module.update_modules(tree_map_with_path(replaced, module.leaf_modules(), is_leaf=nn.Module.is_module))

    def weight(array: mx.array) -> mx.array:  # gain 1: the blocks are strong enough for a skip to be seen
        if array.ndim == 1:
            return mx.random.normal(array.shape) * 0.02
        return mx.random.normal(array.shape) / array.shape[1] ** 0.5

    for _, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.update({name: weight(array) for name, array in layer.parameters().items()})
    return module


def transformer(config: ModelConfig, joint: int = 1, single: int = 1, dtype: mx.Dtype = mx.bfloat16) -> Any:
    mx.random.seed(0)
    module = thin(Transformer(config, joint, single))
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    return module


def controlnet(config: ModelConfig, joint: int = 1, single: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Any:
    """Its output layers are random too; mflux starts them at zero."""
    mx.random.seed(1)
    module = thin(TransformerControlnet(config, joint, single))
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    return module


class Vae(nn.Module):
    """Averages and repeats pixels where a VAE has layers."""

    scaling_factor = 0.3611
    shift_factor = 0.1159

    def encode(self, image: mx.array) -> mx.array:
        height, width = image.shape[2] // 8, image.shape[3] // 8
        small = image.reshape(1, 3, height, 8, width, 8).mean(axis=(3, 5))
        return mx.tile(small, (1, 6, 1, 1))[:, :16]

    def decode(self, latents: mx.array) -> mx.array:
        return mx.repeat(mx.repeat(latents[:, :3] / 4, 8, axis=2), 8, axis=3)


class ImageEncoder(nn.Module):
    """Redux's, without layers: 8 tokens for a picture."""

    def __call__(self, image: mx.array) -> tuple[mx.array, None]:
        tokens = image.reshape(1, 3, 8, 48, 384).mean(axis=(1, 3))
        return mx.tile(tokens, (1, 1, 3)), None


class Recorder:
    """The latents after each step, and at the end."""

    def __init__(self) -> None:
        self.latents: list[mx.array] = []

    def call_before_loop(self, **_: Any) -> None:
        self.latents = []

    def call_in_loop(self, latents: mx.array, **_: Any) -> None:
        self.latents.append(latents)


def pipeline(kind: type, transformer: Any, config: ModelConfig | None = None, controlnet: Any = None) -> Any:
    """A pipeline of mflux's class ``kind``; its attribute ``recorder`` has the latents of the last generation."""
    flux: Any = kind.__new__(kind)
    nn.Module.__init__(flux)
    dtype = transformer.context_embedder.layers[0].weight.dtype
    mx.random.seed(2)
    encoded = mx.random.normal((1, 4, 4096)).astype(dtype), mx.random.normal((1, 768)).astype(dtype)
    flux.model_config = config or CONFIGS[kind]()
    flux.prompt_cache = {PROMPT: encoded}
    flux.tokenizers = {"t5": None, "clip": None}
    flux.t5_text_encoder = flux.clip_text_encoder = None
    flux.callbacks = CallbackRegistry()
    flux.tiling_config = flux.bits = flux.lora_paths = flux.lora_scales = None
    flux.vae = Vae()
    flux.transformer = transformer
    if kind is Flux1Controlnet:
        flux.transformer_controlnet = controlnet
    if kind is Flux1Depth:
        flux.depth_pro = None  # the depth map is given
    if kind is Flux1Redux:
        flux.image_encoder = ImageEncoder()
        flux.image_embedder = nn.Linear(1152, 4096)
        flux.image_embedder.set_dtype(dtype)
    flux.recorder = Recorder()
    flux.callbacks.register(flux.recorder)
    return flux


def arguments(kind: type, photo: Path, mask: Path) -> dict[str, Any]:
    """What ``generate_image`` of this class must be given."""
    return {
        Flux1: {},
        Flux1Controlnet: dict(controlnet_image_path=photo, controlnet_strength=0.7),
        Flux1Depth: dict(depth_image_path=photo),
        Flux1Fill: dict(image_path=photo, masked_image_path=mask),
        Flux1InContextDev: dict(image_path=photo),
        Flux1InContextFill: dict(left_image_path=photo, right_image_path=photo, masked_image_path=mask),
        Flux1Kontext: dict(image_path=photo),
        Flux1Redux: dict(redux_image_paths=[photo]),
    }[kind]


def generate(flux: Any, **kwargs: Any) -> tuple[np.ndarray, mx.array]:
    """The image as uint8, and the latents."""
    given = dict(seed=1, prompt=PROMPT, num_inference_steps=5, height=64, width=64) | kwargs
    image = np.asarray(flux.generate_image(**given).image)
    return image, flux.recorder.latents[-1] if flux.recorder.latents else mx.zeros(0)
