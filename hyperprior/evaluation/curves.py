"""Rate-distortion curves: how models form curves, points as means over images, and BD values between curves."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import bjontegaard
import numpy as np

from hyperprior.codec.codec import Codec
from hyperprior.model import quality
from hyperprior.reference.baselines import Baseline
from hyperprior.reference.published import METRIC_TITLES, PublishedPoint

BD_MIN_POINTS = 4  # Bjøntegaard: "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001
RATES = {"psnr_db": "bpp", "ms_ssim_db": "ms_ssim_bpp"}  # the rate over the same images as each quality
BD_MIN_OVERLAP = 0.25  # share of the shorter curve's range, in quality and in log rate


@dataclass(frozen=True)
class Model:
    """A codec, the name under which results show it, and its curve."""

    name: str
    codec: Codec
    curve: str
    effort: int = 0

    def facts(self) -> dict[str, Any]:
        loss, fingerprint = self.codec.config.loss, self.codec.fingerprint
        return {"lambda": loss.lmbda, "metric": loss.metric, "fingerprint": fingerprint, "effort": self.effort}

    def compress(self, pixels: np.ndarray) -> bytes:
        return self.codec.compress(pixels, self.effort)


def name_curves(codecs: dict[str, Codec], effort: int = 0) -> list[Model]:
    """Models of one metric form one curve. Where a lambda repeats, in the order of `codecs`, a new curve begins."""
    models = []
    for metric, title in METRIC_TITLES.items():
        curves: list[dict[float, str]] = []  # each: lambda → name
        for name, codec in codecs.items():
            loss = codec.config.loss
            if loss.metric == metric:
                if not curves or loss.lmbda in curves[-1]:
                    curves.append({})
                curves[-1][loss.lmbda] = name
        for curve in curves:
            names = list(curve.values())
            if len(curves) == 1:
                label = f"hyperprior, {title}"
            else:
                label = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
            models += [Model(name, codecs[name], label, effort) for name in names]
    order = list(codecs)
    return sorted(models, key=lambda model: order.index(model.name))


def average_rows(
    rows: Sequence[dict[str, Any]], models: Sequence[Model], baselines: Sequence[Baseline]
) -> list[dict[str, Any]]:
    """The points of the curves from the rows of images: means over the images, and medians of seconds."""
    facts: dict[tuple[str, str], dict[str, Any]] = {("model", model.name): model.facts() for model in models}
    facts.update({("baseline", baseline.label): baseline.settings() for baseline in baselines})
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["curve"], row["point"]].append(row)
    return [
        average_point(group, facts[kind, name if kind == "model" else curve])
        for (kind, curve, name), group in groups.items()
    ]


def average_point(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """One point from its rows, one for each image; `facts`: of the model or baseline.

    `ms_ssim_bpp` and a loss for MS-SSIM are means over the images that have an MS-SSIM, `ms_ssim_images` in number.
    """
    large = [row for row in rows if row.get("ms_ssim") is not None]

    def mean(column: str, rows: Sequence[dict[str, Any]] = rows) -> Optional[float]:
        values = [row[column] for row in rows if row.get(column) is not None]
        return statistics.fmean(values) if values else None

    ms_ssim, mse = mean("ms_ssim"), mean("mse") or 0.0
    point = {
        **{name: rows[0][name] for name in ("kind", "curve", "point")},
        "images": len(rows),
        "bpp": mean("bpp"),
        "psnr_db": mean("psnr_db"),
        "psnr_db_of_mean_mse": quality.psnr_db(mse),
        "ms_ssim_images": len(large),
        "ms_ssim_bpp": mean("bpp", large),
        "ms_ssim": ms_ssim,
        "ms_ssim_db": None if ms_ssim is None else quality.ms_ssim_db(ms_ssim),
        "bytes": sum(row["bytes"] for row in rows),
        "encode_seconds": statistics.median(row["encode_seconds"] for row in rows),
        "decode_seconds": statistics.median(row["decode_seconds"] for row in rows),
        **facts,
    }
    if point["kind"] == "model":
        point["estimated_bpp"] = statistics.fmean(r["estimated_bits"] / r["width"] / r["height"] for r in rows)
        if point["metric"] == "mse":
            point["loss"] = float(quality.lagrangian(point["bpp"], mse, point["lambda"], "mse"))
        elif ms_ssim is not None:
            point["loss"] = quality.lagrangian(point["ms_ssim_bpp"], 1.0 - ms_ssim, point["lambda"], "ms-ssim")
    return point


def convert_published(points: Sequence[PublishedPoint]) -> list[dict[str, Any]]:
    """Published points in the form that `average_rows` returns."""
    return [
        {
            "kind": "published",
            "curve": point.codec,
            "point": point.point,
            "bpp": point.bpp,
            "psnr_db": point.psnr_db,
            "ms_ssim_bpp": point.bpp,
            "ms_ssim": point.ms_ssim,
            "ms_ssim_db": None if point.ms_ssim is None else quality.ms_ssim_db(point.ms_ssim),
            "source": point.source,
        }
        for point in points
    ]


def compare_curves(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
            for metric, rate in RATES.items():
                pair = [[(p[rate], p[metric]) for p in c if p[metric] is not None] for c in (anchor, test)]
                try:
                    percent, decibels = compute_bd(*pair)
                    result[metric] = {"rate_percent": percent, "quality_db": decibels}
                except NotComparable as reason:
                    result[metric] = {"refused": str(reason)}
            results.append(result)
    return results


def compare_models(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how many percent each model's rate differs from every baseline's at the same quality.

    The baseline's log rate is interpolated linearly in its quality; None where its curve does not reach.
    """
    baselines = defaultdict(list)
    for point in points:
        if point["kind"] == "baseline":
            baselines[point["curve"]].append(point)
    results = []
    for model in (point for point in points if point["kind"] == "model"):
        for curve, its_points in baselines.items():
            result: dict[str, Any] = {"model": model["point"], "curve": model["curve"], "against": curve}
            for metric, rate in RATES.items():
                measured = sorted((p[metric], p[rate]) for p in its_points if p[metric] is not None)
                quality, result[metric] = model[metric], None
                if quality is not None and measured and measured[0][0] <= quality <= measured[-1][0]:
                    qualities, rates = np.array(measured).T
                    equal_rate = np.exp(np.interp(quality, qualities, np.log(rates)))
                    result[metric] = 100.0 * float(model[rate] / equal_rate - 1.0)
            results.append(result)
    return results


class NotComparable(Exception):
    """Two curves have no BD value; the message says why."""


def compute_bd(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(BD-rate in percent, BD-quality in dB) of `test` against `anchor`: points (bpp, quality in dB), in any order.

    The BD-rate is the average difference in log rate at equal quality, the BD-quality that in quality at equal log
    rate, both over the range that the curves share. `test` is better if the BD-rate is negative and the BD-quality
    positive. Curves are piecewise cubic (PCHIP), as in the common test conditions of JVET: unlike the single cubic of
    2001, PCHIP passes through any number of points, and unlike Akima's method it does not overshoot. Raises
    NotComparable.
    """
    curves = []
    for name, points in (("the anchor", anchor), ("the curve", test)):
        points = sorted(points)
        if len(points) < BD_MIN_POINTS:
            raise NotComparable(f"{name} has {len(points)} of the {BD_MIN_POINTS} points needed")
        for (bpp, db), (next_bpp, next_db) in zip(points, points[1:]):
            if not (0 < bpp < next_bpp and db < next_db):
                raise NotComparable(
                    f"{name} does not rise: {db:.2f} dB at {bpp:.3f} bpp, {next_db:.2f} dB at {next_bpp:.3f} bpp"
                )
        curves.append(np.array(points, np.float64))
    (rates, qualities), (test_rates, test_qualities) = curves[0].T, curves[1].T
    for a, b, unit in ((qualities, test_qualities, "dB"), (np.log10(rates), np.log10(test_rates), "decades of rate")):
        shared, shorter = min(a[-1], b[-1]) - max(a[0], b[0]), min(np.ptp(a), np.ptp(b))
        if shared < BD_MIN_OVERLAP * shorter:
            raise NotComparable(f"the curves share {max(shared, 0.0):.2f} of {shorter:.2f} {unit}")
    arguments = (rates, qualities, test_rates, test_qualities)
    settings = {"method": "pchip", "require_matching_points": False, "min_overlap": 0.0}
    return float(bjontegaard.bd_rate(*arguments, **settings)), float(bjontegaard.bd_psnr(*arguments, **settings))
