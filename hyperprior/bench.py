"""Where the time goes, as ratios to what this machine does in the same run: absolute times say little elsewhere.

Everything is repeated; a figure is the median of its repeats, with the smallest and the largest beside it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import yaml
from PIL import Image
from rich.table import Table

from hyperprior import checkpoint, codec, export, model, steps, stream, train, transforms
from hyperprior.config import Config
from hyperprior.distribute import World
from hyperprior.errors import HyperpriorError
from hyperprior.lanes import Cursor
from hyperprior.optimizer import Optimizer
from hyperprior.stop import StopRequest
from hyperprior.terminal import Terminal

PARTS = ("step", "input", "train", "start", "codec")
INPUT_SECONDS = 6.0  # of each repeat
COMPARED_IMAGES = 2000  # at most, for the formats that input is compared with
PHOTO = (512, 768)  # height and width of the image that the codec is timed on: Kodak's


class Timing(NamedTuple):
    median: float
    low: float
    high: float
    repeats: int


def spread(values: list[float]) -> Timing:
    return Timing(statistics.median(values), min(values), max(values), len(values))


def timed(call: Callable[[], Any], repeats: int, count: int = 1) -> Timing:
    """Seconds of one of the `count` things that `call()` does; once before it counts, for tracing and caches."""
    return in_turn({"": call}, repeats, count)[""]


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int, count: int = 1) -> dict[str, Timing]:
    """The same of several calls, measured in turn, so that a machine that drifts drifts for all of them."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - began) / count)
    return {name: spread(values) for name, values in taken.items()}


def bench(settings: Config, what: list[str], repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Runs the parts named in `what` (of PARTS) and returns what they found, as JSON can hold it."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "tensorflow": tf.__version__, "config": settings.to_dict()}
    world = World(settings.distribute, settings.train.batch_size)
    world.check_batch()
    found |= {"environment": world.environment()}
    for part in PARTS:
        if part in what:
            terminal.say(f"measuring {part}")
            found[part] = globals()[f"bench_{part}"](settings, world, repeats, terminal)
    return found


# The step ---------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer of a transform at its place: its input's shape, and what it computes."""

    name: str
    call: transforms.Layer
    shape: tuple[int, int, int]
    dtype: str
    flop: float  # forward, of one image
    passes: int  # forward, gradient by weights, and by the input unless that is the image


def layers(hyperprior: model.ScaleHyperprior, side: int) -> list[Layer]:
    """The layers that compute, with their work for one patch."""
    found = []
    latent, hyper = (shape for shape in hyperprior.latent_shapes(side, side))
    starts = {"g_a": (side, side, 3), "h_a": latent, "h_s": hyper, "g_s": latent}
    for transform, shape in starts.items():
        module = getattr(hyperprior, transform)
        for index, (layer, dtype) in enumerate(zip(module.layers, module.dtypes)):
            height, width, channels = shape
            if isinstance(layer, transforms.GDN):
                after, flop = shape, 2.0 * height * width * channels**2
            else:
                size, _, a, b = layer.kernel.shape
                scale, outputs = (layer.stride, a) if layer.transpose else (1 / layer.stride, b)
                after = (int(height * scale), int(width * scale), outputs)
                places = height * width if layer.transpose else after[0] * after[1]
                flop = 2.0 * size**2 * a * b * places
            passes = 2 if (transform, index) == ("g_a", 0) else 3
            found.append(Layer(f"{transform}/{index} {type(layer).__name__}", layer, shape, dtype, flop, passes))
            shape = after
    return found


def bench_step(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """A training step on synthetic patches, beside the time that its arithmetic would take at the machine's rate."""
    side, batch = settings.data.patch_size, world.batch_size
    with world.strategy.scope():
        dtype = settings.train.precision.replace("mixed_", "")
        hyperprior = model.ScaleHyperprior(settings.model, dtype)
        optimizer = Optimizer(hyperprior.named_variables(), settings.train, 1_000_000)
    stop = tf.Variable(0.0, trainable=False)
    train_steps = steps.make_train_steps(world, hyperprior, optimizer, stop, settings)
    rng = np.random.default_rng(0)

    def run(count: int) -> Callable[[], Any]:
        shape = (count, world.replica_batch, side, side, 3)
        patches = world.place([rng.integers(0, 256, shape, np.uint8) for _ in range(world.local_replicas)])
        nothing = world.place_once(np.zeros((count, len(steps.INPUT)), np.float32))
        return lambda: int(train_steps(patches, nothing, tf.constant(0, tf.int64), tf.constant(0)).done)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = max(1, min(20, int(2.0 / timed(run(1), 1).median)))
    step = timed(run(count), repeats, count)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    every = layers(hyperprior, side)
    work = sum(batch * layer.flop * layer.passes for layer in every)
    main = max(every, key=lambda layer: layer.flop)
    matrix = tf.random.normal((2048, 2048))
    multiply = tf.function(lambda: tf.linalg.matmul(matrix, matrix))
    product_rate = 2 * 2048**3 / timed(multiply, 2 * repeats).median
    rows, forward_rate = [], 0.0
    for layer in every:
        x = tf.cast(tf.random.normal((world.replica_batch, *layer.shape)), layer.dtype)

        @tf.function(autograph=False)
        def both(x: tf.Tensor = x, layer: Layer = layer) -> Any:
            weights = [v for _, v in transforms.named_variables(layer.call)]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer.call(x)
            return tape.gradient(y, weights + ([x] if layer.passes == 3 else []), output_gradients=y)

        taken = timed(both, repeats)
        flop = world.replica_batch * layer.flop * layer.passes
        rows.append({"layer": layer.name, "gflop": flop / 1e9, "seconds": taken.median, "rate": flop / taken.median})
        if layer is main:
            forward = timed(tf.function(lambda x=x, layer=layer: layer.call(x)), 2 * repeats)
            forward_rate = world.replica_batch * layer.flop / forward.median
    parts = {kind: sum(r["seconds"] for r in rows if kind in r["layer"]) for kind in ("Conv", "GDN")}
    parts["entropy model"] = entropy_seconds(hyperprior, world, side, repeats)
    if world.replicas == 1:  # it updates one replica's own copies
        parts["optimizer"] = optimizer_seconds(optimizer, repeats)
    local_work = work / world.replicas
    ideal = local_work / forward_rate
    table = Table("layer", "GFLOP", "ms", "GFLOP/s", title="each layer alone, forward and backward")
    for r in rows:
        table.add_row(r["layer"], f"{r['gflop']:.2f}", f"{1e3 * r['seconds']:.1f}", f"{r['rate'] / 1e9:.0f}")
    terminal.console.print(table)
    say = terminal.say
    say(
        f"step      {describe(step)}: {world.batch_size / step.median:.1f} patches/s; {work / 1e9:.1f} GFLOP "
        f"({sum(batch * layer.flop for layer in every) / 1e9:.1f} forward)"
    )
    say(
        f"ideal     {ideal:.4f} s at the {forward_rate / 1e9:.0f} GFLOP/s of {main.name}, forward (a 2048² matrix "
        f"product: {product_rate / 1e9:.0f}); step / ideal = {step.median / ideal:.2f}"
    )
    shares = ", ".join(f"{name} {seconds / step.median:.0%}" for name, seconds in parts.items())
    say(f"alone     {shares}; all parts {sum(parts.values()) / step.median:.0%} of the step")
    say(f"memory    {memory / 1024:.0f} MiB at most, {(memory - before) / 1024:.0f} of them by training")
    return {
        "step": step._asdict(),
        "gflop": work / 1e9,
        "gflop_per_s": {"dominant convolution": forward_rate / 1e9, "matrix product": product_rate / 1e9},
        "ideal": ideal,
        "step_over_ideal": step.median / ideal,
        "parts": parts,
        "layers": rows,
        "peak_mib": memory / 1024,
        "peak_mib_by_training": (memory - before) / 1024,
    }


def entropy_seconds(hyperprior: model.ScaleHyperprior, world: World, side: int, repeats: int) -> float:
    """Noise and bits of y and z, forward and backward."""
    shapes = hyperprior.latent_shapes(side, side)
    latents = [tf.random.normal((world.replica_batch, *shape)) for shape in shapes]
    log_scales = tf.random.normal(latents[0].shape)
    places = tf.range(world.replica_batch, dtype=tf.int64)

    @tf.function(autograph=False)
    def both() -> Any:
        y, z = (v + model.uniform_noise(s, 1, tf.constant(0, tf.int64), places) for v, s in zip(latents, shapes))
        with tf.GradientTape() as tape:
            tape.watch([y, z, log_scales])
            total = tf.reduce_sum(model.gaussian_bits(y, hyperprior.scales(log_scales)))
            total += tf.reduce_sum(model.bits(hyperprior.prior, z))
        return tape.gradient(total, [y, z, log_scales])

    return timed(both, repeats).median


def optimizer_seconds(optimizer: Optimizer, repeats: int) -> float:
    """The norm of the gradients, clipping, and Adam."""
    gradients = [tf.random.normal(v.shape) * 1e-6 for v in optimizer.variables_by_name.values()]

    @tf.function(autograph=False)
    def apply() -> Any:
        factor = 1.0 / tf.maximum(tf.linalg.global_norm(gradients), 1.0)
        optimizer.apply([g * factor for g in gradients], tf.constant(True), tf.constant(False), tf.constant(0))
        return optimizer.updates.read_value()

    return timed(apply, repeats).median


# The input --------------------------------------------------------------------------------------------------


def bench_input(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Patches per second of the input alone, beside other ways to the same patches."""
    source = stream.open_splits(settings.data, world.batch_size, count=False).train
    lanes = world.lanes(world.batch_size)
    side = settings.data.patch_size

    def ours(patches_per_image: int) -> Iterator[int]:
        data = settings.data.model_copy(update={"patches_per_image": patches_per_image})
        batches = stream.batches(source, data, 0, lanes, world.batch_size, [Cursor()] * world.batch_size)
        with contextlib.closing(batches):
            for batch in batches:
                yield len(batch.images)

    samples: list[Any] = []
    for shard in source.shards:
        samples += itertools.islice(shard.samples(), COMPARED_IMAGES - len(samples))
    with tempfile.TemporaryDirectory() as folder:
        flat, records = Path(folder, "flat.tar"), Path(folder, "flat.tfrecord")
        read_bytes = write_compared(samples, flat, records)
        ways = {
            "ours": lambda: ours(1),
            "ours, 4 patches an image": lambda: ours(4),
            "webdataset and Pillow": lambda: webdataset_patches(flat, side),
            "TFRecord, fused crop": lambda: tfrecord_patches(records, side),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        per_core: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):  # in turn, so that what drifts drifts for all
            for name, way in ways.items():
                rate, core_rate = patches_per_second(way())
                rates[name].append(rate)
                per_core[name].append(core_rate)
        readers = {"ours": lambda: [sample.read() for sample in samples], "tarfile": lambda: read_with_tarfile(flat)}
        raw = in_turn(readers, repeats)
    table = Table("", "patches/s", "per CPU-second", "ours / it", "per CPU-second")
    for name in ways:
        ratios = [statistics.median(a / b for a, b in zip(v["ours"], v[name])) for v in (rates, per_core)]
        figures = (describe(spread(rates[name]), "{:.0f}"), describe(spread(per_core[name]), "{:.0f}"))
        table.add_row(name, *figures, *(f"{ratio:.2f}" for ratio in ratios))
    terminal.console.print(table)
    raw_rates = {name: read_bytes / timing.median / 1e6 for name, timing in raw.items()}
    terminal.say(
        f"raw       {raw_rates['ours']:.0f} MB/s ({len(samples) / raw['ours'].median:.0f} samples/s) in one thread; "
        f"Python's tarfile {raw_rates['tarfile']:.0f} MB/s"
    )
    return {
        "patches_per_s": {name: spread(v)._asdict() for name, v in rates.items()},
        "patches_per_cpu_s": {name: spread(v)._asdict() for name, v in per_core.items()},
        "raw_mb_per_s": raw_rates,
    }


def patches_per_second(patches: Iterator[int]) -> tuple[float, float]:
    """(patches per second, per second of CPU) of an endless iterator of counts."""
    with contextlib.closing(patches):  # type: ignore[type-var]
        for _ in range(4):  # threads and buffers
            next(patches)
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < INPUT_SECONDS:
            count += next(patches)
        return count / (time.perf_counter() - began), count / (time.process_time() - cpu)


def write_compared(samples: list[Any], flat: Path, records: Path) -> int:
    """The samples that are JPEGs as a flat tar and as TFRecords; the bytes of all samples."""
    total = 0
    with tarfile.open(flat, "w") as tar, tf.io.TFRecordWriter(str(records)) as writer:
        for number, sample in enumerate(samples):
            data = sample.read()
            total += len(data)
            if data[:2] == b"\xff\xd8":
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                writer.write(data)
    return total


def webdataset_patches(flat: Path, side: int) -> Iterator[int]:
    """One process: webdataset's tar reader, a full decode by Pillow, a random crop."""
    import webdataset

    rng = np.random.default_rng(0)
    while True:
        for sample in webdataset.WebDataset(str(flat), shardshuffle=False, empty_check=False):
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            if min(image.size) >= side:
                x, y = (int(rng.integers(0, size - side + 1)) for size in image.size)
                np.asarray(image)[y : y + side, x : x + side].copy()
                yield 1


def tfrecord_patches(records: Path, side: int) -> Iterator[int]:
    """tf.data over all cores: TFRecords, decode and crop in one operation."""

    def crop(data: tf.Tensor) -> tf.Tensor:
        height, width = tf.unstack(tf.image.extract_jpeg_shape(data)[:2])
        y = tf.random.uniform((), 0, height - side + 1, tf.int32)
        x = tf.random.uniform((), 0, width - side + 1, tf.int32)
        return tf.io.decode_and_crop_jpeg(data, tf.stack([y, x, side, side]), channels=3)

    found = tf.data.TFRecordDataset(str(records)).repeat()
    found = found.filter(lambda data: tf.reduce_min(tf.image.extract_jpeg_shape(data)[:2]) >= side)
    found = found.map(crop, num_parallel_calls=tf.data.AUTOTUNE).batch(8).prefetch(tf.data.AUTOTUNE)
    for batch in found:
        yield len(batch)


def read_with_tarfile(flat: Path) -> None:
    with tarfile.open(flat, "r:") as tar:
        for member in tar:
            tar.extractfile(member).read()  # type: ignore[union-attr]


# The loop ---------------------------------------------------------------------------------------------------


def bench_train(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """The real loop on real data, over the same step without input, summaries and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.Trainer(settings, Path(folder), Terminal(quiet=True), world, StopRequest())
        chunks = stream.Prefetch(trainer.chunks())
        chunk = chunks.next()
        chunks.close()
        count = len(chunk.batches)

        def synthetic() -> int:
            step = tf.constant(0, tf.int64)
            patches, inputs = world.place(chunk.images), world.place_once(chunk.inputs)
            return int(trainer.train_steps(patches, inputs, step, tf.constant(0)).done)

        step = timed(synthetic, repeats, count)
        every = max(count, trainer.intervals["scalars"])
        trainer.total = every * (repeats + 2)
        trainer.settings.train.__dict__["early_stopping_patience"] = None
        with trainer.summaries() as trainer.report, Terminal(quiet=True).track("", trainer.total) as track:
            trainer.loop(track)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        after = timed(synthetic, repeats, count)
    logged = [row for row in rows if row["kind"] == "train"][1:]
    loop = spread([world.batch_size / row["images_per_s"] for row in logged])
    waited, reduced = (statistics.median(row.get(name, 0.0) for row in logged) for name in ("input_wait", "all_reduce"))
    ratio = loop.median / statistics.median([step.median, after.median])
    terminal.say(f"step      {describe(step)} on a batch in memory; {describe(after)} after the loop")
    terminal.say(
        f"loop      {describe(loop)} on real data, with summaries and checkpoints; loop / step = {ratio:.3f}; "
        f"{waited:.1%} of the time waits for input, {reduced:.1%} for the sum over replicas"
    )
    shares = {"input_wait": waited, "all_reduce": reduced}
    return {"step": step._asdict(), "loop": loop._asdict(), "loop_over_step": ratio, **shares}


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
        if process.returncode > 0:  # not what stopped it just now
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
    start, tensorflow = spread(first), spread(imports)
    terminal.say(f"start     {describe(start, '{:.1f} s')} to the end of the first step and its checkpoint")
    terminal.say(f"          {describe(tensorflow, '{:.1f} s')} of it is the import of TensorFlow")
    return {"first_step": start._asdict(), "import_tensorflow": tensorflow._asdict()}


# The codec --------------------------------------------------------------------------------------------------


def bench_codec(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """Compression of one image by a model of random weights, and where its time goes."""
    hyperprior = model.ScaleHyperprior(settings.model)
    arrays = {name: v.numpy() for name, v in hyperprior.named_variables().items()}
    made = codec.Codec(export.constants(hyperprior, checkpoint.Trained(arrays, settings, 0)), settings, {}, "bench")
    small = np.random.default_rng(0).integers(0, 256, (PHOTO[0] // 8, PHOTO[1] // 8, 3), np.uint8)
    image = np.asarray(Image.fromarray(small).resize(PHOTO[::-1], Image.Resampling.BICUBIC))
    data = made.compress(image)
    y, z = made._latents([image])
    decoded, _ = made._decode([made.read(data)])
    calls = {
        "compress": lambda: made.compress(image),
        "  g_a and h_a": lambda: made._latents([image]),
        "  exact h_s and range coding": lambda: made._encode(y, z, [PHOTO]),
        "decompress": lambda: made.decompress(data),
        "  exact h_s and range decoding": lambda: made._decode([made.read(data)]),
        "  g_s": lambda: made._pixels(decoded, [PHOTO]),
    }
    found = in_turn(calls, 2 * repeats)
    pixels = PHOTO[0] * PHOTO[1] / 1e6
    for name, timing in found.items():
        terminal.say(f"{name:32} {describe(timing)}, {pixels / timing.median:.2f} megapixels/s")
    return {name.strip(): timing._asdict() for name, timing in found.items()}


def describe(timing: Timing, form: str = "{:.4f} s") -> str:
    return f"{form} ({form} to {form})".format(timing.median, timing.low, timing.high)
