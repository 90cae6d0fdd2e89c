"""Whether the Hub can be reached is known within seconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from mistill.errors import SettingsError
from mistill.sources.hub import hub_answers

ENDPOINT = "huggingface_hub.constants.ENDPOINT"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and the library online."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)


@pytest.fixture
def listener() -> Iterator[int]:
    """The port of something that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_hub_that_takes_connections_answers(
    listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ENDPOINT, f"http://127.0.0.1:{listener}")
    assert hub_answers()
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert not hub_answers()


def test_a_closed_port_does_not_answer(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(ENDPOINT, f"http://127.0.0.1:{port}")
    assert not hub_answers()


def test_a_proxy_is_asked_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:10")
    assert hub_answers()


@pytest.mark.parametrize(
    "endpoint",
    ["http://host:port", "http://[x", "https://host:99999", "hub.example.org", "ftp://h"],
)
def test_an_endpoint_that_is_no_address_is_named(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ENDPOINT, endpoint)
    with pytest.raises(SettingsError, match="HF_ENDPOINT should be an address such as https"):
        hub_answers()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_name_that_no_resolver_takes_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENDPOINT, f"http://{'a' * 70}.org")
    assert not hub_answers()


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> socket.socket:
        time.sleep(3)
        raise OSError

    monkeypatch.setattr("socket.create_connection", hang)
    began = time.monotonic()
    assert not hub_answers(0.1)
    assert time.monotonic() - began < 2.5
