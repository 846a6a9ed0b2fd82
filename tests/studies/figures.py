"""The figures of the pages that one call of draw_lines does not draw, from docs/results/*.json."""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from pages import ROOT, of_seeds, reported
from torchvision.io import read_image

from common import image_grid, save_figure

FIGURES = ROOT / "docs/figures"
COLOURS = {
    "stitchvm": "tab:red",
    "vae-stitch": "tab:blue",
    "noisyclip": "tab:green",
    "tweedie": "tab:orange",
    "constant": "tab:gray",
    "mc-1": "tab:purple",
    "mc-16": "tab:pink",
}


def front():
    """Retrieval and error of clip's value against the noise level."""
    rows = [r for r in reported("04_clip") if r["benchmark"] == "coco"]
    rows = [r for r in rows if r["metric"] == "recall@1_i2t"]
    clean = next(r for r in rows if r["method"] == "clean")["value"]
    figure = Figure((9, 3.4))
    left, right = figure.subplots(1, 2)
    left.axhline(100 * clean, ls="--", color="black", label="clean images")
    for method, colour in COLOURS.items():
        found = [r for r in rows if r["method"] == method]
        sigmas = [r["sigma"] for r in found]
        if method != "constant" and not method.startswith("mc"):
            y, error = ([100 * r[k] for r in found] for k in ("value", "value_se"))
            left.errorbar(sigmas, y, error, marker="o", ms=4, capsize=2, color=colour, label=method)
        y = [r["value_mse_shared"] for r in found]
        right.plot(sigmas, y, marker="o", ms=4, color=colour, label=method)
    left.set(xlabel="sigma", title="image to text Recall@1, %, 500 scenes")
    right.set(xlabel="sigma", yscale="log", title="(V - r)^2 on the same noisy latents")
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, FIGURES / "front.png")


def scaling():
    """06: reward, judge and geneval against work, N beside the points (Fig. 3)."""
    rows = reported("06_scaling")
    figure = Figure((13, 3.8))
    for axis, key in zip(figure.subplots(1, 3), ("reward", "judge", "geneval"), strict=True):
        for curve in dict.fromkeys(r["curve"] for r in rows):
            found = [r for r in rows if r["curve"] == curve]
            x, y, error = ([r[k] for r in found] for k in ("gflop_per_prompt", key, f"{key}_se"))
            axis.errorbar(x, y, error, marker="o", ms=4, capsize=2, label=curve)
            for r in found:
                point = (r["gflop_per_prompt"], r[key])
                axis.annotate(r["n_particles"], point, (3, 3), "data", "offset points", fontsize=6)
        axis.set(xlabel="GFLOP a prompt", title=key)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, FIGURES / "06_scaling.png")


def seeds(stage):
    """07 or 08: mean over the seeds of what was trained on and what was not, against work."""
    tables = of_seeds(f"{stage}_seed")
    figure = Figure((12, 3.4))
    for axis, key in zip(figure.subplots(1, 3), ("reward", "judge", "geneval"), strict=True):
        for k, method in enumerate(dict.fromkeys(r["method"] for r in tables[0])):
            runs = [[r for r in t if r["method"] == method] for t in tables]
            for run in runs:
                x, y = ([r[name] for r in run] for name in ("gflop", key))
                axis.plot(x, y, color=f"C{k}", lw=0.8, alpha=0.4)
            points = list(zip(*runs, strict=False))
            x, y = ([statistics.mean(r[n] for r in p) for p in points] for n in ("gflop", key))
            axis.plot(x, y, "o-", ms=4, color=f"C{k}", label=method)
        axis.set(xlabel="GFLOP of training", title=key)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, FIGURES / f"{stage}_seeds.png")


def strip(out):
    """The same prompts and noises plain, by standard DPS and by V, of a run of 05 in `out`."""
    table = json.loads(Path(out, "05_dps.json").read_text())
    shown = ("flow", "tweedie", "stitchvm")
    folders = {r["method"]: Path(out, r["images"]) for r in table["rows"] if r["method"] in shown}
    images = [
        [read_image(str(folder / f"{k:05d}/samples/0000.png")) for k in range(8)]
        for folder in folders.values()
    ]
    cases = [folders["flow"] / f"{k:05d}/metadata.jsonl" for k in range(8)]
    prompts = [json.loads(case.read_text())["prompt"] for case in cases]
    labels = ("plain", "standard DPS", "value model")
    image_grid(images, labels, prompts, FIGURES / "strip.png")


def draw_all():
    Path(FIGURES).mkdir(exist_ok=True)
    front()
    scaling()
    seeds("07")
    seeds("08")
