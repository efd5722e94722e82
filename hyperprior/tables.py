"""What an evaluation says, as CSV and as Markdown tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, Optional

from hyperprior import rd

COLUMNS = ["kind", "curve", "point", "image", "width", "height", "bytes", "bpp", "estimated_bits"]
COLUMNS += ["mse", "psnr_db", "ms_ssim", "ms_ssim_db", "encode_seconds", "decode_seconds"]
SHOWN = [  # title, column, digits
    ("bpp", "bpp", 4),
    ("PSNR, dB", "psnr_db", 3),
    ("PSNR of mean MSE", "psnr_db_of_mean_mse", 3),
    ("MS-SSIM", "ms_ssim", 5),
    ("MS-SSIM, dB", "ms_ssim_db", 3),
    ("encode, s", "encode_seconds", 3),
    ("decode, s", "decode_seconds", 3),
]
NOTES = """\
- bpp, PSNR and MS-SSIM are means over the images of each image's value; bpp is of whole files, headers included.
- PSNR is that of 8-bit RGB. "PSNR of mean MSE" averages the error before the logarithm, and so weighs bad images more.
- MS-SSIM in dB is -10 log10(1 - mean MS-SSIM). It needs images of at least {side} pixels a side.
- Seconds are medians over the images on this machine, after a warm-up; a kept baseline's are of when it was measured.
- Loss is bpp + lambda 255² MSE, or bpp + lambda (1 - MS-SSIM), of the means over the images.
- BD-rate: the average difference in rate at equal quality (PSNR, or MS-SSIM in dB); negative is better. BD-PSNR and
  BD-MS-SSIM: in quality at equal rate, in dB; positive is better. Piecewise cubic (PCHIP) curves over log rate,
  of at least {points} points each, that share at least {overlap:.0%} of the shorter one's range.
"""


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def points_table(points: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """A Markdown table of the points of models, or of baselines."""
    head = ["model", "lambda", "metric"] if kind == "model" else ["codec", "setting"]
    table = [head + [title for title, _, _ in SHOWN] + (["estimated bpp", "loss"] if kind == "model" else [])]
    for p in points:
        if p["kind"] == kind:
            name = [p["point"], f"{p['lambda']:g}", p["metric"]] if kind == "model" else [p["curve"], p["point"]]
            ending = [number(p["estimated_bpp"], 4), number(p.get("loss"), 4)] if kind == "model" else []
            table.append(name + [number(p[column], digits) for _, column, digits in SHOWN] + ending)
    return markdown(table)


def bd_table(results: Sequence[dict[str, Any]]) -> list[str]:
    table = [["curve", "against", "BD-rate (PSNR)", "BD-PSNR", "BD-rate (MS-SSIM)", "BD-MS-SSIM"]]
    for row in results:
        cells = []
        for value in (row["psnr_db"], row["ms_ssim_db"]):
            reason = value.get("refused")
            cells += [reason, ""] if reason else [f"{value['rate_percent']:+.1f}%", f"{value['quality_db']:+.2f} dB"]
        against = row["against"] + (" (published)" if row["kind"] == "published" else "")
        if cells[0].startswith("the curve "):  # a curve that compares with none says so once
            against = "every other"
        if [row["curve"], against, *cells] not in table:
            table.append([row["curve"], against, *cells])
    return markdown(table)


def how(points: Sequence[dict[str, Any]]) -> list[str]:
    """How everything was measured."""
    lines = [NOTES.format(side=rd.MS_SSIM_MIN_SIDE, points=rd.BD_MIN_POINTS, overlap=rd.BD_MIN_OVERLAP)]
    for curve, p in {p["curve"]: p for p in points if p["kind"] == "baseline"}.items():
        options = ", ".join(f"{key} {value}" for key, value in p["options"].items())
        lines.append(f"- {curve}: Pillow {p['pillow']}, codec {p['codec']}; {options}.")
    return lines


def number(value: Optional[float], digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:], ""] if len(table) > 1 else []
