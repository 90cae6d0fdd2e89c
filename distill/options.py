"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from distill.settings import Choice, ChoiceBy, DeviceMap, TeacherPrecision
from mistill.loss.names import DivergenceName
from mistill.training.processes import OptimizerName, Precision, TrackerName


class TrainOptions(TypedDict, total=False):
    """Fields of ``TrainSettings``."""

    skip_bad_rows: bool
    tokens: int
    epochs: float | None
    block_length: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float | None
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    optimizer: OptimizerName
    gradient_checkpointing: bool
    lora_rank: int
    divergence: DivergenceName
    mixture: float
    temperature: float
    cross_entropy: float
    on_policy: float
    on_policy_temperature: float
    on_policy_prompt: int
    held_out_share: float
    held_out_tokens: int
    kept_back_share: float
    evaluate_every: int
    checkpoint_every: int
    loss_memory_mib: float
    precision: Precision
    teacher_precision: TeacherPrecision
    teacher_device_map: DeviceMap | None
    divide_teacher: bool
    twin: bool
    trackers: Sequence[TrackerName]
    seed: int


class StudentOptions(TypedDict, total=False):
    """Fields of ``StudentSettings``."""

    skip_bad_rows: bool
    layers: int | None
    parameters: int | None
    megabytes_at_4_bits: float | None
    choose: Choice
    keep: Sequence[int]
    fresh: bool
    hidden_size: int | None
    intermediate_size: int | None
    attention_heads: int | None
    key_value_heads: int | None
    seed: int
    calibration_tokens: int | None
    block_length: int
    heal: bool | None
    heal_tokens: int


class HealOptions(TypedDict, total=False):
    """Fields of ``HealSettings``."""

    skip_bad_rows: bool
    tokens: int
    block_length: int
    ridge: float | None
    kept_layers: Sequence[int]


class TargetOptions(TypedDict, total=False):
    """Fields of ``TargetSettings``."""

    skip_bad_rows: bool
    method: Literal["systematic", "multinomial", "top_k"]
    draws: int
    top_k: int
    temperature: float
    codec: Literal["plain", "coded"]
    block_length: int
    shard_tokens: int
    batch_size: int
    memory_mib: float
    precision: Precision
    seed: int
    rank: int | None
    ranks: int | None


class GenerateOptions(TypedDict, total=False):
    """Fields of ``GenerateSettings``."""

    skip_bad_rows: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    system: str | None
    keep_unfinished: bool
    max_repeats: int
    drop_duplicates: bool
    held_out: str | Path | None
    held_out_share: float
    batch_size: int
    seed: int
    best_of: int
    by: ChoiceBy | None
    schema: str | None
    pattern: str | None
    pairs: bool
    without_prompts: int
    reverse: bool
    keep_share: float
    server: str | None
    api_key_file: str | Path | None
