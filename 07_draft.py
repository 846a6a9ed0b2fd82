"""Stage 07 -- direct reward finetuning of the generator, and the same with rollouts that stop early at a value model.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.3, Table 3, App. D.3, Eqs. (63), (64). theta is a LoRA, u_theta the adapted velocity, u the base one:
            draft-K           -r(D(z_0))  + lam mean_k |u_theta(z_k) - u(z_k)|^2       all T steps; gradient through the last K of them, decoder, reward
            draft-K+stitchvm  -V(z_tau)   + the same                                   tau uniform among nodes 3..7 of the T = 10; gradient through the last K
                                                                                       steps before tau and the value model: no later step, no decoder
            alignprop         -r(D(z_0))  + the same                                   K uniform in 1..T-1, its steps checkpointed
        The mean is over the K steps that carry gradient (DRaFT+), T steps of the ODE on the scheduler's own grid, no guidance.
        V reads the base weights: a copy of its blocks is taken before the LoRA is added, else the value would move with the policy.
        Methods run one after the other, each with its own LoRA from zero, on the same prompts and noises. Their cost is counted, in
        training only: --gflop stops each at equal work. A sample that the metrics are computed on is drawn from the average of the LoRA.
Reads   out/value.pt (03); for a joint reward a+b each one's own, runs/<preset>/<backbone>_<reward>/value.pt, or --value FILE FILE; prompts
Writes  out/07_draft.json, out/07_curves.png (against seconds and GFLOP), out/07_grid.png (fixed noises), out/<method>/pytorch_lora_weights.safetensors
        for pipe.load_lora_weights, and while it runs out/07_draft.train, from which --resume goes on to the same bits
Run     python 07_draft.py                                                               # the miniature, under four minutes on two cores
        python 07_draft.py --methods draft-1 draft-3 alignprop draft-1+stitchvm draft-3+stitchvm --gflop 20000
        torchrun --nproc-per-node 16 07_draft.py --preset paper --reward dfn-clip+hpsv2 --train-prompts FILE --eval-prompts FILE --value FILE FILE
Departs from the paper: its [3, 7] are nodes of the grid, the latent after so many steps [D1]; one stop is drawn for each micro-batch. diffusers'
        grid shifts its smallest noise level twice, so the last step starts at sigma = .009 and is all that draft-1 trains (.001 without shift); --grid
        even ends at .25 (.1). The average's decay is not given: .99, less in the first updates. The miniature takes fewer samples, another learning rate, a stronger
        regulariser, and no shift of the noise levels: 3 is for 1024 px, and at 64 would put the stops where V hardly tells two samples of a prompt apart.
"""
import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (Backbone, Reward, add_lora, average_over_processes, clean_reward, count, decay_at, draw_training, encode_prompts, evaluate, fail, follow, generator,
                    gflop, gib, joint_value, load_artifact, load_values, mean_and_error, meta_backbone, meta_value, now, own_prefixes, parse_stage, print_table, print_work_saved,
                    processes, report_dry_run, save_image_grid, save_lora, save_table, save_training, split_prompts, stage_parser, swapped, value_files, without_lora, work_saved)

METHODS = ("draft-1", "draft-3", "alignprop", "draft-1+stitchvm", "draft-3+stitchvm")
PAPER = dict(methods=list(METHODS), resolution=512, lr=5e-5, ema=0.99, updates=500, eval_every=50, eval_steps=40, save_every=10, train_limit=2000)
PRESETS = {"mini": dict(train_prompts="tests/mini/data/train_captions.json", eval_prompts="tests/mini/data/drawbench.txt", eval_limit=200, resolution=64, batch=16, accumulate=1,
                        methods=["draft-3", "draft-3+stitchvm"], lr=5e-4, regularise=0.03, shift=1.0, ema=0.9, gflop=2500, eval_every=32, eval_steps=20, save_every=5, train_limit=2000),
           "24gb": dict(batch=1, accumulate=64, checkpointing=True, **PAPER), "paper": dict(batch=8, accumulate=16, **PAPER)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--train-prompts", help="a text file, a JSON list, COCO's captions or GenEval's JSONL")
    p.add_argument("--train-limit", type=int, help="use this many of them at most")
    p.add_argument("--eval-prompts", help="held-out prompts; those among --train-prompts are not trained on")
    p.add_argument("--eval-limit", type=int, help="use this many of them at most")
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{', '.join(METHODS)}, or another K")
    p.add_argument("--value", nargs="+", metavar="FILE", help="value models, one for each reward of the sum")
    p.add_argument("--steps", type=int, default=10, help="of a rollout (App. D.3: 10)")
    p.add_argument("--grid", choices=("scheduler", "even"), default="scheduler", help="scheduler: its own, whose last step starts at sigma .009 (.001 at shift 1); even: sigmas from 1 to 1/steps, shifted")
    p.add_argument("--shift", type=float, help="of the noise levels, of rollouts and evaluation (default: the scheduler's own, 3 for SD 3.5; the miniature: 1)")
    p.add_argument("--stop", type=int, nargs=2, default=[3, 7], metavar=("FIRST", "LAST"), help="nodes of the grid at which '+stitchvm' stops, uniform (App. D.3: 3 7)")
    p.add_argument("--regularise", type=float, default=0.01, metavar="LAM", help="weight of the distance to the base velocity")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--alpha", type=float, default=64)
    p.add_argument("--lr", type=float, help="of AdamW without weight decay (App. D.3: 5e-5)")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    p.add_argument("--ema", type=float, help="decay of the average of the LoRA that is evaluated and written; 0: the last one")
    p.add_argument("--batch", type=int, help="prompts at a time, of each process; one sample each")
    p.add_argument("--accumulate", type=int, help="such micro-batches for each update")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute each block of the kept steps: less memory, a forward pass more (alignprop always does)")
    p.add_argument("--updates", type=int, help="end of each method; the first of these three that is reached")
    p.add_argument("--gflop", type=float, help="the same by counted work, of all processes together")
    p.add_argument("--seconds", type=float, help="the same by time")
    p.add_argument("--eval-every", type=int, help="updates")
    p.add_argument("--eval-steps", type=int, help="of the sampler at evaluation points (App. D.3: 40)")
    p.add_argument("--save-every", type=int, help="updates between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from <out>/07_draft.train")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def rollout(velocity, z, grid, stop, keep):
    """Euler steps of the ODE from z (B, ...) at grid[0] to grid[stop], with gradient through the last `keep`; and (z_k, t_k, u_k) of those steps.

    Gradient reaches earlier kept steps through the input of later ones.
    """
    kept = []
    with torch.no_grad():
        for t, t_next in zip(grid[:stop - keep], grid[1:]):
            z = z + (t_next - t) * velocity(z, torch.full((len(z),), t, device=z.device))
    for t, t_next in zip(grid[stop - keep:stop], grid[stop - keep + 1:]):
        sigma = torch.full((len(z),), t, device=z.device)
        u = velocity(z, sigma)
        kept.append((z, sigma, u))
        z = z + (t_next - t) * u
    return z, kept


def distance_to_base(kept, base):
    """DRaFT+: mean over the kept steps of the mean squared difference to base(z, sigma), the velocity without the LoRA at the same z_k. Gradient: through u_k only."""
    return sum((u - base(z.detach(), sigma)).square().mean() for z, sigma, u in kept) / len(kept)


def draft_loss(velocity, base, score, z, grid, stop, keep, lam):
    """(63) and (64): -mean score(z_tau, tau) + lam times the distance to the base, of noise z (B, C, h, w); and the score, the distance."""
    z, kept = rollout(velocity, z, grid, stop, keep)
    # before the score, so that no adapter is switched while a checkpointed graph is built or run backwards
    distance = distance_to_base(kept, base) if lam else z.new_zeros(())
    value = score(z, torch.full((len(z),), grid[stop], device=z.device)).mean()
    return lam * distance - value, value.detach(), distance.detach()


def draw_rollout(keep, stops, steps, draw):
    """(stop, keep) of one micro-batch. keep None: AlignProp's, uniform in 1..steps-1; stops: (first, last), uniform, both included, or None for whole rollouts."""
    uniform = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))
    stop = steps if stops is None else uniform(*stops)
    return stop, uniform(1, steps - 1) if keep is None else min(keep, stop)
# ---- to here ----


def parse_method(name, args):
    """{keep, stops, checkpointing} of a method's name."""
    match = re.fullmatch(r"draft-([1-9]\d*)(\+stitchvm)?", name)
    if not match and name != "alignprop":
        fail(f"there is no method {name}: --methods takes {', '.join(METHODS)}, or another K")
    stops = args.stop if name.endswith("+stitchvm") else None
    keep = int(match[1]) if match else None
    if keep and keep > (stops[0] if stops else args.steps):
        fail(f"{name} keeps {keep} steps of a rollout that " + (f"may stop after {stops[0]} (--stop)" if stops else f"has {args.steps} (--steps)"))
    return dict(keep=keep, stops=stops, checkpointing=args.checkpointing or name == "alignprop")


def check(args):
    """Refuse what cannot be run, in one sentence."""
    for name in ("steps", "rank", "batch", "accumulate", "eval_every", "eval_steps", "save_every", "updates", "gflop", "seconds", "shift"):
        if getattr(args, name) is not None and getattr(args, name) < (2 if name == "steps" else 1e-9):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, which is too small")
    if any(name.endswith("+stitchvm") for name in args.methods) and not 1 <= args.stop[0] <= args.stop[1] <= args.steps:
        fail(f"--stop {args.stop[0]} {args.stop[1]} must lie in order between 1 and --steps {args.steps}")
    if args.updates is None and args.gflop is None and args.seconds is None:
        fail("--updates, --gflop or --seconds must say when a method ends")
    return {name: parse_method(name, args) for name in args.methods}


def noise_levels(args, backbone, shape):
    """The rollouts' grid, floats from 1 to 0."""
    if args.grid == "scheduler" or backbone.scheduler.config.use_dynamic_shifting:  # FLUX's own is even
        return backbone.grid(args.steps, torch.empty(1, *shape)).tolist()
    shift, even = backbone.scheduler.config.shift, [1 - k / args.steps for k in range(args.steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in even] + [0.0]


def step_functions(backbone, rewards, values, condition, texts, checkpointing=False):
    """velocity(z, sigma), base(z, sigma) and score(z, sigma) for one micro-batch of prompts; without values the score is the clean reward of the decoded latents."""
    velocity = partial(backbone.velocity, condition=condition, checkpointing=checkpointing)

    def base(z, sigma):
        with torch.no_grad(), without_lora(backbone.transformer):
            return backbone.velocity(z, sigma, condition)

    score = (lambda z, sigma: joint_value(values, z, sigma, texts)[0]) if values else lambda z, _: clean_reward(rewards, texts, backbone.decode(z))
    return velocity, base, score


def gradient_cost(counted, f, z):
    """Work of f(z, sigma) and its gradient, in the unit of counted(call)."""
    return counted(lambda: f(z, torch.ones(len(z), device=z.device)).sum().backward())


def steps_cost(counted, velocity, base, z, lam):
    """Work of a rollout's steps as a function of (stop, keep): those before, and the kept ones, each with its base velocity and backward pass, the first without gradient by its input."""
    before, other = (counted(lambda: torch.no_grad()(f)(z, torch.ones(len(z), device=z.device))) for f in (velocity, base))
    first, later = (gradient_cost(counted, velocity, x) + (other if lam else 0) for x in (z, z.clone().requires_grad_()))
    return lambda stop, keep: (stop - keep) * before + first + (keep - 1) * later


def main(args):
    methods = check(args)
    if args.dry_run:
        return dry_run(args, methods)
    names, device = args.reward.split("+"), torch.device(args.device)
    trained, held_out = split_prompts(args)
    files = value_files(args, names) if any(m["stops"] for m in methods.values()) else []  # before anything that takes long

    rank, world = processes()
    backbone = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype))
    if args.shift is not None:
        backbone.set_shift(args.shift)
    cache = args.out if rank == 0 else None
    condition = [v.cpu() for v in encode_prompts(backbone, trained, cache=cache)]
    held_out_condition = [v.cpu() for v in encode_prompts(backbone, held_out, cache=cache)]
    rewards = [Reward(name, args.preset, device) for name in names]
    texts = [r.encode_text(trained) if r.uses_text else None for r in rewards]
    values, artifacts = load_values(files, backbone, rewards, args.resolution)
    own_prefixes(values)
    torch.manual_seed(args.seed)
    parameters = add_lora(backbone.transformer, args.rank, args.alpha)
    first = [p.detach().clone() for p in parameters]
    shape = backbone.vae.config.latent_channels, args.resolution // 8, args.resolution // 8
    grid, eval_grid = noise_levels(args, backbone, shape), backbone.grid(args.eval_steps, torch.empty(1, *shape)).tolist()
    eval_noise = torch.stack([torch.randn(shape, generator=generator(args.seed, "evaluate", n)) for n in range(len(held_out))])
    total = args.batch * args.accumulate * world
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters):,} trained parameters in {len(parameters)} tensors; {len(trained):,} prompts to train on, {len(held_out)} to evaluate on")
        print(f"{args.batch} prompts x {args.accumulate} micro-batches x {world} processes = {total} samples an update; noise levels " + " ".join(f"{t:.3f}" for t in grid))

    def functions(rows, method):
        of = [t if t is None else t[rows] for t in texts]
        return step_functions(backbone, rewards, values if methods[method]["stops"] else [], [v[rows].to(device) for v in condition], of, methods[method]["checkpointing"])

    running = Path(args.out) / "07_draft.train"
    must_agree = {"processes": world, "values": [a["id"] for a in artifacts], "prompts": f"{len(trained)}: {trained[0]} ...", "eval_prompts": f"{len(held_out)}: {held_out[0]} ..."} | {k: getattr(args, k) for k in (
        "preset", "dtype", "backbone", "reward", "resolution", "methods", "seed", "steps", "grid", "shift", "stop", "regularise", "rank", "alpha", "lr", "clip", "ema", "batch", "accumulate", "checkpointing",
        "eval_every", "eval_steps")}
    fresh = dict(update=0, seconds=0.0, gflop=0.0, lora=first, average=first, optimizer=None, sums=[0.0] * 5)  # the sums are of a row's training statistics
    state = dict(fresh, method=0, rows=[], images=[], rewards=[])
    if args.resume:
        state = load_artifact(running, must_agree, "07_draft.py")["data"]
    rows, images, per_prompt = state["rows"], state["images"], state["rewards"]

    last_good = lambda: f"; the last good state is {running}" if running.exists() else ""

    def evaluation(method, update, seconds, gflop, **training):
        """One row of the table and its images. Before the first update all methods are the base model, with the same noises."""
        if update == 0 and rows:
            rows.append(dict(rows[0], method=method)), per_prompt.append(per_prompt[0])
            return
        x, scores = evaluate(backbone, rewards, args.preset, held_out, held_out_condition, eval_noise, eval_grid, args.batch)
        if not scores["reward"].isfinite().all():
            fail(f"samples of {method} became NaN or infinite by update {update}{last_good()}; start again with a lower --lr")
        rows.append(dict(method=method, update=update, seconds=round(seconds, 2), gflop=gflop, n=len(held_out), **mean_and_error(scores), **training))
        images.append(x[:6]), per_prompt.append([round(v, 6) for v in scores["reward"].tolist()])
        if rank == 0:
            tqdm.write(f"{method} update {update}: " + "  ".join(f"{k} {rows[-1][k]:.4f}" for k in scores))

    def checkpoint(position):
        if rank == 0:
            save_training(running, "07_draft", must_agree, dict(position, lora=[p.detach() for p in parameters], rows=rows, images=images, rewards=per_prompt))

    costs = {}
    for number, method in list(enumerate(methods))[state["method"]:]:
        torch._foreach_copy_([p.data for p in parameters], list(state["lora"]))
        average = [v.to(device, copy=True) for v in state["average"]]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        update, seconds, work, sums = state["update"], state["seconds"], state["gflop"], torch.tensor(state["sums"], dtype=torch.float64)
        state = fresh  # of the next method
        if method not in {r["method"] for r in rows}:
            evaluation(method, 0, 0.0, 0.0)
        ends = lambda: any(limit is not None and spent >= limit for spent, limit in ((update, args.updates), (work, args.gflop), (seconds, args.seconds)))
        bar = tqdm(initial=update, total=args.updates, desc=method, disable=rank > 0)
        while not ends():
            draw = generator(args.seed, "update", update)  # a function of the position, so that nothing of it needs to be kept
            index = torch.randint(len(trained), (total,), generator=draw)
            noise = torch.randn(total, *shape, generator=draw)
            drawn = [draw_rollout(methods[method]["keep"], methods[method]["stops"], args.steps, draw) for _ in range(args.accumulate)]
            if method not in costs:
                *velocities, score = functions(index[:1], method)
                z, counted = noise[:1].to(device), partial(gflop, device=device)
                costs[method] = steps_cost(counted, *velocities, z, args.regularise), gradient_cost(counted, score, z.clone().requires_grad_())
            optimizer.zero_grad()
            stats, began = torch.zeros(3, device=device), now(device)
            for k, (stop, keep) in enumerate(drawn):
                # every process draws the whole batch and takes its share: the same data as one process with a batch as large as all of theirs
                own = slice((k * world + rank) * args.batch, (k * world + rank + 1) * args.batch)
                loss, *parts = draft_loss(*functions(index[own], method), noise[own].to(device), grid, stop, keep, args.regularise)
                (loss / args.accumulate).backward()
                stats += torch.stack([loss.detach(), *parts]) / args.accumulate
            average_over_processes([*[p.grad for p in parameters], stats])
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            if not (stats.isfinite().all() and norm.isfinite()):
                fail(f"the loss of {method} became NaN or infinite in update {update + 1}{last_good()}; start again with a lower --lr")
            if update % args.save_every == 0:  # only now, when these weights have given a finite loss
                paused = now(device)
                checkpoint(dict(method=number, update=update, seconds=seconds, gflop=work, average=average, optimizer=optimizer.state_dict(), sums=sums.tolist()))
                began += now(device) - paused
            optimizer.step()
            follow(average, [p.detach() for p in parameters], decay_at(update, args.ema))
            spent = torch.tensor([now(device) - began], device=device)
            average_over_processes([spent])  # so that all end together
            update, seconds, work = update + 1, seconds + float(spent), work + args.batch * world * sum(costs[method][0](*pair) + costs[method][1] for pair in drawn)
            sums += torch.cat([stats, norm[None], torch.ones_like(norm[None])]).cpu()
            bar.update(), bar.set_postfix(score=f"{float(stats[1]):.4f}", gflop=f"{work:.0f}")
            if update % args.eval_every == 0 or ends():
                means = dict(zip(("loss", "score", "distance", "gradient"), (sums[:4] / sums[4]).tolist()))
                sums.zero_()
                with swapped(parameters, average):
                    evaluation(method, update, seconds, work, **means)
                    if rank == 0:
                        save_lora(backbone, Path(args.out) / method)
        bar.close()
    if rank > 0:
        return

    metrics, saved = [k for k in rows[0] if f"{k}_se" in rows[0] and k != "reward"], work_saved(rows)
    print_table(rows, ("method", "update", "seconds", "gflop", "reward", "reward_se", *metrics, "n", "score", "distance", "gradient"))
    for method in methods:
        a, b = (np.array(per_prompt[k]) for k in (0, max(k for k, r in enumerate(rows) if r["method"] == method)))
        print(f"{method}: reward {a.mean():.4f} -> {b.mean():.4f}, {(b - a).mean():+.4f} with a standard error of {(b - a).std(ddof=1) / len(a) ** 0.5:.4f}, same prompts and noises")
    print_work_saved(saved)
    save_table(args, "07_draft", rows, work_saved=saved, rewards_of_prompts=per_prompt, grid=grid, values=[dict(stage=a["stage"], id=a["id"]) for a in artifacts])
    draw_training(rows, "method", Path(args.out) / "07_curves.png", f"{args.reward} + {args.backbone}, {len(held_out)} held-out prompts, {args.eval_steps} steps")
    shown = [r for k, r in enumerate(rows) if r["update"] or k == 0]
    width = min(len(x) for x in images)
    save_image_grid([x.float() / 255 for x in images], [f"{r['method']}\nupdate {r['update']}" if r["update"] else "base" for r in shown], held_out[:width], Path(args.out) / "07_grid.png")
    running.unlink(missing_ok=True)


def dry_run(args, methods):
    rewards = [Reward(name, args.preset, "meta", weights=False) for name in args.reward.split("+")]
    backbone, null = meta_backbone(args.backbone)
    sets = {}
    for i in (4, 12):  # the paper's choice for CLIP on SD 3.5 Medium, and a late one: the search decides
        sets[i] = [meta_value(backbone, null, reward, i, args.resolution)[0].requires_grad_(False) for reward in rewards]
        own_prefixes(sets[i])
    prefixes = [values[0].transformer for values in sets.values()]
    with torch.device("meta"):
        parameters = add_lora(backbone.transformer, args.rank, args.alpha)
    z = torch.empty(1, 16, args.resolution // 8, args.resolution // 8, device="meta")
    texts = [torch.empty(1, r.visual.output_dim, device="meta") for r in rewards]
    resident = [backbone.transformer, backbone.vae, *[r.model for r in rewards]]
    states = 16 * sum(p.numel() for p in parameters) / 2 ** 30  # gradient, AdamW's two moments and the average, float32
    counted = lambda call: np.array(count(call, [*resident, *sum(sets.values(), []), *prefixes]))  # (TFLOP, GiB kept)
    functions = lambda values, checkpointing: step_functions(backbone, rewards, values, null, texts, checkpointing)
    velocity, base, clean = functions([], False)
    steps = steps_cost(counted, velocity, base, z, args.regularise)
    again = counted(lambda: functions([], True)[0](z, torch.ones(1, device="meta"))) - [0, steps(1, 1)[1]]  # what checkpointing adds for each kept step
    score = {i: gradient_cost(counted, functions(values, False)[2] if values else clean, z.clone().requires_grad_()) for i, values in [(None, []), *sets.items()]}
    cases = []
    for name, m in methods.items():
        for i, checkpointing in [(i, c) for i in (sets if m["stops"] else (None,)) for c in (False, True) if c or name != "alignprop"]:
            mean = sum(m["stops"] or (args.steps, args.steps)) / 2, m["keep"] or args.steps / 2
            cost = lambda stop, keep: steps(stop, keep) + checkpointing * keep * again + score[i]
            tflop, saved = cost(*mean)[0], cost(args.steps, m["keep"] or args.steps - 1)[1] * args.batch
            models = resident + ([*sets[i], sets[i][0].transformer] if i else [])
            cases.append(dict(method=name + (f", i = {i}" if i else "") + ", checkpointing" * checkpointing, unit="sample", tflop=tflop, saved_gib=saved,
                              peak_gib=gib(*models) + states + saved, n=args.batch * args.accumulate * (args.updates or 0)))
    report_dry_run(args, "07_draft", cases, resident[1:], [backbone.transformer])


if __name__ == "__main__":
    main(parse_args())
