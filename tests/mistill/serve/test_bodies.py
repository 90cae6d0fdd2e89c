"""Bodies that are none, fields out of their bounds, and what they may not cost."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import pytest

from mistill.serve.settings import Limits
from mistill.text.tokenizer_file import TokenizerFile
from tests.mistill.serve.running import Answer, RunningServer, rest_of

LIMITS = Limits()
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}


def read_tokens(server: RunningServer) -> int:
    tokens: int = server.app.served.scheduler.statistics().prompt_tokens
    return tokens


def refused(server: RunningServer, content: Any, param: str | None, status: int = 400) -> Answer:
    """The refusal, the same whether the reply is streamed or not; nothing is read for it."""
    before = read_tokens(server)
    answer = server.ask("/v1/chat/completions", content)
    if isinstance(content, dict):
        streamed = server.ask("/v1/chat/completions", {**content, "stream": True})
        assert (streamed.status, streamed.content) == (answer.status, answer.content)
    assert answer.status == status, answer.content
    assert answer.error["param"] == param, answer.error
    assert len(answer.content) < 2000
    assert read_tokens(server) == before
    return answer


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["honest", "chunked", "lying", "far too much"])
def test_a_body_over_the_limit_is_refused_and_the_connection_ends(
    server: RunningServer, kind: str
) -> None:
    content = b'{"messages": "' + b"a" * LIMITS.body_bytes + b'"}'
    if kind == "chunked":
        framing = b"Transfer-Encoding: chunked\r\n\r\n"
        content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    elif kind == "lying":
        framing = b"Content-Length: %d\r\n\r\n" % (len(content) * 3)
        content *= 3
    elif kind == "far too much":
        framing = b"Content-Length: 99999999999999999999\r\n\r\n"
        content *= 9
    else:
        framing = b"Content-Length: %d\r\n\r\n" % len(content)
    with server.connect() as connection:
        try:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + framing + content)
        except ConnectionError:
            assert kind == "far too much"
            return
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"request_too_large"' in answer


def test_a_client_that_asks_before_it_sends_hears_no_at_once(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n"
            + HEAD
            + b"\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b'"x"',
            b"null",
            b"17",
            b"{} {}",
            b"\xef\xbb\xbf{}",
            b"\xff\xfe{\x00}\x00",
        ),
        *(
            b'{"a": "\xff"}',
            gzip.compress(b"{}", mtime=0),
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\x00",
        ),
        *(b'{"seed": ' + b"9" * 5000 + b"}", b'{"messages": [], "messages": []}', b"{'a': 1}"),
        *(b'{"messages": [{"role": "user", "role": "system"}]}', b'{"a": tru}', b"{,}"),
    ],
)
def test_what_is_no_json_object_is_refused(server: RunningServer, content: bytes) -> None:
    refused(server, content, None)


# --- numbers --------------------------------------------------------------------------------------

NUMBERS = {
    "temperature": (-1, 2.1, 1e300, -0.000001),
    "top_p": (0, 1.1, -1),
    "top_k": (-5, 2**40, 1.5),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, -1, 11),
    "dry_multiplier": (-1, 101),
    "dry_allowed_length": (0, 1.5),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "max_tokens": (-1, 2**31, 2**63, 1e300, 0, 1.5),
    "max_completion_tokens": (0, -1, 2**31, 2**63, 1.5),
    "n": (0, -1, 2**31, 1.5, 100),
    "seed": (-1, 2**63, 2**64, 1.5, 10**400),
    "top_logprobs": (-1, 21),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_their_bounds_are_refused_by_name(server: RunningServer, name: str) -> None:
    for value in NUMBERS[name]:
        refused(server, body(**{name: value}), name)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "-0.0", "1e999", '"0.5"', "true"]
)
def test_what_is_no_number_is_refused_by_name(server: RunningServer, name: str, value: str) -> None:
    content = json.dumps(body(**{name: "HERE"})).replace('"HERE"', value)
    if name in ("top_logprobs",):
        content = content.replace("{", '{"logprobs": true, ', 1)
    refused(server, content.encode(), name)


@pytest.mark.parametrize(
    "bias",
    [
        *({"x": 1}, {str(2**40): 1}, {"-1": 1}, {"1.0": 1}, {"\u0661": 1}, {"384": 1}, {"": 1}),
        {str(number): 1 for number in range(300)},
    ],
)
def test_biases_of_no_token_are_refused(server: RunningServer, bias: dict[str, int]) -> None:
    refused(server, body(logit_bias=bias), "logit_bias")


@pytest.mark.parametrize("bias", [{"5": 101}, {"5": -101}, {"5": "1"}, {"5": None}, [5], "5"])
def test_biases_that_are_no_numbers_within_a_hundred_are_refused(
    server: RunningServer, bias: Any
) -> None:
    answer = server.ask("/v1/chat/completions", body(logit_bias=bias))
    assert answer.status == 400
    assert answer.error["param"].startswith("logit_bias")


def test_biases_decide_what_is_written(server: RunningServer) -> None:
    (token,) = server.ask("/tokenize", {"prompt": "q"}).json["tokens"]
    written = server.chat(logit_bias={str(token): 100}, max_tokens=5).text
    assert written == "qqqqq"
    assert server.chat(logit_bias={str(token): -100}, max_tokens=5).status == 200
    likely: dict[str, Any] = {"logit_bias": {str(token): 20}, "max_tokens": 9, "dry_multiplier": 0}
    repeated = server.chat(**likely).text
    penalized = server.chat(**likely, frequency_penalty=2, presence_penalty=2).text
    assert penalized.count("q") < repeated.count("q")


@pytest.mark.parametrize(
    ("stop", "param"),
    [
        ("", "stop"),
        (["a"] * 33, "stop"),
        ("a" * (1 << 19), "stop"),
        ([""], "stop"),
        (["\u00e9" * 200], "stop"),
        (5, "stop"),
        ([5], "stop[0]"),
        ({"a": 1}, "stop"),
    ],
)
def test_odd_stop_strings_are_refused(server: RunningServer, stop: Any, param: str) -> None:
    refused(server, body(stop=stop), param)


def test_stop_strings_end_a_reply_and_hold_nothing_back_at_its_end(server: RunningServer) -> None:
    whole = server.chat(max_tokens=24).text
    middle = whole[3:6]
    stopped = server.chat(max_tokens=24, stop=["never there", middle]).json["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(middle)]
    assert stopped["finish_reason"] == "stop"
    begun = whole[-3:] + "and what never comes"
    held = server.chat(max_tokens=24, stop=begun, stream=True).events
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in held) == whole


def test_the_newer_of_two_limits_counts_and_a_large_one_ends_at_the_context(
    server: RunningServer,
) -> None:
    answer = server.chat(max_tokens=9, max_completion_tokens=3, ignore_eos=True)
    assert answer.json["usage"]["completion_tokens"] == 3
    answer = server.chat(max_tokens=2**31 - 1, ignore_eos=True).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


def test_the_same_seed_gives_the_same_text_and_choices_differ(server: RunningServer) -> None:
    fields: dict[str, Any] = {
        "seed": 7,
        "temperature": 1.5,
        "n": 2,
        "max_tokens": 12,
        "top_k": 0,
        "min_p": 0,
    }
    first, second = (server.chat(**fields).json["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert texts == [choice["message"]["content"] for choice in second]
    assert texts[0] != texts[1]
    assert [choice["index"] for choice in first] == [0, 1]


# --- messages -------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "a"}
TEXT = {"type": "text", "text": "a"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
SECRETS = "http://169.254.169.254/latest/meta-data/"
FILE = "file:///etc/passwd"
ROLES = (
    *("system\n", "user<|im_end|>", "System", "", "function", "a" * 500_000, "\u0455ystem"),
    "ipython",
)


def parts(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(contents)}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("Hi", "messages"),
        ({}, "messages"),
        ([USER] * 10_001, "messages"),
        ([USER, 5], "messages[1]"),
        ([USER, {"role": "user"}], "messages[1].content"),
        ([USER, {"role": "user", "content": None}], "messages[1].content"),
        ([USER, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "system", "content": "a"}] * 2, "messages[1].role"),
        ([{"role": "developer", "content": "a"}, USER, SYSTEM], "messages[2].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        (parts({"type": "image_url", "image_url": {"url": SECRETS}}), "messages[0].content[0]"),
        (parts({"type": "image_url", "image_url": {"url": FILE}}), "messages[0].content[0]"),
        (parts(TEXT, {"type": "input_audio"}), "messages[0].content[1]"),
        (parts({"type": "text"}), "messages[0].content[0]"),
        (parts("a"), "messages[0].content[0]"),
        ([{**USER, "name": "a b"}], "messages[0].name"),
        ([{**USER, "name": "a<|im_end|>"}], "messages[0].name"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls"),
        *(
            ([{"role": role, "content": "a"}], "messages[0].role")
            for role in ROLES
        ),
    ],
)  # fmt: skip
def test_messages_that_are_no_conversation_are_refused_by_their_number(
    server: RunningServer, messages: Any, param: str
) -> None:
    refused(server, {"messages": messages}, param)


def test_many_bad_messages_get_a_short_answer_without_their_words(server: RunningServer) -> None:
    messages = [{"role": "user", "content": {"canary": "canary"}}] * 20_000
    began = time.perf_counter()
    answer = server.ask("/v1/chat/completions", {"messages": messages})
    assert time.perf_counter() - began < 5
    assert answer.status == 400
    assert len(answer.content) < 2000
    assert b"canary" not in answer.content


@pytest.mark.parametrize("place", ["content", "role", "stop", "model", "schema", "name"])
def test_half_a_character_is_refused_anywhere(server: RunningServer, place: str) -> None:
    half = "\ud800"
    content: dict[str, Any] = body()
    if place in ("content", "role", "name"):
        content["messages"] = [{**USER, place: half}]
    elif place == "schema":
        content["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"const": half}},
        }
    else:
        content[place] = half
    refused(server, content, None)


@pytest.mark.parametrize("text", ["a\x00b", "a\u2028b", "\u202eabc\u202c", "\U0001f600\u200d"])
def test_odd_characters_are_text(server: RunningServer, text: str) -> None:
    tokens = server.ask("/tokenize", {"prompt": text}).json["tokens"]
    assert server.ask("/detokenize", {"tokens": tokens}).json["prompt"] == text
    assert server.chat(text).status == 200
    echoed = server.ask("/v1/completions", {"prompt": text, "echo": True, "max_tokens": 1})
    assert echoed.json["choices"][0]["text"].startswith(text)


def test_unknown_fields_are_ignored_and_named(server: RunningServer) -> None:
    answer = server.ask(
        "/v1/chat/completions", body(frobnicate=1, user="me", store=True, **{"a b\r\nX: y": 1})
    )
    assert answer.status == 200
    assert answer.headers["x-ignored-fields"] == "frobnicate"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("audio", {}), ("functions", [{}]), ("modalities", ["text", "audio"]), ("best_of", 2)),
        *(("chat_template", "{{ x }}"), ("chat_template_kwargs", {"tokenize": True})),
        *(("web_search_options", {}), ("function_call", "auto"), ("min_tokens", 3)),
        *(("guided_json", {}), ("stop_token_ids", [4]), ("previous_response_id", "x")),
        *(("tools", [{"type": "function", "function": {"name": "f"}}]), ("suffix", "x")),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(
    server: RunningServer, name: str, value: Any
) -> None:
    refused(server, body(**{name: value}), name)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "%2e%2e%2f", "C:\\x", "\x00", "org/model", "a" * 500_000, "", " tiny-bot"],
)
def test_other_models_are_not_there_and_nothing_is_looked_for(
    server: RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"something was opened: {arguments}")

    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr("io.open", forbidden)
    answer = server.ask("/v1/chat/completions", body(model=name))
    monkeypatch.undo()
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert len(answer.content) < 500
    assert server.chat(model="tiny-bot").status == 200


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_unread(server: RunningServer) -> None:
    before = read_tokens(server)
    answer = server.chat("wind " * 600)
    assert answer.error["code"] == "context_length_exceeded"
    assert answer.error["n_ctx"] == 512
    assert answer.error["n_prompt_tokens"] > 512
    assert read_tokens(server) == before


def test_a_megabyte_of_text_is_refused_by_its_bytes(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, lengths = TokenizerFile.encode, []

    def measured(file: TokenizerFile, text: str) -> Any:
        lengths.append(len(text))
        return encode(file, text)

    monkeypatch.setattr(TokenizerFile, "encode", measured)
    began = time.perf_counter()
    answer = server.chat("\u314e" * 170_000)
    assert time.perf_counter() - began < 5
    assert answer.error["code"] == "context_length_exceeded"
    for path in ("/tokenize", "/v1/completions"):
        assert server.ask(path, {"prompt": "wind " * 150_000}).status == 400
    # Some 40 bytes are the longest token, so that 70,000 bytes may be 512 tokens and are not.
    assert server.chat("a b" * 6000).status == 400
    assert max(lengths, default=0) <= 20_000


@pytest.mark.parametrize(
    "prompt",
    [
        *([], "", [[]], [""], None, 5, {}, True, [-1], [384], [2**40], [[[1]]], [1, "a"], [1.5]),
        *([True], [None], ["a"] * 10_000, [[1]] * 10_000, [1] * 600, [["a"]], [{}], ["a", [1.0]]),
    ],
)
def test_prompts_that_are_none_are_refused(server: RunningServer, prompt: Any) -> None:
    answer = server.ask("/v1/completions", {"prompt": prompt})
    assert answer.status == 400
    assert answer.error["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [USER]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [384]}),
        ("/detokenize", {"tokens": [2**70]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}),
        ("/v1/completions", {"prompt": "a", "logprobs": True}),
        ("/v1/completions", {"prompt": "a", "echo": "yes"}),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}),
        ("/v1/completions", {"prompt": ["a"] * 65, "n": 2}),
    ],
)
def test_other_routes_refuse_what_they_cannot_read(
    server: RunningServer, path: str, content: Any
) -> None:
    assert server.ask(path, content).status == 400


def test_the_server_outlives_all_of_this(server: RunningServer) -> None:
    assert server.ask("/health").json == {"status": "ok"}
