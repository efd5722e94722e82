"""The models in the box: small, in order, usable right after the installation, and as good as their stored results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, encoded, photo
from PIL import Image

from hyperprior import load, storage
from hyperprior.codec import box, files
from hyperprior.codec.codec import MOST_BYTES
from hyperprior.errors import ConfigError
from hyperprior.terminal import Terminal
from hyperprior.training import checkpoint
from hyperprior.training.info import info

BOX = box.in_the_box()


def test_models_in_the_box_are_small_and_in_order() -> None:
    names = [f"q{i}" for i in range(1, 6)]
    assert list(BOX) == [*names, *(f"{name}-ms-ssim" for name in names)]
    assert f"q{box.DEFAULT_QUALITY}" in BOX
    assert all(path.stat().st_size <= 4_000_000 for path in BOX.values())
    for models, metric, least, most in ((names, "mse", 0.0035, 0.0483), (list(BOX)[5:], "ms-ssim", 4.58, 60.5)):
        losses = [box.read_description(name) for name in models]
        assert {loss["metric"] for loss in losses} == {metric}
        lambdas = [loss["lambda"] for loss in losses]
        assert lambdas == sorted(lambdas) and lambdas[0] <= least and lambdas[-1] >= most
    assert len({box.read_description(name)["fingerprint"] for name in BOX}) == len(BOX)


def test_a_file_whose_model_left_the_box_names_the_release_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptions = {name: box.read_description(name) for name in BOX}
    for name, description in descriptions.items():
        assert (box.find_release(description["fingerprint"]) or "").startswith(f"{name} of hyperprior ")
    file = tmp_path / "x.hyp"
    file.write_bytes(load("q2").compress(np.asarray(photo(4))))
    release = box.find_release(descriptions["q2"]["fingerprint"])
    monkeypatch.setattr(box, "in_the_box", lambda: {"q3": BOX["q3"]})
    assert info(file, None)["release"] == release
    with pytest.raises(ConfigError, match=f"not in the box: name {release} with --model"):
        files.decompress([str(file)], None, None, ".png", "refuse", None, Terminal())


def test_metric_chooses_among_the_models_in_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERPRIOR_MODEL", raising=False)
    monkeypatch.setattr(box, "in_the_box", lambda: {"q3": BOX["q3"], "q3-ms-ssim": BOX["q3-ms-ssim"], "q4": BOX["q4"]})
    assert box.choose(None, None, "mse") == box.choose(None) == str(BOX["q3"])
    assert box.choose(None, 4, "mse") == str(BOX["q4"])
    assert box.choose(None, None, "ms-ssim") == box.choose(None, 3, "ms-ssim") == str(BOX["q3-ms-ssim"])
    with pytest.raises(ConfigError, match="--quality 4 --metric ms-ssim is not in the box; q3, q3-ms-ssim, q4 are"):
        box.choose(None, 4, "ms-ssim")
    with pytest.raises(ConfigError, match="--model q4 and --metric mse are both given"):
        box.choose("q4", None, "mse")


def test_compress_needs_nothing_but_an_image(
    hyperprior: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYPERPRIOR_MODEL", raising=False)
    (tmp_path / "x.png").write_bytes(encoded(photo(4, 300, 200), "PNG"))
    hyperprior("compress", "x.png")
    hyperprior("compress", "x.png", "--quality", "1", "-o", "small.hyp")
    assert (tmp_path / "small.hyp").stat().st_size < (tmp_path / "x.hyp").stat().st_size < 300 * 200 * 3 / 20
    hyperprior("decompress", "x.hyp", "-o", "y.png")
    x, y = (np.asarray(Image.open(tmp_path / name), float) for name in ("x.png", "y.png"))
    assert -10 * np.log10(np.mean((x - y) ** 2) / 255**2) > 28
    facts = json.loads(hyperprior("info", "x.hyp", "--json").stdout)
    assert facts["fits"] is True and facts["given_model"].startswith(f"q{box.DEFAULT_QUALITY}, ")


@pytest.mark.slow
def test_the_gate_passes_the_models_in_the_box(hyperprior: Command, tmp_path: Path, samples: Path) -> None:
    evaluate = ["evaluate", *BOX, "--images", samples / "kodak", "--baselines", "none", "--published", "none"]
    output = hyperprior(*evaluate, "--gate", box.BOX / "kodak.json", "--out", "results").stdout
    assert output.count("is as good") == len(BOX)
    for point in json.loads((tmp_path / "results" / "summary.json").read_text())["points"]:
        # The estimate has no header: 33 bytes, which are 0.3% of the files of q1-ms-ssim.
        header = 8 * 33 / (768 * 512) if point["point"] == "q1-ms-ssim" else 0.0
        assert abs(point["estimated_bpp"] / (point["bpp"] - header) - 1) < 0.005, point


def test_the_gate_fails_a_damaged_model_of_the_box(hyperprior: Command, tmp_path: Path, samples: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("kodim03.png", "kodim20.png"):
        shutil.copy(samples / "kodak" / name, tmp_path / "photos")
    evaluate = ["evaluate", "--images", "photos", "--baselines", "none", "--published", "none"]
    hyperprior(*evaluate, "q3", "--out", "good")
    evaluate += ["--gate", "good/summary.json", "--json"]
    assert json.loads(hyperprior(*evaluate, "q3", "--out", "again").stdout)["gate"][0]["passed"]
    # One weight in twenty of a layer of g_s becomes 0, and the description gets the fingerprint of the new weights.
    arrays, state = storage.load_arrays(BOX["q3"], box.FORMAT, MOST_BYTES)
    arrays["g_s/2/kernel"].reshape(-1)[::20] = 0.0
    checkpoint.save(tmp_path / "q3.npz", arrays, {**state, "fingerprint": storage.fingerprint(arrays)})
    damaged = hyperprior(*evaluate, "q3.npz", "--out", "damaged", check=1)
    assert "q3.npz is worse" in damaged.stderr
    assert [verdict["passed"] for verdict in json.loads(damaged.stdout)["gate"]] == [False]
