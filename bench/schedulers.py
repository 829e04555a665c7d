"""Other ways to step over the regimes' schedules, as mflux's schedulers: ``generate_image(..., scheduler=name(...))``.

The latents are x = (1 - sigma) x0 + sigma noise and the model predicts noise - x0, so x0 = x - sigma * prediction.
"""

import math
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
from mflux.models.common.schedulers import FlowMatchEulerDiscreteScheduler, register_contrib

from mlx_teacache_fast.models import REGIMES
from mlx_teacache_fast.step import forecast


class OwnOrShifted(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # mflux is untyped
    """Args: mflux's config, and e of the schedule (docs/forecasting.md), None for mflux's own."""

    def __init__(self, config: Any, shift: float | None) -> None:
        super().__init__(config)
        self._is_shifted = shift is not None
        if shift is not None:
            self.set_mu(math.log(shift))

    def set_image_seq_len(self, image_seq_len: int) -> None:
        """mflux would shift by the number of tokens."""
        if not self._is_shifted:
            super().set_image_seq_len(image_seq_len)


class DPMSolver(OwnOrShifted):
    """DPM-Solver++ 2M (Lu et al. arXiv 2211.01095, algorithm 2), of first order in the first two steps and the last."""

    _last: tuple[mx.array, float] | None = None  # x0, and the log signal-to-noise ratio at which it is

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **_: Any) -> mx.array:
        """Latents at the next sigma; ``timestep`` is the step's index."""
        sigma, to = self.sigmas[timestep : timestep + 2].tolist()
        x0 = latents - sigma * noise
        if to == 0:
            return x0
        at = math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
        h = math.log((1 - to) / to) - at
        extrapolated = x0
        if self._last is not None and math.isfinite(self._last[1]):
            before, last_at = self._last
            extrapolated = x0 + h / (2 * (at - last_at)) * (x0 - before)
        self._last = x0, at
        return (to / sigma) * latents + (1 - to) * (1 - math.exp(-h)) * extrapolated


class DataForecast(OwnOrShifted):
    """Euler's steps; a skipped one gets a forecast of x0 instead of the prediction, by a line through the last two."""

    is_skipped: ClassVar[bool] = False  # the step at hand; whoever gates sets it

    def __init__(self, config: Any, shift: float | None) -> None:
        super().__init__(config, shift)
        self._known: list[tuple[float, mx.array]] = []  # sigma and x0 of the last two computed steps, the latest first

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **more: Any) -> mx.array:
        sigma = self.sigmas[timestep].item()
        if self.is_skipped:
            weights = mx.array(forecast.weights(sigma, [at for at, _ in self._known], 1))
            x0 = forecast.combined(weights[: len(self._known)], [x0 for _, x0 in self._known])
            noise = (latents - x0) / sigma
        else:
            self._known = [(sigma, latents - sigma * noise), *self._known[:1]]
        return super().step(noise=noise, timestep=timestep, latents=latents, **more)


def name(kind: type[OwnOrShifted], regime: str) -> str:
    return f"{regime} {kind.__name__}"


for _regime in REGIMES.values():
    for _kind in (DPMSolver, DataForecast):
        register_contrib(partial(_kind, shift=_regime.shift), name(_kind, _regime.name))
