"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from mistill.training.processes import Precision, TrackerName
from mistill.weights.gptq_layout import ScaleType
from quantize.settings import FloatType, Method, Order


class RoundingOptions(TypedDict, total=False):
    """Fields of ``RoundingSettings``."""

    bits: int
    group_size: int
    symmetric: bool
    scale_type: ScaleType
    overrides: Sequence[str]
    head_bits: int | None
    embedding_bits: int | None
    skip_bad_rows: bool


class GptqOptions(TypedDict, total=False):
    """Fields of ``GptqSettings``."""

    bits: int
    group_size: int
    symmetric: bool
    scale_type: ScaleType
    overrides: Sequence[str]
    head_bits: int | None
    embedding_bits: int | None
    method: Method
    order: Order
    scale_search: int
    damp_percent: float
    true_sequential: bool
    samples: int
    block_length: int
    seed: int
    skip_bad_rows: bool
    model_file_base_name: str | None


class Nf4Options(TypedDict, total=False):
    """Fields of ``Nf4Settings``."""

    skip_bad_rows: bool
    double_quantization: bool


class MixedOptions(TypedDict, total=False):
    """Fields of ``MixedSettings``."""

    size_mb: float | None
    bits_per_weight: float | None
    formats: Sequence[str]
    tables: bool
    fused: bool
    sensitivity_samples: int
    symmetric: bool
    scale_type: ScaleType
    method: Method
    order: Order
    scale_search: int
    damp_percent: float
    true_sequential: bool
    samples: int
    block_length: int
    seed: int
    skip_bad_rows: bool


class RotationOptions(TypedDict, total=False):
    """Fields of ``RotationSettings``."""

    seed: int
    dtype: FloatType


class TuningOptions(TypedDict, total=False):
    """Fields of ``TuningSettings``."""

    skip_bad_rows: bool
    steps: int
    batch_size: int
    micro_batch_size: int
    block_length: int
    learning_rate: float
    norms: bool
    seen_text: bool
    held_out_blocks: int
    evaluate_every: int
    checkpoint_every: int
    gradient_checkpointing: bool
    loss_memory_mib: float
    precision: Precision
    trackers: Sequence[TrackerName]
    seed: int


class SweepOptions(TypedDict, total=False):
    """Fields of ``SweepSettings``."""

    variants: Sequence[str]
    held_out_samples: int
    samples: int
    block_length: int
    seed: int
    skip_bad_rows: bool
