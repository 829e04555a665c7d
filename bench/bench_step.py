"""What one denoising step costs: mflux's compiled step, ours, and mlx-teacache's, of several sizes.

Whole images through mflux's own generate_image, the kinds in turn and each time in another order, in several
processes. A step's time ends when its latents are evaluated. A ratio is that of two images of the same turn, each by
its fastest step, for all of an image's do the same and what disturbs them only adds; printed are the median over all
turns and the quartiles. The first steps, which trace and compile, are a row of their own: two of them, because ours
makes its graph in the second. bench_branch.py measures the conditional by itself.

The limit of a computed step is mflux's own; a gated one computes the prelude up to block 0 twice, for the gate reads
it. Ours at threshold 0 runs mflux's own and counts it. The limit of a skipped step that reuses a residual is mflux's
prelude and tail: embeddings, modulations, the last layers, the scheduler. That of one that gets a forecast of the
output is the prelude up to block 0: the image's embedding and block 0's modulation. One that a plan or a tolerance
skips, compared with that too, has nothing but the forecast; what a tolerance costs is the miss that it measures and
reads at a computed step. "On the host": the decision is read before the step instead of in its
graph.

An earlier version (--before) is measured in processes of its own, in turn with ours; both in parts of the limit in the
same turn.

    python bench/bench_step.py
    python bench/bench_step.py --device gpu --models demo wide --sizes 256 512 --dtype bfloat16 --guidance 4
    pip install --target before . && git switch main && python bench/bench_step.py --before before
"""

import argparse
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import mlx.core as mx
from mlx.utils import tree_flatten

DISTRIBUTIONS = ("mflux", "mlx-teacache")
KINDS = common.KINDS | {
    "host computed": "ours, computed, decided on the host",
    "host forecast": "ours, skipped, decided on the host",
    "planned": "ours, skipped by a plan",
    "watched": "ours, skipped by a tolerance",
    "no blocks": "mflux's prelude and tail",
    "prelude": "mflux's prelude up to block 0",
}
SKIPPED = ("skipped", "forecast", "host forecast", "planned", "watched", "peer skipped")
RIVALS = {"off": "peer off", "kept": "peer computed", "skipped": "peer skipped"}  # of ours
LIMITS = dict.fromkeys(KINDS, "mflux") | {"skipped": "no blocks", "peer skipped": "no blocks"}
LIMITS |= dict.fromkeys(("forecast", "host forecast", "planned", "watched"), "prelude")
FIRST = ("mflux", "off", "watched computed", "computed", "kept", "peer computed")  # of an image
COMPARED = ("off", "computed", "kept", "forecast", "skipped", "planned")  # with an earlier version

# Heads of 64 channels, joint and single blocks; random weights, but for the demo model's own.
MODELS = {"demo": None, "deep": (2, 5, 20), "wide": (8, 1, 1), "wider": (16, 1, 1)}


def pipeline(model: str, dtype: Any) -> Any:
    """The demo's pipeline with a transformer of this size."""
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer

    from mlx_teacache_fast import demo

    flux = demo.pipeline(dtype)
    if (shape := MODELS[model]) is not None:
        heads, joint, single = shape
        mx.random.seed(0)
        flux.transformer = Flux2Transformer(
            num_layers=joint,
            num_single_layers=single,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=128,
            axes_dims_rope=(16, 16, 16, 16),
        )
        flux.transformer.set_dtype(dtype)
        mx.eval(flux.transformer.parameters())
    return flux


@contextmanager
def replaced(flux: Any, parts: Callable[[Any], dict[str, Any]]) -> Iterator[None]:
    """With these parts of the transformer."""
    t = flux.transformer
    new = parts(t)
    own = {name: getattr(t, name) for name in new}
    try:
        for name, part in new.items():
            setattr(t, name, part)
        yield
    finally:
        for name, part in own.items():
            setattr(t, name, part)


def no_blocks(t: Any) -> dict[str, Any]:
    """In place of blocks: what needs what they need, and does nothing."""

    def joint(hidden_states: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        needed = [more["temb_mod_params_img"], more["temb_mod_params_txt"], more["image_rotary_emb"]]
        return mx.depends([encoder_hidden_states, hidden_states], [a for _, a in tree_flatten(needed)])

    def single(hidden_states: Any, temb_mod_params: Any, **_: Any) -> Any:
        return mx.depends(hidden_states, list(temb_mod_params))

    return {"transformer_blocks": [joint], "single_transformer_blocks": [single]}


def only_prelude(t: Any) -> dict[str, Any]:
    """The noise is a part of what enters block 0."""
    n_channels = t.proj_out.weight.shape[0]
    entered: list[mx.array] = []

    def joint(hidden_states: Any, encoder_hidden_states: Any, temb_mod_params_img: Any, **_: Any) -> Any:
        entered[:] = mx.depends([hidden_states], list(temb_mod_params_img[0]))
        return encoder_hidden_states, hidden_states

    def last(_: Any) -> Any:
        return entered[0][..., :n_channels]

    return {"transformer_blocks": [joint], "single_transformer_blocks": [], "proj_out": last}


@contextmanager
def on_the_host(gated: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
    from mlx_teacache_fast.step.engine import Engine

    Engine.in_graph = False
    try:
        with gated() as handle:
            yield handle
    finally:
        Engine.in_graph = True


PARTS = {
    "planned": "forecast, scheduler and mflux's loop: a step skipped by a plan",
    "modulation": "block 0's modulation, which the gate needs",
    "gate": "the gate",
    "read": "one evaluation, and a number read from it",
    "rest": "the rest: the image's embedding, a larger graph, Python",
}


def parts(flux: Any, size: int, dtype: Any) -> dict[str, Callable[[], object]]:
    """What a gated step does outside mflux's own, each by itself."""
    from mlx_teacache_fast import ops

    modulation = flux.transformer.double_stream_modulation_img
    tokens, channels = (size // 16) ** 2, flux.transformer.inner_dim
    time = mx.ones((1, channels), dtype)
    x, anchor = (mx.random.normal((1, tokens, channels)).astype(dtype) for _ in range(2))
    zero, force, number = mx.zeros((1, 1, channels), dtype), mx.array(0, mx.int32), mx.array(1.0)
    modulate, negate = mx.compile(modulation), mx.compile(mx.negative)
    mx.eval(x, anchor, zero)

    def gate() -> None:
        state, weights, rules = mx.zeros(8), mx.zeros((0, 0)), common.ALWAYS_SKIP
        given = {"residuals": [], "weights": weights, "state": state, "force": force}
        mx.eval(ops.gate(x, zero, zero, anchor, **given, coefficients=rules, threshold=1.0))

    return {"modulation": lambda: mx.eval(modulate(time)), "gate": gate, "read": lambda: negate(number).item()}


def median_seconds(run: Callable[[], object], times: int = 20) -> float:
    seconds = []
    for _ in range(times):
        mx.synchronize()
        start = perf_counter()
        run()
        mx.synchronize()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)


def measure(
    model: str, size: int, guidance: float, steps: int, turns: int, dtype: Any, process: int, is_before: bool
) -> list[dict[str, float]]:
    """Seconds of a step of each kind, of the first two, and of each part, for each turn in this process."""
    import mlx_teacache_fast as tc

    warnings.simplefilter("ignore")
    flux = pipeline(model, dtype)
    plan = "1" + "0" * (steps - 1)

    class Clock:
        def call_before_loop(self, **_: Any) -> None:
            self.marks = [perf_counter()]

        def call_in_loop(self, latents: mx.array, **_: Any) -> None:
            mx.eval(latents)
            mx.synchronize()
            self.marks.append(perf_counter())

        def seconds(self) -> list[float]:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    clock = Clock()
    flux.callbacks.register(clock)

    def image(context: AbstractContextManager[Any], steps: int) -> tuple[list[float], list[str]]:
        with context as handle:
            flux.generate_image(
                prompt="red apple", seed=1, num_inference_steps=steps, height=size, width=size, guidance=guidance
            )
        last = None if handle is None else handle.stats.last_generation
        if last is None:
            kinds = ["computed"] * steps
        else:
            kinds = [getattr(s, "kind", None) or s.decision for s in getattr(last, "steps", None) or last.decisions]
        return clock.seconds(), kinds

    contexts = common.contexts(flux) | {
        "no blocks": lambda: replaced(flux, no_blocks),
        "prelude": lambda: replaced(flux, only_prelude),
        "planned": lambda: tc.apply(flux, steps=plan),
    }
    if is_before:
        contexts = {kind: contexts[kind] for kind in dict.fromkeys((*COMPARED, *map(LIMITS.get, COMPARED)))}
    else:
        contexts["watched"] = lambda: tc.apply(flux, tolerance=1.0)
        contexts |= {
            f"host {kind}": functools.partial(on_the_host, contexts[kind]) for kind in ("computed", "forecast")
        }
    measured = []
    of_step = parts(flux, size, dtype)
    for turn in range(1 + turns):
        seconds = {}
        for kind in common.orders(list(contexts), turn + 2 * turns * process):  # a drift falls on each kind in turn
            n_steps = 2 * steps if kind == "watched" else steps  # which skips two in a row only then
            times, step_kinds = image(contexts[kind](), n_steps)
            skipped = kind in SKIPPED
            steps_of_kind = list(zip(times, step_kinds, strict=True))[1:]
            seconds[kind] = min(t for t, k in steps_of_kind if (k == "skipped") == skipped)
            seconds[f"first {kind}"] = sum(times[:2])
        seconds |= {f"part {name}": median_seconds(run) for name, run in of_step.items()}
        if turn > 0:  # the first turn fills MLX's kernel cache
            measured.append(seconds)
    return measured


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, quick="the demo model, 128 pixels, guidance 1")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: %(default)s")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=(128, 256, 512),
        help="image side in pixels, a multiple of 16; others than the first with the demo model (default: %(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=(1.0, 4.0),
        help="above 1: two branches; others than the first with the demo model and first size (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="default float32")
    parser.add_argument("--steps", type=int, default=6, help="of each image (default 6)")
    parser.add_argument("--repetitions", type=int, default=6, help="processes (default 6)")
    parser.add_argument("--turns", type=int, default=3, help="of all kinds in each process (default 3)")
    parser.add_argument(
        "--before", type=Path, metavar="FOLDER", help="an earlier version, installed there: measured too"
    )
    parser.add_argument("--is-before", action="store_true", help=argparse.SUPPRESS)  # of this process
    args = common.parse(parser, models=["demo"], sizes=(128,), guidance=(1.0,), steps=5, turns=2, repetitions=4)
    if args.steps < 5 or any(size < 16 or size % 16 for size in args.sizes) or min(args.repetitions, args.turns) < 1:
        parser.error("--steps must be at least 5, --sizes multiples of 16, --repetitions and --turns at least 1")
    if args.before is not None and not (args.before / "mlx_teacache_fast").is_dir():
        parser.error(f"{args.before} has no mlx_teacache_fast: make it with pip install --target")
    return args


def main() -> None:
    args = parse()
    size, guidance = args.sizes[0], args.guidance[0]
    cases = [(model, size, guidance) for model in args.models]
    if "demo" in args.models:
        cases += [("demo", other, guidance) for other in args.sizes[1:]]
        cases += [("demo", size, other) for other in args.guidance[1:]]
    dtype = common.DTYPES[args.dtype]
    if args.measure:
        how = args.steps, args.turns, dtype, args.process, args.is_before
        common.answer([measure(*case, *how) for case in cases])

    processes: list[list[list[dict[str, float]]]] = []
    before: list[list[list[dict[str, float]]]] = []
    for i in range(args.repetitions):
        processes += common.in_fresh_processes(1, first=i)
        if args.before is not None:
            before += common.in_fresh_processes(1, "--is-before", first=i, PYTHONPATH=str(args.before.resolve()))
    from mflux.utils.apple_silicon import AppleSiliconUtil

    results = []
    for i, (model, size, guidance) in enumerate(cases):
        transformer = pipeline(model, dtype).transformer
        blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        result = {"model": model, "guidance": guidance, "tokens": (size // 16) ** 2, "dtype": args.dtype}
        result |= {"channels": transformer.inner_dim, "joint_blocks": blocks[0], "single_blocks": blocks[1]}
        turns = [process[i] for process in processes]
        result["turns"] = len(turns[0])

        def ratio(kind: str, other: str, turns: Any = turns) -> dict[str, Any]:
            return common.summary([[turn[kind] / turn[other] for turn in p] for p in turns])

        result["kinds"] = {
            kind: {
                "ms": median_ms(turns, kind),
                "to_mflux": ratio(kind, "mflux") if kind != "mflux" else None,
                "to_limit": ratio(kind, LIMITS[kind]) if LIMITS[kind] != "mflux" else None,
                "to_rival": ratio(kind, RIVALS[kind]) if kind in RIVALS else None,
            }
            for kind in KINDS
        }
        result["planned_to_computed"] = ratio("planned", "computed")
        result["watched_to_planned"] = ratio("watched", "planned")
        result["first_two_ms"] = {kind: median_ms(turns, f"first {kind}") for kind in FIRST}
        result["first_two_to_mflux"] = {kind: ratio(f"first {kind}", "first mflux") for kind in FIRST}
        result["host_to_graph"] = {kind: ratio(f"host {kind}", kind) for kind in ("computed", "forecast")}
        result["to_before"] = {
            kind: common.summary(
                [
                    [a[kind] / a[limit] / (b[kind] / b[limit]) for a, b in zip(now, then[i], strict=True)]
                    for now, then in zip(turns, before, strict=True)
                ]
            )
            for kind, limit in ((kind, LIMITS[kind]) for kind in COMPARED)
            if before
        }
        parts_ms = {name: median_ms(turns, f"part {name}") for name in ("modulation", "gate", "read")}
        own = {name: max(0.0, ms - parts_ms["read"]) for name, ms in parts_ms.items()} | {"read": parts_ms["read"]}
        own = {"planned": median_ms(turns, "planned")} | own
        own["rest"] = median_ms(turns, "forecast") - sum(own.values())
        results.append(result | {"skipped_parts_ms": own})
    numbers = {"repetitions": args.repetitions, "compiled": not AppleSiliconUtil.is_m1_or_m2(), "results": results}
    common.finish(args, common.collect(args, numbers, *DISTRIBUTIONS), report)


def median_ms(processes: list[list[dict[str, float]]], name: str) -> float:
    return 1e3 * statistics.median(turn[name] for turns in processes for turn in turns)


def report(data: dict[str, Any]) -> None:
    common.print_header(data)
    if not data["compiled"]:
        print("note: mflux does not compile its step on this chip; what is called compiled below runs eagerly")
    claims = []
    for result in data["results"]:
        shape = f"S = {result['tokens']}, D = {result['channels']}, guidance {result['guidance']:g}"
        print(
            f"\n{result['model']}: {shape}, {result['joint_blocks']} + {result['single_blocks']} blocks, "
            f"{result['dtype']}; {data['repetitions']} processes with {result['turns']} turns each\n"
        )
        lines = [["step", "ms", "to mflux", "quartiles", "to its limit", "to mlx-teacache's"]]
        kinds = result["kinds"]
        for kind, numbers in kinds.items():
            to_mflux = numbers["to_mflux"]
            cells = [f"{to_mflux['low']:.3f} to {to_mflux['high']:.3f}"] if to_mflux else [""]
            cells = [common.ratio_cell(to_mflux, 3) if to_mflux else "", *cells]
            cells += [common.ratio_cell(r) if (r := numbers[name]) else "" for name in ("to_limit", "to_rival")]
            lines.append([KINDS[kind], f"{numbers['ms']:.2f}", *cells])
        common.print_table(lines, left=1)
        print("\nThe first two steps of an image, both computed:\n")
        lines = [["", *(KINDS[kind] for kind in FIRST)], ["ms", *(f"{result['first_two_ms'][k]:.1f}" for k in FIRST)]]
        lines.append(["to mflux", *(common.ratio_cell(result["first_two_to_mflux"][kind]) for kind in FIRST)])
        common.print_table([list(line) for line in zip(*lines, strict=True)], left=1)
        own = result["skipped_parts_ms"]
        print(
            f"\nWhere the {sum(own.values()):.2f} ms of a gated and skipped step go (each part is timed by itself):\n"
        )
        common.print_table([["part", "ms"], *([PARTS[n], f"{ms:.2f}"] for n, ms in own.items())], left=1)
        at = f"{result['model']}, {shape}"
        for kind in ("off", "watched computed", "computed", "kept"):
            claims.append(common.claim(f"{at}: {KINDS[kind]} / mflux", kinds[kind]["to_mflux"], at_most=1.02))
        claims.append(common.claim(f"{at}: skipped by a plan / computed", result["planned_to_computed"], at_most=0.1))
        text = f"{at}: skipped by a tolerance / by a plan"
        claims.append(common.claim(text, result["watched_to_planned"], at_most=1.1))
        for kind, r in result["host_to_graph"].items():
            claims.append(common.claim(f"{at}: {KINDS[kind]}, on the host / in the graph", r, at_least=1))
        for kind, r in result["to_before"].items():
            limit = 1.1 if kind in SKIPPED else 1.02
            claims.append(common.claim(f"{at}: {KINDS[kind]} / before", r, at_most=limit))
        for kind in ("skipped", "forecast"):
            text = f"{at}: {KINDS[kind]} / {KINDS[LIMITS[kind]]}"
            claims.append(common.claim(text, kinds[kind]["to_limit"], at_most=1.15))
        claims += [
            common.claim(f"{at}: {KINDS[kind]} / {KINDS[rival]}", kinds[kind]["to_rival"], at_most=1)
            for kind, rival in RIVALS.items()
        ]
    print(f"\n{common.NOISE_NOTE}")
    common.print_claims(claims)


if __name__ == "__main__":
    main()
