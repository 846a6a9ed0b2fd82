"""Stage 08: the bridge, the loss and the solver in closed form, adapters and value models against references, and short runs as a user runs them, killed, resumed and shared."""
import importlib
import json
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.testing import assert_close

import children
import common
import gradient
from test_common import small_sd3, write_clip

nft = importlib.import_module("08_nft")
ROOT = Path(__file__).resolve().parents[1]
GRID = common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 25, 1024).tolist()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------- the bridge
TAU, T = (v.flatten() for v in torch.meshgrid(double(0.0, 0.1, 0.55, 0.75, 0.9), double(0.02, 0.5, 0.98, 1.0), indexing="ij"))
T = TAU + (1 - TAU) * T  # above tau, up to 1


def test_bridge_keeps_the_marginals():
    """z_tau = (1-tau) z_0 + tau eps' goes to a z_tau + s eps = (1-t) z_0 + t eps'': the factor of z_0 and the variance of the noise."""
    a, s, _, _ = nft.bridge(T, TAU)
    assert_close(a * (1 - TAU), 1 - T, rtol=1e-12, atol=1e-15)
    assert_close(a ** 2 * TAU ** 2 + s ** 2, T ** 2, rtol=1e-12, atol=1e-15)
    assert (s > 0).all()


def test_bridge_derivatives():
    """Against autograd, and the identity s^2 + (1-t) s s' = t."""
    t = T.clone().requires_grad_()
    a, s, da, ds = nft.bridge(t, TAU)
    for value, derivative in ((a, da), (s, ds)):
        assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative.detach(), rtol=1e-9, atol=1e-12)
    assert_close(s ** 2 + (1 - t) * s * ds, t, rtol=1e-12, atol=1e-15)


def test_bridge_near_its_anchor():
    """In float32, a thousandth above tau, where t^2 - a^2 tau^2 would keep two digits."""
    t, tau = torch.tensor([0.6001]), torch.tensor([0.6])
    exact = nft.bridge(t.double(), tau.double())
    for mine, true in zip(nft.bridge(t, tau), exact):
        assert_close(mine.double(), true, rtol=1e-5, atol=0)


def test_no_anchor_is_the_standard_path():
    z0, eps, t = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.rand(5)
    z, u = nft.bridge_point(z0, eps, t, torch.zeros(5))
    assert_close(z, common.add_noise(z0, eps, t))
    assert_close(u, eps - z0)
    assert_close(nft.anchor_scale(t, torch.zeros(5)), t)


# data: a mixture of two Gaussians, of which everything is known at every noise level
WEIGHT, MEAN, VAR = double(0.3, 0.7), double(-1.0, 0.8), double(0.1, 0.4)


def mixture(z, t):
    """Density and marginal velocity at z (N,): E[eps - z_0 | z_t] = sum_k p(k | z) (-m_k + (t - (1-t) v_k) / V_k (z - (1-t) m_k))."""
    z, V = z[:, None], (1 - t) ** 2 * VAR + t * t
    parts = WEIGHT * torch.exp(-(z - (1 - t) * MEAN) ** 2 / (2 * V)) / (2 * math.pi * V) ** 0.5
    return parts.sum(1), (parts * (-MEAN + (t - (1 - t) * VAR) / V * (z - (1 - t) * MEAN))).sum(1) / parts.sum(1)


@pytest.mark.parametrize("tau, t", [(0.3, 0.35), (0.3, 0.7), (0.6, 0.75), (0.75, 0.98), (0.6, 1.0)])
def test_the_bridges_velocity_is_unbiased(tau, t):
    """E[u_{t|tau} | z_t] is the marginal velocity at t for a z_tau of the marginal law, whatever the data: by quadrature over z_tau."""
    x = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    density, _ = mixture(x, tau)
    a, s, _, _ = nft.bridge(double(t), double(tau))
    for z in (-1.5, 0.1, 1.2):
        eps = (z - a * x) / s
        point, u = nft.bridge_point(x, eps, torch.full_like(x, t), torch.full_like(x, tau))
        assert_close(point, torch.full_like(x, z), rtol=0, atol=1e-12)
        w = density * torch.exp(-eps ** 2 / 2)
        assert float((w * u).sum() / w.sum()) == pytest.approx(float(mixture(double(z), t)[1]), abs=1e-6)


def test_anchor_scale_is_the_error_of_the_anchor():
    """zhat_tau = (1-tau)/t (s s' z_t - s^2 v) is z_tau for v = u, and moves with v by -scale; tau = 0: z_t - t v."""
    z_tau, eps, v = torch.randn(3, len(T), dtype=torch.float64)
    z, u = nft.bridge_point(z_tau, eps, T, TAU)
    _, s, _, ds = nft.bridge(T, TAU)
    estimate = lambda v: (1 - TAU) / T * (s * ds * z - s ** 2 * v)
    assert_close(estimate(u), z_tau, rtol=1e-9, atol=1e-9)
    assert_close(estimate(v) - z_tau, -nft.anchor_scale(T, TAU) * (v - u), rtol=1e-9, atol=1e-9)
    assert_close(estimate(v)[TAU == 0], (z - T * v)[TAU == 0])


# ---------------------------------------------------------------------------- rewards to probabilities
def test_optimality_by_hand():
    """Two prompts, two images: means 2 and 6, deviation of all four sqrt(5), of all images and not of the mean of groups."""
    r = double(1, 3, 5, 7).view(2, 2)
    advantage = 1 / (5 ** 0.5 + 1e-4)
    assert_close(nft.optimality(r), 0.5 + double(-1, 1, -1, 1).view(2, 2) * advantage / 10)
    assert_close(nft.optimality(r, clip=0.2), double(0, 1, 0, 1).view(2, 2))
    far = torch.zeros(1, 100).double()
    far[0, 0] = 1.0
    assert nft.optimality(far)[0, 0] == 1 and nft.optimality(far).min() > 0.48  # clipped at five deviations
    assert torch.equal(nft.optimality(torch.full((3, 4), 0.7)), torch.full((3, 4), 0.5))


# ---------------------------------------------------------------------------- the loss
def gauss(n=20):
    """Nodes and weights of E[f(x)], x standard normal, exact for polynomials."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


@pytest.mark.parametrize("tau, t", [(0.0, 0.6), (0.6, 0.75)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("linear, square", [(0.05, 0.0), (0.03, 0.02)])
def test_where_the_loss_leads(tau, t, beta, linear, square):
    """On data N(m, v) and rho = 1/2 + linear x + square x^2 of the anchor x, the minimiser is v_old - (2/beta) t/(1-t) grad E[rho | z_t], also for anchors at tau."""
    m, v = 0.7, 0.25
    (x, wx), (e, we) = gauss(), gauss()
    x, e, w = x.repeat_interleave(20), e.repeat(20), wx.repeat_interleave(20) * we.repeat(20)
    V_tau = (1 - tau) ** 2 * v + tau ** 2
    anchor = (1 - tau) * m + V_tau ** 0.5 * x
    rho = 0.5 + linear * anchor + square * anchor ** 2
    tt, ta = torch.full_like(x, t), torch.full_like(x, tau)
    z, u = nft.bridge_point(anchor, e, tt, ta)
    a, s, _, _ = nft.bridge(double(t), double(tau))
    V_t = a ** 2 * V_tau + s ** 2
    v_old = -m + (t - (1 - t) * v) / V_t * (z - (1 - t) * m)  # the marginal velocity
    slope, spread = a * V_tau / V_t, V_tau * s ** 2 / V_t  # E[x | z_t] = mean + slope (z - ...), Var[x | z_t] = spread
    mean = (1 - tau) * m + slope * (z - (1 - t) * m)
    gradient = slope * (linear + 2 * square * mean)  # of E[rho | z_t] = 1/2 + linear mean + square (mean^2 + spread)
    assert spread > 0
    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # v = v_old + c0 + c1 z: affine is enough here, and the loss is quadratic in c
    loss = lambda c: (w * nft.nft_loss((v_old + c[0] + c[1] * z)[:, None], v_old[:, None], u[:, None], rho, beta)).sum()
    first, = torch.autograd.grad(loss(c), c)
    best = -torch.linalg.solve(torch.autograd.functional.hessian(loss, torch.zeros(2, dtype=torch.float64)), first)
    assert_close(best[0] + best[1] * z, -2 / beta * t / (1 - t) * gradient, rtol=1e-7, atol=1e-9)


def random_policies(n=6, equal=False, dtype=torch.float64):
    v, v_old, u = torch.randn(3, n, 4, 5, dtype=dtype)
    v = (v_old.clone() if equal else v).requires_grad_()
    return v, v_old, u, torch.rand(n, dtype=dtype)


def test_an_average_reward_pulls_nowhere():
    """rho = 1/2: the gradient is 2 beta^2 (v - v_old) / size, whatever the target."""
    v, v_old, u, _ = random_policies()
    for beta in (0.1, 1.0):
        for target in (u, 100 * u):
            gradient, = torch.autograd.grad(nft.nft_loss(v, v_old, target, torch.full((6,), 0.5).double(), beta).sum(), v)
            assert_close(gradient, (2 * beta ** 2 * (v - v_old) / 20).detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [None, torch.rand(6)])
def test_equal_policies_and_rewards_give_exactly_no_gradient(scale):
    """In float32, so not even a rounding error: Adam would make a full step of one."""
    v, v_old, u, _ = random_policies(equal=True, dtype=torch.float32)
    gradient, = torch.autograd.grad(nft.nft_loss(v, v_old, u, torch.full((6,), 0.5), 0.1, scale).sum(), v)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_only_good_samples_is_flow_matching():
    v, v_old, u, _ = random_policies()
    assert_close(nft.nft_loss(v, v_old, u, torch.ones(6).double(), 1.0), (v - u).square().mean((1, 2)))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_official_form_as_published(beta):
    """Written in z_0 with t v: L = (zhat - z_0)^2 / mean |zhat - z_0|, no gradient through the divisor, 5 / beta in front; value and gradient."""
    v, v_old, u, rho = random_policies()
    t = torch.rand(6).double()
    z0, eps = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    z, u = nft.bridge_point(z0, eps, t, torch.zeros(6).double())
    c = t.view(-1, 1, 1)

    def published(velocity):
        error = z - c * velocity - z0
        with torch.no_grad():
            size = error.abs().mean((1, 2)).clip(min=1e-5)
        return (error ** 2 / size.view(-1, 1, 1)).mean((1, 2))

    expected = 5 * (rho * published(beta * v + (1 - beta) * v_old) / beta + (1 - rho) * published((1 + beta) * v_old - beta * v) / beta)
    mine = nft.nft_loss(v, v_old, u, rho, beta, nft.anchor_scale(t, torch.zeros(6).double()))
    assert_close(mine, expected)
    assert_close(*[torch.autograd.grad(x.sum(), v, retain_graph=True)[0] for x in (mine, expected)], rtol=1e-6, atol=1e-9)


def test_official_and_paper_agree_at_the_old_policy():
    """Where v = v_old their gradients have the same direction for each sample, and sizes 5 scale^2 / (beta mean |scale (v_old - u)|) apart; they differ elsewhere."""
    v, v_old, u, rho = random_policies(equal=True)
    scale = torch.rand(6).double()
    of = lambda v, scale: torch.autograd.grad(nft.nft_loss(v, v_old, u, rho, 0.1, scale).sum(), v)[0]
    ratio = 50 * scale / (v_old - u).abs().mean((1, 2))
    assert_close(of(v, scale), ratio.view(-1, 1, 1) * of(v, None))
    moved = (v + torch.randn_like(v)).detach().requires_grad_()
    assert (of(moved, scale) - ratio.view(-1, 1, 1) * of(moved, None)).abs().max() > 1e-3


# ---------------------------------------------------------------------------- the old policy
def test_the_old_policy_follows():
    """(71): eta of the old one stays; eta = 0 copies."""
    old, new = [torch.ones(3), torch.zeros(2)], [torch.zeros(3), torch.full((2,), 4.0)]
    common.follow(old, new, 0.75)
    assert_close(old, [torch.full((3,), 0.75), torch.ones(2)])
    common.follow(old, new, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(old, new))


def test_the_official_schedules():
    schedule = lambda kind, *updates: [round(nft.old_decay(n, kind), 6) for n in updates]
    assert schedule(0, 1, 1000) == [0, 0]
    assert schedule(1, 1, 100, 500, 5000) == [0.001, 0.1, 0.5, 0.5]
    assert schedule(2, 1, 75, 76, 175, 5000) == [0, 0, 0.0075, 0.75, 0.999]


# ---------------------------------------------------------------------------- the solver
def solve(grid, m=0.7, v=0.25, z=1.3, last=None):
    """The solver from z at grid[0] on data N(m, v), and the exact solution there."""
    def velocity(z, sigma, rows):
        t = sigma.view(-1, 1)
        return (t - (1 - t) * v) / ((1 - t) ** 2 * v + t * t) * (z - (1 - t) * m) - m
    last = len(grid) - 1 if last is None else last
    out = nft.rollout(velocity, torch.full((1, 1), z, dtype=torch.float64), grid, torch.tensor([last]))
    spread = lambda t: ((1 - t) ** 2 * v + t * t) ** 0.5
    start, t = grid[0], grid[last]
    return float(out), (1 - t) * m + spread(t) / spread(start) * (z - (1 - start) * m)


def test_the_solver_is_of_second_order():
    """Errors fall fourfold when the steps double; from 1 to 0, where log SNR is infinite, all but a logarithm of the steps. On the real grid it beats Euler up to the last
    two levels (.1227, .0089, 0): the step between them is 2.7 in log SNR and extrapolates over four times the one before."""
    def error(top, bottom, n):
        return abs(np.subtract(*solve(torch.linspace(top, bottom, n + 1, dtype=torch.float64).tolist())))

    assert error(0.9, 0.1, 40) / error(0.9, 0.1, 80) == pytest.approx(4, abs=0.3) and error(0.9, 0.1, 80) / error(0.9, 0.1, 160) == pytest.approx(4, abs=0.2)
    assert error(1, 0, 40) / error(1, 0, 80) > 2.8 and error(1, 0, 640) / error(1, 0, 1280) > 3.2
    euler, m, v = 1.3, 0.7, 0.25
    for t, s in zip(GRID[:23], GRID[1:24]):
        euler -= (t - s) * ((t - (1 - t) * v) / ((1 - t) ** 2 * v + t * t) * (euler - (1 - t) * m) - m)
    mine, exact = solve(GRID, last=23)
    assert abs(mine - exact) < 0.5 * abs(euler - exact)


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_the_solver_is_exact_for_one_image(steps):
    """All data at one point: zhat_0 is constant along the path."""
    grid = torch.linspace(1, 0, steps + 1).tolist()
    assert solve(grid, v=0.0)[0] == pytest.approx(0.7, abs=1e-12)


def test_the_solver_is_diffusers():
    """DPM-Solver++(2M), midpoint, x0 form, on the same noise levels; the library cannot start at 1, so both start a node later."""
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero",
                                         euler_at_final=True)
    grid = GRID[1:]
    theirs.set_timesteps(len(grid) - 1)
    theirs.sigmas, theirs.timesteps = torch.tensor(grid), torch.arange(len(grid) - 1, 0, -1)
    velocity = lambda z, t: torch.sin(3 * z + t)
    z = torch.randn(4, 3)
    mine = nft.rollout(lambda z, sigma, rows: velocity(z, sigma[0]), z, grid, torch.full((4,), len(grid) - 1))
    for k, t in enumerate(theirs.timesteps):
        z = theirs.step(velocity(z, grid[k]), t, z).prev_sample
    assert_close(mine, z, rtol=1e-4, atol=1e-5)


def test_rows_that_stop_early_are_where_the_whole_path_passes():
    """Each row stops at its node of the whole grid, at full order, and the velocity is asked for the rows that go on only."""
    z, asked = torch.randn(4, 3), []

    def velocity(z, sigma, rows):
        asked.append((rows.tolist(), float(sigma[0])))
        return torch.sin(3 * z) + rows.view(-1, 1)

    stop = torch.tensor([12, 17, 12, 25])
    out = nft.rollout(velocity, z, GRID, stop)
    assert [r for r, _ in asked] == [[0, 1, 2, 3]] * 12 + [[1, 3]] * 5 + [[3]] * 8 and [t for _, t in asked] == pytest.approx(GRID[:-1])
    for row in range(4):
        alone = nft.rollout(lambda z, sigma, _: torch.sin(3 * z) + row, z[row:row + 1], GRID, stop[row:row + 1])
        assert_close(out[row], alone[0])


# ---------------------------------------------------------------------------- adapters, value models, a training step
def with_adapters(transformer):
    """{policy: parameters} and velocity(policy, z, t) for given conditions, of a transformer with equal adapters that are still zero."""
    lora = {name: common.add_lora(transformer, 4, 8, name) for name in nft.POLICIES}
    torch._foreach_copy_([p.data for p in lora["old"]], [p.data for p in lora["default"]])
    backbone = SimpleNamespace(transformer=transformer, velocity=partial(common.velocity, transformer))
    return lora, lambda condition, checkpointing=False: nft.policy_velocity(backbone, condition, checkpointing)


def shake(parameters, scale=0.3):
    for p in parameters:
        p.data += scale * torch.randn_like(p)


def batch(n=3):
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=g)
    return random(n, 16, 10, 6), random(n, 16, 10, 6), [random(n, 5, 24), random(n, 20)], torch.rand(n, generator=g)


def test_policies_are_told_apart():
    """'default', 'old' and the base are told apart, as the library's own forward gives them; new adapters are the base; the eight projections of every block, dual attention too, have one."""
    sd3 = small_sd3()
    z, _, condition, t = batch()
    library = lambda: sd3(z, *condition, t * 1000, return_dict=False)[0]
    base = library()
    lora, velocity_of = with_adapters(sd3)
    assert {len(p) for p in lora.values()} == {2 * (4 * 8 - 1 + 2 * 4)}  # the last block has no text output; two blocks have a second attention
    velocity = velocity_of(condition)
    for policy in (None, *nft.POLICIES):
        assert_close(velocity(policy, z, t), base, rtol=0, atol=1e-5)
    shake(lora["default"]), shake(lora["old"])
    outs = {}
    for policy in (None, "default", "old"):
        outs[policy] = velocity(policy, z, t).detach()
        sd3.disable_adapters() if policy is None else sd3.set_adapter(policy)
        assert_close(outs[policy], library().detach(), rtol=0, atol=1e-5)
        sd3.enable_adapters()
    far = lambda a, b: (outs[a] - outs[b]).abs().max() > 1e-2
    assert far("default", None) and far("old", None) and far("default", "old")


@pytest.mark.parametrize("kl", [0.0, 1e-2])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_a_training_step(form, kl):
    """The loss is nft_loss of the three policies' velocities at the bridge's points; only the trained adapter gets gradients, the same ones with checkpointing."""
    sd3 = small_sd3()
    lora, velocity_of = with_adapters(sd3)
    shake(lora["default"]), shake(lora["old"])
    z_tau, eps, condition, _ = batch()
    tau, t, rho = torch.tensor([0.6, 0.0, 0.75]), torch.tensor([0.7, 0.3, 1.0]), torch.tensor([0.1, 0.5, 0.9])
    gradients = {}
    for checkpointing in (False, True):
        loss, penalty = nft.train_loss(velocity_of(condition, checkpointing), z_tau, tau, eps, t, rho, form, 0.5, kl)
        (loss + penalty).sum().backward()
        gradients[checkpointing] = [p.grad.clone() for p in lora["default"]]
        assert all(p.grad is None for p in lora["old"])
        for p in lora["default"]:
            p.grad = None
    assert sum(float(g.abs().max()) > 0 for g in gradients[False]) >= len(gradients[False]) - 2  # the last block's text queries reach nothing
    assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-6)
    z, u = nft.bridge_point(z_tau, eps, t, tau)
    v = {policy: velocity_of(condition)(policy, z, t).detach() for policy in ("default", "old", None)}
    expected = nft.nft_loss(v["default"], v["old"], u, rho, 0.5, nft.anchor_scale(t, tau) if form == "official" else None)
    assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)
    assert_close(penalty.detach(), kl * (v["default"] - v[None]).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_equal_rewards_leave_equal_policies_equal():
    """One optimiser step: the adapters' outputs are still the base model's, bit for bit; with unequal rewards they are not."""
    z, eps, condition, t = batch(4)
    for rewards, moves in ((torch.full((2, 2), 0.3), False), (torch.tensor([[0.1, 0.3], [0.2, 0.5]]), True)):
        sd3 = small_sd3()
        lora, velocity_of = with_adapters(sd3)
        velocity = velocity_of(condition)
        before = velocity("default", z, t).detach()
        optimizer = torch.optim.AdamW(lora["default"], lr=1e-2, weight_decay=1e-4)
        sum(nft.train_loss(velocity, z, torch.zeros(4), eps, t, nft.optimality(rewards).flatten(), "official", 0.1, 1e-4)).sum().backward()
        optimizer.step()
        assert torch.equal(velocity("default", z, t).detach(), before) != moves


def test_whole_rollouts_need_no_stop_window():
    """The official setting of one reward has 10 steps; the default window lies beyond them."""
    assert nft.complete(nft.parse_args(["--methods", "nft", "--steps", "10", "--beta", "1"])) == [dict(method="nft", name="nft", window=(10, 10), value=False)]
    with pytest.raises(SystemExit, match="--stop-window 12-17"):
        nft.complete(nft.parse_args(["--steps", "10"]))


def test_values_read_base_weights_while_the_policy_trains(tmp_path):
    """The joint value is the sum of the single ones, shares the prefix, and does not move when the adapters do; the prefix is a copy up to the larger i."""
    sd3, reward = small_sd3(), common.Reward(str(write_clip(tmp_path / "small")))
    null = [torch.randn(1, 5, 24), torch.randn(1, 20)]
    values = [common.StitchedValue(sd3, null, reward, common.Stitch(torch.randn(64, 32) / 6, torch.randn(64), (4, 4)), i, 1).eval().requires_grad_(False) for i in (3, 1)]
    z, _, condition, t = batch()
    texts = [torch.randn(3, 64), torch.randn(3, 64)]
    alone = sum(value(z, t, text) for value, text in zip(values, texts))
    common.own_prefixes(values)
    prefix = values[0].transformer
    lora, velocity_of = with_adapters(sd3)
    shake(lora["default"])
    calls = []
    hooks = [b.register_forward_hook(lambda *_: calls.append(1)) for b in prefix.transformer_blocks]
    assert_close(common.joint_value(values, z, t, texts)[0], alone, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3 == len(hooks) and len(sd3.transformer_blocks) == 4
    assert not {p.data_ptr() for p in prefix.transformer_blocks.parameters()} & {p.data_ptr() for p in sd3.parameters()}
    moved = velocity_of(condition)("default", z, t) - velocity_of(condition)(None, z, t)
    assert moved.abs().max() > 1e-2


# ---------------------------------------------------------------------------- published sizes
def test_dry_run_of_a_shallow_model(capsys, monkeypatch):
    """The value and the noise levels above tau save work, checkpointing costs a pass of each noise level and takes memory away."""
    name, config, *rest = common.CONFIGS["sd3.5-medium"]
    monkeypatch.setitem(common.CONFIGS, "sd3.5-medium", (name, config | dict(num_layers=4, dual_attention_layers=(0, 1)), *rest))
    nft.main(nft.parse_args(["--dry-run", "--reward", "hpsv2"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = {c["method"]: c for c in report["cases"]}
    of = lambda name, key="tflop": cases[name][key]
    assert (report["stage"], report["resolution"]) == ("08_nft", 512) and all(c["unit"] == "sample" and c["n"] == 200 * 96 for c in cases.values())
    assert of("nft+stitchvm, i = 4") < of("nft+stitchvm, i = 4, as many noise levels as nft") < of("nft")
    assert of("nft, rollout and reward only") < 0.5 * of("nft") and of("nft, checkpointing") > of("nft") and of("nft, checkpointing", "saved_gib") < 0.5 * of("nft", "saved_gib")


@pytest.mark.slow
def test_dry_run_counts_the_published_loop(capsys):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample, as counted apart from this code."""
    nft.main(nft.parse_args(["--dry-run", "--reward", "dfn-clip+hpsv2"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = {c["method"]: c for c in report["cases"]}
    expected = {"nft": 315.6, "nft+stitchvm, i = 4": 188.7, "nft+stitchvm, i = 4, as many noise levels as nft": 287.5, "nft, rollout and reward only": 65.8,
                "nft+stitchvm, i = 4, rollout and value only": 37.7}
    assert {k: cases[k]["tflop"] for k in expected} == pytest.approx(expected, rel=0.02)
    checkpointed = cases["nft, checkpointing"]
    assert checkpointed["saved_gib"] < 0.1 * cases["nft"]["saved_gib"] and 1.15 < checkpointed["tflop"] / cases["nft"]["tflop"] < 1.25


# ---------------------------------------------------------------------------- as a user runs it, on the miniature with a value model that was never trained
SHORT = ["--device", "cpu", "--prompts", "2", "--images", "2", "--steps", "5", "--stop-window", "2-3", "--train-times", "2", "--eval-steps", "2", "--eval-limit", "2", "--train-limit", "6",
         "--rank", "4", "--alpha", "8", "--batch", "3"]


def arguments(*flags):
    return [str(f) for f in (*SHORT, *flags)]


@pytest.fixture
def run(monkeypatch, tmp_path, values):
    """Run the stage in the repository's root: its table. Unless `all` scorers are asked for, the reward alone judges the held-out images."""
    monkeypatch.chdir(ROOT)
    load = common.load_scorers

    def go(*flags, out=tmp_path / "out", all=False):
        monkeypatch.setattr(common, "load_scorers", load if all else lambda *a: {})
        nft.main(nft.parse_args(arguments("--out", out, "--value", values["clip"], *flags)))
        return json.loads((out / "08_nft.json").read_text())
    return go


def lora_of(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def test_a_short_run(run, tmp_path, monkeypatch):
    """The promised keys, one start for all methods, work that is what was called, figures, and no file left to resume from."""
    called, velocity, reward, value = dict(free=0, trained=0, reward=0, value=0), common.Backbone.velocity, nft.clean_reward, nft.joint_value

    def count(kind, z):
        called[kind] += len(z)

    monkeypatch.setattr(common.Backbone, "velocity", lambda self, z, *a, **k: (count("trained" if torch.is_grad_enabled() else "free", z), velocity(self, z, *a, **k))[1])
    monkeypatch.setattr(nft, "clean_reward", lambda rewards, texts, x: (count("reward", x), reward(rewards, texts, x))[1])
    monkeypatch.setattr(nft, "joint_value", lambda values, z, *a: (count("value", z), value(values, z, *a))[1])
    evaluated = []
    monkeypatch.setattr(nft, "evaluate", lambda *a: (evaluated.append(called["free"]), common.evaluate(*a), called.__setitem__("free", evaluated[-1]))[1])
    table = run("--updates", 3, "--eval-every", 2, all=True)
    rows, costs = table["rows"], table["gflop_per_row"]
    assert [(r["method"], r["update"]) for r in rows] == [(m, n) for m in nft.METHODS for n in (0, 2, 3)]
    for row in rows:
        assert {"method", "update", "seconds", "gflop", "reward", "reward_se", "gain", "gain_se", "n", "window"} <= set(row) and row["n"] == 2
        assert row["gain"] == pytest.approx(row["reward"] - rows[0]["reward"], abs=1e-6)
        assert {k for s in ("dfn-clip", "hpsv2", "aesthetic", "judge", "geneval") for k in (s, f"{s}_se")} <= set(row)
        assert row["window"] == ([2, 3] if row["method"] == "nft+stitchvm" else None)
    scores = lambda r: {k: v for k, v in r.items() if k not in nft.ABOUT}
    assert scores(rows[0]) == scores(rows[3]) != scores(rows[2]) and rows[0]["gflop"] == 0
    assert [r["update"] for r in table["curve"]] == [1, 2, 3] * 2 and all(math.isfinite(r["loss"]) and r["gradient"] > 0 for r in table["curve"])
    # 3 updates of 2 x 2 images; every velocity of a training step is there three times: old and base without gradient
    trained = called["trained"] - 1  # one of everything measures its cost
    assert trained == 2 * 3 * 4 * 2 and called["value"] == called["reward"] == 1 + 12 and len(evaluated) == 5
    free = called["free"] - 1 - 2 - 2 * trained  # without those of the measurement and of the training steps
    total = costs["velocity"] * free + costs["reward"] * 12 + costs["value"] * 12 + costs["train"] * trained
    assert rows[2]["gflop"] + rows[5]["gflop"] == pytest.approx(total, rel=1e-9) and rows[5]["gflop"] < rows[2]["gflop"]
    assert all(Image.open(tmp_path / "out" / f"08_{name}.png").width > 300 for name in ("grid", "curves"))
    assert not (tmp_path / "out/08_nft.train").exists() and (lora_of(tmp_path / "out/nft").keys() == lora_of(tmp_path / "out/nft+stitchvm").keys())


def test_unit_costs_add_up(monkeypatch):
    """A training step on a batch is as many times one row; checkpointing costs another pass."""
    monkeypatch.chdir(ROOT)
    args = nft.parse_args([*SHORT])
    nft.complete(args)
    backbone, rewards = common.Backbone("sd3.5-medium"), [common.Reward("clip")]
    condition, texts = common.encode_prompts(backbone, ["a red circle on white"]), [rewards[0].encode_text(["a red circle on white"])]
    for name in nft.POLICIES:
        common.add_lora(backbone.transformer, 4, 8, name)
    costs = nft.unit_costs(backbone, rewards, [], condition, texts, (16, 8, 8), args)
    z, t = torch.randn(3, 16, 8, 8), torch.rand(3)
    counted = common.gflop(lambda: sum(nft.train_loss(nft.policy_velocity(backbone, condition), z, 0 * t, z, t, t, kl=1e-4)).sum().backward())
    assert counted == pytest.approx(3 * costs["train"], rel=1e-2) and 3.5 < costs["train"] / costs["velocity"] < 4.5
    args.checkpointing = True
    assert nft.unit_costs(backbone, rewards, [], condition, texts, (16, 8, 8), args)["train"] == pytest.approx(costs["train"] + costs["velocity"], rel=0.02)


def test_the_lora_loads_into_a_fresh_pipeline(run, tmp_path, monkeypatch):
    """pipe.load_lora_weights gives the velocity of the averaged adapter: alpha is 2 x rank, which a file without its metadata would lose."""
    from diffusers import StableDiffusion3Pipeline
    kept, save = {}, nft.save_lora

    def saved(backbone, folder):
        save(backbone, folder)
        kept["u"] = backbone.velocity(z, t, condition).detach()  # with what is written in place of what was trained
    z, t, condition = torch.randn(2, 16, 8, 8), torch.rand(2), common.encode_prompts(common.Backbone("sd3.5-medium"), ["a red circle on white", "two blue stars"])
    monkeypatch.setattr(nft, "save_lora", saved)
    run("--updates", 2, "--methods", "nft+stitchvm", "--lr", 0.02)
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "tests/mini/sd3.5-medium", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    velocity = lambda: pipe.transformer(z, *condition, t * 1000, return_dict=False)[0]
    with torch.no_grad():
        base = velocity()
        pipe.load_lora_weights(tmp_path / "out/nft+stitchvm")
        theirs = velocity()
    assert_close(theirs, kept["u"], rtol=0, atol=1e-4)
    assert (theirs - base).abs().max() > 0.01


def test_windows_are_runs(run, tmp_path):
    """Several windows of one method, each from zero and with the same prompts; a later stop costs more; a stop at the end is at clean latents."""
    table = run("--methods", "nft+stitchvm", "--stop-window", "1-2", "5-5", "--updates", 1, "--train-times", 4)
    last = [r for r in table["rows"] if r["update"] == 1]
    assert [(r["run"], r["window"]) for r in last] == [("nft+stitchvm_1-2", [1, 2]), ("nft+stitchvm_5-5", [5, 5])]
    assert last[0]["gflop"] < last[1]["gflop"] and all((tmp_path / "out" / r["run"] / "pytorch_lora_weights.safetensors").exists() for r in last)


def test_a_budget_ends_a_method(run):
    table = run("--updates", 50, "--gflop", 1e-3)
    assert [r["update"] for r in table["rows"]] == [0, 1, 0, 1]


def test_paper_form_runs(run):
    """Without the penalty unless it is asked for."""
    table = run("--updates", 1, "--loss", "paper", "--methods", "nft", "--eta", 0.5)
    assert table["config"]["kl"] == 0 and table["curve"][0]["penalty"] == 0 and table["curve"][0]["eta"] == 0.5


@pytest.mark.parametrize("backbone", ["sd3.5-medium", "flux"])
def test_the_noise_levels_of_a_run(run, backbone):
    """On either transformer: without shift in the miniature, with another where a flag says so; the rollouts and the evaluation use them."""
    flags, even = ("--backbone", backbone, "--methods", "nft", "--updates", 1), torch.cat([torch.linspace(1, 0.001, 5, dtype=torch.float64), torch.zeros(1)])
    table, shifted = run(*flags), run(*flags, "--shift", 3)
    assert table["grid"] == pytest.approx(even.tolist(), abs=1e-6)
    assert shifted["grid"][1:4] == pytest.approx((3 * even / (1 + 2 * even))[1:4].tolist(), abs=2e-3) and shifted["grid"][0] == 1
    assert shifted["curve"][0]["rollouts"] != table["curve"][0]["rollouts"] and shifted["rows"][0]["reward"] != table["rows"][0]["reward"]


def test_a_nan_stops_and_keeps_the_last_good_state(run, tmp_path, monkeypatch):
    """One sentence; what is left is the state before the bad update, from which a run without the fault ends as one that never had it."""
    flags, good, calls = ("--updates", 3, "--methods", "nft+stitchvm"), nft.optimality, []

    def broken(r, clip):
        calls.append(1)
        return good(r, clip) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(nft, "optimality", broken)
    with pytest.raises(SystemExit, match="^error: the loss of nft.stitchvm became NaN or infinite in update 3; the last good state is .*08_nft.train") as e:
        run(*flags)
    assert "\n" not in str(e.value) and not (tmp_path / "out/nft+stitchvm").exists()
    monkeypatch.setattr(nft, "optimality", good)
    table = run(*flags, "--resume")
    run(*flags, out=tmp_path / "whole")
    assert [r["update"] for r in table["curve"]] == [1, 2, 3]
    a, b = (lora_of(d / "nft+stitchvm") for d in (tmp_path / "out", tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b) and a.keys() == b.keys()


@pytest.mark.parametrize("flags, message", [
    (["--images", "1"], "a group needs two at least"),
    (["--stop-window", "12-30"], "12-30 is no A-B"), (["--stop-window", "3"], "3 is no A-B"), (["--stop-window", "0-2"], "0-2 is no A-B"),
    (["--updates", "0"], "--updates is 0"),
    (["--value", "nowhere.pt"], "there is no value model of clip: nowhere.pt does not exist.*03_finetune.py --reward clip"),
    (["--reward", "clip+hpsv2"], "1 files for the 2 rewards"),
    (["--train-prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--eval-prompts", "README.md", "--eval-limit", "1"], "1 held out"),
    (["--prompts", "7"], "6 prompts to train on"),
    (["--preset", "24gb"], "--train-prompts FILE and --eval-prompts FILE are needed"),
    (["--resume"], "08_nft.train does not exist")], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def test_killed_between_two_updates_and_resumed_gives_the_same_bits(run, tmp_path, values, one_thread):
    """Both adapters, average, optimiser and draws: the run that was killed ends as the one that was not, also in its table. A file of other flags is refused."""
    flags, running = ("--updates", 4, "--methods", "nft+stitchvm"), tmp_path / "killed/08_nft.train"
    process = children.start("08_nft", *SHORT, "--out", running.parent, "--value", values["clip"], *flags)
    while not running.exists() or torch.load(running, weights_only=True)["data"]["update"] < 1:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (running.parent / "nft+stitchvm").exists()
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*lr"):
        run(*flags, "--resume", "--lr", 0.5, out=running.parent)
    resumed, whole = run(*flags, "--resume", out=running.parent), run(*flags, out=tmp_path / "whole")
    a, b = (lora_of(d / "nft+stitchvm") for d in (running.parent, tmp_path / "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(resumed["curve"]) == drop(whole["curve"]) and resumed["rewards_of_prompts"] == whole["rewards_of_prompts"]


def test_two_processes_do_what_one_does(run, tmp_path, values):
    """They share prompts and held-out prompts: the same rewards, spread and gradient, so the same LoRA and the same table, up to rounding."""
    flags = ("--updates", 1, "--methods", "nft+stitchvm")
    children.run_two("08_nft", *SHORT, "--out", tmp_path / "two", "--value", values["clip"], *flags)
    one, two = run(*flags, out=tmp_path / "one"), json.loads((tmp_path / "two/08_nft.json").read_text())
    for a, b in zip([*one["rows"], *one["curve"]], [*two["rows"], *two["curve"]], strict=True):
        numbers = {k: v for k, v in a.items() if isinstance(v, (int, float)) and k != "seconds"}
        assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=1e-2, abs=1e-3)
    a, b = (torch.cat([v.flatten() for k, v in sorted(lora_of(tmp_path / n / "nft+stitchvm").items()) if "lora_B" in k]) for n in ("one", "two"))
    assert (a - b).norm() < 0.05 * a.norm()


# ---------------------------------------------------------------------------- tests/mini/gradient.py
def test_the_signal_of_a_gradient():
    """The mean product of two of them and its jackknife, against both by loops; the mean's square, .25, from 4,000 noisy ones."""
    x = torch.tensor([3.0, -1.0, 3.0, -1.0, 3.0], dtype=torch.float64)[:, None]
    estimate, error = gradient.signal_of(x @ x.T)
    pairs = lambda x: sum(float(a * b) for k, a in enumerate(x) for m, b in enumerate(x) if k != m) / len(x) / (len(x) - 1)
    without = torch.tensor([pairs(torch.cat([x[:k], x[k + 1:]])) for k in range(5)])
    assert float(estimate) == pytest.approx(pairs(x)) and float(error) == pytest.approx(float((4 / 5 * (without - without.mean()).square().sum()).sqrt()))
    g = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor([0.3, 0.0, -0.4])
    estimate, error = gradient.signal_of(g @ g.T)
    assert abs(float(estimate) - 0.25) < 3 * float(error) < 0.06


def test_signal_and_noise_of_a_short_run(tmp_path, monkeypatch, values):
    """nft's and one stop's rows, on training prompts; the noises are what is left of the gradient's square."""
    monkeypatch.chdir(ROOT)
    gradient.main(gradient.parse_args(["--groups", "3", "--images", "2", "--every", "6", "--stops", "13", "--train-limit", "6", "--value", str(values["clip"]), "--out", str(tmp_path)]))
    rows = json.loads((tmp_path / "gradient.json").read_text())["rows"]
    assert [(r["method"], r["stop"], r["n"]) for r in rows] == [("nft", 25, 3), ("nft+stitchvm", 13, 3)]
    for r in rows:
        assert r["signal"] + r["noise_of_images"] + r["noise_of_levels"] > 0 and r["signal_se"] > 0 and abs(r["correlation"]) <= 1.0001
    with pytest.raises(SystemExit, match="--groups 2 must be 3 at least"):
        gradient.main(gradient.parse_args(["--groups", "2"]))
    assert rows[0]["correlation"] == pytest.approx(1) and rows[1]["rollout_gflop"] < rows[0]["rollout_gflop"]
