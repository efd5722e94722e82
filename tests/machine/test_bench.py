"""Bench counts and reports correctly. No test asserts a speed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, encoded, photo, tar_bytes

from hyperprior.config import load_config, validate
from hyperprior.errors import DataError, HyperpriorError
from hyperprior.machine import bench, bench_input
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.work import work_of_layers
from hyperprior.terminal import Terminal


def test_the_work_of_a_step_is_counted_from_its_shapes() -> None:
    settings = validate({"model": {"num_filters": 128, "latent_channels": 192, "hyper_channels": 128}}, "test")
    layers = work_of_layers(ScaleHyperprior(settings.model), 256)
    n, m = 128, 192
    g_a = 50 * (3 * n * 128**2 + n * n * (64**2 + 32**2) + n * m * 16**2)
    gdn = 2 * n * n * (128**2 + 64**2 + 32**2)
    h_a = 18 * m * n * 16**2 + 50 * n * n * (8**2 + 4**2)
    assert sum(layer.flop for layer in layers) == 2 * (g_a + gdn + h_a)
    assert sum(8 * layer.flop * layer.passes for layer in layers) / 1e9 == pytest.approx(271.4, abs=0.1)
    assert [layer.name for layer in layers if layer.passes == 2] == ["g_a/0 Conv"]


def test_a_start_that_fails_is_an_error(tmp_path: Path) -> None:
    settings = load_config(None, [*TINY, f"data.train=[{tmp_path / 'none.tar'}]", "train.steps=1000"])
    with pytest.raises(HyperpriorError, match="hyperprior train .* ended with exit code 3$"):
        bench.bench(settings, ["start"], 1, Terminal())


def test_input_without_jpegs_is_measured_without_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_input, "INPUT_SECONDS", 0.1)
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes((f"{i}.png", encoded(photo(i, 96, 80), "PNG")) for i in range(40)))
    settings = load_config(None, [*TINY, f"data.train=[{path}]", "train.steps=1000", "train.validate_every=null"])
    figures = bench.bench(settings, ["input"], 1, Terminal())
    assert list(figures["input"]["patches_per_s"]) == ["ours", "ours, 4 patches an image"]
    assert "no JPEG of 64x64 or more" in capsys.readouterr().out
    settings = load_config(None, [*TINY, f"data.train=[{path}]", "data.patch_size=256", "train.steps=1000"])
    with pytest.raises(DataError, match="t.tar"):
        bench.bench(settings, ["train"], 1, Terminal())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_every_part_reports_its_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_input, "INPUT_SECONDS", 0.3)
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes((f"{i}.jpg", encoded(photo(i, 200 + 9 * (i % 3), 195))) for i in range(40)))
    settings = load_config(None, [*TINY, f"data.train=[{path}]", "train.steps=1000", "train.validate_every=null"])
    figures = bench.bench(settings, list(bench.PARTS), 1, Terminal())
    step = figures["step"]
    assert step["step_over_ideal"] == pytest.approx(step["step"]["median"] / step["ideal"])
    assert 1000 < step["nodes"] < 1300
    assert step["gflop"] == pytest.approx(sum(row["gflop"] for row in step["layers"]))
    assert set(step["parts"]) == {"Conv", "GDN", "entropy model", "optimizer"} and min(step["parts"].values()) > 0
    for rates in (figures["input"]["patches_per_s"], figures["input"]["patches_per_cpu_s"]):
        assert len(rates) == 4 and all(0 < rate["low"] <= rate["median"] <= rate["high"] for rate in rates.values())
    loop = figures["train"]
    assert loop["loop"]["repeats"] == 2 and 0 <= loop["input_wait"] < 1 and loop["loop_over_step"] > 0
    parts_of_codec = ["compress", "latents", "exact h_s and range coding"]
    parts_of_codec += ["decompress", "exact h_s and range decoding", "g_s"]
    assert list(figures["start"]) == ["first_step", "import_tensorflow"] and list(figures["codec"]) == parts_of_codec
    for timing, repeats in [(t, 1) for t in figures["start"].values()] + [(t, 2) for t in figures["codec"].values()]:
        assert 0 < timing["low"] <= timing["median"] <= timing["high"] and timing["repeats"] == repeats
    output = capsys.readouterr().out
    assert "step / ideal" in output and "ours / other" in output and "loop / step" in output
