"""Which steps others computed, as published for real models; facts, for ``budget=``. Sources are in NOTICE.

A plan holds for the sigmas that it was made with. For another number of steps, another size or a share in between it is
carried over by sigma: see ``placed``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .models import TINY_KLEIN


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    """Of one model.

    Attributes:
        source: Where they are from.
        sigmas: The schedule that they were made with.
        computed: For each plan the steps that it computes, in the order of their number.
    """

    source: str
    sigmas: tuple[float, ...]
    computed: tuple[tuple[int, ...], ...]


def shifted(num_steps: int, shift: float) -> tuple[float, ...]:
    """FLUX's schedule: sigma of t = 1 to 1 / steps, ``shift * t / (1 + (shift - 1) * t)``."""
    times = [1 - i / num_steps for i in range(num_steps)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


def of_magnitudes(ratios: Sequence[float], leading: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """MagCache's plans, of all its thresholds, one for each number of computed steps.

    Args:
        ratios: Of a step's mean residual to the one before, by which it takes the error of a skipped step.
        leading: So many first steps compute.
        longest: At most so many skipped ones in a row.
    """
    plans: dict[int, tuple[int, ...]] = {}
    for threshold in range(1, 500):
        computed, ratio, error, skipped = [], 1.0, 0.0, 0
        for i, r in enumerate(ratios):
            ratio *= r
            error += abs(1 - ratio)
            skipped += 1
            if i < leading or error > threshold / 500 or skipped > longest:
                computed.append(i)
                ratio, error, skipped = 1.0, 0.0, 0
        plans.setdefault(len(computed), tuple(computed))
    return tuple(plans[count] for count in sorted(plans))


def placed(plans: PublishedPlans, sigmas: Sequence[float], count: int) -> tuple[bool, ...]:
    """For each step of a schedule whether it computes: ``count`` of them, 2 or more, the first one among them.

    In between two plans it goes by the share of steps that they compute; below the least it is that one's, thinned out.
    """
    n = len(sigmas)
    ours = [_index(sigma, sigmas) for sigma in plans.sigmas]
    ours[-1] = n - 1.0  # the last one leads to 0 in every schedule
    # In image-to-image what lies before the schedule begins is left out.
    num_steps = 1 + sum(index > 0 for index in ours)
    known = [[0.0, *(ours[i] for i in computed if ours[i] > 0)] for computed in plans.computed]
    shares = {len(places) / num_steps: places for places in known if 1 < len(places) < num_steps}
    shares[1.0] = [float(i) for i in range(n)]
    share = count / n
    above = min(s for s in shares if s >= share - 1e-9)
    below = max((s for s in shares if s <= share + 1e-9), default=above)
    part = (share - below) / (above - below) if above > below else 0.0
    steps = [-1]
    for j in range(count):
        low, high = (_between(shares[s], j / (count - 1)) for s in (below, above))
        steps.append(max(steps[-1] + 1, min(round((1 - part) * low + part * high), n - count + j)))
    return tuple(i in steps for i in range(n))


def _index(sigma: float, sigmas: Sequence[float]) -> float:
    """Where a schedule, which falls, has this sigma: a step or a place between two."""
    for i, (high, low) in enumerate(pairwise(sigmas)):
        if sigma >= low:
            return i + (min(1.0, max(0.0, (high - sigma) / (high - low))) if high > low else 0.0)
    return float(len(sigmas) - 1)


def _between(values: Sequence[float], at: float) -> float:
    """Of values at even places from 0 to 1."""
    place = at * (len(values) - 1)
    i = min(int(place), len(values) - 2)
    return values[i] + (place - i) * (values[i + 1] - values[i])


def _steps(text: str) -> tuple[int, ...]:
    """``0-3 7`` is 0, 1, 2, 3, 7."""
    ends = [[int(end) for end in part.split("-")] for part in text.split()]
    return tuple(i for end in ends for i in range(end[0], end[-1] + 1))


def _published(source: str, sigmas: tuple[float, ...], *plans: str) -> PublishedPlans:
    return PublishedPlans(source, sigmas, tuple(map(_steps, plans)))


# 50 steps, guidance 4; where the source does not say the sigmas they are mflux's, at 1024 x 1024.
_LEMICA, _MEANCACHE = "https://arxiv.org/abs/2511.00090", "https://arxiv.org/abs/2601.19961"
_KLEIN_BASE = _published(
    _LEMICA,
    shifted(50, 7.5636),
    "0 1 4 5 9 17 25 33 41 49",
    "0-9 17 25 33 41 49",
    "0-14 22 32 42 47 49",
    "0-20 25 35 43 47 49",
)
_QWEN_SIGMAS = tuple(1 - 0.98 * (1 - sigma) / (1 - shifted(50, 2.0008)[-1]) for sigma in shifted(50, 2.0008))
_MAGCACHE = "https://arxiv.org/abs/2506.09045"  # 28 steps, guidance 3.5 and 2.5, 1024 x 1024
# fmt: off
_DEV = (
    1, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062)
_KONTEXT = (
    1, 1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0, 1.00781, 1.0,
    1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609, 0.96484, 0.96094, 0.9375,
    0.93359)
# fmt: on

# By mflux's alias of a model, or by its name in lower case, which goes first.
PUBLISHED: dict[str, PublishedPlans] = {
    "flux2-klein-base-9b": _KLEIN_BASE,
    "flux2-klein-base-4b": _KLEIN_BASE,  # made with the 9B
    "qwen/qwen-image": _published(
        _MEANCACHE,
        _QWEN_SIGMAS,
        "0 1 3 7 14 21 28 35 42 49",
        "0-8 10 17 24 31 38 45 48 49",
        "0-16 24 32 40 43 45 47-49",
    ),
    "qwen-image-2512": _published(
        _MEANCACHE,
        _QWEN_SIGMAS,
        "0 2 4 7 14 21 28 35 42 49",
        "0-9 11 19 27 35 43 47 49",
        "0-15 23 31 37 44-49",
    ),
    "z-image": _published(
        _MEANCACHE,
        shifted(50, 7.5636),
        "0-3 5 9 15 22 29 36 43 47 49",
        "0-3 5 7 10 12 17 25 33 41 45 48 49",
        "0-4 6 8 10 12 14 19 27 35 43 46 48 49",
        "0-4 6 8 10 12 14 16 18 20 22 30 38 43 46 48 49",
        "0-6 8 10-13 15-18 20 22 29 37 42 45 47-49",
    ),
    "ernie-image": _published(
        _LEMICA,
        shifted(50, 4.0),
        "0 1 3 7 14 21 28 35 42 49",
        "0-10 17 27 37 44 48 49",
        "0-16 22 31 38 43 46-49",
    ),
    "dev": PublishedPlans(_MAGCACHE, shifted(28, 3.1582), of_magnitudes(_DEV, 3, 5)),
    "dev-kontext": PublishedPlans(_MAGCACHE, shifted(28, 3.1582), of_magnitudes(_KONTEXT, 6, 5)),
}


def published_plans(model_config: object) -> PublishedPlans | None:
    """Of the model of one of mflux's configurations, also of a checkpoint that names it as its base."""
    aliases: Sequence[str] = getattr(model_config, "aliases", ())
    if TINY_KLEIN.variant_id in aliases:  # it has a real model's name too, and another schedule
        return None
    names = [str(getattr(model_config, "model_name", None)).lower(), *aliases]
    return next((PUBLISHED[name] for name in names if name in PUBLISHED), None)
