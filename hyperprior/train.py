"""The training job: resume, train, validate, checkpoint, stop, and the result at the end.

A run is a pure function of (config, seed, step): every decision below depends on the step and on numbers
that all workers share, never on the clock. Only the chief makes anything visible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

import hyperprior
from hyperprior import checkpoint, lanes, rd, steps, stream, summaries
from hyperprior.config import Config, differences, render, validate
from hyperprior.distribute import World
from hyperprior.errors import ConfigError, DataError, DivergedError, Stopped
from hyperprior.lanes import Cursor
from hyperprior.model import ScaleHyperprior
from hyperprior.optimizer import Optimizer
from hyperprior.terminal import Terminal, Track

BAD_JUDGED_OVER = 1000  # samples


@dataclasses.dataclass
class State:
    """What a checkpoint holds beside the variables. `cursors` are those after the last batch trained on."""

    cursors: list[Cursor]
    step: int = 0
    samples: int = 0  # decoded or skipped so far
    bad: int = 0
    small: int = 0
    validated_step: int = 0
    best_loss: Optional[float] = None
    best_step: int = 0
    stale: int = 0  # validations since the best
    logged_step: int = 0
    sums: list[float] = dataclasses.field(default_factory=list)  # of the metrics since logged_step


class Chunk(NamedTuple):
    """The batches of one call: per local replica [n, b, P, P, 3] uint8, and what goes with them."""

    images: list[np.ndarray]
    keys: list[list[str]]  # of each step
    cursors: list[Cursor]  # after the last step, of this worker's lanes
    samples: int
    skipped: list[stream.Skip]


class StopRequest:
    """SIGTERM and Ctrl-C ask the run to stop after the current call; a second Ctrl-C stops at once.

    Before the loop begins there is nothing to save, and the first one stops at once.
    """

    def __init__(self) -> None:
        self.requested = self.in_loop = False

    def install(self) -> None:
        # MultiWorkerMirroredStrategy replaces the SIGTERM handler: install again after it is made.
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Optional[FrameType]) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if not self.in_loop:
            raise Stopped("stopped before training began; start the same command again")


def train(settings: Config, run: Path, terminal: Terminal) -> Optional[dict[str, Any]]:
    """Trains in the directory `run`, resuming what it holds, and returns the test result (results.json).

    Workers that are not the chief return None.

    Raises ConfigError, DataError, DivergedError, or Stopped when asked to stop; the run's directory then
    holds a complete checkpoint.
    """
    stop = StopRequest()
    stop.install()
    world = World(settings.distribute, settings.train.batch_size)
    stop.install()
    with checkpoint.only_one(run) if world.is_chief else contextlib.nullcontext():
        result = Trainer(settings, run, terminal, world, stop).run_to_end()
    return result if world.is_chief else None


class Trainer:
    def __init__(self, settings: Config, run: Path, terminal: Terminal, world: World, stop: StopRequest):
        self.settings, self.run, self.terminal, self.world, self.stop = settings, run, terminal, world, stop
        self.checkpoints = run / "checkpoints"
        in_epochs = [
            settings.train.epochs,
            settings.train.validate_every,
            settings.train.checkpoint_every,
            settings.summaries.scalars_every,
            settings.summaries.images_every,
        ]
        count = settings.train.epochs is not None or any(isinstance(i, str) for i in in_epochs)
        self.splits = stream.open_splits(settings.data, world.batch_size, count=count)
        patches = self.splits.train.images * settings.data.patches_per_image
        self.epoch_steps = -(-patches // world.batch_size)
        self.total = settings.train.steps or (settings.train.epochs or 0) * self.epoch_steps
        self.intervals = {
            "scalars": self.steps_of(settings.summaries.scalars_every),
            "images": self.steps_of(settings.summaries.images_every),
            "validate": self.steps_of(settings.train.validate_every) if self.splits.val.images else 0,
            "checkpoint": self.steps_of(settings.train.checkpoint_every),
        }
        saved = checkpoint.load_newest(self.checkpoints, terminal.warn)
        if saved:
            self.compare(saved[1])
        with world.strategy.scope():
            tf.random.set_seed(lanes.draw(settings.seed, "init") % 2**31)
            dtype = settings.train.precision.replace("mixed_", "")
            self.model = ScaleHyperprior(settings.model, dtype)
            self.optimizer = Optimizer(self.model.named_variables(), settings.train, self.total)
        self.variables = {
            **{f"model/{name}": v for name, v in self.model.named_variables().items()},
            **{f"optimizer/{name}": v for name, v in self.optimizer.named_variables().items()},
        }
        self.state = State([Cursor()] * world.batch_size)
        if saved:
            arrays, state = saved
            checkpoint.assign(self.variables, arrays, str(self.checkpoints))
            self.state = State(**{**state["run"], "cursors": [Cursor(*c) for c in state["run"]["cursors"]]})
            self.check_best()
        self.check_evaluation()
        self.train_steps = steps.make_train_steps(world, self.model, self.optimizer, settings)
        self.eval_step = steps.make_eval_step(world, self.model, settings)
        self.reconstruct = tf.function(
            lambda x, offset: steps.reconstruct(self.model, x, offset), reduce_retracing=True, autograph=False
        )

    def steps_of(self, interval: int | str | None) -> int:
        """An interval in steps; 0: never."""
        if isinstance(interval, str):
            return int(interval.split()[0]) * self.epoch_steps
        return interval or 0

    def due(self, what: str) -> bool:
        every = self.intervals[what]
        return bool(every) and self.state.step % every == 0

    # Resuming ---------------------------------------------------------------------------------------------

    def compare(self, saved: dict[str, Any]) -> None:
        """Refuses what may not change in a run, says what did change and may."""
        refused = []
        for key, was, now, may_change in differences(validate(saved["config"], str(self.run)), self.settings):
            if may_change:
                self.terminal.say(f"{key}: {was} → {now} from here on")
            else:
                refused.append(f"{key} was {was} and is now {now}")
        if refused:
            raise ConfigError(
                f"{self.run} holds a run with another config: {'; '.join(refused)}. "
                f"These can't change in a run: restore them, or choose another --run"
            )
        if saved["data"] != self.describe_data():
            raise ConfigError(
                f"{self.run} holds a run on other data: {saved['data']}, now {self.describe_data()}; "
                f"restore the sources, or choose another --run"
            )
        for key, now in self.world.environment().items():
            if (was := saved["environment"].get(key)) != now:
                self.terminal.warn(
                    f"{key} was {was} and is now {now}: the weights will not be bit-identical to "
                    f"those of an uninterrupted run"
                )

    def check_best(self) -> None:
        """Forgets a best that another course of this run left behind after the checkpoint it resumes from."""
        if self.state.best_loss is None:
            return
        try:
            checkpoint.load_best(self.checkpoints, self.state.best_step)
        except ValueError as error:
            self.terminal.warn(f"{error}; the best is sought anew")
            self.state.best_loss, self.state.best_step, self.state.stale = None, 0, 0

    def check_evaluation(self) -> None:
        """Raises DataError unless validation and test each have an image that can be used."""
        for name, source in (("val", self.splits.val), (self.splits.test_name, self.splits.test)):
            if source.images:
                places = stream.eval_batches(source, self.settings.data, range(1), 1, self.min_side)
                with contextlib.closing(places):
                    if not any(place.weight for (place,) in places):
                        raise DataError(
                            f"none of the {source.images} images of the {name} split can be used with "
                            f"data.eval_crop={self.settings.data.eval_crop}; lower it, or give other images"
                        )

    @property
    def min_side(self) -> int:
        return rd.MS_SSIM_MIN_SIDE if self.settings.loss.metric == "ms-ssim" else 1

    def describe_data(self) -> str:
        s = self.splits
        return f"{len(s.train.shards)} shards (fingerprint {s.fingerprint()})"

    def save(self) -> None:
        own = np.zeros((self.world.batch_size, len(Cursor._fields)), np.int64)
        for lane in self.world.lanes(self.world.batch_size):
            own[lane] = self.state.cursors[lane]
        self.state.cursors = [Cursor(*map(int, row)) for row in self.world.sum_workers(own)]
        if not self.world.is_chief:
            return
        state = {
            "run": dataclasses.asdict(self.state),
            "config": self.settings.to_dict(),
            "data": self.describe_data(),
            "environment": self.world.environment(),
            "version": hyperprior.__version__,
        }
        arrays = {name: variable.numpy() for name, variable in self.variables.items()}
        checkpoint.save(checkpoint.path_of(self.checkpoints, self.state.step), arrays, state)
        checkpoint.keep_last(self.checkpoints, self.settings.train.keep_checkpoints)

    # The loop ---------------------------------------------------------------------------------------------

    def run_to_end(self) -> dict[str, Any]:
        state = self.state
        results = self.run / "results.json"
        if state.step and self.finished() and results.exists():
            result = json.loads(results.read_text())
            if result["trained_steps"] == state.step:
                self.terminal.say(f"{self.run} is done: {state.step} steps")
                return result
        self.announce()
        if self.world.is_chief:
            checkpoint.write_text(
                self.run / "config.yaml", f"# hyperprior {hyperprior.__version__}, resolved\n{render(self.settings)}"
            )
        with self.summaries() as self.report:
            started = state.step
            self.report.text("config", render(self.settings), started)
            with self.terminal.track("training", self.total, started) as track:
                self.loop(track)
            result = self.finish()
        if self.world.is_chief:
            checkpoint.write_text(results, json.dumps(result, indent=2) + "\n")
        return result

    @contextlib.contextmanager
    def summaries(self) -> Iterator[summaries.Summaries]:
        report = summaries.Summaries(self.run, self.state.step, self.terminal.warn, self.world.is_chief)
        try:
            yield report
        finally:
            report.close()

    def finished(self) -> bool:
        patience = self.settings.train.early_stopping_patience
        return self.state.step >= self.total or (patience is not None and self.state.stale >= patience)

    def announce(self) -> None:
        state, train, s = self.state, self.splits.train, self.settings
        images = f"{train.images} images in " if train.images else ""
        parameters = sum(int(np.prod(v.shape)) for v in self.model.named_variables().values())
        say = self.terminal.say
        say(f"run      {self.run}, " + (f"resumed at step {state.step}" if state.step else "new"))
        say(
            f"data     train {images}{len(train.shards)} shards; val {self.splits.val.images} images; "
            f"test {'is val' if self.splits.test_name == 'val' else f'{self.splits.test.images} images'}"
        )
        say(
            f"model    N={s.model.num_filters}, M={s.model.latent_channels}, {parameters:,} parameters, "
            f"{s.train.precision}"
        )
        say(
            f"devices  {self.world.environment()['devices']}, {self.world.replica_batch} patches of "
            f"{s.data.patch_size}x{s.data.patch_size} each, global batch {self.world.batch_size}"
        )
        say(f"length   {self.total} steps" + (f" of {self.epoch_steps} an epoch" if self.epoch_steps else ""))

    def loop(self, track: Track) -> None:
        state = self.state
        chunks = stream.Prefetch(self.chunks())
        self.log_began, self.log_waited = time.perf_counter(), 0.0
        self.stop.in_loop = True
        # Several workers must agree to stop, so there each goes on to the next reduction.
        give_up = (lambda: self.stop.requested) if self.world.workers == 1 else (lambda: False)
        try:
            stopped = False
            if self.due("validate") and state.step > state.validated_step:  # a stop had cut it short
                stopped = not self.validate(track)
                self.save()
            while not stopped and not self.finished():
                asked = time.perf_counter()
                chunk = chunks.next(give_up)
                self.log_waited += time.perf_counter() - asked
                if chunk is None:
                    self.save()
                    stopped = True
                    break
                stopped = self.train_chunk(chunk, track)
                if self.due("scalars"):
                    self.log(track)
                if not stopped and self.due("validate"):
                    stopped = not self.validate(track)
                if not stopped and self.due("images"):
                    self.pictures()
                # A new best is saved with the state that knows of it.
                if stopped or self.due("checkpoint") or self.finished() or state.best_step == state.step:
                    self.save()
            if stopped:
                raise Stopped(
                    f"stopped at step {state.step} of {self.total} with a checkpoint; start the same "
                    f"command again to go on"
                )
        finally:
            chunks.close()

    def chunks(self) -> Iterator[Chunk]:
        """The input of one call after another: at most steps_per_call steps, never across an interval."""
        world, step = self.world, self.state.step
        batches = stream.batches(
            self.splits.train,
            self.settings.data,
            self.settings.seed,
            world.lanes(world.batch_size),
            world.batch_size,
            self.state.cursors,
        )
        with contextlib.closing(batches):
            while step < self.total:
                ends = [
                    step + self.settings.train.steps_per_call,
                    self.total,
                    *((step // every + 1) * every for every in self.intervals.values() if every),
                ]
                found = [next(batches) for _ in range(min(ends) - step)]
                step = min(ends)
                images = np.stack([batch.images for batch in found])
                yield Chunk(
                    np.split(images, world.local_replicas, axis=1),
                    [batch.keys for batch in found],
                    found[-1].cursors,
                    sum(batch.samples for batch in found),
                    [skip for batch in found for skip in batch.skipped],
                )

    def train_chunk(self, chunk: Chunk, track: Track) -> bool:
        """Trains on a chunk; True if a worker was asked to stop. Raises DivergedError, DataError."""
        state, world = self.state, self.world
        bad = sum(skip.bad for skip in chunk.skipped)
        told = np.array([self.stop.requested, chunk.samples, bad, len(chunk.skipped) - bad], np.float32)
        result = self.train_steps(world.place(chunk.images), world.place_once(told), tf.constant(state.step, tf.int64))
        done = int(result.done)
        if bool(result.diverged):
            # Nothing of the failed step reached the weights; the last checkpoint stays the newest.
            raise DivergedError(
                f"the loss or a gradient is not finite at step {state.step + done}; the weights and "
                f"checkpoints are from before it. Its samples here: "
                f"{', '.join(chunk.keys[done])}. Lower train.learning_rate, or look at these images"
            )
        for skip in chunk.skipped:
            self.name(skip)
        state.step += done
        for lane, cursor in zip(world.lanes(world.batch_size), chunk.cursors):
            state.cursors[lane] = cursor
        stop, samples, bad_everywhere, small = result.signals.numpy()
        state.samples += int(samples)
        state.bad += int(bad_everywhere)
        state.small += int(small)
        state.sums = (np.array(state.sums or 0.0) + result.metrics.numpy()).tolist()
        track.update(state.step)
        limit = self.settings.data.max_bad_fraction * max(state.samples, BAD_JUDGED_OVER)
        if state.bad > limit:
            raise DataError(
                f"{state.bad} of {state.samples} samples are unusable, more than data.max_bad_fraction="
                f"{self.settings.data.max_bad_fraction} (judged over at least {BAD_JUDGED_OVER}); "
                f"{self.run / 'metrics.jsonl'} names each, `hyperprior inspect` finds them all"
            )
        return bool(stop > 0)

    def name(self, skip: stream.Skip) -> None:
        """Tells of a defective image, once."""
        if skip.bad and skip.sample not in self.report.skipped:
            self.report.skipped.add(skip.sample)
            self.terminal.warn(f"skipped {skip.sample}: {skip.reason}")
            self.report.record("skipped", self.state.step, sample=skip.sample, reason=skip.reason)

    def log(self, track: Track) -> None:
        """Means over the steps since the last log."""
        state = self.state
        count, seconds = state.step - state.logged_step, max(time.perf_counter() - self.log_began, 1e-9)
        values = dict(zip((*steps.TRAIN_METRICS, "gradient_norm"), (total / count for total in state.sums)))
        values["bpp"] = values["bpp_y"] + values["bpp_z"]
        values["learning_rate"] = float(self.optimizer.learning_rate(tf.constant(state.step - 1)))
        values["images_per_s"] = count * self.world.batch_size / seconds
        values["input_wait"] = self.log_waited / seconds
        values["skipped"] = state.bad + state.small
        self.report.scalars("train", state.step, values)
        track.line(state.step, summaries.describe(values, ("loss", "bpp", "psnr_db", "images_per_s")))
        self.log_began, self.log_waited = time.perf_counter(), 0.0
        state.logged_step, state.sums = state.step, []

    # Validation -------------------------------------------------------------------------------------------

    def validate(self, track: Track) -> bool:
        """Validates, keeps the best weights, counts patience; False if it was cut short by a stop."""
        state = self.state
        began = time.perf_counter()
        with self.optimizer.averaged_weights():
            found = self.evaluate(self.splits.val)
            if found is None:
                return False
            state.validated_step = state.step
            if state.best_loss is None or found["loss"] < state.best_loss:
                state.best_loss, state.best_step, state.stale = found["loss"], state.step, 0
                if self.world.is_chief:
                    arrays = {f"model/{name}": v.numpy() for name, v in self.model.named_variables().items()}
                    checkpoint.save(
                        checkpoint.best_path(self.checkpoints),
                        arrays,
                        {"step": state.step, "loss": found["loss"], "config": self.settings.to_dict()},
                    )
            else:
                state.stale += 1
        self.report.scalars("val", state.step, found)
        track.line(state.step, "validation  " + summaries.describe(found))
        self.log_began += time.perf_counter() - began  # not a part of training's speed
        return True

    def evaluate(self, source: stream.Source) -> Optional[dict[str, float]]:
        """Means over a split with rounded latents, on all workers; None if one was asked to stop."""
        world, settings = self.world, self.settings
        # Whole images differ in shape, so each replica gets one at a time.
        each = 1 if settings.data.eval_crop == "full" else world.replica_batch
        batch_size = each * world.replicas
        z_offset = self.model.z_offset()
        totals = np.zeros(len(steps.EVAL_METRICS))
        batches = stream.eval_batches(source, settings.data, world.lanes(batch_size), batch_size, self.min_side)
        with contextlib.closing(batches):
            for found in batches:
                groups = [found[i : i + each] for i in range(0, len(found), each)]
                images = world.place([np.stack([place.image for place in group]) for group in groups])
                weights = world.place([np.array([place.weight for place in group], np.float32) for group in groups])
                stop = world.place_once(np.array(self.stop.requested, np.float32))
                sums = self.eval_step(images, weights, stop, z_offset).numpy()
                if sums[-1] > 0:
                    return None
                totals += sums[:-1]
                for place in found:
                    if place.skip:
                        self.name(place.skip)
        return steps.means(totals)

    def pictures(self) -> None:
        """Originals beside reconstructions, and the histogram of the scales, of the first validation images."""
        if not self.world.is_chief or not self.splits.val.images or not self.settings.summaries.num_images:
            return
        began = time.perf_counter()
        source, settings = self.splits.val, self.settings
        shown: list[np.ndarray] = []
        with contextlib.closing(stream.eval_batches(source, settings.data, range(1), 1, self.min_side)) as batches:
            for (place,) in batches:
                if place.weight:
                    shown.append(place.image)
                if len(shown) == settings.summaries.num_images:
                    break
        scales = []
        if not shown:
            return
        with self.optimizer.averaged_weights():
            z_offset = self.model.z_offset()
            for index, image in enumerate(shown):
                x = tf.constant(image[None], tf.float32) / 255.0
                x_hat, out = self.reconstruct(x, z_offset)
                bpp = float(out.bits_y[0] + out.bits_z[0]) / (image.shape[0] * image.shape[1])
                psnr = float(rd.psnr_db(rd.mse(x, x_hat))[0])
                pixels = tf.cast(x_hat[0] * 255.0 + 0.5, tf.uint8).numpy()
                caption = f"step {self.state.step}: {bpp:.3f} bpp, {psnr:.2f} dB"
                self.report.picture(
                    f"reconstruction/{index}", self.state.step, summaries.side_by_side(image, pixels, caption)
                )
                scales.append(np.log2(self.model.scales(out.log_scales).numpy()).ravel())
        self.report.histogram(
            "scales/log2", self.state.step, np.concatenate(scales), "log2 of the standard deviations of y"
        )
        self.log_began += time.perf_counter() - began

    def finish(self) -> dict[str, Any]:
        """The result of the best weights (by validation loss; else the last) on the test split."""
        step = self.state.step
        weights: contextlib.AbstractContextManager[None] = self.optimizer.averaged_weights()
        if self.state.best_loss is not None:
            try:
                arrays = checkpoint.load_best(self.checkpoints, self.state.best_step)
            except ValueError as error:
                self.terminal.warn(f"{error}; the result is that of the last weights instead of the best")
            else:
                names = {f"model/{name}": v for name, v in self.model.named_variables().items()}
                checkpoint.assign(names, arrays, str(checkpoint.best_path(self.checkpoints)))
                step, weights = self.state.best_step, contextlib.nullcontext()
        found: Optional[dict[str, float]] = {}
        if self.splits.test.images:
            with weights:
                found = self.evaluate(self.splits.test)
        if found is None:
            raise Stopped(f"stopped while evaluating; start the same command again to finish {self.run}")
        return {
            **found,
            "step": step,
            "trained_steps": self.state.step,
            "split": self.splits.test_name,
            "eval_crop": self.settings.data.eval_crop,
            "lambda": self.settings.loss.lmbda,
            "metric": self.settings.loss.metric,
            "version": hyperprior.__version__,
        }


def describe_result(result: dict[str, Any], run: Path) -> Sequence[str]:
    """The lines that end `hyperprior train`."""
    if "loss" not in result:
        return [f"{result['trained_steps']} steps; no images were set apart for a test (data.test, data.test_split)"]
    what = "the held-out test images" if result["split"] == "test" else "the validation images (no test split)"
    return [
        f"result on {what}: {summaries.describe(result)}",
        f"         {result['images']} images, weights of step {result['step']} of {result['trained_steps']}",
        f"run      {run}: config.yaml, checkpoints/, metrics.jsonl, results.json",
        f"watch    tensorboard --logdir {run}",
        f"use      hyperprior compress IMAGE --model {run}",
    ]
