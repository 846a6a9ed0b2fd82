"""Proof that what price.py predicts is what a card needs: python -m pytest -m gpu

Random weights of published size, nothing is downloaded. Every step of every stage runs at both
presets as price.py runs it on the meta device, and a table of each stage is printed. Where a step
takes over a tenth more than was predicted, as libraries do where there is room, it has to run in
that much. Without a CUDA device these tests are skipped, and the same code runs on the CPU on
models of a thousandth of the size.
"""

import contextlib
import gc
import os
from unittest import mock

import cases
import price
import pytest
import sizes
import torch

import common

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
STAGES = sorted(p.name for p in price.ROOT.glob("0[0-9]_*.py"))
STAGES.remove("02_fit_stitch.py")  # it runs on the CPU
COLUMNS = ("stage", "preset", "case", "predicted_gib", "measured_gib", "seconds", "tflop_s")
MARGIN = 1.1


class Card(contextlib.nullcontext):
    """A CUDA device: what a step takes there."""

    device = "cuda"

    def __init__(self):
        super().__init__()
        torch.set_float32_matmul_precision("high")  # as parse_stage does
        self.size = torch.cuda.get_device_properties(0).total_memory / cases.GIB

    def takes(self, step):
        """GiB of a step at most, with what is there."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / cases.GIB

    def runs_in(self, step, gib):
        """Whether a step runs in so many GiB."""
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / self.size))
        try:
            step()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return True


class Processor(price.Meter):
    """The CPU in place of a card, with a meter of its real storages."""

    size = 64.0

    def __init__(self):
        super().__init__("cpu")

    def takes(self, step):
        return self.cost(step).peak

    def runs_in(self, step, gib):
        return False


def prove(argv, card):
    """A row of COLUMNS for each step of a stage; what does not fit has no measurement."""
    stage, args = price.parse(argv)
    predicted = [list(case.times) for case in price.counted(stage, args)]
    stage, args = price.parse(argv)  # the first were filled in
    rows = {}
    with card, mock.patch.object(common, "Reward", sizes.random_reward):
        for case, steps in zip(cases.cases_of(stage, args, card.device), predicted, strict=True):
            for step, model in zip(case.times, steps, strict=True):
                if step.run and step not in rows:
                    about = dict(stage=stage.__name__[:2], preset=args.preset, case=step.name)
                    rows[step] = about | measured(card, step, model.cost)
                step.run = None  # what it holds can go
    return list(rows.values())


def measured(card, step, cost):
    """What one step of a case takes on the card, beside its predicted cost."""
    row = dict(predicted_gib=cost.peak, needs_more=False)
    if cost.peak * MARGIN > card.size:
        return row
    peak = card.takes(step)
    device = torch.device(card.device)
    began = common.now(device)
    step()
    seconds = common.now(device) - began
    more = peak > MARGIN * cost.peak
    row["needs_more"] = more and not card.runs_in(step, MARGIN * cost.peak)
    speed = cost.flop.total() / 1e12 / seconds
    return row | dict(measured_gib=peak, seconds=seconds, tflop_s=speed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", ["24gb", "paper"])
def test_a_card_needs_what_is_predicted(stage, preset, capsys):
    rows = prove([stage, "--preset", preset], Card())
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}")
        common.print_table(rows, COLUMNS)
    assert not [row for row in rows if row["needs_more"]]


# ---------------------------------------------------------------------------- without a card
@pytest.fixture
def small(monkeypatch):
    """Published models with their parts, three blocks of them and a hundredth of the width."""
    few = dict(num_layers=3, num_attention_heads=2, pos_embed_max_size=64)
    few |= dict(attention_head_dim=16, joint_attention_dim=32, pooled_projection_dim=48)
    text = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    clip = "CLIPTextModelWithProjection", text, 77
    t5 = dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2)
    encoders = clip, ("T5EncoderModel", sizes.T5 | t5, 64)
    medium = few | dict(caption_projection_dim=32, dual_attention_layers=(0, 1))
    flux = few | dict(num_single_layers=2, num_layers=1, axes_dims_rope=(4, 6, 6))
    flux.pop("pos_embed_max_size")
    for name, given in (("sd3.5-medium", medium), ("flux", flux)):
        kind, config, *_ = sizes.CONFIGS[name]
        monkeypatch.setitem(sizes.CONFIGS, name, (kind, config | given, encoders, 141))
    monkeypatch.setitem(sizes.VAE, "block_out_channels", (32, 32, 64, 64))
    monkeypatch.setattr(cases, "CUTS", [1, 2])
    from open_clip import factory

    tower = dict(embed_dim=48, vision_cfg=dict(image_size=64, layers=4, width=64, patch_size=16))
    tower["text_cfg"] = dict(width=2, heads=1, layers=2)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "small", tower)
    monkeypatch.setattr(common, "REWARDS", dict.fromkeys(common.REWARDS, ("small", "openai")))


SHORT = {"03_finetune.py": "--batch 4 --micro-batch 2", "06_fks.py": "--n 2 --methods fks+stitchvm"}
SHORT |= {"07_draft.py": "--methods draft-1 alignprop draft-1+stitchvm --steps 4 --stop 2 3"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_proof_runs_on_the_cpu(small, stage):
    """What is predicted is what is measured, but for what is of the CPU: text towers are there too,
    half a megabyte each, and attention with a mask has its N x N matrix."""
    backbone = "flux" if stage[:2] in ("03", "04", "07") else "sd3.5-medium"
    flags = f"--preset 24gb --dtype float32 --resolution 64 --backbone {backbone}"
    rows = prove([stage, *flags.split(), *SHORT.get(stage, "").split()], Processor())
    assert rows and all(set(COLUMNS) <= set(row) for row in rows)
    for row in rows:
        masked = row["case"] in ("text encoders", "scoring")
        close = pytest.approx(row["predicted_gib"], rel=0.4 if masked else 0.1, abs=5e-4)
        assert row["measured_gib"] == close, row


def test_a_step_that_needs_more_is_told(small, monkeypatch):
    """A prediction that is a third too low."""
    honest = price.counted

    def low(stage, args):
        for case in honest(stage, args):
            for step in case.times:
                step.cost.peak /= 1.5
            yield case

    monkeypatch.setattr(price, "counted", low)
    flags = "--preset 24gb --dtype float32 --resolution 64 --batch 4 --micro-batch 2"
    rows = prove(["03_finetune.py", *flags.split()], Processor())
    assert rows and all(row["needs_more"] for row in rows)
