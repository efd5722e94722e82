"""The tiles and strips in which images of any size are processed, each with the margin that its result depends on.

So the memory besides the image and its latents stays constant. There are no seams: a transform gives the same result in
a tile as in the whole image. A file decodes to the same symbols with any tiling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hyperprior.config import DOWNSAMPLING

# One element of y stands for 16 x 16 pixels, one of z for 4 x 4 elements of y.
Y_PIXELS, Z_ELEMENTS = 16, 4
TILE = 64  # elements of y along a side: 1024 pixels
STRIP_ROWS, STRIP_AREA = 4, 4096  # rows of z at least, elements of z at most; images below 16 megapixels are one strip
# How far the transforms reach: g_a 30 pixels, g_s 2 elements of y, h_a 7 of y, h_s 2 of z.
G_A_MARGIN, G_S_MARGIN, H_A_MARGIN, H_S_MARGIN = 2, 2, 2, 2  # in elements of y, y, z, z
SEARCH_MARGIN = 2  # in elements of z: the error's gradient reaches 4 elements of y, that of the bits 2 of z
BATCH_PIXELS = 2**20  # images are batched up to this many pixels


class Span(NamedTuple):
    """Elements [start, stop) of an axis, to be computed from [begin, end)."""

    start: int
    stop: int
    begin: int
    end: int

    def scaled(self, factor: int) -> Span:
        """The same span on an axis that is `factor` times as fine."""
        return Span(*(factor * edge for edge in self))

    def source(self, factor: int = 1) -> slice:
        """[begin, end) on an axis that is `factor` times as fine."""
        return slice(self.begin * factor, self.end * factor)

    def target(self, factor: int = 1) -> slice:
        """[start, stop) on an axis that is `factor` times as fine."""
        return slice(self.start * factor, self.stop * factor)

    def inside(self, factor: int = 1) -> slice:
        """Where [start, stop) lies in a result computed from [begin, end)."""
        return slice((self.start - self.begin) * factor, (self.stop - self.begin) * factor)


def spans(length: int, size: int, margin: int) -> Iterator[Span]:
    """[0, length) in pieces of at most `size` that differ by at most one in length."""
    count = -(-length // size)
    edges = [length * i // count for i in range(count + 1)]
    for start, stop in zip(edges, edges[1:]):
        yield Span(start, stop, max(0, start - margin), min(length, stop + margin))


def tiles(shape: Sequence[int], size: int, margin: int) -> Iterator[tuple[Span, Span]]:
    """(rows, columns) of the tiles of [B, h, w, C]."""
    for rows in spans(shape[1], size, margin):
        for columns in spans(shape[2], size, margin):
            yield rows, columns


def strips(z_shape: Sequence[int], margin: int) -> Iterator[Span]:
    """The rows of z [B, h, w, C] in strips of its whole width."""
    return spans(z_shape[1], max(STRIP_ROWS, STRIP_AREA // z_shape[2]), margin)


def cut_pixels(image: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """The pixels [begin, end) of a tile in elements of y. Beyond the image, its last row and column are repeated."""
    part = image[rows.source(Y_PIXELS), columns.source(Y_PIXELS)]
    below = (rows.end - rows.begin) * Y_PIXELS - part.shape[0]
    right = (columns.end - columns.begin) * Y_PIXELS - part.shape[1]
    return np.pad(part, ((0, below), (0, right), (0, 0)), "edge") if below or right else part


def blocks(pixels: int) -> int:
    """The number of rows (or columns) of z for `pixels` rows (or columns), padded to a multiple of 64."""
    return -(-pixels // DOWNSAMPLING)


def group_by_size(images: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Places of images of (height, width, …) that are processed together: they have one padded size and equal further
    numbers, and a group has at most BATCH_PIXELS pixels or a single image."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (height, width, *others) in enumerate(images):
        groups.setdefault((blocks(height), blocks(width), *others), []).append(i)
    for (rows, columns, *_), places in groups.items():
        most = max(1, BATCH_PIXELS // (rows * columns * DOWNSAMPLING**2))
        yield from (places[i : i + most] for i in range(0, len(places), most))
