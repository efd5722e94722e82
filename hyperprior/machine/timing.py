"""Times calls: a figure is the median of its repeats, with the smallest and the largest beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Seconds, or a rate."""

    median: float
    low: float
    high: float
    repeats: int


def summarise(values: list[float]) -> Timing:
    return Timing(statistics.median(values), min(values), max(values), len(values))


def time_call(call: Callable[[], Any], repeats: int, count: int = 1) -> Timing:
    """Seconds of one of the `count` items of `call()`. A first call, for tracing and caches, is not counted."""
    return time_in_turn({"": call}, repeats, count)[""]


def time_in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int, count: int = 1) -> dict[str, Timing]:
    """`time_call` of several calls, measured in turn, so that a drift of the machine affects all of them."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - began) / count)
    return {name: summarise(values) for name, values in seconds.items()}


def describe(timing: Timing, form: str = "{:.4f} s") -> str:
    return f"{form} ({form} to {form})".format(timing.median, timing.low, timing.high)
