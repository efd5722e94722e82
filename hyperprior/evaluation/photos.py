"""The images of an evaluation: all images below a folder that can be decoded, sorted by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from hyperprior import image_files, images
from hyperprior.codec import files
from hyperprior.errors import DataError
from hyperprior.image_files import PHOTO_SUFFIXES


@dataclass(frozen=True)
class Photo:
    path: Path
    name: str  # the path below the folder of images
    height: int
    width: int
    sha256: str  # of size and pixels

    def pixels(self) -> np.ndarray:
        return read_photo(self.path)


def find_photos(folder: Path, warn: Callable[[str], None], out: Optional[Path] = None) -> list[Photo]:
    """The images below `folder`, sorted by name, each decoded once. Raises DataError.

    `warn` gets a message on files without an image suffix, and one for each image that cannot be decoded. Files below
    `out` are left out: they are results of an earlier evaluation.
    """
    try:
        paths = image_files.list_files(folder, PHOTO_SUFFIXES)
    except OSError as error:
        raise DataError(
            f"--images: {error.filename} cannot be read: {error.strerror}; give a directory of images"
        ) from error
    paths = [path for path in paths if not image_files.is_below(path, out)]
    if not paths:
        raise DataError(f"--images {folder} holds no image ({', '.join(PHOTO_SUFFIXES)})")
    if others := image_files.describe_other_files(folder, PHOTO_SUFFIXES, leave_out=out):
        warn(others)
    photos = []
    for path in paths:
        try:
            pixels = read_photo(path)
        except DataError as error:
            warn(f"{error}; it is left out")
            continue
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(b"%dx%d " % (height, width) + pixels.tobytes()).hexdigest()
        photos.append(Photo(path, path.relative_to(folder).as_posix(), height, width, digest))
    if not photos:
        raise DataError(f"--images {folder} holds no image that can be used")
    return photos


def read_photo(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, upright. Raises DataError."""
    try:
        return images.decode_photo(files.read_source(str(path)))[0]
    except (images.Unusable, DataError) as error:
        raise DataError(f"{path} cannot be used: {error}") from error
