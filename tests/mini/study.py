"""The README's measurements, in one command each: python tests/mini/study.py selection | table [--reward NAME …] | readme

selection   short trainings of the value model of clip that differ in one choice (sigma law, learning rate, EMA, embedding target, length),
            compared on the tuning split only                                     -> assets/results/selection.json
table       01 to 04 with both baselines, for each reward, on the report split    -> assets/results/<reward>.json and the figures
readme      writes the tables of README.md and tests/mini/README.md from assets/results and quality.json

Two processes of one thread each run side by side.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TUNE = ["--coco", "tests/mini/data/tune/coco", "--flickr30k", ""]
VARIANTS = {"default": [], "uniform": ["--sigma-law", "uniform"], "ema .99": ["--ema", "0.99"], "unit": ["--embedding", "unit"],
            "lr 2.5e-4": ["--lr", "2.5e-4"], "lr 1e-3": ["--lr", "1e-3"], "lam_tok .1": ["--lam-tok", "0.1"], "twice the steps": ["--steps", "1600"]}


def run(script, *flags):
    done = subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(f"{script} {' '.join(map(str, flags))}: {'done' if done.returncode == 0 else done.stderr[-2000:]}", flush=True)
    done.check_returncode()


def selection(out=ROOT / "runs/selection", names=VARIANTS):
    run("01_cache_features.py", "--out", out)
    run("02_fit_stitch.py", "--out", out)

    def one(name):
        folder = out / name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        for file in ("cache.pt", "stitch.pt", "cache"):
            if not (folder / file).exists():
                (folder / file).symlink_to((out / file).resolve())
        run("03_finetune.py", "--out", folder, "--steps", 800, *VARIANTS[name])
        run("04_eval_noisy.py", "--out", folder, "--methods", "stitchvm", *TUNE)
        rows = json.loads((folder / "04_eval_noisy.json").read_text())["rows"]
        return {"variant": name} | {f"{m} {r['sigma']}": r[m] for r in rows if r["method"] == "stitchvm" and r["metric"] == "recall@1_i2t" for m in ("value", "value_mse", "slope")}

    with ThreadPoolExecutor(2) as pool:
        table = list(pool.map(one, names))
    (ROOT / "assets/results").mkdir(parents=True, exist_ok=True)
    (ROOT / "assets/results/selection.json").write_text(json.dumps(table, indent=1))
    for row in table:
        print(row["variant"].ljust(16), *(f"{k} {row[k]:.3f}" for k in row if k.startswith("value ")), "|", *(f"{row[k]:.4f}" for k in row if k.startswith("value_mse")))


def table(rewards):
    def one(reward):
        flags = ["--reward", reward]
        run("01_cache_features.py", *flags)
        run("02_fit_stitch.py", *flags)
        run("03_finetune.py", *flags)
        run("03_finetune.py", *flags, "--front", "vae")
        if reward != "aesthetic":
            run("03_finetune.py", *flags, "--objective", "noisyclip")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, rewards))
    results = ROOT / "assets/results"
    results.mkdir(parents=True, exist_ok=True)
    for reward in rewards:
        out = ROOT / f"runs/mini/sd3.5-medium_{reward}"
        subprocess.run([sys.executable, "04_eval_noisy.py", "--reward", reward], cwd=ROOT, check=True)  # alone, because it measures time
        for name, figure in (("04_quality", "quality"), ("04_cost", "cost"), ("02_fit_stitch", "grid")):
            shutil.copy(out / f"{name}.png", ROOT / f"assets/{figure}_{reward}.png")
        shutil.copy(out / "04_eval_noisy.json", results / f"04_{reward}.json")
        shutil.copy(out / "02_fit_stitch.json", results / f"02_{reward}.json")


PAPER = {"clean": [57.90] * 5, "stitchvm": [56.82, 56.22, 52.50, 32.52, 3.68], "vae-stitch": [42.62, 38.91, 21.14, 2.78, 0.08],
         "noisyclip": [46.07, 45.16, 32.71, 6.14, 2.11]}  # CLIP + SD 3.5 Medium, MSCOCO, image to text Recall@1 (Table 5)
SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)


def between(path, marker, text):
    whole = path.read_text()
    start, end = whole.index(f"<!-- {marker} -->") + len(f"<!-- {marker} -->"), whole.index(f"<!-- /{marker} -->")
    path.write_text(whole[:start] + "\n" + text + "\n" + whole[end:])


def quality_rows(rows, metric, methods, scale=1):
    """Markdown rows of one metric: a method and its value at each sigma."""
    lines = []
    for method in methods:
        mine = {r["sigma"]: r for r in rows if r["method"] == method and r["metric"] == metric and r["value"] is not None}
        if mine:
            cell = lambda r: f"{scale * r['value']:.{1 if scale > 1 else 3}f} ± {scale * r['value_se']:.{1 if scale > 1 else 3}f}"
            lines.append(f"| {method} | " + " | ".join(cell(mine.get(s, mine.get(0.0))) for s in SIGMAS) + " |")
    return lines


def readme():
    results, text = ROOT / "assets/results", []
    head = ["| sigma | " + " | ".join(map(str, SIGMAS)) + " |", "|---" * 6 + "|"]
    for file in sorted(results.glob("04_*.json"), key=lambda f: (f.stem != "04_clip", f.stem)):
        table = json.loads(file.read_text())
        first = table["rows"][0]["benchmark"]
        rows, reward = [r for r in table["rows"] if r["benchmark"] == first], table["config"]["reward"]
        for metric in dict.fromkeys(r["metric"] for r in rows):
            scale, methods = 1 if metric == "srcc" else 100, ("clean", "stitchvm", "vae-stitch", "noisyclip", "tweedie")
            text += [f"**{reward}**, {metric} on {first}, n = {rows[0]['n']}, {max(r['draws'] for r in rows)} noise draws", "", *head]
            if reward == "clip" and metric == "recall@1_i2t":
                text += [f"| paper: {m} | " + " | ".join(f"{v:.1f}" for v in PAPER[m]) + " |" for m in PAPER]
            text += [*quality_rows(rows, metric, methods, scale), ""]
        shared = {(r["method"], r["sigma"]): r for r in rows if "value_mse_shared" in r}
        methods = list(dict.fromkeys(m for m, _ in shared))
        text += [f"**{reward}**, error of the value (V - r)^2 on the same {min(r['n'] for r in rows)} noisy latents, and the cost of one value at sigma 0.5", "",
                 head[0] + " ms | GFLOP |", "|---" * 8 + "|"]
        for m in methods:
            cost = shared[m, 0.5]
            text.append(f"| {m} | " + " | ".join(f"{shared[m, s]['value_mse_shared']:.4f}" for s in SIGMAS) +
                        (f" | {cost['ms_per_value']:.2f} | {cost['gflop_per_value']:.2f} |" if cost["ms_per_value"] else " | | |"))
        text.append("")
    between(ROOT / "README.md", "results", "\n".join(text))
    quality = json.loads((ROOT / "tests/mini/quality.json").read_text())
    keys = list(dict.fromkeys(k for row in quality.values() for k in row))
    cell = lambda v: "" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" if v < 5 else f"{v:.1f}"
    lines = ["| | " + " | ".join(quality) + " |", "|---" * (len(quality) + 1) + "|", *(f"| {k} | " + " | ".join(cell(row.get(k)) for row in quality.values()) + " |" for k in keys)]
    between(ROOT / "tests/mini/README.md", "quality", "\n".join(lines))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("selection", "table", "readme"))
    p.add_argument("--reward", nargs="+", default=["clip", "hpsv2", "aesthetic", "dfn-clip"])
    args = p.parse_args()
    {"selection": selection, "table": lambda: table(args.reward), "readme": readme}[args.what]()
