"""TRL's trainer of reward models, on mistill's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.folders.folder import FolderInfo
from mistill.preferences.tokens import PairTokens
from mistill.pytorch.reward_model import new_reward_model
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import this_process
from tune.pairwise.losses import log_sigmoid
from tune.settings import RewardSettings
from tune.trainers.adapters import adapter_config, library_tokenizer, padding_id
from tune.trainers.arguments import arguments
from tune.trainers.library import quiet_class, quiet_trl
from tune.trainers.placing import computes_in_bfloat16, load_base, type_of_base
from tune.trainers.running import in_float32
from tune.trainers.shares import order_of_run


def rows_of(pairs: Sequence[PairTokens]) -> list[list[int]]:
    """Token ids of all answers behind their prompts; of each pair the better one first."""
    return [list(answer.ids) for pair in pairs for answer in pair.answers]


def reward_figures(found: NDArray[np.float64]) -> dict[str, float]:
    """What a reward model says of N held-out pairs.

    Args:
        found: Its scores of ``rows_of`` them, shape (2 N,).

    Returns:
        ``loss``, the mean of -log sigmoid(score of the better answer - score of the other);
        ``accuracy``, the share of pairs whose better answer scores higher, in which a tie counts
        as half; and the mean scores ``chosen`` and ``rejected``.
    """
    chosen, rejected = found[0::2], found[1::2]
    return {
        "loss": float(-log_sigmoid(chosen - rejected).mean()),
        "accuracy": float(((np.sign(chosen - rejected) + 1) / 2).mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }


def reward_trainer(
    info: FolderInfo,
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
        info: The folder of the language model.
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
    device = this_process().device
    low = computes_in_bfloat16(settings, device)
    dtype = type_of_base(settings.base, device, low_precision=low)
    base = load_base(info, settings.base, dtype, device)
    model: Any = new_reward_model(info.path, padding, settings.seed, base=base).to(device)
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
            train_dataset=Dataset.from_dict(columns).select(
                order_of_run(len(learned), steps * settings.batch_size, settings.seed)
            ),
            processing_class=library_tokenizer(info.path, vocabulary, padding),
            peft_config=adapter_config(model, settings, kind="SEQ_CLS"),
        )
    in_float32(trainer.model)
    return trainer
