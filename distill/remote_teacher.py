"""Replies of a teacher behind a server.

Many requests are under way at once, and each reply is written down as it comes, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mistill.errors import SettingsError, TextError
from mistill.progress import track
from mistill.remote.chat_server import ChatServer
from mistill.text.conversation import Conversation


class RemoteReply(NamedTuple):
    """What a teacher behind a server said.

    Attributes:
        text: The reply.
        finished: Whether the teacher ended its turn itself.
    """

    text: str
    finished: bool


def remote_replies(
    teacher: ChatServer,
    talks: Sequence[Conversation],
    record: Path,
    *,
    at_once: int,
    settings_of: Callable[[int], Mapping[str, Any]],
) -> list[RemoteReply]:
    """The replies to all conversations, those in the record first, the rest asked for now.

    Args:
        teacher: The model.
        talks: Turns up to each answer.
        record: A file to which each reply is added as it comes.
        at_once: Requests under way at once.
        settings_of: Fields of the request of a conversation, by its number.

    Returns:
        A reply to each.

    Raises:
        TextError: If the server refuses a conversation.
        SettingsError: If it does not answer, however often it is asked.
    """
    replies = _recorded(record, len(talks))
    missing = iter([number for number in range(len(talks)) if number not in replies])
    with (
        track("writing conversations", len(talks), "prompts", done=len(replies)) as progress,
        record.open("ab") as opened,
    ):
        for number, reply in _asked(teacher, talks, missing, at_once, settings_of):
            line = json.dumps({"number": number, **reply._asdict()}) + "\n"
            opened.write(line.encode())
            opened.flush()
            os.fsync(opened.fileno())
            replies[number] = reply
            progress.advance()
    return [replies[number] for number in range(len(talks))]


def _asked(
    teacher: ChatServer,
    talks: Sequence[Conversation],
    missing: Iterator[int],
    at_once: int,
    settings_of: Callable[[int], Mapping[str, Any]],
) -> Iterator[tuple[int, RemoteReply]]:
    """Ask for replies in threads, and yield them as they come."""
    results: queue.Queue[tuple[int, RemoteReply | BaseException] | None] = queue.Queue()
    taking, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with taking:
                number = next(missing, None)
            if number is None:
                break
            try:
                results.put((number, _reply(teacher, talks[number], settings_of(number))))
            except BaseException as error:
                results.put((number, error))
        results.put(None)

    # They end with the process: a reply that nobody waits for any more holds nobody up.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    working = at_once
    try:
        while working:
            result = results.get()
            if result is None:
                working -= 1
                continue
            number, reply = result
            if isinstance(reply, TextError):
                raise TextError(f"prompt {number + 1}: {reply}") from reply
            if isinstance(reply, BaseException):
                raise reply
            yield number, reply
    finally:
        stopped.set()


def _recorded(record: Path, prompts: int) -> dict[int, RemoteReply]:
    """Replies that were written down whole; a line that was cut off is taken away."""
    if not record.is_file():
        return {}
    *lines, rest = record.read_bytes().split(b"\n")
    if rest:
        with record.open("r+b") as opened:
            opened.truncate(sum(len(line) + 1 for line in lines))
    entries = [json.loads(line) for line in lines]
    return {
        entry["number"]: RemoteReply(entry["text"], entry["finished"])
        for entry in entries
        if entry["number"] < prompts
    }


def _reply(teacher: ChatServer, talk: Conversation, settings: Mapping[str, Any]) -> RemoteReply:
    answer, place = teacher.complete(talk, settings), teacher.place
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        finished = choice["finish_reason"] == "stop"
    except (KeyError, IndexError, TypeError):
        text, finished = None, False
    if not isinstance(text, str):
        raise SettingsError(f"{place} answers with no reply; is it a server of chat completions?")
    return RemoteReply(text, finished)
