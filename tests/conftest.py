"""Shared fixtures: the embedded model, run by mflux's own pipeline."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read once; newer GPUs would multiply float32 with fewer bits

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings

pytest.register_assert_rewrite("gate_cases")
settings.register_profile("no deadline", deadline=None)  # no test asserts a time
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    """The CPU, also on a Mac, but for tests marked ``gpu``."""
    wanted = mx.Device(mx.gpu if request.node.get_closest_marker("gpu") else mx.cpu)
    if not mx.is_available(wanted):
        pytest.skip("no GPU that MLX can use")
    mx.set_default_device(wanted)


@pytest.fixture(scope="session")
def flux() -> Any:
    """The demo pipeline, ungated; a test that gates it must restore it."""
    from mlx_teacache_fast import demo

    mx.set_default_device(mx.cpu)
    return demo.pipeline()


@pytest.fixture(autouse=True)
def _flux_is_left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a shared pipeline gated fails itself, not a later one."""
    flux = request.getfixturevalue("flux") if "flux" in request.fixturenames else None
    yield
    if flux is not None:
        assert "generate_image" not in vars(flux), "the test left the pipeline gated"


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture for image-to-image: a red disc on a gradient."""
    from PIL import Image

    y, x = np.mgrid[0:128, 0:128]
    rgb = np.stack([x * 2, y * 2, 255 - x], axis=-1).astype(np.uint8)
    rgb[(x - 64) ** 2 + (y - 64) ** 2 < 900] = (220, 30, 40)
    path = tmp_path_factory.mktemp("image_to_image") / "photo.png"
    Image.fromarray(rgb).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where FLUX.1 Fill paints: the middle."""
    from PIL import Image

    white = np.zeros((64, 64, 3), np.uint8)
    white[16:48, 16:48] = 255
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    Image.fromarray(white).save(path)
    return path


Generate = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def generate(flux: Any) -> Generate:
    """One image of the demo pipeline as uint8 ``(height, width, 3)``."""

    def run(**kwargs: Any) -> np.ndarray:
        arguments = dict(prompt="red apple", seed=1, height=128, width=128, guidance=1.0) | kwargs
        return np.asarray(flux.generate_image(**arguments).image)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests measured, by ``record_property``, after their dots."""
    measured: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            measured.setdefault(name, []).append(str(value))
    if measured:
        terminalreporter.section("measured")
    for name, values in sorted(measured.items()):
        count = f" ({len(values)})" if len(values) > 1 else ""
        terminalreporter.line(f"{name}{count}: {'; '.join(sorted(values))}")
