"""The README's measurements, in one command each: python tests/mini/study.py selection | table | dps | fks | draft | nft | counts | readme

selection   short trainings of the value model of clip that differ in one choice (sigma law, learning rate, EMA, embedding target, length),
            compared on the tuning split only                                     -> assets/results/selection.json
table       01 to 04 with both baselines, for each backbone and reward, on the report split    -> assets/results/04_<…>.json and the figures
dps, fks    05 with each reward, and guided above or below sigma .5 only; 06's scaling in N and M, its proposals  -> assets/results/05_*, 06_*
draft, nft  07 and 08 at equal work, three seeds each; 07's other methods, 08's stop windows and gradient  -> assets/results/07_*, 08_*, gradient.json
counts      what the paper measured beside what --dry-run counts at published size, and every pair of models  -> tables in README.md
readme      writes the tables of README.md, assets/results/README.md and tests/mini/README.md from assets/results and quality.json

Processes of one thread each run side by side, as many as --jobs says.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = 2
TUNE = ["--coco", "tests/mini/data/tune/coco", "--flickr30k", ""]
SHORT = ["--steps", 1000, "--batch", 32, "--lr", "1e-3", "--sigma-law", "logit-normal"]  # of every variant, but for what it changes
VARIANTS = {"base": [], "uniform": ["--sigma-law", "uniform"], "ema .99": ["--ema", "0.99"], "unit": ["--embedding", "unit"],
            "lr 5e-4": ["--lr", "5e-4"], "lr 2e-3": ["--lr", "2e-3"], "uniform, lr 2e-3": ["--sigma-law", "uniform", "--lr", "2e-3"],
            "lam_tok .1": ["--lam-tok", "0.1"], "batch 64, half the steps": ["--batch", "64", "--steps", 500], "twice the steps": ["--steps", 2000]}


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
        run("03_finetune.py", "--out", folder, *SHORT, *VARIANTS[name])
        run("04_eval_noisy.py", "--out", folder, "--methods", "stitchvm", *TUNE)
        rows = json.loads((folder / "04_eval_noisy.json").read_text())["rows"]
        return {"variant": name} | {f"{m} {r['sigma']}": r[m] for r in rows if r["method"] == "stitchvm" and r["metric"] == "recall@1_i2t" for m in ("value", "value_mse", "slope")}

    with ThreadPoolExecutor(JOBS) as pool:
        table = list(pool.map(one, names))
    (ROOT / "assets/results").mkdir(parents=True, exist_ok=True)
    (ROOT / "assets/results/selection.json").write_text(json.dumps(table, indent=1))
    for row in table:
        print(row["variant"].ljust(16), *(f"{k} {row[k]:.3f}" for k in row if k.startswith("value ")), "|", *(f"{row[k]:.4f}" for k in row if k.startswith("value_mse")))


def table(backbones, rewards):
    results = ROOT / "assets/results"
    results.mkdir(parents=True, exist_ok=True)

    def one(pair):
        backbone, reward = pair
        main, flags, out = backbone == "sd3.5-medium", ["--backbone", backbone, "--reward", reward], ROOT / f"runs/mini/{backbone}_{reward}"
        run("01_cache_features.py", *flags)
        run("02_fit_stitch.py", *flags)
        run("03_finetune.py", *flags)
        if backbone != "sd3.5-large":  # its VAE is sd3.5-medium's, and so are the values that read latents only
            run("03_finetune.py", *flags, "--front", "vae")
        if main and reward != "aesthetic":
            run("03_finetune.py", *flags, "--objective", "noisyclip")
        run("04_eval_noisy.py", *flags, *([] if main else ["--methods", "stitchvm", "vae-stitch"]))
        name = reward if main else f"{backbone}_{reward}"
        for picture, figure in (("04_quality", "quality"), ("04_cost", "cost"), ("02_fit_stitch", "grid")) if main else ():
            shutil.copy(out / f"{picture}.png", ROOT / f"assets/{figure}_{name}.png")
        for stage in ("02_fit_stitch", "04_eval_noisy"):
            shutil.copy(out / f"{stage}.json", results / f"{stage[:2]}_{name}.json")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(one, [(b, r) for b in backbones for r in rewards]))
    if "sd3.5-large" in backbones:  # Table 6: a Medium value on Large's latents is, the latent space being one, the same file
        for reward in [r for r in rewards if (ROOT / f"runs/mini/sd3.5-medium_{r}/value.pt").exists()]:
            run("04_eval_noisy.py", "--backbone", "sd3.5-large", "--reward", reward, "--out", f"runs/mini/medium-on-large_{reward}", "--methods", "stitchvm",
                "--value", f"runs/mini/sd3.5-medium_{reward}/value.pt")
            shutil.copy(ROOT / f"runs/mini/medium-on-large_{reward}/04_eval_noisy.json", results / f"04_medium-on-large_{reward}.json")


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


MAIN = {"clip": ("coco", "recall@1_i2t"), "dfn-clip": ("coco", "recall@1_i2t"), "hpsv2": ("hpdv2", "hpdv2_accuracy"), "aesthetic": ("ava", "srcc")}


def twelve(results):
    """Markdown: the value models of every pair and the VAE stitches of both VAEs, at the five noise levels (Table 5), and Medium's on Large's latents (Table 6)."""
    lines = ["## Every pair", "", "| reward | | " + " | ".join(map(str, SIGMAS)) + " |", "|---" * 7 + "|"]
    for reward, (benchmark, metric) in MAIN.items():
        for name, label in (("", "sd3.5-medium"), ("sd3.5-large_", "sd3.5-large"), ("medium-on-large_", "sd3.5-medium's value, for sd3.5-large"), ("flux_", "flux")):
            if (file := results / f"04_{name}{reward}.json").exists():
                table = json.loads(file.read_text())
                rows = [r for r in table["rows"] if r["benchmark"] == benchmark]
                for line in quality_rows(rows, metric, ("clean",) * (not name) + ("stitchvm", "vae-stitch"), 1 if metric == "srcc" else 100):
                    method, cells = line[2:].split(" |", 1)
                    what = {"clean": f"clean images, {metric}, n = {rows[0]['n']}", "stitchvm": label, "vae-stitch": f"VAE stitch, {'flux' if name == 'flux_' else 'sd3.5'}'s VAE"}[method]
                    lines.append(f"| {reward} | {what} |{cells}")
    return [*lines, ""]


def read_rows(file, split="report"):
    return [r for r in json.loads(file.read_text())["rows"] if r.get("split", split) == split]


def measured(row, key):
    return f"{row[key]:.3f} ± {row[key + '_se']:.3f}"


def guided(results):
    """Markdown: 05 of each reward on the report prompts."""
    lines = ["| reward | method | c | steps | reward | judge | geneval | time | work | MB kept |", "|---" * 10 + "|"]
    for reward in MAIN:
        if (file := results / f"05_{reward}.json").exists():
            for r in read_rows(file):
                c = ", ".join(f"{r[k]:g}" for k in ("strength", "strength_tweedie") if r.get(k))
                lines.append(f"| {reward} | {r['method']} | {c} | {r['steps']} | " + " | ".join(measured(r, k) for k in ("reward", "judge", "geneval")) +
                             f" | {r['time_of_flow']:.1f} | {r['gflop_of_flow']:.1f} | {r['peak_memory_mb']:.1f} |")
    return lines


def steered(results):
    """Markdown: 06's scaling study, a line for each method and a column for each N."""
    if not (file := results / "06_scaling.json").exists():
        return []
    rows = read_rows(file)
    sizes = sorted({r["n_particles"] for r in rows})
    lines = ["| reward (GFLOP a prompt) | " + " | ".join(f"N = {n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for curve in dict.fromkeys(r["curve"] for r in rows):
        mine = {r["n_particles"]: r for r in rows if r["curve"] == curve}
        lines.append(f"| {curve} | " + " | ".join(f"{measured(mine[n], 'reward')} ({mine[n]['gflop_per_prompt']:.0f})" if n in mine else "" for n in sizes) + " |")
    return lines


def larger(results):
    """Markdown: 06 on sd3.5-large, steered by its own value model and by sd3.5-medium's (Table 6)."""
    files = {value: results / f"06_large-by-{value}.json" for value in ("large", "medium")}
    if not all(f.exists() for f in files.values()):
        return []
    lines = ["| sd3.5-large, steered by | method | N | n | reward | judge | geneval |", "|---" * 7 + "|"]
    for value, file in files.items():
        for r in read_rows(file):
            lines.append(f"| {f'the value of sd3.5-{value}' if r['method'] == 'fks+stitchvm' else ''} | {r['curve']} | {r['n_particles']} | {r['n']} | " +
                         " | ".join(measured(r, k) for k in ("reward", "judge", "geneval")) + " |")
    return lines


def finetuned(results):
    """Markdown: 07 and 08 at equal work, mean and standard error over the seeds, of a single one over its prompts; the work after which a method has its baseline's last reward, in each seed."""
    sys.path.insert(0, str(ROOT))
    from common import how_reached  # here, for it brings torch with it
    lines = ["| | method | seeds | reward | gain | judge | geneval | GFLOP | the baseline's last reward after |", "|---" * 9 + "|"]
    mean = lambda x, alone="": f"{statistics.mean(x):.3f} ± {statistics.stdev(x) / len(x) ** 0.5:.3f}" if len(x) > 1 else alone or f"{x[0]:.3f}"
    for stage in ("07", "08"):
        tables = [json.loads(f.read_text()) for f in sorted(results.glob(f"{stage}_seed?.json"))]
        base = [t["rows"][0] for t in tables]
        for method in ["base", *dict.fromkeys(r["method"] for r in tables[0]["rows"])] if tables else ():
            last = base if method == "base" else [[r for r in t["rows"] if r["method"] == method][-1] for t in tables]
            shares = [how_reached(w) for t in tables for w in t["work_saved"] if w.get("run", w.get("method")) == method]
            gain = "" if method == "base" else mean([a["reward"] - b["reward"] for a, b in zip(last, base)])
            reward, *others = (mean([r[k] for r in last], measured(last[0], k)) for k in ("reward", "judge", "geneval"))
            lines.append(f"| {stage} | {method} | {len(tables)} | {reward} | {gain} | {' | '.join(others)}" +
                         f" | {statistics.mean(r['gflop'] for r in last):,.0f} | {', '.join(shares)} |")
    return lines


def windows(results):
    """Markdown: 08 with the value model stopped in other windows, at the end."""
    rows = {r["run"]: r for r in read_rows(results / "08_windows.json")}
    lines = ["| stops after | reward | gain | judge | geneval | updates | GFLOP |", "|---" * 7 + "|"]
    return lines + [f"| {r['window'][0]} to {r['window'][1]} of 25 | " + " | ".join(measured(r, k) for k in ("reward", "gain", "judge", "geneval")) + f" | {r['update']} | {r['gflop']:,.0f} |"
                    for r in rows.values()]


def gradients(results):
    """Markdown: what part of 08's gradient is signal, without and with the value model."""
    lines = ["| | stopped at sigma | correlation of V and r | signal to noise of a TFLOP | noise levels of an image | cosine with nft's |", "|---" * 6 + "|"]
    return lines + [f"| {r['method']} | {r['sigma']:.2f} | {r['correlation']:.2f} | {r['snr_per_tflop']:.3f} ± {r['snr_per_tflop_se']:.3f} | {r['best_times']} | {r['cosine']:.2f} |"
                    for r in read_rows(results / "gradient.json")]


def readme():
    results, front, page = ROOT / "assets/results", [], ["# Results", "", "Written by `python tests/mini/study.py readme` from the tables in this folder.", ""]
    page += twelve(results)
    head = ["| sigma | " + " | ".join(map(str, SIGMAS)) + " |", "|---" * 6 + "|"]
    for file in sorted(results.glob("04_*.json"), key=lambda f: (f.stem != "04_clip", f.stem)):
        table = json.loads(file.read_text())
        title, benchmarks = f"{table['config']['reward']} + {table['config']['backbone']}", {}
        page += [f"## {file.stem.removeprefix('04_')}: {title}", ""]
        for r in table["rows"]:
            benchmarks.setdefault((r["benchmark"], r["metric"]), []).append(r)
        if (ROOT / f"assets/quality_{file.stem.removeprefix('04_')}.png").exists():
            page += [f"![{picture}](../{picture}_{file.stem.removeprefix('04_')}.png)" for picture in ("grid", "quality", "cost")] + [""]
        for (benchmark, metric), rows in benchmarks.items():
            scale = 1 if metric == "srcc" else 100
            lines = [f"**{title}**: {metric} on {benchmark}, n = {rows[0]['n']}, {max(r['draws'] for r in rows)} noise draws", "", *head]
            main = file.stem == "04_clip" and (benchmark, metric) == ("coco", "recall@1_i2t")
            if main:
                lines += [f"| paper: {m} | " + " | ".join(f"{v:.1f}" for v in PAPER[m]) + " |" for m in PAPER]
            lines += [*quality_rows(rows, metric, ("clean", "stitchvm", "vae-stitch", "noisyclip", "tweedie"), scale), ""]
            page += lines
            front += lines if main else []
        shared = {(r["method"], r["sigma"]): r for r in table["rows"] if "value_mse_shared" in r}
        if shared:
            lines = [f"**{title}**: error of the value, (V - r)^2 on the same {min(r['n'] for r in shared.values())} noisy latents, and the cost of one value at sigma 0.5", "",
                     head[0] + " ms | GFLOP |", "|---" * 8 + "|"]
            for m in dict.fromkeys(m for m, _ in shared):
                cost = shared[m, 0.5]
                lines.append(f"| {m} | " + " | ".join(f"{shared[m, s]['value_mse_shared']:.4f}" for s in SIGMAS) +
                             (f" | {cost['ms_per_value']:.2f} | {cost['gflop_per_value']:.2f} |" if cost["ms_per_value"] else " | | |"))
            page += [*lines, ""]
            front += [*lines, ""] if file.stem == "04_clip" else []
        first = [r for r in table["rows"] if r["metric"] == table["rows"][0]["metric"] and r["benchmark"] == table["rows"][0]["benchmark"]]
        calibrated = {(r["method"], r["sigma"]): f"{r['mean_v'] - r['mean_r']:+.3f}, {r['std_v'] / r['std_r']:.2f}, {r['slope']:.2f}" for r in first if "mean_v" in r}
        page += [f"**{title}**: calibration of V against r over all images and texts: mean V - mean r, spread of V / spread of r, slope of r on V (1 for a conditional mean)", "", *head]
        page += [f"| {m} | " + " | ".join(calibrated[m, s] for s in SIGMAS) + " |" for m in dict.fromkeys(m for m, _ in calibrated) if m not in ("constant", "mc-1", "mc-4", "mc-16")] + [""]
    if (results / "selection.json").exists():
        page += ["## Choices of 03", "", "clip + sd3.5-medium, tuning split, 500 images, 1,000 steps of 32 where nothing else is said: recall@1_i2t, then (V - r)^2, at the five sigmas.", "",
                 "| | " + " | ".join([f"R@1 {x}" for x in SIGMAS] + [f"error {x}" for x in SIGMAS]) + " |", "|---" * 11 + "|"]
        page += [f"| {r['variant']} | " + " | ".join([f"{100 * r[f'value {x}']:.1f}" for x in SIGMAS] + [f"{r[f'value_mse {x}']:.4f}" for x in SIGMAS]) + " |"
                 for r in json.loads((results / "selection.json").read_text())] + [""]
    page += [line for file in sorted(results.glob("0[5-8]_*.json")) for line in comparison(file)]
    between(ROOT / "README.md", "results", "\n".join(front).rstrip())
    for marker, lines in (("guided", guided), ("steered", steered), ("larger", larger), ("finetuned", finetuned), ("windows", windows), ("gradient", gradients)):
        between(ROOT / "README.md", marker, "\n".join(lines(results)))
    (results / "README.md").write_text("\n".join(page))
    quality = json.loads((ROOT / "tests/mini/quality.json").read_text())
    keys = list(dict.fromkeys(k for row in quality.values() for k in row))
    cell = lambda v: "" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" if v < 5 else f"{v:.1f}"
    lines = ["| | " + " | ".join(quality) + " |", "|---" * (len(quality) + 1) + "|", *(f"| {k} | " + " | ".join(cell(row.get(k)) for row in quality.values()) + " |" for k in keys)]
    between(ROOT / "tests/mini/README.md", "quality", "\n".join(lines))


def studies(stage, rewards):
    """The jobs of a comparison: [(name of its results, script, flags)]."""
    value = lambda reward: ["--reward", reward, "--value", f"runs/mini/sd3.5-medium_{reward}/value.pt"]
    if stage == "dps":
        wide = ["--limit", 100, "--tune-limit", 32, *(x for m in ("tweedie", "stitchvm") for x in (f"--strengths-{m}", 5, 10, 20, 40, 80))]
        return [(f"05_{r}", "05_dps.py", [*value(r), *wide]) for r in rewards] + [
            (f"05_{rewards[0]}-{name}", "05_dps.py", [*value(rewards[0]), *wide, "--methods", "flow", "tweedie", "stitchvm", "--no-equal-time", *flags])
            for name, flags in (("above", ["--guide-to", 0.5]), ("below", ["--guide-from", 0.5]))]
    if stage == "fks":
        both, small = ["--methods", "bon", "fks", "fks+stitchvm"], ["--potential-value", "stitchvm", "--limit", 64, "--m", 4]
        large = ["--backbone", "sd3.5-large", *small]
        return [("06_lam", "06_fks.py", [*value("clip"), *both, *small, "--prompts", "tests/mini/data/tune/drawbench.txt", "--lam", 0.5, 1, 2, 4]),
                ("06_scaling", "06_fks.py", [*value("clip"), *both, "--potential-value", "stitchvm", "--limit", 100, "--n", 2, 4, 6, 8, 10, 12, 14, "--n-stitchvm", 2, 4, 6, 8, "--m", 2, 4, 6]),
                ("06_proposals", "06_fks.py", [*value("clip"), *small, "--methods", "bon", "fks+stitchvm", "--lam", 1, 4, "--proposal", "argmax", "corrected", "--report", "best", "mean"]),
                ("06_large-by-large", "06_fks.py", [*large, *both, "--value", "runs/mini/sd3.5-large_clip/value.pt"]),
                ("06_large-by-medium", "06_fks.py", [*large, "--methods", "fks+stitchvm", "--value", "runs/mini/sd3.5-medium_clip/value.pt"])]
    if stage == "draft":
        long = [*value("clip"), "--gflop", 4000, "--eval-limit", 100, "--eval-every", 20]
        return [(f"07_seed{seed}", "07_draft.py", [*long, "--seed", seed]) for seed in range(3)] + [
            ("07_methods", "07_draft.py", [*long, "--grid", "even", "--methods", "draft-1", "alignprop", "draft-1+stitchvm"])]
    online = [*value("clip"), "--eval-every", 5, "--gflop"]
    return [(f"08_seed{seed}", "08_nft.py", [*online, 10000, "--seed", seed]) for seed in range(3)] + [
        ("08_windows", "08_nft.py", [*online, 7000, "--methods", "nft+stitchvm", "--stop-window", "2-12", "12-17", "12-25", "20-25"]),
        ("gradient", "tests/mini/gradient.py", [*value("clip"), "--groups", 100, "--every", 3, "--stops", 14, 20])]


def compare(stage, rewards, only=None):
    jobs = studies(stage, rewards)
    if wrong := set(only or ()) - {name for name, *_ in jobs}:
        sys.exit(f"error: {stage} has no job {', '.join(sorted(wrong))}: there are {', '.join(name for name, *_ in jobs)}")

    def one(job):
        name, script, flags = job
        run(script, "--out", f"runs/study/{name}", *flags)
        out = ROOT / "runs/study" / name
        shutil.copy(out / f"{Path(script).stem}.json", ROOT / f"assets/results/{name}.json")
        main = name in ("06_scaling", "07_seed0", "08_seed0", *(f"05_{r}" for r in MAIN))  # of the others the images are not kept
        for picture in (p for p in out.glob(f"{script[:2]}_*.png") if main or not p.stem.endswith("grid")):
            shutil.copy(picture, ROOT / f"assets/{name}_{picture.stem[3:]}.png")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(one, [job for job in jobs if not only or job[0] in only]))


COLUMNS = {"05": ("method", "strength", "steps", "n", "s_per_sample", "time_of_flow", "gflop_per_sample", "gflop_of_flow", "peak_memory_mb"),
           "06": ("method", "n_particles", "m_proposals", "lambda", "proposal", "potential_value", "report", "n", "s_per_prompt", "gflop_per_prompt"),
           "07": ("method", "update", "n", "seconds", "gflop"), "08": ("run", "update", "n", "seconds", "gflop")}


def comparison(file):
    """Markdown of a table of 05 to 08: what is reported, without the sweeps on tuning prompts, and its figures."""
    rows, keys, command = read_rows(file), COLUMNS[file.stem[:2]], json.loads(file.read_text())["provenance"]["command"]
    metrics = ["reward", *(k for k in rows[0] if f"{k}_se" in rows[0] and k not in ("reward", "gain"))]
    cell = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    pictures = [f"[{p.stem.removeprefix(file.stem + '_')}](../{p.name})" for p in sorted((ROOT / "assets").glob(f"{file.stem}_*.png"))]
    lines = [f"## {file.stem}" + ", on tuning prompts" * (file.stem == "06_lam"), "", f"`{command}`; figures: {', '.join(pictures)}", "",
             "| " + " | ".join([*keys, *metrics]) + " |", "|---" * (len(keys) + len(metrics)) + "|"]
    lines += ["| " + " | ".join([*(cell(r.get(k)) for k in keys), *(measured(r, m) if m in r else "" for m in metrics)]) + " |" for r in rows]
    return [*lines, ""]


@cache
def cases(script, *flags):
    """{method: case} of a dry run at the paper's settings."""
    done = subprocess.run([sys.executable, script, "--dry-run", "--preset", "paper", *map(str, flags)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=True)
    return {c["method"]: c for c in json.loads(done.stdout.splitlines()[-1])["cases"]}


def counts():
    """What the dry runs count for every pair of models, and what the paper measured on its GPUs beside what they count, into README.md."""
    def pair(backbone, reward):
        build, step = (cases(s, "--backbone", backbone, "--reward", reward) for s in ("03_finetune.py", "05_dps.py"))
        value = step.get("stitchvm, i = 4, shared", step["stitchvm, i = 4"])
        return (f"| {backbone} | {reward} | {build['stitchvm, i = 4']['hours']:.1f} h, {build['stitchvm, i = 4']['fits']} | {step['flow']['tflop']:.1f}, {step['tweedie']['tflop']:.1f}, "
                f"{value['tflop']:.1f} | {step['tweedie']['fits']}, {value['fits']} |")

    lines = ["| backbone | reward | finetuning a value (03), hours and card | DPS step, TFLOP: plain, standard, value (i = 4, shared where it can be) | cards |", "|---|---|---|---|---|"]
    with ThreadPoolExecutor(JOBS) as pool:
        lines += pool.map(pair, *zip(*product(("sd3.5-medium", "sd3.5-large", "flux"), ("clip", "dfn-clip", "hpsv2", "aesthetic"))))
    between(ROOT / "README.md", "pairs", "\n".join(lines))

    lines = ["| at published size | the paper measured | the dry runs count |", "|---|---|---|"]
    for backbone, reward, speed, memory in (("sd3.5-medium", "hpsv2", "3.20x", "56.4 -> 26.0 GB"), ("sd3.5-medium", "clip", "3.58x", None),
                                            ("sd3.5-large", "hpsv2", "2.33x", "89.3 -> 43.2 GB"), ("sd3.5-large", "clip", "2.29x", None)):
        c = cases("05_dps.py", "--backbone", backbone, "--reward", reward)
        ratio = lambda method: f"{c['tweedie']['tflop'] / c[method]['tflop']:.2f}x"
        lines.append(f"| DPS, {backbone}, {reward}, 1024: work of a step | {speed} less | {ratio('stitchvm, i = 4')} less at i = 4, {ratio('stitchvm, i = 4, shared')} with the prefix shared; "
                     f"i = 12: {ratio('stitchvm, i = 12')}, {ratio('stitchvm, i = 12, shared')} |")
        if memory:
            tweedie, value, again = (c[m] for m in ("tweedie", "stitchvm, i = 4", "tweedie, checkpointing"))
            lines.append(f"| the same, memory | {memory} | kept for backward {tweedie['saved_gib']:.1f} -> {value['saved_gib']:.1f} GiB (standard DPS with checkpointing {again['saved_gib']:.1f}, at "
                         f"{again['tflop'] / tweedie['tflop']:.2f}x the work), with the weights {tweedie['peak_gib']:.1f} -> {value['peak_gib']:.1f}; the paper's include text encoders |")
    c = cases("06_fks.py", "--backbone", "flux", "--reward", "hpsv2", "--methods", "fks", "fks+stitchvm", "--n", 14, "--n-stitchvm", 8, "--m", 6)
    lines += [f"| FKS, flux, hpsv2: N = 8, M = 6 instead of N = 14 | 33% less | {1 - v['tflop'] / c['fks N=14']['tflop']:.0%} less{m.rpartition(',')[2].replace(' i =', ' at i =')} |"
              for m, v in c.items() if m.startswith("fks+stitchvm")]
    c = cases("07_draft.py", "--reward", "dfn-clip+hpsv2", "--methods", "draft-1", "draft-3", "draft-1+stitchvm", "draft-3+stitchvm")
    for k, hours in ((1, "128.1 -> 94.8 GPU-h, 1.35x"), (3, "128.0 -> 100.3 GPU-h, 1.28x")):
        lines.append(f"| DRaFT-{k}, sd3.5-medium, 512: work of a sample | {hours} | {c[f'draft-{k}']['tflop'] / c[f'draft-{k}+stitchvm, i = 4']['tflop']:.2f}x less at i = 4 |")
    c = cases("08_nft.py", "--reward", "dfn-clip+hpsv2")
    ratio = lambda a, b: f"{c[a]['tflop'] / c[b]['tflop']:.2f}x"
    same, rollout = "nft+stitchvm, i = 4, as many noise levels as nft", "nft, rollout and reward only"
    lines.append(f"| NFT, sd3.5-medium, 512: work of a sample | 191.5 -> 84.7 GPU-h, 2.26x | {1 - c[rollout]['tflop'] / c['nft']['tflop']:.0%} of the official loop is training: {ratio('nft', same)} less by stopping "
                 f"rollouts early alone, {ratio('nft', 'nft+stitchvm, i = 4')} when it also trains above tau only; the rest would have to be fewer updates |")
    for resolution, hours in ((512, "7 to 10 GPU-h"), (1024, "24 to 32 GPU-h")):
        both = [sum(cases(s, "--reward", r, "--resolution", resolution)[m]["hours"] for s, m in (("01_cache_features.py", "latents"), ("03_finetune.py", "stitchvm, i = 4"))) for r in ("clip", "hpsv2")]
        lines.append(f"| building a value model, sd3.5-medium, {resolution} | {hours} | {both[0]:.1f} (clip), {both[1]:.1f} (hpsv2) hours at 150 TFLOP/s, 100,000 images, 5 epochs, latents cached |")
    between(ROOT / "README.md", "counts", "\n".join(lines))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("selection", "table", "dps", "fks", "draft", "nft", "counts", "readme"))
    p.add_argument("--backbone", nargs="+", default=["sd3.5-medium", "sd3.5-large", "flux"])
    p.add_argument("--reward", nargs="+", default=["clip", "hpsv2", "aesthetic", "dfn-clip"])
    p.add_argument("--jobs", type=int, default=JOBS)
    p.add_argument("--only", nargs="+", metavar="NAME", help="of dps, fks, draft and nft: the jobs of these names, as in assets/results")
    args = p.parse_args()
    JOBS = args.jobs
    whole = {"selection": selection, "table": lambda: table(args.backbone, args.reward), "counts": counts, "readme": readme}
    whole[args.what]() if args.what in whole else compare(args.what, args.reward, args.only)
