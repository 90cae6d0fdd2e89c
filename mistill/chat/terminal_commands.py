"""The commands of a chat in a terminal: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec import Struct

from mistill.chat.bot import ChatBot
from mistill.errors import FolderError, SettingsError, TextError
from mistill.folders.json_text import check, parse_json
from mistill.folders.publishing import refuse_existing, write_atomically
from mistill.settings import require
from mistill.shown import one_line

HELP = """\
/reset        forget the conversation and begin anew; /clear does the same
/system TEXT  begin anew with this system prompt; without TEXT, show it
/undo         forget the last message and its reply
/retry        write another reply to the last message
/file FILE    send the text of a file as a message
/save FILE    save the conversation as a line of JSON, as training reads it
/load FILE    continue a conversation that /save wrote
/quit         leave, as Ctrl-D and /bye do
/help         show this
\"\"\" begins a message of several lines, and ends it.
Ctrl-C stops a reply; what was written of it stays in the conversation.
A message that begins with a slash is written with two."""

# The longest message that is read from a file or a pipe; no context holds more.
MOST_BYTES = 1 << 24


class EndOfChat(Exception):
    """The user ends the chat."""


@dataclass(frozen=True)
class CommandResult:
    """What a command leads to.

    Attributes:
        note: What to tell the user.
        message: A message to answer.
    """

    note: str = ""
    message: str = ""


class _SavedTurn(Struct):
    """A message in a file of ``/save``."""

    role: Literal["system", "user", "assistant"]
    content: str


class _SavedTalk(Struct):
    """What ``/save`` writes."""

    messages: list[_SavedTurn]


class Commands:
    """The commands of a chat."""

    def __init__(self, bot: ChatBot) -> None:
        """Take the commands of a chat.

        Args:
            bot: The chatbot whose conversation they change.
        """
        self.bot = bot
        self._saved: set[Path] = set()

    def run(self, line: str) -> CommandResult:
        """Run a command.

        Args:
            line: The line, which begins with a slash.

        Returns:
            What to tell the user, and a message to answer, if there is one.

        Raises:
            MistillError: If there is no such command, or it cannot be obeyed.
        """
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        runs: dict[str, Callable[[str], CommandResult]] = {
            "help": lambda _: CommandResult(HELP),
            "reset": self._reset,
            "clear": self._reset,
            "system": self._system,
            "undo": self._undo,
            "retry": self._retry,
            "file": self._file,
            "save": self._save,
            "load": self._load,
            "quit": self._quit,
            "exit": self._quit,
            "bye": self._quit,
        }
        if name not in runs:
            close = difflib.get_close_matches(name, runs, n=1)
            hint = f"; did you mean /{close[0]}?" if close else "; /help lists them"
            raise SettingsError(f"there is no command /{name}{hint}")
        if name in ("file", "save", "load"):
            require(bool(argument), f"/{name} needs the name of a file")
        elif name != "system":
            require(not argument, f"/{name} takes nothing behind it, not {argument!r}")
        return runs[name](argument)

    def _quit(self, _: str) -> CommandResult:
        raise EndOfChat

    def _reset(self, _: str) -> CommandResult:
        self.bot.reset()
        return CommandResult("The conversation is forgotten.")

    def _system(self, text: str) -> CommandResult:
        if not text:
            first = self.bot.history[:1]
            prompt = first[0]["content"] if first and first[0]["role"] == "system" else None
            return CommandResult("There is no system prompt." if prompt is None else prompt)
        self.bot.reset(system=checked(text))
        return CommandResult("The conversation begins anew with this system prompt.")

    def _undo(self, _: str) -> CommandResult:
        message = self._take_back()
        return CommandResult(f"Forgotten: {_shortened(message)}")

    def _retry(self, _: str) -> CommandResult:
        return CommandResult(message=self._take_back())

    def _take_back(self) -> str:
        """Remove the last message and its reply from the history; the message."""
        self.bot.end_reply()
        history = self.bot.history
        places = [place for place, one in enumerate(history) if one["role"] == "user"]
        require(bool(places), "nothing was said yet")
        message = history[places[-1]]["content"]
        del history[places[-1] :]
        return message

    def _file(self, name: str) -> CommandResult:
        try:
            with Path(name).expanduser().open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise FolderError(f"{name} cannot be read: {error.strerror}") from error
        return CommandResult(message=whole_message(_decoded(content, name), name))

    def _load(self, name: str) -> CommandResult:
        file = Path(name).expanduser()
        try:
            with file.open("rb") as opened:
                content = opened.read(MOST_BYTES + 1)
        except OSError as error:
            raise FolderError(f"{name} cannot be read: {error.strerror}") from error
        talk = parse_json(_decoded(content, name), name)
        turns = check(talk, _SavedTalk, name).messages
        self.bot.reset()
        self.bot.history = [{"role": turn.role, "content": turn.content} for turn in turns]
        return CommandResult(f"Loaded {len(turns)} messages from {name}.")

    def _save(self, name: str) -> CommandResult:
        file = Path(name).expanduser().absolute()
        if file not in self._saved:
            refuse_existing(file)
        if not file.parent.is_dir():
            raise FolderError(f"{name} cannot be written: there is no folder {file.parent}")
        messages = json.dumps({"messages": self.bot.history}, ensure_ascii=False)
        write_atomically(file, messages + "\n")
        self._saved.add(file)
        return CommandResult(f"Saved to {name}.")


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is not UTF-8 text") from error


def whole_message(text: str, name: str = "the prompt") -> str:
    """A text as a message.

    Args:
        text: The text.
        name: Where it comes from, for the error.

    Returns:
        The text without white space at its ends.

    Raises:
        TextError: If it is too long, not UTF-8, or empty.
    """
    if len(text) > MOST_BYTES:
        raise TextError(f"{name} has more than {MOST_BYTES:,} characters; give a shorter one")
    message = checked(text, name).strip()
    if not message:
        raise TextError(f"{name} holds no text; give a message to answer")
    return message


def _shortened(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 60 else f"{line[:57]}..."


def checked(message: str, name: str = "it") -> str:
    """A message, if it can be encoded.

    Args:
        message: The message.
        name: What it is, for the error.

    Returns:
        The same.

    Raises:
        TextError: If it holds half of a character, or bytes that are not UTF-8.
    """
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} is not UTF-8 text") from error
    return message
