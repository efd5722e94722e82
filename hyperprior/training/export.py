"""Writes the model directory of a run: all that a decoder needs. Tables are built only here, never by a decoder.

MODEL/
  model.npz      weights, range-coding tables, integer h_s, config and fingerprint; `codec.load` reads it
  model.json     only the description, for people
  saved_model/   the same codec as a TensorFlow SavedModel, for serving
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from hyperprior import __version__, storage
from hyperprior.codec import box, codec, container, making, native, serving
from hyperprior.codec.codec import Codec
from hyperprior.config import SOURCES, Data, to_model_tree
from hyperprior.data import shards, splits, stream
from hyperprior.errors import ConfigError, DataError
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import Arrays, TrainedWeights
from hyperprior.terminal import Terminal
from hyperprior.training import checkpoint

CONTENTS = re.compile(
    r"model\.(npz|json)|saved_model(/(assets|(fingerprint|saved_model)\.pb|variables(/variables\.(index|data-\S+))?))?"
)
COST_IMAGES = 8
NOT_KEPT = "; a run keeps no query, password or header of its sources, so only `train` can measure the cost with them"
HIDDEN = re.compile(r"[\s=uUHb]\.\.\.(\s|$)")  # what `hide_secrets` leaves in a command


def export(
    run: Path, out: Optional[Path], terminal: Terminal, force: bool = False, data: Optional[Data] = None
) -> dict[str, Any]:
    """Writes the model directory of a run, by default RUN/model. Returns its path, fingerprint, step and so on.

    `data`: the run's settings with the secrets of its sources, which a run does not keep.

    If `out` ends in .npz, writes only the file model.npz under that name: the same model, without what serving needs.
    Does nothing if `out` already is this run's export.

    Raises ConfigError if the run holds no checkpoint or cannot be made exact. Without `force`, also raises it if `out`
    holds another model, because files may need that model. Raises StorageError if `out` cannot be written. After an
    error, `out` is unchanged.
    """
    if out and out.suffix == ".npz":
        return export_file(run, out, terminal, force)
    force = force or out is None  # RUN/model belongs to the run
    out = out or run / "model"
    if out.is_symlink() or not out.name:
        out = out.resolve()
    check_contents(out)
    trained = checkpoint.best_weights(run, terminal.warn)
    if data:
        trained = dataclasses.replace(trained, settings=trained.settings.model_copy(update={"data": data}))
    weights = storage.fingerprint(trained.arrays)
    operations, replaced = native.load_operations(), None
    with contextlib.suppress(ConfigError, DataError):
        has_saved_model = (out / "saved_model" / "saved_model.pb").is_file() or not operations.module
        is_whole = (out / "model.json").is_file() and has_saved_model
        existing = codec.load(out)
        if is_whole and existing.info.get("weights") == weights:
            terminal.say(f"model    {out}, {existing.fingerprint}: exported already")
            return {"model": str(out), "fingerprint": existing.fingerprint, **existing.info}
        replaced = existing.fingerprint

    check_replacement(out / box.WEIGHTS, "weights", weights, force)
    made, arrays, description = make_exported(trained, weights, str(out), terminal.say)
    check_replacement(out / box.WEIGHTS, "fingerprint", made.fingerprint, force)
    try:
        with replace_directory(out) as folder:
            save_exported(folder / box.WEIGHTS, arrays, description)
            storage.write_text(folder / "model.json", json.dumps(description, indent=2) + "\n")
            if operations.module:
                serving.save(made, operations.module, folder / "saved_model")
            else:
                terminal.say(f"         without a SavedModel, which needs the C++ range coder: {operations.report}")
    except (OSError, tf.errors.OpError) as error:
        storage.raise_cannot_write(
            error,
            out,
            retry="free the disk or choose another --out, and export again",
            elsewhere="choose another --out",
        )
    report = report_exported(out, description, terminal)
    if replaced and replaced != report["fingerprint"]:
        terminal.say(f"         in place of model {replaced}, which the files that it wrote need")
    return report


def check_contents(out: Path) -> None:
    """Raises ConfigError if `out` holds anything that `export` did not write."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    others = sorted(name for name in names if not CONTENTS.fullmatch(name))
    if (out.exists() and not out.is_dir()) or others or (names and box.WEIGHTS not in names):
        found = f"{others[0]}, which is no part of" if others else "something else than"
        raise ConfigError(f"{out} holds {found} an exported model; move it away, or choose another --out")


def export_file(run: Path, out: Path, terminal: Terminal, force: bool) -> dict[str, Any]:
    """Writes the model of a run into one file."""
    trained = checkpoint.best_weights(run, terminal.warn)
    weights = storage.fingerprint(trained.arrays)
    check_replacement(out, "weights", weights, force)
    made, arrays, description = make_exported(trained, weights, str(out), terminal.say)
    check_replacement(out, "fingerprint", made.fingerprint, force)
    save_exported(out, arrays, description)
    return report_exported(out, description, terminal)


def check_replacement(file: Path, key: str, value: str, force: bool) -> None:
    """Raises ConfigError if `file` holds a model whose description has another value of `key`: only that model can read
    the files that it wrote."""
    if not file.exists() or force:
        return
    description = None
    with contextlib.suppress(DataError):
        description = box.read_description(file)
    if not description or description.get(key) != value:
        current = f"model {description['fingerprint']}" if description else "something else"
        raise ConfigError(f"{file} holds {current}, which its .hyp files need; choose another --out, or give --force")


@contextlib.contextmanager
def replace_directory(out: Path) -> Iterator[Path]:
    """Yields a new directory, which replaces `out` at the end. If anything fails, `out` is unchanged.

    At every moment `out` is complete, old or new. Where the file system cannot exchange two names in one step (NFS),
    SIGKILL between two renames leaves none: the old one is then in `out`.*.tmp.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile: a signal before it returns the name would leave the directory.
    folder = out.with_name(f"{out.name}.{secrets.token_hex(8)}.tmp")
    new, old = folder / "new", folder / "old"
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists() and not storage.exchange(new, out):
            out.rename(old)
        if new.exists() and not out.exists():
            new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(folder, ignore_errors=True)


def save_exported(path: Path, arrays: Arrays, description: dict[str, Any]) -> None:
    storage.save_arrays(path, arrays, description, file_format=box.FORMAT, compressed=True)


def make_exported(
    trained: TrainedWeights, weights: str, origin: str, say: Callable[[str], None]
) -> tuple[Codec, Arrays, dict[str, Any]]:
    """The codec of trained weights, rounded first, with its arrays and their description."""
    stored = {name: shorten(array) for name, array in trained.arrays.items()}
    rounded = dataclasses.replace(trained, arrays={name: array.astype(np.float32) for name, array in stored.items()})
    model = ScaleHyperprior(trained.settings.model)
    storage.assign_arrays(model.named_variables(), rounded.arrays, origin)
    # Of h_s a file keeps only the integers.
    floats = {name: array for name, array in stored.items() if not name.startswith("h_s/")}
    arrays = making.make_arrays(rounded) | floats
    info: dict[str, Any] = {"step": trained.step, "weights": weights, "version": __version__}
    made = Codec(arrays, trained.settings, info, origin)
    info["exactness"] = measure_cost(model, made, say)
    description = {
        "format": box.FORMAT,
        "fingerprint": made.fingerprint,
        "info": info,
        "config": to_model_tree(trained.settings),
    }
    return made, arrays, description


def shorten(array: np.ndarray) -> np.ndarray:
    """The array in float16. Kernels keep the first 7 of its 10 bits of mantissa, so that they compress.

    The file of a model with 96 filters gets 16% smaller by this, and its loss changed by less than 0.01% (12
    photographs, lambda 0.0483). With 6 bits it rose by 0.17%.
    """
    short = array.astype(np.float16)
    if short.ndim == 4:
        short = (short.view(np.uint16) + np.uint16(0b100) & np.uint16(0xFFF8)).view(np.float16)
    return short


def report_exported(out: Path, description: dict[str, Any], terminal: Terminal) -> dict[str, Any]:
    """Prints the facts about an export, and returns them."""
    info, fingerprint = description["info"], description["fingerprint"]
    terminal.say(f"model    {out}, {fingerprint}, weights of step {info['step']}")
    terminal.say(f"         {describe_cost(info['exactness'])}")
    return {"model": str(out), "fingerprint": fingerprint, **info}


# The cost of exactness ------------------------------------------------------------------------------------


def measure_cost(model: ScaleHyperprior, made: Codec, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures the rate that integers and tables cost on a few held-out images.

    Returns bits per pixel of the same latents: estimates with the float h_s and the integer h_s, and the size of real
    files, which also adapt the model (see `codec.adaptation`).
    """
    pixels, estimate, exact_estimate, real = 0, 0.0, 0.0, 0
    try:
        images = load_held_out_images(made)
        if not images:
            return {"images": 0, "reason": "the run has no held-out images, or none that can be used"}
        offset = model.z_offset()
        for image in images:
            y, z = made.latents_of([image])
            z_hat = tf.cast(z, tf.float32) + offset
            bits = model.bits_of_y(y, model.scales(model.h_s(z_hat, precise=True))) + model.prior.bits(z_hat)
            file = container.write(made.encode(y, z, [(image.shape[0], image.shape[1])])[0])
            pixels += image.shape[0] * image.shape[1]
            estimate += float(bits[0])
            exact_estimate += made.bits_of_latents(y, z)
            real += 8 * len(file)
    except DataError as error:
        remote = any(shards.is_remote(source) for name in SOURCES for source in getattr(made.config.data, name))
        say(f"         {error}{NOT_KEPT * remote}")
        return {"images": 0, "reason": "the run's images cannot be read"}  # a model names no sources
    values = {"bpp_float": estimate, "bpp_exact": exact_estimate, "bpp_file": real}
    return {"images": len(images), **{name: bits / pixels for name, bits in values.items()}}


def load_held_out_images(made: Codec) -> list[np.ndarray]:
    """Loads the first COST_IMAGES usable images of the run's val or test split, [H, W, 3] uint8. Raises DataError."""
    data = made.config.data
    for source in (source for name in SOURCES for source in getattr(data, name)):
        if source.lower().startswith("pipe:") and HIDDEN.search(source):
            raise DataError(f"{source} lacks a part")  # the rest could be another command
    opened = splits.open_splits(data, made.config.train.batch_size, count=False)
    split = opened.val if opened.val.images else opened.test
    images: list[np.ndarray] = []
    with contextlib.closing(stream.eval_batches(split, data, range(1), 1)) as places:
        for (place,) in places:
            if len(images) == COST_IMAGES:
                break
            if place.weight:
                images.append(place.image)
    return images


def describe_cost(cost: dict[str, Any]) -> str:
    if not cost["images"]:
        return f"the cost of exactness was not measured: {cost.get('reason', 'no image could be used')}"
    share = cost["bpp_exact"] / cost["bpp_float"] - 1.0
    return (
        f"integer h_s costs {share:+.3%} of the rate; files take {cost['bpp_file']:.4f} bpp, without adaptation about "
        f"{cost['bpp_float']:.4f} ({cost['images']} held-out images)"
    )
