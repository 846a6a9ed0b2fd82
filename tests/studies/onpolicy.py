"""Does a value rank better if it is trained on the sampler's own law, or if it reads the prompt?

05's sampler makes a sample of each of many training captions and keeps its trajectory. Three values
are stitched and finetuned anew on these samples, at equal cost and the same noise levels:

    forward     z_t = (1-t) z_0 + t eps, on the null text, as 03 does it
    samples     z_t of the very trajectory that ended in z_0, on the null text
    prompted    the same, and the blocks read the sample's prompt

The stitch of each is fitted in closed form on its own features, after the given value's block; the
loss is (78). They are judged as in ranking.py, on prompts of the tuning split, and by the reward of
samples that V's gradient guides there.

Reads   a value (03): its reward, stitch point and norm; prompts
Writes  out/onpolicy.json, onpolicy.png; out/samples.pt and trajectories.pt, which are used again
Run     python tests/studies/onpolicy.py --value runs/mini/sd3.5-medium_clip/value.pt
All flags of ranking.py apply but --values.
"""

import argparse
import importlib
from functools import partial
from pathlib import Path

import ranking
import torch
from ranking import dps
from tqdm import tqdm, trange

from common import (
    Stitch,
    StitchedValue,
    add_noise,
    draw_lines,
    generator,
    load_value,
    mean_and_error,
    once,
    print_table,
    save_table,
)

cache = importlib.import_module("01_cache_features")
fit = importlib.import_module("02_fit_stitch")
finetune = importlib.import_module("03_finetune")
LAWS = ("forward", "samples", "prompted")


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--value", required=True, help="gives the reward, (i, j) and the norm")
    captions = "tests/mini/data/train_captions.json"
    add("--captions", default=captions, help="of the samples to train on")
    add("--train-samples", type=int, default=4000, help="one of each caption")
    add("--train-steps", type=int, default=2925, help="of each value")
    add("--train-batch", type=int, default=32)
    add("--strengths", type=float, nargs="+", default=[10, 20, 40, 80], help="of V's gradient")
    add("--lr", type=float, default=2e-3, help="of the tail; the stitch has five times that")
    add("--out", default="runs/onpolicy")
    args, rest = p.parse_known_args(argv)
    return args, ranking.parse_args(["--out", args.out, *rest])


@torch.no_grad()
def sampled(run, args):
    """z (N, K, C, h, w) float16 at all levels but 0, z0, e_RM (N, E), h_RM (N, T, d) of a sample of
    each prompt and the patches (N, n, d) before the reward's first block."""
    parts = []
    for rows in tqdm(torch.arange(len(run.rows)).split(args.batch)):
        z0, nodes = ranking.walk(run, args, rows, lambda z, u, sigma: z)
        x = run.backbone.decode(z0)
        reward = run.rewards[0]
        patches = cache.tokens_by_depth(reward.visual, reward.normalise(reward.resize(x)), 1)
        parts.append([torch.stack(nodes, 1).half(), z0, *finetune.clean_target(reward, x)])
        parts[-1].append(patches[0, :, 1:])
    names = ("z", "z0", "e_rm", "h_rm", "patches")
    return {k: torch.cat(v) for k, v in zip(names, zip(*parts, strict=True), strict=True)}


def draw(law, data, grid, rows, random):
    """z_t (B, C, h, w) and t (B,) of some samples, each at a level of the sampler."""
    k = torch.randint(len(grid), (len(rows),), generator=random)
    t = torch.tensor(grid)[k]
    z0 = data["z0"][rows]
    eps = torch.randn(z0.shape, generator=random)  # drawn by all, so that all have the same t
    z_t = add_noise(z0, eps, t) if law == "forward" else data["z"][rows, k].float()
    return z_t, t


def read_prompt(value, law, condition, rows):
    """Let the blocks of a prompted value read the prompts of some samples."""
    if law == "prompted":
        value.null = [v[rows] for v in condition]


@torch.no_grad()
def stitched(value, law, data, run, fitted=400):
    """A value like this one, its stitch in closed form on features of its own law."""
    if value.j != 1:
        raise SystemExit("error: only values that are stitched before the first block (02 --j 1)")
    rows = torch.arange(min(fitted, len(data["z0"])))
    z, t = draw(law, data, run.grid[:-1], rows, generator("fit"))
    given = value.transformer, run.null, run.rewards[0]
    blank = StitchedValue(*given, value.stitch, value.i, 1, norm=value.norm)
    read_prompt(blank, law, run.condition, rows)
    features = fit.resample(blank.features(z, t)[0], value.stitch.grid, value.stitch.antialias)
    tokens = fit.to_tokens(features).flatten(0, 1)
    W, bias, _ = fit.fit_linear_stitch(tokens, data["patches"][rows].flatten(0, 1))
    stitch = Stitch(W.float(), bias.float(), value.stitch.grid, value.stitch.antialias)
    return StitchedValue(*given, stitch, value.i, 1, norm=value.norm)


def train(value, law, data, run, args):
    """Finetune a stitched value on its law, as 03 does in the miniature."""
    tail = [p for k, p in value.named_parameters() if p.requires_grad and k[:6] != "stitch"]
    groups = [dict(params=tail, peak=args.lr)]
    groups += [dict(params=[*value.stitch.parameters()], peak=5 * args.lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    random = generator("onpolicy")
    for step in trange(args.train_steps, desc=law):
        rows = torch.randint(len(data["z0"]), (args.train_batch,), generator=random)
        z, t = draw(law, data, run.grid[:-1], rows, random)
        read_prompt(value, law, run.condition, rows)
        target = data["e_rm"][rows], data["h_rm"][rows]
        loss, _ = finetune.step_loss(value, run.rewards[0], z, t, target)
        loss.backward()
        rate = finetune.learning_rate(step, args.train_steps, 50, "cosine")
        for group in groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad()
    return value.eval()


@torch.no_grad()
def guided(run, args, value, law, strengths):
    """A row for each strength: the reward of 05's samples that grad V alone guides."""
    only = dict(methods=["stitchvm"], strengths_stitchvm=strengths, scorers=[])
    args = argparse.Namespace(**vars(args) | only)
    run.values = [value]
    runs = dps.plan(args, run.grid)
    batches = []
    for k in range(0, len(run.rows), args.batch):
        prompts = range(len(run.rows))[k : k + args.batch]
        read_prompt(value, law, run.condition, list(prompts))
        batches.append(dps.sample_batch(run, args, runs, prompts))
    scores, _ = dps.score(run, args, runs, batches)
    pairs = zip(runs.values(), scores["reward"], strict=True)
    return [dict(row, lever=law, **mean_and_error(dict(reward=x))) for (row, _), x in pairs]


def main(args, sampler):
    """sampler: the flags of ranking.py."""
    chosen = dict(prompts=args.captions, limit=args.train_samples, samples=1)
    chosen |= dict(seed=sampler.seed + 1)  # not the noises that are evaluated
    training = argparse.Namespace(**vars(sampler) | chosen)
    source = dps.load(training)
    work = partial(sampled, source, training)
    data = once(Path(args.out, "samples.pt"), "onpolicy", source.spec, True, work)
    given, _ = load_value(
        args.value, source.backbone, source.rewards[0], resolution=sampler.resolution
    )
    run = dps.load(sampler)
    kept, text = ranking.keep_trajectories(run, sampler)
    prompts = [v.repeat_interleave(sampler.samples, 0) for v in run.condition]
    found = dict(tweedie=kept["tweedie"])
    values = {}
    steered = []
    for law in LAWS:
        value = values[law] = train(stitched(given, law, data, source), law, data, source, args)
        condition = prompts if law == "prompted" else None
        nodes = kept["z"], run.grid[:-1], text, sampler.batch, condition
        found[law] = ranking.values_of(value, *nodes)
        steered += guided(run, sampler, value, law, args.strengths)
        value.null = run.null  # what it costs does not depend on the text
    price = ranking.prices(run, sampler, values)
    rows = ranking.judge(found, kept, sampler, run.grid, price)
    print_table(steered, steered[0])
    save_table(sampler, "onpolicy", rows, training=vars(args), guided=steered)
    draw_lines(rows, "sigma", ["correlation", "gain"], "method", Path(args.out, "onpolicy.png"))


if __name__ == "__main__":
    main(*parse_args())
