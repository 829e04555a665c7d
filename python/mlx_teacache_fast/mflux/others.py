"""mflux's other families: a row for each way in which a class runs its steps.

A class that the installed mflux does not have is left out.
"""

import importlib
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..step.tap import Signal, Tap, reached
from .family import Command, Family, Model, idle_joint, modulated, tokens_of_size


def mflux_class(path: str) -> Any:
    """Of ``module:name`` below mflux.models; None where this mflux has none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(f"mflux.models.{module}"), name, None)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("mflux"):  # something that mflux needs
            raise
        return None


def _row(
    path: str, models: str, commands: str = "", image_to_image: bool = False, says_steps: bool = True, **row: Any
) -> Family | None:
    """A family of one class.

    Args:
        path: Of the class, as ``mflux_class`` takes it.
        models: Aliases of mflux's model configurations; what each is gated as has the same name, but after a ``=``.
        commands: mflux's, without ``mflux-generate-``; with ``!`` behind one that makes no picture again.
        image_to_image: Whether they leave out steps there.
        says_steps: The commands', as ``Command`` has it.
        **row: The family's.
    """
    pipeline = mflux_class(path)
    if pipeline is None:
        return None
    pairs = [(alias, variant or alias) for alias, _, variant in (model.partition("=") for model in models.split())]
    made = {
        f"mflux-generate-{name.removesuffix('!')}": Command(
            pipeline=pipeline,
            repeats=not name.endswith("!"),
            leaves_out_steps=image_to_image,
            says_steps=says_steps,
        )
        for name in commands.split()
    }
    return Family(
        pipelines=(pipeline,),
        commands=made,
        models={alias: Model(variant=variant) for alias, variant in pairs},
        **row,
    )


def _qwen_signal(block: Any, **given: Any) -> Signal:
    """What block 0's attention is given, after the norm and the modulation."""
    x = reached(block, "attn", lambda b: b(**given), lambda _, **to_attn: to_attn["img_modulated"])
    return Signal(x, entered=given["hidden_states"])


def _added_by_block_0(block: Any, *, x: mx.array, **given: Any) -> Signal:
    return Signal(block(x=x, **given) - x, entered=x)


def _qwen21_signal(
    forward: Any, x: mx.array, modulation: Any, mask: Any, layout: Any, *others: Any, **more: Any
) -> Signal:
    """Of the target's tokens: in the first step those of the prompt and of reference images are before them."""
    x = reached(
        forward.__self__,
        "attn.forward_reference",
        lambda block: block.forward_reference(x, modulation, mask, layout, *others, **more),
        lambda _, to_attn, *__, **___: to_attn,
    )
    return Signal(x[:, -layout.target_tokens :])


def _idle_layer(*, x: mx.array, **_: Any) -> mx.array:
    return mx.array(x)


def _flux3_sigmas(_flux: Any, config: Any, _given: dict[str, Any]) -> Any:
    scheduler = mflux_class("flux3.model.flux3_scheduler.flux3_flow_map_scheduler:Flux3FlowMapScheduler")
    return scheduler(num_inference_steps=config.num_inference_steps).timesteps.tolist()


def _ideogram4_sigmas(_flux: Any, config: Any, given: dict[str, Any]) -> Any:
    scheduler = mflux_class("ideogram4.model.ideogram4_scheduler.scheduler:Ideogram4Scheduler")
    preset = scheduler.get_preset(given.get("preset"))
    size = {"height": config.height, "width": config.width}
    t, s = scheduler.make_timesteps(num_steps=config.num_inference_steps, mu=preset.mu, std=preset.std, **size)
    return [1 - float(time) for time in [*t[::-1], s[0]]]  # its time is 1 where there is no noise


def _iris_sigmas(flux: Any, config: Any, _given: dict[str, Any]) -> Any:
    if flux.is_turbo:
        scheduler = mflux_class("iris.model.iris_scheduler.iris_turbo_scheduler:IrisTurboScheduler")()
    else:
        solver = mflux_class("iris.model.iris_scheduler.iris_flow_dpm_solver:IrisFlowDPMSolver")
        scheduler = solver(config.num_inference_steps, type(flux).SHIFT)
    times = [scheduler.model_time(step).item() / 1000 for step in range(config.num_inference_steps)]
    return [*times, 0.0]


def _asks_for_euler(given: dict[str, Any]) -> bool:
    return given.get("scheduler") == "euler"


_FLUX3: dict[str, Any] = dict(
    models="flux3-image-klein-base flux3-image-klein",
    factories=("_predict",),
    tap=Tap(at="mode_blocks.image.0.attn", signal=modulated(0)),
    sigmas=_flux3_sigmas,
)
_FIBO = Tap(at="transformer_blocks.0.attn", signal=modulated("hidden_states"))
# Their sampler er_sde adds noise; to extrapolate the velocity is as good there as to extrapolate the clean picture.
_KREA2: dict[str, Any] = dict(
    factories=("_predict",), tap=Tap(at="blocks.0.attn", signal=modulated(0)), is_euler=_asks_for_euler
)

_ROWS = (
    _row(
        "qwen.variants.txt2img.qwen_image:QwenImage",
        # mflux's alias is of the later one, and the first one has its own name.
        "qwen-image=qwen-image-2512 qwen/qwen-image=qwen-image",
        "qwen",
        image_to_image=True,
        is_several=True,
        tap=Tap(signal=_qwen_signal, idle={"transformer_blocks": idle_joint}),
    ),
    _row(
        "qwen.variants.edit.qwen_image_edit:QwenImageEdit",
        "qwen-image-edit qwen-image-edit-2511=qwen-image-edit",
        "qwen-edit",
        is_several=True,
        tap=Tap(at="transformer_blocks.0.attn", signal=modulated("img_modulated"), n_tokens=tokens_of_size),
    ),
    _row(
        "z_image.variants.z_image:ZImage",
        "z-image=z-image-base z-image-turbo",
        "z-image z-image-turbo",
        image_to_image=True,
        factories=("_predict",),
        tap=Tap(at="layers.0", signal=_added_by_block_0, idle={"layers": _idle_layer}, tail="all_final_layer.2-1"),
    ),
    _row("flux3.variants.txt2img.flux3_klein:Flux3Klein", commands="flux3", **_FLUX3),
    _row("flux3.variants.edit.flux3_klein_edit:Flux3KleinEdit", commands="flux3-edit", **_FLUX3),
    _row("fibo.variants.txt2img.fibo:FIBO", "fibo fibo-lite", "fibo", image_to_image=True, is_one_call=True, tap=_FIBO),
    _row(
        "fibo.variants.edit.fibo_edit:FIBOEdit",
        "fibo-edit fibo-edit-rmbg",
        "fibo-edit",
        is_one_call=True,
        tap=replace(_FIBO, n_tokens=tokens_of_size),
    ),
    _row(
        "fibo2.variants.txt2img.fibo2:Fibo2",
        "fibo2",
        "fibo2",
        methods=("_predict",),
        tap=Tap(at="noise_refiner.0.attention", signal=modulated(0)),
        changes=("prompt_embeds", "negative_embeds"),  # below a level of noise, and at cfg_end
    ),
    _row(
        "ernie_image.variants.txt2img.ernie_image:ErnieImage",
        "ernie-image ernie-image-turbo",
        "ernie-image ernie-image-turbo",
        image_to_image=True,
        factories=("_predict",),
        is_one_call=True,
        tap=Tap(at="layers.0.self_attention", signal=modulated(0)),
    ),
    _row("krea2.variants.txt2img.krea2:Krea2", "krea-2-raw krea-2", "krea2", image_to_image=True, **_KREA2),
    _row(
        "krea2.variants.controlnet.krea2_controlnet:Krea2Controlnet",
        "krea-2-controlnet-depth",
        "krea2-controlnet!",
        is_on_class=True,
        **_KREA2,
    ),
    _row(
        "anima.variants.txt2img.anima:Anima",
        "anima-base anima-aesthetic anima-turbo",
        "anima",
        factories=("_predict",),
        is_on_class=True,
        positional=("latents", "sigma"),
        tap=Tap(at="blocks.0.self_attn", signal=modulated(0)),
        is_euler=_asks_for_euler,
    ),
    _row(
        "ideogram4.variants.txt2img.ideogram4:Ideogram4",
        "ideogram-4-fp8",
        "ideogram4",
        says_steps=False,  # --preset does
        factories=("_predict_conditional", "_predict_unconditional"),
        transformer="conditional_transformer",
        is_several=True,
        tap=Tap(at="layers.0.attention", signal=modulated(0)),
        sigmas=_ideogram4_sigmas,
    ),
    _row(
        "iris.variants.txt2img.iris:Iris",
        "iris-3b-base iris-3b",
        "iris",
        methods=("_predict", "_predict_cfg"),
        is_one_call=True,
        tap=Tap(at="blocks.0.attn", signal=modulated(0)),
        sigmas=_iris_sigmas,
        is_euler=lambda given: False,
    ),
    _row(
        "moss_image.variants.txt2img.moss_image:MOSSImage",
        "moss-image-sft moss-image-base",
        "moss-image",
        methods=("_predict",),
        tap=Tap(at="layers.0.proj.q", signal=modulated(0)),
        is_euler=lambda given: True,
    ),
    _row(
        "qwen21.variants.txt2img.qwen_image_21:QwenImage21",
        "qwen-image-2.1 qwen-image-2.1-turbo",
        "qwen-2.1",
        image_to_image=True,
        is_several=True,
        tap=Tap(
            at="transformer_blocks.0.attn",
            methods=("image_attention",),  # its call: with padded prompts, or without a cache of the text
            signal=modulated(0),
            n_tokens=lambda arguments: -int(arguments["hidden_states"].shape[1]),
            traced={"_image_step_fn": "_image_forward", "_step_fn": "_forward"},
        ),
    ),
    _row(
        "qwen21.variants.edit.qwen_image_21_edit:QwenImage21Edit",
        "qwen-image-2.1 qwen-image-2.1-turbo",
        "qwen-2.1-edit",
        says_steps=False,  # --strength leaves some out
        is_several=True,
        tap=Tap(at="transformer_blocks.0.forward_reference", signal=_qwen21_signal),
    ),
    _row(
        "qwen21.variants.controlnet.qwen_image_21_controlnet:QwenImage21Controlnet",
        "qwen-image-2.1-controlnet-union qwen-image-2.1-turbo-controlnet-union",
        "qwen-2.1-controlnet!",
        module="controlnet",
        transformer="controlnet",
        is_several=True,
        tap=Tap(at="control_blocks.0.forward_reference", signal=_qwen21_signal),
    ),
)

_DISTILLED = "its model is distilled to a few steps, of which none can be skipped"
_REFUSED = {
    "fibo2.variants.edit.fibo2_edit:Fibo2Edit": _DISTILLED,
    "z_image.variants.controlnet.z_image_turbo_controlnet:ZImageTurboControlnet": _DISTILLED,
    "boogu.variants.txt2img.boogu_image:BooguImage": _DISTILLED,
    "lens.variants.txt2img.lens_image:LensImage": _DISTILLED,
    "ming_image.variants.ming_image:MingImage": "its 12 steps differ too much for any to be skipped",
}

OTHERS: tuple[Family, ...] = tuple(row for row in _ROWS if row is not None)
REFUSED: dict[type, str] = {kind: why for path, why in _REFUSED.items() if (kind := mflux_class(path)) is not None}
