"""Bad input to tuning is refused at once with one line and exit code 2, and nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistill.cli.app import main
from tests.test_bad_input import edit_json, lines, snapshot, write
from tests.tiny import changed_config, changed_tensors
from tests.tune.pairs import pair_rows

Prepare = Callable[[Path], object]

PREFERENCES = "tune preferences model out --max-length 200 --pairs"
REWARD = "tune reward model out --max-length 200 --pairs"
REINFORCE = "tune reinforce model out --max-length 200 --max-new-tokens 8 --prompts"
CHOOSE = "generate model prompts.txt out.jsonl --max-new-tokens 8 --best-of 2"
GOOD: dict[str, Any] = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def without_a_template(place: Path) -> None:
    (place / "model" / "chat_template.jinja").unlink()


def adapter_of_another(place: Path) -> None:
    folder = place / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def with_a_number_that_is_none(place: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    shutil.move(place / "model", place / "other")
    changed_tensors(place / "other", place / "model", spoil)
    shutil.rmtree(place / "other")


def of_another_architecture(place: Path) -> None:
    shutil.move(place / "model", place / "other")
    changed_config(place / "other", place / "model", model_type="qwen2")
    shutil.rmtree(place / "other")


CASES: dict[str, tuple[str, str, Prepare | None]] = {
    # what: (command, words of the message, what is done before)
    "no such file of pairs": (f"{PREFERENCES} none.jsonl", "there is no file none.jsonl", None),
    "an empty file of pairs": (f"{PREFERENCES} p.jsonl", "holds no text", write("p.jsonl", "")),
    "columns that say nothing": (
        f"{PREFERENCES} p.jsonl",
        "p.jsonl, line 1 has the columns a, b",
        lines("p.jsonl", {"a": 1, "b": 2}),
    ),
    "a string prompt inside both answers": (
        f"{PREFERENCES} p.jsonl",
        "nothing says where the prompt ends",
        lines("p.jsonl", {"chosen": "Q: 6*7? 42", "rejected": "Q: 6*7? 43"}),
    ),
    "mixed columns that contradict": (
        f"{PREFERENCES} p.jsonl",
        "does not repeat its prompt",
        lines(
            "p.jsonl",
            {
                "prompt": "Q",
                "chosen": [
                    {"role": "user", "content": "another"},
                    {"role": "assistant", "content": "A"},
                ],
                "rejected": "B",
            },
        ),
    ),
    "equal answers": (
        f"{PREFERENCES} p.jsonl",
        "chosen and rejected of p.jsonl, line 2 are the same answer",
        lines("p.jsonl", GOOD, {**GOOD, "rejected": "A"}),
    ),
    "an empty answer": (
        f"{REWARD} p.jsonl",
        "chosen of p.jsonl, line 1 is empty",
        lines("p.jsonl", {**GOOD, "chosen": " "}),
    ),
    "the user's turn last": (
        f"{REWARD} p.jsonl",
        "ends with the user's turn",
        lines("p.jsonl", {**GOOD, "chosen": {"role": "user", "content": "A"}}),
    ),
    "one prompt": (f"{PREFERENCES} p.jsonl", "there is 1 prompt", lines("p.jsonl", GOOD)),
    "ranks that all tie": (
        f"{REWARD} p.jsonl",
        "all answers of the row tie",
        lines("p.jsonl", {"prompt": "Q", "outputs": ["A", "B"], "ranks": [1, 1]}),
    ),
    "ranks that are too few": (
        f"{REWARD} p.jsonl",
        "has 2 outputs and 1 ranks",
        lines("p.jsonl", {"prompt": "Q", "outputs": ["A", "B"], "ranks": [1]}),
    ),
    "scores the wrong way round": (
        f"{REWARD} p.jsonl",
        "exchange chosen and rejected",
        lines("p.jsonl", {**GOOD, "score_chosen": 1, "score_rejected": 2}),
    ),
    "labels where pairs are needed": (
        f"{REWARD} p.jsonl",
        "has a label for one answer",
        lines("p.jsonl", {"prompt": "Q", "completion": "A", "label": True}),
    ),
    "a label that is none": (
        f"{PREFERENCES} p.jsonl --loss kto",
        "label of p.jsonl, line 1 should be true or false, not 'good'",
        lines("p.jsonl", {"prompt": "Q", "completion": "A", "label": "good"}),
    ),
    "a line that is no JSON": (
        f"{PREFERENCES} p.jsonl",
        "p.jsonl, line 2 is not valid JSON",
        write("p.jsonl", json.dumps(GOOD) + "\n{\n"),
    ),
    "answers that are too long": (
        "tune preferences model out --pairs pairs.jsonl --max-length 4",
        "none of the 36 rows of the pairs to learn from has at most 4 tokens",
        None,
    ),
    "a length beyond the context": (
        "tune preferences model out --pairs pairs.jsonl --max-length 600",
        "does not fit the model's context of 512",
        None,
    ),
    "all prompts held out": (
        f"{PREFERENCES} pairs.jsonl --held-out pairs.jsonl",
        "every prompt to learn from is held out too",
        None,
    ),
    "no chat template": (f"{PREFERENCES} pairs.jsonl", "has no chat template", without_a_template),
    "a weight that is no number": (
        f"{PREFERENCES} pairs.jsonl",
        "model.norm.weight",
        with_a_number_that_is_none,
    ),
    "another architecture": (
        f"{REWARD} pairs.jsonl",
        "is a model of type 'qwen2'",
        of_another_architecture,
    ),
    "a config that contradicts the weights": (
        f"{REWARD} pairs.jsonl",
        "are not those of its config.json",
        edit_json("model/config.json", intermediate_size=96),
    ),
    "no such model": ("tune reward nowhere/at/all out --pairs pairs.jsonl", "nowhere/at/all", None),
    "the target is the model": (
        "tune preferences model model --pairs pairs.jsonl --overwrite",
        "is its own source",
        None,
    ),
    "a target that is there": (
        "tune preferences model pairs.jsonl --pairs pairs.jsonl",
        "exists already",
        None,
    ),
    "margins that are missing": (
        f"{REWARD} pairs.jsonl --margins",
        "36 of 36 pairs have none",
        None,
    ),
    "smoothing of another loss": (
        f"{PREFERENCES} pairs.jsonl --label-smoothing 0.1",
        "label_smoothing is for the loss robust",
        None,
    ),
    "no judge": (f"{REINFORCE} prompts.txt", "give one judge", None),
    "two judges": (
        f"{REINFORCE} prompts.txt --check code --function math:sqrt",
        "check and function are given",
        None,
    ),
    "a language model for a judge": (
        f"{REINFORCE} prompts.txt --reward model",
        "model is no reward model: it has no score.weight",
        None,
    ),
    "a schema that is none": (
        f"{REINFORCE} prompts.txt --check json --schema schema.json",
        "schema.json is no JSON schema",
        write("schema.json", '{"type": "objekt"}'),
    ),
    "a pattern that is none": (
        f"{REINFORCE} prompts.txt --check regex --pattern (",
        "is no regular expression",
        None,
    ),
    "a function that is not there": (
        f"{REINFORCE} prompts.txt --function no_such_module:judge",
        "the reward function no_such_module:judge cannot be imported",
        None,
    ),
    "a function that raises": (
        f"{REINFORCE} prompts.txt --function tests.tune.test_bad_input:raising",
        "raised ValueError: no judgement",
        None,
    ),
    "a function that gives NaN": (
        f"{REINFORCE} prompts.txt --function tests.tune.test_bad_input:no_number",
        "gave nan; it should give a finite number",
        None,
    ),
    "prompts without tests": (
        f"{REINFORCE} p.jsonl --check code",
        "p.jsonl, line 1 has no tests",
        lines("p.jsonl", {"prompt": "Add."}),
    ),
    "an instruction that is unknown": (
        f"{REINFORCE} p.jsonl --check instructions",
        "which mistill does not check",
        lines("p.jsonl", {"prompt": "Q", "instruction_id_list": ["a:b"], "kwargs": [{}]}),
    ),
    "a critic": (f"{REINFORCE} prompts.txt --check code --method ppo", "OpenRLHF or verl", None),
    "half a group": (
        f"{REINFORCE} prompts.txt --check code --batch-size 12",
        "batch_size should be a multiple of samples",
        None,
    ),
    "no room for the prompts": (
        "tune reinforce model out --max-length 20 --max-new-tokens 18 --prompts prompts.txt "
        "--check regex --pattern .*",
        "has at most 2 tokens",
        None,
    ),
    "an adapter of another base": (
        "quantize merge model adapter out",
        "adapter",
        adapter_of_another,
    ),
    "a choice without a judge": (CHOOSE, "give one judge", None),
    "a reward folder that is not there": (f"{CHOOSE} --reward nowhere", "nowhere", None),
    "the teacher's own prompts without a number": (
        "generate model @teacher out.jsonl",
        "without_prompts and the prompts @teacher belong together",
        None,
    ),
    "texts without an answer to reverse": (
        "reverse out.jsonl --texts prompts.txt",
        "has no question of a user before an answer",
        None,
    ),
}


def raising(messages: Any, answer: str, **columns: Any) -> float:
    """A function that fails."""
    raise ValueError("no\njudgement")


def no_number(messages: Any, answer: str, **columns: Any) -> float:
    """A function that gives no number."""
    return float("nan")


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a model, pairs and prompts in it."""
    shutil.copytree(model, tmp_path / "model")
    rows = "".join(json.dumps(row) + "\n" for row in pair_rows())
    (tmp_path / "pairs.jsonl").write_text(rows)
    (tmp_path / "prompts.txt").write_text("What blows?\nWho knows?\nWhy?\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, place, capfd):
    command, words, prepare = CASES[case]
    if prepare is not None:
        prepare(place)
    capfd.readouterr()
    before = snapshot(place)
    assert main(command.split()) == 2
    printed = capfd.readouterr()
    told = [line for line in printed.err.splitlines() if "rows read" not in line]
    assert len(told) == 1, printed.err
    assert told[0].startswith("mistill: ")
    assert printed.out == ""
    assert words in told[0]
    after = snapshot(place)
    # What a run had begun when a judge failed stays, so that it resumes.
    begun = {name for name in after if name.startswith(".out.working") and "function" in case}
    assert {name: size for name, size in after.items() if name not in begun} == before


def test_there_are_at_least_thirty_cases():
    assert len(CASES) >= 30
