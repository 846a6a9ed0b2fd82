"""How well a value ranks the samples of one prompt: what steering by it can gain.

Of each prompt several trajectories of 05's sampler are kept. At every noise level the correlation,
within a prompt, of a value with the final reward of that very trajectory, its mean over the
prompts and the error of that; beside it the error of the value and the slope of r regressed on it,
within a prompt too. `tweedie` is the reward of the prompted, guided one-step estimate.

Reads   value models (03), as many as there are to compare; prompts of the tuning split
Writes  out/ranking.json, ranking.png; out/trajectories.pt, which is used again
Run     python tests/studies/ranking.py --values runs/mini/sd3.5-medium_clip/value.pt
All flags of 05 apply but --value, --methods and those of strengths.
"""

import argparse
import importlib
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
    flags = ["--prompts", "tests/mini/data/tune/drawbench.txt", "--limit", "24", "--steps", "20"]
    flags += ["--batch", "64", *rest, "--methods", "flow", "--out", given.out]
    return argparse.Namespace(**vars(dps.parse_args(flags)) | vars(given))


@torch.no_grad()
def trajectories(run, args):
    """z (K, P S, C, h, w) and Tweedie's values (K, P S) at all levels but 0, rewards r (P S,)."""
    parts = []
    for rows in tqdm(torch.arange(len(run.rows) * args.samples).split(args.batch)):
        prompts = rows // args.samples
        velocity, _ = dps.step_functions(run, prompts)
        texts = [t if t is None else t[prompts] for t in run.texts]
        reward = partial(clean_reward, run.rewards, texts)
        z, *noises = dps.noise(args, run.shape, rows.tolist()).to(run.device)
        nodes = []
        guesses = []
        for t, t_next, noise in zip(run.grid[:-1], run.grid[1:], noises, strict=True):
            sigma = torch.full((len(z),), t, device=run.device)
            u = velocity(z, sigma)
            nodes.append(z)
            guesses.append(reward(run.backbone.decode(tweedie(z, u, sigma))))
            z = sde_step(z, u, t, t_next, noise, dps.NU[args.sampler])
        found = torch.stack(nodes, 1), torch.stack(guesses, 1), reward(run.backbone.decode(z))
        parts.append([v.cpu() for v in found])
    z, guesses, r = (torch.cat(v) for v in zip(*parts, strict=True))
    return dict(z=z.transpose(0, 1).contiguous(), tweedie=guesses.T.contiguous(), r=r)


@torch.no_grad()
def values_of(value, z, grid, text, batch):
    """V (K, P S) of one value at the nodes z (K, P S, C, h, w) of the levels grid (K,)."""
    texts = [None] * z.shape[1] if text is None else text.split(batch)
    found = []
    for t, nodes in zip(grid, z, strict=True):
        parts = zip(nodes.split(batch), texts, strict=False)
        found.append(torch.cat([value(zs, t, e) for zs, e in parts]).cpu())
    return torch.stack(found)


def within(v, r):
    """What v says of r, both (P, S), within a prompt: correlations and mean squared errors (P,),
    and the slope of r on v of all of them."""
    v0, r0 = (x.double() - x.double().mean(1, keepdim=True) for x in (v, r))
    both = (v0 * r0).sum(1)
    correlation = both / (v0.square().sum(1) * r0.square().sum(1)).sqrt().clamp(min=1e-12)
    error = (v - r).double().square().mean(1)
    return correlation, error, float(both.sum() / v0.square().sum().clamp(min=1e-12))


def main(args):
    run = dps.load(args)
    text = run.texts[0]
    text = text if text is None else text.repeat_interleave(args.samples, 0)
    spec = run.spec | dict(samples=args.samples, values=None)
    path = Path(args.out, "trajectories.pt")
    kept = once(path, "ranking", spec, True, partial(trajectories, run, args))
    r = kept["r"].view(-1, args.samples)
    found = dict(tweedie=kept["tweedie"])
    for file in args.values:
        value, _ = load_value(file, run.backbone, run.rewards[0], resolution=args.resolution)
        found[str(file)] = values_of(value, kept["z"], run.grid[:-1], text, args.batch)
    rows = []
    for name, v in found.items():
        for t, at in zip(run.grid[:-1], v, strict=True):
            correlation, error, slope = within(at.view_as(r), r)
            row = dict(method=name, sigma=t, slope=slope, n=len(r))
            rows.append(row | mean_and_error(dict(correlation=correlation, value_mse=error)))
    print(f"variance of the reward within a prompt: {float(r.var(1).mean()):.5f}")
    print_table(rows, rows[0])
    save_table(args, "ranking", rows, variance=float(r.var(1).mean()))
    draw_lines(rows, "sigma", ["correlation"], "method", Path(args.out, "ranking.png"))


if __name__ == "__main__":
    main(parse_args())
