"""A picture says how it was gated, and that repeats it: files as mflux writes them."""

import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mflux", reason="the pictures are mflux's")

from PIL import Image

import mlx_teacache_fast as tc
from mlx_teacache_fast.record import metadata

RUN = dict(prompt="red apple", seed=3, num_inference_steps=14, height=64, width=64, guidance=1.0)
OWN = dict(coefficients=(0.0, 0.0, 0.0, 1.5, 0.0), rel_l1_thresh=0.6, skip_first_n_steps=2, skip_last_n_steps=3)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image.image)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(rel_l1_thresh=0.5, max_skips=3),
        OWN,
        dict(steps="11010010111011"),
        dict(max_consecutive_skips=1),
        dict(budget=0.5),
    ],
    ids=["defaults", "max_skips", "own coefficients", "plan", "max_consecutive_skips", "budget"],
)
def test_a_picture_repeats(flux: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    with tc.apply_teacache(flux, **settings) as handle:
        first = flux.generate_image(**RUN)
    assert handle.stats.skipped_count > 0
    first.save(tmp_path / "a.png", export_json_metadata=True)

    said = tc.read_metadata(tmp_path / "a.png")
    assert said == tc.read_metadata(tmp_path / "a.metadata.json")
    assert said.policy == handle.policy
    assert settings.items() <= said.policy.flat.items()
    assert (said.variant_id, said.pipeline) == ("flux2-klein-base-4b", "TinyKlein")
    assert [step == "0" for step in said.steps] == [s.kind == "skipped" for s in handle.stats.finished[0].steps]
    assert said.versions["mlx_teacache_fast"] == tc.__version__
    assert (said.mflux["prompt"], said.mflux["seed"], said.mflux["steps"]) == ("red apple", 3, 14)
    rows = dict(line.split(maxsplit=1) for line in str(said).splitlines())
    assert rows["skipped"] == f"{handle.stats.skipped_count} of 14"
    assert rows["prompt"] == "red apple"

    own, steps = said.policy, dict(steps=said.steps, forecast=said.policy.forecast, cache=said.policy.cache)
    for again in (
        dict(policy=own),
        dict(policy=tmp_path / "a.png"),
        dict(policy=str(tmp_path / "a.metadata.json")),
        steps,
    ):
        with tc.apply(flux, **again):
            second = flux.generate_image(**RUN)
        np.testing.assert_array_equal(pixels(first), pixels(second))


def test_each_picture_says_its_own_steps(flux: Any, tmp_path: Path) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=0.5) as handle:
        images = [flux.generate_image(**RUN | dict(num_inference_steps=n)) for n in (6, 12)]
    for i, image in enumerate(images):  # saved after both, and after restore()
        image.save(tmp_path / f"{i}.png")
        said = tc.read_metadata(tmp_path / f"{i}.png").steps
        assert said == "".join("01"[step.kind != "skipped"] for step in handle.stats.finished[i].steps)


def test_a_picture_of_several_in_one_call(flux: Any, tmp_path: Path) -> None:
    """As where mflux tries again with another seed: which one it is the seed says, if it can."""
    kind = type(flux)

    class Again(kind):  # type: ignore[misc, valid-type]
        def generate_image(self, seed: int, first: int, **arguments: Any) -> Any:
            super().generate_image(seed=first, **arguments | dict(num_inference_steps=6))
            return super().generate_image(seed=seed, **arguments)

    flux.__class__ = Again
    with tc.apply_teacache(flux, rel_l1_thresh=0.5) as handle:
        image, same_seed = (flux.generate_image(first=first, **RUN) for first in (2, 3))
    flux.__class__ = kind
    image.save(tmp_path / "a.png")
    said = tc.read_metadata(tmp_path / "a.png").steps
    assert said == "".join("01"[step.kind != "skipped"] for step in handle.stats.finished[1].steps)
    same_seed.save(tmp_path / "b.png")
    with pytest.raises(tc.TeaCacheValueError, match="does not say"):
        tc.read_metadata(tmp_path / "b.png")


def test_a_cut_picture_says_it_too(flux: Any, tmp_path: Path) -> None:
    """As mflux's in-context commands save."""
    image = gated(flux)
    if not hasattr(image, "generation_parameters"):
        pytest.skip("this mflux carries no further metadata over")
    image.get_right_half().save(tmp_path / "half.png")
    assert len(tc.read_metadata(tmp_path / "half.png").steps) == 14


def gated(flux: Any, **settings: Any) -> Any:
    with tc.apply_teacache(flux, **settings):
        return flux.generate_image(**RUN)


def test_without(flux: Any, tmp_path: Path) -> None:
    gated(flux, save_metadata=False).save(tmp_path / "silent.png")
    flux.generate_image(**RUN).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09")  # cut off
    (tmp_path / "other.json").write_text("[]")
    for name in ("silent.png", "plain.png", "other.png", "odd.png", "other.json"):
        with pytest.raises(tc.TeaCacheValueError) as caught:
            tc.read_metadata(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name} does not say that it was made with gating: it has no 'mlx_teacache_fast' metadata"
        )
    for missing in ("missing.png", "missing.json"):
        with pytest.raises(FileNotFoundError):
            tc.read_metadata(tmp_path / missing)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats_and_languages(flux: Any, tmp_path: Path, suffix: str) -> None:
    prompt = "red apple, pomme, リンゴ\nред"
    with tc.apply_teacache(flux):
        flux.generate_image(**RUN | dict(prompt=prompt)).save(tmp_path / f"a{suffix}")
    said = tc.read_metadata(tmp_path / f"a{suffix}")
    assert said.mflux["prompt"] == prompt
    assert "prompt red apple, pomme, リンゴ ред" in [" ".join(line.split()) for line in str(said).splitlines()]


@pytest.mark.parametrize("image", [None, [1, 2], SimpleNamespace(generation_parameters=None)], ids=str)
def test_a_picture_of_another_kind_is_not_lost(flux: Any, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a subclass of the user's."""
    kind = type(flux)

    class Own(kind):  # type: ignore[misc, valid-type]
        def generate_image(self, **arguments: Any) -> Any:
            super().generate_image(**arguments)
            return image

    monkeypatch.setattr(flux, "__class__", Own)
    with tc.apply_teacache(flux) as handle:
        assert flux.generate_image(**RUN) is image
    assert handle.stats.generations == 1


def test_a_picture_is_not_lost_to_bookkeeping(
    flux: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(metadata, "add_to", fail)
    with tc.apply_teacache(flux) as handle:
        with pytest.warns(tc.TeaCacheWarning) as warned:
            assert flux.generate_image(**RUN) is not None
        assert str(warned[-1].message) == "this generation is not counted: OSError('no')"
        assert warned[-1].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert flux.generate_image(**RUN) is not None
        assert "this generation is not counted: OSError('no')\n" in capsys.readouterr().err
    assert handle.stats.generations == 0


def test_no_step_at_all(flux: Any, photo: Path, tmp_path: Path) -> None:
    with tc.apply_teacache(flux):
        image = flux.generate_image(**RUN, image_path=photo, image_strength=1.0)
    image.save(tmp_path / "a.png")
    assert tc.read_metadata(tmp_path / "a.png").steps == ""


NAMES = ", ".join(inspect.signature(tc.apply).parameters).removeprefix("flux, policy, group, ")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(policy=dict(horizon=2)), f"no such setting: horizon; there are {NAMES}"),
        (dict(policy=["x"]), "policy must be an object, got ['x']"),
        (dict(policy=dict(rel_l1_thresh=3)), "rel_l1_thresh must be a number from 0.0 to 1.0, got 3"),
        (dict(steps="12"), "steps must be a 1 or 0 for each active step, such as \"1101\", got '12'"),
        (dict(steps=[1, 0]), "steps must be a text, got [1, 0]"),
        (dict(versions="1.0"), "versions must be an object, got '1.0'"),
        (dict(scheduler=3), "scheduler must be a text or null, got 3"),
        (dict(variant_id=...), "missing or unknown: 'variant_id'"),
        (dict(colour="red"), "missing or unknown: 'colour'"),
    ],
)
def test_what_cannot_be_understood(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "a.json"
    record = dict(policy={"rel_l1_thresh": 0.2}, steps="101", versions={"mlx": "0"}, variant_id="flux1-dev")
    record |= dict(pipeline="Flux1", scheduler="linear")
    said = {k: v for k, v in (record | change).items() if v is not ...}
    path.write_text(json.dumps({"mlx_teacache_fast": said}))
    with pytest.raises(tc.TeaCacheValueError) as caught:
        tc.read_metadata(path)
    assert str(caught.value) == f"{path} has 'mlx_teacache_fast' metadata that cannot be understood: {problem}"
