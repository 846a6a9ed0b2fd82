"""Published rewards against their authors' code, what the hub refuses, prompts and embeddings.

Nothing is downloaded: weights are random. Tests marked slow build models of published size and are
left out by default: python -m pytest -m slow, ten minutes and 8 GB.
"""

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import diffusers
import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image
from torch.testing import assert_close

import common

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "tests/mini"
PROMPTS = ["a red circle", "two small blue stars, a Photo of Tübingen at night"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the network: the hub would try again for a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)


def refusal(call, *args, **kwargs):
    """The one sentence with which a call stops; a string makes the exit code 1."""
    with pytest.raises(SystemExit) as e:
        call(*args, **kwargs)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    return e.value.code


# ---------------------------------------------------------------------------- files and scores
def photo(h, w, seed=0):
    """uint8 (3, h, w): four scales of random texture, about as rough as a photograph."""
    g = torch.Generator().manual_seed(seed)
    x = 0.5
    for n, amplitude in ((4, 0.8), (11, 0.3), (31, 0.1), (160, 0.12)):
        texture = torch.rand(1, 3, n, n + 2, generator=g) - 0.5
        x = x + amplitude * F.interpolate(texture, (h, w), mode="bicubic")[0]
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def read(file):
    """An image file in RGB, its alpha laid on white."""
    image = Image.open(file).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{file: the image in RGB that its author means}: with a codec's loss, grey, with holes."""
    folder = tmp_path_factory.mktemp("files")
    pil(photo(311, 500)).save(folder / "wide.jpg", quality=90)
    pil(photo(420, 301, 1)).convert("L").save(folder / "grey.png")
    x = photo(333, 290, 2)
    hole = torch.arange(333 * 290).view(333, 290) % 700 < 300
    pixels = torch.cat([x, (255 * ~hole)[None].to(torch.uint8)]).permute(1, 2, 0).numpy()
    Image.fromarray(pixels, "RGBA").save(folder / "holes.png")
    meant = {folder / name: Image.open(folder / name) for name in ("wide.jpg", "grey.png")}
    return meant | {folder / "holes.png": pil(x.masked_fill(hole, 255))}


def hpsv2_transform(image):
    """As HPSv2's repository: a tensor first, the longest side to 224, zeros around, CLIP's mean."""
    x = TF.to_tensor(image.convert("RGB"))
    scale = 224 / float(max(x.shape[1:]))
    h, w = (round(n * scale) for n in x.shape[1:])
    x = TF.resize(x, [h, w], TF.InterpolationMode.BICUBIC, antialias=True)
    top, left = (224 - h) // 2, (224 - w) // 2
    x = TF.pad(x, [left, top, 224 - w - left, 224 - h - top], fill=0)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return TF.normalize(x, mean, std)


def authors(name, state):
    """open_clip's own model and transform for the published name, with the weights `state`."""
    source, pretrained = common.REWARDS[name]
    tag = pretrained if isinstance(pretrained, str) else None

    def load(model, path, **kwargs):
        model.load_state_dict(state)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: "a file")
        m.setattr(open_clip.factory, "load_checkpoint", load)
        model, _, transform = open_clip.create_model_and_transforms(source, pretrained=tag)
    model.load_state_dict(state)
    model = model.eval().requires_grad_(False)
    return model, hpsv2_transform if name == "hpsv2" else transform


# patches a side, width, blocks, embedding, activation
SHAPE = {
    "clip": (24, 1024, 24, 768, "QuickGELU"),
    "dfn-clip": (27, 1280, 32, 1024, "QuickGELU"),
    "hpsv2": (16, 1280, 32, 1024, "GELU"),
    "aesthetic": (16, 1024, 24, 768, "QuickGELU"),
}


def build(name, layers):
    """The reward, its author's model and transform, of published width, with random weights.

    layers None: of published depth.
    """
    with pytest.MonkeyPatch.context() as m:
        config = open_clip.factory._MODEL_CONFIGS[common.REWARDS[name][0]]
        for part in ("vision_cfg", "text_cfg") if layers else ():
            m.setitem(config[part], "layers", layers)
        torch.manual_seed(0)
        reward = common.Reward(name, "paper", weights=False)
        with torch.no_grad():  # zeros and ones would hide a missing or a doubled term
            for p in (*reward.visual.parameters(), *reward.text_model.parameters()):
                p += 0.1 * torch.randn_like(p) if p.ndim == 1 else 0
        return reward, *authors(name, weights_of(reward))


@pytest.fixture(scope="module", params=SHAPE)
def tower(request):
    return build(request.param, 2)


def check_parity(reward, model, transform, files):
    """From files to scores: the tower's input, its embedding by parts, the text's, the score."""
    with torch.no_grad():
        x = torch.stack([reward.transform(read(f)) for f in files])
        theirs = torch.stack([transform(image) for image in files.values()])
        assert_close(x, theirs, atol=2e-6, rtol=0)
        wanted = model.encode_image(theirs, normalize=True)
        tokens = common.tokens_entering(reward.visual, reward.visual.conv1(x))
        e = F.normalize(common.tail(reward.visual, tokens, 1)[0], dim=-1)
        assert_close(e, wanted, atol=1e-5, rtol=0)
        if reward.uses_text:
            tokenizer = open_clip.get_tokenizer(common.REWARDS[reward.name][0])
            text = model.encode_text(tokenizer(PROMPTS), normalize=True)
            found = reward.score(e[:, None], reward.text(PROMPTS))
            expected = wanted @ text.T
        else:
            h = wanted
            for k in (0, 2, 4, 6, 7):  # the published MLP: linear layers, nothing between them
                h = h @ reward.head[k].weight.T + reward.head[k].bias
            found, expected = reward.score(e), h[:, 0]
        assert_close(found, expected, atol=1e-5, rtol=0)
        # files and prompts are told apart
        assert expected.numel() == 1 or float(expected.std()) > 1e-4


def test_a_file_gets_its_authors_score(tower, files):
    check_parity(*tower, files)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPE)
def test_a_file_gets_its_authors_score_at_full_depth(name, files):
    reward, model, transform = build(name, None)
    assert len(reward.visual.transformer.resblocks) == SHAPE[name][2]
    check_parity(reward, model, transform, dict([*files.items()][:1]))


@pytest.mark.parametrize("name", SHAPE)
def test_towers_have_their_published_shape(name):
    """And the activation of every block of both; nothing is built on the way to the meta device."""
    devices = set()
    normal = torch.nn.init.normal_

    def spy(*args, **kwargs):
        devices.add([*args, *kwargs.values()][0].device.type)
        return normal(*args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.nn.init, "normal_", spy)
        reward = common.Reward(name, "paper", "meta", weights=False)
    visual, text = reward.visual, reward.text_model.transformer
    blocks = [*visual.transformer.resblocks, *text.resblocks]
    kinds = {type(b.mlp.gelu).__name__ for b in blocks}
    width, depth = visual.conv1.out_channels, len(visual.transformer.resblocks)
    assert (visual.grid_size[0], width, depth, visual.proj.shape[1], *kinds) == SHAPE[name]
    assert devices == {"meta"} and reward.uses_text is (name != "aesthetic")


@pytest.mark.parametrize(
    "name, found",
    [
        ("clip", ("ViT-L-14-336", "openai")),
        ("aesthetic", ("ViT-L-14", "openai")),
        ("dfn-clip", ("ViT-H-14-378", "dfn5b")),
    ],
)
def test_the_wrong_activation_is_refused(monkeypatch, name, found):
    """open_clip warns and scores on; here it is an error that says what to use."""
    monkeypatch.setitem(common.REWARDS, name, found)
    message = refusal(common.Reward, name, "paper", "meta", weights=False)
    assert "QuickGELU" in message and message.endswith(f"use {found[0]}-quickgelu")


def test_the_differentiable_path(tower):
    """Reward.resize against the transform of files, in units of the tower's input.

    At most two levels of 255, and on average the rounding to them.
    """
    reward, _, transform = tower
    for k, (h, w) in enumerate([(311, 500), (420, 301), (512, 512), (1024, 1024)]):
        image = photo(h, w, k)
        found = reward.normalise(reward.resize(image[None] / 255))[0]
        off = (found - transform(pil(image))).abs()
        assert float(off.max()) <= 0.03 and round(float(off.mean()), 3) <= 0.004, (h, w)


def test_the_gradient_reaches_the_pixels(tower):
    """All that the tower sees: everything if squashed or padded, the centre if cropped."""
    reward, _, _ = tower
    # away from 0 and 1, where the clamp stops gradients
    x = (0.2 + 0.6 * photo(400, 480, 4) / 255)[None].requires_grad_()
    reward.embed(x)[0].square().sum().backward()
    seen = x.grad.abs().amax((0, 1, 2)) > 0
    assert x.grad.isfinite().all() and seen[45:435].all()
    assert bool(seen.all()) is (reward.preprocess_cfg.resize_mode != "shortest")


def test_hpsv2_rounds_as_its_authors():
    """Sides that scale to a half: HPSv2 multiplies, open_clip divides, to different sides of it."""
    reward = common.Reward("hpsv2", "paper", "meta", weights=False)
    for h, w in ((320, 85), (45, 320), (576, 153), (210, 384), (333, 290), (224, 224)):
        image = pil(photo(h, w))
        assert_close(reward.transform(image), hpsv2_transform(image), atol=1e-6, rtol=0)


def test_the_aesthetic_head_is_one_affine_map():
    """In evaluation, of weights under their published names: w e + b, the gradient w everywhere."""
    sizes, names = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    weights = {}
    for n, k in enumerate(names):
        wide, narrow = sizes[n], sizes[n + 1]
        weights[f"layers.{k}.weight"] = torch.randn(narrow, wide) / wide**0.5
        weights[f"layers.{k}.bias"] = torch.randn(narrow) / wide**0.5
    head = common.aesthetic_head(weights)
    w, b = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for k in names:
        layer = weights[f"layers.{k}.weight"].double()
        w, b = layer @ w, layer @ b + weights[f"layers.{k}.bias"].double()
    e = F.normalize(torch.randn(6, 768), dim=-1).requires_grad_()
    assert_close(head(e)[:, 0].double(), e.double() @ w[0] + b[0], atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(head(e).sum(), e)[0]
    assert_close(gradient, w.float().expand(6, -1), atol=1e-5, rtol=0)


SMALL = dict(
    embed_dim=768,
    vision_cfg=dict(image_size=28, layers=1, width=64, head_width=32, patch_size=14),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
)


def weights_of(reward):
    """Those of both towers under open_clip's keys."""
    image = {f"visual.{k}": v for k, v in reward.visual.state_dict().items()}
    return image | reward.text_model.state_dict()


def small(monkeypatch, name):
    """open_clip's architecture of this reward replaced by a small one; its random weights."""
    source = common.REWARDS[name][0]
    quick = {"quick_gelu": True} if "quickgelu" in source else {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, source, SMALL | quick)
    return weights_of(common.Reward(name, "paper", weights=False))


@pytest.mark.parametrize(
    "name, file", [("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt")]
)
def test_hpsv2_loads_the_version_that_is_asked_for(monkeypatch, tmp_path, name, file):
    """Each version is a reward of its own; a state_dict is loaded whole or not at all."""
    state = small(monkeypatch, name)
    torch.save(dict(state_dict=state, epoch=1), tmp_path / file)
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = common.Reward(name, "24gb")
    assert asked == [("xswu/HPSv2", file)]
    assert all(torch.equal(v, state[k]) for k, v in weights_of(loaded).items())
    del state["visual.proj"]
    torch.save(dict(state_dict=state), tmp_path / file)
    assert "xswu/HPSv2 cannot be read" in refusal(common.Reward, name, "24gb")


def test_the_published_head_belongs_to_the_aesthetic_reward(monkeypatch, tmp_path):
    """From its authors' address, for the CPU, whatever device its storages were saved on."""
    state = small(monkeypatch, "aesthetic")
    torch.save(state, tmp_path / "clip.pt")
    clip = str(tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: clip)
    head = common.aesthetic_head()
    asked = {}

    def load(url, **options):
        asked.update(options, url=url)
        return {f"layers.{k}": v for k, v in head.state_dict().items()}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    reward, e = common.Reward("aesthetic", "24gb"), torch.randn(3, 768)
    assert asked == dict(url=common.AESTHETIC_HEAD, map_location="cpu", weights_only=True)
    assert torch.equal(reward.score(e), head(e)[:, 0])
    assert torch.equal(reward.visual.proj, state["visual.proj"])


def test_a_reward_folder_without_weights_is_refused(tmp_path):
    """open_clip would warn and go on with random ones."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(MINI / "clip", tmp_path / "clip", ignore=no_weights)
    assert "weights" in refusal(common.Reward, str(tmp_path / "clip"))


# ---------------------------------------------------------------------------- the hub's refusals
ANSWER = SimpleNamespace(headers={}, request=None)
FLUX = "black-forest-labs/FLUX.1-dev"
DISK = "Data processing error: IO Error: No space left on device (os error 28)"
ROOM = ["no room on the disk", "HF_HOME"]
REFUSED = {
    "gated": (
        GatedRepoError("403 Client Error", response=ANSWER),
        [f"https://huggingface.co/{FLUX}", "hf auth login"],
    ),
    "missing": (
        RepositoryNotFoundError("401 Client Error", response=ANSWER),
        ["neither a folder nor a hub repository"],
    ),
    "no network": (LocalEntryNotFoundError("not in the local cache"), [f"hf download {FLUX}"]),
    "offline": (OfflineModeIsEnabled("HF_HUB_OFFLINE=1 is set"), [f"hf download {FLUX}"]),
    "disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ROOM),
    "disk, of the hub's own downloader": (RuntimeError(DISK), ROOM),
    "other": (ValueError("something\nelse"), ["cannot be read: something"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_hubs_reason_in_one_sentence(monkeypatch, kind):
    """With the page or the command that helps, also when a library wraps it in its own error."""
    reason, said = REFUSED[kind]

    def download(*args, **kwargs):
        raise reason

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = refusal(common.Backbone, "flux", "24gb")
    assert FLUX in message and all(s in message for s in said)
    if kind == "other":
        return
    wrapped = OSError("Can't load the model")
    wrapped.__context__ = reason
    assert str(common.explain(FLUX, wrapped)) == message


def download_offline(config, **kwargs):
    try:
        raise LocalEntryNotFoundError("no network")
    except Exception as e:
        raise FileNotFoundError(f"Failed to download file. Last error: {e}") from None


@pytest.mark.parametrize(
    "name, place",
    [
        ("clip", "hf download timm/vit_large_patch14_clip_336.openai"),
        ("dfn-clip", "hf download apple/DFN5B-CLIP-ViT-H-14-378"),
        ("hpsv2", "hf download xswu/HPSv2"),
        ("aesthetic", "hf download timm/vit_large_patch14_clip_224.openai"),
    ],
)
def test_a_rewards_weights_are_named_by_where_they_are(monkeypatch, caplog, name, place):
    """Not by the name of the flag; open_clip's own log does not say it a second time."""
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download_offline)
    assert place in refusal(common.Reward, name, "24gb") and not caplog.records


def test_the_aesthetic_heads_address_is_named(monkeypatch, tmp_path):
    clip = str(tmp_path / "clip.pt")
    torch.save(small(monkeypatch, "aesthetic"), clip)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: clip)

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    message = refusal(common.Reward, "aesthetic", "24gb")
    command = r"wget -P \S+/checkpoints https://github.com/\S+/sac\+logos\+ava1-l14-linearMSE.pth\)"
    assert re.search(command, message)


def launch(*command, **variables):
    """A program run from the repository's root on one thread."""
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | variables)


def test_01_without_a_network(tmp_path):
    """As a user meets it: one sentence, exit code 1, no traceback, no folder."""
    (tmp_path / "images").mkdir()
    for k in range(16):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
    flags = ["--preset", "24gb", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    done = launch("01_cache_features.py", *flags, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    source = "stabilityai/stable-diffusion-3.5-medium"
    assert done.stderr.startswith(f"error: {source} is not on this machine")
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- prompts
GENEVAL = [
    dict(tag="counting", include=[{"class": "cat", "count": 2}], prompt="two cats"),
    dict(tag="single_object", include=[{"class": "dog", "count": 1}], prompt="a dog"),
]
TWO = [dict(prompt="two cats"), dict(prompt="a dog")]
COCO = dict(annotations=[dict(caption="two cats", image_id=3), dict(caption="a dog", image_id=3)])


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("a.txt", "two cats\n\na dog\n", TWO),
        ("a.json", '["two cats", {"prompt": "a dog", "id": 3}]', [TWO[0], TWO[1] | dict(id=3)]),
        (
            "coco.json",
            json.dumps(COCO),
            [a | dict(prompt=a["caption"]) for a in COCO["annotations"]],
        ),
        ("a.jsonl", "\n".join(map(json.dumps, GENEVAL)) + "\n", GENEVAL),
        ("b.jsonl", '"two cats"\n', TWO[:1]),
        ("a.JSON", '["two cats"]', TWO[:1]),
        ("a.ndjson", '{"prompt": "two cats"}\n', TWO[:1]),
        ("a.txt", "\ufefftwo cats \r\n a dog", TWO),
        ("a.txt", "two\u2028cats\u0085or\x0cdogs", [dict(prompt="two\u2028cats\u0085or\x0cdogs")]),
        ("d.txt", "a café", [dict(prompt="a café")]),
        (
            "p.tsv",
            "Prompt\tCategory\ntwo cats\tAnimals\n",
            [dict(Prompt="two cats", Category="Animals", prompt="two cats")],
        ),
        (
            "p.csv",
            'id,caption\n1,"cats, two"\n',
            [dict(id="1", caption="cats, two", prompt="cats, two")],
        ),
        (
            "c.jsonl",
            '{"text": "two cats", "id": 3}',
            [dict(text="two cats", id=3, prompt="two cats")],
        ),
    ],
)
def test_load_prompts(tmp_path, name, text, wanted):
    """Other keys are kept; a limit leaves out the last ones."""
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert common.load_prompts(str(tmp_path / name)) == wanted
    assert common.load_prompts(str(tmp_path / name), 1) == wanted[:1]


@pytest.mark.parametrize("path", [None, "nowhere.txt", str(ROOT)])
def test_missing_prompts_are_refused(path):
    assert f"there is no file of prompts {path}" in refusal(common.load_prompts, path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '["two cats"'),
        ("a.json", '{"prompts": ["two cats"]}'),
        ("a.json", '[{"words": "two cats"}]'),
        ("a.csv", "words\ntwo cats\n"),
        ("prompts", "two cats\n"),
        ("a.docx", "two cats\n"),
        ("a.json", "[3]"),
        ("a.json", "[]"),
        ("a.json", "3"),
        ("a.json", '[{"prompt": null}]'),
        ("a.jsonl", "two cats"),
        ("a.jsonl", '{"tag": "counting"}'),
        ("a.txt", " \n"),
        ("a.txt", b"\xff\xfe\x00"),
    ],
)
def test_malformed_prompts_are_refused(tmp_path, name, text):
    """An object, say, whose keys would pass for prompts."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{path} is no list of prompts" in refusal(common.load_prompts, str(path))


def test_geneval_finds_its_images(tmp_path):
    """Read back as GenEval's evaluation walks its folder: numbered folders and samples."""
    rows = [
        dict(tag="colors", include=[{"class": "cup", "color": "red"}], prompt="a red cup"),
        dict(tag="two_object", include=[], prompt="a cat and a dog"),
    ]
    images = [torch.full((4, 3, 8, 6), 51 * k, dtype=torch.uint8) for k in (1, 3)]
    common.write_images(tmp_path / "images", rows, images)
    found = {}
    for k, place in enumerate(sorted((tmp_path / "images").iterdir())):
        assert place.is_dir() and place.name.isdigit()
        samples = [n for n in sorted(os.listdir(place / "samples")) if re.match(r"\d+\.png", n)]
        found[place.name] = json.loads((place / "metadata.jsonl").read_text()), samples
        for n in samples:
            pixels = np.asarray(Image.open(place / "samples" / n))
            assert pixels.shape == (8, 6, 3) and (pixels == images[k][0, 0, 0, 0].item()).all()
    samples = [f"{n:04d}.png" for n in range(4)]
    assert found == {f"{k:05d}": (row, samples) for k, row in enumerate(rows)}


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """The miniature's pipeline without the weights of its transformer and its VAE."""

    def weights(place, names):
        absent = Path(place).name in ("transformer", "vae")
        return [n for n in names if absent and n.endswith(".safetensors")]

    folder = tmp_path_factory.mktemp("text") / "pipeline"
    shutil.copytree(MINI / "sd3.5-medium", folder, ignore=weights)
    return folder


def test_prompts_need_the_encoders_only_and_free_them(monkeypatch, text_only):
    """The transformer's weights are not there to be read; what prompts() loads is gone after it."""
    load, alive = diffusers.DiffusionPipeline.from_pretrained, []

    def spy(*args, **kwargs):
        pipe = load(*args, **kwargs)
        alive.extend(weakref.ref(m) for m in (pipe, pipe.text_encoder, pipe.text_encoder_2))
        return pipe

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", spy)
    text, pooled = common.Backbone(str(text_only)).prompts(["a red circle", ""])
    whole = common.Backbone("sd3.5-medium").prompts(["a red circle", ""])
    gc.collect()
    assert torch.equal(text, whole[0]) and torch.equal(pooled, whole[1])
    assert (text[0] - text[1]).abs().max() > 0.1
    assert len(alive) == 6 and not any(ref() for ref in alive)


def test_cached_prompts_are_not_encoded_again(monkeypatch, text_only, tmp_path):
    """The second call reads the file; other prompts, another precision or another order do not."""
    texts = ["a red circle", ""]
    backbone, half = (common.Backbone(str(text_only), dtype=d) for d in (torch.float32, torch.half))
    first = backbone.prompts(texts, cache=tmp_path)

    def refuse(*args, **kwargs):
        raise RuntimeError("the encoders were loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", refuse)
    again = common.Backbone(str(text_only)).prompts(texts, cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other, asked in ((backbone, texts[::-1]), (half, texts)):
        assert "the encoders were loaded" in refusal(other.prompts, asked, cache=tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".bin"]


# ---------------------------------------------------------------------------- published size
def full_size(name):
    """V and its gradient at 512 px by blocks of published size with random weights."""
    from price import CONFIGS

    torch.manual_seed(0)
    cls, config, _, tokens = CONFIGS[name]
    # SD 3's last block is another kind: one more is built and dropped
    few = dict(num_layers=5, pos_embed_max_size=64)
    few, i = (dict(num_layers=1, num_single_layers=1), 2) if name == "flux" else (few, 4)
    transformer = getattr(diffusers, cls)(**config | few).eval().requires_grad_(False)
    common.keep_blocks(transformer, i)
    reward = common.Reward("clip", "paper", weights=False)
    text = torch.randn(1, tokens, config["joint_attention_dim"])
    null = text, torch.randn(1, config["pooled_projection_dim"])
    W = torch.randn(1024, transformer.inner_dim) / transformer.inner_dim**0.5
    stitch = common.Stitch(W, torch.zeros(1024), reward.visual.grid_size)
    value = common.StitchedValue(transformer, null, reward, stitch, i, 1).requires_grad_(False)
    z = torch.randn(1, 16, 64, 64).requires_grad_()
    v = value(z, torch.tensor([0.5]), F.normalize(torch.randn(1, 768), dim=-1))
    v.sum().backward()
    return dict(
        blocks=[type(b).__name__ for b in common.dit_blocks(transformer)],
        value=float(v),
        finite=bool(z.grad.isfinite().all()),
        reached=float((z.grad != 0).float().mean()),
        norm=float(z.grad.norm()),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, blocks",
    [
        ("sd3.5-medium", ["JointTransformerBlock"] * 4),
        ("flux", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
    ],
)
def test_published_size_on_the_cpu(name, blocks):
    """Each kind of block with all of ViT-L/14@336: under 8 GB, the gradient reaches every pixel."""
    done = launch(__file__, name, PYTHONPATH=f"{ROOT}:{ROOT / 'tests/published'}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["blocks"] == blocks and np.isfinite(found["value"]) and found["value"] != 0
    assert found["finite"] and found["reached"] > 0.999 and found["norm"] > 1e-6
    assert found["peak_gb"] < 8


if __name__ == "__main__":  # what is measured in a process of its own
    found = full_size(sys.argv[1])
    # trap: ru_maxrss begins at what the parent had
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    print(json.dumps(found | dict(peak_gb=int(peak) * 1024 / 1e9)))
