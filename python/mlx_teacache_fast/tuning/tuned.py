"""What was tried and what it gave, as a file that is a policy too; and which of it is best."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Literal, Self

from ..errors import TeaCacheValueError
from ..files import from_json
from ..policy import Budget, Gate, Policy, Steps, Tolerance

Kind = Literal["plan", "budget", "tolerance", "gate", "fewer steps"]
RULE_OF: dict[Kind, Any] = {"plan": Steps, "budget": Budget, "tolerance": Tolerance, "gate": Gate, "fewer steps": None}

# What tune does where nothing else is asked for.
BUDGET = 0.4
CURVE = (0.2, 0.3, 0.4, 0.5)
CANDIDATES = 4

IDENTICAL = 99.0  # dB, of pictures that do not differ: means need a number


@dataclass
class Tried:
    """One policy, or plain mflux with fewer steps.

    Attributes:
        kind: Which rule it has.
        count: Of the computed steps that it was made for; None of a tolerance.
        policy: None of fewer steps.
        psnr: In dB, against all steps, of the prompts tuned on and then of those held out, as far as it has been run.
        computed: Steps in each of these pictures.
    """

    kind: Kind
    count: int | None
    policy: Policy | None
    psnr: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def numbers(self, part: slice) -> dict[str, float] | None:
        """Of some of the pictures: means of computed steps and PSNR, its 10th percentile, and the worst."""
        psnr = self.psnr[part]
        if not psnr:
            return None
        worse = {"p10": quantiles(psnr, n=10, method="inclusive")[0] if len(psnr) > 1 else psnr[0], "worst": min(psnr)}
        return {"computed": fmean(self.computed[part]), "psnr": fmean(psnr), **worse}

    @property
    def name(self) -> str:
        """With its setting."""
        settings = {} if self.policy is None else self.policy.flat
        value = settings.get({"gate": "rel_l1_thresh"}.get(self.kind, self.kind), self.count)
        return f"{'threshold' if self.kind == 'gate' else self.kind} {value:g}"


def limit(budget: float, num_steps: int) -> int:
    """So many steps may be computed; two always are."""
    return max(2, math.floor(budget * num_steps + 1e-9))


@dataclass
class Tuned:
    """What ``tune`` found.

    Attributes:
        setup: Of what: the model, the prompts, ``generate_image``'s options, the forecast.
        num_steps: Active ones.
        budget: Share of them that may be computed by ``policy``.
        polynomial: The gate's, how well it fits, and with which thresholds how many steps compute (None: with no one).
            Empty where there were too few steps for one, None before it is fitted.
        tried: All that was, and what it gave.
    """

    setup: dict[str, Any]
    num_steps: int
    budget: float
    polynomial: dict[str, Any] | None = None
    tried: list[Tried] = field(default_factory=list)

    @property
    def learnt(self) -> slice:
        """Of the pictures, those of the prompts that were tuned on."""
        return slice(0, len(self.setup["prompts"]) * len(self.setup["seeds"]))

    @property
    def unseen(self) -> slice:
        """Those of the prompts that were held out."""
        return slice(self.learnt.stop, self.learnt.stop + len(self.setup["held_out"]) * len(self.setup["seeds"]))

    def finished(self, kind: Kind | None = None) -> list[Tried]:
        """What was run with all prompts that were tuned on."""
        return [t for t in self.tried if len(t.psnr) >= self.learnt.stop and kind in (None, t.kind)]

    def psnr(self, tried: Tried) -> float:
        """Mean, on the prompts that were tuned on."""
        return fmean(tried.psnr[self.learnt])

    def best(self, budget: float | None = None, kind: Kind | None = None) -> Tried | None:
        """Of what computes at most that share of the steps (default: ``budget``), on the prompts that were tuned on."""
        most = limit(self.budget if budget is None else budget, self.num_steps)
        finished = [t for t in self.finished(kind) if t.policy or kind]
        within = [t for t in finished if fmean(t.computed[self.learnt]) <= most + 1e-9]
        return max(within, key=self.psnr, default=None)

    def curve(self) -> list[Tried]:
        """What is worth showing: of the plans with equally many steps the best one."""
        counts = {t.count for t in self.finished("plan")}
        plans = [max((t for t in self.finished("plan") if t.count == c), key=self.psnr) for c in counts]
        shown = [*plans, *(t for t in self.finished() if t.kind != "plan")]
        return sorted(shown, key=lambda t: (list(RULE_OF).index(t.kind), fmean(t.computed[self.learnt])))

    @property
    def policy(self) -> Policy:
        """The best one within the budget; its own rule as long as nothing has been tried."""
        best = self.best()
        return Policy.of(budget=self.budget) if best is None or best.policy is None else best.policy

    @property
    def about(self) -> dict[str, Any]:
        """All as JSON has it."""
        tried = [
            {"kind": t.kind, "count": t.count, "policy": t.policy and t.policy.flat}
            | {"tuned_on": t.numbers(self.learnt), "held_out": t.numbers(self.unseen)}
            | {"psnr": t.psnr, "computed": t.computed}
            for t in self.tried
        ]
        fields = {"num_steps": self.num_steps, "budget": self.budget, "polynomial": self.polynomial}
        return {"setup": self.setup, **fields, "tried": tried}

    def to_json(self, path: str | Path, force: bool = False) -> None:
        """Write the policy for ``apply(flux, path)``, and all for ``from_json``; errors as of ``Policy.to_json``."""
        self.policy.to_json(path, force=force, about=self.about)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            TeaCacheValueError: It is not such a file, or is damaged.
            OSError: It cannot be read.
        """
        Policy.from_json(path)
        about = from_json(Path(path), "policy").get("about")
        if not isinstance(about, dict) or "tried" not in about:
            raise TeaCacheValueError(f"{path} is a policy, but not one of tune")
        try:
            return cls.of_about(about)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise TeaCacheValueError(f"{path} is of tune, but damaged: {what}") from error

    @classmethod
    def of_about(cls, about: dict[str, Any]) -> Self:
        """Of what ``about`` is; AttributeError, KeyError, TypeError or ValueError if it is none."""
        setup, n, polynomial = about["setup"], about["num_steps"], about["polynomial"]
        kinds = {"prompts": list, "held_out": list, "seeds": list, "model": str, "variant_id": str, "options": dict}
        for name, kind in kinds.items():
            _check(name, setup[name], isinstance(setup[name], kind))
        _check("num_steps", n, type(n) is int and n >= 2)
        budget = Budget(budget=about["budget"]).budget
        if polynomial:
            for name in ("r2", "held_out_r2"):
                _check(name, polynomial[name], type(polynomial[name]) in (float, type(None)))
            how = {name: polynomial[name] for name in ("coefficients", "calibrated_range")}
            for value in (*polynomial["thresholds"].values(), None):
                Gate(rel_l1_thresh=value, **how)
        found = cls(setup, n, budget, polynomial)
        for i, t in enumerate(about["tried"]):
            try:
                found.tried.append(_tried(t, n, found.unseen.stop))
            except (KeyError, TypeError, ValueError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"tried {i}: {what}") from error
        return found

    def check_same(self, setup: dict[str, Any], path: str | Path) -> None:
        """Whether it is of this setup."""
        if other := [name for name, value in setup.items() if self.setup.get(name) != value]:
            raise TeaCacheValueError(f"{path} was tuned with other {', '.join(other)}: resume takes the same ones")


def _tried(data: dict[str, Any], num_steps: int, n_pictures: int) -> Tried:
    kind, count, psnr, computed = (data[name] for name in ("kind", "count", "psnr", "computed"))
    _check("kind", kind, kind in tuple(RULE_OF))
    _check("count", count, (count is None) if kind == "tolerance" else type(count) is int and 2 <= count <= num_steps)
    _check("psnr", psnr, _is_list(psnr, (int, float), 0, IDENTICAL) and len(psnr) <= n_pictures)
    _check("computed", computed, _is_list(computed, (int,), 1, num_steps) and len(computed) == len(psnr))
    policy = None if data["policy"] is None else Policy.of(**data["policy"])
    _check("policy", data["policy"], type(policy and policy.rule) is (RULE_OF[kind] or type(None)))
    if policy is not None and isinstance(policy.rule, Steps):
        plan = policy.rule.plan
        _check("plan", policy.rule.steps, (len(plan), sum(plan)) == (num_steps, count))
    return Tried(kind, count, policy, psnr, computed)


def _is_list(values: Any, kinds: tuple[type, ...], low: float, high: float) -> bool:
    return isinstance(values, list) and all(type(v) in kinds and low <= v <= high for v in values)


def _check(name: str, value: Any, accepts: bool) -> None:
    if not accepts:
        raise ValueError(f"{name} cannot be {json.dumps(value)}")


def as_json(setup: dict[str, Any]) -> dict[str, Any]:
    """As a file has it."""
    found: dict[str, Any] = json.loads(json.dumps(setup, default=str))
    return found
