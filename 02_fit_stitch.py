"""Stage 02 -- choose where to stitch and solve the linear stitch in closed form.

Paper   StitchVM (arXiv 2605.19804) Sec. 4.1, App. C.1, Eqs. (7), (59)-(62)
            W_ij = argmin_W || W F_i - G_j ||_F^2 = G_j F_i^+ ,      (i*, j*) = argmin_ij of the residual
        F_i (M, D)  the frozen DiT's tokens after block i, of z_t      G_j (M, d)  the frozen reward's patch tokens before block j, of x_0
        Every token is a sample [D4]; a column of ones gives the bias. i = 0 stands for the VAE stitch: F_0 is the noisy latent itself.
Reads   out/cache.pt (01_cache_features.py)
Writes  out/stitch.pt  for the fronts 'dit' and 'vae': W (d, D), bias (d,), i, j, CLS;    out/02_fit_stitch.json, out/02_fit_stitch.png
Run     python 02_fit_stitch.py && python 02_fit_stitch.py --rank-by raw && python 02_fit_stitch.py --i 4 --j 1
Departs from the paper: the losses in the table are of held-out images (a quarter of the probe set); the W that is kept is fitted on all of it.
        The loss relative to the target's variance stands beside the raw one, because the scale of the residual stream grows with depth [D5].
        An explicit rcond: lstsq's own cut-off would invert the rounding noise of rank-deficient features [D7].
"""
from pathlib import Path

import torch
from tqdm import tqdm

from common import (Reward, add_noise, dit_blocks, fail, load_artifact, meta_backbone, parse_stage, print_table, report_dry_run, resample, save_artifact,
                    save_figure, save_table, stage_parser, to_tokens)

PRESETS = {"mini": dict(rank_by="relative"), "24gb": dict(rank_by="relative", resolution=512), "paper": dict(rank_by="raw", resolution=1024)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--rank-by", choices=("raw", "relative"), help="loss that chooses (i, j): the paper's, or relative to the target's variance")
    p.add_argument("--i", type=int, help="stitch after this diffusion block instead of the best one")
    p.add_argument("--j", type=int, help="stitch before this reward block instead of the best one")
    p.add_argument("--rcond", type=float, default=1e-6, help="singular values below rcond times the largest are cut")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def fit_linear_stitch(F, G, rcond=1e-6):
    """(62): the W (d, D) and bias (d,) that minimise ||F W^T + b - G||^2, and the rank. F (M, D), G (M, d), one token a row.

    float64 on the CPU: the cached features carry float32 rounding, and a driver without SVD (CUDA's only one) assumes full rank.
    """
    F = torch.cat([F.double().cpu(), torch.ones(len(F), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(F, G.double().cpu(), rcond=rcond, driver="gelsd")
    return solution.solution[:-1].T, solution.solution[-1], int(solution.rank)


def stitch_loss(W, b, F, G):
    """Mean over tokens of ||W f + b - g||^2, and the same divided by the target's variance, mean over tokens of ||g - mean g||^2."""
    F, G = F.double().cpu(), G.double().cpu()
    loss = (F @ W.T + b - G).square().sum(1).mean()
    return float(loss), float(loss / (G - G.mean(0)).square().sum(1).mean())
# ---- to here ----


def draw_grid(rows, chosen, path):
    import matplotlib.pyplot as plt
    I, J = (sorted({r[k] for r in rows}) for k in "ij")
    value = {(r["i"], r["j"]): r["relative_loss"] for r in rows}
    figure, axis = plt.subplots(figsize=(1.3 + 0.75 * len(J), 1.5 + 0.38 * len(I)))
    shown = axis.imshow([[value[i, j] for j in J] for i in I], cmap="viridis_r", vmin=0, vmax=1, aspect="auto")
    for a, i in enumerate(I):
        for b, j in enumerate(J):
            axis.text(b, a, f"{value[i, j]:.2f}", ha="center", va="center", color="white" if value[i, j] > 0.5 else "black", fontsize=8,
                      fontweight="bold" if (i, j) == chosen else None, bbox=dict(fill=False, edgecolor="red", pad=3) if (i, j) == chosen else None)
    axis.set(xticks=range(len(J)), xticklabels=J, yticks=range(len(I)), yticklabels=["VAE" if i == 0 else i for i in I],
             xlabel="reward block j", ylabel="diffusion block i", title="stitch residual / target variance\n(held-out images; red: chosen)")
    figure.colorbar(shown)
    save_figure(figure, path)


def dry_run(args):
    """By formula, because no network runs here: least squares by SVD takes 4 M D^2 + 8 D^3 (Golub & Van Loan, Sec. 5.5), on the CPU in float64."""
    reward = Reward(args.reward, args.preset, "meta", weights=False)
    backbone, _ = meta_backbone(args.backbone)
    d, D, M = reward.visual.conv1.out_channels, backbone.transformer.inner_dim, 200 * reward.visual.grid_size[0] ** 2
    case = dict(method="closed form", unit="(i, j)", tflop=(4 * M * D * D + 8 * D ** 3 + 4 * M * D * d) / 1e12, saved_gib=0.0,
                peak_gib=8 * M * (2 * D + 2 * d) / 2 ** 30, n=4 * len(dit_blocks(backbone.transformer)), tflops=0.2)
    report_dry_run(args, "02_fit_stitch", [case], [])


def main(args):
    if args.dry_run:
        return dry_run(args)
    expect = {"reward": args.reward, "backbone": args.backbone} | ({"resolution": args.resolution} if args.resolution else {})
    cache = load_artifact(Path(args.out) / "cache.pt", expect, "01_cache_features.py")
    spec, probe = cache["spec"], cache["data"]["probe"]
    zt = add_noise(probe["z0"].float(), probe["eps"], probe["t"])
    fronts = [to_tokens(resample(zt, spec["reward_grid"], spec["antialias"])), *probe["dit"]]  # i = 0: the VAE stitch
    n = len(zt) * 3 // 4  # images to fit on while ranking; their tokens never mix with the held-out images'
    rows = []
    for i, features in enumerate(tqdm(fronts, desc="fit")):
        for j, target in enumerate(probe["reward"], 1):
            W, b, rank = fit_linear_stitch(features[:n].flatten(0, 1), target[:n].flatten(0, 1), args.rcond)
            loss, relative = stitch_loss(W, b, features[n:].flatten(0, 1), target[n:].flatten(0, 1))
            rows.append(dict(i=i, j=j, loss=loss, relative_loss=relative, rank=rank))
    print_table(rows, ("i", "j", "loss", "relative_loss", "rank"))

    key = "loss" if args.rank_by == "raw" else "relative_loss"
    data = {}
    for front in ("dit", "vae"):
        wanted = [r for r in rows if (r["i"] > 0) == (front == "dit") and (front == "vae" or args.i in (None, r["i"])) and (r["j"] == args.j if args.j else r["j"] <= 4)]  # later j are shown, and taken if asked for
        if not wanted:
            fail(f"there is no (i, j) = ({args.i}, {args.j}) in {args.out}/cache.pt: i runs to {len(fronts) - 1}, j to {len(probe['reward'])} (see 01_cache_features.py --j-max)")
        best = min(wanted, key=lambda r: r[key])
        i, j = best["i"], best["j"]
        W, b, rank = fit_linear_stitch(fronts[i].flatten(0, 1), probe["reward"][j - 1].flatten(0, 1), args.rcond)
        data[front] = dict(W=W.float(), bias=b.float(), i=i, j=j, cls=probe["cls"][j - 2] if j > 1 else None)
        print(f"{front}: (i, j) = ({i}, {j}), relative loss {best['relative_loss']:.3f}, rank {rank} of {W.shape[1] + 1}, max |W| {W.abs().max():.3g}")
    chosen = dict(i=data["dit"]["i"], j=data["dit"]["j"])
    save_artifact(Path(args.out) / "stitch.pt", "02_fit_stitch", args, spec | chosen, data, [cache])
    save_table(args, "02_fit_stitch", rows, chosen=chosen)
    draw_grid(rows, (chosen["i"], chosen["j"]), Path(args.out) / "02_fit_stitch.png")


if __name__ == "__main__":
    main(parse_args())
