"""The training job: resume, train, validate, save checkpoints, stop, and measure the result.

A run is a pure function of (config, seed, step). Every decision here depends on the step and on numbers that all
workers share, never on the clock. Only the chief writes files and prints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any, NoReturn, Optional

import numpy as np
import tensorflow as tf

from hyperprior import __version__, image_files, storage
from hyperprior.config import SOURCES, Config, flatten, render, without_secrets
from hyperprior.data.lanes import Cursor
from hyperprior.data.splits import open_splits
from hyperprior.errors import ConfigError, DivergedError, HyperpriorError, Stopped
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import Arrays
from hyperprior.terminal import Terminal, Track
from hyperprior.training import checkpoint, meeting, resume, runs
from hyperprior.training.calls import Call, Calls
from hyperprior.training.distribute import World
from hyperprior.training.feed import Feed
from hyperprior.training.progress import Progress
from hyperprior.training.resume import Best, State
from hyperprior.training.steps import build_model, make_train_steps
from hyperprior.training.stop import StopRequest
from hyperprior.training.timetable import Timetable
from hyperprior.training.validation import Evaluator
from hyperprior.watch.pictures import Pictures

CONFIG_HEAD = "# hyperprior "  # the first words of a config.yaml that a run wrote


def train(settings: Config, run: Path, terminal: Terminal, owns_process: bool = False) -> Optional[dict[str, Any]]:
    """Trains in the directory `run`, or resumes the run there. Returns the test result (results.json).

    `owns_process`: a signal before the first step ends this process, as a command should.
    Workers that are not the chief return None.

    Raises ConfigError, DataError, DivergedError, StorageError, LostWorker, or Stopped after a stop request. The run's
    last checkpoint is then complete. All workers raise the same error, except a lost one.
    """
    with StopRequest(owns_process) as stop, contextlib.ExitStack() as resources, meeting.name_lost_workers():
        world = World(settings.distribute, settings.train.batch_size, terminal.warn)
        stop.install()
        if not world.is_chief:
            terminal = Terminal(quiet=True)

        def take_directory() -> None:
            try:
                check_directory(run)
            except OSError as error:  # a name that is too long, a folder that may not be read
                raise ConfigError(f"run directory {run} cannot be used: {error.strerror}") from error
            if world.is_chief:
                resources.enter_context(storage.lock_directory(run))
                storage.remove_unfinished(run, r"config\.yaml|results\.json|metrics\.jsonl")
                storage.remove_unfinished(run / "checkpoints", r"step-\d+\.npz|best\.npz")

        world.check_same({**select_comparable(settings), "version": __version__, "tensorflow": tf.__version__})
        world.check_batch()
        world.on_every_worker(take_directory)
        result = Trainer(settings, run, terminal, world, stop).run_to_end()
    return result if world.is_chief else None


def check_directory(run: Path) -> None:
    """Raises ConfigError if `run` holds files that no run wrote, and that training would replace."""
    config = run / "config.yaml"
    if (run / "checkpoints").is_dir():
        return
    if config.is_file():
        if not config.read_bytes().startswith(CONFIG_HEAD.encode()):
            raise ConfigError(f"{config} is not the config of a run, and would be replaced; choose another --run")
    elif found := [name for name in ("metrics.jsonl", "results.json", "model") if (run / name).exists()]:
        raise ConfigError(f"{run} is no run, but holds {found[0]}, which would be replaced; choose another --run")


def select_comparable(settings: Config) -> dict[str, Any]:
    """The settings that must be equal on all workers. Names of sources may differ if the data is the same."""
    sources = [f"data.{name}" for name in SOURCES]
    return {key: value for key, value in flatten(settings).items() if key not in sources}


class Trainer:
    """One run on this worker. Workers compare what they hold before they rely on it."""

    def __init__(self, settings: Config, run: Path, terminal: Terminal, world: World, stop: StopRequest):
        self.settings, self.run, self.terminal, self.world, self.stop = settings, run, terminal, world, stop
        self.checkpoints = run / "checkpoints"
        open_all = functools.partial(open_splits, settings.data, world.batch_size, terminal=terminal)
        self.splits = world.on_every_worker(lambda: open_all(count=Timetable.needs_count(settings)))
        self.timetable = Timetable(settings, self.splits.train.images, bool(self.splits.val.images))
        saved = resume.load(world, run, settings, self.splits, terminal)
        world.check_same({"data": resume.describe_data(self.splits)})
        with tf.device("CPU:0"):
            stop.flag = tf.Variable(0.0, trainable=False)
        set_weights = self.keep_weights if saved else self.set_start_weights
        self.model, self.optimizer = build_model(world, settings, self.timetable.total, set_weights)
        self.state = State([Cursor()] * world.batch_size)
        if saved:
            arrays, self.state = saved
            world.on_every_worker(lambda: self.optimizer.assign(arrays, str(self.checkpoints)))
            self.state.failed = min(self.state.failed, settings.train.nonfinite_limit() - 1)  # the limit may be new
            self.restore_best()
            self.optimizer.decays.assign(self.state.decays)
        self.evaluator = Evaluator(world, self.model, settings, stop)
        world.on_every_worker(self.check_held_out)
        self.train_steps = make_train_steps(world, self.model, self.optimizer, stop.flag, settings)

    def keep_weights(self, model: ScaleHyperprior) -> None:
        """The checkpoint replaces them."""

    def restore_best(self) -> None:
        """Writes the best weights again if the run was killed between their checkpoint and them. Else, if they are
        damaged or of a step that the resumed run has not reached, forgets the best."""
        describe = functools.partial(resume.describe_lost_best, self.checkpoints, self.state.best)
        (lost, *_) = self.world.gather(self.world.on_every_worker(describe if self.world.is_chief else lambda: None))
        if lost and self.state.best.step == self.state.step:
            self.world.on_every_worker(self.write_best)
        elif lost:
            self.terminal.warn(f"{lost}; the search for the best starts again")
            self.state.best = Best()

    def set_start_weights(self, model: ScaleHyperprior) -> None:
        self.world.on_every_worker(lambda: resume.set_start_weights(model, self.settings, self.terminal.warn))
        weights = values_of(model.named_variables())
        self.world.check_same({"weights to start from": storage.fingerprint(weights)})

    def check_held_out(self) -> None:
        train = self.settings.train
        following = {
            "train.schedule=plateau": train.schedule == "plateau",
            "train.early_stopping_patience": train.early_stopping_patience is not None,
        }
        for key, is_set in following.items():
            if is_set and not self.splits.val.images:
                raise ConfigError(f"{key} follows the validations, but no images are held out; set data.val")
        self.evaluator.check_split("val", self.splits.val)
        self.evaluator.check_split(self.splits.test_name, self.splits.test)

    def run_to_end(self) -> dict[str, Any]:
        """Trains the remaining steps, and returns the result."""
        step = self.state.step
        result = runs.read_result(self.run) if step and self.is_finished() else None
        if result and result["trained_steps"] == step:
            self.terminal.say(f"{self.run} is done: {step} steps")
            return result
        self.announce_run()
        shown = without_secrets(self.settings)
        self.write_file("config.yaml", f"{CONFIG_HEAD}{__version__}, resolved\n{render(shown)}")
        with contextlib.closing(self.make_progress()) as self.progress:
            self.progress.report.describe_run(shown, step)
            self.progress.report.write_record("started", step, **self.world.environment())
            try:
                with self.terminal.track("training", self.timetable.total, step) as track:
                    self.loop(track)
                result = self.evaluate()
            except HyperpriorError as error:
                self.progress.report.write_record("ended", self.state.step, code=error.exit_code, reason=str(error))
                raise
        self.write_file("results.json", json.dumps(result, indent=2) + "\n")
        return result

    def make_progress(self) -> Progress:
        count = self.settings.summaries.num_images if self.splits.val.images else 0
        read_images = functools.partial(self.evaluator.read_images, self.splits.val)
        pictures = Pictures(self.model, self.settings.loss, read_images, count)
        return Progress(self.world, self.settings, self.run, self.state, pictures, self.terminal)

    # The loop ---------------------------------------------------------------------------------------------

    def loop(self, track: Track) -> None:
        """Trains to the end. If a worker must stop earlier, saves a checkpoint and raises the reason."""
        state, progress, is_due = self.state, self.progress, self.timetable.is_due
        feed = Feed(
            *(self.world, self.splits.train, self.settings, self.timetable),
            *(state.cursors, state.step, self.stop, self.terminal),
        )
        self.stop.begin_loop()
        progress.restart_clock(time.perf_counter())
        with contextlib.closing(feed), Calls(self.train_steps, self.stop, state.failed) as calls:
            stopped = False
            if self.needs_validation_first():
                stopped = not self.validate(track)
                self.save_checkpoint()
            if not stopped and not self.is_finished():
                track.line("the first step takes longer: it makes the graph", label="train")
            call: Optional[Call] = None
            while not stopped and not self.is_finished():
                progress.profile()
                call = call or self.start_call(feed, calls)
                following = None if self.timetable.must_pause(feed.step) else self.start_call(feed, calls, call)
                stopped = self.finish_call(call, calls, track)
                call = following
                if is_due("scalars", state.step) and state.step > state.logged_step:
                    progress.log_means(self.optimizer, track)
                if stopped:
                    calls.drain()
                if not stopped and is_due("validate", state.step):
                    stopped = not self.validate(track)
                if not stopped and is_due("images", state.step):
                    self.world.on_every_worker(lambda: progress.show_pictures(self.optimizer))
                # Each new best needs a checkpoint, because the state must name the step in best.npz.
                is_new_best = state.best.step == state.step
                if stopped or is_due("checkpoint", state.step) or self.is_finished() or is_new_best:
                    self.save_checkpoint()
        if stopped:
            self.raise_stopped(
                f"stopped at step {state.step} of {self.timetable.total} with a checkpoint; start the same "
                f"command again to continue"
            )

    def is_finished(self) -> bool:
        patience = self.settings.train.early_stopping_patience
        return self.state.step >= self.timetable.total or (patience is not None and self.state.best.stale >= patience)

    def needs_validation_first(self) -> bool:
        """Whether a stop interrupted a validation, or a new run starts from trained weights: they may stay the best."""
        state = self.state
        was_interrupted = state.step > state.validated_step
        starts_from_trained = bool(self.settings.train.start_from) and not state.step and state.best.loss is None
        return self.timetable.is_due("validate", state.step) and (was_interrupted or starts_from_trained)

    def start_call(self, feed: Feed, calls: Calls, before: Optional[Call] = None) -> Call:
        """Starts a call on the next chunk, after the call `before` if that is in flight."""
        began = time.perf_counter()
        chunk = feed.next_chunk()
        idle_since = max(began, before.idle_since()) if before else began
        self.progress.waited_seconds += max(0.0, time.perf_counter() - idle_since)
        return calls.start(chunk)

    def finish_call(self, call: Call, calls: Calls, track: Track) -> bool:
        """Waits for a call, and counts it. Returns True if a worker must stop. Raises DivergedError, DataError."""
        state, world, batches = self.state, self.world, call.chunk.batches
        outcome = call.outcome.result()
        done, failed, counts = outcome.done, outcome.failed, outcome.counts
        if failed >= self.settings.train.nonfinite_limit():
            calls.drain()
            self.raise_diverged(failed, state.step + done, world.gather(batches[done].keys))
        if done:
            self.progress.add_sums(outcome)
            state.step += done
            state.failed = failed
            state.nonfinite += done - int(outcome.sums[-1])
            for lane, cursor in zip(world.lanes(world.batch_size), batches[done - 1].cursors):
                state.cursors[lane] = cursor
            state.counts = state.counts.plus(counts)
            if counts.bad or counts.lost:
                calls.drain()
                self.progress.report_skips([skip for batch in batches[:done] for skip in batch.skipped])
            track.update(state.step)
            self.progress.check_input()
        return outcome.stopped

    def validate(self, track: Track) -> bool:
        """Validates and counts patience. Returns False if a stop interrupted it."""
        state = self.state
        began = time.perf_counter()
        self.optimizer.publish()
        values = self.evaluator.compute_means(self.splits.val, self.progress.report_skips)
        if values is None:
            return False
        state.validated_step = state.step
        is_best = state.best.update(values["loss"], state.step)
        patience = self.settings.train.decay_patience
        if not is_best and self.settings.train.schedule == "plateau" and state.best.stale % patience == 0:
            state.decays += 1
            self.optimizer.decays.assign(state.decays)
        self.progress.report_validation(values, time.perf_counter() - began, track)
        return True

    def evaluate(self) -> dict[str, Any]:
        """Measures the weights with the best validation loss, or else the last ones, on the test split."""
        best, step = self.state.best, self.state.step
        self.optimizer.publish()
        if best.loss is not None:
            try:
                arrays = checkpoint.load_best(self.checkpoints, best.step)
            except ValueError as error:
                self.terminal.warn(f"{error}; the result is from the last weights instead of the best")
            else:
                storage.assign_arrays(self.model_variables(), arrays, str(checkpoint.best_path(self.checkpoints)))
                step = best.step
        self.world.check_same({"step of the best weights": step})
        values: Optional[dict[str, float]] = {}
        if self.splits.test.images:
            values = self.evaluator.compute_means(self.splits.test, self.progress.report_skips)
        if values is None:
            self.raise_stopped(f"stopped while evaluating; start the same command again to finish {self.run}")
        return {
            **values,
            "step": step,
            "trained_steps": self.state.step,
            "split": self.splits.test_name,
            "split_images": self.splits.test.images,
            "eval_crop": self.settings.data.eval_crop,
            "lambda": self.settings.loss.lmbda,
            "metric": self.settings.loss.metric,
            "version": __version__,
        }

    def raise_stopped(self, message: str) -> NoReturn:
        """Raises, on all workers, the reason why one of them stopped: an input error, or Stopped after a signal."""
        self.world.raise_if_any_failed(self.stop.error)
        raise Stopped(message)

    def raise_diverged(self, failed: int, step: int, keys_of_workers: list[list[str]]) -> NoReturn:
        """Raises DivergedError. The failed step changed no weights, and no checkpoint is written after it."""
        keys = ", ".join(key for keys in keys_of_workers for key in keys)
        repeats = f" {failed} times in a row, last" if failed > 1 else ""
        raise DivergedError(
            f"the loss or a gradient is not finite{repeats} at step {step}; the weights and checkpoints are from "
            f"before it. Its samples: {keys}. Lower train.learning_rate, or look at these images"
        )

    # Files ------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Saves a checkpoint with the cursors of all workers, and then the weights if they are the best."""
        cursors = np.zeros((self.world.batch_size, len(Cursor._fields)), np.int64)
        for lane in self.world.lanes(self.world.batch_size):
            cursors[lane] = self.state.cursors[lane]
        self.state.cursors = [Cursor(*map(int, row)) for row in self.world.sum_workers(cursors)]
        self.world.on_every_worker(self.write_checkpoint)
        if self.state.best.loss is not None and self.state.best.step == self.state.step:
            self.world.on_every_worker(self.write_best)

    def write_checkpoint(self) -> None:
        if not self.world.is_chief:
            return
        state = {
            "run": self.state.to_json(),
            "config": without_secrets(self.settings).to_dict(),
            "data": resume.describe_data(self.splits),
            "environment": self.world.environment(),
            "version": __version__,
        }
        path = checkpoint.path_of(self.checkpoints, self.state.step)
        checkpoint.save(path, self.optimizer.arrays(), state)
        checkpoint.keep_last(self.checkpoints, self.state.step, self.settings.train.keep_checkpoints)

    def write_best(self) -> None:
        if self.world.is_chief:
            self.optimizer.publish()
            best = self.state.best
            state = {"step": best.step, "loss": best.loss, "config": without_secrets(self.settings).to_dict()}
            checkpoint.save(checkpoint.best_path(self.checkpoints), values_of(self.model_variables()), state)

    def model_variables(self) -> dict[str, tf.Variable]:
        return {f"model/{name}": variable for name, variable in self.model.named_variables().items()}

    def write_file(self, name: str, text: str) -> None:
        """Writes a file of the run on the chief. If that fails, all workers raise the error."""
        write = functools.partial(storage.write_text, self.run / name, text)
        self.world.on_every_worker(write if self.world.is_chief else lambda: None)

    def announce_run(self) -> None:
        """Prints the run, its data, model, devices and length."""
        state, splits, s, world = self.state, self.splits, self.settings, self.world
        count = f"{splits.train.images} images in " if splits.train.images else ""
        test = "is val" if splits.test_name == "val" else f"{splits.test.images} images"
        parameters = sum(int(np.prod(v.shape)) for v in self.model.named_variables().values())
        epochs = f" of {self.timetable.epoch_steps} an epoch" if self.timetable.epoch_steps else ""
        best = "" if state.best.loss is None else f"; best validation {state.best.loss:.4f} at step {state.best.step}"
        lines = [
            f"run      {self.run}, " + (f"resumed at step {state.step}{best}" if state.step else "new"),
            f"data     train {count}{len(splits.train.shards)} shards; val {splits.val.images} images; test {test}",
            f"model    N={s.model.num_filters}, M={s.model.latent_channels}, {s.model.density} y, "
            f"{parameters:,} parameters, {s.train.precision}",
            f"devices  {world.environment()['devices']}, {world.replica_batch} patches of "
            f"{s.data.patch_size}x{s.data.patch_size} each, global batch {world.batch_size}",
            f"length   {self.timetable.total} steps{epochs}",
            f"watch    tensorboard --logdir {self.run}",
        ]
        if splits.ignored:
            ignored = image_files.describe_suffixes(splits.ignored)
            lines.insert(2, f"ignored  files that are no training images: {ignored}")
        self.terminal.say("\n".join(lines))


def values_of(variables: dict[str, tf.Variable]) -> Arrays:
    return {name: variable.numpy() for name, variable in variables.items()}
