"""The output of commands: a live block on a terminal, plain lines elsewhere, one-line errors, or JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

LATE = 30  # seconds of waiting between two warnings
PATIENCE = 4  # seconds that a process has to end by itself after a signal
CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")
SPEED_PERIOD = 300  # seconds over which the speed is measured that predicts the time left
NOTEBOOK = "JPY_PARENT_PID"  # set for the commands of a notebook: they have a terminal, but it cannot move its cursor


class Terminal:
    """`say` prints a line, `warn` prints a warning, and `track` shows the progress of slow work.

    With `as_json` only warnings and the argument of `tell` are printed.
    """

    def __init__(self, quiet: bool = False, to_stderr: bool = False, as_json: bool = False):
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=quiet or as_json, stderr=to_stderr)
        self.as_json, self.to_stderr = as_json, to_stderr
        self.errors = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)
        self.is_live = False  # while a live block is shown

    def say(self, text: str | Table) -> None:
        self.console.print(show_controls(text) if isinstance(text, str) else text, markup=False)

    def tell(self, result: Any) -> None:
        """Prints the result of a command as JSON, for programs. A command calls this once."""
        if self.as_json:
            print(json.dumps(result, indent=2), file=sys.stderr if self.to_stderr else sys.stdout)

    def warn(self, text: str) -> None:
        # Beside a live block, only its own console knows where the cursor is.
        console = self.console if self.is_live and self.errors.is_terminal else self.errors
        console.print(f"warning: {show_controls(text)}", style="yellow", markup=False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[str], None]]:
        """Yields f(name). Call f before each read. Until its next call, a warning names the read every LATE seconds."""
        began, name, ended = time.monotonic(), "", threading.Event()

        def wait_for(what: str) -> None:
            nonlocal began, name
            began, name = time.monotonic(), what

        def watch() -> None:
            warned, told = "", 0
            while not ended.wait(min(1, LATE / 4)):
                told = told if warned == name else 0
                if name and time.monotonic() - began > (told + 1) * LATE:
                    warned, told = name, told + 1
                    self.warn(f"nothing for {time.monotonic() - began:.0f} s: waiting for {name}")

        threading.Thread(target=watch, name="waiting", daemon=True).start()
        try:
            yield wait_for
        finally:
            ended.set()

    @contextlib.contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Track]:
        """Shows the progress of work: a live block on a terminal, the lines of `Track` elsewhere."""
        track = Track(self, label, total, done)
        if not self.console.is_interactive or self.console.quiet or NOTEBOOK in os.environ:
            yield track
            return
        with Live(get_renderable=track.render, console=self.console, refresh_per_second=4):
            self.is_live = True
            try:
                yield track
            finally:
                self.is_live = False


class Track:
    """The progress of `total` pieces of work. `rows`: the lines below the bar of a live block, by label."""

    def __init__(self, terminal: Terminal, label: str, total: int, done: int):
        self.terminal, self.label, self.total = terminal, label, total
        self.rows: dict[str, str] = {}
        bar = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[time]}")
        self.progress = Progress(*bar, console=terminal.console, expand=True, speed_estimate_period=SPEED_PERIOD)
        self.progress.add_task(label, total=total, completed=done, time="")
        (self.task,) = self.progress.tasks

    def update(self, done: int) -> None:
        self.progress.update(self.task.id, completed=done)

    def line(self, note: str, label: str = "") -> None:
        """Shows a note below the bar of a live block, or prints it as a line with the time left."""
        if self.terminal.is_live:
            self.rows[label] = note
        else:
            self.keep("  ".join(filter(None, (note, self.time_left()))))

    def keep(self, note: str) -> None:
        """Prints a note as a line, also above a live block."""
        done = f"{self.task.completed:>{len(str(self.total))}.0f}/{self.total}  "
        room = self.terminal.console.width - len(done) if self.terminal.is_live else len(note)
        self.terminal.say(done + shorten_note(note, room))

    def time_left(self) -> str:
        seconds = self.task.time_remaining
        return f"{timedelta(seconds=int(seconds))} left" if seconds else ""

    def render(self) -> Group:
        """The live block, in the width of the terminal."""
        elapsed = timedelta(seconds=int(self.task.elapsed or 0))
        self.progress.update(self.task.id, time=f"{elapsed} in all" if self.task.finished else self.time_left())
        heads = {label: f"{label:<{len(self.label)}} " for label in tuple(self.rows)}
        width = self.terminal.console.width
        rows = (head + shorten_note(self.rows[label], width - len(head)) for label, head in heads.items())
        return Group(self.progress, *(Text(show_controls(row), no_wrap=True, overflow="ellipsis") for row in rows))


def show_controls(text: str) -> str:
    """The text with control characters as escapes: the name of a file could otherwise command the terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shorten_note(note: str, room: int) -> str:
    """The first parts of the note that fit into `room` characters, at least one. Two spaces separate the parts."""
    parts = note.split("  ")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def exit_soon(code: int) -> None:
    """Ends this process with `code` if it has not ended by itself in PATIENCE seconds: a thread may hang in a read."""
    watchdog = threading.Timer(PATIENCE, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
