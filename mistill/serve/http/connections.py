"""Connections with deadlines, on uvicorn's protocol for h11.

uvicorn waits for ever for a request to arrive. Here a connection is closed that does not bring its
headers or its body in time, or rests for long between two requests; of more connections than the
bound, the one that has rested longest makes room.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mistill.serve.http.exchange import SEND_PART, Receive, Scope, Send
from mistill.serve.refusals import RefusalError
from mistill.serve.settings import Limits


def protocol_class(limits: Limits) -> type[H11Protocol]:
    """The protocol of connections with bounds.

    Args:
        limits: The bounds.

    Returns:
        A class for uvicorn's setting ``http``.
    """

    class Bounded(BoundedProtocol):
        bounds = limits

    return Bounded


class BoundedProtocol(H11Protocol):
    """A connection with deadlines.

    Attributes:
        bounds: The bounds.
    """

    bounds = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count the time, and make room if there are too many."""
        self._deadline: asyncio.TimerHandle | None = None
        self._phase = ""
        self.rests_since = self.loop.time()
        self.access_log = False  # it would hold the addresses that clients ask for
        self._gathering = GatheringTransport(transport, self.loop)
        self._whole_app = self.app
        self.app = self._run
        super().connection_made(self._gathering)  # type: ignore[arg-type]
        if len(self.connections) > self.bounds.connections:
            resting = [
                one
                for one in self.connections
                if isinstance(one, BoundedProtocol)
                and one is not self
                and one.is_resting
                and not one.transport.is_closing()
            ]
            oldest = min(resting, key=lambda one: one.rests_since, default=self)
            oldest.transport.abort()
        self._watch("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count no longer."""
        self._stop_watching()
        super().connection_lost(exc)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, which may send parts of an answer by ``send_part``."""
        scope["extensions"] = {SEND_PART: self.send_part}
        await self._whole_app(scope, receive, send)

    def send_part(self, content: bytes) -> bool:
        """Send a part of an answer in chunks at once, if nothing is in its way.

        That is what uvicorn and h11 would write for ``http.response.body``, in a tenth of
        the calls: a stream sends a part every few milliseconds, beside a model that computes.

        Args:
            content: The part, not empty. The head of the answer was sent before, to a client that
                reads chunks, and has no Content-Length.

        Returns:
            False if nothing was sent, because the client has left or does not read on.
        """
        cycle, flow = self.cycle, self.flow
        if cycle is None or flow is None or cycle.disconnected or flow.write_paused:
            return False
        self._gathering.send(b"%x\r\n%b\r\n" % (len(content), content))
        return True

    @property
    def is_resting(self) -> bool:
        """Whether no request is being answered."""
        idle = self.cycle is None or self.cycle.response_complete
        return bool(idle) and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the deadline is that of the request, not of the last byte."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.is_resting:
            self._watch("headers")
        elif self.conn.their_state is h11.SEND_BODY:
            self._watch("body")
        else:
            self._stop_watching()

    def on_response_complete(self) -> None:
        """Wait for the next request, for a while."""
        self.rests_since = self.loop.time()
        self._stop_watching()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, in JSON as every refusal, and close."""
        refusal = RefusalError(400, "this is no request of HTTP/1.1 that the server reads")
        content = refusal.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        try:
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # an answer is on its way already
        self.transport.close()

    def _watch(self, phase: str) -> None:
        if self._phase == phase:
            return
        self._stop_watching()
        self._phase = phase
        seconds = self.bounds.header_seconds if phase == "headers" else self.bounds.body_seconds
        self._deadline = self.loop.call_later(seconds, self._expire)

    def _stop_watching(self) -> None:
        self._phase = ""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


class GatheringTransport:
    """A transport that sends at once what was written to it before the loop goes on.

    uvicorn writes the head of an answer, each part of its body and its end by themselves. Whoever
    reads wakes at each, and on two processors takes the place of whoever writes the rest.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        """Stand before a transport.

        Args:
            transport: The transport.
            loop: Its loop.
        """
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send bytes soon.

        Args:
            data: The bytes.
        """
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def send(self, data: bytes) -> None:
        """Send bytes now, after those that were to be sent soon.

        Args:
            data: The bytes.
        """
        self._parts.append(data)
        self._flush()

    def close(self) -> None:
        """Send what was written, and close."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """All else is the transport's."""
        return getattr(self._transport, name)

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """Settings for uvicorn that keep it to what is needed.

    Args:
        limits: Bounds.

    Returns:
        Keywords for ``uvicorn.Config``.
    """
    return {
        "http": protocol_class(limits),
        "ws": "none",
        "lifespan": "off",
        "interface": "asgi3",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "h11_max_incomplete_event_size": limits.header_bytes,
        "timeout_keep_alive": limits.idle_seconds,
        "backlog": 128,
    }
