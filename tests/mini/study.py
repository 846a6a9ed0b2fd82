"""The README's measurements, in one command each: python tests/mini/study.py selection | table [--reward NAME …]

selection   short trainings of the value model of clip that differ in one choice (sigma law, learning rate, EMA, embedding target, length),
            compared on the tuning split only                                     -> assets/results/selection.json
table       01 to 04 with both baselines, for each reward, on the report split    -> assets/results/<reward>.json and the figures

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


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("selection", "table"))
    p.add_argument("--reward", nargs="+", default=["clip", "hpsv2", "aesthetic", "dfn-clip"])
    args = p.parse_args()
    selection() if args.what == "selection" else table(args.reward)
