"""What a run's model does on the images held out of it: means over a split, on all workers.

Latents are rounded and pixels have 8 bits, as a viewer gets them; only the rates are estimates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from hyperprior import model, rd, stream
from hyperprior.config import DOWNSAMPLING, MS_SSIM_MIN_SIDE, Config
from hyperprior.distribute import World
from hyperprior.errors import DataError, HyperpriorError
from hyperprior.steps import TRAIN_METRICS
from hyperprior.stop import StopRequest

EVAL_METRICS = (*TRAIN_METRICS, "ms_ssim", "ms_ssim_images", "images")


class Evaluator:
    """The held-out images of a run as its model gives them. Asked to stop, or where an input cannot be read, it stops
    at the same batch on every worker."""

    def __init__(self, world: World, hyperprior: model.ScaleHyperprior, settings: Config, stop: StopRequest):
        self.world, self.model, self.settings, self.stop = world, hyperprior, settings, stop
        self.min_side = MS_SSIM_MIN_SIDE if settings.loss.metric == "ms-ssim" else 1
        self.eval_step = make_eval_step(world, hyperprior, settings)

    def images(self, source: stream.Source) -> Generator[np.ndarray, None, None]:
        """Those of a split that can be used, in order: [H, W, 3] uint8."""
        places = stream.eval_batches(source, self.settings.data, range(1), 1, self.min_side)
        with contextlib.closing(places):
            yield from (place.image for (place,) in places if place.weight)

    def check(self, name: str, source: stream.Source) -> None:
        """Raises DataError unless a split that holds images has one that can be used."""
        with contextlib.closing(self.images(source)) as images:
            if source.images and next(images, None) is None:
                raise DataError(
                    f"none of the {source.images} images of the {name} split can be used with "
                    f"data.eval_crop={self.settings.data.eval_crop}; lower it, or give other images"
                )

    def means(self, source: stream.Source, tell: Callable[[stream.Skip], None]) -> Optional[dict[str, float]]:
        """Means over a split, or None if a worker was asked to stop; `tell` hears of what cannot be used."""
        world = self.world
        # Whole images differ in shape, so each replica gets one at a time.
        each = 1 if self.settings.data.eval_crop == "full" else world.replica_batch
        batch_size = each * world.replicas
        own = world.lanes(batch_size)
        z_offset = self.model.z_offset()
        totals = np.zeros(len(EVAL_METRICS))
        batches = stream.eval_batches(source, self.settings.data, own, batch_size, self.min_side)
        with contextlib.closing(batches):
            while found := self.next_places(batches, len(own)):
                groups = [found[i : i + each] for i in range(0, len(found), each)]
                images = world.place([np.stack([place.image for place in group]) for group in groups])
                weights = world.place([np.array([place.weight for place in group], np.float32) for group in groups])
                stop = world.place_once(np.array(self.stop.requested, np.float32))
                sums = self.eval_step(images, weights, stop, z_offset).numpy()
                if sums[-1] > 0:
                    return None
                totals += sums[:-1]
                for place in found:
                    if place.skip:
                        tell(place.skip)
        return means(totals)

    def next_places(self, batches: Iterator[list[stream.EvalImage]], count: int) -> list[stream.EvalImage]:
        """The next of `batches`, or none; where that fails blank places, in whose step all workers stop."""
        try:
            return next(batches, [])
        except HyperpriorError as error:
            self.stop.ask(error)
            blank = np.zeros((DOWNSAMPLING, DOWNSAMPLING, 3), np.uint8)
            return [stream.EvalImage(blank, 0.0)] * count


def make_eval_step(world: World, hyperprior: model.ScaleHyperprior, settings: Config) -> Callable[..., tf.Tensor]:
    """f(images, weights, stop, z_offset) → [len(EVAL_METRICS) + 1]: weighted sums over the batch, and stops."""

    def replica_step(images: tf.Tensor, weights: tf.Tensor, stop: tf.Tensor, z_offset: tf.Tensor) -> tf.Tensor:
        x = tf.cast(images, tf.float32) / 255.0
        x_hat, out = reconstruct(hyperprior, x, z_offset)
        height, width = tf.unstack(tf.shape(x)[1:3])
        bpp_y, bpp_z = (rd.bits_per_pixel(bits, height, width) for bits in (out.bits_y, out.bits_z))
        mse = rd.mse(x, x_hat)
        ms_ssim, fits = ms_ssim_if_large(x, x_hat)
        distortion = mse if settings.loss.metric == "mse" else 1.0 - ms_ssim
        loss = rd.lagrangian(bpp_y + bpp_z, distortion, settings.loss.lmbda, settings.loss.metric)
        ones = tf.ones_like(mse)
        rows = [loss, bpp_y, bpp_z, distortion, rd.psnr_db(mse), ms_ssim, fits, ones]
        # A weight of 0 marks a padded place; multiplying would let its NaN through.
        sums = tf.reduce_sum(tf.where(weights > 0, tf.stack(rows), 0.0), axis=1)
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.concat([sums, stop[None]], axis=0))

    @tf.function(reduce_retracing=True, autograph=False)
    def eval_step(images: Any, weights: Any, stop: Any, z_offset: tf.Tensor) -> tf.Tensor:
        return world.first(world.strategy.run(replica_step, (images, weights, stop, z_offset)))

    return eval_step


def reconstruct(
    hyperprior: model.ScaleHyperprior, x: tf.Tensor, z_offset: tf.Tensor
) -> tuple[tf.Tensor, model.Forward]:
    """What a viewer gets of [B, H, W, 3] images of any size: rounded latents, 8-bit pixels in [0, 1]."""
    height, width = tf.unstack(tf.shape(x)[1:3])
    out = hyperprior.round(model.pad(x), z_offset)
    x_hat = tf.clip_by_value(out.x_hat[:, :height, :width], 0.0, 1.0)
    return tf.round(x_hat * 255.0) / 255.0, out


def ms_ssim_if_large(x: tf.Tensor, x_hat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(MS-SSIM, 1) of images that are large enough for it, else (0, 0): [B] each."""
    none = tf.zeros(tf.shape(x)[0]), tf.zeros(tf.shape(x)[0])

    def measured() -> tuple[tf.Tensor, tf.Tensor]:
        return rd.ms_ssim(x, x_hat), tf.ones(tf.shape(x)[0])

    if x.shape[1:3].is_fully_defined():  # a branch that cannot be cannot be traced either
        return measured() if min(x.shape[1:3]) >= MS_SSIM_MIN_SIDE else none
    return tf.cond(tf.reduce_min(tf.shape(x)[1:3]) >= MS_SSIM_MIN_SIDE, measured, lambda: none)


def means(sums: np.ndarray) -> dict[str, float]:
    """Means per image from the sums of `eval_step`, with bpp; ms_ssim over the images that are large enough."""
    found = dict(zip(EVAL_METRICS, map(float, sums)))
    images, ms_ssim_images = found.pop("images"), found.pop("ms_ssim_images")
    result = {
        name: value / (ms_ssim_images if name == "ms_ssim" else images) if images else float("nan")
        for name, value in found.items()
        if name != "ms_ssim" or ms_ssim_images
    }
    return {**result, "bpp": result["bpp_y"] + result["bpp_z"], "images": int(images)}
