"""Reports while a run trains: scalars, validations, pictures, skipped samples, a profile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hyperprior import metric_table
from hyperprior.config import Config
from hyperprior.data.stream import Skip
from hyperprior.errors import DataError
from hyperprior.terminal import Terminal, Track
from hyperprior.training.calls import Outcome
from hyperprior.training.distribute import World
from hyperprior.training.optimizer import Optimizer
from hyperprior.training.resume import State
from hyperprior.training.steps import SUMMED
from hyperprior.watch.pictures import Pictures
from hyperprior.watch.summaries import Summaries

# Shares are computed over at least this many samples, and shards begun.
MIN_SAMPLES = 1000
MIN_SHARDS = 100


class Progress:
    """Reports to the terminal, TensorBoard and metrics.jsonl. Every worker has one, but only the chief writes
    and prints."""

    def __init__(self, world: World, settings: Config, run: Path, state: State, pictures: Pictures, terminal: Terminal):
        self.world, self.settings, self.run, self.state, self.terminal = world, settings, run, state, terminal
        self.pictures = pictures
        is_validated = state.step == state.validated_step and (state.step > 0 or state.best.loss is not None)
        self.report = Summaries(run, state.step, terminal.warn, world.is_chief, is_validated)
        self.is_tracing = False
        self.restart_clock(time.perf_counter())

    def close(self) -> None:
        self.profile(ended=True)
        self.report.close()

    # Training ---------------------------------------------------------------------------------------------

    def restart_clock(self, began: float) -> None:
        """Starts the time over which speeds are measured. `waited_seconds` of it the devices had no input."""
        self.began = self.ended = began
        self.timed_steps, self.all_reduce_seconds, self.waited_seconds = 0, 0.0, 0.0

    def add_sums(self, outcome: Outcome) -> None:
        """Adds the sums of a call to the means that `log_means` reports."""
        for name, value in zip(SUMMED, map(float, outcome.sums)):
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value
        self.timed_steps += outcome.done
        self.all_reduce_seconds += outcome.all_reduce
        self.ended = outcome.ended  # a later call may have ended by now

    def log_means(self, optimizer: Optimizer, track: Track) -> None:
        """Reports means over the steps since the last report."""
        state = self.state
        seconds = max(self.ended - self.began, 1e-9)
        values = dict(state.sums)
        steps, norm, norms = max(values.pop("steps"), 1.0), values.pop("gradient_norm"), values.pop("norms")
        values = {name: total / steps for name, total in values.items()}
        if norms:
            values["gradient_norm"] = norm / norms
        values["bpp"] = values["bpp_y"] + values["bpp_z"]
        values["learning_rate"] = float(optimizer.learning_rate(tf.constant(state.step - 1)))
        values["images_per_s"] = self.timed_steps * self.world.batch_size / seconds
        values["input_wait"] = self.waited_seconds / seconds
        if self.world.device_kind == "CPU":  # on a GPU the graph reads its clock before the queued work is done
            values["all_reduce"] = self.all_reduce_seconds / seconds
        values["skipped"] = state.counts.bad + state.counts.small
        values["lost_shards"] = state.counts.lost
        values["nonfinite"] = state.nonfinite
        self.report.write_scalars("train", state.step, values)
        names = "loss", "bpp", "psnr_db", "images_per_s", "input_wait"
        track.line(metric_table.describe(values, names), label="train")
        state.logged_step, state.sums = state.step, {}
        self.restart_clock(self.ended)

    def report_skips(self, skips: Sequence[Skip]) -> None:
        """Reports defective images and shards of all workers, each once. All workers must call this."""
        for skips_of_worker in self.world.gather(list(skips)):
            for skip in skips_of_worker:
                self.report_skip(Skip(*skip))

    def report_skip(self, skip: Skip) -> None:
        if skip.kind != "small" and skip.name not in self.report.skipped:
            self.report.skipped.add(skip.name)
            event = "lost the rest of shard" if skip.kind == "lost" else "skipped"
            self.terminal.warn(f"{event} {skip.name}: {skip.reason}")
            self.report.write_record("skipped", self.state.step, sample=skip.name, reason=skip.reason)

    def check_input(self) -> None:
        """Raises DataError, on all workers alike, if too large a share of the input is unusable."""
        counts = self.state.counts
        lost = "shards that were begun could not be read to their end"
        self._check_share(counts.bad, counts.samples, MIN_SAMPLES, "samples are unusable")
        self._check_share(counts.lost, counts.visits, MIN_SHARDS, lost)

    def _check_share(self, bad: int, total: int, at_least: int, problem: str) -> None:
        share = self.settings.data.max_bad_fraction
        if bad > share * max(total, at_least):
            raise DataError(
                f"{bad} of {total} {problem}, counted each time they come: more than "
                f"data.max_bad_fraction={share} of {max(total, at_least):,}; {self.run / 'metrics.jsonl'} names each, "
                f"and `hyperprior inspect` finds all: remove them, or raise data.max_bad_fraction"
            )

    # Validation -------------------------------------------------------------------------------------------

    def report_validation(self, values: dict[str, float], seconds: float, track: Track) -> None:
        """Reports the means of a validation. Its `seconds` do not count in the training speed."""
        self.report.write_scalars("val", self.state.step, values)
        self.state.course.append((values["bpp"], values["psnr_db"]))
        best = self.state.best
        verdict = ""
        if best.loss is not None:
            back = self.state.step - best.step
            verdict = f"best {best.loss:.4f}, {back:,} steps before" if back else "best"
        track.rows["val"] = f"{metric_table.describe(values, ('loss', 'bpp', 'psnr_db'))}  {verdict}"
        track.keep(f"val  {metric_table.describe(values, metric_table.RESULT)}  {verdict}")
        self.began += seconds

    def show_pictures(self, optimizer: Optimizer) -> None:
        """Shows pictures of the first validation images, the same ones during the whole run."""
        if not self.world.is_chief or not self.pictures.count:
            return
        began = time.perf_counter()
        optimizer.publish()
        self.report.guard("pictures", self.pictures.show, self.report, self.state.step, self.state.course)
        self.began += time.perf_counter() - began

    # The profiler -----------------------------------------------------------------------------------------

    def profile(self, ended: bool = False) -> None:
        """Starts or stops the trace of summaries.profile. If the profiler fails, warns and goes on."""
        first, end = self.settings.summaries.profile or (0, 0)
        is_wanted = first <= self.state.step < end and self.world.is_chief and not ended
        if is_wanted == self.is_tracing:
            return
        self.is_tracing = is_wanted
        try:
            if is_wanted:
                tf.profiler.experimental.start(str(self.run / "train"))
            else:
                tf.profiler.experimental.stop()
        except (OSError, tf.errors.OpError) as error:
            self.terminal.warn(f"the profiler failed, training goes on without it: {error}")


def describe_result(result: dict[str, Any], run: Path) -> Sequence[str]:
    """The last lines that `hyperprior train` prints."""
    if "loss" not in result:
        return [f"{result['trained_steps']} steps; no images are held out for a test (data.test, data.test_split)"]
    split = "the held-out test images" if result["split"] == "test" else "the validation images (no test split)"
    used = result["images"]
    total = result.get("split_images", used)  # missing in results of older runs
    images = f"{used} images" if used == total else f"{used} of {total} images; others are too small or broken"
    if 0 < (large := result.get("ms_ssim_images", used)) < used:
        images += f" (MS-SSIM: the {large} that are large enough)"
    is_start = result["trained_steps"] and not result["step"]
    return [
        f"result   {metric_table.describe(result, metric_table.RESULT)}",
        f"         on {split}: {images}",
        f"         with the weights of step {result['step']} of {result['trained_steps']}"
        + (": training found none better than the starting weights" if is_start else ""),
        f"run      {run}: config.yaml, checkpoints/, metrics.jsonl, results.json",
        f"use      hyperprior compress IMAGE --model {run}",
    ]
