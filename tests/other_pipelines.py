"""mflux's pipelines but FLUX.1's and FLUX.2's, small: its own classes and ``generate_image``, random weights.

Encoders and VAE are stand-ins. ``PIPELINES`` has for each class what makes one and what ``generate_image`` is given.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import flux1_pipelines as flux1
import mlx.core as mx
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.ernie_image.model.ernie_transformer.transformer import ErnieTransformer
from mflux.models.ernie_image.variants.txt2img.ernie_image import ErnieImage
from mflux.models.fibo.model.fibo_transformer.transformer import FiboTransformer
from mflux.models.fibo.variants.edit import fibo_edit
from mflux.models.fibo.variants.txt2img import fibo
from mflux.models.ideogram4.model.ideogram4_transformer.config import Ideogram4Config
from mflux.models.ideogram4.model.ideogram4_transformer.transformer import Ideogram4Transformer
from mflux.models.ideogram4.variants.txt2img import ideogram4
from mflux.models.krea2.model.krea2_transformer.transformer import Krea2Transformer
from mflux.models.krea2.variants.txt2img.krea2 import Krea2
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
from mflux.models.qwen.variants.edit import qwen_image_edit
from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage
from mflux.models.qwen21.model.qwen21_transformer.qwen21_transformer import Qwen21Transformer
from mflux.models.qwen21.variants.txt2img.qwen_image_21 import QwenImage21
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mflux.models.z_image.variants.z_image import ZImage
from mflux.utils.apple_silicon import AppleSiliconUtil
from mlx import nn
from mlx.utils import tree_map_with_path

from mlx_teacache_fast.mflux.others import mflux_class

# What not every mflux has: None where it is not there.
Anima = mflux_class("anima.variants.txt2img.anima:Anima")
AnimaTransformer = mflux_class("anima.model.anima_transformer.anima_transformer:AnimaTransformer")
ComputePrecision = mflux_class("common.compute_precision:ComputePrecision")
Fibo2 = mflux_class("fibo2.variants.txt2img.fibo2:Fibo2")
Fibo2LatentCreator = mflux_class("fibo2.latent_creator.fibo2_latent_creator:Fibo2LatentCreator")
Fibo2Transformer = mflux_class("fibo2.model.fibo2_transformer.fibo2_transformer:Fibo2Transformer")
Flux3Klein = mflux_class("flux3.variants.txt2img.flux3_klein:Flux3Klein")
Flux3KleinEdit = mflux_class("flux3.variants.edit.flux3_klein_edit:Flux3KleinEdit")
Flux3Transformer = mflux_class("flux3.model.flux3_transformer.flux3_transformer:Flux3Transformer")
Iris = mflux_class("iris.variants.txt2img.iris:Iris")
IrisTransformer = mflux_class("iris.model.iris_transformer.iris_transformer:IrisTransformer")
Krea2Controlnet = mflux_class("krea2.variants.controlnet.krea2_controlnet:Krea2Controlnet")
Krea2ControlnetUtil = mflux_class("krea2.variants.controlnet.krea2_controlnet_util:Krea2ControlnetUtil")
MOSSImage = mflux_class("moss_image.variants.txt2img.moss_image:MOSSImage")
MOSSImageTransformer = mflux_class(
    "moss_image.model.moss_image_transformer.moss_image_transformer:MOSSImageTransformer"
)
QwenImage21Edit = mflux_class("qwen21.variants.edit.qwen_image_21_edit:QwenImage21Edit")
QwenImage21Controlnet = mflux_class("qwen21.variants.controlnet.qwen_image_21_controlnet:QwenImage21Controlnet")
QwenImage21Transformer = mflux_class("qwen21.model.qwen21_transformer.qwen_image21_transformer:QwenImage21Transformer")
QwenImage21ControlNet = mflux_class(
    "qwen21.variants.controlnet.qwen_image21_controlnet_transformer:QwenImage21ControlNet"
)
mflux_class("krea2.model.krea2_scheduler:Krea2Scheduler")  # registers it

PROMPT, NEGATIVE = "a red apple", "blurred"


def _randomised(module: Any, dtype: mx.Dtype) -> Any:
    mx.random.seed(0)

    def weight(path: str, a: mx.array) -> mx.array:
        if not mx.issubdtype(a.dtype, mx.floating):
            return a
        if "norm" in path and a.ndim == 1 and path.endswith("weight"):
            return 1 + 0.1 * mx.random.normal(a.shape)
        return mx.random.normal(a.shape) * (0.1 if a.ndim == 1 else a.shape[-1] ** -0.5)

    module.update(tree_map_with_path(weight, module.parameters()))
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    return module


class _Vae(nn.Module):
    def decode(self, latents: mx.array) -> mx.array:
        while latents.ndim > 4:
            latents = latents[:, :, 0]
        return mx.repeat(mx.repeat(latents[:, :3] / 4, 8, axis=2), 8, axis=3)

    def decode_packed_latents(self, latents: mx.array, **_: Any) -> mx.array:
        return self.decode(latents)


def _pipeline(kind: type, transformer: Any, config: ModelConfig, **more: Any) -> Any:
    """With what all classes want, and ``more``, which is set past nn.Module."""
    flux: Any = kind.__new__(kind)
    nn.Module.__init__(flux)
    flux.model_config, flux.callbacks, flux.vae = config, CallbackRegistry(), _Vae()
    flux.tiling_config = flux.bits = flux.lora_paths = flux.lora_scales = flux.text_encoder = None
    flux.prompt_cache, flux.tokenizers, flux.float32, flux.bake_lora = {}, {}, False, False
    flux.transformer = transformer
    more = {"compute_precision": ComputePrecision and ComputePrecision(None), "small_text_encoder": False} | more
    for name, value in more.items():
        object.__setattr__(flux, name, value)
    flux.recorder = flux1.Recorder()
    flux.callbacks.register(flux.recorder)
    return flux


def _normal(dtype: mx.Dtype, *shape: int, seed: int = 3) -> mx.array:
    made = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(made)  # another thread could not
    return made


def _pair(dtype: mx.Dtype, width: int) -> tuple[mx.array, mx.array]:
    """Embeddings of 20 tokens, of the prompt and of the negative one."""
    return _normal(dtype, 1, 20, width, seed=3), _normal(dtype, 1, 20, width, seed=4)


def _picture(latents: mx.array) -> mx.array:
    """Of one colour."""
    return mx.broadcast_to(latents.flatten()[:3].reshape(1, 3, 1, 1) / 4, (1, 3, 64, 64))


Made = Iterator[Any]


def _z_image(dtype: mx.Dtype) -> Made:
    sizes = dict(dim=96, n_heads=3, n_layers=4, n_refiner_layers=2, cap_feat_dim=64, axes_dims=[8, 12, 12])
    positive, negative = (e[0] for e in _pair(dtype, 64))
    yield _pipeline(
        ZImage,
        _randomised(ZImageTransformer(**sizes), dtype),
        ModelConfig.z_image(),
        _encode_prompts=lambda *, guidance, **_: (positive, negative if guidance > 1 else None),
    )


_QWEN = dict(num_layers=3, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64)
_MASK = mx.ones((1, 20), dtype=mx.int32)


def _qwen(dtype: mx.Dtype) -> Made:
    flux = _pipeline(QwenImage, _randomised(QwenTransformer(**_QWEN), dtype), ModelConfig.qwen_image())
    positive, negative = _pair(dtype, 64)
    flux.prompt_cache = {f"{PROMPT}|NEG| ": (positive, _MASK, negative, _MASK)}
    flux.tokenizers = {"qwen": None}
    yield flux


def _qwen_edit(dtype: mx.Dtype) -> Made:
    kind, util = qwen_image_edit.QwenImageEdit, qwen_image_edit.QwenEditUtil
    is_2511 = hasattr(ModelConfig, "qwen_image_edit_2511")  # not in every mflux
    config = ModelConfig.qwen_image_edit_2511() if is_2511 else ModelConfig.qwen_image_edit()
    positive, negative = _pair(dtype, 64)

    def sizes(*, num_inference_steps: int, guidance: float, **_: Any) -> tuple[Any, ...]:
        made = Config(config, num_inference_steps, 64, 64, guidance, scheduler="linear")
        return made, 0, 0, 64, 64

    flux = _pipeline(
        kind,
        _randomised(QwenTransformer(**_QWEN, **(dict(zero_cond_t=True) if is_2511 else {})), dtype),
        config,
        _encode_prompts_with_images=lambda **_: (positive, _MASK, negative, _MASK),
        _compute_dimensions=sizes,
    )
    reference = _normal(dtype, 1, 16, 64, seed=6), None, 4, 4, 1
    with patch.object(util, "create_image_conditioning_latents", staticmethod(lambda **_: reference)):
        yield flux


_FLUX3 = dict(num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64)


def _flux3(kind: type, dtype: mx.Dtype) -> Made:
    transformer = Flux3Transformer(**_FLUX3, axes_dims_rope=(8, 8, 8, 8), flow_map=False)
    flux = _pipeline(
        kind,
        _randomised(transformer, dtype),
        ModelConfig.flux3_image_klein_base(),
        _noise_override=None,
        _decode_latents=lambda latents, *_: _picture(latents),
        encode_references=lambda _: (_normal(dtype, 1, 16, 128, seed=6), mx.zeros((16, 4))),
    )
    ids = mx.zeros((20, 4))
    flux.prompt_cache = {p: (e, ids) for p, e in zip((PROMPT, ""), _pair(dtype, 64), strict=True)}
    yield flux


def _anima(dtype: mx.Dtype) -> Made:
    with patch(f"{AnimaTransformer.__module__}.AnimaLLMAdapter", lambda **_: nn.Identity()):
        sizes = dict(dim=96, num_blocks=3, num_heads=3, context_dim=32, adaln_lora_dim=16)
        transformer = _randomised(AnimaTransformer(**sizes), dtype)
    flux = _pipeline(Anima, transformer, ModelConfig.anima_base())
    flux.prompt_cache = dict(zip((PROMPT, ""), _pair(dtype, 32), strict=True))
    yield flux


def _moss(dtype: mx.Dtype) -> Made:
    sizes = dict(dim=96, ffn_dim=128, num_heads=3, num_layers=4, text_dim=64)
    flux = _pipeline(MOSSImage, _randomised(MOSSImageTransformer(**sizes), dtype), ModelConfig.moss_image_sft())
    flux.prompt_cache = dict(zip((PROMPT, ""), _pair(dtype, 64), strict=True))
    yield flux


_KREA2 = dict(features=128, heads=4, kvheads=2, layers=3, txtdim=32, txtlayers=2, txtheads=2, txtkvheads=2)


def _krea2(dtype: mx.Dtype) -> Made:
    positive, negative = _pair(dtype, 64)
    yield _pipeline(
        Krea2,
        _randomised(Krea2Transformer(**_KREA2), dtype),
        ModelConfig.krea2_raw(),
        _encode_prompts=lambda *, guidance, **_: (positive, negative if guidance != 1 else None),
    )


def _krea2_controlnet(dtype: mx.Dtype) -> Made:
    transformer = Krea2Transformer(**_KREA2)
    transformer.control_first = nn.Linear(64, 128, bias=False)
    flux = _pipeline(
        Krea2Controlnet,
        _randomised(transformer, dtype),
        ModelConfig.krea2_controlnet_depth(),
        controlnet_strength=1.0,
        _depth_image=lambda *_: None,
    )
    positive, negative = _pair(dtype, 64)
    flux.tokenizers = {"qwen3vl": None}
    flux.prompt_cache = {(PROMPT, None, g): (positive, negative if g != 1 else None) for g in (1.0, 4.0)}

    def encoded(*, height: int, width: int, **_: Any) -> tuple[mx.array, None]:
        return _normal(dtype, 1, 16, height // 8, width // 8), None

    with patch.object(Krea2ControlnetUtil, "encode_depth_control", staticmethod(encoded)):
        yield flux


def _ernie(dtype: mx.Dtype) -> Made:
    sizes = dict(hidden_size=96, num_attention_heads=3, num_layers=3, ffn_hidden_size=128, text_in_dim=64)
    text = mx.concatenate(_pair(dtype, 64)[::-1])
    yield _pipeline(
        ErnieImage,
        _randomised(ErnieTransformer(**sizes, rope_axes_dim=[8, 12, 12]), dtype),
        ModelConfig.ernie_image(),
        _encode_prompts=lambda *, guidance, **_: (
            (text, mx.array([20, 20])) if guidance > 1 else (text[1:], mx.array([20]))
        ),
        _decode_latents=lambda latents, **_: _picture(latents),
    )


def _ideogram4(dtype: mx.Dtype) -> Made:
    sizes = dict(emb_dim=64, num_layers=3, num_heads=2, intermediate_size=96, adanln_dim=32, in_channels=16)
    config = Ideogram4Config(**sizes, llm_features_dim=48, mrope_section=(6, 5, 5))
    flux = _pipeline(
        ideogram4.Ideogram4,
        None,
        ModelConfig.ideogram4_fp8(),
        _decode_latents=lambda z, **_: _picture(z),
    )
    for name in ("conditional_transformer", "unconditional_transformer"):
        transformer = _randomised(Ideogram4Transformer(config), dtype)
        for _, layer in transformer.named_modules():
            if type(layer).__name__ == "Fp8Linear":
                layer.weight = mx.to_fp8(mx.random.normal(layer.weight.shape) / layer.weight.shape[1] ** 0.5)
                layer.weight_scale = mx.ones(layer.weight.shape[0])
        mx.eval(transformer.parameters())
        setattr(flux, name, transformer)
    flux.tokenizers = {"ideogram4": None}
    n_text, n = 6, 16
    inputs = dict(
        position_ids=mx.tile(mx.arange(n_text + n)[None, :, None], (1, 1, 3)),
        segment_ids=mx.ones((1, n_text + n), dtype=mx.int32),
        indicator=mx.array([[3] * n_text + [2] * n]),
        max_text_tokens=n_text,
        num_image_tokens=n,
    )
    encoder = SimpleNamespace(
        resolve_prompt=lambda prompt, **_: prompt,
        build_inputs=lambda *_, **__: inputs,
        encode_prompt=lambda **_: _normal(dtype, 1, n_text + n, 48),
        negative_inputs=ideogram4.Ideogram4PromptEncoder.negative_inputs,
    )
    with (
        patch.object(ideogram4, "Ideogram4PromptEncoder", encoder),
        patch.object(ideogram4.Ideogram4LatentCreator, "validate_dimensions", staticmethod(lambda **_: None)),
    ):
        yield flux


_IRIS = dict(hidden_size=64, depth=4, dual_depth=2, num_heads=2, num_kv_heads=1, text_len=20, text_dim=32)
_IRIS |= dict(text_num_layers=2, text_layer_num_heads=2, pixel_depth=1, pixel_hidden_size=16, pixel_num_heads=2)


def _iris(dtype: mx.Dtype) -> Made:
    transformer = _randomised(IrisTransformer(**_IRIS, pixel_attn_hidden_size=64), dtype)
    texts = [(_normal(dtype, 1, 20, 2, 32, seed=seed), mx.ones((1, 20))) for seed in (3, 4)]
    yield _pipeline(Iris, transformer, ModelConfig.iris_3b_base(), _encode_prompt=lambda p: texts[p != PROMPT])


def _fibo2(dtype: mx.Dtype) -> Made:
    sizes = dict(in_channels=32, dim=192, n_layers=3, n_refiner_layers=1, n_heads=3, cap_feat_dim=32)
    sizes |= dict(injection_layer_ids=(1,), perceiver_num_layers=1, max_num_gist_tokens=32)
    transformer = Fibo2Transformer(**sizes, axes_dims=(16, 24, 24), axes_lens=(512, 64, 64))
    transformer.perceiver.min_gist = transformer.perceiver.gist_step = 16
    early, late, negative = (_normal(dtype, 1, 2, 20, 32, seed=seed) for seed in (3, 5, 4))
    flux = _pipeline(
        Fibo2,
        _randomised(transformer, dtype),
        ModelConfig.fibo2(),
        _encode_prompts=lambda *_: (late, early),
        _encode_prompt=lambda *_: negative,
    )
    decode = staticmethod(lambda _, latents, **__: _picture(latents))
    with patch.object(Fibo2LatentCreator, "decode", decode):
        yield flux


def _fibo(module: Any, kind: type, config: ModelConfig, dtype: mx.Dtype) -> Made:
    mx.random.seed(0)
    transformer = flux1.thin(FiboTransformer(num_layers=1, num_single_layers=1))
    transformer.set_dtype(dtype)
    mx.eval(transformer.parameters())
    flux = _pipeline(kind, transformer, config)
    flux.tokenizers = {"fibo": None}
    text, layers = _normal(dtype, 2, 8, 4096), [_normal(dtype, 2, 8, 2048, seed=5) for _ in range(2)]

    def encoded(*, guidance: float, **_: Any) -> tuple[Any, ...]:
        n = 2 if guidance != 1 else 1
        return "{}", text[:n], [layer[:n] for layer in layers]

    with ExitStack() as patches:
        patches.enter_context(patch.object(module.PromptEncoder, "encode_prompt", staticmethod(encoded)))
        if kind is fibo_edit.FIBOEdit:
            image = _normal(dtype, 1, 16, 48, seed=6)
            util = fibo_edit.FiboEditUtil
            for name, made in dict(
                ensure_edit_instruction=lambda p: p,
                load_edit_image=lambda **_: None,
                encode_conditioning_image=lambda **_: image,
            ).items():
                patches.enter_context(patch.object(util, name, staticmethod(made)))
        yield flux


_QWEN21 = dict(num_layers=3, attention_head_dim=128, num_attention_heads=1, context_in_dim=32, mlp_ratio=2)


def _qwen21(dtype: mx.Dtype) -> Made:
    flux = _pipeline(QwenImage21, _randomised(Qwen21Transformer(**_QWEN21), dtype), ModelConfig.qwen_image_21())
    for prompt, n in ((PROMPT, 20), (NEGATIVE, 22)):
        flux.prompt_cache[prompt] = _normal(dtype, 1, n, 32, seed=n), mx.ones((1, n))
    flux.tokenizers = {"qwen21": None}
    yield flux


def _qwen21_reference(kind: type, config: ModelConfig, dtype: mx.Dtype) -> Made:
    sizes = _QWEN21 | dict(in_channels=64, out_channels=64, axes_dims_rope=(16, 56, 56))
    texts = [(_normal(dtype, 1, n, 32, seed=n), mx.zeros((1, n))) for n in (20, 22)]
    flux = _pipeline(
        kind,
        _randomised(QwenImage21Transformer(sizes), dtype),
        config,
        _encode_prompt=lambda p, *_: texts[p != PROMPT],
        _control_context=lambda *_: _normal(dtype, 1, 16, 129, seed=6),
        processor=SimpleNamespace(image_processor=SimpleNamespace(size={})),
    )
    if kind is QwenImage21Controlnet:
        flux.controlnet = _randomised(QwenImage21ControlNet(sizes), dtype)
    yield flux


@contextmanager
def eager() -> Iterator[None]:
    """As mflux runs on M1 and M2."""
    with patch.object(AppleSiliconUtil, "is_m1_or_m2", staticmethod(lambda: True)):
        yield


_PHOTO, _PHOTOS = object(), object()  # stand for the path of a picture, and for a list of one


@dataclass(frozen=True)
class Small:
    """One of mflux's pipelines.

    Attributes:
        kind: Its class.
        make: Yields one, of a dtype.
        given: ``generate_image``'s arguments beside those that all have; ``_PHOTO`` is a picture's path.
        is_compiled: Whether mflux compiles its step.
        has_residual: Whether it can be gated with ``cache="residual"``.
        calls: Calls that a step with guidance is.
    """

    kind: Any
    make: Callable[[mx.Dtype], Made]
    given: tuple[tuple[str, Any], ...] = ()
    is_compiled: bool = False
    has_residual: bool = False
    calls: int = 1

    def __str__(self) -> str:
        return str(self.kind.__name__)

    @contextmanager
    def pipeline(self, dtype: mx.Dtype = mx.bfloat16) -> Iterator[Any]:
        """With a ``recorder`` of the latents."""
        yield from self.make(dtype)

    def arguments(self, photo: Path, mask: object = None) -> dict[str, Any]:
        given = dict(seed=1, prompt=PROMPT, num_inference_steps=6, height=64, width=64) | dict(self.given)
        return {name: {_PHOTO: photo, _PHOTOS: [photo]}.get(value, value) for name, value in given.items()}


_ALL = (
    Small(QwenImage, _qwen, has_residual=True, calls=2),
    Small(qwen_image_edit.QwenImageEdit, _qwen_edit, (("image_paths", ()),), calls=2),
    Small(ZImage, _z_image, is_compiled=True, has_residual=True),
    Small(Flux3Klein, lambda dtype: _flux3(Flux3Klein, dtype)),
    Small(Flux3KleinEdit, lambda dtype: _flux3(Flux3KleinEdit, dtype), (("image_paths", _PHOTOS),)),
    Small(fibo.FIBO, lambda dtype: _fibo(fibo, fibo.FIBO, ModelConfig.fibo(), dtype)),
    Small(
        fibo_edit.FIBOEdit,
        lambda dtype: _fibo(fibo_edit, fibo_edit.FIBOEdit, ModelConfig.fibo_edit(), dtype),
        (("image_path", _PHOTO),),
    ),
    Small(Fibo2, _fibo2),
    Small(ErnieImage, _ernie, is_compiled=True),
    Small(Krea2, _krea2, is_compiled=True),
    Small(Krea2Controlnet, _krea2_controlnet, is_compiled=True),
    Small(Anima, _anima, is_compiled=True),
    Small(ideogram4.Ideogram4, _ideogram4, is_compiled=True, calls=2),
    Small(Iris, _iris),
    Small(MOSSImage, _moss, (("uncond_skip_layers", (2,)),)),
    Small(QwenImage21, _qwen21, (("negative_prompt", NEGATIVE),), calls=2),
    Small(
        QwenImage21Edit,
        lambda dtype: _qwen21_reference(QwenImage21Edit, ModelConfig.qwen_image_21(), dtype),
        (("negative_prompt", NEGATIVE),),
        calls=2,
    ),
    Small(
        QwenImage21Controlnet,
        lambda dtype: _qwen21_reference(QwenImage21Controlnet, ModelConfig.qwen_image_21_controlnet_union(), dtype),
        (("negative_prompt", NEGATIVE), ("controlnet_image_path", _PHOTO)),
        calls=2,
    ),
)
PIPELINES = tuple(small for small in _ALL if small.kind is not None)
