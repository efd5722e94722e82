"""The training steps in the graph: n steps in one call.

Every number that the outer loop needs is summed over all replicas together with the gradients. So all workers read the
same numbers and make the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from hyperprior.config import Config
from hyperprior.data.stream import Counts
from hyperprior.draws import draw
from hyperprior.metric_table import TRAIN, measured_in
from hyperprior.model import priors
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.metrics import measure
from hyperprior.training.distribute import World
from hyperprior.training.optimizer import Optimizer

MEASURED = measured_in(TRAIN)
# The sums of a call over its steps that did not fail: "steps" is their number. In float16 some have no gradient norm,
# because of an overflow: "norms" is the number of those that have one.
SUMMED = (*MEASURED, "gradient_norm", "norms", "steps")


class Steps(NamedTuple):
    """The result of a call of n steps. A step that is not counted in `done` changed nothing.

    Numbers are floats: TensorFlow computes on int32 in the host's memory, and the host would wait for the devices.
    """

    done: tf.Tensor  # float32: steps taken; fewer than n after a stop or when training diverged
    stopped: tf.Tensor  # bool: a worker was asked to stop, in this call or before it
    failed: tf.Tensor  # float32: number of non-finite steps in a row, up to the last step
    metrics: tf.Tensor  # [len(SUMMED)]
    counts: tf.Tensor  # [len(Counts)]: sums over the steps done
    all_reduce: tf.Tensor  # seconds that this worker waited for sums over replicas


class StepResult(NamedTuple):
    """The result of one step. All but `waited` is the same on every replica."""

    stopped: tf.Tensor
    failed: tf.Tensor
    metrics: tf.Tensor
    counts: tf.Tensor
    waited: tf.Tensor


def build_model(
    world: World,
    settings: Config,
    total_steps: int,
    set_weights: Callable[[ScaleHyperprior], None] = lambda model: None,
) -> tuple[ScaleHyperprior, Optimizer]:
    """Builds the model, with weights from the seed and then `set_weights`, and its optimizer."""
    with world.strategy.scope():
        tf.random.set_seed(draw(settings.seed, "init") % 2**31)
        model = ScaleHyperprior(settings.model, settings.train.precision)
    set_weights(model)
    with world.strategy.scope():
        return model, Optimizer(model.named_variables(), settings.train, total_steps)


def make_train_steps(
    world: World, model: ScaleHyperprior, optimizer: Optimizer, stop: tf.Variable, settings: Config
) -> Callable[..., Steps]:
    """Makes f(images, counts, step, stopped, failed). All workers must call it with the same n.

    images, counts: per replica [n, b, P, P, 3] uint8 and [n, len(Counts)]; step: number of the first step, int64;
    stopped, failed: those of the call before it. A call after a stop, or after too many failed steps, changes nothing.

    Every step reads `stop`. On a CPU a stop ends the call. On a GPU no number that a device computes decides which
    operations run, because the host could not queue the next step before the last one has ended: there the steps after
    a stop run too, and change nothing.
    """
    replica_step = make_replica_step(world, model, optimizer, stop, settings)
    limit = settings.train.nonfinite_limit()

    def goes_on(stopped: tf.Tensor, failed: tf.Tensor) -> tf.Tensor:
        return ~stopped & (failed < limit)

    @tf.function(reduce_retracing=True, autograph=False)
    def train_steps(images: Any, counts: Any, step: tf.Tensor, stopped: tf.Tensor, failed: tf.Tensor) -> Steps:
        num_steps = tf.shape(world.first(images))[0]

        def should_continue(index: tf.Tensor, before: Steps) -> tf.Tensor:
            if world.device_kind == "GPU":
                return index < num_steps
            return (index < num_steps) & goes_on(before.stopped, before.failed)

        def take_step(index: tf.Tensor, before: Steps) -> tuple[tf.Tensor, Steps]:
            is_active = goes_on(before.stopped, before.failed)
            with tf.device("CPU:0"):  # the noise's seeds are computed from it, in the host's memory
                now = step + tf.cast(index, tf.int64)
            results = world.strategy.run(replica_step, (images, counts, index, now, is_active))
            result = StepResult(*(world.first(value) for value in results))
            failed = tf.where(result.failed, before.failed + 1.0, 0.0)
            failed = tf.where(is_active & ~result.stopped, failed, before.failed)
            is_done = is_active & ~result.stopped & (failed < limit)
            return index + 1, Steps(
                before.done + tf.cast(is_done, tf.float32),
                before.stopped | result.stopped,
                failed,
                tf.where(is_done & ~result.failed, before.metrics + result.metrics, before.metrics),
                tf.where(is_done, before.counts + result.counts, before.counts),
                before.all_reduce + result.waited,
            )

        zeros = tf.zeros(len(SUMMED)), tf.zeros(len(Counts._fields)), tf.constant(0.0, tf.float64)
        before = Steps(tf.constant(0.0), stopped, failed, *zeros)
        return tf.while_loop(should_continue, take_step, (tf.constant(0), before))[1]

    return train_steps


def make_replica_step(
    world: World, model: ScaleHyperprior, optimizer: Optimizer, stop: tf.Variable, settings: Config
) -> Callable[..., StepResult]:
    """Makes f(images, counts, index, step, is_active): a step on part `index` of a replica's input, inside the replica.

    If not `is_active`, the step changes nothing.
    """
    forward_backward = make_forward_backward(world, model, optimizer, settings)

    def replica_step(
        images: tf.Tensor, counts: tf.Tensor, index: tf.Tensor, step: tf.Tensor, is_active: tf.Tensor
    ) -> StepResult:
        context = tf.distribute.get_replica_context()
        with tf.device("CPU:0"):
            first = tf.cast(context.replica_id_in_sync_group, tf.int64) * world.replica_batch
            own_lanes = tf.range(first, first + world.replica_batch)
        scale = tf.identity(optimizer.loss_scale)
        gradient, metrics = forward_backward(optimizer.weights.read_value(), images[index], step, own_lanes, scale)
        # The stop is read as late as possible. Inlining a call drops control dependencies on the call itself, but not
        # those on its values.
        gradient, metrics = tf.identity(gradient), tf.identity(metrics)
        with tf.control_dependencies([gradient, metrics]):
            asked_to_stop = stop.read_value()
        own_numbers = tf.concat([metrics, asked_to_stop[None], tf.gather(counts, index)], axis=0)
        gradient, numbers, waited = sum_over_replicas(world, [gradient, own_numbers])
        numbers = tf.unstack(numbers)
        metrics, stops, counts = numbers[: len(MEASURED)], numbers[len(MEASURED)], numbers[len(MEASURED) + 1 :]
        stopped, loss = stops > 0.0, metrics[MEASURED.index("loss")]
        norm = tf.linalg.global_norm([gradient]) / scale
        is_finite = tf.math.is_finite(norm) & tf.math.is_finite(loss)
        factor = 1.0 / scale
        if settings.train.clip_norm:
            factor *= settings.train.clip_norm / tf.maximum(norm, settings.train.clip_norm)
        failed = ~is_finite
        if optimizer.loss_scaling:
            # In float16 an overflow means that the loss scale is too high. It is a failure only at a scale below 1.
            failed = ~tf.math.is_finite(loss) | (~is_finite & (scale < 1.0))
            norm = tf.where(is_finite, norm, 0.0)
        metrics = tf.stack([*metrics, norm, tf.cast(is_finite, tf.float32), 1.0])
        optimizer.apply(gradient * factor, is_finite, stopped | failed | ~is_active, step)
        return StepResult(stopped, failed, metrics, tf.stack(counts), waited)

    return replica_step


def sum_over_replicas(world: World, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """The sums of `tensors` over all replicas, then the seconds that they took, float64.

    On a GPU the seconds are 0: the host would read its clock before the devices have done the work.
    """
    no_seconds = tf.constant(0.0, tf.float64)
    if world.replicas == 1:
        return [*tensors, no_seconds]
    all_reduce = tf.distribute.get_replica_context().all_reduce
    if world.device_kind == "GPU":
        return [*all_reduce("SUM", tensors), no_seconds]
    with tf.control_dependencies(tensors):
        began = tf.timestamp()
    with tf.control_dependencies([began]):
        sums = all_reduce("SUM", [tf.identity(tensor) for tensor in tensors])
    with tf.control_dependencies(sums):
        return [*sums, tf.timestamp() - began]


def make_forward_backward(world: World, model: ScaleHyperprior, optimizer: Optimizer, settings: Config) -> Any:
    """Makes f(weights, images [b, P, P, 3] uint8, step, lanes [b], loss scale) → (gradient of this replica's part of
    the mean loss, its part of the means of MEASURED). Weights and gradient are vectors, as in the optimizer.

    It is traced here once for all replicas: it reads no variables, of which each replica has its own.
    """
    side, batch = settings.data.patch_size, world.batch_size
    shape_y, shape_z = model.latent_shapes(side, side)
    seed_y, seed_z = (draw(settings.seed, "noise", latent) >> 2 for latent in "yz")

    # No autograph: it reads source files at a function's first call, which may be hours after the start.
    @tf.function(jit_compile=settings.train.xla, autograph=False)
    def forward_backward(
        vector: tf.Tensor, images: tf.Tensor, step: tf.Tensor, own_lanes: tf.Tensor, scale: tf.Tensor
    ) -> Any:
        x = tf.cast(images, tf.float32) / 255.0
        noise_y = priors.uniform_noise(shape_y, seed_y, step, own_lanes)
        noise_z = priors.uniform_noise(shape_z, seed_z, step, own_lanes)
        weights = optimizer.split(vector)
        with model.computing_with(weights), tf.GradientTape() as tape:
            tape.watch(weights)
            out = model.train(x, noise_y, noise_z, settings.train.proxy)
            values = measure(x, out.x_hat, out.bits_y, out.bits_z, settings.loss)
            # Divided by the global batch size: the sum over replicas is then the mean over the global batch.
            objective = tf.reduce_sum(values["loss"]) * (scale / batch)
        gradient = optimizer.join(tape.gradient(objective, list(weights.values())))
        return gradient, tf.reduce_sum(tf.stack([values[name] for name in MEASURED]), axis=1) / batch

    images = tf.TensorSpec((world.replica_batch, side, side, 3), tf.uint8)
    step, lanes = tf.TensorSpec((), tf.int64), tf.TensorSpec((world.replica_batch,), tf.int64)
    vector, scale = tf.TensorSpec(optimizer.weights.shape), tf.TensorSpec(())
    return forward_backward.get_concrete_function(vector, images, step, lanes, scale)
