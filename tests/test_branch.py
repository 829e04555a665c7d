"""``ops.branch`` against Python's own ``if``: values, costs, errors, lifetimes."""

import io
import math
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_teacache_fast import ops
from mlx_teacache_fast.cli.checks import between_streams, slow

TRUE, FALSE = mx.array(True), mx.array(False)


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    ops.reset_counters()


def equal(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and mx.array_equal(a, b, equal_nan=True).item()


def run(source: str, *args: object) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own: its memory and its exit are what is tested."""
    on_cpu = "import mlx.core; mlx.core.set_default_device(mlx.core.cpu)\n"
    command = [sys.executable, "-c", on_cpu + textwrap.dedent(source), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# ---- Values


def test_by_hand() -> None:
    body = ops.Body(lambda x, y: [x * y, x + y])
    inputs = [mx.array([1.0, 2.0]), mx.array([3.0, 5.0])]
    on_skip = [mx.array([-1.0, -2.0]), mx.array([-3.0, -4.0])]
    assert [o.tolist() for o in ops.branch(FALSE, on_skip, body, inputs)] == [[3.0, 10.0], [4.0, 7.0]]
    assert [o.tolist() for o in ops.branch(TRUE, on_skip, body, inputs)] == [[-1.0, -2.0], [-3.0, -4.0]]
    # [3, 10] and [4, 7] are outputs of one primitive: one evaluation, hence one read for each branch above
    assert ops.counters() == {"reads": 2, "computed": 1, "reused": 1}


@pytest.mark.parametrize(("skip", "taken"), [(0.0, "computed"), (math.nan, "computed"), (1.0, "reused")])
def test_takes_a_gate_state(skip: float, taken: str) -> None:
    state = mx.array([skip, 2.0, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0])
    mx.eval(ops.branch(state, [mx.zeros(3)], ops.Body(lambda x: [x]), [mx.ones(3)]))
    assert ops.counters()[taken] == 1


class Program:
    """A random straight-line function of arrays (4, 4).

    Element-wise operations stand alone between others, so that nothing is fused: 200 programs would otherwise spend
    minutes in the compiler that makes MLX's fused CPU kernels.
    """

    def __init__(self, seed: int, tmp_path: Path) -> None:
        rng = np.random.default_rng(seed)
        self.n_inputs = int(rng.integers(1, 4))
        self.n_outputs = int(rng.integers(1, 4))
        self.ignores_inputs = rng.random() < 0.1
        self.nested = rng.random() < 0.3
        self.ops = rng.integers(0, 7, size=int(rng.integers(1, 12))).tolist()
        self.picks = rng.integers(0, 1000, size=(len(self.ops), 2)).tolist()
        weight = mx.array(rng.standard_normal((4, 4)), dtype=mx.float32)
        if rng.random() < 0.5:  # lazily loaded, as model weights are
            path = str(tmp_path / f"{seed}.safetensors")
            mx.save_safetensors(path, {"w": weight})
            weight = mx.load(path)["w"]
        self.weight = weight
        self.inner = ops.Body(lambda x: [mx.cumsum(x @ self.weight, axis=0)])

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        values = [self.weight] if self.ignores_inputs else list(inputs)
        for op, (i, j) in zip(self.ops, self.picks, strict=True):
            a, b = values[i % len(values)], values[j % len(values)]
            if op == 0:
                made = a @ self.weight
            elif op == 1:
                made = mx.cumsum(a, axis=1)
            elif op == 2:
                made = mx.sort(a, axis=0)
            elif op == 3:
                made = mx.softmax(a, axis=-1)
            elif op == 4:
                made = mx.split(mx.concatenate([a, b], axis=0), 2, axis=0)[1]  # several outputs, strided views
            elif op == 5:
                made = (a @ b).T
            elif self.nested:
                (made,) = ops.branch(mx.max(mx.softmax(a)) > 0.5, [mx.sort(b)], self.inner, [a])
            else:
                made = mx.roll(a, 1, axis=0)
            values.append(made)
        return [values[-1 - k % len(values)] for k in range(self.n_outputs)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_random_graphs_equal_python_if(compiled: bool, tmp_path: Path) -> None:
    """100 random bodies in each mode, four steps each, the second and third without an evaluation between."""
    taken = {True: 0, False: 0}
    for seed in range(100):
        program = Program(1000 * compiled + seed, tmp_path)
        rng = np.random.default_rng(seed)
        inputs = [mx.array(rng.standard_normal((4, 4)), dtype=mx.float32) for _ in range(program.n_inputs)]
        if rng.random() < 0.3:
            inputs[-1] = inputs[0]  # shared
        body = ops.Body(program)

        def step(x: mx.array, *rest: mx.array, program: Program = program, body: ops.Body = body) -> list[mx.array]:
            skip = mx.sum(x) > 0
            on_skip = [x @ x for _ in range(program.n_outputs)]
            return ops.branch(skip, on_skip, body, [x, *rest])

        function = mx.compile(step) if compiled else step
        pending = []
        for t in range(4):
            x = inputs[0] * (1 if t % 2 else -1) + 0.1 * t
            skip = mx.sum(x).item() > 0
            want = [x @ x] * program.n_outputs if skip else program(x, *inputs[1:])
            taken[skip] += 1
            pending.append((function(x, *inputs[1:]), want))
            if t != 1:
                mx.eval([got for got, _ in pending])
        for got, want in pending:
            assert all(equal(g, w) for g, w in zip(got, want, strict=True)), f"seed {seed}"
    assert min(taken.values()) > 100  # both sides were taken


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_twenty_chained_steps_without_evaluation(compiled: bool) -> None:
    w = mx.random.normal((16, 16), key=mx.random.key(0)) * 0.3
    body = ops.Body(lambda x: [mx.softmax(x @ w), x @ w])

    def step(x: mx.array, residual: mx.array) -> list[mx.array]:
        return ops.branch(mx.sum(mx.sort(x)) > 1.0, [x - residual, residual], body, [x])

    function = mx.compile(step) if compiled else step
    x = want_x = mx.random.normal((4, 16), key=mx.random.key(1))
    residual = want_residual = mx.zeros((4, 16))
    sides = set()
    for _ in range(20):
        x, residual = function(x, residual)
        skip = (mx.sum(mx.sort(want_x)) > 1.0).item()
        sides.add(skip)
        if skip:
            want_x = want_x - want_residual
        else:
            want_x, want_residual = mx.softmax(want_x @ w), want_x @ w
    assert equal(x, want_x)
    assert equal(residual, want_residual)
    assert sides == {True, False}
    assert ops.counters()["reads"] == 20


def test_async_eval() -> None:
    body = ops.Body(lambda x: [mx.cumsum(x, axis=0)])
    outs = [ops.branch(mx.array(bool(i % 2)), [mx.zeros((64, 64))], body, [mx.ones((64, 64)) * i])[0] for i in range(6)]
    mx.async_eval(outs)
    assert [o[-1, -1].item() for o in outs] == [0.0, 0.0, 128.0, 0.0, 256.0, 0.0]


def test_body_on_another_stream() -> None:
    """The body's ops run where they were traced; consumers on any stream see finished outputs."""
    other = mx.new_stream(mx.cpu)

    def fn(x: mx.array) -> list[mx.array]:
        for _ in range(5):
            x = mx.sin(mx.cumsum(x, axis=0, stream=other), stream=other)
        return [x]

    x = mx.random.normal((256, 256), key=mx.random.key(0))
    for evaluate in (mx.eval, mx.async_eval):
        (out,) = ops.branch(mx.sum(x) > 1e9, [x], ops.Body(fn), [mx.sort(x)])
        doubled = mx.add(out, out, stream=other)
        total = mx.sum(out)
        evaluate(doubled, total)
        want = fn(mx.sort(x))[0]
        assert equal(doubled, want * 2)
        assert equal(total, mx.sum(want))


def test_body_on_another_stream_waits_for_its_inputs() -> None:
    """Slow work between the decision and the second branch, whose body runs elsewhere."""
    other = mx.new_stream(mx.cpu)
    first = ops.Body(lambda x: [x + 1.0])
    second = ops.Body(lambda x: [mx.add(x, x, stream=other)])

    @mx.compile
    def step(x: mx.array) -> mx.array:
        skip = x[0] > 1e9
        (a,) = ops.branch(skip, [x], first, [x])
        slow = mx.sort(mx.sin(mx.sort(a)))
        return ops.branch(skip, [x], second, [slow])[0]

    x = mx.random.normal((1 << 18,), key=mx.random.key(0))
    assert mx.allclose(step(x), 2 * mx.sort(mx.sin(mx.sort(x + 1.0))), atol=1e-6).item()


@pytest.mark.parametrize("evaluate", [mx.eval, mx.async_eval])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("skipped", [False, True])
def test_streams_of_inputs_body_and_consumers(skipped: bool, compiled: bool, evaluate: Callable[..., None]) -> None:
    streams = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    between_streams(streams, skipped, compiled, evaluate)


@pytest.mark.parametrize("first", [0, 1])
def test_equal_computations_on_different_streams(first: int) -> None:
    """mx.compile makes one of them, on the stream of either: what was noted when the branch was built does not hold."""
    streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    add_there = ops.Body(lambda x: [mx.add(x, x, stream=streams[1])])
    large = mx.array(3.0)

    def step(x: mx.array) -> list[mx.array]:
        sorted_there = [slow(x, s) for s in streams]
        decisions = [mx.max(y, stream=s) > large for y, s in zip(sorted_there, streams, strict=True)]
        outs = [
            ops.branch(decisions[1], [x - 1.0], ops.Body(lambda x: [x + 1.0]), [x])[0],
            ops.branch(decisions[0], [x], add_there, [sorted_there[1]])[0],
            sorted_there[0] + 1.0,
        ]
        return outs[::-1] if first else outs

    compiled = mx.compile(step)
    for i in range(10):
        skip = i % 2 == 1
        x = mx.full((1 << 18,), -5.0 if skip else i / 10)  # slow() negates
        got = compiled(x)
        mx.eval(got)
        reused, doubled, _ = got[::-1] if first else got
        assert equal(reused, x - 1.0 if skip else x + 1.0)
        assert equal(doubled, x if skip else 2 * slow(x, streams[0]))


def test_outputs_that_nobody_reads_of_a_body_on_another_stream() -> None:
    """Their memory is not given away before the body has written it."""
    other = mx.new_stream(mx.cpu)
    size = 1 << 18
    body = ops.Body(lambda x: [x + 1.0, mx.sort(mx.sort(x, stream=other), stream=other) * 0.0 - 7.0])
    x = mx.random.normal((size,), key=mx.random.key(0))
    for _ in range(20):
        out = ops.branch(FALSE, [x, x], body, [mx.add(x, 0.0, stream=other)])[0]
        mx.async_eval(out)
        fresh = [mx.array(np.full(size, i, np.float32)) for i in range(4)]
        mx.synchronize(other)
        assert [f[0].item() for f in fresh] == [0.0, 1.0, 2.0, 3.0]
        assert all(mx.all(f == i).item() for i, f in enumerate(fresh))


def test_inputs_and_constants_as_outputs() -> None:
    constant = mx.array([7.0, 8.0])
    body = ops.Body(lambda x, y: [y, constant, constant * 2, x, x])
    x, y = mx.array([1.0, 2.0]), mx.array([3.0, 4.0])
    out = ops.branch(FALSE, [x] * 5, body, [x, y])
    assert [o.tolist() for o in out] == [[3, 4], [7, 8], [14, 16], [1, 2], [1, 2]]


def test_nested_bodies_with_fused_operations() -> None:
    """Element-wise chains become fused kernels in the outer function and in both bodies."""
    inner = ops.Body(lambda x, y: [mx.tanh(mx.exp(-x * x) + y) * 0.5])

    def outer(x: mx.array, y: mx.array) -> list[mx.array]:
        z = mx.sin(x) * mx.cos(y) + 1.0
        (w,) = ops.branch(mx.sum(z) > 1e9, [z], inner, [mx.abs(z) + x, y * 2.0])
        return [mx.sqrt(mx.abs(w - z)) / (1.0 + w * w), w]

    def plain(x: mx.array, y: mx.array) -> list[mx.array]:
        z = mx.sin(x) * mx.cos(y) + 1.0
        w = mx.tanh(mx.exp(-(mx.abs(z) + x) * (mx.abs(z) + x)) + y * 2.0) * 0.5
        return [mx.sqrt(mx.abs(w - z)) / (1.0 + w * w), w]

    body = ops.Body(outer)
    step = mx.compile(lambda x, y: ops.branch(mx.sum(x) > 1e9, [x, y], body, [x, y]))
    x, y = (mx.random.normal((33, 7), key=mx.random.key(i)) for i in (0, 1))
    for got, want in zip(step(x, y), plain(x, y), strict=True):
        assert mx.allclose(got, want, rtol=1e-6, atol=1e-6).item()  # fused kernels may round exp and tanh otherwise
    assert ops.counters() == {"reads": 2, "computed": 2, "reused": 0}


def test_donated_buffers() -> None:
    """What the branch hands over may be overwritten by the body, but never what somebody still holds."""
    body = ops.Body(lambda x: [mx.exp(x) + 1.0])
    held = mx.ones((128, 128))
    mx.eval(held)
    (a,) = ops.branch(FALSE, [mx.zeros((128, 128))], body, [held])
    (b,) = ops.branch(FALSE, [mx.zeros((128, 128))], body, [held + 0.0])
    mx.eval(a, b)
    assert equal(held, mx.ones((128, 128)))
    assert equal(a, b)


# ---- Costs


def test_a_skipped_body_is_not_evaluated() -> None:
    """The body would fail: a singular matrix has no inverse."""
    body = ops.Body(lambda x: [mx.linalg.inv(x, stream=mx.cpu)])
    out = ops.branch(TRUE, [mx.ones((2, 2))], body, [mx.zeros((2, 2))])
    assert equal(out[0], mx.ones((2, 2)))


def test_two_branches_on_one_decision_read_once_outside_compile() -> None:
    body = ops.Body(lambda x: [mx.cumsum(x)])
    x = mx.ones(4)
    for make, reads in ((ops.decide, 1), (lambda skip: skip, 2)):
        ops.reset_counters()
        skip = make(mx.sum(x) > 100)
        (a,) = ops.branch(skip, [x], body, [x])
        (b,) = ops.branch(skip, [a], body, [a])
        assert b.tolist() == [1.0, 3.0, 6.0, 10.0]
        assert ops.counters() == {"reads": reads, "computed": 2, "reused": 0}


def test_decide_refuses_what_is_no_decision() -> None:
    for wrong in (mx.zeros(3), mx.array([True]), mx.array(1)):
        with pytest.raises(ValueError, match=r"^\[branch\] skip must be a bool scalar or a gate's state"):
            ops.decide(wrong)


def test_two_branches_on_one_decision_read_once() -> None:
    body = ops.Body(lambda x: [mx.cumsum(x)])

    @mx.compile
    def step(x: mx.array) -> mx.array:
        skip = mx.sum(x) > 0
        (a,) = ops.branch(skip, [x], body, [x])
        (b,) = ops.branch(skip, [x], body, [x * 2])
        return a + b

    assert step(-mx.ones(3)).tolist() == [-3.0, -6.0, -9.0]
    assert ops.counters() == {"reads": 1, "computed": 2, "reused": 0}
    assert step(mx.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert ops.counters() == {"reads": 2, "computed": 2, "reused": 2}


def test_traced_once_for_each_shape_and_dtype() -> None:
    calls = []

    def fn(x: mx.array) -> list[mx.array]:
        calls.append(x.shape)
        return [x + 1]

    body = ops.Body(fn)
    for shape, dtype in [((2,), mx.float32), ((3,), mx.float32), ((2,), mx.float16), ((2,), mx.float32)]:
        x = mx.zeros(shape, dtype)
        mx.eval(ops.branch(FALSE, [x], body, [x]))
    assert calls == [(2,), (3,), (2,)]


def test_short_lived_threads_leave_nothing_in_a_body_they_share() -> None:
    """Each has a graph of its own, with the constants that it folded: 1 MB here."""
    ones = mx.ones((512, 512))
    mx.eval(ones)
    body = ops.Body(lambda x: [x + (ones + 1)])

    def use_in_a_thread() -> int:
        def use() -> None:
            mx.eval(ops.branch(FALSE, [ones], body, [ones]))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        return mx.get_active_memory()

    first = use_in_a_thread()
    assert max(use_in_a_thread() for _ in range(10)) < first + 3 * ones.nbytes


def test_the_names_of_primitives_are_those_of_this_mlx(tmp_path: Path) -> None:
    """csrc/graph_capture.cpp knows views, casts and lazy loads by name."""
    source = (Path(__file__).parents[1] / "csrc" / "graph_capture.cpp").read_text()
    (names,) = re.findall(r"names\{(.*?)\}", source, re.DOTALL)
    known = {*re.findall(r'"(\w+)"', names), *re.findall(r'name\(\)\) == "(\w+)"', source)}
    mx.save(str(tmp_path / "a.npy"), mx.ones((2, 3)))
    a = mx.load(str(tmp_path / "a.npy"))
    nodes = [a.astype(mx.float16), mx.broadcast_to(a, (2, 2, 3)), mx.expand_dims(a, 0), mx.flatten(a)]
    nodes += [mx.reshape(a, (3, 2)), mx.squeeze(mx.expand_dims(a, 0), 0), mx.transpose(a), mx.unflatten(a, 0, (1, 2))]
    text = io.StringIO()
    mx.export_to_dot(text, *nodes)
    assert known == {name for name in re.findall(r'label ?= ?"(\w+)"', text.getvalue()) if name[0].isupper()}


def test_an_outer_function_need_not_keep_the_body() -> None:
    out = ops.branch(FALSE, [mx.zeros(2)], ops.Body(lambda x: [x * 3]), [mx.ones(2)])
    assert out[0].tolist() == [3.0, 3.0]


def test_memory_of_what_only_a_skip_needs_is_free_while_the_body_runs() -> None:
    n = 1 << 20

    def peak(skip: bool) -> int:
        body = ops.Body(lambda x: [mx.sort(mx.cumsum(x))])
        x = mx.ones(n)
        mx.eval(x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        (out,) = ops.branch(mx.array(skip), [mx.cumsum(mx.full((n,), 2.0))], body, [x])
        mx.eval(out)
        return (mx.get_peak_memory() - before) // (4 * n)

    # full() and cumsum() before the branch, then cumsum() and sort() in the body: two at a time, not three
    assert peak(False) == 2
    assert peak(True) == 2


def test_the_body_may_overwrite_an_input_that_nobody_else_holds() -> None:
    n = 1 << 20
    body = ops.Body(lambda x: [mx.sin(mx.cos(mx.sin(x)))])
    on_skip = mx.zeros(n)
    mx.eval(on_skip)

    def extra(hold: bool) -> int:
        x = mx.random.uniform(shape=(n,), key=mx.random.key(0))
        mx.eval(x)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        (out,) = ops.branch(FALSE, [on_skip], body, [x])
        held = x if hold else None
        del x
        mx.eval(out)
        del held
        return round((mx.get_peak_memory() - before) / (4 * n))

    assert (extra(hold=False), extra(hold=True)) == (0, 1)


# ---- Errors


def test_an_enclosing_tracer_is_refused() -> None:
    @mx.compile
    def step(x: mx.array, y: mx.array) -> mx.array:
        doubled = y * 2
        return ops.branch(mx.sum(x) > 0, [x, x], ops.Body(lambda a: [a + 1, a * doubled]), [x])[0]

    with pytest.raises(ValueError) as error:
        step(mx.ones(3), mx.ones(3))
    assert str(error.value) == (
        "[branch] the body's output 1 depends on an array of shape (3) that belongs to an enclosing trace: "
        "pass that array in inputs instead of closing over it"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(skip=mx.array(1.0)),
            "skip must be a bool scalar or a gate's state (float32 of shape (8)), got float32 ()",
        ),
        (
            dict(skip=mx.array([True])),
            "skip must be a bool scalar or a gate's state (float32 of shape (8)), got bool (1)",
        ),
        (dict(on_skip=[]), "on_skip must have one array for each of the body's 1 outputs, got 0"),
        (
            dict(on_skip=[mx.zeros((2, 4))]),
            "on_skip[0] must be what the body returns, float32 (2,3), got float32 (2,4)",
        ),
        (
            dict(on_skip=[mx.zeros((2, 3), mx.bfloat16)]),
            "on_skip[0] must be what the body returns, float32 (2,3), got bfloat16 (2,3)",
        ),
        (
            dict(body=ops.Body(lambda x: x)),
            "the body must return a list of one or more arrays, got <class 'mlx.core.array'>",
        ),
        (dict(body=ops.Body(lambda x: [])), "the body must return a list of one or more arrays, got <class 'list'>"),
        (dict(body=ops.Body(lambda x: [1])), "the body must return a list of one or more arrays, got <class 'list'>"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    good = dict(skip=FALSE, on_skip=[mx.zeros((2, 3))], body=ops.Body(lambda x: [x]), inputs=[mx.ones((2, 3))])
    with pytest.raises(ValueError) as error:
        ops.branch(**{**good, **arguments})  # type: ignore[arg-type]
    assert str(error.value) == "[branch] " + message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs must be the 1 that the body was traced with, got 0"),
        ([mx.zeros((3, 2))], "inputs[0] must be as the body was traced, float32 (2,3), got float32 (3,2)"),
        ([mx.zeros((2, 3), mx.int32)], "inputs[0] must be as the body was traced, float32 (2,3), got int32 (2,3)"),
    ],
)
def test_inputs_that_a_graph_was_not_traced_with(inputs: list[mx.array], message: str) -> None:
    graph = ops.Body(lambda x: [x]).trace([mx.zeros((2, 3))])
    with pytest.raises(ValueError) as error:
        ops._branch(FALSE, [mx.zeros((2, 3))], graph, inputs)
    assert str(error.value) == "[branch] " + message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(skip=True), "skip must be an array, got bool: mx.array(True), for example"),
        (dict(body=lambda x: [x]), "body must be an ops.Body, got function: wrap the function once"),
        (dict(inputs=mx.ones((2, 3))), "inputs must be a list of arrays, got array"),
        (dict(inputs=[1.0]), "inputs must be a list of arrays, got list of ['float']"),
        (dict(on_skip=mx.ones((2, 3))), "on_skip must be a list of arrays, got array"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, object], message: str) -> None:
    good = dict(skip=FALSE, on_skip=[mx.zeros((2, 3))], body=ops.Body(lambda x: [x]), inputs=[mx.ones((2, 3))])
    with pytest.raises(TypeError) as error:
        ops.branch(**{**good, **arguments})  # type: ignore[arg-type]
    assert str(error.value) == "[branch] " + message


def test_an_exception_while_tracing_is_the_users_own() -> None:
    class Mine(Exception):
        pass

    def fn(x: mx.array) -> list[mx.array]:
        raise Mine("from the body")

    body = ops.Body(fn)
    for function in (
        lambda x: ops.branch(FALSE, [x], body, [x]),
        mx.compile(lambda x: ops.branch(FALSE, [x], body, [x])),
    ):
        with pytest.raises(Mine, match="from the body"):
            function(mx.ones(2))
    assert ops.branch(FALSE, [mx.zeros(2)], ops.Body(lambda x: [x]), [mx.ones(2)])[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_exception_while_evaluating_surfaces_and_mlx_stays_usable(compiled: bool) -> None:
    body = ops.Body(lambda x: [mx.linalg.inv(x, stream=mx.cpu)])

    def step(x: mx.array) -> mx.array:
        return ops.branch(mx.sum(x) > 100, [x], body, [x])[0]

    function = mx.compile(step) if compiled else step
    with pytest.raises(RuntimeError):
        mx.eval(function(mx.zeros((2, 2))))
    assert equal(function(mx.eye(2) * 2), mx.eye(2) * 0.5)


def test_the_same_outputs_cannot_be_evaluated_again_after_a_failure() -> None:
    """The branch has given up its inputs by then; the second evaluation says so."""
    done = run("""
        import mlx.core as mx
        from mlx_teacache_fast import ops

        inner = ops.Body(lambda x: [mx.linalg.inv(x, stream=mx.cpu)])
        # the inner branch reads its decision from what failed, so that the failure is met while the body is scheduled
        body = ops.Body(lambda x: ops.branch(mx.sum(mx.linalg.inv(x, stream=mx.cpu)) > 0, [x], inner, [x]))
        (out,) = ops.branch(mx.array(False), [mx.zeros((2, 2))], body, [mx.zeros((2, 2))])
        for _ in range(2):
            try:
                mx.eval(out)
                print("evaluated")
            except RuntimeError as error:
                print(error)
        print(mx.sum(mx.ones(3)).item())
    """)
    assert done.returncode == 0, done.stderr
    first, second, alive = done.stdout.splitlines()
    assert "[Inverse::eval_cpu]" in first or "inv" in first.lower()
    assert second == ("[branch] an earlier evaluation of this step failed: build it again from its inputs")
    assert alive == "3.0"


def test_transformations_are_refused() -> None:
    body = ops.Body(lambda x: [x * 2])

    def loss(x: mx.array) -> mx.array:
        return mx.sum(ops.branch(FALSE, [x], body, [x])[0])

    with pytest.raises(RuntimeError) as error:
        mx.grad(loss)(mx.ones(3))
    assert str(error.value) == "[branch] is not differentiable: gate and skip steps at inference only"
    with pytest.raises(RuntimeError) as error:
        mx.vmap(lambda x: ops.branch(FALSE, [x], body, [x])[0])(mx.ones((2, 3)))
    assert str(error.value) == (
        "[branch] has no vmap: one decision holds for the whole batch, put it in the batch axis"
    )


def test_export_is_refused(tmp_path: Path) -> None:
    body = ops.Body(lambda x: [x * 2])
    with pytest.raises(ValueError, match="Unable to serialize primitive TeaCacheDecide"):
        mx.export_function(
            str(tmp_path / "f.mlxfn"), lambda x: ops.branch(mx.sum(x) > 0, [x], body, [x])[0], mx.ones(3)
        )


def test_shapeless_compilation() -> None:
    """Works while the body's shapes stay those of the trace; others are refused, since the body's graph has its own."""
    body = ops.Body(lambda x: [mx.sort(x)])
    step = mx.compile(lambda x: ops.branch(mx.sum(x) > 0, [x], body, [x])[0], shapeless=True)
    assert step(-mx.arange(3.0)).tolist() == [-2.0, -1.0, 0.0]
    assert step(mx.array([3.0, 2.0, 1.0])).tolist() == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError) as error:
        step(mx.ones(4))
    assert str(error.value) == (
        "[branch] the body was traced with inputs[0] of shape (3) and cannot take (4): compile without shapeless=True"
    )


# ---- Lifetimes


def test_a_thousand_traces_leave_nothing_and_exit_cleanly() -> None:
    done = run("""
        import gc, os
        import mlx.core as mx
        from mlx_teacache_fast import ops

        def resident():
            gc.collect()
            mx.clear_cache()
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")

        def once(i):
            w = mx.random.normal((64, 64))
            inner = ops.Body(lambda x: [mx.softmax(x @ w)])
            body = ops.Body(lambda x: [mx.cumsum(x @ w, axis=0), ops.branch(mx.sum(x) > 0, [x], inner, [x])[0]])
            step = mx.compile(lambda x: ops.branch(mx.sum(x) > 0, [x, x], body, [x]))
            mx.eval(step(mx.full((64, 64), float(i % 3 - 1))))

        linux = os.path.exists("/proc/self/statm")
        for i in range(300):
            once(i)
        active, resident_before = mx.get_active_memory(), resident() if linux else 0
        for i in range(700):
            once(i)
        gc.collect()
        print(mx.get_active_memory() - active, (resident() if linux else 0) - resident_before)
    """)
    assert done.returncode == 0, done.stderr
    active, resident = map(int, done.stdout.split())
    assert active <= 64 * 64 * 4
    assert resident < 4 << 20  # a trace holds a 16 kB weight and 20 nodes: 700 kept ones would be over 15 MB


@pytest.mark.parametrize("order", ["step, body", "body, step", "neither"])
def test_exit_is_clean_in_any_order_of_deletion(order: str) -> None:
    done = run(
        """
        import gc, sys
        import mlx.core as mx
        from mlx_teacache_fast import ops

        body = ops.Body(lambda x: [mx.tanh(mx.exp(x)) * 2])
        step = mx.compile(lambda x: ops.branch(mx.sum(x) > 0, [x], body, [x])[0] + 1)
        for i in (-1.0, 1.0):
            mx.eval(step(mx.full((4,), i)))
        if sys.argv[1] == "step, body":
            del step; gc.collect(); del body
        elif sys.argv[1] == "body, step":
            del body; gc.collect(); del step
        gc.collect()
        print("done")
        """,
        order,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_another_thread_evaluates_its_own_branches() -> None:
    import threading

    results: list[list[float]] = []

    def work() -> None:
        body = ops.Body(lambda x: [mx.sort(x)])
        step = mx.compile(lambda x: ops.branch(mx.sum(x) > 0, [x], body, [x])[0])
        results.append(step(mx.array([0.0, -1.0])).tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [[-1.0, 0.0]] * 4
