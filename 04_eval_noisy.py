"""Stage 04 -- how good is each estimate of E[r(z_0) | z_t], at five noise levels, and what does one value cost?

Paper   StitchVM (arXiv 2605.19804) Sec. 5.1, Table 5, Fig. 2: zero-shot retrieval (CLIP, DFN-CLIP), preference accuracy (HPSv2), Spearman (Aesthetic)
        at sigma in {.1, .25, .5, .75, .9}. And what the paper argues against without measuring: Tweedie r(D(zhat_0)) and Monte Carlo,
        the mean of r over N rollouts from z_t.
        Every reward here is linear in its unit embedding e, so each estimator is an embedding: V = <e, text>, and for Monte Carlo the mean of e.
            value_mse = mean over images and captions of (V(z_t, c) - r(x_0, c))^2, whose irreducible part is the same for all
Reads   out/value.pt, and value_vae.pt and value_noisyclip.pt where they exist; benchmark folders in the real formats
Writes  out/04_eval_noisy.json, out/04_quality.png (quality against sigma), out/04_cost.png (error against cost)
Run     python 04_eval_noisy.py                                                       # the miniature, four minutes on two cores
        python 04_eval_noisy.py --coco tests/mini/data/tune/coco --flickr30k ''       # on the tuning split
Departs from the paper: several noise draws and standard errors. Tweedie and Monte Carlo use the null text, as the value model does. Rollouts
        take the ancestral step, which samples p(z_0 | z_t); the SDE of (11) with another nu keeps the marginals only, and the ODE would make
        all N rollouts equal [D15].
"""
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (Backbone, Reward, add_noise, count, encode_prompts, fail, generator, gib, load_value, meta_backbone, meta_value, parse_stage, print_table,
                    read_image, report_dry_run, save_figure, save_table, square, stage_parser, tweedie)

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
MINI = {name: f"tests/mini/data/{name}" for name in ("coco", "flickr30k", "hpdv2", "imagereward", "ava")}
PRESETS = {"mini": dict(resolution=64, batch=100, rollout_batch=400, **MINI), "24gb": dict(resolution=512, batch=8, rollout_batch=8), "paper": dict(resolution=1024, batch=2, rollout_batch=2)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--coco", help="folder with coco_test_karpathy.json and its images (retrieval)")
    p.add_argument("--flickr30k", help="folder with flickr30k_test_karpathy.txt and its images (retrieval)")
    p.add_argument("--hpdv2", help="folder with test.json and test/ (ranked lists)")
    p.add_argument("--imagereward", help="folder with test.json and its images (ranked lists)")
    p.add_argument("--ava", help="folder with AVA.txt, images/ and test.jpgl (votes)")
    p.add_argument("--limit", type=int, help="use this many images of each benchmark at most")
    p.add_argument("--draws", type=int, default=2, help="noise draws for each image and sigma")
    p.add_argument("--mc-images", type=int, default=40, help="images of the first benchmark for Monte Carlo; value_mse_shared compares all methods on them")
    p.add_argument("--rollouts", type=int, default=32, help="rollouts per noisy latent; all of them together are the reference value")
    p.add_argument("--rollout-steps", type=int, default=20, help="steps of the full grid from 1 to 0; a rollout uses the nodes below its sigma")
    p.add_argument("--methods", nargs="+", default=["stitchvm", "vae-stitch", "noisyclip", "tweedie", "mc"], choices=("stitchvm", "vae-stitch", "noisyclip", "tweedie", "mc"))
    p.add_argument("--batch", type=int, help="images or latents at a time")
    p.add_argument("--rollout-batch", type=int, help="rollouts at a time")
    p.add_argument("--value", help="value model to evaluate as 'stitchvm' (default: value.pt in --out)")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def ancestral_step(z, z0_hat, t, s, noise):
    """z_s ~ q(z_s | z_t, z_0 = z0_hat) for s < t, of the Markov chain with marginals N((1-t) z_0, t^2): its reverse samples p(z_0 | z_t).

    z_t | z_s ~ N(a z_s, b^2), a = (1-t)/(1-s), b^2 = t^2 - a^2 s^2; z, z0_hat, noise (B, ...), t and s floats.
    """
    a = (1 - t) / (1 - s)
    b2 = t * t - a * a * s * s
    return ((1 - s) * b2 * z0_hat + a * s * s * z) / (t * t) + s * b2 ** 0.5 / t * noise


def recall_at_1(e, text, image_of):
    """Hits (image to text (n,), text to image (m,)) by embeddings e (n, E) and text (m, E); image_of (m,) is each caption's image."""
    scores = text @ e.T
    return (image_of[scores.argmax(0)] == torch.arange(len(e))).float(), (scores.argmax(1) == image_of).float()


def hpdv2_accuracy(scores, ranks):
    """One prompt's 1 - inversions / pairs: human ties count as correct, model ties are broken by argsort (HPSv2's evaluate_rank)."""
    order = torch.argsort(torch.argsort(scores, descending=True))
    wrong = ((order[:, None] < order[None]) & (ranks[:, None] > ranks[None])).sum()
    return 1 - wrong.item() / (len(ranks) * (len(ranks) - 1) / 2)


def imagereward_accuracy(scores, ranks):
    """One prompt's (correct pairs, pairs): human ties are left out, equal scores are wrong.

    ImageReward's test.py pools the pairs of all prompts (imagereward_accuracy); HPSv2's evaluate_IR averages over prompts (…_by_prompt).
    """
    better = ranks[:, None] < ranks[None]
    return int((better & (scores[:, None] > scores[None])).sum()), int(better.sum())


def spearman(a, b):
    """Spearman's rank correlation of two vectors."""
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic)


def calibration(v, r):
    """Mean and spread of values v against rewards r, all pairs of image and text, and the slope of r regressed on v: 1 for a conditional mean, 0 for a constant v."""
    centred = v - v.mean()
    return dict(mean_v=float(v.mean()), mean_r=float(r.mean()), std_v=float(v.std()), std_r=float(r.std()),
                slope=float((centred * r).mean() / centred.square().mean()) if v.max() > v.min() else 0.0)
# ---- to here ----


# ---- benchmarks: images, their texts, and what is compared with what
def need(path, what):
    if not Path(path).exists():
        fail(f"{path} does not exist: {what}")
    return Path(path)


RETRIEVAL = "of github.com/mehdidc/retrieval_annotations, release 1.0.0"
LISTS = {"hpdv2": "HPDv2's list of ranked images, test.json of the hub's data set ymhao/HPDv2", "imagereward": "ImageReward's, data/test.json of github.com/THUDM/ImageReward"}
IMAGES = {"coco_test_karpathy.json": "COCO's val2014.zip", "flickr30k_test_karpathy.txt": "Flickr30K's images", "hpdv2": "test.tar.gz of the hub's ymhao/HPDv2",
          "imagereward": "test_images.zip of the hub's THUDM/ImageReward", "test.jpgl": "AVA's images"}


def find(folder, name, file):
    """An image that a benchmark names, directly in its folder or in one of the usual subfolders."""
    for sub in ("", "val2014", "Images", "images", "test", "flickr30k-images"):
        if (Path(folder) / sub / name).exists():
            return Path(folder) / sub / name
    fail(f"{name}, which {file} names, is not in {folder}: get {IMAGES[file]} and unpack it there")


def retrieval_set(folder, kind):
    """Files (n), captions (m) and the image of each caption; n images of which each has several captions."""
    captions = {}
    if kind == "coco":
        file = need(Path(folder) / "coco_test_karpathy.json", f"the Karpathy test split in COCO's captions format, {RETRIEVAL}")
        coco = json.loads(file.read_text())
        name_of = {i["id"]: i["file_name"] for i in coco["images"]}
        for a in coco["annotations"]:
            captions.setdefault(name_of[a["image_id"]], []).append(a["caption"])
    else:
        file = need(Path(folder) / "flickr30k_test_karpathy.txt", f"the Karpathy test split, a header and then <id>.jpg,<caption>, {RETRIEVAL}")
        for line in file.read_text().splitlines()[1:]:
            name, caption = line.split(".jpg,", 1)
            captions.setdefault(name + ".jpg", []).append(caption)
    return dict(kind="retrieval", files=[find(folder, n, file.name) for n in captions], captions=list(captions.values()))


def ranked_set(folder, kind):
    """Prompts, each with files and human ranks (1 is best); HPDv2's and ImageReward's keys."""
    rows = json.loads(need(Path(folder) / "test.json", LISTS[kind]).read_text())
    keys = ("image_path", "rank") if kind == "hpdv2" else ("generations", "ranking")
    return dict(kind=kind, files=[find(folder, n, kind) for r in rows for n in r[keys[0]]], sizes=[len(r[keys[0]]) for r in rows],
                captions=[[r["prompt"]] for r in rows for _ in r[keys[0]]], ranks=[torch.tensor(r[keys[1]]) for r in rows])


def ava_set(folder):
    """Files and mean votes of AVA's test images."""
    votes = {r[1]: np.array(r[2:12], float) for r in (line.split() for line in need(Path(folder) / "AVA.txt", "AVA's votes, a line of 15 numbers an image, of its authors' AVA_dataset folder").read_text().splitlines())}
    names = need(Path(folder) / "test.jpgl", "the list of test image ids, one a line, of AVA's aesthetics_image_lists").read_text().split()
    return dict(kind="ava", files=[find(folder, f"{n}.png" if (Path(folder) / "images" / f"{n}.png").exists() else f"{n}.jpg", "test.jpgl") for n in names],
                captions=[[] for _ in names], votes=torch.tensor([votes[n] @ np.arange(1, 11) / votes[n].sum() for n in names]))


def load_benchmarks(args, reward):
    """{name: benchmark} for this reward, in order; the first is also the one of Monte Carlo."""
    if reward.head is not None:
        sets = {"ava": ava_set(args.ava)} if args.ava else {}
    elif "hps" in Path(args.reward).name:
        sets = {k: ranked_set(getattr(args, k), k) for k in ("hpdv2", "imagereward") if getattr(args, k)}
    else:
        sets = {k: retrieval_set(getattr(args, k), k) for k in ("coco", "flickr30k") if getattr(args, k)}
    if not sets:
        fail(f"no benchmark for {args.reward}: pass --coco or --flickr30k (CLIP), --hpdv2 or --imagereward (HPSv2), --ava (Aesthetic)")
    for s in sets.values():
        if args.limit and "sizes" in s:
            prompts = max(1, int((np.cumsum(s["sizes"]) <= args.limit).sum()))
            s["sizes"], s["ranks"] = s["sizes"][:prompts], s["ranks"][:prompts]
        n = sum(s["sizes"]) if "sizes" in s else args.limit
        s["files"], s["captions"] = s["files"][:n], s["captions"][:n]
        if "votes" in s:
            s["votes"] = s["votes"][:n]
        s["texts"] = list(dict.fromkeys(c for cs in s["captions"] for c in cs)) if s["kind"] != "retrieval" else [c for cs in s["captions"] for c in cs]
        s["image_of"] = torch.tensor([k for k, cs in enumerate(s["captions"]) for _ in cs])
        row = {c: k for k, c in enumerate(s["texts"])}
        s["own"] = [row[cs[0]] if cs else 0 for cs in s["captions"]]  # each image's own text: its first caption, its prompt
    return sets


def measure(bench, e, text, subset=None):
    """{metric: (units, value)}: per-unit results (for standard errors) of embeddings or, for the aesthetic reward, scores e (n, ...)."""
    n = len(e)
    if bench["kind"] == "retrieval":
        if subset:  # a few images against all captions: text to image would need the whole gallery
            return {"recall@1_i2t": (bench["image_of"][(text @ e.T).argmax(0)] == torch.arange(n)).float()}
        return dict(zip(("recall@1_i2t", "recall@1_t2i"), recall_at_1(e, text, bench["image_of"])))
    if bench["kind"] == "ava":
        return {"srcc": spearman(e, bench["votes"][:n]) if e.max() > e.min() else None}
    score = (e * text[bench["own"][:n]]).sum(-1)
    groups, start = [], 0
    for size, ranks in zip(bench["sizes"], bench["ranks"]):
        if start + size <= n:
            groups.append((score[start:start + size], ranks))
        start += size
    if bench["kind"] == "hpdv2":
        return {"hpdv2_accuracy": torch.tensor([hpdv2_accuracy(s, r) for s, r in groups])}
    counts = torch.tensor([imagereward_accuracy(s, r) for s, r in groups], dtype=torch.float64)
    return {"imagereward_accuracy": counts, "imagereward_accuracy_by_prompt": (counts[:, 0] / counts[:, 1])[counts[:, 1] > 0]}


def summary(draws, metric, n):
    """Mean and standard error of a metric over its units (images, captions, prompts), each averaged over the noise draws first."""
    if metric == "srcc":
        if None in draws:
            return None, None
        rho = float(np.mean(draws))
        return rho, (1 - rho ** 2) / (n - 1) ** 0.5  # the large-sample error of a correlation
    units = torch.stack(draws).double().mean(0)
    if metric == "imagereward_accuracy":  # pooled over pairs; the error treats prompts as the independent units (ratio estimator)
        value = units[:, 0].sum() / units[:, 1].sum()
        residual = units[:, 0] - value * units[:, 1]
        return float(value), float(residual.std() * len(units) ** 0.5 / units[:, 1].sum())
    return float(units.mean()), float(units.std() / len(units) ** 0.5) if len(units) > 1 else None


def embed_files(files, backbone, reward, resolution, batch):
    """Of image files: latents of the centre square (n, C, h, w), its unit embeddings (n, E), and those of the whole file by the reward's own transform."""
    rows = []
    for k in tqdm(range(0, len(files), batch), desc="images", leave=False):
        try:
            images = [read_image(f) for f in files[k:k + batch]]
        except (OSError, ValueError) as e:
            fail(f"a benchmark image cannot be read ({e}); a benchmark is scored whole: get the file again")
        x = torch.stack([square(i, resolution) for i in images]).to(backbone.device).float() / 255
        own = torch.stack([reward.transform(i) for i in images]).to(backbone.device)
        rows.append((backbone.encode_image(x), *(F.normalize(v, dim=-1) for v in (reward.embed(x)[0], reward.visual(own)))))
    return tuple(torch.cat(v) for v in zip(*rows))


# ---- estimators
class Tweedie:
    """e of r(D(zhat_0)): one denoiser call with the null text, decode, reward."""

    def __init__(self, backbone, reward, null):
        self.backbone, self.reward, self.null = backbone, reward, null

    def embed(self, z, sigma):
        u = self.backbone.velocity(z, sigma, self.null)
        return F.normalize(self.reward.embed(self.backbone.decode(tweedie(z, u, sigma)))[0], dim=-1)


def rollout_embeddings(backbone, reward, null, z, t, grid, rollouts, g, batch):
    """Unit embeddings (n, rollouts, E) of samples of p(z_0 | z_t): z (n, C, h, w) at one sigma t, grid the noise levels below it, down to 0."""
    nodes = [t, *[s for s in grid.tolist() if s < t - 1e-4]]
    z, out = z.repeat_interleave(rollouts, 0), []
    for part in z.split(batch):
        for a, b in zip(nodes[:-1], nodes[1:]):
            sigma = torch.full((len(part),), a, device=part.device)
            z0_hat = tweedie(part, backbone.velocity(part, sigma, null), sigma)
            part = z0_hat if b == 0 else ancestral_step(part, z0_hat, a, b, torch.randn(part.shape, generator=g).to(part.device))
        out.append(F.normalize(reward.embed(backbone.decode(part))[0], dim=-1))
    return torch.cat(out).unflatten(0, (-1, rollouts)), len(nodes) - 1


def cost(call, z, sigma, repeats=5):
    """A function that times one call, and the GFLOP of one value: 2 x multiply-adds of matrix products and convolutions."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the fused kernels are not counted
        call(z[:2].requires_grad_(True), sigma[:2])
    def once():
        if z.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call(z.detach(), sigma)
        if z.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(z) * 1e3
    return once, counter.get_total_flops() / 2 / 1e9


@torch.no_grad()
def dry_run(args):
    reward = Reward(args.reward, args.preset, "meta", weights=False)
    backbone, null = meta_backbone(args.backbone)
    values = {f"stitchvm, i = {i}": meta_value(backbone, null, reward, i, args.resolution)[0] for i in (4, 12)}
    z, sigma = torch.empty(1, 16, args.resolution // 8, args.resolution // 8, device="meta"), torch.empty(1, device="meta")
    calls = {name: (lambda model: lambda: model.embed(z, sigma))(model) for name, model in values.items()}
    calls["tweedie"] = lambda: Tweedie(backbone, reward, null).embed(z, sigma)
    grid = backbone.grid(args.rollout_steps, z)
    calls["mc-1"] = lambda: rollout_embeddings(backbone, reward, null, z, 0.5, grid, 1, generator(0), 1)
    weights = gib(backbone.transformer, reward.model)
    cases = []
    for name, call in calls.items():
        tflop, saved = count(call)
        peak = weights + (gib(values[name]) if name in values else gib(backbone.vae))
        cases.append(dict(method=name, unit="value at sigma 0.5", tflop=tflop, saved_gib=saved, peak_gib=peak, n=5 * 2 * 5000))  # five sigmas, two draws, COCO's 5,000 images
    report_dry_run(args, "04_eval_noisy", cases, [backbone.transformer, backbone.vae, reward.model])


@torch.no_grad()
def main(args):
    if args.dry_run:
        return dry_run(args)
    if args.rollouts < 2:
        fail(f"--rollouts {args.rollouts}: the reference value needs two at least, its own error is that between its halves")
    device = torch.device(args.device)
    reward = Reward(args.reward, args.preset, device)
    benches = load_benchmarks(args, reward)
    backbone = Backbone(args.backbone, args.preset, device, getattr(torch, args.dtype))
    null = encode_prompts(backbone, [""])
    methods, parents = {}, []
    for name, file, how in (("stitchvm", args.value or Path(args.out) / "value.pt", None), ("vae-stitch", Path(args.out) / "value_vae.pt", "--front vae"),
                            ("noisyclip", Path(args.out) / "value_noisyclip.pt", "--objective noisyclip")):
        if name not in args.methods:
            continue
        if how and not Path(file).exists():
            print(f"warning: no {name} rows, {file} does not exist; make it with: python 03_finetune.py {how} --out {args.out}")
            continue
        methods[name], artifact = load_value(file, backbone, reward, {"resolution": args.resolution})
        parents.append(dict(stage=artifact["stage"], id=artifact["id"], method=name))
    if "tweedie" in args.methods:
        methods["tweedie"] = Tweedie(backbone, reward, null)
    grid = backbone.grid(args.rollout_steps, torch.zeros(1, 1, args.resolution // 8, args.resolution // 8))

    rows = []
    for bench_name, bench in benches.items():
        z0, e_rm, clean = embed_files(bench["files"], backbone, reward, args.resolution, args.batch)
        text = reward.encode_text(bench["texts"]) if reward.uses_text else None
        score = lambda e: (e @ text.T if reward.uses_text else reward.score(e)).cpu()  # (n, m), or (n,) without text
        comparable = lambda e: e.cpu() if reward.uses_text else score(e)
        first = bench_name == next(iter(benches))
        sub = monte_carlo_images(bench, args.mc_images) if first and "mc" in args.methods else 0
        r, n = score(e_rm), len(z0)

        def add_rows(method, sigma, draws, own, **about):
            results = [measure(bench, comparable(e), text.cpu() if reward.uses_text else None, subset=own < n) for e in draws]
            for metric in results[0]:
                value, se = summary([m[metric] for m in results], metric, own)
                rows.append(dict(method=method, benchmark=bench_name, sigma=sigma, metric=metric, value=value, value_se=se, n=own, draws=len(draws), **about))

        add_rows("clean", 0.0, [clean], n)
        for sigma in tqdm(SIGMAS, desc=bench_name):
            eps = [torch.randn(z0.shape, generator=generator(args.seed, bench_name, sigma, d)).to(device) for d in range(args.draws)]
            level = lambda n: torch.full((n,), sigma, device=device)
            estimates = {"constant": [e_rm.mean(0, keepdim=True).expand_as(e_rm)]}
            for name, method in methods.items():
                estimates[name] = [torch.cat([method.embed(z, level(len(z))) for z in add_noise(z0, e, level(n)).split(args.batch)]) for e in eps]
            reference = steps = None
            if sub:
                zt = add_noise(z0[:sub], eps[0][:sub], level(sub))
                samples, steps = rollout_embeddings(backbone, reward, null, zt, sigma, grid, args.rollouts, generator(args.seed, "rollouts", sigma), args.rollout_batch)
                estimates |= {f"mc-{k}": [samples[:, :k].mean(1)] for k in (1, 4, 16, args.rollouts) if k <= args.rollouts}
                half = [score(samples[:, h::2].mean(1)) for h in (0, 1)]
                reference = (half[0] + half[1]) / 2, float((half[0] - half[1]).square().mean() / 4)  # and the variance of its own error
            for name in [name for name, draws in estimates.items() if not all(e.isfinite().all() for e in draws)]:  # NaN would rank as well as it sorts
                fail(f"{name} gives NaN or infinity at sigma {sigma} of {bench_name}: try --dtype float32")
            for name, draws in estimates.items():
                own = sub if name.startswith("mc-") else n
                about = error_of([score(e) for e in draws], r[:own], bench["own"][:own])
                if sub:
                    about |= shared_error(score(draws[0][:sub]), r[:sub], *reference, part=name.startswith("mc-"))
                if name.startswith("mc-"):
                    about["rollout_steps"] = steps
                add_rows(name, sigma, draws, own, **about)
        if first:
            costs = measure_cost(methods, backbone, reward, null, z0[:min(32, args.batch, n)], grid, args)
    for row in rows:
        name, sigma = row["method"], row["sigma"]
        if name.startswith("mc-"):  # N rollouts cost N times one
            row.update({k: int(name[3:]) * v for k, v in costs["mc", sigma].items()})
        else:
            row.update(costs.get((name, sigma), dict(ms_per_value=None, gflop_per_value=None)))
    print_table(rows, ("method", "benchmark", "sigma", "metric", "value", "value_se", "n", "value_mse", "value_mse_shared", "reference_mse", "slope", "ms_per_value", "gflop_per_value"))
    save_table(args, "04_eval_noisy", rows, values=parents)
    draw_quality(rows, next(iter(benches)), Path(args.out) / "04_quality.png", f"{args.reward} + {args.backbone}")
    draw_cost([r for r in rows if r["benchmark"] == next(iter(benches))], Path(args.out) / "04_cost.png", f"{args.reward} + {args.backbone}")


def monte_carlo_images(bench, wanted):
    """How many of the first images Monte Carlo gets: for ranked lists, whole lists only."""
    if "sizes" not in bench:
        return min(wanted, len(bench["files"]))
    ends = np.cumsum(bench["sizes"])
    return int(ends[ends <= wanted].max(initial=bench["sizes"][0]))


def error_of(draws, r, own):
    """value_mse of scores (n, m) or (n,) of several noise draws against r, its standard error over images, and the calibration of the first."""
    errors = torch.stack([(v - r).square().reshape(len(r), -1).mean(1) for v in draws]).mean(0)
    about = dict(value_mse=float(errors.mean()), value_mse_se=float(errors.std() / len(r) ** 0.5), **calibration(draws[0], r))
    if r.ndim == 2:
        matched = (torch.arange(len(r)), torch.tensor(own))
        about |= dict(matched_v=float(draws[0][matched].mean()), matched_r=float(r[matched].mean()))
    return about


def shared_error(v, r, reference, variance, part):
    """Errors on the noisy latents that every method is given: against r, and against the many-rollout reference, whose own error has this variance.

    E gap^2 = E(V - V*)^2 + variance; but if V is the mean of a part of the reference's rollouts, E gap^2 = E(V - V*)^2 - variance.
    """
    gap = v - reference
    errors = (v - r).square().reshape(len(r), -1).mean(1)
    return dict(value_mse_shared=float(errors.mean()), value_mse_shared_se=float(errors.std() / len(errors) ** 0.5), reference_bias=float(gap.mean()),
                reference_mse=float(gap.square().mean()) + (variance if part else -variance))


def measure_cost(methods, backbone, reward, null, z0, grid, args):
    """{(method, sigma): ms and GFLOP of one value}, methods timed in turn in one run, the median of five; 'mc' is one rollout."""
    calls, level = {}, torch.full((len(z0),), 0.5, device=z0.device)
    for name, method in methods.items():
        calls[name] = cost(method.embed, z0.clone(), level)
    calls["denoiser"] = cost(lambda z, s: backbone.velocity(z, s, null), z0.clone(), level)
    calls["decode and reward"] = cost(lambda z, s: reward.embed(backbone.decode(z)), z0.clone(), level)
    times = [{name: once() for name, (once, _) in calls.items()} for _ in range(6)][1:]
    one = {name: dict(ms_per_value=float(np.median([t[name] for t in times])), gflop_per_value=flops) for name, (_, flops) in calls.items()}
    costs = {(name, s): one[name] for name in methods for s in SIGMAS}
    for s in SIGMAS:
        steps = sum(1 for n in grid.tolist() if n < s - 1e-4)
        costs["mc", s] = {k: steps * one["denoiser"][k] + one["decode and reward"][k] for k in one["denoiser"]}
    return costs


COLOURS = {"stitchvm": "tab:red", "vae-stitch": "tab:blue", "noisyclip": "tab:green", "tweedie": "tab:orange", "constant": "tab:gray",
           "mc-1": "tab:purple", "mc-4": "tab:purple", "mc-16": "tab:purple"}


def draw_quality(rows, bench, path, title):
    import matplotlib.pyplot as plt
    rows = [r for r in rows if r["benchmark"] == bench]
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    figure, axes = plt.subplots(1, len(metrics) + 1, figsize=(4.6 * (len(metrics) + 1), 3.6), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for name in dict.fromkeys(r["method"] for r in rows):
            mine = [r for r in rows if r["method"] == name and r["metric"] == metric and r["value"] is not None]
            if name == "clean":
                axis.axhline(mine[0]["value"], ls="--", color="black", label="clean images")
            elif mine and name != "constant" and not name.startswith("mc-"):
                axis.errorbar([r["sigma"] for r in mine], [r["value"] for r in mine], [r["value_se"] or 0 for r in mine], marker="o", ms=4, capsize=2, color=COLOURS.get(name), label=name)
        axis.set(xlabel="sigma", title=f"{metric} ({bench}, n = {rows[0]['n']})")
    axis = axes[0, -1]
    for name in dict.fromkeys(r["method"] for r in rows if r["method"] != "clean"):
        mine = [r for r in rows if r["method"] == name and r["metric"] == metrics[0] and "value_mse_shared" in r]
        if mine and name in COLOURS:
            axis.plot([r["sigma"] for r in mine], [r["value_mse_shared"] for r in mine], marker="o", ms=4, ls={"mc-1": ":", "mc-4": "-.", "mc-16": "-"}.get(name, "-"), color=COLOURS[name], label=name)
    axis.set(xlabel="sigma", yscale="log", title="error of the value, (V - r)^2")
    for axis in axes[0]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_cost(rows, path, title):
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(SIGMAS), figsize=(3.2 * len(SIGMAS), 3.4), sharex=True)
    for axis, sigma in zip(axes, SIGMAS):
        seen = {}
        for r in rows:
            if r["sigma"] == sigma and r.get("value_mse_shared") is not None:
                seen.setdefault(r["method"], r)
        for name, r in seen.items():
            if r["ms_per_value"]:
                axis.plot(r["ms_per_value"], r["value_mse_shared"], "o", color=COLOURS.get(name, "tab:purple"))
                axis.annotate(name, (r["ms_per_value"], r["value_mse_shared"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        if "constant" in seen:
            axis.axhline(seen["constant"]["value_mse_shared"], ls=":", color="gray")
        axis.set(title=f"sigma {sigma}", xscale="log", yscale="log", xlabel="ms per value")
        axis.margins(0.25)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("(V - r)^2; dotted: constant")
    figure.suptitle(title)
    save_figure(figure, path)


if __name__ == "__main__":
    main(parse_args())
