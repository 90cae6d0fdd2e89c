"""Streams that are closed, full or of another encoding end in one line, never in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_model

FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("streams") / "model")


def shell(line: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Run a line of the shell in a folder; exit code, output and messages."""
    mistill = f'"{sys.executable}" -m mistill'
    ran = subprocess.run(
        ["sh", "-c", line.replace("mistill", mistill, 1)],
        cwd=folder,
        env={**os.environ, "TQDM_DISABLE": "1", **environment},
        capture_output=True,
        check=False,
    )
    return ran.returncode, ran.stdout.decode("utf-8", "replace"), ran.stderr.decode()


CHAT = "mistill chat model --max-new-tokens 30 --temperature 2 --seed 3"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_a_chat_reads_and_writes_utf_8_whatever_the_locale(
    environment: dict[str, str], model: Path, tmp_path: Path
):
    (model.parent / "line.txt").write_text("Caf\u00e9 \ud55c\uad6d\uc5b4 \U0001f600?\n", "utf-8")
    plain = shell(f"{CHAT} < line.txt", model.parent)
    assert shell(f"{CHAT} < line.txt", model.parent, **environment) == plain
    assert plain[0] == 0
    assert not plain[1].isascii()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("echo hi | mistill chat model --max-new-tokens 2 > /dev/full", "output cannot be written"),
        ("mistill inspect model > /dev/full", "output cannot be written: No space left"),
        ("mistill inspect model >&-", "the standard output is closed"),
        ("mistill chat model --max-new-tokens 2 <&-", "the standard input is closed"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_said_in_one_line(
    line: str, message: str, unbuffered: str, model: Path
):
    code, _, said = shell(line, model.parent, PYTHONUNBUFFERED=unbuffered)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_reader_that_closes_its_pipe_is_no_error(model: Path):
    code, shown, said = shell("mistill inspect model | head -1", model.parent)
    assert (code, said) == (0, "")
    assert shown.startswith("form")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launcher_s_number_that_is_none_is_named(name: str, model: Path):
    (model.parent / "a.txt").write_text("The mistral is a strong, cold wind.")
    launched = {"RANK": "0", "WORLD_SIZE": "1", name: "abc"}
    code, _, said = shell("mistill targets model targets --texts a.txt", model.parent, **launched)
    assert code == 2
    assert f"the environment variable {name} should be a whole number" in said
    assert said.count("\n") == 1
