"""The miniature's world: captioned scenes drawn from a seed, an exact checker, and benchmarks.

A scene is one to three flat shapes on a plain background, 64 x 64 pixels. All that a caption says
can be read back from the pixels, so `check` is this world's exact GenEval. Scenes are split by a
hash of what they show, not of their pixels: what a benchmark shows is never drawn for training.

    python tests/mini/draw.py [DIR]      write all data below DIR, by default data/ beside this file
    python tests/mini/draw.py check images.npy prompts.json     does each uint8 image (N, 64, 64, 3)
                                                                show what its prompt says?
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

SIZE = 64  # pixels
SCALE = 3  # scenes are drawn so many times larger and reduced, which antialiases the edges
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = dict(
    red=(220, 38, 38),
    orange=(245, 135, 25),
    yellow=(250, 220, 50),
    green=(40, 165, 70),
    cyan=(50, 205, 215),
    blue=(45, 95, 230),
    purple=(135, 55, 185),
    pink=(245, 140, 190),
)
BACKGROUNDS = dict(
    white=(245, 245, 245), black=(18, 18, 18), gray=(130, 130, 130), navy=(24, 32, 92)
)
SIZES = dict(small=(6.5, 7.5), large=(11.5, 13.0))  # radius in pixels
UNSIZED = (8.0, 10.5)  # radius of the objects of two-object scenes, whose captions name no size
RELATIONS = ("left of", "above")
INVERSE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
FAMILIES = ("single", "count", "pair", "relation")
NUMBERS = {1: "one", 2: "two", 3: "three"}
SYNONYM = dict(large="big", small="tiny")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in SHAPES}
CONTENT = {*SHAPES, *PLURAL.values(), *COLOURS, *BACKGROUNDS, *SIZES, *SYNONYM.values()}
GRAMMAR = "a an the on with and left right of above below background is are that"
WORDS = sorted({*CONTENT, *NUMBERS.values(), *GRAMMAR.split()})


# ---------------------------------------------------------------------------- what is in a scene
def sample_scene(rng, family=None):
    """A random scene: {family, objects: [{shape, color, size}], relation, background}."""

    def pick(names):  # rng.choice is ten times slower
        return list(names)[int(rng.random() * len(names))]

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
    """What the scene shows, the same for every way of saying it: "a and b" is "b and a"."""
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
        article = "one" if form == 4 and len(scene["objects"]) == 1 else "a"
        words = [NUMBERS[number] if number > 1 else article]
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
    return (
        f"{phrase} on a {bg} background",
        f"on a {bg} background {phrase}",
        f"a {bg} background with {phrase}",
        f"{phrase} on {bg}",
        f"{phrase} with a {bg} background",
    )[form]


def random_caption(rng, scene):
    """A training caption: any wording, at times silent about background, sizes or colours."""
    background, size, colour = rng.random(3) < (0.85, 0.8, 0.9)
    shapes = {o["shape"] for o in scene["objects"]}
    if scene["family"] in ("pair", "relation") and len(shapes) == 1:
        colour = True
    return caption(scene, int(rng.integers(5)), colour, size, background)


def parse(prompt):
    """GenEval metadata of a prompt of this world: {tag, include, background?, prompt}.

    include: [{class, count, color?, size?, position?}]; size and background are not GenEval's.
    Raises ValueError on a word that it does not know.
    """
    singular = {p: s for s, p in PLURAL.items()} | {s: s for s in SHAPES}
    number = {w: n for n, w in NUMBERS.items()} | {"a": 1, "an": 1}
    size_of = {s: s for s in SIZES} | {w: s for s, w in SYNONYM.items()}
    meta, entry, relation = dict(include=[]), {}, None
    for word in prompt.lower().replace(",", " ").replace(".", " ").split():
        if word in singular:
            meta["include"].append(
                {"class": singular[word], "count": entry.pop("count", 1), **entry}
            )
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
    if relation:  # GenEval's convention: the second entry is placed relative to entry 0
        first, second = meta["include"]
        second["position"] = [INVERSE[relation], 0]
    return meta | {"tag": task_of(meta["include"]), "prompt": prompt}


def task_of(include):
    """Which of GenEval's tasks a prompt with these entries belongs to."""
    coloured = any("color" in e for e in include)
    if len(include) > 1:
        if "position" in include[1]:
            return "position"
        return "color_attr" if coloured else "two_object"
    if include[0]["count"] > 1:
        return "counting"
    return "colors" if coloured else "single_object"


# ---------------------------------------------------------------------------- drawing
def outline(shape, x, y, r):
    """Polygon corners of a shape of radius r around (x, y), or None for the round ones."""
    if shape == "square":
        a = 0.88 * r
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "star":
        corners = [(2 * np.pi * k / 10, (1.08 * r, 0.46 * r)[k % 2]) for k in range(10)]
        return [(x + q * np.sin(angle), y - q * np.cos(angle)) for angle, q in corners]
    if shape == "cross":
        a = 0.34 * r
        top = [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a)]
        bottom = [(x + r, y + a), (x + a, y + a), (x + a, y + r), (x - a, y + r)]
        return [*top, *bottom, (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a)]
    return None


def place(rng, scene, tries=256):
    """[(x, y, r)] apart from each other and from the border, as the relation asks; pixels."""
    low, high = np.array([SIZES.get(o["size"], UNSIZED) for o in scene["objects"]]).T
    while True:  # many layouts at once, the first good one wins
        r = rng.uniform(low, high, (tries, len(low)))
        xy = rng.uniform(size=(2, tries, len(low))) * (SIZE - 2 * r - 5) + r + 2.5
        good = np.ones(tries, bool)
        for a in range(len(low)):
            for b in range(a):
                good &= np.abs(xy[..., a] - xy[..., b]).max(0) > 1.1 * (r[:, a] + r[:, b]) + 3
        if scene["relation"]:
            along, across = xy[..., 1] - xy[..., 0]
            if scene["relation"] == "above":
                along, across = across, along
            good &= (along > 0) & (abs(across) < 10)
        if good.any():
            k = int(good.argmax())
            return [tuple(map(float, c)) for c in zip(*xy[:, k], r[k], strict=True)]


def fill_shape(pen, shape, x, y, r, colour, background):
    corners = outline(shape, x, y, r)
    if corners:
        pen.polygon(corners, fill=colour)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    if shape == "ring":
        hole = 0.55 * r
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)


def draw(rng, scene, placed=None):
    """uint8 (64, 64, 3): the scene with small jitter of colours and positions."""

    def jitter(rgb, amount):
        moved = np.array(rgb) + rng.integers(-amount, amount + 1, 3)
        return tuple(int(c) for c in np.clip(moved, 0, 255))

    placed = placed or place(rng, scene)
    background = jitter(BACKGROUNDS[scene["background"]], 6)
    image = Image.new("RGB", (SIZE * SCALE,) * 2, background)
    pen = ImageDraw.Draw(image)
    for o, (x, y, r) in zip(scene["objects"], np.array(placed) * SCALE, strict=True):
        fill_shape(pen, o["shape"], x, y, r, jitter(COLOURS[o["color"]], 10), background)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


# ---------------------------------------------------------------------------- reading an image back
def _nearest(rgb, palette):
    names = list(palette)
    return names[int(np.argmin([np.linalg.norm(np.subtract(rgb, palette[n])) for n in names]))]


def _unit(mask):
    """A soft mask cropped to its bounding box and stretched to 32 x 32."""
    ys, xs = np.nonzero(mask > 0.5)
    crop = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    soft = Image.fromarray((crop * 255).astype(np.uint8))
    return np.asarray(soft.resize((32, 32), Image.Resampling.BILINEAR)) / 255


def _template(shape, r):
    image = Image.new("L", (SIZE * SCALE,) * 2)
    centre = SIZE * SCALE / 2
    fill_shape(ImageDraw.Draw(image), shape, centre, centre, r * SCALE, 255, 0)
    return _unit(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255)


TEMPLATES = np.stack([_template(shape, r) for shape in SHAPES for r in (7, 9, 12)])  # (18, 32, 32)


def look(image):
    """What a uint8 (64, 64, 3) image shows: {background, objects}.

    objects: [{class, color, size, x, y, fit}]; fit in [0, 1] is the overlap with the ideal shape,
    and what fits no shape (below 0.72) has the class 'blob'.
    """
    image = np.asarray(image, np.float32)
    frame = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
    background = np.median(np.concatenate([side.reshape(-1, 3) for side in frame]), 0)
    distance = np.linalg.norm(image - background, axis=-1)
    label, count = ndimage.label(distance > 45)
    objects = []
    for k in range(1, count + 1):
        region = label == k
        if region.sum() < 25:
            continue
        core = region & (distance >= np.quantile(distance[region], 0.4))
        colour = np.median(image[core], 0)
        # coverage of each pixel: its projection on the line from background to object colour
        away = colour - background
        mask = np.clip((image - background) @ away / np.sum(away**2), 0, 1)
        mask = mask * ndimage.binary_dilation(region)
        if (mask > 0.5).sum() < 20:
            continue
        ys, xs = np.nonzero(mask > 0.5)
        unit = _unit(mask)
        overlap = np.minimum(unit, TEMPLATES).sum((1, 2)) / np.maximum(unit, TEMPLATES).sum((1, 2))
        shape, fit = SHAPES[int(overlap.argmax()) // 3], float(overlap.max())
        extent = max(np.ptp(ys), np.ptp(xs)) + 1
        objects.append(
            {
                "class": shape if fit > 0.72 else "blob",
                "color": _nearest(colour, COLOURS),
                "size": "small" if extent < 18 else "large",
                "x": float(xs.mean()),
                "y": float(ys.mean()),
                "fit": fit,
            }
        )
    return dict(background=_nearest(background, BACKGROUNDS), objects=objects)


def facts(image, meta, seen=None):
    """{fact: bool} for all that GenEval metadata state about the image; seen: look(image)."""
    seen = seen or look(image)

    def fitting(entry):
        asked = {k: entry[k] for k in ("class", "color", "size") if k in entry}
        return [o for o in seen["objects"] if asked.items() <= o.items()]

    hits = [fitting(e) for e in meta["include"]]
    said = {"total": len(seen["objects"]) == sum(e["count"] for e in meta["include"])}
    for k, (entry, found) in enumerate(zip(meta["include"], hits, strict=True)):
        said[f"{k}: {entry}"] = len(found) == entry["count"]
        if "position" in entry:
            relation, other = entry["position"]
            both = bool(found and hits[other])
            said["position"] = both and _is(relation, found[0], hits[other][0])
    if "background" in meta:
        said["background"] = seen["background"] == meta["background"]
    return said


def _is(relation, a, b):
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    sides = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    along, across = sides[relation]
    return along > 6 and along > abs(across)


def check(image, prompt):
    """Whether a uint8 (64, 64, 3) image shows exactly what the prompt, text or metadata, says."""
    return all(facts(image, parse(prompt) if isinstance(prompt, str) else prompt).values())


# ---------------------------------------------------------------------------- faults, votes
def spoil_scene(rng, scene):
    """The same scene with one deliberate fault of content, as (scene, name of the fault)."""
    spoilt = json.loads(json.dumps(scene))
    faults = ["color", "shape", "background"]
    faults += ["size"] if scene["objects"][0]["size"] else []
    faults += ["count", "relation"] if scene["relation"] else ["count"]
    fault, k = str(rng.choice(faults)), int(rng.integers(len(spoilt["objects"])))

    def another(names, now):
        return str(rng.choice([n for n in names if n != now]))

    if fault in ("color", "shape", "size"):
        names = {"color": COLOURS, "shape": SHAPES, "size": SIZES}[fault]
        spoilt["objects"][k][fault] = another(names, spoilt["objects"][k][fault])
    elif fault == "background":
        spoilt["background"] = another(BACKGROUNDS, spoilt["background"])
    elif fault == "relation":
        spoilt["objects"] = spoilt["objects"][::-1]
    else:
        spoilt["relation"] = None  # one object or three: no two to relate
        count = len(spoilt["objects"])
        if count == 3 or (count == 2 and rng.random() < 0.5):
            spoilt["objects"].pop(k)
        else:
            spoilt["objects"].append(dict(spoilt["objects"][k]))
    return spoilt, fault


DAMAGES = ("blur", "ragged", "washed-out", "cut-off")


def damage(rng, image, kind, strength, placed=()):
    """The uint8 image made less neat: kind of DAMAGES, strength in [0, 1]."""
    if kind == "blur":
        soften = ImageFilter.GaussianBlur(0.7 + 1.3 * strength)
        return np.asarray(Image.fromarray(image).filter(soften))
    if kind == "ragged":  # every pixel is fetched from a little way off
        shift = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), (0, 0.8, 0.8))
        shift *= (0.6 + 0.9 * strength) / shift.std()
        rows, cols = np.clip(np.rint(np.indices((SIZE, SIZE)) + shift), 0, SIZE - 1).astype(int)
        return image[rows, cols]
    if kind == "washed-out":
        grey = image.mean((0, 1), keepdims=True)
        return (image + (0.3 + 0.4 * strength) * (grey - image)).astype(np.uint8)
    x, y, r = placed[int(rng.integers(len(placed)))]
    image, keep = image.copy(), round(r * (0.5 - 0.6 * strength))
    a, b = int(x), int(y)
    cut = np.zeros((SIZE, SIZE), bool)
    if rng.random() < 0.5:
        cut[:, max(a + keep, 0) : int(a + 1.3 * r) + 1] = True
    else:
        cut[max(b + keep, 0) : int(b + 1.3 * r) + 1] = True
    cut &= np.hypot(*(np.indices((SIZE, SIZE)) - np.array([y, x])[:, None, None])) < 1.3 * r
    image[cut] = image[0, 0]
    return image


def neatness(image, seen):
    """(fit, sharp, pure) in [0, 1]: of the shapes, of the edges, of the colours."""
    rgb = np.asarray(image, np.float32)
    distance = np.linalg.norm(rgb - np.median(rgb[:2].reshape(-1, 3), 0), axis=-1)
    inside = distance > 45
    if not seen["objects"] or not inside.any():
        return 0.0, 0.0, 0.0
    soft = ((distance > 12) & (distance < 0.75 * np.quantile(distance[inside], 0.6))).sum()
    rim = (inside ^ ndimage.binary_erosion(inside)).sum() + 1
    fit = (np.mean([o["fit"] for o in seen["objects"]]) - 0.6) / 0.35
    pure = (rgb.max(-1) - rgb.min(-1))[inside].mean() / 150
    return tuple(float(np.clip(v, 0, 1)) for v in (fit, 1.6 - 0.6 * soft / rim, pure))


def preference(image, prompt, seen=None):
    """The rule of this world's people: the share of the prompt's facts that hold, then neatness."""
    seen = seen or look(image)
    if not seen["objects"]:
        return 0.0
    true = np.mean(list(facts(image, parse(prompt), seen).values()))
    return float(true + 0.25 * np.dot((0.4, 0.35, 0.25), neatness(image, seen)))


def ranked_group(rng, split, size):
    """(prompt, images, ranks): `size` images, some wrong, some damaged; rank 1 is best."""
    scene = sample_split(rng, split)
    prompt, images, scores = caption(scene, int(rng.integers(5))), [], []
    for _ in range(size):
        shown = scene
        for _ in range(int(rng.choice(3, p=(0.45, 0.4, 0.15)))):
            spoilt = spoil_scene(rng, shown)[0] if len(shown["objects"]) < 4 else shown
            # no scene of a benchmark is shown in training
            while split == "train" and split_of(spoilt) != "train":
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
    """The rule of this world's AVA, in [1, 10]: contrast, balance, margin and saturation alike."""
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


# ---------------------------------------------------------------------------- benchmarks
def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def unique_scenes(rng, split, n, family=None):
    seen = {}
    while len(seen) < n:
        scene = sample_split(rng, split, family)
        seen.setdefault(scene_key(scene), scene)
    return list(seen.values())


def geneval_metadata(rng, split, per_task):
    """GenEval-like metadata, per_task prompts of each of the six tasks, no prompt twice."""
    families = {
        "single_object": "single",
        "colors": "single",
        "counting": "count",
        "position": "relation",
    }
    rows = []
    for task in TASKS:
        family, coloured = families.get(task, "pair"), task in ("colors", "color_attr")
        seen = {}
        for _ in range(20 * per_task):  # some tasks have fewer prompts than per_task
            scene = sample_split(rng, split, family)
            differ = len({o["shape"] for o in scene["objects"]}) == 2
            told_apart = coloured or differ or family in ("single", "count")
            if len(seen) < per_task and told_apart:
                text = caption(scene, 0, colour=coloured, size=False, background=False)
                key = " ".join(sorted(text.split())) if task == "two_object" else text
                seen.setdefault(key, text)
        rows += [parse(text) | {"tag": task} for text in seen.values()]
    return rows


def retrieval_rows(rng, split, root, n, name):
    """n scenes drawn into root / name.format(k), with their five captions."""
    rows = []
    for k, scene in enumerate(unique_scenes(rng, split, n)):
        rows.append(dict(image=name.format(k), texts=[caption(scene, f) for f in range(5)]))
        save_image(draw(rng, scene), root / rows[-1]["image"])
    return rows


def ranked_rows(rng, split, root, groups, folder, ties):
    """Groups of four images, or of four to seven where every two ranks are one: ties."""
    rows = []
    for g in range(groups):
        size = int(rng.integers(4, 8)) if ties else 4
        prompt, images, order = ranked_group(rng, split, size)
        for k, (image, rank) in enumerate(zip(images, order, strict=True)):
            rank = -(-rank // 2) if ties else rank
            name = f"{folder}/{g:05d}_{k}.png"
            rows.append(dict(image=name, texts=[prompt], group=g, rank=rank))
            save_image(image, root / rows[-1]["image"])
    return rows


def vote_rows(rng, split, root, n):
    """n scenes with votes, numbered as AVA's are: nobody's own 1.jpg, 2.jpg is one of them."""
    rows = []
    for k, scene in enumerate(unique_scenes(rng, split, n), 900001):
        image = draw(rng, scene)
        rows.append(dict(image=f"ava/images/{k}.png", votes=votes(rng, image).tolist()))
        save_image(image, root / rows[-1]["image"])
    return rows


def write_split(root, split, seed):
    """The five benchmarks in 04's format, and the prompts of 05 to 08, below `root`."""
    rng = np.random.default_rng([seed, split == "tune"])

    def write(name, rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (root / name).write_text("\n".join(lines) + "\n")

    coco = retrieval_rows(rng, split, root, 500, "coco/val2014/COCO_val2014_{:012d}.png")
    write("coco.jsonl", coco)
    write("flickr30k.jsonl", retrieval_rows(rng, split, root, 250, "flickr30k/Images/{}.jpg"))
    write("hpdv2.jsonl", ranked_rows(rng, split, root, 200, "hpdv2/test", ties=False))
    # ImageReward's lists have ties, which its accuracy leaves out
    imagereward = ranked_rows(rng, split, root, 100, "imagereward/test_images", ties=True)
    write("imagereward.jsonl", imagereward)
    write("ava.jsonl", vote_rows(rng, split, root, 500))
    scenes = unique_scenes(rng, split, 200)
    write("drawbench.txt", [caption(s, int(rng.integers(5))) for s in scenes])
    write("geneval.jsonl", geneval_metadata(rng, split, 40))


def write_training(root, images, seed):
    """Training images with three captions each, in COCO's captions format."""
    rng, coco = np.random.default_rng([seed, 2]), dict(images=[], annotations=[])
    for k in range(images):
        scene = sample_split(rng, "train")
        save_image(draw(rng, scene), root / "train" / f"{k:05d}.png")
        coco["images"].append(dict(id=k, file_name=f"{k:05d}.png"))
        for n in range(3):
            text = random_caption(rng, scene)
            coco["annotations"].append(dict(id=3 * k + n, image_id=k, caption=text))
    (root / "train_captions.json").write_text(json.dumps(coco))


def write_benchmarks(out, train_images=8000, seed=0):
    """Write all data below `out`, the same bytes for the same seed, in place of what is there."""
    final, out = Path(out), Path(f"{out}.{os.getpid()}.tmp")  # another process may draw as well
    again = final.exists()
    write_split(out, "report", seed)
    write_split(out / "tune", "tune", seed)
    write_training(out, train_images, seed)
    if again:
        shutil.rmtree(final)
    try:
        os.replace(out, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(out)  # the other was faster, and its bytes are the same


if __name__ == "__main__" and sys.argv[1:2] == ["check"]:
    pairs = zip(np.load(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()), strict=True)
    print(json.dumps([check(image, prompt) for image, prompt in pairs]))
elif __name__ == "__main__":
    write_benchmarks(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data")
