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
from PIL import Image, ImageDraw
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from hyperprior import checkpoint

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
        for split in ("train", "val"):
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

    def text(self, tag: str, text: str, step: int) -> None:
        self._guard(lambda: self._add("train", step, text_pb(tag, f"```\n{text}```")))

    def histogram(self, tag: str, step: int, values: np.ndarray, description: str) -> None:
        self._guard(lambda: self._add("val", step, histogram_pb(tag, values, description=description)))

    def picture(self, tag: str, step: int, picture: Image.Image) -> None:
        def write() -> None:
            png = io.BytesIO()
            picture.save(png, "PNG")
            strings = [str(side).encode() for side in picture.size] + [png.getvalue()]
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                string_val=strings,
                tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=3)]),
            )
            metadata = image_metadata.create_summary_metadata(tag, "original, reconstruction")
            value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
            self._add("val", step, summary_pb2.Summary(value=[value]))

        self._guard(write)

    def close(self) -> None:
        for writer in self.writers.values():
            self._guard(writer.close)


def side_by_side(original: np.ndarray, reconstruction: np.ndarray, caption: str, gap: int = 4) -> Image.Image:
    """Two [H, W, 3] uint8 images beside each other over a caption."""
    height, width = original.shape[:2]
    picture = Image.new("RGB", (2 * width + gap, height + 18), "white")
    picture.paste(Image.fromarray(original), (0, 0))
    picture.paste(Image.fromarray(reconstruction), (width + gap, 0))
    ImageDraw.Draw(picture).text((2, height + 3), caption, fill="black")
    return picture


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
