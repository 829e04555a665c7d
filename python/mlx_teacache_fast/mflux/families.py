"""The table of families, and which of its values a pipeline has."""

from typing import Any, NamedTuple

from ..errors import IncompatibleModelError, TeaCacheValueError
from ..models import TINY_KLEIN, VARIANTS, Variant
from ..policy import Policy
from . import flux1, others
from .family import Command, Family
from .flux1 import FLUX1
from .flux2 import FLUX2

FAMILIES: tuple[Family, ...] = (FLUX1, FLUX2, *others.OTHERS)

COMMANDS: dict[str, Command] = dict(sorted(item for family in FAMILIES for item in family.commands.items()))
REFUSED: dict[type, str] = flux1.REFUSED | others.REFUSED

_registered: list[Family] = []


def all_families() -> tuple[Family, ...]:
    """All of them, those that were registered first."""
    return (*_registered, *FAMILIES)


def register(family: Family) -> None:
    """Have ``apply`` and ``gate_all`` gate somebody else's pipelines too, as ``family`` says.

    Raises:
        TeaCacheValueError: Its classes do not have what it names, or it is of none.
    """
    if not isinstance(family, Family) or not family.pipelines:
        raise TeaCacheValueError(f"register takes a Family of one or more pipelines, got {family!r}")
    for kind in family.pipelines:
        for name in (family.runs, *family.factories, *family.methods):
            if not callable(getattr(kind, name, None)):
                raise TeaCacheValueError(f"{kind.__name__} has no method {name!r}, which its family names")
    if family.commands:
        raise TeaCacheValueError("commands are mflux's: of a registered family none is known")
    if family.schedule is not None and family.is_several:
        raise TeaCacheValueError("is_several is for loops that tell mflux's callbacks when a step is done")
    _registered.insert(0, family)


class Match(NamedTuple):
    """What a pipeline is gated as."""

    family: Family
    variant: Variant
    calibrated: bool  # whether the coefficients are published for this model, in text-to-image


def match(model_config: Any, pipeline_class: type, by_name: bool = False) -> Match:
    """By class and by the aliases of mflux's model configuration; no weights are looked at.

    ``by_name`` takes the demonstration model for the one whose architecture it has, as mlx-teacache does.

    Raises:
        IncompatibleModelError: It cannot be gated; the message says why.
    """
    name = pipeline_class.__name__
    if pipeline_class in REFUSED and not any(pipeline_class in family.pipelines for family in _registered):
        raise IncompatibleModelError(f"apply cannot gate {name}: {REFUSED[pipeline_class]}")
    family = next((f for f in all_families() if issubclass(pipeline_class, f.pipelines)), None)
    if family is None:
        raise IncompatibleModelError(f"apply gates mflux's pipelines, which print(supported()) lists, got {name}")
    if not family.models:
        return Match(family, Variant(name, name), False)
    aliases = getattr(model_config, "aliases", None) or ()
    if TINY_KLEIN.variant_id in aliases and not by_name:
        return Match(family, TINY_KLEIN, True)
    names = [str(getattr(model_config, "model_name", None)).lower(), *aliases]
    model = next((family.models[alias] for alias in names if alias in family.models), None)
    if model is None:
        known = ", ".join(family.models)
        raise IncompatibleModelError(
            f"{name} has a model configuration with aliases {list(aliases)}, and apply knows {known}"
        )
    # mflux's own models name no base.
    is_finetune = getattr(model_config, "base_model", None) is not None and names[0] not in family.models
    here = issubclass(pipeline_class, family.pipelines[0]) and not is_finetune
    variant = VARIANTS[model.variant]
    return Match(family, variant, variant.coefficients is not None and model.fitted and here)


def fitting(policy: Policy, found: Match, name: str) -> Policy:
    """The policy with the model's values, for a class of this name. TeaCacheValueError if it is not for such ones."""
    if policy.cache == "residual" and not found.family.tap.idle:
        raise TeaCacheValueError(
            f'cache="residual" is not for {name}, whose blocks cannot be left out alone: cache="output"'
        )
    return policy.of_model(found.variant)


def uncalibrated_message(flux: Any, variant: Variant) -> str:
    """What to say of coefficients that were fitted on something else."""
    model, base = flux.model_config.model_name, getattr(flux.model_config, "base_model", None)
    used_in = model if base is not None else f"{type(flux).__name__} with {model}"
    return (
        f"{used_in} is used with the coefficients of {variant.variant_id}, fitted on "
        f"{variant.fitted_on or variant.variant_id} in text-to-image: "
        "they may not fit it, compare a few pictures with ungated ones"
    )
