"""Which sample is where: a pure function of the seed and of positions, apart from what machine this is.

A *lane* is one position of the global batch. Lane i of B visits, in epoch e, the shards
permutation(seed, e)[i::B], one after another, for ever; within a visit samples pass a shuffle buffer
seeded by (seed, e, shard). A lane's place is a *cursor*; lanes never wait for, or depend on, each other,
so any number of workers can own them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar, Union

from hyperprior.errors import DataError
from hyperprior.shards import Sample, Shard

T = TypeVar("T")

MAX_EMPTY_EPOCHS = 1000


class Cursor(NamedTuple):
    """Where a lane goes on: epoch, visit within it, samples consumed of the visit, patches cut of the next."""

    epoch: int = 0
    visit: int = 0
    offset: int = 0
    patch: int = 0


class Keep(NamedTuple):
    """Which samples belong to a split: `low <= hash(key) < high`, and hash of another kind below `limit`."""

    low: float = 0.0
    high: float = 1.0
    limit: float = 1.0

    def __call__(self, key: str) -> bool:
        return (self == ALL) or (self.low <= unit("split", key) < self.high and limit_hash(key) < self.limit)


class Lost(NamedTuple):
    """Stands where a visit ended early: the rest of a shard that cannot be read."""

    name: str
    reason: str


ALL = Keep()


def draw(*place: object) -> int:
    """64 random bits that depend on `place` alone, the same on every machine and version."""
    return int.from_bytes(
        hashlib.blake2b(repr(place).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def unit(*place: object) -> float:
    """A draw in [0, 1)."""
    return (draw(*place) >> 11) / 2**53


def limit_hash(key: str) -> float:
    return unit("limit", key)


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    return sorted(range(count), key=lambda i: draw(seed, "shards", epoch, i))


def shuffled(items: Iterable[T], buffer_size: int, *place: object) -> Iterator[T]:
    """`items` through a shuffle buffer: each leaves from a random slot, the next takes it."""
    buffer: list[T] = []
    for count, item in enumerate(items):
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        slot = draw(*place, count) % buffer_size
        item, buffer[slot] = buffer[slot], item
        yield item
    order = sorted(range(len(buffer)), key=lambda i: draw(*place, "rest", i)) if buffer_size > 1 else [0] * len(buffer)
    yield from (buffer[i] for i in order)


def enough_shards(shards: list[Shard], lanes: int) -> list[Shard]:
    """At least one shard for each lane: too few are cut into interleaved parts, as many for each lane."""
    if not shards or len(shards) >= lanes:
        return shards
    return [part for shard in shards for part in shard.split(lanes // math.gcd(len(shards), lanes))]


def lane_samples(
    shards: list[Shard],
    keep: Keep,
    seed: int,
    lane: int,
    lanes: int,
    buffer_size: int,
    start: Cursor,
    opening: Callable[[str], object] = lambda name: None,
) -> Iterator[tuple[Cursor, Union[Sample, Lost]]]:
    """What lane `lane` of `lanes` reads from `start` on, for ever, with each sample's own cursor.

    `opening` hears the name of each shard before it is read, which may take long. A shard that cannot be read
    gives what came before and one Lost. An epoch may leave a lane without a sample, since the next deals the
    shards anew; DataError is raised when a thousand in a row do.
    """
    epoch, visit, offset, _ = start
    empty_epochs = 0
    lost: list[Lost] = []

    def readable(shard: Shard) -> Iterator[Sample]:
        opening(shard.name)
        try:
            yield from (sample for sample in shard.samples() if keep(sample.key))
        except DataError as error:
            lost.append(Lost(shard.name, str(error)))

    while True:
        mine = permutation(seed, epoch, len(shards))[lane::lanes]
        while visit < len(mine):
            index = mine[visit]
            found = shuffled(readable(shards[index]), buffer_size, seed, "buffer", epoch, index)
            items: Iterator[Union[Sample, Lost]] = itertools.chain(found, lost)
            for position, item in enumerate(items):
                if position >= offset:
                    empty_epochs = 0
                    yield Cursor(epoch, visit, position), item
            lost.clear()
            visit, offset = visit + 1, 0
        empty_epochs += 1
        if empty_epochs > MAX_EMPTY_EPOCHS:
            raise DataError(
                f"lane {lane} of {lanes} finds no sample in {MAX_EMPTY_EPOCHS} epochs: the training data has fewer "
                f"images than train.batch_size has lanes; lower train.batch_size"
            )
        epoch, visit = epoch + 1, 0
