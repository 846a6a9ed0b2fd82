"""Stage 08 -- DiffusionNFT: online finetuning, by rewards of samples or values of stopped ones.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.3, App. D.3, E.5, Eqs. (65)-(77), Fig. 7, Table 3
            sample   a group of images for each prompt, from the old policy; their rewards r
            value    rho = 1/2 + clip((r - mean of the group) / std of all, -5, 5) / 10      (65)
            train    rho |v+ - u|^2 + (1 - rho) |v- - u|^2,  v+- = v_old +- beta (v - v_old)  (70)
            move     old <- eta old + (1 - eta) trained                                      (71)
        nft           whole rollouts, r of the decoded z_0, u = eps - z_0 at the solver's levels
        nft+stitchvm  a group stops at one tau, after --stop steps; V(z_tau) takes the place of r,
                      z_tau that of z_0: z_t = a z_tau + s eps, u = a' z_tau + s' eps    (72)-(77)
Reads   value.pt (03) of each reward; prompts to train on, held-out prompts to report on
Writes  out/08_nft.json, 08_curves.png, 08_grid.png; in out/<method>/ the averaged LoRA, for
        diffusers and (adapter_*) for peft, and 08_nft.train, where --resume goes on
Run     python 08_nft.py
        python 08_nft.py --methods nft+stitchvm --stop 2 12 --out runs/early --value FILE
        accelerate launch 08_nft.py --preset paper --train-prompts FILE --eval-prompts FILE
Departs from the paper: --loss official measures errors in z_0 or z_tau, over their mean size, and
        adds a penalty [D9]; t is a node of the grid above tau [D8]; a step index counts finished
        steps [D1]; the miniature is held to the base model harder (docs/decisions.md).
"""

import copy
import json
import math
import warnings
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from common import (
    COUNT,
    POSITIVE,
    SHARE,
    Backbone,
    Reward,
    clean_reward,
    digest,
    draw_lines,
    fail,
    fingerprints,
    generator,
    gflop,
    image_grid,
    joint_value,
    keep_or_drop,
    load_artifact,
    load_prompts,
    load_values,
    mean_and_error,
    normal,
    now,
    parse_stage,
    print_table,
    replacing,
    save_table,
    save_training,
    score_images,
    stage_parser,
    track,
    tweedie,
    value_files,
    within,
    write_images,
)

METHODS = ("nft", "nft+stitchvm")
POLICIES = ("default", "old", "average")  # adapters: trained, sampled from, evaluated and written
POSITION = ("method", "update", "seconds", "gflop")
CURVE = ("loss", "penalty", "gradient", "rollouts", "spread", "spread_in_group")
# flags that --resume may change
FREE = ("out", "device", "methods", "value", "updates", "gflop", "scorers", "save_images")
FREE += ("track", "batch", "checkpointing", "compile", "resume", "restart")
MINI = dict(resolution=64, shift=1.0, prompts=8, images=8, train_times=8, batch=64, lr=1e-3)
MINI |= dict(kl=0.3, kl_stitchvm=0.1, gflop=3500, eval_limit=200, eval_every=6, eval_steps=25)
MINI |= dict(scorers=["clip", "dfn-clip", "hpsv2", "aesthetic", "judge"])
MINI |= dict(train_prompts="tests/mini/data/train_captions.json", train_limit=1000)
MINI |= dict(eval_prompts="tests/mini/data/drawbench.txt")
SMALL = dict(resolution=512, prompts=8, images=12, batch=4, checkpointing=True, updates=200)
SMALL |= dict(eval_limit=100, eval_every=20)
PAPER = dict(resolution=512, reward="dfn-clip+hpsv2", updates=300)
PRESETS = {"mini": MINI, "24gb": SMALL, "paper": PAPER}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="one after another")
    add("--value", nargs="+", metavar="FILE", help="value models, one for each reward of the sum")
    add("--train-prompts", help="text, JSON list, COCO's captions or GenEval's JSON lines")
    add("--train-limit", type=COUNT, help="of them, at most; SD 3.5: 2.7 MB each on the disk")
    add("--eval-prompts", help="held-out prompts; those among --train-prompts are not trained on")
    add("--eval-limit", type=COUNT, default=200, help="use this many of them at most")
    add("--eval-every", type=COUNT, default=30, help="updates between evaluations")
    add("--eval-steps", type=COUNT, default=40, help="Euler steps of an evaluation")
    add("--scorers", nargs="*", default=["clip", "hpsv2"], help="rewards that judge, too")
    add("--save-images", action="store_true", help="write the held-out images at every evaluation")
    add("--prompts", type=COUNT, default=48, help="of an update, over all processes")
    add("--images", type=within(int, 2), default=24, help="of a prompt, its group")
    add("--track", metavar="DIR", help="TensorBoard files of every evaluation, with images")
    add("--updates", type=COUNT, help="optimiser steps, at most; the paper's hours allow about 300")
    add("--gflop", type=POSITIVE, help="GFLOP of all processes together at which a method ends")
    add("--steps", type=COUNT, default=25, help="of the solver (D.3: 25)")
    add("--shift", type=POSITIVE, help="of the noise levels; None: the scheduler's own")
    add("--stop", type=COUNT, nargs=2, default=[12, 17], help="steps after which +stitchvm stops")
    add("--train-times", type=COUNT, default=24, help="noise levels that an image is trained at")
    add("--loss", choices=("official", "paper"), default="official", help="[D9]; see --kl")
    add("--beta", type=POSITIVE, default=0.1, help="of (68), (69) (official: .1; 1 for one reward)")
    add("--kl", type=within(float, 0), default=1e-4, help="weight of |v - v_base|^2, if official")
    add("--kl-stitchvm", type=within(float, 0), default=1e-4, help="the same for nft+stitchvm")
    add("--adv-clip", type=POSITIVE, default=5.0, help="standard deviations at which rho is 0 or 1")
    add("--decay", type=within(int, 0, 2), default=1, help="eta: 0; to .5; 0, then to .999")
    add("--eta", type=SHARE, help="a constant eta, instead of --decay")
    add("--rank", type=COUNT, default=32, help="of the LoRA")
    add("--alpha", type=POSITIVE, default=64, help="of the LoRA")
    add("--lr", type=POSITIVE, default=3e-4, help="of AdamW")
    add("--weight-decay", type=within(float, 0), default=1e-4, help="of AdamW")
    add("--clip", type=POSITIVE, default=1.0, help="largest norm of the gradient")
    add("--ema", type=SHARE, default=0.9, help="decay of the average that is evaluated and written")
    add("--batch", type=COUNT, default=8, help="latents at a time; any gives the same update")
    add("--checkpointing", action="store_true", help="less memory, a third more work in training")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    add("--resume", action="store_true", help="go on from <out>/<method>/08_nft.train")
    add("--restart", action="store_true", help="drop what an earlier run left there")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
# from common: tweedie
def bridge(t, tau):
    """a, s, a', s' of z_t = a z_tau + s eps for t > tau, which has z_t's marginals (74)-(76)."""
    # trap: t^2 - a^2 tau^2 as it stands cancels near tau
    s = ((t - tau) * (t + tau - 2 * t * tau)).sqrt() / (1 - tau)
    return (1 - t) / (1 - tau), s, -1 / (1 - tau), (t + (1 - t) * (tau / (1 - tau)) ** 2) / s


def bridge_point(z_tau, eps, t, tau):
    """z_t and its target velocity u (B, ...) of z_tau, eps (B, ...), t and tau (B,)."""
    a, s, da, ds = (c.view(-1, *[1] * (z_tau.ndim - 1)) for c in bridge(t, tau))
    return a * z_tau + s * eps, da * z_tau + ds * eps


def anchor_scale(t, tau):
    """(B,): zhat_tau - z_tau = -scale (v - u), zhat_tau = (1-tau)/t (s s' z_t - s^2 v)."""
    return (1 - tau) * bridge(t, tau)[1] ** 2 / t


def optimality(r, clip=5.0):
    """rho in [0, 1] of rewards r (P prompts, G images) (65)."""
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def nft_loss(v, v_old, u, rho, beta=1.0, scale=None, clip=5.0):
    """(68)-(70) of each sample (B,); v, v_old, u (B, ...), rho (B,) of optimality(r, clip).

    scale (B,): the official form, errors of the anchor over their mean size, times clip / beta.
    """
    # v = v_old and rho = 1/2 give a gradient of exactly 0, no rounding error for Adam to blow up
    move = beta * (v - v_old)
    parts = []
    for e in (v_old - u + move, v_old - u - move):
        e = e.flatten(1) if scale is None else scale[:, None] * e.flatten(1)
        weight = clip / beta / e.detach().abs().mean(1).clamp(min=1e-5)
        parts.append((1.0 if scale is None else weight) * e.square().mean(1))
    return rho * parts[0] + (1 - rho) * parts[1]


def train_loss(velocity, z_tau, tau, eps, t, rho, form="official", beta=1.0, kl=0.0, clip=5.0):
    """The loss and the penalty (B,) of anchors z_tau (B, ...); tau, t, rho (B,).

    velocity(policy, z, t): policy 'default', which is trained, 'old', or None, the base model.
    """
    z, u = bridge_point(z_tau, eps, t, tau)
    with torch.no_grad():
        v_old = velocity("old", z, t)
        v_base = velocity(None, z, t) if kl else None
    v = velocity("default", z, t)  # last: the adapter of the backward pass must be the active one
    scale = anchor_scale(t, tau) if form == "official" else None
    penalty = (v - v_base).square().flatten(1).mean(1) if kl else torch.zeros_like(t)
    return nft_loss(v, v_old, u, rho, beta, scale, clip), kl * penalty


def old_decay(update, schedule=1):
    """The official eta of (71) after the update of this number, from 1."""
    late = min(max(0.0075 * (update - 75), 0.0), 0.999)
    return (0.0, min(0.001 * update, 0.5), late)[schedule]


def multistep(z, x0, x0_last, grid, k):
    """z (B, ...) from grid[k] to grid[k+1], from x0 here and a step before: "dpm2"."""
    t, s = grid[k : k + 2]
    if k > 0 and s > 0:  # else of first order
        levels = grid[k - 1 : k + 2]
        before, here, after = (math.log((1 - x) / x) if x < 1 else -math.inf for x in levels)
        x0 = x0 + 0.5 * (after - here) / (here - before) * (x0 - x0_last)
    return s / t * z + (1 - s / t) * x0


def rollout(velocity, z, grid, stop):
    """z (B, ...) at grid[0] -> z at grid[stop] along the ODE; stop (B,) ascends, on the CPU.

    velocity(z, sigma, rows) is asked for the rows that go on, a slice.
    """
    z = z.clone()
    x0_last = torch.zeros_like(z)
    for k in range(int(stop[-1])):
        rows = slice(int((stop <= k).sum()), None)
        sigma = z.new_full((len(z[rows]),), grid[k])
        x0 = tweedie(z[rows], velocity(z[rows], sigma, rows), sigma)
        z[rows] = multistep(z[rows], x0, x0_last[rows], grid, k)
        x0_last[rows] = x0
    return z


# ---- to here ----


def policy_velocity(backbone, condition, checkpointing=False):
    """velocity(policy, z, t, rows) of train_loss and rollout, without guidance."""

    def velocity(policy, z, t, rows=slice(None)):
        # trap: not between forward and backward, which would drop gradients in silence
        backbone.transformer.set_adapter(policy or [])
        part = [v[rows] for v in condition]
        return backbone.velocity(z, t, part, checkpointing=checkpointing)

    return velocity


def own_prefixes(values):
    """Let values read a copy that gets no LoRA, of the same weights. Call it before add_lora."""
    memo = {}
    for v in values:
        memo |= {id(x): x for x in (*v.transformer.parameters(), *v.transformer.buffers())}
        v.__dict__["transformer"] = copy.deepcopy(v.transformer, memo)  # one copy for all


def add_lora(transformer, rank, alpha, name):
    """The float32 parameters of a new LoRA, 0 at first, on all joint attention's projections."""
    from peft import LoraConfig

    warnings.filterwarnings("ignore", "Already found a .peft_config")  # the one before is meant
    targets = r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    start = dict(init_lora_weights="gaussian", target_modules=targets)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, **start), name)
    added = [p for n, p in transformer.named_parameters() if f".{name}." in n]
    for p in added:
        p.data = p.data.float()  # trap: AdamW's steps vanish in bfloat16
    return added


def save_lora(backbone, folder, name):
    """What pipe.load_lora_weights(folder) reads, and PeftModel.from_pretrained(model, folder)."""
    import diffusers
    from peft.utils import get_peft_model_state_dict

    pipeline = getattr(diffusers, backbone.index["_class_name"])
    layers = get_peft_model_state_dict(backbone.transformer, adapter_name=name)
    about = backbone.transformer.peft_config[name].to_dict()  # trap: else alpha is read as the rank
    data = dict(transformer_lora_layers=layers, transformer_lora_adapter_metadata=about)
    with replacing(Path(folder, "pytorch_lora_weights.safetensors")) as temporary:
        pipeline.save_lora_weights(folder, weight_name=temporary.name, **data)
    with replacing(Path(folder, "adapter_model.safetensors")) as temporary:
        save_file({f"base_model.model.{k}": v for k, v in layers.items()}, temporary)
    with replacing(Path(folder, "adapter_config.json")) as temporary:
        temporary.write_text(json.dumps(about))


@torch.no_grad()
def evaluate(backbone, condition, noise, grid, batch):
    """uint8 images (N, 3, H, W) of noise (N, C, h, w), by the ODE without guidance."""
    ends = []
    for rows in torch.arange(len(noise)).split(batch):
        z, *part = (v[rows].to(backbone.device) for v in (noise, *condition))
        for t, t_next in pairwise(grid):
            sigma = torch.full((len(z),), t, device=z.device)
            z = z + (t_next - t) * backbone.velocity(z, sigma, part)
        ends.append(z)
    if not torch.cat(ends).isfinite().all():
        fail("samples became NaN or infinite: try a lower --lr with --restart")
    return torch.cat([(backbone.decode(z) * 255).round().to(torch.uint8) for z in ends])


def split_prompts(args):
    """Prompts to train on, in random order, none of them held out; the held-out ones' rows."""
    if not args.train_prompts or not args.eval_prompts:
        fail("--train-prompts FILE and --eval-prompts FILE are needed")
    held_out = load_prompts(args.eval_prompts, args.eval_limit)
    apart = {normal(r["prompt"]) for r in held_out}
    pool = sorted({r["prompt"] for r in load_prompts(args.train_prompts)})
    pool = [prompt for prompt in pool if normal(prompt) not in apart]
    order = torch.randperm(len(pool), generator=generator(args.seed, "pool"))[: args.train_limit]
    return [pool[k] for k in order], held_out


def check(args):
    """Refuse what cannot be run, in one sentence."""
    args.train_times = min(args.train_times, max(1, int(0.99 * args.steps)))  # as official
    if args.loss == "paper":
        args.kl = args.kl_stitchvm = 0.0
    low, high = args.stop
    if "nft+stitchvm" in args.methods and not 1 <= low <= high <= args.steps:
        fail(f"--stop {low} {high} must lie in order between 1 and --steps {args.steps}")
    if args.updates is None and args.gflop is None:
        fail("--updates or --gflop must say when a method ends")


def load(args, accelerator):
    """What both methods use."""
    pool, held_out = split_prompts(args)
    processes = accelerator.num_processes
    if not processes <= args.prompts <= len(pool) or len(held_out) < max(2, processes):
        found = f"{len(pool)} prompts to train on and {len(held_out)} held out"
        fail(f"{found}: --prompts {args.prompts} and 2 are needed, and one for each process")
    names = args.reward.split("+")
    files = value_files(args, names) if "nft+stitchvm" in args.methods else []
    dtype = getattr(torch, args.dtype)
    backbone = Backbone(args.backbone, args.preset, args.device, dtype, args.compile)
    backbone.set_shift(args.shift)
    given = dict(accelerator=accelerator, backbone=backbone, device=backbone.device, pool=len(pool))
    run = SimpleNamespace(**given, held_out=held_out, prompts=[r["prompt"] for r in held_out])
    with accelerator.main_process_first():  # the others read its file
        run.condition = backbone.prompts(pool + run.prompts, args.out)
    run.rewards = [Reward(name, args.preset, args.device, dtype) for name in names]
    run.texts = [t if t is None else t.cpu() for t in (r.text(pool) for r in run.rewards)]
    run.values, artifacts = load_values(files, backbone, run.rewards[: len(files)], args.resolution)
    own_prefixes(run.values)
    run.spec = fingerprints(backbone.transformer, run.rewards, 1)
    torch.manual_seed(args.seed)
    run.lora = {n: add_lora(backbone.transformer, args.rank, args.alpha, n) for n in POLICIES}
    run.start = [p.detach().clone() for p in run.lora["default"]]
    run.shape = backbone.latent_shape(args.resolution)
    run.grid = backbone.grid(args.steps, args.resolution)
    run.costs = unit_costs(run, args)
    run.spec |= {k: v for k, v in vars(args).items() if k not in FREE}
    run.spec |= dict(train_prompts=digest(pool), eval_prompts=digest(run.prompts))
    run.about = [dict(stage=a["stage"], id=a["id"]) for a in artifacts]
    run.base = cache(partial(measure, run, args))  # one for all methods
    return run


def chosen(run, index):
    """Condition and each reward's texts of these training prompts."""
    condition = [v[index].to(run.device) for v in run.condition]
    return condition, [t if t is None else t[index].to(run.device) for t in run.texts]


def noises(run, *keys):
    """Standard normal latents, a function of their keys (seed, "what", position …)."""
    return torch.stack([torch.randn(run.shape, generator=generator(*key)) for key in keys])


def unit_costs(run, args):
    """GFLOP of one row: a velocity, a reward of a latent, a value, a training step."""
    z, t = (torch.full(shape, 0.5, device=run.device) for shape in ((1, *run.shape), (1,)))
    condition, texts = chosen(run, [0])
    velocity = policy_velocity(run.backbone, condition, args.checkpointing)
    step = partial(train_loss, velocity, z, 0 * t, z, t, t, kl=max(args.kl, args.kl_stitchvm))
    costs = dict(train=gflop(lambda: sum(step()).sum().backward()))
    with torch.no_grad():
        costs["velocity"] = gflop(lambda: velocity("old", z, t))
        costs["reward"] = gflop(lambda: clean_reward(run.rewards, texts, run.backbone.decode(z)))
        if run.values:
            costs["value"] = gflop(partial(joint_value, run.values, z, t, texts))
    return costs


@torch.no_grad()
def sample_groups(run, args, method, update):
    """Stops (P,) and rewards r (P, G) of an update's groups, from the old policy; and of the images
    of this process ids, prompt, stop, tau (n,), z_tau (n, C, h, w)."""
    prompts = torch.randperm(run.pool, generator=generator(args.seed, "prompts", update))
    low, high = (args.steps, args.steps) if method == "nft" else args.stop
    draw = generator(args.seed, "stop", update)
    stops = torch.randint(low, high + 1, (args.prompts,), generator=draw)
    r = torch.zeros(args.prompts, args.images, device=run.device)
    # every process makes the draws of all prompts and works on its own
    ids = torch.arange(r.numel()).view(r.shape)
    ids = ids[run.accelerator.process_index :: run.accelerator.num_processes].flatten()
    prompt, stop = (v[ids // args.images] for v in (prompts, stops))
    tau = torch.tensor(run.grid)[stop]
    keys = [(args.seed, "rollout", update, *divmod(i, args.images)) for i in ids.tolist()]
    order = stop.argsort(stable=True)
    found = []
    for part in order.split(args.batch):
        condition, texts = chosen(run, prompt[part])
        velocity = partial(policy_velocity(run.backbone, condition), "old")
        z = noises(run, *(keys[n] for n in part)).to(run.device)
        z = rollout(velocity, z, run.grid, stop[part])
        if method == "nft":
            score = clean_reward(run.rewards, texts, run.backbone.decode(z))
        else:
            score = joint_value(run.values, z, tau[part].to(run.device), texts)[0]
        found.append((z, score.float()))
    z_tau, score = (torch.cat(x) for x in zip(*found, strict=True))
    z_tau = z_tau.cpu()[order.argsort()]
    r.view(-1)[ids[order]] = score
    return stops, run.accelerator.reduce(r, "sum"), (ids, prompt, stop, tau, z_tau)


def train_on(run, args, update, images, rho, kl):
    """The gradient over all images, in p.grad; their mean loss and penalty (2,)."""
    ids, prompt, stop, tau, z_tau = images
    times = stop.clamp(max=args.train_times)
    weight = (1 / rho.numel() / times.double()).float()  # every image counts as much
    keys = [divmod(i, args.images) for i in ids.tolist()]
    levels = []
    for n, key in enumerate(keys):
        draw = generator(args.seed, "times", update, *key)
        levels += [(n, k) for k in torch.randperm(stop[n], generator=draw)[: times[n]].tolist()]
    sums = torch.zeros(2, device=run.device)
    for part in torch.tensor(levels).split(args.batch):
        n, k = part.T
        eps = noises(run, *((args.seed, "train", update, *keys[a], b) for a, b in part.tolist()))
        batch = (z_tau[n], tau[n], eps, torch.tensor(run.grid)[k], rho.cpu().view(-1)[ids[n]])
        batch = [v.to(run.device) for v in batch]
        velocity = policy_velocity(run.backbone, chosen(run, prompt[n])[0], args.checkpointing)
        losses = torch.stack(train_loss(velocity, *batch, args.loss, args.beta, kl, args.adv_clip))
        losses = losses * weight[n].to(run.device)
        losses.sum().backward()
        sums += losses.detach().sum(1)
    for p in run.lora["default"]:
        p.grad = run.accelerator.reduce(p.grad, "sum")
    return run.accelerator.reduce(sums, "sum")


def measure(run, args):
    """{scorer: (N,)} and uint8 images (N, 3, H, W) of the averaged LoRA on the held-out prompts."""
    run.backbone.transformer.set_adapter("average")
    noise = noises(run, *((args.seed, "evaluate", k) for k in range(len(run.prompts))))
    share = slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    condition = [v[run.pool :][share] for v in run.condition]
    grid = run.backbone.grid(args.eval_steps, args.resolution)
    part = evaluate(run.backbone, condition, noise[share], grid, args.batch)
    images = part.new_zeros(len(run.prompts), *part.shape[1:])
    images[share] = part
    images = run.accelerator.reduce(images, "sum").cpu()
    given = args.preset, run.device, images, run.prompts
    return score_images(args.scorers, run.rewards, *given), images


def report(run, args, state):
    """Add a point to the state: a row, rewards (N,) and images to show (n, 3, H, W)."""
    scores, images = measure(run, args) if state["update"] else run.base()
    first = torch.tensor(state["points"][0][1]) if state["points"] else scores["reward"]
    scores = scores | dict(gain=scores["reward"] - first)  # same noises: paired
    row = {k: state[k] for k in POSITION} | mean_and_error(scores) | dict(n=len(images))
    values = "  ".join(f"{name} {row[name]:.4f}" for name in scores)
    run.accelerator.print(f"{row['method']} update {row['update']}: {values}")
    if args.save_images:
        row["images"] = f"08_images/{row['method']}/{row['update']}"
    if run.accelerator.is_main_process:
        more = dict(*state["curve"][-1:])  # the loss of the last update
        track(args.track, row["method"], row["update"], more | row, images[:8])
        if args.save_images:
            write_images(Path(args.out, row["images"]), run.held_out, images[:, None])
    state["points"].append((row, scores["reward"].tolist(), images[:8]))


def train(method, run, args):
    """The reports and the curve of a method, trained to its end from its checkpoint, if any."""
    path = Path(args.out, method, "08_nft.train")
    is_main = run.accelerator.is_main_process
    by_value = method == "nft+stitchvm"
    kl = args.kl_stitchvm if by_value else args.kl
    spec = run.spec | dict(values=run.about if by_value else [])
    state = dict(method=method, update=0, seconds=0.0, gflop=0.0, points=[], curve=[])
    state |= dict(optimizer=None, lora={name: run.start for name in POLICIES})
    if args.resume and path.exists():
        state = load_artifact(path, spec, "08_nft.py")["data"]
    for name in POLICIES:
        torch._foreach_copy_([p.data for p in run.lora[name]], state["lora"][name])
    state["lora"] = {name: [p.detach() for p in run.lora[name]] for name in POLICIES}  # views
    optimizer = torch.optim.AdamW(run.lora["default"], lr=args.lr, weight_decay=args.weight_decay)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    else:
        report(run, args, state)
    bar = tqdm(desc=method, initial=state["update"], total=args.updates, disable=not is_main)
    while not ended(state, args):
        began = now(run.device)
        optimizer.zero_grad()
        stops, r, images = sample_groups(run, args, method, state["update"])
        sums = train_on(run, args, state["update"], images, optimality(r, args.adv_clip), kl)
        norm = torch.nn.utils.clip_grad_norm_(run.lora["default"], args.clip)
        state["seconds"] += now(run.device) - began
        optimizer.step()
        numbers = [*sums, norm, r.mean(), r.std(correction=0), r.var(1, correction=0).mean().sqrt()]
        largest = torch.nn.utils.get_total_norm(run.lora["default"], math.inf)
        *numbers, largest = torch.stack([*numbers, largest]).tolist()
        state["update"] += 1
        if not (math.isfinite(sum(numbers)) and largest < 100):  # a LoRA's are of order 1
            good = path if path.exists() else "the base model"
            why = f"update {state['update']} of {method} gave NaN, inf or weights above 100"
            fail(f"{why}; the last good state is {good}: try a lower --lr with --restart")
        eta = old_decay(state["update"], args.decay) if args.eta is None else args.eta
        get_ema_multi_avg_fn(eta)(run.lora["old"], run.lora["default"], None)  # (71)
        decay = min(args.ema, (1 + state["update"]) / (10 + state["update"]))
        get_ema_multi_avg_fn(decay)(run.lora["average"], run.lora["default"], None)
        levels = int(stops.clamp(max=args.train_times).sum())
        work = run.costs["velocity"] * int(stops.sum()) + run.costs["train"] * levels
        work += args.prompts * run.costs["value" if by_value else "reward"]
        state["gflop"] += args.images * work
        row = {k: state[k] for k in POSITION} | dict(eta=eta)
        state["curve"].append(row | dict(zip(CURVE, numbers, strict=True)))
        bar.update()
        if state["update"] % args.eval_every == 0 or ended(state, args):
            report(run, args, state)
        if is_main:
            save_training(path, "08_nft", spec, state | dict(optimizer=optimizer.state_dict()))
    if is_main:
        save_lora(run.backbone, path.parent, "average")
    return state


def ended(state, args):
    return any(n and state[k] >= n for k, n in (("update", args.updates), ("gflop", args.gflop)))


def main(args):
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    check(args)
    wait = InitProcessGroupKwargs(timeout=timedelta(days=1))  # one process encodes all prompts
    accelerator = Accelerator(cpu=args.device == "cpu", kwargs_handlers=[wait])
    methods = [m for m in METHODS if m in args.methods]
    files = [Path(args.out, method, "08_nft.train") for method in methods]
    if args.resume and not any(file.exists() for file in files):
        fail(f"{files[0]} does not exist; start without --resume")
    for file in files if not args.restart else ():
        keep_or_drop(file, args)
    run = load(args, accelerator)
    for file in files if args.restart and accelerator.is_main_process else ():
        keep_or_drop(file, args)  # now that the run is known to start
    states = [train(method, run, args) for method in methods]
    if not run.accelerator.is_main_process:
        return
    rows, rewards, shown = zip(*sum((s["points"] for s in states), []), strict=True)
    print_table(rows, rows[0])
    about = dict(curve=sum((s["curve"] for s in states), []), rewards_of_prompts=rewards)
    about |= dict(grid=run.grid, gflop_per_row=run.costs, values=run.about)
    save_table(args, "08_nft", rows, **about)
    scores = [k for k in rows[0] if f"{k}_se" in rows[0]]
    draw_lines(rows, "gflop", scores, "method", Path(args.out, "08_curves.png"))
    labels = [f"{r['method']}, update {r['update']}" for r in rows]
    image_grid(shown, labels, run.prompts[:8], Path(args.out, "08_grid.png"))


if __name__ == "__main__":
    main(parse_args())
