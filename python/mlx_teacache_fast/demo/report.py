"""The demo's table, picture sheet and plot."""

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..policy import Gate, Rule, Tolerance
from ..record.stats import Kind, StepRecord
from ._extra import demo_extra
from .compare import Comparison, Settings, Summary

with demo_extra():
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 16  # 1 level of 255 is invisible; times 16 it shows as dark grey
# The sheet's layout, in pixels. PANEL is the least side of a picture.
PANEL = 256
MARGIN = 16
HEAD = 92
CAPTION = 26
GAP = 18

# The colour of each kind of step, and what the legend says of it.
SHOWN: dict[Kind, tuple[str, str]] = {
    "computed": ("#2f6fb0", "computed"),
    "skipped": ("#f08a24", "skipped"),
    "forced": ("#8a8a8a", "forced (first and last)"),
    "numerical-miss": ("#c0272d", "computed: not a number"),
}
SAFEGUARD: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "linewidth": 0}
THRESHOLD: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def decibels(value: float) -> str:
    """``inf`` is spelt out, for identical pictures."""
    return f"{value:.1f}" if math.isfinite(value) else "identical"


def table(comparisons: Sequence[Comparison]) -> str:
    """One line per prompt and a last one for all of them, columns aligned."""
    rows: list[tuple[str, ...]] = [
        ("prompt", "steps", "skipped", "plain s", "gated s", "speedup", "bound", "PSNR dB", "SSIM")
    ]
    for c in comparisons:
        generation = c.generation
        rows.append((c.prompt, *_numbers(generation.num_steps, generation.skipped, generation.bound, c)))
    summary = Summary.of(comparisons)
    rows.append(("all (sum, median)", *_numbers(summary.steps, summary.skipped, summary.bound, summary)))
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _numbers(steps: int, skipped: int, bound: float, of: Comparison | Summary) -> tuple[str, ...]:
    counts = str(steps), str(skipped)
    times = f"{of.plain_seconds:.2f}", f"{of.gated_seconds:.2f}", f"{of.speedup:.2f}x", f"{bound:.2f}x"
    return *counts, *times, decibels(of.psnr), f"{of.ssim:.4f}"


def _limit(rule: Rule) -> tuple[str, float]:
    """What a step is skipped below: its name and value."""
    if isinstance(rule, Tolerance):
        return "tolerance", rule.tolerance or 0.0
    return "threshold", cast(Gate, rule).rel_l1_thresh or 0.0


def settings_line(settings: Settings, rule: Rule) -> str:
    """The settings that all pictures share, with the limit in force."""
    name, limit = _limit(rule)
    return (
        f"{settings.steps} steps, guidance {settings.guidance:g}, seed {settings.seed}, {name} {limit:g}, "
        f"{settings.size}x{settings.size} pixels" + f", regime {settings.regime}" * (settings.regime != "own")
    )


def images_png(comparisons: Sequence[Comparison], settings: Settings) -> bytes:
    """A PNG with a row per prompt: plain mflux, gated, and their difference times ``DIFFERENCE_GAIN``.

    The pictures are enlarged by whole factors without smoothing, so every pixel is as generated.
    """
    scale = max(1, -(-PANEL // settings.size))
    side = settings.size * scale
    width = 3 * side + 4 * MARGIN
    height = HEAD + len(comparisons) * (side + CAPTION + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title, text, bold = _font(15, bold=True), _font(13), _font(13, bold=True)
    draw.text((MARGIN, MARGIN - 2), "TinyKlein, a demonstration model: plain mflux against gated", "black", title)
    draw.text((MARGIN, MARGIN + 20), settings_line(settings, comparisons[0].rule), "#555555", text)
    columns = [MARGIN + i * (side + MARGIN) for i in range(3)]
    for x, label in zip(columns, ("plain mflux", "gated", f"difference × {DIFFERENCE_GAIN}"), strict=True):
        draw.text((x, HEAD - 22), label, "black", bold)
    for i, c in enumerate(comparisons):
        y = HEAD + i * (side + CAPTION + GAP)
        difference = np.abs(c.plain.astype(np.int16) - c.gated) * DIFFERENCE_GAIN
        for x, pixels in zip(columns, (c.plain, c.gated, np.minimum(difference, 255).astype(np.uint8)), strict=True):
            sheet.paste(Image.fromarray(np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)), (x, y))
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#cccccc")
        below = y + side + 6
        quality = "identical" if math.isinf(c.psnr) else f"PSNR {c.psnr:.1f} dB, SSIM {c.ssim:.4f}"
        draw.text((columns[0], below), _fitted(f"{c.prompt}: {c.plain_seconds:.2f} s", side, text), "black", text)
        gated = f"{c.gated_seconds:.2f} s, {c.generation.skipped} of {c.generation.num_steps} steps skipped"
        draw.text((columns[1], below), _fitted(gated, side, text), "black", text)
        draw.text((columns[2], below), _fitted(quality, side, text), "black", text)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"  # both come with matplotlib
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, size)


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """``text``, cut to ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def plot_png(comparisons: Sequence[Comparison], settings: Settings) -> bytes:
    """``plot`` as a PNG, 1200 pixels wide."""
    buffer = io.BytesIO()
    plot(comparisons, settings).savefig(buffer, format="png")
    return buffer.getvalue()


def plot(comparisons: Sequence[Comparison], settings: Settings) -> Figure:
    """A row per prompt: each step's relative L1 distance, and what was compared with the threshold or tolerance."""
    rows = len(comparisons)
    name, limit = _limit(comparisons[0].rule)
    watches = isinstance(comparisons[0].rule, Tolerance)
    figure = Figure(figsize=(12, 1.35 + 2.55 * rows), dpi=100, layout="constrained")
    title = "What decided each step (TinyKlein, a demonstration model)"
    figure.suptitle(f"{title}\n{settings_line(settings, comparisons[0].rule)}", fontsize=12)
    grid = figure.subplots(rows, 2, squeeze=False)
    safeguard = False
    for (left, right), c in zip(grid, comparisons, strict=True):
        steps = c.generation.steps
        measured = [step for step in steps if step.rel_l1 is not None]
        at, distances, colours = [s.index for s in measured], [s.rel_l1 for s in measured], _colours(measured)
        left.plot(at, distances, color="#bbbbbb", linewidth=1, zorder=1)
        left.scatter(at, distances, c=colours, s=18, zorder=2)
        left.set_ylim(bottom=0)
        left.set_ylabel("forecast's miss,\nrelative L1" if watches else "relative L1 distance\nto the step before")
        left.set_title(c.prompt, loc="left", fontsize=11, fontweight="bold")

        # A computed step resets the gate's sum: it saw the sum after the step before plus this step's share.
        before = [0.0, *(0.0 if watches else step.accumulated for step in steps[:-1])]
        seen = [total + (step.predicted or 0.0) for total, step in zip(before, steps, strict=True)]
        decided = [step for step in steps if step.predicted is not None] if watches else measured
        bars = right.bar(
            [s.index for s in decided], [seen[s.index] for s in decided], color=_colours(decided), width=0.8
        )
        for bar, step in zip(bars, decided, strict=True):
            if step.kind == "computed" and seen[step.index] < limit:
                bar.set(**SAFEGUARD)
                safeguard = True
        others = [step for step in steps if step not in decided]
        at_0 = [0.0] * len(others)
        right.scatter([s.index for s in others], at_0, c=_colours(others), s=40, marker="s", clip_on=False)
        right.axhline(limit, **THRESHOLD)
        right.set_ylim(0, 3 * limit or None if watches else None)  # a miss that was expected far above tells no more
        right.set_ylabel("expected miss\nat the decision" if watches else "accumulated distance\nat the decision")
        skipped = f"{c.generation.skipped} of {len(steps)} steps skipped"
        right.set_title(skipped, loc="right", fontsize=10, color="#555555")
        for axes in (left, right):
            axes.set_xlim(-1, len(steps))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color="#eeeeee")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("denoising step")
    made = {step.kind for c in comparisons for step in c.generation.steps}
    mark = functools.partial(Line2D, [], [], marker="s", linestyle="")
    handles: list[Any] = [
        mark(markersize=8, color=colour, label=label) for kind, (colour, label) in SHOWN.items() if kind in made
    ]
    if safeguard:
        handles.append(Patch(facecolor=SHOWN["computed"][0], **SAFEGUARD, label="computed by a safeguard"))
    handles.append(Line2D([], [], **THRESHOLD, label=name))
    handles.append(mark(markersize=6, color="black", fillstyle="none", label="decided without (at 0)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    return figure


def _colours(steps: Sequence[StepRecord]) -> list[str]:
    return [SHOWN[step.kind][0] for step in steps]
