"""What a run shows of its validation images: pictures, where the bits go, the latents, its place in the R-D plane."""

from __future__ import annotations

import contextlib
import csv
import importlib.resources
import io
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw

from hyperprior import baselines, rd, validation
from hyperprior.model import ScaleHyperprior, gaussian_bits_each
from hyperprior.summaries import Summaries

AMPLIFIED = 4  # the difference is shown this many times as large, around mid-gray
PANEL = 256  # pixels that a panel has at least, so that its caption fits
DEAREST = 10  # channels
PAPER = "Balle et al. 2018 (paper)"
JPEG_QUALITIES, JPEG_IMAGES = (10, 20, 35, 50, 70, 85), 64

Curve = list[tuple[float, float]]  # (bpp, PSNR in dB)
Images = Callable[[], Generator[np.ndarray, None, None]]  # [H, W, 3] uint8, anew at each call


class Look(NamedTuple):
    """One image as it comes out of the model: pixels [H, W, 3] uint8, `bits` of y [H/16, W/16, M]."""

    original: np.ndarray
    decoded: np.ndarray
    bits: np.ndarray
    y: np.ndarray  # rounded, like `bits`
    log_scales: np.ndarray
    bpp: float
    psnr_db: float
    ms_ssim: Optional[float]


class Monitor:
    """Shows the first `count` of the validation images that `images()` gives: the same ones all run long."""

    def __init__(
        self, hyperprior: ScaleHyperprior, images: Callable[[], Generator[np.ndarray, None, None]], count: int
    ):
        self.hyperprior, self.images, self.count = hyperprior, images, count
        self.look: Optional[Callable[[np.ndarray, tf.Tensor], Look]] = None  # traced when it is first needed
        self.anchors: Optional[tuple[Curve, Curve]] = None

    def show(self, report: Summaries, step: int, course: Curve) -> None:
        """Pictures, latents, and the R-D plane with the `course` of the run's validations, (bpp, PSNR in dB)."""
        self.look = self.look or make_look(self.hyperprior)
        z_offset = self.hyperprior.z_offset()
        with contextlib.closing(self.images()) as images:
            looks = [self.look(image, z_offset) for image in itertools.islice(images, self.count)]
        show_looks(report, step, looks, self.hyperprior.named_variables())
        if not self.anchors:
            with contextlib.closing(self.images()) as images:
                self.anchors = jpeg_curve(images), published_curve()
        if course:
            plane = rd_plane(course, *self.anchors)
            report.picture("rd_plane", step, plane, "this run's validations, JPEG, the paper's curve")


def make_look(hyperprior: ScaleHyperprior) -> Callable[[np.ndarray, tf.Tensor], Look]:
    """f(image [H, W, 3] uint8, z_offset) → Look; one graph for all sizes."""

    @tf.function(input_signature=[tf.TensorSpec([1, None, None, 3], tf.uint8), tf.TensorSpec([None])], autograph=False)
    def run(images: tf.Tensor, z_offset: tf.Tensor) -> tuple[tf.Tensor, ...]:
        x = tf.cast(images, tf.float32) / 255.0
        x_hat, out = validation.reconstruct(hyperprior, x, z_offset)
        bits = gaussian_bits_each(out.y, hyperprior.scales(out.log_scales))
        ms_ssim, fits = validation.ms_ssim_if_large(x, x_hat)
        pixels = tf.cast(tf.round(x_hat * 255.0), tf.uint8)
        psnr = rd.psnr_db(rd.mse(x, x_hat))
        return pixels, bits, out.y, out.log_scales, out.bits_y + out.bits_z, psnr, ms_ssim, fits

    def look(image: np.ndarray, z_offset: tf.Tensor) -> Look:
        pixels, bits, y, log_scales, total, psnr, ms_ssim, fits = (
            value.numpy()[0] for value in run(image[None], z_offset)
        )
        bpp = float(total) / (image.shape[0] * image.shape[1])
        return Look(image, pixels, bits, y, log_scales, bpp, float(psnr), float(ms_ssim) if fits else None)

    return look


def show_looks(report: Summaries, step: int, looks: Sequence[Look], parameters: dict[str, tf.Variable]) -> None:
    """Pictures, histograms, and the channels of y that cost most, of the same images at every call."""
    for index, look in enumerate(looks):
        report.picture(f"reconstruction/{index}", step, sheet(look, step), "original, reconstruction, difference, bits")
    y = np.concatenate([look.y.ravel() for look in looks])
    bits = np.concatenate([look.bits.reshape(-1, look.bits.shape[-1]) for look in looks])
    scales = np.concatenate([look.log_scales.ravel() for look in looks]) / np.log(2.0)
    report.histogram("scales/log2", step, scales, "log2 of the standard deviations of y")
    report.histogram("latents/y", step, y, "rounded y")
    for name, variable in parameters.items():
        if name.endswith(("/beta", "/gamma")):
            report.histogram(f"gdn/{name}", step, np.square(variable.numpy()).ravel(), "as the norm uses it")
    report.scalar("val", "latents/zeros", step, float(np.mean(y == 0.0)), "share of y that is rounded to zero")
    report.text("val", "latents/dearest", step, dearest(bits))


def dearest(bits: np.ndarray) -> str:
    """Markdown: the channels of y [values, M] that cost most."""
    share = bits.sum(axis=0) / max(float(bits.sum()), 1e-9)
    order = np.argsort(-share)[:DEAREST]
    rows = [f"| {channel} | {share[channel]:.1%} | {bits[:, channel].mean():.2f} |" for channel in order]
    head = f"The {len(order)} channels of y that cost most take {share[order].sum():.0%} of its bits.\n\n"
    return head + "\n".join(["| channel | share of y's bits | bits a value |", "|---|---|---|", *rows])


def sheet(look: Look, step: int, gap: int = 4) -> Image.Image:
    """Original, reconstruction, their difference, and the bits of y in each 16 x 16 block, over a caption."""
    height, width = look.original.shape[:2]
    blocks = look.bits.sum(axis=-1)
    most = max(float(blocks.max()), 1e-9)
    heat = np.kron(blocks / most, np.ones((16, 16)))[:height, :width]
    difference = 128.0 + AMPLIFIED * (look.decoded.astype(np.float32) - look.original)
    panels = {
        "original": look.original,
        "reconstruction": look.decoded,
        f"difference x {AMPLIFIED}": np.clip(difference, 0, 255).astype(np.uint8),
        f"bits of y per block: black 0, white {most:.0f}": glow(heat),
    }
    times = max(1, -(-PANEL // width))
    picture = Image.new("RGB", (4 * width * times + 3 * gap, height * times + 36), "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, pixels) in enumerate(panels.items()):
        x = index * (width * times + gap)
        panel = Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)
        picture.paste(panel, (x, 0))
        draw.text((x + 2, height * times + 3), title, fill="#555555")
    similarity = "" if look.ms_ssim is None else f", MS-SSIM {look.ms_ssim:.4f}"
    caption = f"step {step}: {look.bpp:.3f} bpp, {look.psnr_db:.2f} dB{similarity}"
    draw.text((2, height * times + 19), caption, fill="black")
    return picture


def glow(share: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] → black, red, yellow, white: [H, W, 3] uint8."""
    return (255.0 * np.clip(3.0 * share[..., None] - np.arange(3), 0.0, 1.0)).astype(np.uint8)


# The R-D plane ------------------------------------------------------------------------------------------------


def jpeg_curve(images: Iterator[np.ndarray]) -> Curve:
    """(bpp, PSNR in dB) of Pillow's JPEG over the first JPEG_IMAGES images: means over the images."""
    jpeg = baselines.choose("jpeg-opt", lambda text: None)[0]
    found: list[list[tuple[float, float]]] = [[] for _ in JPEG_QUALITIES]
    for _, image in zip(range(JPEG_IMAGES), images):
        for quality, points in zip(JPEG_QUALITIES, found):
            data = jpeg.encode(image, quality)
            error = np.mean(np.square(baselines.decode(data).astype(np.float32) - image)) / 255.0**2
            points.append((8 * len(data) / (image.shape[0] * image.shape[1]), -10 * np.log10(max(error, 1e-10))))
    return [(float(b), float(p)) for b, p in (np.mean(points, axis=0) for points in found if points)]


def published_curve() -> Curve:
    """(bpp, PSNR in dB) of the paper's models for MSE, averages over Kodak."""
    source = importlib.resources.files("hyperprior") / "kodak_rd.csv"
    rows = [row for row in csv.DictReader(io.StringIO(source.read_text("utf-8"))) if row["codec"] == PAPER]
    return sorted((float(r["bpp"]), float(r["psnr_db"])) for r in rows if r["optimized_for"] == "mse")


def rd_plane(course: Curve, jpeg: Curve, published: Curve) -> Image.Image:
    """The course of a run's validations, (bpp, PSNR in dB), beside JPEG on the same images and a published curve."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if published:
        axes.plot(*zip(*published), color="#b08800", linestyle="--", linewidth=1, label="published, on Kodak")
    if jpeg:
        axes.plot(*zip(*jpeg), color="0.5", marker="o", markersize=3, linewidth=1, label="JPEG, on these images")
    axes.plot(*zip(*course), color="#d1242f", marker=".", linewidth=0.8, alpha=0.6, label="this run's validations")
    axes.plot(*course[-1], color="#d1242f", marker="o", markersize=9)
    bpps, values = zip(*[*course[-20:], *jpeg])
    axes.set_xlim(0.0, 1.15 * max(bpps))
    axes.set_ylim(min(values) - 1.0, max(values) + 1.0)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR, dB")
    axes.grid(color="0.92")
    axes.legend(loc="lower right", frameon=False)
    with contextlib.closing(io.BytesIO()) as file:
        figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")
