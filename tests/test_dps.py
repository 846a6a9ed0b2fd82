"""Stage 05: guidance on Gaussian data whose tilted law is known, gradients and shared prefixes
against references, and short runs as a user runs them."""

import importlib
import json
import weakref
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_common import NULL, small_sd3, small_value, two_rewards
from torch.testing import assert_close

import common

dps = importlib.import_module("05_dps")
ROOT = Path(__file__).resolve().parents[1]
SQUARE = dps.NU["sde"]
ODE = dps.NU["ode"]
SAMPLERS = pytest.mark.parametrize("nu", [SQUARE, ODE], ids=["sde", "ode"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- Gaussian data
# r(z_0) = lam z_0, so everything is known
M, V = 0.7, 0.25


def sd3_grid(steps):
    return common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), steps, 1024).tolist()


def gaussian_velocity(z, t):
    return (t - (1 - t) * V) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M) - M


def gaussian_gradient(lam):
    """(z, sigma) -> u, V and dV/dz of V_t = lam E[z_0 | z_t]."""

    def gradient(z, sigma):
        t = sigma.double().view(-1, 1)
        slope = (1 - t) * V / ((1 - t) ** 2 * V + t * t)
        value = lam * (M + slope * (z - (1 - t) * M))[:, 0]
        return gaussian_velocity(z, t), value, (lam * slope).expand_as(z)

    return gradient


def plain_velocity(z, sigma):
    return gaussian_velocity(z, sigma.double().view(-1, 1))


def propagate(grid, guide, top=1.0, bottom=0.0, form="exact", nu=SQUARE):
    """Mean and variance at 0 of the sampler from N(0, 1), guided at top >= t > bottom.

    A step is affine in z and noise: its coefficients are read off at three points.
    """
    mean = 0.0
    variance = 1.0
    points = torch.tensor([[0.0], [1.0], [0.0]]).double()
    noise = torch.tensor([[0.0], [0.0], [1.0]]).double()
    for t, t_next in zip(grid, grid[1:], strict=False):
        guides = [guide if top >= t > bottom else (None, 0)]
        z = dps.sample(points, [noise], [t, t_next], plain_velocity, guides, form, nu)
        shift, slope, spread = z[:, 0].tolist()
        mean = (slope - shift) * mean + shift
        variance = (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


@SAMPLERS
@pytest.mark.parametrize("lam, c", [(1.0, 1.0), (-0.5, 4.0)])
def test_exact_guidance_samples_the_tilted_law(nu, lam, c):
    """p(z_0) exp(c r(z_0)) is N(M + c lam V, V). The unguided first step costs O(1 / steps)."""
    error = {}
    for steps in (200, 400):
        mean, variance = propagate(sd3_grid(steps), (gaussian_gradient(lam), c), nu=nu)
        error[steps] = abs(mean - (M + c * lam * V))
        assert variance == pytest.approx(V, abs=0.01)
    assert error[400] < 5e-4 * abs(c * lam) and error[400] < 0.6 * error[200] + 2e-5
    assert propagate(sd3_grid(200), (None, 0), nu=nu)[0] == pytest.approx(M, abs=1e-5)


def test_a_thousand_samples_at_once():
    """The same law by sampling: mean and variance within four standard errors, all samples in one
    batch and each with its own gradient."""
    n, steps = 4000, 100
    g = torch.Generator().manual_seed(1)
    z, *noises = [torch.randn(n, 1, generator=g) for _ in range(steps + 1)]
    guide = (gaussian_gradient(1.0), 1.0)
    z = dps.sample(z, noises, sd3_grid(steps), None, [guide] * steps)
    exact = propagate(sd3_grid(steps), guide)
    assert abs(float(z.mean()) - exact[0]) < 4 * (V / n) ** 0.5
    assert abs(float(z.var()) - exact[1]) < 4 * V * (2 / n) ** 0.5


def test_guidance_above_and_below_add_up_on_linear_rewards():
    """Everything is affine here, so what the two halves of the window move the mean by is what the
    whole one does."""

    def moved(top, bottom):
        return propagate(sd3_grid(60), (gaussian_gradient(1.0), 1.0), top, bottom)[0] - M

    assert moved(1.0, 0.5) > 0.01 and moved(0.5, 0.0) > 0.01
    assert moved(1.0, 0.5) + moved(0.5, 0.0) == pytest.approx(moved(1.0, 0.0), abs=1e-5)


# ---------------------------------------------------------------------------- forms of guidance
def test_guidance_by_hand():
    """d (t/(1-t) + 4.5 t^4) c grad at t = 1/2, the ODE without the second term, and the two forms
    without the factor."""
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.6]])
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0), 0.1 * 10 * (1 + 4.5 / 16) * grad)
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, nu=ODE), 0.1 * 10 * grad)
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, "constant"), 0.1 * 10 * grad)
    unit = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, "unit"), unit)


def test_the_first_step_is_finite():
    """At t = 1 the gradient of a trained V is not exactly zero, and (39) multiplies it by infinity;
    just below it is finite."""
    grad = torch.randn(2, 3)
    assert torch.equal(dps.guidance(grad, 1.0, 0.99, 10.0), torch.zeros(2, 3))
    below = 0.1 * (99 + 4.5 * 0.99**4) * grad
    assert_close(dps.guidance(grad, 0.99, 0.98, 10.0), below, rtol=1e-4, atol=0)
    assert dps.guidance(grad, 1.0, 0.99, 10.0, "constant").abs().max() > 0


def test_unit_guidance_moves_every_sample_as_far():
    """d c, whatever the gradient's size, alone or in a batch; a zero gradient moves nothing."""
    grad = torch.randn(3, 16, 4, 4) * torch.tensor([1e-6, 1.0, 1e4]).view(3, 1, 1, 1)
    move = dps.guidance(grad, 0.7, 0.5, 5.0, "unit")
    assert_close(move.flatten(1).norm(dim=1), torch.ones(3))
    assert_close(move[1:2], dps.guidance(grad[1:2], 0.7, 0.5, 5.0, "unit"))
    assert_close(F.cosine_similarity(move.flatten(1), grad.flatten(1)), torch.ones(3))
    assert torch.equal(dps.guidance(0 * grad, 0.7, 0.5, 5.0, "unit"), 0 * grad)


# ---------------------------------------------------------------------------- rows and windows
GRID = [1.0, 0.75, 0.5, 0.25, 0.125, 0.0]


def planned(grid=GRID, **flags):
    usual = dict(methods=dps.METHODS, strengths_tweedie=[1.0], strengths_stitchvm=[2.0])
    usual |= dict(guide_from=1.0, guide_to=0.0, handover=0.25)
    return dps.plan(Namespace(**usual | flags), grid)


def guided_at(guides):
    """The kinds that are called at the steps of GRID, each of which is called once."""
    seen = []

    def velocity(z, sigma):
        seen.append(("flow", float(sigma[0])))
        return torch.zeros_like(z)

    def gradient(kind, z, sigma):
        seen.append((kind, float(sigma[0])))
        return torch.zeros_like(z), None, torch.ones_like(z)

    calls = [(None if kind == "flow" else partial(gradient, kind), c) for kind, c in guides]
    noises = [torch.zeros(2, 1)] * (len(GRID) - 1)
    z = dps.sample(torch.zeros(2, 1), noises, GRID, velocity, calls, "constant", ODE)
    assert [t for _, t in seen] == pytest.approx(GRID[:-1])  # one call for each step, none for 0
    moves = [c * (a - b) for (_, c), a, b in zip(guides, GRID, GRID[1:], strict=False)]
    assert_close(z, torch.full((2, 1), sum(moves)))
    return "".join(kind[0] for kind, _ in seen)


WINDOWS = [(1, 0, "sssss"), (1, 0.5, "ssfff"), (0.5, 0, "ffsss")]
WINDOWS += [(0.75, 0.25, "fssff"), (1, 0.6, "ssfff"), (0.6, 0, "ffsss")]


@pytest.mark.parametrize("top, bottom, expected", WINDOWS)
def test_windows(top, bottom, expected):
    """sigma > .5 and sigma <= .5 share no step and leave none out."""
    runs = planned(guide_from=top, guide_to=bottom)
    assert guided_at(runs["stitchvm_2"][1]) == expected
    assert guided_at(runs["tweedie_1"][1]) == expected.replace("s", "t")
    assert guided_at(runs["flow_0"][1]) == "fffff"


def test_handover():
    both = "stitchvm+tweedie_2_1"
    assert guided_at(planned()[both][1]) == "ssstt"
    assert guided_at(planned(guide_from=0.75, guide_to=0.2)[both][1]) == "fsstf"
    assert guided_at(planned(handover=0.1)[both][1]) == "sssss"
    assert guided_at(planned(handover=0.9, guide_from=0.5)[both][1]) == "ffttt"


def test_a_row_for_each_strength():
    """The last method takes the lists in step, as far as the shorter goes."""
    runs = planned(strengths_tweedie=[1.0, 2.5, 3.0], strengths_stitchvm=[10.0, 20.0])
    rows = [row for row, _ in runs.values()]
    methods = ["flow", *["tweedie"] * 3, *["stitchvm"] * 2, *["stitchvm+tweedie"] * 2]
    assert [r["method"] for r in rows] == methods
    assert [r["strength"] for r in rows] == [0, 1, 2.5, 3, 10, 20, 10, 20]
    assert [r.get("strength_tweedie") for r in rows] == [None] * 6 + [1, 2.5]
    assert list(runs)[-1] == "stitchvm+tweedie_20_2.5" and len(runs) == 8
    assert {c for kind, c in runs["stitchvm+tweedie_20_2.5"][1] if kind == "tweedie"} == {2.5}
    assert list(planned(methods=["tweedie"])) == ["tweedie_1"]


def test_without_guides_it_is_the_sampler_alone():
    """A step of common's for each noise level; the last one adds no noise."""
    z, noises = torch.randn(2, 3), torch.randn(5, 2, 3)
    seen = []

    def velocity(z, sigma):
        seen.append(z)
        return 0.3 * z

    found = dps.sample(z, noises, GRID, velocity, [(None, 0)] * 5)
    for k, (t, t_next) in enumerate(zip(GRID, GRID[1:], strict=False)):
        assert torch.equal(seen[k], z)
        z = common.sde_step(z, 0.3 * z, t, t_next, noises[k])
    assert torch.equal(found, z)
    noises[-1] = 7
    assert torch.equal(dps.sample(seen[0], noises, GRID, velocity, [(None, 0)] * 5), z)


# ---------------------------------------------------------------------------- gradients
@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return two_rewards(tmp_path_factory)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(n=3):
    """z, sigma, condition, two rewards' texts."""
    sigma = torch.rand(n, generator=torch.Generator().manual_seed(2))
    texts = [F.normalize(random(n, 64, seed=s), dim=-1) for s in (5, 6)]
    return random(n, 16, 10, 6), sigma, [random(n, 5, 24, seed=3), random(n, 20, seed=4)], texts


def functions(sd3, rewards, values, condition, texts, cfg=4.5, share=False, checkpointing=False):
    """dps.step_functions of a small model for the whole batch."""
    more = dict(null=NULL, cfg=cfg, checkpointing=checkpointing)
    backbone = SimpleNamespace(velocity=partial(common.velocity, sd3), decode=decode)
    run = SimpleNamespace(backbone=backbone, rewards=rewards, values=values, null=NULL)
    run.device = torch.device("cpu")
    run.velocity = partial(backbone.velocity, **more)
    run.condition = condition
    run.texts = texts
    run.share = share and sd3
    return dps.step_functions(run, slice(None))


def decode(z):
    """A stand-in for the VAE: smooth, and it mixes neighbours."""
    return torch.sigmoid(F.avg_pool2d(F.interpolate(z[:, :3], scale_factor=8), 5, 1, 2))


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_velocity_is_the_librarys(sd3, cfg):
    """Also with checkpointing, and when the null half is resumed after any block."""
    z, sigma, condition, _ = batch()
    null = [v.expand(3, *v.shape[1:]) for v in NULL]
    un, uc = (sd3(z, *v, sigma * 1000, return_dict=False)[0] for v in (null, condition))
    expected = uc if cfg == 1 else un + cfg * (uc - un)
    velocity = partial(common.velocity, sd3, z, sigma, condition, NULL, cfg)
    assert_close(velocity(), expected, atol=1e-4, rtol=0)
    assert_close(velocity(checkpointing=True), expected, atol=1e-4, rtol=0)
    for i in range(5) if cfg != 1 else ():
        prefix = common.run_blocks(sd3, common.begin(sd3, z, sigma, *null), i)
        assert_close(velocity(prefix=prefix), expected, atol=1e-4, rtol=0)


def rows_run(sd3):
    """A list that fills with (block, batch) as the blocks are run, and what ends it."""
    seen = []

    def note(k, module, args, kwargs, out):
        seen.append((k, len(kwargs["hidden_states"])))

    blocks = enumerate(sd3.transformer_blocks)
    hooks = [b.register_forward_hook(partial(note, k), with_kwargs=True) for k, b in blocks]
    return seen, lambda: [h.remove() for h in hooks]


@pytest.mark.parametrize("depths", [(2,), (4,), (1, 3), (3, 1), (2, 2)], ids=str)
def test_shared_prefix_equals_unshared(sd3, rewards, depths):
    """Velocity, value and gradient are the same; a block runs on three rows a sample where it is
    not shared, on two where it is, once for all values of a joint reward."""
    z, sigma, condition, texts = batch()
    values = [small_value(sd3, r, i) for r, i in zip(rewards, depths, strict=False)]
    texts = texts[: len(values)]
    found = {}
    for share in (False, True):
        seen, stop = rows_run(sd3)
        step = functions(sd3, rewards, values, condition, texts, share=share)[1]["stitchvm"]
        found[share] = step(z, sigma)
        stop()
        rows = [sum(n for k, n in seen if k == block) // 3 for block in range(4)]
        assert rows == [2 + (not share and block < max(depths)) for block in range(4)]
    for a, b in zip(found[False], found[True], strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not any(v.requires_grad for v in found[True])
    assert found[True][2].abs().amax((1, 2, 3)).min() > 0
    alone = [value(z, sigma, text) for value, text in zip(values, texts, strict=True)]
    assert_close(found[True][1], sum(alone), atol=1e-5, rtol=1e-5)


def test_only_the_denoisers_own_prefix_is_resumed(sd3, rewards):
    """A joint reward whose shallower value reads another transformer of the same shape, as Medium's
    value beside Large's own does."""
    z, sigma, condition, texts = batch()
    other = small_sd3()
    torch._foreach_mul_([p.data for p in other.parameters()], 1.5)
    values = [small_value(sd3, rewards[0], 3), small_value(other, rewards[1], 1)]
    given = (sd3, rewards, values, condition, texts)
    apart, shared = (
        functions(*given, share=share)[1]["stitchvm"](z, sigma) for share in (False, True)
    )
    for a, b in zip(apart, shared, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_stitchvm_gradient_is_autograds_of_the_value(sd3, rewards, share):
    """And the denoiser adds nothing to it and keeps nothing: what autograd keeps does not grow with
    the blocks after i."""
    z, sigma, condition, texts = batch()
    value = small_value(sd3, rewards[0], 2)
    step = functions(sd3, rewards, [value], condition, texts[:1], share=share)[1]["stitchvm"]
    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(x, sigma, texts[0]).sum(), x)
    assert_close(step(z, sigma)[2], expected, atol=1e-6, rtol=1e-4)

    def alone():
        value(z.clone().requires_grad_(), sigma, texts[0]).sum().backward()

    whole = dps.kept_for_backward(partial(step, z, sigma), [sd3, value])
    assert whole == pytest.approx(dps.kept_for_backward(alone, [sd3, value]), rel=0.01)
    assert not z.requires_grad and z.grad is None


def test_what_is_kept_for_the_backward_pass():
    """By hand, in bytes: a product keeps both factors, a storage counts once, weights do not."""
    x = torch.ones(5, requires_grad=True)
    y = torch.ones(5)
    assert dps.kept_for_backward(lambda: x * y) == 20  # y needs no gradient: x is not kept
    assert dps.kept_for_backward(lambda: x * x) == 20
    assert dps.kept_for_backward(lambda: (x * y).sum() + (x[:2] * y[:2]).sum()) == 20
    linear = torch.nn.Linear(5, 3)
    assert dps.kept_for_backward(lambda: linear(x)) == 20 + 60
    assert dps.kept_for_backward(lambda: linear(x), [linear]) == 20
    with torch.no_grad():
        assert dps.kept_for_backward(lambda: x * y) == 0


def test_a_step_along_the_gradient_raises_the_value(sd3, rewards):
    z, sigma, condition, texts = batch()
    value = small_value(sd3, rewards[0], 2)
    step = functions(sd3, rewards, [value], condition, texts[:1])[1]["stitchvm"]
    _, before, grad = step(z, sigma)
    for form in ("exact", "constant", "unit"):
        move = dps.guidance(grad, 0.6, 0.5, 1.0, form)
        small = 0.05 * move / move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (value(z + small, sigma, texts[0]) > before).all()
        assert (value(z - small, sigma, texts[0]) < before).all()


def chain(sd3, rewards, condition, texts, sigma, cfg, z):
    """Tweedie's value by the library's own forward and open_clip's own towers."""
    text, pooled = (torch.cat([n.expand_as(c), c]) for n, c in zip(NULL, condition, strict=True))
    times = torch.cat([sigma, sigma]) * 1000
    un, uc = sd3(torch.cat([z, z]), text, pooled, times, return_dict=False)[0].chunk(2)
    x = decode(z - sigma.view(-1, 1, 1, 1) * (cfg * uc + (1 - cfg) * un))
    total = 0
    for reward, t in zip(rewards, texts, strict=True):
        e = reward.visual(reward.normalise(reward.resize(x)))
        total = total + (F.normalize(e, dim=-1) * t).sum(-1)
    return total


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_tweedie_gradient(sd3, rewards, cfg):
    """Against central differences, of a joint reward, through both halves of the velocity."""
    z, sigma, condition, texts = batch(2)
    expected = partial(chain, sd3, rewards, condition, texts, sigma, cfg)
    given = (sd3, rewards, [], condition, texts, cfg)
    u, value, grad = functions(*given)[1]["tweedie"](z, sigma)
    assert_close(value, expected(z).detach(), atol=1e-4, rtol=0)
    assert_close(u, common.velocity(sd3, z, sigma, condition, NULL, cfg), atol=1e-5, rtol=0)
    with torch.no_grad():
        for _ in range(3):
            direction = torch.randn_like(z)
            ends = [expected(z + s * direction).double() for s in (1e-2, -1e-2)]
            change = ((ends[0] - ends[1]) / 2e-2).tolist()
            assert (grad * direction).sum((1, 2, 3)).tolist() == pytest.approx(
                change, rel=5e-2, abs=2e-3
            )
    again = functions(*given, checkpointing=True)[1]["tweedie"](z, sigma)
    assert_close(again[2], grad, atol=1e-6, rtol=1e-4)


def test_checkpointing_keeps_less(sd3):
    """Of each block only what enters it; the gradient is the same."""
    z, sigma, condition, _ = batch()
    grads = []

    def step(checkpointing):
        x = z.clone().requires_grad_()
        u = common.velocity(sd3, x, sigma, condition, NULL, 4.5, checkpointing=checkpointing)
        u.square().sum().backward()
        grads.append(x.grad)

    plain, less = (dps.kept_for_backward(partial(step, c), [sd3]) for c in (False, True))
    assert less < 0.3 * plain
    assert_close(*grads)


def test_strength_zero_is_the_plain_sampler(sd3, rewards):
    """Bit for bit, where nothing is shared."""
    z, _, condition, texts = batch()
    values = [small_value(sd3, rewards[0], 2)]
    velocity, gradients = functions(sd3, rewards[:1], values, condition, texts[:1])
    noises = torch.randn(5, *z.shape)
    with torch.no_grad():
        plain = dps.sample(z, noises, GRID, velocity, [(None, 0)] * 5)
        for kind in ("tweedie", "stitchvm"):
            guides = [(gradients[kind], 0.0)] * 5
            assert torch.equal(dps.sample(z, noises, GRID, velocity, guides), plain)


def test_shares_prefix(sd3, rewards, capsys):
    values = [small_value(sd3, rewards[0], 2)]
    backbone = SimpleNamespace(transformer=sd3)
    near, far = ([v + 1e-4 for v in NULL], [v.roll(1, -1) for v in NULL])
    assert common.shares_prefix(values, backbone, NULL, 4.5)
    assert common.shares_prefix(values, backbone, near, 4.5)
    assert not common.shares_prefix(values, backbone, NULL, 1.0)
    assert not common.shares_prefix([], backbone, NULL, 4.5)
    of_latents = [small_value(sd3, rewards[0], 2, front="vae")]
    assert not common.shares_prefix(of_latents, backbone, NULL, 4.5)
    assert not common.shares_prefix(values, SimpleNamespace(transformer=None), NULL, 4.5)
    assert not capsys.readouterr().out
    assert not common.shares_prefix(values, backbone, far, 4.5)
    assert "null text" in capsys.readouterr().out


def test_a_sample_keeps_its_noise_at_any_batch_size():
    def noise(prompts, seed=0):
        return dps.noise(Namespace(seed=seed, steps=2), (2, 3), prompts)

    whole = noise([0, 1, 2])
    assert whole.shape == (3, 3, 2, 3)
    assert torch.equal(whole[:, 2:], noise([2]))
    draws = whole.flatten().tolist()
    assert len(set(draws)) == len(draws)
    assert not torch.equal(noise([0], seed=1), whole[:, :1])


# ---------------------------------------------------------------------------- as a user runs it
# on the miniature, with value models that were never trained
@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the stage in a folder of its own: the table that it writes, and what it prints."""
    # the prompts are there, but not the value models that somebody may have in runs/
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)

    def go(*flags, out=tmp_path / "out"):
        usual = ("--out", out, "--device", "cpu", "--scorers")
        dps.main(dps.parse_args([*map(str, (*usual, *flags))]))
        return json.loads((out / "05_dps.json").read_text()), capsys.readouterr().out

    return go


def test_a_whole_short_run(run, values, tmp_path):
    """All methods, the figures; the promised keys; costs in the order that the method is about."""
    scorers = ("dfn-clip", "hpsv2", "aesthetic", "judge")
    flags = (*scorers, "clip", "--value", values["clip"], "--steps", 4, "--limit", 3, "--batch", 2)
    flags += ("--strengths-tweedie", 1, 5, "--strengths-stitchvm", 10, "--guide-from", 0.99)
    table, printed = run(*flags, "--save-images")
    rows = table["rows"]
    report = {r["images"].removeprefix("05_images/"): r for r in rows}
    expected = ["flow_0", "tweedie_1", "tweedie_5", "stitchvm_10", "stitchvm+tweedie_10_1"]
    assert list(report) == expected and len(rows) == 5
    assert table["stage"] == "05_dps" and table["shared"] is True and len(table["values"]) == 1
    costs = ("s_per_sample", "s_spread", "peak_memory_mb", "gflop_per_sample")
    for r, scores in zip(rows, table["scores_of_prompts"], strict=True):
        assert {"method", "strength", "reward", "reward_se", *costs} <= set(r)
        assert {f"{m}{e}" for m in scorers for e in ("", "_se")} <= set(r) and "clip" not in r
        assert (r["n"], r["failed"], r["steps"]) == (3, 0, 4)
        assert set(scores) == {"reward", *scorers}
        assert all(sum(x) / 3 == pytest.approx(r[k], abs=1e-5) for k, x in scores.items())
    assert report["stitchvm+tweedie_10_1"]["strength_tweedie"] == 1
    order = ("flow_0", "stitchvm_10", "stitchvm+tweedie_10_1", "tweedie_1")
    work = [report[m]["gflop_per_sample"] for m in order]
    assert work == sorted(work) and len(set(work)) == 4
    assert report["tweedie_5"]["gflop_per_sample"] == work[-1]
    memory = [report[m]["peak_memory_mb"] for m in order]
    assert memory[0] == 0 < memory[1] < 0.5 * memory[3] and memory[2] == memory[3]
    assert all(m in printed for m in dps.METHODS)
    for name in ("05_strength", "05_grid"):
        assert Image.open(tmp_path / f"out/{name}.png").width > 300
    for row in rows:
        folder = tmp_path / "out" / row["images"]
        assert Image.open(folder / "00002/samples/0000.png").size == (64, 64)
    prompts = (ROOT / "tests/mini/data/drawbench.txt").read_text().splitlines()
    folder = tmp_path / "out/05_images/flow_0/00001"
    assert json.loads((folder / "metadata.jsonl").read_text())["prompt"] == prompts[1]


def test_a_joint_reward_is_the_sum_and_the_batch_does_not_matter(run, values, tmp_path):
    """What is guided differs from what is not, and the same seed gives the same rows."""
    flags = ("clip", "hpsv2", "--reward", "clip+hpsv2", "--steps", 3, "--limit", 3)
    flags += ("--value", values["clip"], values["hpsv2"], "--methods", "flow", "stitchvm")
    rows = {b: run(*flags, "--batch", b, out=tmp_path / f"{b}")[0]["rows"] for b in (1, 3)}
    for r, again in zip(rows[1], rows[3], strict=True):
        assert r["reward"] == pytest.approx(r["clip"] + r["hpsv2"], abs=1e-5)
        assert r["reward"] == pytest.approx(again["reward"], abs=2e-3)
    flow, guided = rows[3]
    assert (flow["method"], guided["method"]) == ("flow", "stitchvm")
    assert abs(flow["reward"] - guided["reward"]) > 5e-3


SHORT = ("clip", "--steps", 2, "--limit", 3, "--batch", 2, "--methods", "flow", "stitchvm")


def test_a_run_that_was_cut_off_goes_on(run, values, tmp_path, monkeypatch):
    """Finished batches are not sampled again; other flags or prompts are refused; same table."""
    lines = (ROOT / "tests/mini/data/drawbench.txt").read_text().splitlines()[:3]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    flags = (*SHORT, "--value", values["clip"], "--prompts", tmp_path / "p.txt")
    whole = run(*flags, out=tmp_path / "whole")[0]
    sample = dps.sample_batch
    done = []

    def cut(run, args, runs, prompts):
        if done:
            raise KeyboardInterrupt
        done.append(prompts)
        return sample(run, args, runs, prompts)

    monkeypatch.setattr(dps, "sample_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert [p.name for p in (tmp_path / "out/05_dps.parts").iterdir()] == ["00000.pt"]
    done.clear()
    with pytest.raises(SystemExit, match="go on with --resume, or drop it with --restart"):
        run(*flags)
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*seed"):
        run(*flags, "--resume", "--seed", 1)
    (tmp_path / "p.txt").write_text("\n".join(["a red circle", *lines[1:]]))
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*prompts"):
        run(*flags, "--resume")
    (tmp_path / "p.txt").write_text("\n".join(lines))
    table = run(*flags, "--resume")[0]
    assert done == [range(2, 3)] and not (tmp_path / "out/05_dps.parts").exists()
    for row, wanted in zip(table["rows"], whole["rows"], strict=True):
        wanted |= {k: row[k] for k in ("s_per_sample", "s_spread")}
        assert row == wanted
    assert table["scores_of_prompts"] == whole["scores_of_prompts"]


def test_host_memory_holds_one_batch(run, values, monkeypatch):
    """The images of a batch that was written are its file's; its noises are drawn once."""
    sample, draw = dps.sample_batch, dps.noise
    made, drawn = [], []

    def spy(*given):
        assert not any(image() is not None for image in made)
        found = sample(*given)
        made.extend(weakref.ref(f["images"]) for f in found.values())
        return found

    monkeypatch.setattr(dps, "sample_batch", spy)
    monkeypatch.setattr(dps, "noise", lambda *given: drawn.append(given[2]) or draw(*given))
    run(*SHORT, "--value", values["clip"])
    assert len(made) == 4 and drawn == [range(2), range(2, 3)]


def test_compile_is_asked_of_every_block(run, values, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    rows = run(*SHORT, "--value", values["clip"], "--compile")[0]["rows"]
    assert len(rows) == 2 and len(compiled) == 8


def test_standard_dps_checkpoints_at_24gb(tmp_path):
    """Where it would not fit else; a flag turns it off."""
    chosen = [["24gb"], ["24gb", "--no-checkpointing"], ["paper"]]
    given = [dps.parse_args(["--out", str(tmp_path), "--preset", *c]).checkpointing for c in chosen]
    assert given == [True, False, False]


def test_scorers_come_when_the_generator_has_gone(run, values, monkeypatch):
    models = []
    load, scores = dps.load, dps.score_images

    def spy_load(args):
        found = load(args)
        models.append(found.backbone)
        models.append(weakref.ref(found.backbone.transformer))
        return found

    def spy_scores(*given):
        assert models[1]() is None and "vae" not in vars(models[0])
        return scores(*given)

    monkeypatch.setattr(dps, "load", spy_load)
    monkeypatch.setattr(dps, "score_images", spy_scores)
    run("hpsv2", *SHORT, "--value", values["clip"])
    assert len(models) == 2


@pytest.mark.parametrize("broken", [[0], [0, 1, 2]])
def test_failed_samples_are_no_images(run, values, monkeypatch, broken):
    """They are counted and have no score; a run of nothing else stops and writes no table."""
    step = dps.sample

    def spoilt(z, *given):
        z = step(z, *given)
        z[[k for k in broken if k < len(z)]] = torch.nan
        return z

    monkeypatch.setattr(dps, "sample", spoilt)
    flags = (*SHORT[:5], "--batch", 3, "--methods", "flow")
    if len(broken) == 3:
        with pytest.raises(SystemExit, match="every sample became NaN"):
            run(*flags)
        return
    table = run(*flags)[0]
    (row,), (scores,) = table["rows"], table["scores_of_prompts"]
    assert row["failed"] == 1 and row["n"] == 3 and scores["reward"][0] is None
    assert row["reward"] == pytest.approx(sum(scores["reward"][1:]) / 2, abs=1e-6)


def test_images_of_another_run_are_not_mixed_in(run, tmp_path):
    flags = (*SHORT[:3], "--methods", "flow", "--save-images")
    for limit in (3, 2):
        run(*flags, "--limit", limit)
    found = [p.name for p in (tmp_path / "out/05_images/flow_0").iterdir()]
    assert sorted(found) == ["00000", "00001"]


MISUSE = [
    (["--reward", "dfn-clip"], "no value model of dfn-clip.*03_finetune.py --reward dfn-clip"),
    (["--reward", "clip+hpsv2", "--value", "one.pt"], "1 files for the 2 rewards"),
    (["--prompts", "nowhere.txt"], "no file of prompts nowhere.txt"),
    (["--limit", "1"], "1 prompts in .*drawbench.txt"),
    (["--guide-to", "0.5", "--guide-from", "0.5"], "--guide-from must be above"),
    (["--steps", "1"], "argument --steps: 1 does not lie"),
    (["--preset", "24gb"], "no file of prompts None"),
    (["--cfg", "nan"], "argument --cfg: nan does not lie"),
    (["--reward", "nothing", "--methods", "flow"], "there is no nothing"),
]


@pytest.mark.parametrize("flags, message", MISUSE, ids=lambda v: v[0] if type(v) is list else "")
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def test_a_broken_list_of_prompts_is_refused(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"words": "a red circle"}\n')
    with pytest.raises(SystemExit, match="^error: .*is no list of prompts"):
        run("--prompts", tmp_path / "p.jsonl")


MISFITS = [("reward", "hpsv2"), ("resolution", 512)]
MISFITS += [("latent_space", "16 channels, scale 0.3611, shift 0.1159, vae 00000000")]


@pytest.mark.parametrize("key, value", MISFITS)
def test_a_value_of_other_latents_is_refused(run, values, tmp_path, key, value):
    """FLUX's latents have as many channels as SD3's, so nothing else would tell."""
    artifact = torch.load(values["clip"], weights_only=True)
    artifact["spec"][key] = value
    torch.save(artifact, tmp_path / "value.pt")
    with pytest.raises(SystemExit, match=rf"(?s)does not fit this run.*{key}"):
        run("--value", tmp_path / "value.pt")
