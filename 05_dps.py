"""Stage 05 -- guided sampling: plain, standard DPS and DPS with the value, from the same noises.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.2, Table 1, App. D.2, Eqs. (4), (11), (38), (39).
        A step of size d = t - t_next, u the velocity with CFG, nu = 3 t^2:
            z += d (-u + nu^2/2 score) + nu sqrt(d) noise + d (t/(1-t) + nu^2/2) c grad V(z_t)
        flow              no guidance
        tweedie           standard DPS, V = r(D(z - t u)): through reward, decoder and denoiser
        stitchvm          V the value model, whose prefix is resumed as CFG's null half [D10]
        stitchvm+tweedie  stitchvm above sigma --handover, tweedie from there down
        A row for each strength c; the last takes both lists in step, as far as the shorter goes.
Reads   value.pt (03) of each reward of a sum; prompts
Writes  out/05_dps.json, with the scores of each prompt; out/05_strength.png; out/05_grid.png;
        with --save-images out/05_images/<method and strengths>/ in GenEval's layout; while it
        runs 05_dps.parts/, a file for each batch of prompts, where --resume goes on
Run     python 05_dps.py
        python 05_dps.py --strengths-tweedie 10 20 40 --strengths-stitchvm 10 20 40
        python 05_dps.py --guide-to 0.5 --out DIR --value FILE       # above sigma .5 only
Departs from the paper: the first step is unguided in form (39), for t/(1-t) is infinite at t = 1;
        the last adds no noise; strengths and the miniature's unit guidance [D11], its --shift 1.
        Peak memory is the GPU allocator's; on the CPU what autograd keeps in a step of one sample.
"""

import argparse
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (
    COUNT,
    FINITE,
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
    load_prompts,
    load_values,
    mean_and_error,
    now,
    once,
    parse_stage,
    print_table,
    save_table,
    score_images,
    sde_step,
    shares_prefix,
    stage_parser,
    timing,
    tweedie,
    value_files,
    within,
    write_images,
)

# flags that --resume may change
FREE = ("out", "device", "value", "scorers", "save_images", "resume", "restart", "compile")
FREE += ("offload",)
METHODS = ("flow", "tweedie", "stitchvm", "stitchvm+tweedie")
NU = {"sde": lambda t: 3 * t * t, "ode": lambda t: 0.0}
MINI = dict(prompts="tests/mini/data/drawbench.txt", limit=32, resolution=64, steps=40, batch=16)
MINI |= dict(shift=1.0, guidance="unit", strengths_tweedie=[20], strengths_stitchvm=[40])
MINI |= dict(scorers=["clip", "dfn-clip", "hpsv2", "aesthetic", "judge"])
PAPER = dict(resolution=1024, steps=100, batch=1, guidance="exact", scorers=["clip", "hpsv2"])
PAPER |= dict(strengths_tweedie=[1, 3, 10, 25, 50], strengths_stitchvm=[50, 100, 200, 350, 700])
PRESETS = {"mini": MINI, "24gb": PAPER | dict(resolution=512, checkpointing=True), "paper": PAPER}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    several = partial(add, nargs="+")
    several("--methods", default=list(METHODS), choices=METHODS, help="a row for each strength")
    several("--value", metavar="FILE", help="value models, one for each reward of the sum")
    add("--prompts", help="a file of load_prompts: text, JSON, JSON lines, a table")
    add("--limit", type=COUNT, help="use this many of them at most")
    add("--scorers", nargs="*", help="rewards that judge, too")
    add("--save-images", action="store_true", help="write the images of every row")
    several("--strengths-tweedie", type=FINITE, metavar="C", help="c of tweedie, a row each")
    several("--strengths-stitchvm", type=FINITE, metavar="C", help="c of stitchvm")
    add("--guidance", choices=("exact", "constant", "unit"), help="(39), d c grad, or of unit norm")
    add("--guide-from", type=SHARE, default=1.0, help="guide at sigma up to this")
    add("--guide-to", type=SHARE, default=0.0, help="and above this")
    add("--handover", type=SHARE, default=0.25, help="sigma where tweedie takes over from stitchvm")
    add("--steps", type=within(int, 2), help="of the sampler (D.2: 100)")
    add("--sampler", choices=tuple(NU), default="sde", help="nu = 3 t^2, or 0")
    add("--shift", type=within(float, 0.01), help="of the noise levels; None: the scheduler's own")
    add("--cfg", type=FINITE, help="None: 4.5; 1 for FLUX, which is distilled")
    add("--batch", type=COUNT, help="samples at a time; their noises do not depend on it")
    switch = argparse.BooleanOptionalAction
    add("--checkpointing", action=switch, default=False, help="of tweedie: less memory, more work")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    add("--offload", action="store_true", help="blocks stay on the CPU and visit: a small card")
    add("--resume", action="store_true", help="go on from <out>/05_dps.parts")
    add("--restart", action="store_true", help="drop what an unfinished run left there")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
# from common: clean_reward, joint_value, sde_step, tweedie
def tweedie_gradient(velocity, decode, rewards, texts, z, sigma):
    """Standard DPS at z (B, C, h, w), sigma (B,): u, V = r(D(z - t u)) (B,) and dV/dz."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = velocity(z, sigma)
        V = clean_reward(rewards, texts, decode(tweedie(z, u, sigma)))
        V.sum().backward()  # samples do not mix, so each gets its own gradient
    return u.detach(), V.detach(), z.grad


def stitchvm_gradient(velocity, values, texts, z, sigma, share=None):
    """u, V (B,) and dV/dz of the values alone at z (B, C, h, w), sigma (B,).

    share: the denoiser's transformer, if it is to resume the values' prefix as its null half.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        V, states = joint_value(values, z, sigma, texts)
        V.sum().backward()
    with torch.no_grad():
        u = velocity(z.detach(), sigma, prefix=states.get(id(share)))
    return u, V.detach(), z.grad


def guidance(grad, t, t_next, c, form="exact", nu=lambda t: 3 * t * t):
    """What grad = dV/dz (B, ...) at strength c adds to z in a step from t to t_next, floats.

    d = t - t_next. exact: d (t/(1-t) + nu^2/2) c grad (39), 0 at t = 1; constant: d c grad;
    unit: d c grad / |grad|, a norm for each sample.
    """
    scale = (t - t_next) * c
    if form == "exact":
        scale *= t / (1 - t) + 0.5 * nu(t) ** 2 if t < 1 else 0.0
    elif form == "unit":
        grad = F.normalize(grad.flatten(1), dim=1).view_as(grad)
    return scale * grad


def sample(z, noises, grid, velocity, guides, form="exact", nu=lambda t: 3 * t * t):
    """z_0 (B, ...) from z (B, ...) at t = 1, under torch.no_grad().

    grid: steps + 1 noise levels, floats from 1 to 0. For each step noises has (B, ...) and guides
    (gradient, c) or (None, 0). velocity(z, sigma) is u, gradient(z, sigma) is (u, V, dV/dz).
    """
    for t, t_next, noise, (gradient, c) in zip(grid[:-1], grid[1:], noises, guides, strict=True):
        sigma = torch.full((len(z),), t, device=z.device)
        move = 0.0
        if gradient is None:
            u = velocity(z, sigma)
        else:
            u, _, grad = gradient(z, sigma)
            move = guidance(grad, t, t_next, c, form, nu)
        z = sde_step(z, u, t, t_next, noise.to(z), nu) + move
    return z


# ---- to here ----


def plan(args, grid):
    """{name: (keys of the row, guide (kind, c) of each step)}; the kind is flow for none."""
    lists = dict(tweedie=args.strengths_tweedie, stitchvm=args.strengths_stitchvm, flow=[0.0])
    keys = ("method", "strength", "strength_tweedie")
    runs = {}
    for method in (m for m in METHODS if m in args.methods):
        kinds = method.split("+")
        for strengths in zip(*(lists[kind] for kind in kinds), strict=False):
            pairs = list(zip(kinds, strengths, strict=True))
            guides = [pairs[0 if t > args.handover else -1] for t in grid[:-1]]
            for k, t in enumerate(grid[:-1]):
                if not args.guide_from >= t > args.guide_to:
                    guides[k] = ("flow", 0.0)
            row = dict(zip(keys, (method, *strengths), strict=False))
            runs["_".join([method, *map("{:g}".format, strengths)])] = (row, guides)
    return runs


def load(args):
    """What the rows share: models, prompts, noise levels."""
    rows = load_prompts(args.prompts, args.limit)
    if len(rows) < 2:
        fail(f"{len(rows)} prompts in {args.prompts}: a standard error needs two at least")
    names = args.reward.split("+")
    files = value_files(args, names) if any("stitchvm" in m for m in args.methods) else []
    dtype = getattr(torch, args.dtype)
    backbone = Backbone(args.backbone, args.preset, args.device, dtype, args.compile, args.offload)
    backbone.set_shift(args.shift)
    run = SimpleNamespace(backbone=backbone, device=backbone.device, rows=rows)
    run.prompts = [row["prompt"] for row in rows]
    embedded = backbone.prompts(["", *run.prompts], args.out)
    run.null = [v[:1].to(run.device) for v in embedded]
    run.condition = [v[1:] for v in embedded]
    run.rewards = [Reward(name, args.preset, args.device, dtype) for name in names]
    run.texts = [reward.text(run.prompts) for reward in run.rewards]
    valued = run.rewards[: len(files)]
    run.values, run.artifacts = load_values(files, backbone, valued, args.resolution)
    cfg = backbone.cfg if args.cfg is None else args.cfg
    more = dict(null=run.null, cfg=cfg, checkpointing=args.checkpointing)
    run.velocity = partial(backbone.velocity, **more)
    run.share = shares_prefix(run.values, backbone, run.null, cfg) and backbone.transformer
    for value in run.values:
        if value.transformer is run.share:
            value.null = run.null
    if args.checkpointing:
        backbone.vae.enable_gradient_checkpointing()
    run.grid = backbone.grid(args.steps, args.resolution)
    run.shape = backbone.latent_shape(args.resolution)
    run.spec = {k: v for k, v in vars(args).items() if k not in FREE}
    run.spec |= dict(prompts=digest(run.prompts), values=[a["id"] for a in run.artifacts])
    run.spec |= fingerprints(backbone.transformer, run.rewards, 1)
    return run


def step_functions(run, rows):
    """velocity(z, sigma) and {kind: gradient(z, sigma), or None} of a slice of the prompts."""
    condition = [v[rows].to(run.device) for v in run.condition]
    texts = [t if t is None else t[rows] for t in run.texts]
    velocity = partial(run.velocity, condition=condition)
    standard = partial(tweedie_gradient, velocity, run.backbone.decode, run.rewards, texts)
    stitched = partial(stitchvm_gradient, velocity, run.values, texts, share=run.share)
    return velocity, {"flow": None, "tweedie": standard, "stitchvm": stitched}


def noise(args, shape, prompts):
    """(steps + 1, B, *shape), standard normal; each prompt has a stream, at any batch size."""
    streams = [generator(args.seed, "report", n) for n in prompts]
    return torch.stack([torch.randn(args.steps + 1, *shape, generator=g) for g in streams], 1)


def sample_batch(run, args, runs, prompts):
    """{name: what each of the runs gives} of a range of prompts, from the same noises."""
    velocity, gradients = step_functions(run, slice(prompts.start, prompts.stop))
    noises = noise(args, run.shape, prompts).to(run.device)
    found = {}
    for name, (_, guides) in runs.items():  # in turn: a busy machine falls on all of them
        guides = [(gradients[kind], c) for kind, c in guides]
        found[name] = sample_run(run, args, velocity, guides, noises)
    return found


def sample_run(run, args, velocity, guides, noises):
    """Images uint8 (B, 3, H, W), failed (B,), seconds a sample and peak bytes."""
    is_cuda = run.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    began = now(run.device)
    form = args.guidance, NU[args.sampler]
    z = sample(noises[0], noises[1:], run.grid, velocity, guides, *form)
    failed = ~z.flatten(1).isfinite().all(1)
    x = run.backbone.decode(z.nan_to_num(0.0, 0.0, 0.0))
    seconds = (now(run.device) - began) / len(z)
    peak = torch.cuda.max_memory_allocated(run.device) if is_cuda else 0
    images = (x * 255).round().to(torch.uint8).cpu()
    return dict(images=images, failed=failed.cpu(), seconds=seconds, peak=peak)


def kept_for_backward(step, weights=()):
    """Bytes that autograd keeps while step() runs, without the weights of these modules."""
    saved = {}

    def save(t):  # the storage is held on to: a freed one's address would be used again
        saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        step()
    for t in (t for m in weights for t in (*m.parameters(), *m.buffers())):
        saved.pop(t.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())


def costs(run, kinds):
    """{kind: (GFLOP, bytes that autograd keeps)} of a step of one sample, and of decoding it."""
    velocity, gradients = step_functions(run, slice(0, 1))
    point = [torch.full(shape, 0.5, device=run.device) for shape in ((1, *run.shape), (1,))]
    steps = {kind: partial(gradients[kind] or velocity, *point) for kind in kinds}
    steps["decode"] = partial(run.backbone.decode, point[0])
    frozen = [run.backbone.transformer, run.backbone.vae, *(r.visual for r in run.rewards)]
    frozen += [module for v in run.values for module in (v, v.transformer)]
    return {k: (gflop(step), kept_for_backward(step, frozen)) for k, step in steps.items()}


def score(run, args, runs, batches):
    """{scorer: scores (runs, prompts)} and images (runs, prompts, 3, H, W); a failed sample, which
    is no image, has none."""
    images = torch.cat([b[name]["images"] for name in runs for b in batches])
    failed = torch.cat([b[name]["failed"] for name in runs for b in batches])
    if failed.all():
        fail("every sample became NaN or infinite: try --dtype float32, or lower strengths")
    given = images, run.prompts * len(runs)
    scores = score_images(args.scorers, run.rewards, args.preset, run.device, *given)
    scores = {k: x.masked_fill(failed, torch.nan).view(len(runs), -1) for k, x in scores.items()}
    return scores, images.unflatten(0, (len(runs), -1))


@torch.no_grad()
def main(args):
    if os.environ.get("RANK", "0") != "0":
        return  # one process does all of it
    if not args.guide_from > args.guide_to:
        fail("--guide-from must be above --guide-to")
    run = load(args)
    parts = Path(args.out, "05_dps.parts")
    keep_or_drop(parts, args)
    runs = plan(args, run.grid)
    cost = costs(run, {kind for _, guides in runs.values() for kind, _ in guides})
    batches = []
    for k in tqdm(range(0, len(run.rows), args.batch)):
        prompts = range(len(run.rows))[k : k + args.batch]
        work = partial(sample_batch, run, args, runs, prompts)
        batches.append(once(parts / f"{k:05d}.pt", "05_dps", run.spec, args.resume, work))
    run.values.clear()
    run.share = bool(run.share)
    run.backbone.free()  # the scorers need the room
    scores, images = score(run, args, runs, batches)
    for n, (name, (row, guides)) in enumerate(runs.items()):
        found = [batch[name] for batch in batches]
        failed = sum(int(b["failed"].sum()) for b in found)
        row |= dict(steps=args.steps, n=len(run.rows), failed=failed)
        row |= mean_and_error({k: x[n][x[n].isfinite()] for k, x in scores.items()})
        row["s_per_sample"], row["s_spread"] = timing([b["seconds"] for b in found])
        row["gflop_per_sample"] = cost["decode"][0] + sum(cost[kind][0] for kind, _ in guides)
        peaks = [b["peak"] for b in found] + [cost[kind][1] for kind, _ in guides]
        row["peak_memory_mb"] = max(peaks) / 1e6
        if args.save_images:
            row["images"] = f"05_images/{name}"
            write_images(Path(args.out, row["images"]), run.rows, images[n][:, None])
    rows = [row for row, _ in runs.values()]
    errors = {f"{k}_se" for k in scores if k != "reward"}
    print_table(rows, [k for k in rows[-1] if k not in errors | {"images"}])
    if max(row["s_spread"] for row in rows) > 0.5:
        print("warning: the machine was busy with something else: do not rely on the seconds")
    about = dict(shared=run.share, values=run.spec["values"])
    by_prompt = [{k: x[n].tolist() for k, x in scores.items()} for n in range(len(rows))]
    save_table(args, "05_dps", rows, **about, scores_of_prompts=by_prompt)
    draw_lines(rows, "strength", list(scores), "method", Path(args.out, "05_strength.png"))
    image_grid([x[:8] for x in images], list(runs), run.prompts[:8], Path(args.out, "05_grid.png"))
    shutil.rmtree(parts)


if __name__ == "__main__":
    main(parse_args())
