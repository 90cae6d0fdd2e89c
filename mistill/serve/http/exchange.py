"""One request over HTTP and its answer, on ASGI's bare terms.

Every answer, errors too, passes through here, so that none lacks the headers that keep a browser
from doing with it what it should not.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from mistill.serve.refusals import RefusalError
from mistill.serve.settings import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SEND_PART = "mistill.send_part"
"""The extension of ASGI by which a connection sends a part of a stream at once."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SAFETY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
# How much more than its bound is read of a body, so that the client hears the answer.
_READ_ON = 8


class ClientGoneError(Exception):
    """The client has closed the connection; nobody reads an answer."""


class Exchange:
    """A request and its answer.

    Attributes:
        method: Such as GET.
        path: Without the query, percent signs resolved.
        request_id: The client's X-Request-Id if it is a plain word, else one made here.
        owner: Stands for the API key that it came with; empty where none is needed.
        status: Of the answer; 0 before it begins.
        route: The route that it was matched to, for the log.
        facts: What the log says of it besides: numbers and words of our own.
        more_headers: Headers of the answer that the guard adds.
        body_read: Whether the body was read to its end.
    """

    method: str
    path: str
    request_id: str
    owner: str
    status: int
    route: str
    facts: dict[str, Any]
    more_headers: dict[str, str]
    body_read: bool

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        """Take a request.

        Args:
            scope: ASGI's, of the type http.
            receive: ASGI's.
            send: ASGI's.
            limits: Bounds on its body and on how long a reply may lie unread.
        """
        self.method = scope["method"]
        self.path = scope["path"]
        self.version = scope["http_version"]
        self.target_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        self.headers: dict[bytes, list[bytes]] = {}
        self.header_count = len(scope["headers"])
        for name, value in scope["headers"]:
            self.headers.setdefault(name, []).append(value)
        given = self.header(b"x-request-id")
        self.request_id = (
            given.decode("ascii")
            if given is not None and _REQUEST_ID.fullmatch(given)
            else secrets.token_hex(12)
        )
        self.owner = ""
        self.status = 0
        self.route = "-"
        self.facts = {}
        self.more_headers = {}
        self.body_read = False
        self.began = time.monotonic()
        self._receive = receive
        self._send = send
        # To a client of HTTP/1.0 an answer is not sent in chunks.
        extensions = scope.get("extensions") or {} if self.version == "1.1" else {}
        self._send_at_once: Callable[[bytes], bool] = extensions.get(SEND_PART, _not_sent)
        self._limits = limits

    def header(self, name: bytes) -> bytes | None:
        """A header that a client may send once.

        Args:
            name: In lower case.

        Returns:
            Its value; None where it is not sent.

        Raises:
            RefusalError: If it is sent more than once.
        """
        values = self.headers.get(name, [])
        if len(values) > 1:
            raise RefusalError(400, f"the header {name.decode()} should be sent once")
        return values[0] if values else None

    async def body(self) -> bytes:
        """Read the body.

        Returns:
            Its bytes.

        Raises:
            RefusalError: If it is larger than the bound; the connection ends with the answer.
            ClientGoneError: If it does not come to its end.
        """
        length = self.header(b"content-length")
        most = self._limits.body_bytes
        refused = length is not None and (not length.isdigit() or int(length[:18]) > most)
        expects = self.header(b"expect") is not None
        content, size = bytearray(), 0
        while not (refused and (expects or size > most * _READ_ON)):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            refused = refused or size > most
            if not refused:
                content += part
            if not message.get("more_body", False):
                self.body_read = True
                break
        if refused:
            raise RefusalError(
                413,
                f"the body has more than {most} bytes; send a shorter conversation",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return bytes(content)

    async def discard_body(self) -> None:
        """Read what is left of a body that nobody wants, so that the client hears the answer.

        A connection that is closed while bytes arrive is reset, and with it goes the answer. A body
        over the bound is not read to its end.

        Raises:
            ClientGoneError: If the client leaves meanwhile.
        """
        size = 0
        waits = b"expect" in self.headers
        while not self.body_read and not waits and size <= self._limits.body_bytes:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            size += len(message.get("body", b""))
            self.body_read = not message.get("more_body", False)

    async def until_gone(self) -> None:
        """Wait until the client closes the connection; only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self,
        status: int,
        content: bytes,
        content_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole answer.

        Args:
            status: Status of HTTP.
            content: The body.
            content_type: Its type.
            headers: More headers.
        """
        await self._start(
            status,
            {"Content-Type": content_type, "Content-Length": str(len(content)), **(headers or {})},
        )
        await self._send_part(content, more=False)

    async def answer_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole answer in JSON, with the status 200.

        Args:
            value: What msgspec writes as JSON.
            headers: More headers.
        """
        await self.answer(200, msgspec.json.encode(value), "application/json", headers)

    async def refuse(self, refusal: RefusalError) -> None:
        """Send an error.

        Args:
            refusal: The error.
        """
        await self.answer(refusal.status, refusal.body(), "application/json", refusal.headers)

    async def begin_stream(self, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream of server-sent events.

        Args:
            headers: More headers.
        """
        await self._start(
            200,
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "X-Accel-Buffering": "no",
                **(headers or {}),
            },
        )

    async def stream(self, content: bytes) -> None:
        """Send a part of a stream.

        Args:
            content: Whole events.

        Raises:
            ClientGoneError: If the client does not read on.
        """
        if content and not self._send_at_once(content):
            await self._send_part(content, more=True)

    async def end_stream(self, content: bytes = b"") -> None:
        """End a stream.

        Args:
            content: Its last events.

        Raises:
            ClientGoneError: If the client does not read on.
        """
        await self._send_part(content, more=False)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        everything = {
            "Cache-Control": "no-store",
            **SAFETY_HEADERS,
            "X-Request-Id": self.request_id,
            **self.more_headers,
            **headers,
        }
        pairs = [
            (name.lower().encode(), text.encode("latin-1")) for name, text in everything.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _send_part(self, content: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": content, "more_body": more}
        try:
            async with asyncio.timeout(self._limits.stalled_seconds):
                await self._send(message)
        except TimeoutError:
            raise ClientGoneError from None


def _not_sent(content: bytes) -> bool:
    """Where a connection cannot send a part at once."""
    return False
