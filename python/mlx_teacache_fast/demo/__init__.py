"""A tiny trained model with FLUX.2's architecture, for trying the package without any download.

    import mlx_teacache_fast
    from mlx_teacache_fast import demo

    flux = demo.pipeline()
    with mlx_teacache_fast.apply(flux) as handle:
        image = flux.generate_image(seed=1, prompt="red apple", num_inference_steps=50,
                                    height=demo.SIZE, width=demo.SIZE, guidance=4.0)
    image.save("apple.png")
    print(handle.stats.last_generation)

`flux.captions` lists prompts that work, and `demo.REGIMES` the schedules that stand for other models':
`scheduler="flux2-1024"` of `generate_image`. It is a demonstration and a test bed: its numbers are not FLUX's.
"""

import mlx.core as mx

from ..errors import TeaCacheValueError, shown
from ..models import REGIMES
from ._extra import demo_extra

with demo_extra():
    from . import regimes  # noqa: F401  # registers their schedulers with mflux
    from .tiny_klein import SIZE, TinyKlein

__all__ = ["REGIMES", "SIZE", "TinyKlein", "pipeline"]


def pipeline(dtype: mx.Dtype = mx.float32) -> TinyKlein:
    """The demonstration model in mflux's own FLUX.2 pipeline (``Flux2Klein``), from the weights in this package.

    Args:
        dtype: The transformer's type; bfloat16 is slow on a CPU.
    Returns:
        TinyKlein: Call ``generate_image`` with height and width ``demo.SIZE`` (128 pixels). ``captions`` and ``words``
        say which prompts it knows.
    Raises:
        TeaCacheValueError: ``dtype`` is another.
    """
    types = (mx.float32, mx.float16, mx.bfloat16)
    if not isinstance(dtype, mx.Dtype) or dtype not in types:
        raise TeaCacheValueError(f"dtype must be one of {', '.join(map(str, types))}, got {shown(dtype)}")
    return TinyKlein.load(dtype=dtype)
