"""A conversation that was answered is kept, whatever ends the chat, and one chat keeps it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from export import to_onnx
from mistill.chat.bot import ChatBot

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGKILL")
    if hasattr(signal, name)
]  # fmt: skip


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An ONNX folder; read only."""
    return to_onnx(model, tmp_path_factory.mktemp("chatbot") / "bot", parity_positions=0)


def begin(chatbot: Path, session: Path) -> subprocess.Popen[bytes]:
    """A chat in a process of its own that has answered one message."""
    words = ["chat", str(chatbot), "--session", str(session), "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mistill", *words, "--max-new-tokens", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"remember me\n")
    process.stdin.flush()
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_turn_that_was_answered_is_in_the_file(chatbot, tmp_path, number):
    session = tmp_path / "s.st"
    process = begin(chatbot, session)
    process.send_signal(number)
    _, errors = process.communicate()
    assert b"Traceback" not in errors
    assert b"remember me" in session.read_bytes()
    bot = ChatBot(chatbot, threads=1)
    bot.restore(session)
    assert bot.history[0]["content"] == "remember me"
    if number != signal.SIGKILL:
        assert [item.name for item in tmp_path.iterdir()] == ["s.st"]


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_a_second_chat_on_one_file_is_refused_while_the_first_runs(chatbot, tmp_path):
    session = tmp_path / "s.st"
    first, second = begin(chatbot, session), begin(chatbot, session)
    _, errors = second.communicate()
    assert second.returncode == 2
    assert b"another process has" in errors
    assert len(errors.splitlines()) == 1
    first.communicate()
    assert first.returncode == 0
    assert [item.name for item in tmp_path.iterdir()] == ["s.st"]


def test_threads_that_share_a_chatbot_all_get_an_answer(chatbot):
    bot = ChatBot(chatbot, temperature=0, max_new_tokens=15, threads=1)
    results: list[bool] = []
    start = threading.Barrier(6)

    def ask(number: int) -> None:
        start.wait()
        results.append(bool(list(bot.reply(f"question {number}"))))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    asked = sorted(message["content"] for message in bot.history[::2])
    assert asked == [f"question {number}" for number in range(6)]


def test_a_reply_that_nobody_reads_any_more_ends_by_itself(chatbot):
    bot = ChatBot(chatbot, temperature=0, max_new_tokens=50, threads=1)
    next(bot.reply("first"))
    assert len(bot.history) == 2
    thread = threading.Thread(target=lambda: next(bot.reply("second")))
    thread.start()
    thread.join()
    assert len(bot.history) == 4
