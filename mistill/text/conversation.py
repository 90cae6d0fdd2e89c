"""Conversations as people write them down, read into turns with a role and a content.

OpenAI's ``role`` and ``content``, ShareGPT's ``from`` and ``value``, pairs of ``input`` and
``output``, a record of lists, and any of these as JSON in a text are one conversation in several
shapes. Whatever else a turn says is kept for the chat template. What would be lost, such as a
picture, is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mistill.errors import TextError
from mistill.folders.json_text import parse_json
from mistill.text.chat_template import THOUGHTS
from mistill.text.rows import json_type
from mistill.text.vocabulary import Message, Vocabulary

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
    "ipython": "ipython",
}
# Roles whose turns come before the conversation, and roles that hand in what a tool gave back.
SYSTEMS = ("system", "developer")
_TOOLS = ("tool", "function", "ipython")
# Fields of a turn that say whether it is learned, by the value that says no.
_MARKS: dict[str, bool] = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "learn", "loss"), False),
    **dict.fromkeys(("mask", "masked", "ignore"), True),
}
_PARTIAL_MARKS = ("train_detail", "training_detail")
_MEDIA = ("image", "images", "picture", "pictures", "video", "videos", "audio", "audios")
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Conversation:
    """Turns, and what stands beside them for the chat template.

    Attributes:
        messages: The turns.
        tools: Tools that the assistant may call, as JSON schemas.
        documents: Documents that the assistant may quote.
        variables: More of what the template asks for, such as ``enable_thinking``.
        unlearned: Numbers of turns of the assistant that are not to be learned, from 0.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    unlearned: frozenset[int] = frozenset()

    def render(self, vocabulary: Vocabulary, add_generation_prompt: bool = False) -> str:
        """Render all of it with a chat template.

        Args:
            vocabulary: Holds the template.
            add_generation_prompt: Whether to end where the assistant's next turn begins.

        Returns:
            The text.

        Raises:
            VocabularyError: If there is no chat template, or one with a mistake in it.
            TextError: If the template refuses the conversation.
        """
        return vocabulary.render(
            self.messages,
            add_generation_prompt,
            tools=self.tools,
            documents=self.documents,
            variables=self.variables,
        )

    def until(self, stop: int) -> Conversation:
        """The same with the turns up to a number."""
        return replace(self, messages=self.messages[:stop])

    def but(self, number: int, **changes: Any) -> Conversation:
        """The same with fields of one turn changed; None takes a field out."""
        messages = list(self.messages)
        messages[number] = {**messages[number], **changes}
        return replace(self, messages=tuple(messages))

    def joined(self) -> Conversation:
        """The same with the parts of every content joined to one text."""
        messages = (
            {**message, "content": content_of(message)}
            if isinstance(message.get("content"), list)
            else message
            for message in self.messages
        )
        return replace(self, messages=tuple(messages))


def prompt_share(conversation: Sequence[Message]) -> float:
    """A number from 0 to 1 that depends on what the user says first and on nothing else.

    By it a share of the prompts is held out, so that equal prompts stay together.

    Args:
        conversation: Turns.

    Returns:
        The first 32 bits of the SHA-256 of the user's first turn, divided by 2 to the 32.
    """
    first_turn = str(
        next(message["content"] for message in conversation if message["role"] == "user")
    )
    return int.from_bytes(hashlib.sha256(first_turn.encode()).digest()[:4], "big") / 2**32


def content_of(message: Message) -> str:
    """The text of a turn, its parts joined; empty where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def thoughts_of(message: Message) -> str | None:
    """What the assistant thought before it answered, whatever the field is called."""
    thoughts = (message.get(name) for name in THOUGHTS)
    return next((text for text in thoughts if isinstance(text, str) and text.strip()), None)


def calls_of(message: Message) -> str | None:
    """The name of the field that holds the assistant's calls of tools; None if it calls none."""
    return next((name for name in _CALLS if message.get(name)), None)


def read_conversation(value: Any, origin: str) -> Conversation:
    """Read the turns of a conversation, in any of the usual shapes.

    Args:
        value: What stands in the column of a row.
        origin: File and line, for messages.

    Returns:
        The conversation, with the turns that are marked as not to be learned.

    Raises:
        TextError: If it has another shape, or holds what a chat template cannot be given.
    """
    messages: list[Message] = []
    unlearned = set()
    for number, turn in enumerate(_turns(value, origin), 1):
        message = _message(turn, f"turn {number} of {origin}")
        if message["role"] == "assistant" and not _is_learned(turn, f"turn {number} of {origin}"):
            unlearned.add(number - 1)
        messages.append(message)
    return Conversation(tuple(messages), unlearned=frozenset(unlearned))


# --- shapes -------------------------------------------------------------------------------------


def _turns(value: Any, origin: str) -> list[Mapping[str, Any]]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_json(value, f"the conversation of {origin}", TextError)
    if isinstance(value, Mapping):
        value = _record_of_lists(value, origin)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        shape = "an empty list" if isinstance(value, Sequence) and not value else json_type(value)
        raise TextError(f"the conversation of {origin} should be a list of turns, not {shape}")
    turns: list[Mapping[str, Any]] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise TextError(
                f"turn {number} of {origin} should be an object with role and content, not "
                f"{json_type(turn)}"
            )
        pair = _pair(turn)
        turns.extend(pair if pair else [turn])
    return turns


def _record_of_lists(value: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    """The turns of ``{"from": [...], "value": [...]}``, as the library datasets writes them."""
    columns = {name: column for name, column in value.items() if column is not None}
    lengths = {
        len(column) if isinstance(column, list | tuple) else -1 for column in columns.values()
    }
    if len(lengths) != 1 or -1 in lengths:
        raise TextError(
            f"the conversation of {origin} should be a list of turns, not an object; an object "
            "may hold a list of roles and a list of contents of the same length"
        )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _pair(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The turns of a question and its answer; none where it is something else."""
    question, answer = turn.get("input"), turn.get("output")
    named = turn.get("role") is not None or turn.get("from") is not None
    if named or question is None or answer is None:
        return []
    marks = {name: turn[name] for name in (*_MARKS, *_PARTIAL_MARKS) if name in turn}
    system = turn.get("system")
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, **marks},
    ]


# --- turns --------------------------------------------------------------------------------------


def _message(turn: Mapping[str, Any], origin: str) -> Message:
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value", "text")
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise TextError(
            f"{origin} has the role {role!r:.80}; mistill reads {', '.join(_ROLES)}"
            + ("; write a call of a tool as tool_calls" if role == "function_call" else "")
        )
    for name in _MEDIA:
        if turn.get(name):
            raise TextError(f"{origin} holds {name}, and mistill reads text only")
    rest = {
        name: value
        for name, value in turn.items()
        if name not in ("role", "from", "content", "value") and value is not None
    }
    if content is turn.get("text"):
        rest.pop("text", None)
    rest = _with_calls(rest, origin)
    message: dict[str, Any] = {"role": known, "content": _text(content, origin), **rest}
    if message["content"] is None and not (calls_of(rest) or thoughts_of(rest)):
        raise TextError(f"the content of {origin} should be text, not null")
    return message


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _with_calls(rest: dict[str, Any], origin: str) -> dict[str, Any]:
    calls = rest.pop("tool_calls", None)
    if isinstance(calls, str) and calls.strip():
        calls = parse_json(calls, f"the tool_calls of {origin}", TextError)
    if not calls:
        return rest
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise TextError(
            f"the tool_calls of {origin} should be a list of objects, not {json_type(calls)}"
        )
    return {**rest, "tool_calls": list(calls)}


def _text(content: Any, origin: str) -> str | list[dict[str, str]] | None:
    """The text of a content: text, or a list of parts that are text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TextError(f"the content of {origin} should be text, not {json_type(content)}")
    return [{"type": "text", "text": _part(part, origin)} for part in content]


def _part(part: Any, origin: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
    if kind in ("text", "input_text", "output_text", None) and isinstance(part, Mapping):
        text = part.get("text")
        if isinstance(text, str):
            return text
        raise TextError(f"the content of {origin} should be text, not a list of parts without text")
    raise TextError(
        f"the content of {origin} is a list of parts with one of the type {kind!r:.80}; mistill "
        "reads parts of the type 'text' only"
    )


def _is_learned(turn: Mapping[str, Any], origin: str) -> bool:
    """Whether a turn is to be learned, by the marks of OpenAI, axolotl, ms-swift and torchtune."""
    for name in _PARTIAL_MARKS:
        if turn.get(name):
            raise TextError(
                f"{origin} marks parts of its text by {name}; mistill learns a turn whole or not "
                "at all, by train, weight or the like"
            )
    learned = True
    for name, no in _MARKS.items():
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise TextError(
                f"{name} of {origin} should be true or false, 1 or 0, not {value!r:.80}; mistill "
                "learns a turn whole or not at all"
            )
        learned = learned and bool(value) is not no
    return learned


def check_turns(conversation: Conversation, origin: str) -> None:
    """Refuse a conversation that no student could learn from.

    Args:
        conversation: From ``read_conversation``.
        origin: File and line, for messages.

    Raises:
        TextError: If it does not begin with the user and end with the assistant, or a turn is
            empty.
    """
    turns = [message for message in conversation.messages if message["role"] not in SYSTEMS]
    if not turns or turns[0]["role"] != "user":
        raise TextError(f"the conversation of {origin} should begin with the user's turn")
    if turns[-1]["role"] != "assistant":
        raise TextError(
            f"the conversation of {origin} ends with the {turns[-1]['role']}'s turn; the "
            "assistant's should be last"
        )
    for message in turns:
        says = content_of(message).strip() or calls_of(message) or thoughts_of(message)
        if not says and message["role"] not in _TOOLS:
            raise TextError(f"the conversation of {origin} has an empty turn")
