"""Puts the repository root and the miniature's folder on the import path; value models that were never trained."""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "mini")]

import pytest
import torch

import common


@pytest.fixture
def one_thread():
    """As in the processes of children.py: another number of threads changes the last bits of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def values(tmp_path_factory):
    """{reward: value.pt}, in the format of 03, its stitch random: what trains is bad, but it runs as a good one does."""
    folder, backbone = tmp_path_factory.mktemp("values"), common.Backbone("sd3.5-medium")
    null, files = common.encode_prompts(backbone, [""]), {}
    for name, i in (("clip", 3), ("hpsv2", 2)):
        torch.manual_seed(0)
        reward, files[name] = common.Reward(name), folder / f"{name}.pt"
        width = reward.visual.conv1.out_channels
        value = common.StitchedValue(backbone.transformer, null, reward, common.Stitch(torch.randn(width, 128) / 40, torch.zeros(width), reward.visual.grid_size), i, 1)
        spec = dict(backbone="sd3.5-medium", reward=name, latent_space=backbone.latent_space(), resolution=64, front="dit", i=i, j=1, embedding="mean",
                    reward_grid=list(reward.visual.grid_size), antialias=False)
        common.save_artifact(files[name], "03_finetune", argparse.Namespace(seed=0, preset="mini"), spec, dict(state=value.trained_state(), null=list(null), norm=10.0))
    return files
