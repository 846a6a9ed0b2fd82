"""Train every model of the miniature from nothing.

    python tests/mini/train.py --again [--only NAME …] [--work DIR]

The models, in the order in which they need each other:

    vae            AutoencoderKL of SD 3's geometry (factor 8, 16 channels), L1 + L2 + 5e-4 KL
    clip           CLIP, patch 16, QuickGELU; one caption in eight is wrong, as web captions are
    judge          CLIP, 6 blocks, own seed and drawings, then preferences; nothing is trained by it
    dfn-clip       CLIP, patch 8, on the captions that `clip` finds plausible, as DFN filters
    sd3.5-medium   SD3Transformer2DModel on the VAE's latents, with two CLIP text encoders
    sd3.5-large    deeper and wider, on the same VAE, grown from sd3.5-medium and trained on
    flux-vae       an autoencoder of its own for flux, from another seed
    flux           FluxTransformer2DModel with CLIP and T5, then CFG distilled into its guidance
    hpsv2          CLIP, patch 16, GELU, then on ranked images, drawn, damaged and generated
    aesthetic      the published MLP on clip's embedding, regressed on votes

Each is trained in one thread, resumes from its checkpoint in --work, is exported in half precision,
and is left alone if its folder is complete. Two may be trained at once by two commands with --only.
Their rows of the quality table are printed and written to quality.json.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
import draw  # noqa: E402

import common  # noqa: E402

HERE = Path(__file__).parent
TEXT_LENGTH = 16
DATA = HERE / "data"
# trap: a CPU that emulates it takes three times as long
BF16 = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


# ---------------------------------------------------------------------------- data
def scenes(n, seed):
    """n training scenes: uint8 (n, 3, 64, 64), captions, an order that puts alike ones together.

    Neighbours in it differ in shapes and places only.
    """
    rng = np.random.default_rng([seed, 7])
    images, captions, alike = np.empty((n, 3, draw.SIZE, draw.SIZE), np.uint8), [], []
    for k in range(n):
        scene = draw.sample_split(rng, "train")
        images[k] = draw.draw(rng, scene).transpose(2, 0, 1)
        captions.append(draw.random_caption(rng, scene))
        looks = sorted(f"{o['color']} {o['size']}" for o in scene["objects"])
        alike.append((scene["background"], scene["family"], len(scene["objects"]), looks))
    order = torch.tensor(sorted(range(n), key=lambda k: alike[k]))
    return torch.from_numpy(images), captions, order


def signed(images):
    """uint8 (B, 3, H, W) to float in [-1, 1]."""
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------------- one training loop
def optimizers(models, lr, weight_decay, muon):
    """AdamW; with muon, Muon (torch.optim) for the matrices of a transformer's blocks."""
    named = dict(models.named_parameters())
    hidden = {k: p for k, p in named.items() if muon and "blocks." in k and p.ndim == 2}
    rest = [p for k, p in named.items() if k not in hidden]
    fixed = dict(lr=lr, weight_decay=weight_decay)
    found = [torch.optim.AdamW(rest, betas=(0.9, 0.98), fused=True, **fixed)]
    if muon:  # its updates are scaled to AdamW's, so that one rate serves both
        found.append(torch.optim.Muon(hidden.values(), adjust_lr_fn="match_rms_adamw", **fixed))
    return found


def fit(
    name, work, models, loss_fn, steps, lr, warmup=0.03, ema=None, weight_decay=0.0, muon=False
):
    """Train `models` (one nn.Module) with a one-cycle cosine: (models, minutes).

    loss_fn(step, generator) -> loss; all that is random is drawn from the generator, whose state is
    in the checkpoint of every minute, so that a resumed run continues the same stream.
    """
    path = work / f"{name}.pt"
    both = optimizers(models, lr, weight_decay, muon)
    generator, start, seconds = torch.Generator().manual_seed(name_seed(name)), 0, 0.0
    average = {k: v.detach().clone() for k, v in models.state_dict().items()} if ema else None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        models.load_state_dict(saved["models"])
        for optimizer, state in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        start, seconds, average = saved["step"], saved["seconds"], saved["average"]

    def save(step):
        states = [optimizer.state_dict() for optimizer in both]
        state = dict(models=models.state_dict(), optimizers=states)
        state |= dict(generator=generator.get_state(), step=step, seconds=seconds, average=average)
        torch.save(state, str(path) + ".tmp")
        os.replace(str(path) + ".tmp", path)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    last, mean = time.time(), None
    models.train()
    for step in bar:
        began = time.time()
        cosine = 0.5 * (1 + math.cos(math.pi * (step / steps)))
        rate = lr * min(1, (step + 1) / (warmup * steps)) * (0.02 + 0.98 * cosine)
        loss = loss_fn(step, generator)
        models.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            move_average(average, models.state_dict(), decay)
        seconds += time.time() - began
        if step % 50 == 0:
            value = float(loss.detach())
            if not np.isfinite(value):
                bad = f"the loss of {name} became {value} at step {step}"
                common.fail(f"{bad}; the last good state is {path}")
            mean = value if mean is None else 0.8 * mean + 0.2 * value
            bar.set_postfix(loss=f"{mean:.4f}")
        if time.time() - last > 60:
            save(step + 1)
            last = time.time()
    save(steps)
    if ema:
        models.load_state_dict(average)
    return models.eval().requires_grad_(False), seconds / 60


def move_average(average, current, decay):
    """average <- decay average + (1 - decay) current, in place; state dicts."""
    moving = [k for k in current if current[k].is_floating_point()]
    lists = [average[k] for k in moving], [current[k] for k in moving]
    torch._foreach_lerp_(*lists, 1 - decay)


def name_seed(name):
    return zlib.crc32(name.encode())


def pick(generator, n, batch):
    return torch.randint(n, (batch,), generator=generator)


def pick_alike(generator, order, batch, run=24):
    """A batch for contrastive learning: half of it random, half in runs of scenes that look alike.

    Random negatives hardly ever differ in shape alone.
    """
    start = torch.randint(len(order) - run, (batch // 2 // run,), generator=generator)
    runs = order[start[:, None] + torch.arange(run)].flatten()
    return torch.cat([runs, order[pick(generator, len(order), batch - len(runs))]])


def half(module):
    """A state dict in half precision, as it is committed."""
    state = module.state_dict().items()
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state}


# ---------------------------------------------------------------------------- autoencoder
def train_vae(work, name="vae", seed=1, steps=(2000, 2600)):
    """Two cycles: the second, with less weight on the KL, smaller batches, gets colours right."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    images = scenes(12000, seed)[0]

    def reconstruction(batch, kl):
        def loss_fn(step, generator):
            x = signed(images[pick(generator, len(images), batch)])
            # the convolutions are twice as fast
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                posterior = vae.encode(x).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator)
                z = posterior.mean + posterior.std * noise
                error = vae.decode(z).sample.float() - x
            return error.abs().mean() + error.square().mean() + kl * posterior.kl().mean() / 1024

        return loss_fn

    minutes = fit(name, work, vae, reconstruction(24, 5e-4), steps[0], 2e-3)[1]
    vae.requires_grad_(True)
    minutes += fit(f"{name}-second", work, vae, reconstruction(16, 5e-5), steps[1], 2e-3)[1]
    with torch.no_grad():
        z = torch.cat([vae.encode(signed(b)).latent_dist.mean for b in images[:2000].split(100)])
    scale, shift = round(float(1 / z.std()), 4), round(float(z.mean()), 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.half().save_pretrained(work / name)
    return minutes


# ---------------------------------------------------------------------------- text
def tokenizer():
    """CLIP's own tokenizer class: each of this world's words is a token, the rest is spelt out."""
    from collections import Counter

    from transformers import CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.")
    # trap: the tokenizers library's trainer breaks ties by hash order, so its ids would differ from
    # call to call; the merges are learnt here
    words, merges = [[*w[:-1], w[-1] + "</w>"] for w in draw.WORDS], []
    while any(len(w) > 1 for w in words):
        counts = Counter(pair for w in words for pair in zip(w, w[1:], strict=False))
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        for w in words:
            for k in range(len(w) - 2, -1, -1):
                if tuple(w[k : k + 2]) == merges[-1]:
                    w[k : k + 2] = ["".join(merges[-1])]
    # open_clip pools at the highest id, so the end token comes last, and pads with id 0
    names = ["!", *letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {n: k for k, n in enumerate(names)}
    padding = dict(model_max_length=TEXT_LENGTH, pad_token="!")
    return CLIPTokenizer(vocab=vocab, merges=merges, **padding)


# ---------------------------------------------------------------------------- CLIP models
def clip_config(patch, layers, width, quick_gelu, text_layers=3):
    return dict(
        embed_dim=64,
        quick_gelu=quick_gelu,
        vision_cfg=dict(image_size=64, layers=layers, width=width, patch_size=patch, head_width=32),
        text_cfg=dict(
            context_length=TEXT_LENGTH,
            vocab_size=len(tokenizer()),
            width=96,
            heads=3,
            layers=text_layers,
            hf_tokenizer_name="tokenizer files beside this one",
        ),
    )


def build_clip(config):
    import open_clip

    return open_clip.CLIP(**config)


LOOKS = dict(
    mean=[0.48145466, 0.4578275, 0.40821073],
    std=[0.26862954, 0.26130258, 0.27577711],
    interpolation="bicubic",
    resize_mode="shortest",
)
MEAN, STD = (torch.tensor(LOOKS[k]).view(3, 1, 1) for k in ("mean", "std"))


def pixels(images):
    return (images.float() / 255 - MEAN) / STD


def contrastive(a, b, tokens, logit_scale):
    """Symmetric cross-entropy of unit embeddings (B, d) of images and texts.

    Equal captions count as matches.
    """
    logits = logit_scale.exp().clamp(max=100) * a @ b.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return -0.5 * sum((target * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T))


def web_pool(seed, n=24000, wrong=1 / 8):
    """Images, tokens of captions, some of another image as on the web, and the order of scenes."""
    images, captions, order = scenes(n, seed)
    rng = np.random.default_rng(seed)
    swapped = rng.permutation(n)[: int(wrong * n)]
    shuffled = [captions[k] for k in rng.permutation(swapped)]
    for k, text in zip(swapped, shuffled, strict=True):
        captions[k] = text
    return images, tokenise(captions), order


def save_clip(clip, config, folder, extra=None):
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps(dict(model_cfg=config, preprocess_cfg=LOOKS), indent=1)
    (folder / "open_clip_config.json").write_text(about)
    tokenizer().save_pretrained(folder)
    for name, weights in (extra or {}).items():
        save_file(weights, folder / name)
    save_file(half(clip), folder / "open_clip_model.safetensors")


def embed_both(clip, images, tokens):
    """Unit embeddings (B, d) of images and of texts."""
    e = clip.encode_image(pixels(images), normalize=True)
    return e, clip.encode_text(tokens, normalize=True)


@torch.no_grad()
def embed_images(clip, images, batch=500):
    return torch.cat([clip.encode_image(pixels(i), normalize=True) for i in images.split(batch)])


def train_clip(work, steps=3000):
    torch.manual_seed(2)
    config = clip_config(patch=16, layers=8, width=128, quick_gelu=True)
    images, tokens, order = web_pool(2)

    def loss_fn(step, generator):
        k = pick_alike(generator, order, 192)
        both = embed_both(clip, images[k], tokens[k])
        return contrastive(*both, tokens[k], clip.logit_scale)

    clip = build_clip(config)
    clip, minutes = fit("clip", work, clip, loss_fn, steps, 1e-3, weight_decay=0.05)
    # then the text tower alone, against the image tower's embeddings, which are made once
    e, tower = embed_images(clip, images), [clip.token_embedding, clip.transformer, clip.ln_final]
    text = torch.nn.ModuleList(tower).requires_grad_(True)

    def text_loss(step, generator):
        k, pairs = pick(generator, len(images), 256), torch.arange(256)
        logits = clip.logit_scale.exp() * e[k] @ clip.encode_text(tokens[k], normalize=True).T
        return 0.5 * (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs))

    minutes += fit("clip-text", work, text, text_loss, 1000, 1e-3)[1]
    save_clip(clip, config, HERE / "clip")
    return minutes


def train_dfn(work, steps=1500):
    """DFN: `clip` keeps the pairs that it finds plausible; a larger tower is trained on them."""
    torch.manual_seed(3)
    config = clip_config(patch=8, layers=8, width=128, quick_gelu=True)
    images, tokens, order = web_pool(3, n=30000)
    filtering = load_clip(HERE / "clip")
    with torch.no_grad():
        parts = zip(images.split(500), tokens.split(500), strict=True)
        both = [embed_both(filtering, *part) for part in parts]
    score = torch.cat([(a * b).sum(-1) for a, b in both])
    order = order[score[order] >= score.quantile(0.2)]  # the pairs that stay

    def loss_fn(step, generator):
        k = pick_alike(generator, order, 96)
        # four times clip's tokens: here half precision pays
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            both = embed_both(clip, images[k], tokens[k])
            return contrastive(*both, tokens[k], clip.logit_scale)

    clip = build_clip(config)  # all but the patch embedding and its positions starts from clip
    shape, start = {k: v.shape for k, v in clip.state_dict().items()}, filtering.state_dict()
    clip.load_state_dict({k: v for k, v in start.items() if v.shape == shape[k]}, strict=False)
    clip, minutes = fit("dfn-clip", work, clip, loss_fn, steps, 1e-3, weight_decay=0.05)
    save_clip(clip, config, HERE / "dfn-clip")
    return minutes


def load_clip(folder):
    from safetensors.torch import load_file

    clip = build_clip(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    weights = load_file(folder / "open_clip_model.safetensors").items()
    clip.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights})
    return clip.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- preferences
def tokenise(prompts):
    return torch.tensor(tokenizer()(list(prompts), padding="max_length", truncation=True).input_ids)


def cached(path, make):
    """The tensors that make() returns, made once and kept at `path`."""
    if not path.exists():
        torch.save(make(), str(path) + ".tmp")
        os.replace(str(path) + ".tmp", path)
    return torch.load(path, weights_only=True)


def reading(image):
    """What an image shows, as numbers: counts by colour and shape, background, size, neatness."""
    seen = draw.look(image)
    count = np.zeros((len(draw.COLOURS), len(draw.SHAPES)))
    for o in seen["objects"]:
        if o["class"] != "blob":
            count[list(draw.COLOURS).index(o["color"]), draw.SHAPES.index(o["class"])] += 1
    background = [seen["background"] == name for name in draw.BACKGROUNDS]
    large = sum(o["size"] == "large" for o in seen["objects"])
    numbers = [*count.ravel(), *background, len(seen["objects"]), large]
    return np.array([*numbers, *draw.neatness(image, seen)], np.float32)


def ranked(work, seed, groups, size=4):
    """Groups: images uint8 (G, size, 3, 64, 64), tokens (G, L), ranks and readings (G, size, …)."""

    def make():
        rng = np.random.default_rng([seed, 11])
        images, prompts, ranks, readings = [], [], [], []
        for _ in tqdm(range(groups), desc="ranked groups", mininterval=10):
            prompt, group, rank = draw.ranked_group(rng, "train", size)
            images.append(np.stack(group).transpose(0, 3, 1, 2))
            prompts.append(prompt)
            ranks.append(rank)
            readings.append(np.stack([reading(i) for i in group]))
        images, readings = (torch.from_numpy(np.stack(v)) for v in (images, readings))
        return images, tokenise(prompts), torch.tensor(ranks), readings

    return cached(work / f"ranked-{seed}.pt", make)


def preference_loss(e, t, ranks, scale=40.0):
    """Bradley-Terry on every pair of a group: images e (G, n, d), texts t (G, d), ranks (G, n)."""
    score = torch.einsum("gne,ge->gn", e, t)
    better = (ranks[:, :, None] < ranks[:, None]).float()
    return (better * F.softplus(-scale * (score[:, :, None] - score[:, None]))).sum() / better.sum()


def train_preference(
    name, work, clip, config, steps, lr, pools, contrastive_pool, groups=20, pairs=96
):
    """A CLIP on pools [(share, ranked groups)], with the contrastive loss beside it.

    A linear head on the embedding, dropped afterwards, has to read off what the image shows: ranks
    alone teach too little of it.
    """
    images, tokens, order = contrastive_pool
    all_readings = torch.cat([readings.flatten(0, 1) for _, (*_, readings) in pools])
    mean, std = all_readings.mean(0), all_readings.std(0)
    models = torch.nn.ModuleDict(
        dict(clip=clip.requires_grad_(True), read=torch.nn.Linear(config["embed_dim"], len(mean)))
    )

    def loss_fn(step, generator):
        picked = []
        for share, pool in pools:
            g = pick(generator, len(pool[0]), round(share * groups))
            picked.append([v[g] for v in pool])
        picked = (torch.cat(v) for v in zip(*picked, strict=True))
        group_images, group_tokens, ranks, readings = picked
        n = ranks.numel()
        k = pick_alike(generator, order, pairs)
        e = clip.encode_image(pixels(torch.cat([group_images.flatten(0, 1), images[k]])))
        t = clip.encode_text(torch.cat([group_tokens, tokens[k]]), normalize=True)
        shown = F.mse_loss(models["read"](e[:n]), (readings.flatten(0, 1) - mean) / std)
        e = F.normalize(e, dim=-1)
        matched = contrastive(e[n:], t[len(ranks) :], tokens[k], clip.logit_scale)
        preferred = preference_loss(e[:n].unflatten(0, ranks.shape), t[: len(ranks)], ranks)
        return preferred + 0.5 * matched + shown

    models, minutes = fit(name, work, models, loss_fn, steps, lr, weight_decay=0.05)
    save_clip(models["clip"], config, HERE / name)
    return minutes


def whiten(clip, images, eps=1e-3):
    """Start the patch convolution as the whitening of the images' patches.

    Edges then weigh as much as flat colour, and shapes are learnt much sooner.
    """
    conv = clip.visual.conv1
    patches = F.unfold(pixels(images), conv.kernel_size, stride=conv.stride)
    variance, axes = torch.linalg.eigh(torch.cov(patches.transpose(1, 2).flatten(0, 1).T))
    filters = (axes / (variance + eps).sqrt()).T.flip(0)[: len(conv.weight)]
    with torch.no_grad():
        conv.weight.copy_(filters.view_as(conv.weight))


def train_judge(work):
    torch.manual_seed(5)
    config = clip_config(patch=16, layers=6, width=128, quick_gelu=True)
    pool, clip = web_pool(5), build_clip(config)
    whiten(clip, pool[0][:4000])
    groups = [(1.0, ranked(work, 5, 8000))]
    return train_preference("judge", work, clip, config, 4500, 1.2e-3, groups, pool)


def train_hpsv2(work):
    """clip with GELU for QuickGELU; a quarter of the groups is by the generator."""
    torch.manual_seed(6)
    config = clip_config(patch=16, layers=8, width=128, quick_gelu=False)
    clip = build_clip(config)
    clip.load_state_dict(load_clip(HERE / "clip").state_dict())
    pools = [(0.75, ranked(work, 6, 8000)), (0.25, generated_groups(work, 6, 800))]
    return train_preference("hpsv2", work, clip, config, 2500, 6e-4, pools, web_pool(6))


def generated_groups(work, seed, groups):
    """As ranked(): the generator makes images of a prompt in few steps, at three strengths."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def make():
        rng, prompts = np.random.default_rng([seed, 12]), []
        for _ in range(groups):
            scene = draw.sample_split(rng, "train")
            prompts.append(draw.caption(scene, int(rng.integers(5))))
        transformer, text = build_generator(MEDIUM)
        load_weights((transformer.eval(), text), HERE / "sd3.5-medium")
        vae, images, ranks, readings = load_vae(work), [], [], []
        grid = common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=1.0), 8, 16)
        for k in tqdm(range(0, groups, 50), desc="generated groups"):
            part, made = prompts[k : k + 50], []
            with torch.no_grad():
                condition, null = (encode_text(text, tokenise(x)) for x in (part, [""]))
            for cfg in (1.0, 1.0, 2.5, 4.5):
                more = dict(condition=condition, null=null, cfg=cfg)
                velocity = partial(common.velocity, transformer, **more)
                made.append(sample(velocity, vae, grid, len(part), int(rng.integers(1 << 30))))
            four = torch.stack(made, 1)
            images.append(four)
            for prompt, group in zip(part, four.permute(0, 1, 3, 4, 2).numpy(), strict=True):
                ranks.append(draw.ranks([draw.preference(i, prompt) for i in group]))
                readings.append(np.stack([reading(i) for i in group]))
        readings = torch.from_numpy(np.stack(readings))
        return torch.cat(images), tokenise(prompts), torch.tensor(ranks), readings

    return cached(work / "generated.pt", make)


# ---------------------------------------------------------------------------- aesthetic
def aesthetic_head(width):
    """The published MLP: five linear layers with dropout between and no non-linearity."""
    from torch import nn

    first = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    last = [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.Sequential(*first, *last)


def train_aesthetic(work, steps=4000):
    torch.manual_seed(7)
    images = scenes(12000, 7)[0]
    rng = np.random.default_rng(7)
    counts = np.array([draw.votes(rng, i) for i in images.permute(0, 2, 3, 1).numpy()])
    mark = torch.tensor(counts @ np.arange(1, 11) / counts.sum(1), dtype=torch.float32)
    clip = load_clip(HERE / "clip")
    e = embed_images(clip, images)
    head = aesthetic_head(e.shape[1])
    with torch.no_grad():
        head[-1].bias.fill_(mark.mean())

    def loss_fn(step, generator):
        k = pick(generator, len(e), 256)
        return F.mse_loss(head(e[k])[:, 0], mark[k])

    head, minutes = fit("aesthetic", work, head, loss_fn, steps, 1e-3)
    config = json.loads((HERE / "clip/open_clip_config.json").read_text())["model_cfg"]
    weights = {f"layers.{k}": v for k, v in half(head).items()}
    extra = {"aesthetic_head.safetensors": weights}
    save_clip(clip, config, HERE / "aesthetic", extra)
    return minutes


# ---------------------------------------------------------------------------- generators
MEDIUM = dict(num_layers=8, width=128, head=32, dual=4)
LARGE = dict(num_layers=10, width=144, head=36, dual=4)


def build_generator(size):
    """The transformer and its two CLIP text encoders, SD 3's way."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = size["width"]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=size["num_layers"],
        attention_head_dim=size["head"],
        num_attention_heads=width // size["head"],
        joint_attention_dim=128,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        dual_attention_layers=tuple(range(size["dual"])),
        qk_norm="rms_norm",
    )
    tok = tokenizer()
    config = CLIPTextConfig(projection_dim=64, **small_clip(tok))
    text = []
    for act in ("quick_gelu", "gelu"):
        config.hidden_act = act
        text.append(CLIPTextModelWithProjection(copy.deepcopy(config)))
    return transformer, text


def small_clip(tok):
    """The configuration of a small CLIP text encoder of this tokenizer."""
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    size |= dict(vocab_size=len(tok), max_position_embeddings=TEXT_LENGTH)
    return size | {k: getattr(tok, k) for k in ids}


def encode_text(text, tokens):
    """(B, L + 1, 128) and (B, 128) as StableDiffusion3Pipeline.encode_prompt makes them.

    Penultimate hidden states side by side, one zero token for the absent T5, projections pooled.
    """
    outs = [m(tokens, output_hidden_states=True) for m in text]
    hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
    t5 = hidden.new_zeros(len(tokens), 1, hidden.shape[-1])
    return torch.cat([hidden, t5], 1), torch.cat([o.text_embeds for o in outs], -1)


def vae_folder(work, name="vae"):
    """Where an autoencoder lies: in `work`, or with the generator that it was exported with."""
    if (work / name).exists():
        return work / name
    return HERE / {"vae": "sd3.5-medium", "flux-vae": "flux"}[name] / "vae"


def load_vae(work, name="vae"):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder(work, name), dtype=torch.float32)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def sample(velocity, vae, grid, n, seed):
    """uint8 (n, 3, 64, 64) by Euler's method; velocity(z, sigma), grid: levels from 1 to 0."""
    z = torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    grid = torch.as_tensor(grid)
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        z = z + (b - a) * velocity(z, a.expand(n))
    x = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def train_flow(work, name, models, world, seed, steps, lr=1e-3, teacher=None):
    """Flow matching with logit-normal times and 12 % null captions; the minutes it took.

    models: (transformer, its text encoders), both trained. world: (vae, tokenise, encode), with
    tokenise(captions) -> ids and encode(text encoders, ids) -> (text, pooled). teacher: a frozen
    copy of models, whose guided velocity at a random strength is the target: distillation.
    """
    transformer, text = models
    vae, tokenise, encode = world
    batch = 128
    images, captions, _ = scenes(100_000, seed)
    ids, null = tokenise(captions), tokenise([""])
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=BF16):
        means = (vae.encode(signed(i)).latent_dist.mean.float() for i in images.split(200))
        z0 = torch.cat([(mean - shift) * scale for mean in means])
    del images
    for block in common.dit_blocks(transformer):
        block.compile()

    def loss_fn(step, generator):
        k = pick(generator, len(z0), batch)
        drop = torch.rand(batch, *[1] * (ids.ndim - 1), generator=generator)
        drop = drop < (0 if teacher else 0.12)
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        eps, guidance = torch.randn(z0[k].shape, generator=generator), 1.0
        z, target = torch.lerp(z0[k], eps, t.view(-1, 1, 1, 1)), eps - z0[k]
        # trap: the fused attention's backward takes half the step in bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16), sdpa_kernel(SDPBackend.MATH):
            if teacher:
                guidance = 1 + 4 * torch.rand(batch, generator=generator)
                with torch.no_grad():
                    both = [encode(teacher[1], v) for v in (null.expand_as(ids[k]), ids[k])]
                    un, uc = (common.velocity(teacher[0], z, t, c, guidance=1.0) for c in both)
                    target = un + guidance.view(-1, 1, 1, 1) * (uc - un)
            condition = encode(text, torch.where(drop, null, ids[k]))
            u = common.velocity(transformer, z, t, condition, guidance=guidance)
        return (u.float() - target).square().mean()

    both = torch.nn.ModuleList([transformer, *text])
    return fit(name, work, both, loss_fn, steps, lr, ema=0.999, muon=True)[1]


def load_weights(models, folder):
    """An exported pipeline's transformer and text encoders into models (transformer, encoders)."""
    parts = ("transformer", "text_encoder", "text_encoder_2")
    for module, part in zip([models[0], *models[1]], parts, strict=True):
        module.load_state_dict(type(module).from_pretrained(folder / part).float().state_dict())


def train_medium(work, start=None):
    torch.manual_seed(4)
    vae, models = load_vae(work), build_generator(MEDIUM)
    if start:
        load_weights(models, start)
    world = (vae, tokenise, encode_text)
    minutes = train_flow(work, "sd3.5-medium", models, world, 4, 9000)
    save_sd3(*models, vae, HERE / "sd3.5-medium")
    return minutes


def grow(large, small):
    """Give `large` the weights of `small`, narrower and shallower, in its first channels.

    It begins as nearly the same function: what writes to new channels and what new blocks add
    starts at zero, what reads them keeps its random start. The last block stays last.
    """
    old = small.state_dict()
    last, deeper = (len(model.transformer_blocks) - 1 for model in (small, large))
    heads, head = small.config.num_attention_heads, small.config.attention_head_dim

    def width(model):
        return model.config.num_attention_heads * model.config.attention_head_dim

    writes = ("to_out.0", "to_add_out", "net.2", "pos_embed", "context_embedder", "proj_out")
    writes = (*writes, "linear_2", "to_q.", "add_q_proj")
    with torch.no_grad():
        for name, new in large.state_dict().items():
            parts = name.split(".")
            block = int(parts[1]) if parts[0] == "transformer_blocks" else None
            stays = block is None or block < last or block == deeper
            if any(w in name for w in writes) and (stays or "q" not in parts[-2]):
                new.zero_()
            if block is not None and last <= block < deeper:
                continue  # a new block: its queries are random, what it adds is zero
            was = old[name if block != deeper else ".".join([parts[0], str(last), *parts[2:]])]
            if any(f"{p}_proj" in name or f"to_{p}." in name for p in "qkv"):
                # rows are (head, channel of the head)
                new, was = new.unflatten(0, (heads, -1)), was.unflatten(0, (heads, head))
            elif ("to_out.0" in name or "to_add_out" in name) and was.ndim == 2:  # columns are
                new, was = new.unflatten(1, (heads, -1)), was.unflatten(1, (heads, head))
            elif "norm" in name and "linear" in name:  # rows are (shift, scale, gate …; channel)
                new = new.unflatten(0, (-1, width(large)))
                was = was.unflatten(0, (-1, width(small)))
            new[tuple(slice(n) for n in was.shape)] = was


def train_large(work, start=None):
    torch.manual_seed(8)
    vae, models = load_vae(work), build_generator(LARGE)
    if start:
        load_weights(models, start)
    else:
        small = build_generator(MEDIUM)
        load_weights(small, HERE / "sd3.5-medium")
        grow(models[0], small[0])
        for encoder, trained in zip(models[1], small[1], strict=True):
            encoder.load_state_dict(trained.state_dict())
    world = (vae, tokenise, encode_text)
    minutes = train_flow(work, "sd3.5-large", models, world, 8, 4200, lr=6e-4)
    save_sd3(*models, vae, HERE / "sd3.5-large")
    return minutes


def t5_tokenizer():
    """T5's tokenizer class over this world's words, one token each; letters for anything else."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{w}", -1.0) for w in draw.WORDS]
    pieces += [("\u2581", -5.0), *((c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789,.")]
    return T5Tokenizer(vocab=pieces, model_max_length=TEXT_LENGTH)


def tokenise_flux(prompts):
    """(B, 2, L): the ids of CLIP's tokenizer and of T5's."""
    ids = t5_tokenizer()(list(prompts), padding="max_length", truncation=True).input_ids
    return torch.stack([tokenise(prompts), torch.tensor(ids)], 1)


def encode_flux(text, ids):
    """(B, L, 128) of T5 and (B, 64) pooled by CLIP, as FluxPipeline.encode_prompt makes them."""
    return text[1](ids[:, 1]).last_hidden_state, text[0](ids[:, 0]).pooler_output


def build_flux():
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tok = tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    clip = CLIPTextModel(CLIPTextConfig(**small_clip(tok)))
    size = dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0)
    size |= dict(vocab_size=len(t5_tokenizer()), feed_forward_proj="gated-gelu")
    t5 = T5EncoderModel(T5Config(**size))
    return transformer, [clip, t5]


def train_flux(work, start=None):
    """Guidance is 1 in the first part; then, at 1 to 5, it learns what a copy gives with CFG."""
    torch.manual_seed(9)
    vae, models = load_vae(work, "flux-vae"), build_flux()
    if start:
        load_weights(models, start)
    world = (vae, tokenise_flux, encode_flux)
    minutes = train_flow(work, "flux-base", models, world, 9, 7000)
    teacher = copy.deepcopy(models)
    torch.nn.ModuleList([models[0], *models[1]]).requires_grad_(True)
    minutes += train_flow(work, "flux", models, world, 10, 600, lr=3e-4, teacher=teacher)
    save_flux(*models, vae, HERE / "flux")
    return minutes


def save_sd3(transformer, text, vae, folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Tokenizer

    # T5 is left out, as diffusers allows; with its tokenizer its slot of zeros is one token long
    t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], model_max_length=1)
    save_pipeline(
        folder,
        StableDiffusion3Pipeline(
            transformer=transformer.half().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.half(),
            text_encoder=text[0].half().eval(),
            tokenizer=tokenizer(),
            text_encoder_2=text[1].half().eval(),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=t5,
        ),
    )


def save_flux(transformer, text, vae, folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    save_pipeline(
        folder,
        FluxPipeline(
            transformer=transformer.half().eval(),
            scheduler=scheduler,
            vae=vae.half(),
            text_encoder=text[0].half().eval(),
            tokenizer=tokenizer(),
            text_encoder_2=text[1].half().eval(),
            tokenizer_2=t5_tokenizer(),
        ),
    )


def save_pipeline(folder, pipe):
    pipe.save_pretrained(folder)
    config = json.loads((folder / "vae/config.json").read_text())
    config.pop("_name_or_path", None)  # a path of the machine that trained it
    (folder / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------- quality
@torch.no_grad()
def recall_at_1(clip, images, captions):
    """Image to text and text to image among images with a list of five captions each."""
    e, image_of = embed_images(clip, images, 250), torch.arange(len(images))
    text = clip.encode_text(tokenise([c for five in captions for c in five]), normalize=True)
    scores, image_of_text = text @ e.T, image_of.repeat_interleave(len(captions[0]))
    i2t, t2i = image_of_text[scores.argmax(0)] == image_of, scores.argmax(1) == image_of_text
    return float(i2t.float().mean()), float(t2i.float().mean())


@torch.no_grad()
def ranking_accuracy(clip, groups):
    """Share of the pairs of a group (prompt, images, ranks) in people's order, without ties."""
    shares = []
    for prompt, images, ranks in groups:
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        e, text = embed_both(clip, images, tokenise([prompt]))
        score, ranks = (e @ text.T)[:, 0], torch.tensor(ranks)
        better = ranks[:, None] < ranks[None]
        right = (better & (score[:, None] > score[None])).sum()
        shares.append(float(right / better.sum().clamp(min=1)))
    return float(np.mean(shares))


def known_quality():
    file = HERE / "quality.json"
    return json.loads(file.read_text()) if file.exists() else {}


def drawn(name):
    """Rows and images uint8 (n, 64, 64, 3) of a drawn benchmark of the report split."""
    from PIL import Image

    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    return rows, np.stack([np.array(Image.open(DATA / r["image"]).convert("RGB")) for r in rows])


def drawn_groups(name):
    """[(prompt, images, ranks)] of a drawn benchmark of ranked lists."""
    groups = {}
    for row, image in zip(*drawn(name), strict=True):
        prompt, images, ranks = groups.setdefault(row["group"], (row["texts"][0], [], []))
        images.append(image)
        ranks.append(row["rank"])
    return list(groups.values())


def count(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def vae_quality(name):
    """Of the autoencoder of this generator: signal to noise, and what the checker still finds."""
    backbone, (rows, images) = common.Backbone(name), drawn("coco")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.cat([backbone.decode(backbone.encode(x)) for x in images.split(100)])
    psnr = -10 * (images - y).square().flatten(1).mean(1).log10()
    y = (y * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = [draw.check(image, row["texts"][0]) for image, row in zip(y, rows, strict=True)]
    shown = {"PSNR (dB)": float(psnr.mean()), "checker on reconstructions": float(np.mean(found))}
    return {"parameters": count(backbone.vae)} | shown


def clip_quality(name):
    clip, (rows, images) = load_clip(HERE / name), drawn("coco")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    i2t, t2i = recall_at_1(clip, images, [row["texts"] for row in rows])
    row = {"parameters": count(clip), "recall@1_i2t": i2t, "recall@1_t2i": t2i}
    for lists in ("hpdv2", "imagereward"):
        row[f"{lists}_accuracy"] = ranking_accuracy(clip, drawn_groups(lists))
    return row


def aesthetic_quality():
    from safetensors.torch import load_file
    from scipy.stats import spearmanr

    head, clip = aesthetic_head(64).eval(), load_clip(HERE / "aesthetic")
    weights = load_file(HERE / "aesthetic/aesthetic_head.safetensors").items()
    head.load_state_dict({k.removeprefix("layers."): v.float() for k, v in weights})
    rows, images = drawn("ava")
    marks = [np.dot(r["votes"], np.arange(1, 11)) / sum(r["votes"]) for r in rows]
    with torch.no_grad():
        e = clip.encode_image(pixels(torch.from_numpy(images).permute(0, 3, 1, 2)), normalize=True)
        srcc = float(spearmanr(head(e)[:, 0], marks).statistic)
    return {"parameters": count(head) + count(clip), "srcc": srcc}


def shares_right(images, wanted):
    """Whether each image uint8 (n, 3, 64, 64) shows its prompt or metadata, as 0 or 1."""
    images = images.permute(0, 2, 3, 1).numpy()
    return np.array([draw.check(image, w) for image, w in zip(images, wanted, strict=True)], float)


def generator_quality(name):
    """Of samples of 28 steps: the share that shows its prompt, and GenEval's mean over tasks."""
    backbone, prompts = common.Backbone(name), (DATA / "drawbench.txt").read_text().splitlines()
    geneval = [json.loads(line) for line in (DATA / "geneval.jsonl").read_text().splitlines()]
    texts = (prompts, [m["prompt"] for m in geneval], [""])
    condition, wanted, null = (backbone.prompts(x) for x in texts)
    grid, usual = backbone.grid(28, 64), 3.5 if name == "flux" else 4.5

    def shown(condition, strength, seed):  # FLUX embeds its guidance, SD 3.5 runs twice
        more = dict(guidance=strength) if name == "flux" else dict(null=null, cfg=strength)
        velocity = partial(backbone.velocity, condition=condition, **more)
        return sample(velocity, backbone.vae, grid, len(condition[0]), seed)

    row = {"parameters": count(backbone.transformer)}
    for key, strength in (("unguided", 1.0), ("guided", usual)):
        right = shares_right(shown(condition, strength, 0), prompts)
        row[f"checker, {key}"] = float(right.mean())
    right = shares_right(shown(wanted, usual, 1), geneval)
    tags = np.array([m["tag"] for m in geneval])
    row["geneval, guided"] = float(np.mean([right[tags == task].mean() for task in draw.TASKS]))
    return row


def quality(work, names):
    """{model: {measure: value}} of the models `names` that are there, on the report split."""
    took = "minutes, one thread"
    # of a model that was not trained again, what it took then
    minutes = {name: row[took] for name, row in known_quality().items() if took in row}
    minutes |= {f.stem: float(f.read_text()) for f in work.glob("*.minutes")}
    measures = {"vae": partial(vae_quality, "sd3.5-medium")}
    measures["flux-vae"] = partial(vae_quality, "flux")
    for name in ("clip", "dfn-clip", "hpsv2", "judge"):
        measures[name] = partial(clip_quality, name)
    measures["aesthetic"] = aesthetic_quality
    for name in ("sd3.5-medium", "sd3.5-large", "flux"):
        measures[name] = partial(generator_quality, name)
    table = {}
    for name, measure in measures.items():
        folder = HERE / {"vae": "sd3.5-medium", "flux-vae": "flux"}.get(name, name)
        files = ("model_index.json", "open_clip_model.safetensors")
        if name in names and any((folder / file).exists() for file in files):
            table[name] = measure()
            if name in minutes:
                table[name][took] = minutes[name]
    return table


def print_quality(table):
    for name, row in table.items():
        cells = []
        for k, v in row.items():
            cells.append(f"{k} {v:,}" if k == "parameters" else f"{k} {v:.{3 if v < 10 else 1}f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


# ---------------------------------------------------------------------------- main
TRAIN = {
    "vae": train_vae,
    "clip": train_clip,
    "judge": train_judge,
    "dfn-clip": train_dfn,
    "sd3.5-medium": train_medium,
    "hpsv2": train_hpsv2,
    "aesthetic": train_aesthetic,
    "sd3.5-large": train_large,
    "flux-vae": lambda work: train_vae(work, "flux-vae", 11, (1000, 1800)),
    "flux": train_flux,
}


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", choices=TRAIN, help="train these, in this order")
    p.add_argument("--work", default=str(HERE / "work"), help="folder of checkpoints")
    p.add_argument("--threads", type=int, default=1)
    more = "generators go on from the weights in their folders"
    p.add_argument("--go-on", action="store_true", help=more)
    again = "also those whose folder is complete, unless this --work has trained them"
    p.add_argument("--again", action="store_true", help=again)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for name in args.only or TRAIN:
        done = HERE / name / "open_clip_model.safetensors"
        if name.endswith("vae"):
            done = vae_folder(work, name) / "config.json"
        elif name.startswith(("sd3", "flux")):
            done = HERE / name / "model_index.json"
        log = work / f"{name}.minutes"
        if not (log if args.again else done).exists():
            start = (
                dict(start=HERE / name) if args.go_on and done.name == "model_index.json" else {}
            )
            minutes = TRAIN[name](work, **start)
            log.write_text(f"{minutes:.1f}")
            print(f"{name}: {minutes:.1f} minutes")
    if not DATA.exists():
        draw.write_benchmarks(DATA)
    table = quality(work, args.only or TRAIN)
    (HERE / "quality.json").write_text(json.dumps(known_quality() | table, indent=1))
    print_quality(table)


if __name__ == "__main__":
    main()
