"""Chat templates as transformers renders them.

A template is a program that came with a model. It runs in a sandbox, in a process with bounds of
time and memory: one that never ends or fills the memory is refused, and named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mistill.bounded import OutOfBoundsError, call_bounded
from mistill.errors import TextError, VocabularyError

# Names under which a turn holds what the assistant thought before it answered.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant writes and changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to the end of the block.

        Args:
            parser: Jinja's parser, at the tag.

        Returns:
            A block that writes its body.
        """
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def compile_template(template: str) -> Template:
    """A chat template as Jinja compiles it, in a sandbox and with what transformers adds."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def template_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as transformers hands it to a chat template.

    What is null is left out, and thoughts stand under the names that templates ask for.

    Args:
        turn: Role, content and whatever else the turn says.

    Returns:
        A copy of plain values.
    """
    plain = {name: _plain(value) for name, value in turn.items() if value is not None}
    thoughts = next((plain[name] for name in THOUGHTS if name in plain), None)
    if thoughts is not None:
        plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
    return plain


def _plain(value: Any) -> Any:
    """The same value of the types that JSON has; anything else becomes the name of its type."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def render_template(
    template: str,
    turns: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    today: date | None,
    origin: str,
) -> str:
    """Render a conversation in a process with bounds of time and memory.

    Args:
        template: The template.
        turns: From ``template_turn``.
        variables: What else the template sees.
        today: The day that a template which writes a date is told; None tells it the time.
        origin: The folder that the template comes from, for messages.

    Returns:
        The text.

    Raises:
        VocabularyError: If the template has a mistake in it, or exceeds the bounds.
        TextError: If it refuses the conversation.
    """
    values = {**variables, "messages": list(turns)}
    try:
        kind, text = call_bounded("mistill.text.chat_template:rendered", template, values, today)
    except OutOfBoundsError as error:
        raise VocabularyError(f"the chat template of {origin} {error}") from error
    if kind == "mistake":
        raise VocabularyError(f"the chat template of {origin} has a mistake in {text}")
    if kind == "refused":
        raise TextError(f"the chat template refuses this conversation: {text}")
    return str(text)


def rendered(template: str, values: Mapping[str, Any], today: date | None) -> tuple[str, str]:
    """Render a chat template in this process; for the worker.

    Args:
        template: The template.
        values: What it may use.
        today: The day that it is told; None tells it the time.

    Returns:
        ``text`` and the text, ``mistake`` and where it is, or ``refused`` and why.

    Raises:
        MemoryError: If the text does not fit.
    """
    try:
        compiled = compile_template(template)
    except TemplateSyntaxError as error:
        return "mistake", f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "mistake", "its nesting, which is too deep"
    fixed = {} if today is None else {"strftime_now": datetime.combine(today, time()).strftime}
    try:
        return "text", compiled.render(**{**fixed, **values})
    except MemoryError:
        raise
    except Exception as error:  # an expression in it may raise anything
        return "refused", str(error)[:2000]
