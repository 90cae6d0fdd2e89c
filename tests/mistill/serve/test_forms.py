"""Replies of a form: JSON schemas, expressions, grammars, calls of tools."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistill.serve.tool_calls import CallReader, Form
from tests.mistill.serve.running import RunningServer, running, with_template

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "age": {"title": "Age", "type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["age", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PERSON}},
    {"type": "function", "function": {"name": "no_arguments"}},
]
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call>...</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + "
    "'\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = HERMES.replace("<tool_call>\\n", "[TOOL_CALLS]").replace("<tool_call>", "[TOOL_CALLS]")


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.fixture(scope="module", params=["hermes", "mistral"])
def with_tools(
    request: pytest.FixtureRequest, chatbot: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("tools") / request.param
    with_template(chatbot, folder, HERMES if request.param == "hermes" else MISTRAL)
    with running(folder) as one:
        yield one


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_replies_fit_their_schema(server: RunningServer, stream: bool) -> None:
    for seed in range(3):
        answer = server.chat(
            response_format=form(PERSON), max_tokens=60, temperature=1, seed=seed, stream=stream
        )
        if stream:
            deltas = [event["choices"][0]["delta"] for event in answer.events]
            text = "".join(delta.get("content", "") for delta in deltas)
        else:
            text = answer.text
        person = json.loads(text)
        assert 0 <= person["age"] <= 9
        assert person["kind"] in ("cat", "dog")


def test_replies_match_expressions_and_grammars(server: RunningServer) -> None:
    pattern = "[0-9]{3}-(cat|dog)"
    text = server.chat(response_format={"type": "regex", "regex": pattern}, max_tokens=30).text
    assert re.fullmatch(pattern, text)
    grammar = 'start: "a" ("b" | "c") "!"'
    text = server.chat(response_format={"type": "lark", "lark": grammar}, max_tokens=30).text
    assert text in ("ab!", "ac!")
    raw = {"prompt": "The", "response_format": {"type": "regex", "regex": pattern}}
    answer = server.ask("/v1/completions", {**raw, "max_tokens": 30}).json["choices"][0]
    assert re.fullmatch(pattern, answer["text"])


def test_any_json_object_is_one_object(server: RunningServer) -> None:
    answer = server.chat(
        response_format={"type": "json_object"}, max_tokens=400, logit_bias={}, temperature=0
    ).json["choices"][0]
    assert answer["message"]["content"].startswith("{")
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)


def test_a_form_that_needs_more_tokens_than_there_are_ends_by_length(
    server: RunningServer,
) -> None:
    long = {"type": "string", "minLength": 200}
    answer = server.chat(response_format=form(long), max_tokens=5).json["choices"][0]
    assert answer["finish_reason"] == "length"
    assert answer["message"]["content"].startswith('"')


REFS: dict[str, Any] = {"$ref": "#/$defs/d0", "$defs": {}}
for _number in range(1000):
    REFS["$defs"][f"d{_number}"] = {"$ref": f"#/$defs/d{_number + 1}"}
REFS["$defs"]["d1000"] = {"const": 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"(a+)+$": {"const": 1}}},
        {"description": "a" * 500_000},
        REFS,
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "http://169.254.169.254/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"not": {"type": "string"}},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "nonsense"},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"enum": []},
        False,
        [],
        "string",
        5,
    ],
)
def test_hostile_schemas_never_give_a_reply_without_its_form(
    server: RunningServer, schema: Any
) -> None:
    began = time.monotonic()
    answer = server.chat(response_format=form(schema), max_tokens=4)
    assert time.monotonic() - began < 20
    if answer.status == 200:  # a form that can be kept to, and is
        text = answer.text
        assert text.startswith(("{", '"', "[", "1"))
    else:
        assert answer.status == 400
        assert answer.error["param"].startswith("response_format")
        assert len(answer.content) < 2000
    assert server.ask("/health").status == 200


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "nonsense"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": 5},
        {"type": "regex"},
        {"type": "regex", "regex": "["},
        {"type": "regex", "regex": "(a{1000}){1000}"},
        {"type": "lark", "lark": "start: "},
        {"type": "lark", "lark": 'start: start "a"'},
        {"type": 5},
        {},
        "json",
    ],
)
def test_forms_that_are_none_are_refused(server: RunningServer, response_format: Any) -> None:
    answer = server.chat(response_format=response_format)
    if answer.status != 200:
        assert answer.status == 400
        assert answer.error["param"].startswith("response_format")


def test_a_server_without_the_library_for_forms_says_so(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = server.chat(response_format={"type": "regex", "regex": "a[0-9]b"})
    assert answer.status == 400
    assert "pip install llguidance" in answer.error["message"]
    assert server.chat().status == 200


# --- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_asked_for_fits_its_schema(with_tools: RunningServer, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = with_tools.chat(
            tools=TOOLS[:1],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=120,
            temperature=1,
            seed=3,
            stream=stream,
        )
        assert answer.status == 200, answer.content
        if stream:
            events = answer.events
            deltas = [event["choices"][0]["delta"] for event in events]
            (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
            assert calls[0]["index"] == 0
            assert not "".join(delta.get("content") or "" for delta in deltas).strip()
            assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            message = answer.json["choices"][0]["message"]
            assert message["content"] is None
            calls = message["tool_calls"]
            assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
        assert calls[0]["type"] == "function"
        assert calls[0]["function"]["name"] == "weather"
        person = json.loads(calls[0]["function"]["arguments"])
        assert person["kind"] in ("cat", "dog")


def test_a_conversation_with_calls_is_rendered(with_tools: RunningServer) -> None:
    call: dict[str, Any] = {"id": "abcdefghi", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"age": 1, "kind": "cat"}'}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "<|im_end|> a cat"},
    ]
    answer = with_tools.ask("/tokenize", {"messages": messages})
    text = with_tools.ask("/detokenize", {"tokens": answer.json["tokens"]}).json["prompt"]
    assert '"arguments": {"age": 1, "kind": "cat"}' in text
    assert "tool\n<|im_end|> a cat" in text
    assert with_tools.chat(messages=messages, tools=TOOLS[1:]).status == 200
    del messages[2]["tool_call_id"]
    refused = with_tools.chat(messages=messages)
    assert refused.error["param"] == "messages[2].tool_call_id"
    call["function"] = {"name": "weather", "arguments": "[1]"}
    refused = with_tools.chat(messages=messages[:2])
    assert refused.error["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].function"),
        ({"tools": TOOLS * 40}, "tools"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "x", "function": {"name": "a"}}]}, "tools[0].type"),
    ],
)
def test_odd_tools_are_refused(
    with_tools: RunningServer, fields: dict[str, Any], param: str
) -> None:
    answer = with_tools.chat(**fields)
    assert answer.status == 400
    assert answer.error["param"] == param


CALLS: list[tuple[Form, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "No call at all, a < b, <tool", "No call at all, a < b, <tool", []),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": "\u314e"}}\n</tool_call>',
        "Let me see.\n",
        [("f", {"x": "\u314e"})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"a": [1, {"b": null}]}}\n</tool_call> done',
        " done",
        [("f", {}), ("g", {"a": [1, {"b": None}]})],
    ),
    (
        "hermes",
        "<tool_call>not json</tool_call>",
        "<tool_call>not json</tool_call>",
        [],
    ),
    ("hermes", '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", {"x": 1}), ("g", {})],
    ),
    ("mistral", '[TOOL_CALLS] f[ARGS]{"x": 1}', "", [("f", {"x": 1})]),
    (
        "mistral",
        '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}',
        "",
        [("f", {"x": 1}), ("g", {})],
    ),
    ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    ("mistral", "Plain [TOOL", "Plain [TOOL", []),
]


@pytest.mark.parametrize(("written_as", "reply", "text", "calls"), CALLS)
def test_calls_are_read_however_the_reply_is_cut(
    written_as: Form, reply: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    chance = random.Random(0)
    for _ in range(50):
        cuts = sorted(chance.randrange(len(reply) + 1) for _ in range(chance.randrange(8)))
        pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
        reader = CallReader(written_as)
        shown = "".join(map(reader.add, pieces)) + reader.finish()
        assert shown == text
        assert [(call.name, json.loads(call.arguments)) for call in reader.calls] == calls
        assert len({call.id for call in reader.calls}) == len(calls)
