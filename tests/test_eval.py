"""Stage 04: estimators, metrics and errors against closed forms and loops; its files; misuse."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import common

evaluate = importlib.import_module("04_eval_noisy")


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


# ---------------------------------------------------------------------------- rollouts
M, V = 0.7, 0.5  # z_0 ~ N(M, V) in one dimension, where everything is known


def z0_hat(z, t):
    """E[z_0 | z_t]."""
    return M + V * (1 - t) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)


def posterior_variance(t):
    return V * t * t / ((1 - t) ** 2 * V + t * t)


def propagate(step, t, mean, variance, steps=1000):
    """Mean and variance at 0 of a chain of affine steps z -> a z + b + c noise from t.

    a, b and c of a step are read off at three points.
    """
    nodes = np.linspace(t, 0, steps + 1).tolist()
    z, noise = torch.tensor([0.0, 1, 0]).double(), torch.tensor([0.0, 0, 1]).double()
    for a, b in zip(nodes[:-1], nodes[1:], strict=True):
        still, moved, noisy = step(z, a, b, noise).tolist()
        mean = (moved - still) * mean + still
        variance = (moved - still) ** 2 * variance + (noisy - still) ** 2
    return mean, variance


def ancestral(z, t, s, noise):
    return evaluate.ancestral_step(z, z0_hat(z, t), t, s, noise)


def sde(nu):
    return lambda z, t, s, noise: common.sde_step(z, (z - z0_hat(z, t)) / t, t, s, noise, nu)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75, 0.9])
def test_the_ancestral_chain_samples_the_posterior(t):
    """From one z_t to mean and variance of p(z_0 | z_t), as the SDE with nu^2 = 2t / (1-t)."""
    z = (1 - t) * M + 0.8
    mean, variance = propagate(ancestral, t, z, 0)
    assert mean == pytest.approx(z0_hat(z, t), rel=1e-6)
    assert variance == pytest.approx(posterior_variance(t), rel=0.01)
    exact = sde(lambda t: (2 * t / (1 - t)) ** 0.5)
    assert propagate(exact, t, z, 0) == pytest.approx((mean, variance), rel=0.02)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75, 0.9])
def test_the_sde_of_the_samplers_keeps_only_the_marginals(t):
    """With nu = 3t^2 all z_0 together are right, those from one z_t are not p(z_0 | z_t) [D15]."""
    z, step = (1 - t) * M + 0.8, sde(lambda t: 3 * t * t)
    marginal = propagate(step, t, (1 - t) * M, (1 - t) ** 2 * V + t * t)
    assert marginal == pytest.approx((M, V), rel=0.02)
    assert propagate(step, t, z, 0)[1] < 0.9 * posterior_variance(t)


def test_ancestral_step_ends_at_the_estimate_and_keeps_shapes():
    z, estimate, noise = torch.randn(3, 2, 4, 6, 5).unbind()
    assert_close(evaluate.ancestral_step(z, estimate, 0.4, 0.0, noise), estimate)
    assert evaluate.ancestral_step(z, estimate, 0.4, 0.2, noise).shape == z.shape


def to_the_nearer_mode(z, sigma, null):
    """The velocity of a distribution of two images, all 1 and all -1."""
    return (z - z.mean((1, 2, 3), keepdim=True).sign()) / sigma.view(-1, 1, 1, 1)


MODES = SimpleNamespace(velocity=to_the_nearer_mode, decode=lambda z: z)
FLAT = SimpleNamespace(embed=lambda x: (x.flatten(1), None))


def test_rollouts_stay_with_their_latent():
    """Every rollout ends in the mode of its own latent, whatever the batch; steps: below t."""
    sign = torch.tensor([1.0, -1, -1, 1, -1])
    z, grid = 8 * sign.view(5, 1, 1, 1).expand(5, 2, 3, 3), [1, 0.75, 0.5, 0.3, 0.1, 0]
    g = torch.Generator().manual_seed(0)
    out, steps = evaluate.rollout_embeddings(MODES, FLAT, None, z, 0.5, grid, 4, g, 3)
    assert steps == 3
    assert_close(out, sign.view(5, 1, 1).expand(5, 4, 18) / 18**0.5)


def test_tweedie_is_a_rollout_of_one_step():
    z, t = 8 * torch.randn(5, 2, 3, 3), torch.full((5,), 0.5)
    one, steps = evaluate.rollout_embeddings(MODES, FLAT, None, z, 0.5, [1, 0.5, 0], 1, None, 3)
    assert steps == 1
    assert_close(evaluate.tweedie_embed(MODES, FLAT, None, z, t), one[:, 0])


@pytest.fixture
def head():
    head = common.aesthetic_head(width=10)
    for p in head.parameters():
        p.normal_(0, p.shape[-1] ** -0.5)
    return head


@pytest.mark.parametrize("kind", ["text", "aesthetic"])
def test_the_mean_of_scores_is_the_score_of_the_mean(kind, head):
    """Why an estimator may be an embedding: Monte Carlo's is the rollouts' mean one, exactly."""
    e, text = unit(5, 32, 10), unit(10)
    reward = SimpleNamespace(head=head if kind == "aesthetic" else None)
    scores, of_mean = (common.Reward.score(reward, x, text) for x in (e, e.mean(1)))
    assert float(scores.std()) > 0.1
    assert_close(scores.mean(1), of_mean, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- metrics
def test_recall_at_1():
    """By loops, with one to four captions an image, shuffled: (image to text, text to image)."""
    image_of = torch.tensor([2, 0, 0, 1, 3, 3, 3, 1, 4, 0, 3])
    e = unit(5, 6)
    text = F.normalize(e[image_of] + 1.5 * unit(11, 6), dim=-1)
    score = [[float(e[k] @ text[m]) for m in range(11)] for k in range(5)]
    best_text = [max(range(11), key=lambda m, k=k: score[k][m]) for k in range(5)]
    best_image = [max(range(5), key=lambda k, m=m: score[k][m]) for m in range(11)]
    i2t, t2i = evaluate.recall_at_1(e @ text.T, image_of)
    assert i2t.tolist() == [float(image_of[best_text[k]] == k) for k in range(5)]
    assert t2i.tolist() == [float(best_image[m] == image_of[m]) for m in range(11)]
    assert 0 < t2i.mean() < 1 and 0 < i2t.mean() < 1  # so both kinds of answer are compared
    perfect = evaluate.recall_at_1(e @ e[image_of].T, image_of)
    assert [v.tolist() for v in perfect] == [[1.0] * 5, [1.0] * 11]
    i2t, t2i = evaluate.recall_at_1(e.roll(1, 0) @ e[image_of].T, image_of)
    assert i2t.sum() == 0 and t2i.sum() == 0


def test_hpdv2_accuracy():
    """1 in the human order, 0 in the reverse, a human tie is right in both; the rest by loops."""
    accuracy, ranks, tie = evaluate.hpdv2_accuracy, torch.tensor([2, 1, 4, 3]), torch.tensor([1, 1])
    assert accuracy(-ranks.float(), ranks) == 1 and accuracy(ranks.float(), ranks) == 0
    assert accuracy(torch.tensor([0.3, 0.1]), tie) == accuracy(torch.tensor([0.1, 0.3]), tie) == 1
    for _ in range(20):
        scores, ranks = torch.randn(6), torch.randint(1, 5, (6,))
        signs = [
            (scores[a] - scores[b]) * (ranks[a] - ranks[b]) for a in range(6) for b in range(a)
        ]
        opposite = sum(bool(sign > 0) for sign in signs)
        assert accuracy(scores, ranks) == pytest.approx(1 - opposite / 15)


def test_imagereward_accuracy():
    """(right, pairs): human ties are no pairs, equal scores are wrong; by loops for the rest."""
    accuracy, ranks = evaluate.imagereward_accuracy, torch.tensor([2, 1, 3])
    assert accuracy(-ranks.float(), ranks) == (3, 3) and accuracy(ranks.float(), ranks) == (0, 3)
    assert accuracy(torch.tensor([0.5, 0.2, 0.9]), torch.tensor([1, 1, 2])) == (0, 2)
    assert accuracy(torch.tensor([0.5, 0.5, 0.1]), torch.tensor([1, 2, 3])) == (2, 3)
    for _ in range(20):
        scores, ranks = torch.randint(4, (6,)), torch.randint(1, 5, (6,))
        pairs = [(a, b) for a in range(6) for b in range(6) if ranks[a] < ranks[b]]
        right = sum(bool(scores[a] > scores[b]) for a, b in pairs)
        assert accuracy(scores, ranks) == (right, len(pairs))


def test_calibration():
    """The slope is 1 where v = E[r | v], 1/2 where v is twice that, 0, not NaN, for a constant."""
    v = torch.tensor([0.0, 0, 1, 1, 3, 3])
    r = v + torch.tensor([1.0, -1, 2, -2, 0.5, -0.5])
    c = evaluate.calibration(v, r)
    a, b = np.array(v.tolist()), np.array(r.tolist())
    stds = dict(std_v=a.std(ddof=1), std_r=b.std(ddof=1))
    assert c == pytest.approx(dict(mean_v=a.mean(), mean_r=b.mean(), **stds, slope=1))
    assert evaluate.calibration(2 * v + 7, r)["slope"] == pytest.approx(0.5)
    assert evaluate.calibration(torch.ones(6), r)["slope"] == 0
    constant = torch.full((500,), 5.7853)  # whose mean differs from it by rounding
    assert evaluate.calibration(constant, torch.randn(500))["slope"] == 0


def voted(marks):
    """Rows of images that everybody gave this mark."""
    return [dict(votes=[7 * (k == mark) for k in range(1, 11)]) for mark in marks]


def test_the_correlation_ranks_ties_by_their_mean():
    rows, v = voted([1, 2, 2, 9]), torch.tensor([10.0, 20, 30, 40])
    found = evaluate.measure(rows, v, None)["srcc"]
    assert found == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    same = torch.tensor([1.0, 2, 2, 9])
    assert evaluate.measure(rows, same.exp(), None)["srcc"] == pytest.approx(1)
    assert evaluate.measure(rows, -same, None)["srcc"] == pytest.approx(-1)
    assert evaluate.measure(rows, torch.full((4,), 5.7853), None)["srcc"] is None


def test_votes_are_averaged_by_mark():
    """(2, 3 votes for 1 and 4) and (5, 1 for 2 and 3): 2.8 and 2.17."""
    rows = [dict(votes=[2, 0, 0, 3, *[0] * 6]), dict(votes=[0, 5, 1, 0, *[0] * 6]), *voted([2])]
    assert evaluate.measure(rows, torch.tensor([3.0, 2, 1]), None)["srcc"] == pytest.approx(1)
    assert evaluate.measure(rows, torch.tensor([2.0, 3, 1]), None)["srcc"] == pytest.approx(0.5)


def ones(x):
    """Units that are counted once each."""
    return torch.stack([x, torch.ones_like(x)], 1)


def test_summary_of_units():
    """Draws are averaged within a unit first: two draws of one image are not two images."""
    draws = [ones(torch.tensor([1.0, 0, 1, 1])), ones(torch.tensor([1.0, 0, 0, 1]))]
    spread = np.std([1, 0, 0.5, 1], ddof=1) / 2
    assert evaluate.summary(draws, 4) == pytest.approx((0.625, spread))
    assert evaluate.summary(draws[:1] * 5, 4) == pytest.approx(evaluate.summary(draws[:1], 4))
    assert evaluate.summary([draws[0][:1]], 1) == (1.0, None)


def test_summary_of_pooled_pairs():
    """Pooled over pairs, not a mean over prompts; the error is the jackknife's over prompts.

    Prompts have unequal numbers of pairs and differ, so binomial errors would be too small.
    """
    pairs = torch.randint(1, 30, (400,)).double()
    skill = 0.3 + 0.6 * torch.rand(400).double()
    draws = [torch.stack([torch.binomial(pairs, skill), pairs], 1) for _ in range(2)]
    right = ((draws[0] + draws[1]) / 2)[:, 0]
    value, se = evaluate.summary(draws, 400)
    assert value == pytest.approx(float(right.sum() / pairs.sum()))
    assert abs(value - float((right / pairs).mean())) > 1e-4
    without = (right.sum() - right) / (pairs.sum() - pairs)
    jackknife = float((399 / 400 * (without - without.mean()).square().sum()).sqrt())
    assert se == pytest.approx(jackknife, rel=0.03)


def test_summary_of_correlations():
    """Averaged over draws; a constant estimate has none."""
    assert evaluate.summary([0.4, 0.6], 26) == pytest.approx((0.5, 0.75 / 5))
    assert evaluate.summary([None, None], 26) == (None, None)


def ranked(ranks):
    """Rows of lists with these ranks, each with a prompt of its own."""
    lists = enumerate(ranks)
    return [dict(texts=[f"{g}"], group=g, rank=rank) for g, order in lists for rank in order]


def test_both_conventions_of_imagereward():
    """Pooled over pairs, as its authors count, and averaged over prompts, as HPSv2's do.

    A human tie is no pair, a prompt of ties no prompt; for HPDv2 a human tie counts as right.
    """
    rows = ranked([[1, 2], [1, 2, 3, 4], [1, 1, 2], [2, 2]])
    # right: 1 of 1 pairs, 2 of 6, 1 of 2, none of none
    matched = torch.tensor([1.0, 0, 2, 0, 1, 3, 5, 0, 1, 7, 8])
    first_text = torch.tensor([row["group"] for row in rows])
    scores = torch.randn(11, 4).scatter(1, first_text[:, None], matched[:, None])
    found = evaluate.measure(rows, scores, first_text)
    value = {k: evaluate.summary([v], 11)[0] for k, v in found.items()}
    by_prompt = (1 + 1 / 3 + 1 / 2) / 3
    hpdv2 = [1, 1 / 3, 2 / 3, 1]
    expected = dict(imagereward_accuracy=4 / 9, imagereward_accuracy_by_prompt=by_prompt)
    assert value == pytest.approx(expected | dict(hpdv2_accuracy=np.mean(hpdv2)))
    assert found["hpdv2_accuracy"][:, 0].tolist() == pytest.approx(hpdv2)


def test_a_few_images_are_no_gallery():
    """Monte Carlo's: all texts are asked for their images, but no text is asked for its image."""
    rows = [dict(texts=["a", "b"]), dict(texts=["c"]), dict(texts=["d"])]
    scores = torch.eye(3)[[0, 0, 1, 2]].T  # (3, 4), perfect
    assert list(evaluate.measure(rows, scores, None)) == ["recall@1_i2t", "recall@1_t2i"]
    found = evaluate.measure(rows, scores[:2], None)
    assert {k: v.tolist() for k, v in found.items()} == {"recall@1_i2t": [[1, 1], [1, 1]]}


# ---------------------------------------------------------------------------- errors
def test_errors_against_the_reference_are_unbiased():
    """Of rollout scores with known mean: (V - V*)^2 for outsiders, variance / n for the parts."""
    true, spread, rollouts = torch.randn(4000, 1), 0.7, 16
    samples = true[:, None] + spread * torch.randn(4000, rollouts, 1)
    halves = [samples[:, h::2].mean(1) for h in (0, 1)]
    r, first_text = true + spread * torch.randn(4000, 1), torch.zeros(4000, dtype=torch.long)
    outsider = evaluate.errors([true + 0.1], r, first_text, halves)
    assert outsider["reference_mse"] == pytest.approx(0.01, abs=0.002)
    assert outsider["reference_bias"] == pytest.approx(0.1, abs=0.01)
    assert outsider["value_mse_shared"] == pytest.approx(0.01 + spread**2, rel=0.08)
    assert outsider["value_mse_shared"] == pytest.approx(outsider["value_mse"])
    for n in (1, 4, 16):
        part = evaluate.errors([samples[:, :n].mean(1)], r, first_text, halves, part=True)
        assert part["reference_mse"] == pytest.approx(spread**2 / n, rel=0.08)


def test_shared_errors_are_of_the_first_latents_and_the_first_draw():
    r, halves = torch.zeros(6), [torch.ones(2), torch.ones(2)]
    draws = [torch.tensor([1.0, 3, 9, 9, 9, 9]), torch.zeros(6)]
    found = evaluate.errors(draws, r, None, halves)
    assert found["value_mse_shared"] == 5 and found["reference_bias"] == 1
    assert found["reference_mse"] == 2 and found["value_mse"] == pytest.approx(334 / 12)


def test_errors_average_draws_and_read_the_matched_pairs():
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    about = evaluate.errors([r, r + 2], r, torch.tensor([0, 1]))
    assert about["value_mse"] == pytest.approx(2.0) and about["slope"] == pytest.approx(1.0)
    assert about["matched_v"] == about["matched_r"] == 1.0
    assert "value_mse_shared" not in about


def test_monte_carlo_takes_whole_lists():
    lists = ranked([range(4), range(5), range(6)])
    assert [evaluate.first_images(lists, n) for n in (10, 2, 9, 15, 99)] == [9, 4, 9, 15, 15]
    assert [evaluate.first_images([dict(texts=["a"])] * 15, n) for n in (40, 7)] == [15, 7]


# ---------------------------------------------------------------------------- cost
def test_costs_of_values_and_rollouts(monkeypatch, capsys):
    """A value's own; N rollouts cost N times (steps of the denoiser, one decoding); else none."""
    clock = iter(np.cumsum([0.0] + [1.0, 0] * 100).tolist())
    monkeypatch.setattr(evaluate, "now", lambda device: next(clock))
    weights = {"stitchvm": torch.ones(3, 4), "denoiser": torch.ones(3, 40)}
    weights["decode and reward"] = torch.ones(3, 400)
    calls = {k: lambda z, sigma, w=w: z @ w for k, w in weights.items()}
    rows = [dict(method=m) for m in ("clean", "stitchvm")] + [dict(method="mc-4", rollout_steps=5)]
    evaluate.add_costs(rows, calls, torch.randn(8, 3))
    assert rows[0] == dict(method="clean", ms_per_value=None, gflop_per_value=None)
    assert [r["gflop_per_value"] for r in rows[1:]] == pytest.approx(
        [2 * 12e-9, 4 * (5 * 2 * 120e-9 + 2 * 1200e-9)]
    )
    assert rows[1]["ms_per_value"] == pytest.approx(125) and rows[1]["ms_spread"] == 0
    assert rows[2]["ms_per_value"] == pytest.approx(4 * 6 * 125)
    assert capsys.readouterr().out == ""


def test_a_busy_machine_is_named(monkeypatch, capsys):
    clock = iter(np.cumsum([0.0, *[x for k in range(50) for x in (1 + 5 * (k % 2), 0)]]).tolist())
    monkeypatch.setattr(evaluate, "now", lambda device: next(clock))
    calls = dict.fromkeys(("denoiser", "decode and reward"), lambda z, sigma: z @ torch.ones(3, 4))
    evaluate.add_costs([], {"stitchvm": calls["denoiser"]}, torch.randn(8, 3))
    assert "ms_per_value of stitchvm varies" in capsys.readouterr().out


# ---------------------------------------------------------------------------- files
def write(folder, name, rows, images=True):
    for k, row in enumerate(rows):
        row.setdefault("image", f"{name}_{k}.png")
        if images:
            Image.new("RGB", (20 + 4 * k, 40), (30 * k, 9, 9)).save(folder / row["image"])
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    votes, lists = voted([3, 1, 2]), ranked([[1, 2], [2, 1, 3]])
    pairs = [dict(texts=["a", "b"]), dict(texts=["c"])]
    named = dict(coco=pairs, hpdv2=lists, ava=votes, flickr30k=pairs[:1])
    return [write(tmp_path, name, rows) for name, rows in named.items()]


def reward_of(uses_text):
    return SimpleNamespace(uses_text=uses_text)


def arguments(files, reward="clip", limit=None):
    return SimpleNamespace(benchmarks=files, reward=reward, limit=limit)


@pytest.mark.parametrize(
    "reward, names",
    [("clip", ["coco", "flickr30k"]), ("x/hpsv2.1", ["hpdv2"]), ("aesthetic", ["ava"])],
)
def test_a_reward_gets_the_benchmarks_that_fit(files, reward, names):
    """In the order of the flag, with image paths from the file's folder."""
    uses_text = reward_of(reward != "aesthetic")
    found = evaluate.load_benchmarks(arguments(files, reward), uses_text)
    assert list(found) == names
    assert all(row["image"].exists() for rows in found.values() for row in rows)


def test_limit_keeps_whole_lists(files):
    def size(reward, limit):
        found = evaluate.load_benchmarks(arguments(files, reward, limit), reward_of(True))
        return [len(rows) for rows in found.values()]

    assert size("hpsv2", 4) == [2] and size("hpsv2", None) == [5]
    assert size("clip", 1) == [1, 1]


def test_benchmarks_that_cannot_be_read(files, tmp_path):
    call = evaluate.load_benchmarks
    for text in ("", "not JSON\n", '{"texts": ["a"]}\n', '{"image": "a.png"}\n', "7\n"):
        (tmp_path / "bad.jsonl").write_text(text)
        said = refusal(call, arguments([str(tmp_path / "bad.jsonl")]), reward_of(True))
        assert "bad.jsonl" in said and "tests/published/benchmarks.py" in said
    assert "nowhere" in refusal(call, arguments(["nowhere.jsonl"]), reward_of(True))
    for none in (None, files[2:3]):
        assert "--benchmarks" in refusal(call, arguments(none), reward_of(True))


def test_embed_batch(tmp_path):
    """Of each image the centre square for the backbone, the whole file for its authors' scores; at
    each sigma each method's draws, on the CPU; noise belongs to an image, not to its batch."""
    for k, (w, h) in enumerate([(40, 20), (16, 16), (12, 30)]):
        x, side = np.full((h, w, 3), 255, np.uint8), min(w, h)
        top, left = (h - side) // 2, (w - side) // 2
        x[top : top + side, left : left + side] = 50 * k
        Image.fromarray(x).save(tmp_path / f"{k}.png")
    rows = [dict(image=tmp_path / f"{k}.png", name=f"{k}.png") for k in range(3)]

    def transform(image):
        return torch.tensor([image.width, image.height, 0.0])

    seen = []
    backbone = SimpleNamespace(device=torch.device("cpu"), encode=lambda x: seen.append(x) or x)
    visual = SimpleNamespace(
        transform=transform, visual=lambda x: x, embed=lambda x: (x.flatten(1), None)
    )
    given = "coco", backbone, visual, dict(mine=lambda z, t: z.flatten(1)), None
    args = SimpleNamespace(resolution=8, draws=2, seed=0)
    found = evaluate.embed_batch(rows, *given, args)
    z0 = seen[0]
    assert z0.shape == (3, 3, 8, 8) and float(z0.max()) <= 1
    grey = torch.tensor([0, 50, 100]).view(3, 1, 1, 1) / 255
    assert_close(z0[..., 2:6, 2:6], grey.expand(3, 3, 4, 4))
    assert_close(found["e_rm"], F.normalize(z0.flatten(1), dim=-1))
    whole = torch.tensor([[40.0, 20, 0], [16, 16, 0], [12, 30, 0]])
    assert_close(found["clean"], F.normalize(whole, dim=-1))
    noisy = found[0.5]["mine"]
    assert noisy.shape == (3, 2, 192) and not torch.equal(noisy[:, 0], noisy[:, 1])
    eps = 2 * noisy - z0.flatten(1)[:, None]
    assert float(eps.mean()) == pytest.approx(0, abs=0.1) and 0.9 < float(eps.std()) < 1.1
    assert_close(evaluate.embed_batch(rows[1:2], *given, args)[0.5]["mine"], noisy[1:2])
    (tmp_path / "1.png").unlink()
    assert "1.png" in refusal(evaluate.embed_batch, rows, *given, args)


def test_a_texts_image_is_found_among_unit_embeddings():
    """The mean embedding of an image of which V is less sure is shorter: that is no worse match."""
    rows = [dict(texts=["a"]), dict(texts=["b"])]
    e = torch.tensor([[1.0, 0.8], [0.0, 0.4]])  # the second image is noisier
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    norms = e.norm(dim=1, keepdim=True)
    found = evaluate.measure(rows, e @ text.T, None, norms)
    assert found["recall@1_t2i"][:, 0].tolist() == [1, 0]
    e[1] = torch.tensor([0.3, 0.4])  # parallel to its text, half as long as a unit vector
    assert evaluate.measure(rows, e @ text.T, None)["recall@1_t2i"][1, 0] == 0
    norms = e.norm(dim=1, keepdim=True)
    assert evaluate.measure(rows, e @ text.T, None, norms)["recall@1_t2i"][1, 0] == 1


# ---------------------------------------------------------------------------- a short run
COCO = ["--benchmarks", "tests/mini/data/coco.jsonl"]
FAST = dict(limit=6, draws=1, mc_images=2, rollouts=2, rollout_steps=3)


def run(out, *flags):
    args = evaluate.parse_args(["--out", str(out), *map(str, flags)])
    for name, value in FAST.items():
        setattr(args, name, min(value, getattr(args, name) or value))
    evaluate.main(args)
    return json.loads((out / "04_eval_noisy.json").read_text())


@pytest.fixture(scope="module")
def coco(tmp_path_factory, values):
    out = tmp_path_factory.mktemp("coco")
    benchmarks = [f"tests/mini/data/{name}.jsonl" for name in ("coco", "ava", "flickr30k")]
    return out, run(out, "--value", values["clip"], "--benchmarks", *benchmarks)


def test_the_table_of_a_run(coco):
    out, table = coco
    rows = table["rows"]
    assert {r["benchmark"] for r in rows} == {"coco", "flickr30k"}
    methods = {"clean", "constant", "stitchvm", "tweedie", "mc-1", "mc-2"}
    assert {r["method"] for r in rows if r["benchmark"] == "coco"} == methods
    assert {r["method"] for r in rows if r["benchmark"] == "flickr30k"} == methods - {
        "mc-1",
        "mc-2",
    }
    assert [(v["method"], v["stage"]) for v in table["values"]] == [("stitchvm", "03_finetune")]
    for r in rows:
        assert r["n"] == (2 if r["method"].startswith("mc-") else 6) and r["draws"] == 1
        assert (r["gflop_per_value"] is None) is (r["method"] in ("clean", "constant"))
        assert ("value_mse" in r) is (r["method"] != "clean")
        assert ("reference_mse" in r) is (r["benchmark"] == "coco" and r["method"] != "clean")
    cost = {(r["method"], r["sigma"]): r["gflop_per_value"] for r in rows}
    assert cost["mc-2", 0.9] == pytest.approx(2 * cost["mc-1", 0.9])
    assert cost["stitchvm", 0.5] < cost["tweedie", 0.5] < cost["mc-1", 0.5]
    for picture in ("04_quality.png", "04_cost.png"):
        assert (out / picture).stat().st_size > 5000


def test_a_run_is_repeated_to_the_same_figures(coco, values, tmp_path):
    """Batches change nothing but the last bits; without Monte Carlo the rest stays as it was."""
    flags = [*COCO, "--methods", "stitchvm", "tweedie", "--batch", "4"]
    again = run(tmp_path, "--value", values["clip"], *flags)["rows"]
    before = [r for r in coco[1]["rows"] if r["benchmark"] == "coco"]
    shared = {(r["method"], r["sigma"], r["metric"]): r for r in before}
    assert len(again) == 32
    for r in again:
        old = shared[r["method"], r["sigma"], r["metric"]]
        assert r["value"] == old["value"] and "reference_mse" not in r
        if r["method"] != "clean":
            assert r["value_mse"] == pytest.approx(old["value_mse"], rel=1e-4)


def test_compile_is_asked_of_every_block(coco, values, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    flags = ["--value", values["clip"], *COCO, "--methods", "stitchvm", "--limit", 2, "--compile"]
    assert len(run(tmp_path, *flags)["rows"]) == 22 and len(compiled) == 8


def test_the_table_outlives_what_comes_after_it(values, tmp_path, monkeypatch):
    """A failure while costs are measured leaves the values on the disk."""
    monkeypatch.setattr(evaluate, "add_costs", lambda *args: 1 / 0)
    flags = [*COCO, "--methods", "stitchvm"]
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "--value", values["clip"], *flags)
    rows = json.loads((tmp_path / "04_eval_noisy.json").read_text())["rows"]
    assert {r["method"] for r in rows} == {"clean", "constant", "stitchvm"}


def test_a_run_that_was_cut_off_goes_on(values, tmp_path, monkeypatch):
    """Finished batches are not embedded again; other flags are refused; the same table."""
    flags = ["--value", values["clip"], *COCO, "--methods", "stitchvm", "mc", "--batch", 2]
    whole = run(tmp_path / "whole", *flags)["rows"]
    embed = evaluate.embed_batch
    done = []

    def cut(rows, *given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(rows))
        return embed(rows, *given)

    monkeypatch.setattr(evaluate, "embed_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *flags)
    parts = tmp_path / "04_eval_noisy.parts"
    assert sorted(p.name for p in parts.iterdir()) == ["coco_000000.pt", "coco_000002.pt"]
    done.clear()
    assert "--resume, or drop it with --restart" in refusal(run, tmp_path, *flags)
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*seed"):
        run(tmp_path, *flags, "--resume", "--seed", 1)
    again = run(tmp_path, *flags, "--resume")["rows"]
    assert done == [2] and not parts.exists()
    seconds = {"ms_per_value", "ms_spread"}
    for row, wanted in zip(again, whole, strict=True):
        assert {k: v for k, v in row.items() if k not in seconds} == {
            k: v for k, v in wanted.items() if k not in seconds
        }


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"image": "a.png", "votes": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]}', "line 1 has no good votes"),
        ('{"image": "a.png", "votes": [1, 2, 3, 4, 5, 6, 7, 8, 9]}', "line 1 has no good votes"),
        ('{"image": "a.png", "votes": [2, -1, 0, 0, 0, 0, 0, 0, 0, 0]}', "1 has no good votes"),
        ('{"image": "a.png", "texts": []}', "line 1 has no good texts"),
        ('{"image": "a.png", "texts": "a red circle"}', "line 1 has no good texts"),
        ('{"image": "a.png", "texts": [null]}', "line 1 has no good texts"),
        ('{"image": "b.png", "texts": ["x"]}', "line 1: there is no "),
        ('{"image": "a.png", "texts": ["x"], "group": 0, "rank": 1}', "alone in its list"),
    ],
)
def test_rows_that_nothing_can_be_measured_on(tmp_path, line, said):
    """They would be NaN, or a division by zero after hours; blank lines are none."""
    (tmp_path / "b.jsonl").write_text("\ufeff" + line + "\r\n\r\n", encoding="utf-8")
    arguments_ = arguments([str(tmp_path / "b.jsonl")])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert said in refusal(evaluate.load_benchmarks, arguments_, reward_of(True))


def test_lists_in_pieces_and_files_of_one_name_are_refused(tmp_path):
    """A list that --limit cuts is no list; the second file's rows would replace the first's."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = dict(image="a.png", texts=["x"], rank=1)
    lines = [json.dumps(row | dict(group=group)) for group in (0, 1, 0, 1)]
    first = tmp_path / "b.jsonl"
    first.write_text("\n".join(lines))
    asked = arguments([str(first)]), reward_of(True)
    assert "do not follow each other" in refusal(evaluate.load_benchmarks, *asked)
    first.write_text("\n".join(sorted(lines)))
    asked = arguments([str(first), str(first)]), reward_of(True)
    assert "two files of one name" in refusal(evaluate.load_benchmarks, *asked)


def test_ranked_lists_and_votes(values, tmp_path):
    """All three accuracies of both lists, whole lists only; Spearman's of the aesthetic reward."""
    flags = ["--reward", "hpsv2", "--value", values["hpsv2"], "--methods", "stitchvm", "mc"]
    ranked = run(tmp_path, *flags)["rows"]
    metrics = {"hpdv2_accuracy", "imagereward_accuracy", "imagereward_accuracy_by_prompt"}
    assert {r["metric"] for r in ranked if r["benchmark"] == "hpdv2"} == metrics
    assert {r["benchmark"] for r in ranked} == {"hpdv2", "imagereward"}
    assert {r["n"] for r in ranked if r["benchmark"] == "hpdv2"} == {4}
    constant = [r for r in ranked if r["method"] == "constant" and "image" in r["metric"]]
    assert constant and all(r["value"] == 0 for r in constant)  # equal scores are wrong
    votes = run(tmp_path, "--reward", "aesthetic", "--methods", "tweedie")["rows"]
    assert {r["metric"] for r in votes} == {"srcc"} and {r["benchmark"] for r in votes} == {"ava"}
    assert all(r["value"] is None for r in votes if r["method"] == "constant")


def test_misuse(values, tmp_path, monkeypatch):
    assert "argument --rollouts: 1 does not lie" in refusal(run, tmp_path, "--rollouts", 1)
    assert "03_finetune.py" in refusal(run, tmp_path, "--methods", "stitchvm")
    monkeypatch.setattr(evaluate, "tweedie", lambda z, u, t: z * float("nan"))
    said = refusal(run, tmp_path, "--methods", "tweedie")
    assert "tweedie gives NaN" in said and "--dtype float32" in said


def test_a_missing_baseline_is_named(values, tmp_path, capsys):
    flags = [*COCO, "--methods", "vae-stitch", "noisyclip"]
    rows = run(tmp_path, *flags)["rows"]
    assert {r["method"] for r in rows} == {"clean", "constant"}
    said = capsys.readouterr().out
    assert "value_vae.pt" in said and "03_finetune.py --front vae --out" in said
    assert "value_noisyclip.pt" in said and "tests/studies/noisyclip.py --out" in said
