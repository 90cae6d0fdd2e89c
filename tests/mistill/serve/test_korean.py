"""A Korean reply is streamed in whole syllables: from Python, in the terminal and by the server.

The reply is spelled out by a regular expression, so that a tiny model with random weights writes
it; its vocabulary spells most syllables in two or three tokens.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from mistill.chat.bot import ChatBot
from mistill.cli.app import main
from mistill.constraints import regex
from mistill.text.vocabulary import load_vocabulary
from tests.mistill.serve.running import RunningServer, running

REPLY = "안녕하세요, 미스트랄은 북쪽에서 부는 차가운 바람입니다"
SYLLABLES = [letter for letter in REPLY if "가" <= letter <= "힣"]


def is_whole(piece: str) -> bool:
    """Whether each character of a piece is one of the reply's."""
    return bool(piece) and set(piece) <= set(REPLY)


def test_the_vocabulary_spells_syllables_in_pieces(chatbot: Path) -> None:
    assert len(load_vocabulary(chatbot).encode(REPLY)) > 2 * len(SYLLABLES)


def test_parts_from_python_hold_whole_syllables(chatbot: Path) -> None:
    bot = ChatBot(chatbot, threads=1, temperature=0, max_new_tokens=200)
    parts = list(bot.reply("안녕?", constraint=regex(REPLY)))
    assert "".join(parts) == REPLY
    assert all(is_whole(part) for part in parts)
    assert len(parts) >= len(SYLLABLES)  # as they come, not at the end


@pytest.mark.parametrize("tokens", [4, 5, 6])
def test_a_reply_that_is_cut_off_within_a_syllable_ends_before_it(
    tokens: int, chatbot: Path, server: RunningServer
) -> None:
    bot = ChatBot(chatbot, threads=1, temperature=0, max_new_tokens=tokens)
    text = "".join(bot.reply("안녕?", constraint=regex(REPLY)))
    assert REPLY.startswith(text)
    assert bot.last_ending == "max_new_tokens"
    assert bot.history[-1]["content"] == text
    form = {"type": "regex", "regex": REPLY}
    answer = server.chat("안녕?", response_format=form, max_tokens=tokens)
    assert (answer.text, answer.json["choices"][0]["finish_reason"]) == (text, "length")


class Recorder(io.RawIOBase):
    """What a terminal receives, write by write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.writes.append(bytes(content))
        return len(content)


def test_every_write_to_the_terminal_is_whole(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    terminal = io.TextIOWrapper(io.BufferedWriter(recorder), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["chat", str(chatbot), "안녕?", "--regex", REPLY, "--max-new-tokens", "200"]
    assert main([*words, "--threads", "1"]) == 0
    terminal.flush()
    pieces = [write.decode("utf-8") for write in recorder.writes]
    assert "".join(pieces).strip() == REPLY
    assert len([piece for piece in pieces if is_whole(piece)]) > 5


def test_events_of_the_server_hold_whole_syllables(chatbot: Path) -> None:
    form = {"type": "regex", "regex": REPLY}
    with running(chatbot, stream_interval_ms=0) as server:
        events = server.chat("안녕?", stream=True, response_format=form, max_tokens=200).events
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events]
    parts = [delta for delta in deltas if delta]
    assert "".join(parts) == REPLY
    assert all(is_whole(part) for part in parts)
    assert len(parts) > 5
