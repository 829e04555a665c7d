"""mflux's commands, called in this process with gating on."""

import difflib
import functools
import importlib
import inspect
import json
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path, PurePath
from typing import Any, cast

from mflux.cli.defaults.defaults import QUANTIZE_CHOICES
from mflux.cli.parser.parsers import CommandLineParser
from mflux.models.common.config.config import Config
from mflux.utils.exceptions import ModelConfigError
from mflux.utils.image_util import ImageUtil

from ..errors import (
    NoBenefitWarning,
    TeaCacheError,
    TeaCacheValueError,
    TeaCacheWarning,
    one_line,
    shown,
    warn_caller,
)
from ..files import uninterrupted
from ..policy import FLOAT32_MAX, MAX_STEPS, Policy
from ..record.metadata import Metadata
from . import names
from .families import COMMANDS, REFUSED, all_families, fitting, match
from .hook import LEAVES_OUT, refused_argument

# What --config-from-metadata takes paths from; options of these names replace them.
_PATHS = ("image_path", "image_paths", "redux_image_paths")

# The rule and the check of a value of the metadata; mflux's parser takes any.
_Check = tuple[str, Callable[[Any], bool]]
_TEXT: _Check = ("a text", lambda v: isinstance(v, str))
_TEXTS: _Check = ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(e, str) for e in v))
_NUMBER: _Check = ("a finite number", lambda v: type(v) in (int, float) and abs(v) <= FLOAT32_MAX)
_NUMBERS: _Check = ("a list of finite numbers", lambda v: isinstance(v, list) and all(_NUMBER[1](e) for e in v))
_FLAG: _Check = ("true or false", lambda v: isinstance(v, bool))


def _whole(least: int, most: int) -> _Check:
    return f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most


_TAKEN: dict[str, _Check] = {
    **dict.fromkeys(("model", "model_path", "base_model", "prompt", "negative_prompt"), _TEXT),
    **dict.fromkeys(("image_path", "mask_path", "masked_image_path", "controlnet_image_path"), _TEXT),
    **dict.fromkeys(("image_paths", "lora_paths"), _TEXTS),
    **dict.fromkeys(("lora_scales", "redux_image_strengths"), _NUMBERS),
    **dict.fromkeys(("guidance", "image_strength", "controlnet_strength", "pid_degrade_sigma"), _NUMBER),
    **dict.fromkeys(("float32", "pid_decode", "use_kv_cache"), _FLAG),
    **dict.fromkeys(("width", "height"), _whole(16, 16384)),
    "redux_image_paths": ("a list of texts", lambda v: isinstance(v, str) or _TEXTS[1](v)),  # a text in older pictures
    "seed": _whole(0, 2**64 - 1),
    "steps": _whole(1, MAX_STEPS),
    "quantize": (f"one of {sorted(QUANTIZE_CHOICES)}", lambda v: type(v) is int and v in QUANTIZE_CHOICES),
}


def find(name: str) -> Callable[[], Any]:
    """What runs a command: one of mflux's, a Python file, or any other package's console script.

    Raises:
        TeaCacheValueError: There is no such command, or it is mflux's and has no pipeline that can be gated.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise TeaCacheValueError(f"there is no file {name}")
        return functools.partial(_run_script, Path(name))
    available = scripts()
    script = available.get(name)
    if script is None and (others := tuple(entry_points(group="console_scripts", name=name))):
        return cast(Callable[[], Any], others[0].load())
    gated = [command for command in COMMANDS if command in available]  # an older mflux has fewer
    if script is None:
        near = difflib.get_close_matches(PurePath(name).name, gated, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else f"those that can be gated are {', '.join(gated)}"
        raise TeaCacheValueError(f"mflux has no command {name!r}; {hint}")
    if name not in gated:
        names = vars(importlib.import_module(script.module)).values()
        why = next((REFUSED[value] for value in names if isinstance(value, type) and value in REFUSED), None)
        all_gated = ", ".join(gated)
        raise TeaCacheValueError(f"{name} cannot be gated: {why or f'those that can be are {all_gated}'}")
    command: Callable[[], Any] = script.load()
    return command


def _run_script(path: Path) -> None:
    """As ``python path`` does."""
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.path[:] = before


def call(command: Callable[[], Any]) -> Any:
    """What it returns; TeaCacheValueError where mflux refuses a model."""
    try:
        return command()
    except ModelConfigError as error:
        raise TeaCacheValueError(f"mflux refuses the model: {error}") from error


def scripts() -> dict[str, EntryPoint]:
    """mflux's commands by name, or those of a fork in its place."""
    found = entry_points(group="console_scripts")
    return {e.name: e for e in found if e.module.partition(".")[0] == "mflux"}


@contextmanager
def called_as(command_line: Sequence[str]) -> Iterator[None]:
    """mflux reads ``sys.argv`` in several places."""
    before = sys.argv
    sys.argv = list(command_line)
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def with_options_of(like: Metadata | None, folder: Path) -> Iterator[None]:
    """Until the end of the block, the command in ``sys.argv`` takes what it is not given from a picture's metadata.

    ``like`` is None where there is no picture. Those that it was made from are looked for in ``folder`` too;
    TeaCacheValueError if one is not there any more.
    """
    if like is None:
        yield
        return
    name, *given = sys.argv
    if name not in COMMANDS or not COMMANDS[name].repeats:
        message = f"{name} takes from a picture only how it is gated: give prompt, model, seed, steps and size yourself"
        warnings.warn(message, TeaCacheWarning, stacklevel=2)
        yield
        return
    settings = {name: value for name, value in like.mflux.items() if value is not None}
    for key, (rule, accepts) in _TAKEN.items():
        if (value := settings.get(key)) is not None and not accepts(value):
            raise TeaCacheValueError(f"{key} in the picture's metadata must be {rule}, got {shown(value)}")
    for key in _PATHS:
        option = f"--{key.replace('_', '-')}"
        instead = {option, "--image"} if key == "image_path" else {option}
        if settings.get(key) and not any(argument.partition("=")[0] in instead for argument in given):
            paths = settings[key]
            found = [_found(path, folder, option) for path in ([paths] if isinstance(paths, str) else paths)]
            settings[key] = found[0] if isinstance(paths, str) else found
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "like.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        with called_as([name, "--config-from-metadata", str(path), *given]):
            yield


def _found(path: str, folder: Path, option: str) -> str:
    for place in (Path(path), folder / path):
        if place.is_file():
            return str(place)
    raise TeaCacheValueError(f"the picture was made from {path}, which is not there: give it with {option}")


@contextmanager
def gating(
    gate: Callable[[Any], object],
    policy: Policy,
    only: str | None = None,
    seeds: Callable[[list[int]], list[int]] | None = None,
    is_written: bool = True,
    names_weights: bool = False,
) -> Iterator[None]:
    """Until the end of the block, ``gate`` is called with every pipeline that is made and can be gated.

    With ``only``, pipelines of other classes are refused. ``seeds`` gives what a command takes for its seeds. Unless
    ``is_written``, no picture is that mflux writes by ``ImageUtil``: the stepwise handler's composites are. With
    ``names_weights``, an error of files that are missing becomes one that says whose they are.

    A program makes its pipeline and uses it in one function, and no hook of mflux lies between. So ``__init__`` of the
    classes is wrapped for that time: the one place where classes are changed, not instances. (Another name in the
    program's module would miss pipelines that are made elsewhere, and nobody would notice.) The parser's ``parse_args``
    is wrapped too: steps that the policy cannot gate are refused before weights are loaded. And Ctrl-C waits while
    mflux writes a picture, which it does in place.
    """
    with ExitStack() as undo:
        save = vars(ImageUtil)["save_image"]
        undo.callback(setattr, ImageUtil, "save_image", save)
        written = uninterrupted()(save.__func__) if is_written else lambda *args, **kwargs: None
        ImageUtil.save_image = staticmethod(written)
        undo.callback(setattr, CommandLineParser, "parse_args", CommandLineParser.parse_args)
        CommandLineParser.parse_args = _checked(CommandLineParser.parse_args, policy, seeds)
        gated = [kind for family in all_families() for kind in family.pipelines]
        for pipeline in dict.fromkeys((*gated, *REFUSED)):
            own = vars(pipeline).get("__init__")  # or a base class's
            undo.callback(*((delattr, pipeline, "__init__") if own is None else (setattr, pipeline, "__init__", own)))
            init = _gated_from_the_start(pipeline, gate, policy, only, gated, names_weights)
            pipeline.__init__ = init  # type: ignore[misc]
        yield


def _checked(parse_args: Any, policy: Policy, seeds: Callable[[list[int]], list[int]] | None) -> Callable[..., Any]:
    @functools.wraps(parse_args)
    def checked(*args: Any, **kwargs: Any) -> Any:
        namespace = parse_args(*args, **kwargs)
        if (model := getattr(namespace, "model", None)) is not None and getattr(namespace, "base_model", None) is None:
            names.check_spelling(model)
        for name in LEAVES_OUT:
            if getattr(namespace, name, None):
                raise TeaCacheValueError(refused_argument(name, getattr(namespace, name), "this command"))
        steps, command = getattr(namespace, "steps", None), COMMANDS.get(sys.argv[0])
        if steps is not None and command is not None and command.says_steps:
            left_out = 0
            if command.leaves_out_steps:
                strength = getattr(namespace, "image_strength", None)
                config = Config(None, steps, image_path=getattr(namespace, "image_path", None), image_strength=strength)
                left_out = config.init_time_step
            policy.rule.check_schedule(max(0, steps - left_out), steps)
        if seeds is not None and isinstance(getattr(namespace, "seed", None), list):
            namespace.seed = seeds(namespace.seed)
        return namespace

    return checked


def _gated_from_the_start(
    pipeline: Any,
    gate: Callable[[Any], object],
    policy: Policy,
    only: str | None,
    gated: Sequence[type],
    names_weights: bool,
) -> Callable[..., None]:
    original = pipeline.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kinds = type(self).__mro__
        if next(kind for kind in kinds if kind in gated or kind in REFUSED) is not pipeline:  # of a base class
            original(self, *args, **kwargs)
            return
        if only not in (None, type(self).__name__):
            raise TeaCacheValueError(f"the picture was made by {only}, and this command runs {type(self).__name__}")
        if pipeline not in gated:
            original(self, *args, **kwargs)
            warn_caller(f"this {pipeline.__name__} is not gated: {REFUSED[pipeline]}", NoBenefitWarning)
            return
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        config = given.arguments.get("model_config")
        if config is not None:  # without one, mflux's class chooses a model that it was made for
            fitting(policy, match(config, pipeline), pipeline.__name__)  # raises before weights are loaded
        try:
            original(self, *args, **kwargs)
        except Exception as error:
            if not names_weights or not is_of_files(error):
                raise
            name = given.arguments.get("model_path") or getattr(config, "model_name", pipeline.__name__)
            missing = TeaCacheError(f"the weights of {name} are not there: {one_line(error)}")
            missing.add_note(
                f"mflux downloads {name} at the first use; if its owner asks for consent, give it on the model's page, "
                'and log in with "hf auth login". --verbose says more'
            )
            raise missing from error
        gate(self)

    return init


def is_of_files(error: BaseException | None) -> bool:
    """Whether something is not there, or could not be downloaded."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, FileNotFoundError) or package in ("huggingface_hub", "httpx", "requests"):
            return True
        error = error.__cause__ or error.__context__
    return False
