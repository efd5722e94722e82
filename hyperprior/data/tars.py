"""Reads tars in place: their members, the offset of each member, and whether the tar is complete.

Python's tarfile, and therefore webdataset, takes a damaged header or stray zeros for the end of an archive, and
silently loses the rest. This module raises DataError instead.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, NoReturn, Optional

from hyperprior.errors import DataError
from hyperprior.image_files import is_training_image
from hyperprior.images import MAX_BYTES, describe_too_large

BLOCK = tarfile.BLOCKSIZE
INDEXED = 1024  # tars whose members are cached: enough for all tars of ImageNet, 250 MB
OPEN_FILES = 128
READ_AHEAD = 1 << 20
COMPRESSIONS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"(\xb5/\xfd": "unzstd",
    b"PK\3": "unzip",
}
COMPRESSED_SUFFIXES = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LINKS = 40  # that lead to one file, as in Linux
MAX_EXTENSION = 1 << 20  # bytes of a long name, or of what pax adds to a header
MAX_READS_AT_END = 8  # of a stream
EXTENSIONS = (b"L", b"K", b"x", b"g", b"X")
BROKEN = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)  # what tarfile raises for damage


class Member(NamedTuple):
    """A file of a tar: `offset` and `size` of its data in the outermost file, or the `problem` why it has none.

    `target`: the path that a link leads to, within its tar, until the link is replaced by that file.
    """

    name: str
    offset: int = 0
    size: int = 0
    problem: str = ""
    target: str = ""


def is_tar(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() == ".tar" and not path.name.startswith("._")  # macOS writes a "._name" beside a file


def is_any_tar(name: str) -> bool:
    return is_tar(name) or is_compressed_tar(name)


def is_compressed_tar(name: str) -> bool:
    return name.lower().endswith(COMPRESSED_SUFFIXES) and not PurePosixPath(name).name.startswith("._")


# Reading by position --------------------------------------------------------------------------------------


class OpenFile:
    """A descriptor that many threads read by position. It is closed with the last reference to this object."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if hasattr(self, "fd"):
            close(self.fd)


@functools.lru_cache(maxsize=OPEN_FILES)
def open_file(path: str) -> OpenFile:
    return OpenFile(path)


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of `path` from `offset`. Raises DataError if the file is too short or cannot be read."""
    try:
        file = open_file(path)
        data = os.pread(file.fd, size, offset)
        while len(data) < size:  # a signal or a network file system may cut a read short
            more = os.pread(file.fd, size - len(data), offset + len(data))
            if not more:
                raise DataError(f"{path} ends at byte {offset + len(data)}; the file was longer when it was opened")
            data += more
    except (OSError, OverflowError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return data


class Window:
    """Bytes [start, start + size) of a file, as the seekable file object that tarfile needs."""

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


# The members of a tar -------------------------------------------------------------------------------------


class Refused(tarfile.TarError):
    """A tar that tarfile would read, but that is not read here. The text goes on after the tar's name."""


class Header(tarfile.TarInfo):
    """A header. It is refused if tarfile would next read a large extension, or the map of a sparse file."""

    @classmethod
    def frombuf(cls, *args: Any) -> Header:
        header = super().frombuf(*args)
        if header.type in EXTENSIONS and header.size > MAX_EXTENSION:
            raise Refused(f"has a header of {header.size:,} bytes; at most {MAX_EXTENSION:,} are read")
        if header.type == tarfile.GNUTYPE_SPARSE:
            refuse_sparse(header)
        return header


def refuse_sparse(header: tarfile.TarInfo) -> NoReturn:
    raise Refused(f"holds {header.name} as a sparse file, in pieces; make the tar without --sparse")


def read_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The header of each member that is no folder. Raises BROKEN."""
    for header in tar:
        # Otherwise tarfile keeps every header in memory, each with a copy of the tar's global header.
        tar.members = []  # type: ignore[attr-defined]
        if header.size < 0:  # tarfile would go back, and read the same headers for ever
            raise Refused(f"is damaged: member {header.name} has a size of {header.size}")
        if not header.pax_headers.get("size", "0").isdecimal():  # tarfile would take it for 0
            raise Refused(f"is damaged: member {header.name} has a size of `{header.pax_headers['size']}`")
        if header.size and not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            raise Refused(f"is damaged: member {header.name} is no file, but has data; some tools read it as members")
        if header.issparse():
            refuse_sparse(header)
        if not header.isdir():
            yield header


def make_header_error(name: str, error: Exception) -> DataError:
    """The error for a tar whose headers gave one of BROKEN."""
    reason = str(error) if isinstance(error, Refused) else f"is damaged or not an uncompressed tar: {error}"
    return DataError(f"{name} {in_one_line(reason)}")


def in_one_line(text: str) -> str:
    """A text that contains names of members, which may have line breaks."""
    return text.replace("\n", "\\n")


@functools.lru_cache(maxsize=INDEXED)
def list_members(path: str, offset: int, size: int, name: str) -> tuple[Member, ...]:
    """Every file of the tar in bytes [offset, offset + size) of `path`. Errors call the tar `name`.

    A hard or symbolic link is the file of the tar that it leads to. After its last member a tar must have zeros, and
    nothing else. Otherwise DataError is raised, and also if a member runs past the end of the tar.
    """
    window = Window(path, offset, size)
    members = []
    try:
        with tarfile.open(fileobj=window, mode="r:", tarinfo=Header) as tar:  # type: ignore[call-overload]
            for header in read_headers(tar):
                member = make_member(header)
                if member.offset + member.size > size:
                    raise make_damage_error(name, f"member {member.name} runs past the end of the file")
                members.append(member)
            end = tar.offset
    except BROKEN as error:
        raise make_header_error(name, error) from error
    if size < end + BLOCK:
        raise make_damage_error(name, f"it is cut off after {len(members)} members")
    window.seek(end)
    while block := window.read(READ_AHEAD):
        if block.strip(b"\0"):
            raise make_rest_error(name, block, end, f"a header at byte {end} is damaged, after {len(members)} members")
    by_path = {posixpath.normpath(member.name): member for member in members}
    return tuple(follow_links(member, by_path, offset) for member in members)


def make_member(header: tarfile.TarInfo) -> Member:
    if header.isreg():
        return Member(header.name, header.offset_data, header.size)
    folder = posixpath.dirname(header.name) if header.issym() else ""  # a symbolic link is relative to its folder
    target = posixpath.normpath(posixpath.join(folder, header.linkname)) if header.issym() or header.islnk() else ""
    return Member(header.name, target=target, problem=describe_no_file(header))


def follow_links(member: Member, by_path: Mapping[str, Member], offset: int) -> Member:
    target: Optional[Member] = member
    for _ in range(MAX_LINKS):
        if target is None or not target.problem:
            break
        target = by_path.get(target.target)
    if target and not target.problem:
        return Member(member.name, offset + target.offset, target.size)
    return Member(member.name, problem=f"it is {member.problem}, not a file of this tar")


def describe_no_file(header: tarfile.TarInfo) -> str:
    """Why a member that is no regular file cannot be read."""
    if header.issym() or header.islnk():
        return f"a link to {header.linkname}"
    return "neither a file nor a link"


@functools.lru_cache(maxsize=INDEXED)
def list_images(path: str, offset: int, size: int, name: str, beside_tars: bool) -> tuple[Member, ...]:
    """The members of a tar that are images. Raises DataError as `list_members` does.

    An inner tar also raises DataError, unless the images are `beside_tars`.
    """
    members = list_members(path, offset, size, name)
    inner = next((member.name for member in members if is_any_tar(member.name)), None)
    if inner and not beside_tars:
        raise DataError(
            f"{name} holds the tar {in_one_line(inner)} after images or inside an inner tar; a nested tar must begin "
            f"with tars, and can be only one level deep: unpack the outer tar, or give the inner tars as separate "
            f"sources"
        )
    return tuple(member for member in members if is_training_image(member.name))


def find_first_image_or_tar(path: str, size: int) -> str | None:
    """The name of the first member that is an image or any tar. The rest is not read. Raises DataError."""
    try:
        window = Window(path, 0, size)
        with tarfile.open(fileobj=window, mode="r:", tarinfo=Header) as tar:  # type: ignore[call-overload]
            names = (header.name for header in read_headers(tar))
            return next((name for name in names if is_training_image(name) or is_any_tar(name)), None)
    except BROKEN as error:
        raise make_header_error(path, error) from error


def check_ends(path: str, offset: int, size: int, name: str) -> None:
    """Checks only the first and the last block. This runs for every local tar before a run. Raises DataError."""
    if size == 0:
        raise DataError(f"{name} is empty; copy it again")
    head = read_at(path, offset, min(size, BLOCK))
    if not head.strip(b"\0"):
        raise DataError(f"{name} is a tar without any member; leave it out or copy it again")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        reason = describe_compression(head) or f"{error}; copy it again"
        raise DataError(f"{name} is not an uncompressed tar: {reason}") from error
    if size % BLOCK or read_at(path, offset + size - BLOCK, BLOCK).strip(b"\0"):
        raise make_damage_error(name, "it does not end like a tar, and looks cut off")


def make_rest_error(name: str, rest: bytes, end: int, reason: str) -> DataError:
    """The error for a tar that is followed by `rest`, from byte `end` on. `reason`: what it is if not another tar."""
    start = len(rest) - len(rest.lstrip(b"\0"))
    start -= start % BLOCK
    try:
        tarfile.TarInfo.frombuf(rest[start : start + BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return make_damage_error(name, reason)
    return DataError(
        f"{name} holds several tars, one after the other: the first ends at byte {end}; keep them in files of their "
        f"own, or join them with `tar --concatenate`"
    )


def describe_compression(head: bytes) -> str:
    """Says how to decompress a file that begins with `head`, or nothing if it is not compressed."""
    for magic, program in COMPRESSIONS.items():
        if head.startswith(magic):
            return f"it is compressed; decompress it with {program}, because tars are read in place"
    return ""


def make_damage_error(name: str, reason: str) -> DataError:
    return DataError(f"{name} is damaged: {in_one_line(reason)}; restore or leave out this shard")


# Streaming ------------------------------------------------------------------------------------------------


class CountingStream:
    """A stream that counts the bytes read, and stores where the last byte that is not zero ended."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.count, self.last_nonzero, self.head, self.reads_at_end = stream, 0, 0, b"", 0

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.reads_at_end += not data
        if self.reads_at_end > MAX_READS_AT_END:  # tarfile reads on, block by block, for all the bytes of a member
            raise tarfile.ReadError("unexpected end of data")
        self.head = self.head or data[:BLOCK]
        if stripped := data.rstrip(b"\0"):
            self.last_nonzero = self.count + len(stripped)
        self.count += len(data)
        return data


def stream_images(url: str, name: str) -> Iterator[tuple[str, bytes, str]]:
    """(member name, bytes, problem) of the images of the tar at a URL, which webdataset's opener reads once.

    Errors call the tar `name`, because the URL may hold secrets. A link has a problem instead of bytes: its file may be
    far back in the stream. Raises DataError where the damage is, at the latest after the last image.
    """
    from webdataset.gopen import gopen

    counting = None
    try:
        with gopen(url) as stream:
            counting = CountingStream(stream)
            with tarfile.open(fileobj=counting, mode="r|", tarinfo=Header) as tar:  # type: ignore[call-overload]
                for member in read_headers(tar):
                    if member.isreg() and is_any_tar(member.name):
                        raise DataError(
                            f"{name}: member {in_one_line(member.name)} is a tar; nested tars are read in place from "
                            f"local files only; give the inner tars as separate URLs"
                        )
                    if is_training_image(member.name):
                        if not member.isreg():
                            yield member.name, b"", f"it is {describe_no_file(member)}; a stream holds no links"
                        elif member.size > MAX_BYTES:
                            yield member.name, b"", describe_too_large(member.size)
                        else:
                            yield member.name, tar.extractfile(member).read(), ""
                end = tar.offset
            while rest := counting.read(READ_AHEAD):
                if rest.strip(b"\0"):
                    raise make_rest_error(name, rest, end, f"it is not a tar from byte {end} on")
            if counting.last_nonzero > end or counting.count < end + BLOCK:
                raise make_damage_error(name, f"it is not a tar from byte {end} of {counting.count} on")
    except ModuleNotFoundError as error:
        raise DataError(f"{name} needs {error.name}, which is not installed: `pip install {error.name}`") from error
    except Refused as error:
        raise make_header_error(name, error) from error
    except (OSError, AssertionError, *BROKEN) as error:
        failed = re.search(r": exit (-?\d+) \(read\)", str(error))  # after the command, which may hold secrets
        reason = f"its command ended with exit code {failed[1]}" if failed else str(error)
        reason = describe_compression(counting.head if counting else b"") or reason
        raise DataError(f"{name} cannot be read as a tar: {reason}") from error
