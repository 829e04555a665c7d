"""mflux's names of models, and what they are gated as. Nothing is loaded or downloaded."""

import difflib
import os
from typing import Any

from mflux.cli.defaults.defaults import model_choices, model_inference_steps
from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig
from mflux.utils.exceptions import InvalidBaseModel, ModelConfigError

from ..errors import TeaCacheValueError, shown
from .families import FAMILIES, Match, match


def find(name: str, base_model: str | None = None) -> tuple[ModelConfig, Match]:
    """Of the model that mflux's ``--model`` and ``--base-model`` name, as the family's text-to-image runs it.

    Raises:
        TeaCacheValueError: mflux does not know it, or it is none that can be gated.
    """
    if base_model is None:
        check_spelling(name)
    elif not is_known(base_model):  # mflux does not look at it where it knows the name
        raise _unknown(base_model)
    try:
        config = ModelConfig.from_name(name, base_model)
    except InvalidBaseModel:
        raise _unknown(str(base_model)) from None
    except ModelConfigError:
        raise _unknown(name, _OTHER) from None
    family = next((family for family in FAMILIES if set(config.aliases) & set(family.models)), None)
    if family is None:
        raise TeaCacheValueError(f"{name} is none of the models that can be gated: {', '.join(gated_names())}")
    return config, match(config, family.pipelines[0])


def find_text_to_image(name: str, base_model: str | None = None) -> tuple[Any, ModelConfig]:
    """``find``, for models that the family's text-to-image pipeline runs: that class, and mflux's configuration."""
    config, (family, *_) = find(name, base_model)
    if not all(family.models[alias].text_to_image for alias in config.aliases if alias in family.models):
        raise TeaCacheValueError(f"{name} is not for text-to-image: load it in Python, in the pipeline that it is for")
    return family.pipelines[0], config


def load(name: str, base_model: str | None = None, **options: Any) -> Any:
    """The family's text-to-image pipeline with this model; ``options`` are of its class, such as ``quantize``."""
    pipeline, config = find_text_to_image(name, base_model)
    return pipeline(model_config=config, **options)


def default_steps(name: str, base_model: str | None = None) -> int:
    """What mflux runs when no steps are asked for."""
    return int(model_inference_steps(name, base_model))


def gated_names() -> list[str]:
    """One name of each model that can be gated."""
    return [alias for family in FAMILIES for alias in family.models]


_OTHER = "; for a checkpoint of another name, --base-model says what it was made from"


def check_spelling(name: str) -> None:
    """Raises TeaCacheValueError for a slip: no model of mflux, no folder, and no hub name, or almost that of a model.

    mflux would take it for a checkpoint made from the model whose name it contains, a distilled one maybe.
    """
    if is_known(name) or os.path.isdir(os.path.expanduser(name)):
        return
    is_hub_name = name.count("/") == 1 and name[0] not in "./~"  # as mflux has it
    if not is_hub_name or difflib.get_close_matches(name.lower(), map(str.lower, _hub_names()), cutoff=0.97):
        raise _unknown(name, _OTHER)


def _hub_names() -> list[str]:
    return sorted({config.model_name for config in AVAILABLE_MODELS.values()})


def is_known(name: str) -> bool:
    """By a name or hub name of mflux's own models."""
    return name in model_choices() or name.lower() in map(str.lower, _hub_names())


def _unknown(name: str, more: str = "") -> TeaCacheValueError:
    near = difflib.get_close_matches(name, [*model_choices(), *_hub_names()], cutoff=0.7)
    if not near:  # in other letters, or without its owner
        forms = {choice.lower(): choice for choice in model_choices()}
        forms |= {hub_name.rpartition("/")[2].lower(): hub_name for hub_name in _hub_names()}
        near = [forms[form] for form in difflib.get_close_matches(name.lower(), forms, cutoff=0.7)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"those that can be gated are {', '.join(gated_names())}"
    return TeaCacheValueError(f"mflux knows no model {shown(name)}; {hint}{more}")
