"""Every table of the pages, as Markdown, from docs/results/*.json: see study.py readme.

docs/results.md is written whole; README.md, docs/published.md and tests/mini/README.md have tables
between <!-- name --> and <!-- /name -->. A test fails when a page and the JSON differ.
"""

import json
import math
import statistics
from functools import partial
from itertools import product
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
METRIC = {
    "clip": ("coco", "recall@1_i2t"),
    "dfn-clip": ("coco", "recall@1_i2t"),
    "hpsv2": ("hpdv2", "hpdv2_accuracy"),
    "aesthetic": ("ava", "srcc"),
}
# Table 5 of the paper, as far as its figures are known here: of SD 3.5 Medium, in per cent
PAPER_HPSV2 = {"clean": [83.28] * 5, "stitchvm": [81.78, 81.87, 80.92, 78.90, 74.68]}
PAPER_AESTHETIC = {
    "clean": [0.618] * 5,
    "stitchvm": [0.609, 0.610, 0.597, 0.538, 0.369],
    "vae-stitch": [0.438, 0.423, 0.334, 0.146, 0.068],
}
# CLIP on MSCOCO, image to text Recall@1
PAPER = {
    "clean": [57.90] * 5,
    "stitchvm": [56.82, 56.22, 52.50, 32.52, 3.68],
    "vae-stitch": [42.62, 38.91, 21.14, 2.78, 0.08],
    "noisyclip": [46.07, 45.16, 32.71, 6.14, 2.11],
}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def there(*names):
    """Those results that have been measured."""
    return [name for name in names if (RESULTS / f"{name}.json").exists()]


def reported(name):
    """The rows of a table that are not of tuning prompts; `reward_each`: of each prompt."""
    table = read(name)
    rows = table["rows"]
    if each := table.get("rewards_of_prompts"):
        rows = [row | dict(reward_each=values) for row, values in zip(rows, each, strict=True)]
    return [r for r in rows if r.get("split", "report") == "report"]


def markdown(head, rows):
    """Lines of a table; cells are strings."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def measured(row, key, scale=1, digits=3):
    """A mean and its standard error."""
    return f"{scale * row[key]:.{digits}f} ± {scale * row[f'{key}_se']:.{digits}f}"


def beside(key, *rows):
    """One score of several rows."""
    return "; ".join(measured(row, key) for row in rows)


def of_seeds(runs):
    """The table of each seed of some runs of 07 or 08."""
    return [reported(file.stem) for file in sorted(RESULTS.glob(f"{runs}?.json"))]


def over_seeds(rows, key):
    """The mean of the last rows of several seeds and its error; of one seed its own."""
    values = [r[key] for r in rows]
    if len(values) == 1:
        return rows[0]
    error = statistics.stdev(values) / len(values) ** 0.5
    mean = {key: statistics.mean(values), f"{key}_se": error, f"{key}_each": values}
    return mean | dict(n=len(values))


def ahead(better, worse, key="reward"):
    """Whether one is above the other, by Student's t: yes (p < .025), perhaps (p < .16) or no.

    Paired, where both say what each prompt or seed gave.
    """
    gap = better[key] - worse[key]
    error = math.hypot(better[f"{key}_se"], worse[f"{key}_se"])
    n = better["n"]
    each = f"{key}_each"
    if each in better and each in worse:
        gaps = [a - b for a, b in zip(better[each], worse[each], strict=True)]
        n = len(gaps)
        gap, error = statistics.mean(gaps), statistics.stdev(gaps) / n**0.5
    p = stats.t.sf(gap / error, n - 1)
    return "yes" if p < 0.025 else "perhaps" if p < 0.16 else "no"


# ---------------------------------------------------------------------------- 04
def quality(rows, metric, method):
    """The cells of a method at every sigma, per cent where the metric is a share."""
    found = {r["sigma"]: r for r in rows if r["method"] == method and r["metric"] == metric}
    found = {s: r for s, r in found.items() if r["value"] is not None}
    scale, digits = (1, 3) if metric == "srcc" else (100, 1)
    if not found:
        return None
    at = [found.get(s, found.get(0.0)) for s in SIGMAS]
    return [measured(r, "value", scale, digits) for r in at]


def every_pair():
    """Table 5 and, of a Medium value on Large's latents, Table 6."""
    rows = []
    labels = {
        "": "sd3.5-medium",
        "sd3.5-large_": "sd3.5-large",
        "medium-on-large_": "sd3.5-medium's value on sd3.5-large",
        "flux_": "flux",
    }
    for reward, (benchmark, metric) in METRIC.items():
        for prefix, label in labels.items():
            if not (RESULTS / f"04_{prefix}{reward}.json").exists():
                continue
            found = [r for r in reported(f"04_{prefix}{reward}") if r["benchmark"] == benchmark]
            vae = "flux" if prefix == "flux_" else "sd3.5"
            what = {"stitchvm": label, "vae-stitch": f"VAE stitch, {vae}'s VAE"}
            if not prefix:
                what = {"clean": f"clean images: {metric}, n = {found[0]['n']}"} | what
            for method, name in what.items():
                if cells := quality(found, metric, method):
                    rows.append([reward, name, *cells])
    return markdown(["reward", "value model", *SIGMAS], rows)


def against_the_paper(reward, paper, digits=1):
    """A reward's first benchmark on sd3.5-medium beside the paper's rows."""
    benchmark, metric = METRIC[reward]
    rows = [[f"paper: {m}", *(f"{v:.{digits}f}" for v in values)] for m, values in paper.items()]
    found = [r for r in reported(f"04_{reward}") if r["benchmark"] == benchmark]
    for method in ("clean", "stitchvm", "vae-stitch", "noisyclip", "tweedie"):
        if cells := quality(found, metric, method):
            rows.append([method, *cells])
    return markdown(["sigma", *SIGMAS], rows)


def every_benchmark():
    """Table 5: every reward, benchmark and direction on sd3.5-medium."""
    rows = []
    for reward in METRIC:
        found = reported(f"04_{reward}")
        for benchmark, metric in dict.fromkeys((r["benchmark"], r["metric"]) for r in found):
            own = [r for r in found if r["benchmark"] == benchmark]
            for method in ("clean", "stitchvm", "vae-stitch", "noisyclip", "tweedie"):
                if cells := quality(own, metric, method):
                    rows.append([reward, f"{benchmark}: {metric}", method, *cells])
    return markdown(["reward", "benchmark", "method", *SIGMAS], rows)


def residuals():
    """{(i, j): the closed form's residual, as a share of the target's variance}."""
    return {(r["i"], r["j"]): f"{r['relative_loss']:.3f}" for r in read("points")["grid"]}


def points():
    """Fig. 6: values stitched after and before early and late blocks, finetuned."""
    rows = []
    found = reported("points")
    relative = residuals()
    for i, j in sorted({(r["i"], r["j"]) for r in found}, key=lambda point: point[::-1]):
        own = [r for r in found if (r["i"], r["j"]) == (i, j)]
        errors = [f"{own[0][f'val_{s}']:.3f}" for s in SIGMAS]
        cells = quality(own, "recall@1_i2t", "stitchvm")
        rows.append([f"({i}, {j})", relative[i, j], *errors, *cells])
    head = [*(f"error {s}" for s in SIGMAS), *(f"R@1 {s}" for s in SIGMAS)]
    return markdown(["(i, j)", "residual / variance", *head], rows)


def best_finetuned():
    """(i, j) of the finetuned value that retrieves best at sigma .5."""
    key = ("stitchvm", "recall@1_i2t", 0.5)
    found = [r for r in reported("points") if (r["method"], r["metric"], r["sigma"]) == key]
    best = max(found, key=lambda r: r["value"])
    return best["i"], best["j"]


def grid():
    """Fig. 6: the closed form's residual for every i, down, and j, across."""
    found = residuals()
    depths, places = (sorted({key[n] for key in found}) for n in (0, 1))
    rows = [[f"i = {i}", *(found[i, j] for j in places)] for i in depths]
    return markdown(["residual / variance", *(f"j = {j}" for j in places)], rows)


def value_errors(reward):
    """(V - r)^2 on the same noisy latents, and the cost of one value."""
    found = {}
    for r in reported(f"04_{reward}"):
        if "value_mse_shared" in r:
            found.setdefault((r["method"], r["sigma"]), r)
    rows = []
    for method in dict.fromkeys(m for m, _ in found):
        errors = [f"{found[method, s]['value_mse_shared']:.4f}" for s in SIGMAS]
        work = found[method, 0.5]["gflop_per_value"]
        rows.append([method, *errors, f"{work:.2f}" if work else ""])
    return markdown(["sigma", *SIGMAS, "GFLOP a value"], rows)


def calibration():
    """Slope of r regressed on V, 1 for a conditional mean."""
    rows = []
    for reward, (benchmark, metric) in METRIC.items():
        found = {
            (r["method"], r["sigma"]): r
            for r in reported(f"04_{reward}")
            if (r["benchmark"], r["metric"]) == (benchmark, metric)
        }
        for method in ("stitchvm", "vae-stitch", "noisyclip", "tweedie"):
            if (method, 0.1) in found:
                slopes = [f"{found[method, s]['slope']:.2f}" for s in SIGMAS]
                rows.append([reward, method, *slopes])
    return markdown(["reward", "method", *SIGMAS], rows)


def selection():
    head = ["", *(f"R@1 {s}" for s in SIGMAS), *(f"error {s}" for s in SIGMAS)]
    rows = []
    for r in read("selection")["rows"]:
        shares = [f"{100 * r[f'value {s}']:.1f}" for s in SIGMAS]
        rows.append([r["variant"], *shares, *(f"{r[f'value_mse {s}']:.4f}" for s in SIGMAS)])
    return markdown(head, rows)


# ---------------------------------------------------------------------------- 05 and 06
def best_of_n(reward, plain, work):
    """Best of n for this work (GFLOP), linear between what was measured, or nothing.

    plain: the row of plain sampling, which is best of one.
    """
    if not there(f"06_bon_{reward}"):
        return None
    points = [(plain["gflop_per_sample"], plain)]
    points += [(r["gflop_per_prompt"], r) for r in reported(f"06_bon_{reward}")]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if low <= work <= high:
            share = (work - low) / (high - low)
            keys = ("reward", "reward_se", "geneval", "geneval_se")
            row = {k: a[k] + share * (b[k] - a[k]) for k in keys}
            both = zip(a["reward_each"], b["reward_each"], strict=True)
            return row | dict(reward_each=[x + share * (y - x) for x, y in both])
    return None


def guided(names):
    head = ["reward", "method", "c", "steps", "reward", "judge", "geneval", "work", "s", "MB kept"]
    head += ["best of n for this work", "its geneval"]
    rows = []
    for name in names:
        plain = next(r for r in reported(name) if r["method"] == "flow")
        for r in reported(name):
            both = (r["strength"], r.get("strength_tweedie"))
            strengths = ", ".join(f"{c:g}" for c in both if c)
            scores = [measured(r, k) for k in ("reward", "judge", "geneval")]
            work = r["gflop_per_sample"]
            cost = [f"{work / plain['gflop_per_sample']:.1f}", f"{r['s_per_sample']:.2f}"]
            best = best_of_n(name[3:].split("-best")[0], plain, work)
            cost.append(f"{r['peak_memory_mb']:.1f}")
            cost += [measured(best, k) for k in ("reward", "geneval")] if best else ["", ""]
            rows.append([name[3:], r["method"], strengths, r["steps"], *scores, *cost])
    return markdown(head, rows)


def by_size(name):
    """{(curve, N): row} of a run of 06."""
    return {(r["curve"], r["n_particles"]): r for r in reported(name)}


def scaling(name):
    """Reward and GFLOP a prompt of each method of a run of 06 at each N (Fig. 3)."""
    found = by_size(name)
    sizes = sorted({n for _, n in found})
    rows = []
    for curve in dict.fromkeys(c for c, _ in found):
        cells = []
        for n in sizes:
            r = found.get((curve, n))
            cells.append(f"{measured(r, 'reward')} ({r['gflop_per_prompt']:.0f})" if r else "")
        rows.append([curve, *cells])
    return markdown(["reward (GFLOP a prompt)", *(f"N = {n}" for n in sizes)], rows)


def steered(names, keys):
    """A row for each run of 06: the keys, the reward, what did not guide, the cost of a prompt."""
    rows = []
    for name in names:
        for r in reported(name):
            shown = ["" if r.get(k) is None else r[k] for k in keys]
            scores = [measured(r, k) for k in ("reward", "judge", "geneval")]
            cost = [f"{r['gflop_per_prompt']:.0f}", f"{r['s_per_prompt']:.1f}"]
            rows.append([name[3:], *shown, r["n"], *scores, *cost])
    return markdown(["", *keys, "n", "reward", "judge", "geneval", "GFLOP", "s"], rows)


def by_level(name, key, digits, scale=1):
    """A row for each value, a column for every fifth noise level of 05's sampler below sigma .9."""
    rows = read(name)["rows"]
    levels = list(dict.fromkeys(r["sigma"] for r in rows))
    shown = [s for s in levels if s < 0.9][:: max(1, len(levels) // 8)]
    found = {(r["method"], r["sigma"]): r for r in rows}
    lines = []
    for method in dict.fromkeys(m for m, _ in found):
        cells = [measured(found[method, s], key, scale, digits) for s in shown]
        lines.append(["one-step estimate" if method == "tweedie" else method, *cells])
    return markdown(["sigma", *(f"{s:.2f}" for s in shown)], lines)


def guided_by_lever(name):
    """The reward that V's gradient leads to, a row for each lever, a column for each strength."""
    found = {(r["lever"], r["strength"]): r for r in read(name)["guided"]}
    strengths = sorted({c for _, c in found})
    rows = []
    for lever in dict.fromkeys(lever for lever, _ in found):
        rows.append([lever, *(measured(found[lever, c], "reward") for c in strengths)])
    return markdown(["c", *(f"{c:g}" for c in strengths)], rows)


# ---------------------------------------------------------------------------- 07 and 08
def last_rows(tables, method):
    """The last row of a method in each seed's table, or the first of all of them for `base`."""
    if method == "base":
        last = [t[0] for t in tables]
    else:
        last = [[r for r in t if r["method"] == method][-1] for t in tables]
    return [r | dict(gain=r["reward"] - t[0]["reward"]) for r, t in zip(last, tables, strict=True)]


def finetuned():
    """07 and 08 at equal work: means over the seeds."""
    head = ["", "method", "seeds", "reward", "gain", "judge", "geneval", "GFLOP", "s"]
    rows = []
    for stage, runs in product(("07", "08"), ("seed", "joint")):
        tables = of_seeds(f"{stage}_{runs}")
        if not tables:
            continue
        for method in ["base", *dict.fromkeys(r["method"] for r in tables[0])]:
            last = last_rows(tables, method)
            keys = ("reward", "gain", "judge", "geneval")
            means = [measured(over_seeds(last, k), k) for k in keys]
            cost = [f"{statistics.mean(r[k] for r in last):,.0f}" for k in ("gflop", "seconds")]
            label = stage if runs == "seed" else f"{stage}, joint"
            rows.append([label, method, len(last), *means, *cost])
    return markdown(head, rows)


def stopped():
    """{(low, high): the last row of each seed} of 08's windows."""
    found = {}
    for file in sorted(RESULTS.glob("08_stop*.json")):
        window = file.stem.removeprefix("08_stop").split("_")[0]
        found.setdefault(tuple(map(int, window.split("-"))), []).append(reported(file.stem)[-1])
    return dict(sorted(found.items()))


def windows():
    rows = []
    for (low, high), last in stopped().items():
        keys = ("reward", "gain", "judge", "geneval")
        scores = [measured(over_seeds(last, k), k) for k in keys]
        cost = [f"{statistics.mean(r[k] for r in last):,.0f}" for k in ("update", "gflop")]
        rows.append([f"{low} to {high}", len(last), *scores, *cost])
    head = ["stops after", "seeds", "reward", "gain", "judge", "geneval", "updates", "GFLOP"]
    return markdown(head, rows)


def other_methods():
    last = {r["method"]: r for r in reported("07_methods")}
    rows = [["base", *(measured(reported("07_methods")[0], k) for k in ("reward", "judge"))]]
    rows += [[m, *(measured(r, k) for k in ("reward", "judge"))] for m, r in last.items()]
    return markdown(["method", "reward", "judge"], rows)


def gradients():
    head = ["", "stopped at sigma", "correlation of V and r", "signal to noise of a TFLOP"]
    rows = []
    for r in reported("gradient"):
        shown = [f"{r['sigma']:.2f}", f"{r['correlation']:.2f}", measured(r, "snr_per_tflop")]
        rows.append([r["method"], *shown, r["best_times"], f"{r['cosine']:.2f}"])
    return markdown([*head, "noise levels of an image", "cosine with nft's"], rows)


# ---------------------------------------------------------------------------- published size
def steps_of_the_ladder(preset):
    """What each stage holds at most and how long the value's own part takes, of every pair."""
    own = ["latents", "stitchvm", "stitchvm", "stitchvm", "fks+stitchvm", "draft-1+stitchvm"]
    stages = ["01", "03", "04", "05", "06", "07", "08"]
    own = dict(zip(stages, [*own, "nft+stitchvm"], strict=True))
    rows = []
    for name, found in read("ladder").items():
        if not name.startswith(f"{preset} "):
            continue
        row = name.split()[1:]
        for stage, method in own.items():
            cases = next((c for script, c in found.items() if script.startswith(stage)), None)
            if cases is None:  # not counted yet
                row.append("")
                continue
            cases = {k: v for k, v in cases.items() if "i = 12" not in k}
            # the last one: of 05 and 06 the one that shares the prefix, where there is one
            hours = [v[1] for k, v in cases.items() if k.startswith(method)][-1]
            if stage == "08":
                hours = cases["nft+stitchvm, i = 4"][1]
            peaks = {k: v[0] for k, v in cases.items()}
            most = [max(peaks.values())]
            if stage == "05":
                most.append(max(p for k, p in peaks.items() if k != "tweedie"))
            row.append(f"{' / '.join(f'{p:.0f}' for p in most)}, {hours:.1f} h")
        rows.append(row)
    return markdown(["backbone", "reward", *stages], rows)


def pairs():
    """What the dry runs count for each of the twelve pairs at 1024 px."""
    found = read("counts")
    rows = []
    for backbone in ("sd3.5-medium", "sd3.5-large", "flux"):
        for reward in METRIC:
            flags = f"--backbone {backbone} --reward {reward}"
            build = found[f"03_finetune.py {flags}"]["stitchvm, i = 4"]
            step = found[f"05_dps.py {flags}"]
            value = step.get("stitchvm, i = 4, shared", step["stitchvm, i = 4"])
            work = [f"{step[m]['tflop']:.1f}" for m in ("flow", "tweedie")]
            work.append(f"{value['tflop']:.1f}")
            cards = f"{step['tweedie']['fits']}, {value['fits']}"
            hours = f"{build['hours']:.1f} h, {build['fits']}"
            rows.append([backbone, reward, hours, ", ".join(work), cards])
    step = "a step of 05, TFLOP: plain, standard DPS, value"
    return markdown(
        ["backbone", "reward", "finetuning a value (03)", step, "cards: standard DPS, value"], rows
    )


def beside_the_paper():
    """What the paper measured on its GPUs beside what the dry runs count."""
    found = read("counts")
    rows = []
    measured_there = {
        ("sd3.5-medium", "hpsv2"): "3.20x, 56.4 -> 26.0 GB",
        ("sd3.5-medium", "clip"): "3.58x",
        ("sd3.5-large", "hpsv2"): "2.33x, 89.3 -> 43.2 GB",
        ("sd3.5-large", "clip"): "2.29x",
    }
    for (backbone, reward), paper in measured_there.items():
        cases = found[f"05_dps.py --backbone {backbone} --reward {reward}"]
        cut = {m: cases["tweedie"]["tflop"] / c["tflop"] for m, c in cases.items()}
        shared = [f"{cut[f'stitchvm, i = {i}, shared']:.2f}x at i = {i}" for i in (4, 12)]
        kept = [cases[m]["saved_gib"] for m in ("tweedie", "stitchvm, i = 4")]
        memory = f"kept for backward {kept[0]:.1f} -> {kept[1]:.1f} GiB"
        counted = f"{', '.join(shared)}; {memory}"
        rows.append([f"less work of a step of DPS, {backbone}, {reward}", paper, counted])
    steering = next(c for name, c in found.items() if name.startswith("06_fks.py"))
    saved = [
        f"{1 - c['tflop'] / steering['fks N=14']['tflop']:.0%} less{name.partition(',')[2]}"
        for name, c in steering.items()
        if name.startswith("fks+stitchvm")
    ]
    what = "FKS, flux, hpsv2: N = 8, M = 6 in place of N = 14"
    rows.append([what, "33 % less", ", ".join(saved)])
    draft = next(c for name, c in found.items() if name.startswith("07_draft.py"))
    for k, paper in ((1, "128.1 -> 94.8 GPU-h, 1.35x"), (3, "128.0 -> 100.3 GPU-h, 1.28x")):
        ratio = draft[f"draft-{k}"]["tflop"] / draft[f"draft-{k}+stitchvm, i = 4"]["tflop"]
        rows.append([f"DRaFT-{k}, sd3.5-medium, 512", paper, f"{ratio:.2f}x less at i = 4"])
    nft = next(c for name, c in found.items() if name.startswith("08_nft.py"))
    ratios = [
        nft["nft"]["tflop"] / nft[f"nft+stitchvm, i = 4{more}"]["tflop"]
        for more in (", as many noise levels as nft", "")
    ]
    counted = f"{ratios[0]:.2f}x less by stopping early, {ratios[1]:.2f}x also training above tau"
    rows.append(["NFT, sd3.5-medium, 512", "191.5 -> 84.7 GPU-h, 2.26x", f"{counted} only"])
    for size, paper in ((512, "7 to 10 GPU-h"), (1024, "24 to 32 GPU-h")):
        hours = []
        for reward in ("clip", "hpsv2"):
            flags = f"--backbone sd3.5-medium --reward {reward} --resolution {size}"
            cache = found[f"01_cache_features.py {flags}"]["latents"]["hours"]
            tune = found[f"03_finetune.py {flags}"]["stitchvm, i = 4"]["hours"]
            hours.append(f"{cache + tune:.1f} h ({reward})")
        counted = f"{', '.join(hours)} at 150 TFLOP/s, 100,000 images, 5 epochs"
        rows.append([f"building a value model at {size} px", paper, counted])
    return markdown(["at published size", "the paper measured", "the dry runs count"], rows)


def models():
    """tests/mini/quality.json: what train.py measured of every model of the miniature."""
    found = json.loads((ROOT / "tests/mini/quality.json").read_text())

    def cell(v):
        if v is None or isinstance(v, int):
            return "" if v is None else f"{v:,}"
        return f"{v:.3f}" if v < 5 else f"{v:.1f}"

    keys = dict.fromkeys(k for row in found.values() for k in row)
    rows = [[k, *(cell(row.get(k)) for row in found.values())] for k in keys]
    return markdown(["", *found], rows)


# ---------------------------------------------------------------------------- the front page
def of_both(holds):
    return "yes" if all(holds) else "partly" if any(holds) else "no"


def claims_of_the_value():
    four = {(r["method"], r["sigma"]): r for r in reversed(reported("04_clip"))}
    clean = four["clean", 0.0]["value"]
    at = [four["stitchvm", s] for s in (0.1, 0.5)]
    share = [100 * r["value"] / clean for r in at]
    most = [100 * (r["value"] + r["value_se"]) / clean for r in at]
    reached = [a >= b for a, b in zip(most, (98, 91), strict=True)]
    V, one_step = (four[m, 0.75] for m in ("stitchvm", "tweedie"))
    shown = "{value_mse_shared:.4f} for {gflop_per_value:.2f}"
    errors = f"{shown.format_map(V)}; Tweedie {shown.format_map(one_step)}"
    beaten = all(V[k] < one_step[k] for k in ("value_mse_shared", "gflop_per_value"))
    fitted = read("02_clip")
    stitches = [tuple(fitted["chosen"][k] for k in "ij"), best_finetuned()]
    half = max(r["i"] for r in fitted["rows"]) / 2
    early = [i <= half and j == 1 for i, j in stitches]
    keeps = "V keeps retrieval on noisy latents: share of clean Recall@1 at sigma .1 and .5"
    beats = "at high noise V beats one-step estimates for less: (V - r)², GFLOP at sigma .75"
    stitch = "the best stitch leaves an early block and enters the first: (i, j) by residual; "
    stitch += "by Recall@1 at sigma .5 after finetuning"
    cells = f"{share[0]:.0f}, {share[1]:.0f} % (clip)"
    return [
        [keeps, "98, 91 %", "", cells, of_both(reached), "04_eval_noisy.py"],
        [beats, "argued", "", errors, "yes" if beaten else "no", "04_eval_noisy.py"],
        [stitch, "(4, 1)", "", "{}; {}".format(*stitches), of_both(early), "study.py points"],
    ]


def claims_of_guidance():
    five = {r["method"]: r for r in reported("05_clip-best")}
    flow, V, one_step, handover = (
        five[m] for m in ("flow", "stitchvm", "tweedie", "stitchvm+tweedie")
    )
    fewer = next(five[m] for m in five if m.startswith("tweedie, equal"))
    step = read("counts")["05_dps.py --backbone sd3.5-medium --reward hpsv2"]
    counted = step["tweedie"]["tflop"] / step["stitchvm, i = 4, shared"]["tflop"]
    here = one_step["gflop_per_sample"] / V["gflop_per_sample"]
    cheaper = "a step guided by V costs less than one of standard DPS"
    higher = "and the reward is higher: V; standard DPS at equal {}"
    other = "and so is what did not guide: ImageReward; here the checker, GenEval's"
    steps, work = (beside("reward", V, row) for row in (one_step, fewer))
    checked = beside("geneval", V, one_step)
    rows = [
        [cheaper, "3.2x", f"{counted:.1f}x", f"{here:.1f}x", "yes" if here > 1 else "no"],
        [higher.format("steps"), ".348; .335", "", steps, ahead(V, one_step)],
        [other, "1.22; .96", "", checked, ahead(V, one_step, "geneval")],
        [higher.format("work"), "", "", work, ahead(V, fewer)],
    ]
    for text, row in (
        ("V's reward is ahead of best of n's for that work; reward, checker", V),
        ("so is V's with standard DPS below sigma .25; reward, checker", handover),
    ):
        if best := best_of_n("clip", flow, row["gflop_per_sample"]):
            cells = [f"{measured(r, 'reward')}, {r['geneval']:.2f}" for r in (row, best)]
            rows.append([text, "", "", "; ".join(cells), ahead(row, best)])
    return [[*row, "study.py dps"] for row in rows]


def claims_of_particles():
    six = by_size("06_scaling")
    many = six["fks", 14]
    few = six["fks+stitchvm M=6", 8]
    flux = next(c for n, c in read("counts").items() if n.startswith("06_fks.py"))
    saved = 1 - flux["fks+stitchvm M=6 N=8, i = 4"]["tflop"] / flux["fks N=14"]["tflop"]
    less = f"{1 - few['gflop_per_prompt'] / many['gflop_per_prompt']:.0%} less"
    less = f"{less}: {measured(few, 'reward')}, {measured(many, 'reward')}"
    bon = six["bon", 8]
    share = bon["gflop_per_prompt"] / few["gflop_per_prompt"]
    behind = f"{beside('reward', few, bon)} for {share:.0%} of the work"
    tables = [reported(f"06_large-by-{name}_clip") for name in ("medium", "large")]
    by = [next(r for r in t if r["method"] == "fks+stitchvm") for t in tables]
    steered_by = f"{measured(by[0], 'reward')}; by its own {measured(by[1], 'reward')}"
    steers = "FKS with proposals, N = 8 and M = 6, matches N = 14 without, for less work"
    best = "and is ahead of best of 8"
    medium = "a Medium value steers Large as well as Large's own does"
    again = by_size("06_prune_again")
    same_work = again["prune", 16], again["bon", 13]
    drops = "best of 16, its worse half dropped by V on the way, is ahead of best of 13, equal work"
    worse = {"yes": "no", "perhaps": "perhaps not", "no": "yes"}
    rows = [
        [steers, "33 %", f"{saved:.0%} (FLUX)", less, worse[ahead(many, few)]],
        [best, "", "", behind, ahead(few, bon)],
        [drops, "", "", beside("reward", *same_work), ahead(*same_work)],
        [medium, "little loss", "", steered_by, worse[ahead(by[1], by[0])]],
    ]
    return [[*row, "study.py fks"] for row in rows]


def claims_of_finetuning():
    early = "early stops at V save work: {}, GPU-hours; gain at equal work with V, without"
    more = "and a joint reward raises the checker, GenEval's, more: with V, without"
    rows = []
    for stage, method, name, paper, geneval in (
        ("07_draft", "draft-3", "DRaFT-3", "1.28x", ".71; .66"),
        ("08_nft", "nft", "DiffusionNFT", "2.26x", "kept or better"),
    ):
        counted = next(c for n, c in read("counts").items() if n.startswith(stage))
        ratio = counted[method]["tflop"] / counted[f"{method}+stitchvm, i = 4"]["tflop"]
        command = f"study.py {stage[3:]}"
        both = at_the_end(f"{stage[:2]}_seed", method, "gain")
        gains = beside("gain", *both)
        verdict = ahead(*both, "gain")
        rows.append([early.format(name), paper, f"{ratio:.2f}x", gains, verdict, command])
        if both := at_the_end(f"{stage[:2]}_joint", method, "geneval"):
            checked = beside("geneval", *both)
            rows.append([more, geneval, "", checked, ahead(*both, "geneval"), command])
    worst, usual = (over_seeds(stopped()[window], "gain") for window in ((2, 12), (12, 17)))
    stops = f"2..12: {measured(worst, 'gain')}; 12..17: {measured(usual, 'gain')}"
    text = "08 gains less if rollouts stop at 2..12 of 25 than at 12..17 (Fig. 7)"
    verdict = ahead(usual, worst, "gain")
    return [*rows, [text, "lowest", "", stops, verdict, "study.py nft"]]


def at_the_end(runs, method, key):
    """Mean and error over the seeds of a score at the end of training, with V and without."""
    tables = of_seeds(runs)
    methods = (f"{method}+stitchvm", method) if tables else ()
    return [over_seeds(last_rows(tables, m), key) for m in methods]


def claims():
    """README's table: a row a claim of the paper, beside what is counted and measured here."""
    rows = [*claims_of_the_value(), *claims_of_guidance(), *claims_of_particles()]
    rows += claims_of_finetuning()
    head = ["claim", "paper", "counted at full size", "miniature", "reproduced", "command"]
    return markdown(head, [[*row[:-1], f"`{row[-1]}`"] for row in rows])


# ---------------------------------------------------------------------------- pages
def part(text, table=None, *needs):
    """Lines of a paragraph and of the table below it, if the results that it needs are there."""
    if len(there(*needs)) < len(needs):
        return []
    return [text, "", *([*table(), ""] if table else [])]


def parts_of_the_value():
    same = "(V - r)^2 on the same noisy latents, and the work of one value"
    beside = "beside the paper's Table 5 (SD 3.5 Medium)"
    clip = f"Image to text Recall@1 in per cent, clip, 500 scenes, {beside}, MSCOCO."
    hpsv2 = f"Preference accuracy in per cent, hpsv2, {beside}, HPDv2."
    aesthetic = f"Spearman's correlation, aesthetic, {beside}, AVA."
    points_text = (
        "Fig. 6, clip: values stitched after diffusion block i and before reward block j, of eight "
        "each, finetuned alike: the error of the embedding on validation images, and retrieval. "
        "Above j = 1, i is the one with the smallest residual."
    )
    return [
        part("## 04: quality of a value"),
        part("![Retrieval and error of clip's value](figures/front.png)"),
        part(clip, partial(against_the_paper, "clip", PAPER)),
        part(hpsv2, partial(against_the_paper, "hpsv2", PAPER_HPSV2)),
        part(aesthetic, partial(against_the_paper, "aesthetic", PAPER_AESTHETIC, 3)),
        part("Every reward, benchmark and direction, sd3.5-medium.", every_benchmark),
        part("Every pair at five noise levels.", every_pair),
        *(part(f"{reward}: {same}.", partial(value_errors, reward)) for reward in METRIC),
        part("Calibration: slope of r regressed on V, 1 for a conditional mean.", calibration),
        part(
            "Choices of 03, clip, tuning split: 1,000 steps of 32 unless a row says more.",
            selection,
        ),
        part(points_text, points, "points"),
        part("Fig. 6's grid, on held-out images.", grid, "points"),
    ]


def parts_of_guidance():
    chosen = (
        "Table 1. Strengths c chosen on 32 tuning prompts among 5 to 80, report prompts, 40 steps, "
        "CFG 4.5; work is a multiple of plain sampling's, s the seconds of a sample on one core."
    )
    windows = (
        "With clip's best value (06). Guided everywhere, above or below sigma .5 only, or below "
        ".25 only (end)."
    )
    own = there(*(f"05_clip-best{window}" for window in ("", "-above", "-below", "-end")))
    return [
        part("## 05: guidance"),
        part(chosen, partial(guided, [f"05_{reward}" for reward in METRIC])),
        part(windows, partial(guided, own), "05_clip-best"),
        part("![Images of 05](figures/05_grid.png)"),
    ]


def parts_of_steering():
    ranks = (
        "What V and the guided one-step estimate know: mean correlation with the final reward "
        "within a prompt, 24 tuning prompts of 16 samples (`study.py ranking`). Values are trained "
        "by 03's defaults (as it is), with sigma the square of a uniform number (low noise), and "
        "so on 30,000 drawn scenes in as many steps, on 8,000 images of the generator, after "
        "diffusion block 5 (later i), four times as long, or all of it: clip's best value."
    )
    errors = "Their mean squared error, times 1,000; the reward varies by {:.1f} within a prompt."
    gains = (
        "What can be had by it: reward of the best of 8 whose worse half is dropped at that level, "
        "less that of best of n at equal work, times 1,000."
    )
    laws = (
        "Values trained anew on 4,000 of the sampler's own images, at equal cost: on z_t = (1-t) "
        "z_0 + t eps (forward), on the z_t of their trajectories (samples), and on these with "
        "blocks that read the prompt (prompted). Correlations as above."
    )
    levers = "Reward of 32 tuning prompts that V's gradient guides in 05, by value and strength c."
    errors_of_laws = "Their mean squared error, times 1,000."
    laws_guide = "Reward of 24 tuning prompts that the gradient of these three guides."
    table = [f"06_{reward}" for reward in METRIC]
    large = [f"06_large-by-{by}_{r}" for r in METRIC for by in ("large", "medium")]
    lam = "lambda in units of the reward's spread, on tuning prompts, clip's best value."
    proposals = (
        "Proposals by argmax (Algorithm 1) or corrected, clip's best value; the best particle or "
        "the mean."
    )
    sizes = (
        "Reward of the best particle against N: clip's best value, 100 prompts, lambda 1 (Fig. 3)."
    )
    dropped = (
        "Best of N without the worse half, which clip's best value drops at sigma .36, on the same "
        "prompts."
    )
    ways = ["curve", "lambda", "proposal", "report"]
    return [
        part("## 06: particles"),
        part(
            "Table 2: four particles, two proposals, values by 03's defaults.",
            partial(steered, table, ["curve"]),
            *table,
        ),
        part(sizes, partial(scaling, "06_scaling")),
        part("![Reward against work](figures/06_scaling.png)"),
        part(dropped, partial(scaling, "06_prune")),
        part("Again on other noise, 200 prompts.", partial(scaling, "06_prune_again")),
        part(ranks, partial(by_level, "ranking", "correlation", 2)),
        part(
            errors.format(1000 * read("ranking")["variance"]),
            partial(by_level, "ranking", "value_mse", 1, 1000),
        ),
        part(gains, partial(by_level, "ranking", "gain", 1, 1000)),
        part(levers, partial(guided_by_lever, "ranking")),
        part(laws, partial(by_level, "onpolicy", "correlation", 2), "onpolicy"),
        part(errors_of_laws, partial(by_level, "onpolicy", "value_mse", 1, 1000), "onpolicy"),
        part(laws_guide, partial(guided_by_lever, "onpolicy"), "onpolicy"),
        part(
            "sd3.5-large steered by its own value and by sd3.5-medium's (Table 6).",
            partial(steered, there(*large), ["curve", "n_particles"]),
        ),
        part(lam, partial(steered, ["06_lam"], ["curve", "lambda"])),
        part(proposals, partial(steered, ["06_proposals"], ways)),
        part("![Images of 06](figures/06_grid.png)"),
    ]


def parts_of_finetuning():
    seeds = (
        "Held-out prompts, no guidance; three seeds at equal work, errors over them. V is clip's "
        "best value; the joint reward is dfn-clip+hpsv2, by 03's defaults (Table 3, Table 4). "
        "08's `--kl`, chosen on tuning prompts, is .3, with V .1 [D9]."
    )
    stops = "Where 08's rollouts stop, of 25 steps (Fig. 7): 7,000 GFLOP."
    return [
        part("## 07 and 08: finetuning"),
        part(seeds, finetuned),
        part("![Curves of 07](figures/07_seeds.png)"),
        part("![Curves of 08](figures/08_seeds.png)"),
        part("07's other methods, even grid, seed 0, 4,000 GFLOP.", other_methods),
        part(stops, windows),
        part("How much of 08's gradient is signal (`tests/studies/gradient.py`).", gradients),
        part("![Images of 07](figures/07_grid.png)"),
        part("![Images of 08](figures/08_grid.png)"),
    ]


def results():
    """docs/results.md: by stage, each table below one line that says what it shows."""
    made = "Written by `study.py readme` from [results/](results), which have every flag and seed."
    parts = [
        part("# Results"),
        part(made),
        *parts_of_the_value(),
        *parts_of_guidance(),
        *parts_of_steering(),
        *parts_of_finetuning(),
        part("## Without a row"),
        part(
            "DiNa-LRM ([arXiv 2602.11146](https://arxiv.org/abs/2602.11146)), whose checkpoint is "
            "of the published SD 3.5 Medium, and NoisyCLIP at the scale of LAION: the miniature's "
            "is trained on its own scenes (`tests/studies/noisyclip.py`)."
        ),
    ]
    return "\n".join(line for lines in parts for line in lines)


MARKED = {
    "README.md": {"claims": claims},
    "docs/published.md": {
        "24gb": partial(steps_of_the_ladder, "24gb"),
        "paper": partial(steps_of_the_ladder, "paper"),
        "pairs": pairs,
        "counts": beside_the_paper,
    },
    "tests/mini/README.md": {"quality": models},
}


def with_tables(text, tables):
    """A page with the text between its markers replaced."""
    for name, table in tables.items():
        start = text.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        end = text.index(f"<!-- /{name} -->")
        text = text[:start] + "\n" + "\n".join(table()) + "\n" + text[end:]
    return text


def pages():
    """{path: text} of every page as it follows from the JSON."""
    found = {"docs/results.md": results()}
    for path, tables in MARKED.items():
        found[path] = with_tables((ROOT / path).read_text(), tables)
    return found


def write_all():
    for path, text in pages().items():
        (ROOT / path).write_text(text)
