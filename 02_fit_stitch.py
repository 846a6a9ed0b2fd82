"""Stage 02 -- choose where to stitch and solve the linear stitch in closed form.

Paper   StitchVM (arXiv 2605.19804) Sec. 4.1, App. C.1, Eqs. (7), (59)-(62)
            W_ij = argmin_W |W F_i - G_j|^2 = G_j F_i^+,   (i*, j*) = argmin_ij of the residual
        F_i: tokens of z_t after diffusion block i, F_0 the latent itself, for the VAE stitch; G_j:
        patch tokens of x_0 before reward block j. A sample is a token [D4]; ones give the bias.
Reads   out/cache.pt (01)
Writes  out/stitch.pt  of the fronts dit and vae: W (d, D), bias (d,), i, j, CLS (d,)
        out/02_fit_stitch.json, out/02_fit_stitch.png
Run     python 02_fit_stitch.py
        python 02_fit_stitch.py --rank-by raw
        python 02_fit_stitch.py --i 4 --j 1
Departs from the paper: the losses are of held-out images, a quarter of the probe set; the W that is
        kept is fitted on all of it. --rank-by [D5], and an explicit cut-off, --rcond [D7].
"""

import os
from pathlib import Path

import torch
from tqdm import tqdm

from common import (
    COUNT,
    SHARE,
    add_noise,
    fail,
    load_artifact,
    only_warns,
    parse_stage,
    print_table,
    resample,
    save_artifact,
    save_figure,
    save_table,
    stage_parser,
    to_tokens,
)

PRESETS = {"mini": {}, "24gb": dict(resolution=512), "paper": dict(rank_by="raw", resolution=1024)}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--rank-by", choices=("raw", "relative"), default="relative", help="loss that chooses [D5]")
    add("--i", type=COUNT, help="stitch after this diffusion block; None: the best")
    add("--j", type=COUNT, help="stitch before this reward block; None: the best up to 4")
    add("--rcond", type=SHARE, default=1e-6, help="cut-off, times the largest singular value [D7]")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def fit_linear_stitch(F, G, rcond=1e-6):
    """(62): W (d, D) and bias (d,) that minimise |F W^T + bias - G|^2, and the rank.

    F (M, D), G (M, d), a token a row. In float64 on the CPU: CUDA's driver assumes full rank.
    Singular values below rcond times the largest are cut [D7].
    """
    F = torch.cat([F.double().cpu(), torch.ones(len(F), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(F, G.double().cpu(), rcond=rcond, driver="gelsd")
    return solution.solution[:-1].T, solution.solution[-1], int(solution.rank)


def stitch_loss(W, b, F, G):
    """Mean over tokens of |W f + b - g|^2, and as a share of the target's, |g - mean g|^2."""
    G = G.double().cpu()
    loss = (F.double().cpu() @ W.T + b - G).square().sum(1).mean()
    return float(loss), float(loss / (G - G.mean(0)).square().sum(1).mean())


# ---- to here ----


@only_warns
def draw_grid(rows, chosen, path):
    """Heat map of the relative losses, i down and j across; chosen, {i, j}, is framed."""
    from matplotlib.figure import Figure

    J = rows[-1]["j"]
    losses = torch.tensor([r["relative_loss"] for r in rows]).view(-1, J)
    figure = Figure((1 + 0.75 * J, 1.5 + 0.38 * len(losses)))
    axis = figure.subplots()
    places = range(1, J + 1), range(len(losses))
    axis.pcolormesh(*places, losses, cmap="coolwarm", vmin=0, vmax=1)
    for r in rows:
        frame = dict(fill=False) if chosen.items() <= r.items() else None
        axis.text(r["j"], r["i"], f"{r['relative_loss']:.2f}", ha="center", va="center", bbox=frame)
    axis.set(xticks=places[0], xlabel="reward block j", title="residual / variance, held out")
    axis.set(yticks=places[1], ylabel="diffusion block i (0: VAE)")
    save_figure(figure, path)


def main(args):
    if os.environ.get("RANK", "0") != "0":
        return  # one process does all of it
    asked = ("reward", "backbone", "resolution")
    expect = {k: getattr(args, k) for k in asked if getattr(args, k)}
    cache = load_artifact(Path(args.out, "cache.pt"), expect, "01_cache_features.py")
    spec = cache["spec"]
    probe = cache["data"]["probe"]
    z_t = add_noise(probe["z0"].float(), probe["eps"], probe["t"])
    latent = to_tokens(resample(z_t, spec["reward_grid"], spec["antialias"]))
    fronts = [f.flatten(0, 1) for f in (latent, *probe["dit"])]
    targets = [g.flatten(0, 1) for g in probe["reward"]]
    blocks = range(1, len(fronts))
    if args.i not in (None, *blocks) or args.j not in (None, *range(1, len(targets) + 1)):
        fail(f"i runs to {blocks[-1]}, j to {len(targets)} in {args.out}/cache.pt (01's --j-max)")
    if not all(x.isfinite().all() for x in fronts + targets):
        fail(f"NaN or infinite features in {args.out}/cache.pt: does --dtype float16 overflow?")
    n = len(z_t) * 3 // 4 * latent.shape[1]  # tokens of the images that the grid is fitted on
    rows = []
    for i, F in enumerate(tqdm(fronts, desc="fit")):
        for j, G in enumerate(targets, 1):
            W, b, rank = fit_linear_stitch(F[:n], G[:n], args.rcond)
            loss, relative = stitch_loss(W, b, F[n:], G[n:])
            rows.append(dict(i=i, j=j, loss=loss, relative_loss=relative, rank=rank))
    print_table(rows, rows[0])

    depths = [args.j] if args.j else range(1, 5)
    data = {}
    for front, places in (("dit", [args.i] if args.i else blocks), ("vae", [0])):
        found = [r for r in rows if r["i"] in places and r["j"] in depths]
        best = min(found, key=lambda r: r["loss" if args.rank_by == "raw" else "relative_loss"])
        i, j = (best[k] for k in "ij")
        W, b, rank = fit_linear_stitch(fronts[i], targets[j - 1], args.rcond)
        data[front] = dict(W=W.float(), bias=b.float(), i=i, j=j, cls=[None, *probe["cls"]][j - 1])
        about = f"relative loss {best['relative_loss']:.3f}, rank {rank} of {W.shape[1] + 1}"
        print(f"{front}: (i, j) = ({i}, {j}), {about}, max |W| {W.abs().max():.3g}")
    chosen = {k: data["dit"][k] for k in "ij"}
    save_artifact(Path(args.out, "stitch.pt"), "02_fit_stitch", args, spec | chosen, data, [cache])
    save_table(args, "02_fit_stitch", rows, chosen=chosen)
    draw_grid(rows, chosen, Path(args.out, "02_fit_stitch.png"))


if __name__ == "__main__":
    main(parse_args())
