"""How much of 08's gradient is signal.

For nft, and for nft+stitchvm stopped after each of --stops steps, the gradient of 08's loss at the
untrained policy, a prompt's group of images at a time. Groups are independent, so the products of
two groups' gradients have the mean |E g|^2, the signal, without bias; what is left of |g|^2 is
noise, part of it shared by the noise levels of a group (its images), the rest drawn anew at each
level. From both and the counted work follows the signal to noise that a method buys with a TFLOP,
at the best number of noise levels (--train-times): its inverse is the work until an average of
gradients points the right way.

Reads   value.pt (03) of the reward, training prompts only
Writes  out/gradient.json: a row a method with the signal, its jackknife error, both noises, the
        correlation of V and the final reward within a prompt, the cosine with nft's mean gradient
Run     python tests/studies/gradient.py --reward clip --stops 10 14 17 20 --out runs/gradient
All flags of 08 apply.
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

from common import clean_reward, fail, generator, joint_value, print_table, save_table  # noqa: E402

nft = importlib.import_module("08_nft")


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--stops", type=int, nargs="*", default=[10, 14, 17, 20], help="steps of 25")
    p.add_argument("--groups", type=int, default=160, help="prompts, a group of images each")
    p.add_argument("--every", type=int, default=2, help="use each so many-th node of the grid")
    p.add_argument("--out", default="runs/gradient")
    given, rest = p.parse_known_args(argv)
    return argparse.Namespace(**vars(nft.parse_args(rest)) | vars(given))


def check(args):
    nft.check(args)
    nodes_fit = 0 < args.every < args.steps
    if args.groups < 3 or not nodes_fit or not all(args.every < s < args.steps for s in args.stops):
        fail(
            f"--groups {args.groups} must be 3 at least, and each of --stops above --every "
            f"{args.every} and below --steps {args.steps}: noise is told from two groups and levels"
        )
    args.methods = ["nft", "nft+stitchvm"] if args.stops else ["nft"]
    args.prompts = 1  # at a time


def signal_of(gram):
    """Of a Gram matrix (N, N) of independent gradients the mean product of two of them, which is
    |E g|^2 without bias, and its jackknife error."""
    n = len(gram)
    total = gram.sum() - gram.trace()
    without = (total - 2 * (gram.sum(1) - gram.diagonal())) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return total / (n * (n - 1)), error


def sample(run, args, prompt, p, stop):
    """Anchors (G, C, h, w) and rewards (G,) of the p-th group, stopped after so many steps."""
    condition, texts = nft.chosen(run, [prompt] * args.images)
    velocity = partial(nft.policy_velocity(run.backbone, condition), "old")
    z = nft.noises(run, *((args.seed, "rollout", p, g) for g in range(args.images))).to(run.device)
    z = nft.rollout(velocity, z, run.grid, torch.full((args.images,), stop, device=run.device))
    if stop == args.steps:
        return z, clean_reward(run.rewards, texts, run.backbone.decode(z))
    tau = torch.full((args.images,), run.grid[stop], device=run.device)
    return z, joint_value(run.values, z, tau, texts)[0]


def gradients(run, args, prompt, p, stop, z_tau, rho, trained):
    """The gradient (D,) of the mean loss of a group at each noise level above tau."""
    velocity = nft.policy_velocity(run.backbone, nft.chosen(run, [prompt] * args.images)[0])
    tau = torch.full((args.images,), run.grid[stop], device=run.device)
    for k in range(0, stop, args.every):
        eps = nft.noises(run, *((args.seed, "train", p, g, k) for g in range(args.images)))
        t = torch.full((args.images,), run.grid[k], device=run.device)
        given = (z_tau, tau, eps.to(run.device), t, rho)
        loss = nft.train_loss(velocity, *given, args.loss, args.beta)[0].mean()
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def measure(run, args, stop):
    """{rewards (N, G) less each group's mean, mean gradients (N, D), crossed, whole}.

    crossed: the mean product of two levels' gradients of one group, its images' noise and the
    signal; whole: the mean square of a gradient.
    """
    # B is 0, so A has no gradient yet
    named = run.backbone.transformer.named_parameters()
    trained = [p for name, p in named if "lora_B.default" in name]
    prompts = torch.randperm(run.pool, generator=generator(args.seed, "groups"))[: args.groups]
    found = dict(rewards=[], mean=[], crossed=0.0, whole=0.0)
    for p, prompt in enumerate(tqdm(prompts.tolist(), f"stop {stop}", unit="group")):
        with torch.no_grad():
            z_tau, r = sample(run, args, prompt, p, stop)
        rho = 0.5 + 0.5 * (r - r.mean())  # not in units of their spread: the groups' add up
        levels = list(gradients(run, args, prompt, p, stop, z_tau, rho, trained))
        n = len(levels)
        total = sum(levels)
        each = sum(g.square().sum() for g in levels)
        found["rewards"].append(r.double() - r.double().mean())
        found["mean"].append(total.cpu() / n)
        found["crossed"] += float((total.square().sum() - each) / (n * (n - 1)) / len(prompts))
        found["whole"] += float(each / n / len(prompts))
    return found | {k: torch.stack(found[k]) for k in ("rewards", "mean")}


def summary(run, args, stop, found, whole):
    """The row of a stop, beside what was found for whole rollouts."""
    signal, error = signal_of(found["mean"] @ found["mean"].T)
    shared = signal_of(whole["mean"] @ found["mean"].T)[0]
    first = signal_of(whole["mean"] @ whole["mean"].T)[0]
    a, b = whole["rewards"], found["rewards"]
    row = dict(method="nft" if stop == args.steps else "nft+stitchvm", stop=stop)
    row |= dict(sigma=run.grid[stop])
    row["correlation"] = float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
    row |= dict(signal=float(signal), signal_se=float(error))
    row["noise_of_images"] = found["crossed"] - float(signal)
    row["noise_of_levels"] = found["whole"] - found["crossed"]
    row["cosine"] = float(shared / (signal * first).clamp(min=0).sqrt())
    work = stop * run.costs["velocity"] + run.costs["value" if stop < args.steps else "reward"]
    buys = {}
    for m in range(1, stop + 1):
        noise = row["noise_of_images"] + row["noise_of_levels"] / m
        tflop = args.images * (work + m * run.costs["train"]) / 1000
        buys[m] = row["signal"] / noise / tflop
    best = max(buys, key=buys.get)
    row |= dict(rollout_gflop=work, best_times=best, snr_per_tflop=buys[best])
    row["snr_per_tflop_se"] = buys[best] * float(error / signal)
    return row | dict(n=args.groups)


def main(args):
    from accelerate import Accelerator

    check(args)
    run = nft.load(args, Accelerator(cpu=args.device == "cpu"))
    cases = [args.steps, *args.stops]
    found = {stop: measure(run, args, stop) for stop in cases}
    rows = [summary(run, args, stop, found[stop], found[args.steps]) for stop in cases]
    print_table(rows, rows[0])
    save_table(args, "gradient", rows, gflop_per_row=run.costs)


if __name__ == "__main__":
    main(parse_args())
