"""A teacher behind a server that speaks OpenAI's chat completions: vLLM, TGI, llama-server, ours.

Many requests are under way at once. One that fails for want of room, time or a connection is sent
again after a while, and each reply is written down as it comes, so that an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mistill.errors import FolderError, SettingsError, TextError
from mistill.folders.json_text import parse_json, small_file
from mistill.progress import track
from mistill.shown import visible
from mistill.text.conversation import Conversation

_log = logging.getLogger("distill.conversations")

_SECONDS = 600.0
_TRIES = 8
_LONGEST_WAIT = 60.0
_MOST_BYTES = 1 << 26
# Sampling that not every server knows; without it some fall back on defaults of their own.
_OUR_OWN = ("top_k", "min_p")


class RemoteReply(NamedTuple):
    """What a teacher behind a server said.

    Attributes:
        text: The reply.
        finished: Whether the teacher ended its turn itself.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class RemoteTeacher:
    """A model of a server.

    Attributes:
        url: Address of the server, with or without /v1.
        model: What the server calls it.
        key: API key; None sends none.
    """

    url: str
    model: str
    key: str | None = None

    def check(self) -> None:
        """Ask the server whether it has the model.

        Raises:
            SettingsError: If the address is none, nobody answers, or it has other models.
        """
        status, answer = self._ask("GET", "/models", None)
        if status != 200:
            raise SettingsError(f"{self._place} refuses to list its models: {_reason(answer)}")
        entries = answer.get("data") if isinstance(answer, dict) else None
        names = [
            str(entry["id"])
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and "id" in entry
        ]
        if names and self.model not in names:
            shown = visible(", ".join(names[:5]))[:300]
            raise SettingsError(f"{self._place} has no model {self.model}; it has {shown}")

    def reply(self, talk: Conversation, settings: Mapping[str, Any]) -> RemoteReply:
        """Let it answer a conversation.

        Args:
            talk: Turns up to the answer.
            settings: Fields of the request besides the conversation.

        Returns:
            The reply.

        Raises:
            TextError: If the server refuses the conversation.
            SettingsError: If it does not answer, however often it is asked.
        """
        body = {"model": self.model, **_conversation(talk), **settings}
        wait = 1.0
        for attempt in range(1, _TRIES + 1):
            reason, asked_to_wait = "", None
            try:
                status, answer = self._ask("POST", "/chat/completions", body)
            except SettingsError as error:
                status, answer, reason = 0, None, str(error)
            if status == 200:
                return _reply_of(answer, self._place)
            reason = reason or f"{self._place}: {_reason(answer)}"
            if status in (400, 422) and any(name in body for name in _OUR_OWN):
                named = [name for name in _OUR_OWN if name in reason]
                if named:
                    _log.warning("%s takes no %s; it is left out", self._place, " or ".join(named))
                    body = {name: value for name, value in body.items() if name not in _OUR_OWN}
                    continue
            if 400 <= status < 500 and status not in (408, 409, 425, 429):
                raise TextError(reason)
            if attempt == _TRIES:
                break
            if isinstance(answer, dict):
                asked_to_wait = answer.get("retry_after")
            _wait(min(_LONGEST_WAIT, asked_to_wait or wait))
            wait *= 2
        raise SettingsError(f"{reason}; asked {_TRIES} times, the same command goes on from here")

    @property
    def _place(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer; of one that is none, a part of its text."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        options: dict[str, Any] = {"timeout": _SECONDS}
        if parts.scheme == "https":
            options["context"] = ssl.create_default_context()
        headers = {"Accept": "application/json"}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        base = parts.path.rstrip("/") or "/v1"
        connection = kind(parts.hostname or "", parts.port, **options)
        try:
            connection.request(method, base + path, content, headers)
            response = connection.getresponse()
            text = response.read(_MOST_BYTES)
            wait = response.getheader("Retry-After") or ""
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(f"{self._place} does not answer: {reason}") from error
        finally:
            connection.close()
        try:
            answer = parse_json(text, "the answer", SettingsError)
        except SettingsError:
            answer = {"error": text[:200].decode("utf-8", "replace")}
        if isinstance(answer, dict) and wait.isdecimal():
            answer["retry_after"] = float(wait)
        return response.status, answer


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def remote_teacher(url: str, model: str, key_file: Path | None) -> RemoteTeacher:
    """A model of a server, if the server has it.

    Args:
        url: Address of the server.
        model: What the server calls it.
        key_file: A file with the API key; None sends none.

    Returns:
        The model.

    Raises:
        SettingsError: If the address is none, nobody answers, or the server has other models.
        FolderError: If the file cannot be read.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        sound = sound and not parts.query and not parts.fragment and parts.username is None
    except ValueError:
        sound = False
    if not sound:
        raise SettingsError(
            f"server must be an address such as http://127.0.0.1:8080/v1, not {url!r:.80}"
        )
    key = None
    if key_file is not None:
        try:
            key = small_file(key_file.expanduser()).decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise FolderError(f"{key_file} should hold an API key, and is no text") from error
        if not key or any(letter.isspace() or not letter.isprintable() for letter in key):
            raise FolderError(f"{key_file} should hold one API key and nothing else")
    teacher = RemoteTeacher(url, model, key)
    teacher.check()
    return teacher


def remote_replies(
    teacher: RemoteTeacher,
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
    teacher: RemoteTeacher,
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
                results.put((number, teacher.reply(talks[number], settings_of(number))))
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


def _conversation(talk: Conversation) -> dict[str, Any]:
    """A conversation as OpenAI's servers take it."""
    beside = {
        "tools": talk.tools,
        "documents": talk.documents,
        "chat_template_kwargs": talk.variables,
    }
    fields = {name: value for name, value in beside.items() if value}
    return {"messages": [_message(message) for message in talk.messages], **fields}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = []
    for call in calls:
        function = dict(call.get("function") or {})
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {})
        written.append({"type": "function", **call, "function": function})
    return {**message, "tool_calls": written}


def _reply_of(answer: Any, place: str) -> RemoteReply:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        finished = choice["finish_reason"] == "stop"
    except (KeyError, IndexError, TypeError):
        text, finished = None, False
    if not isinstance(text, str):
        raise SettingsError(f"{place} answers with no reply; is it a server of chat completions?")
    return RemoteReply(text, finished)


def _reason(answer: Any) -> str:
    """What a server says went wrong, in one line."""
    error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return visible(" ".join(str(message).split()))[:300] or "no reason given"
