"""People's files and habits: what they pass, break, fill and interrupt, in one sentence."""

import argparse
import importlib
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
        (common.COUNT, ["1", "7"], ["0", "-4", "1.5", "x", "nan", "9" * 30]),
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


@pytest.mark.parametrize("device", ["foo", "meta", "hpu"])
def test_an_unknown_device_is_refused(device):
    parser = common.stage_parser("01_x.py", "x", {"mini": {}})
    asked = {"mini": {}}, ["--device", device]
    assert f"--device {device} cannot be used here" in refusal(common.parse_stage, parser, *asked)


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file/run")
    assert f"{out} cannot be written: pass another --out" in refusal(parse, "--out", out)
    parse("--out", str(tmp_path / "a/new/one"))
    assert not (tmp_path / "a").exists()


def test_a_scorer_that_nobody_knows_is_refused_before_the_work():
    parser = common.stage_parser("05_x.py", "x", {"mini": {}})
    parser.add_argument("--scorers", nargs="*")
    asked = {"mini": {}}, ["--device", "cpu", "--scorers", "clip", "beauty"]
    assert "there is no beauty" in refusal(common.parse_stage, parser, *asked)


def test_resume_and_restart_exclude_each_other(tmp_path):
    both = argparse.Namespace(resume=True, restart=True)
    assert "pass one of them" in refusal(common.keep_or_drop, tmp_path / "x.train", both)


@pytest.mark.parametrize("stage", ["04_eval_noisy", "05_dps", "06_fks"])
def test_one_of_several_processes_does_the_work(stage, monkeypatch):
    """The others would do it twice, and remove each other's files."""
    monkeypatch.setenv("RANK", "1")
    importlib.import_module(stage).main(None)


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


# ---------------------------------------------------------------------------- files that are read
@pytest.mark.parametrize(
    "name, text, prompts",
    [
        ("a.csv", 'id,prompt\n1,"a cat\non a mat"\n2,a dog\n', ["a cat\non a mat", "a dog"]),
        ("a.tsv", "Prompt\tn\na cat, a dog\t1\n", ["a cat, a dog"]),
        ("a.json", '"abc"', None),
        ("b.json", "[" * 100_000, None),
        ("b.csv", f"prompt\n{'x' * 200_000}\n", None),
    ],
)
def test_tables_of_prompts(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    if prompts is None:
        assert "is no list of prompts" in refusal(common.load_prompts, tmp_path / name)
    else:
        assert [row["prompt"] for row in common.load_prompts(tmp_path / name)] == prompts


def test_a_damaged_file_of_embeddings_is_made_anew(tmp_path):
    """Half of it would be other prompts' embeddings, zeros none."""
    texts = ["a red circle", "a blue star", "two green rings"]
    backbone = common.Backbone("sd3.5-medium")
    expected = [v.clone() for v in backbone.prompts(texts, tmp_path)]
    (file,) = tmp_path.glob("prompts_*.bin")
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-3], whole * 2, bytes(len(whole))):
        file.write_bytes(broken)
        found = backbone.prompts(texts, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert file.read_bytes() == whole


def test_a_stitch_is_no_value(values, tmp_path):
    artifact = torch.load(values["clip"], weights_only=True)
    artifact["stage"] = "02_fit_stitch"
    del artifact["spec"]["front"]
    torch.save(artifact, tmp_path / "stitch.pt")
    message = refusal(common.StitchedValue.load, tmp_path / "stitch.pt")
    assert "stitch.pt is of 02_fit_stitch, no value model" in message


@pytest.mark.parametrize("mode, size", [("RGB", (3000, 1)), ("F", (8, 8)), ("I", (8, 8))])
def test_pictures_that_are_none_are_named(mode, size, tmp_path):
    """By the one reader of 01 and 04."""
    image = Image.new(mode, size)
    if mode == "I":
        image.putpixel((0, 0), 70_000)
    image.save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="pixels"):
        common.read_image(tmp_path / "x.tif")


# ---------------------------------------------------------------------------- files written
def test_images_and_logs_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    images = [dict(prompt="x")], [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
    assert "cannot be written" in refusal(common.write_images, tmp_path / "file/05_images", *images)
    row = dict(loss=1.0)
    assert "cannot be written" in refusal(common.track, tmp_path / "file/logs", "03", 1, row)


@pytest.mark.parametrize("said", ["strerror: Read-only file system", "basic_ios::clear: iostream"])
def test_torchs_words_for_a_disk_that_takes_nothing(tmp_path, said):
    def write():
        with common.replacing(tmp_path / "a.pt"):
            raise RuntimeError(said)

    assert "read-only" in refusal(write)
