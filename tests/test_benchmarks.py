"""Published benchmarks in their own layouts become JSON lines: rows, order, what is missing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import benchmarks
import pytest


def put(folder, *names):
    """Empty files in place of images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def convert(kind, folder):
    """The rows that were written, which are the ones that are returned."""
    rows = benchmarks.convert(kind, folder)
    lines = (folder / f"{kind}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert not list(folder.glob("*.tmp"))
    return rows


def refusal(kind, folder):
    """The one sentence with which the conversion stops; nothing is written."""
    with pytest.raises(SystemExit) as e:
        benchmarks.convert(kind, folder)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code and not (folder / f"{kind}.jsonl").exists()
    return e.value.code


def test_coco(tmp_path):
    """Captions belong to images by id, whatever the order of the annotations."""
    images = [dict(id=9, file_name="b.jpg"), dict(id=2, file_name="a.jpg")]
    said = [(2, "one"), (9, "two"), (2, "three, four")]
    annotations = [dict(id=k, image_id=n, caption=text) for k, (n, text) in enumerate(said)]
    data = dict(images=images, annotations=annotations)
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(data))
    put(tmp_path, "val2014/a.jpg", "val2014/b.jpg")
    first = dict(image="val2014/a.jpg", texts=["one", "three, four"])
    assert convert("coco", tmp_path) == [first, dict(image="val2014/b.jpg", texts=["two"])]


def test_flickr30k(tmp_path):
    """A line is split at the first '.jpg,': captions hold commas, quotes, and that as well."""
    lines = [
        "image,caption",
        "1.jpg,a man, a dog",
        '1.jpg,"he said" 7.jpg, and went',
        "2.jpg,x\u2028y",
    ]
    text = "\ufeff" + "\r\n".join([lines[0], "", *lines[1:]]) + "\r\n\r\n"
    (tmp_path / "flickr30k_test_karpathy.txt").write_text(text, encoding="utf-8")
    put(tmp_path, "flickr30k-images/1.jpg", "Images/2.jpg")
    assert convert("flickr30k", tmp_path) == [
        dict(image="flickr30k-images/1.jpg", texts=["a man, a dog", '"he said" 7.jpg, and went']),
        dict(image="Images/2.jpg", texts=["x\u2028y"]),
    ]


HPDV2 = [
    dict(prompt="a", image_path=["1.jpg", "2.jpg"], rank=[2, 1], raw_annotations=[]),
    dict(prompt="a", image_path=["3.jpg", "4.jpg"], rank=[1, 2], raw_annotations=[]),
]


def test_hpdv2(tmp_path):
    """A list is one group, also where two lists have the same prompt."""
    (tmp_path / "test.json").write_text(json.dumps(HPDV2))
    put(tmp_path, *(f"test/{k}.jpg" for k in range(1, 5)))
    rows = convert("hpdv2", tmp_path)
    assert rows[0] == dict(image="test/1.jpg", texts=["a"], group=0, rank=2)
    assert [(r["image"], r["group"], r["rank"]) for r in rows[1:]] == [
        ("test/2.jpg", 0, 1),
        ("test/3.jpg", 1, 1),
        ("test/4.jpg", 1, 2),
    ]


def test_imagereward(tmp_path):
    """Paths from the folder of test.json; ties stay."""
    names = [f"test_images/{k}.webp" for k in "xyz"]
    rows = [dict(id="000001-0012", prompt="p", generations=names, ranking=[1, 2, 1])]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    put(tmp_path, *names)
    assert convert("imagereward", tmp_path) == [
        dict(image=name, texts=["p"], group=0, rank=rank)
        for name, rank in zip(names, [1, 2, 1], strict=True)
    ]


IDS = {953958: 3, 954184: 1, 954113: 2}  # image id: the mark of all its votes


def write_ava(folder, ids):
    """AVA's files with three test images and one that is not, of which only `ids` are there."""
    put(folder, *(f"images/{n}.jpg" for n in ids))
    lines = []
    for k, (n, mark) in enumerate(sorted((IDS | {7: 10}).items())):
        counts = [5 * (score == mark) for score in range(1, 11)]
        lines.append(" ".join(map(str, [k, n, *counts, 0, 22, 1])))
    (folder / "AVA.txt").write_text("\n".join(lines) + "\n")
    (folder / "test.jpgl").write_text("\n".join(map(str, IDS)) + "\n")


def test_ava_votes_belong_to_their_files(tmp_path):
    """In the order of the test list; the columns before and after the ten counts are no votes."""
    write_ava(tmp_path, IDS)
    rows = convert("ava", tmp_path)
    assert [int(Path(r["image"]).stem) for r in rows] == list(IDS)
    assert [r["votes"].index(5) + 1 for r in rows] == list(IDS.values())
    assert all(len(r["votes"]) == 10 and sum(r["votes"]) == 5 for r in rows)


def test_ava_with_a_missing_image_is_refused(tmp_path):
    """Left out in silence, it would change the benchmark."""
    write_ava(tmp_path, (953958, 954113))
    said = refusal("ava", tmp_path)
    assert "954184" in said and "AVA's images" in said


@pytest.mark.parametrize("kind", benchmarks.BENCHMARKS)
def test_a_missing_list_is_named_with_its_source(tmp_path, kind):
    said = refusal(kind, tmp_path)
    source = r"retrieval_annotations|ymhao/HPDv2|THUDM/ImageReward|AVA_dataset"
    assert "does not exist" in said and re.search(source, said)


def test_a_missing_image_is_named_with_its_source(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps(HPDV2))
    put(tmp_path, "test/1.jpg", "test/2.jpg", "test/4.jpg")
    said = refusal("hpdv2", tmp_path)
    assert "3.jpg" in said and "test.tar.gz of the hub's ymhao/HPDv2" in said


def test_a_broken_list_is_named(tmp_path):
    for text in ("{", "[{}]", '[{"prompt": "a", "image_path": ["1.jpg"], "rank": [1, 2]}]', "7"):
        (tmp_path / "test.json").write_text(text)
        assert "not as published" in refusal("hpdv2", tmp_path)


def test_the_command(tmp_path):
    """From the shell: what it wrote, and exit code 1 with one line for what is missing."""
    write_ava(tmp_path, IDS)
    command = [sys.executable, benchmarks.__file__]
    done = subprocess.run([*command, "ava", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "3 images" in done.stdout and "ava.jsonl" in done.stdout
    done = subprocess.run([*command, "coco", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
