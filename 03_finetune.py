"""Stage 03 -- finetune the stitching layer and the reward's tail so that V(z_t) = E[r(z_0) | z_t].

Paper   StitchVM (arXiv 2605.19804) Sec. 4.2, Prop. 1, App. D.1, Eqs. (78), (79)
            CLIP-like   | e - e_RM |^2 + lam_tok | h - h_RM |^2                       (78)
            aesthetic   Smooth-L1 on tokens, embedding and final score, weights 1     (79)
        e, h: embedding and tokens after ln_post of the stitched tail at z_t; e_RM, h_RM: the
        reward's, of the clean image. s_psi and r^{>=j} train, all else is frozen.
Reads   out/cache.pt (01), out/stitch.pt (02)
Writes  out/value.pt (--front vae: value_vae.pt), out/03_finetune*.json, out/03_finetune*.png;
        while it runs <value>.train, where --resume goes on to the same bits
Run     python 03_finetune.py
        python 03_finetune.py --front vae
        accelerate launch 03_finetune.py --preset paper --out FOLDER
Departs from the paper: e is not normalised but divided by the probe images' mean norm, so that V is
        the mean E[r | z_t]; --embedding unit is the paper's [D14]. --sigma-law is a guess [D2].
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, default_collate
from tqdm import tqdm

from common import (
    COUNT,
    POSITIVE,
    SHARE,
    WHOLE,
    Backbone,
    Reward,
    Stitch,
    StitchedValue,
    add_noise,
    check_artifact,
    draw_lines,
    fail,
    fingerprints,
    generator,
    keep_or_drop,
    load_artifact,
    maker_command,
    now,
    parse_stage,
    print_table,
    save_artifact,
    save_table,
    save_training,
    stage_parser,
    track,
    within,
)

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the validation
KEPT_TARGETS = 2**30  # bytes; the targets of published towers are computed at every step
FREE = ("out", "device", "resume", "restart", "track", "workers")  # --resume: all else must agree
EPOCHS = {"mini": 12, "24gb": 5, "paper": 5}  # of the VAE stitch three times as many
PUBLISHED = dict(lr=1e-5, sigma_law="logit-normal", warmup=100, schedule="constant", workers=8)
PRESETS = {
    "mini": dict(batch=32, lr=2e-3, sigma_law="uniform", warmup=50, schedule="cosine"),
    "24gb": PUBLISHED | dict(batch=32, micro_batch=4, resolution=512),
    "paper": PUBLISHED | dict(batch=128, micro_batch=16, resolution=1024),
}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--front", choices=("dit", "vae"), default="dit", help="vae: the noisy latent itself")
    add("--embedding", choices=("mean", "unit"), default="mean", help="what e estimates [D14]")
    add("--sigma-law", choices=("logit-normal", "uniform", "low"), help="of the noise levels [D2]")
    add("--lam-tok", type=within(float, 0), default=1.0, help="weight of the token loss (78)")
    add("--epochs", type=POSITIVE, help="over the images; None: 5 (D.1; mini 12), thrice if vae")
    add("--steps", type=COUNT, help="optimiser steps, instead of --epochs")
    add("--batch", type=COUNT, help="images of a step, of all processes together (D.1: 128)")
    add("--micro-batch", type=WHOLE, help="images at a time, the step is the same; None: all")
    add("--lr", type=POSITIVE, help="of AdamW on the tail")
    add("--stitch-lr", type=POSITIVE, default=5.0, help="times --lr: of the stitching layer")
    add("--warmup", type=WHOLE, help="steps in which the rate rises")
    add("--schedule", choices=("constant", "cosine"), help="of the rate after them")
    add("--ema", type=SHARE, default=0.0, help="decay of the average that is kept; 0: no average")
    add("--value", help="file to write; None: value.pt or value_vae.pt in --out")
    add("--log-every", type=COUNT, default=25, help="steps")
    add("--save-every", type=COUNT, default=200, help="steps between checkpoints and validations")
    add("--resume", action="store_true", help="go on from <value>.train")
    add("--restart", action="store_true", help="drop what an unfinished run left there")
    add("--track", metavar="DIR", help="folder of TensorBoard files of losses and validations")
    add("--workers", type=WHOLE, default=0, help="processes that read and draw data; 0: this one")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    args = parse_stage(p, PRESETS, argv, writes="value")
    times = 3 if args.front == "vae" else 1
    args.epochs = args.epochs or EPOCHS[args.preset] * times
    return args


# ---- ALGORITHM: copy from here ----
def sample_sigma(n, law, generator):
    """Noise levels (n,) in (0, 1) [D2]: 'logit-normal', 'uniform', or 'low', its square."""
    if law == "logit-normal":
        return torch.sigmoid(torch.randn(n, generator=generator))
    return torch.rand(n, generator=generator) ** (2 if law == "low" else 1)


def distill_loss(e, h, e_rm, h_rm, lam_tok=1.0):
    """(78) and its parts: e (B, E) raw or unit, e_rm (B, E) unit, tokens h and h_rm (B, N+1, d)."""
    parts = {"embedding": (e - e_rm).square().sum(-1).mean(), "tokens": (h - h_rm).square().mean()}
    return parts["embedding"] + lam_tok * parts["tokens"], parts


def aesthetic_loss(e, h, score, e_rm, h_rm, score_rm):
    """(79) and its parts: embeddings (B, E), tokens (B, N+1, d) and scores (B,)."""
    parts = {"tokens": F.smooth_l1_loss(h, h_rm), "embedding": F.smooth_l1_loss(e, e_rm)}
    parts["score"] = F.smooth_l1_loss(score, score_rm)
    return sum(parts.values()), parts


@torch.no_grad()
def clean_target(reward, images):
    """e_RM (B, E), unit, and h_RM (B, N+1, d) of clean images (B, 3, s, s) in [0, 1]."""
    raw, h_rm = reward.embed(images)
    return F.normalize(raw, dim=-1), h_rm


def step_loss(model, reward, z_t, t, target, lam_tok=1.0):
    """The loss and its parts at z_t (B, C, h, w), t (B,); target: (e_RM, h_RM) of clean_target."""
    with torch.no_grad():
        features, _ = model.features(z_t, t)
    e, h = (v.float() for v in model.head(features))
    e_rm, h_rm = target
    if reward.head is not None:
        return aesthetic_loss(e, h, reward.score(e), e_rm, h_rm, reward.score(e_rm))
    return distill_loss(e, h, e_rm, h_rm, lam_tok)


def learning_rate(step, steps, warmup, schedule):
    """Factor in (0, 1] on the rate: linear warm-up, then constant or a cosine to zero."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps) if schedule == "cosine" else 1.0)


# ---- to here ----


def draw_batch(images, order, law, seed, positions):
    """z_t (B, C, h, w), sigma (B,) and e_RM, h_RM or pixels of the images order[p], p in positions.

    What is drawn depends on seed and p only: neither on the processes nor on where a run went on.
    """
    rows = []
    for p in positions:
        z0, *clean = images[order[p].item()]
        draw = generator(seed, "train", p)
        t = sample_sigma(1, law, draw)
        eps = torch.randn(z0.shape, generator=draw)
        rows.append((add_noise(z0.float(), eps, t), t[0], *clean))
    return default_collate(rows)


def batches(args, images, start, steps, accelerator):
    """This process's share of each step from start to steps - 1; an epoch is a permutation."""
    epochs = range(math.ceil(steps * args.batch / len(images)))
    draws = [generator(args.seed, "epoch", epoch) for epoch in epochs]
    order = torch.cat([torch.randperm(len(images), generator=draw) for draw in draws])
    share = args.batch // accelerator.num_processes
    first = share * accelerator.process_index
    firsts = range(first + start * args.batch, steps * args.batch, args.batch)
    return DataLoader(
        [range(p, p + share) for p in firsts],
        batch_size=None,
        collate_fn=partial(draw_batch, images, order, args.sigma_law, args.seed),
        num_workers=args.workers,
        multiprocessing_context="fork" if args.workers else None,
        pin_memory=args.device.startswith("cuda"),
    )


def read_shards(out, shards, spec=()):
    """01's dicts of z0, pixels and names, memory-mapped."""
    found = []
    for file in (Path(out, shard["file"]) for shard in shards):
        try:
            shard = torch.load(file, weights_only=True, mmap=True)
            found.append({k: shard[k] for k in ("z0", "pixels", "names")})
        except Exception as e:
            remake = maker_command(Path(out, "cache.pt"), spec, "01_cache_features.py")
            fail(f"{file} is missing or damaged ({type(e).__name__}); make it with: {remake}")
    return found


def training_images(out, shards, reward, spec=()):
    """Dataset of (z_0, pixels), memory-mapped, or where these are small of (z_0, e_RM, h_RM)."""
    parts = read_shards(out, shards, spec)
    data = ConcatDataset([TensorDataset(part["z0"], part["pixels"]) for part in parts])
    if len(data) * reward.visual.positional_embedding.nbytes > KEPT_TARGETS:  # shaped as h_RM
        return data
    loader = DataLoader(data, 32)
    parts = [(z0, *clean_target(reward, x.to(reward.device) / 255)) for z0, x in loader]
    return TensorDataset(*(torch.cat(v).cpu() for v in zip(*parts, strict=True)))


@torch.no_grad()
def validate(model, reward, probe, seed, batch):
    """{val_<sigma>: mean |e - e_RM|^2} of the probe images, which are not trained on."""
    z0 = probe["z0"].float().to(reward.device)
    pixels = probe["pixels"].to(reward.device).split(batch)
    e_rm = torch.cat([clean_target(reward, x / 255)[0] for x in pixels])
    row = {}
    for sigma in SIGMAS:
        eps = torch.randn(z0.shape, generator=generator(seed, "validate", sigma)).to(z0.device)
        t = torch.tensor([sigma], device=z0.device)
        z_t = add_noise(z0, eps, t).split(batch)
        e = torch.cat([model.embed(z, t.expand(len(z))) for z in z_t])
        row[f"val_{sigma}"] = float((e - e_rm).square().sum(-1).mean())
    return row


def load(args):
    """The artefacts of 01 and 02, the reward, the value model as 02 fitted it, its optimiser."""
    asked = ("reward", "backbone", "resolution")
    expect = {k: getattr(args, k) for k in asked if getattr(args, k)}
    cache = load_artifact(Path(args.out, "cache.pt"), expect, "01_cache_features.py")
    spec = cache["spec"]
    stitch = load_artifact(Path(args.out, "stitch.pt"), spec, "02_fit_stitch.py")
    fit = stitch["data"][args.front]
    given = args.preset, torch.device(args.device), getattr(torch, args.dtype)
    reward = Reward(args.reward, *given)
    backbone = Backbone(args.backbone, *given, args.compile)
    transformer = backbone.prefix(fit["i"]) if args.front == "dit" else None
    spec["transformer"] = spec["transformer"][: fit["i"]]
    known = fingerprints(transformer, [reward], fit["i"])
    check_artifact(Path(args.out, "cache.pt"), cache, known, "01_cache_features.py")
    null = [v.to(reward.device) for v in cache["data"]["null"]]
    layer = Stitch(fit["W"], fit["bias"], spec["reward_grid"], spec["antialias"])
    norm = cache["data"]["probe"]["embedding_norm"]
    which = fit["i"], fit["j"], fit["cls"], args.front, args.embedding, norm
    model = StitchedValue(transformer, null, reward, layer, *which).to(reward.device)
    tail = [p for k, p in model.named_parameters() if p.requires_grad and k[:6] != "stitch"]
    groups = [dict(params=tail, peak=args.lr)]
    groups += [dict(params=[*model.stitch.parameters()], peak=args.lr * args.stitch_lr)]
    return cache, stitch, reward, model, torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def train(args, model, optimizer, reward, data, probe, run, checkpoint, accelerator):
    """The logged rows; model is left with its last weights, or with their average."""
    weights = model.trained_state()  # trap: these are the parameters' own memory, not copies
    average = {k: v.clone() for k, v in weights.items()} if args.ema else {}
    rows = []
    if args.resume:
        saved = load_artifact(checkpoint, run, "03_finetune.py")["data"]
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        average = {k: v.to(reward.device) for k, v in saved["average"].items()}
        rows = saved["rows"]
    last = rows[-1] if rows else dict(step=0, seconds=0.0)
    begin = now(reward.device) - last["seconds"]
    steps = run["steps"]
    share = args.batch // accelerator.num_processes
    micro = args.micro_batch or share
    totals = 0
    loader = batches(args, data, last["step"], steps, accelerator)
    bar = tqdm(loader, disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar, last["step"]):
        batch = [v.to(reward.device, non_blocking=True).split(micro) for v in batch]
        for z_t, t, *clean in zip(*batch, strict=True):
            target = clean if len(clean) == 2 else clean_target(reward, clean[0] / 255)
            loss, parts = step_loss(model, reward, z_t, t, target, args.lam_tok)
            weight = len(t) / share
            (weight * loss).backward()
            totals = totals + weight * torch.stack([loss, *parts.values()]).detach()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps, args.warmup, args.schedule)
            for p in group["params"] if accelerator.num_processes > 1 else ():
                p.grad = accelerator.reduce(p.grad, "mean")
        optimizer.step()
        optimizer.zero_grad()
        if args.ema:
            follow = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            follow([*average.values()], [*weights.values()], None)
        saves = (step + 1) % args.save_every == 0 or step + 1 == steps
        if (step + 1) % args.log_every and not saves:
            continue  # nothing above waits for the device
        means = accelerator.reduce(totals, "mean") / (step + 1 - last["step"])
        totals = 0
        last = dict(step=step + 1, seconds=round(now(reward.device) - begin, 2))
        last |= zip(("loss", *parts), means.tolist(), strict=True)
        rows.append(last)
        if saves:
            last |= validate(model, reward, probe, args.seed, micro)
        if not all(map(math.isfinite, last.values())):
            good = checkpoint if checkpoint.exists() else "the stitch"
            fail(f"NaN or infinite by step {step + 1}: lower --lr; the last good state is {good}")
        if accelerator.is_main_process:
            track(args.track, checkpoint.stem, step + 1, last)
        if saves and accelerator.is_main_process:
            print_table([last], last)
            saved = dict(weights=weights, average=average, optimizer=optimizer.state_dict())
            save_training(checkpoint, "03_finetune", run, saved | dict(rows=rows))
    model.load_state_dict(average, strict=False)
    return rows


def main(args):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.device == "cpu")
    suffix = "_vae" if args.front == "vae" else ""
    path = Path(args.value or Path(args.out, f"value{suffix}.pt"))
    checkpoint = path.with_suffix(".train")
    processes = accelerator.num_processes
    if args.batch % processes:
        fail(f"--batch {args.batch} cannot be shared equally by {processes} processes")
    cache, stitch, reward, model, optimizer = load(args)
    if accelerator.is_main_process or not args.restart:
        keep_or_drop(checkpoint, args, path)
    data = training_images(args.out, cache["data"]["shards"], reward, cache["spec"])
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch)
    run = vars(args) | dict.fromkeys(FREE) | dict(stitch=stitch["id"], steps=steps)
    accelerator.print(f"{steps} steps of {args.batch} images on {processes} processes")
    probe = cache["data"]["probe"]
    rows = train(args, model, optimizer, reward, data, probe, run, checkpoint, accelerator)
    if accelerator.is_main_process:
        spec = cache["spec"] | {k: getattr(model, k) for k in ("i", "j", "front", "embedding")}
        state = {k: v.cpu() for k, v in model.trained_state().items()}
        data = dict(state=state, norm=model.norm, null=cache["data"]["null"])
        spec["objective"] = "distill"
        save_artifact(path, "03_finetune", args, spec, data, [cache, stitch])
        save_table(args, f"03_finetune{suffix}", rows)
        panels = ["loss", *(f"val_{sigma}" for sigma in SIGMAS)]
        draw_lines(rows, "step", panels, None, Path(args.out, f"03_finetune{suffix}.png"))
        checkpoint.unlink()


if __name__ == "__main__":
    main(parse_args())
