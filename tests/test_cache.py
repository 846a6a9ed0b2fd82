"""Stage 01: features against the library's own blocks, image files of every kind, what trains."""

import copy
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import common

ROOT = Path(__file__).resolve().parents[1]
cache = importlib.import_module("01_cache_features")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def refusal(call, *args):
    """The one sentence with which a call stops; a string makes the exit code 1."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    return e.value.code


# ---------------------------------------------------------------------------- features
@pytest.fixture(scope="module")
def sd3():
    """Four random SD3 blocks."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config = dict(sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4)
    config |= dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24)
    config |= dict(caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8)
    config |= dict(dual_attention_layers=(0, 1), qk_norm="rms_norm")
    return SD3Transformer2DModel(**config).eval().requires_grad_(False)


@pytest.mark.parametrize("grid, antialias", [((5, 3), False), ((4, 4), False), ((2, 2), True)])
def test_dit_features_are_the_librarys_block_outputs(sd3, grid, antialias):
    """Row i-1 is what the library's own forward has after its i-th block, resampled.

    On a 10 x 6 latent (5 x 3 tokens): rows and columns cannot be confused.
    """
    z, t, null = (
        torch.randn(3, 16, 10, 6),
        torch.rand(3),
        (torch.randn(1, 5, 24), torch.randn(1, 20)),
    )
    seen = []
    hooks = [
        b.register_forward_hook(lambda block, inputs, output: seen.append(output[1]))
        for b in sd3.transformer_blocks
    ]
    sd3(z, null[0].expand(3, -1, -1), null[1].expand(3, -1), t * 1000)
    for hook in hooks:
        hook.remove()
    found = cache.dit_features(sd3, z, t, null, grid, antialias)
    assert found.shape == (4, 3, grid[0] * grid[1], 32) and len(seen) == 4
    for i, h in enumerate(seen):
        h = h.view(3, 5, 3, 32).permute(0, 3, 1, 2)
        if grid != (5, 3):
            h = F.interpolate(h, grid, mode="bilinear", align_corners=False, antialias=antialias)
        wanted = h.permute(0, 2, 3, 1).reshape(3, -1, 32)
        assert_close(found[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def reward():
    return common.Reward("clip")


@torch.no_grad()
def test_tokens_by_depth_are_what_the_towers_blocks_are_given(reward):
    """The tail from each of them is the whole tower, bit for bit; the first ones are patches."""
    visual, x = reward.visual, torch.randn(3, 3, 64, 64)
    given = []
    hooks = [
        b.register_forward_pre_hook(lambda block, inputs: given.append(inputs[0]))
        for b in visual.transformer.resblocks
    ]
    e = reward.visual(x)
    for hook in hooks:
        hook.remove()
    found = cache.tokens_by_depth(visual, x, 3)
    patches = visual.conv1(x)
    assert torch.equal(found[0, :, 1:], patches.flatten(2).transpose(1, 2)) and len(found) == 3
    for j in (2, 3):
        assert torch.equal(found[j - 1], given[j - 1])
        assert torch.equal(common.tail(visual, found[j - 1], j)[0], e)
    assert torch.equal(common.tail(visual, common.tokens_entering(visual, patches), 1)[0], e)
    assert len(cache.tokens_by_depth(visual, x, 99)) == len(given)


# ---------------------------------------------------------------------------- image files
GREY = np.linspace(0, 255, 48).round().astype(np.uint8)  # a ramp from left to right
RAMP = np.broadcast_to(GREY, (48, 48))


def read(path, size=48):
    """(size, size, 3) as integers, or the reason."""
    x = cache.read_square(path, size)
    return x if isinstance(x, str) else x.permute(1, 2, 0).numpy().astype(int)


def test_a_square_that_fits_is_left_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png", 32) == pixels).all()


def test_grey(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "l.png")
    assert (read(tmp_path / "l.png") == RAMP[..., None]).all()


def test_a_16_bit_ramp_is_kept(tmp_path):
    """convert("RGB") alone would clip at 255 of 65535: white but for the first pixel."""
    wide = np.linspace(0, 65535, 48).round().astype(np.uint16)
    Image.fromarray(np.broadcast_to(wide, (48, 48))).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as raw:
        assert raw.mode.startswith("I")
    assert abs(read(tmp_path / "16.png") - RAMP[..., None]).max() <= 1


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(tmp_path, kind):
    """The left half is transparent black; dropping alpha would show it black."""
    alpha = np.where(np.arange(48) < 24, 0, 255).astype(np.uint8) * np.ones((48, 1), np.uint8)
    colour = np.stack([alpha // 255 * 200] * 3 + [alpha], -1)
    image = Image.fromarray(colour, "RGBA")
    if kind in ("P", "RGB"):  # one colour of the palette, or one value, is declared transparent
        image = Image.fromarray(colour[..., :3]).convert(kind, palette=Image.Palette.ADAPTIVE)
        image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    else:
        image.convert(kind).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    assert (found[:, :24] == 255).all() and (found[:, 24:] == 200).all()
    small = read(tmp_path / "a.png", 12)  # nor does what is transparent bleed into the rest
    assert (small[:, :5] >= 254).all() and (abs(small[:, 7:] - 200) <= 5).all()


def test_half_transparent(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(tmp_path / "a.webp", lossless=True)
    assert abs(read(tmp_path / "a.webp", 8) - 204).max() <= 1


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("RGB", "a.webp"), ("RGB", "a.jpg")])
def test_colours(tmp_path, mode, name):
    """Red stays red within the codec's loss, also from four inks."""
    Image.new("RGB", (48, 32), (220, 40, 40)).convert(mode).save(tmp_path / name, quality=95)
    with Image.open(tmp_path / name) as raw:
        assert raw.mode == mode
    assert abs(read(tmp_path / name) - (220, 40, 40)).max() <= 8


def test_exif_rotation_is_applied(tmp_path):
    """Orientation 6: the camera lay on its side, the stored left edge is the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP[:32]).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert abs(read(tmp_path / "a.jpg", 32) - GREY[8:40, None, None]).max() <= 8


SHAPES = [(64, 64), (48, 32), (31, 97), (60, 3), (1, 5), (65, 64), (513, 769)]


@pytest.mark.parametrize("w, h", SHAPES)
def test_squares_of_any_aspect_ratio(tmp_path, w, h):
    """The centre, undistorted, of a ramp along the longer side; at most half a pixel off."""
    n, scale = max(w, h), 32 / min(w, h)
    ramp = np.linspace(0, 255, n).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :] if w > h else ramp[:, None], (h, w))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = cache.read_square(tmp_path / "a.png", 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.uint8
    x = (x if w > h else x.transpose(1, 2)).float()
    assert (x == x[:1, :1]).all()
    centres = n / 2 + (torch.arange(32) - 15.5) / scale - 0.5  # in pixels of the original
    error = (x[0, 0] - 255 * centres / (n - 1)).abs().max()
    assert error <= 0.51 / scale * 255 / (n - 1) + 2


def noise(path):
    """A file of 64 x 64 random pixels, and its bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def is_reason(found, kind=""):
    """'<class of the error>: <its first line>'."""
    name, _, message = found.partition(": ") if isinstance(found, str) else ("", "", "")
    return name.isidentifier() and name.startswith(kind) and message and "\n" not in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_files_have_a_reason(tmp_path, suffix):
    """Half a file is not half an image."""
    path = tmp_path / f"a{suffix}"
    whole = noise(path)
    for part in (0, 3, len(whole) // 4, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:part])
        assert is_reason(cache.read_square(path, 16))


def test_a_broken_png_chunk_has_a_reason(tmp_path):
    """A pixel chunk that claims to be shorter than it is: PIL's error for it is a SyntaxError."""
    data = bytearray(noise(tmp_path / "a.png"))
    at = data.index(b"IDAT")
    data[at - 4 : at] = struct.pack(">I", 100)
    (tmp_path / "a.png").write_bytes(data)
    assert is_reason(cache.read_square(tmp_path / "a.png", 16), "SyntaxError")


def test_a_decompression_bomb_has_a_reason(tmp_path):
    """A header of 40,000 x 40,000 pixels."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 40000, 40000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert is_reason(cache.read_square(tmp_path / "a.png", 16), "DecompressionBombError")


@pytest.mark.parametrize("size", [(30000, 1), (2, 41)])
def test_an_absurd_shape_has_a_reason(tmp_path, size):
    """A file of 172 bytes, of which some preprocessing makes gigabytes."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    found = cache.read_square(tmp_path / "a.png", 16)
    assert is_reason(found, "ValueError") and f"{size[0]} x {size[1]} pixels" in found


@pytest.mark.parametrize(
    "name, at, byte, rotated",
    [("a.jpg", 25, 2, True), ("a.webp", 25, 2, True), ("a.webp", 0, 0, False)],
    ids=["a number called a text", "the same in WebP", "no header"],
)
def test_broken_notes_of_the_camera_leave_the_pixels_good(tmp_path, name, at, byte, rotated):
    """Turned by them where that can still be read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    Image.fromarray(RAMP).convert("RGB").save(tmp_path / name, quality=95, exif=exif)
    data = bytearray((tmp_path / name).read_bytes())
    data[data.index(exif.tobytes()[6:]) + at] = byte
    (tmp_path / name).write_bytes(data)
    wanted = GREY[:, None, None] if rotated else RAMP[..., None]
    assert abs(read(tmp_path / name) - wanted).max() <= 8


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"])
def test_more_kinds_of_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (48, 32), (220, 40, 40)).save(path)
    assert abs(read(path) - (220, 40, 40)).max() <= 8
    assert cache.training_images(tmp_path, None, False) == [path.name]


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70000), ("I", -1)])
def test_grey_values_of_unknown_range_have_a_reason(tmp_path, mode, value):
    """They would be black, or wrap around."""
    Image.new(mode, (8, 8), value).save(tmp_path / "a.tif")
    assert f"pixels of mode {mode}" in read(tmp_path / "a.tif")


def colour(k):
    return (30 * k, 255 - 30 * k, 7 * k)


def write_images(folder):
    """0.png .. 6.png, each of its own colour; 2 is text, 3 is cut, 5 does not exist."""
    for k in (0, 1, 4, 6):
        Image.new("RGB", (20 + 4 * k, 40), colour(k)).save(folder / f"{k}.png")
    (folder / "2.png").write_text("not an image\nat all")
    (folder / "3.png").write_bytes(noise(folder / "3.png")[:5000])
    return [f"{k}.png" for k in range(7)]


def test_read_square(tmp_path):
    write_images(tmp_path)
    x = cache.read_square(tmp_path / "4.png", 16)
    assert x.shape == (3, 16, 16) and x.dtype == torch.uint8
    assert (x == torch.tensor(colour(4)).view(3, 1, 1)).all()
    reasons = {"2.png": "UnidentifiedImageError", "3.png": "", "5.png": "FileNotFoundError"}
    for name, kind in reasons.items():
        assert is_reason(cache.read_square(tmp_path / name, 16), kind)


BACKBONE = SimpleNamespace(encode=lambda x: F.avg_pool2d(x, 8), device=torch.device("cpu"))
REWARD = SimpleNamespace(resize=lambda x: x[..., :4, :4])


@pytest.mark.parametrize("batch, workers", [(1, 0), (2, 0), (3, 0), (100, 0), (1, 2), (3, 2)])
def test_encode_files_skips_and_names_what_it_cannot_read(tmp_path, batch, workers):
    """Every row belongs to the name beside it, whatever the batch; what is bad leaves no row."""
    names = write_images(tmp_path)
    found = cache.encode_files(names, tmp_path, BACKBONE, REWARD, 16, batch, workers)
    assert found["names"] == ["0.png", "1.png", "4.png", "6.png"]
    assert sorted(found["bad"]) == ["2.png", "3.png", "5.png"]
    assert found["bad"]["5.png"].startswith("FileNotFoundError: ")
    colours = torch.tensor([colour(k) for k in (0, 1, 4, 6)]).view(4, 3, 1, 1)
    assert found["z0"].dtype == torch.float16 and found["pixels"].dtype == torch.uint8
    wanted = (colours / 255).expand(4, 3, 2, 2)
    assert_close(found["z0"].float(), wanted, rtol=0, atol=1e-3)
    assert torch.equal(found["pixels"], colours.expand(4, 3, 4, 4).to(torch.uint8))


def test_encode_files_when_none_can_be_read(tmp_path):
    write_images(tmp_path)
    found = cache.encode_files(["2.png", "5.png"], tmp_path, BACKBONE, REWARD, 16, 2, 0)
    assert found["z0"] is None and found["pixels"] is None and found["names"] == []
    assert sorted(found["bad"]) == ["2.png", "5.png"]


@pytest.mark.parametrize("size", [64, 96])
def test_workers_read_what_is_read_directly(folder, reward, size):
    """Squares and the reward's inputs, bit for bit, and so the latents; at 96 they are resized."""
    backbone = common.Backbone("sd3.5-medium")
    names = [file.name for file in sorted(folder.iterdir())]
    given = names, folder, backbone, reward, size, 5
    here, there = (cache.encode_files(*given, workers) for workers in (0, 2))
    assert same(here, there) and here["bad"] == there["bad"] and len(here["names"]) == 24
    squares = [cache.read_square(folder / name, size) for name in here["names"]]
    pixels = [(reward.resize(x[None] / 255)[0] * 255).round().to(torch.uint8) for x in squares]
    assert torch.equal(there["pixels"], torch.stack(pixels))
    with torch.no_grad():
        z0 = backbone.encode(torch.stack(squares) / 255)
    assert_close(there["z0"].float(), z0, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------- what trains
def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_listed(tmp_path):
    """Sorted, of any depth, behind a link too, whatever the case of the suffix."""
    touch(tmp_path / "a", ["b.PNG", "a.jpg", "deep/er/c.webp", "notes.txt", "d.jpeg"])
    touch(tmp_path / "other", ["f.jpg"])
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "other")
    wanted = ["a.jpg", "b.PNG", "d.jpeg", "deep/er/c.webp", "linked/f.jpg"]
    assert cache.training_images(tmp_path / "a", None, False) == wanted
    message = refusal(cache.training_images, tmp_path / "nowhere", None, False)
    assert "nowhere is not a folder" in message
    assert "--images" in refusal(cache.training_images, None, None, False)


def test_an_image_is_listed_once(tmp_path, capsys):
    """Whatever links lead to it: to the folder inside it, twice; to a file; to nothing."""
    touch(tmp_path / "a", ["x.jpg", "deep/y.jpg", ".hidden.jpg", ".hidden/z.jpg"])
    for k in "12":
        (tmp_path / "a" / f"loop{k}").symlink_to(tmp_path / "a")
    (tmp_path / "a/deep/up").symlink_to(tmp_path)
    (tmp_path / "a/y.jpg").symlink_to(tmp_path / "a/x.jpg")
    assert cache.training_images(tmp_path / "a", None, False) == ["deep/y.jpg", "x.jpg"]
    assert "left out" not in capsys.readouterr().out


def test_what_is_left_out_is_counted(tmp_path, capsys):
    touch(tmp_path, ["a.jpg", "b.heic", "c.heic", "a.txt", "LICENSE"])
    assert cache.training_images(tmp_path, None, False) == ["a.jpg"]
    said = capsys.readouterr().out
    assert all(s in said for s in (".png", "2 of .heic", "1 of .txt", "1 of no suffix"))


def test_a_test_image_behind_a_link_does_not_train(tmp_path):
    """Known by its own name, too."""
    touch(tmp_path, ["other/953958.jpg", "a/y.jpg"])
    (tmp_path / "a/0.jpg").symlink_to(tmp_path / "other/953958.jpg")
    listed = [benchmark(tmp_path / "ava.jsonl", ["953958.jpg"])]
    assert "0.jpg for one" in refusal(cache.training_images, tmp_path / "a", listed, False)
    assert cache.training_images(tmp_path / "a", listed, True) == ["y.jpg"]


def benchmark(path, images):
    path.write_text("".join(json.dumps(dict(image=image)) + "\n" for image in images))
    return str(path)


def test_test_images_do_not_train(tmp_path, capsys):
    """Known by the stem of the file, whatever the folder and the suffix: refused, or left out."""
    ava = benchmark(tmp_path / "ava.jsonl", ["images/953958.jpg", "images/12.jpg"])
    hpdv2 = benchmark(tmp_path / "hpdv2.jsonl", ["x_0.jpg", "deep/x_1.jpg"])
    names = ["images/1953958.jpg", "images/953958.jpg", "train/y.jpg", "x_1.png", "x_2.jpg"]
    both, more = tmp_path / "both", tmp_path / "more"
    touch(both, names)
    touch(more, names[2:3] + names[4:])
    drop = cache.training_images
    assert drop(both, None, False) == names and "warning" in capsys.readouterr().out
    assert drop(more, [ava, hpdv2], False) == ["train/y.jpg", "x_2.jpg"]
    assert "warning" not in capsys.readouterr().out
    message = refusal(drop, both, [ava, hpdv2], False)
    wanted = ("2 of the 5 training images", ava, hpdv2, "images/953958.jpg", "--skip-test")
    assert all(s in message for s in wanted)
    assert "1 of the 5" in refusal(drop, both, [hpdv2], False)
    left = drop(both, [ava, hpdv2], True)
    assert left == ["images/1953958.jpg", "train/y.jpg", "x_2.jpg"]
    assert "left out 2" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "not JSON\n", '{"file": "a.jpg"}\n', '["a.jpg"]\n'])
def test_a_benchmark_that_cannot_be_read_is_refused(tmp_path, text):
    """Without it nothing would keep its images out, --skip-test or not."""
    touch(tmp_path, ["a.jpg"])
    path = tmp_path / "b.jsonl"
    if text:
        path.write_text(text)
    for skip in (False, True):
        message = refusal(cache.training_images, tmp_path, [str(path)], skip)
        assert f"{path} cannot be read" in message


def test_01_checks_before_anything_is_loaded(tmp_path):
    touch(tmp_path, [f"{k}.jpg" for k in range(20)])
    listed = benchmark(tmp_path / "b.jsonl", [f"{k}.png" for k in range(7)])
    flags = ["--preset", "24gb", "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    args = cache.parse_args([*flags, "--benchmarks", listed])
    assert "7 of the 20 training images" in refusal(cache.main, args)
    args = cache.parse_args([*flags, "--limit", "15"])
    assert "15 images" in refusal(cache.main, args) and not (tmp_path / "out").exists()


def test_01_without_a_network(tmp_path):
    """As a user meets it: one sentence, exit code 1, no traceback, no folder."""
    touch(tmp_path / "images", [f"{k}.png" for k in range(16)])
    flags = ["--preset", "24gb", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    command = [sys.executable, "01_cache_features.py", *map(str, flags)]
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    source = "stabilityai/stable-diffusion-3.5-medium"
    assert done.stderr.startswith(f"error: {source} is not on this machine")
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 of the miniature's images as PNG, JPEG and WebP, and one broken file."""
    folder = tmp_path_factory.mktemp("images")
    cache.parse_args([])  # draws the miniature's data where it is missing
    for k, source in enumerate(sorted((ROOT / "tests/mini/data/train").glob("*.png"))[:24]):
        Image.open(source).save(folder / f"{k:02d}{('.png', '.jpg', '.webp')[k % 3]}")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def run(folder, out, *flags):
    """The data of cache.pt, and {file name: (time, tensors)} of the shards."""
    about = ["--images", str(folder), "--out", str(out), "--probe", "6", "--shard", "8"]
    cache.main(cache.parse_args([*about, "--batch", "5", *flags]))
    files = sorted((out / "cache").glob("*.pt"))
    shards = {f.name: (f.stat().st_mtime_ns, torch.load(f, weights_only=True)) for f in files}
    return torch.load(out / "cache.pt", weights_only=True)["data"], shards


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, *run(folder, out)


def test_every_image_is_cached_once(folder, whole):
    _, data, shards = whole
    assert list(data["bad"]) == ["broken.png"]
    listed = {s["file"]: s["images"] for s in data["shards"]}
    assert listed == {f"cache/{k}": len(v["names"]) for k, (_, v) in shards.items()}
    names = [name for _, v in shards.values() for name in v["names"]] + data["probe"]["names"]
    assert sorted(names) == sorted(p.name for p in folder.glob("[0-9]*"))
    assert all(len(v["z0"]) == len(v["pixels"]) == len(v["names"]) for _, v in shards.values())


def test_the_probe_set_holds_features_of_its_images(whole, reward):
    """Image by image, whatever the batch: the DiT's of z_t, the reward's of x_0, the means."""
    probe = whole[1]["probe"]
    backbone = common.Backbone("sd3.5-medium")
    null = backbone.prompts([""])
    assert probe["dit"].shape[:2] == (8, 6) and probe["t"].unique().numel() == 6
    cls, norms = [], []
    for k in range(6):
        x = reward.normalise(probe["pixels"][k : k + 1] / 255)
        t = probe["t"][k : k + 1]
        z_t = common.add_noise(probe["z0"][k : k + 1].float(), probe["eps"][k : k + 1], t)
        grid = reward.visual.grid_size
        dit = cache.dit_features(backbone.transformer, z_t, t, null, grid)[:, 0]
        assert_close(probe["dit"][:, k], dit, rtol=1e-3, atol=1e-3)
        tokens = cache.tokens_by_depth(reward.visual, x, 4)
        assert_close(probe["reward"][:, k], tokens[:, 0, 1:], rtol=1e-3, atol=1e-3)
        cls.append(tokens[1:, 0, 0])
        norms.append(reward.visual(x).norm())
    assert_close(torch.stack(probe["cls"]), torch.stack(cls).mean(0), rtol=1e-3, atol=1e-3)
    assert probe["embedding_norm"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-4)


def test_transformer_and_vae_are_never_loaded_together(folder, tmp_path, monkeypatch):
    """Text encoders first, then the VAE for all latents, and the transformer for the probe set."""
    seen = []
    read, load = common.Backbone.text_pipeline, common.Backbone.load

    def spy(backbone, part, dtype):
        seen.append((part, "vae" in backbone.__dict__))
        return load(backbone, part, dtype)

    def spy_text(backbone):
        seen.append("text")
        return read(backbone)

    monkeypatch.setattr(common.Backbone, "load", spy)
    monkeypatch.setattr(common.Backbone, "text_pipeline", spy_text)
    run(folder, tmp_path)
    assert seen == ["text", ("vae", False), ("transformer", False)]


def same(a, b):
    keys = [k for k, v in a.items() if torch.is_tensor(v)]
    return a["names"] == b["names"] and keys and all(torch.equal(a[k], b[k]) for k in keys)


@pytest.mark.parametrize("left", [None, 0, 5000], ids=["missing", "empty", "truncated"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(folder, whole, capsys, left):
    """Whole shards are kept, with the names of unreadable files; only the broken one is made."""
    out, data, shards = whole
    (out / "cache.pt").unlink()
    last = out / "cache" / sorted(shards)[-1]
    start = last.read_bytes()[:left]
    last.unlink()
    if left is not None:
        last.write_bytes(start)
    times = {f.name: f.stat().st_mtime_ns for f in (out / "cache").glob("*.pt")}
    data_again, again = run(folder, out)
    printed = capsys.readouterr().out
    assert "skipped 1 unreadable of 25" in printed and "broken.png" in printed
    assert [k for k in shards if again[k][0] != times.get(k)] == [last.name]
    assert all(same(shards[k][1], again[k][1]) for k in shards)
    assert same(data["probe"], data_again["probe"]) and data["bad"] == data_again["bad"]


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder, cached: the images, the run, its data and shards."""
    images = shutil.copytree(folder, tmp_path / "images")
    out = tmp_path / "out"
    return images, out, *run(images, out)


def test_another_image_of_the_same_name_is_read(changed):
    """A shard is of its files' content, not of their names; the other shards are kept."""
    images, out, _, shards = changed
    name = next(iter(shards.values()))[1]["names"][0]
    Image.new("RGB", (64, 64), "red").save(images / name)
    _, again = run(images, out)
    assert len(again) == 3 and len(again.keys() & shards.keys()) == 2
    new = next(v for k, (_, v) in again.items() if k not in shards)
    red = cache.read_square(images / name, 64)
    assert torch.equal(new["pixels"][new["names"].index(name)], red)


def test_a_broken_file_that_was_repaired_is_read_again(changed):
    images, out, data, _ = changed
    Image.new("RGB", (64, 64), "red").save(images / "broken.png")
    again, shards = run(images, out)
    names = [n for _, shard in shards.values() for n in shard["names"]] + again["probe"]["names"]
    assert list(data["bad"]) == ["broken.png"] and not again["bad"] and "broken.png" in names


def test_a_run_that_is_cut_off_leaves_the_finished_cache_whole(changed, monkeypatch):
    """Over fewer images: what cache.pt names is there, unchanged, until another is written."""
    images, out, data, shards = changed
    monkeypatch.setattr(cache, "probe_set", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(images, out, "--limit", "16", "--seed", "1")
    now = torch.load(out / "cache.pt", weights_only=True)["data"]["shards"]
    assert now == data["shards"] and len(now) == 3
    found = {k: torch.load(out / "cache" / k, weights_only=True) for k in shards}
    assert all(same(found[k], shards[k][1]) for k in shards)
    trained = {name for shard in found.values() for name in shard["names"]}
    assert not trained & {*data["probe"]["names"]}
    monkeypatch.undo()
    again, shards = run(images, out, "--limit", "16", "--seed", "1")
    assert {s["file"] for s in again["shards"]} == {f"cache/{k}" for k in shards}


def test_the_spec_names_images_and_weights(changed, other_weights):
    """The same for the same; another for other images, or where a folder has other weights."""
    images, out, _, _ = changed

    def spec():
        run(images, out)
        return torch.load(out / "cache.pt", weights_only=True)["spec"]

    first = spec()
    assert spec() == first
    held_out = torch.load(out / "cache.pt", weights_only=True)["data"]["probe"]["names"][0]
    Image.new("RGB", (64, 64), "red").save(images / held_out)
    assert {k for k, v in spec().items() if v != first[k]} == {"images"}
    other_weights()
    assert {k for k, v in spec().items() if v != first[k]} == {"images", "transformer"}


def test_a_fingerprint_does_not_depend_on_the_dtype(sd3):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    blocks = [copy.deepcopy(sd3).to(dtype).transformer_blocks[0] for dtype in dtypes]
    assert len({common.fingerprint(block) for block in blocks}) == 1
    assert common.fingerprint(sd3.transformer_blocks[1]) != common.fingerprint(blocks[0])


def test_of_two_processes_one_works(changed, monkeypatch):
    images, out, _, _ = changed
    monkeypatch.setenv("RANK", "1")
    before = (out / "cache.pt").stat().st_mtime_ns
    run(images, out)
    assert (out / "cache.pt").stat().st_mtime_ns == before


def test_a_run_over_fewer_images_leaves_no_shard_of_the_other(folder, whole, capsys):
    """Nor uses one: a shard belongs to its files and to what 02 must agree on."""
    data, shards = run(folder, whole[0], "--limit", "16")
    printed = capsys.readouterr().out
    assert len(shards) == len(data["shards"]) == 2 < len(whole[2])
    assert sum(s["images"] for s in data["shards"]) == 12 and "12 training images" in printed
    _, antialiased = run(folder, whole[0], "--limit", "16", "--antialias")
    assert len(antialiased) == 2 and not antialiased.keys() & shards.keys()


def test_without_any_image_that_can_be_read_there_is_no_cache(tmp_path):
    (tmp_path / "bad").mkdir()
    for k in range(16):
        (tmp_path / "bad" / f"{k}.png").write_bytes(b"not an image")
    assert "can be read" in refusal(run, tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out/cache.pt").exists()
