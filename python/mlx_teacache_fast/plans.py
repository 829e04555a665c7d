"""Which steps to compute when only so many may be: decided before the run."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from . import arguments
from .errors import TeaCacheValueError
from .files import from_json, to_json
from .forecast import Cache

# How much denser the computed steps are where sigma changes faster: 0 spaces them evenly by step, 1 by sigma. Of these,
# 0.2 to 0.4 gave the best pictures of the demonstration model with 25 and 50 steps (docs/forecasting.md).
SIGMA_EXPONENT = 0.4


def budgeted(sigmas: Sequence[float], budget: float) -> tuple[bool, ...]:
    """For each step whether it computes: the first and the last one, and the denser in between the more sigma changes.

    Args:
        sigmas: Of the active steps of the schedule.
        budget: Share of them that may be computed, above 0 and at most 1; two of them always are.
    """
    num_steps = len(sigmas)
    count = min(num_steps, max(2, math.floor(budget * num_steps + 1e-9)))
    if num_steps <= 2:
        return (True,) * num_steps
    wanted = [abs(b - a) ** SIGMA_EXPONENT for a, b in pairwise(sigmas)][1:]  # of all but the first and the last
    share = _shares(wanted, count - 2)
    plan = [True]
    due = 0.5
    for part in share:
        due += part
        plan.append(due >= 1 - 1e-9)
        due -= plan[-1]
    return (*plan, True)


def _shares(wanted: Sequence[float], count: int) -> list[float]:
    """In proportion to ``wanted``, each at most 1, and ``count`` in all."""
    shares = [0.0] * len(wanted)
    rest = set(range(len(wanted)))
    while rest:
        left = count - sum(shares)
        total = sum(wanted[i] for i in rest)
        scale = left / total if total > 0 else 0.0
        full = {i for i in rest if wanted[i] * scale >= 1}
        for i in full or rest:
            shares[i] = min(1.0, wanted[i] * scale) if total > 0 else left / len(rest)
        rest = rest - full if full else set()
    return shares


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps for ``apply(plan=...)``, as a file.

    Attributes:
        steps: For each active step 1, it computes, or 0.
        forecast, cache: As for ``apply``: what a skipped step gets.
        about: What it was made for and what it gave; nothing of it counts when the plan is used.
    """

    steps: str
    forecast: int
    cache: Cache
    about: dict[str, Any]

    def to_json(self, path: str | Path, force: bool = False) -> None:
        """Write a file for ``apply(plan=path)``.

        Raises:
            TeaCacheValueError: The file exists and ``force`` is not set.
            OutputError: It cannot be written.
        """
        to_json(Path(path), "plan", asdict(self), force=force)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or one of another version.
            OSError: It cannot be read.
        """
        data = from_json(Path(path), "plan")
        try:
            steps = arguments.plan_text(arguments.plan(data["steps"]))
            return cls(steps, arguments.forecast(data["forecast"]), arguments.cache(data["cache"]), dict(data["about"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TeaCacheValueError(f"{path} is not a plan: {error}") from error
