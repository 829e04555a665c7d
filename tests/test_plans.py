"""Published plans: as published in their own schedule, and carried over by sigma to others."""

from itertools import pairwise
from typing import Any

import pytest
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.schedulers.flow_match_euler_discrete_scheduler import FlowMatchEulerDiscreteScheduler

import mlx_teacache_fast as tc
from mlx_teacache_fast.plans import PUBLISHED, placed, published_plans, shifted
from mlx_teacache_fast.step.rules import budgeted


def computed(plan: tuple[bool, ...]) -> list[int]:
    return [i for i, computes in enumerate(plan) if computes]


def sigmas_of_mflux(tokens: int, num_steps: int) -> list[float]:
    """FLUX.2's."""
    _, sigmas = FlowMatchEulerDiscreteScheduler.get_timesteps_and_sigmas(tokens, num_steps)
    return [float(s) for s in sigmas][:-1]


KLEIN = {  # LeMiCa4FLUX, klein base 9B
    0.2: [0, 1, 4, 5, 9, 17, 25, 33, 41, 49],
    0.3: [*range(10), 17, 25, 33, 41, 49],
    0.4: [*range(15), 22, 32, 42, 47, 49],
    0.52: [*range(21), 25, 35, 43, 47, 49],
}


@pytest.mark.parametrize("budget", KLEIN)
def test_kleins_own_steps_are_the_published_ones(budget: float) -> None:
    sigmas = sigmas_of_mflux(4096, 50)
    assert computed(budgeted(sigmas, budget, 4096, PUBLISHED["flux2-klein-base-9b"])) == KLEIN[budget]


OTHERS = {  # MeanCache, and of ERNIE-Image LeMiCa
    "Qwen/Qwen-Image": [
        [0, 1, 3, 7, 14, 21, 28, 35, 42, 49],
        [*range(9), 10, 17, 24, 31, 38, 45, 48, 49],
        [*range(17), 24, 32, 40, 43, 45, 47, 48, 49],
    ],
    "qwen-image": [
        [0, 2, 4, 7, 14, 21, 28, 35, 42, 49],
        [*range(10), 11, 19, 27, 35, 43, 47, 49],
        [*range(16), 23, 31, 37, *range(44, 50)],
    ],
    "z-image": [
        [*range(4), 5, 9, 15, 22, 29, 36, 43, 47, 49],
        [*range(5), 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49],
        [*range(7), 8, *range(10, 14), *range(15, 19), 20, 22, 29, 37, 42, 45, 47, 48, 49],
    ],
    "ernie-image": [
        [0, 1, 3, 7, 14, 21, 28, 35, 42, 49],
        [*range(11), 17, 27, 37, 44, 48, 49],
        [*range(17), 22, 31, 38, 43, *range(46, 50)],
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_own_steps_are_the_published_ones(name: str) -> None:
    """In the schedule that mflux runs by default."""
    config = ModelConfig.from_name(name)
    scheduler = "flow_match_euler_discrete" if name == "z-image" else "linear"
    sigmas = [float(s) for s in Config(config, 50, 1024, 1024, 4.0, scheduler=scheduler).scheduler.sigmas][:50]
    for steps in OTHERS[name]:
        assert computed(budgeted(sigmas, len(steps) / 50, 4096, published_plans(config))) == steps


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_steps", [2, 3, 8, 25, 28, 50, 100])
@pytest.mark.parametrize("begin", [0.0, 0.5], ids=["text-to-image", "image-to-image"])
def test_any_schedule_gets_as_many_steps_as_it_may(name: str, num_steps: int, begin: float) -> None:
    sigmas = shifted(num_steps, 3.0)[int(begin * num_steps) :]
    n = len(sigmas)
    for percent in range(1, 101):
        plan = budgeted(sigmas, percent / 100, 4096, PUBLISHED[name])
        assert len(plan) == n
        assert plan[0]
        assert sum(plan) == min(n, max(2, int(percent * n / 100 + 1e-9)))


def test_between_two_plans_and_by_sigma() -> None:
    klein = PUBLISHED["flux2-klein-base-9b"]
    # Twice the steps: dense where the published plan is, and then as far apart in sigma, with another one in between.
    plan = placed(klein, shifted(100, 7.5636), 30)
    assert sum(plan[:20]) >= 18
    assert all(6 <= b - a <= 9 for a, b in pairwise(computed(plan)[19:]))
    assert all(placed(klein, shifted(50, 3.0), count)[-1] for count in range(2, 50))  # the last step is the last one
    # Another size has another schedule: what counts is sigma.
    small = sigmas_of_mflux(1024, 50)
    last = computed(placed(klein, small, 20))[-4]
    assert small[last] == pytest.approx(klein.sigmas[32], abs=0.02)
    # In image-to-image what is left of a plan: after step 16 steps 22, 32, 42, 47 and 49, and one to begin with.
    assert computed(placed(klein, klein.sigmas[16:], 6)) == [0, 6, 16, 26, 31, 33]


def test_magcache_is_calm_in_the_middle() -> None:
    for name in ("dev", "dev-kontext"):
        plan = placed(PUBLISHED[name], shifted(28, 3.1582), 12)
        first, middle, last = (sum(plan[a:b]) for a, b in ((0, 8), (8, 20), (20, 28)))
        assert first > last > middle / 2
        assert middle <= 3


def test_the_handle_says_whose_plans_are_used(flux: Any) -> None:
    for given, source in ((dict(budget=0.4), "rule"), ({}, "rule"), (dict(steps="10"), "user")):
        with tc.apply(flux, **given) as handle:
            assert handle.provenance.source == source
            assert handle.plans is None  # nobody published any for the demonstration model
    flux.model_config.aliases, aliases = ["flux2-klein-base-9b"], flux.model_config.aliases
    try:
        with tc.apply(flux, budget=0.4) as handle:
            assert handle.provenance == tc.Provenance("published", reference_url="https://arxiv.org/abs/2511.00090")
            flux.generate_image(prompt="red apple", seed=1, num_inference_steps=50, height=32, width=32, guidance=1.0)
        assert handle.plans is PUBLISHED["flux2-klein-base-9b"]
        steps = handle.stats.finished[0].steps
        assert sum(step.kind != "skipped" for step in steps) == 20
        sigmas = sigmas_of_mflux(4, 50)
        assert [s.index for s in steps if s.kind != "skipped"] == computed(budgeted(sigmas, 0.4, 4, handle.plans))
    finally:
        flux.model_config.aliases = aliases
