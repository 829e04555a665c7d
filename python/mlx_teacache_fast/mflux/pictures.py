"""Pictures of several prompts, what the model predicted for them step by step, and what that does to a picture."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mflux.utils.exceptions import StopImageGenerationException
from tqdm import tqdm

from ..errors import TeaCacheValueError

Image = npt.NDArray[np.uint8]


def generate(flux: Any, prompt: str, seed: int, options: Mapping[str, Any]) -> Image:
    """A picture of mflux's ``generate_image``, RGB, shape ``(height, width, 3)``. Ctrl-C raises KeyboardInterrupt."""
    try:
        generated = flux.generate_image(seed=seed, prompt=prompt, **options)
    except StopImageGenerationException as error:  # what mflux makes of Ctrl-C inside its loop
        raise KeyboardInterrupt from error
    return np.asarray(generated.image.convert("RGB"))


def psnr(a: Image, b: Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; ``inf`` when identical."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


class Predictions:
    """What the model predicted at each step of the last generation, and its schedule.

    Attributes:
        sigmas: Of each active step, and the one after the last.
        values: float32, shape ``(steps, numbers of a prediction)``, guidance included.
    """

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self._made: list[npt.NDArray[np.float32]] = []

    @property
    def values(self) -> npt.NDArray[np.float32]:
        if not self._made:
            raise TeaCacheValueError("the generation has no steps")
        return np.stack(self._made)

    def call_before_loop(self, *, config: Any, **_: Any) -> None:
        self._made = []
        self.sigmas = []
        scheduler = config.scheduler
        step = scheduler.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._made.append(np.array(kwargs["noise"].astype(mx.float32)).ravel())
            if len(self._made) == 1:  # mflux sets the schedule up at the first use of config.time_steps
                self.sigmas = [float(s) for s in getattr(scheduler, "sigmas", ())][config.init_time_step :]
            return step(*args, **kwargs)

        scheduler.step = recorded


@contextmanager
def predictions(flux: Any) -> Iterator[Predictions]:
    """Each generation in the block is recorded; the last one can be asked for."""
    recorder = Predictions()
    flux.callbacks.register(recorder)
    try:
        yield recorder
    finally:
        flux.callbacks.before_loop.remove(recorder)


class Ending:
    """The latents at the end of a generation, and pictures of others.

    Attributes:
        latents: Of the last generation.
    """

    def __init__(self) -> None:
        self.latents: Any = None
        self._instead: Any = None

    def picture(self, latents: mx.array, flux: Any, prompt: str, seed: int, options: Mapping[str, Any]) -> Image:
        """As if a generation had ended with these latents.

        It costs what decoding does: mflux's steps hand them on, and as nobody reads what the model would have
        predicted, MLX computes none of it.
        """
        self._instead = latents
        try:
            # Of image-to-image mflux leaves out the first step.
            num_steps = 2 if options.get("image_strength") else 1
            return generate(flux, prompt, seed, {**options, "num_inference_steps": num_steps})
        finally:
            self._instead = None

    def call_before_loop(self, *, config: Any, **_: Any) -> None:
        if (latents := self._instead) is not None:
            config.scheduler.step = lambda *_, **__: latents

    def call_after_loop(self, *, latents: mx.array, **_: Any) -> None:
        self.latents = latents


@contextmanager
def ending(flux: Any) -> Iterator[Ending]:
    """Of each generation in the block."""
    found = Ending()
    flux.callbacks.register(found)
    try:
        yield found
    finally:
        flux.callbacks.before_loop.remove(found)
        flux.callbacks.after_loop.remove(found)


class _StepCounter:
    """mflux callback: advances one bar over all generations, in place of mflux's own bar for each."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def call_before_loop(self, *, config: Any, **_: object) -> None:
        # mflux makes its bar at the first use of config.time_steps, which comes after this call.
        config._time_steps = tqdm(range(config.init_time_step, config.num_inference_steps), disable=True)

    def call_in_loop(self, **_: object) -> None:
        self._bar.update()


@contextmanager
def progress_bar(flux: Any, total: int, *, disable: bool = False) -> Iterator[Any]:
    """A tqdm bar of ``total`` steps while the block runs; the pipeline's callbacks are as before afterwards."""
    bar_format = "{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt}, {remaining} left: {desc}"
    with tqdm(total=total, bar_format=bar_format, mininterval=0.5, disable=disable) as bar:
        counter = _StepCounter(bar)
        flux.callbacks.register(counter)
        try:
            yield bar
        finally:
            flux.callbacks.before_loop.remove(counter)
            flux.callbacks.in_loop.remove(counter)
