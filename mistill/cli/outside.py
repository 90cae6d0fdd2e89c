"""What meets a command from outside: its streams, signals, and what the system refuses."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from cyclopts import Token
from cyclopts.exceptions import CycloptsError, MissingArgumentError, UnknownOptionError

from mistill.errors import FolderError, MistillError, SettingsError
from mistill.folders.publishing import is_full_disk
from mistill.shown import one_line, visible

OUR_PACKAGES = ("mistill", "tune", "distill", "quantize", "export", "benchmarks")

# What other tools call options of ours.
_NAMED_ELSEWHERE = {
    "--lr": ("--learning-rate",),
    "--bs": ("--batch-size",),
    "--per-device-train-batch-size": ("--micro-batch-size", "--batch-size"),
    "--num-train-epochs": ("--epochs",),
    "--max-tokens": ("--max-new-tokens",),
    "--n-predict": ("--max-new-tokens",),
    "--temp": ("--temperature",),
    "--ctx-size": ("--context", "--context-length"),
    "--max-length": ("--block-length", "--context-length"),
    "--groupsize": ("--group-size",),
    "--wbits": ("--bits",),
    "--dataset": ("--texts",),
    "--data": ("--texts",),
    "--calibration": ("--texts",),
    "--lora-r": ("--lora-rank",),
}

_TOKENS = re.compile(r"--(?:[a-z]+-)*tokens")
_COUNT = re.compile(r"(\d{1,15}(?:\.\d{1,9})?(?:e\d{1,2})?)([kKmMgGbB]?)")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def speak_utf8() -> None:
    """Write UTF-8 to files and pipes whatever the locale, and replace what cannot be shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def without_output(error: OSError) -> int:
    """End a command whose standard output takes no more.

    Args:
        error: What writing to it raised.

    Returns:
        The exit code: 0 where whoever read it needs no more.
    """
    if error.errno == errno.EPIPE:  # whoever read it needs no more
        return 0
    return refuse(SettingsError(f"the standard output cannot be written: {error.strerror}"))


def is_lost(stream: TextIO) -> bool:
    """Whether a stream takes no more; what is left for it is dropped then.

    Args:
        stream: The standard output.

    Returns:
        True if it cannot be written.
    """
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        # Python would try again, and complain, when it ends.
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        return True
    return False


class SignalledError(BaseException):
    """The system or a user ends this process; what it has begun is cleared up, as at an error."""

    def __init__(self, number: int) -> None:
        """Note which signal it was.

        Args:
            number: Of the signal.
        """
        super().__init__(number)
        self.number = number
        self.name = signal.Signals(number).name


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Clear up at SIGTERM and SIGHUP as at an error, in a process of our own.

    Yields:
        Nothing.
    """
    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SignalledError(number)

    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # one that is ignored, as under nohup, stays so
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def without_verbose(words: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``-v`` and ``--verbose`` out of a command, wherever they stand.

    Args:
        words: The command line.

    Returns:
        The other words, and whether one of them was there. Words behind ``--``, and the value of
        an option, are left alone.
    """
    others: list[str] = []
    tells = False
    for place, word in enumerate(words):
        if word == "--":
            return [*others, *words[place:]], tells
        is_value = place > 0 and words[place - 1].startswith("-")
        if word in ("-v", "--verbose") and not is_value:
            tells = True
        else:
            others.append(word)
    return others, tells


def with_counts(words: Sequence[str]) -> list[str]:
    """The words of a command, with counts of tokens such as ``20M`` and ``1e6`` spelt out.

    Args:
        words: The command line.

    Returns:
        The same, with plain whole numbers behind the options whose name ends in tokens.
    """
    spelt = list(words)
    for place, word in enumerate(spelt):
        name, equals, value = word.partition("=")
        if not _TOKENS.fullmatch(name):
            continue
        if equals:
            spelt[place] = f"{name}={_count(value)}"
        elif place + 1 < len(spelt):
            spelt[place + 1] = _count(spelt[place + 1])
    return spelt


def _count(text: str) -> str:
    """A count as digits; what is none, or no whole number, stays as it is."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return text
    number = Decimal(match[1]) * _UNITS.get(match[2].lower(), 1)
    return str(int(number)) if number == int(number) else text


def require_known_method(words: Sequence[str], command: str, methods: Sequence[str]) -> None:
    """Refuse a misspelt method, which would be taken for the name of a model.

    Args:
        words: The command line.
        command: The command that has methods.
        methods: Their names.

    Raises:
        SettingsError: If the word behind the command is nearly one of them, and no file.
    """
    if len(words) < 2 or words[0] != command or words[1] in methods:
        return
    close = difflib.get_close_matches(words[1], methods, n=1, cutoff=0.7)
    if close and not Path(words[1]).exists():
        raise SettingsError(f"there is no method {words[1]}; did you mean {close[0]}?")


def refuse_words(error: CycloptsError) -> int:
    """Print what is wrong with the words of a command.

    An unknown option is named with the one that says the same here, if there is one, and before
    what is missing: it may be what was misspelt.

    Args:
        error: The command line's own.

    Returns:
        The exit code.
    """
    if isinstance(error, MissingArgumentError) and error.app is not None:
        unknown = next((word for word in error.unused_tokens or () if word.startswith("--")), None)
        if unknown is not None:
            error = UnknownOptionError(
                msg="",
                token=Token(value=unknown.split("=", 1)[0], source="cli"),
                argument_collection=error.app.assemble_argument_collection(parse_docstring=True),
                unused_tokens=error.unused_tokens,
                command_chain=error.command_chain,
            )
    if isinstance(error, UnknownOptionError):
        word = (error.token.keyword or error.token.value).split("=", 1)[0]
        names = [name for argument in error.argument_collection for name in argument.names]
        same = next((name for name in _NAMED_ELSEWHERE.get(word, ()) if name in names), None)
        if same is not None:
            return refuse(SettingsError(f"Unknown option: {word}. Here it is {same}."))
    return refuse(error)


def from_outside(error: BaseException) -> MistillError | None:
    """What the system refused, in words.

    Args:
        error: What a command raised.

    Returns:
        The refusal; None for an error that may be a bug of ours.
    """
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return MistillError("there is not enough memory for this; close other programs")
    if is_full_disk(error):
        return FolderError(f"there is no room to write {_name_of(error)}; free some space")
    if isinstance(error, OSError) and error.errno is not None:
        return FolderError(f"{_name_of(error)}: {os.strerror(error.errno)}")
    return None


def _name_of(error: BaseException) -> str:
    names = (getattr(error, "filename", None), getattr(error, "filename2", None))
    return " and ".join(str(name)[:200] for name in names if name) or "a file"


def refuse(error: Exception) -> int:
    """Print an error as one line.

    Args:
        error: Its message is for the user.

    Returns:
        The exit code.
    """
    with contextlib.suppress(OSError):  # a full or closed stream takes no message
        print(f"mistill: {visible(one_line(error))}", file=sys.stderr, flush=True)
    return 2


def make_visible(record: logging.LogRecord) -> bool:
    """Let a warning that quotes a stranger's text reach the terminal without its controls.

    Args:
        record: The warning; changed.

    Returns:
        True: it is shown.
    """
    record.msg, record.args = visible(record.getMessage()), None
    return True
