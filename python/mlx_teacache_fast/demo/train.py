#!/usr/bin/env python3
"""Train a tiny FLUX.2-Klein-shaped text-to-image model on Noto emoji, on a CPU, with MLX and mflux.

The network is mflux's own `Flux2Transformer`, only smaller. Everything the sampler needs (transformer, word
embedding table, linear image codec, vocabulary) ends up in one safetensors file that `tiny_klein.py` loads.

Data: `npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz` gives `package/` (--data).
The pictures are Noto emoji, Apache-2.0; emoji.json is MIT (iamcal/emoji-data).

    python train.py --data package --work run --minutes 60 --processes 2
    python train.py --data package --work run --export tiny_klein.safetensors

MLX runs its CPU element-wise kernels on one thread, so --processes N (data parallel over MLX's ring backend, on one
machine) with OPENBLAS_NUM_THREADS=1 uses N cores better than one process with N BLAS threads. On Linux, where MLX's
CPU matrix product is slow, preloading OpenBLAS is about ten times faster. Training resumes from
WORK/last.safetensors when that file exists.

Flow matching, with mflux's conventions: x_t = (1 - sigma) x0 + sigma eps, target v = eps - x0, timestep
1000 sigma, and the scheduler steps x <- x + (sigma_next - sigma) v.
"""

import argparse
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from PIL import Image

SIZE, PATCH, CHANNELS = 128, 16, 128
GRID = SIZE // PATCH
TOKENS = GRID * GRID
CONTEXT = 8
STOP_WORDS = ("a", "an", "the", "of", "with", "and", "on", "in")
TRANSFORMER = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "mlp_ratio": 1.5,
    "axes_dims_rope": [16, 16, 16, 16],
}

# group word -> emoji short names; "short_name=caption" where the short name is not a good caption
PICTURES = {
    "fruit": """tomato grapes watermelon tangerine=orange lemon banana pineapple apple=red_apple green_apple pear
        peach cherries strawberry kiwifruit=kiwi coconut mango blueberries""",
    "vegetable": """hot_pepper=red_pepper corn eggplant avocado carrot broccoli onion mushroom""",
    "food": """hotdog=hot_dog taco hamburger pizza poultry_leg=chicken_leg bread fries=french_fries fried_egg popcorn
        croissant egg pancakes sandwich bagel cheese_wedge=cheese rice_ball ramen=noodle_soup sushi""",
    "dessert": """icecream=soft_ice_cream doughnut cookie chocolate_bar candy lollipop cake=shortcake
        birthday=birthday_cake pie cupcake""",
    "drink": """tea wine_glass cocktail beer glass_of_milk bubble_tea teapot coffee""",
    "plant": """seedling evergreen_tree deciduous_tree=green_tree palm_tree cactus four_leaf_clover maple_leaf
        tulip cherry_blossom=pink_flower rose sunflower blossom=yellow_flower christmas_tree""",
    "animal": """mouse=mouse_face cow=cow_face tiger=tiger_face rabbit=rabbit_face cat=cat_face monkey_face dog=dog_face
        pig=pig_face hamster=hamster_face wolf=wolf_face bear=bear_face panda_face lion_face unicorn_face fox_face
        frog=frog_face koala=koala_face elephant giraffe_face=giraffe hedgehog snake turtle sauropod=dinosaur
        whale octopus fish=blue_fish tropical_fish=yellow_fish blowfish dolphin crab shark snail bug=caterpillar bee
        ladybug butterfly bird=blue_bird hatched_chick=chick duck owl parrot swan flamingo penguin""",
    "face": """grinning=grinning_face smile=smiling_face joy=laughing_crying_face innocent=angel_face wink=winking_face
        stuck_out_tongue=tongue_face heart_eyes=heart_eyes_face sunglasses=sunglasses_face nerd_face neutral_face
        sleeping=sleeping_face sob=loudly_crying_face scream=screaming_face rage=red_angry_face mask=mask_face
        clown_face ghost alien skull smiling_imp=purple_devil_face face_with_cowboy_hat=cowboy_face robot_face""",
    "weather": """rainbow full_moon crescent_moon sun_with_face star2=glowing_star cloud rain_cloud
        lightning=lightning_cloud fire sunny=sun snowman_without_snow=snowman snowflake star zap=lightning_bolt
        droplet=water_drop umbrella=purple_umbrella""",
    "place": """earth_africa=earth ringed_planet=planet volcano mount_fuji=mountain house tent""",
    "heart": """heart=red_heart orange_heart yellow_heart green_heart blue_heart purple_heart""",
    "circle": """red_circle large_orange_circle=orange_circle large_yellow_circle=yellow_circle
        large_green_circle=green_circle large_blue_circle=blue_circle large_purple_circle=purple_circle""",
    "square": """large_red_square=red_square large_orange_square=orange_square large_yellow_square=yellow_square
        large_green_square=green_square large_blue_square=blue_square large_purple_square=purple_square""",
    "ball": """soccer=soccer_ball basketball baseball tennis=tennis_ball 8ball=black_eight_ball""",
    "object": """dart=target balloon=red_balloon gift crown tophat=top_hat shirt=blue_shirt athletic_shoe=sneaker
        gem=diamond bell key lock bulb=light_bulb candle camera tv=television telephone=red_telephone
        green_book blue_book orange_book closed_book=red_book envelope pencil2=pencil guitar trumpet
        drum_with_drumsticks=drum bomb trophy jack_o_lantern=pumpkin teddy_bear""",
    "vehicle": """car=red_car taxi=yellow_taxi bus fire_engine=fire_truck police_car tractor boat=sailboat ship rocket
        helicopter airplane flying_saucer""",
}


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


# ---------------------------------------------------------------------------------------------- data


def words_of(text):
    """The tokenizer: lower-case whitespace words without punctuation and stop words."""
    cleaned = "".join(c if c.isalnum() else " " for c in text.lower())
    return [w for w in cleaned.split() if w not in STOP_WORDS]


def token_ids(text, vocab):
    """CONTEXT word ids; 0 is the null token, which also stands for padding and unknown words."""
    ids = [vocab.get(w, 0) for w in words_of(text)][:CONTEXT]
    return ids + [0] * (CONTEXT - len(ids))


def list_pictures(data):
    """[(png path, caption, group word)]"""
    table = {}
    for entry in json.loads((data / "emoji.json").read_text()):
        if entry["has_img_google"]:
            for name in entry["short_names"]:
                table[name] = entry["image"]
    found = []
    for group, names in PICTURES.items():
        for name in names.split():
            name, _, caption = name.partition("=")
            image = table.get(name)
            if image is None:
                say(f"warning: no picture named {name!r}")
                continue
            found.append((data / "img/google/64" / image, (caption or name).replace("_", " "), group))
    return found


def render(path, rng, augment):
    """One 128x128 RGB picture in [-1, 1] on white, slightly moved and perhaps mirrored."""
    source = Image.open(path).convert("RGBA")
    side = 118
    dx, dy = (int(v) for v in rng.integers(-2, 3, size=2)) if augment else (0, 0)
    if augment and rng.random() < 0.5:
        source = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    source = source.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    corner = ((SIZE - side) // 2 + dx, (SIZE - side) // 2 + dy)
    canvas.alpha_composite(source, corner)
    return np.asarray(canvas.convert("RGB"), np.float32) / 127.5 - 1.0


def to_patches(images):
    """[N, 128, 128, 3] -> [N, 64, 768], patch pixels in (row, column, colour) order."""
    n = images.shape[0]
    x = images.reshape(n, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, TOKENS, PATCH * PATCH * 3)


def from_patches(patches):
    n = patches.shape[0]
    x = patches.reshape(n, GRID, GRID, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, SIZE, SIZE, 3)


def fit_codec(patches, whiten):
    """PCA 768 -> 128. Channel i gets standard deviation std_i^(1 - whiten), scaled to mean variance 1.

    whiten = 1 would make every channel unit variance, so that the loss cares as much for invisible detail as for
    shapes and colours; whiten = 0 is plain PCA, where detail drowns in the noise until the very last steps.
    Returns (mean [768], basis [128, 768] orthonormal rows, scale [128]); latent = basis (x - mean) / scale."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    cov = (flat - mean).T @ (flat - mean) / len(flat)
    values, vectors = np.linalg.eigh(cov)
    basis = vectors[:, ::-1][:, :CHANNELS].T
    std = np.sqrt(values[::-1][:CHANNELS])
    target = std ** (1 - whiten)
    target /= np.sqrt(np.mean(target**2))
    scale = std / target
    return mean.astype(np.float32), np.ascontiguousarray(basis, np.float32), scale.astype(np.float32)


def prepare(args):
    """Render the pictures once, fit the codec, cache everything in WORK/data.npz."""
    cache = args.work / "data.npz"
    if cache.exists():
        with np.load(cache, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    pictures = list_pictures(args.data)
    captions = [caption for _, caption, _ in pictures]
    groups = [group for _, _, group in pictures]
    if len(set(captions)) != len(captions):
        raise SystemExit(f"captions are not unique: {sorted(c for c in captions if captions.count(c) > 1)}")
    vocab = ["<null>", *sorted({w for text in captions + groups for w in words_of(text)})]
    rng = np.random.default_rng(1)
    patches = np.empty((len(pictures), args.variants, TOKENS, PATCH * PATCH * 3), np.float16)
    for i, (path, _, _) in enumerate(pictures):
        images = np.stack([render(path, rng, augment=True) for _ in range(args.variants)])
        patches[i] = to_patches(images)
    mean, basis, scale = fit_codec(patches, args.whiten)
    latents = np.empty((len(pictures), args.variants, TOKENS, CHANNELS), np.float16)
    error = 0.0
    for i in range(len(pictures)):
        x = patches[i].astype(np.float32)
        z = (x - mean) @ basis.T / scale
        latents[i] = z
        error += float(np.mean((np.clip(z * scale @ basis + mean, -1, 1) - x) ** 2)) / len(pictures)
    say(
        f"{len(pictures)} pictures, {len(vocab)} words, codec PSNR {10 * math.log10(4 / error):.2f} dB,",
        f"latent variance {float(np.mean(latents.astype(np.float32) ** 2)):.3f},",
        f"channel std {latents[..., 0].astype(np.float32).std():.2f}..{latents[..., -1].astype(np.float32).std():.3f}",
    )
    out = {
        "latents": latents,
        "captions": np.array(captions),
        "groups": np.array(groups),
        "vocab": np.array(vocab),
        "mean": mean,
        "basis": basis,
        "scale": scale,
    }
    np.savez(cache, **out)
    return out


class Batches:
    """Random (latents, tokens) batches. A caption is the picture's own words, sometimes followed or replaced by
    its group word, and sometimes dropped, which trains the null prompt that guidance subtracts."""

    def __init__(self, data, seed, drop):
        vocab = {w: i for i, w in enumerate(data["vocab"].tolist())}
        rows = []
        for caption, group in zip(data["captions"].tolist(), data["groups"].tolist(), strict=True):
            own = caption if group in words_of(caption) else f"{caption} {group}"
            rows.append([token_ids(t, vocab) for t in (caption, own, group, "")])
        self.tokens = np.array(rows, np.int32)
        self.latents = data["latents"]
        self.rng = np.random.default_rng(seed)
        self.odds = np.array([0.72, 0.10, 0.06]) if drop else np.array([1.0, 0.0, 0.0])
        self.odds = np.append(self.odds, 1 - self.odds.sum())
        self.order = np.empty(0, np.int64)

    def take(self, n):
        while len(self.order) < n:
            self.order = np.concatenate([self.order, self.rng.permutation(len(self.latents))])
        pick, self.order = self.order[:n], self.order[n:]
        variant = self.rng.integers(self.latents.shape[1], size=n)
        form = self.rng.choice(4, size=n, p=self.odds)
        u = (np.arange(n) + self.rng.random(n)) / n  # stratified
        return self.latents[pick, variant].astype(np.float32), self.tokens[pick, form], u.astype(np.float32)


# --------------------------------------------------------------------------------------------- model


def build(vocab_size):
    from mflux.models.common.config.model_config import ModelConfig

    # Train in float32 throughout. (In mflux this constant is what the time embedding, and q and k of the single
    # blocks, are rounded to.)
    ModelConfig.precision = mx.float32
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer

    mx.random.seed(0)
    net = Flux2Transformer(**TRANSFORMER)
    for linear in (
        net.double_stream_modulation_img.linear,
        net.double_stream_modulation_txt.linear,
        net.single_stream_modulation.linear,
        net.norm_out.linear,
        net.proj_out,
    ):
        linear.weight = mx.zeros_like(linear.weight)  # adaLN-zero
    # Start as a pass-through of x_t: a 128-wide token in a 256-wide stream otherwise takes thousands of steps to learn
    # to carry the noise to the output. x_embedder has orthonormal columns, proj_out is its transpose.
    width, channels = net.x_embedder.weight.shape
    gauss = np.random.default_rng(0).standard_normal((width, channels))
    q = np.linalg.qr(gauss - gauss.mean(0))[0].astype(np.float32)
    net.x_embedder.weight = mx.array(q)
    net.proj_out.weight = mx.array(np.ascontiguousarray(q.T) * (channels / width) ** 0.5)
    text = mx.random.normal((vocab_size, TRANSFORMER["joint_attention_dim"]))
    params = tree_unflatten(tree_flatten({"net": net.parameters(), "text": text}))
    mx.eval(params)
    return net, params


IMG_IDS = mx.array([[0, h, w, 0] for h in range(GRID) for w in range(GRID)])
TXT_IDS = mx.array([[0, 0, 0, i] for i in range(CONTEXT)])


def velocity(net, params, x, tokens, sigma):
    net.update(params["net"])
    return net(
        hidden_states=x,
        encoder_hidden_states=params["text"][tokens],
        timestep=sigma * 1000.0,
        img_ids=IMG_IDS,
        txt_ids=TXT_IDS,
    )


def shifted(u, mu):
    """mflux's time shift: uniform u in (0, 1) -> sigma."""
    return math.exp(mu) / (math.exp(mu) + (1.0 / np.clip(u, 1e-3, 1) - 1.0))


def sample(net, params, tokens, guidance, steps, seed, forward):
    """Batched version of mflux's loop, for the training grids."""
    from mflux.models.common.schedulers.flow_match_euler_discrete_scheduler import FlowMatchEulerDiscreteScheduler

    _, sigmas = FlowMatchEulerDiscreteScheduler.get_timesteps_and_sigmas(TOKENS, steps)
    sigmas = np.array(sigmas)
    n = tokens.shape[0]
    x = mx.random.normal((n, TOKENS, CHANNELS), key=mx.random.key(seed))
    null = mx.zeros_like(tokens)
    for a, b in itertools.pairwise(sigmas):
        if guidance > 1:
            v = forward(params, mx.concatenate([x, x]), mx.concatenate([tokens, null]), mx.full((2 * n,), float(a)))
            v = v[n:] + guidance * (v[:n] - v[n:])
        else:
            v = forward(params, x, tokens, mx.full((n,), float(a)))
        x = x + (float(b) - float(a)) * v
        mx.eval(x)
    return np.array(x)


def save_grid(latents, data, path, columns=8):
    images = from_patches(latents * data["scale"] @ data["basis"] + data["mean"])
    images = ((np.clip(images, -1, 1) + 1) * 127.5).round().astype(np.uint8)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * SIZE, columns * SIZE, 3), 255, np.uint8)
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        sheet[r * SIZE : (r + 1) * SIZE, c * SIZE : (c + 1) * SIZE] = image
    Image.fromarray(sheet).save(path)


GRID_PROMPTS = [
    "red apple",
    "pizza",
    "cat face",
    "blue heart",
    "sunflower",
    "rocket",
    "smiling face",
    "hamburger",
    "penguin",
    "green square",
    "rainbow",
    "strawberry",
    "frog face",
    "doughnut",
    "red car",
    "palm tree",
    "owl",
    "soccer ball",
    "fire",
    "panda face",
    "banana",
    "turtle",
    "birthday cake",
    "guitar",
]


# ------------------------------------------------------------------------------------------- training


def flat(tree, prefix):
    return {f"{prefix}.{k}": v for k, v in tree_flatten(tree)}


def load_checkpoint(path, params, optimizers):
    arrays, meta = mx.load(str(path), return_metadata=True)

    def group(prefix):
        return tree_unflatten([(k[len(prefix) + 1 :], v) for k, v in arrays.items() if k.startswith(prefix + ".")])

    for i, optimizer in enumerate(optimizers):
        optimizer.state = group(f"opt{i}")
    return group("params"), group("ema"), json.loads(meta["train"])


def split(tree, pick):
    return tree_unflatten([(k, v) for k, v in tree_flatten(tree) if pick(k, v)])


def train(args):
    world = mx.distributed.init()
    rank, size = world.rank(), world.size()
    if rank == 0:
        data = prepare(args)
    if size > 1:
        mx.eval(mx.distributed.all_sum(mx.ones(1)))  # others wait for the cache
    data = prepare(args)
    net, params = build(len(data["vocab"]))
    count = sum(v.size for _, v in tree_flatten(params))
    ema = tree_map(lambda v: v, params)
    # Muon for the hidden matrices (when asked for), AdamW for the rest.
    hidden = (lambda k, v: v.ndim == 2 and "_blocks." in k) if args.muon else (lambda k, v: False)
    rest = lambda k, v: not hidden(k, v)  # noqa: E731
    adam = optim.AdamW(learning_rate=args.lr, betas=[0.9, 0.99], weight_decay=0.01)
    optimizers = [adam]
    if args.muon:
        optimizers.append(optim.Muon(learning_rate=args.muon_lr, momentum=0.95, weight_decay=0.0, ns_steps=args.ns))
    picks = [rest, hidden][: len(optimizers)]
    state = {"step": 0, "seconds": 0.0, "log": []}
    last = args.work / "last.safetensors"
    if last.exists():
        params, ema, state = load_checkpoint(last, params, optimizers)
        if rank == 0:
            say(f"resuming at step {state['step']}, {state['seconds'] / 60:.1f} min trained")
    else:
        for optimizer, pick in zip(optimizers, picks, strict=True):
            optimizer.init(split(params, pick))
    states = [o.state for o in optimizers]
    per_rank = args.batch // size
    batches = Batches(data, seed=1000 * state["step"] + rank + 1, drop=True)

    def loss_fn(p, x0, eps, tokens, sigma):
        s = sigma[:, None, None]
        v = velocity(net, p, (1 - s) * x0 + s * eps, tokens, sigma)
        return mx.mean(mx.square(v - (eps - x0)))

    gradient = mx.compile(mx.value_and_grad(loss_fn))
    evaluate = mx.compile(loss_fn)
    forward = mx.compile(lambda p, x, t, s: velocity(net, p, x, t, s))

    @mx.compile
    def update(p, g, e, states, rates, d):
        """Clip, step the optimizers and the EMA; pure, so that it compiles into few kernels."""
        g, _ = optim.clip_grad_norm(g, 1.0)
        updated = []
        for optimizer, pick, st, rate in zip(optimizers, picks, states, rates, strict=True):
            optimizer.state = dict(st)
            optimizer.learning_rate = rate
            updated += tree_flatten(optimizer.apply_gradients(split(g, pick), split(p, pick)))
        p = tree_unflatten(updated)
        e = tree_map(lambda a, b: a * d + b * (1 - d), e, p)
        return p, e, [o.state for o in optimizers]

    # a fixed evaluation set: every eval sees the same pictures, noise and sigmas
    fixed = Batches(data, seed=77, drop=False).take(192)
    eps_fixed = np.random.default_rng(78).standard_normal(fixed[0].shape).astype(np.float32)

    def eval_loss(p):
        total = 0.0
        for i in range(0, 192, 64):
            x0, tok, _u = (a[i : i + 64] for a in fixed)
            total += (
                evaluate(
                    p,
                    mx.array(x0),
                    mx.array(eps_fixed[i : i + 64]),
                    mx.array(tok),
                    mx.array(shifted(fixed[2][i : i + 64], args.mu).astype(np.float32)),
                ).item()
                / 3
            )
        return total

    if rank == 0:
        say(f"{count / 1e6:.3f} M parameters, {size} process(es), batch {per_rank} x {size}, {args.minutes} min")
    mx.random.seed(31 * state["step"] + rank)
    start, base = time.time(), state["seconds"]
    running, since, t_log = 0.0, 0, time.time()
    next_grid, next_save = base + 60 * args.first_grid, base + 60 * args.save_every
    while True:
        seconds = base + time.time() - start
        progress = seconds / (60 * args.minutes)
        # rank 0's clock decides for everyone
        if size > 1:
            progress = mx.distributed.all_sum(mx.array(progress if rank == 0 else 0.0)).item()
        if progress >= 1:
            break
        step = state["step"]
        warm = min(1.0, (step + 1) / args.warmup)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) * (1 - args.floor) + args.floor
        x0, tokens, u = batches.take(per_rank)
        x0 = mx.array(x0)
        eps = mx.random.normal(x0.shape)
        sigma = mx.array(shifted(u, args.mu).astype(np.float32))
        loss, grads = gradient(params, x0, eps, mx.array(tokens), sigma)
        if size > 1:
            grads = nn.average_gradients(grads)
        rates = [mx.array(r * warm * decay) for r in (args.lr, args.muon_lr)[: len(optimizers)]]
        params, ema, states = update(
            params, grads, ema, states, rates, mx.array(min(args.ema, (1 + step) / (10 + step)))
        )
        mx.eval(loss, params, ema, states)
        state["step"] = step + 1
        running += loss.item()
        since += 1
        if rank == 0 and (step + 1) % args.log_every == 0:
            per = (time.time() - t_log) / since
            entry = {
                "step": step + 1,
                "minutes": round(seconds / 60, 2),
                "loss": round(running / since, 5),
                "lr": round(float(rates[0]), 7),
            }
            if (step + 1) % (5 * args.log_every) == 0:
                entry["eval"] = round(eval_loss(params), 5)
                entry["eval_ema"] = round(eval_loss(ema), 5)
            state["log"].append(entry)
            say(json.dumps(entry), f"{per:.3f} s/step {per_rank * size / per:.1f} samples/s")
            running, since, t_log = 0.0, 0, time.time()
        if rank == 0 and seconds >= next_grid:
            next_grid = seconds + 60 * args.grid_every
            vocab = {w: i for i, w in enumerate(data["vocab"].tolist())}
            tok = mx.array([token_ids(p, vocab) for p in GRID_PROMPTS])
            out = sample(net, ema, tok, args.grid_guidance, 20, 5, forward)
            save_grid(out, data, args.work / f"grid_{state['step']:06d}.png")
            t_log = time.time()
            since, running = 0, 0.0
        if rank == 0 and seconds >= next_save:
            next_save = seconds + 60 * args.save_every
            save(args, params, ema, states, state, seconds)
    if rank == 0:
        seconds = base + time.time() - start
        state["log"].append(
            {
                "step": state["step"],
                "minutes": round(seconds / 60, 2),
                "eval": round(eval_loss(params), 5),
                "eval_ema": round(eval_loss(ema), 5),
            }
        )
        save(args, params, ema, states, state, seconds)
        vocab = {w: i for i, w in enumerate(data["vocab"].tolist())}
        tok = mx.array([token_ids(p, vocab) for p in GRID_PROMPTS])
        save_grid(sample(net, ema, tok, args.grid_guidance, 20, 5, forward), data, args.work / "grid_final.png")
        say("done", json.dumps(state["log"][-1]))


def save(args, params, ema, states, state, seconds):
    state["seconds"] = seconds
    arrays = flat(params, "params") | flat(ema, "ema")
    for i, optimizer_state in enumerate(states):
        arrays |= flat(optimizer_state, f"opt{i}")
    part = args.work / "part.safetensors"
    mx.save_safetensors(str(part), arrays, metadata={"train": json.dumps(state)})
    os.replace(part, args.work / "last.safetensors")


# --------------------------------------------------------------------------------------------- export

LICENSE_NOTE = (
    "Weights trained from scratch on Noto emoji pictures (Copyright Google LLC, Apache License 2.0, "
    "https://github.com/googlefonts/noto-emoji), taken from the npm package emoji-datasource-google 16.0.0 "
    "(Copyright Cal Henderson, MIT). Not affiliated with Google or Black Forest Labs; the architecture is "
    "mflux's FLUX.2 transformer class at a much smaller size, and no FLUX.2 weights are contained."
)


def export(args):
    """Write the EMA weights, word table and codec as one bfloat16 safetensors file."""
    data = prepare(args)
    _, ema, state = load_checkpoint(args.work / "last.safetensors", None, [])
    dtype = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}[args.dtype]
    arrays = {k: v.astype(dtype) for k, v in flat(ema["net"], "transformer").items()}
    arrays["text.weight"] = ema["text"].astype(dtype)
    arrays["codec.mean"] = mx.array(data["mean"]).astype(mx.float16)
    arrays["codec.basis"] = mx.array(data["basis"]).astype(mx.float16)
    arrays["codec.scale"] = mx.array(data["scale"])
    config = {
        "format": 1,
        "size": SIZE,
        "patch": PATCH,
        "channels": CHANNELS,
        "context": CONTEXT,
        "stop_words": list(STOP_WORDS),
        "transformer": TRANSFORMER,
    }
    metadata = {
        "format": "mlx",
        "config": json.dumps(config),
        "vocab": json.dumps(data["vocab"].tolist()),
        "captions": json.dumps(
            [f"{c}|{g}" for c, g in zip(data["captions"].tolist(), data["groups"].tolist(), strict=True)]
        ),
        "training": json.dumps(
            {"steps": state["step"], "minutes": round(state["seconds"] / 60, 1), "batch": args.batch}
        ),
        "license": LICENSE_NOTE,
    }
    mx.save_safetensors(str(args.export), arrays, metadata=metadata)
    say(f"{args.export}: {Path(args.export).stat().st_size / 1e6:.2f} MB, step {state['step']}")


def spawn(count):
    """Run this command once per rank. (mlx.launch does the same but polls, which costs a core.)"""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump(hosts, hostfile)
        hostfile.flush()
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv], env=os.environ | {"MLX_RANK": str(i), "MLX_HOSTFILE": hostfile.name}
            )
            for i in range(count)
        ]
        return max(abs(p.wait()) for p in ranks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked emoji-datasource-google package")
    parser.add_argument("--work", type=Path, required=True, help="folder for the cache, checkpoints and grids")
    parser.add_argument("--minutes", type=float, default=60, help="total training time, over all resumptions")
    parser.add_argument("--batch", type=int, default=32, help="over all processes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW")
    parser.add_argument("--muon", action="store_true", help="Muon for the block matrices")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--ns", type=int, default=5, help="Newton-Schulz steps of Muon")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--floor", type=float, default=0.02, help="last learning rate, as a share of the first")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--mu", type=float, default=1.3, help="sigma shift of the training distribution")
    parser.add_argument("--whiten", type=float, default=0.35)
    parser.add_argument("--variants", type=int, default=8, help="renderings of each picture")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=4, help="minutes")
    parser.add_argument("--first-grid", type=float, default=4, help="minutes")
    parser.add_argument("--grid-every", type=float, default=8, help="minutes")
    parser.add_argument("--grid-guidance", type=float, default=3.0)
    parser.add_argument("--export", type=Path, help="write the finished model here instead of training")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args)
    elif args.processes > 1 and "MLX_RANK" not in os.environ:
        raise SystemExit(spawn(args.processes))
    else:
        train(args)


if __name__ == "__main__":
    main()
