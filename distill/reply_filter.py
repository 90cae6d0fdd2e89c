"""Which replies of a teacher a student should not learn from.

Small teachers fall into loops (``mistill.measures.repetition``), and answer many prompts with the
same sentence. A student learns both, so that such replies are found by what they look like.
"""

from __future__ import annotations

from mistill.measures.repetition import words_of


def without_spelling(text: str) -> str:
    """A text without what two spellings of one answer differ in: case, punctuation and space.

    Args:
        text: A reply.

    Returns:
        Its words, with a space between them.
    """
    return " ".join(words_of(text))
