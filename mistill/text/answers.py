"""Conversations to tokens, with the tokens that the assistant writes marked.

Few chat templates mark what the assistant writes, so that it is found by rendering the
conversation up to each turn. The whole conversation is tokenized at once, because tokens of
separate parts would differ at their boundaries. Nothing that a turn says may be lost in the
template: a turn, a thought or a call of a tool that it does not write is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from mistill.errors import TextError
from mistill.text.blocks import Document
from mistill.text.chat_template import THOUGHTS
from mistill.text.conversation import Conversation, calls_of, content_of, thoughts_of
from mistill.text.typed_marks import encode_conversation, with_typed_marks_hidden
from mistill.text.vocabulary import Message, Vocabulary

# Number of last characters of a prompt that locate the reply in a rendered turn.
_SEAM = 16
# Stands for the content of a turn; no template writes it of itself.
_PROBE = "mistill7probe{}"
# The mark with which a prompt opens the assistant's thoughts, such as <think>.
_OPENING = re.compile(r"<([A-Za-z][\w:-]*)>\s*\Z")

_CHANGED = "the chat template changes the text of the assistant's turn, so that it cannot be marked"
_TWO_WAYS = (
    "the chat template renders the same prompt in two ways, so that the reply cannot be marked"
)


def conversation_documents(
    messages: Sequence[Message] | Conversation, vocabulary: Vocabulary
) -> list[Document]:
    """Turn a conversation into tokens, and mark those that the assistant writes.

    The assistant's tokens run from the end of the generation prompt to the token that ends the
    turn, inclusive; a line break that the template writes after that does not count. Usually the
    whole conversation is one document. Some templates render a turn differently if it is not the
    last: Mistral's move the system prompt to the last question, others drop the reasoning of
    earlier replies. Then every reply becomes a document of its own, so that it is learned after
    exactly the prompt that precedes it in use.

    Args:
        messages: Turns that begin with the user or the system and end with the assistant; or a
            conversation with all that stands beside them.
        vocabulary: With a chat template.

    Returns:
        One document, or one for each turn of the assistant that is to be learned; none if none is.

    Raises:
        TextError: If the template refuses the conversation, or does not write all that it says.
        VocabularyError: If there is no chat template.
    """
    talk = messages if isinstance(messages, Conversation) else Conversation(tuple(messages))
    typed = in_template_form(talk, vocabulary)
    talk = with_typed_marks_hidden(typed, vocabulary)
    hidden = talk is not typed
    rendered = talk.render(vocabulary)
    turns = [
        _prompt_and_answer(talk.until(number + 1), vocabulary)
        for number, message in enumerate(talk.messages)
        if message["role"] == "assistant" and number not in talk.unlearned
    ]
    refuse_unwritten(talk, vocabulary)
    if all(rendered.startswith(prompt + answer) for prompt, answer in turns):
        spans = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in turns]
        return [_masked(rendered, spans, vocabulary, hidden)] if spans else []
    return [
        _masked(prompt + answer, [(len(prompt), len(prompt) + len(answer))], vocabulary, hidden)
        for prompt, answer in turns
    ]


def in_template_form(talk: Conversation, vocabulary: Vocabulary) -> Conversation:
    """A conversation whose contents are texts, or lists of parts where the template takes those.

    Args:
        talk: Its contents are texts or lists of parts.
        vocabulary: With a chat template.

    Returns:
        The same conversation.

    Raises:
        VocabularyError: If there is no chat template.
    """
    if not any(isinstance(message.get("content"), list) for message in talk.messages):
        return talk
    probed, probes = talk, []
    for number, message in enumerate(talk.messages):
        if isinstance(message.get("content"), list):
            parts = [
                {"type": "text", "text": _PROBE.format(f"{number}x{part}x")}
                for part in range(len(message["content"]))
            ]
            probes += [part["text"] for part in parts]
            probed = probed.but(number, content=parts)
    try:
        rendered = probed.render(vocabulary)
    except TextError:
        return talk.joined()
    as_parts = "{'type'" not in rendered and all(probe in rendered for probe in probes)
    return talk if as_parts else talk.joined()


def prompt_ids(
    talk: Conversation, vocabulary: Vocabulary, *, reply_begins: bool = True
) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins.

    Special tokens that are typed in it are text.

    Args:
        talk: Turns up to the answer.
        vocabulary: With a chat template.
        reply_begins: Whether that turn is begun; else they end with the last turn.

    Returns:
        Token ids.

    Raises:
        TextError: If the template refuses the conversation, or it holds half of a character.
        VocabularyError: If there is no chat template.
    """
    hidden = with_typed_marks_hidden(talk, vocabulary)
    text = hidden.render(vocabulary, add_generation_prompt=reply_begins)
    ids: list[int] = encode_conversation(text, vocabulary, hidden=hidden is not talk).ids.tolist()
    return ids


# --- what a template leaves out -----------------------------------------------------------------


def refuse_unwritten(talk: Conversation, vocabulary: Vocabulary) -> None:
    """Refuse a conversation of which the chat template does not write everything.

    The contents are exchanged for others, and a content that does not come back is not written.

    Args:
        talk: Turns.
        vocabulary: With a chat template.

    Raises:
        TextError: If a turn before an answer, a call of a tool or a thought is left out.
        VocabularyError: If there is no chat template.
    """
    number = unwritten_turn(talk, vocabulary)
    if number is not None:
        role = talk.messages[number]["role"]
        raise TextError(
            f"the chat template does not write turn {number + 1}, of the role {role}; use a "
            "template that does, or leave the turn out"
        )
    for number, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        calls, thoughts = calls_of(message), thoughts_of(message)
        if calls is not None:
            _require_written(talk, number, (calls,), calls, vocabulary)
        if thoughts is not None and number not in talk.unlearned:
            name = next(name for name in THOUGHTS if message.get(name) == thoughts)
            _require_written(talk, number, THOUGHTS, name, vocabulary)


def unwritten_turn(talk: Conversation, vocabulary: Vocabulary) -> int | None:
    """The first turn, of others than the assistant, that the prompt of an answer leaves out.

    Args:
        talk: Turns; the prompt is that of the last answer, or of the one to come.
        vocabulary: With a chat template.

    Returns:
        Its number, from 0; None if all are written, or the template cannot be asked.

    Raises:
        VocabularyError: If there is no chat template.
    """
    stop = len(talk.messages)
    while stop and talk.messages[stop - 1]["role"] == "assistant":
        stop -= 1
    talk = probed = talk.until(stop)
    probes = {}
    for number, message in enumerate(talk.messages):
        if message["role"] != "assistant" and content_of(message).strip():
            probes[number] = _PROBE.format(f"{number}x")
            content = message["content"]
            probe = (
                probes[number]
                if isinstance(content, str)
                else [{"type": "text", "text": probes[number]}]
            )
            probed = probed.but(number, content=probe)
    try:
        rendered = probed.render(vocabulary, add_generation_prompt=True)
    except TextError:  # it asks for a content of a certain form
        return None
    lost = [number for number, probe in probes.items() if probe not in rendered]
    return lost[0] if lost else None


def _require_written(
    talk: Conversation, number: int, names: Sequence[str], name: str, vocabulary: Vocabulary
) -> None:
    """Refuse fields of a turn without which the template writes the same."""
    until = talk.until(number + 1)
    try:
        without = until.but(number, **dict.fromkeys(names)).render(vocabulary)
    except TextError:
        return
    if without == until.render(vocabulary):
        raise TextError(
            f"the chat template does not write the {name} of turn {number + 1}; use a template "
            "that does, or leave the field out"
        )


# --- answers ------------------------------------------------------------------------------------


def _prompt_and_answer(talk: Conversation, vocabulary: Vocabulary) -> tuple[str, str]:
    """The prompt of the last turn, and the reply with the token that ends it."""
    prompt = talk.until(len(talk.messages) - 1).render(vocabulary, add_generation_prompt=True)
    turn = talk.render(vocabulary)
    content = content_of(talk.messages[-1]).strip()
    begin = _begin(prompt, turn, content)
    if begin is None:
        return prompt, _reply_as_it_stands(prompt, turn, talk, vocabulary)
    end = _content_end(turn, begin, content, talk, vocabulary)
    return prompt, turn[begin : _end_of_turn(turn, end, vocabulary)[0]]


def _begin(prompt: str, turn: str, content: str) -> int | None:
    """Where the reply begins in a rendered turn; None if the turn does not hold it as it is."""
    if turn.startswith(prompt):
        reply = turn[len(prompt) :]
        holds_content = content in reply or "".join(content.split()) in "".join(reply.split())
        return len(prompt) if holds_content else None
    position = turn.rfind(content) if content else -1
    # After the last characters of the prompt, usually at the content or a space before it.
    for begin in range(position, max(position - _SEAM, 0), -1):
        if turn[:begin].endswith(prompt[-_SEAM:]):
            return begin
    return None


def _content_end(
    turn: str, begin: int, content: str, talk: Conversation, vocabulary: Vocabulary
) -> int:
    """Where the content of the last turn ends, before what the template writes after it."""
    if not content:
        return begin
    if turn.count(content, begin) == 1:
        return turn.index(content, begin) + len(content)
    # The end of the turn may hold the same letters, as <|im_end|> holds those of "end".
    _, after = _around_a_probe(talk, vocabulary)
    if after is not None and turn.endswith(after):
        return max(begin, len(turn) - len(after))
    return max(begin, turn.find(content, begin) + len(content))


def _around_a_probe(talk: Conversation, vocabulary: Vocabulary) -> tuple[str | None, str | None]:
    """What the template writes before and after the content of the last turn."""
    probe = _PROBE.format("x")
    last = talk.messages[-1]
    content = probe if not isinstance(last.get("content"), list) else _parts(probe)
    try:
        rendered = talk.but(len(talk.messages) - 1, content=content).render(vocabulary)
    except TextError:
        return None, None
    before, occurs, after = rendered.rpartition(probe)
    return (before, after) if occurs else (None, None)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _end_of_turn(turn: str, start: int, vocabulary: Vocabulary) -> tuple[int, bool]:
    """The end of the first token that ends a reply, or of the text before the last line breaks."""
    spelled = [
        vocabulary.token_bytes(token).decode("utf-8", "replace") for token in vocabulary.end_ids
    ]
    positions = [(turn.find(end, start), end) for end in spelled if end]
    first = min(((position, end) for position, end in positions if position >= 0), default=None)
    if first is None:
        return max(start, len(turn.rstrip())), False
    return first[0] + len(first[1]), True


# --- thoughts that a template cuts off ----------------------------------------------------------


def _reply_as_it_stands(prompt: str, turn: str, talk: Conversation, vocabulary: Vocabulary) -> str:
    """The reply that the assistant gave after a prompt, where the template cuts thoughts off it.

    Templates of reasoning models cut an answer at </think>, and the prompt of some opens the
    thoughts. What the model writes in use is the content as it stands, then the end of its turn.
    """
    before, after = _around_a_probe(talk, vocabulary)
    if before is None or after is None:
        raise TextError(_CHANGED)
    pairs = zip(prompt, before, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    opening = prompt[shared:]
    if before[shared:].strip():
        raise TextError(_TWO_WAYS)
    content = content_of(talk.messages[-1]).strip()
    if opening.strip():
        content = _after_the_opening(content, opening)
    else:
        # All that is missing is the beginning of the content.
        shown_part = turn[len(before) : len(turn) - len(after)].strip()
        if not (turn.startswith(before) and turn.endswith(after) and content.endswith(shown_part)):
            raise TextError(_CHANGED)
    end, ends = _end_of_turn(after, 0, vocabulary)
    return content + (after[:end] if ends else "")


def _after_the_opening(content: str, opening: str) -> str:
    """What the assistant writes after a prompt that opens its thoughts."""
    if content.startswith(opening):
        return content[len(opening) :]
    if content.startswith(opening.strip()):
        return content[len(opening.strip()) :].lstrip()
    tag = _OPENING.search(opening)
    if tag is None and not opening.isspace() and "</" not in opening:
        raise TextError(_TWO_WAYS)
    if tag is not None and f"</{tag[1]}>" not in content:
        raise TextError(
            f"the prompt of the chat template opens the assistant's thoughts with <{tag[1]}>, and "
            f"the answer does not close them; write it as thoughts</{tag[1]}>answer"
        )
    return content


def thoughts_opening(talk: Conversation, vocabulary: Vocabulary) -> str:
    """How the prompt of an answer opens the assistant's thoughts.

    A reply to such a prompt is whole, for other readers and as a turn, with the opening before it.

    Args:
        talk: Turns up to the answer.
        vocabulary: With a chat template.

    Returns:
        Such as ``<think>`` and a line break; empty where the prompt opens none.

    Raises:
        TextError: If the template refuses the conversation.
        VocabularyError: If there is no chat template.
    """
    prompt = talk.render(vocabulary, add_generation_prompt=True)
    tag = _OPENING.search(prompt)
    if tag is None:
        return ""
    opening = prompt[tag.start() :]
    before, _ = _around_a_probe(
        Conversation(
            (*talk.messages, {"role": "assistant", "content": ""}),
            talk.tools,
            talk.documents,
            talk.variables,
        ),
        vocabulary,
    )
    return "" if before is None or before.startswith(prompt) else opening


# --- masks --------------------------------------------------------------------------------------


def _masked(
    text: str, spans: Sequence[tuple[int, int]], vocabulary: Vocabulary, hidden: bool
) -> Document:
    """A document whose mask marks the tokens that begin inside one of the spans.

    A token that begins before a span and reaches into it does not count, because the prompt ends
    where the span begins, so that the model never writes it.
    """
    ids, starts = encode_conversation(text, vocabulary, hidden=hidden)
    mask = np.zeros(len(ids), bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    mask[:1] = False
    return Document(ids, mask)
