"""Every number that a run or an evaluation reports: its name, its format in text, and its tag in TensorBoard.

A metric that the graph measures for each image (`measured`) needs a row here and a formula in `model/metrics.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional, Union

TRAIN, VAL = "train", "val"
BOTH = (TRAIN, VAL)


class Metric(NamedTuple):
    """The name and formats of a metric.

    `text`: format in a line of text. `digits`: decimal places in tables. `tag`: name in TensorBoard, which sorts by it;
    empty for a metric without a chart. `measured`: the splits in which the graph measures the metric for each image.
    """

    title: str
    text: str = ""
    digits: int = 4
    tag: str = ""
    meaning: str = ""
    measured: tuple[str, ...] = ()


METRICS = {
    # title, format in a line of text, decimal places in tables, tag, meaning, splits in which it is measured
    "loss": Metric(
        "loss", "loss {:.4f}", 4, "1_learning/loss", "bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim)", BOTH
    ),
    "bpp": Metric("bpp", "bpp {:.4f}", 4, "1_learning/bpp", "bits per pixel, y and z together"),
    "bpp_y": Metric("bpp of y", "", 4, "5_details/bpp_y", "bits per pixel of y", BOTH),
    "bpp_z": Metric("bpp of z", "", 4, "5_details/bpp_z", "bits per pixel of z", BOTH),
    "distortion": Metric(
        "distortion", "distortion {:.6f}", 6, "5_details/distortion", "mse on [0, 1] images, or 1 − ms_ssim", BOTH
    ),
    "psnr_db": Metric("PSNR, dB", "PSNR {:.2f} dB", 3, "1_learning/psnr_db", "dB, mean over images", BOTH),
    "ms_ssim": Metric(
        "MS-SSIM", "MS-SSIM {:.4f}", 5, "1_learning/ms_ssim", "mean over images of at least 161 pixels a side", (VAL,)
    ),
    "gradient_norm": Metric("gradient norm", "", 4, "5_details/gradient_norm", "global norm before clipping"),
    "learning_rate": Metric("learning rate", "", 4, "5_details/learning_rate"),
    "nonfinite": Metric(
        "skipped steps", "", 0, "3_data/nonfinite", "steps skipped since the start because a gradient was not finite"
    ),
    "images_per_s": Metric(
        "images/s", "{:.1f} images/s", 1, "2_speed/images_per_s", "training patches per second, all workers"
    ),
    "input_wait": Metric(
        "input wait",
        "waiting {:.0%}",
        4,
        "2_speed/input_wait",
        "share of the time in which the devices have nothing to do for lack of input",
    ),
    "all_reduce": Metric(
        "all-reduce", "", 4, "2_speed/all_reduce", "share of the time that this worker waits for the sum of gradients"
    ),
    "skipped": Metric(
        "skipped samples", "", 0, "3_data/skipped", "samples skipped since the start: unusable, or too small"
    ),
    "lost_shards": Metric(
        "lost shards", "", 0, "3_data/lost_shards", "shard visits since the start that ended early, at damage"
    ),
    "images": Metric("images", "", 0, "", "number of images measured"),
    "ms_ssim_images": Metric("images of MS-SSIM", "", 0, "", "number of images in the mean of ms_ssim"),
    "psnr_db_of_mean_mse": Metric("PSNR of mean MSE", digits=3),
    "ms_ssim_db": Metric("MS-SSIM, dB", digits=3, meaning="-10 · log10(1 − MS-SSIM)"),
    "encode_seconds": Metric("encode, s", digits=3),
    "decode_seconds": Metric("decode, s", digits=3),
    "estimated_bpp": Metric("estimated bpp"),
}

# The fields of a row of metrics.jsonl, by its kind, beside `step`.
ROW_FIELDS: dict[str, dict[str, type]] = {"ended": {"code": int, "reason": str}, "skipped": {"sample": str}}
RESULT = ("loss", "bpp", "psnr_db", "ms_ssim")  # the short summary of a finished run


def read_record(text: Union[str, bytes]) -> Optional[dict[str, Any]]:
    """The JSON object of results.json or of a line of metrics.jsonl. None if lambda or a metric is no number, or
    if the text is damaged."""
    try:
        record = json.loads(text)
        numbers = [record[name] for name in ("lambda", *METRICS) if name in record]
        is_whole = isinstance(record, dict) and all(type(value) in (int, float) for value in numbers)
        list(map(float, numbers if is_whole else ()))
    except (ValueError, TypeError, OverflowError, RecursionError):  # of huge integers, and of brackets in brackets
        return None
    return record if is_whole else None


def read_row(line: bytes) -> Optional[dict[str, Any]]:
    """The record of a line of metrics.jsonl. None for a line that no run wrote, or that is damaged."""
    row = read_record(line)
    if not row or not isinstance(row.get("kind"), str) or type(row.get("step")) is not int:
        return None
    fields = ROW_FIELDS.get(row["kind"], {})
    return row if all(isinstance(row.get(name), kind) for name, kind in fields.items()) else None


def measured_in(split: str) -> tuple[str, ...]:
    """The names of the metrics that the graph measures for each image of a split, in the order of the table."""
    return tuple(name for name, metric in METRICS.items() if split in metric.measured)


def describe(values: Mapping[str, Any], names: Iterable[str] = tuple(METRICS)) -> str:
    """Metrics as one line of text: `loss 1.234  bpp 0.456  PSNR 30.12 dB`."""
    return "  ".join(METRICS[name].text.format(values[name]) for name in names if name in values and METRICS[name].text)


def cell(name: str, value: Any) -> str:
    """A value as text for a table; empty for None."""
    return "" if value is None else f"{value:.{METRICS[name].digits}f}"
