"""Stand-ins for a transformer's two lists of blocks. mflux's own forward pass runs around them.

They are modules because an nn.Module keeps the place of a child only for another module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .. import ops
from ..errors import InternalStateError


class StandIn(nn.Module):  # type: ignore[misc, name-defined]
    """A module that keeps what it is given out of ``parameters()``."""

    def keep(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)


class Returns(StandIn):
    """Stands for a layer whose output is known already."""

    def __init__(self, output: mx.array) -> None:
        super().__init__()
        self.keep(output=output)

    def __call__(self, *_: Any) -> Any:
        return self.output


class Later(StandIn):
    """Stands for a layer whose output only the blocks need: hands its input on, and the body calls the layer."""

    def __init__(self, wrap: Callable[[mx.array], Any] = lambda given: given) -> None:
        super().__init__()
        self.keep(wrap=wrap)

    def __call__(self, given: mx.array) -> Any:
        return self.wrap(given)


Step = Callable[[list[mx.array], dict[str, Any]], tuple[mx.array, list[mx.array]]]


def captured(step: Step) -> Step:
    """``step`` as one graph, as ``mx.compile`` makes it; but its weights are freed with it (see ``ops.Body``).

    Args:
        step: Takes arrays, and mflux's arguments; returns the noise, and arrays.
    """
    bodies: list[tuple[list[Any], ops.Body]] = []  # one, or more if a constant changes from step to step

    def call(arrays: list[mx.array], kwargs: dict[str, Any]) -> tuple[mx.array, list[mx.array]]:
        kwargs = dict(sorted(kwargs.items()))
        leaves = cast(list[tuple[str, Any]], tree_flatten(kwargs))
        inputs = [*arrays, *(leaf for _, leaf in leaves if isinstance(leaf, mx.array))]
        constants: list[Any] = [len(arrays)]
        for path, leaf in leaves:
            if not isinstance(leaf, mx.array | bool | int | float | str | None):
                raise InternalStateError(f"a step was called with {path} of type {type(leaf).__name__}")
            constants.append((path, _INPUT) if isinstance(leaf, mx.array) else (path, type(leaf), leaf))
        body = next((body for known, body in bodies if known == constants), None)
        if body is None:
            body = ops.Body(_over_inputs(step, len(arrays), kwargs), fold=False)
            bodies.append((constants, body))
        noise, *new_arrays = body(inputs)
        return noise, new_arrays

    return call


_INPUT = object()


def _over_inputs(step: Step, n_arrays: int, kwargs: dict[str, Any]) -> Callable[..., list[mx.array]]:
    """``step`` as a function of the arrays alone; keeps none of ``kwargs``."""
    form = tree_map(lambda leaf: _INPUT if isinstance(leaf, mx.array) else leaf, kwargs)

    def run(*inputs: mx.array) -> list[mx.array]:
        rest = iter(inputs[n_arrays:])
        kwargs = tree_map(lambda leaf: next(rest) if leaf is _INPUT else leaf, form)
        noise, arrays = step(list(inputs[:n_arrays]), kwargs)
        return [noise, *arrays]

    return run


@contextmanager
def replaced(transformer: Any, joint: list[Any], single: list[Any], **layers: Any) -> Iterator[None]:
    """Until the end of the block, these stand for the transformer's blocks, and for other layers by name."""
    before = transformer.transformer_blocks, transformer.single_transformer_blocks
    layers_before = {name: getattr(transformer, name) for name in layers}
    checkpointing = getattr(
        transformer, "gradient_checkpointing", False
    )  # of training; wants blocks that return arrays
    try:
        transformer.transformer_blocks, transformer.single_transformer_blocks = joint, single
        for name, layer in layers.items():
            setattr(transformer, name, layer)
        if checkpointing:
            transformer.gradient_checkpointing = False
        yield
    finally:
        transformer.transformer_blocks, transformer.single_transformer_blocks = before
        for name, layer in layers_before.items():
            setattr(transformer, name, layer)
        if checkpointing:
            transformer.gradient_checkpointing = checkpointing


class ImageTokens:
    """The image tokens, for mflux's ``tokens[:, n_text:, ...]``: text tokens would be joined on only to be cut off."""

    def __init__(self, tokens: mx.array, n_text: int) -> None:
        self._tokens = tokens
        self._slice = (slice(None), slice(n_text, None), ...)

    def __getitem__(self, index: Any) -> mx.array:
        self._check(index)
        return self._tokens

    def __setitem__(self, index: Any, tokens: mx.array) -> None:
        self._check(index)
        self._tokens = tokens

    def _check(self, index: Any) -> None:
        if index != self._slice:
            raise InternalStateError(f"mflux's forward takes {index} of the tokens; {self._slice} was expected")
