"""Stage 06 on Gaussian data where everything is known, on small random models, and once, short, on the miniature: seconds each."""
import copy
import importlib
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.testing import assert_close

import common
from test_common import small_sd3

fks = importlib.import_module("06_fks")
DEAD = -math.inf


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- drawing
def test_pick_never_takes_weight_zero():
    """The inverse CDF at its edges: u = 0 and 1, zeros first, in the middle and last; float32, whose sums do not end at 1."""
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
    assert (counts.mean(0) - 4 * w).abs().max() < 4 * 1.0 / 20000 ** 0.5
    spread = counts.var(0)
    assert_close(spread[0], torch.tensor(4 * 0.1 * 0.9 if scheme == "multinomial" else 0.4 * 0.6).double(), rtol=0.1, atol=0)


def test_normalised():
    """A constant changes nothing, 1e4 stays finite, the dead weigh nothing, and where all are dead all weigh the same."""
    logw = torch.randn(3, 5).double()
    assert_close(fks.normalised(logw + 1e4), fks.normalised(logw))
    assert fks.normalised(1e4 * logw).isfinite().all() and fks.normalised(torch.tensor([[1e4, -1e4]])).tolist() == [[1, 0]]
    assert fks.normalised(torch.tensor([[0.0, DEAD], [DEAD, DEAD]])).tolist() == [[1, 0], [0.5, 0.5]]


# ---------------------------------------------------------------------------- one proposal of M
def test_choose_argmax():
    v = torch.tensor([[1.0, 3.0, 2.0], [math.nan, -5.0, math.inf]])
    index, gain = fks.choose(v, 2.0, torch.rand(2))
    assert index.tolist() == [1, 1] and gain.tolist() == [0, 0]


def test_choose_corrected_is_properly_weighted():
    """E[f(chosen) factor] = mean_m exp(lam v_m) f(m) for any f, by all u on a fine grid; NaN is never chosen and counts as weight zero."""
    v, lam, f = torch.tensor([0.3, -0.7, math.nan, 1.1]).double(), 1.7, torch.tensor([2.0, -1.0, 1e9, 5.0]).double()
    u = (torch.arange(100000).double() + 0.5) / 100000
    index, gain = fks.choose(v.expand(100000, 4), lam, u, "corrected")
    alive = [0, 1, 3]
    expected = ((lam * v[alive]).exp() * f[alive]).sum() / 4
    assert float((f[index] * gain.exp()).mean()) == pytest.approx(float(expected), rel=1e-4)
    assert fks.choose(torch.full((1, 4), math.nan), lam, torch.rand(1), "corrected")[1].item() == DEAD


def test_choose_corrected_stays_finite_at_large_values():
    index, gain = fks.choose(torch.tensor([[1e4, -1e4, 1e4 - 1]]), 5.0, torch.tensor([0.5]), "corrected")
    assert index.item() == 0 and gain.item() == pytest.approx(5e4 + math.log(1 / 3))


# ---------------------------------------------------------------------------- potentials
@pytest.mark.parametrize("potential, gains, last", [
    ("diff", [2 * 1, 2 * (3 - 1), 2 * (2 - 3)], 2 * (5 - 2)),
    ("max", [2 * 1, 2 * 3, 2 * 3], 2 * 5 - (2 + 6 + 6)),
    ("add", [2 * 1, 2 * 4, 2 * 6], 2 * 11 - (2 + 8 + 12))])
def test_potentials_by_hand(potential, gains, last):
    """Values 1, 3, 2 on the way and 5 at the end, lam = 2; the last weighing divides out what was paid before, so the product is the target's."""
    books, total = fks.new_books(1, 1, torch.zeros(1).double()), 0.0
    for v, gain in zip((1.0, 3.0, 2.0), gains):
        books = fks.weigh(books, torch.tensor([[v]]).double(), 2.0, potential)
        total += gain
        assert books["logw"].item() == books["paid"].item() == total
    books = fks.weigh(books, torch.tensor([[5.0]]).double(), 2.0, potential, last=True)
    assert books["logw"].item() == total + last == {"diff": 10, "max": 10, "add": 22}[potential]


def test_max_of_negative_values_is_not_zero():
    """The official code starts at 0, where all negative rewards tie."""
    books = fks.weigh(fks.new_books(1, 2, torch.zeros(1)), torch.tensor([[-3.0, -1.0]]), 1.0, "max")
    assert books["logw"].tolist() == [[-3, -1]]


@pytest.mark.parametrize("potential", ["diff", "max", "add"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_kills_one_particle(potential, bad):
    """Its weight is zero from then on, it is counted once, the others are as if it had not been there."""
    values = torch.tensor([[[1.0, 1.0]], [[2.0, bad]], [[3.0, 9.0]]])
    books = fks.new_books(1, 2, torch.zeros(1))
    for v in values:
        books = fks.weigh(books, v, 1.0, potential)
    alone = fks.new_books(1, 1, torch.zeros(1))
    for v in values[:, :, :1]:
        alone = fks.weigh(alone, v, 1.0, potential)
    assert books["logw"][0].tolist() == [alone["logw"].item(), DEAD] and books["killed"].tolist() == [1]


def test_select():
    r = torch.tensor([[1.0, math.nan, 3.0, 2.0], [math.nan] * 4])
    books = dict(logw=torch.tensor([[DEAD, DEAD, DEAD, 0.0], [DEAD] * 4]))
    assert fks.select(r, books, None).tolist() == [[2], [0]]
    assert fks.select(r, books, torch.rand(2, 4), "mean").tolist() == [[3, 3, 3, 3], [0, 1, 2, 3]]


# ---------------------------------------------------------------------------- Gaussian data: z_0 ~ N(M, V), r(z_0) = z_0
M, V, LAM = 0.7, 0.25, 2.0
GRID = common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 40, 16).double().tolist()
FK = range(8, 33, 4)


def z0_hat(z, t):
    """E[r(z_0) | z_t], the exact value."""
    return M + V * (1 - t) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)


def velocity(z, t, prefix=None):
    return (t - (1 - t) * V) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M) - M


def law_of_the_sampler():
    """Mean and variance of z_0 from the 40 steps, each of which is affine: .7 and .2282, not .25, is what is tilted."""
    mean, variance, noise = 0.0, 1.0, torch.tensor([0.0, 0.0, 1.0])
    for t, s in zip(GRID, GRID[1:]):
        z = torch.tensor([0.0, 1.0, 0.0])
        shift, slope, spread = common.sde_step(z, velocity(z, t), t, s, noise).tolist()
        mean, variance = (slope - shift) * mean + shift, (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


def gaussian(P=1, N=4, lam=LAM, M=1, seed=0, order=None, **kwargs):
    """steer() with the exact velocity and values; z (P, N) and the books after the last weighing. order: a permutation of all particles' noises."""
    g = torch.Generator().manual_seed(seed)
    order = torch.arange(N) if order is None else order
    noise = lambda k, m: torch.randn(P, N, m, 1, dtype=torch.float64, generator=g)[:, order]
    uniform = lambda k: torch.rand(2, P, N, dtype=torch.float64, generator=g)[:, :, order]
    score = kwargs.pop("score", lambda z: z[:, 0])
    value = kwargs.pop("value", lambda z, t: (z0_hat(z[:, 0], t), None))
    start, denoise = noise("start", 1)[:, :, 0], kwargs.pop("denoise", velocity)
    z, books = fks.steer(start, GRID, denoise, noise, uniform, lam, **{"fk_steps": FK, "score": score, "value": value, "propose": 16, "M": M, **kwargs})
    return z[..., 0], fks.weigh(books, score(z.flatten(0, 1)).view(P, N), lam, kwargs.get("potential", "diff"), last=True)


def errors(z, books, lam=LAM):
    """How many standard errors the weighted mean and variance are from those of the tilted law; the errors are from P independent repetitions."""
    mean, variance = law_of_the_sampler()
    w = fks.normalised(books["logw"])
    found = (w * z).sum(1)
    spread = (w * (z - mean - lam * variance).square()).sum(1)
    return [float((x.mean() - target) / (x.std() / len(x) ** 0.5)) for x, target in ((found, mean + lam * variance), (spread, variance))]


WAYS = [dict(resampling=r, adaptive=a, by=by) for r in ("multinomial", "systematic") for a in (None, 0.7) for by in ("tweedie", "stitchvm")]
name = lambda way: "-".join(str(v) for v in way.values())


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_particles_follow_the_tilted_law(way):
    """exp(lam r) times the sampler's own Gaussian: mean + lam variance, the same variance. Plain samples are a hundred standard errors away."""
    z, books = gaussian(24, 500, **way)
    assert max(map(abs, errors(z, books))) < 4
    z, books = gaussian(24, 500, fk_steps=())
    assert errors(z, dict(logw=torch.zeros_like(z)))[0] < -20  # so the test would see it


def test_the_error_shrinks_with_n():
    """The particles converge: the squared error of the mean falls about as 1/N."""
    mean, variance = law_of_the_sampler()

    def error(N, P):
        z, books = gaussian(P, N)
        return float(((fks.normalised(books["logw"]) * z).sum(1) - mean - LAM * variance).square().mean())
    assert error(1000, 50) < error(100, 100) / 4 < error(10, 200) / 16


@pytest.mark.parametrize("by", ["tweedie", "stitchvm"])
@pytest.mark.parametrize("adaptive", [None, 0.7])
def test_corrected_proposals_keep_the_law(by, adaptive):
    """M = 4 proposals drawn in proportion to exp(lam V), the weight times their mean: the same law as without. In 30 steps, because V varies little
    among the first ones' proposals: paying the mean instead of the chosen value would show there by two standard errors, here by twenty."""
    z, books = gaussian(24, 1000, lam=3.0, M=4, proposal="corrected", propose=30, by=by, adaptive=adaptive)
    assert max(map(abs, errors(z, books, 3.0))) < 4


@pytest.mark.parametrize("proposal", ["argmax", "corrected"])
def test_on_the_way_a_line_has_paid_its_last_value(proposal):
    """Under diff the factors so far multiply to exp(lam V) of the present latent or of the last one weighed, not to a product of many values."""
    g = torch.Generator().manual_seed(0)
    noise, uniform = (lambda k, m: torch.randn(2, 6, m, 1, generator=g).double()), (lambda k: torch.rand(2, 2, 6, generator=g).double())
    z, books = fks.steer(noise(0, 1)[:, :, 0], GRID[:13], velocity, noise, uniform, LAM, FK, None, lambda z, t: (z0_hat(z[:, 0], t), None), 16, 3, proposal, by="stitchvm")
    assert_close(books["paid"], LAM * z0_hat(z[..., 0], GRID[12]))
    assert (books["logw"] == 0).all()  # step 12 has just resampled


def test_argmax_proposals_do_not():
    """Algorithm 1's argmax moves the mean beyond the tilted law, however many particles there are."""
    z, books = gaussian(24, 500, M=4)
    mean, variance = law_of_the_sampler()
    bias = float((fks.normalised(books["logw"]) * z).sum(1).mean()) - mean - LAM * variance
    assert errors(z, books)[0] > 8 and 0.05 < bias < 1


@pytest.mark.parametrize("potential", ["diff", "max", "add"])
@pytest.mark.parametrize("proposal", ["argmax", "corrected"])
@pytest.mark.parametrize("by", ["tweedie", "stitchvm"])
def test_everything_telescopes(potential, proposal, by):
    """Along each line that is left, whatever was resampled, proposed and carried, all factors multiply to exp(lam target)."""
    seen = []  # values of each weighing, (P, N), copied along with the particles
    original = fks.weigh

    def spy(books, v, *args, **kwargs):
        books = original(dict(books, history=None), v, *args, **kwargs)
        seen.append(books["running"])
        return books
    fks.weigh = spy
    try:
        z, books = gaussian(3, 6, M=3, potential=potential, proposal=proposal, by=by, adaptive=0.9)
    finally:
        fks.weigh = original
    assert_close(books["paid"], LAM * books["running"])
    if potential == "diff":
        assert_close(books["paid"], LAM * z)
    elif potential == "max":
        assert (books["running"] >= z).all()
    assert len(seen) == (len(FK) + 1 if potential != "diff" or proposal == "argmax" else 5)  # 20, 24, 28, 32 and the end


@pytest.mark.parametrize("potential", ["diff", "max", "add"])
def test_never_resampled_is_importance_weighting(potential):
    """The samples are the plain ones, the carried weights are exp(lam r), exp(lam max), exp(lam sum) of what was scored: one-step estimates, then z_0."""
    scored, path = [], []
    score = lambda z: (scored.append(z[:, 0].view(2, 50)), z[:, 0])[1]
    denoise = lambda z, t, prefix: (path.append((z[:, 0].view(2, 50), t)), velocity(z, t))[1]
    z, books = gaussian(2, 50, potential=potential, adaptive=1e-9, score=score, denoise=denoise)
    assert torch.equal(z, gaussian(2, 50, fk_steps=())[0])
    values = torch.stack(scored)
    assert_close(books["logw"], LAM * dict(diff=values[-1], max=values.amax(0), add=values.sum(0))[potential])
    assert len(scored) == len(FK) + 1
    for step, v in zip(FK, scored):  # step 8 is weighed by the estimate that it was made from, of the latent before it
        assert_close(v, z0_hat(*path[step - 1]))


def test_m_1_is_plain_fks_bit_for_bit():
    plain, one = (gaussian(4, 6, M=m, value=v) for m, v in ((1, None), (1, lambda z, t: 1 / 0)))
    assert torch.equal(plain[0], one[0]) and torch.equal(plain[1]["logw"], one[1]["logw"])
    assert not torch.equal(plain[0], gaussian(4, 6, M=2)[0])


def test_lam_0_is_plain_sampling():
    """Equal weights: systematic resampling copies every particle once. The multinomial one draws among plain samples."""
    plain = gaussian(4, 6, fk_steps=())[0]
    assert torch.equal(gaussian(4, 6, lam=0.0, resampling="systematic")[0], plain)
    assert torch.equal(gaussian(4, 6, lam=0.0, adaptive=0.5)[0], plain)
    assert (gaussian(4, 6, lam=0.0)[1]["logw"] == 0).all()


@pytest.mark.parametrize("kwargs", [dict(adaptive=1e-9, M=3), dict(adaptive=1e-9, M=3, proposal="corrected", by="stitchvm")], ids=["argmax", "corrected"])
def test_permuting_the_particles_permutes_the_result(kwargs):
    order = torch.tensor([3, 0, 4, 1, 2])
    z, books = gaussian(2, 5, **kwargs)
    again, others = gaussian(2, 5, order=order, **kwargs)
    assert torch.equal(z[:, order], again)
    assert_close(books["logw"][:, order], others["logw"])


def test_lam_in_units_of_the_spread_does_not_see_the_rewards_scale():
    """The reward times 20 plus 5, at lam / 20: the same particles, with proposals of either kind."""
    for proposal in ("argmax", "corrected"):
        kwargs = dict(P=3, N=6, M=2, proposal=proposal)
        z, books = gaussian(**kwargs)
        again, _ = gaussian(**kwargs, lam=LAM / 20, score=lambda z: 20 * z[:, 0] + 5, value=lambda z, t: (20 * z0_hat(z[:, 0], t) + 5, None))
        assert torch.equal(z, again)


def test_huge_values_stay_finite():
    z, books = gaussian(3, 6, M=3, proposal="corrected", lam=1e4, score=lambda z: 1e4 * z[:, 0], value=lambda z, t: (1e4 * z0_hat(z[:, 0], t), None))
    assert z.isfinite().all() and books["logw"].isfinite().all() and books["killed"].sum() == 0


@pytest.mark.parametrize("adaptive", [None, 1e-9], ids=["resampled", "carried"])
def test_a_nan_kills_its_particle_not_the_run(adaptive):
    """A latent that becomes NaN after the third step: dropped where particles are resampled, without weight where they are not, and counted."""
    def broken(z, t, prefix):
        return torch.where((torch.arange(len(z)) == 2)[:, None] & (t == GRID[3]), math.nan, velocity(z, t))
    z, books = gaussian(P=2, N=4, adaptive=adaptive, denoise=broken)
    assert books["killed"].tolist() == [1, 0]
    assert z.isfinite().all() if adaptive is None else (~z.isfinite()).nonzero().tolist() == [[0, 2]] and books["logw"][0, 2] == DEAD
    assert fks.normalised(books["logw"]).isfinite().all()


# ---------------------------------------------------------------------------- models: the shared prefix, joint rewards
@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


def stitched(sd3, null, i, seed=0):
    """A value with the real prefix and a random head of eight numbers."""
    g = torch.Generator().manual_seed(seed)
    value = SimpleNamespace(transformer=sd3, null=null, i=i, front="dit", W=torch.randn(32, 8, generator=g), score=lambda e, text: (e * text).sum(-1))
    value.features = lambda z, sigma, state=None: common.StitchedValue.features(value, z, sigma, state)
    value.head = lambda f: (torch.tanh(f.mean((2, 3)) @ value.W), None)
    return value


def models(sd3, values, cfg=4.5, batch=100):
    """Two prompts on the random SD3, latents of 10 x 6, decoded to themselves, with a reward that is linear in their means."""
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=g)
    condition, null, text = (random(2, 5, 24), random(2, 20)), (random(1, 5, 24), random(1, 20)), random(2, 8)
    backbone = SimpleNamespace(transformer=sd3, device=torch.device("cpu"), dtype=torch.float32, decode=lambda z: z,
                               velocity=partial(common.velocity, sd3))
    reward = SimpleNamespace(embed=lambda x: (x.mean((2, 3))[:, :8] + 0.1, None), score=lambda e, text: (e * text).sum(-1))
    values = [stitched(sd3, list(null), i, seed) for seed, i in enumerate(values)]
    return fks.Models(backbone, condition, null, cfg, [reward] * len(values), [text] * len(values), values, batch)


def steered(models, N=3, steps=6, **kwargs):
    noise, uniform = fks.draws(0, [0, 1], N, (16, 10, 6), "cpu")
    grid = torch.linspace(1, 0, steps + 1).tolist()
    return fks.steer(noise("start")[:, :, 0], grid, models.at([0, 1]).denoise, noise, uniform, 2.0, (2, 4), models.score, models.value, **kwargs)


@pytest.mark.parametrize("values", [[2], [3, 1], [4]], ids=str)
@pytest.mark.parametrize("kwargs", [dict(propose=4, M=3), dict(propose=2, M=2, by="stitchvm", proposal="corrected"), dict(by="stitchvm")], ids=["proposals", "corrected", "potentials"])
def test_the_shared_prefix_changes_nothing(sd3, values, kwargs):
    """The winner's state, resampled with it, resumed as the unconditional half: the same particles as with two whole denoiser rows, but for rounding."""
    shared, apart = models(sd3, values), models(sd3, values)
    assert shared.shares
    apart.shares = False
    (z, books), (again, others) = steered(shared, **kwargs), steered(apart, **kwargs)
    assert_close(z, again, atol=1e-3, rtol=0)
    assert torch.equal(books["origin"], others["origin"])
    assert_close(books["logw"], others["logw"], atol=1e-3, rtol=0)


def test_a_resumed_velocity(sd3):
    g = torch.Generator().manual_seed(4)
    z, sigma = torch.randn(3, 16, 10, 6, generator=g), torch.rand(3, generator=g)
    condition, null = [(torch.randn(3, 5, 24, generator=g), torch.randn(3, 20, generator=g)) for _ in range(2)]
    for i in (1, 4):
        prefix = common.run_blocks(sd3, common.begin(sd3, z, sigma, *null), i)
        assert_close(common.velocity(sd3, z, sigma, condition, null, 4.5, prefix=prefix), common.velocity(sd3, z, sigma, condition, null, 4.5), atol=1e-4, rtol=0)


def test_blocks_that_run(sd3):
    """Rows that pass each block: the proposals only the first i, the unconditional rows whose prefix is resumed only those after it."""
    seen, N, steps, cut, m = [0] * 4, 3, 6, 2, 3
    hooks = [b.register_forward_hook(lambda block, args, kwargs, out, n=n: seen.__setitem__(n, seen[n] + len(kwargs["hidden_states"])), with_kwargs=True)
             for n, b in enumerate(sd3.transformer_blocks)]
    try:
        steered(models(sd3, [cut]), N=N, steps=steps, propose=4, M=m)
    finally:
        for hook in hooks:
            hook.remove()
    rows, proposed = 2 * N * steps * 2, 2 * N * 4  # two prompts, two halves; four steps with proposals
    assert seen == [rows + m * proposed - proposed] * cut + [rows] * (4 - cut)


@pytest.mark.parametrize("cfg, other, shares", [(4.5, None, True), (1.0, None, False), (4.5, "null", False), (4.5, "backbone", False), (4.5, "front", False)],
                         ids=["cfg", "no cfg", "another null text", "another backbone", "a latent front"])
def test_when_the_prefix_is_shared(sd3, cfg, other, shares):
    kit = models(sd3, [2], cfg)
    if other == "null":
        kit.values[0].null = [torch.randn(1, 7, 24), torch.randn(1, 20)]
    elif other == "backbone":
        kit.values[0].transformer = copy.deepcopy(sd3)
    elif other == "front":
        kit.values[0].front, kit.values[0].W = "vae", torch.randn(16, 8)
    kit = fks.Models(kit.backbone, kit.condition, kit.null, cfg, kit.rewards, kit.texts, kit.values, 100)
    assert kit.shares is shares
    assert (kit.at([0, 1]).value(torch.randn(2, 16, 10, 6), 0.5)[1] is not None) is shares


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_parts_of_a_batch_belong_to_their_prompts(sd3, batch):
    """Two prompts' particles in parts of any size: the same velocities, values, rewards and states."""
    whole, parts, z = models(sd3, [2, 1]).at([1, 0]), models(sd3, [2, 1], batch=batch).at([1, 0]), torch.randn(6, 16, 10, 6)
    v, state = whole.value(z, 0.5)
    again, states = parts.value(z, 0.5)
    assert_close(v, again, atol=1e-5, rtol=1e-4)
    assert states["i"] == 2 and states["h"].shape == state["h"].shape
    for prefix, other in ((None, None), (state, states)):
        assert_close(whole.denoise(z, 0.5, prefix), parts.denoise(z, 0.5, other), atol=1e-4, rtol=1e-4)
    assert_close(whole.score(z), parts.score(z))
    assert (whole.score(z) - models(sd3, [2, 1]).at([0, 1]).score(z)).abs().max() > 0.1


def test_joint_value_is_the_sum_and_shares_its_blocks(sd3):
    """In either order, on one transformer; a latent front has no state and takes none."""
    null = [torch.randn(1, 5, 24), torch.randn(1, 20)]
    a, b, z, sigma, texts = stitched(sd3, null, 3), stitched(sd3, null, 1, seed=5), torch.randn(2, 16, 10, 6), torch.rand(2), [torch.randn(2, 8), torch.randn(2, 8)]
    alone = sum(common.joint_value([v], z, sigma, [t])[0] for v, t in zip((a, b), texts))
    total, prefixes = common.joint_value([a, b], z, sigma, texts)
    assert_close(total, alone)
    assert prefixes[id(sd3)]["i"] == 3
    assert_close(common.joint_value([b, a], z, sigma, texts[::-1])[0], alone)
    latent = stitched(sd3, null, 2, seed=6)
    latent.front, latent.W = "vae", torch.randn(16, 8)
    assert common.joint_value([latent], z, sigma, texts[:1])[1] == {}
    assert_close(common.joint_value([latent, a], z, sigma, texts)[0], sum(common.joint_value([v], z, sigma, [t])[0] for v, t in zip((latent, a), texts)))


def test_draws_do_not_depend_on_n_m_or_the_batch():
    """The first particles and proposals of a larger run are those of a smaller one: methods are compared on the same noises."""
    noise, uniform = fks.draws(0, [5, 6], 4, (16, 4, 4), "cpu")
    small, few = fks.draws(0, [6], 2, (16, 4, 4), "cpu")
    assert torch.equal(noise(3, 4)[1:, :2, :2], small(3, 2)) and torch.equal(noise("start")[1:, :2], small("start"))
    assert not torch.equal(noise(3), noise(4)) and uniform(3).shape == (2, 2, 4)
    assert torch.equal(uniform(3)[:, 1:, :2], few(3))
    assert not torch.equal(noise(3)[0], noise(3)[1]) and not torch.equal(noise(3)[:, 0], noise(3)[:, 1])
    assert not torch.equal(fks.draws(1, [6], 2, (16, 4, 4), "cpu")[0](3), small(3))


# ---------------------------------------------------------------------------- what is run, and what it costs
def flags(*argv):
    args = fks.parse_args(list(argv))
    fks.complete(args, flux=False)
    return args


def counts(*argv, shares=True):
    args = flags("--methods", "fks+stitchvm", *argv)
    return fks.rows_per_prompt(fks.plan(args)[0], args, shares)


def test_rows_per_prompt_by_hand():
    """N = 4, M = 2, 40 steps of two rows, 16 of them with proposals, weighed after 8, 12 .. 32, and four clean images."""
    assert counts() == dict(denoiser=320, shared=64, value=128, score=28 + 4)
    assert counts(shares=False) == dict(denoiser=320, shared=0, value=128, score=32)
    assert counts("--potential-value", "stitchvm") == dict(denoiser=320, shared=80, value=128 + 16, score=4)  # 20, 24, 28, 32 have no proposals
    assert counts("--proposal", "corrected") == dict(denoiser=320, shared=64, value=128, score=16 + 4)
    assert counts("--proposal", "corrected", "--potential", "max")["score"] == 32
    assert counts("--m", "1") == dict(denoiser=320, shared=0, value=0, score=32)
    assert counts("--n", "8", "--m", "6")["value"] == 8 * 6 * 16
    assert counts("--cfg", "1", shares=False)["denoiser"] == 160


def test_schedules():
    """D.2: 8 to 32 of 40 at cfg 4.5; FLUX 6 to 22 of 28 without, 11 steps with proposals; flags win."""
    args = flags()
    assert (args.steps, args.cfg, args.fk_start, args.fk_end) == (40, 4.5, 8, 32)
    assert list(fks.settings(fks.plan(args)[2], args)["fk_steps"]) == [8, 12, 16, 20, 24, 28, 32]
    args = fks.parse_args(["--backbone", "flux"])
    fks.complete(args, True)
    of = fks.settings(fks.plan(args)[3], args)
    assert (args.steps, args.cfg, list(of["fk_steps"]), of["propose"]) == (28, 1.0, [6, 10, 14, 18, 22], 11)
    args = flags("--steps", "20", "--cfg", "1", "--fk-start", "1", "--fk-every", "7")
    assert list(fks.settings(fks.plan(args)[2], args)["fk_steps"]) == [1, 8, 15] and args.cfg == 1


def test_plan_of_a_study():
    runs = fks.plan(flags("--n", "2", "4", "--n-stitchvm", "2", "--m", "2", "6", "--proposal", "argmax", "corrected", "--potential-value", "stitchvm"))
    assert [(r["method"], r["N"], r["M"], r["proposal"]) for r in runs] == [
        ("flow", 1, 1, "argmax"), ("bon", 2, 1, "argmax"), ("bon", 4, 1, "argmax"), ("fks", 2, 1, "argmax"), ("fks", 4, 1, "argmax"),
        *[("fks+stitchvm", 2, m, p) for m in (2, 6) for p in ("argmax", "corrected")]]


@pytest.mark.parametrize("argv, message", [
    (["--n", "4", "0"], "--n is"), (["--m", "0"], "--m is"), (["--steps", "0"], "--steps is 0"), (["--fk-start", "30", "--fk-end", "20"], "in order"), (["--fk-end", "41"], "--fk-end 41"),
    (["--propose", "1.5"], "--propose"), (["--adaptive", "0"], "--adaptive"), (["--limit", "0"], "--limit")], ids=lambda v: v[0] if isinstance(v, list) else "")
def test_misuse_of_numbers(argv, message):
    with pytest.raises(SystemExit, match="^error: ") as e:
        flags(*argv)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_dry_run_reproduces_the_count_of_flux(capsys):
    """One prompt on FLUX at 1024 with HPSv2, counted apart from this code: N = 14 is 30,067 TFLOP, N = 8 with M = 6 after block 4 is 20,138, a third less."""
    fks.main(fks.parse_args(["--dry-run", "--backbone", "flux", "--reward", "hpsv2", "--resolution", "1024", "--n", "14", "--n-stitchvm", "8", "--m", "6"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["stage"], report["backbone"], report["reward"], report["resolution"]) == ("06_fks", "flux", "hpsv2", 1024)
    tflop = {c["method"]: c["tflop"] for c in report["cases"]}
    assert tflop["fks N=14"] == pytest.approx(30067, rel=0.02) and tflop["fks+stitchvm M=6 N=8, i = 4"] == pytest.approx(20138, rel=0.02)
    assert 1 - tflop["fks+stitchvm M=6 N=8, i = 4"] / tflop["fks N=14"] == pytest.approx(0.33, abs=0.005)
    assert tflop["fks+stitchvm M=6 N=8, i = 12"] == pytest.approx(25650, rel=0.02)
    assert all({"method", "unit", "tflop", "saved_gib", "peak_gib"} <= set(c) and c["unit"] == "prompt" for c in report["cases"])


# ---------------------------------------------------------------------------- the miniature
@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run folder with a value model for clip on sd3.5-medium that was never trained."""
    out = tmp_path_factory.mktemp("run")
    backbone, reward = common.Backbone("sd3.5-medium"), common.Reward("clip")
    torch.manual_seed(0)
    null = common.encode_prompts(backbone, [""])
    stitch = common.Stitch(torch.randn(128, 128) / 20, torch.zeros(128), (4, 4))
    value = common.StitchedValue(backbone.transformer, null, reward, stitch, 3, 1)
    spec = dict(backbone=backbone.name, latent_space=backbone.latent_space(), reward="clip", resolution=64, reward_grid=[4, 4], antialias=False,
                i=3, j=1, front="dit", objective="distill", embedding="mean")
    state = {k: v.detach().clone() for k, v in value.trained_state().items()}
    common.save_artifact(out / "value.pt", "03_finetune", fks.parse_args([]), spec, dict(state=state, norm=1.0, null=list(null)))
    return out


def run(out, *argv):
    fks.main(fks.parse_args(["--out", str(out), "--steps", "5", "--spread-samples", "2", *argv]))
    return json.loads((out / "06_fks.json").read_text())


def test_a_short_run(out, capsys):
    """Every promised key; the same initial noises make one sample of bon the plain one; images, figures and the spread are there."""
    table = run(out, "--limit", "3", "--n", "2", "--m", "2", "--proposal", "argmax", "corrected", "--potential-value", "tweedie", "stitchvm", "--report", "best", "mean", "--save-images")
    rows = table["rows"]
    assert len(rows) == 1 + 1 + 2 + 8 and [r["method"] for r in rows[:4]] == ["flow", "bon", "fks", "fks"]
    for row in rows:
        assert {"method", "n_particles", "m_proposals", "reward", "reward_se", "n", "s_per_prompt", "denoiser_calls", "gflop_per_prompt", "report", "ancestors", "killed"} <= set(row)
        assert ({"potential", "proposal", "lambda", "lambda_raw", "ess"} <= set(row)) == row["method"].startswith("fks")
        assert {k for s in ("clip", "dfn-clip", "hpsv2", "aesthetic", "judge", "geneval") for k in (s, f"{s}_se")} <= set(row)
        assert row["n"] == 3 and row["killed"] == 0 and row["reward"] == pytest.approx(row["clip"], abs=1e-4)
        assert 1 <= row["ancestors"] <= row["n_particles"] and row["denoiser_calls"] == 10 * row["n_particles"]
    flow, bon, best, mean = rows[:4]
    assert flow["reward"] <= bon["reward"] and best["reward"] >= mean["reward"] and all(a <= b + 1e-5 for a, b in zip(*table["rewards_of_prompts"][:2]))
    assert flow["gflop_per_prompt"] < bon["gflop_per_prompt"] < best["gflop_per_prompt"] < rows[4]["gflop_per_prompt"]
    assert best["lambda"] == 1 and best["lambda_raw"] == pytest.approx(1 / table["spread"])
    assert table["shared"] is True and table["values"][0]["stage"] == "03_finetune"
    for name in ("06_scaling", "06_grid"):
        assert Image.open(out / f"{name}.png").width > 300
    samples = sorted(p.relative_to(out / "06_images").as_posix() for p in (out / "06_images").rglob("*.png"))
    assert "bon_N=2_best/00002/samples/0000.png" in samples and "fks_N=2_mean/00002/samples/0001.png" in samples
    line = json.loads((out / "06_images/fks_N=2_best/00001/metadata.jsonl").read_text())
    assert line["prompt"] == common.load_prompts(common.ROOT / "tests/mini/data/drawbench.txt")[1]["prompt"]


def test_the_best_of_fewer_is_read_off_the_most(out):
    """Sampled together or alone, best of one and of three are the same, at a third of the seconds."""
    both, one = run(out, "--limit", "3", "--methods", "bon", "--n", "1", "3"), run(out, "--limit", "3", "--methods", "flow", "bon", "--n", "1")
    both_rewards, one_rewards = (torch.tensor(t["rewards_of_prompts"]) for t in (both, one))
    torch.testing.assert_close(both_rewards[0], one_rewards[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(one_rewards[0], one_rewards[1], atol=1e-5, rtol=0)
    assert (both_rewards[1] >= both_rewards[0] - 1e-6).all() and both_rewards[1].mean() > both_rewards[0].mean()
    few, many = both["rows"]
    assert few["s_per_prompt"] == pytest.approx(many["s_per_prompt"] / 3) and few["ancestors"] == 1 and many["ancestors"] == 3


def test_a_dead_particle_counts_where_it_is(out, monkeypatch):
    """Of three samples the last has no reward: one death among three, none among the first two."""
    decode = fks.Models.decode
    monkeypatch.setattr(fks.Models, "decode", lambda self, z: (lambda x, r: (x, torch.where(torch.arange(len(r)) % 3 == 2, torch.nan, r)))(*decode(self, z)))
    two, three = run(out, "--limit", "2", "--methods", "bon", "--n", "2", "3", "--raw-lam", "1")["rows"]
    assert (two["killed"], three["killed"]) == (0, 2) and two["n"] == three["n"] == 2


def test_several_strengths_are_rows(out):
    """One row for each, a curve of its own; best of N has no strength."""
    bon, weak, strong = run(out, "--limit", "2", "--methods", "bon", "fks", "--n", "2", "--lam", "0.5", "4")["rows"]
    assert "lambda" not in bon and (weak["lambda"], strong["lambda"]) == (0.5, 4) and len({r["curve"] for r in (bon, weak, strong)}) == 3
    assert strong["lambda_raw"] == pytest.approx(8 * weak["lambda_raw"])


def test_the_spread_is_measured_once(out, monkeypatch):
    """Kept for the same samples, measured anew for others; --raw-lam needs none."""
    argv = ["--limit", "2", "--methods", "fks", "--n", "2"]
    first = run(out, *argv)["rows"][0]["lambda_raw"]
    record = json.loads((out / "06_spread.json").read_text())
    (out / "06_spread.json").write_text(json.dumps(record | dict(spread=2 * record["spread"])))
    assert run(out, *argv)["rows"][0]["lambda_raw"] == pytest.approx(first / 2)
    assert run(out, *argv, "--seed", "1")["rows"][0]["lambda_raw"] != pytest.approx(first / 2)
    row = run(out, *argv, "--raw-lam", "7")["rows"][0]
    assert row["lambda_raw"] == 7 and row["lambda"] is None


def test_a_joint_reward_is_the_sum(out):
    """Two rewards, two value files, one prefix."""
    value = str(out / "value.pt")
    table = run(out, "--limit", "2", "--n", "2", "--methods", "fks+stitchvm", "--reward", "clip+clip", "--value", value, value, "--raw-lam", "20")
    assert table["rows"][0]["reward"] == pytest.approx(2 * table["rows"][0]["clip"], abs=1e-4) and len(table["values"]) == 2


def test_the_same_seed_gives_the_same_table(out):
    once, again, other = (run(out, "--limit", "2", "--n", "2", "--methods", "fks+stitchvm", "--raw-lam", "20", "--seed", s) for s in ("0", "0", "3"))
    assert once["rewards_of_prompts"] == again["rewards_of_prompts"] != other["rewards_of_prompts"]


@pytest.mark.parametrize("argv", [["--proposal", "argmax"], ["--proposal", "corrected", "--potential-value", "stitchvm"]], ids=["argmax", "corrected"])
def test_counted_gflop_are_what_runs(out, argv):
    """The formula of rows and costs is the operation counter's own total of a run with resumed prefixes."""
    args = fks.parse_args(["--out", str(out), "--steps", "5", "--methods", "fks+stitchvm", "--n", "2", *argv])
    fks.complete(args, False)
    backbone, reward = common.Backbone("sd3.5-medium"), common.Reward("clip")
    (value,), _ = common.load_values(common.value_files(args, ["clip"]), backbone, [reward], 64)
    null, texts = common.encode_prompts(backbone, [""]), ["a red circle on white"]
    models = fks.Models(backbone, common.encode_prompts(backbone, texts), null, 4.5, [reward], [reward.encode_text(texts)], [value], 64)
    run, grid = fks.plan(args)[0], backbone.grid(5, torch.zeros(1, 16, 8, 8)).tolist()
    with torch.no_grad():
        costs = fks.row_costs(fks.gflop, backbone, null, [reward], 64) | fks.value_costs(fks.gflop, backbone, null, [reward], [value], 64)
        counted = fks.gflop(lambda: fks.sample(models, args, run, 1.0, [0], grid, (16, 8, 8), 0))
    assert models.shares and fks.flop_per_prompt(fks.rows_per_prompt(run, args, True), costs) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("argv, message", [
    (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"), (["--value", "a.pt", "b.pt"], "names 2 files for the 1 rewards"), (["--value", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--preset", "24gb"], "--prompts FILE is needed"), (["--reward", "ugly+clip"], "no value model of ugly"), (["--resolution", "128"], "does not fit")], ids=lambda v: v[0] if isinstance(v, list) else "")
def test_misuse_is_answered_in_one_sentence(out, argv, message):
    with pytest.raises(SystemExit, match="^error: ") as e:
        run(out, "--limit", "2", *argv)
    assert message in str(e.value)
