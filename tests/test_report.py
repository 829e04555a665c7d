"""``report``: every check runs, each that decides can fail, none ends another, and the files do not say whose machine
it is."""

import getpass
import itertools
import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from test_cli import Result, run

pytest.importorskip("mflux", reason="report needs mflux")

from mlx_teacache_fast import apply, demo, errors, ops
from mlx_teacache_fast.cli import checks, report, shared
from mlx_teacache_fast.cli.checks import Settings, WrongError
from mlx_teacache_fast.distributed import installed
from mlx_teacache_fast.errors import TeaCacheValueError
from mlx_teacache_fast.mflux import names, pictures

QUICK = Settings("cpu", quick=True)
OF_A_GPU = [name for name, check in checks.CHECKS.items() if check.needs_gpu]
RUN_HERE = ["demo_is_mfluxs", "step_time"]  # not by a real run: in a process of its own each imports mflux again
ON_CPU = [name for name in checks.CHECKS if name not in (*OF_A_GPU, *RUN_HERE, "real_model")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A real run on the CPU."""
    folder = tmp_path_factory.mktemp("report")
    chosen = [*ON_CPU, *OF_A_GPU, "real_model"]
    return run("report", "--quick", "--device", "cpu", "--checks", *chosen, "--output", folder / "mine.json"), folder


def test_a_run(finished: tuple[Result, Path]) -> None:
    result, folder = finished
    assert result.code == 0, result.out + result.err
    assert sorted(path.name for path in folder.iterdir()) == ["mine.json", "mine.md"]
    data = json.loads((folder / "mine.json").read_text())
    results = {check["name"]: check["result"] for check in data["checks"]}
    assert results == dict.fromkeys(ON_CPU, "passed") | dict.fromkeys([*OF_A_GPU, "real_model"], "not possible here")
    assert all(check["rows"] and check["why"] is None for check in data["checks"] if check["name"] in ON_CPU)
    assert all(check["why"] for check in data["checks"] if check["name"] not in ON_CPU)
    (rows,) = (check["rows"] for check in data["checks"] if check["name"] == "demo_by_each_rule")
    rules = {row["rule"]: row["computed steps"] for row in rows}
    assert rules["mflux"] == 50
    assert rules["budget"] == 20
    assert rules["steps"] == 23
    assert data["machine"]["mlx"] == mx.__version__
    assert re.fullmatch(r"mlx_[\d.]+/_ext\..*so", data["machine"]["extension"])
    assert result.out.count("\npassed ") + result.out.startswith("passed ") == len(ON_CPU)


def test_the_page_has_it_too(finished: tuple[Result, Path]) -> None:
    page = (finished[1] / "mine.md").read_text()
    for name in ON_CPU:
        title = checks.CHECKS[name].title
        assert f"| {title} | passed |" in page
        assert f"\n## {title[0].upper()}{title[1:]}\n" in page
    for name in OF_A_GPU:
        assert f"| {checks.CHECKS[name].title} | not possible here | 0 | it is about a GPU" in page


def test_nothing_personal(finished: tuple[Result, Path]) -> None:
    for path in finished[1].iterdir():
        text = path.read_text()
        assert not re.search(r"(?<!\w)/(home|root|Users|tmp|usr|work|private|var|opt)\b", text)
        for own in (getpass.getuser(), platform.node()):
            assert not re.search(rf"\b{re.escape(own)}\b", text)


@pytest.mark.parametrize("name", RUN_HERE + OF_A_GPU)
@pytest.mark.filterwarnings("ignore::mlx_teacache_fast.DisabledWarning")
def test_a_check_by_itself_where_the_cpu_stands_in_for_a_gpu(name: str) -> None:
    assert list(checks.CHECKS[name].run(QUICK))


def test_what_fails_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_TEACACHE_FAST_NUM_THREADS", "none")  # which the gate refuses
    monkeypatch.chdir(tmp_path)
    Path("random.py").write_text("raise SystemExit('not the standard library')")
    chosen = ["gates_in_flight", "branch_taken_and_skipped"]
    result = run("report", "--quick", "--device", "cpu", "--checks", *chosen, "--output", tmp_path / "report.json")
    assert result.code == 1
    failed, passed = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert (failed["result"], passed["result"]) == ("failed", "passed")
    assert failed["why"].startswith("ValueError: ")
    assert "MLX_TEACACHE_FAST_NUM_THREADS" in failed["why"]
    assert f"| {failed['title']} | failed | " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("program", "limit", "why"),
    [
        ("import os; os.abort()", 60, "its process ended with exit code -6"),
        ("import time; time.sleep(60)", 1, "it did not end within 1 s"),
        ("import sys; sys.exit('a\\nno kernel')", 60, "its process ended with exit code 1: no kernel"),
        (f"import os; print({checks.RECORD!r} + '{{\"b', flush=True, end=''); os._exit(0)", 60, "with exit code 0"),
    ],
)
def test_a_process_that_crashes_or_hangs(program: str, limit: float, why: str) -> None:
    before = f"print({checks.RECORD!r} + '{{\"a\": 1}}', flush=True); "
    result, said, rows = report.outcome([sys.executable, "-c", before + program], limit)
    assert (result, rows) == ("failed", [{"a": 1}])
    assert said is not None
    assert said.endswith(why)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("no /Volumes/Jane Doe/models/a", "no ..."),
        ("no '/Volumes/Jane's Disk/hub/a'", "no '..."),
        ("no /mnt/Müller Bilder/a/b", "no ..."),
        ("no (/data/jane,doe/x/y)", "no (..."),
        ("no ~/jane, no ~jane/x", "no ..."),
        ("no ~jane/x", "no ..."),
        ("/jane-secret", "..."),
        ("no b:/data/jane/x", "no b:..."),
        ("no https://example.org/jane/my-finetune", "no https:..."),
        ("no jane/my-finetune in models--jane--my-finetune", "no ... in models--...--..."),
        ("3 of 4 kernels/s and/or input/output", "3 of 4 kernels/s and/or input/output"),
    ],
)
def test_paths_and_names(said: str, left: str) -> None:
    own = report.own_names("jane/my-finetune")
    assert report.anonymous(f"of {getpass.getuser()} on {platform.node()}: {said}", own) == f"of ... on ...: {left}"


def test_a_user_without_name_or_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 501")

    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.setattr(platform, "node", lambda: "janes-mac.local")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert report.own_names("") == ["janes-mac.local", "janes-mac"]


def test_a_fork_in_the_place_of_mflux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "version", lambda name: version("no-mflux" if name == "mflux" else name))
    assert report.machine(QUICK)["mflux"] == "not installed"
    assert installed()["mflux"] is None
    assert installed()["mlx"] == version("mlx")


# ---- Each check can fail


def test_a_gate_with_another_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ops.gate
    monkeypatch.setattr(ops, "gate", lambda **given: gate(**given | {"threshold": 0.1}))
    for check in (checks.gate_values, checks.gate_decisions):
        with pytest.raises(WrongError):
            list(check(QUICK))


def test_a_gate_that_is_off_by_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ops.gate
    monkeypatch.setattr(ops, "gate", lambda **given: gate(**given | {"eps": 1e-3}))
    with pytest.raises(WrongError, match="values are off by"):
        list(checks.gate_values(QUICK))


def test_a_branch_that_computes_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "branch", lambda skip, on_skip, body, inputs: body(inputs))
    for check in (checks.branch_taken_and_skipped, checks.branch_between_streams):
        with pytest.raises(WrongError):
            list(check(QUICK))


def test_a_gate_that_others_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, calls = ops.gate, itertools.count()

    def disturbed(**given: Any) -> list[Any]:
        *most, state = gate(**given)
        return [*most, state + (next(calls) == 100)]

    monkeypatch.setattr(ops, "gate", disturbed)
    with pytest.raises(WrongError, match="must give what each gives alone"):
        list(checks.gates_in_flight(QUICK))


@pytest.mark.parametrize("name", ["branch_far_reader", "branch_large_body"])
def test_a_branch_that_is_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "branch", lambda skip, on_skip, body, inputs: [x + 1.0 for x in on_skip])
    with pytest.raises(WrongError):
        list(checks.CHECKS[name].run(QUICK))


def test_pictures_that_are_not_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    generate, darker = pictures.generate, itertools.cycle((0, 4))
    monkeypatch.setattr(pictures, "generate", lambda *given: generate(*given) // 2 + next(darker))
    with pytest.raises(WrongError, match="tolerance: the GPU's picture must be the CPU's"):
        list(checks.demo_is_the_cpus(QUICK))


def test_a_real_model_of_which_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault: what a tolerance skips of it nobody knows."""
    monkeypatch.setattr(names, "load", lambda name, quantize: demo.pipeline())
    monkeypatch.setattr(checks, "apply", lambda flux, **how: apply(flux, tolerance=1e-9))
    _, row = checks.real_model(Settings("cpu", quick=True, model="dev"))
    assert (row["rule"], row["computed steps"], row["PSNR, dB"]) == ("tolerance", 8, "identical")


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setenv(checks.DISPATCHES, "2")
    rows = [(row, checks.os.environ[checks.DISPATCHES]) for row in checks._dispatches(Settings("gpu"))]
    name = "dispatches asked for"
    assert rows == [({name: "1 where the system allows"}, "1"), ({name: "2"}, "2")]
    monkeypatch.delenv(checks.DISPATCHES)
    list(checks._dispatches(Settings("gpu")))
    assert checks.DISPATCHES not in checks.os.environ


def test_pictures_that_are_not_mfluxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.WAYS, "threshold 0", {"steps": "1" * 10 + "01"})
    with pytest.raises(WrongError, match=r"to the bit: threshold 0, guidance 4, "):
        list(checks.demo_is_mfluxs(QUICK))
    monkeypatch.setitem(checks.RULES, "steps", {"steps": "1" * 50})
    with pytest.raises(WrongError, match="steps: some steps must be skipped"):
        list(checks.demo_by_each_rule(QUICK))


# ---- What is refused


@pytest.mark.parametrize("name", ["report.json", "report.md"])
def test_an_existing_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    result = run("report", "--output", tmp_path / "report.json")
    message = f"{tmp_path / name} exists; --force overwrites it"
    assert result == Result(2, "", f"mlx-teacache-fast report: error: {message}\n")
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "report.md"], "report.md is to be the page beside the JSON: give the JSON another name"),
        (["--model", "flux2-klein-base-9b"], "the weights of flux2-klein-base-9b are not in Hugging Face's cache"),
        (["--model", "flux2-klein-base-4c"], "mflux knows no model 'flux2-klein-base-4c'; did you mean"),
        (["--checks", "gate"], "argument --checks: invalid choice: 'gate'"),
        (["--quantize", "7"], "argument --quantize/-q: invalid choice: 7 (choose from "),
        (["-q", "-1"], "argument --quantize/-q: invalid choice: -1 (choose from "),
        (["--output", "."], "--output must be the path of a file, got '.'"),
        (["--output", ""], "--output must be the path of a file, got '.'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = run("report", *arguments)
    assert result.code == 2
    assert result.err.startswith(f"mlx-teacache-fast report: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_quantize_takes_what_mflux_takes() -> None:
    from mflux.cli.defaults.defaults import QUANTIZE_CHOICES

    assert set(shared.QUANTIZE["choices"]) == set(QUANTIZE_CHOICES)


def test_a_model_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found there, and taken if it fits."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--black-forest-labs--FLUX.2-klein-base-4B" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    weights = snapshot / "a.safetensors"
    weights.write_bytes(b"no weights")
    (snapshot / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    arguments = report_arguments("--device", "gpu")
    assert report._model(arguments) == ("flux2-klein-base-4b", None)
    with weights.open("r+b") as file:
        file.truncate(1 << 43)  # no blocks of it are on the disk
    name, why = report._model(arguments)
    assert name is None
    assert why is not None
    assert why.startswith("flux2-klein-base-4b needs about 10997 GB")
    asked = []
    monkeypatch.setattr(mx, "device_info", lambda device: asked.append(device) or {"total_memory": 2e13})  # as of CUDA
    assert report._model(arguments) == ("flux2-klein-base-4b", None)
    assert asked == [mx.gpu]
    with pytest.raises(TeaCacheValueError, match="the weights of dev are not in"):
        report._model(report_arguments("--model", "dev"))


def test_a_model_of_ones_own_that_is_not_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--jane--my-flux2-klein-base-4b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").write_bytes(b"no weights")
    output = tmp_path / "mine.json"
    chosen = ["--device", "cpu", "--quick", "--checks", "real_model", "--model", "jane/my-flux2-klein-base-4b"]
    assert run("report", *chosen, "--output", output).code == 0
    data = json.loads(output.read_text())
    assert data["settings"]["model"] == "a model of your own"
    (check,) = data["checks"]
    assert (check["result"], check["rows"]) == ("not possible here", [])
    assert check["why"].startswith("... is not all in the cache: ")
    for path in (output, output.with_suffix(".md")):
        assert not re.search(f"jane|my-flux2|{re.escape(str(tmp_path))}", path.read_text())


def report_arguments(*given: str):
    from mlx_teacache_fast import cli

    arguments = cli._parser().parse_args(["report"])
    for option, value in zip(given[::2], given[1::2], strict=True):
        setattr(arguments, option.removeprefix("--"), value)
    return arguments


def test_help() -> None:
    result = run("report", "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    for word in ("--device", "--output", "--force", "--model", "--quantize", "--quick", "--checks", *checks.CHECKS):
        assert word in text
    assert "(default: report.json)" in text
