"""Stage 03 and NoisyCLIP: losses by hand, data by index, several processes, parts of a batch."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import children
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common

finetune = importlib.import_module("03_finetune")
noisyclip = importlib.import_module("noisyclip")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def refusal(call, *args):
    """The one sentence with which a call stops; a string makes the exit code 1."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    return e.value.code


# ---------------------------------------------------------------------------- losses
def test_distill_loss_by_hand():
    """(78): a sum over the embedding, a mean over the tokens' elements, both means over images."""
    e, e_rm = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    h = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    h_rm = torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    loss, parts = finetune.distill_loss(e, h, e_rm, h_rm, lam_tok=0.5)
    assert float(parts["embedding"]) == pytest.approx((2 + 1) / 2)
    assert float(parts["tokens"]) == pytest.approx((4 + 9) / 4)
    assert float(loss) == pytest.approx(1.5 + 0.5 * 3.25)


def test_distill_loss_is_zero_only_at_the_target():
    e, h = unit(4, 6), torch.randn(4, 3, 5)
    assert float(finetune.distill_loss(e, h, e, h)[0]) == 0
    assert float(finetune.distill_loss(e.roll(1, 0), h, e, h)[0]) > 0
    assert float(finetune.distill_loss(e, h.roll(1, 1), e, h)[0]) > 0


def test_distill_loss_gradient():
    """2 (e - e_RM) / B and 2 lam (h - h_RM) / elements; the targets are not moved."""
    e, h = unit(4, 6).requires_grad_(), torch.randn(4, 3, 5).requires_grad_()
    e_rm, h_rm = unit(4, 6), torch.randn(4, 3, 5)
    finetune.distill_loss(e, h, e_rm, h_rm, 0.7)[0].backward()
    assert_close(e.grad, 2 * (e - e_rm).detach() / 4)
    assert_close(h.grad, 0.7 * 2 * (h - h_rm).detach() / 60)


def test_proposition_1_and_why_the_embedding_is_not_normalised():
    """The best e for many targets is their mean, so <e, text> is the mean score [D14].

    The best unit vector overstates it by 1 / |mean|.
    """
    e_rm, text = F.normalize(torch.randn(64, 8) + 0.5, dim=-1), unit(8)
    h = torch.zeros(64, 1, 1)
    mean = e_rm.mean(0)
    length = float(mean.norm())

    def loss(e):
        return finetune.distill_loss(e.expand_as(e_rm), h, e_rm, h)[1]["embedding"]

    e = torch.randn(8, requires_grad=True)
    # a quadratic of curvature 2: one Newton step lands on the minimiser
    best = (e - torch.autograd.grad(loss(e), e)[0] / 2).detach()
    assert_close(best, mean, rtol=0, atol=1e-6)
    assert float(best @ text) == pytest.approx(float((e_rm @ text).mean()), abs=1e-6)
    raw = torch.randn(8, requires_grad=True)
    for _ in range(400):
        slope = torch.autograd.grad(loss(F.normalize(raw, dim=-1)), raw)[0]
        raw = (raw - 0.5 * slope).detach().requires_grad_()
    best_unit = F.normalize(raw, dim=-1).detach()
    excess = float(loss(best_unit) - loss(mean))
    assert length < 0.8 and excess == pytest.approx((1 - length) ** 2, rel=1e-3)
    overstated = float((e_rm @ text).mean()) / length
    assert float(best_unit @ text) == pytest.approx(overstated, rel=1e-2)


def test_aesthetic_loss_by_hand():
    """(79): d^2 / 2 up to 1 and |d| - 1/2 beyond, a mean over the elements, weights 1."""
    e, h, score = torch.tensor([[0.0, 0.0]]), torch.tensor([[[0.0], [0.0]]]), torch.tensor([5.0])
    e_rm, h_rm = torch.tensor([[0.6, -0.8]]), torch.tensor([[[3.0], [-0.2]]])
    loss, parts = finetune.aesthetic_loss(e, h, score, e_rm, h_rm, torch.tensor([7.0]))
    expected = dict(embedding=(0.18 + 0.32) / 2, tokens=(2.5 + 0.02) / 2, score=1.5)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(expected)
    assert float(loss) == pytest.approx(sum(expected.values()))
    assert float(finetune.aesthetic_loss(e, h, score, e, h, score)[0]) == 0


def test_noisyclip_loss_of_distinct_texts_is_clips():
    """Against cross-entropies, and against the symmetric loss by loops."""
    e, text = unit(6, 16), unit(6, 16)
    logits = 10 * e @ text.T
    label = torch.arange(6)
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    assert_close(noisyclip.noisyclip_loss(e, text, 10), expected)
    total = 0.0
    for left, right in ((e, text), (text, e)):
        for a in range(6):
            row = [10 * float(left[a] @ right[b]) for b in range(6)]
            total -= (row[a] - math.log(sum(map(math.exp, row)))) / 12
    assert float(expected) == pytest.approx(total, rel=1e-5)


def test_noisyclip_loss_has_no_equal_texts_among_its_negatives():
    """Against loops that leave out other images of the same text."""
    e, ids = unit(6, 16), [0, 1, 1, 2, 0, 0]
    text = unit(3, 16)[ids]
    logits = (10 * e @ text.T).double()
    expected = 0.0
    for a in range(6):
        others = [b for b in range(6) if b == a or ids[b] != ids[a]]
        expected -= (logits[a, a] - logits[a, others].logsumexp(0)) / 12
        expected -= (logits[a, a] - logits[others, a].logsumexp(0)) / 12
    found = float(noisyclip.noisyclip_loss(e, text, 10))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_noisyclip_loss_prefers_the_right_pairs():
    text = unit(6, 16)
    orders = [0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]
    right, two, none = (float(noisyclip.noisyclip_loss(text[k], text, 10)) for k in orders)
    assert right + 0.5 < two < none


# ---------------------------------------------------------------------------- noise levels, rates
LOGIT_NORMAL = 0.5 * math.erfc(math.log(3) / 2**0.5)


@pytest.mark.parametrize(
    "law, mean, median, below_quarter, spread, density",
    [
        ("logit-normal", 0.5, 0.5, LOGIT_NORMAL, 0.2083, 1.5958),
        ("uniform", 0.5, 0.5, 0.25, 12**-0.5, 1.0),
        ("low", 1 / 3, 0.25, 0.5, (1 / 5 - 1 / 9) ** 0.5, 1.0),
    ],
)
def test_sample_sigma(law, mean, median, below_quarter, spread, density):
    """[D2] Mean, median, spread and lower tail within four standard errors of theory, where density
    is that at the median."""
    n = 40000

    def draw(seed):
        return finetune.sample_sigma(n, law, torch.Generator().manual_seed(seed)).double()

    s = draw(3)
    assert s.shape == (n,) and 0 <= s.min() < 0.05 and 0.95 < s.max() < 1
    assert abs(s.mean() - mean) < 4 * spread / n**0.5
    assert abs(s.median() - median) < 4 / (2 * density * n**0.5)
    error = (below_quarter * (1 - below_quarter) / n) ** 0.5
    assert abs((s < 0.25).double().mean() - below_quarter) < 4 * error
    assert float(s.std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(s, draw(3)) and not torch.equal(s, draw(4))


def test_learning_rate():
    """Linear from 1/warmup to 1, then constant; a cosine is half way down in the middle."""

    def rate(step, warmup=10, schedule="constant", steps=100):
        return finetune.learning_rate(step, steps, warmup, schedule)

    assert [rate(k) for k in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert rate(0, warmup=0) == 1
    assert [rate(k, 0, "cosine") for k in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert 0 < rate(99, 10, "cosine") < 1e-3
    falling = [rate(k, 10, "cosine") for k in range(9, 100)]
    assert falling == sorted(set(falling), reverse=True)
    assert rate(0, 10, "cosine") == pytest.approx(0.1)


# ---------------------------------------------------------------------------- data
@pytest.fixture
def shards(tmp_path):
    """Three shards of 3, 1 and 4 images: the folder, its list, everything in one piece."""
    z0 = torch.randn(8, 2, 3, 3).half()
    pixels = torch.randint(256, (8, 3, 2, 2), dtype=torch.uint8)
    whole = dict(z0=z0, pixels=pixels, names=[f"{k}.png" for k in range(8)])
    (tmp_path / "cache").mkdir()
    listed = []
    for k, (a, b) in enumerate([(0, 3), (3, 4), (4, 8)]):
        listed.append(dict(file=f"cache/shard_{k:05d}.pt", images=b - a))
        torch.save({n: v[a:b] for n, v in whole.items()}, tmp_path / listed[-1]["file"])
    return tmp_path, listed, whole


class Pixels:
    """A reward whose raw embedding and tokens are the pixels."""

    device = torch.device("cpu")
    visual = SimpleNamespace(positional_embedding=torch.zeros(12))

    def embed(self, x):
        return x.flatten(1), x.flatten(1)[:, None]


def loader(images, start=0, steps=4, rank=0, processes=1, **changed):
    """The batches of a process, 6 images a step over all: 4 steps are 3 epochs of 8 images."""
    args = dict(batch=6, sigma_law="uniform", seed=3, workers=0, device="cpu") | changed
    place = SimpleNamespace(process_index=rank, num_processes=processes)
    return [*finetune.batches(SimpleNamespace(**args), images, start, steps, place)]


def assert_equal(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert all(map(torch.equal, a, b)) and len(a) == len(b)


@pytest.fixture
def images(shards, monkeypatch):
    """The data set of (z_0, pixels), memory-mapped."""
    monkeypatch.setattr(finetune, "KEPT_TARGETS", 0)
    return finetune.training_images(*shards[:2], Pixels())


@pytest.mark.parametrize("limit", [0, 2**30], ids=["computed", "in memory"])
def test_a_latent_stays_with_its_own_targets(shards, monkeypatch, limit):
    """Across shards, in any order, repeated."""
    monkeypatch.setattr(finetune, "KEPT_TARGETS", limit)
    out, listed, whole = shards
    images = finetune.training_images(out, listed, Pixels())
    assert len(images) == 8
    order = torch.tensor([7, 0, 3, 5, 2, 3])
    z_t, t, *clean = finetune.draw_batch(images, order, "uniform", 3, range(1, 6))
    pixels = whole["pixels"][order[1:]]
    if limit:
        e_rm, h_rm = clean
        assert torch.equal(h_rm, pixels.flatten(1)[:, None] / 255)
        assert_close(e_rm, F.normalize(h_rm[:, 0], dim=-1))
    else:
        assert torch.equal(clean[0], pixels) and len(clean) == 1
    for p in range(1, 6):
        draw = common.generator(3, "train", p)
        sigma = torch.rand(1, generator=draw)
        eps = torch.randn(2, 3, 3, generator=draw)
        z0 = whole["z0"][order[p]].float()
        assert t[p - 1] == sigma and torch.equal(z_t[p - 1], (1 - sigma) * z0 + sigma * eps)


def test_every_image_once_an_epoch(shards, images):
    """In an order that changes with the epoch and the seed; an epoch may end within a batch."""
    whole = shards[2]["pixels"].flatten(1).tolist()

    def order(**changed):
        pixels = torch.cat([batch[2] for batch in loader(images, **changed)])
        return [whole.index(x) for x in pixels.flatten(1).tolist()]

    epochs = [order()[k : k + 8] for k in (0, 8, 16)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(8)]] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(seed=4) != order() == order(workers=2)


@pytest.mark.parametrize("processes", [2, 3])
def test_data_do_not_depend_on_the_number_of_processes(images, processes):
    """Their shares, one after the other, are the batch of one: the same images, sigma and noise."""
    shares = [loader(images, rank=k, processes=processes) for k in range(processes)]
    assert all(len(share[0][0]) == 6 // processes for share in shares)
    joined = [[torch.cat(v) for v in zip(*step, strict=True)] for step in zip(*shares, strict=True)]
    assert_equal(joined, loader(images))


def test_data_of_later_steps_need_no_earlier_ones(images):
    assert_equal(loader(images, start=2), loader(images)[2:])
    assert_equal(loader(images, steps=3), loader(images)[:3])


@pytest.mark.parametrize("limit", [0, 2**30], ids=["memory-mapped", "in memory"])
def test_workers_send_the_same_bits(shards, monkeypatch, limit):
    monkeypatch.setattr(finetune, "KEPT_TARGETS", limit)
    images = finetune.training_images(*shards[:2], Pixels())
    assert_equal(loader(images, workers=2), loader(images))


@pytest.mark.parametrize("preset", finetune.PRESETS)
def test_the_vae_stitch_trains_for_three_times_the_epochs(preset):
    """Unless they are given. NoisyCLIP, which is stitched there too, has the value model's."""
    one = finetune.parse_args(["--preset", preset]).epochs
    assert finetune.parse_args(["--preset", preset, "--front", "vae"]).epochs == 3 * one
    assert finetune.parse_args(["--front", "vae", "--epochs", "2"]).epochs == 2
    baseline = noisyclip.parse_args(["--preset", preset])
    assert baseline.epochs == one == (12 if preset == "mini" else 5) and baseline.front == "vae"


def test_noisyclip_reads_the_same_images(shards):
    out, listed, whole = shards
    data, names = noisyclip.load_shards(out, listed)
    assert names == whole["names"] and len(data) == 8
    assert all(torch.equal(data[k][0], whole["z0"][k]) for k in range(8))


def test_a_missing_shard_is_named(shards):
    out, listed, _ = shards
    (out / listed[1]["file"]).unlink()
    for read, more in ((finetune.training_images, [Pixels()]), (noisyclip.load_shards, [])):
        message = refusal(read, out, listed, *more)
        assert "shard_00001.pt is missing" in message and "01_cache_features.py" in message


@pytest.mark.parametrize("size", [0, 500, -30], ids=["empty", "cut", "nearly whole"])
def test_a_damaged_shard_is_one_sentence(shards, size):
    out, listed, _ = shards
    file = out / listed[1]["file"]
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(finetune.training_images, out, listed, Pixels())
    assert "shard_00001.pt is missing or damaged" in message
    assert f"python 01_cache_features.py --out {out}" in message


def test_load_captions(tmp_path):
    """From a COCO-style file, whose annotations are in no order."""
    images = [dict(id=9, file_name="a.png"), dict(id=2, file_name="b.png")]
    images.append(dict(id=5, file_name="c.png"))
    said = [(2, "three"), (9, "one"), (9, "two")]
    annotations = [dict(image_id=k, caption=c) for k, c in said]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(dict(images=images, annotations=annotations)))
    found = noisyclip.load_captions(path, ["b.png", "a.png", "b.png"])
    assert found == [["three"], ["one", "two"], ["three"]]
    message = refusal(noisyclip.load_captions, path, ["a.png", "c.png", "d.png"])
    assert "no caption for 2 of the 3 training images, c.png" in message
    for missing in ("None", str(tmp_path / "nowhere.json")):
        assert "--captions" in refusal(noisyclip.load_captions, missing, ["a.png"])


# ---------------------------------------------------------------------------- processes, parts
FEW = ["--steps", "3", "--warmup", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small cache and stitch, and a function that trains on them here."""
    out = tmp_path_factory.mktemp("run")
    before = {
        "01_cache_features": ["--limit", "40", "--probe", "8", "--batch", "20"],
        "02_fit_stitch": ["--i", "4", "--j", "1"],
    }
    for name, flags in before.items():
        stage = importlib.import_module(name)
        stage.main(stage.parse_args(["--out", str(out), *flags]))

    def train(*flags, stage=finetune):
        with mock.patch.object(common, "claim"):  # other processes are to run in this folder
            args = stage.parse_args([*FEW, "--out", str(out), *map(str, flags)])
        stage.main(args)

    return out, train


def logged(out, suffix=""):
    """The rows of a table, but for the time."""
    rows = json.loads((out / f"03_finetune{suffix}.json").read_text())["rows"]
    assert len(rows) == 3 and all(row["loss"] > 0 for row in rows) and "val_0.5" in rows[-1]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same(found, wanted):
    """The same losses and errors on held-out images, to rounding."""
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_processes_are_one(run):
    """Over gloo: --batch is of both together; the first alone writes."""
    out, train = run
    train("--front", "vae", "--batch", 16, "--value", out / "whole.pt")
    wanted, before = logged(out, "_vae"), set(out.iterdir())
    flags = ("--front", "vae", "--batch", 16, "--value", out / "two.pt")
    children.run_two("03_finetune", *FEW, "--out", out, *flags)
    assert_same(logged(out, "_vae"), wanted)
    assert set(out.iterdir()) - before == {out / "two.pt"}


@pytest.mark.slow
def test_accelerate_launches_two_processes(run):
    """Where there are no cards, its --multi_gpu starts two processes on the CPU."""
    out, train = run
    train("--batch", 16, "--restart")
    wanted = logged(out)
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 03_finetune.py"
    command = [
        sys.executable,
        "-m",
        *launch.split(),
        *FEW,
        "--out",
        str(out),
        "--batch",
        "16",
        "--restart",
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(common.ROOT))
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(logged(out), wanted)
    assert "2 processes" in done.stdout and done.stdout.count("wrote") == 3


def test_a_batch_that_processes_cannot_share_is_refused(run, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu: SimpleNamespace(num_processes=3))
    message = refusal(run[1], "--batch", 16)
    assert "--batch 16 cannot be shared equally by 3 processes" in message


def test_the_transformer_is_cut_before_it_is_moved(run, monkeypatch):
    """Of eight blocks the four that V needs, which --compile compiles; the tower's dtype is set."""
    moved = []
    compiled = []
    move = torch.nn.Module.to

    def spy(module, *args, **kwargs):
        moved.append(module)
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    flags = ["--out", str(run[0]), "--dtype", "bfloat16", "--compile"]
    model = finetune.load(finetune.parse_args(flags))[3]
    moved = [common.dit_blocks(m) for m in moved if hasattr(m, "transformer_blocks")]
    assert moved == [common.dit_blocks(model.transformer)] and len(moved[0]) == 4
    assert compiled == moved[0] and model.transformer.norm_out is None
    assert model.reward.dtype == model.transformer.dtype == torch.bfloat16
    assert model.stitch.F.weight.dtype == torch.float32
    without = finetune.load(finetune.parse_args([*flags[:2], "--front", "vae"]))[3]
    assert without.transformer is None and len(compiled) == 4


def test_parts_of_a_batch_are_the_batch(run):
    """Gradients of parts of 6, 6 and 4 images add up to those of 16."""
    out, train = run
    train("--batch", 16, "--restart")
    whole = logged(out)
    train("--batch", 16, "--micro-batch", 6, "--restart")
    assert_same(logged(out), whole)


def test_targets_are_the_same_computed_or_in_memory(run, monkeypatch):
    out, train = run
    train("--batch", 16, "--restart")
    whole = logged(out)
    monkeypatch.setattr(finetune, "KEPT_TARGETS", 0)
    train("--batch", 16, "--restart")
    assert_same(logged(out), whole)


def test_the_average_of_the_weights(run):
    """After one step the decay is .1, whatever --ema allows: .1 old + .9 new."""
    out, train = run
    paths = out / "last.pt", out / "average.pt"
    for path, ema in zip(paths, ("0", "0.9"), strict=True):
        train("--steps", 1, "--batch", 4, "--ema", ema, "--value", path)
    last, average = (torch.load(p, weights_only=True)["data"]["state"] for p in paths)
    args = finetune.parse_args(["--out", str(out)])
    first = finetune.load(args)[3].trained_state()
    assert last.keys() == average.keys() == first.keys()
    assert any(not torch.equal(last[k], first[k]) for k in first)
    for k, v in average.items():
        assert_close(v, 0.1 * first[k] + 0.9 * last[k])


def test_resume_goes_on_only_from_the_same_run(run, monkeypatch):
    """Without a checkpoint it says so; one of other flags is refused with both values."""
    out, train = run
    flags = ("--batch", 4, "--value", out / "other.pt")
    assert "other.train does not exist" in refusal(train, *flags, "--resume")
    write = finetune.save_training

    def stop(path, *rest):
        write(path, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_training", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*flags)
    with pytest.raises(SystemExit, match="does not fit this run\n(.|\n)*lam_tok +1.0 +0.5"):
        train(*flags, "--resume", "--lam-tok", 0.5)


def test_an_unfinished_run_is_not_thrown_away(run):
    """Without a flag that says so; nor is a finished value, until another is trained."""
    out, train = run
    flags = ("--front", "vae", "--batch", 4, "--steps", 1, "--value", out / "third.pt")
    left = out / "third.train"
    left.write_text("of an unfinished run")
    message = refusal(train, *flags)
    assert "third.train" in message and "--resume" in message and "--restart" in message
    assert left.read_text() == "of an unfinished run" and not (out / "third.pt").exists()
    with pytest.raises(SystemExit, match="cache.pt does not fit this run"):
        train(*flags, "--restart", "--resolution", 32)
    assert left.exists()
    train(*flags, "--restart")
    assert (out / "third.pt").exists() and not left.exists()
    assert "third.pt is trained already" in refusal(train, *flags)


def test_a_stitch_of_another_cache_is_refused(run, tmp_path):
    """Of the same folder's other images, say; and nothing is trained."""
    out, train = run
    cache = torch.load(out / "cache.pt", weights_only=True)
    cache["spec"]["images"] = "0" * 12
    torch.save(cache, tmp_path / "cache.pt")
    shutil.copy(out / "stitch.pt", tmp_path)
    with pytest.raises(SystemExit, match="stitch.pt does not fit this run\n(.|\n)*images +"):
        train("--out", tmp_path)


def test_other_weights_in_the_same_folder_are_refused(run, other_weights):
    """03 compares the transformer with the cache's, later stages with the value's; so the reward's.

    A VAE stitch reads no transformer.
    """
    out, train = run
    train("--batch", 4, "--steps", 1, "--value", out / "fourth.pt")
    backbone = common.Backbone("sd3.5-medium")
    reward = common.Reward("clip")
    common.load_value(out / "fourth.pt", backbone, reward)
    reward.visual.conv1.weight.data.neg_()
    with pytest.raises(SystemExit, match="fourth.pt does not fit this run\n.*\n +reward_weights "):
        common.load_value(out / "fourth.pt", backbone, reward)
    other_weights()
    with pytest.raises(SystemExit, match="cache.pt does not fit this run\n.*\n +transformer "):
        train("--batch", 4)
    backbone.free()
    with pytest.raises(SystemExit, match="fourth.pt does not fit this run\n.*\n +transformer "):
        common.load_value(out / "fourth.pt", backbone, common.Reward("clip"))
    train("--batch", 4, "--steps", 1, "--front", "vae", "--value", out / "fifth.pt")


def test_a_run_can_be_watched(run, tmp_path):
    """Losses at each logged row, validations where they are made."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, train = run
    flags = ("--front", "vae", "--value", out / "watched.pt", "--track", tmp_path)
    train("--batch", 4, *flags)
    read = EventAccumulator(str(tmp_path / "watched"))
    read.Reload()
    wanted = logged(out, "_vae")
    losses = [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in wanted]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == losses
    assert [e.step for e in read.Scalars("val_0.5")] == [3]


def test_a_contrast_needs_the_whole_batch(run, monkeypatch):
    """NoisyCLIP's other images are its negatives: neither parts nor processes give its loss."""
    out, train = run

    def contrast(*flags):
        train("--batch", 4, "--value", out / "noisyclip.pt", *flags, stage=noisyclip)

    assert "--micro-batch 0" in refusal(contrast, "--micro-batch", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it as one" in refusal(contrast)
    assert not (out / "noisyclip.pt").exists()


def test_exploded_weights_of_noisyclip_are_not_written(run):
    """Of the last step too, whose loss was of the weights before it."""
    out, train = run
    flags = ("--batch", 4, "--steps", 1, "--lr", "1e30", "--warmup", 0)
    flags += ("--value", out / "exploded.pt")
    assert "weights exploded by step 1" in refusal(partial(train, *flags, stage=noisyclip))
    assert not (out / "exploded.pt").exists() and not (out / "exploded.train").exists()


def test_noisyclip_resumed_gives_the_same_bits(run, one_thread, monkeypatch):
    """Stopped after its first checkpoint; the artefact is one that 04 reads."""
    out, train = run
    flags = ("--batch", 8, "--ema", 0.9, "--save-every", 1)
    train(*flags, "--value", out / "whole_clip.pt", stage=noisyclip)
    half = out / "half.pt"
    write = noisyclip.save_training

    def stop(path, *rest):
        write(path, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(noisyclip, "save_training", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*flags, "--value", half, stage=noisyclip)
    assert half.with_suffix(".train").exists() and not half.exists()
    train(*flags, "--value", half, "--resume", stage=noisyclip)
    whole, resumed = (torch.load(p, weights_only=True) for p in (out / "whole_clip.pt", half))
    spec = dict(front="vae", embedding="unit", objective="noisyclip")
    assert spec.items() <= resumed["spec"].items() and not half.with_suffix(".train").exists()
    states = [artifact["data"]["state"] for artifact in (whole, resumed)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
