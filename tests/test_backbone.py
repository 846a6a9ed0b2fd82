"""Qwen-Image by its adapter: against the library block by block, at published size, in 01 to 06."""

import importlib
import json
import re
from copy import deepcopy
from itertools import pairwise

import draw
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    QwenImageAutoBlocks,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.modular_pipelines import ModularPipelineBlocks
from test_common import shaken
from torch.testing import assert_close
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import common

LENGTHS = torch.tensor([7, 2, 4])  # of three texts, in tokens
PROMPTS = ["a red circle", "", "two small blue stars on a white background"]


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """24 tokens a text in place of 512, and one thread: all of it runs in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.QwenImage, "pooled", 24)
        patch.chdir(common.ROOT)
        yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- transformer, cut
@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = dict(num_layers=4, num_attention_heads=2, attention_head_dim=16)
    config |= dict(joint_attention_dim=24, axes_dims_rope=(4, 6, 6))
    return shaken(QwenImageTransformer2DModel(**config))


def inputs():
    """z of 10 x 6, so that rows and columns cannot be confused; sigma; text; its mask."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(3, 16, 10, 6, generator=g)
    sigma = torch.rand(3, generator=g)
    mask = torch.arange(7) < LENGTHS[:, None]
    return z, sigma, torch.randn(3, 7, 24, generator=g) * mask[..., None], mask.float()


def library(transformer, z, sigma, text, mask):
    """The velocity by the library's own forward, called as its own pipeline calls it."""
    B, C, H, W = z.shape
    packed = QwenImagePipeline._pack_latents(z, B, C, H, W)
    y = transformer(packed, text, mask, sigma, [[(1, H // 2, W // 2)]] * B).sample
    return QwenImagePipeline._unpack_latents(y, 8 * H, 8 * W, 8)[:, :, 0]


def resume(transformer, state):
    return common.end(transformer, common.run_blocks(transformer, state))


@pytest.mark.parametrize("i", range(5))
def test_cut_and_resumed_is_the_library(qwen, i):
    """Bit for bit, with gradients, cut after every block: the same modules in the same order."""
    z, *rest = inputs()
    z.requires_grad_()
    seen = []
    hooks = [b.register_forward_hook(lambda *a: seen.append(a[2])) for b in qwen.transformer_blocks]
    u = library(qwen, z, *rest)
    for hook in hooks:
        hook.remove()
    state = common.run_blocks(qwen, common.begin(qwen, z, *rest), i)
    assert len(seen) == 4 and state["i"] == i and state["fixed"]["grid"] == (5, 3)
    if i:
        text, image = seen[i - 1]
        assert torch.equal(state["h"], image) and torch.equal(state["c"], text)
    resumed = resume(qwen, state)
    assert torch.equal(resumed, u)
    w = torch.randn_like(u)
    assert torch.equal(torch.autograd.grad(resumed, z, w)[0], torch.autograd.grad(u, z, w)[0])


def test_the_mask_follows_the_particles(qwen):
    """Resampled after a block and joined by another batch, each keeps its own text's length."""
    given = inputs()
    state = common.run_blocks(qwen, common.begin(qwen, *given), 2)
    index = torch.tensor([2, 0, 0])
    both = common.state_cat([common.state_index(state, index), state])
    wanted = library(qwen, *[torch.cat([v[index], v]) for v in given])
    assert_close(resume(qwen, both), wanted, atol=2e-5, rtol=0)


def test_padding_changes_nothing(qwen):
    z, sigma, text, mask = (v[1:2] for v in inputs())
    pairs = [(text, mask), (text[:, :2], mask[:, :2]), (text, mask * 0 + 1)]
    padded, alone, unmasked = (resume(qwen, common.begin(qwen, z, sigma, *v)) for v in pairs)
    assert_close(padded, alone, atol=2e-5, rtol=0)
    assert (padded - unmasked).abs().max() > 1e-3


def test_the_published_size():
    """The library's default config is the published one: 20.43 B parameters, 40.86 GB of files."""
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel().bfloat16().requires_grad_(False)
        z, sigma = torch.empty(1, 16, 128, 128, dtype=torch.bfloat16), torch.empty(1)
        text, mask = torch.empty(1, 512, 3584, dtype=torch.bfloat16), torch.empty(1, 512)
    assert sum(p.numel() for p in transformer.parameters()) == 20_430_401_088
    state = common.begin(transformer, z, sigma, text, mask)
    assert resume(transformer, state).shape == z.shape
    common.keep_blocks(transformer, 4)
    assert sum(p.numel() for p in transformer.parameters()) < 1.5e9
    assert common.run_blocks(transformer, state, 4)["h"].shape == (1, 4096, 3072)


# ---------------------------------------------------------------------------- a pipeline's folder
def tokenizer():
    """Qwen's class: the words of this world and of the pipeline's template, else letters."""
    found = Qwen2Tokenizer(vocab={c: k for k, c in enumerate(bytes_to_unicode().values())})
    template = QwenImagePipeline(*[None] * 5).prompt_template_encode
    words = re.findall(r"<\|\w+\|>| ?\w+", template)
    found.add_tokens(sorted({*words, *draw.WORDS, *(f" {w}" for w in draw.WORDS)}))
    return found


def text_encoder(vocabulary):
    text = dict(hidden_size=384, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2)
    text |= dict(intermediate_size=512, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    text |= dict(rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    vision = dict(depth=1, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=384)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of random weights, a twelfth as wide as the published one and a tenth as deep."""
    torch.manual_seed(0)
    shift = dict(base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192)
    shift |= dict(use_dynamic_shifting=True, shift_terminal=0.02)
    config = dict(num_layers=6, num_attention_heads=2, joint_attention_dim=384)
    words = tokenizer()
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=shaken(AutoencoderKLQwenImage(base_dim=8), 0.02),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=shaken(QwenImageTransformer2DModel(**config), 0.02),
    )
    place = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    pipe.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def backbone(folder):
    return common.Backbone(str(folder))


def test_texts_are_the_pipelines(backbone, pipe):
    """The template's 34 tokens are dropped; each text, in another batch, is padded to one T."""
    text, mask = backbone.prompts(PROMPTS, batch=2)
    assert text.shape == (3, 24, 384) and mask.shape == (3, 24)
    for k, prompt in enumerate(PROMPTS):
        wanted, _ = pipe.encode_prompt([prompt])
        length = int(mask[k].sum())
        assert length == wanted.shape[1] == (8, 5, 13)[k]
        assert_close(text[k, :length], wanted[0], atol=1e-5, rtol=1e-4)
        assert not text[k, length:].any()


def test_latents_are_the_pipelines(backbone, pipe):
    """As its image-to-image variant scales them."""
    x = torch.rand(2, 3, 64, 64, generator=common.generator(1))
    raw = pipe.vae.encode(x[:, :, None] * 2 - 1).latent_dist.mean[:, :, 0]
    c = pipe.vae.config
    mean, std = (torch.tensor(v).view(16, 1, 1) for v in (c.latents_mean, c.latents_std))
    z = backbone.encode(x)
    assert_close(z, (raw - mean) / std, atol=1e-5, rtol=0)
    assert z.shape[1:] == backbone.latent_shape(64) == (16, 8, 8)


# ---------------------------------------------------------------------------- stages 01 to 06
FLAGS = {
    "01_cache_features": ["--limit", "36", "--probe", "12", "--batch", "16"],
    "02_fit_stitch": [],
    "03_finetune": ["--steps", "4", "--batch", "8", "--warmup", "1", "--log-every", "2"],
    "04_eval_noisy": ["--limit", "8", "--draws", "1", "--methods", "stitchvm", "tweedie"]
    + ["--batch", "8", "--benchmarks", "tests/mini/data/coco.jsonl"],
    "05_dps": ["--limit", "2", "--steps", "3", "--strengths-tweedie", "1"]
    + ["--strengths-stitchvm", "1"],
    "06_fks": ["--limit", "1", "--steps", "5", "--n", "2", "--m", "2", "--spread-samples", "4"],
}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of one short run of 01 to 06."""
    out = tmp_path_factory.mktemp("run")
    for name, flags in FLAGS.items():
        stage = importlib.import_module(name)
        more = ["--backbone", str(folder), "--out", str(out), "--device", "cpu"]
        stage.main(stage.parse_args([*flags, *more]))
    return out


def test_it_runs_through_the_stages(run):
    methods = {
        "04_eval_noisy": {"clean", "constant", "stitchvm", "tweedie"},
        "05_dps": {"flow", "tweedie", "stitchvm", "stitchvm+tweedie"},
        "06_fks": {"flow", "bon", "fks", "fks+stitchvm"},
    }
    for stage, expected in methods.items():
        rows = json.loads((run / f"{stage}.json").read_text())["rows"]
        assert {r["method"] for r in rows} >= expected
    losses = [r["loss"] for r in json.loads((run / "03_finetune.json").read_text())["rows"]]
    assert all(0 < loss < 100 for loss in losses)


# ---------------------------------------------------------------------------- a stock pipeline
class Guide(ModularPipelineBlocks):
    """guide()'s callback as the last block of a modular pipeline's denoising loop."""

    model_name = "qwenimage"
    description = "guidance by grad V"

    def __call__(self, components, block_state, i, t):
        tensors = dict(latents=block_state.latents)
        block_state.latents = self.callback(components, i, t, tensors)["latents"]
        return components, block_state


def modular(pipe, callback, prompts, **given):
    """Images of the same parts in the modular pipeline."""
    blocks = deepcopy(QwenImageAutoBlocks().get_workflow("text2image"))  # they are shared
    guide = Guide()
    guide.callback = callback
    blocks.sub_blocks["denoise.denoise"].sub_blocks.insert("guide", guide, 3)
    made = blocks.init_pipeline()
    made.update_components(**pipe.components, guider=ClassifierFreeGuidance(guidance_scale=1.0))
    return made(prompt=prompts, **given).get("images")


def test_samples_guided_or_not_are_the_pipelines(backbone, pipe, run):
    """Noise levels, sign of the velocity, packing, texts, VAE and guide(): images to 1e-4."""
    prompts = PROMPTS[::2]
    reward = common.Reward("clip")
    value = common.build_value(common.read_value(run / "value.pt"), backbone.transformer, reward)
    text = reward.text(prompts)
    condition = backbone.prompts(prompts)
    z0 = torch.randn(2, 16, 8, 8, generator=common.generator(0))
    packed = QwenImagePipeline._pack_latents(z0, 2, 16, 8, 8)
    given = dict(latents=packed, height=64, width=64, num_inference_steps=4, output_type="pt")
    given |= dict(max_sequence_length=24)
    grid = backbone.grid(4, 64)
    assert grid[-2] == pytest.approx(0.02)
    images = {}
    for c in (0.0, 20.0):
        z = z0
        for k, (t, t_next) in enumerate(pairwise(grid)):
            with torch.no_grad():
                u = backbone.velocity(z, torch.full((2,), t), condition)
            move = common.guiding_move(value, text, c, "unit", z, t, t_next) if k else 0
            z = z + (t_next - t) * u + move
        wanted = backbone.decode(z)
        callback = common.guide(value, prompts, c)
        images[c] = pipe(prompts, true_cfg_scale=1.0, callback_on_step_end=callback, **given).images
        assert_close(images[c], wanted, atol=1e-4, rtol=0)
    assert (images[20.0] - images[0.0]).abs().max() > 0.05
    found = modular(pipe, common.guide(value, prompts, 20.0), prompts, **given)
    assert_close(found, images[20.0], atol=1e-4, rtol=0)
