"""Prices a stage at published size, without weights or data: what --dry-run of every stage starts.

    python 05_dps.py --dry-run --preset paper --backbone flux --reward hpsv2 --tflops 200

The published models are built on PyTorch's meta device, which has shapes and no numbers, and the
stage's own step functions run on them. TFLOP are 2 x multiply-adds of matrix products,
convolutions and attention, the latter as flash attention, which is what a GPU runs. The preset is
24gb where none or mini is given. The last line printed is the table as one JSON object.
"""

import argparse
import importlib
import json
import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64)
SD3 |= dict(joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm")
MEDIUM = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
MEDIUM |= dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
LARGE = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
LARGE |= dict(pos_embed_max_size=192)
FLUX = dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38)
FLUX |= dict(attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096)
FLUX |= dict(pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
# the published transformers: class, config, scale and shift of the latents, text tokens
CONFIGS = {
    "sd3.5-medium": ("SD3Transformer2DModel", SD3 | MEDIUM, (1.5305, 0.0609), 333),
    "sd3.5-large": ("SD3Transformer2DModel", SD3 | LARGE, (1.5305, 0.0609), 333),
    "flux": ("FluxTransformer2DModel", FLUX, (0.3611, 0.1159), 512),
}
VAE = dict(in_channels=3, out_channels=3, latent_channels=16, layers_per_block=2)
VAE |= dict(block_out_channels=(128, 256, 512, 512), sample_size=1024)
VAE |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
VAE |= dict(use_quant_conv=False, use_post_quant_conv=False)
# where a value is cut: the paper's choice for CLIP on SD 3.5 Medium, and a late one
CUTS = (4, 12)
TRAINING_IMAGES = 100_000
DRAWBENCH = 200  # prompts
CARDS = (24, 48, 80)  # GB
GIB = 2**30


# ---------------------------------------------------------------------------- models
def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def meta_backbone(name, dtype=torch.bfloat16):
    """A published Backbone of shapes only, and its null text."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    name = {hub: short for short, hub in common.HUB.items()}.get(name, name)
    if name not in CONFIGS:
        common.fail(f"--dry-run knows the published sizes of {', '.join(CONFIGS)}, not {name}")
    kind, config, (scale, shift), tokens = CONFIGS[name]
    backbone = common.Backbone.__new__(common.Backbone)
    backbone.name = name
    backbone.device = torch.device("meta")
    backbone.dtype = dtype
    backbone.transformer_class = getattr(diffusers, kind)
    dynamic = dict(shift=3.0, use_dynamic_shifting=name == "flux")
    backbone.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dynamic)
    with backbone.device:
        transformer = backbone.transformer_class(**config).to(dtype)
        vae = diffusers.AutoencoderKL(**VAE, scaling_factor=scale, shift_factor=shift)
    backbone.transformer = transformer.eval().requires_grad_(False)
    backbone.vae = vae.eval().requires_grad_(False)
    text = meta(1, tokens, config["joint_attention_dim"], dtype=dtype)
    return backbone, (text, meta(1, config["pooled_projection_dim"], dtype=dtype))


class Published:
    """What a stage works with, on the meta device: models, one latent z and its sigma, texts."""

    def __init__(self, args, names):
        self.backbone, self.null = meta_backbone(args.backbone, getattr(torch, args.dtype))
        self.rewards = [common.Reward(n, args.preset, "meta", weights=False) for n in names]
        self.transformer = self.backbone.transformer
        self.vae = self.backbone.vae
        self.towers = [reward.model for reward in self.rewards]
        self.z = meta(1, *self.backbone.latent_shape(args.resolution))
        self.sigma = meta(1)
        self.texts = [meta(1, reward.visual.output_dim) for reward in self.rewards]
        self.models = [self.transformer, self.vae, *self.towers]  # of which parameters are printed

    def values(self, i):
        """The rewards' values after block i (0: of the latent itself), before reward block 1."""
        return [self.value(reward, i).requires_grad_(False) for reward in self.rewards]

    def value(self, reward, i):
        width, front = reward.visual.conv1.out_channels, "dit" if i else "vae"
        channels = self.transformer.inner_dim if i else VAE["latent_channels"]
        with torch.device("meta"):
            stitch = common.Stitch(meta(width, channels), meta(width), reward.visual.grid_size)
            given = self.transformer, self.null, reward, stitch, i, 1
            return common.StitchedValue(*given, front=front)


# ---------------------------------------------------------------------------- counting
def storages(modules):
    """{address: storage} of the distinct parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def gib(modules):
    return sum(s.nbytes() for s in storages(modules).values()) / GIB


def flash(query, key, value, *_, **__):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def count(step, weights=()):
    """(TFLOP, GiB that autograd keeps besides these weights) of step() on the meta device."""
    weights, kept = storages(weights), {}

    def keep(t):  # the storage is held on to: a freed one's address would be used again
        if t.untyped_storage()._cdata not in weights:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        FlopCounterMode(display=False) as counter,
    ):
        step()
    return counter.get_total_flops() / 1e12, sum(s.nbytes() for s in kept.values()) / GIB


def case(method, unit, n, cost, models=(), states=0.0, **more):
    """A row: cost is (TFLOP of a unit, GiB kept for the backward pass), n units are a whole run.

    peak_gib: the models' weights, what is kept, `states`: GiB of gradients, optimiser, averages.
    """
    tflop, saved = cost
    row = dict(method=method, unit=unit, tflop=float(tflop), saved_gib=float(saved))
    return row | dict(peak_gib=gib(models) + states + float(saved), n=n, **more)


def report(args, stage, cases, models):
    """Print the cases as a table and as the closing JSON line."""
    parameters = {id(p): p for m in models for p in m.parameters()}.values()
    learns = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    frozen = sum(p.numel() for p in parameters) / 1e6 - learns
    pair = f"{args.backbone} + {args.reward} at {args.resolution} px, published size, {args.dtype}"
    print(f"{pair}: {learns:,.1f} M trained, {frozen:,.0f} M frozen parameters")
    for c in cases:
        c["hours"] = c["tflop"] * c["n"] / c.get("tflops", args.tflops) / 3600
        fits = [f"{card} GB" for card in CARDS if c["peak_gib"] < 0.95 * card * 1e9 / GIB]
        c["fits"] = (fits or ["no card of 80 GB"])[0]
    keys = ("method", "unit", "tflop", "saved_gib", "peak_gib", "fits", "n", "hours")
    common.print_table(cases, keys)
    where = ", in float64 on the CPU" if "tflops" in cases[0] else " (--tflops)"
    speed = f"{cases[0].get('tflops', args.tflops):g} TFLOP/s{where}"
    peak = "weights, optimiser and what the backward pass keeps, without text encoders"
    print(f"hours at {speed}; peak: {peak}, which are freed before")
    about = dict(backbone=args.backbone, reward=args.reward, resolution=args.resolution)
    print(json.dumps(dict(stage=stage, **about, cases=cases)))


# ---------------------------------------------------------------------------- the stages
@torch.no_grad()
def cases_01(args, stage, models):
    backbone, reward = models.backbone, models.rewards[0]
    x = meta(args.batch, 3, args.resolution, args.resolution)
    z = models.z.to(backbone.dtype).expand(args.batch, -1, -1, -1)

    def latents():
        backbone.encode(x)
        reward.resize(x)

    def probe():
        grid = reward.visual.grid_size
        stage.dit_features(backbone.transformer, z, z[:, 0, 0, 0].float(), models.null, grid)
        stage.tokens_by_depth(reward.visual, reward.normalise(reward.resize(x)), args.j_max)

    images = args.limit or TRAINING_IMAGES
    for name, step, n in (("latents", latents, images), ("probe set", probe, args.probe)):
        tflop, saved = count(step)
        used = [models.vae] if step is latents else [models.transformer, *models.towers]
        yield case(name, "image", n, (tflop / args.batch, saved), used)


def cases_02(args, stage, models):
    """By formula, no network runs: SVD takes 4 M D^2 + 8 D^3 (Golub & Van Loan, Sec. 5.5)."""
    visual, D = models.rewards[0].visual, models.transformer.inner_dim
    d, M = visual.conv1.out_channels, 200 * visual.grid_size[0] ** 2
    cost = (4 * M * D * D + 8 * D**3 + 4 * M * D * d) / 1e12, 0.0
    pairs = 4 * len(common.dit_blocks(models.transformer))
    models.models = []
    matrices = 8 * M * (2 * D + 2 * d) / GIB
    yield case("closed form", "(i, j)", pairs, cost, states=matrices, tflops=0.2)


def cases_03(args, stage, models):
    """A step of training from cached latents, at the late cut first: the rest is dropped."""
    reward = models.rewards[0]
    batch = min(args.micro_batch or args.batch, args.batch)
    z = models.z.expand(batch, -1, -1, -1)
    t, pixels = meta(batch), meta(batch, 3, reward.size, reward.size)
    steps = args.steps or math.ceil(args.epochs * TRAINING_IMAGES / args.batch)
    for i in (0,) if args.front == "vae" else sorted(CUTS, reverse=True):
        common.keep_blocks(models.transformer, i)
        value = models.value(reward, i)
        models.models = [*[models.transformer][: i > 0], reward.visual, value]
        learns = sum(p.numel() for p in value.parameters() if p.requires_grad)
        states = 12 * learns / GIB + gib(models.models)  # float32 gradient, AdamW's two moments
        # stands for autocast, which the meta device lacks
        value.bfloat16().stitch.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))

        def step(value=value):
            target = stage.clean_target(reward, pixels)
            stage.step_loss(value, reward, z, t, target, lam_tok=args.lam_tok)[0].backward()

        tflop, saved = count(step, models.models)
        name = f"stitchvm, i = {i}" if i else "vae-stitch"
        cost = (tflop * args.batch / batch, saved)
        yield case(name, f"step of {args.batch}", steps, cost, states=states)


@torch.no_grad()
def cases_04(args, stage, models):
    backbone, reward = models.backbone, models.rewards[0]
    z, sigma, given = models.z, models.sigma, (backbone, reward, models.null, models.z)
    grid = backbone.grid(args.rollout_steps, args.resolution)
    rollout = partial(stage.rollout_embeddings, *given, 0.5, grid, 1, common.generator(0), 1)
    values = {f"stitchvm, i = {i}": models.values(i)[0] for i in CUTS}
    calls = {name: partial(value.embed, z, sigma) for name, value in values.items()}
    calls |= {"tweedie": partial(stage.tweedie_embed, *given, sigma), "mc-1": rollout}
    for name, call in calls.items():
        used = [models.transformer, *models.towers, values.get(name, models.vae)]
        # five sigmas, two draws, COCO's 5,000 images
        yield case(name, "value at sigma 0.5", 5 * 2 * 5000, count(call), used)


def cases_05(args, stage, models):
    backbone, rewards, texts = models.backbone, models.rewards, models.texts
    distilled = models.transformer.config.get("guidance_embeds")
    cfg = (1.0 if distilled else 4.5) if args.cfg is None else args.cfg
    given = models.z, models.sigma
    flow = partial(backbone.velocity, condition=models.null, null=models.null, cfg=cfg)
    weights = [models.transformer, models.vae]
    steps = {"flow": (torch.no_grad()(flow), weights)}
    for more in ("", ", checkpointing"):
        velocity = partial(flow, checkpointing=bool(more))
        step = partial(stage.tweedie_gradient, velocity, backbone.decode, rewards, texts)
        steps[f"tweedie{more}"] = step, weights + models.towers
    for i in CUTS:
        values = models.values(i)
        for more in ("", ", shared") if cfg != 1 else ("",):
            share = models.transformer if more else None
            step = partial(stage.stitchvm_gradient, flow, values, texts, share=share)
            steps[f"stitchvm, i = {i}{more}"] = step, weights + values
    plain = None
    for name, (step, used) in steps.items():
        models.vae.disable_gradient_checkpointing()
        if name.endswith("checkpointing"):
            models.vae.enable_gradient_checkpointing()
        cost = count(partial(step, *given), used)
        plain = plain or cost[0]
        yield case(name, "step", args.steps * DRAWBENCH, cost, used, of_flow=cost[0] / plain)


def rows_per_prompt(steer, settings, N, steps, guided):
    """Rows of each model that one prompt takes, by running steer() itself on counting fakes."""
    rows = dict(denoiser=0, shared=0, value=0, score=N)  # the N clean images are scored
    grid = torch.linspace(1, 0, steps + 1).tolist()

    def tell(kind, n):
        rows[kind] += n
        return torch.zeros(n)

    def denoise(z, t, prefix):
        tell("denoiser", len(z) * (1 + guided))
        tell("shared", len(z) * bool(prefix))
        return torch.zeros_like(z)

    def value(z, t):  # its prefix goes on as the null half of a guided denoiser
        return tell("value", len(z)), dict(i=0) if guided else None

    draws = lambda k, M: torch.zeros(1, N, M, 1), lambda k: torch.full((2, 1, N), 0.5)
    functions = dict(score=lambda z: tell("score", len(z)), value=value)
    steer(torch.zeros(1, N, 1), grid, denoise, *draws, lam=1.0, **functions, **settings)
    return rows


@torch.no_grad()
def cases_06(args, stage, models):
    backbone, rewards, z, sigma = models.backbone, models.rewards, models.z, models.sigma
    stage.complete(args, backbone.name == "flux")
    used = [models.transformer, models.vae, *models.towers]
    x = meta(1, 3, args.resolution, args.resolution)
    costs = dict(denoiser=count(partial(backbone.velocity, z, sigma, models.null))[0])
    costs["score"] = count(partial(backbone.decode, z))[0]
    costs["score"] += sum(count(partial(reward.embed, x))[0] for reward in rewards)
    for i in CUTS:
        values = models.values(i)
        costs["value"] = count(partial(common.joint_value, values, z, sigma, models.texts))[0]
        costs["shared"] = -count(partial(values[0].features, z, sigma))[0]
        for run in stage.plan(args):
            own = values if run["method"] == "fks+stitchvm" else []
            if i != CUTS[0] and not own:
                continue
            settings = stage.settings(run, args)
            rows = rows_per_prompt(stage.steer, settings, run["N"], args.steps, args.cfg != 1)
            tflop = sum(n * costs[kind] for kind, n in rows.items())
            name = stage.label(run, args) + f" N={run['N']}" + (f", i = {i}" if own else "")
            yield case(name, "prompt", DRAWBENCH, (tflop, 0.0), used + own)


def cases_07(args, stage, models):
    """Work and memory of draft_loss() are sums over its steps, read off two short rollouts."""
    z, one = models.z, models.sigma
    values = {i: models.values(i) for i in CUTS}
    weights = [*models.models, *sum(values.values(), [])]
    given = dict(backbone=models.backbone, rewards=models.rewards)
    functions = partial(stage.step_functions, **given, condition=models.null, texts=models.texts)

    def end(score):
        score(z.clone().requires_grad_(), one).sum().backward()

    score = {}  # before the LoRA, which a value does not see; 0: of the decoded image
    for i in (0, *CUTS):
        score[i] = count(partial(end, functions(values=values.get(i, []))[2]), weights)
    with torch.device("meta"):
        lora = stage.add_lora(models.transformer, args.rank, args.alpha)
    velocity, base, _ = functions(values=[])
    again, _, _ = functions(values=[], checkpointing=True)

    def draft(steps):
        given = z, [1.0, 0.5, 0.0], steps, steps, args.regularise
        stage.draft_loss(velocity, base, lambda z, sigma: z, *given)[0].backward()

    first, both = (np.array(count(partial(draft, steps), weights)) for steps in (1, 2))
    plain = count(partial(torch.no_grad()(velocity), z, one))[0]
    less, more = (count(partial(f, z, one), weights)[1] for f in (again, velocity))
    extra = np.array([plain, less - more])  # of checkpointing, for each kept step
    states = 16 * sum(p.numel() for p in lora) / GIB  # gradient, two moments, average; float32
    n = args.batch * args.accumulate * (args.updates or 0)
    for name, method in stage.check(args).items():
        keep, stops = method["keep"], method["stops"]
        stop = sum(stops) / 2 if stops else args.steps
        mean, most = keep or args.steps / 2, keep or args.steps - 1  # AlignProp's is uniform
        for i in CUTS if stops else (0,):
            for checks in (False, True) if keep else (True,):
                kept = {
                    k: first + (k - 1) * (both - first) + checks * k * extra for k in (mean, most)
                }
                tflop = (stop - mean) * plain + kept[mean][0] + score[i][0]
                saved = (kept[most][1] + score[i][1]) * args.batch
                label = name + (f", i = {i}" if i else "") + ", checkpointing" * checks
                used = models.models + values.get(i, [])
                yield case(label, "sample", n, (tflop, saved), used, states)


def cases_08(args, stage, models):
    stage.check(args)
    backbone, z, one = models.backbone, models.z, models.sigma
    values = {i: models.values(i) for i in CUTS}
    ends = {i: partial(common.joint_value, v, z, one, models.texts) for i, v in values.items()}
    ends[0] = lambda: common.clean_reward(models.rewards, models.texts, backbone.decode(z))
    add_lora = partial(stage.add_lora, models.transformer, args.rank, args.alpha)
    with torch.no_grad(), torch.device("meta"):
        last = {i: count(end)[0] for i, end in ends.items()}  # no value sees the LoRA
        state = common.begin(models.transformer, z.to(backbone.dtype), one, *models.null)
        lora = [add_lora(name) for name in stage.POLICIES]
        step = count(partial(backbone.velocity, z, one, models.null))[0]
    velocity = stage.policy_velocity(backbone, models.null)

    def train():
        losses = stage.train_loss(velocity, z, one, z, one, one, args.loss, args.beta, args.kl)
        sum(losses).sum().backward()

    tflop, saved = count(train, [models.transformer])
    blocks = len(common.dit_blocks(models.transformer))
    inputs = blocks * (state["h"].nbytes + state["c"].nbytes) / GIB  # and one block at a time
    trained = {False: (tflop, saved), True: (tflop + step, inputs + saved / blocks)}
    states = 12 * sum(p.numel() for p in lora[0]) / GIB  # float32 gradient, AdamW's two moments
    stops = range(args.stop[0], args.stop[1] + 1)
    mean, times = sum(stops) / len(stops), args.train_times
    below = sum(min(times, stop) for stop in stops) / len(stops)
    kinds = [("nft", 0, args.steps, times)]
    kinds += [(f"nft+stitchvm, i = {i}", i, mean, below) for i in CUTS]
    kinds += [("nft+stitchvm, i = 4, as many noise levels as nft", 4, mean, times)]
    kinds += [("nft, rollout and reward only", 0, args.steps, 0)]
    kinds += [("nft+stitchvm, i = 4, rollout and value only", 4, mean, 0)]
    n = (args.updates or 0) * args.prompts * args.images
    for name, i, steps, levels in kinds:
        for checks in (False, True) if levels else (False,):
            tflop, saved = trained[checks] if levels else (0.0, 0.0)
            cost = (steps * step + last[i] + levels * tflop, args.batch * saved)
            used = models.models + values.get(i, [])
            yield case(name + ", checkpointing" * checks, "sample", n, cost, used, states)


# ---------------------------------------------------------------------------- the shell
def parse(argv):
    """The stage's module and its flags."""
    p = argparse.ArgumentParser("price.py", add_help=False, allow_abbrev=False)
    p.add_argument("stage", help="file of a stage")
    p.add_argument("--dry-run", action="store_true")
    p.add_argument("--preset", default="24gb")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--tflops", type=float, default=150, help="what a card sustains")
    own, rest = p.parse_known_args(argv)
    stage = importlib.import_module(Path(own.stage).stem)
    given = ["--preset", own.preset.replace("mini", "24gb"), "--dtype", own.dtype, *rest]
    args = stage.parse_args([*given, "--device", "cpu"])
    args.tflops = own.tflops
    return stage, args


def main(argv):
    stage, args = parse(argv)
    number = stage.__name__[:2]
    models = Published(args, args.reward.split("+") if number >= "05" else [args.reward])
    cases = list(globals()[f"cases_{number}"](args, stage, models))
    report(args, stage.__name__, cases, models.models)


if __name__ == "__main__":
    main(sys.argv[1:])
