"""The batches of each call of the graph."""

from __future__ import annotations

import contextlib
from pathlib import Path

from conftest import TINY, photos, tar_bytes

from hyperprior.config import load_config
from hyperprior.data.lanes import Cursor
from hyperprior.data.splits import open_splits
from hyperprior.terminal import Terminal
from hyperprior.training.distribute import World
from hyperprior.training.feed import Feed
from hyperprior.training.stop import StopRequest
from hyperprior.training.timetable import Timetable


def test_a_worker_that_stops_takes_as_many_steps_a_call_as_the_others(tmp_path: Path) -> None:
    """Every step sums over all workers, so calls of different lengths would wait for each other without end."""
    (tmp_path / "t.tar").write_bytes(tar_bytes(photos(12)))
    words = [f"data.train=[{tmp_path / 't.tar'}]", "train.steps=10", "train.steps_per_call=4"]
    settings = load_config(None, [*TINY, *words, "train.checkpoint_every=7", "summaries.scalars_every=100"])
    world, stop = World(settings.distribute, 4), StopRequest()
    splits = open_splits(settings.data, 4, count=False)
    timetable = Timetable(settings, 0, has_validation=False)
    stop.request()
    feed = Feed(world, splits.train, settings, timetable, [Cursor()] * 4, 0, stop, Terminal(quiet=True))
    with contextlib.closing(feed):
        chunks = [feed.next_chunk() for _ in range(3)]
    assert [(chunk.step, len(world.first(chunk.images))) for chunk in chunks] == [(0, 4), (4, 3), (7, 3)]
    assert not any(chunk.batches or world.first(chunk.counts).numpy().any() for chunk in chunks)
