"""Files, arguments, terminals and moments that nobody hopes for: this package's own errors, and nothing half-done."""

import copy
import errno
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mflux", reason="the pictures and commands are mflux's")

import piexif
from mflux.cli.parser.parsers import CommandLineParser
from mflux.models.flux.flux_initializer import FluxInitializer
from mflux.models.flux2.flux2_initializer import Flux2Initializer
from PIL import Image
from test_cli import COMMAND, LISTEN, QUICK, run

import mlx_teacache_fast as tc
from mlx_teacache_fast import files
from mlx_teacache_fast.files import LARGEST_JSON
from mlx_teacache_fast.mflux.commands import _TAKEN
from mlx_teacache_fast.mflux.families import COMMANDS

RUN = dict(prompt="red apple", seed=3, num_inference_steps=14, height=64, width=64, guidance=1.0)


def times(few: int, many: int) -> Any:
    """``many`` of a check with ``make test-full``, and ``few`` of them else."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def made(flux: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gated picture in three formats, its metadata, a trace and a policy."""
    folder = tmp_path_factory.mktemp("made")
    with tc.apply(flux, rel_l1_thresh=0.4, coefficients=(0, 0, 0, 1.5, 0)) as handle:
        image = flux.generate_image(**RUN)
    for suffix in ("png", "jpg", "webp"):
        image.save(folder / f"a.{suffix}", export_json_metadata=suffix == "png")
    handle.trace.to_json(folder / "trace.json")
    handle.policy.to_json(folder / "policy.json")
    return folder


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(tc.TeaCacheError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# ---- Copies


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(flux: Any, how: Callable[[Any], Any]) -> None:
    with tc.apply(flux) as handle:
        flux.generate_image(**RUN)
        for holder in (handle, [handle], {"handle": handle}, SimpleNamespace(handle=handle)):
            if how is not copy.copy or holder is handle:
                assert refusal(how, holder).startswith("a handle belongs to its pipeline and cannot be copied")
        with pytest.raises(tc.AlreadyPatchedError):  # it lives on
            tc.apply(flux)
        kept = [how(value) for value in (handle.policy, handle.stats, handle.trace)]
        policy, stats, trace = map(pickle.loads, kept) if how is pickle.dumps else kept
        flux.generate_image(**RUN)
    assert (policy, trace.generations) == (handle.policy, handle.stats.finished[:1])
    assert (stats.generations, handle.stats.generations) == (1, 2)
    stats.commit(handle.stats.finished[1])
    assert stats.generations == 1  # a copy is fixed
    assert repr(handle).endswith(", restored>")


# ---- Writing


def test_only_regular_files_are_replaced(tmp_path: Path, made: Path) -> None:
    pipe, device, folder = tmp_path / "pipe", Path("/dev/null"), tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    (tmp_path / "to-pipe").symlink_to(pipe)
    policy, trace = tc.Policy.from_json(made / "policy.json"), tc.Trace.from_json(made / "trace.json")
    for write in (policy.to_json, trace.to_json):
        for path, what in (
            (pipe, "no file"),
            (tmp_path / "to-pipe", "no file"),
            (device, "no file"),
            (folder, "a folder"),
        ):
            for force in (False, True):
                assert refusal(write, path, force=force) == f"cannot write {path}: it is {what}"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(device.stat().st_mode)
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    policy.to_json(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert tc.Policy.from_json(tmp_path / "old") == policy


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    stale = tmp_path / f".x.json.{os.getpid()}.part"  # of a killed process
    stale.write_text("half")
    failed: list[Exception] = []

    def write(data: bytes) -> None:
        for _ in range(50):
            try:
                files.write_file(path, data, force=True)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 5000,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(path.read_bytes())) == 1
    assert sorted(tmp_path.iterdir()) == [stale, path]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o604)
    files.write_file(path, b"new", force=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_names_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 252 + ".json")
    (tmp_path / "loop").symlink_to("loop")
    told = f"cannot write {long}: File name too long"
    assert refusal(files.check_writable, long, force=True) == told
    assert refusal(tc.Policy().to_json, long) == told
    assert refusal(files.check_writable, tmp_path / "loop", force=True).endswith("Too many levels of symbolic links")
    result = run("run", "--trace", long, "--", "mflux-generate", "--prompt", "x")
    assert (result.code, result.err) == (1, f"mlx-teacache-fast run: error: {told}\n")
    result = run("demo", "sun", "--output", tmp_path / ("x" * 300))
    assert (result.code, result.out) == (1, "")
    tc.Policy().to_json(tmp_path / ("x" * 255))  # the longest, in one piece with its temporary file


PAIR = ("images.png", "plot.png")


@pytest.fixture(params=[False, True], ids=["new", "old"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[Path, bytes], dict[str, bytes]]:
    """Two files to write, and what the folder has before."""
    old = dict.fromkeys(PAIR, b"old") if request.param else {}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    return {tmp_path / name: b"x" * 5000 for name in PAIR}, old


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_two_files_or_the_old_ones(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The system refuses at the second file: a full disk, or a file that may not be replaced."""
    new, old = pair
    real, calls = getattr(os, call), itertools.count()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    if call == "link":  # a file system without: only the undoing would need them
        files.write_files(new, force=True)
        assert contents(tmp_path) == dict.fromkeys(PAIR, b"x" * 5000)
        return
    message = f"cannot write {tmp_path}/plot.png: No space left on device; nothing was left half-written"
    assert refusal(files.write_files, new, force=True) == message
    assert contents(tmp_path) == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [0, 1])
def test_ctrl_c_between_two_files(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    new, old = pair
    real, calls = getattr(os, call), itertools.count()

    def interrupt(*args: Any) -> Any:
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_files(new, force=True)
    assert contents(tmp_path) == (old if call == "fsync" else dict.fromkeys(PAIR, b"x" * 5000))


def test_one_of_two_exists(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"mine")
    new = {tmp_path / name: b"x" for name in PAIR}
    assert refusal(files.write_files, new, force=False) == f"{tmp_path}/plot.png exists; --force overwrites it"
    assert contents(tmp_path) == {"plot.png": b"mine"}


def test_the_demo_writes_before_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(sys, "stdout", Closed())
    code = tc_main("demo", "sun", "--steps", "3", "--size", "32", "--guidance", "1", "--output", str(tmp_path))
    monkeypatch.undo()
    assert code == 141
    assert sorted(contents(tmp_path)) == sorted(PAIR)


def tc_main(*argv: str) -> int:
    from mlx_teacache_fast.cli import main

    return main(argv)


# ---- Reading

READERS: tuple[Callable[[Any], Any], ...] = (tc.read_metadata, tc.Policy.from_json, tc.Trace.from_json)


def test_only_regular_files_of_a_sensible_size_are_read(flux: Any, tmp_path: Path) -> None:
    readers = (*READERS, lambda path: tc.apply(flux, path))
    for name in ("pipe.json", "pipe.png", "pipe.metadata.json"):
        os.mkfifo(tmp_path / name)
        for read in readers:
            assert refusal(read, tmp_path / name) == f"{tmp_path / name} is no regular file"
    for read in readers:
        assert refusal(read, "/dev/zero") == "/dev/zero is no regular file"
        assert refusal(read, tmp_path) == f"{tmp_path} is a folder"
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    for read in readers:
        assert refusal(read, large) == f"{large} must have at most {LARGEST_JSON} bytes, got {LARGEST_JSON + 1}"
    picture = large.rename(tmp_path / "large.png")
    os.truncate(picture, files.LARGEST_PICTURE + 1)
    assert refusal(tc.read_metadata, picture).startswith(f"{picture} must have at most 1073741824 bytes, got ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbf{}", "it begins with a byte-order mark, and must be UTF-8 without one"),
        ("{}".encode("utf-16"), "it is in UTF-16 or UTF-32, and must be in UTF-8"),
        ("{}".encode("utf-32-be"), "it is in UTF-16 or UTF-32, and must be in UTF-8"),
        (b'{"prompt": "a red', "it is cut off: Unterminated string starting at: line 1 column 12 (char 11)"),
        (
            b'{"prompt": "x",\n ',
            "it is cut off: Expecting property name enclosed in double quotes: line 2 column 2 (char 17)",
        ),
        (b"not JSON", "it is no JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer string conversion"),
    ],
    ids=["mark", "utf-16", "utf-32", "cut", "cut-between", "text", "deep", "digits"],
)
def test_what_is_wrong_with_a_file(flux: Any, tmp_path: Path, content: bytes, problem: str) -> None:
    for name, read, kind in (
        ("a.metadata.json", tc.read_metadata, ".metadata.json"),
        ("a.metadata.JSON", lambda path: tc.apply(flux, path), ".metadata.json"),
        ("a.json", tc.Policy.from_json, "policy"),
        ("a.json", tc.Trace.from_json, "trace"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert refusal(read, path).startswith(f"{path} is not a {kind}: {problem}")


def test_a_picture_s_damaged_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"not a picture")
    assert refusal(tc.read_metadata, path) == f"{path} is no PNG, JPEG or WebP picture, or a damaged one"
    for comment, problem in (
        (b'ASCII\0\0\0{"prompt": "x", "mlx_tea', "has metadata that cannot be understood: it is cut off: "),
        (b"UNICODE\0another program's", "does not say that it was made with gating"),
        (b"", "does not say that it was made with gating"),
    ):
        Image.new("RGB", (8, 8)).save(path, exif=piexif.dump({"Exif": {0x9286: comment} if comment else {}}))
        assert refusal(tc.read_metadata, path).startswith(f"{path} {problem}")


# ---- Mutants


def mutated(data: bytes, rng: random.Random) -> bytes:
    """With bits flipped, bytes cut out, doubled or put in, or numbers made extreme."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(result) + 1)
        end = min(len(result), at + rng.choice((1, 2, 4, 30)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at:end]
        elif kind == 2:
            result[at:at] = result[at:end]
        elif kind == 3:
            result[at:end] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(end - at))
        elif kind == 4:
            del result[at:]
        else:
            result[at:at] = rng.choice((b"\0", b"\xff\xff\xff\xff", b"null", b"1e999", b"[", b"{", b'"', b"9" * 400))
    return bytes(result)


EXTREMES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    10**400,
    1e308,
    -0.0,
    "",
    "x" * 9,
    "\x1b[2J",
    [],
    {},
    [None],
    0.5,
]


def reshaped(data: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts made another: still JSON, which bytes seldom are."""
    if isinstance(data, dict | list) and data and rng.random() < 0.9:
        keys: Any = list(data) if isinstance(data, dict) else range(len(data))
        key, result = rng.choice(keys), copy.copy(data)
        change = rng.randrange(8)
        if change == 0:
            del result[key]
        elif change == 1 and isinstance(result, dict):
            result[rng.choice(("colour", "", "steps", "\ud800"))] = rng.choice(EXTREMES)
        else:
            result[key] = reshaped(data[key], rng)
        return result
    return rng.choice(EXTREMES)


@times(300, 5000)
def test_mutated_json(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    read = understood = longest = 0
    for _ in range(count):
        name = rng.choice(("trace.json", "policy.json", "a.metadata.json"))
        data = (made / name).read_bytes()
        how = rng.choice((mutated, lambda data, rng: json.dumps(reshaped(json.loads(data), rng)).encode()))
        path = tmp_path / name
        path.write_bytes(how(data, rng))
        try:
            if name == "trace.json":
                trace = tc.Trace.from_json(path)
                understood += 1
                tc.replay(trace, rel_l1_thresh=0.2)
            elif name == "policy.json":
                tc.Policy.from_json(path)
            else:
                assert all(map(str.isprintable, str(tc.read_metadata(path)).splitlines()))
            read += 1
        except tc.TeaCacheError as error:
            longest = max(longest, len(str(error)))
        path.unlink()
    assert list(tmp_path.iterdir()) == []
    assert 0 < read < count
    assert longest < 2000
    assert understood > 0


IN_200_MB = """
import resource, signal, sys
from pathlib import Path
import mlx_teacache_fast as tc
made, work = map(Path, sys.argv[1:])
for suffix in ("png", "jpg", "webp"):
    tc.read_metadata(made / f"a.{suffix}")
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 200_000_000,) * 2)
understood = 0
for path in sorted(work.iterdir()):
    signal.setitimer(signal.ITIMER_VIRTUAL, 1)  # ends the process: SIGVTALRM
    try:
        str(tc.read_metadata(path))
        understood += 1
    except tc.TeaCacheError:
        pass
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
print(understood)
"""


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF of one directory: tags, types, numbers of values, and places."""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small pictures that say of themselves that they are large."""
    places = [
        (tag, kind, n, 8) for tag in (0x0102, 0x8769, 0x9286) for kind in (2, 3, 5, 7) for n in (2**32 - 1, 2**20)
    ]
    exifs = [tiff(place) for place in places]
    exifs.append(tiff(*((tag, 7, 20_000, 8) for tag in range(1, 4000))))  # each of them is all of the file
    exifs.append(tiff((0x8769, 4, 1, 8)))  # a directory in itself
    exifs.append(tiff(*((tag, 7, 700_000, 8) for tag in range(1, 65_000))))
    for exif in exifs:
        for kind in ("PNG", "WEBP", *(["JPEG"] if len(exif) < 65_000 else [])):  # what a segment holds
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, kind, exif=b"Exif\0\0" + exif)
            yield f"bomb.{kind.lower()}", file.getvalue()
            if kind == "PNG":
                size = struct.pack(">4sII5s", b"IHDR", 30_000, 30_000, b"\x08\x02\0\0\0")
                yield (
                    "large.png",
                    file.getvalue()[:12] + size + struct.pack(">I", zlib.crc32(size)) + file.getvalue()[33:],
                )


def pictures(made: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of bombs and mutants."""
    yield from bombs()
    rng = random.Random(2)
    originals = {f"a.{suffix}": (made / f"a.{suffix}").read_bytes() for suffix in ("png", "jpg", "webp")}
    for _ in range(count):
        name = rng.choice(list(originals))
        data = originals[name]
        at = data.find(b"ASCII\0\0\0")
        if rng.random() < 0.7:  # near the metadata
            start, end = max(0, at - 100), at + 100
            yield name, data[:start] + mutated(data[start:end], rng) + data[end:]
        else:
            yield name, mutated(data, rng)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@times(200, 2000)
def test_mutated_pictures(made: Path, tmp_path: Path, count: int) -> None:
    """In 200 MB and a second of its own work each."""
    for i, (name, data) in enumerate(pictures(made, count)):
        (tmp_path / f"{i}-{name}").write_bytes(data)
    command = [sys.executable, "-c", IN_200_MB, made, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < int(done.stdout) < count


# ---- Arguments

LONG = f"1{'0' * 17}...{'0' * 19}"  # of 10**400


def hostile_values() -> list[Any]:
    # fmt: off
    return [
        None, True, False, 0, 1, 5, -1, 2**31, 2**63, 2**70, 10**400, 10**5000, -(10**400), 0.3, -0.5, 1e308, 5e-324,
        math.nan, math.inf, -math.inf, "", "x", "1101", "0", "fast", "output", "\x1b[31mred", "a\0b", "9" * 5000,
        "\ud800",
        b"", b"bytes", [], [1, 0], [1] * 20_000, (0, 0, 0, 1, 0), [math.nan] * 5, [10**400] * 5, (0.1, 0.2), (0.2, 0.1),
        [None], {}, {"a": 1}, {"rel_l1_thresh": 0.2}, set(), object(), object, ..., print, 1j, Fraction(1, 3),
        Decimal("0.3"), np.array([1, 0]), np.array(0.3), np.float32(0.3), np.int64(3), np.array(["x"]), mx.array(1),
        mx.array(0.3), mx.array([1, 0]), mx.array([[1.0, 0.5]]), mx.float32, Path("none.json"), Path("/dev/zero"),
        Path(), "/dev/null",
        itertools.count(), itertools.repeat(1), iter([1, 0]), range(10**12), tc.Policy(), tc.Steps(steps="101"),
        tc.IncompatibleModelError("x"),
    ]
    # fmt: on


SETTINGS = [f.name for f in tc.policy.settings(*tc.policy.RULES, tc.Policy)]


def calls(flux: Any, trace: tc.Trace) -> dict[str, tuple[Callable[..., Any], int, tuple[str, ...]]]:
    """Of the package's functions: how many arguments by position, and the others' names."""
    apply = lambda *args, **given: tc.apply(*args, **given).restore()  # noqa: E731
    write = ("force", "about")
    window = ("skip_first_n_steps", "skip_last_n_steps", "nominal_num_inference_steps")
    replay = ("rel_l1_thresh", "coefficients", "calibrated_range", "max_consecutive_skips")
    return {
        "apply": (lambda *args, **given: apply(flux, *args, **given), 1, ()),
        "apply with settings": (lambda **given: apply(flux, **given), 0, tuple(SETTINGS)),
        "apply to": (apply, 1, ()),
        "apply_teacache": (lambda **given: tc.apply_teacache(flux, **given).restore(), 0, tuple(SETTINGS)),
        "Policy.of": (tc.Policy.of, 0, tuple(SETTINGS)),
        "Policy": (tc.Policy, 0, ("rule", "forecast", "cache", "corrector", "save_metadata")),
        "Tolerance": (tc.Tolerance, 0, ("tolerance", "mode")),
        "Gate": (tc.Gate, 0, tuple(f.name for f in tc.policy.settings(tc.Gate))),
        "Steps": (lambda value: tc.Steps(steps=value), 1, ()),
        "Budget": (lambda value: tc.Budget(budget=value), 1, ()),
        "Policy.to_json": (tc.Policy().to_json, 1, write),
        "Trace.to_json": (trace.to_json, 1, write[:1]),
        "Policy.from_json": (tc.Policy.from_json, 1, ()),
        "Trace.from_json": (tc.Trace.from_json, 1, ()),
        "read_metadata": (tc.read_metadata, 1, ()),
        "replay": (lambda **given: tc.replay(trace, **{"rel_l1_thresh": 0.3} | given), 0, replay),
        "replay of": (lambda value: tc.replay(value, rel_l1_thresh=0.3), 1, ()),
        "check_step_window": (tc.check_step_window, 1, window),
        "Policy.of a kind": (lambda value: tc.Policy.of(value), 1, ()),
        "demo.pipeline": (tc.demo.pipeline, 1, ()),
        "match_variant": (tc.match_variant, 2, ()),
    }


@times(400, 2000)
def test_hostile_arguments(flux: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    trace = tc.Trace.from_json(made / "trace.json")
    refused: dict[str, int] = {}  # the longest message of each function
    for _ in range(count):
        functions = calls(flux, trace)
        name = rng.choice(list(functions))
        function, by_position, others = functions[name]
        values = hostile_values()
        args = [rng.choice(values) for _ in range(by_position)]
        given = {other: rng.choice(values) for other in rng.sample(others, min(len(others), rng.choice((1, 1, 2))))}
        if name.endswith("to_json") and isinstance(args[0], str):
            given.pop("force", None)
        try:
            with warnings.catch_warnings(action="ignore"):
                function(*args, **given)
        except (tc.TeaCacheError, OSError) as error:  # the latter of files that cannot be read
            refused[name] = max(refused.get(name, 0), len(str(error)))
        for path in tmp_path.iterdir():
            assert name.endswith("to_json"), (name, path)
            assert json.loads(path.read_bytes())["version"] == 1  # whole
            path.unlink()
    assert set(refused) | {"match_variant"} == set(functions)
    assert max(refused.values()) < 6000  # 5000 are of a path


def test_numbers_out_of_range_in_files(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.json"

    def edited(name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
        data = json.loads((made / name).read_text())
        edit(data)
        path.write_text(json.dumps(data))
        return path

    numbers = "calibrated_range must be two finite numbers, the lower first, or None, got [0, " + LONG + "]"
    edited("policy.json", lambda data: data["policy"].update(calibrated_range=[0, 10**400]))
    assert refusal(tc.Policy.from_json, path) == f"{path} is not a policy: {numbers}"
    for value in (10**400, 10**39, "1", True, [1]):
        edited("trace.json", lambda data, v=value: data["generations"][0]["steps"][2].update(rel_l1=v))  # type: ignore[misc]
        got = LONG if value == 10**400 else repr(value)
        rule = f"rel_l1 must be a number of float32's range or null, got {got}"
        assert refusal(tc.Trace.from_json, path) == f"{path} is not a trace: {rule}"
    edited("trace.json", lambda data: data["generations"][0]["steps"][2].update(rel_l1=2**70))
    assert tc.replay(tc.Trace.from_json(path), rel_l1_thresh=0.2).generations[0].num_steps == 14
    edited("trace.json", lambda data: data["policy"].update(coefficients=None, calibrated_range=None))
    assert refusal(tc.replay, tc.Trace.from_json(path), rel_l1_thresh=0.2) == (
        "the trace's policy has no coefficients: give them"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flux: tc.apply(flux, 5), "policy must be a Policy, or the path of one or of a picture, got 5"),
        (lambda flux: tc.apply(flux, plan=5), "no such setting: plan; there are " + ", ".join(SETTINGS)),
        (lambda flux: tc.apply(flux, tolerance=10**400), f"tolerance must be a number from 0.0 to 1.0, got {LONG}"),
        (
            lambda flux: tc.apply(flux, tolerance=10**5000),
            "tolerance must be a number from 0.0 to 1.0, got an object of int",
        ),
        (lambda flux: tc.read_metadata(None), "path must be a path, got None"),
        (lambda flux: tc.read_metadata("a\0b.png"), r"path must be a path, got 'a\x00b.png'"),
        (lambda flux: tc.Trace.from_json(b"x"), "path must be a path, got b'x'"),
        (lambda flux: tc.replay(None, rel_l1_thresh=0.2), "trace must be a Trace, got None"),
        (lambda flux: tc.Policy().to_json(3), "path must be a path, got 3"),
        (
            lambda flux: tc.Steps(steps=mx.array([1, 0, 1])),
            'steps must be a 1 or 0 for each active step, such as "1101", got array([1, 0, 1], dtype=int32)',
        ),
        (
            lambda flux: tc.Steps(steps=itertools.repeat(1)),
            'steps must be a 1 or 0 for each active step, such as "1101", got repeat(1)',
        ),
        (
            lambda flux: tc.Policy().to_json("never", about={"x": object}),
            "a policy must be of what JSON has: Object of type type is not JSON serializable",
        ),
    ],
)
def test_the_rule_and_the_value(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(call, flux) == message
    assert list(tmp_path.iterdir()) == []


# ---- Metadata

HOSTILE_TEXT = "red\x1b[2J\x9b31m\x07 apple\r\n\u202epng\x00"
RECORD = {
    "policy": {"rel_l1_thresh": 0.4},
    "steps": "101",
    "variant_id": "flux2-klein-base-4b",
    "pipeline": "Flux2Klein",
}
RECORD |= {"scheduler": None, "versions": {"mlx_teacache_fast": tc.__version__}}


def sidecar(path: Path, own: dict[str, Any] | None = None, **mflux: Any) -> Path:
    path.write_text(json.dumps({"prompt": "x", "mlx_teacache_fast": RECORD | (own or {})} | mflux))
    return path


def test_terminal_escapes_are_shown_escaped(tmp_path: Path) -> None:
    text = HOSTILE_TEXT
    own = {
        "variant_id": text,
        "pipeline": text,
        "scheduler": text,
        "versions": {"mlx": text, "mlx_teacache_fast": text},
    }
    path = sidecar(tmp_path / "a.metadata.json", own, prompt=text, **{text: 1})
    shown = r"red\x1b[2J\x9b31m\x07 apple \u202epng\x00"
    for printed in (str(tc.read_metadata(path)), run("info", path).out):
        assert all(map(str.isprintable, printed.splitlines()))
        assert printed.count(shown) == 7
    result = run("run", "--like", path, "--", "mflux-fly", "--help")
    assert shown not in result.out
    result = run("run", "--like", path, "--", "mflux-generate-fill", "--help")
    assert f"version {shown} of this package made the picture" in result.err
    sidecar(tmp_path / "a.metadata.json", {"steps": text})
    for result in (run("info", path), run("info", text), run("demo", text), run("demo", "--steps", text)):
        assert result.code == 2
        assert result.err.isprintable() or result.err[:-1].isprintable()


WRONG = {
    "seed": (2**64, "a whole number from 0 to 18446744073709551615"),
    "steps": (10**400, "a whole number from 1 to 10000"),
    "width": (True, "a whole number from 16 to 16384"),
    "prompt": (5, "a text"),
    "guidance": (1e300, "a finite number"),
    "image_path": (["x"], "a text"),
    "image_paths": ([5], "a list of texts"),
    "lora_scales": (["1"], "a list of finite numbers"),
    "use_kv_cache": ("yes", "true or false"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_mflux_s_metadata(tmp_path: Path, name: str) -> None:
    value, rule = WRONG[name]
    path = sidecar(tmp_path / "a.metadata.json", **{name: value})
    result = run("run", "--like", path, "--", "mflux-generate-flux2")
    got = LONG if value == 10**400 else repr(value)
    message = f"{name} in the picture's metadata must be {rule}, got {got}"
    assert (result.code, result.out, result.err) == (2, "", f"mlx-teacache-fast run: error: {message}\n")


@times(60, 1000)
def test_mutated_metadata_is_repeated_or_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Until weights would be loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise SystemExit(77)

    monkeypatch.setattr(Flux2Initializer, "init", load)
    monkeypatch.setattr(FluxInitializer, "init", load)
    rng = random.Random(6)
    record = json.loads((made / "a.metadata.json").read_text())
    codes = set()
    for _ in range(count):
        names = rng.sample(sorted(_TAKEN), rng.choice((0, 1, 2)))
        said = record | {name: rng.choice([*EXTREMES, 1, 4, 64, "dev", ["x"], [0.5]]) for name in names}
        command = rng.choice(("mflux-generate", "mflux-generate-flux2"))
        own = {**record["mlx_teacache_fast"], "pipeline": COMMANDS[command].pipeline.__name__}
        said["mlx_teacache_fast"] = reshaped(own, rng) if rng.random() < 0.2 else own
        path = tmp_path / "a.metadata.json"
        path.write_text(json.dumps(said))
        result = run("run", "--like", path, "--", command)
        assert result.code in (2, 77), (said, result.err)
        assert "Traceback" not in result.err, said
        codes.add(result.code)
    assert codes == {2, 77}


def test_all_of_mflux_s_metadata_is_checked(tmp_path: Path) -> None:
    """What its parser takes from a file, as its source says, but for what it checks itself."""
    source = inspect.getsource(CommandLineParser.parse_args)
    taken = set(re.findall(r"""_metadata\.get\(["'](\w+)["']""", source))
    assert {"seed", "prompt", "steps"} <= taken
    checked = set(re.findall(r"(\w+) (?:must be|in --config-from)", source))
    checked |= {"scheduler", "small_text_encoder", "render_text_images"}
    assert taken - checked <= set(_TAKEN)


# ---- The command line

ODD = (
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "nan",
        "9" * 400,
        "1e999",
        "0x10",
        "１",
        "1101",
        "\x1b[2J",
        "%s",
        "{}",
        "ü",
        "\udcff",
    ),
    *("x" * 300, "~nobody", "/dev/zero", "/", "none.png", "a.json", "flux2-klein-base-4", "demo"),
)
OPTIONS = {
    "info": "--base-model --steps",
    "demo": "--steps --seed --guidance --tolerance --threshold --regime --size --device --output",
    "run": "--threshold --coefficients --calibrated-range --skip-first --max-skips --tolerance --mode --budget --steps "
    "--forecast --cache --corrector --policy --like --trace",
}


@times(150, 1000)
def test_hostile_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from mlx_teacache_fast.demo import compare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "compare", lambda *_, **__: 1 / 0)  # nothing is generated
    rng = random.Random(4)
    codes = set()
    for _ in range(count):
        command = rng.choice(list(OPTIONS))
        argv = [command, *(rng.choice(ODD) for _ in range(rng.randrange(2)))]
        for option in rng.sample(OPTIONS[command].split(), rng.choice((1, 2))):
            argv += [option, rng.choice(ODD)]
        if command == "demo":
            argv += ["--steps", "0"]  # or it would begin
        if command == "run":
            argv += ["--", rng.choice(("mflux-generate", "mflux-fly", "", "mflux-generate-flux2")), "--steps", "0"]
        result = run(*argv)
        codes.add(result.code)
        assert result.code in (0, 1, 2), argv
        assert result.code == 0 or result.err.splitlines()[-1].startswith(("mlx-teacache-fast", "mflux")), argv
        assert "Traceback" not in result.err, argv
    assert codes >= {1, 2}
    assert list(tmp_path.iterdir()) == []


def in_shell(redirections: str, *command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *map(str, command)]
    return subprocess.run(shell, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(made: Path, closed: str) -> None:
    for path, code in ((made / "a.png", 0), (made / "none.png", 1)):
        result = in_shell(closed, *COMMAND, "info", path)
        assert result.returncode == code
        assert result.stdout == "" or (">&-" not in closed.split() and result.stdout.startswith("pipeline"))
        error = f"mlx-teacache-fast info: error: [Errno 2] No such file or directory: '{path}'\n"
        assert result.stderr == ("" if code == 0 or "2>&-" in closed else error)


def test_a_closed_stdin_takes_no_file_s_place(tmp_path: Path) -> None:
    """MLX refuses to read weights from descriptor 0."""
    result = in_shell(
        "<&-", *COMMAND, "demo", "sun", "--steps", "3", "--size", "32", "--guidance", "1", "--output", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert sorted(contents(tmp_path)) == sorted(PAIR)


@pytest.mark.parametrize("arguments", [["--help"], ["info", "a.png"]])
def test_a_closed_pipe(made: Path, arguments: list[str]) -> None:
    for unbuffered in ("", "1") if arguments[0] == "info" else ("",):  # argparse takes no notice
        read, write = os.pipe()
        os.close(read)
        command = [*COMMAND, *(made / a if a.endswith(".png") else a for a in arguments)]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
        os.close(write)
        assert (result.returncode, result.stderr) == (141, b"")


def test_an_ascii_terminal(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.metadata.json", prompt="リンゴ apple")
    result = in_shell("", *COMMAND, "info", path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "??? apple" in result.stdout
    result = in_shell("", *COMMAND, "info", "リンゴ.png", PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert result.stderr == "mlx-teacache-fast info: error: [Errno 2] No such file or directory: '???.png'\n"


def test_exit_codes(made: Path, tmp_path: Path) -> None:
    """As the help says."""
    (tmp_path / "bad.json").write_text("{}")
    for arguments, code in (
        (["dev"], 0),
        (["dev", "--steps", 2], 0),
        (["demo"], 0),
        ([], 0),
        ([made / "a.png"], 0),
        ([made / "none.png"], 1),
        ([tmp_path / "bad.json"], 2),
        (["xyzzy"], 2),
        (["dev", "--base-model", "xyzzy"], 2),
        (["--steps", 3], 2),
        (["demo", "--base-model", "dev"], 2),
        ([made / "a.png", "--steps", 3], 2),
    ):
        assert run("info", *arguments).code == code, arguments


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("flux2-klein-base-4", "flux2-klein-base-4b or flux2-klein-base-4B or flux2-klein-base-9b"),
        ("FLUX2-KLEIN-BASE-4", "flux2-klein-base-4"),
        ("devv", "dev"),
        ("./dev", "dev"),
        ("schnell2", "schnell"),
        ("FLUX.1-dev", "black-forest-labs/FLUX.1-dev or "),
        ("black-forest-labs/FLUX.1-devv", "black-forest-labs/FLUX.1-dev or "),
    ],
)
def test_a_misspelt_model(name: str, nearest: str) -> None:
    """mflux takes each for a checkpoint made from the model whose name it contains."""
    told = f"mflux knows no model {name!r}; did you mean {nearest}"
    result = run("info", name)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"mlx-teacache-fast info: error: {told}")
    result = run("run", "--", "mflux-generate", "--model", name, "--prompt", "x")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"mlx-teacache-fast run: error: {told}")


def test_checkpoints_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dev-mine").mkdir()
    Path("dev.txt").write_text("no model")
    for name in ("/dev/zero", "dev.txt", "./dev-yours"):
        assert run("info", name).code == 2, name
    for name in (
        "me/dev-mine",
        "dev-mine",
        str(tmp_path / "dev-mine"),
        "black-forest-labs/FLUX.2-klein-4b-fp8",
        "black-forest-labs/flux.1-dev",
    ):
        assert run("info", name).code == 0, name
    assert run("info", "mine", "--base-model", "dev").code == 0


def test_info_of_the_demonstration_model() -> None:
    result = run("info", "demo")
    assert result.code == 0
    rows = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line[0] != " ")
    assert rows["variant"] == "tiny-klein (TinyKlein, the demonstration model)"
    assert (rows["calibrated"], rows["threshold"]) == ("yes", "0.039")
    assert rows["helps"] == "at 50 steps, mflux's default: yes"
    assert "at 3 steps: no" in run("info", "demo", "--steps", 3).out


# ---- Signals

BEGUN = "mlx_teacache_fast._command\n"  # python -X importtime says that the first of our modules is there
READY = "ready"
ENTRY = f"""{LISTEN}
sys.argv[0] = "mlx-teacache-fast"
from mlx_teacache_fast.cli import main
"""
DEMO = ENTRY + "sys.exit(main())"
RUN_WITH_TINY_WEIGHTS = f"""{ENTRY}
import test_cli_run
test_cli_run.weights.__wrapped__(type("Patch", (), dict(setattr=staticmethod(setattr))))
print("{READY}", file=sys.stderr, flush=True)
sys.exit(main())
"""


def signalled(
    script: str, mark: str, number: int, delay: float, folder: Path, *arguments: Any
) -> tuple[int, str, list[str]]:
    """The exit code, stdout and lines of stderr of a process that gets a signal some seconds after it has printed."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-X", "importtime", "-c", script, *map(str, arguments)]
    log = folder.with_suffix(".log")
    with log.open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=os.environ | {"PYTHONPATH": path})
        while mark not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    lines = log.read_text().replace("\r", "\n").splitlines()
    return process.returncode, out.decode(), [line for line in lines if line and "import time:" not in line]


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3, 0.45])
def test_ctrl_c_in_the_first_half_second(tmp_path: Path, delay: float) -> None:
    """While modules are imported."""
    code, out, lines = signalled(DEMO, BEGUN, signal.SIGINT, delay, tmp_path, "demo", "sun", "--output", tmp_path)
    assert (code, out) == (130, "")
    assert lines in (["mlx-teacache-fast: error: interrupted"], ["mlx-teacache-fast demo: error: interrupted"])
    assert list(tmp_path.iterdir()) == []


def is_picture(data: bytes) -> bool:
    return Image.open(io.BytesIO(data)).load() is not None


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 17))])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_any_moment(tmp_path: Path, number: int, seed: int) -> None:
    rng = random.Random(seed)
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        names = (*PAIR, "t.json")
        for name in names:
            (folder / name).write_bytes(b"old")
        if i == 0:
            generate = [
                "mflux-generate-flux2",
                "--model",
                "flux2-klein-base-4b",
                "--prompt",
                "red apple",
                "--width",
                64,
            ]
            generate += ["--height", 64, "--steps", 12, "--seed", 1, 2, "--output", folder / "x.png"]
            given = ["run", "--trace", folder / "t.json", "--force", "--", *generate]
            code, out, lines = signalled(RUN_WITH_TINY_WEIGHTS, READY, number, rng.uniform(0, 2), folder, *given)
            lines = lines[lines.index(READY) + 1 :]
        else:
            given = ["demo", "sun", *QUICK, "--output", folder, "--force"]
            code, out, lines = signalled(DEMO, BEGUN, number, rng.uniform(0, 4), folder, *given)
        assert code in (0, 130 if number == signal.SIGINT else -number), lines
        assert "Traceback" not in out + "".join(lines)
        assert "Exception ignored" not in "".join(lines)
        assert code != 130 or lines[-1].endswith("error: interrupted")
        found = contents(folder)
        pair = [found.pop(name) for name in PAIR]
        assert pair == [b"old"] * 2 or all(map(is_picture, pair))
        if (trace := found.pop("t.json")) != b"old":
            tc.Trace.from_json(folder / "t.json")
            assert b"flux2-klein-base-4b" in trace
        if number == signal.SIGINT:  # mflux writes pictures in place
            assert all(name.startswith("x_seed_") and is_picture(data) for name, data in found.items()), found.keys()
