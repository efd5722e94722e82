"""From lanes to batches: reading and decoding in a thread pool, and the cursors that go with each batch.

Python decides which samples come and where each is cut. TensorFlow decodes them, many in one call, so that Python's
lock is held for a small part of the time. Each lane takes its results in its own order, so they never depend on the
groups of samples that were decoded together, nor on which thread was faster. A sample that cannot be used is skipped
inside its lane, and counted with the batch that skips it. It never shifts another lane.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Optional, TypeVar, Union

import numpy as np

from hyperprior import config, images, stack
from hyperprior.data import lanes, patches
from hyperprior.data.lanes import Cursor, Item, LostRest
from hyperprior.data.shards import Sample, Shard
from hyperprior.data.splits import Split
from hyperprior.errors import DataError
from hyperprior.terminal import LATE

AHEAD = 3  # samples of each lane that are read ahead, at least
GROUP = 32  # patches that one call of TensorFlow decodes
PREFETCH = 2  # items that are ready before the trainer asks
MAPPED_AHEAD = 64  # items of `map_ahead` in the pool
MAX_SKIPPED = 1000  # skips in a row, over more than an epoch, before a lane raises an error

T = TypeVar("T")
R = TypeVar("R")
Kind = Literal["bad", "small", "lost"]
Tell = Callable[[str], object]


class Skip(NamedTuple):
    """A skipped sample, which is `bad` (defective) or `small`, or the skipped rest of a shard, which is `lost`."""

    name: str
    reason: str
    kind: Kind


class Counts(NamedTuple):
    """Counts of the input: samples decoded or skipped, how many are bad or small; shard visits, how many are lost."""

    samples: int = 0
    bad: int = 0
    small: int = 0
    visits: int = 0
    lost: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other)))


class LostShard(images.Unusable):
    """The rest of a shard cannot be read."""


@dataclass
class Batch:
    """This worker's share of one global batch, [b, P, P, 3] uint8, and the cursors where its lanes continue."""

    images: np.ndarray
    keys: list[str]
    cursors: list[Cursor]
    counts: Counts
    skipped: list[Skip]


def read_sample(sample: Sample) -> bytes:
    """The sample's bytes. Raises Unusable if they cannot be read, so that a lost file does not end a run."""
    try:
        return sample.read()
    except DataError as error:
        raise images.Unusable(str(error)) from error


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """Applies `function` to each item, in order, with a bounded number of items in the pool."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > MAPPED_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def classify_error(error: images.Unusable) -> Kind:
    return "small" if isinstance(error, images.TooSmall) else "lost" if isinstance(error, LostShard) else "bad"


# Training -------------------------------------------------------------------------------------------------


class Decoded:
    """An item in the pool: its cursor, its name, and its patches once its group is decoded."""

    def __init__(self, at: Cursor, item: Item):
        self.at, self.item, self.name = at, item, item.name
        self.group: Future[list[Union[np.ndarray, images.Unusable]]]
        self.number = 0  # within the group

    def patches(self) -> np.ndarray:
        """[P, size, size, 3]. Waits for them. Raises Unusable."""
        result = self.group.result()[self.number]
        if isinstance(result, images.Unusable):
            raise result
        return result


class Lane:
    """One lane's patches, without end."""

    def __init__(self, lane: int, items: Iterator[tuple[Cursor, Item]], start: Cursor, decoder: Decoder):
        self.lane, self.items, self.decoder = lane, items, decoder
        self.cursor = start  # the position after the last patch taken
        self.pending: deque[Decoded] = deque()
        self.image: Optional[Decoded] = None  # the item that still has patches to take:
        self.patches: np.ndarray
        self.last_good_epoch, self.skipped_in_row = start.epoch, 0

    def take_items(self, count: int) -> list[Decoded]:
        """Puts the lane's next items into `pending`, to be decoded."""
        taken = [Decoded(*next(self.items)) for _ in range(count)]
        self.pending += taken
        return taken

    def next_patch(self, counts: dict[str, int], skipped: list[Skip]) -> tuple[np.ndarray, str]:
        """The next patch [size, size, 3] and its sample's name. Adds what happened since the last one to `counts`."""
        while self.image is None:
            if not self.pending:
                self.decoder.submit(self.take_items(1))
            decoded = self.pending.popleft()
            if self.cursor.patch == 0:  # otherwise the item was counted before the run stopped
                counts["samples"] += isinstance(decoded.item, Sample)
                counts["visits"] += decoded.at.offset == 0
            self.decoder.tell(decoded.name)
            try:
                self.patches = decoded.patches()
            except images.Unusable as error:
                skipped.append(Skip(decoded.name, str(error), classify_error(error)))
                counts[classify_error(error)] += 1
                self.skip_item(decoded, error)
            else:
                self.image, self.last_good_epoch, self.skipped_in_row = decoded, decoded.at.epoch, 0
        image, patch, (epoch, visit, offset, _) = self.image, self.cursor.patch, self.image.at
        if patch + 1 < len(self.patches):
            self.cursor = Cursor(epoch, visit, offset, patch + 1)
        else:
            self.cursor = Cursor(epoch, visit, offset + 1)
            self.image = None
        return self.patches[patch], image.name

    def skip_item(self, decoded: Decoded, error: images.Unusable) -> None:
        """Moves past an item that cannot be used. Raises DataError if the lane finds no usable one."""
        self.cursor = decoded.at._replace(offset=decoded.at.offset + 1)
        self.skipped_in_row += 1
        if decoded.at.epoch > self.last_good_epoch + 1 and self.skipped_in_row > MAX_SKIPPED:
            raise DataError(
                f"lane {self.lane} found no usable image in more than an epoch; the last one that it "
                f"skipped is {decoded.name}: {error} (see data.patch_size, data.small_images)"
            ) from error


class Decoder:
    """Reads and decodes the next items of `lanes` lanes in a pool of threads, in groups."""

    def __init__(self, settings: config.Data, seed: int, lanes: int, shards: Sequence[Shard], tell: Tell):
        self.settings, self.seed, self.tell = settings, seed, tell
        threads = settings.decode_threads or stack.count_cores()
        self.pool = ThreadPoolExecutor(threads, "decode")
        self.group = max(1, GROUP // settings.patches_per_image)  # items
        self.at_a_time, self.ahead = 1, AHEAD  # items that a lane takes, and has
        if not any(shard.kind == "url" for shard in shards):  # a batch must not wait for more of a slow stream
            self.at_a_time = max(1, self.group // lanes)
            self.ahead = max(AHEAD, (threads + 1) * self.group // lanes)

    def fill(self, lanes: Sequence[Lane]) -> None:
        """Takes the next items of the lanes that have fewer than `ahead`."""
        behind = [lane for lane in lanes if len(lane.pending) <= self.ahead - self.at_a_time]
        self.submit([decoded for lane in behind for decoded in lane.take_items(self.at_a_time)])

    def submit(self, items: list[Decoded]) -> None:
        """Puts the items into the pool, in groups of about the same size."""
        groups = -(-len(items) // self.group)
        for group in (items[number::groups] for number in range(groups)):
            future = self.pool.submit(self.decode_group, group)
            for number, decoded in enumerate(group):
                decoded.group, decoded.number = future, number

    def decode_group(self, group: Sequence[Decoded]) -> list[Union[np.ndarray, images.Unusable]]:
        """Runs in the pool: the patches [P, size, size, 3] of each item, or why it has none."""
        results: list[Union[np.ndarray, images.Unusable, None]] = [None] * len(group)
        encoded, places = [], []
        for number, (at, item) in enumerate((decoded.at, decoded.item) for decoded in group):
            if isinstance(item, LostRest):
                results[number] = LostShard(item.reason)
                continue
            try:
                encoded.append(read_sample(item))
            except images.Unusable as error:
                results[number] = error
                continue
            # The draw depends on the sample, not on the lane, so the batch size does not change where an image is cut.
            numbers = range(self.settings.patches_per_image)
            places.append([patches.draw_place(self.settings, self.seed, at.epoch, item.key, n) for n in numbers])
        upscale = self.settings.small_images == "upscale"
        cut = iter(patches.cut_group(encoded, self.settings.patch_size, places, upscale=upscale))
        return [next(cut) if result is None else result for result in results]


def batches(
    split: Split,
    settings: config.Data,
    seed: int,
    own: range,
    batch_size: int,
    cursors: Sequence[Cursor],
    tell: Tell = lambda name: None,
) -> Generator[Batch, None, None]:
    """This worker's share of every global batch from `cursors` (one per global lane) on, without end.

    `own`: the lanes of this worker. `tell` gets the name of each shard or sample before the input waits for it.
    """
    decoder = Decoder(settings, seed, len(own), split.shards, tell)

    def open_lane(lane: int) -> Lane:
        start, buffer_size = cursors[lane], settings.shuffle_buffer
        items = lanes.read_lane(split.shards, split.keep, seed, lane, batch_size, buffer_size, start, tell)
        return Lane(lane, items, start, decoder)

    own_lanes = [open_lane(lane) for lane in own]
    with decoder.pool as pool:
        try:
            while True:
                decoder.fill(own_lanes)
                counts, skipped = dict.fromkeys(Counts._fields, 0), list[Skip]()
                lane_patches = [lane.next_patch(counts, skipped) for lane in own_lanes]
                yield Batch(
                    np.stack([pixels for pixels, _ in lane_patches]),
                    [name for _, name in lane_patches],
                    [lane.cursor for lane in own_lanes],
                    Counts(**counts),
                    skipped,
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Prefetch:
    """Runs `items` in a thread, a few items ahead. `next` raises an error of `items` after the items before it."""

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
        except BaseException as error:  # `next` raises it again
            self._put((None, error))

    def _put(self, entry: Any) -> bool:
        while not self.stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.queue.put(entry, timeout=0.1)
                return True
        return False

    def next(
        self, give_up: Callable[[], bool] = lambda: False, late: Callable[[float], object] = lambda seconds: None
    ) -> Any:
        """The next item, or None if `give_up()` is true while there is no item.

        `late` is called every LATE seconds of waiting, with the seconds waited so far.
        """
        began, warnings = time.monotonic(), 1
        while True:
            with contextlib.suppress(queue.Empty):
                item, error = self.queue.get(timeout=0.2)
                if error is None:
                    return item
                if give_up():  # Ctrl-C also ends the programs that read URLs; that is not an error
                    return None
                raise error
            if give_up():
                return None
            if time.monotonic() - began > warnings * LATE:
                warnings += 1
                late(time.monotonic() - began)

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(timeout=5)  # a read may hang; the thread is a daemon and does not block the exit


# Validation and test --------------------------------------------------------------------------------------


class EvalImage(NamedTuple):
    """One position of an evaluation batch: [H, W, 3] uint8. Weight 0 means that no image is counted."""

    image: np.ndarray
    weight: float
    skip: Optional[Skip] = None


def eval_batches(
    split: Split, settings: config.Data, own: range, batch_size: int, min_side: int = 1
) -> Generator[list[EvalImage], None, None]:
    """This worker's positions of every global batch. Each image of the split comes once, in order; the end is padded.

    Images are centre crops of `eval_crop`, or whole if that is `full`. An image with a side below the crop or below
    `min_side` is skipped.
    """
    side = None if settings.eval_crop == "full" else int(settings.eval_crop)
    blank = np.zeros((side or config.DOWNSAMPLING, side or config.DOWNSAMPLING, 3), np.uint8)

    def load(sample: Optional[Sample]) -> EvalImage:
        if sample is None:
            return EvalImage(blank, 0.0)
        try:
            data = read_sample(sample)
            image = patches.crop_centre(data, side) if side else images.decode(data)
            patches.check_size(image.shape[0], image.shape[1], min_side, upscale=False)
            return EvalImage(image, 1.0)
        except images.Unusable as error:
            return EvalImage(blank, 0.0, Skip(sample.name, str(error), classify_error(error)))

    samples = (sample for shard in split.shards for sample in shard.samples() if split.keep(sample.key))
    with ThreadPoolExecutor(settings.decode_threads or stack.count_cores(), "decode") as pool:
        pending: deque[list[Future[EvalImage]]] = deque()
        for _ in range(-(-split.images // batch_size)):
            group = [next(samples, None) for _ in range(batch_size)]
            pending.append([pool.submit(load, group[i]) for i in own])
            if len(pending) > 2:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
