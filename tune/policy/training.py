"""TRL's trainers of reinforcement, on mistill's prompts, judges and bounds.

GRPO (Shao et al., 2024, https://arxiv.org/abs/2402.03300) and RLOO (Ahmadian et al., 2024,
https://arxiv.org/abs/2402.14740) compare several answers to one prompt with one another and need no
critic. The loss of GRPO counts every token alike (DAPO, Yu et al., 2025,
https://arxiv.org/abs/2503.14476, section 3.3) and does not divide by the spread of a group, which
favours prompts that are nearly solved (Liu et al., 2025, https://arxiv.org/abs/2503.20783); answers
that were cut off teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TrainingError
from mistill.judging.judge import Judge
from mistill.preferences.reading import PromptRow
from mistill.preferences.tokens import Answer
from mistill.pytorch.writing import write_replies
from mistill.text.vocabulary import Vocabulary
from tune.settings import ReinforceSettings
from tune.trainers.adapters import (
    adapter_config,
    library_tokenizer,
    padding_id,
    take_for_float,
)
from tune.trainers.arguments import arguments
from tune.trainers.library import quiet_class, quiet_trl
from tune.trainers.moved import divergence_from_start
from tune.trainers.running import in_float32

# Tokens of one step's answers on which the divergence from the start is measured.
_KL_TOKENS = 2048


class Prompts:
    """Prompts as rows of a trainer, which knows them by their numbers alone."""

    def __init__(self, rows: Sequence[PromptRow], ids: Sequence[Sequence[int]]) -> None:
        """Number the prompts.

        Args:
            rows: The prompts.
            ids: Their tokens.
        """
        self.rows, self.ids = list(rows), [list(one) for one in ids]

    def column(self) -> list[str]:
        """The numbers, as the text that a trainer takes for prompts."""
        return [str(number) for number in range(len(self.rows))]

    def tokenized(self, trainer: Any, prompts: Sequence[str]) -> tuple[list[list[int]], None, Any]:
        """What a trainer takes the prompts' tokens to be.

        Args:
            trainer: The trainer.
            prompts: Numbers.

        Returns:
            Token ids, no pictures, and nothing else.
        """
        return [self.ids[int(prompt)] for prompt in prompts], None, {}


def policy_trainer(
    model: Any,
    folder: Path,
    vocabulary: Vocabulary,
    prompts: Prompts,
    judge: Judge,
    start_model: Callable[[], Any],
    settings: ReinforceSettings,
    work: Path,
    *,
    steps: int,
    checkpoint_every: int,
) -> Any:
    """A trainer of TRL for a method.

    Args:
        model: The model to train: in float32, or frozen in 4 bits.
        folder: Its folder.
        vocabulary: Its vocabulary.
        prompts: What it answers.
        judge: Says how good the answers are.
        start_model: Gives the model as it was; called only where there are no adapters.
        settings: The method, and how to train.
        work: The folder of the run.
        steps: Optimizer steps.
        checkpoint_every: Optimizer steps between two checkpoints.

    Returns:
        The trainer; what it trains is in float32, and it logs ``kl_from_start`` at every step.
    """
    used = {token for ids in prompts.ids for token in ids}
    padding = padding_id(vocabulary, used)
    trainer: Any = None
    take_for_float(model)

    def rewards(numbers: Sequence[str], written: Sequence[Sequence[int]], log: Any) -> list[float]:
        asked = [int(number) for number in numbers]
        answers = [
            Answer((*prompts.ids[number], *ids), len(prompts.ids[number]))
            for number, ids in zip(asked, written, strict=True)
        ]
        moved = divergence_from_start(trainer.model, start_model, answers, _KL_TOKENS)
        log("kl_from_start", float(moved["tuned_from_base"] or 0.0))
        rows = [prompts.rows[number] for number in asked]
        return judged(judge, rows, completion_texts(written, vocabulary))

    # TRL names these arguments.
    def reward_function(prompts: Any, completion_ids: Any, log_metric: Any, **more: Any) -> Any:
        return rewards(prompts, completion_ids, log_metric)

    reward_function.__name__ = "judge"
    given = {
        **arguments(
            settings,
            work,
            rate=settings.peak_learning_rate,
            steps=steps,
            checkpoint_every=checkpoint_every,
            in_order=False,
        ),
        "num_generations": settings.samples,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "beta": settings.divergence_weight,
        "mask_truncated_completions": True,
    }
    with quiet_trl():
        from datasets import Dataset

        shared = {
            "model": model,
            "reward_funcs": [reward_function],
            "train_dataset": Dataset.from_dict({"prompt": prompts.column()}),
            "processing_class": library_tokenizer(folder, vocabulary, padding),
            "peft_config": adapter_config(model, settings),
        }
        methods = {"_tokenize_prompts": lambda self, some: prompts.tokenized(self, some)}
        if settings.method == "rloo":
            from trl import RLOOConfig, RLOOTrainer

            trainer = quiet_class(RLOOTrainer, **methods)(args=RLOOConfig(**given), **shared)
        else:
            from trl import GRPOConfig, GRPOTrainer

            config = GRPOConfig(**given, loss_type="dapo", scale_rewards="none")
            trainer = quiet_class(GRPOTrainer, **methods)(args=config, **shared)
    # What mistill takes for the end of a reply, and no other token.
    trainer.eos_token_ids = list(vocabulary.end_ids)
    trainer.generation_config.eos_token_id = list(vocabulary.end_ids)
    trainer.generation_kwargs["eos_token_id"] = list(vocabulary.end_ids)
    in_float32(trainer.model)
    return trainer


def completion_texts(completion_ids: Sequence[Sequence[int]], vocabulary: Vocabulary) -> list[str]:
    """Answers as text, without the token that ends them."""
    ends = set(vocabulary.end_ids)
    return [
        vocabulary.decode([token for token in ids if token not in ends]).strip()
        for ids in completion_ids
    ]


def judged(judge: Judge, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
    """What a judge says of answers; as many finite numbers, or an error.

    Args:
        judge: The judge.
        rows: Prompts.
        answers: As many answers.

    Returns:
        The rewards.

    Raises:
        TrainingError: If the judge fails, or gives something else.
    """
    rewards = judge(rows, answers)
    if len(rewards) != len(answers):
        raise TrainingError(
            f"the judge {judge.name} gave {len(rewards)} rewards for {len(answers)} answers"
        )
    for row, reward in zip(rows, rewards, strict=True):
        if not abs(reward) < float("inf"):
            raise TrainingError(
                f"the judge {judge.name} gave {reward} for an answer to {row.origin}; it should "
                "give a finite number"
            )
    return rewards


def judged_answers(
    model: Any,
    prompts: Prompts,
    numbers: Sequence[int],
    judge: Judge,
    vocabulary: Vocabulary,
    max_new_tokens: int,
) -> NDArray[np.float64]:
    """What a model's likeliest answers to some prompts are worth.

    Args:
        model: The model; adapters in it count.
        prompts: Held-out prompts.
        numbers: Which of them are answered.
        judge: Says how good the answers are.
        vocabulary: The model's.
        max_new_tokens: Most tokens of an answer.

    Returns:
        Of each answer its reward, its tokens, and 1 where it was cut off, shape (N, 3).
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    ends = vocabulary.end_ids
    with quiet_trl():
        ids = [prompts.ids[number] for number in numbers]
        replies = write_replies(plain, ids, ends, max_new_tokens)
    rows = [prompts.rows[number] for number in numbers]
    rewards = judged(judge, rows, completion_texts(replies, vocabulary))
    return np.array(
        [
            (reward, len(reply), reply[-1] not in ends)
            for reward, reply in zip(rewards, replies, strict=True)
        ],
        np.float64,
    )


def policy_figures(answers: NDArray[np.float64]) -> dict[str, float]:
    """What an evaluation says of answers.

    Args:
        answers: From ``judged_answers``.

    Returns:
        ``reward``, the mean reward; ``loss``, the same with the other sign; ``tokens``, the mean
        length; and ``truncated``, the share of answers that were cut off.
    """
    reward, tokens, truncated = answers.mean(axis=0).tolist()
    return {"loss": -reward, "reward": reward, "tokens": tokens, "truncated": truncated}
