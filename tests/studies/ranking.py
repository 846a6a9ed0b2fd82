"""How well a value ranks the samples of one prompt: what steering by it can gain.

Of each prompt several trajectories of 05's sampler are kept. At every noise level the correlation,
within a prompt, of a value with the final reward of that very trajectory, its mean over the
prompts and the error of that; beside it the error of the value and the slope of r regressed on it,
within a prompt too; and what steering by it can gain: the reward of the best of N samples whose
worse half is dropped at that level, less that of best of n at equal work. `tweedie` is the reward
of the prompted, guided one-step estimate.

Reads   value models (03), as many as there are to compare; prompts of the tuning split
Writes  out/ranking.json, ranking.png; out/trajectories.pt, which is used again
Run     python tests/studies/ranking.py --values runs/mini/sd3.5-medium_clip/value.pt
All flags of 05 apply but --value, --methods and those of strengths.
"""

import argparse
import importlib
import math
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import (  # noqa: E402
    clean_reward,
    draw_lines,
    generator,
    gflop,
    load_value,
    mean_and_error,
    once,
    print_table,
    save_table,
    sde_step,
    tweedie,
)

dps = importlib.import_module("05_dps")


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--values", nargs="+", default=[], help="value models, a curve each")
    p.add_argument("--samples", type=int, default=16, help="of a prompt")
    p.add_argument("--out", default="runs/ranking")
    given, rest = p.parse_known_args(argv)
    flags = ["--prompts", "tests/mini/data/tune/drawbench.txt", "--limit", "24", "--steps", "40"]
    flags += ["--batch", "64", *rest, "--methods", "flow", "--out", given.out]
    return argparse.Namespace(**vars(dps.parse_args(flags)) | vars(given))


@torch.no_grad()
def walk(run, args, rows, look):
    """z_0 (B, C, h, w) of some samples, numbers (B,), and look(z, u, sigma) at each level but 0."""
    velocity, _ = dps.step_functions(run, rows // args.samples)
    z, *noises = dps.noise(args, run.shape, rows.tolist()).to(run.device)
    seen = []
    for t, t_next, noise in zip(run.grid[:-1], run.grid[1:], noises, strict=True):
        sigma = torch.full((len(z),), t, device=run.device)
        u = velocity(z, sigma)
        seen.append(look(z, u, sigma))
        z = sde_step(z, u, t, t_next, noise, dps.NU[args.sampler])
    return z, seen


@torch.no_grad()
def trajectories(run, args):
    """z (K, P S, C, h, w) and Tweedie's values (K, P S) at all levels but 0, rewards r (P S,)."""
    parts = []
    for rows in tqdm(torch.arange(len(run.rows) * args.samples).split(args.batch)):
        texts = [t if t is None else t[rows // args.samples] for t in run.texts]
        reward = partial(clean_reward, run.rewards, texts)
        z0, nodes = walk(run, args, rows, lambda *node: node)
        guesses = [reward(run.backbone.decode(tweedie(*node))) for node in nodes]
        found = torch.stack([z for z, *_ in nodes]), torch.stack(guesses)
        parts.append([v.cpu() for v in (*found, reward(run.backbone.decode(z0)))])
    z, guesses, r = zip(*parts, strict=True)
    return dict(z=torch.cat(z, 1), tweedie=torch.cat(guesses, 1), r=torch.cat(r))


@torch.no_grad()
def values_of(value, z, grid, text, batch, condition=None):
    """V (K, P S) of one value at the nodes z (K, P S, C, h, w) of the levels grid (K,).

    condition: embedded prompts (P S, ...) that its blocks read in place of the null text.
    """
    rows = torch.arange(z.shape[1]).split(batch)
    found = []
    for t, nodes in zip(grid, z, strict=True):
        for part in rows:
            if condition is not None:
                value.null = [v[part] for v in condition]
            found.append(value(nodes[part], t, text if text is None else text[part]).cpu())
    return torch.cat(found).view(len(grid), -1)


def within(v, r):
    """What v says of r, both (P, S), within a prompt: correlations and mean squared errors (P,),
    and the slope of r on v of all of them."""
    v0, r0 = (x.double() - x.double().mean(1, keepdim=True) for x in (v, r))
    both = (v0 * r0).sum(1)
    correlation = both / (v0.square().sum(1) * r0.square().sum(1)).sqrt().clamp(min=1e-12)
    error = (v - r).double().square().mean(1)
    return correlation, error, float(both.sum() / v0.square().sum().clamp(min=1e-12))


def dropping(v, r, share, price, N=8, draws=500):
    """What it gains (P,) over best of n of equal work to drop, of N samples, the half of lower v.

    v, r (P, S): v at a level below which lies `share` of a sample's work; price: of one v, as a
    share of that work. N of the S samples are drawn again and again, the same ones for every v.
    """
    N = min(N, r.shape[1])
    random = generator("dropping")
    drawn = torch.stack([torch.randperm(r.shape[1], generator=random) for _ in range(draws)])
    drawn = drawn[:, :N]
    best = torch.stack([r[:, drawn[:, :n]].amax(2).mean(1) for n in range(1, N + 1)])
    stays = v[:, drawn].topk(N // 2).indices
    reward = r[:, drawn].gather(2, stays).amax(2).mean(1)
    n = min(N - (N - N // 2) * share + N * price, N)
    return reward - torch.lerp(best[int(n) - 1], best[math.ceil(n) - 1], n % 1)


def prices(run, args, values):
    """What one value costs, as a share of the work of a sample: {name: share}."""
    with torch.no_grad():
        z = torch.zeros(1, *run.shape, device=run.device)
        texts = [t if t is None else t[:1] for t in run.texts]
        x = run.backbone.decode(z)
        work = {name: gflop(partial(v, z, 0.5, texts[0])) for name, v in values.items()}
        cost = {k: c for k, (c, _) in dps.costs(run, ["flow"]).items()}
        work["tweedie"] = gflop(partial(clean_reward, run.rewards, texts, x)) + sum(cost.values())
    return {name: w / (args.steps * cost["flow"] + cost["decode"]) for name, w in work.items()}


def judge(found, kept, args, grid, price):
    """A row for each value of {name: V (K, P S)} and level: what it says within a prompt."""
    r = kept["r"].view(-1, args.samples)
    rows = []
    for name, v in found.items():
        for k, t in enumerate(grid[:-1]):
            at = v[k].view_as(r)
            correlation, error, slope = within(at, r)
            row = dict(method=name, sigma=t, slope=slope, n=len(r), price=price[name])
            gain = dropping(at, r, 1 - k / args.steps, price[name])
            scores = dict(correlation=correlation, value_mse=error, gain=gain)
            rows.append(row | mean_and_error(scores))
    print(f"variance of the reward within a prompt: {float(r.var(1).mean()):.5f}")
    print_table(rows, rows[0])
    return rows


def keep_trajectories(run, args):
    """trajectories(), kept in out/trajectories.pt, and the text of each sample's prompt."""
    spec = run.spec | dict(samples=args.samples, values=None)
    path = Path(args.out, "trajectories.pt")
    kept = once(path, "ranking", spec, True, partial(trajectories, run, args))
    text = run.texts[0]
    return kept, text if text is None else text.repeat_interleave(args.samples, 0)


def main(args):
    run = dps.load(args)
    kept, text = keep_trajectories(run, args)
    found = dict(tweedie=kept["tweedie"])
    values = {}
    for file in map(str, args.values):
        given = run.backbone, run.rewards[0]
        values[file], _ = load_value(file, *given, resolution=args.resolution)
        found[file] = values_of(values[file], kept["z"], run.grid[:-1], text, args.batch)
    rows = judge(found, kept, args, run.grid, prices(run, args, values))
    spread = float(kept["r"].view(-1, args.samples).var(1).mean())
    save_table(args, "ranking", rows, variance=spread)
    draw_lines(rows, "sigma", ["correlation", "gain"], "method", Path(args.out, "ranking.png"))


if __name__ == "__main__":
    main(parse_args())
