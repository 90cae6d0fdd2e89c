"""Which replies of a teacher a student should not learn from.

Small teachers fall into loops, and answer many prompts with the same sentence. A student learns
both, so that such replies are found by what they look like.
"""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")
_RUN = 4


def most_repeats(text: str) -> int:
    """How often the run of four words stands in a text that stands there most often.

    Args:
        text: A reply; its case and punctuation do not count.

    Returns:
        1 for a text that repeats no run; 0 for one of fewer than four words.
    """
    words = _WORD.findall(text.casefold())
    runs = Counter(zip(*(words[start:] for start in range(_RUN)), strict=False))
    return max(runs.values(), default=0)


def without_spelling(text: str) -> str:
    """A text without what two spellings of one answer differ in: case, punctuation and space.

    Args:
        text: A reply.

    Returns:
        Its words, with a space between them.
    """
    return " ".join(_WORD.findall(text.casefold()))
