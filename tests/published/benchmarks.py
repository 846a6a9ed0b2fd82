"""Writes a published benchmark as the JSON lines that stages 01 and 04 read.

    python tests/published/benchmarks.py coco FOLDER          # writes FOLDER/coco.jsonl
    python 04_eval_noisy.py --preset 24gb --benchmarks FOLDER/coco.jsonl

FOLDER holds the benchmark's own list and its images, unpacked there. One image a line, its path
relative to the file:
    coco, flickr30k     {"image", "texts"}                       zero-shot retrieval
    hpdv2, imagereward  {"image", "texts", "group", "rank"}      preferences; rank 1 is best
    ava                 {"image", "votes"}                       counts of the marks 1 to 10
An image that is not there is an error: a benchmark is scored whole.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import fail, replacing  # noqa: E402

KARPATHY = "of github.com/mehdidc/retrieval_annotations, release 1.0.0"
# file: what it is and where it comes from
LISTS = {
    "coco_test_karpathy.json": f"the Karpathy test split in COCO's captions format, {KARPATHY}",
    "flickr30k_test_karpathy.txt": "the Karpathy test split, a header and then <id>.jpg,<caption>, "
    + KARPATHY,
    "AVA.txt": "AVA's votes, a line of 15 numbers an image, of its authors' AVA_dataset folder",
    "test.jpgl": "the list of test image ids, one a line, of AVA's aesthetics_image_lists",
    "hpdv2": "HPDv2's list of ranked images, test.json of the hub's data set ymhao/HPDv2",
    "imagereward": "ImageReward's, data/test.json of github.com/THUDM/ImageReward",
}
IMAGES = {
    "coco": "COCO's val2014.zip",
    "flickr30k": "Flickr30K's images",
    "hpdv2": "test.tar.gz of the hub's ymhao/HPDv2",
    "imagereward": "test_images.zip of the hub's THUDM/ImageReward",
    "ava": "AVA's images",
}
SUBFOLDERS = ("", "val2014", "Images", "images", "test", "flickr30k-images")


def read(path, kind=None):
    """The text of a benchmark's list; kind: the key of LISTS if the file's name says too little."""
    if not path.exists():
        fail(f"{path} does not exist: {LISTS[kind or path.name]}")
    return path.read_text(encoding="utf-8-sig")


def lines_of(text):
    """Its lines but blank ones; trap: splitlines also splits at what a caption may hold."""
    return [line for line in text.split("\n") if line.strip()]


def coco(folder):
    """[(image, row)] of the captions of COCO's Karpathy test split."""
    data = json.loads(read(folder / "coco_test_karpathy.json"))
    names = {image["id"]: image["file_name"] for image in data["images"]}
    texts = {}
    for a in data["annotations"]:
        texts.setdefault(names[a["image_id"]], []).append(a["caption"])
    return [(name, dict(texts=captions)) for name, captions in texts.items()]


def flickr30k(folder):
    """[(image, row)]; a caption may hold commas, quotes and '.jpg,'."""
    texts = {}
    for line in lines_of(read(folder / "flickr30k_test_karpathy.txt"))[1:]:
        name, caption = line.split(".jpg,", 1)
        texts.setdefault(f"{name}.jpg", []).append(caption)
    return [(name, dict(texts=captions)) for name, captions in texts.items()]


def ranked(folder, kind, image_key, rank_key):
    """[(image, row)] of a list of {prompt, images, ranks}, one group for each entry."""
    rows = []
    for group, entry in enumerate(json.loads(read(folder / "test.json", kind))):
        for name, rank in zip(entry[image_key], entry[rank_key], strict=True):
            rows.append((name, dict(texts=[entry["prompt"]], group=group, rank=rank)))
    return rows


def hpdv2(folder):
    return ranked(folder, "hpdv2", "image_path", "rank")


def imagereward(folder):
    return ranked(folder, "imagereward", "generations", "ranking")


def ava(folder):
    """[(image, row)] of AVA's test images; columns of AVA.txt: index, image, the ten counts, …"""
    lines = [line.split() for line in lines_of(read(folder / "AVA.txt"))]
    votes = {line[1]: [int(v) for v in line[2:12]] for line in lines}
    ids = read(folder / "test.jpgl").split()
    return [(f"{image}.jpg", dict(votes=votes[image])) for image in ids]


BENCHMARKS = dict(coco=coco, flickr30k=flickr30k, hpdv2=hpdv2, imagereward=imagereward, ava=ava)


def place_of(folder, name, kind):
    """Where the image lies, relative to the folder: directly in it or in a usual subfolder."""
    for sub in SUBFOLDERS:
        if (folder / sub / name).exists():
            return str(Path(sub, name))
    return fail(f"{name} of {kind} is not in {folder}: get {IMAGES[kind]} and unpack it there")


def convert(kind, folder):
    """Write folder/<kind>.jsonl and return its rows."""
    try:
        found = BENCHMARKS[kind](folder)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        fail(f"the list of {kind} in {folder} is not as published ({e!r}): get it again")
    rows = [dict(image=place_of(folder, name, kind), **row) for name, row in found]
    with replacing(folder / f"{kind}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {folder / f'{kind}.jsonl'}: {len(rows)} images")
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("benchmark", choices=BENCHMARKS)
    p.add_argument("folder", type=Path, help="holds its list and its images")
    args = p.parse_args(argv)
    convert(args.benchmark, args.folder)


if __name__ == "__main__":
    main()
