"""The rules of the studies: which strength, how many steps for equal work, what is ahead."""

import json
from types import SimpleNamespace

import pages
import pytest
import study


def scores(reward, judge, spread=0.0):
    """Of four prompts; the spread is around the mean."""
    around = [-spread, spread, -spread, spread]
    return {"reward": [reward] * 4, "judge": [judge + x for x in around], "clip": [reward] * 4}


def test_the_rule_that_chooses_a_strength():
    """The highest reward among those that do no visible harm to what does not guide."""
    plain = scores(0.5, 0.6)
    swept = {1: scores(0.6, 0.6), 2: scores(0.7, 0.6), 4: scores(0.8, 0.5)}
    assert study.choose_strength(swept, plain, ["clip"]) == 2
    within = {1: scores(0.6, 0.6), 4: scores(0.8, 0.5, spread=0.2)}
    assert study.choose_strength(within, plain, ["clip"]) == 4
    assert study.choose_strength(within, plain, ["clip"], tolerance=0.5) == 1
    harmful = {4: scores(0.8, 0.1), 2: scores(0.7, 0.1)}
    assert study.choose_strength(harmful, plain, ["clip"]) == 2
    lower = {1: scores(0.4, 0.6)}
    assert study.choose_strength(lower, plain, ["clip"]) == 1


def test_strengths_are_chosen_for_each_method():
    names = (("flow", 0), ("tweedie", 1), ("tweedie", 2), ("stitchvm", 1), ("stitchvm", 2))
    found = {
        "rows": [dict(method=m, strength=c) for m, c in names],
        "scores_of_prompts": [scores(r, 0.6) for r in (0.5, 0.6, 0.7, 0.9, 0.8)],
    }
    assert study.chosen_strengths(found, "clip") == {"tweedie": 2, "stitchvm": 1}


def test_equal_work_in_steps():
    rows = [
        dict(method="flow", steps=40, gflop_per_sample=10.0),
        dict(method="tweedie", steps=40, gflop_per_sample=64.0),
        dict(method="stitchvm", steps=40, gflop_per_sample=16.0),
    ]
    assert study.fewer_steps(rows) == 10
    assert study.fewer_steps([r | dict(gflop_per_sample=r["steps"]) for r in rows]) == 40


def curve(method, *points):
    return [dict(method=method, gflop=g, reward=r) for g, r in points]


def test_best_of_n_for_the_work_of_a_row(monkeypatch):
    """Plain sampling is best of one; between what was measured it is linear, beyond it unknown."""
    found = [dict(gflop_per_prompt=20, reward=0.6), dict(gflop_per_prompt=60, reward=0.8)]
    checked = dict(geneval=0.5, geneval_se=0.1)
    found = [r | dict(reward_se=0.01, reward_each=[r["reward"], 1]) | checked for r in found]
    monkeypatch.setattr(pages, "there", lambda *names: names)
    monkeypatch.setattr(pages, "reported", lambda name: found)
    plain = dict(gflop_per_sample=10, reward=0.5, reward_se=0.03, reward_each=[0.5, 1]) | checked
    best = [pages.best_of_n("clip", plain, work) for work in (10, 15, 20, 40)]
    assert [r["reward"] for r in best] == pytest.approx([0.5, 0.55, 0.6, 0.7])
    assert [r["reward_se"] for r in best] == pytest.approx([0.03, 0.02, 0.01, 0.01])
    assert best[1]["reward_each"] == pytest.approx([0.55, 1])
    assert pages.best_of_n("clip", plain, 61) is None


def test_what_is_ahead():
    """By Student's t, paired where each prompt or seed is known, which settles what errors hide."""
    worse = dict(gain=0.1, gain_se=0.03, n=200)
    for gap, verdict in ((0.11, "yes"), (0.08, "perhaps"), (0.04, "no"), (-0.2, "no")):
        better = dict(gain=0.1 + gap, gain_se=0.04, n=200)
        assert pages.ahead(better, worse, "gain") == verdict
    low = pages.over_seeds([dict(gain=x) for x in (0.0, 0.2, 0.4)], "gain")
    high = pages.over_seeds([dict(gain=x) for x in (0.1, 0.31, 0.49)], "gain")
    assert pages.ahead(high, low, "gain") == "yes"
    assert pages.ahead(low, high, "gain") == "no"
    unsure = pages.over_seeds([dict(gain=x) for x in (0.1, 0.4, 0.45)], "gain")
    assert pages.ahead(unsure, low, "gain") == "perhaps"  # by 2.6 errors, but of three


def test_means_over_seeds():
    """Each seed's gain is over its own base model; their error is over the seeds."""
    tables = [curve("nft", (0, a), (9, b)) for a, b in ((0.1, 0.4), (0.2, 0.3))]
    last = pages.last_rows(tables, "nft")
    assert [r["gain"] for r in last] == pytest.approx([0.3, 0.1])
    mean = pages.over_seeds(last, "gain")
    assert (mean["gain"], mean["gain_se"]) == pytest.approx((0.2, 0.1))
    assert [r["reward"] for r in pages.last_rows(tables, "base")] == [0.1, 0.2]


def test_studies_name_flags_that_exist():
    """A study takes hours: a flag that its stage does not know should not wait for its turn."""
    import importlib

    for name, (script, flags) in (study.particles() | study.drafts() | study.policies()).items():
        if script[0] == "0":
            module = importlib.import_module(script.removesuffix(".py"))
            args = module.parse_args(["--out", f"runs/{name}", *map(str, flags)])
            assert args.out == f"runs/{name}"
    fit, finetune = (importlib.import_module(m) for m in ("02_fit_stitch", "03_finetune"))
    for flags in study.VARIANTS.values():
        finetune.parse_args([*map(str, (*study.SHORT, *flags))])
    for _, fitted, flags in study.LEVERS.values():
        fit.parse_args([*map(str, fitted)])
        finetune.parse_args([*map(str, flags)])
    for flags in study.POINTS:
        fit.parse_args([*map(str, flags)])
    for flags in study.WINDOWS.values():
        importlib.import_module("05_dps").parse_args([*map(str, flags)])


def test_what_was_measured_on_todays_models_stands(monkeypatch, tmp_path):
    """A result's commit, of a changed tree too, comes after the one that last changed a model."""

    def git(command, *rest):
        if command == "log":
            return SimpleNamespace(stdout="models\n")
        assert rest[:2] == ("--is-ancestor", "models")
        return SimpleNamespace(returncode=0 if rest[2] == "after" else 1)

    monkeypatch.setattr(study, "git", git)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for commit in ("before", "after", "after+changes"):
        table = dict(rows=[], provenance=dict(commit=commit))
        (tmp_path / f"{commit}.json").write_text(json.dumps(table))
    names = ["before", "after", "after+changes", "missing"]
    assert study.unless_kept(names, keep=True) == ["before", "missing"]
    assert study.unless_kept(names, keep=False) == names
