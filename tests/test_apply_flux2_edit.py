"""``apply`` on mflux's real ``Flux2KleinEdit``, run by its own generate_image with the embedded model's weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit
from mlx.nn.layers.base import Module

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops

ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)


class TinyEdit(Flux2KleinEdit):
    """The embedded model's parts in mflux's edit pipeline: generate_image, _predict and _cached_predict are mflux's."""

    def _encode_prompt_pair(self, *, prompt: str, negative_prompt: str | None, guidance: float) -> Any:
        pair = (*self.text_encoder(prompt), None, None)
        return pair if guidance <= 1.0 else (*pair[:2], *self.text_encoder(negative_prompt))


def edit_pipeline(dtype: mx.Dtype = mx.float32) -> TinyEdit:
    from mlx_teacache_fast import demo

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


@pytest.fixture(scope="module")
def edit() -> TinyEdit:
    mx.set_default_device(mx.cpu)
    return edit_pipeline()


@pytest.fixture
def image(photo: Path) -> Callable[..., np.ndarray]:
    def run(edit: TinyEdit, **kwargs: Any) -> np.ndarray:
        arguments: dict[str, Any] = dict(seed=1, prompt="red apple", height=64, width=96, num_inference_steps=6)
        return np.asarray(edit.generate_image(**(arguments | {"image_paths": [photo]} | kwargs)).image)

    return run


def kinds(handle: tc.Handle) -> list[str]:
    assert handle.stats.last_generation is not None
    return [step.kind for step in handle.stats.last_generation.steps]


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_computed_steps_are_bit_equal(
    edit: TinyEdit, image: Callable[..., np.ndarray], photo: Path, guidance: float, references: int
) -> None:
    arguments: dict[str, Any] = dict(guidance=guidance, image_paths=[photo] * references)
    plain = image(edit, **arguments)
    with pytest.warns(tc.TeaCacheWarning), tc.apply_teacache(edit, rel_l1_thresh=0.0):
        assert np.array_equal(image(edit, **arguments), plain)
    with tc.apply_teacache(edit, rel_l1_thresh=1e-9, coefficients=(0, 0, 0, 1, 0)) as handle:
        ops.reset_counters()
        assert np.array_equal(image(edit, **arguments), plain)
    assert kinds(handle) == ["forced", "computed", "computed", "computed", "computed", "forced"]
    assert ops.counters() == {"reads": 6, "computed": 6 if guidance == 1.0 else 12, "reused": 0}
    assert np.array_equal(image(edit, **arguments), plain)


def test_bfloat16(image: Callable[..., np.ndarray]) -> None:
    edit = edit_pipeline(mx.bfloat16)
    plain = image(edit, height=32, width=32, num_inference_steps=4)
    for threshold in (0.0, 1e-9):
        with warnings.catch_warnings(action="ignore"), tc.apply_teacache(edit, rel_l1_thresh=threshold):
            assert np.array_equal(image(edit, height=32, width=32, num_inference_steps=4), plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_skipped_steps(edit: TinyEdit, image: Callable[..., np.ndarray], guidance: float) -> None:
    """Reuse of the latents' tokens only: the references' are computed with the body or not at all."""
    plain = image(edit, guidance=guidance)
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP) as handle:
        gated = image(edit, guidance=guidance)
    assert kinds(handle) == ["forced", "computed", "skipped", "skipped", "skipped", "forced"]
    assert not np.array_equal(gated, plain)
    assert np.abs(gated.astype(int) - plain.astype(int)).mean() < 20


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_key_value_cache(
    edit: TinyEdit, image: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    """Step 0 sees the references and fills the cache; the others see the latents alone. mflux runs both eagerly."""
    monkeypatch.setattr(edit, "model_config", ModelConfig.flux2_klein_9b_kv())
    plain = image(edit, guidance=guidance)
    with pytest.warns(tc.TeaCacheWarning), tc.apply_teacache(edit, rel_l1_thresh=0.0):
        assert np.array_equal(image(edit, guidance=guidance), plain)
    with tc.apply_teacache(edit, rel_l1_thresh=1e-9, coefficients=(0, 0, 0, 1, 0)) as handle:
        computed = image(edit, guidance=guidance)
    assert kinds(handle) == ["forced", "computed", "computed", "computed", "computed", "forced"]
    # mflux's step is not compiled here, the body is: fused kernels round exp and tanh otherwise.
    assert np.abs(computed.astype(int) - plain.astype(int)).max() <= 1
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP) as handle:
        ops.reset_counters()
        image(edit, guidance=guidance)
    assert kinds(handle) == ["forced", "computed", "skipped", "skipped", "skipped", "forced"]
    branches = 1 if guidance == 1.0 else 2
    assert ops.counters() == {"reads": 5, "computed": 2 * branches, "reused": 3 * branches}
    assert np.array_equal(image(edit, guidance=guidance), plain)


def test_several_generations_with_a_cache_of_their_own(
    edit: TinyEdit, image: Callable[..., np.ndarray], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second picture's references are not the first one's."""
    from PIL import Image

    other = tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90).save(other)
    monkeypatch.setattr(edit, "model_config", ModelConfig.flux2_klein_9b_kv())
    plain = [image(edit, image_paths=[path]) for path in (photo, other)]
    assert not np.array_equal(*plain)
    with tc.apply_teacache(edit, rel_l1_thresh=1e-9, coefficients=(0, 0, 0, 1, 0)):
        for path, expected in zip((photo, other), plain, strict=True):
            assert np.abs(image(edit, image_paths=[path]).astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_plan(edit: TinyEdit, image: Callable[..., np.ndarray], guidance: float) -> None:
    plain = image(edit, guidance=guidance)
    with tc.apply_teacache(edit, steps="111111"):
        assert np.array_equal(image(edit, guidance=guidance), plain)
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP):
        gated = image(edit, guidance=guidance)
    with tc.apply_teacache(edit, steps="110001") as handle:
        assert np.array_equal(image(edit, guidance=guidance), gated)
    assert kinds(handle) == ["computed", "computed", "skipped", "skipped", "skipped", "computed"]


def test_a_plan_and_a_key_value_cache(
    edit: TinyEdit, image: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit, "model_config", ModelConfig.flux2_klein_9b_kv())
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP):
        gated = image(edit)
    with tc.apply_teacache(edit, steps="110001"):
        assert np.abs(image(edit).astype(int) - gated.astype(int)).max() <= 1
    with tc.apply_teacache(edit, steps="100001"), pytest.raises(tc.TeaCacheValueError) as error:
        image(edit)
    assert str(error.value) == (
        "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
    )
