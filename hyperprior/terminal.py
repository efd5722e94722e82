"""What commands say: a progress bar on a terminal, plain lines elsewhere, one-line errors, or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

WIDE = 140  # characters: from here on a bar and the time taken fit too


class Terminal:
    """`say` for what happens, `warn` for what may be wrong, `track` for what takes long.

    With `as_json` all that is printed is what `tell` gets, and warnings.
    """

    def __init__(self, quiet: bool = False, to_stderr: bool = False, as_json: bool = False):
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=quiet or as_json, stderr=to_stderr)
        self.as_json, self.to_stderr = as_json, to_stderr
        self.errors = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)
        self._progress: Optional[Progress] = None

    def say(self, text: str | Table) -> None:
        self.console.print(text, markup=False)

    def tell(self, found: Any) -> None:
        """What a command found, for programs; once for each command."""
        if self.as_json:
            print(json.dumps(found, indent=2), file=sys.stderr if self.to_stderr else sys.stdout)

    def warn(self, text: str) -> None:
        self.errors.print(f"warning: {text}", style="yellow", markup=False)

    @contextlib.contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Track]:
        """A progress display; where there is no terminal only `Track.line` shows."""
        if not self.console.is_terminal:
            yield Track(self, None, total)
            return
        wide = self.console.width >= WIDE
        columns = (
            TextColumn("{task.description}"),
            *([BarColumn()] if wide else []),  # step and time left come first
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
            room = width - (84 if width >= WIDE else 40)  # what the columns before the note take
            progress.update(task, completed=done, **({} if note is None else {"note": shortened(note, room)}))

    def line(self, done: int, note: str) -> None:
        """A note beside the bar, or a line of its own where there is no bar."""
        self.update(done, note)
        if not self.bar:
            self.terminal.say(f"{done}/{self.total}  {note}")


def shortened(note: str, room: int) -> str:
    """As many of its parts, two spaces apart, as fit, but at least the first."""
    parts = note.split("  ")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)
