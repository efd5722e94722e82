"""The output of commands: a progress bar on a terminal, plain lines elsewhere, one-line errors, or JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

LATE = 30  # seconds of waiting between two warnings
PATIENCE = 4  # seconds that a process has to end by itself after a signal
CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")
WIDE = 140  # characters; from this width on, a bar and the elapsed time also fit


class Terminal:
    """`say` prints a line, `warn` prints a warning, and `track` shows the progress of slow work.

    With `as_json` only warnings and the argument of `tell` are printed.
    """

    def __init__(self, quiet: bool = False, to_stderr: bool = False, as_json: bool = False):
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=quiet or as_json, stderr=to_stderr)
        self.as_json, self.to_stderr = as_json, to_stderr
        self.errors = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)

    def say(self, text: str | Table) -> None:
        self.console.print(show_controls(text) if isinstance(text, str) else text, markup=False)

    def tell(self, result: Any) -> None:
        """Prints the result of a command as JSON, for programs. A command calls this once."""
        if self.as_json:
            print(json.dumps(result, indent=2), file=sys.stderr if self.to_stderr else sys.stdout)

    def warn(self, text: str) -> None:
        self.errors.print(f"warning: {show_controls(text)}", style="yellow", markup=False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[str], None]]:
        """Yields f(name). While nothing but a read of `name` goes on, a warning says so every LATE seconds."""
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
        """Shows a progress display. Without a terminal only `Track.line` prints."""
        if not self.console.is_terminal:
            yield Track(self, None, total)
            return
        wide = self.console.width >= WIDE
        columns = (
            TextColumn("{task.description}"),
            *([BarColumn()] if wide else []),  # in a narrow terminal the step and the remaining time are more useful
            MofNCompleteColumn(),
            *([TimeElapsedColumn()] if wide else []),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=total, completed=done, note="")
            yield Track(self, (progress, task), total)


class Track:
    def __init__(self, terminal: Terminal, bar: Optional[tuple], total: int):
        self.terminal, self.bar, self.total = terminal, bar, total

    def update(self, done: int, note: Optional[str] = None) -> None:
        if self.bar:
            progress, task = self.bar
            width = self.terminal.console.width
            room = width - (84 if width >= WIDE else 40)  # the columns before the note take 84 or 40
            progress.update(task, completed=done, **({} if note is None else {"note": shorten_note(note, room)}))

    def line(self, done: int, note: str) -> None:
        """Shows a note beside the bar, or prints it as a line if there is no bar."""
        self.update(done, note)
        if not self.bar:
            self.terminal.say(f"{done}/{self.total}  {note}")


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
