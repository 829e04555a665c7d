"""Defaults, modes, files of plans and calibrations; and the searches and fits that make them, on the real pipeline."""

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Generate
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.models.common.config.model_config import ModelConfig
from test_apply_flux2 import kinds
from test_cli import run
from test_forecast import noises

import mlx_teacache_fast as tc
from mlx_teacache_fast.tune.calibrate import Fitted
from mlx_teacache_fast.step.forecast import weights
from mlx_teacache_fast.mflux.pictures import psnr
from mlx_teacache_fast.tune.search import Recorded, annealed, neighbour
from mlx_teacache_fast.step.rules import Plan, budgeted
from mlx_teacache_fast.record.trace import replay
from mlx_teacache_fast.models import TINY_KLEIN

SMALL: dict[str, Any] = dict(num_inference_steps=10, height=32, width=32, guidance=1.0)


@pytest.fixture(autouse=True)
def _callbacks_are_as_before(flux: Any) -> Iterator[None]:
    before = [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")]
    yield
    assert [list(vars(flux.callbacks)[name]) for name in ("before_loop", "in_loop", "after_loop")] == before


# ---- Defaults and modes


def test_the_default_forecasts_the_output(flux: Any) -> None:
    with tc.apply(flux) as handle:
        assert (handle.forecast, handle.cache, handle.rel_l1_thresh) == (1, "output", TINY_KLEIN.rel_l1_thresh)
        assert (handle.variant_id, handle.calibrated) == ("tiny-klein", True)
        assert (handle.coefficients, handle.calibrated_range) == (TINY_KLEIN.coefficients, TINY_KLEIN.calibrated_range)
    with tc.apply_teacache(flux) as handle:
        assert (handle.forecast, handle.cache, handle.rel_l1_thresh) == (0, "residual", 0.17)
        assert (handle.variant_id, handle.calibrated) == ("flux2-klein-base-4b", True)
    for same in (dict(forecast=0, cache="residual"), handle.settings):  # by name
        with tc.apply(flux, **same) as again:
            assert again.settings == handle.settings
            assert (again.variant_id, again.coefficients) == (handle.variant_id, handle.coefficients)
    with tc.apply_teacache(flux, forecast=2, cache="output") as handle:
        assert (handle.forecast, handle.cache) == (2, "output")
    with pytest.raises(TypeError, match="unexpected keyword argument 'threshold'"):
        tc.apply_teacache(flux, threshold=0.2)


def test_the_default_is_closer_than_teacache_with_no_more_steps(flux: Any, generate: Generate) -> None:
    arguments: dict[str, Any] = dict(num_inference_steps=25, guidance=4.0)
    plain = generate(**arguments)
    with tc.apply_teacache(flux) as theirs:
        reused = generate(**arguments)
    with tc.apply(flux) as handle:
        forecast = generate(**arguments)
    assert handle.stats.skipped_count >= theirs.stats.skipped_count > 0
    assert psnr(plain, forecast) > psnr(plain, reused) + 2


def test_modes_are_thresholds(flux: Any) -> None:
    thresholds = {}
    for mode in tc.MODES:
        with tc.apply(flux, mode=mode) as handle:
            thresholds[mode] = handle.rel_l1_thresh
            assert (handle.forecast, handle.cache) == (1, "output")
    assert thresholds["quality"] < thresholds["balanced"] < thresholds["fast"]
    assert thresholds["balanced"] == TINY_KLEIN.rel_l1_thresh
    with tc.apply(flux, mode="fast", coefficients=[0, 0, 0, 1, 0]) as handle:
        assert handle.rel_l1_thresh == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode=["fast"]), "mode must be 'quality', 'balanced', 'fast', got ['fast']"),
        (dict(mode="best"), "mode must be 'quality', 'balanced', 'fast', got 'best'"),
        (dict(mode="fast", rel_l1_thresh=0.3), "mode and rel_l1_thresh both set the threshold: leave out either"),
        (dict(mode="fast", budget=0.3), "budget plans every step, and mode cannot count: leave out either"),
    ],
)
def test_bad_modes(flux: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, **arguments)
    assert str(error.value) == message


# ---- Files


def test_a_plan_from_a_file(flux: Any, generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan("1010100101", 2, "residual", {"budget": 0.5}).to_json(path)
    assert Plan.from_json(path) == Plan("1010100101", 2, "residual", {"budget": 0.5})
    with tc.apply(flux, plan=path) as handle:
        generate(**SMALL)
    assert [kind != "skipped" for kind in kinds(handle)] == [c == "1" for c in "1010100101"]
    assert handle.settings == {"steps": "1010100101", "forecast": 2, "cache": "residual"}
    for plan in (str(path), Plan.from_json(path)):
        with tc.apply(flux, plan=plan, forecast=0, cache="output") as handle:
            assert (handle.forecast, handle.cache) == (0, "output")
    with tc.apply_teacache(flux, plan=path) as handle:
        assert (handle.forecast, handle.cache) == (2, "residual")
    with tc.apply(flux, plan=path), pytest.raises(tc.InvalidStepWindowError, match="plans 10 steps and the schedule"):
        generate(**SMALL | dict(num_inference_steps=12))
    with pytest.raises(tc.TeaCacheValueError, match="plan plans every step, and budget cannot count"):
        tc.apply(flux, plan=path, budget=0.4)
    with pytest.raises(tc.TeaCacheValueError) as error:
        Plan("10", 1, "output", {}).to_json(path)
    assert str(error.value) == f"{path} exists; force=True overwrites it"
    with pytest.raises(FileNotFoundError):
        tc.apply(flux, plan=tmp_path / "none.json")


GOOD = {"format": "mlx-teacache-fast plan", "version": 1, "steps": "10", "forecast": 1, "cache": "output", "about": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        json.dumps(GOOD | {"format": "mlx-teacache-fast trace"}),
        json.dumps(GOOD | {"version": 2}),
        json.dumps({name: value for name, value in GOOD.items() if name != "about"}),
        json.dumps(GOOD | {"steps": "01"}),
        json.dumps(GOOD | {"forecast": 9}),
        json.dumps(GOOD | {"about": 1}),
    ],
)
def test_bad_plans(flux: Any, tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply(flux, plan=path)
    assert str(error.value).startswith(f"{path} is ")


MINE = tc.Calibration((0.0, 0.0, 0.0, 1.0, 0.0), (0.02, 0.2), 0.11, "two prompts", 0.5)


def test_a_calibration_from_a_file(flux: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    pairs = np.array([[0.1, 0.2]])
    Fitted(MINE, pairs, pairs, 0.6, ((0.11, 0.3),)).to_json(path)
    for given_as in (path, str(path), MINE, dataclasses.asdict(MINE)):
        with tc.apply(flux, coefficients=given_as) as handle:
            assert (handle.coefficients, handle.calibrated_range) == (MINE.coefficients, MINE.calibrated_range)
            assert (handle.rel_l1_thresh, handle.calibrated) == (0.11, False)
            assert handle.provenance == tc.Provenance("user", "two prompts", "held-out R^2", 0.5, None, 0.11)
    with tc.apply(flux, coefficients=path, rel_l1_thresh=0.3) as handle:
        assert handle.rel_l1_thresh == 0.3
    with tc.apply(flux, coefficients=dataclasses.replace(MINE, rel_l1_thresh=None)) as handle:
        assert handle.rel_l1_thresh == 0.2
    with pytest.warns(tc.DisabledWarning), tc.apply(flux, coefficients=dataclasses.replace(MINE, rel_l1_thresh=0.0)):
        pass


def test_a_calibrated_picture_repeats(flux: Any, tmp_path: Path) -> None:
    """Its metadata says the range too."""
    with tc.apply(flux, coefficients=MINE) as handle:
        first = flux.generate_image(prompt="red apple", seed=1, **SMALL)
    first.save(tmp_path / "a.png")
    said = tc.read_metadata(tmp_path / "a.png")
    assert said.settings["coefficients"] == {"coefficients": MINE.coefficients, "calibrated_range": (0.02, 0.2)}
    with tc.apply(flux, **said.settings) as again:
        second = flux.generate_image(prompt="red apple", seed=1, **SMALL)
    assert (again.coefficients, again.calibrated_range) == (handle.coefficients, handle.calibrated_range)
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(second.image))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"coefficients": [1, 2, 3, 4]}, "coefficients must be five finite numbers"),
        (
            {"coefficients": [1, 2, 3, 4, 5], "range": [0, 1]},
            "coefficients must be five numbers, a file or a Calibration",
        ),
        ({"calibrated_range": [0, 1]}, "coefficients must be five numbers, a file or a Calibration"),
        ({"coefficients": [1, 2, 3, 4, 5], "calibrated_range": [1, 0]}, "calibrated_range must be two finite numbers"),
        ({"coefficients": [1, 2, 3, 4, 5], "rel_l1_thresh": 2}, "rel_l1_thresh must be a number from 0.0 to 1.0"),
    ],
)
def test_bad_calibrations(flux: Any, value: Any, message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError, match=message):
        tc.apply(flux, coefficients=value)


# ---- The search


def predictions(num_steps: int, seed: int) -> tuple[list[float], np.ndarray]:
    """A smooth curve in a space of 7 dimensions, over an uneven schedule."""
    rng = np.random.default_rng(seed)
    sigmas = (1 - (np.arange(num_steps + 1) / num_steps) ** 2).tolist()
    t = np.array(sigmas[:-1])
    return sigmas, np.stack([np.cos(a * t + b) for a, b in rng.uniform(0, 4, (7, 2))], axis=1)


@given(st.integers(0, 1000), st.integers(0, 2), st.data())
@settings(max_examples=50)
def test_the_estimate_is_the_error_of_eulers_method(seed: int, order: int, data: st.DataObject) -> None:
    steps = (True, *data.draw(st.lists(st.booleans(), min_size=5, max_size=20)))
    sigmas, values = predictions(len(steps), seed)
    latents, exact, computed = np.zeros(7), np.zeros(7), list[int]()
    for i, computes in enumerate(steps):
        prediction = values[i]
        if computes:
            computed.insert(0, i)
        else:
            w = weights(sigmas[i], [sigmas[j] for j in computed], order)
            prediction = sum(wk * values[j] for wk, j in zip(w, computed, strict=False))  # type: ignore[assignment]
        latents = latents + (sigmas[i + 1] - sigmas[i]) * prediction
        exact = exact + (sigmas[i + 1] - sigmas[i]) * values[i]
    error = np.mean((latents - exact) ** 2)
    found = Recorded(sigmas, [values @ values.T / 7]).estimate(steps, order)
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
    best = budgeted([1 - i / 12 for i in range(12)], 0.5)
    start = tuple(i < 6 for i in range(12))

    def judge(steps: tuple[bool, ...]) -> float:
        return -float(sum(a != b for a, b in zip(steps, best, strict=True)))

    assert annealed(start, judge, 2000, random.Random(1)) == best


PROMPTS = ["red apple", "cat face"]
SEARCH: dict[str, Any] = dict(budget=0.5, held_out=["pizza"], evaluations=5, **SMALL)


def test_a_search(flux: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = tc.search(flux, PROMPTS, path=path, **SEARCH)
    assert Plan.from_json(path) == plan
    about = plan.about
    assert (plan.forecast, plan.cache, len(plan.steps), plan.steps.count("1")) == (1, "output", 10, 5)
    assert len(about["measured"]) == 5
    assert about["rule"] in about["measured"]
    means = {steps: statistics.mean(values) for steps, values in about["measured"].items()}
    assert about["psnr"] == {"rule": means[about["rule"]], "plan": means[plan.steps]}
    assert means[plan.steps] == max(means.values())

    # What the file says is what its plan gives.
    for prompts, key in ((PROMPTS, "psnr"), (["pizza"], "held_out_psnr")):
        for steps, name in ((about["rule"], "rule"), (plan.steps, "plan")):
            found = []
            for prompt in prompts:
                plain = np.asarray(flux.generate_image(prompt=prompt, seed=1, **SMALL).image)
                with tc.apply(flux, steps=steps):
                    found.append(psnr(plain, np.asarray(flux.generate_image(prompt=prompt, seed=1, **SMALL).image)))
            assert statistics.mean(found) == pytest.approx(about[key][name])


def test_a_search_goes_on_where_it_was(flux: Any, tmp_path: Path) -> None:
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
    before = Plan.from_json(path).about["measured"]
    assert len(before) == 1

    with pytest.raises(tc.TeaCacheValueError, match="exists; force=True overwrites it"):
        tc.search(flux, PROMPTS, path=path, **SEARCH)
    others: dict[str, dict[str, Any]] = {"prompts": {"prompts": PROMPTS[:1]}, "options": {"guidance": 2.0}}
    others |= {"seeds": {"seeds": (2,)}, "budget": {"budget": 0.4}}
    for name, other in others.items():
        with pytest.raises(tc.TeaCacheValueError, match=f"a search with other {name}: resume takes the same ones"):
            tc.search(flux, **{"prompts": PROMPTS} | SEARCH | other, path=path, resume=True)
    config = flux.model_config
    flux.model_config = ModelConfig.flux2_klein_base_9b()
    try:
        with pytest.raises(tc.TeaCacheValueError, match="a search with other variant_id, model: resume"):
            tc.search(flux, PROMPTS, path=path, resume=True, **SEARCH)
    finally:
        flux.model_config = config
    with pytest.raises(tc.TeaCacheValueError, match="resume needs the path"):
        tc.search(flux, PROMPTS, resume=True, **SEARCH)
    plan = tc.search(flux, PROMPTS, path=path, resume=True, **SEARCH)
    assert len(plan.about["measured"]) == 5
    assert before.items() <= plan.about["measured"].items()


def test_a_search_ends_when_there_are_no_more_plans(flux: Any) -> None:
    few = dict(num_inference_steps=5, height=32, width=32, guidance=1.0)
    plan = tc.search(flux, PROMPTS[:1], budget=0.6, evaluations=40, **few)
    assert sorted(plan.about["measured"]) == ["10011", "10101", "10110", "11001", "11010", "11100"]
    assert plan.about["held_out_psnr"] == {"rule": None, "plan": None}


def test_options_of_every_kind_are_written(flux: Any, photo: Path, tmp_path: Path) -> None:
    """And image-to-image: the plan is for the active steps."""
    path = tmp_path / "plan.json"
    options = SEARCH | dict(held_out=[], evaluations=2, image_path=photo, image_strength=0.3)
    for resume in (False, True):
        plan = tc.search(flux, PROMPTS[:1], seeds=[np.int64(1)], path=path, resume=resume, **options)
    assert len(plan.steps) == 7
    with pytest.raises(tc.TeaCacheValueError, match="the generation has no steps"):
        tc.search(flux, PROMPTS[:1], **options | dict(image_strength=1.0))


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "search needs a list of prompts"),
        ("red apple", {}, "search needs a list of prompts"),
        (PROMPTS, {"evaluations": 0}, "one or more evaluations"),
        (PROMPTS, {"seeds": ()}, "one or more seeds"),
        (PROMPTS, {"budget": 1.0}, "budget=1 of 10 steps leaves no step to choose"),
        (PROMPTS, {"budget": 0.2}, "budget=0.2 of 10 steps leaves no step to choose"),
        (PROMPTS, {"forecast": 3}, "forecast must be an order"),
    ],
)
@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.DisabledWarning")
def test_searches_that_are_refused(flux: Any, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError, match=message):
        tc.search(flux, prompts, **SEARCH | arguments)


# ---- Calibration


def test_a_calibration(flux: Any, tmp_path: Path) -> None:
    fitted = tc.calibrate(flux, PROMPTS, held_out=["pizza"], guidances=(1.0, 4.0), **SMALL | {"guidance": 1.0})
    calibration = fitted.calibration
    # Nothing is measured in the forced first and last steps, nor in the one after the first: 7 pairs a picture.
    assert fitted.pairs.shape == (2 * 2 * 7, 2)
    assert fitted.held_out.shape == (2 * 7, 2)
    x, y = fitted.pairs.T
    assert calibration.calibrated_range == (x.min(), x.max())
    assert calibration.dataset == "2 prompts x 1 seed, 10 steps, 32x32, guidance 1 and 4"

    def r2(pairs: np.ndarray) -> float:
        residuals = pairs[:, 1] - np.polynomial.Polynomial(calibration.coefficients[::-1])(pairs[:, 0])
        return 1 - float((residuals**2).mean() / pairs[:, 1].var())

    assert fitted.r2 == pytest.approx(r2(fitted.pairs))
    assert calibration.r2 == pytest.approx(r2(fitted.held_out))
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
    with tc.apply(flux, coefficients=path) as handle:
        assert handle.rel_l1_thresh == calibration.rel_l1_thresh
        assert handle.coefficients == calibration.coefficients
    said = json.loads(path.read_text())
    assert len(said["skipped_share_at_threshold"]) == len(fitted.shares)
    axes = fitted.plot().axes[0]
    assert [len(points.get_offsets()) for points in axes.collections] == [28, 14]


def test_the_suggested_threshold_skips_a_third(flux: Any) -> None:
    """With it a third of the steps or more would have been skipped, with the next lower one of two digits fewer."""
    options = SMALL | {"num_inference_steps": 20}
    fitted = tc.calibrate(flux, PROMPTS, held_out=["pizza"], **options)
    found = fitted.calibration
    assert found.rel_l1_thresh is not None
    assert found.rel_l1_thresh in dict(fitted.shares)
    with tc.apply(flux, rel_l1_thresh=1e-9) as handle:
        for prompt in (*PROMPTS, "pizza"):
            flux.generate_image(prompt=prompt, seed=1, **options)
    lower = found.rel_l1_thresh - 10.0 ** math.floor(math.log10(found.rel_l1_thresh) - 1)
    for threshold, is_enough in ((found.rel_l1_thresh, True), (lower, False)):
        how = {"coefficients": found.coefficients, "calibrated_range": found.calibrated_range}
        again = replay(handle.trace, rel_l1_thresh=threshold, **how)  # type: ignore[arg-type]
        assert (statistics.mean(g.skipped / g.num_steps for g in again.generations) >= 1 / 3) == is_enough


def test_so_few_steps_that_no_threshold_skips_a_third(flux: Any) -> None:
    prompts = [*PROMPTS, "owl", "rocket", "candy", "blue heart"]
    fitted = tc.calibrate(flux, prompts, held_out=["pizza"], **SMALL | {"num_inference_steps": 4})
    assert fitted.calibration.rel_l1_thresh is None
    assert len(dict(fitted.shares)) == len(fitted.shares)


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "calibrate needs lists"),
        ("red apple", {}, "calibrate needs lists"),
        (PROMPTS, {"held_out": []}, "calibrate needs lists"),
        (PROMPTS, {"held_out": PROMPTS[:1]}, "a prompt is fitted or held out, not both: red apple"),
        (PROMPTS[:1], {"num_inference_steps": 5}, "pairs of steps are too few to fit"),
    ],
)
def test_calibrations_that_are_refused(flux: Any, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError, match=message):
        tc.calibrate(flux, prompts, **dict(held_out=["pizza"], **SMALL) | arguments)


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
    plan = Plan.from_json(path)
    lines = result.out.splitlines()
    assert lines[0] == "4 of 8 steps computed; PSNR against the full pictures, mean:"
    assert lines[3].split()[0] == "searched"
    assert lines[4].split()[:2] == ["held", "out"]
    assert lines[7] == f"plan  {plan.steps}"
    unseen = plan.about["held_out_psnr"]
    assert ("does not beat the rule" in result.out) == (unseen["plan"] <= unseen["rule"])
    n = 80 if plan.steps == plan.about["rule"] else 88  # one bar: 2 x (1 + 3) + 3 pictures of 8 steps; two if equal
    assert f"step {n}/{n}" in result.err
    assert run(*command, "--output", path).err == (
        f"mlx-teacache-fast search: error: {path} exists; --force overwrites it\n"
    )
    result = run(*command, "--evaluations", 4, "--resume", "--output", path)
    assert result.code == 0, result.err
    assert len(Plan.from_json(path).about["measured"]) == 4


def test_calibrate_on_the_command_line(tmp_path: Path, prompt_file: Path) -> None:
    path = tmp_path / "mine.json"
    command = ["calibrate", "demo", *TINY, "--guidance", 1, 4, "--prompts", prompt_file, "--held-out", 1]
    result = run(*command, "--output", path)
    assert result.code == 0, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.png", "prompts.txt"]
    assert result.out.startswith("2 prompts x 1 seed, 8 steps, 32x32, guidance 1 and 4\n\ncoefficients  ")
    assert "  <- the file's threshold" in result.out
    assert run(*command, "--output", path).code == 2
    assert run(*command, "--output", tmp_path / "other.json", "--plot", path).code == 2
    for same in (["--output", tmp_path / "x.png"], ["--output", path, "--plot", path]):
        assert "cannot hold both the polynomial and its plot" in run(*command, *same, "--force").err


@pytest.mark.parametrize("command", ["search", "calibrate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux2-klien-base-4b"], "did you mean flux2-klein-base-4b or "),
        (["demo", "--quantize", "8"], "the demonstration model takes no --quantize"),
        (["demo", "--held-out", "12"], "12 prompts, and --held-out 12 leaves none of them"),
        (["dev", "--held-out", "8"], "8 prompts, and --held-out 8 leaves none of them"),
        (["dev-fill"], "dev-fill is not for text-to-image"),
        (["flux2-klein-base-4b", "--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_options(tmp_path: Path, command: str, arguments: list[str], message: str) -> None:
    budget = ["--budget", 0.5] if command == "search" else []
    result = run(command, *arguments, *budget, "--output", tmp_path / "x.json")
    assert result.code == (1 if "missing.txt" in arguments else 2)
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["search", "calibrate"])
def test_help(command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"mlx-teacache-fast {command}" in result.out
    assert "--held-out" in result.out


def test_a_plan_that_is_no_better_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"psnr": {"rule": 40.0, "plan": 41.0}, "held_out_psnr": {"rule": 40.0, "plan": 39.0}, "rule": "1101"}
    monkeypatch.setattr("mlx_teacache_fast.plan_search.search", lambda *_, **__: Plan("1011", 1, "output", about))
    assert run("search", "demo", "--budget", 0.5, "--output", tmp_path / "x.json").out.count("does not beat") == 1
