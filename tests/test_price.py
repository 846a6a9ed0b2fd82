"""Dry runs: what the published models cost, against counts that were made apart from this code.

Tests marked slow are left out by default: python -m pytest -m slow.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import cases
import price
import pytest
import sizes
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(p.name for p in ROOT.glob("0[0-9]_*.py"))
TOWERS = ("clip", "dfn-clip", "hpsv2", "aesthetic")
Reward = common.Reward
published = cache(sizes.Backbone)


def count(run, weights=None):
    """TFLOP, GiB kept for the backward pass, GiB at most, of run() where these weights are."""
    with price.counting() as meter:
        meter.add([*weights.parameters(), *weights.buffers()] if weights else ())
        cost = meter.cost(run)
    return cost.flop.total() / 1e12, cost.saved, cost.peak


def meta(*shape, **more):
    return torch.empty(*shape, device="meta", **more)


def condition(backbone, n=1):
    c = backbone.config
    text = meta(n, backbone.tokens, c["joint_attention_dim"], dtype=torch.bfloat16)
    return text, meta(n, c["pooled_projection_dim"], dtype=torch.bfloat16)


# ---------------------------------------------------------------------------- work
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
    backbone = published(name)
    assert sum(p.numel() for p in backbone.transformer.parameters()) == PARAMETERS[name]
    assert sum(p.numel() for p in backbone.vae.parameters()) == 83819683


@pytest.mark.parametrize(
    "name, parameters", [("sd3.5-medium", (123.65, 694.66, 4762.31)), ("flux", (123.65, 4762.31))]
)
def test_text_encoders_have_their_published_parameters(name, parameters):
    models, tokens = zip(*published(name).text_encoders(), strict=True)
    found = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    assert found == pytest.approx(parameters, abs=0.01)
    length = sum(tokens[1:]) if name != "flux" else tokens[-1]  # CLIP's are one beside the other
    assert length == published(name).tokens


@pytest.mark.parametrize("name, resolution, call, blocks", CALLS)
def test_backbone_counts(name, resolution, call, blocks):
    backbone = published(name)
    z, sigma = meta(1, 16, *[resolution // 8] * 2).bfloat16(), meta(1)
    null = condition(backbone)

    def prefix():
        state = common.begin(backbone.transformer, z, sigma, *null)
        common.run_blocks(backbone.transformer, state, 4)

    found, saved, _ = count(lambda: backbone.velocity(z, sigma, null))
    assert found == pytest.approx(call, rel=0.02) and saved == 0
    assert count(prefix)[0] == pytest.approx(blocks, rel=0.02)


def test_a_counted_backward_pass():
    """SD 3.5 Medium at 512 to its input: 2.97 TFLOP more."""
    backbone = published("sd3.5-medium")
    z, sigma = meta(1, 16, 64, 64).bfloat16().requires_grad_(), meta(1)
    call = partial(backbone.velocity, z, sigma, condition(backbone))
    tflop, saved, _ = count(lambda: call().sum().backward(), backbone.transformer)
    assert tflop == pytest.approx(2.44 + 2.97, rel=0.02) and saved == pytest.approx(1.88, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("resolution, encode, decode", [(512, 1.12, 2.52), (1024, 4.88, 10.47)])
def test_vae_counts(resolution, encode, decode):
    backbone = published("sd3.5-medium")
    x, z = meta(1, 3, resolution, resolution), meta(1, 16, *[resolution // 8] * 2)
    assert count(lambda: backbone.encode(x))[0] == pytest.approx(encode, rel=0.02)
    assert count(lambda: backbone.decode(z))[0] == pytest.approx(decode, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("name, tflop", [("clip", 0.382), ("dfn-clip", 1.007), ("hpsv2", 0.335)])
def test_tower_counts(name, tflop):
    reward = Reward(name, "paper", "meta", weights=False)
    x = meta(1, 3, 1024, 1024)
    assert count(lambda: reward.embed(x))[0] == pytest.approx(tflop, rel=0.02)


def test_what_a_backward_pass_multiplies():
    """A linear layer costs as much again for its input and for its weights; attention 2.5 times."""
    layer = nn.Linear(64, 96, device="meta")
    frozen = nn.Linear(64, 96, device="meta").requires_grad_(False)
    x, one = meta(10, 64).requires_grad_(), 2 * 10 * 64 * 96 / 1e12
    assert count(lambda: layer(x.detach()))[0] == pytest.approx(one)
    assert count(lambda: frozen(x).sum().backward())[0] == pytest.approx(2 * one)
    assert count(lambda: layer(x).sum().backward())[0] == pytest.approx(3 * one)
    q = meta(2, 4, 128, 32, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.empty_like(q).requires_grad_() for _ in "kv")
    library = F.scaled_dot_product_attention

    def both():
        F.scaled_dot_product_attention(query=q, key=k, value=v).sum().backward()

    forward = 4 * 2 * 4 * 128 * 128 * 32 / 1e12
    with torch.no_grad():
        found = count(lambda: F.scaled_dot_product_attention(q, k, v))[0]
    assert found == pytest.approx(forward)
    tflop, saved, peak = count(both)
    assert tflop == pytest.approx(3.5 * forward)
    # beside q, k and v the output, and of a row a logarithm, which is little; no N x N matrix
    tensor = 2 * 4 * 128 * 32 * 2 / cases.GIB
    assert tensor <= saved < 1.2 * tensor and peak < 7.5 * tensor
    assert F.scaled_dot_product_attention is library  # counting is over


def test_work_is_counted_by_its_dtype():
    layer = nn.Linear(64, 96, device="meta").requires_grad_(False)
    x = meta(10, 64)
    with price.counting() as meter:
        flop = meter.cost(lambda: layer(x).bfloat16() @ meta(96, 32, dtype=torch.bfloat16)).flop
    assert flop == {torch.float32: 2 * 10 * 64 * 96, torch.bfloat16: 2 * 10 * 96 * 32}
    cost = cases.Cost(flop, 0.0, 0.0)
    row = cases.Case("a", "b", 7, {cases.Step("c", None, cost=cost): 3}).row(100)
    seconds = 21 * (flop[torch.float32] / 50e12 + flop[torch.bfloat16] / 100e12)
    assert row["hours"] == pytest.approx(seconds / 3600)
    assert row["tflop"] == pytest.approx(3 * flop.total() / 1e12)


# ---------------------------------------------------------------------------- memory
def chain(n, width, device):
    layers = [nn.Linear(width, width, bias=False, device=device) for _ in range(n)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_bytes_by_hand(device):
    """Four layers of 32 on 1000 rows: an activation has a = 128,000 bytes, weights w = 4,096.

    Without gradient two are alive at once, the input besides. With it each layer's input waits for
    the way back, and of a checkpointed half only the first.
    """
    a, w = 128_000, 4_096
    with price.Meter(device) as meter:
        x, layers = torch.empty(1000, 32, device=device), chain(4, 32, device)
        assert meter.live == a + 4 * w

        def cost(run):
            found = meter.cost(run)
            return found.saved * cases.GIB, found.peak * cases.GIB - meter.live

        with torch.no_grad():
            assert cost(lambda: layers(x)) == (0, 2 * a)
        halves = layers[:2], layers[2:]

        again = partial(checkpoint, use_reentrant=False)
        layers(x).sum().backward()  # from here on gradients are there
        assert meter.live == a + 8 * w
        # the way back begins with the inputs of layers 2 to 4 and the sum, 4 bytes
        saved, peak = cost(lambda: layers(x).sum().backward())
        assert saved == 3 * a + 4 and 4 * a <= peak <= 4 * a + 2 * w
        saved, peak = cost(lambda: again(halves[1], again(halves[0], x)).sum().backward())
        assert saved == a + 4 and 3 * a <= peak <= 3 * a + 2 * w
        assert meter.live == a + 8 * w


def test_views_and_results_in_place_take_nothing():
    with price.Meter("cpu") as meter:
        x = torch.zeros(10, 10)
        y = x.t()[2:].add_(1)
        assert meter.live == 400 and y.untyped_storage().nbytes() == 400
        assert y.sum() == 80
        del x
        assert meter.live == 400
        del y
        assert meter.live == 0


def test_what_leaves_the_card_is_not_on_it():
    """A tower visits the meta device and goes; numbers read there are ones."""
    with price.counting() as meter:
        tower = nn.Linear(1000, 1000, bias=False, device="meta").cpu()
        assert meter.live == 0 and tower.weight.device.type == "cpu"
        tower.to("meta")
        assert meter.live == 4_000_000
        with torch.no_grad():
            y = tower(meta(2, 1000)).cpu()
        tower.cpu()
        assert meter.live == 0 and y.shape == (2, 1000) and y.device.type == "cpu"
        assert float(meta(1)) == 1.0 and bool(meta(2).isfinite().all())


def test_autocasts_copies_are_counted():
    """Of a weight that learns the bfloat16 copy stays; of a frozen one while it is used, or where
    the input's gradient needs it."""
    rows, width = 64, 512
    w = width * width * 2  # bytes of a copy; activations are far smaller

    def peak(learns, needs, device):
        with price.counting() if device == "meta" else price.Meter("cpu") as meter:
            layers = chain(8, width, device).requires_grad_(learns)
            x = torch.empty(rows, width, device=device, requires_grad=needs)

            def run():
                with common.autocast(torch.device(device), torch.bfloat16):
                    y = layers(x)
                assert y.dtype == torch.bfloat16
                return y

            return (meter.cost(run).peak * cases.GIB - meter.live) / w

    for device in ("meta", "cpu"):
        assert peak(True, False, device) == pytest.approx(8, abs=1.5)
        assert peak(False, True, device) == pytest.approx(8, abs=1.5)
        assert peak(False, False, device) == pytest.approx(1, abs=0.9)


def miniature(device):
    """The miniature's generator, reward, value after block 2 and null text, on a device."""
    backbone = common.Backbone("sd3.5-medium", device=device)
    backbone.latent_shape(64)  # the VAE is there
    reward = Reward("clip", device=device)
    c, width = backbone.transformer.config, reward.visual.conv1.out_channels
    with backbone.device:
        null = torch.rand(1, 16, c.joint_attention_dim), torch.rand(1, c.pooled_projection_dim)
        linear = torch.rand(width, backbone.transformer.inner_dim) / 100, torch.rand(width)
        stitch = common.Stitch(*linear, reward.visual.grid_size)
        value = common.StitchedValue(backbone.transformer, null, reward, stitch, 2, 1)
    return backbone, reward, value, null


def training_step(device, n):
    """Of 03."""
    stage = importlib.import_module("03_finetune")
    _, reward, value, _ = miniature(device)
    optimizer = sizes.optimizer_of([p for p in value.parameters() if p.requires_grad])
    with torch.device(device):
        z, t = torch.rand(n, 16, 8, 8), torch.rand(n)
        pixels = torch.rand(n, 3, reward.size, reward.size)

    def step():
        target = stage.clean_target(reward, pixels)
        stage.step_loss(value, reward, z, t, target)[0].backward()
        optimizer.step()

    return step


def tweedie_step(device, n):
    """Of 05."""
    stage = importlib.import_module("05_dps")
    backbone, reward, _, null = miniature(device)
    velocity = partial(backbone.velocity, condition=null, null=null, cfg=4.5)
    with torch.device(device):
        text, z, t = torch.rand(n, reward.visual.output_dim), torch.rand(n, 16, 8, 8), torch.rand(n)
    given = velocity, backbone.decode, [reward], [text]
    return partial(stage.tweedie_gradient, *given, z, t)


def decoding(device, n):
    backbone, *_ = miniature(device)
    return torch.no_grad()(partial(backbone.decode, torch.rand(n, 16, 8, 8, device=device)))


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
@pytest.mark.parametrize("make", [training_step, tweedie_step, decoding])
def test_what_is_predicted_is_what_is_measured(make):
    """The miniature on the CPU: what a step takes beyond its models, and what waits for its way
    back, by the storages of real tensors and by those of the meta device."""
    with price.Meter("cpu") as meter:
        measured = meter.cost(make("cpu", 6))
    with price.counting() as meter:
        predicted, twice = (meter.cost(make("meta", n)) for n in (6, 12))
    real, found, more = (cost.peak - cost.loaded for cost in (measured, predicted, twice))
    assert found == pytest.approx(real, rel=0.1) and found > 0.1 * predicted.loaded
    assert predicted.saved == pytest.approx(measured.saved, rel=0.1)
    assert more > 1.3 * real


# ---------------------------------------------------------------------------- dry runs
def pair(backbone, reward, resolution):
    return ["--backbone", backbone, "--reward", reward, "--resolution", str(resolution)]


@pytest.fixture
def dry_run(capsys, tmp_path):
    """The cases of a stage by method; the table and the closing JSON line are as promised."""

    def go(stage, *flags, switch=()):
        before = set(ROOT.iterdir())
        argv = [*map(str, flags), *switch, "--dry-run", "--out", str(tmp_path / "out")]
        price.main([stage, *argv])
        out = capsys.readouterr().out.splitlines()
        assert list(tmp_path.iterdir()) == [] and set(ROOT.iterdir()) == before
        report = json.loads(out[-1])
        assert list(report) == ["stage", "backbone", "reward", "resolution", "cases"]
        assert report["stage"] == Path(stage).stem
        for name, value in zip(flags[::2], flags[1::2], strict=True):
            assert str(report.get(name.strip("-"), value)) == str(value)
        assert len(out) == len(report["cases"]) + 5
        most = max(report["cases"], key=lambda c: c["peak_gib"])
        assert f"peak of the stage: {most['peak_gib']:.1f} GiB ({most['method']})" == out[-2]
        for case in report["cases"]:
            assert {"method", "unit", "fits", "n"} <= set(case)
            assert case["tflop"] > 0 and case["peak_gib"] > case["loaded_gib"] + case["saved_gib"]
            if case["method"] != "closed form":  # in float64 on the CPU
                fastest = case["tflop"] * case["n"] / 150 / 3600
                assert fastest <= case["hours"] * 1.0001 <= 2.001 * fastest
        return {case["method"]: case for case in report["cases"]}

    return go


def of(rows, key, names):
    return {name: rows[name][key] for name in names}


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("01_cache_features.py", pair("flux", "hpsv2", 512)),
        ("02_fit_stitch.py", pair("sd3.5-large", "dfn-clip", 1024)),
        ("03_finetune.py", [*pair("flux", "aesthetic", 1024), "--batch", 4]),
        ("04_eval_noisy.py", [*pair("sd3.5-medium", "dfn-clip", 512), "--rollout-steps", 2]),
    ],
)
def test_dry_run(dry_run, stage, flags):
    began = time.process_time()
    dry_run(stage, *flags)
    assert time.process_time() - began < 30


def test_prompts_are_encoded_alone(dry_run):
    """T5 has 4.76 B parameters, CLIP's two 0.82 B, in bfloat16; nothing else is there yet."""
    rows = dry_run("01_cache_features.py", *pair("sd3.5-medium", "dfn-clip", 512))
    weights = 2 * (4.7623 + 0.1237 + 0.6947) * 1e9 / cases.GIB
    assert rows["text encoders"]["loaded_gib"] == pytest.approx(weights, rel=0.001)
    assert rows["latents"]["loaded_gib"] < 4  # and then they are gone


@pytest.mark.parametrize(
    "resolution, reward, tflop",
    [(512, "clip", 2.00), pytest.param(1024, "hpsv2", 3.56, marks=pytest.mark.slow)],
)
def test_03_counts_a_training_image(dry_run, resolution, reward, tflop):
    """From cached latents, i = 4: the prefix, the target, the tail forward and back."""
    flags = pair("sd3.5-medium", reward, resolution)
    rows = dry_run("03_finetune.py", *flags, "--batch", 8)
    assert rows["stitchvm, i = 4"]["tflop"] / 8 == pytest.approx(tflop, rel=0.02)
    assert rows["stitchvm, i = 12"]["tflop"] > 1.2 * rows["stitchvm, i = 4"]["tflop"]


def test_03_counts_the_vae_stitch(dry_run):
    """No diffusion block runs: less work than after four of them."""
    flags = pair("sd3.5-medium", "clip", 512)
    rows = dry_run("03_finetune.py", *flags, "--batch", 8, "--front", "vae")
    assert list(rows) == ["vae-stitch"] and rows["vae-stitch"]["tflop"] / 8 < 2.00 - 0.4


def test_03_holds_a_prefix_and_five_towers(dry_run):
    """FLUX's first four blocks in bfloat16, each 36 matrices of 3072 x 3072; in float32 CLIP's
    tower of 304.3 M parameters, the value's copy of it, its gradient and two moments."""
    case = dry_run("03_finetune.py", *pair("flux", "clip", 512), "--batch", 4)["stitchvm, i = 4"]
    held = (2 * 4 * 36 * 3072**2 + 5 * 4 * 304.3e6) / cases.GIB
    assert held < case["loaded_gib"] < 1.05 * held


def test_05_counts_the_published_step(dry_run):
    """SD 3.5 Medium at 1024 with HPSv2, TFLOP a step; i = 4 shared costs 1.2 of plain sampling."""
    rows = dry_run("05_dps.py", "--preset", "paper", "--reward", "hpsv2")
    expected = {"flow": 22.5, "tweedie": 80.1}
    expected |= {"stitchvm, i = 4": 29.0, "stitchvm, i = 4, shared": 26.7}
    expected |= {"stitchvm, i = 12": 40.5, "stitchvm, i = 12, shared": 33.8}
    assert of(rows, "tflop", expected) == pytest.approx(expected, rel=0.02)
    assert all(rows[k]["n"] == 20000 and rows[k]["unit"] == "step" for k in expected)
    plain, value = rows["tweedie"], rows["stitchvm, i = 4"]
    assert rows["flow"]["saved_gib"] == 0
    assert value["saved_gib"] < 0.1 * plain["saved_gib"]
    ratio = rows["stitchvm, i = 4, shared"]["tflop"] / rows["flow"]["tflop"]
    assert ratio == pytest.approx(1.19, abs=0.01)
    # the decoder's last block has its input, 256 channels in float32, normalised and activated
    decode = rows["decode"]
    gib = 3 * 256 * 1024**2 * 4 / cases.GIB
    assert decode["peak_gib"] - decode["loaded_gib"] == pytest.approx(gib, rel=0.01)
    # when images are scored the generator is gone
    assert rows["scoring"]["loaded_gib"] < decode["loaded_gib"] - 4


def test_06_counts_a_prompt_of_flux(dry_run):
    """At 1024 with HPSv2, TFLOP: N = 8 with M = 6 after block 4 is a third less than N = 14."""
    sizes = "--n", 14, "--n-stitchvm", 8, "--m", 6
    rows = dry_run("06_fks.py", *pair("flux", "hpsv2", 1024), *sizes)
    value = "fks+stitchvm M=6 N=8, i = "
    expected = {"fks N=14": 30067, f"{value}4": 20138, f"{value}12": 25650}
    tflop = of(rows, "tflop", expected)
    assert tflop == pytest.approx(expected, rel=0.02)
    assert 1 - tflop[f"{value}4"] / tflop["fks N=14"] == pytest.approx(0.33, abs=0.005)
    assert all(rows[name]["unit"] == "prompt" for name in expected)


def test_rows_of_a_prompt():
    """By hand, of 40 steps and four particles: fks weighs after the steps 8, 12 .. 32; 16 steps
    make two proposals, and then the next call resumes what the value began; at .36, between .375
    and .35, two of four are dropped."""
    stage, args = price.parse(["06_fks.py", "--methods", "flow", "bon", "prune", "fks+stitchvm"])
    stage.complete(args, published("sd3.5-medium"))
    found = {r["method"]: cases.rows_per_prompt(stage, r, args, True) for r in stage.plan(args)}
    pruned = found.pop("prune")
    assert pruned["denoise"] + pruned["resume"] == 4 * 26 + 2 * 14
    assert (pruned["value"], pruned["score"]) == (4, 2)
    assert found == {
        "flow": dict(denoise=40, resume=0, value=0, score=1),
        "bon": dict(denoise=160, resume=0, value=0, score=4),
        "fks+stitchvm": dict(denoise=96, resume=64, value=128, score=4 * 7 + 4),
    }


@pytest.fixture
def shallow(monkeypatch):
    """SD 3.5 Medium with four blocks."""
    name, config, *rest = sizes.CONFIGS["sd3.5-medium"]
    few = config | dict(num_layers=4, dual_attention_layers=(0, 1))
    monkeypatch.setitem(sizes.CONFIGS, "sd3.5-medium", (name, few, *rest))
    monkeypatch.setattr(cases, "CUTS", [4])


def test_checkpointing_is_priced_as_it_is_asked_for(dry_run, shallow):
    """Of generator and decoder: the reward's own activations stay, here those of one tower."""
    flags = "--preset", "paper", "--reward", "hpsv2", "--methods", "draft-1"
    given = [["--no-checkpointing"], ["--checkpointing"]]
    plain, less = (dry_run("07_draft.py", *flags, switch=g)["draft-1"] for g in given)
    assert less["saved_gib"] < 0.3 * plain["saved_gib"]
    assert less["peak_gib"] < 0.6 * plain["peak_gib"]
    assert less["tflop"] > plain["tflop"]


def test_07_of_a_shallow_model(dry_run, shallow):
    """The value costs less than decoder and reward, and every step that is kept as much again."""
    rows = dry_run("07_draft.py", "--reward", "hpsv2")
    methods = ["draft-1", "draft-3", "alignprop", "draft-1+stitchvm, i = 4"]
    methods.append("draft-3+stitchvm, i = 4")
    samples = [name for name, c in rows.items() if c["unit"] == "sample"]
    assert samples == methods and all(rows[name]["n"] == 500 * 64 for name in methods)
    tflop, peak = (of(rows, key, methods) for key in ("tflop", "peak_gib"))
    step = (tflop["draft-3"] - tflop["draft-1"]) / 2
    assert tflop["alignprop"] - tflop["draft-1"] == pytest.approx(4 * step)  # 5 in the mean
    assert peak["alignprop"] - peak["draft-1"] == pytest.approx(
        4 * (peak["draft-3"] - peak["draft-1"]),
        rel=0.05,  # 9 at most
    )
    for name in ("draft-1", "draft-3"):
        stopped = f"{name}+stitchvm, i = 4"
        assert tflop[stopped] < tflop[name] and peak[stopped] < peak[name]
        assert rows[stopped]["saved_gib"] < rows[name]["saved_gib"]


def test_07_holds_six_loras(dry_run):
    """Of 191 modules at rank 32, in float32: trained, averaged and as it began, a gradient and two
    moments; beside them transformer, VAE, tower and a value with its own tower."""
    one = dry_run("07_draft.py", "--rank", 32, "--methods", "draft-1+stitchvm")
    two = dry_run("07_draft.py", "--rank", 64, "--methods", "draft-1+stitchvm")
    name = "draft-1+stitchvm, i = 4"
    # all of them map 1536 to 1536; the transformer's positions are a buffer of 384 x 384
    lora = 191 * 32 * 2 * 1536 * 4 / cases.GIB
    assert two[name]["loaded_gib"] - one[name]["loaded_gib"] == pytest.approx(6 * lora, rel=0.01)
    transformer = 2 * (2243.2e6 + 384**2 * 1536)
    models = (transformer + 4 * (83.8e6 + 2 * 304.3e6)) / cases.GIB
    assert one[name]["loaded_gib"] == pytest.approx(models + 6 * lora, rel=0.02)


@pytest.mark.slow
def test_07_counts_the_published_step(dry_run):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample."""
    flags = "--reward", "dfn-clip+hpsv2"
    methods = ["--methods", "draft-1", "draft-3", "draft-1+stitchvm", "draft-3+stitchvm"]
    value = "+stitchvm, i = 4"
    plain = dry_run("07_draft.py", *flags, switch=[*methods, "--no-checkpointing"])
    expected = {"draft-1": 38.2, "draft-3": 49.1}
    expected |= {f"draft-1{value}": 21.7, f"draft-3{value}": 32.7}
    assert of(plain, "tflop", expected) == pytest.approx(expected, rel=0.02)
    less = dry_run("07_draft.py", *flags, switch=methods)
    for name in expected:  # of a value its tail stays
        assert (
            less[name]["saved_gib"] < (0.65 if value in name else 0.45) * plain[name]["saved_gib"]
        )


def test_08_of_a_shallow_model(dry_run, shallow):
    """The value and the noise levels above tau save work, checkpointing saves memory."""
    rows = dry_run("08_nft.py", "--reward", "hpsv2")
    samples = {name: c for name, c in rows.items() if c["unit"] == "sample"}
    assert all(c["n"] == 200 * 96 for c in samples.values())
    tflop = {name: c["tflop"] for name, c in samples.items()}
    value = "nft+stitchvm, i = 4"
    assert tflop[value] < tflop[f"{value}, as many noise levels as nft"] < tflop["nft"]
    assert tflop["nft, rollout and reward only"] < 0.5 * tflop["nft"]
    assert samples["nft, rollout and reward only"]["saved_gib"] == 0 < samples["nft"]["saved_gib"]


@pytest.mark.slow
def test_08_counts_the_published_loop(dry_run):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample."""
    flags = "--preset", "paper", "--prompts", 8, "--images", 12, "--updates", 200
    flags += ("--reward", "dfn-clip+hpsv2")
    plain = dry_run("08_nft.py", *flags)
    less = dry_run("08_nft.py", *flags, switch=["--checkpointing"])
    value = "nft+stitchvm, i = 4"
    expected = {"nft": 315.6, value: 188.7, f"{value}, as many noise levels as nft": 287.5}
    expected |= {"nft, rollout and reward only": 65.8, f"{value}, rollout and value only": 37.7}
    assert of(plain, "tflop", expected) == pytest.approx(expected, rel=0.02)
    assert less["nft"]["saved_gib"] < 0.1 * plain["nft"]["saved_gib"]
    assert 1.15 < less["nft"]["tflop"] / plain["nft"]["tflop"] < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset, card", [("24gb", 24), ("paper", 80)])
def test_every_stage_fits_the_card_of_its_preset(dry_run, stage, preset, card):
    rows = dry_run(stage, "--preset", preset)
    assert max(c["peak_gib"] for c in rows.values()) < 0.95 * card * 1e9 / cases.GIB


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
    probe = report["cases"][2]
    assert (report["backbone"], report["resolution"]) == ("sd3.5-medium", 512)
    assert probe["tflop"] == pytest.approx(2.44 + 0.38, rel=0.05)  # a call, a tower
    assert probe["hours"] == pytest.approx(probe["tflop"] * 200 / 300 / 3600, rel=0.03)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--backbone", "sana"], "error: --dry-run knows the published sizes of sd3.5-medium"),
        (["--reward", "blip"], "error: there is no reward blip"),
        (["--no-such-flag"], "error: unrecognized arguments: --no-such-flag"),
    ],
)
def test_misuse(flags, said):
    with pytest.raises(SystemExit, match=said):
        price.main(["02_fit_stitch.py", "--dry-run", *flags])


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
