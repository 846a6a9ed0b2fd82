"""Stage 01 -- cache what training needs: latents, reward inputs, the features of a probe set.

Paper   StitchVM (arXiv 2605.19804) Sec. 4.1, App. C.1: of 200 images u^{<=i}(z_t, t) for every
        diffusion block i and r^{<=j-1}(x_0) for every reward block j <= j_max,
            z_t = (1-t) z_0 + t eps,   z_0 = (E(x_0) - shift) scale,   t ~ U[0, 1],   eps ~ N(0, I)
Reads   a folder of images, of any size and mode: centre squares
Writes  out/cache/shard_<key>.pt: z_0 float16, reward inputs uint8, file names. out/cache.pt: which
        shards; null text; probe set: z_0, t, eps, DiT tokens (L, n, g*g, D), reward's (j_max, n,
        g*g, d), mean CLS. A shard's key is of its files' names, sizes and times: a run goes on
Run     python 01_cache_features.py
        python 01_cache_features.py --preset 24gb --images DIR --benchmarks hpdv2.jsonl ava.jsonl
        python 01_cache_features.py --preset paper --images DIR --backbone flux
Departs from the paper: DiT tokens are stored on the reward's patch grid, which changes nothing [D6]
        (24 blocks of width 1536 on 16 x 16 are 4 GB in bfloat16); latents are encoded once.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm, trange

from common import (
    COUNT,
    WHOLE,
    Backbone,
    Reward,
    add_noise,
    begin,
    digest,
    dit_blocks,
    fail,
    fingerprints,
    generator,
    needs,
    now,
    parse_stage,
    read_image,
    replacing,
    resample,
    run_blocks,
    save_artifact,
    stage_parser,
    stamps,
    to_tokens,
    tokens_entering,
)

READ = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DRAWN = ["tests/mini/data/hpdv2.jsonl", "tests/mini/data/ava.jsonl"]
PRESETS = {
    "mini": dict(images="tests/mini/data/train", benchmarks=DRAWN, resolution=64, batch=100),
    "24gb": dict(resolution=512, batch=8, workers=8),
    "paper": dict(resolution=1024, batch=2, workers=8),
}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    add("--images", help="folder of training images, searched recursively")
    add("--benchmarks", nargs="+", help="JSON lines; training images named there are refused")
    add("--skip-test", action="store_true", help="leave those out instead")
    add("--limit", type=COUNT, help="images at most")
    add("--probe", type=COUNT, default=200, help="held-out images for the fit (App. C.1: 200)")
    add("--j-max", type=COUNT, default=4, help="deepest reward block to stitch at (App. C.1: 4)")
    add("--antialias", action="store_true", help="when tokens are resampled [D6]")
    add("--batch", type=COUNT, help="images at a time")
    add("--shard", type=COUNT, default=2000, help="images of a shard, all of them in memory")
    add("--workers", type=WHOLE, default=0, help="processes that read images; 0: this one does")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
# from common: begin, dit_blocks, resample, run_blocks, to_tokens, tokens_entering
@torch.no_grad()
def dit_features(transformer, z, t, null, grid, antialias=False):
    """u^{<=i}(z_t, t) of i = 1..L on the grid (g, g) in one pass: (L, B, g*g, D).

    z (B, C, h, w), t (B,); null: the text condition, (text (1, T, D'), pooled (1, P)).
    """
    state = begin(transformer, z, t, *[v.expand(len(z), *v.shape[1:]) for v in null])
    tokens = []
    for i in range(1, len(dit_blocks(transformer)) + 1):
        state = run_blocks(transformer, state, i)
        h = state["h"].transpose(1, 2).unflatten(2, state["fixed"]["grid"])  # (B, D, h, w)
        tokens.append(to_tokens(resample(h, grid, antialias)))
    return torch.stack(tokens)


def tokens_by_depth(visual, x, j_max):
    """r^{<=j-1}(x_0) of j = 1..j_max: the tokens (j_max, B, 1 + N, d) entering block j, CLS first.

    visual: open_clip's tower; x (B, 3, s, s), normalised. At j = 1 patches have no positions [D3].
    """
    patches = visual.conv1(x)
    x = tokens_entering(visual, patches)
    tokens = [torch.cat([x[:, :1], to_tokens(patches)], 1)]
    for block in visual.transformer.resblocks[:-1][: j_max - 1]:
        x = block(x)
        tokens.append(x)
    return torch.stack(tokens)


# ---- to here ----


def files_below(folder):
    """{real path: path from the folder} of the files below it: each once, whatever links there."""
    walked = set()
    found = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in walked else sorted(f for f in folders if f[0] != ".")
        walked.add(real)
        for file in sorted(f for f in files if f[0] != "."):
            path = os.path.join(place, file)
            found.setdefault(os.path.realpath(path), os.path.relpath(path, folder))
    return found


def training_images(folder, benchmarks, skip):
    """Sorted paths of images below a folder; those of a benchmark are refused, or skipped."""
    if not (folder and Path(folder).is_dir()):
        fail(f"{folder} is not a folder of images; pass one with --images")
    found = files_below(folder)
    kinds = Counter(Path(name).suffix.lower() for name in found.values())
    if others := [f"{n} of {kind or 'no suffix'}" for kind, n in kinds.items() if kind not in READ]:
        print(f"left out, for only {' '.join(READ)} are read: {', '.join(others)}")
    stems = set()
    for file in benchmarks or []:
        with needs(file), open(file, encoding="utf-8-sig") as lines:
            stems |= {Path(json.loads(line)["image"]).stem for line in lines if line.strip()}
    called = {name: {Path(name).stem, Path(real).stem} for real, name in found.items()}
    names = sorted(name for name in called if Path(name).suffix.lower() in READ)
    test = [name for name in names if called[name] & stems]
    if test and not skip:
        said = f"{len(test)} of the {len(names)} training images are in {' or '.join(benchmarks)}"
        fail(f"{said} ({test[0]} for one): move them out or pass --skip-test")
    warning = "warning: without --benchmarks nothing keeps test images out of training"
    print(f"left out {len(test)} test images" if benchmarks else warning)
    return [name for name in names if not called[name] & stems]


def read_square(path, size):
    """The centre square of an image file, uint8 (3, size, size), or why it cannot be read."""
    try:
        return pil_to_tensor(read_image(path, size))
    except Exception as e:  # whatever a broken file makes the decoder raise
        return f"{type(e).__name__}: {' '.join(str(e).splitlines()[:1])}"


def read_batch(root, size, resize, names):
    """Squares (n, 3, size, size) and the reward's inputs (n, 3, s, s), both uint8, of the files
    that can be read, None if there are none; {name: why it cannot} of the others."""
    read = {name: read_square(Path(root, name), size) for name in names}
    bad = {name: x for name, x in read.items() if isinstance(x, str)}
    if len(bad) == len(names):
        return None, None, bad
    x = torch.stack([x for x in read.values() if torch.is_tensor(x)])
    return x, (resize(x / 255) * 255).round().to(torch.uint8), bad


@torch.no_grad()
def encode_files(names, root, backbone, reward, size, batch, workers):
    """A dict of z0 float16 (n, C, h, w), pixels uint8 (n, 3, s, s), the n names that can be read,
    bad: {name: why it cannot}. z0 and pixels are None if n = 0; root: the folder of the names."""
    device = backbone.device
    options = dict(num_workers=workers, multiprocessing_context="fork" if workers else None)
    options |= dict(collate_fn=partial(read_batch, root, size, reward.resize))
    loader = DataLoader(names, batch, pin_memory=device.type == "cuda", **options)
    parts = []
    bad = {}
    for x, pixels, unreadable in tqdm(loader, desc="batches", leave=False):
        bad |= unreadable
        if x is not None:
            z0 = backbone.encode(x.to(device, non_blocking=True) / 255).half()
            # trap: a tensor from a worker keeps a file open, a copy does not
            parts.append((z0.to("cpu", non_blocking=True), pixels.clone()))
    now(device)  # the last copies have arrived
    z0, pixels = map(torch.cat, zip(*parts, strict=True)) if parts else (None, None)
    return dict(z0=z0, pixels=pixels, names=[n for n in names if n not in bad], bad=bad)


@torch.no_grad()
def probe_set(args, transformer, reward, null, z0, pixels):
    """What 02 fits on: t (n,), eps as z0 (n, C, h, w), dit (L, n, N, D), reward (j_max, n, N, d),
    mean CLS [(d,)] of j > 1, mean norm of the embedding; N patches; pixels uint8 (n, 3, s, s)."""
    g = generator(args.seed, "probe")
    t = torch.rand(len(z0), generator=g)
    eps = torch.randn(z0.shape, generator=g)
    z_t = add_noise(z0.float(), eps, t).to(reward.device, transformer.dtype)
    sigma = t.to(reward.device)
    grid = reward.visual.grid_size
    size = len(dit_blocks(transformer)), len(z0), grid[0] * grid[1], transformer.inner_dim
    dit = torch.empty(size, dtype=z_t.dtype)  # torch.cat would hold this largest tensor twice
    for k in trange(0, len(z0), args.batch, desc="probe"):
        part = slice(k, k + args.batch)
        dit[:, part] = dit_features(transformer, z_t[part], sigma[part], null, grid, args.antialias)
    images = (pixels.to(reward.device) / 255).split(args.batch)
    norm = torch.cat([reward.embed(x)[0] for x in images]).norm(dim=-1).mean().item()
    depths = [tokens_by_depth(reward.visual, reward.normalise(x), args.j_max) for x in images]
    depths = torch.cat([x.cpu() for x in depths], 1)
    tokens = depths[:, :, 1:].to(dit.dtype)
    cls = [*depths[1:, :, 0].mean(1)]
    return dict(t=t, eps=eps, dit=dit, reward=tokens, cls=cls, embedding_norm=norm)


def main(args):
    if os.environ.get("RANK", "0") != "0":
        return  # one process does all of it
    names = training_images(args.images, args.benchmarks, args.skip_test)[: args.limit]
    if len(names) < 16 or args.probe < 4:
        fail(f"{len(names)} images in {args.images}, --probe {args.probe}: 16 and 4 are needed")
    dtype = getattr(torch, args.dtype)
    backbone = Backbone(args.backbone, args.preset, args.device, dtype)
    null = backbone.prompts([""])
    reward = Reward(args.reward, args.preset, args.device, dtype)
    spec = {k: getattr(args, k) for k in ("backbone", "reward", "resolution", "antialias")}
    spec |= dict(latent_space=backbone.latent_space(), reward_grid=list(reward.visual.grid_size))
    order = torch.randperm(len(names), generator=generator(args.seed, "order")).tolist()
    held_out = {names[k] for k in order[: min(args.probe, len(names) // 4)]}
    rest = [name for name in names if name not in held_out]
    below = partial(map, Path(os.path.realpath(args.images)).joinpath)
    given = args.images, backbone, reward, args.resolution, args.batch, args.workers
    key = spec, fingerprints(None, [reward])
    shards = []
    bad = {}
    for k in trange(0, len(rest), args.shard, desc="shards"):
        part = rest[k : k + args.shard]
        path = Path(args.out, f"cache/shard_{digest(*key, stamps(below(part)))}.pt")
        shard = {}
        with suppress(Exception):  # not there yet, or damaged
            found = torch.load(path, weights_only=True, mmap=True)
            shard = {k: found[k] for k in ("z0", "pixels", "names", "bad")}
        if not shard:  # else a run that was cut off goes on after it
            shard = encode_files(part, *given)
            with replacing(path) as temporary:
                torch.save(shard, temporary)
        bad |= shard["bad"]
        if shard["names"]:
            shards.append(dict(file=f"cache/{path.name}", images=len(shard["names"])))
    probe = encode_files(sorted(held_out), *given)
    bad |= probe.pop("bad")
    if bad:
        print(f"skipped {len(bad)} unreadable of {len(names)} files: {dict([*bad.items()][:5])}")
    if len(probe["names"]) < 4 or not shards:
        fail(f"too few images in {args.images} can be read")
    backbone.free()  # the VAE goes before the transformer comes
    on_device = [v.to(reward.device) for v in null]
    probe |= probe_set(args, backbone.transformer, reward, on_device, probe["z0"], probe["pixels"])
    spec |= fingerprints(backbone.transformer, [reward])
    spec["images"] = digest(shards, args.seed, stamps(below(probe["names"])))
    data = dict(shards=shards, bad=bad, null=null, probe=probe)
    save_artifact(Path(args.out, "cache.pt"), "01_cache_features", args, spec, data)
    named = {Path(args.out, shard["file"]) for shard in shards}
    for stale in {*Path(args.out, "cache").glob("shard_*.pt")} - named:
        stale.unlink()  # of another run, whose cache.pt is replaced now
    print(f"{sum(s['images'] for s in shards)} training images, {len(probe['names'])} probe images")


if __name__ == "__main__":
    main(parse_args())
