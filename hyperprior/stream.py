"""From lanes to batches: reading and decoding in a thread pool, and the cursors that go with each batch.

Each lane keeps a few samples ahead in the pool and takes them back in its own order, so results never
depend on which thread was faster. A sample that cannot be used is skipped inside its lane, counted with
the batch that passed over it, and never shifts another lane.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Optional, Union

import numpy as np

from hyperprior import config, images, lanes, shards
from hyperprior.errors import DataError
from hyperprior.lanes import Cursor, Keep, Lost
from hyperprior.shards import Sample, Shard

AHEAD = 3  # samples a lane has in the pool
PREFETCH = 2  # chunks ready before the trainer asks
LATE = 30  # seconds without input after which a warning tells
PASSED_OVER_AT_MOST = 1000  # samples in a row, over more than an epoch, before a lane gives up


class Source(NamedTuple):
    """A split: its shards, and which of their samples belong to it.

    `images` is 0 where nobody counted them. `digest` identifies their keys; it is 0 where the names and sizes
    of the shards say enough.
    """

    shards: list[Shard]
    keep: Keep
    images: int = 0
    digest: int = 0


@dataclass
class Splits:
    train: Source
    val: Source
    test: Source
    test_name: str  # "test", or "val" where nothing was set apart for testing

    def fingerprint(self) -> str:
        """Identifies the data, wherever it lies: names, sizes and parts of shards, and keys that were counted."""
        parts = [(shards.describe_shards(s.shards), s.keep, s.digest) for s in (self.train, self.val, self.test)]
        return f"{lanes.draw(parts):016x}"


def open_splits(settings: config.Data, batch_size: int, *, count: bool) -> Splits:
    """Opens every source, and counts samples where that is needed: `count`, splits, max_images, few shards.

    Raises DataError for anything that can be known to be wrong before training.
    """
    opened = {
        key: shards.open_sources(getattr(settings, key), f"data.{key}", allow_pipe=settings.allow_pipe)
        for key in ("train", "val", "test")
    }
    if not opened["train"]:
        raise DataError("data.train names no source; give tars, directories or URLs")
    val_split, test_split = settings.splits()
    whole = opened["train"]
    limit = 1.0
    keys: Optional[list[str]] = None
    divided = bool(val_split or test_split or settings.max_images or len(whole) < batch_size)
    if count or divided:
        keys = some_keys(whole, "train")
        if settings.max_images and settings.max_images < len(keys):
            limit = sorted(map(lanes.limit_hash, keys))[settings.max_images]

    def part(low: float, high: float) -> Source:
        keep = Keep(low, high, limit)
        return Source(whole, keep) if keys is None else counted(whole, keep, keys)

    def counted(found: list[Shard], keep: Keep, keys: list[str]) -> Source:
        kept = [key for key in keys if keep(key)]
        # `count` may change from one start of a run to the next: it must not tell in the fingerprint.
        return Source(found, keep, len(kept), lanes.draw(kept) if divided or found is not whole else 0)

    def given(key: str) -> Source:
        return counted(opened[key], lanes.ALL, some_keys(opened[key], key))

    train = part(test_split + val_split, 1.0)
    if keys is not None and train.images < batch_size:
        raise DataError(
            f"the training data has {train.images} images but train.batch_size is {batch_size}, and each "
            f"place of the batch reads images of its own; lower train.batch_size or add images"
        )
    val = given("val") if opened["val"] else part(test_split, test_split + val_split)
    test = given("test") if opened["test"] else part(0.0, test_split)
    for name, source, share in (("val", val, val_split), ("test", test, test_split)):
        if share and not source.images:
            raise DataError(
                f"the {name} split is empty: {len(keys or ())} images of data.train are too few for "
                f"data.{name}_split={share}; give data.{name} sources"
            )
    train = train._replace(shards=lanes.enough_shards(whole, batch_size))
    return Splits(train, val, test, "test") if test.images else Splits(train, val, val, "val")


def some_keys(found: list[Shard], name: str) -> list[str]:
    """Every sample's key, shard by shard, at least one; reads the headers of tars (and all of a URL)."""
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        keys = [key for keys in pool.map(lambda shard: [s.key for s in shard.samples()], found) for key in keys]
    if not keys:
        raise DataError(f"data.{name} holds no image ({', '.join(sorted(shards.IMAGE_SUFFIXES))})")
    return keys


def read(sample: Sample) -> bytes:
    """The sample's bytes. Raises Unusable where they cannot be read: a run outlives what storage loses."""
    try:
        return sample.read()
    except DataError as error:
        raise images.Unusable(str(error)) from error


# Training -------------------------------------------------------------------------------------------------


class Skip(NamedTuple):
    """What was passed over: a sample that is `bad`, defective, or only `small`; or a shard's rest, `lost`."""

    name: str
    reason: str
    kind: Literal["bad", "small", "lost"]


class LostShard(images.Unusable):
    """The rest of a shard cannot be read."""


class Reading:
    """What the input waits for: the name of a shard or sample."""

    name = ""

    def set(self, name: str) -> None:
        self.name = name


@dataclass
class Batch:
    """This worker's share of one global batch, [b, P, P, 3] uint8, and the cursors its lanes go on from."""

    images: np.ndarray
    keys: list[str]
    cursors: list[Cursor]
    samples: int  # decoded or skipped for this batch
    visits: int  # shards begun
    skipped: list[Skip]


class Lane:
    """One lane's patches, for ever."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        source: Source,
        settings: config.Data,
        seed: int,
        lane: int,
        batch_size: int,
        start: Cursor,
        reading: Reading,
    ):
        self.settings, self.seed, self.lane, self.pool, self.cursor = settings, seed, lane, pool, start
        self.reading = reading
        self.samples = lanes.lane_samples(
            source.shards, source.keep, seed, lane, batch_size, settings.shuffle_buffer, start, reading.set
        )
        self.pending: deque[tuple[Cursor, Union[Sample, Lost], Future[np.ndarray]]] = deque()
        self.patches: Optional[tuple[Cursor, str, np.ndarray]] = None
        self.last_good_epoch, self.passed_over = start.epoch, 0

    def next(self) -> tuple[np.ndarray, str, int, int, list[Skip]]:
        """(patch, sample's name, samples newly decoded or skipped, shards begun, what was passed over)."""
        used, visits, skipped = 0, 0, []
        while self.patches is None:
            while len(self.pending) < AHEAD:
                at, sample = next(self.samples)
                self.pending.append((at, sample, self.pool.submit(self.load, at, sample)))
            at, sample, future = self.pending.popleft()
            if self.cursor.patch == 0:  # else it was counted before the stop that this lane resumes from
                used += isinstance(sample, Sample)
                visits += at.offset == 0
            self.reading.set(sample.name)
            try:
                self.patches = at, sample.name, future.result()
                self.last_good_epoch, self.passed_over = at.epoch, 0
            except images.Unusable as error:
                skipped.append(Skip(sample.name, str(error), kind_of(error)))
                self.cursor = at._replace(offset=at.offset + 1)
                self.passed_over += 1
                if at.epoch > self.last_good_epoch + 1 and self.passed_over > PASSED_OVER_AT_MOST:
                    raise DataError(
                        f"lane {self.lane} found no usable image in more than an epoch; the last it passed over "
                        f"is {sample.name}: {error} (see data.patch_size, data.small_images)"
                    ) from error
        at, name, patches = self.patches
        patch = self.cursor.patch
        if patch + 1 < len(patches):
            self.cursor = at._replace(patch=patch + 1)
        else:
            self.cursor = at._replace(offset=at.offset + 1)
            self.patches = None
        return patches[patch], name, used, visits, skipped

    def load(self, at: Cursor, sample: Union[Sample, Lost]) -> np.ndarray:
        if isinstance(sample, Lost):
            raise LostShard(sample.reason)
        # Keyed by the sample, not the lane: an image is cut alike whatever the batch size.
        places = [self.place(at.epoch, sample.key, patch) for patch in range(self.settings.patches_per_image)]
        return images.cut_patches(
            read(sample), self.settings.patch_size, places, upscale=self.settings.small_images == "upscale"
        )

    def place(self, *patch: object) -> images.Place:
        bits = lanes.draw(self.seed, "crop", *patch)
        scale = 1.0 - (1.0 - self.settings.min_scale) * lanes.unit(self.seed, "scale", *patch)
        flip = self.settings.flip and lanes.unit(self.seed, "flip", *patch) < 0.5
        return images.Place(bits >> 32, bits & 0xFFFFFFFF, scale, flip)


def kind_of(error: images.Unusable) -> Literal["bad", "small", "lost"]:
    return "small" if isinstance(error, images.TooSmall) else "lost" if isinstance(error, LostShard) else "bad"


def batches(
    source: Source,
    settings: config.Data,
    seed: int,
    own: range,
    batch_size: int,
    cursors: Sequence[Cursor],
    reading: Optional[Reading] = None,
) -> Generator[Batch, None, None]:
    """This worker's share of every global batch from `cursors` (one per global lane) on, for ever.

    `reading` always tells what it reads or waits for.
    """
    reading = reading or Reading()
    with ThreadPoolExecutor(settings.decode_threads or os.cpu_count(), "decode") as pool:
        row = [Lane(pool, source, settings, seed, i, batch_size, cursors[i], reading) for i in own]
        try:
            while True:
                patches, keys, used, visits, skipped = zip(*[lane.next() for lane in row])
                yield Batch(
                    np.stack(patches),
                    list(keys),
                    [lane.cursor for lane in row],
                    sum(used),
                    sum(visits),
                    [skip for lane in skipped for skip in lane],
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Prefetch:
    """Runs `items` in a thread, a few ahead. `next` raises what `items` raised, in its place."""

    def __init__(self, items: Iterable[Any]):
        self.queue: queue.Queue[Any] = queue.Queue(PREFETCH)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill, args=(items,), name="input", daemon=True)
        self.thread.start()

    def _fill(self, items: Iterable[Any]) -> None:
        try:
            with contextlib.closing(iter(items)) as iterator:  # type: ignore[type-var]
                for item in iterator:
                    if not self._put((item, None)):
                        return
            self._put((None, StopIteration()))
        except BaseException as error:  # handed over to the thread that asks
            self._put((None, error))

    def _put(self, item: Any) -> bool:
        while not self.stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.queue.put(item, timeout=0.1)
                return True
        return False

    def next(
        self, give_up: Callable[[], bool] = lambda: False, late: Callable[[float], object] = lambda seconds: None
    ) -> Any:
        """The next item; None as soon as `give_up()` holds while there is none.

        `late` hears how many seconds it has waited, every LATE of them.
        """
        began, told = time.monotonic(), 1
        while True:
            with contextlib.suppress(queue.Empty):
                item, error = self.queue.get(timeout=0.2)
                if error is None:
                    return item
                if give_up():  # a Ctrl-C also ends the programs behind URLs: no fault of theirs
                    return None
                raise error
            if give_up():
                return None
            if time.monotonic() - began > told * LATE:
                told += 1
                late(time.monotonic() - began)

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(timeout=5)  # it may hang in a read; it is a daemon


# Evaluation -----------------------------------------------------------------------------------------------


class EvalImage(NamedTuple):
    """One place of an evaluation batch: [H, W, 3] uint8, and weight 0 where there is no image to count."""

    image: np.ndarray
    weight: float
    skip: Optional[Skip] = None


def eval_batches(
    source: Source, settings: config.Data, own: range, batch_size: int, min_side: int = 1
) -> Generator[list[EvalImage], None, None]:
    """This worker's places of every global batch: each image of the split once, in order, the end padded.

    Images are centre crops of `eval_crop`, or whole where that is `full`; one with a side below that, or
    below `min_side`, is skipped.
    """
    side = None if settings.eval_crop == "full" else int(settings.eval_crop)
    blank = np.zeros((side or config.DOWNSAMPLING, side or config.DOWNSAMPLING, 3), np.uint8)

    def load(sample: Optional[Sample]) -> EvalImage:
        if sample is None:
            return EvalImage(blank, 0.0)
        try:
            data = read(sample)
            image = images.centre_crop(data, side) if side else images.decode(data)
            images.check_size(image.shape[0], image.shape[1], min_side, upscale=False)
            return EvalImage(image, 1.0)
        except images.Unusable as error:
            return EvalImage(blank, 0.0, Skip(sample.name, str(error), kind_of(error)))

    samples = (s for shard in source.shards for s in shard.samples() if source.keep(s.key))
    with ThreadPoolExecutor(settings.decode_threads or os.cpu_count(), "decode") as pool:
        pending: deque[list[Future[EvalImage]]] = deque()
        for _ in range(-(-source.images // batch_size)):
            group = [next(samples, None) for _ in range(batch_size)]
            pending.append([pool.submit(load, group[i]) for i in own])
            if len(pending) > 2:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
