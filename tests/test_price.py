"""Dry runs: what the published models cost, against counts that were made apart from this code.

Tests marked slow are left out by default: python -m pytest -m slow.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import price
import pytest
import torch
import torch.nn.functional as F

import common

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(p.name for p in ROOT.glob("0[0-9]_*.py"))
TOWERS = ("clip", "dfn-clip", "hpsv2", "aesthetic")
published = functools.cache(price.meta_backbone)


# ---------------------------------------------------------------------------- counting
PARAMETERS = {"sd3.5-medium": 2243171520, "sd3.5-large": 8056627520, "flux": 11901408320}
# TFLOP of a denoiser call, and of its first four blocks
CALLS = [
    ("sd3.5-medium", 512, 2.44, 0.46),
    ("sd3.5-medium", 1024, 11.25, 2.21),
    ("sd3.5-large", 1024, 31.12, 3.29),
    ("flux", 1024, 74.38, 5.23),
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_backbones_have_their_published_parameters(name):
    backbone, _ = published(name)
    assert sum(p.numel() for p in backbone.transformer.parameters()) == PARAMETERS[name]
    assert sum(p.numel() for p in backbone.vae.parameters()) == 83819683


@pytest.mark.parametrize("name, resolution, call, blocks", CALLS)
def test_backbone_counts(name, resolution, call, blocks):
    backbone, null = published(name)
    z, sigma = price.meta(1, *backbone.latent_shape(resolution)).bfloat16(), price.meta(1)

    def prefix():
        state = common.begin(backbone.transformer, z, sigma, *null)
        common.run_blocks(backbone.transformer, state, 4)

    weights = [backbone.transformer]
    found, saved = price.count(lambda: backbone.velocity(z, sigma, null), weights)
    assert found == pytest.approx(call, rel=0.02) and saved == 0
    assert price.count(prefix)[0] == pytest.approx(blocks, rel=0.02)


def test_a_counted_backward_pass():
    """SD 3.5 Medium at 512 to its input: 2.97 TFLOP more, 1.88 GiB kept, weights left out."""
    backbone, null = published("sd3.5-medium")
    z, sigma = price.meta(1, 16, 64, 64).bfloat16().requires_grad_(), price.meta(1)

    def step():
        backbone.velocity(z, sigma, null).sum().backward()

    tflop, saved = price.count(step, [backbone.transformer])
    assert tflop == pytest.approx(2.44 + 2.97, rel=0.02) and saved == pytest.approx(1.88, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("resolution, encode, decode", [(512, 1.12, 2.52), (1024, 4.88, 10.47)])
def test_vae_counts(resolution, encode, decode):
    backbone, _ = published("sd3.5-medium")
    x = price.meta(1, 3, resolution, resolution)
    z = price.meta(1, *backbone.latent_shape(resolution))
    assert price.count(lambda: backbone.encode(x))[0] == pytest.approx(encode, rel=0.02)
    assert price.count(lambda: backbone.decode(z))[0] == pytest.approx(decode, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("name, tflop", [("clip", 0.382), ("dfn-clip", 1.007), ("hpsv2", 0.335)])
def test_tower_counts(name, tflop):
    reward = common.Reward(name, "paper", "meta", weights=False)
    x = price.meta(1, 3, 1024, 1024)
    assert price.count(lambda: reward.embed(x))[0] == pytest.approx(tflop, rel=0.02)


def test_what_a_backward_pass_multiplies():
    """A linear layer costs as much again for its input and for its weights; attention 2.5 times."""
    layer = torch.nn.Linear(64, 96, device="meta")
    frozen = torch.nn.Linear(64, 96, device="meta").requires_grad_(False)
    x, one = price.meta(10, 64).requires_grad_(), 2 * 10 * 64 * 96 / 1e12
    assert price.count(lambda: layer(x.detach()))[0] == pytest.approx(one)
    assert price.count(lambda: frozen(x).sum().backward())[0] == pytest.approx(2 * one)
    assert price.count(lambda: layer(x).sum().backward())[0] == pytest.approx(3 * one)
    q = price.meta(2, 4, 128, 32, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.empty_like(q).requires_grad_() for _ in "kv")
    library = F.scaled_dot_product_attention

    def both():
        F.scaled_dot_product_attention(query=q, key=k, value=v).sum().backward()

    forward = 4 * 2 * 4 * 128 * 128 * 32 / 1e12
    with torch.no_grad():
        found = price.count(lambda: F.scaled_dot_product_attention(q, k, v))[0]
    assert found == pytest.approx(forward)
    tflop, saved = price.count(both)
    assert tflop == pytest.approx(3.5 * forward)
    # q, k, v and the output; of a row a logarithm, which is little, and no N x N matrix
    tensors = 4 * 2 * 4 * 128 * 32 * 2 / price.GIB
    assert tensors <= saved < 1.2 * tensors
    assert F.scaled_dot_product_attention is library  # counting is over


# ---------------------------------------------------------------------------- dry runs
def pair(backbone, reward, resolution):
    return ["--backbone", backbone, "--reward", reward, "--resolution", str(resolution)]


@pytest.fixture
def dry_run(capsys, tmp_path):
    """The cases of a stage by method; the table and the closing JSON line are as promised."""

    def go(stage, *flags):
        before = set(ROOT.iterdir())
        price.main([stage, "--dry-run", "--out", str(tmp_path / "out"), *map(str, flags)])
        out = capsys.readouterr().out.splitlines()
        assert list(tmp_path.iterdir()) == [] and set(ROOT.iterdir()) == before
        report = json.loads(out[-1])
        assert list(report) == ["stage", "backbone", "reward", "resolution", "cases"]
        assert report["stage"] == Path(stage).stem
        for name, value in zip(flags[::2], flags[1::2], strict=True):
            assert str(report.get(name.strip("-"), value)) == str(value)
        assert "trained" in out[0] and "frozen parameters" in out[0]
        assert len(out) == len(report["cases"]) + 4
        for case in report["cases"]:
            assert {"method", "unit", "fits", "n"} <= set(case)
            assert case["tflop"] > 0 and case["peak_gib"] > case["saved_gib"] >= 0
            hours = case["tflop"] * case["n"] / case.get("tflops", 150) / 3600
            assert case["hours"] == pytest.approx(hours)
        return {case["method"]: case for case in report["cases"]}

    return go


def of(cases, key, names):
    return {name: cases[name][key] for name in names}


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("01_cache_features.py", pair("flux", "hpsv2", 512)),
        ("02_fit_stitch.py", pair("sd3.5-large", "dfn-clip", 1024)),
        ("03_finetune.py", pair("flux", "aesthetic", 1024)),
        ("04_eval_noisy.py", [*pair("sd3.5-medium", "dfn-clip", 512), "--rollout-steps", 2]),
    ],
)
def test_dry_run(dry_run, stage, flags):
    began = time.process_time()
    dry_run(stage, *flags)
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    "resolution, reward, tflop",
    [(512, "clip", 2.00), pytest.param(1024, "hpsv2", 3.56, marks=pytest.mark.slow)],
)
def test_03_counts_a_training_image(dry_run, resolution, reward, tflop):
    """From cached latents, i = 4: the prefix, the target, the tail forward and back."""
    flags = pair("sd3.5-medium", reward, resolution)
    cases = dry_run("03_finetune.py", *flags, "--batch", 8)
    assert cases["stitchvm, i = 4"]["tflop"] / 8 == pytest.approx(tflop, rel=0.02)
    assert cases["stitchvm, i = 12"]["tflop"] > 1.2 * cases["stitchvm, i = 4"]["tflop"]


def test_03_counts_the_vae_stitch(dry_run):
    """No diffusion block runs: less work than after four of them."""
    flags = pair("sd3.5-medium", "clip", 512)
    cases = dry_run("03_finetune.py", *flags, "--batch", 8, "--front", "vae")
    assert list(cases) == ["vae-stitch"] and cases["vae-stitch"]["tflop"] / 8 < 2.00 - 0.4


def test_05_counts_the_published_step(dry_run):
    """SD 3.5 Medium at 1024 with HPSv2, TFLOP a step; i = 4 shared costs 1.2 of plain sampling."""
    cases = dry_run("05_dps.py", "--preset", "paper", "--reward", "hpsv2")
    expected = {"flow": 22.5, "tweedie": 80.1}
    expected |= {"stitchvm, i = 4": 29.0, "stitchvm, i = 4, shared": 26.7}
    expected |= {"stitchvm, i = 12": 40.5, "stitchvm, i = 12, shared": 33.8}
    assert of(cases, "tflop", expected) == pytest.approx(expected, rel=0.02)
    assert all(c["n"] == 20000 and c["unit"] == "step" for c in cases.values())
    plain, less, value = (
        cases[k] for k in ("tweedie", "tweedie, checkpointing", "stitchvm, i = 4")
    )
    assert cases["flow"]["saved_gib"] == 0
    assert value["saved_gib"] < 0.1 * plain["saved_gib"]
    assert less["saved_gib"] < 0.2 * plain["saved_gib"] and less["tflop"] > 1.3 * plain["tflop"]
    assert cases["stitchvm, i = 4, shared"]["of_flow"] == pytest.approx(1.19, abs=0.01)


def test_06_counts_a_prompt_of_flux(dry_run):
    """At 1024 with HPSv2, TFLOP: N = 8 with M = 6 after block 4 is a third less than N = 14."""
    sizes = "--n", 14, "--n-stitchvm", 8, "--m", 6
    cases = dry_run("06_fks.py", *pair("flux", "hpsv2", 1024), *sizes)
    value = "fks+stitchvm M=6 N=8, i = "
    expected = {"fks N=14": 30067, f"{value}4": 20138, f"{value}12": 25650}
    tflop = of(cases, "tflop", expected)
    assert tflop == pytest.approx(expected, rel=0.02)
    assert 1 - tflop[f"{value}4"] / tflop["fks N=14"] == pytest.approx(0.33, abs=0.005)
    assert all(c["unit"] == "prompt" for c in cases.values())


@pytest.fixture
def shallow(monkeypatch):
    """SD 3.5 Medium with four blocks."""
    name, config, *rest = price.CONFIGS["sd3.5-medium"]
    few = config | dict(num_layers=4, dual_attention_layers=(0, 1))
    monkeypatch.setitem(price.CONFIGS, "sd3.5-medium", (name, few, *rest))


def test_07_of_a_shallow_model(dry_run, shallow):
    """The value costs less than decoder and reward; checkpointing adds a pass a kept step."""
    cases = dry_run("07_draft.py", "--reward", "hpsv2")
    assert all(c["unit"] == "sample" and c["n"] == 500 * 64 for c in cases.values())
    more = ", checkpointing"
    tflop, saved = ({k: c[key] for k, c in cases.items()} for key in ("tflop", "saved_gib"))
    added = tflop[f"draft-1{more}"] - tflop["draft-1"]
    assert tflop[f"draft-3{more}"] - tflop["draft-3"] == pytest.approx(3 * added)
    assert 0 < 2 * added < tflop["draft-3"] - tflop["draft-1"]
    for name in ("draft-1", "draft-3"):
        for end in ("", more):
            stopped = f"{name}+stitchvm, i = 4{end}"
            assert tflop[stopped] < tflop[name + end] and saved[stopped] < saved[name + end]
    stopped = "draft-3+stitchvm, i = 4"
    assert saved[stopped + more] < 0.6 * saved[stopped]
    assert f"alignprop{more}" in cases and "alignprop" not in cases


@pytest.mark.slow
def test_07_counts_the_published_step(dry_run):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample."""
    cases = dry_run("07_draft.py", "--reward", "dfn-clip+hpsv2")
    more, value = ", checkpointing", "+stitchvm, i = "
    expected = {"draft-1": 38.2, "draft-3": 49.1}
    expected |= {f"draft-1{value}4": 21.7, f"draft-1{value}12": 23.8}
    expected |= {f"draft-3{value}4": 32.7, f"draft-3{value}12": 34.7}
    expected |= {f"draft-1{more}": 40.7, f"draft-3{more}": 56.6}
    expected |= {f"draft-1{value}4{more}": 24.2, f"draft-3{value}4{more}": 40.1}
    assert of(cases, "tflop", expected) == pytest.approx(expected, rel=0.02)
    assert cases[f"alignprop{more}"]["tflop"] > cases[f"draft-3{more}"]["tflop"]
    whole, stopped = cases["draft-3"]["saved_gib"], cases[f"draft-3{value}4"]["saved_gib"]
    assert cases[f"draft-3{value}4{more}"]["saved_gib"] < 0.4 * stopped < 0.4 * whole


def test_08_of_a_shallow_model(dry_run, shallow):
    """The value and the noise levels above tau save work, checkpointing saves memory."""
    cases = dry_run("08_nft.py", "--reward", "hpsv2")
    assert all(c["unit"] == "sample" and c["n"] == 200 * 96 for c in cases.values())
    tflop, saved = ({k: c[key] for k, c in cases.items()} for key in ("tflop", "saved_gib"))
    value = "nft+stitchvm, i = 4"
    assert tflop[value] < tflop[f"{value}, as many noise levels as nft"] < tflop["nft"]
    assert tflop["nft, rollout and reward only"] < 0.5 * tflop["nft"] < tflop["nft, checkpointing"]
    assert saved["nft, checkpointing"] < 0.5 * saved["nft"]


@pytest.mark.slow
def test_08_counts_the_published_loop(dry_run):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample."""
    cases = dry_run("08_nft.py", "--reward", "dfn-clip+hpsv2")
    value = "nft+stitchvm, i = 4"
    expected = {"nft": 315.6, value: 188.7, f"{value}, as many noise levels as nft": 287.5}
    expected |= {"nft, rollout and reward only": 65.8, f"{value}, rollout and value only": 37.7}
    assert of(cases, "tflop", expected) == pytest.approx(expected, rel=0.02)
    less, plain = cases["nft, checkpointing"], cases["nft"]
    assert less["saved_gib"] < 0.1 * plain["saved_gib"]
    assert 1.15 < less["tflop"] / plain["tflop"] < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("reward", TOWERS)
@pytest.mark.parametrize("backbone", PARAMETERS)
def test_dry_run_of_every_pair(dry_run, backbone, reward):
    """The first four stages at one resolution, the two of them in turn."""
    for k, stage in enumerate(STAGES[:4]):
        resolution = (512, 1024)[(k + TOWERS.index(reward)) % 2]
        few = ["--rollout-steps", 4] if stage.startswith("04") else []
        dry_run(stage, *pair(backbone, reward, resolution), *few)


# ---------------------------------------------------------------------------- as a user runs it
def launch(*command):
    """A program run from the repository's root on one thread."""
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/published'}"
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_a_stage_starts_it(tmp_path):
    """The miniature is not priced: its preset stands for 24gb. --tflops changes the hours only."""
    flags = "--dry-run", "--preset", "mini", "--tflops", 300, "--out", tmp_path / "out"
    done = launch("01_cache_features.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    probe = report["cases"][1]
    assert (report["backbone"], report["resolution"]) == ("sd3.5-medium", 512)
    assert probe["tflop"] == pytest.approx(2.44, rel=0.05)  # a denoiser call and three blocks
    assert probe["hours"] == pytest.approx(probe["tflop"] * 200 / 300 / 3600)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--backbone", "sana"], 1, "error: --dry-run knows the published sizes of sd3.5-medium"),
        (["--reward", "blip"], 1, "error: there is no reward blip"),
        (["--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
    ],
)
def test_misuse(capsys, flags, code, said):
    with pytest.raises(SystemExit) as e:
        price.main(["02_fit_stitch.py", "--dry-run", *flags])
    message = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert (1 if isinstance(e.value.code, str) else e.value.code) == code and said in message


@pytest.mark.slow
def test_the_dearest_dry_run_takes_a_minute_and_2_gb():
    done = launch(__file__, "04_eval_noisy.py", *pair("flux", "dfn-clip", 1024))
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    print(usage)
    assert usage["seconds"] < 60 and usage["peak_gb"] < 2, usage


if __name__ == "__main__":  # what the last test measures in a process of its own
    began = time.process_time()
    price.main(sys.argv[1:])
    # trap: ru_maxrss begins at what the parent had
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    print(json.dumps(dict(seconds=time.process_time() - began, peak_gb=int(peak) * 1024 / 1e9)))
