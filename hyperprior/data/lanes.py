"""The order of samples: a pure function of the seed and of positions, the same on every machine.

A *lane* is one position of the global batch. In epoch e, lane i of B visits the shards permute_shards(seed, e)[i::B],
one after another; the epochs never end. Within a visit the samples pass a shuffle buffer, seeded by (seed, e, shard).
A *cursor* is the position of a lane. Lanes do not wait for each other or depend on each other, so any number of
workers can own them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar, Union

from hyperprior.data.shards import Sample, Shard
from hyperprior.draws import draw, draw_unit
from hyperprior.errors import DataError

T = TypeVar("T")

MAX_EMPTY_EPOCHS = 1000


class Cursor(NamedTuple):
    """Where a lane continues: epoch, visit of the epoch, samples used of the visit, patches used of the next sample."""

    epoch: int = 0
    visit: int = 0
    offset: int = 0
    patch: int = 0


class Keep(NamedTuple):
    """Which samples belong to a split: `low <= hash(key) < high`, and another hash of the key is below `limit`.

    Do not rename this class or its fields: the text of the tuple is in the fingerprints of version 0.1.0.
    """

    low: float = 0.0
    high: float = 1.0
    limit: float = 1.0

    def __call__(self, key: str) -> bool:
        """Takes the key of a sample or of its group: both are kept, or neither."""
        if self == ALL:
            return True
        group = group_of(key)
        return self.low <= draw_unit("split", group) < self.high and draw_rank(group) < self.limit


class LostRest(NamedTuple):
    """The last item of a visit that ended early, because the rest of the shard cannot be read."""

    name: str
    reason: str


Item = Union[Sample, LostRest]
ALL = Keep()


def group_of(key: str) -> str:
    """WebDataset's key, which a photograph shares with its mask: `a/0` and `a/0.seg` are of the group `a/0`."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.partition(".")[0] or name)


def draw_rank(key: str) -> float:
    """The rank of a key, in [0, 1). data.max_images keeps the images with the lowest ranks."""
    return draw_unit("limit", key)


@functools.lru_cache(maxsize=4)  # all lanes ask for the same
def permute_shards(seed: int, epoch: int, count: int) -> list[int]:
    return sorted(range(count), key=lambda i: draw(seed, "shards", epoch, i))


def shuffle(items: Iterable[T], buffer_size: int, *seeds: object) -> Iterator[T]:
    """Passes `items` through a shuffle buffer. Each new item replaces a random item, which leaves the buffer."""
    buffer: list[T] = []
    for count, item in enumerate(items):
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        slot = draw(*seeds, count) % buffer_size
        leaving, buffer[slot] = buffer[slot], item
        yield leaving
    order = sorted(range(len(buffer)), key=lambda i: draw(*seeds, "rest", i)) if buffer_size > 1 else range(len(buffer))
    yield from (buffer[i] for i in order)


def ensure_enough_shards(shards: list[Shard], lanes: int) -> list[Shard]:
    """At least one shard for each lane. Too few shards are cut into interleaved parts, equally many for each lane."""
    if not shards or len(shards) >= lanes:
        return shards
    return [part for shard in shards for part in shard.split(lanes // math.gcd(len(shards), lanes))]


def read_lane(
    shards: list[Shard],
    keep: Keep,
    seed: int,
    lane: int,
    lanes: int,
    buffer_size: int,
    start: Cursor,
    tell_opening: Callable[[str], object] = lambda name: None,
) -> Iterator[tuple[Cursor, Item]]:
    """The items that lane `lane` of `lanes` reads from `start` on, without end, each with its own cursor.

    `tell_opening` gets the name of each shard before the shard is opened, because opening may take long. A lane may
    have no sample in an epoch, because each epoch distributes the shards anew. Raises DataError after a thousand such
    epochs in a row.
    """
    epoch, first_visit, first_offset, _ = start
    empty_epochs = 0
    while True:
        is_empty = True
        order = permute_shards(seed, epoch, len(shards))[lane::lanes]
        for visit in range(first_visit, len(order)):
            index = order[visit]
            tell_opening(shards[index].name)
            items = visit_shard(shards[index], keep, buffer_size, seed, "buffer", epoch, index)
            for offset, item in enumerate(items):
                if visit > first_visit or offset >= first_offset:
                    is_empty = False
                    yield Cursor(epoch, visit, offset), item
        empty_epochs = empty_epochs + 1 if is_empty else 0
        if empty_epochs > MAX_EMPTY_EPOCHS:
            raise DataError(
                f"lane {lane} of {lanes} finds no sample in {MAX_EMPTY_EPOCHS} epochs: the training data has fewer "
                f"images than train.batch_size has lanes; lower train.batch_size"
            )
        epoch, first_visit, first_offset = epoch + 1, 0, 0


def visit_shard(shard: Shard, keep: Keep, buffer_size: int, *seeds: object) -> Iterator[Item]:
    """The samples of one shard in the order of one visit, which `seeds` determine.

    If the shard is damaged, these are the samples before the damage, and then one LostRest.
    """
    lost: list[LostRest] = []

    def read_until_damage() -> Iterator[Sample]:
        try:
            yield from (sample for sample in shard.samples() if keep(sample.key))
        except DataError as error:
            lost.append(LostRest(shard.name, str(error)))

    yield from shuffle(read_until_damage(), buffer_size, *seeds)
    yield from lost
