"""Resumes a run: the state in a checkpoint, and the checks that it fits the config, data and machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from pydantic import TypeAdapter

from hyperprior import storage
from hyperprior.codec import codec
from hyperprior.config import Config, differences, validate, without_secrets
from hyperprior.data.lanes import Cursor
from hyperprior.data.splits import Splits
from hyperprior.data.stream import Counts
from hyperprior.errors import ConfigError
from hyperprior.model import initial
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import Arrays
from hyperprior.terminal import Terminal
from hyperprior.training import checkpoint
from hyperprior.training.distribute import World

BEST_IN_JSON = {"best_loss": "loss", "best_step": "step", "stale": "stale"}  # the fields of `Best` in a checkpoint
# The order in which version 0.1.0 stored the sums, without their names.
SUMS_OF_0_1 = ("loss", "bpp_y", "bpp_z", "distortion", "psnr_db", "gradient_norm", "steps")


@dataclasses.dataclass
class Best:
    """The best validation so far. Its weights are kept. `stale`: the number of validations since."""

    loss: Optional[float] = None
    step: int = 0
    stale: int = 0

    def update(self, loss: float, step: int) -> bool:
        """Counts a validation. Returns True if it is the best so far. NaN, of a validation without images, never is."""
        if math.isnan(loss) or (self.loss is not None and loss >= self.loss):
            self.stale += 1
            return False
        self.loss, self.step, self.stale = loss, step, 0
        return True


@dataclasses.dataclass
class State:
    """The state in a checkpoint, without the variables. `cursors`: after the last batch that was trained on."""

    cursors: list[Cursor]
    step: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)  # of the input so far
    nonfinite: int = 0  # steps skipped because a gradient was not finite
    failed: int = 0  # non-finite steps in a row, up to the last step
    validated_step: int = 0
    best: Best = dataclasses.field(default_factory=Best)
    decays: int = 0  # number of times that schedule `plateau` has lowered the learning rate
    course: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (bpp, PSNR in dB) of validations
    logged_step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # of the metrics since logged_step

    def to_json(self) -> dict[str, Any]:
        """The state as flat JSON. Its names are the same in every version of the format."""
        values = dataclasses.asdict(self)
        counts, best = values.pop("counts"), values.pop("best")
        return {**values, **counts._asdict(), **{key: best[name] for key, name in BEST_IN_JSON.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        known = cls([]).to_json()
        values = {name: value for name, value in values.items() if name in known}  # a later version may have more
        if isinstance(values["sums"], list):
            values["sums"] = dict(zip(SUMS_OF_0_1, values["sums"]))
        if values["sums"]:  # a checkpoint without "norms" counted every step in the mean of gradient_norm
            values["sums"] = {"norms": values["sums"]["steps"], **values["sums"]}
        counts = {name: values.pop(name) for name in Counts._fields}
        best = {name: values.pop(key) for key, name in BEST_IN_JSON.items()}
        return TypeAdapter(cls).validate_python({**values, "counts": counts, "best": best})


def load(
    world: World, run: Path, settings: Config, splits: Splits, terminal: Terminal
) -> Optional[tuple[Arrays, State]]:
    """(values of all variables, state) of the run's newest intact checkpoint. The chief chooses it; others wait for it.

    Prints the changes since then that are allowed. Raises ConfigError for others. All workers must call this.
    """
    folder = run / "checkpoints"

    def load_newest() -> Optional[tuple[Arrays, dict[str, Any]]]:
        newest = checkpoint.load_newest(folder, terminal.warn) if world.is_chief else None
        if newest:
            checkpoint.check_state(run, newest[1])
        return newest

    newest = world.on_every_worker(load_newest)
    (step, *_) = world.gather(newest[1]["run"]["step"] if newest else None)
    if step is None:
        return None

    def load_checked() -> tuple[Arrays, State]:
        arrays, saved = newest or checkpoint.wait_for(folder, step)
        check(run, saved, settings, splits, world.environment(), terminal)
        return arrays, state_of(run, saved)

    return world.on_every_worker(load_checked)


def state_of(run: Path, saved: dict[str, Any]) -> State:
    """The state of the run in a checkpoint's state. Raises ConfigError if it is damaged."""
    try:
        return State.from_json(saved["run"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the newest checkpoint of {run} is damaged: {reason}; move it away to use the one before"
        ) from error


def check(
    run: Path, saved: dict[str, Any], settings: Config, splits: Splits, environment: dict[str, Any], terminal: Terminal
) -> None:
    """Prints the changes since a checkpoint's state that are allowed; raises ConfigError for others."""
    compare_config(run, validate(saved["config"], str(run)), settings, terminal)
    if saved["data"] not in (describe_data(splits), describe_data(splits, splits.fingerprint(as_in_0_1=True))):
        raise ConfigError(
            f"{run} holds a run on other data: {saved['data']}, now {describe_data(splits)}; "
            f"restore the sources, or choose another --run"
        )
    before = saved["environment"]
    for key, now in environment.items():
        if key in before and before[key] != now:  # an older version did not store every key
            terminal.warn(
                f"{key} was {before[key]} and is now {now}: the weights may not be bit-identical to "
                f"those of an uninterrupted run"
            )


def compare_config(run: Path, before: Config, now: Config, terminal: Terminal) -> None:
    """Prints the changed keys that may change in a run. Raises ConfigError for the others."""
    refused = []
    for difference in differences(without_secrets(before), without_secrets(now)):
        if difference.may_change:
            terminal.say(f"{difference.key}: {difference.old} → {difference.new} from here on")
        else:
            refused.append(f"{difference.key} was {difference.old} and is now {difference.new}")
    if refused:
        raise ConfigError(
            f"{run} holds a run with another config: {'; '.join(refused)}. "
            f"These can't change in a run: restore them, or choose another --run"
        )


def describe_data(splits: Splits, fingerprint: Optional[str] = None) -> str:
    return f"{len(splits.train.shards)} shards (fingerprint {fingerprint or splits.fingerprint()})"


def describe_lost_best(folder: Path, best: Best) -> Optional[str]:
    """Why the weights of the best validation cannot be used, or None."""
    try:
        if best.loss is not None:
            checkpoint.load_best(folder, best.step)
    except ValueError as error:
        return str(error)
    return None


def set_start_weights(model: ScaleHyperprior, settings: Config, warn: Callable[[str], None]) -> None:
    """Replaces a model's random weights by those that a new run starts from.

    Raises ConfigError if the weights of train.start_from do not fit, DataError if they are damaged.
    """
    if settings.train.start_from:
        origin = Path(settings.train.start_from)
        is_run = (origin / "config.yaml").is_file()
        trained = checkpoint.best_weights(origin, warn) if is_run else codec.load(origin).trained_weights()
        arrays = initial.rescale(trained.arrays, trained.settings.loss, settings.loss)
        if trained.settings.model.num_filters < settings.model.num_filters:
            arrays = initial.widen(arrays, {name: v.numpy() for name, v in model.named_variables().items()})
        storage.assign_arrays(model.named_variables(), arrays, f"train.start_from: {origin}")
    elif settings.train.initial == "wavelet":
        initial.start_as_wavelets(model, settings.loss, settings.model.scale_min)
