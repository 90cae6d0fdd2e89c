"""/v1/chat/completions against the chatbot in process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mistill
from mistill.chat.bot import ChatBot
from mistill.serve.running import open_served
from mistill.serve.settings import Limits, ServeSettings
from tests.mistill.serve.running import RunningServer, running


@pytest.fixture(scope="module")
def bot(chatbot: Path) -> ChatBot:
    return ChatBot(chatbot, temperature=0, max_new_tokens=24, threads=1)


def reply(bot: ChatBot, text: str) -> str:
    bot.reset()
    return "".join(bot.reply(text))


@pytest.mark.parametrize(
    "question", ["Hello", "What is the weather like today?", "\u314e\U0001f600"]
)
def test_a_greedy_reply_is_that_of_the_chatbot(
    server: RunningServer, bot: ChatBot, question: str
) -> None:
    expected = reply(bot, question)
    whole = server.chat(question, max_tokens=24)
    assert whole.text == expected
    stream = server.chat(question, max_tokens=24, stream=True)
    pieces = [event["choices"][0]["delta"].get("content", "") for event in stream.events]
    assert "".join(pieces) == expected


def test_a_stream_has_the_shape_that_openai_documents(server: RunningServer) -> None:
    answer = server.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *middle, last, usage = answer.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in (first, *middle, last))
    assert all(event["choices"][0]["finish_reason"] is None for event in (first, *middle))
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert len({event["id"] for event in answer.events}) == 1
    assert {event["object"] for event in answer.events} == {"chat.completion.chunk"}


def test_the_package_can_be_called(chatbot: Path) -> None:
    with running(chatbot) as server:
        assert server.ask("/v1/models").json["data"][0]["id"] == "tiny-bot"
    assert callable(mistill.serve)


def test_a_request_that_does_not_say_how_is_sampled_as_the_chatbot_says_itself(
    chatbot: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(chatbot, tmp_path / "bot")
    (copy / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.2})
    )
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["generation_config.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    settings = ServeSettings(top_k=7, repetition_penalty=1.3)
    served = open_served(copy, settings, Limits())
    served.scheduler.close()
    served.workers.close()
    sampling = served.sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.3, 7, 1.3)
