"""Stages 01 to 04 run as a user runs them, short; what happens when one is killed or misused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = [f"tests/mini/data/{name}.jsonl" for name in ("coco", "hpdv2", "ava")]
STEPS = ["--steps", "60", "--batch", "16", "--save-every", "20", "--log-every", "10"]
SHORT = {
    "01_cache_features.py": ["--limit", "400", "--probe", "80", "--shard", "160"],
    "02_fit_stitch.py": [],
    "03_finetune.py": [*STEPS, "--warmup", "5"],
    "tests/studies/noisyclip.py": [*STEPS, "--warmup", "5"],
    "04_eval_noisy.py": ["--limit", "60", "--mc-images", "6", "--rollouts", "4", "--draws", "1"]
    + ["--benchmarks", *BENCHMARKS],
}
STAGES = [script for script in SHORT if script[0] == "0"]


def run(script, *flags, out=None, ok=True):
    place = ["--out", str(out)] if out else []
    command = [sys.executable, script, *SHORT[script], *place, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ok:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def refusal(*command, **more):
    """The one-sentence error of a refused run: exit code 1, no traceback."""
    done = run(*command, ok=False, **more)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stderr[done.stderr.index("error: ") :]


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """One short run of 01, 02, 03 and both baselines, and 04, for clip."""
    out = tmp_path_factory.mktemp("clip")
    run("01_cache_features.py", out=out)
    run("02_fit_stitch.py", out=out)
    run("03_finetune.py", out=out)
    run("03_finetune.py", "--front", "vae", out=out)
    run("tests/studies/noisyclip.py", out=out)
    run("04_eval_noisy.py", out=out)
    return out


def table(out, stage):
    return json.loads((out / f"{stage}.json").read_text())


def test_tables_have_the_promised_keys(clip_run):
    stages = ("02_fit_stitch", "03_finetune", "04_eval_noisy")
    fit, tune, evaluation = (table(clip_run, s) for s in stages)
    assert {"i", "j", "loss", "relative_loss", "rank"} <= set(fit["rows"][0])
    assert set(fit["chosen"]) == {"i", "j"}
    assert {"step", "loss", "seconds"} <= set(tune["rows"][0]) and tune["rows"][-1]["step"] == 60
    methods = {"clean", "constant", "stitchvm", "vae-stitch", "noisyclip", "tweedie"}
    assert {r["method"] for r in evaluation["rows"]} == methods | {"mc-1", "mc-4"}
    keys = {"method", "sigma", "metric", "value", "n", "draws", "ms_per_value", "gflop_per_value"}
    for row in evaluation["rows"]:
        assert keys | ({"value_mse"} if row["method"] != "clean" else set()) <= set(row)
        assert row["metric"] in ("recall@1_i2t", "recall@1_t2i") and 0 <= row["value"] <= 1
    for name in ("02_fit_stitch", "03_finetune", "noisyclip", "04_quality", "04_cost"):
        assert Image.open(clip_run / f"{name}.png").width > 300


def test_the_short_run_already_learns(clip_run):
    """Every (i, j) and the VAE are fitted; the loss falls; at sigma .1 V beats a constant."""
    rows = table(clip_run, "02_fit_stitch")["rows"]
    assert {(r["i"], r["j"]) for r in rows} == {(i, j) for i in range(9) for j in range(1, 5)}
    for name in ("03_finetune", "03_finetune_vae", "noisyclip"):
        losses = [r["loss"] for r in table(clip_run, name)["rows"]]
        assert losses[-1] < losses[0]
    rows = table(clip_run, "04_eval_noisy")["rows"]
    mse = {(r["method"], r["sigma"]): r["value_mse"] for r in rows if "value_mse" in r}
    assert mse["stitchvm", 0.1] < mse["constant", 0.1]


def test_the_value_costs_less_than_tweedie(clip_run):
    rows = table(clip_run, "04_eval_noisy")["rows"]
    gflop = {r["method"]: r["gflop_per_value"] for r in rows if r["sigma"] == 0.5}
    assert gflop["stitchvm"] < gflop["tweedie"] < gflop["mc-1"]
    assert gflop["mc-4"] == pytest.approx(4 * gflop["mc-1"])


RANKED = {"hpdv2_accuracy", "imagereward_accuracy", "imagereward_accuracy_by_prompt"}
METRICS = {"hpsv2": RANKED, "aesthetic": {"srcc"}, "dfn-clip": {"recall@1_i2t", "recall@1_t2i"}}


@pytest.mark.parametrize("reward", METRICS)
def test_the_other_rewards_run(tmp_path, reward):
    """04 uses those of its benchmarks that fit the reward."""
    more = {
        "03_finetune.py": ["--steps", "20"],
        "04_eval_noisy.py": ["--mc-images", "3", "--rollouts", "2"],
    }
    for script in STAGES:
        run(script, "--reward", reward, *more.get(script, []), out=tmp_path)
    assert {r["metric"] for r in table(tmp_path, "04_eval_noisy")["rows"]} == METRICS[reward]


def killed(script, *flags, out, when):
    """Start a stage and kill it the moment `when()` holds."""
    command = [sys.executable, script, *SHORT[script], "--out", str(out), *flags]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, **silent)
    while not when():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_03_killed_and_resumed_gives_the_same_bits(clip_run):
    half = clip_run / "half.pt"
    started = half.with_suffix(".train").exists
    killed("03_finetune.py", "--value", str(half), out=clip_run, when=started)
    assert not half.exists()
    run("03_finetune.py", "--value", half, "--resume", out=clip_run)
    paths = clip_run / "value.pt", half
    whole, resumed = (torch.load(p, weights_only=True)["data"]["state"] for p in paths)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_01_killed_and_run_again_gives_the_same_bits(clip_run, tmp_path):
    folder = tmp_path / "cache"
    killed("01_cache_features.py", out=tmp_path, when=lambda: any(folder.glob("shard_*.pt")))
    first = next(folder.glob("shard_*.pt"))
    assert not (tmp_path / "cache.pt").exists()
    before = os.stat(first).st_mtime_ns
    run("01_cache_features.py", out=tmp_path)
    assert os.stat(first).st_mtime_ns == before  # the whole shard was left as it was
    folders = clip_run, tmp_path
    for shard in sorted((clip_run / "cache").glob("*.pt")):
        a, b = (torch.load(d / "cache" / shard.name, weights_only=True) for d in folders)
        assert a["names"] == b["names"]
        assert torch.equal(a["z0"], b["z0"]) and torch.equal(a["pixels"], b["pixels"])
    a, b = (torch.load(d / "cache.pt", weights_only=True)["data"]["probe"] for d in folders)
    assert a["names"] == b["names"]
    assert torch.equal(a["dit"], b["dit"]) and torch.equal(a["reward"], b["reward"])


def test_misuse_is_answered_in_one_sentence(clip_run, tmp_path):
    message = refusal("02_fit_stitch.py", "--reward", "hpsv2", out=clip_run)
    assert all(s in message for s in ("does not fit", "clip", "hpsv2", "01_cache_features.py"))
    assert "python 01_cache_features.py" in refusal("02_fit_stitch.py", out=tmp_path)
    message = refusal("01_cache_features.py", "--backbone", "sd4", out=tmp_path)
    assert "there is no sd4" in message
    nowhere = tmp_path / "nowhere"
    assert "--images" in refusal("01_cache_features.py", "--images", nowhere, out=tmp_path)
    assert "i runs to 8" in refusal("02_fit_stitch.py", "--i", "99", out=clip_run)
    cut = tmp_path / "value.pt"
    cut.write_bytes((clip_run / "value.pt").read_bytes()[:5000])
    assert "cannot be read" in refusal("04_eval_noisy.py", "--value", cut, out=clip_run)


def test_a_nan_stops_training_and_leaves_no_value(clip_run, tmp_path):
    path = tmp_path / "value.pt"
    for script in ("03_finetune.py", "tests/studies/noisyclip.py"):
        message = refusal(script, "--lr", "1e20", "--value", path, out=clip_run)
        assert "NaN or infinite" in message and list(tmp_path.iterdir()) == []


def test_unreadable_images_are_skipped_counted_and_named(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k, source in enumerate(sorted((ROOT / "tests/mini/data/train").glob("*.png"))[:24]):
        Image.open(source).save(folder / f"{k:02d}{('.png', '.jpg', '.webp')[k % 3]}")
    (folder / "broken.png").write_bytes(b"not an image")
    done = run("01_cache_features.py", "--images", folder, "--probe", "6", out=tmp_path)
    assert "skipped 1 unreadable of 25" in done.stdout and "broken.png" in done.stdout
    bad = torch.load(tmp_path / "cache.pt", weights_only=True)["data"]["bad"]
    assert list(bad) == ["broken.png"]
