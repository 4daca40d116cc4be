"""The exceptions that xtuner raises for errors that the user can fix.

    XTunerError
    ├── ConfigError       a settings file or an override is wrong
    ├── DataError         a data file or a row in it is wrong
    ├── ModelError        a model, tokenizer, template or adapter cannot be used
    ├── CheckpointError   a checkpoint is missing, damaged or belongs to another run
    ├── LaunchError       devices, processes or disk space are insufficient
    │   └── PeerLostError   another process of the run ended
    └── TrainingError     the run cannot continue: a non-finite loss, or out of memory

Every message says where the error is, what was found, what is allowed and how to fix it. The
command line prints it without a traceback (``--debug`` shows one) and exits with code 2.
"""

import shlex
from collections.abc import Sequence

_LONGEST_GUESS = 200
_MOST_GUESSES = 2000


class XTunerError(Exception):
    """Base class of all errors that the user can fix; the command line exits with code 2."""


class ConfigError(XTunerError):
    """A settings file, an override or a combination of settings is wrong."""


class DataError(XTunerError):
    """A data source, a row or a field of a row is wrong."""


class ModelError(XTunerError):
    """A model, tokenizer, chat template or adapter cannot be used."""


class CheckpointError(XTunerError):
    """A checkpoint is missing, damaged, or does not belong to this run."""


class LaunchError(XTunerError):
    """The available devices, processes or disk space are insufficient."""


class PeerLostError(LaunchError):
    """Another process of the run ended; its own message has the reason."""


class TrainingError(XTunerError):
    """The run cannot continue: a loss or gradient is not finite, or memory ran out."""


def shell_command(*words: object) -> str:
    """A command for the user to copy: its words, quoted for a shell where necessary."""
    return shlex.join(map(str, words))


def brief(error: BaseException) -> str:
    """The type of an error of a library, and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank; `repr` of an error without one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def message_of(error: BaseException) -> str:
    """The message of an error in one line; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def in_one_line(error: BaseException, *, plain: tuple[type[BaseException], ...] = ()) -> str:
    """The message of an error in one line, after its type unless it is one of `plain`."""
    words, name = message_of(error), type(error).__name__
    return words if words == name or isinstance(error, plain) else f"{name}: {words}"


def count(number: int, one: str, several: str | None = None) -> str:
    """`number` with the words for one, or for another number of things: by default `one` + 's'."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def listed(headline: str, problems: Sequence[str]) -> str:
    """Format several problems under one headline, so that all are reported together."""
    return "\n".join([headline, *(f"  {problem}" for problem in problems)])


def did_you_mean(word: str, allowed: Sequence[str], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest match in `allowed`, or an empty string if
    none is as alike as `cutoff`: 1 is equal, 0 has no character in common."""
    found = closest(word, allowed, cutoff=cutoff)
    return f"; did you mean '{found}'?" if found else ""


def closest(word: str, allowed: Sequence[str], *, cutoff: float) -> str | None:
    """The closest match in `allowed`; None if none is as alike as `cutoff`, as in
    `did_you_mean`."""
    import difflib

    if len(word) > _LONGEST_GUESS or len(allowed) > _MOST_GUESSES:
        return None  # comparing would take seconds and is not useful
    return next(iter(difflib.get_close_matches(word, allowed, n=1, cutoff=cutoff)), None)
