"""The content of sources (`hyperprior inspect`): shards, images, sizes, formats, and unusable files with reasons."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Optional

from hyperprior import image_files, images, stack
from hyperprior.data import shards, stream, tars
from hyperprior.data.lanes import group_of
from hyperprior.data.shards import Ignored, Sample, Shard
from hyperprior.errors import DataError
from hyperprior.terminal import Terminal

NAMED_AT_MOST = 100  # unusable members that are printed; JSON has all of them


@dataclasses.dataclass
class Report:
    """The result of `inspect`. `damaged` lists shards and `unusable` lists images, as (name, reason)."""

    shards: int = 0
    images: int = 0
    bytes: int = 0
    pixels: int = 0
    patch_size: int = 256
    smaller_than_patch: int = 0
    shortest_side: Optional[int] = None
    longest_side: int = 0
    images_per_shard: list[int] = dataclasses.field(default_factory=list)
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)
    keys_with_several_images: int = 0
    unusable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

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
        if self.keys_with_several_images:
            yield (
                f"keys      {self.keys_with_several_images:,} have several images, such as 0.jpg and 0.seg.png: "
                f"data.extensions chooses"
            )
        if self.ignored:
            rows = image_files.describe_suffixes(self.ignored)
            yield f"ignored   files without the extension of a training image: {rows}"
        yield f"small     {self.smaller_than_patch:,} have a side below {self.patch_size}"
        yield f"unusable  {len(self.unusable):,} images, {len(self.damaged):,} shards"
        problems = self.damaged + self.unusable
        yield from (f"  {name}: {reason}" for name, reason in problems[:NAMED_AT_MOST])
        if len(problems) > NAMED_AT_MOST:
            yield f"  and {len(problems) - NAMED_AT_MOST:,} more (--json names all)"


class ImageFacts(NamedTuple):
    """The facts about one image. `reason` says why the image is unusable; it is empty for a good image."""

    name: str
    kind: str
    num_bytes: int
    height: int = 0
    width: int = 0
    reason: str = ""


def inspect(sources: list[str], patch_size: int, allow_pipe: bool, terminal: Terminal) -> Report:
    """Decodes every image of the sources as training does. Raises DataError for a source that cannot be opened."""
    ignored: Ignored = {}
    opened = shards.open_sources(sources, "source", allow_pipe=allow_pipe, ignored=ignored)
    report = Report(shards=len(opened), patch_size=patch_size, ignored=sum(ignored.values(), Counter()))
    with (
        terminal.track("inspecting", len(opened)) as track,
        terminal.waiting() as wait_for,
        ThreadPoolExecutor(stack.count_cores()) as pool,
    ):
        for index, shard in enumerate(opened):
            if shard.part == 0:
                groups = Counter[str]()
            wait_for(shard.name)
            inspect_shard(shard, report, pool, groups, wait_for)
            track.update(index + 1)
    return report


def inspect_shard(
    shard: Shard, report: Report, pool: ThreadPoolExecutor, groups: Counter[str], wait_for: Callable[[str], None]
) -> None:
    """Adds a shard to the report. `groups`: the number of images of each key of the shard, and of its earlier parts."""
    count = 0

    def samples() -> Iterator[Sample]:
        for sample in shard.samples():
            group = group_of(sample.key)
            groups[group] += 1
            report.keys_with_several_images += groups[group] == 2
            yield sample

    try:
        if shard.kind == "tar" and shard.part == 0:
            for member in tars.list_members(shard.path, shard.offset, shard.size, shard.name):
                if not image_files.is_training_image(member.name):
                    report.ignored[PurePosixPath(member.name).suffix.lower()] += 1
        for facts in stream.map_ahead(pool, inspect_image, samples()):
            count += 1
            wait_for(f"what follows {facts.name}")
            report.formats[facts.kind] += 1
            report.bytes += facts.num_bytes
            if facts.reason:
                report.unusable.append((facts.name, facts.reason))
                continue
            shorter, longer = sorted((facts.height, facts.width))
            report.pixels += facts.height * facts.width
            report.smaller_than_patch += shorter < report.patch_size
            report.shortest_side = min(shorter, report.shortest_side or shorter)
            report.longest_side = max(longer, report.longest_side)
    except DataError as error:
        report.damaged.append((shard.name, str(error)))
    report.images += count
    report.images_per_shard.append(count)


def inspect_image(sample: Sample) -> ImageFacts:
    try:
        data = stream.read_sample(sample)
        kind = "JPEG" if images.is_jpeg(data) else images.open_image(data).format or "?"
        height, width = images.decode(data).shape[:2]
        return ImageFacts(sample.name, kind, len(data), height, width)
    except images.Unusable as error:
        return ImageFacts(sample.name, "unusable", sample.size or 0, reason=str(error))
