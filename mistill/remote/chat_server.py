"""A server that speaks OpenAI's chat completions: vLLM, TGI, llama-server, ours.

A request that fails for want of room, time or a connection is sent again after a while. Nothing is
sent anywhere but to the address that the user has named.
"""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mistill.errors import FolderError, SettingsError, TextError
from mistill.folders.json_text import parse_json, small_file
from mistill.shown import visible
from mistill.text.conversation import Conversation

_log = logging.getLogger(__name__)

# Seconds until a connection stands, and until an answer is there.
_CONNECTING, _SECONDS = 5.0, 600.0
_TRIES = 8
_LONGEST_WAIT = 60.0
_MOST_BYTES = 1 << 26
# Sampling that not every server knows; without it some fall back on defaults of their own.
_OUR_OWN = ("top_k", "min_p")


@dataclass(frozen=True)
class ChatServer:
    """A model of a server.

    Attributes:
        url: Address of the server, with or without /v1.
        model: What the server calls it.
        key: API key; None sends none.
    """

    url: str
    model: str
    key: str | None = None

    @property
    def place(self) -> str:
        """The server's address without path, user or key."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def models(self) -> list[str]:
        """Ask the server which models it has.

        Returns:
            Their names; none where it does not say.

        Raises:
            SettingsError: If nobody answers, or it refuses to.
        """
        status, answer = self._ask("GET", "/models", None)
        if status != 200:
            raise SettingsError(f"{self.place} refuses to list its models: {_reason(answer)}")
        entries = answer.get("data") if isinstance(answer, dict) else None
        return [
            str(entry["id"])
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and "id" in entry
        ]

    def check(self) -> None:
        """Ask the server whether it has the model.

        Raises:
            SettingsError: If the address is none, nobody answers, or it has other models.
        """
        names = self.models()
        if names and self.model not in names:
            raise SettingsError(
                f"{self.place} has no model {self.model}; it has {shown_names(names)}"
            )

    def complete(self, talk: Conversation, settings: Mapping[str, Any]) -> Any:
        """Let it answer a conversation.

        Args:
            talk: Turns up to the answer.
            settings: Fields of the request besides the conversation.

        Returns:
            The answer of the server, from JSON.

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
                return answer
            reason = reason or f"{self.place}: {_reason(answer)}"
            if status in (400, 422) and any(name in body for name in _OUR_OWN):
                named = [name for name in _OUR_OWN if name in reason]
                if named:
                    _log.warning("%s takes no %s; it is left out", self.place, " or ".join(named))
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

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer; of one that is none, a part of its text."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        options: dict[str, Any] = {"timeout": _CONNECTING}
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
            connection.connect()
            connection.sock.settimeout(_SECONDS)
            connection.request(method, base + path, content, headers)
            response = connection.getresponse()
            text = response.read(_MOST_BYTES)
            wait = response.getheader("Retry-After") or ""
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(f"{self.place} does not answer: {reason}") from error
        finally:
            connection.close()
        try:
            answer = parse_json(text, "the answer", SettingsError)
        except SettingsError:
            answer = {"error": text[:200].decode("utf-8", "replace")}
        if isinstance(answer, dict):
            answer["retry_after"] = float(wait) if wait.isdecimal() else None
        return response.status, answer


def shown_names(names: Sequence[str]) -> str:
    """The first of some names, fit for a message."""
    return visible(", ".join(names[:5]))[:300]


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def open_chat_server(url: str, model: str | None, key_file: Path | None) -> ChatServer:
    """A model of a server, if the server has it.

    Args:
        url: Address of the server.
        model: What the server calls it; None for the only one that it has.
        key_file: A file with the API key; None sends none.

    Returns:
        The model.

    Raises:
        SettingsError: If the address is none, nobody answers, the server has other models, or
            several and none is named.
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
    key = None if key_file is None else _key_in(key_file)
    if model is not None:
        server = ChatServer(url, model, key)
        server.check()
        return server
    server = ChatServer(url, "", key)
    names = server.models()
    if len(names) != 1:
        has = f"has {shown_names(names)}" if names else "does not say which models it has"
        raise SettingsError(f"{server.place} {has}; name the one to ask")
    return ChatServer(url, names[0], key)


def _key_in(file: Path) -> str:
    try:
        key = small_file(file.expanduser()).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise FolderError(f"{file} should hold an API key, and is no text") from error
    if not key or any(letter.isspace() or not letter.isprintable() for letter in key):
        raise FolderError(f"{file} should hold one API key and nothing else")
    return key


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


def _reason(answer: Any) -> str:
    """What a server says went wrong, in one line."""
    error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    words = "" if message is None else " ".join(str(message).split())
    return visible(words)[:300] or "no reason given"
