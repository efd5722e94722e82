"""The job: models on real images, from file to file, beside baselines and published curves.

Every byte is counted and every picture decoded from it. A point of a curve is the mean over the images of each
image's bpp, PSNR and MS-SSIM, as the published curves have it; an MS-SSIM in dB is that of the mean.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hyperprior import __version__, baselines, codec, gate, images, plots, rd, report, shards, tables
from hyperprior.checkpoint import write_text, write_whole
from hyperprior.errors import ConfigError, DataError, GateError
from hyperprior.files import IMAGE_SUFFIXES
from hyperprior.terminal import Terminal

KODAK = {f"kodim{number:02d}.png" for number in range(1, 25)}
METRICS = {"mse": "MSE", "ms-ssim": "MS-SSIM"}
SHEET_MODELS = 3  # of different curves, at most, beside each other in pictures
SHEET_PICTURES, SHEET_BPP = 4, 0.3  # the sheet shows the model nearest to a rate at which the differences show
REPORT_PICTURES = 24
SHEET_BASELINES = ("jpeg-opt", "avif")


@dataclass(frozen=True)
class Options:
    """`baselines` and `published` as on the command line; `effort` of `Codec.compress`; `margin` in percent of the
    loss."""

    effort: int = 0
    baselines: str = "all"
    published: Optional[str] = None
    cache: Optional[Path] = None
    gate: Optional[Path] = None
    margin: float = 0.5


@dataclass(frozen=True)
class Photo:
    path: Path
    name: str  # below the folder of images
    height: int
    width: int
    sha256: str  # of the size and the pixels

    def pixels(self) -> np.ndarray:
        """[H, W, 3] uint8, upright. Raises DataError."""
        try:
            return images.photograph(self.path.read_bytes())[0]
        except (images.Unusable, OSError) as error:
            raise DataError(f"{self.path} cannot be used: {error}") from error


@dataclass(frozen=True)
class Model:
    name: str
    codec: Any  # of codec.load
    curve: str
    effort: int = 0

    def facts(self) -> dict[str, Any]:
        loss, fingerprint = self.codec.config.loss, self.codec.fingerprint
        return {"lambda": loss.lmbda, "metric": loss.metric, "fingerprint": fingerprint, "effort": self.effort}

    def compress(self, pixels: np.ndarray) -> bytes:
        return self.codec.compress(pixels, self.effort)


def evaluate(paths: Sequence[Path], folder: Path, out: Path, options: Options, terminal: Terminal) -> dict[str, Any]:
    """Measures, compares and draws into `out`; says how the models did, and gives what summary.json holds.

    Raises ConfigError and DataError before anything is measured, and GateError after everything is written and said.
    """
    photos = find_photos(folder, terminal.warn, out)
    chosen = baselines.choose(options.baselines, terminal.warn)
    published = read_published(options.published, photos)
    models = load_models(paths, options.effort)
    stored = {}
    if options.gate:
        seen = {photo.name: photo.sha256 for photo in photos}
        stored = gate.read(options.gate, out, seen, {model.name: model.facts() for model in models})
    cache = baselines.Cache(options.cache or baselines.default_cache())

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; choose another") from error

    in_sheet, in_report = spaced(photos, SHEET_PICTURES), spaced(photos, REPORT_PICTURES)
    kept = {photo.name for photo in in_sheet + in_report}
    rows, files = measure(photos, kept, models, chosen, cache, terminal)
    points = average(rows, models, chosen) + published
    judged = [point for point in points if point["kind"] == "model" and stored]
    verdicts = [gate.judge(point, stored[point["point"]], options.margin) for point in judged]
    summary: dict[str, Any] = {
        "format": gate.FORMAT,
        "hyperprior": __version__,
        "images": [{"name": p.name, "width": p.width, "height": p.height, "sha256": p.sha256} for p in photos],
        "points": points,
        "bd": compare(points),
        "gate": verdicts,
    }
    write_text(out / "images.csv", tables.to_csv(rows))
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    effort = f"; effort {options.effort}" if options.effort else ""
    ours = [f"# {len(photos)} images, {photos[0].name} to {photos[-1].name}{effort}", ""]
    ours += [*tables.points_table(points, "model"), *tables.bd_table(summary["bd"])]
    ours += [f"- Gate: {gate.say(verdict)}." for verdict in verdicts]
    write_text(
        out / "summary.md", "\n".join([*ours, *tables.points_table(points, "baseline"), *tables.how(points)]) + "\n"
    )
    draw(points, out)
    nearest = sorted(models, key=lambda model: abs(rate_of(model, points) - SHEET_BPP))
    # Of each curve the model whose rate suits a sheet best, the first curve first.
    shown = [next(model for model in nearest if model.curve == c) for c in dict.fromkeys(m.curve for m in models)]
    shown = shown[:SHEET_MODELS]
    title = "; ".join(f"{model.name}: {model.curve}, lambda {model.facts()['lambda']:g}" for model in shown)
    sheet_rows, pictures = [], []
    for photo in (photo for photo in photos if photo.name in kept):
        row, picture = compared(photo, shown, chosen, files)
        if photo in in_sheet:
            sheet_rows.append(row)
        if photo in in_report:
            pictures.append(picture)
    sheet = plots.picture_sheet(title, sheet_rows)
    write_whole(out / "pictures.png", lambda file: sheet.save(file, "PNG"))
    write_text(out / "report.html", report.render(summary, rows, pictures))
    terminal.say("\n".join(ours))
    terminal.say(f"results are in {out}; open {out / 'report.html'}")
    terminal.tell(summary)
    if worse := [verdict for verdict in verdicts if not verdict["passed"]]:
        raise GateError("; ".join(map(gate.say, worse)))
    return summary


# What is compared -------------------------------------------------------------------------------------------


def find_photos(folder: Path, warn: Callable[[str], None], out: Optional[Path] = None) -> list[Photo]:
    """The images below `folder`, by name, each decoded once; `warn` hears of those that cannot be. Raises DataError.

    Those below `out` are results of an earlier evaluation.
    """
    try:
        list(folder.iterdir())  # which raises where rglob finds nothing
        paths = shards.files_below(folder, IMAGE_SUFFIXES)
    except OSError as error:
        raise DataError(f"--images {folder} cannot be read: {error.strerror}; give a directory of images") from error
    paths = [path for path in paths if out is None or out.resolve() not in path.resolve().parents]
    if not paths:
        raise DataError(f"--images {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    photos = []
    for path in paths:
        try:
            pixels = Photo(path, "", 0, 0, "").pixels()
        except DataError as error:
            warn(f"{error}; it is left out")
            continue
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(b"%dx%d " % (height, width) + pixels.tobytes()).hexdigest()
        photos.append(Photo(path, path.relative_to(folder).as_posix(), height, width, digest))
    if not photos:
        raise DataError(f"--images {folder} holds no image that can be used")
    return photos


def load_models(paths: Sequence[Path], effort: int = 0) -> list[Model]:
    """The models under short names that differ. Raises what codec.load does, and ConfigError for one given twice, or
    that knows no such effort."""
    names = [path.resolve().parent.name if path.name == "model" else path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a model is given twice; name each once")
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
    codecs = {name: codec.load(path) for name, path in zip(names, paths)}
    for loaded in codecs.values():
        loaded.check_effort(effort)
    return name_curves(codecs, effort)


def name_curves(codecs: dict[str, Any], effort: int = 0) -> list[Model]:
    """Models of one metric are one curve; where a lambda comes again in their order, another begins."""
    models = []
    for metric, title in METRICS.items():
        curves: list[dict[float, str]] = []  # each: lambda → name
        for name, loaded in codecs.items():
            loss = loaded.config.loss
            if loss.metric == metric:
                if not curves or loss.lmbda in curves[-1]:
                    curves.append({})
                curves[-1][loss.lmbda] = name
        for curve in curves:
            first, *_, last = [*curve.values()] * 2
            label = f"hyperprior, {title}" if len(curves) == 1 else f"{first} to {last}" if len(curve) > 1 else first
            models += [Model(name, codecs[name], label, effort) for name in curve.values()]
    order = list(codecs)
    return sorted(models, key=lambda model: order.index(model.name))


def read_published(choice: Optional[str], photos: Sequence[Photo]) -> list[dict[str, Any]]:
    """Points of published curves. Raises ConfigError.

    None stands for the curves that ship with the package, which are averages over the 24 Kodak images: they are
    used for these alone. A path is used as it is.
    """
    if choice == "none" or (choice is None and {photo.name for photo in photos} != KODAK):
        return []
    points: list[dict[str, Any]] = []
    try:
        source = importlib.resources.files("hyperprior") / "kodak_rd.csv" if choice is None else Path(choice)
        for row in csv.DictReader(io.StringIO(source.read_text("utf-8"))):
            metric = METRICS.get(row.get("optimized_for") or "")
            ms_ssim = float(row["ms_ssim"]) if row["ms_ssim"] else None
            points.append(
                {
                    "kind": "published",
                    "curve": row["codec"] + (f", {metric}" if metric else ""),
                    "point": row.get("lambda") or "",
                    "bpp": float(row["bpp"]),
                    "psnr_db": float(row["psnr_db"]) if row["psnr_db"] else None,
                    "ms_ssim": ms_ssim,
                    "ms_ssim_db": None if ms_ssim is None else rd.ms_ssim_db(ms_ssim),
                    "source": row.get("source") or "",
                }
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--published {choice} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"--published {choice}, point {len(points) + 1}: {error!r}; the columns are codec, optimized_for, lambda, "
            "bpp, psnr_db, ms_ssim and source"
        ) from error
    return points


# Measuring --------------------------------------------------------------------------------------------------


def measure(
    photos: Sequence[Photo],
    kept: set[str],
    models: Sequence[Model],
    chosen: Sequence[baselines.Baseline],
    cache: baselines.Cache,
    terminal: Terminal,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], bytes]]:
    """(a row of `tables.COLUMNS` for every image and model, and every image, baseline and quality; the models' files
    of the photos named in `kept`, by model and photo)."""
    rows, files = [], {}
    first = photos[0].pixels()
    for model in models:  # the first call traces graphs
        model.codec.decompress(model.compress(first))
    with terminal.track("images", len(photos)) as track:
        for done, photo in enumerate(photos, 1):
            pixels = photo.pixels()

            def add(kind: str, curve: str, point: object, row: dict[str, Any], photo: Photo = photo) -> None:
                size = {
                    "width": photo.width,
                    "height": photo.height,
                    "bpp": 8 * row["bytes"] / photo.width / photo.height,
                }
                rows.append({"kind": kind, "curve": curve, "point": str(point), "image": photo.name, **size, **row})

            for model in models:
                file, row = round_trip(pixels, model.compress, model.codec.decompress)
                add("model", model.curve, model.name, {**row, "estimated_bits": model.codec.estimated_bits(file)})
                if photo.name in kept:
                    files[model.name, photo.name] = file
            for baseline in chosen:
                for value in baseline.sweep:
                    row = cache.measured(
                        cache.key(baseline, value, photo.sha256),
                        lambda: round_trip(pixels, lambda x: baseline.encode(x, value), baselines.decode)[1],  # noqa: B023
                    )
                    add("baseline", baseline.label, value, row)
            ours = [f"{row['bpp']:.3f} bpp {row['psnr_db']:.2f} dB" for row in rows if row["kind"] == "model"]
            track.line(done, f"{photo.name}  {', '.join(ours[-len(models) :])}")
    return rows, files


def round_trip(
    pixels: np.ndarray, encode: Callable[[np.ndarray], bytes], decode: Callable[[bytes], np.ndarray]
) -> tuple[bytes, dict[str, Any]]:
    """(file, size, seconds and distortion) of [H, W, 3] uint8 pixels. MS-SSIM is None for images too small for it."""
    started = time.perf_counter()
    data = encode(pixels)
    encoded = time.perf_counter()
    decoded = decode(data)
    seconds = {"encode_seconds": encoded - started, "decode_seconds": time.perf_counter() - encoded}
    return data, {"bytes": len(data), **seconds, **rd.distortions(pixels, decoded)}


# Curves -----------------------------------------------------------------------------------------------------


def average(
    rows: Sequence[dict[str, Any]], models: Sequence[Model], chosen: Sequence[baselines.Baseline]
) -> list[dict[str, Any]]:
    """The points of the curves: means over the images, and medians of seconds."""
    facts: dict[tuple[str, str], dict[str, Any]] = {("model", model.name): model.facts() for model in models}
    facts.update({("baseline", baseline.label): baseline.settings() for baseline in chosen})
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["curve"], row["point"]].append(row)
    points = []
    for (kind, curve, name), group in groups.items():

        def mean(column: str, group: list[dict[str, Any]] = group) -> Optional[float]:
            values = [row[column] for row in group if row.get(column) is not None]
            return statistics.fmean(values) if values else None

        ms_ssim, mse = mean("ms_ssim"), mean("mse") or 0.0
        point = {
            "kind": kind,
            "curve": curve,
            "point": name,
            "bpp": mean("bpp"),
            "psnr_db": mean("psnr_db"),
            "psnr_db_of_mean_mse": float(rd.psnr_db(mse)),
            "ms_ssim": ms_ssim,
            "ms_ssim_db": None if ms_ssim is None else rd.ms_ssim_db(ms_ssim),
            "bytes": sum(row["bytes"] for row in group),
            "encode_seconds": statistics.median(row["encode_seconds"] for row in group),
            "decode_seconds": statistics.median(row["decode_seconds"] for row in group),
            **facts[kind, name if kind == "model" else curve],
        }
        if kind == "model":
            point["estimated_bpp"] = statistics.fmean(r["estimated_bits"] / r["width"] / r["height"] for r in group)
            distortion = mse if point["metric"] == "mse" else None if ms_ssim is None else 1.0 - ms_ssim
            if distortion is not None:
                point["loss"] = float(rd.lagrangian(point["bpp"], distortion, point["lambda"], point["metric"]))
        points.append(point)
    return points


def compare(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """BD values of each curve of models against every baseline and published curve, or why there are none."""
    curves = defaultdict(list)
    for point in points:
        curves[point["kind"], point["curve"]].append(point)
    results = []
    for (kind, curve), test in curves.items():
        for (other_kind, other), anchor in curves.items():
            if kind != "model" or other_kind == "model":
                continue
            result: dict[str, Any] = {"curve": curve, "against": other, "kind": other_kind}
            for quality in ("psnr_db", "ms_ssim_db"):
                pair = [[(p["bpp"], p[quality]) for p in c if p[quality] is not None] for c in (anchor, test)]
                try:
                    rate, decibels = rd.bd(*pair)
                    result[quality] = {"rate_percent": rate, "quality_db": decibels}
                except rd.NotComparable as reason:
                    result[quality] = {"refused": str(reason)}
            results.append(result)
    return results


# Results ----------------------------------------------------------------------------------------------------


def draw(points: Sequence[dict[str, Any]], out: Path) -> None:
    """rd_psnr and rd_ms_ssim, as PNG and SVG."""
    for name, quality, label in (("psnr", "psnr_db", "PSNR (RGB), dB"), ("ms_ssim", "ms_ssim_db", "MS-SSIM, dB")):
        if any(point["kind"] == "model" and point[quality] is not None for point in points):
            figure = plots.rd_figure(points, quality, label)
            for kind in ("png", "svg"):
                write_whole(out / f"rd_{name}.{kind}", lambda file: plots.save(figure, file, kind))  # noqa: B023


def rate_of(model: Model, points: Sequence[dict[str, Any]]) -> float:
    return next(point["bpp"] for point in points if point["kind"] == "model" and point["point"] == model.name)


def compared(
    photo: Photo, models: Sequence[Model], chosen: Sequence[baselines.Baseline], files: dict[tuple[str, str], bytes]
) -> tuple[list[plots.Picture], dict[str, Any]]:
    """(row of the sheet, picture of the report): the original, ours, and baselines of at most the first's bytes.

    `files`: of `measure`.
    """
    pixels = photo.pixels()
    row = [plots.Picture("Original", [photo.name, f"{photo.width} x {photo.height}, 24 bpp"], pixels)]
    ours = [files[model.name, photo.name] for model in models]
    titles = [model.name for model in models] if len(models) > 1 else ["hyperprior"]
    coded = [(t, f, model.codec.decompress(f), "") for t, f, model in zip(titles, ours, models)]
    for baseline in (b for b in chosen if b.name in SHEET_BASELINES):
        file, quality = baselines.fit(baseline, pixels, len(ours[0]))
        kind = f"image/{baseline.format.lower()}"
        coded.append((f"{baseline.label}, quality {quality}", file, baselines.decode(file), kind))
    versions = []
    for title, file, decoded, kind in coded:
        found = rd.distortions(pixels, decoded)
        bpp = 8 * len(file) / photo.width / photo.height
        quality_line = f"PSNR {found['psnr_db']:.2f} dB"
        if found["ms_ssim"] is not None:
            quality_line += f" · MS-SSIM {found['ms_ssim']:.4f}"
        lines = [f"{len(file):,} bytes · {bpp:.3f} bpp", quality_line]
        row.append(plots.Picture(title, lines, decoded))
        versions.append(report.Version(title, " · ".join(lines), decoded, file if kind else None, kind))
    return row, report.picture(photo.name, pixels, versions)


def spaced(photos: Sequence[Photo], most: int) -> list[Photo]:
    """At most so many photos, at even distances."""
    count = min(most, len(photos))
    return [photos[index * len(photos) // count] for index in range(count)]
