"""Preferences, rewards and reinforcement over weights in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantize
import tune
from mistill.cli.app import main
from mistill.errors import FolderError, SettingsError, TrainingError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import read_lineage
from mistill.preferences.reading import divided, read_pairs
from mistill.preferences.tokens import pair_tokens
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.reward_model import load_reward_model
from mistill.text.vocabulary import load_vocabulary
from tests.reference.preferences import log_probability
from tune.pairwise.losses import pair_losses
from tune.settings import PreferenceSettings, RewardSettings
from tune.trainers import merged_folder
from tune.trainers.merged_folder import merge_adapters

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 200,
    "lora_rank": 4,
    "learning_rate": 5e-3,
    "steps": 4,
}


def report_of(folder: Path) -> Any:
    return json.loads((folder / "tuning_report.json").read_text())


def entries_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def decoded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model whose weights are those that 4 bits stand for."""
    target = tmp_path_factory.mktemp("decoded") / "model"
    merge_adapters(open_folder(model), {}, target, through_nf4=torch.float32)
    return target


@pytest.fixture(scope="module")
def tuned(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("nf4") / "tuned"
    return tune.preferences(model, target, pairs=pairs, base="nf4", **QUICK)


@pytest.mark.parametrize(
    "loss", ["sigmoid", *[pytest.param(one, marks=pytest.mark.slow) for one in ("kto", "orpo")]]
)
def test_over_four_bits_is_learned_what_is_learned_over_the_floats_that_they_stand_for(
    loss: str, tuned: Path, model: Path, decoded: Path, pairs: Path, tmp_path: Path
) -> None:
    """After the first evaluation too, which bitsandbytes would let cut gradients."""
    options = {**QUICK, "loss": loss, "keep": "last"}
    over = tuned
    if loss != "sigmoid":
        over = tune.preferences(model, tmp_path / "over", pairs=pairs, base="nf4", **options)
    beside = tune.preferences(decoded, tmp_path / "beside", pairs=pairs, **options)
    steps = [[one for one in entries_of(folder) if "loss" in one] for folder in (over, beside)]
    assert len(steps[0]) == 4
    for mine, other in zip(*steps, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    adapters = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (over, beside)
    ]
    for name, tensor in adapters[0].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-2, atol=1e-4)


def test_the_better_merge_is_published_and_measured_against_the_model_that_came(
    tuned: Path, model: Path, decoded: Path, pairs: Path, tmp_path: Path
) -> None:
    report = report_of(tuned)
    assert report["trained_before"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert report["before"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert set(report["merges"]) == {"float", "dequantized"}
    assert report["merged_into"] == min(report["merges"], key=report["merges"].get)
    assert report["after"]["loss"] == report["merges"][report["merged_into"]] < 0.69
    tokens = pair_tokens(
        divided(read_pairs(pairs), None, 0.1)[1], load_vocabulary(model), 200, name="held-out"
    )
    came = load_pytorch(model)
    for into, base in (("float", model), ("dequantized", decoded)):
        merged = quantize.merge_lora(base, tuned / "adapter", tmp_path / into)
        if into == report["merged_into"]:
            ours, theirs = (load_file(one / "model.safetensors") for one in (tuned, merged))
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
        loaded = load_pytorch(merged)
        gains = [
            [
                log_probability(loaded, one.ids, one.start)
                - log_probability(came, one.ids, one.start)
                for one in pair.answers
            ]
            for pair in tokens
        ]
        chosen, rejected = np.array(gains).T
        ones = np.ones(len(tokens))
        expected = pair_losses("sigmoid", chosen, rejected, ones, ones, beta=0.1).mean()
        assert report["merges"][into] == pytest.approx(expected, rel=1e-4)
    (step,) = read_lineage(tuned)
    for name in ("merges", "merged_into", "trained_after", "after"):
        assert step[name] == report[name], name
    assert step["settings"]["base"] == "nf4"
    assert not open_folder(tuned).path.joinpath("config.json").read_text().count("quantization")


def test_a_merge_that_lost_what_was_learned_is_not_published(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(folders: Any, measure: Any) -> Any:
        best = right(folders, measure)
        return merged_folder.Merge(
            best.folder, best.into, {**best.figures, "loss": 0.7}, best.losses
        )

    right = merged_folder.best_merge
    monkeypatch.setattr("tune.trainers.ending.best_merge", spoiled)
    with pytest.raises(TrainingError, match=r"the merged model is none: 0\.7000, where"):
        tune.preferences(model, tmp_path / "out", pairs=pairs, base="nf4", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_learns_over_four_bits(
    model: Path, decoded: Path, pairs: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "keep": "last"}
    over = tune.reward(model, tmp_path / "over", pairs=pairs, base="nf4", **options)
    beside = tune.reward(decoded, tmp_path / "beside", pairs=pairs, **options)
    losses = [
        [one["loss"] for one in entries_of(folder) if "loss" in one] for folder in (over, beside)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    report = report_of(over)
    assert set(report["merges"]) == {"float", "dequantized"}
    assert report["after"]["loss"] == min(report["merges"].values())
    assert report["merges"]["dequantized"] == pytest.approx(
        report["trained_after"]["loss"], rel=1e-4
    )
    assert report["after"]["loss"] < report["before"]["loss"]
    load_reward_model(over)
    assert (over / "adapter" / "adapter_model.safetensors").is_file()
    assert read_lineage(over)[-1]["merged_into"] == report["merged_into"]


def test_a_folder_in_four_bits_is_tuned_through_adapters(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = quantize.to_nf4(model, tmp_path / "nf4")
    for call in (tune.preferences, tune.reward):
        with pytest.raises(FolderError, match=r"holds nf4 weights.*set base to nf4"):
            call(folder, tmp_path / "out", pairs=pairs, **QUICK)
    made = tune.preferences(folder, tmp_path / "out", pairs=pairs, base="nf4", **QUICK)
    report = report_of(made)
    assert list(report["merges"]) == ["dequantized"]
    assert report["after"]["loss"] == pytest.approx(report["trained_after"]["loss"], rel=1e-3)
    assert open_folder(made).form == "model"
    judge = tune.reward(folder, tmp_path / "judge", pairs=pairs, base="nf4", **QUICK)
    load_reward_model(judge)


@pytest.mark.slow
def test_reinforcement_learns_over_four_bits(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"What is {number}?\n" for number in range(12)))
    made = tune.reinforce(
        model,
        tmp_path / "out",
        prompts=prompts,
        reward=few_letters,
        base="nf4",
        steps=4,
        samples=4,
        batch_size=8,
        micro_batch_size=4,
        max_length=200,
        max_new_tokens=8,
        lora_rank=4,
        learning_rate=5e-3,
        keep="last",
        max_kl=100.0,
    )
    report = report_of(made)
    assert set(report["merges"]) == {"float", "dequantized"}
    assert report["after"]["loss"] == min(report["merges"].values())
    weights = load_file(made / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moved = torch.cat([tensor.flatten() for name, tensor in weights.items() if "lora_B" in name])
    assert (moved != 0).float().mean() > 0.99


def few_letters(messages: Any, answer: str, **columns: Any) -> float:
    """A judge that likes short answers."""
    return -float(len(answer))


def test_whole_weights_are_not_held_in_four_bits() -> None:
    for kind in (PreferenceSettings, RewardSettings):
        with pytest.raises(SettingsError, match="lora_rank 0 trains all weights, which 4 bits"):
            kind(base="nf4", lora_rank=0)
        with pytest.raises(SettingsError, match="base must be float or nf4"):
            kind(base="int4")  # type: ignore[arg-type]


def test_a_model_whose_rows_do_not_fit_is_refused_in_one_line(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import tiny_model

    odd = tiny_model(tmp_path / "odd", hidden_size=96, num_attention_heads=2, num_key_value_heads=2)
    words = ["tune", "preferences", str(odd), str(tmp_path / "out"), "--pairs", str(pairs)]
    assert main([*words, "--base", "nf4", "--max-length", "200"]) == 2
    assert "NF4 needs rows of a multiple of 64 weights" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["odd"]
