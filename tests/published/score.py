"""Scores images that are on the disk: by GenEval, PickScore, ImageReward, or any reward.

    python tests/published/score.py runs/mini/sd3.5-medium_clip/05_dps.json --scorers geneval
    python tests/published/score.py images --preset paper --scorers pickscore hpsv2 --out s.json

A FOLDER has GenEval's layout: 00000/metadata.jsonl with the key prompt, 00000/samples/*.png.
A TABLE.json is one of stages 05 to 08: each of its rows that has the key `images`, a folder
relative to the table, gets <scorer> and <scorer>_se, and the file is replaced after each scorer.
A score is a mean over prompts, each the mean over its samples. One model is in memory at a time;
one whose files cannot be had is named in a warning with the reason, and left out.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/mini")]

import common  # noqa: E402


def parse_args(argv=None):
    p = common.Parser("score.py", None, __doc__, formatter_class=common.Help)
    p.add_argument("sources", nargs="+", metavar="FOLDER|TABLE.json")
    p.add_argument("--scorers", nargs="+", required=True, help="geneval, pickscore, …, or rewards")
    p.add_argument("--preset", choices=("mini", "24gb", "paper"), default="mini")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--batch", type=common.COUNT, default=16, help="images at a time")
    p.add_argument("--out", metavar="FILE.json", help="the rows of all sources in one file")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------- scorers
# score(images uint8 (B, 3, H, W), B prompts) -> (B,)
def pickscore(device):
    """PickScore v1: exp(logit scale) times the cosine of image and prompt."""
    from transformers import AutoProcessor, CLIPModel

    with common.needs("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        processor = AutoProcessor.from_pretrained("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    with common.needs("yuvalkirstain/PickScore_v1"):
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


# what transformers' BLIP calls the parts of ImageReward's, in the order of replacement
RENAMED = {
    "blip.text_encoder.": "text.",
    "blip.visual_encoder.": "vision.",
    "mlp.layers.": "head.",
    "vision.norm.": "vision.post_layernorm.",
    ".cls_token": ".embeddings.class_embedding",
    ".pos_embed": ".embeddings.position_embedding",
    ".patch_embed.proj.": ".embeddings.patch_embedding.",
    ".blocks.": ".encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
VIT_L |= dict(num_attention_heads=16, image_size=224)
BERT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


class ImageReward(nn.Module):
    """ImageReward v1.0 of its published weights, whose own package needs transformers 4.

    Equal to the package on random weights (parity.py).
    """

    def __init__(self, weights, tokenizer, vision=VIT_L, text=BERT):
        from torchvision.transforms import v2
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.tokenizer = partial(tokenizer, padding="max_length", truncation=True, max_length=35)
        # trap: transformers' defaults are 1e-5 and 8 heads
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        width = dict(encoder_hidden_size=vision["hidden_size"], vocab_size=30524)
        self.text = BlipTextModel(BlipTextConfig(**width | text), add_pooling_layer=False)
        self.head = common.aesthetic_head(width=text["hidden_size"])  # of the same layers
        for old, new in RENAMED.items():
            weights = {k.replace(old, new): v for k, v in weights.items()}
        if missing := self.load_state_dict(weights, strict=False).missing_keys:
            raise ValueError(f"no weights {missing[0]}")
        self.eval()
        looks = [v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
        moments = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        looks += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*moments)]
        self.transform = v2.Compose([v2.ToPILImage(), *looks])

    def forward(self, images, prompts):
        device = self.head[0].weight.device
        tokens = self.tokenizer(list(prompts), return_tensors="pt").to(device)
        x = torch.stack([self.transform(image) for image in images]).to(device)
        seen = self.vision(x).last_hidden_state
        given = tokens.input_ids, tokens.attention_mask
        read = self.text(*given, encoder_hidden_states=seen).last_hidden_state[:, 0]
        return (self.head(read)[:, 0] - 0.16717362830052426) / 1.0333394966054072


def imagereward(device):
    from huggingface_hub import hf_hub_download
    from transformers import AutoTokenizer

    with common.needs("google-bert/bert-base-uncased"):
        tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    with common.needs("THUDM/ImageReward"):
        file = hf_hub_download("THUDM/ImageReward", "ImageReward.pt")
        weights = torch.load(file, map_location="cpu", weights_only=True)
        return ImageReward(weights, tokenizer).to(device)


def geneval(images, prompts):
    """The miniature's: 1 where the pixels are what the prompt says."""
    from draw import check

    pairs = zip(images.permute(0, 2, 3, 1).numpy(), prompts, strict=True)
    try:
        return torch.tensor([check(image, prompt) for image, prompt in pairs])
    except ValueError as e:
        raise common.Unavailable(f"a prompt is none of the miniature's: {e}") from e


def clean(reward, images, prompts):
    x = images.to(reward.device).float() / 255
    return common.clean_reward([reward], [reward.text(prompts)], x)


def load_scorer(name, preset, device):
    if name == "geneval" and preset not in common.WORLDS:
        own = "GenEval's own evaluation (github.com/djghosh13/geneval) reads these folders"
        raise common.Unavailable(own)
    special = dict(geneval=lambda _: geneval, pickscore=pickscore, imagereward=imagereward)
    if name in special:
        return special[name](device)
    return partial(clean, common.Reward(name, preset, device))


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
    found = {}
    try:
        scorer = load_scorer(name, args.preset, args.device)
        for folder, rows in folders.items():
            row = common.mean_and_error({name: score_folder(scorer, rows, args.batch)})
            found[folder] = common.strict(row)
    except common.Unavailable as e:
        print(f"warning: no column {name}: {str(e).removeprefix('error: ')}")
    except Exception as e:
        if common.out_of_memory(e):
            common.fail(f"{name} does not fit into the memory of {args.device}: try --batch 1")
        raise
    return found


def main(args):
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = {Path(source): load_rows(Path(source)) for source in args.sources}
    rows = [pair for pairs, _ in sources.values() for pair in pairs]
    folders = {folder: read_folder(folder) for folder, _ in rows}
    files = {path: table for path, (_, table) in sources.items() if table}
    if args.out:
        files[Path(args.out)] = dict(rows=[row for _, row in rows], config=vars(args))
    for name in args.scorers:
        found = score_all(name, folders, args)
        for folder, row in rows:
            row |= found.get(folder, {})
        for path, table in files.items():  # now: the next one may stop the run
            common.write_json(path, table)
    columns = [k for name in args.scorers for k in (name, f"{name}_se")]
    common.print_table([row for _, row in rows], ["images", *columns])
    for path in files:
        print(f"wrote {path}")


if __name__ == "__main__":
    main(parse_args())
