"""What every test shares: no network, one thread, and tiny folders made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import SENTENCES, tiny_model
from tests.tune.pairs import pair_rows


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test opened a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_precision_left() -> Iterator[None]:
    """No test leaves a precision behind that training in another one would be refused for."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state:
        state.AcceleratorState._reset_state()
        pytest.fail("the test left accelerate's precision fixed for the whole process")


@pytest.fixture(autouse=True)
def _own_scores(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Importance is measured in every test: scores that another code left would hide a mistake."""
    try:
        import distill.student.score_cache as score_cache
    except ModuleNotFoundError:
        return
    folder: list[Path] = []

    def own_folder() -> Path:
        if not folder:
            folder.append(tmp_path_factory.mktemp("scores"))
        return folder[0]

    monkeypatch.setattr(score_cache, "score_folder", own_folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Mistral; read only."""
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", num_hidden_layers=4, seed=1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Mistral with the teacher's vocabulary; read only."""
    return tiny_model(tmp_path_factory.mktemp("models") / "model", seed=2)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations, as JSON lines; read only."""
    file = tmp_path_factory.mktemp("texts") / "chats.jsonl"
    with file.open("w", encoding="utf-8") as opened:
        for number in range(40):
            question, answer = SENTENCES[number % 6], SENTENCES[(number * 5 + 1) % 6]
            messages = [
                {"role": "user", "content": f"{question} {number}"},
                {"role": "assistant", "content": f"{answer} {number * 7}"},
            ]
            opened.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of answers, as JSON lines; read only."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pair_rows()), "utf-8")
    return file


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with nothing in it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    return home
