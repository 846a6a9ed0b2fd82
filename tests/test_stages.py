"""The algorithm functions of stages 01 to 04, against brute force, closed forms and the library's own blocks: seconds, nothing is trained."""
import importlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import common

cache, fit, finetune, evaluate = (importlib.import_module(name) for name in ("01_cache_features", "02_fit_stitch", "03_finetune", "04_eval_noisy"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


# ---------------------------------------------------------------------------- 01: features
@pytest.fixture(scope="module")
def sd3():
    """Four random SD3 blocks, on a 10 x 6 latent (5 x 3 tokens), so that rows and columns cannot be confused."""
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8, dual_attention_layers=(0, 1),
        qk_norm="rms_norm").eval().requires_grad_(False)


@pytest.mark.parametrize("grid, antialias", [((5, 3), False), ((4, 4), False), ((2, 2), True)])
def test_dit_features_are_the_librarys_block_outputs(sd3, grid, antialias):
    """Row i-1 is what the library's own forward has after its i-th block, resampled: no off-by-one, no transposed grid, sigma scaled."""
    z, t, null = torch.randn(3, 16, 10, 6), torch.rand(3), (torch.randn(1, 5, 24), torch.randn(1, 20))
    seen = []
    hooks = [b.register_forward_hook(lambda block, inputs, output: seen.append(output[1])) for b in sd3.transformer_blocks]
    sd3(z, null[0].expand(3, -1, -1), null[1].expand(3, -1), t * 1000)
    for hook in hooks:
        hook.remove()
    out = cache.dit_features(sd3, z, t, null, grid, antialias)
    assert out.shape == (4, 3, grid[0] * grid[1], 32)
    for i, h in enumerate(seen):
        h = h.view(3, 5, 3, 32).permute(0, 3, 1, 2)
        if grid != (5, 3):
            h = F.interpolate(h, grid, mode="bilinear", align_corners=False, antialias=antialias)
        assert_close(out[i], h.permute(0, 2, 3, 1).reshape(3, -1, 32), rtol=1e-4, atol=1e-5)
    assert len(seen) == 4


def colour(k):
    return (30 * k, 255 - 30 * k, 7 * k)


def write_images(folder):
    """0.png .. 6.png, each of its own colour; 2 is text, 3 is cut in the middle, 5 does not exist."""
    for k in (0, 1, 4, 6):
        Image.new("RGB", (20 + 4 * k, 40), colour(k)).save(folder / f"{k}.png")
    (folder / "2.png").write_text("not an image\nat all")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "3.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:5000])
    return [f"{k}.png" for k in range(7)]


def test_read_square(tmp_path):
    write_images(tmp_path)
    x = cache.read_square(tmp_path / "4.png", 16)
    assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and (x == torch.tensor(colour(4)).view(3, 1, 1)).all()
    for name, kind in (("2.png", "UnidentifiedImageError"), ("3.png", ""), ("5.png", "FileNotFoundError")):
        reason = cache.read_square(tmp_path / name, 16)
        assert isinstance(reason, str) and reason.partition(": ")[0].startswith(kind) and reason.partition(": ")[2] and "\n" not in reason


class Bar:
    n = 0

    def update(self, n):
        self.n += n


STUBS = SimpleNamespace(encode_image=lambda x: F.avg_pool2d(x, 8)), SimpleNamespace(resize=lambda x: x[..., :4, :4])


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_encode_files_skips_and_names_what_it_cannot_read(tmp_path, batch):
    """Every row belongs to the name beside it, whatever the batch; an unreadable file leaves no row, and no other file takes its place."""
    names, bar = write_images(tmp_path), Bar()
    z0, pixels, good, bad = cache.encode_files(tmp_path, names, *STUBS, 16, batch, bar)
    assert good == ["0.png", "1.png", "4.png", "6.png"] and sorted(bad) == ["2.png", "3.png", "5.png"] and bar.n == 7
    assert bad["5.png"].startswith("FileNotFoundError: ")
    colours = torch.tensor([colour(k) for k in (0, 1, 4, 6)]).view(4, 3, 1, 1)
    assert z0.dtype == torch.float16 and pixels.dtype == torch.uint8
    assert_close(z0.float(), (colours / 255).expand(4, 3, 2, 2), rtol=0, atol=1e-3)
    assert torch.equal(pixels, colours.expand(4, 3, 4, 4).to(torch.uint8))


def test_encode_files_when_none_can_be_read(tmp_path):
    write_images(tmp_path)
    z0, pixels, good, bad = cache.encode_files(tmp_path, ["2.png", "5.png"], *STUBS, 16, 2, Bar())
    assert z0 is None and pixels is None and good == [] and sorted(bad) == ["2.png", "5.png"]


# ---------------------------------------------------------------------------- 02: the closed-form stitch
def planted(M=300, D=12, d=7):
    return torch.randn(M, D).double(), torch.randn(d, D).double(), torch.randn(d).double()


def with_ones(X):
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def test_fit_recovers_a_planted_stitch():
    X, W, b = planted()
    W_fit, b_fit, rank = fit.fit_linear_stitch(X, X @ W.T + b)
    assert_close(W_fit, W, rtol=0, atol=1e-10)
    assert_close(b_fit, b, rtol=0, atol=1e-10)
    assert rank == 13 and fit.stitch_loss(W_fit, b_fit, X, X @ W.T + b)[1] < 1e-20


@pytest.mark.parametrize("M", [300, 9], ids=["more tokens than features", "fewer"])
def test_fit_is_the_pseudo_inverse(M):
    """(62): with noise in the target, and the smallest solution where there are many."""
    X, W, b = planted(M)
    G = X @ W.T + b + torch.randn(M, 7).double()
    W_fit, b_fit, rank = fit.fit_linear_stitch(X, G)
    expected = torch.linalg.pinv(with_ones(X), rtol=1e-6) @ G
    assert_close(torch.cat([W_fit, b_fit[:, None]], 1), expected.T, rtol=1e-8, atol=1e-9)
    assert rank == min(M, 13)


def test_fit_is_bounded_on_rank_deficient_features():
    """Features of rank 5 in 12 dimensions, rounded to float32: the default cut-off would invert the rounding; the rank tells [D7]."""
    X = (torch.randn(300, 5).double() @ torch.randn(5, 12).double()).float()
    G = torch.randn(300, 7)
    W, b, rank = fit.fit_linear_stitch(X, G)
    assert rank == 6 and W.abs().max() < 1
    careless = torch.linalg.lstsq(with_ones(X.double()), G.double(), driver="gelsd").solution
    assert careless.abs().max() > 1e4
    assert fit.fit_linear_stitch(X, G, rcond=1e-15)[0].abs().max() > 1e4  # so it is rcond that protects


def test_stitch_loss():
    """Both losses by loops, on float32 features as they are cached."""
    X, W, b = planted(20)
    X, G = X.float(), torch.randn(20, 7)
    error = spread = 0.0
    for m in range(20):
        for k in range(7):
            y = sum(W[k, n].item() * X[m, n].item() for n in range(12)) + b[k].item()
            error += (y - G[m, k].item()) ** 2 / 20
            spread += (G[m, k].item() - sum(G[:, k].tolist()) / 20) ** 2 / 20
    assert fit.stitch_loss(W, b, X, G) == pytest.approx((error, error / spread), rel=1e-9)


def test_relative_loss_of_the_mean_is_one():
    """At any scale and offset of the target: what makes depths comparable [D5]."""
    G = torch.randn(50, 7) * 40 + 100
    loss, relative = fit.stitch_loss(torch.zeros(7, 12).double(), G.double().mean(0), torch.randn(50, 12), G)
    assert relative == pytest.approx(1, rel=1e-12) and loss == pytest.approx(float(G.double().var(0, correction=0).sum()))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (9, 7)], ids=["down", "up"])
def test_fitting_and_resampling_commute(grid, antialias):
    """Up o F = F o Up: the loss of the fit on resampled features is the loss of the stitching layer on the features themselves."""
    h, target = torch.randn(6, 12, 8, 5), torch.randn(6, grid[0] * grid[1], 7)
    X, G = common.to_tokens(common.resample(h, grid, antialias)).flatten(0, 1), target.flatten(0, 1)
    W, b, _ = fit.fit_linear_stitch(X, G)
    with torch.no_grad():
        y = common.to_tokens(common.Stitch(W.float(), b.float(), grid, antialias)(h)).flatten(0, 1)
    assert_close(y.double(), X.double() @ W.T + b, rtol=0, atol=1e-5)
    assert float((y - G).square().sum(1).mean()) == pytest.approx(fit.stitch_loss(W, b, X, G)[0], rel=1e-5)


# ---------------------------------------------------------------------------- 03: losses
def test_distill_loss_by_hand():
    """(78): a sum over the embedding, a mean over the tokens' elements, both means over the batch."""
    e, e_rm = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    h, h_rm = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    loss, parts = finetune.distill_loss(e, h, e_rm, h_rm, lam_tok=0.5)
    assert float(parts["embedding"]) == pytest.approx((2 + 1) / 2) and float(parts["tokens"]) == pytest.approx((4 + 9) / 4)
    assert float(loss) == pytest.approx(1.5 + 0.5 * 3.25)


def test_distill_loss_is_zero_only_at_the_target():
    e, h = unit(4, 6), torch.randn(4, 3, 5)
    assert float(finetune.distill_loss(e, h, e, h)[0]) == 0
    assert float(finetune.distill_loss(e.roll(1, 0), h, e, h)[0]) > 0 and float(finetune.distill_loss(e, h.roll(1, 1), e, h)[0]) > 0


def test_distill_loss_gradient():
    """It points from the target to the estimate: 2 (e - e_RM) / B and 2 lam (h - h_RM) / elements; the targets are not moved."""
    e, h, e_rm, h_rm = unit(4, 6).requires_grad_(), torch.randn(4, 3, 5).requires_grad_(), unit(4, 6), torch.randn(4, 3, 5)
    finetune.distill_loss(e, h, e_rm, h_rm, 0.7)[0].backward()
    assert_close(e.grad, 2 * (e - e_rm).detach() / 4)
    assert_close(h.grad, 0.7 * 2 * (h - h_rm).detach() / 60)


def test_proposition_1_and_why_the_embedding_is_not_normalised():
    """The best single e for many targets is their mean, so <e, text> is the mean score; the best unit vector overstates it by 1/|mean| [D14]."""
    e_rm, h, text = F.normalize(torch.randn(64, 8) + 0.5, dim=-1), torch.zeros(64, 1, 1), unit(8)
    loss = lambda e: finetune.distill_loss(e.expand_as(e_rm), h, e_rm, h)[1]["embedding"]
    mean, length = e_rm.mean(0), float(e_rm.mean(0).norm())
    e = torch.randn(8, requires_grad=True)
    best = (e - torch.autograd.grad(loss(e), e)[0] / 2).detach()  # a quadratic of curvature 2: one Newton step lands on the minimiser
    assert_close(best, mean, rtol=0, atol=1e-6)
    assert float(best @ text) == pytest.approx(float((e_rm @ text).mean()), abs=1e-6)
    raw = torch.randn(8, requires_grad=True)
    for _ in range(400):
        raw = (raw - 0.5 * torch.autograd.grad(loss(F.normalize(raw, dim=-1)), raw)[0]).detach().requires_grad_()
    best_unit = F.normalize(raw, dim=-1).detach()
    assert length < 0.8 and float(loss(best_unit) - loss(mean)) == pytest.approx((1 - length) ** 2, rel=1e-3)
    assert float(best_unit @ text) == pytest.approx(float((e_rm @ text).mean()) / length, rel=1e-2)


def test_aesthetic_loss_by_hand():
    """(79): d^2 / 2 up to 1 and |d| - 1/2 beyond, a mean over the elements, weights 1."""
    e, h, score = torch.tensor([[0.0, 0.0]]), torch.tensor([[[0.0], [0.0]]]), torch.tensor([5.0])
    loss, parts = finetune.aesthetic_loss(e, h, score, torch.tensor([[0.6, -0.8]]), torch.tensor([[[3.0], [-0.2]]]), torch.tensor([7.0]))
    expected = dict(embedding=(0.18 + 0.32) / 2, tokens=(2.5 + 0.02) / 2, score=1.5)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(expected) and float(loss) == pytest.approx(sum(expected.values()))
    assert float(finetune.aesthetic_loss(e, h, score, e, h, score)[0]) == 0


def contrastive(e, text, ids, scale):
    """The symmetric loss by loops: each row's target is uniform over the columns with its own text."""
    total = 0.0
    for left, right in ((e, text), (text, e)):
        for a in range(len(ids)):
            logits = [scale * float(left[a] @ right[b]) for b in range(len(ids))]
            log_sum = math.log(sum(map(math.exp, logits)))
            own = [b for b in range(len(ids)) if ids[b] == ids[a]]
            total -= sum(logits[b] - log_sum for b in own) / len(own) / len(ids) / 2
    return total


def test_noisyclip_loss_of_distinct_texts_is_clips():
    e, text = unit(6, 16), unit(6, 16)
    logits = 10 * e @ text.T
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    assert_close(finetune.noisyclip_loss(e, text, 10)[0], expected)
    assert float(expected) == pytest.approx(contrastive(e, text, range(6), 10), rel=1e-5)


def test_noisyclip_loss_has_no_equal_texts_among_its_negatives():
    """Against loops that leave images of the same text out of the denominator, but for the image itself."""
    e, ids = unit(6, 16), [0, 1, 1, 2, 0, 0]
    text = unit(3, 16)[ids]
    logits, expected = (10 * e @ text.T).double(), 0.0
    for a in range(6):
        others = [b for b in range(6) if b == a or ids[b] != ids[a]]
        expected -= (logits[a, a] - logits[a, others].logsumexp(0)) / 12 + (logits[a, a] - logits[others, a].logsumexp(0)) / 12
    assert float(finetune.noisyclip_loss(e, text, 10)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_noisyclip_loss_prefers_the_right_pairs():
    text = unit(6, 16)
    loss = lambda order: float(finetune.noisyclip_loss(text[order], text, 10)[0])
    assert loss([0, 1, 2, 3, 4, 5]) + 0.5 < loss([1, 0, 2, 3, 4, 5]) < loss([1, 2, 3, 4, 5, 0])


# ---------------------------------------------------------------------------- 03: noise levels, rates, data
@pytest.mark.parametrize("law, below_quarter, spread, density", [("logit-normal", 0.5 * math.erfc(math.log(3) / 2 ** 0.5), 0.2083, 1.5958), ("uniform", 0.25, 12 ** -0.5, 1.0)])
def test_sample_sigma(law, below_quarter, spread, density):
    """[D2] Range, mean, median, spread and lower tail within four standard errors of theory; the same for the same seed."""
    n = 40000
    s = finetune.sample_sigma(n, law, torch.Generator().manual_seed(3)).double()
    assert s.shape == (n,) and 0 <= s.min() < 0.05 and 0.95 < s.max() < 1
    assert abs(s.mean() - 0.5) < 4 * spread / n ** 0.5
    assert abs(s.median() - 0.5) < 4 / (2 * density * n ** 0.5)
    assert abs((s < 0.25).double().mean() - below_quarter) < 4 * (below_quarter * (1 - below_quarter) / n) ** 0.5
    assert float(s.std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(s, finetune.sample_sigma(n, law, torch.Generator().manual_seed(3)).double())
    assert not torch.equal(s, finetune.sample_sigma(n, law, torch.Generator().manual_seed(4)).double())


def test_learning_rate():
    """Linear from 1/warmup to 1, then constant; the cosine is half way down in the middle and reaches zero at the end, not before."""
    rate = lambda step, warmup=10, schedule="constant", steps=100: finetune.learning_rate(step, steps, warmup, schedule)
    assert [rate(k) for k in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert rate(0, warmup=0) == 1
    assert [rate(k, 0, "cosine") for k in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert 0 < rate(99, 10, "cosine") < 1e-3
    falling = [rate(k, 10, "cosine") for k in range(9, 100)]
    assert all(a > b for a, b in zip(falling, falling[1:])) and rate(0, 10, "cosine") == pytest.approx(0.1)


@pytest.fixture
def shards(tmp_path):
    """Three shards of 3, 1 and 4 images: (the folder, its list, everything in one piece)."""
    whole = dict(z0=torch.randn(8, 2, 3, 3).half(), pixels=torch.randint(256, (8, 3, 2, 2), dtype=torch.uint8), names=[f"{k}.png" for k in range(8)])
    (tmp_path / "cache").mkdir()
    listed = []
    for k, (a, b) in enumerate([(0, 3), (3, 4), (4, 8)]):
        listed.append(dict(file=f"cache/shard_{k:05d}.pt", images=b - a))
        torch.save({n: v[a:b] for n, v in whole.items()}, tmp_path / listed[-1]["file"])
    return tmp_path, listed, whole


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3, 5, 2], [6, 6, 3, 0, 3, 7, 0], [5], [3, 3, 3]], ids=str)
def test_cached_rows_keep_the_order_of_the_index(shards, index):
    """Across shards, unsorted and repeated; a latent stays with its pixels."""
    out, listed, whole = shards
    data = finetune.Cached(out, listed)
    z0, pixels = data.rows(torch.tensor(index), "z0", "pixels")
    assert torch.equal(z0, whole["z0"][index]) and torch.equal(pixels, whole["pixels"][index])
    assert len(data) == 8 and data.names() == whole["names"]


def test_cached_names_a_missing_shard(shards):
    out, listed, _ = shards
    (out / listed[1]["file"]).unlink()
    with pytest.raises(SystemExit, match="shard_00001.pt is missing.*01_cache_features.py"):
        finetune.Cached(out, listed)


def coco(path, captions):
    """A COCO-style file from [(image id, file name, captions)]; annotations are in reverse order of the images, as order means nothing."""
    path.write_text(json.dumps(dict(images=[dict(id=i, file_name=n) for i, n, _ in captions],
                                    annotations=[dict(image_id=i, caption=c) for i, _, cs in captions[::-1] for c in cs])))
    return str(path)


def test_load_captions(tmp_path):
    path = coco(tmp_path / "c.json", [(9, "a.png", ["one", "two"]), (2, "b.png", ["three"]), (5, "c.png", [])])
    assert finetune.load_captions(path, ["b.png", "a.png", "b.png"]) == [["three"], ["one", "two"], ["three"]]
    with pytest.raises(SystemExit, match="no caption for 2 of the 3 training images, c.png"):
        finetune.load_captions(path, ["a.png", "c.png", "d.png"])
    for missing in (None, str(tmp_path / "nowhere.json")):
        with pytest.raises(SystemExit, match="--captions"):
            finetune.load_captions(missing, ["a.png"])


# ---------------------------------------------------------------------------- 04: rollouts
M, V = 0.7, 0.5  # z_0 ~ N(M, V) in one dimension, where everything is known


def z0_hat(z, t):
    """E[z_0 | z_t]."""
    return M + V * (1 - t) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)


def posterior_variance(t):
    return V * t * t / ((1 - t) ** 2 * V + t * t)


def propagate(step, t, mean, variance, steps=1000):
    """Mean and variance at 0 of a chain of affine steps z -> a z + b + c noise from t, whose a, b, c are read off at three points."""
    nodes = np.linspace(t, 0, steps + 1).tolist()
    for a, b in zip(nodes[:-1], nodes[1:]):
        still, moved, noisy = step(torch.tensor([0.0, 1.0, 0.0]).double(), a, b, torch.tensor([0.0, 0.0, 1.0]).double()).tolist()
        mean, variance = (moved - still) * mean + still, (moved - still) ** 2 * variance + (noisy - still) ** 2
    return mean, variance


def ancestral(z, t, s, noise):
    return evaluate.ancestral_step(z, z0_hat(z, t), t, s, noise)


def sde(nu):
    return lambda z, t, s, noise: common.sde_step(z, (z - z0_hat(z, t)) / t, t, s, noise, nu)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75, 0.9])
def test_the_ancestral_chain_samples_the_posterior(t):
    """From one z_t to z_0: mean and variance of p(z_0 | z_t), as the mean of r over rollouts needs; so does the SDE with nu^2 = 2t / (1-t)."""
    z = (1 - t) * M + 0.8
    mean, variance = propagate(ancestral, t, z, 0)
    assert mean == pytest.approx(z0_hat(z, t), rel=1e-6) and variance == pytest.approx(posterior_variance(t), rel=0.01)
    assert propagate(sde(lambda t: (2 * t / (1 - t)) ** 0.5), t, z, 0) == pytest.approx((mean, variance), rel=0.02)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75, 0.9])
def test_the_sde_of_the_samplers_keeps_only_the_marginals(t):
    """With nu = 3t^2 all z_0 together are right, but those from one z_t are not p(z_0 | z_t): the reason for the ancestral step [D15]."""
    z, step = (1 - t) * M + 0.8, sde(lambda t: 3 * t * t)
    assert propagate(step, t, (1 - t) * M, (1 - t) ** 2 * V + t * t) == pytest.approx((M, V), rel=0.02)
    assert propagate(step, t, z, 0)[1] < 0.9 * posterior_variance(t)


def test_ancestral_step_ends_at_the_estimate_and_keeps_shapes():
    z, estimate, noise = torch.randn(3, 2, 4, 6, 5).unbind()[0:3]
    assert_close(evaluate.ancestral_step(z, estimate, 0.4, 0.0, noise), estimate)
    assert evaluate.ancestral_step(z, estimate, 0.4, 0.2, noise).shape == z.shape


def test_rollouts_stay_with_their_latent():
    """Two modes, -1 and 1: every rollout ends in the mode of its own latent, whatever the batch; the steps are the nodes below t."""
    sign = torch.tensor([1.0, -1, -1, 1, -1])
    backbone = SimpleNamespace(velocity=lambda z, sigma, null: (z - z.mean((1, 2, 3), keepdim=True).sign()) / sigma.view(-1, 1, 1, 1), decode=lambda z: z)
    reward = SimpleNamespace(embed=lambda x: (x.flatten(1), None))
    z = 8 * sign.view(5, 1, 1, 1).expand(5, 2, 3, 3)
    out, steps = evaluate.rollout_embeddings(backbone, reward, None, z, 0.5, torch.tensor([1, 0.75, 0.5, 0.3, 0.1, 0]), 4, torch.Generator().manual_seed(0), 3)
    assert steps == 3
    assert_close(out, sign.view(5, 1, 1).expand(5, 4, 18) / 18 ** 0.5)


@pytest.fixture
def head():
    head = common.aesthetic_head(width=10)
    for p in head.parameters():
        p.normal_(0, p.shape[-1] ** -0.5)
    return head


@pytest.mark.parametrize("kind", ["text", "aesthetic"])
def test_the_mean_of_scores_is_the_score_of_the_mean(kind, head):
    """Why an estimator may be an embedding: a Monte Carlo value is the score of the rollouts' mean embedding, exactly."""
    e, text = unit(5, 32, 10), unit(10)
    score = lambda e: common.Reward.score(SimpleNamespace(head=head if kind == "aesthetic" else None), e, text)
    assert float(score(e).std()) > 0.1
    assert_close(score(e).mean(1), score(e.mean(1)), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- 04: metrics
def test_recall_at_1():
    """By loops, with one to four captions an image, shuffled: (image to text, text to image)."""
    image_of = torch.tensor([2, 0, 0, 1, 3, 3, 3, 1, 4, 0, 3])
    e = unit(5, 6)
    text = F.normalize(e[image_of] + 1.5 * unit(11, 6), dim=-1)
    score = [[float(e[k] @ text[m]) for m in range(11)] for k in range(5)]
    best_text = [max(range(11), key=lambda m: score[k][m]) for k in range(5)]
    best_image = [max(range(5), key=lambda k: score[k][m]) for m in range(11)]
    i2t, t2i = evaluate.recall_at_1(e, text, image_of)
    assert i2t.tolist() == [float(image_of[best_text[k]] == k) for k in range(5)]
    assert t2i.tolist() == [float(best_image[m] == image_of[m]) for m in range(11)]
    assert 0 < t2i.mean() < 1 and 0 < i2t.mean() < 1  # so both kinds of answer are compared
    perfect = evaluate.recall_at_1(e, e[image_of], image_of)
    assert [v.tolist() for v in perfect] == [[1.0] * 5, [1.0] * 11]
    i2t, t2i = evaluate.recall_at_1(e.roll(1, 0), e[image_of], image_of)
    assert i2t.sum() == 0 and t2i.sum() == 0


def test_hpdv2_accuracy():
    """Rank 1 is best: 1 in the human order, 0 in the reverse; a human tie is correct in either order; by loops for the rest."""
    ranks = torch.tensor([2, 1, 4, 3])
    assert evaluate.hpdv2_accuracy(-ranks.float(), ranks) == 1 and evaluate.hpdv2_accuracy(ranks.float(), ranks) == 0
    assert evaluate.hpdv2_accuracy(torch.tensor([0.3, 0.1]), torch.tensor([1, 1])) == evaluate.hpdv2_accuracy(torch.tensor([0.1, 0.3]), torch.tensor([1, 1])) == 1
    for _ in range(20):
        scores, ranks = torch.randn(6), torch.randint(1, 5, (6,))
        opposite = sum(bool((scores[a] - scores[b]) * (ranks[a] - ranks[b]) > 0) for a in range(6) for b in range(a))
        assert evaluate.hpdv2_accuracy(scores, ranks) == pytest.approx(1 - opposite / 15)


def test_imagereward_accuracy():
    """(correct, pairs): human ties are no pairs, equal scores are wrong; by loops for the rest."""
    ranks = torch.tensor([2, 1, 3])
    assert evaluate.imagereward_accuracy(-ranks.float(), ranks) == (3, 3) and evaluate.imagereward_accuracy(ranks.float(), ranks) == (0, 3)
    assert evaluate.imagereward_accuracy(torch.tensor([0.5, 0.2, 0.9]), torch.tensor([1, 1, 2])) == (0, 2)
    assert evaluate.imagereward_accuracy(torch.tensor([0.5, 0.5, 0.1]), torch.tensor([1, 2, 3])) == (2, 3)
    for _ in range(20):
        scores, ranks = torch.randint(4, (6,)), torch.randint(1, 5, (6,))
        pairs = [(a, b) for a in range(6) for b in range(6) if ranks[a] < ranks[b]]
        assert evaluate.imagereward_accuracy(scores, ranks) == (sum(bool(scores[a] > scores[b]) for a, b in pairs), len(pairs))


def test_calibration():
    """The slope is 1 where v = E[r | v], 1/2 where v is stretched twofold, and 0, not NaN, for a constant."""
    v = torch.tensor([0.0, 0, 1, 1, 3, 3])
    r = v + torch.tensor([1.0, -1, 2, -2, 0.5, -0.5])
    c = evaluate.calibration(v, r)
    assert c["slope"] == pytest.approx(1) and evaluate.calibration(2 * v + 7, r)["slope"] == pytest.approx(0.5)
    assert c == pytest.approx(dict(mean_v=np.mean(v.tolist()), mean_r=np.mean(r.tolist()), std_v=np.std(v.tolist(), ddof=1), std_r=np.std(r.tolist(), ddof=1), slope=1))
    assert evaluate.calibration(torch.ones(6), r)["slope"] == 0
    assert evaluate.calibration(torch.full((500,), 5.7853), torch.randn(500))["slope"] == 0  # whose mean differs from it by rounding
    assert evaluate.measure(dict(kind="ava", votes=torch.rand(500)), torch.full((500,), 5.7853), None)["srcc"] is None


def test_summary_of_units():
    """Draws are averaged within a unit first: two draws of one image are not two images."""
    draws = [torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 0, 0, 1])]
    assert evaluate.summary(draws, "recall@1_i2t", 4) == pytest.approx((0.625, np.std([1, 0, 0.5, 1], ddof=1) / 2))
    assert evaluate.summary([draws[0]] * 5, "recall@1_i2t", 4) == pytest.approx(evaluate.summary(draws[:1], "recall@1_i2t", 4))


def test_summary_of_pooled_pairs():
    """ImageReward: pooled over pairs, not a mean over prompts; the error is the jackknife's over prompts, which have unequal numbers of pairs."""
    pairs = torch.randint(1, 30, (400,)).double()
    skill = 0.3 + 0.6 * torch.rand(400).double()  # prompts differ: binomial errors over pairs would be too small
    draws = [torch.stack([torch.binomial(pairs, skill), pairs], 1) for _ in range(2)]
    correct = ((draws[0] + draws[1]) / 2)[:, 0]
    value, se = evaluate.summary(draws, "imagereward_accuracy", 400)
    assert value == pytest.approx(float(correct.sum() / pairs.sum())) and abs(value - float((correct / pairs).mean())) > 1e-4
    without = (correct.sum() - correct) / (pairs.sum() - pairs)
    assert se == pytest.approx(float((399 / 400 * (without - without.mean()).square().sum()).sqrt()), rel=0.03)


def test_summary_of_correlations():
    """Averaged over draws; a constant estimate has none."""
    assert evaluate.summary([0.4, 0.6], "srcc", 26) == pytest.approx((0.5, 0.75 / 5))
    assert evaluate.summary([None, None], "srcc", 26) == (None, None)


def test_spearman_ranks_ties_by_their_mean():
    a, b = torch.tensor([1.0, 2, 2, 9]), torch.tensor([10.0, 20, 30, 40])
    assert evaluate.spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert evaluate.spearman(a, a.exp()) == pytest.approx(1) and evaluate.spearman(a, -a) == pytest.approx(-1)


IDS = {953958: 3, 954184: 1, 954113: 2}  # image id: its votes, all of one score


def write_ava(folder, ids):
    """AVA's files with three test images, of which only `ids` are there."""
    (folder / "images").mkdir()
    for n in ids:
        (folder / "images" / f"{n}.jpg").touch()
    (folder / "AVA.txt").write_text("".join(f"{k} {n} " + " ".join("5" if s == IDS[n] else "0" for s in range(1, 11)) + " 0 0 1\n" for k, n in enumerate(sorted(IDS))))
    (folder / "test.jpgl").write_text("\n".join(map(str, IDS)) + "\n")


def test_ava_votes_belong_to_their_files(tmp_path):
    write_ava(tmp_path, IDS)
    bench = evaluate.ava_set(tmp_path)
    assert [int(f.stem) for f in bench["files"]] == list(IDS) and bench["votes"].tolist() == list(IDS.values())


def test_ava_with_a_missing_image_is_refused(tmp_path):
    """Left out in silence, it would give every later image its neighbour's votes."""
    write_ava(tmp_path, (953958, 954113))
    with pytest.raises(SystemExit, match="954184"):
        evaluate.ava_set(tmp_path)


def test_errors_against_the_reference_are_unbiased():
    """Rollout scores with known mean: the corrections for the reference's own error give (V - V*)^2 for outsiders and the variance / n for its parts."""
    true, spread, rollouts = torch.randn(4000, 1), 0.7, 16
    samples = true[:, None] + spread * torch.randn(4000, rollouts, 1)
    half = [samples[:, h::2].mean(1) for h in (0, 1)]
    reference, variance = (half[0] + half[1]) / 2, float((half[0] - half[1]).square().mean() / 4)
    r = true + spread * torch.randn(4000, 1)
    outsider = evaluate.shared_error(true + 0.1, r, reference, variance, part=False)
    assert outsider["reference_mse"] == pytest.approx(0.01, abs=0.002) and outsider["reference_bias"] == pytest.approx(0.1, abs=0.01)
    assert outsider["value_mse_shared"] == pytest.approx(0.01 + spread ** 2, rel=0.08)
    for n in (1, 4, 16):
        assert evaluate.shared_error(samples[:, :n].mean(1), r, reference, variance, part=True)["reference_mse"] == pytest.approx(spread ** 2 / n, rel=0.08)


def test_error_of_averages_draws_and_reads_the_matched_pairs():
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    about = evaluate.error_of([r, r + 2], r, [0, 1])
    assert about["value_mse"] == pytest.approx(2.0) and about["matched_v"] == about["matched_r"] == 1.0 and about["slope"] == pytest.approx(1.0)


def test_monte_carlo_takes_whole_lists():
    assert evaluate.monte_carlo_images(dict(sizes=[4, 5, 6], files=range(15)), 10) == 9
    assert evaluate.monte_carlo_images(dict(sizes=[4, 5, 6], files=range(15)), 2) == 4
    assert evaluate.monte_carlo_images(dict(files=range(15)), 40) == 15
