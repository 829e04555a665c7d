"""The gate decides as mlx-teacache does, step by step: random trajectories against its ``gate_step``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_teacache_fast import ops
from mlx_teacache_fast.models import VARIANTS
from mlx_teacache_fast.record.stats import KINDS

peer = pytest.importorskip("mlx_teacache.gate", reason="mlx-teacache is not installed")
peer_cache = pytest.importorskip("mlx_teacache._kernel.cache", reason="mlx-teacache is not installed")

# The oracle decides in float64, the gate in float32: nearer than this to a limit, either side of it is right.
NEAR_TIE = 1e-5
MAX_NEAR_TIES = 0.005  # of all steps


@dataclass
class Counts:
    """What was compared, so that a run in which little happens does not pass for a proof."""

    trajectories: int = 0
    steps: int = 0
    near_ties: int = 0
    overflows: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.items())
        return (
            f"{self.trajectories} trajectories, {self.steps} steps ({kinds}), {self.near_ties} near-ties, "
            f"{self.overflows} float32 overflows"
        )


@dataclass(frozen=True)
class Trajectory:
    """One generation: its rules, and x, shift and scale at each active step."""

    dtype: mx.Dtype
    coefficients: tuple[float, ...]
    calibrated_range: tuple[float, float] | None
    threshold: float
    skip_first: int
    skip_last: int
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def force(self, step: int) -> int:
        if step < self.skip_first:
            return 1
        return 2 if step >= len(self.steps) - self.skip_last else 0


def random_trajectory(rng: np.random.Generator, *, hostile: bool = True) -> Trajectory:
    """A random walk under random rules; ``hostile`` adds steps with NaN, infinity, zero anchors and constant x."""
    if rng.random() < 0.7:
        variant = VARIANTS[str(rng.choice([name for name, known in VARIANTS.items() if known.fit is not None]))]
        coefficients, calibrated_range = variant.coefficients, variant.calibrated_range
        threshold = variant.rel_l1_thresh if rng.random() < 0.4 else rng.random()
    else:
        # A user's own: from flat to steep, of both signs, sometimes with a range.
        coefficients = tuple(rng.standard_normal(5) * 10 ** rng.uniform(-3, 1, 5) * rng.integers(0, 2, 5))
        low, high = np.sort(10 ** rng.uniform(-3, 0, 2))
        calibrated_range = (float(low), float(high)) if rng.random() < 0.3 else None
        threshold = rng.random()
    if rng.random() < 0.1:
        threshold = float(rng.integers(0, 2))  # 0 is off, 1 is the largest

    # In image-to-image the schedule is cut short at its start: fewer active steps, counted from 0.
    scheduled = int(rng.integers(4, 17))
    num_steps = scheduled - int(rng.integers(0, scheduled // 2)) if rng.random() < 0.25 else scheduled

    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 6)), int(rng.integers(2, 40)))
    x = rng.standard_normal(shape)
    row = (shape[0], 1, shape[2])
    shift, scale = rng.standard_normal(row), 0.3 * rng.standard_normal(row)
    # The relative change of a step, 1e-4 to 1: near one value, as in a real schedule, or anything.
    usual = rng.uniform(-4, 0)
    constant = hostile and rng.random() < 0.1
    steps = []
    for _ in range(num_steps):
        change = 10 ** (usual + 0.1 * rng.standard_normal() if rng.random() < 0.7 else rng.uniform(-4, 0))
        if not constant:
            x = x + change * rng.standard_normal(shape)
            shift = shift + 0.5 * change * rng.standard_normal(row)
        seen = [x.copy(), shift.copy(), scale.copy()]
        event = rng.random() if hostile else 1.0
        if event < 0.04:
            target = seen[rng.integers(0, 3)].reshape(-1)
            target[rng.integers(0, target.size)] = rng.choice([np.nan, np.inf, -np.inf])
        elif event < 0.06:
            seen[0] = np.full(shape, rng.standard_normal())  # no variance: modulated is the shift
        elif event < 0.08:
            seen[0], seen[1] = np.zeros(shape), np.zeros_like(shift)  # modulated is 0, and then the anchor
        steps.append((seen[0], seen[1], seen[2]))
    return Trajectory(
        dtype=mx.bfloat16 if rng.random() < 0.5 else mx.float32,
        coefficients=tuple(float(c) for c in coefficients),
        calibrated_range=calibrated_range,
        threshold=float(threshold),
        skip_first=int(rng.integers(0, 4)),
        skip_last=int(rng.integers(0, 4)),
        steps=steps,
    )


def peer_modulation(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return (1.0 + scale) * mx.fast.layer_norm(x, None, None, 1e-6) + shift


def price_in_float32(trajectory: Trajectory, rel: float) -> np.float32:
    """The polynomial as the gate evaluates it, to know where float32 overflows and the oracle's float64 does not."""
    at = np.float32(rel)
    if trajectory.calibrated_range is not None:
        low, high = trajectory.calibrated_range
        at = np.clip(at, np.float32(low), np.float32(high))
    price = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for c in trajectory.coefficients:
            price = price * at + np.float32(c)
    return price


def compare(
    trajectory: Trajectory,
    counts: Counts,
    modulation: Callable[[mx.array, mx.array, mx.array], mx.array] | None = None,
    rel_floor: float = 1e-30,
    near_tie: float = NEAR_TIE,
) -> None:
    """Run one trajectory through both. ``modulation`` gives the oracle its own input; else it sees the op's output.

    Each rel is two float32 sums of up to 400 numbers: off by 2^-24 sqrt(400) each, 2e-6 with room; ``rel_floor`` is
    added where the two inputs differ. A price is off by that times its slope and by 2^-22 of each of its terms, the
    accumulator by the sum over its prices.
    """
    counts.trajectories += 1
    oracle = peer_cache.TeaCacheState()
    residual = mx.array(0.0)
    cast = [tuple(mx.array(a.astype(np.float32)).astype(trajectory.dtype) for a in step) for step in trajectory.steps]
    anchor, state = mx.zeros_like(cast[0][0]), mx.zeros(8)
    slack, rel_tolerance = 0.0, 2e-6
    for index, (x, shift, scale) in enumerate(cast):
        before = oracle.accumulated_distance
        anchor, _, state = ops.gate(
            x,
            shift,
            scale,
            anchor,
            residuals=[[x]],
            weights=mx.ones((1, 1)),
            state=state,
            force=mx.array(trajectory.force(index), mx.int32),
            coefficients=trajectory.coefficients,
            threshold=trajectory.threshold,
            calibrated_range=trajectory.calibrated_range,
        )
        decision = peer.gate_step(
            oracle,
            rel_l1_thresh=trajectory.threshold,
            coefficients=trajectory.coefficients,
            skip_first=trajectory.skip_first,
            skip_last=trajectory.skip_last,
            num_steps=len(cast),
            step_idx=index,
            mod_in=anchor if modulation is None else modulation(x, shift, scale),
            calibrated_range=trajectory.calibrated_range,
        )
        if decision.should_update_cache:
            oracle.store_residuals(pos=residual)

        skip, code, rel, price, acc, streak, has_anchor, has_residual = state.tolist()
        kind = KINDS[int(code)]
        counts.steps += 1
        counts.kinds[kind] += 1

        def where(step: int = index, got: Any = (kind, rel, price, acc), oracle_says: Any = decision) -> str:
            return f"step {step}: got {got}, oracle {oracle_says}, {trajectory}"

        if decision.rel_l1 is not None and decision.predicted_distance is not None:
            if not np.isfinite(price_in_float32(trajectory, decision.rel_l1)):
                # A polynomial without a range at a distance of 1e9 and more, which only a zero anchor gives.
                # Beyond float32 there is no price: a numerical miss, so the step computes whatever float64 says.
                counts.overflows += 1
                assert kind == "numerical-miss", where()
                return
            ties = [abs(before + decision.predicted_distance - trajectory.threshold)]
            if trajectory.calibrated_range is not None:
                ties.append(abs(decision.rel_l1 - trajectory.calibrated_range[1]))
            if min(ties) < near_tie:
                counts.near_ties += 1
                if kind != decision.kind:
                    return

        assert kind == decision.kind, where()
        assert skip == (not decision.should_compute), where()
        assert has_anchor == (oracle.previous_mod_input is not None), where()
        assert has_residual == (oracle.cached_residual is not None), where()
        assert streak == oracle.consecutive_skips, where()
        assert np.isnan(rel) == (decision.rel_l1 is None), where()
        assert np.isnan(price) == (decision.predicted_distance is None), where()
        if decision.rel_l1 is not None:
            assert rel == pytest.approx(decision.rel_l1, rel=rel_tolerance, abs=rel_floor), where()
        if decision.predicted_distance is not None:
            at = decision.rel_l1
            if trajectory.calibrated_range is not None:
                at = float(np.clip(at, *trajectory.calibrated_range))
            sizes = [abs(c) for c in reversed(trajectory.coefficients)]
            slope = sum(n * sizes[n] * at ** (n - 1) for n in range(1, 5))
            error = 2**-22 * sum(sizes[n] * at**n for n in range(5)) + slope * (rel_tolerance * at + rel_floor)
            assert price == pytest.approx(decision.predicted_distance, abs=error, rel=1e-6), where()
            slack += error + 1e-6 * abs(decision.predicted_distance)
        if oracle.accumulated_distance == 0:
            slack = 0.0
        assert acc == pytest.approx(oracle.accumulated_distance, abs=slack + 1e-7, rel=1e-6), where()


@pytest.fixture
def counts(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[Counts]:
    """Says how much was compared, also when the test passes."""
    totals = Counts()
    yield totals
    with capsys.disabled():
        print(f"\n{request.node.name}: {totals}")


def test_decisions_equal_the_oracles(counts: Counts, record_property: Callable[[str, Any], None]) -> None:
    rng = np.random.default_rng(20241119)
    for _ in range(2000):
        compare(random_trajectory(rng), counts)
    record_property("compared", str(counts))
    assert counts.near_ties < MAX_NEAR_TIES * counts.steps
    # Each kind is well represented, and the float32 overflow is the rarity that it should be.
    assert min(counts.kinds.values()) > 0.02 * counts.steps
    assert counts.overflows < 0.01 * counts.steps


def test_decisions_equal_with_the_oracles_own_modulation(counts: Counts) -> None:
    """In float32, where the two modulations differ by some 2^-23; test_gate.py compares the 16-bit ones bit by bit."""
    rng = np.random.default_rng(2024)
    for _ in range(200):
        trajectory = replace(random_trajectory(rng, hostile=False), dtype=mx.float32)
        compare(trajectory, counts, peer_modulation, rel_floor=1e-6, near_tie=1e-4)
    assert counts.near_ties < MAX_NEAR_TIES * counts.steps
