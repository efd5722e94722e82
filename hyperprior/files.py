"""Many files in, many files out: `hyperprior compress`, `decompress` and `info`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Optional, TextIO

import numpy as np
from PIL import Image

from hyperprior import checkpoint, container, images, load, models, shards
from hyperprior.errors import ConfigError, DataError, HyperpriorError, StorageError
from hyperprior.terminal import Terminal

if TYPE_CHECKING:
    from hyperprior.codec import Codec

SUFFIX = ".hyp"
STANDARD = "-"  # standard input or output
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm")

# Decoded images lose nothing, or little, in formats that would lose much by default.
BEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 97, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 97, "subsampling": "4:4:4"},
}


class Job(NamedTuple):
    source: str
    target: str


def plan(
    sources: Sequence[str], out: Optional[str], suffixes: Sequence[str], new_suffix: str, force: bool
) -> list[Job]:
    """Which file becomes which: beside it, or in or as `out`; directories are searched for `suffixes`.

    Raises ConfigError, before anything is read: a source that is missing, two sources for one target, a target
    that exists and may not be overwritten.
    """
    try:
        return pair(sources, out, suffixes, new_suffix, force)
    except OSError as error:  # a name that is too long, a directory without permission
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def pair(
    sources: Sequence[str], out: Optional[str], suffixes: Sequence[str], new_suffix: str, force: bool
) -> list[Job]:
    found: list[tuple[str, str]] = []  # source, path below the output directory
    for source in sources:
        path = Path(source)
        if source == STANDARD or (path.exists() and not path.is_dir()):
            found.append((source, path.name))
        elif path.is_dir():
            inside = shards.files_below(path, suffixes)
            if not inside:
                raise ConfigError(f"{path} holds no file with one of {', '.join(suffixes)}")
            found += [(str(p), str(p.relative_to(path))) for p in inside]
        else:
            raise ConfigError(f"{source} does not exist; name images, directories, or - for stdin")
    several = len(found) > 1 or any(Path(source).is_dir() for source in sources)
    if out == STANDARD and several:
        raise ConfigError(f"{len(found)} files cannot all go to standard output; give a directory with -o")
    folder = None
    if out not in (None, STANDARD) and (several or out.endswith(os.sep) or Path(out).is_dir()):
        folder = Path(out)
        if folder.is_file():
            raise ConfigError(f"{out} is a file; {len(found)} files need a directory")
    jobs = []
    for source, name in found:
        if folder is not None:
            target = str(folder / Path("stdin" if source == STANDARD else name).with_suffix(new_suffix))
        else:
            target = out or (STANDARD if source == STANDARD else str(Path(source).with_suffix(new_suffix)))
        jobs.append(Job(source, target))
    seen: dict[str, str] = {}
    for job in jobs:
        place = Path(job.target)
        real = os.path.realpath(place)
        if real in seen and job.target != STANDARD:
            raise ConfigError(f"{seen[real]} and {job.source} would both become {job.target}")
        seen[real] = job.source
        if job.target == STANDARD or not place.exists():
            continue
        if job.source != STANDARD and place.samefile(job.source):
            raise ConfigError(f"{job.source} would overwrite itself; give another -o")
        if not place.is_file():
            raise ConfigError(f"{job.target} exists and is no file; give another -o")
        if not force:
            raise ConfigError(f"{job.target} exists; --force overwrites it")
    return jobs


def run(
    jobs: Sequence[Job], label: str, convert: Callable[[Job, bytes], tuple[bytes, dict[str, Any]]], terminal: Terminal
) -> None:
    """Converts file by file, with a line of what `convert` found for each; what fails is named, and the others go on.

    Raises DataError at the end if any failed: the only one's own error, or how many did.
    """
    failed: list[HyperpriorError] = []
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as at_the_end, terminal.track(label, len(jobs)) as track:
        at_the_end.callback(terminal.tell, rows)  # whatever ends it
        for done, job in enumerate(jobs, 1):
            try:
                try:
                    data = binary(sys.stdin).read() if job.source == STANDARD else Path(job.source).read_bytes()
                except OSError as error:
                    raise DataError(f"cannot be read: {error.strerror}") from error
                result, found = convert(job, data)
            except (DataError, images.Unusable) as error:
                kind = type(error) if isinstance(error, DataError) else DataError
                failed.append(kind(f"{job.source}: {error}"))
                rows.append({"source": job.source, "error": str(error)})
                if len(jobs) > 1:
                    terminal.warn(str(failed[-1]))
                continue
            if job.target == STANDARD:
                to_stdout(result)
            else:
                checkpoint.write_bytes(Path(job.target), result)
            rows.append({"source": job.source, "target": job.target, **found})
            terminal.say(f"{job.source} → {job.target}  {describe(found)}")
            track.update(done)
    if len(jobs) > 1:
        terminal.say(describe_all([row for row in rows if "target" in row]))
    if failed:
        raise failed[0] if len(jobs) == 1 else DataError(f"{len(failed)} of {len(jobs)} files failed")


def to_stdout(data: bytes) -> None:
    try:
        binary(sys.stdout).write(data)
        binary(sys.stdout).flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"standard output cannot be written: {error.strerror}") from error


def compress(
    sources: Sequence[str], model: str, out: Optional[str], effort: int, force: bool, verify: bool, terminal: Terminal
) -> None:
    jobs = plan(sources, out, IMAGE_SUFFIXES, SUFFIX, force)
    for folder in (path for path in map(Path, sources) if path.is_dir()):
        if others := shards.other_files(folder, lambda name: name.lower().endswith((*IMAGE_SUFFIXES, SUFFIX))):
            terminal.warn(f"{folder} also holds what has no ending of an image: {shards.describe_others(others)}")
    codec = load(model)
    codec.check_effort(effort)

    def convert(job: Job, data: bytes) -> tuple[bytes, dict[str, Any]]:
        image, notes = images.photograph(data)
        began = time.perf_counter()
        file = codec.compress(image, effort)
        found = {**size(image), "bytes": len(file), "seconds": time.perf_counter() - began, "notes": list(notes)}
        if verify:
            from hyperprior import rd

            found |= rd.distortions(image, codec.decompress(file))
        return file, found

    run(jobs, "compressing", convert, terminal)


def decompress(
    sources: Sequence[str],
    model: Optional[str],
    out: Optional[str],
    suffix: str,
    force: bool,
    max_pixels: Optional[int],
    terminal: Terminal,
) -> None:
    if suffix == ".":
        raise ConfigError("--format is empty; png is the default")
    jobs = plan(sources, out, (SUFFIX,), suffix, force)
    known = Image.registered_extensions()

    def ending(job: Job) -> str:
        return suffix if job.target == STANDARD else Path(job.target).suffix.lower()

    for job in jobs:
        if known.get(ending(job)) not in Image.SAVE:
            raise ConfigError(f"{job.target}: Pillow writes no `{ending(job)}`; .png, .jpg, .webp and .tif are common")
    codec_of = reader(model)

    def convert(job: Job, data: bytes) -> tuple[bytes, dict[str, Any]]:
        codec = codec_of(data)
        began = time.perf_counter()
        pixels = codec.decompress(data, max_pixels or container.MAX_PIXELS)
        seconds = time.perf_counter() - began
        file = io.BytesIO()
        kind = known[ending(job)]
        try:
            Image.fromarray(pixels).save(file, kind, **BEST.get(kind, {}))
        except Exception as error:  # Pillow raises many types where a format cannot hold an image
            raise DataError(f"cannot be written as {kind}: {error}") from error
        return file.getvalue(), {**size(pixels), "seconds": seconds}

    run(jobs, "decompressing", convert, terminal)


def reader(model: Optional[str]) -> Callable[[bytes], Codec]:
    """f(file) → the codec to read it with: what --model names, else its own in the box, else HYPERPRIOR_MODEL."""
    if model:
        codec = load(model)
        return lambda data: codec
    opened = functools.lru_cache(maxsize=None)(load)

    def of_file(data: bytes) -> Codec:
        fingerprint = container.read(data, max_pixels=2**32).fingerprint.hex()
        if name := models.of_fingerprint(fingerprint) or os.environ.get("HYPERPRIOR_MODEL"):
            return opened(name)
        raise ConfigError(
            f"written with model {fingerprint}, which is not in the box: name its run or what `hyperprior export` "
            f"wrote with --model, or in the environment as HYPERPRIOR_MODEL"
        )

    return of_file


def binary(stream: Optional[TextIO]) -> BinaryIO:
    """The bytes of stdin or stdout, which Python has as None where the shell closed them."""
    if stream is None:
        raise ConfigError("standard input or output is closed; name a file")
    return stream.buffer


def size(image: np.ndarray) -> dict[str, Any]:
    return {"width": image.shape[1], "height": image.shape[0]}


def describe(found: dict[str, Any]) -> str:
    """The line of one file."""
    parts = [f"{found['width']}x{found['height']}"]
    if num_bytes := found.get("bytes"):
        pixels = found["width"] * found["height"]
        parts.append(f"{num_bytes:,} bytes  {8 * num_bytes / pixels:.3f} bpp")
    parts.append(f"{found['seconds']:.2f} s")
    if "psnr_db" in found:
        parts.append(f"PSNR {found['psnr_db']:.2f} dB")
    if found.get("ms_ssim") is not None:
        parts.append(f"MS-SSIM {found['ms_ssim']:.4f}")
    return "  ".join(parts) + "".join(f"\n  note: {note}" for note in found.get("notes", ()))


def describe_all(rows: Sequence[dict[str, Any]]) -> str:
    """The line that ends a job of several files."""
    parts = [f"{len(rows)} files"]
    if num_bytes := sum(row.get("bytes", 0) for row in rows):
        pixels = sum(row["width"] * row["height"] for row in rows)
        parts.append(f"{num_bytes:,} bytes  {8 * num_bytes / pixels:.3f} bpp")
    return "  ".join([*parts, f"{sum(row['seconds'] for row in rows):.1f} s"])


# info -----------------------------------------------------------------------------------------------------


def info(path: Path, model: Optional[str]) -> dict[str, Any]:
    """What a `.hyp` file, a model or a run says of itself, without decoding anything.

    Raises ConfigError if it is none of them, DataError if it is damaged.
    """
    if path.is_file() and path.suffix != ".npz":
        data = path.read_bytes()
        stream = container.read(data, max_pixels=2**32)
        found = {
            "kind": "compressed image",
            "width": stream.width,
            "height": stream.height,
            "bytes": len(data),
            "bpp": 8 * len(data) / (stream.width * stream.height),
            "version": container.VERSION,
            "model": stream.fingerprint.hex(),
            "symbols_bytes": len(stream.coded),
            "escapes": len(stream.escapes),
            "checksum": f"{stream.checksum:08x}",
        }
        if model := model or models.of_fingerprint(str(found["model"])) or os.environ.get("HYPERPRIOR_MODEL"):
            description = models.describe(model)
            found["fits"] = description["fingerprint"] == found["model"]
            found["given_model"] = f"{model}, {description['fingerprint']}"
        return found
    if path.suffix == ".hyp" and not path.exists():
        raise ConfigError(f"{path} does not exist")
    if not (path / "checkpoints").is_dir():
        return {"kind": "model", **models.describe(path)}
    newest = checkpoint.load_newest(path / "checkpoints", lambda text: None)
    if newest is None:
        raise ConfigError(f"{path} holds no checkpoint yet; train.checkpoint_every says when")
    state = newest[1]["run"]
    found = {"kind": "run", "step": state["step"], "best_step": state["best_step"], "best_loss": state["best_loss"]}
    with contextlib.suppress(ConfigError):
        found["exported"] = models.describe(path)
    with contextlib.suppress(OSError, ValueError):
        found["result"] = json.loads((path / "results.json").read_text())
    return found


def lines(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            shown = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            yield f"{indent}{name:<16} {shown}"
