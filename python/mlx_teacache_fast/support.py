"""Which of mflux's pipelines can be gated, and with which coefficients: to be asked before weights are loaded."""

from dataclasses import dataclass
from types import SimpleNamespace

from .errors import IncompatibleModelError, TeaCacheValueError, how_to_install
from .models import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantInfo:
    """What is known of a model before its weights are loaded.

    Attributes:
        variant_id: What ``handle.variant_id`` will be.
        display_name: The model's name.
        default_thresh: The gate's threshold by default; None for a distilled model, of which nothing can be skipped.
        model_names: Aliases of mflux's model configurations that are gated as this variant.
        calibrated: Whether the coefficients are published for this model; if not, ``apply`` warns.
        fitted_on: Another model's ``variant_id``, if they were fitted on that one, as for klein base 9B.
    """

    variant_id: str
    display_name: str
    default_thresh: float | None
    model_names: tuple[str, ...]
    calibrated: bool
    fitted_on: str | None = None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One of mflux's pipelines.

    Attributes:
        name: Its class.
        variants: The models it can be gated with; ``calibrated`` if that is so for any of their names.
        refused: Why ``apply`` does not take it, or None.
    """

    name: str
    variants: tuple[VariantInfo, ...]
    refused: str | None = None


class Pipelines(tuple[Pipeline, ...]):
    """Rows of ``supported``; ``print`` shows them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max((len(row.name) for row in self), default=0)
        return "\n".join(f"{row.name.ljust(width)}  {_models(row)}" for row in self)


def _models(row: Pipeline) -> str:
    if row.refused is not None:
        return f"refused: {row.refused}"
    groups = [("", True), ("not calibrated: ", False)]
    ids = [(name, [_shown(v) for v in row.variants if v.calibrated == calibrated]) for name, calibrated in groups]
    return "; ".join(name + ", ".join(variant_ids) for name, variant_ids in ids if variant_ids)


def _shown(info: VariantInfo) -> str:
    return info.variant_id + (f" (fitted on {info.fitted_on})" if info.calibrated and info.fitted_on else "")


def supported() -> Pipelines:
    """mflux's pipelines: the models that each can be gated with, or why it is refused.

    Raises:
        IncompatibleModelError: mflux cannot be imported.
    """
    require_mflux()
    from .mflux.families import FAMILIES, REFUSED

    rows = []
    for family in FAMILIES:
        for pipeline in family.pipelines:
            infos = [match_variant(SimpleNamespace(aliases=[alias]), pipeline) for alias in family.models]
            best = {v.variant_id: v for v in sorted(filter(None, infos), key=lambda v: v.calibrated)}
            rows.append(Pipeline(pipeline.__name__, tuple(best[i] for i in VARIANTS if i in best)))
    rows += [Pipeline(pipeline.__name__, (), reason) for pipeline, reason in REFUSED.items()]
    return Pipelines(rows)


def match_variant(model_config: object, pipeline_class: type) -> VariantInfo | None:
    """The variant that ``apply`` would use for a model, known without its weights.

    Args:
        model_config: mflux's ``ModelConfig``; its ``aliases`` and ``base_model`` are read.
        pipeline_class: The class that will be made from it, such as ``Flux2Klein``.

    Returns:
        VariantInfo: None where ``apply`` would raise ``IncompatibleModelError``, as it does without mflux.

    Raises:
        TeaCacheValueError: ``pipeline_class`` is not a class.
    """
    if not isinstance(pipeline_class, type):
        raise TeaCacheValueError(
            f"pipeline_class must be a class such as Flux2Klein, got an object of {type(pipeline_class).__name__}"
        )
    try:
        require_mflux()
        from .mflux.families import FAMILIES, match

        _, variant, calibrated = match(model_config, pipeline_class)
    except IncompatibleModelError:
        return None
    ids = {alias: model.variant for family in FAMILIES for alias, model in family.models.items()}
    return VariantInfo(
        variant_id=variant.variant_id,
        display_name=variant.display_name,
        default_thresh=variant.default_thresh,
        model_names=tuple(alias for alias, variant_id in ids.items() if variant_id == variant.variant_id),
        calibrated=calibrated,
        fitted_on=variant.fitted_on,
    )


def require_mflux() -> None:
    """Raises IncompatibleModelError where mflux cannot be imported."""
    try:
        from .mflux import families  # noqa: F401
    except ImportError as error:
        raise IncompatibleModelError(
            f"apply needs mflux to gate a pipeline, and it cannot be imported ({error}). "
            f'Fix: {how_to_install("mflux")}; mflux before 0.24 also needs "pillow<13"'
        ) from error
