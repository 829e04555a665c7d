"""Types of the extension, as csrc/bindings.cpp gives them; its docstrings are in the extension."""

import collections.abc

import mlx.core

def gate(
    x: mlx.core.array,
    shift: mlx.core.array | None,
    scale: mlx.core.array | None,
    anchor: mlx.core.array,
    *,
    residuals: collections.abc.Sequence[collections.abc.Sequence[mlx.core.array]],
    weights: mlx.core.array,
    state: mlx.core.array,
    force: mlx.core.array,
    coefficients: collections.abc.Sequence[float],
    threshold: float,
    calibrated_range: tuple[float, float] | None = None,
    max_consecutive_skips: int = 8,
    eps: float = 1e-6,
    stream: mlx.core.Stream | mlx.core.Device | None = None,
) -> tuple[mlx.core.array, list[mlx.core.array], mlx.core.array]: ...

class CapturedGraph:
    def __init__(
        self,
        fn: collections.abc.Callable[..., collections.abc.Sequence[mlx.core.array]],
        inputs: collections.abc.Sequence[mlx.core.array],
        fold: bool = True,
    ) -> None: ...
    def __call__(self, inputs: collections.abc.Sequence[mlx.core.array]) -> list[mlx.core.array]: ...
    @property
    def output_shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def output_dtypes(self) -> list[mlx.core.Dtype]: ...

def branch(
    skip: mlx.core.array,
    on_skip: collections.abc.Sequence[mlx.core.array],
    body: CapturedGraph,
    inputs: collections.abc.Sequence[mlx.core.array],
) -> list[mlx.core.array]: ...
def decide(skip: mlx.core.array) -> mlx.core.array: ...
def gpu_supported() -> bool: ...
def counters() -> dict[str, int]: ...
def reset_counters() -> None: ...
