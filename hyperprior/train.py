"""The training job: resume, train, validate, checkpoint, stop, and the result at the end.

A run is a pure function of (config, seed, step): every decision below depends on the step and on numbers
that all workers share, never on the clock. Only the chief makes anything visible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import numpy as np
import tensorflow as tf

import hyperprior
from hyperprior import checkpoint, codec, initial, lanes, monitor, runs, steps, stream, summaries, validation
from hyperprior.config import Config, differences, flat, render, validate
from hyperprior.distribute import World
from hyperprior.errors import ConfigError, DataError, DivergedError, HyperpriorError, LostWorker, Stopped
from hyperprior.lanes import Cursor
from hyperprior.model import ScaleHyperprior
from hyperprior.optimizer import Optimizer
from hyperprior.stop import StopRequest
from hyperprior.terminal import Terminal, Track

BAD_JUDGED_OVER = 1000  # samples
LOST_JUDGED_OVER = 100  # shards begun


@dataclasses.dataclass
class State:
    """What a checkpoint holds beside the variables. `cursors` are those after the last batch trained on."""

    cursors: list[Cursor]
    step: int = 0
    samples: int = 0  # decoded or skipped so far
    bad: int = 0
    small: int = 0
    visits: int = 0  # shards begun
    lost: int = 0  # of them, those whose rest could not be read
    nonfinite: int = 0  # steps skipped because a gradient was not finite
    failed: int = 0  # of them, those in a row up to now
    validated_step: int = 0
    best_loss: Optional[float] = None
    best_step: int = 0
    stale: int = 0  # validations since the best
    course: monitor.Curve = dataclasses.field(default_factory=list)  # (bpp, PSNR in dB) of the validations
    logged_step: int = 0
    sums: list[float] = dataclasses.field(default_factory=list)  # of the metrics since logged_step


class Chunk(NamedTuple):
    """The batches of one call: per local replica [n, b, P, P, 3] uint8, and what goes with each step."""

    images: list[np.ndarray]
    inputs: np.ndarray  # [n, len(steps.INPUT)]
    batches: list[stream.Batch]  # without their images


def train(settings: Config, run: Path, terminal: Terminal) -> Optional[dict[str, Any]]:
    """Trains in the directory `run`, resuming what it holds, and returns the test result (results.json).

    Workers that are not the chief return None.

    Raises ConfigError, DataError, DivergedError, or Stopped when asked to stop or when another worker is lost;
    the run's directory then holds a complete checkpoint. All workers raise the same, but for the lost one.
    """
    with StopRequest() as stop, contextlib.ExitStack() as held:
        world = World(settings.distribute, settings.train.batch_size)
        stop.install()
        if not world.is_chief:
            terminal = Terminal(quiet=True)
        try:
            world.same({**comparable(settings), "version": hyperprior.__version__, "tensorflow": tf.__version__})
            world.check_batch()
            world.together(lambda: check_place(run))
            world.together(lambda: world.is_chief and held.enter_context(checkpoint.only_one(run)))
            result = Trainer(settings, run, terminal, world, stop).run_to_end()
        except tf.errors.OpError as error:
            if world.workers == 1:
                raise
            why = re.search("aborted by: (.*)", error.message)
            raise LostWorker(
                f"another worker ended or stopped answering ({why[1][:200] if why else type(error).__name__}); "
                f"what was saved is intact: start the same command on all workers again"
            ) from error
    return result if world.is_chief else None


def check_place(run: Path) -> None:
    """Raises ConfigError where `run` holds a config.yaml that no run wrote, and that this one would replace."""
    config = run / "config.yaml"
    if config.is_file() and not (run / "checkpoints").is_dir() and not config.read_bytes().startswith(b"# hyperprior "):
        raise ConfigError(f"{config} is not the config of a run, and would be replaced; choose another --run")


def comparable(settings: Config) -> dict[str, Any]:
    """What must be the same on all workers, key by key; of the sources only what they hold must be."""
    return {key: v for key, v in flat(settings).items() if key not in ("data.train", "data.val", "data.test")}


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
        self.splits = world.together(lambda: stream.open_splits(settings.data, world.batch_size, count=count))
        patches = self.splits.train.images * settings.data.patches_per_image
        self.epoch_steps = -(-patches // world.batch_size)
        self.total = settings.train.steps or (settings.train.epochs or 0) * self.epoch_steps
        self.intervals = {
            "scalars": self.steps_of(settings.summaries.scalars_every),
            "images": self.steps_of(settings.summaries.images_every),
            "validate": self.steps_of(settings.train.validate_every) if self.splits.val.images else 0,
            "checkpoint": self.steps_of(settings.train.checkpoint_every),
        }
        saved = world.together(self.load)
        world.same({"data": self.describe_data(), "checkpoint of step": saved[1]["run"]["step"] if saved else None})
        with tf.device("CPU:0"):
            stop.flag = tf.Variable(0.0, trainable=False)
        with world.strategy.scope():
            tf.random.set_seed(lanes.draw(settings.seed, "init") % 2**31)
            dtype = settings.train.precision.replace("mixed_", "")
            self.model = ScaleHyperprior(settings.model, dtype)
        if not saved:
            world.together(self.start)
            weights = {name: variable.numpy() for name, variable in self.model.named_variables().items()}
            world.same({"weights to start from": codec.fingerprint(weights)})
        with world.strategy.scope():
            self.optimizer = Optimizer(self.model.named_variables(), settings.train, self.total)
        self.variables = {
            **{f"model/{name}": v for name, v in self.model.named_variables().items()},
            **{f"optimizer/{name}": v for name, v in self.optimizer.named_variables().items()},
        }
        self.state = State([Cursor()] * world.batch_size)
        if saved:
            arrays, state = saved
            world.together(lambda: checkpoint.assign(self.variables, arrays, str(self.checkpoints)))
            self.state = State(**{**state["run"], "cursors": [Cursor(*c) for c in state["run"]["cursors"]]})
            self.check_best()
        self.evaluator = validation.Evaluator(world, self.model, settings, stop)
        world.together(self.check_held_out)
        self.reading = stream.Reading()
        self.train_steps = steps.make_train_steps(world, self.model, self.optimizer, stop.flag, settings)
        shown = functools.partial(self.evaluator.images, self.splits.val)
        self.monitor = monitor.Monitor(self.model, shown, settings.summaries.num_images)
        self.tracing = False

    def steps_of(self, interval: int | str | None) -> int:
        """An interval in steps; 0: never."""
        if isinstance(interval, str):
            return int(interval.split()[0]) * self.epoch_steps
        return interval or 0

    def due(self, what: str) -> bool:
        every, step = self.intervals[what], self.state.step
        return bool(every) and (step % every == 0 or (what == "validate" and step == self.total))

    # Resuming ---------------------------------------------------------------------------------------------

    def load(self) -> Optional[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        saved = checkpoint.load_newest(self.checkpoints, self.terminal.warn)
        if saved:
            self.compare(saved[1])
        return saved

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

    def start(self) -> None:
        """The weights of a new run. Raises ConfigError if train.start_from has none that fit, DataError if damaged."""
        settings = self.settings.train
        if settings.start_from:
            origin = Path(settings.start_from)
            if (origin / "config.yaml").is_file():
                trained = checkpoint.best_weights(origin, self.terminal.warn)
            else:
                trained = codec.load(origin).trained()
            arrays = initial.rescale(trained.arrays, trained.settings.loss, self.settings.loss)
            checkpoint.assign(self.model.named_variables(), arrays, f"train.start_from: {origin}")
        elif settings.initial == "wavelet":
            initial.start_as_wavelets(self.model, self.settings.loss, self.settings.model.scale_min)

    def check_best(self) -> None:
        """Forgets a best that another course of this run left behind after the checkpoint it resumes from."""
        if self.state.best_loss is None:
            return
        try:
            checkpoint.load_best(self.checkpoints, self.state.best_step)
        except ValueError as error:
            self.terminal.warn(f"{error}; the best is sought anew")
            self.state.best_loss, self.state.best_step, self.state.stale = None, 0, 0
        self.world.same({"best step": self.state.best_step})

    def check_held_out(self) -> None:
        self.evaluator.check("val", self.splits.val)
        self.evaluator.check(self.splits.test_name, self.splits.test)

    def describe_data(self) -> str:
        s = self.splits
        return f"{len(s.train.shards)} shards (fingerprint {s.fingerprint()})"

    def save(self) -> None:
        own = np.zeros((self.world.batch_size, len(Cursor._fields)), np.int64)
        for lane in self.world.lanes(self.world.batch_size):
            own[lane] = self.state.cursors[lane]
        self.state.cursors = [Cursor(*map(int, row)) for row in self.world.sum_workers(own)]
        self.world.together(self.write_checkpoint)

    def write_checkpoint(self) -> None:
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

    def write(self, name: str, text: str) -> None:
        """A file of the run, by the chief alone; a failure is everyone's."""

        def write() -> None:
            if self.world.is_chief:
                checkpoint.write_text(self.run / name, text)

        self.world.together(write)

    # The loop ---------------------------------------------------------------------------------------------

    def run_to_end(self) -> dict[str, Any]:
        state = self.state
        result = runs.read_result(self.run) if state.step and self.finished() else None
        if result and result["trained_steps"] == state.step:
            self.terminal.say(f"{self.run} is done: {state.step} steps")
            return result
        self.announce()
        self.write("config.yaml", f"# hyperprior {hyperprior.__version__}, resolved\n{render(self.settings)}")
        with self.summaries() as self.report:
            started = state.step
            self.report.introduce(self.settings, started)
            try:
                with self.terminal.track("training", self.total, started) as track:
                    self.loop(track)
                result = self.finish()
            except HyperpriorError as error:
                self.report.record("ended", state.step, code=error.exit_code, reason=str(error))
                raise
        self.write("results.json", json.dumps(result, indent=2) + "\n")
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
        self.begin_log()
        self.stop.in_loop = True
        try:
            stopped = False
            # A stop had cut it short; or what training starts from is to be told apart from what it makes.
            begins = bool(self.settings.train.start_from) and not state.step and state.best_loss is None
            if self.due("validate") and (state.step > state.validated_step or begins):
                stopped = not self.validate(track)
                self.save()
            while not stopped and not self.finished():
                self.profile()
                stopped = self.train_chunk(self.next_chunk(chunks), track)
                if self.due("scalars") and state.step > state.logged_step:
                    self.log(track)
                if not stopped and self.due("validate"):
                    stopped = not self.validate(track)
                if not stopped and self.due("images"):
                    self.world.together(self.pictures)
                # A new best is saved with the state that knows of it.
                if stopped or self.due("checkpoint") or self.finished() or state.best_step == state.step:
                    self.save()
            if stopped:
                self.raise_stopped(
                    f"stopped at step {state.step} of {self.total} with a checkpoint; start the same "
                    f"command again to go on"
                )
        finally:
            chunks.close()
            self.profile(ended=True)

    def profile(self, ended: bool = False) -> None:
        """Begins or ends the trace of summaries.profile. A failing one ends with a warning, never the training."""
        first, end = self.settings.summaries.profile or (0, 0)
        wanted = first <= self.state.step < end and self.world.is_chief and not ended
        if wanted == self.tracing:
            return
        self.tracing = wanted
        try:
            if wanted:
                tf.profiler.experimental.start(str(self.run / "train"))
            else:
                tf.profiler.experimental.stop()
        except (OSError, tf.errors.OpError) as error:
            self.terminal.warn(f"the profiler failed, training goes on without it: {error}")

    def raise_stopped(self, message: str) -> NoReturn:
        """Raises on every worker what made one of them stop: an error of its input, or a signal."""
        self.world.raise_first(self.stop.error)
        raise Stopped(message)

    def next_chunk(self, chunks: stream.Prefetch) -> Chunk:
        """The next; where this worker must stop, a blank one, in whose step all workers stop."""
        asked = time.perf_counter()
        chunk = None
        try:
            chunk = chunks.next(lambda: self.stop.requested, self.tell_late)
        except HyperpriorError as error:
            self.stop.ask(error)
        self.log_waited += time.perf_counter() - asked
        if chunk:
            return chunk
        side = self.settings.data.patch_size
        blank = np.zeros((1, self.world.replica_batch, side, side, 3), np.uint8)
        return Chunk([blank] * self.world.local_replicas, np.zeros((1, len(steps.INPUT)), np.float32), [])

    def tell_late(self, seconds: float) -> None:
        self.terminal.warn(f"no input for {seconds:.0f} s: waiting for {self.reading.name}")

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
            self.reading,
        )
        with contextlib.closing(batches):
            while step < self.total:
                ends = [
                    step + self.settings.train.steps_per_call,
                    self.total,
                    *((step // every + 1) * every for every in self.intervals.values() if every),
                    *(edge for edge in self.settings.summaries.profile or () if edge > step),
                ]
                found = [next(batches) for _ in range(min(ends) - step) if not self.stop.requested]
                if self.stop.requested:
                    return
                step = min(ends)
                images = np.stack([batch.images for batch in found])
                yield Chunk(
                    np.split(images, world.local_replicas, axis=1),
                    np.array([self.count(batch) for batch in found], np.float32),
                    [dataclasses.replace(batch, images=images[:0]) for batch in found],
                )

    @staticmethod
    def count(batch: stream.Batch) -> list[int]:
        """steps.INPUT of a batch."""
        bad, small, lost = (sum(skip.kind == kind for skip in batch.skipped) for kind in ("bad", "small", "lost"))
        return [batch.samples, bad, small, batch.visits, lost]

    def train_chunk(self, chunk: Chunk, track: Track) -> bool:
        """Trains on a chunk; True if a worker was asked to stop. Raises DivergedError, DataError."""
        state, world = self.state, self.world
        result = self.train_steps(
            world.place(chunk.images),
            world.place_once(chunk.inputs),
            tf.constant(state.step, tf.int64),
            tf.constant(state.failed),
        )
        done, metrics = int(result.done), result.metrics.numpy()
        self.log_reduced += float(result.all_reduce)
        if int(result.failed) >= self.settings.train.nonfinite_limit():
            # Nothing of the failed step reached the weights; the last checkpoint stays the newest.
            keys = [key for part in world.gather(chunk.batches[done].keys) for key in part]
            often = f" {int(result.failed)} times in a row, last" if int(result.failed) > 1 else ""
            raise DivergedError(
                f"the loss or a gradient is not finite{often} at step {state.step + done}; the weights and "
                f"checkpoints are from before it. Its samples: {', '.join(keys)}. Lower train.learning_rate, or "
                f"look at these images"
            )
        if not done:
            return bool(result.stopped)
        state.step += done
        state.failed = int(result.failed)
        state.nonfinite += done - int(metrics[-1])
        for lane, cursor in zip(world.lanes(world.batch_size), chunk.batches[done - 1].cursors):
            state.cursors[lane] = cursor
        met = dict(zip(steps.INPUT, map(int, result.input.numpy())))
        for kind, number in met.items():
            setattr(state, kind, getattr(state, kind) + number)
        if met["bad"] or met["lost"]:
            skipped = [skip for batch in chunk.batches[:done] for skip in batch.skipped]
            for part in world.gather(skipped):
                for skip in part:
                    self.name(stream.Skip(*skip))
        state.sums = (np.array(state.sums or 0.0) + metrics).tolist()
        track.update(state.step)
        self.judge(state.bad, state.samples, BAD_JUDGED_OVER, "samples are unusable")
        self.judge(state.lost, state.visits, LOST_JUDGED_OVER, "shards that were begun could not be read to their end")
        return bool(result.stopped)

    def judge(self, found: int, seen: int, at_least: int, what: str) -> None:
        """Raises DataError if too large a share of the input cannot be used: on all workers alike."""
        share = self.settings.data.max_bad_fraction
        if found > share * max(seen, at_least):
            raise DataError(
                f"{found} of {seen} {what}, counted each time they come: more than "
                f"data.max_bad_fraction={share} of {max(seen, at_least):,}; {self.run / 'metrics.jsonl'} names each, "
                f"`hyperprior inspect` finds them all: remove them, or raise data.max_bad_fraction"
            )

    def name(self, skip: stream.Skip) -> None:
        """Tells of a defective image or shard, once."""
        if skip.kind != "small" and skip.name not in self.report.skipped:
            self.report.skipped.add(skip.name)
            what = "lost the rest of shard" if skip.kind == "lost" else "skipped"
            self.terminal.warn(f"{what} {skip.name}: {skip.reason}")
            self.report.record("skipped", self.state.step, sample=skip.name, reason=skip.reason)

    def log(self, track: Track) -> None:
        """Means over the steps since the last log."""
        state = self.state
        seconds = max(time.perf_counter() - self.log_began, 1e-9)
        *sums, finite = state.sums
        values = dict(zip((*steps.TRAIN_METRICS, "gradient_norm"), (total / max(finite, 1.0) for total in sums)))
        values["bpp"] = values["bpp_y"] + values["bpp_z"]
        values["learning_rate"] = float(self.optimizer.learning_rate(tf.constant(state.step - 1)))
        values["images_per_s"] = (state.step - state.logged_step) * self.world.batch_size / seconds
        values["input_wait"] = self.log_waited / seconds
        if self.world.device_kind == "CPU":  # a GPU's work is only queued when the graph's clock is read
            values["all_reduce"] = self.log_reduced / seconds
        values["skipped"] = state.bad + state.small
        values["lost_shards"] = state.lost
        values["nonfinite"] = state.nonfinite
        self.report.scalars("train", state.step, values)
        track.line(state.step, summaries.describe(values, ("loss", "bpp", "psnr_db", "images_per_s")))
        self.begin_log()
        state.logged_step, state.sums = state.step, []

    def begin_log(self) -> None:
        self.log_began, self.log_waited, self.log_reduced = time.perf_counter(), 0.0, 0.0

    # Validation -------------------------------------------------------------------------------------------

    def validate(self, track: Track) -> bool:
        """Validates, keeps the best weights, counts patience; False if it was cut short by a stop."""
        state = self.state
        began = time.perf_counter()
        with self.optimizer.averaged_weights():
            found = self.evaluator.means(self.splits.val, self.name)
            if found is None:
                return False
            state.validated_step = state.step
            if state.best_loss is None or found["loss"] < state.best_loss:
                state.best_loss, state.best_step, state.stale = found["loss"], state.step, 0
                self.world.together(self.write_best)
            else:
                state.stale += 1
        self.report.scalars("val", state.step, found)
        state.course.append((found["bpp"], found["psnr_db"]))
        track.line(state.step, "validation  " + summaries.describe(found))
        self.log_began += time.perf_counter() - began  # not a part of training's speed
        return True

    def write_best(self) -> None:
        if self.world.is_chief:
            state = {"step": self.state.step, "loss": self.state.best_loss, "config": self.settings.to_dict()}
            arrays = {f"model/{name}": v.numpy() for name, v in self.model.named_variables().items()}
            checkpoint.save(checkpoint.best_path(self.checkpoints), arrays, state)

    def pictures(self) -> None:
        """What `monitor` shows of the first validation images: the same ones all run long."""
        if not self.world.is_chief or not self.splits.val.images or not self.settings.summaries.num_images:
            return
        began = time.perf_counter()
        with self.optimizer.averaged_weights():
            self.monitor.show(self.report, self.state.step, self.state.course)
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
        self.world.same({"step of the best weights": step})
        found: Optional[dict[str, float]] = {}
        if self.splits.test.images:
            with weights:
                found = self.evaluator.means(self.splits.test, self.name)
        if found is None:
            self.raise_stopped(f"stopped while evaluating; start the same command again to finish {self.run}")
        return {
            **found,
            "step": step,
            "trained_steps": self.state.step,
            "split": self.splits.test_name,
            "split_images": self.splits.test.images,
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
    used = result["images"]
    of = result.get("split_images", used)  # which results of older runs do not tell
    images = f"{used} images" if used == of else f"{used} of its {of} images (others are too small or broken)"
    return [
        f"result on {what}: {summaries.describe(result)}",
        f"         {images}, weights of step {result['step']} of {result['trained_steps']}"
        + (": none were better than those it started from" if result["trained_steps"] and not result["step"] else ""),
        f"run      {run}: config.yaml, checkpoints/, metrics.jsonl, results.json",
        f"watch    tensorboard --logdir {run}",
        f"use      hyperprior compress IMAGE --model {run}",
    ]
