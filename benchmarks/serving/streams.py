"""One streamed reply of a server that speaks as OpenAI's does, timed as it comes.

The client shares the processors with the server that it measures, so that it does little: it reads
what has come and notes the time, and looks into it once the reply is whole.
"""

from __future__ import annotations

import http.client
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from urllib.parse import urlsplit

from mistill.errors import ServerError
from mistill.settings import require

TIMEOUT_SECONDS = 600.0
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StreamTimes:
    """A reply as it came.

    Attributes:
        began: When it was asked for, as ``time.perf_counter`` tells.
        first_token_seconds: From the request to the first event with text.
        gap_seconds: Times between one event with text and the next. A server may send several
            tokens in one.
        seconds: From the request to the end.
        prompt_tokens: Tokens of the prompt, as the server counts them; 0 if it does not.
        cached_tokens: Those that the server did not read again; 0 if it does not tell.
        new_tokens: Tokens of the reply, as the server counts them; else the number of events.
        text: The reply.
    """

    began: float
    first_token_seconds: float
    gap_seconds: tuple[float, ...]
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    text: str

    @property
    def events(self) -> int:
        """Events with text."""
        return len(self.gap_seconds) + 1

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first one by the time from it to the last; None where there is none."""
        seconds = sum(self.gap_seconds)
        return (self.new_tokens - 1) / seconds if seconds else None


class Server:
    """Where a server is, and how it is talked to.

    Attributes:
        url: Its address up to the version, such as http://127.0.0.1:8080/v1.
        model: The name of its model.
    """

    url: str
    model: str

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None) -> None:
        """Take an address.

        Args:
            url: Its address, with ``/v1`` or without.
            model: The name of its model; None asks it for the first one.
            key: The key that it wants.

        Raises:
            SettingsError: If the address is none.
            ServerError: If it does not answer.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"the server must be an address such as http://127.0.0.1:8080, not {url!r:.80}",
        )
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self.model = model or self._first_model()

    def reply(
        self, messages: list[dict[str, str]], *, max_tokens: int, **options: Any
    ) -> StreamTimes:
        """Ask for a reply, and time it.

        Args:
            messages: The conversation.
            max_tokens: Most tokens of the reply.
            **options: More fields of the request.

        Returns:
            The reply as it came.

        Raises:
            ServerError: If it is not streamed to its end.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        started = time.perf_counter()
        connection = self._connection()
        try:
            response = self._ask(connection, "POST", "/chat/completions", body)
            pieces = _pieces(response)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url} broke off: {error}") from error
        finally:
            connection.close()
        try:
            lines = _lines(pieces, chunked=bool(response.chunked))
        except ValueError as error:
            raise ServerError(f"{self.url} sends chunks without a size: {error}") from error
        return _times(started, lines, self.url)

    def leave(self, messages: list[dict[str, str]], *, pieces: int, **options: Any) -> None:
        """Ask for a reply, and leave before its end.

        Args:
            messages: The conversation.
            pieces: Events to wait for before.
            **options: More fields of the request.

        Raises:
            ServerError: If the server does not begin to answer.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **options}
        connection = self._connection()
        try:
            response = self._ask(connection, "POST", "/chat/completions", body)
            while pieces and (line := response.readline()):
                pieces -= line.startswith(b"data:")
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url} broke off: {error}") from error
        finally:
            connection.close()

    def _first_model(self) -> str:
        connection = self._connection()
        try:
            entries = json.loads(self._ask(connection, "GET", "/models").read())["data"]
            return str(entries[0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"{self.url}/models does not name a model ({error!r:.200}); give the address of a "
                "server that speaks as OpenAI's does, or its model's name"
            ) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT_SECONDS)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        route: str,
        body: Mapping[str, Any] | None = None,
    ) -> http.client.HTTPResponse:
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, self._path + route, content, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            answer = response.read(500).decode("utf-8", "replace")
            raise ServerError(f"{self.url}{route} answered {response.status}: {answer}")
        return response


def _pieces(response: http.client.HTTPResponse) -> list[tuple[float, bytes]]:
    """The body of an answer as it comes, chunk sizes and all; each piece with its time.

    To take lines out of chunks costs http.client a tenth of a millisecond each, which a server
    that sends every token by itself would be blamed for.
    """
    read = response.fp.read1 if response.chunked else response.read1
    pieces: list[tuple[float, bytes]] = []
    end = b"\r\n"  # of the head
    while not (response.chunked and end == _LAST_CHUNK) and (piece := read(_MOST_BYTES)):
        pieces.append((time.perf_counter(), piece))
        end = (end + piece[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]
    return pieces


def _lines(pieces: list[tuple[float, bytes]], *, chunked: bool) -> list[tuple[float, bytes]]:
    """The lines of a stream that are events, each with the time at which its end came."""
    ends = list(accumulate(len(piece) for _, piece in pieces))
    content = b"".join([piece for _, piece in pieces])
    lines: list[tuple[float, bytes]] = []
    line = bytearray()
    for start, stop in _chunks(content) if chunked else [(0, len(content))]:
        while start < stop:
            after = content.find(b"\n", start, stop) + 1 or stop
            line += content[start:after]
            start = after
            if line.endswith(b"\n"):
                if line.startswith(b"data:"):
                    lines.append((pieces[bisect_left(ends, after)][0], bytes(line)))
                line.clear()
    return lines


def _chunks(content: bytes) -> Iterator[tuple[int, int]]:
    """Where the chunks of a body begin and end (RFC 9112, section 7.1)."""
    start = 0
    while (after := content.find(b"\r\n", start)) > start:
        size = int(content[start:after].partition(b";")[0], 16)
        yield after + 2, after + 2 + size
        start = after + 2 + size + 2


def _times(started: float, lines: list[tuple[float, bytes]], url: str) -> StreamTimes:
    """What the lines of a stream say; each with the time at which it came."""
    if not lines or lines[-1][1].strip() != b"data: [DONE]":
        raise ServerError(f"a stream of {url} ended without [DONE]; the reply is not whole")
    moments: list[float] = []
    texts: list[str] = []
    ends: list[float] = []
    usage: Mapping[str, Any] = {}
    for moment, line in lines[:-1]:
        event = json.loads(line[len(b"data:") :])
        if "error" in event:
            raise ServerError(f"a stream of {url} broke off: {str(event['error'])[:300]}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            ends.append(moment)
            text = (choice.get("delta") or {}).get("content")
            if text:
                moments.append(moment)
                texts.append(text)
    # Nothing to see came of the tokens, as of one that begins a character.
    moments = moments or ends[-1:]
    if not moments:
        raise ServerError(f"a stream of {url} held no reply")
    details = usage.get("prompt_tokens_details") or {}
    return StreamTimes(
        began=started,
        first_token_seconds=moments[0] - started,
        gap_seconds=tuple(b - a for a, b in pairwise(moments)),
        seconds=lines[-1][0] - started,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        new_tokens=int(usage.get("completion_tokens") or len(moments)),
        text="".join(texts),
    )
