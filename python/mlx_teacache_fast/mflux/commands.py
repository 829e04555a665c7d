"""mflux's FLUX commands, called in this process with gating on."""

import difflib
import functools
import importlib
import inspect
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import EntryPoint, distribution
from pathlib import Path, PurePath
from typing import Any

from mflux.cli.parser.parsers import CommandLineParser
from mflux.models.common.config.config import Config

from .. import arguments
from ..errors import TeaCacheValueError, TeaCacheWarning
from ..handle import Handle, apply, check_settings
from ..metadata import Metadata
from . import patch

# Those that can be gated.
COMMANDS = (
    "mflux-generate",
    "mflux-generate-controlnet",
    "mflux-generate-depth",
    "mflux-generate-fill",
    "mflux-generate-flux2",
    "mflux-generate-flux2-edit",
    "mflux-generate-in-context",
    "mflux-generate-in-context-catvton",
    "mflux-generate-in-context-edit",
    "mflux-generate-kontext",
    "mflux-generate-redux",
    "mflux-upscale-controlnet",
)

# Of these, the ones whose pictures mflux's option --config-from-metadata repeats. (mflux-generate-in-context has the
# option, but writes twice the width and takes its image on the command line only.)
REPEATING = (
    "mflux-generate",
    "mflux-generate-flux2",
    "mflux-generate-flux2-edit",
    "mflux-generate-kontext",
    "mflux-generate-redux",
)

# What --config-from-metadata takes paths from, and the options that replace them.
_PATHS = {
    "image_path": ("--image-path",),
    "image_paths": ("--image-paths",),
    "redux_image_paths": ("--redux-image-paths",),
}

# Whose pipelines leave steps out in image-to-image.
_IMAGE_TO_IMAGE = ("mflux-generate", "mflux-generate-flux2")

_OF_A_SCHEDULE = ("rel_l1_thresh", "skip_first_n_steps", "skip_last_n_steps")

_FLUX_MODULES = ("mflux.models.flux.cli.", "mflux.models.flux2.cli.")


def find(name: str) -> Callable[[], Any]:
    """The function behind one of mflux's commands.

    Raises:
        TeaCacheValueError: mflux has no such command, or it has no pipeline that can be gated.
    """
    available = scripts()
    script = available.get(name)
    if script is None:
        flux = [command for command in COMMANDS if command in available]  # an older mflux has fewer
        near = difflib.get_close_matches(PurePath(name).name, flux, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its FLUX commands are {', '.join(flux)}"
        raise TeaCacheValueError(f"mflux has no command {name!r}; {hint}")
    if not script.module.startswith(_FLUX_MODULES):
        raise TeaCacheValueError(
            f"{name} is not for FLUX.1 or FLUX.2, and only those can be gated: {', '.join(COMMANDS)}"
        )
    names = vars(importlib.import_module(script.module)).values()
    for family in patch.FAMILIES:
        for pipeline, reason in family.REFUSED.items():
            if any(value is pipeline for value in names):
                raise TeaCacheValueError(f"{name} cannot be gated: {reason}")
    command: Callable[[], Any] = script.load()
    return command


def scripts() -> dict[str, EntryPoint]:
    """mflux's commands by name."""
    return {e.name: e for e in distribution("mflux").entry_points.select(group="console_scripts")}


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

    Args:
        like: Its metadata; None for no picture.
        folder: The picture's, where its own input pictures are looked for too.

    Raises:
        TeaCacheValueError: An input picture is not there any more.
    """
    if like is None:
        yield
        return
    name, *given = sys.argv
    if name not in REPEATING:
        warnings.warn(
            f"{name} takes from a picture only how it is gated: give prompt, model, seed, steps and size yourself",
            category=TeaCacheWarning,
            stacklevel=2,
        )
        yield
        return
    settings = dict(like.mflux)
    for key, options in _PATHS.items():
        if settings.get(key) and not any(argument.startswith(options) for argument in given):
            paths = settings[key]
            found = [_found(path, folder, options[0]) for path in ([paths] if isinstance(paths, str) else paths)]
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
def gating(options: Mapping[str, Any], handles: list[Handle], only: str | None = None) -> Iterator[None]:
    """Until the end of the block, every FLUX pipeline that is made is gated; its handle is added to ``handles``.

    With ``only``, pipelines of other classes are refused.

    A command of mflux makes its pipeline and uses it in one function, and no hook of mflux lies between. So
    ``__init__`` of the classes is wrapped for that time: the one place where classes are changed, not instances, and
    only in a process that is there for one command. (Another name in the command's module would miss pipelines that
    are made elsewhere, and nobody would notice.) The parser's ``parse_args`` is wrapped too: steps that cannot be gated
    are refused before weights are loaded.
    """
    with ExitStack() as undo:
        undo.callback(setattr, CommandLineParser, "parse_args", CommandLineParser.parse_args)
        CommandLineParser.parse_args = _checked(CommandLineParser.parse_args, options)
        for family in patch.FAMILIES:
            for pipeline in family.PIPELINES:
                undo.callback(setattr, pipeline, "__init__", pipeline.__init__)
                pipeline.__init__ = _gated_from_the_start(pipeline, options, handles, only)
        yield


def _checked(parse_args: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    settings = {name: options[name] for name in _OF_A_SCHEDULE if name in options}
    checked_settings = check_settings(**options)
    settings["plan"] = checked_settings.plan
    if checked_settings.budget is not None:  # any schedule will do
        settings["rel_l1_thresh"] = 0.0

    @functools.wraps(parse_args)
    def checked(*args: Any, **kwargs: Any) -> Any:
        namespace = parse_args(*args, **kwargs)
        if (steps := namespace.steps) is not None:
            left_out = 0
            if sys.argv[0] in _IMAGE_TO_IMAGE:
                strength = getattr(namespace, "image_strength", None)
                config = Config(None, steps, image_path=namespace.image_path, image_strength=strength)
                left_out = config.init_time_step
            arguments.check_schedule(max(0, steps - left_out), steps, **settings)
        return namespace

    return checked


def _gated_from_the_start(
    pipeline: Any, options: Mapping[str, Any], handles: list[Handle], only: str | None
) -> Callable[..., None]:
    original = pipeline.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if only not in (None, type(self).__name__):
            raise TeaCacheValueError(f"the picture was made by {only}, and this command runs {type(self).__name__}")
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        config = given.arguments.get("model_config")
        if config is not None:  # without one, mflux's class chooses a model that it was made for
            patch.match_config(config, pipeline)  # raises before weights are loaded
        original(self, *args, **kwargs)
        handles.append(apply(self, **options))

    return init
