"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from benchmarks.settings import Length
from mistill.engine.language_model import Provider


class BenchOptions(TypedDict, total=False):
    """Fields of ``BenchSettings``."""

    skip_bad_rows: bool
    scored_tokens: int
    context_length: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    turn_seconds: float
    threads: int | None
    provider: Provider
    transformers_generate: bool
    perplexity: Sequence[str]
    perplexity_tokens: int | None
    tasks: bool
    prompts: Sequence[Length]
    depths: Sequence[Length]
    loads: int
    against: Sequence[str]
    sample_prompts: Sequence[str]
    sample_models: Sequence[str]
    sample_tokens: int
    task_models: Sequence[str]
    replies: bool
    reply_models: Sequence[str]
    reply_tokens: int


class EvalOptions(TypedDict, total=False):
    """Fields of ``EvalSettings``."""

    tasks: Sequence[str]
    include_path: str | None
    task_data: Sequence[str]
    limit: int | None
    few_shot: int | None
    chat_template: bool
    threads: int | None
    seed: int


class JudgeOptions(TypedDict, total=False):
    """Fields of ``JudgeSettings``."""

    skip_bad_rows: bool
    limit: int | None
    new_tokens: int
    threads: int | None
    server: str | None
    server_model: str | None
    api_key_file: str | Path | None


class ServingOptions(TypedDict, total=False):
    """Fields of ``ServingSettings``."""

    clients: Sequence[Length]
    requests: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    model: str | None
    api_key_file: str | Path | None
    threads: int | None
    seed: int


class DiffOptions(TypedDict, total=False):
    """Fields of ``DiffSettings``."""

    confidence: float
    tolerance: float
    clock_tolerance: float
    pairs: Sequence[str]


class ShipOptions(TypedDict, total=False):
    """Fields of ``ShipSettings``."""

    ship_mb: float | None
    ship_tps: float | None


class BudgetOptions(TypedDict, total=False):
    """Fields of ``Budget``."""

    max_kl: float | None
    min_tps: float | None
    max_mb: float | None
    max_memory_mb: float | None
    budget_for: Sequence[str]
