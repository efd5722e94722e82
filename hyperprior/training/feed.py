"""The batches of each call of the graph. A thread collects them ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from hyperprior.config import Config
from hyperprior.data import stream
from hyperprior.data.lanes import Cursor
from hyperprior.data.splits import Split
from hyperprior.data.stream import Batch, Counts
from hyperprior.errors import HyperpriorError
from hyperprior.terminal import Terminal
from hyperprior.training.distribute import World
from hyperprior.training.stop import StopRequest
from hyperprior.training.timetable import Timetable


class Chunk(NamedTuple):
    """The batches of one call of n steps, on the devices."""

    step: int  # the number of the first step
    images: Any  # per replica [n, b, P, P, 3] uint8
    counts: Any  # per replica [n, len(Counts)] float32: the input's counts for each step
    batches: list[Batch]  # without their images
    error: Optional[HyperpriorError] = None  # why the input ended here


class Feed:
    """This worker's input, from `cursors` (one per global lane) and `step` on. Use it with `contextlib.closing`."""

    def __init__(
        self,
        world: World,
        split: Split,
        settings: Config,
        timetable: Timetable,
        cursors: Sequence[Cursor],
        step: int,
        stop: StopRequest,
        terminal: Terminal,
    ):
        self.world, self.settings, self.timetable, self.stop, self.terminal = world, settings, timetable, stop, terminal
        self.reading = ""  # the name of the shard or sample that the input waits for
        self.step = step  # the first of the next chunk
        lanes = world.lanes(world.batch_size)
        start, tell = list(cursors), functools.partial(setattr, self, "reading")
        batches = stream.batches(split, settings.data, settings.seed, lanes, world.batch_size, start, tell)
        self.prefetch = stream.Prefetch(self._collect_chunks(batches, step))

    def next_chunk(self) -> Chunk:
        """The next chunk. If this worker must stop, a blank chunk of as many steps: all workers stop in its first."""
        first, self.step = self.step, self.timetable.end_of_call(self.step)
        try:
            chunk = self.prefetch.next(lambda: self.stop.requested, self._warn_late)
        except HyperpriorError as error:
            return self._make_blank(first, error)
        return chunk or self._make_blank(first)

    def close(self) -> None:
        self.prefetch.close()

    def _collect_chunks(self, batches: Iterator[Batch], step: int) -> Iterator[Chunk]:
        with contextlib.closing(batches):  # type: ignore[type-var]
            while step < self.timetable.total:
                end = self.timetable.end_of_call(step)
                taken = [next(batches) for _ in range(step, end) if not self.stop.requested]
                if self.stop.requested:
                    return
                images = np.stack([batch.images for batch in taken])
                yield self._make_chunk(step, images, [dataclasses.replace(batch, images=images[:0]) for batch in taken])
                step = end

    def _make_chunk(self, step: int, images: np.ndarray, batches: list[Batch]) -> Chunk:
        """Puts images [n, b of all local replicas, P, P, 3] and counts on the devices."""
        counts = np.zeros((len(images), len(Counts._fields)), np.float32)
        for row, batch in zip(counts, batches):
            row[:] = batch.counts
        parts = np.split(images, self.world.local_replicas, axis=1)
        return Chunk(step, self.world.place(parts), self.world.place_once(counts), batches)

    def _make_blank(self, first: int, error: Optional[HyperpriorError] = None) -> Chunk:
        side, batch = self.settings.data.patch_size, self.world.replica_batch * self.world.local_replicas
        blank = np.zeros((self.step - first, batch, side, side, 3), np.uint8)
        return self._make_chunk(first, blank, [])._replace(error=error)

    def _warn_late(self, seconds: float) -> None:
        self.terminal.warn(f"no input for {seconds:.0f} s: waiting for {self.reading}")
