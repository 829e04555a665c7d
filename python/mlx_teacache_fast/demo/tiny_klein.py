"""TinyKlein: a FLUX.2 Klein pipeline of 5.8 M parameters. `generate_image` is mflux's own, unmodified.

The denoising loop, `_predict` and its mx.compile, the scheduler, the callbacks and the guidance are mflux's; the
transformer is mflux's `Flux2Transformer` at a small size. A word table stands in for the text encoder and a linear
codec for the VAE, so there is no tokenizer, no hub and no network. train.py makes the weights.
"""

import json
from copy import copy
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
from mflux.models.flux2.model.flux2_vae.common.batch_norm_stats import Flux2BatchNormStats
from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mlx.nn.layers.base import Module

from ..models import TINY_KLEIN

try:
    from mflux.models.common.compute_precision import ComputePrecision
except ModuleNotFoundError:  # before mflux 0.22
    ComputePrecision = None

SIZE = 128  # side in pixels of the training pictures; other multiples of 16 run, with worse pictures
WEIGHTS = Path(__file__).with_name("tiny_klein.safetensors")


class WordTable(Module):
    """Stands in for the text encoder: one embedding per word; id 0 is the null token (padding and unknown words).

    Args:
        weight: Embeddings, shape ``(words, dim)``; row 0 belongs to the null token.
        vocabulary: The word of each row; the first entry is the null token's name.
        context: Number of tokens that the transformer sees; shorter texts are padded, longer ones cut.
        stop_words: Words that are dropped.
    """

    def __init__(self, weight: mx.array, vocabulary: list[str], context: int, stop_words: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight
        self.context = context
        self._index = {word: row for row, word in enumerate(vocabulary)}
        self._stop_words = frozenset(stop_words)

    @property
    def words(self) -> list[str]:
        """Every word with an embedding of its own, in alphabetical order."""
        return sorted(word for word, row in self._index.items() if row)

    def split(self, text: str) -> list[str]:
        """The words that count: lower case, without punctuation and stop words."""
        cleaned = "".join(char if char.isalnum() else " " for char in text.lower())
        return [word for word in cleaned.split() if word not in self._stop_words]

    def ids(self, text: str) -> list[int]:
        """``context`` row numbers, padded with 0."""
        rows = [self._index.get(word, 0) for word in self.split(text)][: self.context]
        return rows + [0] * (self.context - len(rows))

    def __call__(self, text: str) -> tuple[mx.array, mx.array]:
        """Embeddings, shape ``(1, context, dim)``, and position ids ``(1, context, 4)``, int32."""
        embeds = self.weight[mx.array([self.ids(text)])]
        position = mx.arange(self.context, dtype=mx.int32)
        zero = mx.zeros_like(position)
        return embeds, mx.stack([zero, zero, zero, position], axis=1)[None]


def seam_filter(length: int, patch: int) -> mx.array:
    """A linear filter over patch borders, as a matrix of shape ``(length, length)``, float32.

    Moves the three pixels on each side of a border towards each other, by a share of the step at the border that the
    slopes beside it do not explain.
    """
    matrix = np.eye(length, dtype=np.float32)
    for border in range(patch, length, patch):
        step = np.zeros(length, np.float32)
        step[[border - 2, border - 1, border, border + 1]] = 0.5, -1.5, 1.5, -0.5
        for i, share in enumerate((0.5, 0.3, 0.12)):
            matrix[border - 1 - i] += share * step
            matrix[border + i] -= share * step
    return mx.array(matrix)


class LinearCodec(Module):
    """Stands in for the VAE: a 16x16 RGB patch is a linear function (PCA) of its latent token.

    Args:
        mean: Mean patch, shape ``(768,)``.
        basis: Orthonormal rows, shape ``(128, 768)``.
        scale: Standard deviation of the patches per latent channel, shape ``(128,)``.
    """

    decode_mode = getattr(Flux2VAE, "DECODE_LEGACY", None)  # from mflux 0.24 on
    latent_channels = 32
    spatial_scale = 8

    def __init__(self, mean: mx.array, basis: mx.array, scale: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mean = mean.astype(mx.float32)
        self.basis = basis.astype(mx.float32)
        self.scale = scale.astype(mx.float32)
        self.patch = round((self.mean.size // 3) ** 0.5)
        # mflux normalises encoded latents with these; they are normalised already: running_var + eps = 1.
        self.bn = Flux2BatchNormStats(num_features=self.scale.size, eps=0.0)

    def decode_packed_latents(self, packed_latents: mx.array, tiling_config: object = None) -> mx.array:
        """Latents, shape ``(B, 128, h, w)``, to pictures ``(B, 3, 16 h, 16 w)`` in [-1, 1], float32."""
        b, _, h, w = packed_latents.shape
        z = packed_latents.astype(mx.float32).transpose(0, 2, 3, 1)
        x = (z * self.scale) @ self.basis + self.mean
        x = x.reshape(b, h, w, self.patch, self.patch, 3).transpose(0, 5, 1, 3, 2, 4)
        x = x.reshape(b, 3, h * self.patch, w * self.patch)
        return seam_filter(h * self.patch, self.patch) @ x @ seam_filter(w * self.patch, self.patch).T

    def encode(self, image: mx.array) -> mx.array:
        """Pictures, shape ``(B, 3, H, W)`` in [-1, 1], to latents ``(B, 32, H / 8, W / 8)``, which mflux patchifies."""
        if image.ndim == 5:  # mflux's image-to-image adds a frame axis
            image = image[:, :, 0]
        b, _, height, width = image.shape
        h, w = height // self.patch, width // self.patch
        x = image.astype(mx.float32).reshape(b, 3, h, self.patch, w, self.patch).transpose(0, 2, 4, 3, 5, 1)
        z = (x.reshape(b, h, w, -1) - self.mean) @ self.basis.T / self.scale
        latents: mx.array = Flux2VAE._unpatchify_latents(z.transpose(0, 3, 1, 2))
        return latents


class TinyKlein(Flux2Klein):  # type: ignore[misc]  # mflux is untyped
    """A demonstration and test bed with FLUX.2 Klein's architecture; its pictures and timings are not FLUX's."""

    @classmethod
    def load(cls, path: str | Path = WEIGHTS, dtype: mx.Dtype = mx.float32) -> Self:
        """Build the pipeline from one safetensors file, without mflux's initialiser (which fetches weights).

        Args:
            path: The file; ``train.py --export`` writes it.
            dtype: The transformer's and the word table's type. bfloat16 is slow on a CPU.
        """
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        config = json.loads(metadata["config"])
        model = cls.__new__(cls)
        Module.__init__(model)  # type: ignore[no-untyped-call]
        # What mflux's Flux2Initializer sets.
        model.prompt_cache = {}
        model.model_config = copy(ModelConfig.flux2_klein_base_4b())  # which mflux keeps and shares
        model.model_config.aliases = [TINY_KLEIN.variant_id, *model.model_config.aliases]
        model.callbacks = CallbackRegistry()
        model.tiling_config = None
        model.tokenizers = {}
        model.bits = None
        model.lora_paths = []
        model.lora_scales = []
        if ComputePrecision is not None:
            model.compute_precision = ComputePrecision()
        model.text_encoder = WordTable(
            arrays["text.weight"].astype(dtype), json.loads(metadata["vocab"]), config["context"], config["stop_words"]
        )
        model.vae = LinearCodec(arrays["codec.mean"], arrays["codec.basis"], arrays["codec.scale"])
        model.transformer = Flux2Transformer(**config["transformer"])
        prefix = "transformer."
        weights = [(k.removeprefix(prefix), v.astype(dtype)) for k, v in arrays.items() if k.startswith(prefix)]
        model.transformer.load_weights(weights, strict=True)
        model._captions = [caption.split("|") for caption in json.loads(metadata["captions"])]
        mx.eval(model.parameters())
        return model

    @property
    def captions(self) -> dict[str, list[str]]:
        """The captions of the training pictures, by group ("fruit": ["tomato", ...]): prompts that work."""
        groups: dict[str, list[str]] = {}
        for caption, group in self._captions:
            groups.setdefault(group, []).append(caption)
        return groups

    @property
    def words(self) -> list[str]:
        """Every word that the model knows, in alphabetical order; other words count as the empty prompt."""
        return list(self.text_encoder.words)

    def _encode_prompt_pair(
        self, *, prompt: str, negative_prompt: str | None, guidance: float
    ) -> tuple[mx.array, mx.array, mx.array | None, mx.array | None]:
        embeds, ids = self.text_encoder(prompt)
        if guidance is not None and guidance > 1.0 and negative_prompt is not None:
            return embeds, ids, *self.text_encoder(negative_prompt)
        return embeds, ids, None, None
