"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from mistill.engine.language_model import Provider


class ServeOptions(TypedDict, total=False):
    """Fields of ``ServeSettings``."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    dry_multiplier: float | None
    dry_allowed_length: int | None
    seed: int | None
    host: str
    port: int
    api_key_file: str | Path | None
    no_key: bool
    allow_host: Sequence[str]
    allow_origin: Sequence[str]
    model_name: str | None
    any_model: bool
    max_new_tokens: int
    threads: int | None
    provider: Provider
    context: int | None
    slots: int | None
    queue: int
    queue_seconds: float
    prefix_mib: int | None
    stream_interval_ms: int
    metrics: bool
    page: bool
