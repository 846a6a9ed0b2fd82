"""House rules: what every stage file has in common, so that each can be read, diffed and copied alone."""
import ast
import builtins
import importlib
import re
import shlex
import symtable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(p.stem for p in ROOT.glob("0[0-9]_*.py"))
FIRST = ["--preset", "--backbone", "--reward", "--out", "--seed", "--device", "--dtype"]
HEAVY = {"diffusers", "open_clip", "transformers", "matplotlib"}  # seconds each: --help and a mistyped flag should answer at once
BEGIN, END = "# ---- ALGORITHM: copy from here ----", "# ---- to here ----"


def source(name):
    return (ROOT / f"{name}.py").read_text()


def test_the_stages_are_found():
    """The other tests run over this list."""
    assert {"01_cache_features", "02_fit_stitch", "03_finetune", "04_eval_noisy"} <= set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_docstring_has_every_part(stage):
    doc = ast.get_docstring(ast.parse(source(stage)))
    missing = [word for word in ("Paper", "Reads", "Writes", "Run", "Departs") if not re.search(rf"^{word}\b", doc, re.M)]
    assert not missing
    assert doc.startswith(f"Stage {stage[:2]} -- ") and f"python {stage}.py" in doc


# ---------------------------------------------------------------------------- flags
@pytest.fixture(params=STAGES)
def stage_and_flags(request, monkeypatch):
    """The module and its parser's actions, without parsing anything."""
    stage = importlib.import_module(request.param)
    monkeypatch.setattr(stage, "parse_stage", lambda parser, presets, argv=None: parser)
    return stage, [a for a in stage.parse_args([])._actions if a.dest != "help"]


def test_first_flags_are_the_same(stage_and_flags):
    """The same flags in the same order, so that a diff of two stages shows the method only."""
    assert [a.option_strings[0] for a in stage_and_flags[1]][:len(FIRST)] == FIRST


def test_presets_are_made_of_flags(stage_and_flags):
    """argparse takes in silence a default of a mistyped name, one that is no choice, and one of the wrong type."""
    stage, flags = stage_and_flags
    known = {a.dest: a for a in flags}
    assert list(stage.PRESETS) == ["mini", "24gb", "paper"]
    for name, preset in stage.PRESETS.items():
        assert set(preset) <= set(known) - {"preset"}, name
        for k, v in preset.items():
            assert not known[k].choices or set(v if known[k].nargs == "+" else [v]) <= set(known[k].choices), (name, k)
            assert known[k].type not in (int, float) or all(type(x) in (int, known[k].type) for x in (v if known[k].nargs == "+" else [v])), (name, k)


def commands():
    """(stage, flags) of every command line in the README and in the stages' docstrings."""
    lines = [l for text in [(ROOT / "README.md").read_text(), *(ast.get_docstring(ast.parse(source(s))) for s in STAGES)] for l in text.splitlines()]
    for part in (p for l in lines for p in re.split(r"&&|\|\|", l.split(" #")[0])):
        if found := re.search(r"(?:python|launch|nproc-per-node \d+) (0\d_\w+)\.py(.*)$", part):
            yield found[1], shlex.split(found[2])


def test_documented_commands_have_flags_that_exist():
    found = list(commands())
    assert {stage for stage, _ in found} == set(STAGES) and len(found) > 20
    for stage, flags in found:
        importlib.import_module(stage).parse_args(flags)


# ---------------------------------------------------------------------------- imports
def imported(tree, top_only=False):
    """First parts of the names of imported modules; top_only: those that importing the file imports."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        if not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes += ast.iter_child_nodes(node)
    return found


def test_imported_sees_what_it_should():
    """Nested in try, if or class counts at the top; inside a function does not."""
    tree = ast.parse("try:\n    import a.b\nexcept ImportError:\n    from c import d\nclass K:\n    import e\n    def f(self):\n        import g\n")
    assert imported(tree, top_only=True) == {"a", "c", "e"} and imported(tree) == {"a", "c", "e", "g"}


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_no_stage_is_imported(name):
    """A digit keeps `import` statements out; the other ways in are these names."""
    tree = ast.parse(source(name))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not names & {"__import__", "import_module", "spec_from_file_location", "run_path", "run_module", "exec"}
    assert not imported(tree) & ({"runpy", "imp"} | set(STAGES))


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_nothing_heavy_at_the_top_and_no_fixed_device(name):
    text = source(name)
    assert not imported(ast.parse(text), top_only=True) & HEAVY
    assert ".cuda(" not in text and not re.search(r"""\.to\(["']cuda""", text)


# ---------------------------------------------------------------------------- the block to copy
def foreign_names(block, allowed=()):
    """Global names that a piece of source uses beyond `allowed`, builtins and the functions that it defines itself."""
    top = symtable.symtable(block, "block", "exec")
    used, scopes = set(), [top]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        used |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and (scope is top or s.is_global())}
    own = {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    return used - own - set(allowed) - set(dir(builtins))


@pytest.mark.parametrize("planted", [
    "def f(x):\n    return x * args.x", "def f(x):\n    return [args.x + y for y in x]", "def f(x):\n    return (lambda y: args.x)(x)", "def f(x, y=args.x):\n    return x",
    "@args.x\ndef f(x):\n    return x", "class K:\n    def f(self):\n        return args.x", "def f(x):\n    global args\n    return args.x"])
def test_a_planted_global_is_caught(planted):
    assert foreign_names(planted) == {"args"}


def test_own_names_are_not_foreign():
    """Parameters, locals, local imports, closures, builtins and functions of the same block."""
    block = "def f(args):\n    from a import b\n    y = len(b)\n    return [lambda: y + z + args.x for z in range(3)]\ndef g():\n    return f(1)"
    assert foreign_names(block) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_the_algorithm_can_be_copied(stage):
    """Between the markers nothing is used but torch, math, numpy, what comes from common, and the block's own functions."""
    text = source(stage)
    assert text.count(BEGIN) == text.count(END) == 1
    block = text.split(BEGIN)[1].split(END)[0]
    common = {a.asname or a.name for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and n.module == "common" for a in n.names}
    assert foreign_names(block, {"torch", "math", "np", "F", "nn"} | common) == set()
    functions = [n for n in ast.parse(block).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert functions and all(ast.get_docstring(n) for n in functions)


# ---------------------------------------------------------------------------- weights
def bad_weights(folder):
    """{file: what is wrong} of the weights below a folder, its data/ and work/ (which are never committed) left out."""
    bad = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not re.fullmatch(r"data(\.\d+\.tmp)?|work", p.relative_to(folder).parts[0])):
        name = path.relative_to(folder).as_posix()
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}:
            bad[name] = "can run code when it is loaded"
        elif path.suffix == ".safetensors":
            try:
                tensors = load_file(path)
            except SafetensorError:
                bad[name] = "is broken"
                continue
            if not tensors or not all(v.isfinite().all() for v in tensors.values()):
                bad[name] = "is empty, NaN or infinite"  # half precision overflows at 65504
    return bad


def test_bad_weights_are_caught(tmp_path):
    for name in ("clip/a.bin", "clip/deep/b.pt", "c.pkl", "data/d.pt", "work/e.pt", "clip/f.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    save_file(dict(w=torch.ones(3).half()), tmp_path / "good.safetensors")
    save_file(dict(w=torch.tensor([1e6]).half()), tmp_path / "overflown.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-2])
    assert sorted(bad_weights(tmp_path)) == ["c.pkl", "clip/a.bin", "clip/deep/b.pt", "cut.safetensors", "overflown.safetensors"]


def test_the_miniatures_weights_are_safe():
    assert bad_weights(ROOT / "tests" / "mini") == {}
