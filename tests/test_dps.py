"""Stage 05: guidance on Gaussian data where the tilted law is known, gradients and shared prefixes against references, the rule, and short runs as a user runs them."""
import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.testing import assert_close

import common
from test_common import NULL, small_sd3, small_value, two_rewards

dps = importlib.import_module("05_dps")
ROOT = Path(__file__).resolve().parents[1]
SQUARE, ODE = (lambda t: 3 * t * t), (lambda t: 0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- Gaussian data, r(z_0) = lam z_0: everything is known
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
        return gaussian_velocity(z, t), lam * (M + slope * (z - (1 - t) * M))[:, 0], (lam * slope).expand_as(z)
    return gradient


def propagate(grid, guides, form="exact", nu=SQUARE):
    """Mean and variance at 0 of the sampler from N(0, 1): a step is affine in z and noise, its coefficients are read off at three points."""
    mean, variance = 0.0, 1.0
    points, noise = torch.tensor([[0.0], [1.0], [0.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
    for t, t_next in zip(grid, grid[1:]):
        z, _ = dps.sample(points, iter([noise]), [t, t_next], lambda z, s: gaussian_velocity(z, s.double().view(-1, 1)), guides, form, nu)
        shift, slope, spread = z[:, 0].tolist()
        mean, variance = (slope - shift) * mean + shift, (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


@pytest.mark.parametrize("nu", [SQUARE, ODE], ids=["sde", "ode"])
@pytest.mark.parametrize("lam, c", [(1.0, 1.0), (-0.5, 4.0)])
def test_exact_guidance_samples_the_tilted_law(nu, lam, c):
    """p(z_0) exp(c r(z_0)) is N(M + c lam V, V). The unguided first step costs O(1 / steps)."""
    error = {}
    for steps in (200, 400):
        mean, variance = propagate(sd3_grid(steps), [(gaussian_gradient(lam), c, 1.0, 0.0)], nu=nu)
        error[steps] = abs(mean - (M + c * lam * V))
        assert variance == pytest.approx(V, abs=0.01)
    assert error[400] < 5e-4 * abs(c * lam) and error[400] < 0.6 * error[200] + 2e-5
    assert propagate(sd3_grid(200), [], nu=nu)[0] == pytest.approx(M, abs=1e-5)


def test_a_thousand_samples_at_once():
    """The same law by sampling: mean and variance within four standard errors, all samples in one batch and each with its own gradient."""
    n, lam, grid = 4000, 1.0, sd3_grid(100)
    g = torch.Generator().manual_seed(1)
    noises = iter([torch.randn(n, 1, generator=g) for _ in range(101)])
    z, _ = dps.sample(next(noises), noises, grid, None, [(gaussian_gradient(lam), 1.0, 1.0, 0.0)])
    exact = propagate(grid, [(gaussian_gradient(lam), 1.0, 1.0, 0.0)])
    assert abs(float(z.mean()) - exact[0]) < 4 * (V / n) ** 0.5 and abs(float(z.var()) - exact[1]) < 4 * V * (2 / n) ** 0.5


def test_guidance_above_and_below_add_up_on_linear_rewards():
    """Everything is affine here, so what the two halves of the window move the mean by is what the whole one does."""
    moved = lambda top, bottom: propagate(sd3_grid(60), [(gaussian_gradient(1.0), 1.0, top, bottom)])[0] - M
    assert moved(1.0, 0.5) > 0.01 and moved(0.5, 0.0) > 0.01
    assert moved(1.0, 0.5) + moved(0.5, 0.0) == pytest.approx(moved(1.0, 0.0), abs=1e-5)


# ---------------------------------------------------------------------------- the forms of guidance, windows, handover
def test_guidance_by_hand():
    """d (t/(1-t) + 4.5 t^4) c grad at t = 1/2, the ODE without the second term, and the two forms without the factor."""
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.6]])
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0), 0.1 * 10 * (1 + 4.5 / 16) * grad)
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, nu=ODE), 0.1 * 10 * grad)
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, "constant"), 0.1 * 10 * grad)
    assert_close(dps.guidance(grad, 0.5, 0.4, 10.0, "unit"), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_the_first_step_is_finite():
    """At t = 1 the gradient of a trained V is not exactly zero, and (39) multiplies it by infinity; just below it is finite."""
    grad = torch.randn(2, 3)
    assert torch.equal(dps.guidance(grad, 1.0, 0.99, 10.0), torch.zeros(2, 3))
    assert_close(dps.guidance(grad, 0.99, 0.98, 10.0), 0.1 * (99 + 4.5 * 0.99 ** 4) * grad, rtol=1e-4, atol=0)
    assert dps.guidance(grad, 1.0, 0.99, 10.0, "constant").abs().max() > 0


def test_unit_guidance_moves_every_sample_as_far():
    """d c, whatever the gradient's size, alone or in a batch; a zero gradient moves nothing."""
    grad = torch.randn(3, 16, 4, 4) * torch.tensor([1e-6, 1.0, 1e4]).view(3, 1, 1, 1)
    move = dps.guidance(grad, 0.7, 0.5, 5.0, "unit")
    assert_close(move.flatten(1).norm(dim=1), torch.ones(3))
    assert_close(move[1:2], dps.guidance(grad[1:2], 0.7, 0.5, 5.0, "unit"))
    assert_close(F.cosine_similarity(move.flatten(1), grad.flatten(1)), torch.ones(3))
    assert torch.equal(dps.guidance(0 * grad, 0.7, 0.5, 5.0, "unit"), 0 * grad)


def guided_at(guides, grid):
    """{name of the guide: noise levels at which it was called}, None for plain steps; and whether guidance moved z there."""
    seen = []

    def gradient(name):
        return lambda z, sigma: (seen.append((name, float(sigma[0]))), (torch.zeros_like(z), None, torch.ones_like(z)))[1]

    def velocity(z, sigma):
        seen.append((None, float(sigma[0])))
        return torch.zeros_like(z)

    noises = iter([torch.zeros(2, 1)] * len(grid))
    dps.sample(torch.zeros(2, 1), noises, grid, velocity, [(gradient(name), *rest) for name, *rest in guides], "constant", ODE)
    assert [t for _, t in seen] == pytest.approx(grid[:-1])  # one call for each step, none for 0
    return [name for name, _ in seen]


GRID = [1.0, 0.75, 0.5, 0.25, 0.125, 0.0]


@pytest.mark.parametrize("top, bottom, expected", [(1, 0, "sssss"), (1, 0.5, "ss---"), (0.5, 0, "--sss"), (0.75, 0.25, "-ss--"), (1, 0.6, "ss---"), (0.6, 0, "--sss")])
def test_windows(top, bottom, expected):
    """sigma > .5 and sigma <= .5 share no step and leave none out."""
    assert ["-" if n is None else n for n in guided_at([("s", 1.0, top, bottom)], GRID)] == list(expected)


def test_handover():
    assert guided_at([("s", 1.0, 1.0, 0.25), ("t", 1.0, 0.25, 0.0)], GRID) == ["s", "s", "s", "t", "t"]
    assert guided_at([("s", 1.0, 0.75, 0.25), ("t", 1.0, 0.25, 0.2)], GRID) == [None, "s", "s", "t", None]


def test_what_sample_keeps_and_returns():
    """z before the step of each kept node; the last step adds no noise; without guides it is the sampler alone."""
    z, noises = torch.randn(2, 3), [torch.randn(2, 3) for _ in range(5)]
    velocity = lambda z, s: 0.3 * z
    out, kept = dps.sample(z, iter(noises), GRID, velocity, keep=(0, 2))
    x, own = z, {}
    for k, (t, t_next) in enumerate(zip(GRID, GRID[1:])):
        own[k] = x
        x = common.sde_step(x, 0.3 * x, t, t_next, noises[k])
    assert torch.equal(out, x) and kept.keys() == {0, 2} and all(torch.equal(kept[k], own[k]) for k in kept)


# ---------------------------------------------------------------------------- gradients and the shared prefix
@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return two_rewards(tmp_path_factory)


def batch(n=3):
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=g)
    return random(n, 16, 10, 6), torch.rand(n, generator=g), [random(n, 5, 24), random(n, 20)], [F.normalize(random(n, 64), dim=-1) for _ in range(2)]


def functions(sd3, rewards, values, condition, texts, cfg=4.5, share=False, checkpointing=False):
    return dps.step_functions(SimpleNamespace(transformer=sd3, decode=decode, velocity=partial(common.velocity, sd3)), rewards, values, condition, NULL, texts, cfg, share, checkpointing)


def decode(z):
    """A stand-in for the VAE: smooth, and it mixes neighbours."""
    return torch.sigmoid(F.avg_pool2d(F.interpolate(z[:, :3], scale_factor=8), 5, 1, 2))


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_velocity_is_the_librarys(sd3, cfg):
    """Also with checkpointing, and when the null half is resumed after any block."""
    z, sigma, condition, _ = batch()
    un, uc = (sd3(z, v[0].expand(3, -1, -1), v[1].expand(3, -1), sigma * 1000, return_dict=False)[0] for v in (NULL, condition))
    expected = uc if cfg == 1 else un + cfg * (uc - un)
    run = lambda **kw: common.velocity(sd3, z, sigma, condition, NULL, cfg, **kw)
    assert_close(run(), expected, atol=1e-4, rtol=0)
    assert_close(run(checkpointing=True), expected, atol=1e-4, rtol=0)
    for i in range(5) if cfg != 1 else ():
        prefix = common.run_blocks(sd3, common.begin(sd3, z, sigma, *[v.expand(3, *v.shape[1:]) for v in NULL]), i)
        assert_close(run(prefix=prefix), expected, atol=1e-4, rtol=0)


def rows_run(sd3):
    """A list that fills with (block, batch) as the blocks are run, and what ends it."""
    seen = []
    note = lambda k: lambda module, args, kwargs, out: seen.append((k, len(kwargs["hidden_states"])))
    hooks = [b.register_forward_hook(note(k), with_kwargs=True) for k, b in enumerate(sd3.transformer_blocks)]
    return seen, lambda: [h.remove() for h in hooks]


@pytest.mark.parametrize("depths", [(2,), (4,), (1, 3), (3, 1), (2, 2)], ids=str)
def test_shared_prefix_equals_unshared(sd3, rewards, depths):
    """Velocity, value and gradient are the same; a block runs on three rows a sample where it is not shared, on two where it is, once for all values of a joint reward."""
    z, sigma, condition, texts = batch()
    values = [small_value(sd3, r, i) for r, i in zip(rewards, depths)]
    found = {}
    for share in (False, True):
        seen, stop = rows_run(sd3)
        found[share] = functions(sd3, rewards, values, condition, texts, share=share)[1]["stitchvm"](z, sigma)
        stop()
        rows = [sum(n for k, n in seen if k == block) // 3 for block in range(4)]
        assert rows == [2 + (not share and block < max(depths)) for block in range(4)]
    for a, b in zip(found[False], found[True]):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not any(v.requires_grad for v in found[True]) and found[True][2].abs().amax((1, 2, 3)).min() > 0
    alone = [value(z, sigma, text) for value, text in zip(values, texts)]
    assert_close(found[True][1], sum(alone), atol=1e-5, rtol=1e-5)


def test_only_the_denoisers_own_prefix_is_resumed(sd3, rewards):
    """A joint reward whose shallower value reads another transformer of the same shape, as Medium's value beside Large's own does."""
    z, sigma, condition, texts = batch()
    other = small_sd3()
    torch._foreach_mul_([p.data for p in other.parameters()], 1.5)
    values = [small_value(sd3, rewards[0], 3), small_value(other, rewards[1], 1)]
    apart, shared = (functions(sd3, rewards, values, condition, texts, share=share)[1]["stitchvm"](z, sigma) for share in (False, True))
    for a, b in zip(apart, shared):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_stitchvm_gradient_is_autograds_of_the_value(sd3, rewards):
    """And the denoiser adds nothing to it and keeps nothing: what autograd keeps does not grow with the blocks after i."""
    z, sigma, condition, texts = batch()
    value = small_value(sd3, rewards[0], 2)
    step = functions(sd3, rewards, [value], condition, texts[:1])[1]["stitchvm"]
    x = z.clone().requires_grad_()
    expected, = torch.autograd.grad(value(x, sigma, texts[0]).sum(), x)
    assert_close(step(z, sigma)[2], expected, atol=1e-6, rtol=1e-4)
    with common.kept_for_backward([sd3, value]) as whole:
        step(z, sigma)
    with common.kept_for_backward([sd3, value]) as alone:
        value(z.clone().requires_grad_(), sigma, texts[0]).sum().backward()
    size = lambda kept: sum(s.nbytes() for s in kept.values())
    assert size(whole) == pytest.approx(size(alone), rel=0.01)
    assert not z.requires_grad and z.grad is None


def test_a_step_along_the_gradient_raises_the_value(sd3, rewards):
    z, sigma, condition, texts = batch()
    value = small_value(sd3, rewards[0], 2)
    _, before, grad = functions(sd3, rewards, [value], condition, texts[:1])[1]["stitchvm"](z, sigma)
    for form in ("exact", "constant", "unit"):
        move = dps.guidance(grad, 0.6, 0.5, 1.0, form)
        small = 0.05 * move / move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (value(z + small, sigma, texts[0]) > before).all() and (value(z - small, sigma, texts[0]) < before).all()


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_tweedie_gradient(sd3, rewards, cfg):
    """Against central differences of a chain written with the library's own forward and open_clip's own towers, of a joint reward, through both halves of the guided velocity."""
    z, sigma, condition, texts = batch(2)

    def chain(z):
        text, pooled = (torch.cat([n.expand_as(c), c]) for n, c in zip(NULL, condition))
        un, uc = sd3(torch.cat([z, z]), text, pooled, torch.cat([sigma, sigma]) * 1000, return_dict=False)[0].chunk(2)
        x = decode(z - sigma.view(-1, 1, 1, 1) * (cfg * uc + (1 - cfg) * un))
        return sum((F.normalize(r.model.encode_image(r.normalise(r.resize(x))), dim=-1) * t).sum(-1) for r, t in zip(rewards, texts))

    steps = {c: functions(sd3, rewards, [], condition, texts, cfg, checkpointing=c)[1]["tweedie"] for c in (False, True)}
    u, value, grad = steps[False](z, sigma)
    assert_close(value, chain(z).detach(), atol=1e-4, rtol=0)
    assert_close(u, common.velocity(sd3, z, sigma, condition, NULL, cfg), atol=1e-5, rtol=0)
    with torch.no_grad():
        for _ in range(3):
            direction = torch.randn_like(z)
            change = (chain(z + 1e-2 * direction) - chain(z - 1e-2 * direction)).double() / 2e-2
            assert (grad * direction).sum((1, 2, 3)).tolist() == pytest.approx(change.tolist(), rel=5e-2, abs=2e-3)
    assert_close(steps[True](z, sigma)[2], grad, atol=1e-6, rtol=1e-4)
    unprompted = functions(sd3, rewards, [], condition, texts, cfg)[1]["unprompted"](z, sigma)
    assert_close(unprompted[2], functions(sd3, rewards, [], NULL, texts, 1.0)[1]["tweedie"](z, sigma)[2])


def test_checkpointing_keeps_less(sd3):
    """Of each block only what enters it; the gradient is the same."""
    z, sigma, condition, _ = batch()
    kept, grads = {}, {}
    for checkpointing in (False, True):
        x = z.clone().requires_grad_()
        with common.kept_for_backward([sd3]) as storages:
            common.velocity(sd3, x, sigma, condition, NULL, 4.5, checkpointing=checkpointing).square().sum().backward()
        kept[checkpointing], grads[checkpointing] = sum(s.nbytes() for s in storages.values()), x.grad
    assert kept[True] < 0.3 * kept[False]
    assert_close(grads[True], grads[False])


def test_strength_zero_is_the_plain_sampler(sd3, rewards):
    """Bit for bit, where nothing is shared."""
    z, _, condition, texts = batch()
    velocity, gradients = functions(sd3, rewards, [small_value(sd3, rewards[0], 2)], condition, texts[:1])
    noises = [torch.randn_like(z) for _ in GRID]
    plain, _ = dps.sample(z, iter(noises), GRID, torch.no_grad()(velocity))
    for kind in ("tweedie", "stitchvm"):
        assert torch.equal(dps.sample(z, iter(noises), GRID, torch.no_grad()(velocity), [(gradients[kind], 0.0, 1.0, 0.0)])[0], plain)


def test_shares_prefix(sd3, rewards, capsys):
    value, backbone = small_value(sd3, rewards[0], 2), SimpleNamespace(transformer=sd3)
    assert common.shares_prefix([value], backbone, NULL, 4.5) and common.shares_prefix([value], backbone, [v + 1e-4 for v in NULL], 4.5)
    assert not common.shares_prefix([value], backbone, NULL, 1.0) and not common.shares_prefix([], backbone, NULL, 4.5)
    assert not common.shares_prefix([small_value(sd3, rewards[0], 2, front="vae")], backbone, NULL, 4.5)
    assert not common.shares_prefix([value], SimpleNamespace(transformer=None), NULL, 4.5) and not capsys.readouterr().out
    assert not common.shares_prefix([value], backbone, [v.roll(1, -1) for v in NULL], 4.5) and "null text" in capsys.readouterr().out


# ---------------------------------------------------------------------------- noises, the rule
def test_a_sample_keeps_its_noise_at_any_batch_size():
    take = lambda rows, n=3: [next(s) for s in [dps.noise_streams(0, "report", rows, (2, 3))] for _ in range(n)]
    whole, part = take([0, 1, 2]), take([2])
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, part))
    first = torch.stack(take([0, 1])).flatten(2).transpose(0, 1).reshape(2, -1)
    assert not torch.equal(first[0], first[1]) and len(set(first[0].tolist())) == first.shape[1]
    assert not torch.equal(next(dps.noise_streams(0, "tune", [0], (2, 3))), whole[0][:1])


def metrics(reward, judge, spread=1.0):
    """Scores of 100 samples with the given means, the same noise in all of them but for a paired difference with the given spread."""
    own = torch.randn(100, generator=torch.Generator().manual_seed(3))
    wobble = torch.randn(100, generator=torch.Generator().manual_seed(4))
    wobble = spread * (wobble - wobble.mean()) / wobble.std()
    return dict(reward=own + reward, clip=own + reward, judge=5 * own + judge + wobble)


def test_the_rule_that_picks_a_strength():
    """One standard error of the paired difference is .1 here; the samples' own spread, fifty times that, does not matter."""
    plain = metrics(0.0, 0.0, 0.0)
    pick = lambda swept, **kw: dps.choose_strength(swept, plain, {"clip"}, **kw)
    assert pick({1: metrics(1, 0.0), 3: metrics(2, -0.19), 10: metrics(3, -0.21)}) == 3
    assert pick({1: metrics(1, 0.0), 3: metrics(2, -0.19), 10: metrics(3, -0.21)}, tolerance=3) == 10
    assert pick({1: metrics(1, 0.5), 3: metrics(0.5, 0.9)}) == 1  # the guiding reward decides, not the held-out ones
    assert pick({3: metrics(2, -1), 1: metrics(1, -1)}) == 1  # none is harmless: the smallest
    worse_for_itself = metrics(2, 0.0) | dict(clip=metrics(-9, 0)["clip"])
    assert pick({1: metrics(1, 0.0), 3: worse_for_itself}) == 3  # the guiding reward is not held out
    assert pick({1: metrics(1, 0.0), 3: metrics(2, float("nan"))}) == 1
    assert pick({1: plain, 3: plain}) in (1, 3)


# ---------------------------------------------------------------------------- published sizes
def test_dry_run_counts_the_published_step(capsys):
    """SD 3.5 Medium at 1024 with HPSv2, TFLOP a step, as counted apart from this code; i = 4 shared costs 1.2 of plain sampling."""
    dps.main(dps.parse_args(["--dry-run", "--preset", "paper", "--reward", "hpsv2"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = {c["method"]: c for c in report["cases"]}
    expected = {"flow": 22.5, "tweedie": 80.1, "stitchvm, i = 4": 29.0, "stitchvm, i = 4, shared": 26.7, "stitchvm, i = 12": 40.5, "stitchvm, i = 12, shared": 33.8}
    assert {k: cases[k]["tflop"] for k in expected} == pytest.approx(expected, rel=0.02)
    assert report["resolution"] == 1024 and all(c["n"] == 20000 and c["unit"] == "step" for c in cases.values())
    assert cases["flow"]["saved_gib"] == 0 and cases["stitchvm, i = 4"]["saved_gib"] < 0.1 * cases["tweedie"]["saved_gib"]
    assert cases["tweedie, checkpointing"]["saved_gib"] < 0.2 * cases["tweedie"]["saved_gib"] and cases["tweedie, checkpointing"]["tflop"] > 1.3 * cases["tweedie"]["tflop"]
    assert cases["stitchvm, i = 4, shared"]["of_flow"] == pytest.approx(1.19, abs=0.01)


# ---------------------------------------------------------------------------- as a user runs it, on the miniature with untrained value models
@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the stage in a folder of its own: the table that it writes, and what it prints."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the prompts are there, but not the value models that somebody may have in runs/
    monkeypatch.chdir(tmp_path)

    def go(*flags, out=tmp_path / "out"):
        dps.main(dps.parse_args(["--out", str(out), "--device", "cpu", *map(str, flags)]))
        return json.loads((out / "05_dps.json").read_text()), capsys.readouterr().out
    return go


def test_a_whole_short_run(run, values, tmp_path):
    """All methods, the sweep, the rule and the figures; the promised keys; costs in the order that the method is about."""
    table, printed = run("--value", values["clip"], "--steps", 4, "--limit", 3, "--tune-limit", 2, "--batch", 2, "--strengths-tweedie", 1, 5, "--strengths-stitchvm", 1, 5,
                         "--guide-from", 0.99, "--save-images")
    rows = table["rows"]
    assert [(r["method"], r["strength"]) for r in rows if r["split"] == "tune"] == [
        (m, c) for m, cs in (("flow", [0]), ("tweedie", [1, 5]), ("stitchvm", [1, 5]), ("tweedie, equal time", [1, 5])) for c in cs]
    report = {r["method"]: r for r in rows if r["split"] == "report"}
    assert list(report) == ["flow", "tweedie", "stitchvm", "stitchvm+tweedie", "tweedie, equal time"]
    assert table["stage"] == "05_dps" and table["shared"] is True and len(table["values"]) == 1 and table["peak_rss_mb"] > 100
    for r in rows:
        assert {"method", "strength", "split", "window", "steps", "n", "reward", "reward_se", "s_per_sample", "peak_memory_mb", "gflop_per_sample"} <= set(r)
        assert {f"{m}{e}" for m in ("dfn-clip", "hpsv2", "aesthetic", "judge", "geneval") for e in ("", "_se")} <= set(r) and "clip" not in r
        assert r["n"] == (2 if r["split"] == "tune" else 3) and r["failed"] == 0 and r["window"] == (None if r["method"] == "flow" else [0.99, 0.0])
    for method in ("tweedie", "stitchvm", "tweedie, equal time"):
        assert report[method]["strength"] == table["chosen"][method] in (1, 5)
        assert {r["steps"] for r in rows if r["method"] == method} == {report[method]["steps"]}
    assert report["stitchvm+tweedie"]["strength_tweedie"] == table["chosen"]["tweedie"]
    order = ("flow", "stitchvm", "stitchvm+tweedie", "tweedie")
    assert [report[m]["gflop_per_sample"] for m in order] == sorted(report[m]["gflop_per_sample"] for m in order)
    assert report["flow"]["peak_memory_mb"] == 0 < report["stitchvm"]["peak_memory_mb"] < 0.5 * report["tweedie"]["peak_memory_mb"]
    assert 2 <= report["tweedie, equal time"]["steps"] <= 4 and report["tweedie"]["steps"] == 4
    assert {r["method"] for r in table["trajectory"]} == set(report) and {r["sigma"] for r in table["trajectory"] if r["method"] == "flow"} == {a["sigma"] for a in table["agreement"]}
    assert all(-1 <= a[k] <= 1 < 2 <= len(table["agreement"]) for a in table["agreement"] for k in ("cosine", "cosine_unprompted"))
    assert all(m in printed for m in report)
    for name in ("05_strength", "05_grid", "05_value"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 300
    for method in report:
        assert Image.open(tmp_path / "out/images" / method / "00002/samples/0000.png").size == (64, 64)
    prompts = (ROOT / "tests/mini/data/drawbench.txt").read_text().splitlines()
    assert json.loads((tmp_path / "out/images/flow/00001/metadata.jsonl").read_text())["prompt"] == prompts[1]


def test_equal_time_needs_a_sweep_of_one_method_only(run, values):
    """Its steps are of the times on the tuning prompts, its strength is chosen at so many, also where stitchvm has one strength; without a sweep there is no such row."""
    flags = ("--value", values["clip"], "--steps", 4, "--limit", 2, "--tune-limit", 2, "--strengths-stitchvm", 1, "--methods", "tweedie", "stitchvm")
    table, _ = run(*flags, "--strengths-tweedie", 1, 5)
    rows = [r for r in table["rows"] if r["method"] == dps.EQUAL]
    assert [r["split"] for r in rows] == ["tune", "tune", "report"] and rows[2]["strength"] == table["chosen"][dps.EQUAL] in (1, 5)
    spent = {m: sum(r["s_per_sample"] for r in table["rows"] if r["split"] == "tune" and r["method"] == m) / n for m, n in (("tweedie", 2), ("stitchvm", 1))}
    assert rows[2]["steps"] == max(2, round(4 * spent["stitchvm"] / spent["tweedie"]))
    table, _ = run(*flags, "--strengths-tweedie", 5)
    assert [r["method"] for r in table["rows"]] == ["tweedie", "stitchvm"]


def test_a_joint_reward_is_the_sum_and_the_batch_does_not_matter(run, values, tmp_path):
    """With one strength each nothing is tuned; what is guided differs from what is not, and the same seed gives the same rows."""
    flags = ("--reward", "clip+hpsv2", "--value", values["clip"], values["hpsv2"], "--steps", 3, "--limit", 3, "--methods", "flow", "stitchvm", "--strengths-stitchvm", 10)
    rows = {b: run(*flags, "--batch", b, out=tmp_path / f"{b}")[0]["rows"] for b in (1, 3)}
    for r, again in zip(rows[1], rows[3]):
        assert r["split"] == "report" and r["reward"] == pytest.approx(r["clip"] + r["hpsv2"], abs=1e-5)
        assert r["reward"] == pytest.approx(again["reward"], abs=2e-3)
    flow, guided = rows[3]
    assert (flow["method"], guided["method"]) == ("flow", "stitchvm") and abs(flow["reward"] - guided["reward"]) > 5e-3
    assert not (tmp_path / "3/05_strength.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--reward", "dfn-clip"], "no value model of dfn-clip.*03_finetune.py --reward dfn-clip"),
    (["--reward", "clip+hpsv2", "--value", "one.pt"], "1 files for the 2 rewards"),
    (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--tune-limit", "1"], "1 prompts to tune on"),
    (["--guide-to", "0.5", "--guide-from", "0.5"], "--guide-from > --guide-to"),
    (["--preset", "24gb"], "--prompts FILE is needed"),
    (["--reward", "nothing", "--methods", "flow"], "there is no nothing")], ids=lambda v: v[0] if isinstance(v, list) else "")
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def test_a_broken_list_of_prompts_is_refused(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a red circle"}\n')
    with pytest.raises(SystemExit, match="^error: .*is no list of prompts"):
        run("--prompts", tmp_path / "p.jsonl")


@pytest.mark.parametrize("key, value", [("latent_space", "16 channels, scale 0.3611, shift 0.1159, vae 00000000"), ("reward", "hpsv2"), ("resolution", 512)])
def test_a_value_of_other_latents_is_refused(run, values, tmp_path, key, value):
    """FLUX's latents have as many channels as SD3's, so nothing else would tell."""
    artifact = torch.load(values["clip"], weights_only=True)
    artifact["spec"][key] = value
    torch.save(artifact, tmp_path / "value.pt")
    with pytest.raises(SystemExit, match=rf"(?s)does not fit this run.*{key}"):
        run("--value", tmp_path / "value.pt")
