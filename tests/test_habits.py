"""People's files and habits: what they pass, break, fill and interrupt, in one sentence."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common

ROOT = Path(__file__).resolve().parents[1]
claim = common.claim  # before a fixture takes it away
BLACK = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


def refusal(call, *args, **kwargs):
    with pytest.raises(SystemExit) as stopped:
        call(*args, **kwargs)
    message = str(stopped.value)
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def parse(*flags):
    parser = common.stage_parser("01_x.py", "x", {"mini": {}})
    return common.parse_stage(parser, {"mini": {}}, [*flags, "--device", "cpu"][: len(flags) + 2])


# ---------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (common.COUNT, ["1", "7"], ["0", "-4", "1.5", "x", "nan"]),
        (common.WHOLE, ["0", "4611686018427387904"], ["-1", "9" * 30]),
        (common.POSITIVE, ["1e-5", "3"], ["0", "-1", "nan", "inf"]),
        (common.SHARE, ["0", "1", ".5"], ["-.1", "1.1", "nan"]),
        (common.FINITE, ["-3", "0", "1e9"], ["nan", "inf", "-inf"]),
    ],
)
def test_number_types(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            kind(text)


def test_an_unknown_device_is_refused():
    parser = common.stage_parser("01_x.py", "x", {"mini": {}})
    asked = {"mini": {}}, ["--device", "foo"]
    assert "--device foo cannot be used here" in refusal(common.parse_stage, parser, *asked)


@pytest.mark.parametrize("resolution", ["60", "72"])
def test_a_resolution_that_a_later_stage_cannot_take_is_refused_by_the_first(resolution):
    assert "patches of 16 pixels" in refusal(parse, "--resolution", resolution)


def test_a_second_run_in_a_folder_is_told_of_the_first(tmp_path):
    """Of the same stage only, and only while the first one runs."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; "
        f"common.claim({str(tmp_path)!r}, sys.argv[1]); print('runs'); sys.stdin.read()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = subprocess.Popen([sys.executable, "-c", code, "05_dps.py"], **pipes)
    assert first.stdout.readline() == "runs\n"
    assert "05_dps.py is running in" in refusal(claim, tmp_path, "05_dps.py")
    claim(tmp_path, "06_fks.py")
    first.communicate("")
    claim(tmp_path, "05_dps.py")


def test_temporary_files_of_two_processes_differ(tmp_path, monkeypatch):
    with common.replacing(tmp_path / "a.json") as mine:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with common.replacing(tmp_path / "a.json") as other:
            assert mine != other
            other.write_text("2")
        mine.write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---------------------------------------------------------------------------- models
def test_a_folder_of_the_working_directory_does_not_shadow_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip").mkdir()
    assert common.model_folder("clip", "mini") == ROOT / "tests/mini/clip"
    assert common.model_folder("clip", "paper") is None
    assert common.model_folder("./clip", "paper") == Path("clip")


def test_a_missing_package_is_not_blamed_on_the_model():
    def load():
        with common.needs("some/model"):
            raise ModuleNotFoundError("No module named 'scipy'")

    message = refusal(load)
    assert "a package is missing" in message and "some/model" not in message


# ---------------------------------------------------------------------------- files
def test_json_is_strict(tmp_path):
    """What is not finite becomes null, at any depth."""
    args = argparse.Namespace(out=str(tmp_path), seed=0)
    rows = [dict(x=math.nan, y=[1.0, (math.inf, "a")], n=3)]
    common.save_table(args, "05_dps", rows, top=-math.inf)

    def refuse(word):
        raise ValueError(word)

    table = json.loads((tmp_path / "05_dps.json").read_text(), parse_constant=refuse)
    assert table["rows"] == [dict(x=None, y=[1.0, [None, "a"]], n=3)] and table["top"] is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    def write():
        with common.replacing(tmp_path / "a.pt") as temporary:
            temporary.write_text("half")
            raise error

    assert "a.pt cannot be written" in refusal(write) and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    args = argparse.Namespace(out=str(tmp_path / "out"), seed=0)
    assert "cannot be written" in refusal(common.save_table, args, "05_dps", [])


def test_another_error_of_a_writer_is_not_the_disks(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), common.replacing(tmp_path / "a"):
        raise RuntimeError("shapes differ")


def test_the_hint_of_a_missing_artefact_can_be_pasted(tmp_path):
    """With the reward, and quoted where there are spaces."""
    path = tmp_path / "my runs" / "value.pt"
    expect = dict(reward="hpsv2", backbone="flux", latent_space="16 channels")
    message = refusal(common.load_artifact, path, expect, "03_finetune.py")
    command = f"python 03_finetune.py --out '{path.parent}' --backbone flux --reward hpsv2"
    assert message.endswith(command)


# ---------------------------------------------------------------------------- pictures, last
def test_dollars_in_a_prompt_are_dollars(tmp_path):
    common.image_grid([BLACK], ["costs $5 and $$"], ["a $x_"], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_a_figure_that_fails_is_a_warning(tmp_path, capsys):
    common.draw_lines([dict(y=1.0)], "x", ["y"], None, tmp_path / "a.png")
    assert f"warning: no figure {tmp_path / 'a.png'}: KeyError" in capsys.readouterr().out


def test_a_notebooks_backend_in_the_environment_breaks_no_figure(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; "
        f"common.draw_lines([dict(x=1, y=2.0)], 'x', ['y'], None, {str(tmp_path / 'a.png')!r})"
    )
    backend = dict(os.environ, MPLBACKEND="module://matplotlib_inline.backend_inline")
    done = subprocess.run([sys.executable, "-c", code], env=backend, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout and "warning" not in done.stdout
