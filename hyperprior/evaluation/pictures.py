"""Pictures for the sheet (pictures.png) and for the report: originals beside decoded pictures.

The baselines' files have at most as many bytes as the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hyperprior import metric_table
from hyperprior.evaluation import plots, report
from hyperprior.evaluation.curves import Model
from hyperprior.evaluation.photos import Photo
from hyperprior.evaluation.plots import Picture
from hyperprior.model.quality import compare_images
from hyperprior.reference import baselines
from hyperprior.reference.baselines import Baseline

SHEET_MODELS = 3  # at most, each of another curve
SHEET_PICTURES, SHEET_BPP = 4, 0.3  # the sheet shows the model nearest to a rate at which differences are visible
REPORT_PICTURES = 24
BESIDE = ("jpeg-opt", "avif")  # the baselines shown
Files = dict[tuple[str, str], bytes]  # by model and photo


class Gallery:
    """Chooses photos, a few for the sheet and more for the report, and makes their pictures."""

    def __init__(self, photos: Sequence[Photo]):
        self.in_sheet, self.in_report = choose_spaced(photos, SHEET_PICTURES), choose_spaced(photos, REPORT_PICTURES)
        self.photos = [photo for photo in photos if photo in self.in_sheet or photo in self.in_report]
        self.names = {photo.name for photo in self.photos}

    def show(
        self,
        models: Sequence[Model],
        chosen_baselines: Sequence[Baseline],
        points: Sequence[dict[str, Any]],
        files: Files,
    ) -> tuple[Image.Image, list[dict[str, Any]]]:
        """(the sheet, the report's pictures); `files`: from `evaluate.measure_photos`."""
        shown = choose_models(models, points)
        rows, report_pictures = [], []
        for photo in self.photos:
            pixels = photo.pixels()
            coded = code_photo(photo, pixels, shown, chosen_baselines, files)
            if photo in self.in_sheet:
                original = Picture("Original", [photo.name, f"{photo.width} x {photo.height}, 24 bpp"], pixels)
                rows.append([original, *coded])
            if photo in self.in_report:
                report_pictures.append(report.embed_picture(photo.name, pixels, coded))
        title = "; ".join(f"{model.name}: {model.curve}, lambda {model.facts()['lambda']:g}" for model in shown)
        return plots.draw_sheet(title, rows), report_pictures


def choose_models(models: Sequence[Model], points: Sequence[dict[str, Any]]) -> list[Model]:
    """The model of each curve whose rate is nearest to SHEET_BPP, in the order of the curves."""
    bpp = {point["point"]: point["bpp"] for point in points if point["kind"] == "model"}
    nearest = sorted(models, key=lambda model: abs(bpp[model.name] - SHEET_BPP))
    curves = dict.fromkeys(model.curve for model in models)
    return [next(model for model in nearest if model.curve == curve) for curve in curves][:SHEET_MODELS]


def code_photo(
    photo: Photo, pixels: np.ndarray, models: Sequence[Model], chosen_baselines: Sequence[Baseline], files: Files
) -> list[Picture]:
    """The photo coded by each model, and by each baseline in at most as many bytes as by the first model, if it can."""
    coded = []
    for model in models:
        file = files[model.name, photo.name]
        title = model.name if len(models) > 1 else "hyperprior"
        coded.append(make_picture(title, pixels, model.codec.decompress(file), file))
    for baseline in (each for each in chosen_baselines if each.name in BESIDE):
        if fitted := baselines.fit(baseline, pixels, len(coded[0].file)):
            file, quality = fitted
            title, kind = f"{baseline.label}, quality {quality}", f"image/{baseline.format.lower()}"
            coded.append(make_picture(title, pixels, baselines.decode(file), file, kind))
    return coded


def make_picture(title: str, original: np.ndarray, decoded: np.ndarray, file: bytes, kind: str = "") -> Picture:
    """A decoded picture, with its size and quality as caption."""
    height, width = original.shape[:2]
    result = compare_images(original, decoded)
    qualities = {name: result[name] for name in ("psnr_db", "ms_ssim") if result[name] is not None}
    size = f"{len(file):,} bytes · {8 * len(file) / width / height:.3f} bpp"
    return Picture(title, [size, metric_table.describe(qualities).replace("  ", " · ")], decoded, file, kind)


def choose_spaced(photos: Sequence[Photo], most: int) -> list[Photo]:
    """At most `most` photos, evenly spaced."""
    count = min(most, len(photos))
    return [photos[index * len(photos) // count] for index in range(count)]
