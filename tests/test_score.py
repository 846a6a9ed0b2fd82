"""Scoring of images on the disk: folders in GenEval's layout, and the tables of stages."""

import json
import weakref
from pathlib import Path

import draw
import numpy as np
import parity
import pytest
import score
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import train
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.io import encode_png
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import common

PROMPTS = ["a red circle", "two small blue stars", "a large green square"]


def run(*flags):
    score.main(score.parse_args([str(f) for f in (*flags, "--device", "cpu")]))


@pytest.fixture
def folder(tmp_path):
    """Three prompts, two random images each."""
    images = torch.randint(256, (3, 2, 3, 32, 32), generator=common.generator(0)).to(torch.uint8)
    common.write_images(tmp_path / "images", [dict(prompt=p, tag="x") for p in PROMPTS], images)
    return tmp_path / "images"


@pytest.fixture
def table(folder):
    """A stage's table beside the folder: the first and the last row have images, the same ones."""
    path = folder.parent / "05_dps.json"
    rows = [dict(method=m, reward=1.0) for m in ("flow", "tweedie", "stitchvm")]
    for row in rows[::2]:
        row["images"] = "images"
    path.write_text(json.dumps(dict(stage="05_dps", rows=rows, config=dict(seed=0))))
    return path


def brightness(images, prompts):
    """Of each image, plus the length of its prompt."""
    return images.float().mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


def with_scorers(monkeypatch, **scorers):
    monkeypatch.setattr(score, "load_scorer", lambda name, preset, device: scorers[name])


# ---------------------------------------------------------------------------- scorers
def test_rewards_score_as_in_a_stage(folder, tmp_path):
    """The mean over prompts of each prompt's mean, and its error, of common.score_images."""
    run(folder, "--scorers", "clip", "aesthetic", "--batch", 4, "--out", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())["rows"][0]
    rows = score.read_folder(folder)
    images = torch.stack([torch.stack([read(f) for f in files]) for _, files in rows]).flatten(0, 1)
    prompts = [p for p in PROMPTS for _ in range(2)]
    rewards = [common.Reward("clip")]
    wanted = common.score_images(["aesthetic"], rewards, "mini", "cpu", images, prompts)
    by_prompt = {k: v.view(3, 2).mean(1) for k, v in wanted.items()}
    wanted = common.mean_and_error(by_prompt)
    assert found["images"] == str(folder)
    assert found["aesthetic"] == pytest.approx(wanted["aesthetic"], abs=1e-5)
    assert found["clip"] == pytest.approx(wanted["reward"], abs=1e-5)
    assert found["clip_se"] == pytest.approx(wanted["reward_se"], abs=1e-5)


def read(file):
    return TF.pil_to_tensor(Image.open(file).convert("RGB"))


def test_geneval_looks_at_the_pixels(tmp_path):
    """A scene that is drawn as its prompt says, and the same picture under another prompt."""
    rng = np.random.default_rng(0)
    scene = draw.sample_scene(rng)
    image = torch.tensor(draw.draw(rng, scene)).permute(2, 0, 1)
    prompts = [draw.caption(scene), "three yellow rings on a black background"]
    common.write_images(tmp_path, [dict(prompt=p) for p in prompts], [image[None]] * 2)
    rows = score.read_folder(tmp_path)
    scorer = score.load_scorer("geneval", "mini", "cpu")
    assert score.score_folder(scorer, rows, 1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("prompt", ["a photo of a cat", "a red circle left of"])
def test_a_free_prompt_leaves_genevals_cell_empty(prompt, tmp_path, capsys):
    """It says why, and the next scorer has its column."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    common.write_images(tmp_path, [dict(prompt=p) for p in (PROMPTS[0], prompt)], [image] * 2)
    run(tmp_path, "--scorers", "geneval", "clip", "--out", tmp_path / "s.json")
    assert "no column geneval: a prompt is none of the miniature's" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert "geneval" not in row and row["clip"] is not None


def test_published_geneval_has_its_own_evaluation(folder, capsys):
    run(folder, "--scorers", "geneval", "--preset", "paper")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("warning: no column geneval: ") and "djghosh13/geneval" in said


def small_clip():
    """A small random CLIP of transformers, and its processor."""
    tokenizer = train.tokenizer()
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, projection_dim=24)
    tower |= dict(num_attention_heads=2)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = tower | {n: getattr(tokenizer, n) for n in names} | dict(vocab_size=len(tokenizer))
    vision = tower | dict(image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return CLIPModel(config).eval(), CLIPProcessor(images, tokenizer)


@torch.no_grad()
def test_pickscore_is_the_scaled_cosine(monkeypatch, folder):
    """Of the projected poolings by hand; batches do not mix."""
    torch.manual_seed(0)
    model, processor = small_clip()
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: model)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    rows = score.read_folder(folder)
    found = score.score_folder(score.load_scorer("pickscore", "24gb", "cpu"), rows, 4)
    pixels = torch.stack([read(f) for _, files in rows for f in files]) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = TF.normalize(pixels, mean, std)
    v = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
    texts = [processor.tokenizer(p, return_tensors="pt").input_ids for p in PROMPTS]
    pooled = torch.cat([model.text_model(input_ids=ids).pooler_output for ids in texts])
    t = (pooled @ model.text_projection.weight.T).repeat_interleave(2, 0)
    wanted = model.logit_scale.exp() * F.cosine_similarity(v, t)
    assert_close(found, wanted.view(3, 2).mean(1), atol=1e-4, rtol=0)
    assert float(found.std()) > 1e-3


@torch.no_grad()
def test_imagereward_is_its_packages(tmp_path):
    """The scores that parity.py recorded of the package, of each image with each prompt."""
    recorded = json.loads((Path(parity.__file__).parent / "parity.json").read_text())
    weights = parity.weights(recorded["shapes"])
    sizes = parity.VISION | dict(image_size=224), parity.TEXT
    model = score.ImageReward(weights, parity.tokenizer(tmp_path), *sizes)
    found = [model(parity.images(), [p] * 3) for p in parity.PROMPTS]
    found = torch.stack(found)
    assert_close(found, torch.tensor(recorded["scores"]), atol=5e-4, rtol=0)
    assert float(found.std(0).min()) > 1 and float(found.std(1).min()) > 1
    weights.pop("blip.visual_encoder.norm.weight")
    with pytest.raises(ValueError, match="no weights vision.post_layernorm.weight"):
        score.ImageReward(weights, parity.tokenizer(tmp_path), *sizes)


def test_imagereward_is_loaded_from_the_hub(monkeypatch, tmp_path):
    """Its file of weights, read as tensors alone; BERT's tokenizer; the published sizes."""
    torch.save(dict(a=torch.ones(2)), tmp_path / "ImageReward.pt")
    asked = []

    def download(*source):
        asked.append(source)
        return tmp_path / source[1]

    class Model(nn.Module):
        def __init__(self, *given):
            super().__init__()
            asked.append(given)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: name)
    monkeypatch.setattr(score, "ImageReward", Model)
    score.load_scorer("imagereward", "24gb", "cpu")
    assert asked[0] == ("THUDM/ImageReward", "ImageReward.pt")
    assert asked[1][0]["a"].tolist() == [1, 1] and asked[1][1] == "google-bert/bert-base-uncased"


# ---------------------------------------------------------------------------- what is not there
def test_scorers_that_cannot_be_had_are_named_and_left_out(monkeypatch, capsys, table):
    """One warning each, with its reason; the others are there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = dict(pickscore="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    sources |= dict(imagereward="google-bert/bert-base-uncased")
    run(table, "--scorers", *sources, "clip")
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("warning")]
    reason = "is not on this machine and its host cannot be reached"
    for line, (name, source) in zip(found, sources.items(), strict=True):
        assert line.startswith(f"warning: no column {name}: {source} {reason}")
    row = json.loads(table.read_text())["rows"][0]
    assert set(row) == {"method", "reward", "images", "clip", "clip_se"}


def test_all_other_errors_stop_the_run(monkeypatch, table):
    """In their own words; the columns of the scorers before are in the table by then."""
    with pytest.raises(SystemExit, match="^error: there is no no-such-reward"):
        run(table, "--scorers", "clip", "no-such-reward")
    row = json.loads(table.read_text())["rows"][0]
    assert set(row) == {"method", "reward", "images", "clip", "clip_se"}

    def load(*args):
        with common.needs("some/weights"):
            raise ImportError("cannot import name 'find_pruneable_heads_and_indices'")

    monkeypatch.setattr(score, "load_scorer", load)
    with pytest.raises(SystemExit, match="^error: a package is missing .*find_pruneable"):
        run(table, "--scorers", "clip")


SMALL = ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried to allocate"]


@pytest.mark.parametrize(
    "error", [*map(RuntimeError, SMALL), torch.OutOfMemoryError("x"), MemoryError()]
)
@pytest.mark.parametrize("when", ["loading", "scoring"])
def test_too_little_memory_is_no_missing_scorer(monkeypatch, table, error, when):
    """The run stops in one sentence, also where common has made one of it; the table stays."""
    before = table.read_text()

    def scorer(*args):
        with common.needs("some/weights"):
            raise error

    def load(*args):
        return scorer() if when == "loading" else scorer

    monkeypatch.setattr(score, "load_scorer", load)
    with pytest.raises(SystemExit, match="^error: clip does not fit into the memory of cpu") as e:
        run(table, "--scorers", "clip")
    assert "\n" not in e.value.code and table.read_text() == before


def test_one_model_in_memory_at_a_time(monkeypatch, folder):
    """When the second is loaded, the first is gone."""
    alive = []

    class Model:
        def __call__(self, images, prompts):
            return torch.zeros(len(images))

    def load(name, preset, device):
        assert not any(ref() for ref in alive)
        model = Model()
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(score, "load_scorer", load)
    run(folder, "--scorers", "a", "b", "c")
    assert len(alive) == 3


# ---------------------------------------------------------------------------- tables and folders
def test_a_tables_rows_with_images_are_completed(monkeypatch, table, folder):
    """Two rows, of one folder that is looked at once; all else is as it was, and no half file."""
    before = json.loads(table.read_text())
    asked = []

    def scorer(images, prompts):
        asked.extend(prompts)
        return brightness(images, prompts)

    with_scorers(monkeypatch, bright=scorer)
    run(table, "--scorers", "bright")
    after = json.loads(table.read_text())
    assert asked == [p for p in PROMPTS for _ in range(2)]
    added = [{k: row.pop(k) for k in ("bright", "bright_se") if k in row} for row in after["rows"]]
    assert after == before and added[1] == {} and added[0] == added[2]
    rows = score.read_folder(folder)
    means = torch.stack(
        [brightness(torch.stack([read(f) for f in fs]), [p] * 2).mean() for p, fs in rows]
    )
    assert added[0] == pytest.approx(common.mean_and_error(dict(bright=means)))
    assert {p.name for p in table.parent.iterdir()} == {"05_dps.json", "images"}


def test_folders_and_tables_in_one_run(monkeypatch, table, folder, tmp_path, capsys):
    """--out holds the rows of all sources; a single prompt has no error."""
    common.write_images(
        tmp_path / "one", [dict(prompt="a")], torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)
    )
    with_scorers(monkeypatch, bright=brightness)
    run(folder, table, tmp_path / "one", "--scorers", "bright", "--out", tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [r["images"] for r in rows] == [str(folder), "images", "images", str(tmp_path / "one")]
    assert rows[0]["bright"] == rows[1]["bright"] and rows[3] == dict(
        images=str(tmp_path / "one"), bright=1.0, bright_se=None
    )
    assert "bright" in json.loads(table.read_text())["rows"][0]
    assert f"wrote {tmp_path / 's.json'}" in capsys.readouterr().out


def test_misuse(tmp_path, folder, table):
    """One sentence that names the file, before a model is loaded."""
    (tmp_path / "text.json").write_text("no table")
    (tmp_path / "none.json").write_text(json.dumps(dict(rows=[dict(method="flow")])))
    (folder / "00001/samples/0000.png").unlink()
    (folder / "00001/samples/0001.png").unlink()
    cases = [
        ("nowhere", "has no images"),
        ("text.json", "is no table"),
        ("none.json", "--save-images"),
    ]
    cases += [("nowhere.json", "is no table"), ("05_dps.json", "00001 has no images")]
    for name, said in cases:
        with pytest.raises(SystemExit, match="^error: ") as e:
            run(tmp_path / name, "--scorers", "clip")
        assert said in e.value.code and str(tmp_path) in e.value.code and "\n" not in e.value.code


def test_a_broken_image_is_named(table, folder):
    """Half a PNG, or another size: one sentence, and the table stays as it was."""
    file, before = folder / "00002/samples/0001.png", table.read_text()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], png(8, 8)):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match="^error: .*no PNG files of one size"):
            run(table, "--scorers", "clip")
        assert table.read_text() == before


def png(h, w):
    return encode_png(torch.zeros(3, h, w, dtype=torch.uint8)).numpy().tobytes()
