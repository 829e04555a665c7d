"""The tolerance: which steps it computes, what is corrected, and that it holds in every pipeline."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import FEW_BY_DEFAULT, Case, image_of, kinds, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.models.common.schedulers import LinearScheduler, register_contrib
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from other_pipelines import PIPELINES, Small

import mlx_teacache_fast as tc
from mlx_teacache_fast.policy import LONGEST_GAP, RHO, WARM_UP
from mlx_teacache_fast.step import engine
from mlx_teacache_fast.step.forecast import corrected, correction, miss_of, weights
from mlx_teacache_fast.step.generation import Generation
from mlx_teacache_fast.step.rules import Watch, budgeted

Generate = Callable[..., np.ndarray]
EDITS = [small for small in PIPELINES if str(small) in ("QwenImageEdit", "FIBOEdit")]

# ---- The parts


def relative(miss: mx.array) -> float:
    off, size = miss.tolist()
    return off / size


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_the_miss_is_a_relative_l1_distance(dtype: mx.Dtype) -> None:
    keys = mx.random.split(mx.random.key(1), 6)
    arrays = [mx.random.normal((1, 33, 48), key=key).astype(dtype) for key in keys]
    made, history, w = arrays[:2], [arrays[2:4], arrays[4:]], [1.75, -0.75]
    a, b = ([np.array(x.astype(mx.float32), np.float64) for x in of] for of in (made, arrays[2:]))
    forecasts = [w[0] * b[2 * i] + w[1] * b[2 * i + 1] for i in range(2)]
    expected = sum(np.abs(x - f).sum() for x, f in zip(a, forecasts, strict=True)) / sum(np.abs(x).sum() for x in a)
    assert relative(miss_of(mx.array(w), made, history)) == pytest.approx(expected, rel=1e-5)
    assert relative(miss_of(mx.array([1.0, 0.0]), made[:1], [[made[0], arrays[1]]])) == 0
    zero = mx.zeros_like(made[0])
    assert miss_of(mx.array([1.0]), [zero], [[zero]]).tolist() == [0, 0]


def test_the_miss_of_large_arrays() -> None:
    """One float32 sum of 2^25 numbers would be off by several per cent."""
    x = mx.random.normal((1, 8192, 4096), key=mx.random.key(2))
    assert relative(miss_of(mx.array([0.9]), [x], [[x]])) == pytest.approx(0.1, rel=1e-4)


@given(st.integers(0, 2), st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=60)
def test_the_correction_takes_the_gathered_error_back(order: int, skipped: int, rho: float, seed: int) -> None:
    """All of it at rho 1: the latents are then where the straight line between the computed values leads."""
    rng = np.random.default_rng(seed)
    sigmas = np.sort(rng.uniform(0.1, 1, order + 2 + skipped + 1))[::-1].tolist()
    last = order  # a computed step, then the skipped ones, then ``now``
    now = last + skipped + 1
    values = rng.normal(size=(order + 1, 5)).astype(np.float32)  # known, the latest first
    v = rng.normal(size=5).astype(np.float32)
    known = sigmas[last::-1][: order + 1]
    change = [b - a for a, b in pairwise(sigmas)]
    gap = [(sigmas[j], change[j], weights(sigmas[j], known, order)) for j in range(last + 1, now)]
    found = correction(sigmas[now], change[now], sigmas[last], gap, rho)
    assert sum(found) == pytest.approx(1, abs=1e-4 * max(map(abs, found)))
    noise = np.array(corrected(mx.array(found), mx.array(v), [mx.array(x) for x in values]))
    went = sum(dt * (np.array(w) @ values) for _, dt, w in gap)
    line = sum(dt * (v + (s - sigmas[now]) / (sigmas[last] - sigmas[now]) * (values[0] - v)) for s, dt, _ in gap)
    expected = (1 - rho) * went + rho * line + change[now] * v
    np.testing.assert_allclose(went + change[now] * noise, expected, atol=1e-4 * max(map(abs, found)))


def decided(sigmas: list[float], speed: float) -> str:
    """One digit for each step of a schedule, at a tolerance of 0.1, where forecasts miss by ``speed`` times the way."""
    digits, watch, last = "", Watch(0.1, sigmas), 0
    for i in range(len(sigmas) - 1):
        kind, _ = watch.decide(i)
        digits += "0" if kind == "skipped" else "1"
        if kind != "skipped":
            watch.computed(i, speed * (sigmas[last] - sigmas[i]) if i else math.inf)
            last = i
    return digits


EVEN = [1 - i / 50 for i in range(51)]


def test_what_a_tolerance_computes() -> None:
    for unknown in (math.inf, math.nan):
        assert decided(EVEN, unknown) == "1" * 50
    # A forecast without a miss: a gap is one step longer than the shorter of the two before it, up to the longest.
    digits = decided(EVEN, 0.0)
    gaps = [b - a for a, b in pairwise(i for i, d in enumerate(digits) if d == "1")]
    assert gaps[: WARM_UP - 1] == [1] * (WARM_UP - 1)
    grown = [gap for wide in range(2, LONGEST_GAP) for gap in (wide, wide)]
    assert gaps[WARM_UP - 1 : WARM_UP - 1 + len(grown)] == grown
    assert set(gaps[WARM_UP - 1 + len(grown) : -1]) == {LONGEST_GAP}
    assert digits[-1] == "1"
    # One step is expected to miss by 0.08 and two by 0.16; then one by more than is tolerated.
    assert decided(EVEN, 4.0) == "1" * WARM_UP + "01" * 23
    assert decided(EVEN, 6.0) == "1" * 50
    # The way counts, not the number of steps: of two steps the first is as wide as ten.
    uneven = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.82, 0.81, 0.80]
    assert decided(uneven, 1.0)[:10] == "1111010101"
    assert decided([*uneven[:9], 0.91, 0.90, 0.89], 1.0)[:10] == "1111010100"
    # Less is tolerated in a step of four times the mean width: by half.
    wide = [1 - 0.01 * i for i in range(20)] + [0.81 - 0.04, *(0.77 - 0.0025 * i for i in range(1, 21))]
    mean = (wide[0] - wide[-1]) / 40
    i = 19
    watch = Watch(0.1, wide)
    for step in (i - 3, i - 2, i - 1):
        watch.computed(step, 0.05)
    expected = 0.05 / 0.01 * 0.01
    assert watch.decide(i)[1] == pytest.approx(expected * math.sqrt(0.04 / mean), rel=1e-6)
    assert watch.decide(i - 1 + 2)[1] == pytest.approx(0.05 / 0.01 * (wide[i - 1] - wide[i + 1]), rel=1e-6)
    # A schedule that stands still says nothing of the speed.
    assert decided([0.5] * 10, 0.0) == "1" * 9


# ---- In the demonstration pipeline


def outside(flux: Any, tolerance: float, rho: float, arguments: dict[str, Any]) -> tuple[str, np.ndarray]:
    """The same rule written for NumPy, around mflux's step: digits, and the image."""
    n = arguments["num_inference_steps"]
    record: dict[str, Any] = {"digits": "", "known": [], "gap": [], "speed": math.inf, "gaps": []}

    class Begin:
        def call_before_loop(self, config: Any, **_: Any) -> None:
            record["sigmas"] = lambda: np.array(config.scheduler.sigmas, np.float64)

    begin = Begin()
    flux.callbacks.register(begin)

    def factory(transformer: Any) -> Callable[..., mx.array]:
        own = type(flux)._predict(transformer)

        def predict(**inputs: Any) -> mx.array:
            i, s, known = len(record["digits"]), record["sigmas"](), record["known"]
            change = np.diff(s)
            w = weights(s[i], [s[k] for k, _ in known], 1) if known else []
            forecast = sum(np.float32(a) * v for a, (_, v) in zip(w, known, strict=False))
            if i >= WARM_UP and i < n - 1:
                last = known[0][0]
                near = i - last < min(LONGEST_GAP, 1 + min(record["gaps"][-2:]))
                wide = max(1.0, -change[i] * n / (s[0] - s[n]))
                if near and record["speed"] * abs(s[i] - s[last]) * math.sqrt(wide) < tolerance:
                    record["digits"] += "0"
                    record["gap"].append((s[i], change[i], w))
                    return mx.array(forecast)
            noise = np.array(own(**inputs))
            handed_on = noise
            if known:
                last = known[0][0]
                miss = np.abs(noise - forecast).sum(dtype=np.float64) / np.abs(noise).sum(dtype=np.float64)
                record["speed"] = miss / abs(s[i] - s[last])
                record["gaps"].append(i - last)
                if record["gap"]:
                    c = correction(s[i], change[i], s[last], record["gap"], rho)
                    handed_on = sum(np.float32(a) * v for a, v in zip(c, [noise, *(v for _, v in known)], strict=True))
            record["known"], record["gap"] = [(i, noise), *known[:1]], []
            record["digits"] += "1"
            return mx.array(handed_on)

        return predict

    object.__setattr__(flux, "_predict", factory)
    try:
        image = np.asarray(flux.generate_image(**arguments).image)
    finally:
        object.__delattr__(flux, "_predict")
        flux.callbacks.before_loop.remove(begin)
    return record["digits"], image


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("regime", ["own", "flux2-1024"])
def test_the_rule_around_mflux_decides_alike(flux: Any, guidance: float, regime: str) -> None:
    from mlx_teacache_fast import demo

    arguments: dict[str, Any] = dict(prompt="red apple", seed=3, num_inference_steps=25, height=64, width=64)
    arguments |= dict(guidance=guidance) | demo.REGIMES[regime].options
    digits, expected = outside(flux, 0.1, RHO, arguments)
    with tc.apply(flux) as handle:
        image = image_of(flux, arguments)
    steps = handle.stats.finished[0].steps
    assert "".join("0" if step.kind == "skipped" else "1" for step in steps) == digits
    assert 5 < digits.count("0") < 20
    assert np.abs(image.astype(int) - expected).max() <= 1
    # What was seen stands in the records: one distance for each computed step but the first, none for a skipped one.
    assert [step.rel_l1 is None for step in steps] == [i == 0 or d == "0" for i, d in enumerate(digits)]
    for step in steps:
        if step.kind == "skipped":
            assert step.predicted == step.accumulated
            assert 0 <= step.predicted < 0.1


@pytest.mark.parametrize(
    "given", [dict(tolerance=0.1), dict(budget=0.4), dict(rel_l1_thresh=0.1, corrector=0.5)], ids=str
)
def test_a_pictures_steps_repeat_it(flux: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(
        prompt="red apple", seed=3, num_inference_steps=25, height=64, width=64, guidance=4.0
    )
    with tc.apply(flux, **given):
        first = flux.generate_image(**arguments)
    first.save(tmp_path / "a.png")
    said = tc.read_metadata(tmp_path / "a.png")
    how = {name: said.policy.flat[name] for name in ("forecast", "cache", "corrector")}
    assert said.policy.corrector
    with tc.apply(flux, steps=said.steps, **how):
        assert np.array_equal(image_of(flux, arguments), np.asarray(first.image))
    with tc.apply(flux, tmp_path / "a.png"):
        assert np.array_equal(image_of(flux, arguments), np.asarray(first.image))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_gate_is_corrected_alike_in_the_graph_and_on_the_host(
    flux: Any, generate: Generate, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for in_graph in (True, False):
        monkeypatch.setattr(engine.Engine, "in_graph", in_graph)
        with tc.apply(flux, rel_l1_thresh=0.1, forecast=order, corrector=0.5) as handle:
            images.append(generate(num_inference_steps=20))
        assert handle.stats.skipped_count > 3
    assert np.array_equal(*images)
    with tc.apply(flux, rel_l1_thresh=0.1, forecast=order):
        assert not np.array_equal(generate(num_inference_steps=20), images[0])


@pytest.mark.parametrize("cache", ["output", "residual"])
@pytest.mark.parametrize("forecast", [0, 1, 2])
def test_a_higher_tolerance_skips_more(flux: Any, generate: Generate, forecast: int, cache: Any) -> None:
    skipped = []
    for tolerance in (0.0, 1e-9, 0.05, 0.5):
        with tc.apply(flux, tolerance=tolerance, forecast=forecast, cache=cache) as handle:
            generate(num_inference_steps=20, height=32, width=32)
        skipped.append(handle.stats.skipped_count)
    assert skipped[:2] == [0, 0]
    assert skipped[3] > 0
    assert skipped == sorted(skipped)


def test_the_corrector_can_be_left_out(flux: Any, generate: Generate) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=25, guidance=1.0)
    plain, images = generate(**arguments), []
    for more in ({}, dict(corrector=1.0), dict(corrector=0.0)):
        with tc.apply(flux, steps="1111" + "001" * 7, **more):
            images.append(generate(**arguments))
    with tc.apply(flux, corrector=0) as handle:
        generate(**arguments)
    assert handle.policy.corrector == 0.0
    assert np.array_equal(images[0], images[2])  # off with planned steps, unless it is asked for
    error = [np.square(image.astype(float) - plain).mean() for image in images]
    assert error[1] < error[0]


def test_where_the_corrector_is_on_by_default() -> None:
    assert tc.Policy().rho(7.0) == tc.Policy.of(tolerance=0.3).rho(1.0) == RHO
    assert tc.Policy.of(budget=0.3).rho(4.0) == 0.5
    assert tc.Policy.of(budget=0.3).rho(7.0) == tc.Policy.of(budget=0.2).rho(1.0) == 0.0
    assert tc.Policy.of(steps="10").rho(1.0) == tc.Policy.of(rel_l1_thresh=0.2).rho(1.0) == 0.0
    assert tc.Policy.of(cache="residual").rho(1.0) == tc.Policy.of(budget=0.4, cache="residual").rho(1.0) == 0.0
    for rule in (dict(budget=0.2), dict(steps="10"), dict(rel_l1_thresh=0.2), dict(tolerance=0.1)):
        assert tc.Policy.of(**rule, corrector=0.25).rho(7.0) == 0.25


def test_schedulers_that_are_not_linear_are_not_corrected(flux: Any, generate: Generate) -> None:
    class Other(LinearScheduler):
        def step(self, noise: mx.array, timestep: int, latents: mx.array, **more: Any) -> mx.array:
            return super().step(noise, timestep, latents, **more)

    register_contrib(Other, "other-for-a-test")
    images = []
    for scheduler in ("linear", "other-for-a-test"):
        for corrector in (0.0, 1.0):
            with tc.apply(flux, steps="1111" + "001" * 7, corrector=corrector):
                images.append(generate(num_inference_steps=25, scheduler=scheduler))
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(images[2], images[3])
    assert np.array_equal(images[0], images[2])


@contextmanager
def broken_from(flux: Any, step: int) -> Iterator[None]:
    """A callback writes NaN into the latents after a step."""

    class Break:
        def call_in_loop(self, t: int, latents: mx.array, **_: Any) -> None:
            if t == step:
                latents *= mx.nan

    callback = Break()
    flux.callbacks.register(callback)
    try:
        yield
    finally:
        flux.callbacks.in_loop.remove(callback)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_computes(flux: Any, generate: Generate) -> None:
    with tc.apply(flux, tolerance=1.0) as handle, broken_from(flux, 6):
        generate(num_inference_steps=20, height=32, width=32)
    steps = handle.stats.finished[0].steps
    assert "skipped" in {step.kind for step in steps[:7]}
    first = next(step.index for step in steps if step.kind == "numerical-miss")
    # Then one that has nothing to compare with, and another one that has, in turn.
    expected = ["numerical-miss", "computed"] * 10
    assert [step.kind for step in steps[first:-1]] == expected[: 19 - first]
    assert all(step.rel_l1 is None for step in steps[first:])


def test_a_schedule_without_room_warns_once(flux: Any, generate: Generate) -> None:
    with tc.apply(flux) as handle:
        with pytest.warns(tc.NoBenefitWarning, match="no possible skip: the first 4 steps"):
            generate(num_inference_steps=4, height=32, width=32)
        generate(num_inference_steps=4, height=32, width=32)  # a warning would be an error
    assert handle.stats.skipped_count == 0
    with pytest.warns(tc.DisabledWarning, match="tolerance=0.0 computes all: every step computes"):
        tc.apply(flux, tolerance=0).restore()


# ---- In every pipeline


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")
@pytest.mark.parametrize("case", FEW_BY_DEFAULT, ids=str)
def test_every_pipeline_by_tolerance(case: Case, photo: Path, mask: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain mflux until the first skip, and alike when it is done again."""
    if not case.is_flux2:  # of random weights no forecast is any good: take a tenth of the miss
        monkeypatch.setattr(engine, "miss_of", lambda *given: mx.array([0.1, 1.0]) * miss_of(*given))
    arguments = case.arguments(photo, mask) | dict(num_inference_steps=12)
    with case.pipeline() as flux:
        plain = run(flux, arguments)
        for tolerance, cache in ((0.0, "output"), (1e-9, "output"), (1e-9, "residual")):
            with tc.apply(flux, tolerance=tolerance, cache=cache):
                assert same(run(flux, arguments), plain)
        for cache in ("output", "residual"):
            with tc.apply(flux, tolerance=1.0, cache=cache) as handle:
                first, kinds_first = run(flux, arguments), kinds(handle)
                again, kinds_again = run(flux, arguments), kinds(handle)
            skip = kinds_first.index("skipped")
            assert skip >= WARM_UP
            assert kinds_first == kinds_again
            assert same(first, again)
            assert same(first, plain, steps=skip)
            assert not same(first, plain)
        assert same(run(flux, arguments), plain)


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")
@pytest.mark.parametrize("case", [Case(Flux1Kontext), *EDITS], ids=str)
def test_the_miss_is_of_what_mflux_uses(
    case: Case | Small, photo: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what is predicted at a reference image's tokens."""
    shapes = set()

    def spy(of: mx.array, made: list[mx.array], history: list[list[mx.array]]) -> mx.array:
        shapes.update(array.shape for arrays in (made, *history) for array in arrays)
        return miss_of(of, made, history)

    monkeypatch.setattr(engine, "miss_of", spy)
    with case.pipeline() as flux, tc.apply(flux, tolerance=1e-9):
        _, latents = run(flux, case.arguments(photo, mask) | dict(num_inference_steps=5))
    assert {shape[1:] for shape in shapes} == {latents[0].shape[1:]}


def test_more_steps_than_the_schedule_has(flux: Any) -> None:
    """A generate_image of the user's that calls the step once more: that one is mflux's."""
    with tc.apply(flux) as handle:
        policy = handle.policy
    for n in (6, 0):
        generation = Generation(policy, n, lambda n=n: [1 - i / 6 for i in range(n + 1)])
        for i in range(n + 3):
            step = generation.decide()
            generation.record("computed" if step is None else step, is_kept=True)
            assert (step is None) == (i >= n)
        assert len(generation.stats(None).steps) == n + 3


def test_image_to_image(flux: Any, photo: Path) -> None:
    arguments: dict[str, Any] = dict(prompt="red apple", seed=1, num_inference_steps=30, height=64, width=64)
    arguments |= dict(image_path=photo, image_strength=0.4)
    with tc.apply(flux) as handle:
        image_of(flux, arguments)
    generation = handle.stats.finished[0]
    assert generation.num_steps == 18
    assert 0 < generation.skipped < 18 - WARM_UP


# ---- Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[
            (dict(tolerance=value), f"tolerance must be a number from 0.0 to 1.0, got {value!r}")
            for value in (math.nan, -0.1, 1.5, True, "0.1")
        ],
        (dict(mode="fast", tolerance=0.1), "mode and tolerance both set the tolerance: leave out either"),
        (
            dict(tolerance=0.1, rel_l1_thresh=0.2),
            "tolerance says which steps compute, and rel_l1_thresh cannot count: leave out either",
        ),
        (
            dict(tolerance=0.1, steps="10"),
            "tolerance says which steps compute, and steps cannot count: leave out either",
        ),
        (
            dict(max_skips=3, skip_first_n_steps=2),
            "max_skips, skip_first_n_steps: of TeaCache's gate, which rel_l1_thresh or coefficients ask for",
        ),
        (dict(corrector=2), "corrector must be a number from 0.0 to 1.0, got 2"),
        (
            dict(corrector=0.5, cache="residual"),
            'corrector changes the noise prediction, and cache="residual" keeps none',
        ),
    ],
)
def test_bad_settings(flux: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, **given)
    assert str(error.value) == message


# ---- With a budget


@given(
    st.integers(5, 60),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=60, max_size=60),
)
def test_a_budget_is_never_exceeded(num_steps: int, budget: float, tolerance: float, misses: list[float]) -> None:
    """And nothing is saved where the tolerance wants everything: then the steps are the plan's."""
    sigmas = [1 - i / num_steps for i in range(num_steps)]
    plan = budgeted(sigmas, budget, 4096)
    watch = Watch(tolerance, [*sigmas, 0.0], plan)
    computed = []
    for i in range(num_steps):
        kind, _ = watch.decide(i)
        computed.append(kind != "skipped")
        if computed[-1]:
            watch.computed(i, misses[i] if i > 3 else math.inf)
        assert sum(computed) <= sum(plan[: i + 1])
    assert computed[0]
    assert computed[-1]
    if tolerance == 0:
        assert tuple(computed) == plan


def test_a_tolerance_with_a_budget(flux: Any, generate: Generate) -> None:
    options = dict(num_inference_steps=20, guidance=4.0, height=64, width=64)
    with tc.apply(flux, tolerance=1e-9, budget=0.4) as handle:
        strict = generate(**options)
        assert handle.stats.skipped_count == 12
        assert str(handle.policy).startswith("tolerance 1e-09, budget 0.4, forecast 1")
    with tc.apply(flux, budget=0.4, corrector=0.75):
        assert np.array_equal(generate(**options), strict)
    with tc.apply(flux, mode="fast", budget=0.9) as handle:
        generate(**options)
        assert handle.policy.rule == tc.Tolerance(tolerance=0.2, budget=0.9)
        assert handle.stats.skipped_count > 2
