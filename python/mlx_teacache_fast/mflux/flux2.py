"""FLUX.2: one denoising step with gate and branch, inside one ``mx.compile``, around mflux's own forward pass.

While a step is traced, stand-ins take the place of the transformer's two lists of blocks. mflux's forward runs as it
is: embeddings, modulation, rotary embeddings, tail and guidance are its own. The first stand-in notes what the joint
blocks were given; the second one runs the gate and the branch, whose body is the real blocks of both lists.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mflux.utils.apple_silicon import AppleSiliconUtil

from .. import ops
from ..errors import TeaCacheError
from ..handle import Handle

__all__ = ["VARIANT_IDS", "Flux2Klein", "gated_predict"]

VARIANT_IDS = ("flux2-klein-4b", "flux2-klein-9b", "flux2-klein-base-4b", "flux2-klein-base-9b")

Predict = Callable[..., mx.array]
Modulation = tuple[mx.array, mx.array, mx.array]  # shift, scale, gate: (B, 1, D) each


def gated_predict(
    transformer: Any, inner: Predict, handle: Handle, num_steps: int, states: list[mx.array | None]
) -> Predict:
    """What stands in for the function that mflux's ``_predict`` returned for this generation.

    Args:
        transformer: mflux's ``Flux2Transformer``.
        inner: What mflux's ``_predict(transformer)`` returned: runs one step, all branches of the guidance.
        handle: Threshold, coefficients and forced steps.
        num_steps: Active steps of the schedule.
        states: Receives the gate's state (float32 ``(8,)``) of each step.
    """
    joint_blocks, single_blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    norm_eps = joint_blocks[0].norm1.eps
    body = ops.Body(lambda *arrays: _run_blocks(joint_blocks, single_blocks, *arrays))

    def step(arrays: list[mx.array], force: mx.array, kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
        state, anchor, *residuals = arrays
        reused: list[mx.array] = []
        skip = state
        new_residuals: list[mx.array] = []

        def image_tokens(inputs: _BlockInputs) -> mx.array:
            nonlocal state, anchor, reused, skip
            branch = len(new_residuals)  # the n-th call of the transformer is branch n of the guidance
            if branch == 0:  # block 0's modulated input does not depend on the prompt: one gate for all branches
                shift, scale, _ = inputs.image_modulation[0]
                anchor, reused, state = ops.gate(
                    inputs.x,
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
                    eps=norm_eps,
                )
                skip = ops.decide(state)
            out, residual = ops.branch(skip, [reused[branch], residuals[branch]], body, inputs.flat())
            new_residuals.append(residual)
            return out

        with _blocks_replaced(transformer, image_tokens):
            noise = inner(**kwargs)
        if len(new_residuals) != len(residuals):
            raise _unexpected_calls(len(new_residuals), len(residuals))
        return noise, [state, anchor, *new_residuals]

    # mflux leaves the step uncompiled on some Macs; where it compiles, the gated step is one compiled function too.
    run = step if AppleSiliconUtil.is_m1_or_m2() else mx.compile(step)
    forces = [mx.array(force, dtype=mx.int32) for force in (0, 1, 2)]
    arrays: list[mx.array] = []

    def predict(**kwargs: Any) -> mx.array:
        nonlocal arrays
        if not arrays:
            arrays = _initial_arrays(transformer, inner, body, kwargs)
        index = len(states)
        leading = index < handle.skip_first_n_steps
        trailing = index >= num_steps - handle.skip_last_n_steps
        noise, arrays = run(arrays, forces[1 if leading else 2 if trailing else 0], kwargs)
        states.append(arrays[0])
        return noise

    return predict


def _initial_arrays(transformer: Any, inner: Predict, body: ops.Body, kwargs: dict[str, Any]) -> list[mx.array]:
    """What goes from step to step, before the first: state, anchor, and one residual for each branch.

    Shapes and dtypes follow from mflux's prelude and from the body, which are traced for that; nothing is evaluated,
    and the traced body is the one that the steps use. The trace is one of mx.compile, so that a compiled function
    within ``inner`` sees tracers and keeps nothing of what it meets here.
    """
    arrays = [mx.zeros(8)]

    def image_tokens(inputs: _BlockInputs) -> mx.array:
        shift, scale, _ = inputs.image_modulation[0]
        modulated = inputs.x * scale + shift  # for its dtype
        if len(arrays) == 1:
            arrays.append(mx.zeros(modulated.shape, modulated.dtype))
        graph = body.trace(inputs.flat())
        arrays.append(mx.zeros(graph.output_shapes[1], graph.output_dtypes[1]))
        return inputs.x

    def trace(kwargs: dict[str, Any]) -> mx.array:
        with _blocks_replaced(transformer, image_tokens):
            return inner(**kwargs)

    mx.compile(trace)(kwargs)
    if len(arrays) == 1:
        raise _unexpected_calls(0, 1)
    return arrays


def _unexpected_calls(found: int, expected: int) -> TeaCacheError:
    return TeaCacheError(
        f"a step called the transformer's blocks {found} times where {expected} were expected: something between "
        "generate_image and the transformer (a wrapped _predict, another patch) keeps its own trace of the step"
    )


@dataclass(frozen=True)
class _BlockInputs:
    """What mflux gives its blocks."""

    x: mx.array  # image tokens (B, S, D)
    context: mx.array  # text tokens (B, T, D)
    image_modulation: tuple[Modulation, Modulation]  # attention, feed-forward
    text_modulation: tuple[Modulation, Modulation]
    single_modulation: Modulation
    rotary: tuple[mx.array, mx.array]  # cos and sin of text and image positions

    def flat(self) -> list[mx.array]:
        """The body's arguments; ``_run_blocks`` takes them apart."""
        modulations = (*self.image_modulation, *self.text_modulation, self.single_modulation)
        return [self.x, self.context, *(a for m in modulations for a in m), *self.rotary]


def _run_blocks(joint_blocks: Sequence[Any], single_blocks: Sequence[Any], *flat: mx.array) -> list[mx.array]:
    """The body: all blocks, from ``_BlockInputs.flat``. Returns the image tokens, and what was added to ``x``.

    Block 0 normalises and modulates ``x`` itself, although the gate has done so: one more pass over ``x``, for which a
    computed step is mflux's to the last bit. The gate adds up the layer norm in another order.
    """
    x, context, *rest = flat
    image_attention, image_mlp, text_attention, text_mlp, single = (tuple(rest[i : i + 3]) for i in range(0, 15, 3))
    rotary = tuple(rest[15:])
    image = x
    for block in joint_blocks:
        context, image = block(
            hidden_states=image,
            encoder_hidden_states=context,
            temb_mod_params_img=(image_attention, image_mlp),
            temb_mod_params_txt=(text_attention, text_mlp),
            image_rotary_emb=rotary,
        )
    tokens = mx.concatenate([context, image], axis=1)
    for block in single_blocks:
        tokens = block(hidden_states=tokens, temb_mod_params=single, image_rotary_emb=rotary)
    image = tokens[:, context.shape[1] :]
    return [image, image - x]


# ---- Stand-ins. They are modules because an nn.Module keeps the place of a child only for another module.


@contextmanager
def _blocks_replaced(transformer: Any, image_tokens: Callable[[_BlockInputs], mx.array]) -> Iterator[None]:
    """Until the end of the block, a call of ``transformer`` gets its image tokens from ``image_tokens``."""
    joint_blocks, single_blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    joint = _JointBlocks()
    try:
        transformer.transformer_blocks = [joint]
        transformer.single_transformer_blocks = [_SingleBlocks(joint, image_tokens)]
        yield
    finally:
        transformer.transformer_blocks, transformer.single_transformer_blocks = joint_blocks, single_blocks


class _JointBlocks(nn.Module):  # type: ignore[misc, name-defined]
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
        if kv_cache is not None:
            raise TeaCacheError("a FLUX.2 step with a key-value cache cannot be gated")
        given = (hidden_states, encoder_hidden_states, temb_mod_params_img, temb_mod_params_txt)
        object.__setattr__(self, "given", given)
        return encoder_hidden_states, hidden_states


class _SingleBlocks(nn.Module):  # type: ignore[misc, name-defined]
    """Stands for all blocks: mflux calls it last, when it has computed what both lists need."""

    def __init__(self, joint: _JointBlocks, image_tokens: Callable[[_BlockInputs], mx.array]) -> None:
        super().__init__()
        object.__setattr__(self, "joint", joint)
        object.__setattr__(self, "image_tokens", image_tokens)

    def __call__(self, hidden_states: mx.array, temb_mod_params: Any, image_rotary_emb: Any, **_: Any) -> Any:
        x, context, image_modulation, text_modulation = self.joint.given
        inputs = _BlockInputs(x, context, image_modulation, text_modulation, temb_mod_params, image_rotary_emb)
        return _ImageTokens(self.image_tokens(inputs), n_text=inputs.context.shape[1])


class _ImageTokens:
    """The image tokens, for mflux's ``tokens[:, n_text:, ...]``: text tokens would be joined on only to be cut off."""

    def __init__(self, tokens: mx.array, n_text: int) -> None:
        self._tokens = tokens
        self._slice = (slice(None), slice(n_text, None), ...)

    def __getitem__(self, index: Any) -> mx.array:
        if index != self._slice:
            raise TeaCacheError(f"mflux's FLUX.2 forward takes {index} of the tokens; {self._slice} was expected")
        return self._tokens
