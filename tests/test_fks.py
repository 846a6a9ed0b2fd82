"""Stage 06 on Gaussian data where everything is known, on small models, on the miniature."""

import copy
import importlib
import json
import math
import shutil
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_common import small_sd3
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import common

fks = importlib.import_module("06_fks")
DEAD = -math.inf
RULES = dict(proposal="argmax", potential="diff", by="tweedie")
RULES |= dict(resampling="multinomial", adaptive=None)
POTENTIALS = ("diff", "rt", "max", "add")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- drawing
def test_pick_never_takes_weight_zero():
    """The inverse CDF at its edges: u = 0 and 1, zeros anywhere; float32 sums that miss 1."""
    w = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    u = torch.tensor([0.0, 0.29, 0.31, 0.999, 1.0])
    assert fks.pick(w, u).tolist() == [1, 1, 3, 3, 3]
    w = torch.rand(50, 1000)
    w[:, -3:] = 0
    index = fks.pick(w, torch.ones(50, 1))
    assert (index <= 996).all() and (w.gather(1, index) > 0).all()


@pytest.mark.parametrize("N", [2, 5, 14])
def test_systematic_counts_are_rounded(N):
    w = torch.rand(200, N, dtype=torch.float64) ** 3
    w = w / w.sum(1, keepdim=True)
    index = fks.ancestors(w, torch.rand(200, N, dtype=torch.float64), "systematic")
    counts = torch.stack([torch.bincount(row, minlength=N) for row in index])
    assert ((counts == (N * w).floor()) | (counts == (N * w).ceil())).all()
    assert index.shape == (200, N) and (counts.sum(1) == N).all()


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_expected_counts_are_n_times_the_weights(scheme):
    w = torch.tensor([0.1, 0.0, 0.55, 0.35])
    index = fks.ancestors(w.expand(20000, 4), torch.rand(20000, 4), scheme)
    counts = torch.stack([torch.bincount(row, minlength=4) for row in index]).double()
    assert (counts.mean(0) - 4 * w).abs().max() < 4 * 1.0 / 20000**0.5
    variance = 4 * 0.1 * 0.9 if scheme == "multinomial" else 0.4 * 0.6
    assert counts.var(0)[0].item() == pytest.approx(variance, rel=0.1)


def test_normalised():
    """A constant changes nothing, 1e4 stays finite, the dead weigh nothing, all dead the same."""
    logw = torch.randn(3, 5).double()
    assert_close(fks.normalised(logw + 1e4), fks.normalised(logw))
    assert fks.normalised(1e4 * logw).isfinite().all()
    assert fks.normalised(torch.tensor([[1e4, -1e4]])).tolist() == [[1, 0]]
    dead = torch.tensor([[0.0, DEAD], [DEAD, DEAD]])
    assert fks.normalised(dead).tolist() == [[1, 0], [0.5, 0.5]]


# ---------------------------------------------------------------------------- one proposal of M
def test_choose_argmax():
    v = torch.tensor([[1.0, 3.0, 2.0], [math.nan, -5.0, math.inf]])
    index, gain = fks.choose(v, 2.0, torch.rand(2))
    assert index.tolist() == [1, 1] and gain.tolist() == [0, 0]


def test_choose_corrected_is_properly_weighted():
    """E[f(chosen) factor] = mean_m exp(lam v_m) f(m) for any f, by all u on a fine grid.

    NaN is never chosen and counts as weight zero.
    """
    v = torch.tensor([0.3, -0.7, math.nan, 1.1]).double()
    f = torch.tensor([2.0, -1.0, 1e9, 5.0]).double()
    lam = 1.7
    u = (torch.arange(100000).double() + 0.5) / 100000
    index, gain = fks.choose(v.expand(100000, 4), lam, u, "corrected")
    alive = [0, 1, 3]
    expected = ((lam * v[alive]).exp() * f[alive]).sum() / 4
    assert float((f[index] * gain.exp()).mean()) == pytest.approx(float(expected), rel=1e-4)
    none = torch.full((1, 4), math.nan)
    assert fks.choose(none, lam, torch.rand(1), "corrected")[1].item() == DEAD


def test_choose_corrected_stays_finite_at_large_values():
    v = torch.tensor([[1e4, -1e4, 1e4 - 1]])
    index, gain = fks.choose(v, 5.0, torch.tensor([0.5]), "corrected")
    assert index.item() == 0 and gain.item() == pytest.approx(5e4 + math.log(1 / 3))


# ---------------------------------------------------------------------------- potentials
BY_HAND = {
    "diff": ([2 * 1, 2 * (3 - 1), 2 * (2 - 3)], 2 * (5 - 2)),
    "rt": ([2 * 1, 2 * 3, 2 * 2], 2 * 5 - (2 + 6 + 4)),
    "max": ([2 * 1, 2 * 3, 2 * 3], 2 * 5 - (2 + 6 + 6)),
    "add": ([2 * 1, 2 * 4, 2 * 6], 2 * 11 - (2 + 8 + 12)),
}


@pytest.mark.parametrize("potential", BY_HAND)
def test_potentials_by_hand(potential):
    """Values 1, 3, 2 on the way and 5 at the end, lam = 2.

    The last weighing divides out what was paid before, so the product is the target's.
    """
    gains, last = BY_HAND[potential]
    books = fks.new_books(torch.zeros(1, 1).double(), potential)
    total = 0.0
    for v, gain in zip((1.0, 3.0, 2.0), gains, strict=True):
        books = fks.weigh(books, torch.tensor([[v]]).double(), 2.0, potential)
        total += gain
        assert books["logw"].item() == books["paid"].item() == total
    books = fks.weigh(books, torch.tensor([[5.0]]).double(), 2.0, potential, last=True)
    target = {"diff": 10, "rt": 10, "max": 10, "add": 22}[potential]
    assert books["logw"].item() == total + last == target


def test_max_of_negative_values_is_not_zero():
    """The official code starts at 0, where all negative rewards tie."""
    books = fks.new_books(torch.zeros(1, 2), "max")
    books = fks.weigh(books, torch.tensor([[-3.0, -1.0]]), 1.0, "max")
    assert books["logw"].tolist() == [[-3, -1]]


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_kills_one_particle(potential, bad):
    """Its weight is zero from then on, it is counted once, the others are as if without it."""
    values = torch.tensor([[[1.0, 1.0]], [[2.0, bad]], [[3.0, 9.0]]])
    books = fks.new_books(torch.zeros(1, 2), potential)
    alone = fks.new_books(torch.zeros(1, 1), potential)
    for v in values:
        books = fks.weigh(books, v, 1.0, potential)
        alone = fks.weigh(alone, v[:, :1], 1.0, potential)
    assert books["logw"][0].tolist() == [alone["logw"].item(), DEAD]
    assert books["killed"].tolist() == [1]


def test_select():
    r = torch.tensor([[1.0, math.nan, 3.0, 2.0], [math.nan] * 4])
    books = dict(logw=torch.tensor([[DEAD, DEAD, DEAD, 0.0], [DEAD] * 4]))
    assert fks.select(r, books, None).tolist() == [[2], [0]]
    drawn = fks.select(r, books, torch.rand(2, 4), "mean")
    assert drawn.tolist() == [[3, 3, 3, 3], [0, 1, 2, 3]]


# ---------------------------------------------------------------------------- Gaussian data
# z_0 ~ N(M, V), r(z_0) = z_0
M, V, LAM = 0.7, 0.25, 2.0
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
GRID = common.sigma_grid(SCHEDULER, 40, 16).double().tolist()
STEPS = list(zip(GRID[:-1], GRID[1:], strict=True))
FK = range(8, 33, 4)


def z0_hat(z, t):
    """E[r(z_0) | z_t], the exact value."""
    return M + V * (1 - t) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)


def velocity(z, t, prefix=None):
    return (t - (1 - t) * V) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M) - M


def first(z):
    return z[:, 0]


def exact(z, t):
    return z0_hat(z[:, 0], t), None


def law_of_the_sampler():
    """Mean and variance of z_0 from 40 affine steps: .7 and .2282, not .25, is what is tilted."""
    mean, variance, noise = 0.0, 1.0, torch.tensor([0.0, 0.0, 1.0])
    for t, s in STEPS:
        z = torch.tensor([0.0, 1.0, 0.0])
        shift, slope, spread = common.sde_step(z, velocity(z, t), t, s, noise).tolist()
        mean = (slope - shift) * mean + shift
        variance = (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


def draws(P, N, seed=0, order=None):
    """noise and uniform of steer(), float64. order: a permutation of the particles."""
    g = torch.Generator().manual_seed(seed)
    order = torch.arange(N) if order is None else order

    def noise(k, m=1):
        return torch.randn(P, N, m, 1, dtype=torch.float64, generator=g)[:, order]

    def uniform(k):
        return torch.rand(2, P, N, dtype=torch.float64, generator=g)[:, :, order]

    return noise, uniform


def gaussian(P=1, N=4, lam=LAM, M=1, order=None, **changed):
    """steer() with the exact velocity and values; z (P, N), the books after the last weighing."""
    calls = dict(score=first, value=exact, denoise=velocity)
    calls |= {k: changed.pop(k) for k in list(changed) if k in calls}
    how_often = dict(
        fk_steps=changed.pop("fk_steps", FK), propose=changed.pop("propose", range(16)), M=M
    )
    rules = RULES | changed
    noise, uniform = draws(P, N, order=order)
    z = noise("start")[:, :, 0]
    z, books = fks.steer(
        z, GRID, noise=noise, uniform=uniform, lam=lam, rules=rules, **calls, **how_often
    )
    r = calls["score"](z.flatten(0, 1)).view(P, N)
    return z[..., 0], fks.weigh(books, r, lam, rules["potential"], last=True)


def errors(z, books, lam=LAM):
    """How many standard errors weighted mean and variance are from those of the tilted law.

    The errors are from P independent repetitions.
    """
    mean, variance = law_of_the_sampler()
    w = fks.normalised(books["logw"])
    found = (w * z).sum(1)
    spread = (w * (z - mean - lam * variance).square()).sum(1)
    pairs = ((found, mean + lam * variance), (spread, variance))
    return [float((x.mean() - target) / (x.std() / len(x) ** 0.5)) for x, target in pairs]


@pytest.mark.parametrize("by", ["tweedie", "stitchvm"])
@pytest.mark.parametrize("adaptive", [None, 0.7])
@pytest.mark.parametrize("resampling", ["multinomial", "systematic"])
@pytest.mark.parametrize("potential", ["diff", "rt"])
def test_particles_follow_the_tilted_law(potential, resampling, adaptive, by):
    """exp(lam r) times the sampler's own Gaussian: mean + lam variance, the same variance.

    Plain samples are a hundred standard errors away. rt weighs a line by every value it had; that
    the end divides all of them out is official code's law, too.
    """
    way = dict(potential=potential, resampling=resampling, adaptive=adaptive, by=by)
    z, books = gaussian(24, 500, **way)
    assert max(map(abs, errors(z, books))) < 4
    z, books = gaussian(24, 500, fk_steps=())
    assert errors(z, dict(logw=torch.zeros_like(z)))[0] < -20  # so the test would see it


def test_the_error_shrinks_with_n():
    """The particles converge: the squared error of the mean falls about as 1/N."""
    mean, variance = law_of_the_sampler()

    def error(N, P):
        z, books = gaussian(P, N)
        found = (fks.normalised(books["logw"]) * z).sum(1)
        return float((found - mean - LAM * variance).square().mean())

    assert error(1000, 50) < error(100, 100) / 4 < error(10, 200) / 16


@pytest.mark.parametrize("by", ["tweedie", "stitchvm"])
@pytest.mark.parametrize("adaptive", [None, 0.7])
def test_corrected_proposals_keep_the_law(by, adaptive):
    """M = 4 proposals drawn in proportion to exp(lam V), the weight times their mean.

    The same law as without. In 30 steps, because V varies little among the first ones' proposals:
    paying the mean instead of the chosen value would show there by two standard errors, here by
    twenty.
    """
    way = dict(M=4, proposal="corrected", propose=range(30), by=by, adaptive=adaptive)
    z, books = gaussian(24, 1000, lam=3.0, **way)
    assert max(map(abs, errors(z, books, 3.0))) < 4


@pytest.mark.parametrize("proposal", ["argmax", "corrected"])
def test_on_the_way_a_line_has_paid_its_last_value(proposal):
    """Under diff the factors so far multiply to exp(lam V) of the present latent.

    Or of the last one weighed; not to a product of many values.
    """
    noise, uniform = draws(2, 6)
    calls = dict(denoise=velocity, noise=noise, uniform=uniform, score=None, value=exact)
    rules = RULES | dict(proposal=proposal, by="stitchvm")
    more = dict(lam=LAM, fk_steps=FK, propose=range(16), M=3, rules=rules)
    z, books = fks.steer(noise(0)[:, :, 0], GRID[:13], **calls, **more)
    assert_close(books["paid"], LAM * z0_hat(z[..., 0], GRID[12]))
    assert (books["logw"] == 0).all()  # step 12 has just resampled


def test_argmax_proposals_do_not():
    """Algorithm 1's argmax moves the mean beyond the tilted law, however many particles."""
    z, books = gaussian(24, 500, M=4)
    mean, variance = law_of_the_sampler()
    found = float((fks.normalised(books["logw"]) * z).sum(1).mean())
    assert errors(z, books)[0] > 8 and 0.05 < found - mean - LAM * variance < 1


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("proposal", ["argmax", "corrected"])
@pytest.mark.parametrize("by", ["tweedie", "stitchvm"])
def test_everything_telescopes(potential, proposal, by, monkeypatch):
    """Along each line that is left all factors multiply to exp(lam target).

    Whatever was resampled, proposed and carried.
    """
    weighings = []
    weigh = fks.weigh

    def spy(*args, **kwargs):
        weighings.append(args)
        return weigh(*args, **kwargs)

    monkeypatch.setattr(fks, "weigh", spy)
    z, books = gaussian(3, 6, M=3, potential=potential, proposal=proposal, by=by, adaptive=0.9)
    assert_close(books["paid"], LAM * books["running"])
    if potential in ("diff", "rt"):
        assert_close(books["paid"], LAM * z)
    elif potential == "max":
        assert (books["running"] >= z).all()
    every = potential != "diff" or proposal == "argmax"
    assert len(weighings) == (len(FK) + 1 if every else 5)  # 20, 24, 28, 32 and the end


@pytest.mark.parametrize("potential", POTENTIALS)
def test_never_resampled_is_importance_weighting(potential):
    """The samples are the plain ones, the carried weights exp(lam r), exp(lam max or sum).

    Of what was scored: one-step estimates, then z_0.
    """
    scored, path = [], []

    def score(z):
        scored.append(z[:, 0].view(2, 50))
        return z[:, 0]

    def denoise(z, t, prefix):
        path.append((z[:, 0].view(2, 50), t))
        return velocity(z, t)

    way = dict(potential=potential, adaptive=1e-9)
    z, books = gaussian(2, 50, score=score, denoise=denoise, **way)
    assert torch.equal(z, gaussian(2, 50, fk_steps=())[0])
    values = torch.stack(scored)
    targets = dict(diff=values[-1], rt=values[-1], max=values.amax(0), add=values.sum(0))
    assert_close(books["logw"], LAM * targets[potential])
    assert len(scored) == len(FK) + 1
    for step, v in zip(FK, scored, strict=False):  # the estimate that step 8 was made from
        assert_close(v, z0_hat(*path[step - 1]))


def test_m_1_is_plain_fks_bit_for_bit():
    plain, one = (gaussian(4, 6, value=v) for v in (None, lambda z, t: 1 / 0))
    assert torch.equal(plain[0], one[0]) and torch.equal(plain[1]["logw"], one[1]["logw"])
    assert not torch.equal(plain[0], gaussian(4, 6, M=2)[0])


def test_lam_0_is_plain_sampling():
    """Equal weights: systematic resampling copies every particle once, multinomial draws."""
    plain = gaussian(4, 6, fk_steps=())[0]
    assert torch.equal(gaussian(4, 6, lam=0.0, resampling="systematic")[0], plain)
    assert torch.equal(gaussian(4, 6, lam=0.0, adaptive=0.5)[0], plain)
    assert (gaussian(4, 6, lam=0.0)[1]["logw"] == 0).all()


CARRIED = {"argmax": dict(M=3), "corrected": dict(M=3, proposal="corrected", by="stitchvm")}


@pytest.mark.parametrize("way", CARRIED)
def test_permuting_the_particles_permutes_the_result(way):
    order = torch.tensor([3, 0, 4, 1, 2])
    z, books = gaussian(2, 5, adaptive=1e-9, **CARRIED[way])
    again, others = gaussian(2, 5, order=order, adaptive=1e-9, **CARRIED[way])
    assert torch.equal(z[:, order], again)
    assert_close(books["logw"][:, order], others["logw"])


def test_lam_in_units_of_the_spread_does_not_see_the_rewards_scale():
    """The reward times 20 plus 5, at lam / 20: the same particles, with either proposal."""

    def score(z):
        return 20 * z[:, 0] + 5

    def value(z, t):
        return 20 * z0_hat(z[:, 0], t) + 5, None

    for proposal in ("argmax", "corrected"):
        way = dict(P=3, N=6, M=2, proposal=proposal)
        z, _ = gaussian(**way)
        again, _ = gaussian(**way, lam=LAM / 20, score=score, value=value)
        assert torch.equal(z, again)


def test_huge_values_stay_finite():
    def score(z):
        return 1e4 * z[:, 0]

    def value(z, t):
        return 1e4 * z0_hat(z[:, 0], t), None

    z, books = gaussian(3, 6, M=3, proposal="corrected", lam=1e4, score=score, value=value)
    assert z.isfinite().all() and books["logw"].isfinite().all() and books["killed"].sum() == 0


@pytest.mark.parametrize("adaptive", [None, 1e-9], ids=["resampled", "carried"])
def test_a_nan_kills_its_particle_not_the_run(adaptive):
    """A latent that becomes NaN after the third step is dropped or without weight, and counted."""

    def broken(z, t, prefix):
        third = (torch.arange(len(z)) == 2)[:, None] & (t == GRID[3])
        return torch.where(third, math.nan, velocity(z, t))

    z, books = gaussian(P=2, N=4, adaptive=adaptive, denoise=broken)
    assert books["killed"].tolist() == [1, 0]
    if adaptive is None:
        assert z.isfinite().all()
    else:
        assert (~z.isfinite()).nonzero().tolist() == [[0, 2]] and books["logw"][0, 2] == DEAD
    assert fks.normalised(books["logw"]).isfinite().all()


# ---------------------------------------------------------------------------- fewer particles
def pruned(levels, P=2, N=8, value=exact, grid=GRID):
    """prune() on Gaussian data: z (P, n), its books, and rows of each call."""
    rows = Counter()

    def noise(k, m=1):
        return torch.randn(P, N, m, 1, dtype=torch.float64, generator=common.generator(k))

    def denoise(z, t, prefix):
        rows["denoiser"] += len(z)
        return velocity(z, t)

    def counted(z, t):
        rows["value"] += len(z)
        return value(z, t)

    start = noise("start")[:, :, 0]
    z, books = fks.prune(start, grid, denoise, noise, counted, levels)
    if not levels:  # best of N
        more = dict(noise=noise, uniform=lambda k: (None, None), score=None, value=None, lam=0.0)
        more |= dict(fk_steps=(), propose=(), M=1, rules=RULES)
        assert torch.equal(z, fks.steer(start, grid, velocity, **more)[0])
    return z[..., 0], books, rows


@pytest.mark.parametrize("N, left", [(8, 4), (5, 3), (2, 1)])
def test_prune_keeps_the_better_half(N, left):
    """The samples of highest V where sigma comes down to .5, and they end where they would have."""
    halfway = next(k for k, t in enumerate(GRID) if t <= 0.5)
    z, _, _ = pruned((), N=N, grid=GRID[: halfway + 1])
    best = z0_hat(z, GRID[halfway]).argsort(1, descending=True)[:, :left]
    found, books, _ = pruned([0.5], N=N)
    assert torch.equal(books["origin"], best) and (books["logw"] == 0).all()
    assert torch.equal(found, pruned((), N=N)[0].gather(1, best))


def test_pruned_at_the_end_is_best_of_n():
    """There the exact V is the reward; at .3 it ranks nearly as well, at .9 hardly at all."""
    plain = pruned((), P=200)[0].amax(1)
    at = {level: pruned([level], P=200)[0].amax(1) for level in (0.0, 0.3, 0.9)}
    assert torch.equal(at[0.0], plain)
    assert all((x <= plain).all() for x in at.values())
    loss = {level: float((plain - x).mean()) for level, x in at.items()}
    assert loss[0.3] < 0.1 * loss[0.9]


def test_rows_of_prune_by_hand():
    """A halving a level, at the first sigma that is not above it; the last particle stays."""
    grid = torch.linspace(1, 0, 41).double().tolist()

    def rows(levels, N):
        z, _, found = pruned(levels, P=1, N=N, grid=grid)
        return z.shape[1], found["denoiser"], found["value"]

    assert rows([0.5, 0.25], 8) == (2, 8 * 20 + 4 * 10 + 2 * 10, 8 + 4)
    assert rows([0.24, 0.49], 8) == (2, 8 * 21 + 4 * 10 + 2 * 9, 8 + 4)
    assert rows([0.51, 0.52], 7) == (2, 7 * 20 + 2 * 20, 7)
    assert rows([0.5, 0.25], 2) == (1, 2 * 20 + 20, 2)
    assert rows([0.5, 0.25], 1) == (1, 40, 0) and rows([], 3) == (3, 120, 0)


def test_what_is_not_finite_is_pruned_first():
    """Counted once each; where all are dead some go on."""

    def value(z, t):
        v = torch.tensor([math.nan, -9.0, math.inf, math.nan, math.nan, math.nan])
        return v.double() if len(z) == 6 else torch.full((len(z),), math.nan), None

    _, books, _ = pruned([0.5], N=3, value=value)
    assert books["origin"].shape == (2, 2) and books["origin"][0, 0] == 1
    assert books["killed"].tolist() == [2, 3]
    z, books, _ = pruned([0.5, 0.3], N=3, value=value)
    assert z.isfinite().all() and books["killed"].tolist() == [3, 3]


# ---------------------------------------------------------------------------- the shared prefix
@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


def inner(e, text):
    return (e * text).sum(-1)


def stitched(sd3, null, i, seed=0):
    """A value with the real prefix and a random head of eight numbers."""
    g = torch.Generator().manual_seed(seed)
    value = SimpleNamespace(transformer=sd3, null=null, i=i, front="dit", score=inner)
    value.W = torch.randn(32, 8, generator=g).to(null[0].device)
    value.features = partial(common.StitchedValue.features, value)
    value.head = lambda f: (torch.tanh(f.mean((2, 3)) @ value.W), None)
    return value


def embed(x):
    return x.mean((2, 3))[:, :8] + 0.1, None


def shares(models):
    return common.shares_prefix(models.values, models.backbone, models.null, models.cfg)


def small_models(sd3, values, cfg=4.5, batch=100, prompts=(0, 1), device=CPU):
    """Two prompts on the random SD3, latents decoded to themselves, a reward linear in them."""
    g = torch.Generator().manual_seed(1)
    models = object.__new__(fks.Models)
    texts = [torch.randn(n, 5, 24, generator=g) for n in (2, 1)]
    pooled = [torch.randn(n, 20, generator=g) for n in (2, 1)]
    models.embedded, null = zip(texts, pooled, strict=True)
    models.null = [v.to(device) for v in null]
    models.backbone = SimpleNamespace(transformer=sd3, decode=lambda z: z, device=device)
    models.backbone.velocity = partial(common.velocity, sd3)
    models.rewards = [SimpleNamespace(embed=embed, score=inner)] * len(values)
    models.read = [torch.randn(2, 8, generator=g).to(device)] * len(values)
    models.values = [stitched(sd3, models.null, i, seed) for seed, i in enumerate(values)]
    models.cfg = cfg
    models.batch = batch
    models.rows = Counter()
    models.gflop = {}
    models.shares = device != CPU or shares(models)  # meta tensors cannot be compared
    models.take(list(prompts))
    return models


def steered(models, N=3, steps=6, propose=(), M=1, **rules):
    device = models.backbone.device
    noise = partial(fks.draw_noise, 0, [0, 1], N, (16, 10, 6), device)
    uniform = partial(fks.draw_uniforms, 0, [0, 1], N, device)
    grid = torch.linspace(1, 0, steps + 1).tolist()
    calls = models.denoise, noise, uniform, models.score, models.value
    more = dict(lam=2.0, fk_steps=(2, 4), propose=propose, M=M, rules=RULES | rules)
    return fks.steer(noise("start")[:, :, 0], grid, *calls, **more)


WAYS = {
    "proposals": dict(propose=range(4), M=3),
    "corrected": dict(propose=range(2), M=2, by="stitchvm", proposal="corrected"),
    "potentials": dict(by="stitchvm"),
}


@pytest.mark.parametrize("values", [[2], [3, 1], [4]], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_shared_prefix_changes_nothing(sd3, values, way):
    """The winner's state, resampled with it, resumed as the unconditional half.

    The same particles as with two whole denoiser rows, but for rounding.
    """
    shared, apart = small_models(sd3, values), small_models(sd3, values)
    assert shared.shares
    apart.shares = False
    z, books = steered(shared, **WAYS[way])
    again, others = steered(apart, **WAYS[way])
    assert shared.rows["resumed velocity"] and not apart.rows["resumed velocity"]
    assert_close(z, again, atol=1e-3, rtol=0)
    assert torch.equal(books["origin"], others["origin"])
    assert_close(books["logw"], others["logw"], atol=1e-3, rtol=0)


def test_a_resumed_velocity(sd3):
    z, sigma = torch.randn(3, 16, 10, 6), torch.rand(3)
    condition, null = [(torch.randn(3, 5, 24), torch.randn(3, 20)) for _ in range(2)]
    for i in (1, 4):
        prefix = common.run_blocks(sd3, common.begin(sd3, z, sigma, *null), i)
        resumed = common.velocity(sd3, z, sigma, condition, null, 4.5, prefix=prefix)
        whole = common.velocity(sd3, z, sigma, condition, null, 4.5)
        assert_close(resumed, whole, atol=1e-4, rtol=0)


def test_blocks_that_run(sd3):
    """The proposals pass only the first i blocks, resumed rows only those after them."""
    N, steps, cut, m = 3, 6, 2, 3
    models = small_models(sd3, [cut])
    steered(models, N=N, steps=steps, propose=range(4), M=m)  # counts the GFLOP of one row of each
    seen = [0] * 4

    def count(block, args, kwargs, out, n):
        seen[n] += len(kwargs["hidden_states"])

    blocks = enumerate(sd3.transformer_blocks)
    more = dict(with_kwargs=True)
    hooks = [b.register_forward_hook(partial(count, n=n), **more) for n, b in blocks]
    try:
        steered(models, N=N, steps=steps, propose=range(4), M=m)
    finally:
        for hook in hooks:
            hook.remove()
    rows = 2 * N * steps * 2  # two prompts, two halves
    proposed = 2 * N * 4  # four steps with proposals
    assert seen == [rows + m * proposed - proposed] * cut + [rows] * (4 - cut)


READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__")


class Waits(TorchFunctionMode):
    """Notes what makes the host wait for a device: numbers read off it, copies that block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        name = call.__name__
        place = args[0].device if name in (*READS, "to", "cpu") else CPU
        reads = name in READS and place != CPU
        copies = name in ("to", "cpu", "tensor", "new_tensor") and result.device != place
        if reads or copies and not (kwargs or {}).get("non_blocking"):
            self.names.append(name)
        return result


@pytest.mark.parametrize("way", ["proposals", "corrected"])
def test_the_steps_wait_for_nothing(sd3, way):
    """On a device without data: the embeddings go there before the steps, the draws beside them."""
    models = small_models(copy.deepcopy(sd3).to("meta"), [2, 1], device=torch.device("meta"))
    assert models.embedded[0].device == CPU and models.condition[0].device.type == "meta"
    with Waits() as waits:
        z, books = steered(models, steps=4, **WAYS[way])
        assert waits.names == []
        z.new_tensor([1.0])
    assert waits.names == ["new_tensor"] and books["logw"].device.type == "meta"


def test_draws_go_to_a_gpu_from_pinned_memory():
    """A copy from other memory waits for all work that is queued, whatever non_blocking says."""
    sent = []
    pinned = SimpleNamespace(to=lambda *where, **how: sent.append((where, how)))
    gpu = SimpleNamespace(type="cuda")
    fks.send(SimpleNamespace(pin_memory=lambda: pinned), gpu)
    assert sent == [((gpu,), dict(non_blocking=True))]
    x = torch.ones(2)
    assert fks.send(x, CPU) is x


CASES = {
    "cfg": (True, {}),
    "no cfg": (False, dict(cfg=1.0)),
    "another null text": (False, dict(null=[torch.ones(1, 7, 24), torch.ones(1, 20)])),
    "another backbone": (False, dict(transformer=None)),
    "a latent front": (False, dict(front="vae", W=torch.ones(16, 8))),
}


@pytest.mark.parametrize("case", CASES)
def test_when_the_prefix_is_shared(sd3, case):
    expected, changed = CASES[case]
    changed = dict(changed)
    models = small_models(sd3, [2], changed.pop("cfg", 4.5))
    if "transformer" in changed:
        changed["transformer"] = copy.deepcopy(sd3)
    vars(models.values[0]).update(changed)
    models.shares = shares(models)
    assert models.shares is expected
    assert (models.value(torch.randn(2, 16, 10, 6), 0.5)[1] is not None) is expected


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_parts_of_a_batch_belong_to_their_prompts(sd3, batch):
    """Two prompts' particles in parts of any size: the same velocities, values, rewards, states."""
    whole = small_models(sd3, [2, 1], prompts=(1, 0))
    parts = small_models(sd3, [2, 1], batch=batch, prompts=(1, 0))
    z = torch.randn(6, 16, 10, 6)
    v, state = whole.value(z, 0.5)
    again, states = parts.value(z, 0.5)
    assert_close(v, again, atol=1e-5, rtol=1e-4)
    assert states["i"] == 2 and states["h"].shape == state["h"].shape
    for prefix, other in ((None, None), (state, states)):
        u = whole.denoise(z, 0.5, prefix)
        assert_close(u, parts.denoise(z, 0.5, other), atol=1e-4, rtol=1e-4)
    assert_close(whole.score(z), parts.score(z))
    assert (whole.score(z) - small_models(sd3, [2, 1]).score(z)).abs().max() > 0.1


def test_joint_value_is_the_sum_and_shares_its_blocks(sd3):
    """In either order, on one transformer; a latent front has no state and takes none."""
    null = [torch.randn(1, 5, 24), torch.randn(1, 20)]
    a, b = stitched(sd3, null, 3), stitched(sd3, null, 1, seed=5)
    latent = stitched(sd3, null, 2, seed=6)
    latent.front, latent.W = "vae", torch.randn(16, 8)
    z, sigma, texts = torch.randn(2, 16, 10, 6), torch.rand(2), [*torch.randn(2, 2, 8)]

    def joint(*values, texts=texts):
        return common.joint_value(values, z, sigma, texts[: len(values)])

    alone = joint(a)[0] + joint(b, texts=texts[1:])[0]
    total, prefixes = joint(a, b)
    assert_close(total, alone)
    assert prefixes[id(sd3)]["i"] == 3
    assert_close(joint(b, a, texts=texts[::-1])[0], alone)
    assert joint(latent)[1] == {}
    assert_close(joint(latent, a)[0], joint(latent)[0] + joint(a, texts=texts[1:])[0])


def test_draws_do_not_depend_on_n_m_or_the_batch():
    """The first particles and proposals of a larger run are those of a smaller one."""
    shape = 16, 4, 4
    pairs = ([5, 6], 4), ([6], 2)
    noise, small = (partial(fks.draw_noise, 0, p, n, shape, CPU) for p, n in pairs)
    uniform = partial(fks.draw_uniforms, 0, [5, 6], 4, CPU)
    assert torch.equal(noise(3, 4)[1:, :2, :2], small(3, 2))
    assert torch.equal(noise("start")[1:, :2], small("start"))
    assert not torch.equal(noise(3), noise(4)) and uniform(3).shape == (2, 2, 4)
    assert torch.equal(uniform(3)[:, 1:, :2], fks.draw_uniforms(0, [6], 2, CPU, 3))
    assert not torch.equal(noise(3)[0], noise(3)[1])
    assert not torch.equal(noise(3)[:, 0], noise(3)[:, 1])
    assert not torch.equal(fks.draw_noise(1, [6], 2, shape, CPU, 3), small(3))


# ---------------------------------------------------------------------------- what is run
def flags(*argv, is_flux=False, cfg=4.5):
    args = fks.parse_args(list(argv))
    fks.complete(args, SimpleNamespace(is_flux=is_flux, cfg=cfg))
    return args


def counts(*argv, shares=True):
    """Rows of each model that one prompt takes, by steer() on particles of one number."""
    args = flags("--methods", "fks+stitchvm", *argv)
    run = fks.plan(args)[0]
    N = run["N"]
    rows = dict(denoiser=0, resumed=0, value=0, score=N)

    def tell(kind, n):
        rows[kind] += n
        return torch.zeros(n)

    def denoise(z, t, prefix):
        tell("denoiser", len(z))
        tell("resumed", len(z) if prefix else 0)
        return torch.zeros_like(z)

    def value(z, t):
        return tell("value", len(z)), dict(i=0) if shares else None

    noise, uniform = draws(1, N)
    grid = torch.linspace(1, 0, args.steps + 1).tolist()
    calls = dict(denoise=denoise, value=value, score=lambda z0: tell("score", len(z0)))
    more = dict(noise=noise, uniform=uniform, lam=1.0)
    fks.steer(torch.zeros(1, N, 1), grid, **calls, **more, **fks.settings(run, args))
    return rows


def test_rows_per_prompt_by_hand():
    """N = 4, M = 2, 40 steps, 16 with proposals, weighed after 8, 12 .. 32, four clean images."""
    assert counts() == dict(denoiser=160, resumed=64, value=128, score=28 + 4)
    assert counts(shares=False) == dict(denoiser=160, resumed=0, value=128, score=32)
    by_value = counts("--potential-value", "stitchvm")  # 20, 24, 28, 32 have no proposals
    assert by_value == dict(denoiser=160, resumed=80, value=128 + 16, score=4)
    corrected = dict(denoiser=160, resumed=64, value=128, score=16 + 4)
    assert counts("--proposal", "corrected") == corrected
    assert counts("--proposal", "corrected", "--potential", "max")["score"] == 32
    assert counts("--m", "1") == dict(denoiser=160, resumed=0, value=0, score=32)
    assert counts("--n", "8", "--m", "6")["value"] == 8 * 6 * 16


def test_schedules():
    """D.2: 8 to 32 of 40 at cfg 4.5; FLUX 6 to 22 of 28 without, 11 with proposals; flags win."""
    args = flags()
    assert (args.steps, args.cfg, args.fk_start, args.fk_end) == (40, 4.5, 8, 32)
    steps = fks.settings(fks.plan(args)[3], args)["fk_steps"]
    assert list(steps) == [8, 12, 16, 20, 24, 28, 32]
    args = flags("--backbone", "flux", is_flux=True, cfg=1.0)
    given = fks.settings(fks.plan(args)[4], args)
    assert (args.steps, args.cfg, given["propose"]) == (28, 1.0, range(11))
    assert list(given["fk_steps"]) == [6, 10, 14, 18, 22]
    args = flags("--steps", "20", "--cfg", "1", "--fk-start", "1", "--fk-every", "7")
    steps = fks.settings(fks.plan(args)[3], args)["fk_steps"]
    assert list(steps) == [1, 8, 15] and args.cfg == 1


def test_plan_of_a_study():
    sizes = "--n", "2", "4", "--n-stitchvm", "2", "--m", "2", "6"
    ways = "--proposal", "argmax", "corrected", "--potential-value", "stitchvm"
    args = flags(*sizes, *ways)
    runs = fks.plan(args)
    plain = [(method, n) for method in ("bon", "prune", "fks") for n in (2, 4)]
    expected = [(method, n, 1, "argmax") for method, n in [("flow", 1), *plain]]
    expected += [("fks+stitchvm", 2, m, p) for m in (2, 6) for p in ("argmax", "corrected")]
    assert [(r["method"], r["N"], r["M"], r["proposal"]) for r in runs] == expected
    curves = [fks.label(r, args) for r in runs]
    assert len(set(curves)) == 4 + 4 and "M=6" in curves[-1] and "corrected" in curves[-1]


WRONG = ["--n 4 0", "--m 0", "--steps 0", "--fk-start 30 --fk-end 20", "--fk-end 41"]
WRONG += ["--propose 1.5", "--adaptive -1", "--limit 0", "--spread-samples 1", "--prune-at 1"]


@pytest.mark.parametrize("argv", WRONG)
def test_misuse_of_numbers(argv):
    with pytest.raises(SystemExit, match="^error: ") as e:
        flags(*argv.split())
    assert argv.split()[0] in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------------------- the miniature
@pytest.fixture(scope="module")
def out(values, tmp_path_factory):
    """A run folder with a value model for clip on sd3.5-medium that was never trained."""
    out = tmp_path_factory.mktemp("run")
    shutil.copy(values["clip"], out / "value.pt")
    return out


def run(out, *argv):
    more = "--steps", "5", "--spread-samples", "2", "--scorers", "judge"
    fks.main(fks.parse_args(["--out", str(out), *more, *argv]))
    return json.loads((out / "06_fks.json").read_text())


SCORES = [k for s in ("reward", "dfn-clip", "hpsv2", "aesthetic", "judge") for k in (s, f"{s}_se")]
PROMISED = "method n_particles m_proposals n s_per_prompt s_spread denoiser_calls gflop_per_prompt"
PROMISED = {*PROMISED.split(), "report", "curve", "ancestors", "killed", "images", *SCORES}
STEERED = {"potential_value", "proposal", "lambda", "lambda_raw", "ess"}


def test_a_short_run(out):
    """Every promised key; one sample of bon is the plain one; images, figures, spread."""
    ways = "--proposal", "argmax", "corrected", "--potential-value", "tweedie", "stitchvm"
    more = "--report", "best", "mean", "--save-images", "--scorers", *fks.MINI["scorers"]
    old = out / "06_images/prune_N=2_best/00099"
    old.mkdir(parents=True)
    table = run(out, "--limit", "3", "--n", "2", "--m", "2", *ways, *more)
    rows = table["rows"]
    assert len(rows) == 1 + 1 + 1 + 2 + 8 and not old.exists()
    assert [r["method"] for r in rows[:5]] == ["flow", "bon", "prune", "fks", "fks"]
    for row in rows:
        assert set(row) >= PROMISED
        assert (set(row) >= STEERED) == row["method"].startswith("fks")
        assert row["n"] == 3 and row["killed"] == row["failed"] == 0
        assert 1 <= row["ancestors"] <= row["n_particles"]
        dropped = row["method"] == "prune"  # one of two, before the last two of five steps
        assert row["denoiser_calls"] == 10 * row["n_particles"] - 4 * dropped
    flow, bon, prune, best, mean = rows[:5]
    assert prune["ancestors"] == 1 and "lambda" not in prune
    assert flow["reward"] <= bon["reward"] and best["reward"] >= mean["reward"]
    for some in table["rewards_of_prompts"][0], table["rewards_of_prompts"][2]:
        pairs = zip(some, table["rewards_of_prompts"][1], strict=True)
        assert all(a <= b + 1e-5 for a, b in pairs)
    work = [r["gflop_per_prompt"] for r in (flow, bon, best, rows[5])]
    assert work == sorted(set(work))
    assert best["lambda"] == 1 and best["lambda_raw"] == pytest.approx(1 / table["spread"])
    assert table["shared"] is True and table["values"][0]["stage"] == "03_finetune"
    for name in ("06_scaling", "06_grid"):
        assert Image.open(out / f"{name}.png").width > 300
    assert len({r["images"] for r in rows}) == len(rows)
    assert (out / bon["images"] / "00002/samples/0000.png").exists()
    assert (out / mean["images"] / "00002/samples/0001.png").exists()
    line = json.loads((out / best["images"] / "00001/metadata.jsonl").read_text())
    prompts = common.load_prompts(str(common.ROOT / "tests/mini/data/drawbench.txt"))
    assert line["prompt"] == prompts[1]["prompt"]


def test_best_of_more_holds_the_best_of_fewer(out):
    """Sampled with others or alone, best of one is plain sampling; of three it is no lower."""
    both = run(out, "--limit", "3", "--methods", "bon", "--n", "1", "3")
    one = run(out, "--limit", "3", "--methods", "flow", "bon", "--n", "1")
    few, many = torch.tensor(both["rewards_of_prompts"])
    plain, alone = torch.tensor(one["rewards_of_prompts"])
    assert_close(few, plain, atol=1e-5, rtol=0)
    assert_close(plain, alone, atol=1e-5, rtol=0)
    assert (many >= few - 1e-5).all() and many.mean() > few.mean()
    assert [r["ancestors"] for r in both["rows"]] == [1, 3]


def test_a_prompt_whose_samples_all_fail_has_no_score(out, monkeypatch):
    """It is counted and nothing is written or scored in its place; all failed is a sentence."""
    clean = fks.Models.clean
    dead = [1]

    def broken(self, z, sigma, prompts):
        images, r = clean(self, z, sigma, prompts)
        gone = torch.isin(prompts, torch.tensor(dead))
        return torch.where(gone[:, None, None, None], math.nan, images), r.masked_fill(
            gone, math.nan
        )

    argv = "--limit", "3", "--methods", "bon", "--n", "2", "--raw-lam", "1", "--save-images"
    monkeypatch.setattr(fks.Models, "clean", broken)
    scored = []
    mean_and_error = fks.mean_and_error
    monkeypatch.setattr(fks, "mean_and_error", lambda s: scored.append(s) or mean_and_error(s))
    table = run(out, *argv)
    (row,) = table["rows"]
    assert [r is None for r in table["rewards_of_prompts"][0]] == [False, True, False]
    assert (row["killed"], row["failed"], row["n"]) == (2, 1, 3)
    assert [len(x) for x in scored[0].values()] == [2, 2]  # the reward's and the judge's
    samples = [len([*out.glob(f"{row['images']}/0000{k}/samples/*.png")]) for k in range(3)]
    assert samples == [1, 0, 1]
    dead += [0, 2]
    with pytest.raises(SystemExit, match="^error: every sample of bon_N=2 became NaN"):
        run(out, *argv)
    assert json.loads((out / "06_fks.json").read_text()) == table
    shutil.rmtree(out / "06_fks.parts")


@pytest.mark.filterwarnings("ignore:std")  # of one prompt there is none
def test_a_dead_particle_counts_where_it_is(out, monkeypatch):
    """Of three samples the last has no reward: one death among three, none among two."""
    clean = fks.Models.clean

    def broken(self, **rows):
        images, r = clean(self, **rows)
        return images, torch.where(torch.arange(len(r)) % 3 == 2, torch.nan, r)

    monkeypatch.setattr(fks.Models, "clean", broken)
    argv = "--limit", "1", "--methods", "bon", "--n", "2", "3", "--raw-lam", "1"
    two, three = run(out, *argv)["rows"]
    assert (two["killed"], three["killed"]) == (0, 1) and two["n"] == three["n"] == 1
    assert three["reward"] == pytest.approx(two["reward"], abs=1e-5)


def test_several_strengths_are_rows(out):
    """One row for each, a curve of its own; best of N has no strength."""
    argv = "--limit", "2", "--methods", "bon", "fks", "--n", "2", "--lam", "0.5", "4"
    bon, weak, strong = run(out, *argv)["rows"]
    assert "lambda" not in bon and (weak["lambda"], strong["lambda"]) == (0.5, 4)
    assert len({r["curve"] for r in (bon, weak, strong)}) == 3
    assert strong["lambda_raw"] == pytest.approx(8 * weak["lambda_raw"])


def test_the_spread_is_measured_once(out, monkeypatch):
    """Kept for the same samples, measured for others and where the file is damaged."""
    argv = ["--limit", "2", "--methods", "fks", "--n", "2"]
    assert run(out, *argv)["rows"][0]["lambda_raw"] > 0
    path = out / "06_spread.json"
    record = json.loads(path.read_text()) | dict(spread=0.25)
    path.write_text(json.dumps(record))
    assert run(out, *argv)["rows"][0]["lambda_raw"] == 4
    args = SimpleNamespace(**record["config"])
    monkeypatch.setattr(fks, "perform", lambda *a: (None, torch.eye(2), None))
    weights = {k: record["about"][k] for k in ("transformer", "reward_weights")}
    spread = partial(fks.reward_spread, SimpleNamespace(weights=weights), args)
    assert spread(record["about"]["prompts"]) == 0.25
    for text in ("", path.read_text()[:-20], "[]", "{}", json.dumps(record | dict(spread=None))):
        path.write_text(text)
        assert spread(record["about"]["prompts"]) == pytest.approx(0.5**0.5)
    path.write_text(json.dumps(record))
    assert spread(["another prompt"]) == pytest.approx(0.5**0.5)
    path.write_text(json.dumps(record))
    weights["transformer"] = ["00000000"]
    assert spread(record["about"]["prompts"]) == pytest.approx(0.5**0.5)


def test_a_strength_in_units_of_the_reward(out):
    row = run(out, "--limit", "2", "--methods", "fks", "--n", "2", "--raw-lam", "7")["rows"][0]
    assert row["lambda_raw"] == 7 and row["lambda"] is None


def test_a_joint_reward_is_the_sum(out):
    """Two rewards, two value files, one prefix."""
    value = str(out / "value.pt")
    joint = "--reward", "clip+clip", "--value", value, value, "--raw-lam", "20", "--scorers", "clip"
    table = run(out, "--limit", "2", "--n", "2", "--methods", "fks+stitchvm", *joint)
    row = table["rows"][0]
    assert row["reward"] == pytest.approx(2 * row["clip"], abs=1e-2) and len(table["values"]) == 2


def test_the_same_seed_gives_the_same_table(out):
    argv = "--limit", "2", "--n", "2", "--methods", "prune", "--prune-at", "0.9", "--seed"
    once, again, other = (run(out, *argv, s)["rewards_of_prompts"] for s in ("0", "0", "3"))
    assert once == again != other


@pytest.mark.parametrize("way", ["argmax", "corrected", "prune"])
def test_counted_gflop_are_what_runs(out, way):
    """The rows times their costs are the counter's own total of a run with resumed prefixes."""
    ways = {"prune": ["--methods", "prune"], "corrected": ["--potential-value", "stitchvm"]}
    argv = ["--out", str(out), "--steps", "5", "--n", "2", "--methods", "fks+stitchvm"]
    argv += ways.get(way, []) + ["--proposal", way] * (way != "prune")
    args = fks.parse_args(argv)
    with torch.no_grad():
        models = fks.Models(args, ["a red circle on white"])
        perform = partial(fks.perform, models, args, fks.plan(args)[0], 1.0, 0, 1)
        row, _, _ = perform()
        counted = common.gflop(perform)
    assert models.shares and (models.rows["resumed velocity"] > 0) == (way != "prune")
    assert row["gflop_per_prompt"] == pytest.approx(counted, rel=1e-6)
    shutil.rmtree(out / "06_fks.parts")


def test_the_generator_is_gone_before_scorers_are_loaded(out, monkeypatch):
    """Prompts are encoded before all else is loaded; denoiser, VAE and values are freed at last."""
    events = []
    alive = []

    def note(name, call, *args, **more):
        result = call(*args, **more)
        events.append(name)
        if name == "values":
            alive.extend(weakref.ref(m) for m in (args[1].transformer, args[1].vae, *result[0]))
        return result

    def score(*args):
        assert len(alive) == 3 and not [m for m in alive if m()]
        return score_images(*args)

    score_images = fks.score_images
    monkeypatch.setattr(fks, "score_images", partial(note, "scores", score))
    monkeypatch.setattr(fks, "Reward", partial(note, "reward", fks.Reward))
    monkeypatch.setattr(fks, "load_values", partial(note, "values", fks.load_values))
    monkeypatch.setattr(fks, "steer", partial(note, "steps", fks.steer))
    encode = common.Backbone.prompts
    monkeypatch.setattr(
        common.Backbone, "prompts", lambda *a, **k: note("prompts", encode, *a, **k)
    )
    argv = "--limit", "2", "--n", "2", "--methods", "fks+stitchvm", "--raw-lam", "20"
    run(out, *argv, "--potential-value", "stitchvm")
    assert events == ["prompts", "prompts", "reward", "values", "steps", "scores"]


def test_the_flags_reach_the_models(out):
    """--compile, --offload, and the dtype of the towers as of the denoiser."""
    args = fks.parse_args(["--out", str(out), "--compile", "--offload", "--dtype", "bfloat16"])
    models = fks.Models(args, ["a red circle on white"])
    assert models.backbone.offloads
    assert models.backbone.compiles and models.backbone.dtype == models.rewards[0].dtype
    assert models.spec["prune_at"] == [0.36] and not set(models.spec) & set(fks.FREE)


class Cut(Exception):
    """Stands for a kill."""


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """During the measurement of the spread, after it, at the end: the same table and pictures, no
    part twice. Other flags or prompts are refused, and a run that says neither --resume nor
    --restart, which uses nothing old."""
    out = tmp_path / "run"
    texts = tmp_path / "prompts.txt"
    texts.write_text("a red circle on white\na blue square on black\na green circle on red\n")
    more = "--n", "2", "--report", "best", "mean", "--methods", "bon", "fks", "--save-images"
    argv = ["--prompts", str(texts), "--batch", "2", "--steps", "2", *more, "--scorers", "judge"]
    parts = out / "06_fks.parts"
    sample = fks.sample
    left = [0]

    def some(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return sample(*args)

    def begun(n, *flags):
        left[0] = n
        with pytest.raises((Cut, SystemExit)) as e:
            run(out, *argv, *flags)
        return str(e.value)

    def result():
        table = json.loads((out / "06_fks.json").read_text())
        for row in table["rows"]:
            assert row.pop("s_per_prompt") > 0 and row.pop("s_spread") >= 0
        images = [*out.glob("06_images/**/*.png"), out / "06_grid.png"]
        keys = ("rows", "spread", "rewards_of_prompts", "gflop_per_row")
        return [table[k] for k in keys], {p: p.read_bytes() for p in sorted(images)}

    monkeypatch.setattr(fks, "sample", some)
    spread = out / "06_spread.json"
    left[0] = 9  # three parts each of the spread, of best of N and of steering
    run(out, *argv)
    whole = result()
    assert left == [0] and not parts.exists()
    for path in (spread, out / "06_fks.json", *whole[1]):
        path.unlink()
    parts.mkdir()
    (parts / "bon_N=2_1.pt").write_text("of another run")
    message = begun(9)
    assert "go on with --resume" in message and "--restart" in message and left == [9]
    assert [p.name for p in parts.iterdir()] == ["bon_N=2_1.pt"]
    begun(1, "--restart")
    assert not spread.exists() and [p.name for p in parts.iterdir()] == ["spread_N=2_0.pt"]
    begun(4, "--resume")
    assert spread.exists() and [p.suffix for p in parts.iterdir()] == [".pt"] * 5
    message = begun(9, "--resume", "--fk-every", "3")
    assert "does not fit this run" in message and "fk_every" in message
    same = texts.read_text()
    texts.write_text(same.replace("red", "grey"))
    assert "texts" in begun(9, "--resume")
    texts.write_text(same)
    with monkeypatch.context() as m:  # all parts are there, the scorers fail
        m.delattr(fks, "score_images")
        left[0] = 4
        pytest.raises(NameError, run, out, *argv, "--resume")
    assert left == [0] and len([*parts.iterdir()]) == 9
    run(out, *argv, "--resume")
    assert left == [0] and result() == whole and not parts.exists()


MISUSE = {
    "--prompts nowhere.txt": "no file of prompts nowhere.txt",
    "--value a.pt b.pt": "names 2 files for the 1 rewards",
    "--value nowhere.pt": "nowhere.pt does not exist",
    "--preset 24gb --scorers clip": "no file of prompts None",
    "--scorers clip beauty": "there is no beauty",
    "--reward ugly+clip": "there is no ugly",
    "--resolution 128": "does not fit",
}


@pytest.mark.parametrize("argv", MISUSE)
def test_misuse_is_answered_in_one_sentence(out, argv):
    with pytest.raises(SystemExit, match="^error: ") as e:
        run(out, "--limit", "2", *argv.split())
    assert MISUSE[argv] in str(e.value)
