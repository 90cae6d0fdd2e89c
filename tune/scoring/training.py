"""TRL's trainer of reward models, on mistill's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mistill.preferences.tokens import PairTokens
from mistill.pytorch.reward_model import new_reward_model, scores
from mistill.text.vocabulary import Vocabulary
from tune.pairwise.losses import log_sigmoid
from tune.settings import RewardSettings
from tune.trainers.adapters import adapter_config, library_tokenizer, padding_id
from tune.trainers.library import quiet_class, quiet_trl
from tune.trainers.running import arguments, in_float32


def rows_of(pairs: Sequence[PairTokens]) -> list[list[int]]:
    """Token ids of all answers behind their prompts; of each pair the better one first."""
    return [list(answer.ids) for pair in pairs for answer in pair.answers]


def reward_figures(model: Any, pairs: Sequence[PairTokens]) -> dict[str, float]:
    """What a reward model says of held-out pairs.

    Args:
        model: The reward model.
        pairs: N pairs.

    Returns:
        ``loss``, the mean of -log sigmoid(score of the better answer - score of the other);
        ``accuracy``, the share of pairs whose better answer scores higher, in which a tie counts
        as half; and the mean scores ``chosen`` and ``rejected``.
    """
    found = scores(model, rows_of(pairs))
    chosen, rejected = found[0::2], found[1::2]
    return {
        "loss": float(-log_sigmoid(chosen - rejected).mean()),
        "accuracy": float(((np.sign(chosen - rejected) + 1) / 2).mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }


def reward_trainer(
    folder: Path,
    vocabulary: Vocabulary,
    learned: Sequence[PairTokens],
    judged: Sequence[PairTokens],
    settings: RewardSettings,
    work: Path,
    *,
    steps: int,
    checkpoint_every: int,
) -> Any:
    """A trainer of TRL for a reward model.

    Args:
        folder: The folder of the language model.
        vocabulary: Its vocabulary.
        learned: Pairs to learn from.
        judged: Pairs to evaluate on, whose tokens must not be padding either.
        settings: How to train.
        work: The folder of the run.
        steps: Optimizer steps.
        checkpoint_every: Optimizer steps between two checkpoints.

    Returns:
        The trainer; what it trains is in float32.
    """
    used = {token for row in rows_of([*learned, *judged]) for token in row}
    padding = padding_id(vocabulary, used)
    model: Any = new_reward_model(folder, padding, settings.seed)
    if torch.cuda.is_available():
        model.to("cuda")
    columns: dict[str, list[Any]] = {
        "chosen_ids": [list(pair.chosen.ids) for pair in learned],
        "rejected_ids": [list(pair.rejected.ids) for pair in learned],
    }
    if settings.margins:
        columns["margin"] = [pair.margin for pair in learned]
    with quiet_trl():
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        given = arguments(
            settings,
            work,
            rate=settings.peak_learning_rate,
            steps=steps,
            checkpoint_every=checkpoint_every,
        )
        trainer = quiet_class(RewardTrainer)(
            model=model,
            args=RewardConfig(
                **given, max_length=None, center_rewards_coefficient=settings.centering or None
            ),
            train_dataset=Dataset.from_dict(columns),
            processing_class=library_tokenizer(folder, vocabulary, padding),
            peft_config=adapter_config(model, settings, kind="SEQ_CLS"),
        )
    in_float32(trainer.model)
    return trainer
