"""The regimes' schedules as mflux's schedulers, registered with mflux by their names."""

import math
from functools import partial
from typing import Any

from mflux.models.common.schedulers import FlowMatchEulerDiscreteScheduler, register_contrib

from ..models import REGIMES


class ShiftedScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # mflux is untyped
    """mflux's Euler steps over sigma = e t / (1 + (e - 1) t), t from 1 to 1 / steps.

    Args:
        config: mflux's.
        shift: e.
    """

    def __init__(self, config: Any, shift: float) -> None:
        super().__init__(config)
        self.set_mu(math.log(shift))

    def set_image_seq_len(self, image_seq_len: int) -> None:
        """mflux would shift by the number of tokens."""


for _regime in REGIMES.values():
    if _regime.shift is not None:
        register_contrib(partial(ShiftedScheduler, shift=_regime.shift), _regime.name)
