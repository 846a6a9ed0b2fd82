"""The miniature's committed weights are trained ones: each is measured on held-out scenes."""

import json
from functools import partial
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
import train

import common

MINI = Path(train.__file__).parent


@pytest.fixture(scope="module")
def scenes():
    """100 different scenes of the report split, and five captions each."""
    rng, found = np.random.default_rng(5), {}
    while len(found) < 100:
        scene = draw.sample_split(rng, "report")
        found.setdefault(draw.scene_key(scene), scene)
    images = np.stack([draw.draw(rng, scene) for scene in found.values()])
    captions = [[draw.caption(scene, f) for f in range(5)] for scene in found.values()]
    return torch.from_numpy(images).permute(0, 3, 1, 2), captions


CLIPS = [("clip", 0.85), ("dfn-clip", 0.85), ("hpsv2", 0.8), ("judge", 0.7)]


@pytest.mark.parametrize("name, least", CLIPS)
def test_clips_retrieve(scenes, name, least):
    """Among 100 scenes; chance is 0.01."""
    assert min(train.recall_at_1(train.load_clip(MINI / name), *scenes)) > least


@pytest.mark.parametrize("name", ["hpsv2", "judge"])
def test_preference_models_rank_better_than_chance(name):
    rng = np.random.default_rng(6)
    groups = [draw.ranked_group(rng, "report", 4) for _ in range(100)]
    assert train.ranking_accuracy(train.load_clip(MINI / name), groups) > 0.6


def samples(name, n, **more):
    """Images (n, 3, 64, 64), 14 steps from fixed noises, of n prompts of the report split."""
    rng, backbone = np.random.default_rng(7), common.Backbone(name)
    prompts = [draw.caption(draw.sample_split(rng, "report"), k % 5) for k in range(n)]
    condition, null = backbone.prompts(prompts), backbone.prompts([""])
    velocity = partial(backbone.velocity, condition=condition, null=null, **more)
    return train.sample(velocity, backbone.vae, backbone.grid(14, 64), n, 3), prompts


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_generators_follow_prompts(name):
    """By the exact checker, which a picture of another scene passes once in hundreds."""
    assert train.shares_right(*samples(name, 60, cfg=4.5)).mean() > 0.2


def test_flux_follows_prompts_and_its_guidance_helps():
    """By dfn-clip: it prefers an image's own prompt to another's, and guidance 3.5 to 1.

    The checker passes few of so weak a generator's images.
    """
    clip, score = train.load_clip(MINI / "dfn-clip"), {}
    for guidance in (1.0, 3.5):
        images, prompts = samples("flux", 120, guidance=guidance)
        e, t = train.embed_both(clip, images, train.tokenise(prompts))
        score[guidance] = (e * t).sum(-1)
        assert score[guidance].mean() > (e * t.roll(1, 0)).sum(-1).mean() + 0.1
    gain = score[3.5] - score[1.0]
    assert gain.mean() > gain.std() / len(gain) ** 0.5


def test_configurations():
    """What the models must be, because the published ones are: activations, patches, the MLP."""
    config = {}
    for name in ("clip", "dfn-clip", "hpsv2", "aesthetic", "judge"):
        about = json.loads((MINI / name / "open_clip_config.json").read_text())
        config[name] = about["model_cfg"]
    assert {name for name, c in config.items() if not c["quick_gelu"]} == {"hpsv2"}
    patch = {name: c["vision_cfg"]["patch_size"] for name, c in config.items()}
    assert patch["dfn-clip"] < patch["clip"]
    head = train.aesthetic_head(config["aesthetic"]["embed_dim"])
    widths = [m.out_features for m in head if isinstance(m, torch.nn.Linear)]
    assert widths == [1024, 128, 64, 16, 1]


def test_weights_are_small():
    """Half precision throughout, about 60 MB in all."""
    from safetensors.torch import load_file

    found = MINI.rglob("*.safetensors")
    files = [f for f in found if f.relative_to(MINI).parts[0] not in ("work", "data")]
    weights = [v for f in files for v in load_file(f).values()]
    assert all(v.dtype == torch.float16 or not v.is_floating_point() for v in weights)
    assert sum(f.stat().st_size for f in files) < 62e6


def test_the_quality_table_is_of_these_weights(tmp_path):
    """The committed table, measured again on the drawn benchmarks for one of its models."""
    committed = json.loads((MINI / "quality.json").read_text())
    for name, row in train.quality(tmp_path, ["aesthetic"]).items():
        assert row == pytest.approx(committed[name], rel=1e-3)
