"""Scores images that are on the disk: by GenEval, PickScore, ImageReward, or any reward.

    python tests/published/score.py runs/mini/sd3.5-medium_clip/05_dps.json --scorers geneval
    python tests/published/score.py images --preset paper --scorers pickscore hpsv2 --out s.json

A FOLDER has GenEval's layout: 00000/metadata.jsonl with the key prompt, 00000/samples/*.png.
A TABLE.json is one of stages 05 to 08: each of its rows that has the key `images`, a folder
relative to the table, gets <scorer> and <scorer>_se, and the file is replaced. A score is a mean
over prompts, each the mean over its samples. One model is in memory at a time; one that cannot be
had is named in a warning and left out.
"""

import argparse
import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/mini")]

import common  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser("score.py", None, __doc__, formatter_class=common.Help)
    p.add_argument("sources", nargs="+", metavar="FOLDER|TABLE.json")
    p.add_argument("--scorers", nargs="+", required=True, help="geneval, pickscore, …, or rewards")
    p.add_argument("--preset", choices=("mini", "24gb", "paper"), default="mini")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--batch", type=int, default=16, help="images at a time")
    p.add_argument("--out", metavar="FILE.json", help="the rows of all sources in one file")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------- scorers
# score(images uint8 (B, 3, H, W), B prompts) -> (B,)
def pickscore(device):
    """PickScore v1: exp(logit scale) times the cosine of image and prompt."""
    from transformers import AutoProcessor, CLIPModel

    processor = AutoProcessor.from_pretrained("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    model = CLIPModel.from_pretrained("yuvalkirstain/PickScore_v1").to(device).eval()
    short = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")

    def score(images, prompts):
        pixels = processor(images=list(images), return_tensors="pt").to(device)
        tokens = processor(text=list(prompts), **short).to(device)
        both = model.get_image_features(**pixels), model.get_text_features(**tokens)
        # trap: transformers 5 wraps the embedding
        both = [getattr(output, "pooler_output", output) for output in both]
        return model.logit_scale.exp() * F.cosine_similarity(*both)

    return score


def imagereward(device):
    """ImageReward v1.0, by its own package."""
    import ImageReward
    from torchvision.transforms.functional import to_pil_image

    model = ImageReward.load("ImageReward-v1.0", device=device)
    return lambda images, prompts: torch.tensor(
        [model.score(p, [to_pil_image(x)]) for p, x in zip(prompts, images, strict=True)]
    )


def geneval(images, prompts):
    """The miniature's: 1 where the pixels are what the prompt says."""
    from draw import check

    pairs = zip(images.permute(0, 2, 3, 1).numpy(), prompts, strict=True)
    return torch.tensor([check(image, prompt) for image, prompt in pairs])


def clean(reward, images, prompts):
    x = images.to(reward.device).float() / 255
    return common.clean_reward([reward], [reward.text(prompts)], x)


def load_scorer(name, preset, device):
    if name == "geneval" and preset not in common.WORLDS:
        common.fail("GenEval's own evaluation (github.com/djghosh13/geneval) reads these folders")
    special = dict(geneval=lambda _: geneval, pickscore=pickscore, imagereward=imagereward)
    if name in special:
        return special[name](device)
    return partial(clean, common.Reward(name, preset, device))


def out_of_memory(error):
    """Whether this error, or one behind it, is that there is too little memory."""
    said = "".join(traceback.format_exception(error))
    return any(s in said for s in ("MemoryError", "DefaultCPUAllocator", "out of memory"))


# ---------------------------------------------------------------------------- images
def read_folder(folder):
    """[(prompt, image files)] of a folder in GenEval's layout."""
    rows = []
    for file in sorted(Path(folder).glob("*/metadata.jsonl")):
        prompt = common.load_prompts(file)[0]["prompt"]
        rows.append((prompt, sorted(file.parent.glob("samples/*.png"))))
        if not rows[-1][1]:
            common.fail(f"{file.parent} has no images samples/0000.png, …")
    if not rows:
        common.fail(f"{folder} has no images in GenEval's layout: 00000/samples/0000.png, …")
    return rows


@torch.no_grad()
def score_folder(scorer, rows, batch):
    """Scores (prompts,) of read_folder's rows, each the mean over the prompt's samples."""
    from torchvision.io import ImageReadMode, decode_image

    prompts = [prompt for prompt, files in rows for _ in files]
    files = [str(file) for _, files in rows for file in files]
    scores = []
    for k in range(0, len(files), batch):
        try:
            images = torch.stack([decode_image(f, ImageReadMode.RGB) for f in files[k : k + batch]])
        except RuntimeError as e:
            common.fail(f"{files[k]} and the next {batch} are no PNG files of one size ({e})")
        scores.append(scorer(images, prompts[k : k + batch]).float().cpu())
    parts = torch.cat(scores).split([len(files) for _, files in rows])
    return torch.stack([part.mean() for part in parts])


# ---------------------------------------------------------------------------- the run
def load_rows(source):
    """[(folder of images, row)] of a folder or a table, and the table, if it is one."""
    if source.suffix != ".json":
        return [(source, dict(images=str(source)))], None
    try:
        table = json.loads(source.read_text())
        rows = [(source.parent / row["images"], row) for row in table["rows"] if row.get("images")]
    except (OSError, ValueError, KeyError, TypeError) as e:
        common.fail(f"{source} is no table of a stage ({type(e).__name__}: {e})")
    if not rows:
        common.fail(f"{source} has no row with images: run its stage with --save-images")
    return rows, table


def score_all(name, folders, args):
    """{folder: {name: mean, name_se: its standard error}}; empty, with a warning, without it."""
    scorer, found = None, {}
    try:
        scorer = load_scorer(name, args.preset, args.device)
        for folder, rows in folders.items():
            row = common.mean_and_error({name: score_folder(scorer, rows, args.batch)})
            found[folder] = {k: v if v == v else None for k, v in row.items()}
    except (Exception, SystemExit) as e:
        if out_of_memory(e):
            common.fail(f"{name} does not fit into the memory of {args.device}: try --batch 1")
        if scorer:  # it is there: the images are at fault
            raise
        reason = str(e).removeprefix("error: ") or type(e).__name__
        print(f"warning: no column {name}: {reason.splitlines()[0]}")
    return found


def main(args):
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = {Path(source): load_rows(Path(source)) for source in args.sources}
    rows = [pair for pairs, _ in sources.values() for pair in pairs]
    folders = {folder: read_folder(folder) for folder, _ in rows}
    for name in args.scorers:
        found = score_all(name, folders, args)
        for folder, row in rows:
            row |= found.get(folder, {})
    columns = [k for name in args.scorers for k in (name, f"{name}_se")]
    common.print_table([row for _, row in rows], ["images", *columns])
    files = {path: table for path, (_, table) in sources.items() if table}
    if args.out:
        files[Path(args.out)] = dict(rows=[row for _, row in rows], config=vars(args))
    for path, table in files.items():
        with common.replacing(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1))
        print(f"wrote {path}")


if __name__ == "__main__":
    main(parse_args())
