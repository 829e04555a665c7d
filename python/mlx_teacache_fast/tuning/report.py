"""What ``tune`` found, as a text and a plot."""

import io
from typing import Any

from ..models import TINY_KLEIN
from .tuned import Kind, Tried, Tuned, limit

# The colour and the marker of each kind, and what the legend says of it.
SHOWN: dict[Kind, tuple[str, str, str]] = {
    "plan": ("#c0272d", "o", "plan, solved for"),
    "budget": ("#f08a24", "s", "budget, by rule or as published"),
    "tolerance": ("#2f6fb0", "D", "tolerance"),
    "gate": ("#5a9e4b", "^", "gate, with this polynomial"),
    "fewer steps": ("#8a8a8a", "x", "fewer steps, plain mflux"),
}


def heading(tuned: Tuned) -> str:
    """What was tuned."""
    setup, options = tuned.setup, tuned.setup["options"]
    is_demo = setup["variant_id"] == TINY_KLEIN.variant_id
    what = [TINY_KLEIN.display_name if is_demo else setup["model"], f"{tuned.num_steps} steps"]
    if {"width", "height"} <= options.keys():
        what.append(f"{options['width']}x{options['height']}")
    what += [f"{name} {options[name]}" for name in ("guidance", "scheduler") if name in options]
    return ", ".join(what)


def text(tuned: Tuned) -> str:
    """A line for each thing that is worth showing, and which is best of what the budget allows."""
    parts = _parts(tuned)
    chosen, curve, most = tuned.best(), tuned.curve(), limit(tuned.budget, tuned.num_steps)
    lines = [" " * 16 + "".join(f"{name + ': ' + _pictures(part):>27}" for name, part in parts.items())]
    lines.append(" " * 16 + f"{'computed':>11}{'PSNR (p10)':>16}" * len(parts))
    for t in curve:
        cells = [t.numbers(part) for part in parts.values()]
        row = "".join(f"{n['computed']:11.1f}{n['psnr']:9.1f} ({n['p10']:.1f})" if n else f"{'-':>27}" for n in cells)
        lines.append(f"{t.name:16}{row}{'  <- the policy' * (t is chosen)}")
    lines.append(f"\nbest with at most {most} of {tuned.num_steps} steps computed:")
    first: dict[str, Tried | None] = {}
    for name, part in parts.items():
        best = [(n["psnr"], b) for kind in SHOWN if (b := tuned.best(kind=kind)) and (n := b.numbers(part))]
        best.sort(key=lambda pair: -pair[0])
        lines.append(f"  {name}  {', '.join(f'{b.name} {psnr:.1f} dB' for psnr, b in best)}")
        first[name] = best[0][1] if best else None
    if first.get("held out", chosen) is not chosen:
        lines.append(
            "What is best on prompts that were not tuned on is another one: use it, or tune with more prompts."
        )
    return "\n".join(lines)


def plot(tuned: Tuned) -> bytes:
    """PSNR against computed steps, as a PNG: on the prompts tuned on, and on those held out."""
    from matplotlib.figure import Figure

    parts = _parts(tuned)
    figure = Figure(figsize=(12, 5.5), dpi=100, layout="constrained")
    figure.suptitle(f"{heading(tuned)}: means, and lines down to the 10th percentile", fontsize=12)
    chosen = tuned.best()
    panels: Any = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, part) in zip(panels, parts.items(), strict=True):
        for kind, (colour, marker, label) in SHOWN.items():
            numbers = [n for t in tuned.curve() if t.kind == kind and (n := t.numbers(part)) is not None]
            numbers.sort(key=lambda n: n["computed"])
            x, mean, low = ([n[key] for n in numbers] for key in ("computed", "psnr", "p10"))
            axes.plot(x, mean, color=colour, marker=marker, markersize=6, linewidth=1.5, label=label, zorder=3)
            axes.vlines(x, low, mean, color=colour, linewidth=1, alpha=0.6, zorder=2)
        if chosen is not None and (n := chosen.numbers(part)) is not None:
            ring: dict[str, Any] = {"s": 180, "facecolors": "none", "edgecolors": "black", "zorder": 4}
            axes.scatter([n["computed"]], [n["psnr"]], **ring, label=f"the policy: {chosen.name}")
        budget = limit(tuned.budget, tuned.num_steps)
        axes.axvline(budget, color="black", linestyle="--", linewidth=0.8, label=f"at most {budget} steps")
        axes.set_title(f"{name}: {_pictures(part)}", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(f"computed steps of {tuned.num_steps}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("PSNR against all steps, dB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _parts(tuned: Tuned) -> dict[str, slice]:
    parts = {"tuned on": tuned.learnt, "held out": tuned.unseen}
    return {name: part for name, part in parts.items() if part.stop > part.start}


def _pictures(part: slice) -> str:
    count = part.stop - part.start
    return f"{count} picture{'s' * (count != 1)}"
