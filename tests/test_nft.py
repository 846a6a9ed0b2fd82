"""Stage 08: bridge, loss and solver in closed form, adapters and values against references, and
short runs as a user runs them, killed, resumed and shared."""

import argparse
import contextlib
import importlib
import json
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import children
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_common import small_sd3, write_clip
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.testing import assert_close

import common

nft = importlib.import_module("08_nft")
GRID = common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 25, 1024).tolist()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------- the bridge
TAUS, SHARES = double(0.0, 0.1, 0.55, 0.75, 0.9), double(0.02, 0.5, 0.98, 1.0)
TAU = TAUS.repeat_interleave(len(SHARES))
T = TAU + (1 - TAU) * SHARES.repeat(len(TAUS))  # above tau, up to 1


def test_bridge_keeps_the_marginals():
    """z_tau = (1-tau) z_0 + tau eps' goes to (1-t) z_0 + t eps'': factor of z_0 and variance."""
    a, s, _, _ = nft.bridge(T, TAU)
    assert_close(a * (1 - TAU), 1 - T, rtol=1e-12, atol=1e-15)
    assert_close(a**2 * TAU**2 + s**2, T**2, rtol=1e-12, atol=1e-15)
    assert (s > 0).all()


def test_bridge_derivatives():
    """Against autograd, and the identity s^2 + (1-t) s s' = t."""
    t = T.clone().requires_grad_()
    a, s, da, ds = nft.bridge(t, TAU)
    for value, derivative in ((a, da), (s, ds)):
        found = torch.autograd.grad(value.sum(), t, retain_graph=True)[0]
        assert_close(found, derivative.detach(), rtol=1e-9, atol=1e-12)
    assert_close(s**2 + (1 - t) * s * ds, t, rtol=1e-12, atol=1e-15)


def test_bridge_near_its_anchor():
    """In float32, a thousandth above tau, where t^2 - a^2 tau^2 would keep two digits."""
    t, tau = torch.tensor([[0.6001], [0.6]])
    exact = nft.bridge(t.double(), tau.double())
    for found, true in zip(nft.bridge(t, tau), exact, strict=True):
        assert_close(found.double(), true, rtol=1e-5, atol=0)


def test_no_anchor_is_the_standard_path():
    z0, eps = torch.randn(2, 5, 2, 3)
    t = torch.rand(5)
    z, u = nft.bridge_point(z0, eps, t, torch.zeros(5))
    assert_close(z, common.add_noise(z0, eps, t))
    assert_close(u, eps - z0)
    assert_close(nft.anchor_scale(t, torch.zeros(5)), t)


# data: a mixture of two Gaussians, of which everything is known at every noise level
WEIGHT, MEAN, VAR = torch.tensor([[0.3, 0.7], [-1.0, 0.8], [0.1, 0.4]], dtype=torch.float64)


def mixture(z, t):
    """Density and marginal velocity at z (N,): E[eps - z_0 | z_t] is the sum over k of
    p(k | z) (-m_k + (t - (1-t) v_k) / V_k (z - (1-t) m_k))."""
    V = (1 - t) ** 2 * VAR + t * t
    far = z[:, None] - (1 - t) * MEAN
    parts = WEIGHT * torch.exp(-(far**2) / (2 * V)) / (2 * math.pi * V) ** 0.5
    velocities = -MEAN + (t - (1 - t) * VAR) / V * far
    return parts.sum(1), (parts * velocities).sum(1) / parts.sum(1)


@pytest.mark.parametrize("tau, t", [(0.3, 0.35), (0.3, 0.7), (0.6, 0.75), (0.75, 0.98), (0.6, 1.0)])
def test_the_bridges_velocity_is_unbiased(tau, t):
    """E[u_{t|tau} | z_t] is the marginal velocity at t for a z_tau of the marginal law, whatever
    the data: by quadrature over z_tau."""
    x = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    density, _ = mixture(x, tau)
    a, s, _, _ = nft.bridge(double(t), double(tau))
    for z in (-1.5, 0.1, 1.2):
        eps = (z - a * x) / s
        point, u = nft.bridge_point(x, eps, torch.full_like(x, t), torch.full_like(x, tau))
        assert_close(point, torch.full_like(x, z), rtol=0, atol=1e-12)
        w = density * torch.exp(-(eps**2) / 2)
        marginal = float(mixture(double(z), t)[1])
        assert float((w * u).sum() / w.sum()) == pytest.approx(marginal, abs=1e-6)


def test_anchor_scale_is_the_error_of_the_anchor():
    """zhat_tau = (1-tau)/t (s s' z_t - s^2 v) is z_tau for v = u, and moves with v by -scale;
    tau = 0: z_t - t v."""
    z_tau, eps, v = normal(3, len(T))
    z, u = nft.bridge_point(z_tau, eps, T, TAU)
    _, s, _, ds = nft.bridge(T, TAU)

    def estimate(v):
        return (1 - TAU) / T * (s * ds * z - s**2 * v)

    assert_close(estimate(u), z_tau, rtol=1e-9, atol=1e-9)
    moved = -nft.anchor_scale(T, TAU) * (v - u)
    assert_close(estimate(v) - z_tau, moved, rtol=1e-9, atol=1e-9)
    assert_close(estimate(v)[TAU == 0], (z - T * v)[TAU == 0])


# ---------------------------------------------------------------------------- rewards
def test_optimality_by_hand():
    """Two prompts, two images: means 2 and 6, deviation of all four sqrt(5), not of groups."""
    r = double(1, 3, 5, 7).view(2, 2)
    advantage = 1 / (5**0.5 + 1e-4)
    assert_close(nft.optimality(r), 0.5 + double(-1, 1, -1, 1).view(2, 2) * advantage / 10)
    assert_close(nft.optimality(r, clip=0.2), double(0, 1, 0, 1).view(2, 2))
    far = torch.zeros(1, 100).double()
    far[0, 0] = 1.0
    rho = nft.optimality(far)
    assert rho[0, 0] == 1 and rho.min() > 0.48  # clipped at five deviations
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
    """On data N(m, v) and rho = 1/2 + linear x + square x^2 of the anchor x, the minimiser is
    v_old - (2/beta) t/(1-t) grad E[rho | z_t], also for anchors at tau."""
    m, v = 0.7, 0.25
    nodes, weights = gauss()
    x, e = nodes.repeat_interleave(20), nodes.repeat(20)
    w = weights.repeat_interleave(20) * weights.repeat(20)
    V_tau = (1 - tau) ** 2 * v + tau**2
    anchor = (1 - tau) * m + V_tau**0.5 * x
    rho = 0.5 + linear * anchor + square * anchor**2
    z, u = nft.bridge_point(anchor, e, torch.full_like(x, t), torch.full_like(x, tau))
    a, s, _, _ = nft.bridge(double(t), double(tau))
    V_t = a**2 * V_tau + s**2
    v_old = -m + (t - (1 - t) * v) / V_t * (z - (1 - t) * m)  # the marginal velocity
    # E[x | z_t] = mean + slope (z - ...), Var[x | z_t] = spread
    slope, spread = a * V_tau / V_t, V_tau * s**2 / V_t
    mean = (1 - tau) * m + slope * (z - (1 - t) * m)
    # of E[rho | z_t] = 1/2 + linear mean + square (mean^2 + spread)
    gradient = slope * (linear + 2 * square * mean)
    assert spread > 0

    def loss(c):
        """v = v_old + c0 + c1 z: affine is enough here, and the loss is quadratic in c."""
        moved = (v_old + c[0] + c[1] * z)[:, None]
        return (w * nft.nft_loss(moved, v_old[:, None], u[:, None], rho, beta)).sum()

    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(loss(c), c)[0]
    hessian = torch.autograd.functional.hessian(loss, torch.zeros(2, dtype=torch.float64))
    best = -torch.linalg.solve(hessian, first)
    expected = -2 / beta * t / (1 - t) * gradient
    assert_close(best[0] + best[1] * z, expected, rtol=1e-7, atol=1e-9)


def random_policies(n=6, equal=False, dtype=torch.float64):
    v, v_old, u = torch.randn(3, n, 4, 5, dtype=dtype)
    v = (v_old.clone() if equal else v).requires_grad_()
    return v, v_old, u, torch.rand(n, dtype=dtype)


def gradient_of(v, *rest):
    return torch.autograd.grad(nft.nft_loss(v, *rest).sum(), v)[0]


def test_an_average_reward_pulls_nowhere():
    """rho = 1/2: the gradient is 2 beta^2 (v - v_old) / size, whatever the target."""
    v, v_old, u, _ = random_policies()
    rho = torch.full((6,), 0.5).double()
    for beta in (0.1, 1.0):
        for target in (u, 100 * u):
            expected = (2 * beta**2 * (v - v_old) / 20).detach()
            found = gradient_of(v, v_old, target, rho, beta)
            assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [None, torch.rand(6)])
def test_equal_policies_and_rewards_give_exactly_no_gradient(scale):
    """In float32, so not even a rounding error: Adam would make a full step of one."""
    v, v_old, u, _ = random_policies(equal=True, dtype=torch.float32)
    gradient = gradient_of(v, v_old, u, torch.full((6,), 0.5), 0.1, scale)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_only_good_samples_is_flow_matching():
    v, v_old, u, _ = random_policies()
    found = nft.nft_loss(v, v_old, u, torch.ones(6).double(), 1.0)
    assert_close(found, (v - u).square().mean((1, 2)))


@pytest.mark.parametrize("beta, clip", [(0.1, 5.0), (1.0, 5.0), (0.1, 2.0)])
def test_the_official_form_as_published(beta, clip):
    """Written in z_0 with t v: L = (zhat - z_0)^2 / mean |zhat - z_0|, no gradient through the
    divisor, adv_clip_max / beta in front; value and gradient."""
    v, v_old, u, rho = random_policies()
    t = torch.rand(6).double()
    z0, eps = normal(2, 6, 4, 5)
    z, u = nft.bridge_point(z0, eps, t, torch.zeros(6).double())

    def published(velocity):
        error = z - t.view(-1, 1, 1) * velocity - z0
        with torch.no_grad():
            size = error.abs().mean((1, 2)).clip(min=1e-5)
        return (error**2 / size.view(-1, 1, 1)).mean((1, 2))

    better = rho * published(beta * v + (1 - beta) * v_old)
    worse = (1 - rho) * published((1 + beta) * v_old - beta * v)
    expected = clip * (better + worse) / beta
    scale = nft.anchor_scale(t, torch.zeros(6).double())
    found = nft.nft_loss(v, v_old, u, rho, beta, scale, clip)
    assert_close(found, expected)
    pair = [torch.autograd.grad(x.sum(), v, retain_graph=True)[0] for x in (found, expected)]
    assert_close(*pair, rtol=1e-6, atol=1e-9)


def test_the_official_form_by_hand():
    """Errors 2.5 and 1.5 over their sizes, shares .75 and .25, clip / beta in front: 4.5 clip; the
    paper's form knows no clip."""
    v, v_old, u = (torch.full((1, 4), x).double() for x in (3.0, 2.0, 0.0))
    given = v, v_old, u, double(0.75), 0.5
    for clip in (5.0, 2.0):
        assert_close(nft.nft_loss(*given, double(1.0), clip), double(4.5 * clip))
        assert_close(nft.nft_loss(*given, None, clip), double(0.75 * 2.5**2 + 0.25 * 1.5**2))


def test_official_and_paper_agree_at_the_old_policy():
    """Where v = v_old their gradients have the same direction for each sample, and sizes
    5 scale^2 / (beta mean |scale (v_old - u)|) apart; they differ elsewhere."""
    v, v_old, u, rho = random_policies(equal=True)
    scale = torch.rand(6).double()
    ratio = (50 * scale / (v_old - u).abs().mean((1, 2))).view(-1, 1, 1)
    paper = gradient_of(v, v_old, u, rho, 0.1)
    assert_close(gradient_of(v, v_old, u, rho, 0.1, scale), ratio * paper)
    moved = (v + torch.randn_like(v)).detach().requires_grad_()
    paper = gradient_of(moved, v_old, u, rho, 0.1)
    assert (gradient_of(moved, v_old, u, rho, 0.1, scale) - ratio * paper).abs().max() > 1e-3


# ---------------------------------------------------------------------------- the old policy
def test_the_old_policy_follows():
    """(71): eta of the old one stays; eta = 0 copies."""
    old, new = [torch.ones(3), torch.zeros(2)], [torch.zeros(3), torch.full((2,), 4.0)]
    get_ema_multi_avg_fn(0.75)(old, new, None)
    assert_close(old, [torch.full((3,), 0.75), torch.ones(2)])
    get_ema_multi_avg_fn(0.0)(old, new, None)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_the_official_schedules():
    def schedule(kind, *updates):
        return [round(nft.old_decay(n, kind), 6) for n in updates]

    assert schedule(0, 1, 1000) == [0, 0]
    assert schedule(1, 1, 100, 500, 5000) == [0.001, 0.1, 0.5, 0.5]
    assert schedule(2, 1, 75, 76, 175, 5000) == [0, 0, 0.0075, 0.75, 0.999]


# ---------------------------------------------------------------------------- the solver
M, V = 0.7, 0.25


def exact_velocity(z, t, m=M, v=V):
    """Of data N(m, v)."""
    return (t - (1 - t) * v) / ((1 - t) ** 2 * v + t * t) * (z - (1 - t) * m) - m


def solve(grid, v=V, z=1.3, last=None):
    """The solver from z at grid[0] on data N(M, v), and the exact solution there."""

    def velocity(z, sigma, rows):
        return exact_velocity(z, sigma.view(-1, 1), v=v)

    def spread(t):
        return ((1 - t) ** 2 * v + t * t) ** 0.5

    last = len(grid) - 1 if last is None else last
    start, t = grid[0], grid[last]
    found = nft.rollout(velocity, double(z)[:, None], grid, torch.tensor([last]))
    return float(found), (1 - t) * M + spread(t) / spread(start) * (z - (1 - start) * M)


def test_the_solver_is_of_second_order():
    """Errors fall fourfold when the steps double; from 1 to 0, where log SNR is infinite, all but a
    logarithm of the steps. On the real grid it beats Euler up to the last two levels (.1227, .0089,
    0): the step between them is 2.7 in log SNR and extrapolates over four times the one before."""

    def error(top, bottom, n):
        grid = torch.linspace(top, bottom, n + 1, dtype=torch.float64).tolist()
        return abs(np.subtract(*solve(grid)))

    assert error(0.9, 0.1, 40) / error(0.9, 0.1, 80) == pytest.approx(4, abs=0.3)
    assert error(0.9, 0.1, 80) / error(0.9, 0.1, 160) == pytest.approx(4, abs=0.2)
    assert error(1, 0, 40) / error(1, 0, 80) > 2.8 and error(1, 0, 640) / error(1, 0, 1280) > 3.2
    euler = 1.3
    for t, s in zip(GRID[:23], GRID[1:24], strict=True):
        euler -= (t - s) * exact_velocity(euler, t)
    found, exact = solve(GRID, last=23)
    assert abs(found - exact) < 0.5 * abs(euler - exact)


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_the_solver_is_exact_for_one_image(steps):
    """All data at one point: zhat_0 is constant along the path."""
    grid = torch.linspace(1, 0, steps + 1).tolist()
    assert solve(grid, v=0.0)[0] == pytest.approx(0.7, abs=1e-12)


def test_the_solver_is_diffusers():
    """DPM-Solver++(2M), midpoint, x0 form, on the same noise levels; the library cannot start at 1,
    so both start a node later."""
    kinds = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint")
    kinds |= dict(prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs = DPMSolverMultistepScheduler(final_sigmas_type="zero", euler_at_final=True, **kinds)
    grid = GRID[1:]
    theirs.set_timesteps(len(grid) - 1)
    theirs.sigmas, theirs.timesteps = torch.tensor(grid), torch.arange(len(grid) - 1, 0, -1)

    def velocity(z, sigma, rows=None):
        return torch.sin(3 * z + sigma[0])

    z = torch.randn(4, 3)
    found = nft.rollout(velocity, z, grid, torch.full((4,), len(grid) - 1))
    for k, t in enumerate(theirs.timesteps):
        z = theirs.step(velocity(z, [grid[k]]), t, z).prev_sample
    assert_close(found, z, rtol=1e-4, atol=1e-5)


def test_rows_that_stop_early_are_where_the_whole_path_passes():
    """Each row stops at its node of the whole grid, at full order, and the velocity is asked for
    the rows that go on only: those that stop first come first."""
    z = torch.randn(4, 3)
    asked, levels = [], []

    def velocity(z, sigma, rows):
        asked.append(torch.arange(4)[rows].tolist())
        levels.append(float(sigma[0]))
        return torch.sin(3 * z) + torch.arange(4)[rows].view(-1, 1)

    stop = torch.tensor([12, 12, 17, 25])
    found = nft.rollout(velocity, z, GRID, stop)
    assert asked == [[0, 1, 2, 3]] * 12 + [[2, 3]] * 5 + [[3]] * 8
    assert levels == pytest.approx(GRID[:-1])
    for k in range(4):

        def alone(z, sigma, rows, k=k):
            return torch.sin(3 * z) + k

        one = slice(k, k + 1)
        assert_close(found[k], nft.rollout(alone, z[one], GRID, stop[one])[0])


# ---------------------------------------------------------------------------- adapters and values
def with_adapters(transformer):
    """{policy: parameters}, and velocity(policy, z, t) for given conditions, of a transformer whose
    adapters are still zero."""
    lora = {name: nft.add_lora(transformer, 4, 8, name) for name in nft.POLICIES}
    for name in nft.POLICIES:
        torch._foreach_copy_([p.data for p in lora[name]], [p.data for p in lora["default"]])
    velocity = partial(common.velocity, transformer)
    backbone = SimpleNamespace(transformer=transformer, velocity=velocity)
    return lora, partial(nft.policy_velocity, backbone)


def shake(*groups, scale=0.3):
    for parameters in groups:
        for p in parameters:
            p.data += scale * torch.randn_like(p)


def batch(n=3):
    g = torch.Generator().manual_seed(1)
    z, eps = torch.randn(2, n, 16, 10, 6, generator=g)
    condition = [torch.randn(n, 5, 24, generator=g), torch.randn(n, 20, generator=g)]
    return z, eps, condition, torch.rand(n, generator=g)


def test_policies_are_told_apart():
    """As the library's own forward gives them; new adapters are the base; the eight projections of
    every block have one, the second attention has none."""
    sd3 = small_sd3()
    z, _, condition, t = batch()

    def library():
        return sd3(z, *condition, t * 1000, return_dict=False)[0].detach()

    base = library()
    lora, velocity_for = with_adapters(sd3)
    assert {len(p) for p in lora.values()} == {2 * (4 * 8 - 1)}  # the last has no text output
    assert {p.dtype for p in lora["old"]} == {torch.float32}
    velocity = velocity_for(condition)
    for policy in (None, *nft.POLICIES):
        assert_close(velocity(policy, z, t).detach(), base, rtol=0, atol=1e-5)
    shake(lora["default"], lora["old"])
    found = {}
    for policy in (None, "default", "old"):
        found[policy] = velocity(policy, z, t).detach()
        if policy is None:
            sd3.disable_adapters()
        else:
            sd3.set_adapter(policy)
        assert_close(found[policy], library(), rtol=0, atol=1e-5)
        sd3.enable_adapters()

    def far(a, b):
        return (found[a] - found[b]).abs().max() > 1e-2

    assert far("default", None) and far("old", None) and far("default", "old")


@pytest.mark.parametrize("kl", [0.0, 1e-2])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_a_training_step(form, kl):
    """The loss is nft_loss of the three policies' velocities at the bridge's points; only the
    trained adapter gets gradients, the same ones with checkpointing."""
    sd3 = small_sd3()
    lora, velocity_for = with_adapters(sd3)
    shake(lora["default"], lora["old"])
    z_tau, eps, condition, _ = batch()
    tau, t, rho = torch.tensor([[0.6, 0.0, 0.75], [0.7, 0.3, 1.0], [0.1, 0.5, 0.9]])
    gradients = {}
    for checkpointing in (False, True):
        velocity = velocity_for(condition, checkpointing)
        loss, penalty = nft.train_loss(velocity, z_tau, tau, eps, t, rho, form, 0.5, kl)
        (loss + penalty).sum().backward()
        gradients[checkpointing] = [p.grad.clone() for p in lora["default"]]
        assert all(p.grad is None for p in lora["old"])
        for p in lora["default"]:
            p.grad = None
    moved = sum(float(g.abs().max()) > 0 for g in gradients[False])
    assert moved >= len(gradients[False]) - 2  # the last block's text queries reach nothing
    assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-6)
    z, u = nft.bridge_point(z_tau, eps, t, tau)
    velocity = velocity_for(condition)
    v = {policy: velocity(policy, z, t).detach() for policy in ("default", "old", None)}
    scale = nft.anchor_scale(t, tau) if form == "official" else None
    expected = nft.nft_loss(v["default"], v["old"], u, rho, 0.5, scale)
    assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)
    expected = kl * (v["default"] - v[None]).square().mean((1, 2, 3))
    assert_close(penalty.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rewards, moves", [([[0.3] * 2] * 2, False), ([[0.1, 0.3], [0.2, 0.5]], True)]
)
def test_equal_rewards_leave_equal_policies_equal(rewards, moves):
    """One optimiser step: the adapters' outputs are still the base model's, bit for bit; with
    unequal rewards they are not."""
    z, eps, condition, t = batch(4)
    lora, velocity_for = with_adapters(small_sd3())
    velocity = velocity_for(condition)
    before = velocity("default", z, t).detach()
    optimizer = torch.optim.AdamW(lora["default"], lr=1e-2, weight_decay=1e-4)
    rho = nft.optimality(torch.tensor(rewards)).flatten()
    losses = nft.train_loss(velocity, z, torch.zeros(4), eps, t, rho, "official", 0.1, 1e-4)
    sum(losses).sum().backward()
    optimizer.step()
    assert torch.equal(velocity("default", z, t).detach(), before) != moves


def test_whole_rollouts_need_no_stop_window():
    """The official setting of one reward has 10 steps; the default window lies beyond them."""
    nft.check(nft.parse_args(["--methods", "nft", "--steps", "10", "--beta", "1"]))
    with pytest.raises(SystemExit, match="--stop 12 17"):
        nft.check(nft.parse_args(["--steps", "10"]))


def test_values_read_base_weights_while_the_policy_trains(tmp_path):
    """The joint value is the sum of the single ones, shares the blocks up to the larger i, and does
    not move when the adapters do; what it reads has no adapter and takes no memory."""
    sd3, reward = small_sd3(), common.Reward(str(write_clip(tmp_path / "small")))
    null = [torch.randn(1, 5, 24), torch.randn(1, 20)]
    values = []
    for i in (3, 1):
        stitch = common.Stitch(torch.randn(64, 32) / 6, torch.randn(64), (4, 4))
        value = common.StitchedValue(sd3, null, reward, stitch, i, 1)
        values.append(value.eval().requires_grad_(False))
    z, _, condition, t = batch()
    texts = [torch.randn(3, 64), torch.randn(3, 64)]
    pairs = zip(values, texts, strict=True)
    alone = sum(value(z, t, text) for value, text in pairs)
    nft.own_prefixes(values)
    prefix = values[0].transformer
    assert prefix is values[1].transformer is not sd3
    lora, velocity_for = with_adapters(sd3)
    shake(lora["default"])
    calls = []
    for block in prefix.transformer_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    assert_close(common.joint_value(values, z, t, texts)[0], alone, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3 and not any("lora" in name for name, _ in prefix.named_parameters())
    shared = {p.data_ptr() for p in sd3.parameters()}
    assert {p.data_ptr() for p in prefix.parameters()} <= shared
    velocity = velocity_for(condition)
    assert (velocity("default", z, t) - velocity(None, z, t)).abs().max() > 1e-2


# ---------------------------------------------------------------------------- as a user runs it
# on the miniature with a value model that was never trained
SHORT = ["--device", "cpu", "--prompts", "2", "--images", "2", "--steps", "5", "--stop", "2", "3"]
SHORT += ["--train-times", "2", "--eval-steps", "2", "--eval-limit", "2", "--train-limit", "6"]
SHORT += ["--rank", "4", "--alpha", "8", "--batch", "3", "--scorers"]  # the reward alone judges


@pytest.fixture
def run(monkeypatch, tmp_path, values):
    """Run the stage in the repository's root: its table."""
    monkeypatch.chdir(common.ROOT)

    def go(*flags, out=tmp_path / "out", anew=True):
        again = ("--restart",) if anew and "--resume" not in flags else ()
        given = [*SHORT, "--out", out, "--value", values["clip"], *flags, *again]
        nft.main(nft.parse_args([str(f) for f in given]))
        return json.loads((out / "08_nft.json").read_text())

    return go


def lora_in(folder):
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


@pytest.fixture
def called(monkeypatch):
    """How many rows were asked for of a velocity, with and without gradient, a reward, a value;
    an evaluation counts apart."""
    found = dict(free=0, trained=0, reward=0, value=0, evaluations=0)
    velocity, evaluate = common.Backbone.velocity, nft.evaluate
    reward, value = nft.clean_reward, nft.joint_value

    def count_velocity(self, z, *a, **k):
        found["trained" if torch.is_grad_enabled() else "free"] += len(z)
        return velocity(self, z, *a, **k)

    def count_reward(rewards, texts, x):
        found["reward"] += len(x)
        return reward(rewards, texts, x)

    def count_value(values, z, *a):
        found["value"] += len(z)
        return value(values, z, *a)

    def count_evaluation(*a):
        before = found["free"]
        images = evaluate(*a)
        found.update(free=before, evaluations=found["evaluations"] + 1)
        return images

    monkeypatch.setattr(common.Backbone, "velocity", count_velocity)
    monkeypatch.setattr(nft, "clean_reward", count_reward)
    monkeypatch.setattr(nft, "joint_value", count_value)
    monkeypatch.setattr(nft, "evaluate", count_evaluation)
    return found


def test_a_short_run(run, tmp_path, called):
    """The promised keys, one start for all methods, work that is what was called, images, figures,
    and files that say that the methods are done."""
    scorers = ("dfn-clip", "hpsv2", "aesthetic", "judge")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    another = tmp_path / "out/08_images/nft/2/00009/samples/0000.png"
    another.parent.mkdir(parents=True)
    another.touch()  # of an earlier run
    flags = ("--save-images", "--track", tmp_path / "track")
    table = run("--updates", 3, "--eval-every", 2, *flags, "--scorers", *scorers)
    rows, costs = table["rows"], table["gflop_per_row"]
    expected = [(m, n) for m in nft.METHODS for n in (0, 2, 3)]
    assert [(r["method"], r["update"]) for r in rows] == expected
    for row in rows:
        assert set(nft.POSITION) < set(row) and row["n"] == 2
        assert {k for s in ("reward", "gain", *scorers) for k in (s, f"{s}_se")} <= set(row)
        assert row["gain"] == pytest.approx(row["reward"] - rows[0]["reward"], abs=1e-6)
        assert row["images"] == f"08_images/{row['method']}/{row['update']}"
        assert len([*(tmp_path / "out" / row["images"]).glob("*/samples/0000.png")]) == 2

    def scores(row):
        return {k: row[k] for k in ("reward", "reward_se", *scorers)}

    assert scores(rows[0]) == scores(rows[3]) != scores(rows[2]) and rows[0]["gflop"] == 0
    assert [r["update"] for r in table["curve"]] == [1, 2, 3] * 2
    assert all(math.isfinite(r["loss"]) and r["gradient"] > 0 for r in table["curve"])
    # 3 updates of 2 x 2 images; one of everything measures its cost
    trained = called["trained"] - 1
    assert trained == 2 * 3 * 4 * 2 and called["evaluations"] == 5  # the base model once
    assert called["value"] == called["reward"] == 1 + 12
    # a training step has two velocities without gradient, of the old policy and the base
    free = called["free"] - 1 - 2 - 2 * trained
    total = costs["velocity"] * free + (costs["reward"] + costs["value"]) * 12
    total += costs["train"] * trained
    assert rows[2]["gflop"] + rows[5]["gflop"] == pytest.approx(total, rel=1e-9)
    assert rows[5]["gflop"] < rows[2]["gflop"]
    for method in nft.METHODS:
        files = EventAccumulator(str(tmp_path / "track" / method)).Reload()
        for key, lines in (("reward", rows), ("loss", table["curve"])):
            own = {r["update"]: r[key] for r in lines if r["method"] == method}
            own = {k: v for k, v in own.items() if k in (2, 3) or key == "reward"}
            assert {e.step: e.value for e in files.Scalars(key)} == pytest.approx(own)
        assert [e.step for e in files.Images("samples")] == [0, 2, 3]
    for name in ("grid", "curves"):
        assert Image.open(tmp_path / "out" / f"08_{name}.png").width > 300
    assert lora_in(tmp_path / "out/nft").keys() == lora_in(tmp_path / "out/nft+stitchvm").keys()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_ask_the_device_for_nothing(monkeypatch, device):
    """Until all have been sampled, when the anchors come at once: on the meta device, which has no
    numbers. Each then stands with its image, whatever the order in which they stop."""
    moved = []

    def cpu(x):
        moved.append(x)
        return x if device == "cpu" else torch.zeros(x.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(nft, "joint_value", lambda _, z, t, texts: (z.sum((1, 2, 3)), {}))
    backbone = SimpleNamespace(transformer=SimpleNamespace(set_adapter=lambda _: None))
    backbone.velocity = lambda z, t, condition, **_: 0 * z  # the noise stays
    run = SimpleNamespace(pool=9, grid=[1.0, 0.8, 0.6, 0.4, 0.2, 0.0], shape=(4, 2, 2))
    run.accelerator = SimpleNamespace(process_index=0, num_processes=1, reduce=lambda x, _: x)
    run.device, run.backbone, run.values = torch.device(device), backbone, []
    run.condition, run.texts = [torch.zeros(9, 3)], [None]
    args = argparse.Namespace(seed=0, steps=5, stop=[2, 5], prompts=4, images=2, batch=3)
    stops, r, (ids, _, stop, tau, z_tau) = nft.sample_groups(run, args, "nft+stitchvm", 0)
    assert len(moved) == 1 and len(set(stops.tolist())) > 1
    assert stop.tolist() == stops[ids // 2].tolist()
    assert tau.tolist() == pytest.approx([run.grid[k] for k in stop])
    if device == "cpu":
        noise = nft.noises(run, *((0, "rollout", 0, *divmod(i, 2)) for i in ids.tolist()))
        assert_close(z_tau, noise)
        assert_close(r.flatten()[ids], noise.sum((1, 2, 3)))


def test_prompts_are_encoded_once_for_all_processes(monkeypatch, tmp_path):
    """The first writes a file, which the others read where it lies. All prompts are trained on
    where the preset is a published one."""
    monkeypatch.chdir(common.ROOT)
    args = nft.parse_args([*SHORT, "--methods", "nft", "--out", str(tmp_path)])
    nft.check(args)
    found = []
    for k in range(2):
        one = SimpleNamespace(num_processes=2, process_index=k, is_main_process=k == 0, print=print)
        one.main_process_first = contextlib.nullcontext
        found.append(nft.load(args, one).condition)
        monkeypatch.setattr(common.Backbone, "encode_prompts", None)
    assert len([*tmp_path.glob("prompts_*.bin")]) == 1
    assert {v.device.type for v in found[0]} == {"cpu"}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert nft.parse_args(["--preset", "paper"]).train_limit is None


def test_another_adv_clip_scales_the_loss(run):
    """In the first update both policies are the base model: whatever rho is, the loss is clip /
    beta times the mean size of the errors."""
    flags = ("--updates", 1, "--methods", "nft+stitchvm", "--adv-clip")
    five, two = (run(*flags, clip)["curve"][0]["loss"] for clip in (5, 2))
    assert two == pytest.approx(0.4 * five, rel=1e-5) and five > 0


def test_unit_costs_add_up(monkeypatch):
    """A training step on a batch is as many times one row; checkpointing costs another pass."""
    monkeypatch.chdir(common.ROOT)
    args = nft.parse_args(SHORT)
    nft.check(args)
    text, rewards = ["a red circle on white"], [common.Reward("clip")]
    setup = SimpleNamespace(backbone=common.Backbone("sd3.5-medium"), rewards=rewards, values=[])
    setup.condition, setup.texts = setup.backbone.prompts(text), [rewards[0].text(text)]
    setup.device, setup.shape = setup.backbone.device, (16, 8, 8)
    for name in nft.POLICIES:
        nft.add_lora(setup.backbone.transformer, 4, 8, name)
    costs = nft.unit_costs(setup, args)
    z, t = torch.randn(3, 16, 8, 8), torch.rand(3)
    velocity = nft.policy_velocity(setup.backbone, setup.condition)

    def train():
        sum(nft.train_loss(velocity, z, 0 * t, z, t, t, kl=1e-4)).sum().backward()

    assert common.gflop(train) == pytest.approx(3 * costs["train"], rel=1e-2)
    assert 3.5 < costs["train"] / costs["velocity"] < 4.5
    args.checkpointing = True
    more = costs["train"] + costs["velocity"]
    assert nft.unit_costs(setup, args)["train"] == pytest.approx(more, rel=0.02)


def test_the_lora_loads_into_a_fresh_pipeline(run, tmp_path, monkeypatch):
    """pipe.load_lora_weights gives the velocity of the averaged adapter, and so does peft: alpha is
    2 x rank, which a file without its metadata would lose."""
    texts = ["a red circle on white", "two blue stars"]
    condition = common.Backbone("sd3.5-medium").prompts(texts)
    z, t = torch.randn(2, 16, 8, 8), torch.rand(2)
    found, save = {}, nft.save_lora

    def saved(backbone, folder, name):
        save(backbone, folder, name)
        backbone.transformer.set_adapter("average")
        found["average"] = backbone.velocity(z, t, condition).detach()

    monkeypatch.setattr(nft, "save_lora", saved)
    run("--updates", 2, "--methods", "nft+stitchvm", "--lr", 0.02)
    folder, absent = common.ROOT / "tests/mini/sd3.5-medium", ("text_encoder_3", "tokenizer_3")
    parts = dict.fromkeys(absent)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts, dtype=torch.float32)

    @torch.no_grad()
    def velocity():
        return pipe.transformer(z, *condition, t * 1000, return_dict=False)[0]

    base = velocity()
    pipe.load_lora_weights(tmp_path / "out/nft+stitchvm")
    assert_close(velocity(), found["average"], rtol=0, atol=1e-4)
    assert (velocity() - base).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert_close(velocity(), base)
    PeftModel.from_pretrained(pipe.transformer, tmp_path / "out/nft+stitchvm")  # puts it in place
    assert_close(velocity(), found["average"], rtol=0, atol=1e-4)


def test_a_later_stop_costs_more(run, tmp_path):
    """Each window from zero and with the same prompts; a stop at the end is at clean latents."""
    flags = ("--methods", "nft+stitchvm", "--updates", 1, "--train-times", 4, "--stop")
    early = run(*flags, 1, 2, out=tmp_path / "early")
    late = run(*flags, 5, 5, out=tmp_path / "late")
    assert (
        early["config"]["stop"] == [1, 2]
        and early["rows"][0]["reward"] == late["rows"][0]["reward"]
    )
    assert early["rows"][1]["gflop"] < late["rows"][1]["gflop"]
    assert lora_in(tmp_path / "early/nft+stitchvm") and lora_in(tmp_path / "late/nft+stitchvm")


def test_a_budget_ends_a_method(run):
    table = run("--updates", 50, "--gflop", 1e-3)
    assert [r["update"] for r in table["rows"]] == [0, 1, 0, 1]


def test_paper_form_runs(run):
    """It has no penalty."""
    table = run("--updates", 1, "--loss", "paper", "--methods", "nft", "--eta", 0.5)
    assert table["config"]["kl"] == 0
    assert table["curve"][0]["penalty"] == 0 and table["curve"][0]["eta"] == 0.5


@pytest.mark.parametrize("backbone", ["sd3.5-medium", "flux"])
def test_the_noise_levels_of_a_run(run, backbone):
    """On either transformer: without shift in the miniature, with another where a flag says so; the
    rollouts and the evaluation use them."""
    flags = ("--backbone", backbone, "--methods", "nft", "--updates", 1)
    last = 0.2 if backbone == "flux" else 0.001
    even = torch.cat([torch.linspace(1, last, 5, dtype=torch.float64), torch.zeros(1)])
    table, other = run(*flags), run(*flags, "--shift", 3)
    assert table["grid"] == pytest.approx(even.tolist(), abs=1e-6)
    shifted = (3 * even / (1 + 2 * even))[1:4].tolist()
    assert other["grid"][1:4] == pytest.approx(shifted, abs=2e-3) and other["grid"][0] == 1
    assert other["curve"][0]["rollouts"] != table["curve"][0]["rollouts"]
    assert other["rows"][0]["reward"] != table["rows"][0]["reward"]


def test_a_nan_stops_and_keeps_the_last_good_state(run, tmp_path, monkeypatch):
    """One sentence; what is left is the state before the bad update, from which a run without the
    fault ends as one that never had it."""
    flags = ("--updates", 3, "--methods", "nft+stitchvm")
    good, calls = nft.optimality, []

    def broken(r, clip):
        calls.append(1)
        return good(r, clip) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(nft, "optimality", broken)
    sentence = "update 3 of nft.stitchvm gave NaN, inf or weights above 100; the last good state is"
    with pytest.raises(SystemExit, match=f"^error: {sentence} .*08_nft.train") as e:
        run(*flags)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out/nft+stitchvm/pytorch_lora_weights.safetensors").exists()
    monkeypatch.setattr(nft, "optimality", good)
    table = run(*flags, "--resume")
    run(*flags, out=tmp_path / "whole")
    assert [r["update"] for r in table["curve"]] == [1, 2, 3]
    assert same(*(lora_in(d / "nft+stitchvm") for d in (tmp_path / "out", tmp_path / "whole")))


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_last_step_that_ruins_the_weights_writes_nothing(run, tmp_path, lr):
    """Too large, or so large that a sample is NaN."""
    with pytest.raises(SystemExit, match="^error: update 1 of nft gave NaN, inf or weights") as e:
        run("--updates", 1, "--methods", "nft", "--lr", lr)
    assert "\n" not in str(e.value) and "the last good state is the base model" in str(e.value)
    assert [p.name for p in (tmp_path / "out").iterdir() if "prompts" not in p.name] == []


@pytest.mark.parametrize("edited", ["p.txt", "e.txt"])
def test_prompts_edited_in_place_are_refused(run, tmp_path, edited):
    """In the same file; one that was only moved is taken, and more updates are."""
    (tmp_path / "p.txt").write_text("a red circle\na ring\ntwo stars\n")
    (tmp_path / "e.txt").write_text("a blue ring\na star\n")
    flags = ["--methods", "nft"]
    files = ["--train-prompts", tmp_path / "p.txt", "--eval-prompts", tmp_path / "e.txt"]
    run(*flags, *files, "--updates", 1)
    last = files.index(tmp_path / edited)
    files[last] = (tmp_path / edited).rename(tmp_path / "moved.txt")
    table = run(*flags, *files, "--updates", 2, "--resume")
    assert [r["update"] for r in table["curve"]] == [1, 2]
    text = files[last].read_text()
    files[last].write_text(text.replace("star", "square"))
    key = "train_prompts" if edited == "p.txt" else "eval_prompts"
    with pytest.raises(SystemExit, match=rf"(?s)does not fit this run.*\n  {key} ") as e:
        run(*flags, *files, "--updates", 2, "--resume")
    assert str(e.value).count("_prompts ") == 1


def test_a_state_is_thrown_away_only_where_a_flag_says_so(run, tmp_path):
    """Whether its run has ended or not, and before anything is loaded."""
    state = tmp_path / "out/nft/08_nft.train"
    state.parent.mkdir(parents=True)
    state.touch()
    with pytest.raises(SystemExit, match="08_nft.train.*--resume.*--restart") as e:
        run("--methods", "nft", "--reward", "nothing", anew=False)
    assert "\n" not in str(e.value) and state.read_bytes() == b""
    run("--methods", "nft", "--updates", 1)
    assert torch.load(state, weights_only=True)["data"]["update"] == 1


MISUSE = [
    (["--images", "1"], "--images: 1 does not lie between 2 and inf"),
    (["--stop", "12", "30"], "--stop 12 30 must lie in order"),
    (["--stop", "3", "2"], "--stop 3 2 must lie in order"),
    (["--stop", "0", "2"], "--stop: 0 does not lie between 1 and 2,147,483,648"),
    (["--updates", "0"], "--updates: 0 does not lie between 1 and 2,147,483,648"),
    (
        ["--value", "nowhere.pt"],
        "there is no value model of clip: nowhere.pt does not exist.*03_finetune.py --reward clip",
    ),
    (["--reward", "clip+hpsv2"], "1 files for the 2 rewards"),
    (["--train-prompts", "nowhere.txt"], "no file of prompts nowhere.txt"),
    (["--eval-limit", "1"], "1 held out"),
    (["--prompts", "7"], "6 prompts to train on"),
    (["--preset", "24gb"], "--train-prompts FILE and --eval-prompts FILE are needed"),
    (["--resume"], "08_nft.train does not exist"),
]


@pytest.mark.parametrize("flags, message", MISUSE, ids=[" ".join(flags) for flags, _ in MISUSE])
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def without_seconds(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def test_killed_and_resumed_gives_the_same_bits(run, tmp_path, values, one_thread):
    """Adapters, optimiser and draws: the run that was killed between two updates ends as the one
    that was not, also in its table. A file of other flags is refused."""
    flags = ("--updates", 4, "--methods", "nft+stitchvm")
    killed = tmp_path / "killed"
    running = killed / "nft+stitchvm/08_nft.train"
    given = (*SHORT, "--out", killed, "--value", values["clip"], *flags)
    process = children.start("08_nft", *given)
    while not running.exists() or torch.load(running, weights_only=True)["data"]["update"] < 1:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "nft+stitchvm/pytorch_lora_weights.safetensors").exists()
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*lr"):
        run(*flags, "--resume", "--lr", 0.5, out=killed)
    resumed, whole = run(*flags, "--resume", out=killed), run(*flags, out=tmp_path / "whole")
    assert same(*(lora_in(d / "nft+stitchvm") for d in (killed, tmp_path / "whole")))
    assert without_seconds(resumed["curve"]) == without_seconds(whole["curve"])
    assert resumed["rewards_of_prompts"] == whole["rewards_of_prompts"]


def test_a_finished_method_is_not_trained_again(run, called, tmp_path, monkeypatch):
    """--resume takes its rows as they are and starts the method that has no file; the table is that
    of one run of both. The blocks are compiled where a flag says so."""
    compiled = []
    run("--updates", 1, "--methods", "nft")
    trained = called["trained"]
    resumed = run("--updates", 1, "--resume")
    assert called["trained"] - trained == 1 + 2 * 4  # what it costs, and the other method
    whole = run("--updates", 1, out=tmp_path / "whole")
    for key in ("rows", "curve"):
        assert without_seconds(resumed[key]) == without_seconds(whole[key])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    again = run("--updates", 1, "--resume", "--batch", 2, "--compile")  # neither matters to it
    assert again["rows"] == resumed["rows"] and again["curve"] == resumed["curve"]
    assert len(compiled) == 8


def test_two_processes_do_what_one_does(run, tmp_path, values):
    """They share the prompts: the same rewards, spread and gradient, so the same LoRA and the same
    table, up to rounding."""
    flags = ("--updates", 1, "--methods", "nft+stitchvm")
    given = (*SHORT, "--out", tmp_path / "two", "--value", values["clip"], *flags)
    children.run_two("08_nft", *given)
    one = run(*flags, out=tmp_path / "one")
    two = json.loads((tmp_path / "two/08_nft.json").read_text())
    for key in ("rows", "curve"):
        for a, b in zip(one[key], two[key], strict=True):
            numbers = {k: v for k, v in a.items() if isinstance(v, (int, float)) and k != "seconds"}
            assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=1e-2, abs=1e-3)
    trained = []
    for folder in ("one", "two"):
        found = sorted(lora_in(tmp_path / folder / "nft+stitchvm").items())
        trained.append(torch.cat([v.flatten() for k, v in found if "lora_B" in k]))
    assert (trained[0] - trained[1]).norm() < 0.05 * trained[0].norm()
