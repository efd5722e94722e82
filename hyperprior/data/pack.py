"""WebDataset shards of equal length from images, tars or URLs (`hyperprior pack`)."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from hyperprior import images, storage
from hyperprior.data import shards, stream, tars
from hyperprior.data.shards import Sample, Shard
from hyperprior.draws import draw
from hyperprior.errors import ConfigError, DataError
from hyperprior.terminal import Terminal


class Options(NamedTuple):
    images_per_shard: int = 1000
    max_side: Optional[int] = None
    min_side: int = 1
    encode: Optional[str] = None
    quality: int = 95


class Packed(NamedTuple):
    """A sample as it is written into a shard."""

    key: str
    suffix: str
    data: bytes


class LeftOut(NamedTuple):
    """A sample that is not written into a shard, and the reason."""

    name: str
    reason: str


def pack(sources: list[str], out: Path, options: Options, allow_pipe: bool, terminal: Terminal) -> list[Path]:
    """Writes `shards-000000.tar`, ... of `images_per_shard` samples below `out`, and returns their paths.

    Images that cannot be used are left out, and a warning names each. A shard is complete or absent. Existing shards
    are not written again, so an interrupted call can be repeated. Raises ConfigError if the directory is from a
    different call. Dots in keys become `_`, because WebDataset readers take the text after a dot for an extension.
    """
    if options.encode not in (None, "jpeg", "png"):
        raise ConfigError(f"--encode is {options.encode!r}; allowed are jpeg and png")
    opened = shards.open_sources(sources, "source", allow_pipe=allow_pipe)
    with storage.lock_directory(out), terminal.waiting() as wait_for:
        samples = []
        for shard in opened:
            wait_for(shard.name)
            samples += [(sample.key, find_size(sample)) for sample in shard.samples()]
        plan = json.dumps({"samples": f"{draw(samples):016x}", "options": options._asdict()})
        plan_file = out / "pack.json"
        if plan_file.exists() and plan_file.read_text() != plan:
            raise ConfigError(f"{out} holds shards of other sources or options; choose another --out")
        if not plan_file.exists() and any(out.glob("*.tar")):
            raise ConfigError(f"{out} holds tars already; choose another --out")
        storage.write_text(plan_file, plan)
        paths = write_shards(opened, len(samples), out, options, terminal, wait_for)
    if not paths:
        raise DataError(f"none of the {len(samples)} images can be packed; the warnings say why")
    count = sum(len(tars.list_members(str(path), 0, path.stat().st_size, str(path))) for path in paths)
    left_out = len(samples) - count
    terminal.tell({"shards": [str(path) for path in paths], "images": count, "left_out": left_out})
    terminal.say(
        f"{count:,} images in {len(paths):,} shards below {out}" + (f", {left_out:,} left out" if left_out else "")
    )
    return paths


def find_size(sample: Sample) -> int:
    if sample.data is not None:
        return len(sample.data)
    with contextlib.suppress(OSError):
        return sample.size or Path(sample.path).stat().st_size
    return 0  # `prepare_sample` reports the unreadable file


def write_shards(
    opened: list[Shard], total: int, out: Path, options: Options, terminal: Terminal, wait_for: Callable[[str], None]
) -> list[Path]:
    """Packs `total` samples, and returns the paths of all shards, new and old."""
    paths: list[Path] = []
    keys: set[str] = set()
    samples = (sample for shard in opened for sample in shard.samples())
    with terminal.track("packing", total) as track, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, total, options.images_per_shard):
            group = [next(samples) for _ in range(min(options.images_per_shard, total - first))]
            named = [(sample, make_unique_key(sample.key, keys)) for sample in group]
            path = out / f"shards-{first // options.images_per_shard:06d}.tar"
            if not path.exists():
                results: list[Union[Packed, LeftOut]] = []
                for result in stream.map_ahead(pool, lambda pair: prepare_sample(*pair, options), iter(named)):
                    wait_for(f"the image after {len(results)} of {path.name}")
                    results.append(result)
                for result in results:
                    if isinstance(result, LeftOut):
                        terminal.warn(f"left out {result.name}: {result.reason}")
                write_shard(path, [result for result in results if isinstance(result, Packed)])
            if path.exists():
                paths.append(path)
            track.update(first + len(group))
    return paths


def write_shard(path: Path, packed: Sequence[Packed]) -> None:
    from webdataset.writer import TarWriter

    def write(file: IO[bytes]) -> None:
        # PAX allows keys of any length and alphabet. The fixed time makes the bytes reproducible.
        with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for sample in packed:
                writer.write({"__key__": sample.key, sample.suffix: sample.data})

    if packed:
        storage.write_whole(path, write)


def make_unique_key(key: str, taken: set[str]) -> str:
    key = key.replace(".", "_")
    name, count = key, 1
    while name in taken:
        name, count = f"{key}_{count}", count + 1
    taken.add(name)
    return name


def prepare_sample(sample: Sample, key: str, options: Options) -> Union[Packed, LeftOut]:
    """The sample as it is packed, or the reason to leave it out."""
    try:
        data = stream.read_sample(sample)
        image = images.decode(data)
    except images.Unusable as error:
        return LeftOut(sample.name, str(error))
    height, width = image.shape[:2]
    if min(height, width) < options.min_side:
        return LeftOut(sample.name, f"{width}x{height} has a side below {options.min_side}")
    scale = min(1.0, (options.max_side or max(height, width)) / max(height, width))
    kind = "jpeg" if images.is_jpeg(data) else (images.open_image(data).format or "png").lower()
    if scale == 1.0 and options.encode in (None, kind):
        return Packed(key, {"jpeg": "jpg"}.get(kind, kind), data)
    if scale < 1.0:
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
    file = io.BytesIO()
    if (options.encode or kind) == "jpeg":
        Image.fromarray(image).save(file, "JPEG", quality=options.quality, subsampling=0, optimize=True)
        return Packed(key, "jpg", file.getvalue())
    Image.fromarray(image).save(file, "PNG")
    return Packed(key, "png", file.getvalue())
