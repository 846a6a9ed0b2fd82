"""Stage 03 -- finetune the stitching layer and the reward's tail so that V(z_t) = E[r(z_0) | z_t].

Paper   StitchVM (arXiv 2605.19804) Sec. 4.2, Prop. 1, App. D.1, Eqs. (78), (79)
            CLIP-like:  || e~ - e~_RM ||^2 + lam_tok || h - h_RM ||^2        e~ embedding of the stitched tail, e~_RM the reward's unit one
            aesthetic:  Smooth-L1 on tokens, embedding and final score, weights 1
        z_t = (1-t) z_0 + t eps; h, h_RM the per-token outputs after ln_post, mean over elements. s_psi and r^{>=j} train, all else is frozen.
Reads   out/cache.pt (01), out/stitch.pt (02)
Writes  out/value.pt (--front vae: value_vae.pt, --objective noisyclip: value_noisyclip.pt), out/03_finetune*.json with the curves,
        and while it runs <value>.train, from which --resume goes on to the same bits
Run     python 03_finetune.py                                    # the miniature, six minutes on two cores
        python 03_finetune.py --front vae                        # baseline: the VAE stitch
        python 03_finetune.py --objective noisyclip              # baseline: an image tower on noisy latents, contrastive against the frozen text tower
Departs from the paper: --embedding mean (default) regresses e~_RM with the raw embedding over the probe set's mean norm, not normalised, so that
        V is the mean E[r | z_t] and on one scale at every noise level [D14]; --embedding unit is the paper's. sigma is logit-normal(0, 1) [D2], in the
        miniature uniform, which measured better on the tuning split.
"""
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (Backbone, Reward, Stitch, StitchedValue, add_noise, average_over_processes, count, decay_at, fail, follow, generator, gib, keep_blocks,
                    load_artifact, meta_backbone, meta_value, parse_stage, print_table, processes, report_dry_run, save_artifact, save_figure, save_table,
                    save_training, stage_parser)

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
KEPT_TARGETS = 2 ** 30  # bytes of targets that are kept in memory; the published towers' are computed at every step
PRESETS = {"mini": dict(epochs=12, batch=32, lr=2e-3, sigma_law="uniform", warmup=50, schedule="cosine", ema=0.0, captions="tests/mini/data/train_captions.json"),
           "24gb": dict(epochs=5, batch=32, micro_batch=4, lr=1e-5, sigma_law="logit-normal", warmup=100, schedule="constant", ema=0.0, resolution=512),
           "paper": dict(epochs=5, batch=128, micro_batch=16, lr=1e-5, sigma_law="logit-normal", warmup=100, schedule="constant", ema=0.0, resolution=1024)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--front", choices=("dit", "vae"), default="dit", help="dit: StitchVM; vae: u^{<=i} is the identity on the noisy latent")
    p.add_argument("--objective", choices=("distill", "noisyclip"), default="distill")
    p.add_argument("--embedding", choices=("mean", "unit"), default="mean", help="what the stitched embedding estimates [D14]")
    p.add_argument("--sigma-law", choices=("logit-normal", "uniform"), help="[D2]: the paper's is centre-biased; in the miniature uniform measures best")
    p.add_argument("--lam-tok", type=float, default=1.0, help="weight of the token loss (78)")
    p.add_argument("--epochs", type=float, help="passes over the cached images (App. D.1: 5; VAE stitch: 15)")
    p.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    p.add_argument("--batch", type=int, help="of each process")
    p.add_argument("--micro-batch", type=int, help="images of a batch that go through the tail at once, to save memory (default: all)")
    p.add_argument("--lr", type=float, help="of the tail; the stitching layer gets --stitch-lr times as much")
    p.add_argument("--stitch-lr", type=float, default=5.0)
    p.add_argument("--warmup", type=int)
    p.add_argument("--schedule", choices=("constant", "cosine"))
    p.add_argument("--ema", type=float, help="decay of the average of the weights that is kept as the value model; 0: the last weights")
    p.add_argument("--captions", help="COCO-style captions of the training images, for --objective noisyclip only")
    p.add_argument("--value", help="file to write (default: value.pt, value_vae.pt or value_noisyclip.pt in --out)")
    p.add_argument("--log-every", type=int, default=25)
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints; validation runs as often")
    p.add_argument("--resume", action="store_true", help="go on from <value>.train")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def sample_sigma(n, law, generator):
    """Noise levels (n,) in (0, 1): 'logit-normal', centre-biased, or 'uniform' [D2]."""
    if law == "uniform":
        return torch.rand(n, generator=generator)
    return torch.sigmoid(torch.randn(n, generator=generator))


def distill_loss(e, h, e_rm, h_rm, lam_tok=1.0):
    """(78): squared distance of the embeddings (B, E), e_rm unit, plus lam_tok times the mean squared error of the tokens (B, N, d)."""
    embedding, tokens = (e - e_rm).square().sum(-1).mean(), (h - h_rm).square().mean()
    return embedding + lam_tok * tokens, {"embedding": embedding, "tokens": tokens}


def aesthetic_loss(e, h, score, e_rm, h_rm, score_rm):
    """(79): Smooth-L1 on tokens (B, N, d), embedding (B, E) and final score (B,), weights 1."""
    parts = {"tokens": F.smooth_l1_loss(h, h_rm), "embedding": F.smooth_l1_loss(e, e_rm), "score": F.smooth_l1_loss(score, score_rm)}
    return sum(parts.values()), parts


def noisyclip_loss(e, text, scale):
    """Symmetric contrastive loss of unit embeddings (B, E) of noisy latents against the frozen text tower's (B, E); an equal text is no negative."""
    same = ((text @ text.T) > 1 - 1e-5) & ~torch.eye(len(text), dtype=torch.bool, device=text.device)
    logits, label = (scale * e @ text.T).masked_fill(same, -math.inf), torch.arange(len(text), device=text.device)
    loss = 0.5 * (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label))
    return loss, {"contrastive": loss}


@torch.no_grad()
def clean_target(reward, pixels):
    """Of clean images (B, 3, s, s) in [0, 1]: the reward's unit embedding e_RM (B, E) and its tokens after ln_post h_RM (B, N, d)."""
    raw, h_rm = reward.embed(pixels)
    return F.normalize(raw, dim=-1), h_rm


def step_loss(model, reward, zt, t, target, objective="distill", lam_tok=1.0, text=None, scale=None):
    """The loss of one batch and its parts: zt (B, C, h, w) at t (B,), target the clean images' (e_RM, h_RM), or for 'noisyclip' text (B, E) and scale."""
    with torch.no_grad():
        features, _ = model.features(zt, t)
    e, h = (v.float() for v in model.head(features))
    if objective == "noisyclip":
        return noisyclip_loss(e, text, scale)
    e_rm, h_rm = target
    if reward.head is not None:
        return aesthetic_loss(e, h, reward.score(e), e_rm, h_rm, reward.score(e_rm))
    return distill_loss(e, h, e_rm, h_rm, lam_tok)


def learning_rate(step, steps, warmup, schedule):
    """Factor on the learning rate: linear warm-up, then constant or a cosine to zero."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0)
# ---- to here ----


class Cached:
    """The cached training images of all shards, memory-mapped: rows by global index."""

    def __init__(self, out, shards):
        self.shards = []
        for s in shards:
            if not (Path(out) / s["file"]).exists():
                fail(f"{Path(out) / s['file']} is missing; make it with: python 01_cache_features.py --out {out}")
            self.shards.append(torch.load(Path(out) / s["file"], weights_only=True, mmap=True))
        self.starts = torch.tensor([0] + [s["images"] for s in shards]).cumsum(0)

    def __len__(self):
        return int(self.starts[-1])

    def rows(self, index, *keys):
        """Rows of the tensors named by keys, in the order of index (B,)."""
        where = torch.bucketize(index, self.starts, right=True) - 1
        order = torch.cat([(where == s).nonzero()[:, 0] for s in where.unique()])
        return [torch.cat([self.shards[s][k][index[where == s] - self.starts[s]] for s in where.unique()])[order.argsort()] for k in keys]

    def names(self):
        return [n for s in self.shards for n in s["names"]]


def load_captions(path, names):
    """One list of captions for each image name, from a COCO-style file."""
    if not path or not Path(path).exists():
        fail(f"--objective noisyclip trains on captions: {path} does not exist; pass a COCO-style file with --captions")
    coco = json.loads(Path(path).read_text())
    name_of, captions = {i["id"]: i["file_name"] for i in coco["images"]}, {}
    for a in coco["annotations"]:
        captions.setdefault(name_of[a["image_id"]], []).append(a["caption"])
    if missing := [n for n in names if n not in captions]:
        fail(f"{path} has no caption for {len(missing)} of the {len(names)} training images, {missing[0]} for one")
    return [captions[n] for n in names]


@torch.no_grad()
def validate(model, z0, target, eps, batch=100):
    """Error of the embedding on held-out images at each sigma: mean squared distance to e_RM, and that of the constant mean, for scale."""
    rows = {}
    for sigma, noise in zip(SIGMAS, eps):
        e = torch.cat([model.embed(add_noise(z, n, s), s) for z, n in zip(z0.split(batch), noise.split(batch)) for s in [torch.full((len(z),), sigma, device=z.device)]])
        rows[f"val_{sigma}"] = float((e - target).square().sum(-1).mean())
    return rows


def main(args):
    if args.dry_run:
        return dry_run(args)
    kind = "noisyclip" if args.objective == "noisyclip" else "vae" if args.front == "vae" else None
    suffix = f"_{kind}" if kind else ""
    path = Path(args.value or Path(args.out) / f"value{suffix}.pt")
    if args.objective == "noisyclip":
        args.front, args.embedding = "vae", "unit"
    expect = {"reward": args.reward, "backbone": args.backbone} | ({"resolution": args.resolution} if args.resolution else {})
    cache = load_artifact(Path(args.out) / "cache.pt", expect, "01_cache_features.py")
    stitch = load_artifact(Path(args.out) / "stitch.pt", expect | {"latent_space": cache["spec"]["latent_space"], "resolution": cache["spec"]["resolution"]}, "02_fit_stitch.py")
    fit, probe = stitch["data"][args.front], cache["data"]["probe"]
    device = torch.device(args.device)
    reward = Reward(args.reward, args.preset, device)
    if args.objective == "noisyclip" and not reward.uses_text:
        fail(f"{args.reward} has no text tower to train NoisyCLIP against; leave --objective noisyclip out")
    if args.objective == "noisyclip" and args.micro_batch:
        fail("--objective noisyclip contrasts the whole batch: pass --micro-batch 0")
    transformer = None
    if args.front == "dit":
        transformer = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype)).transformer
        keep_blocks(transformer, fit["i"])  # V needs no more of it
    norm = probe["embedding_norm"]
    model = StitchedValue(transformer, [v.to(device) for v in cache["data"]["null"]], reward, Stitch(fit["W"], fit["bias"], cache["spec"]["reward_grid"], cache["spec"]["antialias"]),
                          fit["i"], fit["j"], fit["cls"], args.front, args.embedding, norm).to(device)
    data = Cached(args.out, cache["data"]["shards"])
    if args.dtype == "bfloat16":  # the tail computes in half precision; its weights and the target stay float32
        model.head = torch.autocast(device.type, torch.bfloat16)(model.head)
    text_of = scale = None
    if args.objective == "noisyclip":
        captions = load_captions(args.captions, data.names())
        texts = sorted({c for cs in captions for c in cs})
        row = {c: k for k, c in enumerate(texts)}
        text_of, caption_rows = reward.encode_text(texts), [[row[c] for c in cs] for cs in captions]
        scale = reward.model.logit_scale.exp().item()

    def targets(index):
        """Of the images at index: the same in every epoch, so kept where all of them are small."""
        if kept is not None:
            return [v[index].to(device) for v in kept]
        return clean_target(reward, data.rows(index, "pixels")[0].to(device).float() / 255)

    kept = None
    if args.objective != "noisyclip" and len(data) * sum(v.nbytes for v in targets(torch.zeros(1, dtype=torch.long))) < KEPT_TARGETS:
        kept = [torch.cat(v) for v in zip(*([v.cpu() for v in targets(rows)] for rows in torch.arange(len(data)).split(args.batch)))]

    rank, world = processes()
    if args.objective == "noisyclip" and world > 1:
        fail("--objective noisyclip contrasts the whole batch, which several processes do not hold: run it as one")
    steps = args.steps or math.ceil(args.epochs * len(data) / (args.batch * world))
    slow = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("stitch")]
    optimizer = torch.optim.AdamW([dict(params=slow, lr=args.lr), dict(params=list(model.stitch.parameters()), lr=args.lr * args.stitch_lr)],
                                  weight_decay=0.0, fused=device.type in ("cuda", "cpu"))
    peak = [g["lr"] for g in optimizer.param_groups]
    draw, start, rows, seconds = generator(args.seed, "train"), 0, [], 0.0
    average = {k: v.clone() for k, v in model.trained_state().items()} if args.ema else None
    running = path.with_suffix(".train")
    must_agree = {"stitch": stitch["id"], "steps": steps, "processes": world} | {k: getattr(args, k) for k in (
        "seed", "front", "objective", "embedding", "sigma_law", "lam_tok", "batch", "micro_batch", "lr", "stitch_lr", "warmup", "schedule", "ema", "log_every")}
    if args.resume:
        saved = load_artifact(running, must_agree, "03_finetune.py")["data"]
        model.load_state_dict(saved["state"], strict=False), optimizer.load_state_dict(saved["optimizer"]), draw.set_state(saved["draw"].clone())
        start, rows, seconds = saved["step"], saved["rows"], saved["seconds"]
        average = {k: v.clone() for k, v in saved["average"].items()} if args.ema else None

    with torch.no_grad():
        z0 = probe["z0"].float().to(device)
        held_out = torch.cat([clean_target(reward, p.to(device).float() / 255)[0] for p in probe["pixels"].split(args.micro_batch or 100)])
        noise = [torch.randn(z0.shape, generator=generator(args.seed, "validate", s)).to(device) for s in SIGMAS]
    frozen = sum(p.numel() for p in transformer.parameters()) if transformer is not None else 0
    if rank == 0:
        print(f"{args.front} front, i = {fit['i']}, j = {fit['j']}; {sum(p.numel() for p in slow) + sum(p.numel() for p in model.stitch.parameters()):,} trained parameters "
              f"({frozen:,} frozen in the backbone); {len(data)} images x {steps * args.batch * world / len(data):.1f} epochs = {steps} steps of {args.batch}{f' x {world} processes' if world > 1 else ''}")

    def checkpoint(step):
        if rank > 0:
            return
        save_training(running, "03_finetune", must_agree, dict(
            state=model.trained_state(), optimizer=optimizer.state_dict(), draw=draw.get_state(), step=step, rows=rows, seconds=seconds, average=average))

    began, logged, bad, sums, bar = time.time(), start, torch.zeros((), dtype=torch.bool, device=device), {}, tqdm(range(start, steps), initial=start, total=steps, desc="finetune", disable=rank > 0)
    for step in bar:
        # every process draws the whole batch and takes its share: the same data as one process with a batch as large as all of theirs
        index = torch.randint(len(data), (args.batch * world,), generator=draw)
        t, eps = sample_sigma(len(index), args.sigma_law, draw), torch.randn(len(index), *z0.shape[1:], generator=draw)
        chosen = torch.randint(1 << 30, (len(index),), generator=draw) if args.objective == "noisyclip" else index
        index, t, eps, chosen = (v[rank * args.batch:(rank + 1) * args.batch] for v in (index, t, eps, chosen))
        latents, = data.rows(index, "z0")
        zt, t = add_noise(latents.float(), eps, t).to(device), t.to(device)
        text = text_of[[caption_rows[k][c % len(caption_rows[k])] for k, c in zip(index.tolist(), chosen.tolist())]] if args.objective == "noisyclip" else None
        for group, lr in zip(optimizer.param_groups, peak):
            group["lr"] = lr * learning_rate(step, steps, args.warmup, args.schedule)
        optimizer.zero_grad()
        total, micro = {}, args.micro_batch or args.batch
        for k in range(0, args.batch, micro):
            part, share = slice(k, k + micro), min(micro, args.batch - k) / args.batch
            target = None if args.objective == "noisyclip" else targets(index[part])
            loss, parts = step_loss(model, reward, zt[part], t[part], target, args.objective, args.lam_tok, text, scale)
            (share * loss).backward()
            total = {k: total.get(k, 0) + share * v.detach() for k, v in {"loss": loss, **parts}.items()}
        average_over_processes([p.grad for g in optimizer.param_groups for p in g["params"]])
        optimizer.step()
        if args.ema:
            state = model.trained_state()
            follow(list(average.values()), [state[k] for k in average], decay_at(step, args.ema))
        bad |= ~total["loss"].isfinite()  # no host-device sync inside the loop: looked at when a line is logged
        sums = {k: sums.get(k, 0) + v for k, v in total.items()}
        save = (step + 1) % args.save_every == 0 or step + 1 == steps
        if (step + 1) % args.log_every == 0 or save:  # a checkpoint is written only after the loss was found finite
            if bad:
                fail(f"the loss became NaN or infinite before step {step + 1}; the last good state is {running if running.exists() else 'the stitch'}; start again with a lower --lr")
            seconds, began = seconds + time.time() - began, time.time()
            average_over_processes(list(sums.values()))
            count, logged = step + 1 - logged, step + 1
            rows.append(dict(step=step + 1, seconds=round(seconds, 2), **{k: float(v) / count for k, v in sums.items()}))
            sums = {}
            bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}")
        if save:
            if args.objective == "distill":
                rows[-1].update(validate(model, z0, held_out, noise, args.micro_batch or 100))
                tqdm.write(f"step {step + 1}/{steps}  loss {rows[-1]['loss']:.4f}  " + "  ".join(f"{k} {rows[-1][k]:.4f}" for k in rows[-1] if k.startswith("val_")))
            checkpoint(step + 1)

    if rank > 0:
        return
    if args.ema:
        model.load_state_dict(average, strict=False)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.trained_state().items()}
    spec = cache["spec"] | {"i": fit["i"], "j": fit["j"], "front": args.front, "objective": args.objective, "embedding": args.embedding}
    save_artifact(path, "03_finetune", args, spec, dict(state=state, norm=norm, null=cache["data"]["null"]), [cache, stitch])
    save_table(args, "03_finetune" + suffix, rows)
    running.unlink(missing_ok=True)
    curve(rows, Path(args.out) / f"03_finetune{suffix}.png")
    print_table(rows[-1:], rows[-1].keys())


def dry_run(args):
    reward = Reward(args.reward, args.preset, "meta", weights=False)
    backbone, null = meta_backbone(args.backbone)
    noisy, cases = args.objective == "noisyclip", []
    for i in (0,) if noisy or args.front == "vae" else (12, 4):  # a late stitch, and the paper's for CLIP on SD 3.5 Medium: the search decides
        keep_blocks(backbone.transformer, i)
        model, latent = meta_value(backbone, null, reward, i, args.resolution)
        B = min(args.micro_batch or args.batch, args.batch)
        z, pixels = torch.empty(B, *latent, device="meta"), torch.empty(B, 3, reward.size, reward.size, device="meta")
        text = torch.empty(B, reward.visual.output_dim, device="meta")
        step = lambda: step_loss(model, reward, z, z[:, 0, 0, 0], None if noisy else clean_target(reward, pixels), args.objective, args.lam_tok, text, 100.0)[0].backward()
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        front = [backbone.transformer] if i else []
        weights = gib(*front, reward.visual, model) + 12 * learns / 2 ** 30  # float32 gradient and AdamW's two moments
        model.bfloat16().stitch.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))  # stands for autocast, which the meta device lacks
        tflop, saved = count(step, [model, reward.visual, *front])
        steps = args.steps or math.ceil(args.epochs * 100_000 / args.batch)
        method = "noisyclip" if noisy else f"stitchvm, i = {i}" if i else "vae-stitch"
        cases.append(dict(method=method, unit=f"step of {args.batch}", tflop=tflop * args.batch / B, saved_gib=saved, peak_gib=weights + saved, n=steps))
    report_dry_run(args, "03_finetune", cases, [*front, reward.visual], [model])


def curve(rows, path):
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for k in rows[0]:
        if k not in ("step", "seconds") and not k.startswith("val_"):
            left.plot([r["step"] for r in rows], [r[k] for r in rows], label=k)
    for k in rows[-1]:
        if k.startswith("val_"):
            right.plot([r["step"] for r in rows if k in r], [r[k] for r in rows if k in r], "o-", ms=3, label=f"sigma {k[4:]}")
    left.set(xlabel="step", title="training loss", yscale="log")
    right.set(xlabel="step", title="held-out images: |e - e_RM|^2")
    for axis in (left, right):
        axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main(parse_args())
