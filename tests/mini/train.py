"""Train every model of the miniature from nothing: python tests/mini/train.py --again [--only NAME …] [--work DIR]

The models, in the order in which they need each other:

    vae            AutoencoderKL of SD3's geometry (factor 8, 16 channels)             L1 + L2 + 5e-4 KL
    clip           CLIP, patch 16, QuickGELU, on captions of which one in eight is wrong (as web captions are)
    judge          CLIP, 6 blocks, own seed and own drawings, then preferences; nothing is ever trained or chosen by it
    dfn-clip       CLIP, patch 8, on the captions that `clip` finds plausible (as DFN filters its data)
    sd3.5-medium   SD3Transformer2DModel on the VAE's latents, with its two CLIP text encoders, flow matching
    sd3.5-large    deeper and wider, on the same VAE, grown from sd3.5-medium's weights and trained on
    flux-vae       an autoencoder of its own for flux, from another seed
    flux           FluxTransformer2DModel with a CLIP and a T5 encoder, flow matching, then its guidance embedding distilled from CFG
    hpsv2          CLIP, patch 16, GELU, contrastive and then finetuned on ranked images, drawn, damaged and generated
    aesthetic      the published MLP on clip's embedding, regressed on votes

Each model is trained in one thread, resumes from its own checkpoint in --work, is exported into its folder in half
precision when done, and is left alone if its folder is complete. Two may be trained at once with two commands and --only.
Their rows of the quality table are printed at the end and written to quality.json; tests/mini/README.md shows it.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
import common
import draw

HERE = Path(__file__).parent
TEXT_LENGTH = 16
BF16 = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)  # trap: a CPU that emulates it takes three times as long


# ---------------------------------------------------------------------------- data
def scenes(n, seed):
    """n drawn training scenes: uint8 (n, 3, 64, 64), their captions, and the order that puts scenes side by side which differ in shapes and places only."""
    rng = np.random.default_rng([seed, 7])
    images, captions, alike = np.empty((n, 3, draw.SIZE, draw.SIZE), np.uint8), [], []
    for k in range(n):
        scene = draw.sample_split(rng, "train")
        images[k] = draw.draw(rng, scene).transpose(2, 0, 1)
        captions.append(draw.random_caption(rng, scene))
        alike.append((scene["background"], scene["family"], len(scene["objects"]), sorted(f"{o['color']} {o['size']}" for o in scene["objects"])))
    return torch.from_numpy(images), captions, torch.tensor(sorted(range(n), key=lambda k: alike[k]))


def signed(images):
    """uint8 (B, 3, H, W) to float in [-1, 1]."""
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------------- one training loop for all of them
def fit(name, work, models, loss_fn, steps, lr, warmup=0.03, ema=None, weight_decay=0.0, snapshots=()):
    """Train `models` (one nn.Module) with one-cycle cosine AdamW. Checkpoints every minute; resumes where it was.

    loss_fn(step, generator) -> loss; everything random is drawn from `generator`, so that a resumed run continues the same stream.
    """
    path = work / f"{name}.pt"
    optimizer = torch.optim.AdamW(models.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    generator, start, seconds = torch.Generator().manual_seed(name_seed(name)), 0, 0.0
    average = {k: v.detach().clone() for k, v in models.state_dict().items()} if ema else None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        models.load_state_dict(saved["models"]), optimizer.load_state_dict(saved["optimizer"]), generator.set_state(saved["generator"])
        start, seconds, average = saved["step"], saved["seconds"], saved["average"]

    def save(to, step):
        torch.save(dict(models=models.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state(),
                        step=step, seconds=seconds, average=average), str(to) + ".tmp")
        os.replace(str(to) + ".tmp", to)

    bar, last, mean = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10), time.time(), None
    models.train()
    for step in bar:
        began = time.time()
        x = step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / (warmup * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * x)))
        loss = loss_fn(step, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            current = models.state_dict()
            torch._foreach_lerp_([average[k] for k in current if current[k].is_floating_point()],
                                 [current[k] for k in current if current[k].is_floating_point()], 1 - decay)
        seconds += time.time() - began
        if step % 50 == 0:
            value = float(loss.detach())
            if not np.isfinite(value):
                raise SystemExit(f"error: the loss of {name} became {value} at step {step}; the last good state is {path}")
            mean = value if mean is None else 0.8 * mean + 0.2 * value
            bar.set_postfix(loss=f"{mean:.4f}")
        if time.time() - last > 60:
            save(path, step + 1)
            last = time.time()
        if step + 1 in snapshots:
            save(work / f"{name}-{step + 1}.pt", step + 1)
    save(path, steps)
    if ema:
        models.load_state_dict(average)
    return models.eval().requires_grad_(False), seconds / 60


def name_seed(name):
    return zlib.crc32(name.encode())


def pick(generator, n, batch):
    return torch.randint(n, (batch,), generator=generator)


def pick_alike(generator, order, batch, run=24):
    """A batch for contrastive learning: half of it random, half in runs of scenes that look alike, because random negatives hardly ever differ in shape alone."""
    start = torch.randint(len(order) - run, (batch // 2 // run,), generator=generator)
    runs = order[start[:, None] + torch.arange(run)].flatten()
    return torch.cat([runs, order[pick(generator, len(order), batch - len(runs))]])


def half(module):
    """A state dict in half precision, as it is committed."""
    return {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in module.state_dict().items()}


# ---------------------------------------------------------------------------- autoencoder
def train_vae(work, name="vae", seed=1, steps=(2000, 2600)):
    """Two cycles: the second, with less weight on the KL and smaller batches, gets the colours right."""
    from diffusers import AutoencoderKL
    torch.manual_seed(seed)
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 64),
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
                        norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
                        sample_size=64, scaling_factor=1.0, shift_factor=0.0)
    images = scenes(12000, seed)[0]

    def reconstruction(batch, kl):
        def loss_fn(step, generator):
            x = signed(images[pick(generator, len(images), batch)])
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):  # the convolutions are twice as fast
                posterior = vae.encode(x).latent_dist
                z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
                error = vae.decode(z).sample.float() - x
            return error.abs().mean() + error.square().mean() + kl * posterior.kl().mean() / 1024
        return loss_fn

    minutes = fit(name, work, vae, reconstruction(24, 5e-4), steps[0], 2e-3)[1]
    vae.requires_grad_(True)
    minutes += fit(f"{name}-second", work, vae, reconstruction(16, 5e-5), steps[1], 2e-3)[1]
    with torch.no_grad():
        z = torch.cat([vae.encode(signed(b)).latent_dist.mean for b in images[:2000].split(100)])
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 4), shift_factor=round(float(z.mean()), 4))
    vae.half().save_pretrained(work / name)
    return minutes


# ---------------------------------------------------------------------------- text
def tokenizer():
    """CLIP's own tokenizer class over this world's words: every word is one token, anything else is spelt out."""
    from collections import Counter

    from transformers import CLIPTokenizer
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.")
    # the merges are learnt here: the tokenizers library's trainer breaks ties by hash order, so its ids differ from call to call
    words, merges = [[*w[:-1], w[-1] + "</w>"] for w in draw.WORDS], []
    while any(len(w) > 1 for w in words):
        counts = Counter(pair for w in words for pair in zip(w, w[1:]))
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        for w in words:
            for k in range(len(w) - 2, -1, -1):
                if tuple(w[k:k + 2]) == merges[-1]:
                    w[k:k + 2] = ["".join(merges[-1])]
    # open_clip pools at the highest id, so the end token comes last; padding is id 0, as in open_clip
    names = ["!", *letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={n: k for k, n in enumerate(names)}, merges=merges, model_max_length=TEXT_LENGTH, pad_token="!")


# ---------------------------------------------------------------------------- CLIP models
def clip_config(patch, layers, width, quick_gelu, text_layers=3):
    return dict(embed_dim=64, quick_gelu=quick_gelu,
                vision_cfg=dict(image_size=64, layers=layers, width=width, patch_size=patch, head_width=32),
                text_cfg=dict(context_length=TEXT_LENGTH, vocab_size=len(tokenizer()), width=96, heads=3, layers=text_layers,
                              hf_tokenizer_name="tokenizer files beside this one"))


def build_clip(config):
    import open_clip
    return open_clip.CLIP(**config)


MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)))


def pixels(images):
    return (images.float() / 255 - MEAN) / STD


def contrastive(a, b, tokens, logit_scale):
    """Symmetric cross-entropy of unit embeddings of images and texts (B, d), in which equal captions count as matches."""
    logits = logit_scale.exp().clamp(max=100) * a @ b.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    return -0.5 * sum((same / same.sum(1, keepdim=True) * l.log_softmax(1)).sum(1).mean() for l in (logits, logits.T))


def web_pool(seed, n=24000, wrong=1 / 8):
    """Drawn images, tokens of captions of which some belong to another image, as on the web, and the order of scenes()."""
    images, captions, order = scenes(n, seed)
    rng = np.random.default_rng(seed)
    swapped = rng.permutation(n)[:int(wrong * n)]
    shuffled = [captions[k] for k in rng.permutation(swapped)]
    for k, text in zip(swapped, shuffled):
        captions[k] = text
    return images, tokenise(captions), order


def save_clip(clip, config, folder, extra={}):
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = dict(mean=[.48145466, .4578275, .40821073], std=[.26862954, .26130258, .27577711], interpolation="bicubic", resize_mode="shortest")
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg=preprocess), indent=1))
    tokenizer().save_pretrained(folder)
    for name, weights in extra.items():
        save_file(weights, folder / name)
    save_file(half(clip), folder / "open_clip_model.safetensors")


def train_clip(work, steps=3000):
    torch.manual_seed(2)
    config = clip_config(patch=16, layers=8, width=128, quick_gelu=True)
    images, tokens, order = web_pool(2)

    def loss_fn(step, generator):
        k = pick_alike(generator, order, 192)
        return contrastive(clip.encode_image(pixels(images[k]), normalize=True), clip.encode_text(tokens[k], normalize=True), tokens[k], clip.logit_scale)

    clip = build_clip(config)
    clip, minutes = fit("clip", work, clip, loss_fn, steps, 1e-3, weight_decay=0.05)
    with torch.no_grad():  # then the text tower alone, against the image tower's embeddings, which are made once
        e = torch.cat([clip.encode_image(pixels(i), normalize=True) for i in images.split(500)])
    text = torch.nn.ModuleList([clip.token_embedding, clip.transformer, clip.ln_final]).requires_grad_(True)

    def text_loss(step, generator):
        k = pick(generator, len(images), 256)
        logits = clip.logit_scale.exp() * e[k] @ clip.encode_text(tokens[k], normalize=True).T
        return 0.5 * (F.cross_entropy(logits, torch.arange(256)) + F.cross_entropy(logits.T, torch.arange(256)))

    minutes += fit("clip-text", work, text, text_loss, 1000, 1e-3)[1]
    save_clip(clip, config, HERE / "clip")
    return minutes


def train_dfn(work, steps=1500):
    """DFN: a data filtering network (here `clip`) keeps the pairs that it finds plausible; a larger tower is trained on them."""
    torch.manual_seed(3)
    config = clip_config(patch=8, layers=8, width=128, quick_gelu=True)
    images, tokens, order = web_pool(3, n=30000)
    filtering = load_clip(HERE / "clip")
    with torch.no_grad():
        score = torch.cat([(filtering.encode_image(pixels(i), normalize=True) * filtering.encode_text(t, normalize=True)).sum(-1)
                           for i, t in zip(images.split(500), tokens.split(500))])
    order = order[score[order] >= score.quantile(0.2)]  # the pairs that stay

    def loss_fn(step, generator):
        k = pick_alike(generator, order, 96)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):  # four times clip's tokens: here half precision pays
            a, b = clip.encode_image(pixels(images[k]), normalize=True), clip.encode_text(tokens[k], normalize=True)
            return contrastive(a, b, tokens[k], clip.logit_scale)

    clip = build_clip(config)  # everything but the patch embedding and its positions starts from clip
    clip.load_state_dict({k: v for k, v in filtering.state_dict().items() if v.shape == clip.state_dict()[k].shape}, strict=False)
    clip, minutes = fit("dfn-clip", work, clip, loss_fn, steps, 1e-3, weight_decay=0.05)
    save_clip(clip, config, HERE / "dfn-clip")
    return minutes


def load_clip(folder):
    from safetensors.torch import load_file
    clip = build_clip(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    clip.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "open_clip_model.safetensors").items()})
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
    """What an image shows, as numbers: how many of every colour and shape, how many large ones, the background, the neatness."""
    seen = draw.look(image)
    count = np.zeros((len(draw.COLOURS), len(draw.SHAPES)))
    for o in seen["objects"]:
        if o["class"] != "blob":
            count[list(draw.COLOURS).index(o["color"]), draw.SHAPES.index(o["class"])] += 1
    background = [seen["background"] == name for name in draw.BACKGROUNDS]
    large = sum(o["size"] == "large" for o in seen["objects"])
    return np.array([*count.ravel(), *background, len(seen["objects"]), large, *draw.neatness(image, seen)], np.float32)


def ranked(work, seed, groups, size=4):
    """Ranked groups: images uint8 (G, size, 3, 64, 64), tokens (G, L), ranks (G, size) with 1 the best, readings (G, size, 57)."""
    def make():
        rng = np.random.default_rng([seed, 11])
        images, prompts, ranks, readings = [], [], [], []
        for _ in tqdm(range(groups), desc="ranked groups", mininterval=10):
            prompt, group, rank = draw.ranked_group(rng, "train", size)
            images.append(np.stack(group).transpose(0, 3, 1, 2)), prompts.append(prompt), ranks.append(rank)
            readings.append(np.stack([reading(i) for i in group]))
        return torch.from_numpy(np.stack(images)), tokenise(prompts), torch.tensor(ranks), torch.from_numpy(np.stack(readings))
    return cached(work / f"ranked-{seed}.pt", make)


def preference_loss(e, t, ranks, scale=40.0):
    """Bradley-Terry on every pair of a group: image embeddings (G, n, d), text embeddings (G, d), ranks (G, n)."""
    score = torch.einsum("gne,ge->gn", e, t)
    better = (ranks[:, :, None] < ranks[:, None]).float()
    return (better * F.softplus(-scale * (score[:, :, None] - score[:, None]))).sum() / better.sum()


def train_preference(name, work, clip, config, steps, lr, pools, contrastive_pool, groups=20, pairs=96):
    """A CLIP on ranked groups, pools = [(share, ranked groups)], with the contrastive loss beside it.

    A linear head on the embedding, dropped afterwards, has to read off what the image shows: the ranks alone teach too little of it.
    """
    images, tokens, order = contrastive_pool
    of_groups = torch.cat([readings.flatten(0, 1) for _, (*_, readings) in pools])
    mean, std = of_groups.mean(0), of_groups.std(0)
    models = torch.nn.ModuleDict(dict(clip=clip.requires_grad_(True), read=torch.nn.Linear(config["embed_dim"], len(mean))))

    def loss_fn(step, generator):
        picked = [[v[g] for v in pool] for share, pool in pools for g in [pick(generator, len(pool[0]), round(share * groups))]]
        group_images, group_tokens, ranks, readings = (torch.cat(v) for v in zip(*picked))
        k = pick_alike(generator, order, pairs)
        e = clip.encode_image(pixels(torch.cat([group_images.flatten(0, 1), images[k]])))
        t = clip.encode_text(torch.cat([group_tokens, tokens[k]]), normalize=True)
        shown = F.mse_loss(models["read"](e[:ranks.numel()]), (readings.flatten(0, 1) - mean) / std)
        e = F.normalize(e, dim=-1)
        matched = contrastive(e[ranks.numel():], t[len(ranks):], tokens[k], clip.logit_scale)
        return preference_loss(e[:ranks.numel()].unflatten(0, ranks.shape), t[:len(ranks)], ranks) + 0.5 * matched + shown

    models, minutes = fit(name, work, models, loss_fn, steps, lr, weight_decay=0.05)
    save_clip(models["clip"], config, HERE / name)
    return minutes


def whiten(clip, images, eps=1e-3):
    """Start the patch convolution as the whitening of the images' patches: edges then weigh as much as flat colour, and shapes are learnt much sooner."""
    conv = clip.visual.conv1
    patches = F.unfold(pixels(images), conv.kernel_size, stride=conv.stride).transpose(1, 2).flatten(0, 1)
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    with torch.no_grad():
        conv.weight.copy_((axes / (variance + eps).sqrt()).T.flip(0)[:len(conv.weight)].view_as(conv.weight))


def train_judge(work):
    torch.manual_seed(5)
    config = clip_config(patch=16, layers=6, width=128, quick_gelu=True)
    pool, clip = web_pool(5), build_clip(config)
    whiten(clip, pool[0][:4000])
    return train_preference("judge", work, clip, config, 4500, 1.2e-3, [(1.0, ranked(work, 5, 8000))], pool)


def train_hpsv2(work):
    """clip's weights with GELU in place of QuickGELU; a quarter of the ranked groups come from the half-trained generator."""
    torch.manual_seed(6)
    config = clip_config(patch=16, layers=8, width=128, quick_gelu=False)
    clip = build_clip(config)
    clip.load_state_dict(load_clip(HERE / "clip").state_dict())
    pools = [(0.75, ranked(work, 6, 8000)), (0.25, generated_groups(work, 6, 800))]
    return train_preference("hpsv2", work, clip, config, 2500, 6e-4, pools, web_pool(6))


def generated_groups(work, seed, groups, size=4):
    """As ranked(), of images that an early copy of the generator made of one prompt at three strengths of guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def make():
        rng = np.random.default_rng([seed, 12])
        prompts = [draw.caption(draw.sample_split(rng, "train"), int(rng.integers(5))) for _ in range(groups)]
        transformer, text = build_generator(MEDIUM)
        early = work / f"sd3.5-medium-{EARLY}.pt"
        if not early.exists():
            raise SystemExit(f"error: {early} does not exist: hpsv2 is trained on images of an early sd3.5-medium; make it with --again --only sd3.5-medium")
        saved = torch.load(early, weights_only=True)["average"]
        torch.nn.ModuleList([transformer.eval(), *text]).load_state_dict(saved)
        vae, images, ranks, readings = load_vae(work), [], [], []
        grid = common.sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 12, 16)
        for k in tqdm(range(0, groups, 50), desc="generated groups"):
            part = prompts[k:k + 50]
            with torch.no_grad():
                condition, null = encode_text(text, tokenise(part)), encode_text(text, tokenise([""]))
            four = torch.cat([sample(lambda z, s: common.velocity(transformer, z, s, condition, null, c), vae, grid, len(part), int(rng.integers(1 << 30)))
                              for c in (1.0, 2.5, 4.5, 4.5)])
            four = four.unflatten(0, (size, len(part))).transpose(0, 1)
            images.append(four)
            for prompt, group in zip(part, four.permute(0, 1, 3, 4, 2).numpy()):
                ranks.append(draw.ranks([draw.preference(i, prompt) for i in group]))
                readings.append(np.stack([reading(i) for i in group]))
        return torch.cat(images), tokenise(prompts), torch.tensor(ranks), torch.from_numpy(np.stack(readings))
    return cached(work / "generated.pt", make)


# ---------------------------------------------------------------------------- aesthetic
def aesthetic_head(width):
    """The published MLP: five linear layers with dropout between and no non-linearity (improved-aesthetic-predictor)."""
    from torch import nn
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
                         nn.Linear(64, 16), nn.Linear(16, 1))


def train_aesthetic(work, steps=4000):
    torch.manual_seed(7)
    images = scenes(12000, 7)[0]
    rng = np.random.default_rng(7)
    counts = np.array([draw.votes(rng, i) for i in images.permute(0, 2, 3, 1).numpy()])
    mark = torch.tensor(counts @ np.arange(1, 11) / counts.sum(1), dtype=torch.float32)
    clip = load_clip(HERE / "clip")
    with torch.no_grad():
        e = torch.cat([clip.encode_image(pixels(i), normalize=True) for i in images.split(500)])
    head = aesthetic_head(e.shape[1])
    with torch.no_grad():
        head[-1].bias.fill_(mark.mean())

    def loss_fn(step, generator):
        k = pick(generator, len(e), 256)
        return F.mse_loss(head(e[k])[:, 0], mark[k])

    head, minutes = fit("aesthetic", work, head, loss_fn, steps, 1e-3)
    config = json.loads((HERE / "clip/open_clip_config.json").read_text())["model_cfg"]
    save_clip(clip, config, HERE / "aesthetic", {"aesthetic_head.safetensors": {f"layers.{k}": v for k, v in half(head).items()}})
    return minutes


# ---------------------------------------------------------------------------- generators
MEDIUM = dict(num_layers=8, width=128, head=32, dual=4)
LARGE = dict(num_layers=10, width=144, head=36, dual=4)
EARLY = 1500  # steps after which a copy is kept, to generate imperfect images for hpsv2


def build_generator(size):
    """The transformer and its two CLIP text encoders, SD3's way: penultimate hidden states side by side, projections pooled."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    width = size["width"]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=size["num_layers"], attention_head_dim=size["head"],
        num_attention_heads=width // size["head"], joint_attention_dim=128, caption_projection_dim=width, pooled_projection_dim=128,
        pos_embed_max_size=8, dual_attention_layers=tuple(range(size["dual"])), qk_norm="rms_norm")
    tok = tokenizer()
    text = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=64,
        max_position_embeddings=TEXT_LENGTH, hidden_act=act, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id)) for act in ("quick_gelu", "gelu")]
    return transformer, text


def encode_text(text, tokens):
    """(B, L + 1, 128) and (B, 128), as StableDiffusion3Pipeline.encode_prompt makes them with one zero token for the absent T5."""
    outs = [m(tokens, output_hidden_states=True) for m in text]
    hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
    return torch.cat([hidden, hidden.new_zeros(len(tokens), 1, hidden.shape[-1])], 1), torch.cat([o.text_embeds for o in outs], -1)


def vae_folder(work, name="vae"):
    """Where an autoencoder lies: in `work`, or in the folder of the generator that it was exported with."""
    return work / name if (work / name).exists() else HERE / {"vae": "sd3.5-medium", "flux-vae": "flux"}[name] / "vae"


def load_vae(work, name="vae"):
    from diffusers import AutoencoderKL
    return AutoencoderKL.from_pretrained(vae_folder(work, name), dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def sample(velocity, vae, grid, n, seed):
    """uint8 (n, 3, 64, 64) by Euler's method: velocity(z, sigma) over the noise levels `grid`, from 1 to 0."""
    z = torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(grid[:-1], grid[1:]):
        z = z + (b - a) * velocity(z, a.expand(n))
    x = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def train_flow(work, name, transformer, text, encode, tokenise, vae, seed, steps, batch=48, lr=1e-3, teacher=None, snapshots=()):
    """Flow matching with logit-normal times and 12% null captions. text: encoders, trained too; encode(text, ids) -> (text, pooled).

    teacher: a frozen copy of (transformer, text), whose guided velocity at a random strength is the target instead: guidance distillation.
    """
    images, captions, _ = scenes(30000, seed)
    ids, null = tokenise(captions), tokenise([""])
    with torch.no_grad():
        z0 = torch.cat([(vae.encode(signed(i)).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor for i in images.split(200)])
    del images

    def loss_fn(step, generator):
        k = pick(generator, len(z0), batch)
        drop = torch.rand(batch, *[1] * (ids.ndim - 1), generator=generator) < (0 if teacher else 0.12)
        t, eps, guidance = torch.sigmoid(torch.randn(batch, generator=generator)), torch.randn(z0[k].shape, generator=generator), 1.0
        z, target = torch.lerp(z0[k], eps, t.view(-1, 1, 1, 1)), eps - z0[k]
        if teacher:
            guidance = 1 + 4 * torch.rand(batch, generator=generator)
            with torch.no_grad():
                un, uc = (common.velocity(teacher[0], z, t, encode(teacher[1], v), guidance=1.0) for v in (null, ids[k]))
                target = un + guidance.view(-1, 1, 1, 1) * (uc - un)
        u = common.velocity(transformer, z, t, encode(text, torch.where(drop, null, ids[k])), guidance=guidance)
        return (u - target).square().mean()

    return fit(name, work, torch.nn.ModuleList([transformer, *text]), loss_fn, steps, lr, ema=0.999, snapshots=snapshots)[1]


def train_medium(work):
    torch.manual_seed(4)
    vae, (transformer, text) = load_vae(work), build_generator(MEDIUM)
    minutes = train_flow(work, "sd3.5-medium", transformer, text, encode_text, tokenise, vae, 4, 28000, snapshots=(EARLY,))
    save_sd3(transformer, text, vae, HERE / "sd3.5-medium")
    return minutes


def grow(large, small):
    """Give `large` the weights of `small`, a narrower and shallower model of its class: in the first channels, so that it begins as nearly the same function.

    What writes to the new channels and what the new blocks add starts at zero; what reads them keeps its random start. The last block stays last.
    """
    old, last, deeper = small.state_dict(), len(small.transformer_blocks) - 1, len(large.transformer_blocks) - 1
    heads, head = small.config.num_attention_heads, small.config.attention_head_dim
    width = lambda model: model.config.num_attention_heads * model.config.attention_head_dim
    writes = ("to_out.0", "to_add_out", "net.2", "pos_embed", "context_embedder", "proj_out", "linear_2", "to_q.", "add_q_proj")
    with torch.no_grad():
        for name, new in large.state_dict().items():
            parts = name.split(".")
            block = int(parts[1]) if parts[0] == "transformer_blocks" else None
            if any(w in name for w in writes) and (block is None or block < last or block == deeper or "q" not in parts[-2]):
                new.zero_()
            if block is not None and last <= block < deeper:
                continue  # a new block: its queries are random, what it adds is zero
            was = old[name if block != deeper else ".".join([parts[0], str(last), *parts[2:]])]
            if any(f"{p}_proj" in name or f"to_{p}." in name for p in "qkv"):  # rows are (head, channel of the head)
                new, was = new.unflatten(0, (heads, -1)), was.unflatten(0, (heads, head))
            elif ("to_out.0" in name or "to_add_out" in name) and was.ndim == 2:  # columns are
                new, was = new.unflatten(1, (heads, -1)), was.unflatten(1, (heads, head))
            elif "norm" in name and "linear" in name:  # rows are (shift, scale, gate …; channel)
                new, was = new.unflatten(0, (-1, width(large))), was.unflatten(0, (-1, width(small)))
            new[tuple(slice(n) for n in was.shape)] = was


def train_large(work):
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(8)
    medium, vae, (transformer, text) = HERE / "sd3.5-medium", load_vae(work), build_generator(LARGE)
    grow(transformer, SD3Transformer2DModel.from_pretrained(medium / "transformer", dtype=torch.float32))
    for encoder, part in zip(text, ("text_encoder", "text_encoder_2")):
        encoder.load_state_dict(type(encoder).from_pretrained(medium / part, dtype=torch.float32).state_dict())
    minutes = train_flow(work, "sd3.5-large", transformer, text, encode_text, tokenise, vae, 8, 5500, lr=6e-4)
    save_sd3(transformer, text, vae, HERE / "sd3.5-large")
    return minutes


def t5_tokenizer():
    """T5's tokenizer class over this world's words, one token each; letters for anything else."""
    from transformers import T5Tokenizer
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{w}", -1.0) for w in draw.WORDS), ("\u2581", -5.0), *((c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789,.")]
    return T5Tokenizer(vocab=pieces, model_max_length=TEXT_LENGTH)


def tokenise_flux(prompts):
    """(B, 2, L): the ids of CLIP's tokenizer and of T5's."""
    t5 = torch.tensor(t5_tokenizer()(list(prompts), padding="max_length", truncation=True).input_ids)
    return torch.stack([tokenise(prompts), t5], 1)


def encode_flux(text, ids):
    """(B, L, 128) of the T5 encoder and (B, 64) pooled by the CLIP one, as FluxPipeline.encode_prompt makes them."""
    return text[1](ids[:, 1]).last_hidden_state, text[0](ids[:, 0]).pooler_output


def build_flux():
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    tok = tokenizer()
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=64, num_layers=3, num_single_layers=5, attention_head_dim=32, num_attention_heads=4,
                                         joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=TEXT_LENGTH, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    return transformer, [clip, t5]


def train_flux(work):
    """The guidance embedding is 1 in the first part; in the second the model learns, at guidance 1 to 5, what its own copy gives with CFG."""
    torch.manual_seed(9)
    vae, (transformer, text) = load_vae(work, "flux-vae"), build_flux()
    minutes = train_flow(work, "flux-base", transformer, text, encode_flux, tokenise_flux, vae, 9, 7000)
    teacher = copy.deepcopy((transformer, text))
    torch.nn.ModuleList([transformer, *text]).requires_grad_(True)
    minutes += train_flow(work, "flux", transformer, text, encode_flux, tokenise_flux, vae, 10, 800, lr=3e-4, teacher=teacher)
    save_flux(transformer, text, vae, HERE / "flux")
    return minutes


def save_sd3(transformer, text, vae, folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Tokenizer
    # T5 is left out, as diffusers allows. Its tokenizer stays, with room for one token, so that its slot of zeros is one token long.
    t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], model_max_length=1)
    save_pipeline(folder, StableDiffusion3Pipeline(
        transformer=transformer.half().eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.half(), text_encoder=text[0].half().eval(),
        tokenizer=tokenizer(), text_encoder_2=text[1].half().eval(), tokenizer_2=tokenizer(), text_encoder_3=None, tokenizer_3=t5))


def save_flux(transformer, text, vae, folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    save_pipeline(folder, FluxPipeline(transformer=transformer.half().eval(), scheduler=scheduler, vae=vae.half(), text_encoder=text[0].half().eval(), tokenizer=tokenizer(),
                                       text_encoder_2=text[1].half().eval(), tokenizer_2=t5_tokenizer()))


def save_pipeline(folder, pipe):
    pipe.save_pretrained(folder)
    config = json.loads((folder / "vae/config.json").read_text())
    config.pop("_name_or_path", None)  # where the VAE was loaded from on the machine that trained it
    (folder / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------- quality
@torch.no_grad()
def recall_at_1(clip, images, captions):
    """Image to text and text to image among held-out images, five captions each, captions a list of lists."""
    a = torch.cat([clip.encode_image(pixels(i), normalize=True) for i in images.split(250)])
    b = clip.encode_text(tokenise([c for cs in captions for c in cs]), normalize=True)
    of = torch.arange(len(images)).repeat_interleave(len(captions[0]))
    scores = b @ a.T
    return float((of[scores.argmax(0)] == torch.arange(len(images))).float().mean()), float((scores.argmax(1) == of).float().mean())


@torch.no_grad()
def ranking_accuracy(clip, groups):
    """Share of the pairs of each group that are ordered as people order them; groups of (prompt, images, ranks), ties left out."""
    shares = []
    for prompt, images, ranks in groups:
        e = clip.encode_image(pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)), normalize=True)
        score, ranks = (e @ clip.encode_text(tokenise([prompt]), normalize=True).T)[:, 0], torch.tensor(ranks)
        better = ranks[:, None] < ranks[None]
        shares.append(float((better & (score[:, None] > score[None])).sum() / better.sum().clamp(min=1)))
    return float(np.mean(shares))


def known_quality():
    return json.loads((HERE / "quality.json").read_text()) if (HERE / "quality.json").exists() else {}


def quality(work, names):
    """Rows of the table of tests/mini/README.md, on the report split's drawn benchmarks: {model: {measure: value}} of the models `names`."""
    from PIL import Image
    from safetensors.torch import load_file
    from scipy.stats import spearmanr
    data = HERE / "data"
    if not data.exists():
        draw.write_benchmarks(data)
    read = lambda path: np.array(Image.open(path).convert("RGB"))
    coco = json.loads((data / "coco/coco_test_karpathy.json").read_text())
    images = torch.from_numpy(np.stack([read(data / "coco/val2014" / i["file_name"]) for i in coco["images"]])).permute(0, 3, 1, 2)
    captions = [[a["caption"] for a in coco["annotations"][5 * k:5 * k + 5]] for k in range(len(images))]
    hpd = [(r["prompt"], [read(data / "hpdv2/test" / p) for p in r["image_path"]], r["rank"]) for r in json.loads((data / "hpdv2/test.json").read_text())]
    imr = [(r["prompt"], [read(data / "imagereward" / p) for p in r["generations"]], r["ranking"]) for r in json.loads((data / "imagereward/test.json").read_text())]
    count = lambda module: sum(p.numel() for p in module.parameters())
    took = "minutes, one thread"
    minutes = {name: row[took] for name, row in known_quality().items() if took in row}  # of a model that was not trained again, what it took then
    minutes |= {f.stem: float(f.read_text()) for f in work.glob("*.minutes")}
    table = {}

    generators = [HERE / name for name in ("sd3.5-medium", "sd3.5-large", "flux") if (HERE / name / "model_index.json").exists()]
    for name, backbone in (("vae", "sd3.5-medium"), ("flux-vae", "flux")):
        if name in names and HERE / backbone in generators:
            backbone = common.Backbone(backbone)
            with torch.no_grad():
                y = torch.cat([backbone.decode(backbone.encode_image(b.float() / 255)) for b in images.split(100)])
            psnr = -10 * (images.float() / 255 - y).square().flatten(1).mean(1).log10()
            found = [draw.check(i, c[0]) for i, c in zip((y * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), captions)]
            table[name] = {"parameters": count(backbone.vae), "PSNR (dB)": float(psnr.mean()), "checker on reconstructions": float(np.mean(found))}
    for name in ("clip", "dfn-clip", "hpsv2", "judge"):
        if name in names and (HERE / name / "open_clip_model.safetensors").exists():
            clip = load_clip(HERE / name)
            i2t, t2i = recall_at_1(clip, images, captions)
            table[name] = {"parameters": count(clip), "recall@1_i2t": i2t, "recall@1_t2i": t2i, "hpdv2_accuracy": ranking_accuracy(clip, hpd), "imagereward_accuracy": ranking_accuracy(clip, imr)}
    if "aesthetic" in names and (HERE / "aesthetic/aesthetic_head.safetensors").exists():
        head, clip = aesthetic_head(64).eval(), load_clip(HERE / "aesthetic")
        head.load_state_dict({k.removeprefix("layers."): v.float() for k, v in load_file(HERE / "aesthetic/aesthetic_head.safetensors").items()})
        lines = np.array([line.split() for line in (data / "ava/AVA.txt").read_text().splitlines()], int)
        marks = lines[:, 2:12] @ np.arange(1, 11) / lines[:, 2:12].sum(1)
        shown = torch.from_numpy(np.stack([read(data / "ava/images" / f"{k}.png") for k in lines[:, 1]])).permute(0, 3, 1, 2)
        with torch.no_grad():
            score = head(clip.encode_image(pixels(shown), normalize=True))[:, 0]
        table["aesthetic"] = {"parameters": count(head) + count(clip), "srcc": float(spearmanr(score, marks).statistic)}
    prompts = (data / "drawbench.txt").read_text().splitlines()
    geneval = [json.loads(line) for line in (data / "geneval.jsonl").read_text().splitlines()]
    for folder in [f for f in generators if f.name in names]:
        backbone = common.Backbone(folder.name)
        condition, wanted, null = (common.encode_prompts(backbone, p) for p in (prompts, [m["prompt"] for m in geneval], [""]))
        row = table[folder.name] = {"parameters": count(backbone.transformer)}
        grid = backbone.grid(28, torch.zeros(1, 16, 8, 8))

        def shown(condition, strength, seed):  # FLUX embeds its guidance, SD 3.5 runs twice
            how = dict(guidance=strength) if "single_transformer_blocks" in dict(backbone.transformer.named_children()) else dict(null=null, cfg=strength)
            return sample(lambda z, s: backbone.velocity(z, s, condition, **how), backbone.vae, grid, len(condition[0]), seed).permute(0, 2, 3, 1).numpy()

        usual = 3.5 if folder.name == "flux" else 4.5
        for strength in (1.0, usual):
            row["checker, unguided" if strength == 1 else "checker, guided"] = float(np.mean([draw.check(i, p) for i, p in zip(shown(condition, strength, 0), prompts)]))
        images = shown(wanted, usual, 1)
        tasks = {t: np.mean([draw.check(i, m) for i, m in zip(images, geneval) if m["tag"] == t]) for t in draw.TASKS}
        row["geneval, guided"] = float(np.mean(list(tasks.values())))
    for name, row in table.items():
        if name in minutes:
            row[took] = minutes[name]
    return table


def print_quality(table):
    for name, row in table.items():
        cells = [f"{k} {v:,}" if k == "parameters" else f"{k} {v:.3f}" if v < 10 else f"{k} {v:.1f}" for k, v in row.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


# ---------------------------------------------------------------------------- main
TRAIN = {"vae": train_vae, "clip": train_clip, "judge": train_judge, "dfn-clip": train_dfn, "sd3.5-medium": train_medium, "hpsv2": train_hpsv2,
         "aesthetic": train_aesthetic, "sd3.5-large": train_large, "flux-vae": lambda work: train_vae(work, "flux-vae", 11, (1000, 1800)), "flux": train_flux}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=TRAIN, help="train these, in this order")
    p.add_argument("--work", default=str(HERE / "work"), help="folder of checkpoints (default: work/ beside this file)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--again", action="store_true", help="train models whose folder is complete, too, unless this --work has trained them")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for name in args.only or TRAIN:
        done = vae_folder(work, name) / "config.json" if name.endswith("vae") else HERE / name / ("model_index.json" if name.startswith(("sd3", "flux")) else "open_clip_model.safetensors")
        log = work / f"{name}.minutes"
        if not (log if args.again else done).exists():
            minutes = TRAIN[name](work)
            log.write_text(f"{minutes:.1f}")
            print(f"{name}: {minutes:.1f} minutes")
    table = quality(work, args.only or TRAIN)
    (HERE / "quality.json").write_text(json.dumps(known_quality() | table, indent=1))
    print_quality(table)


if __name__ == "__main__":
    main()
