"""From a run directory to a model directory: what a decoder needs, made once and never rebuilt.

MODEL/
  model.npz      weights, range-coding tables, integer h_s, config and fingerprint: what `codec.load` reads
  model.json     the description alone, for people
  saved_model/   the same codec as a TensorFlow SavedModel, for serving
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

import hyperprior
from hyperprior import checkpoint, codec, entropy, exact, models, serving, stream
from hyperprior.codec import Codec
from hyperprior.errors import ConfigError, DataError, StorageError
from hyperprior.model import ScaleHyperprior, pad
from hyperprior.terminal import Terminal

CONTENTS = (models.WEIGHTS, "model.json", "saved_model")
COST_IMAGES = 8


def export(run: Path, out: Optional[Path], terminal: Terminal, force: bool = False) -> dict[str, Any]:
    """Writes the model directory of a run, by default RUN/model, and returns what it is: path, fingerprint, step, ...

    An `out` that ends in .npz becomes one file, half as large: weights rounded to float16, compressed, and
    nothing for serving. Raises ConfigError if the run holds no checkpoint or cannot be made exact, or if `out` holds
    another model and not `force`, which files may need; StorageError if it cannot be written. What `out` held is then
    still there. Does nothing where `out` is this run's export already.
    """
    if out and out.suffix == ".npz":
        return export_file(run, out, terminal, force)
    force = force or out is None  # the run's own
    out = out or run / "model"
    if out.is_symlink() or not out.name:
        out = out.resolve()
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(CONTENTS)):
        raise ConfigError(f"{out} exists and holds more than an exported model; choose another --out")
    trained = checkpoint.best_weights(run, terminal.warn)
    weights = codec.fingerprint(trained.arrays)
    with contextlib.suppress(ConfigError, DataError):
        whole = (out / "model.json").is_file() and (out / "saved_model" / "saved_model.pb").is_file()
        if whole and (done := codec.load(out)).info["weights"] == weights:
            terminal.say(f"model    {out}, {done.fingerprint}: exported already")
            return {"model": str(out), "fingerprint": done.fingerprint, **done.info}

    check_replaced(out / models.WEIGHTS, weights, force)
    made, arrays, description = make(trained, weights, str(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            aside, old = folder / "new", folder / "old"
            checkpoint.save(aside / models.WEIGHTS, arrays, description)
            checkpoint.write_text(aside / "model.json", json.dumps(description, indent=2) + "\n")
            serving.save(made, aside / "saved_model")
            if out.exists():
                out.rename(old)
            try:
                aside.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, tf.errors.OpError) as error:
        if isinstance(error, OSError) and error.errno in checkpoint.NOT_FOR_WRITING:
            raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
        raise StorageError(
            f"{out} cannot be written: {error}; free the disk or choose another --out, and export again"
        ) from error
    return facts(out, description, terminal)


def export_file(run: Path, out: Path, terminal: Terminal, force: bool) -> dict[str, Any]:
    trained = checkpoint.best_weights(run, terminal.warn)
    weights = codec.fingerprint(trained.arrays)
    check_replaced(out, weights, force)
    short = {name: array.astype(np.float16) for name, array in trained.arrays.items()}
    rounded = dataclasses.replace(trained, arrays={name: a.astype(np.float32) for name, a in short.items()})
    _, arrays, description = make(rounded, weights, str(out), short)
    checkpoint.save(out, arrays, description, compressed=True)
    found = facts(out, description, terminal)
    terminal.say(
        f"         float16 weights: a model of its own. It does not read what {run}/model wrote, nor that its files"
    )
    return found


def check_replaced(file: Path, weights: str, force: bool) -> None:
    """Raises ConfigError where the model in `file` is of other weights: what it wrote, no other can read."""
    if file.exists() and not force:
        found = None
        with contextlib.suppress(DataError):
            found = models.describe(file)
        if not found or found.get("weights") != weights:
            what = f"model {found['fingerprint']}" if found else "something else"
            raise ConfigError(
                f"{file} holds {what}, which its .hyp files need; choose another --out, or replace it with --force"
            )


def make(
    trained: checkpoint.Trained, weights: str, origin: str, stored: Optional[dict[str, np.ndarray]] = None
) -> tuple[Codec, dict[str, np.ndarray], dict[str, Any]]:
    """(codec, its arrays, their description); `stored`: the weights in the types in which they are kept."""
    model = ScaleHyperprior(trained.settings.model)
    checkpoint.assign(model.named_variables(), trained.arrays, origin)
    arrays = constants(model, trained)
    # Of h_s only the integers are kept.
    arrays |= {name: array for name, array in (stored or {}).items() if not name.startswith("h_s/")}
    info: dict[str, Any] = {"step": trained.step, "weights": weights, "version": hyperprior.__version__}
    made = Codec(arrays, trained.settings, info, origin)
    info["exactness"] = cost(model, made)
    description = {
        "format": models.FORMAT,
        "fingerprint": made.fingerprint,
        "info": info,
        "config": trained.settings.to_dict(),
    }
    return made, arrays, description


def facts(out: Path, description: dict[str, Any], terminal: Terminal) -> dict[str, Any]:
    terminal.say(f"model    {out}, {description['fingerprint']}, weights of step {description['info']['step']}")
    terminal.say(f"         {describe_cost(description['info']['exactness'])}")
    return {"model": str(out), "fingerprint": description["fingerprint"], **description["info"]}


def constants(model: ScaleHyperprior, trained: checkpoint.Trained) -> dict[str, np.ndarray]:
    """Everything that `Codec` is made of. Raises ConfigError where weights are not finite or too large."""
    for name, array in trained.arrays.items():
        if not np.isfinite(array).all():
            raise ConfigError(
                f"`{name}` of step {trained.step} is not finite: the run diverged; "
                f"train it again with a lower train.learning_rate"
            )
    settings = trained.settings.model
    prior = entropy.in_float64(model.prior)
    z_offsets = exact.offsets(tfc.quantization_offset(prior).numpy())
    tables = entropy.build(prior, exact.offset_values(z_offsets), settings)
    arrays = {name: array for name, array in trained.arrays.items() if not name.startswith("h_s/")}
    for i, (kernel, bias) in enumerate(exact.integers(model.h_s, settings)):
        arrays |= {f"h_s/{i}/kernel": kernel, f"h_s/{i}/bias": bias}
    return {**arrays, "z_offsets": z_offsets, **{f"tables/{k}": v for k, v in tables._asdict().items()}}


def cost(trained: ScaleHyperprior, made: Codec) -> dict[str, Any]:
    """What integers and tables cost in rate on a few held-out images of the run; distortion is the same.

    Bits per pixel by the float model's estimate, by the estimate with integer h_s, and of real files.
    """
    data = made.config.data
    pixels, estimate, exact_estimate, real = 0, 0.0, 0.0, 0
    try:
        splits = stream.open_splits(data, made.config.train.batch_size, count=False)
        source = splits.val if splits.val.images else splits.test
        if not source.images:
            return {"images": 0, "reason": "the run holds no images out"}
        count, offset = 0, trained.z_offset()
        with contextlib.closing(stream.eval_batches(source, data, range(1), 1)) as places:
            for (place,) in places:
                if count == COST_IMAGES:
                    break
                if place.weight:
                    out = trained.round(pad(tf.constant(place.image[None], tf.float32) / 255.0), offset)
                    count += 1
                    pixels += place.image.shape[0] * place.image.shape[1]
                    estimate += float(out.bits_y[0] + out.bits_z[0])
                    file = made.compress(place.image)
                    exact_estimate += made.estimated_bits(file)
                    real += 8 * len(file)
    except DataError as error:
        return {"images": 0, "reason": str(error)}
    values = {"bpp_float": estimate, "bpp_exact": exact_estimate, "bpp_file": real}
    return {"images": count, **{name: bits / max(pixels, 1) for name, bits in values.items()}}


def describe_cost(found: dict[str, Any]) -> str:
    if not found["images"]:
        return f"the cost of exactness was not measured: {found.get('reason', 'no image could be used')}"
    share = found["bpp_exact"] / found["bpp_float"] - 1.0
    return (
        f"integer h_s costs {share:+.3%} of the rate; files take {found['bpp_file']:.4f} bpp, estimate "
        f"{found['bpp_float']:.4f} ({found['images']} held-out images)"
    )
