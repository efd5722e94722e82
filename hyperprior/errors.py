"""What can go wrong, as types: each carries the exit code that launch scripts and job templates rely on.

HyperpriorError
├── GateError      1   a model is worse than the result it was to match
├── ConfigError    2   bad usage, bad config, a run directory that does not fit
├── DataError      3   a source or image that is missing, damaged, empty or too bad to train on
│   └── BitstreamError a compressed file that is damaged, or of another model or release
├── DivergedError  4   a loss or gradient that is not finite
└── Stopped       75   stopped resumably (EX_TEMPFAIL): start the same command again
    ├── LostWorker     another worker is gone, and the work cannot go on without it
    └── StorageError   the disk refused a write; the last complete checkpoint is intact
"""


class HyperpriorError(Exception):
    """Base of every error meant for the user: one line that names the thing, the value and the remedy."""

    exit_code = 1


class GateError(HyperpriorError):
    """`evaluate --gate`: a model is worse than the stored result by more than the margin."""


class ConfigError(HyperpriorError):
    """Bad usage or configuration."""

    exit_code = 2


class DataError(HyperpriorError):
    """A data source cannot be used as it is."""

    exit_code = 3


class BitstreamError(DataError):
    """A compressed file cannot be decoded with this model; nothing was written."""


class DivergedError(HyperpriorError):
    """The loss or a gradient became infinite or NaN; weights and checkpoints are from before that step."""

    exit_code = 4


class Stopped(HyperpriorError):
    """The run stopped before its end and continues when the same command is started again."""

    exit_code = 75


class LostWorker(Stopped):
    """Another worker ended or stopped answering; what was saved is intact."""


class StorageError(Stopped):
    """Something could not be written; what was complete before is still there."""


def error_type(name: str) -> type[HyperpriorError]:
    """The error type of that name, which another worker told."""
    return globals()[name]
