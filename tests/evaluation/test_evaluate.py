"""Evaluation: BD values of known cases, baselines against published points, results, gate and cache."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from conftest import encoded, photo
from PIL import Image

from hyperprior import cli, stack
from hyperprior.codec import codec
from hyperprior.config import load_config
from hyperprior.errors import ConfigError, DataError, GateError
from hyperprior.evaluation import curves, evaluate, gate, plots
from hyperprior.model import quality
from hyperprior.reference import baselines, published
from hyperprior.reference.baselines import BASELINES
from hyperprior.terminal import Terminal

QUIET = Terminal(quiet=True)


def textured(seed: int, width: int = 192, height: int = 176) -> Image.Image:
    """A smooth picture with grain, so that more bits always improve it."""
    grain = np.random.RandomState(seed + 1000).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(photo(seed, width, height)) + grain, 0, 255).astype(np.uint8))


class JpegModel:
    """Has those names of a real codec that evaluation uses, and stores JPEG. Its estimate is 1% below the file size."""

    def __init__(self, quality: int, lmbda: float, metric: str = "mse"):
        self.quality, self.calls = quality, 0
        self.config = load_config(None, [f"loss.lambda={lmbda}", f"loss.metric={metric}"])
        self.fingerprint = f"{quality:08x}"

    def compress(self, pixels: np.ndarray, effort: int = 0) -> bytes:
        self.calls += 1
        return BASELINES["jpeg"].encode(pixels, self.quality)

    def decompress(self, data: bytes) -> np.ndarray:
        return baselines.decode(data)

    def check_effort(self, effort: int) -> None:
        pass

    def estimated_bits(self, data: bytes) -> float:
        return 0.99 * 8 * len(data)


MODELS = {
    "a": JpegModel(20, 0.0018),
    "b": JpegModel(30, 0.0035),
    "c": JpegModel(40, 0.0067),
    "d": JpegModel(55, 0.013),
    "s": JpegModel(40, 16.64, "ms-ssim"),
}


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, JpegModel]:
    """Models by the names of their directories; a test may change the table."""
    table = dict(MODELS)
    monkeypatch.setattr(codec, "load", lambda path, engine: table[Path(path).name])
    return table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them too small for MS-SSIM, and a file that is not an image."""
    path = tmp_path / "images"
    path.mkdir()
    textured(0).save(path / "a.png")
    textured(1, 200, 168).save(path / "b.PNG")
    textured(2, 64, 48).save(path / "c.bmp")
    (path / "notes.txt").write_text("no image")
    return path


def run(tmp_path: Path, names: str, folder: Path, out: str = "out", **options: Any) -> dict[str, Any]:
    options = {"baselines": "none", "cache": tmp_path / "cache", **options}
    summary = evaluate.evaluate([Path(n) for n in names], folder, tmp_path / out, evaluate.Options(**options), QUIET)
    assert json.loads((tmp_path / out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    return summary


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


# BD values --------------------------------------------------------------------------------------------------


def test_a_curve_at_four_fifths_of_the_rate_has_a_bd_rate_of_minus_20_percent() -> None:
    anchor = [(0.1, 25.0), (0.2, 28.5), (0.5, 32.0), (1.1, 36.0), (2.0, 39.0)]
    rate, _ = curves.compute_bd(anchor, [(0.8 * bpp, db) for bpp, db in reversed(anchor)])
    assert rate == pytest.approx(-20.0, abs=1e-9)
    _, decibels = curves.compute_bd(anchor, [(bpp, db + 0.7) for bpp, db in anchor])
    assert decibels == pytest.approx(0.7, abs=1e-9)


def test_bd_of_two_straight_lines_is_the_integral_between_them() -> None:
    # Over log10 rate L the lines are 30 + 10 L and 30 + 20 L, the first for L in [0, 1], the second in [0, 0.75].
    # At equal quality q in [30, 40], L differs by (q - 30)/20 - (q - 30)/10, on average by -1/4.
    # At equal L in [0, 0.75], quality differs by 10 L, on average by 3.75 dB.
    anchor = [(10**log_rate, 30 + 10 * log_rate) for log_rate in (0.0, 0.3, 0.6, 1.0)]
    test = [(10**log_rate, 30 + 20 * log_rate) for log_rate in (0.0, 0.2, 0.5, 0.6, 0.75)]
    rate, decibels = curves.compute_bd(anchor, test)
    assert rate == pytest.approx(100 * (10**-0.25 - 1), abs=1e-9)
    assert decibels == pytest.approx(3.75, abs=1e-9)


def test_bd_of_a_bent_curve_is_the_piecewise_cubic_integral() -> None:
    # log10 rate is 0, 1, 3, 3.5 at qualities 0, 1, 2, 3, so the differences are 1, 2, 1/2. PCHIP's slope at the left
    # end is (3*1 - 2)/2 = 1/2. At the right end (3/2 - 2)/2 is negative, so the slope is 0. The integral of a Hermite
    # cubic of width 1 is its trapezoid plus (left slope - right slope)/12, and inner slopes cancel. So the mean is
    # (0.5 + 2 + 3.25 + 1/24)/3. The anchor is a line of slope 1 with mean 3/2.
    anchor = [(10.0**q, float(q)) for q in range(4)]
    test = [(10.0**log_rate, float(q)) for q, log_rate in enumerate((0, 1, 3, 3.5))]
    assert curves.compute_bd(anchor, test)[0] == pytest.approx(100 * (10 ** ((5.75 + 1 / 24) / 3 - 1.5) - 1), rel=1e-9)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ([(0.1, 25.0), (0.2, 28.0), (0.4, 31.0)], "the curve has 3 of the 4 points needed"),
        ([(0.1, 35.0), (0.2, 38.0), (0.4, 41.0), (0.8, 44.0)], "share 0.00 of 9.00 dB"),
        ([(1.1, 26.0), (1.2, 28.0), (1.4, 31.0), (1.8, 34.0)], "share 0.00 of 0.21 decades of rate"),
        ([(0.1, 32.0), (0.2, 38.0), (0.4, 41.0), (0.8, 44.0)], "share 2.00 of 9.00 dB"),
        ([(0.1, 25.0), (0.2, 28.0), (0.4, 27.0), (0.8, 34.0)], "does not rise: 28.00 dB at 0.200 bpp"),
        ([(0.1, 25.0), (0.2, 28.0), (0.2, 28.0), (0.8, 34.0)], "does not rise: 28.00 dB at 0.200 bpp"),
    ],
)
def test_curves_that_cannot_be_compared_are_refused_with_the_reason(
    test: list[tuple[float, float]], reason: str
) -> None:
    with pytest.raises(curves.NotComparable, match=reason.replace(".", r"\.")):
        curves.compute_bd([(0.1, 25.0), (0.2, 28.0), (0.4, 31.0), (0.8, 34.0)], test)


# Measures ---------------------------------------------------------------------------------------------------


def test_distortions_are_those_of_the_8_bit_images() -> None:
    x, y = np.asarray(textured(0)), np.asarray(textured(5))
    mse = np.mean((x.astype(float) - y) ** 2) / 255**2
    values = quality.compare_images(x, y)
    assert values["mse"] == pytest.approx(mse, rel=1e-5)
    assert values["psnr_db"] == pytest.approx(-10 * np.log10(mse), abs=1e-4)
    ms_ssim = values["ms_ssim"]
    assert ms_ssim is not None and values["ms_ssim_db"] == pytest.approx(-10 * np.log10(1 - ms_ssim))
    same = quality.compare_images(x, x)
    assert (same["psnr_db"], same["ms_ssim_db"]) == (pytest.approx(100.0), pytest.approx(60.0))
    assert quality.compare_images(x[:160], y[:160])["ms_ssim"] is None


def test_results_are_means_over_the_images_of_values_of_real_files(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    summary = run(tmp_path, "abcds", folder, baselines="jpeg")
    rows = csv_rows(tmp_path / "out" / "images.csv")
    assert len(rows) == 3 * (5 + len(BASELINES["jpeg"].sweep))
    ours = [row for row in rows if row["point"] == "c"]
    assert [row["image"] for row in ours] == ["a.png", "b.PNG", "c.bmp"]
    for row in ours:
        data = models["c"].compress(read(folder / row["image"]))
        assert int(row["bytes"]) == len(data)
        assert float(row["bpp"]) == pytest.approx(8 * len(data) / int(row["width"]) / int(row["height"]))
        assert float(row["estimated_bits"]) == pytest.approx(0.99 * 8 * len(data))
    assert [bool(row["ms_ssim"]) for row in ours] == [True, True, False]

    point = next(p for p in summary["points"] if p["point"] == "c")
    mean = {key: np.mean([float(row[key]) for row in ours]) for key in ("bpp", "psnr_db", "mse")}
    assert point["bpp"] == pytest.approx(mean["bpp"]) and point["psnr_db"] == pytest.approx(mean["psnr_db"])
    assert point["psnr_db_of_mean_mse"] == pytest.approx(-10 * np.log10(mean["mse"]), abs=1e-4)
    assert point["psnr_db_of_mean_mse"] < point["psnr_db"]  # Jensen
    assert point["ms_ssim"] == pytest.approx(np.mean([float(row["ms_ssim"]) for row in ours[:2]]))
    assert point["estimated_bpp"] == pytest.approx(0.99 * point["bpp"])
    assert point["loss"] == pytest.approx(mean["bpp"] + 0.0067 * 255**2 * mean["mse"], rel=1e-6)
    assert (point["fingerprint"], point["metric"], point["lambda"]) == ("00000028", "mse", 0.0067)

    # The models are JPEG at qualities of the sweep, so they lie on the curve of JPEG.
    mse, ms_ssim = (next(row for row in summary["bd"] if row["curve"].endswith(f", {m}")) for m in ("MSE", "MS-SSIM"))
    assert mse["against"] == "JPEG 4:2:0" and abs(mse["psnr_db"]["rate_percent"]) < 1.0
    assert "has 1 of the 4 points" in ms_ssim["psnr_db"]["refused"]
    text = re.sub(" +", " ", (tmp_path / "out" / "summary.md").read_text())
    assert "has 1 of the 4 points" in text and f"| c | 0.0067 | mse | {point['bpp']:.4f} |" in text
    equal = {row["model"]: row for row in summary["models"] if row["against"] == "JPEG 4:2:0"}
    assert set(equal) == set("abcds") and all(abs(row["psnr_db"]) < 1.0 for row in equal.values())
    assert "| s | JPEG 4:2:0 | " in text and "| c | JPEG 4:2:0 | " not in text  # only models without BD values
    page = re.search(r'id="data">(.*?)</script>', (tmp_path / "out" / "report.html").read_text(), re.DOTALL)
    assert page
    shown = json.loads(page[1])
    assert len(shown["rows"]) == len(rows) and len(shown["points"]) == len(summary["points"])
    assert [picture["name"] for picture in shown["pictures"]] == [image["name"] for image in summary["images"]]
    for name in ("rd_psnr.png", "rd_ms_ssim.png", "pictures.png"):
        with Image.open(tmp_path / "out" / name) as drawn:
            assert drawn.width > 800
    assert (tmp_path / "out" / "rd_psnr.svg").read_text().rstrip().endswith("</svg>")


def test_what_includes_ms_ssim_is_of_the_images_that_have_one(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    """A small image changes the mean rate, but nothing that compares rate with MS-SSIM."""
    mixed = run(tmp_path, "abcds", folder, baselines="jpeg", out="mixed")
    (folder / "c.bmp").unlink()
    large = run(tmp_path, "abcds", folder, baselines="jpeg", out="large")
    for with_small, without in zip(mixed["points"], large["points"]):
        assert (with_small["images"], with_small["ms_ssim_images"]) == (3, 2) and without["images"] == 2
        assert with_small["bpp"] != without["bpp"]
        assert with_small["ms_ssim_bpp"] == without["ms_ssim_bpp"] == without["bpp"]
        if with_small.get("metric") == "ms-ssim":
            assert with_small["loss"] == without["loss"] == without["bpp"] + 16.64 * (1 - without["ms_ssim"])
    assert "Only 2 of the 3 images are large enough for MS-SSIM" in (tmp_path / "mixed" / "summary.md").read_text()
    assert "large enough" not in (tmp_path / "large" / "summary.md").read_text()
    # The curves are those of the large images: in the figure, in the report and in BD values.
    points = [p | {"bpp": 9.0 - i} for i, p in enumerate(mixed["points"])]
    bds = [curves.compare_curves(each)[0]["ms_ssim_db"] for each in (points, large["points"])]
    assert bds[0] == bds[1] and "rate_percent" in bds[0]
    figures = [dict(plots.draw_rd_figures(p["points"]))["rd_ms_ssim"] for p in (mixed, large)]
    drawn = [[line.get_xydata().tolist() for line in figure.axes[0].lines] for figure in figures]
    assert drawn[0] == drawn[1]


def test_models_of_the_same_lambda_form_different_curves_and_are_shown_side_by_side(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    models["mine"] = models["c"]
    summary = run(tmp_path, ["c", "mine"], folder)
    assert [point["curve"] for point in summary["points"] if point["kind"] == "model"] == ["c", "mine"]
    page = re.search(r'id="data">(.*?)</script>', (tmp_path / "out" / "report.html").read_text(), re.DOTALL)
    assert page
    shown = json.loads(page[1])
    assert [version["title"] for version in shown["pictures"][0]["versions"]][:2] == ["c", "mine"]
    assert all(point["loss"] > 0 and point["lambda"] == 0.0067 for point in shown["points"][:2])
    two = run(tmp_path, ["a", "b", "mine", "c"], folder, out="two")
    curves = {point["point"]: point["curve"] for point in two["points"] if point["kind"] == "model"}
    assert curves == {"a": "a to mine", "b": "a to mine", "mine": "a to mine", "c": "c"}


def test_every_image_is_encoded_once_after_a_warm_up(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    before = models["a"].calls
    run(tmp_path, "a", folder)
    assert models["a"].calls - before == 1 + 3  # the warm-up and three images; the sheet uses the same files


def test_a_bad_image_is_named_and_left_out(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel], capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(tmp_path, "a", folder)
    (folder / "broken.png").write_bytes(encoded(textured(3), "PNG")[:2000])
    after = run(tmp_path, "a", folder, out="again")
    assert "broken.png cannot be used" in capsys.readouterr().err
    assert after["images"] == before["images"] and after["points"][0]["bytes"] == before["points"][0]["bytes"]
    (tmp_path / "bad").mkdir()
    (folder / "broken.png").rename(tmp_path / "bad" / "broken.png")
    with pytest.raises(DataError, match="holds no image that can be used"):
        run(tmp_path, "a", tmp_path / "bad", out="none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        run(tmp_path, "a", tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be read"):
        run(tmp_path, "a", tmp_path / "missing")


def test_models_get_distinct_names(models: dict[str, JpegModel]) -> None:
    paths = [Path("x/a"), Path("y/a"), Path("b")]
    assert [model.name for model in evaluate.load_models(paths)] == ["x/a", "y/a", "b"]
    with pytest.raises(ConfigError, match="given twice"):
        evaluate.load_models([Path("a"), Path("x/../a")])


def test_files_that_are_passed_over_are_counted(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "report.html").write_text("a result")
    (folder / "phone.HEIC").write_bytes(b"x")
    warnings: list[str] = []
    evaluate.find_photos(folder, warnings.append, folder / "out")
    assert warnings == [f"{folder} also holds files without an image suffix: .heic 1, .txt 1"]


def test_results_do_not_replace_the_files_of_others(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.plots, "draw_rd_figures", lambda points: [])  # saves seconds
    (tmp_path / "out").mkdir()
    for name, content in (("summary.md", "mine"), ("rd_ms_ssim.png", "mine"), ("summary.json", "[5]")):
        (tmp_path / "out" / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"out holds {name} that no evaluation wrote; choose another"):
            run(tmp_path, "a", folder)
        assert (tmp_path / "out" / name).read_text() == content
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ConfigError, match="out /proc/x cannot be made"):
        evaluate.evaluate([Path("a")], folder, Path("/proc/x"), evaluate.Options(baselines="none"), QUIET)
    run(tmp_path, "a", folder)
    (tmp_path / "out" / "rd_ms_ssim.png").write_text("of an earlier evaluation, which measured MS-SSIM")
    run(tmp_path, "a", folder)
    assert not (tmp_path / "out" / "rd_ms_ssim.png").exists()


def test_links_in_a_circle_are_left_out_with_a_warning(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    warnings: list[str] = []
    assert evaluate.find_photos(folder, warnings.append, folder / "out")
    assert f"{folder / 'loop.png'} cannot be used: cannot be read: Too many levels of symbolic links" in warnings[-1]


def test_a_cache_without_a_place_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Path("~nobody-here").expanduser)  # raises RuntimeError
    cache = baselines.Cache(baselines.default_cache())
    for key in ("a", "b", "a"):
        assert cache.get_or_measure(key, lambda: {"key": key}) == {"key": key}  # noqa: B023
    assert len(caplog.messages) == 1 and "baselines are measured again next time" in caplog.text


def test_a_file_larger_than_an_image_can_be_is_left_out(folder: Path) -> None:
    with (folder / "huge.tif").open("wb") as file:
        file.truncate(8 * 178_956_970 + 1)
    warnings: list[str] = []
    assert evaluate.find_photos(folder, warnings.append)
    assert f"{folder / 'huge.tif'} cannot be used: a file of 1,431,655,761 bytes" in warnings[-1]


@pytest.mark.parametrize(("width", "height", "name"), [(16_384, 2, "webp"), (2, 65_501, "jpeg")])
def test_an_image_that_a_baseline_cannot_hold_is_named_before_anything_is_measured(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel], width: int, height: int, name: str
) -> None:
    Image.new("RGB", (width, height)).save(folder / "long.png")
    before = models["a"].calls
    with pytest.raises(DataError, match=rf"long\.png, {width}x{height}: .* cannot hold"):
        run(tmp_path, "a", folder, baselines=name)
    assert models["a"].calls == before and not (tmp_path / "out").exists()


# The gate ---------------------------------------------------------------------------------------------------


def test_the_gate_passes_equal_models_and_stops_worse_ones(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "out" / "summary.json"
    monkeypatch.setattr(evaluate.plots, "draw_rd_figures", lambda points: [])  # saves seconds
    run(tmp_path, "abs", folder)
    summary = run(tmp_path, "as", folder, out="again", gate=stored)
    assert [(v["passed"], v["change_percent"]) for v in summary["gate"]] == [(True, 0.0), (True, 0.0)]

    models["b"] = JpegModel(85, 0.0035)  # far from the best trade-off for its lambda
    with pytest.raises(GateError, match=r"b is worse: loss .* margin 0\.5%"):
        run(tmp_path, "ab", folder, out="worse", gate=stored)
    summary = json.loads((tmp_path / "worse" / "summary.json").read_text())
    assert [v["passed"] for v in summary["gate"]] == [True, False]
    assert (tmp_path / "worse" / "pictures.png").exists()
    change = summary["gate"][1]["change_percent"]
    assert run(tmp_path, "b", folder, out="lenient", gate=stored, margin=change + 0.01)["gate"][0]["passed"]
    with pytest.raises(GateError):
        run(tmp_path, "b", folder, out="strict", gate=stored, margin=change - 0.01)

    arguments = ["b", "--images", folder, "--out", tmp_path / "cli", "--baselines", "none", "--gate", stored]
    monkeypatch.setattr(sys, "argv", ["hyperprior", "evaluate", *map(str, arguments)])
    monkeypatch.setattr(stack, "restart_with_allocator", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and (tmp_path / "cli" / "summary.json").exists()


def test_the_gate_finds_its_result_by_lambda_and_then_by_name(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    stored = tmp_path / "out" / "summary.json"
    models["e"] = JpegModel(60, 0.0018)
    run(tmp_path, "aeb", folder)
    models["renamed"] = JpegModel(30, 0.0035)
    models["e"] = JpegModel(61, 0.0018)
    new_models = [evaluate.Model(name, models[name], "ours") for name in ("renamed", "e")]
    digests = {photo.path.name: photo.sha256 for photo in evaluate.find_photos(folder, print)}
    facts = {model.name: model.facts() for model in new_models}
    fitting = gate.read_stored(stored, tmp_path / "again", digests, facts)
    assert {name: point["point"] for name, point in fitting.items()} == {"renamed": "b", "e": "e"}


def test_a_stored_result_that_does_not_fit_is_refused_before_anything_is_measured(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    stored = tmp_path / "out" / "summary.json"
    run(tmp_path, "a", folder)
    before = models["a"].calls
    with pytest.raises(ConfigError, match="would be overwritten"):
        run(tmp_path, "a", folder, gate=stored)
    with pytest.raises(ConfigError, match=r"exactly one result for b \(mse, lambda 0\.0035\); it holds a"):
        run(tmp_path, "b", folder, out="again", gate=stored)
    with pytest.raises(
        ConfigError, match=r"for a \(mse, lambda 0\.0018, effort 20\); it holds a \(mse, lambda 0\.0018\)"
    ):
        run(tmp_path, "a", folder, out="again", gate=stored, effort=20)
    with pytest.raises(ConfigError, match=r"is not a summary\.json"):
        run(tmp_path, "a", folder, out="again", gate=folder / "notes.txt")
    pixels = read(folder / "a.png").copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "a.png")
    with pytest.raises(ConfigError, match=r"other images: 1 differ or are missing on one side, first a\.png"):
        run(tmp_path, "a", folder, out="again", gate=stored)
    assert models["a"].calls == before and not (tmp_path / "again").exists()


def test_a_stored_loss_that_is_not_finite_is_refused(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    summary = run(tmp_path, "a", folder)
    summary["points"][0]["loss"] = float("inf")
    (tmp_path / "edited.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="exactly one result for a"):
        run(tmp_path, "a", folder, out="again", gate=tmp_path / "edited.json")
    del summary["points"][0]["point"]
    (tmp_path / "edited.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=r"is not a summary\.json"):
        run(tmp_path, "a", folder, out="again", gate=tmp_path / "edited.json")


def test_names_that_are_not_utf_8_are_written_escaped(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel]
) -> None:
    (folder / os.fsdecode(b"\xff \xe9.png")).write_bytes((folder / "a.png").read_bytes())
    assert len(run(tmp_path, "a", folder)["images"]) == 4
    assert r"\udcff \udce9.png" in (tmp_path / "out" / "images.csv").read_text()


# Baselines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_every_step_of_a_sweep_takes_more_bytes_and_gives_better_quality(name: str) -> None:
    baseline = BASELINES[name]
    if baseline.version() is None:
        pytest.skip(f"this Pillow has no {name}")
    pixels = np.asarray(textured(7))
    measured = [
        evaluate.round_trip(pixels, lambda x, value=value: baseline.encode(x, value), baselines.decode)[1]
        for value in baseline.sweep[::3]
    ]
    for before, after in zip(measured, measured[1:]):
        assert before["bytes"] < after["bytes"] and before["psnr_db"] < after["psnr_db"]
        assert before["ms_ssim"] < after["ms_ssim"]


@pytest.mark.parametrize(
    ("name", "values", "lowest", "highest"),
    [
        ("jpeg", (5, 20, 40, 80), -0.3, 0.3),
        ("webp", (15, 45, 75, 90), -0.3, 0.3),
        # Below 0.35 bpp, today's WebP is better than the WebP of 2018, and JPEG with its own tables is better than with
        # the standard's tables.
        ("webp", (0, 5), 0.3, 0.7),
        ("jpeg-opt", (10, 20), 0.4, 1.5),
        ("jpeg-opt", (40, 80), -0.3, 0.3),
    ],
)
def test_baselines_on_kodak_agree_with_published_points(
    samples: Path, name: str, values: tuple[int, ...], lowest: float, highest: float
) -> None:
    if not (samples / "kodak").is_dir():
        pytest.skip("HYPERPRIOR_SAMPLES has no kodak/")
    photos = evaluate.find_photos(samples / "kodak", print)
    baseline = BASELINES[name]
    label = baseline.label.replace(" optimized", "")
    published = [p for p in evaluate.choose_published(None, photos) if p["curve"] == label]
    rates, qualities = np.log([p["bpp"] for p in published]), [p["psnr_db"] for p in published]
    for value in values:
        bpp, psnr_db = [], []
        for kodak in photos:
            pixels = kodak.pixels()
            data = baseline.encode(pixels, value)
            squares = (pixels.astype(np.int32) - baselines.decode(data)) ** 2
            bpp.append(8 * len(data) / kodak.width / kodak.height)
            psnr_db.append(10 * np.log10(255**2 / squares.mean()))
        deviation = np.mean(psnr_db) - np.interp(np.log(np.mean(bpp)), rates, qualities)
        assert lowest < deviation < highest, f"{value}: {deviation:+.2f} dB at {np.mean(bpp):.3f} bpp"


def test_baselines_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    assert baselines.choose("none", messages.append) == []
    assert [b.name for b in baselines.choose("webp, jpeg", messages.append)] == ["webp", "jpeg"]
    with pytest.raises(ConfigError, match="names `gif`; there are jpeg, "):
        baselines.choose("gif", messages.append)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # makes its import fail
    assert "jpeg-xl" not in [b.name for b in baselines.choose("all", messages.append)]
    assert "without jpeg-xl" in messages[0]
    with pytest.raises(ConfigError, match="pip install pillow-jxl-plugin"):
        baselines.choose("jpeg-xl", messages.append)


def test_baselines_are_measured_once(
    tmp_path: Path, folder: Path, models: dict[str, JpegModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    trip = evaluate.round_trip
    monkeypatch.setattr(evaluate, "round_trip", lambda *a: (measured.append(1), trip(*a))[1])

    def run_again() -> tuple[int, list[dict[str, Any]]]:
        """(number of baseline points that were measured and not read from the cache; the baselines' rows)."""
        measured.clear()
        photos, chosen = evaluate.find_photos(folder, print), [BASELINES["jpeg"], BASELINES["webp"]]
        rows, _ = evaluate.measure_photos(
            photos, set(), [evaluate.Model("a", models["a"], "ours")], chosen, cache(), QUIET
        )
        return len(measured) - len(photos), [row for row in rows if row["kind"] == "baseline"]

    def cache() -> baselines.Cache:
        return baselines.Cache(tmp_path / "cache")

    everything = 3 * len(BASELINES["jpeg"].sweep + BASELINES["webp"].sweep)
    count, rows = run_again()
    assert count == everything == len(rows)
    assert run_again() == (0, rows)

    path = tmp_path / "cache" / "baselines.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff\x00 no line\n"
    lines[2] = b'{"key": "another", "row": 3}\n'
    lines[-1] = lines[-1][:50]  # as after a crash
    path.write_bytes(b"".join(lines))
    assert run_again() == (3, ANY)
    assert run_again() == (0, ANY)
    textured(9).save(folder / "a.png")
    assert run_again() == (everything // 3, ANY)
    monkeypatch.setattr("PIL.__version__", "0")
    assert run_again() == (everything, ANY)


def test_a_baseline_gets_the_best_quality_that_fits_into_the_given_bytes() -> None:
    pixels = np.asarray(textured(4))
    for name in ("jpeg", "webp"):
        data, quality = baselines.fit(BASELINES[name], pixels, 9000) or pytest.fail()
        assert data == BASELINES[name].encode(pixels, quality)
        assert len(data) <= 9000 < len(BASELINES[name].encode(pixels, quality + 1))
    assert baselines.fit(BASELINES["jpeg"], pixels, 10) is None


# Published points -------------------------------------------------------------------------------------------


def test_the_shipped_curves_are_used_only_for_the_kodak_images(tmp_path: Path) -> None:
    photos = [SimpleNamespace(name=name) for name in sorted(published.KODAK)]
    points = evaluate.choose_published(None, photos)  # type: ignore[arg-type]
    assert {p["curve"] for p in points} >= {"Balle et al. 2018 (paper), MSE", "BPG 4:4:4", "WebP"}
    assert evaluate.choose_published(None, photos[1:]) == []  # type: ignore[arg-type]
    assert evaluate.choose_published("none", photos) == []  # type: ignore[arg-type]
    path = tmp_path / "own.csv"
    path.write_text("codec,bpp,psnr_db,ms_ssim\nX,0.5,30.0,\nX,0.7,,0.9\n")
    (first, second) = evaluate.choose_published(str(path), [])
    assert (first["curve"], first["psnr_db"], first["ms_ssim"]) == ("X", 30.0, None)
    assert (second["psnr_db"], second["ms_ssim_db"]) == (None, pytest.approx(10.0))
    for row in ("X,half,30.0,", "X,0.5,nan,", "X,inf,30.0,", "X,0,30.0,", "X,0.5,,1.0", "X,,30.0,"):
        path.write_text(f"codec,bpp,psnr_db,ms_ssim\nX,0.5,30.0,\n{row}\n")
        with pytest.raises(ConfigError, match=r"own\.csv, point 2: "):
            evaluate.choose_published(str(path), [])
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate.choose_published(str(tmp_path / "missing.csv"), [])


def test_the_crop_contains_the_most_detail() -> None:
    pixels = np.full((300, 400, 3), 128, np.uint8)
    pixels[100:196, 200:296] = np.random.RandomState(0).randint(0, 256, (96, 96, 3))
    rows, columns = plots.find_detail(pixels, 96)
    assert abs(rows.start - 100) < 8 and abs(columns.start - 200) < 8
    assert plots.find_detail(pixels[:5, :3], 96) == (slice(0, 5), slice(0, 3))
