"""Preferences from folder to folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tune
from mistill.errors import SettingsError, TextError, TrainingError
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from tests.tiny import tiny_model
from tests.tune.pairs import pair_rows
from tune.settings import PreferenceSettings

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 200,
    "lora_rank": 4,
    "learning_rate": 5e-3,
    "steps": 6,
}
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def slowly(*values: str) -> list[Any]:
    """Parameters of a test that are tried by the slow tests alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def tuned(model, pairs, tmp_path_factory):
    from accelerate.state import AcceleratorState

    target = tmp_path_factory.mktemp("preferences") / "tuned"
    fixed_before = bool(AcceleratorState._shared_state)
    made = tune.preferences(model, target, pairs=pairs, **QUICK)
    assert bool(AcceleratorState._shared_state) == fixed_before, "others may choose a precision"
    return made


def report_of(folder: Path) -> Any:
    return json.loads((folder / "tuning_report.json").read_text())


def test_a_model_learns_what_is_preferred(tuned):
    report = report_of(tuned)
    assert report["before"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert report["before"]["margin_accuracy"] == 0.5
    assert report["before"]["margin"] == 0.0
    assert report["after"]["loss"] < 0.6
    assert report["after"]["margin_accuracy"] == 1.0
    assert report["kl"]["tuned_from_base"] > 0.001
    assert report["rows"] == {"learned": 36, "held_out": 4}
    assert set(report["evaluations"]) == {"0", "2", "4", "6"}
    (step,) = read_lineage(tuned)
    assert step["step"] == "preferences"
    assert step["after"] == report["after"]
    assert "trl" in step["versions"]


def test_the_report_tells_what_the_folder_says(tuned, model, pairs):
    from mistill.preferences.reading import divided, read_pairs
    from mistill.preferences.tokens import pair_tokens
    from tests.reference.preferences import log_probability

    report = report_of(tuned)
    _, judged = divided(read_pairs(pairs), None, 0.1)
    tokens = pair_tokens(judged, load_vocabulary(model), 200, name="held-out")
    for folder, when in ((model, "before"), (tuned, "after")):
        loaded = load_pytorch(folder)
        for side in ("chosen", "rejected"):
            answers = [getattr(item, side) for item in tokens]
            mean = sum(log_probability(loaded, one.ids, one.start) for one in answers) / len(tokens)
            # Merged weights are rounded once to float32.
            assert report[when][side] == pytest.approx(mean, rel=1e-4)


def test_the_folder_holds_its_base_s_companions_and_one_adapter(tuned, model):
    for name in COMPANIONS:
        assert (tuned / name).read_bytes() == (model / name).read_bytes(), name
    assert same_vocabulary(load_vocabulary(model), load_vocabulary(tuned)) == []
    assert sorted(file.name for file in (tuned / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert list(tuned.rglob("*.md")) == [tuned / "README.md"], "the adapter has a card of peft's"
    assert sorted(item.name for item in tuned.iterdir()) == sorted(
        [
            *(*COMPANIONS, "adapter", "lineage.json", "metrics.jsonl", "model.safetensors"),
            *("tuning_report.json", "README.md"),
        ]
    )


def test_the_adapter_stands_beside_all_seven_kinds_of_matrices_in_float32(tuned, model):
    weights = load_file(tuned / "adapter" / "adapter_model.safetensors")
    kinds = {name.split(".")[-3] for name in weights}
    assert kinds == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.name, "no place of the machine is published"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0)


def test_the_adapter_merged_into_its_base_is_the_folder(tuned, model, tmp_path):
    from quantize import merge_lora

    merged = load_file(
        merge_lora(model, tuned / "adapter", tmp_path / "merged") / "model.safetensors"
    )
    ours = load_file(tuned / "model.safetensors")
    assert merged.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)
    start = load_file(model / "model.safetensors")
    assert (ours["model.embed_tokens.weight"] == start["model.embed_tokens.weight"]).all()


def test_the_metrics_hold_every_step(tuned):
    entries = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "held_out" in entry] == [0, 2, 4, 6]


@pytest.mark.parametrize("loss", ["kto", "orpo", *slowly("ipo", "sigmoid_norm", "robust")])
def test_every_loss_teaches_preferences(loss, model, pairs, tmp_path):
    target = tune.preferences(model, tmp_path / "out", pairs=pairs, loss=loss, **QUICK)
    report = report_of(target)
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["after"]["margin"] > 1.0
    assert report["after"]["margin_accuracy"] > 0.5


def test_all_weights_are_trained_without_adapters(model, pairs, tmp_path):
    options = {**QUICK, "lora_rank": 0, "learning_rate": 1e-3}
    target = tune.preferences(model, tmp_path / "out", pairs=pairs, **options)
    assert not (target / "adapter").exists()
    assert report_of(target)["after"]["margin_accuracy"] == 1.0
    ours, start = (load_file(folder / "model.safetensors") for folder in (target, model))
    assert all((ours[name] != start[name]).any() for name in start)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_model_whose_head_is_its_embedding_is_tuned(rank, pairs, tmp_path):
    tied = tiny_model(tmp_path / "tied", seed=2, tie_word_embeddings=True)
    options = {**QUICK, "lora_rank": rank, "steps": 2, "keep": "last"}
    target = tune.preferences(tied, tmp_path / "out", pairs=pairs, **options)
    ours, start = (load_file(folder / "model.safetensors") for folder in (target, tied))
    assert ours.keys() == start.keys()
    assert "lm_head.weight" not in ours
    same_table = (ours["model.embed_tokens.weight"] == start["model.embed_tokens.weight"]).all()
    assert bool(same_table) == (rank > 0)  # no adapter stands beside the table


def test_a_model_is_tuned_in_bfloat16(model, pairs, tmp_path):
    options = {**QUICK, "precision": "bfloat16", "gradient_checkpointing": True}
    target = tune.preferences(model, tmp_path / "out", pairs=pairs, **options)
    report = report_of(target)
    assert report["before"]["margin_accuracy"] == 0.5
    assert report["after"]["loss"] < 0.6
    weights = load_file(target / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_nearly_every_entry_of_an_adapter_moves_at_a_small_rate(model, pairs, tmp_path):
    # In bfloat16 only 4 of 100 entries would move at this rate.
    options = {**QUICK, "learning_rate": 5e-6, "keep": "last", "warmup": 0.0}
    short = tune.preferences(model, tmp_path / "a", pairs=pairs, **{**options, "steps": 2})
    longer = tune.preferences(model, tmp_path / "b", pairs=pairs, **{**options, "steps": 5})
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (short, longer)
    )
    moved = torch.cat([(one[name] != other[name]).flatten() for name in one if "lora_A" in name])
    assert moved.float().mean() > 0.99


def test_what_trl_stores_in_bfloat16_is_trained_in_float32():
    from tune.trainers.running import in_float32

    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    layer.bias.requires_grad_(False)
    in_float32(layer)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("loss", ["sigmoid", *slowly("ipo", "sigmoid_norm", "robust")])
def test_four_micro_batches_teach_what_one_batch_does(loss, model, pairs, tmp_path):
    grads = []
    for micro in (1, 4):
        options = {**QUICK, "steps": 3, "micro_batch_size": micro, "loss": loss, "keep": "last"}
        target = tune.preferences(model, tmp_path / str(micro), pairs=pairs, **options)
        lines = (target / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        grads.append([entry["grad_norm"] for entry in entries if "grad_norm" in entry])
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)


def test_a_reference_of_another_model_is_refused(model, pairs, tmp_path, monkeypatch):
    import tune.pairwise.log_probabilities as module

    right = module.recorded_log_probabilities

    def wrong(given, answers, record, key, **options):
        values = right(given, answers, record, key, **options)
        values[0::2] += 0.5
        return values

    monkeypatch.setattr(module, "recorded_log_probabilities", wrong)
    with pytest.raises(TrainingError, match=r"the first loss is 0\.\d+ and should be 0\.693147"):
        tune.preferences(model, tmp_path / "out", pairs=pairs, **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_model_that_got_no_better_is_not_published(model, pairs, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    rows = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in pair_rows(6)
    ]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError, match=r"got no better: its held-out loss was 0\.69"):
        tune.preferences(model, tmp_path / "out", pairs=pairs, held_out=held_out, **QUICK)
    assert not (tmp_path / "out").exists()
    assert [item.name for item in (tmp_path / ".out.working").iterdir()] in ([], ["lock"])


def test_falling_log_probabilities_of_better_answers_are_told(caplog):
    from tune.pairwise.preferences_folder import warn_of_displacement

    before = {"chosen": -10.0, "rejected": -12.0}
    warn_of_displacement(before, {"chosen": -10.5, "rejected": -30.0})
    assert caplog.text == ""
    warn_of_displacement(before, {"chosen": -13.5, "rejected": -30.0})
    assert "log p fell by 3.5 nats an answer, and that of the others by 18.0" in caplog.text


def test_labels_that_are_not_balanced_are_told(model, tmp_path, caplog):
    file = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pair_rows()
        for side in ("chosen", "rejected")
        if side == "rejected" or len(row["prompt"]) % 3 == 0
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune.preferences(model, tmp_path / "out", pairs=file, loss="kto", **QUICK)
    assert "the authors of KTO advise 1 to 1.33" in caplog.text


def test_a_row_of_labels_has_its_neighbours_answer_for_the_divergence():
    from tune.pairwise.training import label_order, neighbours

    assert neighbours([5, 6, 7, 8, 9], 2) == [6, 5, 8, 7, 9]
    assert neighbours([5, 6, 7, 8, 9, 4], 3) == [7, 5, 6, 4, 8, 9]
    assert sorted(label_order(8, 4, 0)) == list(range(8))
    assert len(label_order(9, 4, 0)) == 8
    assert len(set(label_order(9, 4, 0))) == 8


def test_an_interrupted_run_resumes_and_ends_with_the_same_bits(
    model, pairs, tuned, tmp_path, monkeypatch, caplog
):
    import tune.trainers.running as running

    step = running.Watch.on_step_end

    def interrupt(self, args, state, control, **given):
        step(self, args, state, control, **given)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Watch, "on_step_end", interrupt)
    target = tmp_path / "tuned"
    with pytest.raises(KeyboardInterrupt):
        tune.preferences(model, target, pairs=pairs, **QUICK)
    assert not target.exists()
    monkeypatch.setattr(running.Watch, "on_step_end", step)
    with caplog.at_level("INFO"):
        tune.preferences(model, target, pairs=pairs, **QUICK)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert same(target / name, tuned / name), name
    assert "6 steps, and 2 of them were done again after an interruption" in caplog.text
    assert report_of(target)["steps_done_again"] == 2
    assert not (tmp_path / ".tuned.working").exists()


def same(one: Path, other: Path) -> bool:
    if one.suffix == ".jsonl":

        def lines(file: Path) -> list[Any]:
            return [json.loads(line) for line in file.read_text().splitlines()]

        return lines(one) == lines(other)
    return one.read_bytes() == other.read_bytes()


KILLED = """
import sys
import tune
from tests.tune.pairwise.test_preferences import QUICK
tune.preferences(sys.argv[1], sys.argv[2], pairs=sys.argv[3], loss=sys.argv[4], **QUICK)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_killed_run_resumes_at_any_moment_and_ends_with_the_same_bits(
    loss, model, pairs, tmp_path
):
    words = [sys.executable, "-c", KILLED, str(model)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    subprocess.run([*words, str(whole), str(pairs), loss], check=True)
    seconds = time.monotonic() - begun
    for share in (0.5, 0.7, 0.8, 0.9):
        process = subprocess.Popen([*words, str(killed), str(pairs), loss])
        try:
            process.wait(seconds * share)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if killed.exists():
            break
    if not killed.exists():
        subprocess.run([*words, str(killed), str(pairs), loss], check=True)
    assert same(whole / "model.safetensors", killed / "model.safetensors")
    assert same(whole / "metrics.jsonl", killed / "metrics.jsonl")


def test_nothing_is_sent_while_a_model_is_tuned(model, pairs, tmp_path):
    program = """
        import socket, sys

        def refuse(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                print("connected to", address)
            raise OSError("no network")

        def resolve(*words, **options):
            print("asked for", words[0])
            raise OSError("no network")

        socket.socket.connect, socket.getaddrinfo = refuse, resolve
        import tune
        tune.preferences(
            sys.argv[1], sys.argv[2], pairs=sys.argv[3], steps=1, batch_size=2, max_length=200,
            learning_rate=1e-3, keep="last",
        )
    """
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CI", "HF_HUB_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), model, tmp_path / "out", pairs],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout == ""
    assert (tmp_path / "out").is_dir()


def test_the_work_of_other_settings_is_not_taken_over(model, pairs, tmp_path, monkeypatch):
    import tune.trainers.running as running

    def interrupt(*words, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(running.Watch, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune.preferences(model, tmp_path / "out", pairs=pairs, **QUICK)
    with pytest.raises(SettingsError, match=r"beta is 0\.2 and was 0\.1"):
        tune.preferences(model, tmp_path / "out", pairs=pairs, beta=0.2, **QUICK)


def test_held_out_pairs_of_their_own_are_evaluated_on(model, pairs, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    lines = pairs.read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:6]))
    target = tune.preferences(
        model, tmp_path / "out", pairs=pairs, held_out=held_out, **{**QUICK, "steps": 2}
    )
    assert report_of(target)["rows"] == {"learned": 34, "held_out": 6}


def test_a_target_is_replaced_where_that_is_asked_for(model, pairs, tuned, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(tuned, target)
    options = {**QUICK, "steps": 1, "keep": "last"}
    tune.preferences(model, target, pairs=pairs, overwrite=True, **options)
    assert report_of(target)["steps"] == 1


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that is unknown": ({"loss": "ppo"}, "loss must be sigmoid, ipo"),
    "a beta of 0": ({"beta": 0}, "beta must be above 0"),
    "smoothing without robust": ({"label_smoothing": 0.1}, "is for the loss robust, not sigmoid"),
    "smoothing of a half": (
        {"loss": "robust", "label_smoothing": 0.5},
        "label_smoothing must be from 0 to below 0.5",
    ),
    "a weight without kto": ({"good_weight": 2}, "are for the loss kto"),
    "single answers for kto": ({"loss": "kto", "micro_batch_size": 1}, "at least 2"),
    "micro-batches that do not divide": (
        {"batch_size": 5, "micro_batch_size": 2},
        "2 does not divide 5",
    ),
    "all held out": ({"held_out_share": 1.0}, "held_out_share must be above 0 and below 1"),
    "alpha without adapters": ({"lora_rank": 0, "lora_alpha": 8}, "give a lora_rank above 0"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_learned_with_are_refused(case):
    options, words = BAD_SETTINGS[case]
    with pytest.raises(SettingsError, match=words):
        PreferenceSettings(**options)


def test_answers_that_all_are_too_long_are_refused(model, pairs, tmp_path):
    with pytest.raises(TextError, match="none of the 36 rows of the pairs to learn from has"):
        tune.preferences(model, tmp_path / "out", pairs=pairs, **{**QUICK, "max_length": 4})
