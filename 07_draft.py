"""Stage 07 -- DRaFT: finetune by the gradient of a reward, or of a value model where it stops.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.3, Table 3, App. D.3, Eqs. (63), (64)
            draft-K           -r(D(z_0)) + lam mean_k |u_theta(z_k) - u(z_k)|^2
            draft-K+stitchvm  -V(z_tau)  + the same; a rollout stops after --stop steps
            alignprop         as draft-K, K uniform in 1..T-1, its blocks checkpointed
        u_theta is the velocity with a LoRA, u without; T steps of the ODE, no guidance; gradient
        goes through the last K steps, over which the mean is taken (DRaFT+), and through the
        decoder and the reward, or through V, which reads a copy of its blocks without the LoRA.
Reads   value.pt (03) of each reward; prompts to train on, held-out prompts to report on
Writes  out/07_draft.json, 07_curves.png, 07_grid.png; in out/<method>/ the averaged LoRA, for
        diffusers and (adapter_*) for peft, and 07_draft.train, where --resume goes on
Run     python 07_draft.py
        python 07_draft.py --methods draft-1 draft-1+stitchvm --grid even --gflop 4000
        accelerate launch 07_draft.py --preset paper --train-prompts FILE --eval-prompts FILE
Departs from the paper: [3, 7] are nodes of the grid, one drawn for each micro-batch [D1]. The
        scheduler's last step starts at sigma .009 (shift 3); --grid even ends at .25. --ema is a
        guess. The miniature has no shift and is held harder to the base model.
"""

import argparse
import copy
import json
import math
import re
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
    value_files,
    within,
    write_images,
)

POLICIES = ("default", "average")  # adapters: trained; evaluated and written
METHODS = ("draft-1", "draft-3", "alignprop", "draft-1+stitchvm", "draft-3+stitchvm")
# flags that --resume may change
FREE = ("out", "device", "methods", "value", "updates", "gflop", "scorers", "save_images")
FREE += ("track", "checkpointing", "compile", "resume", "restart")
MINI = dict(resolution=64, shift=1.0, methods=["draft-3", "draft-3+stitchvm"], batch=16)
MINI |= dict(lr=5e-4, regularise=0.03, ema=0.9, gflop=2500, eval_every=32, eval_steps=20)
MINI |= dict(scorers=["clip", "dfn-clip", "hpsv2", "aesthetic", "judge"])
MINI |= dict(train_prompts="tests/mini/data/train_captions.json", train_limit=2000)
MINI |= dict(eval_prompts="tests/mini/data/drawbench.txt", eval_limit=200)
SMALL = dict(resolution=512, updates=500, batch=1, accumulate=64, checkpointing=True)
PAPER = SMALL | dict(reward="dfn-clip+hpsv2", batch=8, accumulate=16)
PRESETS = {"mini": MINI, "24gb": SMALL, "paper": PAPER}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="or another K")
    add("--value", nargs="+", metavar="FILE", help="value models, one for each reward of the sum")
    add("--train-prompts", help="text, JSON list, COCO's captions or GenEval's JSON lines")
    add("--train-limit", type=COUNT, help="of them, at most; SD 3.5: 2.7 MB each on the disk")
    add("--eval-prompts", help="held-out prompts; those among --train-prompts are not trained on")
    add("--eval-limit", type=COUNT, help="use this many of them at most")
    add("--eval-every", type=COUNT, default=50, help="updates between evaluations")
    add("--eval-steps", type=COUNT, default=40, help="Euler steps of an evaluation")
    add("--scorers", nargs="*", default=["clip", "hpsv2"], help="rewards that judge, too")
    add("--save-images", action="store_true", help="write the held-out images at every evaluation")
    add("--track", metavar="DIR", help="TensorBoard files of every evaluation, with images")
    add("--updates", type=COUNT, help="optimiser steps, at most")
    add("--gflop", type=POSITIVE, help="GFLOP of all processes together at which a method ends")
    add("--steps", type=within(int, 2), default=10, help="of a whole rollout")
    add("--grid", choices=("scheduler", "even"), default="scheduler", help="of noise levels")
    add("--shift", type=POSITIVE, help="of the noise levels; None: the scheduler's own")
    add("--stop", type=COUNT, nargs=2, default=[3, 7], help="steps after which +stitchvm stops")
    add("--regularise", type=within(float, 0), default=0.01, help="lam, of the distance to base")
    add("--rank", type=COUNT, default=32, help="of the LoRA")
    add("--alpha", type=POSITIVE, default=64, help="of the LoRA")
    add("--lr", type=POSITIVE, default=5e-5, help="of AdamW, without weight decay")
    add("--clip", type=POSITIVE, default=1.0, help="largest norm of the gradient")
    add("--ema", type=SHARE, default=0.99, help="decay of the average that is evaluated")
    add("--batch", type=COUNT, default=16, help="prompts of a micro-batch")
    add("--accumulate", type=COUNT, default=1, help="micro-batches of an update, of all processes")
    switch = argparse.BooleanOptionalAction
    add("--checkpointing", action=switch, default=False, help="less memory, a forward pass more")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    add("--resume", action="store_true", help="go on from <out>/<method>/07_draft.train")
    add("--restart", action="store_true", help="drop what an earlier run left there")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def rollout(velocity, z, grid, stop, keep):
    """z at grid[stop], by the ODE from z (B, ...) at grid[0], and the last `keep` steps.

    Each is (z_k, sigma (B,), u_k). Gradient goes through these only, also from one to the next.
    """
    steps = []
    frozen = torch.no_grad()(velocity)
    for k in range(stop):
        sigma = torch.full((len(z),), grid[k], device=z.device)
        u = velocity(z, sigma) if k >= stop - keep else frozen(z, sigma)
        steps.append((z, sigma, u))
        z = z + (grid[k + 1] - grid[k]) * u
    return z, steps[stop - keep :]


def distance_to_base(steps, base):
    """Mean over the steps of rollout() of |u - base(z, sigma)|^2; gradient through u only."""
    far = [(u - base(z.detach(), sigma)).square().mean() for z, sigma, u in steps]
    return sum(far) / len(far)


def draft_loss(velocity, base, score, z, grid, stop, keep, lam):
    """(63), (64) of noise z (B, C, h, w): -mean score(z_tau, tau) + lam distance; score, distance.

    velocity, base (z, sigma (B,)) -> (B, C, h, w), with and without the LoRA; score -> (B,).
    """
    z, steps = rollout(velocity, z, grid, stop, keep)
    # trap: before the score, for base switches adapters, which recomputed blocks must not see
    distance = distance_to_base(steps, base) if lam else z.new_zeros(())
    value = score(z, torch.full((len(z),), grid[stop], device=z.device)).mean()
    return lam * distance - value, value.detach(), distance.detach()


def draw_rollout(keep, stops, draw):
    """(stop, keep): stop uniform in stops = (first, last); keep None is uniform in 1..stop-1."""
    stop = int(torch.randint(stops[0], stops[1] + 1, (), generator=draw))
    if keep is None:
        keep = int(torch.randint(1, stop, (), generator=draw))
    return stop, keep


# ---- to here ----


def step_functions(backbone, rewards, values, condition, texts, checkpointing=False):
    """velocity, base and score of draft_loss: the values' sum, or the reward of decoded latents."""
    velocity = partial(backbone.velocity, condition=condition, checkpointing=checkpointing)

    @torch.no_grad()
    def base(z, sigma):
        # trap: no backward or checkpointed pass in between, which would drop gradients in silence
        backbone.transformer.disable_adapters()
        u = backbone.velocity(z, sigma, condition)
        backbone.transformer.enable_adapters()
        return u

    def value(z, sigma):
        return joint_value(values, z, sigma, texts)[0]

    def decoded(z, _):
        return clean_reward(rewards, texts, backbone.decode(z))

    return velocity, base, value if values else decoded


def own_prefixes(values):
    """Let values read a copy that gets no LoRA, of the same weights. Call it before add_lora."""
    memo = {}
    for v in values:
        memo |= {id(x): x for x in (*v.transformer.parameters(), *v.transformer.buffers())}
        v.__dict__["transformer"] = copy.deepcopy(v.transformer, memo)  # one copy for all


def add_lora(transformer, rank, alpha, name="default"):
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


def noise_levels(backbone, args):
    """The rollouts' grid, floats from 1 to 0."""
    config = backbone.scheduler.config
    if args.grid == "scheduler" or config.use_dynamic_shifting:  # FLUX's own is even
        return backbone.grid(args.steps, args.resolution)
    even = [1 - k / args.steps for k in range(args.steps)]
    return [config.shift * t / (1 + (config.shift - 1) * t) for t in even] + [0.0]


def settings(method, args):
    """keep and stops of draw_rollout, checkpointing, of a method's name."""
    match = re.fullmatch(r"(?:draft-([1-9]\d*)(\+stitchvm)?|alignprop)", method)
    if not match:
        fail(f"there is no method {method}: --methods takes {', '.join(METHODS)}, or another K")
    keep = match[1] and int(match[1])
    stops = args.stop if match[2] else None
    least = stops[0] if stops else args.steps
    if keep and keep > least:
        fail(f"{method} keeps {keep} steps of a rollout that may have {least} (--steps, --stop)")
    return dict(keep=keep, stops=stops, checkpointing=args.checkpointing or keep is None)


def check(args):
    """{method: its settings}; refuses what cannot be run, in one sentence."""
    low, high = args.stop
    methods = {name: settings(name, args) for name in args.methods}
    if any(m["stops"] for m in methods.values()) and not 1 <= low <= high <= args.steps:
        fail(f"--stop {low} {high} must lie in order between 1 and --steps {args.steps}")
    if args.updates is None and args.gflop is None:
        fail("--updates or --gflop must say when a method ends")
    return methods


def load(args, methods, accelerator):
    """What all methods use."""
    pool, held_out = split_prompts(args)
    processes = accelerator.num_processes
    if args.accumulate % processes:
        fail(f"--accumulate {args.accumulate} cannot be shared out to {processes} processes")
    if not pool or len(held_out) < max(2, processes):
        found = f"{len(pool)} prompts to train on and {len(held_out)} held out"
        fail(f"{found}: 1 and 2 are needed, and one held out for each process")
    names = args.reward.split("+")
    files = value_files(args, names) if any(m["stops"] for m in methods.values()) else []
    dtype = getattr(torch, args.dtype)
    backbone = Backbone(args.backbone, args.preset, args.device, dtype, args.compile)
    backbone.set_shift(args.shift)
    given = dict(accelerator=accelerator, backbone=backbone, device=backbone.device)
    run = SimpleNamespace(**given, methods=methods, pool=len(pool), held_out=held_out)
    run.prompts = [r["prompt"] for r in held_out]
    with accelerator.main_process_first():  # the others read its file
        run.condition = backbone.prompts(pool + run.prompts, args.out)
    run.rewards = [Reward(name, args.preset, args.device, dtype) for name in names]
    run.texts = [t if t is None else t.cpu() for t in (r.text(pool) for r in run.rewards)]
    run.values, artifacts = load_values(files, backbone, run.rewards[: len(files)], args.resolution)
    own_prefixes(run.values)
    run.spec = fingerprints(backbone.transformer, run.rewards, 1)
    if args.checkpointing:
        backbone.vae.enable_gradient_checkpointing()
    torch.manual_seed(args.seed)
    run.lora = {n: add_lora(backbone.transformer, args.rank, args.alpha, n) for n in POLICIES}
    backbone.transformer.set_adapter("default")  # only the last one added would be trained
    run.start = [p.detach().clone() for p in run.lora["default"]]
    run.shape = backbone.latent_shape(args.resolution)
    run.grid = noise_levels(backbone, args)
    run.spec |= {k: v for k, v in vars(args).items() if k not in FREE}
    run.spec |= dict(train_prompts=digest(pool), eval_prompts=digest(run.prompts))
    run.about = [dict(stage=a["stage"], id=a["id"]) for a in artifacts]
    size = f"{args.batch} prompts x {args.accumulate} micro-batches, {processes} processes"
    accelerator.print(f"an update: {size}; {len(pool)} prompts to train on")
    run.base = cache(partial(measure, run, args))  # one for all methods
    return run


def chosen(run, method, rows):
    """The step functions of a method for these training prompts."""
    condition = [v[rows].to(run.device) for v in run.condition]
    texts = [t if t is None else t[rows].to(run.device) for t in run.texts]
    values = run.values if run.methods[method]["stops"] else []
    given = values, condition, texts, run.methods[method]["checkpointing"]
    return step_functions(run.backbone, run.rewards, *given)


def costs(run, args, method, keep):
    """GFLOP of one sample: a step without gradient; the `keep` steps with it, score, backward."""
    functions = chosen(run, method, [0])
    z = torch.zeros(1, *run.shape, device=run.device)
    given = z, run.grid, keep, keep, args.regularise
    step = gflop(lambda: rollout(functions[0], z, run.grid, 1, 0))
    return step, gflop(lambda: draft_loss(*functions, *given)[0].backward())


def gradient(run, args, method, update):
    """Leave an update's gradient in p.grad; its rollouts' (stop, keep); loss, score, distance."""
    stops = run.methods[method]["stops"] or (args.steps, args.steps)
    drawn = []
    sums = torch.zeros(3, device=run.device)
    for k in range(args.accumulate):
        draw = generator(args.seed, "update", update, k)
        drawn.append(draw_rollout(run.methods[method]["keep"], stops, draw))
        if k % run.accelerator.num_processes != run.accelerator.process_index:
            continue  # another's
        prompts = torch.randint(run.pool, (args.batch,), generator=draw)
        z = torch.randn(args.batch, *run.shape, generator=draw).to(run.device)
        given = z, run.grid, *drawn[-1], args.regularise
        parts = torch.stack(draft_loss(*chosen(run, method, prompts), *given)) / args.accumulate
        parts[0].backward()
        sums += parts.detach()
    for p in run.lora["default"]:
        p.grad = run.accelerator.reduce(p.grad, "sum")
    return drawn, run.accelerator.reduce(sums, "sum")


def measure(run, args):
    """{scorer: (N,)} and uint8 images (N, 3, H, W) of the averaged LoRA on the held-out prompts."""
    run.backbone.transformer.set_adapter("average")
    draws = [generator(args.seed, "evaluate", k) for k in range(len(run.prompts))]
    noise = torch.stack([torch.randn(run.shape, generator=draw) for draw in draws])
    share = slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    condition = [v[run.pool :][share] for v in run.condition]
    grid = run.backbone.grid(args.eval_steps, args.resolution)
    part = evaluate(run.backbone, condition, noise[share], grid, args.batch)
    images = part.new_zeros(len(run.prompts), *part.shape[1:])
    images[share] = part
    images = run.accelerator.reduce(images, "sum").cpu()
    run.backbone.transformer.set_adapter("default")
    given = args.preset, run.device, images, run.prompts
    return score_images(args.scorers, run.rewards, *given), images


def report(run, args, state, method):
    """Add a point to the state: a row, rewards (N,) and images to show (n, 3, H, W)."""
    scores, images = measure(run, args) if state["update"] else run.base()
    first = torch.tensor(state["points"][0][1]) if state["points"] else scores["reward"]
    scores = scores | dict(gain=scores["reward"] - first)  # same noises: paired
    row = dict(method=method) | {k: state[k] for k in ("update", "seconds", "gflop")}
    row |= mean_and_error(scores) | dict(n=len(images))
    values = "  ".join(f"{name} {row[name]:.4f}" for name in scores)
    run.accelerator.print(f"{method} update {row['update']}: {values}")
    if state["points"]:
        means = state["sums"] / (row["update"] - state["points"][-1][0]["update"])
        row |= zip(("loss", "score", "distance", "gradient"), means.tolist(), strict=True)
        state["sums"] = torch.zeros(4)
    if args.save_images:
        row["images"] = f"07_images/{method}/{row['update']}"
    if run.accelerator.is_main_process:
        track(args.track, method, row["update"], row, images[:6])
        if args.save_images:
            write_images(Path(args.out, row["images"]), run.held_out, images[:, None])
    state["points"].append((row, scores["reward"].tolist(), images[:6]))


def train(method, run, args):
    """The reports of a method, trained to its end from its checkpoint, if there is one."""
    path = Path(args.out, method, "07_draft.train")
    is_main = run.accelerator.is_main_process
    spec = run.spec | dict(values=run.about if run.methods[method]["stops"] else [])
    state = dict(update=0, seconds=0.0, gflop=0.0, points=[], sums=torch.zeros(4))
    state |= dict(optimizer=None, lora={name: run.start for name in POLICIES})
    if args.resume and path.exists():
        state = load_artifact(path, spec, "07_draft.py")["data"]
    for name in POLICIES:
        torch._foreach_copy_([p.data for p in run.lora[name]], state["lora"][name])
    state["lora"] = {name: [p.detach() for p in run.lora[name]] for name in POLICIES}  # views
    optimizer = torch.optim.AdamW(run.lora["default"], lr=args.lr, weight_decay=0.0)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    else:
        report(run, args, state, method)
    work = cache(partial(costs, run, args, method))
    bar = tqdm(desc=method, initial=state["update"], total=args.updates, disable=not is_main)
    while not ended(state, args):
        began = now(run.device)
        optimizer.zero_grad()
        drawn, sums = gradient(run, args, method, state["update"])
        norm = torch.nn.utils.clip_grad_norm_(run.lora["default"], args.clip)
        sums = torch.cat([sums, norm[None]]).cpu()
        state["seconds"] += now(run.device) - began
        optimizer.step()
        largest = torch.nn.utils.get_total_norm(run.lora["default"], math.inf)
        if not (sums.isfinite().all() and largest < 100):  # a LoRA's are of order 1
            good = path if path.exists() else "the base model"
            why = f"update {state['update'] + 1} of {method} gave NaN, inf or weights above 100"
            fail(f"{why}; the last good state is {good}: try a lower --lr with --restart")
        decay = min(args.ema, (1 + state["update"]) / (10 + state["update"]))
        get_ema_multi_avg_fn(decay)(run.lora["average"], run.lora["default"], None)
        for stop, keep in drawn:
            step, rest = work(keep)
            state["gflop"] += args.batch * ((stop - keep) * step + rest)
        state["update"] += 1
        state["sums"] = state["sums"] + sums
        bar.update()
        if state["update"] % args.eval_every == 0 or ended(state, args):
            report(run, args, state, method)
        if is_main:
            save_training(path, "07_draft", spec, state | dict(optimizer=optimizer.state_dict()))
    if is_main:
        save_lora(run.backbone, path.parent, "average")
    return state["points"]


def ended(state, args):
    return any(n and state[k] >= n for k, n in (("update", args.updates), ("gflop", args.gflop)))


def main(args):
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    methods = check(args)
    wait = InitProcessGroupKwargs(timeout=timedelta(days=1))  # one process encodes all prompts
    accelerator = Accelerator(cpu=args.device == "cpu", kwargs_handlers=[wait])
    files = [Path(args.out, method, "07_draft.train") for method in methods]
    if args.resume and not any(file.exists() for file in files):
        fail(f"{files[0]} does not exist; start without --resume")
    for file in files if not args.restart else ():
        keep_or_drop(file, args)
    run = load(args, methods, accelerator)
    for file in files if args.restart and accelerator.is_main_process else ():
        keep_or_drop(file, args)  # now that the run is known to start
    points = sum((train(method, run, args) for method in methods), [])
    if not run.accelerator.is_main_process:
        return
    rows, rewards, shown = zip(*points, strict=True)
    print_table(rows, [k for k in rows[-1] if not k.endswith("_se")])
    save_table(args, "07_draft", rows, rewards_of_prompts=rewards, grid=run.grid, values=run.about)
    scores = [k for k in rows[0] if f"{k}_se" in rows[0]]
    draw_lines(rows, "gflop", scores, "method", Path(args.out, "07_curves.png"))
    labels = [f"{r['method']}, update {r['update']}" for r in rows]
    image_grid(shown, labels, run.prompts[:6], Path(args.out, "07_grid.png"))


if __name__ == "__main__":
    main(parse_args())
