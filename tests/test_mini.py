"""The committed weights of the miniature are trained ones: each model is measured on a few held-out scenes, drawn here."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import draw
import train

MINI = Path(train.__file__).parent


@pytest.fixture(scope="module")
def scenes():
    """100 different scenes of the report split, and five captions each."""
    rng, found = np.random.default_rng(5), {}
    while len(found) < 100:
        scene = draw.sample_split(rng, "report")
        found.setdefault(draw.scene_key(scene), scene)
    images = torch.from_numpy(np.stack([draw.draw(rng, s) for s in found.values()])).permute(0, 3, 1, 2)
    return images, [[draw.caption(s, f) for f in range(5)] for s in found.values()]


@pytest.mark.parametrize("name, least", [("clip", 0.85), ("dfn-clip", 0.85), ("hpsv2", 0.8), ("judge", 0.7)])
def test_clips_retrieve(scenes, name, least):
    """Among 100 scenes; chance is 0.01."""
    assert min(train.recall_at_1(train.load_clip(MINI / name), *scenes)) > least


@pytest.mark.parametrize("name", ["hpsv2", "judge"])
def test_preference_models_rank_better_than_chance(name):
    rng = np.random.default_rng(6)
    assert train.ranking_accuracy(train.load_clip(MINI / name), [draw.ranked_group(rng, "report", 4) for _ in range(100)]) > 0.6


def samples(name, n, **how):
    """Images (n, 3, 64, 64) of n prompts of the report split, 14 steps from fixed noises, and the prompts."""
    rng, backbone = np.random.default_rng(7), common.Backbone(name)
    prompts = [draw.caption(draw.sample_split(rng, "report"), k % 5) for k in range(n)]
    condition, null = common.encode_prompts(backbone, prompts), common.encode_prompts(backbone, [""])
    with torch.no_grad():
        images = train.sample(lambda z, s: backbone.velocity(z, s, condition, null=null, **how), backbone.vae, backbone.grid(14, torch.zeros(1, 16, 8, 8)), n, 3)
    return images, prompts


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_generators_follow_prompts(name):
    """By the exact checker, which a picture of another scene passes once in hundreds."""
    images, prompts = samples(name, 60, cfg=4.5)
    assert np.mean([draw.check(i, p) for i, p in zip(images.permute(0, 2, 3, 1).numpy(), prompts)]) > 0.2


def test_flux_follows_prompts_and_its_guidance_helps():
    """By dfn-clip: it prefers an image's own prompt to another's, and embedded guidance 3.5 to 1. The checker passes few of so weak a generator's images."""
    clip, score = train.load_clip(MINI / "dfn-clip"), {}
    for guidance in (1.0, 3.5):
        images, prompts = samples("flux", 120, guidance=guidance)
        with torch.no_grad():
            e, t = clip.encode_image(train.pixels(images), normalize=True), clip.encode_text(train.tokenise(prompts), normalize=True)
        score[guidance] = (e * t).sum(-1)
        assert score[guidance].mean() > (e * t.roll(1, 0)).sum(-1).mean() + 0.1
    gain = score[3.5] - score[1.0]
    assert gain.mean() > gain.std() / len(gain) ** 0.5


def test_configurations():
    """What the project's models must be, because the published ones are: activations, patches, the shape of the MLP."""
    config = {n: json.loads((MINI / n / "open_clip_config.json").read_text())["model_cfg"] for n in ("clip", "dfn-clip", "hpsv2", "aesthetic", "judge")}
    assert {n: c["quick_gelu"] for n, c in config.items()} == {"clip": True, "dfn-clip": True, "hpsv2": False, "aesthetic": True, "judge": True}
    assert config["dfn-clip"]["vision_cfg"]["patch_size"] < config["clip"]["vision_cfg"]["patch_size"]
    head = train.aesthetic_head(config["aesthetic"]["embed_dim"])
    assert [m.out_features for m in head if isinstance(m, torch.nn.Linear)] == [1024, 128, 64, 16, 1]


def test_weights_are_small():
    """Half precision throughout, about 60 MB in all."""
    from safetensors.torch import load_file
    files = [f for f in MINI.rglob("*.safetensors") if f.relative_to(MINI).parts[0] not in ("work", "data")]
    assert all(v.dtype == torch.float16 or not v.is_floating_point() for f in files for v in load_file(f).values())
    assert sum(f.stat().st_size for f in files) < 62e6
