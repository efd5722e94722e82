"""Pictures of a run: reconstructed validation images, the bits of their blocks, latents, and the R-D plane."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw, ImageFont

from hyperprior import metric_table
from hyperprior.config import Loss
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.metrics import measure
from hyperprior.reference import baselines, published
from hyperprior.watch.summaries import Summaries

AMPLIFICATION = 4  # factor on the difference that is shown, around mid-gray
MIN_PANEL = 256  # pixels: the least width of a panel, so that its text is smooth
CAPTION_AND_TITLE = (23, 26)  # a picture's width divided by the sizes of its texts: 15 and 13 pixels at 350
NUM_COSTLIEST = 10  # channels
JPEG_QUALITIES, JPEG_IMAGES = (10, 20, 35, 50, 70, 85), 64

Curve = list[tuple[float, float]]  # (bpp, PSNR in dB)
Images = Callable[[], Generator[np.ndarray, None, None]]  # [H, W, 3] uint8; each call starts again


class Look(NamedTuple):
    """One image and the model's output for it: pixels [H, W, 3] uint8; latents [H/16, W/16, M].

    `y`: rounded latents; `bits` and `log_scales`: of each value of y; `values`: metrics by name.
    """

    original: np.ndarray
    decoded: np.ndarray
    bits: np.ndarray
    y: np.ndarray
    log_scales: np.ndarray
    values: dict[str, float]


class Pictures:
    """Shows the first `count` validation images from `images()`, the same ones during the whole run."""

    def __init__(self, model: ScaleHyperprior, loss: Loss, images: Images, count: int):
        self.model, self.loss, self.images, self.count = model, loss, images, count
        self.look: Optional[Callable[[np.ndarray, tf.Tensor], Look]] = None  # traced at the first use
        self.reference_curves: Optional[tuple[Curve, Curve]] = None  # JPEG on these images, and a published curve

    def show(self, report: Summaries, step: int, course: Curve) -> None:
        """Shows pictures, latents, and the R-D plane. `course`: (bpp, PSNR in dB) of the run's validations."""
        self.look = self.look or make_look(self.model, self.loss)
        z_offset = self.model.z_offset()
        with contextlib.closing(self.images()) as images:
            looks = [self.look(image, z_offset) for image in itertools.islice(images, self.count)]
        show_looks(report, step, looks, self.model.named_variables())
        if not self.reference_curves:
            with contextlib.closing(self.images()) as images:
                self.reference_curves = measure_jpeg_curve(images), published.paper_curve()
        if course:
            plane = draw_rd_plane(course, *self.reference_curves)
            report.write_picture("4_pictures/rd_plane", step, plane, "this run's validations, JPEG, the paper's curve")


def make_look(model: ScaleHyperprior, loss: Loss) -> Callable[[np.ndarray, tf.Tensor], Look]:
    """Makes f(image [H, W, 3] uint8, z_offset) → Look, with one graph for all sizes."""

    @tf.function(input_signature=[tf.TensorSpec([1, None, None, 3], tf.uint8), tf.TensorSpec([None])], autograph=False)
    def run(images: tf.Tensor, z_offset: tf.Tensor) -> tuple[Any, ...]:
        x = tf.cast(images, tf.float32) / 255.0
        x_hat, out = model.reconstruct(x, z_offset)
        bits = model.bits_of_each_y(out.y, model.scales(out.log_scales))
        values = measure(x, x_hat, out.bits_y, out.bits_z, loss, with_ms_ssim=True)
        return tf.cast(tf.round(x_hat * 255.0), tf.uint8), bits, out.y, out.log_scales, values

    def look(image: np.ndarray, z_offset: tf.Tensor) -> Look:
        *tensors, measured = run(image[None], z_offset)
        decoded, bits, y, log_scales = (tensor.numpy()[0] for tensor in tensors)
        values = {name: float(value[0]) for name, value in measured.items()}
        values["bpp"] = values["bpp_y"] + values["bpp_z"]
        if not values.pop("ms_ssim_images"):
            del values["ms_ssim"]
        return Look(image, decoded, bits, y, log_scales, values)

    return look


def show_looks(report: Summaries, step: int, looks: Sequence[Look], parameters: dict[str, tf.Variable]) -> None:
    """Shows pictures, histograms, and the channels of y that cost most."""
    panels = "original, reconstruction, difference, bits"
    for index, look in enumerate(looks):
        report.write_picture(f"4_pictures/reconstruction_{index}", step, draw_sheet(look), panels)
    y = np.concatenate([look.y.ravel() for look in looks])
    bits = np.concatenate([look.bits.reshape(-1, look.bits.shape[-1]) for look in looks])
    scales = np.concatenate([look.log_scales.ravel() for look in looks]) / np.log(2.0)
    zeros = float(np.mean(y == 0.0))
    report.write_scalar("val", "5_details/zeros_in_y", step, zeros, "share of y that is rounded to zero")
    report.write_histogram("6_latents/log2_scales", step, scales, "log2 of the standard deviations of y")
    report.write_histogram("6_latents/y", step, y, "rounded y")
    for name, variable in parameters.items():
        if name.endswith(("/beta", "/gamma")):
            values = np.square(variable.numpy()).ravel()
            report.write_histogram(f"7_gdn/{name}", step, values, "the values that GDN uses")
    report.write_text("val", "costliest_channels", step, list_costliest_channels(bits))


def list_costliest_channels(bits: np.ndarray) -> str:
    """A Markdown table of the channels of y that cost most. `bits`: [values, M]."""
    share = bits.sum(axis=0) / max(float(bits.sum()), 1e-9)
    order = np.argsort(-share)[:NUM_COSTLIEST]
    rows = [f"| {channel} | {share[channel]:.1%} | {bits[:, channel].mean():.2f} |" for channel in order]
    head = f"The {len(order)} channels of y that cost most take {share[order].sum():.0%} of its bits.\n\n"
    return head + "\n".join(["| channel | share of y's bits | bits a value |", "|---|---|---|", *rows])


def draw_sheet(look: Look, gap: int = 4) -> Image.Image:
    """Draws a caption over four panels: original, reconstruction, difference, and the bits of y in each 16 x 16 block.

    The text grows with the picture, so that it can be read where TensorBoard shows the picture 350 pixels wide.
    """
    height, width = look.original.shape[:2]
    blocks = look.bits.sum(axis=-1)
    max_bits = max(float(blocks.max()), 1e-9)
    heat = np.kron(blocks / max_bits, np.ones((16, 16)))[:height, :width]
    difference = 128.0 + AMPLIFICATION * (look.decoded.astype(np.float32) - look.original)
    panels = {
        "original": look.original,
        "reconstruction": look.decoded,
        f"difference x {AMPLIFICATION}": np.clip(difference, 0, 255).astype(np.uint8),
        f"bits: black 0, white {max_bits:.0f}": colour_heat(heat),
    }
    zoom = max(1, -(-MIN_PANEL // width))
    width, height = width * zoom, height * zoom
    sizes = [(2 * width + gap) / share for share in CAPTION_AND_TITLE]
    (caption, title), (top, strip) = map(ImageFont.load_default, sizes), (round(1.5 * size) for size in sizes)
    picture = Image.new("RGB", (2 * width + gap, top + 2 * (strip + height)), "white")
    draw = ImageDraw.Draw(picture)
    text = metric_table.describe(look.values, ("bpp", "psnr_db", "ms_ssim"))
    draw.text((gap, top / 2), text, fill="black", font=caption, anchor="lm")
    for index, (name, pixels) in enumerate(panels.items()):
        x, y = index % 2 * (width + gap), top + index // 2 * (strip + height)
        draw.text((x + gap, y + strip / 2), name, fill="black", font=title, anchor="lm")
        panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(panel, (x, y + strip))
    return picture


def colour_heat(share: np.ndarray) -> np.ndarray:
    """Colours [H, W] in [0, 1] from black over red and yellow to white: [H, W, 3] uint8."""
    return (255.0 * np.clip(3.0 * share[..., None] - np.arange(3), 0.0, 1.0)).astype(np.uint8)


# The R-D plane ------------------------------------------------------------------------------------------------


def measure_jpeg_curve(images: Iterator[np.ndarray]) -> Curve:
    """Measures Pillow's JPEG, (bpp, PSNR in dB), as means over the first JPEG_IMAGES images."""
    jpeg = baselines.choose("jpeg-opt", lambda text: None)[0]
    by_quality: list[list[tuple[float, float]]] = [[] for _ in JPEG_QUALITIES]
    for image in itertools.islice(images, JPEG_IMAGES):
        for quality, points in zip(JPEG_QUALITIES, by_quality):
            data = jpeg.encode(image, quality)
            error = np.mean(np.square(baselines.decode(data).astype(np.float32) - image)) / 255.0**2
            points.append((8 * len(data) / (image.shape[0] * image.shape[1]), -10 * np.log10(max(error, 1e-10))))
    return [(float(b), float(p)) for b, p in (np.mean(points, axis=0) for points in by_quality if points)]


def draw_rd_plane(course: Curve, jpeg: Curve, published: Curve) -> Image.Image:
    """Draws a run's validations, (bpp, PSNR in dB), with JPEG on the same images and a published curve."""
    from matplotlib.figure import Figure  # takes a second to import

    # Texts of 10 points are 12 pixels high where TensorBoard shows the figure 350 pixels wide.
    figure = Figure(figsize=(4.2, 4.2), dpi=180, layout="constrained")
    axes = figure.add_subplot()
    if published:
        axes.plot(*zip(*published), color="#b08800", linestyle="--", label="published, on Kodak")
    if jpeg:
        axes.plot(*zip(*jpeg), color="0.5", marker="o", markersize=4, label="JPEG, on these images")
    axes.plot(
        *zip(*course),
        color="#d1242f",
        marker=".",
        linewidth=1,
        alpha=0.6,
        label="this run's validations, the last one large",
    )
    axes.plot(*course[-1], color="#d1242f", marker="o", markersize=9)
    axes.set_title("{:.4f} bpp, {:.2f} dB".format(*course[-1]), color="#d1242f", fontsize=14, loc="left")
    right = 2.0 * max(bpp for bpp, _ in [*course[-20:], *jpeg[:1]])
    values = [psnr for bpp, psnr in [*course[-20:], *jpeg] if bpp <= right]
    axes.set_xlim(0.0, right)
    axes.set_ylim(min(values) - 1.0, max(values) + 1.0)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR, dB")
    axes.grid(color="0.92")
    figure.legend(loc="outside lower left", frameon=False)  # inside it would cover points
    with contextlib.closing(io.BytesIO()) as file:
        figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")
