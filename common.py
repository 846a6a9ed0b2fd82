"""What the eight stages share: cutting transformers and rewards, noise, the value model, artefacts.

Everywhere t = sigma runs from 0 (clean) to 1 (noise):
    z_t = (1-t) z_0 + t eps,   u = eps - z_0,   Tweedie's one-step estimate zhat_0 = z_t - t u
Latents are (B, C, h, w), sigma is (B,), images are (B, 3, H, W) in [0, 1].
i counts the diffusion blocks already applied; j, from 1, is the first reward block that is kept.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import unicodedata
from functools import cache, cached_property, partial, wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

# trap: an OpenMP thread that waits spins, by default so long that on a busy machine it takes the
# core from the one it waits for; torch's own reads this when it is loaded. Measured on 2 cores: 5 %
# slower when these are idle, three times faster when they are not
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ["MPLBACKEND"] = "agg"  # trap: a notebook's would be looked for, and not found

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent
FORMAT = 1
# where the names of a preset are looked up, and the script that draws its data when it is missing
WORLDS = {"mini": dict(models="tests/mini", data="tests/mini/data", maker="tests/mini/draw.py")}
HUB = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
}
# open_clip's architecture; the weights: a tag of open_clip, or a file of a hub repository
REWARDS = {
    "clip": ("ViT-L-14-336-quickgelu", "openai"),
    "dfn-clip": ("ViT-H-14-378-quickgelu", "dfn5b"),
    "hpsv2": ("ViT-H-14", ("xswu/HPSv2", "HPS_v2_compressed.pt")),
    "hpsv2.1": ("ViT-H-14", ("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
    "aesthetic": ("ViT-L-14-quickgelu", "openai"),
}
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth"
)


# ---------------------------------------------------------------------------- noise
def add_noise(z0, eps, t):
    """z_t = (1-t) z_0 + t eps (1); z0, eps (B, ...), t (B,)."""
    t = t.reshape(-1, *[1] * (z0.ndim - 1))
    return (1 - t) * z0 + t * eps


def tweedie(z, u, t):
    """zhat_0 = z_t - t u, E[z_0 | z_t] for the exact velocity; z, u (B, ...), t (B,)."""
    return z - t.reshape(-1, *[1] * (z.ndim - 1)) * u


def sde_step(z, u, t, t_next, noise, nu=lambda t: 3 * t * t):
    """An Euler-Maruyama step from t to t_next < t of the SDE that keeps the marginals (11).

    z + d (-u + nu^2/2 score) + nu sqrt(d) noise, d = t - t_next, score = -((1-t) u + z) / t (25).
    z, u, noise (B, ...); t and t_next floats; nu(t) = 0 is the ODE. No noise where t_next is 0.
    Computed in float32, returned in z's dtype.
    """
    d = t - t_next
    x = z.float()
    u = u.float()
    x = x - d * u - d * 0.5 * nu(t) * nu(t) * ((1 - t) * u + x) / t
    if t_next > 0:
        x = x + nu(t) * d**0.5 * noise.float()
    return x.to(z.dtype)


def sigma_grid(scheduler, steps, tokens, even=False):
    """The pipeline's own noise levels (steps + 1,), from 1 to 0; tokens: of one image."""
    c = scheduler.config
    levels = dict(num_inference_steps=steps)
    if even:  # trap: FLUX's pipeline names even levels, SD 3's leaves them to the scheduler
        levels = dict(sigmas=np.linspace(1, 1 / steps, steps))
    if c.get("use_dynamic_shifting"):
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        levels["mu"] = c.base_shift + slope * (tokens - c.base_image_seq_len)
    scheduler.set_timesteps(**levels)
    return scheduler.sigmas.float().cpu()


# ---------------------------------------------------------------------------- transformer, cut
def dit_blocks(transformer):
    """All blocks in the order of i: FLUX's double-stream blocks come before its single ones."""
    single = getattr(transformer, "single_transformer_blocks", ())
    return [*transformer.transformer_blocks, *single]


def keep_blocks(transformer, i):
    """Drop, in place, all that comes after block i: what is left can only be run up to there."""
    double = len(transformer.transformer_blocks)
    transformer.transformer_blocks = transformer.transformer_blocks[:i]
    if hasattr(transformer, "single_transformer_blocks"):
        left = max(i - double, 0)
        transformer.single_transformer_blocks = transformer.single_transformer_blocks[:left]
    transformer.norm_out = transformer.proj_out = None


def fingerprint(block):
    """Eight digits of a module's weights, by their signs alone: no dtype changes these."""
    found = hashlib.sha1()
    for p in block.parameters():
        found.update(torch.signbit(p.float()).cpu().numpy())
    return found.hexdigest()[:8]


def fingerprints(transformer, rewards, i=None):
    """{transformer: of each of the first i blocks, reward_weights}; None: no transformer read."""
    towers = [nn.ModuleList(filter(None, (reward.visual, reward.head))) for reward in rewards]
    found = dict(reward_weights=[fingerprint(tower) for tower in towers])
    if transformer is not None:
        found["transformer"] = [fingerprint(block) for block in dit_blocks(transformer)[:i]]
    return found


def begin(transformer, z, sigma, text, pooled, guidance=3.5):
    """All before the first block: z (B, C, h, w), sigma (B,), text (B, T, D), pooled (B, P).

    The state: h image tokens, c text tokens, t time embedding, all with the batch first; i;
    `fixed`, which is the same for the whole batch. guidance is what FLUX embeds.
    """
    if own := adapter(transformer):
        return own.begin(transformer, z, sigma, text, pooled)
    h, w = (side // 2 for side in z.shape[2:])
    fixed = dict(grid=(h, w), kwargs={})
    state = dict(c=transformer.context_embedder(text), i=0, fixed=fixed)
    if cuts_patches(transformer):
        # trap: it wants 1000 sigma, and says nothing when it gets sigma
        time = transformer.time_text_embed(sigma * 1000, pooled)
        return dict(state, h=transformer.pos_embed(z), t=time)
    ids = torch.zeros(text.shape[1] + h * w, 3, device=z.device)
    rows, columns = (torch.arange(n, device=z.device) for n in (h, w))
    ids[text.shape[1] :, 1:] = torch.cartesian_prod(rows, columns)
    scales = [sigma.to(z.dtype) * 1000]
    if transformer.config.guidance_embeds:
        scales.append(guidance * 1000 + torch.zeros_like(scales[0]))
    time = transformer.time_text_embed(*scales, pooled)
    fixed["kwargs"] = dict(image_rotary_emb=transformer.pos_embed(ids))
    return dict(state, h=transformer.x_embedder(pack(z)), t=time)


def run_blocks(transformer, state, stop=None):
    """Run blocks state.i .. stop-1, all by default. SD 3's last block gives None for the text."""
    blocks = dit_blocks(transformer)
    stop = len(blocks) if stop is None else stop
    kwargs = dict(temb=state["t"], **state["fixed"]["kwargs"])
    if "mask" in state:  # of the text, where it is padded
        kwargs["encoder_hidden_states_mask"] = state["mask"]
    h = state["h"]
    c = state["c"]
    for block in blocks[state["i"] : stop]:
        c, h = block(hidden_states=h, encoder_hidden_states=c, **kwargs)
    return dict(state, h=h, c=c, i=stop)


def end(transformer, state):
    """The velocity (B, C, h, w) from a state after the last block."""
    h, w = state["fixed"]["grid"]
    y = transformer.proj_out(transformer.norm_out(state["h"], state["t"]))
    if not cuts_patches(transformer):
        return unpack(y, h, w)
    y = y.view(len(y), h, w, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)  # (row, column, channel)
    return y.reshape(len(y), -1, 2 * h, 2 * w)


def cuts_patches(transformer):
    """Whether it takes latents and cuts their patches itself, as SD 3's; others take tokens."""
    return hasattr(transformer.pos_embed, "proj")


def pack(z):
    """Latents (B, C, 2 h, 2 w) -> FLUX's tokens (B, h w, C 2 2)."""
    return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(y, h, w):
    """FLUX's tokens (B, h w, C 2 2) -> latents (B, C, 2 h, 2 w)."""
    y = y.view(len(y), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(len(y), -1, 2 * h, 2 * w)


def state_index(state, index):
    """The state of some of the batch: index is anything that indexes a tensor's first axis."""
    return {k: v[index] if torch.is_tensor(v) else v for k, v in state.items()}


def state_cat(states):
    """Several states at the same block, one after the other, as one batch."""
    if len({s["i"] for s in states}) > 1:
        raise ValueError(f"states after different blocks: {[s['i'] for s in states]}")
    tensors = [k for k, v in states[0].items() if torch.is_tensor(v)]
    return states[0] | {k: torch.cat([s[k] for s in states]) for k in tensors}


def velocity(
    transformer,
    z,
    sigma,
    condition,
    null=None,
    cfg=1,
    guidance=3.5,
    prefix=None,
    checkpointing=False,
):
    """u(z_t, t) (B, C, h, w) in z's dtype; with cfg != 1 un + cfg (uc - un).

    condition and null are (text, pooled), of batch B or 1. prefix: the null half's state after
    some block at this very z and sigma, to be resumed instead of computed again.
    """
    dtype = next(transformer.parameters()).dtype
    guided = cfg != 1 and null is not None
    pairs = [null, condition] if guided and prefix is None else [condition]
    pairs = [[v.to(z.device, dtype).expand(len(z), *v.shape[1:]) for v in p] for p in pairs]
    states = [begin(transformer, z.to(dtype), sigma, *pair, guidance) for pair in pairs]
    if guided and prefix is not None:
        states = [prefix, run_blocks(transformer, states[0], prefix["i"])]
    state = state_cat(states)
    for i in range(state["i"] + 1, len(dit_blocks(transformer)) + 1 if checkpointing else 0):
        state = checkpoint(run_blocks, transformer, state, i, use_reentrant=False)
    u = end(transformer, run_blocks(transformer, state)).to(z.dtype)
    if not guided:
        return u
    un, uc = u.chunk(2)
    return un + cfg * (uc - un)


class Visitor(nn.Module):
    """A block that stays on the CPU: a copy of its weights is on the device while it is called.

    A gradient keeps the copies that it has to pass, unless the call is checkpointed.
    """

    def __init__(self, block, device):
        super().__init__()
        self.block = block
        self.device = device
        if device.type == "cuda":  # trap: a copy of other memory is slow, and waits
            for p in block.parameters():
                p.data = p.data.pin_memory()

    def _apply(self, *args):
        return self  # the .to(device) of the model around it

    def forward(self, **given):
        weights = self.block.state_dict()
        weights = {k: v.to(self.device, non_blocking=True) for k, v in weights.items()}
        return torch.func.functional_call(self.block, weights, (), given)


class Unavailable(SystemExit):
    """Files that are not on this machine and cannot be fetched, in one sentence."""


@contextlib.contextmanager
def needs(source):
    """Whatever goes wrong while the files of `source` are loaded becomes one sentence."""
    logging.disable(logging.ERROR)  # libraries log what they raise, and remark on random weights
    try:
        yield
    except Exception as e:
        if out_of_memory(e):
            raise
        raise explain(source, e) from None
    finally:
        logging.disable(logging.NOTSET)


def out_of_memory(error):
    """Whether this error, or one behind it, is that there is too little memory."""
    said = "".join(traceback.format_exception(error))
    return any(s in said for s in ("MemoryError", "DefaultCPUAllocator", "out of memory"))


def explain(source, error):
    """The error to stop with: why the files of `source` cannot be had or read, and what to do."""
    from huggingface_hub import errors as hub

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    get = f"wget -P {torch.hub.get_dir()}/checkpoints" if "://" in source else "hf download"
    page = f"https://huggingface.co/{source}"
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, URLError)
    remedies = {
        hub.GatedRepoError: f"is gated: accept its licence at {page}, then: hf auth login",
        hub.RepositoryNotFoundError: "is neither a folder nor a hub repository",
        offline: "is not on this machine and its host cannot be reached: get it where there is a "
        f"network ({get} {source}), or pass a folder",
    }
    if any(isinstance(c, ImportError) for c in chain):
        return SystemExit(f"error: a package is missing ({error}): pip install -r requirements.txt")
    if any("No space left" in str(c) for c in chain):
        remedy = "free some, or move HF_HOME"
        return SystemExit(f"error: there is no room on the disk for {source}: {remedy}")
    for kinds, remedy in remedies.items():
        if any(isinstance(c, kinds) for c in chain):
            return Unavailable(f"error: {source} {remedy}")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return SystemExit(f"error: {source} cannot be read: {reason}")


class Backbone:
    """A diffusion transformer, its VAE (float32) and scheduler, frozen, each loaded when used.

    compiles: torch.compile of every block, in place. offloads: blocks stay on the CPU.
    """

    def __init__(
        self, name, preset="mini", device="cpu", dtype=torch.float32, compiles=False, offloads=False
    ):
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        self.name = name
        self.device = torch.device(device)
        self.dtype = dtype
        self.compiles = compiles
        self.offloads = offloads
        self.source = str(model_folder(name, preset) or HUB.get(name, name))
        with needs(self.source):
            if not Path(self.source).is_dir():  # trap: diffusers would hide the hub's reason
                from huggingface_hub import hf_hub_download

                hf_hub_download(self.source, "model_index.json")
            self.index = diffusers.DiffusionPipeline.load_config(self.source)
        if "transformer" not in self.index:
            fail(f"{self.source} is no pipeline known here: its index names no transformer")
        self.transformer_class = getattr(diffusers, self.index["transformer"][1])

    @property
    def adapter(self):
        return ADAPTERS.get(self.transformer_class.__name__)

    @property
    def is_flux(self):
        return self.transformer_class.__name__.startswith("Flux")

    @property
    def cfg(self):
        """The usual scale of guidance: none for FLUX, which is distilled."""
        return 1.0 if self.is_flux else 4.5

    def load(self, part, dtype):
        """A part of the pipeline, on the CPU."""
        import diffusers

        with needs(self.source):
            cls = getattr(diffusers, self.index[part][1])
            model = cls.from_pretrained(self.source, subfolder=part, dtype=dtype)
        return model.eval().requires_grad_(False)

    def prefix(self, i=None):
        """The transformer without what comes after block i, cut before it goes to the device."""
        transformer = self.load("transformer", self.dtype)
        if i is not None:
            keep_blocks(transformer, i)
        if self.compiles:
            torch._dynamo.config.recompile_limit = 64  # of all blocks together: they are one code
            for block in dit_blocks(transformer):
                block.compile()
        for name in ("transformer_blocks", "single_transformer_blocks") if self.offloads else ():
            if blocks := getattr(transformer, name, None):
                blocks = [Visitor(block, self.device) for block in blocks]
                setattr(transformer, name, nn.ModuleList(blocks))
        return transformer.to(self.device)

    @cached_property
    def transformer(self):
        return self.prefix()

    @cached_property
    def vae(self):
        return self.load("vae", torch.float32).to(self.device)

    def free(self):
        """Let go of transformer and VAE, which are loaded again if they are used again."""
        for part in ("transformer", "vae"):
            self.__dict__.pop(part, None)

    @cached_property
    def scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

        with needs(self.source):
            return Scheduler.from_pretrained(self.source, subfolder="scheduler")

    def set_shift(self, shift):
        """Another shift of the noise levels, t -> shift t / (1 + (shift - 1) t), FLUX's as well."""
        fixed = dict(shift=shift, use_dynamic_shifting=False) if shift else {}  # None: its own
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config, **fixed)

    def grid(self, steps, resolution):
        """Noise levels, floats from 1 to 0, for square images of so many pixels a side."""
        tokens = (resolution // 16) ** 2
        even = self.is_flux or self.adapter is not None
        return sigma_grid(self.scheduler, steps, tokens, even).tolist()

    def latent_shape(self, resolution):
        return self.vae.decoder.conv_in.in_channels, resolution // 8, resolution // 8

    def latent_space(self):
        """What two backbones must have in common to read each other's latents: the VAE."""
        ends = (self.vae.encoder.conv_in, self.vae.decoder.conv_out)
        weights = torch.cat([m.weight.flatten() for m in ends]).bfloat16().cpu()
        vae = hashlib.sha1(weights.view(torch.uint8).numpy().tobytes()).hexdigest()[:8]
        c = self.vae.config
        if self.adapter:
            return f"{self.transformer_class.__name__}'s latents, vae {vae}"
        scaling = f"scale {c.scaling_factor:.4f}, shift {c.shift_factor:.4f}"
        return f"{c.latent_channels} channels, {scaling}, vae {vae}"

    def encode(self, x):
        """Images -> latents: posterior mean, shifted and scaled."""
        x = x.to(self.device) * 2 - 1
        if self.adapter:
            return self.adapter.encode(self.vae, x)
        c = self.vae.config
        return (self.vae.encode(x).latent_dist.mean - c.shift_factor) * c.scaling_factor

    def decode(self, z):
        """Latents -> images, clamped to [0, 1]; differentiable."""
        if self.adapter:
            x = self.adapter.decode(self.vae, z.float())
        else:
            c = self.vae.config
            x = self.vae.decode(z.float() / c.scaling_factor + c.shift_factor).sample
        return (x / 2 + 0.5).clamp(0, 1)

    def velocity(self, z, sigma, condition, null=None, cfg=1.0, **more):
        return velocity(self.transformer, z, sigma, condition, null, cfg, **more)

    def prompts(self, texts, cache=None, batch=32):
        """(text (N, T, D), pooled (N, P)) by the pipeline's own encoders, on the CPU.

        These are loaded and freed here: call it before the transformer is used. cache: a folder
        whose file is read as the embeddings are used, and by the next run; SD 3.5 takes 2.7 MB
        a prompt.
        """
        files = Path(self.source).glob("text_encoder*/*.safetensors")
        key = digest(self.source, stamps(sorted(files)), self.dtype, list(texts))
        if cache:
            path = Path(cache, f"prompts_{key}.bin")
            size = path.stat().st_size - 8 if path.exists() else 0
            # a whole file ends with the number of the bytes before
            if size <= 0 or np.fromfile(path, "<i8", offset=size)[0] != size:
                with replacing(path) as temporary, open(temporary, "wb") as file:
                    for part in self.encode_prompts(texts, batch):
                        file.write(part.view(torch.uint8).numpy())
                    file.write(np.int64(file.tell()).tobytes())
                size = path.stat().st_size - 8
            rows = torch.from_file(str(path), size=size // self.dtype.itemsize, dtype=self.dtype)
            rows = rows.view(len(texts), -1)
        else:
            rows = torch.cat([*self.encode_prompts(texts, batch)])
        with needs(self.source):
            c = self.transformer_class.load_config(self.source, subfolder="transformer")
        P = self.adapter.pooled if self.adapter else c["pooled_projection_dim"]
        text, pooled = rows.tensor_split([-P], 1)
        return text.unflatten(1, (-1, c["joint_attention_dim"])), pooled

    @torch.no_grad()
    def encode_prompts(self, texts, batch):
        """Rows (B, T D + P) of each batch, a prompt's text and pooled embedding, on the CPU."""
        pipe = self.text_pipeline()
        for k in range(0, len(texts), batch):
            text, pooled = self.embed(pipe, list(texts[k : k + batch]))
            yield torch.cat([text.flatten(1), pooled], 1).to("cpu", self.dtype)

    def embed(self, pipe, texts):
        """Text (N, T, D), of one T for all texts, and pooled (N, P), by the pipeline's encoders."""
        if self.adapter:
            return self.adapter.prompts(pipe, texts, self.device)
        if self.is_flux:
            length = min(512, pipe.tokenizer_2.model_max_length)
            return pipe.encode_prompt(texts, None, self.device, max_sequence_length=length)[:2]
        length = min(256, (pipe.tokenizer_3 or pipe.tokenizer_2).model_max_length)
        options = dict(max_sequence_length=length, do_classifier_free_guidance=False)
        found = pipe.encode_prompt(texts, None, None, self.device, **options)
        return found[0], found[2]  # negative ones between

    def text_pipeline(self):
        """The pipeline with its text encoders only."""
        import diffusers
        import transformers

        transformers.utils.logging.disable_progress_bar()
        # trap: parts that the pipeline was saved without must be passed again
        parts = {k: v for k, v in self.index.items() if isinstance(v, (list, tuple))}
        absent = {k: None for k, v in parts.items() if v[0] is None}
        with needs(self.source):
            config = self.transformer_class.load_config(self.source, subfolder="transformer")
            with torch.device("meta"):  # it is asked for one width only
                shell = self.transformer_class.from_config(config)
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                self.source, transformer=shell, vae=None, dtype=self.dtype, **absent
            )
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).to(self.device)
        return pipe


# ---------------------------------------------------------------------------- one backbone more
class QwenImage:
    """All that a backbone besides SD 3 and FLUX provides (docs/published.md).

    Here pooled (B, P) is the mask of the text (B, T, D), which is padded with zeros.
    """

    pooled = 512  # P, and T

    def begin(self, transformer, z, sigma, text, pooled):
        """The state before the first block."""
        grid = z.shape[2] // 2, z.shape[3] // 2
        h = transformer.img_in(pack(z))
        t = transformer.time_text_embed(sigma.to(z.dtype), h)  # trap: of sigma, not of 1000 sigma
        c = transformer.txt_in(transformer.txt_norm(text))
        rotary = transformer.pos_embed([(1, *grid)], z.device, text.shape[1])  # one frame
        fixed = dict(grid=grid, kwargs=dict(image_rotary_emb=rotary))
        return dict(h=h, c=c, t=t, mask=pooled.bool(), i=0, fixed=fixed)

    def prompts(self, pipe, texts, device):
        """Text (N, T, D), of one T for all texts, and pooled (N, P), by the pipeline's encoder."""
        text, mask = pipe.encode_prompt(texts, device, max_sequence_length=self.pooled)
        mask = torch.ones_like(text[..., 0]) if mask is None else mask  # trap: None if all is text
        room = self.pooled - text.shape[1]
        return F.pad(text, (0, 0, 0, room)), F.pad(mask, (0, room))

    def encode(self, vae, x):
        """Images in [-1, 1] -> latents, shifted and scaled."""
        mean, std = self.channels(vae)
        return ((vae.encode(x[:, :, None]).latent_dist.mean - mean) / std)[:, :, 0]

    def decode(self, vae, z):
        """Latents -> images in [-1, 1]; differentiable."""
        mean, std = self.channels(vae)
        return vae.decode(z[:, :, None] * std + mean).sample[:, :, 0]

    def channels(self, vae):
        both = vae.config.latents_mean, vae.config.latents_std
        return [torch.tensor(v, device=vae.device).view(-1, 1, 1, 1) for v in both]


ADAPTERS = {"QwenImageTransformer2DModel": QwenImage()}


def adapter(transformer):
    """None of SD 3's and FLUX's, which stand in the functions themselves."""
    return ADAPTERS.get(type(getattr(transformer, "_orig_mod", transformer)).__name__)  # compiled


# ---------------------------------------------------------------------------- the reward model
class Reward:
    """A frozen CLIP-like reward: <e, text> of unit vectors, or head(e) of the aesthetic predictor.

    name: a world's or a published reward, or an open_clip folder. dtype: bfloat16 for the tower's
    matrix products, on float32 weights. weights=False leaves a published one with random weights,
    or none on the meta device. The text tower stays on the CPU and visits the device in text().
    """

    def __init__(self, name, preset="mini", device="cpu", dtype=torch.float32, weights=True):
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        folder = reward_folder(name, preset if weights else "paper")
        source, pretrained = (f"local-dir:{folder}", None) if folder else REWARDS[name]
        # HPSv2's authors resize a tensor, the longest side to 224; all others resize a PIL image
        self.resizes_tensors = folder is None and name.startswith("hpsv2")
        tag = open_clip.get_pretrained_cfg(source, str(pretrained))  # {} of folders and HPSv2
        quick = folder or open_clip.get_model_config(source).get("quick_gelu", False)
        if tag and tag.get("quick_gelu", False) != quick:
            fail(f"{source} and {pretrained} differ in QuickGELU: use {source}-quickgelu")
        looks = {k: tag[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in tag}
        if self.resizes_tensors:
            looks = {"resize_mode": "longest"}
        origin = folder or tag.get("hf_hub", "").strip("/") or pretrained[0]
        self.name = name
        self.device = torch.device(device)
        self.dtype = dtype
        self.head = None
        with needs(str(origin)):
            if weights and self.resizes_tensors:
                from huggingface_hub import hf_hub_download

                pretrained = hf_hub_download(*pretrained)
            place = "meta" if self.device.type == "meta" else "cpu"
            with torch.device(place):
                model = open_clip.create_model(
                    source,
                    pretrained=pretrained if weights else None,
                    load_weights=weights,
                    require_pretrained=weights,
                    device=place,
                    force_preprocess_cfg=None if folder else looks,
                )
            if folder and (folder / "aesthetic_head.safetensors").exists():
                self.head = aesthetic_head(load_file(folder / "aesthetic_head.safetensors"))
            elif folder is None and name == "aesthetic":
                self.head = aesthetic_head(published_head() if weights else None)
        self.head = self.head and self.head.to(device)
        model = model.float().eval().requires_grad_(False)  # trap: it comes in train mode
        self.tokenizer = open_clip.get_tokenizer(source)
        self.visual = model.visual.to(device)
        del model.visual
        self.text_model = model
        cfg = self.visual.preprocess_cfg
        known = {k: cfg[k] for k in PreprocessCfg.__annotations__ if k in cfg}
        self.preprocess_cfg = PreprocessCfg(**known)
        self.file_transform = image_transform_v2(self.preprocess_cfg, is_train=False)
        self.size = np.ravel(self.preprocess_cfg.size)[0].item()
        moments = torch.tensor([cfg["mean"], cfg["std"]]).view(2, 3, 1, 1)
        self.moments = {d.type: moments.to(d) for d in (torch.device("cpu"), self.device)}

    @property
    def uses_text(self):
        return self.head is None

    def transform(self, image):
        """A PIL image in RGB -> the tower's input (3, s, s), as its authors score image files."""
        if not self.resizes_tensors:
            return self.file_transform(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return self.normalise(self.resize(x))[0]

    def resize(self, x):
        """Images of any size -> (B, 3, s, s) in [0, 1], as `transform` does it; differentiable."""
        from open_clip.transform import center_crop_or_pad

        H, W = x.shape[-2:]
        s = self.size
        cfg = self.preprocess_cfg
        if cfg.resize_mode == "squash":
            size = (s, s)
        elif cfg.resize_mode == "shortest":  # the roundings are torchvision's
            size = (s * H // min(H, W), s * W // min(H, W))
        elif self.resizes_tensors:
            size = tuple(round(n * (s / max(H, W))) for n in (H, W))
        else:  # open_clip divides, which rounds a half to the other side
            size = tuple(round(n / (max(H, W) / s)) for n in (H, W))
        if size != (H, W):
            mode = "bilinear" if cfg.interpolation == "bilinear" else "bicubic"
            x = F.interpolate(x, size, mode=mode, antialias=True)
            if not self.resizes_tensors:  # PIL's uint8 range, which bicubic overshoots
                x = x.clamp(0, 1)
        return center_crop_or_pad(x, [s, s], fill=cfg.fill_color / 255)

    def normalise(self, x):
        """(B, 3, s, s) in [0, 1] -> the tower's input."""
        mean, std = self.moments[x.device.type]
        return (x - mean) / std

    def embed(self, x):
        """Images of any size -> raw embedding (B, E) and tokens after ln_post (B, N+1, d)."""
        x = self.normalise(self.resize(x))
        with autocast(self.device, self.dtype):
            raw, tokens = tail(self.visual, tokens_entering(self.visual, self.visual.conv1(x)), 1)
        return raw.float(), tokens.float()

    @torch.no_grad()
    def text(self, prompts, batch=256):
        """Unit text embeddings (N, E); None for a reward that reads no text."""
        if not self.uses_text:
            return None
        tokens = self.tokenizer(list(prompts)).to(self.device)
        encode = self.text_model.to(self.device).encode_text
        found = torch.cat([encode(part, normalize=True) for part in tokens.split(batch)])
        self.text_model.cpu()
        return found

    def score(self, e, text=None):
        """Scores (B,) of unit or mean embeddings e (B, E), with text (B, E) or (E,)."""
        return (e * text).sum(-1) if self.head is None else self.head(e)[..., 0]


def autocast(device, dtype):
    """Matrix products in bfloat16 on float32 weights, if that is the dtype; meta has none."""
    if dtype == torch.bfloat16 and device.type != "meta":
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def published_head():
    with needs(AESTHETIC_HEAD):
        load = torch.hub.load_state_dict_from_url
        return load(AESTHETIC_HEAD, map_location="cpu", weights_only=True)


def aesthetic_head(weights=None, width=768):
    """The published MLP: affine, for nothing stands between its layers but dropout.

    weights: of the keys layers.{0,2,4,6,7}; None: random.
    """
    weights = {k.removeprefix("layers."): v.float() for k, v in (weights or {}).items()}
    width = weights["0.weight"].shape[1] if weights else width
    first = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    last = [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    head = nn.Sequential(*first, *last)
    if weights:
        head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


def clean_reward(rewards, texts, images):
    """r (B,) of images, summed over the rewards; texts: each reward's own (B, E), or None."""
    unit = [F.normalize(reward.embed(images)[0], dim=-1) for reward in rewards]
    return sum(r.score(e, text) for r, e, text in zip(rewards, unit, texts, strict=True))


def to_tokens(f):
    """(B, d, g, g) -> (B, g*g, d)."""
    return f.flatten(2).transpose(1, 2)


def tokens_entering(visual, patches):
    """Patches (B, d, g, g) -> tokens entering block 1 (B, N+1, d): CLS, positions, ln_pre."""
    x = to_tokens(patches)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
    return visual.ln_pre(x + visual.positional_embedding.to(x.dtype))


def tail(visual, x, j):
    """Tokens entering block j (B, N+1, d) -> raw embedding (B, E), tokens after ln_post."""
    for block in visual.transformer.resblocks[j - 1 :]:
        x = block(x)
    x = visual.ln_post(x)
    return x[:, 0] @ visual.proj, x


# ---------------------------------------------------------------------------- the value model
def resample(f, grid, antialias=False):
    """Up: one bilinear resampling of (B, d, h, w) to the reward's patch grid [D6]."""
    if f.shape[-2:] == tuple(grid):
        return f
    return F.interpolate(f, grid, mode="bilinear", antialias=antialias)


class Stitch(nn.Module):
    """s = Up(F(h)) + G(Up(F(h))) (57)-(58): F is the closed form W, and G is zero at the start."""

    def __init__(self, W, bias, grid, antialias=False):
        super().__init__()
        d_out, d_in = W.shape
        narrow = max(d_out // 8, 1)
        self.grid = tuple(grid)
        self.antialias = antialias
        self.F = nn.Conv2d(d_in, d_out, 1)
        down = nn.Conv2d(d_out, narrow, 1)
        up = nn.Conv2d(narrow, d_out, 1)
        self.G = nn.Sequential(nn.SiLU(), down, nn.SiLU(), up)
        with torch.no_grad():
            self.F.weight.copy_(W[:, :, None, None])
            self.F.bias.copy_(bias)
            up.weight.zero_()
            up.bias.zero_()

    def forward(self, h):
        y = resample(self.F(h), self.grid, self.antialias)
        return y + self.G(y)


class StitchedValue(nn.Module):
    """V(z_t) = r^{>=j}( s_psi( u^{<=i}(z_t, t) ) ) (6); gradients reach z, the blocks are frozen.

    front: 'dit', the first i blocks on the null text; 'vae', the noisy latent itself.
    embedding: 'mean', e = raw / norm, an estimate of E[e_RM | z_t] [D14]; 'unit', the paper's.
    """

    def __init__(
        self,
        transformer,
        null,
        reward,
        stitch,
        i,
        j,
        cls=None,
        front="dit",
        embedding="mean",
        norm=1.0,
    ):
        super().__init__()
        # shared and frozen: not a submodule, so neither saved nor trained
        self.__dict__.update(transformer=transformer, reward=reward, score=reward.score)
        self.null = null
        self.i = i
        self.j = j
        self.front = front
        self.embedding = embedding
        self.norm = float(norm)
        self.stitch = stitch
        self.visual = copy.deepcopy(reward.visual).requires_grad_(False)
        self.cls = None if cls is None else nn.Parameter(cls.clone())  # [D3] of j > 1
        v = self.visual
        used = [*v.transformer.resblocks[j - 1 :].parameters(), *v.ln_post.parameters(), v.proj]
        if j == 1:
            used += [v.class_embedding, v.positional_embedding, *v.ln_pre.parameters()]
        for p in used:
            p.requires_grad_(True)

    @classmethod
    def load(cls, source, transformer=None, device="cpu", dtype=torch.float32):
        """The frozen value of a value.pt (03), of a folder that save() wrote, or of its hub id.

        transformer: of the pipeline that it is to guide, so that no block is loaded twice.
        """
        artifact = read_value(source)
        spec = artifact["spec"]
        preset = artifact["config"]["preset"]
        reward = Reward(spec["reward"], preset, device, dtype)
        if transformer is None and spec["front"] == "dit":
            transformer = Backbone(spec["backbone"], preset, device, dtype).prefix(spec["i"])
        return build_value(artifact, transformer, reward)

    def save(self, folder, rows=()):
        """Write the value for the hub: weights, config.json and a model card with 04's rows.

        The diffusion blocks, which are frozen, are named in it and not copied.
        """
        names = ("text", "pooled")
        data = self.trained_state() | dict(zip(names, self.null, strict=True))
        data = {k: v.contiguous().cpu() for k, v in data.items()}
        about = {k: v for k, v in self.about.items() if k not in ("config", "format")}
        about |= dict(norm=self.norm, preset=self.about["config"]["preset"])
        with replacing(Path(folder, "value.safetensors")) as temporary:
            save_file(data, temporary, metadata=dict(about=json.dumps(about)))
        with replacing(Path(folder, "README.md")) as temporary:
            temporary.write_text(model_card(self.about["spec"], rows))
        write_json(Path(folder, "config.json"), about)

    def features(self, z, sigma, state=None):
        """u^{<=i}(z_t, t) (B, d, h, w), and the state after block i (None of a 'vae' front).

        state: of the same transformer at this z and sigma, after fewer blocks, to be resumed.
        """
        if self.front == "vae":
            return z, None
        if state is None:
            dtype = next(self.transformer.parameters()).dtype
            null = [v.to(z.device, dtype).expand(len(z), *v.shape[1:]) for v in self.null]
            state = begin(self.transformer, z.to(dtype), sigma, *null)
        state = run_blocks(self.transformer, state, self.i)
        return state["h"].transpose(1, 2).unflatten(2, state["fixed"]["grid"]).float(), state

    def head(self, features):
        """Features (B, d, h, w) -> embedding (B, E), unit or mean, and tokens (B, N+1, d)."""
        with autocast(self.reward.device, self.reward.dtype):
            f = self.stitch(features)
            if self.j == 1:
                x = tokens_entering(self.visual, f)
            else:
                x = torch.cat([self.cls.expand(len(f), 1, -1), to_tokens(f)], 1)
            raw, tokens = (v.float() for v in tail(self.visual, x, self.j))
        return F.normalize(raw, dim=-1) if self.embedding == "unit" else raw / self.norm, tokens

    def embed(self, z, sigma):
        return self.head(self.features(z, sigma)[0])[0]

    def forward(self, z, sigma, text=None):
        """V (B,) of noisy latents z; gradients reach z, of any dtype and device.

        z (B, C, h, w), or (B, h w / 4, 4 C) as FLUX's pipeline packs those of a square image; sigma
        in [0, 1], (B,) or one number; text: B prompts or one, or unit embeddings (B, E) or (E,).
        """
        device = self.stitch.F.weight.device
        if z.ndim == 3:
            side = math.isqrt(z.shape[1])
            z = unpack(z, side, side) if side**2 == z.shape[1] else z
        channels = self.channels()
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"latents {tuple(z.shape)}: this value reads (B, {channels}, h, w)")
        if self.front == "dit" and (z.shape[2] % 2 or z.shape[3] % 2):
            raise ValueError(f"latents of {z.shape[2]} x {z.shape[3]}: both sides must be even")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=device)
        if not 0 <= sigma.min() <= sigma.max() <= 1:
            raise ValueError("sigma lies in [0, 1], 1 for noise: a timestep is a thousand times it")
        if isinstance(text, (str, list, tuple)):
            text = self.reward.text([text] if isinstance(text, str) else text)
        text = text if text is None else text.to(device)
        return self.score(self.embed(z.to(device), sigma.expand(len(z))), text)

    def channels(self):
        """Of the latents that are read."""
        if self.front == "vae":
            return self.stitch.F.in_channels
        packed = 1 if cuts_patches(self.transformer) else 4
        return self.transformer.config.in_channels // packed

    def trained_state(self):
        """What training can change, as a plain dict of tensors."""
        trained = {
            k for k, p in self.named_parameters() if p.requires_grad or k.startswith("stitch")
        }
        return {k: v for k, v in self.state_dict().items() if k in trained or k == "cls"}


def model_card(spec, rows):
    """A hub page of a value: what it is cut from, how to use it, 04's rows of it."""
    lines = [
        "---\nlibrary_name: stitchvm\ntags: [reward-model, text-to-image]\n---",
        f"# V(z_t) of {spec['reward']} on the noisy latents of {spec['backbone']}\n",
        f"The first {spec['i']} blocks of {spec['backbone']}, which are not copied here, a linear",
        f"stitch and {spec['reward']} from block {spec['j']} on, at {spec['resolution']} px.\n",
        "    from common import StitchedValue",
        "    value = StitchedValue.load(FOLDER_OR_HUB_ID, transformer=pipe.transformer)",
        "    value(latents, sigma, prompts)  # (B,)\n",
        f"Latents: {spec['latent_space']}.\n",
    ]
    keys = ("benchmark", "metric", "sigma", "value", "value_se", "n")
    rows = [[f"{r[k]:.3f}" if isinstance(r[k], float) else str(r[k]) for k in keys] for r in rows]
    table = [keys, ["---"] * len(keys), *rows] if rows else []
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in table)]) + "\n"


def guide(value, prompts, c, form="unit"):
    """A callback_on_step_end of a diffusers pipeline of SD 3 or FLUX: guidance by grad V.

    What 05's stitchvm adds with --sampler ode, in the form 'constant' or 'unit'. The first step
    goes unguided: a callback sees no latents before it.
    """
    text = value.reward.text([prompts] if isinstance(prompts, str) else prompts)
    move = partial(guiding_move, value, text, c, form)
    moves = []  # what the step under way is to get at its end

    def add_move(pipe, k, timestep, tensors):
        z = tensors["latents"] + (moves.pop() if k else 0.0)
        moves.clear()  # of a call that was cut off
        t, *after = pipe.scheduler.sigmas[k + 1 :].tolist()
        if after:
            moves.append(move(z, t, after[0]))
        return dict(latents=z)

    return add_move


@torch.enable_grad()
def guiding_move(value, text, c, form, z, t, t_next):
    """d c grad V at latents z in a step of size d = t - t_next; form unit: of a unit gradient."""
    z = z.detach().requires_grad_()
    value(z, t, text).sum().backward()
    grad = z.grad
    if form == "unit":
        grad = F.normalize(grad.flatten(1), dim=1).view_as(grad)
    return (t - t_next) * c * grad


def joint_value(values, z, sigma, texts):
    """The sum (B,) of several values at z (B, C, h, w), sigma (B,), each with its texts (B, E);
    and {id of a transformer: the state after its largest i}, which values on it share."""
    total = 0
    states = {}
    for v, text in sorted(zip(values, texts, strict=True), key=lambda pair: pair[0].i):
        features, state = v.features(z, sigma, states.get(id(v.transformer)))
        total = total + v.score(v.head(features)[0], text)
        if state is not None:
            states[id(v.transformer)] = state
    return total, states


def shares_prefix(values, backbone, null, cfg):
    """Whether a value's blocks are the first ones of the denoiser's null half [D10]."""
    mine = [v for v in values if v.front == "dit" and v.transformer is backbone.transformer]
    if cfg == 1 or not mine:
        return False
    # encoded again, in another batch or dtype, a text differs by rounding
    pairs = [(a, b) for v in mine for a, b in zip(v.null, null, strict=True)]
    same = all(a.shape == b.shape and (a.to(b) - b).norm() <= 0.02 * b.norm() for a, b in pairs)
    if not same:
        print("warning: a value's null text is not this run's; its prefix is not shared")
    return same


def value_files(args, names):
    """The value.pt of each reward: --value's, else --out's, else of the reward's own run."""
    own = Path(args.out, "value.pt")
    files = args.value or [run_folder(args.preset, args.backbone, n) / "value.pt" for n in names]
    if not args.value and len(names) == 1 and own.exists():
        files = [own]
    if len(files) != len(names):
        fail(f"--value names {len(files)} files for the {len(names)} rewards of {args.reward}")
    for name, file in zip(names, files, strict=True):
        reward_folder(name, args.preset)  # a misspelt reward is no missing value
        if not Path(file).exists():
            make = f"make it with 01, 02 and 03_finetune.py --reward {name}, or pass --value FILE"
            fail(f"there is no value model of {name}: {file} does not exist; {make}")
    return files


def load_value(path, backbone, reward, **expect):
    """The StitchedValue of a value.pt, and its artefact; see load_values."""
    values, artifacts = load_values([path], backbone, [reward], **expect)
    return values[0], artifacts[0]


def load_values(files, backbone, rewards, resolution=None):
    """The StitchedValue of each value.pt for its reward on this backbone's latents; the artefacts.

    A front may be another backbone with the same VAE, of which no more is loaded than its blocks.
    Values on one backbone get one transformer.
    """
    expect = dict(latent_space=backbone.latent_space())
    expect |= dict(resolution=resolution) if resolution else {}
    pairs = zip(files, rewards, strict=True)
    artifacts = [load_value_file(file, expect | dict(reward=r.name)) for file, r in pairs]
    cut = {}
    for artifact in sorted(artifacts, key=lambda a: -a["spec"]["i"]):  # the deepest cut first
        name = artifact["spec"]["backbone"]
        if artifact["spec"]["front"] == "vae" or name in cut:
            continue
        if name == backbone.name:
            cut[name] = backbone.transformer
        else:
            which = artifact["config"]["preset"], backbone.device, backbone.dtype
            other = Backbone(name, *which, offloads=backbone.offloads)
            cut[name] = other.prefix(artifact["spec"]["i"])
    values = []
    for file, reward, artifact in zip(files, rewards, artifacts, strict=True):
        spec = artifact["spec"]
        transformer = cut.get(spec["backbone"])
        read = transformer if spec["front"] == "dit" else None
        known = fingerprints(read, [reward], spec["i"]).items()
        check_artifact(file, artifact, {k: v for k, v in known if k in spec}, "03_finetune.py")
        try:
            values.append(build_value(artifact, transformer, reward))
        except RuntimeError as e:
            fail(f"{file} does not fit {reward.name}, remake it with 03: {str(e).splitlines()[-1]}")
    return values, artifacts


def load_value_file(file, expect):
    """The artefact of a value.pt."""
    artifact = load_artifact(file, expect, "03_finetune.py")
    if "front" not in artifact["spec"]:
        fail(f"{file} is of {artifact.get('stage')}, no value model: make one with 03_finetune.py")
    return artifact


def read_value(source):
    """The artefact of a value.pt, or of a folder or hub repository that save() wrote."""
    if Path(source).is_file():
        return load_value_file(source, {})
    with needs(str(source)):
        folder = Path(source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(source)))
        artifact = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "value.safetensors")
    data = dict(null=[state.pop("text"), state.pop("pooled")], norm=artifact["norm"], state=state)
    return artifact | dict(data=data, config=dict(preset=artifact["preset"]))


def build_value(artifact, transformer, reward):
    """The frozen StitchedValue of an artefact of 03 on this transformer, on the reward's device."""
    spec = artifact["spec"]
    data = artifact["data"]
    state = data["state"]
    linear = state["stitch.F.weight"][:, :, 0, 0], state["stitch.F.bias"]
    stitch = Stitch(*linear, spec["reward_grid"], spec["antialias"])
    null = [v.to(reward.device) for v in data["null"]]
    how = {k: spec[k] for k in ("i", "j", "front", "embedding")}
    how |= dict(cls=state.get("cls"), norm=data["norm"])
    value = StitchedValue(transformer, null, reward, stitch, **how)
    value.about = {k: v for k, v in artifact.items() if k != "data"}
    if unknown := value.load_state_dict(state, strict=False).unexpected_keys:
        raise RuntimeError(f"unknown weights {unknown[0]}")
    return value.to(reward.device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- prompts and scores
def load_prompts(path, limit=None):
    """[{prompt, …}] of a file: .txt, a prompt a line; .json, a list or COCO's captions; .jsonl or
    .ndjson, a row a line (GenEval); .csv or .tsv with a header (PartiPrompts).

    A row's key is prompt, text or caption, in any case. UTF-8; blank prompts are left out.
    """
    kind = Path(path or "").suffix.lower()
    if not path or not Path(path).is_file():
        fail(f"there is no file of prompts {path}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]  # trap: splitlines splits more
        if kind == ".txt":
            rows = lines
        elif kind == ".json":
            rows = json.loads(text)
            rows = rows["annotations"] if isinstance(rows, dict) else rows
            if not isinstance(rows, list):
                raise ValueError("no list")
        elif kind in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in lines]
        elif kind in (".csv", ".tsv"):
            file = io.StringIO(text, newline="")
            rows = list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))
        else:
            raise ValueError(f"unknown suffix {kind}")
        rows = [row for row in map(prompt_row, rows) if row["prompt"]]
        if not rows:
            raise ValueError("empty")
        return rows[:limit]
    except Exception as e:  # whatever a file of another kind makes its reader raise
        kinds = "a .txt, .json, .jsonl, .ndjson, .csv or .tsv file in UTF-8"
        fail(f"{path} is no list of prompts ({type(e).__name__}: {e}): pass {kinds}")


def prompt_row(row):
    """A prompt, or a dict of the key prompt, text or caption, as a dict of the key prompt."""
    if isinstance(row, str):
        return dict(prompt=row.strip())
    keys = {key.lower(): key for key in row}
    key = next((keys[k] for k in ("prompt", "text", "caption") if k in keys), "prompt")
    return {**row, "prompt": row[key].strip()}


def normal(prompt):
    """A prompt without what makes no other prompt of it: case, spaces, Unicode's variants."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def score_by(rewards, images, prompts, device, batch):
    """The sum of the rewards (N,) of uint8 images (N, 3, H, W) and N prompts."""
    texts = [reward.text(prompts) for reward in rewards]
    parts = []
    for k in range(0, len(images), batch):
        x = images[k : k + batch].to(device).float() / 255
        part = [t if t is None else t[k : k + batch] for t in texts]
        parts.append(clean_reward(rewards, part, x).cpu())
    return torch.cat(parts)


@torch.no_grad()
def score_images(names, rewards, preset, device, images, prompts, batch=64):
    """{'reward' and each of names: scores (N,)} of uint8 images (N, 3, H, W) and N prompts.

    'reward' is the sum of the rewards. names: of rewards that Reward loads, one in memory at a
    time; one that cannot be had is named in a warning and left out.
    """
    given = (images, prompts, device, batch)
    scores = {"reward": score_by(rewards, *given)}
    loaded = {r.name: r for r in rewards}
    for name in names:
        if len(rewards) == 1 and name in loaded:
            continue  # it is the reward
        try:
            scorer = loaded.get(name) or Reward(name, preset, device, rewards[0].dtype)
        except Unavailable as e:
            print(f"warning: no column {name}: {str(e).removeprefix('error: ')}")
            continue
        scores[name] = score_by([scorer], *given)
        del scorer  # before the next one is loaded
    return scores


def mean_and_error(scores):
    """{name: mean, name_se: its standard error} of {name: (N,)}: the metric keys of a row."""
    row = {}
    for name, x in scores.items():
        row[name] = float(x.mean())
        row[f"{name}_se"] = float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan
    return row


def write_images(folder, rows, images):
    """GenEval's layout: folder/00000/metadata.jsonl and samples/0000.png.

    rows of load_prompts; images: for each of them uint8 (n, 3, H, W).
    """
    from torchvision.io import write_png

    shutil.rmtree(folder, ignore_errors=True)  # another run's would be counted with these
    with writing(folder):
        for k, (row, samples) in enumerate(zip(rows, images, strict=True)):
            place = Path(folder, f"{k:05d}")
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(row))
            for n, x in enumerate(samples):
                write_png(x, str(place / "samples" / f"{n:04d}.png"))


def read_image(path, size=None):
    """A PIL image in RGB, turned as its EXIF says, transparency on white; size: its centre square.

    ValueError for a side over 20 times the other and for pixels whose range is unknown.
    """
    image = Image.open(path)
    if max(image.size) > 20 * min(image.size):
        raise ValueError("{} x {} pixels, a side over 20 times the other".format(*image.size))
    image.load()
    with contextlib.suppress(Exception):  # broken notes of the camera leave the pixels good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # trap: convert("RGB") clips 16-bit grey at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode}, whose range is unknown")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    image = image.convert("RGBA")
    if size:
        image = ImageOps.fit(image, (size, size))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def stamps(files):
    """[(path, size, time)] of files: what changes with their content. One that is gone has none."""
    found = []
    for path in map(Path, files):
        s = path.stat() if path.exists() else None
        found.append((str(path), s and s.st_size, s and s.st_mtime_ns))
    return found


# ---------------------------------------------------------------------------- artefacts
@contextlib.contextmanager
def writing(path):
    """What cannot be written at this path stops the run in a sentence."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as e:
        # torch's writer has words of its own for a full or read-only disk
        known = ("unexpected pos", "strerror", "iostream")
        if not isinstance(e, OSError) and not any(word in str(e) for word in known):
            raise
        fail(f"{path} cannot be written, is the disk full or read-only? ({e})")


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write to, renamed to `path` at the end: no half file is ever left."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def provenance(seed):
    """Command, commit, versions, machine: where a table or an artefact comes from."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+changes"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    libraries = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy")
    return dict(
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        seed=seed,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        commit=commit,
        python=sys.version.split()[0],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in libraries},
    )


def save_artifact(path, stage, args, spec, data, parents=()):
    """Write a plain dict that torch.load(weights_only=True) reads. parents: artefacts."""
    parents = [dict(stage=p["stage"], id=p["id"]) for p in parents]
    about = dict(format=FORMAT, stage=stage, spec=spec, config=vars(args), parents=parents)
    about["provenance"] = provenance(args.seed)
    about["id"] = digest(json.dumps(about, sort_keys=True, default=str))
    with replacing(path) as temporary:
        torch.save({**about, "data": data}, temporary)
    print(f"wrote {path} ({about['id']})")


def save_training(path, stage, spec, data):
    """The state of a run, for load_artifact and --resume; spec: the flags that must agree."""
    about = dict(format=FORMAT, spec=spec, provenance=dict(command=f"{stage}.py"))
    with replacing(path) as temporary:
        torch.save(dict(about, data=data), temporary)


def once(path, stage, spec, resume, work):
    """What work() returns, plain data, kept at path; with resume an earlier run's, if it is there.

    spec: the flags that must agree. Tensors are the file's, read as they are used.
    """
    if not (resume and Path(path).exists()):
        save_training(path, stage, spec, work())
    return load_artifact(path, spec, f"{stage}.py")["data"]


def keep_or_drop(path, args, finished=None):
    """Stop at what an unfinished run left, a file or a folder, unless a flag says what to do; and
    at what a finished one made, which is kept until it is replaced."""
    path = Path(path)
    if finished and finished.exists() and not (args.resume or args.restart):
        fail(f"{finished} is trained already: make it anew with --restart, or pass another --value")
    if args.resume and args.restart:
        fail("--resume goes on and --restart drops: pass one of them")
    if not path.exists() or args.resume:
        return
    if not args.restart:
        fail(f"{path} is of an earlier run: go on with --resume, or drop it with --restart")
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_artifact(path, expect, maker):
    """Read an artefact; one whose spec is not as expected stops the run with a table of both."""
    remake = maker_command(path, expect, maker)
    if not Path(path).exists():
        fail(f"{path} does not exist; make it with: {remake}")
    try:
        artifact = torch.load(path, weights_only=True, mmap=True)
        known = artifact["format"], artifact["spec"], artifact["provenance"]["command"]
    except Exception as e:
        fail(f"{path} cannot be read ({type(e).__name__}); remake it with: {remake}")
    if known[0] != FORMAT:
        fail(f"{path} has format {known[0]}, not {FORMAT}; remake it with: {remake}")
    check_artifact(path, artifact, expect, maker)
    return artifact


def check_artifact(path, artifact, expect, maker):
    """Stop with a table where an artefact that was read from path is not as expected."""
    spec = artifact["spec"]
    wrong = [k for k, v in expect.items() if spec.get(k) != v]
    if wrong:
        table = [f"  {'':14} {'in the file':52} asked for"]
        table += [f"  {k:14} {str(spec.get(k)):52} {expect[k]}" for k in wrong]
        table += [f"  made by: {artifact['provenance']['command']}"]
        table += [f"  remake it with: {maker_command(path, expect, maker)} and this run's flags"]
        fail(f"{path} does not fit this run\n" + "\n".join(table))


def maker_command(path, expect, maker):
    """The command that makes an artefact anew."""
    out = Path(path).parent
    flags = [f"--{k} {shlex.quote(str(expect[k]))}" for k in ("backbone", "reward") if k in expect]
    if out.suffix == ".parts" or maker[:2] in ("07", "08"):
        out = out.parent  # what a run keeps lies one folder deeper
    if out != Path(path).parent or Path(path).suffix == ".train":
        flags.append("--restart")  # without it the run stops at what is there
    return " ".join(["python", maker, "--out", shlex.quote(str(out)), *flags])


def save_table(args, stage, rows, **top):
    """<out>/<stage>.json with the rows, the flags and where they come from."""
    table = dict(stage=stage, rows=rows, **top, config=vars(args), provenance=provenance(args.seed))
    path = Path(args.out, f"{stage}.json")
    write_json(path, table)
    print(f"wrote {path}")


def write_json(path, data):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(strict(data), indent=1, allow_nan=False))


def strict(x):
    """Plain data in which what is not finite is None, for JSON knows no NaN."""
    if isinstance(x, dict):
        return {k: strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [strict(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def digest(*what):
    """Twelve hexadecimal digits that change with anything of `what`, plain data."""
    return hashlib.sha1(repr(what).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------- the shell
def fail(message):
    """Stop with one clear sentence and exit code 1."""
    raise SystemExit(f"error: {message}")


def generator(*seed):
    """A CPU generator seeded by any numbers and strings, the same on every machine."""
    digest = hashlib.sha1(repr(seed).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


def within(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind from low to high, both included."""

    def parse(text):
        x = kind(text)
        if not low <= x <= high or math.isinf(x):
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:,} and {high:,}")
        return x

    parse.__name__ = kind.__name__  # argparse's word for what is no number at all
    return parse


COUNT = within(int, 1, 2**31)
WHOLE = within(int, 0, 2**63 - 1)
POSITIVE = within(float, 1e-30)
SHARE = within(float, 0, 1)
FINITE = within(float, -1e30, 1e30)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default; the text above and below them as it stands."""


class Parser(argparse.ArgumentParser):
    """One that answers a wrong flag as all else is answered: a sentence, exit code 1."""

    def error(self, message):
        fail(f"{message} (see python {self.prog} --help)")


def stage_parser(file, doc, presets):
    """The parser of a stage (its __file__ and __doc__) with the flags that all begin with.

    --help begins with the title and the commands; the rest of the docstring follows the flags.
    """
    title, *parts = re.split(r"\n+(?=\w)", doc)
    run = next((part for part in parts if part.startswith("Run")), "")
    rest = "\n".join(part for part in parts if part != run)
    name = Path(file).name
    texts = dict(usage=f"{name} [FLAGS]", description=f"{title}\n\n{run}", epilog=rest)
    p = Parser(name, formatter_class=Help, allow_abbrev=False, **texts)
    add = p.add_argument
    add("--preset", choices=presets, default="mini", help="the miniature, 24 GB, or appendix D")
    add("--backbone", default="sd3.5-medium", help="or sd3.5-large, flux, qwen-image, FOLDER, ID")
    add("--reward", default="clip", help="clip, dfn-clip, hpsv2, aesthetic, or an open_clip folder")
    add("--out", help="run folder; None: runs/<preset>/<backbone>_<reward>")
    add("--seed", type=WHOLE, default=0, help="of all that is random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on CUDA, else float32")
    add("--dry-run", action="store_true", help="price the published models; nothing is loaded")
    add("--resolution", type=COUNT, help="side of the square images, pixels, a multiple of 16")
    return p


def parse_stage(p, presets, argv=None, writes="out"):
    """Parse: a preset gives the defaults, flags win. Fills in --out, --device and --dtype.

    writes: the flag that names what no second run may write at the same time.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--dry-run" in argv:
        price = [sys.executable, ROOT / "tests/published/price.py", p.prog, *argv]
        raise SystemExit(subprocess.run(price).returncode)
    asks_for_help = {"-h", "--help"} & set(argv)
    preset = "mini" if asks_for_help else p.parse_known_args(argv)[0].preset
    p.set_defaults(**presets[preset])
    args = p.parse_args(argv)
    if getattr(args, "track", None) and not find_spec("tensorboard"):
        fail(f"--track {args.track} needs a package more: pip install tensorboard")
    args.out = args.out or str(run_folder(args.preset, args.backbone, args.reward))
    has_cuda = torch.cuda.is_available()
    if args.device == "auto":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_cuda else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as e:  # each device has its own
        fail(f"--device {args.device} cannot be used here: {str(e).splitlines()[0]}")
    if args.resolution and args.resolution % 16:
        fail(f"--resolution {args.resolution}: latents are cut into patches of 16 pixels")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    world = WORLDS.get(preset)
    if world and not (ROOT / world["data"]).exists():
        print(f"drawing {world['data']} (once)", flush=True)
        subprocess.run([sys.executable, ROOT / world["maker"], ROOT / world["data"]], check=True)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    target = Path(getattr(args, writes) or args.out).absolute()
    there = next(place for place in (target, *target.parents) if place.exists())
    if not os.access(there, os.W_OK) or (there != target and not there.is_dir()):
        fail(f"{target} cannot be written: pass another --{writes}")
    claim(target, p.prog)
    for name in getattr(args, "scorers", None) or ():
        reward_folder(name, preset)
    torch.manual_seed(args.seed)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it already
    sys.excepthook = show_error
    return args


def claim(out, stage):
    """Refuse a second run of a stage in one folder; the lock ends with the process."""
    import fcntl

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    # one file for all runs: a byte of it is locked, whose place says which run it is
    lock = Path(tempfile.gettempdir(), f"stitchvm.{os.getuid()}.lock")
    held = os.open(lock, os.O_CREAT | os.O_RDWR)
    place = int(digest(stage, str(Path(out).resolve())), 16)
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:
        fail(f"{stage} is running in {out} already: wait for it, or pass another --out")


def show_error(kind, error, trace):
    """The hook of uncaught errors: one sentence where memory ran out, else the traceback."""
    if out_of_memory(error):
        print(f"error: out of memory, try a smaller --batch ({error})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run_folder(preset, backbone, reward):
    return Path("runs", preset, f"{Path(backbone).name}_{Path(reward).name}")


def model_folder(name, preset):
    """The folder of a model: the world's of that name, or a path; None if it is neither.

    A folder here that is called as a published model is passed as ./name.
    """
    found = []
    if preset in WORLDS:
        models = ROOT / WORLDS[preset]["models"]
        found = [*models.glob("*/model_index.json"), *models.glob("*/open_clip_config.json")]
    known = {file.parent.name: file.parent for file in found}
    if name in known:
        return known[name]
    if Path(name).is_dir() and name not in HUB | REWARDS:
        return Path(name)
    if known:
        names = ", ".join(sorted(known))
        fail(f"there is no {name}: --preset {preset} knows {names}; all else must be a folder")
    return None


def reward_folder(name, preset):
    """model_folder of a reward, which is named here unless it is a folder."""
    folder = model_folder(name, preset)
    if folder is None and name not in REWARDS:
        fail(f"there is no reward {name}: pass {', '.join(REWARDS)} or an open_clip folder")
    return folder


def now(device):
    """Seconds, once the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def timing(seconds):
    """Median of the seconds of interleaved batches, and their spread as a share of it.

    A spread above .5 says that the machine was busy with something else.
    """
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9))
    return float(median), float((high - low) / median)


def gflop(call):
    """GFLOP of one call: 2 x multiply-adds of matrix products, convolutions and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # trap: not counted, nor is the CPU's fused one
    counted = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the first is CUDA's
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(counted):
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


@cache
def summary_writer(folder):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def track(folder, name, step, row, images=None):
    """Add a row's numbers, and images uint8 (n, 3, H, W), to TensorBoard files; folder None: no."""
    if folder is None:
        return
    with writing(Path(folder, name)):
        writer = summary_writer(Path(folder, name))
        for key, number in row.items():
            if isinstance(number, float):
                writer.add_scalar(key, number, step)
        if images is not None:
            writer.add_images("samples", images, step)
    writer.flush()


def print_table(rows, keys):
    """Rows of dicts as an aligned table on standard output."""

    def show(v):
        return f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v)

    cells = [list(keys)] + [[show(r.get(k)) for k in keys] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))


def only_warns(draw):
    """A figure that cannot be drawn is a warning: it comes last, after tables and images."""

    @wraps(draw)
    def tried(*args):
        try:
            draw(*args)
        except Exception as e:
            print(f"warning: no figure {args[-1]}: {type(e).__name__}: {e}")

    return tried


def save_figure(figure, path):
    """A matplotlib Figure as a PNG. It is made without pyplot, so no display or backend matters."""
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    print(f"wrote {path}")


@only_warns
def draw_lines(rows, x, ys, by, path):
    """A panel for each key of ys against the key x, a curve for each value of the key `by`.

    Rows that lack a key are left out of its panel; <y>_se becomes an error bar.
    """
    from matplotlib.figure import Figure

    figure = Figure((4 * len(ys), 3.4))
    axes = figure.subplots(1, len(ys), squeeze=False)
    for axis, y in zip(axes[0], ys, strict=True):
        for k, name in enumerate(dict.fromkeys(r.get(by) for r in rows)):  # a colour a name
            own = [r for r in rows if r.get(by) == name and r.get(y) is not None]
            points = [r[x] for r in own], [r[y] for r in own], [r.get(f"{y}_se") or 0 for r in own]
            axis.errorbar(*points, marker="o", ms=3, capsize=2, color=f"C{k % 10}", label=name)
        axis.set(xlabel=x, title=y)
        axis.grid(alpha=0.3)
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)


@only_warns
def image_grid(rows, labels, titles, path):
    """Rows of uint8 images (n, 3, H, W) with a label each, and a title above each column."""
    from matplotlib.figure import Figure

    figure = Figure((1.5 * len(titles) + 1, 1.6 * len(rows) + 0.6))
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, images, label in zip(axes, rows, labels, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(textwrap.fill(label, 22), fontsize=8, parse_math=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(textwrap.fill(title, 22), fontsize=6, parse_math=False)
    save_figure(figure, path)
