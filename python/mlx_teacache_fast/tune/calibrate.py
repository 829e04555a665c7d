"""Fitting the gate's polynomial to a model: how much its prediction changes, from how much its input does."""

import bisect
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DisabledWarning, InternalStateError, TeaCacheValueError
from ..handle import apply
from ..mflux.pictures import generate, predictions, progress_bar
from ..models import DEFAULT_THRESHOLD
from ..policy import Gate, Policy
from ..record.trace import Trace, replay

DEGREE = 4
SKIPPED = 1 / 3  # share of the steps that the suggested threshold skips

Pairs = npt.NDArray[np.float64]  # (pairs, 2): relative L1 distance of the modulated input, relative change of output


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A polynomial and how well it fits.

    Attributes:
        policy: With the polynomial, its range, and the threshold that skips a third of these steps, if any does.
        dataset: What it was fitted on.
        pairs, held_out: Of consecutive steps, ``(n, 2)``, float64: relative L1 distance of block 0's modulated input,
            and relative L1 change of the noise prediction. The polynomial was fitted on ``pairs``.
        r2, held_out_r2: Coefficients of determination on them.
        shares: Threshold and the share of steps that it skips, estimated from the distances of all generations.
    """

    policy: Policy
    dataset: str
    pairs: Pairs
    held_out: Pairs
    r2: float
    held_out_r2: float
    shares: tuple[tuple[float, float], ...]

    def to_json(self, path: str | Path, force: bool = False) -> None:
        """Write the policy for ``apply(flux, path)``, and the rest for readers; errors as of ``Policy.to_json``."""
        about: dict[str, Any] = {"dataset": self.dataset, "r2": self.r2, "held_out_r2": self.held_out_r2}
        about |= {"pairs": len(self.pairs), "held_out_pairs": len(self.held_out)}
        about["skipped_share_at_threshold"] = {f"{t:.3g}": share for t, share in self.shares}
        self.policy.to_json(path, force=force, about=about)

    def plot(self) -> Any:
        """A matplotlib figure: the pairs and the polynomial."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
        axes = figure.subplots()
        x, y = self.pairs.T
        axes.scatter(x, y, s=8, color="#2f6fb0", alpha=0.5, label=f"fitted on: {len(self.pairs)} pairs")
        text = f"held out: {len(self.held_out)} pairs, R² {self.held_out_r2:.2f}"
        x, y = self.held_out.T
        axes.scatter(x, y, s=8, color="#f08a24", alpha=0.5, label=text)
        rule: Any = self.policy.rule
        low, high = rule.calibrated_range
        x = np.linspace(low, high, 200)
        axes.plot(x, np.polyval(rule.coefficients, x), color="black", label="polynomial, in its range")
        axes.set_xlabel("relative L1 distance of the modulated input to that of the step before")
        axes.set_ylabel("relative L1 change of the noise prediction")
        axes.set_title(self.dataset, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def calibrate(
    flux: Any,
    prompts: Sequence[str],
    *,
    held_out: Sequence[str],
    seeds: Sequence[int] = (1,),
    guidances: Sequence[float] = (),
    progress: bool = False,
    **options: Any,
) -> Fitted:
    """Fit the polynomial of the gate to this model: full runs of all prompts, nothing is skipped.

    Args:
        flux: A pipeline that ``apply`` takes, not gated; left as it was.
        prompts: What to fit on: each with each of ``seeds`` and ``guidances``.
        held_out: Other prompts, for R^2 on steps that the fit did not see.
        seeds: Of the starting noise.
        guidances: Several values for ``generate_image``'s ``guidance``; default: what ``options`` say.
        progress: Show a bar on stderr.
        **options: ``generate_image``'s: ``num_inference_steps`` (default here: 50), ``guidance``, ``height``, ...

    Returns:
        Fitted: The polynomial with its range, and the threshold that skips a third of these steps, if any does.

    Raises:
        TeaCacheValueError: Too few prompts or steps, or a pipeline whose inputs do not change.
        IncompatibleModelError, AlreadyPatchedError: As for ``apply``.
    """
    if isinstance(prompts, str) or isinstance(held_out, str) or not (prompts and held_out and seeds):
        raise TeaCacheValueError("calibrate needs lists: one or more prompts, held_out ones, and seeds")
    if both := set(prompts) & set(held_out):
        raise TeaCacheValueError(f"a prompt is fitted or held out, not both: {', '.join(sorted(both))}")
    options = {"num_inference_steps": 50} | options
    num_steps = options["num_inference_steps"]
    settings = [options | {"guidance": g} for g in guidances] or [options]
    cases = [(p, seed, o) for p in (*prompts, *held_out) for seed in seeds for o in settings]
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisabledWarning)  # nothing is to be skipped
        handle = apply(flux, forecast=0, cache="output", max_consecutive_skips=0, rel_l1_thresh=1.0)
    with handle, predictions(flux) as recorder, progress_bar(flux, num_steps * len(cases), disable=not progress) as bar:
        for done, (prompt, seed, option) in enumerate(cases, start=1):
            bar.set_description_str(prompt)
            generate(flux, prompt, seed, option)
            generation = handle.stats.last_generation
            if generation is None or handle.stats.generations != done:
                raise InternalStateError("a generation did not go through the gate, and its steps are not known")
            values = recorder.values
            for step in generation.steps:
                if step.rel_l1 is not None:
                    before, now = values[step.index - 1], values[step.index]
                    change = float(np.abs(now - before).mean() / np.abs(before).mean())
                    found[prompt in prompts].append((step.rel_l1, change))
        trace = handle.trace
    pairs, unseen = (np.array([p for p in found[which] if np.isfinite(p).all()]) for which in (True, False))
    if len(pairs) <= DEGREE or len(unseen) == 0 or len(set(pairs[:, 0])) <= DEGREE:
        raise TeaCacheValueError(f"{len(pairs)} pairs of steps are too few to fit: use more steps or prompts")
    x, y = pairs.T
    fit = np.polyfit(x, y, DEGREE)
    polynomial: dict[str, Any] = {"coefficients": list(map(float, fit)), "calibrated_range": [x.min(), x.max()]}
    threshold = _threshold(trace, polynomial)
    middle = threshold or DEFAULT_THRESHOLD
    around = sorted({min(1.0, middle * factor) for factor in (0.5, 0.75, 1, 1.5, 2, 3)})
    some = {k: options[k] for k in ("height", "width") if k in options}
    what = [f"{len(prompts)} prompts x {len(seeds)} seed{'s' * (len(seeds) > 1)}", f"{num_steps} steps"]
    what += [f"{some['width']}x{some['height']}"] * (len(some) == 2)
    what += ["guidance " + " and ".join(f"{o['guidance']:g}" for o in settings)] * ("guidance" in settings[0])
    return Fitted(
        policy=Policy.of(rel_l1_thresh=threshold, **polynomial),
        dataset=", ".join(what),
        pairs=pairs,
        held_out=unseen,
        r2=_r2(fit, pairs),
        held_out_r2=_r2(fit, unseen),
        shares=tuple((t, _share(trace, polynomial, t)) for t in around),
    )


def _r2(fit: Any, pairs: Pairs) -> float:
    x, y = pairs.T
    return float(1 - ((np.polyval(fit, x) - y) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-30))


def _share(trace: Trace, polynomial: dict[str, Any], threshold: float) -> float:
    """Of the steps that the gate would skip, going by the distances of a run that skips nothing."""
    default = Gate.max_consecutive_skips
    again = replay(trace, rel_l1_thresh=threshold, max_consecutive_skips=default, **polynomial)
    return statistics.mean(g.skipped / g.num_steps for g in again.generations)


def _threshold(trace: Trace, polynomial: dict[str, Any]) -> float | None:
    """The lowest of two digits at which ``SKIPPED`` of the steps are skipped; None if none is."""
    candidates = [digits * 10.0**exponent for exponent in (-4, -3, -2) for digits in range(10, 100)] + [1.0]
    found = bisect.bisect_left(candidates, SKIPPED, key=lambda t: _share(trace, polynomial, t))
    return round(candidates[found], 6) if found < len(candidates) else None
