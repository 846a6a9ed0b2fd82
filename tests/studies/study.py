"""The measurements behind docs/results.md: stages run, compared and chosen among.

Run     python tests/studies/study.py selection      choices of 03, on the tuning split only
        python tests/studies/study.py table          01 to 04 with both baselines, of every pair
        python tests/studies/study.py dps            05: strengths chosen on tuning prompts
        python tests/studies/study.py fks            06: N and M, lambda, proposals, Large
        python tests/studies/study.py draft          07: three seeds at equal work, other methods
        python tests/studies/study.py nft            08: three seeds at equal work, stop windows
        python tests/studies/study.py ranking        what a value says within a prompt, and why
        python tests/studies/study.py points         stitching early and late, of both models
        python tests/studies/study.py all            all of these, but for what still stands
        python tests/studies/study.py counts         dry runs beside the paper's measurements
        python tests/studies/study.py ladder         dry runs of all stages: what fits which card
        python tests/studies/study.py readme         every table and figure of the pages
Writes  docs/results/*.json; readme: docs/results.md, docs/figures/ and the tables in README.md,
        docs/published.md and tests/mini/README.md
Processes of one thread run side by side, as many as --jobs says; runs stay in runs/study/, which
is to be removed, as runs/mini/ is, when a model has been trained anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
STUDY = ROOT / "runs/study"
TUNE = "tests/mini/data/tune"
BACKBONES = ("sd3.5-medium", "sd3.5-large", "flux")
REWARDS = ("clip", "hpsv2", "aesthetic", "dfn-clip")
JOINT = "dfn-clip+hpsv2"
TUNING = ("--prompts", f"{TUNE}/drawbench.txt", "--limit", 32)  # of 05
STRENGTHS = (5, 10, 20, 40, 80)
ALONE = ("--methods", "flow", "tweedie", "stitchvm")  # no handover
WINDOWS = {  # of 05's guidance; the last is the handover's, without what V does before it
    "": (),
    "-above": (*ALONE, "--guide-to", 0.5),
    "-below": (*ALONE, "--guide-from", 0.5),
    "-end": (*ALONE, "--guide-from", 0.25),
}
POINTS = (  # flags of 02: after early and late diffusion blocks, before early and late reward ones
    *(("--i", i, "--j", 1) for i in (1, 3, 5, 7, 8)),
    *(("--j", j) for j in (2, 4, 6, 8)),
)
# short trainings of 03: each differs from the first in what is named
SHORT = ("--steps", 1000, "--batch", 32, "--lr", "1e-3", "--sigma-law", "logit-normal")
VARIANTS = {
    "base": (),
    "uniform": ("--sigma-law", "uniform"),
    "ema .99": ("--ema", "0.99"),
    "unit": ("--embedding", "unit"),
    "lr 5e-4": ("--lr", "5e-4"),
    "lr 2e-3": ("--lr", "2e-3"),
    "uniform, lr 2e-3": ("--sigma-law", "uniform", "--lr", "2e-3"),
    "low, lr 2e-3": ("--sigma-law", "low", "--lr", "2e-3"),
    "lam_tok .1": ("--lam-tok", "0.1"),
    "batch 64, half the steps": ("--batch", "64", "--steps", 500),
    "twice the steps": ("--steps", 2000),
}


def run(script, *flags):
    """Run a script with these flags in one thread; its standard output."""
    # tables keep the command: paths from the project's root, where it runs
    command = [sys.executable, script, *(str(f).removeprefix(f"{ROOT}/") for f in flags)]
    stages = ("03", "04", "05", "06", "07", "08", "tests/studies/noisyclip")
    if script.startswith(stages) and "--dry-run" not in flags:
        command.append("--restart")  # what a study left that was cut off is of no use
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    result = "done" if done.returncode == 0 else done.stderr[-2000:]
    print(f"{script} {' '.join(map(str, flags))}: {result}", flush=True)
    done.check_returncode()
    return done.stdout


def side_by_side(function, arguments, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, arguments))


def read(path):
    return json.loads(Path(path).read_text())


def write(name, table):
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(table, indent=1))


def keep_grid(name, out):
    """The pages show the images of one run of each stage."""
    if name in ("05_clip", "06_clip", "07_seed0", "08_seed0"):
        grid = f"{name[:2]}_grid.png"
        shutil.copy(out / grid, ROOT / "docs/figures" / grid)


def git(*command):
    return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)


def unless_kept(names, keep):
    """The names of results to measure: with keep without those measured on today's models."""
    models = git("log", "-1", "--format=%H", "--", "tests/mini/*.safetensors").stdout.strip()

    def stands(name):
        path = RESULTS / f"{name}.json"
        if not (keep and path.exists()):
            return False
        commit = read(path)["provenance"]["commit"].removesuffix("+changes")
        return git("merge-base", "--is-ancestor", models, commit).returncode == 0

    return [name for name in names if not stands(name)]


def wanted(tasks, only, keep):
    """The names of the tasks to run: these only, or all."""
    if wrong := set(only or ()) - set(tasks):
        sys.exit(f"error: no job {', '.join(sorted(wrong))}: there are {', '.join(tasks)}")
    return unless_kept(only or tasks, keep)


def value_of(reward, backbone="sd3.5-medium"):
    """Flags of a reward, or of a sum of them, and of its values."""
    files = [f"runs/mini/{backbone}_{r}/value.pt" for r in reward.split("+")]
    return ("--reward", reward, "--value", *files)


def fit_value(*pair):
    """01 to 03 of a pair, named by flags."""
    for script in ("01_cache_features.py", "02_fit_stitch.py", "03_finetune.py"):
        run(script, *pair)


def best_value():
    """As value_of: clip's value with every lever that makes it rank."""
    return ("--reward", "clip", "--value", folder_of(BEST) / "value.pt")


def make_values(flags, jobs=1):
    """The values that flags name, unless they are there."""

    def make(file):
        if file.parent == folder_of(BEST):
            fit_lever(BEST)
        else:
            backbone, reward = file.parent.name.split("_")
            fit_value("--backbone", backbone, "--reward", reward)

    files = {ROOT / f for f in flags if str(f).endswith("value.pt")}
    side_by_side(make, [f for f in files if not f.exists()], jobs)


# ---------------------------------------------------------------------------- 01 to 04
def selection(jobs, keep=False):
    """Every variant of 03, from one cache, judged on the tuning split."""
    if not unless_kept(["selection"], keep):
        return
    out = STUDY / "selection"
    run("01_cache_features.py", "--out", out)
    run("02_fit_stitch.py", "--out", out)

    def train(name):
        value = out / f"{name.replace(' ', '_')}.pt"
        folder = out / value.stem
        run("03_finetune.py", "--out", out, *SHORT, *VARIANTS[name], "--value", value)
        flags = ("--value", value, "--methods", "stitchvm", "--benchmarks", f"{TUNE}/coco.jsonl")
        folder.mkdir(exist_ok=True)
        run("04_eval_noisy.py", "--out", folder, *flags)
        measured = read(folder / "04_eval_noisy.json")
        found = {"variant": name}
        for r in measured["rows"]:
            if r["method"] == "stitchvm" and r["metric"] == "recall@1_i2t":
                found |= {f"{k} {r['sigma']}": r[k] for k in ("value", "value_mse", "slope")}
        return found, measured["provenance"]

    rows, provenances = zip(*side_by_side(train, VARIANTS, jobs), strict=True)
    write("selection", dict(rows=rows, provenance=provenances[0]))


def table(jobs, backbones, rewards, keep=False):
    """01 to 04 with both baselines for each pair, and a Medium value on Large's latents."""

    def one(task):
        backbone, reward, name = task
        is_main = backbone == "sd3.5-medium"
        pair = ("--backbone", backbone, "--reward", reward)
        fit_value(*pair)
        if backbone != "sd3.5-large":  # its VAE is Medium's, and so is its VAE stitch
            run("03_finetune.py", *pair, "--front", "vae")
        if is_main and reward != "aesthetic":
            run("tests/studies/noisyclip.py", *pair)
        methods = () if is_main else ("--methods", "stitchvm", "vae-stitch")
        run("04_eval_noisy.py", *pair, *methods)
        for stage in ("02_fit_stitch", "04_eval_noisy"):
            found = read(ROOT / f"runs/mini/{backbone}_{reward}/{stage}.json")
            write(f"{stage[:2]}_{name}", found)

    names = {p: f"{p[0]}_{p[1]}".removeprefix("sd3.5-medium_") for p in product(backbones, rewards)}
    todo = unless_kept([f"04_{name}" for name in names.values()], keep)
    side_by_side(one, [(*p, name) for p, name in names.items() if f"04_{name}" in todo], jobs)
    both = {"sd3.5-medium", "sd3.5-large"} <= set(backbones)
    for name in unless_kept([f"04_medium-on-large_{r}" for r in rewards if both], keep):
        reward = name.split("_")[-1]
        make_values(value_of(reward))
        flags = ("--backbone", "sd3.5-large", "--out", STUDY / name, "--methods", "stitchvm")
        run("04_eval_noisy.py", *value_of(reward), *flags)
        write(name, read(STUDY / name / "04_eval_noisy.json"))


def points(jobs, keep=False):
    """The closed form's loss to the last blocks of both models, and values stitched there."""
    if not unless_kept(["points"], keep):
        return
    cache = STUDY / "points/cache"
    run("01_cache_features.py", "--j-max", 8, "--out", cache)

    def train(flags):
        out = STUDY / "points" / "_".join(str(f).strip("-") for f in flags)
        shutil.copytree(cache, out, dirs_exist_ok=True)
        run("02_fit_stitch.py", *flags, "--out", out)
        run("03_finetune.py", "--out", out)
        coco = ("--methods", "stitchvm", "--benchmarks", "tests/mini/data/coco.jsonl")
        run("04_eval_noisy.py", "--out", out, *coco)
        return [read(out / f"{s}.json") for s in ("02_fit_stitch", "03_finetune", "04_eval_noisy")]

    found = side_by_side(train, POINTS, jobs)
    rows = []
    for fitted, trained, measured in found:
        validated = {k: v for k, v in trained["rows"][-1].items() if k.startswith("val_")}
        rows += [row | fitted["chosen"] | validated for row in measured["rows"]]
    write("points", found[0][2] | dict(rows=rows, grid=found[0][0]["rows"]))


# ---------------------------------------------------------------------------- 05
def choose_strength(swept, plain, guiding, tolerance=2.0):
    """The strength with the highest mean reward among those that do no visible harm.

    swept {c: {metric: [of each prompt]}}, plain {metric: […]} on the same prompts and noises.
    Harm: a metric that does not guide is below plain sampling's by more than `tolerance` standard
    errors of the paired difference. Two and not one, for of four metrics one error would turn
    away every second strength that does none. If all do harm: the smallest strength.
    """

    def mean(values):
        return sum(values) / len(values)

    def harmless(scores):
        for name in set(plain) - {"reward"} - set(guiding):
            gaps = [a - b for a, b in zip(scores[name], plain[name], strict=True)]
            variance = sum((g - mean(gaps)) ** 2 for g in gaps) / (len(gaps) - 1)
            if mean(gaps) < -tolerance * (variance / len(gaps)) ** 0.5:
                return False
        return True

    allowed = [c for c in swept if harmless(swept[c])]
    return max(allowed, key=lambda c: mean(swept[c]["reward"])) if allowed else min(swept)


def chosen_strengths(found, reward):
    """{method: c} by the rule, of a table of 05 on tuning prompts with a row for each strength."""
    pairs = list(zip(found["rows"], found["scores_of_prompts"], strict=True))
    plain = next(scores for row, scores in pairs if row["method"] == "flow")
    chosen = {}
    for method in dict.fromkeys(row["method"] for row, _ in pairs if row["method"] != "flow"):
        swept = {row["strength"]: scores for row, scores in pairs if row["method"] == method}
        chosen[method] = choose_strength(swept, plain, reward.split("+"))
    return chosen


def fewer_steps(rows):
    """The steps of tweedie that take the work of stitchvm, counted on the same latents.

    Decoding counts in both, which rounds up, in the baseline's favour.
    """
    work = {r["method"]: r["gflop_per_sample"] for r in rows}
    steps = next(r["steps"] for r in rows if r["method"] == "tweedie")
    return max(2, round(steps * work["stitchvm"] / work["tweedie"]))


def sample(out, *flags):
    """The table of a run of 05; the value is out/value.pt, unless the flags name one."""
    run("05_dps.py", "--out", out, *flags)
    return read(out / "05_dps.json")


def guided(name, reward, same):
    """Strengths swept on tuning prompts, the chosen ones on report prompts; so for equal work."""
    folder = STUDY / name
    strengths = [x for m in ("tweedie", "stitchvm") for x in (f"--strengths-{m}", *STRENGTHS)]
    sweep = (*same, *TUNING, *strengths, *ALONE)
    tuned = sample(folder / "tune", *sweep)
    chosen = chosen_strengths(tuned, reward)
    steps = ("--steps", fewer_steps(tuned["rows"]))
    again = sample(folder / "tune_equal", *sweep, *steps, "--methods", "flow", "tweedie")
    chosen_again = chosen_strengths(again, reward)
    report = ("--limit", 200, "--save-images")
    best = [x for m, c in chosen.items() for x in (f"--strengths-{m}", c)]
    sample(folder / "report", *same, *report, *best)
    equal = ("--methods", "tweedie", "--strengths-tweedie", chosen_again["tweedie"], *steps)
    sample(folder / "report_equal", *same, *report, *equal)
    for part in ("report", "report_equal"):
        path = folder / part / "05_dps.json"
        run("tests/published/score.py", path, "--scorers", "geneval")
    found, fewer = (read(folder / p / "05_dps.json") for p in ("report", "report_equal"))
    for row in fewer["rows"]:
        row["method"] = "tweedie, equal work"
    rows = [r | dict(split="tune") for t in (tuned, again) for r in t["rows"]]
    rows += [r | dict(split="report") for t in (found, fewer) for r in t["rows"]]
    scores = [s for t in (tuned, again, found, fewer) for s in t.pop("scores_of_prompts")]
    rewards = [s["reward"] for s in scores]
    more = dict(chosen=chosen, chosen_equal_work=chosen_again, rewards_of_prompts=rewards)
    write(name, found | more | dict(rows=rows))
    keep_grid(name, folder / "report")


def dps(jobs, only=None, keep=False):
    tasks = {f"05_{r}": (r, value_of(r)) for r in REWARDS}
    for window, flags in WINDOWS.items():
        tasks[f"05_clip-best{window}"] = ("clip", (*best_value(), *flags))
    todo = wanted(tasks, only, keep)
    make_values([flag for name in todo for flag in tasks[name][1]], jobs)
    side_by_side(lambda name: guided(name, *tasks[name]), todo, jobs)
    if "05_clip" in todo:
        import figures

        figures.strip(STUDY / "05_clip/report")


# ---------------------------------------------------------------------------- 06 to 08
def particles():
    """{name of its results: (script, flags)} of 06."""
    clip = best_value()
    methods = ("--methods", "bon", "fks", "fks+stitchvm")
    small = ("--potential-value", "stitchvm", "--limit", 64, "--m", 4)
    every = ("--potential-value", "tweedie", "stitchvm", "--limit", 200)
    sizes = ("--n", 2, 4, 6, 8, 10, 12, 14, "--n-stitchvm", 2, 4, 6, 8, "--m", 2, 4, 6)
    proposals = ("--proposal", "argmax", "corrected", "--report", "best", "mean")
    large = ("--backbone", "sd3.5-large", *small)
    tune = ("--prompts", f"{TUNE}/drawbench.txt")
    hundred = ("--limit", 100)
    without = ("--methods", "bon", "fks+stitchvm")
    drop = ("--methods", "bon", "prune")
    flags = {f"06_{r}": (*value_of(r), *methods, *every) for r in REWARDS}
    bon = ("--methods", "bon", "--n", 2, 3, 6, 8, "--limit", 200)
    flags |= {f"06_bon_{r}": (*value_of(r), *bon) for r in REWARDS}
    for r in REWARDS:
        own = value_of(r, "sd3.5-large")
        flags[f"06_large-by-large_{r}"] = (*own, *methods, *large)
        flags[f"06_large-by-medium_{r}"] = (*value_of(r), "--methods", "fks+stitchvm", *large)
    flags |= {
        "06_lam": (*clip, *methods, *small, *tune, "--lam", 0.5, 1, 2, 4),
        "06_scaling": (*clip, *methods, *small, *hundred, *sizes),
        "06_prune": (*clip, *drop, *hundred, "--n", 4, 8, 13, 16),
        # its best, 16 beside 13 for the same work, on other noise and twice the prompts
        "06_prune_again": (*clip, *drop, "--limit", 200, "--seed", 1, "--n", 13, 16),
        "06_proposals": (*clip, *without, *small, *proposals, "--lam", 1, 4),
    }
    return {name: ("06_fks.py", (*f, "--save-images")) for name, f in flags.items()}


def drafts():
    """As particles(), of 07."""
    short = ("--gflop", 4000, "--eval-every", 20, "--save-images")
    long = (*best_value(), *short)
    others = ("--grid", "even", "--methods", "draft-1", "alignprop", "draft-1+stitchvm")
    flags = {f"07_seed{seed}": (*long, "--seed", seed) for seed in range(3)}
    flags |= {f"07_joint{s}": (*value_of(JOINT), *short, "--seed", s) for s in range(3)}
    flags |= {"07_methods": (*long, *others)}
    return {name: ("07_draft.py", f) for name, f in flags.items()}


def policies():
    """As particles(), of 08, and how much of its gradient is signal."""
    clip = best_value()
    online = ("--eval-every", 5, "--save-images", "--gflop")
    flags = {f"08_seed{seed}": (*clip, *online, 10000, "--seed", seed) for seed in range(3)}
    flags |= {f"08_joint{s}": (*value_of(JOINT), *online, 10000, "--seed", s) for s in range(3)}
    for seed, (low, high) in product(range(3), ((2, 12), (12, 17), (12, 25), (20, 25))):
        stop = ("--methods", "nft+stitchvm", "--stop", low, high, "--seed", seed)
        flags[f"08_stop{low}-{high}_{seed}"] = (*clip, *online, 7000, *stop)
    signal = (*clip, "--groups", 100, "--every", 3, "--stops", 14, 20)
    jobs = {name: ("08_nft.py", f) for name, f in flags.items()}
    return jobs | {"gradient": ("tests/studies/gradient.py", signal)}


def compare(tasks, jobs, only=None, keep=False):
    def one(name):
        script, flags = tasks[name]
        path = STUDY / name / f"{Path(script).stem}.json"
        run(script, "--out", path.parent, *flags)
        if "--save-images" in flags:
            run("tests/published/score.py", path, "--scorers", "geneval")
        write(name, read(path))
        keep_grid(name, path.parent)

    todo = wanted(tasks, only, keep)
    make_values([flag for name in todo for flag in tasks[name][1]], jobs)
    side_by_side(one, todo, jobs)


# ---------------------------------------------------------------------------- a value that ranks
BEST = "four times, 30,000 drawn, later i"  # clip's value in 05 to 08
LONG = ("--steps", 11700)  # four times 03's
LOW = ("--sigma-law", "low")
LEVERS = {  # {name: (training images, flags of 02, flags of 03)}
    "as it is": ("drawn", (), ("--sigma-law", "uniform")),
    "low noise": ("drawn", (), LOW),
    "30,000 drawn": ("more", (), (*LOW, "--epochs", 3)),
    "generated": ("generated", (), (*LOW, "--steps", 2925)),
    "later i": ("drawn", ("--i", 5, "--j", 1), LOW),
    "four times as long": ("drawn", (), (*LOW, *LONG)),
    BEST: ("more", ("--i", 5, "--j", 1), (*LOW, *LONG)),
}


def training_images(kind):
    """A folder of 8,000 drawn images, of 30,000 more, or of 8,000 that the generator made."""
    import draw

    data = ROOT / "tests/mini/data"
    root = STUDY / "ranking/images" / kind
    if kind == "drawn":
        return data / "train"
    if kind == "more" and not (root / "train_captions.json").exists():
        draw.write_training(root, 30000, seed=1)
    if kind == "generated" and not (root / "05_dps.json").exists():
        captions = read(data / "train_captions.json")["annotations"][::3]
        prompts = root / "captions.txt"
        root.mkdir(parents=True, exist_ok=True)
        prompts.write_text("\n".join(row["caption"] for row in captions))
        flags = ("--methods", "flow", "--steps", 20, "--batch", 100, "--scorers", "--save-images")
        many = ("--prompts", prompts, "--limit", len(captions))
        run("05_dps.py", *many, *flags, "--out", root)
    return root / ("05_images" if kind == "generated" else "train")


def folder_of(lever):
    return STUDY / "ranking" / lever.replace(",", "").replace(" ", "_")


def fit_lever(name):
    """01 to 03 of a lever; its folder."""
    kind, fit, flags = LEVERS[name]
    out = folder_of(name)
    run("01_cache_features.py", "--images", training_images(kind), "--out", out)
    run("02_fit_stitch.py", "--out", out, *fit)
    run("03_finetune.py", "--out", out, *flags)
    return out


def ranking(jobs, keep=False):
    """How well clip's value ranks the samples of one prompt, on tuning prompts, by lever."""
    if not unless_kept(["ranking"], keep):
        return
    for kind, *_ in LEVERS.values():
        training_images(kind)  # before two levers want the same

    def train(name):
        out = fit_lever(name)
        sweep = (*TUNING, "--methods", "stitchvm", "--strengths-stitchvm", *STRENGTHS)
        rows = sample(out, *sweep)["rows"]
        return out / "value.pt", [dict(row, lever=name) for row in rows]

    values, steered = zip(*side_by_side(train, LEVERS, jobs), strict=True)
    guided_by = [row for rows in steered for row in rows]
    out = STUDY / "ranking"
    run("tests/studies/ranking.py", "--values", *values, "--out", out)
    found = read(out / "ranking.json")
    names = {str(v.relative_to(ROOT)): name for v, name in zip(values, LEVERS, strict=True)}
    for row in found["rows"]:
        row["method"] = names.get(row["method"], row["method"])
    write("ranking", found | dict(guided=guided_by))


def laws(jobs, keep=False):
    """The sampler's own law and the prompt as levers of the same yardstick."""
    flags = ("--value", "runs/mini/sd3.5-medium_clip/value.pt")
    compare({"onpolicy": ("tests/studies/onpolicy.py", flags)}, jobs, keep=keep)


def everything(jobs):
    """Every measurement of the miniature, but for those that stand."""
    table(jobs, BACKBONES, REWARDS, keep=True)
    selection(jobs, keep=True)
    points(jobs, keep=True)
    ranking(jobs, keep=True)
    laws(jobs, keep=True)
    dps(jobs, keep=True)
    for tasks in (particles, drafts, policies):
        compare(tasks(), jobs, keep=True)


# ---------------------------------------------------------------------------- published size
def dry_run(script, *flags, preset="paper"):
    """{method: case} of a dry run."""
    last = run(script, "--dry-run", "--preset", preset, *flags).splitlines()[-1]
    return {c["method"]: c for c in json.loads(last)["cases"]}


def counts(jobs):
    """The dry runs behind docs/published.md, as they are: {stage backbone reward: cases}."""
    tasks = [
        (script, "--backbone", backbone, "--reward", reward)
        for backbone, reward in product(BACKBONES, REWARDS)
        for script in ("03_finetune.py", "05_dps.py")
    ]
    sizes = ("--n", 14, "--n-stitchvm", 8, "--m", 6, "--methods", "fks", "fks+stitchvm")
    tasks.append(("06_fks.py", "--backbone", "flux", "--reward", "hpsv2", *sizes))
    joint = ("--backbone", "sd3.5-medium", "--reward", JOINT)
    methods = ("draft-1", "draft-3", "draft-1+stitchvm", "draft-3+stitchvm")
    tasks += [("07_draft.py", *joint, "--methods", *methods), ("08_nft.py", *joint)]
    for size, reward in product((512, 1024), ("clip", "hpsv2")):
        flags = ("--backbone", "sd3.5-medium", "--reward", reward, "--resolution", size)
        tasks += [(script, *flags) for script in ("01_cache_features.py", "03_finetune.py")]
    found = side_by_side(lambda task: dry_run(*task), tasks, jobs)
    write("counts", {" ".join(map(str, t)): c for t, c in zip(tasks, found, strict=True)})


def ladder(jobs, backbones, rewards):
    """The dry runs of every stage at both presets: {preset backbone reward: {stage: …}}.

    Of each method what it holds and the hours it takes. Pairs that are there are done anew.
    """
    stages = sorted(p.name for p in ROOT.glob("0[0-9]_*.py"))
    tasks = list(product(("24gb", "paper"), backbones, rewards, stages))

    def one(task):
        preset, backbone, reward, stage = task
        cases = dry_run(stage, "--backbone", backbone, "--reward", reward, preset=preset)
        return {k: [round(c["peak_gib"], 1), round(c["hours"], 3)] for k, c in cases.items()}

    found = read(RESULTS / "ladder.json") if (RESULTS / "ladder.json").exists() else {}
    for task, cases in zip(tasks, side_by_side(one, tasks, jobs), strict=True):
        found.setdefault(" ".join(task[:3]), {})[task[3]] = cases
    write("ladder", found)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("selection", "table", "points", "dps", "fks", "draft", "nft", "ranking", "all")
    p.add_argument("what", choices=(*known, "counts", "ladder", "readme"))
    p.add_argument("--backbone", nargs="+", default=BACKBONES, choices=BACKBONES, help="of table")
    p.add_argument("--reward", nargs="+", default=REWARDS, choices=REWARDS, help="of table")
    p.add_argument("--only", nargs="+", metavar="NAME", help="of dps, fks, draft, nft: these jobs")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = p.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/mini")]  # for common and draw
    if args.what == "selection":
        selection(args.jobs)
    elif args.what == "table":
        table(args.jobs, args.backbone, args.reward)
    elif args.what == "points":
        points(args.jobs)
    elif args.what == "dps":
        dps(args.jobs, args.only)
    elif args.what == "ranking":
        ranking(args.jobs)
        laws(args.jobs)
    elif args.what == "all":
        everything(args.jobs)
    elif args.what == "counts":
        counts(args.jobs)
    elif args.what == "ladder":
        ladder(args.jobs, args.backbone, args.reward)
    elif args.what == "readme":
        import figures
        import pages

        pages.write_all()
        figures.draw_all()
    else:
        tasks = dict(fks=particles, draft=drafts, nft=policies)[args.what]()
        compare(tasks, args.jobs, args.only)


if __name__ == "__main__":
    main()
