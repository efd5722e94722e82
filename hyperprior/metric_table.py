"""Every number that a run or an evaluation reports: its name, its format in text, and its tag in TensorBoard.

A metric that the graph measures for each image (`measured`) needs a row here and a formula in `model/metrics.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional, Union

TRAIN, VAL = "train", "val"


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
    "loss": Metric(
        "loss",
        text="loss {:.4f}",
        tag="1_learning/loss",
        meaning="bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim)",
        measured=(TRAIN, VAL),
    ),
    "bpp": Metric("bpp", text="bpp {:.4f}", tag="1_learning/bpp", meaning="bits per pixel, y and z together"),
    "bpp_y": Metric("bpp of y", tag="5_details/bpp_y", meaning="bits per pixel of y", measured=(TRAIN, VAL)),
    "bpp_z": Metric("bpp of z", tag="5_details/bpp_z", meaning="bits per pixel of z", measured=(TRAIN, VAL)),
    "distortion": Metric(
        "distortion",
        text="distortion {:.6f}",
        digits=6,
        tag="5_details/distortion",
        meaning="mse on [0, 1] images, or 1 − ms_ssim",
        measured=(TRAIN, VAL),
    ),
    "psnr_db": Metric(
        "PSNR, dB",
        text="PSNR {:.2f} dB",
        digits=3,
        tag="1_learning/psnr_db",
        meaning="dB, mean over images",
        measured=(TRAIN, VAL),
    ),
    "ms_ssim": Metric(
        "MS-SSIM",
        text="MS-SSIM {:.4f}",
        digits=5,
        tag="1_learning/ms_ssim",
        meaning="in [0, 1], mean over images of at least 161 pixels a side",
        measured=(VAL,),
    ),
    "gradient_norm": Metric("gradient norm", tag="5_details/gradient_norm", meaning="global norm before clipping"),
    "learning_rate": Metric("learning rate", tag="5_details/learning_rate"),
    "nonfinite": Metric(
        "skipped steps",
        digits=0,
        tag="3_data/nonfinite",
        meaning="steps skipped since the start because a gradient was not finite",
    ),
    "images_per_s": Metric(
        "images/s",
        text="{:.1f} images/s",
        digits=1,
        tag="2_speed/images_per_s",
        meaning="training patches per second, all workers",
    ),
    "input_wait": Metric(
        "input wait",
        text="waiting {:.0%}",
        tag="2_speed/input_wait",
        meaning="share of the time that training waits for data",
    ),
    "all_reduce": Metric(
        "all-reduce",
        tag="2_speed/all_reduce",
        meaning="share of the time that this worker waits for the sum of gradients",
    ),
    "skipped": Metric(
        "skipped samples",
        digits=0,
        tag="3_data/skipped",
        meaning="samples skipped since the start because they are unusable or too small",
    ),
    "lost_shards": Metric(
        "lost shards",
        digits=0,
        tag="3_data/lost_shards",
        meaning="shard visits since the start that ended early because the shard cannot be read",
    ),
    "images": Metric("images", digits=0, meaning="number of images measured"),
    "ms_ssim_images": Metric("images of MS-SSIM", digits=0, meaning="number of images in the mean of ms_ssim"),
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
