"""TeaCache step skipping for FLUX on MLX.

    import mlx_teacache_fast
    with mlx_teacache_fast.apply(flux) as handle:
        flux.generate_image(prompt="...", seed=42, num_inference_steps=50)
    print(handle.stats.skipped_count, handle.stats.bound)

``apply`` gates an mflux FLUX.2 pipeline; ``ops`` has the two array ops behind it, which need no mflux; ``demo`` has a
small trained model to try both on.
"""

from importlib.metadata import version as _version

import mlx.core as _mx

from ._build import MLX_VERSION as _BUILT_FOR

# MLX's C++ ABI changes in patch releases: with another MLX the extension loads and then fails or crashes.
_installed: str = _mx.__version__  # type: ignore[attr-defined]
if _installed != _BUILT_FOR:
    raise ImportError(
        f"mlx_teacache_fast was built for mlx {_BUILT_FOR}, but mlx {_installed} is installed. "
        f"Fix: pip install mlx=={_BUILT_FOR}"
    )

from . import ops
from .errors import (
    AlreadyPatchedError,
    DisabledWarning,
    IncompatibleModelError,
    InvalidStepWindowError,
    NoBenefitWarning,
    PatchLostError,
    TeaCacheError,
    TeaCacheValueError,
    TeaCacheWarning,
    UncalibratedWarning,
    UntestedVersionWarning,
)
from .handle import Handle, apply
from .stats import GenerationStats, Stats, StepRecord
from .variants import VARIANTS, Variant

__version__ = _version("mlx-teacache-fast")

__all__ = [
    "VARIANTS",
    "AlreadyPatchedError",
    "DisabledWarning",
    "GenerationStats",
    "Handle",
    "IncompatibleModelError",
    "InvalidStepWindowError",
    "NoBenefitWarning",
    "PatchLostError",
    "Stats",
    "StepRecord",
    "TeaCacheError",
    "TeaCacheValueError",
    "TeaCacheWarning",
    "UncalibratedWarning",
    "UntestedVersionWarning",
    "Variant",
    "__version__",
    "apply",
    "ops",
]
