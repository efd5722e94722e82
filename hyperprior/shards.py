"""What the shards are: tars, nested tars, directories and URLs as lists of image samples.

A *shard* is a tar file, a tar inside an outer tar (read in place, by offset), a plain list of image
files, or a URL that webdataset opens; or one of k interleaved parts of any of these. Nothing is extracted
to disk. webdataset divides shards among workers by RANK/WORLD_SIZE or torch.distributed only and knows
nothing of TF_CONFIG, and its tar reader ends a damaged shard without a word; so shards are walked here,
and divided by `lanes.py`.
"""

from __future__ import annotations

import functools
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Optional

from hyperprior.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"))
FILES_PER_PART = 1000  # a directory of more images than this is cut into parts
BLOCK = tarfile.BLOCKSIZE
INDEXED = 1024  # tars whose members are remembered: all of ImageNet's, 250 MB


class Sample(NamedTuple):
    """One image of a shard, still encoded: its place (read when asked), or its bytes if it was streamed."""

    shard: str
    key: str
    path: str = ""
    offset: int = 0
    size: Optional[int] = None
    data: Optional[bytes] = None

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.key}"

    @property
    def is_file(self) -> bool:
        """A file of its own, rather than a member of a tar."""
        return self.data is None and self.size is None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        if self.is_file or self.size is None:
            try:
                return Path(self.path).read_bytes()
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}") from error
        return read_at(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Shard:
    """`kind` tar: bytes [offset, offset + size) of `path`; loose: the images that stand beside the tars of a
    nested tar; files: `files` below `path`; url: `path`.

    Part `part` of `parts` holds samples part, part + parts, ... of the whole.
    """

    kind: str
    path: str
    name: str
    size: int = 0
    offset: int = 0
    files: tuple[str, ...] = field(default=(), repr=False)
    part: int = 0
    parts: int = 1

    def samples(self) -> Iterator[Sample]:
        """The images in the order of the tar or listing.

        Raises DataError where the shard is damaged: for a local tar before the first sample, for a URL
        where the damage stands, at the latest after the last sample.
        """
        mine = slice(self.part, None, self.parts)
        if self.kind == "url":
            yield from itertools.islice(stream_tar(self.path), self.part, None, self.parts)
        elif self.kind == "files":
            for file in self.files[mine]:
                yield Sample(self.name, key_of(file), str(Path(self.path, file)))
        else:
            images = tar_images(self.path, self.offset, self.size, self.name, self.kind == "loose")
            for member, offset, size in images[mine]:
                yield Sample(self.name, key_of(member), self.path, offset, size)

    def split(self, parts: int) -> list[Shard]:
        # Part j of k of part p of q holds the samples whose index is p + q·j modulo q·k.
        return [replace(self, part=self.part + self.parts * j, parts=self.parts * parts) for j in range(parts)]


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    # "._name" is what macOS puts beside a file: not an image, whatever its extension says.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder whose names end so, in order; macOS's "._name" are none."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path for path in found if not path.name.startswith("._"))


def is_tar(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() == ".tar" and not path.name.startswith("._")


def key_of(name: str) -> str:
    """The full member name without its last extension."""
    name = name[2:] if name.startswith("./") else name
    return name[: -len(PurePosixPath(name).suffix)]


# Reading in place -----------------------------------------------------------------------------------------


class OpenFile:
    """A descriptor that many threads read by position; closed when the last of them lets go."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` is gone when Python ends
        if hasattr(self, "fd"):
            close(self.fd)


@functools.lru_cache(maxsize=128)
def open_file(path: str) -> OpenFile:
    return OpenFile(path)


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of `path` from `offset`; raises DataError when the file ends before or cannot be read."""
    try:
        file = open_file(path)
        data = os.pread(file.fd, size, offset)
        while len(data) < size:  # a signal or a network file system may cut a read short
            more = os.pread(file.fd, size - len(data), offset + len(data))
            if not more:
                raise DataError(f"{path} ends at byte {offset + len(data)}; it was longer when it was opened")
            data += more
    except (OSError, OverflowError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return data


class Window:
    """Bytes [start, start + size) of a file, as the seekable file that tarfile wants."""

    def __init__(self, path: str, start: int, size: int):
        self.path, self.start, self.size, self.position = path, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        count = left if count < 0 else min(count, left)
        data = read_at(self.path, self.start + self.position, count)
        self.position += count
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position


@functools.lru_cache(maxsize=INDEXED)
def tar_index(path: str, offset: int, size: int, name: str) -> tuple[tuple[str, int, int], ...]:
    """(member name, absolute offset of its data, size) of every regular file of a tar.

    tarfile, and so webdataset, takes a damaged header or stray zeros for the end of the archive. An
    undamaged tar has nothing but zeros after its last member, and reaches past it: anything else raises
    DataError, as do members that run past the end.
    """
    window = Window(path, offset, size)
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
            members = [m for m in tar if m.isreg()]
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is damaged or not an uncompressed tar: {error}") from error
    for member in members:
        if member.issparse():
            raise DataError(f"{name} holds {member.name} as a sparse file, in pieces; pack it without tar's --sparse")
        if member.offset_data + member.size > size:
            raise DataError(damage(name, f"member {member.name} runs past the end of the file"))
    if size < end + BLOCK:
        raise DataError(damage(name, f"it is cut off after {len(members)} members"))
    window.seek(end)
    while block := window.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(damage(name, f"a header at byte {end} is damaged, after {len(members)} members"))
    return tuple((m.name, offset + m.offset_data, m.size) for m in members)


@functools.lru_cache(maxsize=INDEXED)
def tar_images(path: str, offset: int, size: int, name: str, beside_tars: bool) -> tuple[tuple[str, int, int], ...]:
    """The rows of `tar_index` that are images. Raises DataError for tars in a place where they are not read."""
    members = tar_index(path, offset, size, name)
    inner = next((member for member, _, _ in members if is_tar(member)), None)
    if inner and not beside_tars:
        raise DataError(
            f"{name} holds the tar {inner} after images or inside an inner tar; a nested tar is one of tars, one "
            f"level deep: unpack the outer one, or give the inner tars as sources of their own"
        )
    return tuple(row for row in members if is_image(row[0]))


def damage(name: str, what: str) -> str:
    return f"{name} is damaged: {what}; restore or leave out this shard"


def looks_whole(path: str, offset: int, size: int, name: str) -> None:
    """The quick look that every local tar gets before a run starts; raises DataError."""
    if size == 0:
        raise DataError(f"{name} is empty; copy it anew")
    head = read_at(path, offset, min(size, BLOCK))
    if not head.strip(b"\0"):
        raise DataError(f"{name} is a tar without any member; leave it out or copy it anew")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{name} is not an uncompressed tar: {error}; decompress it, or copy it anew") from error
    if size % BLOCK or read_at(path, offset + size - BLOCK, BLOCK).strip(b"\0"):
        raise DataError(damage(name, "it does not end as a tar does; it looks cut off"))


# Streaming ------------------------------------------------------------------------------------------------


class Tail:
    """A stream that remembers how many bytes it gave and where the last one that is not zero stood."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.count, self.last_nonzero = stream, 0, 0

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        if stripped := data.rstrip(b"\0"):
            self.last_nonzero = self.count + len(stripped)
        self.count += len(data)
        return data


def stream_tar(url: str) -> Iterator[Sample]:
    """The images of a tar behind a URL, read once from front to back by webdataset's opener."""
    from webdataset.gopen import gopen

    end = 0
    try:
        with gopen(url) as stream:
            tail = Tail(stream)
            with tarfile.open(fileobj=tail, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg() and is_tar(member.name):
                        raise DataError(
                            f"{url}: member {member.name} is a tar; nested tars are read in place from "
                            f"local files only; give the inner tars as URLs of their own"
                        )
                    if member.isreg() and is_image(member.name):
                        data = tar.extractfile(member).read()
                        yield Sample(url, key_of(member.name), data=data)
                    end = tar.offset
                    tar.members = []  # tarfile would keep every header
            while tail.read(1 << 20):
                pass
            if tail.last_nonzero > end or tail.count < end + BLOCK:
                raise DataError(damage(url, f"it stops being a tar at byte {end} of {tail.count}"))
    except (OSError, ValueError, AssertionError, tarfile.TarError) as error:
        raise DataError(f"{url} cannot be read as a tar: {error}") from error


# From sources to shards -----------------------------------------------------------------------------------


def open_sources(sources: Iterable[str], key: str, *, allow_pipe: bool = False) -> list[Shard]:
    """The shards of a list of sources, in a fixed order.

    `key` is the config key or command argument to blame. Raises DataError for a source that is missing,
    unreadable, empty or damaged as far as a quick look can tell, ConfigError for one of no known kind.
    """
    shards: list[Shard] = []
    for source in sources:
        found: list[Shard] = []
        for location in expand_braces(source):
            found += open_location(location, key, allow_pipe)
        if not found:
            raise DataError(f"{key}: {source} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}) and no tar")
        shards += found
    return shards


def expand_braces(source: str) -> list[str]:
    if "{" not in source or source.startswith("pipe:"):  # there braces belong to the shell
        return [source]
    from webdataset.shardlists import braceexpand

    try:
        return list(braceexpand.braceexpand(source))
    except ValueError as error:
        raise ConfigError(f"{source} is no pattern: {error}; write shards-{{000000..000127}}.tar") from error


def open_location(location: str, key: str, allow_pipe: bool) -> list[Shard]:
    if location.lower().startswith("pipe:"):
        if not allow_pipe:
            raise ConfigError(
                f"{key}: {location} would run a shell command; set data.allow_pipe=true (--allow-pipe) to let it"
            )
        return [Shard("url", location, location)]
    if "://" in location:
        return [Shard("url", location, location)]
    path = Path(location).expanduser()
    try:
        if path.is_dir():
            return open_directory(path, key, allow_pipe)
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{key}: {location} cannot be read: {error.strerror}") from error
    if is_tar(path.name):
        return open_tar(str(path), size)
    if is_image(path.name):
        return [Shard("files", str(path.parent), str(path), files=(path.name,))]
    raise ConfigError(
        f"{key}: {location} is no tar, image or directory; allowed are *.tar, directories, "
        f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) and URLs"
    )


def other_files(folder: Path, wanted: Callable[[str], bool]) -> Counter[str]:
    """How many files below a directory are not wanted by their names, by extension; hidden ones do not count."""
    others = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return Counter(path.suffix.lower() for path in others if not wanted(path.name))


def describe_others(others: Counter[str]) -> str:
    return ", ".join(f"{suffix or 'no extension'} {count:,}" for suffix, count in sorted(others.items()))


def open_directory(path: Path, key: str, allow_pipe: bool) -> list[Shard]:
    """The images below a directory as shards of about FILES_PER_PART, and each tar in it."""

    def fail(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename} cannot be read: {error.strerror}") from error

    images, tars = [], []
    seen: set[str] = set()
    for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for file in files:
            if is_tar(file):
                tars.append(str(Path(folder, file)))
            elif is_image(file):
                images.append(Path(folder, file).relative_to(path).as_posix())
    shards = [shard for tar in sorted(tars) for shard in open_location(tar, key, allow_pipe)]
    if images:
        listing = Shard("files", str(path), str(path), files=tuple(sorted(images)))
        shards += listing.split(-(-len(images) // FILES_PER_PART))
    return shards


def open_tar(path: str, size: int) -> list[Shard]:
    """One shard for a flat tar; for a tar of tars one for each inner tar, and one for loose images."""
    looks_whole(path, 0, size, path)
    whole = Shard("tar", path, path, size=size)
    # The first image or tar tells which kind it is: a flat tar need not be walked before it is read.
    try:
        with tarfile.open(fileobj=Window(path, 0, size), mode="r:") as tar:  # type: ignore[call-overload]
            first = next((m.name for m in tar if m.isreg() and (is_image(m.name) or is_tar(m.name))), None)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is damaged or not an uncompressed tar: {error}") from error
    if first is None:
        tar_index(path, 0, size, path)  # raises if damage hides the rest
        return []
    if is_image(first):
        return [whole]
    shards = []
    members = tar_index(path, 0, size, path)
    for name, offset, length in members:
        if is_tar(name):
            looks_whole(path, offset, length, f"{path}//{name}")
            shards.append(Shard("tar", path, f"{path}//{name}", size=length, offset=offset))
    if any(is_image(name) for name, _, _ in members):
        shards.append(replace(whole, kind="loose"))
    return shards


def describe_shards(shards: list[Shard]) -> list[list[Any]]:
    """What identifies the data wherever it lies: the last part of each name, bytes or files, and parts."""
    return [
        [PurePosixPath(s.name).name, s.size, len(s.files), s.files[:1] + s.files[-1:], s.part, s.parts] for s in shards
    ]
