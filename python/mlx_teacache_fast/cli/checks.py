"""What ``mlx-teacache-fast report`` runs: checks and measurements of the device at hand.

One process runs one check, since what goes wrong on a GPU may hang or end it. A check yields rows of a table, and
raises where something does not hold. Those of the branch that have arguments of their own are tests too.
"""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .. import ops
from ..errors import one_line
from ..handle import apply
from ..models import TINY_KLEIN

Row = dict[str, Any]
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
ALWAYS_SKIP = (0.0, 0.0, 0.0, 0.0, 0.0)
DISPATCHES = "MLX_TEACACHE_FAST_METAL_DISPATCHES"
MISS = 3
CPU = mx.Device(mx.cpu)


@dataclass(frozen=True, slots=True)
class Settings:
    """``device`` is "cpu" or "gpu"; ``model`` is a name of mflux's, and ``quantize`` its weights' bits."""

    device: str
    quick: bool = False
    model: str | None = None
    quantize: int | None = None


class WrongError(Exception):
    """Something that must hold does not."""


class NotPossibleError(Exception):
    """It cannot be tried on this machine."""


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def device_of(settings: Settings) -> mx.Device:
    return mx.Device(mx.gpu if settings.device == "gpu" else mx.cpu)


def numbers(a: mx.array) -> list[Any]:
    return cast(list[Any], a.tolist())


def expect(holds: object, what: str) -> None:
    if not holds:
        raise WrongError(what)


# ---- Gate


def _case(
    shape: tuple[int, int, int], dtype: Any, branches: int = 1, terms: int = 1, *, given: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Arguments of a gated step whose distance is about 0.1, made on the CPU; ``given``: x is modulated already."""
    keys = iter(mx.random.split(mx.random.key(seed), 5 + branches * terms, stream=CPU))
    with mx.stream(CPU):

        def normal(size: tuple[int, ...], to: Any = dtype) -> mx.array:
            return mx.random.normal(size, key=next(keys)).astype(to)

        b, _, d = shape
        x, shift, scale = normal(shape), normal((b, 1, d)), 0.3 * normal((b, 1, d))
        before = (x + 0.1 * normal(shape, mx.float32)).astype(dtype)
        now, anchor = ((1 + scale) * mx.fast.layer_norm(a, None, None, 1e-6) + shift for a in (x, before))
        arrays: dict[str, Any] = (
            {"x": now, "shift": None, "scale": None} if given else {"x": x, "shift": shift, "scale": scale}
        )
        arrays |= {"anchor": anchor, "weights": normal((branches, terms), mx.float32)}
        arrays["residuals"] = [[normal(shape) for _ in range(terms)] for _ in range(branches)]
        arrays |= {"state": mx.array([mx.nan] * 4 + [0.25, 2, 1, 1]), "force": mx.array(0, mx.int32)}
    mx.eval([a for a in arrays.values() if a is not None])
    return arrays | {"coefficients": (0.0, 0.0, 2.0, 0.5, 0.01), "threshold": 0.9}


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _dispatches(settings: Settings) -> Iterator[Row]:
    """Metal's two ways to decide, as the beginning of a row; elsewhere there is one."""
    if settings.device != "gpu" or not mx.metal.is_available():
        yield {}
        return
    for count, says in ("1", "1 where the system allows"), ("2", "2"):
        with _environment(DISPATCHES, count):
            yield {"dispatches asked for": says}


def gate_values(settings: Settings) -> Iterator[Row]:
    """Against plain MLX on the CPU within rounding, and on a GPU against the CPU's op, reuse to the bit."""
    shapes = [(1, 1, 3), (1, 7, 64), (2, 5, 255), (1, 130, 256), (1, 3, 3072), (1, 2, 20_001)]
    shapes += [] if settings.quick else [(1, 4096, 3072)]
    kinds = (1, 1, False), (2, 3, False), (0, 0, False), (0, 0, True)
    for asked in _dispatches(settings):
        for dtype in FLOATS:
            most, cases = 0.0, 0
            for shape in shapes:
                for branches, terms, given in kinds if shape[1] < 4096 else kinds[:1]:
                    case = _case(shape, dtype, branches, terms, given=given)
                    where = f"{shape} {dtype}, {branches} x {terms} residuals" + ", given modulated" * given
                    got = ops.gate(**case)
                    mx.eval(got)
                    on_cpu = [ops.gate(**case, stream=CPU)] if settings.device == "gpu" else []
                    for want in (ops.reference.gate(**case, stream=CPU), *on_cpu):
                        most = max(most, _compare(got, want, case, where))
                    for a, b in zip(got[1], on_cpu[0][1] if on_cpu else (), strict=False):
                        expect(mx.array_equal(a, b, stream=CPU), f"{where}: reuse must be the CPU's to the bit")
                    cases += 1
            case = _case((1, 200, 256), dtype)
            case["shift"] = mx.where(mx.arange(256) == 255, mx.nan, case["shift"]).astype(dtype)
            expect(ops.gate(**case)[2][1].item() == MISS, f"{dtype}: a NaN must be found")
            yield asked | {"dtype": _name(dtype), "cases": cases, "largest error, of the bound": most}


def _compare(got: Any, want: Any, case: dict[str, Any], where: str) -> float:
    """The largest error, in parts of what rounding explains: neighbours of the dtype, and float32 sums over a row."""
    bound = 4 * EPSILON[case["x"].dtype] + 2e-5
    with mx.stream(CPU):
        parts = [r for terms in case["residuals"] for r in terms] + [case["shift"]] * (case["shift"] is not None)
        size = sum((mx.abs(part) for part in parts), mx.array(1.0))
        most = 0.0
        for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
            wide = a.astype(mx.float32), b.astype(mx.float32)
            error = float(mx.max(mx.abs(wide[0] - wide[1]) / (mx.abs(wide[1]) + size))) / bound
            expect(error <= 1, f"{where}: values are off by {error:.3g} times what rounding explains")
            most = max(most, error)
        ours, theirs = numbers(got[2]), numbers(want[2])
    expect(
        [ours[i] for i in (0, 1, 5, 6, 7)] == [theirs[i] for i in (0, 1, 5, 6, 7)]
        and all(abs(ours[i] - theirs[i]) <= max(1e-5, 0.1 * bound) * abs(theirs[i]) for i in (2, 3, 4)),
        f"{where}: the state is {ours}, and must be {theirs}",
    )
    return most


def gate_decisions(settings: Settings) -> Iterator[Row]:
    """Trajectories, in which state and anchor go on; a near tie may go either way."""
    for asked in _dispatches(settings):
        counts = {"skipped": 0, "computed": 0, "near ties": 0}
        for seed in range(4 if settings.quick else 20):
            case = _case((1, 1 + 37 * seed, 264), FLOATS[seed % 3], seed=seed)
            case |= {"state": mx.zeros(8), "threshold": 0.3, "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0)}
            for key in mx.random.split(mx.random.key(seed), 20):
                noise = mx.random.normal(case["x"].shape, key=key, stream=CPU)
                case["x"] = mx.add(case["x"], (0.1 * noise).astype(case["x"].dtype), stream=CPU)
                got, (anchor, _, state) = numbers(ops.gate(**case)[2]), ops.reference.gate(**case, stream=CPU)
                if abs(float(case["state"][4] + state[3]) - 0.3) < 3e-4:
                    counts["near ties"] += 1
                else:
                    expect(
                        got[:2] == numbers(state)[:2],
                        f"of trajectory {seed} a step that must give {numbers(state)} gave {got}",
                    )
                    counts["skipped" if got[0] else "computed"] += 1
                case |= {"anchor": anchor, "state": state}
        yield asked | counts


def gates_in_flight(settings: Settings) -> Iterator[Row]:
    """None may see another's partial sums or counter."""
    for asked in _dispatches(settings):
        cases = [_case((1, 40 + i, 256), mx.bfloat16, seed=i) for i in range(64)]
        alone = [numbers(ops.gate(**case)[2])[2:] for case in cases]
        evaluations = 5 if settings.quick else 50
        for _ in range(evaluations):
            states = [ops.gate(**case)[2] for case in cases]
            mx.eval(states)
            expect([numbers(s)[2:] for s in states] == alone, "gates in one evaluation must give what each gives alone")
        yield asked | {"gates at a time": len(cases), "evaluations": evaluations}


# ---- Branch


def branch_taken_and_skipped(settings: Settings) -> Iterator[Row]:
    w = mx.random.normal((64, 64), key=mx.random.key(0))
    x, old = mx.random.normal((8, 64), key=mx.random.key(1)), mx.zeros((8, 64))
    body = ops.Body(lambda x: [mx.tanh(x @ w)])

    def step(signal: mx.array, x: mx.array, old: mx.array) -> mx.array:
        return ops.branch(mx.mean(mx.abs(signal)) < 0.1, [old + 1.0], body, [x])[0]

    for how, run in {"eager": step, "in mx.compile": mx.compile(step)}.items():
        for skipped in (False, True, False):
            ops.reset_counters()
            got = run(mx.full((32,), 0.0 if skipped else 1.0), x, old)
            want = old + 1.0 if skipped else mx.tanh(x @ w)
            expect(mx.allclose(got, want), f"{how}: the outcome must be {'on_skip' if skipped else 'the body'}'s")
            counts = ops.counters()
            expect(counts == {"reads": 1, "computed": int(not skipped), "reused": int(skipped)}, f"{how}: {counts}")
            yield {"": how, "outcome": "skipped" if skipped else "computed"} | counts


def slow(x: mx.array, stream: Any) -> mx.array:
    for _ in range(3):
        x = mx.sort(mx.negative(x, stream=stream), stream=stream)
    return x


def between_streams(streams: Sequence[Any], skipped: bool, compiled: bool, evaluate: Callable[..., Any]) -> None:
    """The body on one stream, each input and each consumer on another: every combination."""
    # From the host: MLX on CUDA moves an array of the GPU's that the CPU reads, even while kernels still read it.
    x = mx.array([float(i * 7919 % 16381) for i in range(1 << 14)])
    for decider in streams:
        for at in streams:
            body = ops.Body(lambda *xs, at=at: [slow(x, at) for x in xs])

            def step(x: mx.array, body: ops.Body = body, decider: Any = decider) -> list[mx.array]:
                inputs = [slow(x + i, s) for i, s in enumerate(streams)]
                on_skip = [slow(x - i, s) for i, s in enumerate(streams)]
                decision = mx.any(slow(x, decider) > 1e9, stream=decider)
                outs = ops.branch(mx.equal(decision, not skipped, stream=decider), on_skip, body, inputs)
                return [slow(outs[(i + j) % 3], s) for i, s in enumerate(streams) for j in range(3)]

            want = [slow(slow(x - i if skipped else slow(x + i, CPU), CPU), CPU) for i in range(3)]
            got = (mx.compile(step) if compiled else step)(x)
            evaluate(got)
            for i in range(3):
                for j in range(3):
                    where = f"decision on {decider}, body on {at}, outcome {j} of stream {i}"
                    expect(mx.array_equal(got[3 * i + j], want[(i + j) % 3]), f"{where} is wrong")


def far_reader(gpu: Any, skipped: bool, evaluate: Callable[..., Any]) -> None:
    """``on_skip`` is the CPU's. A Relay encodes no kernel: its wait stands in one command buffer, and MLX commits after
    about 50 operations, so that what reads its other output, 120 later, stands in another."""
    x = mx.array([float(i * 7919 % 16381) for i in range(1 << 14)])
    body = ops.Body(lambda a, b: [slow(a, gpu), slow(b, gpu)])
    want = slow(x + 1.0, CPU)
    mx.eval(want)
    for _ in range(5):
        early, late = ops.branch(mx.array(skipped), [slow(x + i, CPU) for i in range(2)], body, [x, x + 1.0])
        for _ in range(120):
            early = mx.sin(early)
        got = late + 0.0 * early
        evaluate(got)
        expect(mx.array_equal(got, want), "a reader in a later command buffer must see the outcome")


def large_body(n: int = 512) -> None:
    """More work than MLX keeps in flight: it waits in the middle of the body's evaluation for some of it."""
    w = mx.random.normal((n, n), key=mx.random.key(0)) / n**0.5

    def fn(x: mx.array) -> list[mx.array]:
        for _ in range(400):
            x = mx.tanh(x @ w)
        return [x]

    x = mx.random.normal((n, n), key=mx.random.key(1))
    step = mx.compile(lambda x: ops.branch(mx.sum(x) > 1e9, [x], ops.Body(fn), [mx.tanh(x)])[0])
    for _ in range(3):
        expect(mx.array_equal(step(x), fn(mx.tanh(x))[0]), "a large body must give what it gives by itself")


def branch_between_streams(settings: Settings) -> Iterator[Row]:
    device = device_of(settings)
    streams = [mx.default_stream(device), mx.new_stream(device), mx.default_stream(CPU)]
    for skipped in (False, True):
        for compiled in (False, True):
            for evaluate in (mx.eval, mx.async_eval):
                between_streams(streams, skipped, compiled, evaluate)
            yield {"outcome": "skipped" if skipped else "computed", "compiled": str(compiled)}


def branch_far_reader(settings: Settings) -> Iterator[Row]:
    for skipped in (False, True):
        for evaluate in (mx.eval, mx.async_eval):
            far_reader(device_of(settings), skipped, evaluate)
        yield {"outcome": "skipped" if skipped else "computed", "operations between": 120}


def branch_large_body(settings: Settings) -> Iterator[Row]:
    large_body(64 if settings.quick else 512)
    yield {"operations": 800, "evaluations": 3}


# ---- Pictures of the demonstration model

WAYS: dict[str, Row] = {
    "tolerance 0": {"tolerance": 0},
    "threshold 0": {"rel_l1_thresh": 0},
    "gate, nothing skipped": {"rel_l1_thresh": 1e-9},
    "tolerance, nothing skipped": {"tolerance": 1e-9, "corrector": 0.0},
}


def _options(settings: Settings, steps: int, guidance: float = 4.0) -> Row:
    side = 32 if settings.quick else 128
    return {"num_inference_steps": steps, "guidance": guidance, "height": side, "width": side}


def demo_is_mfluxs(settings: Settings) -> Iterator[Row]:
    """Latents and picture to the bit, where nothing is skipped."""
    import numpy as np

    from .. import demo
    from ..mflux import pictures

    wrong = []
    for dtype in (mx.float32,) if settings.device == "cpu" else (mx.float32, mx.bfloat16):
        flux = demo.pipeline(dtype)
        for guidance in (4.0,) if settings.quick else (1.0, 4.0):
            with pictures.ending(flux) as end:
                make = partial(pictures.generate, flux, "red apple", 1, _options(settings, 12, guidance))
                plain, latents = make(), end.latents
                for way, how in WAYS.items():
                    with apply(flux, **how) as handle:
                        picture = make()
                    both = (np.array(a.astype(mx.float32)) for a in (end.latents, latents))
                    apart = int(np.not_equal(*both).sum())
                    row = {"dtype": _name(dtype), "guidance": guidance, "": way, "skipped": handle.stats.skipped_count}
                    yield row | {"latents apart": apart, "pixels apart": int((picture != plain).sum())}
                    if apart or (picture != plain).any() or handle.stats.skipped_count:
                        wrong.append(f"{way}, guidance {guidance:g}, {dtype}")
    expect(not wrong, f"must be mflux's own to the bit: {'; '.join(wrong)}")


def demo_is_the_cpus(settings: Settings) -> Iterator[Row]:
    """Gated on both: the same steps, and pictures within 3 levels."""
    from .. import demo
    from ..mflux import pictures

    flux = demo.pipeline()
    for name, how in RULES.items():
        made = []
        for device in (device_of(settings), CPU):
            mx.set_default_device(device)
            # Newer GPUs would multiply float32 with fewer bits; MLX reads it once.
            with _environment("MLX_ENABLE_TF32", "0"), apply(flux, **how) as handle:
                picture = pictures.generate(flux, "red apple", 1, _options(settings, 50, 1.0))
            made.append(([step.kind for step in handle.stats.finished[0].steps], picture.astype(int)))
        (ours, a), (theirs, b) = made
        apart = int(abs(a - b).max())
        yield {"rule": name, "steps decided otherwise": sum(map(str.__ne__, ours, theirs)), "levels apart": apart}
        expect(ours == theirs and apart <= 3, f"{name}: the GPU's picture must be the CPU's")


RULES: dict[str, Row] = {
    "tolerance": {},
    "budget": {"budget": 0.4},
    "steps": {"steps": "1111" + "10010" * 9 + "1"},
    "gate": {"rel_l1_thresh": TINY_KLEIN.rel_l1_thresh},
}


def demo_by_each_rule(settings: Settings) -> Iterator[Row]:
    from .. import demo

    options = _options(settings, 50, 1.0 if settings.quick else 4.0)
    for row in _by_rules(demo.pipeline(), "red apple", options, {"mflux": None, **RULES}):
        yield row
        name, psnr = row["rule"], row["PSNR, dB"]
        if name != "mflux":
            expect(row["computed steps"] < 50, f"{name}: some steps must be skipped")
            expect(
                psnr == "identical" or float(psnr) > 15,
                f"{name}: the picture must be near mflux's, and is {psnr} dB from it",
            )


def _by_rules(flux: Any, prompt: str, options: Row, rules: dict[str, Row | None]) -> Iterator[Row]:
    """The first is plain mflux, with which the others are compared."""
    from ..demo.report import decibels
    from ..mflux import pictures

    short, plain = options | {"num_inference_steps": 6}, None
    for name, how in rules.items():
        with nullcontext() if how is None else apply(flux, **how) as handle:
            if how is None or "steps" not in how:
                pictures.generate(flux, prompt, 1, short)  # MLX compiles at first use
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.perf_counter()
            picture = pictures.generate(flux, prompt, 1, options)
            row = {"rule": name, "seconds": time.perf_counter() - start, "peak memory, GB": mx.get_peak_memory() / 1e9}
        if plain is None or handle is None:
            plain = picture
            yield row | {"computed steps": options["num_inference_steps"], "PSNR, dB": ""}
            continue
        made = handle.stats.finished[-1]
        psnr = decibels(pictures.psnr(plain, picture))
        yield row | {"computed steps": made.num_steps - made.skipped, "PSNR, dB": psnr}


# ---- Times


def summary(values: Sequence[float]) -> Row:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"ms, median": 1e3 * middle, "lower quartile": 1e3 * low, "upper quartile": 1e3 * high}


def gate_time(settings: Settings) -> Iterator[Row]:
    """Chains of gates, each with the anchor and state of the one before, in one evaluation."""
    shape = (1, 256, 512) if settings.quick else (1, 4096, 3072)
    length, turns = (16 if settings.device == "gpu" else 1), (4 if settings.quick else 12)
    case = _case(shape, mx.bfloat16) | {"coefficients": ALWAYS_SKIP}
    anchor, state = case.pop("anchor"), case.pop("state")
    data = mx.ones((5 * anchor.nbytes // 8,))  # as many bytes, read and written

    def chain(gate: Callable[..., Any]) -> list[mx.array]:
        a, s, made = anchor + 0, state, []
        mx.eval(a)
        for _ in range(length):
            a, reused, s = gate(anchor=a, state=s)
            made += reused
        return [a, s, *made]

    def copy() -> list[mx.array]:
        x = data + 0
        mx.eval(x)
        for _ in range(length):
            x = mx.negative(x)
        return [x]

    rivals: dict[str, Callable[[], list[mx.array]]] = {
        "ops.gate": partial(chain, partial(ops.gate, **case)),
        "plain MLX, compiled": partial(chain, mx.compile(partial(ops.reference.gate, **case))),
        "copy of as many bytes": copy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(-1, turns):
        for name, build in rivals.items():
            made = build()
            mx.synchronize()
            start = time.perf_counter()
            mx.eval(made)
            mx.synchronize()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / length)
    moved = 5 * anchor.nbytes  # x, anchor and residual read, anchor and reuse written
    for name, found in seconds.items():
        rate = moved / statistics.median(found) / 1e9
        yield {f"{shape[1]} x {shape[2]} bfloat16": name} | summary(found) | {"GB/s": rate}


STEPS: dict[str, Row | None] = {
    "mflux": None,
    "computed, tolerance": {"tolerance": 1e-9},
    "computed, gate": {"rel_l1_thresh": 1e-9},
    "skipped, gate": {"rel_l1_thresh": 1.0, "coefficients": ALWAYS_SKIP},
    "skipped, plan": {"steps": "1000000"},
}


def step_time(settings: Settings) -> Iterator[Row]:
    """Each kind by its fastest step in a picture of 7, all kinds in turn."""
    from .. import demo
    from ..mflux import pictures

    sides = (32,) if settings.quick else (128,) if settings.device == "cpu" else (128, 512)
    flux = demo.pipeline(mx.float32 if settings.device == "cpu" else mx.bfloat16)
    marks: list[float] = []

    class Clock:
        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mx.synchronize()
            marks.append(time.perf_counter())

    flux.callbacks.register(Clock())
    for side in sides:
        options = _options(settings, 7) | {"height": side, "width": side}
        seconds: dict[str, list[float]] = {name: [] for name in STEPS}
        for turn in range(-1, 2 if settings.quick else 8):
            for name, how in STEPS.items():
                with nullcontext() if how is None else apply(flux, **how):
                    marks.clear()
                    pictures.generate(flux, "red apple", 1, options)
                if turn >= 0:  # the last step computes, and the first two trace
                    fastest = min(b - a for a, b in list(pairwise(marks))[1:-1])
                    seconds[name].append(fastest)
        for name, found in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(found, seconds["mflux"], strict=True))
            yield {f"step, {side} x {side}": name} | summary(found) | {"of mflux's": ratio}


def real_model(settings: Settings) -> Iterator[Row]:
    from ..mflux import commands, families, names
    from .tune import PROMPTS

    try:
        flux = names.load(str(settings.model), quantize=settings.quantize)
    except Exception as error:
        if commands.is_of_files(error):
            raise NotPossibleError(f"{settings.model} is not all in the cache: {error}") from error
        raise
    distilled = families.match(flux.model_config, type(flux)).variant.distilled
    side, steps = (128, 8) if settings.quick else (512, 20)
    guidance = 1.0 if distilled else 4.0
    options = {"num_inference_steps": steps, "guidance": guidance, "height": side, "width": side}
    yield from _by_rules(flux, PROMPTS[0], options, {"mflux": None, "tolerance": {}})


# ---- All


class Check(NamedTuple):
    title: str
    run: Callable[[Settings], Iterator[Row]]
    needs_gpu: bool = False
    limit: float = 300  # seconds


CHECKS = {
    check.run.__name__: check
    for check in (
        Check("the gate's values, against plain MLX on the CPU", gate_values),
        Check("the gate's decisions from step to step", gate_decisions),
        Check("many gates in one evaluation", gates_in_flight),
        Check("the branch, taken and skipped", branch_taken_and_skipped),
        Check("the branch between two streams of the GPU and the CPU's", branch_between_streams, needs_gpu=True),
        Check("on_skip of the CPU's, read more than 50 operations later", branch_far_reader, needs_gpu=True),
        Check("a branch with more work than MLX keeps in flight", branch_large_body, needs_gpu=True),
        Check("nothing skipped: mflux's latents and picture to the bit", demo_is_mfluxs),
        Check("the GPU's gated pictures are the CPU's", demo_is_the_cpus, needs_gpu=True),
        Check("a picture by each rule", demo_by_each_rule),
        Check("what the gate takes", gate_time),
        Check("what a step takes", step_time),
        Check("a real model's picture", real_model, limit=900),
    )
}


RECORD = "\x1e"  # before each of this process's lines of JSON, among what others print


def main(name: str, settings: Settings) -> None:
    """This process is for that check: it prints the rows, and at last why it failed, or None."""

    def tell(record: Row) -> None:
        print(f"{RECORD}{json.dumps(record, allow_nan=False)}", flush=True)

    warnings.simplefilter("ignore")
    mx.set_default_device(device_of(settings))
    result, why = "passed", None
    try:
        for row in CHECKS[name].run(settings):
            tell(row)
    except NotPossibleError as error:
        result, why = "not possible here", one_line(error)
    except Exception as error:
        result, why = "failed", one_line(error if isinstance(error, WrongError) else f"{type(error).__name__}: {error}")
    tell({"result": result, "why": why})
    os._exit(0)  # not the interpreter's end, where MLX may abort once threads have used it
