"""House rules: what every file has in common, so that each can be read, diffed and copied alone."""

import ast
import builtins
import importlib
import json
import re
import shlex
import subprocess
import symtable
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(p.stem for p in ROOT.glob("0[0-9]_*.py"))
FIRST = ["--preset", "--backbone", "--reward", "--out", "--seed", "--device", "--dtype"]
HEAVY = {"diffusers", "open_clip", "transformers", "matplotlib", "peft", "accelerate", "scipy"}
BEGIN = "# ---- ALGORITHM: copy from here ----"
END = "# ---- to here ----"
# lines after ruff format; the commit that set one says which lines a reader would miss below it
LINES = (269, 137, 337, 450, 355, 566, 489, 559)
BUDGET = dict(zip(STAGES, LINES, strict=True)) | {"common": 1692}
PYTHON = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "runs"} & set(p.parts))


def source(name):
    return (ROOT / f"{name}.py").read_text()


def test_the_stages_are_found():
    """The other tests run over this list."""
    assert [s[:2] for s in STAGES] == [f"0{k}" for k in range(1, 9)]


# ---------------------------------------------------------------------------- form
@pytest.mark.parametrize("name", ["common", *STAGES])
def test_a_file_keeps_to_its_budget(name):
    assert len(source(name).splitlines()) <= BUDGET[name]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_lines_are_at_most_100_columns(path):
    long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


def faults(text):
    """Line numbers of tuple assignments that do not unpack, tuples and lists made for their side
    effects, functions over 60 lines, closures over more than three locals."""
    found = []
    for node in ast.walk(ast.parse(text)):
        value = getattr(node, "value", None)
        pairs = isinstance(node, ast.Assign) and isinstance(value, ast.Tuple)
        pairs = pairs and any(isinstance(t, ast.Tuple) for t in node.targets)
        effects = isinstance(node, ast.Expr) and isinstance(value, (ast.Tuple, ast.List))
        long = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
        if pairs or effects or long:
            found.append(node.lineno)
    scopes = [symtable.symtable(text, "text", "exec")]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        comprehension = scope.get_name() in ("genexpr", "listcomp", "setcomp", "dictcomp")
        if scope.get_type() == "function" and not comprehension and len(scope.get_frees()) > 3:
            found.append(scope.get_lineno())
    return sorted(found)


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_one_statement_a_line_and_short_functions(name):
    assert faults(source(name)) == []


def test_faults_are_found():
    closure = "def f(a, b, c, d):\n    def g():\n        return a, b, c, d\n    return g\n"
    long = "def f():\n" + "    x = 1\n" * 60
    assert (
        faults("a, b = 1, 2\n") == faults("f(), g()\n") == faults("[f()]\n") == faults(long) == [1]
    )
    assert faults(closure) == [2] and faults("a, b = f()\n") == faults("a = 1, 2\n") == []


# ---------------------------------------------------------------------------- docstrings and flags
@pytest.mark.parametrize("stage", STAGES)
def test_docstring_has_every_part_in_25_lines(stage):
    doc = ast.get_docstring(ast.parse(source(stage)))
    parts = ("Paper", "Reads", "Writes", "Run", "Departs")
    assert not [word for word in parts if not re.search(rf"^{word}\b", doc, re.M)]
    assert doc.startswith(f"Stage {stage[:2]} -- ") and f"python {stage}.py" in doc
    assert len(doc.splitlines()) <= 25


@pytest.fixture(params=STAGES)
def stage_and_flags(request, monkeypatch):
    """The module and its parser's actions, without parsing anything."""
    stage = importlib.import_module(request.param)
    parsers = []

    def parse(parser, presets, argv=None, writes="out"):
        parsers.append(parser)
        return parser.parse_args([])

    monkeypatch.setattr(stage, "parse_stage", parse)
    stage.parse_args([])
    return stage, [a for a in parsers[0]._actions if a.dest != "help"]


def test_first_flags_are_the_same(stage_and_flags):
    """The same flags in the same order, so that a diff of two stages shows the method only."""
    assert [a.option_strings[0] for a in stage_and_flags[1]][: len(FIRST)] == FIRST


def test_presets_are_made_of_flags(stage_and_flags):
    """argparse takes in silence a default of a mistyped name, choice or type."""
    stage, flags = stage_and_flags
    known = {a.dest: a for a in flags}
    assert list(stage.PRESETS) == ["mini", "24gb", "paper"]
    for name, preset in stage.PRESETS.items():
        assert set(preset) <= set(known) - {"preset"}, name
        for k, v in preset.items():
            values = v if known[k].nargs in ("+", "*", 2) else [v]
            assert not known[k].choices or set(values) <= set(known[k].choices), (name, k)
    numeric = [k for k, a in known.items() if a.type in (int, float)]
    assert not numeric, f"{numeric} take 0, -1, nan and inf: give them a type of common.within"


def commands():
    """(stage, flags) of every command line in the pages and in the stages' docstrings."""
    pages = [(ROOT / p).read_text() for p in ("README.md", "docs/published.md")]
    pages += [ast.get_docstring(ast.parse(source(s))) for s in STAGES]
    lines = [line.split(" #")[0] for page in pages for line in page.splitlines()]
    for part in (p for line in lines for p in re.split(r"&&|\|\|", line)):
        if found := re.search(r"(?:python|launch|nproc-per-node \d+) (0\d_\w+)\.py([^`]*)", part):
            yield found[1], [f for f in shlex.split(found[2]) if f != "--dry-run"]


def test_documented_commands_have_flags_that_exist():
    found = list(commands())
    assert {stage for stage, _ in found} == set(STAGES) and len(found) > 20
    for stage, flags in found:
        importlib.import_module(stage).parse_args(flags)


def test_the_pages_code_runs(values, tmp_path, monkeypatch):
    """Every python block, on a value model that was never trained."""
    value = tmp_path / "runs/mini/sd3.5-medium_clip/value.pt"
    value.parent.mkdir(parents=True)
    value.write_bytes(values["clip"].read_bytes())
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [b for p in pages for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.S)]
    found = {}
    for block in blocks:
        exec(block, found)
    assert found["z_t"].grad.isfinite().all() and found["V"].shape == (1,)
    assert found["image"].size == (64, 64) and Path("my-value/README.md").exists()


# ---------------------------------------------------------------------------- imports
def test_help_begins_with_the_commands(capsys):
    """Usage, title, Run; every flag with its default; the theory comes last."""
    for name in STAGES:
        with pytest.raises(SystemExit):
            importlib.import_module(name).parse_args(["--help"])
        said = capsys.readouterr().out
        places = [said.index(s) for s in (f"Stage {name[:2]}", "\nRun ", "options:", "\nPaper ")]
        assert said.startswith(f"usage: {name}.py [FLAGS]") and places == sorted(places)
        assert said[: places[2]].count("\n") < 10


def test_every_flag_is_explained(stage_and_flags):
    """argparse prints no default where there is no help."""
    assert all(a.help for a in stage_and_flags[1])


@pytest.mark.parametrize("flags", [["--help"], ["--no-such-flag"]], ids=["help", "mistyped"])
def test_help_and_a_mistyped_flag_load_nothing_heavy(flags):
    """What takes seconds to import; so both answer as soon as torch is there."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "08_nft.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "torch" in loaded and not loaded & HEAVY
    assert done.returncode == (0 if flags == ["--help"] else 1)


def imported(tree, top_only=False):
    """First parts of the names of imported modules; top_only: those that importing loads."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        if not (top_only and isinstance(node, (ast.FunctionDef, ast.Lambda))):
            nodes += ast.iter_child_nodes(node)
    return found


def test_imported_sees_what_it_should():
    """Nested in try, if or class counts at the top; inside a function does not."""
    text = "try:\n    import a.b\nexcept ImportError:\n    from c import d\n"
    text += "class K:\n    import e\n    def f(self):\n        import g\n"
    tree = ast.parse(text)
    assert imported(tree, top_only=True) == {"a", "c", "e"}
    assert imported(tree) == {"a", "c", "e", "g"}


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_no_stage_is_imported(name):
    """A digit keeps `import` statements out; the other ways in are these names."""
    tree = ast.parse(source(name))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    ways = {"import_module", "spec_from_file_location", "run_path", "run_module", "exec"}
    assert not names & (ways | {"__import__"})
    assert not imported(tree) & ({"runpy", "imp", "tests"} | set(STAGES))


@pytest.mark.parametrize("name", ["common", *STAGES])
def test_nothing_heavy_at_the_top_and_no_fixed_device(name):
    text = source(name)
    assert not imported(ast.parse(text), top_only=True) & HEAVY
    assert ".cuda(" not in text and not re.search(r"""\.to\(["']cuda""", text)


# ---------------------------------------------------------------------------- the block to copy
def foreign_names(block, allowed=()):
    """Global names that a piece of source uses beyond `allowed`, builtins and its own functions."""
    top = symtable.symtable(block, "block", "exec")
    used, scopes = set(), [top]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        symbols = [s for s in scope.get_symbols() if s.is_referenced()]
        used |= {s.get_name() for s in symbols if scope is top or s.is_global()}
    defined = {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    return used - defined - set(allowed) - set(dir(builtins))


PLANTED = [
    "def f(x):\n    return x * args.x",
    "def f(x):\n    return [args.x + y for y in x]",
    "def f(x):\n    return (lambda y: args.x)(x)",
    "def f(x, y=args.x):\n    return x",
    "@args.x\ndef f(x):\n    return x",
    "class K:\n    def f(self):\n        return args.x",
    "def f(x):\n    global args\n    return args.x",
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_global_is_caught(planted):
    assert foreign_names(planted) == {"args"}


def test_own_names_are_not_foreign():
    """Parameters, locals, local imports, closures, builtins and functions of the same block."""
    block = "def f(args):\n    from a import b\n    y = len(b)\n"
    block += "    return [lambda: y + z + args.x for z in range(3)]\ndef g():\n    return f(1)"
    assert foreign_names(block) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_the_algorithm_can_be_copied(stage):
    """Between the markers nothing is used but torch, math, numpy, the names from common that the
    first line tells, and the block's own functions."""
    text = source(stage)
    assert text.count(BEGIN) == text.count(END) == 1
    block = text.split(BEGIN)[1].split(END)[0].lstrip()
    told = re.match(r"# from common: (.*)", block)
    told = set(re.split(r",\s*", told[1])) if told else set()
    froms = [n for n in ast.parse(text).body if isinstance(n, ast.ImportFrom)]
    common = {a.asname or a.name for n in froms if n.module == "common" for a in n.names}
    assert told <= common
    assert foreign_names(block, {"torch", "math", "np", "F", "nn"} | told) == set()
    functions = [n for n in ast.parse(block).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert functions and all(ast.get_docstring(n) for n in functions)


# ---------------------------------------------------------------------------- weights
def bad_weights(folder):
    """{file: what is wrong} of the weights below a folder; data/ and work/ are never committed."""
    bad = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if re.match(r"(data(\.\d+\.tmp)?|work)/", name):
            continue
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
    names = ("clip/a.bin", "clip/deep/b.pt", "c.pkl", "data/d.pt", "work/e.pt", "clip/f.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    save_file(dict(w=torch.ones(3).half()), tmp_path / "good.safetensors")
    save_file(dict(w=torch.tensor([1e6]).half()), tmp_path / "overflown.safetensors")
    cut = (tmp_path / "good.safetensors").read_bytes()[:-2]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    bad = ["c.pkl", "clip/a.bin", "clip/deep/b.pt", "cut.safetensors", "overflown.safetensors"]
    assert sorted(bad_weights(tmp_path)) == bad


def test_the_miniatures_weights_are_safe():
    assert bad_weights(ROOT / "tests" / "mini") == {}


# ---------------------------------------------------------------------------- pages
def test_the_pages_follow_from_the_results():
    """A table that differs from the committed JSON: run python tests/studies/study.py readme."""
    import pages

    for path, text in pages.pages().items():
        assert (ROOT / path).read_text() == text, path


def test_a_page_shows_every_figure_that_is_kept():
    shown = "".join((ROOT / p).read_text() for p in ("README.md", "docs/results.md"))
    figures = sorted((ROOT / "docs/figures").iterdir())
    assert figures and not [f.name for f in figures if f"figures/{f.name}" not in shown]


def test_results_are_strict_json():
    def refuse(constant):
        raise ValueError(constant)

    for path in (ROOT / "docs/results").glob("*.json"):
        text = path.read_text()
        json.loads(text, parse_constant=refuse)
        assert not re.search(r'[ "]/\w', text), f"{path} names a place of one machine"
