"""Stage 05 -- guided sampling: plain, standard DPS and DPS with the value model, side by side from the same noises.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.2, Table 1, App. D.2, Eqs. (4), (11), (38), (39). A step of size d = t - t_next > 0:
            z += d (-u + nu^2/2 score) + nu sqrt(d) w  +  d (t/(1-t) + nu^2/2) c grad V(z_t),      nu = 3 t^2, u the velocity with CFG
        flow              no guidance
        tweedie           standard DPS, V = r(D(z_t - t u)): the gradient passes reward, VAE decoder and both halves of the guided denoiser
        stitchvm          V the value model: the gradient passes its first i blocks, the stitch and the reward's tail
        stitchvm+tweedie  stitchvm above --handover, tweedie for the last steps, with the strength c chosen for each
        t/(1-t) is infinite at t = 1, where the exact V is constant: its gradient, 0 but for the network's error, would be multiplied by
        infinity. So the first step goes unguided (exact form only), which on Gaussian data costs an error of O(1 / steps).
        --guidance constant leaves (39)'s factor out; unit also divides each sample's gradient by its norm, so one list of c serves every reward.
        With CFG the value's prefix at (z_t, t) is the first i blocks of the denoiser's null half: it is resumed, not computed again. Not so
        for cfg 1 and FLUX, whose denoiser never sees the null text.
        The rule for c: of the strengths at which no held-out metric (every scorer but the guiding reward) is below plain sampling's by more
        than --tolerance standard errors of the paired difference on the tuning prompts, the one with the largest mean reward; if there is
        none, the smallest. It is then run on the report prompts. Two errors and not one, for five metrics are looked at, and one error would turn
        away three in five strengths that do no harm; what a few prompts do not show passes. stitchvm+tweedie takes both methods' strengths, unswept.
        'tweedie, equal time' is tweedie with as many steps as take stitchvm's time on the tuning prompts, its strength swept at so many.
Reads   out/value.pt (03); for a joint reward a+b each one's own, runs/<preset>/<backbone>_<reward>/value.pt, or --value FILE FILE; prompts
Writes  out/05_dps.json, out/05_strength.png (the sweep), out/05_grid.png (images), out/05_value.png (V along sampling, agreement of the gradients);
        with --save-images out/images/<method>/ in GenEval's layout
Run     python 05_dps.py                                                         # the miniature, under three minutes on two cores
        python 05_dps.py --guide-from 0.5 --out DIR --value FILE                 # guidance at sigma <= .5 only; --guide-to 0.5: above only
        python 05_dps.py --reward clip+hpsv2 --limit 16
Departs from the paper: the miniature takes 40 steps and unit guidance. The paper sweeps [.5, 7] (StitchVM) and [.01, .5] (DPS) without saying
        what c multiplies; `24gb` and `paper` take (39) with these ranges times 100, as of a cosine in per cent, not measured. c is chosen on
        prompts that are not the reported ones [D11]. The last step adds no noise. On the CPU memory is what autograd keeps in one step of one
        sample, on a GPU the allocator's peak.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (Backbone, Reward, clean_reward, count, encode_prompts, fail, generator, gflop, gib, joint_value, kept_for_backward, load_prompts,
                    load_values, mean_and_error, meta_backbone, meta_value, now, parse_stage, print_table, report_dry_run, reward_and_scorers, save_figure,
                    save_image_grid, save_table, score_images, sde_step, shares_prefix, stage_parser, tweedie, value_files, write_geneval)

METHODS = ("flow", "tweedie", "stitchvm", "stitchvm+tweedie")
EQUAL = "tweedie, equal time"
PUBLISHED = dict(strengths_tweedie=[1, 3, 10, 25, 50], strengths_stitchvm=[50, 100, 200, 350, 700], guidance="exact", steps=100, batch=1)
PRESETS = {"mini": dict(prompts="tests/mini/data/drawbench.txt", tune_prompts="tests/mini/data/tune/drawbench.txt", limit=32, tune_limit=12, resolution=64, steps=40,
                        batch=16, guidance="unit", strengths_tweedie=[10, 20, 40], strengths_stitchvm=[10, 20, 40], equal_time=True),
           "24gb": dict(resolution=512, **PUBLISHED), "paper": dict(resolution=1024, **PUBLISHED)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--prompts", help="prompts to report on: a text file, a JSON list or GenEval's JSONL")
    p.add_argument("--tune-prompts", help="prompts on which the strengths are swept")
    p.add_argument("--limit", type=int, help="use this many of --prompts at most")
    p.add_argument("--tune-limit", type=int, help="use this many of --tune-prompts at most")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--steps", type=int, help="sampler steps (App. D.2: 100)")
    p.add_argument("--cfg", type=float, help="classifier-free guidance (default: 4.5; 1 for FLUX, which is distilled)")
    p.add_argument("--sampler", choices=("sde", "ode"), default="sde", help="sde: nu = 3 t^2; ode: nu = 0")
    p.add_argument("--guidance", choices=("exact", "constant", "unit"), help="what multiplies d c: (39)'s factor times grad V, grad V, or grad V / |grad V|")
    p.add_argument("--strengths-tweedie", type=float, nargs="+", metavar="C", help="of 'tweedie', swept on --tune-prompts; a single one is taken as it is")
    p.add_argument("--strengths-stitchvm", type=float, nargs="+", metavar="C", help="of 'stitchvm'")
    p.add_argument("--tolerance", type=float, default=2.0, help="standard errors by which a held-out metric may fall")
    p.add_argument("--guide-from", type=float, default=1.0, help="guide at sigma up to this")
    p.add_argument("--guide-to", type=float, default=0.0, help="and above this")
    p.add_argument("--handover", type=float, default=0.25, help="sigma from which down 'stitchvm+tweedie' is guided by tweedie")
    p.add_argument("--equal-time", action=argparse.BooleanOptionalAction, default=False, help="after a sweep, one more row: tweedie with as many steps as stitchvm's time allows")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of denoiser and decoder for tweedie: less memory, more time")
    p.add_argument("--value", nargs="+", metavar="FILE", help="value models, one for each reward of the sum")
    p.add_argument("--batch", type=int)
    p.add_argument("--save-images", action="store_true")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def tweedie_gradient(velocity, decode, rewards, texts, z, sigma):
    """Standard DPS: u, V = r(D(z - t u)) (B,) and dV/dz, with the graph of decoder and denoiser."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = velocity(z, sigma)
        V = clean_reward(rewards, texts, decode(tweedie(z, u, sigma)))
        V.sum().backward()  # a sum: samples do not mix, so each gets its own gradient
    return u.detach(), V.detach(), z.grad


def stitchvm_gradient(velocity, values, texts, z, sigma, share=None):
    """StitchVM: u, V (B,) and dV/dz of the value model alone; the denoiser keeps no graph. share: its transformer, if it is to resume the values' prefix as its null half."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        V, states = joint_value(values, z, sigma, texts)
        V.sum().backward()
    with torch.no_grad():
        prefix = {k: v.detach() if torch.is_tensor(v) else v for k, v in states[id(share)].items()} if share is not None else None
        u = velocity(z.detach(), sigma, prefix=prefix)
    return u, V.detach(), z.grad


def guidance(grad, t, t_next, c, form="exact", nu=lambda t: 3 * t * t):
    """What grad = dV/dz (B, ...) adds to z in a step from t to t_next, d = t - t_next (floats), at strength c.

    exact: d (t/(1-t) + nu^2/2) c grad (39), nothing at t = 1; constant: d c grad; unit: d c grad / |grad|, a norm for each sample.
    """
    d = t - t_next
    if form == "unit":
        return d * c * F.normalize(grad.flatten(1), dim=1).view_as(grad)
    if form == "constant":
        return d * c * grad
    return d * c * (t / (1 - t) + 0.5 * nu(t) ** 2) * grad if t < 1 else torch.zeros_like(grad)


def guide_at(guides, t):
    """The first of the guides (gradient, c, from, to) whose window holds t, from >= t > to; None if there is none."""
    return next((g for g in guides if g[2] >= t > g[3]), None)


def sample(z, noises, grid, velocity, guides=(), form="exact", nu=lambda t: 3 * t * t, keep=()):
    """From z (B, ...) at t = 1 to z_0, and {node: z_t} for the nodes in keep.

    noises yields (B, ...) for each step; grid holds the noise levels, floats from 1 to 0; velocity(z, sigma) and the guides' gradient(z, sigma) -> (u, V, dV/dz).
    """
    kept = {}
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        if k in keep:
            kept[k] = z
        guide, sigma = guide_at(guides, t), torch.full((len(z),), t, device=z.device)
        if guide is None:
            u, move = velocity(z, sigma), 0.0
        else:
            u, _, grad = guide[0](z, sigma)
            move = guidance(grad, t, t_next, guide[1], form, nu)
        z = sde_step(z, u, t, t_next, next(noises).to(z), nu) + move
    return z, kept


def choose_strength(swept, plain, guiding, tolerance=2.0):
    """The docstring's rule. swept {c: {metric: (n,)}} and plain {metric: (n,)} of the same prompts and noises, each with the key 'reward'; guiding: names that are not held out."""
    def harmless(scores):
        gaps = [scores[k] - plain[k] for k in plain if k != "reward" and k not in guiding]
        return all(float(g.mean()) >= -tolerance * float(g.std()) / len(g) ** 0.5 for g in gaps)
    allowed = [c for c in swept if harmless(swept[c])]
    return max(allowed, key=lambda c: float(swept[c]["reward"].mean())) if allowed else min(swept)
# ---- to here ----


def step_functions(backbone, rewards, values, condition, null, texts, cfg, share, checkpointing=False):
    """velocity(z, sigma) and {kind: gradient(z, sigma) -> (u, V, dV/dz)} for one batch of prompts; 'unprompted' is tweedie without the prompt, as V is."""
    velocity = partial(backbone.velocity, condition=condition, null=null, cfg=cfg)
    return velocity, {"tweedie": partial(tweedie_gradient, partial(velocity, checkpointing=checkpointing), backbone.decode, rewards, texts),
                      "unprompted": partial(tweedie_gradient, partial(backbone.velocity, condition=null), backbone.decode, rewards, texts),
                      "stitchvm": partial(stitchvm_gradient, velocity, values, texts, share=backbone.transformer if share else None)}


def noise_streams(seed, split, rows, shape):
    """Standard normal (B, ...) without end; every sample has a stream of its own, so all methods see the same noises at any batch size."""
    streams = [generator(seed, split, n) for n in rows]
    while True:
        yield torch.stack([torch.randn(shape, generator=g) for g in streams])


def cfg_of(args, transformer):
    return args.cfg if args.cfg is not None else 1.0 if transformer.config.get("guidance_embeds") else 4.5


def measure(step, weights):
    """GFLOP of one step, and the MB that autograd keeps in it."""
    with kept_for_backward(weights) as kept:
        step()
    return gflop(step, next(weights[0].parameters()).device), sum(s.nbytes() for s in kept.values()) / 1e6


def peak_rss_mb():
    """The process' largest resident memory so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@torch.no_grad()
def main(args):
    if args.dry_run:
        return dry_run(args)
    names, device, nu = args.reward.split("+"), torch.device(args.device), (lambda t: 0.0) if args.sampler == "ode" else (lambda t: 3 * t * t)
    strengths = {kind: getattr(args, f"strengths_{kind}") for kind in ("tweedie", "stitchvm") if any(kind in m for m in args.methods)}
    sweep = any(len(cs) > 1 for cs in strengths.values())
    if not 1 >= args.guide_from > args.guide_to >= 0 or args.steps < 2:
        fail(f"--steps must be at least 2 and 1 >= --guide-from > --guide-to >= 0, not {args.steps}, {args.guide_from:g} and {args.guide_to:g}")
    if not args.prompts or sweep and not args.tune_prompts:
        fail("--prompts FILE is needed, and --tune-prompts FILE to choose among several strengths")
    splits = {"tune": load_prompts(args.tune_prompts)[:args.tune_limit] if sweep else [], "report": load_prompts(args.prompts)[:args.limit]}
    for split, rows in splits.items():
        if len(rows) < 2 and (sweep or split == "report"):
            fail(f"{len(rows)} prompts to {split} on: a standard error needs two at least")
    if repeated := {r["prompt"] for r in splits["tune"]} & {r["prompt"] for r in splits["report"]}:
        print(f"warning: {len(repeated)} of the prompts to report on are also tuned on")
    files = value_files(args, names) if "stitchvm" in strengths else []  # before anything that takes long

    backbone = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype))
    prompts = [r["prompt"] for rows in splits.values() for r in rows]
    embedded = encode_prompts(backbone, ["", *prompts], cache=args.out)
    null, embedded = [v[:1] for v in embedded], [v[1:] for v in embedded]
    rewards = [Reward(name, args.preset, device) for name in names]
    texts = [reward.encode_text(prompts) if reward.uses_text else None for reward in rewards]
    values, artifacts = load_values(files, backbone, rewards, args.resolution)
    cfg = cfg_of(args, backbone.transformer)
    share = shares_prefix(values, backbone, null, cfg)
    for value in values if share else ():
        if value.transformer is backbone.transformer:
            value.null = null
    if args.checkpointing:
        backbone.vae.enable_gradient_checkpointing()
    shape = (backbone.vae.config.latent_channels, args.resolution // 8, args.resolution // 8)
    grid_of = lambda steps: backbone.grid(steps, torch.empty(1, *shape)).tolist()
    of = lambda rows: [t if t is None else t[rows] for t in texts]
    functions = lambda rows: step_functions(backbone, rewards, values, [v[rows] for v in embedded], null, of(rows), cfg, share, args.checkpointing)
    frozen = [backbone.transformer, backbone.vae, *[r.model for r in rewards], *values, *[v.transformer for v in values]]

    velocity, gradients = functions(slice(0, 1))
    z, sigma = torch.randn(1, *shape).to(device), torch.full((1,), 0.5, device=device)
    cost = {kind: measure(lambda: step(z, sigma), frozen) for kind, step in {"flow": velocity, **{k: gradients[k] for k in strengths}}.items()}
    cost["decode"] = measure(lambda: backbone.decode(z), frozen)

    def new_run(method, c, steps=args.steps):
        """A row to be: guides are (kind, c, from, to)."""
        if method == "stitchvm+tweedie":
            guides = [("stitchvm", c, args.guide_from, args.handover), ("tweedie", chosen["tweedie"], min(args.guide_from, args.handover), args.guide_to)]
        else:
            guides = [] if method == "flow" else [(method.split(",")[0], c, args.guide_from, args.guide_to)]
        guides = [(kind, c, top, max(bottom, args.guide_to)) for kind, c, top, bottom in guides]
        return dict(method=method, strength=c, steps=steps, guides=guides, seconds=0.0, peak=0, failed=0, images=[], V={})

    def sample_split(split, runs):
        """Batch by batch, every run in turn, so that whatever else the machine does falls on all of them; the images and times are left in the runs."""
        first, n, gradients_at = len(splits["tune"]) * (split == "report"), len(splits[split]), {}
        for k in tqdm(range(0, n, args.batch), desc=split):
            own = range(k, min(k + args.batch, n))
            rows = slice(first + own.start, first + own.stop)
            velocity, gradients = functions(rows)
            if k == 0:  # the first call at a batch size is slower: it belongs to nobody's time
                for step in (velocity, *[gradients[kind] for kind in strengths], lambda z, sigma: backbone.decode(z)):
                    step(torch.randn(len(own), *shape).to(device), torch.full((len(own),), 0.5, device=device))
            for run in runs:
                grid, noises = grid_of(run["steps"]), noise_streams(args.seed, split, own, shape)
                keep = range(0, run["steps"], max(1, run["steps"] // 20)) if split == "report" and values else ()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                began = now(device)
                z, kept = sample(next(noises).to(device), noises, grid, velocity, [(gradients[kind], *g) for kind, *g in run["guides"]], args.guidance, nu, keep)
                good = z.flatten(1).isfinite().all(1)
                x = backbone.decode(torch.where(good.view(-1, 1, 1, 1), z, 0.0))  # a sample that overflowed is scored as what it is, no image
                run["seconds"] += now(device) - began
                run["peak"] = max(run["peak"], torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
                run["failed"] += int((~good).sum())
                run["images"].append((x * 255).round().to(torch.uint8).cpu())
                for node, zt in kept.items():
                    sigma = torch.full((len(zt),), grid[node], device=device)
                    run["V"].setdefault(grid[node], []).append(joint_value(values, zt, sigma, of(rows))[0].cpu())
                    if k < 16 and run["method"] == "flow" and len(strengths) == 2:
                        gradients_at.setdefault(grid[node], []).append([gradients[kind](zt, sigma)[2].flatten(1).cpu() for kind in ("stitchvm", "tweedie", "unprompted")])
        images = [torch.cat(run["images"]) for run in runs]
        scorers = reward_and_scorers(rewards, args.preset, device)  # loaded here and freed, which leaves sampling its memory
        scores = [score_images(scorers, x, prompts[first:first + n], device=device) for x in images]
        agreement = []
        for t, pairs in gradients_at.items():
            a, b, c = (torch.cat(v) for v in zip(*pairs))
            ratio, ok = a.norm(dim=1) / b.norm(dim=1).clamp(min=1e-12), (a.isfinite() & b.isfinite() & c.isfinite()).all(1)
            if ok.sum() > 1:
                cosines = {"cosine": F.cosine_similarity(a, b)[ok], "cosine_unprompted": F.cosine_similarity(a, c)[ok]}
                agreement.append(dict(sigma=t, **mean_and_error(cosines | {"norm_ratio": ratio[ok]})))
        return images, scores, agreement

    def rows_of(split, runs, scores):
        """The table's rows, with ratios to plain sampling in the same run."""
        rows = []
        for run, s in zip(runs, scores):
            used = [(g or ["flow"])[0] for g in (guide_at(run["guides"], t) for t in grid_of(run["steps"])[:-1])]
            window = [args.guide_from, args.guide_to] if run["guides"] else None
            rows.append(dict(method=run["method"], strength=run["strength"], split=split, window=window, steps=run["steps"], n=len(s["reward"]), **mean_and_error(s),
                             s_per_sample=run["seconds"] / len(s["reward"]), gflop_per_sample=sum(cost[kind][0] for kind in used) + cost["decode"][0],
                             peak_memory_mb=run["peak"] / 1e6 if run["peak"] else max(cost[kind][1] for kind in used), failed=run["failed"]))
            if run["method"] == "stitchvm+tweedie":
                rows[-1]["strength_tweedie"] = chosen["tweedie"]
        for plain in [r for r in rows if r["method"] == "flow"]:
            for r in rows:
                r.update(time_of_flow=r["s_per_sample"] / plain["s_per_sample"], gflop_of_flow=r["gflop_per_sample"] / plain["gflop_per_sample"])
        return rows

    rows, chosen, fewer = [], {kind: cs[0] for kind, cs in strengths.items()}, None
    if sweep:
        runs = [new_run("flow", 0.0), *[new_run(kind, c) for kind, cs in strengths.items() for c in cs]]
        _, scores, _ = sample_split("tune", runs)
        if args.equal_time and len(strengths) == 2:  # a second call, now that it is known how long the others take
            spent = {kind: sum(run["seconds"] for run in runs if run["method"] == kind) / len(cs) for kind, cs in strengths.items()}
            fewer = max(2, round(args.steps * spent["stitchvm"] / spent["tweedie"]))
            again = [new_run(EQUAL, c, fewer) for c in strengths["tweedie"]]
            runs, scores = runs + again, scores + sample_split("tune", again)[1]
        rows += rows_of("tune", runs, scores)
        for kind in dict.fromkeys(run["method"] for run in runs[1:]):
            swept = {run["strength"]: s for run, s in zip(runs, scores) if run["method"] == kind}
            chosen[kind] = choose_strength(swept, scores[0], {Path(name).name for name in names}, args.tolerance)
    runs = [new_run(m, 0.0 if m == "flow" else chosen["stitchvm" if "stitchvm" in m else "tweedie"]) for m in METHODS if m in args.methods]
    if fewer:
        runs.append(new_run(EQUAL, chosen[EQUAL], fewer))
    images, scores, agreement = sample_split("report", runs)
    rows += rows_of("report", runs, scores)
    finite = lambda v: v[v.isfinite()]
    trajectory = [dict(method=run["method"], sigma=t, **mean_and_error({"V": finite(torch.cat(v))})) for run in runs for t, v in run["V"].items()]

    metrics = [k for k in scores[0] if k != "reward"]
    print_table(rows, ("method", "strength", "split", "steps", "n", "reward", "reward_se", *metrics,
                       "s_per_sample", "time_of_flow", "gflop_per_sample", "gflop_of_flow", "peak_memory_mb", "failed"))
    save_table(args, "05_dps", rows, chosen=chosen, shared=share, trajectory=trajectory, agreement=agreement, peak_rss_mb=peak_rss_mb(),
               values=[dict(stage=a["stage"], id=a["id"]) for a in artifacts])
    out, title = Path(args.out), f"{args.reward} + {args.backbone}, {args.sampler}, {args.guidance} guidance"
    if sweep:
        draw_strength([r for r in rows if r["split"] == "tune"], chosen, metrics, out / "05_strength.png", title)
    shown = min(8, len(images[0]))
    save_image_grid([x[:shown].float() / 255 for x in images], [run["method"] for run in runs], [r["prompt"] for r in splits["report"][:shown]], out / "05_grid.png")
    if trajectory:
        draw_value(trajectory, agreement, rows, out / "05_value.png", title)
    if args.save_images:
        for run, x in zip(runs, images):
            write_geneval(out / "images" / run["method"], splits["report"], [(v.float() / 255)[None] for v in x])


def dry_run(args):
    rewards = [Reward(name, args.preset, "meta", weights=False) for name in args.reward.split("+")]
    backbone, null = meta_backbone(args.backbone)
    cfg = cfg_of(args, backbone.transformer)
    z, sigma = torch.empty(1, 16, args.resolution // 8, args.resolution // 8, device="meta"), torch.empty(1, device="meta")
    texts = [torch.empty(1, r.visual.output_dim, device="meta") for r in rewards]
    functions = lambda values, share, checkpointing: step_functions(backbone, rewards, values, null, null, texts, cfg, share, checkpointing)
    weights, towers = [backbone.transformer, backbone.vae], [r.model for r in rewards]
    steps = {"flow": (torch.no_grad()(functions([], False, False)[0]), weights)}
    for checkpointing in (False, True):
        steps["tweedie" + ", checkpointing" * checkpointing] = functions([], False, checkpointing)[1]["tweedie"], weights + towers
    for i in (4, 12):  # the paper's choice for CLIP on SD 3.5 Medium, and a late one: the search decides
        values = [meta_value(backbone, null, reward, i, args.resolution)[0].requires_grad_(False) for reward in rewards]
        for share in (False, True) if cfg != 1 else (False,):
            steps[f"stitchvm, i = {i}" + ", shared" * share] = functions(values, share, False)[1]["stitchvm"], weights + values
    cases = []
    for method, (step, models) in steps.items():
        backbone.vae.enable_gradient_checkpointing() if "checkpointing" in method else backbone.vae.disable_gradient_checkpointing()
        tflop, saved = count(lambda: step(z, sigma), models)
        cases.append(dict(method=method, unit="step", tflop=tflop, saved_gib=saved, peak_gib=gib(*models) + saved, n=args.steps * 200))  # DrawBench's prompts
        cases[-1]["of_flow"] = tflop / cases[0]["tflop"]
    report_dry_run(args, "05_dps", cases, [*weights, *towers])


COLOURS = {"flow": "black", "tweedie": "tab:orange", "stitchvm": "tab:red", "stitchvm+tweedie": "tab:purple", EQUAL: "tab:brown"}


def draw_strength(rows, chosen, metrics, path, title):
    import matplotlib.pyplot as plt
    keys = ["reward", *metrics]
    figure, axes = plt.subplots(1, len(keys), figsize=(3.1 * len(keys), 3.3))
    for axis, key in zip(axes, keys):
        plain = rows[0]
        axis.axhline(plain[key], color="black", ls="--", label="flow")
        axis.axhspan(plain[key] - plain[f"{key}_se"], plain[key] + plain[f"{key}_se"], color="black", alpha=0.1, lw=0)
        for method in dict.fromkeys(r["method"] for r in rows[1:]):
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["strength"])
            axis.errorbar([r["strength"] for r in mine], [r[key] for r in mine], [r[f"{key}_se"] for r in mine], marker="o", ms=4, capsize=2, color=COLOURS[method], label=method)
            axis.plot(*zip(*[(r["strength"], r[key]) for r in mine if r["strength"] == chosen[method]]), "o", ms=11, mfc="none", color=COLOURS[method])
        ticks = sorted({r["strength"] for r in rows[1:]})
        axis.set(xscale="log", xlabel="strength c", title="guiding reward" if key == "reward" else key)
        axis.set_xticks(ticks, [f"{c:g}" for c in ticks], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}; {rows[0]['n']} tuning prompts; circles: chosen")
    save_figure(figure, path)


def draw_value(trajectory, agreement, rows, path, title):
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 1 + bool(agreement), figsize=(5.2 * (1 + bool(agreement)), 3.6), squeeze=False)
    for method in dict.fromkeys(r["method"] for r in trajectory):
        mine, end_of = [r for r in trajectory if r["method"] == method], next(r for r in rows if r["method"] == method and r["split"] == "report")
        x, y, e = ([r[k] for r in mine] for k in ("sigma", "V", "V_se"))
        axes[0, 0].plot(x, y, color=COLOURS[method], label=method)
        axes[0, 0].fill_between(x, [a - b for a, b in zip(y, e)], [a + b for a, b in zip(y, e)], color=COLOURS[method], alpha=0.2, lw=0)
        axes[0, 0].errorbar([0], end_of["reward"], end_of["reward_se"], fmt="s", ms=4, capsize=2, color=COLOURS[method])
    axes[0, 0].set(xlabel="sigma", title="V along sampling (mean, standard error);\nsquares: the clean reward of the images")
    axes[0, 0].legend(fontsize=8)
    if agreement:
        axis = axes[0, 1]
        for key, name in (("cosine", "cosine"), ("cosine_unprompted", "cosine with tweedie's without prompt and CFG")):
            axis.errorbar([r["sigma"] for r in agreement], [r[key] for r in agreement], [r[f"{key}_se"] for r in agreement], marker="o", ms=3, capsize=2, label=name)
        axis.plot([r["sigma"] for r in agreement], [r["norm_ratio"] for r in agreement], "s:", ms=3, label="|grad V| / |grad r(D(zhat_0))|")
        axis.set(xlabel="sigma", title="stitchvm's gradient against tweedie's,\nat plain sampling's latents")
        axis.legend(fontsize=8)
    for axis in axes[0]:
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    main(parse_args())
