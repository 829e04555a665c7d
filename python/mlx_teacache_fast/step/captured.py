"""A function of arrays, and of the arguments that mflux gives a step, as one graph."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .. import ops

Arrays = list[mx.array]
Arguments = dict[str, Any]  # of one step, by name
Function = Callable[[Arrays, Arguments], Arrays]


class Captured:
    """As ``mx.compile`` makes it; but its weights are freed with it (see ``ops.Body``).

    Arguments that are no arrays are constants of the graph; with other ones there is another graph.

    Attributes:
        is_eager: Whether it is called as it is: also from where it turns out to evaluate what it makes.
    """

    def __init__(self, function: Function, *, is_eager: bool = False) -> None:
        self.is_eager = is_eager
        self._function = function
        self._bodies: list[tuple[list[Any], ops.Body]] = []

    def __call__(self, arrays: Arrays, arguments: Arguments) -> Arrays:
        if not self.is_eager:
            body, inputs = self.body(arrays, arguments)
            try:
                return body(inputs)
            except ValueError as error:
                if _EVALUATES not in str(error):
                    raise
            self.is_eager = True  # mflux, where it compiles, ends in that error itself
        return self._function(arrays, arguments)

    def body(self, arrays: Arrays, arguments: Arguments) -> tuple[ops.Body, Arrays]:
        """The body for such arguments, and its inputs."""
        arguments = dict(sorted(arguments.items()))
        leaves = cast(list[tuple[str, Any]], tree_flatten(arguments))
        inputs = [*arrays, *(leaf for _, leaf in leaves if isinstance(leaf, mx.array))]
        constants: list[Any] = [len(arrays)]
        for path, leaf in leaves:
            is_value = isinstance(leaf, bool | int | float | str | None)
            value = _INPUT if isinstance(leaf, mx.array) else leaf if is_value else id(leaf)
            constants.append((path, type(leaf), value))  # 1 == 1.0 == True
        body = next((body for known, body in self._bodies if known == constants), None)
        if body is None:
            body = ops.Body(_over_inputs(self._function, len(arrays), arguments), fold=False)
            self._bodies.append((constants, body))
        return body, inputs


_INPUT = object()
_EVALUATES = "eval an array during function transformations"  # MLX's words


def _over_inputs(function: Function, n_arrays: int, arguments: Arguments) -> Callable[..., Arrays]:
    """``function`` of the arrays alone; keeps none of those in ``arguments``."""
    form = tree_map(lambda leaf: _INPUT if isinstance(leaf, mx.array) else leaf, arguments)

    def run(*inputs: mx.array) -> Arrays:
        rest = iter(inputs[n_arrays:])
        filled = tree_map(lambda leaf: next(rest) if leaf is _INPUT else leaf, form)
        return function(list(inputs[:n_arrays]), filled)

    return run
