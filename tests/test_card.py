"""What a card has to hold: models cut before they are moved, towers, embeddings, scorers in turn.

Tests marked slow are left out by default: python -m pytest -m slow.
"""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import common

IMAGES = torch.randint(0, 256, (3, 3, 64, 64), generator=common.generator("images")).byte()
TEXTS = ["a small red circle on a white background"] * 3


@pytest.fixture
def moved(monkeypatch):
    """(class, blocks) of every transformer that is moved to a device, in order."""
    seen = []
    move = nn.Module.to

    def spy(module, *args, **kwargs):
        if hasattr(module, "transformer_blocks"):
            seen.append((type(module).__name__, len(common.dit_blocks(module))))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", spy)
    return seen


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux"])
def test_a_transformer_is_cut_before_it_is_moved(moved, name):
    """FLUX whole is 22 GiB; its first four blocks are 2.6. They run as those of the whole one."""
    backbone = common.Backbone(name)
    null = backbone.prompts([""])
    moved.clear()
    few = backbone.prefix(2)
    assert [blocks for _, blocks in moved] == [2]
    z = torch.randn(1, *backbone.latent_shape(64), generator=common.generator("z"))
    given = z, torch.tensor([0.5]), *null
    whole = common.run_blocks(backbone.transformer, common.begin(backbone.transformer, *given), 2)
    cut = common.run_blocks(few, common.begin(few, *given))
    assert cut["i"] == 2 and torch.equal(cut["h"], whole["h"])


def test_of_another_backbone_only_the_values_blocks_are_loaded(moved, values):
    """A Medium value on Large: of Medium no more than the deepest cut, once for two values."""
    large = common.Backbone("sd3.5-large")
    rewards = [common.Reward("clip"), common.Reward("hpsv2")]
    files = [values["clip"], values["hpsv2"]]
    loaded, _ = common.load_values(files, large, rewards, 64)
    assert [blocks for _, blocks in moved] == [3]  # conftest's cuts are 3 and 2
    assert loaded[0].transformer is loaded[1].transformer


def test_a_freed_generator_is_gone_and_loads_again():
    backbone = common.Backbone("sd3.5-medium")
    gone = [weakref.ref(backbone.transformer), weakref.ref(backbone.vae)]
    backbone.free()
    assert not any(ref() for ref in gone)
    assert len(common.dit_blocks(backbone.transformer)) > 0


def test_embeddings_stay_in_their_file(tmp_path):
    """Memory-mapped, from the first run on; the same numbers as without a file."""
    texts = ["a red circle", "", "two small blue stars"]
    plain = common.Backbone("sd3.5-medium").prompts(texts, batch=2)
    for _ in ("written", "read"):
        found = common.Backbone("sd3.5-medium").prompts(texts, tmp_path, batch=2)
        (file,) = tmp_path.iterdir()
        for a, b in zip(found, plain, strict=True):
            assert a.device.type == "cpu" and torch.equal(a, b)
            assert a.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
        assert file.stat().st_size == sum(v.nbytes for v in found) + 8  # its own size last
    before = found[0].clone()
    found[0][:] = 0.0  # what a reader does to them does not reach the file
    assert torch.equal(common.Backbone("sd3.5-medium").prompts(texts, tmp_path)[0], before)


def test_a_text_tower_visits_the_device_only_to_read(monkeypatch):
    reward = common.Reward("clip")
    places = []
    move = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda m, d: places.append(d) or move(m, d))
    monkeypatch.setattr(nn.Module, "cpu", lambda m: places.append("back") or m)
    wanted = reward.text(TEXTS)
    assert places == [torch.device("cpu"), "back"] and wanted.shape[0] == 3
    assert not hasattr(reward.text_model, "visual")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_run_in_the_runs_precision(monkeypatch, dtype):
    """Products in bfloat16, weights and results in float32, also of a value and with gradient."""
    reward = common.Reward("clip", dtype=dtype)
    block = reward.visual.transformer.resblocks[-1].mlp.c_fc
    seen = []
    block.register_forward_hook(lambda m, given, y: seen.append(y.dtype))
    e, tokens = reward.embed(IMAGES / 255)
    assert e.dtype == tokens.dtype == torch.float32 and seen == [dtype]
    exact = common.Reward("clip").embed(IMAGES / 255)[0]
    assert_close(F.cosine_similarity(e, exact), torch.ones(3), atol=2e-3, rtol=0)
    width, grid = reward.visual.conv1.out_channels, reward.visual.grid_size
    stitch = common.Stitch(torch.randn(width, 16) / 4, torch.zeros(width), grid)
    value = common.StitchedValue(None, [], reward, stitch, 0, 1, front="vae")
    z = torch.randn(2, 16, 8, 8, requires_grad=True)
    v = value(z, torch.tensor([0.5, 0.5]), F.normalize(torch.randn(e.shape[1]), dim=0))
    v.sum().backward()
    assert v.dtype == torch.float32 and seen[1:] == [dtype]  # the hook is copied with the tower
    assert z.grad.dtype == torch.float32 and z.grad.abs().max() > 0
    assert value.stitch.F.weight.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_what_bfloat16_changes_at_published_size(name):
    """Random weights: |e - e'|^2 .00015 of unit vectors, tokens 1.2 %, scores .0005 of .03."""
    torch.manual_seed(0)
    reward = common.Reward(name, "paper", weights=False)
    x = F.interpolate(torch.rand(2, 3, 12, 12), (512, 512), mode="bicubic").clamp(0, 1)
    exact, tokens = reward.embed(x)
    reward.dtype = torch.bfloat16
    e, h = reward.embed(x)
    gap = (F.normalize(e, dim=-1) - F.normalize(exact, dim=-1)).square().sum(1)
    assert 0 < gap.max() < 5e-4 and (h - tokens).norm() < 0.03 * tokens.norm()


# ---------------------------------------------------------------------------- scorers
def scores(monkeypatch, build):
    reward = common.Reward("clip")
    monkeypatch.setattr(common, "Reward", build)
    return common.score_images(["dfn-clip", "hpsv2"], [reward], "mini", "cpu", IMAGES, TEXTS)


def test_one_scorer_is_in_memory_at_a_time(monkeypatch):
    load = common.Reward
    alive = []

    def build(name, *args):
        assert not any(ref() for ref in alive), "the last scorer is still there"
        scorer = load(name, *args)
        alive.append(weakref.ref(scorer))
        return scorer

    assert list(scores(monkeypatch, build)) == ["reward", "dfn-clip", "hpsv2"] and len(alive) == 2


def test_only_a_scorer_that_cannot_be_had_loses_its_column(monkeypatch, capsys):
    load = common.Reward

    def build(name, *args):
        if name == "dfn-clip":
            raise common.Unavailable("error: dfn is not on this machine")
        return load(name, *args)

    assert list(scores(monkeypatch, build)) == ["reward", "hpsv2"]
    assert "no column dfn-clip: dfn is not on this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [SystemExit("error: broken file"), torch.OutOfMemoryError("full")]
)
def test_any_other_failure_of_a_scorer_stops_the_run(monkeypatch, error):
    def build(*args):
        raise error

    with pytest.raises(type(error)):
        scores(monkeypatch, build)


def test_memory_that_runs_out_while_loading_is_no_unreadable_file():
    with pytest.raises(torch.OutOfMemoryError), common.needs("some/model"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_is_one_sentence(capsys):
    """Of a GPU, behind another error, or of the CPU's allocator; all else keeps its traceback."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(on_cpu)):
        common.show_error(type(error), error, None)
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory") and len(said.splitlines()) == 1
    common.show_error(ValueError, ValueError("else"), None)
    assert "ValueError: else" in capsys.readouterr().err


def test_the_stages_set_the_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    parser = common.stage_parser("01_x.py", "", {"mini": {}})
    common.parse_stage(parser, {"mini": {}}, ["--device", "cpu"])
    assert sys.excepthook is common.show_error


# ---------------------------------------------------------------------------- resume, compile
def test_finished_work_is_read_back(tmp_path):
    """With resume and equal flags only; other flags are refused with a table."""
    path, calls = tmp_path / "0.parts" / "1.pt", []

    def work():
        calls.append(1)
        return dict(x=torch.ones(2), seconds=1.5)

    given = path, "05_dps", dict(steps=3)
    for resume, n in ((True, 1), (True, 1), (False, 2)):
        found = common.once(*given, resume, work)
        assert torch.equal(found["x"], torch.ones(2)) and len(calls) == n
    with pytest.raises(SystemExit, match="does not fit this run"):
        common.once(path, "05_dps", dict(steps=4), True, work)


def test_compiled_blocks_give_equal_velocities():
    """Compiled in place, block by block, so that cutting, resuming and gradients are as ever."""
    results = []
    for compiles in (False, True):
        backbone = common.Backbone("sd3.5-medium", compiles=compiles)
        null = backbone.prompts([""])
        transformer = backbone.prefix(2)
        z = torch.randn(2, *backbone.latent_shape(64), generator=common.generator("compiled"))
        z.requires_grad_()
        state = common.begin(
            transformer, z, torch.tensor([0.3, 0.6]), *[v.expand(2, *v.shape[1:]) for v in null]
        )
        h = common.run_blocks(transformer, state)["h"]
        h.square().sum().backward()
        results.append((h.detach(), z.grad))
        compiled = [b._compiled_call_impl is not None for b in common.dit_blocks(transformer)]
        assert compiled == [compiles] * 2
    for plain, fast in zip(*results, strict=True):
        assert_close(fast, plain, atol=1e-5 * float(plain.abs().max()), rtol=0)


# ---------------------------------------------------------------------------- blocks on the CPU
@pytest.mark.parametrize("name", ["sd3.5-medium", "flux"])
def test_blocks_that_visit_give_equal_states(name):
    """After every block, and the gradient through all, to the bit; with checkpointing as well."""
    results = []
    for offloads in (False, True):
        backbone = common.Backbone(name, offloads=offloads)
        null = backbone.prompts([""])
        transformer = backbone.transformer
        z = torch.randn(2, *backbone.latent_shape(64), generator=common.generator("visit"))
        z.requires_grad_()
        given = z, torch.tensor([0.3, 0.6]), *[v.expand(2, *v.shape[1:]) for v in null]
        state = common.begin(transformer, *given)
        found = []
        for i in range(1, len(common.dit_blocks(transformer)) + 1):
            state = common.run_blocks(transformer, state, i)
            found.append(state["h"])
        common.end(transformer, state).sum().backward()
        found.append(z.grad.clone())
        u = backbone.velocity(z, given[1], null, checkpointing=True)
        u.sum().backward()
        results.append([*found, u, z.grad])
        assert common.fingerprint(common.dit_blocks(transformer)[0])  # the weights can be seen
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_visit_the_device_and_stay_on_the_cpu(checkpointing):
    """On a device without data, which refuses tensors of the CPU: forward and backward."""
    null = common.Backbone("sd3.5-medium").prompts([""])
    backbone = common.Backbone("sd3.5-medium", device="meta", offloads=True)
    blocks = common.dit_blocks(backbone.transformer)
    inside = {p for block in blocks for p in block.parameters()}
    others = set(backbone.transformer.parameters()) - inside
    z = torch.randn(2, 16, 8, 8, device="meta", requires_grad=True)
    given = z, torch.rand(2, device="meta"), [v.to("meta") for v in null]
    backbone.velocity(*given, checkpointing=checkpointing).sum().backward()
    assert z.grad.device.type == "meta"
    assert {p.device.type for p in inside} == {"cpu"} and {p.device.type for p in others} == {
        "meta"
    }
