"""The errors that the package raises. Launch scripts and job templates rely on the exit code of each type.

HyperpriorError
├── GateError      1   a model is worse than the stored result
├── ConfigError    2   bad usage, bad config, or a run directory that does not fit the config
├── DataError      3   a source or image is missing, damaged or empty, or has too many bad samples
│   └── BitstreamError a compressed file is damaged, or another model or release wrote it
├── DivergedError  4   a loss or gradient is not finite
└── Stopped       75   the run stopped and can resume (EX_TEMPFAIL): start the same command again
    ├── LostWorker     another worker is gone, and the run cannot continue without it
    └── StorageError   a file cannot be written, or not be read now; the last complete checkpoint is intact
"""

from __future__ import annotations

import re

# The user and password of a URL, its query and its fragment, without the punctuation after the URL. In a path, two
# slashes became one.
URL = re.compile(
    r"""([a-z][a-z0-9+.-]{0,30}:/{1,2})(?:[^/\s?#]*@)?([^\s'"?#]*)(?:[?#][^\s'"]*?(?=[.,:;)\]]*(?:[\s'"]|$)))?""",
    re.IGNORECASE,
)
# What a command after `pipe:` gets as a header, a user, or a value whose name says that it is secret.
ARGUMENT = r"""(\\?'[^']*'|\\?"[^"]*"|(?:\\.|[^\s\\])+)"""
NAMES = "pass(?:word|wd)?|token|secret|key"
SECRET = re.compile(
    r"((?:^|\s)(?:(?-i:-[A-Za-z0-9#]*?[uUHb])=?\s*(?=['\"]|[^\s:=]\S*[:=])"  # -u X:X, -sfuX:X, -H 'X: X', -b X=X
    rf"|--[^\s=]*(?:user|header|bearer|cookie|cert|{NAMES})(?:=|\s+))"
    rf"|\b\w*(?:{NAMES})\w*="
    rf"|(?:^|[\s=])(?=[^\s/:]+:[^\s/]*@)){ARGUMENT}",  # X:X@host
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """Text with URLs without user, password, query and fragment, and `pipe:` commands without headers and passwords."""
    text = URL.sub(r"\1\2", text)
    command = text.lower().find("pipe:")
    return text if command < 0 else text[:command] + SECRET.sub(r"\1...", text[command:])


class HyperpriorError(Exception):
    """Base of every error for the user. Its text is one line that names the thing, the value and the remedy.

    It shows no secrets of URLs and commands, and values from files in it lose their line breaks.
    """

    exit_code = 1

    def __str__(self) -> str:
        return hide_secrets(" ".join(super().__str__().splitlines()))


class GateError(HyperpriorError):
    """`evaluate --gate`: a model is worse than the stored result by more than the margin."""


class ConfigError(HyperpriorError):
    """Bad usage or configuration."""

    exit_code = 2


class DataError(HyperpriorError):
    """A data source cannot be used."""

    exit_code = 3


class BitstreamError(DataError):
    """A compressed file cannot be decoded with this model; nothing was written."""


class DivergedError(HyperpriorError):
    """The loss or a gradient became infinite or NaN. Weights and checkpoints are from before that step."""

    exit_code = 4


class Stopped(HyperpriorError):
    """The run stopped before its end. It continues when the same command is started again."""

    exit_code = 75


class LostWorker(Stopped):
    """Another worker ended or stopped answering. Saved files are intact."""


class StorageError(Stopped):
    """A file could not be written, or not be read now. Files that were complete before are intact."""
