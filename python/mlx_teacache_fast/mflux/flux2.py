"""FLUX.2: one denoising step with gate and branch, as one graph that MLX compiled, around mflux's own forward pass.

While a step is traced, stand-ins take the place of the transformer's two lists of blocks. mflux's forward runs as it
is: embeddings, modulation, rotary embeddings, tail and guidance are its own. The first stand-in notes what the joint
blocks were given; the second one runs the gate and the branch, whose body is the real blocks of both lists. Layers
before the blocks that only the blocks need, for the text, are part of the body too: a skipped step leaves them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mflux.utils.apple_silicon import AppleSiliconUtil

from .. import ops
from ..errors import InternalStateError, TeaCacheValueError
from .blocks import ImageTokens, Later, StandIn, Step, captured, replaced
from .generation import Generation

PIPELINES = (Flux2Klein, Flux2KleinEdit)
REFUSED: dict[type, str] = {}

# By alias of mflux's model configuration: the variant, and whether its coefficients were fitted on this model.
VARIANTS = {
    "flux2-klein-4b": ("flux2-klein-4b", True),
    "flux2-klein-9b": ("flux2-klein-9b", True),
    "flux2-klein-9b-kv": ("flux2-klein-9b", False),
    "flux2-klein-base-4b": ("flux2-klein-base-4b", True),
    "flux2-klein-base-9b": ("flux2-klein-base-9b", True),
}

Predict = Callable[..., mx.array]
Modulation = tuple[mx.array, mx.array, mx.array]  # shift, scale, gate: (B, 1, D) each


class GatedSteps:
    """The steps of one generation: what stands in for the functions that mflux's pipeline runs a step with."""

    def __init__(self, transformer: Any, generation: Generation) -> None:
        self._transformer: Any = transformer
        self._generation = generation
        self._layers: Any = _Layers(
            transformer.transformer_blocks,
            transformer.single_transformer_blocks,
            transformer.context_embedder,
            transformer.double_stream_modulation_txt,
            transformer.single_stream_modulation,
        )
        self._bodies: list[ops.Body] = []  # one for each branch of the guidance if there is a key-value cache, else one
        self._arrays: list[mx.array] = []

    def predict(self, inner: Predict) -> Predict:
        """``inner`` with its blocks behind a gate.

        Args:
            inner: What mflux's ``_predict(transformer)`` or ``_cached_predict(transformer)`` returned: runs one step,
                all branches of the guidance.
        """

        def step(arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._step(inner, arrays, kwargs)

        def compute(_: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._planned_step(inner, None, kwargs)

        def skip(arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._planned_step(inner, arrays, kwargs)

        # mflux leaves the step uncompiled on some Macs; where it compiles, the gated step is one graph too.
        def compiled(function: Step) -> Step:
            return function if AppleSiliconUtil.is_m1_or_m2() else captured(function)

        plan = self._generation.handle.plan
        compiled_step, compiled_compute, compiled_skip = compiled(step), compiled(compute), compiled(skip)

        def predict(**kwargs: Any) -> mx.array:
            cache = kwargs.get("kv_cache")
            uncompiled = cache is not None  # a cache is no array; mflux does not compile then either
            if cache is not None and cache.is_extracting:
                # The references' keys and values are made in this step, so it always computes.
                self._generation.record("forced")
                return inner(**kwargs)
            if plan is None:
                if not self._arrays:
                    self._arrays = self._initial_arrays(inner, kwargs)
                run = step if uncompiled else compiled_step
                noise, self._arrays = run([self._generation.next_force(), *self._arrays], kwargs)
                self._generation.record(self._arrays[0])
            elif plan[self._generation.index]:
                noise, self._arrays = (compute if uncompiled else compiled_compute)([], kwargs)
                self._generation.record("computed")
            else:
                if not self._arrays:
                    raise TeaCacheValueError(
                        "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
                    )
                noise, self._arrays = (skip if uncompiled else compiled_skip)(self._arrays, kwargs)
                self._generation.record("skipped")
            if self._generation.is_over:  # mflux's memory saver frees the weights before it decodes the image
                self._transformer = self._layers = None
                self._bodies, self._arrays = [], []
            return noise

        return predict

    def _step(self, inner: Predict, arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
        handle = self._generation.handle
        force, state, anchor, *residuals = arrays
        reused: list[mx.array] = []
        skip = state
        new_residuals: list[mx.array] = []

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            nonlocal state, anchor, reused, skip
            branch = len(new_residuals)  # the n-th call of the transformer is branch n of the guidance
            if branch == 0:  # block 0's modulated input does not depend on the prompt: one gate for all branches
                shift, scale, _ = inputs.image_modulation[0]
                anchor, reused, state = ops.gate(
                    inputs.gated,
                    shift,
                    scale,
                    anchor,
                    [[r] for r in residuals],
                    mx.ones((len(residuals), 1)),
                    state,
                    force,
                    coefficients=handle.coefficients,
                    threshold=handle.rel_l1_thresh,
                    calibrated_range=handle.calibrated_range,
                    max_consecutive_skips=handle.max_consecutive_skips,
                    eps=self._layers.joint_blocks[0].norm1.eps,
                )
                skip = ops.decide(state)
            out, residual = ops.branch(
                skip, [reused[branch], residuals[branch]], self._body(branch, inputs), inputs.flat()
            )
            new_residuals.append(residual)
            return out

        with self._blocks_replaced(kwargs, image_tokens):
            noise = inner(**kwargs)
        if len(new_residuals) != len(residuals):
            raise _unexpected_calls(len(new_residuals), len(residuals))
        return noise, [state, anchor, *new_residuals]

    def _planned_step(
        self, inner: Predict, residuals: list[mx.array] | None, kwargs: dict[str, Any]
    ) -> tuple[mx.array, list[mx.array]]:
        """A step that is computed, or skipped by these residuals; without a gate, so that nothing is measured."""
        new_residuals: list[mx.array] = []

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            if residuals is not None:
                new_residuals.append(residuals[len(new_residuals)])
                return inputs.gated + new_residuals[-1]
            image, residual = _run_blocks(self._layers, inputs.n_gated, inputs.kv_cache, *inputs.flat())
            new_residuals.append(residual)
            return image

        with self._blocks_replaced(kwargs, image_tokens):
            noise = inner(**kwargs)
        if not new_residuals:
            raise _unexpected_calls(0, 1)
        return noise, new_residuals

    def _initial_arrays(self, inner: Predict, kwargs: dict[str, Any]) -> list[mx.array]:
        """What goes from step to step, before the first: state, anchor, and one residual for each branch.

        Shapes and dtypes follow from mflux's prelude and from the body, which are traced for that; nothing is
        evaluated, and the traced body is the one that the steps use. A compiled function within ``inner``
        sees tracers and keeps nothing of what it meets here.
        """
        arrays = [mx.zeros(8)]

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            shift, scale, _ = inputs.image_modulation[0]
            modulated = inputs.gated * scale + shift  # for its dtype
            if len(arrays) == 1:
                arrays.append(mx.zeros(modulated.shape, modulated.dtype))
            graph = self._body(len(arrays) - 2, inputs).trace(inputs.flat())
            arrays.append(mx.zeros(graph.output_shapes[1], graph.output_dtypes[1]))
            return inputs.gated

        given = {name: a for name, a in kwargs.items() if isinstance(a, mx.array)}

        def trace(*placeholders: mx.array) -> list[mx.array]:
            with self._blocks_replaced(kwargs, image_tokens):
                return [inner(**(kwargs | dict(zip(given, placeholders, strict=True))))]

        ops.Body(trace, fold=False).trace(list(given.values()))
        if len(arrays) == 1:
            raise _unexpected_calls(0, 1)
        return arrays

    def _body(self, branch: int, inputs: "_BlockInputs") -> ops.Body:
        """The body of a branch of the guidance: the same for all, but that a key-value cache is one's own."""
        if inputs.kv_cache is None:
            branch = 0
        while len(self._bodies) <= branch:
            self._bodies.append(
                ops.Body(
                    lambda *arrays, cache=inputs.kv_cache, n=inputs.n_gated: _run_blocks(
                        self._layers, n, cache, *arrays
                    )
                )
            )
        return self._bodies[branch]

    def _blocks_replaced(self, kwargs: dict[str, Any], image_tokens: Callable[["_BlockInputs"], mx.array]) -> Any:
        # Reference images have their tokens behind those of the latents, and the pipeline cuts them off afterwards.
        joint = _JointBlocks()
        single = _SingleBlocks(joint, image_tokens, n_gated=kwargs["latents"].shape[1])
        return replaced(
            self._transformer,
            [joint],
            [single],
            context_embedder=Later(),
            double_stream_modulation_txt=Later(),
            single_stream_modulation=Later(lambda time: (time,)),  # mflux takes the first of its sets
        )


def _unexpected_calls(found: int, expected: int) -> InternalStateError:
    return InternalStateError(
        f"a step called the transformer's blocks {found} times where {expected} were expected: something between "
        "generate_image and the transformer (a wrapped _predict, another patch) keeps its own trace of the step"
    )


@dataclass(frozen=True)
class _BlockInputs:
    """What mflux gives its blocks."""

    x: mx.array  # image tokens (B, S, D)
    prompt: mx.array  # text tokens (B, T, of the text encoder)
    image_modulation: tuple[Modulation, Modulation]  # attention, feed-forward
    text_time: mx.array  # what the text's and the single blocks' modulations are made from: (B, D)
    single_time: mx.array
    rotary: tuple[mx.array, mx.array]  # cos and sin of text and image positions
    kv_cache: Any  # of the reference images' tokens, or None
    n_gated: int  # image tokens whose output the pipeline uses: the first ones

    @property
    def gated(self) -> mx.array:
        return self.x if self.x.shape[1] == self.n_gated else self.x[:, : self.n_gated]

    def flat(self) -> list[mx.array]:
        """The body's arguments; ``_run_blocks`` takes them apart."""
        modulation = [a for m in self.image_modulation for a in m]
        return [self.x, self.prompt, self.text_time, self.single_time, *self.rotary, *modulation]


class _Layers(NamedTuple):
    """What the body is made of, as it is when the generation begins."""

    joint_blocks: Sequence[Any]
    single_blocks: Sequence[Any]
    context_embedder: Any
    text_modulation: Any
    single_modulation: Any


def _run_blocks(layers: _Layers, n_gated: int, kv_cache: Any, *flat: mx.array) -> list[mx.array]:
    """The body: all blocks, from ``_BlockInputs.flat``. Returns the image tokens, and what was added to ``x``.

    Block 0 normalises and modulates ``x`` itself, although the gate has done so: one more pass over ``x``, for which a
    computed step is mflux's to the last bit. The gate adds up the layer norm in another order.
    """
    x, prompt, text_time, single_time, cosine, sine, *modulation = flat
    rotary = cosine, sine
    context = layers.context_embedder(prompt)
    text_modulation = layers.text_modulation(text_time)
    single = layers.single_modulation(single_time)[0]
    image = x
    for i, block in enumerate(layers.joint_blocks):
        context, image = block(
            hidden_states=image,
            encoder_hidden_states=context,
            temb_mod_params_img=(tuple(modulation[:3]), tuple(modulation[3:])),
            temb_mod_params_txt=text_modulation,
            image_rotary_emb=rotary,
            kv_cache=kv_cache,
            kv_cache_layer_idx=i,
        )
    tokens = mx.concatenate([context, image], axis=1)
    for i, block in enumerate(layers.single_blocks):
        tokens = block(
            hidden_states=tokens,
            temb_mod_params=single,
            image_rotary_emb=rotary,
            kv_cache=kv_cache,
            kv_cache_layer_idx=i,
        )
    n_text = context.shape[1]
    image = tokens[:, n_text : n_text + n_gated]
    return [image, image - x[:, :n_gated]]


class _JointBlocks(StandIn):
    """Notes what the joint blocks are given and returns their inputs."""

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array,
        temb_mod_params_img: Any,
        temb_mod_params_txt: Any,
        image_rotary_emb: Any,
        kv_cache: Any = None,
        kv_cache_layer_idx: int | None = None,
    ) -> tuple[mx.array, mx.array]:
        self.keep(given=(hidden_states, encoder_hidden_states, temb_mod_params_img, temb_mod_params_txt))
        n_text, n_channels = encoder_hidden_states.shape[1], hidden_states.shape[-1]
        context = mx.zeros((hidden_states.shape[0], n_text, n_channels))  # joined on, which nobody reads
        return context, hidden_states


class _SingleBlocks(StandIn):
    """Stands for all blocks: mflux calls it last, when it has computed what both lists need."""

    def __init__(self, joint: _JointBlocks, image_tokens: Callable[[_BlockInputs], mx.array], n_gated: int) -> None:
        super().__init__()
        self.keep(joint=joint, image_tokens=image_tokens, n_gated=n_gated)

    def __call__(
        self, hidden_states: mx.array, temb_mod_params: Any, image_rotary_emb: Any, kv_cache: Any = None, **_: Any
    ) -> Any:
        x, prompt, image_modulation, text_time = self.joint.given
        inputs = _BlockInputs(
            x, prompt, image_modulation, text_time, temb_mod_params, image_rotary_emb, kv_cache, self.n_gated
        )
        return ImageTokens(self.image_tokens(inputs), n_text=prompt.shape[1])
