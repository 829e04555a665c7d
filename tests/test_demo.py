"""The demo: the model behaves as mflux's pipeline and draws what it is asked; compare, report and output hold."""

import dataclasses
import errno
import io
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mflux", reason="the demo needs mflux")

import mlx.core as mx
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from PIL import Image

import mlx_teacache_fast
from mlx_teacache_fast import demo, files
from mlx_teacache_fast.demo import compare as compare_module
from mlx_teacache_fast.demo import report
from mlx_teacache_fast.demo._extra import demo_extra
from mlx_teacache_fast.demo.compare import Comparison, Settings, Summary, check_prompts, compare
from mlx_teacache_fast.errors import how_to_install
from mlx_teacache_fast.models import TINY_KLEIN
from mlx_teacache_fast.record.stats import GenerationStats, StepRecord

# 4 tokens instead of 64 and no guidance: a step in milliseconds. At 0.5 some of 14 steps are skipped, some computed.
QUICK = Settings(steps=14, seed=3, guidance=1.0, size=32, threshold=0.5)
RULE = mlx_teacache_fast.Gate(rel_l1_thresh=0.17)


def picture(flux, prompt, settings):
    image = flux.generate_image(
        seed=settings.seed,
        prompt=prompt,
        num_inference_steps=settings.steps,
        height=settings.size,
        width=settings.size,
        guidance=settings.guidance,
    ).image
    return np.asarray(image.convert("RGB"))


# ---- The model


def test_generate_image_is_mflux_own(flux):
    assert isinstance(flux, Flux2Klein)
    for name in ("generate_image", "_predict", "_prepare_generation_latents"):
        assert getattr(demo.TinyKlein, name) is getattr(Flux2Klein, name)


@pytest.mark.parametrize(("prompt", "channel"), [("red circle", 0), ("green square", 1)])
def test_draws_what_the_prompt_says(flux, prompt, channel):
    settings = Settings(steps=5, seed=1, guidance=1.0)
    centre = picture(flux, prompt, settings)[48:80, 48:80].mean(axis=(0, 1))
    others = np.delete(centre, channel)
    assert centre[channel] > others.max() + 40  # of 255 levels; the emoji's own are 60 and more


def test_pipeline_dtype():
    flux = demo.pipeline(dtype=mx.bfloat16)
    assert flux.transformer.proj_out.weight.dtype == mx.bfloat16
    assert flux.text_encoder.weight.dtype == mx.bfloat16
    assert flux.vae.basis.dtype == mx.float32  # the codec's rounding would show


def test_captions_and_words(flux):
    assert "red apple" in flux.captions["fruit"]
    words = {
        word for captions in flux.captions.values() for caption in captions for word in flux.text_encoder.split(caption)
    }
    assert words <= set(flux.words)
    assert flux.words == sorted(flux.words)
    assert all(flux.text_encoder.ids(word)[0] > 0 for word in flux.words)


def test_word_table():
    table = demo.tiny_klein.WordTable(mx.arange(8.0).reshape(4, 2), ["<null>", "red", "apple", "pie"], 3, ["a", "of"])
    assert table.words == ["apple", "pie", "red"]
    assert table.split("A Red, apple of-pie!") == ["red", "apple", "pie"]
    assert table.ids("a red apple") == [1, 2, 0]
    assert table.ids("green apple pie red") == [0, 2, 3]
    embeds, ids = table("apple")
    assert embeds.tolist() == [[[4.0, 5.0], [0.0, 1.0], [0.0, 1.0]]]
    assert ids.tolist() == [[[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]]


def test_seam_filter_keeps_slopes_and_closes_steps():
    ramp = np.arange(12, dtype=np.float32)
    matrix = np.array(demo.tiny_klein.seam_filter(12, 4))
    np.testing.assert_allclose(matrix @ ramp, ramp, atol=1e-5)  # only the slopes' rounding is left
    step = np.repeat(np.float32([0, 1]), 6)
    filtered = np.array(demo.tiny_klein.seam_filter(12, 6)) @ step
    # No slopes beside it, so the filter sees the whole step: shares 0.5, 0.3 and 0.12 of it on each side.
    np.testing.assert_allclose(filtered[3:9], [0.12, 0.3, 0.5, 0.5, 0.7, 0.88], atol=1e-6)


def test_codec_round_trip(flux):
    # A picture in the codec's span, without borders between patches: both directions are exact but for rounding.
    latents = mx.random.normal((1, 128, 1, 1), key=mx.random.key(0))
    picture = flux.vae.decode_packed_latents(latents)
    assert picture.shape == (1, 3, 16, 16)
    encoded = flux.vae.encode(picture)
    assert encoded.shape == (1, 32, 2, 2)
    again = flux.vae.decode_packed_latents(encoded.reshape(1, 32, 2, 2).reshape(1, 128, 1, 1))
    assert mx.abs(again - picture).max().item() < 2e-4  # float16 basis: orthonormal to 1e-4


def test_image_to_image(flux, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    image = flux.generate_image(
        seed=1, prompt="red square", num_inference_steps=8, height=32, width=32, guidance=1.0,
        image_path=tmp_path / "red.png", image_strength=0.9,
    ).image  # fmt: skip
    red, green, blue = np.asarray(image).mean(axis=(0, 1))
    assert red > 130 > 90 > max(green, blue)


def test_missing_package_names_the_extra():
    code = "import sys; sys.modules['mflux'] = None; import mlx_teacache_fast.demo"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    message = f"ImportError: the demo needs mflux, which is not installed: {how_to_install('demo')}"
    assert result.stderr.splitlines()[-1] == message


def test_other_missing_module_passes_through():
    with pytest.raises(ModuleNotFoundError, match=r"^no torch$"), demo_extra():
        raise ModuleNotFoundError("no torch", name="torch")


# ---- check_prompts


def test_check_prompts_accepts_every_caption(flux):
    check_prompts(flux, [caption for captions in flux.captions.values() for caption in captions])
    check_prompts(flux, ["A Red, apple!", "fruit"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            ["red appel", "qqqq of appel"],
            "the demo model does not know 'appel' (near: apple), 'qqqq'; --list-words shows prompts that work",
        ),
        (["red apple", "the"], "prompt 'the' has no words that count; --list-words shows prompts that work"),
        ([""], "prompt '' has no words that count; --list-words shows prompts that work"),
        (["red " * 9], f"prompt {'red ' * 9!r} has 9 words; the demo model reads at most 8"),
    ],
)
def test_check_prompts_refuses(flux, prompts, message):
    with pytest.raises(mlx_teacache_fast.TeaCacheValueError) as error:
        check_prompts(flux, prompts)
    assert str(error.value) == message


# ---- compare


def test_compare_is_plain_and_gated_generate_image(flux):
    prompts = ["red apple", "cat face"]
    comparisons = compare(flux, prompts, QUICK)
    assert [c.prompt for c in comparisons] == prompts
    for c in comparisons:
        np.testing.assert_array_equal(c.plain, picture(flux, c.prompt, QUICK))
        with mlx_teacache_fast.apply(flux, rel_l1_thresh=QUICK.threshold) as handle:
            np.testing.assert_array_equal(c.gated, picture(flux, c.prompt, QUICK))
        assert c.generation == handle.stats.last_generation
        assert 0 < c.generation.skipped < 12
        assert c.rule == handle.policy.rule
        assert 0 < c.psnr < math.inf
        assert c.plain_seconds > 0
        assert c.gated_seconds > 0


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.DisabledWarning")
def test_compare_takes_turns(flux):
    gated = []
    original = flux.generate_image

    class Recorder:
        def call_before_loop(self, **_):
            gated.append("generate_image" in vars(flux))

    recorder = Recorder()
    flux.callbacks.register(recorder)
    try:
        compare(flux, ["sun"] * 3, Settings(steps=3, guidance=1.0, size=32, threshold=0.0))
    finally:
        flux.callbacks.before_loop.remove(recorder)
    assert gated == [False, True, False, True, True, False, False, True]  # the first two are the warm-up
    assert flux.generate_image == original


def test_threshold_0_is_identical(flux):
    with pytest.warns(mlx_teacache_fast.DisabledWarning):
        (c,) = compare(flux, ["rocket"], Settings(steps=1, guidance=1.0, size=32, threshold=0.0))
    assert c.psnr == math.inf
    assert c.ssim == 1.0
    assert c.generation.skipped == 0


def callback_lists(flux):
    registry = flux.callbacks
    return [list(kind) for kind in (registry.before_loop, registry.in_loop, registry.after_loop, registry.interrupt)]


def test_progress_is_one_bar_and_leaves_no_trace(flux, capfd):
    before = callback_lists(flux), dict(vars(flux))
    compare(flux, ["rocket"], QUICK, progress=True)
    assert (callback_lists(flux), dict(vars(flux))) == before
    bar = capfd.readouterr().err
    assert "100%|" in bar
    assert "step 38/38" in bar  # two warm-ups of 5 steps, two pictures of 14
    assert "/14 [" not in bar  # mflux's own bar


def test_interrupt_leaves_the_pipeline_as_it_was(flux, capfd):
    before = callback_lists(flux), dict(vars(flux))

    class Interrupter:
        steps = 0

        def call_in_loop(self, **_):
            self.steps += 1
            if self.steps == 27:  # in the gated picture: 5 + 5 of the warm-up, 14 plain
                raise KeyboardInterrupt

    interrupter = Interrupter()
    flux.callbacks.register(interrupter)
    try:
        with pytest.raises(KeyboardInterrupt):
            compare(flux, ["rocket"], QUICK, progress=True)
    finally:
        flux.callbacks.in_loop.remove(interrupter)
    assert interrupter.steps == 27
    assert (callback_lists(flux), dict(vars(flux))) == before


def test_bad_threshold_is_refused_before_generating(flux, monkeypatch):
    monkeypatch.setattr(compare_module, "pictures", None)
    with pytest.raises(mlx_teacache_fast.TeaCacheValueError, match=r"got 2\.0$"):
        compare(flux, ["rocket"], Settings(threshold=2.0), progress=True)


# ---- Numbers and the table, by hand

FORCED = StepRecord(0, "forced", None, None, 0.0)


def comparison(prompt="red apple", *, error=1, skipped=2, plain_seconds=10.0, gated_seconds=8.0, side=32):
    """``error`` levels of 255 too bright everywhere; 10 steps, 8 of them between the forced ones."""
    plain = np.random.default_rng(5).integers(0, 200, (side, side, 3), dtype=np.uint8)
    middle = [
        StepRecord(i, "skipped", 0.05, 0.1, 0.1) if i <= skipped else StepRecord(i, "computed", 0.1, 0.2, 0.0)
        for i in range(1, 9)
    ]
    steps = (FORCED, *middle, StepRecord(9, "forced", None, None, 0.0))
    gated = plain + np.uint8(error)
    return Comparison(prompt, plain, gated, plain_seconds, gated_seconds, RULE, GenerationStats(steps))


def test_psnr_and_ssim():
    assert comparison(error=1).psnr == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)
    assert comparison(error=5).psnr == pytest.approx(34.1514, abs=1e-4)  # 20 log10(51)
    assert comparison(error=0).psnr == math.inf
    assert comparison(error=0).ssim == 1.0
    assert comparison(error=5).ssim < comparison(error=1).ssim < 1


def test_summary():
    summary = Summary.of(
        [comparison(error=e, skipped=s, gated_seconds=g) for e, s, g in ((1, 2, 8), (5, 0, 9), (0, 4, 7))]
    )
    assert (summary.steps, summary.skipped, summary.plain_seconds, summary.gated_seconds) == (30, 6, 30, 24)
    assert summary.speedup == 1.25
    assert summary.bound == 1.25
    assert summary.psnr == pytest.approx(48.1308, abs=1e-4)


def test_table():
    rows = [
        comparison(error=1),
        comparison("panda face", error=0, skipped=0, plain_seconds=9.996, gated_seconds=10.004),
    ]
    ssim = f"{rows[0].ssim:.4f}"
    median = f"{(rows[0].ssim + 1) / 2:.4f}"
    assert report.table(rows).splitlines() == [
        "prompt             steps  skipped  plain s  gated s  speedup  bound    PSNR dB    SSIM",
        "--------------------------------------------------------------------------------------",
        f"red apple             10        2    10.00     8.00    1.25x  1.25x       48.1  {ssim}",
        "panda face            10        0    10.00    10.00    1.00x  1.00x  identical  1.0000",
        "--------------------------------------------------------------------------------------",
        f"all (sum, median)     20        2    20.00    18.00    1.11x  1.11x  identical  {median}",
    ]


# ---- Pictures


@pytest.mark.parametrize(("side", "scale"), [(32, 8), (128, 2), (272, 1)])
def test_images_png(side, scale):
    rows = [comparison(error=3, side=side), comparison("panda face " * 9, error=0, side=side)]
    sheet = Image.open(io.BytesIO(report.images_png(rows, dataclasses.replace(QUICK, size=side))))
    panel = side * scale
    assert sheet.size == (3 * panel + 4 * report.MARGIN, report.HEAD + 2 * (panel + report.CAPTION + report.GAP))
    pixels = np.asarray(sheet)
    for i, c in enumerate(rows):
        top = report.HEAD + i * (panel + report.CAPTION + report.GAP)
        difference = np.full_like(c.plain, 48 if i == 0 else 0)  # 3 levels times 16
        for j, expected in enumerate((c.plain, c.gated, difference)):
            left = report.MARGIN + j * (panel + report.MARGIN)
            shown = pixels[top : top + panel, left : left + panel]
            np.testing.assert_array_equal(shown[::scale, ::scale], expected)
            np.testing.assert_array_equal(shown[scale - 1 :: scale, scale - 1 :: scale], expected)
    # The long prompt's caption ends before the next column.
    caption = pixels[top + panel + 4 :, report.MARGIN + panel + 1 : 2 * report.MARGIN + panel - 1]
    assert (caption == 255).all()


def test_plot_png_size_and_colours():
    def colours(rows):
        image = Image.open(io.BytesIO(report.plot_png(rows, QUICK))).convert("RGB")
        return image.size, {colour for _, colour in image.getcolors(1 << 24)}

    skipped, computed = (0xF0, 0x8A, 0x24), (0x2F, 0x6F, 0xB0)
    size, seen = colours([comparison(skipped=2)])
    assert size == (1200, 390)
    assert {skipped, computed} <= seen
    size, seen = colours([comparison(skipped=0)] * 2)
    assert size == (1200, 645)
    assert computed in seen
    assert skipped not in seen


def test_plot_shows_what_the_gate_compared(flux):
    comparisons = compare(flux, ["rocket"], QUICK)
    steps = comparisons[0].generation.steps
    left, right = report.plot(comparisons, QUICK).axes
    assert [left.get_xlabel(), right.get_xlabel()] == ["denoising step"] * 2
    assert left.get_ylabel() == "relative L1 distance\nto the step before"
    assert right.get_ylabel() == "accumulated distance\nat the decision"
    measured = [step for step in steps if step.rel_l1 is not None]
    assert len(measured) >= 4
    np.testing.assert_allclose(left.lines[0].get_ydata(), [step.rel_l1 for step in measured])
    assert set(right.lines[0].get_ydata()) == {QUICK.threshold}
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in right.patches}
    assert list(heights) == [step.index for step in measured]
    safeguard = {round(bar.get_x() + bar.get_width() / 2) for bar in right.patches if bar.get_hatch()}
    assert {step.kind for step in measured} == {"skipped", "computed"}
    for step in measured:
        below = heights[step.index] < QUICK.threshold
        assert below == (step.kind == "skipped" or step.index in safeguard)
        assert (step.index in safeguard) == (below and step.rel_l1 > TINY_KLEIN.calibrated_range[1])
    assert safeguard


def test_plot_without_measurements():
    steps = tuple(StepRecord(i, "computed", None, None, 0.0) for i in range(3))
    c = comparison()
    c = Comparison(c.prompt, c.plain, c.plain, 1.0, 1.0, RULE, GenerationStats(steps))
    assert Image.open(io.BytesIO(report.plot_png([c], QUICK))).size == (1200, 390)


# ---- Files


def test_prepare_folder_makes_it_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert files.prepare_folder(folder, ["x.png", "y.png"], force=False) == [folder / "x.png", folder / "y.png"]
    assert list(folder.iterdir()) == []


def test_prepare_folder_refuses(tmp_path):
    (tmp_path / "x.png").write_bytes(b"mine")
    (tmp_path / "y.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    cases = [
        (tmp_path, "x.png", f"{tmp_path}/x.png exists; --force overwrites it"),
        (tmp_path, "link.png", f"{tmp_path}/link.png exists; --force overwrites it"),
        (tmp_path, "y.png", f"cannot write {tmp_path}/y.png: it is a folder"),
        (tmp_path / "x.png", "z.png", f"cannot write to {tmp_path}/x.png: it is not a folder"),
        (tmp_path / "x.png" / "z", "z.png", f"cannot create the folder {tmp_path}/x.png/z: Not a directory"),
    ]
    for folder, name, message in cases:
        with pytest.raises(mlx_teacache_fast.TeaCacheError) as error:
            files.prepare_folder(folder, [name], force=False)
        assert str(error.value) == message
    assert files.prepare_folder(tmp_path, ["x.png"], force=True) == [tmp_path / "x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"mine"


def test_prepare_folder_without_permission(tmp_path, monkeypatch):
    # Permissions do not bind root, so the system's answer is given here.
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(files.OutputError) as error:
        files.prepare_folder(tmp_path, ["x.png"], force=False)
    assert str(error.value) == f"cannot write to the folder {tmp_path}: Permission denied"


def test_write_file(tmp_path):
    path = tmp_path / "x.png"
    files.write_file(path, b"one", force=False)
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()  # not mkstemp's 0600
    with pytest.raises(mlx_teacache_fast.TeaCacheValueError) as error:
        files.write_file(path, b"two", force=False)
    assert str(error.value) == f"{path} exists; --force overwrites it"
    assert path.read_bytes() == b"one"
    files.write_file(path, b"three", force=True)
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_write_that_stops_midway_leaves_nothing(tmp_path):
    # The system takes 1000 bytes and then refuses, as a full disk does.
    path = tmp_path / "x.png"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(files.OutputError) as error:
            files.write_file(path, b"x" * 5000, force=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"cannot write {path}: File too large; nothing was left half-written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_keeps_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    seen = []

    def fail(_):
        seen.extend(sorted(p.stat().st_size for p in tmp_path.iterdir()))
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises((files.OutputError, KeyboardInterrupt)) as error:
        files.write_file(path, b"x" * 5000, force=True)
    if isinstance(failure, OSError):
        message = f"cannot write {path}: No space left on device; nothing was left half-written"
        assert str(error.value) == message
    assert seen == [3, 5000]  # the new file was there
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_package_data():
    folder = Path(demo.__file__).parent
    for name in (
        "tiny_klein.safetensors",
        "README.md",
        "LICENSE-noto-emoji-Apache-2.0.txt",
        "LICENSE-emoji-data-MIT.txt",
    ):
        assert (folder / name).stat().st_size > 1000
