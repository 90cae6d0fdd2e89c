"""API keys: who needs one, which fit, and where they never show."""

from __future__ import annotations

import hmac
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mistill
from mistill.cli import main
from mistill.errors import FolderError, SettingsError
from mistill.serve.http.guard import OPEN_FOLDER, OPEN_PATHS
from mistill.serve.http.keys import VARIABLE, Keys, read_keys
from mistill.serve.settings import ServeSettings
from tests.mistill.serve.running import RunningServer, running

KEY = "sk-" + "0123456789abcdef" * 2
OTHER = "sk-" + "fedcba9876543210" * 2


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# two people\n{KEY}\n\n{OTHER}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def locked(chatbot: Path, key_file: Path) -> Iterator[RunningServer]:
    with running(chatbot, api_key_file=key_file, metrics=True) as one:
        yield one


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong-wrong-wrong-wrong"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer  {KEY}"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": "Bearer " + "k" * 50_000},
        {"Authorization": "Bearer \u00e9\u00e9\u00e9"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "wrong"},
        {"Cookie": f"key={KEY}"},
    ],
)
def test_what_is_no_key_is_refused(locked: RunningServer, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/no/such/path"):
        answer = locked.ask(path, headers={k: v.encode("utf-8") for k, v in headers.items()})  # type: ignore[misc]
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.error["code"] == "invalid_api_key"
        assert KEY not in answer.content.decode()


def test_a_key_in_the_address_or_of_a_megabyte_is_refused(locked: RunningServer) -> None:
    assert locked.ask(f"/v1/models?key={KEY}&api_key={KEY}").status == 401
    huge = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: " + b"k" * (1 << 20)
    with locked.connect() as connection:
        try:
            connection.sendall(huge + b"\r\n\r\n")
            answer = connection.recv(1000)
        except ConnectionError:
            answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_every_key_fits_in_either_header(locked: RunningServer, key: str, header: str) -> None:
    value = f"Bearer {key}" if header == "Authorization" else key
    assert locked.ask("/v1/models", headers={header: value}).status == 200


def test_every_route_but_an_exact_list_needs_a_key(locked: RunningServer) -> None:
    assert len(locked.app.routes) >= 9
    for method, path in locked.app.routes:
        body: object = {"messages": []} if method == "POST" else None
        answer = locked.ask(path, body, method=method)
        is_open = path in OPEN_PATHS or path == OPEN_FOLDER
        assert (answer.status == 401) != is_open, path
    for method in ("POST", "PUT", "DELETE"):
        assert locked.ask("/health", method=method).status == 401
    assert OPEN_PATHS == ("/", "/health")


@pytest.mark.parametrize("path", ["//v1/models", "/health/../v1/models", "/static/../v1/models"])
def test_no_spelling_of_an_address_goes_round_the_key(locked: RunningServer, path: str) -> None:
    assert locked.ask(path).status in (401, 404)
    assert b"tiny-bot" not in locked.ask(path).content


def test_what_was_read_for_one_key_is_not_used_for_another(locked: RunningServer) -> None:
    body = {
        "messages": [{"role": "user", "content": "A secret of mine, rather a long one"}],
        "max_tokens": 1,
    }
    cached = []
    for key in (KEY, KEY, OTHER):
        answer = locked.ask(
            "/v1/chat/completions", body, headers={"Authorization": f"Bearer {key}"}
        )
        cached.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] > 10
    assert cached[2] == 0


def test_keys_are_compared_as_digests_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys([KEY, OTHER])
    assert keys.owner([KEY.encode()])
    assert keys.owner([b"\xff"]) is None
    assert len(compared) == 4  # the second key too, although the first fits
    assert all(len(ours) == len(theirs) == 32 for ours, theirs in compared)
    assert KEY not in str(vars(keys))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(mode)
    with pytest.raises(FolderError, match="chmod 600"):
        read_keys(ServeSettings(api_key_file=file))


@pytest.mark.parametrize(
    "content", ["", "# no\n", "short\n", "with space in it, long\n", "\xe9" * 20]
)
def test_key_files_without_a_good_key_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content.encode("latin-1"))
    file.chmod(0o600)
    with pytest.raises((FolderError, SettingsError)) as caught:
        read_keys(ServeSettings(api_key_file=file))
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_another_address_needs_a_key(
    chatbot: Path, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", str(chatbot), "--host", host, "--port", "0"]) == 2
    message = capsys.readouterr().err
    assert "--api-key-file" in message
    assert "--no-key" in message
    monkeypatch.setenv(VARIABLE, KEY)
    assert read_keys(ServeSettings(host=host))
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(SettingsError, match="16"):
        read_keys(ServeSettings(host=host))


def test_a_key_shows_nowhere(
    chatbot: Path,
    key_file: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(chatbot, api_key_file=key_file, metrics=True) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        contents = [
            server.ask("/metrics", headers=headers).content,
            server.ask("/v1/models", headers=headers).content,
            server.ask("/v1/chat/completions", {"messages": KEY}, headers=headers).content,
            server.ask(f"/v1/models?key={KEY}").content,
        ]
    assert not [content for content in contents if KEY.encode() in content]
    assert KEY not in caplog.text
    assert "GET /v1/models" in caplog.text


def test_a_server_for_everybody_says_so(chatbot: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(chatbot, host="0.0.0.0", no_key=True) as server:
        assert server.server.address == f"http://127.0.0.1:{server.port}"
        assert server.ask("/v1/models").status == 200
    assert "everybody" in caplog.text


def test_importing_and_chatting_need_none_of_the_server(tmp_path: Path) -> None:
    for name in ("uvicorn", "h11", "starlette", "httpx"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(name=__name__)\n")
    code = (
        "import sys, mistill, mistill.chat.bot, mistill.serve, mistill.serve.settings\n"
        "assert callable(mistill.serve)\n"
        "assert 'mistill.serve.running' not in sys.modules\n"
        "try:\n mistill.serve('nowhere')\n"
        "except mistill.MistillError as error:\n print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(mistill.__file__).parents[1]}",
        },
    )
    assert "mistill[serve]" in done.stdout
