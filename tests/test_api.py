"""What users call beside ``generate_image``: names, statistics, summary, trace, replay, what is supported."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

import mlx_teacache_fast as tc
from mlx_teacache_fast import ops
from mlx_teacache_fast.record.stats import percentile, step_record, table

Generate = Callable[..., np.ndarray]


# ---- mlx-teacache's names


def test_the_names_of_mlx_teacache() -> None:
    """All but those of which docs/mlx-teacache.md says why they are not there."""
    theirs = set(pytest.importorskip("mlx_teacache").__all__)
    missing = {"CalibrationError", "MissingGenerationContextError", "StatsFrozenError", "TransformerShapeError"}
    assert theirs - set(tc.__all__) == missing


def test_aliases_are_the_same_things() -> None:
    assert tc.TeaCacheHandle is tc.Handle
    assert tc.TeaCacheStats is tc.Stats
    assert tc.StepDecision is tc.StepRecord
    assert tc.TeaCacheDisabledWarning is tc.DisabledWarning
    assert tc.TeaCacheNoBenefitWarning is tc.NoBenefitWarning
    assert tc.TeaCacheUncalibratedCheckpointWarning is tc.UncalibratedWarning
    assert tc.TeaCacheUntestedMfluxWarning is tc.UntestedVersionWarning


def test_statistics_by_their_names(flux: Any, generate: Generate) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=0.4) as handle:
        generate(num_inference_steps=12, height=32, width=32)
    stats, last = handle.stats, handle.stats.last_generation
    assert last is not None
    assert stats.skipped_count > 0
    assert stats.total_active_steps == 12
    assert stats.computed_count + stats.forced_count + stats.skipped_count + stats.numerical_miss_count == 12
    assert stats.speedup_estimate == 12 / (12 - stats.skipped_count)
    assert [d.step_idx for d in last.decisions] == list(range(12))
    assert [d.decision for d in last.decisions].count("skipped") == stats.skipped_count
    assert [d.accumulated_distance for d in last.decisions] == [s.accumulated for s in last.steps]
    assert repr(stats) == (
        f"<Stats of 1 generations, 12 steps: {stats.computed_count} computed, 2 forced, {stats.skipped_count} skipped, "
        "0 numerical-miss>"
    )


def test_provenance(flux: Any) -> None:
    peer = pytest.importorskip("mlx_teacache")
    with peer.apply_teacache(flux) as handle:
        theirs = handle.provenance
    with tc.apply_teacache(flux) as handle:
        ours = handle.provenance
    assert ours.source == theirs.source == "builtin"
    assert ours.fit_metric_value == theirs.fit_metric_value
    assert ours.reference_url == theirs.reference_url
    assert ours.default_thresh == theirs.default_thresh == 0.17
    with tc.apply_teacache(flux, coefficients=[0, 0, 0, 1, 0]) as handle:
        assert handle.provenance == tc.Provenance("user")


FITTED = [variant for variant in tc.VARIANTS.values() if variant.fit is not None]


@pytest.mark.parametrize("variant", FITTED, ids=lambda v: v.variant_id)
def test_variants_are_those_of_mlx_teacache(variant: tc.Variant) -> None:
    registry = pytest.importorskip("mlx_teacache.variants")._REGISTRY
    assert set(registry) == {v.variant_id for v in FITTED}
    theirs = registry[variant.variant_id]
    integration = pytest.importorskip(theirs["load_integration"]().__module__)
    assert variant.provenance.fit_metric_value == integration._PROVENANCE.fit_metric_value
    if variant.variant_id != "flux1-schnell":  # distilled, and without a threshold of its own here
        assert variant.default_thresh == theirs["default_thresh"]


# ---- check_step_window


@pytest.mark.parametrize(("active", "first", "last"), [(3, 1, 1), (1, 0, 0), (50, 20, 29)])
def test_windows_that_are_accepted(active: int, first: int, last: int) -> None:
    tc.check_step_window(active, skip_first_n_steps=first, skip_last_n_steps=last)


def test_windows_that_are_refused() -> None:
    with pytest.raises(tc.InvalidStepWindowError) as error:
        tc.check_step_window(2)
    assert str(error.value) == (
        "skip_first_n_steps=1 and skip_last_n_steps=1 leave no step to gate: the schedule has 2 active; "
        "use 4 or more active steps"
    )
    with pytest.raises(tc.InvalidStepWindowError) as no_step:
        tc.check_step_window(0, skip_first_n_steps=0, skip_last_n_steps=0, nominal_num_inference_steps=4)
    assert str(no_step.value) == (
        "skip_first_n_steps=0 and skip_last_n_steps=0 leave no step to gate: the schedule has 0 active of "
        "num_inference_steps=4; use 2 or more active steps"
    )
    with pytest.raises(tc.TeaCacheValueError) as value_error:
        tc.check_step_window(2.0)  # type: ignore[arg-type]
    assert str(value_error.value) == "active_num_steps must be a whole number of steps, 0 or more, got 2.0"


# ---- match_variant, supported


def test_match_variant() -> None:
    assert tc.match_variant(ModelConfig.flux2_klein_base_4b(), Flux2Klein) == tc.VariantInfo(
        variant_id="flux2-klein-base-4b",
        display_name="FLUX.2 klein base 4B",
        default_thresh=0.17,
        model_names=("flux2-klein-base-4b",),
        calibrated=True,
    )
    distilled = tc.match_variant(ModelConfig.flux2_klein_4b(), Flux2Klein)
    assert distilled is not None
    assert distilled.default_thresh is None
    shares = tc.match_variant(ModelConfig.flux2_klein_base_9b(), Flux2Klein)
    assert shares is not None
    assert (shares.calibrated, shares.fitted_on) == (True, "flux2-klein-base-4b")
    finetune = ModelConfig.from_name("somebody/finetune", base_model="flux2-klein-base-4b")
    matched = tc.match_variant(finetune, Flux2Klein)
    assert matched is not None
    assert (matched.variant_id, matched.calibrated) == ("flux2-klein-base-4b", False)


def test_match_variant_is_none_where_apply_refuses(flux: Any) -> None:
    assert tc.match_variant(ModelConfig.qwen_image(), Flux2Klein) is None
    assert tc.match_variant(flux.model_config, dict) is None
    assert tc.match_variant(None, Flux2Klein) is None
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.match_variant(flux.model_config, flux)
    assert str(error.value) == "pipeline_class must be a class such as Flux2Klein, got an object of TinyKlein"


def test_match_variant_is_what_apply_uses(flux: Any) -> None:
    info = tc.match_variant(flux.model_config, type(flux))
    assert info is not None
    with tc.apply(flux, tc.Policy(rule=tc.Gate())) as handle:
        assert (handle.variant_id, handle.rel_l1_thresh) == (info.variant_id, info.default_thresh)


def test_supported() -> None:
    rows = {row.name: row for row in tc.supported()}
    klein = rows["Flux2Klein"]
    assert klein.refused is None
    assert [v.variant_id for v in klein.variants] == [i for i in tc.VARIANTS if i.startswith("flux2")]
    assert tc.match_variant(ModelConfig.flux2_klein_base_9b(), Flux2Klein) in klein.variants
    assert all(bool(row.variants) != bool(row.refused) for row in rows.values())  # gated, or why not


def test_supported_reads_as_a_table() -> None:
    base = tc.VariantInfo(variant_id="a", display_name="A", default_thresh=0.2, model_names=("a",), calibrated=True)
    other = replace(base, variant_id="b", calibrated=False)
    shares = replace(base, variant_id="c", fitted_on="a")
    rows = [tc.Pipeline("Gated", (base, other, shares)), tc.Pipeline("Not", (), "it returns attention maps")]
    assert (
        str(tc.Pipelines(rows))
        == "Gated  a, c (fitted on a); not calibrated: b\nNot    refused: it returns attention maps"
    )


# ---- max_consecutive_skips


def longest_run_of_skips(generation: tc.GenerationStats) -> int:
    runs = "".join("s" if step.kind == "skipped" else " " for step in generation.steps).split()
    return max(map(len, runs), default=0)


@pytest.mark.parametrize("limit", [0, 1, 3, 100])
def test_max_consecutive_skips(flux: Any, generate: Generate, limit: int) -> None:
    """Coefficients of 0 price every step at 0, so that nothing but the limit and the last step ends a run."""
    with tc.apply_teacache(flux, coefficients=[0] * 5, max_consecutive_skips=limit) as handle:
        generate(num_inference_steps=20, height=32, width=32)
    assert handle.stats.last_generation is not None
    assert longest_run_of_skips(handle.stats.last_generation) == min(limit, 17)  # not first, seed and last


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_bad_max_consecutive_skips(flux: Any, value: object) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.apply_teacache(flux, max_consecutive_skips=value)  # type: ignore[arg-type]
    assert str(error.value) == f"max_consecutive_skips must be a whole number of steps, 0 or more, got {value!r}"


# ---- What is counted when


def test_counts_are_those_of_finished_generations(flux: Any, generate: Generate) -> None:
    class Fails:
        def call_in_loop(self, t: int, **_: Any) -> None:
            if t == 5:
                flux.callbacks.in_loop.remove(self)
                raise RuntimeError("no more")

    with tc.apply_teacache(flux, rel_l1_thresh=0.4) as handle:
        stats = handle.stats
        generate(num_inference_steps=12, height=32, width=32)
        before = (stats.finished, repr(stats), handle.summary())
        flux.callbacks.register(Fails())
        with pytest.raises(RuntimeError):
            generate(num_inference_steps=12, height=32, width=32)
        assert (stats.finished, repr(stats), handle.summary()) == before
        generate(num_inference_steps=8, height=32, width=32)
        assert [g.num_steps for g in stats.finished] == [12, 8]
        assert stats.last_generation is stats.finished[-1]
    assert stats.total_steps == 20


def test_restore_in_a_callback_ends_the_counting(flux: Any, generate: Generate) -> None:
    handle = tc.apply_teacache(flux, rel_l1_thresh=0.4)
    generate(num_inference_steps=8, height=32, width=32)
    table_before, trace_before = handle.summary(), handle.trace

    class Restores:
        def call_in_loop(self, t: int, **_: Any) -> None:
            if t == 3:
                flux.callbacks.in_loop.remove(self)
                handle.restore()

    flux.callbacks.register(Restores())
    image = generate(num_inference_steps=8, height=32, width=32)
    assert image.shape == (32, 32, 3)
    assert handle.stats.generations == 1
    assert handle.summary() == table_before
    assert handle.trace == trace_before


def test_counts_are_read_only(flux: Any) -> None:
    with tc.apply_teacache(flux) as handle, pytest.raises(AttributeError):
        handle.stats.skipped_count = 3  # type: ignore[misc]


# ---- summary


def step(index: int, kind: Any, rel: float | None = None, seconds: float | None = None) -> tc.StepRecord:
    return tc.StepRecord(index, kind, rel, rel, 0.0, seconds)


def test_summary_in_full() -> None:
    steps = (
        step(0, "forced", seconds=9.0),  # it compiles, so it is in no mean
        step(1, "computed", seconds=1.0),
        step(2, "skipped", 0.1, seconds=0.25),
        step(3, "computed", 0.3, seconds=2.0),
        step(4, "skipped", 0.2, seconds=0.25),
        step(5, "forced"),
    )
    assert table([tc.GenerationStats(steps, seconds=14.0), tc.GenerationStats(steps, seconds=13.0)]) == (
        "generations     2\n"
        "steps           12: 4 computed, 4 forced, 4 skipped, 0 numerical-miss\n"
        "skipped         33.3 %\n"
        "bound           1.50x, the most that skipping these steps can give\n"
        "rel-L1          p10 0.1000, p50 0.2000, p90 0.3000, max 0.3000\n"
        "seconds         27.00 in all, 13.50 a generation\n"
        "seconds a step  1.5000 computed, 0.2500 skipped\n"
        "seconds saved   5.00, an estimate: skipped steps * difference"
    )


def test_summary_without_seconds_and_without_steps(flux: Any, generate: Generate, photo: Path) -> None:
    assert table([tc.GenerationStats((step(0, "forced"),))]) == (
        "generations  1\n"
        "steps        1: 0 computed, 1 forced, 0 skipped, 0 numerical-miss\n"
        "skipped      0.0 %\n"
        "bound        1.00x, the most that skipping these steps can give"
    )
    with tc.apply_teacache(flux, rel_l1_thresh=0.3) as handle:
        nothing = "flux2-klein-base-4b, rel_l1_thresh 0.3\nno generation with a step has finished"
        assert handle.summary() == nothing
        generate(num_inference_steps=5, image_path=photo, image_strength=1.0)
        assert handle.summary() == nothing
        generate(num_inference_steps=10, height=32, width=32)
    lines = handle.summary().splitlines()
    assert lines[0] == "flux2-klein-base-4b, rel_l1_thresh 0.3"
    assert lines[1].split() == ["generations", "2"]
    assert f" {handle.stats.skipped_count} skipped," in lines[2]


def test_seconds_of_a_generation(flux: Any, generate: Generate) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=0.4) as handle:
        generate(num_inference_steps=12, height=32, width=32)
    last = handle.stats.last_generation
    assert last is not None
    assert last.seconds is not None
    *times, end = [s.seconds for s in last.steps]
    assert end is None
    assert all(t > 0 for t in times)
    assert sum(times) < last.seconds
    assert "seconds saved" in handle.summary()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 100))
def test_percentiles(values: list[float], p: int) -> None:
    values.sort()
    at = percentile(values, p)
    assert at == np.percentile(values, p, method="inverted_cdf")
    assert percentile(values, 100) == values[-1]


# ---- trace


def test_trace_of_a_generation(flux: Any, generate: Generate, tmp_path: Path) -> None:
    with tc.apply_teacache(flux, rel_l1_thresh=0.4, skip_first_n_steps=2) as handle:
        for seed in (1, 2):
            generate(num_inference_steps=15, height=32, width=32, seed=seed)
    trace = handle.trace
    assert [[s.index for s in g.steps] for g in trace.generations] == [list(range(15))] * 2
    assert trace.generations[-1] == handle.stats.last_generation
    assert (trace.variant_id, trace.policy) == ("flux2-klein-base-4b", handle.policy)
    assert gate_of(trace) == replace(gate_of(trace), rel_l1_thresh=0.4, skip_first_n_steps=2)

    trace.to_json(tmp_path / "trace.json")
    assert tc.Trace.from_json(tmp_path / "trace.json") == trace
    assert tc.replay(trace, rel_l1_thresh=0.4) == trace
    fewer, more = tc.replay(trace, rel_l1_thresh=0.2), tc.replay(trace, rel_l1_thresh=0.9)
    skipped = [sum(g.skipped for g in t.generations) for t in (fewer, trace, more)]
    assert skipped[0] < skipped[1] < skipped[2]
    assert gate_of(fewer) == replace(gate_of(trace), rel_l1_thresh=0.2)
    assert longest_run_of_skips(tc.replay(trace, rel_l1_thresh=0.9, max_consecutive_skips=2).generations[0]) == 2


def gate_of(trace: tc.Trace) -> tc.Gate:
    assert isinstance(trace.policy.rule, tc.Gate)
    return trace.policy.rule


IDENTITY = tc.Gate(rel_l1_thresh=0.5, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0))


def a_trace(generations: Any = None, **rule: Any) -> tc.Trace:
    """Of a gate that prices a distance at itself, but for ``rule``."""
    steps = (step(0, "forced"), step(1, "computed"), step(2, "skipped", 0.1, 0.5), step(3, "forced"))
    generations = generations or (tc.GenerationStats(steps, 1.5),)
    policy = tc.Policy(rule=replace(IDENTITY, **rule), forecast=0, cache="residual")
    return tc.Trace("flux2-klein-base-4b", policy, generations)


def test_seconds_are_not_compared() -> None:
    assert step(0, "forced", seconds=1.0) == step(0, "forced")
    assert tc.GenerationStats((), seconds=1.0) == tc.GenerationStats(())


def test_seconds_are_in_the_file(tmp_path: Path) -> None:
    a_trace().to_json(tmp_path / "t.json")
    (generation,) = tc.Trace.from_json(tmp_path / "t.json").generations
    assert generation.seconds == 1.5
    assert generation.steps[2].seconds == 0.5


def test_a_file_is_overwritten_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("precious")
    with pytest.raises(tc.TeaCacheValueError) as error:
        a_trace().to_json(path)
    assert str(error.value) == f"{path} exists; force=True overwrites it"
    assert path.read_text() == "precious"
    a_trace().to_json(str(path), force=True)
    assert tc.Trace.from_json(str(path)) == a_trace()


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    a_trace().to_json(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("format"), 'is not a trace: it has no "format": "mlx-teacache-fast trace"'),
        (lambda d: d.update(version=2), "is a trace of version 2, and this package reads 1"),
        (lambda d: d.pop("variant_id"), "is not a trace: missing or unknown: 'variant_id'"),
        (lambda d: d.update(colour=1), "is not a trace: missing or unknown: 'colour'"),
        (lambda d: d.update(generations=[{}]), "is not a trace: missing or unknown: 'steps', 'seconds'"),
        (lambda d: d.update(generations=[3]), "is not a trace: an object with steps, seconds is wanted, got 3"),
        (
            lambda d: d["policy"].update(rel_l1_thresh=2),
            "is not a trace: rel_l1_thresh must be a number from 0.0 to 1.0, got 2",
        ),
        (
            lambda d: d["generations"][0]["steps"][1].update(rel_l1="far"),
            "is not a trace: rel_l1 must be a number of float32's range or null, got 'far'",
        ),
        (
            lambda d: d["generations"][0]["steps"][1].update(rel_l1=float("nan")),
            "is not a trace: NaN is no number",
        ),
        (
            lambda d: d["generations"][0]["steps"][0].update(kind="jumped"),
            "is not a trace: step 0 is {'accumulated': 0.0, 'index': 0, 'kind': 'jumped', 'predicted': None, "
            "'rel_l1': None, 'seconds': None}",
        ),
    ],
    ids=["format", "version", "missing", "unknown", "no-steps", "no-dict", "value", "text", "nan", "kind"],
)
def test_files_that_are_no_trace(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = edited(tmp_path / "t.json", edit)
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.Trace.from_json(path)
    assert str(error.value) == f"{path} {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" ", f"it must have 1 to {2**26} bytes of text, got 1"),
        (b"not json", "it is no JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"format": "mlx', "it is cut off: Unterminated string starting at: line 1 column 12 (char 11)"),
        (b'{"format":', "it is cut off: Expecting value: line 1 column 11 (char 10)"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[]", 'it has no "format": "mlx-teacache-fast trace"'),
        (b"\xef\xbb\xbf{}", "it begins with a byte-order mark, and must be UTF-8 without one"),
        ("{}".encode("utf-16"), "it is in UTF-16 or UTF-32, and must be in UTF-8"),
        ("{}".encode("utf-16-le"), "it is in UTF-16 or UTF-32, and must be in UTF-8"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
    ids=["empty", "text", "cut", "cut-value", "deep", "list", "mark", "utf-16", "utf-16-le", "latin"],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.Trace.from_json(path)
    assert str(error.value) == f"{path} is not a trace: {message}"
    with pytest.raises(FileNotFoundError):
        tc.Trace.from_json(tmp_path / "none.json")


# ---- replay


COEFFICIENTS = st.sampled_from([v.coefficients for v in FITTED] + [(0.0, 0.0, 0.0, 1.0, 0.0)])
RANGES = st.sampled_from([None, (0.02, 0.3), (0.1, 0.1)])
THRESHOLDS = st.floats(1e-4, 1.0) | st.sampled_from([0.17, 1.0])


def gated(seed: int, n_steps: int, window: tuple[int, int], **rules: Any) -> tc.GenerationStats:
    """A random walk through ``ops.gate``, now and then not a number, all zeros, or too far for float32's polynomial."""
    rng = np.random.default_rng(seed)
    x, scale = mx.zeros((1, 3, 4)), -mx.ones((1, 3, 4))  # with this scale the modulated input is the shift
    walk = rng.standard_normal((1, 3, 4))
    anchor, state = mx.zeros_like(x), mx.zeros(8)
    steps = []
    for i in range(n_steps):
        walk = walk + 10 ** rng.uniform(-3, 0) * rng.standard_normal(walk.shape)
        event = rng.random()
        seen = walk * (np.nan if event < 0.05 else 0.0 if event < 0.1 else 1e25 if event < 0.12 else 1.0)
        force = 1 if i < window[0] else 2 if i >= n_steps - window[1] else 0
        shift = mx.array(seen.astype(np.float32))
        anchor, _, state = ops.gate(
            x,
            shift,
            scale,
            anchor,
            residuals=[[x]],
            weights=mx.ones((1, 1)),
            state=state,
            force=mx.array(force, mx.int32),
            **rules,
        )
        steps.append(step_record(i, state.tolist()))  # type: ignore[arg-type]
    return tc.GenerationStats(tuple(steps))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(COEFFICIENTS, RANGES),
    st.tuples(THRESHOLDS, st.integers(0, 9)),
    st.tuples(THRESHOLDS, st.integers(0, 9)),
)
def test_replay_decides_as_the_gate_did(
    seed: int, n_steps: int, window: tuple[int, int], fixed: Any, made_with: Any, asked: Any
) -> None:
    """Here a skip changes nothing of the later inputs, so that a replay with other settings is exact too."""
    coefficients, limits = fixed

    def run(threshold: float, in_a_row: int) -> tc.Trace:
        rules = dict(coefficients=coefficients, calibrated_range=limits, max_consecutive_skips=in_a_row)
        generation = gated(seed, n_steps, window, threshold=threshold, **rules)
        return a_trace((generation,), rel_l1_thresh=threshold, **rules)

    trace = run(*made_with)
    assert tc.replay(trace, rel_l1_thresh=made_with[0]) == trace
    assert tc.replay(trace, rel_l1_thresh=asked[0], max_consecutive_skips=asked[1]) == run(*asked)


def test_replay_by_hand() -> None:
    """Prices 0.1, 0.2, 0.3, 0.4 with the identity polynomial."""
    steps = (
        step(0, "forced"),
        step(1, "computed"),
        *(step(i, "computed", rel) for i, rel in ((2, 0.125), (3, 0.25), (4, 0.375), (5, 0.5))),
        step(6, "forced"),
    )
    trace = a_trace((tc.GenerationStats(steps),))

    def kinds(**arguments: Any) -> str:
        (generation,) = tc.replay(trace, **arguments).generations
        return "".join(s.kind[0] for s in generation.steps)

    assert kinds(rel_l1_thresh=0.5) == "fcsscc" + "f"  # 0.125, 0.375, then 0.75; 0.5 is not below 0.5
    assert kinds(rel_l1_thresh=0.51) == "fcsscs" + "f"
    assert kinds(rel_l1_thresh=1.0, max_consecutive_skips=1) == "fcscsc" + "f"
    assert kinds(rel_l1_thresh=1.0, coefficients=[0, 0, 0, 0, 0]) == "fcssss" + "f"
    assert kinds(rel_l1_thresh=1.0, coefficients=[0] * 5, calibrated_range=(0.0, 0.3)) == "fcsscc" + "f"
    assert kinds(rel_l1_thresh=0.0) == "ccccccc"
    trace = a_trace(trace.generations, max_skips=2)
    assert kinds(rel_l1_thresh=1.0, coefficients=[0] * 5) == "fcssff" + "f"


def test_replay_computes_where_no_distance_is_known() -> None:
    """A polynomial that overflowed made step 2 a miss and step 3 a seed, which measures nothing."""
    steps = (step(0, "computed"), step(1, "skipped", 0.1), step(2, "numerical-miss", 0.2), step(3, "computed"))
    (generation,) = tc.replay(a_trace((tc.GenerationStats(steps),)), rel_l1_thresh=1.0).generations
    assert [s.kind for s in generation.steps] == ["computed", "skipped", "skipped", "computed"]
    assert generation.steps[3].accumulated == 0.0


def test_replay_keeps_the_range_only_with_the_coefficients() -> None:
    trace = a_trace(calibrated_range=(0.0, 0.2))
    assert gate_of(tc.replay(trace, rel_l1_thresh=0.3)).calibrated_range == (0.0, 0.2)
    assert gate_of(tc.replay(trace, rel_l1_thresh=0.3, coefficients=[1, 2, 3, 4, 5])).calibrated_range is None
    assert gate_of(tc.replay(trace, rel_l1_thresh=0.3, calibrated_range=None)).calibrated_range is None


def test_replay_of_a_trace_without_distances(flux: Any, generate: Generate) -> None:
    with pytest.warns(tc.DisabledWarning):
        handle = tc.apply_teacache(flux, rel_l1_thresh=0.0)
    with handle:
        generate(num_inference_steps=5, height=32, width=32)
    assert tc.replay(handle.trace, rel_l1_thresh=0.0) == handle.trace
    with tc.apply_teacache(flux, steps="11111") as planned:
        generate(num_inference_steps=5, height=32, width=32)
    with tc.apply(flux, tolerance=0.1) as watched:
        generate(num_inference_steps=8, height=32, width=32)
    for trace, policy in (
        (handle.trace, "rel_l1_thresh 0"),
        (planned.trace, "steps as planned"),
        (watched.trace, "tolerance 0.1, forecast 1 of the output"),
    ):
        with pytest.raises(tc.TeaCacheValueError) as error:
            tc.replay(trace, rel_l1_thresh=0.2)
        assert str(error.value) == f"replay is of a trace of the gate with a threshold, and this is of {policy}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rel_l1_thresh=1.5), "rel_l1_thresh must be a number from 0.0 to 1.0, got 1.5"),
        (
            dict(coefficients=[1]),
            "coefficients must be five finite numbers of float32's range, fourth degree first, got [1]",
        ),
        (
            dict(max_consecutive_skips=-1),
            "max_consecutive_skips must be a whole number of steps, 0 or more, got -1",
        ),
        *(
            (
                dict(calibrated_range=value),
                f"calibrated_range must be two finite numbers, the lower first, or None, got {value!r}",
            )
            for value in [(0.3, 0.2), (0.1,), 5, (0.0, float("nan")), "ab"]
        ),
    ],
)
def test_bad_arguments_of_replay(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.TeaCacheValueError) as error:
        tc.replay(a_trace(), **(dict(rel_l1_thresh=0.2) | arguments))
    assert str(error.value) == message


# ---- Errors travel

CLASSES = [
    c for c in map(vars(tc).get, sorted(set(tc.__all__))) if isinstance(c, type) and issubclass(c, BaseException)
]
COPIES: list[Callable[[Any], Any]] = [
    *(lambda e, protocol=protocol: pickle.loads(pickle.dumps(e, protocol)) for protocol in range(6)),
    copy.copy,
    copy.deepcopy,
]


@pytest.mark.parametrize("kind", sorted(set(CLASSES), key=lambda c: c.__name__))
def test_errors_round_trip(kind: type[BaseException]) -> None:
    error = kind("what went wrong")
    error.add_note("seen in a test")
    for again in COPIES:
        other = again(error)
        assert type(other) is kind
        assert (str(other), other.args) == (str(error), error.args)
        assert other.__notes__ == ["seen in a test"]


def test_an_error_leaves_its_handle_behind(flux: Any) -> None:
    with tc.apply_teacache(flux) as handle:
        with pytest.raises(tc.AlreadyPatchedError) as raised:
            tc.apply_teacache(flux)
        error = raised.value
        assert error.handle is handle
        for again in COPIES:
            other = again(error)
            assert str(other) == str(error)
            assert other.handle is None
        assert error.handle is handle


def test_warnings_are_user_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("w", tc.TeaCacheDisabledWarning, stacklevel=1)
    assert issubclass(caught[0].category, UserWarning)
