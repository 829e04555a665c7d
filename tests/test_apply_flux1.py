"""``apply`` on mflux's real FLUX.1 pipelines, run by mflux's own ``generate_image``."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flux1_pipelines as build
import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import ALWAYS, NEVER, SKIPS, kinds
from flux1_pipelines import generate
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mflux.models.flux.variants.concept_attention.flux_concept import Flux1Concept
from mflux.models.flux.variants.concept_attention.flux_concept_from_image import Flux1ConceptFromImage
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.in_context.flux_in_context_dev import Flux1InContextDev
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.txt2img.flux import Flux1
from mlx import nn
from mlx.utils import tree_flatten

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.UncalibratedWarning")


@pytest.fixture(scope="session")
def transformers() -> Callable[..., Any]:
    """The shared transformer of a configuration: one for each width of x_embedder, with and without guidance."""
    made: dict[Any, Any] = {}

    def get(config: ModelConfig, dtype: mx.Dtype = mx.bfloat16) -> Any:
        key = config.x_embedder_input_dim(), config.supports_guidance, dtype
        if key not in made:
            mx.set_default_device(mx.cpu)
            made[key] = build.transformer(config, dtype=dtype)
        return made[key]

    return get


@pytest.fixture
def flux1(transformers: Callable[..., Any]) -> Iterator[Any]:
    """Flux1, ungated, and left so."""
    transformer = transformers(ModelConfig.dev())
    pipeline = build.pipeline(Flux1, transformer)
    yield pipeline
    assert type(transformer) is Transformer
    assert "generate_image" not in vars(pipeline), "the test left the pipeline gated"


def same(a: tuple[np.ndarray, mx.array], b: tuple[np.ndarray, mx.array]) -> bool:
    """Whether all bits of image and latents are equal."""
    return np.array_equal(a[0], b[0]) and mx.array_equal(a[1], b[1]).item()


class _Noting(nn.Module):
    """Block 0; keeps the stream that it is given."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        object.__setattr__(self, "x", None)

    def __call__(self, **inputs: Any) -> Any:
        object.__setattr__(self, "x", inputs["hidden_states"])
        return self.block(**inputs)


class _Reusing(nn.Module):
    """The layer after the blocks; in steps that are to be skipped it gets what TeaCache defines in place of them."""

    def __init__(self, norm_out: Any, first: _Noting, skipped: list[bool]) -> None:
        super().__init__()
        self.norm_out = norm_out
        for name, value in dict(first=first, skipped=iter(skipped), residual=None).items():
            object.__setattr__(self, name, value)

    def __call__(self, tokens: mx.array, text_embeddings: mx.array) -> mx.array:
        if next(self.skipped):
            tokens = self.first.x + self.residual
        else:
            object.__setattr__(self, "residual", tokens - self.first.x)
        return self.norm_out(tokens, text_embeddings)


@contextlib.contextmanager
def oracle(transformer: Any, skipped: list[bool]) -> Iterator[None]:
    """mflux's own forward pass, all blocks computed, but that the result of blocks in skipped steps is not used."""
    blocks, norm_out = transformer.transformer_blocks, transformer.norm_out
    first = _Noting(blocks[0])
    transformer.transformer_blocks = [first, *blocks[1:]]
    transformer.norm_out = _Reusing(norm_out, first, skipped)
    try:
        yield
    finally:
        transformer.transformer_blocks, transformer.norm_out = blocks, norm_out


# ---- Every pipeline


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", build.CONFIGS, ids=lambda kind: kind.__name__)
def test_a_skip_is_what_teacache_defines(
    kind: type, dtype: mx.Dtype, transformers: Callable[..., Any], photo: Path, mask: Path
) -> None:
    config = build.CONFIGS[kind]()
    transformer = transformers(config, dtype)
    controlnet = build.controlnet(config, dtype=dtype) if kind is Flux1Controlnet else None
    flux = build.pipeline(kind, transformer, config, controlnet)
    given = build.arguments(kind, photo, mask)
    plain = generate(flux, **given)
    assert plain[0].std() > 20  # a picture
    assert plain[1].shape[1] == (32 if kind in (Flux1InContextDev, Flux1InContextFill) else 16)
    with oracle(transformer, [k == "skipped" for k in SKIPS]):
        expected = generate(flux, **given)
    assert mx.abs(expected[1] - plain[1]).max().item() > 0.1  # a skip changes the picture
    with tc.apply_teacache(flux, **ALWAYS) as handle:
        assert same(generate(flux, **given), expected)
    assert kinds(handle) == SKIPS


def test_controlnet_samples_land_in_the_blocks_that_mflux_puts_them_in(photo: Path, mask: Path) -> None:
    """Three blocks share two samples: the first two blocks get the first one."""
    config = ModelConfig.dev_controlnet_canny()
    controlnet = build.controlnet(config, joint=2, single=2)
    flux = build.pipeline(Flux1Controlnet, build.transformer(config, joint=3, single=3), controlnet=controlnet)
    given = dict(num_inference_steps=4, **build.arguments(Flux1Controlnet, photo, mask))
    plain = generate(flux, **given)
    with tc.apply_teacache(flux, **NEVER):
        assert same(generate(flux, **given), plain)
    for name in ("controlnet_blocks", "controlnet_single_blocks"):
        getattr(controlnet, name).reverse()
        swapped = generate(flux, **given)
        assert mx.abs(swapped[1] - plain[1]).max().item() > 0.1  # the place matters
        with tc.apply_teacache(flux, **NEVER):
            assert same(generate(flux, **given), swapped)
        getattr(controlnet, name).reverse()
    with oracle(flux.transformer, [False, False, True, False]):
        expected = generate(flux, **given)
    with tc.apply_teacache(flux, **ALWAYS):
        assert same(generate(flux, **given), expected)


def test_controlnet_without_single_blocks_and_without_samples(photo: Path, mask: Path) -> None:
    config = ModelConfig.dev_controlnet_canny()
    flux = build.pipeline(Flux1Controlnet, build.transformer(config), controlnet=build.controlnet(config, 0, 0))
    given = dict(num_inference_steps=4, **build.arguments(Flux1Controlnet, photo, mask))
    plain = generate(flux, **given)
    with tc.apply_teacache(flux, **NEVER):
        assert same(generate(flux, **given), plain)


class _Counted(nn.Module):
    """A layer whose evaluations ``ops.counters`` counts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "body", ops.Body(lambda x: [x * 1]))

    def __call__(self, x: mx.array) -> mx.array:
        output = self.layer(x)
        return ops.branch(mx.array(False), [output], self.body, [output])[0]


def test_the_controlnet_of_a_skipped_step_is_not_evaluated(
    transformers: Callable[..., Any], photo: Path, mask: Path
) -> None:
    config = ModelConfig.dev_controlnet_canny()
    controlnet = build.controlnet(config)
    controlnet.controlnet_blocks = [_Counted(controlnet.controlnet_blocks[0])]
    flux = build.pipeline(Flux1Controlnet, transformers(config), controlnet=controlnet)
    given = build.arguments(Flux1Controlnet, photo, mask)
    ops.reset_counters()
    generate(flux, **given)
    assert ops.counters()["computed"] == 5
    with tc.apply_teacache(flux, **ALWAYS) as handle:
        ops.reset_counters()
        generate(flux, **given)
    assert kinds(handle) == SKIPS
    assert ops.counters()["computed"] == 3


def test_kontext_gates_the_tokens_of_the_latents(transformers: Callable[..., Any], photo: Path) -> None:
    config = ModelConfig.dev_kontext()
    transformer = transformers(config, mx.float32)
    flux = build.pipeline(Flux1Kontext, transformer)
    seen: list[Any] = []

    class Sees:
        def call_before_loop(self, latents: mx.array, config: Any, **_: Any) -> None:
            seen.extend([config, latents])

    flux.callbacks.register(Sees())
    with tc.apply_teacache(flux, **NEVER) as handle:
        generate(flux, image_path=photo)
    assert handle.stats.last_generation is not None
    measured = [step.rel_l1 for step in handle.stats.last_generation.steps][2:4]

    pooled = flux.prompt_cache[build.PROMPT][1]

    def modulated(t: int) -> np.ndarray:
        time = Transformer.compute_text_embeddings(t, pooled, transformer.time_text_embed, seen[0])
        x = transformer.x_embedder((seen[1:2] + flux.recorder.latents)[t])
        return np.array(transformer.transformer_blocks[0].norm1(x, time)[0]).astype(np.float64)

    expected = [np.abs(modulated(t) - modulated(t - 1)).sum() / np.abs(modulated(t - 1)).sum() for t in (2, 3)]
    # float32 activations; the reference's tokens, which stay the same, would about halve the distance
    assert measured == pytest.approx(expected, rel=1e-6)


def test_a_plan(transformers: Callable[..., Any], photo: Path, mask: Path) -> None:
    """Steps chosen by the user: skipped as the gate's are, without a decision, and also without their ControlNet."""
    config = ModelConfig.dev_controlnet_canny()
    controlnet = build.controlnet(config, single=1)
    controlnet.controlnet_blocks = [_Counted(controlnet.controlnet_blocks[0])]
    flux = build.pipeline(Flux1Controlnet, transformers(config), controlnet=controlnet)
    given = build.arguments(Flux1Controlnet, photo, mask)
    with oracle(flux.transformer, [False, True, False, True, True]):
        expected = generate(flux, **given)
    with tc.apply_teacache(flux, steps="10100") as handle:
        ops.reset_counters()
        assert same(generate(flux, **given), expected)
    assert ops.counters()["computed"] == 2  # by the ControlNet's layer
    assert kinds(handle) == ["computed", "skipped", "computed", "skipped", "skipped"]
    assert type(flux.transformer) is Transformer


# ---- Against the peer


@pytest.mark.parametrize(("threshold", "dtype"), [(0.5, mx.bfloat16), (0.9, mx.float32)])
def test_same_steps_and_image_as_the_peer(
    transformers: Callable[..., Any],
    threshold: float,
    dtype: mx.Dtype,
    record_property: Callable[[str, object], None],
) -> None:
    """mlx-teacache 0.14.1 on the same pipeline, by its own apply."""
    from mlx_teacache import apply_teacache

    flux = build.pipeline(Flux1, transformers(ModelConfig.dev(), dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was verified with mflux up to 0.23
        peer = apply_teacache(flux, rel_l1_thresh=threshold)
    with peer:
        theirs = generate(flux, num_inference_steps=20)
        decisions = list(peer.stats.last_generation.decisions)
    with tc.apply_teacache(flux, rel_l1_thresh=threshold) as handle:
        ours = generate(flux, num_inference_steps=20)
    generation = handle.stats.last_generation
    assert generation is not None
    assert kinds(handle) == [d.decision for d in decisions]
    assert 5 <= generation.skipped <= 11  # 11 before mflux 0.22: its norm_out has no bias, so the picture is another
    assert generation.count("computed") >= 5
    differences = [0.0]
    for step, their in zip(generation.steps, decisions, strict=True):
        assert (step.rel_l1 is None) == (their.rel_l1 is None)
        if step.rel_l1 is not None:
            differences.append(abs(step.rel_l1 / their.rel_l1 - 1))
        assert step.accumulated == pytest.approx(their.accumulated_distance, abs=1e-3)
    record_property("rel_l1_against_the_peer", f"{max(differences):.1e} {dtype}, {generation.skipped} of 20 skipped")
    assert max(differences) < 1e-4  # the peer's mx.mean sums 16 * 3072 numbers in float32, and loses 1e-5 on the CPU
    assert same(ours, theirs)


# ---- Generations on one handle


def test_image_to_image(flux1: Any, photo: Path) -> None:
    """6 of 10 steps are active, and the gate's window is that of the active ones."""
    given = dict(num_inference_steps=10, image_path=photo, image_strength=0.4)
    plain = generate(flux1, **given)
    with pytest.warns(tc.DisabledWarning):
        handle = tc.apply_teacache(flux1, rel_l1_thresh=0.0)
    with handle:
        assert same(generate(flux1, **given), plain)
    assert kinds(handle) == ["computed"] * 6
    with oracle(flux1.transformer, [False, False, True, True, True, False]):
        expected = generate(flux1, **given)
    with tc.apply_teacache(flux1, **ALWAYS) as handle:
        assert same(generate(flux1, **given), expected)
    assert kinds(handle) == ["forced", "computed", "skipped", "skipped", "skipped", "forced"]
    with tc.apply_teacache(flux1) as handle:
        generate(flux1, num_inference_steps=5, image_path=photo, image_strength=1.0)
    assert (handle.stats.generations, handle.stats.total_steps) == (1, 0)


# ---- Weights


def test_weights_of_a_gated_pipeline(tmp_path: Path) -> None:
    """update, load_weights and nn.quantize act on a gated pipeline as on any, and between its generations."""
    config = ModelConfig.dev()
    flux = build.pipeline(Flux1, build.transformer(config))
    names = [k for k, _ in tree_flatten(flux.parameters())]

    def images(flux: Any) -> Iterator[tuple[np.ndarray, mx.array]]:
        transformer = flux.transformer
        yield generate(flux)
        flux.update({"transformer": {"proj_out": {"bias": mx.ones(64, mx.bfloat16)}}})
        yield generate(flux)
        transformer.load_weights([("x_embedder.bias", mx.ones(3072, mx.bfloat16))], strict=False)
        yield generate(flux)
        transformer.load_weights(str(tmp_path / "weights.safetensors"))
        yield generate(flux)
        nn.quantize(transformer, group_size=64, bits=4)
        assert isinstance(transformer.transformer_blocks[0].attn.to_q.layers[0], nn.QuantizedLinear)
        yield generate(flux)

    flux.transformer.save_weights(str(tmp_path / "weights.safetensors"))
    with tc.apply_teacache(flux, **NEVER):
        assert [k for k, _ in tree_flatten(flux.parameters())] == names
        gated = list(images(flux))
    plain = list(images(build.pipeline(Flux1, build.transformer(config))))
    for a, b in zip(gated, plain, strict=True):
        assert same(a, b)
    assert same(plain[0], plain[3])
    assert not any(same(plain[0], plain[i]) for i in (1, 2, 4))


# ---- Refused


@pytest.mark.parametrize("kind", [Flux1Concept, Flux1ConceptFromImage])
def test_the_concept_pipelines_are_refused(kind: type) -> None:
    flux: Any = kind.__new__(kind)
    nn.Module.__init__(flux)
    flux.model_config = ModelConfig.schnell()
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply_teacache(flux)
    assert str(error.value) == (
        f"apply cannot gate {kind.__name__}: it returns attention maps beside the image, which a step whose blocks "
        "are skipped does not have"
    )


def test_another_model(flux1: Any) -> None:
    flux1.model_config = ModelConfig.flux2_klein_4b()
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply_teacache(flux1)
    assert str(error.value) == (
        f"Flux1 has a model configuration with aliases {ModelConfig.flux2_klein_4b().aliases}, and apply knows dev, "
        "schnell, krea-dev, dev-kontext, dev-fill, dev-redux, dev-depth, dev-controlnet-canny, "
        "dev-controlnet-upscaler, dev-fill-catvton, schnell-controlnet-canny"
    )


# ---- Memory


def test_weights_are_not_kept_in_a_second_dtype() -> None:
    """FLUX.1 multiplies float32 activations by bfloat16 weights: MLX casts each weight, and nobody may keep that."""
    kept = {}
    for blocks in (1, 3):
        transformer = build.transformer(ModelConfig.dev(), blocks, blocks)
        flux = build.pipeline(Flux1, transformer)
        seen = []

        class Memory:
            def call_before_loop(self, seen: list[int] = seen, **_: Any) -> None:
                mx.synchronize()
                self.before = mx.get_active_memory()

            def call_in_loop(self, latents: mx.array, seen: list[int] = seen, **_: Any) -> None:
                mx.eval(latents)
                mx.synchronize()
                seen.append(mx.get_active_memory() - self.before)

        flux.callbacks.register(Memory())
        with tc.apply_teacache(flux, **NEVER):
            generate(flux)
        kept[blocks] = max(seen)
    activation = 16 * 3072 * 4
    assert kept[3] - kept[1] < activation
    assert kept[3] < 6 * activation  # anchor, residual, and what a step has in hand
