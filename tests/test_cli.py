"""The command line: what it prints, writes and refuses, and its exit codes."""

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

pytest.importorskip("mflux", reason="the demo needs mflux")

from PIL import Image

import mlx_teacache_fast
from mlx_teacache_fast import cli, demo, errors, files, ops
from mlx_teacache_fast.demo import compare as compare_module
from mlx_teacache_fast.demo import report
from mlx_teacache_fast.errors import how_to_install
from mlx_teacache_fast.models import TINY_KLEIN

COMMAND = [sys.executable, "-m", "mlx_teacache_fast"]

# A test run in the background of a shell ignores Ctrl-C, and so would its children. (Not by `preexec_fn`: a process
# with threads may hang in it.)
LISTEN = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
QUICK = ["--steps", "14", "--size", "32", "--guidance", "1", "--seed", "3"]  # 4 tokens: a step in milliseconds


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def no_generation(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("generating, although the input is bad")

    monkeypatch.setattr(compare_module, "compare", refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run of two prompts."""
    folder = tmp_path_factory.mktemp("cli") / "new" / "folder"
    return run("demo", "red apple", "cat face", *QUICK, "--threshold", 0.5, "--output", folder), folder


# ---- A run


def test_exit_code_and_files(finished):
    result, folder = finished
    assert result.code == 0, result.err
    assert sorted(path.name for path in folder.iterdir()) == ["images.png", "plot.png"]
    assert Image.open(folder / "plot.png").size == (1200, 645)
    # 3 panels of 8 x 32 pixels, margins, and per prompt a caption and a gap
    assert Image.open(folder / "images.png").size == (832, 92 + 2 * (256 + 26 + 18))


def test_panels_are_what_generate_image_returns(finished):
    _, folder = finished
    pixels = np.asarray(Image.open(folder / "images.png"))
    flux = demo.pipeline()
    settings = {"seed": 3, "num_inference_steps": 14, "height": 32, "width": 32, "guidance": 1.0}
    for i, prompt in enumerate(("red apple", "cat face")):
        plain = np.asarray(flux.generate_image(prompt=prompt, **settings).image)
        with mlx_teacache_fast.apply(flux, rel_l1_thresh=0.5):
            gated = np.asarray(flux.generate_image(prompt=prompt, **settings).image)
        difference = np.minimum(16 * np.abs(plain.astype(int) - gated), 255)
        assert difference.any()
        top = report.HEAD + i * (256 + report.CAPTION + report.GAP)
        for j, expected in enumerate((plain, gated, difference)):
            left = 16 + j * (256 + 16)
            np.testing.assert_array_equal(pixels[top : top + 256 : 8, left : left + 256 : 8], expected)


def test_what_a_run_prints(finished):
    result, folder = finished
    lines = result.out.splitlines()
    assert lines[:5] == [
        "",
        "TinyKlein, a tiny demonstration model: these numbers are not those of FLUX.",
        "14 steps, guidance 1, seed 3, threshold 0.5, 32x32 pixels; an untimed warm-up of each kind went before",
        "",
        "prompt             steps  skipped  plain s  gated s  speedup  bound  PSNR dB    SSIM",
    ]
    rows = [re.split(r"  +", line) for line in (*lines[6:8], lines[9])]
    assert [row[0] for row in rows] == ["red apple", "cat face", "all (sum, median)"]
    for name, steps, skipped, plain, gated, speedup, bound, psnr, ssim in rows:
        n = 28 if name.startswith("all") else 14
        assert int(steps) == n
        assert 0 < int(skipped) < n
        assert float(plain) > 0
        assert float(gated) > 0
        assert float(speedup[:-1]) > 0
        assert bound == f"{n / (n - int(skipped)):.2f}x"
        assert 15 < float(psnr) < 70
        assert 0.3 < float(ssim) < 1
    assert int(rows[2][2]) == int(rows[0][2]) + int(rows[1][2])
    assert lines[-2:] == [f"wrote {folder}/images.png", f"wrote {folder}/plot.png"]


def test_one_progress_bar(finished):
    result, _ = finished
    last = result.err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("100%|")
    assert "step 66/66" in last  # two warm-ups of 5 steps, four pictures of 14
    assert "it/s" not in result.err  # mflux's own bars


def test_threshold_0_warns_once_and_is_identical(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the command shows warnings itself
        result = run("demo", "sun", "rocket", *QUICK, "--threshold", 0, "--output", tmp_path)
    assert result.code == 0, result.err
    message = "mlx-teacache-fast: warning: rel_l1_thresh=0.0 turns gating off: every step computes"
    assert result.err.replace("\r", "\n").splitlines().count(message) == 1
    rows = [line for line in result.out.splitlines() if line.startswith(("sun ", "rocket ", "all "))]
    assert [row.split()[-2:] for row in rows] == [["identical", "1.0000"]] * 3


def test_force_overwrites(tmp_path):
    for name in cli.demo.OUTPUT_NAMES:
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"mine")
    result = run("demo", "sun", "--steps", 3, "--size", 32, "--guidance", 1, "--output", tmp_path, "--force")
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "other", "plot.png"]
    assert Image.open(tmp_path / "images.png").width == 832
    assert Image.open(tmp_path / "plot.png").width == 1200
    assert (tmp_path / "other").read_bytes() == b"mine"


# ---- What is refused, before anything is generated


@pytest.mark.usefixtures("no_generation")
@pytest.mark.parametrize("name", ["images.png", "plot.png"])
def test_existing_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    result = run("demo", "sun", "--output", tmp_path)
    assert result == Result(2, "", f"mlx-teacache-fast demo: error: {tmp_path}/{name} exists; --force overwrites it\n")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"mine")]


@pytest.mark.usefixtures("no_generation")
def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    result = run("demo", "sun", "--output", tmp_path / "file" / "folder")
    message = f"cannot create the folder {tmp_path}/file/folder: Not a directory"
    assert result == Result(1, "", f"mlx-teacache-fast demo: error: {message}\n")


@pytest.mark.usefixtures("no_generation")
def test_unknown_words(tmp_path):
    result = run("demo", "red appel", "xyzzy", "--output", tmp_path / "new")
    message = "the demo model does not know 'appel' (near: apple), 'xyzzy'; --list-words shows prompts that work"
    assert result == Result(2, "", f"mlx-teacache-fast demo: error: {message}\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a whole number from 1 to 10000, got 0"),
        (["--steps", "9" * 5000], f"argument --steps: must be a whole number from 1 to 10000, got {'9' * 200}"),
        (["--steps", "2.5"], "argument --steps: must be a whole number from 1 to 10000, got 2.5"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2**64 - 1, got -1"),
        (["--seed", str(2**64)], f"argument --seed: must be a whole number from 0 to 2**64 - 1, got {2**64}"),
        (["--guidance", "0.9"], "argument --guidance: must be a finite number of at least 1, got 0.9"),
        (["--guidance", "nan"], "argument --guidance: must be a finite number of at least 1, got nan"),
        (["--guidance", "inf"], "argument --guidance: must be a finite number of at least 1, got inf"),
        (["--threshold", "1.1"], "argument --threshold: must be a number from 0 to 1, got 1.1"),
        (["--threshold", "-0.1"], "argument --threshold: must be a number from 0 to 1, got -0.1"),
        (["--threshold", "nan"], "argument --threshold: must be a number from 0 to 1, got nan"),
        (["--threshold", "much"], "argument --threshold: must be a number from 0 to 1, got much"),
        (["--size", "100"], "argument --size: must be a multiple of 16 from 32 to 512, got 100"),
        (["--size", "16"], "argument --size: must be a multiple of 16 from 32 to 512, got 16"),
        (["--size", "528"], "argument --size: must be a multiple of 16 from 32 to 512, got 528"),
    ],
)
def test_bad_values(arguments, message):
    result = run("demo", *arguments)
    assert result == Result(2, "", f"mlx-teacache-fast demo: error: {message} (see mlx-teacache-fast demo --help)\n")


def test_too_many_prompts():
    result = run("demo", *["sun"] * 101)
    assert result == Result(2, "", "mlx-teacache-fast demo: error: at most 100 prompts in one run, got 101\n")


def test_too_few_steps_compute_all_and_warn(tmp_path):
    quick = ["--steps", 2, "--size", 32, "--guidance", 1, "--threshold", 0.2]
    result = run("demo", "sun", *quick, "--output", tmp_path)
    assert result.code == 0
    assert (
        "no possible skip: skip_first_n_steps=1 and skip_last_n_steps=1 leave 0 eligible of active_num_steps=2"
        in result.err
    )
    assert "Traceback" not in result.err


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "mlx_teacache_fast.demo.compare")
    monkeypatch.delitem(sys.modules, "mlx_teacache_fast.demo.report")
    monkeypatch.delattr(demo, "compare")
    monkeypatch.delattr(demo, "report")
    result = run("demo", "sun")
    message = f"the demo needs tqdm, which is not installed: {how_to_install('demo')}"
    assert result == Result(1, "", f"mlx-teacache-fast demo: error: {message}\n")


@pytest.mark.parametrize(
    ("command", "package"),
    [*(("demo", name) for name in ("numpy", "PIL", "skimage", "matplotlib", "tqdm", "mflux")), ("report", "numpy")],
)
def test_each_missing_package_of_the_extra(command, package, tmp_path):
    program = f"import sys; sys.modules[{package!r}] = None; from mlx_teacache_fast.cli import main; sys.exit(main())"
    ran = [sys.executable, "-c", program, command]
    result = subprocess.run(ran, capture_output=True, text=True, check=False, cwd=tmp_path)
    message = f"the demo needs {package}, which is not installed: {how_to_install('demo')}"
    assert result.stderr == f"mlx-teacache-fast {command}: error: {message}\n"
    assert result.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_how_to_install(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert how_to_install("demo") == 'pip install ".[demo]", in a checkout'
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(errors, "version", lambda _: "0.32.2")
    assert how_to_install("mflux") == 'pip install ".[mflux,cuda]", in a checkout'

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(errors, "version", missing)
    assert how_to_install("demo").startswith("uv sync --inexact --extra demo, in a checkout (pip install uv; ")


# ---- What goes wrong on the way


def test_full_disk(tmp_path, monkeypatch):
    def full(_):
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    result = run("demo", "sun", "--steps", 3, "--size", 32, "--guidance", 1, "--output", tmp_path)
    assert result.code == 1
    message = f"cannot write {tmp_path}/images.png: No space left on device; nothing was left half-written"
    assert result.err.splitlines()[-1] == f"mlx-teacache-fast demo: error: {message}"
    assert list(tmp_path.iterdir()) == []
    assert "all (sum, median)" in result.out  # the work's numbers are not lost


def test_ctrl_c(tmp_path):
    # Steps enough to be in the middle of them when the signal comes.
    command = [sys.executable, "-c", f"{LISTEN}\nfrom mlx_teacache_fast.cli import main\nsys.exit(main())"]
    command += ["demo", "sun", "--steps", "5000", "--size", "32", "--guidance", "1", "--output", tmp_path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        head = b""
        while b"sun, plain" not in head:
            chunk = process.stderr.read1()
            assert chunk, head.decode()
            head += chunk
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()  # else the end of the block waits for it
            raise
    assert process.returncode == 130
    assert out == b""
    assert err.decode().splitlines()[-1] == "mlx-teacache-fast demo: error: interrupted"
    assert b"Traceback" not in head + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_stdout_on_a_full_disk(tmp_path):
    # Buffered, as for users: the text is refused when it is flushed, and Python would try again at exit.
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [*COMMAND, "demo", "sun", "--steps", "3", "--size", "32", "--guidance", "1", "--output", tmp_path]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert result.returncode == 1
    last = result.stderr.replace("\r", "\n").splitlines()[-1]
    assert last == "mlx-teacache-fast demo: error: [Errno 28] No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "plot.png"]


# ---- Help


def test_list_words():
    result = run("demo", "--list-words")
    assert result.code == 0
    assert result.err == ""
    assert "\nfruit: tomato, grapes, watermelon, orange," in result.out
    words = result.out.splitlines()[-1]
    assert words.startswith("All 240 words: airplane, ")
    assert words.removeprefix("All 240 words: ").split(", ") == demo.pipeline().words


def test_demo_help():
    result = run("demo", "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    options = (
        "--list-words",
        "--steps",
        "--seed",
        "--guidance",
        "--threshold",
        "--regime",
        "--size",
        "--device",
        "--output",
        "--force",
    )
    for option in options:
        assert f" {option} " in text
    defaults = ("'red apple' 'panda face'", "50", "1", "4", "128", "demo_output")
    for default in defaults:
        assert f"(default: {default}" in text
    assert f"(default here: {'gpu' if ops.gpu_supported() else 'cpu'})" in text
    assert f"(the model's own is {TINY_KLEIN.rel_l1_thresh})" in text
    for word in ("images.png", "plot.png", "speedup", "bound", "PSNR", "SSIM", "not those of FLUX", "untimed"):
        assert word in text
    assert max(map(len, result.out.splitlines())) <= 120


def test_defaults_are_the_settings_defaults():
    arguments = cli._parser().parse_args(["demo"])
    settings = compare_module.Settings()
    for field in dataclasses.fields(settings):
        assert getattr(arguments, field.name) == getattr(settings, field.name)
    compare_module.check_prompts(demo.pipeline(), arguments.prompts)
    assert math.isfinite(arguments.guidance)


def test_no_command_prints_help():
    result = run()
    assert result.code == 0
    assert result.out.startswith("usage: mlx-teacache-fast [-h] [--version] COMMAND")
    assert "compare plain mflux with gated generation" in result.out


def test_version():
    assert run("--version") == Result(0, f"mlx-teacache-fast {mlx_teacache_fast.__version__}\n", "")


def test_unknown_command():
    result = run("demon")
    assert result.code == 2
    assert result.err.startswith("mlx-teacache-fast: error: argument COMMAND: invalid choice: 'demon'")
    assert result.err.count("\n") == 1
