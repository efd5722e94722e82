"""The commands on files: `hyperprior compress` and `decompress`."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, Optional, TextIO

import numpy as np
from PIL import Image

from hyperprior import image_files, images, storage
from hyperprior.codec import box, container, load
from hyperprior.errors import ConfigError, DataError, HyperpriorError, StorageError
from hyperprior.image_files import PHOTO_SUFFIXES
from hyperprior.metric_table import describe
from hyperprior.model.quality import compare_images
from hyperprior.terminal import Terminal

if TYPE_CHECKING:
    from hyperprior.codec.codec import Codec

SUFFIX = ".hyp"
ANY_SIZE = 2**32  # pixels: more than a header can declare
Existing = Literal["refuse", "replace", "skip"]  # what becomes of sources whose target exists
STANDARD = "-"  # standard input or output
QUALITIES = ("psnr_db", "ms_ssim")  # the metrics that --verify prints

# Options for formats that lose much by default: with them, a decoded image loses nothing, or little.
BEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 97, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 97, "subsampling": "4:4:4"},
}
# In these, Pillow changes the size or colours of a photograph, or repeats it with another quality.
NO_PHOTOGRAPHS = ("EPS", "GIF", "ICNS", "ICO", "MPO", "PDF")


class Job(NamedTuple):
    source: str
    target: str


# Which file becomes which ---------------------------------------------------------------------------------


def plan(
    sources: Sequence[str], out: Optional[str], suffixes: Sequence[str], new_suffix: str, existing: Existing
) -> list[Job]:
    """The job of each source. Its target is beside it, in the directory `out`, or `out` itself.

    Directories are searched for `suffixes`. `existing` says what becomes of sources whose target exists. Raises
    ConfigError, before any file is read, if a source is missing, if two sources have one target, or if a target exists
    and must not be overwritten.
    """
    try:
        names = list_sources(sources, suffixes)
        targets = choose_targets(names, sources, out, new_suffix)
        jobs = [Job(source, target) for (source, _), target in zip(names, targets)]
        return list(select_jobs(jobs, existing))
    except OSError as error:  # a name that is too long, a directory without permission
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def list_sources(sources: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """(source, its path below an output directory) of every named file, and of every file in a named directory."""
    names: list[tuple[str, str]] = []
    for source in sources:
        path = Path(source)
        if source == STANDARD:
            names.append((source, "stdin"))
        elif path.is_dir():
            inside = image_files.list_files(path, suffixes)
            if not inside:
                raise ConfigError(f"{path} holds no file with one of {', '.join(suffixes)}")
            names += [(str(file), str(file.relative_to(path))) for file in inside]
        elif path.exists():
            names.append((source, path.name))
        else:
            raise ConfigError(f"{source} does not exist; name images, directories, or - for stdin")
    return names


def choose_targets(
    names: Sequence[tuple[str, str]], sources: Sequence[str], out: Optional[str], new_suffix: str
) -> Iterator[str]:
    """The target of each of `names`, which `list_sources` returned for `sources`."""
    are_several = len(names) > 1 or any(Path(source).is_dir() for source in sources)
    if out == STANDARD and are_several:
        raise ConfigError(f"{len(names)} files cannot all go to standard output; give a directory with -o")
    is_folder = out not in (None, STANDARD) and (are_several or out.endswith(os.sep) or Path(out).is_dir())
    if is_folder and Path(out or "").is_file():
        raise ConfigError(f"{out} is a file; {len(names)} files need a directory")
    for source, name in names:
        if out and is_folder:
            yield str(Path(out, name).with_suffix(new_suffix))
        else:
            yield out or (STANDARD if source == STANDARD else str(Path(source).with_suffix(new_suffix)))


def select_jobs(jobs: Sequence[Job], existing: Existing) -> Iterator[Job]:
    """The jobs to do. Raises ConfigError if a target would be written twice, or if it must not be overwritten."""
    source_of: dict[str, str] = {}
    for job in jobs:
        place = Path(job.target)
        real = os.path.realpath(place)
        if real in source_of and job.target != STANDARD:
            raise ConfigError(f"{source_of[real]} and {job.source} would both become {job.target}")
        source_of[real] = job.source
        if job.target == STANDARD or not place.exists():
            yield job
            continue
        if job.source != STANDARD and Path(job.source).exists() and place.samefile(job.source):
            raise ConfigError(f"{job.source} would overwrite itself; give another -o")
        if not place.is_file():
            raise ConfigError(f"{job.target} exists and is no file; give another -o")
        if existing == "refuse":
            raise ConfigError(f"{job.target} exists; --force overwrites it, --skip-existing leaves it alone")
        if existing == "replace":
            yield job


# Converting -----------------------------------------------------------------------------------------------


def convert_all(
    jobs: Sequence[Job], label: str, convert: Callable[[Job, bytes], tuple[bytes, dict[str, Any]]], terminal: Terminal
) -> None:
    """Converts file by file, and says a line of facts for each. After a file that fails, the other files follow.

    Raises DataError at the end if a file failed: with one job its own error, else the number of failures.
    """
    errors: list[HyperpriorError] = []
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as at_the_end, terminal.track(label, len(jobs)) as track:
        at_the_end.callback(terminal.tell, rows)  # also after an error
        for done, job in enumerate(jobs, 1):
            try:
                data = read_source(job.source)
                result, facts = convert(job, data)
                if job.target == STANDARD:
                    write_to_stdout(result)
                else:
                    storage.write_bytes(Path(job.target), result)
            except (DataError, ConfigError, images.Unusable) as error:
                kind = DataError if isinstance(error, images.Unusable) else type(error)
                errors.append(kind(f"{job.source}: {error}"))
                rows.append({"source": job.source, "error": str(error)})
                if len(jobs) > 1:
                    terminal.warn(str(errors[-1]))
                continue
            rows.append({"source": job.source, "target": job.target, "source_bytes": len(data), **facts})
            terminal.say(f"{job.source} → {job.target}  {describe_file(facts)}")
            track.update(done)
    if len(jobs) != 1:  # none: all were left out, because their files exist
        terminal.say(describe_total([row for row in rows if "target" in row]))
    if errors:
        raise errors[0] if len(jobs) == 1 else DataError(f"{len(errors)} of {len(jobs)} files failed")


def read_source(source: str) -> bytes:
    """The bytes of a file or of standard input. Raises DataError, also for more than an image or its file can have."""
    try:
        if source != STANDARD and (size := Path(source).stat().st_size) > images.MAX_BYTES:
            raise DataError(images.describe_too_large(size))
        with contextlib.nullcontext(get_binary(sys.stdin)) if source == STANDARD else Path(source).open("rb") as file:
            data = file.read(images.MAX_BYTES + 1)  # a pipe has no size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    if len(data) > images.MAX_BYTES:
        raise DataError(images.describe_too_large(len(data)))
    return data


def write_to_stdout(data: bytes) -> None:
    try:
        get_binary(sys.stdout).write(data)
        get_binary(sys.stdout).flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"standard output cannot be written: {error.strerror}") from error


def compress(
    sources: Sequence[str],
    model: str,
    out: Optional[str],
    effort: int,
    existing: Existing,
    verify: bool,
    terminal: Terminal,
    engine: str = "auto",
) -> None:
    """`hyperprior compress`."""
    jobs = plan(sources, out, PHOTO_SUFFIXES, SUFFIX, existing)
    for folder in (path for path in map(Path, sources) if path.is_dir()):
        if others := image_files.describe_other_files(folder, (*PHOTO_SUFFIXES, SUFFIX)):
            terminal.warn(others)
    codec = load(model, engine)
    codec.check_effort(effort)

    def convert(job: Job, data: bytes) -> tuple[bytes, dict[str, Any]]:
        image, notes = images.decode_photo(data)
        began = time.perf_counter()
        file = codec.compress(image, effort)
        facts = {**size_of(image), "bytes": len(file), "seconds": time.perf_counter() - began, "notes": notes}
        if verify:
            facts |= compare_images(image, codec.decompress(file))
        return file, facts

    convert_all(jobs, "compressing", convert, terminal)


def decompress(
    sources: Sequence[str],
    model: Optional[str],
    out: Optional[str],
    suffix: str,
    existing: Existing,
    max_pixels: Optional[int],
    terminal: Terminal,
    engine: str = "auto",
) -> None:
    """`hyperprior decompress`."""
    if not re.fullmatch(r"\.[a-z0-9]+", suffix):
        raise ConfigError(f"--format is `{suffix[1:]}`; it must be an extension such as png, the default")
    jobs = plan(sources, out, (SUFFIX,), suffix, existing)
    formats = Image.registered_extensions()

    def suffix_of(job: Job) -> str:
        return suffix if job.target == STANDARD else Path(job.target).suffix.lower()

    for job in jobs:
        if formats.get(suffix_of(job)) not in Image.SAVE or formats[suffix_of(job)] in NO_PHOTOGRAPHS:
            raise ConfigError(
                f"{job.target}: Pillow writes no photograph as `{suffix_of(job)}`; try .png, .jpg, .webp or .tif"
            )
    find_codec = make_codec_finder(model, engine)

    def convert(job: Job, data: bytes) -> tuple[bytes, dict[str, Any]]:
        codec = find_codec(data)
        began = time.perf_counter()
        pixels = codec.decompress(data, max_pixels or container.MAX_PIXELS)
        facts = {**size_of(pixels), "seconds": time.perf_counter() - began}
        return encode_picture(pixels, formats[suffix_of(job)]), facts

    convert_all(jobs, "decompressing", convert, terminal)


def encode_picture(pixels: np.ndarray, file_format: str) -> bytes:
    """The bytes of a file in a format that Pillow writes, with the options in BEST. Raises DataError."""
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).save(file, file_format, **BEST.get(file_format, {}))
    except Exception as error:  # Pillow raises many types if a format cannot hold an image
        raise DataError(f"cannot be written as {file_format}: {error}") from error
    return file.getvalue()


def make_codec_finder(model: Optional[str], engine: str = "auto") -> Callable[[bytes], Codec]:
    """f(file) → its codec: of `model` if that is given, else of its model in the box, else of HYPERPRIOR_MODEL."""
    if model:
        codec = load(model, engine)
        return lambda data: codec
    load_cached = functools.lru_cache(maxsize=None)(functools.partial(load, engine=engine))

    def find_codec(data: bytes) -> Codec:
        fingerprint = container.read(data, max_pixels=ANY_SIZE).fingerprint.hex()
        if found := box.find_by_fingerprint(fingerprint) or os.environ.get("HYPERPRIOR_MODEL"):
            return load_cached(found)
        release = box.find_release(fingerprint)
        name_it = f"name {release}" if release else "name its run, or the file that `hyperprior export` wrote,"
        raise ConfigError(
            f"written with model {fingerprint}, which is not in the box: {name_it} with --model or in the environment "
            f"variable HYPERPRIOR_MODEL"
        )

    return find_codec


def get_binary(stream: Optional[TextIO]) -> BinaryIO:
    """The binary stream of stdin or stdout, which are None in Python if the shell closed them."""
    if stream is None:
        raise ConfigError("standard input or output is closed; name a file")
    return stream.buffer


def size_of(image: np.ndarray) -> dict[str, Any]:
    return {"width": image.shape[1], "height": image.shape[0]}


def describe_file(facts: dict[str, Any]) -> str:
    """The line of facts of one file."""
    parts = [f"{facts['width']}x{facts['height']}"]
    if num_bytes := facts.get("bytes"):
        parts.append(f"{num_bytes:,} bytes  {8 * num_bytes / (facts['width'] * facts['height']):.3f} bpp")
    parts.append(f"{facts['seconds']:.2f} s")
    parts.append(describe({name: facts[name] for name in QUALITIES if facts.get(name) is not None}))
    return "  ".join(filter(None, parts)) + "".join(f"\n  note: {note}" for note in facts.get("notes", ()))


def describe_total(rows: Sequence[dict[str, Any]]) -> str:
    """The last line of a command on several files: sums, and means of the qualities over the files that have them."""
    parts = [f"{len(rows)} files"]
    if num_bytes := sum(row.get("bytes", 0) for row in rows):
        before = sum(row["source_bytes"] for row in rows)
        pixels = sum(row["width"] * row["height"] for row in rows)
        parts.append(f"{before:,} → {num_bytes:,} bytes ({num_bytes / before:.1%})  {8 * num_bytes / pixels:.3f} bpp")
    parts.append(f"{sum(row['seconds'] for row in rows):.1f} s")
    measured = {name: [row[name] for row in rows if row.get(name) is not None] for name in QUALITIES}
    if means := describe({name: sum(values) / len(values) for name, values in measured.items() if values}):
        parts.append(f"mean {means}")
    return "  ".join(parts)
