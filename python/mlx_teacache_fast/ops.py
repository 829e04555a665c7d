"""The array ops: ``gate`` decides whether a step may be skipped, ``branch`` skips it, also inside ``mx.compile``.

Both are lazy, need nothing but MLX, and have counterparts in plain MLX in ``reference`` that say what they compute.
"""

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx

from . import reference
from ._ext import CapturedGraph, counters, decide, gate, gpu_supported, reset_counters
from ._ext import branch as _branch

__all__ = ["Body", "branch", "counters", "decide", "gate", "gpu_supported", "reference", "reset_counters"]


class Body:
    """A function of arrays as one graph, which ``branch`` evaluates or leaves out; calling it evaluates it always.

    ``fn`` is called on placeholders, once in a thread for each combination of input shapes and dtypes, while the branch
    is built, and never during an evaluation. Arrays that it closes over (weights) are evaluated then and become
    constants, and so does everything else that does not depend on its inputs, random numbers included. An array of an
    enclosing ``mx.compile`` must be passed as an input instead. When it is gone, so are the arrays: MLX keeps some of
    those in functions that ``mx.compile`` made, in graphs with ``mx.split``, for ever.

    Args:
        fn (callable): Takes arrays, returns a list of one or more arrays.
        fold (bool): False: what does not depend on the inputs and is not evaluated yet is computed at each call, and
            rounded as in ``mx.compile``, which does so too.
    """

    def __init__(self, fn: Callable[..., Sequence[mx.array]], *, fold: bool = True) -> None:
        self._fn = fn
        self._fold = fold
        self._of_thread = threading.local()  # every thread has streams of its own, and takes its graphs with it

    def __call__(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        """What ``fn(*inputs)`` returns, computed by the traced graph. Lazy; errors are those of ``trace``."""
        return self.trace(inputs)(inputs)

    def trace(self, inputs: Sequence[mx.array]) -> CapturedGraph:
        """The traced graph for inputs of these shapes and dtypes; traces if there is none yet.

        Raises:
            ValueError: ``fn`` does not return a list of arrays, or reaches an array of an enclosing trace.
        """
        device = mx.default_device()
        specs = tuple((tuple(a.shape), a.dtype) for a in inputs)
        key = (specs, str(mx.default_stream(device)))  # the traced ops stay on the stream that was current
        graphs: dict[object, CapturedGraph] = vars(self._of_thread).setdefault("graphs", {})
        if key not in graphs:
            graphs[key] = CapturedGraph(self._fn, inputs, self._fold)
        return graphs[key]


def branch(skip: mx.array, on_skip: Sequence[mx.array], body: Body, inputs: Sequence[mx.array]) -> list[mx.array]:
    """``on_skip`` if ``skip``, else ``body(*inputs)``: a conditional that evaluates one side only.

    Lazy, in eager code and inside ``mx.compile``. An evaluation reads ``skip`` on the host once. All branches on the
    same ``skip`` share that read inside ``mx.compile``, and on what ``decide`` made of it everywhere. A body that is
    left out costs nothing, and what only it needs is still computed only if it is an input. While a body runs, nothing
    of ``on_skip`` is kept alive by the branch.

    Args:
        skip (array): Bool scalar, the state that ``gate`` returns (float32 ``(8,)``), or what ``decide`` made of them.
        on_skip (list of array): One for each output of the body, of the shape and dtype that the body returns.
        body (Body): What to evaluate otherwise.
        inputs (list of array): The body's arguments.

    Returns:
        list of array: As many as ``on_skip``.

    Raises:
        ValueError: ``skip`` or ``on_skip`` does not fit, or the body cannot be traced (see ``Body``).
        TypeError: An argument is of another type than those above.
        RuntimeError: An input or the body is on a GPU, and MLX has none here.
    """
    if not isinstance(skip, mx.array):
        raise TypeError(f"[branch] skip must be an array, got {type(skip).__name__}: mx.array(True), for example")
    if not isinstance(body, Body):
        raise TypeError(f"[branch] body must be an ops.Body, got {type(body).__name__}: wrap the function once")
    for name, arrays in (("on_skip", on_skip), ("inputs", inputs)):
        if not isinstance(arrays, list | tuple) or not all(isinstance(a, mx.array) for a in arrays):
            kind = type(arrays).__name__
            kind += f" of {sorted({type(a).__name__ for a in arrays})}" if isinstance(arrays, list | tuple) else ""
            raise TypeError(f"[branch] {name} must be a list of arrays, got {kind}")
    return _branch(skip, list(on_skip), body.trace(inputs), list(inputs))
