"""tests/studies/ranking.py and onpolicy.py: what a value says within a prompt, and short runs."""

import json

import onpolicy
import pytest
import ranking
import torch

import common


def test_within_a_prompt_by_hand():
    """Values that are half the reward and wrong by the prompt rank perfectly, with slope 2."""
    r = torch.rand(3, 8, generator=common.generator(0))
    prompts = torch.tensor([[0.0], [1.0], [5.0]])
    correlation, error, slope = ranking.within(r / 2 + prompts, r)
    assert torch.allclose(correlation, torch.ones(3).double()) and slope == pytest.approx(2)
    assert torch.allclose(error, (prompts - r / 2).double().square().mean(1))
    correlation, _, slope = ranking.within(1 - r, r)
    assert torch.allclose(correlation, -torch.ones(3).double()) and slope == pytest.approx(-1)


def test_what_dropping_gains_by_hand():
    """A perfect value keeps the best for less work; one that says nothing loses; of N = 2 that cost
    half, the best of one is what there is at equal work."""
    r = torch.rand(40, 16, generator=common.generator(1)).double()
    noise = torch.rand(40, 16, generator=common.generator(2)).double()
    perfect, none = ranking.dropping(r, r, 0.5, 0.0), ranking.dropping(noise, r, 0.5, 0.0)
    assert (perfect > 0).all() and none.mean() < 0
    best = [k / (k + 1) for k in (6, 8)]  # of k uniform numbers
    assert perfect.mean() == pytest.approx(best[1] - best[0], abs=0.01)
    two = torch.tensor([[0.0, 1.0]]).double()
    assert ranking.dropping(two, two, 1.0, 0.0).item() == pytest.approx(0.5, abs=0.1)
    assert ranking.dropping(two, two, 1.0, 9.0).item() == 0


def test_a_short_run(tmp_path, monkeypatch, values):
    """The last estimate is all but the reward; trajectories are kept, and other values join."""
    monkeypatch.chdir(common.ROOT)
    flags = ["--limit", "2", "--samples", "3", "--steps", "4", "--batch", "4", "--device", "cpu"]
    flags += ["--out", str(tmp_path), "--values", str(values["clip"])]
    ranking.main(ranking.parse_args(flags))
    first = json.loads((tmp_path / "ranking.json").read_text())["rows"]
    assert [(r["method"], r["n"]) for r in first] == [
        *[("tweedie", 2)] * 4,
        *[(str(values["clip"]), 2)] * 4,
    ]
    assert first[3]["sigma"] < 0.1 and first[3]["correlation"] > 0.99
    kept = torch.load(tmp_path / "trajectories.pt", weights_only=True)["data"]
    monkeypatch.setattr(ranking, "trajectories", pytest.fail)  # not called again
    ranking.main(ranking.parse_args([*flags, str(values["clip"])]))
    again = json.loads((tmp_path / "ranking.json").read_text())["rows"]
    assert [r["correlation"] for r in again[:8]] == [r["correlation"] for r in first]
    backbone = common.Backbone("sd3.5-medium")
    reward = common.Reward("clip")
    value, _ = common.load_value(values["clip"], backbone, reward)
    prompts = common.load_prompts("tests/mini/data/tune/drawbench.txt", 2)
    texts = reward.text([row["prompt"] for row in prompts for _ in range(3)])
    with torch.no_grad():
        v = value(kept["z"][1], first[1]["sigma"], texts).view(2, 3)
    expected = ranking.within(v, kept["r"].view(2, 3))[0].mean()
    assert first[5]["correlation"] == pytest.approx(float(expected), abs=1e-4)


def test_laws_share_levels_and_images():
    """A step of every law is at the same levels; samples are the trajectory's own nodes."""
    z = torch.rand(5, 3, 2, 4, 4, generator=common.generator(0))
    data = dict(z=z.half(), z0=torch.zeros(5, 2, 4, 4))
    rows = torch.tensor([4, 0, 2])
    grid = [0.9, 0.5, 0.1]
    found = [onpolicy.draw(law, data, grid, rows, common.generator(1)) for law in onpolicy.LAWS]
    (forward, t), (samples, same), (prompted, _) = found
    assert torch.equal(t, same) and torch.equal(samples, prompted)
    k = [min(range(3), key=lambda n: abs(grid[n] - x)) for x in t.tolist()]
    assert torch.equal(samples, z.half()[rows, k].float())
    spread = forward.flatten(1).std(1)  # z_0 is 0: what is left is the noise
    assert torch.allclose(spread, t, rtol=0.5)


def test_a_short_run_of_the_laws(tmp_path, monkeypatch, values):
    """Three values of the same samples; the prompted one reads the prompts."""
    monkeypatch.chdir(common.ROOT)
    flags = ["--limit", "2", "--samples", "3", "--steps", "4", "--batch", "4", "--device", "cpu"]
    flags += ["--out", str(tmp_path), "--value", str(values["clip"]), "--train-samples", "6"]
    texts = []
    step_loss = onpolicy.finetune.step_loss

    def watched(model, *rest):
        texts.append(model.null[0].shape[0])
        return step_loss(model, *rest)

    monkeypatch.setattr(onpolicy.finetune, "step_loss", watched)
    flags += ["--train-steps", "2", "--train-batch", "3", "--strengths", "0", "40"]
    onpolicy.main(*onpolicy.parse_args(flags))
    assert texts == [1, 1, 1, 1, 3, 3]
    table = json.loads((tmp_path / "onpolicy.json").read_text())
    reward = {(r["lever"], r["strength"]): r["reward"] for r in table["guided"]}
    assert len({reward[law, 0.0] for law in onpolicy.LAWS}) == 1  # not guided
    assert len({reward[law, c] for law in onpolicy.LAWS for c in (0.0, 40.0)}) == 4
    rows = table["rows"]
    assert list(dict.fromkeys(r["method"] for r in rows)) == ["tweedie", *onpolicy.LAWS]
    at = {r["method"]: r["value_mse"] for r in rows if r["sigma"] < 0.1}
    assert at["forward"] != at["samples"] != at["prompted"]
