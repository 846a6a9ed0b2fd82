"""common.py against the libraries, closed forms and files: small random models, nothing is downloaded or trained."""
import argparse
import copy
import json
import struct
import zlib

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from PIL import Image

import common
import train

GRID = (5, 3)  # of tokens: a 10 x 6 latent, so that rows and columns cannot be confused


def shaken(module, scale=0.1):
    """Random biases and norm weights too: zeros and ones would hide a missing or a doubled term."""
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn_like(p)
    return module.eval().requires_grad_(False)


def small_sd3():
    """Four random blocks, the first two with a second attention, the last without text output."""
    torch.manual_seed(0)
    return shaken(SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8, dual_attention_layers=(0, 1),
        qk_norm="rms_norm"))


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return shaken(FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6)))


@pytest.fixture(params=["sd3", "flux"])
def transformer(request):
    return request.getfixturevalue(request.param)


def inputs(batch=3, dtype=torch.float32, seed=1):
    """z, sigma, text, pooled; sigma stays float32, as in the pipelines."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    return random(batch, 16, 10, 6), torch.rand(batch, generator=g), random(batch, 5, 24), random(batch, 20)


def library(transformer, z, sigma, text, pooled, guidance=3.5):
    """The velocity by the library's own forward, called as its own pipeline calls it."""
    if isinstance(transformer, SD3Transformer2DModel):
        return transformer(z, text, pooled, sigma * 1000, return_dict=False)[0]
    B, C, H, W = z.shape
    ids = FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, z.device, z.dtype)
    y = transformer(FluxPipeline._pack_latents(z, B, C, H, W), text, pooled, sigma.to(z.dtype), ids, torch.zeros(text.shape[1], 3),
                    torch.full((B,), guidance, dtype=z.dtype), return_dict=False)[0]
    return FluxPipeline._unpack_latents(y, 8 * H, 8 * W, vae_scale_factor=8)


# ---------------------------------------------------------------------------- the transformer, cut and resumed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cut_and_resumed_is_the_library(transformer, dtype):
    """Bit for bit, with gradients, cut after every block: the same modules are called in the same order on the same batch."""
    transformer = copy.deepcopy(transformer).to(dtype)
    z, sigma, text, pooled = inputs(dtype=dtype)
    z.requires_grad_()
    seen = []  # (text, image) after each block, in the order in which the library runs them
    hooks = [m.register_forward_hook(lambda module, args, out: seen.append(out))
             for m in transformer.modules() if type(m).__name__.endswith("TransformerBlock")]
    u = library(transformer, z, sigma, text, pooled)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    w = torch.randn_like(u)
    grad, = torch.autograd.grad(u, z, w, retain_graph=True)
    for i in range(5):
        state = common.run_blocks(transformer, common.begin(transformer, z, sigma, text, pooled), i)
        assert state["i"] == i and state["fixed"]["grid"] == GRID
        if i:
            assert torch.equal(state["h"], seen[i - 1][1])
            assert state["c"] is None and seen[i - 1][0] is None or torch.equal(state["c"], seen[i - 1][0])
        resumed = common.end(transformer, common.run_blocks(transformer, state))
        assert torch.equal(resumed, u)
        assert torch.equal(torch.autograd.grad(resumed, z, w)[0], grad)


def test_flux_guidance_reaches_the_model(flux):
    """The guidance is scaled as the library scales it; another value gives another velocity."""
    at = lambda guidance: common.end(flux, common.run_blocks(flux, common.begin(flux, *inputs(), guidance=guidance)))
    assert torch.equal(at(1.5), library(flux, *inputs(), guidance=1.5))
    assert (at(1.5) - at(3.5)).abs().max() > 1e-3


def test_token_grid(transformer):
    """Latent pixel (r, c) is in token (r // 2) * columns + c // 2 and in no other, before the first block."""
    z, sigma, text, pooled = inputs(1)
    moved = z.clone()
    moved[..., 7, 3] += 1
    h, g = (common.begin(transformer, v, sigma, text, pooled)["h"] for v in (z, moved))
    assert ((h - g).abs().amax(-1) > 1e-4)[0].nonzero().tolist() == [[(7 // 2) * GRID[1] + 3 // 2]]


@pytest.mark.parametrize("i", [0, 1, 3, 4])
def test_state_index_follows_the_particles(transformer, i):
    """Resampled particles, one twice and one dropped, resume to what they would have been; also after SD3's last block, without text."""
    z, sigma, text, pooled = inputs(4)
    index = torch.tensor([2, 0, 0, 3])
    state = common.state_index(common.run_blocks(transformer, common.begin(transformer, z, sigma, text, pooled), i), index)
    resumed = common.end(transformer, common.run_blocks(transformer, state))
    assert state["i"] == i
    torch.testing.assert_close(resumed, library(transformer, z[index], sigma[index], text[index], pooled[index]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("i", [0, 2, 3, 4])
def test_state_cat_joins_null_and_conditional(transformer, i):
    """Two prefixes of batch 1 resumed at batch 2 are the library's batch of 2, but for kernels that depend on the batch size."""
    z, sigma, text, pooled = inputs(2)
    z, sigma = z[:1].expand(2, -1, -1, -1), sigma[:1].expand(2)  # as in guidance: the same latent under two prompts
    states = [common.run_blocks(transformer, common.begin(transformer, z[k:k + 1], sigma[k:k + 1], text[k:k + 1], pooled[k:k + 1]), i) for k in (0, 1)]
    joined = common.end(transformer, common.run_blocks(transformer, common.state_cat(states)))
    torch.testing.assert_close(joined, library(transformer, z, sigma, text, pooled), atol=2e-5, rtol=0)


def test_state_cat_refuses_different_blocks(transformer):
    state = common.begin(transformer, *inputs())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        common.state_cat([state, common.run_blocks(transformer, state, 1)])


@pytest.mark.parametrize("cfg", [0.0, 1.0, 4.5])
def test_velocity_is_guided(transformer, cfg):
    """un + cfg (uc - un), with prompts of batch 1 spread over the particles."""
    z, sigma, text, pooled = inputs()
    null, condition = [(text[k:k + 1], pooled[k:k + 1]) for k in (0, 1)]
    un, uc = (library(transformer, z, sigma, *[v.expand(3, *v.shape[1:]) for v in pair]) for pair in (null, condition))
    u = common.velocity(transformer, z, sigma, condition, null, cfg)
    torch.testing.assert_close(u, un + cfg * (uc - un), atol=1e-4, rtol=0)  # cfg multiplies the batch-size noise of 1e-6
    assert (u - library(transformer, z, sigma, text, pooled)).abs().max() > 1e-2


# ---------------------------------------------------------------------------- noise
M, V = 0.7, 0.25  # the one-dimensional data z0 ~ N(M, V)
MEAN_OF = lambda z, t: M + (1 - t) * V / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M)  # E[z_0 | z_t]
VELOCITY_OF = lambda z, t: (t - (1 - t) * V) / ((1 - t) ** 2 * V + t * t) * (z - (1 - t) * M) - M  # E[eps - z_0 | z_t]


def test_add_noise_and_tweedie():
    """Exact inverses for the path's own velocity; the posterior mean for the marginal one. Every sample has its own t."""
    z0, eps = torch.randn(2, 5, 3, 4, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    z = common.add_noise(z0, eps, t)
    assert torch.equal(z[0], z0[0]) and torch.equal(z[4], eps[4])
    torch.testing.assert_close(common.tweedie(z, eps - z0, t), z0)
    s = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(common.tweedie(z, VELOCITY_OF(z, s), t), MEAN_OF(z, s))


def sd3_grid(steps):
    return common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), steps, 1024)


def propagate(steps, nu, tilt=0.0):
    """Mean and variance of z_0 after the steps from N(0, 1) with the exact velocity: each step is affine, its coefficients are read off at three points."""
    mean, variance, grid = 0.0, 1.0, sd3_grid(steps).tolist()
    for t, t_next in zip(grid, grid[1:]):
        total = (1 - t) ** 2 * V + t * t
        z = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        # eq. 39 of the paper for r(z_0) = tilt z_0: V_t = tilt E[z_0|z_t], drift d (t/(1-t) + nu^2/2) grad V_t, with the factor 1-t cancelled at t = 1
        drift = (t - t_next) * tilt * (t + 0.5 * nu(t) ** 2 * (1 - t)) * V / total
        noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        shift, slope, spread = (common.sde_step(z, VELOCITY_OF(z, t), t, t_next, noise, nu) + drift).tolist()
        mean, variance = (slope - shift) * mean + shift, (slope - shift) ** 2 * variance + (spread - shift) ** 2
    return mean, variance


SQUARE, ODE = (lambda t: 3 * t * t), (lambda t: 0.0)


@pytest.mark.parametrize("nu, steps, variance", [
    (SQUARE, 10, .1787), (SQUARE, 28, .2198), (SQUARE, 40, .2282), (SQUARE, 100, .2409),
    (ODE, 10, .1290), (ODE, 28, .2020), (ODE, 40, .2158), (ODE, 100, .2359)], ids=lambda v: getattr(v, "__name__", None) and ("ode" if v is ODE else "sde"))
def test_sde_on_gaussian_data(nu, steps, variance):
    """The mean is exact for every grid, the variance is that of Euler's method in closed form (derived apart from this code, four decimals)."""
    mean, found = propagate(steps, nu)
    assert mean == pytest.approx(M, abs=2e-6)
    assert found == pytest.approx(variance, abs=6e-5)


@pytest.mark.parametrize("nu", [SQUARE, ODE], ids=["sde", "ode"])
@pytest.mark.parametrize("tilt", [-2.0, 1.0])
def test_guidance_tilts_the_mean(nu, tilt):
    """With the exact guidance, r = tilt z_0 moves N(M, V) to N(M + tilt V, V)."""
    mean, variance = propagate(400, nu, tilt)
    assert mean == pytest.approx(M + tilt * V, abs=5e-6)
    assert variance == pytest.approx(V, abs=5e-3)


def test_sde_default_is_three_t_squared():
    z, u, noise = torch.randn(3, 2, 4)
    assert torch.equal(common.sde_step(z, u, 0.6, 0.5, noise), common.sde_step(z, u, 0.6, 0.5, noise, SQUARE))


def test_sde_adds_no_noise_in_the_last_step():
    z, u, noise = torch.randn(3, 2, 4)
    step = lambda t_next, noise: common.sde_step(z, u, 0.2, t_next, noise)
    assert torch.equal(step(0.0, noise), step(0.0, 1e6 * noise))
    torch.testing.assert_close(step(0.1, noise) - step(0.1, 0 * noise), 3 * 0.2 ** 2 * 0.1 ** 0.5 * noise)


def test_sde_step_is_taken_in_float32():
    """bfloat16 latents come back as bfloat16, rounded once at the end."""
    z, u, noise = torch.randn(3, 2, 400).bfloat16()
    out = common.sde_step(z, u, 0.6, 0.55, noise)
    assert torch.equal(out, common.sde_step(z.float(), u.float(), 0.6, 0.55, noise.float()).bfloat16())


def test_sigma_grid_of_sd3():
    """diffusers' own ten steps at shift 3; the last noise level is the one it shifts twice."""
    found = [round(v, 3) for v in sd3_grid(10).tolist()]
    assert found == [1, .960, .913, .858, .790, .707, .602, .465, .278, .009, 0]


@pytest.mark.parametrize("tokens, mu", [(1024, 0.63), (4096, 1.15)])
def test_sigma_grid_of_flux(tokens, mu):
    """FLUX shifts with the resolution: mu = .63 at 512 pixels, 1.15 at 1024."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    s = np.linspace(1, 1 / 28, 28)
    np.testing.assert_allclose(common.sigma_grid(scheduler, 28, tokens), [*np.exp(mu) / (np.exp(mu) + 1 / s - 1), 0], atol=1e-6)


def test_generator_depends_on_every_seed():
    draw = lambda *seed: torch.rand(4, generator=common.generator(*seed)).tolist()
    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    assert len({tuple(draw(*s)) for s in ((0, "noise", 3), (1, "noise", 3), (0, "images", 3), (0, "noise", 4))}) == 4


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


NULL = [torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(5)), torch.randn(1, 20, generator=torch.Generator().manual_seed(6))]


def two_rewards(folders):
    """Rewards that differ, on pytest's tmp_path_factory."""
    one, two = (common.Reward(str(write_clip(folders.mktemp(name) / "small", quick_gelu=quick))) for name, quick in (("clip", True), ("other", False)))
    shaken(two.visual)
    return [one, two]


def small_value(transformer, reward, i, **kwargs):
    """The value of small_sd3 and a small CLIP, its stitch random."""
    torch.manual_seed(i)
    value = common.StitchedValue(transformer, NULL, reward, common.Stitch(torch.randn(64, 32) / 32 ** 0.5, torch.randn(64), (4, 4)), i, 1, **kwargs)
    torch.nn.init.normal_(value.stitch.G[-1].weight, std=0.1)
    return value.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture(scope="module")
def reward(clip_folder):
    return common.Reward(str(clip_folder))


def smooth_image(h, w, seed=0):
    """uint8 (3, h, w), random and smooth: PIL rounds to uint8 between its two passes, which on noise alone is worth several levels."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)[0] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_tail_is_the_whole_tower(tmp_path, quick_gelu):
    """From every block j: embedding and tokens are those of open_clip's own forward, bit for bit."""
    model = open_clip.create_model(f"local-dir:{write_clip(tmp_path, quick_gelu)}").eval()
    visual, x = model.visual, torch.randn(3, 3, 64, 64)
    assert (type(visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU") is quick_gelu
    e, tokens = model.encode_image(x), []
    hook = visual.ln_post.register_forward_hook(lambda module, args, out: tokens.append(out))
    visual(x), hook.remove()
    targets = common.tokens_by_depth(visual, x, 3)
    assert len(targets) == 3 and targets[0][1] is None
    for j, (patches, cls) in enumerate(targets, start=1):
        if j == 1:
            entering = common.tokens_entering(visual, patches.transpose(1, 2).unflatten(2, (4, 4)))
        else:
            entering = torch.cat([cls[:, None], patches], 1)
        found = common.tail(visual, entering, j)
        assert torch.equal(found[0], e) and torch.equal(found[1], tokens[0])


def test_reward_is_loaded_as_open_clip_loads_it(reward, clip_folder):
    """In evaluation mode and float32, frozen; its raw embedding and its unit text embeddings are open_clip's."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    images = torch.stack([smooth_image(64, 64, k) for k in range(2)])
    pixels = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images])
    torch.testing.assert_close(reward.embed(images / 255)[0], model.eval().encode_image(pixels), atol=1e-5, rtol=0)
    prompts = ["two small blue stars on a white background", "a red circle"]
    e = reward.encode_text(prompts, batch=1)
    torch.testing.assert_close(e, model.encode_text(train.tokenise(prompts), normalize=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(2))
    assert reward.uses_text and not reward.model.training and not any(p.requires_grad for p in reward.model.parameters())


def test_aesthetic_head(tmp_path):
    """An open_clip folder with the head scores without text, as the head in evaluation (dropout off) does."""
    from safetensors.torch import save_file
    head = shaken(train.aesthetic_head(64))
    save_file({f"layers.{k}": v for k, v in head.state_dict().items()}, write_clip(tmp_path) / "aesthetic_head.safetensors")
    reward, e = common.Reward(str(tmp_path)), torch.randn(5, 64)
    assert not reward.uses_text
    torch.testing.assert_close(reward.score(e), head(e)[:, 0])


def test_tokenizer_is_the_same_every_time():
    """Every model of the miniature is trained and used with the ids of a tokenizer that is made anew: ids must not depend on the call."""
    first, again = (t.backend_tokenizer.to_str() for t in (train.tokenizer(), train.tokenizer()))
    assert first == again
    ids = train.tokenizer()(train.draw.WORDS).input_ids
    assert {len(row) for row in ids} == {3} and len({row[1] for row in ids}) == len(train.draw.WORDS)  # one token each, between start and end


SHAPES = [(64, 64), (97, 128), (150, 101), (101, 150), (67, 64), (64, 91), (40, 50), (33, 87), (300, 77), (131, 203)]


@pytest.mark.parametrize("preprocess", [dict(resize_mode="shortest"), dict(resize_mode="squash"), dict(resize_mode="longest"),
                                        dict(resize_mode="longest", fill_color=200), dict(resize_mode="squash", interpolation="bilinear")],
                         ids=lambda p: "-".join(str(v) for v in p.values()))
def test_resize_is_the_towers_own(tmp_path, preprocess):
    """Against open_clip's PIL transform, in levels of 255: at most 1.5 and .5 on average, what rounding to uint8 twice explains. A crop or
    a border one pixel off is worth 5 on average."""
    folder = write_clip(tmp_path, **preprocess)
    transform, reward = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2], common.Reward(str(folder))
    std, off = torch.tensor(reward.preprocess_cfg.std).view(3, 1, 1), {}
    for k, (h, w) in enumerate(SHAPES):
        image = smooth_image(h, w, k)
        found = reward.normalise(reward.resize(image[None] / 255))[0]
        wanted = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert found.shape == wanted.shape == (3, 64, 64)
        error = (found - wanted).abs() * std * 255
        if error.max() > 1.5 or error.mean() > 0.5:
            off[h, w] = f"max {error.max():.1f}, mean {error.mean():.2f}"
    assert not off


def test_resize_is_differentiable(reward):
    """Every pixel that the crop keeps moves the embedding; those that it cuts off do not."""
    x = (0.2 + 0.6 * smooth_image(80, 128) / 255)[None].requires_grad_()  # away from 0 and 1, where the clamp stops gradients
    reward.embed(x)[0].square().sum().backward()
    kept = x.grad.abs().amax((0, 1, 2)) > 0
    assert x.grad.isfinite().all() and kept[28:100].all() and not kept[:16].any() and not kept[-16:].any()


# ---------------------------------------------------------------------------- the stitched value model
def random_stitch(d_in, d_out=64, grid=(4, 4), antialias=False):
    torch.manual_seed(3)
    return common.Stitch(torch.randn(d_out, d_in) / d_in ** 0.5, torch.randn(d_out), grid, antialias)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (9, 8)])
def test_stitch_starts_at_the_closed_form(grid, antialias):
    """s(h) = Up(W h + b) at the start, and the 1x1 convolution commutes with resampling; then s = y + G(y)."""
    stitch, h = random_stitch(6, 16, grid, antialias), torch.randn(2, 6, *GRID)
    W, b = stitch.F.weight[:, :, 0, 0], stitch.F.bias[:, None, None]
    up = lambda f: f if grid == GRID else F.interpolate(f, grid, mode="bilinear", align_corners=False, antialias=antialias)
    y = up(torch.einsum("oi,bihw->bohw", W, h) + b)
    torch.testing.assert_close(stitch(h), y, atol=1e-5, rtol=0)
    torch.testing.assert_close(stitch(h), torch.einsum("oi,bihw->bohw", W, up(h)) + b, atol=1e-5, rtol=0)
    torch.nn.init.normal_(stitch.G[-1].weight)
    torch.testing.assert_close(stitch(h), y + stitch.G(y), atol=1e-5, rtol=0)
    assert (stitch(h) - y).abs().max() > 0.1


@pytest.mark.parametrize("j", [1, 2, 3])
def test_exact_features_give_the_exact_reward(reward, j):
    """Stitched with the identity to the very features that block j expects, the value model is the reward model."""
    x = smooth_image(64, 64)[None] / 255
    patches, cls = common.tokens_by_depth(reward.visual, reward.normalise(x), j)[-1]
    value = common.StitchedValue(None, None, reward, common.Stitch(torch.eye(64), torch.zeros(64), (4, 4)), 0, j, cls, front="vae")
    e, tokens = value.head(patches.transpose(1, 2).unflatten(2, (4, 4)))
    wanted = reward.embed(x)
    torch.testing.assert_close(e, wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, wanted[1], atol=1e-5, rtol=0)
    assert (value.cls is None) == (j == 1)


def stitched(sd3, reward, j=1, i=2, **kwargs):
    """A value model on the first i blocks, with random null text; the correction G is on, as after training."""
    null = [v[:1] for v in inputs(seed=5)[2:]]
    cls = torch.randn(1, 64) if j > 1 else None
    value = common.StitchedValue(sd3, null, reward, random_stitch(32), i, j, cls, **kwargs)
    torch.nn.init.normal_(value.stitch.G[-1].weight, std=0.1)
    return value


def test_features_are_the_null_texts_tokens(sd3, reward):
    """(B, d, h, w) in row-major order, float32 also from a bfloat16 transformer; a state that is further back is resumed."""
    value = stitched(sd3, reward)
    z, sigma, _, _ = inputs()
    text, pooled = (v.expand(3, *v.shape[1:]) for v in value.null)
    features, state = value.features(z, sigma)
    h = common.run_blocks(sd3, common.begin(sd3, z, sigma, text, pooled), 2)["h"]
    assert state["i"] == 2 and features.shape == (3, 32, *GRID)
    assert torch.equal(features[:, :, 3, 1], h[:, 3 * GRID[1] + 1])
    resumed = value.features(None, None, common.run_blocks(sd3, common.begin(sd3, z, sigma, text, pooled), 1))
    assert torch.equal(resumed[0], features)
    half = stitched(copy.deepcopy(sd3).bfloat16(), reward).features(z, sigma)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, features, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("j", [1, 2])
def test_gradient_reaches_z_and_only_what_is_trained(sd3, reward, j):
    """The gradient in z agrees with finite differences. The transformer is neither trained nor saved; of the tower, only what is used is."""
    value = stitched(sd3, reward, j)
    z, sigma, _, _ = inputs(2)
    text = F.normalize(torch.randn(2, 64), dim=-1)
    z.requires_grad_()
    value(z, sigma, text).sum().backward()
    with torch.no_grad():
        direction = torch.randn_like(z)
        change = sum(s * value(z + s * 1e-2 * direction, sigma, text).double().sum() for s in (1, -1)) / 2e-2
    assert float((z.grad * direction).sum()) == pytest.approx(float(change), rel=2e-2)
    assert all(p.grad is None for p in sd3.parameters())
    assert not {id(p) for p in sd3.parameters()} & {id(p) for p in value.parameters()}
    assert all(k.startswith(("stitch.", "visual.")) or k == "cls" for k in value.state_dict())
    for name, p in value.named_parameters():
        entering = name.startswith(("visual.class_embedding", "visual.positional_embedding", "visual.ln_pre"))
        unused = name == "visual.conv1.weight" or j > 1 and (entering or name.startswith("visual.transformer.resblocks.0."))
        assert p.requires_grad is not unused, name
        assert p.grad is None if unused else p.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in reward.model.parameters())


@pytest.mark.parametrize("i", [1, 2, 3])
def test_keep_blocks_leaves_the_value_alone(transformer, reward, i):
    """V needs the first i blocks only, of either class and either kind; a denoiser call, which needs them all, fails."""
    transformer, (z, sigma, text, pooled) = copy.deepcopy(transformer), inputs()
    value = stitched(transformer, reward, i=i)
    before, size = value.embed(z, sigma), sum(p.numel() for p in transformer.parameters())
    common.keep_blocks(transformer, i)
    assert torch.equal(value.embed(z, sigma), before)
    assert len(common.dit_blocks(transformer)) == i and sum(p.numel() for p in transformer.parameters()) < size
    with pytest.raises(TypeError):
        common.velocity(transformer, z, sigma, (text, pooled))


def test_embedding_kinds_and_score(sd3, reward):
    """'unit' has norm 1, 'mean' is the raw embedding over `norm`; the value is the product with the text, one for all or one for each."""
    z, sigma, _, _ = inputs()
    unit, mean, raw = (stitched(sd3, reward, **kw) for kw in (dict(embedding="unit"), dict(norm=2.5), dict()))
    e = raw.embed(z, sigma)
    torch.testing.assert_close(unit.embed(z, sigma).norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(unit.embed(z, sigma), e / e.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(mean.embed(z, sigma), e / 2.5)
    text = torch.randn(3, 64)
    torch.testing.assert_close(mean(z, sigma, text), torch.einsum("be,be->b", e / 2.5, text))
    torch.testing.assert_close(mean(z, sigma, text[0]), e / 2.5 @ text[0])


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


# ---------------------------------------------------------------------------- a whole pipeline folder
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small random SD3 pipeline on disk, as train.py saves the miniature's, with a scale and a shift that matter."""
    from diffusers import AutoencoderKL
    torch.manual_seed(4)
    transformer, text = train.build_generator(dict(width=64, num_layers=2, head=32, dual=1))
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
                        mid_block_add_attention=False, sample_size=64, scaling_factor=1.5, shift_factor=0.25)
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    train.save_sd3(shaken(transformer), [shaken(m) for m in text], shaken(vae), folder)
    return folder, [m.float() for m in text], vae.float()


@pytest.fixture(scope="module")
def backbone(pipeline):
    return common.Backbone(str(pipeline[0]))


def test_prompts_are_encoded_as_in_training(pipeline, backbone):
    """The saved pipeline's own encode_prompt gives what the generator was trained with, padding and the absent T5 included."""
    prompts = ["a red circle", "", "two small blue stars on a white background"]
    for found, wanted in zip(common.encode_prompts(backbone, prompts, batch=2), train.encode_text(pipeline[1], train.tokenise(prompts))):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_flux_is_saved_and_read_as_it_was_trained(pipeline, tmp_path):
    """Its own encode_prompt gives train.py's conditions, and the loaded transformer its velocities at any guidance."""
    torch.manual_seed(6)
    transformer, text = train.build_flux()
    train.save_flux(shaken(transformer), [shaken(m) for m in text], copy.deepcopy(pipeline[2]), tmp_path / "tiny-flux")
    backbone, prompts = common.Backbone(str(tmp_path / "tiny-flux")), ["a red circle", "", "two small blue stars on a white background"]
    condition = common.encode_prompts(backbone, prompts, batch=2)
    for found, wanted in zip(condition, train.encode_flux([m.float() for m in text], train.tokenise_flux(prompts))):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    z, sigma = torch.randn(3, 16, 8, 8), torch.tensor([0.2, 0.6, 0.9])
    u = [backbone.velocity(z, sigma, condition, guidance=g) for g in (1.0, 3.5, torch.tensor([1.0, 1.0, 3.5]))]
    assert (u[0] - u[1]).abs().max() > 1e-3
    torch.testing.assert_close(u[2], torch.cat([u[0][:2], u[1][2:]]))
    torch.testing.assert_close(u[0], common.velocity(transformer.float(), z, sigma, condition, guidance=1.0))


def test_a_grown_generator_begins_as_the_small_one():
    """Not quite: the layer norms divide by the new, empty channels as well."""
    torch.manual_seed(7)
    (small, text), (large, _) = (train.build_generator(dict(width=width, num_layers=n, head=width // 4, dual=1)) for width, n in ((64, 2), (72, 4)))
    shaken(small)
    z, sigma, condition = torch.randn(3, 16, 8, 8), torch.tensor([0.2, 0.6, 0.9]), train.encode_text(text, train.tokenise(["a red circle"] * 3))
    before = common.velocity(large, z, sigma, condition)
    train.grow(large, small)
    wanted, grown = (common.velocity(m, z, sigma, condition) for m in (small, large))
    assert (before - wanted).norm() > 0.8 * wanted.norm() and (grown - wanted).norm() < 0.4 * wanted.norm()


def test_latents_are_shifted_and_scaled(pipeline, backbone):
    """z = (mean - shift) scale and back; images are in [0, 1]; the gradient passes the decoder."""
    x = torch.rand(2, 3, 64, 64)
    mean = pipeline[2].encode(2 * x - 1).latent_dist.mean
    z = backbone.encode_image(x).requires_grad_()
    torch.testing.assert_close(z, (mean - 0.25) * 1.5)
    image = backbone.decode(z)
    torch.testing.assert_close(image, (pipeline[2].decode(mean).sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    image.square().sum().backward()
    assert z.grad.abs().amax((1, 2, 3)).min() > 0


def test_a_saved_value_is_loaded_again(tmp_path, backbone, reward):
    """value.pt gives back the same value on the same latents; another reward or another latent space is refused."""
    null = common.encode_prompts(backbone, [""])
    value = common.StitchedValue(backbone.transformer, null, reward, random_stitch(64), 1, 2, torch.randn(1, 64), norm=2.0)
    with torch.no_grad():
        for p in value.parameters():
            p += 0.05 * torch.randn_like(p) if p.requires_grad else 0
    spec = dict(backbone=backbone.name, reward=reward.name, latent_space=backbone.latent_space(), front="dit", i=1, j=2, embedding="mean", reward_grid=[4, 4], antialias=False)
    save = lambda **changed: common.save_artifact(tmp_path / "value.pt", "03_finetune", argparse.Namespace(seed=0, preset="mini"), spec | changed,
                                                  dict(state=value.trained_state(), null=list(null), norm=2.0))
    save()
    loaded, _ = common.load_value(tmp_path / "value.pt", backbone, reward)
    z, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.9, 0.3])
    torch.testing.assert_close(loaded.embed(z, sigma), value.embed(z, sigma), atol=1e-5, rtol=0)  # frozen, the attention takes torch's fast path
    assert not any(p.requires_grad for p in loaded.parameters())
    for changed in (dict(reward="other"), dict(latent_space="4 channels")):
        save(**changed)
        with pytest.raises(SystemExit, match="does not fit"):
            common.load_value(tmp_path / "value.pt", backbone, reward)


# ---------------------------------------------------------------------------- images
GREY = np.linspace(0, 255, 48).round().astype(np.uint8)  # a ramp from left to right
RAMP = np.broadcast_to(GREY, (32, 48))


def test_read_image_grey(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "l.png")
    image = common.read_image(tmp_path / "l.png")
    assert image.mode == "RGB" and image.size == (48, 32) and (np.asarray(image) == RAMP[..., None]).all()


def test_read_image_keeps_a_16_bit_ramp(tmp_path):
    """convert("RGB") alone would clip at 255 of 65535: white but for the first pixel."""
    wide = np.linspace(0, 65535, 48).round().astype(np.uint16)
    Image.fromarray(np.broadcast_to(wide, (32, 48))).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as raw:
        assert raw.mode.startswith("I")
    image = common.read_image(tmp_path / "16.png")
    assert image.mode == "RGB"
    assert abs(np.asarray(image).astype(int) - RAMP[..., None]).max() <= 1


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_read_image_lays_transparency_on_white(tmp_path, kind):
    """The left half is transparent black; dropping alpha would show it black."""
    alpha = np.where(np.arange(48) < 24, 0, 255).astype(np.uint8) * np.ones((32, 1), np.uint8)
    colour = np.stack([alpha // 255 * 200, alpha // 255 * 200, alpha // 255 * 200, alpha], -1)
    image = Image.fromarray(colour, "RGBA")
    if kind in ("P", "RGB"):  # one colour of the palette, or one value, is declared transparent
        image = Image.fromarray(colour[..., :3]).convert(kind, palette=Image.Palette.ADAPTIVE)
        transparent = image.getpixel((0, 0))
        image.save(tmp_path / "a.png", transparency=transparent)
    else:
        image.convert(kind).save(tmp_path / "a.png")
    found = np.asarray(common.read_image(tmp_path / "a.png"))
    assert found.shape == (32, 48, 3) and (found[:, :24] == 255).all() and (found[:, 24:] == 200).all()


def test_read_image_half_transparent(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(tmp_path / "a.webp", lossless=True)
    assert abs(np.asarray(common.read_image(tmp_path / "a.webp")).astype(int) - 204).max() <= 1


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("RGB", "a.webp"), ("RGB", "a.jpg")])
def test_read_image_colours(tmp_path, mode, name):
    """Red stays red within the codec's loss, also from four inks."""
    Image.new("RGB", (48, 32), (220, 40, 40)).convert(mode).save(tmp_path / name, quality=95)
    with Image.open(tmp_path / name) as raw:
        assert raw.mode == mode
    image = common.read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (48, 32)
    assert abs(np.asarray(image).astype(int) - (220, 40, 40)).max() <= 8


def test_read_image_applies_exif_rotation(tmp_path):
    """Orientation 6: the camera lay on its side, the stored left edge is the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = np.asarray(common.read_image(tmp_path / "a.jpg")).astype(int)
    assert image.shape == (48, 32, 3) and abs(image - GREY[:, None, None]).max() <= 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_read_image_raises_on_truncated_files(tmp_path, suffix):
    """Half a file is an OSError or a ValueError, which callers catch, and not half an image."""
    path = tmp_path / f"a{suffix}"
    Image.fromarray(smooth_image(64, 64).permute(1, 2, 0).numpy()).save(path)
    whole = path.read_bytes()
    for part in (0, 3, len(whole) // 4, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:part])
        with pytest.raises((OSError, ValueError)):
            common.read_image(path)


def test_read_image_raises_on_a_broken_png_chunk(tmp_path):
    """A pixel chunk that claims to be shorter than it is: PIL's own error for it is a SyntaxError."""
    Image.fromarray(smooth_image(64, 64).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    at = data.index(b"IDAT")
    data[at - 4:at] = struct.pack(">I", 100)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises((OSError, ValueError)):
        common.read_image(tmp_path / "a.png")


def test_read_image_raises_on_a_decompression_bomb(tmp_path):
    """A header of 40,000 x 40,000 pixels: PIL refuses it with an error of its own class."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 40000, 40000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises((OSError, ValueError)):
        common.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("w, h", [(64, 64), (48, 32), (31, 97), (200, 3), (1, 5), (65, 64), (513, 769)])
def test_square(w, h):
    """Any aspect ratio gives (3, size, size): the centre, undistorted, of a ramp along the longer side; at most half a pixel off."""
    n, scale = max(w, h), 32 / min(w, h)
    ramp = np.linspace(0, 255, n).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :] if w > h else ramp[:, None], (h, w))
    x = common.square(Image.fromarray(np.stack([pixels] * 3, -1)), 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.uint8 and x.is_contiguous()
    x = (x if w > h else x.transpose(1, 2)).float()
    assert (x == x[:1, :1]).all()
    centres = n / 2 + (torch.arange(32) - 15.5) / scale - 0.5  # in pixels of the original
    assert (x[0, 0] - 255 * centres / (n - 1)).abs().max() <= 0.51 / scale * 255 / (n - 1) + 2


def test_square_leaves_a_fitting_image_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (common.square(Image.fromarray(pixels), 32).permute(1, 2, 0).numpy() == pixels).all()


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt", "d.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert common.list_images(tmp_path) == ["a.jpg", "b.PNG", "d.jpeg", "deep/c.webp"]
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        common.list_images(tmp_path / "nowhere")


# ---------------------------------------------------------------------------- artefacts
@pytest.fixture
def saved(tmp_path):
    """An artefact with a parent, as a stage writes it: (path, id)."""
    args = argparse.Namespace(seed=7, preset="mini", out=str(tmp_path), lr=1e-4, layers=[1, 2])
    path = tmp_path / "stitch.pt"
    data = dict(W=torch.arange(6.0).view(2, 3), rows=[dict(i=1, name="a")], cls=None)
    return path, common.save_artifact(path, "02_fit_stitch", args, dict(reward="clip", i=4, grid=(4, 4)), data, [dict(stage="01", id="abc")])


def test_artifact_round_trip(saved):
    """Readable without running code from the file, with what was put in and where it comes from."""
    path, id = saved
    raw = torch.load(path, weights_only=True)
    artifact = common.load_artifact(path, dict(reward="clip", i=4, grid=(4, 4)), "02_fit_stitch.py")
    assert raw["id"] == artifact["id"] == id and artifact["stage"] == "02_fit_stitch" and artifact["format"] == common.FORMAT
    assert torch.equal(artifact["data"]["W"], torch.arange(6.0).view(2, 3))
    assert artifact["data"]["rows"] == [dict(i=1, name="a")] and artifact["data"]["cls"] is None
    assert artifact["config"]["lr"] == 1e-4 and artifact["parents"] == [dict(stage="01", id="abc")]
    assert artifact["provenance"]["seed"] == 7 and torch.__version__.startswith(artifact["provenance"]["torch"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_misfit_is_refused_with_a_table(saved):
    """The message names what differs, both values and the command; what agrees is not in it."""
    path, _ = saved
    with pytest.raises(SystemExit) as e:
        common.load_artifact(path, dict(reward="hpsv2", i=4, grid=(9, 9)), "02_fit_stitch.py")
    lines = str(e.value).splitlines()
    assert lines[0] == f"error: {path} does not fit this run"
    assert [line.split() for line in lines[2:4]] == [["reward", "clip", "hpsv2"], ["grid", "(4,", "4)", "(9,", "9)"]]
    assert f"python 02_fit_stitch.py --out {path.parent}" in lines[-1]
    assert not any(line.split()[0] == "i" for line in lines)


def test_a_key_that_the_file_lacks_is_a_misfit(saved):
    with pytest.raises(SystemExit, match=r"latent_space\s+None\s+16 channels"):
        common.load_artifact(saved[0], dict(latent_space="16 channels"), "02_fit_stitch.py")


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


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9], ids=lambda k: f"{k:.0%}")
def test_a_truncated_file_is_refused(saved, keep):
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep * len(whole))])
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("content", [[1, 2], dict(spec={}), dict(format=common.FORMAT, spec={}, provenance=dict(command=""), data=argparse.Namespace())],
                         ids=["list", "half a dict", "pickled class"])
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "stitch.pt")
    assert "cannot be read" in refused(tmp_path / "stitch.pt")


def test_another_format_is_refused(saved):
    path, _ = saved
    torch.save(torch.load(path, weights_only=True) | dict(format=99), path)
    assert "format 99" in refused(path)


def test_replacing_leaves_nothing_behind(tmp_path):
    """A failure while writing keeps the old file and no half one; without a failure the new content is in place."""
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
