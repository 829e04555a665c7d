"""Finding a better plan than the rule's, for one model, schedule and budget: on the user's own machine and prompts.

A picture costs minutes on a large model, so most plans are judged without one. Euler's method adds up the predictions,
weighted by the steps of sigma; so with the predictions of one full run in hand, a plan's error at the end is a known
linear combination of them, and its size follows from their inner products, in microseconds. That leaves out how the
model answers to latents that have gone astray. Hence the second stage: the plans that look best, and then neighbours of
the best one, are run, and simulated annealing goes on with the pictures that they really give.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import TeaCacheValueError
from ..files import check_writable, from_json
from ..handle import apply
from ..mflux.pictures import Image, generate, predictions, progress_bar, psnr
from ..policy import Budget, Cache, Policy, Steps, as_text, step_count
from ..step.forecast import correction, weights
from ..step.rules import budgeted

IDENTICAL = 99.0  # dB, of pictures that do not differ: means need a number

# Of the first stage. Seconds for 50 steps.
STARTS = 3
ROUNDS = 3000

# Of the second stage: how many neighbours are judged by their predictions for each one that is run, and the temperature
# in dB at which annealing begins.
NEIGHBOURS = 12
TEMPERATURE = 0.5

Plan = tuple[bool, ...]  # for each step whether it computes


@dataclass(frozen=True)
class Found:
    """What ``search`` found.

    Attributes:
        policy: The best steps, with the ``forecast`` and ``cache`` that they were found with.
        about: What was measured: ``psnr`` and ``held_out_psnr`` of ``rule`` and ``plan``, in dB, mean over the
            pictures; and of what.
    """

    policy: Policy
    about: dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """Full runs: what a plan's error follows from.

    Attributes:
        sigmas: Of each step and the one after the last, ``steps + 1``.
        products: For each run the inner products of its predictions, ``(steps, steps)``, float64, by their length.
    """

    sigmas: Sequence[float]
    products: Sequence[npt.NDArray[np.float64]]

    def estimate(self, steps: Plan, order: int, rho: float = 0.0) -> float:
        """-10 log10 of the mean squared error of the final latents, mean over the runs: dB up to a constant.

        ``rho`` is the corrector's share.
        """
        share = np.zeros(len(steps))  # of each prediction in the error
        known: list[int] = []
        gap: list[tuple[float, float, list[float]]] = []
        for i, computes in enumerate(steps):
            step = self.sigmas[i + 1] - self.sigmas[i]
            if computes:
                if rho and gap and step:
                    handed_on = correction(self.sigmas[i], step, self.sigmas[known[0]], gap, rho)
                    share[[i, *known]] += step * np.array(handed_on[: 1 + len(known)])
                    share[i] -= step
                known, gap = [i, *known[:order]], []
                continue
            forecast = weights(self.sigmas[i], [self.sigmas[k] for k in known], order)
            gap.append((self.sigmas[i], step, forecast))
            share[known] += step * np.array(forecast[: len(known)])
            share[i] -= step
        errors = [max(float(share @ product @ share), 1e-30) for product in self.products]
        return -10 * mean(map(math.log10, errors))


def neighbour(steps: Plan, rng: random.Random) -> Plan:
    """One computed step, not the first, elsewhere: mostly beside where it was."""
    computed = [i for i in range(1, len(steps)) if steps[i]]
    skipped = [i for i in range(1, len(steps)) if not steps[i]]
    while True:
        here = rng.choice(computed)
        there = here + rng.choice((-2, -1, 1, 2)) if rng.random() < 0.6 else rng.choice(skipped)
        if there in skipped:
            return tuple((c and i != here) or i == there for i, c in enumerate(steps))


def annealed(start: Plan, judge: Callable[[Plan], float], rounds: int, rng: random.Random) -> Plan:
    """The best plan met by simulated annealing of ``judge``, in dB."""
    current = best = start
    value = highest = judge(start)
    for i in range(rounds):
        proposal = neighbour(current, rng)
        new = judge(proposal)
        if new > value or rng.random() < math.exp((new - value) / (1.5 * (1 - i / rounds) ** 2 + 1e-3)):
            current, value = proposal, new
        if value > highest:
            best, highest = current, value
    return best


def search(
    flux: Any,
    prompts: Sequence[str],
    *,
    budget: float,
    held_out: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    forecast: int = Policy.forecast,
    cache: Cache = Policy.cache,
    evaluations: int = 40,
    path: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> Found:
    """Search a plan that gives better pictures than ``apply(flux, budget=budget)`` for this model and schedule.

    Args:
        flux: A pipeline that ``apply`` takes, not gated; left as it was.
        prompts: What to judge by: each with each of ``seeds``, by the PSNR against plain mflux's picture.
        budget: Share of the steps that may be computed.
        held_out: Other prompts, of which plan and rule are compared at the end.
        seeds: Of the starting noise.
        forecast, cache: As for ``apply``.
        evaluations: So many plans are run, each for all prompts and seeds.
        path: A file that is written after each of them, a policy for ``apply(flux, path)``; Ctrl-C loses nothing.
        force: Overwrite ``path``.
        resume: Go on with ``path``, which was written with the same arguments, of the same model.
        progress: Show a bar on stderr.
        **options: ``generate_image``'s: ``num_inference_steps`` (default here: 50), ``guidance``, ``height``, ...

    Returns:
        Found: The best plan as a policy, and what was measured.

    Raises:
        TeaCacheValueError: Bad arguments; ``path`` exists, or cannot be gone on with; the budget leaves nothing to
            choose.
        IncompatibleModelError, AlreadyPatchedError: As for ``apply``.
        OutputError: ``path`` cannot be written; OSError: not read.
    """
    policy = Policy.of(budget=budget, forecast=forecast, cache=cache)
    share, order = cast(Budget, policy.rule).budget, policy.forecast
    evaluations = step_count("evaluations", evaluations)
    if not prompts or isinstance(prompts, str) or not seeds or evaluations < 1:
        raise TeaCacheValueError("search needs a list of prompts, one or more seeds, and one or more evaluations")
    options = {"num_inference_steps": 50} | options
    rho = policy.rho(options.get("guidance") or 1.0)
    policy = replace(policy, corrector=rho if cache == "output" else None)  # the plan's too
    num_steps = options["num_inference_steps"]
    num_tokens = options.get("height", 1024) * options.get("width", 1024) // 256
    with apply(flux, policy) as handle:  # before anything slow
        variant_id, plans = handle.variant_id, handle.plans
    _check_choice(budgeted([1 - i / num_steps for i in range(num_steps)], share, num_tokens, plans), share)
    has_cache = options.get("use_kv_cache")  # mflux's, of reference images
    has_cache = getattr(flux.model_config, "supports_kv_cache", False) if has_cache is None else has_cache
    if cache == "residual" and has_cache and options.get("image_paths"):
        raise TeaCacheValueError('search takes cache="output" only with a key-value cache, which has no first residual')
    setup: dict[str, Any] = {"budget": share, "forecast": order, "cache": cache, "corrector": rho, "options": options}
    setup |= {"prompts": list(prompts), "seeds": list(seeds), "held_out": list(held_out)}
    setup |= {"variant_id": variant_id, "pipeline": type(flux).__name__, "model": flux.model_config.model_name}
    setup |= {name: getattr(flux, name, None) for name in ("bits", "lora_paths", "lora_scales")}
    setup = json.loads(json.dumps(setup, default=str))  # as the file will have it
    measured: dict[str, list[float]] = {}
    if resume and path is None:
        raise TeaCacheValueError("resume needs the path of the search to go on with")
    if path is not None:
        check_writable(Path(path), force=force or resume, how="force=True")
        measured = _measured_before(Path(path), setup) if resume else {}
    cases = [(prompt, seed) for prompt in prompts for seed in seeds]
    unseen = [(prompt, seed) for prompt in held_out for seed in seeds]
    left = max(0, evaluations - len(measured))
    total = num_steps * (len(cases) * (1 + left) + 3 * len(unseen))

    with progress_bar(flux, total, disable=not progress) as bar:
        bar.set_description_str("plain mflux")
        references, recorded = _references(flux, cases, options)
        rule = budgeted(recorded.sigmas[:-1], share, num_tokens, plans)
        _check_choice(rule, share)
        evaluations = min(evaluations, math.comb(len(rule) - 1, sum(rule) - 1))  # there are no more plans
        psnr_of = {tuple(c == "1" for c in text): values for text, values in measured.items()}

        def run(steps: Plan, cases: Sequence[tuple[str, int]], references: Sequence[Image]) -> list[float]:
            with apply(flux, replace(policy, rule=Steps(steps=as_text(steps)), save_metadata=False)):
                pictures = [generate(flux, prompt, seed, options) for prompt, seed in cases]
            return [min(IDENTICAL, psnr(a, b)) for a, b in zip(references, pictures, strict=True)]

        def best() -> Plan:
            return max(psnr_of, key=lambda steps: mean(psnr_of[steps]))

        def result() -> Found:
            found = {"rule": mean(psnr_of[rule]), "plan": mean(psnr_of[best()])}
            about = setup | {"rule": as_text(rule), "psnr": found, "held_out_psnr": unseen_psnr}
            about["measured"] = {as_text(steps): values for steps, values in psnr_of.items()}
            return Found(replace(policy, rule=Steps(steps=as_text(best()))), about)

        def write(force: bool) -> None:
            if path is not None:
                result().policy.to_json(path, force=force, about=result().about)

        def evaluate(steps: Plan) -> float:
            if steps not in psnr_of:
                psnr_of[steps] = run(steps, cases, references)
                write(force or resume or len(psnr_of) > 1)
                high = mean(psnr_of[best()])
                gain = high - mean(psnr_of[rule])
                bar.set_description_str(f"plan {len(psnr_of)} of {evaluations}: {high:.1f} dB, {gain:+.1f} to the rule")
            return mean(psnr_of[steps])

        unseen_psnr: dict[str, float | None] = {"rule": None, "plan": None}
        rng = random.Random(len(psnr_of))
        judge = functools.cache(lambda steps: recorded.estimate(steps, order, rho))
        evaluate(rule)
        for start in (annealed(rule, judge, ROUNDS, rng) for _ in range(STARTS)):
            if len(psnr_of) < evaluations:
                evaluate(start)
        current = best()
        while len(psnr_of) < evaluations:
            near = {neighbour(current, rng) for _ in range(NEIGHBOURS)} - set(psnr_of)
            if not near:  # all that are around have been run
                current = neighbour(current, rng)
                continue
            proposal = max(near, key=judge)
            value = evaluate(current) if current in psnr_of else -math.inf
            gain = evaluate(proposal) - value
            temperature = TEMPERATURE * (1 - len(psnr_of) / evaluations) + 1e-3
            if gain > 0 or rng.random() < math.exp(gain / temperature):
                current = proposal
        if unseen:
            bar.set_description_str("prompts that it did not see")
            plain = [generate(flux, prompt, seed, options) for prompt, seed in unseen]
            unseen_psnr["rule"] = mean(run(rule, unseen, plain))
            unseen_psnr["plan"] = unseen_psnr["rule"]
            if best() == rule:
                bar.total -= num_steps * len(unseen)
            else:
                unseen_psnr["plan"] = mean(run(best(), unseen, plain))
    write(force=True)
    return result()


def _references(flux: Any, cases: Sequence[tuple[str, int]], options: dict[str, Any]) -> tuple[list[Image], Recorded]:
    pictures, products = [], []
    sigmas: list[float] = []
    with predictions(flux) as recorder:
        for prompt, seed in cases:
            pictures.append(generate(flux, prompt, seed, options))
            values = recorder.values.astype(np.float64)
            products.append(values @ values.T / values.shape[1])
            sigmas = [*recorder.sigmas, 0.0][: len(values) + 1]
            if len(sigmas) <= len(values):
                raise TeaCacheValueError("search needs a scheduler that has sigmas, one for each step")
    return pictures, Recorded(sigmas, products)


def _check_choice(rule: Plan, share: float) -> None:
    if all(rule) or sum(rule) < 3:
        raise TeaCacheValueError(f"budget={share:g} of {len(rule)} steps leaves no step to choose")


def _measured_before(path: Path, setup: dict[str, Any]) -> dict[str, list[float]]:
    Policy.from_json(path)
    about = from_json(path, "policy").get("about")
    if not isinstance(about, dict) or not isinstance(about.get("measured"), dict):
        raise TeaCacheValueError(f"{path} is a policy, but not one of a search that can be gone on with")
    other = [name for name, value in setup.items() if about.get(name) != value]
    if other:
        raise TeaCacheValueError(f"{path} is of a search with other {', '.join(other)}: resume takes the same ones")
    return {str(steps): [float(v) for v in values] for steps, values in about["measured"].items()}
