"""The batches of each call of the graph. A thread collects them ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    """The batches of one call of n steps. `images`: for each local replica [n, b, P, P, 3] uint8."""

    images: list[np.ndarray]
    counts: np.ndarray  # [n, len(Counts)] float32: the input's counts for each step
    batches: list[Batch]  # without their images


class Feed:
    """This worker's input. It starts at `cursors` (one per global lane) and `step`. Use it with `contextlib.closing`.

    `waited`: seconds spent in `next_chunk` since `waited` was last set to zero.
    """

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
        self.reading = stream.Reading()
        self.waited = 0.0
        self.step = step  # the first of the next chunk
        lanes = world.lanes(world.batch_size)
        batches = stream.batches(
            split, settings.data, settings.seed, lanes, world.batch_size, list(cursors), self.reading
        )
        self.prefetch = stream.Prefetch(self._collect_chunks(batches, step))

    def next_chunk(self) -> Chunk:
        """The next chunk. If this worker must stop, a blank chunk of as many steps: all workers stop in its first."""
        began = time.perf_counter()
        first, self.step = self.step, self.timetable.end_of_call(self.step)
        chunk = None
        try:
            chunk = self.prefetch.next(lambda: self.stop.requested, self._warn_late)
        except HyperpriorError as error:
            self.stop.request(error)
        self.waited += time.perf_counter() - began
        return chunk or self._make_blank(self.step - first)

    def close(self) -> None:
        self.prefetch.close()

    def _collect_chunks(self, batches: Iterator[Batch], step: int) -> Iterator[Chunk]:
        with contextlib.closing(batches):  # type: ignore[type-var]
            while step < self.timetable.total:
                end = self.timetable.end_of_call(step)
                taken = [next(batches) for _ in range(step, end) if not self.stop.requested]
                if self.stop.requested:
                    return
                step = end
                images = np.stack([batch.images for batch in taken])
                yield Chunk(
                    np.split(images, self.world.local_replicas, axis=1),
                    np.array([batch.counts for batch in taken], np.float32),
                    [dataclasses.replace(batch, images=images[:0]) for batch in taken],
                )

    def _make_blank(self, steps: int) -> Chunk:
        side = self.settings.data.patch_size
        blank = np.zeros((steps, self.world.replica_batch, side, side, 3), np.uint8)
        return Chunk([blank] * self.world.local_replicas, np.zeros((steps, len(Counts._fields)), np.float32), [])

    def _warn_late(self, seconds: float) -> None:
        self.terminal.warn(f"no input for {seconds:.0f} s: waiting for {self.reading.name}")
