"""What a skipped step gets: extrapolated over sigma from the last computed steps, against numpy in float64."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flux1_pipelines as build
import mlx.core as mx
import numpy as np
import pytest
from conftest import Generate
from every_pipeline import ALWAYS, edit_pipeline, kinds
from flux1_pipelines import generate as generate_flux1
from hypothesis import given
from hypothesis import strategies as st
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.utils.apple_silicon import AppleSiliconUtil

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops
from mlx_teacache_fast.record.stats import KINDS
from mlx_teacache_fast.step.forecast import MAX_GAIN, weights
from mlx_teacache_fast.step.generation import Generation
from mlx_teacache_fast.step.rules import budgeted

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.UncalibratedWarning")

# ---- Weights


def by_numpy(sigma: float, known: list[float], order: int) -> np.ndarray:
    """Weights for the value at ``sigma`` of the polynomial through the newest ``order + 1`` values, by its moments."""
    nodes = np.array(known[: order + 1], np.float64)
    powers = np.arange(order + 1)
    return np.linalg.solve(nodes[None, :] ** powers[:, None], np.float64(sigma) ** powers)


def guarded(sigma: float, known: list[float], order: int) -> np.ndarray:
    """With the guard: nearer than it is, at most one gap away, and of second order only while little is amplified."""
    if order == 0 or len(known) == 1:
        return np.ones(1)
    gap = known[0] - known[1]
    distance = (sigma - known[0]) / gap
    near = known[0] + gap * distance / np.sqrt(1 + distance**2)
    if order == 2 and len(known) > 2 and np.abs(w := by_numpy(near, known, 2)).sum() <= 4:
        return w
    return by_numpy(near, known, 1)


steps = st.lists(st.floats(0.01, 0.1), min_size=4, max_size=8)  # between sigmas


@given(steps, st.integers(0, 2), st.data())
def test_exact_for_polynomials_of_the_order_without_the_guard(
    differences: list[float], order: int, data: st.DataObject
) -> None:
    sigmas = (1 - np.cumsum(differences)).tolist()
    known, sigma = sigmas[-2::-1], sigmas[-1]
    found = weights(sigma, known, order, reach=math.inf, max_gain=math.inf)
    assert found == pytest.approx(by_numpy(sigma, known, order), rel=1e-6)
    polynomial = np.polynomial.Polynomial(data.draw(st.lists(st.floats(-3, 3), min_size=1, max_size=order + 1)))
    values = [polynomial(s) for s in known[: order + 1]]
    assert np.dot(found, values) == pytest.approx(polynomial(sigma), abs=1e-8)


@given(steps, st.integers(0, 2))
def test_the_guard(differences: list[float], order: int) -> None:
    sigmas = (1 - np.cumsum(differences)).tolist()
    known, sigma = sigmas[-2::-1], sigmas[-1]
    found = weights(sigma, known, order)
    assert len(found) == order + 1
    assert sum(found) == pytest.approx(1)
    expected = guarded(sigma, known, order)
    assert found[: len(expected)] == pytest.approx(expected, rel=1e-6)
    assert found[len(expected) :] == [0.0] * (order + 1 - len(expected))


def test_lower_orders_while_there_are_few_steps() -> None:
    free: dict[str, float] = dict(reach=math.inf, max_gain=math.inf)
    assert weights(0.5, [], 2) == [0, 0, 0]
    assert weights(0.5, [0.6], 2) == [1, 0, 0]
    assert weights(0.5, [0.6, 0.7], 2, **free) == pytest.approx([2, -1, 0])
    assert weights(0.5, [0.6, 0.7, 0.8], 2, **free) == pytest.approx([3, -3, 1])
    assert weights(0.5, [0.6, 0.7, 0.8], 1, **free) == pytest.approx([2, -1])
    assert weights(0.5, [0.6, 0.7, 0.8], 0) == [1]


def test_a_schedule_that_stands_still_is_not_divided_by() -> None:
    assert weights(0.5, [0.6, 0.6, 0.8], 2) == [1, 0, 0]
    assert weights(0.5, [0.6, 0.7, 0.7], 2, reach=math.inf) == pytest.approx([2, -1, 0])


def test_the_guard_across_a_wide_gap() -> None:
    """Three neighbours, then further and further away: nearly one gap at last, and of first order."""
    orders, reached = [], []
    for gap in range(1, 40):
        found = weights(0.9 - 0.01 * gap, [0.9, 0.92, 0.94], 2)
        assert sum(map(abs, found)) <= MAX_GAIN
        orders.append(np.count_nonzero(found) - 1)
        reached.append((0.9 - np.dot(found, [0.9, 0.92, 0.94])) / 0.02)
    assert orders == sorted(orders, reverse=True)
    assert set(orders) == {1, 2}
    assert reached == sorted(reached)
    assert 0.44 < reached[0] < 0.45  # of half a gap
    assert 0.99 < reached[-1] < 1


# ---- The output, in every kind of pipeline: what mflux's scheduler was given follows from the latents


class Noises:
    """Of a generation: what the scheduler was given in each step, and the schedule."""

    def call_before_loop(self, config: Any, **_: Any) -> None:
        self.noises: list[np.ndarray] = []
        self.sigmas = np.array(config.scheduler.sigmas, np.float64)[config.init_time_step :].tolist()
        scheduler, step = config.scheduler, config.scheduler.step

        def noting(**arguments: Any) -> mx.array:
            self.noises.append(np.array(arguments["noise"].astype(mx.float32), np.float64))
            return step(**arguments)

        object.__setattr__(scheduler, "step", noting)

    def assert_forecast(self, plan: list[bool], order: int) -> None:
        """Each skipped step's noise is numpy's extrapolation of the computed ones'."""
        computed: list[int] = []
        for i, computes in enumerate(plan):
            if computes:
                computed.insert(0, i)
                continue
            w = guarded(self.sigmas[i], [self.sigmas[j] for j in computed], order)
            expected = sum(wk * self.noises[j] for wk, j in zip(w, computed, strict=False))
            assert np.abs(self.noises[i] - expected).max() < 1e-5 * np.abs(expected).max(), i


@contextlib.contextmanager
def noises(flux: Any) -> Iterator[Noises]:
    noting = Noises()
    flux.callbacks.register(noting)
    try:
        yield noting
    finally:
        flux.callbacks.before_loop[:] = [c for c in flux.callbacks.before_loop if c is not noting]


PLAN = [True, True, True, False, True, False, False, True]
PLAN_TEXT = "".join("01"[computes] for computes in PLAN)


def assert_output_is_forecast(flux: Any, run: Callable[[], Any], order: int) -> None:
    with noises(flux) as noting:
        with tc.apply(flux, steps=PLAN, forecast=order, cache="output") as handle:
            run()
        assert [kind != "skipped" for kind in kinds(handle)] == PLAN
        noting.assert_forecast(PLAN, order)
        with tc.apply(flux, forecast=order, cache="output", **ALWAYS) as handle:
            run()
        decided = [kind != "skipped" for kind in kinds(handle)]
        assert decided.count(False) >= 3
        noting.assert_forecast(decided, order)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_output_of_flux2(flux: Any, generate: Generate, order: int, guidance: float) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=8, height=64, width=64, guidance=guidance)
    assert_output_is_forecast(flux, lambda: generate(**arguments), order)


def test_output_of_flux2_uncompiled(flux: Any, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppleSiliconUtil, "is_m1_or_m2", lambda: True)
    arguments: dict[str, Any] = dict(num_inference_steps=8, height=64, width=64, guidance=4.0)
    assert_output_is_forecast(flux, lambda: generate(**arguments), 1)


def test_output_of_image_to_image(flux: Any, generate: Generate, photo: Path) -> None:
    """Sigmas are those of the active steps."""
    arguments: dict[str, Any] = dict(num_inference_steps=10, image_path=photo, image_strength=0.2, height=64, width=64)
    assert_output_is_forecast(flux, lambda: generate(**arguments), 2)


@pytest.mark.parametrize("model", ["flux2_klein_base_4b", "flux2_klein_9b_kv"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_output_of_edit(photo: Path, guidance: float, model: str) -> None:
    edit = edit_pipeline()
    edit.model_config = getattr(ModelConfig, model)()

    def run() -> None:
        arguments: dict[str, Any] = dict(image_paths=[photo], guidance=guidance, num_inference_steps=8)
        edit.generate_image(seed=1, prompt="red apple", height=64, width=64, **arguments)

    assert_output_is_forecast(edit, run, 1)


@pytest.mark.parametrize("kind", build.CONFIGS, ids=lambda kind: kind.__name__)
def test_output_of_flux1(kind: type, photo: Path, mask: Path) -> None:
    config = build.CONFIGS[kind]()
    transformer = build.transformer(config, dtype=mx.float32)
    controlnet = build.controlnet(config, dtype=mx.float32) if kind is Flux1Controlnet else None
    flux = build.pipeline(kind, transformer, config, controlnet)
    given = build.arguments(kind, photo, mask)
    assert_output_is_forecast(flux, lambda: generate_flux1(flux, num_inference_steps=8, **given), 1)


# ---- The residual: mflux's forward pass with every block computed, and in skipped steps numpy's extrapolation instead


class Forecaster:
    """Stands in for the first block and for the layer after the blocks, which see what goes in and what comes out."""

    def __init__(self, transformer: Any, plan: list[bool], sigmas: list[float], order: int, calls: int) -> None:
        self.first, self.norm_out = transformer.transformer_blocks[0], transformer.norm_out
        self.plan, self.sigmas, self.order, self.calls = plan, sigmas, order, calls
        self.residuals: list[dict[int, np.ndarray]] = [{} for _ in range(calls)]  # of each call of a step
        self.count = 0

    def block(self, *args: Any, **kwargs: Any) -> Any:
        self.x = kwargs["hidden_states"]
        return self.first(*args, **kwargs)

    def norm(self, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        (step, call), self.count = divmod(self.count, self.calls), self.count + 1
        x, residuals = np.array(self.x, np.float64), self.residuals[call]
        if self.plan[step]:
            residuals[step] = np.array(tokens, np.float64) - x
        else:
            computed = sorted(residuals, reverse=True)
            known = [self.sigmas[i] for i in computed]
            w = guarded(self.sigmas[step], known, self.order)
            tokens = mx.array(x + sum(wk * residuals[i] for wk, i in zip(w, computed, strict=False))).astype(mx.float32)
        return self.norm_out(tokens, *args, **kwargs)


class Calls:
    """A function that stands in a module's place."""

    def __new__(cls, function: Callable[..., Any]) -> Any:
        from mlx import nn

        class Module(nn.Module):  # type: ignore[misc, name-defined]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        return Module()


@contextlib.contextmanager
def oracle(transformer: Any, **how: Any) -> Iterator[None]:
    forecaster = Forecaster(transformer, **how)
    blocks = transformer.transformer_blocks
    transformer.transformer_blocks = [Calls(forecaster.block), *blocks[1:]]
    transformer.norm_out = Calls(forecaster.norm)
    try:
        yield
    finally:
        transformer.transformer_blocks, transformer.norm_out = blocks, forecaster.norm_out


def assert_residual_is_forecast(flux: Any, run: Callable[[], Any], order: int, calls: int) -> None:
    with noises(flux) as noting:
        run()
        plain = noting.noises
        for how in (dict(steps=PLAN), ALWAYS):
            with tc.apply(flux, forecast=order, cache="residual", **how) as handle:
                run()
            plan, found = [kind != "skipped" for kind in kinds(handle)], noting.noises
            assert plan == PLAN or how is ALWAYS
            with oracle(flux.transformer, plan=plan, sigmas=noting.sigmas, order=order, calls=calls):
                run()
            largest = np.abs(plain[-1]).max()
            assert max(np.abs(a - b).max() for a, b in zip(found, noting.noises, strict=True)) < 1e-4 * largest
            assert np.abs(found[-1] - plain[-1]).max() > 1e-3 * largest


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_residual_of_flux2(
    flux: Any, generate: Generate, order: int, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AppleSiliconUtil, "is_m1_or_m2", lambda: True)  # the oracle looks at arrays
    monkeypatch.setattr(ModelConfig, "precision", mx.float32)  # bfloat16 latents would make much of little
    arguments: dict[str, Any] = dict(num_inference_steps=8, height=64, width=64, guidance=guidance)
    assert_residual_is_forecast(flux, lambda: generate(**arguments), order, calls=2 if guidance > 1 else 1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_residual_of_flux1(order: int, photo: Path, mask: Path) -> None:
    kind = next(iter(build.CONFIGS))
    flux = build.pipeline(kind, build.transformer(build.CONFIGS[kind](), dtype=mx.float32))
    given = build.arguments(kind, photo, mask)
    assert_residual_is_forecast(flux, lambda: generate_flux1(flux, num_inference_steps=8, **given), order, calls=1)


@pytest.mark.parametrize("cache", ["residual", "output"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_compiled_as_uncompiled(
    flux: Any, generate: Generate, cache: Any, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=8, height=64, width=64, guidance=guidance)
    pictures = []
    for uncompiled_step in (False, True):
        monkeypatch.setattr(AppleSiliconUtil, "is_m1_or_m2", lambda value=uncompiled_step: value)
        for how in (dict(steps=PLAN), ALWAYS):
            with tc.apply(flux, forecast=2, cache=cache, **how):
                pictures.append(generate(**arguments).astype(int))
    # Steps in bfloat16 make more of a last bit.
    assert np.abs(pictures[0] - pictures[2]).max() <= 3
    assert np.abs(pictures[1] - pictures[3]).max() <= 3


def gated_policy(forecast: int) -> tc.Policy:
    return tc.Policy.of(rel_l1_thresh=0.5, coefficients=(0, 0, 0, 1, 0), forecast=forecast)


def test_history_of_a_generation() -> None:
    """Computed and forced steps count, skipped ones do not; a numerical miss forgets all, itself too."""
    sigmas = [0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2, 0.0]
    generation = Generation(gated_policy(2), 7, lambda: sigmas)
    codes = {kind: float(code) for code, kind in enumerate(KINDS)}
    known: list[float] = []
    for i, kind in enumerate(("forced", "computed", "skipped", "computed", "numerical-miss", "computed", "forced")):
        expected = [0.0, 0.0, 0.0]
        if known:
            found = guarded(sigmas[i], known, 2)
            expected[: len(found)] = found
        assert generation.weights().tolist() == pytest.approx(expected, rel=1e-6)
        assert generation.force().item() == {0: 1, 6: 2}.get(i, 0)
        generation.record(mx.array([0.0, codes[kind], 0, 0, 0, 0, 1, 1]))
        assert generation.settle() == kind
        assert generation.settle() is None
        if kind in ("forced", "computed"):
            known.insert(0, sigmas[i])
        elif kind == "numerical-miss":
            known.clear()
    assert generation.is_over
    assert [s.kind for s in generation.stats(1.0).steps][3:5] == ["computed", "numerical-miss"]


def test_a_scheduler_without_sigmas_has_even_steps() -> None:
    for sigmas in ([], [1.0, 0.9]):
        generation = Generation(gated_policy(1), 4, lambda sigmas=sigmas: sigmas)
        generation.record("computed", is_kept=True)
        generation.record("computed", is_kept=True)
        assert generation.weights().tolist() == pytest.approx([1 + math.sqrt(0.5), -math.sqrt(0.5)])


def test_a_polynomial_that_overflows_forgets_what_was_kept(flux: Any, generate: Generate) -> None:
    """Every gated step is a numerical miss: it computes, and none of them is looked at for a forecast."""
    arguments: dict[str, Any] = dict(num_inference_steps=6, height=32, width=32)
    plain = generate(**arguments)
    for how in (dict(cache="output"), dict(cache="residual", forecast=2)):
        with tc.apply(flux, rel_l1_thresh=0.5, coefficients=(3e38,) * 5, **how) as handle:
            assert np.array_equal(generate(**arguments), plain)
        assert kinds(handle).count("numerical-miss") > 0
        assert "skipped" not in kinds(handle)


class Hiccup(LinearScheduler):
    """A user's, which loses the latents for step 4 and finds them again."""

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        if timestep == 4:
            return self.found
        self.found = super().step(noise=noise, timestep=timestep, latents=latents)
        return self.found * mx.nan if timestep == 3 else self.found


@pytest.mark.parametrize("is_uncompiled", [False, True], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize("cache", ["residual", "output"])
def test_what_a_numerical_miss_made_is_never_looked_at(
    flux: Any, generate: Generate, cache: str, is_uncompiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AppleSiliconUtil, "is_m1_or_m2", lambda: is_uncompiled)
    scheduler = f"{Hiccup.__module__}.Hiccup"
    with noises(flux) as noting, tc.apply(flux, forecast=2, cache=cache, **ALWAYS) as handle:  # type: ignore[arg-type]
        generate(num_inference_steps=9, height=32, width=32, scheduler=scheduler)
    before = ["forced", "computed", "skipped", "skipped"]
    assert kinds(handle) == [*before, "numerical-miss", "computed", "skipped", "skipped", "forced"]
    assert [bool(np.isfinite(noise).all()) for noise in noting.noises] == [i != 4 for i in range(9)]


@pytest.mark.parametrize("value", [-1, 3, 1.0, "1", True])
def test_bad_orders(flux: Any, value: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, forecast=value)
    assert str(error.value) == f"forecast must be an order from 0 (reuse) to 2, got {value!r}"


@pytest.mark.parametrize("value", ["outputs", 1, ["output"]])
def test_bad_caches(flux: Any, value: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, cache=value)
    assert str(error.value) == f"cache must be 'residual' or 'output', got {value!r}"


# ---- Budgets


@given(st.lists(st.floats(1e-4, 0.1), min_size=1, max_size=100), st.floats(0.01, 1))
def test_a_budget_is_kept(differences: list[float], budget: float) -> None:
    sigmas = np.cumsum(differences)[::-1].tolist()
    plan = budgeted(sigmas, budget, 64)
    assert len(plan) == len(sigmas)
    assert plan[0]
    assert plan[-1]
    assert sum(plan) == min(len(sigmas), max(2, int(budget * len(sigmas) + 1e-9)))


def as_text(plan: tuple[bool, ...]) -> str:
    return "".join("01"[computes] for computes in plan)


def test_budgets_by_hand() -> None:
    even = [1 - 0.1 * i for i in range(10)]
    tokens = round((8 / 3) ** 2)  # 7: sigma counts as it is, nearly
    assert as_text(budgeted(even, 0.5, tokens)) == "1010010101"
    assert as_text(budgeted(even, 0.2, tokens)) == "1000000001"
    assert as_text(budgeted(even, 0.01, tokens)) == "1000000001"
    assert as_text(budgeted(even[:4], 1.0, tokens)) == "1111"
    assert as_text(budgeted([1.0], 0.5, tokens)) == "1"
    assert budgeted([], 0.5, tokens) == ()
    assert as_text(budgeted([1.0] * 6, 0.5, tokens)) == "101001"  # a schedule that stands still


def test_a_budget_goes_where_the_noise_that_is_seen_changes() -> None:
    """The distances between computed steps are the shorter the faster it falls; a step counts at most once."""
    linear = [1 - i / 50 for i in range(50)]
    # Of 64 tokens: seen is s / (s + 3 (1 - s)), which falls by more than half in the first third.
    computed = np.flatnonzero(budgeted(linear, 0.3, 64))
    seen = np.array([s / (s + 3 * (1 - s)) for s in linear])[computed]
    assert np.abs(np.diff(seen) + 1 / 14).max() < 0.04
    # The same with 4096 tokens and FLUX's shift of 8 times, and more at the beginning without it.
    flux = [8 * s / (1 + 7 * s) for s in linear]
    assert budgeted(flux, 0.3, 4096) == budgeted(linear, 0.3, 64)
    assert sum(budgeted(linear, 0.3, 4096)[:10]) > sum(budgeted(linear, 0.3, 64)[:10])
    abrupt = [1 - 0.001 * i for i in range(36)] + [0.9, 0.6, 0.3, 0.0]
    assert as_text(budgeted(abrupt, 0.3, 64)).endswith("1111")


def test_a_budget(flux: Any, generate: Generate, photo: Path) -> None:
    """Planned for the steps that are run; nothing is measured or read."""
    arguments: dict[str, Any] = dict(num_inference_steps=10, height=64, width=64)
    with noises(flux) as noting:
        generate(**arguments)
    plan = as_text(budgeted(noting.sigmas[:10], 0.5, 16))
    with tc.apply(flux, steps=plan, forecast=1, cache="output", corrector=0.5):
        expected = generate(**arguments)
    with tc.apply(flux, budget=0.5, forecast=1, cache="output") as handle:
        ops.reset_counters()
        assert np.array_equal(generate(**arguments), expected)
        assert ops.counters() == {"reads": 0, "computed": 0, "reused": 0}
        generate(**arguments, image_path=photo, image_strength=0.4)
    assert [len(g.steps) for g in handle.stats.finished] == [10, 6]
    assert [g.skipped for g in handle.stats.finished] == [5, 3]
    assert handle.policy == tc.Policy(rule=tc.Budget(budget=0.5))
    assert handle.summary().startswith("tiny-klein, budget 0.5, forecast 1 of the output\n")


def test_a_budget_where_step_0_fills_a_key_value_cache(photo: Path) -> None:
    """It makes no residual: step 1 computes too."""
    edit = edit_pipeline()
    edit.model_config = ModelConfig.flux2_klein_9b_kv()
    for cache, steps in (("residual", ["forced", "computed", "skipped", "computed"]), ("output", None)):
        with tc.apply(edit, budget=0.5, cache=cache) as handle:  # type: ignore[arg-type]
            size = dict(height=64, width=64, num_inference_steps=4)
            edit.generate_image(seed=1, prompt="red apple", image_paths=[photo], guidance=1.0, **size)
        assert kinds(handle) == (steps or ["forced", "skipped", "skipped", "computed"])


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), "0.5", True])
def test_bad_budgets(flux: Any, value: Any) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, budget=value)
    assert str(error.value) == f"budget must be a share of the steps above 0.0 and up to 1.0, got {value!r}"


def test_a_budget_of_all(flux: Any) -> None:
    with pytest.warns(tc.DisabledWarning) as warned:
        tc.apply(flux, budget=1.0).restore()
    assert [str(w.message) for w in warned] == ["budget=1.0 computes all: every step computes"]
