"""Stage 07: gradients of truncated rollouts against hand-written ones, a value that stays where it
is, laws and budgets, and short runs as a user runs them."""

import argparse
import contextlib
import copy
import importlib
import json
import math
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import children
import diffusers
import price
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_common import NULL, small_sd3, small_value, two_rewards
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import common

draft = importlib.import_module("07_draft")
GRID = [1.0, 0.9, 0.75, 0.5, 0.2, 0.0]


class Asked(TorchDispatchMode):
    """How often a tensor's number is asked for, which on a GPU waits for all work under way."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- rollouts
@pytest.mark.parametrize("stop, keep", [(5, 1), (5, 3), (5, 5), (3, 1), (3, 3), (4, 2)])
def test_linear_rollout_in_closed_form(stop, keep):
    """u_theta = theta, u = 0, a linear score: z_tau = z - (1 - tau) theta, of which the last steps
    carry t_first - tau; with lam |theta|^2 / n the gradient is known, and so is its zero."""
    theta = torch.randn(1, 6).double().requires_grad_()
    g, z, lam = torch.randn(6).double(), torch.randn(4, 6).double(), 0.3
    carried = GRID[stop - keep] - GRID[stop]

    def loss_of(theta):
        return draft.draft_loss(
            lambda z, sigma: theta.expand_as(z),
            lambda z, sigma: torch.zeros_like(z),
            lambda z, sigma: z @ g,
            *(z, GRID, stop, keep, lam),
        )

    loss, value, distance = loss_of(theta)
    assert_close(value, ((z - (1 - GRID[stop]) * theta) @ g).mean().detach())
    assert_close(distance, theta.square().mean().detach())
    expected = carried * g + lam * 2 * theta[0].detach() / 6
    assert_close(torch.autograd.grad(loss, theta)[0][0], expected)
    with torch.no_grad():
        theta.copy_(-carried * 6 / (2 * lam) * g)
    assert torch.autograd.grad(loss_of(theta)[0], theta)[0].abs().max() < 1e-12


def test_rollout_is_the_schedulers():
    """As diffusers' Euler scheduler steps, whatever carries gradient; the latents of the steps that
    do are those of the whole path."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = common.sigma_grid(scheduler, 10, 16).tolist()

    def velocity(z, sigma):
        return torch.sin(z * (1 + sigma[:, None]))

    z = x = torch.randn(3, 4)
    path = []
    for t in scheduler.timesteps:
        path.append(x)
        x = scheduler.step(velocity(x, (t / 1000).expand(3)), t, x).prev_sample
    for stop, keep in ((10, 1), (10, 10), (7, 3), (3, 3)):
        end, steps = draft.rollout(velocity, z, grid, stop, keep)
        assert_close(end, path[stop] if stop < 10 else x, atol=1e-5, rtol=0)
        assert [float(s[0]) for _, s, _ in steps] == pytest.approx(grid[stop - keep : stop])
        for (z_k, _, _), expected in zip(steps, path[stop - keep : stop], strict=True):
            assert_close(z_k, expected, atol=1e-5, rtol=0)


def test_another_shift():
    """Without a shift diffusers' grid is even down to its smallest level, FLUX's down to 0; the
    pipeline's own 3 stays where no flag says otherwise."""
    backbone, flux = common.Backbone("sd3.5-medium"), common.Backbone("flux")
    assert backbone.grid(10, 64)[5] == pytest.approx(0.7073, abs=1e-3)
    for each in (backbone, flux):
        own = each.grid(10, 64)
        each.set_shift(None)
        assert each.grid(10, 64) == own
        each.set_shift(1.0)
    expected = [*torch.linspace(1, 0.001, 10).tolist(), 0]
    assert backbone.grid(10, 64) == pytest.approx(expected, abs=1e-6)
    assert flux.grid(10, 64) == pytest.approx([1 - k / 10 for k in range(11)], abs=1e-6)


def test_noise_levels():
    """The two readings of "10 steps, shift 3"."""
    backbone = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    backbone.grid = lambda steps, _: common.sigma_grid(backbone.scheduler, steps, 16).tolist()

    def levels(grid):
        args = argparse.Namespace(grid=grid, steps=10, resolution=64)
        return draft.noise_levels(backbone, args)

    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert levels("scheduler") == pytest.approx(expected, abs=1e-4)
    backbone.scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    assert levels("even") == pytest.approx(backbone.scheduler.sigmas.tolist(), abs=1e-6)
    assert levels("even")[9] == pytest.approx(0.25)


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
    """Noise, condition, texts of two rewards."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(n, 16, 10, 6, generator=g)
    condition = [torch.randn(n, *shape, generator=g) for shape in ((5, 24), (20,))]
    return z, condition, [F.normalize(torch.randn(n, 64, generator=g), dim=-1) for _ in range(2)]


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
    """LoRA's parameters, the stage's functions, and references built from an untouched copy of the
    base model: (u, V or r) without the stage's code."""
    z, condition, texts = batch()
    untouched = copy.deepcopy(base)
    pairs = list(zip(rewards, depths, strict=True))
    values = [small_value(base, r, i) for r, i in pairs] if kind == "stitchvm" else []
    draft.own_prefixes(values)
    parameters = draft.add_lora(base, 4, 8)
    velocity = partial(common.velocity, base)
    backbone = SimpleNamespace(transformer=base, decode=decode, velocity=velocity)
    given = backbone, rewards, values, condition, texts, checkpointing
    functions = draft.step_functions(*given)
    alone = [small_value(untouched, r, i) for r, i in pairs]

    def score(z, t):
        if values:
            sigma = torch.full((2,), t)
            return sum(v(z, sigma, text) for v, text in zip(alone, texts, strict=True))
        images = [r.visual(r.normalise(r.resize(decode(z)))) for r in rewards]
        pairs = zip(images, texts, strict=True)
        return sum((F.normalize(e, dim=-1) * text).sum(-1) for e, text in pairs)

    return parameters, functions, z, library(base, condition), library(untouched, condition), score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop, keep", [(3, 1), (5, 2), (3, 3)])
def test_gradient_is_the_hand_written_one(base, rewards, kind, stop, keep):
    """The steps before the last K are replaced by their result; the LoRA's gradient, regulariser
    and all, is the same, not zero, and not that of K + 1."""
    parameters, functions, z, u, u_base, score = setting(base, rewards, kind)
    shake(parameters)
    loss, value, distance = draft.draft_loss(*functions, z, GRID, stop, keep, 0.5)
    found = gradients(loss, parameters)
    x = z
    with torch.no_grad():
        for t, t_next in pairwise(GRID[: stop - keep + 1]):
            x = x + (t_next - t) * u(x, torch.full((2,), t))
    x = x.clone()
    far = []
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
        more = draft.draft_loss(*functions, z, GRID, stop, keep + 1, 0.5)[0]
        assert (gradients(more, parameters) - found).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_step_by_the_chain_rule(base, rewards, kind):
    """K = 1: the vector-Jacobian product of the step's velocity with -d grad(score) / B, and it is
    what a step of size d has."""
    parameters, functions, z, u, _, score = setting(base, rewards, kind)
    shake(parameters)
    loss, *_ = draft.draft_loss(*functions, z, GRID, 3, 1, 0.0)
    found = gradients(loss, parameters)
    frozen = torch.no_grad()(functions[0])
    end, _ = draft.rollout(frozen, z, GRID, 3, 1)
    x = end.clone().requires_grad_()
    slope = torch.autograd.grad(score(x, GRID[3]).sum(), x)[0]
    before, _ = draft.rollout(frozen, z, GRID, 2, 1)
    d = GRID[2] - GRID[3]
    along = (u(before, torch.full((2,), GRID[2])) * d * slope / 2).sum()
    expected = gradients(along, parameters)
    assert_close(found, expected, atol=2e-4 * float(expected.norm()), rtol=1e-3)


def saved_bytes(call, weights):
    """Of the storages that autograd keeps for call()'s backward pass, beside the weights'."""
    known = {p.untyped_storage()._cdata for p in weights}
    found = {}

    def save(x):
        found[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that none is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        call()
    return sum(s.nbytes() for key, s in found.items() if key not in known)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing_but_memory(base, rewards, kind):
    """With the regulariser, which turns the adapters off and on again: no gradient is lost, none is
    recomputed at other weights."""
    parameters, functions, z, *_ = setting(base, rewards, kind)
    shake(parameters)
    again = partial(common.velocity, base, condition=batch()[1], checkpointing=True)
    size, found = [], []
    for velocity in (functions[0], again):
        roll = partial(draft.rollout, velocity, z, GRID, 4, 3)
        size.append(saved_bytes(roll, base.parameters()))
        loss = draft.draft_loss(velocity, *functions[1:], z, GRID, 4, 3, 0.5)[0]
        found.append(gradients(loss, parameters))
    assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
    assert found[0].norm() > 1e-4 and size[1] < 0.4 * size[0]


def test_the_value_stays_when_the_lora_moves(base, rewards):
    """It reads a copy of its own, which takes no memory; on the adapted transformer itself it would
    move. Nothing of it is trained, and gradient still reaches the latents."""
    z, _, texts = batch()
    sigma = torch.tensor([0.4, 0.8])
    values = [small_value(base, r, i) for r, i in zip(rewards, (2, 3), strict=True)]
    naive = small_value(base, rewards[0], 2)
    draft.own_prefixes(values)
    prefix = values[0].transformer
    assert prefix is values[1].transformer is not base
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in prefix.parameters()} == shared
    before = common.joint_value(values, z, sigma, texts)[0]
    moved = naive(z, sigma, texts[0])
    shake(draft.add_lora(base, 4, 8))
    assert not any("lora" in name for name, _ in prefix.named_parameters())
    assert torch.equal(common.joint_value(values, z, sigma, texts)[0], before)
    assert (naive(z, sigma, texts[0]) - moved).abs().min() > 1e-4
    x = z.clone().requires_grad_()
    common.joint_value(values, x, sigma, texts)[0].sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for v in values for p in (*v.parameters(), *prefix.parameters()))


@pytest.mark.parametrize("i", [0, 2, 4])
def test_a_prefix_runs_as_the_model_does(base, rewards, i):
    """To the bit, up to any block, also when the model has got a LoRA."""
    z, _, _ = batch()
    null = [v.expand(2, *v.shape[1:]) for v in NULL]

    def run(transformer):
        state = common.begin(transformer, z, torch.full((2,), 0.5), *null)
        return common.run_blocks(transformer, state, i)["h"]

    expected = run(base)
    values = [small_value(base, rewards[0], 2)]
    draft.own_prefixes(values)
    shake(draft.add_lora(base, 4, 8))
    assert torch.equal(run(values[0].transformer), expected)
    assert torch.equal(run(base), expected) == (i == 0)


def test_values_on_one_transformer_share_its_blocks(base, rewards):
    """The sum of each alone, and every block is run once, up to the larger i, in either order."""
    z, _, texts = batch()
    sigma = torch.tensor([0.4, 0.8])
    for depths in ((3, 1), (1, 3), (2, 2)):
        values = [small_value(base, r, i) for r, i in zip(rewards, depths, strict=True)]
        seen = []
        hooks = [
            block.register_forward_hook(lambda *_, k=k, seen=seen: seen.append(k))
            for k, block in enumerate(base.transformer_blocks)
        ]
        total = common.joint_value(values, z, sigma, texts)[0]
        assert seen == list(range(max(depths)))
        for hook in hooks:
            hook.remove()
        alone = sum(v(z, sigma, t) for v, t in zip(values, texts, strict=True))
        assert_close(total, alone, atol=1e-5, rtol=1e-5)


def test_the_regulariser_starts_at_zero(base, rewards):
    """A new LoRA is the base model to the bit: no distance, and no pull. Then it is the mean over
    the steps that carry gradient."""
    parameters, functions, z, *_ = setting(base, rewards, "clean")
    _, steps = draft.rollout(functions[0], z, GRID, 4, 3)
    distance = draft.distance_to_base(steps, functions[1])
    assert distance.item() == 0 and gradients(distance, parameters).abs().max() == 0
    loss = draft.draft_loss(*functions, z, GRID, 4, 3, 0.5)[0]
    assert gradients(loss, parameters).abs().max() > 0
    shake(parameters)
    _, steps = draft.rollout(functions[0], z, GRID, 4, 3)
    one = [draft.distance_to_base([step], functions[1]).item() for step in steps]
    mean = draft.distance_to_base(steps, functions[1]).item()
    assert min(one) > 0 and mean == pytest.approx(sum(one) / 3, rel=1e-5)


def test_a_step_of_the_optimiser_raises_the_score(base, rewards):
    for kind in KINDS:
        parameters, functions, z, *_ = setting(copy.deepcopy(base), rewards, kind)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        scores = []
        for _ in range(6):
            stop = 5 if kind == "clean" else 3
            loss, value, _ = draft.draft_loss(*functions, z, GRID, stop, 2, 0.01)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scores.append(float(value))
        assert scores[-1] > scores[1] > scores[0]


@pytest.mark.parametrize(
    "stitched, lam, checkpointing, stop, keep", [(True, 0.5, True, 4, 2), (False, 0.0, False, 2, 1)]
)
def test_the_cost_of_a_rollout_is_the_counted_one(
    base, rewards, monkeypatch, stitched, lam, checkpointing, stop, keep
):
    """Put together from a step and a shortest rollout, with the regulariser, checkpointing and the
    value, or none of them."""
    z, condition, texts = batch(1)
    values = [small_value(base, r, 2) for r in rewards] if stitched else []
    draft.own_prefixes(values)
    draft.add_lora(base, 4, 8)
    backbone = SimpleNamespace(transformer=base, decode=decode)
    backbone.velocity = partial(common.velocity, base)
    given = backbone, rewards, values, condition, texts, checkpointing
    functions = draft.step_functions(*given)
    monkeypatch.setattr(draft, "chosen", lambda *_: functions)
    run = SimpleNamespace(shape=z.shape[1:], device=z.device, grid=GRID)
    step, rest = draft.costs(run, argparse.Namespace(regularise=lam), "", keep)

    def whole():
        draft.draft_loss(*functions, z, GRID, stop, keep, lam)[0].backward()

    assert (stop - keep) * step + rest == pytest.approx(common.gflop(whole), rel=1e-9)


# ---------------------------------------------------------------------------- laws
EVERY = [(10, k) for k in range(1, 10)]
LAWS = [
    ((1, (10, 10)), [(10, 1)]),
    ((3, (10, 10)), [(10, 3)]),
    ((1, (3, 7)), [(k, 1) for k in range(3, 8)]),
    ((3, (3, 7)), [(k, 3) for k in range(3, 8)]),
    ((None, (10, 10)), EVERY),
]


@pytest.mark.parametrize("args, expected", LAWS, ids=str)
def test_laws_of_stop_and_truncation(args, expected):
    """Uniform over exactly these: counts within four and a half standard errors; AlignProp keeps
    one step at least and never all."""
    n, p = 4000, 1 / len(expected)
    draw = torch.Generator().manual_seed(3)
    drawn = [draft.draw_rollout(*args, draw) for _ in range(n)]
    assert sorted(set(drawn)) == expected
    error = (n * p * (1 - p)) ** 0.5
    assert all(abs(drawn.count(pair) - n * p) <= 4.5 * error for pair in expected)


# ---------------------------------------------------------------------------- LoRA and evaluation
def test_add_lora(base):
    """The eight projections of every block, the second attention left out; zero at the start,
    float32 also on half precision, all else frozen."""
    half = copy.deepcopy(base).bfloat16()
    parameters = draft.add_lora(half, 4, 8)
    names = [n for n, p in half.named_parameters() if p.requires_grad]
    # the last block has no to_add_out
    assert len(parameters) == len(names) == 2 * (8 * 4 - 1)
    assert all(".lora_" in n and ".attn." in n for n in names)
    assert all(p.dtype == torch.float32 for p in parameters)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert all(not p.any() for n, p in half.named_parameters() if "lora_B" in n)
    assert {m.scaling["default"] for m in half.modules() if hasattr(m, "scaling")} == {2.0}
    z, condition, _ = batch()
    u = common.velocity(half, z, torch.full((2,), 0.5), condition)
    assert u.dtype == z.dtype and torch.isfinite(u).all()


@pytest.mark.parametrize(
    "name, count", [("sd3.5-medium", 191), ("sd3.5-large", 303), ("flux", 19 * 8 + 38 * 3)]
)
def test_adapted_modules_of_published_models(name, count):
    """Of SD 3.5 Medium as many as official DiffusionNFT adapts; FLUX's single blocks have three."""
    kind, config, *_ = price.CONFIGS[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, kind)(**config)
        assert len(draft.add_lora(transformer, 4, 8)) == 2 * count


def test_the_base_velocity_is_without_the_lora(base, rewards):
    """The base model to the bit, the adapted one before and after, also with a second adapter
    there, and its gradients are all there again."""
    parameters, (velocity, without, _), z, u, u_base, _ = setting(base, rewards, "clean")
    average = draft.add_lora(base, 4, 8, "average")
    base.set_adapter("default")
    shake([*parameters, *average])
    sigma = torch.full((2,), 0.5)
    with torch.no_grad():
        before = u(z, sigma)
        assert_close(without(z, sigma), u_base(z, sigma), atol=1e-5, rtol=1e-5)
        assert torch.equal(u(z, sigma), before)
        assert (before - u_base(z, sigma)).abs().max() > 1e-3
    assert all(p.requires_grad for p in parameters)
    assert not any(p.requires_grad for p in average)
    velocity(z, sigma).sum().backward()
    assert all(p.grad is not None for p in parameters)


def test_evaluate_keeps_noise_and_prompt_together():
    """Whatever the batch; a sample that overflows stops the run in one sentence. The device is
    asked once, at the end."""
    backbone = SimpleNamespace(device=torch.device("cpu"), decode=lambda z: z[:, :3].sigmoid())
    backbone.velocity = lambda z, sigma, c: z - c[0][:, :, None, None]
    condition = [torch.arange(5.0)[:, None].expand(5, 3), torch.zeros(5, 1)]
    noise = torch.randn(5, 3, 4, 4)
    run = partial(draft.evaluate, backbone, condition, noise, [1.0, 0.5, 0.0])
    with Asked() as asked:
        images = run(2)
    assert torch.equal(images, run(5)) and images.dtype == torch.uint8 and asked.count == 1
    x = noise.clone()
    for _ in range(2):
        x = x - 0.5 * (x - condition[0][:, :, None, None])
    assert_close(images / 255, x.sigmoid(), atol=2e-3, rtol=0)
    noise[3] = float("inf")
    with pytest.raises(SystemExit, match="^error: samples became NaN or infinite"):
        run(2)


@pytest.mark.parametrize("stage", ["07_draft", "08_nft"])
def test_prompts_to_evaluate_on_are_not_trained_on(tmp_path, monkeypatch, stage):
    """Also where one file holds both, in any spelling; a prompt that is there twice counts once.
    They are sorted once, for there may be a hundred thousand."""
    stage, calls = importlib.import_module(stage), []
    monkeypatch.setattr(stage, "sorted", lambda x: calls.append(1) or sorted(x), raising=False)
    prompts = ["a red circle", "a blue ring", "a red circle", "two stars", "a ring", "A  Blue ring"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    (tmp_path / "e.txt").write_text("a blue ring\na ring\n")
    flags = ["--train-prompts", f"{tmp_path}/p.txt", "--eval-prompts", f"{tmp_path}/e.txt"]
    pool, held_out = stage.split_prompts(stage.parse_args(flags))
    assert sorted(pool) == ["a red circle", "two stars"] and len(calls) == 1
    assert held_out == [{"prompt": "a blue ring"}, {"prompt": "a ring"}]


def test_coco_captions_are_prompts(tmp_path):
    captions = [dict(image_id=0, caption=c) for c in ("a red circle", "a ring")]
    (tmp_path / "c.json").write_text(json.dumps(dict(images=[], annotations=captions)))
    found = common.load_prompts(f"{tmp_path}/c.json")
    assert [r["prompt"] for r in found] == ["a red circle", "a ring"]
    (tmp_path / "d.json").write_text(json.dumps(dict(images=[])))
    with pytest.raises(SystemExit, match="is no list of prompts"):
        common.load_prompts(f"{tmp_path}/d.json")


# ---------------------------------------------------------------------------- as a user runs it
# on the miniature, with value models that were never trained
SHORT = ["--device", "cpu", "--batch", 2, "--train-limit", 8, "--eval-limit", 3, "--eval-steps", 2]
SHORT += ["--updates", 2, "--eval-every", 9, "--stop", 2, 3, "--methods", "draft-1+stitchvm"]
SHORT += ["--scorers"]  # the reward alone judges
SCORERS = ("aesthetic", "judge")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the stage in a folder of its own: the table that it writes, and what it prints."""
    # the prompts are there, but not the value models that somebody may have in runs/
    (tmp_path / "tests").symlink_to(common.ROOT / "tests")
    monkeypatch.chdir(tmp_path)

    def go(*flags, out=tmp_path / "out", anew=True):
        again = ("--restart",) if anew and "--resume" not in flags else ()
        draft.main(draft.parse_args([str(f) for f in (*SHORT, "--out", out, *flags, *again)]))
        return json.loads((out / "07_draft.json").read_text()), capsys.readouterr().out

    return go


def lora(out, method):
    return load_file(Path(out, method, "pytorch_lora_weights.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tracked(folder):
    """(step, reward, loss) of what a method's TensorBoard files hold, which have a picture each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    steps = {key: {e.step: e.value for e in found.Scalars(key)} for key in ("reward", "loss")}
    assert [e.step for e in found.Images("samples")] == list(steps["reward"])
    return [
        (k, pytest.approx(x), steps["loss"].get(k) and pytest.approx(steps["loss"][k], rel=1e-5))
        for k, x in steps["reward"].items()
    ]


def without_seconds(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """What the stage loads for draft-1, in a process of one or more."""
    monkeypatch.chdir(common.ROOT)

    def load(*flags, processes=1):
        given = [*SHORT, "--methods", "draft-1", "--out", tmp_path, *flags]
        args = draft.parse_args([str(f) for f in given])
        one = SimpleNamespace(num_processes=processes, process_index=processes - 1, print=print)
        one.is_main_process = processes == 1
        one.main_process_first = contextlib.nullcontext
        return draft.load(args, draft.check(args), one)

    return load


def test_checkpointing_covers_the_decoder(loaded):
    """The flag does: far less is kept of a decoding, and its gradient is the same; the presets of
    published size have it."""
    assert draft.PRESETS["paper"]["checkpointing"] and draft.PRESETS["24gb"]["checkpointing"]
    z, weight, size, found = torch.randn(2, 16, 8, 8), torch.randn(2, 3, 64, 64), [], []
    for flags in ((), ("--checkpointing",)):
        backbone = loaded(*flags).backbone
        x = z.clone().requires_grad_()
        size.append(saved_bytes(partial(backbone.decode, x), backbone.vae.parameters()))
        found.append(torch.autograd.grad((backbone.decode(x) * weight).sum(), x)[0])
    assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
    assert found[0].norm() > 1e-2 and size[1] < 0.4 * size[0]


def test_prompts_are_encoded_once_for_all_processes(loaded, monkeypatch, tmp_path):
    """The first writes a file, which the others read where it lies; a micro-batch too many or too
    few for some is refused."""
    first = loaded()
    files = [*tmp_path.glob("prompts_*.bin")]
    size = sum(v[0].nbytes for v in first.condition)
    assert [f.stat().st_size for f in files] == [(8 + 3) * size + 8]  # its own size last
    assert {v.device.type for v in first.condition} == {"cpu"}
    monkeypatch.setattr(common.Backbone, "encode_prompts", None)
    second = loaded("--accumulate", 2, processes=2)
    assert all(torch.equal(a, b) for a, b in zip(first.condition, second.condition, strict=True))
    with pytest.raises(SystemExit, match="^error: --accumulate 3 cannot be shared"):
        loaded("--accumulate", 3, processes=2)


def test_published_presets_train_on_all_prompts():
    paper, mini = (draft.parse_args(["--preset", name]) for name in ("paper", "mini"))
    assert paper.train_limit is None and mini.train_limit == 2000
    assert paper.batch * paper.accumulate == 128


def test_compile_is_asked_of_every_block(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    flags = ("--methods", "draft-1", "--updates", 1)
    plain, _ = run(*flags)
    assert not compiled
    table, _ = run(*flags, "--compile")
    assert len(compiled) == 8 and table["rewards_of_prompts"] == plain["rewards_of_prompts"]


@pytest.mark.parametrize("backbone", ["sd3.5-medium", "flux"])
def test_the_noise_levels_of_a_run(run, backbone):
    """On either transformer: without shift in the miniature, with another where a flag says so; the
    rollouts and the evaluation use them."""
    flags = ("--backbone", backbone, "--methods", "draft-1", "--updates", 1)
    even = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    table, _ = run(*flags, "--grid", "even")
    shifted, _ = run(*flags, "--grid", "even", "--shift", 3)
    assert table["grid"] == pytest.approx([*even.tolist(), 0], abs=1e-6)
    expected = [*(3 * even / (1 + 2 * even)).tolist(), 0]
    assert shifted["grid"] == pytest.approx(expected, abs=1e-6)
    own = run(*flags)[0]["grid"][1]
    assert own == pytest.approx(0.9 if backbone == "flux" else 0.889, abs=1e-6)
    assert shifted["rows"][1]["score"] != table["rows"][1]["score"]
    assert shifted["rows"][0]["reward"] != table["rows"][0]["reward"]


def test_a_whole_short_run(run, values, tmp_path):
    """The promised keys, one evaluation of the base model for all, costs in the order that the
    method is about, files, images and figures."""
    methods = ("draft-1", "alignprop", "draft-1+stitchvm")
    flags = ("--value", values["clip"], "--accumulate", 2, "--save-images", "--scorers", *SCORERS)
    flags += ("--track", tmp_path / "track")
    another = tmp_path / "out/07_images/draft-1/2/00009/samples/0000.png"
    another.parent.mkdir(parents=True)
    another.touch()  # of an earlier run
    table, printed = run("--methods", *methods, *flags)
    rows = table["rows"]
    assert [(r["method"], r["update"]) for r in rows] == [(m, k) for m in methods for k in (0, 2)]
    keys = {"method", "update", "seconds", "gflop", "n"}
    keys |= {k for s in ("reward", "gain", *SCORERS) for k in (s, f"{s}_se")}
    folder = tmp_path / "out"
    lam = table["config"]["regularise"]
    for r in rows:
        assert keys <= set(r) and "clip" not in r and r["n"] == 3
        assert r["images"] == f"07_images/{r['method']}/{r['update']}"
        assert r["gain"] == pytest.approx(r["reward"] - rows[0]["reward"], abs=1e-6)
        assert len([*(folder / r["images"]).glob("*/samples/0000.png")]) == 3
        if r["update"] == 0:
            same_start = dict(method="draft-1", images="07_images/draft-1/0")
            assert r["gflop"] == r["seconds"] == 0 and r | same_start == rows[0]
        else:
            assert r["gflop"] > 0 and r["seconds"] > 0 and r["gradient"] > 0
            assert r["loss"] == pytest.approx(lam * r["distance"] - r["score"], abs=1e-6)
    work = {r["method"]: r["gflop"] for r in rows if r["update"] == 2}
    assert work["draft-1+stitchvm"] < 0.6 * work["draft-1"] < 0.6 * work["alignprop"]
    assert len(table["grid"]) == 11 and len(table["values"]) == 1
    assert [len(v) for v in table["rewards_of_prompts"]] == [3] * 6
    assert "an update: 2 prompts x 2 micro-batches, 1 processes" in printed
    assert {r["method"]: tracked(tmp_path / "track" / r["method"]) for r in rows} == {
        m: [(r["update"], r["reward"], r.get("loss")) for r in rows if r["method"] == m]
        for m in methods
    }
    for name in ("07_curves", "07_grid"):
        assert Image.open(folder / f"{name}.png").width > 300
    first, *others = (lora(folder, m) for m in methods)
    assert all(first.keys() == other.keys() and not same(first, other) for other in others)


def test_a_joint_reward_and_a_budget_of_work(run, values):
    """The sum of the parts, whose columns stay; a method ends with the first update at which the
    work is spent."""
    both = ("--reward", "clip+hpsv2", "--value", values["clip"], values["hpsv2"])
    flags = ("--stop", 3, 3, "--updates", 50, "--gflop", 10, "--scorers", "clip", "hpsv2")
    first, last = run(*both, *flags)[0]["rows"]
    assert first["update"] == 0
    assert 10 <= last["gflop"] < 10 * last["update"] / (last["update"] - 1)
    assert last["reward"] == pytest.approx(last["clip"] + last["hpsv2"], abs=1e-5)


def test_the_lora_loads_into_a_fresh_pipeline(tmp_path):
    """By pipe.load_lora_weights and by peft, with its alpha: the same velocity as the average's,
    and neither the base model's nor the trained one's."""
    backbone = common.Backbone("sd3.5-medium")
    null = [v.expand(2, *v.shape[1:]) for v in backbone.prompts(["a red circle"])]
    plain = copy.deepcopy(backbone.transformer)
    for name in draft.POLICIES:
        shake(draft.add_lora(backbone.transformer, 4, 16, name), 0.05)
    draft.save_lora(backbone, tmp_path / "lora", "average")
    parts = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone.source, **parts)
    pipe.load_lora_weights(tmp_path / "lora")
    z, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        found = {}
        for name in draft.POLICIES:
            backbone.transformer.set_adapter(name)
            found[name] = library(backbone.transformer, null)(z, sigma)
        loaded, base = (library(t, null)(z, sigma) for t in (pipe.transformer, plain))
        by_peft = library(PeftModel.from_pretrained(plain, tmp_path / "lora"), null)(z, sigma)
    assert_close(loaded, found["average"], atol=1e-5, rtol=1e-4)
    assert_close(by_peft, found["average"], atol=1e-5, rtol=1e-4)
    assert (loaded - base).abs().max() > 0.05 and (loaded - found["default"]).abs().max() > 0.05
    files = sorted(p.name for p in (tmp_path / "lora").iterdir())
    ends = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert files == ends
    name = r"transformer\.transformer_blocks\.\d\.attn\.[a-z_.0]+\.lora_[AB]\.weight$"
    assert all(re.match(name, k) for k in lora(tmp_path, "lora"))


def test_average_of_the_weights(run, tmp_path, monkeypatch):
    """Decay by hand: 1/10, 2/11, … up to what is asked for; and none. What is evaluated and written
    is the average, from the start on."""
    decays = []

    def spy(decay):
        decays.append(decay)
        return get_ema_multi_avg_fn(decay)

    monkeypatch.setattr(draft, "get_ema_multi_avg_fn", spy)
    run("--methods", "draft-1", "--updates", 4, "--ema", 0.25)
    assert decays == pytest.approx([0.1, 2 / 11, 0.25, 0.25])
    run("--methods", "draft-1", "--updates", 1, "--ema", 0, out=tmp_path / "last")
    assert decays[4:] == [0]
    saved = {}
    for name in ("out", "last"):
        path = tmp_path / name / "draft-1/07_draft.train"
        saved[name] = torch.load(path, weights_only=True)["data"]["lora"]
    pairs = [list(zip(s["default"], s["average"], strict=True)) for s in saved.values()]
    assert sum(not torch.equal(a, b) for a, b in pairs[0]) > 100
    assert all(torch.equal(a, b) for a, b in pairs[1])
    average = [torch.zeros(())]
    for k, w in enumerate((3.0, 5.0)):
        get_ema_multi_avg_fn((1 + k) / (10 + k))(average, [torch.tensor(w)], None)
    assert float(average[0]) == pytest.approx(2 / 11 * (0.9 * 3) + 9 / 11 * 5)
    written = sum(
        float(v.double().square().sum()) for v in lora(tmp_path / "out", "draft-1").values()
    )
    expected = sum(float(v.double().square().sum()) for v in saved["out"]["average"])
    assert written == pytest.approx(expected, rel=1e-9)


def test_killed_and_resumed_gives_the_same_bits(run, values, tmp_path, one_thread):
    """Killed between two updates: LoRA, average, optimiser and draws go on as if nothing had been,
    and so does the table."""
    flags = ("--value", values["clip"], "--updates", 4)
    half = tmp_path / "half"
    running = half / "draft-1+stitchvm/07_draft.train"
    process = children.start("07_draft", *SHORT, "--out", half, *flags)
    while not running.exists() or torch.load(running, weights_only=True)["data"]["update"] < 1:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (half / "07_draft.json").exists()
    assert not (half / "draft-1+stitchvm/pytorch_lora_weights.safetensors").exists()
    whole, _ = run(*flags, out=tmp_path / "whole")
    resumed, printed = run(*flags, "--resume", out=half)
    assert "update 0" not in printed and "update 4" in printed
    assert without_seconds(resumed["rows"]) == without_seconds(whole["rows"])
    assert resumed["rewards_of_prompts"] == whole["rewards_of_prompts"]
    assert same(*(lora(d, "draft-1+stitchvm") for d in (half, tmp_path / "whole")))


def test_a_finished_method_is_not_trained_again(run, values, tmp_path, monkeypatch):
    """--resume takes its rows as they are, also with other scorers, and starts the method that has
    no file; with more updates it goes on. The tables are those of one run."""
    flags = ("--value", values["clip"], "--updates", 1)
    both = ("--methods", "draft-1", "draft-1+stitchvm")
    run(*flags, "--methods", "draft-1")
    trained = []
    gradient = draft.gradient

    def spy(run, args, method, update):
        trained.append((method, update))
        return gradient(run, args, method, update)

    monkeypatch.setattr(draft, "gradient", spy)
    resumed, _ = run(*flags, *both, "--resume")
    assert trained == [("draft-1+stitchvm", 0)]
    whole, _ = run(*flags, *both, out=tmp_path / "whole")
    assert without_seconds(resumed["rows"]) == without_seconds(whole["rows"])
    trained.clear()
    again, _ = run(*flags, *both, "--resume", "--scorers", "judge")
    assert again["rows"] == resumed["rows"] and not trained
    more, _ = run("--methods", "draft-1", "--updates", 2, "--resume")
    assert trained == [("draft-1", 1)] and [r["update"] for r in more["rows"]] == [0, 1, 2]


def test_two_processes_do_what_one_does(run, values, tmp_path):
    """They share an update's micro-batches: the same samples and stops, so the same loss and the
    same work; the held-out prompts are shared."""
    flags = ("--value", values["clip"], "--accumulate", 2)
    one, _ = run(*flags, out=tmp_path / "one")
    children.run_two("07_draft", *SHORT, "--out", tmp_path / "two", *flags)
    two = json.loads((tmp_path / "two/07_draft.json").read_text())
    for a, b in zip(one["rows"], two["rows"], strict=True):
        keys = (
            "update",
            "gflop",
            "reward",
            *(("loss", "score", "gradient") if a["update"] else ()),
        )
        for k in keys:
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-6)
    a, b = (lora(tmp_path / name, "draft-1+stitchvm") for name in ("one", "two"))
    assert all((a[k] - b[k]).norm() < 0.05 * a[k].norm() + 1e-5 for k in a)


def test_a_nan_stops_training_and_keeps_the_last_good_state(run, tmp_path, monkeypatch):
    """One sentence that names the state after the update before, from which a run without the fault
    goes on."""
    loss, calls = draft.draft_loss, []

    def broken(*given):
        calls.append(1)
        # one call counts the work
        return [part * (math.nan if len(calls) == 3 else 1) for part in loss(*given)]

    monkeypatch.setattr(draft, "draft_loss", broken)
    sentence = "update 2 of draft-1 gave NaN, inf or weights above 100; "
    sentence += "the last good state is .*07_draft.train"
    with pytest.raises(SystemExit, match=f"^error: {sentence}") as e:
        run("--methods", "draft-1")
    folder = tmp_path / "out/draft-1"
    saved = torch.load(folder / "07_draft.train", weights_only=True)["data"]
    assert saved["update"] == 1 and "\n" not in str(e.value)
    assert all(v.isfinite().all() for v in saved["lora"]["default"])
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    assert [r["update"] for r in run("--methods", "draft-1", "--resume")[0]["rows"]] == [0, 2]


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_last_step_that_ruins_the_weights_writes_nothing(run, tmp_path, lr):
    """Too large, or so large that a sample is NaN."""
    with pytest.raises(SystemExit, match="^error: update 1 of draft-1 gave NaN, inf or weights"):
        run("--methods", "draft-1", "--updates", 1, "--lr", lr)
    assert [p.name for p in (tmp_path / "out").iterdir() if "prompts" not in p.name] == []


@pytest.mark.parametrize("edited", ["p.txt", "e.txt"])
def test_prompts_edited_in_place_are_refused(run, tmp_path, edited):
    """As many as before, the first one the same, in the same file; one that was only moved is
    taken."""
    (tmp_path / "p.txt").write_text("a red circle\na ring\ntwo stars\n")
    (tmp_path / "e.txt").write_text("a blue ring\na star\n")
    flags = ["--methods", "draft-1", "--updates", 1]
    files = ["--train-prompts", tmp_path / "p.txt", "--eval-prompts", tmp_path / "e.txt"]
    run(*flags, *files)
    last = files.index(tmp_path / edited)
    files[last] = (tmp_path / edited).rename(tmp_path / "moved.txt")
    run(*flags, *files, "--resume")
    text = files[last].read_text()
    files[last].write_text(text.replace("star", "square"))
    key = "train_prompts" if edited == "p.txt" else "eval_prompts"
    with pytest.raises(SystemExit, match=rf"(?s)does not fit this run.*\n  {key} ") as e:
        run(*flags, *files, "--resume")
    assert str(e.value).count("_prompts ") == 1


def test_a_state_is_thrown_away_only_where_a_flag_says_so(run, tmp_path):
    """Whether its run has ended or not; with more updates it goes on."""
    flags = ("--methods", "draft-1", "--updates", 1)
    run(*flags)
    folder = tmp_path / "out/draft-1"
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SystemExit, match="07_draft.train.*--resume.*--restart") as e:
        run(*flags, "--lr", 0.1, anew=False)
    assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    run(*flags, "--lr", 0.1)
    assert all(p.read_bytes() != text for p, text in before.items() if p.suffix != ".json")


def test_a_nan_at_once_has_no_file_to_name(run, monkeypatch):
    loss = draft.draft_loss

    def broken(*given):
        return [part * math.nan for part in loss(*given)]

    monkeypatch.setattr(draft, "draft_loss", broken)
    with pytest.raises(SystemExit, match="update 1 of .*; the last good state is the base model"):
        run("--methods", "draft-1")


def test_whole_rollouts_need_no_stop_window():
    args = draft.parse_args(["--steps", "5", "--methods", "draft-1", "alignprop"])
    assert draft.check(args) == {
        "draft-1": dict(keep=1, stops=None, checkpointing=False),
        "alignprop": dict(keep=None, stops=None, checkpointing=True),
    }


MISUSE = [
    (["--methods", "draft"], "there is no method draft: --methods takes draft-1,"),
    (["--methods", "draft-0"], "there is no method draft-0"),
    (["--methods", "draft-11"], "draft-11 keeps 11 steps of a rollout that may have 10"),
    (
        ["--methods", "draft-4+stitchvm"],
        "draft-4.stitchvm keeps 4 steps of a rollout that may have 2",
    ),
    (["--reward", "dfn-clip"], "no value model of dfn-clip.*03_finetune.py --reward dfn-clip"),
    (["--reward", "clip+hpsv2", "--value", "one.pt"], "1 files for the 2 rewards"),
    (["--train-prompts", "nowhere.txt"], "there is no file of prompts nowhere.txt"),
    (
        ["--train-prompts", "tests/mini/data/drawbench.txt", "--eval-limit", "300"],
        "0 prompts to train on and 200 held out",
    ),
    (["--eval-limit", "1"], "1 held out"),
    (["--stop", "3", "11"], "--stop 3 11 must lie in order between 1 and --steps 10"),
    (["--batch", "0"], "--batch: 0 does not lie between 1 and 2,147,483,648"),
    (["--steps", "1"], "--steps: 1 does not lie between 2 and inf"),
    (["--preset", "24gb"], "--train-prompts FILE and --eval-prompts FILE are needed"),
    (["--methods", "draft-1", "--resume"], "draft-1/07_draft.train does not exist"),
    (["--reward", "nothing", "--methods", "draft-1"], "there is no nothing"),
]


@pytest.mark.parametrize("flags, message", MISUSE, ids=[" ".join(flags) for flags, _ in MISUSE])
def test_misuse_is_answered_in_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
        run(*flags)
    assert "\n" not in str(e.value)


def test_another_runs_state_is_refused(run, tmp_path):
    """A table of what is in the file and what was asked for."""
    running = tmp_path / "out/draft-1/07_draft.train"
    running.parent.mkdir(parents=True)
    about = dict(format=1, spec=dict(lr=1.0), provenance=dict(command="07_draft.py"))
    torch.save(dict(about, data={}), running)
    with pytest.raises(SystemExit, match="(?s)does not fit this run.*lr .*1.0 .*0.0004"):
        run("--methods", "draft-1", "--resume", "--lr", 4e-4)
    running.write_bytes(running.read_bytes()[:400])
    with pytest.raises(SystemExit, match="cannot be read"):
        run("--methods", "draft-1", "--resume")
