"""Measures the input alone: patches per second, beside other ways to read the same patches."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from rich.table import Table

from hyperprior.config import Config, Data
from hyperprior.data import splits, stream
from hyperprior.data.lanes import Cursor
from hyperprior.data.splits import Split
from hyperprior.machine.timing import describe, summarise, time_in_turn
from hyperprior.terminal import Terminal
from hyperprior.training.distribute import World

INPUT_SECONDS = 6.0  # of each repeat
COMPARED_IMAGES = 2000  # at most, for the comparison with other ways
CEILING_IMAGES, CEILING_SIDE, CEILING_LANES = 8192, 64, 64


def bench_input(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Patches per second and per second of CPU, and the speed of reading samples without decoding."""
    split = splits.open_splits(settings.data, world.batch_size, count=False).train
    lanes = world.lanes(world.batch_size)
    side = settings.data.patch_size
    four = settings.data.model_copy(update={"patches_per_image": 4})
    one = settings.data.model_copy(update={"patches_per_image": 1})

    samples: list[Any] = []
    for shard in split.shards:
        samples += itertools.islice(shard.samples(), COMPARED_IMAGES - len(samples))
    with tempfile.TemporaryDirectory() as folder:
        flat, records = Path(folder, "flat.tar"), Path(folder, "flat.tfrecord")
        num_bytes = write_comparison_files(samples, side, flat, records)
        ways = {
            "ours": lambda: read_patches(split, one, lanes, world.batch_size),
            "ours, 4 patches an image": lambda: read_patches(split, four, lanes, world.batch_size),
            "webdataset and Pillow": lambda: read_with_webdataset(flat, side),
            "TFRecord, fused crop": lambda: read_with_tf_data(records, side),
        }
        if not num_bytes["tarfile"]:
            terminal.say(f"input     no JPEG of {side}x{side} or more, so without a comparison")
            del ways["webdataset and Pillow"], ways["TFRecord, fused crop"]
        # In turn, so that a drift of the machine affects all ways.
        turns = [{name: measure_patch_rate(way()) for name, way in ways.items()} for _ in range(repeats)]
        rates, per_core = ({name: [turn[name][i] for turn in turns] for name in ways} for i in (0, 1))
        readers = {"ours": lambda: [sample.read() for sample in samples], "tarfile": lambda: read_with_tarfile(flat)}
        raw = time_in_turn(readers, repeats)
    table = Table("", "patches/s", "per CPU-second", "ours / other", "per CPU-second")
    for name in ways:
        ratios = [statistics.median(a / b for a, b in zip(v["ours"], v[name])) for v in (rates, per_core)]
        figures = (describe(summarise(rates[name]), "{:.0f}"), describe(summarise(per_core[name]), "{:.0f}"))
        table.add_row(name, *figures, *(f"{ratio:.2f}" for ratio in ratios))
    terminal.console.print(table)
    raw_rates = {name: num_bytes[name] / timing.median / 1e6 for name, timing in raw.items()}
    terminal.say(
        f"raw       {raw_rates['ours']:.0f} MB/s ({len(samples) / raw['ours'].median:.0f} samples/s) in one thread; "
        f"Python's tarfile {raw_rates['tarfile']:.0f} MB/s"
    )
    ceiling = measure_ceiling(settings, repeats)
    terminal.say(
        f"ceiling   {ceiling['patches_per_s']['median']:.0f} patches/s of one process, "
        f"{ceiling['cpu_ms_per_patch']['median']:.3f} ms of CPU each, on JPEGs of {CEILING_SIDE}x{CEILING_SIDE}"
    )
    return {
        "ceiling": ceiling,
        "patches_per_s": {name: summarise(v)._asdict() for name, v in rates.items()},
        "patches_per_cpu_s": {name: summarise(v)._asdict() for name, v in per_core.items()},
        "raw_mb_per_s": raw_rates,
    }


def read_patches(split: Split, data: Data, lanes: range, batch_size: int) -> Iterator[int]:
    """With this package: the number of patches of each batch, without end."""
    with contextlib.closing(stream.batches(split, data, 0, lanes, batch_size, [Cursor()] * batch_size)) as batches:
        for batch in batches:
            yield len(batch.images)


def measure_ceiling(settings: Config, repeats: int) -> dict[str, dict[str, float]]:
    """The speed of one process on JPEGs that take almost no time to decode: the limit of the input itself."""
    with tempfile.TemporaryDirectory() as folder:
        shards = [str(write_small_jpegs(Path(folder, f"{number}.tar"), number)) for number in range(8)]
        data = Data(
            train=shards,
            val_split=0,
            test_split=0,
            patch_size=CEILING_SIDE,
            decode_threads=settings.data.decode_threads,
        )
        split = splits.open_splits(data, CEILING_LANES, count=False).train
        lanes = range(CEILING_LANES)
        rates = [measure_patch_rate(read_patches(split, data, lanes, CEILING_LANES)) for _ in range(repeats)]
    return {
        "patches_per_s": summarise([rate for rate, _ in rates])._asdict(),
        "cpu_ms_per_patch": summarise([1000 / core_rate for _, core_rate in rates])._asdict(),
    }


def write_small_jpegs(path: Path, seed: int) -> Path:
    """Writes a tar of smooth random JPEGs of CEILING_SIDE, about 1.5 kB each."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(CEILING_IMAGES // 8):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            encoded = io.BytesIO()
            coarse.resize((CEILING_SIDE, CEILING_SIDE), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
            add_jpeg(tar, number, encoded.getvalue())
    return path


def add_jpeg(tar: tarfile.TarFile, number: int, data: bytes) -> None:
    info = tarfile.TarInfo(f"{number:06d}.jpg")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def measure_patch_rate(patches: Iterator[int]) -> tuple[float, float]:
    """(patches per second, per second of CPU) of an endless iterator of counts."""
    with contextlib.closing(patches):  # type: ignore[type-var]
        for _ in range(4):  # not measured, because threads start and buffers fill
            next(patches)
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < INPUT_SECONDS:
            count += next(patches)
        return count / (time.perf_counter() - began), count / (time.process_time() - cpu)


def write_comparison_files(samples: list[Any], side: int, flat: Path, records: Path) -> dict[str, int]:
    """Writes the samples that are JPEGs with sides of at least `side` as a flat tar and as TFRecords.

    Returns the number of bytes of all samples, `ours`, and of those written, `tarfile`.
    """
    num_bytes = {"ours": 0, "tarfile": 0}
    with tarfile.open(flat, "w") as tar, tf.io.TFRecordWriter(str(records)) as writer:
        for number, sample in enumerate(samples):
            data = sample.read()
            num_bytes["ours"] += len(data)
            with contextlib.suppress(OSError):  # no image
                image = Image.open(io.BytesIO(data))
                if image.format == "JPEG" and min(image.size) >= side:
                    add_jpeg(tar, number, data)
                    writer.write(data)
                    num_bytes["tarfile"] += len(data)
    return num_bytes


def read_with_webdataset(flat: Path, side: int) -> Iterator[int]:
    """In one process: webdataset's tar reader, a full decode by Pillow, a random crop."""
    import webdataset

    rng = np.random.default_rng(0)
    while True:
        for sample in webdataset.WebDataset(str(flat), shardshuffle=False, empty_check=False):
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            x, y = (int(rng.integers(0, size - side + 1)) for size in image.size)
            np.asarray(image)[y : y + side, x : x + side].copy()
            yield 1


def read_with_tf_data(records: Path, side: int) -> Iterator[int]:
    """With tf.data on all cores: TFRecords, decode and crop in one operation."""

    def crop(data: tf.Tensor) -> tf.Tensor:
        height, width = tf.unstack(tf.image.extract_jpeg_shape(data)[:2])
        y = tf.random.uniform((), 0, height - side + 1, tf.int32)
        x = tf.random.uniform((), 0, width - side + 1, tf.int32)
        return tf.io.decode_and_crop_jpeg(data, tf.stack([y, x, side, side]), channels=3)

    patches = (
        tf.data.TFRecordDataset(str(records))
        .repeat()
        .map(crop, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(8)
        .prefetch(tf.data.AUTOTUNE)
    )
    for batch in patches:
        yield len(batch)


def read_with_tarfile(flat: Path) -> None:
    with tarfile.open(flat, "r:") as tar:
        for member in tar:
            tar.extractfile(member).read()  # type: ignore[union-attr]
