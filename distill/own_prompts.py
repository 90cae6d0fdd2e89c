"""Prompts that the teacher writes itself.

Given no more than the tokens with which its template begins a user's turn, an aligned model writes
one (Magpie, Xu et al., 2024, https://arxiv.org/abs/2406.08464): the prompts are like those that it
was tuned on, and nobody has to collect any.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.replies import Reply
from mistill.errors import TextError
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import Vocabulary

OWN_PROMPTS = "@teacher"
"""Stands for a file of prompts where the teacher writes them itself."""

_PROBE = "mistill7probe"


def turn_of_the_user(system: str | None, vocabulary: Vocabulary) -> tuple[list[int], str]:
    """The tokens with which a user's turn begins, and what follows the turn.

    Args:
        system: System prompt; the chat template's own if not given.
        vocabulary: With a chat template.

    Returns:
        Token ids up to where the user writes, and the text that the template writes after that.

    Raises:
        TextError: If the template does not write what a user says as it is.
        VocabularyError: If there is no chat template.
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    text = vocabulary.render([*before, {"role": "user", "content": _PROBE}], True)
    begin, probe, after = text.rpartition(_PROBE)
    if not probe:
        raise TextError("the chat template changes what the user says; give prompts of your own")
    return vocabulary.encode(begin), after


def own_prompts(
    written: Sequence[Reply], after: str, vocabulary: Vocabulary, system: str | None
) -> list[Conversation]:
    """What the teacher wrote, as prompts: whole, of one turn, not empty, and each once.

    Args:
        written: The turns, as they were sampled.
        after: What the template writes after a user's turn.
        vocabulary: Of the teacher.
        system: System prompt of every conversation.

    Returns:
        The prompts, in their order.

    Raises:
        TextError: If there are none.
    """
    mark = after.strip()[:1] and after.strip().split("\n")[0]
    before = () if system is None else ({"role": "system", "content": system},)
    talks: dict[str, Conversation] = {}
    for reply in written:
        text, cut, _ = vocabulary.decode(reply.ids).partition(mark) if mark else ("", "", "")
        if not mark:
            text = vocabulary.decode(reply.ids)
        # A mark inside means that it went on to write the other side's turn.
        is_whole = (reply.finished or cut) and not any(one in text for one in vocabulary.mark_texts)
        if is_whole and text.strip():
            turn = {"role": "user", "content": text.strip()}
            talks.setdefault(text.strip(), Conversation((*before, turn)))
    if not talks:
        raise TextError(
            f"the teacher ended none of {len(written)} prompts that it wrote itself; raise "
            "max_new_tokens, or give prompts of your own"
        )
    return list(talks.values())
