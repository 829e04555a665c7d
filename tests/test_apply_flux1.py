"""``apply`` on mflux's real FLUX.1 pipelines, run by mflux's own ``generate_image``."""

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flux1_pipelines as build
import mlx.core as mx
import numpy as np
import pytest
from flux1_pipelines import generate
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.lora.layer.linear_lora_layer import LoRALinear
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mflux.models.flux.variants.concept_attention.flux_concept import Flux1Concept
from mflux.models.flux.variants.concept_attention.flux_concept_from_image import Flux1ConceptFromImage
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.in_context.flux_in_context_dev import Flux1InContextDev
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.exceptions import StopImageGenerationException
from mlx import nn
from mlx.utils import tree_flatten
from test_apply_flux2 import dies_with_its_last_reference

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.UncalibratedWarning")

ALWAYS = dict(rel_l1_thresh=0.5, coefficients=(0, 0, 0, 0, 0))  # the accumulated distance stays 0: all gated steps skip
NEVER = dict(rel_l1_thresh=1e-9)  # nothing stays below: every step goes through gate and branch, all are computed
KINDS = ["forced", "computed", "skipped", "skipped", "forced"]  # of ALWAYS in 5 steps


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


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Fill paints: the middle."""
    from PIL import Image

    white = np.zeros((64, 64, 3), np.uint8)
    white[16:48, 16:48] = 255
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    Image.fromarray(white).save(path)
    return path


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """mx.compile does nothing.

    mflux runs FLUX.1 eagerly, the gated body is compiled. MLX writes a constant into a fused CPU kernel with 7 digits,
    which loses the last bit of a layer norm's 1/3072 and of attention's 1/sqrt(128). Without fusion all bits are equal.
    """
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def same(a: tuple[np.ndarray, mx.array], b: tuple[np.ndarray, mx.array]) -> bool:
    """Whether all bits of image and latents are equal."""
    return np.array_equal(a[0], b[0]) and mx.array_equal(a[1], b[1]).item()


def kinds(handle: tc.Handle) -> list[str]:
    generation = handle.stats.last_generation
    assert generation is not None
    return [step.kind for step in generation.steps]


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


CASES = [*build.CONFIGS.items(), (Flux1, ModelConfig.schnell), (Flux1, ModelConfig.krea_dev)]


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.NoBenefitWarning")
@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    [(kind, model, dtype) for kind, model in CASES for dtype in (mx.float32, mx.bfloat16)],
    ids=lambda v: str(v).rpartition(".")[2] if isinstance(v, mx.Dtype) else v.__name__,
)
def test_every_pipeline(
    kind: type,
    model: Callable[[], ModelConfig],
    dtype: mx.Dtype,
    transformers: Callable[..., Any],
    photo: Path,
    mask: Path,
    record_property: Callable[[str, object], None],
) -> None:
    config = model()
    transformer = transformers(config, dtype)
    controlnet = build.controlnet(config, dtype=dtype) if kind is Flux1Controlnet else None
    flux = build.pipeline(kind, transformer, config, controlnet)
    given = build.arguments(kind, photo, mask)

    plain = generate(flux, **given)
    assert plain[0].std() > 20  # a picture
    assert plain[1].shape[1] == (32 if kind in (Flux1InContextDev, Flux1InContextFill) else 16)

    with pytest.warns(tc.DisabledWarning):
        handle = tc.apply_teacache(flux, rel_l1_thresh=0.0)
    with handle:
        ops.reset_counters()
        assert same(generate(flux, **given), plain)
        assert ops.counters() == {"reads": 0, "computed": 0, "reused": 0}
        assert kinds(handle) == ["computed"] * 5
        assert type(transformer) is Transformer
    assert "generate_image" not in vars(flux)
    assert same(generate(flux, **given), plain)

    with tc.apply_teacache(flux, **NEVER) as handle:
        ops.reset_counters()
        gated = generate(flux, **given)
        assert ops.counters() == {"reads": 5, "computed": 5, "reused": 0}
        assert kinds(handle) == ["forced", "computed", "computed", "computed", "forced"]
        assert type(transformer) is Transformer
    ulp = mx.abs(gated[1] - plain[1]).max().item() / np.spacing(np.float32(mx.abs(plain[1]).max().item()))
    record_property("ulp_of_the_largest_latent", f"{ulp:g} {kind.__name__} {model.__name__} {dtype}")
    assert ulp <= 16  # see uncompiled(): 0 without fusion; 6.75 at most was seen with it

    with uncompiled():
        plain = generate(flux, **given)
        with tc.apply_teacache(flux, **NEVER):
            assert same(generate(flux, **given), plain)
        with oracle(transformer, [k == "skipped" for k in KINDS]):
            expected = generate(flux, **given)
        assert mx.abs(expected[1] - plain[1]).max().item() > 0.1  # a skip changes the picture
        with tc.apply_teacache(flux, **ALWAYS) as handle:
            ops.reset_counters()
            assert same(generate(flux, **given), expected)
            branches = 3 if controlnet else 5  # a skipped step with a ControlNet has none: it would compute the samples
            assert ops.counters() == {"reads": branches, "computed": 3, "reused": branches - 3}
            assert kinds(handle) == KINDS
            assert type(transformer) is Transformer


def test_controlnet_samples_land_in_the_blocks_that_mflux_puts_them_in(photo: Path, mask: Path) -> None:
    """Three blocks share two samples: the first two blocks get the first one."""
    config = ModelConfig.dev_controlnet_canny()
    controlnet = build.controlnet(config, joint=2, single=2)
    flux = build.pipeline(Flux1Controlnet, build.transformer(config, joint=3, single=3), controlnet=controlnet)
    given = dict(num_inference_steps=4, **build.arguments(Flux1Controlnet, photo, mask))
    with uncompiled():
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
    with uncompiled():
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
    assert kinds(handle) == KINDS
    assert ops.counters()["computed"] == 3 + 3  # the transformer's blocks, and the ControlNet's


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
    with uncompiled():
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
    with uncompiled():
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
    with uncompiled():
        with oracle(flux1.transformer, [False, False, True, True, True, False]):
            expected = generate(flux1, **given)
        with tc.apply_teacache(flux1, **ALWAYS) as handle:
            assert same(generate(flux1, **given), expected)
    assert kinds(handle) == ["forced", "computed", "skipped", "skipped", "skipped", "forced"]
    with tc.apply_teacache(flux1) as handle:
        generate(flux1, num_inference_steps=5, image_path=photo, image_strength=1.0)
    assert (handle.stats.generations, handle.stats.total_steps) == (1, 0)


def test_generations_on_one_handle_are_independent(flux1: Any) -> None:
    """Other seeds, sizes and step counts in between; equal to those of a fresh handle."""
    runs = [dict(seed=1), dict(seed=2, height=96, num_inference_steps=6), dict(seed=3, guidance=1.5), dict(seed=1)]
    with tc.apply_teacache(flux1, **ALWAYS) as handle:
        together = [generate(flux1, **run) for run in runs]
        assert handle.stats.generations == 4
        assert handle.stats.total_steps == 21
        assert handle.stats.skipped_count == 9
    assert same(together[0], together[3])
    for run, image in zip(runs[1:3], together[1:3], strict=True):
        with tc.apply_teacache(flux1, **ALWAYS):
            assert same(generate(flux1, **run), image)
        assert not np.array_equal(image[0][:64], together[0][0])


def test_a_swapped_transformer(flux1: Any, transformers: Callable[..., Any]) -> None:
    other = transformers(ModelConfig.dev(), mx.float32)
    own = flux1.transformer
    with uncompiled():
        flux1.transformer = other
        expected = generate(flux1)
        flux1.transformer = own
        with tc.apply_teacache(flux1, **NEVER):
            first = generate(flux1)
            flux1.transformer = other
            second = generate(flux1)
            flux1.transformer = own
            third = generate(flux1)
    assert same(second, expected)
    assert same(first, third)
    assert not mx.array_equal(first[1], second[1])
    assert type(other) is Transformer


def test_two_pipelines_share_a_transformer(flux1: Any, photo: Path) -> None:
    kontext = build.pipeline(Flux1Kontext, flux1.transformer)
    with uncompiled():
        plain = generate(flux1), generate(kontext, image_path=photo)
        with tc.apply_teacache(flux1, **NEVER) as one, tc.apply_teacache(kontext, **NEVER) as two:
            for _ in range(2):
                assert same(generate(flux1), plain[0])
                assert same(generate(kontext, image_path=photo), plain[1])
            assert (one.stats.generations, two.stats.generations) == (2, 2)
            one.restore()
            assert same(generate(kontext, image_path=photo), plain[1])
            assert same(generate(flux1), plain[0])
        assert (one.stats.generations, two.stats.generations) == (2, 3)


# ---- What goes wrong in a generation


class Boom(Exception):
    pass


class AtStep:
    """A callback that does something in one step, once."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step = step
        self.action = action

    def call_in_loop(self, t: int, **_: Any) -> None:
        if t == self.step:
            self.step = -1
            self.action()


def fail(error: type[BaseException]) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "raised"), [(Boom, Boom), (KeyboardInterrupt, StopImageGenerationException)], ids=["error", "ctrl-c"]
)
@pytest.mark.parametrize("setting", [ALWAYS, dict(rel_l1_thresh=0.0)], ids=["gated", "off"])
def test_a_failure_in_a_callback(
    flux1: Any, setting: dict[str, Any], error: type[BaseException], raised: type[BaseException]
) -> None:
    before = snapshot(flux1)
    interrupted = []

    class Interrupted:
        def call_interrupt(self, t: int, **_: Any) -> None:
            interrupted.append(t)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tc.DisabledWarning)
        handle = tc.apply_teacache(flux1, **setting)
    with handle:
        expected = generate(flux1)
        flux1.callbacks.register(AtStep(2, fail(error)))
        flux1.callbacks.register(Interrupted())
        with pytest.raises(raised):
            generate(flux1)
        assert interrupted == ([2] if error is KeyboardInterrupt else [])
        assert type(flux1.transformer) is Transformer
        assert handle.stats.generations == 1
        assert same(generate(flux1), expected)  # starts from nothing
        assert handle.stats.generations == 2
    flux1.callbacks.in_loop.pop()
    flux1.callbacks.interrupt.pop()
    assert snapshot(flux1) == before


@pytest.mark.parametrize("place", ["transformer_blocks", "single_transformer_blocks", "norm_out", "time_text_embed"])
def test_a_failure_in_the_transformer(flux1: Any, place: str) -> None:
    """In the blocks it fails while they are traced, with the stand-ins in place."""
    transformer = flux1.transformer
    module = getattr(transformer, place)
    module = module[0] if isinstance(module, list) else module
    before = snapshot(flux1)
    kind = type(module)

    class Failing(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise Boom

    with tc.apply_teacache(flux1, **ALWAYS) as handle:
        module.__class__ = Failing
        try:
            with pytest.raises(Boom):
                generate(flux1)
        finally:
            module.__class__ = kind
        assert handle.stats.generations == 0
        generate(flux1, num_inference_steps=4)
        assert handle.stats.generations == 1
    assert snapshot(flux1) == before


def test_restore_inside_a_callback(flux1: Any) -> None:
    before = snapshot(flux1)
    plain = generate(flux1)
    handle = tc.apply_teacache(flux1, **ALWAYS)
    action = AtStep(1, handle.restore)
    flux1.callbacks.register(action)
    generate(flux1)
    flux1.callbacks.in_loop.remove(action)
    assert snapshot(flux1) == before
    assert same(generate(flux1), plain)


def test_a_generation_inside_a_callback(flux1: Any) -> None:
    with tc.apply_teacache(flux1, **ALWAYS) as handle:
        expected, inner = generate(flux1), generate(flux1, seed=2, num_inference_steps=4)
        nested = []
        action = AtStep(2, lambda: nested.append(generate(flux1, seed=2, num_inference_steps=4)))
        flux1.callbacks.register(action)
        assert np.array_equal(generate(flux1)[0], expected[0])
        flux1.callbacks.in_loop.remove(action)
        assert same(nested[0], inner)
        assert handle.stats.generations == 4
        assert kinds(handle) == KINDS


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_another_pipeline_inside_a_callback(flux1: Any, photo: Path, gated: bool) -> None:
    """It has the same transformer."""
    kontext = build.pipeline(Flux1Kontext, flux1.transformer)
    with tc.apply_teacache(flux1, **ALWAYS) as handle, contextlib.ExitStack() as stack:
        if gated:
            stack.enter_context(tc.apply_teacache(kontext, **ALWAYS))
        expected, inner = generate(flux1), generate(kontext, image_path=photo)
        nested = []
        action = AtStep(2, lambda: nested.append(generate(kontext, image_path=photo)))
        flux1.callbacks.register(action)
        assert same(generate(flux1), expected)
        flux1.callbacks.in_loop.remove(action)
        assert same(nested[0], inner)
        assert kinds(handle) == KINDS


# ---- What it changes, and takes back


def snapshot(flux: Any) -> dict[str, Any]:
    transformer = flux.transformer
    return {
        "class": type(flux),
        "attributes": {k: id(v) for k, v in vars(flux).items()},
        "children": [(k, id(v)) for k, v in flux.items()],
        "transformer class": type(transformer),
        "transformer": [(k, id(v)) for k, v in transformer.items()],
        "transformer attributes": sorted(vars(transformer)),
        "blocks": [list(map(id, (*transformer.transformer_blocks, *transformer.single_transformer_blocks)))],
        "block 0": [(k, id(v)) for k, v in transformer.transformer_blocks[0].items()],
        "norm": [(k, id(v)) for k, v in transformer.transformer_blocks[0].norm1.items()],
        "parameters": [(k, id(v)) for k, v in tree_flatten(flux.parameters())],
        "callbacks": {k: list(map(id, v)) for k, v in vars(flux.callbacks).items()},
    }


def test_restore_leaves_everything_as_it_was(flux1: Any) -> None:
    before = snapshot(flux1)
    handle = tc.apply_teacache(flux1, **ALWAYS)
    generate(flux1)
    between = snapshot(flux1)
    for key in before.keys() - {"attributes", "callbacks"}:
        assert between[key] == before[key], key
    assert set(between["attributes"]) - set(before["attributes"]) == {"generate_image", "_mlx_teacache_fast_handle"}
    handle.restore()
    handle.restore()
    assert snapshot(flux1) == before


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
    with uncompiled():
        with tc.apply_teacache(flux, **NEVER):
            assert [k for k, _ in tree_flatten(flux.parameters())] == names
            gated = list(images(flux))
        plain = list(images(build.pipeline(Flux1, build.transformer(config))))
    for a, b in zip(gated, plain, strict=True):
        assert same(a, b)
    assert same(plain[0], plain[3])
    assert not any(same(plain[0], plain[i]) for i in (1, 2, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_transformer_with_lora_is_gated(bits: int) -> None:
    """Quantised layers inside mflux's LoRA layers, one of them the layer that the gate takes shift and scale from."""
    transformer = build.transformer(ModelConfig.dev())
    nn.quantize(transformer, group_size=64, bits=bits)
    block = transformer.transformer_blocks[0]
    for module, name in ((block.norm1, "linear"), (block.attn, "to_q"), (transformer.norm_out, "linear")):
        layers = getattr(module, name).layers
        wrapped = LoRALinear.from_linear(layers[1], r=4)
        wrapped.lora_B = mx.random.normal(wrapped.lora_B.shape) * 0.1
        setattr(module, name, nn.Sequential(layers[0], wrapped))
    flux = build.pipeline(Flux1, transformer)
    with uncompiled():
        plain = generate(flux)
        with tc.apply_teacache(flux, **NEVER):
            assert same(generate(flux), plain)
        with oracle(transformer, [k == "skipped" for k in KINDS]):
            expected = generate(flux)
        with tc.apply_teacache(flux, **ALWAYS):
            assert same(generate(flux), expected)


# ---- Memory


@pytest.mark.parametrize("setting", [ALWAYS, NEVER, dict(steps="11010")], ids=["skips", "computes", "plan"])
def test_weights_are_freed_with_the_pipeline(setting: dict[str, Any]) -> None:
    gc.collect()
    before = mx.get_active_memory()
    flux = build.pipeline(Flux1, build.transformer(ModelConfig.dev()))
    weights = mx.get_active_memory() - before
    with tc.apply_teacache(flux, **setting) as handle:
        generate(flux)
    del flux, handle
    gc.collect()
    assert mx.get_active_memory() - before < weights / 1000


@pytest.mark.parametrize("setting", [ALWAYS, NEVER, dict(rel_l1_thresh=0.0)], ids=["skips", "computes", "off"])
def test_memory_saver_frees_the_transformer_before_the_image_is_decoded(setting: dict[str, Any]) -> None:
    from mflux.callbacks.instances.memory_saver import MemorySaver

    flux = build.pipeline(Flux1, build.transformer(ModelConfig.dev()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tc.DisabledWarning)
        handle = tc.apply_teacache(flux, **setting)
    flux.callbacks.register(MemorySaver(flux, keep_transformer=False, cache_limit_bytes=None))
    alive = {
        "transformer": weakref.ref(flux.transformer),
        "block": weakref.ref(flux.transformer.transformer_blocks[0]),
        "layer": weakref.ref(flux.transformer.single_transformer_blocks[0].attn.to_q.layers[0]),
    }
    seen = []
    decode = flux.vae.decode

    def decoding(latents: mx.array) -> mx.array:
        seen.extend(name for name, reference in alive.items() if reference() is not None)
        seen.append("decoding")
        return decode(latents)

    object.__setattr__(flux.vae, "decode", decoding)
    generate(flux)
    assert seen == ["decoding"]
    assert handle.stats.total_steps == 5
    handle.restore()
    with pytest.raises(tc.IncompatibleModelError, match="this Flux1 has no transformer any more"):
        tc.apply_teacache(flux)


def test_a_generation_leaves_nothing_behind(flux1: Any) -> None:
    """After the first one, which fills caches of compiled kernels."""
    with tc.apply_teacache(flux1, **ALWAYS):
        generate(flux1)
        used = []
        for _ in range(3):
            flux1.recorder.latents = []
            gc.collect()
            used.append(mx.get_active_memory())
            generate(flux1)
    assert used[0] == used[1] == used[2]


def test_the_handle_does_not_keep_the_pipeline(transformers: Callable[..., Any]) -> None:
    flux = build.pipeline(Flux1, transformers(ModelConfig.dev()))
    handle = tc.apply_teacache(flux, **ALWAYS)
    generate(flux, num_inference_steps=4)
    pipelines = [flux]
    del flux
    assert dies_with_its_last_reference(pipelines)
    handle.restore()


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


# ---- Memory, and ways around the gate


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


def test_a_transformer_that_is_replaced_in_a_callback(flux1: Any) -> None:
    replacement = build.transformer(ModelConfig.dev())
    before = flux1.transformer
    action = AtStep(2, lambda: setattr(flux1, "transformer", replacement))
    flux1.callbacks.register(action)
    try:
        with tc.apply_teacache(flux1, **ALWAYS) as handle:
            with pytest.warns(tc.TeaCacheWarning) as warned:
                generate(flux1)
            assert handle.stats.generations == 0
    finally:
        flux1.callbacks.in_loop.remove(action)
        flux1.transformer = before
    assert str(warned[-1].message) == (
        "this generation is not counted: 3 of its 5 steps went through the gate "
        "(was the transformer replaced in a callback?)"
    )
    assert type(before) is type(replacement) is Transformer
