"""Random bodies: no answer is an error of the server's, and the engine lives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mistill.serve.requests import ChatRequest, CompletionRequest, TokenizeRequest
from tests.mistill.serve.running import RunningServer, running

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
NAMES = sorted(
    {
        *ChatRequest.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *TokenizeRequest.__struct_fields__,
        *("tokens", "unknown", "audio", "suffix", "best_of"),
    }
)
text = st.text(max_size=20) | st.sampled_from(
    ["", "user", "system", "assistant", "tool", "text", "json_schema", "regex", "lark", "required"]
)
numbers = (
    st.integers(-5, 400)
    | st.integers()
    | st.floats(-3, 3)
    | st.floats()
    | st.sampled_from([0, 1, 2**31, 2**63, -1, 1e300])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": text, "content": text | values},
        optional={"name": text, "tool_calls": values, "tool_call_id": values, "extra": values},
    ),
    max_size=4,
)
schemas = st.recursive(
    st.sampled_from([{}, True, {"type": "string"}, {"type": "integer"}, {"enum": [1, "a"]}]),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array", "string", "number", "x"]),
            "properties": st.dictionaries(text, inner, max_size=3),
            "items": inner,
            "anyOf": st.lists(inner, max_size=3),
            "not": inner,
            "pattern": text,
            "required": st.lists(text, max_size=2),
            "minLength": numbers,
            "$ref": text,
        },
    ),
    max_leaves=6,
)
forms = values | st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": schemas})}
)
# Each field holds what it should, or almost, or anything.
fields: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(NAMES, values)
fields |= {
    "messages": messages | values,
    "prompt": text | st.lists(st.integers(-2, 400), max_size=9) | values,
    "tokens": st.lists(st.integers(-2, 400), max_size=9) | values,
    "response_format": forms,
    "max_tokens": st.integers(-1, 12) | values,
    "max_completion_tokens": st.integers(1, 12) | values,
    "logit_bias": st.dictionaries(st.integers(-2, 400).map(str), numbers, max_size=4) | values,
    "stream": st.booleans(),
    "n": st.integers(1, 3) | values,
}
sound = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "Hi"}]), "max_tokens": st.integers(1, 4)}
)
bodies = st.one_of(
    st.fixed_dictionaries({}, optional=fields).map(lambda body: {"max_tokens": 3, **body}),
    st.tuples(sound, st.sampled_from(NAMES), values).map(lambda p: {**p[0], p[1]: p[2]}),
    st.tuples(
        sound,
        st.sampled_from(sorted(fields)).flatmap(
            lambda name: st.tuples(st.just(name), fields[name])
        ),
    ).map(lambda p: {**p[0], p[1][0]: p[1][1]}),
)


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


damaged = st.tuples(bodies, st.integers(0, 10**6), st.binary(max_size=3)).map(
    lambda p: (lambda b, at: b[: at % len(b)] + p[2] + b[at % len(b) + 1 :])(encoded(p[0]), p[1])
)


def check(server: RunningServer, path: str, content: bytes) -> None:
    answer = server.ask(path, content)
    assert answer.status < 500, (answer.status, answer.content)
    if answer.status != 200:
        assert answer.status in (400, 404, 413, 415)
        assert answer.error["message"]
        assert len(answer.content) < 3000
    assert answer.content.count(b'"error":{') <= 1
    assert b"/tmp/" not in answer.content or b"/tmp/" in content


FEW, MANY = (
    settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for number in (200, 10_000)
)


@seed(0)
@FEW
@given(path=st.sampled_from(PATHS), content=bodies.map(encoded) | damaged | st.binary(max_size=40))
def test_random_bodies_are_answered_or_refused(
    server: RunningServer, path: str, content: bytes
) -> None:
    check(server, path, content)


@pytest.mark.slow
def test_ten_thousand_random_bodies_are_answered_or_refused(chatbot: Path) -> None:
    with running(chatbot) as server:

        @seed(1)
        @MANY
        @given(path=st.sampled_from(PATHS), content=bodies.map(encoded) | damaged)
        def every(path: str, content: bytes) -> None:
            check(server, path, content)

        every()
        assert server.ask("/health").status == 200
        assert server.chat().status == 200
        assert "failed" not in server.app.served.scheduler.statistics().endings


def test_the_engine_lives_after_the_random_bodies(server: RunningServer) -> None:
    assert server.ask("/health").status == 200
    assert server.chat().status == 200
