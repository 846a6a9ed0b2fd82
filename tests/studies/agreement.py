"""What 05 is guided by: V along sampling, and how far the value's gradient is the reward's.

Samples as 05 does, a run for each of its rows. At every so many-th step (--every) of each run V of
the value model; at those of plain sampling the cosine, and the ratio of norms, of the value's
gradient with standard DPS' (tweedie), for each sample: with prompt and CFG, as tweedie guides, and
`unprompted`, on the null text without CFG, which is what the value model estimates.

Reads   value.pt (03) of each reward; prompts
Writes  out/agreement.json: a row a run and noise level; out/agreement.png
Run     python tests/studies/agreement.py --out runs/agreement --limit 32 \\
            --value runs/mini/sd3.5-medium_clip/value.pt
All flags of 05 apply but --scorers and --save-images, which do nothing.
"""

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

dps = importlib.import_module("05_dps")


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--every", type=int, default=2, help="steps between two noise levels")
    p.add_argument("--out", default="runs/agreement")
    given, rest = p.parse_known_args(argv)
    return argparse.Namespace(**vars(dps.parse_args(rest)) | vars(given))


def compare(a, b):
    """cosine and norm_ratio |a| / |b| (B,) of gradients a and b (B, ...)."""
    a, b = (v.flatten(1).float() for v in (a, b))
    ratio = a.norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)
    return dict(cosine=F.cosine_similarity(a, b), norm_ratio=ratio)


def unprompted_gradient(run, texts, z, sigma):
    """dV/dz (B, C, h, w) of tweedie's V on the null text without CFG."""
    velocity = partial(run.backbone.velocity, condition=run.null)
    given = (velocity, run.backbone.decode, run.rewards, texts)
    return dps.tweedie_gradient(*given, z, sigma)[2]


def recorded(step, seen, z, sigma):
    """step(z, sigma), with z left in seen."""
    seen.append(z)
    return step(z, sigma)


def latents(run, args, guides, prompts):
    """[z_t (B, C, h, w) before each step] of a range of prompts."""
    seen = []
    velocity, gradients = dps.step_functions(run, slice(prompts.start, prompts.stop))
    steps = {kind: step and partial(recorded, step, seen) for kind, step in gradients.items()}
    guides = [(steps[kind], c) for kind, c in guides]
    z, *noises = dps.noise(args, run.shape, prompts).to(run.device)
    velocity = partial(recorded, velocity, seen)
    dps.sample(z, noises, run.grid, velocity, guides, args.guidance, dps.NU[args.sampler])
    return seen


def measure(run, z, t, prompts, is_plain):
    """{V, and along plain sampling each comparison: (B,)} at noise level t."""
    rows = slice(prompts.start, prompts.stop)
    texts = [v if v is None else v[rows] for v in run.texts]
    sigma = torch.full((len(z),), t, device=z.device)
    if not is_plain:
        return dict(V=common.joint_value(run.values, z, sigma, texts)[0].cpu())
    _, gradients = dps.step_functions(run, rows)
    _, V, grad = gradients["stitchvm"](z, sigma)
    found = compare(grad, gradients["tweedie"](z, sigma)[2])
    unprompted = compare(grad, unprompted_gradient(run, texts, z, sigma))
    found |= {f"{k}_unprompted": v for k, v in unprompted.items()}
    return {k: v.cpu() for k, v in dict(V=V, **found).items()}


@torch.no_grad()
def main(args):
    if "stitchvm" not in " ".join(args.methods) or args.every < 1:
        common.fail("--methods must name one that uses a value model, and --every be 1 at least")
    run = dps.load(args)
    nodes = range(0, args.steps, args.every)
    rows = []
    for name, (row, guides) in dps.plan(args, run.grid).items():
        found = {k: [] for k in nodes}
        for start in tqdm(range(0, len(run.rows), args.batch), name):
            prompts = range(len(run.rows))[start : start + args.batch]
            seen = latents(run, args, guides, prompts)
            for k in nodes:
                is_plain = row["method"] == "flow"
                found[k].append(measure(run, seen[k], run.grid[k], prompts, is_plain))
        for k, parts in found.items():
            whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            finite = torch.stack(list(whole.values())).isfinite().all(0)
            about = dict(row, sigma=run.grid[k], n=int(finite.sum()))
            rows.append(about | common.mean_and_error({key: v[finite] for key, v in whole.items()}))
    compared = ("cosine", "norm_ratio", "cosine_unprompted", "norm_ratio_unprompted")
    common.print_table(rows, ("method", "strength", "sigma", "n", "V", "V_se", *compared))
    common.save_table(args, "agreement", rows, values=[a["id"] for a in run.artifacts])
    common.draw_lines(rows, "sigma", ("V", *compared), "method", Path(args.out, "agreement.png"))


if __name__ == "__main__":
    main(parse_args())
