"""What a stranger, or a page in a browser, can do over the network: nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistill.serve.settings import Limits
from tests.mistill.serve.running import RunningServer, rest_of, running, until

QUICK = Limits(
    header_seconds=0.4, body_seconds=0.6, idle_seconds=0.8, stalled_seconds=0.5, connections=12
)


@pytest.fixture(scope="module")
def impatient(chatbot: Path) -> Iterator[RunningServer]:
    with running(chatbot, limits=QUICK) as one:
        yield one


def request(
    target: str = "/health", *headers: str, method: str = "GET", version: str = "1.1"
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def status(content: bytes) -> int:
    assert content.startswith(b"HTTP/1."), content[:100]
    return int(content.split()[1])


# --- names of the server --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/health", "/v1/models", "/", "/no/such/path"])
def test_a_foreign_host_is_refused_before_anything_else(server: RunningServer, target: str) -> None:
    assert status(server.raw(request(target, "Host: evil.example"))) == 403


@pytest.mark.parametrize(
    "host",
    [
        *("", ":8080", "127.0.0.1.evil.com", "localhost.", "0.0.0.0", "[::ffff:127.0.0.1]"),
        *("127.1", "2130706433", "localhost@evil.com", "evil.com:8080", "localhost:80:80", "[::1"),
        *("localhost:", "localhost:999999", "local host", "127.0.0.1/", "\xe9vil", "127.0.0.2"),
    ],
)
def test_odd_hosts_are_refused(server: RunningServer, host: str) -> None:
    assert status(server.raw(request("/health", f"Host: {host}"))) in (400, 403)


def test_two_hosts_and_none_are_refused(server: RunningServer) -> None:
    two = request("/health", "Host: localhost", "Host: evil.example")
    assert status(server.raw(two)) == 400
    assert status(server.raw(request("/health"))) == 400
    assert status(server.raw(request("/health", version="1.0"))) == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "[::1]", "127.0.0.1:8080"])
def test_names_of_this_machine_are_answered(server: RunningServer, host: str) -> None:
    assert status(server.raw(request("/health", f"Host: {host}"))) == 200


# --- pages in a browser ---------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "", "*"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_other_origins_are_refused(
    server: RunningServer, origin: str, method: str
) -> None:
    answer = server.ask(
        "/v1/models" if method == "GET" else "/v1/chat/completions",
        {"messages": []} if method == "POST" else None,
        method=method,
        headers={"Origin": origin},
    )
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_our_own_page_is_answered(server: RunningServer) -> None:
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{server.port}"
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert server.ask("/v1/models", headers=headers).status == 200
    crossed = {"Host": f"localhost:{server.port}", "Origin": f"http://127.0.0.1:{server.port}"}
    assert server.ask("/v1/models", headers=crossed).status == 403


def test_a_named_origin_is_let_in_exactly_and_without_credentials(chatbot: Path) -> None:
    named = "https://chat.example.org"
    with running(chatbot, allow_origin=(named,)) as server:
        ahead = {
            "Origin": named,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os, b@d",
            "Sec-Fetch-Site": "cross-site",
        }
        answer = server.ask("/v1/chat/completions", method="OPTIONS", headers=ahead)
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == named
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        allowed = answer.headers["access-control-allow-headers"]
        assert allowed == "authorization, content-type, x-stainless-os"
        asked = {"Origin": named, "Sec-Fetch-Site": "cross-site"}
        assert server.ask("/v1/models", headers=asked).status == 200
        for other in (named + ".evil.com", "http://chat.example.org", named + ":444"):
            answer = server.ask("/v1/models", headers={"Origin": other})
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site", "odd"])
def test_requests_that_a_browser_calls_foreign_are_refused(
    server: RunningServer, site: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer = server.ask("/v1/chat/completions", body, headers={"Sec-Fetch-Site": site})
    assert answer.status == 403
    assert server.ask("/v1/models", headers={"Sec-Fetch-Site": site}).status == 403


@pytest.mark.parametrize(
    "content_type",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *(
            "",
            "application/jsonp",
            "application/json; charset=utf-16",
            "text/plain,text/html",
        ),
    ],
)
def test_bodies_that_a_page_can_send_unasked_are_refused(
    server: RunningServer, content_type: str
) -> None:
    before = server.app.served.scheduler.statistics().prompt_tokens
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    answer = server.ask("/v1/chat/completions", body, headers={"Content-Type": content_type})
    assert answer.status == 415
    assert answer.error["type"] == "invalid_request_error"
    assert server.app.served.scheduler.statistics().prompt_tokens == before


def test_every_answer_carries_the_headers_that_bind_a_browser(server: RunningServer) -> None:
    answers = [
        server.ask("/health"),
        server.ask("/no"),
        server.chat(),
        server.chat(stream=True),
        server.ask("/v1/models", headers={"Origin": "null"}),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert part in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("given", ["a\tb", "x" * 65, "a b", "<script>", ""])
def test_request_ids_are_taken_only_if_they_are_plain(server: RunningServer, given: str) -> None:
    assert server.ask("/health", headers={"X-Request-Id": given}).headers["x-request-id"] != given
    plain = "abc-1.2_3"
    assert server.ask("/health", headers={"X-Request-Id": plain}).headers["x-request-id"] == plain


# --- requests that are none -----------------------------------------------------------------------

HOST = "Host: localhost"


@pytest.mark.parametrize(
    "content",
    [
        request("/", HOST, "Upgrade: websocket", "Sec-WebSocket-Key: x"),
        request("/v1/models", HOST, method="TRACE"),
        request("evil.example:80", HOST, method="CONNECT"),
        request("http://evil.example/", HOST),
        b"GET /health\r\n\r\n",
        request("/v1/models", HOST, method="PUT"),
        request("/v1/models", HOST, method="G@T"),
        request("/tokenize", HOST, "Content-Length: -1", method="POST"),
        request("/tokenize", HOST, "Content-Length: 1", "Content-Length: 2", method="POST"),
        request("/tokenize", HOST, "Content-Length: x", method="POST"),
        request("/tokenize", HOST, "Content-Length: 9" + "9" * 30, method="POST"),
        request("/tokenize", HOST, "Content-Length: 5", "Transfer-Encoding: chunked", method="POST")
        + b"0\r\n\r\n",
        request("/tokenize", HOST, "Transfer-Encoding: gzip", method="POST"),
        request("/health", HOST, version="2.0"),
        request("/health", HOST, "bad header"),
        request("/health", HOST, "na me: x"),
        request("/health", HOST, "x: a\x00b"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_request_of_http_1_1_is_refused_and_closed(
    server: RunningServer, content: bytes
) -> None:
    with server.connect() as connection:
        connection.sendall(content)
        if b"\x16\x03" in content:
            connection.shutdown(socket.SHUT_WR)
            return
        answer = rest_of(connection)
    assert 400 <= status(answer) < 500
    assert server.ask("/health").status == 200


@pytest.mark.parametrize(
    "content",
    [
        request("/health", HOST, "x: " + "a" * (1 << 20)),
        request("/health", HOST, *(f"x-{number}: 1" for number in range(5000))),
        request("/" + "a" * (1 << 20), HOST),
        request("/health?" + "a" * 20_000, HOST),
        request("/health", HOST, *(f"x{number}: 1" for number in range(101))),
    ],
)
def test_too_much_before_the_body_is_refused(server: RunningServer, content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        answer = rest_of(connection)
    assert not answer or status(answer) in (400, 414, 431)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert server.ask("/health").status == 200


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1/../v1/models", "/V1/models", "/v1/%2e%2e/models", "/v1/models/", "/v1"],
)
def test_other_spellings_of_an_address_lead_nowhere(server: RunningServer, path: str) -> None:
    answer = server.ask(path)
    assert answer.status == 404
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        *("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/.git/config"),
        *("/static/", "/static//etc/passwd", "/static/nothing.js", "/static/index.html%00.js"),
        *("/static/page_files.py", "/etc/passwd", "/..", "/static/..\\app.py"),
    ],
)
def test_no_address_leads_to_a_file_that_is_not_of_the_page(
    server: RunningServer, path: str
) -> None:
    assert server.ask(path).status == 404


@pytest.mark.parametrize("target", ["/v1/embeddings", "/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_a_client_that_sends_slowly_hears_why_it_is_refused(
    server: RunningServer, target: str, host: str
) -> None:
    content = b"{" + b" " * 300_000
    for pause in (0, 0.1):
        with server.connect() as connection:
            connection.sendall(
                f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\n"
                f"Content-Length: {len(content)}\r\n\r\n".encode()
            )
            connection.sendall(content[:1000])
            time.sleep(pause)
            connection.sendall(content[1000:])
            answer = b""
            while b"}}" not in answer:
                part = connection.recv(1 << 16)
                assert part, "the connection was closed before the answer"
                answer += part
            assert 400 <= status(answer) < 500
            # The connection is still good for another request.
            connection.sendall(request("/health", HOST))
            assert status(rest_of(connection)) == 200


# --- time and connections -------------------------------------------------------------------------


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    began = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - began < 20:
        try:
            if drip:
                connection.sendall(drip)
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - began


def test_connections_that_bring_no_request_in_time_are_closed(impatient: RunningServer) -> None:
    with impatient.connect() as silent:
        assert seconds_until_closed(silent) < 10
    with impatient.connect() as dripping:
        dripping.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert seconds_until_closed(dripping, b"a") < 10
    with impatient.connect() as dripping:
        dripping.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5000\r\n\r\n"
        )
        assert seconds_until_closed(dripping, b" ") < 10
    with impatient.connect() as resting:
        resting.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in resting.recv(100)
        assert seconds_until_closed(resting) < 10


def test_a_reply_may_take_longer_than_a_request(impatient: RunningServer) -> None:
    with impatient.streaming(max_tokens=200, ignore_eos=True, temperature=1.5) as stream:
        began = time.monotonic()
        content = b""
        while part := stream.read1(1 << 12):
            content += part
            if time.monotonic() - began < 1.2:
                time.sleep(0.02)
    assert content.endswith(b"data: [DONE]\n\n")


def test_idle_connections_keep_nobody_out_and_leave_nothing_behind(chatbot: Path) -> None:
    # Within the time of the test none of them is late with its headers.
    with running(chatbot, limits=Limits(connections=12)) as server:
        connections = server.server.server_state.connections
        assert server.ask("/health").status == 200
        until(lambda: not connections)
        gc.collect()
        before = len(list(Path("/proc/self/fd").iterdir()))
        idle = [server.connect() for _ in range(300)]
        try:
            assert server.ask("/health").status == 200
            until(lambda: len(connections) <= 12)
        finally:
            for connection in idle:
                connection.close()
        until(lambda: not connections)
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_client_that_stops_reading_loses_its_row(impatient: RunningServer) -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 480,
            "n": 4,
        }
    ).encode()
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    stuck.connect(("127.0.0.1", impatient.port))
    with stuck:
        stuck.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: impatient.health().running >= 1)
        assert impatient.chat().status == 200
        until(lambda: impatient.health().running == 0)
        until(lambda: not impatient.server.server_state.tasks)
