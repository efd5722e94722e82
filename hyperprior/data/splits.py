"""Training, validation and test: which shards and samples belong to each.

A hash of a sample's key decides its split. So the split does not depend on the order of samples or on the shards.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hyperprior import config, stack
from hyperprior.data import lanes, shards
from hyperprior.data.lanes import Keep
from hyperprior.data.shards import Shard
from hyperprior.draws import draw
from hyperprior.errors import DataError
from hyperprior.image_files import TRAINING_SUFFIXES
from hyperprior.terminal import Terminal


class Split(NamedTuple):
    """The shards of a split, and which of their samples belong to the split.

    `images` is the number of samples, 0 if they were not counted. `digest` identifies their keys; it is 0 if the names
    and sizes of the shards identify the data.
    """

    shards: list[Shard]
    keep: Keep
    images: int = 0
    digest: int = 0


@dataclass
class Splits:
    train: Split
    val: Split
    test: Split
    test_name: str  # "test", or "val" if there are no test images
    ignored: Counter[str] = field(default_factory=Counter)  # files in directories, by extension

    def fingerprint(self, *, as_in_0_1: bool = False) -> str:
        """Identifies the data, whatever its folder, by the names, sizes and parts of shards and by the counted keys.

        Version 0.1.0, whose fingerprints are in checkpoints, took the text of `Keep` in place of its values.
        """
        parts = []
        for split in (self.train, self.val, self.test):
            keep = split.keep if as_in_0_1 else tuple(split.keep)
            parts.append((shards.identify_shards(split.shards, as_in_0_1=as_in_0_1), keep, split.digest))
        return f"{draw(parts):016x}"


def open_splits(settings: config.Data, batch_size: int, *, count: bool, terminal: Terminal | None = None) -> Splits:
    """Opens every source. Counts the samples of train for `count`, for splits, for max_images and for few shards.

    Raises DataError for every problem that can be found before training.
    """
    ignored: shards.Ignored = {}
    options: Any = {"allow_pipe": settings.allow_pipe, "extensions": settings.extensions, "ignored": ignored}
    sources = {key: shards.open_sources(getattr(settings, key), f"data.{key}", **options) for key in config.SOURCES}
    whole = sources["train"]
    if not whole:
        raise DataError("data.train names no source; give tars, directories or URLs")
    val_split, test_split = settings.splits()
    is_divided = bool(val_split or test_split or settings.max_images or len(whole) < batch_size)
    terminal = terminal or Terminal()
    keys = list_keys(whole, "train", terminal) if count or is_divided else None
    limit = 1.0
    if keys and settings.max_images and settings.max_images < len(keys):
        limit = sorted(lanes.draw_rank(lanes.group_of(key)) for key in keys)[settings.max_images]

    def take_share_of_train(low: float, high: float) -> Split:
        keep = Keep(low, high, limit)
        if keys is None:
            return Split(whole, keep)
        # `count` may differ between two starts of a run, so it must not change the fingerprint.
        return make_split(whole, keep, keys, with_digest=is_divided)

    def open_held_out(name: str, low: float, high: float) -> Split:
        if not sources[name]:
            return take_share_of_train(low, high)
        return make_split(sources[name], lanes.ALL, list_keys(sources[name], name, terminal), with_digest=True)

    train = take_share_of_train(test_split + val_split, 1.0)
    if keys is not None and train.images < batch_size:
        raise DataError(
            f"the training data has {train.images} images but train.batch_size is {batch_size}, and each "
            f"position of the batch reads its own images; lower train.batch_size or add images"
        )
    val = open_held_out("val", test_split, test_split + val_split)
    test = open_held_out("test", 0.0, test_split)
    for name, split, share in (("val", val, val_split), ("test", test, test_split)):
        if share and not split.images:
            raise DataError(
                f"the {name} split is empty: {len(keys or ())} images of data.train are too few for "
                f"data.{name}_split={share}; give data.{name} sources"
            )
    train = train._replace(shards=lanes.ensure_enough_shards(whole, batch_size))
    held_out = (val, test, "test") if test.images else (val, val, "val")
    return Splits(train, *held_out, sum(ignored.values(), Counter()))


def make_split(all_shards: list[Shard], keep: Keep, keys: list[str], *, with_digest: bool) -> Split:
    kept = [key for key in keys if keep(key)]
    return Split(all_shards, keep, len(kept), draw(kept) if with_digest else 0)


def list_keys(all_shards: list[Shard], name: str, terminal: Terminal) -> list[str]:
    """The keys of all samples, shard by shard. Reads tar headers and whole URLs. Raises DataError for none."""
    keys: list[str] = []
    with ThreadPoolExecutor(min(16, 4 * stack.count_cores())) as pool, terminal.waiting() as wait_for:
        futures = [pool.submit(lambda shard: [sample.key for sample in shard.samples()], shard) for shard in all_shards]
        for shard, future in zip(all_shards, futures):
            wait_for(shard.name)
            keys += future.result()
    if not keys:
        raise DataError(f"data.{name} holds no image ({', '.join(TRAINING_SUFFIXES)})")
    return keys
