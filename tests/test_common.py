"""common.py against the libraries, closed forms and files: small random models, no download."""

import argparse
import copy
import json
from functools import partial
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import train
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

import common

GRID = (5, 3)  # of tokens: a 10 x 6 latent, so that rows and columns cannot be confused
PROMPTS = ["a red circle", "", "two small blue stars on a white background"]


def shaken(module, scale=0.1):
    """Random biases and norm weights too: zeros and ones would hide a missing or doubled term."""
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn_like(p)
    return module.eval().requires_grad_(False)


SHARED = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24)
SHARED |= dict(pooled_projection_dim=20)


def small_sd3():
    """Four random blocks, the first two with a second attention, the last without text output."""
    torch.manual_seed(0)
    config = SHARED | dict(sample_size=16, patch_size=2, in_channels=16, out_channels=16)
    config |= dict(num_layers=4, caption_projection_dim=32, pos_embed_max_size=8)
    config |= dict(dual_attention_layers=(0, 1), qk_norm="rms_norm")
    return shaken(SD3Transformer2DModel(**config))


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    config = SHARED | dict(patch_size=1, in_channels=64, num_layers=2, num_single_layers=2)
    config |= dict(guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    return shaken(FluxTransformer2DModel(**config))


@pytest.fixture(params=["sd3", "flux"])
def transformer(request):
    return request.getfixturevalue(request.param)


def inputs(batch=3, dtype=torch.float32, seed=1):
    """z, sigma, text, pooled; sigma stays float32, as in the pipelines."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 16, 10, 6, generator=g).to(dtype)
    sigma = torch.rand(batch, generator=g)
    text = torch.randn(batch, 5, 24, generator=g).to(dtype)
    return z, sigma, text, torch.randn(batch, 20, generator=g).to(dtype)


def library(transformer, z, sigma, text, pooled, guidance=3.5):
    """The velocity by the library's own forward, called as its own pipeline calls it."""
    if isinstance(transformer, SD3Transformer2DModel):
        return transformer(z, text, pooled, sigma * 1000, return_dict=False)[0]
    B, C, H, W = z.shape
    ids = FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, z.device, z.dtype)
    packed = FluxPipeline._pack_latents(z, B, C, H, W)
    given = packed, text, pooled, sigma.to(z.dtype), ids, torch.zeros(text.shape[1], 3)
    guidance = torch.full((B,), guidance, dtype=z.dtype)
    y = transformer(*given, guidance, return_dict=False)[0]
    return FluxPipeline._unpack_latents(y, 8 * H, 8 * W, vae_scale_factor=8)


def state_after(transformer, i, z, sigma, text, pooled, **kwargs):
    begun = common.begin(transformer, z, sigma, text, pooled, **kwargs)
    return common.run_blocks(transformer, begun, i)


def resume(transformer, state):
    return common.end(transformer, common.run_blocks(transformer, state))


# ---------------------------------------------------------------------------- transformer, cut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cut_and_resumed_is_the_library(transformer, dtype):
    """Bit for bit, with gradients, cut after every block: the same modules in the same order."""
    transformer = copy.deepcopy(transformer).to(dtype)
    z, *rest = inputs(dtype=dtype)
    z.requires_grad_()
    seen = []  # (text, image) after each block, in the order in which the library runs them
    for m in transformer.modules():
        if type(m).__name__.endswith("TransformerBlock"):
            m.register_forward_hook(lambda module, args, out: seen.append(out))
    u = library(transformer, z, *rest)
    states = list(seen)
    assert len(states) == 4
    w = torch.randn_like(u)
    grad = torch.autograd.grad(u, z, w, retain_graph=True)[0]
    for i in range(5):
        state = state_after(transformer, i, z, *rest)
        assert state["i"] == i and state["fixed"]["grid"] == GRID
        if i:
            text, image = states[i - 1]
            assert torch.equal(state["h"], image)
            assert (state["c"] is text is None) or torch.equal(state["c"], text)
        resumed = resume(transformer, state)
        assert torch.equal(resumed, u)
        assert torch.equal(torch.autograd.grad(resumed, z, w)[0], grad)


def test_flux_guidance_reaches_the_model(flux):
    """The guidance is scaled as the library scales it; another value gives another velocity."""
    weak, strong = (resume(flux, state_after(flux, 0, *inputs(), guidance=g)) for g in (1.5, 3.5))
    assert torch.equal(weak, library(flux, *inputs(), guidance=1.5))
    assert (weak - strong).abs().max() > 1e-3


def test_token_grid(transformer):
    """Latent pixel (r, c) is in token (r // 2) * columns + c // 2 and no other before block 1."""
    z, *rest = inputs(1)
    moved = z.clone()
    moved[..., 7, 3] += 1
    h, g = (common.begin(transformer, v, *rest)["h"] for v in (z, moved))
    assert ((h - g).abs().amax(-1) > 1e-4)[0].nonzero().tolist() == [[(7 // 2) * GRID[1] + 3 // 2]]


@pytest.mark.parametrize("i", [0, 1, 3, 4])
def test_state_index_follows_the_particles(transformer, i):
    """Resampled, one twice and one dropped; also after SD 3's last block, which has no text."""
    index = torch.tensor([2, 0, 0, 3])
    state = common.state_index(state_after(transformer, i, *inputs(4)), index)
    assert state["i"] == i
    wanted = library(transformer, *[v[index] for v in inputs(4)])
    assert_close(resume(transformer, state), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("i", [0, 2, 3, 4])
def test_state_cat_joins_null_and_conditional(transformer, i):
    """Two prefixes of one latent are the library's batch of 2, but for the batch's kernels."""
    z, sigma, text, pooled = inputs(2)
    z, sigma = z[:1].expand(2, -1, -1, -1), sigma[:1].expand(2)
    given = z, sigma, text, pooled
    states = [state_after(transformer, i, *[v[k : k + 1] for v in given]) for k in (0, 1)]
    joined = resume(transformer, common.state_cat(states))
    assert_close(joined, library(transformer, *given), atol=2e-5, rtol=0)


def test_state_cat_refuses_different_blocks(transformer):
    states = [state_after(transformer, i, *inputs()) for i in (0, 1)]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        common.state_cat(states)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 4.5])
def test_velocity_is_guided(transformer, cfg):
    """un + cfg (uc - un), with prompts of batch 1 spread over the particles."""
    z, sigma, text, pooled = inputs()
    pairs = [(text[k : k + 1], pooled[k : k + 1]) for k in (0, 1)]
    un, uc = (
        library(transformer, z, sigma, *[v.expand(3, *v.shape[1:]) for v in pair]) for pair in pairs
    )
    null, condition = pairs
    u = common.velocity(transformer, z, sigma, condition, null, cfg)
    # cfg multiplies the batch-size noise of 1e-6
    assert_close(u, un + cfg * (uc - un), atol=1e-4, rtol=0)
    assert (u - library(transformer, z, sigma, text, pooled)).abs().max() > 1e-2


# ---------------------------------------------------------------------------- noise
M, V = 0.7, 0.25  # the one-dimensional data z0 ~ N(M, V)


def mean_of(z, t):
    """E[z_0 | z_t]."""
    return M + (1 - t) * V / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)


def velocity_of(z, t):
    """E[eps - z_0 | z_t]."""
    return (t - (1 - t) * V) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M) - M


def test_add_noise_and_tweedie():
    """Exact inverses for the path's velocity, the posterior mean for the marginal one; t varies."""
    z0, eps = torch.randn(2, 5, 3, 4, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    z = common.add_noise(z0, eps, t)
    assert torch.equal(z[0], z0[0]) and torch.equal(z[4], eps[4])
    assert_close(common.tweedie(z, eps - z0, t), z0)
    s = t.view(-1, 1, 1, 1)
    assert_close(common.tweedie(z, velocity_of(z, s), t), mean_of(z, s))


def sd3_grid(steps):
    return common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), steps, 1024)


def propagate(steps, nu, tilt=0.0):
    """Mean and variance of z_0 after the steps from N(0, 1) with the exact velocity.

    Each step is affine: its coefficients are read off at three points.
    """
    mean, variance = 0.0, 1.0
    for t, t_next in pairwise(sd3_grid(steps).tolist()):
        total = (1 - t) ** 2 * V + t * t
        z = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        # (39) for r(z_0) = tilt z_0: V_t = tilt E[z_0|z_t], drift d (t/(1-t) + nu^2/2) grad V_t,
        # with the factor 1-t cancelled at t = 1
        drift = (t - t_next) * tilt * (t + 0.5 * nu(t) ** 2 * (1 - t)) * V / total
        noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        after = common.sde_step(z, velocity_of(z, t), t, t_next, noise, nu) + drift
        shift, slope, spread = after.tolist()
        mean = (slope - shift) * mean + shift
        variance = (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


def square(t):
    return 3 * t * t


def zero(t):
    return 0.0


CASES = [(square, 10, 0.1787), (square, 28, 0.2198), (square, 40, 0.2282), (square, 100, 0.2409)]
CASES += [(zero, 10, 0.1290), (zero, 28, 0.2020), (zero, 40, 0.2158), (zero, 100, 0.2359)]


@pytest.mark.parametrize("nu, steps, variance", CASES)
def test_sde_on_gaussian_data(nu, steps, variance):
    """The mean is exact on every grid, the variance Euler's, derived apart from this code."""
    mean, found = propagate(steps, nu)
    assert mean == pytest.approx(M, abs=2e-6)
    assert found == pytest.approx(variance, abs=6e-5)


@pytest.mark.parametrize("nu", [square, zero])
@pytest.mark.parametrize("tilt", [-2.0, 1.0])
def test_guidance_tilts_the_mean(nu, tilt):
    """With the exact guidance, r = tilt z_0 moves N(M, V) to N(M + tilt V, V)."""
    mean, variance = propagate(400, nu, tilt)
    assert mean == pytest.approx(M + tilt * V, abs=5e-6)
    assert variance == pytest.approx(V, abs=5e-3)


def test_sde_default_is_three_t_squared():
    z, u, noise = torch.randn(3, 2, 4)
    found, wanted = (common.sde_step(z, u, 0.6, 0.5, noise, *nu) for nu in ((), (square,)))
    assert torch.equal(found, wanted)


def test_sde_adds_no_noise_in_the_last_step():
    z, u, noise = torch.randn(3, 2, 4)
    step = partial(common.sde_step, z, u, 0.2)
    assert torch.equal(step(0.0, noise), step(0.0, 1e6 * noise))
    assert_close(step(0.1, noise) - step(0.1, 0 * noise), 3 * 0.2**2 * 0.1**0.5 * noise)


def test_sde_step_is_taken_in_float32():
    """bfloat16 latents come back as bfloat16, rounded once at the end."""
    z, u, noise = torch.randn(3, 2, 400).bfloat16()
    wanted = common.sde_step(z.float(), u.float(), 0.6, 0.55, noise.float())
    assert torch.equal(common.sde_step(z, u, 0.6, 0.55, noise), wanted.bfloat16())


def test_sigma_grid_of_sd3():
    """diffusers' own ten steps at shift 3; the last noise level is the one it shifts twice."""
    found = [round(v, 3) for v in sd3_grid(10).tolist()]
    assert found == [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0]


@pytest.mark.parametrize("tokens, mu", [(1024, 0.63), (4096, 1.15)])
@pytest.mark.parametrize("is_flux", [True, False])
def test_sigma_grid_with_dynamic_shift(tokens, mu, is_flux):
    """It grows with the resolution: mu = .63 at 512 px, 1.15 at 1024. FLUX's pipeline passes even
    levels; SD 3's passes mu alone, and the scheduler's own levels, from 1 to .001, are shifted."""
    shifts = dict(base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifts)
    s = np.linspace(1, 1 / 28 if is_flux else 1 / 1000, 28)
    wanted = [*np.exp(mu) / (np.exp(mu) + 1 / s - 1), 0]
    found = common.sigma_grid(scheduler, 28, tokens, is_flux)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_generator_depends_on_every_seed():
    seeds = (0, "noise", 3), (1, "noise", 3), (0, "images", 3), (0, "noise", 4), (0, "noise", 3)
    drawn = [torch.rand(4, generator=common.generator(*s)).tolist() for s in seeds]
    assert drawn[0] == drawn[4] and len(set(map(tuple, drawn))) == 4


# ---------------------------------------------------------------------------- the reward model
def write_clip(folder, quick_gelu=True, **preprocess):
    """A small random CLIP in open_clip's local-dir layout."""
    torch.manual_seed(2)
    config = train.clip_config(patch=16, layers=3, width=64, quick_gelu=quick_gelu)
    train.save_clip(shaken(train.build_clip(config)), config, folder)
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["preprocess_cfg"].update(preprocess)
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


NULL = [v[:1] for v in inputs(1, seed=5)[2:]]


def two_rewards(folders):
    """Rewards that differ, on pytest's tmp_path_factory."""
    made = []
    for name, quick in (("clip", True), ("other", False)):
        folder = write_clip(folders.mktemp(name) / "small", quick_gelu=quick)
        made.append(common.Reward(str(folder)))
    shaken(made[1].visual)
    return made


def small_value(transformer, reward, i, **kwargs):
    """The value of small_sd3 and a small CLIP, its stitch random."""
    torch.manual_seed(i)
    stitch = common.Stitch(torch.randn(64, 32) / 32**0.5, torch.randn(64), (4, 4))
    value = common.StitchedValue(transformer, NULL, reward, stitch, i, 1, **kwargs)
    torch.nn.init.normal_(value.stitch.G[-1].weight, std=0.1)
    return value.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture(scope="module")
def reward(clip_folder):
    return common.Reward(str(clip_folder))


def smooth_image(h, w, seed=0):
    """uint8 (3, h, w), smooth: PIL rounds between its passes, on noise by several levels."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)[0]
    return (fine * 255).round().to(torch.uint8)


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def tokens_before(visual, x, j):
    """Of normalised images x: the patches, and the tokens entering block j."""
    patches = visual.conv1(x)
    tokens = common.tokens_entering(visual, patches)
    for block in visual.transformer.resblocks[: j - 1]:
        tokens = block(tokens)
    return patches, tokens


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_tail_is_the_whole_tower(tmp_path, quick_gelu):
    """From every block j: embedding and tokens are open_clip's own, bit for bit."""
    model = open_clip.create_model(f"local-dir:{write_clip(tmp_path, quick_gelu)}").eval()
    visual, x = model.visual, torch.randn(3, 3, 64, 64)
    kind = type(visual.transformer.resblocks[0].mlp.gelu).__name__
    assert (kind == "QuickGELU") is quick_gelu
    tokens = []
    visual.ln_post.register_forward_hook(lambda module, args, out: tokens.append(out))
    e = model.encode_image(x)
    for j in (1, 2, 3):
        found = common.tail(visual, tokens_before(visual, x, j)[1], j)
        assert torch.equal(found[0], e) and torch.equal(found[1], tokens[0])


def test_reward_is_loaded_as_open_clip_loads_it(reward, clip_folder):
    """In evaluation mode and float32, frozen; its embeddings are open_clip's."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    images = torch.stack([smooth_image(64, 64, k) for k in range(2)])
    wanted = model.eval().encode_image(torch.stack([transform(pil(x)) for x in images]))
    assert_close(reward.embed(images / 255)[0], wanted, atol=1e-5, rtol=0)
    e = reward.text(PROMPTS[::2], batch=1)
    wanted = model.encode_text(train.tokenise(PROMPTS[::2]), normalize=True)
    assert_close(e, wanted, atol=1e-6, rtol=0)
    assert_close(e.norm(dim=-1), torch.ones(2))
    for tower in (reward.visual, reward.text_model):
        assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    assert reward.uses_text


def test_aesthetic_head(tmp_path):
    """An open_clip folder with the head scores without text, as the head does, dropout off."""
    head = shaken(train.aesthetic_head(64))
    state = {f"layers.{k}": v for k, v in head.state_dict().items()}
    save_file(state, write_clip(tmp_path) / "aesthetic_head.safetensors")
    reward, e = common.Reward(str(tmp_path)), torch.randn(5, 64)
    assert not reward.uses_text and reward.text(PROMPTS) is None
    assert_close(reward.score(e), head(e)[:, 0])


def test_tokenizer_is_the_same_every_time():
    """The miniature is trained and used with a tokenizer that is made anew: ids must not vary."""
    first, again = (train.tokenizer() for _ in range(2))
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    ids = first(train.draw.WORDS).input_ids
    assert {len(row) for row in ids} == {3}  # one token each, between start and end
    assert len({row[1] for row in ids}) == len(train.draw.WORDS)


SHAPES = [(64, 64), (97, 128), (150, 101), (101, 150), (67, 64)]
SHAPES += [(64, 91), (40, 50), (33, 87), (300, 77), (131, 203)]
LOOKS = [("shortest", {}), ("squash", {}), ("longest", {}), ("longest", dict(fill_color=200))]
LOOKS += [("squash", dict(interpolation="bilinear"))]


@pytest.mark.parametrize("mode, more", LOOKS)
def test_resize_is_the_towers_own(tmp_path, mode, more):
    """Against open_clip's PIL transform, in levels of 255: at most 1.5, and .5 on average.

    Rounding to uint8 twice explains that. A crop or a border one pixel off is worth 5 on average.
    """
    folder = write_clip(tmp_path, resize_mode=mode, **more)
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    reward = common.Reward(str(folder))
    std, off = torch.tensor(reward.preprocess_cfg.std).view(3, 1, 1), {}
    for k, (h, w) in enumerate(SHAPES):
        image = smooth_image(h, w, k)
        found, wanted = (
            reward.normalise(reward.resize(image[None] / 255))[0],
            transform(pil(image)),
        )
        assert found.shape == wanted.shape == (3, 64, 64)
        error = (found - wanted).abs() * std * 255
        if error.max() > 1.5 or error.mean() > 0.5:
            off[h, w] = f"max {error.max():.1f}, mean {error.mean():.2f}"
    assert not off


def test_resize_is_differentiable(reward):
    """Every pixel that the crop keeps moves the embedding; those that it cuts off do not."""
    # away from 0 and 1, where the clamp stops gradients
    x = (0.2 + 0.6 * smooth_image(80, 128) / 255)[None].requires_grad_()
    reward.embed(x)[0].square().sum().backward()
    moves = x.grad.abs().amax((0, 1, 2)) > 0
    assert x.grad.isfinite().all() and moves[28:100].all()
    assert not moves[:16].any() and not moves[-16:].any()


# ---------------------------------------------------------------------------- the value model
def random_stitch(d_in, d_out=64, grid=(4, 4), antialias=False):
    torch.manual_seed(3)
    return common.Stitch(torch.randn(d_out, d_in) / d_in**0.5, torch.randn(d_out), grid, antialias)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (9, 8)])
def test_stitch_starts_at_the_closed_form(grid, antialias):
    """s(h) = Up(W h + b) at first, the convolution commutes with resampling; then y + G(y)."""
    stitch, h = random_stitch(6, 16, grid, antialias), torch.randn(2, 6, *GRID)
    W, b = stitch.F.weight[:, :, 0, 0], stitch.F.bias[:, None, None]

    def up(f):
        if grid == GRID:
            return f
        return F.interpolate(f, grid, mode="bilinear", antialias=antialias)

    y = up(torch.einsum("oi,bihw->bohw", W, h) + b)
    assert_close(stitch(h), y, atol=1e-5, rtol=0)
    assert_close(stitch(h), torch.einsum("oi,bihw->bohw", W, up(h)) + b, atol=1e-5, rtol=0)
    torch.nn.init.normal_(stitch.G[-1].weight)
    assert_close(stitch(h), y + stitch.G(y), atol=1e-5, rtol=0)
    assert (stitch(h) - y).abs().max() > 0.1


@pytest.mark.parametrize("j", [1, 2, 3])
def test_exact_features_give_the_exact_reward(reward, j):
    """Stitched by the identity to what block j expects, the value model is the reward model."""
    x = smooth_image(64, 64)[None] / 255
    features, tokens = tokens_before(reward.visual, reward.normalise(x), j)
    cls = None
    if j > 1:
        features, cls = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), tokens[:, 0]
    stitch = common.Stitch(torch.eye(64), torch.zeros(64), (4, 4))
    value = common.StitchedValue(None, None, reward, stitch, 0, j, cls, front="vae")
    for found, wanted in zip(value.head(features), reward.embed(x), strict=True):
        assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (value.cls is None) == (j == 1)


def stitched(sd3, reward, j=1, i=2, **kwargs):
    """A value on the first i blocks, with random null text; G is on, as after training."""
    cls = torch.randn(1, 64) if j > 1 else None
    value = common.StitchedValue(sd3, NULL, reward, random_stitch(32), i, j, cls, **kwargs)
    torch.nn.init.normal_(value.stitch.G[-1].weight, std=0.1)
    return value


def test_features_are_the_null_texts_tokens(sd3, reward):
    """(B, d, h, w), row by row, float32 also from bfloat16; a state further back is resumed."""
    value = stitched(sd3, reward)
    z, sigma, _, _ = inputs()
    given = z, sigma, *[v.expand(3, *v.shape[1:]) for v in value.null]
    features, state = value.features(z, sigma)
    h = state_after(sd3, 2, *given)["h"]
    assert state["i"] == 2 and features.shape == (3, 32, *GRID)
    assert torch.equal(features[:, :, 3, 1], h[:, 3 * GRID[1] + 1])
    resumed = value.features(None, None, state_after(sd3, 1, *given))
    assert torch.equal(resumed[0], features)
    half = stitched(copy.deepcopy(sd3).bfloat16(), reward).features(z, sigma)[0]
    assert half.dtype == torch.float32
    assert_close(half, features, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("j", [1, 2])
def test_gradient_reaches_z_and_only_what_is_trained(sd3, reward, j):
    """It agrees with finite differences. Of the transformer nothing is trained or saved."""
    value = stitched(sd3, reward, j)
    z, sigma, _, _ = inputs(2)
    text = F.normalize(torch.randn(2, 64), dim=-1)
    z.requires_grad_()
    value(z, sigma, text).sum().backward()
    with torch.no_grad():
        direction = torch.randn_like(z)
        ends = [value(z + s * direction, sigma, text).double().sum() for s in (1e-2, -1e-2)]
    change = float(ends[0] - ends[1]) / 2e-2
    assert float((z.grad * direction).sum()) == pytest.approx(change, rel=2e-2)
    assert all(p.grad is None for p in sd3.parameters())
    assert not {id(p) for p in sd3.parameters()} & {id(p) for p in value.parameters()}
    assert all(k.startswith(("stitch.", "visual.")) or k == "cls" for k in value.state_dict())
    entering = ("class_embedding", "positional_embedding", "ln_pre", "transformer.resblocks.0.")
    skipped = ("conv1.weight", *entering[: 4 * (j > 1)])  # of the tower, what j leaves out
    for name, p in value.named_parameters():
        unused = name.startswith(tuple(f"visual.{part}" for part in skipped))
        assert p.requires_grad is not unused, name
        assert p.grad is None if unused else p.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in reward.visual.parameters())


@pytest.mark.parametrize("i", [1, 2, 3])
def test_keep_blocks_leaves_the_value_alone(transformer, reward, i):
    """V needs the first i blocks only, of either kind; a denoiser call, which needs all, fails."""
    transformer, given = copy.deepcopy(transformer), inputs()
    value = stitched(transformer, reward, i=i)
    before = value.embed(*given[:2])
    size = sum(p.numel() for p in transformer.parameters())
    common.keep_blocks(transformer, i)
    assert torch.equal(value.embed(*given[:2]), before)
    assert len(common.dit_blocks(transformer)) == i
    assert sum(p.numel() for p in transformer.parameters()) < size
    with pytest.raises(TypeError):
        common.velocity(transformer, *given[:2], given[2:])


def test_embedding_kinds_and_score(sd3, reward):
    """'unit' has norm 1, 'mean' is raw / norm; V is its product with one text, or each's own."""
    z, sigma, _, _ = inputs()
    kinds = dict(embedding="unit"), dict(norm=2.5), dict()
    unit, mean, raw = (stitched(sd3, reward, **kind) for kind in kinds)
    e = raw.embed(z, sigma)
    assert_close(unit.embed(z, sigma).norm(dim=-1), torch.ones(3))
    assert_close(unit.embed(z, sigma), e / e.norm(dim=-1, keepdim=True))
    assert_close(mean.embed(z, sigma), e / 2.5)
    text = torch.randn(3, 64)
    assert_close(mean(z, sigma, text), torch.einsum("be,be->b", e / 2.5, text))
    assert_close(mean(z, sigma, text[0]), e / 2.5 @ text[0])


@pytest.mark.parametrize("j", [1, 2])
def test_trained_state_restores_the_value(sd3, reward, j):
    """What trained_state keeps is enough, and no more than what training can change."""
    z, sigma, _, _ = inputs()
    trained, fresh = stitched(sd3, reward, j), stitched(sd3, reward, j)
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    state = trained.trained_state()
    assert set(state) == {k for k, p in trained.named_parameters() if p.requires_grad}
    assert (fresh.embed(z, sigma) - trained.embed(z, sigma)).abs().max() > 1e-2
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(fresh.embed(z, sigma), trained.embed(z, sigma))


# ---------------------------------------------------------------------------- a pipeline folder
def small_vae():
    """With a scale and a shift that matter."""
    config = dict(in_channels=3, out_channels=3, latent_channels=16, layers_per_block=1)
    config |= dict(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4)
    config |= dict(up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, sample_size=64)
    config |= dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    return shaken(AutoencoderKL(**config, scaling_factor=1.5, shift_factor=0.25))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small random SD 3 pipeline on disk, as train.py saves the miniature's."""
    torch.manual_seed(4)
    transformer, text = train.build_generator(dict(width=64, num_layers=2, head=32, dual=1))
    vae, folder = small_vae(), tmp_path_factory.mktemp("pipeline") / "tiny"
    train.save_sd3(shaken(transformer), [shaken(m) for m in text], vae, folder)
    return folder, [m.float() for m in text], vae.float()


@pytest.fixture(scope="module")
def backbone(pipeline):
    return common.Backbone(str(pipeline[0]))


def test_prompts_are_encoded_as_in_training(pipeline, backbone):
    """What the generator was trained with, padding and the absent T5 included."""
    trained = train.encode_text(pipeline[1], train.tokenise(PROMPTS))
    for found, wanted in zip(backbone.prompts(PROMPTS, batch=2), trained, strict=True):
        assert_close(found, wanted, atol=1e-5, rtol=0)


def test_flux_is_saved_and_read_as_it_was_trained(pipeline, tmp_path):
    """Its prompts are train.py's, its velocities the saved transformer's at any guidance."""
    torch.manual_seed(6)
    transformer, text = train.build_flux()
    vae = copy.deepcopy(pipeline[2])
    train.save_flux(shaken(transformer), [shaken(m) for m in text], vae, tmp_path / "tiny-flux")
    backbone = common.Backbone(str(tmp_path / "tiny-flux"))
    condition = backbone.prompts(PROMPTS, batch=2)
    trained = train.encode_flux([m.float() for m in text], train.tokenise_flux(PROMPTS))
    for found, wanted in zip(condition, trained, strict=True):
        assert_close(found, wanted, atol=1e-5, rtol=0)
    z, sigma = torch.randn(3, 16, 8, 8), torch.tensor([0.2, 0.6, 0.9])
    guidances = 1.0, 3.5, torch.tensor([1.0, 1.0, 3.5])
    u = [backbone.velocity(z, sigma, condition, guidance=g) for g in guidances]
    assert (u[0] - u[1]).abs().max() > 1e-3
    assert_close(u[2], torch.cat([u[0][:2], u[1][2:]]))
    wanted = common.velocity(transformer.float(), z, sigma, condition, guidance=1.0)
    assert_close(u[0], wanted)


def test_a_grown_generator_begins_as_the_small_one():
    """Not quite: the layer norms divide by the new, empty channels as well."""
    torch.manual_seed(7)
    sizes = dict(width=64, num_layers=2, head=16, dual=1), dict(width=72, num_layers=4)
    small, text = train.build_generator(sizes[0])
    large, _ = train.build_generator(sizes[1] | dict(head=18, dual=1))
    shaken(small)
    condition = train.encode_text(text, train.tokenise(["a red circle"] * 3))
    given = torch.randn(3, 16, 8, 8), torch.tensor([0.2, 0.6, 0.9]), condition
    before = common.velocity(large, *given)
    train.grow(large, small)
    wanted, grown = (common.velocity(m, *given) for m in (small, large))
    assert (before - wanted).norm() > 0.8 * wanted.norm()
    assert (grown - wanted).norm() < 0.4 * wanted.norm()


def test_latents_are_shifted_and_scaled(pipeline, backbone):
    """z = (mean - shift) scale and back; images are in [0, 1]; the gradient passes the decoder."""
    x, vae = torch.rand(2, 3, 64, 64), pipeline[2]
    mean = vae.encode(2 * x - 1).latent_dist.mean
    z = backbone.encode(x).requires_grad_()
    assert_close(z, (mean - 0.25) * 1.5)
    image = backbone.decode(z)
    assert_close(image, (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    image.square().sum().backward()
    assert z.grad.abs().amax((1, 2, 3)).min() > 0


def save_value(path, backbone, reward, value, changed):
    spec = dict(backbone=backbone.name, reward=reward.name, latent_space=backbone.latent_space())
    spec |= dict(front="dit", i=1, j=2, embedding="mean", reward_grid=[4, 4], antialias=False)
    data = dict(state=value.trained_state(), null=list(value.null), norm=2.0)
    args = argparse.Namespace(seed=0, preset="mini")
    common.save_artifact(path, "03_finetune", args, spec | changed, data)


def test_a_saved_value_is_loaded_again(tmp_path, backbone, reward):
    """The same value of the same latents; another reward or latent space is refused."""
    null = backbone.prompts([""])
    cls, path = torch.randn(1, 64), tmp_path / "value.pt"
    given = backbone.transformer, null, reward, random_stitch(64), 1, 2, cls
    value = common.StitchedValue(*given, norm=2.0)
    with torch.no_grad():
        for p in value.parameters():
            p += 0.05 * torch.randn_like(p) if p.requires_grad else 0
    save_value(path, backbone, reward, value, {})
    loaded, _ = common.load_value(path, backbone, reward)
    z, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.9, 0.3])
    # frozen, the attention takes torch's fast path
    assert_close(loaded.embed(z, sigma), value.embed(z, sigma), atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    for changed in (dict(reward="other"), dict(latent_space="4 channels")):
        save_value(path, backbone, reward, value, changed)
        with pytest.raises(SystemExit, match="does not fit"):
            common.load_value(path, backbone, reward)


# ---------------------------------------------------------------------------- artefacts
SPEC = dict(reward="clip", i=4, grid=(4, 4))


@pytest.fixture
def saved(tmp_path):
    """The path of an artefact with a parent, as a stage writes it."""
    args = argparse.Namespace(seed=7, preset="mini", out=str(tmp_path), lr=1e-4, layers=[1, 2])
    data = dict(W=torch.arange(6.0).view(2, 3), rows=[dict(i=1, name="a")], cls=None)
    parent = dict(stage="01", id="abc", spec={})
    common.save_artifact(tmp_path / "stitch.pt", "02_fit_stitch", args, SPEC, data, [parent])
    return tmp_path / "stitch.pt"


def test_artifact_round_trip(saved, capsys):
    """Readable without running code from the file, with what was put in and its origin."""
    raw = torch.load(saved, weights_only=True)
    artifact = common.load_artifact(saved, SPEC, "02_fit_stitch.py")
    assert raw["id"] == artifact["id"] and len(raw["id"]) == 12
    assert artifact["stage"] == "02_fit_stitch" and artifact["format"] == common.FORMAT
    assert torch.equal(artifact["data"]["W"], torch.arange(6.0).view(2, 3))
    assert artifact["data"]["rows"] == [dict(i=1, name="a")] and artifact["data"]["cls"] is None
    assert artifact["config"]["lr"] == 1e-4
    assert artifact["parents"] == [dict(stage="01", id="abc")]
    assert artifact["provenance"]["seed"] == 7
    assert torch.__version__.startswith(artifact["provenance"]["torch"])
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_misfit_is_refused_with_a_table(saved):
    """It names what differs, both values and the command; what agrees is not in it."""
    asked = dict(reward="hpsv2", i=4, grid=(9, 9))
    with pytest.raises(SystemExit) as e:
        common.load_artifact(saved, asked, "02_fit_stitch.py")
    lines = str(e.value).splitlines()
    assert lines[0] == f"error: {saved} does not fit this run"
    assert lines[2].split() == ["reward", "clip", "hpsv2"]
    assert lines[3].split() == ["grid", "(4,", "4)", "(9,", "9)"]
    assert f"python 02_fit_stitch.py --out {saved.parent}" in lines[-1]
    assert not any(line.split()[0] == "i" for line in lines)


def test_a_key_that_the_file_lacks_is_a_misfit(saved):
    with pytest.raises(SystemExit, match=r"latent_space\s+None\s+16 channels"):
        common.load_artifact(saved, dict(latent_space="16 channels"), "02_fit_stitch.py")


def refused(path):
    """The one sentence with which load_artifact stops."""
    with pytest.raises(SystemExit) as e:
        common.load_artifact(path, {}, "02_fit_stitch.py")
    message = str(e.value)
    assert message.startswith(f"error: {path} ") and "\n" not in message
    assert message.endswith(f"make it with: python 02_fit_stitch.py --out {path.parent}")
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "stitch.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be read" in refused(saved)


WRONG = dict(format=common.FORMAT, spec={}, provenance=dict(command=""))


@pytest.mark.parametrize(
    "content",
    [[1, 2], dict(spec={}), WRONG | dict(data=argparse.Namespace())],
    ids=["list", "half a dict", "pickled class"],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "stitch.pt")
    assert "cannot be read" in refused(tmp_path / "stitch.pt")


def test_another_format_is_refused(saved):
    torch.save(torch.load(saved, weights_only=True) | dict(format=99), saved)
    assert "format 99" in refused(saved)


def test_replacing_leaves_nothing_behind(tmp_path):
    """A failure while writing keeps the old file and no half one; else the new one is there."""
    path = tmp_path / "deep" / "table.json"
    with common.replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    with common.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


# ---------------------------------------------------------------------------- work and pictures
def test_gflop_counts_attention_and_matrices():
    """A linear layer's 2 x multiply-adds, and attention's, which fused kernels would hide."""
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x, n = torch.randn(3, 10, 32), 3 * 10 * 32
    projections, products = 4 * 2 * n * 32, 2 * 2 * n * 10
    with torch.no_grad():
        found = common.gflop(lambda: layer(x, x, x))
    assert found == pytest.approx((projections + products) / 1e9)


def test_timing_tells_a_busy_machine():
    """The median, and a spread that one slow batch of many does not move."""
    assert common.timing([2.0] * 20 + [9.0]) == (2.0, 0.0)
    median, spread = common.timing([1.0, 2.0, 3.0, 4.0, 5.0])
    assert median == 3.0 and spread == pytest.approx((4.6 - 1.4) / 3)


def test_lines_and_grids_are_drawn(tmp_path):
    """PNG files of one panel a key, of one picture a cell; a row without a key is left out."""
    rows = [dict(x=x, name=name, y=x * x, y_se=0.1) for x in (1, 2) for name in "ab"]
    common.draw_lines([*rows, dict(x=3, name="a")], "x", ["y", "x"], "name", tmp_path / "l.png")
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    common.image_grid([images] * 3, ["one", "two", "three"], PROMPTS[::2], tmp_path / "g.png")
    sizes = {p.name: Image.open(p).size for p in tmp_path.iterdir()}
    assert set(sizes) == {"l.png", "g.png"} and all(min(s) > 200 for s in sizes.values())
