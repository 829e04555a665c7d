"""What is to be said of a family of mflux's pipelines. Each is one value in a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..step.tap import Tap


def idle_joint(*, hidden_states: mx.array, encoder_hidden_states: mx.array, **_: Any) -> tuple[mx.array, mx.array]:
    """Of a block of image and text, as FLUX has them; see ``Tap.idle``."""
    return mx.array(encoder_hidden_states), mx.array(hidden_states)


def idle_single(*, hidden_states: mx.array, **_: Any) -> mx.array:
    """Of a block of image and text in one."""
    return mx.array(hidden_states)


IDLE: dict[str, Callable[..., Any]] = {"transformer_blocks": idle_joint, "single_transformer_blocks": idle_single}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One of mflux's commands.

    Attributes:
        pipeline: The class that it makes.
        repeats: Whether its option --config-from-metadata makes a picture again.
        leaves_out_steps: Whether it leaves steps out in image-to-image.
    """

    pipeline: type
    repeats: bool = False
    leaves_out_steps: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of a family.

    Attributes:
        variant: Whose coefficients it is gated with.
        fitted: Whether these were fitted on it, in text-to-image.
        text_to_image: Whether the family's text-to-image pipeline runs it.
    """

    variant: str
    fitted: bool = True
    text_to_image: bool = True


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipelines that have one kind of transformer.

    Attributes:
        commands: mflux's, by name. Their pipelines can be gated; the first one is for text-to-image.
        refused: Pipelines that cannot be gated, and why.
        models: By alias of mflux's model configuration.
        tap: Where the transformer is listened to.
        factories: The pipeline's methods that make the function of a step from a transformer. Where there are none, the
            pipeline calls its transformer, once a step.
    """

    commands: dict[str, Command]
    refused: dict[type, str] = field(default_factory=dict)
    models: dict[str, Model]
    tap: Tap
    factories: tuple[str, ...] = ()

    @property
    def pipelines(self) -> tuple[type, ...]:
        return tuple(dict.fromkeys(command.pipeline for command in self.commands.values()))
