"""What ``apply`` changes and takes back, and what a generation leaves behind, also a failed or interrupted one."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import every_pipeline as every
import mlx.core as mx
import numpy as np
import pytest
from every_pipeline import ALWAYS, FEW, NEVER, SKIPS, Case, kinds, run, same
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.callbacks.instances.memory_saver import MemorySaver
from mflux.models.common.lora.layer.linear_lora_layer import LoRALinear
from mflux.models.common.schedulers.linear_scheduler import LinearScheduler
from mflux.utils.apple_silicon import AppleSiliconUtil
from mflux.utils.exceptions import StopImageGenerationException
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from other_pipelines import PIPELINES, Small

import mlx_teacache_fast as tc

pytestmark = pytest.mark.filterwarnings("ignore::mlx_teacache_fast.UncalibratedWarning")

RESIDUAL: dict[str, Any] = dict(cache="residual", forecast=0)
WAYS: dict[str, dict[str, Any]] = {
    "threshold": ALWAYS,
    "residual": ALWAYS | RESIDUAL,
    "plan": dict(steps="11001"),
}
# Several calls a step, a method, a factory that is found on the class.
OTHERS = [small for small in PIPELINES if str(small) in ("QwenImage", "Fibo2", "Krea2Controlnet")]
OURS = {"generate_image", "__getstate__", "_mlx_teacache_fast"}  # on the instance, while it is gated


@pytest.fixture(params=FEW, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def flux(case: Case) -> Iterator[Any]:
    with case.pipeline() as made:
        yield made


@pytest.fixture
def given(case: Case, photo: Path, mask: Path) -> dict[str, Any]:
    return case.arguments(photo, mask)


def snapshot(flux: Any) -> dict[str, Any]:
    transformer = flux.transformer
    return {
        "class": type(flux),
        "attributes": {k: id(v) for k, v in vars(flux).items()},
        "children": [(k, id(v)) for k, v in flux.items()],
        "transformer class": type(transformer),
        "transformer": [(k, id(v)) for k, v in transformer.items()],
        "transformer attributes": {k: id(v) for k, v in vars(transformer).items()},
        "blocks": [list(map(id, part)) for part in transformer.values() if isinstance(part, list)],
        "parameters": [(k, id(v)) for k, v in tree_flatten(flux.parameters())],
        "callbacks": {k: list(map(id, v)) for k, v in vars(flux.callbacks).items()},
    }


class At:
    """A callback that does something after one step, once."""

    def __init__(self, flux: Any, step: int, action: Callable[[], object]) -> None:
        self.flux, self.step, self.action = flux, step, action
        flux.callbacks.register(self)

    def call_in_loop(self, t: int, **_: Any) -> None:
        if t == self.step:
            self.flux.callbacks.in_loop.remove(self)
            self.action()


def failing(error: type[BaseException]) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# ---- What is changed, and taken back


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_restore_leaves_everything_as_it_was(flux: Any, given: dict[str, Any], how: dict[str, Any]) -> None:
    before = snapshot(flux)
    seen = []

    class Looking:  # within a generation
        def call_in_loop(self, **_: Any) -> None:
            seen.append(snapshot(flux))

    looking = Looking()
    handle = tc.apply(flux, **how)
    flux.callbacks.register(looking)
    run(flux, given)
    flux.callbacks.in_loop.remove(looking)
    for between in (*seen, snapshot(flux)):
        assert set(between["attributes"]) - set(before["attributes"]) == OURS
        for key in before.keys() - {"attributes", "callbacks"}:
            assert between[key] == before[key], key
    assert snapshot(flux)["callbacks"] == before["callbacks"]
    handle.restore()
    handle.restore()
    assert snapshot(flux) == before


def test_an_exception_inside_the_with_block_restores(flux: Any) -> None:
    before = snapshot(flux)
    with pytest.raises(ZeroDivisionError), tc.apply(flux):
        raise ZeroDivisionError
    assert snapshot(flux) == before


def test_a_restored_handle(flux: Any) -> None:
    handle = tc.apply(flux)
    handle.restore()
    with pytest.raises(tc.TeaCacheError, match="gates nothing any more: call apply") as error, handle:
        pass
    assert "restored" in str(error.value)


def test_a_second_apply(flux: Any) -> None:
    with tc.apply(flux, rel_l1_thresh=0.3) as handle:
        before = snapshot(flux)
        with pytest.raises(tc.AlreadyPatchedError) as error:
            tc.apply(flux)
        assert str(error.value) == (
            f"this {type(flux).__name__} is gated already ({handle!r}): call restore() on that handle first "
            "(this error has it as its attribute `handle`)"
        )
        assert error.value.handle is handle
        assert snapshot(flux) == before
    tc.apply(flux).restore()


def test_wrapped_after_apply(flux: Any, given: dict[str, Any]) -> None:
    plain = run(flux, given)
    handle = tc.apply(flux, **ALWAYS)
    gated = flux.generate_image
    object.__setattr__(flux, "generate_image", lambda *a, **k: gated(*a, **k))
    try:
        assert not same(run(flux, given), plain)
        assert handle.stats.generations == 1
        handle.restore()
        assert same(run(flux, given), plain)
        assert handle.stats.generations == 1
    finally:
        object.__delattr__(flux, "generate_image")


def test_wrapped_before_apply(flux: Any, given: dict[str, Any]) -> None:
    """A function would run past the gate; a method is run like the class's own."""
    own = flux.generate_image
    object.__setattr__(flux, "generate_image", lambda *a, **k: own(*a, **k))
    before = snapshot(flux)
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply(flux)
    assert str(error.value) == (
        f"generate_image of this {type(flux).__name__} was replaced by somebody else's function, which would run past "
        "the gate: call apply() first, and wrap generate_image afterwards"
    )
    assert snapshot(flux) == before

    method = types.MethodType(lambda self, **k: type(flux).generate_image(self, **k), flux)
    object.__setattr__(flux, "generate_image", method)
    with tc.apply(flux, **ALWAYS) as handle:
        run(flux, given)
    assert kinds(handle) == SKIPS
    assert flux.generate_image == method
    object.__delattr__(flux, "generate_image")


def test_the_classes_generate_image_is_mfluxs(flux: Any, given: dict[str, Any]) -> None:
    """Called past the instance: a plain generation, which is not counted."""
    plain = run(flux, given)
    with tc.apply(flux, **ALWAYS) as handle:
        assert np.array_equal(np.asarray(type(flux).generate_image(flux, **given).image), plain[0])
        assert handle.stats.generations == 0


def test_a_subclass_that_calls_super(flux: Any, given: dict[str, Any]) -> None:
    """Twice in one call: two generations, and what it sets on itself is set on the pipeline."""
    kind = type(flux)

    class Twice(kind):  # type: ignore[misc, valid-type]
        def generate_image(self, **arguments: Any) -> Any:
            self.first = super().generate_image(**arguments | {"seed": 2})
            assert len(dict(self.items())) == len(self) > 0
            return super().generate_image(**arguments)

    flux.__class__ = Twice
    with tc.apply(flux, **ALWAYS) as handle:
        both = run(flux, given)
    assert [g.skipped for g in handle.stats.finished] == [2, 2]
    assert isinstance(flux.first.image, object)
    del flux.first
    flux.__class__ = kind
    with tc.apply(flux, **ALWAYS):
        assert same(run(flux, given), both)


def test_a_subclass_that_names_no_arguments_and_has_one_instance(flux: Any, given: dict[str, Any]) -> None:
    by_name = dict(given)
    by_place = [by_name.pop(name) for name in ("seed", "prompt")]
    kind = type(flux)

    class Own(kind):  # type: ignore[misc, valid-type]
        def __new__(cls) -> Any:
            return flux

        def generate_image(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate_image(*args, **kwargs)

    flux.__class__ = Own
    with tc.apply(flux, **ALWAYS) as handle:
        flux.generate_image(*by_place, **by_name)
    assert kinds(handle) == SKIPS
    assert "_run" not in vars(flux)
    flux.__class__ = kind


def test_a_subclass_that_registers_a_callback_and_writes_into_itself(flux: Any, given: dict[str, Any]) -> None:
    seen: list[str] = []
    kind = type(flux)

    class Noting:
        def call_before_loop(self, **_: Any) -> None:
            seen.append("before")

        def call_in_loop(self, t: int, **_: Any) -> None:
            seen.append(f"step {t}")

    class Own(kind):  # type: ignore[misc, valid-type]
        last = None

        def generate_image(self, **arguments: Any) -> Any:
            self.callbacks.register(Noting())
            self["array"] = mx.ones(1)
            self.last = "set"
            assert self.last == "set"
            return super().generate_image(**arguments)

    flux.__class__ = Own
    with tc.apply(flux, **ALWAYS) as handle:
        run(flux, given)
    assert kinds(handle) == SKIPS
    assert seen == ["before", *[f"step {t}" for t in range(5)]]
    assert flux.last == "set"
    assert "array" in flux
    flux.__class__ = kind


def test_other_callbacks(flux: Any, given: dict[str, Any]) -> None:
    """A registry that takes the place of the one at apply()."""
    seen: list[int] = []
    with tc.apply(flux, **ALWAYS) as handle:
        before, flux.callbacks = flux.callbacks, CallbackRegistry()
        flux.callbacks.register(types.SimpleNamespace(call_in_loop=lambda t, **_: seen.append(t)))
        every.image_of(flux, given)
        flux.callbacks = before
    assert seen == [0, 1, 2, 3, 4]
    assert kinds(handle) == SKIPS


def test_a_loop_that_calls_no_callbacks(flux: Any, given: dict[str, Any]) -> None:
    kind = type(flux)

    class Own(kind):  # type: ignore[misc, valid-type]
        def generate_image(self) -> str:
            return "a picture"

    flux.__class__ = Own
    with tc.apply(flux, **ALWAYS) as handle, pytest.warns(tc.TeaCacheWarning) as warned:
        assert flux.generate_image() == "a picture"
    flux.__class__ = kind
    assert handle.stats.generations == 0
    assert [str(w.message) for w in warned] == [
        "this generation was not gated: generate_image did not tell mflux's callbacks of its loop"
    ]
    assert warned[0].filename == __file__


def test_a_loop_with_another_step(case: Case, flux: Any, given: dict[str, Any]) -> None:
    """It tells mflux's callbacks, but runs a step that it has of its own, as forks of mflux do."""
    kind = type(flux)

    class Own(kind):  # type: ignore[misc, valid-type]
        def generate_image(self, **arguments: Any) -> Any:
            own = copy.copy(flux)
            own.callbacks = self.callbacks
            return kind.generate_image(own, **arguments)

    plain = run(flux, given)
    flux.__class__ = Own
    with tc.apply(flux, **ALWAYS) as handle, pytest.warns(tc.TeaCacheWarning) as warned:
        assert same(run(flux, given), plain)
    flux.__class__ = kind
    assert handle.stats.generations == 0
    step = "_predict or _cached_predict" if case.is_flux2 else "transformer"
    assert [str(w.message) for w in warned] == [
        f"this generation was not gated: generate_image ran its 5 steps without this Own's {step}"
    ]


# ---- Copies


def test_a_copy_is_not_gated(case: Case, flux: Any, given: dict[str, Any]) -> None:
    """It generates with its own transformer and callbacks, also when the original is gone."""
    with case.pipeline() as other:
        other.transformer.update(tree_map(lambda weight: weight * 0.9, other.transformer.parameters()))
        of_other = every.image_of(other, given)
        plain = every.image_of(flux, given)
        with tc.apply(flux, **ALWAYS) as handle:
            variant = copy.copy(flux)
            assert not OURS & set(vars(variant))
            assert np.array_equal(every.image_of(variant, given), plain)
            variant.transformer = other.transformer
            variant.callbacks = CallbackRegistry()
            assert np.array_equal(every.image_of(variant, given), of_other)
            assert handle.stats.generations == 0
            every.image_of(flux, given)
            assert kinds(handle) == SKIPS
        assert np.array_equal(every.image_of(variant, given), of_other)
        with tc.apply(variant, **ALWAYS) as own:
            every.image_of(variant, given)
        assert (own.stats.generations, handle.stats.generations) == (1, 1)


# ---- What goes wrong in a generation


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "raised"), [(Boom, Boom), (KeyboardInterrupt, StopImageGenerationException)], ids=["error", "ctrl-c"]
)
@pytest.mark.parametrize("how", [*WAYS.values(), dict(rel_l1_thresh=0.0)], ids=[*WAYS, "off"])
def test_a_failure_in_a_callback(
    flux: Any, given: dict[str, Any], how: dict[str, Any], error: type[BaseException], raised: type[BaseException]
) -> None:
    before = snapshot(flux)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tc.DisabledWarning)
        handle = tc.apply(flux, **how)
    with handle:
        expected = run(flux, given)
        At(flux, 2, failing(error))
        with pytest.raises(raised):
            run(flux, given)
        assert handle.stats.generations == 1
        assert same(run(flux, given), expected)  # starts from nothing
        assert handle.stats.generations == 2
    assert snapshot(flux) == before


@pytest.mark.parametrize("place", ["transformer_blocks", "single_transformer_blocks", "norm_out", "x_embedder"])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_failure_in_the_transformer(flux: Any, given: dict[str, Any], how: dict[str, Any], place: str) -> None:
    """Also while a step is traced."""
    module = getattr(flux.transformer, place)
    module = module[0] if isinstance(module, list) else module
    before, kind = snapshot(flux), type(module)

    class Failing(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise Boom

    with tc.apply(flux, **how) as handle:
        module.__class__ = Failing
        try:
            with pytest.raises(Boom):
                run(flux, given)
        finally:
            module.__class__ = kind
        assert handle.stats.generations == 0
        run(flux, given)
        assert handle.stats.generations == 1
    assert snapshot(flux) == before


INTERRUPTED = """
import os, sys, warnings
os.environ["TQDM_DISABLE"] = "1"
warnings.simplefilter("ignore")
import every_pipeline as every
import mlx.core as mx
import numpy as np
import mlx_teacache_fast as tc
from other_pipelines import PIPELINES
from test_lifecycle import OURS, WAYS, snapshot

mx.set_default_device(mx.cpu)
case = {str(case): case for case in (*every.FEW, *PIPELINES)}[sys.argv[1]]
ours = os.path.dirname(tc.__file__) + os.sep


class Lines:
    # Raises at the n-th line of the package that runs; without n it only counts.
    def __init__(self, n=None):
        self.n, self.count, self.where, self.known, self.seen = n, 0, "", set(), []

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(ours) or f"{os.sep}demo{os.sep}" in frame.f_code.co_filename:
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            place = frame.f_code.co_filename, frame.f_lineno
            if self.n is None and place not in self.known:
                self.known.add(place)
                self.seen.append(self.count)
            if self.count == self.n:
                sys.settrace(None)
                self.where = f"{place[0].removeprefix(ours)}:{place[1]}"
                raise KeyboardInterrupt
        return self.line


def generate(tracer=None):
    sys.settrace(tracer)
    try:
        return every.image_of(flux, given)
    finally:
        sys.settrace(None)


with case.pipeline(mx.float32) as flux:  # the CPU's fastest
    clean = snapshot(flux)
    for name, how in (WAYS | {"tolerance": dict(tolerance=1.0)}).items():
        if name == "residual" and not getattr(case, "has_residual", True):
            continue
        given = case.arguments(sys.argv[2], sys.argv[3]) | dict(height=32, width=32)
        given["num_inference_steps"] = 7 if name == "tolerance" else 5
        plain = generate()
        with tc.apply(flux, **how) as handle:
            gated = generate()
            lines = Lines()
            generate(lines)
            # Each line once, or one of so many, and some once more, further on in a loop or in a step.
            more, one_of = map(int, sys.argv[4:])
            hits = sorted({*lines.seen[::one_of], *range(1, lines.count, max(1, lines.count // more))})
            swallowed = 0
            for n in hits:
                counted, tracer = handle.stats.generations, Lines(n)
                try:
                    generate(tracer)
                    swallowed += 1
                except BaseException as error:
                    assert type(error).__name__ in ("KeyboardInterrupt", "StopImageGenerationException"), error
                counted = handle.stats.generations - counted  # 1 if it came after the picture was counted
                assert tracer.where and counted in (0, 1), (name, tracer.where)
                assert np.array_equal(generate(), gated), (name, tracer.where)
                assert set(vars(flux)) - set(clean["attributes"]) == OURS, (name, tracer.where)
        assert snapshot(flux) == clean, (name, tracer.where)
        assert np.array_equal(generate(), plain), name
        assert not swallowed, (name, swallowed)
        print(name, len(lines.known), "lines", len(hits), "interrupts", flush=True)
os._exit(0)  # MLX's threads may abort at exit
"""


def program(text: str, *arguments: object, timeout: float) -> str:
    """Its output, of a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("which", "more", "one_of"),
    [
        *[pytest.param(case, 3, 10, id=str(case)) for case in FEW if not case.how],
        *[pytest.param(case, 600, 1, marks=pytest.mark.slow, id=f"{case}, all") for case in FEW],
        *[pytest.param(small, 3, 1, marks=pytest.mark.slow, id=f"{small}, all") for small in OTHERS],
    ],
)
def test_ctrl_c_at_every_line(
    which: Case | Small, photo: Path, mask: Path, more: int, one_of: int, record_property: Callable[[str, object], None]
) -> None:
    """Every line of the package that a generation runs, or ``one_of``; ``more`` at others of the times that it does."""
    out = program(INTERRUPTED, which, photo, mask, more, one_of, timeout=390 if one_of > 1 else 3600)
    assert out.count("interrupts") == len(WAYS) + getattr(which, "has_residual", True)
    record_property("ctrl_c", f"{which}: {', '.join(out.splitlines())}")


THREADS = """
import os, sys, threading, warnings
os.environ["TQDM_DISABLE"] = "1"
warnings.simplefilter("ignore")
import every_pipeline as every
import mlx.core as mx
import numpy as np
import mlx_teacache_fast as tc
from other_pipelines import PIPELINES

case, times = {str(case): case for case in (*every.FEW, *PIPELINES)}[sys.argv[1]], int(sys.argv[4])
mx.set_default_device(mx.cpu)
with case.pipeline(mx.float32) as flux:
    flux.callbacks = type(flux.callbacks)()
    given = case.arguments(sys.argv[2], sys.argv[3]) | dict(height=32, width=32, num_inference_steps=5)
    for how in ({"steps": "11001"}, every.ALWAYS):
        with tc.apply(flux, **how) as handle:
            expected = {seed: every.image_of(flux, given | dict(seed=seed)) for seed in (1, 2)}
            wrong, begin = [], threading.Barrier(2)

            def generate(seed):
                mx.set_default_device(mx.cpu)
                for _ in range(times):
                    begin.wait(60)
                    try:
                        if not np.array_equal(every.image_of(flux, given | dict(seed=seed)), expected[seed]):
                            wrong.append(seed)
                    except BaseException as error:
                        wrong.append(repr(error))

            threads = [threading.Thread(target=generate, args=(seed,)) for seed in expected]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            kinds = {tuple(step.kind for step in generation.steps) for generation in handle.stats.finished}
        print(wrong, handle.stats.generations, len(kinds), flush=True)
os._exit(0)  # MLX's threads may abort at exit
"""


@pytest.mark.parametrize(
    ("which", "times"),
    [
        *[pytest.param(case, 5, id=str(case)) for case in FEW],
        *[pytest.param(which, 50, marks=pytest.mark.slow, id=f"{which} more") for which in (*FEW, *OTHERS)],
    ],
)
def test_two_threads_on_one_pipeline(which: Case | Small, photo: Path, mask: Path, times: int) -> None:
    """At once: every picture is right, and every generation is counted."""
    out = program(THREADS, which, photo, mask, times, timeout=390 if times < 10 else 3600)
    assert out == f"[] {2 + 2 * times} 1\n" * 2


# ---- Generations within generations


def test_restore_inside_a_callback(flux: Any, given: dict[str, Any]) -> None:
    before, plain = snapshot(flux), run(flux, given)
    handle = tc.apply(flux, **ALWAYS)
    At(flux, 1, handle.restore)
    run(flux, given)
    assert handle.stats.generations == 0
    assert snapshot(flux) == before
    assert same(run(flux, given), plain)


def test_a_generation_inside_a_callback(flux: Any, given: dict[str, Any]) -> None:
    other = given | dict(seed=2, num_inference_steps=4)
    with tc.apply(flux, **ALWAYS) as handle:
        expected, inner = every.image_of(flux, given), every.image_of(flux, other)
        nested = []
        At(flux, 2, lambda: nested.append(every.image_of(flux, other)))
        assert np.array_equal(every.image_of(flux, given), expected)
        assert np.array_equal(nested[0], inner)
        assert [g.num_steps for g in handle.stats.finished] == [5, 4, 4, 5]
        assert kinds(handle) == SKIPS


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_another_pipeline_with_the_same_parts(case: Case, flux: Any, given: dict[str, Any], gated: bool) -> None:
    """Transformer and callbacks: generations of the one, also within the other's, are not the other's."""
    other = copy.copy(flux)
    plain = every.image_of(flux, given)
    with tc.apply(flux, **ALWAYS) as handle:
        expected = every.image_of(flux, given)
        theirs = tc.apply(other, **ALWAYS) if gated else None
        nested = []
        At(flux, 2, lambda: nested.append(every.image_of(other, given)))
        assert np.array_equal(every.image_of(flux, given), expected)
        assert np.array_equal(nested[0], expected if gated else plain)
        assert handle.stats.generations == 2
        if theirs is not None:
            assert theirs.stats.generations == 1
            theirs.restore()
    assert np.array_equal(every.image_of(other, given), plain)


def test_generations_on_one_handle_are_independent(flux: Any, given: dict[str, Any]) -> None:
    """Other seeds, sizes and step counts in between; equal to those of a fresh handle."""
    runs = [{}, dict(seed=2, height=96, num_inference_steps=6), dict(seed=3, guidance=1.5), {}]
    with tc.apply(flux, **ALWAYS) as handle:
        together = [run(flux, given | more) for more in runs]
        assert [g.num_steps for g in handle.stats.finished] == [5, 6, 5, 5]
    assert same(together[0], together[3])
    for more, image in zip(runs[1:3], together[1:3], strict=True):
        with tc.apply(flux, **ALWAYS):
            assert same(run(flux, given | more), image)


# ---- A computed step is what mflux would compute now


class InPlace(LinearScheduler):
    """A user's, which writes into what it is given."""

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        noise *= 0.8
        return super().step(noise=noise, timestep=timestep, latents=latents)


class OutOfPlace(LinearScheduler):
    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        return super().step(noise=noise * 0.8, timestep=timestep, latents=latents)


@pytest.mark.parametrize(
    "how", [{}, NEVER, *WAYS.values(), dict(budget=0.6)], ids=["default", "never", *WAYS, "budget"]
)
def test_a_scheduler_that_writes_into_the_noise(flux: Any, given: dict[str, Any], how: dict[str, Any]) -> None:
    schedulers = [f"{kind.__module__}.{kind.__name__}" for kind in (InPlace, OutOfPlace)]
    with tc.apply(flux, **how):
        a, b = (run(flux, given | dict(scheduler=name)) for name in schedulers)
    assert same(a, b)


def test_a_lora_scale_that_a_callback_changes(case: Case, flux: Any, given: dict[str, Any]) -> None:
    """In mid-run: as in plain mflux, which reads it at each step where it runs eagerly."""
    block = flux.transformer.transformer_blocks[0]
    layer = block.attn.to_q if case.is_flux2 else block.attn.to_q.layers[1]
    own = LoRALinear.from_linear(layer, r=4)
    own.lora_B = mx.random.normal(own.lora_B.shape, key=mx.random.key(1))
    block.attn.to_q = own if case.is_flux2 else nn.Sequential(block.attn.to_q.layers[0], own)

    def picture() -> Any:
        own.scale = 1.0
        At(flux, 1, lambda: setattr(own, "scale", 3.0))
        return run(flux, given)

    plain = picture()
    own.scale = 1.0
    is_read = not same(plain, run(flux, given))
    assert is_read == (case != Case(every.Flux2Klein))  # whose step mflux compiles
    for how in (NEVER, NEVER | RESIDUAL, dict(steps="11111")):
        with tc.apply(flux, **how):
            assert same(picture(), plain)


def test_a_transformer_that_a_callback_replaces(case: Case, flux: Any, given: dict[str, Any]) -> None:
    """mflux asks for it at each step, or at the beginning."""
    with case.pipeline() as other:
        other.transformer.update(tree_map(lambda weight: weight * 0.9, other.transformer.parameters()))
        own = flux.transformer

        def picture() -> Any:
            flux.transformer = own
            At(flux, 1, lambda: setattr(flux, "transformer", other.transformer))
            return run(flux, given)

        plain = picture()
        for how in (NEVER, NEVER | RESIDUAL):
            with tc.apply(flux, **how) as handle:
                assert same(picture(), plain)
            assert handle.stats.generations == 1


@pytest.mark.parametrize("is_hidden", [False, True], ids=["mflux's function", "a function around it"])
def test_blocks_that_evaluate(is_hidden: bool, photo: Path, mask: Path) -> None:
    """As with compressed weights, which are unpacked block by block: such packages keep mflux from compiling a step."""
    case = Case(every.Flux2Klein)
    given = case.arguments(photo, mask) | dict(guidance=4.0)
    with case.pipeline() as flux:
        kind = type(flux)

        class Own(kind):  # type: ignore[misc, valid-type]
            @staticmethod
            def _predict(transformer: Any) -> Any:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(AppleSiliconUtil, "is_m1_or_m2", staticmethod(lambda: True))
                    eager = kind._predict(transformer)
                return (lambda **arguments: eager(**arguments)) if is_hidden else eager

        for block in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
            own = type(block)

            class Evaluates(own):  # type: ignore[misc, valid-type]
                def __call__(self, *args: Any, **kwargs: Any) -> Any:
                    made = super().__call__(*args, **kwargs)
                    mx.eval(made)
                    return made

            block.__class__ = Evaluates
        flux.__class__ = Own
        plain = run(flux, given)
        for how in (NEVER, NEVER | RESIDUAL, dict(tolerance=1e-9), dict(steps="11111")):
            with tc.apply(flux, **how):
                assert same(run(flux, given), plain)
        for how in (ALWAYS, ALWAYS | RESIDUAL):
            with tc.apply(flux, **how) as handle:
                assert not same(run(flux, given), plain)
            assert kinds(handle) == SKIPS


class Wrapped:
    """Around a transformer, as tools for memory or speed have it."""

    def __init__(self, transformer: Any) -> None:
        self.inner = transformer

    def __call__(self, **arguments: Any) -> Any:
        return self.inner(**arguments)


def test_a_transformer_that_is_wrapped_by_hand(case: Case, flux: Any, given: dict[str, Any]) -> None:
    """A plan needs nothing of it; the gate says what it does not find."""
    if case.how == "cache":
        pytest.skip("mflux itself looks for its blocks")
    own, plain = flux.transformer, run(flux, given)
    with tc.apply(flux, steps="11001") as handle:
        planned = run(flux, given)
    with tc.apply(flux, **ALWAYS) as handle:
        flux.transformer = Wrapped(own)
        with pytest.raises(tc.InternalStateError) as error:
            run(flux, given)
        assert str(error.value) == "Wrapped has no transformer_blocks.0, where its family's tap is"
        assert handle.stats.generations == 0
    assert same(run(flux, given), plain)
    with tc.apply(flux, steps="11001"):
        assert same(run(flux, given), planned)
    flux.transformer = own
    with tc.apply(flux, **ALWAYS) as handle:
        run(flux, given)
    assert kinds(handle) == SKIPS


# ---- Memory


def dies_with_its_last_reference(holder: list[Any]) -> bool:
    """Without the garbage collector: no reference cycle goes through gigabytes of weights."""
    alive = weakref.ref(holder[0])
    gc.collect()
    gc.disable()
    try:
        holder.clear()
        return alive() is None
    finally:
        gc.enable()


def test_the_handle_does_not_keep_the_pipeline(case: Case, photo: Path, mask: Path) -> None:
    given = case.arguments(photo, mask)
    with case.pipeline() as flux:
        handle = tc.apply(flux, **ALWAYS)
        run(flux, given)
        pipelines = [flux]
        del flux
    assert dies_with_its_last_reference(pipelines)
    handle.restore()


@pytest.mark.parametrize("how", [*WAYS.values(), NEVER, dict(rel_l1_thresh=0.0)], ids=[*WAYS, "never", "off"])
def test_the_memory_saver_frees_the_transformer_before_the_image_is_decoded(
    flux: Any, given: dict[str, Any], how: dict[str, Any]
) -> None:
    if tuple(map(int, version("mflux").split(".")[:2])) < (0, 21):
        pytest.skip("mflux 0.20 keeps its function of a step until the picture is done")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tc.DisabledWarning)
        handle = tc.apply(flux, **how)
    block = flux.transformer.transformer_blocks[0]
    alive = {
        "transformer": weakref.ref(flux.transformer),
        "block": weakref.ref(block),
        "layer": weakref.ref(block.attn),
    }
    del block
    seen: list[Any] = []

    class Noting:
        def call_after_loop(self, **_: Any) -> None:
            gc.collect()
            seen.append([name for name, reference in alive.items() if reference() is not None])
            seen.append(mx.get_active_memory())

    weights = sum(a.nbytes for _, a in tree_flatten(flux.transformer.parameters()))
    flux.callbacks.register(Noting())
    flux.callbacks.register(MemorySaver(flux, keep_transformer=False, cache_limit_bytes=None))
    flux.callbacks.register(Noting())
    run(flux, given)
    assert seen[::2] == [list(alive), []]
    if how.get("rel_l1_thresh") != 0:  # MLX may keep some arrays of mflux's own compiled function
        assert seen[1] - seen[3] > 0.99 * weights
    assert handle.stats.total_steps == 5
    handle.restore()
    with pytest.raises(tc.IncompatibleModelError) as error:
        tc.apply(flux)
    assert str(error.value) == (
        f"this {type(flux).__name__} has no transformer any more (mflux's low-memory mode drops it after a "
        "generation): load the pipeline again"
    )


FREED = """
import gc, os, sys, warnings
os.environ["TQDM_DISABLE"] = "1"
warnings.simplefilter("ignore")
import every_pipeline as every
import mlx.core as mx
import mlx_teacache_fast as tc
from test_lifecycle import WAYS

mx.set_default_device(mx.cpu)
case = {str(case): case for case in every.FEW}[sys.argv[1]]
for how in (*WAYS.values(), every.NEVER):
    for guidance in (1.0, 4.0):
        with case.pipeline() as flux:
            with tc.apply(flux, **how) as handle:
                every.image_of(flux, case.arguments(sys.argv[2], sys.argv[3]) | dict(guidance=guidance))
            del flux, handle
gc.collect()
print(mx.get_active_memory(), flush=True)
os._exit(0)  # MLX's threads may abort at exit
"""


def test_weights_are_freed_with_the_pipeline(case: Case, photo: Path, mask: Path) -> None:
    """All arrays: not only mflux's modules go, but also what graphs held of them."""
    assert int(program(FREED, case, photo, mask, timeout=390)) < 1000


def test_a_generation_leaves_nothing_behind(flux: Any, given: dict[str, Any]) -> None:
    """After the first one, which fills caches of compiled kernels."""
    with tc.apply(flux, **ALWAYS):
        run(flux, given)
        used = []
        for _ in range(3):
            flux.recorder.latents = []
            gc.collect()
            used.append(mx.get_active_memory())
            run(flux, given)
    assert used[0] == used[1] == used[2]
