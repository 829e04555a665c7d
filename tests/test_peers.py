"""What others have made for mflux, with a gated pipeline: mfluxible's server, mlx-taef's previews. `make test-peer`."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Generate
from PIL import Image
from test_cli import LISTEN

import mlx_teacache_fast as tc
from mlx_teacache_fast import demo

pytestmark = pytest.mark.slow

# The embedded model in place of FLUX.2's weights, on the CPU in the thread that makes the pictures.
SERVER = f"""{LISTEN}
import mlx.core as mx
from mflux.models.flux2.flux2_initializer import Flux2Initializer
import ranks
from mlx_teacache_fast import cli

def init(*given, **more):
    mx.set_default_device(mx.cpu)
    ranks.embedded(*given, **more)

Flux2Initializer.init = init
sys.exit(cli.main(sys.argv[1:]))
"""
STEPS = 12


def events(port: int, **given: Any) -> Iterator[dict[str, Any]]:
    """What the server sends of one picture, as it comes."""
    picture = dict(prompt="red apple", seed=1, width=64, height=64, steps=STEPS, guidance=4.0) | given
    with closing(HTTPConnection("127.0.0.1", port, timeout=100)) as connection:
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/mfluxible/v1/images/generations", json.dumps(picture), head)
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def test_mfluxibles_server(flux: Any, generate: Generate, tmp_path: Path) -> None:
    """Steps and previews as they come, a client that goes away, and a schedule too short to skip anything."""
    pytest.importorskip("mfluxible")
    small = dict(height=64, width=64, guidance=4.0)
    plain = generate(num_inference_steps=4, **small)
    with tc.apply(flux, tolerance=1.0) as handle:
        expected = generate(num_inference_steps=STEPS, **small)
    assert handle.stats.skipped_count > 2

    weights = tmp_path / "flux2-klein-base-4b-qfull" / "transformer" / "model.safetensors.index.json"
    weights.parent.mkdir(parents=True)
    weights.touch()  # so that it saves none
    settings = dict(MODEL="flux2-klein-base-4b", QUANTIZE="none", MODEL_DIR=str(tmp_path), CONFIG="none")
    log, trace = tmp_path / "log.txt", tmp_path / "trace.json"
    run, command = ["run", "--tolerance", "1", "--trace", trace], ["mfluxible-server", "--port", "0"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *run, "--", *command],
            cwd=Path(__file__).parent,
            env=os.environ | {f"MFLUXIBLE_{name}": value for name, value in settings.items()},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    with server:
        try:
            while (listens := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            port = int(listens[1])

            start, *steps, image = events(port, preview_every=6)
            assert [event["type"] for event in (start, *steps, image)] == ["start", *["thinking"] * STEPS, "image"]
            assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
            previews = {event["step"]: pixels(event["preview"]) for event in steps if "preview" in event}
            assert list(previews) == [6, 12]
            assert not np.array_equal(previews[6], expected)
            np.testing.assert_array_equal(previews[12], expected)
            np.testing.assert_array_equal(pixels(image["data"]), expected)

            with closing(events(port, seed=2)) as cancelled:
                assert [next(cancelled)["type"] for _ in range(3)] == ["start", "thinking", "thinking"]
            *_, image = events(port)
            np.testing.assert_array_equal(pixels(image["data"]), expected)

            start, *steps, image = events(port, steps=4)
            assert len(steps) == 4
            np.testing.assert_array_equal(pixels(image["data"]), plain)
            server.send_signal(signal.SIGINT)
            assert server.wait(100) == 0, log.read_text()
        finally:
            server.kill()
    made = tc.Trace.from_json(trace).generations
    assert [generation.num_steps for generation in made] == [STEPS, STEPS, STEPS, 4]  # mfluxible lets one run on
    kinds = [[step.kind for step in generation.steps] for generation in made]
    assert kinds[0] == kinds[2] == [step.kind for step in handle.stats.finished[-1].steps]
    assert "skipped" not in kinds[3]
    assert log.read_text().count("mlx-teacache-fast: warning: no possible skip") == 1


def test_mlx_taefs_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame for each step, registered before ``apply`` or after it. Its decoder has random weights."""
    pytest.importorskip("mlx_taef")
    from mlx_taef import TAEF2, download
    from mlx_taef.integrations.mflux import LivePreviewCallback

    mx.random.seed(0)
    weights = tmp_path / "decoder.safetensors"
    TAEF2().decoder.save_weights(str(weights))
    monkeypatch.setattr(download, "get_or_convert", lambda *_, **__: weights)
    flux = demo.pipeline()

    def preview(name: str) -> LivePreviewCallback:
        made = LivePreviewCallback(flux=flux, numbered_frames=True, on_error="raise", save_to=tmp_path / f"{name}.png")
        flux.callbacks.register(made)
        return made

    def frames(*previews: LivePreviewCallback) -> list[list[np.ndarray]]:
        flux.generate_image(1, "red apple", num_inference_steps=8, height=64, width=64, guidance=1.0)
        return [[np.asarray(Image.open(path)) for path in made.saved_paths] for made in previews]

    before = preview("before")
    (plain,) = frames(before)
    with tc.apply(flux, tolerance=1e-9):
        np.testing.assert_array_equal(frames(before), [plain])
    with tc.apply(flux, steps="11101101"):
        gated, others = frames(before, preview("after"))
    np.testing.assert_array_equal(others, gated)
    assert [np.array_equal(a, b) for a, b in zip(gated, plain, strict=True)] == [True] * 3 + [False] * 5
    np.testing.assert_array_equal(frames(before), [plain])
