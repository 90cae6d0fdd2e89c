"""What may be given by keyword: ``python -m tests.options`` writes it from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from mistill.chat.settings import Overflow


class ChatOptions(TypedDict, total=False):
    """Fields of ``ChatSettings``."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    dry_multiplier: float | None
    dry_allowed_length: int | None
    seed: int | None
    max_new_tokens: int
    stop: Sequence[str]
    overflow: Overflow
