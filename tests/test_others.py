"""mflux's other families: a computed step is mflux's to the last bit, and a skipped one calls no model."""

import functools
import inspect
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import ALWAYS, NEVER, kinds, run, same
from mflux.models.common.config.model_config import ModelConfig
from mflux.utils.exceptions import StopImageGenerationException
from other_pipelines import PIPELINES, Small, eager

import mlx_teacache_fast as tc
from mlx_teacache_fast import errors
from mlx_teacache_fast.mflux import families, others
from mlx_teacache_fast.mflux.hook import NEWEST_VERIFIED_MFLUX, hook_of
from mlx_teacache_fast.mflux.pictures import ending
from mlx_teacache_fast.models import VARIANTS
from mlx_teacache_fast.step.generation import Generation
from mlx_teacache_fast.tuning.full import FullRuns, full_run

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")

every = pytest.mark.parametrize("small", PIPELINES, ids=str)
IS_NEWEST = version("mflux") == NEWEST_VERIFIED_MFLUX


class ByName(dict[str, Small]):
    def __missing__(self, name: str) -> Small:
        if IS_NEWEST:
            raise KeyError(name)
        pytest.skip(f"mflux {version('mflux')} has no {name}")


BY_NAME = ByName({str(small): small for small in PIPELINES})


def test_these_are_the_table() -> None:
    assert {small.kind for small in PIPELINES} == {kind for row in others.OTHERS for kind in row.pipelines}


def ways(small: Small) -> dict[str, dict[str, Any]]:
    """Of computing all."""
    found: dict[str, dict[str, Any]] = {
        "threshold 0": dict(rel_l1_thresh=0.0),
        "gate": NEVER,
        "tolerance": dict(tolerance=1e-9),
        "plan of ones": dict(steps="111111"),
    }
    if small.has_residual:
        found["residual"] = NEVER | dict(cache="residual", forecast=0)
    return found


@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float32, marks=pytest.mark.slow)], ids=str)
@every
def test_nothing_skipped_is_bit_equal(small: Small, dtype: mx.Dtype, photo: Path) -> None:
    with small.pipeline(dtype) as flux:
        before = dict(vars(flux))
        for guidance in (4.0, 1.0):
            given = small.arguments(photo) | dict(guidance=guidance)
            plain = run(flux, given)
            for name, how in ways(small).items():
                with tc.apply(flux, **how) as handle:
                    assert same(run(flux, given), plain), name
                assert handle.stats.generations == 1
                assert handle.stats.skipped_count == 0
            with tc.apply(flux, steps="111101"):  # the steps before the first skip
                planned = run(flux, given)
            assert same(planned, plain, steps=4)
            assert not same(planned, plain, steps=5)
            assert same(run(flux, given), plain)
        assert vars(flux) == before


def models(flux: Any) -> list[Any]:
    """What is called for the noise."""
    found = [
        getattr(flux, name, None) for name in ("controlnet", "conditional_transformer", "unconditional_transformer")
    ]
    return [model for model in found if model is not None] or [flux.transformer]


@every
def test_a_plan_is_a_loop_written_without_this_code(small: Small, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself is replaced: in a step that the plan skips it says what it said last, branch by branch."""
    plan = "110101"
    given = small.arguments(photo) | dict(guidance=4.0)
    with small.pipeline(mx.float32) as flux, eager():
        with tc.apply(flux, steps=plan, forecast=0, corrector=0):
            gated = run(flux, given)
        state: dict[str, Any] = {"step": 0, "said": {}, "branch": 0}

        class Steps:
            def call_in_loop(self, **_: Any) -> None:
                state["step"], state["branch"] = state["step"] + 1, 0

        flux.callbacks.register(Steps())
        for kind in {type(model) for model in models(flux)}:
            call = kind.__call__

            @functools.wraps(call)
            def says(self: Any, *args: Any, call: Any = call, **kwargs: Any) -> mx.array:
                branch, state["branch"] = state["branch"], state["branch"] + 1
                if plan[state["step"]] == "1":
                    state["said"][branch] = call(self, *args, **kwargs)
                return mx.array(state["said"][branch])

            monkeypatch.setattr(kind, "__call__", says)
        expected = run(flux, given)
    for a, b in zip(gated[1], expected[1], strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-4 * mx.abs(b).max().item())


@every
def test_a_skipped_step_calls_no_model(small: Small, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small.arguments(photo) | dict(guidance=4.0)
    called: list[int] = []
    with small.pipeline() as flux, eager():
        for kind in {type(model) for model in models(flux)}:
            call = kind.__call__

            @functools.wraps(call)
            def counted(*args: Any, call: Any = call, **kwargs: Any) -> mx.array:
                called.append(1)
                return call(*args, **kwargs)

            monkeypatch.setattr(kind, "__call__", counted)
        run(flux, given)
        of_a_step = len(called) / 6
        for how in (dict(steps="110101"), dict(steps="110101", forecast=2), dict(budget=0.67)):
            called.clear()
            with tc.apply(flux, **how) as handle:
                run(flux, given)
            assert handle.stats.skipped_count in (1, 2)  # FIBO 2 changes its embeddings in a step of these
            assert len(called) == (6 - handle.stats.skipped_count) * of_a_step


@every
def test_the_schedule_is_the_one_that_runs(small: Small, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times that the model is given are the schedule's sigmas, up to a factor and a shift."""
    sigmas: list[list[float]] = []
    times: list[float] = []
    own = Generation.stats
    monkeypatch.setattr(Generation, "stats", lambda self, s: sigmas.append(list(self.sigmas)) or own(self, s))
    given = small.arguments(photo) | dict(guidance=1.0)
    with small.pipeline(mx.float32) as flux, eager():
        for kind in {type(model) for model in models(flux)}:
            call = kind.__call__

            @functools.wraps(call)
            def seen(self: Any, *args: Any, call: Any = call, **kwargs: Any) -> mx.array:
                given = inspect.signature(call).bind(self, *args, **kwargs).arguments
                time = next(given[name] for name in ("t", "timestep", "timesteps", "sigma", "time") if name in given)
                times.append(float(given["config"].scheduler.sigmas[time]) if "config" in given else float(time))
                return call(self, *args, **kwargs)

            monkeypatch.setattr(kind, "__call__", seen)
        with tc.apply(flux, tolerance=0.1):
            run(flux, given)
    (known,) = sigmas
    assert len(known) == 7
    assert np.all(np.diff(known) < 0)
    assert known[0] == pytest.approx(1, abs=2e-3)
    assert 0 <= known[-1] < 0.05
    steps = times[:: len(times) // 6]
    relative = [np.array(x[:6]) - x[0] for x in (known, steps)]
    np.testing.assert_allclose(*(x / x[-1] for x in relative), atol=3e-3)


@every
def test_threads_and_an_interruption(small: Small, photo: Path) -> None:
    """Generations know nothing of each other; what an interrupted one leaves behind is nothing."""
    given = small.arguments(photo) | dict(guidance=4.0)
    with small.pipeline() as flux:
        flux.callbacks.in_loop.clear()
        flux.callbacks.before_loop.clear()
        before = dict(vars(flux))

        def picture(seed: int) -> np.ndarray:
            return np.asarray(flux.generate_image(**given | dict(seed=seed)).image)

        with tc.apply(flux, steps="110101") as handle:
            alone = {seed: picture(seed) for seed in (1, 2)}
            assert not np.array_equal(alone[1], alone[2])
            together: dict[int, np.ndarray] = {}
            # mflux's Anima has arrays that no other thread can evaluate; Qwen-Image-2.1 caches in its transformer.
            if str(small) not in ("Anima", "QwenImage21", "QwenImage21Edit", "QwenImage21Controlnet"):
                started = threading.Barrier(2)

                def in_thread(seed: int) -> None:
                    mx.set_default_device(mx.cpu)
                    started.wait()
                    together[seed] = picture(seed)

                threads = [threading.Thread(target=in_thread, args=(seed,)) for seed in (1, 2)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert all(np.array_equal(together[seed], alone[seed]) for seed in (1, 2))
            counted = handle.stats.generations

            class Interrupts:
                def call_in_loop(self, t: int, **_: Any) -> None:
                    if t == 3:
                        raise KeyboardInterrupt

            interrupts = Interrupts()
            flux.callbacks.register(interrupts)
            with pytest.raises(StopImageGenerationException):
                picture(1)
            flux.callbacks.in_loop.remove(interrupts)
            assert handle.stats.generations == counted
            assert np.array_equal(picture(1), alone[1])
        assert vars(flux) == before


# ---- What is special in some


def test_other_embeddings_begin_anew(photo: Path) -> None:
    """FIBO 2 goes on with other embeddings below a level of noise, and without the negative ones from cfg_end on."""
    small = BY_NAME["Fibo2"]
    given = small.arguments(photo) | dict(guidance=4.0, num_inference_steps=10)
    with small.pipeline() as flux:
        plain = run(flux, given)
        with tc.apply(flux, steps="1" + "0" * 9) as handle:
            run(flux, given)
        (switched,) = [i for i, kind in enumerate(kinds(handle)) if kind == "forced"]
        with tc.apply(flux, steps="1" + "0" * 9) as handle:
            run(flux, given | dict(cfg_end=0.8))
        assert [i for i, kind in enumerate(kinds(handle)) if kind == "forced"] == [switched, 8]
        with tc.apply(flux, **ALWAYS) as handle:
            run(flux, given)
        assert kinds(handle)[switched] == "forced"
        with tc.apply(flux, tolerance=1e-9):
            assert same(run(flux, given), plain)


def test_a_branch_that_stops(photo: Path) -> None:
    """Ideogram 4 leaves out the second call from cfg_end on."""
    small = BY_NAME["Ideogram4"]
    given = small.arguments(photo) | dict(guidance=4.0, num_inference_steps=8, cfg_end=0.5)
    with small.pipeline() as flux:
        plain = run(flux, given)
        for how in (NEVER, dict(steps="11111111"), dict(tolerance=1e-9)):
            with tc.apply(flux, **how) as handle:
                assert same(run(flux, given), plain)
        with tc.apply(flux, steps="11010101") as handle:
            assert not same(run(flux, given), plain)
        assert handle.stats.skipped_count == 3


@pytest.mark.parametrize("how", ["padded", "no cache"])
def test_a_text_without_a_cache(how: str, photo: Path) -> None:
    """Qwen-Image-2.1 runs text and picture together then; the gate measures the picture's tokens alone all the same."""
    small = BY_NAME["QwenImage21"]
    given = small.arguments(photo) | dict(guidance=4.0)
    with small.pipeline(mx.float32) as flux:
        with tc.apply(flux, **NEVER) as handle:
            run(flux, given)
        measured = [step.rel_l1 for step in handle.stats.last_generation.steps[2:5]]
        flux.transformer.use_text_cache = how != "no cache"
        if how == "padded":
            for prompt, (text, mask) in flux.prompt_cache.items():
                flux.prompt_cache[prompt] = mx.pad(text, ((0, 0), (0, 3), (0, 0))), mx.pad(mask, ((0, 0), (0, 3)))
        plain = run(flux, given)
        with tc.apply(flux, **NEVER) as handle:
            assert same(run(flux, given), plain)
        distances = [step.rel_l1 for step in handle.stats.last_generation.steps[2:5]]
        assert distances == pytest.approx(measured, rel=0.02)
        with tc.apply(flux, **ALWAYS) as handle:
            assert not same(run(flux, given), plain)
        assert handle.stats.skipped_count == 3


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("MOSSImage", dict(step_cache_ratio=0.3)),
        ("Fibo2", dict(step_cache_ratio=0.3)),
        ("QwenImage21", dict(teacache_ratio=0.3)),
        ("QwenImage21Edit", dict(use_step_cache=True)),
    ],
)
def test_mfluxs_own_skipping_is_refused(name: str, option: dict[str, Any], photo: Path) -> None:
    small = BY_NAME[name]
    given = small.arguments(photo)
    (word, value), *_ = option.items()
    if not IS_NEWEST and word not in inspect.signature(small.kind.generate_image).parameters:
        pytest.skip(f"{name} of mflux {version('mflux')} has no {word}")
    with small.pipeline() as flux, tc.apply(flux, budget=0.5) as handle:
        with pytest.raises(tc.TeaCacheValueError) as error:
            flux.generate_image(**given, **option)
        assert str(error.value) == (
            f"{word}={value!r} is mflux's own way to leave out steps, and this {name} is gated: leave out either"
        )
        run(flux, given | {word: None})
        assert handle.stats.generations == 1


def test_no_coefficients_are_known() -> None:
    small = BY_NAME["ErnieImage"]
    with small.pipeline() as flux:
        for given in (dict(rel_l1_thresh=0.2), dict(coefficients=None, rel_l1_thresh=1)):
            with pytest.raises(tc.TeaCacheValueError) as error:
                tc.apply(flux, **given)
            assert str(error.value) == (
                "no coefficients are known for ERNIE-Image: rel_l1_thresh wants some of yours beside it, which "
                "mlx-teacache-fast tune fits; a tolerance, a budget and steps need none"
            )
        with pytest.raises(tc.TeaCacheValueError, match="no coefficients are known for ERNIE-Image"):
            tc.apply_teacache(flux, cache="output")
        with pytest.raises(tc.TeaCacheValueError) as error:
            tc.apply(flux, cache="residual")
        assert str(error.value) == (
            'cache="residual" is not for ErnieImage, whose blocks cannot be left out alone: cache="output"'
        )
        assert hook_of(flux) is None
        with tc.apply(flux) as handle:
            assert handle.variant_id == "ernie-image"
            assert not handle.calibrated
            assert handle.provenance.source == "rule"


def test_a_distilled_model_has_nothing_to_skip() -> None:
    small = BY_NAME["ZImage"]
    with small.pipeline() as flux:
        flux.model_config = ModelConfig.z_image_turbo()
        with pytest.warns(errors.NoBenefitWarning, match="z-image-turbo is distilled to a few steps"):
            tc.apply(flux).restore()


def test_qwens_names() -> None:
    """mflux's alias is of the later one."""
    kind = BY_NAME["QwenImage"].kind
    for name, variant in (
        ("qwen-image", "qwen-image-2512"),
        ("Qwen/Qwen-Image", "qwen-image"),
        ("qwen/qwen-image", "qwen-image"),
    ):
        found = families.match(ModelConfig.from_name(name), kind)
        assert (found.variant.variant_id, found.calibrated) == (variant, True), name


@pytest.mark.skipif(not IS_NEWEST, reason="of the newest mflux")
def test_each_variant_is_some_models() -> None:
    named = {model.variant for family in families.FAMILIES for model in family.models.values()}
    assert named == set(VARIANTS)


# ---- mlx-teacache has three of them


@pytest.mark.parametrize("variant", ["qwen-image", "qwen-image-2512", "z-image-base"])
def test_teacache_is_mlx_teacaches(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, as that runs: the same steps, and the same latents to the last bit."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import bench_agreement

    rows = bench_agreement.measure(variant, seeds=1, ways=["eager"])
    skipped = [row["skipped"] for row in rows]
    assert skipped == sorted(skipped)
    assert skipped[-1] > 0
    for row in rows:
        assert row["equal"] == row["steps"]
        assert row["latents"] == 0
        assert row["distances"] < 2e-5


@pytest.mark.parametrize("order", [0, 1], ids=["theirs first", "ours first"])
@pytest.mark.parametrize("name", ["QwenImage", "ZImage"])
def test_two_step_skippers_are_refused(name: str, order: int, photo: Path) -> None:
    import mlx_teacache

    small = BY_NAME[name]
    given = small.arguments(photo)
    with small.pipeline() as flux:
        plain = run(flux, given)
        refused = pytest.raises(tc.AlreadyPatchedError)
        if order == 0:
            theirs = mlx_teacache.apply_teacache(flux)
            with refused as error:
                tc.apply_teacache(flux)
            theirs.restore()
        else:
            with tc.apply_teacache(flux):
                theirs = mlx_teacache.apply_teacache(flux)
                with refused as error:
                    run(flux, given)
                theirs.restore()
        assert str(error.value) == (
            f"mlx-teacache gates this {name} too, and only one can decide: call restore() on either handle"
        )
        assert same(run(flux, given), plain)


# ---- Tuning


@every
def test_full_runs_are_recorded(small: Small, photo: Path) -> None:
    """Of every pipeline: as many predictions as steps, and what they change."""
    given = small.arguments(photo) | dict(guidance=4.0)
    prompt = given.pop("prompt")
    given.pop("seed")
    with small.pipeline(mx.float32) as flux, ending(flux) as end:
        runs = FullRuns.of([full_run(flux, end, (prompt, i), given, is_learnt=i == 1) for i in (1, 2)])
    (products,) = runs.products
    assert products.shape == (6, 6)
    assert len(runs.sigmas) == 7
    assert np.all(np.diff(runs.sigmas) < 0)
    assert np.allclose(products, products.T, rtol=1e-3, atol=1e-3 * np.abs(products).max())
    assert np.all(np.diag(products) > 0)
    assert len(runs.pictures) == 2
    assert all(2 <= len(pairs) <= 4 and np.all(pairs > 0) for pairs in runs.pairs)


# ---- In the compiled step, with a budget, and where no number is made


@pytest.mark.parametrize("small", [s for s in PIPELINES if s.is_compiled], ids=str)
def test_a_skip_in_the_compiled_step_is_a_plans(small: Small, photo: Path) -> None:
    given = small.arguments(photo) | dict(guidance=4.0)
    with small.pipeline() as flux:
        for cache in ("output", "residual") if small.has_residual else ("output",):
            with tc.apply(flux, **ALWAYS, cache=cache) as handle:
                gated = run(flux, given)
            plan = "".join("0" if kind == "skipped" else "1" for kind in kinds(handle))
            assert plan == "110001"
            with tc.apply(flux, steps=plan, cache=cache):
                assert same(run(flux, given), gated), cache


@every
def test_a_tolerance_with_a_budget(small: Small, photo: Path) -> None:
    """Never more than the budget, in a short schedule too, which is no reason to warn then."""
    given = small.arguments(photo) | dict(guidance=4.0)
    with small.pipeline() as flux, warnings.catch_warnings():
        warnings.filterwarnings("error", message="no possible skip")
        for steps, allowed in ((5, 2), (12, 4)):
            given["num_inference_steps"] = steps
            with tc.apply(flux, tolerance=1e-9, budget=0.4) as handle:
                run(flux, given)
            forced_anew = str(small) == "Fibo2"  # other embeddings
            assert kinds(handle).count("skipped") in (steps - allowed, steps - allowed - forced_anew)


@pytest.mark.parametrize(
    "how", [dict(tolerance=0.1, budget=0.5), dict(budget=0.5), dict(tolerance=0.1), ALWAYS], ids=str
)
def test_a_prediction_that_is_no_number(how: dict[str, Any], photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after it computes, and no forecast looks at it."""
    small = BY_NAME["MOSSImage"]
    given = small.arguments(photo) | dict(guidance=1.0, num_inference_steps=12)
    with small.pipeline() as flux:
        calls: list[int] = []
        own = type(flux.transformer).__call__

        @functools.wraps(own)
        def fails_once(*args: Any, **kwargs: Any) -> mx.array:
            calls.append(1)
            return own(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

        class Sane:
            def call_before_loop(self, config: Any, **_: Any) -> None:
                step = config.scheduler.step
                config.scheduler.step = lambda noise, **more: step(noise=mx.nan_to_num(noise), **more)

        flux.callbacks.register(Sane())
        monkeypatch.setattr(type(flux.transformer), "__call__", fails_once)
        with tc.apply(flux, **how) as handle:
            _, latents = run(flux, given)
        assert handle.stats.generations == 1
        if "tolerance" in how:
            assert all(mx.isfinite(a).all() for a in latents)
            assert "budget" in how or kinds(handle)[1] == "numerical-miss"


@pytest.mark.parametrize("name", ["QwenImage", "Krea2"])
def test_image_to_image_begins_in_the_schedule(name: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, sigmas = BY_NAME[name], list[list[float]]()
    own = Generation.stats
    monkeypatch.setattr(Generation, "stats", lambda self, s: sigmas.append(list(self.sigmas)) or own(self, s))
    given = small.arguments(photo) | dict(num_inference_steps=20, image_path=photo, image_strength=0.4)
    with small.pipeline() as flux:
        flux.vae.encode = lambda image: mx.random.normal((1, 16, 8, 8), key=mx.random.key(1))
        with tc.apply(flux, budget=0.5) as handle:
            run(flux, given)
        assert (len(kinds(handle)), handle.stats.skipped_count) == (12, 6)
    (known,) = sigmas
    assert len(known) == 13
    assert 0.6 < known[0] < 0.8
    assert known[-1] == 0


def test_a_picture_says_the_scheduler_that_was_asked_for(photo: Path) -> None:
    """Not mflux's own name of it, which its command does not know."""
    small = BY_NAME["Anima"]
    with small.pipeline() as flux, tc.apply(flux, budget=0.5):
        for scheduler in (None, "euler"):
            image = flux.generate_image(**small.arguments(photo), scheduler=scheduler)
            assert image.generation_parameters["mlx_teacache_fast"]["scheduler"] == scheduler


def test_an_euler_sampler_is_corrected(photo: Path) -> None:
    small = BY_NAME["Krea2"]
    with small.pipeline() as flux:
        for scheduler, is_corrected in (("euler", True), ("er_sde", False)):
            given = small.arguments(photo) | dict(scheduler=scheduler)
            made = []
            for corrector in (0, 1):
                with tc.apply(flux, steps="110101", corrector=corrector):
                    made.append(run(flux, given))
            assert same(*made) != is_corrected, scheduler
