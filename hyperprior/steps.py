"""What runs in the graph: n training steps in one call.

One metrics vector passes between the graph and the outer loop, summed over all replicas together with the
gradients, so every worker reads the same numbers and reaches the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from hyperprior import lanes, model, rd
from hyperprior.config import Config
from hyperprior.distribute import World
from hyperprior.optimizer import Optimizer

TRAIN_METRICS = ("loss", "bpp_y", "bpp_z", "distortion", "psnr_db")
INPUT = ("samples", "bad", "small", "visits", "lost")  # what each step's input met, summed over workers


class Steps(NamedTuple):
    """What a call of n steps gives back. The step after the last of `done` left nothing behind."""

    done: tf.Tensor  # int32: steps taken; fewer than n after a stop or when training diverged
    stopped: tf.Tensor  # bool: a worker was asked to stop
    failed: tf.Tensor  # int32: how many steps in a row, up to the last, were not finite
    metrics: tf.Tensor  # sums over the steps with a finite gradient: TRAIN_METRICS, gradient norm, their number
    input: tf.Tensor  # sums over the steps done: INPUT
    all_reduce: tf.Tensor  # seconds in which this worker waited for the sums over replicas


def make_train_steps(
    world: World, hyperprior: model.ScaleHyperprior, optimizer: Optimizer, stop: tf.Variable, settings: Config
) -> Callable[..., Steps]:
    """f(images, inputs, step, failed), to be called on every worker with one n.

    images, inputs: per replica [n, b, P, P, 3] uint8 and [n, len(INPUT)]; step: number of the first, int64;
    failed: steps in a row before it that were not finite. `stop` is read in every step, so a worker that is
    asked to stop need not wait for the end of the call.
    """
    variables = list(hyperprior.named_variables().values())
    side, batch = settings.data.patch_size, world.batch_size
    shape_y, shape_z = hyperprior.latent_shapes(side, side)
    seed_y, seed_z = (lanes.draw(settings.seed, "noise", latent) >> 2 for latent in "yz")

    # autograph reads source files when a function is first called, which may be hours after the start.
    @tf.function(jit_compile=settings.train.xla, autograph=False)
    def forward_backward(images: tf.Tensor, step: tf.Tensor, places: tf.Tensor, scale: tf.Tensor) -> Any:
        x = tf.cast(images, tf.float32) / 255.0
        noise_y = model.uniform_noise(shape_y, seed_y, step, places)
        noise_z = model.uniform_noise(shape_z, seed_z, step, places)
        with tf.GradientTape() as tape:
            out = hyperprior.train(x, noise_y, noise_z, settings.train.proxy)
            bpp_y, bpp_z = (rd.bits_per_pixel(bits, side, side) for bits in (out.bits_y, out.bits_z))
            distortion = rd.distortion(x, out.x_hat, settings.loss.metric)
            loss = rd.lagrangian(bpp_y + bpp_z, distortion, settings.loss.lmbda, settings.loss.metric)
            # Divided by the global batch: the sum over replicas is then the mean over the global batch.
            objective = tf.reduce_sum(loss) / batch * scale
        gradients = tape.gradient(objective, variables)
        psnr = rd.psnr_db(rd.mse(x, out.x_hat))
        rows = tf.stack([loss, bpp_y, bpp_z, distortion, psnr])
        return gradients, tf.reduce_sum(rows, axis=1) / batch

    def replica_step(images: tf.Tensor, inputs: tf.Tensor, index: tf.Tensor, step: tf.Tensor) -> Any:
        context = tf.distribute.get_replica_context()
        first = tf.cast(context.replica_id_in_sync_group, tf.int64) * world.replica_batch
        places = first + tf.range(world.replica_batch, dtype=tf.int64)
        scale = tf.identity(optimizer.loss_scale)
        gradients, metrics = forward_backward(images[index], step, places, scale)
        # Once the function is inlined only the values it gives, not its call, can be waited for.
        gradients = [tf.identity(gradient) for gradient in gradients]
        with tf.control_dependencies([*gradients, metrics]):
            began, asked = tf.timestamp(), stop.read_value()
        told = tf.concat([metrics, asked[None], inputs[index]], axis=0)
        *gradients, summed = context.all_reduce("SUM", [*gradients, told])
        with tf.control_dependencies([*gradients, summed]):
            waited = tf.timestamp() - began
        metrics, stops, inputs = tf.split(summed, [len(TRAIN_METRICS), 1, len(INPUT)])
        stopped = stops[0] > 0
        gradients = [gradient / scale for gradient in gradients]
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(metrics[0])
        if settings.train.clip_norm:
            factor = settings.train.clip_norm / tf.maximum(norm, settings.train.clip_norm)
            gradients = [gradient * factor for gradient in gradients]
        optimizer.apply(gradients, finite, stopped, step)
        # In float16 an overflow only means that the loss scale is too high, until the scale is used up.
        failed = ~finite
        if optimizer.loss_scaling:
            failed = ~tf.math.is_finite(metrics[0]) | (~finite & (scale < 1.0))
            norm = tf.where(finite, norm, 0.0)
        return stopped, failed, tf.concat([metrics, norm[None], [1.0]], axis=0), inputs, waited

    limit = settings.train.nonfinite_limit()

    @tf.function(reduce_retracing=True, autograph=False)
    def train_steps(images: Any, inputs: Any, step: tf.Tensor, failed: tf.Tensor) -> Steps:
        count = tf.shape(world.first(images))[0]

        def go_on(*so_far: tf.Tensor) -> tf.Tensor:
            so_far = Steps(*so_far)
            return (so_far.done < count) & ~so_far.stopped & (so_far.failed < limit)

        def one_step(*so_far: tf.Tensor) -> Steps:
            done, _, failed, totals, met, waited = so_far
            result = world.strategy.run(replica_step, (images, inputs, done, step + tf.cast(done, tf.int64)))
            stopped, failing, metrics, now_met, now_waited = (world.first(value) for value in result)
            failed = tf.where(stopped, failed, tf.where(failing, failed + 1, 0))
            counts = ~stopped & (failed < limit)
            return Steps(
                done + tf.cast(counts, tf.int32),
                stopped,
                failed,
                tf.where(counts & ~failing, totals + metrics, totals),
                tf.where(counts, met + now_met, met),
                waited + now_waited,
            )

        nothing = tf.zeros(len(TRAIN_METRICS) + 2), tf.zeros(len(INPUT)), tf.constant(0.0, tf.float64)
        return tf.while_loop(go_on, one_step, Steps(tf.constant(0), tf.constant(False), failed, *nothing))

    return train_steps
