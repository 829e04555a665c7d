"""The demonstration model's schedules: by the formula, in mflux's own loop, and in what gating makes of them."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mflux", reason="the schedulers are mflux's")

import mlx.core as mx
from conftest import Generate
from mflux.models.common.config.config import Config
from mflux.models.common.schedulers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_cli import QUICK, Result, run

import mlx_teacache_fast as tc
from mlx_teacache_fast import demo
from mlx_teacache_fast.demo import report

SHIFTED = [r for r in demo.REGIMES.values() if r.shift is not None]
shifted = pytest.mark.parametrize("regime", SHIFTED, ids=[r.name for r in SHIFTED])


def by_formula(e: float, steps: int) -> np.ndarray:
    t = np.append(1 - np.arange(steps) / steps, 0)
    return e * t / (1 + (e - 1) * t)


def scheduler(flux: Any, steps: int, size: int = 128, **options: Any) -> Any:
    return Config(flux.model_config, num_inference_steps=steps, height=size, width=size, **options).scheduler


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@shifted
def test_sigmas(flux: Any, regime: Any, steps: int) -> None:
    found = scheduler(flux, steps, **regime.options)
    expected = by_formula(regime.shift, steps)
    np.testing.assert_allclose(found.sigmas, expected, rtol=2e-6)  # float32: exp, two sums, two quotients
    np.testing.assert_allclose(found.timesteps, 1000 * expected[:-1], rtol=2e-6)
    np.testing.assert_array_equal(found.sigmas, scheduler(flux, steps, size=512, **regime.options).sigmas)


def test_sigmas_by_hand(flux: Any) -> None:
    middle = scheduler(flux, 50, scheduler="flux2-1024").sigmas[25].item()  # t = 1/2
    assert middle == pytest.approx(0.47 / 0.97, rel=1e-6)


def test_what_the_regimes_stand_for(flux: Any) -> None:
    """A picture of 4096 tokens against one of 64: sqrt(4096 / 64) = 8."""
    flux2 = math.exp(FlowMatchEulerDiscreteScheduler._compute_empirical_mu(4096, 50))
    flux1_dev = math.exp(1.15)  # sigma_max_shift of its configuration, which is that of 4096 tokens
    assert demo.REGIMES["flux2-1024"].shift == pytest.approx(flux2 / 8, rel=0.01)
    assert demo.REGIMES["flux1-dev-1024"].shift == pytest.approx(flux1_dev / 8, rel=0.02)
    own = scheduler(flux, 50, scheduler="flow_match_euler_discrete").sigmas  # which generate_image takes by default
    np.testing.assert_allclose(own, by_formula(4.96, 50), rtol=1e-3)
    assert demo.REGIMES["own"].options == {}


# ---- Pictures. The other route: mflux's own scheduler, which a callback gives another mu before the first step.


class Mu:
    def __init__(self, shift: float) -> None:
        self.mu = math.log(shift)

    def call_before_loop(self, config: Any, **_: Any) -> None:
        config.scheduler.set_mu(self.mu)


@pytest.mark.parametrize("how", [None, {"budget": 0.3}, {"rel_l1_thresh": 0.1}], ids=["plain", "budget", "gate"])
@shifted
def test_pictures(flux: Any, generate: Generate, regime: Any, how: dict[str, Any] | None) -> None:
    settings: dict[str, Any] = dict(num_inference_steps=16, height=64, width=64, guidance=4.0)
    with nullcontext() if how is None else tc.apply(flux, **how) as handle:
        picture, own = generate(**settings, **regime.options), generate(**settings)
        flux.callbacks.register(mu := Mu(regime.shift))
        try:
            other = generate(**settings)
        finally:
            flux.callbacks.before_loop.remove(mu)
    np.testing.assert_array_equal(picture, other)
    assert (picture != own).any()
    if handle is not None:
        plan, own_plan, other_plan = ([step.kind for step in g.steps] for g in handle.stats.finished)
        assert plan == other_plan
        assert plan != own_plan
        assert "skipped" in plan


class Start:
    """The latents before the first step."""

    def call_before_loop(self, latents: Any, **_: Any) -> None:
        self.latents = np.array(latents.astype(mx.float32), np.float64)


def test_image_to_image(flux: Any, generate: Generate, photo: Path) -> None:
    """It starts at step 4 of 10 from (1 - sigma) photo + sigma noise."""
    settings = dict(num_inference_steps=10, height=64, width=64)
    half = settings | dict(image_path=photo, image_strength=0.4)
    starts = []
    with tc.apply(flux, budget=0.5) as handle:
        for given in (settings, half, half | {"scheduler": "beyond"}):
            flux.callbacks.register(start := Start())
            try:
                generate(**given)
            finally:
                flux.callbacks.before_loop.remove(start)
            starts.append(start.latents)
    noise, own, beyond = starts
    own_sigma, sigma = scheduler(flux, 10, size=64, scheduler="flow_match_euler_discrete").sigmas[4].item(), 0.18 / 0.58
    clean = (own - own_sigma * noise) / (1 - own_sigma)
    np.testing.assert_allclose(beyond, (1 - sigma) * clean + sigma * noise, atol=1e-4)
    plans = [[step.kind for step in g.steps] for g in handle.stats.finished[1:]]
    assert [plan.count("computed") for plan in plans] == [3, 3]  # of 6


def test_metadata(flux: Any, tmp_path: Path) -> None:
    run_it: dict[str, Any] = dict(seed=3, prompt="red apple", num_inference_steps=14, height=64, width=64, guidance=1.0)
    with tc.apply(flux, budget=0.4):
        first = flux.generate_image(**run_it, scheduler="flux2-1024")
    first.save(tmp_path / "a.png")
    said = tc.read_metadata(tmp_path / "a.png")
    assert said.mflux["scheduler"] == "flux2-1024"
    assert ["scheduler", "flux2-1024"] in [line.split() for line in run("info", tmp_path / "a.png").out.splitlines()]
    with tc.apply(flux, steps=said.steps, corrector=said.policy.corrector):
        again = flux.generate_image(**run_it, scheduler=said.mflux["scheduler"])
    np.testing.assert_array_equal(first.image, again.image)


# ---- The command


def test_command(flux: Any, tmp_path: Path) -> None:
    result = run("demo", "sun", *QUICK, "--threshold", 0.5, "--regime", "beyond", "--output", tmp_path)
    assert result.code == 0, result.err
    line = "14 steps, guidance 1, seed 3, threshold 0.5, 32x32 pixels, regime beyond; an untimed warm-up of each kind"
    assert line in result.out
    plain = flux.generate_image(3, "sun", 14, 32, 32, 1.0, scheduler="beyond").image
    panel = np.asarray(Image.open(tmp_path / "images.png"))[report.HEAD :, report.MARGIN :][:256:8, :256:8]
    np.testing.assert_array_equal(panel, np.asarray(plain))


def test_bad_names(generate: Generate) -> None:
    names = "'own', 'flux2-1024', 'flux1-dev-1024', 'beyond'"
    message = f"argument --regime: invalid choice: 'flux2' (choose from {names}) (see mlx-teacache-fast demo --help)"
    assert run("demo", "--regime", "flux2") == Result(2, "", f"mlx-teacache-fast demo: error: {message}\n")
    with pytest.raises(NotImplementedError, match=r"^The scheduler 'flux2' is not implemented by mflux\.$"):
        generate(num_inference_steps=4, height=32, width=32, scheduler="flux2")


def test_the_rival_solver_is_of_second_order(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench's DPM-Solver++, where the way is known: data of one number, mean 2 and variance 1/4."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import schedulers

    def error(steps: int) -> float:
        x = mx.array([1.3])
        solver = scheduler(flux, steps, scheduler=schedulers.name(schedulers.DPMSolver, "flux2-1024"))
        for step, sigma in enumerate(solver.sigmas.tolist()[:-1]):
            clean = 2 + (1 - sigma) / 4 * (x - 2 * (1 - sigma)) / ((1 - sigma) ** 2 / 4 + sigma**2)
            x = solver.step(noise=(x - clean) / sigma, timestep=step, latents=x)
        return abs(float(x.item()) - (2 + 1.3 / 2))

    assert error(100) < error(50) / 3 < 1e-3  # Euler's: a half
