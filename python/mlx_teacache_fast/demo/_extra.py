"""One message for whichever package of the `demo` extra is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import how_to_install


@contextmanager
def demo_extra() -> Iterator[None]:
    """Imports inside name the extra when a package is missing; any other failure passes through unchanged."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("mflux", "matplotlib", "numpy", "PIL", "skimage", "tqdm"):
            raise
        message = f"the demo needs {package}, which is not installed: {how_to_install('demo')}"
        raise ImportError(message, name=package) from error
