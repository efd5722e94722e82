"""Figures: rate-distortion curves, and a sheet of pictures of the same size.

Models are thick lines in colour, baselines are gray, and published curves are thin and pale. Figures are made without
pyplot, so they do not depend on a display or on earlier figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from hyperprior.evaluation.curves import RATES

MODEL_COLORS = ("#d1242f", "#0b5cad", "#1a7f37", "#8250df")
BASELINE_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), ("-", "D"), (":", "v"), ("--", "P"), ("-.", "X"), (":", "*"))
PUBLISHED_COLORS = ("#b08800", "#1b9e9e", "#c2569a", "#5a9e2f", "#e0702c", "#6f6fd8", "#b9a38f", "#8fb3a0", "#d8b26a")

CROP, ZOOM, GAP, MARGIN = 192, 2, 16, 32  # pixels


def draw_rd_figures(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of PSNR over bpp, and of MS-SSIM over bpp if it was measured."""
    for name, quality, label in (("rd_psnr", "psnr_db", "PSNR (RGB), dB"), ("rd_ms_ssim", "ms_ssim_db", "MS-SSIM, dB")):
        if any(point["kind"] == "model" and point[quality] is not None for point in points):
            yield name, draw_rd_figure(points, quality, label)


def draw_rd_figure(points: Sequence[dict[str, Any]], quality: str, label: str) -> Figure:
    """Curves of `quality` over bpp, up to a rate a little above the models' highest."""
    curves = defaultdict(list)
    for point in points:
        if point[quality] is not None:
            curves[point["kind"], point["curve"]].append((point[RATES[quality]], point[quality]))
    ours = [bpp for (kind, _), curve in curves.items() for bpp, _ in curve if kind == "model"]
    limit = max(1.0, 1.3 * max(ours))
    figure = Figure(figsize=(11.5, 6.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shown_values = []
    for kind in ("published", "baseline", "model"):
        names = [name for name in curves if name[0] == kind]
        for index, name in enumerate(names):
            curve = sorted(curves[name])
            bpp, value = zip(*curve)
            shown_values += [v for b, v in curve if b <= limit]
            style: dict[str, Any]
            if kind == "model":
                color = MODEL_COLORS[index % len(MODEL_COLORS)]
                style = {"color": color, "linewidth": 2.6, "marker": "o", "markersize": 7, "zorder": 4}
            elif kind == "baseline":
                line, marker = BASELINE_STYLES[index % len(BASELINE_STYLES)]
                shade = str(0.25 + 0.4 * index / max(1, len(names) - 1))
                style = {"color": shade, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.2}
            else:
                color = PUBLISHED_COLORS[index % len(PUBLISHED_COLORS)]
                style = {"color": color, "linewidth": 1.0, "alpha": 0.9, "linestyle": (0, (6, 2)), "zorder": 1.5}
                style |= {"marker": "x", "markersize": 3.5} if len(curve) < 20 else {}
            suffix = " (published)" if kind == "published" else ""
            axes.plot(bpp, value, label=name[1] + suffix, **style)
    axes.set_xlim(0.0, limit)
    low, high = min(shown_values), max(shown_values)
    space = 0.03 * (high - low) or 1.0
    axes.set_ylim(low - space, high + space)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(label)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5, frameon=False)
    return figure


def save_figure(figure: Figure, file: IO[bytes], kind: str) -> None:
    """Writes the figure to the file; equal figures give equal bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "hyperprior"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


# The sheet --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """[H, W, 3] uint8 pixels with a title and a caption. `kind`: such as image/jpeg, if a browser can decode `file`."""

    title: str
    lines: list[str]
    pixels: np.ndarray
    file: bytes = b""
    kind: str = ""


def draw_sheet(title: str, rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """A sheet of crops, enlarged without smoothing, with captions below.

    A row shows the same crop of pictures of one size. The first picture is the original and decides the crop.
    """
    side, line_height = CROP * ZOOM, 24
    caption = 8 + 3 * line_height
    columns = max(len(row) for row in rows)
    width = 2 * MARGIN + columns * side + (columns - 1) * GAP
    top = MARGIN + 54 + 2 * line_height
    sheet = Image.new("RGB", (width, top + len(rows) * (side + caption + GAP) + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, "black", load_font(26, bold=True))
    explained = (
        "The baselines' files have at most as many bytes as ours. Numbers are for the whole image.",
        f"The crops show the {CROP} x {CROP} pixels with the most detail, enlarged {ZOOM} times.",
    )
    for number, line in enumerate(explained):
        draw.text((MARGIN, MARGIN + 34 + number * line_height), line, "#555555", load_font(17))
    for index, row in enumerate(rows):
        y = top + index * (side + caption + GAP)
        crop = find_detail(row[0].pixels, CROP)
        for column, picture in enumerate(row):
            x = MARGIN + column * (side + GAP)
            patch = Image.fromarray(picture.pixels[crop])
            sheet.paste(patch.resize((patch.width * ZOOM, patch.height * ZOOM), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + side + 6), picture.title, "black", load_font(17, bold=True))
            for number, line in enumerate(picture.lines, 1):
                draw.text((x, y + side + 6 + number * line_height), line, "#333333", load_font(16))
    return sheet


def find_detail(pixels: np.ndarray, size: int) -> tuple[slice, slice]:
    """The rows and columns of the square in [H, W, 3], at most `size` a side, with the most luma contrast.

    Contrast is the sum of the standard deviations in blocks of 8 x 8.
    """
    height, width = min(size, pixels.shape[0]), min(size, pixels.shape[1])
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    if min(luma.shape) < 16:
        return slice(0, height), slice(0, width)
    rows, columns = luma.shape[0] // 8, luma.shape[1] // 8
    blocks = luma[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).std(axis=(1, 3))
    sums = np.pad(blocks.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = max(1, height // 8), max(1, width // 8)
    windows = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    row, column = np.unravel_index(int(np.argmax(windows)), windows.shape)
    top, left = min(8 * int(row), pixels.shape[0] - height), min(8 * int(column), pixels.shape[1] - width)
    return slice(top, top + height), slice(left, left + width)


def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib, so that captions look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
