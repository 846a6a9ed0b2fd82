"""Stage 02: the closed form against brute force, and the choice of (i, j) on a planted cache."""

import argparse
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import common

fit = importlib.import_module("02_fit_stitch")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- the closed form
def planted(M=300, D=12, d=7):
    return torch.randn(M, D).double(), torch.randn(d, D).double(), torch.randn(d).double()


def with_ones(X):
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def test_fit_recovers_a_planted_stitch():
    X, W, b = planted()
    W_fit, b_fit, rank = fit.fit_linear_stitch(X, X @ W.T + b)
    assert_close(W_fit, W, rtol=0, atol=1e-10)
    assert_close(b_fit, b, rtol=0, atol=1e-10)
    assert rank == 13 and fit.stitch_loss(W_fit, b_fit, X, X @ W.T + b)[1] < 1e-20


@pytest.mark.parametrize("M", [300, 9], ids=["more tokens than features", "fewer"])
def test_fit_is_the_pseudo_inverse(M):
    """(62): with noise in the target, and the smallest solution where there are many."""
    X, W, b = planted(M)
    G = X @ W.T + b + torch.randn(M, 7).double()
    W_fit, b_fit, rank = fit.fit_linear_stitch(X, G)
    expected = torch.linalg.pinv(with_ones(X), rtol=1e-6) @ G
    assert_close(torch.cat([W_fit, b_fit[:, None]], 1), expected.T, rtol=1e-8, atol=1e-9)
    assert rank == min(M, 13)


def test_fit_is_bounded_on_rank_deficient_features():
    """Rank 5 in 12 dimensions, rounded to float32, which lstsq's own cut-off would invert [D7]."""
    X = (torch.randn(300, 5).double() @ torch.randn(5, 12).double()).float()
    G = torch.randn(300, 7)
    W, b, rank = fit.fit_linear_stitch(X, G)
    assert rank == 6 and W.abs().max() < 1
    careless = torch.linalg.lstsq(with_ones(X.double()), G.double(), driver="gelsd").solution
    assert careless.abs().max() > 1e4
    W, b, rank = fit.fit_linear_stitch(X, G, rcond=1e-15)
    assert W.abs().max() > 1e4  # so it is rcond that protects


def test_stitch_loss():
    """Both losses by loops, on float32 features as they are cached."""
    X, W, b = planted(20)
    X, G = X.float(), torch.randn(20, 7)
    error = spread = 0.0
    for m in range(20):
        for k in range(7):
            y = sum(W[k, n].item() * X[m, n].item() for n in range(12)) + b[k].item()
            error += (y - G[m, k].item()) ** 2 / 20
            spread += (G[m, k].item() - sum(G[:, k].tolist()) / 20) ** 2 / 20
    assert fit.stitch_loss(W, b, X, G) == pytest.approx((error, error / spread), rel=1e-9)


def test_relative_loss_of_the_mean_is_one():
    """At any scale and offset of the target: what makes depths comparable [D5]."""
    G = torch.randn(50, 7) * 40 + 100
    W = torch.zeros(7, 12).double()
    loss, relative = fit.stitch_loss(W, G.double().mean(0), torch.randn(50, 12), G)
    assert relative == pytest.approx(1, rel=1e-12)
    assert loss == pytest.approx(float(G.double().var(0, correction=0).sum()))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (9, 7)], ids=["down", "up"])
def test_fitting_and_resampling_commute(grid, antialias):
    """The loss of the fit on resampled features is the stitching layer's on the features."""
    h, target = torch.randn(6, 12, 8, 5), torch.randn(6, grid[0] * grid[1], 7)
    X = common.to_tokens(common.resample(h, grid, antialias)).flatten(0, 1)
    G = target.flatten(0, 1)
    W, b, _ = fit.fit_linear_stitch(X, G)
    stitch = common.Stitch(W.float(), b.float(), grid, antialias)
    with torch.no_grad():
        y = common.to_tokens(stitch(h)).flatten(0, 1)
    assert_close(y.double(), X.double() @ W.T + b, rtol=0, atol=1e-5)
    error = float((y - G).square().sum(1).mean())
    assert error == pytest.approx(fit.stitch_loss(W, b, X, G)[0], rel=1e-5)


# ---------------------------------------------------------------------------- the choice
L, J, N, D = 3, 5, 16, 6  # diffusion blocks, reward blocks, tokens of an image, width
SPREAD = (1.0, 0.1, 3.0, 1.0, 1.0)  # of the targets: j = 2 has the smallest raw loss
NOISE = {(2, 1): 0.1, (3, 2): 0.3, (1, 5): 0.0}  # (i, j): what a stitch there leaves, of the spread


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A cache.pt of random tokens in which only the (i, j) of NOISE are linear."""
    torch.manual_seed(1)
    n = 40
    dit = torch.randn(L, n, N, D)
    reward = torch.randn(J, n, N, 4)
    for (i, j), noise in NOISE.items():
        linear = dit[i - 1] @ torch.randn(D, 4) / D**0.5
        reward[j - 1] = linear + noise * torch.randn(n, N, 4)
    reward = reward * torch.tensor(SPREAD).view(-1, 1, 1, 1) + 5
    probe = dict(z0=torch.randn(n, 3, 8, 8).half(), t=torch.rand(n), eps=torch.randn(n, 3, 8, 8))
    probe |= dict(dit=dit, reward=reward, cls=[torch.full((4,), float(j)) for j in range(2, J + 1)])
    spec = dict(backbone="sd3.5-medium", reward="clip", resolution=64, latent_space="any")
    spec |= dict(reward_grid=[4, 4], antialias=False)
    folder = tmp_path_factory.mktemp("out")
    args = argparse.Namespace(seed=0)
    common.save_artifact(folder / "cache.pt", "01", args, spec, dict(probe=probe))
    return folder


def run(out, *flags):
    """The fronts of stitch.pt, its spec, and the table."""
    fit.main(fit.parse_args(["--out", str(out), *flags]))
    artifact = torch.load(out / "stitch.pt", weights_only=True)
    table = json.loads((out / "02_fit_stitch.json").read_text())
    return artifact["data"], artifact["spec"], table


@pytest.mark.parametrize(
    "flags, chosen",
    [
        ([], (2, 1)),
        (["--rank-by", "raw"], (3, 2)),
        (["--preset", "paper", "--resolution", "64"], (3, 2)),
        (["--i", "3"], (3, 2)),
        (["--j", "5"], (1, 5)),
        (["--i", "1", "--j", "4"], (1, 4)),
    ],
    ids=str,
)
def test_the_best_block_is_chosen(out, flags, chosen):
    """By either loss; j beyond 4 only if asked for, though it is best here (Fig. 6)."""
    data, spec, table = run(out, *flags)
    assert (data["dit"]["i"], data["dit"]["j"]) == (spec["i"], spec["j"]) == chosen
    assert table["chosen"] == dict(i=chosen[0], j=chosen[1]) and data["vae"]["i"] == 0
    assert spec["reward_grid"] == [4, 4] and spec["latent_space"] == "any"


def test_the_table_has_every_pair(out):
    """Losses that the planted noise explains, full ranks, and a figure."""
    _, _, table = run(out)
    rows = {(r["i"], r["j"]): r for r in table["rows"]}
    assert set(rows) == {(i, j) for i in range(L + 1) for j in range(1, J + 1)}
    assert set(table["rows"][0]) == {"i", "j", "loss", "relative_loss", "rank"}
    for (i, j), row in rows.items():
        assert row["rank"] == (D if i else 3) + 1
        if (i, j) in NOISE:
            scale = SPREAD[j - 1] ** 2
            wanted = 4 * scale * NOISE[i, j] ** 2
            assert row["loss"] == pytest.approx(wanted, rel=0.2, abs=1e-9)
            assert row["relative_loss"] < 0.3
        else:
            assert 0.9 < row["relative_loss"] < 1.3
    assert Image.open(out / "02_fit_stitch.png").width > 300


def test_losses_are_of_images_that_were_not_fitted(out):
    """The last quarter: 10 of 40 images, of a pair that is all noise."""
    _, _, table = run(out)
    probe = torch.load(out / "cache.pt", weights_only=True)["data"]["probe"]
    X, G = (probe[k][0].flatten(0, 1).double() for k in ("dit", "reward"))
    n = 30 * N
    W = torch.linalg.pinv(with_ones(X[:n])) @ G[:n]
    wanted = (with_ones(X[n:]) @ W - G[n:]).square().sum(1).mean()
    row = next(r for r in table["rows"] if (r["i"], r["j"]) == (1, 1))
    assert row["loss"] == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("j", [1, 2])
def test_what_is_kept_is_fitted_on_all_images(out, j):
    """Both fronts, against the pseudo-inverse; CLS is the one at that depth, none at j = 1."""
    data, _, _ = run(out, "--i", "2", "--j", str(j))
    probe = torch.load(out / "cache.pt", weights_only=True)["data"]["probe"]
    z_t = common.add_noise(probe["z0"].float(), probe["eps"], probe["t"])
    latent = F.interpolate(z_t, (4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    G = probe["reward"][j - 1].flatten(0, 1).double()
    for front, tokens in dict(dit=probe["dit"][1], vae=latent).items():
        wanted = torch.linalg.pinv(with_ones(tokens.flatten(0, 1).double())) @ G
        found = torch.cat([data[front]["W"], data[front]["bias"][:, None]], 1)
        assert_close(found.double(), wanted.T, rtol=1e-4, atol=1e-5)
        assert data[front]["j"] == j and found.dtype == torch.float32
        cls = data[front]["cls"]
        assert cls is None if j == 1 else cls.tolist() == [2.0] * 4


@pytest.mark.parametrize("key", ["dit", "reward"])
def test_features_of_a_failed_run_are_refused(out, tmp_path, key):
    """lstsq would ask to report a bug to PyTorch."""
    cache = torch.load(out / "cache.pt", weights_only=True)
    cache["data"]["probe"][key][1, 2, 3, 0] = torch.nan
    torch.save(cache, tmp_path / "cache.pt")
    with pytest.raises(SystemExit, match="^error: NaN or infinite features in .*cache.pt"):
        run(tmp_path)


def test_of_two_processes_one_works(out, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(fit, "fit_linear_stitch", None)
    fit.main(fit.parse_args(["--out", str(out)]))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--i", "99"], "i runs to 3, j to 5"),
        (["--i", "0"], "argument --i: 0 does not lie between 1 and"),
        (["--rcond", "nan"], "argument --rcond"),
        (["--j", "6"], "j to 5"),
        (["--reward", "hpsv2"], "does not fit.*clip.*hpsv2.*01_cache_features.py"),
        (["--resolution", "128"], "does not fit.*64.*128"),
        (["--out", "/nowhere"], "/nowhere/cache.pt does not exist.*python 01_cache_features.py"),
    ],
    ids=str,
)
def test_misuse_is_answered_before_anything_is_fitted(out, monkeypatch, flags, message):
    monkeypatch.setattr(fit, "fit_linear_stitch", None)
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        run(out, *flags)
