"""report.html is complete, safe from file names, and works in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import browser_tab, photo

from hyperprior.evaluation import plots, report

HOSTILE = "</script><img src=x onerror=alert(1)>.png"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report with two pictures, four curves, and a file name that attacks the page."""
    names = [HOSTILE, "b.png"]
    points: list[dict[str, Any]] = [
        {
            "kind": kind,
            "curve": curve,
            "point": f"p{i}",
            "bpp": 0.2 * i,
            "psnr_db": level + 2.0 * i,
            "ms_ssim_bpp": 0.2 * i,
            "ms_ssim_db": 10.0 + i,
        }
        for kind, curve, level in (
            ("model", "ours", 30.0),
            ("baseline", "JPEG", 28.0),
            ("published", "theirs", 31.0),
            ("published", "MSE (paper)", 32.0),
        )
        for i in range(1, 5)
    ]
    delta = {"rate_percent": -12.5, "quality_db": 0.5}
    summary = {
        "hyperprior": "1",
        "images": [{"name": name} for name in names],
        "points": points,
        "bd": [{"curve": "ours", "against": "JPEG", "kind": "baseline", "psnr_db": delta, "ms_ssim_db": delta}],
        "models": [{"curve": "mine", "model": "mine", "against": "JPEG", "psnr_db": -3.04, "ms_ssim_db": None}],
    }
    rows = [
        {
            "curve": "our  curve",
            "point": "p1",
            "image": name,
            "width": 96,
            "height": 80,
            "bytes": size,
            "bpp": size / 960,
        }
        | {"psnr_db": 30.0 + size / 1e3, "ms_ssim": None, "encode_seconds": 0.1, "decode_seconds": 0.2}
        for name, size in zip(names, (900, 1200))
    ]
    original = np.asarray(photo(1, 96, 80))
    versions = [plots.Picture(title, ["1 byte"], np.zeros_like(original)) for title in ("hyperprior", "JPEG", "AVIF")]
    pictures = [report.embed_picture(name, original, versions) for name in names]
    path = tmp_path / "report.html"
    path.write_text(report.render(summary, rows, pictures))
    return path


def test_a_markdown_table_is_aligned() -> None:
    lines = ["| a    | b\\|c |", "| ---- | ---- |", "| long | 1    |", ""]
    assert report.to_markdown([["a", "b|c"], ["long", "1"]]) == lines
    assert report.to_markdown([["a", "b|c"]]) == []


def test_a_report_needs_no_network_and_file_names_cannot_break_it(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert text.count("</script>") == 2 and "onerror=alert" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert [picture["name"] for picture in data["pictures"]] == [HOSTILE, "b.png"]
    assert len(data["points"]) == 16 and data["rows"][1]["bytes"] == 1200


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser_slider_and_tables_work_without_errors(page: Path, width: int, scheme: Any) -> None:
    with browser_tab(viewport={"width": width, "height": 900}, color_scheme=scheme) as (tab, errors):
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # the page fits the width
        assert tab.locator("svg").count() == 2

        slider = tab.locator(".slider").first
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        assert box
        middle = box["y"] + box["height"] / 2
        tab.mouse.move(box["x"] + box["width"] / 2, middle)
        tab.mouse.down()
        tab.mouse.move(box["x"] + 0.9 * box["width"], middle, steps=5)
        tab.mouse.up()
        assert 80 <= float(slider.evaluate("e => parseFloat(e.style.getPropertyValue('--at'))")) <= 100
        slider.locator("input").focus()
        before = slider.evaluate("e => e.style.getPropertyValue('--at')")
        tab.keyboard.press("ArrowLeft")
        assert slider.evaluate("e => e.style.getPropertyValue('--at')") != before
        shown = slider.locator(".over").get_attribute("src")
        figure = tab.locator("#pictures figure").first
        figure.get_by_role("button", name="JPEG").click()
        assert slider.locator(".over").get_attribute("src") == shown  # all versions are black here
        assert "right: JPEG, 1 byte" in figure.inner_text() and HOSTILE in figure.inner_text()

        assert tab.locator("#comparisons td").all_inner_texts() == ["mine", "JPEG", "-3.0%", "beyond its curve"]
        tab.locator("#images th button").nth(2).click()
        cells = tab.locator("#images tbody td:nth-child(3)")
        assert cells.all_inner_texts() == ["900", "1,200"]
        tab.locator("#images th button").nth(2).click()
        assert cells.all_inner_texts() == ["1,200", "900"]
        assert tab.locator("#images th").nth(2).get_attribute("aria-sort") == "descending"

        tab.locator("svg circle[tabindex]").first.focus()
        assert tab.locator("#tip").is_visible() and "0.200 bpp, 32.00 dB" in tab.locator("#tip").inner_text()
        dots = tab.locator("svg circle").count()
        tab.get_by_role("button", name="theirs (published)").click()  # at the start only the paper's own are shown
        assert 3 * tab.locator("svg circle").count() == 4 * dots
        tab.get_by_role("button", name="JPEG", exact=True).first.click()
        assert tab.locator("svg circle").count() == dots
    assert not errors


def test_a_spreadsheet_runs_no_name() -> None:
    rows = [{"image": name, "psnr_db": -1.5} for name in ("=1+1.png", "+a", "-b", "@c", "plain.png")]
    table = list(csv.DictReader(io.StringIO(report.to_csv(rows))))
    assert [row["image"] for row in table] == ["'=1+1.png", "'+a", "'-b", "'@c", "plain.png"]
    assert {row["psnr_db"] for row in table} == {"-1.5"}
