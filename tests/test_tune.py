"""Tuning: what plans are solved from, and the whole of it on the real pipelines, as a function and as a command."""

import itertools
import json
import math
import random
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import FEW_BY_DEFAULT, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.models.common.config.model_config import ModelConfig
from PIL import Image
from test_cli import run
from test_forecast import noises
from test_hostile import BEGUN, DEMO, signalled
from test_policy import refusal

import mlx_teacache_fast as tc
from mlx_teacache_fast import demo
from mlx_teacache_fast.mflux.pictures import ending, generate, psnr
from mlx_teacache_fast.record.trace import replay
from mlx_teacache_fast.step.forecast import weights
from mlx_teacache_fast.step.rules import budgeted
from mlx_teacache_fast.tuning.full import FullRuns, full_run, polynomial, threshold
from mlx_teacache_fast.tuning.report import text
from mlx_teacache_fast.tuning.solve import Recorded, neighbours

SMALL: dict[str, Any] = dict(num_inference_steps=10, height=32, width=32, guidance=1.0)
PROMPTS = ["red apple", "cat face"]
UNSEEN = ["pizza"]
TUNE: dict[str, Any] = dict(held_out=UNSEEN, budget=0.5, curve=(0.3,), candidates=3, **SMALL)


@pytest.fixture(autouse=True)
def _callbacks_are_as_before(flux: Any) -> Iterator[None]:
    before = [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")]
    yield
    assert [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")] == before


# ---- What plans are solved from


def predictions(num_steps: int, seed: int) -> tuple[list[float], np.ndarray]:
    """A smooth curve in a space of 7 dimensions, over an uneven schedule."""
    rng = np.random.default_rng(seed)
    sigmas = (1 - (np.arange(num_steps + 1) / num_steps) ** 2).tolist()
    t = np.array(sigmas[:-1])
    return sigmas, np.stack([np.cos(a * t + b) for a, b in rng.uniform(0, 4, (7, 2))], axis=1)


@given(st.integers(0, 1000), st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0]), st.data())
@settings(max_examples=80)
def test_the_estimate_is_the_error_of_eulers_method(seed: int, order: int, rho: float, data: st.DataObject) -> None:
    steps = (True, *data.draw(st.lists(st.booleans(), min_size=5, max_size=20)))
    sigmas, values = predictions(len(steps), seed)
    latents, exact, computed = np.zeros(7), np.zeros(7), list[int]()
    gap: list[tuple[int, np.ndarray]] = []  # skipped steps and their forecasts
    for i, computes in enumerate(steps):
        prediction = values[i]
        if computes:
            for j, forecast in gap:  # what the line between the computed values would have given instead
                part = (sigmas[j] - sigmas[computed[0]]) / (sigmas[i] - sigmas[computed[0]])
                line = part * values[i] + (1 - part) * values[computed[0]]
                latents = latents + rho * (sigmas[j + 1] - sigmas[j]) * (line - forecast)
            computed.insert(0, i)
            gap = []
        else:
            w = weights(sigmas[i], [sigmas[j] for j in computed], order)
            prediction = sum(wk * values[j] for wk, j in zip(w, computed, strict=False))  # type: ignore[assignment]
            gap.append((i, prediction))
        latents = latents + (sigmas[i + 1] - sigmas[i]) * prediction
        exact = exact + (sigmas[i + 1] - sigmas[i]) * values[i]
    error = np.mean((latents - exact) ** 2)
    products = values @ values.T / 7
    found = Recorded(sigmas, [products], order, 64, astray=0, growth=0).estimate(steps, rho)
    if error > 1e-12:
        assert found == pytest.approx(-10 * math.log10(error), abs=1e-3)
    else:
        assert found > 110
    assert Recorded(sigmas, [products], order, 64, growth=0).estimate(steps, rho) <= found + 1e-9


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_no_plan_has_less_error_in_its_gaps_than_what_is_solved_for(order: int, rho: float) -> None:
    """All plans of 9 steps are tried; their error is that of one gap at a time, and the runs weigh the same."""
    n = 9
    sigmas, _ = predictions(n, 0)
    products = [
        values @ values.T / 7 * scale for scale, seed in ((1, 1), (100, 2)) for _, values in [predictions(n, seed)]
    ]
    recorded = Recorded(sigmas, products, order, 64)
    rules = {count: budgeted(sigmas[:-1], count / n, 64) for count in (3, 4, 6)}
    typical = np.mean([recorded.errors(rule, rho) for rule in rules.values()], axis=0)

    def cost(computed: tuple[int, ...]) -> float:
        total = 0.0
        for i, end in enumerate((*computed[1:], n)):
            known = computed[: i + 1][::-1][: order + 1]
            share = recorded._gap(known, end, rho)
            total += sum(share @ p @ share / t for p, t in zip(recorded._products, typical, strict=True))
        return total

    for count, plan in recorded.solve(rules, rho).items():
        best = min(cost((0, *others)) for others in itertools.combinations(range(1, n), count - 1))
        assert sum(plan) == count
        assert cost(tuple(np.flatnonzero(plan).tolist())) == pytest.approx(best)


@given(st.integers(0, 100), st.sampled_from([0.0, 0.5]))
@settings(max_examples=20)
def test_what_is_proposed_cannot_be_improved_by_one_step(seed: int, rho: float) -> None:
    sigmas, values = predictions(12, seed)
    recorded = Recorded(sigmas, [values @ values.T], 1, 64)
    rule = budgeted(sigmas[:-1], 0.5, 64)
    plan = recorded.improved(rule, rho)
    assert recorded.estimate(plan, rho) >= recorded.estimate(rule, rho)
    assert all(recorded.estimate(near, rho) <= recorded.estimate(plan, rho) for near, _ in recorded.near((plan, rho)))
    values_of = [recorded.estimate(*proposal) for proposal in recorded.near((plan, rho))]
    assert values_of == sorted(values_of, reverse=True)


def test_a_schedule_that_stands_still() -> None:
    sigmas = [1.0, 0.8, 0.8, 0.8, 0.5, 0.5, 0.2, 0.0]
    _, values = predictions(7, 0)
    recorded = Recorded(sigmas, [values @ values.T], 1, 64)
    rules = {3: budgeted(sigmas[:-1], 3 / 7, 64)}
    (proposals,) = recorded.proposals(rules).values()
    assert all(sum(plan) == 3 and math.isfinite(recorded.estimate(plan, rho)) for plan, rho in proposals)


@given(st.lists(st.booleans(), min_size=5, max_size=30))
def test_neighbours(steps: list[bool]) -> None:
    start = (True, True, False, *steps)
    found = list(neighbours(start))
    assert len(set(found)) == len(found) > 0
    for plan in found:
        assert plan[0]
        assert sum(plan) == sum(start)
        one, other = np.flatnonzero(np.array(plan) != np.array(start))
        assert other - one <= 4


@pytest.mark.parametrize("strength", [None, 0.3, 0.9])
def test_a_picture_of_other_latents(flux: Any, photo: Path, strength: float | None) -> None:
    """It is mflux's decoding of them, whatever the prompt and the seed are."""
    options = SMALL | ({} if strength is None else dict(image_path=photo, image_strength=strength))
    with ending(flux) as end:
        first = generate(flux, "red apple", 1, options)
        latents = end.latents
        second = generate(flux, "cat face", 2, options)
        assert psnr(first, second) < 50
        np.testing.assert_array_equal(end.picture(latents, flux, "cat face", 2, options), first)
        np.testing.assert_array_equal(generate(flux, "cat face", 2, options), second)


def full_runs(flux: Any, prompts: list[str], n_learnt: int) -> FullRuns:
    with ending(flux) as end:
        return FullRuns.of([full_run(flux, end, (p, 1), SMALL, is_learnt=i < n_learnt) for i, p in enumerate(prompts)])


def test_products_are_of_what_predictions_change_in_the_picture(flux: Any) -> None:
    """The same by the codec itself."""
    runs = full_runs(flux, ["red apple", "pizza"], 1)
    assert [len(part) for part in (runs.pictures, runs.products, runs.trace.generations)] == [2, 1, 1]
    with noises(flux) as noting, ending(flux) as end:
        np.testing.assert_array_equal(generate(flux, "red apple", 1, SMALL), runs.pictures[0])
    latents = np.array(end.latents.astype(mx.float32))

    def picture(moved: np.ndarray) -> np.ndarray:
        packed = mx.array(moved.reshape(1, 2, 2, 128).transpose(0, 3, 1, 2)).astype(end.latents.dtype)
        decoded = flux.vae.decode_packed_latents(packed)
        return np.round(255 * np.clip(np.array(decoded)[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1))

    np.testing.assert_array_equal(picture(latents), runs.pictures[0])
    parts = [0.2 * np.sqrt((latents**2).mean() / (noise**2).mean()) for noise in noting.noises]
    moved = [latents + part * noise.reshape(latents.shape) for part, noise in zip(parts, noting.noises, strict=True)]
    changes = [(picture(m) - runs.pictures[0]).ravel() / part for m, part in zip(moved, parts, strict=True)]
    np.testing.assert_allclose(runs.products[0], np.inner(changes, changes) / len(changes[0]), rtol=1e-2)


# ---- The gate


def test_the_polynomial(flux: Any) -> None:
    runs = full_runs(flux, ["red apple", "cat face", "pizza"], 2)
    # Nothing is measured in the forced first and last steps, nor in the one after the first: 7 pairs a picture.
    assert [pairs.shape for pairs in runs.pairs] == 3 * [(7, 2)]
    found, (x, y) = polynomial(runs), np.concatenate(runs.pairs[:2]).T
    assert found["calibrated_range"] == [x.min(), x.max()]
    best = np.polynomial.Polynomial.fit(x, y, 4)
    assert found["r2"] == pytest.approx(1 - ((best(x) - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-6)
    x, y = runs.pairs[2].T
    residuals = np.polyval(found["coefficients"], x) - y
    assert found["held_out_r2"] == pytest.approx(1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum())

    # The pairs, another way: what the scheduler was given, and the distances of a gate that skips nothing.
    with noises(flux) as noting, tc.apply(flux, rel_l1_thresh=1e-9) as handle:
        flux.generate_image(prompt="red apple", seed=1, **SMALL)
        assert handle.stats.last_generation is not None
        distances = [step.rel_l1 for step in handle.stats.last_generation.steps[2:-1]]
    consecutive = zip(noting.noises[1:], noting.noises[2:-1], strict=False)
    changes = [np.abs(b - a).mean() / np.abs(a).mean() for a, b in consecutive]
    np.testing.assert_allclose(runs.pairs[0][:, 0], distances, rtol=1e-6)
    np.testing.assert_allclose(runs.pairs[0][:, 1], changes, rtol=1e-5)

    # The threshold is the lowest of two digits.
    how = {name: found[name] for name in ("coefficients", "calibrated_range")}
    value = threshold(runs.trace, how, 6)
    assert value is not None
    lower = value - 10.0 ** math.floor(math.log10(value) - 1)
    for t, is_enough in ((value, True), (lower, False)):
        again = replay(runs.trace, rel_l1_thresh=t, max_consecutive_skips=8, **how)
        assert (statistics.mean(g.num_steps - g.skipped for g in again.generations) <= 6) == is_enough
    assert threshold(runs.trace, how, 2) is None


@pytest.mark.filterwarnings("ignore:no possible skip:mlx_teacache_fast.NoBenefitWarning")
def test_too_few_steps_for_a_polynomial(flux: Any) -> None:
    found = tc.tune(flux, ["red apple"], budget=0.4, curve=(), candidates=1, **SMALL | {"num_inference_steps": 5})
    assert found.polynomial == {}
    assert {t.kind for t in found.tried} == {"plan", "budget", "tolerance", "fewer steps"}


# ---- The whole


def about_of(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.read_text())["about"]
    return about


@pytest.fixture(scope="module")
def tuned(flux: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[tc.Tuned, Path]:
    path = tmp_path_factory.mktemp("tuned") / "mine.json"
    return tc.tune(flux, PROMPTS, path=path, **TUNE), path


def test_what_is_tried(tuned: tuple[tc.Tuned, Path]) -> None:
    found, path = tuned
    kinds = [(t.kind, t.count) for t in found.tried]
    for count in (5, 3):
        assert kinds.count(("plan", count)) == 3
        assert [kinds.count((kind, count)) for kind in ("budget", "fewer steps")] == [1, 1]
    assert [t.policy and t.policy.flat["tolerance"] for t in found.tried if t.kind == "tolerance"] == [
        0.05,
        0.1,
        0.2,
        0.4,
    ]
    assert len({str(t.policy and t.policy.flat) for t in found.tried if t.kind == "plan"}) == 6
    gates = {t.count: t.policy for t in found.tried if t.kind == "gate"}
    assert found.polynomial is not None
    for count, value in found.polynomial["thresholds"].items():
        gate = gates.get(int(count))
        assert (gate and gate.flat["rel_l1_thresh"]) == value
    assert gates
    for t in found.tried:
        assert len(t.psnr) == len(t.computed) == (3 if t in found.curve() else 2)
        if t.kind in ("plan", "budget", "fewer steps"):
            assert set(t.computed) == {t.count}
    assert tc.Policy.from_json(path) == found.policy
    assert about_of(path) == json.loads(json.dumps(found.about))
    assert tc.Tuned.from_json(path) == found


def test_the_policy_is_the_best_within_the_budget(tuned: tuple[tc.Tuned, Path]) -> None:
    found, _ = tuned
    for budget, most in ((None, 5), (0.5, 5), (0.3, 3), (0.9, 9)):
        within = [t for t in found.tried if t.policy is not None and statistics.mean(t.computed[:2]) <= most]
        best = found.best(budget)
        assert best is not None
        assert found.psnr(best) == max(statistics.mean(t.psnr[:2]) for t in within)
    assert found.policy == (found.best() or found.tried[0]).policy
    assert found.best(0.1) is None
    rule, *_ = (t for t in found.tried if t.kind == "budget")
    assert found.psnr(found.best() or rule) >= found.psnr(rule)


def test_numbers_are_what_the_policies_give(flux: Any, tuned: tuple[tc.Tuned, Path]) -> None:
    found, path = tuned
    plain = [np.asarray(flux.generate_image(prompt=p, seed=1, **SMALL).image) for p in PROMPTS + UNSEEN]
    for t, about in zip(found.tried, about_of(path)["tried"], strict=True):
        if t not in found.curve():
            continue
        seen = []
        for full, prompt in zip(plain, PROMPTS + UNSEEN, strict=True):
            if t.policy is None:
                picture = flux.generate_image(prompt=prompt, seed=1, **SMALL | {"num_inference_steps": t.count})
            else:
                with tc.apply(flux, t.policy) as handle:
                    picture = flux.generate_image(prompt=prompt, seed=1, **SMALL)
                assert 10 - handle.stats.skipped_count == t.computed[len(seen)]
            seen.append(min(99.0, psnr(full, np.asarray(picture.image))))
        assert t.psnr == pytest.approx(seen)
        assert about["tuned_on"] == pytest.approx(
            {"computed": statistics.mean(t.computed[:2]), "psnr": statistics.mean(seen[:2])}
            | {"p10": np.percentile(seen[:2], 10), "worst": min(seen[:2])}
        )
        assert about["held_out"]["psnr"] == pytest.approx(seen[2])


class Counting:
    """mflux callback: counts steps, and interrupts at one."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.count = 0
        self.interrupt_at = interrupt_at

    def call_in_loop(self, **_: Any) -> None:
        self.count += 1
        if self.count == self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture
def counting(flux: Any) -> Iterator[Callable[..., Counting]]:
    registered: list[Counting] = []

    def count(interrupt_at: int | None = None) -> Counting:
        registered.append(Counting(interrupt_at))
        flux.callbacks.register(registered[-1])
        return registered[-1]

    yield count
    flux.callbacks.in_loop[:] = [c for c in flux.callbacks.in_loop if c not in registered]


def test_it_goes_on_where_it_was(
    flux: Any, tuned: tuple[tc.Tuned, Path], tmp_path: Path, counting: Callable[..., Counting]
) -> None:
    path = tmp_path / "mine.json"
    # A warm-up, 3 full pictures, 20 looks at predictions in two steps, and then the fourth picture that is gated.
    first = counting(2 + 30 + 40 + 35)
    with pytest.raises(KeyboardInterrupt):
        tc.tune(flux, PROMPTS, path=path, **TUNE)
    before = tc.Tuned.from_json(path)
    assert [len(t.psnr) for t in before.tried] == [2, 1]
    flux.callbacks.in_loop.remove(first)
    found = tc.tune(flux, PROMPTS, path=path, resume=True, **TUNE)
    assert found == tuned[0]
    assert tc.Tuned.from_json(path) == found

    again = counting()
    other = tc.tune(flux, PROMPTS, path=path, resume=True, **TUNE | {"budget": 0.3, "curve": ()})
    assert again.count == 0  # all is there
    assert other.tried == found.tried
    assert tc.Policy.from_json(path) == other.policy == (found.best(0.3) or found.tried[0]).policy
    more = tc.tune(flux, PROMPTS, path=path, resume=True, **TUNE | {"candidates": 4})
    assert again.count == 2 + 30 + 40 + 10 * (len(more.tried[-1].psnr) + len(more.tried[-2].psnr))
    assert [t for t in more.tried if t in found.tried] == found.tried
    assert refusal(tc.tune, flux, PROMPTS, path=path, **TUNE) == f"{path} exists; force=True overwrites it"


def test_what_cannot_be_gone_on_with(flux: Any, tuned: tuple[tc.Tuned, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = tuned
    assert refusal(tc.tune, flux, PROMPTS, resume=True, **TUNE) == "resume needs the path of what to go on with"
    other = f"{path} was tuned with other %s: resume takes the same ones"
    changes: dict[str, dict[str, Any]] = {"prompts": {"prompts": PROMPTS[:1]}, "options": {"guidance": 2.0}}
    changes |= {"seeds": {"seeds": (2,)}, "forecast": {"forecast": 2}, "held_out": {"held_out": ["owl"]}}
    for name, change in changes.items():
        again = {"prompts": PROMPTS, "path": path, "resume": True} | TUNE | change
        assert refusal(tc.tune, flux, **again) == other % name
    monkeypatch.setattr(flux, "model_config", ModelConfig.flux2_klein_base_9b())
    assert refusal(tc.tune, flux, PROMPTS, path=path, resume=True, **TUNE) == other % "variant_id, model"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ([], None, "is not a policy: about must be an object, got None"),
        ([], {}, "is a policy, but not one of tune"),
        (["setup"], [], "is of tune, but damaged: list indices must be integers or slices, not str"),
        (["setup", "prompts"], "red apple", 'is of tune, but damaged: prompts cannot be "red apple"'),
        (["setup", "options"], [], "is of tune, but damaged: options cannot be []"),
        (["polynomial", "held_out_r2"], "a", 'is of tune, but damaged: held_out_r2 cannot be "a"'),
        (["num_steps"], 10.0, "is of tune, but damaged: num_steps cannot be 10.0"),
        (["budget"], 2, "is of tune, but damaged: budget must be a share of the steps above 0.0 and up to 1.0, got 2"),
        (
            ["polynomial", "coefficients"],
            [1, 2],
            "is of tune, but damaged: coefficients must be five finite numbers of ",
        ),
        (["polynomial", "thresholds"], {"5": "a"}, "is of tune, but damaged: rel_l1_thresh must be a number from 0.0 "),
        (["tried"], 3, "is of tune, but damaged: 'int' object is not iterable"),
        (["tried", 1], 3, "is of tune, but damaged: tried 1: 'int' object is not subscriptable"),
        (["tried", 1], {}, "is of tune, but damaged: tried 1: no 'kind'"),
        (["tried", 1, "kind"], "best", 'is of tune, but damaged: tried 1: kind cannot be "best"'),
        (["tried", 1, "kind"], ["plan"], 'is of tune, but damaged: tried 1: kind cannot be ["plan"]'),
        (["tried", 1, "kind"], "budget", "is of tune, but damaged: tried 1: policy cannot be {"),
        (["tried", 1, "count"], 4, 'is of tune, but damaged: tried 1: plan cannot be "1'),
        (["tried", 1, "count"], True, "is of tune, but damaged: tried 1: count cannot be true"),
        (["tried", 1, "policy"], None, "is of tune, but damaged: tried 1: policy cannot be null"),
        (["tried", 1, "policy"], {"steps": "0"}, "is of tune, but damaged: tried 1: steps must begin with a computed "),
        (["tried", 1, "policy"], {"steps": "11111"}, 'is of tune, but damaged: tried 1: plan cannot be "11111"'),
        (["tried", 1, "psnr"], [40, "a"], 'is of tune, but damaged: tried 1: psnr cannot be [40, "a"]'),
        (["tried", 1, "psnr"], [1e999, 1], "is not a policy: "),
        (["tried", 1, "psnr"], [1, 2, 3, 4], "is of tune, but damaged: tried 1: psnr cannot be [1, 2, 3, 4]"),
        (["tried", 1, "computed"], [5], "is of tune, but damaged: tried 1: computed cannot be [5]"),
        (["tried", 1, "computed"], [5, 5, 11], "is of tune, but damaged: tried 1: computed cannot be [5, 5, 11]"),
    ],
)
def test_damaged_files(
    flux: Any, tuned: tuple[tc.Tuned, Path], tmp_path: Path, where: list[Any], value: Any, message: str
) -> None:
    path = tmp_path / "mine.json"
    data = json.loads(tuned[1].read_text())
    at = data
    for name in ["about", *where][:-1]:
        at = at[name]
    at[["about", *where][-1]] = value
    path.write_text(json.dumps(data))
    for read in (lambda: tc.Tuned.from_json(path), lambda: tc.tune(flux, PROMPTS, path=path, resume=True, **TUNE)):
        assert refusal(read).startswith(f"{path} {message}")


def test_options_of_every_kind(flux: Any, photo: Path, tmp_path: Path) -> None:
    """And image-to-image: all is about the active steps."""
    path = tmp_path / "mine.json"
    options = SMALL | dict(budget=0.5, curve=(), candidates=1, image_path=photo, image_strength=0.3)
    for resume in (False, True):
        found = tc.tune(flux, PROMPTS[:1], seeds=[np.int64(1)], path=path, resume=resume, **options)
    assert found.num_steps == 7
    assert {t.count for t in found.tried} == {3, None}
    none = options | dict(image_strength=1.0)
    assert refusal(tc.tune, flux, PROMPTS[:1], **none) == "the generation has no steps"


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.NoBenefitWarning")  # Flux2KleinEdit with a cache is distilled
@pytest.mark.parametrize("case", FEW_BY_DEFAULT, ids=str)
def test_every_pipeline(case: Case, photo: Path, mask: Path) -> None:
    """FLUX.1's have a stand-in for the VAE."""
    with case.pipeline() as flux:
        given = case.arguments(photo, mask) | {"num_inference_steps": 7}
        prompt, seed = given.pop("prompt"), given.pop("seed")
        with ending(flux) as end:
            picture = generate(flux, prompt, seed, given)
            np.testing.assert_array_equal(end.picture(end.latents, flux, prompt, seed + 1, given), picture)
        found = tc.tune(flux, [prompt], seeds=[seed], budget=0.5, curve=(), candidates=2, **given)
        assert [t.kind for t in found.tried if t.count == 3][:3] == ["budget", "plan", "plan"]
        assert found.best() in found.tried
        with tc.apply(flux, found.policy) as handle:
            again = generate(flux, prompt, seed, given)
        assert 7 - handle.stats.skipped_count == (found.best() or found.tried[0]).computed[0] <= 3
        assert min(99.0, psnr(picture, again)) == (found.best() or found.tried[0]).psnr[0]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "prompts must be a list that is not empty, got []"),
        ("red apple", {}, "prompts must be a list that is not empty, got 'red apple'"),
        (PROMPTS, {"seeds": ()}, "seeds must be a list that is not empty, got ()"),
        (PROMPTS, {"held_out": "pizza"}, "held_out must be a list, got 'pizza'"),
        (PROMPTS, {"curve": 0.3}, "curve must be a list, got 0.3"),
        (
            PROMPTS,
            {"num_inference_steps": "9"},
            "num_inference_steps must be a whole number of steps, 0 or more, got '9'",
        ),
        (PROMPTS, {"held_out": PROMPTS[:1]}, "a prompt is tuned on or held out, not both: red apple"),
        (PROMPTS, {"candidates": -1}, "candidates must be a whole number of steps, 0 or more, got -1"),
        (PROMPTS, {"budget": 1.0}, "budget=1 of 10 steps leaves no step to choose"),
        (PROMPTS, {"budget": 0}, "budget must be a share of the steps above 0.0 and up to 1.0, got 0"),
        (PROMPTS, {"curve": (2,)}, "budget must be a share of the steps above 0.0 and up to 1.0, got 2"),
        (PROMPTS, {"group": 2}, "group must be of mx.distributed, as init() returns it, got 2"),
        (PROMPTS, {"forecast": 3}, "forecast must be an order from 0 (reuse) to 2, got 3"),
    ],
)
def test_what_is_refused(flux: Any, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    assert refusal(tc.tune, flux, prompts, **TUNE | arguments) == message


@pytest.mark.filterwarnings("ignore:this generation was not gated:mlx_teacache_fast.TeaCacheWarning")
def test_a_pipeline_that_hides_its_loop(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, picture = type(flux), flux.generate_image(prompt="red apple", seed=1, **SMALL)
    own = type("Own", (kind,), {"generate_image": lambda self, **arguments: picture})
    monkeypatch.setattr(flux, "__class__", own)
    with pytest.raises(tc.InternalStateError) as error:
        tc.tune(flux, PROMPTS, **TUNE)
    assert str(error.value) == "a generation did not go through the gate, and its steps are not known"


# ---- The command line


@pytest.fixture
def command(tmp_path: Path) -> list[Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n\ncat face\npizza\n")
    tiny = ["--steps", "8", "--size", "32", "--guidance", 1, "--budget", 0.5, "--candidates", 1, "--curve"]
    return ["tune", "demo", *tiny, "--prompts", prompts, "--held-out", 1]


def test_on_the_command_line(tmp_path: Path, command: list[Any]) -> None:
    path, plot, other = (tmp_path / name for name in ("mine.json", "mine.png", "other.json"))
    result = run(*command, "--output", path)
    assert result.code == 0, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.png", "prompts.txt"]
    assert Image.open(plot).size == (1200, 550)
    found = tc.Tuned.from_json(path)
    assert found.setup["held_out"] == ["pizza"]
    assert "TinyKlein, the demonstration model, 8 steps, 32x32, guidance 1.0" in result.out
    assert text(found) in result.out
    assert result.out.count("<- the policy") == 1
    assert "\nbest with at most 4 of 8 steps computed:\n  tuned on  " in result.out
    said = result.err.replace("\r", "\n").splitlines()
    assert any(
        line.startswith("3 pictures with all 8 steps (") and "with fewer computed: about " in line for line in said
    )
    for options, message in (
        (["--output", path], f"{path} exists; --force overwrites it"),
        (
            ["--output", path, "--resume", "--force"],
            "--resume goes on with FILE and --force begins anew: leave out either",
        ),
        (
            ["--output", tmp_path / "x.png"],
            f"{tmp_path}/x.png is to be the plot beside the policy: give the policy another name",
        ),
    ):
        result = run(*command, *options)
        assert (result.code, result.err) == (2, f"mlx-teacache-fast tune: error: {message}\n")
    result = run(*command, "--candidates", 2, "--resume", "--output", path)
    assert result.code == 0, result.err
    assert [t.kind for t in tc.Tuned.from_json(path).tried].count("plan") == 2

    result = run("tune", path, "--budget", 0.9, "--output", other)
    assert result.code == 0, result.err
    assert tc.Policy.from_json(other) == (tc.Tuned.from_json(path).best(0.9) or found.tried[0]).policy
    for arguments, message in (
        ([path, "--steps", 9], f"{path} has its own --steps"),
        ([path, "--budget", 0.1], f"{path} has nothing with a budget of 0.1"),
    ):
        result = run("tune", *arguments, "--output", tmp_path / "new.json")
        assert (result.code, result.err) == (2, f"mlx-teacache-fast tune: error: {message}\n")


def test_quick_takes_two_prompts_and_one_budget(tmp_path: Path, command: list[Any]) -> None:
    result = run(*command, "--curve", 0.3, "--quick", "--output", tmp_path / "mine.json")
    assert result.code == 0, result.err
    found = tc.Tuned.from_json(tmp_path / "mine.json")
    assert (found.setup["prompts"], found.setup["held_out"]) == (["red apple"], ["cat face"])
    assert {t.count for t in found.tried} == {4, None}


def test_ctrl_c_leaves_a_plot_of_what_the_file_has(
    tmp_path: Path, command: list[Any], flux: Any, counting: Callable[..., Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plot = tmp_path / "mine.json", tmp_path / "mine.png"
    for old in (path, plot):
        old.write_bytes(b"old")
    monkeypatch.setattr(demo, "pipeline", lambda: flux)
    counting(2 + 5)  # nothing is written yet
    assert run(*command, "--force", "--output", path).code == 130
    assert path.read_bytes() == plot.read_bytes() == b"old"
    counting(2 + 24 + 32 + 12)  # a picture of the rule's plan is
    assert run(*command, "--force", "--output", path).code == 130
    assert [len(t.psnr) for t in tc.Tuned.from_json(path).tried] == [1]
    assert Image.open(plot).size == (1200, 550)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 17))])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_any_moment(tmp_path: Path, command: list[Any], number: int, seed: int) -> None:
    """The file is whole or not there, and --resume goes on to what would have come out."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    path, plot = folder / "mine.json", folder / "mine.png"
    given = [*command, "--quick", "--output", path]
    rng = random.Random(seed)
    for _ in range(2):
        code, out, lines = signalled(DEMO, BEGUN, number, rng.uniform(0, 6), folder, *given, "--resume")
        assert code in (0, 130 if number == signal.SIGINT else -number), lines
        assert "Traceback" not in out + "".join(lines)
        assert "Exception ignored" not in "".join(lines)
        assert code != 130 or lines[-1].endswith("error: interrupted")
        left = {p.name for p in folder.iterdir()}
        parts = {name for name in left if number == signal.SIGKILL and name.startswith(".")}  # which took no name yet
        assert left - parts <= {path.name, plot.name}
        if path.exists():
            tc.Tuned.from_json(path)
        if plot.exists():
            Image.open(plot).load()
    assert run(*given, "--resume").code == 0
    found = tc.Tuned.from_json(path)
    assert run(*command, "--quick", "--output", tmp_path / "whole.json").code == 0
    assert found == tc.Tuned.from_json(tmp_path / "whole.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["flux2-klien-base-4b"],
            "mflux knows no model 'flux2-klien-base-4b'; did you mean flux2-klein-base-4b or flux2-klein-base-9b or "
            "flux2-klein-base-4B?; for a checkpoint of another name, --base-model says what it was made from",
        ),
        (["demo", "--quantize", "8"], "the demonstration model takes no --quantize"),
        (["demo", "--output", "."], "--output must be the path of a file, got '.'"),
        (["dev", "--regime", "own"], "dev takes no --regime"),
        (["demo", "--held-out", "12"], "12 prompts, and --held-out 12 leaves none of them"),
        (["dev", "--held-out", "8"], "8 prompts, and --held-out 8 leaves none of them"),
        (["dev-fill"], "dev-fill is not for text-to-image: load it in Python, in the pipeline that it is for"),
        (
            ["flux2-klein-base-4b", "--prompts", "missing.txt"],
            "[Errno 2] No such file or directory: 'missing.txt'",
        ),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("tune", "--output", tmp_path / "x.json", *arguments)
    assert result.code == (1 if "missing.txt" in arguments else 2)
    assert result.err == f"mlx-teacache-fast tune: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_help() -> None:
    result = run("tune", "--help")
    assert result.code == 0
    for word in ("mlx-teacache-fast tune demo", "--held-out", "--budget", "--quick", "how long it takes"):
        assert word in result.out
    assert max(map(len, result.out.splitlines())) <= 120


def test_another_one_that_is_better_on_prompts_held_out(tuned: tuple[tc.Tuned, Path]) -> None:
    found, path = tuned
    again = tc.Tuned.from_json(path)
    best, rule = again.best(), next(t for t in again.tried if t.kind == "budget" and t.count == 5)
    assert best is not None
    note = "What is best on prompts that were not tuned on is another one"
    for value, is_other in ((1.0, True), (99.0, False)):
        best.psnr[2], rule.psnr[2] = value, 50.0
        for t in again.tried:
            t.psnr[2:] = [min(t.psnr[2], 49.0)] if t not in (best, rule) and len(t.psnr) > 2 else t.psnr[2:]
        assert (note in text(again)) == is_other
    assert found == tc.Tuned.from_json(path)
