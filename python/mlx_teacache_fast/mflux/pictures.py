"""Pictures of several prompts, what the model predicted for them step by step, and what that does to a picture."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mflux.utils.exceptions import StopImageGenerationException
from tqdm import tqdm

from ..errors import TeaCacheValueError
from ..step.generation import Generation
from .hook import Hook, hook_of

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
    """What the model predicted at each step of the last generation of a gated pipeline, and its schedule.

    Args:
        guidance: With which branches that are calls of their own, or a batch of two, are put together.

    Attributes:
        sigmas: Of each active step, and the one after the last.
    """

    def __init__(self, guidance: float) -> None:
        self.sigmas: list[float] = []
        self._guidance = guidance
        self._made: list[list[npt.NDArray[np.float32]]] = []  # in each step the calls

    def __call__(self, generation: Generation, call: int, noise: mx.array) -> None:
        if call == 0:
            if generation.index == 1:
                self._made, self.sigmas = [], generation.sigmas
            self._made.append([])
        self._made[-1].append(np.array(noise.astype(mx.float32)))

    def values(self, n: int) -> npt.NDArray[np.float32]:
        """Of so many numbers of the latents, shape ``(steps, n)``; behind them may be those of reference images."""
        if not self._made:
            raise TeaCacheValueError("the generation has no steps")
        return np.stack([self._guided(made).ravel()[:n] for made in self._made])

    def _guided(self, made: list[npt.NDArray[np.float32]]) -> Any:
        if len(made) == 2:
            return self._guidance * made[0] + (1 - self._guidance) * made[1]
        if len(made[0]) == 2:
            return made[0][0] + self._guidance * (made[0][1] - made[0][0])
        return made[0]


@contextmanager
def predictions(flux: Any, guidance: float) -> Iterator[Predictions]:
    """Each generation in the block is recorded, of a gated pipeline; the last one can be asked for."""
    recorder, hook = Predictions(guidance), cast(Hook, hook_of(flux))
    hook.listener = recorder
    try:
        yield recorder
    finally:
        hook.listener = None


class Ending:
    """The latents at the end of a generation, and pictures of others.

    Attributes:
        latents: Of the last generation.
    """

    def __init__(self) -> None:
        self.latents: Any = None
        self._instead: Any = None
        self._is_taken = self._takes_none = False

    def picture(self, latents: mx.array, flux: Any, prompt: str, seed: int, options: Mapping[str, Any]) -> Image | None:
        """As if a generation had ended with these latents; None for a pipeline that takes its steps by itself.

        It costs what decoding does: mflux's steps hand them on, and as nobody reads what the model would have
        predicted, MLX computes none of it.
        """
        if self._takes_none:
            return None
        self._instead, self._is_taken = latents, False
        try:
            # Two steps, as some pipelines want, and of image-to-image mflux leaves out the first one.
            made = generate(flux, prompt, seed, {**options, "num_inference_steps": 2})
            self._takes_none = not self._is_taken
            return made if self._is_taken else None
        finally:
            self._instead = None

    def call_before_loop(self, *, config: Any, **_: Any) -> None:
        if self._instead is not None:
            config.scheduler.step = self._step

    def _step(self, *_: Any, **__: Any) -> Any:
        self._is_taken = True
        return self._instead

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
