"""The length of a run, and the steps at which something is due. Epochs are converted to steps."""

from __future__ import annotations

from typing import Optional, Union

from hyperprior.config import Config


class Timetable:
    """`total`: steps of the run; `epoch_steps`: steps of an epoch, 0 if the images were not counted; `every`: steps
    between repeated events, 0 for never."""

    def __init__(self, settings: Config, images: int, has_validation: bool):
        train, summaries = settings.train, settings.summaries
        self.epoch_steps = -(-images * settings.data.patches_per_image // train.batch_size)
        self.total = train.steps or (train.epochs or 0) * self.epoch_steps
        self.every = {
            "scalars": self.to_steps(summaries.scalars_every),
            "images": self.to_steps(summaries.images_every),
            "validate": self.to_steps(train.validate_every) if has_validation else 0,
            "checkpoint": self.to_steps(train.checkpoint_every),
        }
        self.steps_per_call = train.steps_per_call
        self.profile = summaries.profile or (0, 0)

    @staticmethod
    def needs_count(settings: Config) -> bool:
        """Whether a length or interval is in epochs. Then the images must be counted."""
        train, summaries = settings.train, settings.summaries
        every = train.validate_every, train.checkpoint_every, summaries.scalars_every, summaries.images_every
        return train.epochs is not None or any(isinstance(interval, str) for interval in every)

    def to_steps(self, interval: Optional[Union[int, str]]) -> int:
        """Converts an interval to steps; 0 means never."""
        if isinstance(interval, str):
            return int(interval.split()[0]) * self.epoch_steps
        return interval or 0

    def is_due(self, event: str, step: int) -> bool:
        """Whether `event` is due after `step` steps. A run that validates also does so after its last step."""
        every = self.every[event]
        return bool(every) and (step % every == 0 or (event == "validate" and step == self.total))

    def must_pause(self, step: int) -> bool:
        """Whether the loop does more than train after `step` steps, so that the next call must not have started."""
        events = ("images", "validate", "checkpoint")
        return step == self.total or step in self.profile or any(self.is_due(event, step) for event in events)

    def end_of_call(self, step: int) -> int:
        """The step at which a call that begins at `step` ends. A call never passes a step with a due event."""
        return min(
            step + self.steps_per_call,
            self.total,
            *((step // every + 1) * every for every in self.every.values() if every),
            *(edge for edge in self.profile if edge > step),
        )
