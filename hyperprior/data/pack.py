"""WebDataset shards of equal length from images, tars or URLs (`hyperprior pack`)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from hyperprior import image_files, images, stack, storage
from hyperprior.data import shards, stream, tars
from hyperprior.data.lanes import group_of
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


def pack(sources: list[str], out: Path, options: Options, allow_pipe: bool, terminal: Terminal) -> list[Path]:
    """Writes `shards-000000.tar`, ... of `images_per_shard` samples below `out`, and returns their paths.

    Images that cannot be used are left out, and a warning names each. A shard is complete or absent. Existing shards
    are not written again, so an interrupted call can be repeated. Raises ConfigError if the directory is from a
    different call, or part of a source. Keys stay as they are where they are distinct (see `choose_names`), so packing
    changes no split.
    """
    if options.encode not in (None, "jpeg", "png"):
        raise ConfigError(f"--encode is {options.encode!r}; allowed are jpeg and png")
    check_out(sources, out)
    opened = shards.open_sources(sources, "source", allow_pipe=allow_pipe)
    # A directory that was cut into interleaved parts is packed in its own order: a photograph stays beside its mask.
    opened = [dataclasses.replace(shard, parts=1) for shard in opened if shard.part == 0]
    with storage.lock_directory(out), terminal.waiting() as wait_for:
        samples = []
        for shard in opened:
            wait_for(shard.name)
            samples += [identify(sample) for sample in shard.samples()]
        names = choose_names([(shard, key) for shard, key, _ in samples])
        described = [(*key.split(".", 1), size) for _, key, size in samples]
        plan = json.dumps({"samples": f"{draw(described):016x}", "options": options._asdict()})
        plan_file = out / "pack.json"
        if plan_file.exists() and plan_file.read_bytes() != plan.encode():
            raise ConfigError(f"{out} holds shards of other sources or options; choose another --out")
        if not plan_file.exists() and any(out.glob("*.tar")):
            raise ConfigError(f"{out} holds tars already; choose another --out")
        storage.remove_unfinished(out, r"pack\.json|shards-\d+\.tar")
        storage.write_text(plan_file, plan)
        paths = write_shards(read_again(opened, samples), names, out, options, terminal, wait_for)
    if not paths:
        raise DataError(f"none of the {len(samples)} images can be packed; the warnings say why")
    count = sum(len(tars.list_members(str(path), 0, path.stat().st_size, str(path))) for path in paths)
    left_out = len(samples) - count
    if several := sum(number > 1 for number in Counter(map(group_of, names)).values()):
        terminal.say(f"{several:,} keys have several images; WebDataset's readers see those of one key as one sample")
    terminal.tell({"shards": [str(path) for path in paths], "images": count, "left_out": left_out})
    rest = f", {left_out:,} left out" if left_out else ""
    terminal.say(f"{count:,} images in {len(paths):,} shards below {out}{rest}")
    return paths


def check_out(sources: Sequence[str], out: Path) -> None:
    """Raises ConfigError if `out` is a part of a source, or the folder of a tar that is a source, also behind links."""
    real = Path(os.path.realpath(out))
    for source in sources:
        local = [location for location in shards.expand_braces(source) if not shards.is_remote(location)]
        for path in map(shards.expand_home, local):
            is_inside = tars.is_tar(path.name) and path.is_file() and Path(os.path.realpath(path)).parent == real
            if path.is_dir():
                folders = {Path(os.path.realpath(folder)) for folder, _ in image_files.walk(path)}
                is_inside = not folders.isdisjoint((real, *real.parents))
            if is_inside:
                raise ConfigError(f"--out {out} is a part of the source {source}, or holds it; choose another folder")


def identify(sample: Sample) -> tuple[str, str, int]:
    """Its shard, key and size."""
    if sample.data is not None:
        return sample.shard, sample.key, len(sample.data)
    size = 0  # `prepare_sample` reports an unreadable file
    with contextlib.suppress(OSError):
        size = sample.size or Path(sample.path).stat().st_size
    return sample.shard, sample.key, size


def read_again(opened: list[Shard], before: Sequence[tuple[str, str, int]]) -> Iterator[Sample]:
    """All samples once more. Raises DataError where they are no longer those of `before`, which have the names."""
    samples = (sample for shard in opened for sample in shard.samples())
    for sample, expected in itertools.zip_longest(samples, before):
        if sample is None or identify(sample) != expected:
            shard, key, _ = expected or identify(sample)
            raise DataError(f"{shard} gave other images when it was read again, from {key} on; use a source that stays")
        yield sample


def write_shards(
    samples: Iterator[Sample],
    names: list[str],
    out: Path,
    options: Options,
    terminal: Terminal,
    wait_for: Callable[[str], None],
) -> list[Path]:
    """Packs all samples under `names`, and returns the paths of all shards, new and old."""
    paths: list[Path] = []
    total = len(names)
    with terminal.track("packing", total) as track, ThreadPoolExecutor(stack.count_cores()) as pool:
        for first in range(0, total, options.images_per_shard):
            group = names[first : first + options.images_per_shard]
            named = [(next(samples), name) for name in group]
            path = out / f"shards-{first // options.images_per_shard:06d}.tar"
            if not path.exists():
                results: list[Union[Packed, str]] = []
                for result in stream.map_ahead(pool, lambda pair: prepare_sample(*pair, options), iter(named)):
                    wait_for(f"the image after {len(results)} of {path.name}")
                    results.append(result)
                for result in results:
                    if isinstance(result, str):
                        terminal.warn(f"left out {result}")
                write_shard(path, [result for result in results if isinstance(result, Packed)])
            if path.exists():
                paths.append(path)
            track.update(first + len(group))
        next(samples, None)  # there is none, or `read_again` raises DataError
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


def choose_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """The name in the packed shards of each (shard, key), without its extension: the key, made unique.

    The key up to the first dot is WebDataset's key, and decides the split. It stays common to images that share it in a
    shard, such as a photograph `0` and its mask `0.seg`. In another shard it is another key, and gets a number.
    """
    groups: dict[tuple[str, str], str] = {}
    taken_groups, taken = set[str](), set[str]()
    names = []
    for shard, key in keys:
        key = re.sub(r"(^|/)\.+([^/]*)$", r"\1_\2", key)  # WebDataset drops names that begin with a dot
        group = group_of(key)
        if (shard, group) not in groups:
            groups[shard, group] = make_unique(group, "_", taken_groups)
        names.append(make_unique(groups[shard, group] + key[len(group) :], ".", taken))
    return names


def make_unique(name: str, separator: str, taken: set[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}{separator}{count}", count + 1
    taken.add(unique)
    return unique


def prepare_sample(sample: Sample, key: str, options: Options) -> Union[Packed, str]:
    """The sample as it is packed, or its name and the reason to leave it out."""
    try:
        data = stream.read_sample(sample)
        image = images.decode(data)
    except images.Unusable as error:
        return f"{sample.name}: {error}"
    height, width = image.shape[:2]
    if min(height, width) < options.min_side:
        return f"{sample.name}: {width}x{height} has a side below {options.min_side}"
    scale = min(1.0, (options.max_side or max(height, width)) / max(height, width))
    kind = "jpeg" if images.is_jpeg(data) else (images.open_image(data).format or "png").lower()
    if scale == 1.0 and options.encode in (None, kind):
        return Packed(key, {"jpeg": "jpg"}.get(kind, kind), data)
    if scale < 1.0:
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
    file, is_jpeg = io.BytesIO(), (options.encode or kind) == "jpeg"
    settings = {"quality": options.quality, "subsampling": 0, "optimize": True} if is_jpeg else {}
    try:
        Image.fromarray(image).save(file, "JPEG" if is_jpeg else "PNG", **settings)
    except Exception as error:  # Pillow raises many types if a format cannot hold an image
        return f"{sample.name}: {image.shape[1]}x{image.shape[0]} cannot be written: {error}"
    return Packed(key, "jpg" if is_jpeg else "png", file.getvalue())
