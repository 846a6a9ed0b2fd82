"""NoisyCLIP, a baseline of 04: an image tower on noisy latents, contrastive with captions.

The VAE stitch of 02 and the reward's tail train on the symmetric contrastive loss of CLIP against
the frozen text tower; the latent z_t = (1-t) z_0 + t eps is all that the tower sees. An image's
caption is drawn anew at each step.

Reads   out/cache.pt (01), out/stitch.pt (02), captions of the training images
Writes  out/value_noisyclip.pt, in the format of 03, out/noisyclip.json, out/noisyclip.png; while it
        runs value_noisyclip.train, where --resume goes on to the same bits
Run     python tests/studies/noisyclip.py --out runs/mini/sd3.5-medium_clip
All flags of 03 apply but --front, --embedding, --lam-tok, --micro-batch and --workers: a batch is
contrasted as a whole, in one process.
"""

import argparse
import importlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, TensorDataset
from tqdm import trange

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import (  # noqa: E402
    add_noise,
    draw_lines,
    fail,
    generator,
    keep_or_drop,
    load_artifact,
    now,
    print_table,
    save_artifact,
    save_table,
    save_training,
)

finetune = importlib.import_module("03_finetune")
CAPTIONS = {"mini": ROOT / "tests/mini/data/train_captions.json"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--captions", help="COCO-style file; None: the miniature's own")
    given, rest = p.parse_known_args(argv)
    args = finetune.parse_args([*rest, "--embedding", "unit"])
    args.front = "vae"  # but with the epochs of the others
    args.captions = str(given.captions or CAPTIONS.get(args.preset))
    args.value = args.value or str(Path(args.out, "value_noisyclip.pt"))
    return args


def noisyclip_loss(e, text, scale):
    """Symmetric contrastive loss of unit embeddings e of noisy latents and of texts, both (B, E).

    An equal text of another image is no negative.
    """
    diagonal = torch.eye(len(text), dtype=torch.bool, device=text.device)
    same = ((text @ text.T) > 1 - 1e-5) & ~diagonal
    logits = (scale * e @ text.T).masked_fill(same, -math.inf)
    label = torch.arange(len(text), device=text.device)
    return 0.5 * (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label))


def load_captions(path, names):
    """One list of captions for each image name, from a COCO-style file."""
    if not Path(path).exists():
        fail(f"NoisyCLIP trains on captions: {path} does not exist; pass a file with --captions")
    captions = {}
    try:
        coco = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        name_of = {image["id"]: image["file_name"] for image in coco["images"]}
        for a in coco["annotations"]:
            captions.setdefault(name_of[a["image_id"]], []).append(a["caption"].strip())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        fail(f"{path} is no file of captions as COCO's ({type(e).__name__}: {e})")
    if missing := [name for name in names if name not in captions]:
        count = f"{len(missing)} of the {len(names)} training images"
        fail(f"{path} has no caption for {count}, {missing[0]} for one")
    return [captions[name] for name in names]


def load_shards(out, shards, spec=()):
    """Dataset of (z_0,) of all training images, memory-mapped, and their names."""
    parts = finetune.read_shards(out, shards, spec)
    names = [name for part in parts for name in part["names"]]
    return ConcatDataset([TensorDataset(part["z0"]) for part in parts]), names


def train(args, model, optimizer, latents, texts, captions, scale, run, checkpoint):
    """The logged rows; model is left with its last weights, or with their average.

    texts (T, E), unit; captions: for each image its rows of texts.
    """
    weights = model.trained_state()
    average = {k: v.clone() for k, v in weights.items()} if args.ema else {}
    rows = []
    if args.resume:
        saved = load_artifact(checkpoint, run, "tests/studies/noisyclip.py")["data"]
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        average = {k: v.to(texts.device) for k, v in saved["average"].items()}
        rows = saved["rows"]
    last = rows[-1] if rows else dict(step=0, seconds=0.0)
    begin = now(texts.device) - last["seconds"]
    total = 0
    for step in trange(last["step"], run["steps"]):
        draw = generator(args.seed, "noisyclip", step)
        index = torch.randint(len(latents), (args.batch,), generator=draw)
        t = finetune.sample_sigma(args.batch, args.sigma_law, draw)
        z0 = torch.stack([latents[k][0] for k in index.tolist()]).float()
        z_t = add_noise(z0, torch.randn(z0.shape, generator=draw), t).to(texts.device)
        chosen = torch.randint(1 << 30, (args.batch,), generator=draw)
        pairs = zip([captions[k] for k in index.tolist()], chosen.tolist(), strict=True)
        text = texts[[several[c % len(several)] for several, c in pairs]]
        loss = noisyclip_loss(model.embed(z_t, t.to(texts.device)).float(), text, scale)
        loss.backward()
        rate = finetune.learning_rate(step, run["steps"], args.warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad()
        if args.ema:
            follow = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            follow([*average.values()], [*weights.values()], None)
        total = total + loss.detach()
        saves = (step + 1) % args.save_every == 0 or step + 1 == run["steps"]
        if (step + 1) % args.log_every and not saves:
            continue
        mean = float(total) / (step + 1 - last["step"])
        if not math.isfinite(mean):
            good = checkpoint if checkpoint.exists() else "the stitch"
            fail(f"NaN or infinite by step {step + 1}: lower --lr; the last good state is {good}")
        total = 0
        if not all(w.abs().max() < 100 for w in weights.values()):  # nor is NaN
            fail(f"the weights exploded by step {step + 1}: lower --lr")
        last = dict(step=step + 1, seconds=round(now(texts.device) - begin, 2), loss=mean)
        rows.append(last)
        if saves:
            saved = dict(weights=weights, average=average, optimizer=optimizer.state_dict())
            save_training(checkpoint, "noisyclip", run, saved | dict(rows=rows))
    model.load_state_dict(average, strict=False)
    return rows


def main(args):
    if args.micro_batch:
        fail("NoisyCLIP contrasts the whole batch: pass --micro-batch 0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("NoisyCLIP contrasts the whole batch, which several processes lack: run it as one")
    path = Path(args.value)
    keep_or_drop(path.with_suffix(".train"), args, path)
    cache, stitch, reward, model, optimizer = finetune.load(args)
    if reward.head is not None:
        fail(f"{args.reward} has no text tower to train NoisyCLIP against")
    latents, names = load_shards(args.out, cache["data"]["shards"], cache["spec"])
    captions = load_captions(args.captions, names)
    texts = sorted({caption for several in captions for caption in several})
    row = {caption: k for k, caption in enumerate(texts)}
    captions = [[row[caption] for caption in several] for several in captions]
    steps = args.steps or math.ceil(args.epochs * len(latents) / args.batch)
    run = vars(args) | dict.fromkeys(finetune.FREE) | dict(stitch=stitch["id"], steps=steps)
    scale = reward.text_model.logit_scale.exp().item()
    given = latents, reward.text(texts), captions, scale
    rows = train(args, model, optimizer, *given, run, path.with_suffix(".train"))
    spec = cache["spec"] | {k: getattr(model, k) for k in ("i", "j", "front", "embedding")}
    state = {k: v.cpu() for k, v in model.trained_state().items()}
    data = dict(state=state, norm=model.norm, null=cache["data"]["null"])
    spec["objective"] = "noisyclip"
    save_artifact(path, "noisyclip", args, spec, data, [cache, stitch])
    save_table(args, "noisyclip", rows)
    draw_lines(rows, "step", ["loss"], None, Path(args.out, "noisyclip.png"))
    path.with_suffix(".train").unlink()
    print_table(rows[-1:], rows[-1])


if __name__ == "__main__":
    main(parse_args())
