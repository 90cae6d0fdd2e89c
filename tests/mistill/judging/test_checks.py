"""Checks that a machine can make."""

from __future__ import annotations

import json

import pytest

from mistill import bounded
from mistill.errors import FolderError, SettingsError, TextError, TrainingError
from mistill.judging.checks import (
    check_pattern,
    code_in,
    code_passes,
    fits_schema,
    matches,
    read_schema,
)
from mistill.judging.instructions import INSTRUCTIONS, instructions_of, share_followed
from mistill.judging.judge import CheckJudge, FunctionJudge, judge_of, named_function
from mistill.preferences.reading import PromptRow
from mistill.text.conversation import Conversation

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('{"age": 36,"name":"Ada"}', True),
        (' {"name": "Ada", "age": 36}\n', True),
        ('{"name": "Ada", "age": -1}', False),
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": 36, "x": 1}', False),
        ('Sure: {"name": "Ada", "age": 36}', False),
        ('{"name": "Ada", "age": 36', False),
        ("", False),
    ],
)
def test_an_answer_is_json_of_a_schema(text, fits):
    assert fits_schema(SCHEMA, text) is fits


def test_a_schema_is_read_from_a_file_or_a_text(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert read_schema(file) == read_schema(json.dumps(SCHEMA)) == SCHEMA
    with pytest.raises(SettingsError, match=r"schema\.json is no JSON schema: .*'objekt'"):
        file.write_text('{"type": "objekt"}')
        read_schema(file)
    with pytest.raises(SettingsError, match="must be a JSON object"):
        file.write_text("[1]")
        read_schema(file)
    with pytest.raises(FolderError, match="is missing"):
        read_schema(tmp_path / "none.json")


def test_a_pattern_matches_the_whole_answer():
    assert matches(r"[a-z]+\d", " abc1\n")
    assert not matches(r"[a-z]+\d", "abc1!")
    assert matches(r"a.*z", "a\nz")
    with pytest.raises(SettingsError, match="is no regular expression"):
        check_pattern("(")


def test_a_pattern_without_end_is_wrong_in_time(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    assert not matches(r"(a+)+b", "a" * 40)
    assert matches(r"(a+)+b", "aab")


ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def test_code_is_taken_from_its_fences():
    assert code_in(ADD) == "def add(a, b):\n    return a + b\n"
    assert code_in("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("text", "tests", "passes"),
    [
        (ADD, "assert add(2, 3) == 5", True),
        (ADD, "assert add(2, 3) == 6", False),
        ("def add(a, b) return", "", False),
        ("import sys; sys.exit(0)", "assert False", False),
        ("print('mistill: all tests passed')\nraise SystemExit(0)", "assert False", False),
        ("import os; os._exit(0)", "assert False", False),
        ("import math\nx = math.sqrt(4)", "assert x == 2", True),
        ("x = bytearray(4 << 30)", "", False),
        ("open('here.txt', 'w').write('x')", "", False),
        ("import socket; socket.socket().connect(('127.0.0.1', 9))", "", False),
        ("import subprocess; subprocess.run(['true'])", "", False),
        ("import os; os.remove('/tmp/nothing-of-this-name')", "", False),
        ("import os; os.fork()", "", False),
    ],
)
def test_code_passes_where_it_runs_with_its_tests(text, tests, passes):
    assert code_passes(text, tests) is passes


@pytest.mark.slow
def test_code_without_end_is_wrong_in_time():
    assert not code_passes("while True: pass", "")
    assert code_passes("x = 1", "assert x")


# --- instructions -------------------------------------------------------------------------------

FOLLOWED = {
    "punctuation:no_comma": ({}, "No comma here.", "One, two."),
    "length_constraints:number_words": (
        {"relation": "at least", "num_words": 3},
        "one two three",
        "one two",
    ),
    "keywords:existence": ({"keywords": ["wind", "cold"]}, "A Cold wind.", "A wind."),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "A category.", "A cat."),
    "keywords:frequency": (
        {"relation": "less than", "keyword": "ha", "frequency": 2},
        "ha",
        "ha ha",
    ),
    "keywords:letter_frequency": (
        {"let_relation": "at least", "letter": "e", "let_frequency": 3},
        "eEe",
        "ee",
    ),
    "change_case:english_lowercase": ({}, "all small", "Not all"),
    "change_case:english_capital": ({}, "ALL LARGE", "NOT all"),
    "startend:quotation": ({}, '"quoted"', 'not "quoted"'),
    "startend:end_checker": ({"end_phrase": "The end."}, "So. the END.", "The end. No."),
    "detectable_format:title": ({}, "<<A title>>\ntext", "<< >> text"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a"),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*one* and **two**",
        "*one*",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. Hi", "Bye."),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_is_checked(name):
    numbers, good, bad = FOLLOWED[name]
    columns = {"instruction_id_list": [name], "kwargs": [numbers]}
    instructions = instructions_of(columns, "here")
    assert share_followed(instructions, good) == 1.0
    assert share_followed(instructions, bad) == 0.0
    assert share_followed(instructions, " ") == 0.0


def test_the_share_of_several_instructions_counts():
    columns = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {"num_words": None}],
    }
    assert share_followed(instructions_of(columns, "here"), "Small") == 0.5


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "has no instruction_id_list"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": []}, "an object for each"),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{}]},
            "which mistill does not check; it checks punctuation:no_comma",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]},
            "the instruction length_constraints:number_words lacks 'num_words'",
        ),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused(columns, words):
    with pytest.raises(TextError, match=words):
        instructions_of(columns, "rows.jsonl, line 3")


# --- judges -------------------------------------------------------------------------------------


def prompt(**columns):
    turn = {"role": "user", "content": "Add."}
    return PromptRow(Conversation((turn,)), columns, "rows.jsonl, line 7")


def test_a_check_judges_with_one_and_nought():
    judge = CheckJudge("code")
    row = prompt(tests="assert add(1, 1) == 2")
    assert judge([row, row], [ADD, "no"]) == [1.0, 0.0]
    with pytest.raises(TextError, match="line 7 has no tests"):
        judge.check(prompt())


def test_a_function_is_told_the_prompt_the_answer_and_the_columns():
    def length(messages, answer, *, wanted, **rest):
        assert messages == [{"role": "user", "content": "Add."}]
        assert "messages" not in rest
        return -abs(len(answer) - wanted)

    judge = FunctionJudge(length)
    assert judge.name == "length"
    assert judge([prompt(wanted=3, messages=[])], ["four"]) == [-1.0]


def failing(messages, answer, **columns):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (failing, r"failing, on an answer to rows\.jsonl, line 7, raised ValueError: two lines$"),
        (lambda messages, answer, **columns: float("nan"), "gave nan; it should give a finite"),
        (lambda messages, answer, **columns: None, "gave None; it should give a finite"),
        (lambda messages, answer, **columns: "high", "gave 'high'; it should"),
    ],
)
def test_a_function_that_gives_no_number_ends_the_work_with_a_line(function, words):
    with pytest.raises(TrainingError, match=words):
        FunctionJudge(function)([prompt()], ["answer"])


NOTHING = {"reward": None, "check": None, "schema": None, "pattern": None, "function": None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one judge: .* none is given"),
        ({"check": "code", "function": "math:sqrt"}, "check and function are given"),
        ({"check": "json"}, "the check json needs a schema"),
        ({"check": "regex"}, "the check regex needs a pattern"),
        ({"check": "regex", "pattern": "("}, "is no regular expression"),
        ({"check": "code", "schema": "{}"}, "schema is for the check json"),
        ({"check": "code", "pattern": "a"}, "pattern is for the check regex"),
        ({"function": "os.path"}, "is named package.module:function, not 'os.path'"),
        ({"function": "no_such_module:f"}, "cannot be imported: No module named"),
        ({"function": "math:no_such"}, "cannot be imported: module 'math' has no"),
        ({"function": "math:pi"}, "math:pi is no function"),
    ],
)
def test_a_judge_that_is_none_is_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        judge_of(**{**NOTHING, **given})


def test_a_folder_that_is_no_reward_model_is_no_judge(model):
    with pytest.raises(SettingsError, match=r"is no reward model: it has no score\.weight"):
        judge_of(**{**NOTHING, "reward": model})


def test_a_function_is_found_by_its_name():
    import math

    assert named_function("math:sqrt") is math.sqrt
