"""The reports of an evaluation: CSV, Markdown tables, and report.html, one file with curves, tables and pictures."""

from __future__ import annotations

import base64
import csv
import importlib.resources
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hyperprior.config import MS_SSIM_MIN_SIDE
from hyperprior.evaluation import plots
from hyperprior.evaluation.curves import BD_MIN_OVERLAP, BD_MIN_POINTS
from hyperprior.metric_table import METRICS, cell

COLUMNS = ["kind", "curve", "point", "image", "width", "height", "bytes", "bpp", "estimated_bits"]
COLUMNS += ["mse", "psnr_db", "ms_ssim", "ms_ssim_db", "encode_seconds", "decode_seconds"]
SHOWN = ["bpp", "psnr_db", "psnr_db_of_mean_mse", "ms_ssim", "ms_ssim_db", "encode_seconds", "decode_seconds"]
SHOWN_OF_MODELS = [*SHOWN, "estimated_bpp", "loss"]
NOTES = """\
- bpp, PSNR and MS-SSIM are means of the images' values. bpp counts whole files, including headers.
- PSNR is computed on 8-bit RGB. "PSNR of mean MSE" averages the error before the logarithm, so bad images weigh more.
- MS-SSIM in dB is -10 log10(1 - mean MS-SSIM). MS-SSIM needs images of at least {side} pixels a side.
- Seconds are medians over the images on this machine, after a warm-up. Stored results of baselines keep their seconds.
- Loss is bpp + lambda 255² MSE, or bpp + lambda (1 - MS-SSIM), of the means over the images.
- BD-rate is the average difference in rate at equal quality (PSNR, or MS-SSIM in dB); negative is better. BD-PSNR and
  BD-MS-SSIM are the average difference in quality at equal rate, in dB; positive is better. Curves are piecewise cubic
  (PCHIP) over log rate, have at least {points} points, and share at least {overlap:.0%} of the shorter curve's range.
"""
SIDE = 768  # pixels a side that the report shows of a picture, which keeps the file small enough to send
ROW = ["curve", "point", "image", "width", "height", "bytes", "bpp", "psnr_db", "ms_ssim"]
ROW += ["encode_seconds", "decode_seconds"]
POINT = ["kind", "curve", "point", "bpp", "psnr_db", "ms_ssim_bpp", "ms_ssim_db", "ms_ssim", "lambda", "metric", "loss"]


# Tables -------------------------------------------------------------------------------------------------


def as_text(value: Any) -> Any:
    """A cell that a spreadsheet does not run: a name that looks like a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: as_text(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def make_points_table(points: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """A Markdown table of the points of models, or of baselines."""
    is_model = kind == "model"
    columns = SHOWN_OF_MODELS if is_model else SHOWN
    head = ["model", "lambda", "metric"] if is_model else ["codec", "setting"]
    table = [head + [METRICS[column].title for column in columns]]
    for p in points:
        if p["kind"] == kind:
            name = [p["point"], f"{p['lambda']:g}", p["metric"]] if is_model else [p["curve"], p["point"]]
            table.append(name + [cell(column, p.get(column)) for column in columns])
    return to_markdown(table)


def make_bd_table(results: Sequence[dict[str, Any]]) -> list[str]:
    table = [["curve", "against", "BD-rate (PSNR)", "BD-PSNR", "BD-rate (MS-SSIM)", "BD-MS-SSIM"]]
    for row in results:
        cells = []
        for value in (row["psnr_db"], row["ms_ssim_db"]):
            reason = value.get("refused")
            cells += [reason, ""] if reason else [f"{value['rate_percent']:+.1f}%", f"{value['quality_db']:+.2f} dB"]
        against = row["against"] + (" (published)" if row["kind"] == "published" else "")
        if cells[0].startswith("the curve "):  # a curve that cannot be compared with any other gets one row
            against = "every other"
        if [row["curve"], against, *cells] not in table:
            table.append([row["curve"], against, *cells])
    return to_markdown(table)


def of_short_curves(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons of models whose curve is too short for BD values."""
    length = Counter(curve for curve, _ in {(row["curve"], row["model"]) for row in results})
    return [row for row in results if length[row["curve"]] < BD_MIN_POINTS]


def make_comparison_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of `of_short_curves`."""
    table = [["model", "against", "bytes at equal PSNR", "bytes at equal MS-SSIM"]]
    for row in of_short_curves(results):
        cells = ["beyond its curve" if row[m] is None else f"{row[m]:+.1f}%" for m in ("psnr_db", "ms_ssim_db")]
        table.append([row["model"], row["against"], *cells])
    return to_markdown(table)


def describe_method(points: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say how everything was measured."""
    lines = [NOTES.format(side=MS_SSIM_MIN_SIDE, points=BD_MIN_POINTS, overlap=BD_MIN_OVERLAP)]
    count, large = points[0]["images"], points[0]["ms_ssim_images"]
    if 0 < large < count:
        lines.append(
            f"- Only {large} of the {count} images are large enough for MS-SSIM. Its means, curves and BD values, and "
            f"the loss of models for MS-SSIM, are of these {large} images alone, in rate and in quality."
        )
    for curve, p in {p["curve"]: p for p in points if p["kind"] == "baseline"}.items():
        options = ", ".join(f"{key} {value}" for key, value in p["options"].items())
        lines.append(f"- {curve}: Pillow {p['pillow']}, codec {p['codec']}; {options}.")
    return lines


def to_markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, whose first row is the head. Without further rows, no lines."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return [*lines, ""] if len(table) > 1 else []


# report.html --------------------------------------------------------------------------------------------


def embed_picture(name: str, original: np.ndarray, versions: Sequence[plots.Picture]) -> dict[str, Any]:
    """One picture of the report, embedded without further loss; a large one is cropped to its most detailed part."""
    part = plots.find_detail(original, SIDE)
    height, width = original[part].shape[:2]
    whole = (height, width) == original.shape[:2]

    def source(version: plots.Picture) -> str:
        if version.kind and whole:
            return embed_file(version.kind, version.file)
        return embed_file("image/webp", encode_lossless(version.pixels[part]))

    coded = [{"title": v.title, "text": " · ".join(v.lines), "src": source(v)} for v in versions]
    own = embed_file("image/webp", encode_lossless(original[part]))
    return {"name": name, "width": width, "height": height, "original": own, "versions": coded}


def encode_lossless(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=50, method=4)
    return file.getvalue()


def embed_file(kind: str, file: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(file).decode()


def render(summary: dict[str, Any], rows: Sequence[dict[str, Any]], pictures: Sequence[dict[str, Any]]) -> str:
    """The HTML page. `summary`: the content of summary.json; `rows`: of images.csv."""
    names = [image["name"] for image in summary["images"]]
    about = f"{names[0]} to {names[-1]}; all sizes and pixels come from real files. "
    data = {
        "title": f"Evaluation on {len(names)} images",
        "about": about + f"hyperprior {summary['hyperprior']}.",
        "points": [{key: point.get(key) for key in POINT} for point in summary["points"]],
        "bd": summary["bd"],
        "comparisons": of_short_curves(summary["models"]),
        "rows": [{key: row.get(key) for key in ROW} for row in rows],
        "pictures": pictures,
        "pictures_about": "Move the line: the original is left of it. The baselines' files have at most as many bytes "
        f"as the first model's. A large picture shows only the {SIDE} x {SIDE} pixels with the most detail; its "
        "numbers are for the whole picture.",
    }
    page = (importlib.resources.files("hyperprior.evaluation") / "report.html").read_text("utf-8")
    # Without "<", no file name can end the script element.
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
