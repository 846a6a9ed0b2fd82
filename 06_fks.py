"""Stage 06 -- Feynman-Kac steering: particles are copied or dropped by their value on the way.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.2, App. C.2, D.2, Algorithm 1, Eq. (9); SDE of (11)
            weights    G_k = exp(lam (V(zbar_{k-1}) - V(z_k))), then N are drawn in proportion
            proposals  in the first 40 % of the steps (--propose) argmax_m V(zbar^(m)) goes on
        Methods on the same noises: flow, bon (best of N), prune (bon without those that V drops on
        the way), fks (V by Tweedie, r(D(zhat_0)) of the step's own velocity), fks+stitchvm
        (proposals by V; --potential-value: the weights too).
Reads   value.pt of each reward (03), prompts. Another backbone's value on the same VAE will do
Writes  out/06_fks.json, 06_scaling.png, 06_grid.png, 06_spread.json (the unit of --lam); with
        --save-images 06_images/ in GenEval's layout; while it runs 06_fks.parts/ for --resume
Run     python 06_fks.py
        python 06_fks.py --methods bon prune --n 4 8 16 --prune-at 0.36
        python 06_fks.py --backbone sd3.5-large --value runs/mini/sd3.5-medium_clip/value.pt
Departs from the paper: lam is in units of the reward's spread; weights are carried over steps that
        do not resample and end with the clean reward; --proposal corrected is unbiased [D13].
        With CFG the winner's prefix is resumed as the denoiser's unconditional half [D10].
"""

import json
import math
import os
import shutil
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from common import (
    COUNT,
    FINITE,
    SHARE,
    Backbone,
    Reward,
    clean_reward,
    digest,
    draw_lines,
    fail,
    fingerprints,
    generator,
    gflop,
    image_grid,
    joint_value,
    keep_or_drop,
    load_prompts,
    load_values,
    mean_and_error,
    now,
    once,
    parse_stage,
    print_table,
    save_table,
    score_images,
    sde_step,
    shares_prefix,
    stage_parser,
    state_cat,
    state_index,
    timing,
    tweedie,
    value_files,
    within,
    write_images,
)

# flags that --resume may change
FREE = ("out", "device", "value", "scorers", "save_images", "resume", "restart", "compile")
FREE += ("offload",)
METHODS = ("flow", "bon", "prune", "fks", "fks+stitchvm")
MINI = dict(resolution=64, shift=1.0, batch=64, prompts="tests/mini/data/drawbench.txt", limit=40)
MINI |= dict(adaptive=0.5, resampling="systematic", potential_value=["tweedie", "stitchvm"])
MINI |= dict(scorers=["clip", "dfn-clip", "hpsv2", "aesthetic", "judge"])
PAPER = dict(resolution=1024, batch=8, scorers=["clip", "hpsv2"])
PRESETS = {"mini": MINI, "24gb": PAPER | dict(resolution=512), "paper": PAPER}


def parse_args(argv=None):
    p = stage_parser(__file__, __doc__, PRESETS)
    add = p.add_argument
    several = partial(add, nargs="+")
    add("--prompts", help="text file, JSON list or GenEval's JSON lines")
    add("--limit", type=COUNT, help="prompts at most")
    several("--methods", default=METHODS, choices=METHODS, help="what is compared")
    several("--value", help="value model of each reward; None: value.pt of its run folder")
    several("--n", type=COUNT, default=[4], help="particles, a row for each number")
    several("--m", type=COUNT, default=[2], help="proposals of fks+stitchvm, a row for each number")
    several("--n-stitchvm", type=COUNT, help="particles of fks+stitchvm; None: --n")
    several("--prune-at", type=within(float, 0, 0.99), default=[0.36], help="sigmas; see prune()")
    several("--lam", type=FINITE, default=[1.0], help="strength, in units of the reward's spread")
    several("--raw-lam", type=FINITE, help="strength in units of the reward, instead of --lam")
    add("--potential", choices=("diff", "rt", "max", "add"), default="diff", help="see weigh()")
    ways = ("tweedie", "stitchvm")
    several("--potential-value", choices=ways, default=["tweedie"], help="by what they are weighed")
    several("--proposal", choices=("argmax", "corrected"), default=["argmax"], help="see choose()")
    several("--report", choices=("best", "mean"), default=["best"], help="see select()")
    add("--resampling", choices=("multinomial", "systematic"), default="multinomial", help="scheme")
    add("--adaptive", type=SHARE, help="resample below this share of N effective; None: always")
    add("--steps", type=COUNT, help="of the sampler; None: 40, FLUX 28")
    add("--shift", type=within(float, 0.01), help="of the noise levels; None: the scheduler's own")
    add("--cfg", type=FINITE, help="guidance; None: 4.5, FLUX 1, its own is 3.5")
    add("--fk-every", type=COUNT, default=4, help="steps between two weighings")
    add("--fk-start", type=COUNT, help="first step after which they are; None: a fifth of --steps")
    add("--fk-end", type=COUNT, help="last such step; None: four fifths")
    add("--propose", type=SHARE, default=0.4, help="share of the steps that make proposals")
    add("--propose-after", type=SHARE, default=0.0, help="share of the steps before those")
    add("--spread-samples", type=within(int, 2), default=8, help="a prompt, for --lam's unit")
    several("--scorers", help="rewards that score the images, besides --reward")
    add("--batch", type=COUNT, help="latents at a time")
    add("--save-images", action="store_true", help="write the reported images")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    add("--offload", action="store_true", help="blocks stay on the CPU and visit the card")
    add("--resume", action="store_true", help="go on from <out>/06_fks.parts")
    add("--restart", action="store_true", help="drop what an unfinished run left there")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
# from common: sde_step, state_index, tweedie
def normalised(logw):
    """Weights (..., n) that sum to one; equal ones where every particle is dead."""
    return torch.where((logw == -math.inf).all(-1, keepdim=True), 0.0, logw).softmax(-1)


def pick(w, u):
    """Inverse CDF: indices (..., k), never of weight zero; w (..., n), u (..., k) in [0, 1]."""
    c = w.cumsum(-1)
    u = u.clamp(max=1 - torch.finfo(u.dtype).eps)
    return torch.searchsorted(c / c[..., -1:], u, right=True)


def ancestors(w, u, scheme="multinomial"):
    """Who goes on, (P, N), by weights w and uniforms u (P, N); systematic uses one of a row."""
    if scheme == "systematic":
        u = (torch.arange(w.shape[1], device=w.device) + u[:, :1]) / w.shape[1]
    return pick(w, u)


def choose(v, lam, u, proposal="argmax"):
    """One of M by values v (..., M), and the log of its particle's factor; u (...) uniform.

    argmax: Algorithm 1, no factor. corrected: m in proportion to exp(lam v_m), with the factor
    mean_m exp(lam v_m). What is not finite is not chosen.
    """
    v = torch.where(v.isfinite(), v, -math.inf)  # trap: argmax prefers NaN
    if proposal == "argmax":
        return v.argmax(-1), torch.zeros_like(u)
    logw = torch.where(v.isfinite(), lam * v, -math.inf)
    return pick(normalised(logw), u[..., None])[..., 0], logw.logsumexp(-1) - math.log(v.shape[-1])


def new_books(z, potential="diff"):
    """What is noted of particles z (P, N, ...): a dict of (P, N) tensors.

    logw: log weight since the last resampling; paid: log of all factors of its line; running: its
    last value, the highest or their sum; origin: first ancestor. Of a prompt, (P,): killed, how
    many died; ess, the sum of effective sample sizes.
    """
    zeros = z.new_zeros(z.shape[:2])
    running = zeros - math.inf if potential == "max" else zeros
    origin = torch.arange(z.shape[1], device=z.device).expand(z.shape[:2])
    books = dict(logw=zeros, paid=zeros, running=running, origin=origin)
    return dict(books, killed=zeros[:, 0], ess=zeros[:, 0])


def pay(books, gain, debt, divide):
    """Books after factors exp(gain), of which a later one divides out exp(debt); both (P, N).

    divide: divide out now what was paid so far. What is not finite kills its particle only.
    """
    paid = debt if divide else books["paid"] + debt
    gain = gain - books["paid"] if divide else gain
    alive = gain.isfinite() & paid.isfinite()
    dies = ~alive & (books["logw"] > -math.inf)
    logw = torch.where(alive, books["logw"] + gain, -math.inf)
    paid = torch.where(alive, paid, books["paid"])
    return dict(books, logw=logw, paid=paid, killed=books["killed"] + dies.sum(1))


def weigh(books, v, lam, potential="diff", last=False):
    """Books after the potential of values v (P, N).

    diff: exp(lam (v - the last v)); rt: exp(lam v); max: exp(lam max of all so far); add: exp(lam
    sum of them). last: v is the clean reward and what was paid is divided out, so that a line's
    factors multiply to exp(lam r(z_0)), under max to exp(lam max), under add to exp(lam sum).
    """
    old = books["running"]
    running = {"diff": v, "rt": v, "max": torch.maximum(old, v), "add": old + v}[potential]
    books = pay(books, lam * running, lam * running, last or potential == "diff")
    return dict(books, running=torch.where(v.isfinite(), running, old))


def resample(books, u, scheme="multinomial", adaptive=None):
    """Books of those that go on, and where these were: indices (P, N) into all P N; u (P, N).

    A prompt's particles stay where more than `adaptive` N of them are effective; None: none do.
    """
    w = normalised(books["logw"])
    P, N = w.shape
    ess = 1 / w.square().sum(1)
    renew = ess[:, None] < (math.inf if adaptive is None else adaptive * N)
    index = torch.where(renew, ancestors(w, u, scheme), torch.arange(N, device=w.device))
    books = {k: x.gather(1, index) if x.ndim == 2 else x for k, x in books.items()}
    books |= dict(logw=torch.where(renew, 0.0, books["logw"]), ess=books["ess"] + ess)
    return books, index + N * torch.arange(P, device=w.device)[:, None]


def select(r, books, u, report="best"):
    """Who stands for a prompt, (P, R): the highest of r (P, N), or N drawn by final weights."""
    if report == "best":
        return torch.where(r.isfinite(), r, -math.inf).argmax(1, keepdim=True)
    return ancestors(normalised(books["logw"]), u, "systematic")


def prune(z, grid, denoise, noise, value, levels):
    """z_0 and books of those left of N particles z (P, N, C, h, w): (P, n, ...), by falling V.

    Where sigma comes down to one of `levels` the half of lower V is dropped, what is not finite
    first; the last particle stays. The arguments but `levels` are those of steer().
    """
    books = new_books(z)
    prompts = torch.arange(len(z), device=z.device)[:, None]
    for k, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        u = denoise(z.flatten(0, 1), t, None).view_as(z)
        z = sde_step(z, u, t, s, noise(k, 1)[prompts, books["origin"], 0])
        n = math.ceil(z.shape[1] / 2 ** sum(t > level >= s for level in levels))
        if n < z.shape[1]:
            v = value(z.flatten(0, 1), s)[0].view(z.shape[:2])
            index = torch.where(v.isfinite(), v, -math.inf).topk(n).indices
            books = weigh(books, v, 0.0)  # counts those whose V is not finite
            books = {k: x.gather(1, index) if x.ndim == 2 else x for k, x in books.items()}
            z = z[prompts, index]
    return z, books


def steer(z, grid, denoise, noise, uniform, score, value, lam, fk_steps, propose, M, rules):
    """z_0 of N particles for each of P prompts, and their books before the clean reward.

    z (P, N, C, h, w) at grid[0]; of step k, on z's device, noise(k, M) (P, N, M, C, h, w) and
    uniform(k) (2, P, N). Nothing here waits for the device.
    denoise(z (B, C, h, w), t, prefix) -> velocity; score(z_0) -> rewards (B,); value(z, t) -> V
    (B,) and the prefix state that the next denoise may resume, or None.
    After fk_steps, which count from 1, particles are weighed and resampled; the steps k in propose
    make M proposals. rules: proposal, potential, resampling (a scheme) and adaptive as
    above; by: 'tweedie', score of the step's one-step estimate, or 'stitchvm', value after it.
    """
    shape = z.shape
    books = new_books(z, rules["potential"])
    prefix = None
    for k, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        u = denoise(z.flatten(0, 1), t, prefix)
        draw, choice = uniform(k)
        proposes = k in propose and M > 1 and s > 0
        pays = proposes and rules["proposal"] == "corrected"
        # under diff it pays V in full: another value at the same step would divide that out
        paid_up = pays and rules["potential"] == "diff"
        by = rules["by"] if k + 1 in fk_steps and not paid_up else None
        if by == "tweedie":
            v = score(tweedie(z.flatten(0, 1), u, z.new_full((1,), t)))
            books = weigh(books, v.view(shape[:2]), lam, rules["potential"])
        noises = noise(k, M if proposes else 1)
        z = sde_step(z[:, :, None], u.reshape(shape)[:, :, None], t, s, noises).flatten(0, 2)
        prefix = None
        if proposes or by == "stitchvm":
            v, state = value(z, s)
            v = v.view(*shape[:2], -1)
            best, gain = choose(v, lam, choice, rules["proposal"])
            chosen = torch.arange(0, len(z), v.shape[2], device=z.device) + best.flatten()
            z = z[chosen]
            v = v.flatten()[chosen].view(shape[:2])
            prefix = state and state_index(state, chosen)
            if pays:
                books = pay(books, gain, lam * v, paid_up)
            if by == "stitchvm":
                books = weigh(books, v, lam, rules["potential"])
        if k + 1 in fk_steps:
            books, index = resample(books, draw, rules["resampling"], rules["adaptive"])
            z = z[index.flatten()]
            prefix = prefix and state_index(prefix, index.flatten())
        z = z.view(shape)
    return z, books


# ---- to here ----


class Models:
    """What steer() and prune() call; how many rows of each call have run, and GFLOP of one."""

    def __init__(self, args, texts):
        names = args.reward.split("+")
        files = value_files(args, names) if {"prune", "fks+stitchvm"} & {*args.methods} else []
        which = args.preset, args.device, getattr(torch, args.dtype)
        self.backbone = Backbone(args.backbone, *which, args.compile, args.offload)
        self.backbone.set_shift(args.shift)
        complete(args, self.backbone)
        self.embedded = self.backbone.prompts(texts, cache=args.out)  # before the rest is loaded
        self.null = [v.to(args.device) for v in self.backbone.prompts([""], cache=args.out)]
        self.rewards = [Reward(name, *which) for name in names]
        self.read = [reward.text(texts) for reward in self.rewards]
        given = self.backbone, self.rewards[: len(files)], args.resolution
        self.values, self.parents = load_values(files, *given)
        self.shares = shares_prefix(self.values, self.backbone, self.null, args.cfg)
        self.weights = fingerprints(self.backbone.transformer, self.rewards, 1)
        self.spec = {k: v for k, v in vars(args).items() if k not in FREE} | self.weights
        self.spec |= dict(texts=digest(texts), values=[a["id"] for a in self.parents])
        self.cfg = args.cfg
        self.batch = args.batch
        self.rows = Counter()
        self.gflop = {}

    def take(self, prompts):
        """Go over to these prompts, numbers: their embeddings go to the device, once for all."""
        self.prompts = torch.arange(len(prompts), device=self.backbone.device)
        self.condition = [v[prompts].to(self.backbone.device) for v in self.embedded]
        self.texts = [t if t is None else t[prompts] for t in self.read]

    def run(self, call, z, t=0.0, state=None):
        """What call(z, sigma, prompts, **state) gives for z (B, C, h, w), `batch` rows at a time.

        B is a multiple of the number of self.prompts, whose rows follow each other.
        """
        prompts = self.prompts.repeat_interleave(len(z) // len(self.prompts))
        sigma = torch.full((len(z),), t, device=z.device)
        rows = dict(state or {}, z=z, sigma=sigma, prompts=prompts)
        kind = f"resumed {call.__name__}" if state else call.__name__
        if kind not in self.gflop:
            self.gflop[kind] = gflop(partial(call, **state_index(rows, slice(1))))
        self.rows[kind] += len(z)
        cuts = [slice(k, k + self.batch) for k in range(0, len(z), self.batch)]
        found = zip(*(call(**state_index(rows, c)) for c in cuts), strict=True)
        return [torch.cat(x) if torch.is_tensor(x[0]) else x[0] and state_cat(x) for x in found]

    def velocity(self, z, sigma, prompts, **state):
        condition = [v[prompts] for v in self.condition]
        u = self.backbone.velocity(z, sigma, condition, self.null, self.cfg, prefix=state or None)
        return (u,)

    def joint(self, z, sigma, prompts):
        texts = [t if t is None else t[prompts] for t in self.texts]
        v, states = joint_value(self.values, z, sigma, texts)
        return v, states[id(self.backbone.transformer)] if self.shares else None

    def clean(self, z, sigma, prompts):
        texts = [t if t is None else t[prompts] for t in self.texts]
        images = self.backbone.decode(z)
        return images, clean_reward(self.rewards, texts, images)

    def denoise(self, z, t, prefix):
        return self.run(self.velocity, z, t, prefix)[0]

    def value(self, z, t):
        return self.run(self.joint, z, t)

    def score(self, z0):
        return self.run(self.clean, z0)[1]


def send(x, device):
    """x on the device, without waiting for what it was given before."""
    # trap: a copy of memory that is not pinned waits, non_blocking or not
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def draw_noise(seed, prompts, N, shape, device, k, M=1):
    """(P, N, M, C, h, w), by prompt, particle and step: the same for every method, N, M, batch."""
    seeds = [(seed, "noise", p, n, k) for p, n in product(prompts, range(N))]
    draws = [torch.randn(M, *shape, generator=generator(*s)) for s in seeds]
    return send(torch.stack(draws).unflatten(0, (-1, N)), device)


def draw_uniforms(seed, prompts, N, device, k):
    """(2, P, N), likewise."""
    draws = [torch.rand(N, 2, generator=generator(seed, "uniform", p, k)).T for p in prompts]
    return send(torch.stack(draws, 1), device)


def complete(args, backbone):
    """Fill in what depends on the backbone and on --steps."""
    steps = args.steps or (28 if backbone.is_flux else 40)
    start, end = (max(1, round(share * steps)) for share in (0.2, 0.8))
    defaults = dict(steps=steps, cfg=backbone.cfg, fk_start=start, fk_end=end)
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    if not args.fk_start <= args.fk_end <= steps:
        order = args.fk_start, args.fk_end, steps
        fail("--fk-start {}, --fk-end {}, --steps {}: none may be above the next".format(*order))


def plan(args):
    """The runs: dicts of method, M, proposal, by, lam in the unit it is given in, N."""
    lams = args.raw_lam or args.lam
    plain = [1], ["argmax"], ["tweedie"]
    ways = args.m, args.proposal, args.potential_value, lams, args.n_stitchvm or args.n
    grids = dict.fromkeys(("bon", "prune"), (*plain, [0.0], args.n))
    grids |= {"flow": (*plain, [0.0], [1]), "fks": (*plain, lams, args.n), "fks+stitchvm": ways}
    runs = [run for m in METHODS if m in args.methods for run in product([m], *grids[m])]
    return [dict(zip(("method", "M", "proposal", "by", "lam", "N"), r, strict=True)) for r in runs]


def settings(run, args):
    """The last four arguments of steer() for one run."""
    steers = run["method"].startswith("fks")
    steps = range(args.fk_start, args.fk_end + 1, args.fk_every) if steers else ()
    rules = {k: getattr(args, k) for k in ("potential", "resampling", "adaptive")}
    rules |= dict(proposal=run["proposal"], by=run["by"])
    first = int(args.propose_after * args.steps + 1e-9)
    propose = range(first, first + int(args.propose * args.steps + 1e-9))
    return dict(fk_steps=steps, propose=propose, M=run["M"], rules=rules)


def label(run, args):
    """A name for a run but for its N: one curve. What does not vary is not in it."""
    choices = dict(proposal=args.proposal, by=args.potential_value, lam=args.raw_lam or args.lam)
    used = {"fks": ["lam"], "fks+stitchvm": ["M", *choices]}.get(run["method"], [])
    shown = [f"{k}={run[k]}" for k in used if k == "M" or len(choices[k]) > 1]
    return " ".join([run["method"], *shown])


def sample(models, args, run, lam, seed, prompts):
    """What one run makes of some prompts, on the CPU: books after the clean reward r (P, N).

    reports: for each its images, uint8 (P, R, 3, H, W), and their mean reward (P,); seconds and
    rows of a prompt; gflop of a row.
    """
    backbone = models.backbone
    began = now(backbone.device)
    models.take(prompts)
    models.rows.clear()
    given = seed, prompts, run["N"]
    noise = partial(draw_noise, *given, backbone.latent_shape(args.resolution), backbone.device)
    uniform = partial(draw_uniforms, *given, backbone.device)
    given = noise("start")[:, :, 0], backbone.grid(args.steps, args.resolution), models.denoise
    if run["method"] == "prune":
        z, books = prune(*given, noise, models.value, args.prune_at)
    else:
        calls = noise, uniform, models.score, models.value
        z, books = steer(*given, *calls, lam, **settings(run, args))
    images, r = models.run(models.clean, z.flatten(0, 1))
    books["r"] = r.view(z.shape[:2])
    books = weigh(books, books["r"], lam, args.potential, last=True)
    found = {k: v.cpu() for k, v in books.items()}
    images = (images.nan_to_num() * 255).round().byte().cpu().unflatten(0, z.shape[:2])
    found["reports"] = {}
    for report in args.report if run["method"].startswith("fks") else ["best"]:
        index = select(found["r"], found, uniform("report")[0].cpu(), report)
        chosen = images[torch.arange(len(index))[:, None], index]
        found["reports"][report] = (chosen, found["r"].gather(1, index).mean(1))
    found["seconds"] = (now(backbone.device) - began) / len(prompts)
    rows = {k: n // len(prompts) for k, n in models.rows.items()}
    return found | dict(rows=rows, gflop=dict(models.gflop))


def perform(models, args, run, lam, seed, n):
    """One run on the first n prompts, `batch` particles at a time, each part kept in a file.

    Its row of the table but for reports and scores; r (n, N); {report: (images, rewards)}.
    """
    name = f"{label(run, args)} N={run['N']}".replace(" ", "_")
    parts = []
    for k, prompts in enumerate(torch.arange(n).split(max(1, args.batch // run["N"]))):
        path = Path(args.out, "06_fks.parts", f"{name}_{k}.pt")
        work = partial(sample, models, args, run, lam, seed, prompts.tolist())
        parts.append(once(path, "06_fks", models.spec, args.resume, work))
        models.gflop |= parts[-1]["gflop"]
    row = dict(method=run["method"], n_particles=run["N"], m_proposals=run["M"], n=n)
    row["s_per_prompt"], row["s_spread"] = timing([p["seconds"] for p in parts])
    rows = parts[0]["rows"]
    denoised = sum(rows[k] for k in rows if "velocity" in k)
    row["denoiser_calls"] = denoised if args.cfg == 1 else 2 * denoised
    row["gflop_per_prompt"] = sum(rows[k] * models.gflop[k] for k in rows)
    found = {k: torch.cat([p[k] for p in parts]) for k in ("r", "killed", "origin", "ess")}
    if not found["r"].isfinite().any():
        fail(f"every sample of {name} became NaN or infinite: try --dtype float32")
    row["killed"] = int(found["killed"].sum())
    row["ancestors"] = sum(len(set(line)) for line in found["origin"].tolist()) / n
    if run["method"].startswith("fks"):
        row |= dict(proposal=run["proposal"] if run["M"] > 1 else None, potential_value=run["by"])
        row["ess"] = float(found["ess"].mean()) / len(settings(run, args)["fk_steps"])
        row |= {"lambda": None if args.raw_lam else run["lam"], "lambda_raw": lam}
    pairs = {k: zip(*(p["reports"][k] for p in parts), strict=True) for k in parts[0]["reports"]}
    return row, found["r"], {k: [torch.cat(x) for x in pair] for k, pair in pairs.items()}


def reward_spread(models, args, texts):
    """The reward's standard deviation among plain samples of one prompt, of the first eight; kept
    in <out>/06_spread.json, and measured again if that cannot be read."""
    keys = ("backbone", "reward", "resolution", "steps", "shift", "cfg", "seed", "spread_samples")
    about = {k: getattr(args, k) for k in keys} | dict(prompts=texts[:8]) | models.weights
    path = Path(args.out, "06_spread.json")
    with suppress(OSError, ValueError, LookupError, TypeError):
        found = json.loads(path.read_text())
        if found["about"] == about and found["spread"] > 0:
            return found["spread"]
    run = dict(method="spread", N=args.spread_samples, M=1, proposal="argmax", by="tweedie")
    _, r, _ = perform(models, args, run, 0.0, (args.seed, "spread"), len(about["prompts"]))
    spread = float(r.double().var(1).nanmean().sqrt())
    if not spread > 0:
        fail(f"{args.reward} does not vary among plain samples ({spread}): pass --raw-lam")
    save_table(args, "06_spread", [], spread=spread, about=about)
    return spread


def add_scores(rows, images, rewards, models, args, texts):
    """Into each row the scores of its images, uint8 (n, R, 3, H, W), and its rewards (n,), but of
    prompts whose samples all failed: their reward is not finite."""
    each = [text for x in images for text in texts for _ in x[0]]
    flat = [x.flatten(0, 1) for x in images]
    given = models.rewards, args.preset, args.device, torch.cat(flat), each
    scores = score_images(args.scorers, *given)
    parts = {k: x.split([len(f) for f in flat]) for k, x in scores.items()}
    for k, row in enumerate(rows):
        scores = {name: x[k].view(len(texts), -1).mean(1) for name, x in parts.items()}
        scores["reward"] = rewards[k]  # of the images before they were rounded
        alive = rewards[k].isfinite()
        row |= mean_and_error({name: x[x.isfinite() & alive] for name, x in scores.items()})
        row["failed"] = int((~alive).sum())
    return list(scores)


@torch.no_grad()
def main(args):
    if os.environ.get("RANK", "0") != "0":
        return  # one process does all of it
    prompts = load_prompts(args.prompts, args.limit)
    texts = [row["prompt"] for row in prompts]
    models = Models(args, texts)
    parts = Path(args.out, "06_fks.parts")
    keep_or_drop(parts, args)
    spread = reward_spread(models, args, texts) if args.raw_lam is None else None
    made = []
    for run in tqdm(plan(args), desc="runs"):
        lam = run["lam"] / (spread or 1)
        row, _, reports = perform(models, args, run, lam, args.seed, len(texts))
        for report, (pictures, r) in reports.items():
            curve = label(run, args) + f" {report}" * (len(args.report) > 1)
            row = row | dict(report=report, curve=curve)
            if args.save_images:
                name = f"{label(run, args)} N={run['N']} {report}".replace(" ", "_")
                row["images"] = f"06_images/{name}"
                shown = [x if ok else x[:0] for x, ok in zip(pictures, r.isfinite(), strict=True)]
                write_images(Path(args.out, row["images"]), prompts, shown)
            made.append((row, pictures, r))
    rows, images, rewards = zip(*made, strict=True)
    models.backbone.free()  # before scorers are loaded
    models.values.clear()
    scores = add_scores(rows, images, rewards, models, args, texts)
    keys = "method n_particles m_proposals lambda proposal potential_value report reward reward_se"
    costs = "n failed s_per_prompt s_spread denoiser_calls gflop_per_prompt ess ancestors killed"
    print_table(rows, [*keys.split(), *scores[1:], *costs.split()])
    if max(row["s_spread"] for row in rows) > 0.5:
        print("warning: the machine was busy with something else: do not rely on the seconds")
    top = dict(spread=spread, shared=models.shares, gflop_per_row=models.gflop)
    top["values"] = [dict(stage=a["stage"], id=a["id"]) for a in models.parents]
    top["rewards_of_prompts"] = [r.tolist() for r in rewards]
    save_table(args, "06_fks", rows, **top)
    draw_lines(rows, "gflop_per_prompt", scores, "curve", Path(args.out, "06_scaling.png"))
    largest = {row["curve"]: x[:6, 0] for row, x in zip(rows, images, strict=True)}  # the last N
    image_grid([*largest.values()], [*largest], texts[:6], Path(args.out, "06_grid.png"))
    shutil.rmtree(parts)


if __name__ == "__main__":
    main(parse_args())
