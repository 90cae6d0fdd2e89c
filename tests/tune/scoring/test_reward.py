"""A reward model from folder to folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tune
from mistill.cli.app import main
from mistill.errors import FolderError, SettingsError, TrainingError
from mistill.preferences.reading import read_pairs
from mistill.preferences.tokens import pair_tokens
from mistill.pytorch.reward_model import load_reward_model, new_reward_model, scores
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import changed_tensors
from tests.tune.pairs import pair_rows
from tune.settings import RewardSettings
from tune.trainers.library import quiet_trl

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 200,
    "lora_rank": 4,
    "learning_rate": 5e-3,
    "steps": 6,
}


@pytest.fixture(scope="module")
def judge(model, pairs, tmp_path_factory):
    target = tmp_path_factory.mktemp("reward") / "judge"
    return tune.reward(model, target, pairs=pairs, **QUICK)


@pytest.fixture(scope="module")
def rows(model, pairs):
    tokens = pair_tokens(read_pairs(pairs)[:8], load_vocabulary(model), 200, name="pairs")
    return [list(answer.ids) for pair in tokens for answer in pair.answers]


def report_of(folder: Path) -> Any:
    return json.loads((folder / "tuning_report.json").read_text())


def test_a_reward_model_learns_what_is_preferred(judge):
    report = report_of(judge)
    assert report["after"]["loss"] < 0.3 < report["before"]["loss"]
    assert report["after"]["accuracy"] == 1.0
    assert report["accuracy_interval"][1] == 1.0
    assert 0.4 < report["accuracy_interval"][0] < 0.6  # Wilson's, of 4 pairs
    assert report["longer_wins"] == report["tokens_of_answers"]["held_out"]["longer_wins"]


def test_a_score_is_that_of_transformers_own_model(judge, rows):
    from transformers import AutoModelForSequenceClassification

    ours = load_reward_model(judge)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    assert theirs.config.num_labels == 1
    padding = theirs.config.pad_token_id
    assert all(padding not in row for row in rows)
    width = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    with torch.no_grad():
        wanted = theirs.eval()(ids, attention_mask=(ids != padding).long()).logits[:, 0]
    np.testing.assert_allclose(scores(ours, rows), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_a_score_is_read_at_the_token_that_ends_the_answer(judge, rows):
    loaded = load_reward_model(judge)
    end = load_vocabulary(judge).end_ids
    assert all(row[-1] in end for row in rows)
    whole, cut = scores(loaded, rows), scores(loaded, [row[:-1] for row in rows])
    assert (np.abs(whole - cut) > 1e-3).all()
    assert loaded.config.pad_token_id not in end


def test_the_head_travels_with_the_adapter(judge, model, rows):
    from peft import PeftModel

    weights = load_file(judge / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in weights)
    padding = load_reward_model(judge).config.pad_token_id
    for seed in (5, 6):  # other heads, which the adapter's replaces
        fresh: Any = new_reward_model(model, padding, seed)
        with quiet_trl():
            loaded = PeftModel.from_pretrained(fresh, str(judge / "adapter"))
        again = scores(loaded, rows)
        np.testing.assert_allclose(again, scores(load_reward_model(judge), rows), atol=1e-4)


def test_a_head_that_stays_behind_is_found_out(model, pairs, tmp_path, monkeypatch):
    import mistill.pytorch.reward_model as module

    write = module.write_reward_model

    def without_its_head(parameters, padding, base, folder):
        other = [
            (name, torch.randn_like(tensor) if name == "score.weight" else tensor)
            for name, tensor in parameters
        ]
        write(other, padding, base, folder)

    monkeypatch.setattr(module, "write_reward_model", without_its_head)
    with pytest.raises(TrainingError, match=r"apart after it was written and read again"):
        tune.reward(model, tmp_path / "out", pairs=pairs, **QUICK)
    assert not (tmp_path / "out").exists()


def test_scores_do_not_depend_on_their_neighbours(judge, rows, monkeypatch):
    import mistill.pytorch.reward_model as module

    loaded = load_reward_model(judge)
    together = scores(loaded, rows)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 70)
    np.testing.assert_allclose(scores(loaded, rows), together, rtol=1e-4, atol=1e-5)
    alone = [scores(loaded, [row])[0] for row in rows]
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    assert scores(loaded, []).tolist() == []


def test_margins_ask_for_scores_further_apart(model, tmp_path):
    losses = []
    for margin in (0.0, 8.0):
        file = tmp_path / f"{margin}.jsonl"
        rows = [{**row, "margin": margin} for row in pair_rows()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = tmp_path / f"out-{margin}"
        options = {**QUICK, "steps": 2, "keep": "last", "margins": True, "centering": 0.0}
        tune.reward(model, target, pairs=file, **options)
        lines = (target / "metrics.jsonl").read_text().splitlines()
        losses.append(next(entry["loss"] for entry in map(json.loads, lines) if "loss" in entry))
    # -log sigmoid(gap - 8) is 8 - gap where the gap is small.
    assert losses[1] - losses[0] == pytest.approx(8 - losses[0], abs=1.5)


def test_margins_that_are_missing_are_refused(model, pairs, tmp_path):
    with pytest.raises(SettingsError, match=r"36 of 36 pairs have none, the first of them .*line"):
        tune.reward(model, tmp_path / "out", pairs=pairs, margins=True, **QUICK)


@pytest.mark.slow
def test_centering_holds_scores_near_zero(model, pairs, rows, tmp_path):
    spreads = []
    for weight in (0.0, 1.0):
        options = {**QUICK, "steps": 10, "keep": "last", "centering": weight}
        target = tune.reward(model, tmp_path / str(weight), pairs=pairs, **options)
        found = scores(load_reward_model(target), rows)
        # What the loss holds near 0: the square of the two scores of a pair together.
        spreads.append(float(np.sqrt(((found[0::2] + found[1::2]) ** 2).mean())))
    assert spreads[1] < 0.75 * spreads[0]


def test_an_interrupted_run_resumes_and_ends_with_the_same_bits(
    model, pairs, judge, tmp_path, monkeypatch
):
    import tune.trainers.running as running

    step = running.Watch.on_step_end

    def interrupt(self, args, state, control, **given):
        step(self, args, state, control, **given)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Watch, "on_step_end", interrupt)
    target = tmp_path / "judge"
    with pytest.raises(KeyboardInterrupt):
        tune.reward(model, target, pairs=pairs, **QUICK)
    monkeypatch.setattr(running.Watch, "on_step_end", step)
    tune.reward(model, target, pairs=pairs, **QUICK)
    ours, theirs = (folder / "model.safetensors" for folder in (target, judge))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_ranking_teaches_a_reward_model(model, tmp_path):
    file = tmp_path / "rankings.jsonl"
    rows = [
        {
            "prompt": row["prompt"],
            "outputs": [row["rejected"], row["chosen"], row["rejected"] + " 0"],
            "scores": [2, 9, 1],
        }
        for row in pair_rows(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tune.reward(model, tmp_path / "out", pairs=file, ranking="all", **QUICK)
    report = report_of(target)
    assert report["rows"] == {"learned": 54, "held_out": 6}
    assert report["after"]["loss"] < report["before"]["loss"]


def test_a_bfloat16_base_keeps_its_type_and_the_head_float32(model, pairs, tmp_path):
    def to_bfloat16(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    base = changed_tensors(model, tmp_path / "base", to_bfloat16)
    target = tune.reward(base, tmp_path / "out", pairs=pairs, **QUICK)
    weights = load_file(target / "model.safetensors")
    types = {name: tensor.dtype for name, tensor in weights.items()}
    assert types.pop("score.weight") == torch.float32
    assert set(types.values()) == {torch.bfloat16}


def test_other_folders_are_no_reward_models(model, judge, tmp_path):
    with pytest.raises(FolderError, match=r"is no reward model: it has no score\.weight"):
        load_reward_model(model)

    def two_rows(tensors):
        tensors["score.weight"] = torch.zeros(2, 64)

    with pytest.raises(FolderError, match=r"should hold score\.weight of shape \(1, 64\)"):
        load_reward_model(changed_tensors(judge, tmp_path / "two", two_rows))

    def without_a_norm(tensors):
        del tensors["model.norm.weight"]

    with pytest.raises(FolderError, match=r"should hold model\.norm\.weight .*it lacks it"):
        load_reward_model(changed_tensors(judge, tmp_path / "less", without_a_norm))


def test_a_reward_model_is_no_language_model(judge, pairs, tmp_path):
    with pytest.raises(FolderError, match="is a reward model, which scores conversations"):
        tune.preferences(judge, tmp_path / "out", pairs=pairs, max_length=200)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"centering": -1.0}, "centering must be at least 0"),
        ({"keep": "first"}, "keep must be best or last"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_be_learned_with_are_refused(options, words):
    with pytest.raises(SettingsError, match=words):
        RewardSettings(**options)


# --- where a language model is wanted -------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "chat {judge} Hello",
        "export {judge} out",
        "gguf {judge} out.gguf",
        "quantize rounding {judge} out",
        "quantize nf4 {judge} out",
        "quantize gptq {judge} out --texts {chats}",
        "student {judge} out --layers 1 --texts {chats}",
        "distill {model} out --teacher {judge} --texts {chats}",
        "generate {judge} {chats} out.jsonl",
        "teacher {judge} out",
        "tune supervised {judge} out --texts {chats}",
        "tune reward {judge} out --pairs {pairs}",
        "eval {judge}",
        "bench {judge} --texts {chats}",
        "bench judge {judge} {model} --judge {model} --prompts {chats}",
        "compress {judge} out --texts {chats}",
    ],
    ids=lambda command: command.partition(" {")[0],
)
def test_a_command_that_wants_a_language_model_refuses_a_reward_model_by_name(
    command, judge, model, chats, pairs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    places = {"judge": judge, "model": model, "chats": chats, "pairs": pairs}
    assert main([word.format(**places) for word in command.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is a reward model, which scores conversations and writes no text; give" in line
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_a_reward_model_is_and_how_often_it_is_right(judge, model, capsys):
    assert main(["inspect", str(judge), "--json"]) == 0
    said = capsys.readouterr().out
    assert "scores a conversation with one number, and writes nothing" in " ".join(said.split())
    report = report_of(judge)
    found = json.loads(said.splitlines()[-1])["reward"]
    assert found == {
        "rows": report["rows"],
        "after": {"accuracy": report["after"]["accuracy"]},
        "accuracy_interval": report["accuracy_interval"],
        "longer_wins": report["longer_wins"],
    }
    assert "36 pairs" in said
    assert "of 4 held-out pairs" in " ".join(said.split())
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reward"] is None


def test_inspect_takes_a_reward_model_of_somebody_else_and_tells_a_damaged_report(
    judge, tmp_path, capsys
):
    other = shutil.copytree(judge, tmp_path / "other")
    (other / "tuning_report.json").unlink()
    assert main(["inspect", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reward"] == {}
    (other / "tuning_report.json").write_text('{"rows": {"learned": 3, "held_out": "many"}}')
    assert main(["inspect", str(other), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert "held_out" in problem
