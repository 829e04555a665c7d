"""``tune``: which policy gives the best pictures of a model, schedule and guidance, tried on the user's own machine.

A picture costs minutes on a large model. So each prompt is run once with all steps, from which plans of every budget
are solved for and the gate's polynomial is fitted; then the best few plans are run, the rules that need no tuning, and
plain mflux with fewer steps, all of them compared with the full pictures.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from ..distributed import Group, assist, check_equal, check_group, dismiss, done, installed
from ..errors import IncompatibleModelError, TeaCacheValueError
from ..files import check_writable
from ..handle import apply
from ..mflux.pictures import ending, generate, progress_bar, psnr
from ..plans import published_plans
from ..policy import MODES, Budget, Gate, Policy, Steps, Tolerance, as_text, step_count
from ..step.rules import budgeted
from .full import Case, FullRuns, full_run, packed, polynomial, threshold, unpacked
from .solve import Plan, Proposal, Recorded
from .tuned import BUDGET, CANDIDATES, CURVE, IDENTICAL, Kind, Tried, Tuned, as_json, limit

Job = tuple[str, int, dict[str, Any] | int | None]  # what it is called, of which case, how (None: all steps)
TOLERANCES = (*MODES.values(), 0.4)
_GUESS = 0.4  # share of the steps that a tolerance computes, for saying how long it takes


def tune(
    flux: Any,
    prompts: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    budget: float = BUDGET,
    curve: Sequence[float] = CURVE,
    candidates: int = CANDIDATES,
    forecast: int = Policy.forecast,
    path: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = False,
    group: Group | None = None,
    **options: Any,
) -> Tuned:
    """Find the policy that gives the best pictures of this model and schedule within a budget.

    Args:
        flux: A pipeline of mflux that ``apply`` takes, not gated; left as it was.
        prompts: What to judge by: each with each of ``seeds``, by the PSNR against plain mflux's picture.
        held_out: Other prompts, with which the best ones are compared at the end.
        seeds: Of the starting noise.
        budget: Share of the steps that the policy may compute.
        curve: Shares for which all is measured, beside ``budget``.
        candidates: So many plans are run for each of them, beside the one of ``apply(flux, budget=...)``.
        forecast: As for ``apply``.
        path: A file that is written after each picture, a policy for ``apply(flux, path)``; Ctrl-C loses nothing.
        force: Overwrite ``path``.
        resume: Go on with ``path`` if it is there, which was written with the same arguments, of the same model;
            ``budget``, ``curve`` and ``candidates`` may be others. What is in it is not run again.
        progress: Show on stderr how long it takes, and a bar.
        group: Of ranks that make the pictures together, as of ``mx.distributed.init()``; each calls this with the same
            arguments. Rank 0 decides, reads and writes ``path``, and shows the bar.
        **options: ``generate_image``'s: ``num_inference_steps`` (default here: 50), ``guidance``, ``height``, ...

    Returns:
        Tuned: Its ``policy`` is the best one within ``budget``; ``best(0.3)`` is that of another one.

    Raises:
        TeaCacheValueError: Bad arguments; ``path`` exists, or cannot be gone on with; no budget leaves a choice.
        IncompatibleModelError, AlreadyPatchedError: As for ``apply``.
        OutputError: ``path`` cannot be written; OSError: not read.
        TeaCacheError: Another rank is gone.
    """
    for name, value in {"prompts": prompts, "held_out": held_out, "seeds": seeds, "curve": curve}.items():
        may_be_empty = name in ("held_out", "curve")
        if isinstance(value, str) or not isinstance(value, Sequence) or not (value or may_be_empty):
            what = "a list" if may_be_empty else "a list that is not empty"
            raise TeaCacheValueError(f"{name} must be {what}, got {value!r}")
    if both := set(prompts) & set(held_out):
        raise TeaCacheValueError(f"a prompt is tuned on or held out, not both: {', '.join(sorted(both))}")
    shares = [Budget(budget=share).budget for share in (budget, *curve)]
    candidates = step_count("candidates", candidates)
    check_group(group)
    options = {"num_inference_steps": 50} | options
    num_steps = step_count("num_inference_steps", options["num_inference_steps"])
    _counts(shares, num_steps)
    with apply(flux, budget=shares[0], forecast=forecast) as handle:  # before anything slow
        if missing := [name for name in ("generate_image", "callbacks", "model_config") if not hasattr(flux, name)]:
            raise IncompatibleModelError(f"tune is for mflux's pipelines: {type(flux).__name__} has no {missing[0]}")
        model = {"variant_id": handle.variant_id, "model": flux.model_config.model_name}
    model["pipeline"] = type(flux).__name__
    model |= {name: getattr(flux, name, None) for name in ("bits", "lora_paths", "lora_scales")}
    cases = {"prompts": list(prompts), "held_out": list(held_out), "seeds": list(seeds)}
    setup = as_json({**model, **cases, "forecast": forecast, "options": options})
    tuned = Tuned(setup, num_steps, shares[0])
    if resume and path is None:
        raise TeaCacheValueError("resume needs the path of what to go on with")
    if group is not None:
        loras = [Path(lora).name for lora in setup["lora_paths"] or ()]
        asked = {"budget": shares[0], "curve": shares[1:], "candidates": candidates}
        check_equal(group, "tune", **installed(), **setup | {"lora_paths": loras}, **asked)
    pairs = [(prompt, seed) for prompt in (*prompts, *held_out) for seed in seeds]
    run = _Run(flux, tuned, pairs, shares, candidates, options, path, force or resume, group)
    if group is not None and group.rank() > 0:
        return run.assisting()
    if path is not None:
        check_writable(Path(path), force=force or resume, how="force=True")
        if resume and Path(path).exists():  # else it was interrupted before the first picture
            run.tuned = Tuned.from_json(path)
            run.tuned.check_same(setup, path)
            run.tuned.budget = shares[0]
    return run.all(progress)


def _counts(shares: Sequence[float], num_steps: int) -> dict[int, float]:
    """How many steps are to be computed, and of which share that is; the budget's first."""
    counts = dict[int, float]()
    for share in shares:
        if (count := limit(share, num_steps)) < num_steps:
            counts.setdefault(count, share)
    if limit(shares[0], num_steps) not in counts:
        raise TeaCacheValueError(f"budget={shares[0]:g} of {num_steps} steps leaves no step to choose")
    return counts


@dataclass
class _Run:
    """One call of ``tune``, whose arguments these are."""

    flux: Any
    tuned: Tuned
    cases: list[Case]
    shares: Sequence[float]
    candidates: int
    options: dict[str, Any]
    path: str | Path | None
    force: bool
    group: Group | None
    bar: Any = None
    end: Any = None

    def all(self, progress: bool) -> Tuned:
        tuned, learnt, total = self.tuned, self.tuned.learnt.stop, self.tuned.unseen.stop
        others, _ = self.left()
        n = math.ceil((total + learnt + others) / self.n_ranks) if others else 0  # that this rank makes
        n_steps = n * self.options["num_inference_steps"]
        with progress_bar(self.flux, n_steps, disable=not progress) as self.bar, ending(self.flux) as self.end:
            if not tuned.tried:
                tuned.num_steps = len(self.runs.sigmas) - 1
            counts = _counts(self.shares, tuned.num_steps)
            for count, share in counts.items():
                self.plans(count, share)
            tolerances = [Policy(rule=Tolerance(tolerance=value), forecast=self.order) for value in TOLERANCES]
            self.measure(*(self.entry("tolerance", None, policy) for policy in tolerances))
            self.measure(*(t for count in counts for t in (self.entry("fewer steps", count, None), *self.gates(count))))
            self.measure(*(t for t in tuned.curve() if t.count is None or t.count in counts), n=total)
            self.bar.total = self.bar.n
        self.write()
        if self.group is not None:
            dismiss(tuned.about, self.group)
        return tuned

    def assisting(self) -> Tuned:
        """On another rank than 0."""
        with progress_bar(self.flux, 0, disable=True) as self.bar, ending(self.flux) as self.end:
            return Tuned.of_about(assist(self.make, cast(Group, self.group)))

    @property
    def n_ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def order(self) -> int:
        return cast(int, self.tuned.setup["forecast"])

    @cached_property
    def runs(self) -> FullRuns:
        """Made as soon as anything is to be compared with them."""
        generate(self.flux, *self.cases[0], self.options | {"num_inference_steps": 2})  # compiles kernels
        found = list[dict[str, Any]]()
        for run in self.made([(prompt, i, None) for i, (prompt, _) in enumerate(self.cases)]):
            found.append(run)
            if len(found) == 1:
                self.say_how_long(*run["seconds"])
        return FullRuns.of(found)

    @cached_property
    def recorded(self) -> Recorded:
        return Recorded(self.runs.sigmas, self.runs.products, self.order, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return cast(int, self.options.get("height", 1024) * self.options.get("width", 1024) // 256)

    @cached_property
    def proposals(self) -> dict[int, list[Proposal]]:
        """Of each number of computed steps."""
        self.began("solving for plans")
        counts = _counts(self.shares, self.tuned.num_steps)
        return self.recorded.proposals({count: self.rule(share) for count, share in counts.items()})

    # ---- How long it takes

    def n_plans(self, count: int) -> int:
        """To be run, beside the rule's."""
        return min(self.candidates, math.comb(self.tuned.num_steps - 1, count - 1) - 1)

    def left(self) -> tuple[int, float]:
        """Pictures yet to be made beside the full ones, and to how many of these their computed steps amount."""
        tuned, learnt, total = self.tuned, self.tuned.learnt.stop, self.tuned.unseen.stop
        # Rule, gate and fewer steps with all prompts, and of the plans one.
        wanted: dict[int | None, float] = {
            count: 4 * total + (self.n_plans(count) - 1) * learnt for count in _counts(self.shares, tuned.num_steps)
        }
        wanted[None] = len(TOLERANCES) * total
        for t in tuned.tried:
            wanted[t.count] = max(0, wanted.get(t.count, 0) - len(t.psnr))
        whole = sum(n * (_GUESS if count is None else count / tuned.num_steps) for count, n in wanted.items())
        return int(sum(wanted.values())), whole

    def say_how_long(self, seconds: float, looking: float) -> None:
        """From what the first picture took, and looking at its predictions."""
        if self.bar.disable:
            return
        n, (others, whole) = len(self.cases), self.left()
        left = ((n + whole) * seconds + self.tuned.learnt.stop * looking) / self.n_ranks
        about = f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} seconds"
        full = f"{n} pictures with all {self.tuned.num_steps} steps ({seconds:.1f} s each)"
        on_ranks = "" if self.n_ranks == 1 else f" on {self.n_ranks} ranks"
        tqdm.write(f"{full}, {others} with fewer computed{on_ranks}: about {about}", file=sys.stderr)

    def began(self, what: str) -> None:
        best = self.tuned.best()
        self.bar.set_description_str(what if best is None else f"{what}, best so far {self.tuned.psnr(best):.1f} dB")

    # ---- What is tried

    def rule(self, share: float) -> Plan:
        """What ``apply(flux, budget=share)`` computes."""
        return budgeted(self.runs.sigmas[:-1], share, self.num_tokens, published_plans(self.flux.model_config))

    def plans(self, count: int, share: float) -> None:
        """The rule's, those that are solved for, and some that are near the best one."""
        budget = self.entry("budget", count, Policy.of(budget=share, forecast=self.order))
        plans = [t for t in self.tuned.tried if (t.kind, t.count) == ("plan", count)]
        self.measure(budget, *plans)
        if len(plans) >= self.n_plans(count):
            return
        rho = cast(Policy, budget.policy).rho(self.options.get("guidance") or 1.0)
        run = {(self.rule(share), rho): budget} | {_proposal(t): t for t in plans}
        while (n := self.n_plans(count) + 1 - len(run)) > 0:
            best = max(run, key=lambda proposal: self.tuned.psnr(run[proposal]))
            new = [p for p in dict.fromkeys(self.proposals[count]) if p not in run][:n]
            new = new or [p for p in self.recorded.near(best) if p not in run][:1]
            if not new:
                return
            for plan, corrector in new:
                policy = Policy(rule=Steps(steps=as_text(plan)), forecast=self.order, corrector=corrector)
                run[plan, corrector] = self.entry("plan", count, policy)
            self.measure(*(run[proposal] for proposal in new))

    def gates(self, count: int) -> list[Tried]:
        """With the polynomial, where there are enough steps for one and a threshold computes so many."""
        tuned = self.tuned
        if tuned.polynomial is None:
            tuned.polynomial = polynomial(self.runs)
        if not tuned.polynomial:
            return []
        how = {name: tuned.polynomial[name] for name in ("coefficients", "calibrated_range")}
        thresholds = tuned.polynomial.setdefault("thresholds", {})
        if str(count) not in thresholds:
            thresholds[str(count)] = threshold(self.runs.trace, how, count)
        if (value := thresholds[str(count)]) is None:
            return []
        return [self.entry("gate", count, Policy(rule=Gate(rel_l1_thresh=value, **how), forecast=self.order))]

    def measure(self, *wanted: Tried, n: int | None = None) -> None:
        """Each with the first ``n`` prompts (default: those to learn from), as far as that has not been done."""
        n, tuned = self.tuned.learnt.stop if n is None else n, self.tuned
        wanting = [(t, i) for t in wanted for i in range(len(t.psnr), n)]
        full = self.runs.pictures if wanting else []
        made = self.made([(t.name, i, self.how(t)) for t, i in wanting])
        for (t, i), (picture, skipped) in zip(wanting, made, strict=True):
            if t not in tuned.tried:
                tuned.tried.append(t)
            t.psnr.append(min(IDENTICAL, psnr(full[i], unpacked(picture))))
            t.computed.append(cast(int, t.count) if t.policy is None else tuned.num_steps - skipped)
            self.write()

    # ---- Pictures, which all ranks make

    def how(self, t: Tried) -> dict[str, Any] | int:
        """For ``make``: the settings, or how many steps."""
        if t.policy is not None:
            return t.policy.flat
        steps: int = self.options["num_inference_steps"]  # of image-to-image more than are active
        return round(steps * cast(int, t.count) / self.tuned.num_steps)

    def made(self, jobs: Sequence[Job]) -> Iterator[Any]:
        return done(self.make, jobs, self.group)

    def make(self, name: str, i: int, how: dict[str, Any] | int | None) -> Any:
        """Of a case the full run; or the picture with a policy's settings or fewer steps, and how many were skipped."""
        self.began(name)
        case = self.cases[i]
        if how is None:
            return full_run(self.flux, self.end, case, self.options, is_learnt=i < self.tuned.learnt.stop)
        if isinstance(how, int):
            return packed(generate(self.flux, *case, self.options | {"num_inference_steps": how})), 0
        with apply(self.flux, replace(Policy.of(**how), save_metadata=False)) as handle:
            return packed(generate(self.flux, *case, self.options)), handle.stats.skipped_count

    def entry(self, kind: Kind, count: int | None, policy: Policy | None) -> Tried:
        """Of an earlier call, or a new one; a budget has one plan for all shares of so many steps."""
        for t in self.tuned.tried:
            if (t.kind, t.count) == (kind, count) and (kind == "budget" or t.policy == policy):
                return t
        return Tried(kind, count, policy)

    def write(self) -> None:
        if self.path is not None:
            self.tuned.to_json(self.path, force=self.force)
            self.force = True


def _proposal(t: Tried) -> Proposal:
    flat = cast(Policy, t.policy).flat
    return Steps(steps=flat["steps"]).plan, flat["corrector"]
