"""A computed step is mflux's to the last bit, in every pipeline that can be gated and in every way of gating it."""

from pathlib import Path
from typing import Any

import every_pipeline as every
import mlx.core as mx
import pytest
from every_pipeline import ALWAYS, CASES, NEVER, SKIPS, Case, kinds, run, same
from mflux.models.common.lora.layer.linear_lora_layer import LoRALinear
from mlx import nn

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops
from mlx_teacache_fast.mflux import families
from mlx_teacache_fast.step.generation import Generation

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")


def test_the_cases_are_the_table() -> None:
    assert {case.kind for case in CASES} == {kind for family in families.FAMILIES[:2] for kind in family.pipelines}


WAYS: dict[str, dict[str, Any]] = {
    "threshold 0": dict(rel_l1_thresh=0.0),
    "output": NEVER,
    "residual": NEVER | dict(cache="residual", forecast=0),
    "residual, order 2": NEVER | dict(cache="residual", forecast=2),
    "plan of ones": dict(steps="11111"),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            marks=[pytest.mark.slow] if dtype == mx.float32 and case not in every.FEW[:2] else [],
            id=f"{case}-{str(dtype).rpartition('.')[2]}",
        )
        for case in CASES
        for dtype in (mx.float32, mx.bfloat16)
    ],
)
def test_nothing_skipped_is_bit_equal(case: Case, dtype: mx.Dtype, photo: Path, mask: Path) -> None:
    given = case.arguments(photo, mask)
    guidances = [1.0, 4.0] if case.is_flux2 and dtype == mx.float32 else [4.0]
    with case.pipeline(dtype) as flux:
        for guidance in guidances:
            given["guidance"] = guidance
            plain = run(flux, given)
            assert plain[0].std() > 10  # a picture
            for name, how in WAYS.items():
                with tc.apply(flux, **how) as handle:
                    assert same(run(flux, given), plain), name
                assert handle.stats.skipped_count == 0
            for cache in ("output", "residual"):  # the steps before the first skip, which go by the plan
                with tc.apply(flux, steps="11110", cache=cache) as handle:
                    planned = run(flux, given)
                assert same(planned, plain, steps=4), cache
                assert not same(planned, plain)
            assert same(run(flux, given), plain)


@pytest.mark.parametrize("case", every.FEW, ids=str)
@pytest.mark.parametrize(
    "change", [*(pytest.param(change, marks=pytest.mark.slow) for change in ("4 bits", "LoRA")), "LoRA, 4 bits"]
)
def test_quantised_and_with_lora_is_bit_equal(case: Case, change: str, photo: Path, mask: Path) -> None:
    """LoRA also on the layer that the gate takes shift and scale from."""
    given = case.arguments(photo, mask)
    with case.pipeline(mx.bfloat16) as flux:
        transformer = flux.transformer
        if "4 bits" in change:
            nn.quantize(transformer, group_size=64, bits=4)
        if "LoRA" in change:
            block = transformer.transformer_blocks[0]
            modulation = transformer.double_stream_modulation_img if case.is_flux2 else block.norm1
            for i, (parent, name) in enumerate(((modulation, "linear"), (block.attn, "to_q"))):
                layer = getattr(parent, name)
                own = LoRALinear.from_linear(layer if case.is_flux2 else layer.layers[1], r=4)
                own.lora_B = mx.random.normal(own.lora_B.shape, key=mx.random.key(i)) * 0.1
                setattr(parent, name, own if case.is_flux2 else nn.Sequential(layer.layers[0], own))
        mx.eval(flux.parameters())
        plain = run(flux, given)
        for how in (NEVER, NEVER | dict(cache="residual", forecast=1)):
            with tc.apply(flux, **how):
                assert same(run(flux, given), plain)
        with tc.apply(flux, **ALWAYS) as handle:
            assert not same(run(flux, given), plain)
        assert kinds(handle) == SKIPS


@pytest.mark.parametrize("how", [{}, dict(cache="residual", forecast=0)], ids=["output", "residual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_host_read_a_gated_step(
    case: Case, how: dict[str, Any], photo: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a compiled step, from the second on, by the branch, else of the state; nothing else is waited for."""
    read: list[str | None] = []
    settle = Generation.settle
    monkeypatch.setattr(Generation, "settle", lambda self: read.append(settle(self)) or read[-1])
    given = case.arguments(photo, mask) | dict(guidance=4.0)
    with case.pipeline() as flux, tc.apply(flux, **ALWAYS, **how) as handle:
        ops.reset_counters()
        run(flux, given)
    assert kinds(handle) == SKIPS
    gated = 4 if case.how == "cache" else 5  # step 0 fills the cache
    if case in (Case(every.Flux2Klein), Case(every.Flux2KleinEdit)):
        assert ops.counters() == {"reads": 4, "computed": 2, "reused": 2}
    else:
        assert ops.counters() == {"reads": 0, "computed": 0, "reused": 0}
    assert len([kind for kind in read if kind is not None]) == gated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_skips_as_the_gate_does(case: Case, photo: Path, mask: Path) -> None:
    given = case.arguments(photo, mask)
    with case.pipeline() as flux:
        for cache in ("output", "residual"):
            with tc.apply(flux, **ALWAYS, cache=cache) as handle:
                gated = run(flux, given)
            assert kinds(handle) == SKIPS
            with tc.apply(flux, steps="11001", cache=cache):
                assert same(run(flux, given), gated), cache


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_flux2 or case.how], ids=str)
def test_an_eager_skipped_step_calls_no_block(case: Case, photo: Path, mask: Path) -> None:
    """Also where it reuses a residual; and blocks may evaluate what they make."""
    given = case.arguments(photo, mask)
    with case.pipeline() as flux:
        called: list[int] = []
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(flux.transformer, name):
                kind = type(block)

                class Counted(kind):  # type: ignore[misc, valid-type]
                    def __call__(self, *args: Any, **kwargs: Any) -> Any:
                        called.append(1)
                        made = super().__call__(*args, **kwargs)
                        mx.eval(made)
                        return made

                block.__class__ = Counted
        run(flux, given)
        of_a_step = len(called) // 5
        for cache in ("output", "residual"):
            called.clear()
            with tc.apply(flux, steps="11010", cache=cache) as handle:
                run(flux, given)
            assert handle.stats.skipped_count == 2
            assert len(called) == 3 * of_a_step


@pytest.mark.parametrize("case", [Case(every.Flux2Klein), Case(every.Flux2KleinEdit)], ids=str)
def test_a_decision_on_the_host_is_the_graphs(
    case: Case, photo: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case.arguments(photo, mask) | dict(guidance=4.0, num_inference_steps=12)
    with case.pipeline() as flux:
        for cache in ("output", "residual"):
            made = []
            for in_graph in (True, False):
                monkeypatch.setattr("mlx_teacache_fast.step.engine.Engine.in_graph", in_graph)
                with tc.apply(flux, rel_l1_thresh=0.6, cache=cache) as handle:
                    made.append(run(flux, given))
                assert handle.stats.skipped_count > 0
            assert same(*made), cache
