"""Stage 07: gradients of truncated rollouts against hand-written ones, a value that stays where it is, laws and budgets, and short runs as a user runs them."""
import argparse
import copy
import importlib
import json
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import children
import common
from test_common import NULL, small_sd3, small_value, two_rewards

draft = importlib.import_module("07_draft")
ROOT = Path(__file__).resolve().parents[1]
GRID = [1.0, 0.9, 0.75, 0.5, 0.2, 0.0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- a rollout whose gradient is known: u_theta = theta, u = 0, score linear
@pytest.mark.parametrize("stop, keep", [(5, 1), (5, 3), (5, 5), (3, 1), (3, 3), (4, 2)])
def test_linear_rollout_in_closed_form(stop, keep):
    """z_tau = z - (1 - tau) theta, of which the kept steps carry t_first - tau; with lam |theta|^2 / n the gradient is known, and so is its zero."""
    theta, g, z, lam = torch.randn(1, 6).double().requires_grad_(), torch.randn(6).double(), torch.randn(4, 6).double(), 0.3
    carried = GRID[stop - keep] - GRID[stop]
    functions = lambda z, sigma: theta.expand_as(z), lambda z, sigma: torch.zeros_like(z), lambda z, sigma: z @ g
    loss, value, distance = draft.draft_loss(*functions, z, GRID, stop, keep, lam)
    assert_close(value, ((z - (1 - GRID[stop]) * theta) @ g).mean().detach())
    assert_close(distance, theta.square().mean().detach())
    assert_close(torch.autograd.grad(loss, theta)[0][0], carried * g + lam * 2 * theta[0].detach() / 6)
    with torch.no_grad():
        theta.copy_(-carried * 6 / (2 * lam) * g)
    assert torch.autograd.grad(draft.draft_loss(*functions, z, GRID, stop, keep, lam)[0], theta)[0].abs().max() < 1e-12


def test_rollout_is_the_schedulers(seed):
    """As diffusers' Euler scheduler steps, whatever is kept; the kept steps' latents are those of the whole path."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = common.sigma_grid(scheduler, 10, 16).tolist()
    z, velocity = torch.randn(3, 4), lambda z, sigma: torch.sin(z * (1 + sigma[:, None]))
    x, path = z, []
    for t in scheduler.timesteps:
        path.append(x)
        x = scheduler.step(velocity(x, (t / 1000).expand(3)), t, x).prev_sample
    for stop, keep in ((10, 1), (10, 10), (7, 3), (3, 3)):
        end, kept = draft.rollout(velocity, z, grid, stop, keep)
        assert_close(end, path[stop] if stop < 10 else x, atol=1e-5, rtol=0)
        assert [float(s[0]) for _, s, _ in kept] == pytest.approx(grid[stop - keep:stop])
        for (zk, _, _), expected in zip(kept, path[stop - keep:]):
            assert_close(zk, expected, atol=1e-5, rtol=0)


def test_another_shift():
    """Without a shift diffusers' grid is even down to its smallest level; the pipeline's own 3 stays where no flag says otherwise."""
    backbone = common.Backbone("sd3.5-medium")
    own = backbone.grid(10, torch.empty(1, 16, 8, 8))
    backbone.set_shift(1.0)
    assert_close(backbone.grid(10, torch.empty(1, 16, 8, 8)), torch.cat([torch.linspace(1, 0.001, 10), torch.zeros(1)]), atol=1e-6, rtol=0)
    assert own[5] == pytest.approx(0.7073, abs=1e-3)
    flux = common.Backbone("flux")
    flux.set_shift(1.0)
    assert_close(flux.grid(10, torch.empty(1, 16, 8, 8)), backbone.grid(10, torch.empty(1, 16, 8, 8)))


def test_noise_levels():
    """The two readings of "10 steps, shift 3"."""
    backbone = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    backbone.grid = lambda steps, z: common.sigma_grid(backbone.scheduler, steps, 16)
    of = lambda grid: draft.noise_levels(argparse.Namespace(grid=grid, steps=10), backbone, (16, 8, 8))
    assert of("scheduler") == pytest.approx([1, .9601, .9133, .8577, .7904, .7073, .6022, .4649, .2780, .0089, 0], abs=1e-4)
    backbone.scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    assert of("even") == pytest.approx(backbone.scheduler.sigmas.tolist(), abs=1e-6) and of("even")[9] == pytest.approx(0.25)


# ---------------------------------------------------------------------------- the real thing, small
@pytest.fixture
def base():
    return small_sd3()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return two_rewards(tmp_path_factory)


def decode(z):
    """A stand-in for the VAE: smooth, and it mixes neighbours."""
    return torch.sigmoid(F.avg_pool2d(F.interpolate(z[:, :3], scale_factor=8), 5, 1, 2))


def batch(n=2):
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=g)
    return random(n, 16, 10, 6), [random(n, 5, 24), random(n, 20)], [F.normalize(random(n, 64), dim=-1) for _ in range(2)]


def shake(parameters, scale=0.2):
    with torch.no_grad():
        for p in parameters:
            p += scale * torch.randn_like(p)


def library(transformer, condition):
    return lambda z, sigma: transformer(z, *condition, sigma * 1000, return_dict=False)[0]


def gradients(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


KINDS = ["clean", "stitchvm"]


def setting(base, rewards, kind, depths=(2, 3), checkpointing=False):
    """LoRA's parameters, the stage's functions, and references built from an untouched copy of the base model: (u, V or r) without the stage's code."""
    z, condition, texts = batch()
    untouched = copy.deepcopy(base)
    values = [small_value(base, r, i) for r, i in zip(rewards, depths)] if kind == "stitchvm" else []
    common.own_prefixes(values)
    parameters = common.add_lora(base, 4, 8)
    functions = draft.step_functions(SimpleNamespace(transformer=base, decode=decode, velocity=partial(common.velocity, base)), rewards, values, condition, texts, checkpointing)
    if values:
        alone = [small_value(untouched, r, i) for r, i in zip(rewards, depths)]
        score = lambda z, t: sum(v(z, torch.full((2,), t), text) for v, text in zip(alone, texts))
    else:
        embed = lambda r, x: F.normalize(r.model.encode_image(r.normalise(r.resize(x))), dim=-1)
        score = lambda z, t: sum((embed(r, decode(z)) * text).sum(-1) for r, text in zip(rewards, texts))
    return parameters, functions, z, library(base, condition), library(untouched, condition), score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop, keep", [(3, 1), (5, 2), (3, 3)])
def test_gradient_is_the_hand_written_one_of_the_kept_steps(base, rewards, kind, stop, keep):
    """The steps before are replaced by their result; the LoRA's gradient, regulariser and all, is the same, not zero, and not that of one more kept step."""
    parameters, functions, z, u, u_base, score = setting(base, rewards, kind)
    shake(parameters)
    loss, value, distance = draft.draft_loss(*functions, z, GRID, stop, keep, 0.5)
    found = gradients(loss, parameters)
    x = z
    with torch.no_grad():
        for t, t_next in zip(GRID[:stop - keep], GRID[1:]):
            x = x + (t_next - t) * u(x, torch.full((2,), t))
    x, far = x.clone(), []
    for k in range(stop - keep, stop):
        sigma = torch.full((2,), GRID[k])
        far.append((u(x, sigma) - u_base(x.detach(), sigma).detach()).square().mean())
        x = x + (GRID[k + 1] - GRID[k]) * u(x, sigma)
    expected_value = score(x, GRID[stop]).mean()
    assert_close(value, expected_value.detach(), atol=1e-5, rtol=1e-4)
    assert_close(distance, (sum(far) / keep).detach(), atol=1e-6, rtol=1e-4)
    expected = gradients(0.5 * sum(far) / keep - expected_value, parameters)
    assert found.norm() > 1e-4
    assert_close(found, expected, atol=2e-4 * float(expected.norm()), rtol=1e-3)
    if keep < stop:
        other = gradients(draft.draft_loss(*functions, z, GRID, stop, keep + 1, 0.5)[0], parameters)
        assert (other - found).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_step_by_the_chain_rule(base, rewards, kind):
    """K = 1: the vector-Jacobian product of the step's velocity with -d grad(score) / B, and it is what a step of size d has."""
    parameters, functions, z, u, _, score = setting(base, rewards, kind)
    shake(parameters)
    loss, *_ = draft.draft_loss(*functions, z, GRID, 3, 1, 0.0)
    found = gradients(loss, parameters)
    end, _ = draft.rollout(torch.no_grad()(functions[0]), z, GRID, 3, 1)
    x = end.clone().requires_grad_()
    slope, = torch.autograd.grad(score(x, GRID[3]).sum(), x)
    before, _ = draft.rollout(torch.no_grad()(functions[0]), z, GRID, 2, 1)
    d = GRID[2] - GRID[3]
    expected = gradients((u(before, torch.full((2,), GRID[2])) * d * slope / 2).sum(), parameters)
    assert_close(found, expected, atol=2e-4 * float(expected.norm()), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing_but_what_is_kept(base, rewards, kind):
    """With the regulariser, which turns the adapters off and on again: no gradient is lost, none is recomputed at other weights."""
    parameters, functions, z, *_ = setting(base, rewards, kind)
    shake(parameters)
    condition = batch()[1]
    again = partial(common.velocity, base, condition=condition, checkpointing=True), *functions[1:]
    kept, found = {}, {}
    for name, own in (("plain", functions), ("checkpointed", again)):
        with common.kept_for_backward([base]) as storages:
            draft.rollout(own[0], z, GRID, 4, 3)
        kept[name] = sum(s.nbytes() for s in storages.values())
        found[name] = gradients(draft.draft_loss(*own, z, GRID, 4, 3, 0.5)[0], parameters)
    assert_close(found["checkpointed"], found["plain"], atol=1e-6, rtol=1e-4)
    assert found["plain"].norm() > 1e-4 and kept["checkpointed"] < 0.4 * kept["plain"]


def test_the_value_stays_when_the_lora_moves(base, rewards):
    """It reads a copy of its own blocks; on the adapted transformer itself it would move. Nothing of it is trained, and gradient still reaches the latents."""
    z, _, texts = batch()
    sigma = torch.tensor([0.4, 0.8])
    values, naive = [small_value(base, r, i) for r, i in zip(rewards, (2, 3))], small_value(base, rewards[0], 2)
    common.own_prefixes(values)
    assert values[0].transformer is values[1].transformer and len(common.dit_blocks(values[0].transformer)) == 3 and len(common.dit_blocks(base)) == 4
    before, moved = common.joint_value(values, z, sigma, texts)[0], naive(z, sigma, texts[0])
    shake(common.add_lora(base, 4, 8))
    assert torch.equal(common.joint_value(values, z, sigma, texts)[0], before)
    assert (naive(z, sigma, texts[0]) - moved).abs().min() > 1e-4
    x = z.clone().requires_grad_()
    common.joint_value(values, x, sigma, texts)[0].sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for v in values for m in (v, v.transformer) for p in m.parameters())


def test_values_on_one_transformer_share_its_blocks(base, rewards):
    """The sum of each alone, and every block is run once, up to the larger i, in either order."""
    z, _, texts = batch()
    sigma = torch.tensor([0.4, 0.8])
    for depths in ((3, 1), (1, 3), (2, 2)):
        values, seen = [small_value(base, r, i) for r, i in zip(rewards, depths)], []
        hooks = [b.register_forward_hook(lambda *_, k=k: seen.append(k)) for k, b in enumerate(base.transformer_blocks)]
        total = common.joint_value(values, z, sigma, texts)[0]
        assert seen == list(range(max(depths)))
        [h.remove() for h in hooks]
        assert_close(total, sum(v(z, sigma, t) for v, t in zip(values, texts)), atol=1e-5, rtol=1e-5)


def test_the_regulariser_starts_at_zero(base, rewards):
    """A new LoRA is the base model to the bit: no distance, and no pull. Then it is the mean over the kept steps."""
    parameters, functions, z, *_ = setting(base, rewards, "clean")
    _, kept = draft.rollout(functions[0], z, GRID, 4, 3)
    distance = draft.distance_to_base(kept, functions[1])
    assert distance.item() == 0 and gradients(distance, parameters).abs().max() == 0
    assert gradients(draft.draft_loss(*functions, z, GRID, 4, 3, 0.5)[0], parameters).abs().max() > 0
    shake(parameters)
    _, kept = draft.rollout(functions[0], z, GRID, 4, 3)
    one = [draft.distance_to_base([k], functions[1]).item() for k in kept]
    assert min(one) > 0 and draft.distance_to_base(kept, functions[1]).item() == pytest.approx(sum(one) / 3, rel=1e-5)


def test_a_step_of_the_optimiser_raises_the_score(base, rewards):
    for kind in KINDS:
        parameters, functions, z, *_ = setting(copy.deepcopy(base), rewards, kind)
        optimizer, scores = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
        for _ in range(6):
            loss, value, _ = draft.draft_loss(*functions, z, GRID, 5 if kind == "clean" else 3, 2, 0.01)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            scores.append(float(value))
        assert scores[-1] > scores[1] > scores[0]


def test_the_cost_of_a_rollout_is_the_counted_one(base, rewards):
    """Put together from single steps, at several stops and K, with the regulariser, checkpointing and the value, or neither."""
    for kind, lam, checkpointing in (("stitchvm", 0.5, True), ("clean", 0.0, False)):
        _, (velocity, other, score), z, *_ = setting(copy.deepcopy(base), rewards, kind, checkpointing=checkpointing)
        steps, last = draft.steps_cost(common.gflop, velocity, other, z, lam), draft.gradient_cost(common.gflop, score, z.clone().requires_grad_())
        for stop, keep in ((5, 3), (2, 1)):
            assert steps(stop, keep) + last == pytest.approx(common.gflop(lambda: draft.draft_loss(velocity, other, score, z, GRID, stop, keep, lam)[0].backward()), rel=1e-9)


# ---------------------------------------------------------------------------- laws
def tally(n, *args):
    draw = torch.Generator().manual_seed(3)
    drawn = [draft.draw_rollout(*args, draw) for _ in range(n)]
    return {pair: drawn.count(pair) for pair in sorted(set(drawn))}


@pytest.mark.parametrize("args, expected", [((1, None, 10), [(10, 1)]), ((3, None, 10), [(10, 3)]), ((1, (3, 7), 10), [(k, 1) for k in range(3, 8)]),
                                            ((3, (3, 7), 10), [(k, 3) for k in range(3, 8)]), ((None, None, 10), [(10, k) for k in range(1, 10)])], ids=str)
def test_laws_of_stop_and_truncation(args, expected):
    """Uniform over exactly these: counts within four and a half standard errors; AlignProp keeps one step at least and never all."""
    n = 4000
    found, p = tally(n, *args), 1 / len(expected)
    assert list(found) == expected
    assert all(abs(c - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5 for c in found.values())


def test_average_of_the_weights():
    """Decay by hand: 1/10, 2/11, ... up to what is asked for; and none."""
    assert [common.decay_at(k, 0.9) for k in (0, 1, 8, 79, 80, 1000)] == pytest.approx([0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9])
    assert common.decay_at(50, 0.0) == 0
    average = torch.zeros(())
    for k, w in enumerate((3.0, 5.0)):
        common.follow([average], [torch.tensor(w)], common.decay_at(k, 0.9))
    assert float(average) == pytest.approx(2 / 11 * (0.9 * 3) + 9 / 11 * 5)


def test_work_saved():
    row = lambda method, gflop, reward: dict(method=method, gflop=gflop, reward=reward)
    rows = [row("draft-1", 0, 0.5), row("draft-1", 100, 0.7), row("draft-1+stitchvm", 0, 0.5), row("draft-1+stitchvm", 40, 0.6), row("draft-1+stitchvm", 80, 0.8),
            row("draft-3", 0, 0.5), row("draft-3", 100, 0.9), row("draft-3+stitchvm", 0, 0.5), row("draft-3+stitchvm", 90, 0.8), row("draft-2+stitchvm", 0, 0.5)]
    one, three = common.work_saved(rows)
    assert one == dict(method="draft-1+stitchvm", baseline="draft-1", reward=0.7, gflop=pytest.approx(60), share=pytest.approx(0.6))
    assert three["gflop"] is three["share"] is None
    worse, = common.work_saved([row("draft-1", 0, 0.5), row("draft-1", 100, 0.49), row("draft-1+stitchvm", 0, 0.5), row("draft-1+stitchvm", 40, 0.7)])
    assert (worse["gflop"], worse["share"]) == (0.0, None)
    noisy, = common.work_saved([row("draft-1", 0, 0.5), row("draft-1", 50, 0.7), row("draft-1", 100, 0.6), row("draft-1+stitchvm", 0, 0.5), row("draft-1+stitchvm", 20, 0.6)])
    assert noisy["share"] == pytest.approx(20 / 25)  # of the work at which the baseline first had .6, not of all of it
    assert [common.how_reached(r) for r in (one, three, worse)] == ["after 60% of its work", "not reached", "no higher than the base model's"]
    window, = common.work_saved([dict(r, run=r["method"] + "_2-12" * ("+" in r["method"])) for r in rows[:5]], "run")
    assert window["run"] == "draft-1+stitchvm_2-12" and window["gflop"] == pytest.approx(60)


# ---------------------------------------------------------------------------- LoRA and evaluation, in common
def test_add_lora(base):
    """The eight projections of every block, the second attention included; zero at the start, float32 also on half precision, all else frozen."""
    half = copy.deepcopy(base).bfloat16()
    parameters = common.add_lora(half, 4, 8)
    names = [n for n, p in half.named_parameters() if p.requires_grad]
    assert len(parameters) == len(names) == 2 * (8 * 4 - 1 + 4 * 2) and all(".lora_" in n for n in names)  # the last block has no to_add_out
    assert all(p.dtype == torch.float32 for p in parameters) and next(half.parameters()).dtype == torch.bfloat16
    assert all(not p.any() for n, p in half.named_parameters() if "lora_B" in n)
    assert {m.scaling["default"] for m in half.modules() if hasattr(m, "scaling")} == {2.0}
    z, condition, _ = batch()
    u = common.velocity(half, z, torch.full((2,), 0.5), condition)
    assert u.dtype == z.dtype and torch.isfinite(u).all()


def test_without_lora(base):
    """The base model inside, to the bit, the adapted one outside, and its gradients are all there again."""
    z, condition, _ = batch()
    sigma, untouched = torch.full((2,), 0.5), copy.deepcopy(base)
    parameters = common.add_lora(base, 4, 8)
    shake(parameters)
    with torch.no_grad():
        with common.without_lora(base):
            assert torch.equal(library(base, condition)(z, sigma), library(untouched, condition)(z, sigma))
        assert (library(base, condition)(z, sigma) - library(untouched, condition)(z, sigma)).abs().max() > 1e-3
    assert all(p.requires_grad for p in parameters)
    library(base, condition)(z, sigma).sum().backward()
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("i", [0, 2, 4])
def test_frozen_prefix(base, i):
    z, _, _ = batch()
    sigma = torch.full((2,), 0.5)
    prefix = common.frozen_prefix(base, i)
    run = lambda t: common.run_blocks(t, common.begin(t, z, sigma, *[v.expand(2, *v.shape[1:]) for v in NULL]), i)
    assert torch.equal(run(prefix)["h"], run(base)["h"]) and len(common.dit_blocks(prefix)) == i and len(common.dit_blocks(base)) == 4
    assert base.norm_out is not None and prefix.norm_out is None
    own = {p.data_ptr() for b in prefix.transformer_blocks for p in b.parameters()}
    assert not own & {p.data_ptr() for p in base.parameters()}


def test_swapped():
    a = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(RuntimeError):
        with common.swapped(a, [torch.full((2,), 5.0), torch.full((3,), 6.0)]):
            assert a[0].tolist() == [5, 5] and a[1].tolist() == [6, 6, 6]
            raise RuntimeError
    assert a[0].tolist() == [1, 1] and a[1].tolist() == [0, 0, 0]


def test_coco_captions_are_prompts(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(dict(images=[], annotations=[dict(id=0, image_id=0, caption="a red circle"), dict(id=1, image_id=0, caption="a ring")])))
    assert common.load_prompts(tmp_path / "c.json") == [{"prompt": "a red circle"}, {"prompt": "a ring"}]
    (tmp_path / "d.json").write_text(json.dumps(dict(images=[])))
    with pytest.raises(SystemExit, match="is no list of prompts"):
        common.load_prompts(tmp_path / "d.json")


def test_evaluate_keeps_noise_and_prompt_together(monkeypatch):
    """Whatever the batch; a sample that overflows counts as NaN, not as an image; the only reward has no second column."""
    backbone = SimpleNamespace(device=torch.device("cpu"), velocity=lambda z, sigma, c: z - c[0][:, :, None, None], decode=lambda z: z[:, :3].sigmoid())
    reward = SimpleNamespace(name="a", uses_text=True, encode_text=lambda prompts: torch.tensor([float(p) for p in prompts]), embed=lambda x: (x.flatten(1), None),
                             score=lambda e, text: text + e.sum(1))
    monkeypatch.setattr(common, "load_scorers", lambda *a: {"a": None, "mean": lambda x, p: x.mean((1, 2, 3)) + torch.tensor([float(v) for v in p])})
    noise, condition = torch.randn(5, 3, 4, 4), [torch.arange(5.0)[:, None].expand(5, 3), torch.zeros(5, 1)]
    run = lambda size: common.evaluate(backbone, [reward], "mini", list("01234"), condition, noise, [1.0, 0.5, 0.0], size)
    images, scores = run(2)
    assert torch.equal(images, run(5)[0]) and images.dtype == torch.uint8 and images.shape == (5, 3, 4, 4) and list(scores) == ["reward", "mean"]
    x = noise.clone()
    for _ in range(2):
        x = x - 0.5 * (x - condition[0][:, :, None, None])
    assert_close(scores["mean"], x.sigmoid().mean((1, 2, 3)) + torch.arange(5.0), atol=2e-3, rtol=0)
    assert_close(scores["reward"], F.normalize(x.sigmoid().flatten(1), dim=1).sum(1) + torch.arange(5.0), atol=2e-2, rtol=0)
    noise[3] = float("inf")
    assert run(2)[1]["mean"].isnan().tolist() == [False, False, False, True, False]


def test_prompts_to_evaluate_on_are_not_trained_on(tmp_path):
    """Also where one file holds both; a prompt that is there twice counts once."""
    (tmp_path / "p.txt").write_text("\n".join(["a red circle", "a blue ring", "a red circle", "two stars", "a ring"]))
    (tmp_path / "e.txt").write_text("a blue ring\na ring\n")
    pool, held_out = common.split_prompts(draft.parse_args(["--train-prompts", f"{tmp_path}/p.txt", "--eval-prompts", f"{tmp_path}/e.txt"]))
    assert sorted(pool) == ["a red circle", "two stars"] and held_out == ["a blue ring", "a ring"]


# ---------------------------------------------------------------------------- published sizes
def test_dry_run_of_a_shallow_model(capsys, monkeypatch):
    """The value costs less than decoder and reward, checkpointing adds a pass for each kept step and takes memory away."""
    name, config, *rest = common.CONFIGS["sd3.5-medium"]
    monkeypatch.setitem(common.CONFIGS, "sd3.5-medium", (name, config | dict(num_layers=4, dual_attention_layers=(0, 1)), *rest))
    draft.main(draft.parse_args(["--dry-run", "--reward", "hpsv2"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = {c["method"]: c for c in report["cases"]}
    assert (report["stage"], report["resolution"]) == ("07_draft", 512) and all(c["unit"] == "sample" and c["n"] == 500 * 64 for c in cases.values())
    of = lambda key, k, c="": cases[f"draft-{k}{c}"][key]
    added = of("tflop", 1, ", checkpointing") - of("tflop", 1)
    assert of("tflop", 3, ", checkpointing") - of("tflop", 3) == pytest.approx(3 * added) and 0 < 2 * added < of("tflop", 3) - of("tflop", 1)
    for checkpointing in ("", ", checkpointing"):
        for key in ("tflop", "saved_gib"):
            assert all(of(key, k, f"+stitchvm, i = 4{checkpointing}") < of(key, k, checkpointing) for k in (1, 3))
    assert of("saved_gib", 3, "+stitchvm, i = 4, checkpointing") < 0.6 * of("saved_gib", 3, "+stitchvm, i = 4")
    assert "alignprop, checkpointing" in cases and "alignprop" not in cases


@pytest.mark.slow
def test_dry_run_counts_the_published_step(capsys):
    """SD 3.5 Medium at 512 with DFN-CLIP and HPSv2, TFLOP a sample, as counted apart from this code."""
    draft.main(draft.parse_args(["--dry-run", "--reward", "dfn-clip+hpsv2"]))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = {c["method"]: c for c in report["cases"]}
    stitchvm = lambda k, i, c="": f"draft-{k}+stitchvm, i = {i}{c}"
    expected = {"draft-1": 38.2, "draft-3": 49.1, stitchvm(1, 4): 21.7, stitchvm(1, 12): 23.8, stitchvm(3, 4): 32.7, stitchvm(3, 12): 34.7, "draft-1, checkpointing": 40.7,
                "draft-3, checkpointing": 56.6, stitchvm(1, 4, ", checkpointing"): 24.2, stitchvm(3, 4, ", checkpointing"): 40.1}
    assert {k: cases[k]["tflop"] for k in expected} == pytest.approx(expected, rel=0.02)
    assert cases["alignprop, checkpointing"]["tflop"] > cases["draft-3, checkpointing"]["tflop"]
    assert cases[stitchvm(3, 4, ", checkpointing")]["saved_gib"] < 0.4 * cases[stitchvm(3, 4)]["saved_gib"] < 0.4 * cases["draft-3"]["saved_gib"]


# ---------------------------------------------------------------------------- as a user runs it, on the miniature with untrained value models
SHORT = ["--device", "cpu", "--batch", 2, "--train-limit", 8, "--eval-limit", 3, "--eval-steps", 2, "--updates", 2, "--eval-every", 9, "--save-every", 1, "--stop", 2, 3, "--methods", "draft-1+stitchvm"]


def arguments(*flags):
    return [str(f) for f in (*SHORT, *flags)]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the stage in a folder of its own: the table that it writes, and what it prints. Unless `all` scorers are asked for, the reward alone judges the held-out images."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the prompts are there, but not the value models that somebody may have in runs/
    monkeypatch.chdir(tmp_path)
    load = common.load_scorers

    def go(*flags, out=tmp_path / "out", all=False):
        monkeypatch.setattr(common, "load_scorers", load if all else lambda *a: {})
        draft.main(draft.parse_args(arguments("--out", out, *flags)))
        return json.loads((out / "07_draft.json").read_text()), capsys.readouterr().out
    return go


def lora(out, method):
    return load_file(out / method / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("backbone", ["sd3.5-medium", "flux"])
def test_the_noise_levels_of_a_run(run, backbone):
    """On either transformer: without shift in the miniature, with another where a flag says so; the rollouts and the evaluation use them."""
    flags, even = ("--backbone", backbone, "--methods", "draft-1", "--updates", 1), torch.linspace(1, 0.1, 10, dtype=torch.float64)
    table, shifted = run(*flags, "--grid", "even")[0], run(*flags, "--grid", "even", "--shift", 3)[0]
    assert table["grid"] == pytest.approx([*even.tolist(), 0], abs=1e-6) and shifted["grid"] == pytest.approx([*(3 * even / (1 + 2 * even)).tolist(), 0], abs=1e-6)
    assert run(*flags)[0]["grid"][1] == pytest.approx(0.889, abs=1e-6)
    assert shifted["rows"][1]["score"] != table["rows"][1]["score"] and shifted["rows"][0]["reward"] != table["rows"][0]["reward"]


def test_a_whole_short_run(run, values, tmp_path):
    """The promised keys, one evaluation of the base model for all, costs in the order that the method is about, files and figures."""
    methods = ("draft-1", "alignprop", "draft-1+stitchvm")
    table, printed = run("--methods", *methods, "--value", values["clip"], "--accumulate", 2, all=True)
    rows = table["rows"]
    assert [(r["method"], r["update"]) for r in rows] == [(m, k) for m in methods for k in (0, 2)]
    metrics = ("dfn-clip", "hpsv2", "aesthetic", "judge", "geneval")
    for r in rows:
        assert {"method", "update", "seconds", "gflop", "reward", "reward_se", "n", *metrics, *(f"{m}_se" for m in metrics)} <= set(r) and "clip" not in r and r["n"] == 3
        if r["update"] == 0:
            assert r["gflop"] == r["seconds"] == 0 and {k: v for k, v in r.items() if k != "method"} == {k: v for k, v in rows[0].items() if k != "method"}
        else:
            assert r["gflop"] > 0 and r["seconds"] > 0 and r["gradient"] > 0 and r["loss"] == pytest.approx(table["config"]["regularise"] * r["distance"] - r["score"], abs=1e-6)
    gflop = {r["method"]: r["gflop"] for r in rows if r["update"] == 2}
    assert gflop["draft-1+stitchvm"] < 0.6 * gflop["draft-1"] < 0.6 * gflop["alignprop"]
    assert len(table["grid"]) == 11 and len(table["values"]) == 1 and [len(v) for v in table["rewards_of_prompts"]] == [3] * 6
    assert {s["method"] for s in table["work_saved"]} == {"draft-1+stitchvm"}
    assert "2 prompts x 2 micro-batches x 1 processes = 4 samples an update" in printed and printed.count("update 0:") == 1
    out = tmp_path / "out"
    for name in ("07_curves", "07_grid"):
        assert Image.open(out / f"{name}.png").width > 300
    files = [lora(out, m) for m in methods]
    assert not (out / "07_draft.train").exists() and all(f.keys() == files[0].keys() for f in files)
    assert all(any(not torch.equal(files[0][k], f[k]) for k in f) for f in files[1:])


def test_a_joint_reward_and_a_budget_of_work(run, values):
    """The sum of the parts, whose columns stay; a method ends with the first update at which the work is spent; a new adapter is the base model."""
    table, _ = run("--reward", "clip+hpsv2", "--value", values["clip"], values["hpsv2"], "--methods", "draft-1+stitchvm", "--stop", 3, 3, "--updates", 50, "--gflop", 10, all=True)
    first, last = table["rows"]
    assert first["update"] == 0 and 10 <= last["gflop"] < 10 * last["update"] / (last["update"] - 1) and last["reward"] == pytest.approx(last["clip"] + last["hpsv2"], abs=1e-5)


def test_the_lora_loads_into_a_fresh_pipeline(tmp_path):
    """By pipe.load_lora_weights, with its alpha: the same velocity as the trained one's, and not the base model's."""
    backbone = common.Backbone("sd3.5-medium")
    plain = copy.deepcopy(backbone.transformer)
    shake(common.add_lora(backbone.transformer, 4, 16), 0.05)
    common.save_lora(backbone, tmp_path / "lora")
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone.source, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(tmp_path / "lora")
    z, sigma, null = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9]), common.encode_prompts(backbone, ["a red circle"])
    null = [v.expand(2, *v.shape[1:]) for v in null]
    with torch.no_grad():
        u, loaded, base = (library(t, null)(z, sigma) for t in (backbone.transformer, pipe.transformer, plain))
    assert_close(loaded, u, atol=1e-5, rtol=1e-4)
    assert (u - base).abs().max() > 0.05
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["pytorch_lora_weights.safetensors"]
    assert all(re.match(r"transformer\.transformer_blocks\.\d\.attn2?\.[a-z_.0]+\.lora_[AB]\.weight$", k) for k in lora(tmp_path, "lora"))


def test_killed_and_resumed_gives_the_same_bits(run, values, tmp_path, one_thread):
    """Killed between two updates: LoRA, average, optimiser and draws go on as if nothing had been, and so does the table."""
    flags, half, running = ("--methods", "draft-1+stitchvm", "--value", values["clip"], "--updates", 4), tmp_path / "half", tmp_path / "half/07_draft.train"
    process = children.start("07_draft", *SHORT, "--out", half, *flags)
    while not running.exists() or torch.load(running, weights_only=True)["data"]["update"] < 1:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (half / "07_draft.json").exists() and not (half / "draft-1+stitchvm").exists()
    whole, _ = run(*flags, out=tmp_path / "whole")
    resumed, printed = run(*flags, "--resume", out=half)  # with fewer scorers than what was killed
    assert "update 0" not in printed and "update 4" in printed
    same = lambda rows: [[r.get(k) for k in ("method", "update", "gflop", "reward", "loss", "score", "distance", "gradient")] for r in rows]
    assert same(resumed["rows"]) == same(whole["rows"]) and resumed["rewards_of_prompts"] == whole["rewards_of_prompts"]
    a, b = lora(half, "draft-1+stitchvm"), lora(tmp_path / "whole", "draft-1+stitchvm")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_are_one_with_twice_the_batch(run, values, tmp_path):
    """The same samples, so the same loss and the same work."""
    flags = ("--methods", "draft-1+stitchvm", "--value", values["clip"], "--accumulate", 2, "--eval-limit", 4)
    one, _ = run(*flags, "--batch", 4, out=tmp_path / "one")
    children.run_two("07_draft", *SHORT, "--out", tmp_path / "two", *flags)
    two = json.loads((tmp_path / "two/07_draft.json").read_text())
    for a, b in zip(one["rows"], two["rows"]):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-6) for k in ("update", "gflop", "reward", *(("loss", "score", "gradient") if a["update"] else ())))
    a, b = lora(tmp_path / "one", "draft-1+stitchvm"), lora(tmp_path / "two", "draft-1+stitchvm")
    assert all((a[k] - b[k]).norm() < 0.05 * a[k].norm() + 1e-5 for k in a)


def test_a_nan_stops_training_and_keeps_the_last_good_state(run, values, tmp_path):
    with pytest.raises(SystemExit, match="^error: the loss of draft-1.stitchvm became NaN or infinite in update 2; the last good state is .*07_draft.train") as e:
        run("--methods", "draft-1+stitchvm", "--value", values["clip"], "--lr", 1e30)
    saved = torch.load(tmp_path / "out/07_draft.train", weights_only=True)["data"]
    assert saved["update"] == 0 and all(v.isfinite().all() for v in saved["lora"]) and "\n" not in str(e.value)
    with pytest.raises(SystemExit, match="samples of draft-1.stitchvm became NaN or infinite by update 1"):
        run("--methods", "draft-1+stitchvm", "--value", values["clip"], "--lr", 1e30, "--ema", 0, "--eval-every", 1)
    assert not (tmp_path / "out/draft-1+stitchvm").exists()


def test_whole_rollouts_need_no_stop_window():
    args = draft.parse_args(["--steps", "5", "--methods", "draft-1", "alignprop"])
    assert draft.check(args) == {"draft-1": dict(keep=1, stops=None, checkpointing=False), "alignprop": dict(keep=None, stops=None, checkpointing=True)}


@pytest.mark.parametrize("flags, message", [
    (["--methods", "draft"], "there is no method draft: --methods takes draft-1,"),
    (["--methods", "draft-0"], "there is no method draft-0"),
    (["--methods", "draft-11"], "draft-11 keeps 11 steps of a rollout that has 10"),
    (["--methods", "draft-4+stitchvm"], "draft-4.stitchvm keeps 4 steps of a rollout that may stop after 2"),
    (["--reward", "dfn-clip"], "no value model of dfn-clip.*03_finetune.py --reward dfn-clip"),
    (["--reward", "clip+hpsv2", "--value", "one.pt"], "1 files for the 2 rewards"),
    (["--train-prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--train-prompts", "tests/mini/data/drawbench.txt", "--eval-limit", "300"], "0 prompts to train on and 200 held out"),
    (["--eval-limit", "1"], "1 held out"),
    (["--stop", "3", "11"], "--stop 3 11 must lie in order between 1 and --steps 10"),
    (["--batch", "0"], "--batch is 0, which is too small"),
    (["--preset", "24gb"], "--train-prompts FILE and --eval-prompts FILE are needed"),
    (["--methods", "draft-1", "--resume"], "07_draft.train does not exist; make it with: python 07_draft.py"),
    (["--reward", "nothing", "--methods", "draft-1"], "there is no nothing")], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def test_another_runs_state_is_refused(run, values, tmp_path):
    """A table of what is in the file and what was asked for."""
    running = tmp_path / "out/07_draft.train"
    running.parent.mkdir()
    torch.save(dict(format=1, spec=dict(lr=1.0, methods=["draft-1"]), provenance=dict(command="07_draft.py"), data={}), running)
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*lr .*1.0 .*0.0004"):
        run("--methods", "draft-1", "--resume", "--lr", 4e-4)
    running.write_bytes(running.read_bytes()[:400])
    with pytest.raises(SystemExit, match="cannot be read"):
        run("--methods", "draft-1", "--resume")
