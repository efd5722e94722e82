"""`import hyperprior.pillow` teaches Pillow the `.hyp` format.

    Image.open("photo.hyp")                 reads the header, and decodes the pixels when they are used
    image.save("photo.hyp", model="MODEL")  MODEL: a name such as q3, a model, a run, or a Codec

Without `model`, `save` uses the model that HYPERPRIOR_MODEL names, else the default model in the box. `open` uses the
model in the box that wrote the file, else HYPERPRIOR_MODEL. `save` converts pixels as `hyperprior compress` does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import IO, Any, Optional

from PIL import Image, ImageFile

from hyperprior import images
from hyperprior.codec import box, container, files, load
from hyperprior.errors import BitstreamError, ConfigError, DataError

load_cached = functools.lru_cache(maxsize=8)(load)
find_codec = files.make_codec_finder(None)


class UnreadableError(BitstreamError, OSError):
    """A file that cannot be opened or decoded. Pillow's users expect an OSError."""


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError) as error:
        raise UnreadableError(str(error)) from error


class HypImageFile(ImageFile.ImageFile):
    format, format_description = "HYP", "hyperprior compressed image"
    _data: Optional[bytes] = None  # the file until its pixels are decoded

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        with as_os_error():
            stream = container.read(data)
        self._data, self._mode, self._size = data, "RGB", (stream.width, stream.height)

    def load(self) -> Any:
        if self._data is not None:
            with as_os_error():
                self.im = Image.fromarray(find_codec(self._data).decompress(self._data)).im
            self._data = None
            if self.fp is not None and self._exclusive_fp:  # as Pillow does after decoding
                self.fp.close()
                self.fp = None
        return super().load()


def save(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    model, quality, metric = (image.encoderinfo.get(name) for name in ("model", "quality", "metric"))
    codec: Any = model if hasattr(model, "compress") else load_cached(box.choose(model and str(model), quality, metric))
    container.check_size(image.height, image.width)  # before all pixels are copied
    try:
        pixels = images.to_rgb(image)
    except images.Unusable as error:
        raise DataError(str(error)) from error
    pixels = images.turn_upright(pixels, images.read_orientation(image))
    file.write(codec.compress(pixels, int(image.encoderinfo.get("effort", 0))))


def accept(prefix: bytes) -> bool:
    return prefix[: len(container.MAGIC)] == container.MAGIC


Image.register_open(HypImageFile.format, HypImageFile, accept)
Image.register_save(HypImageFile.format, save)
Image.register_extension(HypImageFile.format, files.SUFFIX)
