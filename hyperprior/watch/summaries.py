"""The TensorBoard events and metrics.jsonl of a run, with the same numbers in both.

Training and validation write under `train/` and `val/` of the run directory with the same tags, so that
TensorBoard draws them on one chart.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

from hyperprior import storage
from hyperprior.config import Config, flatten, render
from hyperprior.metric_table import METRICS, read_row

# The charts of TensorBoard's custom scalars, by metrics. Each shows train and val.
CHARTS = {
    "Is it learning?": ("loss", "bpp", "psnr_db", "ms_ssim"),
    "Is it fast?": ("images_per_s", "input_wait", "all_reduce"),
    "Is the data fine?": ("skipped", "lost_shards", "nonfinite"),
    "What is it doing?": ("bpp_y", "bpp_z", "learning_rate", "gradient_norm"),
}
# Config keys in which the runs of a sweep or of a search for a recipe differ.
HPARAMS = (
    *("loss.lambda", "loss.metric", "model.num_filters", "model.latent_channels", "model.density", "seed"),
    *("train.batch_size", "train.learning_rate", "train.schedule", "train.initial", "train.proxy", "train.ema"),
)


class Summaries:
    """The summaries of a run. Only the chief writes them.

    No failure ends the training, or other kinds of summaries: each kind has one warning at its first failure.
    """

    def __init__(
        self, run: Path, step: int, warn: Callable[[str], None], is_chief: bool = True, is_validated: bool = True
    ):
        self.run, self.warn, self.is_chief = run, warn, is_chief
        self.writers: dict[str, EventFileWriter] = {}
        self.failed: set[str] = set()  # the kinds that had a warning
        self.skipped: set[str] = set()  # samples that were reported
        self.metrics = run / "metrics.jsonl"
        self.guard("metrics.jsonl", self._rewind, step, is_validated)
        for split in ("train", "val", ""):
            self.guard("scalars", self._open, split, step)

    def _rewind(self, step: int, is_validated: bool) -> None:
        """Removes from metrics.jsonl all that an interrupted run wrote after the checkpoint from which it resumes.

        `is_validated`: whether the checkpoint knows of a validation at its step. Otherwise that comes again.
        """
        if self.metrics.exists():
            lines, kept, damaged = self.metrics.read_bytes().splitlines(), [], 0
            for number, line in enumerate(lines, 1):
                row = read_row(line)
                if row is None:
                    damaged += number < len(lines)  # a kill may cut off the last one
                elif row["step"] < step or (row["step"] == step and (is_validated or row["kind"] != "val")):
                    kept.append(line + b"\n")
                    if row["kind"] == "skipped":
                        self.skipped.add(row["sample"])
            if damaged:
                self.warn(f"{self.metrics}: damaged lines that are left out from now on: {damaged}")
            storage.write_bytes(self.metrics, b"".join(kept))

    def _open(self, split: str, step: int) -> None:
        writer = EventFileWriter(str(self.run / split))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # From this step on, TensorBoard drops the events that were written earlier.
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))
        self.writers[split] = writer

    def guard(self, kind: str, write: Callable[..., None], *args: Any) -> None:
        """Calls `write(*args)` on the chief. If that fails, warns at the first failure of this kind."""
        if not self.is_chief:
            return
        try:
            write(*args)
        except Exception as error:  # the event writer raises any error of its thread
            if kind not in self.failed:
                self.failed.add(kind)
                self.warn(f"{kind}: not all can be written, training goes on: {' '.join(str(error).split())}")

    def _add_event(self, split: str, step: int, summary: Any) -> None:
        if split in self.writers:  # else a warning has said why not
            summary = summary_pb2.Summary.FromString(summary.SerializeToString())
            self.writers[split].add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_scalars(self, split: str, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl, and one event for each metric that has a tag."""

        def write() -> None:
            for name, value in values.items():
                if tag := METRICS[name].tag:
                    self._add_event(split, step, scalar_pb(tag, value, METRICS[name].meaning))
            if split in self.writers:
                self.writers[split].flush()

        self.guard("scalars", write)
        self.write_record(split, step, **values)

    def write_record(self, kind: str, step: int, **values: Any) -> None:
        """Writes one line of metrics.jsonl."""

        def write() -> None:
            line = json.dumps({"kind": kind, "step": step, **values})
            with self.metrics.open("a") as file:
                file.write(line + "\n")

        self.guard("metrics.jsonl", write)

    def describe_run(self, settings: Config, step: int) -> None:
        """Writes the config as text, the layout of the charts, and this run's row in the table of runs."""
        charts = [
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(
                        title=METRICS[name].title,
                        multiline=layout_pb2.MultilineChartContent(tag=[f"^{METRICS[name].tag}$"]),
                    )
                    for name in names
                ],
            )
            for title, names in CHARTS.items()
        ]
        values = {name: value for name, value in flatten(settings).items() if name in HPARAMS and value is not None}
        metrics = [hparams.Metric(METRICS[name].tag, group="val") for name in ("loss", "bpp", "psnr_db")]

        def write() -> None:
            self._add_event("train", step, text_pb("config", f"```\n{render(settings)}```"))
            self._add_event("", step, custom_scalar.pb(layout_pb2.Layout(category=charts)))
            self._add_event("", step, hparams.hparams_config_pb([hparams.HParam(name) for name in values], metrics))
            self._add_event("", step, hparams.hparams_pb(values, trial_id=self.run.name))
            for writer in self.writers.values():
                writer.flush()

        self.guard("the description of the run", write)

    def write_text(self, split: str, tag: str, step: int, markdown: str) -> None:
        self.guard("texts", lambda: self._add_event(split, step, text_pb(tag, markdown)))

    def write_scalar(self, split: str, tag: str, step: int, value: float, description: str) -> None:
        self.guard("scalars", lambda: self._add_event(split, step, scalar_pb(tag, value, description)))

    def write_histogram(self, tag: str, step: int, values: np.ndarray, description: str) -> None:
        def write() -> None:
            if not np.isfinite(values).all():
                raise ValueError(f"{tag} holds values that are not finite")
            self._add_event("val", step, histogram_pb(tag, values, description=description))

        self.guard("histograms", write)

    def write_picture(self, tag: str, step: int, picture: Image.Image, description: str) -> None:
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
            self._add_event("val", step, summary_pb2.Summary(value=[value]))

        self.guard("pictures", write)

    def close(self) -> None:
        for writer in self.writers.values():
            self.guard("scalars", writer.close)
