"""What is known of each model; the only place where coefficients stand.

FLUX.1 dev and schnell: ali-vilab/TeaCache (Apache-2.0). The others: fitted on real weights by the mlx-teacache project
(Apache-2.0). See NOTICE.
"""

from dataclasses import dataclass, replace
from typing import Literal

Coefficients = tuple[float, float, float, float, float]

# With coefficients of the user's.
DEFAULT_THRESHOLD = 0.20


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where what decides comes from: coefficients, plans or a rule.

    Attributes:
        source: ``builtin`` for coefficients of the table, ``published`` for plans of a model's; ``user`` for what was
            given to ``apply``, of which nothing else is known; ``rule`` for what needs nothing of the model's.
        calibration_dataset: The generations they were fitted on; None where the source does not say.
        fit_metric: What ``fit_metric_value`` is; None where the source does not say.
        fit_metric_value: Dimensionless.
        reference_url: The source.
        default_thresh: The model's threshold; None for a distilled model, which has none of its own.
    """

    source: Literal["builtin", "published", "user", "rule"]
    calibration_dataset: str | None = None
    fit_metric: str | None = None
    fit_metric_value: float | None = None
    reference_url: str | None = None
    default_thresh: float | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """Skipped steps on real weights, as published for mlx-teacache, whose rules are also ours. On an M1 Max.

    Attributes:
        steps, skipped: Of one generation.
        rel_l1_thresh, guidance: With which it was made.
        url: The source.
    """

    steps: int
    skipped: int
    rel_l1_thresh: float
    guidance: float
    url: str = "https://github.com/IonDen/mlx-teacache#benchmarks"


@dataclass(frozen=True, slots=True)
class Variant:
    """What the gate needs to know of one model.

    Attributes:
        variant_id: Also the alias of mflux's model configuration.
        display_name: The model's name.
        coefficients: Polynomial of the relative L1 distance, c4 first, dimensionless; None where none are known, and
            the gate wants some of the user's.
        calibrated_range: The distances that the polynomial was fitted on; None where it is used without limits.
        rel_l1_thresh: Default threshold on the accumulated polynomial.
        fit: Where the polynomial comes from, but for the threshold.
        distilled: Trained for a few steps, of which none can be skipped.
        published: What others measured.
        fitted_on: The ``variant_id`` of another model that the coefficients were fitted on; None where it is this one.
    """

    variant_id: str
    display_name: str
    coefficients: Coefficients | None = None
    calibrated_range: tuple[float, float] | None = None
    rel_l1_thresh: float | None = None
    fit: Provenance | None = None
    distilled: bool = False
    published: tuple[Published, ...] = ()
    fitted_on: str | None = None

    @property
    def default_thresh(self) -> float | None:
        """``rel_l1_thresh``; None for a distilled model, which has none of its own."""
        return None if self.distilled else self.rel_l1_thresh

    @property
    def provenance(self) -> Provenance:
        """Of the coefficients, where there are some."""
        return Provenance("rule") if self.fit is None else replace(self.fit, default_thresh=self.default_thresh)


def _fit(url: str | None, dataset: str | None = None, r2: float | None = None) -> Provenance:
    return Provenance("builtin", dataset, None if r2 is None else "R^2", r2, url)


_UPSTREAM = _fit("https://github.com/ali-vilab/TeaCache/blob/main/TeaCache4FLUX/teacache_flux.py")
_SCRIPTS = "https://github.com/IonDen/mlx-teacache/blob/main/scripts"
_FLUX1_FITTED_BY = f"{_SCRIPTS}/calibrate_flux1.py"
_FLUX2_FITTED_BY = f"{_SCRIPTS}/calibrate_flux2.py"
_QWEN_FITTED_ON = "10 prompts, 50 steps, 768x768, guidance 4, 4-bit weights"

_FLUX1: Coefficients = (498.651651244, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_KLEIN_BASE: Coefficients = (-1841.022165607874, 848.4417137572868, -131.3554469956159, 8.179509586828413, 0.0)
_KLEIN_BASE_RANGE = (0.028261402621865273, 0.21984468400478363)
_KLEIN_BASE_4B_FIT = _fit(_FLUX2_FITTED_BY, "10 prompts, 25 steps, 512x512, guidance 1, base-4b", 0.10643408169124158)

# fmt: off
_ALL = (
    Variant(
        "flux1-dev", "FLUX.1 dev", _FLUX1, None, 0.20, _UPSTREAM, published=(
            Published(25, 6, 0.20, 3.5),
            Published(25, 11, 0.25, 3.5, "https://github.com/IonDen/mlx-teacache#threshold-guide"))),
    Variant(
        "flux1-schnell", "FLUX.1 schnell", _FLUX1, None, 0.20, _UPSTREAM, distilled=True, fitted_on="flux1-dev"),
    Variant(
        "flux1-krea-dev", "FLUX.1 Krea dev",
        (24.18037744588824, -45.41912128506917, 26.20213376107934, -3.579234954660995, 0.40140693642366004), None, 0.30,
        _fit(_FLUX1_FITTED_BY, "10 prompts, 28 steps, 512x512, guidance 4.5, 4-bit weights", 0.6817),
        published=(Published(28, 10, 0.30, 4.5),)),
    Variant(
        "flux2-klein-4b", "FLUX.2 klein 4B",
        (236.9190176127698, -201.47401360106662, 66.91354236854073, -11.14796738073235, 1.2674506310647067),
        (0.2001, 0.4253), 0.20,
        _fit(_FLUX2_FITTED_BY, "10 prompts, 8 steps, 512x512, guidance 1", 0.6530168924992779),
        distilled=True, published=(Published(8, 0, 0.20, 1.0),)),
    # Without its range this polynomial goes negative above 0.475 and prices a large change as none.
    Variant(
        "flux2-klein-9b", "FLUX.2 klein 9B",
        (-523.8412980807129, 530.2492512602308, -177.64385734082498, 20.893264957040557, 0.0),
        (0.1316, 0.4498), 0.20,
        _fit(_FLUX2_FITTED_BY, "10 prompts, 8 steps, 512x512, guidance 1", 0.4710289350635284),
        distilled=True, published=(Published(8, 0, 0.20, 1.0),)),
    Variant(
        "flux2-klein-base-4b", "FLUX.2 klein base 4B", _KLEIN_BASE, _KLEIN_BASE_RANGE, 0.17, _KLEIN_BASE_4B_FIT,
        published=(Published(50, 8, 0.17, 4.0),)),
    Variant(
        "flux2-klein-base-9b", "FLUX.2 klein base 9B", _KLEIN_BASE, _KLEIN_BASE_RANGE, 0.17, _KLEIN_BASE_4B_FIT,
        published=(Published(50, 13, 0.17, 4.0),), fitted_on="flux2-klein-base-4b"),
    Variant(
        "qwen-image", "Qwen-Image",
        (-12.954226906135869, 8.883805167578382, -0.9363839862290331, 1.4538816050570036, 0.0),
        (0.04675976472922664, 0.587799896108221), 0.30,
        _fit(f"{_SCRIPTS}/calibrate_qwen.py", _QWEN_FITTED_ON, 0.8490), published=(Published(50, 33, 0.30, 4.0),)),
    Variant(
        "qwen-image-2512", "Qwen-Image-2512",
        (-13.200421839759947, 4.851407025105924, 2.4891133197469846, 0.2453630032662089, 0.0),
        (0.08094493952514002, 0.4705715918534816), 0.25,
        _fit(f"{_SCRIPTS}/calibrate_qwen.py", _QWEN_FITTED_ON, 0.8183), published=(Published(50, 29, 0.25, 4.0),)),
    # Its signal is what the first layer adds.
    Variant(
        "z-image-base", "Z-Image base",
        (-898.9907628349583, 367.7086118008557, -45.41511572598643, 3.95114319842774, 0.0),
        (0.027887196237753466, 0.25914120883567665), 0.12,
        _fit(
            f"{_SCRIPTS}/calibrate_z_image.py", "10 prompts, 50 steps, 512x512, guidance 4, 8-bit weights",
            0.3997548048012458),
        published=(Published(50, 15, 0.12, 4.0),)),
    # Of these no coefficients are known.
    *(Variant(variant_id, name) for variant_id, name in (
        ("qwen-image-edit", "Qwen-Image-Edit"), ("qwen-image-2.1", "Qwen-Image-2.1"),
        ("qwen-image-2.1-controlnet-union", "Qwen-Image-2.1 with ControlNet"),
        ("flux3-image-klein-base", "FLUX.3 klein base"), ("fibo", "FIBO"), ("fibo-edit", "FIBO Edit"),
        ("fibo2", "FIBO 2"), ("ernie-image", "ERNIE-Image"), ("krea-2-raw", "Krea 2"), ("ideogram-4-fp8", "Ideogram 4"),
        ("iris-3b-base", "Iris 3B base"), ("moss-image-sft", "MOSS-Image SFT"), ("moss-image-base", "MOSS-Image base"),
        ("anima-base", "Anima base"), ("anima-aesthetic", "Anima Aesthetic"))),
    *(Variant(variant_id, name, distilled=True) for variant_id, name in (
        ("qwen-image-2.1-turbo", "Qwen-Image-2.1 turbo"),
        ("qwen-image-2.1-turbo-controlnet-union", "Qwen-Image-2.1 turbo with ControlNet"),
        ("z-image-turbo", "Z-Image turbo"), ("flux3-image-klein", "FLUX.3 klein"), ("fibo-lite", "FIBO lite"),
        ("fibo-edit-rmbg", "FIBO Edit RMBG"), ("ernie-image-turbo", "ERNIE-Image turbo"), ("krea-2", "Krea 2 turbo"),
        ("krea-2-controlnet-depth", "Krea 2 turbo with ControlNet"), ("iris-3b", "Iris 3B turbo"),
        ("anima-turbo", "Anima turbo"))),
)

# The demonstration model's, which is none of mflux's: fitted as tune does, at guidance 1 and 4 together.
TINY_KLEIN = Variant(
    "tiny-klein", "TinyKlein, the demonstration model",
    (-2930.17101180969, 1010.9950777334856, -115.62703808486184, 5.444265215457426, -0.05386055258184849),
    (0.01794624887406826, 0.16489055752754211), 0.039,
    _fit(None, "9 prompts x 1 seed, 50 steps, 128x128, guidance 1 and 4", 0.17899475894303607))
# fmt: on

VARIANTS: dict[str, Variant] = {variant.variant_id: variant for variant in _ALL}


@dataclass(frozen=True, slots=True)
class Regime:
    """A schedule that has the demonstration model's steps where another model's are: docs/forecasting.md.

    sigma = e t / (1 + (e - 1) t), t from 1 to 1 / steps, then 0. At 128x128 pixels the equivalent of a real model's e
    is e / sqrt(its tokens / 64).

    Attributes:
        name: Also mflux's name of the scheduler: ``generate_image(..., scheduler=name)``.
        shift: e, dimensionless; None for the schedule that mflux computes for the model at hand.
        says: What it stands for.
        guidance: The only one that stands for something; None for any.
    """

    name: str
    shift: float | None
    says: str
    guidance: float | None = None

    @property
    def options(self) -> dict[str, str]:
        """``generate_image``'s."""
        return {} if self.shift is None else {"scheduler": self.name}


REGIMES: dict[str, Regime] = {
    r.name: r
    for r in (
        Regime("own", None, "the model's own schedule (e = 5.0 with 50 steps, 6.0 with 25)"),
        Regime("flux2-1024", 0.94, "equivalent to FLUX.2 at 1024x1024 (e = 7.5, 4096 tokens)"),
        Regime(
            "flux1-dev-1024",
            0.4,
            "equivalent to FLUX.1 dev at 1024x1024 (e = 3.16), whose guidance is an input: one branch",
            guidance=1.0,
        ),
        Regime("beyond", 0.3, "composition earlier still"),
    )
}
