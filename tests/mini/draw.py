"""The miniature's world: captioned scenes drawn from a seed, an exact checker, and benchmark folders.

A scene is one to three flat shapes on a plain background, 64 x 64 pixels. Everything that a caption says can be read
back from the pixels, so `check` is this world's exact GenEval. Scenes are split by a hash of what they show (not of
their pixels): a scene that a benchmark shows is never drawn for training.

    python tests/mini/draw.py [DIR]                             write every benchmark folder below DIR (default: data/ beside this file)
    python tests/mini/draw.py check images.npy prompts.json     print for each uint8 image (N, 64, 64, 3) whether it shows what its prompt says
"""
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

SIZE, SCALE = 64, 3  # pixels; scenes are drawn SCALE times larger and reduced, which antialiases the edges
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = dict(red=(220, 38, 38), orange=(245, 135, 25), yellow=(250, 220, 50), green=(40, 165, 70),
               cyan=(50, 205, 215), blue=(45, 95, 230), purple=(135, 55, 185), pink=(245, 140, 190))
BACKGROUNDS = dict(white=(245, 245, 245), black=(18, 18, 18), gray=(130, 130, 130), navy=(24, 32, 92))
SIZES = dict(small=(6.5, 7.5), large=(11.5, 13.0))  # radius in pixels
UNSIZED = (8.0, 10.5)  # radius of the objects of two-object scenes, whose captions name no size
RELATIONS = ("left of", "above")
INVERSE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
FAMILIES = ("single", "count", "pair", "relation")
NUMBERS = {1: "one", 2: "two", 3: "three"}
SYNONYM = dict(large="big", small="tiny")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in SHAPES}
WORDS = sorted({*SHAPES, *PLURAL.values(), *COLOURS, *BACKGROUNDS, *SIZES, *SYNONYM.values(),
                *NUMBERS.values(), *"a an the on with and left right of above below background is are that".split()})


# ---------------------------------------------------------------------------- what is in a scene
def sample_scene(rng, family=None):
    """A random scene: {family, objects: [{shape, color, size}], relation, background}."""
    pick = lambda names: list(names)[int(rng.random() * len(names))]  # rng.choice is ten times slower
    family = family or pick(FAMILIES)
    one = dict(shape=pick(SHAPES), color=pick(COLOURS), size=None)
    scene = dict(family=family, objects=[one], relation=None, background=pick(BACKGROUNDS))
    if family in ("single", "count"):
        one["size"] = pick(SIZES)
        scene["objects"] = [one] * (1 if family == "single" else int(rng.integers(2, 4)))
        return scene
    two = dict(one)
    while (two["shape"], two["color"]) == (one["shape"], one["color"]):
        two = dict(shape=pick(SHAPES), color=pick(COLOURS), size=None)
    scene["objects"] = [one, two]
    if family == "relation":
        scene["relation"] = pick(RELATIONS)
    return scene


def scene_key(scene):
    """What the scene shows, as a string that is the same for every way of saying it ("a and b" is "b and a")."""
    objects = [f"{o['size']} {o['color']} {o['shape']}" for o in scene["objects"]]
    if scene["relation"] is None:
        objects.sort()
    return f"{scene['background']}: {'; '.join(objects)} {scene['relation']}"


def split_of(scene):
    """'report' (one scene in ten), 'tune' (one in ten) or 'train'."""
    return {0: "report", 1: "tune"}.get(zlib.crc32(scene_key(scene).encode()) % 10, "train")


def sample_split(rng, split, family=None):
    while True:
        scene = sample_scene(rng, family)
        if split_of(scene) == split:
            return scene


# ---------------------------------------------------------------------------- captions
def caption(scene, form=0, colour=True, size=True, background=True):
    """One of five wordings of the same scene; colour, size or background can be left unsaid."""
    swap = form in (1, 3)
    objects, relation = list(scene["objects"]), scene["relation"]
    if swap and scene["family"] in ("pair", "relation"):
        objects, relation = objects[::-1], INVERSE.get(relation)

    def noun(o, number):
        words = [NUMBERS[number] if number > 1 else "one" if form == 4 and len(scene["objects"]) == 1 else "a"]
        if size and o["size"]:
            words.append(SYNONYM[o["size"]] if swap else o["size"])
        if colour:
            words.append(o["color"])
        words.append(PLURAL[o["shape"]] if number > 1 else o["shape"])
        return " ".join(words).replace("a orange", "an orange")

    if scene["family"] in ("single", "count"):
        phrase = noun(objects[0], len(objects))
    else:
        phrase = f"{noun(objects[0], 1)} {relation or 'and'} {noun(objects[1], 1)}"
    if not background:
        return phrase
    bg = scene["background"]
    return (f"{phrase} on a {bg} background", f"on a {bg} background {phrase}", f"a {bg} background with {phrase}",
            f"{phrase} on {bg}", f"{phrase} with a {bg} background")[form]


def random_caption(rng, scene):
    """A training caption: any wording, sometimes silent about the background, the sizes or the colours."""
    background, size, colour = rng.random(3) < (0.85, 0.8, 0.9)
    if scene["family"] in ("pair", "relation") and scene["objects"][0]["shape"] == scene["objects"][1]["shape"]:
        colour = True
    return caption(scene, int(rng.integers(5)), colour, size, background)


def parse(prompt):
    """GenEval metadata of a prompt of this world: {tag, include: [{class, count, color?, size?, position?}], background?, prompt}.

    Beyond GenEval's keys an entry may have a size and the scene a background. Raises ValueError on a word it does not know.
    """
    singular = {p: s for s, p in PLURAL.items()} | {s: s for s in SHAPES}
    number = {w: n for n, w in NUMBERS.items()} | {"a": 1, "an": 1}
    size_of = {s: s for s in SIZES} | {w: s for s, w in SYNONYM.items()}
    meta, entry, relation = dict(include=[]), {}, None
    for word in prompt.lower().replace(",", " ").replace(".", " ").split():
        if word in singular:
            meta["include"].append({"class": singular[word], "count": entry.pop("count", 1), **entry})
            entry = {}
        elif word in BACKGROUNDS:
            meta["background"], entry = word, {}  # the article of "a white background" was no count
        elif word in COLOURS:
            entry["color"] = word
        elif word in size_of:
            entry["size"] = size_of[word]
        elif word in number:
            entry["count"] = number[word]
        elif word in ("left", "right", "above", "below"):
            relation = {"left": "left of", "right": "right of"}.get(word, word)
        elif word not in WORDS and word not in ("photo", ","):
            raise ValueError(f"the miniature's prompts do not use the word {word!r}: {prompt!r}")
    if relation:  # GenEval's convention: the second entry is named first and placed relative to entry 0
        first, second = meta["include"]
        second["position"] = [INVERSE[relation], 0]
    many, coloured = len(meta["include"]) > 1, any("color" in e for e in meta["include"])
    meta["tag"] = ("position" if relation else ("color_attr" if coloured else "two_object") if many else
                   "counting" if meta["include"][0]["count"] > 1 else "colors" if coloured else "single_object")
    return meta | {"prompt": prompt}


# ---------------------------------------------------------------------------- drawing
def outline(shape, x, y, r):
    """Polygon corners of a shape of radius r around (x, y), or None for the round ones."""
    polar = lambda radii, n: [(x + radii[k % len(radii)] * np.sin(2 * np.pi * k / n), y - radii[k % len(radii)] * np.cos(2 * np.pi * k / n))
                              for k in range(n)]
    if shape == "square":
        return [(x - .88 * r, y - .88 * r), (x + .88 * r, y - .88 * r), (x + .88 * r, y + .88 * r), (x - .88 * r, y + .88 * r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + .8 * r), (x - r, y + .8 * r)]
    if shape == "star":
        return polar((1.08 * r, .46 * r), 10)
    if shape == "cross":
        a = .34 * r
        return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a), (x + a, y + a), (x + a, y + r),
                (x - a, y + r), (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a)]


def place(rng, scene, tries=256):
    """Centres and radii: [(x, y, r)], apart from each other and from the border, as the relation asks."""
    low, high = np.array([SIZES.get(o["size"], UNSIZED) for o in scene["objects"]]).T
    while True:  # many layouts at once, the first good one wins
        r = rng.uniform(low, high, (tries, len(low)))
        xy = rng.uniform(size=(2, tries, len(low))) * (SIZE - 2 * r - 5) + r + 2.5
        good = np.ones(tries, bool)
        for a in range(len(low)):
            for b in range(a):
                good &= np.abs(xy[..., a] - xy[..., b]).max(0) > 1.1 * (r[:, a] + r[:, b]) + 3
        if scene["relation"]:
            dx, dy = xy[..., 1] - xy[..., 0]
            good &= (dx > 0) & (abs(dy) < 10) if scene["relation"] == "left of" else (dy > 0) & (abs(dx) < 10)
        if good.any():
            k = int(good.argmax())
            return [(float(x), float(y), float(q)) for x, y, q in zip(*xy[:, k], r[k])]


def draw(rng, scene, placed=None):
    """uint8 (64, 64, 3): the scene with small jitter of colours and positions."""
    jitter = lambda rgb, amount: tuple(int(c) for c in np.clip(np.array(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255))
    placed = placed or place(rng, scene)
    background = jitter(BACKGROUNDS[scene["background"]], 6)
    image = Image.new("RGB", (SIZE * SCALE,) * 2, background)
    pen = ImageDraw.Draw(image)
    for o, (x, y, r) in zip(scene["objects"], np.array(placed) * SCALE):
        colour, corners = jitter(COLOURS[o["color"]], 10), outline(o["shape"], x, y, r)
        if corners:
            pen.polygon(corners, fill=colour)
        else:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            if o["shape"] == "ring":
                pen.ellipse((x - .55 * r, y - .55 * r, x + .55 * r, y + .55 * r), fill=background)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


# ---------------------------------------------------------------------------- reading an image back
def _nearest(rgb, palette):
    names = list(palette)
    return names[int(np.argmin([np.linalg.norm(np.subtract(rgb, palette[n])) for n in names]))]


def _unit(mask):
    """A soft mask cropped to its bounding box and stretched to 32 x 32."""
    ys, xs = np.nonzero(mask > 0.5)
    crop = mask[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
    return np.asarray(Image.fromarray((crop * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)) / 255


def _template(shape, r):
    image = Image.new("L", (SIZE * SCALE,) * 2)
    pen, c, r = ImageDraw.Draw(image), SIZE * SCALE / 2, r * SCALE
    corners = outline(shape, c, c, r)
    if corners:
        pen.polygon(corners, fill=255)
    else:
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            pen.ellipse((c - .55 * r, c - .55 * r, c + .55 * r, c + .55 * r), fill=0)
    return _unit(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255)


TEMPLATES = np.stack([_template(shape, r) for shape in SHAPES for r in (7, 9, 12)])  # (18, 32, 32)


def look(image):
    """What the pixels of a uint8 (64, 64, 3) image show: {background, objects: [{class, color, size, x, y, fit}]}.

    fit in [0, 1] is the overlap with the ideal shape; a blob that fits no shape (below 0.72) has class 'blob'.
    """
    image = np.asarray(image, np.float32)
    frame = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])
    background = np.median(frame, 0)
    distance = np.linalg.norm(image - background, axis=-1)
    label, count = ndimage.label(distance > 45)
    objects = []
    for k in range(1, count + 1):
        region = label == k
        if region.sum() < 25:
            continue
        core = region & (distance >= np.quantile(distance[region], 0.4))
        colour = np.median(image[core], 0)
        # coverage of each pixel by the object: its projection on the line from the background to the object's colour
        mask = np.clip((image - background) @ (colour - background) / np.sum((colour - background) ** 2), 0, 1) * ndimage.binary_dilation(region)
        if (mask > 0.5).sum() < 20:
            continue
        ys, xs = np.nonzero(mask > 0.5)
        unit = _unit(mask)
        overlap = np.minimum(unit, TEMPLATES).sum((1, 2)) / np.maximum(unit, TEMPLATES).sum((1, 2))
        shape, fit = SHAPES[int(overlap.argmax()) // 3], float(overlap.max())
        extent = max(np.ptp(ys), np.ptp(xs)) + 1
        objects.append({"class": shape if fit > 0.72 else "blob", "color": _nearest(colour, COLOURS),
                        "size": "small" if extent < 18 else "large", "x": float(xs.mean()), "y": float(ys.mean()), "fit": fit})
    return dict(background=_nearest(background, BACKGROUNDS), objects=objects)


def facts(image, meta, seen=None):
    """{fact: true or false} for every fact that the GenEval metadata `meta` states about the image; `seen` is what look() gave."""
    seen = seen or look(image)
    hits = [[o for o in seen["objects"] if all(o[k] == e[k] for k in ("class", "color", "size") if k in e)] for e in meta["include"]]
    said = {"total": len(seen["objects"]) == sum(e["count"] for e in meta["include"])}
    for k, (entry, found) in enumerate(zip(meta["include"], hits)):
        said[f"{k}: {entry}"] = len(found) == entry["count"]
        if "position" in entry:
            relation, other = entry["position"]
            said["position"] = bool(found and hits[other]) and _is(relation, found[0], hits[other][0])
    if "background" in meta:
        said["background"] = seen["background"] == meta["background"]
    return said


def _is(relation, a, b):
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 6 and along > abs(across)


def check(image, prompt):
    """True if the uint8 (64, 64, 3) image shows exactly what the prompt (text or GenEval metadata) says."""
    return all(facts(image, parse(prompt) if isinstance(prompt, str) else prompt).values())


# ---------------------------------------------------------------------------- faults, preferences, votes
def spoil_scene(rng, scene):
    """The same scene with one deliberate fault of content, as (scene, name of the fault)."""
    spoilt = json.loads(json.dumps(scene))
    other = lambda names, not_this: str(rng.choice([n for n in names if n != not_this]))
    faults = ["color", "shape", "background"] + (["size"] if scene["objects"][0]["size"] else []) + \
        (["count"] if scene["family"] in ("single", "count") else ["count", "relation"] if scene["relation"] else ["count"])
    fault, k = str(rng.choice(faults)), int(rng.integers(len(spoilt["objects"])))
    if fault in ("color", "shape", "size"):
        spoilt["objects"][k][fault] = other({"color": COLOURS, "shape": SHAPES, "size": SIZES}[fault], spoilt["objects"][k][fault])
    elif fault == "background":
        spoilt["background"] = other(BACKGROUNDS, spoilt["background"])
    elif fault == "relation":
        spoilt["objects"] = spoilt["objects"][::-1]
    else:
        spoilt["relation"] = None  # one object or three: no two to relate
    if fault == "count" and (len(spoilt["objects"]) == 3 or (len(spoilt["objects"]) == 2 and rng.random() < 0.5)):
        spoilt["objects"].pop(k)
    elif fault == "count":
        spoilt["objects"].append(dict(spoilt["objects"][k]))
    return spoilt, fault


DAMAGES = ("blur", "ragged", "washed-out", "cut-off")


def damage(rng, image, kind, strength, placed=()):
    """The uint8 image made less neat: kind of DAMAGES, strength in [0, 1]."""
    if kind == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7 + 1.3 * strength)))
    if kind == "ragged":  # every pixel is fetched from a little way off
        shift = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), (0, 0.8, 0.8))
        shift *= (0.6 + 0.9 * strength) / shift.std()
        rows, cols = np.clip(np.rint(np.indices((SIZE, SIZE)) + shift), 0, SIZE - 1).astype(int)
        return image[rows, cols]
    if kind == "washed-out":
        grey = image.mean((0, 1), keepdims=True)
        return (image + (0.3 + 0.4 * strength) * (grey - image)).astype(np.uint8)
    x, y, r = placed[int(rng.integers(len(placed)))]
    image, keep = image.copy(), int(round(r * (0.5 - 0.6 * strength)))
    a, b = (int(v) for v in (x, y))
    rows, cols = (slice(None), slice(max(a + keep, 0), int(a + 1.3 * r) + 1)) if rng.random() < 0.5 else (slice(max(b + keep, 0), int(b + 1.3 * r) + 1), slice(None))
    cut = np.zeros((SIZE, SIZE), bool)
    cut[rows, cols] = True
    cut &= np.hypot(*(np.indices((SIZE, SIZE)) - np.array([y, x])[:, None, None])) < 1.3 * r
    image[cut] = image[0, 0]
    return image


def neatness(image, seen):
    """(fit, sharp, pure) in [0, 1]: how well the shapes fit, how sharp the edges are, how close the colours are to pure ones."""
    rgb = np.asarray(image, np.float32)
    distance = np.linalg.norm(rgb - np.median(rgb[:2].reshape(-1, 3), 0), axis=-1)
    inside = distance > 45
    if not seen["objects"] or not inside.any():
        return 0.0, 0.0, 0.0
    soft = ((distance > 12) & (distance < 0.75 * np.quantile(distance[inside], 0.6))).sum()
    rim = (inside ^ ndimage.binary_erosion(inside)).sum() + 1
    return (float(np.clip((np.mean([o["fit"] for o in seen["objects"]]) - 0.6) / 0.35, 0, 1)), float(np.clip(1.6 - 0.6 * soft / rim, 0, 1)),
            float(np.clip((rgb.max(-1) - rgb.min(-1))[inside].mean() / 150, 0, 1)))


def preference(image, prompt, seen=None):
    """The rule by which this world's people prefer images: the share of the prompt's facts that hold, then neatness."""
    seen = seen or look(image)
    if not seen["objects"]:
        return 0.0
    return float(np.mean(list(facts(image, parse(prompt), seen).values())) + 0.25 * np.dot((0.4, 0.35, 0.25), neatness(image, seen)))


def ranked_group(rng, split, size):
    """(prompt, images, ranks): one prompt with `size` images, some wrong, some damaged; rank 1 is best."""
    scene = sample_split(rng, split)
    prompt, images, scores = caption(scene, int(rng.integers(5))), [], []
    for k in range(size):
        shown = scene
        for _ in range(int(rng.choice(3, p=(0.45, 0.4, 0.15)))):
            spoilt = spoil_scene(rng, shown)[0] if len(shown["objects"]) < 4 else shown
            while split == "train" and split_of(spoilt) != "train":  # no scene of a benchmark is shown in training
                spoilt = spoil_scene(rng, shown)[0]
            shown = spoilt
        placed = place(rng, shown)
        image = draw(rng, shown, placed)
        if rng.random() < 0.65:
            image = damage(rng, image, str(rng.choice(DAMAGES)), rng.random(), placed)
        images.append(image)
        scores.append(preference(image, prompt) + rng.normal(0, 0.01))  # people are not quite sure
    return prompt, images, ranks(scores)


def ranks(scores):
    """1 for the best score; no ties: people's lists of HPDv2 order every image."""
    order = np.argsort(np.argsort(-np.asarray(scores), kind="stable"), kind="stable")
    return [int(o) + 1 for o in order]


def aesthetic(image):
    """The written-down rule of the miniature's AVA, in [1, 10]: contrast, balance, margin and saturation, equally weighted."""
    image = np.asarray(image, np.float32)
    background = np.median(image[:2].reshape(-1, 3), 0)
    mask = np.linalg.norm(image - background, axis=-1) > 45
    if mask.sum() < 20:
        return 1.0
    ys, xs = np.nonzero(mask)
    colour = image[mask]
    luma = np.array([0.299, 0.587, 0.114])
    contrast = np.clip(abs(colour @ luma - background @ luma).mean() / 150, 0, 1)
    balance = 1 - np.clip(np.hypot(xs.mean() - 31.5, ys.mean() - 31.5) / 22, 0, 1)
    margin = np.clip(min(xs.min(), ys.min(), 63 - xs.max(), 63 - ys.max()) / 16, 0, 1)
    saturation = np.clip((colour.max(1) - colour.min(1)).mean() / 210, 0, 1)
    return float(1 + 9 * np.mean([contrast, balance, margin, saturation]))


def votes(rng, image, people=200):
    """How many of `people` gave the image each mark from 1 to 10."""
    marks = np.clip(np.rint(rng.normal(aesthetic(image), 1.3, people)), 1, 10).astype(int)
    return np.bincount(marks, minlength=11)[1:]


# ---------------------------------------------------------------------------- benchmark folders, in the real formats
def _save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({'quality': 95} if path.suffix == '.jpg' else {}))


def _unique(rng, split, n, family=None):
    seen = {}
    while len(seen) < n:
        scene = sample_split(rng, split, family)
        seen.setdefault(scene_key(scene), scene)
    return list(seen.values())


def geneval_metadata(rng, split, per_task):
    """GenEval-like metadata, per_task prompts of each of the six tasks, no prompt twice."""
    rows = []
    for task in TASKS:
        family = {"single_object": "single", "colors": "single", "counting": "count", "position": "relation"}.get(task, "pair")
        coloured, seen = task in ("colors", "color_attr"), {}
        for _ in range(20 * per_task):  # some tasks have fewer prompts than per_task
            scene = sample_split(rng, split, family)
            if len(seen) < per_task and (coloured or family in ("single", "count") or len({o["shape"] for o in scene["objects"]}) == 2):
                text = caption(scene, 0, colour=coloured, size=False, background=False)
                seen.setdefault(" ".join(sorted(text.split())) if task == "two_object" else text, text)
        rows += [parse(text) | {"tag": task} for text in seen.values()]
    return rows


def write_benchmarks(out, train_images=8000, seed=0):
    """Write every benchmark folder below `out` (a few seconds, the same bytes for the same seed), in place of one that is there."""
    out, final = Path(f"{out}.{os.getpid()}.tmp"), Path(out)  # another process may be drawing too
    again = final.exists()
    dump = lambda path, value: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text(json.dumps(value)))
    for split, root in (("report", out), ("tune", out / "tune")):
        rng = np.random.default_rng([seed, split == "tune"])
        scenes = _unique(rng, split, 500)
        coco = dict(images=[], annotations=[])
        for k, scene in enumerate(scenes):
            name = f"COCO_val2014_{k:012d}.png"
            _save(draw(rng, scene), root / "coco/val2014" / name)
            coco["images"].append(dict(id=k, file_name=name))
            coco["annotations"] += [dict(id=5 * k + f, image_id=k, caption=caption(scene, f)) for f in range(5)]
        dump(root / "coco/coco_test_karpathy.json", coco)

        lines = ["image,caption"]
        for k, scene in enumerate(_unique(rng, split, 250)):
            _save(draw(rng, scene), root / "flickr30k/Images" / f"{k}.jpg")
            lines += [f"{k}.jpg,{caption(scene, f)}" for f in range(5)]
        (root / "flickr30k/flickr30k_test_karpathy.txt").write_text("\n".join(lines) + "\n")

        for name, groups, key, rank_key in (("hpdv2", 200, "image_path", "rank"), ("imagereward", 100, "generations", "ranking")):
            rows = []
            for g in range(groups):
                size = 4 if name == "hpdv2" else int(rng.integers(4, 8))
                prompt, images, order = ranked_group(rng, split, size)
                paths = [f"{g:05d}_{k}.png" for k in range(size)]
                for image, path in zip(images, paths):
                    _save(image, root / name / ("test" if name == "hpdv2" else "test_images") / path)
                if name == "hpdv2":
                    rows.append(dict(prompt=prompt, image_path=paths, rank=order, raw_annotations=[]))
                else:  # ImageReward's lists have ties, which its accuracy leaves out
                    rows.append(dict(id=f"{g:06d}", prompt=prompt, generations=[f"test_images/{p}" for p in paths], ranking=[-(-r // 2) for r in order]))
            dump(root / name / "test.json", rows)

        rows, ids = [], range(900001, 900501)  # AVA's are as long: a folder of somebody's own 1.jpg, 2.jpg holds none of them
        for k, scene in zip(ids, _unique(rng, split, 500)):
            image = draw(rng, scene)
            _save(image, root / "ava/images" / f"{k}.png")
            rows.append(" ".join(str(v) for v in (k, k, *votes(rng, image), 0, 0, 1)))
        (root / "ava/AVA.txt").write_text("\n".join(rows) + "\n")
        (root / "ava/test.jpgl").write_text("\n".join(map(str, ids)) + "\n")

        scenes = _unique(rng, split, 200)
        (root / "drawbench.txt").write_text("\n".join(caption(s, int(rng.integers(5))) for s in scenes) + "\n")
        (root / "geneval.jsonl").write_text("".join(json.dumps(m) + "\n" for m in geneval_metadata(rng, split, 40)))

    rng, coco = np.random.default_rng([seed, 2]), dict(images=[], annotations=[])
    for k in range(train_images):
        scene = sample_split(rng, "train")
        _save(draw(rng, scene), out / "train" / f"{k:05d}.png")
        coco["images"].append(dict(id=k, file_name=f"{k:05d}.png"))
        coco["annotations"] += [dict(id=3 * k + n, image_id=k, caption=random_caption(rng, scene)) for n in range(3)]
    dump(out / "train_captions.json", coco)
    if again:
        shutil.rmtree(final)
    try:
        os.replace(out, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(out)  # the other was faster, and its bytes are the same


if __name__ == "__main__" and sys.argv[1:2] == ["check"]:
    print(json.dumps([check(i, p) for i, p in zip(np.load(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))]))
elif __name__ == "__main__":
    write_benchmarks(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data")
