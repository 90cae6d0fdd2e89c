"""The trainers of TRL on pairs and on labelled answers, with mistill's tokens and references.

TRL tokenizes conversations itself, and takes the prompt's end to be where the two answers begin to
differ. Here its rows are mistill's own token ids, of which every answer has its own beginning, with
the log-probabilities that the model holds them to have before it is trained.

B is batch, T positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mistill.errors import TrainingError
from mistill.preferences.tokens import Answer, LabelledTokens, PairTokens
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import this_process
from tune.pairwise.losses import first_loss
from tune.settings import PreferenceSettings
from tune.trainers.adapters import (
    adapter_config,
    library_tokenizer,
    padding_id,
    take_for_float,
)
from tune.trainers.arguments import arguments
from tune.trainers.library import as_given, quiet_class, quiet_trl
from tune.trainers.running import in_float32
from tune.trainers.shares import filled, order_of_run

_log = logging.getLogger(__name__)

Items = Sequence[PairTokens] | Sequence[LabelledTokens]

# How far the first loss may be from what it should be: sums in float32 and in bfloat16.
_NEAR, _NEAR_IN_BFLOAT16 = 2e-3, 0.1


@dataclass(frozen=True)
class PairCollator:
    """Rows of pairs as a batch: the better answers first, then the others.

    Attributes:
        padding: Token to fill up with.
    """

    padding: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad the rows on the right.

        Args:
            rows: B pairs: ``chosen_ids``, ``chosen_start`` and ``ref_chosen_logps``, and the same
                of the rejected ones.

        Returns:
            ``input_ids``, ``attention_mask`` and ``completion_mask`` of shape (2 B, T), and the
            references of shape (B,).
        """
        sides = [(row[f"{side}_ids"], row[f"{side}_start"]) for side in _SIDES for row in rows]
        width = max(len(ids) for ids, _ in sides)
        shape = (len(sides), width)
        ids = torch.full(shape, self.padding)
        seen, answers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for place, (tokens, start) in enumerate(sides):
            ids[place, : len(tokens)] = torch.tensor(tokens)
            seen[place, : len(tokens)] = 1
            answers[place, start : len(tokens)] = 1
        batch = {"input_ids": ids, "attention_mask": seen, "completion_mask": answers}
        for side in _SIDES:
            name = f"ref_{side}_logps"
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


_SIDES = ("chosen", "rejected")


def answers_of(items: Items) -> list[Answer]:
    """All answers in their order; of a pair the better one first."""
    return [answer for item in items for answer in item.answers]


def preference_trainer(
    model: Any,
    folder: Path,
    vocabulary: Vocabulary,
    learned: Items,
    reference: Callable[[Sequence[Answer], str], NDArray[np.float64]],
    settings: PreferenceSettings,
    work: Path,
    *,
    steps: int,
    checkpoint_every: int,
) -> Any:
    """A trainer of TRL for a loss.

    Args:
        model: The model to train: in float32, or frozen in 4 bits.
        folder: Its folder.
        vocabulary: Its vocabulary.
        learned: What it learns from.
        reference: Log-probabilities of answers under the model as it is given, computed once and
            recorded under a name.
        settings: The loss, and how to train.
        work: The folder of the run.
        steps: Optimizer steps.
        checkpoint_every: Optimizer steps between two checkpoints.

    Returns:
        The trainer; what it trains is in float32.

    Raises:
        TrainingError: If its first loss is not that of a model which is its own reference.
    """
    used = {token for answer in answers_of(learned) for token in answer.ids}
    padding = padding_id(vocabulary, used)
    given = arguments(
        settings,
        work,
        rate=settings.peak_learning_rate,
        steps=steps,
        checkpoint_every=checkpoint_every,
    )
    tokenizer = library_tokenizer(folder, vocabulary, padding)
    take_for_float(model)
    shared = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": adapter_config(model, settings),
    }
    with quiet_trl():
        if settings.loss == "kto":
            trainer = _label_trainer(shared, given, learned, reference, settings)
        elif settings.loss == "orpo":
            trainer = _odds_trainer(shared, given, learned, settings)
        else:
            trainer = _pair_trainer(shared, given, learned, reference, settings, padding)
        in_float32(trainer.model)
        _check_first_loss(trainer, settings)
    return trainer


def _pair_trainer(
    shared: Mapping[str, Any],
    given: Mapping[str, Any],
    learned: Items,
    reference: Callable[[Sequence[Answer], str], NDArray[np.float64]],
    settings: PreferenceSettings,
    padding: int,
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    known = reference(answers_of(learned), "learned")
    rows = Dataset.from_dict(
        {
            **_pair_columns(learned),
            "ref_chosen_logps": known[0::2],
            "ref_rejected_logps": known[1::2],
        }
    )
    return quiet_class(DPOTrainer, _prepare_dataset=as_given, _precompute_ref_logps=as_given)(
        **shared,
        args=DPOConfig(
            **given,
            beta=settings.beta,
            loss_type=[settings.loss],
            label_smoothing=settings.smoothing,
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=rows.select(_order(learned, given, settings)),
        data_collator=PairCollator(padding),
    )


def _order(learned: Items, given: Mapping[str, Any], settings: PreferenceSettings) -> list[int]:
    """The rows of all steps, in their order."""
    return order_of_run(len(learned), given["max_steps"] * settings.batch_size, settings.seed)


def _pair_columns(learned: Items) -> dict[str, list[Any]]:
    pairs = [item for item in learned if isinstance(item, PairTokens)]
    return {
        "chosen_ids": [list(pair.chosen.ids) for pair in pairs],
        "chosen_start": [pair.chosen.start for pair in pairs],
        "rejected_ids": [list(pair.rejected.ids) for pair in pairs],
        "rejected_start": [pair.rejected.start for pair in pairs],
    }


def _check_first_loss(trainer: Any, settings: PreferenceSettings) -> None:
    """Refuse a reference that is not the model itself, before a step is taken."""
    expected = first_loss(settings.loss, settings.beta)
    if expected is None:
        return
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[row] for row in range(min(2, len(rows)))])
    batch = {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}
    model = trainer.model
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(model, batch))
    model.train(training)
    trainer._metrics["eval"].clear()
    near = _NEAR_IN_BFLOAT16 if trainer.args.bf16 else _NEAR
    if not abs(loss - expected) <= near * max(1.0, expected):
        raise TrainingError(
            f"the first loss is {loss:.6f} and should be {expected:.6f}, as of a model that is its "
            "own reference; the reference log-probabilities are of another model or other text"
        )


def label_order(rows: int, micro_batch_size: int, seed: int) -> list[int]:
    """The order in which labelled answers are learned.

    Each batch estimates the KL divergence from prompts with the answers of their neighbours, so
    that the order is fixed and no batch has a single answer.

    Args:
        rows: How many there are.
        micro_batch_size: Answers of one batch.
        seed: Decides the order.

    Returns:
        Their numbers; one is left out where the last batch would hold it alone.
    """
    order = [int(row) for row in np.random.default_rng(seed).permutation(rows)]
    return order[:-1] if rows % micro_batch_size == 1 and rows > 1 else order


def neighbours(rows: Sequence[int], micro_batch_size: int) -> list[int]:
    """The row whose answer stands behind another one's prompt: the one before it in its batch.

    Args:
        rows: Numbers of rows, in their order.
        micro_batch_size: Rows of one batch.

    Returns:
        As many numbers; the first row of a batch has the last one's.
    """
    others: list[int] = []
    for start in range(0, len(rows), micro_batch_size):
        batch = list(rows[start : start + micro_batch_size])
        others += [batch[-1], *batch[:-1]]
    return others


def _label_trainer(
    shared: Mapping[str, Any],
    given: Mapping[str, Any],
    learned: Items,
    reference: Callable[[Sequence[Answer], str], NDArray[np.float64]],
    settings: PreferenceSettings,
) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    items = [item for item in learned if isinstance(item, LabelledTokens)]
    _warn_of_imbalance(items, settings)
    # What all processes compute at once, over which the divergence is estimated.
    size = settings.micro_batch_size * this_process().num_processes
    order = filled(label_order(len(items), size, settings.seed), size)
    answers = [items[row].answer for row in order]
    behind = [items[row].answer for row in neighbours(order, size)]
    mismatched = [
        Answer((*one.ids[: one.start], *other.ids[other.start :]), one.start)
        for one, other in zip(answers, behind, strict=True)
    ]
    rows = Dataset.from_dict(
        {
            "prompt_ids": [list(one.ids[: one.start]) for one in answers],
            "completion_ids": [list(one.ids[one.start :]) for one in answers],
            "KL_completion_ids": [list(one.ids[one.start :]) for one in behind],
            "label": [items[row].good for row in order],
            "ref_logps": reference(answers, "learned"),
            "ref_KL_logps": reference(mismatched, "mismatched"),
        }
    )
    needed = given["max_steps"] * settings.batch_size
    return quiet_class(KTOTrainer, _prepare_dataset=as_given, _precompute_ref_logps=as_given)(
        **shared,
        args=KTOConfig(
            **given,
            beta=settings.beta,
            desirable_weight=settings.good_weight,
            undesirable_weight=settings.bad_weight,
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=rows.select([row % len(order) for row in range(needed)]),
    )


def _warn_of_imbalance(items: Sequence[LabelledTokens], settings: PreferenceSettings) -> None:
    """Say so where good and bad answers weigh differently, which the paper advises against."""
    good = sum(item.good for item in items)
    bad = len(items) - good
    if not good or not bad:
        _log.warning(
            "all %d labels are the same; the loss kto needs good answers and bad ones", len(items)
        )
        return
    ratio = good * settings.good_weight / (bad * settings.bad_weight)
    if not 0.99 <= ratio <= 4 / 3 + 0.01:
        _log.warning(
            "%d good and %d bad answers weigh %.2f to 1 with good_weight %g and bad_weight %g; the "
            "authors of KTO advise 1 to 1.33 (section 4.2): set one of the weights",
            good,
            bad,
            ratio,
            settings.good_weight,
            settings.bad_weight,
        )


def _odds_trainer(
    shared: Mapping[str, Any],
    given: Mapping[str, Any],
    learned: Items,
    settings: PreferenceSettings,
) -> Any:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return quiet_class(ORPOTrainer, tokenize_row=_odds_row)(
        **shared,
        args=ORPOConfig(**given, beta=settings.beta, max_length=settings.max_length),
        train_dataset=Dataset.from_dict(_pair_columns(learned)).select(
            _order(learned, given, settings)
        ),
    )


def _odds_row(self: Any, row: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """A row as the trainer's collator takes it, from mistill's ids."""
    made: dict[str, Any] = {}
    for side in _SIDES:
        ids, start = row[f"{side}_ids"], row[f"{side}_start"]
        made[f"{side}_input_ids"] = ids
        made[f"{side}_attention_mask"] = [1] * len(ids)
        made[f"{side}_labels"] = [-100] * start + list(ids[start:])
    return made
