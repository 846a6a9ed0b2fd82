"""A value model in other people's hands: one call, to the hub and back, guidance of a pipeline."""

import importlib
import shutil
from functools import partial
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from torch.testing import assert_close

import common

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a small red circle on a white background", "two blue stars"]


@pytest.fixture(scope="module")
def value(values):
    return common.StitchedValue.load(values["clip"])


def latents(batch=2, seed=0):
    return torch.randn(batch, 16, 8, 8, generator=common.generator("latents", seed))


def test_prompts_and_embeddings_one_or_many(value):
    """Strings are embedded by the reward's own text tower; one text serves the whole batch."""
    z, text = latents(), value.reward.text(PROMPTS)
    sigma = torch.tensor([0.3, 0.3])
    wanted = value.score(value.embed(z, sigma), text)
    for t, prompts in ((sigma, PROMPTS), (0.3, text), (torch.tensor(0.3), tuple(PROMPTS))):
        assert torch.equal(value(z, t, prompts), wanted)
    one = value(z, 0.3, PROMPTS[0])
    assert_close(one, value(z, 0.3, text[:1].expand(2, -1)))
    assert_close(one, value(z, 0.3, text[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_with_gradient(value, dtype):
    z = latents().to(dtype).requires_grad_()
    v = value(z, 0.5, PROMPTS)
    v.sum().backward()
    assert v.shape == (2,) and z.grad.dtype == dtype and z.grad.abs().max() > 0
    assert_close(v, value(latents(), 0.5, PROMPTS), atol=0.02, rtol=0)


def test_packed_latents_of_flux(value):
    """As FluxPipeline packs them, with their gradient in the same layout."""
    z = latents()
    packed = diffusers.FluxPipeline._pack_latents(z, 2, 16, 8, 8).requires_grad_()
    found = value(packed, 0.5, PROMPTS)
    assert_close(found, value(z, 0.5, PROMPTS))
    found.sum().backward()
    assert packed.grad.shape == packed.shape and packed.grad.abs().max() > 0


@pytest.mark.parametrize(
    "z, sigma, said",
    [
        (torch.zeros(1, 4, 8, 8), 0.5, "this value reads (B, 16, h, w)"),
        (torch.zeros(1, 7, 64), 0.5, "this value reads (B, 16, h, w)"),
        (torch.zeros(1, 16, 8, 8), 500, "a timestep is a thousand times it"),
        (torch.zeros(1, 16, 8, 8), -0.1, "sigma lies in [0, 1]"),
        (torch.zeros(1, 16, 7, 8), 0.5, "both sides must be even"),
        (torch.zeros(1, 16, 64, 64), 0.5, "pos_embed_max_size"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(value, z, sigma, said):
    with pytest.raises(ValueError) as found:
        value(z, sigma, PROMPTS[:1])
    assert said in str(found.value) and len(str(found.value).splitlines()) == 1


# ---------------------------------------------------------------------------- the hub
ROWS = [dict(benchmark="coco", metric="recall@1_i2t", sigma=0.1, value=0.612, value_se=0.02, n=500)]


def test_a_saved_folder_gives_equal_values(value, tmp_path):
    """Saved, moved elsewhere, loaded: to the last bit. The card has 04's rows."""
    value.save(tmp_path / "a", ROWS)
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = common.StitchedValue.load(tmp_path / "b")
    assert torch.equal(again(latents(), 0.4, PROMPTS), value(latents(), 0.4, PROMPTS))
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "README.md",
        "config.json",
        "value.safetensors",
    ]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| coco | recall@1_i2t | 0.100 | 0.612 | 0.020 | 500 |" in card
    frozen = sum(p.numel() for p in value.transformer.parameters())
    assert (tmp_path / "b" / "value.safetensors").stat().st_size < 4 * frozen + 8e6
    again.save(tmp_path / "c")  # what was loaded from a folder can be saved again
    third = common.StitchedValue.load(str(tmp_path / "c"))
    assert torch.equal(third(latents(), 0.4, PROMPTS), value(latents(), 0.4, PROMPTS))


def test_a_hub_id_is_downloaded(monkeypatch, value, tmp_path):
    value.save(tmp_path / "local")
    asked = []

    def download(source):
        asked.append(source)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = common.StitchedValue.load("someone/clip-value")
    assert asked == ["someone/clip-value"]
    assert torch.equal(again(latents(), 0.4, PROMPTS), value(latents(), 0.4, PROMPTS))


def test_a_transformer_that_is_there_is_not_loaded_again(monkeypatch, values):
    transformer = common.Backbone("sd3.5-medium").transformer
    monkeypatch.setattr(common.Backbone, "load", lambda *_: pytest.fail("loaded twice"))
    value = common.StitchedValue.load(values["clip"], transformer=transformer)
    assert value.transformer is transformer


def test_a_folder_without_a_value_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="cannot be read"):
        common.StitchedValue.load(tmp_path)


# ---------------------------------------------------------------------------- a stock pipeline
def guided_by_05(value, backbone, condition, null, z, form, cfg, c=20.0, steps=8):
    """Images' latents by 05's own sampler with the ODE; its first step unguided."""
    stage = importlib.import_module("05_dps")
    velocity = partial(backbone.velocity, condition=condition, null=null, cfg=cfg)
    texts = [value.reward.text(PROMPTS)]
    gradient = partial(stage.stitchvm_gradient, velocity, [value], texts)
    guides = [(None, 0.0)] + [(gradient, c)] * (steps - 1)
    grid = backbone.grid(steps, 64)
    noises = torch.zeros(steps, *z.shape)
    with torch.no_grad():
        return stage.sample(z, noises, grid, velocity, guides, form, stage.NU["ode"])


@pytest.mark.parametrize("form", ["unit", "constant"])
@pytest.mark.parametrize("name", ["sd3.5-medium", "flux"])
def test_a_stock_pipeline_is_guided_as_by_05(values, name, form):
    """The pipeline's own call, CFG or guidance, packed latents, noise levels: equal to 1e-4."""
    backbone = common.Backbone(name)
    null = backbone.prompts([""])
    condition = backbone.prompts(PROMPTS)
    artifact = common.read_value(values["clip"])
    reward = common.Reward("clip")
    if name == "flux":  # a random stitch of its width
        torch.manual_seed(0)
        width = reward.visual.conv1.out_channels
        weight = torch.randn(width, backbone.transformer.inner_dim) / 20
        linear = weight, torch.zeros(width)
        stitch = common.Stitch(*linear, reward.visual.grid_size)
        value = common.StitchedValue(backbone.transformer, null, reward, stitch, 2, 1, norm=10.0)
        value.requires_grad_(False)
    else:
        value = common.build_value(artifact, backbone.transformer, reward)
    absent = {} if name == "flux" else dict(text_encoder_3=None)
    parts = absent | dict(transformer=backbone.transformer, dtype=torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(backbone.source, **parts)
    pipe.set_progress_bar_config(disable=True)
    z = latents()
    cfg = backbone.cfg
    wanted = guided_by_05(value, backbone, condition, null, z, form, cfg)
    packed = diffusers.FluxPipeline._pack_latents(z, 2, 16, 8, 8) if name == "flux" else z
    given = dict(height=64, width=64, num_inference_steps=8, latents=packed, output_type="latent")
    given |= dict(guidance_scale=3.5 if name == "flux" else cfg)
    t5 = pipe.tokenizer_2 if name == "flux" else pipe.tokenizer_3
    given["max_sequence_length"] = t5.model_max_length  # of the published ones the default is less
    call = partial(pipe, PROMPTS, **given)
    guided = partial(call, callback_on_step_end=common.guide(value, PROMPTS, 20.0, form))
    found = guided().images
    assert torch.equal(guided().images, found)  # it serves any number of calls
    plain = call().images
    if name == "flux":
        found, plain = (common.unpack(x, 4, 4) for x in (found, plain))
    assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert (found - plain).abs().max() > 0.05


# ---------------------------------------------------------------------------- watching a run
def test_rows_and_images_reach_tensorboard(tmp_path):
    """Numbers by their key and step, images as they are; without a folder nothing is written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for step in (1, 2):
        row = dict(method="nft", reward=0.5 * step, update=step, clip=None)
        common.track(tmp_path, "nft", step, row, images)
    common.track(None, "nft", 3, row)
    read = EventAccumulator(str(tmp_path / "nft"))
    read.Reload()
    assert read.Tags()["scalars"] == ["reward"] and read.Tags()["images"] == ["samples"]
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(1, 0.5), (2, 1.0)]


def test_a_missing_tensorboard_is_one_sentence(monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    parser = common.stage_parser("03_x.py", "x", {"mini": {}})
    parser.add_argument("--track")
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        common.parse_stage(parser, {"mini": {}}, ["--track", "runs/tb"])
