"""A rehearsal of the published models: all stages at --preset 24gb's flags on pipelines with every
published part, a tenth as wide, random weights, in the hub's folders; towers as deep; bfloat16."""

import importlib
import json
import os
import shutil

import diffusers
import open_clip
import pytest
import sizes
import torch
import train
import transformers
from safetensors.torch import load_file

import common

STAGES = sorted(p.stem for p in common.ROOT.glob("0[0-9]_*.py"))
PROMPTS = ["a small red circle", "two blue stars", "a green square", "a large yellow circle"]
# a tenth of the width; of the blocks a quarter
SD3 = sizes.SD3 | dict(attention_head_dim=8, joint_attention_dim=416, pooled_projection_dim=208)
MEDIUM = SD3 | sizes.MEDIUM | dict(caption_projection_dim=192)
MEDIUM |= dict(num_layers=5, dual_attention_layers=(0, 1, 2))
LARGE = SD3 | sizes.LARGE | dict(caption_projection_dim=304, num_layers=4)
FLUX = sizes.FLUX | dict(attention_head_dim=12, axes_dims_rope=(2, 4, 6), num_attention_heads=12)
FLUX |= dict(num_layers=3, num_single_layers=2)
FLUX |= dict(joint_attention_dim=416, pooled_projection_dim=80)
VAE = sizes.VAE | dict(block_out_channels=(16, 32, 64, 64), norm_num_groups=8, sample_size=64)


def clip_text(kind, width, heads, layers):
    tok = train.tokenizer()
    ids = {k: getattr(tok, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)
    size |= dict(num_hidden_layers=layers, projection_dim=width, vocab_size=len(tok))
    return kind(transformers.CLIPTextConfig(**size, **ids, max_position_embeddings=77))


def t5():
    config = sizes.T5 | dict(
        num_layers=4, d_model=416, d_ff=1024, d_kv=8, vocab_size=len(train.t5_tokenizer())
    )
    return transformers.T5EncoderModel(transformers.T5Config(**config))


def tokenizers(length):
    """CLIP's, of 77 tokens, and T5's."""
    clip, long = train.tokenizer(), train.t5_tokenizer()
    clip.model_max_length = 77
    long.model_max_length = length
    return clip, long


def save_sd3(folder, config, vae):
    """SD 3.5: three text encoders, QK norm, 16 channels, shift 3; of Medium dual attention."""
    clip, long = tokenizers(256)
    kind = transformers.CLIPTextModelWithProjection
    parts = dict(text_encoder=clip_text(kind, 80, 10, 3), tokenizer=clip)
    parts |= dict(text_encoder_2=clip_text(kind, 128, 16, 4), tokenizer_2=clip)
    parts |= dict(text_encoder_3=t5(), tokenizer_3=long)
    parts |= dict(transformer=diffusers.SD3Transformer2DModel(**config | dict(sample_size=8)))
    parts |= dict(vae=vae)
    parts |= dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(folder)


def save_flux(folder):
    """FLUX.1-dev: CLIP pooled, T5 of 512 tokens, guidance as an input, dynamic shift."""
    clip, long = tokenizers(512)
    parts = dict(text_encoder=clip_text(transformers.CLIPTextModel, 80, 10, 3), tokenizer=clip)
    parts |= dict(text_encoder_2=t5(), tokenizer_2=long)
    parts |= dict(transformer=diffusers.FluxTransformer2DModel(**FLUX))
    parts |= dict(vae=diffusers.AutoencoderKL(**VAE))
    shift = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    parts |= dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift))
    diffusers.FluxPipeline(**parts).save_pretrained(folder)


def save_reward(folder, layers, aesthetic=False):
    """An open_clip tower of published depth, of the patch of 14 pixels."""
    config = train.clip_config(patch=14, layers=layers, width=96, quick_gelu=True, text_layers=12)
    config["vision_cfg"]["image_size"] = 56
    extra = {}
    if aesthetic:
        head = common.aesthetic_head(width=64).state_dict()
        extra = {"aesthetic_head.safetensors": {f"layers.{k}": v for k, v in head.items()}}
    train.save_clip(open_clip.CLIP(**config), config, folder, extra)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, images, prompts and a benchmark in one folder, the working directory."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**VAE)
    save_sd3(root / "medium", MEDIUM, vae)
    save_sd3(root / "large", LARGE, vae)
    save_flux(root / "dev")
    save_reward(root / "vit-l", 24)
    save_reward(root / "aesthetics", 24, aesthetic=True)
    images = sorted((common.ROOT / "tests/mini/data/train").glob("**/*.png"))[:20]
    (root / "images").mkdir()
    for image in images:
        shutil.copy(image, root / "images")
    (root / "train.txt").write_text("\n".join(PROMPTS))
    (root / "test.txt").write_text("\n".join(["a blue circle", "a red star"]))
    texts = [
        dict(image=f"images/{p.name}", texts=[t]) for p, t in zip(images, PROMPTS, strict=False)
    ]
    (root / "bench.jsonl").write_text("\n".join(map(json.dumps, texts)))
    votes = [
        dict(image=row["image"], votes=[k, 1, 2, 0, 0, 0, 0, 0, 0, 3])
        for k, row in enumerate(texts)
    ]
    (root / "votes.jsonl").write_text("\n".join(map(json.dumps, votes)))
    before = os.getcwd()
    os.chdir(root)
    yield root
    os.chdir(before)


# sizes that a CPU can do; all else is the preset's
SMALL = {
    "01": "--images images --batch 8 --probe 8 --workers 0",
    "02": "",
    "03": "--steps 2 --batch 4 --micro-batch 2 --workers 0",
    "04": "--batch 2 --mc-images 1 --rollouts 2 --rollout-steps 2 --draws 1",
    "05": "--prompts test.txt --steps 2 --strengths-tweedie 1 --strengths-stitchvm 50",
    "06": "--prompts test.txt --steps 3 --n 2 --spread-samples 2 --batch 4",
    "07": "--updates 1 --accumulate 2 --methods draft-1 draft-1+stitchvm --steps 4 "
    "--stop 2 3 --eval-steps 2 --train-prompts train.txt --eval-prompts test.txt",
    "08": "--updates 1 --prompts 2 --images 2 --steps 3 --stop 2 3 --train-times 1 --eval-steps 2 "
    "--train-prompts train.txt --eval-prompts test.txt",
}


def run(number, backbone, reward, *more):
    name = next(s for s in STAGES if s.startswith(number))
    stage = importlib.import_module(name)
    flags = ["--preset", "24gb", "--device", "cpu", "--dtype", "bfloat16", "--resolution", "64"]
    flags += ["--backbone", f"./{backbone}", "--reward", f"./{reward}", "--out", f"{backbone}-out"]
    flags += ["--scorers", f"./{reward}"] if number >= "05" else []  # those of the hub are far away
    stage.main(stage.parse_args([*flags, *SMALL[number].split(), *more]))
    table = common.Path(f"{backbone}-out", f"{name}.json")
    return json.loads(table.read_text())["rows"] if table.exists() else []


def rehearse(backbone, reward, bench, **methods):
    """{stage: rows} of all stages in order; methods: flags of the finetuning stages."""
    rows = {number: run(number, backbone, reward) for number in ("01", "02", "03")}
    run("03", backbone, reward, "--front", "vae")
    rows["04"] = run("04", backbone, reward, "--benchmarks", bench)
    rows |= {number: run(number, backbone, reward) for number in ("05", "06")}
    rows["07"] = run("07", backbone, reward, *methods.get("draft", ()))
    return rows | {"08": run("08", backbone, reward, *methods.get("nft", ()))}


def check(rows):
    assert {r["method"] for r in rows["04"]} >= {"stitchvm", "vae-stitch", "tweedie", "mc-2"}
    values = [r for r in rows["04"] if r["method"] in ("stitchvm", "vae-stitch", "tweedie")]
    assert all(r["value_mse"] >= 0 and r["value"] is not None for r in values)
    assert [r["method"] for r in rows["05"]] == ["flow", "tweedie", "stitchvm", "stitchvm+tweedie"]
    assert {r["method"] for r in rows["06"]} >= {"flow", "bon", "fks", "fks+stitchvm"}
    assert {r["update"] for r in rows["07"]} == {r["update"] for r in rows["08"]} == {0, 1}
    for number in ("02", "03", "05", "06", "07", "08"):
        finite(rows[number])


def finite(rows):
    """A table says null of what is not finite; no sample failed."""
    assert rows and not [k for r in rows for k, v in r.items() if v is None and k != "proposal"]
    assert not any(r.get("failed") or r.get("killed") for r in rows)


def test_sd3_and_clip(world):
    """Texts of 77 + 256 tokens; LoRAs of `attn` alone; the value guides, Large as well."""
    check(rehearse("medium", "vit-l", "bench.jsonl"))
    text, pooled = common.Backbone("./medium", "24gb").prompts(PROMPTS[:1])
    assert text.shape == (1, 333, 416) and pooled.shape == (1, 208)
    lora = load_file("medium-out/draft-1/pytorch_lora_weights.safetensors")
    assert len([k for k in lora if "lora_A" in k]) == 8 * 5 - 1  # the last block drops its text
    value = common.StitchedValue.load("medium-out/value.pt")
    z = torch.randn(1, 16, 8, 8, requires_grad=True)
    value(z, 0.5, PROMPTS[0]).sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() > 0
    flags = "--value", "medium-out/value.pt", "--methods", "fks+stitchvm", "--steps", "2"
    finite(run("06", "large", "vit-l", *flags))


def test_flux_and_aesthetic(world):
    """Texts of 512 tokens, guidance as an input, levels that shift with the size, votes."""
    methods = dict(draft=("--methods", "draft-1+stitchvm"), nft=("--methods", "nft+stitchvm"))
    check(rehearse("dev", "aesthetics", "votes.jsonl", **methods))
    backbone = common.Backbone("./dev", "24gb")
    text, pooled = backbone.prompts(PROMPTS[:1])
    assert text.shape == (1, 512, 416) and pooled.shape == (1, 80) and backbone.cfg == 1
    assert backbone.grid(4, 1024) != backbone.grid(4, 512)
