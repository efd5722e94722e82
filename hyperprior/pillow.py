"""`import hyperprior.pillow` teaches Pillow the `.hyp` format.

    Image.open("photo.hyp")                 the size from the header; decoded when pixels are asked for
    image.save("photo.hyp", model="MODEL")  a name such as q3, a model, a run, or a Codec; pixels as `compress` takes

Without `model` both use the one that the environment variable HYPERPRIOR_MODEL names, else the models in the box.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import IO, Any, Optional

from PIL import Image, ImageFile

from hyperprior import container, files, images, load, models
from hyperprior.errors import DataError

cached = functools.lru_cache(maxsize=8)(load)


@functools.lru_cache(maxsize=8)
def reader(model: Optional[str]) -> Callable[[bytes], Any]:
    return files.reader(model)


class HypImageFile(ImageFile.ImageFile):
    format, format_description = "HYP", "hyperprior compressed image"

    def _open(self) -> None:
        assert self.fp is not None
        self._data: Optional[bytes] = self.fp.read()
        stream = container.read(self._data)
        self._mode, self._size = "RGB", (stream.width, stream.height)

    def load(self) -> Any:
        if self._data is not None:
            self.im = Image.fromarray(reader(None)(self._data).decompress(self._data)).im
            self._data = None
        return super().load()


def save(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    model, quality = (image.encoderinfo.get(name) for name in ("model", "quality"))
    codec: Any = model if hasattr(model, "compress") else cached(models.chosen(model and str(model), quality))
    try:
        pixels = images.to_rgb(image)
    except images.Unusable as error:
        raise DataError(str(error)) from error
    pixels = images.upright(pixels, images.orientation_of(image))
    file.write(codec.compress(pixels, int(image.encoderinfo.get("effort", 0))))


def accept(prefix: bytes) -> bool:
    return prefix[: len(container.MAGIC)] == container.MAGIC


Image.register_open(HypImageFile.format, HypImageFile, accept)
Image.register_save(HypImageFile.format, save)
Image.register_extension(HypImageFile.format, files.SUFFIX)
