"""The demo trains for the time that is left, and a later run for as many tokens as the first."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mistill import demo
from mistill.recipe import read_recipe

ROAD = """
[teacher]
source = "{teacher}"

[pruned]
step = "student"
teacher = "teacher"
choose = "even"
layers = 2

[distilled]
step = "distill"
student = "pruned"
teacher = "teacher"
texts = "{chats}"
tokens = 900
"""


@pytest.mark.parametrize("size", ["quick", "normal", "full"])
@pytest.mark.parametrize("slower", [0.3, 1.0, 1.4])
def test_what_is_left_of_the_time_is_what_training_takes(size, slower):
    plan = demo._PLANS[size]
    tokens = plan.tokens(slower * plan.first_seconds)
    seconds = slower * (plan.first_seconds + tokens / plan.tokens_per_second + plan.last_seconds)
    assert tokens % 512 == 0
    assert seconds <= 60 * plan.minutes or tokens == demo._LEAST_TOKENS
    if demo._LEAST_TOKENS < tokens < demo._MOST_TOKENS - 512:
        assert seconds > 60 * plan.minutes * 0.9


def test_a_slow_machine_still_trains_and_a_fast_one_reads_no_text_for_ever():
    plan = demo._PLANS["quick"]
    assert plan.tokens(3600) == demo._LEAST_TOKENS
    assert plan.tokens(0.01) <= demo._MOST_TOKENS


def test_the_number_of_tokens_is_settled_once(tmp_path, teacher, chats, monkeypatch):
    file = tmp_path / "road.toml"
    file.write_text(ROAD.format(teacher=teacher, chats=chats))
    recipe = read_recipe(file, out=tmp_path / "out")
    plan = demo._Plan("road.toml", 12, 2.0, 160, 1.0)
    said = io.StringIO()
    tokens = demo._training_tokens(recipe, plan, Console(file=said, width=200))
    assert (tmp_path / "out" / "pruned").is_dir()
    assert not (tmp_path / "out" / "distilled").exists()
    assert f"the student learns from {tokens:,} tokens" in said.getvalue()
    changed = demo._with_tokens(recipe, tokens)
    assert [step.settings.tokens for step in changed.steps if step.name == "distilled"] == [tokens]
    other = demo._Plan("road.toml", 1, 2.0, 160, 1.0)
    assert demo._training_tokens(recipe, other, Console(file=said)) == tokens
    # A record that says nothing is made again; the first steps are there, and their time is not.
    record = tmp_path / "out" / demo._BUDGET_FILE
    for damaged in ("{", '{"tokens": "many"}', '{"tokens": -1}'):
        record.write_text(damaged)
        assert demo._training_tokens(recipe, plan, Console(file=said)) == plan.tokens(2.0)
        assert json.loads(record.read_text()) == {"tokens": plan.tokens(2.0)}


def test_the_recipes_have_the_step_whose_tokens_are_settled():
    data = Path(demo.__file__).parent / "data"
    for plan in demo._PLANS.values():
        names = [step.name for step in read_recipe(data / plan.file).steps]
        assert names.index(demo._TRAINING) > 0
