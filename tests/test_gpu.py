"""On a GPU: the gate against the CPU's, the branch between streams, whole generations. Skipped where there is none."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gate_cases import (
    EPSILON,
    MISS,
    SHAPES,
    Case,
    assert_modulated_close,
    assert_reused_close,
    assert_same_bits,
    assert_state_matches_numpy,
    digest,
    given,
    make_state,
    modulate_float64,
    random_case,
    to_numpy,
)

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops
from mlx_teacache_fast.cli import checks

pytestmark = pytest.mark.gpu

GPU, CPU = mx.Device(mx.gpu), mx.Device(mx.cpu)
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])


@pytest.fixture(params=["1", "2"] if mx.metal.is_available() else ["1"], ids=lambda n: f"{n} dispatches")
def dispatches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's two ways to decide; before macOS 15 both are the second. CUDA's launches are two always."""
    monkeypatch.setenv("MLX_TEACACHE_FAST_METAL_DISPATCHES", request.param)


def on(device: mx.Device, case: Case) -> tuple[mx.array, list[mx.array], mx.array]:
    return case.run(lambda **given: ops.gate(**given, stream=device))


def assert_gpu_is_cpu(case: Case) -> None:
    """Reuse to the bit; the rest but for the order of the row sums, within the bounds that hold for the CPU too."""
    modulated, reused, state = on(GPU, case)
    on_cpu = on(CPU, case)
    for got, expected in zip(reused, on_cpu[1], strict=True):
        assert digest(got) == digest(expected)
    assert_modulated_close(modulated, on_cpu[0], case)
    got, expected = np.array(state), np.array(on_cpu[2])
    assert got[[0, 1, 5, 6, 7]].tolist() == expected[[0, 1, 5, 6, 7]].tolist()
    if case.x.size:
        assert_modulated_close(modulated, modulate_float64(case), case)
        assert_reused_close(reused, case)
        assert_state_matches_numpy(state, modulated, case)
    # A percent of neighbours, at most, moves the means by a percent of epsilon, over a distance of about 0.1.
    tolerance = max(1e-5, 0.1 * EPSILON[modulated.dtype])
    assert got == pytest.approx(expected, rel=tolerance, abs=1e-6, nan_ok=True)


# ---- Gate


@DTYPES
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 130, 256), (2, 300, 64), (1, 2, 12288), (1, 3, 40_000)], ids=lambda s: str(s)
)
@pytest.mark.usefixtures("dispatches")
def test_shapes_and_dtypes(shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    assert_gpu_is_cpu(random_case(shape, dtype))


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize("branches", [1, 2])
@DTYPES
def test_branches_and_terms(dtype: mx.Dtype, branches: int, terms: int) -> None:
    assert_gpu_is_cpu(random_case((2, 3, 264), dtype, branches=branches, terms=terms))


@DTYPES
def test_without_a_branch(dtype: mx.Dtype) -> None:
    assert_gpu_is_cpu(random_case((2, 3, 264), dtype, branches=0, terms=0))


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (1, 130, 256), (1, 3, 40_000)], ids=lambda s: str(s))
@pytest.mark.usefixtures("dispatches")
def test_given_the_modulated_input(shape: tuple[int, int, int], dtype: mx.Dtype) -> None:
    """As on the CPU, and the state to the bit as where the GPU modulates: the same elements in the same order."""
    case = random_case(shape, dtype)
    modulated, _, state = on(GPU, case)
    signal = replace(given(case), x=modulated)
    assert digest(on(GPU, signal)[2]) == digest(state)
    assert_gpu_is_cpu(signal)


@pytest.mark.parametrize("residual", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("modulation", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@DTYPES
def test_mixed_dtypes(dtype: mx.Dtype, modulation: mx.Dtype, residual: mx.Dtype) -> None:
    case = random_case((2, 5, 72), dtype, residual_dtype=residual)
    shift, scale = case.shift.astype(modulation), case.scale.astype(modulation)
    anchor = case.anchor.astype(mx.result_type(case.x, shift))
    assert_gpu_is_cpu(replace(case, shift=shift, scale=scale, anchor=anchor))


@DTYPES
@pytest.mark.parametrize("channels", [255, 256])
def test_modulation_of_each_token(channels: int, dtype: mx.Dtype) -> None:
    case = random_case((2, 5, channels), dtype)
    shift, scale = (mx.random.normal((2, 5, channels), key=mx.random.key(i)).astype(dtype) for i in (1, 2))
    assert_gpu_is_cpu(replace(case, shift=shift, scale=scale))


@DTYPES
def test_slices_that_start_anywhere(dtype: mx.Dtype) -> None:
    """Packed views whose first byte is no multiple of 16: the 16-byte loads must not be taken."""
    case = random_case((1, 4, 64), dtype)
    for start in (1, 2, 4, 8):
        flat = mx.concatenate([mx.full((start,), mx.nan, dtype), case.x.reshape(-1)])
        mx.eval(flat)
        assert_same_bits(on(GPU, replace(case, x=flat[start:].reshape(1, 4, 64))), on(GPU, case))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_exact_statistics_give_the_cpu_bits(dtype: mx.Dtype) -> None:
    """Small integers whose row sums are multiples of 64: mean and variance are exact in any order of summation."""
    x = np.random.default_rng(11).integers(-8, 9, (2, 40, 64)).astype(np.float32)
    x[..., 0] -= np.remainder(x.sum(-1), 64)
    case = replace(random_case((2, 40, 64), dtype), x=mx.array(x).astype(dtype))
    assert digest(on(GPU, case)[0]) == digest(on(CPU, case)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 254, 255])
@pytest.mark.usefixtures("dispatches")
def test_one_element_that_is_not_finite(column: int, value: float) -> None:
    case = random_case((1, 200, 256), mx.bfloat16)
    shift = np.array(case.shift.astype(mx.float32)).repeat(200, axis=1)
    shift[0, 199, column] = value
    scale = mx.repeat(case.scale, 200, axis=1)
    modulated, _, state = on(GPU, replace(case, shift=mx.array(shift).astype(mx.bfloat16), scale=scale))
    assert np.argwhere(~np.isfinite(to_numpy(modulated))).tolist() == [[0, 199, column]]
    assert state[1].item() == MISS


@pytest.mark.usefixtures("dispatches")
def test_random_trajectories_decide_as_on_the_cpu() -> None:
    """500 steps: state, anchor and residual go from step to step on each device. Near-ties may go either way."""
    rng = np.random.default_rng(5)
    steps = near = 0
    while steps < 500:
        x = rng.standard_normal((1, int(rng.integers(1, 200)), 8 * int(rng.integers(1, 40)))).astype(np.float32)
        case = random_case(x.shape, mx.bfloat16 if rng.random() < 0.5 else mx.float32, seed=steps)
        threshold = float(rng.uniform(0.05, 0.6))
        state, anchor = mx.zeros(8), mx.zeros_like(case.anchor)
        for _ in range(10):
            x = x + 10 ** rng.uniform(-3, 0) * rng.standard_normal(x.shape).astype(np.float32)
            now = mx.array(x).astype(case.x.dtype)
            step = replace(case, x=now, state=state, anchor=anchor, threshold=threshold, coefficients=(0, 0, 0, 1, 0))
            want = on(CPU, step)
            got = on(GPU, step)
            acc = np.float64(np.array(state)[4]) + np.nan_to_num(np.array(want[2])[3])
            if abs(acc - threshold) < 1e-4 * threshold:
                near += 1
            else:
                assert np.array(got[2])[[0, 1, 5, 6, 7]].tolist() == np.array(want[2])[[0, 1, 5, 6, 7]].tolist()
            anchor, state = want[0], want[2]
            steps += 1
    assert near < 25


@pytest.mark.usefixtures("dispatches")
def test_many_gates_in_flight() -> None:
    """64 gates in one evaluation, 50 times: none may see another's partial sums or counter."""
    cases = [replace(random_case((1, 40 + i, 256), mx.bfloat16, seed=i), state=make_state()) for i in range(64)]
    expected = [digest(on(GPU, case)[2]) for case in cases]
    for _ in range(50):
        states = [ops.gate(**case.arrays, **case.options)[2] for case in cases]
        mx.eval(states)
        assert [digest(state) for state in states] == expected


def test_what_a_gate_takes_besides_its_inputs() -> None:
    """Reuse's memory, and on CUDA the modulated input's: Metal writes that over the anchor."""
    case = random_case((1, 1024, 3072), mx.bfloat16)
    mx.eval(case.arrays)  # what is lazy when it is captured is computed at every call
    step = mx.compile(
        lambda x, anchor, state: ops.gate(**case.arrays | {"x": x, "anchor": anchor, "state": state}, **case.options)[
            ::2
        ]
    )
    anchor, state = case.anchor + 0, case.state
    for _ in range(3):
        anchor, state = step(case.x, anchor, state)
        mx.eval(anchor, state)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        anchor, state = step(case.x, anchor, state)
        mx.eval(anchor, state)
        mx.synchronize()
    outputs = 1 if mx.metal.is_available() else 2
    assert mx.get_peak_memory() - before < (outputs + 0.5) * case.x.nbytes


# ---- Branch


@pytest.mark.parametrize("evaluate", [mx.eval, mx.async_eval])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("skipped", [False, True])
def test_streams_of_inputs_body_and_consumers(skipped: bool, compiled: bool, evaluate: Callable[..., None]) -> None:
    """Two streams of the GPU and one of the CPU."""
    streams = [mx.default_stream(GPU), mx.new_stream(GPU), mx.default_stream(CPU)]
    checks.between_streams(streams, skipped, compiled, evaluate)


@pytest.mark.parametrize("evaluate", [mx.eval, mx.async_eval])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_reader_many_command_buffers_after_the_wait(skipped: bool, evaluate: Callable[..., None]) -> None:
    checks.far_reader(GPU, skipped, evaluate)


def test_two_gpu_streams_and_a_decision_on_one() -> None:
    """The body's input waits, on the decision's stream, for work on the other that has not been committed."""
    other = mx.new_stream(GPU)
    body = ops.Body(lambda x: [x * 2.0])
    x = mx.random.normal((1 << 16,), key=mx.random.key(0))
    mx.eval(x)
    for _ in range(5):
        skip = mx.greater(mx.max(x, stream=other), mx.array(1e9), stream=other)
        out = ops.branch(skip, [x], body, [mx.add(x + 1.0, 1.0, stream=other)])[0]
        assert mx.array_equal(out, ((x + 1.0) + 1.0) * 2.0).item()


@pytest.mark.parametrize("shapeless", [False, True])
def test_a_state_decides(shapeless: bool) -> None:
    """Its first number, whatever the others; also a view into something larger."""
    body = ops.Body(lambda x: [x * 2.0])
    step = mx.compile(lambda state, x: ops.branch(state, [x], body, [x])[0], shapeless=shapeless)
    for first in (0.0, 1.0):
        for state in (mx.array([first, *[np.nan] * 7]), mx.array([[9.0] * 8, [first, *[1.0] * 7]])[1]):
            mx.eval(state)
            assert step(state + 0.0, mx.ones(4)).tolist() == [2.0 - first] * 4
            assert ops.branch(state, [mx.ones(4)], body, [mx.ones(4)])[0].tolist() == [2.0 - first] * 4
    flags = mx.array([True, False] * 4096)
    for i in (4, 5):
        assert ops.branch(flags[i], [mx.ones(4)], body, [mx.ones(4)])[0].tolist() == [1.0 + i % 2] * 4


def test_one_read_for_two_branches() -> None:
    body = ops.Body(lambda x: [mx.cumsum(x)])
    x = mx.ones(1 << 16)
    skip = ops.decide(mx.sum(x) > 1e9)
    ops.reset_counters()
    outs = [ops.branch(skip, [x], body, [x + i])[0] for i in range(2)]
    assert [o[-1].item() for o in outs] == [65536.0, 131072.0]
    assert ops.counters() == {"reads": 1, "computed": 2, "reused": 0}


def test_large_bodies_do_not_wait_for_themselves() -> None:
    checks.large_body()


def test_outputs_that_nobody_reads() -> None:
    """Their memory is not given away before the body has written it."""
    size = 1 << 20
    body = ops.Body(lambda x: [x + 1.0, mx.sort(mx.sort(x)) * 0.0 - 7.0])
    x = mx.random.normal((size,), key=mx.random.key(0))
    for _ in range(20):
        out = ops.branch(mx.array(False), [x, x], body, [x + 0.0])[0]
        mx.async_eval(out)
        fresh = [mx.array(np.full(size, i, np.float32)) for i in range(4)]
        mx.synchronize()
        assert all(mx.all(f == i).item() for i, f in enumerate(fresh))


@pytest.mark.parametrize(
    "body",
    [
        "ops.Body(lambda x: [mx.linalg.inv(mx.zeros_like(x) * x, stream=mx.cpu)])",  # on the CPU stream's thread
        "ops.Body(lambda x: [mx.load('/nowhere.npy', stream=mx.cpu) + x])",  # in the trace
        "ops.Body(lambda x: [x @ failing(x)])",  # in the nested evaluation
    ],
)
def test_a_failing_body_is_an_error_and_not_a_wait(body: str) -> None:
    program = f"""
        import mlx.core as mx
        from mlx_teacache_fast import ops

        new_kernel = mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel
        kernel = new_kernel("failing", ["x"], ["y"], "this is no kernel;")

        def failing(x):
            return kernel(inputs=[x], grid=(4, 1, 1), threadgroup=(4, 1, 1), output_shapes=[x.shape],
                          output_dtypes=[x.dtype])[0]

        x = mx.ones((2, 2)) * 2
        try:
            out = ops.branch(mx.sum(mx.ones(3)) > 1e9, [mx.ones((2, 2))], {body}, [x])[0]
            mx.eval(out + 1)
            mx.synchronize()
        except Exception as error:
            print("error", error)
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "error" in done.stdout, done.stderr


# ---- Generations


@cache
def pipeline(dtype: mx.Dtype) -> Any:
    from mlx_teacache_fast import demo

    return demo.pipeline(dtype)


def image(flux: Any, **kwargs: Any) -> np.ndarray:
    arguments = dict(prompt="red apple", seed=1, height=128, width=128, num_inference_steps=12) | kwargs
    return np.asarray(flux.generate_image(**arguments).image)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("threshold", [0.0, 1e-9], ids=["off", "gated"])
def test_computed_steps_are_bit_equal(threshold: float, dtype: mx.Dtype, guidance: float) -> None:
    flux = pipeline(dtype)
    plain = image(flux, guidance=guidance)
    with tc.apply_teacache(flux, rel_l1_thresh=threshold) as handle:
        assert np.array_equal(image(flux, guidance=guidance), plain)
    assert handle.stats.skipped_count == 0
    assert np.array_equal(image(flux, guidance=guidance), plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_gated_generation_is_the_cpus(guidance: float) -> None:
    flux = pipeline(mx.float32)
    results = {}
    for device in (GPU, CPU):
        mx.set_default_device(device)
        with tc.apply_teacache(flux, rel_l1_thresh=0.3) as handle:
            ops.reset_counters()
            pixels = image(flux, guidance=guidance, num_inference_steps=25)
            reads = ops.counters()["reads"]
        results[device] = (pixels, [s.kind for s in handle.stats.last_generation.steps], reads)
    (on_gpu, gpu_kinds, reads), (on_cpu, cpu_kinds, _) = results[GPU], results[CPU]
    assert gpu_kinds == cpu_kinds
    assert "skipped" in gpu_kinds
    assert reads == 25
    assert np.abs(on_gpu.astype(int) - on_cpu.astype(int)).max() <= 3


def test_the_uncompiled_step_of_some_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mflux.utils.apple_silicon import AppleSiliconUtil

    flux = pipeline(mx.float32)
    for eager in (False, True):
        monkeypatch.setattr(AppleSiliconUtil, "is_m1_or_m2", lambda eager=eager: eager)
        plain = image(flux, guidance=4.0)
        with tc.apply_teacache(flux, rel_l1_thresh=1e-9):
            ops.reset_counters()
            gated = image(flux, guidance=4.0)
        # The body is compiled in either case, and a fused kernel may contract multiply and add.
        assert np.abs(gated.astype(int) - plain.astype(int)).max() <= (1 if eager else 0)
        assert ops.counters() == {"reads": 12, "computed": 24, "reused": 0}
