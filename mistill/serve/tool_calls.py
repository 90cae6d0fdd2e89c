"""Calls of tools in what a model writes, in the two forms that most open models were trained on.

Hermes' form, which Qwen and SmolLM3 write too: ``<tool_call>{"name": ..., "arguments": {...}}
</tool_call>``, once for each call. Mistral's: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``,
or since 2025 ``[TOOL_CALLS]name[ARGS]{...}``. Which one it is, the chat template says.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mistill.chat.stream_text import StopStrings
from mistill.constraints import JSON_STYLE
from mistill.errors import SettingsError
from mistill.folders.json_text import parse_json
from mistill.text.vocabulary import Vocabulary

Form = Literal["hermes", "mistral"]
_OPEN: dict[Form, str] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
_CLOSE = "</tool_call>"
_ARGUMENTS = "[ARGS]"
_MISTRAL_CALL = re.compile(r"\s*([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\]\w+)?\[ARGS\]\s*")
_LETTERS = string.ascii_letters + string.digits


class Call(NamedTuple):
    """A call of a tool that the model wrote.

    Attributes:
        id: A name for the call.
        name: Name of the tool.
        arguments: Its arguments, as JSON.
    """

    id: str
    name: str
    arguments: str


def form_of(vocabulary: Vocabulary) -> Form | None:
    """The form in which a model writes calls of tools.

    Args:
        vocabulary: Of the model.

    Returns:
        The form; None if its template knows no tools, or writes calls in another way.
    """
    template = vocabulary.tool_template or ""
    if "tools" not in template:
        return None
    return next((form for form, mark in _OPEN.items() if mark in template), None)


def mark_ids(form: Form, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Special tokens that belong to the form and must become text to be seen.

    Args:
        form: The form.
        vocabulary: Of the model.

    Returns:
        Their ids; none where the marks are no special tokens.
    """
    marks = (_OPEN[form], _CLOSE, _ARGUMENTS, "[CALL_ID]")
    return tuple(int(entry["id"]) for entry in vocabulary.added_tokens if entry["content"] in marks)


def end_of_call(form: Form) -> str | None:
    """What stands at the end of a call.

    Args:
        form: The form.

    Returns:
        The mark; None where calls end with the reply.
    """
    return _CLOSE if form == "hermes" else None


def grammar_of_calls(
    form: Form, tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, *, several: bool
) -> str:
    """A grammar of replies that call tools and say nothing else.

    Args:
        form: The form.
        tools: Name and JSON schema of the arguments of each tool that may be called.
        vocabulary: Of the model.
        several: Whether the reply may call more than one.

    Returns:
        The grammar, in Lark's notation.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": tool["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    special = {
        entry["content"]: entry["id"] for entry in vocabulary.added_tokens if entry.get("special")
    }

    def mark(text: str, before: str = "", after: str = "") -> str:
        if text in special:
            words = [json.dumps(before), f"<[{special[text]}]>", json.dumps(after)]
            return " ".join(word for word in words if word != '""')
        return json.dumps(before + text + after)

    if form == "mistral":
        most = {} if several else {"maxItems": 1}
        array = {"type": "array", "items": call, "minItems": 1, **most}
        return f"start: {mark(_OPEN[form])} list\nlist: %json {_styled(array)}\n"
    more = ' ("\\n" call)*' if several else ""
    return (
        f"start: call{more}\n"
        f"call: {mark(_OPEN[form], after=chr(10))} body {mark(_CLOSE, before=chr(10))}\n"
        f"body: %json {_styled(call)}\n"
    )


def _styled(schema: Mapping[str, Any]) -> str:
    """A schema with white space as in every other constraint."""
    return json.dumps({"x-guidance": JSON_STYLE, **schema})


class CallReader:
    """Divides a reply that grows into text and calls of tools.

    Attributes:
        calls: The calls so far.
    """

    calls: list[Call]

    def __init__(self, form: Form) -> None:
        """Begin a reply.

        Args:
            form: How the model writes calls.
        """
        self.calls = []
        self._form = form
        self._before = StopStrings([_OPEN[form]])
        self._body: str | None = None

    def add(self, text: str) -> str:
        """Add a part of the reply.

        Args:
            text: The part.

        Returns:
            What of it is text and cannot be the beginning of a call.
        """
        shown = ""
        while text:
            if self._body is None:
                shown += self._before.add(text)
                if not self._before.found:
                    return shown
                self._body, text = "", self._before.rest().removeprefix(_OPEN[self._form])
                continue
            self._body, text = self._body + text, ""
            if self._form == "hermes" and _CLOSE in self._body:
                body, _, text = self._body.partition(_CLOSE)
                shown += self._close(body, _CLOSE)
                text = text.removeprefix("\n")
        return shown

    def finish(self) -> str:
        """End the reply.

        Returns:
            The text that was held back, such as a call that is none.
        """
        if self._body is None:
            return self._before.rest()
        return self._close(self._body, "")

    def _close(self, body: str, mark: str) -> str:
        """Take calls to their end; where they cannot be read, they are text."""
        calls = _mistral_calls(body) if self._form == "mistral" else _json_calls(f"[{body}]")
        self._body, self._before = None, StopStrings([_OPEN[self._form]])
        if not calls:
            return _OPEN[self._form] + body + mark
        for name, arguments in calls:
            self.calls.append(Call(self._new_id(), name, arguments))
        return ""

    def _new_id(self) -> str:
        if self._form == "mistral":  # whose templates want nine letters
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _mistral_calls(body: str) -> list[tuple[str, str]]:
    if _ARGUMENTS not in body:
        return _json_calls(body)
    calls, rest = [], body.replace(_OPEN["mistral"], "")
    decoder = json.JSONDecoder()
    while match := _MISTRAL_CALL.match(rest):
        try:
            arguments, end = decoder.raw_decode(rest, match.end())
        except (ValueError, RecursionError):
            return []
        if not isinstance(arguments, dict):
            return []
        calls.append((match[1], json.dumps(arguments, ensure_ascii=False)))
        rest = rest[end:]
    return [] if rest.strip() else calls


def _json_calls(body: str) -> list[tuple[str, str]]:
    """The calls of a JSON list; none if one of them is no call."""
    try:
        entries = parse_json(body, "it", SettingsError)
    except SettingsError:
        return []
    calls = []
    for entry in entries if isinstance(entries, list) else [entries]:
        name = entry.get("name") if isinstance(entry, dict) else None
        arguments = entry.get("arguments", entry.get("parameters")) if name else None
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return []
        text = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
        calls.append((name, text))
    return calls
