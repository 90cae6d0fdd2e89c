"""How much a text repeats itself, by its runs of words (n-grams)."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text; its case and punctuation do not count.

    Args:
        text: Any text. A script without spaces between words gives a word between two marks.

    Returns:
        The words in order.
    """
    return _WORD.findall(text.casefold())


def runs_of(text: str, length: int) -> list[tuple[str, ...]]:
    """All runs of neighbouring words of one length, overlapping.

    Args:
        text: Any text.
        length: Words of a run, 1 or more.

    Returns:
        The runs in order; none for a text of fewer words.
    """
    words = words_of(text)
    return list(zip(*(words[start:] for start in range(length)), strict=False))


def most_repeats(text: str, length: int = 4) -> int:
    """How often the run of words stands in a text that stands there most often.

    Args:
        text: A reply.
        length: Words of a run.

    Returns:
        1 for a text that repeats no run; 0 for one of fewer words.
    """
    return max(Counter(runs_of(text, length)).values(), default=0)


def distinct_share(text: str, length: int) -> float:
    """Different runs of words as a share of all of them: distinct-n within one reply.

    The measure is that of Li et al., 2016, section 5.3 (https://arxiv.org/abs/1510.03055), who take
    it over all replies together, where it falls with their number; within one reply it tells how
    much that reply repeats itself.

    Args:
        text: A reply.
        length: Words of a run, n.

    Returns:
        Above 0 to 1; 1 for a text that repeats no run, and for one of fewer words.
    """
    runs = runs_of(text, length)
    return len(set(runs)) / len(runs) if runs else 1.0
