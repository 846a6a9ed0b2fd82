"""tests/studies/gradient.py: the estimate of the signal, and a short run."""

import json

import gradient
import pytest
import torch

import common


def mean_product(x):
    """The mean product of two different elements, by loops."""
    pairs = [float(a * b) for k, a in enumerate(x) for m, b in enumerate(x) if k != m]
    return sum(pairs) / len(pairs)


def test_the_signal_of_a_gradient():
    """The mean product and its jackknife error, against both by loops."""
    x = torch.tensor([3.0, -1.0, 3.0, -1.0, 3.0], dtype=torch.float64)[:, None]
    estimate, error = gradient.signal_of(x @ x.T)
    without = torch.tensor([mean_product(torch.cat([x[:k], x[k + 1 :]])) for k in range(5)])
    jackknife = (4 / 5 * (without - without.mean()).square().sum()).sqrt()
    assert float(estimate) == pytest.approx(mean_product(x))
    assert float(error) == pytest.approx(float(jackknife))


def test_the_signal_is_unbiased():
    """The mean's square, .25, from 4,000 noisy gradients."""
    noise = torch.randn(4000, 3, generator=common.generator(0), dtype=torch.float64)
    g = noise + torch.tensor([0.3, 0.0, -0.4])
    estimate, error = gradient.signal_of(g @ g.T)
    assert abs(float(estimate) - 0.25) < 3 * float(error) < 0.06


def test_signal_and_noise_of_a_short_run(tmp_path, monkeypatch, values):
    """nft's and one stop's rows, on training prompts; noise is the rest of the square."""
    monkeypatch.chdir(common.ROOT)
    flags = ["--groups", "3", "--images", "2", "--every", "6", "--stops", "13"]
    flags += ["--train-limit", "6", "--device", "cpu"]
    flags += ["--value", str(values["clip"]), "--out", str(tmp_path)]
    gradient.main(gradient.parse_args(flags))
    rows = json.loads((tmp_path / "gradient.json").read_text())["rows"]
    expected = [("nft", 25, 3), ("nft+stitchvm", 13, 3)]
    assert [(r["method"], r["stop"], r["n"]) for r in rows] == expected
    for r in rows:
        assert r["signal"] + r["noise_of_images"] + r["noise_of_levels"] > 0
        assert r["signal_se"] > 0 and abs(r["correlation"]) <= 1.0001
    assert rows[0]["correlation"] == pytest.approx(1)
    assert rows[1]["rollout_gflop"] < rows[0]["rollout_gflop"]


def test_too_few_groups_are_refused():
    with pytest.raises(SystemExit, match="^error: --groups 2 must be 3 at least"):
        gradient.main(gradient.parse_args(["--groups", "2"]))
