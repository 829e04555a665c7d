"""What the commands share: exit codes, kinds of arguments, how warnings are shown; models and prompts to tune on."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

from .. import support
from .._command import BAD_INPUT, interrupted_at_once
from .._command import PROG as PROG
from ..errors import IncompatibleModelError, TeaCacheError, TeaCacheValueError, TeaCacheWarning, one_line
from ..policy import MAX_STEPS


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def number(kind: type[int] | type[float], rule: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):  # every comparison with NaN is false
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text[:200]}")
        return value

    return convert


# Kinds of options, as argparse's keywords.
COUNT: dict[str, Any] = dict(
    metavar="N", type=number(int, f"a whole number from 1 to {MAX_STEPS}", lambda n: 1 <= n <= MAX_STEPS)
)
FILE: dict[str, Any] = dict(metavar="FILE", type=Path)
GUIDANCE: dict[str, Any] = dict(
    metavar="G", type=number(float, "a finite number of at least 1", lambda g: 1 <= g < math.inf)
)
SEED: dict[str, Any] = dict(
    metavar="N", type=number(int, "a whole number from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64), default=1
)


def flag(setting: Field[Any]) -> str:
    return setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"


def add_setting(parser: argparse.ArgumentParser, setting: Field[Any]) -> None:
    """The option of a policy's setting; not in the namespace unless it is given."""
    name, option = setting.name, dict(setting.metadata["option"])
    convert: Any = option.get("type", str)

    def checked(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text  # which the check refuses, and says what it wants
        try:
            return setting.metadata["check"](name, value)
        except TeaCacheValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    if not option.keys() & {"action", "choices", "nargs"}:
        option["type"] = checked
    parser.add_argument(flag(setting), dest=name, default=argparse.SUPPRESS, help=setting.metadata["says"], **option)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """For imports of mflux: transformers, which it imports, misses PyTorch in its log. Nothing here does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with interrupted_at_once(True):
            yield
    finally:
        logging.disable(before)


def require_mflux() -> None:
    """Raises TeaCacheError where mflux cannot be imported: no fault of what the user typed."""
    try:
        support.require_mflux()
    except IncompatibleModelError as error:
        raise TeaCacheError(str(error)) from error


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """This package's warnings, each text once, above the progress bar instead of across it."""
    from tqdm import tqdm

    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, TeaCacheWarning):
            show_others(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            tqdm.write(f"{PROG}: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        show_others = warnings.showwarning
        warnings.simplefilter("always", TeaCacheWarning)
        warnings.showwarning = show
        yield


# ---- What ``search`` and ``calibrate`` share: the model, the prompts, and ``generate_image``'s options

DEMO = "demo"

PROMPTS = (
    "a red apple on a wooden table, morning light",
    "a street market in the rain at night, neon signs",
    "portrait of an old fisherman with a grey beard, studio light",
    "a snow-covered mountain above a lake, aerial photograph",
    "watercolour of a fox asleep under an oak",
    "isometric drawing of a tiny kitchen, pastel colours",
    "a steam locomotive crossing a stone bridge, autumn",
    'a shop window with the words "OPEN LATE" in gold letters',
)
N_DEMO_PROMPTS = 12

_WEIGHTS = ("quantize", "lora_paths", "lora_scales")  # options of mflux's classes


def add_model_options(parser: argparse.ArgumentParser, held_out: int) -> None:
    # fmt: off
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"a name that mflux's --model takes, such as flux2-klein-base-4b, or a path; or {DEMO}, the one in here")
    parser.add_argument("--base-model", metavar="NAME", help="the model that a checkpoint was made from, as for mflux")
    parser.add_argument("--quantize", "-q", metavar="BITS", type=int, help="the weights' bits, as for mflux")
    parser.add_argument("--lora-paths", metavar="FILE", nargs="+", help="as for mflux")
    parser.add_argument("--lora-scales", metavar="S", nargs="+", type=float, help="as for mflux")
    parser.add_argument(
        "--prompts", **FILE,
        help=f"a prompt in each line; default: {len(PROMPTS)} of ours, with {DEMO} {N_DEMO_PROMPTS} of its captions")
    parser.add_argument(
        "--held-out", **COUNT, default=held_out,
        help="the last N prompts are not learnt from, but tried at the end (default: %(default)s)")
    parser.add_argument("--steps", **COUNT, default=50, help="of a picture (default: %(default)s)")
    parser.add_argument(
        "--size", **COUNT | {"metavar": "PIXELS"}, help=f"side of the pictures (default: 512, with {DEMO} 128)")
    parser.add_argument("--seed", **SEED, help="of the starting noise (default: %(default)s)")
    # fmt: on


def check(arguments: argparse.Namespace) -> None:
    """What can be said before weights are loaded."""
    from ..mflux import names

    if arguments.prompts is not None or arguments.model != DEMO:
        _split(arguments, _prompts(arguments, PROMPTS))
    if arguments.model != DEMO:
        names.find_text_to_image(arguments.model, arguments.base_model)
    elif wrong := [n for n in ("base_model", *_WEIGHTS) if getattr(arguments, n) is not None]:
        raise TeaCacheValueError(f"the demonstration model takes no --{wrong[0].replace('_', '-')}")


def load(arguments: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any]]:
    """The pipeline, the prompts to learn from, and the other arguments of ``search`` and ``calibrate`` but guidance."""
    from ..mflux import names

    size = arguments.size or (128 if arguments.model == DEMO else 512)
    if arguments.model == DEMO:
        from .. import demo
        from ..demo.compare import check_prompts

        flux: Any = demo.pipeline()
        captions = [caption for group in flux.captions.values() for caption in group]
        found = _prompts(arguments, captions[:: len(captions) // N_DEMO_PROMPTS][:N_DEMO_PROMPTS])  # of all groups
        check_prompts(flux, found)
    else:
        weights = {name: getattr(arguments, name) for name in _WEIGHTS}
        flux = names.load(arguments.model, arguments.base_model, **weights)
        found = _prompts(arguments, PROMPTS)
    learnt, held_out = _split(arguments, found)
    options = {"num_inference_steps": arguments.steps, "height": size, "width": size}
    return flux, learnt, {"held_out": held_out, "seeds": (arguments.seed,), "progress": True, **options}


def _prompts(arguments: argparse.Namespace, ours: Sequence[str]) -> list[str]:
    """Of the file, or ours."""
    if arguments.prompts is None:
        return list(ours)
    try:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TeaCacheValueError(f"{arguments.prompts} is no text in UTF-8: {error}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _split(arguments: argparse.Namespace, found: list[str]) -> tuple[list[str], list[str]]:
    """To learn from, and held out."""
    if len(found) <= arguments.held_out:
        raise TeaCacheValueError(f"{len(found)} prompts, and --held-out {arguments.held_out} leaves none of them")
    return found[: -arguments.held_out], found[-arguments.held_out :]


def default_guidance(flux: Any) -> float:
    from ..mflux import families

    return 1.0 if families.match(flux.model_config, type(flux)).variant.distilled else 4.0
