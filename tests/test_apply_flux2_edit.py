"""``apply`` on mflux's real ``Flux2KleinEdit``, run by its own generate_image with the embedded model's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import TinyEdit, edit_pipeline, kinds
from mflux.models.common.config.model_config import ModelConfig

import mlx_teacache_fast as tc

ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)


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


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_skipped_steps(edit: TinyEdit, image: Callable[..., np.ndarray], guidance: float) -> None:
    """Reuse of the latents' tokens only: the references' are computed with the body or not at all."""
    plain = image(edit, guidance=guidance)
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP) as handle:
        gated = image(edit, guidance=guidance)
    assert kinds(handle) == ["forced", "computed", "skipped", "skipped", "skipped", "forced"]
    assert not np.array_equal(gated, plain)
    assert np.abs(gated.astype(int) - plain.astype(int)).mean() < 20


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
            assert np.array_equal(image(edit, image_paths=[path]), expected)


def test_a_plan_and_a_key_value_cache(
    edit: TinyEdit, image: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit, "model_config", ModelConfig.flux2_klein_9b_kv())
    with tc.apply_teacache(edit, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP):
        gated = image(edit)
    with tc.apply_teacache(edit, steps="110001"):
        assert np.array_equal(image(edit), gated)
    with tc.apply_teacache(edit, steps="100001"), pytest.raises(tc.TeaCacheValueError) as error:
        image(edit)
    assert str(error.value) == (
        "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
    )
