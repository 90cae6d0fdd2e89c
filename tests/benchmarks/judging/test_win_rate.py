"""Two models' replies, compared by a third in both orders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks
import export
from benchmarks import JudgeSettings, judge_replies
from benchmarks.judging.letters import Letters, ModelJudge, judge_prompt, letter_tokens
from benchmarks.judging.verdicts import Verdict, Verdicts, figures_of, judge_pairs
from mistill.cli.app import main
from mistill.errors import FolderError, MistillError, SettingsError, TextError, VocabularyError
from mistill.measures.shares import simple_interval
from mistill.progress import LineTracker
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import SENTENCES, tiny_model

PROMPT = Conversation(({"role": "user", "content": "What is a mistral?"},))


class Fake:
    """A judge that likes capital letters, and a place by a constant."""

    def __init__(self, bias: float) -> None:
        self.bias = bias
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompt: Conversation, first: str, second: str) -> Letters | None:
        self.asked.append((first, second))
        if "long" in first + second:
            return None
        odds = self.bias + sum(map(str.isupper, first)) - sum(map(str.isupper, second))
        one = 1 / (1 + math.exp(-odds))
        return Letters(math.log(0.8 * one), math.log(0.8 * (1 - one)))


def capitals(counts: list[tuple[int, int]]) -> list[tuple[Conversation, str, str]]:
    """Pairs of replies with so many capital letters, of different lengths."""
    return [
        (PROMPT, "A" * one + "b" * number, "A" * other + "b" * (number % 3))
        for number, (one, other) in enumerate(counts, 1)
    ]


def judged(pairs: Any, bias: float) -> dict[str, Any]:
    return figures_of(judge_pairs(pairs, Fake(bias), LineTracker("judging", None)))


COUNTS = [(0, 3), (4, 1), (2, 5), (0, 9), (7, 6), (1, 2), (8, 0), (3, 4), (5, 7), (2, 4)]


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.5, -2.5, 25.0])
def test_the_figures_are_those_that_a_count_by_hand_gives(bias: float) -> None:
    found = judged(capitals(COUNTS), bias)
    agreeing = [other - one for one, other in COUNTS if abs(other - one) > abs(bias)]
    wins = sum(gap > 0 for gap in agreeing)
    assert found["pairs"] == 10
    assert found["agreeing"] == len(agreeing)
    assert found["agreement"] == len(agreeing) / 10
    assert found["agreement_interval"] == simple_interval(len(agreeing), 10)
    assert found["wins"] == wins
    assert found["win_rate"] == (wins / len(agreeing) if agreeing else None)
    # A constant bias cancels in the mean of both orders.
    assert found["mean_win_rate"] == sum(other > one for one, other in COUNTS) / 10
    firsts = sum(bias + s * (one - other) > 0 for one, other in COUNTS for s in (1, -1))
    assert found["first_place"] == firsts / 20
    assert found["letters"] == pytest.approx(0.8)


def test_a_judge_of_the_place_alone_agrees_about_nothing() -> None:
    found = judged(capitals(COUNTS), 25.0)
    assert found["agreement"] == 0.0
    assert found["win_rate"] is found["win_rate_interval"] is found["longer_wins"] is None
    assert found["first_place"] == 1.0
    assert judged(capitals(COUNTS), -25.0)["first_place"] == 0.0


def test_the_other_model_has_the_other_win_rate() -> None:
    pairs = capitals(COUNTS)
    one, other = (judged(some, 0.5) for some in (pairs, [(p, b, a) for p, a, b in pairs]))
    for name in ("win_rate", "mean_win_rate"):
        assert one[name] + other[name] == pytest.approx(1)
    for name in ("agreement", "first_place", "longer_wins", "letters"):
        assert one[name] == pytest.approx(other[name])


def test_every_pair_is_shown_in_both_orders_and_equal_or_long_ones_are_left_out() -> None:
    judge = Fake(0.0)
    pairs = [(PROMPT, "A", "b"), (PROMPT, "same", "same"), (PROMPT, "long", "b")]
    verdicts = judge_pairs(pairs, judge, LineTracker("judging", None))
    assert judge.asked == [("A", "b"), ("b", "A"), ("long", "b"), ("b", "long")]
    assert (len(verdicts.given), verdicts.same, verdicts.too_long) == (1, 1, 1)
    assert verdicts.given[0].winner == 0
    assert figures_of(Verdicts([], 2, 0))["agreement"] is None


def test_orders_that_contradict_each_other_and_ties_have_no_winner() -> None:
    def verdict(forward: float, backward: float) -> Verdict:
        letters = (Letters(odds - 9, -9.0) for odds in (forward, backward))
        return Verdict(PROMPT, ("a", "b"), *letters)

    assert verdict(-1, 1).winner == 1
    assert verdict(1, -1).winner == 0
    for odds in ((1, 1), (-1, -1), (0, 1), (0, 0), (1, 0)):
        assert verdict(*odds).winner is None
    tie = figures_of(Verdicts([verdict(0, 0)], 0, 0))
    assert (tie["mean_win_rate"], tie["agreement"], tie["first_place"]) == (0.5, 0.0, 0.0)


def test_the_letters_have_the_probabilities_that_transformers_gives_them(model: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    theirs: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    judge = ModelJudge(model, threads=1)
    short = Conversation(({"role": "user", "content": "Hi?"},))
    found = judge(short, "Yes.", "No.")
    asked = judge_prompt(short, "Yes.", "No.").messages
    assert asked[0]["content"].index("Yes.") < asked[0]["content"].index("No.")
    text = tokenizer.apply_chat_template(list(asked), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.shape[1] < 512
    with torch.no_grad():
        log_p = theirs(ids).logits[0, -1].double().log_softmax(-1)
    expected = [float(log_p[tokenizer.convert_tokens_to_ids(letter)]) for letter in "AB"]
    assert found is not None
    np.testing.assert_allclose([found.first, found.second], expected, rtol=1e-4)
    assert found.log_odds == pytest.approx(expected[0] - expected[1], rel=1e-3)
    assert 0 < found.probability < 1


def test_letters_that_melt_into_the_prompt_are_found_where_the_answers_part(
    tmp_path: Path,
) -> None:
    """A template without a line break before the answer, as Mistral's."""
    folder = tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    vocabulary = load_vocabulary(folder)
    ids, (one, other) = letter_tokens(judge_prompt(PROMPT, "Yes.", "No."), vocabulary)
    assert one != other
    assert vocabulary.decode([*ids, one]).endswith("A")
    assert vocabulary.decode([*ids, other]).endswith("B")


def test_a_prompt_of_several_turns_is_told_turn_by_turn() -> None:
    talk = Conversation(
        (
            {"role": "user", "content": "Count."},
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "Go on."},
        )
    )
    (turn,) = judge_prompt(talk, "Two.", "Three.").messages
    assert "user: Count.\n\nassistant: One.\n\nuser: Go on." in turn["content"]


# --- from folder to folder ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge whose context holds its prompt."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    return tiny_model(folder, seed=7, max_position_embeddings=2048)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in SENTENCES), "utf-8")
    return file


def test_the_command_tells_the_agreement_first_and_keeps_every_verdict(
    model: Path,
    teacher: Path,
    judging: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "judged.json"
    words = ["bench", "judge", str(model), str(teacher), "--judge", str(judging)]
    words += ["--prompts", str(prompts), "--new-tokens", "6", "--limit", "4", "--threads", "1"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    said = capsys.readouterr().out
    document = json.loads(out.read_text("utf-8"))
    assert document["schema"] == "mistill-judgement-1"
    assert document["models"] == ["model", "teacher"]
    assert document["judge"] == "judge"
    assert document["prompts"] == ["prompts.txt"]
    assert document["pairs"] + document["same"] + document["too_long"] == 4
    assert len(document["verdicts"]) == document["pairs"] > 0
    judge = ModelJudge(judging, threads=1)
    for verdict in document["verdicts"]:
        talk = Conversation(tuple(verdict["messages"]))
        one, other = verdict["replies"]
        forward, backward = judge(talk, one, other), judge(talk, other, one)
        assert forward is not None
        assert backward is not None
        assert verdict["gains"] == pytest.approx([-forward.log_odds, backward.log_odds])
    printed = json.loads(said.splitlines()[-1])
    assert printed == {name: document[name] for name in printed}
    assert said.index("both orders agree") < said.index("teacher wins, where they agree")
    assert main([*words, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_chatbot_replies_as_the_folder_that_it_was_exported_from(
    model: Path, teacher: Path, judging: Path, prompts: Path, tmp_path: Path
) -> None:
    bot = export.to_onnx(model, tmp_path / "bot", precision="float32", parity_positions=0)
    found = [
        judge_replies(one, teacher, judge=judging, prompts=prompts, new_tokens=6, threads=1)
        for one in (model, bot)
    ]
    of_folder, of_bot = (one.verdicts.given for one in found)
    assert [verdict.replies for verdict in of_folder] == [verdict.replies for verdict in of_bot]
    for mine, other in zip(of_folder, of_bot, strict=True):
        assert mine.gains == pytest.approx(other.gains)


def test_an_unsure_judge_is_warned_of(
    model: Path,
    teacher: Path,
    judging: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def letters(self: Any, prompt: Conversation, first: str, second: str) -> Letters:
        return Letters(-0.1, -3.0)

    monkeypatch.setattr(ModelJudge, "__call__", letters)
    found = judge_replies(model, teacher, judge=judging, prompts=prompts, new_tokens=4, threads=1)
    assert found.figures["agreement"] == 0.0
    assert "both orders agree about 0% of the pairs" in caplog.text


def test_what_cannot_be_compared_is_refused_before_a_weight_is_read(
    model: Path,
    teacher: Path,
    judging: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("letters", "replies"):
        monkeypatch.setattr(f"benchmarks.judging.{module}.open_model", None)

    def refused(kind: type[MistillError], match: str, *models: Path, **options: Any) -> None:
        given = {"judge": judging, "prompts": prompts, **options}
        with pytest.raises(kind, match=match):
            judge_replies(*models, **given)

    refused(SettingsError, "are the same model", model, model)
    refused(TextError, "missing.txt", model, teacher, prompts=tmp_path / "missing.txt")
    refused(FolderError, "there is no folder or file", model, teacher, judge=tmp_path / "none")
    refused(TextError, "leave it out or lower new_tokens", model, teacher, new_tokens=500)
    mute = tiny_model(tmp_path / "mute", seed=3)
    (mute / "chat_template.jinja").unlink()
    refused(VocabularyError, "neither reply nor judge", model, mute)
    refused(VocabularyError, "neither reply nor judge", model, teacher, judge=mute)
    for name in ("limit", "new_tokens", "threads"):
        zero: dict[str, Any] = {name: 0}
        with pytest.raises(SettingsError, match=f"{name} must be"):
            JudgeSettings(**zero)


def test_the_public_function_is_exported() -> None:
    assert benchmarks.judge_replies is judge_replies
