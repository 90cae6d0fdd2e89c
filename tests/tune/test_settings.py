"""Settings of tuning refuse nonsense by name, and fill in what follows from one another."""

from __future__ import annotations

from typing import Any

import pytest

from mistill.errors import SettingsError
from tune.settings import MATRICES, SupervisedSettings
from tune.supervision.trainer import adapter_plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"epochs": 1, "tokens": 10}, "epochs and tokens both say"),
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"micro_batch_size": 3}, "micro_batch_size should divide batch_size"),
        ({"long_conversations": "cut"}, "long_conversations must be refuse, leave_out or split"),
        ({"lora_rank": -1}, "lora_rank must be at least 0"),
        ({"lora_rank": 0, "base": "nf4"}, "base nf4 is for frozen weights beside adapters"),
        ({"lora_rank": 0, "dora": True}, "dora is about adapters, and lora_rank 0 makes none"),
        ({"lora_rank": 0, "lora_alpha": 8}, "lora_alpha is about adapters"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_targets": ()}, "lora_targets should name at least one matrix"),
        ({"lora_targets": ("q_proj", "q_proj")}, "in which nothing stands twice"),
        ({"lora_targets": ("wq",)}, "lora_targets must be q_proj, .* or lm_head, not 'wq'"),
        ({"lora_targets": "q_proj"}, "lora_targets should be a list"),
        ({"lora_ranks": ("down_proj",)}, "such as down_proj=32, not 'down_proj'"),
        ({"lora_ranks": ("down_proj=0",)}, "a rank above 0"),
        ({"lora_ranks": ("lm_head=8",)}, "one of the lora_targets"),
        ({"lora_start": "svd"}, "lora_start must be zero or pissa"),
        ({"lora_start": "pissa", "base": "nf4"}, "which nf4 would round again"),
        ({"lora_start": "pissa", "dora": True}, "choose one of them"),
        ({"lora_targets": ("lm_head",), "dora": True}, "leave lm_head out of lora_targets"),
        ({"base": "nf8"}, "base must be float or nf4"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"neftune": -1.0}, "neftune must be at least 0"),
        ({"neftune": float("nan")}, "neftune must be at least 0"),
        ({"warmup": 1.5}, "warmup must be from 0 to 1"),
        ({"patience": 2, "evaluate_every": 0}, "patience counts evaluations"),
        ({"held_out_share": 1.0}, "held_out_share must be above 0 and below 1"),
        ({"replies": -1}, "replies must be at least 0"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or adamw_8bit"),
        ({"trackers": ("mlflow",)}, "trackers should be some of"),
        ({"trackers": "wandb"}, "trackers should be some of"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        SupervisedSettings(**options)
    assert "\n" not in str(caught.value)


def test_rates_follow_from_what_is_trained() -> None:
    assert SupervisedSettings().peak_learning_rate == 2e-4
    assert SupervisedSettings(lora_rank=0).peak_learning_rate == 2e-5
    assert SupervisedSettings(learning_rate=1e-3).peak_learning_rate == 1e-3


def test_a_run_is_an_epoch_long_where_nothing_is_said() -> None:
    assert SupervisedSettings().tokens_of(1000) == 1000
    assert SupervisedSettings(epochs=2.5).tokens_of(1000) == 2500
    assert SupervisedSettings(tokens=70).tokens_of(1000) == 70


def test_adapters_are_on_all_seven_matrices_with_an_alpha_of_twice_the_rank() -> None:
    plan = adapter_plan(SupervisedSettings())
    assert plan.targets == MATRICES
    assert len(MATRICES) == 7
    assert plan.alpha_of(16) == 32
    plan = adapter_plan(SupervisedSettings(lora_rank=8, lora_ranks=("up_proj=32",)))
    assert plan.ranks == {"up_proj": 32}
    assert plan.alpha_of(32) == 64
