"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from export.settings import GgufType


class OnnxOptions(TypedDict, total=False):
    """Fields of ``OnnxSettings``."""

    skip_bad_rows: bool
    precision: Literal["auto", "float32", "float16", "int8", "int4"]
    activations: Literal["float32", "float16"] | None
    head_bits: Literal[4, 8, 32] | None
    embedding_bits: Literal[4, 8, 32] | None
    block_size: int | None
    accuracy_level: Literal[0, 4]
    float_columns: int | None
    context_length: int | None
    portable: bool
    layout: Literal["mistill", "transformersjs"]
    parity_positions: int
    cache: Literal["float32", "int8"]
    cache_texts: Sequence[str]
    ring: bool
    tune_for: str | None
    memory_speed: float | None


class GgufOptions(TypedDict, total=False):
    """Fields of ``GgufSettings``."""

    dtype: GgufType | None
    table_dtype: GgufType | None
