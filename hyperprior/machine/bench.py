"""Measures where the time goes, as ratios to the speed of this machine: absolute times say little on other machines."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import yaml
from PIL import Image

from hyperprior import stack
from hyperprior.codec.codec import Codec
from hyperprior.codec.making import make_arrays
from hyperprior.config import Config, without_secrets
from hyperprior.errors import HyperpriorError
from hyperprior.machine.bench_input import bench_input
from hyperprior.machine.bench_step import bench_step
from hyperprior.machine.timing import describe, summarise, time_call, time_in_turn
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import TrainedWeights
from hyperprior.terminal import Terminal
from hyperprior.training.distribute import World
from hyperprior.training.feed import Feed
from hyperprior.training.loop import Trainer, values_of
from hyperprior.training.stop import StopRequest

PHOTO = (512, 768)  # height and width of the image that the codec is timed on, as in Kodak


def bench(settings: Config, parts: list[str], repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Measures the named `parts` (keys of PARTS) and returns the figures in types that JSON has."""
    world = World(settings.distribute, settings.train.batch_size)
    world.check_batch()
    figures: dict[str, Any] = {
        "cores": stack.count_cores(),
        "tensorflow": tf.__version__,
        "config": without_secrets(settings).to_dict(),
        "environment": world.environment(),
    }
    for part, measure in PARTS.items():
        if part in parts:
            terminal.say(f"measuring {part}")
            figures[part] = measure(settings, world, repeats, terminal)
    return figures


def bench_train(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """The real loop on real data, relative to the same step without input, summaries and checkpoints."""
    patience = {"early_stopping_patience": None}
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=patience)})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, Path(folder), Terminal(quiet=True), world, StopRequest())
        feed = Feed(
            *(world, trainer.splits.train, settings, trainer.timetable),
            *(trainer.state.cursors, 0, trainer.stop, trainer.terminal),
        )
        chunk = feed.next_chunk()
        feed.close()
        if chunk.error:
            raise chunk.error
        count = len(chunk.batches)

        def train_on_kept_chunk() -> int:
            verdict = tf.constant(False), tf.constant(0.0)
            return int(trainer.train_steps(chunk.images, chunk.counts, tf.constant(0, tf.int64), *verdict).done)

        before = time_call(train_on_kept_chunk, repeats, count)
        trainer.timetable.total = max(count, trainer.timetable.every["scalars"]) * (repeats + 2)
        trainer.progress = trainer.make_progress()
        with Terminal(quiet=True).track("", trainer.timetable.total) as track:
            trainer.loop(track)
        trainer.progress.close()
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        after = time_call(train_on_kept_chunk, repeats, count)
    logged = [row for row in rows if row["kind"] == "train"][1:]
    loop = summarise([world.batch_size / row["images_per_s"] for row in logged])
    waited, reduced = (statistics.median(row.get(name, 0.0) for row in logged) for name in ("input_wait", "all_reduce"))
    ratio = loop.median / statistics.median([before.median, after.median])
    terminal.say(f"step      {describe(before)} on a batch in memory; {describe(after)} after the loop")
    terminal.say(
        f"loop      {describe(loop)} on real data, with summaries and checkpoints; loop / step = {ratio:.3f}; "
        f"{waited:.1%} of the time waits for input, {reduced:.1%} for the sum over replicas"
    )
    shares = {"input_wait": waited, "all_reduce": reduced}
    return {"step": before._asdict(), "loop": loop._asdict(), "loop_over_step": ratio, **shares}


def bench_start(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Seconds from the command to the end of the first training step, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}  # as in a shell

    def seconds(command: list[str], until: Path) -> float:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
            while process.poll() is None and not until.exists():
                time.sleep(0.01)
            taken = time.perf_counter() - began
            process.kill()
        if process.returncode > 0:  # it failed by itself; after kill() the code is negative
            raise HyperpriorError(f"`{' '.join(command)}` ended with exit code {process.returncode}")
        return taken

    imports, first = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        tree = settings.to_dict()
        tree["train"] |= {"steps_per_call": 1, "checkpoint_every": 1}
        config.write_text(yaml.safe_dump(tree))
        for i in range(repeats):
            run = Path(folder, str(i))
            imports.append(seconds([sys.executable, "-c", "import tensorflow"], run))
            command = [sys.executable, "-m", "hyperprior", "train", str(config), "--run", str(run)]
            first.append(seconds(command, run / "checkpoints" / "step-000000001.npz"))
    start, tensorflow = summarise(first), summarise(imports)
    terminal.say(f"start     {describe(start, '{:.1f} s')} to the end of the first step and its checkpoint")
    terminal.say(f"          {describe(tensorflow, '{:.1f} s')} of it is the import of TensorFlow")
    return {"first_step": start._asdict(), "import_tensorflow": tensorflow._asdict()}


def bench_codec(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Compression of one image by a model with random weights, and the time of each part."""
    model = ScaleHyperprior(settings.model)
    trained = TrainedWeights(values_of(model.named_variables()), settings, 0)
    codec = Codec(make_arrays(trained), settings, {}, "bench")
    small = np.random.default_rng(0).integers(0, 256, (PHOTO[0] // 8, PHOTO[1] // 8, 3), np.uint8)
    image = np.asarray(Image.fromarray(small).resize(PHOTO[::-1], Image.Resampling.BICUBIC))
    data = codec.compress(image)
    y, z = codec.latents_of([image])
    decoded = codec.decode([codec.read(data)])
    calls = {
        "compress": lambda: codec.compress(image),
        "  latents": lambda: codec.latents_of([image]),
        "  exact h_s and range coding": lambda: codec.encode(y, z, [PHOTO]),
        "decompress": lambda: codec.decompress(data),
        "  exact h_s and range decoding": lambda: codec.decode([codec.read(data)]),
        "  g_s": lambda: codec.pixels_of(decoded, [PHOTO]),
    }
    timings = time_in_turn(calls, 2 * repeats)
    pixels = PHOTO[0] * PHOTO[1] / 1e6
    for name, timing in timings.items():
        terminal.say(f"{name:32} {describe(timing)}, {pixels / timing.median:.2f} megapixels/s")
    return {name.strip(): timing._asdict() for name, timing in timings.items()}


PARTS = {"step": bench_step, "input": bench_input, "train": bench_train, "start": bench_start, "codec": bench_codec}
