"""How much of 08's gradient is signal: python tests/mini/gradient.py [--reward clip] [--stops 10 14 17 20] [--out runs/gradient]

For nft, and for nft+stitchvm stopped after each of --stops steps, the gradient of 08's loss at the untrained policy, a prompt's group of images at a time.
Groups are independent, so the products of two groups' gradients have the mean |E g|^2, the signal, without bias; what is left of |g|^2 is noise, part of it
shared by the noise levels of a group (its images), the rest drawn anew at each level. From both and the counted work follows the signal to noise
that a method buys with a TFLOP, at the best number of noise levels (--train-times): its inverse is the work until an average of gradients points the right way.

Reads   value.pt (03) of the reward, training prompts only
Writes  out/gradient.json: a row a method with the signal, its jackknife error, both noises, the correlation of V and the final reward within a prompt, the
        cosine with nft's mean gradient
"""
import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from common import (Backbone, Reward, add_lora, clean_reward, encode_prompts, fail, generator, joint_value, load_values, own_prefixes, print_table, save_table, split_prompts, value_files)

nft = importlib.import_module("08_nft")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", default="clip")
    p.add_argument("--stops", type=int, nargs="*", default=[10, 14, 17, 20], help="steps of 25 after which nft+stitchvm stops")
    p.add_argument("--groups", type=int, default=160, help="prompts, a group of images each")
    p.add_argument("--every", type=int, default=2, help="use each so many-th noise level of the grid")
    p.add_argument("--out", default="runs/gradient")
    mine, rest = p.parse_known_args(argv)
    return argparse.Namespace(**vars(nft.parse_args(["--reward", mine.reward, *rest])) | vars(mine))


def signal_of(gram):
    """Of a Gram matrix (N, N) of independent gradients: the mean product of two of them, |E g|^2 without bias, and its jackknife error."""
    n, total, rows = len(gram), gram.sum() - gram.trace(), gram.sum(1) - gram.diagonal()
    without = (total - 2 * rows) / ((n - 1) * (n - 2))
    return total / (n * (n - 1)), ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()


def main(args):
    nft.complete(args)
    if args.groups < 3 or not 0 < args.every < args.steps or not all(args.every < stop < args.steps for stop in args.stops):
        fail(f"--groups {args.groups} must be 3 at least, and each of --stops above --every {args.every} and below --steps {args.steps}: noise is told from two groups and two levels")
    names, device = args.reward.split("+"), torch.device(args.device)
    pool = split_prompts(args)[0]
    pool = [pool[k] for k in torch.randperm(len(pool), generator=generator(args.seed, "groups"))[:args.groups]]
    rewards = [Reward(name, args.preset, device) for name in names]
    backbone = Backbone(args.backbone, args.preset, device)
    backbone.set_shift(args.shift)
    condition = encode_prompts(backbone, pool, cache=None)
    texts = [r.encode_text(pool) if r.uses_text else None for r in rewards]
    values = load_values(value_files(args, names), backbone, rewards, args.resolution)[0] if args.stops else []
    own_prefixes(values)
    shape = backbone.vae.config.latent_channels, args.resolution // 8, args.resolution // 8
    grid = backbone.grid(args.steps, torch.empty(1, *shape)).tolist()
    lora = {name: add_lora(backbone.transformer, args.rank, args.alpha, name) for name in nft.POLICIES}
    torch._foreach_copy_([p.data for p in lora["old"]], [p.data for p in lora["default"]])
    trained = [p for name, p in backbone.transformer.named_parameters() if "lora_B.default" in name]  # B is 0, so A has no gradient yet
    costs = nft.unit_costs(backbone, rewards, values, [v[:1] for v in condition], [t if t is None else t[:1] for t in texts], shape, args)

    cases = [args.steps, *args.stops]
    noises, sums, scores = {k: [0.0, 0.0] for k in cases}, {k: [] for k in cases}, {k: [] for k in cases}
    for p in tqdm(range(len(pool)), unit="group"):
        c, text = [v[p:p + 1].expand(args.images, *v.shape[1:]) for v in condition], [t if t is None else t[p:p + 1].expand(args.images, -1) for t in texts]
        z = torch.stack([torch.randn(shape, generator=generator(args.seed, "rollout", p, g)) for g in range(args.images)])
        for stop in cases:
            with torch.no_grad():
                backbone.transformer.set_adapter("old")
                anchor = nft.rollout(lambda z, sigma, rows: backbone.velocity(z, sigma, [v[rows] for v in c]), z, grid, torch.full((args.images,), stop))
                tau = torch.full((args.images,), grid[stop])
                r = clean_reward(rewards, text, backbone.decode(anchor)) if stop == args.steps else joint_value(values, anchor, tau, text)[0]
            scores[stop].append(r.double())
            rho = 0.5 + 0.5 * (r - r.mean())  # not in units of their spread, so that the groups' gradients add up
            levels = []
            for k in range(0, stop, args.every):
                eps = torch.stack([torch.randn(shape, generator=generator(args.seed, "train", p, g, k)) for g in range(args.images)])
                loss = nft.train_loss(nft.policy_velocity(backbone, c), anchor, tau, eps, torch.full((args.images,), grid[k]), rho, args.loss, args.beta, args.kl)[0].mean()
                levels.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
            each, total, n = sum(g.square().sum() for g in levels), sum(levels), len(levels)
            noises[stop][0] += float((total.square().sum() - each) / (n * (n - 1)) / len(pool))  # of two levels of one group: its images' noise and the signal
            noises[stop][1] += float(each / n / len(pool))
            sums[stop].append(total / n)

    rows, first = [], torch.stack(sums[args.steps])
    inside = {k: (x := torch.stack(v)) - x.mean(1, keepdim=True) for k, v in scores.items()}
    for stop in cases:
        g = torch.stack(sums[stop])
        (signal, error), (crossed, own) = signal_of(g @ g.T), noises[stop]
        shared = signal_of(first @ g.T)[0] / (signal * signal_of(first @ first.T)[0]).clamp(min=0).sqrt()
        a, b = inside[args.steps], inside[stop]
        rollout = stop * costs["velocity"] + costs["value" if stop < args.steps else "reward"]
        buys = {m: float(signal) / (crossed - float(signal) + (own - crossed) / m) / args.images / (rollout + m * costs["train"]) * 1000 for m in range(1, stop + 1)}
        best = max(buys, key=buys.get)
        rows.append(dict(method="nft" if stop == args.steps else "nft+stitchvm", stop=stop, sigma=grid[stop], correlation=float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()),
                         signal=float(signal), signal_se=float(error), noise_of_images=crossed - float(signal), noise_of_levels=own - crossed, cosine=float(shared), rollout_gflop=rollout,
                         best_times=best, snr_per_tflop=buys[best], snr_per_tflop_se=buys[best] * float(error / signal), n=len(pool)))
    print_table(rows, list(rows[0]))
    save_table(args, "gradient", rows, gflop_per_row=costs)


if __name__ == "__main__":
    main(parse_args())
