"""uvicorn, told when to stop and how: replies may end, then streams get an error event.

The first SIGTERM or Ctrl-C lets replies go on for a while and takes no new ones; the second ends
them now. An engine that crashed ends the server too, so that whoever watches it starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from mistill.serve.app import App
from mistill.serve.http.connections import uvicorn_options
from mistill.serve.streaming import log_bug

_log = logging.getLogger("mistill.serve")
# Seconds in which a crashed engine shows, and in which clients are told of it.
_LOOK_SECONDS = 1.0
_TELL_SECONDS = 3.0
_NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def run_server(
    app: App, listening: socket.socket, started: Callable[[Server], None] | None = None
) -> int:
    """Serve until told to stop.

    Args:
        app: The server's application.
        listening: A socket that listens.
        started: Called once it runs, in its thread.

    Returns:
        0 after it was told to stop, 1 if the engine crashed.
    """
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = Server(app)
    asyncio.run(server.run_on(listening, started))
    return server.code


class Server(uvicorn.Server):
    """uvicorn with our own way to stop, and without a clock that ticks while nothing happens.

    Attributes:
        code: Exit code of the process.
        address: Address of the page, and with ``/v1`` that for clients; once it runs.
        model: What clients call the model.
        has_page: Whether there is a page to chat in.
    """

    code: int
    address: str
    model: str
    has_page: bool

    def __init__(self, app: App) -> None:
        """Make a server.

        Args:
            app: Its application.
        """
        limits = app.served.limits
        super().__init__(
            uvicorn.Config(app, timeout_graceful_shutdown=3, **uvicorn_options(limits))
        )
        self.code = 0
        self.address = ""
        self.model = app.served.name
        self.has_page = ("GET", "/") in app.routes
        self._app = app
        self._limits = limits
        self._exit = asyncio.Event()
        self._stop: asyncio.Task[None] | None = None

    async def run_on(
        self, listening: socket.socket, started: Callable[[Server], None] | None
    ) -> None:
        """Serve on a socket until told to stop.

        Args:
            listening: A socket that listens.
            started: Called once it runs.
        """
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_unexpected)
        watch = self._loop.create_task(self._watch_engine())
        self._started = started
        try:
            await self.serve(sockets=[listening])
        finally:
            watch.cancel()

    async def main_loop(self) -> None:
        """Wait for the end."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        # All addresses of this machine; this is the one whose name is answered in any case.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if self._started is not None:
            self._started(self)
        await self._exit.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at signals, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        for number in _NUMBERS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, drain_seconds: float | None = None) -> None:
        """Stop, from any thread.

        Args:
            drain_seconds: How long replies may go on; None for as long as the limits say.
        """
        seconds = self._limits.drain_seconds if drain_seconds is None else drain_seconds
        self._loop.call_soon_threadsafe(self._begin_stop, seconds)

    def _on_signal(self, number: int, _: object) -> None:
        self._loop.call_soon_threadsafe(
            self._begin_stop, 0.0 if self._app.stopping else self._limits.drain_seconds
        )

    def _begin_stop(self, drain_seconds: float) -> None:
        if self._stop is not None and drain_seconds > 0:
            return
        if self._stop is not None:
            self._stop.cancel()
            self.force_exit = True
        self._app.stopping = True
        self._stop = self._loop.create_task(self._drain(drain_seconds))

    async def _drain(self, seconds: float) -> None:
        """Let replies end for a while, then end them."""
        scheduler = self._app.served.scheduler
        try:
            # In a thread, because it waits; what is cancelled here goes on there and does no harm.
            await asyncio.to_thread(scheduler.close, seconds)
        finally:
            self._exit.set()

    async def _watch_engine(self) -> None:
        while self._app.served.scheduler.health().state != "crashed":
            await asyncio.sleep(_LOOK_SECONDS)
        _log.error("the engine crashed; the server ends")
        self.code = 1
        self._app.stopping = True
        await asyncio.sleep(_TELL_SECONDS)
        self._exit.set()


def _unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    error = context.get("exception")
    if isinstance(error, BaseException):
        log_bug(error)
