"""``mlx-teacache-fast report``: what works on the machine at hand and what it takes, as two files to send."""

import argparse
import contextlib
import getpass
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx

from .. import _ext, ops
from .._command import FAILED
from ..errors import TeaCacheValueError, one_line, version_of
from ..files import check_writable, write_files
from .checks import CHECKS, RECORD, Row, Settings
from .shared import FILE, PROG, QUANTIZE, beside, quiet_logging

HELP = "check this package on your machine, and time it: two files to send"

DESCRIPTION = """\
Run the essential checks of this package on your machine, and time it: the gate and the branch, pictures of the
demonstration model, what a step takes, and, if one is there already, a picture of a real model. It takes a few
minutes, and downloads nothing.

Each check runs in a process of its own: one that fails, hangs or crashes does not end the others.
"""

EPILOG = """\
the files:
  FILE      everything, as JSON
  its .md   the same to read: what passed, what failed and why, what is not possible here, and the times

They say system, chip, memory and versions, and no name or path of yours. Both, attached to an issue, help most from a
machine of a kind that nobody has reported of: a Mac, an NVIDIA GPU.

the checks: {checks}

exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted
"""

Result = Literal["passed", "failed", "not possible here"]


class Outcome(NamedTuple):
    name: str
    title: str
    result: Result
    why: str | None
    seconds: float
    rows: list[Row]


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="gpu" if ops.gpu_supported() else "cpu",
        help="where MLX computes (default here: %(default)s)")
    parser.add_argument(
        "--output", **FILE, default=Path("report.json"), help="what was found, as JSON (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE and its .md")
    parser.add_argument(
        "--model", metavar="NAME",
        help="a model for the last check, by a name that mflux's --model takes; its weights must be in Hugging Face's "
        "cache (default: on a GPU the smallest one there that takes gating)")
    parser.add_argument("--quantize", "-q", **QUANTIZE, help="its weights' bits, as for mflux")
    parser.add_argument("--quick", action="store_true", help="small pictures and few repetitions: the times say little")
    parser.add_argument(
        "--checks", metavar="NAME", nargs="+", choices=CHECKS, default=list(CHECKS),
        help="only these of the checks below")
    # fmt: on
    parser.epilog = EPILOG.format(checks=" ".join(CHECKS))


def run(arguments: argparse.Namespace) -> int:
    output, page = arguments.output, beside(arguments.output, ".md")
    if page == output:
        raise TeaCacheValueError(f"{output} is to be the page beside the JSON: give the JSON another name")
    for path in (output, page):
        check_writable(path, force=arguments.force)
    if arguments.device == "gpu" and not ops.gpu_supported():
        raise TeaCacheValueError("--device gpu: MLX has none here")
    with quiet_logging():
        from ..demo import report  # noqa: F401  # before the work: is all there?
        from ..mflux import names
    from tqdm import tqdm

    model, why_none = _model(arguments)
    settings = Settings(arguments.device, arguments.quick, model, arguments.quantize)
    is_own = arguments.model is not None and not names.is_known(arguments.model)
    own = own_names(arguments.model if is_own else "")
    about = machine(settings)
    outcomes = []
    with tqdm(arguments.checks, bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}: {desc}") as bar:
        for name in bar:
            check = CHECKS[name]
            bar.set_description_str(check.title)
            why_not = why_none if name == "real_model" and model is None else None
            if check.needs_gpu and settings.device != "gpu":
                why_not = "it is about a GPU: " + ("--device gpu" if ops.gpu_supported() else "MLX has none here")
            start = time.perf_counter()
            rows: list[Row] = []
            result: Result = "not possible here"
            if why_not is None:
                result, why_not, rows = outcome(command(name, settings), check.limit)
            why = why_not and anonymous(why_not, own)
            outcomes.append(Outcome(name, check.title, result, why, time.perf_counter() - start, rows))
    asked = asdict(settings) | ({"model": "a model of your own"} if is_own else {})
    data = {"format": f"{PROG} report", "version": 1, "machine": about, "settings": asked}
    data["checks"] = [o._asdict() for o in outcomes]
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_files({output: text.encode(), page: markdown(about, outcomes).encode()}, force=arguments.force)
    for o in outcomes:
        print(f"{o.result:18}{o.title}" + (f": {o.why}" if o.why else ""))
    print(f"wrote {output} and {page}")
    return FAILED if any(o.result == "failed" for o in outcomes) else 0


# ---- A check


def command(name: str, settings: Settings) -> list[str]:
    """A process of its own for it."""
    program = "import json, sys; from mlx_teacache_fast.cli import checks as c; "
    program += "c.main(sys.argv[1], c.Settings(**json.loads(sys.argv[2])))"
    return [sys.executable, "-P", "-c", program, name, json.dumps(asdict(settings))]


def outcome(command: Sequence[str], limit: float) -> tuple[Result, str | None, list[Row]]:
    """Also where the process hangs or crashes: its result, why, and rows. ``limit`` is in seconds."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=limit, env=environment).returncode
            why = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"it did not end within {limit:g} s"
        out.seek(0)
        err.seek(0)
        records = [record.partition("\n") for record in out.read().split(RECORD)[1:]]
        rows = [json.loads(line) for line, end, _ in records if end]  # the last one may be cut off
        last = one_line((err.read().splitlines() or [""])[-1])
    if rows and "result" in rows[-1]:
        end = rows.pop()
        return end["result"], end["why"], rows
    return "failed", f"{why}: {last}" if last else why, rows


def own_names(model: str) -> list[str]:
    """Of user and host, and of ``model``: one that is none of mflux's, or "" for none."""
    found = [model, *model.split("/")]
    for ask in (getpass.getuser, lambda: Path.home().name, platform.node):
        with contextlib.suppress(ImportError, KeyError, OSError, RuntimeError):  # a user without a name or home
            found += [ask(), ask().partition(".")[0]]
    return sorted(filter(None, found), key=len, reverse=True)


def anonymous(text: str, own: Sequence[str]) -> str:
    """Without ``own`` names, and without what follows the first path: where one ends nobody can tell."""
    for name in own:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
    return re.sub(r"(?:~[\w.-]*|(?<!\w))/.*", "...", text, count=1, flags=re.S)


# ---- The real model


def _model(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    """Its name; or None, and why there is none."""
    from ..mflux import names

    asked: str | None = arguments.model
    if asked is None and arguments.device == "cpu":
        return None, "on a CPU it takes hours; --model NAME does it anyway"
    sizes = {}
    for name in names.gated_names() if asked is None else [asked]:
        try:
            _, config = names.find_text_to_image(name)
        except TeaCacheValueError:
            if asked is not None:
                raise
            continue
        if asked is not None or not names.find(name)[1].variant.distilled:
            sizes[name] = _cached(config.model_name)
    name, size = min(((n, s) for n, s in sizes.items() if s), key=lambda pair: pair[1], default=("", 0))
    if not size and asked is not None:
        raise TeaCacheValueError(f"the weights of {asked} are not in Hugging Face's cache: nothing is downloaded here")
    if not size:
        return None, "no model that can be gated is in Hugging Face's cache"
    needed = 1.25 * size * (arguments.quantize or 16) / 16 + 2e9  # some weights twice while they load; activations
    info = mx.device_info(mx.gpu if arguments.device == "gpu" else mx.cpu)  # Metal's key, CUDA's
    usable = float(info.get("max_recommended_working_set_size", info.get("total_memory", MEMORY)))
    if needed > usable:
        return None, f"{name} needs about {needed / 1e9:.0f} GB of {usable / 1e9:.0f}: --quantize 8 takes less"
    return name, None


def _cached(hub_name: str) -> int:
    """Bytes of weights in the cache; 0 if there are none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{hub_name.replace('/', '--')}" / "snapshots"
    snapshots = [[f for f in s.rglob("*.safetensors") if f.is_file()] for s in folder.glob("*")]
    return max((sum(f.stat().st_size for f in files) for files in snapshots), default=0)


# ---- The machine and the page

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine(settings: Settings) -> Row:
    """System, chip, versions: nothing that tells one machine of its kind from another."""
    extension = Path(str(_ext.__file__))
    about = {"system": f"{platform.system()} {platform.machine()}", "chip": platform.machine()}
    with contextlib.suppress(OSError, KeyError):
        if sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            about["system"] = f"macOS {platform.mac_ver()[0]}"
            about["chip"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or about["chip"]
        else:
            about["system"] = f"{platform.freedesktop_os_release()['PRETTY_NAME']} {platform.machine()}"
            if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M):
                about["chip"] = found[1]
    if settings.device == "gpu":
        about["GPU"] = " ".join(str(mx.device_info(mx.gpu).get(key, "")) for key in ("device_name", "architecture"))
    return {
        **about,
        "cores": os.cpu_count(),
        "memory, GB": round(MEMORY / 1e9, 1),
        "device": settings.device + ", --quick" * settings.quick,
        "MLX's backend": "Metal" if mx.metal.is_available() else "CUDA" if ops.gpu_supported() else "CPU",
        "Python": platform.python_version(),
        **{name: version_of(name) or "not installed" for name in ("mlx", "mflux", "mlx-teacache-fast")},
        "extension": f"{extension.parent.name}/{extension.name}",
    }


def markdown(about: Row, outcomes: Sequence[Outcome]) -> str:
    lines = [f"# {PROG} on {about.get('GPU') or about['chip']}", ""]
    lines += _table([{"": key, "here": value} for key, value in about.items()])
    lines += ["", "## Checks", ""]
    lines += _table([{"": o.title, "result": o.result, "s": round(o.seconds), "why": o.why or ""} for o in outcomes])
    for o in outcomes:
        if o.rows:
            lines += ["", f"## {o.title[0].upper()}{o.title[1:]}", "", *_table(o.rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells]]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
