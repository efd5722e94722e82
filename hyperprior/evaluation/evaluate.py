"""The evaluation job: models on real image files, beside baselines and published curves.

Sizes are those of whole files, and every picture is decoded from its file. A point of a curve is the mean over the
images of bpp, PSNR and MS-SSIM, as in the published curves. MS-SSIM in dB is computed from the mean MS-SSIM.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hyperprior import __version__
from hyperprior.codec import codec
from hyperprior.errors import ConfigError, DataError, GateError
from hyperprior.evaluation import curves, gate, pictures, plots, report
from hyperprior.evaluation.curves import Model
from hyperprior.evaluation.photos import Photo, find_photos
from hyperprior.model.quality import compare_images
from hyperprior.reference import baselines, published
from hyperprior.reference.baselines import Baseline
from hyperprior.storage import write_text, write_whole
from hyperprior.terminal import Terminal

FIGURES = ("rd_psnr.png", "rd_psnr.svg", "rd_ms_ssim.png", "rd_ms_ssim.svg")
RESULTS = ("summary.json", "images.csv", "summary.md", *FIGURES, "pictures.png", "report.html")


@dataclass(frozen=True)
class Options:
    """The options of the command line. `effort`: for `Codec.compress`; `margin`: in percent of the loss."""

    effort: int = 0
    baselines: str = "all"
    published: Optional[str] = None
    cache: Optional[Path] = None
    gate: Optional[Path] = None
    margin: float = 0.5
    engine: str = "auto"


def evaluate(paths: Sequence[Path], folder: Path, out: Path, options: Options, terminal: Terminal) -> dict[str, Any]:
    """Measures models and baselines, writes and prints the results, and returns the content of summary.json.

    Raises ConfigError and DataError before anything is measured, and GateError after everything is written and printed.
    """
    photos = find_photos(folder, terminal.warn, out)
    chosen_baselines = baselines.choose(options.baselines, terminal.warn)
    check_sizes(chosen_baselines, photos)
    published_curves = choose_published(options.published, photos)
    models = load_models(paths, options.effort, options.engine)
    stored = {}
    if options.gate:
        digests = {photo.name: photo.sha256 for photo in photos}
        stored = gate.read_stored(options.gate, out, digests, {model.name: model.facts() for model in models})
    cache = baselines.Cache(options.cache or baselines.default_cache())
    prepare_out(out)

    gallery = pictures.Gallery(photos)
    rows, files = measure_photos(photos, gallery.names, models, chosen_baselines, cache, terminal)
    points = curves.average_rows(rows, models, chosen_baselines) + published_curves
    judged_points = [point for point in points if point["kind"] == "model" and stored]
    verdicts = [gate.judge_point(point, stored[point["point"]], options.margin) for point in judged_points]
    summary: dict[str, Any] = {
        "format": gate.FORMAT,
        "hyperprior": __version__,
        "images": [{"name": p.name, "width": p.width, "height": p.height, "sha256": p.sha256} for p in photos],
        "points": points,
        "bd": curves.compare_curves(points),
        "models": curves.compare_models(points),
        "gate": verdicts,
    }
    effort = f"; effort {options.effort}" if options.effort else ""
    model_lines = [f"# {len(photos)} images, {photos[0].name} to {photos[-1].name}{effort}", ""]
    model_lines += [*report.make_points_table(points, "model"), *report.make_bd_table(summary["bd"])]
    model_lines += report.make_comparison_table(summary["models"])
    model_lines += [f"- Gate: {gate.describe_verdict(verdict)}." for verdict in verdicts]
    other_lines = [*report.make_points_table(points, "baseline"), *report.describe_method(points)]

    write_text(out / "summary.json", json.dumps(summary, indent=1))  # first, because `prepare_out` looks for it
    write_text(out / "images.csv", report.to_csv(rows))
    write_text(out / "summary.md", "\n".join([*model_lines, *other_lines]) + "\n")
    for name in FIGURES:
        (out / name).unlink(missing_ok=True)  # an earlier evaluation may have drawn one more
    for name, figure in plots.draw_rd_figures(points):
        for kind in ("png", "svg"):
            write_whole(out / f"{name}.{kind}", lambda file: plots.save_figure(figure, file, kind))  # noqa: B023
    sheet, report_pictures = gallery.show(models, chosen_baselines, points, files)
    write_whole(out / "pictures.png", lambda file: sheet.save(file, "PNG"))
    write_text(out / "report.html", report.render(summary, rows, report_pictures))

    terminal.say("\n".join(model_lines))
    terminal.say(f"results are in {out}; open {out / 'report.html'}")
    terminal.tell(summary)
    if worse := [verdict for verdict in verdicts if not verdict["passed"]]:
        raise GateError("; ".join(map(gate.describe_verdict, worse)))
    return summary


def prepare_out(out: Path) -> None:
    """Makes the folder. Raises ConfigError if it holds files that no evaluation wrote, and that would be replaced."""
    before = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = [name for name in RESULTS if (out / name).exists()]
        if "summary.json" in found:
            with contextlib.suppress(ValueError, RecursionError):
                before = json.loads((out / "summary.json").read_bytes())
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; choose another") from error
    if found and not (isinstance(before, dict) and "hyperprior" in before):
        raise ConfigError(f"--out {out} holds {found[0]} that no evaluation wrote; choose another")


# Choosing models and curves -------------------------------------------------------------------------------


def load_models(paths: Sequence[Path], effort: int = 0, engine: str = "auto") -> list[Model]:
    """The models under short, distinct names.

    Raises ConfigError if a model is given twice or cannot be used with this effort, and the errors of codec.load.
    """
    names = [path.resolve().parent.name if path.name == "model" else path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a model is given twice; name each once")
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
    codecs = {name: codec.load(path, engine) for name, path in zip(names, paths)}
    for loaded in codecs.values():
        loaded.check_effort(effort)
    return curves.name_curves(codecs, effort)


def check_sizes(chosen_baselines: Sequence[Baseline], photos: Sequence[Photo]) -> None:
    """Raises DataError if a photo has a side that is too long for a baseline: each encodes a strip of that length."""
    widest, tallest = max(photos, key=lambda photo: photo.width), max(photos, key=lambda photo: photo.height)
    for photo, height, width in ((widest, 1, widest.width), (tallest, tallest.height, 1)):
        for baseline in chosen_baselines:
            try:
                baseline.encode(np.zeros((height, width, 3), np.uint8), baseline.sweep[0])
            except DataError as error:
                raise DataError(f"{photo.name}, {photo.width}x{photo.height}: {error}") from error


def choose_published(choice: Optional[str], photos: Sequence[Photo]) -> list[dict[str, Any]]:
    """Points of published curves. Raises ConfigError.

    None means the curves that ship with the package. They are averages over the 24 Kodak images, so they are used only
    for exactly these images. A path is used for any images.
    """
    if choice == "none" or (choice is None and {photo.name for photo in photos} != published.KODAK):
        return []
    return curves.convert_published(published.read_points(None if choice is None else Path(choice)))


# Measuring ------------------------------------------------------------------------------------------------


def measure_photos(
    photos: Sequence[Photo],
    kept: set[str],
    models: Sequence[Model],
    chosen_baselines: Sequence[Baseline],
    cache: baselines.Cache,
    terminal: Terminal,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], bytes]]:
    """(rows, files).

    `rows`: a row of `report.COLUMNS` for each image and model, and for each image, baseline and quality; `files`: the
    models' files of the photos named in `kept`, by model and photo.
    """
    rows: list[dict[str, Any]] = []
    files: dict[tuple[str, str], bytes] = {}
    warm_up = photos[0].pixels()
    for model in models:  # the first call traces graphs, so it is not timed
        model.codec.decompress(model.compress(warm_up))
    with terminal.track("images", len(photos)) as track:
        for done, photo in enumerate(photos, 1):
            pixels = photo.pixels()
            ours = []
            for model in models:
                file, row = measure_model(model, photo, pixels)
                ours.append(row)
                if photo.name in kept:
                    files[model.name, photo.name] = file
            rows += ours
            for baseline in chosen_baselines:
                rows += [measure_baseline(baseline, value, photo, pixels, cache) for value in baseline.sweep]
            results = [f"{row['bpp']:.3f} bpp {row['psnr_db']:.2f} dB" for row in ours]
            track.update(done)
            track.line(f"{photo.name}  {', '.join(results)}")
    return rows, files


def measure_model(model: Model, photo: Photo, pixels: np.ndarray) -> tuple[bytes, dict[str, Any]]:
    """(file, row) of one image and one model."""
    file, result = round_trip(pixels, model.compress, model.codec.decompress)
    result["estimated_bits"] = model.codec.estimated_bits(file)
    return file, make_row("model", model.curve, model.name, photo, result)


def measure_baseline(
    baseline: Baseline, value: float, photo: Photo, pixels: np.ndarray, cache: baselines.Cache
) -> dict[str, Any]:
    """The row of one image and one setting of a baseline, from the cache or measured now."""

    def measure_now() -> dict[str, Any]:
        return round_trip(pixels, lambda x: baseline.encode(x, value), baselines.decode)[1]

    result = cache.get_or_measure(cache.make_key(baseline, value, photo.sha256), measure_now)
    return make_row("baseline", baseline.label, str(value), photo, result)


def make_row(kind: str, curve: str, point: str, photo: Photo, result: dict[str, Any]) -> dict[str, Any]:
    bpp = 8 * result["bytes"] / photo.width / photo.height
    place = {"kind": kind, "curve": curve, "point": point, "image": photo.name}
    return {**place, "width": photo.width, "height": photo.height, "bpp": bpp, **result}


def round_trip(
    pixels: np.ndarray, encode: Callable[[np.ndarray], bytes], decode: Callable[[bytes], np.ndarray]
) -> tuple[bytes, dict[str, Any]]:
    """(file; its size, seconds and distortion) of [H, W, 3] uint8 pixels. MS-SSIM is None if the image is too small."""
    started = time.perf_counter()
    data = encode(pixels)
    encoded = time.perf_counter()
    decoded = decode(data)
    seconds = {"encode_seconds": encoded - started, "decode_seconds": time.perf_counter() - encoded}
    return data, {"bytes": len(data), **seconds, **compare_images(pixels, decoded)}
