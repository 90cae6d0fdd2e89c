"""A server of chat completions that answers as a test tells it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import pytest

Answer = tuple[int, dict[str, str], Any]
Script = Callable[[dict[str, Any], int], Answer]
BIG: Answer = (200, {}, {"data": [{"id": "big"}]})


class Scripted:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self, answer: Script, models: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        at_once, lock = 0, threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, status: int, headers: dict[str, str], value: Any) -> None:
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.reply(*models)

            def do_POST(self) -> None:
                nonlocal at_once
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    at_once += 1
                    script.most_at_once = max(script.most_at_once, at_once)
                    script.bodies.append(body)
                    script.keys.append(self.headers["Authorization"])
                    number = len(script.bodies)
                self.reply(*answer(body, number))
                with lock:
                    at_once -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Start(Protocol):
    """Starts a server."""

    def __call__(self, answer: Script, models: Answer = BIG) -> Scripted:
        """Answer requests by their body and number, and the question for models as given."""


@pytest.fixture
def scripted() -> Iterator[Start]:
    """Starts servers, which end with the test."""
    servers: list[Scripted] = []

    def start(answer: Script, models: Answer = BIG) -> Scripted:
        servers.append(Scripted(answer, models))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
