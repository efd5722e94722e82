"""The training job. It trains a run directory from a config, and resumes it after every stop.

Read in this order:

    loop         the job: resume, train, validate, save checkpoints, stop, and measure the result
    steps        the graph: n training steps in one call
    optimizer    the weights in training: Adam, its learning rate, and the moving average
    distribute   devices and workers: lanes of the batch, sums over workers, checks that workers agree
    meeting      how workers find, meet and lose each other, by TF_CONFIG
    stop         stop requests: signals, and the flag that every step reads
    timetable    the length of a run, and the steps at which something is due
    feed         the batches of each call
    calls        calls of the graph, two in flight
    resume       the state in a checkpoint, and the checks that it fits
    checkpoint   checkpoint files: the last few steps and the best weights
    validation   means over held-out images
    progress     reports while a run trains
    export       writes a model directory from a run
    info         the facts about a file, a model or a run (`hyperprior info`)
    runs         lists, compares and describes runs
    sweep        one run for each lambda, or a search for the lambda of a wanted rate

It uses data, model, codec, reference and watch. It does not use evaluation.

.. include:: README.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:
    from hyperprior.config import Config
    from hyperprior.terminal import Terminal


def train(
    config: Union[Config, str, Path], run: Union[str, Path], overrides: Sequence[str] = (), *, quiet: bool = False
) -> Optional[dict[str, Any]]:
    """Trains in the directory `run`, or resumes the run there, and exports its model to `run`/model.

    `config`: a Config, a YAML file, or the name of a config of the package, such as "photos"; `overrides` such as
    "train.steps=1000" replace its values. `quiet`: print only warnings. Returns the content of `run`/results.json: the
    metrics of the best weights on held-out images. Workers that are not the chief return None.

    Raises the errors of hyperprior.errors, whose `exit_code` is that of `hyperprior train`. Ctrl-C and SIGTERM during
    the training raise Stopped after the current step and a checkpoint; the same call then continues. This needs the
    main thread: in another one, signals keep their meaning.
    """
    from hyperprior.config import load_config  # `import hyperprior` stays fast
    from hyperprior.errors import ConfigError
    from hyperprior.terminal import Terminal

    if "://" in str(run):
        raise ConfigError(f"run is {run}; it must be a local directory")
    return train_and_export(load_config(config, overrides), Path(run), Terminal(quiet))


def train_and_export(
    settings: Config, run: Path, terminal: Terminal, owns_process: bool = False
) -> Optional[dict[str, Any]]:
    """Trains, then exports: for `train` and for the command. `owns_process`: see `loop.train`."""
    from hyperprior import stack

    stack.start_tensorflow(settings.train.precision)
    from hyperprior.training import export, loop

    result = loop.train(settings, run, terminal, owns_process)
    if result is not None:  # only the chief exports
        export.export(run, None, terminal, data=settings.data)
    return result
