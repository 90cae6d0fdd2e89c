"""What a row says: a text, or a conversation with all that stands beside it.

The columns of a row are read by the names that data sets use. What a student must know to give
the answer often does not stand in the turns but in a column beside them: a system prompt, tools,
earlier turns, the passage that a question is about. A column that may matter and is not read is
named in a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistill.errors import TextError
from mistill.folders.json_text import parse_json
from mistill.text.conversation import SYSTEMS, Conversation, check_turns, read_conversation
from mistill.text.rows import Row, json_type
from mistill.text.vocabulary import Message

_CONVERSATIONS = ("messages", "conversations", "conversation")
_ANSWERS = {
    "prompt": ("response", "completion", "answer"),
    "instruction": ("output", "response", "completion"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "output"),
}
_SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
_CONTEXTS = ("input", "context")
_MEDIA = ("image", "images", "picture", "video", "videos", "audio", "audios")
_VARIABLES = "chat_template_kwargs"
_ACCEPTED = (
    "messages, conversations, prompt with response or completion, instruction (and input) with "
    "output or response, question with answer or response, or text"
)
# Columns that say where a row comes from, and nothing that an answer could depend on.
_HARMLESS = frozenset(
    (
        *("id", "idx", "index", "uuid", "guid", "hash", "key", "name", "kind", "type", "status"),
        *("category", "categories", "domain", "topic", "topics", "tag", "tags", "label", "labels"),
        *("source", "sources", "dataset", "dataset_name", "data_source", "origin", "subset"),
        *("split", "config", "task", "task_name", "task_type", "version", "revision"),
        *("language", "lang", "locale", "license", "licence", "url", "urls", "link", "author"),
        *("user", "date", "time", "timestamp", "created", "created_at", "updated_at"),
        *("model", "models", "model_name", "generator", "redacted", "toxic", "toxicity"),
        *("score", "scores", "rating", "ratings", "rank", "quality", "difficulty"),
        *("length", "lengths", "count", "tokens", "num_tokens", "n_tokens", "turn", "turns"),
        *("num_turns", "meta", "metadata", "annotations", "comment", "comments"),
    )
)
_HARMLESS_ENDS = ("_id", "_idx", "_index", "_score", "_url", "_hash", "_count", "_length", "_ids")


@dataclass(frozen=True)
class Content:
    """What a row says.

    Attributes:
        says: A text, or a conversation.
        unread: Columns that are left out and may matter.
    """

    says: str | Conversation
    unread: tuple[str, ...] = ()


def content_of_row(row: Row) -> Content:
    """The text or the conversation of a row, whatever its columns are called.

    Args:
        row: A row.

    Returns:
        What it says.

    Raises:
        TextError: If it says nothing that mistill reads, or something that would be lost.
    """
    value = row.value
    column = _first_present(value, _CONVERSATIONS)
    if column is not None:
        read_columns = {column}
        talk = read_conversation(value[column], row.origin)
        return _beside(row, talk, read_columns)
    question, answer = _question_and_answer(value)
    if question is not None and answer is not None:
        read_columns = {question, answer}
        prompt = _question_turns(row, question, read_columns)
        reply = _turns_of(value[answer], "assistant", f"{answer} of {row.origin}", row.origin)
        talk = _joined(prompt, reply)
        # What a prompt lets the assistant say was said before; the completion is what is learned.
        earlier = _assistants(prompt.messages) if isinstance(value[question], list) else ()
        talk = replace(talk, unlearned=talk.unlearned | frozenset(earlier))
        return _beside(row, talk, read_columns)
    if "text" in value:
        text = _string(value["text"] or "", f"text of {row.origin}")
        beside = (*_SYSTEMS, *_CONTEXTS, "tools", "documents", "history", _VARIABLES)
        return Content(text, tuple(name for name in beside if value.get(name)))
    raise TextError(
        f"{_columns(row)}; mistill reads {_ACCEPTED}; docs/data.md shows a line of each"
    )


def prompt_of_row(row: Row) -> Content:
    """The conversation of a row up to the turn that the assistant is to answer.

    Args:
        row: A row.

    Returns:
        A conversation that ends with the turn of the user, or of a tool.

    Raises:
        TextError: If there is no prompt, or something in it would be lost.
    """
    column = _first_present(row.value, _CONVERSATIONS)
    if column is not None:
        read_columns = {column}
        talk = read_conversation(row.value[column], row.origin)
    else:
        question = next((name for name in _ANSWERS if row.value.get(name) is not None), None)
        if question is None:
            raise TextError(
                f"{_columns(row)}; prompts are read from prompt, instruction (and input), "
                "question, messages or conversations; docs/data.md shows a line of each"
            )
        read_columns = {question, *_ANSWERS[question]}
        talk = _question_turns(row, question, read_columns)
    content = _beside(row, talk, read_columns)
    assert isinstance(content.says, Conversation), "turns make a conversation"
    talk = content.says
    stop = len(talk.messages)
    while stop and talk.messages[stop - 1]["role"] == "assistant":
        stop -= 1
    answered = (*talk.messages[:stop], {"role": "assistant", "content": "?"})
    check_turns(replace(talk, messages=answered), row.origin)
    unlearned = frozenset(number for number in talk.unlearned if number < stop)
    return replace(content, says=replace(talk.until(stop), unlearned=unlearned))


def _first_present(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if value.get(name) is not None), None)


def _columns(row: Row) -> str:
    """What the columns of a row are, for a message that none of them is read."""
    usual = (*_CONVERSATIONS, *_ANSWERS, *(name for names in _ANSWERS.values() for name in names))
    empty = [name for name in row.value if name in usual and row.value[name] is None]
    if empty:
        be = "is" if len(empty) == 1 else "are"
        return f"{', '.join(empty)} of {row.origin} {be} null"
    return f"{row.origin} has the columns {', '.join(sorted(map(str, row.value))) or 'none'}"


def _question_and_answer(value: Mapping[str, Any]) -> tuple[str | None, str | None]:
    for question, answers in _ANSWERS.items():
        answer = _first_present(value, answers)
        if value.get(question) is not None and answer is not None:
            return question, answer
    return None, None


# --- questions ----------------------------------------------------------------------------------


def _question_turns(row: Row, question: str, read_columns: set[str]) -> Conversation:
    """The turns of a question, with the passage that it is about."""
    value = row.value
    talk = _turns_of(value[question], "user", f"{question} of {row.origin}", row.origin)
    for name in _CONTEXTS:
        context = value.get(name)
        if name in read_columns or not context:
            continue
        read_columns.add(name)
        passage = _string(context, f"{name} of {row.origin}")
        text = talk.joined().messages[-1].get("content") or ""
        if question == "instruction" or passage.strip() not in text:
            talk = talk.but(len(talk.messages) - 1, content=f"{text}\n\n{passage}")
    return talk


def _turns_of(value: Any, role: str, name: str, origin: str) -> Conversation:
    """One turn of a text, or the turns of a list."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return read_conversation(value, origin)
    return Conversation(({"role": role, "content": _string(value, name)},))


def _joined(first: Conversation, second: Conversation) -> Conversation:
    shift = len(first.messages)
    later = frozenset(number + shift for number in second.unlearned)
    return replace(
        first,
        messages=(*first.messages, *second.messages),
        unlearned=first.unlearned | later,
    )


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"the {name} should be text, not {json_type(value)}")
    return value


# --- columns beside the turns -------------------------------------------------------------------


def _beside(row: Row, talk: Conversation, read_columns: set[str]) -> Content:
    """A conversation with what stands in the columns beside its turns."""
    for name in _MEDIA:
        if row.value.get(name):
            raise TextError(f"{row.origin} holds {name}, and mistill reads text only")
    talk = _with_history(row, talk, read_columns)
    talk = _with_system(row, talk, read_columns)
    tools = _objects(row, "tools", read_columns)
    documents = _objects(row, "documents", read_columns)
    variables = _variables(row, read_columns)
    talk = replace(talk, tools=tools, documents=documents, variables=variables)
    unread = tuple(
        str(name)
        for name, value in row.value.items()
        if name not in read_columns
        and value not in (None, "", [], {})
        and not _is_harmless(str(name))
    )
    _refuse_half_characters(talk, row.origin)
    return Content(talk, unread)


def _is_harmless(name: str) -> bool:
    name = name.lower()
    return name in _HARMLESS or name.startswith("__") or name.endswith(_HARMLESS_ENDS)


def _with_system(row: Row, talk: Conversation, read_columns: set[str]) -> Conversation:
    for name in _SYSTEMS:
        if name in read_columns or not row.value.get(name):
            continue
        read_columns.add(name)
        system = _string(row.value[name], f"{name} of {row.origin}")
        systems = [turn for turn in talk.messages if turn["role"] in SYSTEMS]
        if not systems:
            turn: Message = {"role": "system", "content": system}
            talk = replace(
                talk,
                messages=(turn, *talk.messages),
                unlearned=frozenset(number + 1 for number in talk.unlearned),
            )
        elif all(turn.get("content") != system for turn in systems):
            raise TextError(
                f"{row.origin} has a system prompt in its turns and another in the column {name}; "
                "leave one of them out"
            )
    return talk


def _with_history(row: Row, talk: Conversation, read_columns: set[str]) -> Conversation:
    history = row.value.get("history")
    if not history or "history" in read_columns:
        return talk
    read_columns.add("history")
    pairs = isinstance(history, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if pairs:
        turns = (
            {"role": role, "content": text}
            for pair in history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        )
        earlier = Conversation(tuple(turns))
    elif isinstance(history, list | tuple) and isinstance(history[0], Mapping):
        earlier = read_conversation(history, f"the history of {row.origin}")
    else:
        raise TextError(
            f"the history of {row.origin} should be a list of turns, or of pairs of a question "
            f"and an answer, not {json_type(history)} of another kind"
        )
    return _joined(earlier, talk)


def _objects(row: Row, name: str, read_columns: set[str]) -> list[Mapping[str, Any]] | None:
    """A column that holds a list of objects, or such a list as JSON in a text."""
    value = row.value.get(name)
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"{name} of {row.origin}", TextError)
    if not value:
        return None
    read_columns.add(name)
    if isinstance(value, list | tuple) and name == "tools":
        # Tools of many kinds share a column where each of them stands as JSON in a text.
        value = [
            parse_json(one, f"{name} of {row.origin}", TextError) if isinstance(one, str) else one
            for one in value
        ]
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise TextError(f"{name} of {row.origin} should be a list of objects")
    return list(value)


def _variables(row: Row, read_columns: set[str]) -> Mapping[str, Any]:
    value = row.value.get(_VARIABLES)
    if not value:
        return {}
    read_columns.add(_VARIABLES)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TextError(f"{_VARIABLES} of {row.origin} should be an object, not {json_type(value)}")
    return value


def _refuse_half_characters(talk: Conversation, origin: str) -> None:
    for value in (*talk.messages, talk.tools, talk.documents, talk.variables):
        check_characters(value, origin)


def check_characters(value: Any, origin: str) -> None:
    """Refuse half of a character, as JavaScript writes it where it cuts a text in an emoji.

    Args:
        value: A text, or a value of JSON with texts in it.
        origin: File and line, for the message.

    Raises:
        TextError: If a text in it has a surrogate without its partner.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            raise TextError(f"{origin} holds half of a character, {half}; write it whole") from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_characters(name, origin)
            check_characters(item, origin)
    elif isinstance(value, list | tuple):
        for item in value:
            check_characters(item, origin)
