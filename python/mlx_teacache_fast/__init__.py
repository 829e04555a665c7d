"""TeaCache step skipping for FLUX on MLX.

    import mlx_teacache_fast
    with mlx_teacache_fast.apply(flux) as handle:
        flux.generate_image(prompt="...", seed=42, num_inference_steps=50)
    print(handle.stats.skipped_count, handle.stats.bound)

``apply`` gates an mflux FLUX pipeline, and ``tune`` finds how to do that best; ``ops`` has the two array ops behind it,
which need no mflux; ``demo`` has a small trained model to try all on.
"""

from . import _command  # noqa: F401  # before all that takes time

# isort: split
import json as _json
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING

try:
    import mlx.core as _mx
except ImportError as _error:
    if "libcuda.so" in str(_error) or "CUDA" in str(_error):  # no driver; one that is too old, or no GPU
        raise ImportError(
            f"MLX's CUDA build cannot be used here: {_error}. "
            "Fix: an NVIDIA GPU and its driver, 580 or newer; or, to run on the CPU: "
            f"pip uninstall mlx-cuda-13 && pip install --force-reinstall --no-deps mlx-cpu=={_version('mlx')}"
        ) from _error
    if "libmlx.so: cannot open" in str(_error):
        raise ImportError(
            "MLX is installed without its library for this machine (libmlx.so). "
            f'Fix: pip install "mlx[cuda13]=={_version("mlx")}" for an NVIDIA GPU, or "mlx[cpu]=={_version("mlx")}"'
        ) from _error
    raise

# MLX's C++ ABI changes in patch releases: with another MLX an extension loads and then fails or crashes. So there is
# one for each, in a folder of its own, and `_ext` is found in that of the installed MLX.
_installed: str = _mx.__version__  # type: ignore[attr-defined]
_here = _Path(__file__).parent
_built = [
    r for r in _json.loads((_here / "mlx_releases.json").read_text())["releases"] if (_here / f"mlx_{r}").is_dir()
]
if not _built:
    raise ImportError(f"mlx_teacache_fast has no extension beside {_here.name}/: install it, with pip install .")
if _installed not in _built:
    raise ImportError(
        f"mlx_teacache_fast was built for mlx {', '.join(_built)}, but mlx {_installed} is installed. "
        f"Fix: pip install mlx=={_built[-1]}"
    )
__path__.append(str(_here / f"mlx_{_installed}"))

from . import distributed, ops
from .errors import (
    AlreadyPatchedError,
    DisabledWarning,
    IncompatibleModelError,
    InternalStateError,
    InvalidStepWindowError,
    NoBenefitWarning,
    OutputError,
    TeaCacheError,
    TeaCacheValueError,
    TeaCacheWarning,
    UncalibratedWarning,
    UntestedVersionWarning,
)
from .errors import how_to_install as _how_to_install
from .handle import Handle, apply, apply_teacache, gate_all, register
from .mflux.family import Family, modulated
from .models import VARIANTS, Provenance, Variant
from .pictures import read_metadata
from .policy import MODES, Budget, Gate, Policy, Steps, Tolerance, check_step_window
from .record.metadata import Metadata
from .record.stats import GenerationStats, Stats, StepRecord
from .record.trace import Trace, replay
from .step.tap import Signal, Tap
from .support import Pipeline, Pipelines, VariantInfo, match_variant, supported

if TYPE_CHECKING:
    from .tuning.tune import tune as tune
    from .tuning.tuned import Tuned as Tuned

# mlx-teacache's names for the same things; docs/mlx-teacache.md compares the two.
StepDecision = StepRecord
TeaCacheDisabledWarning = DisabledWarning
TeaCacheHandle = Handle
TeaCacheNoBenefitWarning = NoBenefitWarning
TeaCacheStats = Stats
TeaCacheUncalibratedCheckpointWarning = UncalibratedWarning
TeaCacheUntestedMfluxWarning = UntestedVersionWarning

__version__ = _version("mlx-teacache-fast")

# fmt: off
__all__ = [
    "MODES", "VARIANTS", "AlreadyPatchedError", "Budget", "DisabledWarning", "Family", "Gate", "GenerationStats",
    "Handle", "IncompatibleModelError", "InternalStateError", "InvalidStepWindowError", "Metadata",
    "NoBenefitWarning", "OutputError", "Pipeline", "Pipelines", "Policy", "Provenance", "Signal", "Stats",
    "StepDecision", "StepRecord", "Steps", "Tap", "TeaCacheDisabledWarning", "TeaCacheError", "TeaCacheHandle",
    "TeaCacheNoBenefitWarning", "TeaCacheStats", "TeaCacheUncalibratedCheckpointWarning",
    "TeaCacheUntestedMfluxWarning", "TeaCacheValueError", "TeaCacheWarning", "Tolerance", "Trace",
    "UncalibratedWarning", "UntestedVersionWarning", "Variant", "VariantInfo", "__version__", "apply",
    "apply_teacache", "check_step_window", "distributed", "gate_all", "match_variant", "modulated", "ops",
    "read_metadata", "register", "replay", "supported",
]
# fmt: on


def __getattr__(name: str) -> object:
    """``tune`` and ``Tuned`` need packages that the rest does without."""
    if name not in ("tune", "Tuned"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .tuning.tune import tune
        from .tuning.tuned import Tuned
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}, which is not installed: {_how_to_install('demo')}"
        raise ImportError(message, name=error.name) from error
    return tune if name == "tune" else Tuned
