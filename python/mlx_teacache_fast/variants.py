"""Coefficients by model: the only place where they stand.

FLUX.1 dev and schnell: ali-vilab/TeaCache (Apache-2.0). The others: fitted on real weights by the mlx-teacache project
(Apache-2.0). See NOTICE.
"""

from dataclasses import dataclass

Coefficients = tuple[float, float, float, float, float]

# For a user's own coefficients, and where a variant has no threshold of its own.
DEFAULT_THRESHOLD = 0.20


@dataclass(frozen=True, slots=True)
class Variant:
    """What the gate needs to know of one model.

    Attributes:
        variant_id: Also the alias of mflux's model configuration.
        coefficients: Polynomial of the relative L1 distance, c4 first, dimensionless.
        calibrated_range: The distances that the polynomial was fitted on; None where it is used without limits.
        rel_l1_thresh: Default threshold on the accumulated polynomial.
        distilled: Trained for a few steps, of which none can be skipped.
    """

    variant_id: str
    coefficients: Coefficients
    calibrated_range: tuple[float, float] | None
    rel_l1_thresh: float
    distilled: bool = False


_FLUX1: Coefficients = (498.651651244, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_KLEIN_BASE: Coefficients = (-1841.022165607874, 848.4417137572868, -131.3554469956159, 8.179509586828413, 0.0)
_KLEIN_BASE_RANGE = (0.028261402621865273, 0.21984468400478363)

VARIANTS: dict[str, Variant] = {
    v.variant_id: v
    for v in (
        Variant("flux1-dev", _FLUX1, None, 0.20),
        Variant("flux1-schnell", _FLUX1, None, 0.20, distilled=True),
        Variant(
            "flux1-krea-dev",
            (24.18037744588824, -45.41912128506917, 26.20213376107934, -3.579234954660995, 0.40140693642366004),
            None,
            0.30,
        ),
        Variant(
            "flux2-klein-4b",
            (236.9190176127698, -201.47401360106662, 66.91354236854073, -11.14796738073235, 1.2674506310647067),
            (0.2001, 0.4253),
            0.20,
            distilled=True,
        ),
        # Without its range this polynomial goes negative above 0.475 and prices a large change as none.
        Variant(
            "flux2-klein-9b",
            (-523.8412980807129, 530.2492512602308, -177.64385734082498, 20.893264957040557, 0.0),
            (0.1316, 0.4498),
            0.20,
            distilled=True,
        ),
        Variant("flux2-klein-base-4b", _KLEIN_BASE, _KLEIN_BASE_RANGE, 0.17),
        Variant("flux2-klein-base-9b", _KLEIN_BASE, _KLEIN_BASE_RANGE, 0.17),
    )
}
