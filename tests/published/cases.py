"""What each stage holds and runs at published size: for price.py, and on a card for test_gpu.py.

A stage is a generator of cases over its own step functions, at its own batch, on the models of
sizes.py: when it yields a case it holds what the stage has loaded by then, and nothing else.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import ceil
from types import SimpleNamespace

import torch
from sizes import Published, optimizer_of

import common

# where a value is cut: the paper's choice for CLIP on SD 3.5 Medium, and a late one
CUTS = [4, 12]
TRAINING_IMAGES = 100_000
DRAWBENCH = 200  # prompts
CARDS = (24, 48, 80)  # GB
GIB = 2**30
SPEED = {torch.float32: 0.5}  # of --tflops: TF32's
ON_CPU = 0.2  # TFLOP/s in float64


@dataclass
class Cost:
    """FLOP by dtype; GiB that are there before, more when the way back begins, and at most."""

    flop: Counter
    loaded: float = 0.0
    saved: float = 0.0
    peak: float = 0.0


@dataclass(eq=False)
class Step:
    """What a stage runs again and again, in one call; its cost is counted once."""

    name: str
    run: callable
    learns: bool = False  # else without gradient, but for those that it asks for itself
    cost: Cost = None

    def __call__(self):
        with torch.set_grad_enabled(self.learns):
            self.run()


@dataclass
class Case:
    """A row: a unit of work takes each step so many times, n units are a whole run."""

    method: str
    unit: str
    n: int
    times: dict  # of each Step

    def row(self, tflops):
        """Its line of the table, once its steps have been counted."""
        flop = Counter()
        for step, times in self.times.items():
            for dtype, x in step.cost.flop.items():
                flop[dtype] += times * x / 1e12
        row = dict(method=self.method, unit=self.unit, tflop=flop.total())
        for key in ("loaded", "saved", "peak"):
            row[f"{key}_gib"] = max(getattr(step.cost, key) for step in self.times)
        fits = [f"{card} GB" for card in CARDS if row["peak_gib"] < 0.95 * card * 1e9 / GIB]
        fits = ["CPU"] if torch.float64 in flop else fits or [f"no card of {CARDS[-1]} GB"]
        speeds = {dtype: tflops * SPEED.get(dtype, 1) for dtype in flop} | {torch.float64: ON_CPU}
        hours = sum(x / speeds[dtype] for dtype, x in flop.items()) * self.n / 3600
        return row | dict(n=self.n, hours=hours, fits=fits[0])


def reading(models, n, batch=32):
    """n prompts are encoded before anything else is loaded."""
    encoders = models.backbone.text_encoders()
    batch = min(batch, n)

    def encode():
        for model, tokens in encoders:
            ids = torch.zeros(batch, tokens, dtype=torch.long, device=models.device)
            model(ids, output_hidden_states=tokens == 77)

    yield Case("text encoders", "prompt", n, {Step("text encoders", encode): 1 / batch})


def scoring(args, models, n, batch=64):
    """n images are scored by the reward and by every scorer."""
    images = torch.zeros(batch, 3, args.resolution, args.resolution, dtype=torch.uint8)
    given = models.rewards, args.preset, models.device, images, ["a prompt"] * batch
    step = Step("scoring", partial(common.score_images, args.scorers, *given))
    yield Case("scoring", "image", n, {step: 1 / batch})


# ---------------------------------------------------------------------------- 01 to 04
def cases_01(args, stage, models):
    yield from reading(models, 1)
    backbone, reward, B = models.backbone, models.rewards[0], args.batch
    x = models.random(B, 3, args.resolution, args.resolution).byte()
    models.load("vae")
    latents = Step("latents", lambda: backbone.encode(x / 255))
    yield Case("latents", "image", args.limit or TRAINING_IMAGES, {latents: 1 / B})
    backbone.free()
    models.load("transformer")
    z, t, null = models.latents(B).to(models.dtype), models.random(B), models.condition(1)
    pixels = models.random(B, 3, reward.size, reward.size)

    def probe():
        stage.dit_features(backbone.transformer, z, t, null, reward.visual.grid_size)
        reward.embed(pixels)
        stage.tokens_by_depth(reward.visual, reward.normalise(pixels), args.j_max)

    yield Case("probe set", "image", args.probe, {Step("probe set", probe): 1 / B})


def cases_02(args, stage, models):
    """By formula, no network runs: SVD takes 4 M D^2 + 8 D^3 (Golub & Van Loan, Sec. 5.5)."""
    visual, transformer = models.rewards[0].visual, models.backbone.transformer
    D, d = transformer.inner_dim, visual.conv1.out_channels
    M = 200 * visual.grid_size[0] ** 2
    flop = Counter({torch.float64: 4 * M * D * D + 8 * D**3 + 4 * M * D * d})
    step = Step("closed form", None, cost=Cost(flop, peak=8 * M * (2 * D + 2 * d) / GIB))
    yield Case("closed form", "(i, j)", 4 * len(common.dit_blocks(transformer)), {step: 1})


def cases_03(args, stage, models):
    n = args.steps or ceil(args.epochs * TRAINING_IMAGES / args.batch)
    for i in [0] if args.front == "vae" else CUTS:
        name = f"stitchvm, i = {i}" if i else "vae-stitch"
        step = Step(name, training(args, stage, models, i), learns=True)
        yield Case(name, f"step of {args.batch}", n, {step: 1})


def training(args, stage, models, i):
    """A step from cached latents."""
    reward, B = models.rewards[0], args.batch
    value = models.value(reward, i, models.backbone.prefix(i) if i else None)
    optimizer = optimizer_of([p for p in value.parameters() if p.requires_grad])
    pixels = models.random(B, 3, reward.size, reward.size).byte()
    batch = models.latents(B), models.random(B), pixels

    def step():
        parts = [x.split(args.micro_batch or B) for x in batch]
        for z, t, pixels in zip(*parts, strict=True):
            target = stage.clean_target(reward, pixels / 255)
            stage.step_loss(value, reward, z, t, target, args.lam_tok)[0].backward()
        optimizer.step()

    return step


def cases_04(args, stage, models):
    reward, size = models.rewards[0], args.resolution  # it is there first
    yield from reading(models, 1)
    for i in CUTS:
        yield from estimates(args, stage, models, i)
    x, pixels = (models.random(args.batch, 3, s, s) for s in (size, reward.size))

    def clean():
        reward.embed(x)
        reward.visual(pixels)
        models.backbone.encode(x)

    yield Case("clean", "image", 5000, {Step("clean", clean): 1 / args.batch})


def estimates(args, stage, models, i):
    """One value, and with the first the estimates without any."""
    backbone, reward, B = models.backbone, models.rewards[0], args.batch
    models.load("transformer", "vae")
    value, *_held = (models.values(k)[0] for k in (i, 0, 0))  # and of both baselines
    z, sigma, null = models.latents(B), models.random(B), models.condition(1)
    calls = {f"stitchvm, i = {i}": partial(value.embed, z, sigma)}
    if i == CUTS[0]:
        given = backbone, reward, null, z
        calls["tweedie"] = partial(stage.tweedie_embed, *given, sigma)
        given += 0.5, backbone.grid(args.rollout_steps, args.resolution)
        calls["mc-1"] = partial(stage.rollout_embeddings, *given, 1, common.generator(0), B)
    for name, call in calls.items():
        # five sigmas, two draws, COCO's 5,000 images
        yield Case(name, "value at sigma 0.5", 5 * 2 * 5000, {Step(name, call): 1 / B})


# ---------------------------------------------------------------------------- 05
def cases_05(args, stage, models):
    yield from reading(models, DRAWBENCH)
    for i in CUTS:
        yield from guided_steps(args, stage, models, i)
    models.backbone.free()
    yield from scoring(args, models, DRAWBENCH)


def guided_steps(args, stage, models, i):
    """By one value, and with the first those without any."""
    backbone, B = models.backbone, args.batch
    models.load("transformer", "vae")
    run = SimpleNamespace(backbone=backbone, device=models.device, rewards=models.rewards)
    run.values, run.condition, run.texts = models.values(i), models.condition(B), models.texts(B)
    cfg = backbone.cfg if args.cfg is None else args.cfg
    more = dict(null=models.condition(1), cfg=cfg, checkpointing=args.checkpointing)
    run.velocity = partial(backbone.velocity, **more)
    if args.checkpointing:
        backbone.vae.enable_gradient_checkpointing()
    z, *_noises = models.latents((args.steps + 1) * B).split(B)
    run.shape = z.shape[1:]
    kinds = {f"stitchvm, i = {i}": ("stitchvm", None)}
    if cfg != 1:
        kinds[f"stitchvm, i = {i}, shared"] = "stitchvm", backbone.transformer
    if i == CUTS[0]:
        kinds = {"flow": ("flow", None), "tweedie": ("tweedie", None)} | kinds
    sigma = models.random(B)
    for name, (kind, run.share) in kinds.items():
        velocity, gradients = stage.step_functions(run, slice(B))
        times = {Step(name, partial(gradients[kind] or velocity, z, sigma)): 1 / B}
        if kind == "tweedie":  # its work and memory are measured first
            times[Step("costs of tweedie", partial(stage.costs, run, [kind]))] = 0
        yield Case(name, "step", args.steps * DRAWBENCH, times)
    if i == CUTS[0]:
        decode = Step("decode", partial(backbone.decode, z))
        yield Case("decode", "image", DRAWBENCH, {decode: 1 / B})


# ---------------------------------------------------------------------------- 06
def cases_06(args, stage, models):
    yield from reading(models, DRAWBENCH)
    stage.complete(args, models.backbone)
    for i in CUTS:
        yield from steered(args, stage, models, i)
    models.backbone.free()
    yield from scoring(args, models, DRAWBENCH)


def rows_per_prompt(stage, run, args, shares):
    """Rows of each call that one prompt takes, by running the sampler itself on counting fakes."""
    rows = dict(denoise=0, resume=0, value=0, score=0)
    grid = torch.linspace(1, 0, args.steps + 1).tolist()

    def tell(kind, z):
        rows[kind] += len(z)
        return torch.zeros(len(z))

    def denoise(z, t, prefix):
        tell("resume" if prefix else "denoise", z)
        return torch.zeros_like(z)

    def value(z, t):  # its prefix goes on as the null half of a guided denoiser
        return tell("value", z), dict(i=0) if shares else None

    def noise(k, M):
        return torch.zeros(1, run["N"], M, 1)

    given = torch.zeros(1, run["N"], 1), grid, denoise, noise
    if run["method"] == "prune":
        z, _ = stage.prune(*given, value, args.prune_at)
    else:
        given += lambda k: torch.full((2, 1, run["N"]), 0.5), partial(tell, "score"), value, 1.0
        z, _ = stage.steer(*given, **stage.settings(run, args))
    tell("score", z[0])  # the clean images
    return rows


def particle_calls(args, stage, models, i):
    """06's Models, of one prompt and its values after block i."""
    calls = stage.Models.__new__(stage.Models)
    one = torch.zeros(1, dtype=torch.long, device=models.device)
    given = dict(backbone=models.backbone, rewards=models.rewards, values=models.values(i))
    given |= dict(null=models.condition(1), condition=models.condition(1), prompts=one)
    given |= dict(texts=models.texts(1), shares=args.cfg != 1, cfg=args.cfg, batch=args.batch)
    known = ("velocity", "resumed velocity", "joint", "clean")  # it has not to count them
    vars(calls).update(given, rows=Counter(), gflop=dict.fromkeys(known, 0.0))
    return calls


def steered(args, stage, models, i):
    """The runs by one value, and with the first those without any."""
    models.load("transformer", "vae")
    calls, z = particle_calls(args, stage, models, i), models.latents(args.batch)
    with torch.no_grad():
        prefix = calls.value(z, 0.5)[1]
    runs = dict(denoise=partial(calls.denoise, z, 0.5, None), score=partial(calls.score, z))
    runs["resume"] = partial(calls.denoise, z, 0.5, prefix)
    steps = {name: Step(name, run) for name, run in runs.items()}
    for run in stage.plan(args):
        by_value = run["method"] in ("prune", "fks+stitchvm")
        if i != CUTS[0] and not by_value:
            continue
        rows = rows_per_prompt(stage, run, args, calls.shares)
        proposals = models.latents(args.batch * run["M"])
        steps["value"] = Step(f"value, i = {i}", partial(calls.value, proposals, 0.5))
        sizes = dict.fromkeys(steps, args.batch) | dict(value=len(proposals))
        times = {steps[name]: n / sizes[name] for name, n in rows.items() if n}
        name = stage.label(run, args) + f" N={run['N']}" + f", i = {i}" * by_value
        yield Case(name, "prompt", DRAWBENCH, times)


# ---------------------------------------------------------------------------- 07 and 08
def finetuned(args, stage, models, values):
    """What is there of the LoRAs besides: a copy of the trained one's start, its optimiser."""
    stage.own_prefixes(values)
    transformer = models.backbone.transformer
    with models.device:
        lora = [stage.add_lora(transformer, args.rank, args.alpha, n) for n in stage.POLICIES]
    transformer.set_adapter("default")
    return [p.detach().clone() for p in lora[0]], optimizer_of(lora[0])


def evaluating(args, stage, models):
    """Held-out prompts are sampled, decoded and scored beside all that trains."""
    backbone, B = models.backbone, args.batch
    z, condition = models.latents(B), models.condition(B)
    step = Step("step", partial(backbone.velocity, z, models.random(B), condition))
    last = Step("image", partial(stage.evaluate, backbone, condition, z, [1.0, 0.0], B))
    n = (args.eval_limit or DRAWBENCH) * (1 + (args.updates or 0) // args.eval_every)
    yield Case("evaluation", "image", n, {step: (args.eval_steps - 1) / B, last: 1 / B})
    yield from scoring(args, models, n)


def cases_07(args, stage, models):
    yield from reading(models, DRAWBENCH)
    backbone, B, i = models.backbone, args.batch, CUTS[0]
    methods = stage.check(args)
    models.load("transformer", "vae")
    values = models.values(i) if any(m["stops"] for m in methods.values()) else []
    _held = finetuned(args, stage, models, values)
    if args.checkpointing:
        backbone.vae.enable_gradient_checkpointing()
    z, condition, texts = models.latents(B), models.condition(B), models.texts(B)
    step = Step("step", partial(backbone.velocity, z, models.random(B), condition))
    for name, method in methods.items():
        keep, stops = method["keep"], method["stops"]
        by = values if stops else []
        given = backbone, models.rewards, by, condition, texts, method["checkpointing"]
        loss = partial(stage.draft_loss, *stage.step_functions(*given), z)
        kept = [keep] if keep else [1, args.steps - 1]  # AlignProp's is uniform
        stop = sum(stops) / 2 if stops else args.steps
        times = {step: (stop - sum(kept) / len(kept)) / B}
        for k in kept:
            run = partial(draft_step, loss, k, args.regularise)
            times[Step(f"{name}, {k} kept", run, learns=True)] = 1 / len(kept) / B
        n = B * args.accumulate * (args.updates or 0)
        yield Case(name + f", i = {i}" * bool(stops), "sample", n, times)
    yield from evaluating(args, stage, models)


def draft_step(loss, keep, lam):
    """The `keep` last steps of a rollout, its end, and the way back."""
    grid = [1 - k / (keep + 1) for k in range(keep + 1)]
    loss(grid, keep, keep, lam)[0].backward()


def cases_08(args, stage, models):
    yield from reading(models, DRAWBENCH)
    stage.check(args)
    backbone, rewards, B, i = models.backbone, models.rewards, args.batch, CUTS[0]
    models.load("transformer", "vae")
    values = models.values(i)
    _held = finetuned(args, stage, models, values), models.latents(args.prompts * args.images)
    z, t, texts = models.latents(B), models.random(B), models.texts(B)
    velocity = partial(stage.policy_velocity, backbone, models.condition(B))
    step = Step("step", partial(velocity(), "old", z, t))
    reward = Step("reward", lambda: common.clean_reward(rewards, texts, backbone.decode(z)))
    value = Step("value", partial(common.joint_value, values, z, t, texts))
    loss = partial(stage.train_loss, velocity(args.checkpointing), z, t, z, t, t)
    loss = partial(loss, args.loss, args.beta, args.kl)
    train = Step("training", lambda: sum(loss()).sum().backward(), learns=True)
    stops = range(args.stop[0], args.stop[1] + 1)
    mean, levels = sum(stops) / len(stops), args.train_times
    below = sum(min(levels, stop) for stop in stops) / len(stops)
    by_value = f"nft+stitchvm, i = {i}"
    kinds = {"nft": (args.steps, reward, levels), by_value: (mean, value, below)}
    kinds[f"{by_value}, as many noise levels as nft"] = mean, value, levels
    kinds["nft, rollout and reward only"] = args.steps, reward, 0
    kinds[f"{by_value}, rollout and value only"] = mean, value, 0
    n = (args.updates or 0) * args.prompts * args.images
    for name, (steps, end, levels) in kinds.items():
        times = {step: steps / B, end: 1 / B} | ({train: levels / B} if levels else {})
        yield Case(name, "sample", n, times)
    yield from evaluating(args, stage, models)


def cases_of(stage, args, device):
    """The cases of a stage, by its module and flags, on a device."""
    number = stage.__name__[:2]
    names = args.reward.split("+") if number >= "05" else [args.reward]
    return globals()[f"cases_{number}"](args, stage, Published(args, names, device))
