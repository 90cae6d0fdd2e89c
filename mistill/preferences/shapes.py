"""What a row of preference data says, whatever its columns are called.

Data sets write down three kinds of judgement: of two answers the better one (TRL's ``chosen`` and
``rejected``, with the prompt beside them or inside both), of one answer whether it is good (KTO's
``label``), and of several answers the order (ranks or scores). A whole conversation may stand where
an answer is expected; the turns that repeat the prompt are taken off then. A prompt that two texts
share is refused where nothing says where it ends: cut at the first letter that differs, "4" and
"42" would share "4".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistill.errors import TextError
from mistill.text.conversation import (
    SYSTEMS,
    Conversation,
    calls_of,
    check_turns,
    content_of,
    read_conversation,
)
from mistill.text.row_content import Content, content_of_row, prompt_of_row
from mistill.text.rows import Row, json_type
from mistill.text.vocabulary import Message

_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
_PROMPTS = (
    *("prompt", "instruction", "question", "query"),
    *("messages", "conversations", "conversation", "input"),
)
_LABELS = ("label", "kto_tag")
_LISTS = ("answers", "outputs", "responses", "completions", "candidates", "generations")
_SCORES = ("scores", "score", "ratings", "rating", "rewards", "reward")
_RANKS = ("ranks", "rank", "ranking")
_TEXTS = ("answer", "output", "response", "completion", "text", "content")
_PAGE = "docs/data.md shows a line of each"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which one is preferred.

    Attributes:
        prompt: Turns up to the answer, with what stands beside them.
        chosen: The turn of the better answer.
        rejected: The turn of the other one.
        margin: By how much the better one was scored higher; None where it was not scored.
        origin: File and line, for messages.
    """

    prompt: Conversation
    chosen: Message
    rejected: Message
    margin: float | None
    origin: str


@dataclass(frozen=True)
class Labelled:
    """An answer, and whether it is good.

    Attributes:
        prompt: Turns up to the answer, with what stands beside them.
        answer: The turn of the answer.
        good: Whether it is wanted.
        origin: File and line, for messages.
    """

    prompt: Conversation
    answer: Message
    good: bool
    origin: str


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, and how they compare.

    Attributes:
        prompt: Turns up to the answer, with what stands beside them.
        answers: The turns of the answers.
        values: A number for each answer, of which a higher one is better.
        scored: Whether the numbers are scores, whose gaps say how much better; ranks do not.
        origin: File and line, for messages.
    """

    prompt: Conversation
    answers: tuple[Message, ...]
    values: tuple[float, ...]
    scored: bool
    origin: str


@dataclass(frozen=True)
class Judged:
    """What a row says, and what it leaves unread.

    Attributes:
        says: The judgement.
        unread: Columns that are left out and may matter.
    """

    says: Pair | Labelled | Ranking
    unread: tuple[str, ...] = ()


def judgement_of_row(row: Row) -> Judged:
    """The judgement of a row, in whatever shape it is written down.

    Args:
        row: A row.

    Returns:
        A pair, a labelled answer or a ranking.

    Raises:
        TextError: If it is none of them, if an answer is empty or the last turn is not the
            assistant's, or if the two answers of a pair are the same.
    """
    value = row.value
    for chosen, rejected in _PAIRS:
        if value.get(chosen) is not None and value.get(rejected) is not None:
            return _pair(row, chosen, rejected)
        for one, other in ((chosen, rejected), (rejected, chosen)):
            if value.get(one) is not None:
                raise TextError(f"{row.origin} has {one} and no {other}; a pair needs both")
    for name in _LISTS:
        if isinstance(value.get(name), list | tuple):
            return _ranking(row, name)
    label = next((name for name in _LABELS if value.get(name) is not None), None)
    if label is not None:
        return _labelled(row, label)
    columns = ", ".join(sorted(map(str, value))) or "none"
    raise TextError(
        f"{row.origin} has the columns {columns}; preferences are read from chosen and rejected, "
        "from an answer with label, or from answers with ranks or scores, each with its prompt; "
        f"{_PAGE}"
    )


# --- pairs --------------------------------------------------------------------------------------


def _pair(row: Row, chosen: str, rejected: str) -> Judged:
    value = row.value
    content = _prompt(row, (chosen, rejected, *(name for two in _PAIR_SCORES for name in two)))
    prompts, answers = [], []
    for name in (chosen, rejected):
        if content is None and isinstance(value[name], str):
            raise TextError(
                f"{row.origin} has no prompt, and {name} is text that holds it; nothing says where "
                "the prompt ends: give a column prompt, or whole conversations as lists of turns"
            )
        prompt, answer = _split(value[name], name, content, row.origin)
        prompts.append(prompt)
        answers.append(answer)
    if _roles_and_texts(prompts[0].messages) != _roles_and_texts(prompts[1].messages):
        raise TextError(
            f"{chosen} and {rejected} of {row.origin} differ before their last turn, so that they "
            "are no two answers to one prompt"
        )
    if _same(*answers):
        raise TextError(f"{chosen} and {rejected} of {row.origin} are the same answer")
    pair = Pair(prompts[0], answers[0], answers[1], _margin(row, chosen, rejected), row.origin)
    return Judged(pair, () if content is None else content.unread)


def _margin(row: Row, chosen: str, rejected: str) -> float | None:
    if row.value.get("margin") is not None:
        return _number(row.value["margin"], f"margin of {row.origin}")
    for high, low in _PAIR_SCORES:
        if row.value.get(high) is not None and row.value.get(low) is not None:
            better = _number(row.value[high], f"{high} of {row.origin}")
            worse = _number(row.value[low], f"{low} of {row.origin}")
            if better < worse:
                raise TextError(
                    f"{high} of {row.origin} is {better:g} and {low} is {worse:g}, which "
                    f"contradicts them: exchange {chosen} and {rejected}, or leave the scores out"
                )
            return better - worse
    return None


# --- labels -------------------------------------------------------------------------------------


def _labelled(row: Row, label: str) -> Judged:
    good = row.value[label]
    if good not in (True, False) or not isinstance(good, bool | int):
        raise TextError(f"{label} of {row.origin} should be true or false, not {good!r:.80}")
    content = content_of_row(_without(row, (label,)))
    talk = content.says
    if isinstance(talk, str):
        raise TextError(
            f"{row.origin} has {label} and a text; give the prompt and its answer, as messages or "
            f"as prompt and completion; {_PAGE}"
        )
    prompt, answer = _last_turn(talk.joined(), row.origin)
    return Judged(Labelled(prompt, answer, bool(good), row.origin), content.unread)


# --- rankings -----------------------------------------------------------------------------------


def _ranking(row: Row, name: str) -> Judged:
    items = list(row.value[name])
    content = _prompt(row, (name, *_SCORES, *_RANKS))
    if content is None:
        raise TextError(f"{row.origin} has {name} and no prompt; {_PAGE}")
    if len(items) < 2:
        raise TextError(f"{name} of {row.origin} has {len(items)} answers; a ranking needs two")
    order, numbers = _order(row, name, items)
    if len(numbers) != len(items):
        raise TextError(f"{row.origin} has {len(items)} {name} and {len(numbers)} {order}")
    answers = []
    for place, item in enumerate(items, 1):
        if isinstance(item, Mapping) and item.get("role", item.get("from")) is None:
            item = next((item[key] for key in _TEXTS if item.get(key) is not None), None)
        prompt, answer = _split(item, f"answer {place}", content, row.origin)
        answers.append(answer)
    sign = -1.0 if order in _RANKS else 1.0
    values = tuple(
        sign * _number(number, f"{order} {place} of {row.origin}")
        for place, number in enumerate(numbers, 1)
    )
    for place, one in enumerate(answers):
        for other in range(place):
            if _same(one, answers[other]) and values[place] != values[other]:
                raise TextError(
                    f"answers {other + 1} and {place + 1} of {row.origin} are the same and ranked "
                    "differently"
                )
    ranking = Ranking(prompt, tuple(answers), values, order in _SCORES, row.origin)
    return Judged(ranking, content.unread)


def _order(row: Row, name: str, items: Sequence[Any]) -> tuple[str, list[Any]]:
    """What the answers are ordered by, and its values: beside each answer, or in a column."""
    if all(isinstance(item, Mapping) for item in items):
        for order in (*_SCORES, *_RANKS):
            if all(item.get(order) is not None for item in items):
                return order, [item[order] for item in items]
    for order in (*_SCORES, *_RANKS):
        if isinstance(row.value.get(order), list | tuple):
            return order, list(row.value[order])
    raise TextError(
        f"{row.origin} has {name} and nothing that orders all of them; give scores (a higher one "
        "is better) or ranks (1 is the best), as a list or beside each answer"
    )


# --- prompts and answers ------------------------------------------------------------------------


def _without(row: Row, names: Sequence[str]) -> Row:
    rest = {name: value for name, value in row.value.items() if name not in names}
    return replace(row, value=rest)


def _prompt(row: Row, judged_columns: Sequence[str]) -> Content | None:
    """The prompt of a row that stands in columns of its own; None if none does."""
    rest = _without(row, (*judged_columns, "margin"))
    name = next((name for name in _PROMPTS if rest.value.get(name) is not None), None)
    if name is None:
        return None
    if name == "input":  # some write the whole prompt there
        others = _without(rest, ("input",)).value
        rest = replace(rest, value={"prompt": rest.value["input"], **others})
    elif not name.startswith(("messages", "conversation")):
        # Beside a prompt of its own these repeat the conversation.
        rest = _without(rest, ("messages", "conversations", "conversation"))
    content = prompt_of_row(rest)
    assert isinstance(content.says, Conversation), "a prompt is a conversation"
    return replace(content, says=content.says.joined())


def _split(
    value: Any, name: str, content: Content | None, origin: str
) -> tuple[Conversation, Message]:
    """The prompt and the answer of what stands where an answer is expected."""
    beside = Conversation(()) if content is None else content.says
    assert isinstance(beside, Conversation), "a prompt is a conversation"
    if isinstance(value, str):
        return _last_turn(_behind(beside, ({"role": "assistant", "content": value},)), origin, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        kind = "an empty list" if isinstance(value, list | tuple) else json_type(value)
        raise TextError(f"{name} of {origin} should be text or turns, not {kind}")
    turns = read_conversation(value, f"{name} of {origin}").joined().messages
    if not beside.messages or len(turns) == 1:
        return _last_turn(_behind(beside, turns), origin, name)
    before = _roles_and_texts(turns[:-1])
    of_prompt = _roles_and_texts(beside.messages)
    without_system = [turn for turn in of_prompt if turn[0] not in SYSTEMS]
    if before and before in (of_prompt, without_system):
        return _last_turn(_behind(beside, turns[-1:]), origin, name)
    if before[-len(of_prompt) :] == of_prompt:  # it holds earlier turns too, or a system prompt
        earlier = replace(beside, messages=tuple(turns[:-1]))
        return _last_turn(_behind(earlier, turns[-1:]), origin, name)
    raise TextError(
        f"{name} of {origin} is a conversation of {len(turns)} turns that does not repeat its "
        "prompt; give the answer alone, one turn of the assistant"
    )


def _behind(prompt: Conversation, turns: Sequence[Message]) -> Conversation:
    return replace(prompt, messages=(*prompt.messages, *turns))


def _last_turn(
    talk: Conversation, origin: str, name: str = "the answer"
) -> tuple[Conversation, Message]:
    """A conversation as its prompt and its last turn, an answer that is not empty."""
    answer = talk.messages[-1]
    if answer["role"] != "assistant":
        raise TextError(
            f"{name} of {origin} ends with the {answer['role']}'s turn; the assistant's should be "
            "last"
        )
    if not content_of(answer).strip() and calls_of(answer) is None:
        raise TextError(f"{name} of {origin} is empty")
    check_turns(talk, origin)
    stop = len(talk.messages) - 1
    return replace(talk.until(stop), unlearned=frozenset()), answer


def _roles_and_texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(str(turn["role"]), content_of(turn).strip()) for turn in messages]


def _same(one: Message, other: Message) -> bool:
    return (content_of(one).strip(), _calls(one)) == (content_of(other).strip(), _calls(other))


def _calls(message: Message) -> Any:
    name = calls_of(message)
    return None if name is None else message[name]


def _number(value: Any, name: str) -> float:
    if isinstance(value, str):  # of a table without types
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TextError(f"{name} should be a finite number, not {value!r:.80}")
    return float(value)
