"""``run`` and ``info``: mflux's real commands, but for its loading of weights, and what is refused before that; and
README's table of pipelines.
"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mflux", reason="the commands are mflux's")

import flux1_pipelines
import ranks
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.cli.parser.parsers import CommandLineParser
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.flux_initializer import FluxInitializer
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.flux2_initializer import Flux2Initializer
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from PIL import Image
from test_cli import COMMAND, LISTEN, Result, run

import mlx_teacache_fast
from mlx_teacache_fast import VARIANTS, Policy, Trace, cli, demo, models
from mlx_teacache_fast.cli.shared import flag
from mlx_teacache_fast.mflux import commands, hook
from mlx_teacache_fast.mflux.families import COMMANDS, FAMILIES, REFUSED, all_families, match
from mlx_teacache_fast.policy import RULES, settings

GENERATE = ["mflux-generate-flux2", "--model", "flux2-klein-base-4b", "--prompt", "red apple"]
SMALL = ["--width", "64", "--height", "64"]
INITS = MappingProxyType(
    {pipeline: vars(pipeline).get("__init__") for family in all_families() for pipeline in family.pipelines}
)

newest = pytest.mark.skipif(version("mflux") != hook.NEWEST_VERIFIED_MFLUX, reason="of the newest mflux")


@pytest.fixture(autouse=True)
def _all_is_as_before():
    argv = list(sys.argv)
    yield
    assert {
        pipeline: vars(pipeline).get("__init__") for family in all_families() for pipeline in family.pipelines
    } == INITS
    assert sys.argv == argv


@pytest.fixture
def weights(monkeypatch):
    """mflux's initialiser of FLUX.2 takes the embedded model's parts. A list of the pipelines that it has filled."""
    made = []

    def init(model, *given, **more):
        ranks.embedded(model, *given, **more)
        made.append(model)

    monkeypatch.setattr(Flux2Initializer, "init", init)
    return made


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(**_):
        pytest.fail("weights would be loaded")

    for name in ("init", "init_concept", "init_controlnet", "init_depth", "init_redux"):
        monkeypatch.setattr(FluxInitializer, name, refuse)
    monkeypatch.setattr(Flux2Initializer, "init", refuse)


# ---- A run


def test_several_seeds(tmp_path, weights):
    output, trace = tmp_path / "apple.png", tmp_path / "trace.json"
    own = ["--threshold", "0.4", "--trace", trace]
    result = run("run", *own, "--", *GENERATE, *SMALL, "--steps", 12, "--seed", 3, 4, "--output", output)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple_seed_3.png", "apple_seed_4.png", "trace.json"]
    assert "Traceback" not in result.err

    written = Trace.from_json(trace)
    assert [g.num_steps for g in written.generations] == [12, 12]
    skipped = sum(g.skipped for g in written.generations)
    assert skipped > 0
    lines = result.out.splitlines()
    summary = lines[lines.index(f"flux2-klein-base-4b, {written.policy}") :]
    assert summary[1].split() == ["generations", "2"]
    assert summary[2].split()[:2] == ["steps", "24:"]
    assert f" {skipped} skipped" in summary[2]
    assert summary[-1] == f"wrote {trace}"
    assert len(weights) == 1

    flux = demo.pipeline()  # the pictures are those of apply()
    variant = VARIANTS["flux2-klein-base-4b"]
    base = {"coefficients": variant.coefficients, "calibrated_range": variant.calibrated_range}
    for seed in (3, 4):
        with mlx_teacache_fast.apply(flux, rel_l1_thresh=0.4, **base):
            image = flux.generate_image(seed, "red apple", 12, 64, 64, guidance=1.0)
        picture = np.asarray(Image.open(tmp_path / f"apple_seed_{seed}.png"))
        np.testing.assert_array_equal(picture, np.asarray(image.image))


def test_options_reach_apply(tmp_path, weights):
    given = ["--threshold", "0.4", "--coefficients", "0", "0", "0", "-1.5", "0.25", "--calibrated-range", "0", "2"]
    given += ["--skip-first", "2", "--skip-last", "3", "--max-consecutive-skips", "4", "--max-skips", "1"]
    given += ["--forecast", "2", "--cache", "residual", "--no-metadata"]
    trace = tmp_path / "trace.json"
    output = tmp_path / "x.png"
    result = run("run", *given, "--trace", trace, "--", *GENERATE, *SMALL, "--steps", 12, "--output", output)
    assert result.code == 0, result.err
    written = Trace.from_json(trace)
    assert written.policy == Policy.of(
        rel_l1_thresh=0.4,
        coefficients=(0.0, 0.0, 0.0, -1.5, 0.25),
        calibrated_range=(0.0, 2.0),
        skip_first_n_steps=2,
        skip_last_n_steps=3,
        max_consecutive_skips=4,
        max_skips=1,
        forecast=2,
        cache="residual",
        save_metadata=False,
    )
    kinds = [step.kind for step in written.generations[0].steps]
    assert kinds[:2] == ["forced"] * 2
    assert kinds[-3:] == ["forced"] * 3
    assert kinds.count("skipped") == 1


@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.TeaCacheWarning")
def test_policy_is_a_file_of_tune_or_a_picture(tmp_path, weights):
    flux = demo.pipeline()
    options = {"num_inference_steps": 10, "height": 32, "width": 32, "guidance": 1.0}
    tuned, picture, trace = (tmp_path / name for name in ("tuned.json", "x.png", "trace.json"))
    mlx_teacache_fast.tune(flux, ["red apple"], budget=0.5, curve=(), candidates=1, path=tuned, **options)
    command = [*GENERATE, *SMALL, "--steps", 10, "--seed", 3, "--output"]
    assert run("run", "--threshold", 0.34, "--max-skips", 2, "--", *command, picture).code == 0
    variant = VARIANTS["flux2-klein-base-4b"]
    for path, policy in {
        tuned: Policy.from_json(tuned).of_model(variant),
        picture: Policy.of(rel_l1_thresh=0.34, max_skips=2, corrector=0).of_model(variant),
    }.items():
        again = tmp_path / f"again-{path.stem}.png"
        result = run("run", "--policy", path, "--trace", trace, "--force", "--", *command, again)
        assert result.code == 0, result.err
        assert Trace.from_json(trace).policy == policy
        assert f"flux2-klein-base-4b, {policy}\n" in result.out
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(again)))


@pytest.mark.usefixtures("no_weights")
def test_policy_that_cannot_be_used(tmp_path, photo):
    plan, mine = tmp_path / "plan.json", tmp_path / "mine.json"
    Policy.of(steps="1010100101").to_json(plan)
    mine.write_text("{}")
    beside = "a policy has all settings: leave out either it or rel_l1_thresh"
    unsaid = f"{photo} does not say that it was made with gating: it has no 'mlx_teacache_fast' metadata"
    for options, code, message in (
        (
            [plan],
            2,
            "steps plans 10 steps and the schedule has 12 active of num_inference_steps=12: plan one entry for "
            "each active step",
        ),
        ([tmp_path / "none.json"], 1, f"[Errno 2] No such file or directory: '{tmp_path}/none.json'"),
        ([mine], 2, f'{mine} is not a policy: it has no "format": "mlx-teacache-fast policy"'),
        ([photo], 2, unsaid),
        ([plan, "--threshold", 0.3, "--no-metadata"], 2, beside),
    ):
        result = run("run", "--policy", *options, "--", *GENERATE, "--steps", 12)
        assert result == Result(code, "", f"mlx-teacache-fast run: error: {message}\n")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "fast", "--tolerance", 0.3], "mode and tolerance both set the tolerance: leave out either"),
        (
            ["--budget", 0.4, "--max-skips", 3],
            "budget says which steps compute, and max_skips cannot count: leave out either",
        ),
        (
            ["--coefficients", 1, 2, 3, 4, "inf"],
            "coefficients must be five finite numbers of float32's range, fourth degree first, got "
            "[1.0, 2.0, 3.0, 4.0, inf]",
        ),
        (
            ["--calibrated-range", 0.1, 0.2],
            "calibrated_range belongs to coefficients of yours: give them too",
        ),
    ],
)
def test_settings_that_cannot_count(options, message):
    result = run("run", *options, "--", *GENERATE)
    assert result == Result(2, "", f"mlx-teacache-fast run: error: {message}\n")


def test_low_ram(tmp_path, weights):
    """mflux frees the transformer after each picture but the last seed's; the same pictures come out."""
    command = [*GENERATE, *SMALL, "--steps", 8, "--seed", 3, "--output"]
    for name, more in (("a.png", []), ("b.png", ["--low-ram"])):
        result = run("run", "--threshold", 0.4, "--", *command, tmp_path / name, *more)
        assert result.code == 0, result.err
        assert " skipped" in result.out
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(first, second)
    assert weights[0].transformer is not None
    assert weights[1].transformer is None


def test_steps(tmp_path, weights):
    output, trace = tmp_path / "x.png", tmp_path / "trace.json"
    result = run("run", "--steps", "10110", "--trace", trace, "--", *GENERATE, *SMALL, "--steps", 5, "--output", output)
    assert result.code == 0, result.err
    kinds = [step.kind for step in Trace.from_json(trace).generations[0].steps]
    assert kinds == ["computed", "skipped", "computed", "computed", "skipped"]
    assert "flux2-klein-base-4b, steps as planned, forecast 1 of the output\n" in result.out


def test_budget_and_forecast(tmp_path, weights):
    options = ["--budget", 0.5, "--forecast", 1, "--cache", "output"]
    result = run("run", *options, "--", *GENERATE, *SMALL, "--steps", 8, "--output", tmp_path / "x.png")
    assert result.code == 0, result.err
    assert "flux2-klein-base-4b, budget 0.5, forecast 1 of the output\n" in result.out
    assert " 4 computed" in result.out
    assert " 4 skipped" in result.out
    assert run("run", "--budget", 0, "--", *GENERATE).code == 2
    again = run("run", "--like", tmp_path / "x.png", "--", *GENERATE[:1], "--output", tmp_path / "y.png")
    assert again.code == 0, again.err
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("x.png", "y.png"))
    np.testing.assert_array_equal(first, second)


def test_like_a_picture(tmp_path, weights):
    first, second, third = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    command = [*GENERATE, *SMALL, "--steps", 12, "--guidance", 4, "--seed", 5, "--output", first]
    assert run("run", "--threshold", 0.4, "--max-skips", 3, "--", *command).code == 0
    result = run("run", "--like", first, "--", "mflux-generate-flux2", "--output", second)
    assert result.code == 0, result.err
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    said, again = (mlx_teacache_fast.read_metadata(path) for path in (first, second))
    assert (said.policy, said.steps) == (again.policy, again.steps)
    assert said.steps.count("0") == 3

    result = run("run", "--no-metadata", "--like", second, "--", *GENERATE[:1], "--seed", 6, "--output", third)
    assert result.code == 0, result.err
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(third)))
    result = run("info", third)
    assert result.code == 2
    assert result.err.startswith(f"mlx-teacache-fast info: error: {third} does not say that it was made with gating")

    result = run("info", first)
    assert result.code == 0
    assert result.out.splitlines()[2].split() == ["steps", said.steps]

    for options in (["--skip-last", 1], ["--policy", first]):
        result = run("run", "--like", first, *options, "--", "mflux-generate-flux2")
        message = "--like has all settings: leave out either it or them"
        assert result == Result(2, "", f"mlx-teacache-fast run: error: {message}\n")


def test_like_an_image_to_image_picture(tmp_path, weights, monkeypatch, photo):
    """Its input is found beside the picture; a picture of another pipeline, and an input that is gone, are refused."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    Path("photo.png").write_bytes(photo.read_bytes())
    command = [*GENERATE, *SMALL, "--steps", 12, "--image-path", "photo.png", "--image-strength", 0.3]
    assert run("run", "--threshold", 0.4, "--", *command, "--output", "a.png").code == 0
    monkeypatch.chdir(tmp_path)
    result = run("run", "--like", "in/a.png", "--", GENERATE[0], "--output", "b.png")
    assert result.code == 0, result.err
    np.testing.assert_array_equal(np.asarray(Image.open("in/a.png")), np.asarray(Image.open("b.png")))

    result = run("run", "--like", "in/a.png", "--", "mflux-generate-flux2-edit", "--image-paths", "in/photo.png")
    assert result.code == 2
    assert result.err.endswith("the picture was made by Flux2Klein, and this command runs Flux2KleinEdit\n")

    Path("in/photo.png").rename("in/same.png")
    if hasattr(CommandLineParser, "_normalize_atomic_image_args"):  # --image: not in every mflux
        given = ["--image", "in/same.png", 0.3, "--output", "c.png"]
        result = run("run", "--like", "in/a.png", "--", GENERATE[0], *given)
        assert result.code == 0, result.err
        np.testing.assert_array_equal(np.asarray(Image.open("in/a.png")), np.asarray(Image.open("c.png")))

    result = run("run", "--like", "in/a.png", "--", GENERATE[0])
    assert result.code == 2
    assert result.err == (
        "mlx-teacache-fast run: error: the picture was made from photo.png, which is not there: "
        "give it with --image-path\n"
    )


def test_like_with_a_command_that_takes_no_metadata(tmp_path, weights, no_weights):
    record = {"policy": {"rel_l1_thresh": 0.4}, "steps": "101", "variant_id": "flux1-dev", "pipeline": "Flux1Fill"}
    record |= {"scheduler": "linear", "versions": {"mlx_teacache_fast": "0.0.1"}}
    path = tmp_path / "a.metadata.json"
    path.write_text(json.dumps({"prompt": "x", "mlx_teacache_fast": record}))
    result = run("run", "--like", path, "--", "mflux-generate-fill", "--help")
    assert result.err.splitlines() == [
        "mlx-teacache-fast: warning: version 0.0.1 of this package made the picture, and "
        f"{mlx_teacache_fast.__version__} may decide otherwise: --steps 101 --forecast 1 --cache output repeats its "
        "steps",
        "mlx-teacache-fast: warning: mflux-generate-fill takes from a picture only how it is gated: give prompt, "
        "model, seed, steps and size yourself",
    ]


def test_commands_that_repeat_a_picture():
    """``repeats`` is what mflux's parsers say, but for one."""
    for name in set(COMMANDS) & set(commands.scripts()) - {"mflux-generate-in-context"}:
        source = inspect.getsource(importlib.import_module(commands.scripts()[name].module))
        assert ("supports_metadata_config=True" in source) == COMMANDS[name].repeats, name


def test_the_trace_is_written_before_anything_is_printed(tmp_path, weights, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    command = [*GENERATE, *SMALL, "--steps", "5", "--output", str(tmp_path / "x.png")]
    code = cli.main(["run", "--trace", str(tmp_path / "t.json"), "--", *command])
    monkeypatch.undo()
    assert code == 141
    assert len(Trace.from_json(tmp_path / "t.json").generations) == 1


def test_threshold_0_is_mflux_s_picture(tmp_path, weights):
    command = [*GENERATE, *SMALL, "--steps", 4, "--guidance", 4, "--seed", 5, "--output"]
    result = run("run", "--threshold", 0, "--", *command, tmp_path / "ours.png")
    assert result.code == 0, result.err
    assert (
        result.err.count("mlx-teacache-fast: warning: rel_l1_thresh=0.0 turns gating off: every step computes\n") == 1
    )
    with commands.called_as([str(argument) for argument in (*command, tmp_path / "plain.png")]):
        commands.find("mflux-generate-flux2")()
    ours, plain = (np.asarray(Image.open(tmp_path / name)) for name in ("ours.png", "plain.png"))
    np.testing.assert_array_equal(ours, plain)


def test_flux1(tmp_path, monkeypatch):
    def init(model, model_config, **_):
        small = flux1_pipelines.pipeline(Flux1, flux1_pipelines.transformer(model_config), model_config)
        for name, value in {**vars(small), **small}.items():
            setattr(model, name, value)
        model.callbacks = CallbackRegistry()

    monkeypatch.setattr(FluxInitializer, "init", init)
    command = ["mflux-generate", "--model", "dev", "--prompt", flux1_pipelines.PROMPT, *SMALL, "--steps", 5]
    result = run("run", "--steps", "11010", "--", *command, "--output", tmp_path / "x.png")
    assert result.code == 0, result.err
    assert "flux1-dev, steps as planned, forecast 1 of the output\ngenerations     1\n" in result.out
    assert Image.open(tmp_path / "x.png").size == (64, 64)


@pytest.mark.parametrize(
    ("own", "command", "message"),
    [
        (
            ["--steps", "1010"],
            [*GENERATE[:3], "--steps", 4, "--image-path", "x.png", "--image-strength", 0.9],
            "steps plans 4 steps and the schedule has 1 active of num_inference_steps=4",
        ),
        (["--steps", "1010"], [*GENERATE[:3], "--steps", 5], "steps plans 4 steps and the schedule has 5 active"),
    ],
)
def test_steps_are_checked_before_weights(own, command, message, no_weights):
    result = run("run", *own, "--", *command, "--prompt", "red apple")
    assert result.code == 2
    assert result.err.startswith("mlx-teacache-fast run: error: ")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--threshold", "0.3"], "no coefficients are known for FIBO: rel_l1_thresh wants some of yours beside it, "),
        (["--cache", "residual"], 'cache="residual" is not for FIBO, whose blocks cannot be left out alone: '),
    ],
)
def test_a_policy_that_is_not_for_the_model_is_refused_before_weights(own, message, monkeypatch):
    pipeline = COMMANDS["mflux-generate-fibo"].pipeline
    weights = functools.wraps(pipeline.__init__)(lambda *_, **__: pytest.fail("weights would be loaded"))
    monkeypatch.setattr(pipeline, "__init__", weights)
    result = run("run", *own, "--", "mflux-generate-fibo", "--prompt", "{}", "--steps", 30)
    assert result.code == 2
    assert result.err.startswith(f"mlx-teacache-fast run: error: {message}")


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        (["mflux-generate-ideogram4", "--preset", "V4_TURBO_12"], 12),
        (["mflux-generate-qwen-2.1-edit", "--image-paths", "PHOTO", "--steps", 20, "--strength", 0.5], 10),
    ],
    ids=lambda value: str(value),
)
def test_steps_that_another_option_says(command, steps, monkeypatch, photo):
    """The command's own --steps does not count, or not alone: the generation checks."""
    if command[0] not in COMMANDS:
        pytest.skip("not in this mflux")

    def made(*_, **__):
        raise RuntimeError("weights would be loaded")

    monkeypatch.setattr(COMMANDS[command[0]].pipeline, "__init__", made)
    given = [photo if argument == "PHOTO" else argument for argument in command]
    result = run("run", "--steps", "1" + "0" * (steps - 1), "--", *given, "--prompt", "red apple")
    assert result.err.endswith("\nRuntimeError: weights would be loaded\n")


def test_every_pipeline_that_a_command_makes_is_gated(weights):
    handles, policy = [], Policy.of(rel_l1_thresh=0.3)
    with commands.gating(lambda flux: handles.append(mlx_teacache_fast.apply(flux, policy)), policy):
        pipelines = [Flux2Klein(model_config=ModelConfig.flux2_klein_base_4b()) for _ in range(2)]
    assert [hook.hook_of(flux).handle for flux in pipelines] == handles
    assert hook.hook_of(Flux2Klein(model_config=ModelConfig.flux2_klein_base_4b())) is None
    for handle in handles:
        handle.restore()


def test_the_command_sees_its_own_name(monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "find", lambda name: lambda: seen.append(list(sys.argv)))
    assert run("run", "--threshold", 0.3, "--", "mflux-generate", "--prompt", "--", "-x").code == 0
    assert seen == [["mflux-generate", "--prompt", "--", "-x"]]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_mflux_s(name):
    result = run("run", "--", name, "--help")
    out = io.StringIO()
    with commands.called_as([name, "--help"]), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        commands.find(name)()
    assert stop.value.code == 0
    assert result == Result(0, out.getvalue(), "")
    assert result.out.startswith(f"usage: {name} [-h]")


@newest
def test_commands_are_all_of_mflux_s_generating_commands():
    made = {name for name in commands.scripts() if re.match("mflux-(generate|concept|upscale-controlnet)", name)}
    distilled = {f"mflux-generate-{name}" for name in ("boogu", "fibo2-edit", "lens", "ming", "z-image-controlnet")}
    assert made - set(COMMANDS) == {"mflux-concept", "mflux-concept-from-image"} | distilled
    assert set(COMMANDS) <= made


def test_the_commands_of_a_fork_under_another_name(tmp_path, monkeypatch):
    about = tmp_path / "fork-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: fork\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[console_scripts]\nmflux-generate-fork = mflux.fork:main\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert commands.scripts()["mflux-generate-fork"].value == "mflux.fork:main"


def test_each_command_makes_its_pipeline():
    for name, command in COMMANDS.items():
        module = importlib.import_module(commands.scripts()[name].module)
        assert command.pipeline in vars(module).values(), name


# ---- What is refused, before weights are loaded

REASON = "it returns attention maps beside the image, which a step whose blocks are skipped does not have"
ALL = ", ".join(COMMANDS)
NO_COMMAND = (
    'no mflux command: it goes after "--", as in mlx-teacache-fast run -- mflux-generate-flux2 --prompt "a red apple"'
)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], NO_COMMAND),
        (["--"], NO_COMMAND),
        (["mflux-generate-flux2", "--prompt", "x"], NO_COMMAND),
        (["--threshold", "0.3", *GENERATE], NO_COMMAND),
        (["--", "mflux-concept", "--prompt", "x"], f"mflux-concept cannot be gated: {REASON}"),
        (["--", "mflux-concept-from-image"], f"mflux-concept-from-image cannot be gated: {REASON}"),
        (
            ["--", "mflux-generate-lens", "--prompt", "x"],
            "mflux-generate-lens cannot be gated: its model is distilled to a few steps, of which none can be skipped",
        ),
        (
            ["--", "mflux-upscale-seedvr2", "--prompt", "x"],
            f"mflux-upscale-seedvr2 cannot be gated: those that can be are {ALL}",
        ),
        (
            ["--", "mflux-genrate-kontext"],
            "mflux has no command 'mflux-genrate-kontext'; did you mean mflux-generate-kontext or "
            "mflux-generate-in-context or mflux-generate-controlnet?",
        ),
        (["--", "my/own.py"], "there is no file my/own.py"),
        (["--", "convert"], f"mflux has no command 'convert'; those that can be gated are {ALL}"),
        (
            ["--", "/opt/bin/mflux-upscale-controlnet"],
            "mflux has no command '/opt/bin/mflux-upscale-controlnet'; did you mean mflux-upscale-controlnet or "
            "mflux-generate-controlnet?",
        ),
    ],
)
def test_refused(arguments, message):
    assert run("run", *arguments) == Result(2, "", f"mlx-teacache-fast run: error: {message}\n")


@pytest.mark.usefixtures("no_weights")
def test_unknown_model_is_refused_before_its_weights():
    result = run("run", "--", "mflux-generate", "--model", "qwen-image", "--prompt", "x")
    assert result.code == 2
    assert result.out == ""
    head = "mlx-teacache-fast run: error: Flux1 has a model configuration with aliases ['qwen-image', "
    assert result.err.splitlines()[-1].startswith(head)
    assert "Traceback" not in result.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1.5"], "--threshold: rel_l1_thresh must be a number from 0.0 to 1.0, got 1.5"),
        (["--threshold", "nan"], "--threshold: rel_l1_thresh must be a number from 0.0 to 1.0, got nan"),
        (["--threshold", "much"], "--threshold: rel_l1_thresh must be a number from 0.0 to 1.0, got 'much'"),
        (["--coefficients", "1", "2"], "--coefficients: expected 5 arguments"),
        (["--skip-first", "-1"], "--skip-first: skip_first_n_steps must be a whole number of steps, 0 or more, got -1"),
        (["--skip-last", "x"], "--skip-last: skip_last_n_steps must be a whole number of steps, 0 or more, got 'x'"),
        (
            ["--max-consecutive-skips", "1.5"],
            "--max-consecutive-skips: max_consecutive_skips must be a whole number of steps, 0 or more, got '1.5'",
        ),
        (["--max-skips", "-2"], "--max-skips: max_skips must be a whole number of steps, 0 or more, got -2"),
        (["--budget", "0"], "--budget: budget must be a share of the steps above 0.0 and up to 1.0, got 0.0"),
        (["--forecast", "3"], "--forecast: forecast must be an order from 0 (reuse) to 2, got 3"),
        (["--steps", "1120"], "--steps: steps must be a 1 or 0 for each active step, such as \"1101\", got '1120'"),
        (
            ["--steps", "011"],
            "--steps: steps must begin with a computed step (1), got '011': there is nothing to reuse",
        ),
    ],
)
def test_bad_values(arguments, message):
    result = run("run", *arguments, "--", *GENERATE)
    message = f"argument {message} (see mlx-teacache-fast run --help)"
    assert result == Result(2, "", f"mlx-teacache-fast run: error: {message}\n")


@pytest.mark.usefixtures("no_weights")
def test_options_are_not_abbreviated():
    result = run("run", "--thresh", "0.3", "--", *GENERATE)
    assert result.code == 2
    assert "unrecognized arguments: --thresh" in result.err


@pytest.mark.usefixtures("no_weights")
def test_trace_that_cannot_be_written(tmp_path):
    (tmp_path / "old.json").write_text("mine")
    for name, message in {
        "old.json": f"{tmp_path}/old.json exists; --force overwrites it",
        "none/new.json": f"cannot write {tmp_path}/none/new.json: there is no folder {tmp_path}/none",
        "": f"cannot write {tmp_path}: it is a folder",
    }.items():
        result = run("run", "--trace", tmp_path / name, "--", *GENERATE)
        assert result == Result(2, "", f"mlx-teacache-fast run: error: {message}\n")
    assert (tmp_path / "old.json").read_text() == "mine"


def test_force_overwrites_the_trace(tmp_path, weights):
    (tmp_path / "old.json").write_text("mine")
    output = tmp_path / "x.png"
    own = ["--trace", tmp_path / "old.json", "--force"]
    result = run("run", *own, "--", *GENERATE, *SMALL, "--steps", 4, "--output", output)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "old.json").read_text())["variant_id"] == "flux2-klein-base-4b"


def test_only_this_package_s_warnings_are_put_in_one_line(monkeypatch):
    def warn():
        warnings.warn("ours\n  in two lines", mlx_teacache_fast.TeaCacheWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)

    monkeypatch.setattr(commands, "find", lambda name: warn)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        result = run("run", "--", "mflux-generate")
    assert result == Result(0, "", "mlx-teacache-fast: warning: ours in two lines\n")
    assert [str(w.message) for w in shown] == ["theirs"]


# ---- Exit codes


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("arguments", [["--nonsense"], ["--model", "flux2-klein-4b", "--guidance", "4"]])
def test_mflux_s_parser_refuses(arguments):
    result = run("run", "--", "mflux-generate-flux2", "--prompt", "x", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert "\nmflux-generate-flux2: error: " in result.err
    assert "mlx-teacache-fast" not in result.err


def test_a_script_of_the_users(tmp_path, weights, monkeypatch):
    """Whatever pipeline it makes is gated; its options are its own. Where it goes to, the trace does not."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "mine.py"
    script.write_text(
        "import os, sys, beside\n"
        "os.chdir('..')\n"
        "from mflux.models.common.config.model_config import ModelConfig\n"
        "from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein\n"
        "prompt, steps = sys.argv[1:]\n"
        "flux = Flux2Klein(model_config=ModelConfig.flux2_klein_base_4b())\n"
        "flux.generate_image(1, prompt, num_inference_steps=int(steps), height=64, width=64)\n"
        "print('done', __name__)\n"
    )
    (tmp_path / "beside.py").write_text("")
    result = run("run", "--budget", 0.5, "--trace", "trace.json", "--", script, "red apple", 10)
    assert result.code == 0, result.err
    assert Trace.from_json(tmp_path / "trace.json").generations[0].skipped == 5
    assert "done __main__" in result.out
    assert "10: 5 computed, 0 forced, 5 skipped" in result.out
    assert "generate_image" not in vars(weights[0])


def test_no_step_to_gate(tmp_path, weights):
    command = [*GENERATE, *SMALL, "--steps", 2, "--output", tmp_path / "x.png"]
    result = run("run", "--threshold", 0.2, "--", *command)
    assert result.code == 0
    assert "warning: no possible skip: skip_first_n_steps=1 and skip_last_n_steps=1 leave 0 eligible of" in result.err
    assert "2: 0 computed, 2 forced, 0 skipped" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_mflux_s_own_error_is_shown_as_mflux_s(monkeypatch):
    def fail(**_):
        raise RuntimeError("what mflux says")

    monkeypatch.setattr(Flux2Initializer, "init", fail)
    result = run("run", "--", *GENERATE)
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("Traceback (most recent call last):\n")
    assert result.err.endswith("\nRuntimeError: what mflux says\n")


class HubError(Exception):
    """As of a package that downloads."""

    __module__ = "huggingface_hub.errors"


@pytest.mark.parametrize("kind", [FileNotFoundError, HubError])
@pytest.mark.parametrize("inside", [False, True])
def test_missing_weights(monkeypatch, kind, inside):
    def missing(**_):
        try:
            raise kind("no such\nfile")
        except kind:
            if inside:
                raise ValueError("no such\nfile") from None  # which keeps it as its context
            raise

    monkeypatch.setattr(Flux2Initializer, "init", missing)
    name = "black-forest-labs/FLUX.2-klein-base-4B"
    result = run("run", "--", *GENERATE)
    lines = [
        f"mlx-teacache-fast run: error: the weights of {name} are not there: no such file",
        f"mlx-teacache-fast run: error: mflux downloads {name} at the first use; if its owner asks for consent, give "
        'it on the model\'s page, and log in with "hf auth login". --verbose says more',
    ]
    assert (result.code, result.out, result.err.splitlines()) == (1, "", lines)
    told = run("run", "--verbose", "--", *GENERATE)
    assert told.code == 1
    assert told.err.startswith("Traceback (most recent call last):\n")
    assert told.err.splitlines()[-2:] == lines
    named = ["mflux-generate-flux2", "--model", "me/flux2-klein-4b-mine", "--prompt", "x"]
    assert "the weights of me/flux2-klein-4b-mine are not there" in run("run", "--", *named).err


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (7, 7)])
def test_what_the_command_returns(monkeypatch, status, code):
    monkeypatch.setattr(commands, "find", lambda name: lambda: status)
    assert run("run", "--", "mflux-generate") == Result(code, "", "")


def test_what_the_command_exits_with(monkeypatch):
    def stop():
        raise SystemExit(9)

    monkeypatch.setattr(commands, "find", lambda name: stop)
    assert run("run", "--", "mflux-generate") == Result(9, "", "")


def test_interrupted_outside_of_the_steps(monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Flux2Initializer, "init", interrupt)
    assert run("run", "--", *GENERATE) == Result(130, "", "mlx-teacache-fast run: error: interrupted\n")


def test_finished_pictures_are_summed_up_after_an_error(tmp_path, weights, monkeypatch):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("red apple")

    class Remover:  # the prompt's file is read again for the second picture
        def call_after_loop(self, **_):
            prompt.unlink()

    init = Flux2Initializer.init

    def with_remover(model, **kwargs):
        init(model, **kwargs)
        model.callbacks.register(Remover())

    monkeypatch.setattr(Flux2Initializer, "init", with_remover)
    command = ["mflux-generate-flux2", "--model", "flux2-klein-base-4b", "--prompt-file", prompt, *SMALL]
    output = tmp_path / "x.png"
    result = run("run", "--", *command, "--steps", 4, "--seed", 1, 2, "--output", output)
    assert result.code == 0  # mflux prints this error, and no more
    assert f"flux2-klein-base-4b, {Policy()}\ngenerations     1\n" in result.out
    assert (tmp_path / "x_seed_1.png").exists()
    assert not (tmp_path / "x_seed_2.png").exists()


INTERRUPTED = """
from mflux.models.flux2.flux2_initializer import Flux2Initializer

import test_cli_run
from mlx_teacache_fast.cli import main


class Interrupter:
    def call_in_loop(self, t, seed, **_):
        if (t, seed) == (3, 2):
            signal.raise_signal(signal.SIGINT)


class Patch:
    setattr = staticmethod(setattr)


test_cli_run.weights.__wrapped__(Patch)  # never undone: the process is for this only
init = Flux2Initializer.init


def with_interrupter(model, **kwargs):
    init(model, **kwargs)
    model.callbacks.register(Interrupter())


Flux2Initializer.init = with_interrupter
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_step(tmp_path):
    """mflux stops, says so, and ends with 0. The signal comes in the second of two pictures."""
    command = [sys.executable, "-c", LISTEN + INTERRUPTED, "run", "--", *GENERATE, *SMALL]
    command += ["--steps", "6", "--seed", "1", "2", "--output", str(tmp_path / "x.png")]

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Stopping image generation at step 4/6\n" in result.stdout
    head = f"flux2-klein-base-4b, {Policy()}"
    assert f"{head}\ngenerations     1\nsteps           6: " in result.stdout
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x_seed_1.png"]


def test_ctrl_c_is_a_scripts_own(tmp_path):
    """It may go on after it, as often as it comes; and it ends a script that does not take it."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import signal\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        print('goes on')\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    main = f"{LISTEN}\nsys.argv[0] = 'mlx-teacache-fast'\nfrom mlx_teacache_fast.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", main, "run", "--", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout == 3 * "goes on\n"
    assert result.stderr.splitlines()[-1] == "mlx-teacache-fast run: error: interrupted"
    assert result.returncode == 130


# ---- info


def lines_of(text):
    return [(line[:14].strip(), line[14:]) for line in text.splitlines()]


def test_info_of_a_base_model():
    result = run("info", "flux2-klein-base-4b")
    assert result.code == 0, result.err
    assert lines_of(result.out) == [
        ("model", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("variant", "flux2-klein-base-4b (FLUX.2 klein base 4B)"),
        ("calibrated", "yes"),
        ("threshold", "0.17"),
        ("coefficients", "https://github.com/IonDen/mlx-teacache/blob/main/scripts/calibrate_flux2.py"),
        ("", "fitted on 10 prompts, 25 steps, 512x512, guidance 1, base-4b; R^2 0.106"),
        ("range", "0.0283 to 0.2198"),
        ("published", "8 of 50 steps skipped at threshold 0.17, guidance 4; bound 1.19x"),
        ("", "https://github.com/IonDen/mlx-teacache#benchmarks"),
        ("plans", "https://arxiv.org/abs/2511.00090"),
        ("helps", "at 50 steps, mflux's default: yes"),
        ("", "skips are published for it"),
    ]


@pytest.mark.parametrize(
    ("arguments", "variant", "calibrated", "helps"),
    [
        (["dev"], "flux1-dev", "yes", "at 25 steps, mflux's default: yes"),
        (["black-forest-labs/FLUX.1-dev"], "flux1-dev", "yes", "at 25 steps, mflux's default: yes"),
        (["krea-dev"], "flux1-krea-dev", "yes", "at 25 steps, mflux's default: perhaps"),
        (["dev-krea", "--steps", 28], "flux1-krea-dev", "yes", "at 28 steps: yes"),
        (["dev-fill"], "flux1-dev", "no: with the coefficients of flux1-dev", "at 25 steps, mflux's default: perhaps"),
        (
            ["me/x", "--base-model", "krea-dev"],
            "flux1-krea-dev",
            "no: with the",
            "at 25 steps, mflux's default: perhaps",
        ),
        (["me/flux2-klein-base-9b-8bit"], "flux2-klein-base-9b", "no: with the", ": perhaps"),
        (
            ["flux2-klein-base-9b"],
            "flux2-klein-base-9b",
            "yes, with coefficients fitted on flux2-klein-base-4b",
            "at 50 steps, mflux's default: yes",
        ),
        (["flux2-klein-4b"], "flux2-klein-4b", "yes", "at 4 steps, mflux's default: no"),
        (["klein-9b-kv"], "flux2-klein-9b", "no: with the", "at 4 steps, mflux's default: no"),
        (["schnell", "--steps", 25], "flux1-schnell", "yes", "at 25 steps: no"),
        (["dev", "--steps", 6], "flux1-dev", "yes", "at 6 steps: perhaps"),
        (["dev", "--steps", 5], "flux1-dev", "yes", "at 5 steps: no"),
        (["dev", "--steps", 3], "flux1-dev", "yes", "at 3 steps: no"),
        (["dev", "--steps", 1], "flux1-dev", "yes", "at 1 steps: no"),
    ],
)
def test_info(arguments, variant, calibrated, helps):
    result = run("info", *arguments)
    assert result.code == 0, result.err
    lines = dict(lines_of(result.out))
    assert lines["variant"].startswith(f"{variant} (")
    assert lines["calibrated"].startswith(calibrated)
    assert lines["helps"].endswith(helps)
    assert max(map(len, result.out.splitlines())) <= 120


def test_info_says_which_model_a_name_is_taken_for():
    lines = dict(lines_of(run("info", "me/flux2-klein-base-9b-8bit").out))
    assert lines["taken for"] == "a checkpoint made from black-forest-labs/FLUX.2-klein-base-9B"
    assert lines["published"].startswith("of flux2-klein-base-9b: 13 of 50 steps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["flux2-klien-base-4b"],
            "mflux knows no model 'flux2-klien-base-4b'; did you mean flux2-klein-base-4b or ",
        ),
        (["xyzzy"], "mflux knows no model 'xyzzy'; those that can be gated are dev, schnell, krea-dev, "),
        (["me/x", "--base-model", "krea-def"], "mflux knows no model 'krea-def'; did you mean krea-dev"),
        (["seedvr2-3b"], "seedvr2-3b is none of the models that can be gated: dev, schnell, "),
        (["--steps", "5"], "--steps and --base-model are about one model: name it"),
        (["dev", "--steps", "0"], "argument --steps: must be a whole number from 1 to 10000, got 0"),
    ],
)
def test_info_of_what_is_not_known(arguments, message):
    result = run("info", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith(f"mlx-teacache-fast info: error: {message}")
    assert result.err.count("\n") == 1


def test_info_of_all():
    result = run("info")
    assert result.code == 0, result.err
    assert str(mlx_teacache_fast.supported()) in result.out
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line}
    for variant in VARIANTS.values():
        assert rows[variant.variant_id][1] == ("none" if variant.fit is None else f"{variant.rel_l1_thresh:g}")
    assert re.search(r"flux1-dev +0.2 +any +6 of 25 at 0.2, 11 of 25 at 0.25\n", result.out)


def test_published_skips_are_at_the_default_threshold_once():
    for variant in (variant for variant in VARIANTS.values() if variant.fit is not None):
        defaults = [p for p in variant.published if p.rel_l1_thresh == variant.rel_l1_thresh]
        assert len(defaults) == (variant.variant_id != "flux1-schnell"), variant.variant_id
        assert all(isinstance(p, models.Published) and 0 <= p.skipped < p.steps for p in variant.published)
        assert not variant.distilled or all(p.skipped == 0 for p in variant.published)


# ---- Help

SETTINGS = settings(*RULES, Policy)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "run",
            "--policy --like --trace --force bound rel-L1 130 " + " ".join(flag(setting) for setting in SETTINGS),
        ),
        ("info", "--base-model --steps calibrated threshold range published helps MODEL"),
    ],
)
def test_help(command, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = run(command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: mlx-teacache-fast {command} ")
    assert [word for word in words.split() if word not in result.out] == []
    assert max(map(len, result.out.splitlines())) <= 120


def test_run_s_help_names_every_command():
    text = run("run", "--help").out
    assert set(COMMANDS) <= set(re.split(r"[,\s]+", text))
    assert run("run", "-h").out == text


def test_run_s_defaults_are_apply_s(monkeypatch):
    """Options that are not given are left to the policy, and the help says what it has then."""
    seen = []
    monkeypatch.setattr(commands, "find", lambda name: lambda: 0)
    monkeypatch.setattr(commands, "gating", lambda gate, policy, **_: contextlib.nullcontext(seen.append(policy)))
    assert run("run", "--", "mflux-generate").code == 0
    assert seen == [Policy()]
    words = " ".join(run("run", "--help").out.split())
    for setting in SETTINGS:
        says = setting.metadata["says"]
        assert " ".join(says.split()) in words
        if type(setting.default) in (int, str):
            assert says.endswith(f"(default: {setting.default})")


def test_as_a_module():
    result = subprocess.run([*COMMAND, "run", "--", "mflux-fly"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("mlx-teacache-fast run: error: mflux has no command 'mflux-fly'; ")


# ---- The table in the documentation


def pipelines_table():
    """The families."""
    rows = [("mflux's class", "commands", "models", "with coefficients", "refused why"), ("---",) * 5]
    for family in FAMILIES:
        for pipeline in family.pipelines:
            names = [f"`{name}`" for name, command in family.commands.items() if command.pipeline is pipeline]
            known = {alias: match(SimpleNamespace(aliases=[alias]), pipeline) for alias in family.models}
            is_first = pipeline is family.pipelines[0]  # the others run the same models
            plain = [alias for alias, found in known.items() if is_first and not found.calibrated]
            fitted = [(alias, found.variant) for alias, found in known.items() if found.calibrated]
            calibrated = [alias + (f" (fitted on {v.fitted_on})" if v.fitted_on else "") for alias, v in fitted]
            rows.append((f"`{pipeline.__name__}`", *map(", ".join, (names, plain, calibrated)), ""))
    rows += [(f"`{pipeline.__name__}`", "", "", "", why) for pipeline, why in REFUSED.items()]
    return "".join("| {} | {} | {} | {} | {} |\n".format(*row) for row in rows)


@newest
def test_the_documentation_has_the_table_of_families():
    text = Path(__file__).parents[1].joinpath("docs", "families.md").read_text(encoding="utf-8")
    assert text.split("<!-- pipelines -->\n")[1].split("<!-- /pipelines -->")[0] == pipelines_table()
