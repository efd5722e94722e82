"""Measures the training step on synthetic patches, beside the time that its arithmetic takes at the machine's rate."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from rich.table import Table

from hyperprior.config import Config
from hyperprior.data.stream import Counts
from hyperprior.machine.timing import Timing, describe, time_call
from hyperprior.model import priors, transforms
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.work import LayerWork, work_of_layers
from hyperprior.terminal import Terminal
from hyperprior.training.distribute import World
from hyperprior.training.optimizer import Optimizer
from hyperprior.training.steps import build_model, make_train_steps

LONG_RUN = 1_000_000  # steps; a schedule needs a total


def bench_step(settings: Config, world: World, repeats: int, terminal: Terminal) -> dict[str, Any]:
    """The step, its layers and its other parts."""
    batch = world.batch_size
    model, optimizer = build_model(world, settings, LONG_RUN)
    before = measure_peak_mib()
    step, nodes = time_step(settings, world, model, optimizer, repeats)
    memory = measure_peak_mib()

    layers = work_of_layers(model, settings.data.patch_size)
    work = sum(batch * layer.flop * layer.passes for layer in layers)
    rows = [time_layer(layer, world, repeats) for layer in layers]
    main = max(layers, key=lambda layer: layer.flop)
    main_rate, product_rate = measure_forward_rate(main, world, repeats), measure_matrix_product_rate(repeats)
    parts = {kind: sum(row["seconds"] for row in rows if kind in row["layer"]) for kind in ("Conv", "GDN")}
    parts["entropy model"] = time_entropy_model(model, world, settings.data.patch_size, repeats)
    if world.replicas == 1:  # outside a replica, `apply` updates only one copy of the weights
        parts["optimizer"] = time_optimizer(optimizer, repeats)
    ideal = work / world.replicas / main_rate

    table = Table("layer", "GFLOP", "ms", "GFLOP/s", title="each layer alone, forward and backward")
    for row in rows:
        table.add_row(row["layer"], f"{row['gflop']:.2f}", f"{1e3 * row['seconds']:.1f}", f"{row['rate'] / 1e9:.0f}")
    terminal.console.print(table)
    shares = ", ".join(f"{name} {seconds / step.median:.0%}" for name, seconds in parts.items())
    for line in (
        f"step      {describe(step)}: {batch / step.median:.1f} patches/s; {work / 1e9:.1f} GFLOP "
        f"({sum(batch * layer.flop for layer in layers) / 1e9:.1f} forward)",
        f"ideal     {ideal:.4f} s at the {main_rate / 1e9:.0f} GFLOP/s of {main.name}, forward (a 2048² matrix "
        f"product: {product_rate / 1e9:.0f}); step / ideal = {step.median / ideal:.2f}",
        f"alone     {shares}; all parts {sum(parts.values()) / step.median:.0%} of the step",
        f"graph     {nodes} nodes in the graph of a call, with those of its functions",
        f"memory    {memory:.0f} MiB at most, {memory - before:.0f} of them by training",
    ):
        terminal.say(line)
    return {
        "step": step._asdict(),
        "nodes": nodes,
        "gflop": work / 1e9,
        "gflop_per_s": {"dominant convolution": main_rate / 1e9, "matrix product": product_rate / 1e9},
        "ideal": ideal,
        "step_over_ideal": step.median / ideal,
        "parts": parts,
        "layers": rows,
        "peak_mib": memory,
        "peak_mib_by_training": memory - before,
    }


def measure_peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def time_step(
    settings: Config, world: World, model: ScaleHyperprior, optimizer: Optimizer, repeats: int
) -> tuple[Timing, int]:
    """(seconds of a step, measured in calls of about two seconds; number of nodes in a call's graph)."""
    train_steps: Any = make_train_steps(world, model, optimizer, tf.Variable(0.0, trainable=False), settings)
    rng = np.random.default_rng(0)
    side = settings.data.patch_size

    def make_inputs(count: int) -> tuple:
        shape = (count, world.replica_batch, side, side, 3)
        patches = world.place([rng.integers(0, 256, shape, np.uint8) for _ in range(world.local_replicas)])
        no_counts = world.place_once(np.zeros((count, len(Counts._fields)), np.float32))
        return patches, no_counts, tf.constant(0, tf.int64), tf.constant(False), tf.constant(0.0)

    def make_call(inputs: tuple) -> Callable[[], Any]:
        return lambda: int(train_steps(*inputs).done)

    one = make_inputs(1)
    count = max(1, min(20, int(2.0 / time_call(make_call(one), 1).median)))
    graph = train_steps.get_concrete_function(*one).graph.as_graph_def()
    nodes = len(graph.node) + sum(len(function.node_def) for function in graph.library.function)
    return time_call(make_call(make_inputs(count)), repeats, count), nodes


def make_layer_input(layer: LayerWork, world: World) -> tf.Tensor:
    return tf.cast(tf.random.normal((world.replica_batch, *layer.shape)), layer.dtype)


def time_layer(layer: LayerWork, world: World, repeats: int) -> dict[str, Any]:
    """The time of a layer alone, forward and backward, for one replica's batch."""
    x = make_layer_input(layer, world)

    @tf.function(autograph=False)
    def forward_and_backward() -> Any:
        weights = [owner[key] for _, (owner, key) in transforms.places_of_variables(layer.call)]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer.call(x)
        return tape.gradient(y, weights + ([x] if layer.passes == 3 else []), output_gradients=y)

    seconds = time_call(forward_and_backward, repeats).median
    flop = world.replica_batch * layer.flop * layer.passes
    return {"layer": layer.name, "gflop": flop / 1e9, "seconds": seconds, "rate": flop / seconds}


def measure_forward_rate(layer: LayerWork, world: World, repeats: int) -> float:
    """Operations a second of the layer's forward pass."""
    x = make_layer_input(layer, world)
    seconds = time_call(tf.function(lambda: layer.call(x)), 2 * repeats).median
    return world.replica_batch * layer.flop / seconds


def measure_matrix_product_rate(repeats: int, size: int = 2048) -> float:
    """Operations a second of a square matrix product."""
    matrix = tf.random.normal((size, size))
    return 2 * size**3 / time_call(tf.function(lambda: tf.linalg.matmul(matrix, matrix)), 2 * repeats).median


def time_entropy_model(model: ScaleHyperprior, world: World, side: int, repeats: int) -> float:
    """Seconds for the noise and the bits of y and z, forward and backward."""
    shapes = model.latent_shapes(side, side)
    latents = [tf.random.normal((world.replica_batch, *shape)) for shape in shapes]
    log_scales = tf.random.normal(latents[0].shape)
    places = tf.range(world.replica_batch, dtype=tf.int64)

    @tf.function(autograph=False)
    def forward_and_backward() -> Any:
        y, z = (v + priors.uniform_noise(s, 1, tf.constant(0, tf.int64), places) for v, s in zip(latents, shapes))
        with tf.GradientTape() as tape:
            tape.watch([y, z, log_scales])
            total = tf.reduce_sum(model.bits_of_y(y, model.scales(log_scales)))
            total += tf.reduce_sum(model.prior.bits(z))
        return tape.gradient(total, [y, z, log_scales])

    return time_call(forward_and_backward, repeats).median


def time_optimizer(optimizer: Optimizer, repeats: int) -> float:
    """Seconds for the norm of the gradients, clipping, and Adam."""
    gradient = tf.random.normal(optimizer.weights.shape) * 1e-6

    @tf.function(autograph=False)
    def apply() -> Any:
        factor = 1.0 / tf.maximum(tf.linalg.global_norm([gradient]), 1.0)
        optimizer.apply(gradient * factor, tf.constant(True), tf.constant(False), tf.constant(0))
        return optimizer.updates.read_value()

    return time_call(apply, repeats).median
