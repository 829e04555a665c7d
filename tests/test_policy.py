"""Policies: values, files, defaults and modes, on the real pipeline."""

import dataclasses
import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Generate
from test_cli import run

import mlx_teacache_fast as tc
from mlx_teacache_fast.cli.shared import flag
from mlx_teacache_fast.mflux.pictures import psnr
from mlx_teacache_fast.policy import RULES
from mlx_teacache_fast.policy import settings as settings_of

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
    assert {f.name for f in fields} == set(parameters) - {"flux", "policy", "group"}
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
