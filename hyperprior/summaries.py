"""What a run leaves to look at: TensorBoard events and metrics.jsonl, with the same numbers in both.

Training and validation write under `train/` and `val/` of the run directory with the same tags, so that
TensorBoard draws them on one chart.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from hyperprior import checkpoint
from hyperprior.config import Config, flat, render

# metric → (tag, what it is)
TAGS = {
    "loss": ("rd/loss", "bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim)"),
    "bpp": ("rd/bpp", "bits per pixel, y and z together"),
    "distortion": ("rd/distortion", "mse on [0, 1] images, or 1 − ms_ssim"),
    "bpp_y": ("rate/y", "bits per pixel of y"),
    "bpp_z": ("rate/z", "bits per pixel of z"),
    "psnr_db": ("quality/psnr_db", "dB, mean over images"),
    "ms_ssim": ("quality/ms_ssim", "in [0, 1], mean over images of at least 161 pixels a side"),
    "learning_rate": ("optim/learning_rate", ""),
    "gradient_norm": ("optim/gradient_norm", "global norm before clipping"),
    "images_per_s": ("speed/images_per_s", "training patches per second, all workers"),
    "input_wait": ("speed/input_wait", "share of the time that training waits for data"),
    "all_reduce": ("speed/all_reduce", "share of the time that this worker waits for the sum of gradients"),
    "nonfinite": ("optim/nonfinite", "steps skipped since the start because a gradient was not finite"),
    "lost_shards": ("data/lost_shards", "visits of shards since the start that ended early: they cannot be read"),
    "skipped": ("data/skipped", "samples passed over since the start: unusable or too small"),
}


# The charts that TensorBoard's custom scalars show side by side, train and val in each.
CHARTS = {
    "Is it learning?": ("rd/loss", "rd/bpp", "quality/psnr_db", "quality/ms_ssim"),
    "Is it fast?": ("speed/images_per_s", "speed/input_wait", "speed/all_reduce"),
    "Is the data fine?": ("data/skipped", "data/lost_shards", "optim/nonfinite"),
    "What is it doing?": ("rate/y", "rate/z", "optim/learning_rate", "optim/gradient_norm"),
}
# Keys of the config that tell the runs of a sweep or a search for a recipe apart.
HPARAMS = (
    *("loss.lambda", "loss.metric", "model.num_filters", "model.latent_channels", "seed"),
    *("train.batch_size", "train.learning_rate", "train.schedule", "train.initial", "train.proxy", "train.ema"),
)


class Summaries:
    """Written by the chief alone. A failing disk ends the summaries with a warning, never the training."""

    def __init__(self, run: Path, step: int, warn: Callable[[str], None], is_chief: bool = True):
        self.run, self.warn = run, warn
        self.writers: dict[str, EventFileWriter] = {}
        self.failed = not is_chief
        self.skipped: set[str] = set()  # samples that were named
        self.metrics = run / "metrics.jsonl"
        self._guard(self._rewind, step)

    def _rewind(self, step: int) -> None:
        """Takes back what an interrupted run wrote after the checkpoint that this one starts from."""
        if self.metrics.exists():
            kept = []
            for line in self.metrics.read_text().splitlines():
                try:
                    row = json.loads(line)
                    if row["step"] <= step:
                        kept.append(line + "\n")
                        if row["kind"] == "skipped":
                            self.skipped.add(row["sample"])
                except ValueError:
                    break  # a line that was cut off by a kill
            checkpoint.write_text(self.metrics, "".join(kept))
        for split in ("train", "val", ""):
            self.writers[split] = EventFileWriter(str(self.run / split))
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # TensorBoard drops earlier events from this step on.
            self.writers[split].add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def _guard(self, write: Callable[..., None], *args: Any) -> None:
        if self.failed:
            return
        try:
            write(*args)
        except Exception as error:  # the event writer hands over whatever its thread met
            self.failed = True
            self.warn(f"summaries cannot be written, training goes on without them: {error}")

    def _add(self, split: str, step: int, summary: Any) -> None:
        summary = summary_pb2.Summary.FromString(summary.SerializeToString())
        self.writers[split].add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, split: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one event for each of TAGS."""

        def write() -> None:
            for name, value in values.items():
                if name in TAGS:
                    self._add(split, step, scalar_pb(*TAGS[name][:1], value, TAGS[name][1]))
            self.record(split, step, **values)
            self.writers[split].flush()

        self._guard(write)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl."""

        def write() -> None:
            line = json.dumps({"kind": kind, "step": step, **values})
            with self.metrics.open("a") as file:
                file.write(line + "\n")

        self._guard(write)

    def introduce(self, settings: Config, step: int) -> None:
        """The config as text, the charts that stand side by side, and this run's row in the table of runs."""
        charts = [
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(title=tag, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))
                    for tag in tags
                ],
            )
            for title, tags in CHARTS.items()
        ]
        given = {name: value for name, value in flat(settings).items() if name in HPARAMS and value is not None}
        metrics = [hparams.Metric(tag, group="val") for tag in ("rd/loss", "rd/bpp", "quality/psnr_db")]

        def write() -> None:
            self._add("train", step, text_pb("config", f"```\n{render(settings)}```"))
            self._add("", step, custom_scalar.pb(layout_pb2.Layout(category=charts)))
            self._add("", step, hparams.hparams_config_pb([hparams.HParam(name) for name in given], metrics))
            self._add("", step, hparams.hparams_pb(given, trial_id=self.run.name))
            for writer in self.writers.values():
                writer.flush()

        self._guard(write)

    def text(self, split: str, tag: str, step: int, markdown: str) -> None:
        self._guard(lambda: self._add(split, step, text_pb(tag, markdown)))

    def scalar(self, split: str, tag: str, step: int, value: float, description: str) -> None:
        self._guard(lambda: self._add(split, step, scalar_pb(tag, value, description)))

    def histogram(self, tag: str, step: int, values: np.ndarray, description: str) -> None:
        self._guard(lambda: self._add("val", step, histogram_pb(tag, values, description=description)))

    def picture(self, tag: str, step: int, picture: Image.Image, description: str) -> None:
        def write() -> None:
            png = io.BytesIO()
            picture.save(png, "PNG")
            strings = [str(side).encode() for side in picture.size] + [png.getvalue()]
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                string_val=strings,
                tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=3)]),
            )
            metadata = image_metadata.create_summary_metadata(tag, description)
            value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
            self._add("val", step, summary_pb2.Summary(value=[value]))

        self._guard(write)

    def close(self) -> None:
        for writer in self.writers.values():
            self._guard(writer.close)


def describe(values: dict[str, float], keys: Optional[tuple[str, ...]] = None) -> str:
    """Metrics as people read them: `loss 1.234  bpp 0.456  PSNR 30.12 dB`."""
    formats = {
        "loss": "loss {:.4f}",
        "bpp": "bpp {:.4f}",
        "distortion": "distortion {:.6f}",
        "psnr_db": "PSNR {:.2f} dB",
        "ms_ssim": "MS-SSIM {:.4f}",
        "images_per_s": "{:.1f} images/s",
        "input_wait": "waiting {:.0%}",
    }
    return "  ".join(formats[k].format(values[k]) for k in keys or formats if k in values)
