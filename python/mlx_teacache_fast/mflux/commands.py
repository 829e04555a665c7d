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

from .. import arguments
from ..errors import TeaCacheValueError, TeaCacheWarning
from ..handle import Handle, apply
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

# Of these, the ones with mflux's option --config-from-metadata.
TAKING_METADATA = (
    "mflux-generate",
    "mflux-generate-flux2",
    "mflux-generate-flux2-edit",
    "mflux-generate-in-context",
    "mflux-generate-kontext",
    "mflux-generate-redux",
)

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
def with_options_of(like: Metadata | None) -> Iterator[None]:
    """Until the end of the block, the command in ``sys.argv`` takes what it is not given from a picture's metadata."""
    if like is None:
        yield
        return
    if (name := sys.argv[0]) not in TAKING_METADATA:
        warnings.warn(
            f"{name} has no --config-from-metadata: prompt, model, seed, steps and size are as you give them",
            category=TeaCacheWarning,
            stacklevel=2,
        )
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "like.json"
        path.write_text(json.dumps(like.mflux), encoding="utf-8")
        with called_as([name, "--config-from-metadata", str(path), *sys.argv[1:]]):
            yield


@contextmanager
def gating(options: Mapping[str, Any], handles: list[Handle]) -> Iterator[None]:
    """Until the end of the block, every FLUX pipeline that is made is gated; its handle is added to ``handles``.

    A command of mflux makes its pipeline and uses it in one function, and no hook of mflux lies between. So
    ``__init__`` of the classes is wrapped for that time: the one place where classes are changed, not instances, and
    only in a process that is there for one command. (Another name in the command's module would miss pipelines that
    are made elsewhere, and nobody would notice.) The parser's ``parse_args`` is wrapped too: steps that cannot be gated
    are refused before weights are loaded.
    """
    patch.require_kernels()
    with ExitStack() as undo:
        undo.callback(setattr, CommandLineParser, "parse_args", CommandLineParser.parse_args)
        CommandLineParser.parse_args = _checked(CommandLineParser.parse_args, options)
        for family in patch.FAMILIES:
            for pipeline in family.PIPELINES:
                undo.callback(setattr, pipeline, "__init__", pipeline.__init__)
                pipeline.__init__ = _gated_from_the_start(pipeline, options, handles)
        yield


def _checked(parse_args: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    settings = {name: options[name] for name in _OF_A_SCHEDULE if name in options}
    if options.get("steps") is not None:
        settings["plan"] = arguments.plan(options["steps"])

    @functools.wraps(parse_args)
    def checked(*args: Any, **kwargs: Any) -> Any:
        namespace = parse_args(*args, **kwargs)
        # How many steps image-to-image leaves out is known to its pipeline only.
        if namespace.steps is not None and getattr(namespace, "image_path", None) is None:
            arguments.check_schedule(namespace.steps, namespace.steps, **settings)
        return namespace

    return checked


def _gated_from_the_start(pipeline: Any, options: Mapping[str, Any], handles: list[Handle]) -> Callable[..., None]:
    original = pipeline.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        config = given.arguments.get("model_config")
        if config is not None:  # without one, mflux's class chooses a model that it was made for
            patch.match_config(config, pipeline)  # raises before weights are loaded
        original(self, *args, **kwargs)
        handles.append(apply(self, **options))

    return init
