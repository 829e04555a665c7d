"""Where a transformer is listened to. Copies of it do that, which share its layers: itself it is never changed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import InternalStateError
from .captured import Arguments

Step = Callable[..., mx.array]  # called with them by name
Make = Callable[[Any], Step]  # what runs mflux's step with a transformer


class Signal(NamedTuple):
    """What the gate measures, lazy: the image tokens that enter block 0, and its modulation of them."""

    x: mx.array
    shift: mx.array
    scale: mx.array
    eps: float  # of the layer norm


class _Reached(BaseException):  # nobody's `except Exception` is meant
    def __init__(self, signal: Signal) -> None:
        self.signal = signal


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What a step must know of a transformer.

    Attributes:
        signal: From block 0, and what it is called with.
        n_tokens: Of the latents, from the step's arguments. Tokens of reference images are behind them.
        blocks: The list whose first block tells.
        idle: For each list of blocks what stands for one of them in a step that leaves the blocks out: called as they
            are, it returns what they return, unchanged and in arrays of its own.
        tail: The layer after all blocks, called with the image tokens.
        makes_cache: Whether a step with these arguments makes what later ones need, so that it computes in any case.
    """

    signal: Callable[..., Signal]
    n_tokens: Callable[[Arguments], int]
    idle: dict[str, Callable[..., Any]]
    blocks: str = "transformer_blocks"
    tail: str = "norm_out"
    makes_cache: Callable[[Arguments], bool] = lambda arguments: False

    def measured(self, make: Make, transformer: Any, arguments: Arguments) -> Signal:
        """mflux's own prelude, up to block 0: the signal of the latents' tokens."""
        first = getattr(transformer, self.blocks)[0]

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Reached(self.signal(first, *args, **kwargs))

        try:
            make(_copy(transformer, **{self.blocks: [stop]}))(**arguments)
        except _Reached as reached:
            return self.of_latents(reached.signal, arguments)
        raise InternalStateError(_NOT_REACHED)

    def of_latents(self, signal: Signal, arguments: Arguments) -> Signal:
        """Of their tokens alone."""
        n, x = self.n_tokens(arguments), signal.x
        return signal if x.shape[1] == n else signal._replace(x=x[:, :n])

    def through(
        self, make: Make, transformer: Any, tokens: Callable[[int, Signal, mx.array], mx.array], *, is_idle: bool
    ) -> Step:
        """mflux's step, in which ``tokens(call, entered, left)`` is taken for what leaves the blocks.

        ``call`` counts the transformer's calls within the step, which are branches of the guidance. With ``is_idle``
        no block is called.
        """

        def step(**arguments: Any) -> mx.array:
            entered: list[Signal] = []
            first, *others = getattr(transformer, self.blocks)
            tail = getattr(transformer, self.tail)

            def block_0(*args: Any, **kwargs: Any) -> Any:
                entered.append(self.signal(first, *args, **kwargs))
                return (self.idle[self.blocks] if is_idle else first)(*args, **kwargs)

            def after(left: mx.array, *args: Any, **kwargs: Any) -> Any:
                return tail(tokens(len(entered) - 1, entered[-1], left), *args, **kwargs)

            parts: dict[str, Any] = {self.blocks: [block_0, *others], self.tail: after}
            if is_idle:
                parts |= {name: [block_0 if name == self.blocks else idle] for name, idle in self.idle.items()}
            noise = make(_copy(transformer, **parts))(**arguments)
            if not entered:
                raise InternalStateError(_NOT_REACHED)
            return noise

        return step


_NOT_REACHED = (
    "a step did not call block 0 of the transformer that it was given: something between generate_image and the "
    "transformer (a wrapped _predict, another patch) keeps a transformer or a trace of its own"
)


def _copy(transformer: Any, **parts: Any) -> Any:
    copied = copy.copy(transformer)
    if getattr(copied, "gradient_checkpointing", False):  # of training; wants blocks that take and return arrays
        copied.gradient_checkpointing = False
    for name, part in parts.items():
        setattr(copied, name, part)
    return copied
