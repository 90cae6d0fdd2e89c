"""/v1/completions and the routes about tokens, against the model and the vocabulary in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistill.chat.stream_text import TextStream
from mistill.engine.onnx_model import OnnxModel
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.mistill.serve.running import RunningServer
from tests.tiny import SENTENCES


@pytest.fixture(scope="module")
def model(chatbot: Path) -> OnnxModel:
    return OnnxModel(chatbot, threads=1)


@pytest.fixture(scope="module")
def vocabulary(chatbot: Path) -> Vocabulary:
    return load_vocabulary(chatbot)


def log_softmax(model: OnnxModel, ids: list[int]) -> np.ndarray[Any, Any]:
    """The definition, in float64: shape (T, V)."""
    logits = model.logits(np.array([ids]))[0].astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    scores: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return scores


def complete(server: RunningServer, prompt: Any, **fields: Any) -> Any:
    answer = server.ask("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
    assert answer.status == 200, answer.content
    return answer.json


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_prompts_are_scored_as_the_model_scores_them(
    server: RunningServer, model: OnnxModel, vocabulary: Vocabulary, max_tokens: int
) -> None:
    prompts = [vocabulary.encode(sentence) for sentence in SENTENCES[:3]]
    prompts.append((prompts[0] + prompts[1]) * 4)  # more than one chunk
    answer = complete(server, prompts, echo=True, logprobs=3, max_tokens=max_tokens, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        expected = log_softmax(model, ids)
        got = choice["logprobs"]
        assert len(got["tokens"]) == len(ids) + max_tokens
        assert got["token_logprobs"][0] is None
        assert got["top_logprobs"][0] is None
        rows = np.arange(len(ids) - 1)
        np.testing.assert_allclose(
            got["token_logprobs"][1 : len(ids)], expected[rows, ids[1:]], rtol=1e-5, atol=1e-5
        )
        for row in rows:
            value, top = got["token_logprobs"][row + 1], got["top_logprobs"][row + 1]
            # How lm-evaluation-harness sees whether greedy decoding would write the token.
            assert (value == max(top.values())) == (expected[row].argmax() == ids[row + 1])
        assert choice["text"].startswith(vocabulary.decode(ids))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == max_tokens * 4


def test_a_greedy_completion_is_what_the_model_streams(
    server: RunningServer, model: OnnxModel, vocabulary: Vocabulary
) -> None:
    ids = vocabulary.encode(SENTENCES[0])
    stream = model.stream(ids)
    expected: list[int] = []
    while len(expected) < 12 and (token := next(stream)) not in vocabulary.end_ids:
        expected.append(token)
    stream_text = TextStream(vocabulary, every_byte=True)
    text = "".join(map(stream_text.add, expected)) + stream_text.finish()
    for prompt in (SENTENCES[0], ids, [SENTENCES[0]], [ids, ids]):
        for choice in complete(server, prompt, max_tokens=12)["choices"]:
            assert choice["text"] == text
    streamed = server.ask(
        "/v1/completions",
        {"prompt": [ids, ids], "max_tokens": 12, "temperature": 0, "stream": True, "logprobs": 1},
    ).events
    for index in (0, 1):
        own = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in own) == text
        assert own[-1]["finish_reason"] in ("stop", "length")


def test_log_probabilities_of_chat_spell_bytes_and_agree_with_the_model(
    server: RunningServer, model: OnnxModel, vocabulary: Vocabulary
) -> None:
    answer = server.chat(SENTENCES[5], logprobs=True, top_logprobs=2, max_tokens=6).json
    entries = answer["choices"][0]["logprobs"]["content"]
    prompt = server.ask(
        "/tokenize", {"messages": [{"role": "user", "content": SENTENCES[5]}]}
    ).json["tokens"]
    stream = model.stream(prompt)
    written = [next(stream) for _ in entries]
    expected = log_softmax(model, prompt + written)[len(prompt) - 1 :]
    for row, (token, entry) in enumerate(zip(written, entries, strict=True)):
        assert bytes(entry["bytes"]) == vocabulary.token_bytes(token)
        assert entry["logprob"] == pytest.approx(expected[row, token], abs=1e-4)
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_tokens_and_texts_are_those_of_the_vocabulary(
    server: RunningServer, vocabulary: Vocabulary
) -> None:
    for sentence in SENTENCES:
        ids = vocabulary.encode(sentence)
        answer = server.ask("/tokenize", {"prompt": sentence, "return_token_strs": True}).json
        assert answer["tokens"] == ids
        assert answer["count"] == len(ids) == len(answer["token_strs"])
        assert server.ask("/detokenize", {"tokens": ids}).json == {"prompt": sentence}
    info = server.ask("/tokenizer_info").json
    assert info["eos_token"] == "<|im_end|>"
    assert info["chat_template"] == vocabulary.chat_template
