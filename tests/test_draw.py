"""The miniature's world: the checker, the parser and the splits are exact, faults are found, the benchmark folders have the real formats."""
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import draw
from common import read_image

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
    """The scene that metadata describe in full: an independent reading of GenEval's convention, entry 1 is `position` of entry 0."""
    objects = [dict(shape=e["class"], color=e.get("color"), size=e.get("size")) for e in meta["include"] for _ in range(e["count"])]
    where = [e["position"] for e in meta["include"] if "position" in e]
    relation = None
    if where:
        (said, other), = where
        assert other == 0 and "position" in meta["include"][1]
        objects = objects[::-1] if said in ("left of", "above") else objects  # entry 1 is left of entry 0: it comes first
        relation = {"left of": "left of", "right of": "left of", "above": "above", "below": "above"}[said]
    return dict(objects=objects, relation=relation, background=meta["background"])


# ---------------------------------------------------------------------------- captions, parsing, checking
def test_checker_accepts_every_scene_in_every_wording(scenes):
    """100 %: the miniature's GenEval has no errors of its own. Training captions, which leave things unsaid, are true as well."""
    rng = np.random.default_rng(1)
    wrong = [draw.caption(s, f) for s, _, image in scenes for f in WORDINGS if not draw.check(image, draw.caption(s, f))]
    wrong += [text for s, _, image in scenes for text in [draw.random_caption(rng, s)] if not draw.check(image, text)]
    assert not wrong


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
            assert ("total" in false) is (fault == "count") and any(k[0].isdigit() for k in false) and "background" not in false
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
    """Colours, sizes and the background are absent from the metadata when the caption is silent about them."""
    for scene, _, _ in scenes:
        meta = draw.parse(draw.caption(scene, colour=False, size=False, background=False))
        assert "background" not in meta and all(set(e) <= {"class", "count", "position"} for e in meta["include"])
        assert sorted(e["class"] for e in meta["include"] for _ in range(e["count"])) == sorted(o["shape"] for o in scene["objects"])


@pytest.mark.parametrize("prompt, tag, include", [
    ("a star", "single_object", [{"class": "star", "count": 1}]),
    ("an orange cross", "colors", [{"class": "cross", "count": 1, "color": "orange"}]),
    ("three crosses", "counting", [{"class": "cross", "count": 3}]),
    ("a ring and a star", "two_object", [{"class": "ring", "count": 1}, {"class": "star", "count": 1}]),
    ("a red ring and a blue star", "color_attr", [{"class": "ring", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}]),
    ("a ring left of a star", "position", [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["right of", 0]}])])
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
    keys = {split: {draw.scene_key(draw.sample_split(rng, split)) for _ in range(600)} for split in ("train", "tune", "report")}
    assert min(map(len, keys.values())) > 250
    assert not keys["train"] & keys["tune"] and not keys["train"] & keys["report"] and not keys["tune"] & keys["report"]
    for scene in (draw.sample_scene(rng, "pair") for _ in range(50)):
        assert draw.split_of(scene) == draw.split_of(scene | dict(objects=scene["objects"][::-1]))
    share = Counter(draw.split_of(draw.sample_scene(rng)) for _ in range(4000))
    assert share["report"] / 4000 == pytest.approx(0.1, abs=0.03) and share["tune"] / 4000 == pytest.approx(0.1, abs=0.03)


def test_training_groups_show_training_scenes_only(monkeypatch):
    """Also where they are spoilt: a fault must not turn a scene into one of a benchmark."""
    shown, drawing, rng = [], draw.draw, np.random.default_rng(6)
    monkeypatch.setattr(draw, "draw", lambda rng, scene, *more: (shown.append(scene), drawing(rng, scene, *more))[1])
    for _ in range(60):
        draw.ranked_group(rng, "train", 4)
    assert len(shown) == 240 and {draw.split_of(s) for s in shown} == {"train"}


def test_the_seed_decides_the_pixels():
    def images(seed):
        rng = np.random.default_rng(seed)
        prompt, group, ranks = draw.ranked_group(rng, "train", 4)
        return np.stack([*group, *(draw.draw(rng, draw.sample_split(rng, "report")) for _ in range(10))]), prompt, ranks
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
    """Blur softens every edge, ragged moves pixels about, washed-out pulls towards one grey, cut-off replaces by background."""
    rng = np.random.default_rng(11)
    steepest = lambda image: np.abs(np.diff(image.astype(int), axis=1)).max()
    for _, placed, image in scenes[:20]:
        blur, ragged, washed, cut = (draw.damage(rng, image, kind, 0.8, placed) for kind in ("blur", "ragged", "washed-out", "cut-off"))
        assert steepest(blur) < 0.7 * steepest(image)
        assert {*map(tuple, ragged.reshape(-1, 3))} <= {*map(tuple, image.reshape(-1, 3))} and (ragged != image).any()
        assert np.ptp(washed.reshape(-1, 3), axis=0) == pytest.approx(0.38 * np.ptp(image.reshape(-1, 3), axis=0), abs=2)
        changed = (cut != image).any(-1)
        assert 0 < changed.sum() < 700 and (cut[changed] == image[0, 0]).all()


def test_faults_are_disliked_more_than_damage(scenes):
    """What the prompt says comes first: a spoilt scene is below the right one, always."""
    rng = np.random.default_rng(8)
    for scene, _, image in scenes[:100]:
        prompt = draw.caption(scene)
        assert draw.preference(draw.draw(rng, draw.spoil_scene(rng, scene)[0]), prompt) < draw.preference(image, prompt)


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
    """Two hundred votes whose mean is the written rule, within sampling error and the clipping at 1 and 10."""
    rng = np.random.default_rng(10)
    rule, mean = [], []
    for _, _, image in scenes[:60]:
        counts = draw.votes(rng, image)
        assert counts.shape == (10,) and counts.sum() == 200
        rule.append(draw.aesthetic(image)), mean.append(counts @ np.arange(1, 11) / 200)
    assert np.std(rule) > 0.5 and np.abs(np.subtract(rule, mean)).max() < 0.5


# ---------------------------------------------------------------------------- benchmark folders
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


def test_two_processes_draw_at_once(data, tmp_path):
    """Both end well, one folder is left, whole, and drawing again replaces it."""
    again = [sys.executable, "-c", f"import draw; draw.write_benchmarks({str(tmp_path / 'data')!r}, train_images=20)"]
    files = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    for count in (2, 1):
        assert [p.wait() for p in [subprocess.Popen(again, cwd=Path(draw.__file__).parent) for _ in range(count)]] == [0] * count
        assert [p.name for p in tmp_path.iterdir()] == ["data"] and files(tmp_path / "data") == files(data)
        (tmp_path / "data/drawbench.txt").write_text("not drawn")


def from_split(captions, split):
    return all(draw.split_of(scene_of(draw.parse(c))) == split for c in captions)


def shows(path, prompt):
    return draw.check(np.asarray(read_image(path)), prompt)


def test_coco(root):
    """COCO's JSON, five captions an image, every one of them true."""
    folder, split = root
    coco = json.loads((folder / "coco/coco_test_karpathy.json").read_text())
    said = defaultdict(list)
    for a in coco["annotations"]:
        said[a["image_id"]].append(a["caption"])
    assert len(coco["images"]) == 500 and len({a["id"] for a in coco["annotations"]}) == 2500
    assert set(said) == {i["id"] for i in coco["images"]} and {len(set(c)) for c in said.values()} == {5}
    assert all((folder / "coco/val2014" / i["file_name"]).exists() for i in coco["images"])
    for i in coco["images"][:40]:
        assert all(shows(folder / "coco/val2014" / i["file_name"], c) for c in said[i["id"]])
    assert from_split((c for five in said.values() for c in five), split)
    assert len({draw.scene_key(scene_of(draw.parse(five[0]))) for five in said.values()}) == 500  # no scene twice: recall@1 has one right answer


def test_flickr(root):
    """`image,caption` and lines that split at the first '.jpg,', five for each image in a row."""
    folder, split = root
    head, *lines = (folder / "flickr30k/flickr30k_test_karpathy.txt").read_text().splitlines()
    assert head == "image,caption" and len(lines) == 1250
    rows = [line.split(".jpg,", 1) for line in lines]
    assert all(len({name for name, _ in rows[k:k + 5]}) == 1 for k in range(0, 1250, 5)) and len({name for name, _ in rows}) == 250
    assert from_split((text for _, text in rows), split)
    for name, text in rows[:100]:
        assert shows(folder / "flickr30k/Images" / f"{name}.jpg", text)


def test_hpdv2(root):
    folder, split = root
    rows = json.loads((folder / "hpdv2/test.json").read_text())
    assert len(rows) == 200 and all(set(r) == {"prompt", "image_path", "rank", "raw_annotations"} for r in rows)
    assert all(sorted(r["rank"]) == [1, 2, 3, 4] and len(r["image_path"]) == 4 for r in rows)
    assert all((folder / "hpdv2/test" / p).exists() for r in rows for p in r["image_path"])
    assert from_split((r["prompt"] for r in rows), split)


def test_imagereward(root):
    """Paths from the folder of test.json, groups of several sizes, with ties in the ranking."""
    folder, split = root
    rows = json.loads((folder / "imagereward/test.json").read_text())
    assert len(rows) == 100 and all(set(r) == {"id", "prompt", "generations", "ranking"} for r in rows)
    assert len({r["id"] for r in rows}) == 100 and len({len(r["ranking"]) for r in rows}) > 2
    assert all(len(r["generations"]) == len(r["ranking"]) and min(r["ranking"]) == 1 for r in rows)
    assert any(len(set(r["ranking"])) < len(r["ranking"]) for r in rows)
    assert all((folder / "imagereward" / p).exists() for r in rows for p in r["generations"])
    assert from_split((r["prompt"] for r in rows), split)


def test_ava(root):
    """Fifteen columns: index, image, the votes for 1 to 10, two tags, the challenge; the test list names the images."""
    folder, _ = root
    rows = [[int(v) for v in line.split(" ")] for line in (folder / "ava/AVA.txt").read_text().splitlines()]
    assert len(rows) == 500 and {len(r) for r in rows} == {15}
    assert {sum(r[2:12]) for r in rows} == {200}
    listed = (folder / "ava/test.jpgl").read_text().split()
    assert listed == [str(r[1]) for r in rows] and all((folder / "ava/images" / f"{name}.png").exists() for name in listed)
    for r in rows[:40]:
        rule = draw.aesthetic(np.asarray(read_image(folder / "ava/images" / f"{r[1]}.png")))
        assert rule == pytest.approx(np.dot(r[2:12], range(1, 11)) / 200, abs=0.5)


def test_geneval(root):
    """All six tags, no prompt twice, each entry what the prompt says."""
    folder, _ = root
    rows = [json.loads(line) for line in (folder / "geneval.jsonl").read_text().splitlines()]
    tasks = Counter(r["tag"] for r in rows)
    assert set(tasks) == set(draw.TASKS) and tasks["single_object"] == len(draw.SHAPES) and max(tasks.values()) == 40
    assert len({r["prompt"] for r in rows}) == len(rows)
    for r in rows:
        assert r == draw.parse(r["prompt"])
        assert {"class", "count"} <= set(r["include"][0])


def test_prompts_and_training_images(data):
    for folder, split in ((data, "report"), (data / "tune", "tune")):
        prompts = (folder / "drawbench.txt").read_text().splitlines()
        assert len(prompts) == 200 and from_split(prompts, split)
    coco = json.loads((data / "train_captions.json").read_text())
    assert sorted(p.name for p in (data / "train").iterdir()) == [i["file_name"] for i in coco["images"]] and len(coco["images"]) == 20
    assert Counter(a["image_id"] for a in coco["annotations"]) == {k: 3 for k in range(20)}
    assert all(shows(data / "train" / coco["images"][a["image_id"]]["file_name"], a["caption"]) for a in coco["annotations"])
