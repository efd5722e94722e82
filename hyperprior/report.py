"""report.html: curves, tables and pictures of an evaluation in one file that needs no network."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

from hyperprior import plots

SIDE = 768  # pixels of the detail that the report shows of a picture, so that it stays a file to send
ROW = ["curve", "point", "image", "width", "height", "bytes", "bpp", "psnr_db", "ms_ssim"]
ROW += ["encode_seconds", "decode_seconds"]
POINT = ["kind", "curve", "point", "bpp", "psnr_db", "ms_ssim_db", "ms_ssim", "lambda", "metric", "loss"]


class Version(NamedTuple):
    """A picture as a codec gives it: `text` says its size and quality, `file` is what a browser can decode itself."""

    title: str
    text: str
    pixels: np.ndarray
    file: Optional[bytes] = None
    kind: str = ""  # such as image/jpeg


def picture(name: str, original: np.ndarray, versions: Sequence[Version]) -> dict[str, Any]:
    """One picture of the report, or of a large one the detail of most contrast; nothing is lost again."""
    part = plots.detail(original, SIDE)
    height, width = original[part].shape[:2]
    whole = (height, width) == original.shape[:2]

    def source(version: Version) -> str:
        if version.file and whole:
            return embedded(version.kind, version.file)
        return embedded("image/webp", lossless(version.pixels[part]))

    coded = [{"title": v.title, "text": v.text, "src": source(v)} for v in versions]
    own = embedded("image/webp", lossless(original[part]))
    return {"name": name, "width": width, "height": height, "original": own, "versions": coded}


def lossless(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=50, method=4)
    return file.getvalue()


def embedded(kind: str, file: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(file).decode()


def render(summary: dict[str, Any], rows: Sequence[dict[str, Any]], pictures: Sequence[dict[str, Any]]) -> str:
    """The page. `summary`: what summary.json holds; `rows`: of images.csv."""
    names = [image["name"] for image in summary["images"]]
    about = f"{names[0]} to {names[-1]}; every byte and pixel went through a real file. "
    data = {
        "title": f"{len(names)} images, and what they cost",
        "about": about + f"hyperprior {summary['hyperprior']}.",
        "points": [{key: point.get(key) for key in POINT} for point in summary["points"]],
        "bd": summary["bd"],
        "rows": [{key: row.get(key) for key in ROW} for row in rows],
        "pictures": pictures,
        "pictures_about": "Move the line: the original is left of it. Other codecs' files are as large as the first, "
        f"or next smaller. Large pictures show the {SIDE} x {SIDE} pixels of most detail, numbers are of the whole.",
    }
    page = (importlib.resources.files("hyperprior") / "report.html").read_text("utf-8")
    # Nothing that a file is named can end the script.
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
