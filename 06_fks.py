"""Stage 06 -- Feynman-Kac steering: particles that are copied or dropped by their value on the way, and proposals that a value model chooses.

Paper   StitchVM (arXiv 2605.19804) Sec. 5.2, App. C.2, D.2, Algorithm 1, Eq. (9); the SDE of (11) with g = 3 t^2
            weights   G_k = exp(lam (V(zbar_{k-1}) - V(z_k))), then N particles are drawn in proportion to them ("diff"; also "max", "add")
            proposals in the first 40 % of the steps: M noises from one denoiser call, argmax_m V(zbar^(m)) goes on
        Methods, on the same initial noises: flow (plain), bon (best of N), fks (values by Tweedie, r(D(zhat_0)) of the step's own velocity, as
        the official code scores: no extra denoiser call), fks+stitchvm (proposals by V; --potential-value stitchvm: the weights too).
Reads   value.pt of each reward (03); prompts. A value of another backbone on the same VAE is one, too: --value FILE
Writes  out/06_fks.json, out/06_scaling.png (reward against GFLOP), out/06_grid.png, out/06_spread.json (the reward's spread on plain samples,
        measured once), with --save-images out/06_images in GenEval's layout
Run     python 06_fks.py                                                       # the miniature, 40 prompts, under three minutes on two idle cores
        python 06_fks.py --limit 100 --potential-value stitchvm --n 2 4 6 8 10 12 14 --n-stitchvm 2 4 6 8 --m 2 4 6    # the scaling study (Fig. 3)
        python 06_fks.py --methods fks+stitchvm --proposal argmax corrected --report best mean   # the argmax is biased, this much
        python 06_fks.py --backbone sd3.5-large --value runs/mini/sd3.5-medium_clip/value.pt     # a Medium value guides Large (Table 6)
Departs from the paper: lam is in units of the reward's spread among samples of one prompt; --raw-lam is the paper's [D13]. Weights live in log
        space, are carried over steps that do not resample, and end with exp(lam r(z_0)) on the clean reward, so "diff" targets it exactly. The
        argmax over M does not: --proposal corrected draws m in proportion to exp(lam V_m) and multiplies the weight by their mean, an
        auxiliary-particle step; a weight is divided by what it was paid before, so all of it telescopes. With CFG the winner's prefix state goes
        on as the unconditional half of the next denoiser call, which has the same null text; FLUX has no such half and shares nothing [D10].
        The miniature resamples systematically, and only where the effective sample size is below N / 2; lam = 1 is the best for fks there of .5, 1, 2 and 4, on the tuning prompts.
"""
import json
import math
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from common import (Backbone, Reward, clean_reward, count, encode_prompts, fail, generator, gflop, gib, joint_value, load_prompts, load_scorers, load_values,
                    mean_and_error, meta_backbone, meta_value, now, parse_stage, print_table, replacing, report_dry_run, save_figure, save_image_grid, save_table, score_images,
                    sde_step, shares_prefix, stage_parser, state_cat, state_index, tweedie, value_files, write_geneval)

METHODS = ("flow", "bon", "fks", "fks+stitchvm")
PRESETS = {"mini": dict(resolution=64, batch=64, prompts="tests/mini/data/drawbench.txt", limit=40, adaptive=0.5, resampling="systematic", potential_value=["tweedie", "stitchvm"]),
           "24gb": dict(resolution=512, batch=8), "paper": dict(resolution=1024, batch=8)}


def parse_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    p.add_argument("--prompts", help="text file, JSON list or GenEval's JSONL")
    p.add_argument("--limit", type=int, help="use this many prompts at most")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--value", nargs="+", help="value model of each reward (default: value.pt in --out or in the reward's own run folder)")
    p.add_argument("--n", type=int, nargs="+", default=[4], help="particles; several give several rows (D.2: 4)")
    p.add_argument("--m", type=int, nargs="+", default=[2], help="proposals of fks+stitchvm (D.2: 2; Fig. 3: 4 and 6)")
    p.add_argument("--n-stitchvm", type=int, nargs="+", help="particles of fks+stitchvm (default: --n)")
    p.add_argument("--lam", type=float, nargs="+", default=[1.0], help="strength in units of the reward's spread on plain samples")
    p.add_argument("--raw-lam", type=float, nargs="+", help="strength in units of the reward, instead of --lam")
    p.add_argument("--potential", choices=("diff", "max", "add"), default="diff")
    p.add_argument("--potential-value", nargs="+", choices=("tweedie", "stitchvm"), default=["tweedie"], help="what weighs the particles of fks+stitchvm")
    p.add_argument("--proposal", nargs="+", choices=("argmax", "corrected"), default=["argmax"], help="argmax: Algorithm 1; corrected: unbiased")
    p.add_argument("--report", nargs="+", choices=("best", "mean"), default=["best"],
                   help="best: the particle of the highest clean reward; mean: all, resampled by their final weights")
    p.add_argument("--resampling", choices=("multinomial", "systematic"), default="multinomial")
    p.add_argument("--adaptive", type=float, nargs="?", const=0.5, help="resample a prompt's particles only where their effective sample size is below this share of N (above 1: always)")
    p.add_argument("--steps", type=int, help="of the sampler (D.2: 40; FLUX: 28)")
    p.add_argument("--cfg", type=float, help="guidance (D.2: 4.5; FLUX: 1, its own guidance is 3.5)")
    p.add_argument("--fk-every", type=int, default=4)
    p.add_argument("--fk-start", type=int, help="first step after which particles are weighed (a fifth: 8 of 40, 6 of 28)")
    p.add_argument("--fk-end", type=int, help="last such step (four fifths: 32 of 40, 22 of 28)")
    p.add_argument("--propose", type=float, default=0.4, help="share of the steps, from the first, that make proposals")
    p.add_argument("--spread-samples", type=int, default=8, help="plain samples of each of the first eight prompts, for the unit of --lam")
    p.add_argument("--batch", type=int, help="latents at a time")
    p.add_argument("--save-images", action="store_true", help="write the reported images")
    return parse_stage(p, PRESETS, argv)


# ---- ALGORITHM: copy from here ----
def normalised(logw):
    """Weights (..., n) that sum to one; equal ones where every particle is dead."""
    return torch.where((logw == -math.inf).all(-1, keepdim=True), 0.0, logw).softmax(-1)


def pick(w, u):
    """Inverse CDF: for weights w (..., n) and u (..., k) in [0, 1] the indices (..., k); one of weight zero is never picked."""
    c = w.cumsum(-1)
    return torch.searchsorted(c / c[..., -1:], u.clamp(max=1 - torch.finfo(u.dtype).eps), right=True)


def ancestors(w, u, scheme="multinomial"):
    """Which particles go on, (P, N), for weights w (P, N) and uniforms u (P, N). systematic: one uniform a row, so that counts are N w rounded down or up."""
    if scheme == "systematic":
        u = (torch.arange(w.shape[1], device=w.device) + u[:, :1]) / w.shape[1]
    return pick(w, u)


def choose(v, lam, u, how="argmax"):
    """One of M proposals by their values v (..., M), and the log of the factor that its particle's weight gets: (...), (...); u (...) uniform.

    argmax: Algorithm 1, no factor. corrected: m in proportion to exp(lam v_m), factor mean_m exp(lam v_m); a proposal that is not finite is not chosen.
    """
    v = torch.where(v.isfinite(), v, -math.inf)  # trap: argmax prefers NaN
    if how == "argmax":
        return v.argmax(-1), torch.zeros_like(u)
    logw = torch.where(v.isfinite(), lam * v, -math.inf)
    return pick(normalised(logw), u[..., None])[..., 0], logw.logsumexp(-1) - math.log(v.shape[-1])


def new_books(P, N, like):
    """What is kept of each particle, (P, N): logw since the last resampling, paid = log of all factors of its line so far, running value, first ancestor."""
    zeros = torch.zeros(P, N, dtype=like.dtype, device=like.device)
    return dict(logw=zeros, paid=zeros, running=None, origin=torch.arange(N, device=like.device).expand(P, N), killed=zeros.sum(1), ess=[])


def pay(books, gain, paid):
    """Multiply the weights by exp(gain), of which a later division takes back exp(paid). What is not finite kills its particle, not the run."""
    alive, before = gain.isfinite() & paid.isfinite(), books["logw"] > -math.inf
    return dict(books, logw=torch.where(alive, books["logw"] + gain, -math.inf), paid=torch.where(alive, books["paid"] + paid, books["paid"]),
                killed=books["killed"] + (before & ~alive).sum(1))


def weigh(books, v, lam, potential="diff", last=False):
    """Multiply the weights by the potential of values v (P, N): diff exp(lam (v - v of the last time)), max exp(lam max of all so far), add exp(lam sum).

    last: v is the clean reward, and all that was paid is divided out: a line's factors multiply to exp(lam r(z_0)), exp(lam max) or exp(lam sum).
    """
    old = books["running"]
    running = v if potential == "diff" or old is None else torch.maximum(old, v) if potential == "max" else old + v  # maximum keeps NaN
    gain = lam * running - (books["paid"] if potential == "diff" or last else 0)
    return dict(pay(books, gain, gain), running=torch.where(v.isfinite(), running, v if old is None else old))


def select(r, books, u, report="best"):
    """Indices (P, R) of the particles that stand for their prompt: the one of the highest reward r (P, N), or N drawn by the final weights."""
    if report == "best":
        return torch.where(r.isfinite(), r, -math.inf).argmax(1, keepdim=True)
    return ancestors(normalised(books["logw"]), u, "systematic")


def steer(z, grid, denoise, noise, uniform, lam=0.0, fk_steps=(), score=None, value=None, propose=0, M=1, proposal="argmax", potential="diff",
          by="tweedie", resampling="multinomial", adaptive=None, step=sde_step):
    """N particles for each of P prompts, z (P, N, C, h, w) at grid[0], to grid[-1]; returns them and their books, whose last weighing is the caller's.

    denoise(z (B, C, h, w), t, prefix) -> velocity; score(z_0 (B, C, h, w)) -> reward (B,); value(z, t) -> V (B,) and the prefix state behind it or None, from
    which the next denoise may go on; noise(k, M) -> (P, N, M, C, h, w); uniform(k) -> (2, P, N). fk_steps count finished steps, the first `propose` steps make
    M proposals, by: 'tweedie' weighs by score at the step's own one-step estimate, 'stitchvm' by value at the new latents. adaptive: None resamples always.
    """
    P, N = z.shape[:2]
    rows = torch.arange(P * N, device=z.device).view(P, N)
    particles = lambda x: x.unflatten(0, (P, N))
    books, prefix = new_books(P, N, z), None
    for k, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
        before, weighs = z.flatten(0, 1), k + 1 in fk_steps
        u = denoise(before, t, prefix)
        v = prefix = None
        m = M if k < propose and s > 0 else 1
        corrected = m > 1 and proposal == "corrected"
        draw, choice = uniform(k)
        # a corrected proposal pays V in full: under diff another potential at the same step would be divided out at once
        weighs_values = weighs and not (corrected and potential == "diff")
        if weighs_values and by == "tweedie":
            z0 = tweedie(before, u, torch.full((P * N,), t, device=z.device, dtype=z.dtype))
            books = weigh(books, particles(score(z0)), lam, potential)
        z = step(z[:, :, None], particles(u)[:, :, None], t, s, noise(k, m))  # (P, N, m, C, h, w): one mean, m noises
        if m > 1:
            values, states = value(z.flatten(0, 2), s)
            values = values.view(P, N, m)
            best, gain = choose(values, lam, choice, proposal)
            v, chosen = values.gather(2, best[..., None])[..., 0], rows * m + best
            prefix = states and state_index(states, chosen.flatten())
            z = z.flatten(0, 2)[chosen]
            if corrected:
                spent = books["paid"] if potential == "diff" else 0
                books = pay(books, gain - spent, lam * v - spent)
        else:
            z = z[:, :, 0]
        if weighs_values and by == "stitchvm":
            if v is None:
                v, prefix = value(z.flatten(0, 1), s)
                v = particles(v)
            books = weigh(books, v, lam, potential)
        if weighs:
            w = normalised(books["logw"])
            ess = 1 / w.square().sum(1)
            renew = torch.ones_like(ess, dtype=torch.bool) if adaptive is None else ess < adaptive * N
            index = torch.where(renew[:, None], ancestors(w, draw, resampling), torch.arange(N, device=z.device))
            kept = rows.gather(1, index).flatten()
            z, prefix = particles(z.flatten(0, 1)[kept]), prefix and state_index(prefix, kept)
            books = {n: x.gather(1, index) if torch.is_tensor(x) and x.ndim == 2 else x for n, x in books.items()}
            books |= dict(logw=torch.where(renew[:, None], 0.0, books["logw"]), ess=[*books["ess"], ess])
    return z, books
# ---- to here ----


class Models:
    """What steer() calls, on real models, for the prompts that at() chose, `batch` rows at a time."""

    def __init__(self, backbone, condition, null, cfg, rewards, texts, values, batch):
        self.backbone, self.condition, self.null, self.cfg, self.batch = backbone, condition, null, cfg, batch
        self.rewards, self.texts, self.values = rewards, texts, values
        self.shares = shares_prefix(values, backbone, null, cfg)

    def at(self, prompts):
        self.prompts = torch.tensor(prompts, device=self.backbone.device)
        return self

    def parts(self, z):
        """Slices of the rows of z, and the prompt of every row in them."""
        prompt = self.prompts.repeat_interleave(len(z) // len(self.prompts))
        return [(slice(a, a + self.batch), prompt[a:a + self.batch]) for a in range(0, len(z), self.batch)]

    def denoise(self, z, t, prefix):
        out = []
        for part, prompt in self.parts(z):
            sigma, condition = torch.full((len(prompt),), t, device=z.device), [v[prompt] for v in self.condition]
            out.append(self.backbone.velocity(z[part], sigma, condition, self.null, self.cfg, prefix=prefix and state_index(prefix, part)))
        return torch.cat(out)

    def decode(self, z0):
        """Images (B, 3, H, W) of clean latents and their rewards (B,), the sum over all rewards."""
        images, scores = [], []
        for part, prompt in self.parts(z0):
            images.append(self.backbone.decode(z0[part]))
            scores.append(clean_reward(self.rewards, [t if t is None else t[prompt] for t in self.texts], images[-1]))
        return torch.cat(images), torch.cat(scores)

    def score(self, z0):
        return self.decode(z0)[1]

    def value(self, z, t):
        v, states = [], []
        for part, prompt in self.parts(z):
            sigma = torch.full((len(prompt),), t, device=z.device)
            total, prefixes = joint_value(self.values, z[part], sigma, [t if t is None else t[prompt] for t in self.texts])
            v.append(total), states.append(prefixes.get(id(self.backbone.transformer)))
        return torch.cat(v), state_cat(states) if self.shares else None


def draws(seed, prompts, N, shape, device):
    """noise and uniform of steer(): a function of prompt, particle and step, so that every method, N, M and batch is given the same."""
    def noise(k, M=1):
        particle = lambda p, n: torch.randn(M, *shape, generator=generator(seed, "noise", p, n, k))
        return torch.stack([torch.stack([particle(p, n) for n in range(N)]) for p in prompts]).to(device)

    def uniform(k):
        return torch.stack([torch.rand(N, 2, generator=generator(seed, "uniform", p, k)).T for p in prompts], 1).to(device)
    return noise, uniform


# ---- what is run, and what it costs
def complete(args, flux):
    """Fill in the flags whose defaults depend on the backbone, and refuse what cannot be run."""
    args.steps = (28 if flux else 40) if args.steps is None else args.steps
    args.cfg = (1.0 if flux else 4.5) if args.cfg is None else args.cfg
    args.fk_start = max(1, round(0.2 * args.steps)) if args.fk_start is None else args.fk_start
    args.fk_end = max(1, round(0.8 * args.steps)) if args.fk_end is None else args.fk_end
    for name, low in (("n", 1), ("m", 1), ("n_stitchvm", 1), ("steps", 1), ("fk_every", 1), ("spread_samples", 2), ("batch", 1), ("limit", 1)):
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < low:
            fail(f"--{name.replace('_', '-')} is {given}; at least {low} is needed")
    if not 1 <= args.fk_start <= args.fk_end <= args.steps:
        fail(f"--fk-start {args.fk_start} and --fk-end {args.fk_end} must lie in order between 1 and --steps {args.steps}")
    if not 0 <= args.propose <= 1:
        fail(f"--propose {args.propose} is a share of the steps, between 0 and 1")
    if args.adaptive is not None and args.adaptive <= 0:
        fail(f"--adaptive {args.adaptive} is a share of N, above 0")


def plan(args):
    """The runs, one for each row: method, N, M, proposal, by, lam in the unit it is given in."""
    runs = []
    for method in [m for m in METHODS if m in args.methods]:
        ways = product(args.m, args.proposal, args.potential_value) if method == "fks+stitchvm" else [(1, "argmax", "tweedie")]
        sizes = dict.fromkeys([1] if method == "flow" else args.n_stitchvm or args.n if method == "fks+stitchvm" else args.n)
        lams = args.raw_lam or args.lam if method.startswith("fks") else [0.0]
        runs += [dict(method=method, N=n, M=m, proposal=proposal, by=by, lam=lam) for (m, proposal, by), lam, n in product(ways, lams, sizes)]
    return runs


def settings(run, args):
    """The arguments of steer() for one run."""
    steers = run["method"].startswith("fks")
    return dict(fk_steps=range(args.fk_start, args.fk_end + 1, args.fk_every) if steers else (), propose=int(args.propose * args.steps + 1e-9), M=run["M"],
                proposal=run["proposal"], by=run["by"], potential=args.potential, resampling=args.resampling, adaptive=args.adaptive)


def rows_per_prompt(run, args, shares):
    """How many rows of each model one prompt takes, by running steer() itself on particles of one number: denoiser, shared prefixes, values, scores."""
    rows = dict(denoiser=0, shared=0, value=0, score=0)

    def tell(kind, n):
        rows[kind] += n
        return torch.zeros(n)

    def denoise(z, t, prefix):
        rows["denoiser"] += len(z) * (1 if args.cfg == 1 else 2)
        return tell("shared", len(z) if prefix else 0).new_zeros(z.shape)

    N, grid = run["N"], torch.linspace(1, 0, args.steps + 1).tolist()
    steer(torch.zeros(1, N, 1), grid, denoise, lambda k, M: torch.zeros(1, N, M, 1), lambda k: torch.full((2, 1, N), 0.5), 1.0,
          score=lambda z0: tell("score", len(z0)), value=lambda z, t: (tell("value", len(z)), dict(i=0) if shares else None), **settings(run, args))
    tell("score", N)  # of the clean images
    return rows


def row_costs(counted, backbone, null, rewards, resolution):
    """FLOP of one row of the denoiser and of one score (decoded, all rewards), in the unit of counted(call)."""
    z, x, sigma = blank(backbone, null, resolution), torch.zeros(1, 3, resolution, resolution, device=null[0].device), torch.zeros(1, device=null[0].device)
    return dict(denoiser=counted(lambda: backbone.velocity(z, sigma, null)), score=counted(lambda: (backbone.decode(z), [r.embed(x) for r in rewards])))


def value_costs(counted, backbone, null, rewards, values, resolution):
    """The same of one value, and what a shared prefix saves, as a negative number."""
    z, sigma = blank(backbone, null, resolution), torch.zeros(1, device=null[0].device)
    texts = [torch.zeros(1, r.visual.proj.shape[1], device=z.device) for r in rewards]
    own = [v for v in values if v.front == "dit" and v.transformer is backbone.transformer]
    return dict(value=counted(lambda: joint_value(values, z, sigma, texts)), shared=-counted(lambda: max(own, key=lambda v: v.i).features(z, sigma)) if own else 0.0)


def blank(backbone, null, resolution):
    return torch.zeros(1, backbone.vae.config.latent_channels, resolution // 8, resolution // 8, device=null[0].device)


def flop_per_prompt(rows, costs):
    return sum(n * costs.get(kind, 0.0) for kind, n in rows.items())


@torch.no_grad()
def dry_run(args):
    names = args.reward.split("+")
    rewards = [Reward(name, args.preset, "meta", weights=False) for name in names]
    backbone, null = meta_backbone(args.backbone)
    complete(args, backbone.name == "flux")  # also where the hub id was given
    cases, counted = [], lambda call: count(call)[0]
    common_costs = row_costs(counted, backbone, null, rewards, args.resolution)
    for i in (4, 12):  # the paper's choice for CLIP on SD 3.5 Medium, and a late one
        values = [meta_value(backbone, null, r, i, args.resolution)[0] for r in rewards]
        costs = common_costs | value_costs(counted, backbone, null, rewards, values, args.resolution)
        for run in plan(args):
            if i == 12 and run["method"] != "fks+stitchvm":
                continue
            tflop = flop_per_prompt(rows_per_prompt(run, args, args.cfg != 1), costs)
            own = values if run["method"] == "fks+stitchvm" else []
            cases.append(dict(method=label(run, args) + f" N={run['N']}" + (f", i = {i}" if own else ""), unit="prompt", tflop=tflop, saved_gib=0.0,
                              peak_gib=gib(backbone.transformer, backbone.vae, *[r.model for r in rewards], *own), n=200))  # DrawBench
    report_dry_run(args, "06_fks", cases, [backbone.transformer, backbone.vae, *[r.model for r in rewards]])


# ---- the run
def label(run, args):
    """A name for a run but for its N: one curve of the figure."""
    strength = [f"lam={run['lam']:g}"] * (run["method"].startswith("fks") and len(args.raw_lam or args.lam) > 1)
    if run["method"] != "fks+stitchvm":
        return " ".join([run["method"], *strength])
    way = [run["proposal"]] * (len(args.proposal) > 1) + [f"by {run['by']}"] * (len(args.potential_value) > 1)
    return " ".join([run["method"], f"M={run['M']}", *way, *strength])


def sample(models, args, run, unit, prompts, grid, shape, seed):
    """One run on some prompts: images (P, N, 3, H, W), rewards (P, N), books with their last weighing, the uniforms for select(). unit: of the run's lam."""
    N, lam, device = run["N"], run["lam"] / unit, models.backbone.device
    noise, uniform = draws(seed, prompts, N, shape, device)
    models.at(prompts)
    z, books = steer(noise("start")[:, :, 0], grid, models.denoise, noise, uniform, lam, score=models.score, value=models.value, **settings(run, args))
    images, r = (v.unflatten(0, (len(prompts), N)) for v in models.decode(z.flatten(0, 1)))
    return images.nan_to_num(), r, weigh(books, r, lam, args.potential, last=True), uniform("report")[0]


def reward_spread(models, args, rows, grid, shape):
    """The standard deviation of the reward among plain samples of one prompt, pooled over the first eight prompts; measured once, kept in --out."""
    path, prompts = Path(args.out) / "06_spread.json", list(range(min(8, len(rows))))
    of = {k: getattr(args, k) for k in ("preset", "backbone", "reward", "resolution", "steps", "cfg", "seed", "spread_samples")}
    of["prompts"] = [rows[p]["prompt"] for p in prompts]
    if path.exists() and (kept := json.loads(path.read_text()))["of"] == of:
        return kept["spread"]
    run, r = dict(method="bon", N=args.spread_samples, M=1, proposal="argmax", by="tweedie", lam=0.0), []
    at_once = max(1, args.batch // args.spread_samples)
    for k in tqdm(range(0, len(prompts), at_once), desc="spread"):
        r.append(sample(models, args, run, 1.0, prompts[k:k + at_once], grid, shape, (args.seed, "spread"))[1])
    r = torch.cat(r).double().cpu()
    spread = float(r.var(1).mean().sqrt())
    if not spread > 0:
        fail(f"the reward {args.reward} does not vary among plain samples (spread {spread}), so --lam has no unit; pass --raw-lam")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(spread=spread, mean=float(r.mean()), n=r.numel(), of=of), indent=1))
    return spread


def table_row(run, args, kept, scores, how):
    """A row of the table but for its costs: means and errors of scores {name: (prompts,)}, and what became of the particles."""
    steers, books = run["method"].startswith("fks"), kept["books"]
    origin = torch.cat([b["origin"] for b in books]).cpu()
    row = dict(method=run["method"], n_particles=run["N"], m_proposals=run["M"], curve=label(run, args), report=how if steers else "best",
               reward_particles=float(torch.cat(kept["r"]).nanmean()), ancestors=float((origin[:, :, None] == torch.arange(run["N"])).any(1).sum(1).double().mean()),
               killed=int(sum(b["killed"].sum() for b in books)), n=len(origin))
    if steers:
        row |= dict(potential=args.potential, potential_value=run["by"], proposal=run["proposal"] if run["M"] > 1 else None, resampling=args.resampling,
                    adaptive=args.adaptive, ess=float(torch.cat([torch.stack(b["ess"]).mean(0) for b in books]).mean()))
    return row | {k: v if v == v else None for k, v in mean_and_error({k: x[x.isfinite()] for k, x in scores.items()}).items()}


@torch.no_grad()
def main(args):
    if args.dry_run:
        return dry_run(args)
    if not args.prompts:
        fail("--prompts FILE is needed: one prompt a line, a JSON list, or GenEval's JSONL")
    names, prompts = args.reward.split("+"), load_prompts(args.prompts)[:args.limit]
    files = value_files(args, names) if "fks+stitchvm" in args.methods else []
    backbone = Backbone(args.backbone, args.preset, args.device, getattr(torch, args.dtype))
    complete(args, "Flux" in backbone.transformer_class.__name__)
    device, runs, texts = backbone.device, plan(args), [r["prompt"] for r in prompts]
    if not prompts or not runs:
        fail(f"{args.prompts} holds no prompt" if runs else "--methods names none")
    rewards = [Reward(name, args.preset, device) for name in names]
    condition, null = encode_prompts(backbone, texts, cache=args.out), encode_prompts(backbone, [""])
    values, parents = load_values(files, backbone, rewards, args.resolution)
    models = Models(backbone, condition, null, args.cfg, rewards, [r.encode_text(texts) if r.uses_text else None for r in rewards], values, args.batch)
    scorers = load_scorers(args.preset, device, rewards)
    shape = backbone.vae.config.latent_channels, args.resolution // 8, args.resolution // 8
    grid = backbone.grid(args.steps, torch.zeros(1, *shape)).tolist()
    spread = reward_spread(models, args, prompts, grid, shape) if args.raw_lam is None else None
    unit = spread or 1.0
    counted = partial(gflop, device=device)
    costs = row_costs(counted, backbone, null, rewards, args.resolution) | (value_costs(counted, backbone, null, rewards, values, args.resolution) if values else {})
    print(f"{len(prompts)} prompts, {args.steps} steps, cfg {args.cfg:g}, lam " + ", ".join(f"{lam / unit:.4g}" + (f" = {lam:g} / {spread:.4g}" if spread else "") for lam in args.raw_lam or args.lam) +
          f"; particles are weighed after steps {', '.join(map(str, settings(dict(runs[0], method='fks'), args)['fk_steps']))}; "
          + ("the value's prefix is shared" if models.shares else "no prefix is shared"))

    found = [dict(scores={how: [] for how in args.report}, r=[], books=[], images=[], seconds=0.0) for _ in runs]
    most = max(run["N"] for run in runs if run["method"] == "bon") if "bon" in args.methods else 0
    sampled = [run for run in runs if run["method"] != "bon" or run["N"] == most]  # the best of fewer is read off these: particles do not mix
    bar = tqdm(total=sum(run["N"] for run in sampled) * len(prompts), desc="samples")

    def record(run, kept, part, images, r, books, u, seconds):
        """Add the particles (P, N, ...) of some prompts to what a run has found."""
        kept["seconds"] += seconds
        kept["r"].append(r.cpu()), kept["books"].append(books)
        for how in args.report:
            index = select(r, books, u, "best" if run["method"] == "bon" else how)
            shown = torch.stack([x[i] for x, i in zip(images, index)])  # (P, R, 3, H, W)
            scores = score_images(scorers, shown.flatten(0, 1), [texts[p] for p in part for _ in index[0]])
            scores = {n: s.view(index.shape).mean(1) for n, s in scores.items()} | {"reward": r.gather(1, index).mean(1).cpu()}
            kept["scores"][how].append(scores)
            if args.save_images:
                name = "_".join([label(run, args).replace(" ", "_"), f"N={run['N']}", how])
                write_geneval(Path(args.out) / "06_images" / name, [prompts[p] for p in part], shown, part[0])
        best = select(r, books, u)[:, 0]
        kept["images"] += [x[i].cpu() for x, i, p in zip(images, best, part) if p < 6]

    for block in range(0, len(prompts), args.batch):  # all methods in turn on each block of prompts, so that seconds compare
        for run in sampled:
            at_once = max(1, args.batch // run["N"])
            stop = min(block + args.batch, len(prompts))
            for k in range(block, stop, at_once):
                part = list(range(k, min(k + at_once, stop)))
                began = now(device)
                images, r, books, u = sample(models, args, run, unit, part, grid, shape, args.seed)
                seconds = now(device) - began
                for other, kept in zip(runs, found):
                    n = other["N"]
                    if other is run:
                        record(run, kept, part, images, r, books, u, seconds)
                    elif other["method"] == run["method"] == "bon":  # nothing was weighed before the end: the books of n are new ones
                        record(other, kept, part, images[:, :n], r[:, :n], weigh(new_books(len(part), n, r), r[:, :n], 0.0, last=True), u, seconds * n / run["N"])
                bar.update(run["N"] * len(part))
    bar.close()

    rows, per_prompt = [], []
    for (run, kept), how in product(zip(runs, found), args.report):
        if run["method"] in ("flow", "bon") and how != args.report[0]:
            continue  # one sample, and the best by definition
        scores = {n: torch.cat([s[n] for s in kept["scores"][how]]) for n in kept["scores"][how][0]}
        counts = rows_per_prompt(run, args, models.shares)
        rows.append(table_row(run, args, kept, scores, how) | dict(
            s_per_prompt=kept["seconds"] / len(prompts), denoiser_calls=counts["denoiser"], value_calls=counts["value"], score_calls=counts["score"],
            gflop_per_prompt=flop_per_prompt(counts, costs)) | ({"lambda": spread and run["lam"], "lambda_raw": run["lam"] / unit} if run["method"].startswith("fks") else {}))
        per_prompt.append([round(v, 6) if v == v else None for v in scores["reward"].tolist()])
    if dead := sum(int(b["killed"].sum()) for run, kept in zip(runs, found) if run in sampled for b in kept["books"]):
        print(f"warning: {dead} particles became NaN or infinite and were given weight zero")
    print_table(rows, ("method", "n_particles", "m_proposals", "lambda", "proposal", "potential_value", "report", "reward", "reward_se", *[k for k in scorers], "n", "s_per_prompt",
                       "denoiser_calls", "gflop_per_prompt", "ess", "ancestors"))
    save_table(args, "06_fks", rows, rewards_of_prompts=per_prompt, spread=spread, gflop_per_row=costs, shared=models.shares,
               values=[dict(stage=a["stage"], id=a["id"]) for a in parents])
    draw_scaling(rows, [k for k in scorers if k not in names], Path(args.out) / "06_scaling.png", f"{args.reward} + {args.backbone}, {len(prompts)} prompts")
    last = {label(run, args): (run, kept) for run, kept in zip(runs, found)}  # the largest N of each curve
    save_image_grid([torch.stack(kept["images"]) for _, kept in last.values()], [f"{name}\nN={run['N']}" for name, (run, _) in last.items()], texts[:6],
                    Path(args.out) / "06_grid.png")


def draw_scaling(rows, others, path, title):
    """The guiding reward, and up to three scorers that did not guide, against the counted compute and the seconds of this run; a curve for each method and M."""
    import matplotlib.pyplot as plt
    panels = ["reward", *sorted(others, key=lambda k: k not in ("judge", "geneval", "imagereward"))[:3]]
    figure, axes = plt.subplots(2, len(panels), figsize=(4.4 * len(panels), 7), squeeze=False)
    for axis, (unit, key) in zip(axes.flat, product(("gflop_per_prompt", "s_per_prompt"), panels)):
        for name in dict.fromkeys((r["curve"], r["report"]) for r in rows):
            mine = [r for r in rows if (r["curve"], r["report"]) == name]
            axis.errorbar([r[unit] for r in mine], [r[key] for r in mine], [r[f"{key}_se"] or 0 for r in mine], marker="o", ms=4, capsize=2,
                          label=name[0] + (f" ({name[1]})" if len({r["report"] for r in rows}) > 1 else ""))
            for r in mine:
                axis.annotate(r["n_particles"], (r[unit], r[key]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel={"gflop_per_prompt": "GFLOP per prompt", "s_per_prompt": "seconds per prompt"}[unit], title=key)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title + " (beside the points: N)")
    save_figure(figure, path)


if __name__ == "__main__":
    main(parse_args())
