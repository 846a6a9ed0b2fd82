"""What the eight stages share: loading and cutting models, noise, the stitched value model, images, artefacts.

Convention everywhere: t = sigma runs from 0 (clean) to 1 (noise), z_t = (1-t) z_0 + t eps, velocity u = eps - z_0,
one-step estimate (Tweedie) zhat_0 = z_t - t u. Latents are (B, C, h, w), sigma is (B,), images are (B, 3, H, W).
i counts the diffusion blocks already applied (1..L); j is the 1-based index of the first reward block that is kept.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent
FORMAT = 1
# A world is a place where names are looked up: folders of models and data, and the script that makes the data when it is missing.
WORLDS = {"mini": dict(models="tests/mini", data="tests/mini/data", maker="tests/mini/draw.py")}
HUB = {"sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium", "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
       "flux": "black-forest-labs/FLUX.1-dev"}
OPEN_CLIP = {"clip": ("ViT-L-14-336-quickgelu", "openai"), "dfn-clip": ("ViT-H-14-378-quickgelu", "dfn5b")}


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
    return p


def parse_stage(p, presets, argv=None):
    """Parse: the preset's values are the defaults, flags given explicitly win. Fills in --out, the device and the dtype."""
    preset = p.parse_known_args(argv)[0].preset if not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv) else p.get_default("preset")
    p.set_defaults(**presets[preset])
    args = p.parse_args(argv)
    if args.out is None:
        args.out = f"runs/{args.preset}/{Path(args.backbone).name}_{Path(args.reward).name}"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    world = WORLDS.get(args.preset)
    if world and not (ROOT / world["data"]).exists():
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
        scales.append(torch.full_like(scales[0], guidance * 1000))
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


def velocity(transformer, z, sigma, condition, null=None, cfg=1.0):
    """u(z_t, t): (B, C, h, w). condition and null are (text, pooled), of batch B or 1; with cfg != 1 the guided velocity."""
    spread = lambda pair: [v.expand(len(z), *v.shape[1:]) for v in pair]
    if cfg == 1 or null is None:
        return end(transformer, run_blocks(transformer, begin(transformer, z, sigma, *spread(condition))))
    both = [torch.cat(pair) for pair in zip(spread(null), spread(condition))]
    un, uc = end(transformer, run_blocks(transformer, begin(transformer, torch.cat([z, z]), torch.cat([sigma, sigma]), *both))).chunk(2)
    return un + cfg * (uc - un)


class Backbone:
    """A diffusion transformer, its VAE (always float32) and its scheduler, frozen."""

    def __init__(self, name, preset="mini", device="cpu", dtype=torch.float32, vae=True, transformer=True):
        import diffusers
        diffusers.utils.logging.disable_progress_bar()
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.source = str(model_folder(name, preset) or HUB.get(name, name))
        try:
            index = diffusers.DiffusionPipeline.load_config(self.source)
            cls = getattr(diffusers, index["transformer"][1])
            load = lambda cls, part, dtype: cls.from_pretrained(self.source, subfolder=part, dtype=dtype).to(device).eval().requires_grad_(False)
            self.transformer = load(cls, "transformer", dtype) if transformer else None
            self.vae = load(diffusers.AutoencoderKL, "vae", torch.float32) if vae else None
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(self.source, subfolder="scheduler")
        except (OSError, KeyError) as e:
            fail(f"{self.source} is not a diffusers pipeline that can be read: {str(e).splitlines()[0]}")

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

    def velocity(self, z, sigma, condition, null=None, cfg=1.0):
        """The transformer's velocity in its own dtype, returned in z's."""
        return velocity(self.transformer, z.to(self.dtype), sigma, condition, null, cfg).to(z.dtype)

    def grid(self, steps, z):
        return sigma_grid(self.scheduler, steps, z.shape[-1] * z.shape[-2] // 4)


@torch.no_grad()
def encode_prompts(backbone, prompts, batch=32):
    """(text (N, T, D), pooled (N, P)) of the prompts by the pipeline's own text encoders, which are loaded for it and freed."""
    import diffusers
    import transformers
    transformers.utils.logging.disable_progress_bar()
    index = diffusers.DiffusionPipeline.load_config(backbone.source)
    absent = {k: None for k, v in index.items() if isinstance(v, (list, tuple)) and v[0] is None}  # trap: these must be passed again
    pipe = diffusers.DiffusionPipeline.from_pretrained(backbone.source, transformer=backbone.transformer, vae=None, dtype=backbone.dtype, **absent).to(backbone.device)
    t5 = getattr(pipe, "tokenizer_3", None) or pipe.tokenizer_2
    flux = "Flux" in type(pipe).__name__
    length = min(512 if flux else 256, t5.model_max_length)
    rows = []
    for k in range(0, len(prompts), batch):
        part = list(prompts[k:k + batch])
        if flux:
            rows.append(pipe.encode_prompt(part, None, max_sequence_length=length)[:2])
        else:
            rows.append([pipe.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=length)[n] for n in (0, 2)])
    del pipe
    return tuple(torch.cat(v) for v in zip(*rows))


# ---------------------------------------------------------------------------- the reward model
class Reward:
    """A frozen CLIP-like reward: score = <e, text> for unit e and text; with an aesthetic head, score = head(e), text unused."""

    def __init__(self, name, preset="mini", device="cpu"):
        import open_clip
        from open_clip.transform import PreprocessCfg
        folder = model_folder(name, preset)
        if folder is None and name not in OPEN_CLIP:
            fail(f"the published weights of {name} are not loaded by name; pass a folder with open_clip_config.json and open_clip_model.safetensors")
        if folder is not None and not (folder / "open_clip_config.json").exists():
            fail(f"{folder} has no open_clip_config.json: --reward takes an open_clip folder")
        source, pretrained = (f"local-dir:{folder}", None) if folder else OPEN_CLIP[name]
        self.name, self.device = name, torch.device(device)
        self.model = open_clip.create_model(source, pretrained=pretrained).to(device).float().eval().requires_grad_(False)  # trap: comes in train mode
        self.tokenizer = open_clip.get_tokenizer(source)
        self.visual = self.model.visual
        self.preprocess_cfg = PreprocessCfg(**{k: v for k, v in self.visual.preprocess_cfg.items() if k in PreprocessCfg.__annotations__})
        head = folder / "aesthetic_head.safetensors" if folder else None
        self.head = load_aesthetic_head(head).to(device) if head and head.exists() else None

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
        else:
            ratio = max(H, W) / s
            h, w = round(H / ratio), round(W / ratio)
        if (h, w) != (H, W):  # PIL antialiases; the clamp stands for its uint8 range, which bicubic overshoots
            kind = "bilinear" if self.preprocess_cfg.interpolation == "bilinear" else "bicubic"
            x = F.interpolate(x, (h, w), mode=kind, antialias=True, align_corners=False).clamp(0, 1)
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


def load_aesthetic_head(path):
    """The published MLP (d-1024-128-64-16-1): keys layers.{0,2,4,6,7}; dropout between, no non-linearity, so affine in evaluation."""
    from safetensors.torch import load_file
    weights = {k.removeprefix("layers."): v.float() for k, v in load_file(str(path)).items()}
    layers = [nn.Dropout(0.0) for _ in range(8)]
    for k in {int(name.split(".")[0]) for name in weights}:
        layers[k] = nn.Linear(*weights[f"{k}.weight"].shape[::-1])
    head = nn.Sequential(*layers)
    head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


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
    front = backbone if spec["backbone"] == backbone.name or spec["front"] == "vae" else Backbone(spec["backbone"], value["config"]["preset"], backbone.device, backbone.dtype, vae=False)
    W = data["state"]["stitch.F.weight"][:, :, 0, 0]
    stitch = Stitch(W, data["state"]["stitch.F.bias"], spec["reward_grid"], spec["antialias"])
    null = [v.to(backbone.device) for v in data["null"]]
    model = StitchedValue(front.transformer, null, reward, stitch, spec["i"], spec["j"], data["state"].get("cls"), spec["front"], spec["embedding"], data["norm"])
    missing, unexpected = model.load_state_dict(data["state"], strict=False)
    if unexpected:
        fail(f"{path} has weights that this reward model does not: {', '.join(unexpected[:3])}; remake it with 03_finetune.py")
    return model.to(backbone.device).eval().requires_grad_(False), value


# ---------------------------------------------------------------------------- images
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def list_images(folder):
    """Image files below a folder, sorted by their path in it."""
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder of images; pass one with --images")
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


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
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True).stdout.strip()
    return dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), seed=seed, time=time.strftime("%Y-%m-%d %H:%M:%S"),
                commit=git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""), python=sys.version.split()[0],
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                **{k: of(k) for k in ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")})


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
    """A matplotlib figure as a PNG. """
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    print(f"wrote {path}")
