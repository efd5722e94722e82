"""Looking into sources (`hyperprior inspect`) and writing even shards from them (`hyperprior pack`)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

from hyperprior import checkpoint, images, lanes, shards, stream
from hyperprior.errors import ConfigError, DataError
from hyperprior.shards import Sample, Shard
from hyperprior.terminal import Terminal

NAMED_AT_MOST = 100  # unusable members printed; JSON has all


# inspect --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What `inspect` found. `damaged` are shards, `unusable` are images, as (name, reason)."""

    shards: int = 0
    images: int = 0
    bytes: int = 0
    pixels: int = 0
    patch_size: int = 256
    smaller_than_patch: int = 0
    shortest_side: Optional[int] = None
    longest_side: int = 0
    images_per_shard: list[int] = dataclasses.field(default_factory=list)
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)
    unusable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        counts = self.images_per_shard or [0]
        good = self.images - len(self.unusable)
        yield f"shards    {self.shards:,}, {min(counts):,} to {max(counts):,} images each"
        yield f"images    {self.images:,}, {self.bytes / 1e6:,.1f} MB"
        yield "formats   " + ", ".join(f"{name} {count:,}" for name, count in sorted(self.formats.items()))
        if good:
            yield (
                f"sizes     sides from {self.shortest_side} to {self.longest_side} pixels, "
                f"{self.pixels / good / 1e6:.2f} megapixels on average"
            )
        if self.ignored:
            rows = shards.describe_others(collections.Counter(self.ignored))
            yield f"ignored   what has no ending of an image that training reads: {rows}"
        yield f"small     {self.smaller_than_patch:,} have a side below {self.patch_size}"
        yield f"unusable  {len(self.unusable):,} images, {len(self.damaged):,} shards"
        problems = self.damaged + self.unusable
        yield from (f"  {name}: {reason}" for name, reason in problems[:NAMED_AT_MOST])
        if len(problems) > NAMED_AT_MOST:
            yield f"  and {len(problems) - NAMED_AT_MOST:,} more (--json names all)"


def inspect(sources: list[str], patch_size: int, allow_pipe: bool, terminal: Terminal) -> Report:
    """Decodes every image of the sources as training does. Raises DataError for a source that cannot be opened."""
    found = shards.open_sources(sources, "source", allow_pipe=allow_pipe)
    report = Report(shards=len(found), patch_size=patch_size)
    formats: collections.Counter[str] = collections.Counter()
    ignored: collections.Counter[str] = collections.Counter()
    for folder in filter(Path.is_dir, map(Path, sources)):
        ignored += shards.other_files(folder, lambda name: shards.is_image(name) or shards.is_tar(name))

    def look(sample: Sample) -> tuple[str, str, int, int, int, str]:
        try:
            data = stream.read(sample)
            kind = "JPEG" if images.is_jpeg(data) else images.open_image(data).format or "?"
            height, width = images.decode(data).shape[:2]
            return sample.name, kind, len(data), height, width, ""
        except images.Unusable as error:
            return sample.name, "unusable", sample.size or 0, 0, 0, str(error)

    with terminal.track("inspecting", len(found)) as track, ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, shard in enumerate(found):
            count = 0
            try:
                if shard.kind == "tar" and shard.part == 0:
                    for member, _, _ in shards.tar_index(shard.path, shard.offset, shard.size, shard.name):
                        if not shards.is_image(member):
                            ignored[PurePosixPath(member).suffix.lower()] += 1
                for name, kind, size, height, width, reason in ahead(pool, look, shard.samples()):
                    count += 1
                    formats[kind] += 1
                    report.bytes += size
                    if reason:
                        report.unusable.append((name, reason))
                        continue
                    report.pixels += height * width
                    report.smaller_than_patch += min(height, width) < patch_size
                    report.shortest_side = min(height, width, report.shortest_side or height)
                    report.longest_side = max(height, width, report.longest_side)
            except DataError as error:
                report.damaged.append((shard.name, str(error)))
            report.images += count
            report.images_per_shard.append(count)
            track.update(index + 1)
    report.formats, report.ignored = dict(formats), dict(ignored)
    return report


def ahead(pool: ThreadPoolExecutor, function: Any, items: Iterator[Any]) -> Iterator[Any]:
    """`function` of each item in order, a bounded number of them in the pool."""
    pending: collections.deque[Any] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > 64:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# pack -----------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    images_per_shard: int = 1000
    max_side: Optional[int] = None
    min_side: int = 1
    encode: Optional[str] = None
    quality: int = 95


class Packed(NamedTuple):
    key: str
    suffix: str
    data: bytes


def pack(sources: list[str], out: Path, options: Options, allow_pipe: bool, terminal: Terminal) -> list[Path]:
    """Writes `shards-000000.tar`, ... of `images_per_shard` samples below `out`, and returns their paths.

    Images that cannot be used are left out and named. Each shard appears whole or not at all; a shard that is
    already there is not made again, so an interrupted call can be repeated. A different call in the same
    directory is refused (ConfigError). Keys get `_` for dots, which WebDataset readers take for extensions.
    """
    if options.encode not in (None, "jpeg", "png"):
        raise ConfigError(f"--encode is {options.encode!r}; allowed are jpeg and png")
    found = shards.open_sources(sources, "source", allow_pipe=allow_pipe)
    with checkpoint.only_one(out):
        samples = [(s.key, size_of(s)) for shard in found for s in shard.samples()]
        plan = json.dumps({"samples": f"{lanes.draw(samples):016x}", "options": options._asdict()})
        plan_file = out / "pack.json"
        if plan_file.exists() and plan_file.read_text() != plan:
            raise ConfigError(f"{out} holds shards of other sources or options; choose another --out")
        if not plan_file.exists() and any(out.glob("*.tar")):
            raise ConfigError(f"{out} holds tars already; choose another --out")
        checkpoint.write_text(plan_file, plan)
        return write_shards(found, len(samples), out, options, terminal)


def size_of(sample: Sample) -> int:
    with contextlib.suppress(OSError):
        return sample.size or Path(sample.path).stat().st_size
    return 0  # named when it is to be packed


def write_shards(found: list[Shard], total: int, out: Path, options: Options, terminal: Terminal) -> list[Path]:
    from webdataset.writer import TarWriter

    paths: list[Path] = []
    keys: set[str] = set()
    samples = (sample for shard in found for sample in shard.samples())
    with terminal.track("packing", total) as track, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, total, options.images_per_shard):
            group = [next(samples) for _ in range(min(options.images_per_shard, total - first))]
            named = [(sample, unique(sample.key, keys)) for sample in group]
            path = out / f"shards-{first // options.images_per_shard:06d}.tar"
            if not path.exists():
                packed = list(ahead(pool, lambda item: prepare(item[0], item[1], options), iter(named)))
                for (sample, _), result in zip(named, packed):
                    if isinstance(result, str):
                        terminal.warn(f"left out {sample.name}: {result}")

                def write(file: Any, packed: list[Any] = packed) -> None:
                    # PAX takes keys of any length and alphabet; the fixed time makes the bytes reproducible.
                    with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
                        for item in packed:
                            if isinstance(item, Packed):
                                writer.write({"__key__": item.key, item.suffix: item.data})

                if any(isinstance(item, Packed) for item in packed):
                    checkpoint.write_whole(path, write)
            if path.exists():
                paths.append(path)
            track.update(first + len(group))
    if not paths:
        raise DataError(f"none of the {total} images can be packed; the warnings say why")
    kept = sum(len(shards.tar_index(str(path), 0, path.stat().st_size, str(path))) for path in paths)
    terminal.tell({"shards": [str(path) for path in paths], "images": kept, "left_out": total - kept})
    terminal.say(
        f"{kept:,} images in {len(paths):,} shards below {out}"
        + (f", {total - kept:,} left out" if kept < total else "")
    )
    return paths


def unique(key: str, taken: set[str]) -> str:
    key = key.replace(".", "_")
    name, count = key, 1
    while name in taken:
        name, count = f"{key}_{count}", count + 1
    taken.add(name)
    return name


def prepare(sample: Sample, key: str, options: Options) -> Packed | str:
    """The sample as it is packed, or why it is left out."""
    try:
        data = stream.read(sample)
        image = images.decode(data)
    except images.Unusable as error:
        return str(error)
    height, width = image.shape[:2]
    if min(height, width) < options.min_side:
        return f"{width}x{height} has a side below {options.min_side}"
    scale = min(1.0, (options.max_side or max(height, width)) / max(height, width))
    kind = "jpeg" if images.is_jpeg(data) else (images.open_image(data).format or "png").lower()
    if scale == 1.0 and options.encode in (None, kind):
        return Packed(key, {"jpeg": "jpg"}.get(kind, kind), data)
    if scale < 1.0:
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
    encode = options.encode or ("jpeg" if kind == "jpeg" else "png")
    file = io.BytesIO()
    if encode == "jpeg":
        Image.fromarray(image).save(file, "JPEG", quality=options.quality, subsampling=0, optimize=True)
    else:
        Image.fromarray(image).save(file, "PNG")
    return Packed(key, "jpg" if encode == "jpeg" else "png", file.getvalue())
