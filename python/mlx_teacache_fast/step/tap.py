"""Where a transformer is listened to. Copies of it do that, which share its layers: itself it is never changed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import InternalStateError, TeaCacheValueError
from .captured import Arguments, Arrays

Step = Callable[..., mx.array]  # called with them by name
Make = Callable[[Any], Step]  # what runs mflux's step with a transformer


class Signal(NamedTuple):
    """What the gate measures, lazy: the tokens that enter block 0 and its modulation of them, or what that makes."""

    x: mx.array
    shift: mx.array | None = None  # None: x is what is measured
    scale: mx.array | None = None
    eps: float = 0.0  # of the layer norm
    entered: mx.array | None = None  # block 0, where that is not x

    @property
    def tokens(self) -> mx.array:
        """What entered block 0."""
        return self.x if self.entered is None else self.entered

    def of(self, n: int | None) -> "Signal":
        """Of so many tokens, as ``Tap.n_tokens`` has it."""
        if n is None or self.x.shape[1] == abs(n):
            return self
        entered = None if self.entered is None else self.entered[:, _tokens(n)]
        return self._replace(x=self.x[:, _tokens(n)], entered=entered)


def _tokens(n: int) -> slice:
    return slice(n) if n > 0 else slice(n, None)


class _Reached(BaseException):  # nobody's `except Exception` is meant
    def __init__(self, found: Any) -> None:
        self.found = found


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What a step must know of a transformer. Paths are attributes, keys and indices, with dots in between.

    Attributes:
        at: Path of what ends the prelude: block 0, or its attention.
        methods: Of that, which end it as its call does.
        signal: Of that, and of what it is called with.
        n_tokens: Of the latents, from the step's arguments; tokens of reference images are behind them. Negative:
            others are before them, and the blocks cannot be left out. None: of all tokens.
        idle: For each list of blocks what stands for one of them in a step that leaves the blocks out: called as they
            are, it returns what they return, unchanged and in arrays of its own. Empty where that cannot be.
        tail: Path of the layer after all blocks, called with the tokens.
        makes_cache: Whether a step with these arguments makes what later ones need, so that it computes in any case.
        traced: Attributes in which the transformer keeps its own compiled functions, and the methods that they are of.
    """

    at: str = "transformer_blocks.0"
    methods: tuple[str, ...] = ()
    signal: Callable[..., Signal]
    n_tokens: Callable[[Arguments], int | None] = lambda arguments: None
    idle: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tail: str = "norm_out"
    makes_cache: Callable[[Arguments], bool] = lambda arguments: False
    traced: dict[str, str] = field(default_factory=dict)

    def n_first(self, arguments: Arguments) -> int | None:
        """``n_tokens``, where a residual of that many first tokens is kept."""
        n = self.n_tokens(arguments)
        if n is not None and n <= 0:
            raise TeaCacheValueError(f"n_tokens must be above 0 for a tap with idle blocks, got {n}")
        return n

    def of_latents(self, arrays: Arrays, arguments: Arguments) -> Arrays:
        """Predictions or residuals without the tokens of reference images, where mflux uses no prediction."""
        n = self.n_tokens(arguments)
        return arrays if n is None or arrays[0].shape[1] <= abs(n) else [a[:, _tokens(n)] for a in arrays]

    def measured(self, make: Make, transformer: Any, arguments: Arguments) -> Signal:
        """mflux's own prelude, up to block 0: the signal of the latents' tokens."""
        signal: Signal = reached(
            transformer, self.at, lambda t: make(self._untraced(t))(**arguments), self.signal, self.methods
        )
        return signal.of(self.n_tokens(arguments))

    def through(
        self, make: Make, transformer: Any, tokens: Callable[[int, Signal, mx.array], mx.array], *, is_idle: bool
    ) -> Step:
        """mflux's step, in which ``tokens(call, entered, left)`` is taken for what leaves the blocks.

        ``call`` counts the transformer's calls within the step, which are branches of the guidance. With ``is_idle``
        no block is called.
        """

        def step(**arguments: Any) -> mx.array:
            entered: list[Signal] = []
            blocks = self.at.partition(".")[0]
            first, *others = getattr(transformer, blocks)
            tail = at(transformer, self.tail)

            def block_0(*args: Any, **kwargs: Any) -> Any:
                entered.append(self.signal(first, *args, **kwargs))
                return (self.idle[blocks] if is_idle else first)(*args, **kwargs)

            def after(left: mx.array, *args: Any, **kwargs: Any) -> Any:
                return tail(tokens(len(entered) - 1, entered[-1], left), *args, **kwargs)

            parts: dict[str, Any] = {blocks: [block_0, *others], self.tail: after}
            if is_idle:
                parts |= {name: [block_0 if name == blocks else idle] for name, idle in self.idle.items()}
            changed = transformer
            for path, part in parts.items():
                changed = _with(changed, path, part)
            noise = make(changed)(**arguments)
            if not entered:
                raise InternalStateError(_NOT_REACHED)
            return noise

        return step

    def _untraced(self, transformer: Any) -> Any:
        for name, method in self.traced.items():
            if hasattr(transformer, method):  # as this mflux has it
                setattr(transformer, name, getattr(transformer, method))
        return transformer


class _Stop:
    """Stands for a part of a module and some of its methods: a call of them ends what runs."""

    def __init__(self, part: Any, methods: Sequence[str], found: Callable[..., Any]) -> None:
        self._part, self._methods, self._found = part, methods, found

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise _Reached(self._found(self._part, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return self if name in self._methods else getattr(self._part, name)


def reached(
    root: Any, path: str, run: Callable[[Any], Any], found: Callable[..., Any], methods: Sequence[str] = ()
) -> Any:
    """``found(part, *args, **kwargs)`` of the part at ``path`` and its arguments when ``run`` has such a ``root``.

    ``methods`` are those of the part that count as its call.
    """
    try:
        run(_with(root, path, _Stop(at(root, path), methods, found)))
    except _Reached as reached:
        return reached.found
    raise InternalStateError(_NOT_REACHED)


_NOT_REACHED = (
    "a step did not call block 0 of the transformer that it was given: something between generate_image and the "
    "transformer (a wrapped _predict, another patch) keeps a transformer or a trace of its own"
)


def at(root: Any, path: str) -> Any:
    """The part of a module at a path; InternalStateError if there is none."""
    part = root
    for name in path.split("."):
        try:
            part = (
                part[int(name)] if isinstance(part, list) else part[name] if type(part) is dict else getattr(part, name)
            )
        except (AttributeError, IndexError, KeyError, ValueError):
            raise InternalStateError(f"{type(root).__name__} has no {path}, where its family's tap is") from None
    return part


def _with(root: Any, path: str, part: Any) -> Any:
    """A copy of a module in which ``part`` stands at a path; all other parts are the module's own."""
    name, _, rest = path.partition(".")
    part = _with(at(root, name), rest, part) if rest else part
    copied = copy.copy(root)
    if isinstance(root, list):
        copied[int(name)] = part
    elif type(root) is dict:
        copied[name] = part
    else:
        if getattr(copied, "gradient_checkpointing", False):  # of training; wants blocks that take and return arrays
            copied.gradient_checkpointing = False
        setattr(copied, name, part)
    return copied
