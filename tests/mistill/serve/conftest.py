"""A tiny chatbot, and a server of it that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import export
from tests.mistill.serve.running import RunningServer, running
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def chatbot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of a tiny chatbot; read only."""
    folder = tmp_path_factory.mktemp("serve")
    source = tiny_model(folder / "model", seed=2)
    return export.to_onnx(source, folder / "tiny-bot", parity_positions=0)


@pytest.fixture(scope="session")
def server(chatbot: Path) -> Iterator[RunningServer]:
    """A server without a key, with metrics."""
    with running(chatbot, metrics=True) as one:
        yield one
