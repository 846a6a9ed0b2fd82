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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, TensorDataset, default_collate
from tqdm import trange

from common import (
    Backbone,
    Reward,
    Stitch,
    StitchedValue,
    add_noise,
    draw_lines,
    fail,
    generator,
    keep_blocks,
    load_artifact,
    now,
    parse_stage,
    print_table,
    save_artifact,
    save_table,
    save_training,
    stage_parser,
)

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the validation
KEPT_TARGETS = 2**30  # bytes; the targets of published towers are computed at every step
PUBLISHED = dict(epochs=5, lr=1e-5, sigma_law="logit-normal", warmup=100, schedule="constant")
PRESETS = {
    "mini": dict(epochs=12, batch=32, lr=2e-3, sigma_law="uniform", warmup=50, schedule="cosine"),
    "24gb": PUBLISHED | dict(batch=32, micro_batch=4, resolution=512),
    "paper": PUBLISHED | dict(batch=128, micro_batch=16, resolution=1024),
}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--front", choices=("dit", "vae"), default="dit", help="vae: the noisy latent itself")
    add("--embedding", choices=("mean", "unit"), default="mean", help="what e estimates [D14]")
    add("--sigma-law", choices=("logit-normal", "uniform"), help="of the noise levels [D2]")
    add("--lam-tok", type=float, default=1.0, help="weight of the token loss (78)")
    add("--epochs", type=float, help="passes over the images (D.1: 5, of the VAE stitch 15)")
    add("--steps", type=int, help="optimiser steps, instead of --epochs")
    add("--batch", type=int, help="images of a step, of each process")
    add("--micro-batch", type=int, help="images at a time, the step is the same; None: all")
    add("--lr", type=float, help="of AdamW on the tail")
    add("--stitch-lr", type=float, default=5.0, help="times --lr: of the stitching layer")
    add("--warmup", type=int, help="steps in which the rate rises")
    add("--schedule", choices=("constant", "cosine"), help="of the rate after them")
    add("--ema", type=float, default=0.0, help="decay of the average that is kept; 0: no average")
    add("--value", help="file to write; None: value.pt or value_vae.pt in --out")
    add("--log-every", type=int, default=25, help="steps")
    add("--save-every", type=int, default=200, help="steps between checkpoints and validations")
    add("--resume", action="store_true", help="go on from <value>.train")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def sample_sigma(n, law, generator):
    """Noise levels (n,) in (0, 1): 'logit-normal', centre-biased, or 'uniform' [D2]."""
    if law == "uniform":
        return torch.rand(n, generator=generator)
    return torch.sigmoid(torch.randn(n, generator=generator))


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


def batch_of(data, reward, index):
    """z_0 (B, C, h, w), e_RM (B, E) and h_RM (B, N+1, d) of the images index (B,)."""
    rows = default_collate([data[k] for k in index.tolist()])
    z0, *clean = (v.to(reward.device) for v in rows)
    return z0.float(), *(clean if len(clean) == 2 else clean_target(reward, clean[0] / 255))


def training_images(out, shards, reward, batch):
    """Dataset of (z_0, pixels), memory-mapped, or where these are small of (z_0, e_RM, h_RM)."""
    files = [Path(out, shard["file"]) for shard in shards]
    if missing := [file for file in files if not file.exists()]:
        fail(f"{missing[0]} is missing; make it with: python 01_cache_features.py --out {out}")
    tensors = [torch.load(file, weights_only=True, mmap=True) for file in files]
    data = ConcatDataset([TensorDataset(shard["z0"], shard["pixels"]) for shard in tensors])
    if len(data) * reward.visual.positional_embedding.nbytes > KEPT_TARGETS:  # shaped as h_RM
        return data
    parts = [batch_of(data, reward, k) for k in torch.arange(len(data)).split(batch)]
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
    device = torch.device(args.device)
    reward = Reward(args.reward, args.preset, device)
    backbone = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype))
    transformer = backbone.transformer if args.front == "dit" else None
    if transformer:
        keep_blocks(transformer, fit["i"])  # V needs no more of it
    null = [v.to(device) for v in cache["data"]["null"]]
    layer = Stitch(fit["W"], fit["bias"], spec["reward_grid"], spec["antialias"])
    norm = cache["data"]["probe"]["embedding_norm"]
    which = fit["i"], fit["j"], fit["cls"], args.front, args.embedding, norm
    model = StitchedValue(transformer, null, reward, layer, *which).to(device)
    if args.dtype == "bfloat16":  # the weights and the targets stay float32
        model.head = torch.autocast(device.type, torch.bfloat16)(model.head)
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
    micro = args.micro_batch or args.batch
    share = torch.arange(args.batch) + args.batch * accelerator.process_index
    n = args.batch * accelerator.num_processes
    totals = 0
    for step in trange(last["step"], steps, disable=not accelerator.is_main_process):
        # every process draws the whole batch and takes its share: the same data as in one
        draw = generator(args.seed, "train", step)
        index = torch.randint(len(data), (n,), generator=draw)[share]
        t = sample_sigma(n, args.sigma_law, draw)[share].to(reward.device)
        eps = torch.randn(n, *probe["z0"].shape[1:], generator=draw)[share].to(reward.device)
        z0, e_rm, h_rm = batch_of(data, reward, index)
        z_t = add_noise(z0, eps, t)
        for k in torch.arange(args.batch).split(micro):
            target = e_rm[k], h_rm[k]
            loss, parts = step_loss(model, reward, z_t[k], t[k], target, args.lam_tok)
            weight = len(k) / args.batch
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
    cache, stitch, reward, model, optimizer = load(args)
    data = training_images(args.out, cache["data"]["shards"], reward, args.batch)
    n = args.batch * accelerator.num_processes
    steps = args.steps or math.ceil(args.epochs * len(data) / n)
    run = vars(args) | dict(out=None, device=None, resume=None)  # all else must agree to resume
    run |= dict(stitch=stitch["id"], steps=steps, processes=accelerator.num_processes)
    accelerator.print(f"{steps} steps of {n} images on {accelerator.num_processes} processes")
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
