"""Which files are images, by their names, and which files a folder holds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn, Optional

TRAINING_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm")


def is_training_image(name: str) -> bool:
    path = PurePosixPath(name)
    # macOS writes a "._name" beside a file. It is not an image, whatever its extension.
    return path.suffix.lower() in TRAINING_SUFFIXES and not path.name.startswith("._")


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder that have one of the suffixes, sorted, without the "._name" files of macOS."""
    paths = (path for path in walk_files(folder) if path.suffix.lower() in suffixes)
    return sorted(path for path in paths if not path.name.startswith("._"))


def walk_files(folder: Path) -> Iterator[Path]:
    """The regular files below a folder, and links that lead nowhere. Raises OSError if a folder cannot be read."""

    def raise_unreadable(error: OSError) -> NoReturn:
        raise error

    for inner, files in walk(folder, raise_unreadable):
        yield from (path for path in (Path(inner, file) for file in files) if path.is_file() or not path.exists())


def walk(path: Path, on_error: Optional[Callable[[OSError], object]] = None) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of a directory and all folders below it, also behind links, each once."""
    visited: set[str] = set()
    for folder, folders, files in os.walk(path, onerror=on_error, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder that was visited
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield folder, files


def is_below(path: Path, folder: Optional[Path]) -> bool:
    return folder is not None and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def describe_other_files(folder: Path, known: Sequence[str], leave_out: Optional[Path] = None) -> str:
    """A sentence on the files below a folder without one of the `known` suffixes, or "". Hidden files do not count."""
    files = (path for path in walk_files(folder) if not path.name.startswith("."))
    unknown = (path for path in files if not path.name.lower().endswith(tuple(known)))
    others = Counter(path.suffix.lower() for path in unknown if not is_below(path, leave_out))
    return f"{folder} also holds files without an image suffix: {describe_suffixes(others)}" if others else ""


def describe_suffixes(counts: Counter[str]) -> str:
    """The number of files of each extension, as text."""
    return ", ".join(f"{suffix or 'no extension'} {count:,}" for suffix, count in sorted(counts.items()))
