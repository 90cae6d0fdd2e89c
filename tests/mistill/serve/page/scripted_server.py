"""A server that answers as a test tells it to: slowly, in pieces, with errors, with a key.

The true server cannot be made to stop in the middle of a word or to write what an attacker wants.
It serves the page's files under the headers that the true server sends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mistill
from mistill.serve.http.exchange import SAFETY_HEADERS
from mistill.serve.http.page_files import PageFile, page_files

PAGE = Path(mistill.__file__).parent / "serve" / "page"
PATIENCE = 60.0


@dataclass
class Script:
    """What the server does next.

    Attributes:
        pieces: The texts of an answer, one event each.
        status: Status of the next answers; other than 200, ``error`` is their body.
        error: Body of an error.
        headers: More headers of an error.
        ending: The finish reason; None ends the stream without one.
        event: An error event that is sent in the place of an ending.
        gate: An answer waits for it before its last piece.
        key: The key that requests must bring; empty for none.
        model: Name of the model.
        bodies: Bodies of the chat requests that came.
        keys: What the requests for models and answers brought as Authorization.
        left: Set when a client left in the middle of an answer.
        files: What is served beside, by address: the page's files.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    status: int = 200
    error: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    ending: str | None = "stop"
    event: Any = None
    gate: threading.Event = field(default_factory=threading.Event)
    key: str = ""
    model: str = "chatbot"
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    files: dict[str, PageFile] = field(default_factory=page_files)

    def __post_init__(self) -> None:
        self.gate.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, format: str, *values: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**SAFETY_HEADERS, **more}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # No connection outlives its request: a server that ends is gone at once.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status: int, value: Any, more: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", more or {})

    def do_GET(self) -> None:
        file = self.script.files.get(self.path)
        if file is not None:
            self._send(200, file.content, file.content_type, {})
        elif self.path == "/health":
            self._json(200, {"status": "ok"})
        elif self.path == "/v1/models":
            if self._may():
                model = {"id": self.script.model, "object": "model", "max_model_len": 2048}
                self._json(200, {"object": "list", "data": [model]})
        else:
            self._json(404, {"error": {"message": "no such path", "code": None}})

    def _may(self) -> bool:
        self.script.keys.append(self.headers["Authorization"])
        if self.script.key and self.headers["Authorization"] != f"Bearer {self.script.key}":
            self._json(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
            return False
        return True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        script = self.script
        script.bodies.append(body)
        if script.status != 200:
            self._json(script.status, script.error, script.headers)
            return
        self.send_response(200)
        for name, value in SAFETY_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self._stream(script)
        except OSError:
            script.left.set()
        self.close_connection = True

    def _event(self, value: Any) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _chunk(self, delta: Any, reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        self._event({"object": "chat.completion.chunk", "choices": [choice], "usage": None})

    def _stream(self, script: Script) -> None:
        self._chunk({"role": "assistant", "content": ""})
        for number, piece in enumerate(script.pieces):
            if number == len(script.pieces) - 1:
                # A client that left is noticed only by writing to it.
                for _ in range(int(PATIENCE / 0.02)):
                    if script.gate.wait(0.02):
                        break
                    self.wfile.write(b": waiting\n\n")
                    self.wfile.flush()
            self._chunk({"content": piece})
        if script.event is not None:
            self._event({"error": script.event})
        elif script.ending is not None:
            self._chunk({}, script.ending)
            usage = {"prompt_tokens": 12, "completion_tokens": len(script.pieces) + 1}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a browser that closes a connection is no error


@contextmanager
def scripted_server(port: int = 0) -> Iterator[tuple[str, Script]]:
    """Serve the page on a port of this machine: its address, and what the server does next."""
    script = Script()
    handler = type("Handler", (_Handler,), {"script": script})
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", script
    finally:
        script.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
