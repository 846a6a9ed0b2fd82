"""Import paths, values that were never trained, and one thread where bits are compared."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(p) for p in (HERE.parent, HERE / "mini", HERE / "published", HERE / "studies")]

import common  # noqa: E402


@pytest.fixture(autouse=True)
def unclaimed(monkeypatch):
    """Tests parse for the folders of runs that may be going on; test_habits has the lock itself."""
    monkeypatch.setattr(common, "claim", lambda out, stage: None)


@pytest.fixture
def other_weights(monkeypatch):
    """From its call on, transformers that are loaded differ in a weight of their second block."""
    load = common.Backbone.load

    def loads_other(backbone, part, dtype):
        model = load(backbone, part, dtype)
        if part == "transformer":
            model.transformer_blocks[1].attn.to_q.weight.data.neg_()
        return model

    return lambda: monkeypatch.setattr(common.Backbone, "load", loads_other)


@pytest.fixture
def one_thread():
    """As in the processes of children.py: other numbers of threads change the last bits of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def values(tmp_path_factory):
    """{reward: value.pt} as 03 writes it, its stitch random: it runs as a trained one does."""
    folder = tmp_path_factory.mktemp("values")
    backbone = common.Backbone("sd3.5-medium")
    null = backbone.prompts([""])
    files = {}
    for name, i in (("clip", 3), ("hpsv2", 2)):
        torch.manual_seed(0)
        reward = common.Reward(name)
        width, grid = reward.visual.conv1.out_channels, reward.visual.grid_size
        stitch = common.Stitch(torch.randn(width, 128) / 40, torch.zeros(width), grid)
        value = common.StitchedValue(backbone.transformer, null, reward, stitch, i, 1)
        spec = dict(backbone="sd3.5-medium", reward=name, latent_space=backbone.latent_space())
        spec |= dict(resolution=64, front="dit", i=i, j=1, embedding="mean")
        spec |= dict(reward_grid=list(grid), antialias=False)
        data = dict(state=value.trained_state(), null=list(null), norm=10.0)
        args = argparse.Namespace(seed=0, preset="mini")
        files[name] = folder / f"{name}.pt"
        common.save_artifact(files[name], "03_finetune", args, spec, data)
    return files
