"""``mistill chat``: a conversation in a terminal, one reply to a prompt, or one to each line."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import select
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from mistill.chat.bot import ChatBot
from mistill.chat.reply import Speed
from mistill.chat.settings import ChatSettings
from mistill.chat.terminal_commands import (
    MOST_BYTES,
    Commands,
    EndOfChat,
    checked,
    whole_message,
)
from mistill.chat.whole_words import WholeWords
from mistill.errors import FolderError, MistillError, SettingsError, TextError
from mistill.folders.locking import held_alone
from mistill.settings import require
from mistill.shown import visible

_QUOTES = '"' * 3


# Marks that turn the direction of what follows; joiners, which emoji need, are none of them.
_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Seconds of silence behind a line after which the writer of a pipe waits for an answer.
_PATIENCE = 2.0
_CUT_SHORT = {
    "max_new_tokens": "cut short at max_new_tokens",
    "context": "the context is full",
    "interrupted": "interrupted",
}


def run_terminal_chat(
    folder: str | Path,
    *,
    system: str | None = None,
    threads: int | None = None,
    settings: ChatSettings | None = None,
    session: Path | None = None,
    prompt: str | None = None,
    lines: bool = False,
    **options: Any,
) -> None:
    """Talk to a model until the input ends, or answer one prompt.

    In a terminal, replies are followed by a line about their speed. What comes from a pipe is one
    prompt, and only its reply is written; with ``lines``, or where the writer waits for an answer
    with the pipe open, each line is a message. Nothing from a pipe is a command, whatever it begins
    with.

    Args:
        folder: An ONNX folder, or a model folder where PyTorch is installed.
        system: The system prompt of the conversation.
        threads: Number of threads; None takes one for each processor that may be used.
        settings: How replies are sampled, and when they end.
        session: A file from which the conversation continues if it exists; it is saved there
            after each reply.
        prompt: A message to answer instead of the input.
        lines: Whether each line of a pipe is a message of its own.
        **options: More of what ``ChatBot`` takes.

    Raises:
        SettingsError: If there is nothing to read, or both a prompt and lines are asked for.
        TextError: If the prompt is no UTF-8 text, or is empty.
    """
    require(prompt is None or not lines, "give either a prompt or --lines, not both")
    if prompt is None and (sys.stdin is None or sys.stdin.closed):
        raise SettingsError("the standard input is closed; give it a file, a pipe or a terminal")
    if prompt is not None:
        prompt = whole_message(prompt)
    bot = ChatBot(folder, system=system, settings=settings, threads=threads, **options)
    with _kept(bot, session) as save:
        if prompt is not None:
            _answer_once(bot, prompt, sys.stdout, save)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            _TerminalChat(bot, Path(folder).name, Console(highlight=False), save).run()
        elif lines or sys.stdin.isatty():
            _answer_lines(bot, _readable(sys.stdin), sys.stdout, save)
        else:
            text, open_still = _read_pipe(_readable(sys.stdin))
            if open_still:
                talk = itertools.chain(text.splitlines(keepends=True), sys.stdin)
                _answer_lines(bot, talk, sys.stdout, save)
            else:
                message = whole_message(text, "the standard input")
                _answer_once(bot, message, sys.stdout, save)


@contextlib.contextmanager
def _kept(bot: ChatBot, session: Path | None) -> Iterator[Callable[[], object]]:
    """Continue a conversation that a file keeps.

    Args:
        bot: Talks.
        session: The file; None keeps nothing.

    Yields:
        A function that saves the conversation; whatever ends the body, it is saved then too.

    Raises:
        FolderError: If another chat keeps its conversation there, or the file cannot be written:
            before the conversation, not after it.
    """
    if session is None:
        yield lambda: None
        return
    file = session.expanduser().absolute()
    if not file.parent.is_dir():
        raise FolderError(f"{session} cannot be written: there is no folder {file.parent}")
    with held_alone(file):
        if file.exists():
            bot.restore(file)
        bot.save(file)
        saved = len(bot.history)

        def save() -> None:
            nonlocal saved
            bot.save(file)
            saved = len(bot.history)

        try:
            yield save
        finally:
            bot.end_reply()
            if len(bot.history) != saved:
                save()


def speed_line(speed: Speed, ending: str | None = None) -> str:
    """A line about the speed of a reply.

    Args:
        speed: Speed of the reply.
        ending: Reason for the end of the reply.

    Returns:
        One line, such as ``48 tokens, 61.3 tokens/s, the first after 0.12 s``.
    """
    parts = [f"{speed.new_tokens} token{'' if speed.new_tokens == 1 else 's'}"]
    if speed.tokens_per_second:
        parts.append(f"{speed.tokens_per_second:.1f} tokens/s")
    parts.append(f"the first after {speed.first_token_seconds:.2f} s")
    if ending in _CUT_SHORT:
        parts.append(_CUT_SHORT[ending])
    return ", ".join(parts)


class _TerminalChat:
    """A chat in a terminal."""

    def __init__(
        self,
        bot: ChatBot,
        name: str,
        console: Console,
        save: Callable[[], object] = lambda: None,
    ) -> None:
        self._bot = bot
        self._save = save
        self._commands = Commands(bot)
        self._console = console
        self._name = name

    def run(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited and recalled)
        self._note(f"{self._name}: /help for help, Ctrl-C stops a reply, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if line:
                    self._handle(line)
            except KeyboardInterrupt:
                self._console.print()
            except MistillError as error:
                self._console.print(visible(str(error)), style="red", markup=False)
            except (EOFError, EndOfChat):
                self._console.print()
                return

    def _read(self) -> str:
        """A message or a command; three quotation marks begin one of several lines."""
        line = input("> ").strip()
        if not line.startswith(_QUOTES):
            return line
        parts = [line.removeprefix(_QUOTES)]
        while not parts[-1].rstrip().endswith(_QUOTES):
            parts.append(input("... "))
        parts[-1] = parts[-1].rstrip().removesuffix(_QUOTES)
        text = "\n".join(parts).strip("\n")
        return f"/{text}" if text.startswith("/") else text

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            result = self._commands.run(line)
            if result.note:
                self._note(result.note)
            if result.message:
                self._answer(result.message)
        else:
            self._answer(checked(_message(line)))

    def _answer(self, message: str) -> None:
        reply = self._bot.reply(message)
        wrap = WholeWords(self._console.width)
        try:
            for text in reply:
                self._console.out(wrap.add(_without_controls(text)), end="", highlight=False)
            self._console.out(wrap.finish(), end="", highlight=False)
        except KeyboardInterrupt:
            reply.close()
        self._console.print()
        self._save()
        assert self._bot.last_speed is not None
        self._note(speed_line(self._bot.last_speed, self._bot.last_ending))

    def _note(self, text: str) -> None:
        self._console.print(visible(text), style="dim", markup=False)


def _answer_once(
    bot: ChatBot, prompt: str, out: TextIO, save: Callable[[], object] = lambda: None
) -> None:
    """Answer one prompt.

    Args:
        bot: Answers.
        prompt: The message.
        out: Where the reply goes, with a line feed behind it.
        save: Keeps the conversation.
    """
    show = _without_controls if out.isatty() else str
    try:
        for text in bot.reply(prompt):
            out.write(show(text))
            out.flush()
        save()
        out.write("\n")
        out.flush()
    except BrokenPipeError:
        # The reader has closed the pipe; Python would raise again when it closes its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _read_pipe(stream: TextIO) -> tuple[str, bool]:
    """What comes from a pipe up to its end, or up to where its writer waits for an answer.

    A program that talks to the chat writes a line and keeps the pipe open. Who waits for some
    seconds behind a whole line is taken for one.

    Args:
        stream: The standard input, of which nothing was read.

    Returns:
        The text, and whether the pipe is open still.
    """
    try:
        number = stream.fileno()
    except OSError:  # no file of the system
        return stream.read(MOST_BYTES + 1), False
    if os.name == "nt" or not stat.S_ISFIFO(os.fstat(number).st_mode):
        return stream.read(MOST_BYTES + 1), False
    content = b""
    while len(content) <= MOST_BYTES:
        ended_line = content.endswith(b"\n")
        ready, _, _ = select.select([number], [], [], _PATIENCE if ended_line else None)
        if not ready:
            return content.decode("utf-8", "surrogateescape"), True
        part = os.read(number, 1 << 16)
        if not part:
            break
        content += part
    return content.decode("utf-8", "surrogateescape"), False


def _answer_lines(
    bot: ChatBot, lines: Iterable[str], out: TextIO, save: Callable[[], object] = lambda: None
) -> None:
    """Answer each line of a pipe.

    A line is a message whatever it begins with: commands, which may write files, are for people
    at a terminal. One that cannot be answered is named, and the lines after it are answered.

    Args:
        bot: Answers.
        lines: The messages; lines without text are passed over.
        out: Where the replies go, a line each.
        save: Keeps the conversation, after each reply.

    Raises:
        TextError: At the end, if a line could not be answered.
    """
    show = _without_controls if out.isatty() else str
    refused = 0
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                for text in bot.reply(checked(line.strip())):
                    out.write(show(text))
                    out.flush()
            except MistillError as error:
                refused += 1
                sys.stderr.write(f"mistill: line {number}: {visible(str(error))}\n")
                continue
            save()
            out.write("\n")
            out.flush()
    except BrokenPipeError:
        # The reader has closed the pipe; Python would raise again when it closes its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    if refused:
        raise TextError(f"{refused} line{'s' if refused > 1 else ''} could not be answered")


def _readable(lines: TextIO) -> TextIO:
    """The same lines, with lone surrogates for bytes that are not UTF-8, instead of an error."""
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(encoding="utf-8", errors="surrogateescape")
    return lines


def _without_controls(text: str) -> str:
    """Part of a reply for a terminal, which would obey the control characters in it."""
    return "".join(letter for letter in text if letter in "\n\t" or not _is_control(letter))


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs") or letter in _DIRECTIONS


def _message(line: str) -> str:
    return line[1:] if line.startswith("//") else line
