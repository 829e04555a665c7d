"""``apply`` on mflux's real FLUX.2 pipeline, run by mflux's own ``generate_image`` on the embedded model."""

import functools
import inspect
import itertools
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import kinds
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.lora.layer.linear_lora_layer import LoRALinear
from mlx import nn

import mlx_teacache_fast as tc
from mlx_teacache_fast.errors import version_of

Generate = Callable[..., np.ndarray]
MFLUX = tuple(int(part) for part in version("mflux").split(".")[:2])


def off(flux: Any) -> tc.Handle:
    with pytest.warns(tc.DisabledWarning):
        return tc.apply_teacache(flux, rel_l1_thresh=0.0)


# ---- The image stays the same

SIZES = [(128, 128), (96, 160)]  # height, width
STRENGTHS = [None, 0.3, 0.7]
FULL_MATRIX = list(itertools.product([1.0, 4.0], STRENGTHS, [1, 2, 4, 12, 50], SIZES, [1, 2]))
# Every value of every option, in combinations that take a minute; `slow` has the rest.
DEFAULT_MATRIX = [c for c in FULL_MATRIX if c[2] <= 2 and c[4] == 1] + [
    (1.0, None, 4, (96, 160), 2),
    (4.0, 0.3, 4, (128, 128), 2),
    (4.0, 0.7, 12, (96, 160), 1),
    (1.0, 0.3, 12, (128, 128), 2),
    (4.0, None, 12, (128, 128), 1),
    (4.0, 0.7, 50, (128, 128), 2),
]


@pytest.mark.parametrize(
    ("guidance", "strength", "steps", "size", "seed"),
    [pytest.param(*c, marks=[] if c in DEFAULT_MATRIX else [pytest.mark.slow]) for c in FULL_MATRIX],
)
def test_threshold_zero_is_bit_equal(
    flux: Any,
    generate: Generate,
    photo: Path,
    guidance: float,
    strength: float | None,
    steps: int,
    size: tuple[int, int],
    seed: int,
) -> None:
    arguments: dict[str, Any] = dict(
        guidance=guidance, num_inference_steps=steps, height=size[0], width=size[1], seed=seed
    )
    if strength is not None:
        arguments |= dict(image_path=photo, image_strength=strength)
    plain = generate(**arguments)
    with off(flux) as handle:
        assert np.array_equal(generate(**arguments), plain)
    active = steps - (max(1, int(steps * strength)) if strength else 0)
    assert handle.stats.computed_count == active
    if steps <= 4:  # the plain pipeline again, after restore
        assert np.array_equal(generate(**arguments), plain)


# ---- Against the peer


def peer_run(flux: Any, generate: Generate, threshold: float, **arguments: Any) -> tuple[np.ndarray, list[Any]]:
    from mlx_teacache import apply_teacache

    with apply_teacache(flux, rel_l1_thresh=threshold) as handle:
        image = generate(**arguments)
        return image, list(handle.stats.last_generation.decisions)


@pytest.mark.parametrize(
    ("threshold", "guidance", "strength", "seed"),
    [
        (0.10, 1.0, None, 1),
        (0.17, 1.0, None, 2),
        (0.25, 1.0, 0.3, 3),
        (0.40, 1.0, None, 4),
        (0.60, 4.0, None, 5),
        (0.90, 4.0, 0.7, 6),
    ],
)
def test_same_steps_and_image_as_the_peer(
    flux: Any,
    generate: Generate,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    threshold: float,
    guidance: float,
    strength: float | None,
    seed: int,
) -> None:
    """mlx-teacache 0.14.1 on the same pipeline.

    It runs eagerly, so float32 rounding differs, and mflux rounds the latents to bfloat16 (8 bits) after each step. A
    last bit there moves a pixel by 1 of 255 levels (1 was seen), and the small steps between late latents by up to 1 %.
    """
    arguments: dict[str, Any] = dict(
        prompt="rocket", guidance=guidance, seed=seed, num_inference_steps=50, height=64, width=64
    )
    if strength is not None:
        arguments |= dict(image_path=photo, image_strength=strength)
    theirs, decisions = peer_run(flux, generate, threshold, **arguments)
    with tc.apply_teacache(flux, rel_l1_thresh=threshold) as handle:
        ours = generate(**arguments)
    generation = handle.stats.last_generation
    assert generation is not None
    assert generation.num_steps == len(decisions)
    accumulated = 0.0
    for step, theirs_step in zip(generation.steps, decisions, strict=True):
        seen = accumulated + (step.predicted or 0.0)
        if step.kind != theirs_step.decision and abs(seen - threshold) < 1e-3:
            pytest.skip(f"a tie: step {step.index} has {seen} against the threshold {threshold}")
        assert step.kind == theirs_step.decision, step
        assert (step.rel_l1 is None) == (theirs_step.rel_l1 is None)
        if step.rel_l1 is not None:
            assert step.rel_l1 == pytest.approx(theirs_step.rel_l1, rel=1e-2)
        assert step.accumulated == pytest.approx(theirs_step.accumulated_distance, abs=1e-2)
        accumulated = step.accumulated
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    with capsys.disabled():
        print(
            f"\nagainst the peer, threshold {threshold}, guidance {guidance}: {generation.skipped} of "
            f"{generation.num_steps} steps skipped, difference at most {difference.max()} of 255, mean "
            f"{difference.mean():.3f}"
        )
    assert difference.mean() < 0.1
    assert difference.max() <= 2


# ---- What it costs


MEMORY = """
    import json, os, sys, warnings
    import mlx.core as mx
    import mlx_teacache_fast as tc
    from mlx_teacache_fast import demo

    warnings.simplefilter("ignore")
    mx.set_default_device(mx.cpu)
    settings, guidance, size = json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    mx.set_cache_limit(0)
    flux = demo.pipeline()
    if settings:
        handle = tc.apply_teacache(flux, rel_l1_thresh=0.9, **settings)

    class Reset:
        def call_before_loop(self, **_):
            mx.reset_peak_memory()

        def call_after_loop(self, latents, **_):
            print(mx.get_peak_memory(), flush=True)

    flux.callbacks.register(Reset())
    for seed in range(2):
        flux.generate_image(
            prompt="red apple", seed=seed, num_inference_steps=5, height=size, width=size, guidance=guidance
        )
    os._exit(0)  # MLX's threads may abort at exit
"""


@functools.cache
def peak_memory(guidance: float, **settings: Any) -> float:
    """Of generations gated with these settings, or of plain mflux's, in arrays of [S, D].

    The higher of two: on a busy machine an array may be gone before the next one is allocated.
    """
    size = 192
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), json.dumps(settings), str(guidance), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return max(map(int, done.stdout.split())) / ((size // 16) ** 2 * 256 * 4)


@pytest.mark.parametrize("order", [*(pytest.param(order, marks=pytest.mark.slow) for order in (0, 1)), 2])
@pytest.mark.parametrize(
    ("cache", "guidance", "limit"), [("residual", 1.0, 2), ("residual", 4.0, 2), ("output", 1.0, 1), ("output", 4.0, 1)]
)
def test_peak_memory(
    cache: str, guidance: float, limit: float, order: int, record_property: Callable[[str, object], None]
) -> None:
    """Above plain mflux, in arrays of [S, D]: the anchor, and of residuals one more; then for each order a term more.

    A term is a residual for each branch of the guidance, or a noise prediction, here of [S, D / 2].
    """
    limit += order * (0.5 if cache == "output" else 2 if guidance > 1 else 1)
    extra = peak_memory(guidance, cache=cache, forecast=order) - peak_memory(guidance)
    record_property(f"extra_activations_{cache}_{order}_guidance_{guidance:g}", extra)
    assert extra <= limit + 0.1  # states and scalars


# ---- Whoever else touches the pipeline


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_a_wrapped_predict(flux: Any, generate: Generate, cache: Any) -> None:
    """Somebody times mflux's compiled step."""
    arguments: dict[str, Any] = dict(num_inference_steps=6, height=32, width=32)
    plain = generate(**arguments)
    calls = []

    def timed(transformer: Any) -> Callable[..., mx.array]:
        compiled = type(flux)._predict(transformer)

        def predict(**kwargs: Any) -> mx.array:
            calls.append(1)
            return compiled(**kwargs)

        return predict

    object.__setattr__(flux, "_predict", timed)
    try:
        with tc.apply(flux, rel_l1_thresh=1e-9, cache=cache) as handle:
            assert np.array_equal(generate(**arguments), plain)
            # A computed step is what has been put there; and the prelude is traced, without an anchor and with one.
            assert cache == "residual" or len(calls) == 6 + 2
        assert handle.stats.last_generation is not None
        assert handle.stats.last_generation.steps[2].rel_l1
        assert np.array_equal(generate(**arguments), plain)
    finally:
        object.__delattr__(flux, "_predict")


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_a_subclass_that_wraps_predict(flux: Any, generate: Generate, cache: Any) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=6, height=32, width=32, guidance=4.0)
    plain, kind = generate(**arguments), type(flux)

    class Timed(kind):  # type: ignore[misc, valid-type]
        @staticmethod
        def _predict(transformer: Any) -> Any:
            compiled = kind._predict(transformer)
            return functools.wraps(compiled)(lambda **arguments: compiled(**arguments))

    flux.__class__ = Timed
    try:
        with tc.apply(flux, rel_l1_thresh=1e-9, cache=cache):
            assert np.array_equal(generate(**arguments), plain)
        with tc.apply(flux, steps="110101", cache=cache):
            wrapped = generate(**arguments)
    finally:
        flux.__class__ = kind
    with tc.apply(flux, steps="110101", cache=cache):
        assert np.array_equal(generate(**arguments), wrapped)


@pytest.mark.parametrize(
    "how", [dict(rel_l1_thresh=0.2), dict(cache="residual"), dict(cache="residual", budget=0.5)], ids=str
)
@pytest.mark.parametrize("keeps", ["a trace", "nothing"])
def test_a_step_that_does_not_run_the_transformer_it_is_given(
    flux: Any, generate: Generate, keeps: str, how: dict[str, Any]
) -> None:
    compiled = type(flux)._predict(flux.transformer)
    wrapper = {
        "a trace": lambda transformer: lambda **k: compiled(**k),
        "nothing": lambda _: lambda latents, **__: latents,
    }
    object.__setattr__(flux, "_predict", wrapper[keeps])
    try:
        with tc.apply(flux, **how), pytest.raises(tc.InternalStateError) as error:
            generate(num_inference_steps=6, height=32, width=32)
    finally:
        object.__delattr__(flux, "_predict")
    assert str(error.value) == (
        "a step did not call block 0 of the transformer that it was given: something between generate_image and the "
        "transformer (a wrapped _predict, another patch) keeps a transformer or a trace of its own"
    )


def test_the_signature_stays(flux: Any) -> None:
    before = inspect.signature(flux.generate_image)
    with tc.apply_teacache(flux):
        assert inspect.signature(flux.generate_image) == before


# ---- Statistics


def test_stats(flux: Any, generate: Generate) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=0.3) as handle:
        assert (handle.variant_id, handle.rel_l1_thresh) == ("flux2-klein-base-4b", 0.3)
        assert handle.stats.last_generation is None
        assert handle.stats.bound == 1.0
        for _ in range(2):
            generate(num_inference_steps=25, height=64, width=64)
    stats, generation = handle.stats, handle.stats.last_generation
    assert generation is not None
    assert stats.generations == 2
    assert stats.total_steps == 50
    assert [step.index for step in generation.steps] == list(range(25))
    assert [generation.steps[i].kind for i in (0, 1, 24)] == ["forced", "computed", "forced"]
    assert stats.skipped_count == 2 * generation.skipped > 0
    assert generation.bound == 25 / (25 - generation.skipped)
    assert stats.bound == 50 / (50 - stats.skipped_count)
    for step in generation.steps[2:-1]:
        assert step.rel_l1 is not None
        assert step.predicted is not None
        assert (step.accumulated > 0) == (step.kind == "skipped")


def test_defaults_are_the_variants(flux: Any) -> None:
    with tc.apply_teacache(flux) as handle:
        rule = handle.policy.rule
        assert isinstance(rule, tc.Gate)
        assert rule.rel_l1_thresh == handle.rel_l1_thresh == 0.17
        assert rule.coefficients == tc.VARIANTS["flux2-klein-base-4b"].coefficients
        assert rule.calibrated_range == (0.028261402621865273, 0.21984468400478363)
    with tc.apply_teacache(flux, coefficients=[0, 0, 0, 1, 0]) as handle:
        assert handle.policy.rule == tc.Gate(rel_l1_thresh=0.20, coefficients=(0, 0, 0, 1, 0))
    with pytest.raises(AttributeError):
        handle.policy.rule.rel_l1_thresh = 0.5  # type: ignore[union-attr, misc]


def test_forced_steps(flux: Any, generate: Generate) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=1.0, skip_first_n_steps=3, skip_last_n_steps=4) as handle:
        generate(num_inference_steps=20, height=32, width=32)
    assert handle.stats.last_generation is not None
    kinds = [step.kind for step in handle.stats.last_generation.steps]
    assert kinds[:4] == ["forced"] * 3 + ["computed"]
    assert kinds[-5:] == [kinds[-5], *["forced"] * 4]
    assert kinds.count("forced") == 7


def test_no_active_step_is_a_generation_too(flux: Any, generate: Generate, photo: Path) -> None:
    with tc.apply_teacache(flux) as handle:
        generate(num_inference_steps=5, image_path=photo, image_strength=1.0)
    assert handle.stats.generations == 1
    assert handle.stats.total_steps == 0


# ---- Bad input


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.01, float("inf"), True, "0.2", [0.2], 1j])
def test_bad_thresholds(flux: Any, value: object) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, rel_l1_thresh=value)  # type: ignore[arg-type]
    assert str(error.value) == f"rel_l1_thresh must be a number from 0.0 to 1.0, got {value!r}"
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "value",
    [
        [],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, float("nan")],
        [1, 2, float("inf"), 4, 5],
        [1, 2, 3, 4, 1e39],
        5,
    ],
)
def test_bad_coefficients(flux: Any, value: object) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, coefficients=value)  # type: ignore[arg-type]
    assert str(error.value) == (
        f"coefficients must be five finite numbers of float32's range, fourth degree first, got {value!r}"
    )


@pytest.mark.parametrize("name", ["skip_first_n_steps", "skip_last_n_steps"])
@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_bad_windows(flux: Any, name: str, value: object) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, **{name: value})  # type: ignore[arg-type]
    assert str(error.value) == f"{name} must be a whole number of steps, 0 or more, got {value!r}"


@pytest.mark.parametrize(
    ("steps", "strength", "active"), [(1, None, 1), (2, None, 2), (10, 0.8, 2)], ids=["1", "2", "image-to-image"]
)
def test_a_window_as_long_as_the_schedule(
    flux: Any, generate: Generate, photo: Path, steps: int, strength: float | None, active: int
) -> None:
    """A server gates once, and its clients choose the steps: it computes all, and says so once."""
    options = dict(num_inference_steps=steps, image_path=photo if strength else None, image_strength=strength)
    plain = generate(**options)
    with tc.apply_teacache(flux) as handle:
        with pytest.warns(tc.NoBenefitWarning) as warned:
            assert np.array_equal(generate(**options), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error", tc.TeaCacheWarning)
            generate(**options)
        assert handle.stats.forced_count == 2 * active
    assert str(warned[-1].message) == (
        "no possible skip: skip_first_n_steps=1 and skip_last_n_steps=1 leave 0 eligible of "
        f"active_num_steps={active} to decide on, and one has to be computed before another can reuse it"
    )


def test_a_schedule_in_which_nothing_can_be_skipped_warns_once(flux: Any, generate: Generate) -> None:
    with tc.apply_teacache(flux):
        with pytest.warns(tc.NoBenefitWarning, match="leave 1 eligible of active_num_steps=3 to decide on") as warned:
            flux.generate_image(prompt="sun", seed=1, num_inference_steps=3, height=32, width=32)
        assert warned[-1].filename == __file__  # not a line of mflux
        with warnings.catch_warnings():
            warnings.simplefilter("error", tc.TeaCacheWarning)
            generate(num_inference_steps=3, height=32, width=32)


GATES = "apply gates mflux's pipelines, which print(supported()) lists, got"


@pytest.mark.parametrize("value", [None, 3, "flux", object()])
def test_something_else_than_a_pipeline(value: object) -> None:
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply_teacache(value)
    assert str(error.value) == f"{GATES} {type(value).__name__}"


def test_another_pipeline_class() -> None:
    from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2
    from mlx import nn

    upscaler = SeedVR2.__new__(SeedVR2)
    nn.Module.__init__(upscaler)
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply_teacache(upscaler)
    assert str(error.value) == f"{GATES} SeedVR2"


def test_another_model(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux, "model_config", ModelConfig.dev())
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply_teacache(flux)
    assert str(error.value) == (
        "TinyKlein has a model configuration with aliases ['dev'], and apply knows "
        "flux2-klein-4b, flux2-klein-9b, flux2-klein-9b-kv, flux2-klein-base-4b, flux2-klein-base-9b"
    )


@pytest.mark.parametrize("name", ["flux2_klein_4b", "flux2_klein_9b"])
def test_distilled_variants_warn(flux: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(flux, "model_config", getattr(ModelConfig, name)())
    with pytest.warns(tc.NoBenefitWarning) as warned:
        tc.apply_teacache(flux).restore()
    assert str(warned[0].message) == (
        f"{name.replace('_', '-')} is distilled to a few steps that differ too much for any to be skipped: "
        "expect no speedup"
    )
    assert warned[0].filename == __file__


@pytest.mark.parametrize("base", ["flux2-klein-base-4b", "flux2-klein-base-9b"])
def test_a_finetune_warns(flux: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_name("somebody/finetune", base_model=base)
    monkeypatch.setattr(flux, "model_config", config)
    with pytest.warns(tc.UncalibratedWarning) as warned:
        tc.apply_teacache(flux).restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tc.apply_teacache(flux, coefficients=[0, 0, 0, 1, 0]).restore()
    assert str(warned[0].message) == (
        f"somebody/finetune is used with the coefficients of {base}, fitted on "
        "flux2-klein-base-4b in text-to-image: they may not fit it, compare a few pictures with ungated ones"
    )


def test_base_9b_is_known(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux, "model_config", ModelConfig.flux2_klein_base_9b())
    with tc.apply_teacache(flux) as handle:
        assert handle.variant_id == "flux2-klein-base-9b"


def test_a_newer_mflux_warns_once(monkeypatch: pytest.MonkeyPatch, flux: Any) -> None:
    from mlx_teacache_fast.mflux import hook

    monkeypatch.setattr(hook, "version_of", lambda name: "0.25.0")
    hook.warn_if_untested.cache_clear()
    try:
        with pytest.warns(tc.UntestedVersionWarning, match=r"mflux 0\.25\.0 is newer than 0\.24\.0") as warned:
            tc.apply_teacache(flux).restore()
        assert warned[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error", tc.UntestedVersionWarning)
            tc.apply_teacache(flux).restore()
    finally:
        hook.warn_if_untested.cache_clear()


def test_a_fork_in_the_place_of_mflux_warns(monkeypatch: pytest.MonkeyPatch, flux: Any) -> None:
    from mlx_teacache_fast.mflux import hook

    monkeypatch.setattr(hook, "version_of", lambda name: version_of("no-mflux"))
    hook.warn_if_untested.cache_clear()
    try:
        with pytest.warns(tc.UntestedVersionWarning, match="^no package of the name mflux is installed: a fork that "):
            tc.apply_teacache(flux).restore()
    finally:
        hook.warn_if_untested.cache_clear()


# ---- Weights of a gated pipeline


@pytest.mark.parametrize("settings", [dict(rel_l1_thresh=1e-9), dict(steps="110101")], ids=["gate", "plan"])
def test_weights_that_are_not_evaluated_yet(settings: dict[str, Any], tmp_path: Path) -> None:
    """As mflux leaves them: read and quantised when first used. They stay usable, and files are read once."""
    from mlx_teacache_fast import demo

    file = str(tmp_path / "weights.safetensors")
    flux = demo.pipeline()
    flux.transformer.save_weights(file)

    def image() -> np.ndarray:
        return np.asarray(flux.generate_image(1, "red apple", 6, 64, 64, guidance=4.0).image)

    class Overwriting:
        def call_in_loop(self, t: int, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            if t == 1:
                Path(file).write_bytes(b"nothing")

    flux.transformer.load_weights(file)
    flux.callbacks.register(Overwriting())
    with tc.apply_teacache(flux, **settings):
        read = image()
    flux.callbacks.in_loop.pop()
    plain = image()
    if "steps" not in settings:
        assert np.array_equal(read, plain)

    state = [mx.array(a) for a in mx.random.state]
    nn.quantize(flux.transformer, group_size=64, bits=8)
    flux.transformer.proj_out = LoRALinear.from_linear(flux.transformer.proj_out, r=4)  # random, and lazy
    with tc.apply_teacache(flux, **settings):
        image()
    mx.eval(flux.parameters(), state, mx.random.normal((2,)))
    assert not np.array_equal(image(), plain)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_compute_precision(dtype: mx.Dtype) -> None:
    """mflux's option to compute in float16 whatever the weights' dtype."""
    precision = pytest.importorskip("mflux.models.common.compute_precision", reason="from mflux 0.22 on")
    from mlx_teacache_fast import demo

    flux = demo.pipeline(dtype)
    flux.compute_precision = precision.ComputePrecision(mx.float16)
    flux.transformer.apply_compute_precision(flux.compute_precision)

    def image() -> np.ndarray:
        return np.asarray(flux.generate_image(1, "red apple", 5, 64, 64, guidance=4.0).image)

    plain = image()
    with off(flux):
        assert np.array_equal(image(), plain)
    with tc.apply_teacache(flux, rel_l1_thresh=1e-9):
        assert np.array_equal(image(), plain)
    with tc.apply_teacache(flux, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP) as handle:
        assert not np.array_equal(image(), plain)
    assert "skipped" in kinds(handle)


def test_save_model_of_a_gated_pipeline(flux: Any, generate: Generate, tmp_path: Path) -> None:
    flux.small_text_encoder = flux.small_decoder = False  # what mflux's loader sets, and save_model reads

    def saved(name: str) -> dict[str, bytes]:
        flux.save_model(str(tmp_path / name))
        files = (tmp_path / name).rglob("*.*")
        return {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files}

    try:
        plain = saved("plain")
        with tc.apply_teacache(flux, rel_l1_thresh=0.5):
            generate(num_inference_steps=8, height=32, width=32)
            assert saved("gated") == plain
        assert "transformer/0.safetensors" in plain
    finally:
        del flux.small_text_encoder, flux.small_decoder


# ---- Other limits, and plans


ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_plan_of_another_length(flux: Any, generate: Generate, photo: Path) -> None:
    with tc.apply_teacache(flux, steps="110"):
        with pytest.raises(tc.InvalidStepWindowError) as error:
            generate(num_inference_steps=4, height=32, width=32)
        assert str(error.value) == (
            "steps plans 3 steps and the schedule has 4 active of num_inference_steps=4: "
            "plan one entry for each active step"
        )
        generate(num_inference_steps=4, height=32, width=32, image_path=photo, image_strength=0.25)


@pytest.mark.parametrize("value", ["", "12", "1x", [], [2, 1], [1, 0.5], 5, "1 0", [None]])
def test_bad_plans(flux: Any, value: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, steps=value)
    assert str(error.value) == f'steps must be a 1 or 0 for each active step, such as "1101", got {value!r}'


def test_a_plan_that_begins_with_a_skip(flux: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, steps="011")
    assert str(error.value) == "steps must begin with a computed step (1), got '011': there is nothing to reuse"


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.DisabledWarning")
def test_at_most_so_many_skips(flux: Any, generate: Generate) -> None:
    for limit in (0, 1, 3):
        with tc.apply_teacache(flux, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP, max_skips=limit) as handle:
            for _ in range(2):  # in each generation
                generate(num_inference_steps=8, height=32, width=32)
                assert kinds(handle).count("skipped") == limit
    for limit in (0, 2):
        with tc.apply_teacache(
            flux, rel_l1_thresh=0.5, coefficients=ALWAYS_SKIP, max_consecutive_skips=limit
        ) as handle:
            generate(num_inference_steps=10, height=32, width=32)
        skips = "".join("s" if kind == "skipped" else "c" for kind in kinds(handle))
        assert skips == {0: "cccccccccc", 2: "ccsscsscsc"}[limit]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(rel_l1_thresh=0.0), "rel_l1_thresh=0.0 turns gating off"),
        (dict(max_skips=0), "max_skips=0 skips nothing"),
        (dict(max_consecutive_skips=0), "max_consecutive_skips=0 skips nothing"),
        (dict(steps="111"), "the planned steps have no 0"),
    ],
)
def test_settings_that_skip_nothing(flux: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.warns(tc.DisabledWarning) as warned:
        tc.apply_teacache(flux, **settings).restore()
    assert [str(w.message) for w in warned] == [f"{reason}: every step computes"]


@pytest.mark.parametrize("name", ["max_skips", "max_consecutive_skips"])
@pytest.mark.parametrize("value", [-1, 1.0, "1", True])
def test_bad_limits(flux: Any, name: str, value: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, **{name: value})
    assert str(error.value) == f"{name} must be a whole number of steps, 0 or more, got {value!r}"


def test_another_pipelines_coefficients_are_said_to_be_that(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with tc.apply_teacache(flux) as handle:
        assert handle.calibrated
    monkeypatch.setattr(flux, "model_config", ModelConfig.flux2_klein_9b_kv())
    with pytest.warns(tc.UncalibratedWarning) as warned, tc.apply_teacache(flux) as handle:
        assert not handle.calibrated
    assert str(warned[-1].message) == (
        "TinyKlein with black-forest-labs/FLUX.2-klein-9b-kv is used with the coefficients of flux2-klein-9b, "
        "fitted on flux2-klein-9b in text-to-image: they may not fit it, compare a few pictures with ungated ones"
    )


def test_gradient_checkpointing(flux: Any, generate: Generate) -> None:
    """A flag of mflux's training, under which its forward wraps each block for arrays alone."""
    arguments: dict[str, Any] = dict(num_inference_steps=4, height=32, width=32)
    plain = generate(**arguments)
    flux.transformer.gradient_checkpointing = True
    try:
        with tc.apply_teacache(flux, rel_l1_thresh=1e-9):
            assert np.array_equal(generate(**arguments), plain)
        assert flux.transformer.gradient_checkpointing is True
    finally:
        del flux.transformer.gradient_checkpointing
