"""Preference data in every shape, read into checked types and divided by prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mistill.errors import TextError
from mistill.preferences.reading import (
    divided,
    pairs_of,
    read_labelled,
    read_pairs,
    read_prompt_rows,
)
from mistill.preferences.shapes import Ranking
from mistill.text.conversation import Conversation

ASKED = {"role": "user", "content": "What is a mistral?"}
GOOD = {"role": "assistant", "content": "A cold wind."}
BAD = {"role": "assistant", "content": "A cheese."}
SYSTEM = {"role": "system", "content": "Be brief."}


def share(turn):
    return {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}


PAIRS: dict[str, Any] = {
    "texts beside their prompt": {
        "prompt": ASKED["content"],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "turns beside their prompt": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "single turns": {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "ultrafeedback's mixed columns": {
        "prompt": ASKED["content"],
        "prompt_id": "7",
        "chosen": [ASKED, GOOD],
        "rejected": [ASKED, BAD],
        "messages": [ASKED, GOOD],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "ShareGPT's turns": {
        "conversations": [share(ASKED)],
        "chosen": share(GOOD),
        "rejected": share(BAD),
    },
    "axolotl's question": {
        "question": ASKED["content"],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "axolotl's input": {
        "input": ASKED["content"],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "axolotl's responses": {
        "instruction": ASKED["content"],
        "chosen_response": GOOD["content"],
        "rejected_response": BAD["content"],
    },
    "a ranking with ranks beside the answers": {
        "prompt": ASKED["content"],
        "answers": [
            {"answer": BAD["content"], "rank": 3},
            {"answer": "A wind.", "rank": 2},
            {"answer": GOOD["content"], "rank": 1.0},
        ],
    },
    "a ranking with a list of scores": {
        "prompt": ASKED["content"],
        "outputs": [BAD["content"], "A wind.", GOOD["content"]],
        "scores": [0.5, 2, 4],
    },
    "a ranking with a list of ranks": {
        "messages": [ASKED],
        "responses": [[BAD], [GOOD]],
        "ranks": [2, 1],
    },
}
MARGINS = {"ultrafeedback's mixed columns": 5.5, "a ranking with a list of scores": 3.5}


def written(tmp_path, *rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("shape", PAIRS)
def test_a_pair_is_read_from_every_shape(shape, tmp_path):
    (pair,) = read_pairs(written(tmp_path, PAIRS[shape]))
    assert pair.prompt.messages == (ASKED,)
    assert (pair.chosen["content"], pair.rejected["content"]) == (GOOD["content"], BAD["content"])
    assert pair.chosen["role"] == pair.rejected["role"] == "assistant"
    assert pair.margin == MARGINS.get(shape)
    assert pair.origin.endswith("line 1")


def test_what_stands_beside_the_prompt_comes_before_it(tmp_path):
    row = {**PAIRS["texts beside their prompt"], "system": "Be brief."}
    (pair,) = read_pairs(written(tmp_path, row))
    assert pair.prompt.messages == (SYSTEM, ASKED)
    whole = {"prompt": ASKED["content"], "chosen": [SYSTEM, ASKED, GOOD]}
    (pair,) = read_pairs(written(tmp_path, {**whole, "rejected": [SYSTEM, ASKED, BAD]}))
    assert pair.prompt.messages == (SYSTEM, ASKED)


def test_earlier_turns_of_the_assistant_belong_to_the_prompt(tmp_path):
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"chosen": [*before, ASKED, GOOD], "rejected": [*before, ASKED, BAD]}
    (pair,) = read_pairs(written(tmp_path, row))
    assert pair.prompt.messages == (*before, ASKED)


LABELS: dict[str, Any] = {
    "prompt and completion": {"prompt": ASKED["content"], "completion": GOOD["content"]},
    "turns": {"prompt": [ASKED], "completion": [GOOD]},
    "a conversation": {"messages": [ASKED, GOOD]},
}


@pytest.mark.parametrize("shape", LABELS)
def test_a_labelled_answer_is_read_from_every_shape(shape, tmp_path):
    rows = ({**LABELS[shape], "label": label} for label in (True, False))
    good, bad = read_labelled(written(tmp_path, *rows))
    assert good.prompt.messages == bad.prompt.messages == (ASKED,)
    assert good.answer == GOOD
    assert (good.good, bad.good) == (True, False)


def test_a_pair_gives_a_good_answer_and_a_bad_one(tmp_path):
    good, bad = read_labelled(written(tmp_path, PAIRS["whole conversations"]))
    assert (good.answer, good.good) == (GOOD, True)
    assert (bad.answer, bad.good) == (BAD, False)


def ranking(*values, scored=True):
    answers = tuple({"role": "assistant", "content": f"answer {n}"} for n in range(len(values)))
    return Ranking(Conversation((ASKED,)), answers, values, scored, "here")


def numbers(pairs):
    return {(pair.chosen["content"][-1], pair.rejected["content"][-1]) for pair in pairs}


def test_a_ranking_gives_the_pairs_that_are_asked_for():
    three = ranking(1.0, 3.0, 2.0)
    assert numbers(pairs_of(three, "best_worst")) == {("1", "0")}
    assert numbers(pairs_of(three, "all")) == {("1", "0"), ("1", "2"), ("2", "0")}
    drawn = [numbers(pairs_of(three, "best_random", seed)) for seed in range(20)]
    assert {pair for pairs in drawn for pair in pairs} == {("1", "0"), ("1", "2")}
    assert pairs_of(three, "best_random", 5) == pairs_of(three, "best_random", 5)
    assert [pair.margin for pair in pairs_of(three, "best_worst")] == [2.0]


def test_answers_that_tie_give_no_pair():
    assert pairs_of(ranking(2.0, 2.0), "all") == []
    assert numbers(pairs_of(ranking(2.0, 2.0, 1.0), "all")) == {("0", "2"), ("1", "2")}


def test_ranks_say_nothing_of_how_much_better_an_answer_is():
    (pair,) = pairs_of(ranking(-1.0, -3.0, scored=False), "best_worst")
    assert pair.margin is None


BAD_ROWS = {
    "the same answers": (
        {"prompt": "Q", "chosen": "A", "rejected": " A\n"},
        "chosen and rejected of .*line 1 are the same answer",
    ),
    "an empty answer": ({"prompt": "Q", "chosen": " ", "rejected": "B"}, "chosen of .* is empty"),
    "one answer": ({"prompt": "Q", "chosen": "A"}, "has chosen and no rejected"),
    "prompts inside texts": (
        {"chosen": "Q: 6*7? A: 42", "rejected": "Q: 6*7? A: 43"},
        "nothing says where the prompt ends",
    ),
    "the user's turn last": (
        {"prompt": [ASKED], "chosen": [GOOD, ASKED], "rejected": BAD},
        "conversation of 2 turns that does not repeat its prompt",
    ),
    "an answer of the user": (
        {"prompt": [ASKED], "chosen": ASKED, "rejected": BAD},
        "ends with the user's turn",
    ),
    "two prompts": (
        {"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "Hi"}, BAD]},
        "differ before their last turn",
    ),
    "another prompt inside": (
        {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "does not repeat its prompt",
    ),
    "a number for an answer": (
        {"prompt": "Q", "chosen": 5, "rejected": "B"},
        "chosen of .* should be text or turns, not a number",
    ),
    "scores that contradict": (
        {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 1, "score_rejected": 2},
        "exchange chosen and rejected",
    ),
    "a margin that is no number": (
        {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "wide"},
        "margin of .* should be a finite number",
    ),
    "too few scores": (
        {"prompt": "Q", "outputs": ["A", "B"], "scores": [1]},
        "2 outputs and 1 scores",
    ),
    "one ranked answer": (
        {"prompt": "Q", "outputs": ["A"], "scores": [1]},
        "a ranking needs two",
    ),
    "nothing that orders": (
        {"prompt": "Q", "outputs": ["A", "B"]},
        "nothing that orders all of them",
    ),
    "a rank that is no number": (
        {"prompt": "Q", "outputs": ["A", "B"], "ranks": [1, "second"]},
        "ranks 2 of .* should be a finite number, not 'second'",
    ),
    "one answer ranked twice": (
        {"prompt": "Q", "outputs": ["A", "A"], "ranks": [1, 2]},
        "answers 1 and 2 of .* are the same and ranked differently",
    ),
    "a label for one answer": (
        {"prompt": "Q", "completion": "A", "label": True},
        "has a label for one answer",
    ),
    "other columns": ({"frage": "Q", "antwort": "A"}, r"docs/data\.md shows a line of each"),
    "a ranking without a prompt": ({"outputs": ["A", "B"], "scores": [1, 2]}, "and no prompt"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_by_file_and_line(case, tmp_path):
    row, words = BAD_ROWS[case]
    with pytest.raises(TextError, match=words) as refused:
        read_pairs(written(tmp_path, row))
    assert "line 1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_label_that_is_neither_true_nor_false_is_refused(tmp_path):
    for label in ("yes", 2, 0.5):
        row = {"prompt": "Q", "completion": "A", "label": label}
        with pytest.raises(TextError, match=r"label of .* should be true or false"):
            read_labelled(written(tmp_path, row))


def test_bad_rows_are_passed_over_and_counted_where_that_is_asked_for(tmp_path, caplog):
    rows = written(tmp_path, PAIRS["single turns"], {"prompt": "Q", "chosen": "A", "rejected": "A"})
    assert len(read_pairs(rows, skip_bad_rows=True)) == 1
    assert "2 rows read, 0 cut, 1 passed over" in caplog.text
    assert "are the same answer (line 2)" in caplog.text


def test_a_file_whose_answers_all_tie_gives_no_pairs(tmp_path):
    row = {"prompt": "Q", "outputs": ["A", "B"], "ranks": [1, 1]}
    with pytest.raises(TextError, match=r"no pairs .*all answers of the row tie"):
        read_pairs(written(tmp_path, row))


def test_prompts_keep_the_other_columns_of_their_rows(tmp_path):
    (row,) = read_prompt_rows(written(tmp_path, {"prompt": "Add 2 and 3.", "result": 5}))
    assert row.prompt.messages == ({"role": "user", "content": "Add 2 and 3."},)
    assert row.columns["result"] == 5
    text = tmp_path / "prompts.txt"
    text.write_text("One.\n\nTwo.\n")
    assert [row.origin[-6:] for row in read_prompt_rows(text)] == ["line 1", "line 3"]


def test_no_prompt_stands_on_both_sides(tmp_path, caplog):
    rows = [
        {"prompt": f"Question {n // 2}", "chosen": f"good {n}", "rejected": "bad"}
        for n in range(40)
    ]
    pairs = read_pairs(written(tmp_path, *rows))
    learned, judged = divided(pairs, None, 0.25)
    prompts = [{pair.prompt.messages[0]["content"] for pair in side} for side in (learned, judged)]
    assert not prompts[0] & prompts[1]
    assert (len(learned), len(judged)) == (30, 10)
    assert divided(pairs[::-1], None, 0.25)[1] == judged[::-1]

    learned, others = divided(pairs, judged[:2], 0.5)
    assert others == judged[:2]
    assert len(learned) == 38
    assert "2 of 40 rows are left out" in caplog.text
    with pytest.raises(TextError, match="every prompt to learn from is held out"):
        divided(judged, judged, 0.5)
    with pytest.raises(TextError, match="there is 1 prompt"):
        divided(pairs[:2], None, 0.5)
