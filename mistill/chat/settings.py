"""How a chatbot replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mistill.engine.sampling import ChosenSampling
from mistill.settings import require, require_choice, require_range

Overflow = Literal["refuse", "slide"]


@dataclass(frozen=True, kw_only=True)
class ChatSettings(ChosenSampling):
    """How replies are sampled, and when they end.

    Attributes:
        max_new_tokens: The most tokens of one reply.
        stop: Strings that end a reply and are not part of it.
        overflow: What happens when the conversation no longer fits into the model's context:
            ``refuse`` ends with an error, ``slide`` leaves out the oldest turns.
    """

    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    overflow: Overflow = "refuse"

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        super().__post_init__()
        require_range("max_new_tokens", self.max_new_tokens, 1)
        require(
            not isinstance(self.stop, str), f"stop must be a list of strings, not {self.stop!r}"
        )
        require("" not in self.stop, "an empty stop string would end every reply; leave it out")
        require_choice("overflow", self.overflow, get_args(Overflow))
