"""Policies: values, files, defaults and modes; and the searches and fits that make them, on the real pipeline."""

import dataclasses
import functools
import inspect
import json
import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Generate
from every_pipeline import edit_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from test_cli import run
from test_forecast import noises

import mlx_teacache_fast as tc
from mlx_teacache_fast.cli.shared import flag
from mlx_teacache_fast.mflux.pictures import psnr
from mlx_teacache_fast.policy import RULES
from mlx_teacache_fast.policy import settings as settings_of
from mlx_teacache_fast.record.trace import replay
from mlx_teacache_fast.step.forecast import weights
from mlx_teacache_fast.step.rules import budgeted
from mlx_teacache_fast.tune.search import Found, Recorded, annealed, neighbour

SMALL: dict[str, Any] = dict(num_inference_steps=10, height=32, width=32, guidance=1.0)


@pytest.fixture(autouse=True)
def _callbacks_are_as_before(flux: Any) -> Iterator[None]:
    before = [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")]
    yield
    assert [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")] == before


def refusal(call: Callable[..., Any], *args: Any, **given: Any) -> str:
    """What is said of a bad value."""
    with pytest.raises(tc.TeaCacheValueError) as error:
        call(*args, **given)
    return str(error.value)


# ---- Values


POLICIES = [
    tc.Policy(),
    tc.Policy(rule=tc.Tolerance(mode="fast"), forecast=2, corrector=0.25),
    tc.Policy(rule=tc.Gate(skip_first_n_steps=3, max_consecutive_skips=2, max_skips=5), forecast=2),
    tc.Policy(rule=tc.Gate(rel_l1_thresh=0.4, coefficients=(0, 0, 0, 1, 0), calibrated_range=(0.02, 0.1))),
    tc.Policy(rule=tc.Budget(budget=0.4), cache="residual", save_metadata=False),
    tc.Policy(rule=tc.Steps(steps="1" + 12 * "01"), forecast=0),
]
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.rule))


@EACH_POLICY
def test_a_policy_as_settings_and_as_a_file(flux: Any, tmp_path: Path, policy: tc.Policy) -> None:
    path = tmp_path / "any name"
    policy.to_json(path, about={"psnr": 40.0})
    assert tc.Policy.from_json(path) == tc.Policy.of(**policy.flat) == policy
    assert json.loads(path.read_text())["about"] == {"psnr": 40.0}
    assert policy == tc.Policy.of(**json.loads(json.dumps(policy.flat)))
    found = []
    for how in ((policy,), (path,), (str(path),), ()):
        with warnings.catch_warnings(action="ignore"), tc.apply(flux, *how, **({} if how else policy.flat)) as handle:
            found.append(handle.policy)
    assert found[1:] == found[:-1]
    assert refusal(policy.to_json, path) == f"{path} exists; force=True overwrites it"
    policy.to_json(path, force=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.forecast = 2  # type: ignore[misc]


@EACH_POLICY
def test_a_policy_of_a_picture(flux: Any, tmp_path: Path, policy: tc.Policy) -> None:
    path = tmp_path / "a.png"
    arguments = SMALL | dict(prompt="red apple", seed=1, num_inference_steps=25)
    with tc.apply(flux, dataclasses.replace(policy, save_metadata=True)) as handle:
        first = flux.generate_image(**arguments)
    first.save(path)
    corrector = handle.policy.rho(1.0) if handle.policy.cache == "output" else None  # the share that was used
    assert tc.read_metadata(path).policy == dataclasses.replace(handle.policy, corrector=corrector)
    with tc.apply(flux, path) as again:
        second = flux.generate_image(**arguments)
    assert again.stats.finished == handle.stats.finished
    assert handle.stats.skipped_count > 0
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(second.image))


def test_every_setting_is_an_option_and_is_documented() -> None:
    fields = settings_of(*RULES, tc.Policy)
    help_text = run("run", "--help").out
    documentation = " ".join((tc.apply.__doc__ or "").split())
    parameters = inspect.signature(tc.apply).parameters
    assert {f.name for f in fields} == set(parameters) - {"flux", "policy"}
    for f in fields:
        text = f.metadata["says"]
        assert re.search(rf"^  {flag(f)} ", help_text, re.MULTILINE)
        assert text in " ".join(help_text.split())
        assert f"{f.name}: {text[0].upper()}{text[1:]}." in documentation
        if f.default is not dataclasses.MISSING:
            assert parameters[f.name].default == f.default


def test_what_is_left_open_is_the_models() -> None:
    base = tc.VARIANTS["flux2-klein-base-4b"]
    own = dict(coefficients=base.coefficients, calibrated_range=base.calibrated_range)
    assert tc.Gate().of_model(base) == tc.Gate(rel_l1_thresh=0.17, **own)
    assert tc.Gate(max_skips=3).of_model(base) == tc.Gate(rel_l1_thresh=0.17, max_skips=3, **own)
    mine = tc.Gate(coefficients=(0, 0, 0, 1, 0))
    assert mine.of_model(base) == dataclasses.replace(mine, rel_l1_thresh=0.2)
    assert tc.Policy(rule=tc.Budget(budget=0.4)).of_model(base) == tc.Policy(rule=tc.Budget(budget=0.4))


def test_the_models_own_polynomial_is_builtin_however_it_is_given(flux: Any) -> None:
    with tc.apply(flux, rel_l1_thresh=0.039) as handle:
        assert (handle.calibrated, handle.provenance.source) == (True, "builtin")
    with tc.apply(flux, handle.policy) as again:
        assert (again.calibrated, again.provenance) == (True, handle.provenance)
    with tc.apply(flux, coefficients=[0, 0, 0, 1, 0]) as mine:
        assert (mine.calibrated, mine.provenance) == (False, tc.Provenance("user"))


def test_another_models_polynomial_warns(flux: Any) -> None:
    """As of a picture that another model made."""
    krea = tc.Gate().of_model(tc.VARIANTS["flux1-krea-dev"])
    with pytest.warns(
        tc.UncalibratedWarning, match="with another model's coefficients, those of flux1-krea-dev: they may not fit"
    ):
        tc.apply(flux, tc.Policy(rule=krea)).restore()


def test_a_handle_is_read_only(flux: Any) -> None:
    with tc.apply(flux) as handle:
        for name in ("policy", "stats", "forecast", "rel_l1_thresh"):
            with pytest.raises(AttributeError) as error:
                setattr(handle, name, 2)
            assert str(error.value) == f"{name} cannot be set on a handle: call restore() and apply() again"


NAMES = (
    "tolerance, mode, budget, rel_l1_thresh, coefficients, calibrated_range, skip_first_n_steps, skip_last_n_steps, "
    "max_consecutive_skips, max_skips, steps, forecast, cache, corrector, save_metadata"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(mode=["fast"]), "mode must be 'quality', 'balanced', 'fast', got ['fast']"),
        (dict(mode="best"), "mode must be 'quality', 'balanced', 'fast', got 'best'"),
        (
            dict(mode="fast", rel_l1_thresh=0.3),
            "mode says which steps compute, and rel_l1_thresh cannot count: leave out either",
        ),
        (dict(steps="11", budget=0.3), "budget says which steps compute, and steps cannot count: leave out either"),
        (dict(calibrated_range=(0, 1)), "calibrated_range belongs to coefficients of yours: give them too"),
        (
            dict(coefficients=[1, 2, 3, 4, 5], calibrated_range=(1, 0)),
            "calibrated_range must be two finite numbers, the lower first, or None, got (1, 0)",
        ),
        (dict(save_metadata=1), "save_metadata must be True or False, got 1"),
        (dict(threshold=0.2), f"no such setting: threshold; there are {NAMES}"),
        (dict(rule=tc.Gate()), f"no such setting: rule; there are {NAMES}"),
    ],
)
def test_bad_settings(flux: Any, given: dict[str, Any], message: str) -> None:
    for refuses in (tc.Policy.of, functools.partial(tc.apply, flux), functools.partial(tc.apply_teacache, flux)):
        assert refusal(refuses, **given) == message


@pytest.mark.parametrize("planned", [dict(budget=0.3), dict(steps="110")], ids=str)
def test_planned_steps_stand_alone(planned: dict[str, Any]) -> None:
    (name,) = planned
    for f in settings_of(tc.Gate):
        first, other = (name, f.name) if name == "budget" else (f.name, name)
        message = f"{first} says which steps compute, and {other} cannot count: leave out either"
        assert refusal(tc.Policy.of, **planned, **{f.name: 1}) == message


def test_bad_policies(flux: Any) -> None:
    for policy in (7, tc.Gate()):
        message = f"policy must be a Policy, or the path of one or of a picture, got {policy!r}"
        assert refusal(tc.apply, flux, policy) == message
    message = "a policy has all settings: leave out either it or budget, mode"
    assert refusal(tc.apply, flux, tc.Policy(), budget=0.4, mode=None) == message
    assert refusal(tc.apply, flux, "fast") == "a policy is a Policy or a path, and 'fast' a mode: mode='fast'"
    assert refusal(tc.Policy, rule="1101") == "rule must be a Tolerance, a Gate, a Budget or Steps, got '1101'"


GOOD: dict[str, Any] = {"format": "mlx-teacache-fast policy", "version": 1, "policy": {"steps": "10"}, "about": {}}


NO_FORMAT = 'is not a policy: it has no "format": "mlx-teacache-fast policy"'
BEGIN = "steps must begin with a computed step (1), got '01': there is nothing to reuse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"is not a policy: it must have 1 to {2**26} bytes of text, got 0"),
        ("NaN", "is not a policy: NaN is no number"),
        ("[]", NO_FORMAT),
        (json.dumps(GOOD | {"format": "mlx-teacache-fast trace"}), NO_FORMAT),
        (json.dumps(GOOD | {"version": 2}), "is a policy of version 2, and this package reads 1"),
        (json.dumps(GOOD | {"version": True}), "is a policy of version True, and this package reads 1"),
        (json.dumps({"format": GOOD["format"], "version": 1}), "is not a policy: missing or unknown: 'policy'"),
        (json.dumps(GOOD | {"colour": 1}), "is not a policy: missing or unknown: 'colour'"),
        (json.dumps(GOOD | {"policy": 1}), "is not a policy: policy must be an object, got 1"),
        (json.dumps(GOOD | {"policy": {"steps": "01"}}), f"is not a policy: {BEGIN}"),
        (json.dumps(GOOD | {"policy": {"colour": 1}}), f"is not a policy: no such setting: colour; there are {NAMES}"),
    ],
)
def test_bad_files(flux: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    assert refusal(tc.apply, flux, path) == refusal(tc.Policy.from_json, path) == f"{path} {message}"


def test_files_that_are_not_there_or_no_gated_picture(flux: Any, tmp_path: Path) -> None:
    for name in ("a.json", "a.metadata.json", "a.png"):
        path = tmp_path / name
        with pytest.raises(FileNotFoundError):
            tc.apply(flux, path)
        path.write_text("{}")
        unsaid = "does not say that it was made with gating: it has no 'mlx_teacache_fast' metadata"
        assert refusal(tc.apply, flux, str(path)) == f"{path} {unsaid if name == 'a.metadata.json' else NO_FORMAT}"


# ---- Defaults and modes


def test_the_default_forecasts_the_output(flux: Any) -> None:
    with tc.apply(flux) as handle:
        assert handle.policy == tc.Policy.of(tolerance=0.1, forecast=1, cache="output")
        assert (handle.variant_id, handle.calibrated) == ("tiny-klein", True)
    with tc.apply_teacache(flux) as handle:
        assert (handle.policy.forecast, handle.policy.cache, handle.rel_l1_thresh) == (0, "residual", 0.17)
        assert (handle.variant_id, handle.calibrated) == ("flux2-klein-base-4b", True)
    for same in (dict(rel_l1_thresh=0.17, forecast=0, cache="residual"), handle.policy.flat):  # by name
        with tc.apply(flux, **same) as again:
            assert (again.policy, again.variant_id) == (handle.policy, handle.variant_id)
    with tc.apply_teacache(flux, forecast=2, cache="output") as handle:
        assert (handle.policy.forecast, handle.policy.cache) == (2, "output")


def test_the_default_is_closer_than_teacache_with_no_more_steps(flux: Any, generate: Generate) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=25, guidance=4.0)
    plain = generate(**arguments)
    with tc.apply_teacache(flux) as theirs:
        reused = generate(**arguments)
    with tc.apply(flux) as handle:
        forecast = generate(**arguments)
    assert handle.stats.skipped_count >= 2 * theirs.stats.skipped_count > 0
    assert psnr(plain, forecast) > psnr(plain, reused)


def test_modes_are_tolerances(flux: Any) -> None:
    tolerances = {}
    for mode in tc.MODES:
        with tc.apply(flux, mode=mode) as handle:
            tolerances[mode] = handle.policy.flat["tolerance"]
            assert handle.policy == tc.Policy.of(tolerance=tc.MODES[mode])
    assert tolerances["quality"] < tolerances["balanced"] < tolerances["fast"]
    assert tc.Policy() == tc.Policy.of(mode="balanced") == tc.Policy.of()


# ---- The search


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
    found = Recorded(sigmas, [values @ values.T / 7]).estimate(steps, order, rho)
    if error > 1e-12:
        assert found == pytest.approx(-10 * math.log10(error), abs=1e-3)
    else:
        assert found > 110


@given(st.lists(st.booleans(), min_size=5, max_size=30), st.integers(0, 1000))
def test_neighbours(steps: list[bool], seed: int) -> None:
    start = (True, True, False, *steps)
    found = neighbour(start, random.Random(seed))
    assert found[0]
    assert sum(found) == sum(start)
    assert sum(a != b for a, b in zip(start, found, strict=True)) == 2


def test_annealing_finds_what_is_best() -> None:
    best = budgeted([1 - i / 12 for i in range(12)], 0.5, 64)
    start = tuple(i < 6 for i in range(12))

    def judge(steps: tuple[bool, ...]) -> float:
        return -float(sum(a != b for a, b in zip(steps, best, strict=True)))

    assert annealed(start, judge, 2000, random.Random(1)) == best


def about_of(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.read_text())["about"]
    return about


def steps_of(policy: tc.Policy) -> str:
    assert isinstance(policy.rule, tc.Steps)
    return policy.rule.steps


PROMPTS = ["red apple", "cat face"]
SEARCH: dict[str, Any] = dict(budget=0.5, held_out=["pizza"], evaluations=5, **SMALL)


def test_a_search(flux: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = tc.search(flux, PROMPTS, path=path, **SEARCH)
    assert tc.Policy.from_json(path) == found.policy
    assert about_of(path) == found.about
    about, plan = found.about, steps_of(found.policy)
    assert found.policy == tc.Policy(rule=tc.Steps(steps=plan), corrector=0.5)
    assert (len(plan), plan.count("1")) == (10, 5)
    assert len(about["measured"]) == 5
    assert about["rule"] in about["measured"]
    means = {steps: statistics.mean(values) for steps, values in about["measured"].items()}
    assert about["psnr"] == {"rule": means[about["rule"]], "plan": means[plan]}
    assert means[plan] == max(means.values())

    # What the file says is what its plan gives.
    for prompts, key in ((PROMPTS, "psnr"), (["pizza"], "held_out_psnr")):
        for steps, name in ((about["rule"], "rule"), (plan, "plan")):
            seen = []
            for prompt in prompts:
                plain = np.asarray(flux.generate_image(prompt=prompt, seed=1, **SMALL).image)
                with tc.apply(flux, steps=steps, corrector=0.5):
                    seen.append(psnr(plain, np.asarray(flux.generate_image(prompt=prompt, seed=1, **SMALL).image)))
            assert statistics.mean(seen) == pytest.approx(about[key][name])


def test_a_search_goes_on_where_it_was(flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"

    class Interrupting:
        count = 0

        def call_in_loop(self, **_: Any) -> None:
            self.count += 1
            if self.count == 55:  # 2 full pictures, then the third picture of a plan
                raise KeyboardInterrupt

    callback = Interrupting()
    flux.callbacks.register(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            tc.search(flux, PROMPTS, path=path, **SEARCH)
    finally:
        flux.callbacks.in_loop.remove(callback)
    before = about_of(path)["measured"]
    assert len(before) == 1

    assert refusal(tc.search, flux, PROMPTS, path=path, **SEARCH) == f"{path} exists; force=True overwrites it"
    tc.Policy().to_json(tmp_path / "other.json")
    assert refusal(tc.search, flux, PROMPTS, path=tmp_path / "other.json", resume=True, **SEARCH) == (
        f"{tmp_path}/other.json is a policy, but not one of a search that can be gone on with"
    )
    assert refusal(tc.search, flux, PROMPTS, resume=True, **SEARCH) == (
        "resume needs the path of the search to go on with"
    )
    other = f"{path} is of a search with other %s: resume takes the same ones"
    changes: dict[str, dict[str, Any]] = {"prompts": {"prompts": PROMPTS[:1]}, "options": {"guidance": 2.0}}
    changes |= {"seeds": {"seeds": (2,)}, "budget": {"budget": 0.4}}
    for name, change in changes.items():
        again = {"prompts": PROMPTS, "path": path, "resume": True} | SEARCH | change
        assert refusal(tc.search, flux, **again) == other % name
    monkeypatch.setattr(flux, "model_config", ModelConfig.flux2_klein_base_9b())
    assert refusal(tc.search, flux, PROMPTS, path=path, resume=True, **SEARCH) == other % "variant_id, model"
    monkeypatch.undo()
    found = tc.search(flux, PROMPTS, path=path, resume=True, **SEARCH)
    assert len(found.about["measured"]) == 5
    assert before.items() <= found.about["measured"].items()


def test_a_search_ends_when_there_are_no_more_plans(flux: Any) -> None:
    few = dict(num_inference_steps=5, height=32, width=32, guidance=1.0)
    found = tc.search(flux, PROMPTS[:1], budget=0.6, evaluations=40, **few)
    assert sorted(found.about["measured"]) == ["10011", "10101", "10110", "11001", "11010", "11100"]
    assert found.about["held_out_psnr"] == {"rule": None, "plan": None}


def test_options_of_every_kind_are_written(flux: Any, photo: Path, tmp_path: Path) -> None:
    """And image-to-image: the plan is for the active steps."""
    path = tmp_path / "plan.json"
    options = SEARCH | dict(held_out=[], evaluations=2, image_path=photo, image_strength=0.3)
    for resume in (False, True):
        found = tc.search(flux, PROMPTS[:1], seeds=[np.int64(1)], path=path, resume=resume, **options)
    assert len(steps_of(found.policy)) == 7
    none = options | dict(image_strength=1.0)
    assert refusal(tc.search, flux, PROMPTS[:1], **none) == "the generation has no steps"


class NoSigmas(LinearScheduler):
    """A user's, whose schedule is its own affair."""

    sigmas = ()


SEARCH_NEEDS = "search needs a list of prompts, one or more seeds, and one or more evaluations"


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, SEARCH_NEEDS),
        ("red apple", {}, SEARCH_NEEDS),
        (PROMPTS, {"evaluations": 0}, SEARCH_NEEDS),
        (PROMPTS, {"seeds": ()}, SEARCH_NEEDS),
        (PROMPTS, {"budget": 1.0}, "budget=1 of 10 steps leaves no step to choose"),
        (PROMPTS, {"budget": 0.2}, "budget=0.2 of 10 steps leaves no step to choose"),
        (PROMPTS, {"forecast": 3}, "forecast must be an order from 0 (reuse) to 2, got 3"),
        (
            PROMPTS,
            {"scheduler": f"{NoSigmas.__module__}.NoSigmas"},
            "search needs a scheduler that has sigmas, one for each step",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.DisabledWarning")
def test_searches_that_are_refused(flux: Any, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    assert refusal(tc.search, flux, prompts, **SEARCH | arguments) == message


def test_a_search_of_residuals_with_a_key_value_cache(photo: Path) -> None:
    edit = edit_pipeline()
    edit.model_config = ModelConfig.flux2_klein_9b_kv()
    assert refusal(tc.search, edit, PROMPTS, cache="residual", image_paths=[photo], **SEARCH) == (
        'search takes cache="output" only with a key-value cache, which has no first residual'
    )


# ---- Calibration


def test_a_calibration(flux: Any, tmp_path: Path) -> None:
    fitted = tc.calibrate(flux, PROMPTS, held_out=["pizza"], guidances=(1.0, 4.0), **SMALL | {"guidance": 1.0})
    rule: Any = fitted.policy.rule
    # Nothing is measured in the forced first and last steps, nor in the one after the first: 7 pairs a picture.
    assert fitted.pairs.shape == (2 * 2 * 7, 2)
    assert fitted.held_out.shape == (2 * 7, 2)
    x, y = fitted.pairs.T
    assert rule.calibrated_range == (x.min(), x.max())
    assert fitted.dataset == "2 prompts x 1 seed, 10 steps, 32x32, guidance 1 and 4"

    def r2(pairs: np.ndarray) -> float:
        residuals = pairs[:, 1] - np.polynomial.Polynomial(rule.coefficients[::-1])(pairs[:, 0])
        return 1 - float((residuals**2).mean() / pairs[:, 1].var())

    assert fitted.r2 == pytest.approx(r2(fitted.pairs))
    assert fitted.held_out_r2 == pytest.approx(r2(fitted.held_out))
    best = np.polynomial.Polynomial.fit(x, y, 4)
    assert ((best(x) - y) ** 2).sum() == pytest.approx((1 - fitted.r2) * ((y - y.mean()) ** 2).sum(), rel=1e-6)

    # The pairs, another way: what the scheduler was given, and the distances of a gate that skips nothing.
    with noises(flux) as noting, tc.apply(flux, rel_l1_thresh=1e-9) as handle:
        flux.generate_image(prompt="red apple", seed=1, **SMALL)
        assert handle.stats.last_generation is not None
        distances = [step.rel_l1 for step in handle.stats.last_generation.steps[2:-1]]
    consecutive = zip(noting.noises[1:], noting.noises[2:-1], strict=False)
    changes = [np.abs(b - a).mean() / np.abs(a).mean() for a, b in consecutive]
    np.testing.assert_allclose(fitted.pairs[:7, 0], distances, rtol=1e-6)
    np.testing.assert_allclose(fitted.pairs[:7, 1], changes, rtol=1e-5)

    path = tmp_path / "mine.json"
    fitted.to_json(path)
    with tc.apply(flux, path) as handle:
        assert handle.policy == fitted.policy
    assert len(about_of(path)["skipped_share_at_threshold"]) == len(fitted.shares)
    axes = fitted.plot().axes[0]
    assert [len(points.get_offsets()) for points in axes.collections] == [28, 14]


def test_the_suggested_threshold_skips_a_third(flux: Any) -> None:
    """With it a third of the steps or more would have been skipped, with the next lower one of two digits fewer."""
    options = SMALL | {"num_inference_steps": 20}
    fitted = tc.calibrate(flux, PROMPTS, held_out=["pizza"], **options)
    found: Any = fitted.policy.rule
    assert found.rel_l1_thresh is not None
    assert found.rel_l1_thresh in dict(fitted.shares)
    with tc.apply(flux, rel_l1_thresh=1e-9) as handle:
        for prompt in (*PROMPTS, "pizza"):
            flux.generate_image(prompt=prompt, seed=1, **options)
    lower = found.rel_l1_thresh - 10.0 ** math.floor(math.log10(found.rel_l1_thresh) - 1)
    for threshold, is_enough in ((found.rel_l1_thresh, True), (lower, False)):
        how = {"coefficients": found.coefficients, "calibrated_range": found.calibrated_range}
        again = replay(handle.trace, rel_l1_thresh=threshold, **how)
        assert (statistics.mean(g.skipped / g.num_steps for g in again.generations) >= 1 / 3) == is_enough


def test_so_few_steps_that_no_threshold_skips_a_third(flux: Any) -> None:
    prompts = [*PROMPTS, "owl", "rocket", "candy", "blue heart"]
    fitted = tc.calibrate(flux, prompts, held_out=["pizza"], **SMALL | {"num_inference_steps": 4})
    assert fitted.policy.flat["rel_l1_thresh"] is None
    assert len(dict(fitted.shares)) == len(fitted.shares)


CALIBRATE_NEEDS = "calibrate needs lists: one or more prompts, held_out ones, and seeds"


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, CALIBRATE_NEEDS),
        ("red apple", {}, CALIBRATE_NEEDS),
        (PROMPTS, {"held_out": []}, CALIBRATE_NEEDS),
        (PROMPTS, {"held_out": "pizza"}, CALIBRATE_NEEDS),
        (PROMPTS, {"seeds": ()}, CALIBRATE_NEEDS),
        (PROMPTS, {"held_out": PROMPTS[:1]}, "a prompt is fitted or held out, not both: red apple"),
        (
            PROMPTS[:1],
            {"num_inference_steps": 5},
            "2 pairs of steps are too few to fit: use more steps or prompts",
        ),
    ],
)
def test_calibrations_that_are_refused(flux: Any, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    assert refusal(tc.calibrate, flux, prompts, **dict(held_out=["pizza"], **SMALL) | arguments) == message


@pytest.mark.filterwarnings("ignore:this generation was not gated:mlx_teacache_fast.TeaCacheWarning")
def test_a_calibration_of_a_pipeline_that_hides_its_loop(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, picture = type(flux), flux.generate_image(prompt="red apple", seed=1, **SMALL)
    own = type("Own", (kind,), {"generate_image": lambda self, **arguments: picture})
    monkeypatch.setattr(flux, "__class__", own)
    with pytest.raises(tc.InternalStateError) as error:
        tc.calibrate(flux, PROMPTS, held_out=["pizza"], **SMALL)
    assert str(error.value) == "a generation did not go through the gate, and its steps are not known"


# ---- The command line

TINY = ["--steps", "8", "--size", "32"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\n\ncat face\npizza\n")
    return path


def test_search_on_the_command_line(tmp_path: Path, prompt_file: Path) -> None:
    path = tmp_path / "plan.json"
    command = ["search", "demo", *TINY, "--guidance", 1, "--budget", 0.5, "--prompts", prompt_file, "--held-out", 1]
    result = run(*command, "--evaluations", 3, "--output", path)
    assert result.code == 0, result.err
    plan, about = steps_of(tc.Policy.from_json(path)), about_of(path)
    lines = result.out.splitlines()
    assert lines[0] == "4 of 8 steps computed; PSNR against the full pictures, mean:"
    assert lines[3].split()[0] == "searched"
    assert lines[4].split()[:2] == ["held", "out"]
    assert lines[7] == f"plan  {plan}"
    unseen = about["held_out_psnr"]
    assert ("does not beat the rule" in result.out) == (unseen["plan"] <= unseen["rule"])
    n = 80 if plan == about["rule"] else 88  # one bar: 2 x (1 + 3) + 3 pictures of 8 steps; two if equal
    assert f"step {n}/{n}" in result.err
    for options, message in (
        ([], f"{path} exists; --force overwrites it"),
        (["--resume", "--force"], "--resume goes on with FILE and --force begins anew: leave out either"),
    ):
        result = run(*command, *options, "--output", path)
        assert (result.code, result.err) == (2, f"mlx-teacache-fast search: error: {message}\n")
    result = run(*command, "--evaluations", 4, "--resume", "--output", path)
    assert result.code == 0, result.err
    assert len(about_of(path)["measured"]) == 4


def test_calibrate_on_the_command_line(tmp_path: Path, prompt_file: Path) -> None:
    path = tmp_path / "mine.json"
    command = ["calibrate", "demo", *TINY, "--guidance", 1, 4, "--prompts", prompt_file, "--held-out", 1]
    result = run(*command, "--output", path)
    assert result.code == 0, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.png", "prompts.txt"]
    assert result.out.startswith("2 prompts x 1 seed, 8 steps, 32x32, guidance 1 and 4\n\ncoefficients  ")
    assert "  <- the file's threshold" in result.out
    exists = f"{path} exists; --force overwrites it"
    both = "cannot hold both the polynomial and its plot: give another --output or --plot"
    for options, message in (
        (["--output", path], exists),
        (["--output", tmp_path / "other.json", "--plot", path], exists),
        (["--output", tmp_path / "x.png", "--force"], f"{tmp_path / 'x.png'} {both}"),
        (["--output", path, "--plot", path, "--force"], f"{path} {both}"),
    ):
        result = run(*command, *options)
        assert (result.code, result.err) == (2, f"mlx-teacache-fast calibrate: error: {message}\n")


@pytest.mark.parametrize("command", ["search", "calibrate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["flux2-klien-base-4b"],
            "mflux knows no model 'flux2-klien-base-4b'; did you mean flux2-klein-base-4b or flux2-klein-base-9b or "
            "flux2-klein-base-4B?; for a checkpoint of another name, --base-model says what it was made from",
        ),
        (["demo", "--quantize", "8"], "the demonstration model takes no --quantize"),
        (["demo", "--held-out", "12"], "12 prompts, and --held-out 12 leaves none of them"),
        (["dev", "--held-out", "8"], "8 prompts, and --held-out 8 leaves none of them"),
        (["dev-fill"], "dev-fill is not for text-to-image: load it in Python, in the pipeline that it is for"),
        (
            ["flux2-klein-base-4b", "--prompts", "missing.txt"],
            "[Errno 2] No such file or directory: 'missing.txt'",
        ),
    ],
)
def test_bad_options(tmp_path: Path, command: str, arguments: list[str], message: str) -> None:
    budget = ["--budget", 0.5] if command == "search" else []
    result = run(command, *arguments, *budget, "--output", tmp_path / "x.json")
    assert result.code == (1 if "missing.txt" in arguments else 2)
    assert result.err == f"mlx-teacache-fast {command}: error: {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["search", "calibrate"])
def test_help(command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"mlx-teacache-fast {command}" in result.out
    assert "--held-out" in result.out


def test_a_plan_that_is_no_better_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"psnr": {"rule": 40.0, "plan": 41.0}, "held_out_psnr": {"rule": 40.0, "plan": 39.0}, "rule": "1101"}
    found = Found(tc.Policy(rule=tc.Steps(steps="1011")), about)
    monkeypatch.setattr("mlx_teacache_fast.tune.search.search", lambda *_, **__: found)
    assert run("search", "demo", "--budget", 0.5, "--output", tmp_path / "x.json").out.count("does not beat") == 1
