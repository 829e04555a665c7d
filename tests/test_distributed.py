"""Several processes on this machine, by MLX's ring over loopback: pictures shared out, and guidance in parallel."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mflux", reason="the pipelines are mflux's")

import other_pipelines
import ranks
from mflux.models.flux2.flux2_initializer import Flux2Initializer
from PIL import Image
from test_cli import run

import mlx_teacache_fast
from mlx_teacache_fast import TeaCacheError, TeaCacheValueError, Trace, Tuned, distributed

HERE = Path(__file__).parent
GENERATE = ["mflux-generate-flux2", "--model", "flux2-klein-base-4b", "--prompt", "red apple"]
GENERATE += ["--width", "32", "--height", "32", "--steps", "6"]
SEEDS = [*range(10), 2**63, 7]  # of two equal ones mflux numbers the second file
PROMPTS = ["red apple", "cat face", "pizza", "sun", "red heart"]
TUNE = ["demo", "--steps", "8", "--size", "32", "--guidance", "1", "--budget", "0.5", "--candidates", "3"]
TUNE += ["--curve", "0.3", "--held-out", "2", "--prompts"]


def command(folder, *options, own=()):
    return [*own, "--", *GENERATE, *options, "--output", str(folder / "apple.png")]


def hosts(folder, n):
    """A file for MLX_HOSTFILE, with ports that are free."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    path = folder / "hosts.json"
    path.write_text(json.dumps(addresses))
    return path


def launched(n, folder, *jobs):
    """What each of n processes wrote of the jobs that it came to the end of, and their exit codes."""
    folder.mkdir(exist_ok=True)
    env = os.environ | {"MLX_HOSTFILE": str(hosts(folder, n))}
    argv = [sys.executable, HERE / "ranks.py", json.dumps(jobs), folder]
    processes = []
    try:
        for rank in range(n):
            log = (folder / f"log{rank}").open("w")
            processes.append(subprocess.Popen(argv, env=env | {"MLX_RANK": str(rank)}, stdout=log, stderr=log))
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    written = [folder / f"rank{rank}.json" for rank in range(n)]
    return [json.loads(path.read_text()) for path in written], codes


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's pictures and what it printed."""
    mx.set_default_device(mx.cpu)
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux2Initializer, "init", ranks.embedded)
        seeds = ["--seed", *map(str, SEEDS)]
        result = run("run", *command(folder, *seeds, own=["--trace", folder / "trace.json"]))
        assert result.code == 0, result.err
        guided = run("run", *command(folder, "--seed", "99", "--guidance", "4"))
        assert guided.code == 0, guided.err
    return folder


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Two processes, which do everything that this file looks at."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("shared", "guided", "failed"):
        (folder / name).mkdir()
    (folder / "failed" / "6").write_text("a file where a folder is wanted")
    seeds = ["--seed", *map(str, SEEDS)]
    failing = ["--seed", "5", "6", "7", "8", "--output", str(folder / "failed" / "{seed}" / "apple.png")]
    prompts, ending = str(alone / "prompts.txt"), folder / "ending.py"
    ending.write_text(
        "import os, sys\nprint('a reason')\nsys.exit('rank 1 has enough' if os.environ['MLX_RANK'] == '1' else None)"
    )
    (jobs, other), codes = launched(
        2,
        folder,
        ["run", *command(folder / "shared", *seeds, own=["--trace", str(folder / "trace.json")])],
        ["run", *command(folder / "guided", "--seed", "99", "--guidance", "4", own=["--guidance-parallel"])],
        ["run", "--trace", str(folder / "failed.json"), "--", *GENERATE, *failing],
        ["latents"],
        ["errors"],
        ["run", "--", str(ending)],
        ["run", "--like", str(alone / "apple_seed_RANK.png"), "--", "mflux-generate-flux2"],
        ["tune", *TUNE, prompts, "--output", str(folder / "tuned.json")],
        ["tune", *TUNE, prompts, "--seed", "RANK", "--output", str(folder / "other.json")],
        ["gone"],
    )
    assert codes == [2, -signal.SIGKILL], [path.read_text() for path in folder.glob("log*")]
    return folder, jobs, other


# ---- One process


def test_one_process_knows_nothing_of_it(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda *_, **__: pytest.fail("MLX's engine is started"))
    assert distributed.world() is None
    assert distributed.share("abc") == ["a", "b", "c"]
    with pytest.raises(TeaCacheValueError, match=r"group must be of mx\.distributed, as init\(\) returns it, got 2$"):
        distributed.share("abc", 2)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD", "PMI"])
def test_mpirun_without_mpi(name, monkeypatch):
    monkeypatch.setenv(f"{name}_RANK", "0")
    assert distributed.world.__wrapped__() is None  # a batch system sets it for one process too
    monkeypatch.setenv(f"{name}_SIZE", "3")
    with pytest.raises(TeaCacheError, match="mpirun has started 3 processes, and MLX's engine finds only this one"):
        distributed.world.__wrapped__()


@pytest.mark.parametrize("rank", [0, 1])
def test_progress_bars_are_rank_0s(rank):
    script = f"""import os, sys, types
from mlx_teacache_fast.cli import ranks
with ranks.said_once(types.SimpleNamespace(rank=lambda: {rank})):
    import tqdm
    list(tqdm.tqdm(range(3)))
    print("said")
print(os.environ.get("TQDM_DISABLE"), file=sys.stderr)
"""
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=env)
    assert done.stderr.endswith("None\n"), done.stderr
    assert ("3/3" in done.stderr, done.stdout == "said\n") == (rank == 0, rank == 0)


def test_a_group_of_two_is_wanted(flux):
    for group, got in ((mx.distributed.init(), "1"), (2, "2")):
        message = f"guidance in parallel is for a group of 2 ranks, as mlx.launch -n 2 starts them, got {got}"
        with pytest.raises(TeaCacheValueError, match=re.escape(message)):
            mlx_teacache_fast.apply(flux, group=group)


def test_guidance_parallel_wants_two_processes():
    result = run("run", "--guidance-parallel", "--", *GENERATE)
    assert result.code == 2
    assert "guidance in parallel is for a group of 2 ranks" in result.err


# ---- Pictures shared out


def test_two_ranks_make_the_pictures_of_one(alone, together):
    folder, (job, *_), (other, *_) = together
    assert (job["code"], other["code"]) == (0, 0), job["err"] + other["err"]
    expected = {name: picture for name, picture in pictures(alone).items() if "seed" in name}
    assert len(expected) == len(SEEDS)
    assert_equal(pictures(folder / "shared"), expected)


def test_what_is_said_once(alone, together):
    folder, (job, *_), (other, *_) = together
    of_one, of_both = (Trace.from_json(path / "trace.json") for path in (alone, folder))
    assert len(of_both.generations) == len(SEEDS)
    key = lambda generation: repr([(s.kind, s.rel_l1) for s in generation.steps])  # noqa: E731
    assert list(map(key, of_both.generations)) == list(map(key, of_one.generations))
    assert "12 pictures on 2 ranks" in job["err"]
    assert f"generations     {len(SEEDS)}\n" in job["out"]
    assert other["out"] == ""
    assert "pictures on" not in other["err"]


# mlx.launch, whose threads do not ask all the time whether they could write to the ranks.
LAUNCH = "import mlx._distributed_utils.launch as of_mlx, select; own = select.select\n"
LAUNCH += "of_mlx.select = lambda read, write, *others: own(read, [], *others)\nof_mlx.main()"


def mlx_launch(n, folder, *command):
    """Arguments of a process, whose stdin must stay open."""
    port = re.search(r":(\d+)", hosts(folder, 1).read_text())[1]
    argv = [sys.executable, "-c", LAUNCH, "-n", str(n), "-p", port, "--backend", "ring", "--", sys.executable]
    return [*argv, *map(str, command)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three processes of mlx.launch, of which one is killed at the end; what they wrote, and what mlx.launch said."""
    folder = tmp_path_factory.mktemp("three")
    for name in ("shared", "made"):
        (folder / name).mkdir()
    jobs = [
        ["run", *command(folder / "shared", "--seed", *map(str, SEEDS))],
        ["run", *command(folder / "shared", "--seed", "77")],
        ["dies", 1, *command(folder / "made", "--seed", *map(str, range(600)))],
    ]
    argv = mlx_launch(3, folder, HERE / "ranks.py", json.dumps(jobs), folder)
    silent, end = os.pipe()
    try:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=200, stdin=silent)
    finally:
        os.close(silent)
        os.close(end)
    said = result.stdout + result.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)], said


def test_three_ranks(alone, three):
    folder, done, _ = three
    assert [[job["code"] for job in jobs[:2]] for jobs in done] == [[0, 0]] * 3, done
    made = pictures(folder / "shared")
    assert made.pop("apple.png").shape == (32, 32, 3)  # which the two others had nothing to do for
    assert_equal(made, {name: picture for name, picture in pictures(alone).items() if "seed" in name})
    assert [jobs[0]["out"] == "" for jobs in done] == [False, True, True]


def test_a_rank_that_fails(together):
    folder, (_, _, job, *_), (_, _, other, *_) = together
    assert (job["code"], other["code"]) == (1, 1)
    assert sorted(path.parent.name for path in (folder / "failed").glob("*/*.png")) == ["5", "7"]
    assert "rank 1 has not made seeds 6, 8" in other["err"]
    assert "has not made" not in job["err"]
    assert "generations     3\n" in job["out"]  # of which one could not be written
    assert (folder / "failed.json").stat().st_mtime_ns <= other["ended"]  # mlx.launch would end rank 0 before


def test_the_exit_code_of_a_program_is_that_of_all_ranks(together):
    _, jobs, other = together
    assert (jobs[5]["code"], other[5]["code"]) == (1, 1)
    assert (jobs[5]["out"], other[5]["out"]) == ("a reason\n", "")
    assert other[5]["err"].startswith("a reason\nrank 1 has enough\n")  # mflux's commands print why they failed


def test_ranks_that_repeat_different_pictures(together):
    for jobs in together[1:]:
        assert jobs[6]["code"] == 2
        assert "error: like must be the same on all ranks" in jobs[6]["err"]


@pytest.mark.slow
def test_a_rank_that_is_killed(tmp_path):
    """Without mlx.launch, which would end the other: that one makes its part."""
    (tmp_path / "made").mkdir()
    first = ["run", *command(tmp_path / "made", "--seed", "9")]
    (job, other), codes = launched(
        2, tmp_path, first, ["dies", 1, *command(tmp_path / "made", "--seed", "1", "2", "3", "4")]
    )
    assert codes == [1, -signal.SIGKILL]
    assert len(other) == 1
    assert sorted(pictures(tmp_path / "made")) == ["apple.png", *(f"apple_seed_{seed}.png" for seed in (1, 2, 3))]
    assert "error: another rank is gone" in job[1]["err"]


def test_mlx_launch_ends_the_others(three):
    folder, done, said = three
    assert "rank 1 exited with code -9" in said
    assert [len(jobs) for jobs in done] == [2, 2, 2]
    assert "apple_seed_1.png" in pictures(folder / "made")  # reads all: none of the others' is cut off
    assert len(pictures(folder / "made")) < 600
    end = time.monotonic() + 200
    while str(folder) in subprocess.run(["ps", "-axww", "-o", "args"], capture_output=True, text=True).stdout:
        assert time.monotonic() < end, "the ranks are still there"
        time.sleep(0.1)


# ---- A rank that gets a signal

# The command, with the embedded model's weights. Its process's number is in a file beside it.
COMMAND = """import os, sys
import mlx.core as mx
with open(sys.argv[0] + os.environ["MLX_RANK"], "w") as file:
    file.write(str(os.getpid()))
from mlx_teacache_fast.cli import main
import ranks
mx.set_default_device(mx.cpu)
ranks.Flux2Initializer.init = ranks.embedded
sys.exit(main())
"""


def until(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Launched:
    """mlx.launch's ``process``, and the numbers ``pids`` of its ranks' processes."""

    def __init__(self, n, folder, *arguments):
        self.log = folder / "log"
        script = folder / "mlx-teacache-fast"
        script.write_text(COMMAND)
        argv = mlx_launch(n, folder, script, *arguments)
        files = [folder / f"mlx-teacache-fast{rank}" for rank in range(n)]
        for file in files:
            file.unlink(missing_ok=True)  # of an earlier one
        with self.log.open("w") as log:
            how = dict(stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
            self.process = subprocess.Popen(argv, **how)
        self.until(lambda: all(file.is_file() and file.read_text() for file in files))
        self.pids = [int(file.read_text()) for file in files]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def until(self, condition):
        """Or mlx.launch has ended."""
        until(lambda: self.process.poll() is not None or condition())

    def kill(self, rank, number):
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def ended(self):
        """What was said, and the exit codes that are not 0, when no process is left."""
        self.process.wait(200)
        until(lambda: not any(map(is_there, self.pids)))
        said = self.log.read_text()
        return said, {int(rank): int(code) for rank, code in re.findall(r"rank (\d) exited with code (\S+)", said)}


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def made(tmp_path):
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_is_killed_at_any_moment(alone, made, seed):
    rng, trace = random.Random(seed), made.with_name("trace.json")
    n, after = 2 + seed % 2, rng.randrange(8)
    victim = rng.randrange(n)
    with Launched(n, made.parent, "run", *command(made, "--seed", *range(8), own=["--trace", trace])) as launched:
        launched.until(lambda: len(list(made.iterdir())) >= after)
        time.sleep(rng.uniform(0, 0.5 if after else 5))
        launched.kill(victim, signal.SIGKILL)
        said, codes = launched.ended()
    assert launched.process.returncode == 0
    assert "Traceback" not in said
    names = [f"apple_seed_{seed}.png" for seed in range(8)]
    found = sorted(made.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert {path.name for path in found} <= set(names)
    of_one = pictures(alone)
    cut = [path for path in found if not is_picture(path, of_one[path.name])]
    if codes:
        assert codes.pop(victim) == -signal.SIGKILL
        assert set(codes.values()) <= {1, -signal.SIGTERM}
        assert cut in ([], [path for path in found if path.name in names[victim::n]][-1:])  # it may have been writing
    else:
        assert (len(found), cut) == (8, [])
        assert len(Trace.from_json(trace).generations) == 8


def is_picture(path, expected):
    with suppress(OSError):
        return np.array_equal(np.asarray(Image.open(path)), expected)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_on_one_rank(alone, made, rank):
    """The other makes its part."""
    trace = made.with_name("trace.json")
    with Launched(2, made.parent, "run", *command(made, "--seed", *range(8), own=["--trace", trace])) as launched:
        launched.until(lambda: (made / f"apple_seed_{rank}.png").exists())
        launched.kill(rank, signal.SIGINT)
        said, codes = launched.ended()
    assert codes.pop(rank) in (1, 130)  # in a picture's loop mflux says that it stops; between pictures we do
    assert codes == {1 - rank: 1}
    assert f"rank {rank} has not made seeds" in said
    assert "Traceback" not in said
    of_one, found = pictures(alone), pictures(made)
    assert {f"apple_seed_{seed}.png" for seed in range(1 - rank, 8, 2)} < found.keys()
    assert_equal(found, {name: of_one[name] for name in found})
    assert len(found) <= len(Trace.from_json(trace).generations) < 8  # one may not have been written


@pytest.mark.slow
def test_ctrl_c_on_all_ranks(alone, made):
    """As a terminal sends it, also to mlx.launch, which ends with a traceback of its own."""
    with Launched(2, made.parent, "run", *command(made, "--seed", *range(10))) as launched:
        launched.until(lambda: any(made.iterdir()))
        os.killpg(launched.process.pid, signal.SIGINT)
        said, codes = launched.ended()
    assert set(codes) == {0, 1}
    assert set(codes.values()) <= {1, 130}
    assert said.count("Traceback") == 1
    of_one, found = pictures(alone), pictures(made)
    assert_equal(found, {name: of_one[name] for name in found})
    assert len(found) < 10


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_on_a_rank_that_waits(alone, made, rank):
    """Rank 0 says what it has made itself."""
    other, trace = 1 - rank, made.with_name("trace.json")
    with Launched(2, made.parent, "run", *command(made, "--seed", *range(4), own=["--trace", trace])) as launched:
        launched.until(lambda: (made / f"apple_seed_{other}.png").exists())
        launched.kill(other, signal.SIGSTOP)
        launched.until(lambda: (made / f"apple_seed_{rank + 2}.png").exists())
        time.sleep(1)
        launched.kill(rank, signal.SIGINT)
        launched.kill(other, signal.SIGCONT)
        said, codes = launched.ended()
    assert codes.pop(rank) == 130
    assert codes in ({other: 1}, {other: -signal.SIGTERM}), said
    if rank == 0:
        assert len(Trace.from_json(trace).generations) == 2
    assert "mlx-teacache-fast run: error: interrupted" in said
    assert "Traceback" not in said
    of_one = pictures(alone)
    assert_equal(pictures(made), {name: of_one[name] for name in (f"apple_seed_{seed}.png" for seed in range(4))})


WRITING = "import os, signal\nfrom mlx_teacache_fast.files import uninterrupted\nme = os.getpid()\n"


@pytest.mark.parametrize("came", [("SIGTERM",), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_sigterm_waits_while_a_picture_is_written(came):
    script = f"{WRITING}with uninterrupted():\n    for name in {came}: os.kill(me, getattr(signal, name))\n"
    script += "    print('written', flush=True)\nprint('not reached', flush=True)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "written\n")


def test_ctrl_c_while_the_handlers_are_put_back():
    script = f"""{WRITING}
put = signal.signal
def put_and_come(*given):
    put(*given)
    os.kill(me, signal.SIGINT)
try:
    with uninterrupted():
        signal.signal = put_and_come
except KeyboardInterrupt:
    print(signal.getsignal(signal.SIGTERM).name, signal.getsignal(signal.SIGINT).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.stdout == "SIG_DFL default_int_handler\n", done.stderr


# ---- Tuning


@pytest.fixture(scope="module")
def tuned(alone):
    """By one process: the file, and what was printed."""
    mx.set_default_device(mx.cpu)
    path = alone / "tuned.json"
    result = run("tune", *TUNE, alone / "prompts.txt", "--output", path)
    assert result.code == 0, result.err
    return path, result.out


def test_two_ranks_tune_as_one(tuned, together):
    folder, jobs, other = together
    path, out = tuned
    assert (jobs[7]["code"], other[7]["code"]) == (0, 0), jobs[7]["err"] + other[7]["err"]
    for suffix in (".json", ".png"):
        assert (folder / "tuned").with_suffix(suffix).read_bytes() == path.with_suffix(suffix).read_bytes()
    assert jobs[7]["out"] == out.replace(str(path.parent), str(folder))
    assert "on 2 ranks: about" in jobs[7]["err"]
    assert (other[7]["out"], other[7]["err"]) == ("", "")


def test_ranks_that_tune_with_other_arguments(together):
    folder, *of_ranks = together
    for jobs in of_ranks:
        assert jobs[8]["code"] == 2
        message = "seed must be the same on all ranks, got '0' on rank 0 and '1' on rank 1"
        assert jobs[8]["err"] == f"mlx-teacache-fast tune: error: {message}\n"
    assert not (folder / "other.json").exists()


@pytest.mark.slow
def test_three_ranks_tune_as_one(alone, tuned, tmp_path):
    path = tmp_path / "tuned.json"
    done, codes = launched(3, tmp_path, ["tune", *TUNE, str(alone / "prompts.txt"), "--output", str(path)])
    assert codes == [0, 0, 0], done
    assert path.read_bytes() == tuned[0].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number", "code"), [(0, 9, -9), (1, 9, -9), (1, signal.SIGINT, 130)])
def test_tuning_goes_on_where_a_rank_was_ended(alone, tuned, tmp_path, victim, number, code):
    path = tmp_path / "tuned.json"
    arguments = ["tune", *TUNE, alone / "prompts.txt", "--resume", "--output", path]
    with Launched(2, tmp_path, *arguments) as launched:
        launched.until(lambda: path.exists() and len(Tuned.from_json(path).tried) > 3)
        launched.kill(victim, number)
        said, codes = launched.ended()
    assert codes.pop(victim) == code
    assert codes in ({1 - victim: 1}, {1 - victim: -signal.SIGTERM})
    how = f"tune: error: this was rank {1 - victim}; --resume goes on with {path} of rank 0\n"
    assert (how in said) == (codes == {1 - victim: 1})
    assert "Traceback" not in said
    before = Tuned.from_json(path)
    assert 3 < len(before.tried) < len(Tuned.from_json(tuned[0]).tried)
    with Launched(3, tmp_path, *arguments) as launched:
        said, codes = launched.ended()
    assert not codes, said
    assert path.read_bytes() == tuned[0].read_bytes()


# ---- Guidance in parallel


@pytest.fixture(scope="module")
def of_one():
    mx.set_default_device(mx.cpu)
    return ranks.latents(None)


@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.parametrize("family", ranks.FAMILIES)
def test_latents_are_those_of_one_process(family, case, of_one, together):
    expected = of_one[f"{family}, {case}"]
    if case not in ("tolerance 0", "threshold 0"):
        assert {"skipped", "computed"} <= set(expected["kinds"])
    for jobs in together[1:]:
        found = jobs[3][f"{family}, {case}"]
        assert found["kinds"] == expected["kinds"]
        np.testing.assert_array_equal(found["latents"], expected["latents"])


NOT_TRIED = (*ranks.FAMILIES, *ranks.ONE_CALL, "FIBO", "FIBOEdit")  # above, or refused
OTHERS = [str(small) for small in other_pipelines.PIPELINES if str(small) not in NOT_TRIED]


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_latents_of_every_family(family, tmp_path):
    done, codes = launched(2, tmp_path, ["latents", family])
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    for case, expected in ranks.latents(None, [family]).items():
        for (found,) in done:
            assert found[case]["kinds"] == expected["kinds"], case
            np.testing.assert_array_equal(found[case]["latents"], expected["latents"], err_msg=case)


@pytest.mark.skipif(sys.platform != "linux", reason="bytes of a connection are asked of Linux")
@pytest.mark.parametrize("family", ranks.FAMILIES)
def test_one_exchange_a_computed_step(family, together):
    for jobs in together[1:]:
        rest = {}
        for case in ranks.CASES:
            found = jobs[3][f"{family}, {case}"]
            predictions = sum(kind != "skipped" for kind in found["kinds"]) * np.size(found["latents"]) * 4  # float32
            decisions = {"gate": 8 * 4 * len(found["kinds"]), "tolerance": 2 * 4 * found["misses"]}.get(case, 0)
            rest[case] = found["sent"] - predictions - decisions
        assert len(set(rest.values())) == 1, rest  # what begins a generation
        assert 0 < rest["steps"] < 2000


def test_a_picture_with_guidance_in_parallel(alone, together):
    folder, (_, job, *_), (_, other, *_) = together
    assert (job["code"], other["code"]) == (0, 0), job["err"] + other["err"]
    assert_equal(pictures(folder / "guided"), {"apple.png": pictures(alone)["apple.png"]})  # written once
    assert "generations     1\n" in job["out"]
    assert other["out"] == ""


def test_what_is_refused(together):
    chips = ["rank 0 has chip 0 and rank 1 chip 1: the last bits of what they compute may differ"]  # once, on rank 0
    for jobs, warned in zip(together[1:], (chips, []), strict=True):
        assert jobs[4] == [
            *warned,
            'TeaCacheValueError: group is for cache="output": of the blocks\' residual nothing is exchanged',
            "TeaCacheValueError: a step of Flux1 is one call of its transformer: leave out group",
            *(
                f"TeaCacheValueError: a step of {n} is one call of its transformer: leave out group"
                for n in ranks.ONE_CALL
            ),
            "TeaCacheValueError: budget must be the same on all ranks, got 0.4 on rank 0 and 0.5 on rank 1",
            "TeaCacheValueError: image_paths must be the same on all ranks, got ['same.png', '0.png'] on rank 0 and "
            "['same.png', '1.png'] on rank 1",
            "TeaCacheValueError: guidance in parallel wants a step of 2 calls of the transformer, one for each branch, "
            "got 1: without guidance (of 1) leave out group, or --guidance-parallel",
            "TeaCacheValueError: prompt must be the same on all ranks, got 'apple of rank 0' on rank 0 and "
            "'apple of rank 1' on rank 1",
            "0",
            "1",
        ]


def test_a_rank_that_is_gone_in_a_picture(together):
    _, jobs, other = together
    assert jobs[9].startswith("TeaCacheError: another rank is gone: [ring]")
    assert len(other) == 9
