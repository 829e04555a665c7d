"""Generates each prompt with plain mflux and gated, timed, and measures how far the pictures differ."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import TeaCacheValueError
from ..handle import apply
from ..mflux import pictures
from ..mflux.pictures import Image
from ..models import REGIMES
from ..policy import Gate, Policy, Rule, Steps
from ..record.stats import GenerationStats, bound
from . import SIZE, TinyKlein
from ._extra import demo_extra

with demo_extra():
    import tqdm  # noqa: F401  # for progress bars
    from skimage.metrics import structural_similarity

WARM_UP_STEPS = 5  # enough for both outcomes
WARM_UP_THRESHOLD = 1.0  # at which all are skipped but the first and the last


@dataclass(frozen=True, slots=True)
class Settings:
    """What all pictures of a comparison have in common. ``size`` is the side in pixels, a multiple of 16.

    ``tolerance`` is ``apply``'s, None its default; with ``threshold``, its ``rel_l1_thresh``, the gate decides.
    ``regime`` is a name of ``REGIMES``.
    """

    steps: int = 50
    seed: int = 1
    guidance: float = 4.0
    size: int = SIZE
    tolerance: float | None = None
    threshold: float | None = None
    regime: str = "own"

    @property
    def options(self) -> dict[str, Any]:
        """``generate_image``'s."""
        size = {"height": self.size, "width": self.size}
        return {"num_inference_steps": self.steps, "guidance": self.guidance} | size | REGIMES[self.regime].options


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, both ways. Pictures are RGB, shape ``(size, size, 3)``; times are seconds of ``generate_image``."""

    prompt: str
    plain: Image
    gated: Image
    plain_seconds: float
    gated_seconds: float
    rule: Rule
    generation: GenerationStats

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.gated_seconds

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the gated picture against the plain one, in dB; ``inf`` when identical."""
        return pictures.psnr(self.plain, self.gated)

    @property
    def ssim(self) -> float:
        """Structural similarity of the two pictures, at most 1 (identical); 7x7 windows, mean over the channels."""
        return float(structural_similarity(self.plain, self.gated, channel_axis=2, data_range=255))


@dataclass(frozen=True, slots=True)
class Summary:
    """All prompts together: sums of steps and seconds, medians of PSNR and SSIM."""

    steps: int
    skipped: int
    plain_seconds: float
    gated_seconds: float
    psnr: float
    ssim: float

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> "Summary":
        return cls(
            steps=sum(c.generation.num_steps for c in comparisons),
            skipped=sum(c.generation.skipped for c in comparisons),
            plain_seconds=sum(c.plain_seconds for c in comparisons),
            gated_seconds=sum(c.gated_seconds for c in comparisons),
            psnr=statistics.median(c.psnr for c in comparisons),
            ssim=statistics.median(c.ssim for c in comparisons),
        )

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.gated_seconds

    @property
    def bound(self) -> float:
        return bound(self.steps, self.skipped)


def check_prompts(flux: TinyKlein, prompts: Sequence[str]) -> None:
    """Refuse what the word table would silently turn into another prompt.

    Raises:
        TeaCacheValueError: A prompt has a word that the model does not know, too many words, or none.
    """
    known = set(flux.words)
    unknown: dict[str, None] = {}  # in order, each once
    for prompt in prompts:
        words = flux.text_encoder.split(prompt)
        if not words:
            raise TeaCacheValueError(f"prompt {prompt!r} has no words that count; --list-words shows prompts that work")
        if len(words) > flux.text_encoder.context:
            raise TeaCacheValueError(
                f"prompt {prompt!r} has {len(words)} words; the demo model reads at most {flux.text_encoder.context}"
            )
        unknown |= dict.fromkeys(word for word in words if word not in known)
    if unknown:
        named = []
        for word in unknown:
            near = get_close_matches(word, known, n=2, cutoff=0.7)
            named.append(repr(word) + (f" (near: {', '.join(near)})" if near else ""))
        raise TeaCacheValueError(
            f"the demo model does not know {', '.join(named)}; --list-words shows prompts that work"
        )


def compare(flux: TinyKlein, prompts: Sequence[str], settings: Settings, *, progress: bool = False) -> list[Comparison]:
    """Generate each prompt with plain mflux and gated, alternating which of the two goes first.

    A short generation of each kind goes before, untimed: MLX compiles its CPU kernels at first use. The pipeline is
    left as it was. ``progress`` shows one bar on stderr for the steps of all pictures.
    """
    warm_up_steps = min(WARM_UP_STEPS, settings.steps)
    total = 2 * warm_up_steps + 2 * settings.steps * len(prompts)
    policy = Policy.of(tolerance=settings.tolerance, rel_l1_thresh=settings.threshold)
    warm_up = policy
    if not policy.rule.skips_nothing and warm_up_steps > 1:
        warm_up = Policy(
            rule=Steps(steps="1".ljust(warm_up_steps, "0"))
            if settings.threshold is None
            else Gate(rel_l1_thresh=WARM_UP_THRESHOLD)
        )
    apply(flux, policy).restore()  # before anything slow: can the pipeline be gated?
    with pictures.progress_bar(flux, total, disable=not progress) as bar:

        def generate(label: str, prompt: str, steps: int) -> tuple[Image, float]:
            bar.set_description_str(label)
            start = time.perf_counter()
            picture = pictures.generate(flux, prompt, settings.seed, settings.options | {"num_inference_steps": steps})
            return picture, time.perf_counter() - start

        generate("warm-up", prompts[0], warm_up_steps)
        with apply(flux, warm_up):
            generate("warm-up", prompts[0], warm_up_steps)

        comparisons = []
        for i, prompt in enumerate(prompts):
            if i % 2 == 0:
                plain, plain_seconds = generate(f"{prompt}, plain", prompt, settings.steps)
            with apply(flux, policy) as handle:
                gated, gated_seconds = generate(f"{prompt}, gated", prompt, settings.steps)
            if i % 2 == 1:
                plain, plain_seconds = generate(f"{prompt}, plain", prompt, settings.steps)
            generation = handle.stats.last_generation
            assert generation is not None  # generate_image returned, so the handle has committed it
            comparisons.append(
                Comparison(prompt, plain, gated, plain_seconds, gated_seconds, handle.policy.rule, generation)
            )
    return comparisons
