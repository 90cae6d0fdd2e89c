"""A teacher behind a server writes the same file as one in this process."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import distill
import export
from mistill.cli import main
from mistill.remote import chat_server
from tests.mistill.serve.running import running
from tests.scripted_server import Answer, Start, scripted
from tests.tiny import SENTENCES, SPECIAL_TOKENS, tiny_model

__all__ = ["scripted"]


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    source = tiny_model(folder / "model", seed=2)
    return export.to_onnx(source, folder / "tiny-bot", parity_positions=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{sentence} {n}\n" for n in range(5) for sentence in SENTENCES[:4]))
    return file


def said(body: dict[str, Any], reason: str = "stop") -> Answer:
    text = f"You said: {body['messages'][-1]['content']}"
    return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the teacher would have waited; it does not."""
    seconds: list[float] = []
    monkeypatch.setattr(chat_server, "_wait", seconds.append)
    return seconds


def test_the_file_is_that_of_the_teacher_in_process(
    chatbot: Path, prompts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": 12,
        "keep_unfinished": True,
        "system": "Be kind.",
    }
    here = distill.generate_conversations(chatbot, prompts, tmp_path / "here.jsonl", **options)
    # As it comes, the server would sample with the chatbot's own penalties.
    with running(chatbot, repetition_penalty=1.0, dry_multiplier=0.0) as server:
        there = distill.generate_conversations(
            "tiny-bot",
            prompts,
            tmp_path / "there.jsonl",
            server=f"http://127.0.0.1:{server.port}/v1",
            **options,
        )
    # A server sends no special tokens; a model with random weights writes them anywhere.
    expected = [json.loads(line) for line in here.read_text("utf-8").splitlines()]
    for row in expected:
        reply = row["messages"][-1]
        reply["content"] = re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", reply["content"])
    lines = there.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert lines[0] == json.dumps(expected[0], ensure_ascii=False)


def test_requests_that_fail_are_sent_again_and_others_go_on(
    scripted: Start, prompts: Path, tmp_path: Path, waits: list[float]
) -> None:
    tried: Counter[str] = Counter()

    def answer(body: dict[str, Any], number: int) -> Answer:
        question = body["messages"][-1]["content"]
        tried[question] += 1
        if tried[question] == 1 and number % 3 == 0:
            return 429, {"Retry-After": "7"}, {"error": {"message": "busy"}}
        if tried[question] < 3 and number % 3 == 1:
            return 503, {}, b"<html>bad gateway</html>"
        if tried[question] == 1 and number % 3 == 2:
            return 503, {}, {"error": "down", "retry_after": "soon"}
        return said(body)

    server = scripted(answer)
    file = distill.generate_conversations(
        "big", prompts, tmp_path / "out.jsonl", server=server.url, batch_size=4
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = prompts.read_text().splitlines()
    assert [row["messages"][0]["content"] for row in rows] == lines
    assert [row["messages"][1]["content"] for row in rows] == [
        f"You said: {line}" for line in lines
    ]
    assert server.most_at_once <= 4
    assert 7.0 in waits
    assert len({body["seed"] for body in server.bodies}) == len(lines)
    assert server.keys == [None] * len(server.bodies)


def test_an_interrupted_run_asks_only_for_what_is_missing(
    scripted: Start, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(body: dict[str, Any], number: int) -> Answer:
        return said(body) if number <= 9 else (500, {}, {"error": {"message": "on fire"}})

    target = str(tmp_path / "out.jsonl")
    words = ["generate", "big", str(prompts), target, "--batch-size", "2", "--server"]
    broken = scripted(breaks)
    assert main([*words, broken.url]) == 2
    message = capsys.readouterr().err
    assert "on fire" in message
    assert "same command" in message
    done = {body["messages"][-1]["content"] for body in broken.bodies[:9]}
    whole = scripted(lambda body, number: said(body))  # the same model at another address
    assert main([*words, whole.url]) == 0
    assert len(whole.bodies) == 20 - 9
    assert not done & {body["messages"][-1]["content"] for body in whole.bodies}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("refused", ["top_k", "min_p"])
def test_sampling_that_a_server_does_not_know_is_left_out(
    scripted: Start, prompts: Path, tmp_path: Path, refused: str
) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        if refused in body:
            return 400, {}, {"error": {"message": f"Unrecognized argument: {refused}"}}
        return said(body)

    server = scripted(answer)
    distill.generate_conversations("big", prompts, tmp_path / "out.jsonl", server=server.url)
    assert "temperature" in server.bodies[-1]


def test_a_key_goes_to_the_server_and_unfinished_replies_are_dropped(
    scripted: Start, prompts: Path, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return said(body, "length" if "weather" in body["messages"][-1]["content"] else "stop")

    key = tmp_path / "key"
    key.write_text("sk-secret\n")
    server = scripted(answer)
    file = distill.generate_conversations(
        "big", prompts, tmp_path / "out.jsonl", server=server.url, api_key_file=key
    )
    assert set(server.keys) == {"Bearer sk-secret"}
    assert len(file.read_text().splitlines()) == 15


@pytest.mark.parametrize(
    ("model", "url", "words"),
    [
        ("small", "{url}", "no model small; it has big"),
        ("big", "{url}/no/such/path?x=1", "server must be an address"),
        ("big", "ftp://x", "server must be an address"),
        ("big", "http://user:pass@x/", "server must be an address"),
        ("big", "http://127.0.0.1:1", "does not answer"),
        ("big", "http://[", "server must be an address"),
    ],
)
def test_a_server_that_cannot_be_asked_is_refused_in_one_line(
    scripted: Start,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    url: str,
    words: str,
) -> None:
    server = scripted(lambda body, number: said(body))
    named = url.format(url=server.url)
    target = tmp_path / "out.jsonl"
    assert main(["generate", model, str(prompts), str(target), "--server", named]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize(
    "answer",
    [
        (400, {}, {"error": {"message": "too long"}}),
        (200, {}, {"choices": []}),
        (200, {}, b"nonsense"),
        (302, {"Location": "http://evil.example/"}, b""),
    ],
)
def test_an_answer_that_is_none_ends_the_run_in_one_line(
    scripted: Start,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
) -> None:
    server = scripted(lambda body, number: answer)
    target = tmp_path / "out.jsonl"
    assert main(["generate", "big", str(prompts), str(target), "--server", server.url]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not target.exists()
