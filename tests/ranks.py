"""One process of several, for test_distributed.py: does what a file says, one job after the other.

``python ranks.py JOBS FOLDER``: JOBS is JSON, a list of ``["run", arguments of mlx-teacache-fast ...]``, ``["tune", the
same]``, ``["dies", N, arguments ...]``, whose rank 1 kills itself after N pictures, ``["latents"]``, ``["errors"]`` and
``["gone"]``. What came of them goes into FOLDER, for each rank. In arguments ``RANK`` is the rank's number.
["latents", NAME ...] is of other families. FLUX.2 has the embedded model's weights.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mflux.models.flux2.flux2_initializer import Flux2Initializer
from mflux.utils.image_util import ImageUtil

from mlx_teacache_fast import TeaCacheError, apply, cli, demo
from mlx_teacache_fast.distributed import Branches, check_equal, installed, world
from mlx_teacache_fast.mflux.pictures import ending

POLYNOMIAL = {"coefficients": (0.0, 0.0, 0.0, 1.0, 0.0)}
CASES: dict[str, dict[str, Any]] = {
    "tolerance 0": {"tolerance": 0.0},
    "threshold 0": {"rel_l1_thresh": 0.0, **POLYNOMIAL},
    "gate": {"rel_l1_thresh": 1.0, **POLYNOMIAL},
    "budget": {"budget": 0.5},
    "tolerance": {"tolerance": 1.0},
    "steps": {"steps": "11011001"},
}
FAMILIES = ("Flux2Klein", "QwenImage")
ONE_CALL = ("ErnieImage", "Iris")  # whose guidance is a batch, as FIBO's is


@contextlib.contextmanager
def pipeline(name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """And the arguments of its ``generate_image``."""
    more = {"num_inference_steps": 8, "guidance": 4.0}
    if name == "Flux2Klein":
        yield demo.pipeline(), {"prompt": "red apple", "seed": 1, "height": 64, "width": 64} | more
        return
    import other_pipelines  # takes seconds

    small = next(p for p in other_pipelines.PIPELINES if str(p) == name)
    with small.pipeline() as flux:
        yield flux, small.arguments(Path(__file__).parents[1] / "docs" / "demo.png") | more


def latents(group: Any, families: Sequence[str] = FAMILIES) -> dict[str, dict[str, Any]]:
    """Of each family and case: the kinds of the steps, the misses that were measured, the latents, bytes sent."""
    found = {}
    for family in families:
        with pipeline(family) as (flux, given):
            for case, settings in CASES.items():
                with apply(flux, group=group, **settings) as handle, ending(flux) as end:
                    before = bytes_sent()
                    flux.generate_image(**given)
                    sent = bytes_sent() - before
                steps = handle.stats.last_generation.steps
                found[f"{family}, {case}"] = {
                    "kinds": [step.kind for step in steps],
                    "misses": sum(step.rel_l1 is not None for step in steps),
                    "latents": np.array(end.latents.astype(mx.float32)).tolist(),
                    "sent": sent,
                }
    return found


def bytes_sent() -> int:
    """Given to all TCP connections of this process; 0 but on Linux."""
    total = 0
    for path in Path("/proc/self/fd").glob("*"):
        if not os.path.realpath(path).rpartition("/")[2].startswith("socket:"):
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            member = lambda begin, end: int.from_bytes(info[begin:end], sys.byteorder)  # noqa: B023, E731
            total += member(200, 208) - member(208, 216) + member(144, 148)  # sent, sent again, and not yet sent
    return total


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except TeaCacheError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(group: Any) -> list[str]:
    """What is refused, in two processes."""
    import flux1_pipelines
    from mflux.models.flux.variants.txt2img.flux import Flux1

    with (
        patch("mlx.core.device_info", return_value={"device_name": f"chip {group.rank()}"}),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            check_equal(group, "start", **installed())
    said = [str(warning.message) for warning in warned]

    def refused(function: Any, *args: Any, **kwargs: Any) -> None:
        said.append(error_of(function, *args, **kwargs))

    flux = demo.pipeline()
    refused(apply, flux, group=group, cache="residual")
    flux1 = flux1_pipelines.pipeline(Flux1, flux1_pipelines.transformer(flux1_pipelines.CONFIGS[Flux1]()))
    refused(apply, flux1, group=group)
    for name in ONE_CALL:
        with pipeline(name) as (other, _):
            refused(apply, other, group=group)
    refused(apply, flux, group=group, budget=0.5 if group.rank() else 0.4)
    refused(Branches(group).check_arguments, {"image_paths": [Path("same.png"), Path(f"{group.rank()}.png")]})
    with apply(flux, group=group) as handle:
        given = dict(num_inference_steps=8, height=64, width=64)
        refused(flux.generate_image, 1, "red apple", guidance=1.0, **given)
        refused(flux.generate_image, 1, f"apple of rank {group.rank()}", guidance=4.0, **given)
        said.append(str(handle.stats.generations))
        flux.generate_image(1, "red apple", guidance=4.0, **given)  # is as if nothing had been
        said.append(str(handle.stats.generations))
    return said


def gone(group: Any) -> str:
    """Rank 1 dies in a step of a picture that both make: what rank 0 says."""
    flux = demo.pipeline()
    if group.rank() == 1:
        flux.callbacks.register(SimpleNamespace(call_in_loop=lambda **_: os.kill(os.getpid(), signal.SIGKILL)))
    with apply(flux, group=group):
        return error_of(flux.generate_image, 1, "apple", num_inference_steps=8, height=64, width=64, guidance=4.0)


def _run(arguments: list[str]) -> dict[str, Any]:
    arguments = [argument.replace("RANK", os.environ["MLX_RANK"]) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "ended": time.time_ns()}


@contextlib.contextmanager
def _dying(after: int) -> Iterator[None]:
    """Rank 1, after so many pictures."""
    save, made = ImageUtil.save_image, []

    def saved(*args: Any, **kwargs: Any) -> Any:
        save(*args, **kwargs)
        made.append(args)
        if len(made) == after and os.environ["MLX_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    ImageUtil.save_image = staticmethod(saved)
    try:
        yield
    finally:
        ImageUtil.save_image = staticmethod(save)


def embedded(model: Any, model_config: Any, **_: Any) -> None:
    """In place of mflux's initialiser of FLUX.2: the embedded model's parts."""
    tiny = demo.pipeline()
    Flux2Initializer._init_config(model, model_config)
    model.tokenizers = {}
    model.bits = model.lora_paths = model.lora_scales = None
    if hasattr(tiny, "compute_precision"):  # from mflux 0.22 on
        model.compute_precision = tiny.compute_precision
    model.small_decoder = model.small_text_encoder = False
    model.vae, model.transformer, model.text_encoder = tiny.vae, tiny.transformer, tiny.text_encoder
    model._encode_prompt_pair = tiny._encode_prompt_pair


def _do(kind: str, *given: Any) -> Any:
    match kind:
        case "run" | "tune":
            return _run([kind, *given])
        case "dies":
            with _dying(given[0]):
                return _run(["run", *given[1:]])
        case "latents":
            return latents(world(), given or FAMILIES)
        case "errors":
            return errors(world())
        case "gone":
            return gone(world())


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    warnings.simplefilter("ignore")
    Flux2Initializer.init = embedded
    done = []
    for job in json.loads(sys.argv[1]):
        done.append(_do(*job))
        Path(sys.argv[2], f"rank{os.environ['MLX_RANK']}.json").write_text(json.dumps(done))
    sys.exit(max((job["code"] for job in done if "code" in job), default=0))
