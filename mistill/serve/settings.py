"""How a chatbot is served, and the bounds of what a client may ask for."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mistill.engine.language_model import Provider
from mistill.engine.sampling import ChosenSampling
from mistill.settings import require, require_choice, require_range

# A name or an address as a Host header holds it, without its port.
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:-]+")
MODEL_NAME = re.compile(r"[^\s/\\\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ChosenSampling):
    """Where a chatbot is served, to whom, and how replies are sampled that do not say how.

    Attributes:
        host: Address to listen on. The address of a network needs keys, from ``api_key_file`` or
            the environment variable MISTILL_API_KEY, or ``no_key``.
        port: Port to listen on; 0 takes one that is free.
        api_key_file: A file that only its owner can read, with one API key a line. Every request
            but those for the page and for /health must bring one of them.
        no_key: Serve the address of a network without a key, to everybody who reaches it.
        allow_host: More names under which the server is reached, as a client's Host header says
            them, such as the name that a proxy passes on.
        allow_origin: Origins, such as https://chat.example.org, whose pages may call the server
            from a browser.
        model_name: Name of the model for clients; by default that of the folder.
        any_model: Answer requests that name another model, for clients that cannot be told which.
        max_new_tokens: The most tokens of a reply where the request does not say how many.
        threads: Number of threads. By default one for each processor that this process may use.
        provider: Execution provider of ONNX Runtime. The KV cache of a server stays in the
            processor's memory, and is copied at every step for another provider than cpu.
        context: Positions that a conversation may have; by default what the model was made for.
        slots: Replies that are written at once; by default as many as a quarter of the free
            memory holds, at most 16.
        queue: Requests that wait while all slots are taken; more are told to come back later.
        queue_seconds: Seconds that a request may wait.
        prefix_mib: Memory in MiB for what was read of earlier prompts and is not read again; by
            default a part of the free memory, and 0 for none.
        stream_interval_ms: Milliseconds between two events of a reply that is streamed. Tokens that
            come faster share an event, which saves time for writing; the first one comes at once,
            and so do the end, an error and a call of a tool. A prompt that joins is read in pieces
            that fit in between. 0 sends every token by itself.
        metrics: Offer /metrics in the text format of Prometheus.
        page: Offer the page to chat in at /.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key_file: Path | None = None
    no_key: bool = False
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    model_name: str | None = None
    any_model: bool = False
    max_new_tokens: int = 1024
    threads: int | None = None
    provider: Provider = "cpu"
    context: int | None = None
    slots: int | None = None
    queue: int = 32
    queue_seconds: float = 60.0
    prefix_mib: int | None = None
    stream_interval_ms: int = 25
    metrics: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        super().__post_init__()
        require_range("temperature", self.temperature, 0, 2)
        require_range("port", self.port, 0, 65_535)
        require_range("max_new_tokens", self.max_new_tokens, 1)
        require_range("context", self.context, 2)
        require_choice("provider", self.provider, get_args(Provider))
        require_range("slots", self.slots, 1, 64)
        require_range("queue", self.queue, 0, 10_000)
        require_range("queue_seconds", self.queue_seconds, 0, exclusive=True)
        require_range("prefix_mib", self.prefix_mib, 0)
        require_range("stream_interval_ms", self.stream_interval_ms, 0, 1000)
        require(
            HOST_NAME.fullmatch(self.host.lower()) is not None or _is_address(self.host),
            f"host must be an address such as 127.0.0.1, not {self.host!r:.80}",
        )
        for name in self.allow_host:
            require(
                HOST_NAME.fullmatch(name.lower()) is not None,
                f"allow_host must be a name or an address without port, such as "
                f"chat.example.org, not {name!r:.80}",
            )
        for origin in self.allow_origin:
            require(
                _ORIGIN.fullmatch(origin.lower()) is not None,
                "allow_origin must be an exact origin such as https://chat.example.org, without "
                f"a path or a star, not {origin!r:.80}",
            )
        require(
            self.model_name is None or MODEL_NAME.fullmatch(self.model_name) is not None,
            "model_name must be a word of at most 200 characters without slashes, not "
            f"{self.model_name!r:.80}",
        )

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach the address."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may take of the server; the same for all.

    Attributes:
        body_bytes: Bytes of a request's body.
        header_bytes: Bytes of its line and headers together.
        headers: Number of headers.
        target_bytes: Bytes of its address.
        header_seconds: Seconds from the first moment of a connection, or the end of the last
            request on it, until the headers are there.
        body_seconds: Seconds that a body may take to arrive.
        idle_seconds: Seconds that a connection may rest between two requests.
        stalled_seconds: Seconds that a client may let a reply lie without reading on.
        connections: Connections at once; of more the oldest that rests is closed.
        ping_seconds: Silence after which a stream gets a comment, so that nobody takes it for dead.
        drain_seconds: Seconds that replies may still take after the server was told to stop.
        heartbeat_seconds: Silence of the engine after which it counts as dead.
        depth: Levels of nesting in a body.
        messages: Messages of a conversation.
        stops: Stop strings.
        stop_bytes: Bytes of a stop string.
        biases: Entries of logit_bias.
        prompts: Replies of one request, prompts times choices.
        schema_bytes: Bytes of a JSON schema, a regular expression or a grammar.
        tools: Tools of a request.
        preparing: Requests that are read at once; others wait.
    """

    body_bytes: int = 1 << 20
    header_bytes: int = 64 << 10
    headers: int = 100
    target_bytes: int = 8 << 10
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    stalled_seconds: float = 30.0
    connections: int = 64
    ping_seconds: float = 10.0
    drain_seconds: float = 10.0
    heartbeat_seconds: float = 30.0
    depth: int = 64
    messages: int = 4096
    stops: int = 32
    stop_bytes: int = 256
    biases: int = 256
    prompts: int = 128
    schema_bytes: int = 64 << 10
    tools: int = 64
    preparing: int = 6
