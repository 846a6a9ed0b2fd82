"""The miniature's world: checker, parser and splits are exact, faults are found; its files."""

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import draw
import numpy as np
import pytest
from PIL import Image

WORDINGS = range(5)
FAULTS = {"color", "shape", "size", "count", "relation", "background"}


@pytest.fixture(scope="module")
def scenes():
    """(scene, layout, image), 75 of each family."""
    rng, drawn = np.random.default_rng(0), []
    for family in draw.FAMILIES * 75:
        scene = draw.sample_scene(rng, family)
        placed = draw.place(rng, scene)
        drawn.append((scene, placed, draw.draw(rng, scene, placed)))
    return drawn


def scene_of(meta):
    """The scene that full metadata describe: by GenEval's convention, read once more.

    Entry 1 is `position` of entry 0.
    """
    objects = [
        dict(shape=e["class"], color=e.get("color"), size=e.get("size"))
        for e in meta["include"]
        for _ in range(e["count"])
    ]
    where = [e["position"] for e in meta["include"] if "position" in e]
    relation = None
    if where:
        ((said, other),) = where
        assert other == 0 and "position" in meta["include"][1]
        if said in ("left of", "above"):  # entry 1 is left of entry 0: it comes first
            objects = objects[::-1]
        relation = "left of" if said in ("left of", "right of") else "above"
    return dict(objects=objects, relation=relation, background=meta["background"])


# ---------------------------------------------------------------------------- captions, checking
def test_checker_accepts_every_scene_in_every_wording(scenes):
    """All: this GenEval makes no errors. Training captions, which omit things, are true too."""
    rng = np.random.default_rng(1)
    for scene, _, image in scenes:
        for text in [*(draw.caption(scene, f) for f in WORDINGS), draw.random_caption(rng, scene)]:
            assert draw.check(image, text), text


def test_checker_finds_every_fault(scenes):
    """No spoilt scene passes, in any of the ways to spoil one."""
    rng, missed, seen = np.random.default_rng(2), [], Counter()
    for k, (scene, _, _) in enumerate(scenes * 2):
        spoilt, fault = draw.spoil_scene(rng, scene)
        seen[fault] += 1
        if draw.check(draw.draw(rng, spoilt), draw.caption(scene, k % 5)):
            missed.append((fault, scene))
    assert not missed
    assert set(seen) == FAULTS and min(seen.values()) >= 20


def test_each_fault_breaks_its_own_fact(scenes):
    """A wrong background or relation is told as such and leaves every other fact true."""
    rng, checked = np.random.default_rng(3), Counter()
    for scene, _, _ in scenes:
        spoilt, fault = draw.spoil_scene(rng, scene)
        facts = draw.facts(draw.draw(rng, spoilt), draw.parse(draw.caption(scene)))
        false = {k for k, v in facts.items() if not v}
        if fault in ("background", "relation"):
            assert false == {"background" if fault == "background" else "position"}
        else:
            assert ("total" in false) is (fault == "count") and "background" not in false
            assert any(k[0].isdigit() for k in false)
        checked[fault] += 1
    assert set(checked) == FAULTS


def test_wordings_differ(scenes):
    for scene, _, _ in scenes:
        assert len({draw.caption(scene, f) for f in WORDINGS}) == 5


def test_parse_round_trips(scenes):
    """Every wording gives the scene back, however it names the objects' order; nothing is added."""
    for scene, _, _ in scenes:
        for f in WORDINGS:
            text = draw.caption(scene, f)
            meta = draw.parse(text)
            assert draw.scene_key(scene_of(meta)) == draw.scene_key(scene), text
            assert meta["prompt"] == text


def test_parse_reads_only_what_is_said(scenes):
    """Metadata have no colours, sizes and background of which the caption is silent."""
    for scene, _, _ in scenes:
        meta = draw.parse(draw.caption(scene, colour=False, size=False, background=False))
        said = meta["include"]
        assert "background" not in meta
        assert all(set(e) <= {"class", "count", "position"} for e in said)
        shapes = [e["class"] for e in said for _ in range(e["count"])]
        assert sorted(shapes) == sorted(o["shape"] for o in scene["objects"])


def entry(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


COLOURED = [entry("ring", color="red"), entry("star", color="blue")]


@pytest.mark.parametrize(
    "prompt, tag, include",
    [
        ("a star", "single_object", [entry("star")]),
        ("an orange cross", "colors", [entry("cross", color="orange")]),
        ("three crosses", "counting", [entry("cross", 3)]),
        ("a ring and a star", "two_object", [entry("ring"), entry("star")]),
        ("a red ring and a blue star", "color_attr", COLOURED),
        (
            "a ring left of a star",
            "position",
            [entry("ring"), entry("star", position=["right of", 0])],
        ),
    ],
)
def test_parse_has_genevals_form(prompt, tag, include):
    """The six tags, and the position of the second object relative to the first."""
    assert draw.parse(prompt) == dict(tag=tag, include=include, prompt=prompt)


def test_parse_refuses_unknown_words():
    with pytest.raises(ValueError, match="'hexagon'"):
        draw.parse("a red hexagon on a white background")


# ---------------------------------------------------------------------------- splits and seeds
def test_splits_share_no_scene():
    """Disjoint as drawn; 'a and b' is the same scene as 'b and a', and of the same split."""
    rng = np.random.default_rng(4)
    keys = {
        split: {draw.scene_key(draw.sample_split(rng, split)) for _ in range(600)}
        for split in ("train", "tune", "report")
    }
    assert min(map(len, keys.values())) > 250
    assert sum(map(len, keys.values())) == len(set.union(*keys.values()))
    for scene in (draw.sample_scene(rng, "pair") for _ in range(50)):
        assert draw.split_of(scene) == draw.split_of(scene | dict(objects=scene["objects"][::-1]))
    share = Counter(draw.split_of(draw.sample_scene(rng)) for _ in range(4000))
    for split in ("report", "tune"):
        assert share[split] / 4000 == pytest.approx(0.1, abs=0.03)


def test_training_groups_show_training_scenes_only(monkeypatch):
    """Also where they are spoilt: a fault must not turn a scene into one of a benchmark."""
    shown, drawing, rng = [], draw.draw, np.random.default_rng(6)

    def seen(rng, scene, *more):
        shown.append(scene)
        return drawing(rng, scene, *more)

    monkeypatch.setattr(draw, "draw", seen)
    for _ in range(60):
        draw.ranked_group(rng, "train", 4)
    assert len(shown) == 240 and {draw.split_of(s) for s in shown} == {"train"}


def test_the_seed_decides_the_pixels():
    def images(seed):
        rng = np.random.default_rng(seed)
        prompt, group, ranks = draw.ranked_group(rng, "train", 4)
        single = [draw.draw(rng, draw.sample_split(rng, "report")) for _ in range(10)]
        return np.stack([*group, *single]), prompt, ranks

    (a, *said), (b, *again), (c, *_) = images(5), images(5), images(6)
    assert a.dtype == np.uint8 and a.shape == (14, draw.SIZE, draw.SIZE, 3)
    assert (a == b).all() and said == again and (a != c).any((1, 2, 3)).all()


# ---------------------------------------------------------------------------- preferences
@pytest.mark.parametrize("kind", draw.DAMAGES)
def test_damage_is_disliked(scenes, kind):
    """On average, and more so when it is stronger."""
    rng, change = np.random.default_rng(7), defaultdict(list)
    for scene, placed, image in scenes[:48]:
        prompt = draw.caption(scene)
        for strength in (0.1, 0.9):
            worse = draw.damage(rng, image, kind, strength, placed)
            assert worse.shape == image.shape and worse.dtype == np.uint8
            change[strength].append(draw.preference(worse, prompt) - draw.preference(image, prompt))
    assert np.mean(change[0.1]) < 0 and np.mean(change[0.9]) < np.mean(change[0.1])


def test_damages_are_what_they_say(scenes):
    """Blur softens edges, ragged moves pixels, washed-out greys, cut-off shows background."""
    rng = np.random.default_rng(11)

    def steepest(image):
        return np.abs(np.diff(image.astype(int), axis=1)).max()

    for _, placed, image in scenes[:20]:
        damaged = [draw.damage(rng, image, kind, 0.8, placed) for kind in draw.DAMAGES]
        blur, ragged, washed, cut = damaged
        assert steepest(blur) < 0.7 * steepest(image)
        colours = [{*map(tuple, x.reshape(-1, 3))} for x in (ragged, image)]
        assert colours[0] <= colours[1] and (ragged != image).any()
        before, after = (np.ptp(x.reshape(-1, 3), axis=0) for x in (image, washed))
        assert after == pytest.approx(0.38 * before, abs=2)
        changed = (cut != image).any(-1)
        assert 0 < changed.sum() < 700 and (cut[changed] == image[0, 0]).all()


def test_faults_are_disliked_more_than_damage(scenes):
    """What the prompt says comes first: a spoilt scene is below the right one, always."""
    rng = np.random.default_rng(8)
    for scene, _, image in scenes[:100]:
        prompt = draw.caption(scene)
        spoilt = draw.draw(rng, draw.spoil_scene(rng, scene)[0])
        assert draw.preference(spoilt, prompt) < draw.preference(image, prompt)


def test_ranks_follow_the_preference():
    """Rank 1 is best; the noise of a hundredth swaps near neighbours only."""
    rng, close = np.random.default_rng(9), 0
    for _ in range(25):
        prompt, images, ranks = draw.ranked_group(rng, "tune", 4)
        assert sorted(ranks) == [1, 2, 3, 4]
        score = [draw.preference(i, prompt) for i in images]
        for a in range(4):
            for b in range(4):
                if score[a] - score[b] > 0.06:
                    assert ranks[a] < ranks[b]
                    close += 1
    assert close > 30


def test_votes_follow_the_rule(scenes):
    """Two hundred votes whose mean is the rule, within sampling error and clipping at 1 and 10."""
    rng = np.random.default_rng(10)
    rule, mean = [], []
    for _, _, image in scenes[:60]:
        counts = draw.votes(rng, image)
        assert counts.shape == (10,) and counts.sum() == 200
        rule.append(draw.aesthetic(image))
        mean.append(counts @ np.arange(1, 11) / 200)
    assert np.std(rule) > 0.5 and np.abs(np.subtract(rule, mean)).max() < 0.5


# ---------------------------------------------------------------------------- files
@pytest.fixture(scope="module", params=["report", "tune"])
def root(request, data):
    """A benchmark root and the split that its scenes must come from."""
    return (data if request.param == "report" else data / "tune"), request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "data"
    draw.write_benchmarks(out, train_images=20)
    assert [p.name for p in out.parent.iterdir()] == ["data"]  # the temporary folder is gone
    return out


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_two_processes_draw_at_once(data, tmp_path):
    """Both end well, one folder is left, whole, and drawing again replaces it."""
    code = f"import draw; draw.write_benchmarks({str(tmp_path / 'data')!r}, train_images=20)"
    again, place = [sys.executable, "-c", code], Path(draw.__file__).parent
    for count in (2, 1):
        processes = [subprocess.Popen(again, cwd=place) for _ in range(count)]
        assert [p.wait() for p in processes] == [0] * count
        assert [p.name for p in tmp_path.iterdir()] == ["data"]
        assert contents(tmp_path / "data") == contents(data)
        (tmp_path / "data/drawbench.txt").write_text("not drawn")


def test_draws_keep_their_order(data):
    """The captions that the tables of docs/ were measured on; one draw more would change them."""
    digest = hashlib.sha1()
    for folder in (data, data / "tune"):
        for name in ("coco.jsonl", "flickr30k.jsonl", "drawbench.txt", "geneval.jsonl"):
            digest.update((folder / name).read_bytes())
    assert digest.hexdigest() == "d19a58b810ed44e30d220ad3a157c1a9edaaf282"


def rows_of(folder, name, keys):
    """The rows of a benchmark: every image is there, and named once."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert all(set(row) == keys for row in rows)
    assert len({row["image"] for row in rows}) == len(rows)
    assert all((folder / row["image"]).exists() for row in rows)
    return rows


def from_split(captions, split):
    return all(draw.split_of(scene_of(draw.parse(c))) == split for c in captions)


def read(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name, n, suffix", [("coco", 500, ".png"), ("flickr30k", 250, ".jpg")])
def test_retrieval(root, name, n, suffix):
    """Five captions an image, every one of them true; no scene twice: one right answer each."""
    folder, split = root
    rows = rows_of(folder, name, {"image", "texts"})
    assert len(rows) == n and {len(set(row["texts"])) for row in rows} == {5}
    assert {Path(row["image"]).suffix for row in rows} == {suffix}
    for row in rows[:40]:
        image = read(folder / row["image"])
        assert all(draw.check(image, text) for text in row["texts"])
    assert from_split((text for row in rows for text in row["texts"]), split)
    assert len({draw.scene_key(scene_of(draw.parse(row["texts"][0]))) for row in rows}) == n


def lists_of(folder, name, split):
    """The ranks of each list, whose rows are side by side and have one prompt."""
    lists, prompts = defaultdict(list), defaultdict(set)
    rows = rows_of(folder, name, {"image", "texts", "group", "rank"})
    for row in rows:
        lists[row["group"]].append(row["rank"])
        prompts[row["group"]].update(row["texts"])
    assert [row["group"] for row in rows] == sorted(row["group"] for row in rows)
    assert {len(texts) for texts in prompts.values()} == {1}
    assert from_split((text for texts in prompts.values() for text in texts), split)
    return list(lists.values())


def test_hpdv2(root):
    """Lists of four in one order."""
    folder, split = root
    lists = lists_of(folder, "hpdv2", split)
    assert len(lists) == 200 and all(sorted(ranks) == [1, 2, 3, 4] for ranks in lists)


def test_imagereward(root):
    """Lists of several sizes, with ties in the ranking."""
    folder, split = root
    lists = lists_of(folder, "imagereward", split)
    assert len(lists) == 100 and len({len(ranks) for ranks in lists}) > 2
    assert all(min(ranks) == 1 for ranks in lists)
    assert any(len(set(ranks)) < len(ranks) for ranks in lists)


def test_ava(root):
    """Two hundred votes an image, whose mean follows the rule."""
    folder, _ = root
    rows = rows_of(folder, "ava", {"image", "votes"})
    assert len(rows) == 500
    assert all(len(row["votes"]) == 10 and sum(row["votes"]) == 200 for row in rows)
    for row in rows[:40]:
        rule = draw.aesthetic(read(folder / row["image"]))
        assert rule == pytest.approx(np.dot(row["votes"], range(1, 11)) / 200, abs=0.5)


def test_geneval(root):
    """All six tags, no prompt twice, each entry what the prompt says."""
    folder, _ = root
    rows = [json.loads(line) for line in (folder / "geneval.jsonl").read_text().splitlines()]
    tasks = Counter(r["tag"] for r in rows)
    assert set(tasks) == set(draw.TASKS) and max(tasks.values()) == 40
    assert tasks["single_object"] == len(draw.SHAPES)
    assert len({r["prompt"] for r in rows}) == len(rows)
    for r in rows:
        assert r == draw.parse(r["prompt"])
        assert {"class", "count"} <= set(r["include"][0])


def test_prompts_and_training_images(data):
    for folder, split in ((data, "report"), (data / "tune", "tune")):
        prompts = (folder / "drawbench.txt").read_text().splitlines()
        assert len(prompts) == 200 and from_split(prompts, split)
    coco = json.loads((data / "train_captions.json").read_text())
    names = [i["file_name"] for i in coco["images"]]
    assert sorted(p.name for p in (data / "train").iterdir()) == names and len(names) == 20
    assert Counter(a["image_id"] for a in coco["annotations"]) == {k: 3 for k in range(20)}
    for a in coco["annotations"]:
        assert draw.check(read(data / "train" / names[a["image_id"]]), a["caption"])
