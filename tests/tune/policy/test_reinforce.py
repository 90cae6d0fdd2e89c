"""Reinforcement from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tune
from mistill.errors import SettingsError, TextError, TrainingError
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import SENTENCES
from tune.settings import ReinforceSettings

QUICK: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "samples": 4,
    "max_length": 100,
    "max_new_tokens": 4,
    "lora_rank": 4,
    "learning_rate": 2e-2,
    "steps": 4,
    "keep": "last",
}


def small_letters(messages: Any, answer: str, **columns: Any) -> float:
    """The share of small letters."""
    return sum(letter.islower() for letter in answer) / (1 + len(answer))


@pytest.fixture(autouse=True)
def _whole_answers(monkeypatch):
    """Let answers that were cut off teach too: a tiny model seldom ends its own."""
    import trl

    def taught(self: Any) -> None:
        self.mask_truncated_completions = False
        begin(self)

    begin = trl.GRPOConfig.__post_init__
    monkeypatch.setattr(trl.GRPOConfig, "__post_init__", taught)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"{text} {n}\n" for n in range(4) for text in SENTENCES))
    return file


def report_of(folder: Path) -> Any:
    return json.loads((folder / "tuning_report.json").read_text())


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_model_learns_from_a_function(method, model, prompts, tmp_path):
    options = {**QUICK, "steps": 12, "method": method}
    target = tune.reinforce(
        model, tmp_path / "out", prompts=prompts, reward=small_letters, **options
    )
    report = report_of(target)
    assert report["after"]["reward"] > report["before"]["reward"] + 0.1
    steps = [entry for entry in entries_of(target) if "kl_from_start" in entry]
    assert len(steps) == 12
    assert steps[0]["kl_from_start"] == 0.0
    assert report["kl_from_start"] == steps[-1]["kl_from_start"] > 0.001
    assert (target / "adapter" / "adapter_model.safetensors").is_file()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()


def test_the_trainer_is_given_mistill_s_tokens_and_ends(model, prompts, tmp_path, monkeypatch):
    from mistill.preferences.reading import read_prompt_rows
    from mistill.text.answers import prompt_ids
    from tune.policy import training

    seen: list[list[int]] = []
    tokenized = training.Prompts.tokenized

    def watching(self, trainer, numbers):
        given = tokenized(self, trainer, numbers)
        seen.extend(given[0])
        assert trainer.generation_config.eos_token_id == list(load_vocabulary(model).end_ids)
        return given

    monkeypatch.setattr(training.Prompts, "tokenized", watching)
    options = {**QUICK, "steps": 1}
    tune.reinforce(model, tmp_path / "out", prompts=prompts, reward=small_letters, **options)
    vocabulary = load_vocabulary(model)
    known = [prompt_ids(row.prompt, vocabulary) for row in read_prompt_rows(prompts)]
    assert len(seen) == 8
    assert all(ids in known for ids in seen)
    assert all(seen[place] == seen[place // 4 * 4] for place in range(8))


def test_a_constant_reward_changes_nothing_and_is_told(model, prompts, tmp_path, caplog):
    target = tune.reinforce(
        model, tmp_path / "out", prompts=prompts, reward=lambda *words, **more: 1.0, **QUICK
    )
    assert report_of(target)["groups_without_variance"] == 1.0
    assert "in 100% of the groups all answers had the same reward" in caplog.text
    ours, start = (load_file(folder / "model.safetensors") for folder in (target, model))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-7)


def test_the_run_stops_where_the_model_has_moved_too_far(model, prompts, tmp_path, caplog):
    options = {**QUICK, "steps": 30, "max_kl": 1e-4}
    target = tune.reinforce(
        model, tmp_path / "out", prompts=prompts, reward=small_letters, **options
    )
    report = report_of(target)
    assert 2 <= report["steps"] < 30
    assert "above max_kl" in report["stopped"]
    assert "above max_kl" in caplog.text
    assert report["kl_from_start"] > 1e-4


def test_answers_that_are_cut_off_are_counted_and_told(model, prompts, tmp_path, caplog):
    options = {**QUICK, "max_new_tokens": 2}
    target = tune.reinforce(
        model, tmp_path / "out", prompts=prompts, reward=small_letters, **options
    )
    assert report_of(target)["answers_cut_off"] > 0.5
    assert "of the answers were cut off and taught nothing; raise max_new_tokens" in caplog.text


def test_an_interrupted_run_resumes_and_ends_with_the_same_bits(
    model, prompts, tmp_path, monkeypatch
):
    import tune.trainers.running as running

    def learn(name):
        return tune.reinforce(
            model, tmp_path / name, prompts=prompts, reward=small_letters, **QUICK
        )

    whole = learn("whole")
    step = running.Watch.on_step_end

    def interrupt(self, args, state, control, **given):
        step(self, args, state, control, **given)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Watch, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn("resumed")
    monkeypatch.setattr(running.Watch, "on_step_end", step)
    resumed = learn("resumed")
    assert entries_of(resumed) == entries_of(whole)
    files = [folder / "model.safetensors" for folder in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_learns_from_a_reward_model(model, prompts, pairs, tmp_path):
    judge = tune.reward(
        model,
        tmp_path / "judge",
        pairs=pairs,
        batch_size=4,
        max_length=200,
        learning_rate=5e-3,
        steps=4,
    )
    options = {**QUICK, "steps": 10}
    target = tune.reinforce(model, tmp_path / "out", prompts=prompts, reward=judge, **options)
    report = report_of(target)
    assert report["judge"] == "judge"
    assert report["after"]["reward"] > report["before"]["reward"]


@pytest.mark.slow
def test_a_model_learns_from_a_check(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [
        {
            "prompt": f"{text} {n}",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        }
        for n in range(2)
        for text in SENTENCES
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tune.reinforce(model, tmp_path / "out", prompts=file, check="instructions", **QUICK)
    assert report_of(target)["judge"] == "instructions"


def raising(messages: Any, answer: str, **columns: Any) -> float:
    """Fail."""
    raise RuntimeError("no judgement")


def test_a_reward_function_that_raises_ends_the_run_with_one_line(model, prompts, tmp_path):
    with pytest.raises(TrainingError) as refused:
        tune.reinforce(model, tmp_path / "out", prompts=prompts, reward=raising, **QUICK)
    assert "raised RuntimeError: no judgement" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_got_no_better_is_not_published(model, prompts, tmp_path):
    options = {**QUICK, "keep": "best", "steps": 2}
    with pytest.raises(TrainingError, match=r"got no better: its held-out reward was 1\.0000"):
        tune.reinforce(
            model, tmp_path / "out", prompts=prompts, reward=lambda *w, **m: 1.0, **options
        )


def test_prompts_that_leave_no_room_are_refused(model, prompts, tmp_path):
    options = {**QUICK, "max_length": 6}
    with pytest.raises(TextError, match="has at most 2 tokens, which max_length leaves"):
        tune.reinforce(model, tmp_path / "out", prompts=prompts, reward=small_letters, **options)


def test_prompts_that_a_judge_cannot_check_are_refused_or_passed_over(model, tmp_path, caplog):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "tests": "assert True"} for text in SENTENCES]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "No tests."}]))
    with pytest.raises(TextError, match="line 7 has no tests"):
        tune.reinforce(model, tmp_path / "out", prompts=file, check="code", **QUICK)
    options = {**QUICK, "steps": 1}
    tune.reinforce(
        model, tmp_path / "out", prompts=file, check="code", skip_bad_rows=True, **options
    )
    assert "1 of 7 prompts are passed over" in caplog.text


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a critic": ({"method": "ppo"}, "take OpenRLHF or verl on a cluster, or grpo or rloo here"),
    "another method": ({"method": "a2c"}, "method must be grpo, rloo or ppo"),
    "one sample": ({"samples": 1}, "samples must be at least 2"),
    "a batch of half a group": ({"samples": 8, "batch_size": 12}, "12 is none of 8"),
    "no room for a prompt": ({"max_new_tokens": 1024}, "leaves no room for a prompt in 1024"),
    "no temperature": ({"temperature": 0}, "temperature must be above 0"),
    "no bound": ({"max_kl": 0}, "max_kl must be above 0"),
    "a top_p above 1": ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    "a check that is unknown": ({"check": "spelling"}, "check must be json, regex, code"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_learned_with_are_refused(case):
    options, words = BAD_SETTINGS[case]
    with pytest.raises(SettingsError, match=words):
        ReinforceSettings(**options)
