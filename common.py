"""What the eight stages share: loading and cutting models, noise, the stitched value model, images, artefacts.

Convention everywhere: t = sigma runs from 0 (clean) to 1 (noise), z_t = (1-t) z_0 + t eps, velocity u = eps - z_0,
one-step estimate (Tweedie) zhat_0 = z_t - t u. Latents are (B, C, h, w), sigma is (B,), images are (B, 3, H, W).
i counts the diffusion blocks already applied (1..L); j is the 1-based index of the first reward block that is kept.
"""
import argparse
import contextlib
import copy
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cached_property
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

ROOT = Path(__file__).resolve().parent
FORMAT = 1
# A world is a place where names are looked up: folders of models and data, and the script that makes the data when it is missing.
WORLDS = {"mini": dict(models="tests/mini", data="tests/mini/data", maker="tests/mini/draw.py", checker="tests/mini/draw.py",
                       scorers=("clip", "dfn-clip", "hpsv2", "aesthetic", "judge"))}
SCORERS = ("clip", "dfn-clip", "hpsv2", "aesthetic", "pickscore", "imagereward")  # of published worlds
HUB = {"sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium", "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
       "flux": "black-forest-labs/FLUX.1-dev"}
# open_clip's architecture and, as its authors published them, the weights: a tag of open_clip, or (hub repository, file)
REWARDS = {"clip": ("ViT-L-14-336-quickgelu", "openai"), "dfn-clip": ("ViT-H-14-378-quickgelu", "dfn5b"),
           "hpsv2": ("ViT-H-14", ("xswu/HPSv2", "HPS_v2_compressed.pt")), "hpsv2.1": ("ViT-H-14", ("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
           "aesthetic": ("ViT-L-14-quickgelu", "openai")}
SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm")
CONFIGS = {  # the published transformers: class, config, VAE's scale and shift, text tokens
    "sd3.5-medium": ("SD3Transformer2DModel", SD3 | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))), (1.5305, 0.0609), 333),
    "sd3.5-large": ("SD3Transformer2DModel", SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192), (1.5305, 0.0609), 333),
    "flux": ("FluxTransformer2DModel", dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
                                            pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56)), (0.3611, 0.1159), 512)}
VAE = dict(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False)
AESTHETIC_HEAD = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"


# ---------------------------------------------------------------------------- flags, errors, randomness
def fail(message):
    """Stop with one clear sentence and exit code 1."""
    raise SystemExit(f"error: {message}")


def stage_parser(doc, presets):
    """The parser with the flags that every stage begins with."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=presets, default="mini", help="mini: the miniature, on any machine; 24gb: SD 3.5 Medium at 512; paper: appendix D")
    p.add_argument("--backbone", default="sd3.5-medium", help="sd3.5-medium | sd3.5-large | flux, a pipeline folder or a hub id")
    p.add_argument("--reward", default="clip", help="clip | dfn-clip | hpsv2 | aesthetic, or an open_clip folder")
    p.add_argument("--out", help="run folder (default: runs/<preset>/<backbone>_<reward>)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the frozen models; auto: bfloat16 on cuda, else float32")
    p.add_argument("--dry-run", action="store_true", help="count the published models' parameters, TFLOP and bytes for this stage; no weights, no data, nothing is written")
    p.add_argument("--tflops", type=float, default=150, help="of a dry run's hours: what a card sustains (the paper's timings imply 150 to 200)")
    p.add_argument("--resolution", type=int, help="side of the square images in pixels")
    p.add_argument("--hpsv2-version", choices=("v2.0", "v2.1"), default="v2.0", help="of the published HPSv2")
    return p


def parse_stage(p, presets, argv=None):
    """Parse: the preset's values are the defaults, flags given explicitly win. Fills in --out, the device and the dtype."""
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        preset = p.get_default("preset")
    else:
        known = p.parse_known_args(argv)[0]
        preset = "24gb" if known.dry_run and known.preset in WORLDS else known.preset  # a dry run is of published models
    p.set_defaults(**presets[preset])
    args = p.parse_args(argv)
    args.preset = preset
    if args.preset not in WORLDS and args.hpsv2_version == "v2.1":
        args.reward = "+".join("hpsv2.1" if r == "hpsv2" else r for r in args.reward.split("+"))
    if args.out is None:
        args.out = f"runs/{args.preset}/{Path(args.backbone).name}_{Path(args.reward).name}"
    if args.device == "auto":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not (torch.cuda.is_available() or args.dry_run):
        fail(f"--device {args.device}: torch finds no CUDA device on this machine")
    if args.dry_run or args.dtype == "auto":
        args.dtype = "bfloat16" if args.dry_run or args.device.startswith("cuda") else "float32"
    world = WORLDS.get(args.preset)
    if world and not args.dry_run and not (ROOT / world["data"]).exists():
        print(f"drawing {world['data']} (once)", flush=True)
        subprocess.run([sys.executable, str(ROOT / world["maker"]), str(ROOT / world["data"])], check=True)
    torch.manual_seed(args.seed)
    return args


def model_folder(name, preset):
    """The folder that a model name stands for: a path, or the world's model of that name; None if it is neither."""
    if Path(name).is_dir():
        return Path(name)
    if preset not in WORLDS:
        return None
    models = ROOT / WORLDS[preset]["models"]
    if not (models / name).is_dir():
        known = sorted(p.parent.name for kind in ("model_index.json", "open_clip_config.json") for p in models.glob(f"*/{kind}"))
        fail(f"there is no {name}: --preset {preset} knows {', '.join(known)}; anything else must be a folder")
    return models / name


def generator(*seed):
    """A CPU generator seeded by any numbers or strings, the same on every machine."""
    return torch.Generator().manual_seed(int(hashlib.sha1(repr(seed).encode()).hexdigest()[:15], 16))


def processes():
    """(rank, number of processes) under `accelerate launch` or torchrun, which set the environment: joins their group. (0, 1) alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)


def average_over_processes(tensors):
    """Replace each tensor by its mean over all processes, in one message; nothing to do for one process."""
    if torch.distributed.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, mean in zip(tensors, (flat / torch.distributed.get_world_size()).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def gathered(values, own, n):
    """The rows `own` of n, (len(own), ...), of every process put together: (n, ...)."""
    whole = values.new_zeros(n, *values.shape[1:])
    whole[own] = values
    average_over_processes([whole])
    return whole * processes()[1]


def now(device):
    """Seconds, once the device has finished what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(*[device] * (device.type == "cuda"))  # trap: without it cuda:0 is waited for
    return time.perf_counter()


# ---------------------------------------------------------------------------- noise
def broadcast(t, z):
    return t.reshape(-1, *[1] * (z.ndim - 1))


def add_noise(z0, eps, t):
    """z_t = (1-t) z_0 + t eps (1); z0, eps (B, ...), t (B,)."""
    t = broadcast(t, z0)
    return (1 - t) * z0 + t * eps


def tweedie(z, u, t):
    """One-step estimate zhat_0 = z_t - t u(z_t) = E[z_0 | z_t] for the exact velocity."""
    return z - broadcast(t, z) * u


def sde_step(z, u, t, t_next, noise, nu=lambda t: 3 * t * t):
    """One Euler-Maruyama step of the marginal-preserving SDE from t to t_next < t (11): z + d (-u + nu^2/2 score) + nu sqrt(d) noise.

    z, u, noise (B, ...), t and t_next floats, nu(t) the diffusion coefficient (0: the ODE). score = -((1-t) u + z) / t (25).
    No noise is added in the last step (t_next = 0). Computed in float32 and returned in z's dtype.
    """
    d, g, dtype = t - t_next, nu(t), z.dtype
    z, u = z.float(), u.float()
    z = z - d * u - d * 0.5 * g * g * ((1 - t) * u + z) / t
    return (z if t_next == 0 else z + g * d ** 0.5 * noise.float()).to(dtype)


def sigma_grid(scheduler, steps, tokens):
    """The scheduler's own noise levels, (steps + 1,) from 1 to 0. tokens: image tokens, for schedules that shift with the resolution."""
    c = scheduler.config
    if c.get("use_dynamic_shifting"):
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=c.base_shift + slope * (tokens - c.base_image_seq_len))
    else:
        scheduler.set_timesteps(steps)
    return scheduler.sigmas.float().cpu()


# ---------------------------------------------------------------------------- the diffusion transformer, cut and resumed
def dit_blocks(transformer):
    """All blocks in the order of i: SD3's joint blocks, or FLUX's double-stream blocks and then its single-stream blocks."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


def keep_blocks(transformer, i):
    """Drop the blocks after the first i and the output layers, to free their memory. In place: such a model can only be run up to block i."""
    double = len(transformer.transformer_blocks)
    transformer.transformer_blocks = transformer.transformer_blocks[:i]
    if hasattr(transformer, "single_transformer_blocks"):
        transformer.single_transformer_blocks = transformer.single_transformer_blocks[:max(i - double, 0)]
    transformer.norm_out = transformer.proj_out = None


def begin(transformer, z, sigma, text, pooled, guidance=3.5):
    """Everything before the first block. z (B, C, h, w), sigma (B,), text (B, T, D), pooled (B, P) -> state.

    The state is a dict of tensors whose first axis is the batch: h image tokens, c text tokens, t time embedding; `fixed` holds what has no batch axis.
    """
    B, C, H, W = z.shape
    h, w = H // 2, W // 2
    if not hasattr(transformer, "x_embedder"):  # SD3: trap: it wants 1000 sigma, and says nothing when it gets sigma
        return dict(h=transformer.pos_embed(z), c=transformer.context_embedder(text), t=transformer.time_text_embed(sigma * 1000, pooled),
                    i=0, fixed=dict(grid=(h, w), kwargs={}))
    packed = z.view(B, C, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, 4 * C)
    ids = torch.zeros(text.shape[1] + h * w, 3, device=z.device)
    ids[text.shape[1]:, 1:] = torch.cartesian_prod(torch.arange(h, device=z.device), torch.arange(w, device=z.device))
    scales = [sigma.to(z.dtype) * 1000]
    if transformer.config.guidance_embeds:
        scales.append(guidance * 1000 + torch.zeros_like(scales[0]))
    return dict(h=transformer.x_embedder(packed), c=transformer.context_embedder(text), t=transformer.time_text_embed(*scales, pooled),
                i=0, fixed=dict(grid=(h, w), kwargs=dict(image_rotary_emb=transformer.pos_embed(ids))))


def run_blocks(transformer, state, stop=None):
    """Run blocks state.i .. stop-1 (all remaining by default). After SD3's last block the text tokens are None."""
    blocks = dit_blocks(transformer)
    h, c, stop = state["h"], state["c"], len(blocks) if stop is None else stop
    for block in blocks[state["i"]:stop]:
        c, h = block(hidden_states=h, encoder_hidden_states=c, temb=state["t"], **state["fixed"]["kwargs"])
    return dict(state, h=h, c=c, i=stop)


def end(transformer, state):
    """The velocity (B, C, h, w) from a state after the last block."""
    (h, w), y = state["fixed"]["grid"], transformer.proj_out(transformer.norm_out(state["h"], state["t"]))
    if hasattr(transformer, "x_embedder"):  # FLUX packs a token as (channel, row, column), SD3 as (row, column, channel)
        y = y.view(len(y), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    else:
        y = y.view(len(y), h, w, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(len(y), -1, 2 * h, 2 * w)


def state_index(state, index):
    """The state of some of the batch: index is anything that indexes a tensor's first axis."""
    return {k: v[index] if torch.is_tensor(v) else v for k, v in state.items()}


def state_cat(states):
    """Several states at the same block, one after the other, as one batch."""
    if len({s["i"] for s in states}) > 1:
        raise ValueError(f"states after different blocks cannot be joined: {[s['i'] for s in states]}")
    return {k: torch.cat([s[k] for s in states]) if torch.is_tensor(v) else v for k, v in states[0].items()}


def velocity(transformer, z, sigma, condition, null=None, cfg=1.0, guidance=3.5, prefix=None, checkpointing=False):
    """u(z_t, t), (B, C, h, w) in z's dtype; condition and null are (text, pooled), of batch B or 1; with cfg != 1 un + cfg (uc - un). guidance: what FLUX embeds.

    prefix: the null half's state after some block, at this very z and sigma: it is resumed instead of being computed again.
    """
    dtype = next(transformer.parameters()).dtype
    start = lambda pair: begin(transformer, z.to(dtype), sigma, *[v.to(dtype).expand(len(z), *v.shape[1:]) for v in pair], guidance)
    state, guided = start(condition), cfg != 1 and null is not None
    if guided:
        state = state_cat([start(null), state] if prefix is None else [prefix, run_blocks(transformer, state, prefix["i"])])
    for i in range(state["i"] + 1, len(dit_blocks(transformer)) + 1) if checkpointing else ():
        state = torch.utils.checkpoint.checkpoint(run_blocks, transformer, state, i, use_reentrant=False, preserve_rng_state=False)
    u = end(transformer, run_blocks(transformer, state)).to(z.dtype)
    if not guided:
        return u
    un, uc = u.chunk(2)
    return un + cfg * (uc - un)


def explain(source, e):
    """One sentence: why the files of `source` could not be had, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
    chain = [e]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    is_a = lambda *kinds: any(isinstance(c, kinds) for c in chain)
    if any(getattr(c, "errno", None) == errno.ENOSPC or "No space left" in str(c) for c in chain):  # the hub's own downloader keeps only the text
        return f"there is no room on the disk for {source}: free some, or point HF_HOME to another disk"
    if is_a(GatedRepoError):
        return f"{source} is gated: accept its licence at https://huggingface.co/{source}, then log in with: hf auth login"
    if is_a(RepositoryNotFoundError):
        return f"there is neither a folder nor a hub repository {source}"
    if is_a(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, URLError):
        command = f"wget -P {torch.hub.get_dir()}/checkpoints {source}" if "://" in source else f"hf download {source}"
        return f"{source} is not on this machine and its host cannot be reached: get it where there is a network ({command}), or pass a folder"
    return f"{source} cannot be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}"


class Backbone:
    """A diffusion transformer, its VAE (always float32) and its scheduler, frozen; each is loaded when it is first used."""

    def __init__(self, name, preset="mini", device="cpu", dtype=torch.float32):
        import diffusers
        diffusers.utils.logging.disable_progress_bar()
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.source = str(model_folder(name, preset) or HUB.get(name, name))
        try:
            if not Path(self.source).is_dir():  # asks the hub first: diffusers would hide its reason
                from huggingface_hub import hf_hub_download
                hf_hub_download(self.source, "model_index.json")
            self.index = diffusers.DiffusionPipeline.load_config(self.source)
            self.transformer_class = getattr(diffusers, self.index["transformer"][1])
        except KeyError:
            fail(f"{self.source} is not a pipeline of SD 3 or FLUX: its model_index.json names no transformer")
        except Exception as e:
            fail(explain(self.source, e))

    def _load(self, cls, part, dtype):
        try:
            return cls.from_pretrained(self.source, subfolder=part, dtype=dtype).to(self.device).eval().requires_grad_(False)
        except Exception as e:
            fail(explain(self.source, e))

    @cached_property
    def transformer(self):
        return self._load(self.transformer_class, "transformer", self.dtype)

    @cached_property
    def vae(self):
        from diffusers import AutoencoderKL
        return self._load(AutoencoderKL, "vae", torch.float32)

    @cached_property
    def scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler
        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.source, subfolder="scheduler")

    def set_shift(self, shift):
        """Another shift of the noise levels, t -> shift t / (1 + (shift - 1) t), FLUX's dynamic one replaced. SD 3's 3 is made for 1024 px: noise hides more of a smaller image."""
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config, shift=shift, use_dynamic_shifting=False)

    def latent_space(self):
        """What two backbones must have in common to read each other's latents: the VAE."""
        c, v = self.vae.config, self.vae
        weights = torch.cat([v.encoder.conv_in.weight.flatten(), v.decoder.conv_out.weight.flatten()]).bfloat16()
        digest = hashlib.sha1(weights.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:8]
        return f"{c.latent_channels} channels, scale {c.scaling_factor:.4f}, shift {c.shift_factor:.4f}, vae {digest}"

    def encode_image(self, x):
        """Images (B, 3, H, W) in [0, 1] -> latents, posterior mean, shifted and scaled."""
        c = self.vae.config
        return (self.vae.encode(x.to(self.device) * 2 - 1).latent_dist.mean - c.shift_factor) * c.scaling_factor

    def decode(self, z):
        """Latents -> images (B, 3, H, W) in [0, 1], clamped; differentiable."""
        c = self.vae.config
        return (self.vae.decode(z.float() / c.scaling_factor + c.shift_factor).sample / 2 + 0.5).clamp(0, 1)

    def velocity(self, z, sigma, condition, null=None, cfg=1.0, **more):
        return velocity(self.transformer, z, sigma, condition, null, cfg, **more)

    def grid(self, steps, z):
        return sigma_grid(self.scheduler, steps, z.shape[-1] * z.shape[-2] // 4)


@torch.no_grad()
def encode_prompts(backbone, prompts, batch=32, cache=None):
    """(text (N, T, D), pooled (N, P)) of the prompts by the pipeline's own text encoders, loaded for it and freed; call it before the transformer is used.

    cache: a folder where they are kept for the next run.
    """
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(backbone.source).glob("text_encoder*/*.safetensors"))]
    key = hashlib.sha1(repr((backbone.source, files, backbone.dtype, list(prompts))).encode()).hexdigest()[:12]
    kept = cache and Path(cache) / f"prompts_{key}.pt"
    if kept and kept.exists():
        return tuple(v.to(backbone.device) for v in torch.load(kept, weights_only=True))
    import diffusers
    import transformers
    transformers.utils.logging.disable_progress_bar()
    absent = {k: None for k, v in backbone.index.items() if isinstance(v, (list, tuple)) and v[0] is None}  # trap: these must be passed again
    try:
        with torch.device("meta"):  # the pipeline asks the transformer for one width, so its weights are not needed
            shell = backbone.transformer_class.from_config(backbone.transformer_class.load_config(backbone.source, subfolder="transformer"))
        pipe = diffusers.DiffusionPipeline.from_pretrained(backbone.source, transformer=shell, vae=None, dtype=backbone.dtype, **absent)
    except Exception as e:
        fail(explain(backbone.source, e))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(backbone.device)
    t5 = getattr(pipe, "tokenizer_3", None) or pipe.tokenizer_2
    flux = "Flux" in type(pipe).__name__
    length = min(512 if flux else 256, t5.model_max_length)
    rows = []
    for k in range(0, len(prompts), batch):
        part = list(prompts[k:k + batch])
        if flux:
            rows.append(pipe.encode_prompt(part, None, device=backbone.device, max_sequence_length=length)[:2])
        else:
            rows.append([pipe.encode_prompt(part, None, None, device=backbone.device, do_classifier_free_guidance=False, max_sequence_length=length)[n] for n in (0, 2)])
    rows = tuple(torch.cat(v) for v in zip(*rows))
    if kept:
        with replacing(kept) as temporary:
            torch.save(tuple(v.cpu() for v in rows), temporary)
    return rows


# ---------------------------------------------------------------------------- the reward model
class Reward:
    """A frozen CLIP-like reward: score = <e, text> for unit e and text; with an aesthetic head, score = head(e), text unused.

    name: a world's or a published reward, or an open_clip folder. weights=False: a published one with random weights, or none on the meta device.
    """

    def __init__(self, name, preset="mini", device="cpu", weights=True):
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2
        folder = model_folder(name, preset) if weights else None
        if folder is None and name not in REWARDS:
            fail(f"there is no reward {name}: pass {', '.join(REWARDS)}, or a folder with open_clip_config.json and open_clip_model.safetensors")
        if folder is not None and not (folder / "open_clip_config.json").exists():
            fail(f"{folder} has no open_clip_config.json: --reward takes an open_clip folder")
        source, pretrained = (f"local-dir:{folder}", None) if folder else REWARDS[name]
        tag = open_clip.get_pretrained_cfg(source, pretrained if isinstance(pretrained, str) else "")
        if tag and tag.get("quick_gelu", False) != open_clip.get_model_config(source).get("quick_gelu", False):
            fail(f"{source} and the weights {pretrained} differ in QuickGELU, which changes every score: use {source}-quickgelu")
        # HPSv2's authors make a tensor of the image first and resize that, the longest side to 224; all others resize the PIL image
        self.resizes_tensors = folder is None and name.startswith("hpsv2")
        looks = {"resize_mode": "longest"} if self.resizes_tensors else {k: tag[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in tag}
        place = str(folder or (pretrained[0] if isinstance(pretrained, tuple) else tag.get("hf_hub", name).strip("/")))
        logging.disable(logging.ERROR)  # what open_clip logs, that weights are random or missing, is meant or said below
        try:
            if weights and isinstance(pretrained, tuple):
                from huggingface_hub import hf_hub_download
                pretrained = hf_hub_download(*pretrained)
            with contextlib.nullcontext() if weights else torch.device(device):  # open_clip would build it on the CPU first
                model = open_clip.create_model(source, pretrained=pretrained if weights else None, load_weights=weights, device=device,
                                               force_preprocess_cfg=None if folder else looks, require_pretrained=weights)
            head = None
            if folder and (folder / "aesthetic_head.safetensors").exists():
                from safetensors.torch import load_file
                head = load_file(folder / "aesthetic_head.safetensors")
            elif folder is None and name == "aesthetic" and weights:
                place = AESTHETIC_HEAD
                head = torch.hub.load_state_dict_from_url(AESTHETIC_HEAD, map_location="cpu", weights_only=True)
        except Exception as e:
            fail(explain(place, e))
        finally:
            logging.disable(logging.NOTSET)
        self.name, self.device = name, torch.device(device)
        self.model = model.float().eval().requires_grad_(False)  # trap: it comes in train mode
        self.tokenizer = open_clip.get_tokenizer(source)
        self.visual = self.model.visual
        self.preprocess_cfg = PreprocessCfg(**{k: v for k, v in self.visual.preprocess_cfg.items() if k in PreprocessCfg.__annotations__})
        self.file_transform = image_transform_v2(self.preprocess_cfg, is_train=False)
        self.head = aesthetic_head(head).to(device) if head is not None or (name == "aesthetic" and not weights) else None

    def transform(self, image):
        """A PIL image in RGB -> the tower's input (3, s, s), as its authors score image files."""
        if self.resizes_tensors:
            return self.normalise(self.resize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255))[0]
        return self.file_transform(image)

    @property
    def uses_text(self):
        return self.head is None

    @property
    def size(self):
        return self.preprocess_cfg.size[0] if isinstance(self.preprocess_cfg.size, (tuple, list)) else self.preprocess_cfg.size

    def resize(self, x):
        """Images (B, 3, H, W) in [0, 1] at any size -> (B, 3, s, s) in [0, 1], as the tower's own transform does it, differentiable."""
        s, mode = self.size, self.preprocess_cfg.resize_mode
        H, W = x.shape[-2:]
        if mode == "squash":
            h, w = s, s
        elif mode == "shortest":  # the roundings are torchvision's
            h, w = s * H // min(H, W), s * W // min(H, W)
        else:  # HPSv2 multiplies where open_clip divides, which rounds a half to the other side
            h, w = (round(n * (s / max(H, W)) if self.resizes_tensors else n / (max(H, W) / s)) for n in (H, W))
        if (h, w) != (H, W):  # PIL antialiases; the clamp stands for its uint8 range, which bicubic overshoots
            kind = "bilinear" if self.preprocess_cfg.interpolation == "bilinear" else "bicubic"
            x = F.interpolate(x, (h, w), mode=kind, antialias=True, align_corners=False)
            x = x if self.resizes_tensors else x.clamp(0, 1)
        if mode == "longest":
            top, left = (s - h) // 2, (s - w) // 2
            return F.pad(x, (left, s - w - left, top, s - h - top), value=self.preprocess_cfg.fill_color / 255)
        top, left = round((h - s) / 2), round((w - s) / 2)
        return x[..., top:top + s, left:left + s]

    def normalise(self, x):
        """(B, 3, s, s) in [0, 1] -> the tower's input."""
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.preprocess_cfg.mean, self.preprocess_cfg.std))
        return (x - mean) / std

    def embed(self, x):
        """Images (B, 3, H, W) in [0, 1] -> raw embedding (B, E) and tokens after ln_post (B, N+1, d)."""
        return tail(self.visual, tokens_entering(self.visual, patchify(self.visual, self.normalise(self.resize(x)))), 1)

    @torch.no_grad()
    def encode_text(self, prompts, batch=256):
        """Unit text embeddings (N, E)."""
        parts = [self.model.encode_text(self.tokenizer(list(prompts[k:k + batch])).to(self.device), normalize=True) for k in range(0, len(prompts), batch)]
        return torch.cat(parts)

    def score(self, e, text=None):
        """Score (B,) of embeddings e (B, E) that are already unit or mean embeddings, with text (B, E) or (E,)."""
        return self.head(e)[..., 0] if self.head is not None else (e * text).sum(-1)


def clean_reward(rewards, texts, images):
    """r (B,) of images (B, 3, H, W) in [0, 1]: the sum over the rewards, each with its own embeddings (B, E) of the prompts."""
    return sum(reward.score(F.normalize(reward.embed(images)[0], dim=-1), text) for reward, text in zip(rewards, texts))


def aesthetic_head(weights=None, width=768):
    """The published MLP (d-1024-128-64-16-1): keys layers.{0,2,4,6,7}; dropout between, no non-linearity, so affine in evaluation. None: random weights."""
    weights = {k.removeprefix("layers."): v.float() for k, v in (weights or {}).items()}
    width = weights["0.weight"].shape[1] if weights else width
    head = nn.Sequential(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
                         nn.Linear(64, 16), nn.Linear(16, 1))
    if weights:
        head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


def pickscore(device):
    """PickScore v1: images (B, 3, H, W) in [0, 1] and prompts -> exp(logit scale) times the cosine, (B,)."""
    from transformers import AutoProcessor, CLIPModel
    processor = AutoProcessor.from_pretrained("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    model = CLIPModel.from_pretrained("yuvalkirstain/PickScore_v1").to(device).eval()

    def score(images, prompts):
        pixels = processor(images=list((images * 255).round().to(torch.uint8).cpu()), return_tensors="pt").to(device)
        tokens = processor(text=list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        unit = lambda out: F.normalize(getattr(out, "pooler_output", out), dim=-1)  # trap: transformers 5 wraps the embedding
        return model.logit_scale.exp() * (unit(model.get_image_features(**pixels)) * unit(model.get_text_features(**tokens))).sum(-1)
    return score


def imagereward(device):
    """ImageReward v1.0, by its own package."""
    import ImageReward
    from PIL import Image
    model = ImageReward.load("ImageReward-v1.0", device=str(device))
    to_pil = lambda x: Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    return lambda images, prompts: torch.tensor([model.score(p, [to_pil(x)]) for x, p in zip(images, prompts)])


def checker(program):
    """A world's own exact check of images against their prompts: `program check images.npy prompts.json` prints a JSON list of true and false."""
    def score(images, prompts):
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/images.npy", (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
            Path(folder, "prompts.json").write_text(json.dumps(list(prompts)))
            done = subprocess.run([sys.executable, str(ROOT / program), "check", f"{folder}/images.npy", f"{folder}/prompts.json"], capture_output=True, text=True, check=True)
        return torch.tensor(json.loads(done.stdout), dtype=torch.float32)
    return score


def load_scorers(preset, device, loaded=()):
    """{name: function of images (B, 3, H, W) in [0, 1] and B prompts -> scores (B,)}: every scorer that can be had; the others are named. loaded: Rewards to share."""
    world, scorers = WORLDS.get(preset, {}), {}

    def of(reward):
        return lambda images, prompts: reward.score(F.normalize(reward.embed(images)[0], dim=-1), reward.encode_text(prompts) if reward.uses_text else None)

    for name in world.get("scorers", SCORERS):
        try:
            shared = [r for r in loaded if r.name == name]
            scorers[name] = {"pickscore": pickscore, "imagereward": imagereward}[name](device) if name in ("pickscore", "imagereward") else of(shared[0] if shared else Reward(name, preset, device))
        except (Exception, SystemExit) as e:
            print(f"warning: no column {name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    if "checker" in world:
        scorers["geneval"] = checker(world["checker"])
    return scorers


def reward_and_scorers(rewards, preset, device):
    """load_scorers' with 'reward', the sum of the rewards, in the place of a single one's own; of a joint reward the parts stay, beside their sum."""
    scorers = load_scorers(preset, device, rewards)
    if len(rewards) == 1:
        scorers.pop(Path(rewards[0].name).name, None)
    return {"reward": lambda images, prompts: clean_reward(rewards, [r.encode_text(prompts) if r.uses_text else None for r in rewards], images), **scorers}


@torch.no_grad()
def score_images(scorers, images, prompts, batch=64, device=None):
    """{name: scores (N,)} of images (N, 3, H, W) in [0, 1], or of uint8 ones, which go to `device` a batch at a time, against N prompts."""
    batches = {name: len(images) if name == "geneval" else batch for name in scorers}  # a program's start is what a check costs
    shown = lambda x: x.to(device).float() / 255 if x.dtype == torch.uint8 else x
    return {name: torch.cat([f(shown(images[k:k + batches[name]]), prompts[k:k + batches[name]]).float().cpu() for k in range(0, len(images), batches[name])])
            for name, f in scorers.items()}


def mean_and_error(scores):
    """{name: mean, name_se: standard error of the mean} of {name: (N,)}: the metric keys of a table row."""
    return {k: v for name, x in scores.items() for k, v in ((name, float(x.mean())), (f"{name}_se", float(x.std() / len(x) ** 0.5)))}


def patchify(visual, x):
    """The patch convolution alone: (B, 3, s, s) -> (B, d, g, g), the stitching target of j = 1."""
    return visual.conv1(x)


def to_tokens(f):
    """(B, d, g, g) -> (B, g*g, d)."""
    return f.flatten(2).transpose(1, 2)


def tokens_entering(visual, patches):
    """Patch features (B, d, g, g) -> tokens entering block 1, (B, N+1, d): CLS and positions are added and ln_pre applied."""
    x = to_tokens(patches)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + visual.positional_embedding.to(x.dtype)
    return visual.ln_pre(x)


def tail(visual, x, j):
    """Tokens entering block j (B, N+1, d) -> raw embedding (B, E) and per-token output after ln_post (B, N+1, d)."""
    for block in visual.transformer.resblocks[j - 1:]:
        x = block(x)
    x = visual.ln_post(x)
    return x[:, 0] @ visual.proj, x


def tokens_by_depth(visual, x, j_max):
    """Normalised images -> the stitching targets of j = 1..j_max: [(patch tokens (B, N, d), CLS (B, d) or None)]."""
    patches = patchify(visual, x)
    targets, x = [(to_tokens(patches), None)], tokens_entering(visual, patches)
    for block in visual.transformer.resblocks[:j_max - 1]:
        x = block(x)
        targets.append((x[:, 1:], x[:, 0]))
    return targets


# ---------------------------------------------------------------------------- the stitched value model
def resample(f, grid, antialias=False):
    """Up: one bilinear resampling of (B, d, h, w) to the reward model's patch grid. Plain bilinear by default [D6]."""
    return f if f.shape[-2:] == tuple(grid) else F.interpolate(f, grid, mode="bilinear", align_corners=False, antialias=antialias)


class Stitch(nn.Module):
    """s_psi (57)-(58): F a 1x1 conv set to the closed-form W, then s = Up(F(h)) + G(Up(F(h))); G is zero at the start."""

    def __init__(self, W, bias, grid, antialias=False):
        super().__init__()
        d_out, d_in = W.shape
        self.grid, self.antialias = tuple(grid), antialias
        self.F = nn.Conv2d(d_in, d_out, 1)
        self.G = nn.Sequential(nn.SiLU(), nn.Conv2d(d_out, max(d_out // 8, 1), 1), nn.SiLU(), nn.Conv2d(max(d_out // 8, 1), d_out, 1))
        with torch.no_grad():
            self.F.weight.copy_(W[:, :, None, None]), self.F.bias.copy_(bias)
            self.G[-1].weight.zero_(), self.G[-1].bias.zero_()

    def forward(self, h):
        y = resample(self.F(h), self.grid, self.antialias)
        return y + self.G(y)


class StitchedValue(nn.Module):
    """V(z_t) = r^{>=j}( s_psi( u^{<=i}(z_t, t) ) ) (6). Gradients reach z; the diffusion blocks are frozen.

    front: 'dit' (the first i blocks, run with the null text) or 'vae' (u^{<=i} is the identity on the noisy latent).
    embedding: 'mean', e = raw / norm, an estimate of E[e_RM | z_t] [D14]; 'unit', e = raw / |raw| (the paper's).
    """

    def __init__(self, transformer, null, reward, stitch, i, j, cls=None, front="dit", embedding="mean", norm=1.0):
        super().__init__()
        self.__dict__["transformer"] = transformer  # shared and frozen: not a submodule, so neither saved nor trained
        self.null, self.i, self.j, self.front, self.embedding, self.norm = null, i, j, front, embedding, float(norm)
        self.stitch, self.visual = stitch, copy.deepcopy(reward.visual)
        self.cls = nn.Parameter(cls.clone()) if cls is not None else None  # [D3] j > 1: the probe set's mean CLS at that depth
        self.__dict__["score"] = reward.score
        used = [*self.visual.transformer.resblocks[j - 1:].parameters(), *self.visual.ln_post.parameters(), self.visual.proj]
        if j == 1:
            used += [self.visual.class_embedding, self.visual.positional_embedding, *self.visual.ln_pre.parameters()]
        self.visual.requires_grad_(False)
        for p in used:
            p.requires_grad_(True)

    def features(self, z, sigma, state=None):
        """u^{<=i}(z_t, t) as (B, d, h, w), and the transformer's state after block i (None for the VAE front); a state may be passed to resume."""
        if self.front == "vae":
            return z, None
        if state is None:
            dtype = next(self.transformer.parameters()).dtype
            state = begin(self.transformer, z.to(dtype), sigma, *[v.to(z.device, dtype).expand(len(z), *v.shape[1:]) for v in self.null])
        state = run_blocks(self.transformer, state, self.i)
        return state["h"].transpose(1, 2).unflatten(2, state["fixed"]["grid"]).float(), state

    def head(self, features):
        """Features (B, d, h, w) -> embedding (B, E), unit or mean, and tokens (B, N+1, d)."""
        f = self.stitch(features)
        if self.j == 1:
            x = tokens_entering(self.visual, f)
        else:
            x = torch.cat([self.cls.expand(len(f), 1, -1), to_tokens(f)], 1)
        raw, tokens = tail(self.visual, x, self.j)
        return (F.normalize(raw, dim=-1) if self.embedding == "unit" else raw / self.norm), tokens

    def embed(self, z, sigma):
        return self.head(self.features(z, sigma)[0])[0]

    def forward(self, z, sigma, text=None):
        """V (B,) of noisy latents z (B, C, h, w) at sigma (B,), with unit text embeddings (B, E) or (E,)."""
        return self.score(self.embed(z, sigma), text)

    def trained_state(self):
        """What training can change, as a plain dict of tensors."""
        return {k: v for k, v in self.state_dict().items() if k.startswith("stitch") or k == "cls" or dict(self.named_parameters())[k].requires_grad}


def load_value(path, backbone, reward, expect=None):
    """The StitchedValue of a value.pt for this reward, on the latents of this backbone's VAE (its own front model may be another backbone)."""
    value = load_artifact(path, {"latent_space": backbone.latent_space(), "reward": reward.name, **(expect or {})}, "03_finetune.py")
    spec, data = value["spec"], value["data"]
    front = backbone if spec["backbone"] == backbone.name or spec["front"] == "vae" else Backbone(spec["backbone"], value["config"]["preset"], backbone.device, backbone.dtype)
    W = data["state"]["stitch.F.weight"][:, :, 0, 0]
    stitch = Stitch(W, data["state"]["stitch.F.bias"], spec["reward_grid"], spec["antialias"])
    null = [v.to(backbone.device) for v in data["null"]]
    model = StitchedValue(front.transformer, null, reward, stitch, spec["i"], spec["j"], data["state"].get("cls"), spec["front"], spec["embedding"], data["norm"])
    missing, unexpected = model.load_state_dict(data["state"], strict=False)
    if unexpected:
        fail(f"{path} has weights that this reward model does not: {', '.join(unexpected[:3])}; remake it with 03_finetune.py")
    return model.to(backbone.device).eval().requires_grad_(False), value


def value_files(args, names):
    """The value.pt of each reward of the sum: --value, else --out's, else that of the reward's own run folder; refused if there is none."""
    folder = lambda name: Path(f"runs/{args.preset}/{Path(args.backbone).name}_{Path(name).name}")
    files = args.value or [Path(args.out) / "value.pt" if len(names) == 1 and (Path(args.out) / "value.pt").exists() else folder(n) / "value.pt" for n in names]
    if len(files) != len(names):
        fail(f"--value names {len(files)} files for the {len(names)} rewards of {args.reward}: give one each, in their order")
    for name, file in zip(names, files):
        if not Path(file).exists():
            fail(f"there is no value model of {name}: {file} does not exist; make it with 01, 02 and 03_finetune.py --reward {name}, or pass --value FILE")
    return files


def load_values(files, backbone, rewards, resolution):
    """The value model of each reward, and their artefacts; those on one backbone have one transformer, so that they can share its blocks."""
    values, artifacts, transformers = [], [], {}
    for file, reward in zip(files, rewards):
        value, artifact = load_value(file, backbone, reward, {"resolution": resolution})
        value.__dict__["transformer"] = transformers.setdefault(artifact["spec"]["backbone"], value.transformer)
        values.append(value), artifacts.append(artifact)
    return values, artifacts


def joint_value(values, z, sigma, texts):
    """Sum (B,) of several stitched values at z (B, C, h, w), sigma (B,), each with its texts (B, E), and {id of a transformer: state after its largest i}.

    Values on one transformer share its blocks up to the larger i.
    """
    total, prefixes = 0, {}
    for v, text in sorted(zip(values, texts), key=lambda pair: pair[0].i):
        features, state = v.features(z, sigma, prefixes.get(id(v.transformer)))
        total = total + v.score(v.head(features)[0], text)
        if state is not None:  # the VAE front has none
            prefixes[id(v.transformer)] = state
    return total, prefixes


def shares_prefix(values, backbone, null, cfg):
    """Whether a value's prefix is the first blocks of the denoiser's null half: a null half at all, the same transformer, the same null text."""
    dit = [v for v in values if v.front == "dit" and v.transformer is backbone.transformer]
    if cfg == 1 or not dit:
        return False
    # encoded again, in another batch or dtype, a text differs by rounding
    same = all(a.shape == b.shape and (a.to(b) - b).norm() <= 0.02 * b.norm() for v in dit for a, b in zip(v.null, null))
    if not same:
        print("warning: a value model's null text is not the one of this run; its prefix is not shared with the denoiser")
    return same


# ---------------------------------------------------------------------------- finetuning the generator
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # the attention projections (App. D.3)


def frozen_prefix(transformer, i):
    """A copy of the transformer that can only be run up to block i."""
    unused = [*dit_blocks(transformer)[i:], transformer.norm_out, transformer.proj_out]
    shared = {id(transformer.pos_embed): transformer.pos_embed}  # no projection, and SD3's buffer is half a gigabyte
    prefix = copy.deepcopy(transformer, {id(m): nn.Identity() for m in unused} | shared)
    keep_blocks(prefix, i)
    return prefix


def own_prefixes(values):
    """Let the values read a copy of their blocks, one for all on one transformer: base weights, whatever a LoRA does. Call it before add_lora."""
    prefixes = {}
    for transformer in {id(v.transformer): v.transformer for v in values if v.front == "dit"}.values():
        prefixes[id(transformer)] = frozen_prefix(transformer, max(v.i for v in values if v.transformer is transformer))
    for value in values:
        value.__dict__["transformer"] = prefixes.get(id(value.transformer))


def add_lora(transformer, rank, alpha, name="default"):
    """Add a LoRA that starts at zero on all attention projections, in float32; returns its parameters. The last one added is the one that runs and trains."""
    from peft import LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS), name)
    added = [p for n, p in transformer.named_parameters() if f".{name}." in n]
    for p in added:
        p.data = p.data.float()  # trap: AdamW's steps vanish in bfloat16
    return added


@contextlib.contextmanager
def without_lora(transformer):
    """The base weights. Trap: neither backward() nor a checkpointed forward pass may run in here: gradients are dropped in silence, or recomputed with the LoRA on."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def decay_at(update, most):
    """Decay of an average of the weights at the update-th update, from 0: as many updates count as there have been, up to what `most` says."""
    return min(most, (1 + update) / (10 + update))


def follow(average, current, decay):
    """average <- decay average + (1 - decay) current, in place, for lists of tensors."""
    with torch.no_grad():
        torch._foreach_lerp_(average, current, 1 - decay)


@contextlib.contextmanager
def swapped(parameters, values):
    """The values (an average of the weights, say) in place of the parameters."""
    own = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)


def save_lora(backbone, folder):
    """<folder>/pytorch_lora_weights.safetensors, the adapter named default, which pipe.load_lora_weights(folder) reads."""
    import diffusers
    from peft.utils import get_peft_model_state_dict
    layers = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(backbone.transformer).items()}
    about = backbone.transformer.peft_config["default"].to_dict()  # trap: without it the reader takes alpha to be the rank
    with replacing(Path(folder) / "pytorch_lora_weights.safetensors") as temporary:
        getattr(diffusers, backbone.index["_class_name"]).save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=about, weight_name=temporary.name)


def split_prompts(args):
    """(prompts to train on, in random order and none of them held out; held-out prompts) of --train-prompts and --eval-prompts."""
    if not args.train_prompts or not args.eval_prompts:
        fail("--train-prompts FILE and --eval-prompts FILE are needed: a text file, a JSON list, COCO's captions or GenEval's JSONL")
    held_out = [r["prompt"] for r in load_prompts(args.eval_prompts)][:args.eval_limit]
    pool = sorted({r["prompt"] for r in load_prompts(args.train_prompts)} - set(held_out))
    pool = [pool[k] for k in torch.randperm(len(pool), generator=generator(args.seed, "pool"))[:args.train_limit]]
    if not pool or len(held_out) < max(2, processes()[1]):
        fail(f"{len(pool)} prompts to train on and {len(held_out)} held out: one is needed at least, and of the latter two and one for each process")
    return pool, held_out


@torch.no_grad()
def evaluate(backbone, rewards, preset, prompts, condition, noise, grid, batch):
    """One sample for each held-out prompt, by the ODE without guidance from fixed noise (N, C, h, w), shared by the processes:
    this process' images (n, 3, H, W) as uint8, and of all samples {name: scores (N,)}: 'reward', the sum of the rewards, and every other scorer. NaN for a sample that overflowed.

    condition: (text, pooled) of the N prompts.
    """
    rank, world = processes()
    own, images, good = range(len(prompts))[rank * len(prompts) // world:(rank + 1) * len(prompts) // world], [], []
    for k in range(own.start, own.stop, batch):
        rows = slice(k, min(k + batch, own.stop))
        z = noise[rows].to(backbone.device)
        part = [v[rows].to(z.device) for v in condition]
        for t, t_next in zip(grid, grid[1:]):
            z = z + (t_next - t) * backbone.velocity(z, torch.full((len(z),), t, device=z.device), part)
        good.append(z.flatten(1).isfinite().all(1))
        images.append((backbone.decode(z.nan_to_num()) * 255).round().to(torch.uint8).cpu())
    images, good = torch.cat(images), torch.cat(good)
    scorers = reward_and_scorers(rewards, preset, backbone.device)  # loaded here and freed, which leaves training its memory
    scores = score_images(scorers, images, [prompts[n] for n in own], device=backbone.device)
    mine = {name: torch.where(good, s.to(good.device), torch.nan) for name, s in scores.items()}
    return images, {name: gathered(v, slice(own.start, own.stop), len(prompts)).cpu() for name, v in mine.items()}


def first_reached(rows, goal):
    """The work, linear between evaluation points, at which a run's reward first is goal; None: never."""
    if rows[0]["reward"] >= goal:
        return rows[0]["gflop"]
    for a, b in zip(rows, rows[1:]):
        if b["reward"] >= goal > a["reward"]:
            return a["gflop"] + (goal - a["reward"]) / (b["reward"] - a["reward"]) * (b["gflop"] - a["gflop"])


def work_saved(rows, by="method"):
    """For each run with a value model: the work at which it first has the last reward of its baseline, and its share of the work at which the baseline first had it, curves being noisy.

    rows of evaluation points, a run for each value of the key `by`. share None: not reached, or the baseline ends no higher than the base model (gflop 0).
    """
    found, runs = [], {}
    for r in rows:
        runs.setdefault(r[by], []).append(r)
    for name, mine in runs.items():
        baseline = mine[0]["method"].removesuffix("+stitchvm")
        if baseline == mine[0]["method"] or baseline not in runs:
            continue
        goal = runs[baseline][-1]["reward"]
        own, theirs = first_reached(mine, goal), first_reached(runs[baseline], goal)
        found.append({by: name, "baseline": baseline, "reward": goal, "gflop": own, "share": own / theirs if own and theirs else None})
    return found


def how_reached(saved):
    """An entry of work_saved in words."""
    return f"after {saved['share']:.0%} of its work" if saved["share"] else "not reached" if saved["gflop"] is None else "no higher than the base model's"


def print_work_saved(saved, by="method"):
    for r in saved:
        print(f"{r[by]}: the last reward of {r['baseline']}, {r['reward']:.4f}: {how_reached(r)}" + (f", {r['gflop']:.0f} GFLOP" if r["gflop"] else ""))


def draw_training(rows, by, path, title):
    """The training reward and up to four scorers that were not trained on, judge and geneval first, against seconds and counted work; a curve for each value of the key `by`."""
    import matplotlib.pyplot as plt
    metrics = [k for k in rows[0] if k not in ("reward", "gain") and all(f"{k}_se" in r for r in rows)]  # a resumed run may have lost a scorer
    panels = ["reward", *sorted(metrics, key=lambda k: k not in ("judge", "geneval", "imagereward", "pickscore"))[:4]]
    figure, axes = plt.subplots(2, len(panels), figsize=(3.4 * len(panels), 6), squeeze=False)
    for line, unit in zip(axes, ("seconds", "gflop")):
        for axis, key in zip(line, panels):
            for name in dict.fromkeys(r[by] for r in rows):
                mine = [r for r in rows if r[by] == name]
                axis.errorbar([r[unit] for r in mine], [r[key] for r in mine], [r[f"{key}_se"] for r in mine], marker="o", ms=4, capsize=2, label=name)
            axis.set(xlabel={"seconds": "seconds of training", "gflop": "GFLOP of training"}[unit], title="training reward, clean images" if key == "reward" else key)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title)
    save_figure(figure, path)


# ---------------------------------------------------------------------------- dry runs: published sizes, no weights
def meta_backbone(name, dtype=torch.bfloat16):
    """A published backbone of which only the shapes exist (the meta device), and its null text."""
    import diffusers
    diffusers.utils.logging.set_verbosity_error()
    name = {v: k for k, v in HUB.items()}.get(name, name)
    if name not in CONFIGS:
        fail(f"--dry-run knows the published sizes of {', '.join(CONFIGS)}, not {name}")
    cls, config, (scale, shift), tokens = CONFIGS[name]
    backbone = Backbone.__new__(Backbone)
    backbone.name, backbone.device, backbone.dtype = name, torch.device("meta"), dtype
    backbone.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "flux")
    with backbone.device:
        backbone.transformer = getattr(diffusers, cls)(**config).to(dtype).eval().requires_grad_(False)
        backbone.vae = diffusers.AutoencoderKL(**VAE, scaling_factor=scale, shift_factor=shift).eval().requires_grad_(False)
        null = torch.empty(1, tokens, config["joint_attention_dim"], dtype=dtype), torch.empty(1, config["pooled_projection_dim"], dtype=dtype)
    return backbone, null


def meta_value(backbone, null, reward, i, resolution):
    """The StitchedValue after block i (0: the VAE stitch) and before reward block 1, on the meta device, and the shape of one latent."""
    with torch.device("meta"):
        width = reward.visual.conv1.out_channels
        stitch = Stitch(torch.empty(width, backbone.transformer.inner_dim if i else 16), torch.empty(width), reward.visual.grid_size)
        return StitchedValue(backbone.transformer, null, reward, stitch, i, 1, front="dit" if i else "vae"), (16, resolution // 8, resolution // 8)


@contextlib.contextmanager
def kept_for_backward(weights=()):
    """The storages that autograd keeps while the block runs, {address: storage}, without those of the modules in `weights`.

    They are held on to, because a freed one's address would be used again.
    """
    own = {t.untyped_storage()._cdata for m in weights for t in [*m.parameters(), *m.buffers()]}
    kept = {}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield kept


def count(step, weights=()):
    """(TFLOP, GiB kept for the backward pass) of step() on the meta device. FLOP = 2 multiply-adds of matrix products, convolutions and attention.

    Attention is counted as flash: what a GPU runs; on the meta device the library would keep whole N x N matrices. The storages of the
    modules in `weights` are not counted as kept.
    """
    from torch.utils.flop_counter import FlopCounterMode
    sdpa = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    try:
        with FlopCounterMode(display=False) as counter, kept_for_backward(weights) as kept:
            step()
    finally:
        F.scaled_dot_product_attention = sdpa
    return counter.get_total_flops() / 1e12, sum(s.nbytes() for s in kept.values()) / 2 ** 30


def gflop(call, device="cpu"):
    """GFLOP of one call on real models: 2 x multiply-adds of matrix products, convolutions and attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # this one is not counted, nor is the CPU's fused attention
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else contextlib.nullcontext():
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


def gib(*modules):
    """GiB of the distinct parameters and buffers of some modules."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for m in modules for t in [*m.parameters(), *m.buffers()]}.values()) / 2 ** 30


def report_dry_run(args, stage, cases, frozen, trained=()):
    """Print the cases of a dry run as a table and as the closing JSON line. A case: method, unit, tflop, saved_gib, peak_gib, and n, units in a whole run."""
    of = lambda modules: sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())
    learns = sum(p.numel() for m in trained for p in m.parameters() if p.requires_grad)
    print(f"{args.backbone} + {args.reward} at {args.resolution} px, published size, {args.dtype}: {learns / 1e6:,.1f} M trained, {of([*frozen, *trained]) / 1e6 - learns / 1e6:,.0f} M frozen parameters")
    for c in cases:
        c["hours"] = c["tflop"] * c["n"] / c.get("tflops", args.tflops) / 3600
        c["fits"] = next((f"{card} GB" for card in (24, 48, 80) if c["peak_gib"] < 0.95 * card * 1e9 / 2 ** 30), "no card of 80 GB")
    print_table(cases, ("method", "unit", "tflop", "saved_gib", "peak_gib", "fits", "n", "hours"))
    print((f"hours at {cases[0]['tflops']:g} TFLOP/s, in float64 on the CPU" if "tflops" in cases[0] else f"hours at {args.tflops:g} TFLOP/s (--tflops)") + "; peak: weights, optimiser and what the backward pass keeps, without text encoders, which are freed before")
    print(json.dumps(dict(stage=stage, backbone=args.backbone, reward=args.reward, resolution=args.resolution, cases=cases)))


# ---------------------------------------------------------------------------- prompts
def load_prompts(path):
    """[{prompt, …}]: a text file (one a line), a JSON list of strings or objects, COCO's captions, or GenEval's JSONL, whose other keys are kept."""
    path = Path(path)
    if not path.exists():
        fail(f"{path} does not exist: prompts are a text file, a JSON list, COCO's captions or GenEval's JSONL")
    try:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(l) if path.suffix == ".jsonl" else l for l in text.splitlines() if l.strip()]
        if isinstance(rows, dict) and "annotations" in rows:
            rows = [a["caption"] for a in rows["annotations"]]
        if not rows or not isinstance(rows, list):  # an object would give its keys
            raise TypeError("empty" if not rows else "an object")
        rows = [{"prompt": r} if isinstance(r, str) else {**r, "prompt": r["prompt"]} for r in rows]
        if wrong := [r["prompt"] for r in rows if not isinstance(r["prompt"], str)]:
            raise TypeError(f"a prompt is {wrong[0]}")
        return rows
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{path} is no list of prompts ({type(e).__name__}: {e}): one a line, a JSON list of strings, or JSONL with the key prompt")


def write_geneval(folder, rows, images, start=0):
    """GenEval's layout, for its official evaluation: folder/00000/metadata.jsonl and samples/0000.png; rows of load_prompts, images [(n, 3, H, W) in [0, 1]]; the first has number start."""
    from PIL import Image
    for k, (row, samples) in enumerate(zip(rows, images), start):
        place = Path(folder) / f"{k:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(json.dumps(row))
        for n, x in enumerate(samples):
            Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()).save(place / "samples" / f"{n:04d}.png")


# ---------------------------------------------------------------------------- images
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def list_images(folder):
    """Image files below a folder, sorted by their path in it."""
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder of images; pass one with --images")
    paths = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)  # data sets are often linked into one folder
    return sorted(str(p.relative_to(folder)) for p in paths if p.suffix.lower() in IMAGE_SUFFIXES)


def read_image(path):
    """Any image file as a PIL image in RGB: EXIF rotation applied, alpha laid on white, 16-bit grey reduced to 8. Raises OSError or ValueError."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # trap: convert("RGB") would clip 16-bit values at 255
                grey = np.asarray(image).astype(np.float64)
                image = Image.fromarray((grey / (65535 if "16" in image.mode or grey.max() > 255 else 255) * 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as e:  # what PIL raises for a broken PNG chunk and for a bomb
        raise OSError(f"{path}: {e}") from e


def square(image, size):
    """PIL image -> uint8 tensor (3, size, size): shortest side to size (bicubic), centre crop."""
    from PIL import Image
    w, h = image.size
    if (w, h) != (size, size):
        scale = size / min(w, h)
        image = image.resize((max(round(w * scale), size), max(round(h * scale), size)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------------------- artefacts
def provenance(seed):
    from importlib.metadata import PackageNotFoundError, version
    def of(name):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)

    def git(*a):
        with contextlib.suppress(OSError):  # a machine without git
            return subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True).stdout.strip()
        return ""

    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), seed=seed, time=time.strftime("%Y-%m-%d %H:%M:%S"),
                commit=git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", "--", "*.py") else ""), python=sys.version.split()[0],
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                **{k: of(k) for k in ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy")})


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to, renamed to `path` at the end: a killed run leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_artifact(path, stage, args, spec, data, parents=()):
    """Write a plain dict that torch.load(weights_only=True) reads; returns its id. Parents are artefacts."""
    config = {k: v for k, v in vars(args).items()}
    about = dict(format=FORMAT, stage=stage, spec=spec, config=config, parents=[dict(stage=p["stage"], id=p["id"]) for p in parents], provenance=provenance(args.seed))
    about["id"] = hashlib.sha1(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
    with replacing(path) as temporary:
        torch.save({**about, "data": data}, temporary)
    print(f"wrote {path} ({about['id']})")
    return about["id"]


def save_training(path, stage, spec, data):
    """The state of a run, for --resume by load_artifact; spec holds the flags that must be the same."""
    with replacing(path) as temporary:
        torch.save(dict(format=FORMAT, spec=spec, provenance=dict(command=f"{stage}.py"), data=data), temporary)


def load_artifact(path, expect, maker):
    """Read an artefact and compare its spec with `expect`; a misfit is shown in one table and stops the run."""
    remake = f"python {maker} --out {Path(path).parent}"
    if not Path(path).exists():
        fail(f"{path} does not exist; make it with: {remake}")
    try:
        artifact = torch.load(path, weights_only=True, mmap=True)
        spec, made_by = artifact["spec"], artifact["provenance"]["command"]
    except Exception as e:
        fail(f"{path} cannot be read ({type(e).__name__}); remake it with: {remake}")
    if artifact["format"] != FORMAT:
        fail(f"{path} has format {artifact['format']}, this code reads {FORMAT}; remake it with: {remake}")
    wrong = [k for k, v in expect.items() if spec.get(k) != v]
    if wrong:
        rows = "\n".join(f"  {k:14} {str(spec.get(k)):52} {expect[k]}" for k in wrong)
        fail(f"{path} does not fit this run\n  {'':14} {'in the file':52} asked for\n{rows}\n  made by: {made_by}\n  remake it with: {remake} and this run's --backbone and --reward")
    return artifact


def save_table(args, stage, rows, **top):
    """<out>/<stage>.json with the rows, the flags and where they come from."""
    path = Path(args.out) / f"{stage}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(stage=stage, rows=rows, **top, config=vars(args), provenance=provenance(args.seed)), indent=1))
    print(f"wrote {path}")


def print_table(rows, keys):
    """Rows of dicts as an aligned table on standard output."""
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v)
    cells = [list(keys)] + [[show(r.get(k)) for k in keys] for r in rows]
    width = [max(len(c[n]) for c in cells) for n in range(len(keys))]
    for c in cells:
        print("  ".join(v.rjust(w) for v, w in zip(c, width)))


def save_figure(figure, path):
    """A matplotlib figure as a PNG, and close it."""
    import matplotlib.pyplot as plt
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    print(f"wrote {path}")


def save_image_grid(rows, labels, titles, path):
    """A PNG of images: rows [(n, 3, H, W) in [0, 1]] with a label each, and a title (the prompt) above each column."""
    import textwrap

    import matplotlib.pyplot as plt
    n = len(titles)
    figure, axes = plt.subplots(len(rows), n, figsize=(1.5 * n + 1, 1.6 * len(rows) + 0.6), squeeze=False)
    for a, images in enumerate(rows):
        for b in range(n):
            axes[a, b].imshow(images[b].float().permute(1, 2, 0).cpu().numpy())
            axes[a, b].set(xticks=[], yticks=[])
        axes[a, 0].set_ylabel("\n".join(textwrap.fill(line, 22) for line in labels[a].splitlines()), fontsize=8)  # a longer line would run into the next row's
    for b, title in enumerate(titles):
        axes[0, b].set_title(textwrap.fill(title, 22), fontsize=6)
    save_figure(figure, path)
