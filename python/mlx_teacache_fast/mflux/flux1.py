"""FLUX.1: gate and branch in each step, around mflux's own forward pass.

mflux runs FLUX.1 eagerly and calls the transformer itself. So for the time of a generation the transformer's class is a
subclass whose call is a gated step; the parent's call, mflux's, runs inside it with stand-ins for the two lists of
blocks. The branch compiles the blocks.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mflux.models.flux.variants.concept_attention.flux_concept import Flux1Concept
from mflux.models.flux.variants.concept_attention.flux_concept_from_image import Flux1ConceptFromImage
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.depth.flux_depth import Flux1Depth
from mflux.models.flux.variants.fill.flux_fill import Flux1Fill
from mflux.models.flux.variants.in_context.flux_in_context_dev import Flux1InContextDev
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.redux.flux_redux import Flux1Redux
from mflux.models.flux.variants.txt2img.flux import Flux1

from .. import ops
from ..forecast import combined, reuse
from .blocks import ImageTokens, Later, Returns, StandIn, replaced
from .generation import Generation

PIPELINES = (
    Flux1,
    Flux1Controlnet,
    Flux1Depth,
    Flux1Fill,
    Flux1InContextDev,
    Flux1InContextFill,
    Flux1Kontext,
    Flux1Redux,
)
REFUSED = dict.fromkeys(
    (Flux1Concept, Flux1ConceptFromImage),
    "it returns attention maps beside the image, which a step whose blocks are skipped does not have",
)

# By alias of mflux's model configuration: the variant, and whether its coefficients were fitted on this model.
VARIANTS = {
    "dev": ("flux1-dev", True),
    "schnell": ("flux1-schnell", True),
    "krea-dev": ("flux1-krea-dev", True),
    "dev-kontext": ("flux1-dev", False),
    "dev-fill": ("flux1-dev", False),
    "dev-redux": ("flux1-dev", False),
    "dev-depth": ("flux1-dev", False),
    "dev-controlnet-canny": ("flux1-dev", False),
    "dev-controlnet-upscaler": ("flux1-dev", False),
    "dev-fill-catvton": ("flux1-dev", False),
    "schnell-controlnet-canny": ("flux1-schnell", False),
}

Forward = Callable[..., mx.array]


@contextmanager
def steps_through(transformer: Any, step: Callable[..., mx.array]) -> Iterator[None]:
    """Until the end of the block, a call of ``transformer`` is ``step(forward, **arguments)``, with mflux's forward.

    A callback may generate too, also with another pipeline that has the same transformer: the innermost step counts.
    """
    if transformer is None:
        yield
        return
    before = type(transformer)
    enclosing = vars(transformer).get("_mlx_teacache_fast_step")
    still_there = weakref.ref(transformer)
    try:
        object.__setattr__(transformer, "_mlx_teacache_fast_step", step)
        if enclosing is None:
            object.__setattr__(transformer, "__class__", _stepping(cast(Hashable, before)))
        del transformer, step  # mflux's memory saver drops the transformer before the image is decoded
        yield
    finally:
        if (changed := still_there()) is not None:
            object.__setattr__(changed, "__class__", before)
            if enclosing is None:
                vars(changed).pop("_mlx_teacache_fast_step", None)
            else:
                object.__setattr__(changed, "_mlx_teacache_fast_step", enclosing)


@functools.cache
def _stepping(base: Any) -> type:
    signature = inspect.signature(base.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        noise: mx.array = self._mlx_teacache_fast_step(functools.partial(base.__call__, self), **arguments)
        return noise

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__, "__doc__": base.__doc__})


class GatedStep:
    """The steps of one generation."""

    def __init__(self, transformer: Any, generation: Generation) -> None:
        self._transformer: Any = transformer
        self._generation = generation
        self._joint_blocks = transformer.transformer_blocks
        self._single_blocks = transformer.single_transformer_blocks
        self._context_embedder = transformer.context_embedder
        self._body: Any = None  # an ops.Body; and one of a skipped step that is planned
        self._reuse: Any = None
        self._keeps_output = generation.handle.cache == "output"
        self._arrays: list[mx.array] = []  # state and anchor
        self._history: list[mx.array] = []  # residuals or outputs of the last computed steps, the latest first

    def __call__(
        self,
        forward: Forward,
        *,
        config: Any,
        controlnet_block_samples: list[mx.array] | None = None,
        controlnet_single_block_samples: list[mx.array] | None = None,
        **arguments: Any,
    ) -> mx.array:
        generation = self._generation
        plan, n_kept = generation.plan, generation.handle.forecast + 1
        is_computed = plan is None or plan[generation.index]
        if self._keeps_output and not is_computed:
            noise = combined(generation.weights(), self._history).astype(self._history[0].dtype)
            generation.record_kind("skipped")
            return self._done(noise)
        # Kontext has the reference image's tokens behind those of the latents, and cuts them off afterwards.
        n_tokens = (config.height // 16) * (config.width // 16)
        # The stand-ins are lists of one block, which must not get the samples that belong to others.
        samples = (controlnet_block_samples, controlnet_single_block_samples)
        joint = _JointBlocks()
        single = _SingleBlocks(joint, lambda *inputs: self._image_tokens(n_tokens, samples, *inputs))
        with replaced(self._transformer, [joint], [single], context_embedder=Later()):  # which only the blocks need
            noise = forward(config=config, **arguments)
        if self._keeps_output:
            weights, history = generation.weights(), self._history or [mx.zeros_like(noise)] * n_kept
            after = [noise, *history[:-1]]
            if plan is None:  # what the tail made of a skipped step's tokens is not used
                is_skipped = self._arrays[0][0] > 0
                noise = mx.where(is_skipped, combined(weights, history).astype(noise.dtype), noise)
                after = [mx.where(is_skipped, a, b) for a, b in zip(history, [noise, *history[:-1]], strict=True)]
            self._history = after
        if plan is None:
            generation.record(self._arrays[0])
        else:
            generation.record_kind("computed" if is_computed else "skipped", is_kept=is_computed)
        return self._done(noise)

    def _done(self, noise: mx.array) -> mx.array:
        if self._generation.is_over:  # mflux's memory saver frees the weights before it decodes the image
            self._transformer = self._joint_blocks = self._single_blocks = None
            self._context_embedder = self._body = self._reuse = None
            self._arrays, self._history = [], []
        return noise

    def _image_tokens(
        self,
        n_tokens: int,
        samples: tuple[list[mx.array] | None, list[mx.array] | None],
        x: mx.array,
        prompt: mx.array,
        time: mx.array,
        rotary: mx.array,
    ) -> mx.array:
        """Image tokens after all blocks ``(B, n_tokens, D)``, or what stands for them."""
        generation = self._generation
        handle = generation.handle
        norm = self._joint_blocks[0].norm1
        modulation: mx.array = norm.linear(nn.silu(time))  # type: ignore[attr-defined]  # (B, 6 D), for gate and block
        inputs = [x, prompt, time, rotary, modulation, *(s for part in samples for s in part or ())]
        gated = x if x.shape[1] == n_tokens else x[:, :n_tokens]
        if self._body is None:
            counts = [None if part is None else len(part) for part in samples]
            self._body = ops.Body(functools.partial(self._run_blocks, n_tokens, counts))
            self._reuse = ops.Body(lambda x, weights, *residuals: [reuse(x, weights, residuals)])
        n_kept = handle.forecast + 1
        if generation.plan is not None:  # no gate: nothing is measured
            if generation.plan[generation.index]:
                tokens, *made = self._body(inputs)
                if made:
                    self._history = [*made, *(self._history or made * n_kept)][:n_kept]
                return cast(mx.array, mx.depends([tokens], made)[0])  # a lazy residual would keep all tokens alive
            (tokens,) = self._reuse([gated, generation.weights(), *self._history])
            return cast(mx.array, tokens)
        shift, scale = modulation[:, : x.shape[-1]], modulation[:, x.shape[-1] : 2 * x.shape[-1]]
        force, weights = generation.next_force(), generation.weights()
        kept = [] if self._keeps_output else self._history[:-1] or [gated] * (n_kept - 1)
        graph = self._body.trace([*inputs, *kept])
        if not self._arrays:
            self._arrays = [mx.zeros(8), mx.zeros(gated.shape, mx.result_type(gated, modulation))]
            if not self._keeps_output:
                self._history = [mx.zeros(graph.output_shapes[1], graph.output_dtypes[1]) for _ in range(n_kept)]
        if not generation.history_is_valid:
            self._history = [mx.zeros_like(a) for a in self._history]
        state, anchor = self._arrays
        residuals = [] if self._keeps_output else [self._history]
        anchor, reused, state = ops.gate(
            gated,
            shift,
            scale,
            anchor,
            residuals,
            weights[None] if residuals else mx.zeros((0, 0)),
            state,
            force,
            coefficients=handle.coefficients,
            threshold=handle.rel_l1_thresh,
            calibrated_range=handle.calibrated_range,
            max_consecutive_skips=handle.max_consecutive_skips,
            eps=norm.norm.eps,
        )
        self._arrays = [state, anchor]
        on_skip = [reused[0], *self._history] if residuals else [gated.astype(graph.output_dtypes[0])]
        # A branch's inputs are evaluated in any case, and nothing may ask for the ControlNet of a skipped step.
        if any(samples) and state[0].item():
            return on_skip[0]
        kept = self._history[:-1] if residuals else []
        tokens, *made = ops.branch(state, on_skip, self._body, [*inputs, *kept])
        if made:
            self._history = made
        return tokens

    def _run_blocks(
        self,
        n_tokens: int,
        counts: list[int | None],
        x: mx.array,
        prompt: mx.array,
        time: mx.array,
        rotary: mx.array,
        modulation: mx.array,
        *more: mx.array,
    ) -> list[mx.array]:
        """The body: all blocks and ControlNet's samples, by mflux's own helpers, which look at the real lists.

        ``more`` are the samples, ``counts`` of either kind, and what is kept of the history.
        """
        n_joint, n_single = counts
        end_joint = n_joint or 0
        end_single = end_joint + (n_single or 0)
        joint_samples = None if n_joint is None else list(more[:end_joint])
        single_samples = None if n_single is None else list(more[end_joint:end_single])
        transformer = self._transformer
        norm = self._joint_blocks[0].norm1
        linear = norm.linear
        image, context = x, self._context_embedder(prompt)
        with replaced(transformer, self._joint_blocks, self._single_blocks):
            try:
                norm.linear = Returns(modulation)
                for i, block in enumerate(self._joint_blocks):
                    context, image = transformer._apply_joint_transformer_block(
                        idx=i,
                        block=block,
                        hidden_states=image,
                        encoder_hidden_states=context,
                        text_embeddings=time,
                        image_rotary_embeddings=rotary,
                        controlnet_block_samples=joint_samples,
                    )
                tokens = mx.concatenate([context, image], axis=1)
                for i, block in enumerate(self._single_blocks):
                    tokens = transformer._apply_single_transformer_block(
                        idx=i,
                        block=block,
                        hidden_states=tokens,
                        encoder_hidden_states=context,
                        text_embeddings=time,
                        image_rotary_embeddings=rotary,
                        controlnet_single_block_samples=single_samples,
                    )
            finally:
                norm.linear = linear
        n_text = context.shape[1]
        image = tokens[:, n_text : n_text + n_tokens]
        return [image] if self._keeps_output else [image, image - x[:, :n_tokens], *more[end_single:]]


class _JointBlocks(StandIn):
    """Notes what the joint blocks are given; mflux adds to what it returns, in place."""

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array,
        text_embeddings: mx.array,
        rotary_embeddings: Any,
    ) -> tuple[mx.array, mx.array]:
        self.keep(given=(hidden_states, encoder_hidden_states, text_embeddings, rotary_embeddings))
        n_text, n_channels = encoder_hidden_states.shape[1], hidden_states.shape[-1]
        context = mx.zeros((hidden_states.shape[0], n_text, n_channels))  # joined on, which nobody reads
        return context, mx.array(hidden_states)


class _SingleBlocks(StandIn):
    """Stands for all blocks: mflux calls it last, when it has computed what both lists need."""

    def __init__(self, joint: _JointBlocks, image_tokens: Callable[..., mx.array]) -> None:
        super().__init__()
        self.keep(joint=joint, image_tokens=image_tokens)

    def __call__(self, hidden_states: mx.array, text_embeddings: mx.array, rotary_embeddings: Any) -> Any:
        given = self.joint.given
        return ImageTokens(self.image_tokens(*given), n_text=given[1].shape[1])
