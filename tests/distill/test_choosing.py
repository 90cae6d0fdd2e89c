"""The best of several replies, pairs, instructions for texts, and prompts of the teacher's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tune
from distill import generate_conversations, reverse_conversations
from distill.choosing import best_and_worst
from distill.reversing import REVERSED_PROMPT, gains, read_texts
from distill.settings import GenerateSettings
from mistill.errors import FolderError, SettingsError, TextError
from mistill.preferences.reading import read_pairs
from mistill.text.conversation import prompt_share
from tests.reference.preferences import log_probability
from tests.tiny import SENTENCES
from tests.tune.pairs import pair_rows

QUICK: dict[str, Any] = {
    "max_new_tokens": 6,
    "keep_unfinished": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"{text} {n}\n" for n in range(2) for text in SENTENCES))
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_the_best_and_the_worst_that_may_be_chosen_are_taken():
    scores = [1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0, 9.0, 4.0, 1.0, 2.0, 3.0]
    good = [True] * 6 + [True, False, True] + [False] * 3
    assert best_and_worst(scores, good, 3) == [(1, 0), (3, 3), (8, 6), None]


def test_the_likeliest_of_several_replies_is_kept(model, prompts, tmp_path):
    from mistill.pytorch.loading import load_pytorch
    from mistill.text.answers import prompt_ids
    from mistill.text.conversation import Conversation
    from mistill.text.vocabulary import load_vocabulary

    out = tmp_path / "out.jsonl"
    generate_conversations(model, prompts, out, best_of=3, by="log_p", **QUICK)
    rows = rows_of(out)
    assert len(rows) == 12
    # Each prompt's replies, as they are written where all of them are asked for one by one.
    single = tmp_path / "single.txt"
    lines = prompts.read_text().splitlines()
    single.write_text("".join(f"{line}\n" for line in lines for _ in range(3)))
    every = tmp_path / "every.jsonl"
    generate_conversations(model, single, every, **QUICK)
    loaded, vocabulary = load_pytorch(model), load_vocabulary(model)
    for number, row in enumerate(rows[:3]):
        three = rows_of(every)[3 * number : 3 * number + 3]
        likelihoods = []
        for other in three:
            talk = Conversation(tuple(other["messages"][:1]))
            asked = prompt_ids(talk, vocabulary)
            said = vocabulary.encode(other["messages"][1]["content"])
            total = log_probability(loaded, (*asked, *said), len(asked))
            likelihoods.append(total / len(said))
        best = max(range(3), key=lambda place: likelihoods[place])
        # Text that is encoded again may be cut into other tokens, which moves the numbers a little.
        if sorted(likelihoods)[-1] - sorted(likelihoods)[-2] > 1:
            assert row["messages"] == three[best]["messages"]


def test_the_worst_reply_is_the_other_side_of_a_pair(model, prompts, tmp_path):
    out = tmp_path / "pairs.jsonl"
    held_out = tmp_path / "held-out.jsonl"
    generate_conversations(
        model,
        prompts,
        out,
        best_of=4,
        by="log_p",
        pairs=True,
        held_out=held_out,
        held_out_share=0.4,
        **QUICK,
    )
    learned, judged = read_pairs(out), read_pairs(held_out)
    assert len(learned) + len(judged) == 12
    for pair in (*learned, *judged):
        assert pair.margin is not None
        assert pair.margin > 0
    assert all(prompt_share(pair.prompt.messages) >= 0.4 for pair in learned)
    assert all(prompt_share(pair.prompt.messages) < 0.4 for pair in judged)


def test_a_check_chooses_and_replies_that_tie_give_no_pair(model, prompts, tmp_path, caplog):
    out = tmp_path / "pairs.jsonl"
    options = {**QUICK, "pairs": True, "best_of": 4, "by": "regex"}
    with caplog.at_level("INFO", "distill.conversations"):
        generate_conversations(model, prompts, out, pattern=".*[aeiou].*", **options)
    rows = rows_of(out)
    assert 0 < len(rows) < 12
    assert f"{12 - len(rows)} of 12 prompts give no pair" in caplog.text
    for row in rows:
        assert any(letter in "aeiou" for letter in row["chosen"])
        assert not any(letter in "aeiou" for letter in row["rejected"])
        assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
    with pytest.raises(TextError, match="all replies to every prompt tie"):
        generate_conversations(model, prompts, tmp_path / "no.jsonl", pattern=".*", **options)


def test_a_reward_model_chooses(model, prompts, pairs, tmp_path):
    judge = tune.reward(
        model, tmp_path / "judge", pairs=pairs, batch_size=4, max_length=200, steps=2, keep="last"
    )
    out = tmp_path / "pairs.jsonl"
    generate_conversations(model, prompts, out, best_of=3, reward=judge, pairs=True, **QUICK)
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows_of(out))


def test_an_interrupted_choice_resumes(model, prompts, tmp_path, monkeypatch):
    import distill.conversations as module

    options = {**QUICK, "best_of": 3, "by": "log_p"}
    whole = tmp_path / "whole.jsonl"
    generate_conversations(model, prompts, whole, **options)
    write, calls = module.write_replies, []

    def interrupted(*words, **given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*words, **given)

    monkeypatch.setattr(module, "write_replies", interrupted)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_conversations(model, prompts, out, **options)
    generate_conversations(model, prompts, out, **options)
    assert out.read_text() == whole.read_text()
    assert len(calls) == 4 + 36 // 4 - 3


# --- prompts of the teacher's own ---------------------------------------------------------------


def test_a_teacher_writes_prompts_and_answers_them(model, tmp_path, monkeypatch):
    import distill.conversations as module

    options = {**QUICK, "without_prompts": 30, "max_new_tokens": 40, "system": "Be brief."}
    out = tmp_path / "out.jsonl"
    generate_conversations(model, "@teacher", out, **options)
    rows = rows_of(out)
    assert 0 < len(rows) <= 30
    asked = [row["messages"][1]["content"] for row in rows]
    assert len(set(asked)) == len(asked)
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == "Be brief."
        assert "<|im_" not in row["messages"][1]["content"]

    write, calls = module.write_replies, []

    def interrupted(*words, **given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*words, **given)

    monkeypatch.setattr(module, "write_replies", interrupted)
    again = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_conversations(model, "@teacher", again, **options)
    generate_conversations(model, "@teacher", again, **options)
    assert again.read_text() == out.read_text()


def test_a_teacher_that_ends_no_prompt_is_refused(model, tmp_path):
    options = {**QUICK, "without_prompts": 4, "max_new_tokens": 1}
    with pytest.raises(TextError, match="ended none of 4 prompts that it wrote itself"):
        generate_conversations(model, "@teacher", tmp_path / "out.jsonl", **options)


# --- instructions for texts ---------------------------------------------------------------------


def test_conversations_are_reversed(chats, tmp_path):
    out = reverse_conversations(chats, tmp_path / "reversed.jsonl")
    first = json.loads(chats.read_text().splitlines()[0])["messages"]
    asked, answer = rows_of(out)[0]["messages"]
    assert asked["content"] == REVERSED_PROMPT.format(text=first[1]["content"])
    assert answer["content"] == first[0]["content"]
    assert len(rows_of(out)) == 40
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Only a text."}\n')
    with pytest.raises(TextError, match="line 1 has no question of a user before an answer"):
        reverse_conversations(texts, tmp_path / "other.jsonl")


def test_a_model_writes_instructions_that_another_grades(model, teacher, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SENTENCES))
    out = tmp_path / "all.jsonl"
    generate_conversations(model, texts, out, reverse=True, forward=teacher, **QUICK)
    rows = rows_of(out)
    assert [row["messages"][1]["content"] for row in rows] == list(SENTENCES)
    instructions = [row["messages"][0]["content"] for row in rows]
    assert [row["score"] for row in rows] == gains(teacher, instructions, SENTENCES)

    options = {**QUICK, "reverse": True, "keep_share": 0.5}
    half = tmp_path / "half.jsonl"
    generate_conversations(model, texts, half, forward=teacher, **options)
    best = sorted(rows, key=lambda row: -row["score"])[:3]
    assert rows_of(half) == [row for row in rows if row in best]

    three = tmp_path / "three.jsonl"
    options = {**QUICK, "reverse": True, "best_of": 3}
    generate_conversations(model, texts, three, forward=teacher, **options)
    assert len(rows_of(three)) == 6


def test_an_instruction_that_says_the_text_gains_most(model):
    from mistill.preferences.tokens import answer_tokens
    from mistill.pytorch.loading import load_pytorch
    from mistill.text.conversation import Conversation
    from mistill.text.vocabulary import load_vocabulary

    (gain,) = gains(model, ["What blows?"], ["A cold wind."])
    loaded, vocabulary = load_pytorch(model), load_vocabulary(model)
    means = []
    for asked in ("What blows?", "Write a text."):
        talk = Conversation(({"role": "user", "content": asked},))
        turn = {"role": "assistant", "content": "A cold wind."}
        answer = answer_tokens(talk, turn, vocabulary, "here")
        means.append(log_probability(loaded, answer.ids, answer.start) / answer.length)
    assert gain == pytest.approx(means[0] - means[1], abs=1e-4)


def test_texts_are_read_from_lines_texts_and_conversations(chats, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "One."}\n')
    lines = tmp_path / "texts.txt"
    lines.write_text("Two.\n\nThree.\n")
    assert read_texts([file, lines]) == ["One.", "Two.", "Three."]
    assert len(read_texts(chats)) == 40
    file.write_text('{"text": " "}\n')
    with pytest.raises(TextError, match="line 1 has an empty text"):
        read_texts(file)


# --- bad input ----------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "by without a choice": ({"by": "log_p"}, "give best_of of at least 2"),
    "pairs without a choice": ({"pairs": True}, "give best_of of at least 2"),
    "no judge": ({"best_of": 2}, "give one judge: .* none is given"),
    "two judges": ({"best_of": 2, "by": "log_p", "reward": "x"}, "a reward model or by, not both"),
    "a pattern that is missing": ({"best_of": 2, "by": "regex"}, "needs a pattern"),
    "greedy replies": ({"best_of": 2, "by": "log_p", "temperature": 0}, "all replies .* the same"),
    "reward without a choice": ({"reward": "x"}, "chooses among several replies"),
    "forward without reverse": ({"forward": "x"}, "a forward model grades instructions"),
    "reverse and pairs": ({"reverse": True, "pairs": True, "best_of": 2}, "leave pairs, by"),
    "several instructions ungraded": ({"reverse": True, "best_of": 2}, "give forward"),
    "a share ungraded": ({"reverse": True, "keep_share": 0.5}, "keep_share is of what a forward"),
    "prompts of a file and of its own": ({"without_prompts": 3}, "belong together"),
    "a server that chooses": (
        {"best_of": 2, "by": "log_p", "server": "http://127.0.0.1:9"},
        "best_of needs a teacher on this machine",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_written_is_refused_at_once(case, model, prompts, tmp_path):
    options, words = BAD[case]
    with pytest.raises((SettingsError, FolderError), match=words):
        generate_conversations(model, prompts, tmp_path / "out.jsonl", **{**QUICK, **options})
    assert list(tmp_path.iterdir()) == []


def test_settings_name_what_there_is_to_choose_by():
    with pytest.raises(SettingsError, match="by must be log_p, json, regex"):
        GenerateSettings(best_of=2, by="taste")  # type: ignore[arg-type]


def test_pairs_of_a_teacher_are_learned_from(model, prompts, tmp_path):
    assert pair_rows(1)[0].keys() == {"prompt", "chosen", "rejected"}
    out = tmp_path / "pairs.jsonl"
    generate_conversations(model, prompts, out, best_of=3, by="log_p", pairs=True, **QUICK)
    target = tune.preferences(
        model,
        tmp_path / "tuned",
        pairs=out,
        steps=2,
        batch_size=4,
        max_length=200,
        learning_rate=1e-3,
        keep="last",
    )
    assert (target / "tuning_report.json").is_file()


def test_reversed_conversations_are_utf_8_whatever_the_locale(tmp_path):
    import os
    import subprocess
    import sys

    turns = [{"role": "user", "content": "뭐?"}, {"role": "assistant", "content": "é"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": turns}) + "\n", "utf-8")
    code = (
        "import distill, sys; from distill.reversing import *; reverse_conversations(*sys.argv[1:])"
    )
    names = [str(tmp_path / name) for name in ("talks.jsonl", "reversed.jsonl")]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, *names], env=plain, check=True)
    (line,) = (tmp_path / "reversed.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["messages"][1]["content"] == "뭐?"
