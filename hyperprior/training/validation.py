"""Validation and test: means over a run's held-out images, on all workers.

Latents are rounded and pixels have 8 bits, as in a decoded file. Only the rates are estimates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from hyperprior.config import DOWNSAMPLING, MS_SSIM_MIN_SIDE, Config
from hyperprior.data.splits import Split
from hyperprior.data.stream import EvalImage, Skip, eval_batches
from hyperprior.errors import DataError, HyperpriorError
from hyperprior.metric_table import VAL, measured_in
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.metrics import measure
from hyperprior.training.distribute import World
from hyperprior.training.stop import StopRequest

MEASURED = (*measured_in(VAL), "ms_ssim_images")
SUMMED = (*MEASURED, "images")


class Evaluator:
    """Measures a run's model on held-out images. After a stop request or an input error, all workers stop at the same
    batch."""

    def __init__(self, world: World, model: ScaleHyperprior, settings: Config, stop: StopRequest):
        self.world, self.model, self.settings, self.stop = world, model, settings, stop
        self.min_side = MS_SSIM_MIN_SIDE if settings.loss.metric == "ms-ssim" else 1
        self.eval_step = make_eval_step(world, model, settings)

    def read_images(self, split: Split) -> Generator[np.ndarray, None, None]:
        """Yields the usable images of a split, in order: [H, W, 3] uint8."""
        places = eval_batches(split, self.settings.data, range(1), 1, self.min_side)
        with contextlib.closing(places):
            yield from (place.image for (place,) in places if place.weight)

    def check_split(self, name: str, split: Split) -> None:
        """Raises DataError if a split holds images but none that can be used."""
        with contextlib.closing(self.read_images(split)) as images:
            if split.images and next(images, None) is None:
                raise DataError(
                    f"none of the {split.images} images of the {name} split can be used with "
                    f"data.eval_crop={self.settings.data.eval_crop}; lower it, or give other images"
                )

    def compute_means(self, split: Split, report_skips: Callable[[list[Skip]], None]) -> Optional[dict[str, float]]:
        """Means over a split, or None if a worker must stop. Calls `report_skips` with own unusable images."""
        world = self.world
        # Whole images differ in shape, so each replica gets one at a time.
        each = 1 if self.settings.data.eval_crop == "full" else world.replica_batch
        batch_size = each * world.replicas
        own = world.lanes(batch_size)
        z_offset = self.model.z_offset()
        totals, skips = np.zeros(len(SUMMED)), []
        batches = eval_batches(split, self.settings.data, own, batch_size, self.min_side)
        with contextlib.closing(batches):
            while places := self.next_places(batches, len(own)):
                groups = [places[i : i + each] for i in range(0, len(places), each)]
                images = world.place([np.stack([place.image for place in group]) for group in groups])
                weights = world.place([np.array([place.weight for place in group], np.float32) for group in groups])
                stop = world.place_once(np.array(self.stop.requested, np.float32))
                *sums, stops = self.eval_step(images, weights, stop, z_offset).numpy()
                if stops > 0:
                    return None
                totals += sums
                skips += [place.skip for place in places if place.skip]
        report_skips(skips)
        return divide_sums(dict(zip(SUMMED, map(float, totals))))

    def next_places(self, batches: Iterator[list[EvalImage]], count: int) -> list[EvalImage]:
        """The next of `batches`, or [] at the end. After an error, blank places: all workers stop in their step."""
        try:
            return next(batches, [])
        except HyperpriorError as error:
            self.stop.request(error)
            blank = np.zeros((DOWNSAMPLING, DOWNSAMPLING, 3), np.uint8)
            return [EvalImage(blank, 0.0)] * count


def make_eval_step(world: World, model: ScaleHyperprior, settings: Config) -> Callable[..., tf.Tensor]:
    """Makes f(images, weights, stop, z_offset) → [len(SUMMED) + 1]: weighted sums over the batch, and stop requests."""

    def replica_step(images: tf.Tensor, weights: tf.Tensor, stop: tf.Tensor, z_offset: tf.Tensor) -> tf.Tensor:
        x = tf.cast(images, tf.float32) / 255.0
        x_hat, out = model.reconstruct(x, z_offset)
        values = measure(x, x_hat, out.bits_y, out.bits_z, settings.loss, with_ms_ssim=True)
        rows = tf.stack([*(values[name] for name in MEASURED), tf.ones_like(values["loss"])])
        # A weight of 0 marks a padded place. Its values may be NaN, which a product with 0 would keep.
        sums = tf.reduce_sum(tf.where(weights > 0, rows, 0.0), axis=1)
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.concat([sums, stop[None]], axis=0))

    @tf.function(reduce_retracing=True, autograph=False)
    def eval_step(images: Any, weights: Any, stop: Any, z_offset: tf.Tensor) -> tf.Tensor:
        return world.first(world.strategy.run(replica_step, (images, weights, stop, z_offset)))

    return eval_step


def divide_sums(sums: dict[str, float]) -> dict[str, float]:
    """Means per image, with bpp. ms_ssim is over the images that are large enough (`ms_ssim_images` in number), and
    missing if there is none."""
    images, ms_ssim_images = sums.pop("images"), sums.pop("ms_ssim_images")
    counts = {"images": int(images), "ms_ssim_images": int(ms_ssim_images)}
    if not ms_ssim_images:
        del sums["ms_ssim"], counts["ms_ssim_images"]
    divisors = {"ms_ssim": ms_ssim_images}
    means = {name: total / divisors.get(name, images) if images else float("nan") for name, total in sums.items()}
    return {**means, "bpp": means["bpp_y"] + means["bpp_z"], **counts}
