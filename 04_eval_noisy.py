"""Stage 04 -- how good is each estimate of E[r(z_0) | z_t] at five noise levels, at what cost?

Paper   StitchVM (arXiv 2605.19804) Sec. 5.1, Table 5: zero-shot retrieval (CLIP, DFN-CLIP),
        preferences (HPSv2), Spearman's correlation (Aesthetic). And what it argues against
        without measuring: Tweedie, r(D(zhat_0)), and Monte Carlo, the mean of r over N rollouts.
        r is linear in its unit embedding e, so each estimate is one of e: V = <e, text>, and
        value_mse the mean over images and texts of (V(z_t, c) - r(x_0, c))^2
Reads   out/value.pt, value_vae.pt, value_noisyclip.pt; benchmarks, JSON lines of an image and its
        texts (retrieval), text and rank in a group (preferences) or ten counts of votes
Writes  out/04_eval_noisy.json, 04_quality.png (against sigma), 04_cost.png (error against GFLOP);
        while it runs 04_eval_noisy.parts/, a file for each batch, where --resume goes on
Run     python 04_eval_noisy.py
        python 04_eval_noisy.py --benchmarks tests/mini/data/tune/coco.jsonl --methods stitchvm
        python tests/published/benchmarks.py coco FOLDER   # makes FOLDER/coco.jsonl
Departs from the paper: noise draws, standard errors, the null text for all but the reward. Rollouts
        take the ancestral step, which samples p(z_0 | z_t), as the SDE of (11) does not [D15].
"""

import json
import math
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from common import (
    COUNT,
    Backbone,
    Reward,
    add_noise,
    digest,
    draw_lines,
    fail,
    fingerprints,
    generator,
    gflop,
    keep_or_drop,
    load_value,
    maker_command,
    mean_and_error,
    now,
    once,
    parse_stage,
    print_table,
    read_image,
    save_table,
    stage_parser,
    stamps,
    timing,
    tweedie,
    within,
)

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
FREE = ("out", "device", "value", "resume", "restart", "compile")  # flags --resume may change
METHODS = ["stitchvm", "vae-stitch", "noisyclip", "tweedie", "mc"]
BASELINES = {"vae-stitch": "03_finetune.py --front vae", "noisyclip": "tests/studies/noisyclip.py"}
DRAWN = [f"tests/mini/data/{n}.jsonl" for n in ("coco", "flickr30k", "hpdv2", "imagereward", "ava")]
PRESETS = {
    "mini": dict(resolution=64, batch=400, benchmarks=DRAWN),
    "24gb": dict(resolution=512, batch=8),
    "paper": dict(resolution=1024, batch=2),
}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    number = partial(add, type=COUNT)
    add("--benchmarks", nargs="+", help="JSON-lines files, used if they fit the reward")
    number("--limit", help="images of each benchmark at most")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="estimators")
    add("--value", help="value model of stitchvm; None: value.pt in --out")
    number("--draws", default=2, help="noise draws for each image and sigma")
    number("--mc-images", default=40, help="images of the first benchmark for Monte Carlo")
    text = "of each of their latents; all of them are the reference"
    add("--rollouts", type=within(int, 2), default=32, help=text)
    number("--rollout-steps", default=20, help="steps of the grid; a rollout has those below sigma")
    number("--batch", help="images, latents or rollouts at a time")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    add("--resume", action="store_true", help="go on from <out>/04_eval_noisy.parts")
    add("--restart", action="store_true", help="drop what an unfinished run left there")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
# from common: tweedie
def tweedie_embed(backbone, reward, null, z, sigma):
    """Unit embeddings (n, E) of D(zhat_0) by one denoiser call; z (n, C, h, w), sigma (n,)."""
    u = backbone.velocity(z, sigma, null)
    return F.normalize(reward.embed(backbone.decode(tweedie(z, u, sigma)))[0], dim=-1)


def ancestral_step(z, z0_hat, t, s, noise):
    """z_s ~ q(z_s | z_t, z_0 = z0_hat), s < t, of the chain with marginals N((1-t) z_0, t^2).

    z_t | z_s ~ N(a z_s, b^2), a = (1-t)/(1-s), b^2 = t^2 - a^2 s^2; z, noise (B, ...), t, s floats.
    """
    a = (1 - t) / (1 - s)
    b2 = t * t - a * a * s * s
    mean = ((1 - s) * b2 * z0_hat + a * s * s * z) / (t * t)
    return mean + s * b2**0.5 / t * noise


def rollout_embeddings(backbone, reward, null, z, t, grid, rollouts, g, batch):
    """Unit embeddings (n, rollouts, E) of samples of p(z_0 | z_t), and the steps of a rollout.

    z (n, C, h, w) at one sigma t; grid: noise levels down to 0, used below t; g: a CPU generator.
    """
    nodes = [t, *[s for s in grid if s < t - 1e-4]]
    parts = []
    for x in z.repeat_interleave(rollouts, 0).split(batch):
        for a, b in zip(nodes[:-1], nodes[1:], strict=True):
            sigma = torch.full((len(x),), a, device=x.device)
            z0_hat = tweedie(x, backbone.velocity(x, sigma, null), sigma)
            if b > 0:
                x = ancestral_step(x, z0_hat, a, b, torch.randn(x.shape, generator=g).to(x.device))
        parts.append(F.normalize(reward.embed(backbone.decode(z0_hat))[0], dim=-1))
    return torch.cat(parts).unflatten(0, (-1, rollouts)), len(nodes) - 1


def recall_at_1(scores, image_of):
    """Hits (n,) image to text, (m,) text to image; scores (n, m), image_of (m,) of each text."""
    i2t = image_of[scores.argmax(1)] == torch.arange(len(scores))
    return i2t.float(), (scores.argmax(0) == image_of).float()


def hpdv2_accuracy(scores, ranks):
    """One list's 1 - inversions / pairs; scores, ranks (n,), 1 is best; human ties are right."""
    order = torch.argsort(torch.argsort(scores, descending=True))
    wrong = ((order[:, None] < order[None]) & (ranks[:, None] > ranks[None])).sum()
    return 1 - wrong.item() / (len(ranks) * (len(ranks) - 1) / 2)


def imagereward_accuracy(scores, ranks):
    """One list's (right pairs, pairs): human ties are no pairs, equal scores are wrong."""
    better = ranks[:, None] < ranks[None]
    return int((better & (scores[:, None] > scores[None])).sum()), int(better.sum())


def calibration(v, r):
    """Moments of values v and rewards r, and the slope of r on v: 1 for a conditional mean."""
    centred = v - v.mean()
    slope = (centred * r).mean() / centred.square().mean() if v.max() > v.min() else 0.0
    moments = dict(mean_v=v.mean(), mean_r=r.mean(), std_v=v.std(), std_r=r.std(), slope=slope)
    return {k: float(x) for k, x in moments.items()}


# ---- to here ----


def first_images(rows, wanted):
    """How many images to take from the first on: `wanted`, but whole lists and at least one."""
    groups = [row.get("group", k) for k, row in enumerate(rows)]
    ends = [k for k in range(1, len(rows)) if groups[k] != groups[k - 1]] + [len(rows)]
    return max((k for k in ends if k <= wanted), default=ends[0])


def load_benchmarks(args, reward):
    """{name: rows} of the files that fit the reward, in order; Monte Carlo uses the first."""
    kind = "rank" if "hps" in Path(args.reward).name else "texts" if reward.uses_text else "votes"
    files = [Path(file) for file in args.benchmarks or []]
    if len({file.stem for file in files}) < len(files):
        fail("--benchmarks has two files of one name, which names their rows: rename one")
    benches = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            rows = [row | dict(name=row["image"], image=file.parent / row["image"]) for row in rows]
            found = next(k for k in ("votes", "rank", "texts") if k in rows[0])
            check_rows(rows, found)
        except (OSError, ValueError, LookupError, TypeError, StopIteration) as e:
            fail(f"{file} is no benchmark, see tests/published/benchmarks.py ({e!r})")
        if found == kind:
            benches[file.stem] = rows[: first_images(rows, args.limit or len(rows))]
    if not benches:
        fail(f"no benchmark for {args.reward}: pass --benchmarks with images and their {kind}")
    return benches


def check_rows(rows, kind):
    """An error for a row without what its kind needs: votes, texts, another image in its list."""
    groups = Counter(row["group"] for row in rows if kind == "rank")
    for n, row in enumerate(rows, 1):
        if kind == "votes":
            good = len(row["votes"]) == 10 and min(row["votes"]) >= 0 < sum(row["votes"])
        else:
            texts = row["texts"]
            good = isinstance(texts, list) and texts and all(isinstance(x, str) for x in texts)
        if not good:
            raise ValueError(f"line {n} has no good {kind}")
        if groups and (groups[row["group"]] < 2 or not isinstance(row["rank"], int)):
            raise ValueError(f"line {n} is alone in its list, or has no rank")
        if not row["image"].exists():
            raise ValueError(f"line {n}: there is no {row['image']}")
    changes = [k for k, row in enumerate(rows) if groups and row["group"] != rows[k - 1]["group"]]
    if len(changes) > len(groups):
        raise ValueError("the images of a list do not follow each other")


def embed_batch(rows, name, backbone, reward, methods, roll, args):
    """Of the images of `rows` unit embeddings e_rm of centre squares and `clean` of whole files,
    (n, E), on the CPU; at each sigma of each method (n, draws, E), and of rollouts `samples`."""
    images = []
    for row in rows:
        try:
            images.append(read_image(row["image"]))
        except Exception as e:
            fail(f"{row['image']}, an image of a benchmark, cannot be read: {e}")
    size = (args.resolution, args.resolution)
    squares = torch.stack([pil_to_tensor(ImageOps.fit(image, size)) for image in images])
    x = squares.to(backbone.device) / 255
    whole = torch.stack([reward.transform(image) for image in images]).to(backbone.device)
    both = dict(e_rm=reward.embed(x)[0], clean=reward.visual(whole))
    found = {k: F.normalize(raw, dim=-1).cpu() for k, raw in both.items()}
    z0 = backbone.encode(x)
    for sigma in SIGMAS:
        t = torch.full((len(z0),), sigma, device=z0.device)
        at = {method: [] for method in methods}
        for draw in range(args.draws):
            seeds = [(args.seed, name, sigma, draw, row["name"]) for row in rows]
            eps = torch.stack([torch.randn(z0.shape[1:], generator=generator(*s)) for s in seeds])
            z = add_noise(z0, eps.to(z0.device), t)
            for method, embed in methods.items():
                at[method].append(embed(z, t).cpu())
                if not at[method][-1].isfinite().all():  # NaN would rank as well as it sorts
                    fail(f"{method} gives NaN at sigma {sigma} of {name}: try --dtype float32")
            if roll and draw == 0:
                g = generator(args.seed, "rollouts", sigma, rows[0]["name"])
                samples, at["steps"] = roll(z, sigma, g=g)
                at["samples"] = samples.cpu()
        found[sigma] = {k: torch.stack(v, 1) if k in methods else v for k, v in at.items()}
    return found


def measure(rows, scores, first_text, norms=1.0):
    """{metric: units (u, 2), of each what is right and what is counted}; or a correlation.

    scores (n, m) of the first n images and all texts, or (n,); first_text (n,), an image's; norms
    (n, 1) of their embeddings.
    """
    n = len(scores)
    if "votes" in rows[0]:
        from scipy.stats import spearmanr

        votes = torch.tensor([row["votes"] for row in rows[:n]]).double()
        marks = votes @ torch.arange(1, 11).double() / votes.sum(1)
        varies = scores.max() > scores.min()
        return {"srcc": float(spearmanr(scores, marks).statistic) if varies else None}
    if "rank" in rows[0]:
        v = scores[torch.arange(n), first_text[:n]]
        ranks, group = torch.tensor([[row["rank"], row["group"]] for row in rows[:n]]).T
        lists = [(v[group == g], ranks[group == g]) for g in group.unique()]
        pairs = torch.tensor([imagereward_accuracy(*x) for x in lists]).double()
        by_prompt = (pairs[:, 0] / pairs[:, 1])[pairs[:, 1] > 0]
        found = {"hpdv2_accuracy": torch.tensor([hpdv2_accuracy(*x) for x in lists])}
        found |= {"imagereward_accuracy": pairs, "imagereward_accuracy_by_prompt": by_prompt}
    else:
        image_of = torch.tensor([k for k, row in enumerate(rows) for _ in row["texts"]])
        # trap: a mean's norm says how sure it is, and would rank the images of a text
        i2t, t2i = recall_at_1(scores / norms, image_of)
        found = {"recall@1_i2t": i2t}
        if n == len(rows):  # a few images are no gallery to find a text's image in
            found["recall@1_t2i"] = t2i
    return {k: v if v.ndim > 1 else torch.stack([v, v**0], 1) for k, v in found.items()}


def summary(draws, n):
    """Mean and standard error of what `measure` finds; the draws of a unit are averaged first."""
    if None in draws:
        return None, None
    if isinstance(draws[0], float):
        rho = sum(draws) / len(draws)
        return rho, (1 - rho**2) / (n - 1) ** 0.5
    right, counted = torch.stack(draws).double().mean(0).T
    value = right.sum() / counted.sum()
    if len(right) == 1:
        return float(value), None
    error = (right - value * counted).std() * len(right) ** 0.5 / counted.sum()
    return float(value), float(error)


def table_rows(rows, draws, first_text, norms, about):
    """A row of the table for each metric of scores (n, …), norms (n, 1) of some noise draws."""
    pairs = zip(draws, norms, strict=True)
    found = [measure(rows, scores, first_text, norm) for scores, norm in pairs]
    about = about | dict(n=len(draws[0]), draws=len(draws))
    both = {metric: summary([f[metric] for f in found], len(draws[0])) for metric in found[0]}
    return [about | dict(metric=k, value=v, value_se=error) for k, (v, error) in both.items()]


def errors(draws, r, first_text, halves=None, part=False):
    """Errors of scores (n, m) or (n,) of several noise draws against rewards r; calibration.

    halves: scores of two halves of many rollouts on the first latents, whose mean V* has some
    variance s: E (V - V*)^2 is V's error + s, and - s if V is a part of them.
    """
    each = torch.stack([(v - r).square().reshape(len(r), -1).mean(1) for v in draws])
    found = mean_and_error(dict(value_mse=each.mean(0))) | calibration(draws[0], r)
    if r.ndim == 2:
        matched = torch.arange(len(r)), first_text[: len(r)]
        found |= dict(matched_v=float(draws[0][matched].mean()), matched_r=float(r[matched].mean()))
    if halves:
        gap = draws[0][: len(halves[0])] - sum(halves) / 2
        variance = (halves[0] - halves[1]).square().mean() / 4
        mse = gap.square().mean() + (variance if part else -variance)
        found |= mean_and_error(dict(value_mse_shared=each[0, : len(gap)]))
        found |= dict(reference_bias=float(gap.mean()), reference_mse=float(mse))
    return found


def evaluate(name, rows, backbone, reward, methods, roll, args, spec):
    """The table's rows of a benchmark; methods {name: embed(z, sigma)}; roll(z, t, g=) or None."""
    sub = first_images(rows, args.mc_images) if roll else 0
    starts = sorted({*range(0, sub, args.batch), *range(sub, len(rows), args.batch)})
    parts = []
    for k, end in zip(tqdm(starts, desc=name), [*starts[1:], len(rows)], strict=True):
        given = rows[k:end], name, backbone, reward, methods, roll if k < sub else None, args
        path = Path(args.out, f"04_eval_noisy.parts/{name}_{k:06d}.pt")
        parts.append(once(path, "04_eval_noisy", spec, args.resume, partial(embed_batch, *given)))
    e_rm, clean = (torch.cat([part[k] for part in parts]) for k in ("e_rm", "clean"))
    texts = [text for row in rows for text in row.get("texts", [])]
    texts = list(dict.fromkeys(texts)) if "rank" in rows[0] else texts
    first_text = torch.tensor([texts.index(row["texts"][0]) for row in rows if texts])
    text = reward.text(texts)

    def score(e):
        e = e.to(reward.device)
        return (reward.score(e) if text is None else e @ text.T).cpu()

    r = score(e_rm)
    about = dict(method="clean", benchmark=name, sigma=0.0)
    table = table_rows(rows, [score(clean)], first_text, [1.0], about)
    for sigma in SIGMAS:
        at = [part[sigma] for part in parts]
        estimates = {"constant": [e_rm.mean(0, keepdim=True)]}
        estimates |= {m: torch.cat([a[m] for a in at]).unbind(1) for m in methods}
        halves = None
        if sub:
            samples = torch.cat([a["samples"] for a in at if "samples" in a])
            halves = [score(samples[:, h::2].mean(1)) for h in (0, 1)]
            for k in [k for k in (1, 4, 16, args.rollouts) if k <= args.rollouts]:
                estimates[f"mc-{k}"] = [samples[:, :k].mean(1)]
        for method, embeddings in estimates.items():
            draws = [score(e) for e in embeddings]
            if method == "constant":
                draws = [draws[0].expand_as(r)]  # to the last bit, or rounding ranks its ties
            part = method.startswith("mc-")
            about = dict(method=method, benchmark=name, sigma=sigma)
            about |= errors(draws, r[: len(draws[0])], first_text, halves, part)
            about |= dict(rollout_steps=at[0]["steps"]) if part else {}
            norms = [e.norm(dim=-1, keepdim=True) for e in embeddings]
            table += table_rows(rows, draws, first_text, norms, about)
    return table


def load_methods(args, backbone, reward, null):
    """{name: embed(z, sigma)} of --methods that can be had, and the artefacts they are from."""
    methods = {}
    parents = []
    for name in [name for name in METHODS[:3] if name in args.methods]:
        path = Path(args.out, f"value_{name.removesuffix('-stitch')}.pt")
        if name == "stitchvm":
            path = args.value or Path(args.out, "value.pt")
        elif not path.exists():
            make = maker_command(path, vars(args), BASELINES[name])
            print(f"warning: no {name} rows, {path} does not exist; make it with: {make}")
            continue
        value, artifact = load_value(path, backbone, reward, resolution=args.resolution)
        methods[name] = value.embed
        parents.append(dict(stage=artifact["stage"], id=artifact["id"], method=name))
    if "tweedie" in args.methods:
        methods["tweedie"] = partial(tweedie_embed, backbone, reward, null)
    return methods, parents


def add_costs(rows, calls, z):
    """Into each row what one value costs by calls {name: f(z, sigma)}, timed in turn."""
    t = torch.full((len(z),), 0.5, device=z.device)
    costs = {}
    seconds = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            began = now(z.device)
            call(z, t)
            seconds[name].append((now(z.device) - began) / len(z))
    for name, call in calls.items():
        median, spread = timing(seconds[name][1:])  # the first call warms up
        count = gflop(partial(call, z[:1], t[:1]))
        costs[name] = dict(ms_per_value=1e3 * median, gflop_per_value=count, ms_spread=spread)
        if spread > 0.5:
            print(f"warning: the machine was busy, ms_per_value of {name} varies by {spread:.0%}")
    for row in rows:
        row |= costs.get(row["method"], dict(ms_per_value=None, gflop_per_value=None))
        for key in ("ms_per_value", "gflop_per_value") if "rollout_steps" in row else ():
            one = row["rollout_steps"] * costs["denoiser"][key] + costs["decode and reward"][key]
            row[key] = int(row["method"][3:]) * one


@torch.no_grad()
def main(args):
    if os.environ.get("RANK", "0") != "0":
        return  # one process does all of it
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    reward = Reward(args.reward, args.preset, device, dtype)
    benches = load_benchmarks(args, reward)
    backbone = Backbone(args.backbone, args.preset, device, dtype, args.compile)
    null = [v.to(device) for v in backbone.prompts([""])]
    rows = []
    folder = Path(args.out, "04_eval_noisy.parts")
    keep_or_drop(folder, args)
    methods, parents = load_methods(args, backbone, reward, null)
    grid = backbone.grid(args.rollout_steps, args.resolution)
    more = dict(grid=grid, rollouts=args.rollouts, batch=args.batch)
    roll = partial(rollout_embeddings, backbone, reward, null, **more)
    spec = {k: v for k, v in vars(args).items() if k not in FREE} | dict(values=parents)
    files = [stamps(row["image"] for row in bench) for bench in benches.values()]
    spec |= dict(benchmarks=digest(files, {k: list(map(str, v)) for k, v in benches.items()}))
    spec |= fingerprints(backbone.transformer, [reward], 1)
    for name, bench in benches.items():
        first_roll = roll if "mc" in args.methods and not rows else None
        rows += evaluate(name, bench, backbone, reward, methods, first_roll, args, spec)
        save_table(args, "04_eval_noisy", rows, values=parents)
    methods["denoiser"] = lambda z, sigma: backbone.velocity(z, sigma, null)
    methods["decode and reward"] = lambda z, sigma: reward.embed(backbone.decode(z))
    z = torch.randn(min(32, args.batch), *backbone.latent_shape(args.resolution), device=device)
    add_costs(rows, methods, z)
    keys = "method benchmark sigma metric value value_se n value_mse value_mse_shared reference_mse"
    print_table(rows, [*keys.split(), "slope", "ms_per_value", "gflop_per_value"])
    save_table(args, "04_eval_noisy", rows, values=parents)
    clean, *others = rows
    first = [r for r in others if all(r[k] == clean[k] for k in ("benchmark", "metric"))]
    draw_lines(first, "sigma", ["value", "value_mse"], "method", Path(args.out, "04_quality.png"))
    x = "log10 GFLOP per value"
    priced = [r | {x: math.log10(r["gflop_per_value"])} for r in first if r["gflop_per_value"]]
    draw_lines(priced, x, ["value_mse"], "method", Path(args.out, "04_cost.png"))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(parse_args())
