"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from mistill.judging.judge import Check
from mistill.preferences.reading import PairsOfRanking
from mistill.training.processes import OptimizerName, Precision, TrackerName
from tune.settings import Base, Keep, LongConversations, Method, PreferenceLoss, Start, Target


class SupervisedOptions(TypedDict, total=False):
    """Fields of ``SupervisedSettings``."""

    skip_bad_rows: bool
    epochs: float | None
    tokens: int | None
    block_length: int
    long_conversations: LongConversations
    batch_size: int
    micro_batch_size: int
    lora_rank: int
    lora_alpha: float | None
    lora_targets: Sequence[Target]
    lora_ranks: Sequence[str]
    lora_start: Start
    rslora: bool
    dora: bool
    base: Base
    learning_rate: float | None
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    optimizer: OptimizerName
    neftune: float
    gradient_checkpointing: bool
    held_out_share: float
    held_out_tokens: int
    evaluate_every: int | None
    patience: int
    checkpoint_every: int
    other_tokens: int
    replies: int
    reply_tokens: int
    loss_memory_mib: float
    precision: Precision
    trackers: Sequence[TrackerName]
    seed: int


class PreferenceOptions(TypedDict, total=False):
    """Fields of ``PreferenceSettings``."""

    skip_bad_rows: bool
    lora_rank: int
    lora_alpha: int | None
    base: Base
    epochs: float
    steps: int | None
    batch_size: int
    micro_batch_size: int
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    max_length: int
    gradient_checkpointing: bool
    precision: Precision
    checkpoint_every: int | None
    seed: int
    held_out_share: float
    evaluate_every: int | None
    ranking: PairsOfRanking
    loss: PreferenceLoss
    learning_rate: float | None
    beta: float
    label_smoothing: float | None
    good_weight: float
    bad_weight: float
    keep: Keep
    other_tokens: int


class RewardOptions(TypedDict, total=False):
    """Fields of ``RewardSettings``."""

    skip_bad_rows: bool
    lora_rank: int
    lora_alpha: int | None
    base: Base
    epochs: float
    steps: int | None
    batch_size: int
    micro_batch_size: int
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    max_length: int
    gradient_checkpointing: bool
    precision: Precision
    checkpoint_every: int | None
    seed: int
    held_out_share: float
    evaluate_every: int | None
    ranking: PairsOfRanking
    learning_rate: float | None
    margins: bool
    centering: float
    keep: Keep


class ReinforceOptions(TypedDict, total=False):
    """Fields of ``ReinforceSettings``."""

    skip_bad_rows: bool
    lora_rank: int
    lora_alpha: int | None
    base: Base
    epochs: float
    steps: int | None
    batch_size: int
    micro_batch_size: int
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    max_length: int
    gradient_checkpointing: bool
    precision: Precision
    checkpoint_every: int | None
    seed: int
    method: Method
    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    learning_rate: float | None
    beta: float | None
    max_kl: float
    check: Check | None
    schema: str | None
    pattern: str | None
    function: str | None
    held_out_share: float
    held_out_prompts: int
    evaluate_every: int | None
    keep: Keep
    other_tokens: int
