"""What is to be said of a family of pipelines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import InternalStateError
from ..step.captured import Arguments
from ..step.tap import Signal, Tap


def idle_joint(*, hidden_states: mx.array, encoder_hidden_states: mx.array, **_: Any) -> tuple[mx.array, mx.array]:
    """Of a block of image and text, as FLUX has them; see ``Tap.idle``."""
    return mx.array(encoder_hidden_states), mx.array(hidden_states)


def idle_single(*, hidden_states: mx.array, **_: Any) -> mx.array:
    """Of a block of image and text in one."""
    return mx.array(hidden_states)


def tokens_of_size(arguments: Arguments) -> int:
    """``Tap.n_tokens`` where a step is told the picture's size, of 16 pixels a token and side."""
    config = arguments["config"]
    return int((config.height // 16) * (config.width // 16))


def modulated(argument: int | str) -> Callable[..., Signal]:
    """``Tap.signal`` where block 0's attention is called with what the modulation made: its place or name there."""

    def signal(attention: Any, *args: Any, **kwargs: Any) -> Signal:
        given = dict(enumerate(args)) | kwargs
        if argument not in given:
            raise InternalStateError(
                f"the family's tap must take an argument that {type(attention).__name__} is called with (by place or "
                f"name: {', '.join(map(str, given)) or 'none'}), got {argument!r}"
            )
        return Signal(given[argument])

    return signal


@dataclass(frozen=True, kw_only=True)
class Command:
    """One of mflux's commands.

    Attributes:
        pipeline: The class that it makes.
        repeats: Whether its option --config-from-metadata makes a picture again.
        leaves_out_steps: Whether it leaves steps out in image-to-image.
        says_steps: Whether it runs as many as its option --steps says, but for those.
    """

    pipeline: type
    repeats: bool = False
    leaves_out_steps: bool = False
    says_steps: bool = True


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of a family.

    Attributes:
        variant: What it is gated as.
        fitted: Whether the variant's coefficients are published for it, in text-to-image.
        text_to_image: Whether the family's text-to-image pipeline runs it.
    """

    variant: str
    fitted: bool = True
    text_to_image: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Pipelines that have one kind of transformer and run it in one way.

    A step is what one of ``factories`` made, or one of ``methods``, or where there are neither the call of ``module``.

    Attributes:
        pipelines: Classes that can be gated; the first one is for text-to-image. Left out: those of the commands.
        commands: mflux's that make them, by name.
        models: By alias of mflux's model configuration, or by its model's name in lower case, which goes first. Empty:
            a pipeline is gated as what its class is called, and the gate wants coefficients.
        tap: Where the transformer is listened to.
        factories: The pipeline's methods that make the function of a step from a transformer and other things.
        methods: The pipeline's methods that are a step.
        module: The pipeline's attribute that is called for a step.
        transformer: The pipeline's attribute that the tap's paths begin at.
        is_several: Whether a step is several calls: one for each branch of the guidance.
        is_one_call: Whether it is one with guidance too, of a batch of both branches: they cannot be shared out.
        is_on_class: Whether ``generate_image`` looks its factories up on the class, by the class's name.
        positional: Names of the arguments that a factory's function is called with by place.
        changes: Names of the arguments of a step: with other ones what was computed before is of no use.
        sigmas: The schedule that runs, of the pipeline, mflux's Config and generate_image's arguments, where it is not
            that of the Config's scheduler.
        runs: The pipeline's method that makes a picture.
        schedule: Where that has a loop of its own, which tells none of mflux's callbacks: sigma of each step and after
            the last one, of the pipeline and the method's arguments by name.
        is_euler: Whether a step is linear in the noise, of generate_image's arguments; None: as the Config's scheduler
            has it.
    """

    pipelines: tuple[type, ...] = ()
    commands: dict[str, Command] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    tap: Tap
    factories: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    module: str = "transformer"
    transformer: str = "transformer"
    is_several: bool = False
    is_one_call: bool = False
    is_on_class: bool = False
    positional: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    sigmas: Callable[[Any, Any, dict[str, Any]], Sequence[float]] | None = None
    runs: str = "generate_image"
    schedule: Callable[[Any, dict[str, Any]], Sequence[float]] | None = None
    is_euler: Callable[[dict[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        if not self.pipelines:
            made = dict.fromkeys(command.pipeline for command in self.commands.values())
            object.__setattr__(self, "pipelines", tuple(made))
