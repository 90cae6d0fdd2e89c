"""``mistill chat``: from a pipe, and at a terminal that a test holds the other end of."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import export
from mistill.chat.bot import ChatBot
from mistill.chat.reply import Speed
from mistill.chat.settings import ChatSettings
from mistill.chat.terminal_chat import (
    _TerminalChat,
    run_terminal_chat,
    speed_line,
)
from mistill.chat.terminal_commands import Commands
from mistill.errors import FolderError, MistillError, SettingsError, TextError
from tests.tiny import tiny_model

SETTINGS = ChatSettings(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chatbot with a long context, that goes on until it is stopped."""
    folder = tmp_path_factory.mktemp("terminal")
    model = tiny_model(folder / "model", seed=2, max_position_embeddings=60_000)
    weights = load_file(model / "model.safetensors")
    for end in (2, 4):  # a logit of 0 is never the largest of hundreds
        weights["lm_head.weight"][end] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return export.to_onnx(model, folder / "chatbot", parity_positions=0, context_length=60_000)


def piped(
    lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch, system: str | None = None
) -> str:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stdout", out)
    run_terminal_chat(folder, system=system, threads=1, settings=SETTINGS, lines=True)
    return out.getvalue()


def test_each_line_of_a_pipe_is_answered_and_only_the_answers_are_written(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = ChatBot(chatbot, system="Be brief.", settings=SETTINGS, threads=1)
    expected = "".join(f"{''.join(bot.reply(line))}\n" for line in ("Hello", "And now?"))
    assert piped("Hello\n\n  And now?", chatbot, monkeypatch, "Be brief.") == expected


def test_a_line_of_a_pipe_is_a_message_whatever_it_begins_with(
    chatbot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"/save {tmp_path}/written", "/reset", "/quit", "//etc is a folder"]
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    expected = "".join(f"{''.join(bot.reply(line))}\n" for line in lines)
    assert piped("\n".join(lines), chatbot, monkeypatch) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [(b"\xff\xfe", "it is not UTF-8 text"), (b"word " * 60_000, "positions|tokens|context")],
)
def test_a_line_that_cannot_be_answered_is_named_and_the_others_are_answered(
    line: bytes,
    words: str,
    chatbot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    expected = "".join(f"{''.join(bot.reply(text))}\n" for text in ("Hello", "And now?"))
    out = io.StringIO()
    stream = io.BytesIO(b"Hello\n" + line + b"\nAnd now?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream, "utf-8"))
    monkeypatch.setattr(sys, "stdout", out)
    session = tmp_path / "session"
    with pytest.raises(TextError, match="1 line could not be answered"):
        run_terminal_chat(chatbot, threads=1, settings=SETTINGS, session=session, lines=True)
    assert out.getvalue() == expected
    complaint = capsys.readouterr().err
    assert complaint.startswith("mistill: line 2: ")
    assert re.search(words, complaint)
    assert complaint.count("\n") == 1
    restored = ChatBot(chatbot, settings=SETTINGS, threads=1)
    restored.restore(session)
    assert [message["content"] for message in restored.history[::2]] == ["Hello", "And now?"]


def commands_of(chatbot: Path, *messages: str) -> Commands:
    """The commands of a chat in which something was said."""
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    for message in messages:
        "".join(bot.reply(message))
    return Commands(bot)


def test_a_conversation_is_saved_as_often_as_is_asked(chatbot: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved chat.jsonl"
    commands = commands_of(chatbot, "Forget this")
    commands.run("/reset")
    for message in ("Hello", "More"):
        "".join(commands.bot.reply(message))
        commands.run(f"/save {file}")
    messages = json.loads(file.read_text("utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages[::2]] == ["Hello", "More"]
    assert file.read_text("utf-8").count("\n") == 1


def test_a_saved_conversation_can_be_trained_on(chatbot: Path, tmp_path: Path) -> None:
    from mistill.text.documents import read_documents
    from mistill.text.vocabulary import load_vocabulary

    file = tmp_path / "chat.jsonl"
    commands_of(chatbot, "Hello").run(f"/save {file}")
    documents = list(read_documents(file, load_vocabulary(chatbot)))
    assert len(documents) == 1
    assert documents[0].mask.any()


def test_a_file_of_someone_else_is_not_overwritten(chatbot: Path, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("mine")
    with pytest.raises(FolderError, match="exists already"):
        commands_of(chatbot, "Hello").run(f"/save {file}")
    assert file.read_text() == "mine"


def test_the_last_message_is_taken_back_or_asked_again(chatbot: Path) -> None:
    commands = commands_of(chatbot, "Hello", "And now?")
    assert commands.run("/retry").message == "And now?"
    assert [turn["content"] for turn in commands.bot.history if turn["role"] == "user"] == ["Hello"]
    again = "".join(commands.bot.reply("And now?"))
    fresh = commands_of(chatbot, "Hello")
    assert again == "".join(fresh.bot.reply("And now?"))
    assert commands.run("/undo").note == "Forgotten: And now?"
    assert commands.run("/undo").note == "Forgotten: Hello"
    assert commands.bot.history == []
    with pytest.raises(SettingsError, match="nothing was said yet"):
        commands.run("/undo")


def test_another_system_prompt_begins_anew(chatbot: Path) -> None:
    commands = commands_of(chatbot, "Hello")
    assert commands.run("/system").note == "There is no system prompt."
    commands.run("/system Be brief.")
    assert commands.bot.history == [{"role": "system", "content": "Be brief."}]
    assert commands.run("/system").note == "Be brief."
    commands.run("/clear")
    assert commands.bot.history == [{"role": "system", "content": "Be brief."}]


def test_what_was_saved_is_loaded_and_goes_on(chatbot: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    first = commands_of(chatbot, "Hello")
    first.run(f"/save {file}")
    second = commands_of(chatbot, "Something else")
    assert second.run(f"/load {file}").note == f"Loaded 2 messages from {file}."
    assert "".join(second.bot.reply("More")) == "".join(first.bot.reply("More"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "role"),
        (b'{"messages": [{"role": "user"}]}', "content"),
        (b"[1]", "object"),
    ],
)
def test_what_is_no_saved_conversation_changes_nothing(
    content: bytes, words: str, chatbot: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(content)
    commands = commands_of(chatbot, "Hello")
    before = list(commands.bot.history)
    with pytest.raises(MistillError, match=words):
        commands.run(f"/load {file}")
    assert commands.bot.history == before


def test_a_file_is_a_message(chatbot: Path, tmp_path: Path) -> None:
    file = tmp_path / "some letter.txt"
    file.write_text("\ufeffDear all,\n\nhello.\n", "utf-8")
    commands = commands_of(chatbot)
    assert commands.run(f"/file {file}").message == "Dear all,\n\nhello."
    file.write_bytes(b"\xff")
    with pytest.raises(TextError, match="is not UTF-8 text"):
        commands.run(f"/file {file}")
    file.write_text("  \n")
    with pytest.raises(TextError, match="holds no text"):
        commands.run(f"/file {file}")
    with pytest.raises(FolderError, match="cannot be read: No such file"):
        commands.run("/file nowhere.txt")


@pytest.mark.parametrize(
    ("source", "options"),
    [("", {"prompt": "Hello\nthere"}), ("  Hello\nthere\n", {})],
    ids=["prompt", "pipe"],
)
def test_one_prompt_gets_one_reply(
    source: str, options: dict[str, Any], chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    expected = "".join(bot.reply("Hello\nthere")) + "\n"
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(source))
    monkeypatch.setattr(sys, "stdout", out)
    run_terminal_chat(chatbot, threads=1, settings=SETTINGS, **options)
    assert out.getvalue() == expected


def write_and_close(pipe: int) -> None:
    os.write(pipe, b"And now?\n")
    os.close(pipe)


def test_lines_of_a_closed_pipe_are_one_prompt_and_of_an_open_one_a_conversation(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistill.chat.terminal_chat._PATIENCE", 0.2)
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    together = "".join(bot.reply("Hello\nAnd now?")) + "\n"
    bot.reset()
    apart = [f"{''.join(bot.reply(line))}\n" for line in ("Hello", "And now?")]
    for wait, expected in ((False, together), (True, "".join(apart))):
        end, start = os.pipe()
        os.write(start, b"Hello\n")
        if wait:
            threading.Timer(1.0, write_and_close, [start]).start()
        else:
            write_and_close(start)
        out = io.StringIO()
        with os.fdopen(end) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            monkeypatch.setattr(sys, "stdout", out)
            run_terminal_chat(chatbot, threads=1, settings=SETTINGS)
        assert out.getvalue() == expected


@pytest.mark.parametrize("prompt", ["", "  \n", "caf\udce9"])
def test_a_prompt_that_says_nothing_is_refused_before_the_model_is_opened(prompt: str) -> None:
    with pytest.raises(TextError, match="the prompt"):
        run_terminal_chat("no folder", prompt=prompt)


@pytest.mark.parametrize("command", ["/sing", "/save", "/save  ", "/reset all", "/bye now"])
def test_a_command_that_cannot_be_obeyed_is_refused(command: str, chatbot: Path) -> None:
    with pytest.raises(SettingsError, match=command.split()[0]):
        commands_of(chatbot).run(command)


def test_a_reader_that_leaves_ends_the_chat_without_a_complaint(chatbot: Path) -> None:
    code = (
        "import sys; from mistill.chat.terminal_chat import run_terminal_chat; "
        "run_terminal_chat(sys.argv[1], lines=True)"
    )
    command = f"yes | {sys.executable} -c '{code}' {chatbot} | head -c 5"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=120,
    )
    assert len(done.stdout) == 5
    assert done.stderr == b""


def test_the_speed_line_says_how_fast_and_whether_the_reply_was_cut() -> None:
    speed = Speed(
        prompt_tokens=9, first_token_seconds=0.123, new_tokens=48, tokens_per_second=61.28
    )
    assert speed_line(speed) == "48 tokens, 61.3 tokens/s, the first after 0.12 s"
    assert speed_line(speed, "end of turn") == speed_line(speed)
    assert speed_line(speed, "max_new_tokens").endswith(", cut short at max_new_tokens")
    assert speed_line(speed, "context").endswith(", the context is full")
    one = Speed(prompt_tokens=9, first_token_seconds=2, new_tokens=1, tokens_per_second=0)
    assert speed_line(one, "interrupted") == "1 token, the first after 2.00 s, interrupted"


def test_an_interrupt_while_a_piece_is_printed_ends_the_reply(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)
    typed, printed = iter(["Hello", "/quit"]), io.StringIO()
    console = Console(file=printed, width=200)

    def interrupt(*pieces: str, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(console, "out", interrupt)
    _TerminalChat(bot, "chatbot", console).run()
    assert bot.last_ending == "interrupted"
    assert len(bot.history) == 2
    assert "1 token, the first after" in printed.getvalue()
    assert ", interrupted" in printed.getvalue()


def test_control_characters_of_a_reply_do_not_reach_the_terminal(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could rename the window, or rewrite what is above."""
    bot = ChatBot(chatbot, settings=SETTINGS, threads=1)

    def reply(text: str) -> Iterator[str]:
        bot.last_speed = Speed(
            prompt_tokens=1, first_token_seconds=1, new_tokens=1, tokens_per_second=1
        )
        yield from ["\x1b]0;title\x07ab", "\x9b2J\r\x7fc\n\u00e9\U0001f600"]

    typed, printed = iter(["Hello", "/quit"]), io.StringIO()
    console = Console(file=printed, width=200, highlight=False)
    monkeypatch.setattr(bot, "reply", reply)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    _TerminalChat(bot, "chatbot", console).run()
    assert "]0;titleab2Jc\n\u00e9\U0001f600\n" in printed.getvalue()
    assert "\x1b" not in printed.getvalue()


# --- at a terminal --------------------------------------------------------------------------------


class Terminal:
    """A person at a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], keyboard: int) -> None:
        self.process = process
        self.screen = ""
        self._keyboard = keyboard

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read the screen up to a pattern, and take what was read off it."""
        until = time.monotonic() + seconds
        while (found := re.search(pattern, self.screen)) is None:
            assert time.monotonic() < until, f"no {pattern!r} in {self.screen[-500:]!r}"
            ready, _, _ = select.select([self._keyboard], [], [], 0.1)
            if ready:
                try:
                    self.screen += os.read(self._keyboard, 65536).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.screen), self.screen[-500:]
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C and read up to a pattern; again if it fell where Python drops it."""
        for _ in range(12):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, seconds=5)
        raise AssertionError(f"Ctrl-C does nothing: {self.screen[-500:]!r}")

    def leave(self) -> int:
        """Press Ctrl-D; again if it fell between two readings of the keyboard."""
        for _ in range(30):
            self.type("\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=1)
        raise AssertionError("Ctrl-D does not end the chat")


@pytest.fixture
def terminal(chatbot: Path, tmp_path: Path) -> Iterator[Terminal]:
    keyboard, other_end = pty.openpty()
    code = (
        # Whoever starts the tests in the background may have had SIGINT ignored for all below.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from mistill.chat.bot import ChatSettings;"
        "from mistill.chat.terminal_chat import run_terminal_chat as run;"
        "run(sys.argv[1], threads=1,"
        " settings=ChatSettings(temperature=0, max_new_tokens=50_000, stop=('never',)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(chatbot)],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(other_end)
    try:
        yield Terminal(process, keyboard)
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_a_person_chats_interrupts_saves_and_leaves(terminal: Terminal, tmp_path: Path) -> None:
    banner = terminal.wait_for("> ")
    assert "chatbot: /help for help, Ctrl-C stops a reply, Ctrl-D leaves" in banner
    terminal.type("Hello\n")
    terminal.wait_for("Hello\r\n")
    terminal.wait_for(r"(?s).{200}")  # some of the reply
    line = terminal.interrupt(r"(?s)\d+ tokens, .*> ")
    assert "interrupted" in line
    assert "tokens/s, the first after" in line.replace("\r\n", " ")
    terminal.type("/sing\n")
    assert "there is no command /sing" in terminal.wait_for("lists them").replace("\r\n", " ")
    terminal.type("/save chat.jsonl\n")
    terminal.wait_for("Saved to chat.jsonl")
    messages = json.loads((tmp_path / "chat.jsonl").read_text("utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"]
    terminal.type('"""\n')
    terminal.wait_for(r"\.\.\. ")
    terminal.type("First line\n")
    terminal.wait_for(r"\.\.\. ")
    terminal.type('second line"""\n')
    terminal.wait_for(r"(?s)second line.{100}")
    terminal.interrupt(r"(?s)\d+ tokens, .*> ")
    terminal.type("/save two.jsonl\n")
    terminal.wait_for("Saved to two.jsonl")
    messages = json.loads((tmp_path / "two.jsonl").read_text("utf-8"))["messages"]
    assert messages[2]["content"] == "First line\nsecond line"
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.type("/help\n")
    terminal.wait_for("/save FILE")
    terminal.wait_for("> ")
    terminal.interrupt("> ")  # at the prompt it only clears the line
    assert terminal.leave() == 0
