"""Stage 08 -- DiffusionNFT: online finetuning of a generator by the reward of its samples, and the same with rollouts that stop early at a value.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.3, App. D.3, E.5, Eqs. (65)-(77), Fig. 7, Table 3; DiffusionNFT's official code
            rollouts  from the old policy, a group of images for each prompt; rho = 1/2 + clip((r - group mean) / (std of all), -5, 5) / 10      (65)
            loss      rho |v+ - u|^2 + (1 - rho) |v- - u|^2,   v+- = v_old +- beta (v - v_old)                                              (68)-(70)
            then      old <- eta old + (1 - eta) current                                                                                         (71)
            nft             r of the decoded z_0; u = eps - z_0 at noise levels of the solver's grid
            nft+stitchvm    the group stops at one tau, after a uniform 12..17 of 25 steps; V(z_tau) takes the place of r; what is regressed is z_tau,
                            through the bridge z_t = a z_tau + s eps, u = a' z_tau + s' eps, t on the grid's nodes above tau               (72)-(77)
        E[u | z_t] is the marginal velocity for every tau, and V_t = E[V_tau | z_t], so both move v towards v_old - (2/beta) t/(1-t) grad E[rho | z_t].
        --loss official (default) measures the errors in z_0 (or z_tau), divides by their mean size and adds a penalty on leaving the base model.
        At published size 79 % of nft's work is training, so stopping early alone saves a tenth at most; the rest comes from training above tau only.
Reads   value.pt of each reward (03); prompts to train on and held-out prompts to report on
Writes  out/<method>/pytorch_lora_weights.safetensors (diffusers' format, the averaged weights), out/08_nft.json, out/08_grid.png, out/08_curves.png,
        and while it runs out/08_nft.train, from which --resume goes on to the same bits
Run     python 08_nft.py                                                # the miniature, both methods, under four minutes on two idle cores
        python 08_nft.py --methods nft+stitchvm --stop-window 2-12 12-17 12-25 20-25 --out runs/window --value runs/mini/sd3.5-medium_clip/value.pt
                                                                        # the ablation of the stop window (Fig. 7), a curve for each
        python 08_nft.py --gflop 40000                                  # both methods until they have spent as many GFLOP
        accelerate launch 08_nft.py --preset paper --train-prompts train.txt --eval-prompts drawbench.txt
Departs from the paper: the official code where it differs from (65)-(71), --loss paper is the equations, with the official eta unless --eta gives one [D9]; t is a node of the solver's grid, because
        the bridge's target is infinite at tau [D8]; a step index counts finished steps, so 12..17 of 25 are sigma .75 .. .56 at shift 3. The miniature trains on fewer
        noise levels of each image, at a higher rate (at 2e-3 NFT lost reward within nine updates), and without the shift of the noise levels: 3 is for 1024 px, and at 64
        would stop the rollouts where V hardly tells two images of a prompt apart (within a prompt it correlates .12 to .46 with the reward there; without shift, at .50 .. .29, .53 to .77).
        So few images leave a gradient that is nearly all noise (tests/mini/gradient.py), which wears the model down unless it is held to the base model harder: --kl .3, official 1e-4; .1 with
        the value, for the errors of an anchor, and with them the pull of the rewards, are several times smaller than those of z_0.
"""
import math
from functools import partial
from itertools import count as count_from
from pathlib import Path

import torch
from tqdm import tqdm

from common import (Backbone, Reward, add_lora, average_over_processes, begin, clean_reward, count, decay_at, dit_blocks, draw_training, encode_prompts, evaluate, fail,
                    follow, gathered, generator, gflop, gib, joint_value, load_artifact, load_values, mean_and_error, meta_backbone, meta_value, now, own_prefixes,
                    parse_stage, print_table, print_work_saved, processes, report_dry_run, save_image_grid, save_lora, save_table, save_training, split_prompts, stage_parser, swapped,
                    tweedie, value_files, without_lora, work_saved)

METHODS = ("nft", "nft+stitchvm")
POLICIES = ("default", "old")  # what is trained, what samples
ABOUT = ("method", "run", "window", "update", "seconds", "gflop", "gain", "gain_se", "n")  # the keys of a row that are no scores
PRESETS = {"mini": dict(train_prompts="tests/mini/data/train_captions.json", eval_prompts="tests/mini/data/drawbench.txt", resolution=64, prompts=8, images=8, gflop=3500,
                        train_times=8, lr=1e-3, shift=1.0, batch=64, eval_limit=200, eval_every=6, eval_steps=25),
           "24gb": dict(resolution=512, prompts=8, images=12, updates=200, train_times=24, lr=3e-4, batch=4, checkpointing=True, eval_limit=100, eval_every=20, eval_steps=40),
           "paper": dict(reward="dfn-clip+hpsv2", resolution=512, prompts=48, images=24, updates=300, train_times=24, lr=3e-4, batch=8, eval_limit=200, eval_every=30, eval_steps=40)}
KL = {"mini": (0.3, 0.1), "24gb": (1e-4, 1e-4), "paper": (1e-4, 1e-4)}  # --kl and --kl-stitchvm of --loss official


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--value", nargs="+", metavar="FILE", help="value models, one for each reward of the sum")
    p.add_argument("--train-prompts", help="a text file, a JSON list, COCO's captions or GenEval's JSONL")
    p.add_argument("--train-limit", type=int, default=1000, help="use this many of them at most")
    p.add_argument("--eval-prompts", help="held-out prompts; those among --train-prompts are not trained on")
    p.add_argument("--eval-limit", type=int, help="use this many of them at most")
    p.add_argument("--eval-every", type=int, help="updates between evaluations; the first is before any, the last after all")
    p.add_argument("--eval-steps", type=int, help="Euler steps of the evaluation (official: 40)")
    p.add_argument("--prompts", type=int, help="of an update, over all processes (official: 48)")
    p.add_argument("--images", type=int, help="of a prompt, its group (official: 24)")
    p.add_argument("--updates", type=int, help="optimiser steps, at most; the paper gives none, its hours allow about 300")
    p.add_argument("--gflop", type=float, help="the same by counted work, of all processes together; what is reached first ends a method")
    p.add_argument("--steps", type=int, default=25, help="of the solver (D.3: 25)")
    p.add_argument("--shift", type=float, help="of the noise levels, of rollouts and evaluation (default: the scheduler's own, 3 for SD 3.5; the miniature: 1)")
    p.add_argument("--stop-window", nargs="+", default=["12-17"], metavar="A-B", help="nft+stitchvm stops after A to B steps; several give several runs")
    p.add_argument("--train-times", type=int, help="noise levels at which an image is trained on, drawn from the grid's nodes above tau (official: 0.99 --steps)")
    p.add_argument("--loss", choices=("official", "paper"), default="official", help="[D9]")
    p.add_argument("--beta", type=float, default=0.1, help="of (68), (69) (official: 0.1 for several rewards and 25 steps, 1 for one reward and 10 steps)")
    p.add_argument("--kl", type=float, help="weight of |v - v_base|^2 (default: 1e-4, in the miniature 0.3; 0 with --loss paper)")
    p.add_argument("--kl-stitchvm", type=float, help="the same for nft+stitchvm (default: as --kl, in the miniature 0.1)")
    p.add_argument("--adv-clip", type=float, default=5.0, help="standard deviations at which rho is 0 or 1")
    p.add_argument("--decay", type=int, choices=(0, 1, 2), default=1, help="official schedule of (71)'s eta: 0; ramp to 0.5; 0, then ramp to 0.999")
    p.add_argument("--eta", type=float, help="a constant eta, instead of --decay")
    p.add_argument("--rank", type=int, default=32, help="of the LoRA")
    p.add_argument("--alpha", type=float, default=64)
    p.add_argument("--lr", type=float, help="official: 3e-4")
    p.add_argument("--weight-decay", type=float, default=1e-4)
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    p.add_argument("--ema", type=float, default=0.9, help="decay of the average of the weights that is evaluated and written")
    p.add_argument("--batch", type=int, help="latents at a time; gradients add up to one step an update whatever it is")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, a third more work in training")
    p.add_argument("--save-every", type=int, default=1, help="updates between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from <out>/08_nft.train")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def bridge(t, tau):
    """a, s, a' and s' of z_t = a z_tau + s eps for t > tau, which has the marginals of (1-t) z_0 + t eps (74)-(76). tau = 0: 1 - t, t, -1, 1."""
    s = ((t - tau) * (t + tau - 2 * t * tau)).sqrt() / (1 - tau)  # trap: t^2 - a^2 tau^2 as it stands cancels near tau
    return (1 - t) / (1 - tau), s, -1 / (1 - tau), (t + (1 - t) * (tau / (1 - tau)) ** 2) / s


def bridge_point(z_tau, eps, t, tau):
    """z_t and its target velocity u (B, ...) for anchors z_tau, noises eps (B, ...), t and tau (B,)."""
    a, s, da, ds = (c.view(-1, *[1] * (z_tau.ndim - 1)) for c in bridge(t, tau))
    return a * z_tau + s * eps, da * z_tau + ds * eps


def anchor_scale(t, tau):
    """What turns an error of the velocity into one of the anchor: zhat_tau = (1-tau)/t (s s' z_t - s^2 v), so zhat_tau - z_tau = -scale (v - u). tau = 0: t."""
    return (1 - tau) * bridge(t, tau)[1] ** 2 / t


def optimality(r, clip=5.0):
    """rho in [0, 1] of rewards r (P prompts, G images): relative to the prompt's mean, in units of the standard deviation of all of them (65)."""
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def nft_loss(v, v_old, u, rho, beta=1.0, scale=None):
    """(68)-(70) for each sample (B,): v, v_old, u (B, ...), rho (B,). scale (B,) makes it the official form: errors in anchor space, divided by their mean size, times 5 / beta.

    v+- are written as v_old +- beta (v - v_old): where v = v_old and rho = 1/2 the gradient is exactly 0, not a rounding error that Adam would blow up.
    """
    move = beta * (v - v_old)
    parts = []
    for e in (v_old - u + move, v_old - u - move):
        e = e.flatten(1) if scale is None else scale[:, None] * e.flatten(1)
        weight = 1.0 if scale is None else 5 / beta / e.detach().abs().mean(1).clamp(min=1e-5)
        parts.append(weight * e.square().mean(1))
    return rho * parts[0] + (1 - rho) * parts[1]


def train_loss(velocity, z_tau, tau, eps, t, rho, form="official", beta=1.0, kl=0.0):
    """The loss and the penalty of each sample (B,), from anchors z_tau (B, ...) at tau (B,); velocity(policy, z, t), policy 'default' (trained), 'old' or None (base)."""
    z, u = bridge_point(z_tau, eps, t, tau)
    with torch.no_grad():
        v_old = velocity("old", z, t)
        v_base = velocity(None, z, t) if kl else None
    v = velocity("default", z, t)  # last: the adapter of the backward pass must be the active one
    loss = nft_loss(v, v_old, u, rho, beta, anchor_scale(t, tau) if form == "official" else None)
    penalty = (v - v_base).square().flatten(1).mean(1) if kl else torch.zeros_like(loss)
    return loss, kl * penalty


def old_decay(update, schedule=1):
    """The official eta of (71) after the update of this number, from 1."""
    return 0.0 if schedule == 0 else min(0.001 * update, 0.5) if schedule == 1 else min(max(0.0075 * (update - 75), 0.0), 0.999)


def multistep(z, x0, x0_last, grid, k):
    """From grid[k] to grid[k+1] by the second-order multistep solver in x0 form (the official "dpm2"), x0_last the estimate of the step before; first order at k = 0 and to 0."""
    t, s = grid[k], grid[k + 1]
    if k > 0 and s > 0:
        log_snr = [math.log((1 - x) / x) if x < 1 else -math.inf for x in grid[k - 1:k + 2]]
        x0 = x0 + 0.5 * (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0]) * (x0 - x0_last)
    return s / t * z + (1 - s / t) * x0


def rollout(velocity, z, grid, stop):
    """z (B, ...) at grid[0] -> z at grid[stop], stop (B,), along the ODE. grid: the whole one, wherever it stops; velocity(z, sigma, rows) for those that go on."""
    z, x0_last = z.clone(), torch.zeros_like(z)
    for k in range(int(stop.max())):
        rows = (stop > k).nonzero()[:, 0]
        sigma = torch.full((len(rows),), grid[k], device=z.device, dtype=z.dtype)
        x0 = tweedie(z[rows], velocity(z[rows], sigma, rows), sigma)
        z[rows] = multistep(z[rows], x0, x0_last[rows], grid, k)
        x0_last[rows] = x0
    return z
# ---- to here ----


def policy_velocity(backbone, condition, checkpointing=False):
    """velocity(policy, z, t) of train_loss for rows with these conditions, cfg 1."""
    def velocity(policy, z, t):
        if policy is None:
            with without_lora(backbone.transformer):
                return backbone.velocity(z, t, condition)
        backbone.transformer.set_adapter(policy)  # trap: not between forward and backward(), which would drop the gradients of the other adapters
        return backbone.velocity(z, t, condition, checkpointing=checkpointing)
    return velocity


def complete(args):
    """Fill in the flags that depend on others, refuse what cannot be run, and list the runs: method, window, the name of the row and of its folder."""
    args.train_times = min(args.train_times, max(1, int(0.99 * args.steps)))
    kl, kl_stitchvm = KL[args.preset] if args.loss == "official" else (0.0, 0.0)
    if args.kl_stitchvm is None:
        args.kl_stitchvm = kl_stitchvm if args.kl is None else args.kl
    if args.kl is None:
        args.kl = kl
    if args.images < 2:
        fail(f"--images {args.images}: a group needs two at least, its rewards are compared with their mean")
    for name in ("prompts", "updates", "steps", "train_times", "batch", "eval_every", "eval_steps", "save_every", "rank"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1 is needed")
    for name in ("gflop", "shift"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            fail(f"--{name} is {getattr(args, name):g}; it must be above 0")
    if args.updates is None and args.gflop is None:
        fail("--updates or --gflop must say when a method ends")
    windows = []
    for window in args.stop_window if "nft+stitchvm" in args.methods else ():
        low, dash, high = window.partition("-")
        if not (dash and low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high) <= args.steps):
            fail(f"--stop-window {window} is no A-B with 1 <= A <= B <= --steps {args.steps}")
        windows.append((int(low), int(high)))
    runs = []
    for method in [m for m in METHODS if m in args.methods]:
        for low, high in windows if method != "nft" else [(args.steps, args.steps)]:
            name = f"{method}_{low}-{high}" if method != "nft" and len(windows) > 1 else method
            runs.append(dict(method=method, name=name, window=(low, high), value=method != "nft"))
    return runs


def unit_costs(backbone, rewards, values, condition, texts, shape, args):
    """GFLOP of one row of each part: a denoiser pass, a reward of a latent, a value, a training step at one noise level."""
    z, one = torch.randn(1, *shape).to(backbone.device), torch.full((1,), 0.5, device=backbone.device)

    def train():
        loss, penalty = train_loss(policy_velocity(backbone, condition, args.checkpointing), z, 0 * one, z, one, one, args.loss, args.beta, max(args.kl, args.kl_stitchvm))
        (loss + penalty).sum().backward()

    counted = partial(gflop, device=backbone.device)
    with torch.no_grad():
        costs = dict(velocity=counted(lambda: backbone.velocity(z, one, condition)), reward=counted(lambda: clean_reward(rewards, texts, backbone.decode(z))),
                     value=counted(lambda: joint_value(values, z, one, texts)) if values else 0.0)
    return costs | dict(train=counted(train))


def main(args):
    runs = complete(args)
    if args.dry_run:
        return dry_run(args)
    names, device, (rank, world) = args.reward.split("+"), torch.device(args.device), processes()
    pool, held_out = split_prompts(args)
    if not world <= args.prompts <= len(pool):
        fail(f"--prompts {args.prompts} of an update must be at least one for each of {world} processes, and at most the {len(pool)} prompts to train on")
    files = value_files(args, names) if any(run["value"] for run in runs) else []  # before anything that takes long
    backbone = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype))
    if args.shift is not None:
        backbone.set_shift(args.shift)
    encoded = [v.cpu() for v in encode_prompts(backbone, [*pool, *held_out], cache=None if rank else args.out)]
    condition, held_out_condition = [v[:len(pool)] for v in encoded], [v[len(pool):] for v in encoded]
    rewards = [Reward(name, args.preset, device) for name in names]
    embedded = [reward.encode_text(pool) if reward.uses_text else None for reward in rewards]
    values, artifacts = load_values(files, backbone, rewards, args.resolution)
    own_prefixes(values)
    transformer, shape = backbone.transformer, (backbone.vae.config.latent_channels, args.resolution // 8, args.resolution // 8)
    grid, eval_grid = (backbone.grid(n, torch.empty(1, *shape)).tolist() for n in (args.steps, args.eval_steps))
    levels = torch.tensor(grid)
    held_out_noise = torch.stack([torch.randn(shape, generator=generator(args.seed, "evaluate", k)) for k in range(len(held_out))])
    torch.manual_seed(args.seed)
    lora = {name: add_lora(transformer, args.rank, args.alpha, name) for name in POLICIES}
    initial = [p.detach().clone() for p in lora["default"]]
    of = lambda prompts: ([v[prompts].to(device) for v in condition], [t if t is None else t[prompts.to(t.device)] for t in embedded])
    costs = unit_costs(backbone, rewards, values, *of(torch.zeros(1, dtype=torch.long)), shape, args)
    own = slice(rank * args.prompts // world, (rank + 1) * args.prompts // world)  # this process' prompts of an update
    samples = args.prompts * args.images
    if rank == 0:
        print(f"{args.prompts} prompts x {args.images} images = {samples} samples an update{f', shared by {world} processes' if world > 1 else ''}, trained on at {args.train_times} noise levels "
              f"at most, {args.batch} at a time; {sum(p.numel() for p in lora['default']):,} trained parameters; {len(pool)} prompts to train on, {len(held_out)} held out")
        print("GFLOP of one row: " + ", ".join(f"{k} {v:.3g}" for k, v in costs.items()))

    running = Path(args.out) / "08_nft.train"
    must_agree = {"values": [a["id"] for a in artifacts], "processes": world, "runs": [run["name"] for run in runs]} | {k: getattr(args, k) for k in (
        "preset", "backbone", "reward", "seed", "resolution", "dtype", "train_prompts", "train_limit", "eval_prompts", "eval_limit", "eval_every", "eval_steps", "prompts", "images", "updates",
        "gflop", "steps", "shift", "stop_window", "train_times", "loss", "beta", "kl", "kl_stitchvm", "adv_clip", "decay", "eta", "rank", "alpha", "lr", "weight_decay", "clip", "ema", "batch")}
    done, rows, curve, shown, per_prompt = dict(run=0, update=0), [], [], [], []
    if args.resume:
        done = load_artifact(running, must_agree, "08_nft.py")["data"]
        rows, curve, shown, per_prompt = done["rows"], done["curve"], [x.clone() for x in done["shown"]], done["per_prompt"]

    def checkpoint(**position):
        """Every draw is a function of seed, update and prompt: the position is all of the random state."""
        if rank == 0:
            save_training(running, "08_nft", must_agree, dict(rows=rows, curve=curve, shown=shown, per_prompt=per_prompt, **position))

    for n, run in list(enumerate(runs))[done["run"]:]:
        optimizer = torch.optim.AdamW(lora["default"], lr=args.lr, weight_decay=args.weight_decay)
        start, seconds, spent = (done["update"], done["seconds"], done["spent"]) if done["update"] else (0, 0.0, 0.0)
        for name, parameters in lora.items():
            torch._foreach_copy_([p.data for p in parameters], list(done[name]) if start else initial)
        average = [v.to(device, copy=True) for v in (done["average"] if start else initial)]
        if start:
            optimizer.load_state_dict(done["optimizer"])
        done = dict(update=0)

        def report(update):
            """An evaluation point; before any update all runs are the same model."""
            first = next((k for k, r in enumerate(rows) if r["update"] == 0), None)
            if update == 0 and first is not None:
                images, reward, scores = shown[first], per_prompt[first], {k: v for k, v in rows[first].items() if k not in ABOUT}
            else:
                transformer.set_adapter("default")
                with swapped(lora["default"], average):
                    images, scores = evaluate(backbone, rewards, args.preset, held_out, held_out_condition, held_out_noise, eval_grid, args.batch)
                images, reward, scores = images[:8], scores["reward"].tolist(), mean_and_error({k: v[v.isfinite()] for k, v in scores.items()})  # one that overflowed has no score
            shown.append(images), per_prompt.append(reward)
            gain = torch.tensor(reward) - torch.tensor(per_prompt[0])  # the same noises: its error is far smaller than the reward's
            rows.append(dict(method=run["method"], run=run["name"], window=run["window"] if run["value"] else None, update=update, seconds=round(seconds, 2), gflop=spent,
                             **scores, **mean_and_error({"gain": gain[gain.isfinite()]}), n=len(held_out)))
            if rank == 0:
                tqdm.write(f"{run['name']}, update {update}, {spent:,.0f} GFLOP: gain {rows[-1]['gain']:.4f} +- {rows[-1]['gain_se']:.4f}  " +
                           "  ".join(f"{k} {rows[-1][k]:.4f}" for k in scores if not k.endswith("_se")))

        if run["name"] not in {r["run"] for r in rows}:
            report(0)
        bar = tqdm(total=args.updates, initial=start, desc=run["name"], disable=rank > 0)
        for update in count_from(start):
            began = now(device)
            # every process makes the draws of all prompts and works on its own: the same data however many they are
            prompts = torch.randperm(len(pool), generator=generator(args.seed, "prompts", update))[:args.prompts]
            stop = torch.randint(run["window"][0], run["window"][1] + 1, (args.prompts,), generator=generator(args.seed, "stop", update))
            image = [(p, g) for p in range(*own.indices(args.prompts)) for g in range(args.images)]
            prompt_of, stop_of = (v[own].repeat_interleave(args.images) for v in (prompts, stop))
            tau = levels[stop_of]
            noise = torch.stack([torch.randn(shape, generator=generator(args.seed, "rollout", update, *b)) for b in image])
            z_tau, r = torch.empty_like(noise), torch.empty(len(image))
            with torch.no_grad():
                transformer.set_adapter("old")
                for part in stop_of.argsort(stable=True).split(args.batch):
                    c, texts = of(prompt_of[part])
                    z = rollout(lambda z, sigma, rows: backbone.velocity(z, sigma, [v[rows] for v in c]), noise[part].to(device), grid, stop_of[part].to(device))
                    z_tau[part] = z.cpu()
                    r[part] = (joint_value(values, z, tau[part].to(device), texts)[0] if run["value"] else clean_reward(rewards, texts, backbone.decode(z))).float().cpu()
            r = gathered(r.view(-1, args.images).to(device), own, args.prompts).cpu()
            rho = optimality(r, args.adv_clip)

            times = [torch.randperm(int(stop_of[b]), generator=generator(args.seed, "times", update, *image[b]))[:args.train_times] for b in range(len(image))]
            pairs = [(b, int(k)) for b in range(len(image)) for k in times[b]]
            sums = torch.zeros(2, device=device)
            optimizer.zero_grad()
            for part in torch.tensor(pairs).split(args.batch):
                b, k = part.T
                eps = torch.stack([torch.randn(shape, generator=generator(args.seed, "train", update, *image[x], int(y))) for x, y in part])
                weight = torch.tensor([world / samples / len(times[x]) for x in b], device=device)  # of all processes' mean: every image counts as much
                velocity = policy_velocity(backbone, of(prompt_of[b])[0], args.checkpointing)
                loss = torch.stack(train_loss(velocity, z_tau[b].to(device), tau[b].to(device), eps.to(device), levels[k].to(device), rho[own].flatten()[b].to(device),
                                              args.loss, args.beta, args.kl_stitchvm if run["value"] else args.kl))
                (weight * loss).sum().backward()
                sums += (weight * loss.detach()).sum(1)
            average_over_processes([*[p.grad for p in lora["default"]], sums])
            norm = torch.nn.utils.clip_grad_norm_(lora["default"], args.clip)
            if not (sums.isfinite().all() and norm.isfinite()):
                fail(f"the loss of {run['name']} became NaN or infinite in update {update + 1}; " + (f"the last good state is {running}; " if running.exists() else "") +
                     "lower --lr and start again")
            if update % args.save_every == 0:  # only now, when these weights have given a finite loss
                paused = now(device)
                checkpoint(run=n, update=update, seconds=seconds, spent=spent, average=average, optimizer=optimizer.state_dict(),
                           **{k: [p.detach() for p in v] for k, v in lora.items()})
                began += now(device) - paused
            optimizer.step()
            eta = old_decay(update + 1, args.decay) if args.eta is None else args.eta
            current = [p.detach() for p in lora["default"]]
            follow([p.detach() for p in lora["old"]], current, eta)
            follow(average, current, decay_at(update + 1, args.ema))
            trained = int(args.images * stop.clamp(max=args.train_times).sum())
            spent += costs["velocity"] * args.images * int(stop.sum()) + costs["value" if run["value"] else "reward"] * samples + costs["train"] * trained
            seconds += now(device) - began
            curve.append(dict(method=run["method"], run=run["name"], update=update + 1, seconds=round(seconds, 2), gflop=spent, loss=float(sums[0]), penalty=float(sums[1]), gradient=float(norm),
                              rollouts=float(r.mean()), spread=float(r.std(correction=0)), spread_in_group=float(r.var(1, correction=0).mean().sqrt()), eta=eta))
            bar.set_postfix(rollouts=f"{curve[-1]['rollouts']:.4f}", gradient=f"{float(norm):.2g}")
            bar.update()
            last = update + 1 == args.updates or (args.gflop is not None and spent >= args.gflop)
            if last or (update + 1) % args.eval_every == 0:
                report(update + 1)
            if last:
                break
        bar.close()
        if rank == 0:
            transformer.set_adapter("default")
            with swapped(lora["default"], average):
                save_lora(backbone, Path(args.out) / run["name"])
            print(f"wrote {Path(args.out) / run['name']}/pytorch_lora_weights.safetensors")
        checkpoint(run=n + 1, update=0)

    if rank > 0:
        return
    metrics = [k for k in rows[0] if k not in ABOUT and not k.endswith("_se")]
    print_table(rows, ("run", "update", "seconds", "gflop", "reward", "reward_se", "gain", "gain_se", *metrics[1:], "n"))
    saved = work_saved(rows, "run")
    print_work_saved(saved, "run")
    save_table(args, "08_nft", rows, work_saved=saved, curve=curve, rewards_of_prompts=[[v if v == v else None for v in r] for r in per_prompt], grid=grid, gflop_per_row=costs,
               values=[dict(stage=a["stage"], id=a["id"]) for a in artifacts])
    draw_training(rows, "run", Path(args.out) / "08_curves.png", f"{args.reward} + {args.backbone}, {len(held_out)} held-out prompts")
    width = min(len(x) for x in shown)
    save_image_grid([x.float() / 255 for x in shown], [f"{r['run']}\nupdate {r['update']}" for r in rows], held_out[:width], Path(args.out) / "08_grid.png")
    running.unlink(missing_ok=True)


def dry_run(args):
    rewards = [Reward(name, args.preset, "meta", weights=False) for name in args.reward.split("+")]
    backbone, null = meta_backbone(args.backbone)
    transformer, stitches = backbone.transformer, (4, 12)  # the paper's choice for CLIP on SD 3.5 Medium, and a late one: the search decides
    values = {i: [meta_value(backbone, null, reward, i, args.resolution)[0].requires_grad_(False) for reward in rewards] for i in stitches}
    for i in stitches:
        own_prefixes(values[i])
    lora = {name: add_lora(transformer, args.rank, args.alpha, name) for name in POLICIES}
    z, one = torch.empty(1, 16, args.resolution // 8, args.resolution // 8, device="meta"), torch.empty(1, device="meta")
    texts = [torch.empty(1, r.visual.output_dim, device="meta") for r in rewards]

    def train():
        torch.stack(train_loss(policy_velocity(backbone, null), z, one, z, one, one, args.loss, args.beta, args.kl)).sum().backward()

    with torch.no_grad():
        step = count(lambda: backbone.velocity(z, one, null))[0]
        last = {None: count(lambda: clean_reward(rewards, texts, backbone.decode(z)))[0]} | {i: count(lambda: joint_value(v, z, one, texts))[0] for i, v in values.items()}
        state, blocks = begin(transformer, z.bfloat16(), one, *null), len(dit_blocks(transformer))
    trained = {False: count(train, [transformer])}
    trained[True] = trained[False][0] + step, (blocks * (state["h"].nbytes + state["c"].nbytes)) / 2 ** 30 + trained[False][1] / blocks  # the blocks' inputs, and one block at a time
    resident = gib(transformer, backbone.vae, *[r.model for r in rewards]) + 3 * gib(torch.nn.ParameterList(lora["default"]))  # gradient and AdamW's two moments
    low, high = (int(x) for x in args.stop_window[0].split("-"))
    mean, cases = lambda most: sum(min(most, s) for s in range(low, high + 1)) / (high - low + 1), []
    for name, i, steps, times in [("nft", None, args.steps, args.train_times), *[(f"nft+stitchvm, i = {i}", i, mean(args.steps), mean(args.train_times)) for i in stitches],
                                  ("nft+stitchvm, i = 4, as many noise levels as nft", 4, mean(args.steps), args.train_times),
                                  ("nft, rollout and reward only", None, args.steps, 0), ("nft+stitchvm, i = 4, rollout and value only", 4, mean(args.steps), 0)]:
        for checkpointing in (False, True)[:1 + bool(times)]:
            tflop, saved = trained[checkpointing] if times else (0.0, 0.0)
            cases.append(dict(method=name + ", checkpointing" * checkpointing, unit="sample", tflop=steps * step + last[i] + times * tflop, saved_gib=args.batch * saved,
                              peak_gib=resident + (gib(values[i][0].transformer, *values[i]) if i else 0.0) + args.batch * saved, n=(args.updates or 0) * args.prompts * args.images))
    report_dry_run(args, "08_nft", cases, [backbone.vae, *[r.model for r in rewards]], [transformer])


if __name__ == "__main__":
    main(parse_args())
