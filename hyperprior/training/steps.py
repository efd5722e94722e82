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
# The sums of a call over its steps with a finite gradient. "steps" is their number.
SUMMED = (*MEASURED, "gradient_norm", "steps")


class Steps(NamedTuple):
    """The result of a call of n steps. A step that is not counted in `done` changed nothing."""

    done: tf.Tensor  # int32: steps taken; fewer than n after a stop or when training diverged
    stopped: tf.Tensor  # bool: a worker was asked to stop
    failed: tf.Tensor  # int32: number of non-finite steps in a row, up to the last step
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
    """Makes f(images, counts, step, failed). All workers must call it with the same n.

    images, counts: per replica [n, b, P, P, 3] uint8 and [n, len(Counts)]; step: number of the first step, int64;
    failed: number of non-finite steps in a row before it. Every step reads `stop`, so a worker that is asked to stop
    does not wait for the end of the call.
    """
    replica_step = make_replica_step(world, model, optimizer, stop, settings)
    limit = settings.train.nonfinite_limit()

    @tf.function(reduce_retracing=True, autograph=False)
    def train_steps(images: Any, counts: Any, step: tf.Tensor, failed: tf.Tensor) -> Steps:
        num_steps = tf.shape(world.first(images))[0]

        def should_continue(*before: tf.Tensor) -> tf.Tensor:
            before = Steps(*before)
            return (before.done < num_steps) & ~before.stopped & (before.failed < limit)

        def take_step(*before: tf.Tensor) -> Steps:
            before = Steps(*before)
            now = step + tf.cast(before.done, tf.int64)
            results = world.strategy.run(replica_step, (images, counts, before.done, now))
            result = StepResult(*(world.first(value) for value in results))
            failed = tf.where(result.stopped, before.failed, tf.where(result.failed, before.failed + 1, 0))
            is_done = ~result.stopped & (failed < limit)
            return Steps(
                before.done + tf.cast(is_done, tf.int32),
                result.stopped,
                failed,
                tf.where(is_done & ~result.failed, before.metrics + result.metrics, before.metrics),
                tf.where(is_done, before.counts + result.counts, before.counts),
                before.all_reduce + result.waited,
            )

        zeros = tf.zeros(len(SUMMED)), tf.zeros(len(Counts._fields)), tf.constant(0.0, tf.float64)
        return tf.while_loop(should_continue, take_step, Steps(tf.constant(0), tf.constant(False), failed, *zeros))

    return train_steps


def make_replica_step(
    world: World, model: ScaleHyperprior, optimizer: Optimizer, stop: tf.Variable, settings: Config
) -> Callable[..., StepResult]:
    """Makes f(images, counts, index, step): a step on part `index` of a replica's input, inside the replica."""
    forward_backward = make_forward_backward(world, model, settings)

    def replica_step(images: tf.Tensor, counts: tf.Tensor, index: tf.Tensor, step: tf.Tensor) -> StepResult:
        context = tf.distribute.get_replica_context()
        first = tf.cast(context.replica_id_in_sync_group, tf.int64) * world.replica_batch
        own_lanes = first + tf.range(world.replica_batch, dtype=tf.int64)
        scale = tf.identity(optimizer.loss_scale)
        gradients, metrics = forward_backward(images[index], step, own_lanes, scale)
        # Inlining the call drops control dependencies on the call, but not those on its values.
        gradients = [tf.identity(gradient) for gradient in gradients]
        with tf.control_dependencies([*gradients, metrics]):
            began, asked_to_stop = tf.timestamp(), stop.read_value()
        own_numbers = tf.concat([metrics, asked_to_stop[None], counts[index]], axis=0)
        *gradients, numbers = context.all_reduce("SUM", [*gradients, own_numbers])
        with tf.control_dependencies([*gradients, numbers]):
            waited = tf.timestamp() - began
        metrics, stops, counts = tf.split(numbers, [len(MEASURED), 1, len(Counts._fields)])
        stopped, loss = stops[0] > 0, metrics[MEASURED.index("loss")]
        gradients = [gradient / scale for gradient in gradients]
        norm = tf.linalg.global_norm(gradients)
        is_finite = tf.math.is_finite(norm) & tf.math.is_finite(loss)
        if settings.train.clip_norm:
            factor = settings.train.clip_norm / tf.maximum(norm, settings.train.clip_norm)
            gradients = [gradient * factor for gradient in gradients]
        optimizer.apply(gradients, is_finite, stopped, step)
        failed = ~is_finite
        if optimizer.loss_scaling:
            # In float16 an overflow means that the loss scale is too high. It is a failure only at a scale below 1.
            failed = ~tf.math.is_finite(loss) | (~is_finite & (scale < 1.0))
            norm = tf.where(is_finite, norm, 0.0)
        return StepResult(stopped, failed, tf.concat([metrics, norm[None], [1.0]], axis=0), counts, waited)

    return replica_step


def make_forward_backward(world: World, model: ScaleHyperprior, settings: Config) -> Callable[..., Any]:
    """Makes f(images [b, P, P, 3] uint8, step, lanes [b], loss scale) → (gradients of this replica's part of the mean
    loss, its part of the means of MEASURED)."""
    variables = list(model.named_variables().values())
    side, batch = settings.data.patch_size, world.batch_size
    shape_y, shape_z = model.latent_shapes(side, side)
    seed_y, seed_z = (draw(settings.seed, "noise", latent) >> 2 for latent in "yz")

    # No autograph: it reads source files at a function's first call, which may be hours after the start.
    @tf.function(jit_compile=settings.train.xla, autograph=False)
    def forward_backward(images: tf.Tensor, step: tf.Tensor, own_lanes: tf.Tensor, scale: tf.Tensor) -> Any:
        x = tf.cast(images, tf.float32) / 255.0
        noise_y = priors.uniform_noise(shape_y, seed_y, step, own_lanes)
        noise_z = priors.uniform_noise(shape_z, seed_z, step, own_lanes)
        with tf.GradientTape() as tape:
            out = model.train(x, noise_y, noise_z, settings.train.proxy)
            values = measure(x, out.x_hat, out.bits_y, out.bits_z, settings.loss)
            # Divided by the global batch size: the sum over replicas is then the mean over the global batch.
            objective = tf.reduce_sum(values["loss"]) / batch * scale
        gradients = tape.gradient(objective, variables)
        return gradients, tf.reduce_sum(tf.stack([values[name] for name in MEASURED]), axis=1) / batch

    return forward_backward
