"""A judge behind a server: its probabilities, its letters, and what goes wrong."""

from __future__ import annotations

import json
import math
import re
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import export
from benchmarks import JudgeSettings, judge_replies
from benchmarks.judging.letters import Letters, ModelJudge
from benchmarks.judging.server_judge import letters_among
from mistill.cli.app import main
from mistill.errors import SettingsError
from mistill.text.conversation import Conversation
from tests.mistill.serve.running import running
from tests.scripted_server import Answer, Start, scripted
from tests.tiny import SENTENCES, changed_tensors, tiny_model

__all__ = ["scripted"]


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chatbot that nearly always begins with A or B."""
    folder = tmp_path_factory.mktemp("server-judge")
    plain = tiny_model(folder / "plain", seed=7, max_position_embeddings=2048)
    words = json.loads((plain / "tokenizer.json").read_text())["model"]["vocab"]

    def likely(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][:, 0] = 4.0
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor *= 0.1
        for letter in "AB":
            tensors["lm_head.weight"][words[letter], 0] = 1.5

    model = changed_tensors(plain, folder / "model", likely)
    return export.to_onnx(model, folder / "letters", precision="float32", parity_positions=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in SENTENCES[:4]), "utf-8")
    return file


OPTIONS: dict[str, Any] = {"new_tokens": 6, "threads": 1}


def test_our_own_server_judges_as_the_chatbot_does_in_this_process(
    bot: Path, model: Path, teacher: Path, prompts: Path
) -> None:
    here = judge_replies(model, teacher, judge=bot, prompts=prompts, **OPTIONS)
    # As it comes, the server would sample with the chatbot's own repetition penalty.
    with running(bot, repetition_penalty=1.0) as server:
        url = f"http://127.0.0.1:{server.port}"
        there = judge_replies(model, teacher, prompts=prompts, server=url, **OPTIONS)
    assert there.judge == f"letters at {url}"
    assert (here.read_by, there.read_by) == ("probabilities", "probabilities")
    assert there.fingerprints == (*here.fingerprints[:2], None)
    assert len(there.verdicts.given) == len(here.verdicts.given) > 0
    for mine, other in zip(there.verdicts.given, here.verdicts.given, strict=True):
        assert mine.gains == pytest.approx(other.gains, abs=1e-3)
        assert mine.forward.probability == pytest.approx(other.forward.probability, abs=1e-3)
    assert there.figures["letters"] > 0.5
    assert not there.figures["letters_are_rare"]


def test_a_letter_has_the_probability_of_all_tokens_that_are_it() -> None:
    found = letters_among({"A": math.log(0.5), " A": math.log(0.25), "B\n": -3.0, "C": -4.0})
    assert found is not None
    assert found.first == pytest.approx(math.log(0.75))
    assert found.second == pytest.approx(-3.0)
    # One that is not listed is no likelier than the least likely that is.
    one = letters_among({"A": -0.1, "The": -5.0, "So": -6.0})
    assert one is not None
    assert one.first == pytest.approx(-0.1)
    assert one.second == -6.0
    assert letters_among({"The": -0.1, "a": -5.0}) is None


def replies_in(body: dict[str, Any]) -> list[str]:
    asked = body["messages"][-1]["content"]
    found = re.search(r"# Reply A\n\n(.*)\n\n# Reply B\n\n(.*)\n\n# Which", asked, re.DOTALL)
    assert found is not None
    return list(found.groups())


def longer(body: dict[str, Any], number: int) -> Answer:
    """A judge that likes the longer reply, and tells no probabilities."""
    one, other = replies_in(body)
    text = " A." if (len(one), one) > (len(other), other) else "**B**"
    return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def no_logprobs(body: dict[str, Any], number: int) -> Answer:
    if "logprobs" in body:
        return 400, {}, {"error": {"message": "logprobs is not supported"}}
    return longer(body, number)


@pytest.mark.parametrize("answer", [longer, no_logprobs])
def test_where_no_probabilities_are_told_the_written_letter_is_taken_and_named(
    answer: Any,
    scripted: Start,
    model: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, out = scripted(answer), tmp_path / "judged.json"
    words = ["bench", "judge", str(model), str(teacher), "--server", server.url, "--threads", "1"]
    words += ["--prompts", str(prompts), "--new-tokens", "6", "--out", str(out), "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "by the letters that it writes" in " ".join(printed.out.split())
    assert caplog.text.count("the letter that big writes at temperature 0 is taken") == 1
    document = json.loads(out.read_text("utf-8"))
    assert document["read_by"] == "letters"
    assert document["judge"] == f"big at {server.url}"
    assert document["agreement"] == 1.0
    assert document["letters"] is None
    wins = sum(
        (len(other), other) > (len(one), one)
        for one, other in (verdict["replies"] for verdict in document["verdicts"])
    )
    assert document["wins"] == wins
    assert all(body["temperature"] == 0 for body in server.bodies)
    assert json.loads(printed.out.splitlines()[-1])["read_by"] == "letters"


def test_a_key_is_sent_and_what_is_too_long_is_counted(
    scripted: Start, model: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        if SENTENCES[1] in body["messages"][-1]["content"]:
            return 400, {}, {"error": {"message": "the maximum context length is exceeded"}}
        if SENTENCES[2] in body["messages"][-1]["content"]:
            return 200, {}, {"choices": [{"message": {"content": "Both."}}]}
        return longer(body, number)

    server, key = scripted(answer), tmp_path / "key"
    key.write_text("sk-secret\n")
    found = judge_replies(
        *(model, teacher), prompts=prompts, server=server.url, api_key_file=key, **OPTIONS
    )
    assert set(server.keys) == {"Bearer sk-secret"}
    figures = found.figures
    assert (figures["pairs"], figures["too_long"], figures["unclear"]) == (2, 1, 1)


UNAUTHORIZED: Answer = (401, {}, {"error": {"message": "no key"}})
TWO: Answer = (200, {}, {"data": [{"id": "big"}, {"id": "small"}]})
NOT_FOUND: Answer = (404, {}, {"error": {"message": "no such model"}})


@pytest.mark.parametrize(
    ("more", "models", "answer", "words"),
    [
        ([], UNAUTHORIZED, None, "refuses to list its models: no key"),
        (["--server-model", "huge"], TWO, None, "has no model huge; it has big, small"),
        ([], TWO, None, "has big, small; name the one to ask"),
        ([], (200, {}, {}), None, "does not say which models it has; name the one to ask"),
        (["--server-model", "big"], TWO, NOT_FOUND, "no such model"),
        (["--server-model", "big"], TWO, (401, {}, {}), "no reason given"),
        (
            ["--server-model", "big"],
            TWO,
            (200, {}, {"choices": [{"message": {"content": "Both are\ngood."}}]}),
            "should answer with one letter, A or B, and says 'Both are good.'",
        ),
        (["--server-model", "big"], TWO, (200, {}, b"nonsense"), "and says ''; take another"),
    ],
)
def test_a_server_that_cannot_judge_is_one_line_and_leaves_no_file(
    more: list[str],
    models: Answer,
    answer: Answer | None,
    words: str,
    scripted: Start,
    model: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = scripted(lambda body, number: answer or longer(body, number), models)
    command = ["bench", "judge", str(model), str(teacher), "--server", server.url, *more]
    command += ["--prompts", str(prompts), "--new-tokens", "4", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path / "out.json")]) == 2
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "replies" not in line and "pairs" not in line and "is taken" not in line
    ]
    assert len(told) == 1
    assert words in told[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prompts.txt"]
    if answer is None:
        assert server.bodies == []


def test_a_server_that_is_not_there_is_given_five_seconds(
    model: Path, teacher: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[Any] = []

    def connect(self: HTTPConnection) -> None:
        seconds.append(self.timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(HTTPConnection, "connect", connect)
    with pytest.raises(SettingsError, match=r"http://10\.0\.0\.1:9 does not answer"):
        judge_replies(model, teacher, prompts=prompts, server="http://10.0.0.1:9", **OPTIONS)
    assert seconds == [5.0]


def test_one_judge_is_named_and_no_more(
    bot: Path, model: Path, teacher: Path, prompts: Path
) -> None:
    with pytest.raises(SettingsError, match=r"give one judge: .* none is given"):
        judge_replies(model, teacher, prompts=prompts)
    with pytest.raises(SettingsError, match=r"give one judge: .* both are given"):
        judge_replies(model, teacher, judge=bot, prompts=prompts, server="http://127.0.0.1:1")
    for name in ("server_model", "api_key_file"):
        given: dict[str, Any] = {name: Path("x")}
        with pytest.raises(SettingsError, match=f"{name} is for a judge behind a server"):
            JudgeSettings(**given)


def test_a_judge_that_would_say_something_else_is_warned_of(
    bot: Path,
    model: Path,
    teacher: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def letters(self: Any, prompt: Conversation, first: str, second: str) -> Letters:
        return Letters(math.log(0.2), math.log(0.1))

    monkeypatch.setattr(ModelJudge, "__call__", letters)
    found = judge_replies(model, teacher, judge=bot, prompts=prompts, **OPTIONS)
    assert found.to_dict()["letters_are_rare"] is True
    assert "the letters A and B together have a probability of 0.300" in caplog.text
