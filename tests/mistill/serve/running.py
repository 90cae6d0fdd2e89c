"""A server in a thread of the test's process."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from mistill.serve.http.server import Server
from mistill.serve.running import serve
from mistill.serve.settings import Limits

LONG = 60
"""Seconds within which anything here ends, on the slowest machine."""


@dataclass
class Answer:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        (name,) = self.json
        assert name == "error"
        error: dict[str, Any] = self.json["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        return error

    @property
    def text(self) -> str:
        text: str = self.json["choices"][0]["message"]["content"]
        return text

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the last one, which must be [DONE]."""
        lines = [line for line in self.content.decode().split("\n\n") if line]
        events = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@dataclass
class RunningServer:
    """A server that runs."""

    server: Server
    port: int
    codes: list[int]

    @property
    def app(self) -> Any:
        return self.server.config.app

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def raw(self, request: bytes) -> bytes:
        """All that the server sends for bytes, until it closes."""
        with self.connect() as connection:
            connection.sendall(request)
            return rest_of(connection)

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"} if content is not None else {}
            connection.request(
                method or ("GET" if body is None else "POST"),
                path,
                content,
                {**sent, **(headers or {})},
            )
            response = connection.getresponse()
            return Answer(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def chat(self, text: str = "Hello", **fields: Any) -> Answer:
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
        return self.ask("/v1/chat/completions", body)

    @contextmanager
    def streaming(self, text: str = "Hello", **fields: Any) -> Iterator[HTTPResponse]:
        """A chat that streams, whose events are read line by line."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        body = {"messages": [{"role": "user", "content": text}], "stream": True, **fields}
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        try:
            yield response
        finally:
            response.close()
            connection.close()

    def health(self) -> Any:
        return self.app.served.scheduler.health()


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    content = b""
    while True:
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            return content
        if not part:
            return content
        content += part


def until(condition: Callable[[], object], seconds: float = LONG) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def with_template(chatbot: Path, folder: Path, template: str) -> Path:
    """A copy of a chatbot with another chat template."""
    shutil.copytree(chatbot, folder)
    (folder / "chat_template.jinja").write_text(template)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["files"]["chat_template.jinja"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@contextmanager
def running(
    folder: Path, *, limits: Limits | None = None, **options: Any
) -> Iterator[RunningServer]:
    """A server of a folder, on a free port."""
    there = threading.Event()
    servers: list[Server] = []
    codes: list[int] = []

    def started(server: Server) -> None:
        servers.append(server)
        there.set()

    def run() -> None:
        try:
            codes.append(
                serve(
                    folder,
                    limits=limits or Limits(),
                    started=started,
                    **{"port": 0, "threads": 1, **options},
                )
            )
        finally:
            there.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert there.wait(LONG)
    assert servers, "the server did not start"
    (server,) = servers
    try:
        yield RunningServer(server, int(server.address.rpartition(":")[2]), codes)
    finally:
        if thread.is_alive():
            server.stop(0)
        thread.join(LONG)
        assert not thread.is_alive()
