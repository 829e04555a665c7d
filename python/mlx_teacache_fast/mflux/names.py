"""mflux's names of models, and what they are gated as. Nothing is loaded or downloaded."""

import difflib
from typing import Any

from mflux.cli.defaults.defaults import model_choices, model_inference_steps
from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig
from mflux.utils.exceptions import InvalidBaseModel, ModelConfigError

from ..errors import TeaCacheValueError
from .families import FAMILIES, Match, match


def find(name: str, base_model: str | None = None) -> tuple[ModelConfig, Match]:
    """Of the model that mflux's ``--model`` and ``--base-model`` name, as the family's text-to-image runs it.

    Raises:
        TeaCacheValueError: mflux does not know it, or it is none that can be gated.
    """
    try:
        config = ModelConfig.from_name(name, base_model)
    except InvalidBaseModel:
        raise TeaCacheValueError(_unknown(str(base_model))) from None
    except ModelConfigError:
        message = f"{_unknown(name)}; for a checkpoint of another name, --base-model says what it was made from"
        raise TeaCacheValueError(message) from None
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


def _unknown(name: str) -> str:
    hub_names = {config.model_name for config in AVAILABLE_MODELS.values()}
    near = difflib.get_close_matches(name, [*model_choices(), *sorted(hub_names)], cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else f"those that can be gated are {', '.join(gated_names())}"
    return f"mflux knows no model {name!r}; {hint}"
