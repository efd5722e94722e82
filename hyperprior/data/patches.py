"""The part of an image that training or validation sees: random patches, or the centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

import numpy as np
from PIL import Image

from hyperprior import images
from hyperprior.config import Data
from hyperprior.draws import draw, draw_unit
from hyperprior.images import TooSmall, Unusable

MAX_ASPECT = 16  # largest ratio of the sides of an image that is enlarged


class Place(NamedTuple):
    """Where a patch is cut. `top` and `left` are random integers, taken modulo the number of possible positions.

    The window is larger than the patch by 1 / `scale`, but at most as large as the image. It is scaled down to the
    patch, and mirrored if `flip`.
    """

    top: int
    left: int
    scale: float = 1.0
    flip: bool = False

    def window(self, height: int, width: int, size: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the pixels that become the patch."""
        side = min(round(size / self.scale), height, width)
        return self.top % (height - side + 1), self.left % (width - side + 1), side, side

    def finish(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """The patch [size, size, 3] from the pixels of `window`."""
        if len(pixels) != size:
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
        return pixels[:, ::-1] if self.flip else pixels


def draw_place(settings: Data, seed: int, epoch: int, key: str, number: int) -> Place:
    """Draws where patch `number` of the sample with this key is cut in this epoch."""
    patch = (epoch, key, number)
    bits = draw(seed, "crop", *patch)
    scale = 1.0
    if settings.min_scale < 1:  # each draw costs a few microseconds of Python's lock
        scale -= (1.0 - settings.min_scale) * draw_unit(seed, "scale", *patch)
    flip = settings.flip and draw_unit(seed, "flip", *patch) < 0.5
    return Place(bits >> 32, bits & 0xFFFFFFFF, scale, flip)


def cut_patches(data: bytes, size: int, places: Sequence[Place], *, upscale: bool = False) -> np.ndarray:
    """Patches of an encoded image: [P, size, size, 3] uint8, one for each of `places`.

    With `upscale` a smaller image is enlarged until its shorter side fits; else TooSmall is raised. Raises Unusable.
    """
    (result,) = cut_group([data], size, [places], upscale=upscale)
    if isinstance(result, Unusable):
        raise result
    return result


def cut_group(
    encoded: Sequence[bytes], size: int, places: Sequence[Sequence[Place]], *, upscale: bool = False
) -> list[Union[np.ndarray, Unusable]]:
    """The patches of each of several images, or the reason why it has none."""
    # The fused operation stops after the window, so it does not notice a truncated file.
    fused = [
        number
        for number, data in enumerate(encoded)
        if len(places[number]) == 1 and images.is_jpeg(data) and data.rstrip(b"\0").endswith(b"\xff\xd9")
    ]
    places_of_fused = [places[number][0] for number in fused]
    windows = cut_windows([encoded[number] for number in fused], size, places_of_fused, upscale)
    results = dict(zip(fused, windows))
    for number, data in enumerate(encoded):
        if results.get(number) is None:
            try:
                results[number] = cut_whole(data, size, places[number], upscale)
            except Unusable as error:
                results[number] = error
    return [results[number] for number in range(len(encoded))]  # type: ignore[misc]


def cut_windows(
    encoded: Sequence[bytes], size: int, places: Sequence[Place], upscale: bool
) -> list[Union[np.ndarray, Unusable, None]]:
    """One patch [1, size, size, 3] of each JPEG, decoded no further than its window.

    None if it must be decoded as a whole, or cannot be decoded at all.
    """
    if not encoded:
        return []
    results: list[Union[np.ndarray, Unusable, None]] = [None] * len(encoded)
    try:
        tensor = images.to_tensor(encoded)
        sizes = images.read_jpeg_sizes(tensor)
        if not all(0 < height * width <= images.MAX_PIXELS for height, width in sizes):
            raise Unusable("an impossible size")
        fits = [min(height, width) >= size for height, width in sizes]
        # Of an image that is too small one pixel is decoded: a call for each number of images would be traced anew.
        windows = [
            place.window(*shape, size) if is_fit else (0, 0, 1, 1) for place, shape, is_fit in zip(places, sizes, fits)
        ]
        decoded = images.decode_jpeg_windows(tensor, windows)
        for i, (pixels, (height, width)) in enumerate(zip(decoded, sizes)):
            if fits[i]:
                results[i] = places[i].finish(pixels, size)[None]
            elif not upscale:
                results[i] = make_too_small(height, width, size)
    except Unusable:
        if len(encoded) == 1:
            return [None]
        # One of them is corrupt, or too large.
        return [result for i in range(len(encoded)) for result in cut_windows([encoded[i]], size, [places[i]], upscale)]
    return results


def cut_whole(data: bytes, size: int, places: Sequence[Place], upscale: bool) -> np.ndarray:
    """Patches of an image that is decoded as a whole. Raises Unusable, TooSmall."""
    if images.is_jpeg(data):
        check_size(*images.read_jpeg_size(data), size, upscale)
        image = images.decode_jpeg(data)
    else:
        opened = images.open_image(data)
        check_size(opened.height, opened.width, size, upscale)
        image = images.to_rgb(opened)
    if min(image.shape[:2]) < size:
        image = enlarge(image, size)
    height, width = image.shape[:2]
    patches = []
    for place in places:
        top, left, rows, columns = place.window(height, width, size)
        patches.append(place.finish(image[top : top + rows, left : left + columns], size))
    return np.stack(patches)


def crop_centre(data: bytes, size: int) -> np.ndarray:
    """The middle [size, size, 3] uint8 of an encoded image. Raises Unusable, TooSmall."""
    image = images.decode(data)
    height, width = image.shape[:2]
    check_size(height, width, size, upscale=False)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def check_size(height: int, width: int, size: int, upscale: bool) -> None:
    """Raises TooSmall for an image with a side below `size`, unless it may be enlarged."""
    if min(height, width) < size and not upscale:
        raise make_too_small(height, width, size)


def make_too_small(height: int, width: int, size: int) -> TooSmall:
    return TooSmall(f"{width}x{height} is smaller than {size}x{size}")


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Enlarges the image until its shorter side is `size`. Raises Unusable for a very narrow image."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise Unusable(f"{width}x{height} is too narrow to be enlarged")
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
