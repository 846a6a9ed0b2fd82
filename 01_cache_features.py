"""Stage 01 -- cache what training needs: latents, reward inputs, and the features of a probe set.

Paper   StitchVM (arXiv 2605.19804) Sec. 4.1, App. C.1: 200 probe images, t ~ U[0, 1], eps ~ N(0, I);
        u^{<=i}(z_t, t) for every diffusion block i, r^{<=j-1}(x_0) for every reward block j <= j_max.
            z_0 = (E(x_0) - shift) scale,   z_t = (1-t) z_0 + t eps
Reads   a folder of images (any size and mode; shortest side resized, centre crop)
Writes  out/cache/shard_*.pt  latents float16 (n, C, h, w), the reward's input pixels uint8 (n, 3, s, s), file names
        out/cache.pt          the probe set: latents, t, eps, DiT tokens (L, n, g*g, D), reward tokens (j_max, n, g*g, d), mean CLS; null text
Run     python 01_cache_features.py                                              # the miniature: a minute on two cores
        python 01_cache_features.py --preset 24gb --images DIR                   # SD 3.5 Medium at 512
        python 01_cache_features.py --preset paper --images DIR --backbone flux
Departs from the paper: DiT tokens are resampled to the reward's patch grid before they are stored, which changes nothing (a 1x1 conv
        and bilinear resampling commute); 200 images of 24 blocks of width 1536 are 4 GB in bfloat16 on a 16 x 16 grid, 8.5 on CLIP's 24 x 24. Latents are cached instead of encoded in every epoch.
"""
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from common import (Backbone, Reward, add_noise, begin, count, dit_blocks, encode_prompts, fail, generator, gib, list_images, meta_backbone, parse_stage,
                    read_image, replacing, report_dry_run, resample, run_blocks, save_artifact, square, stage_parser, to_tokens, tokens_by_depth)

PRESETS = {"mini": dict(images="tests/mini/data/train", ava="tests/mini/data/ava", hpdv2="tests/mini/data/hpdv2", resolution=64, batch=100),
           "24gb": dict(resolution=512, batch=8),
           "paper": dict(resolution=1024, batch=2)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--images", help="folder of training images, searched recursively")
    p.add_argument("--ava", help="AVA's folder: training images in its test.jpgl are refused")
    p.add_argument("--hpdv2", help="HPDv2's folder: training images in its test.json are refused")
    p.add_argument("--skip-test", action="store_true", help="leave test images out instead of refusing")
    p.add_argument("--limit", type=int, help="use this many images at most")
    p.add_argument("--probe", type=int, default=200, help="held-out images for the fit (App. C.1: 200)")
    p.add_argument("--j-max", type=int, default=4, help="deepest reward block that is a candidate (App. C.1: 4)")
    p.add_argument("--antialias", action="store_true", help="antialias when features are resampled to the reward's grid [D6]")
    p.add_argument("--batch", type=int, help="images at a time")
    p.add_argument("--shard", type=int, default=2000, help="images in one shard, which is also what is held in memory")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
@torch.no_grad()
def dit_features(transformer, z, t, null, grid, antialias=False):
    """u^{<=i}(z_t, t) for i = 1..L in one pass: (L, B, g*g, D). z (B, C, h, w), t (B,), null the fixed text condition (text, pooled)."""
    state, out = begin(transformer, z, t, *[v.expand(len(z), *v.shape[1:]) for v in null]), []
    for i in range(1, len(dit_blocks(transformer)) + 1):
        state = run_blocks(transformer, state, i)
        h = state["h"].transpose(1, 2).unflatten(2, state["fixed"]["grid"])  # (B, D, h, w)
        out.append(to_tokens(resample(h, grid, antialias)))
    return torch.stack(out)
# ---- to here ----


def read_square(path, size):
    """uint8 (3, size, size), or the reason why the file cannot be read."""
    try:
        return square(read_image(path), size)
    except Exception as e:  # whatever a broken file makes the decoder raise
        return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def drop_test_images(names, ava, hpdv2, skip):
    """The names without those that a benchmark tests on (AVA by image id, HPDv2 by file name); refuses them unless `skip`."""
    lists = {}
    if not ava and not hpdv2:
        print("warning: without --ava and --hpdv2 nothing keeps their test images out of training")
    for folder, file, ids in ((ava, "test.jpgl", lambda text: set(text.split())), (hpdv2, "test.json", lambda text: {Path(p).stem for row in json.loads(text) for p in row["image_path"]})):
        if folder:
            if not (Path(folder) / file).exists():
                fail(f"{Path(folder) / file} does not exist: it lists the test images, which must not train")
            lists[str(Path(folder) / file)] = ids((Path(folder) / file).read_text())
    test = {n for n in names if any(Path(n).stem in ids for ids in lists.values())}
    if test and not skip:
        fail(f"{len(test)} of the {len(names)} training images are test images of {' or '.join(lists)} ({sorted(test)[0]} for one): move them out or pass --skip-test")
    if test:
        print(f"left out {len(test)} test images")
    return [n for n in names if n not in test]


@torch.no_grad()
def encode_files(root, names, backbone, reward, size, batch, bar):
    """Latents, reward pixels and names of the files that can be read, and {name: reason} of those that cannot."""
    latents, pixels, good, bad = [], [], [], {}
    with ThreadPoolExecutor(4) as pool:
        for k in range(0, len(names), batch):
            part = names[k:k + batch]
            read = list(pool.map(lambda name: read_square(Path(root) / name, size), part))
            bad |= {n: r for n, r in zip(part, read) if isinstance(r, str)}
            good += [n for n, r in zip(part, read) if not isinstance(r, str)]
            images = [r for r in read if not isinstance(r, str)]
            if images:
                x = torch.stack(images).float() / 255
                latents.append(backbone.encode_image(x).cpu().half())
                pixels.append((reward.resize(x) * 255).round().to(torch.uint8))
            bar.update(len(part))
    if not good:
        return None, None, good, bad
    return torch.cat(latents), torch.cat(pixels), good, bad


def dry_run(args):
    reward = Reward(args.reward, args.preset, "meta", weights=False)
    backbone, null = meta_backbone(args.backbone)
    x = torch.empty(args.batch, 3, args.resolution, args.resolution, device="meta")
    z = torch.empty(args.batch, 16, args.resolution // 8, args.resolution // 8, device="meta", dtype=backbone.dtype)

    def probe():
        dit_features(backbone.transformer, z, z[:, 0, 0, 0].float(), null, reward.visual.grid_size)
        tokens_by_depth(reward.visual, reward.normalise(reward.resize(x)), args.j_max)

    cases = []
    for method, step, models, n in (("latents", lambda: (backbone.encode_image(x), reward.resize(x)), [backbone.vae], args.limit or 100_000),
                                    ("probe set", probe, [backbone.transformer, reward.model], args.probe)):
        with torch.no_grad():
            tflop, saved = count(step, models)
        cases.append(dict(method=method, unit="image", tflop=tflop / args.batch, saved_gib=saved, peak_gib=gib(*models), n=n))
    report_dry_run(args, "01_cache_features", cases, [backbone.transformer, backbone.vae, reward.model])


def main(args):
    if args.dry_run:
        return dry_run(args)
    if not args.images:
        fail("--images DIR is needed: a folder of training images, such as AVA's and HPDv2's without their test images")
    names = drop_test_images(list_images(args.images), args.ava, args.hpdv2, args.skip_test)[:args.limit]
    if len(names) < 16 or args.probe < 4:
        fail(f"{args.images} holds {len(names)} images and --probe is {args.probe}; at least 16 and 4 are needed")
    backbone = Backbone(args.backbone, args.preset, args.device, getattr(torch, args.dtype))
    reward = Reward(args.reward, args.preset, args.device)
    args.j_max = min(args.j_max, len(reward.visual.transformer.resblocks))
    null = encode_prompts(backbone, [""])
    order = torch.randperm(len(names), generator=generator(args.seed, "order")).tolist()
    probe_names = sorted(names[k] for k in order[:min(args.probe, len(names) // 4)])
    names = [n for n in names if n not in set(probe_names)]
    spec = dict(backbone=backbone.name, latent_space=backbone.latent_space(), reward=reward.name, resolution=args.resolution,
                reward_grid=list(reward.visual.grid_size), antialias=args.antialias)

    shards, bad, folder = [], {}, Path(args.out) / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(names) + len(probe_names), desc="images", unit="img")
    for k in range(0, len(names), args.shard):
        part, path = names[k:k + args.shard], folder / f"shard_{k // args.shard:05d}.pt"
        key = hashlib.sha1(repr((spec, str(args.images), part)).encode()).hexdigest()
        shard = torch.load(path, weights_only=True, mmap=True) if path.exists() else {}
        if shard.get("key") == key:  # a run that was cut off goes on after its last whole shard
            bar.update(len(part))
        else:
            z0, pixels, good, unreadable = encode_files(args.images, part, backbone, reward, args.resolution, args.batch, bar)
            shard = dict(key=key, z0=z0, pixels=pixels, names=good, bad=unreadable)
            with replacing(path) as temporary:
                torch.save(shard, temporary)
        bad |= shard["bad"]
        if shard["names"]:
            shards.append(dict(file=f"cache/{path.name}", images=len(shard["names"])))
    for path in sorted(folder.glob("shard_*.pt"))[-(-len(names) // args.shard):]:
        path.unlink()  # left by a run over more images

    z0, pixels, probe_names, unreadable = encode_files(args.images, probe_names, backbone, reward, args.resolution, args.batch, bar)
    bar.close()
    bad |= unreadable
    if bad:
        print(f"skipped {len(bad)} unreadable of {len(names) + len(probe_names) + len(unreadable)} files: " + "; ".join(f"{n} ({r})" for n, r in list(bad.items())[:5]))
    if z0 is None or not shards:
        fail(f"no image in {args.images} can be read")
    g = generator(args.seed, "probe")
    t, eps = torch.rand(len(z0), generator=g), torch.randn(z0.shape, generator=g)
    zt = add_noise(z0.float(), eps, t)
    keep = torch.float32 if args.dtype == "float32" else torch.bfloat16
    parts = list(zip(zt.split(args.batch), t.split(args.batch)))
    features = lambda z, s: dit_features(backbone.transformer, z.to(backbone.device, backbone.dtype), s.to(backbone.device), null, reward.visual.grid_size, args.antialias)
    dit, done = None, 0
    for z, s in tqdm(parts, desc="probe"):  # into one tensor: joined at the end, this largest one of all would be there twice
        f = features(z, s)
        dit = torch.empty(len(f), len(z0), *f.shape[2:], dtype=keep) if dit is None else dit
        dit[:, done:done + len(z)], done = f, done + len(z)
    depth = [tokens_by_depth(reward.visual, reward.normalise(p.to(reward.device).float() / 255), args.j_max) for p in pixels.split(args.batch)]
    tokens = torch.stack([torch.cat([d[j][0] for d in depth]) for j in range(args.j_max)]).to("cpu", keep)
    cls = [torch.cat([d[j][1] for d in depth]).mean(0).cpu() for j in range(1, args.j_max)]
    norm = torch.cat([reward.embed(p.to(reward.device).float() / 255)[0] for p in pixels.split(args.batch)]).norm(dim=-1).mean().item()
    save_artifact(Path(args.out) / "cache.pt", "01_cache_features", args, spec,
                  dict(shards=shards, bad=bad, null=[v.cpu() for v in null],
                       probe=dict(names=probe_names, z0=z0, pixels=pixels, t=t, eps=eps, dit=dit, reward=tokens, cls=cls, embedding_norm=norm)))
    print(f"{sum(s['images'] for s in shards)} training images in {len(shards)} shards, {len(probe_names)} probe images, "
          f"{dit.shape[0]} diffusion blocks, {len(tokens)} reward depths, latents {tuple(z0.shape[1:])}")


if __name__ == "__main__":
    main(parse_args())
