"""Pipelines that are not mflux's, programs that make theirs themselves, and what the documentation says of families."""

import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mflux.cli.parser.parsers import CommandLineParser
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mlx import nn

import mlx_teacache_fast as tc
from mlx_teacache_fast.errors import DisabledWarning
from mlx_teacache_fast.mflux import families
from mlx_teacache_fast.mflux.family import Command

MING = "mflux.models.ming_image.variants.ming_image"  # not in every mflux
DOCS = Path(__file__).parents[1] / "docs" / "families.md"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def __call__(self, x: mx.array) -> mx.array:
        return self.mix(mx.softmax(x @ x.swapaxes(-1, -2), axis=-1) @ x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.RMSNorm(16)

    def __call__(self, x: mx.array, scale: mx.array) -> mx.array:
        return x + self.attention(self.norm(x) * scale)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.time, self.out = [Block(), Block()], nn.Linear(1, 16), nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def __call__(self, x: mx.array, t: mx.array) -> mx.array:
        scale = 1 + self.time(t.reshape(1, 1))
        for block in self.blocks:
            x = block(x, scale)
        return self.out(x)


class Painter:
    """No class, callback or scheduler of mflux's."""

    def __init__(self) -> None:
        mx.random.seed(1)
        self.transformer = Transformer()
        mx.eval(self.transformer.parameters())

    def predict(self, x: mx.array, t: mx.array) -> mx.array:
        return self.transformer(x, t)

    def paint(self, prompt: str, steps: int = 10) -> np.ndarray:
        x = mx.random.normal((1, 64, 16), key=mx.random.key(len(prompt)))
        for i in range(steps):
            x = x - self.predict(x, mx.array(1 - i / steps)) / steps
            mx.eval(x)
        return np.array(x)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """Gated as the documentation has it; the registration ends with the test."""
    monkeypatch.setattr(families, "_registered", [])
    _, example, _ = re.split(r"<!-- /?example -->\n", DOCS.read_text())
    names: dict[str, Any] = {"Painter": Painter}
    exec(example.strip().removeprefix("```python").removesuffix("```"), names)
    assert names["handle"].stats.skipped_count == 10
    return names["painter"]


def test_somebody_elses_pipeline(painter: Painter) -> None:
    plain = painter.paint("a red apple")
    before = dict(vars(painter))
    coefficients = (0.0, 0.0, 0.0, 1.0, 0.0)
    for all_compute in (
        dict(steps="1" * 10),
        dict(tolerance=1e-9),
        dict(rel_l1_thresh=1e-9, coefficients=coefficients),
    ):
        with tc.apply(painter, **all_compute) as handle:
            assert np.array_equal(painter.paint("a red apple"), plain)
        assert handle.stats.generations == 1
    called: list[int] = []
    own = Transformer.__call__
    with (
        pytest.MonkeyPatch.context() as patch,
        tc.apply(painter, steps="1101010101", forecast=0, corrector=0) as handle,
    ):
        patch.setattr(Transformer, "__call__", lambda *args: called.append(1) or own(*args))
        gated = painter.paint("a red apple")
    assert len(called) == 6

    class Reuses(Painter):
        def predict(self, x: mx.array, t: mx.array) -> mx.array:
            self.last = super().predict(x, t) if round(10 * (1 - t.item())) in (0, 1, 3, 5, 7, 9) else self.last
            return self.last

    assert np.array_equal(gated, Reuses().paint("a red apple"))
    with tc.apply(painter, rel_l1_thresh=0.5, coefficients=(0,) * 5) as handle:
        painter.paint("a red apple")
    assert handle.stats.last_generation.steps[2].rel_l1 > 0
    assert handle.variant_id == "Painter"
    assert vars(painter) == before


def test_tune_is_for_mfluxs(painter: Painter) -> None:
    before = dict(vars(painter))
    with pytest.raises(
        tc.IncompatibleModelError, match=r"^tune is for mflux's pipelines: Painter has no generate_image$"
    ):
        tc.tune(painter, ["a red apple"])
    assert vars(painter) == before


def test_published_coefficients_of_another_model(painter: Painter) -> None:
    """As a pipeline wants them that runs that model in its own way."""
    coefficients = tc.VARIANTS["flux1-krea-dev"].coefficients
    told = "^Painter is used with another model's coefficients, those of flux1-krea-dev"
    with (
        pytest.warns(tc.UncalibratedWarning, match=told),
        tc.apply(painter, rel_l1_thresh=0.3, coefficients=coefficients) as handle,
    ):
        painter.paint("a red apple")
    assert handle.stats.generations == 1


def test_a_corrector_takes_back(painter: Painter) -> None:
    plain = painter.paint("a red apple", 20)
    off = []
    for corrector in (0, 0.75):
        with tc.apply(painter, tolerance=1, corrector=corrector) as handle:
            off.append(np.abs(painter.paint("a red apple", 20) - plain).mean())
        assert handle.stats.skipped_count > 5
    assert off[1] < off[0]


def family(**changes: Any) -> tc.Family:
    given: dict[str, Any] = dict(
        pipelines=(Painter,),
        runs="paint",
        methods=("predict",),
        tap=tc.Tap(at="blocks.0.attention", signal=tc.modulated(0)),
        schedule=lambda _, given: [1 - i / 10 for i in range(11)],
    )
    return tc.Family(**given | changes)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "register takes a Family of one or more pipelines, got None"),
        (family(methods=("forward",)), "Painter has no method 'forward', which its family names"),
        (family(runs="draw"), "Painter has no method 'draw', which its family names"),
        (
            family(commands={"mflux-generate-painter": Command(pipeline=Painter)}),
            "commands are mflux's: of a registered family none is known",
        ),
        (family(is_several=True), "is_several is for loops that tell mflux's callbacks when a step is done"),
    ],
    ids=["none", "no such step", "no such method", "commands", "several"],
)
def test_bad_families(what: Any, message: str) -> None:
    before = families.all_families()
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.register(what)
    assert str(error.value) == message
    assert families.all_families() == before


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (tc.Tap(at="layers.0", signal=tc.modulated(0)), "Transformer has no layers.0, where its family's tap is"),
        (tc.Tap(at="blocks.7", signal=tc.modulated(0)), "Transformer has no blocks.7, where its family's tap is"),
        (tc.Tap(at="unused", signal=tc.modulated(0)), "a step did not call block 0 of the transformer"),
        (
            tc.Tap(at="blocks.0", signal=tc.modulated("hidden_states")),
            "tap must take an argument that Block is called with (by place or name: 0, 1), got 'hidden_states'",
        ),
    ],
    ids=["no list", "no block", "never called", "no argument"],
)
def test_a_tap_that_is_not_there(tap: tc.Tap, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", [])
    tc.register(family(tap=tap))
    painter = Painter()
    plain = painter.paint("a red apple")
    with (
        tc.apply(painter, rel_l1_thresh=0.5, coefficients=(0,) * 5),
        pytest.raises(tc.InternalStateError) as error,
    ):
        painter.paint("a red apple")
    assert message in str(error.value)
    assert np.array_equal(painter.paint("a red apple"), plain)


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")
def test_gate_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", [])
    tc.register(family())
    own = Painter.__init__
    early = Painter()
    with tc.gate_all(budget=0.5) as handles:
        painters = [Painter() for _ in range(2)]
        for painter in (early, *painters):
            painter.paint("a red apple")
        assert [handle.stats.skipped_count for handle in handles] == [5, 5]
    assert all("paint" not in vars(painter) for painter in painters)
    assert Painter.__init__ is own
    late: list[Painter] = []

    def fails() -> None:
        with tc.gate_all(budget=0.5):
            late.append(Painter())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "paint" not in vars(late[0])
    assert Painter.__init__ is own
    with pytest.raises(tc.TeaCacheValueError, match="budget must be"), tc.gate_all(budget=2):
        pass
    with pytest.warns(DisabledWarning), tc.gate_all(budget=1):
        Painter()


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")
def test_gate_all_gates_a_pipeline_once_and_says_which_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ming_image = pytest.importorskip(MING)

    class Own(Painter):
        def __init__(self) -> None:
            super().__init__()
            self.is_finished = True

        def paint(self, prompt: str, steps: int = 10) -> np.ndarray:
            assert bool(self)
            return super().paint(prompt, steps)

    monkeypatch.setattr(families, "_registered", [])
    tc.register(family())
    tc.register(family(pipelines=(Own,)))
    with tc.gate_all(budget=0.5) as handles:
        painter = Own()
        painter.paint("a red apple")
        assert [handle.stats.skipped_count for handle in handles] == [5]
        # A parser without steps, and a pipeline that cannot be gated.
        monkeypatch.setattr(sys, "argv", ["x"])
        assert not hasattr(CommandLineParser(description="x").parse_args(), "steps")
        monkeypatch.setattr(ming_image.MingImageInitializer, "init", lambda *_, **__: None)
        with pytest.warns(tc.NoBenefitWarning, match="this MingImage is not gated: its 12 steps differ too much"):
            ming_image.MingImage()
        assert len(handles) == 1


def test_gate_all_leaves_a_program_its_errors(tmp_path: Path) -> None:
    """It may go on after one."""
    with tc.gate_all(), pytest.raises(FileNotFoundError, match="Model not found"):
        Flux2Klein(model_path=str(tmp_path / "none"))


def test_a_registered_class_may_be_one_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", [])
    ming_image = pytest.importorskip(MING)
    tap = tc.Tap(at="noise_refiner.0.attention", signal=tc.modulated(0))
    ming = tc.Family(pipelines=(ming_image.MingImage,), factories=("_predict",), tap=tap)
    tc.register(ming)
    assert families.match(None, ming_image.MingImage).family is ming
