"""Settings of ``distill.generate_conversations``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mistill.settings import require


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How a teacher writes conversations.

    Attributes:
        max_new_tokens: Most tokens of a reply; what has not ended by then is unfinished.
        temperature: Divides the logits; 0 always takes the most probable token.
        top_p: Keep the most probable tokens until their probabilities reach this sum; 1 keeps all.
        system: A system prompt that begins every conversation; without one, the teacher's chat
            template decides.
        keep_unfinished: Keep replies that were cut off; a student that learns from them learns
            not to stop.
        held_out: A second .jsonl file for a share of the prompts, for measuring what was not
            trained on.
        held_out_share: Share of the prompts whose conversations go there, by a hash of the
            prompt, so that equal prompts never part.
        batch_size: Prompts that the teacher answers at once.
        seed: Makes the replies repeatable; each prompt draws by itself.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    system: str | None = None
    keep_unfinished: bool = False
    held_out: Path | None = None
    held_out_share: float = 0.125
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no reply can be written with."""
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, not {self.max_new_tokens}",
        )
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be 0 or above, not {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(
            0 < self.held_out_share < 1,
            f"held_out_share must be between 0 and 1, not {self.held_out_share}",
        )
        require(
            self.held_out is None or Path(self.held_out).suffix.lower() == ".jsonl",
            f"held_out must be a .jsonl file, not {self.held_out}",
        )
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.seed >= 0, f"seed must be 0 or above, not {self.seed}")
