"""Shards: tars, nested tars, directories and URLs as lists of image samples.

A *shard* is a tar file, a tar inside an outer tar (read in place, by offset), a list of image files, or a URL that
webdataset opens. One of k interleaved parts of any of these is also a shard. Nothing is extracted to disk.

webdataset divides shards among workers by RANK/WORLD_SIZE or torch.distributed, and does not know TF_CONFIG. So this
module reads the shards itself, and `lanes` divides them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Optional

from hyperprior.data import tars
from hyperprior.data.tars import is_tar
from hyperprior.errors import ConfigError, DataError, hide_secrets
from hyperprior.image_files import TRAINING_SUFFIXES, is_training_image, walk
from hyperprior.images import MAX_BYTES, describe_too_large

FILES_PER_PART = 1000  # a directory with more images is cut into parts

Ignored = dict[str, Counter[str]]  # by directory: the number of its files that are no training images, by extension


class Sample(NamedTuple):
    """One encoded image of a shard: its place in a file, from which `read` reads it, or its bytes from a stream.

    `problem`: why it has neither.
    """

    shard: str
    key: str
    path: str = ""
    offset: int = 0
    size: Optional[int] = None
    data: Optional[bytes] = None
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.key}"

    def read(self) -> bytes:
        """The encoded image. Raises DataError."""
        if self.problem:
            raise DataError(self.problem)
        if self.data is not None:
            return self.data
        try:
            if self.size is None and not Path(self.path).is_file() and Path(self.path).exists():
                raise DataError(f"{self.path} is no regular file")  # a pipe would wait for a writer
            size = Path(self.path).stat().st_size if self.size is None else self.size
            if size > MAX_BYTES:
                raise DataError(describe_too_large(size))
            return Path(self.path).read_bytes() if self.size is None else tars.read_at(self.path, self.offset, size)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Shard:
    """A list of images, or one part of it. Part `part` of `parts` holds samples part, part + parts, ... of the whole.

    The images depend on `kind`. tar: the tar in bytes [offset, offset + size) of `path`. loose: the images beside the
    inner tars of a nested tar. files: `files` below `path`. url: the tar that the URL `path` gives.
    """

    kind: str
    path: str
    name: str
    size: int = 0
    offset: int = 0
    files: tuple[str, ...] = field(default=(), repr=False)
    part: int = 0
    parts: int = 1
    extensions: tuple[str, ...] = ()  # of the images to take; all if empty

    def takes(self, name: str) -> bool:
        # The extension is all that follows the first dot of the file's name, such as `jpg` or `seg.png`.
        return not self.extensions or PurePosixPath(name).name.lower().partition(".")[2] in self.extensions

    def samples(self) -> Iterator[Sample]:
        """The images in the order of the tar or listing.

        Raises DataError if the shard is damaged: for a local tar before the first sample, for a URL where the damage
        is, at the latest after the last sample.
        """
        if self.kind == "url":
            streamed = (image for image in tars.stream_images(self.path, self.name) if self.takes(image[0]))
            for name, data, problem in itertools.islice(streamed, self.part, None, self.parts):
                yield Sample(self.name, make_key(name), data=data, problem=problem)
        elif self.kind == "files":
            for file in list(filter(self.takes, self.files))[self.part :: self.parts]:
                yield Sample(self.name, make_key(file), str(Path(self.path, file)))
        else:
            images = tars.list_images(self.path, self.offset, self.size, self.name, self.kind == "loose")
            taken = [member for member in images if self.takes(member.name)] if self.extensions else images
            for member in taken[self.part :: self.parts]:
                place = self.path, member.offset, member.size
                yield Sample(self.name, make_key(member.name), *place, problem=member.problem)

    def split(self, parts: int) -> list[Shard]:
        """The shard as `parts` interleaved shards."""
        # Part j of k of part p of q holds the samples whose index is p + q·j modulo q·k.
        return [replace(self, part=self.part + self.parts * j, parts=self.parts * parts) for j in range(parts)]


def make_key(name: str) -> str:
    """A sample's key: the full member name without its last extension."""
    return name.removeprefix("./").rpartition(".")[0]


# From sources to shards -----------------------------------------------------------------------------------


def open_sources(
    sources: Iterable[str],
    key: str,
    *,
    allow_pipe: bool = False,
    extensions: Iterable[str] = (),
    ignored: Optional[Ignored] = None,
) -> list[Shard]:
    """The shards of a list of sources, in a fixed order. Directories add to `ignored`, which need not be empty.

    `key` is the config key or command argument that errors name. Raises DataError for a source that is missing,
    unreadable, empty, or damaged as far as a quick check shows. Raises ConfigError for a source of unknown kind.
    """
    shards: list[Shard] = []
    for source in sources:
        for location in expand_braces(source):
            found = open_location(location, key, allow_pipe, {} if ignored is None else ignored)
            if not found:
                raise DataError(f"{key}: {location} holds no image ({', '.join(TRAINING_SUFFIXES)}) and no tar")
            shards += found
    extensions = tuple(extension.lower().lstrip(".") for extension in extensions)
    return [replace(shard, extensions=extensions) for shard in shards]


def expand_braces(source: str) -> list[str]:
    """The locations that a brace pattern stands for. Raises ConfigError."""
    if "{" not in source or source.startswith("pipe:"):  # in a command, braces belong to the shell
        return [source]
    from webdataset.shardlists import braceexpand

    try:
        return list(braceexpand.braceexpand(source))
    except ValueError as error:
        raise ConfigError(
            f"{hide_secrets(source)} is not a valid brace pattern: {error}; write shards-{{000000..000127}}.tar"
        ) from error


def is_remote(location: str) -> bool:
    """Whether webdataset opens this location, a URL or the output of a command."""
    return "://" in location or location.lower().startswith("pipe:")


def open_location(location: str, key: str, allow_pipe: bool, ignored: Ignored) -> list[Shard]:
    """The shards of a tar, image, directory or URL. Raises as `open_sources` does."""
    is_pipe = location.lower().startswith("pipe:")
    if is_pipe and not allow_pipe:
        raise ConfigError(
            f"{key}: {hide_secrets(location)} would run a shell command; set data.allow_pipe=true (--allow-pipe) to "
            f"allow it"
        )
    if is_remote(location):
        return [Shard("url", location, hide_secrets(location))]
    path = expand_home(location)
    try:
        if path.is_dir():
            return open_directory(path, key, allow_pipe, ignored)
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{key}: {location} is neither a regular file nor a directory")
        with path.open("rb"):
            pass
    except OSError as error:
        hint = ""
        if re.search(r"[*?\[]", location):
            hint = "; patterns with * are not expanded: name the folder, or write shards-{000000..000127}.tar"
        raise DataError(f"{key}: {location} cannot be read: {error.strerror}{hint}") from error
    if is_tar(path.name):
        return open_tar(str(path), size, ignored)
    if is_training_image(path.name):
        return [Shard("files", str(path.parent), str(path), files=(path.name,))]
    if tars.is_compressed_tar(path.name):
        raise make_compressed_error(key, path)
    raise ConfigError(
        f"{key}: {location} is not a tar, image or directory; allowed are *.tar, directories, "
        f"images ({', '.join(TRAINING_SUFFIXES)}) and URLs"
    )


def expand_home(location: str) -> Path:
    """The path with the user's folder in place of `~`. A `~name` that is no user stays, as in a shell."""
    with contextlib.suppress(RuntimeError):
        return Path(location).expanduser()
    return Path(location)


def open_directory(path: Path, key: str, allow_pipe: bool, ignored: Ignored) -> list[Shard]:
    """The images below a directory as shards of at most FILES_PER_PART images, and the tars below it."""

    def raise_unreadable(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename} cannot be read: {error.strerror}") from error

    images, inner_tars = [], []
    others = ignored[str(path)] = Counter[str]()
    for folder, files in walk(path, raise_unreadable):
        for file in files:
            if is_tar(file):
                inner_tars.append(str(Path(folder, file)))
            elif tars.is_compressed_tar(file):
                raise make_compressed_error(key, Path(folder, file))
            elif is_training_image(file):
                images.append(Path(folder, file).relative_to(path).as_posix())
            elif not file.startswith("."):
                others[PurePosixPath(file).suffix.lower()] += 1
    shards = [shard for tar in sorted(inner_tars) for shard in open_location(tar, key, allow_pipe, ignored)]
    if images:
        listing = Shard("files", str(path), str(path), files=tuple(sorted(images)))
        shards += listing.split(-(-len(images) // FILES_PER_PART))
    return shards


def make_compressed_error(key: str, path: Path | str) -> DataError:
    return DataError(f"{key}: {path} is compressed; decompress it, because tars are read in place, or move it away")


def open_tar(path: str, size: int, ignored: Ignored) -> list[Shard]:
    """One shard for a flat tar. For a tar of tars, one shard for each inner tar, and one for the loose images."""
    tars.check_ends(path, 0, size, path)
    whole = Shard("tar", path, path, size=size)
    # The first image or inner tar shows the kind, so a flat tar need not be read to its end.
    first = tars.find_first_image_or_tar(path, size)
    if first is None:
        members = tars.list_members(path, 0, size, path)  # raises DataError if the tar is damaged
        ignored[path] = Counter(PurePosixPath(member.name).suffix.lower() for member in members)
        return []
    if is_training_image(first):
        return [whole]
    shards = []
    members = tars.list_members(path, 0, size, path)
    for name, offset, length, problem, _ in members:
        if tars.is_compressed_tar(name):
            raise make_compressed_error(path, f"its member {name}")
        if is_tar(name):
            if problem:
                raise DataError(f"{path}//{name} cannot be read: {problem}")
            tars.check_ends(path, offset, length, f"{path}//{name}")
            shards.append(Shard("tar", path, f"{path}//{name}", size=length, offset=offset))
    if any(is_training_image(member.name) for member in members):
        shards.append(replace(whole, kind="loose"))
    return shards


def identify_shards(shards: list[Shard], *, as_in_0_1: bool = False) -> list[list[Any]]:
    """Identifies the data, whatever its folder: the last part of each name, the size or the files, and the part.

    Version 0.1.0 took the query of a URL for a part of its name.
    """
    names = [shard.path if shard.kind == "url" and as_in_0_1 else shard.name for shard in shards]
    return [
        [PurePosixPath(name).name, s.size, len(s.files), s.files[:1] + s.files[-1:], s.part, s.parts, *s.extensions]
        for name, s in zip(names, shards)
    ]
