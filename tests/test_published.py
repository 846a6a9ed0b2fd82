"""The published models without their weights: rewards against their authors' own code, what the hub refuses, data formats, dry runs, several processes.

Tests marked slow build models of published size and are left out by default: `python -m pytest -m slow`, about ten minutes and 8 GB.
"""
import errno
import functools
import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from PIL import Image
from torch.testing import assert_close

import common

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "tests/mini"
cache, fit, finetune, evaluate = (importlib.import_module(name) for name in ("01_cache_features", "02_fit_stitch", "03_finetune", "04_eval_noisy"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the network: the hub would try again for a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)


def refusal(call, *args, **kwargs):
    """The one sentence with which a call stops; a string makes the exit code 1."""
    with pytest.raises(SystemExit) as e:
        call(*args, **kwargs)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ") and "\n" not in e.value.code
    return e.value.code


# ---------------------------------------------------------------------------- rewards as their authors score
def photo(h, w, seed=0):
    """uint8 (3, h, w): four scales of random texture, about as rough as a photograph."""
    g, x = torch.Generator().manual_seed(seed), 0.5
    for n, amplitude in ((4, 0.8), (11, 0.3), (31, 0.1), (160, 0.12)):
        x = x + amplitude * F.interpolate(torch.rand(1, 3, n, n + 2, generator=g) - 0.5, (h, w), mode="bicubic")[0]
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{file: the image in RGB that its author means}: non-square, with a codec's loss, grey, and with holes through which white shows."""
    folder = tmp_path_factory.mktemp("files")
    pil(photo(311, 500)).save(folder / "wide.jpg", quality=90)
    pil(photo(420, 301, 1)).convert("L").save(folder / "grey.png")
    x, hole = photo(333, 290, 2), torch.arange(333 * 290).view(333, 290) % 700 < 300
    Image.fromarray(torch.cat([x, (255 * ~hole)[None].to(torch.uint8)]).permute(1, 2, 0).numpy(), "RGBA").save(folder / "holes.png")
    return {folder / "wide.jpg": Image.open(folder / "wide.jpg"), folder / "grey.png": Image.open(folder / "grey.png"), folder / "holes.png": pil(x.masked_fill(hole, 255))}


def hpsv2_transform(image):
    """As HPSv2's repository: a tensor first, the longest side to 224, zeros around, then the mean and deviation of CLIP."""
    x = TF.to_tensor(image.convert("RGB"))
    scale = 224 / float(max(x.shape[1:]))
    h, w = (round(n * scale) for n in x.shape[1:])
    x = TF.resize(x, [h, w], TF.InterpolationMode.BICUBIC, antialias=True)
    x = TF.pad(x, [(224 - w) // 2, (224 - h) // 2, 224 - w - (224 - w) // 2, 224 - h - (224 - h) // 2], fill=0)
    return TF.normalize(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def authors(name, state):
    """open_clip's own model and transform for the published name, with the weights `state` where it would download them."""
    source, pretrained = common.REWARDS[name]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: "a file")
        m.setattr(open_clip.factory, "load_checkpoint", lambda model, path, **kwargs: model.load_state_dict(state))
        model, _, transform = open_clip.create_model_and_transforms(source, pretrained=pretrained if isinstance(pretrained, str) else None)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), hpsv2_transform if name == "hpsv2" else transform


TOWERS = ("clip", "dfn-clip", "hpsv2", "aesthetic")
SHAPE = {"clip": (24, 1024, 24, 768, "QuickGELU"), "dfn-clip": (27, 1280, 32, 1024, "QuickGELU"), "hpsv2": (16, 1280, 32, 1024, "GELU"),
         "aesthetic": (16, 1024, 24, 768, "QuickGELU")}  # patches a side, width, blocks, embedding, activation
PROMPTS = ["a red circle", "two small blue stars, a Photo of Tübingen at night"]


def build(name, layers):
    """The reward, and its author's model and transform, of published width, with the same random weights; layers=None: of published depth."""
    with pytest.MonkeyPatch.context() as m:
        config = open_clip.factory._MODEL_CONFIGS[common.REWARDS[name][0]]
        for part in ("vision_cfg", "text_cfg") if layers else ():
            m.setitem(config[part], "layers", layers)
        torch.manual_seed(0)
        reward = common.Reward(name, "paper", weights=False)
        with torch.no_grad():  # biases and norms are zeros and ones at the start, which would hide a missing or a doubled one
            for p in reward.model.parameters():
                p += 0.1 * torch.randn_like(p) if p.ndim == 1 else 0
        return reward, *authors(name, reward.model.state_dict())


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    return build(request.param, 2)


def check_parity(reward, model, transform, files):
    """From files to scores: the tower's input, its embedding by the pieces that a value model is made of, the text's, the score."""
    with torch.no_grad():
        own = torch.stack([reward.transform(common.read_image(f)) for f in files])
        theirs = torch.stack([transform(image) for image in files.values()])
        assert_close(own, theirs, atol=2e-6, rtol=0)
        wanted = model.encode_image(theirs, normalize=True)
        e = F.normalize(common.tail(reward.visual, common.tokens_entering(reward.visual, common.patchify(reward.visual, own)), 1)[0], dim=-1)
        assert_close(e, wanted, atol=1e-5, rtol=0)
        if reward.uses_text:
            text = model.encode_text(open_clip.get_tokenizer(common.REWARDS[reward.name][0])(PROMPTS), normalize=True)
            found, expected = reward.score(e[:, None], reward.encode_text(PROMPTS)), wanted @ text.T
        else:
            x = wanted
            for k in (0, 2, 4, 6, 7):  # the published MLP: five linear layers and nothing between them in evaluation
                x = x @ reward.head[k].weight.T + reward.head[k].bias
            found, expected = reward.score(e), x[:, 0]
        assert_close(found, expected, atol=1e-5, rtol=0)
        assert expected.numel() == 1 or float(expected.std()) > 1e-4  # files and prompts are told apart


def test_a_file_gets_its_authors_score(tower, files):
    check_parity(*tower, files)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_file_gets_its_authors_score_at_full_depth(name, files):
    reward, model, transform = build(name, None)
    assert len(reward.visual.transformer.resblocks) == SHAPE[name][2]
    check_parity(reward, model, transform, dict([*files.items()][:1]))


@pytest.mark.parametrize("name", TOWERS)
def test_towers_have_their_published_shape(name):
    """Patches, width, depth, embedding and the activation of every block of both towers; nothing is built on the way to the meta device."""
    devices = set()
    with pytest.MonkeyPatch.context() as m:
        normal = torch.nn.init.normal_
        m.setattr(torch.nn.init, "normal_", lambda *args, **kwargs: devices.add([*args, *kwargs.values()][0].device.type) or normal(*args, **kwargs))
        reward = common.Reward(name, "paper", "meta", weights=False)
    visual, blocks = reward.visual, [*reward.visual.transformer.resblocks, *reward.model.transformer.resblocks]
    kinds = {type(b.mlp.gelu).__name__ for b in blocks}
    assert (visual.grid_size[0], visual.conv1.out_channels, len(visual.transformer.resblocks), visual.proj.shape[1], *kinds) == SHAPE[name]
    assert devices == {"meta"} and reward.uses_text is (name != "aesthetic")


@pytest.mark.parametrize("name, found", [("clip", ("ViT-L-14-336", "openai")), ("aesthetic", ("ViT-L-14", "openai")), ("dfn-clip", ("ViT-H-14-378", "dfn5b"))])
def test_the_wrong_activation_is_refused(monkeypatch, name, found):
    """open_clip warns and scores on; here it is an error that says what to use."""
    monkeypatch.setitem(common.REWARDS, name, found)
    message = refusal(common.Reward, name, "paper", "meta", weights=False)
    assert "QuickGELU" in message and message.endswith(f"use {found[0]}-quickgelu")


def test_the_differentiable_path(tower):
    """Reward.resize against the transform of files, in units of the tower's input: two levels of 255 at most, and the rounding to them on average."""
    reward, _, transform = tower
    for k, (h, w) in enumerate([(311, 500), (420, 301), (512, 512), (1024, 1024)]):
        image = photo(h, w, k)
        off = (reward.normalise(reward.resize(image[None] / 255))[0] - transform(pil(image))).abs()
        assert float(off.max()) <= 0.03 and round(float(off.mean()), 3) <= 0.004, (h, w)


def test_the_gradient_reaches_the_pixels(tower):
    """All that the tower sees: everything if it is squashed or padded, the centre if it is cropped."""
    reward, _, _ = tower
    x = (0.2 + 0.6 * photo(400, 480, 4) / 255)[None].requires_grad_()  # away from 0 and 1, where the clamp stops gradients
    reward.embed(x)[0].square().sum().backward()
    seen = x.grad.abs().amax((0, 1, 2)) > 0
    assert x.grad.isfinite().all() and seen[45:435].all()
    assert bool(seen.all()) is (reward.preprocess_cfg.resize_mode != "shortest")


def test_hpsv2_rounds_as_its_authors(tmp_path):
    """Sides that scale to a half: HPSv2 multiplies, open_clip divides, and the results lie on different sides of it."""
    reward = common.Reward("hpsv2", "paper", "meta", weights=False)
    for h, w in ((320, 85), (45, 320), (576, 153), (210, 384), (333, 290), (224, 224)):
        image = pil(photo(h, w))
        assert_close(reward.transform(image), hpsv2_transform(image), atol=1e-6, rtol=0)


def test_the_aesthetic_head_is_one_affine_map():
    """In evaluation, of weights under their published names: score = w e + b, with a gradient that is the same everywhere."""
    sizes, names = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    weights = {f"layers.{k}.{part}": torch.randn(*shape) / sizes[n] ** 0.5 for n, k in enumerate(names) for part, shape in
               (("weight", (sizes[n + 1], sizes[n])), ("bias", (sizes[n + 1],)))}
    head, w, b = common.aesthetic_head(weights), torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for k in names:
        layer = weights[f"layers.{k}.weight"].double()
        w, b = layer @ w, layer @ (b if k else b) + weights[f"layers.{k}.bias"].double()
    e = F.normalize(torch.randn(6, 768), dim=-1).requires_grad_()
    assert_close(head(e)[:, 0].double(), e.double() @ w[0] + b[0], atol=1e-5, rtol=0)
    assert_close(torch.autograd.grad(head(e).sum(), e)[0], w.float().expand(6, -1), atol=1e-5, rtol=0)


SMALL = dict(embed_dim=768, vision_cfg=dict(image_size=28, layers=1, width=64, head_width=32, patch_size=14),
             text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))


def small(monkeypatch, name):
    """open_clip's architecture of this reward replaced by a small one of the same name; its random weights."""
    source = common.REWARDS[name][0]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, source, SMALL | ({"quick_gelu": True} if "quickgelu" in source else {}))
    return common.Reward(name, "paper", weights=False).model.state_dict()


@pytest.mark.parametrize("version, file", [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_hpsv2_loads_the_version_that_is_asked_for(monkeypatch, tmp_path, version, file):
    """--hpsv2-version chooses the checkpoint and the run folder; its state_dict is loaded whole or not at all."""
    args = finetune.parse_args(["--preset", "24gb", "--reward", "hpsv2", "--hpsv2-version", version])
    state = small(monkeypatch, args.reward)
    torch.save(dict(state_dict=state, epoch=1), tmp_path / file)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(tmp_path / name))
    loaded = common.Reward(args.reward, args.preset)
    assert asked == [("xswu/HPSv2", file)] and all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())
    assert ("2.1" in args.out) is (version == "v2.1")
    del state["visual.proj"]
    torch.save(dict(state_dict=state), tmp_path / file)
    assert "xswu/HPSv2 cannot be read" in refusal(common.Reward, args.reward, args.preset)


def test_the_published_head_belongs_to_the_aesthetic_reward(monkeypatch, tmp_path):
    """Loaded from its authors' address for the CPU, whatever device its storages were saved on."""
    state = small(monkeypatch, "aesthetic")
    torch.save(state, tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "clip.pt"))
    head, asked = common.aesthetic_head(), {}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **how: asked.update(how, url=url) or {f"layers.{k}": v for k, v in head.state_dict().items()})
    reward, e = common.Reward("aesthetic", "24gb"), torch.randn(3, 768)
    assert asked == dict(url=common.AESTHETIC_HEAD, map_location="cpu", weights_only=True)
    assert torch.equal(reward.score(e), head(e)[:, 0]) and torch.equal(reward.visual.proj, state["visual.proj"])


def test_a_reward_folder_without_weights_is_refused(tmp_path):
    """open_clip would warn and go on with random ones."""
    shutil.copytree(MINI / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "weights" in refusal(common.Reward, str(tmp_path / "clip"))


# ---------------------------------------------------------------------------- scorers
def test_scorers_that_cannot_be_had_are_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(common, "SCORERS", ("pickscore", "imagereward", "hpsv2"))
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    assert common.load_scorers("24gb", "cpu") == {}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["warning", f"no column {name}"] for name in common.SCORERS]
    assert all(len(line.split(": ", 2)[2]) > 20 for line in lines)


def test_pickscore_is_the_scaled_cosine(monkeypatch):
    """exp(logit scale) times the cosine of the projected poolings, of a small random CLIP by hand; batches do not mix."""
    import train
    from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    tokenizer = train.tokenizer()
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = CLIPModel(CLIPConfig(text_config=tower | ids | dict(vocab_size=len(tokenizer)), vision_config=tower | dict(image_size=32, patch_size=8), projection_dim=24)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: model)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.setattr(common, "SCORERS", ("pickscore",))
    images, prompts = torch.stack([photo(32, 32, k) for k in range(3)]) / 255, ["a red circle", "two small blue stars", "a large green square"]
    found = common.score_images(common.load_scorers("24gb", "cpu"), images, prompts, batch=2)["pickscore"]
    with torch.no_grad():
        pixels = TF.normalize(images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        v = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
        t = torch.cat([model.text_model(input_ids=tokenizer(p, return_tensors="pt").input_ids).pooler_output @ model.text_projection.weight.T for p in prompts])
        assert_close(found, model.logit_scale.exp() * F.cosine_similarity(v, t), atol=1e-4, rtol=0)
    assert float(found.std()) > 1e-3


def test_imagereward_gets_images_and_prompts_in_pairs(monkeypatch):
    """By its package's interface: one prompt and a list of one PIL image at a time."""
    model = SimpleNamespace(score=lambda prompt, images: len(prompt) + np.asarray(images[0])[0, 0, 0] / 1000)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name, device: model))
    monkeypatch.setattr(common, "SCORERS", ("imagereward",))
    images = torch.tensor([10, 200, 30]).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 255
    assert_close(common.score_images(common.load_scorers("24gb", "cpu"), images, ["a", "bb", "c"])["imagereward"], torch.tensor([1.01, 2.2, 1.03]))


# ---------------------------------------------------------------------------- what the hub refuses
ANSWER = SimpleNamespace(headers={}, request=None)
REFUSED = {"gated": (GatedRepoError("403 Client Error", response=ANSWER), ["https://huggingface.co/black-forest-labs/FLUX.1-dev", "hf auth login"]),
           "missing": (RepositoryNotFoundError("401 Client Error", response=ANSWER), ["neither a folder nor a hub repository"]),
           "no network": (LocalEntryNotFoundError("cannot find the requested files in the local cache"), ["hf download black-forest-labs/FLUX.1-dev"]),
           "offline": (OfflineModeIsEnabled("HF_HUB_OFFLINE=1 is set"), ["hf download black-forest-labs/FLUX.1-dev"]),
           "disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ["no room on the disk", "HF_HOME"]),
           "disk, of the hub's own downloader": (RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"), ["no room on the disk", "HF_HOME"]),
           "other": (ValueError("something\nelse"), ["cannot be read: something"])}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_hubs_reason_in_one_sentence(monkeypatch, kind):
    """With the page or the command that helps, also when a library wraps it in an error of its own."""
    reason, said = REFUSED[kind]

    def download(*args, **kwargs):
        raise reason
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = refusal(common.Backbone, "flux", "24gb")
    assert "black-forest-labs/FLUX.1-dev" in message and all(s in message for s in said)
    if kind == "other":
        return
    try:
        try:
            raise reason
        except Exception:
            raise EnvironmentError("Can't load the model")
    except Exception as e:
        assert f"error: {common.explain('black-forest-labs/FLUX.1-dev', e)}" == message


@pytest.mark.parametrize("name, place", [("clip", "hf download timm/vit_large_patch14_clip_336.openai"), ("dfn-clip", "hf download apple/DFN5B-CLIP-ViT-H-14-378"),
                                         ("hpsv2", "hf download xswu/HPSv2"), ("aesthetic", "hf download timm/vit_large_patch14_clip_224.openai")])
def test_a_rewards_weights_are_named_by_where_they_are(monkeypatch, caplog, name, place):
    """Not by the name of the flag, for which the command would fail; open_clip's own log does not say it a second time."""
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download_offline)
    assert place in refusal(common.Reward, name, "24gb") and not caplog.records


def download_offline(config, **kwargs):
    try:
        raise LocalEntryNotFoundError("no network")
    except Exception as e:
        raise FileNotFoundError(f"Failed to download file. Last error: {e}")


def test_the_aesthetic_heads_address_is_named(monkeypatch, tmp_path):
    from urllib.error import URLError
    torch.save(small(monkeypatch, "aesthetic"), tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "clip.pt"))

    def refuse(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    message = refusal(common.Reward, "aesthetic", "24gb")
    assert re.search(r"wget -P \S+/checkpoints https://github.com/\S+/sac\+logos\+ava1-l14-linearMSE.pth\)", message)


def launch(*command, **variables):
    """A program run from the repository's root on one thread."""
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT), **variables)
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=env)


def test_01_without_a_network(tmp_path):
    """As a user meets it: one sentence, exit code 1, no traceback, no folder."""
    (tmp_path / "images").mkdir()
    for k in range(16):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
    done = launch("01_cache_features.py", "--preset", "24gb", "--images", tmp_path / "images", "--out", tmp_path / "out", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: stabilityai/stable-diffusion-3.5-medium is not on this machine") and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- prompts and their embeddings
def test_load_prompts(tmp_path):
    """One a line, a JSON list of strings or objects, or JSONL; other keys are kept."""
    geneval = [dict(tag="counting", include=[{"class": "cat", "count": 2}], prompt="two cats"),
               dict(tag="single_object", include=[{"class": "dog", "count": 1}], prompt="a dog")]
    for name, text, wanted in (("a.txt", "two cats\n\na dog\n", [dict(prompt="two cats"), dict(prompt="a dog")]),
                               ("a.json", '["two cats", {"prompt": "a dog", "id": 3}]', [dict(prompt="two cats"), dict(prompt="a dog", id=3)]),
                               ("a.jsonl", "\n".join(map(json.dumps, geneval)) + "\n", geneval), ("b.jsonl", '"two cats"\n', [dict(prompt="two cats")])):
        (tmp_path / name).write_text(text)
        assert common.load_prompts(tmp_path / name) == wanted
    assert "nowhere.txt does not exist" in refusal(common.load_prompts, tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name, text", [
    ("a.json", '["two cats"'), ("a.json", '{"prompts": ["two cats"]}'), ("a.json", '[{"text": "two cats"}]'), ("a.json", "[3]"), ("a.json", "[]"), ("a.json", "3"),
    ("a.json", '[{"prompt": null}]'), ("a.jsonl", "two cats"), ("a.jsonl", '{"tag": "counting"}'), ("a.txt", " \n"), ("a.txt", b"\xff\xfe\x00")])
def test_malformed_prompts_are_refused(tmp_path, name, text):
    """An object, say, whose keys would pass for prompts."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{tmp_path / name} is no list of prompts" in refusal(common.load_prompts, tmp_path / name)


def test_geneval_finds_its_images(tmp_path):
    """Read back as GenEval's evaluation walks its folder: numbered folders, one JSON object each, numbered samples."""
    rows = [dict(tag="colors", include=[{"class": "cup", "count": 1, "color": "red"}], prompt="a red cup"), dict(tag="two_object", include=[], prompt="a cat and a dog")]
    images = [torch.full((4, 3, 8, 6), 0.2 * k) for k in (1, 3)]
    common.write_geneval(tmp_path / "images", rows, images)
    found = {}
    for place in sorted((tmp_path / "images").iterdir()):
        assert place.is_dir() and place.name.isdigit()
        samples = [n for n in sorted(os.listdir(place / "samples")) if re.match(r"\d+\.png", n)]
        with open(place / "metadata.jsonl") as file:
            found[place.name] = json.load(file), samples
        for n in samples:
            pixels = np.asarray(Image.open(place / "samples" / n))
            assert pixels.shape == (8, 6, 3) and (pixels == round(255 * 0.2 * (1 if place.name == "00000" else 3))).all()
    assert found == {f"{k:05d}": (row, [f"{n:04d}.png" for n in range(4)]) for k, row in enumerate(rows)}


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """The miniature's pipeline without the weights of its transformer and its VAE."""
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    shutil.copytree(MINI / "sd3.5-medium", folder, ignore=lambda at, names: [n for n in names if Path(at).name in ("transformer", "vae") and n.endswith(".safetensors")])
    return folder


def test_prompts_need_the_encoders_only_and_free_them(monkeypatch, text_only):
    """The transformer's weights are not there to be read; what encode_prompts loads is gone when it returns."""
    import diffusers
    load, alive = diffusers.DiffusionPipeline.from_pretrained, []

    def spy(*args, **kwargs):
        pipe = load(*args, **kwargs)
        alive.extend(weakref.ref(m) for m in (pipe, pipe.text_encoder, pipe.text_encoder_2))
        return pipe
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", spy)
    text, pooled = common.encode_prompts(common.Backbone(str(text_only)), ["a red circle", ""])
    whole = common.encode_prompts(common.Backbone("sd3.5-medium"), ["a red circle", ""])
    gc.collect()
    assert torch.equal(text, whole[0]) and torch.equal(pooled, whole[1]) and (text[0] - text[1]).abs().max() > 0.1
    assert len(alive) == 6 and not any(ref() for ref in alive)


def test_cached_prompts_are_not_encoded_again(monkeypatch, text_only, tmp_path):
    """The second call reads the file; other prompts, another precision or another order do not."""
    import diffusers
    backbone = common.Backbone(str(text_only))
    first = common.encode_prompts(backbone, ["a red circle", ""], cache=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("the encoders were loaded"))
        again = common.encode_prompts(common.Backbone(str(text_only)), ["a red circle", ""], cache=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        for other in ((backbone, ["", "a red circle"]), (common.Backbone(str(text_only), dtype=torch.bfloat16), ["a red circle", ""])):
            with pytest.raises(pytest.fail.Exception):
                common.encode_prompts(*other, cache=tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".pt"]


# ---------------------------------------------------------------------------- benchmarks
def test_test_images_do_not_train(tmp_path, capsys):
    """AVA by image id, HPDv2 by file name, whatever the folder and the suffix: refused with the count, or left out when told to."""
    ranked = json.dumps([dict(prompt="a", image_path=["x_0.jpg", "deep/x_1.jpg"], rank=[1, 2])])
    for folder, file, text in (("ava", "test.jpgl", "953958\n12\n"), ("hpdv2", "test.json", ranked)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    names = ["images/953958.jpg", "images/1953958.jpg", "x_1.png", "x_2.jpg", "train/y.jpg"]
    ava, hpdv2 = tmp_path / "ava", tmp_path / "hpdv2"
    drop = cache.drop_test_images
    assert drop(names, None, None, False) == names and drop(names[3:], ava, hpdv2, False) == names[3:]
    message = refusal(drop, names, ava, hpdv2, False)
    assert all(s in message for s in ("2 of the 5 training images", str(ava / "test.jpgl"), str(hpdv2 / "test.json"), "images/953958.jpg", "--skip-test"))
    assert "1 of the 5" in refusal(drop, names, None, hpdv2, False)
    assert drop(names, ava, hpdv2, True) == ["images/1953958.jpg", "x_2.jpg", "train/y.jpg"] and "left out 2" in capsys.readouterr().out
    (ava / "test.jpgl").unlink()
    assert f"{ava / 'test.jpgl'} does not exist" in refusal(drop, names, ava, hpdv2, True)


def test_01_checks_before_anything_is_loaded(tmp_path):
    (tmp_path / "test.jpgl").write_text("\n".join(map(str, range(7))))
    for k in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.jpg")
    args = cache.parse_args(["--preset", "24gb", "--images", str(tmp_path), "--ava", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "7 of the 20 training images" in refusal(cache.main, args)


def test_both_conventions_of_imagereward():
    """Pooled over pairs, as its authors count, and averaged over prompts, as HPSv2's do: a human tie is no pair, a prompt of ties no prompt."""
    ranks = [[1, 2], [1, 2, 3, 4], [1, 1, 2], [2, 2]]
    scores = torch.tensor([1.0, 0, 2, 0, 1, 3, 5, 0, 1, 7, 8])  # right: 1 of 1 pairs, 2 of 6, 1 of 2, none of none
    bench = dict(kind="imagereward", sizes=[2, 4, 3, 2], ranks=[torch.tensor(r) for r in ranks], own=[0] * 11)
    found = evaluate.measure(bench, scores[:, None], torch.ones(1, 1))
    value = {k: evaluate.summary([v], k, 11)[0] for k, v in found.items()}
    assert value == pytest.approx(dict(imagereward_accuracy=4 / 9, imagereward_accuracy_by_prompt=(1 + 1 / 3 + 1 / 2) / 3))
    hpdv2 = evaluate.measure(bench | dict(kind="hpdv2"), scores[:, None], torch.ones(1, 1))["hpdv2_accuracy"]
    assert hpdv2.tolist() == pytest.approx([1, 1 / 3, 2 / 3, 1])  # there a human tie counts as right


# ---------------------------------------------------------------------------- dry runs
def dry_run(module, capsys, tmp_path, *flags):
    """The table and the closing JSON line; no file and no folder is made, no model touches the CPU."""
    before = set(ROOT.iterdir())
    module.main(module.parse_args(["--dry-run", "--out", str(tmp_path / "out"), *flags]))
    out = capsys.readouterr().out.splitlines()
    assert list(tmp_path.iterdir()) == [] and set(ROOT.iterdir()) == before
    about = json.loads(out[-1])
    assert list(about) == ["stage", "backbone", "reward", "resolution", "cases"] and about["stage"] == module.__name__
    assert ["--backbone", about["backbone"], "--reward", about["reward"], "--resolution", str(about["resolution"])] == list(flags[:6])
    assert "trained" in out[0] and "frozen parameters" in out[0] and len(out) == len(about["cases"]) + 4
    for case in about["cases"]:
        assert {"method", "unit", "tflop", "saved_gib", "peak_gib", "hours", "fits"} <= set(case)
        assert case["tflop"] > 0 and case["peak_gib"] > case["saved_gib"] >= 0
        assert case["hours"] == pytest.approx(case["tflop"] * case["n"] / case.get("tflops", 150) / 3600)
    return about["cases"]


def of(backbone, reward, resolution):
    return "--backbone", backbone, "--reward", reward, "--resolution", str(resolution)


@pytest.mark.parametrize("stage, pair, more", [
    (cache, of("flux", "hpsv2", 512), ()), (fit, of("sd3.5-large", "dfn-clip", 1024), ()), (finetune, of("flux", "aesthetic", 1024), ()),
    (evaluate, of("sd3.5-medium", "dfn-clip", 512), ("--rollout-steps", "2"))], ids=lambda v: getattr(v, "__name__", None))
def test_dry_run(capsys, tmp_path, stage, pair, more):
    began = time.process_time()
    dry_run(stage, capsys, tmp_path, *pair, *more)
    assert time.process_time() - began < 30


@pytest.mark.parametrize("resolution, reward, tflop", [(512, "clip", 2.00), pytest.param(1024, "hpsv2", 3.56, marks=pytest.mark.slow)])
def test_03_counts_a_training_image(capsys, tmp_path, resolution, reward, tflop):
    """From cached latents, i = 4: the prefix, the target's tower, and the tail forward and back; a later stitch costs more."""
    cases = {c["method"]: c for c in dry_run(finetune, capsys, tmp_path, *of("sd3.5-medium", reward, resolution), "--batch", "8")}
    assert cases["stitchvm, i = 4"]["tflop"] / 8 == pytest.approx(tflop, rel=0.02)
    assert cases["stitchvm, i = 12"]["tflop"] > 1.2 * cases["stitchvm, i = 4"]["tflop"]


@pytest.mark.slow
@pytest.mark.parametrize("reward", TOWERS)
@pytest.mark.parametrize("backbone", common.CONFIGS)
def test_dry_run_of_every_pair(capsys, tmp_path, backbone, reward):
    """Each stage at one resolution, the two of them in turn."""
    for k, stage in enumerate((cache, fit, finetune, evaluate)):
        resolution = (512, 1024)[(k + TOWERS.index(reward)) % 2]
        dry_run(stage, capsys, tmp_path, *of(backbone, reward, resolution), *(("--rollout-steps", "4") if stage is evaluate else ()))


@pytest.mark.slow
def test_the_dearest_dry_run_takes_a_minute_and_2_gb():
    done = launch(__file__, "04_eval_noisy", "--dry-run", *of("flux", "dfn-clip", 1024))
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    print(usage)
    assert usage["seconds"] < 60 and usage["peak_gb"] < 2, usage


published = functools.cache(common.meta_backbone)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("name, parameters, expected", [
    ("sd3.5-medium", 2243171520, {512: (2.44, 0.46), 1024: (11.25, 2.21)}), ("sd3.5-large", 8056627520, {1024: (31.12, 3.29)}), ("flux", 11901408320, {1024: (74.38, 5.23)})])
def test_backbones_parameters_and_counts(name, parameters, expected):
    """Exactly the published parameters; TFLOP of a denoiser call and of its first four blocks, as counted apart from this code; the VAE's too."""
    backbone, null = published(name)
    assert sum(p.numel() for p in backbone.transformer.parameters()) == parameters
    assert sum(p.numel() for p in backbone.vae.parameters()) == 83819683
    for resolution, (forward, prefix) in expected.items():
        z, sigma = meta(1, 16, resolution // 8, resolution // 8), meta(1, dtype=torch.float32)
        found, saved = common.count(lambda: backbone.velocity(z, sigma, null), [backbone.transformer])
        assert found == pytest.approx(forward, rel=0.02) and saved == 0
        found, _ = common.count(lambda: common.run_blocks(backbone.transformer, common.begin(backbone.transformer, z, sigma, *null), 4))
        assert found == pytest.approx(prefix, rel=0.02)


def test_a_counted_backward_pass():
    """SD 3.5 Medium at 512 to its input: 2.97 TFLOP more than forward, 1.88 GiB kept, weights left out."""
    backbone, null = published("sd3.5-medium")
    z, sigma = meta(1, 16, 64, 64).requires_grad_(), meta(1, dtype=torch.float32)
    tflop, saved = common.count(lambda: backbone.velocity(z, sigma, null).sum().backward(), [backbone.transformer])
    assert tflop == pytest.approx(2.44 + 2.97, rel=0.02) and saved == pytest.approx(1.88, rel=0.02)


@pytest.mark.parametrize("resolution, encode, decode", [(512, 1.12, 2.52), (1024, 4.88, 10.47)])
def test_vae_counts(resolution, encode, decode):
    backbone, _ = published("sd3.5-medium")
    x, z = meta(1, 3, resolution, resolution, dtype=torch.float32), meta(1, 16, resolution // 8, resolution // 8)
    for step, tflop in ((lambda: backbone.encode_image(x), encode), (lambda: backbone.decode(z), decode)):
        with torch.no_grad():
            assert common.count(step)[0] == pytest.approx(tflop, rel=0.02)


@pytest.mark.parametrize("name, tflop", [("clip", 0.382), ("dfn-clip", 1.007), ("hpsv2", 0.335)])
def test_tower_counts(name, tflop):
    reward = common.Reward(name, "paper", "meta", weights=False)
    x = meta(1, 3, 1024, 1024, dtype=torch.float32)
    with torch.no_grad():
        assert common.count(lambda: reward.embed(x))[0] == pytest.approx(tflop, rel=0.02)


def test_what_a_backward_pass_multiplies():
    """A linear layer costs as much again towards its input and as much towards its weights; flash attention 2.5 times its forward pass."""
    layer = torch.nn.Linear(64, 96, device="meta")
    x, frozen = meta(10, 64, dtype=torch.float32).requires_grad_(), torch.nn.Linear(64, 96, device="meta").requires_grad_(False)
    one = 2 * 10 * 64 * 96 / 1e12
    assert common.count(lambda: layer(x.detach()))[0] == pytest.approx(one)
    assert common.count(lambda: frozen(x).sum().backward())[0] == pytest.approx(2 * one)
    assert common.count(lambda: layer(x).sum().backward())[0] == pytest.approx(3 * one)
    q, k, v = (meta(2, 4, 128, 32).requires_grad_() for _ in range(3))
    forward, _ = common.count(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach()))
    both, kept = common.count(lambda: F.scaled_dot_product_attention(query=q, key=k, value=v).sum().backward())
    assert forward == pytest.approx(4 * 2 * 4 * 128 * 128 * 32 / 1e12) and both == pytest.approx(3.5 * forward)
    tensors = 4 * 2 * 4 * 128 * 32 * 2 / 2 ** 30  # q, k, v and the output; a row's logarithm of the sum is little, an N x N matrix would not be
    assert tensors <= kept < 1.2 * tensors


# ---------------------------------------------------------------------------- several processes, several parts of a batch
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small cache and stitch of the miniature, and a function that trains on them in this process."""
    out = tmp_path_factory.mktemp("run")
    cache.main(cache.parse_args(["--out", str(out), "--limit", "40", "--probe", "8", "--batch", "20"]))
    fit.main(fit.parse_args(["--out", str(out), "--i", "4", "--j", "1"]))

    def train(*flags):
        finetune.main(finetune.parse_args([*FEW, "--out", str(out), *map(str, flags)]))
    return out, train


FEW = ["--steps", "3", "--warmup", "1", "--log-every", "1"]


def rows(out, suffix=""):
    """What was logged, but for the time."""
    logged = json.loads((out / f"03_finetune{suffix}.json").read_text())["rows"]
    assert len(logged) == 3 and all(row["loss"] > 0 for row in logged) and "val_0.5" in logged[-1]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in logged]


def same(found, wanted):
    """The same losses and errors on held-out images, to rounding."""
    for a, b in zip(found, wanted):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_processes_are_one_with_twice_the_batch(run):
    """Over gloo; the first alone writes."""
    out, train = run
    train("--front", "vae", "--batch", 16, "--value", out / "whole.pt")
    wanted, before = rows(out, "_vae"), set(out.iterdir())
    done = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                  "03_finetune.py", *FEW, "--out", out, "--front", "vae", "--batch", 8, "--value", out / "two.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    same(rows(out, "_vae"), wanted)
    assert set(out.iterdir()) - before == {out / "two.pt"} and done.stdout.count("wrote") == 3 and "2 processes" in done.stdout


@pytest.mark.slow
def test_accelerate_launches_two_processes(run):
    """As on two cards: where there are none, its --multi_gpu starts two processes on the CPU (its --cpu starts one)."""
    pytest.importorskip("accelerate")
    out, train = run
    train("--batch", 16)
    wanted = rows(out)
    done = launch("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port", 0, "03_finetune.py", *FEW, "--out", out, "--batch", 8)
    assert done.returncode == 0, done.stderr[-3000:]
    same(rows(out), wanted)
    assert "2 processes" in done.stdout


def test_parts_of_a_batch_are_the_batch(run):
    """Gradients of parts of 6, 6 and 4 images add up to those of 16."""
    out, train = run
    train("--batch", 16)
    whole = rows(out)
    train("--batch", 16, "--micro-batch", 6)
    same(rows(out), whole)


def test_a_contrast_needs_the_whole_batch(run, monkeypatch):
    """NoisyCLIP's other images are its negatives: neither parts of a batch nor several processes give its loss; both are refused."""
    out, train = run
    flags = ("--objective", "noisyclip", "--batch", 4, "--value", out / "noisyclip.pt")
    assert "--micro-batch 0" in refusal(train, *flags, "--micro-batch", 2)
    monkeypatch.setattr(finetune, "processes", lambda: (1, 2))
    assert "run it as one" in refusal(train, *flags, "--micro-batch", 0)
    assert not (out / "noisyclip.pt").exists()


# ---------------------------------------------------------------------------- published size
def full_size(name):
    """V and its gradient at 512 px by blocks of published size with random weights: {peak_gb, value, gradient}."""
    import diffusers
    torch.manual_seed(0)
    cls, config, _, tokens = common.CONFIGS[name]
    # SD 3's last block is another kind: one more is built and dropped. FLUX's first two kinds of block
    config = config | (dict(num_layers=1, num_single_layers=1) if name == "flux" else dict(num_layers=5, pos_embed_max_size=64))
    transformer, i = getattr(diffusers, cls)(**config).eval().requires_grad_(False), 2 if name == "flux" else 4
    common.keep_blocks(transformer, i)
    kinds = [type(b).__name__ for b in common.dit_blocks(transformer)]
    reward = common.Reward("clip", "paper", weights=False)
    null = torch.randn(1, tokens, config["joint_attention_dim"]), torch.randn(1, config["pooled_projection_dim"])
    stitch = common.Stitch(torch.randn(1024, transformer.inner_dim) / transformer.inner_dim ** 0.5, torch.zeros(1024), reward.visual.grid_size)
    value = common.StitchedValue(transformer, null, reward, stitch, i, 1).requires_grad_(False)
    z = torch.randn(1, 16, 64, 64).requires_grad_()
    v = value(z, torch.tensor([0.5]), F.normalize(torch.randn(1, 768), dim=-1))
    v.sum().backward()
    return dict(blocks=kinds, value=float(v), finite=bool(z.grad.isfinite().all()), reached=float((z.grad != 0).float().mean()), norm=float(z.grad.norm()))


@pytest.mark.slow
@pytest.mark.parametrize("name, blocks", [("sd3.5-medium", ["JointTransformerBlock"] * 4), ("flux", ["FluxTransformerBlock", "FluxSingleTransformerBlock"])])
def test_published_size_on_the_cpu(name, blocks):
    """SD 3.5 Medium's first four blocks, or FLUX's first of each kind, and all of ViT-L/14@336: under 8 GB, and the gradient reaches every latent pixel."""
    done = launch(__file__, name)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["blocks"] == blocks and np.isfinite(found["value"]) and found["value"] != 0
    assert found["finite"] and found["reached"] > 0.999 and found["norm"] > 1e-6
    assert found["peak_gb"] < 8


if __name__ == "__main__":  # what the slow tests measure in a process of its own
    began, found = time.process_time(), {}
    if sys.argv[1] in common.CONFIGS:
        found = full_size(sys.argv[1])
    else:
        stage = importlib.import_module(sys.argv[1])
        stage.main(stage.parse_args(sys.argv[2:]))
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]  # trap: ru_maxrss begins at what the parent had
    print(json.dumps(found | dict(seconds=time.process_time() - began, peak_gb=int(peak) * 1024 / 1e9)))
