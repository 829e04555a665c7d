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
from ..forecast import combined, reuse
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

N_FLAT = 11  # what the blocks need; the history follows

Predict = Callable[..., mx.array]
Modulation = tuple[mx.array, mx.array, mx.array]  # shift, scale, gate: (B, 1, D) each


class GatedSteps:
    """The steps of one generation: what stands in for the functions that mflux's pipeline runs a step with."""

    def __init__(self, transformer: Any, generation: Generation) -> None:
        self._transformer: Any = transformer
        self._generation = generation
        self._keeps_output = generation.handle.cache == "output"
        self._layers: Any = _Layers(
            transformer.transformer_blocks,
            transformer.single_transformer_blocks,
            transformer.context_embedder,
            transformer.double_stream_modulation_txt,
            transformer.single_stream_modulation,
            transformer.pos_embed,
        )
        self._bodies: list[ops.Body] = []  # one for each branch of the guidance if there is a key-value cache, else one
        self._arrays: list[mx.array] = []  # state and anchor
        # What the last computed steps made, the latest first: residuals, branch by branch, or outputs.
        self._history: list[mx.array] = []

    def predict(self, inner: Predict) -> Predict:
        """``inner`` with its blocks behind a gate.

        Args:
            inner: What mflux's ``_predict(transformer)`` or ``_cached_predict(transformer)`` returned: runs one step,
                all branches of the guidance.
        """

        def step(arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._step(inner, arrays, kwargs)

        def compute(_: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._planned_step(inner, None, [], kwargs)

        def skip(arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
            return self._planned_step(inner, arrays[0], arrays[1:], kwargs)

        # mflux leaves the step uncompiled on some Macs; where it compiles, the gated step is one graph too.
        def compiled(function: Step) -> Step:
            return function if AppleSiliconUtil.is_m1_or_m2() else captured(function)

        generation = self._generation
        n_kept = generation.handle.forecast + 1
        compiled_step, compiled_compute, compiled_skip = compiled(step), compiled(compute), compiled(skip)

        def predict(**kwargs: Any) -> mx.array:
            cache = kwargs.get("kv_cache")
            uncompiled = cache is not None  # a cache is no array; mflux does not compile then either
            if cache is not None and cache.is_extracting:
                # The references' keys and values are made in this step, so it always computes.
                noise = inner(**kwargs)
                if self._keeps_output:
                    self._history = [noise] * n_kept
                elif generation.plan is not None and generation.handle.budget is not None:
                    generation.plan = (True, True, *generation.plan[2:])  # there is no residual before step 1
                generation.record_kind("forced", is_kept=self._keeps_output)
            elif generation.plan is None:
                force, weights = generation.next_force(), generation.weights()
                if not self._arrays:
                    self._initialise(inner, kwargs)
                if not generation.history_is_valid:
                    self._history = [mx.zeros_like(a) for a in self._history]
                run = step if uncompiled else compiled_step
                noise, arrays = run([force, weights, *self._arrays, *self._history], kwargs)
                self._arrays, self._history = arrays[:2], arrays[2:]
                generation.record(self._arrays[0])
            elif generation.plan[generation.index]:
                noise, made = (compute if uncompiled else compiled_compute)([], kwargs)
                known = _split(self._history, len(made)) if self._history else [[a] * n_kept for a in made]
                self._history = [a for m, h in zip(made, known, strict=True) for a in [m, *h][:n_kept]]
                generation.record_kind("computed", is_kept=True)
            else:
                if not self._history:
                    raise TeaCacheValueError(
                        "steps must compute step 1 too where reference images have a key-value cache: step 0 makes it"
                    )
                noise, _ = (skip if uncompiled else compiled_skip)([generation.weights(), *self._history], kwargs)
                generation.record_kind("skipped")
            if generation.is_over:  # mflux's memory saver frees the weights before it decodes the image
                self._transformer = self._layers = None
                self._bodies, self._arrays, self._history = [], [], []
            return noise

        return predict

    def _step(self, inner: Predict, arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
        handle = self._generation.handle
        force, weights, state, anchor, *history = arrays
        residuals = [] if self._keeps_output else _split(history, len(history) // (handle.forecast + 1))
        reused: list[mx.array] = []
        skip = state
        new_history: list[list[mx.array]] = []

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            nonlocal state, anchor, reused, skip
            branch = len(new_history)  # the n-th call of the transformer is branch n of the guidance
            if branch == 0:  # block 0's modulated input does not depend on the prompt: one gate for all branches
                shift, scale, _ = inputs.image_modulation[0]
                anchor, reused, state = ops.gate(
                    inputs.gated,
                    shift,
                    scale,
                    anchor,
                    residuals,
                    mx.broadcast_to(weights, (len(residuals), weights.size)) if residuals else mx.zeros((0, 0)),
                    state,
                    force,
                    coefficients=handle.coefficients,
                    threshold=handle.rel_l1_thresh,
                    calibrated_range=handle.calibrated_range,
                    max_consecutive_skips=handle.max_consecutive_skips,
                    eps=self._layers.joint_blocks[0].norm1.eps,
                )
                skip = ops.decide(state)
            body = self._body(branch, inputs)
            if self._keeps_output:  # a skipped step's noise is replaced below, whatever the tail makes of this
                given = inputs.flat()
                on_skip = [inputs.gated.astype(body.trace(given).output_dtypes[0])]
            else:  # a computed step's residual comes first, and the oldest one goes
                given = [*inputs.flat(), *residuals[branch][:-1]]
                on_skip = [reused[branch], *residuals[branch]]
            out, *kept = ops.branch(skip, on_skip, body, given)
            new_history.append(kept)
            return out

        with self._blocks_replaced(kwargs, image_tokens):
            noise = inner(**kwargs)
        if not new_history or (residuals and len(new_history) != len(residuals)):
            raise _unexpected_calls(len(new_history), max(1, len(residuals)))
        if self._keeps_output:
            is_skipped = state[0] > 0
            noise = mx.where(is_skipped, combined(weights, history).astype(noise.dtype), noise)
            kept = zip(history, [noise, *history[:-1]], strict=True)
            new_history = [[mx.where(is_skipped, before, after) for before, after in kept]]
        return noise, [state, anchor, *(a for arrays in new_history for a in arrays)]

    def _planned_step(
        self, inner: Predict, weights: mx.array | None, history: list[mx.array], kwargs: dict[str, Any]
    ) -> tuple[mx.array, list[mx.array]]:
        """A step that is computed, or skipped with these weights; without a gate, so that nothing is measured."""
        if self._keeps_output:
            noise = inner(**kwargs) if weights is None else combined(weights, history).astype(history[0].dtype)
            return noise, [noise]
        residuals = [] if weights is None else _split(history, len(history) // weights.size)
        made: list[mx.array] = []

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            if weights is not None:
                made.append(inputs.gated)
                return reuse(inputs.gated, weights, residuals[len(made) - 1])
            image, residual = _run_blocks(self._layers, inputs.n_gated, inputs.kv_cache, *inputs.flat())
            made.append(residual)
            return image

        with self._blocks_replaced(kwargs, image_tokens):
            noise = inner(**kwargs)
        if not made:
            raise _unexpected_calls(0, 1)
        return mx.depends([noise], made)[0], made  # a residual that stays lazy would keep all tokens alive

    def _initialise(self, inner: Predict, kwargs: dict[str, Any]) -> None:
        """What goes from step to step, before the first: state, anchor, and a history of zeros.

        Shapes and dtypes follow from mflux's prelude and from the body, which are traced for that; nothing is
        evaluated, and the traced body is the one that the steps use. A compiled function within ``inner``
        sees tracers and keeps nothing of what it meets here.
        """
        anchors: list[tuple[Any, mx.Dtype]] = []
        made: list[tuple[Any, mx.Dtype]] = []
        n_kept = self._generation.handle.forecast + 1

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            shift, scale, _ = inputs.image_modulation[0]
            modulated = inputs.gated * scale + shift  # for its dtype
            passed = [] if self._keeps_output else [inputs.gated] * (n_kept - 1)  # of the history
            graph = self._body(len(anchors), inputs).trace([*inputs.flat(), *passed])
            anchors.append((modulated.shape, modulated.dtype))
            made.extend(zip(graph.output_shapes[1:2], graph.output_dtypes[1:2], strict=True))
            return inputs.gated.astype(graph.output_dtypes[0])

        given = {name: a for name, a in kwargs.items() if isinstance(a, mx.array)}

        def trace(*placeholders: mx.array) -> list[mx.array]:
            with self._blocks_replaced(kwargs, image_tokens):
                return [inner(**(kwargs | dict(zip(given, placeholders, strict=True))))]

        graph = ops.Body(trace, fold=False).trace(list(given.values()))
        if not anchors:
            raise _unexpected_calls(0, 1)
        if self._keeps_output:
            made = [(graph.output_shapes[0], graph.output_dtypes[0])]
        self._arrays = [mx.zeros(8), mx.zeros(*anchors[0])]
        if not self._history:
            self._history = [mx.zeros(*what) for what in made for _ in range(n_kept)]

    def _body(self, branch: int, inputs: "_BlockInputs") -> ops.Body:
        """The body of a branch of the guidance: the same for all, but that a key-value cache is one's own."""
        if inputs.kv_cache is None:
            branch = 0
        while len(self._bodies) <= branch:
            self._bodies.append(
                ops.Body(
                    lambda *arrays, cache=inputs.kv_cache, n=inputs.n_gated: [
                        *_run_blocks(self._layers, n, cache, *arrays[:N_FLAT])[: 1 if self._keeps_output else 2],
                        *arrays[N_FLAT:],
                    ]
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
            pos_embed=Later(lambda positions: (positions, positions)),  # cosine and sine
        )


def _split(arrays: list[mx.array], n: int) -> list[list[mx.array]]:
    """In ``n`` lists of one length."""
    length = len(arrays) // n
    return [arrays[i * length : (i + 1) * length] for i in range(n)]


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
    positions: mx.array  # of text and image tokens (T + S, 4)
    kv_cache: Any  # of the reference images' tokens, or None
    n_gated: int  # image tokens whose output the pipeline uses: the first ones

    @property
    def gated(self) -> mx.array:
        return self.x if self.x.shape[1] == self.n_gated else self.x[:, : self.n_gated]

    def flat(self) -> list[mx.array]:
        """``N_FLAT`` arguments of the body; ``_run_blocks`` takes them apart."""
        modulation = [a for m in self.image_modulation for a in m]
        return [self.x, self.prompt, self.text_time, self.single_time, self.positions, *modulation]


class _Layers(NamedTuple):
    """What the body is made of, as it is when the generation begins."""

    joint_blocks: Sequence[Any]
    single_blocks: Sequence[Any]
    context_embedder: Any
    text_modulation: Any
    single_modulation: Any
    pos_embed: Any


def _run_blocks(layers: _Layers, n_gated: int, kv_cache: Any, *flat: mx.array) -> list[mx.array]:
    """The body: all blocks, from ``_BlockInputs.flat``. Returns the image tokens, and what was added to ``x``.

    Block 0 normalises and modulates ``x`` itself, although the gate has done so: one more pass over ``x``, for which a
    computed step is mflux's to the last bit. The gate adds up the layer norm in another order.
    """
    x, prompt, text_time, single_time, positions, *modulation = flat
    rotary = layers.pos_embed(positions)
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
            x, prompt, image_modulation, text_time, temb_mod_params, image_rotary_emb[0], kv_cache, self.n_gated
        )
        return ImageTokens(self.image_tokens(inputs), n_text=prompt.shape[1])
