"""Chat templates as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mistill.errors import TextError

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
    template: Template,
    turns: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    today: date | None,
) -> str:
    """Render a conversation.

    Args:
        template: From ``compile_template``.
        turns: From ``template_turn``.
        variables: What else the template sees.
        today: The day that a template which writes a date is told; None tells it the time.

    Returns:
        The text.

    Raises:
        TextError: If the template refuses the conversation.
    """
    fixed = {} if today is None else {"strftime_now": datetime.combine(today, time()).strftime}
    try:
        return template.render(**{**fixed, **variables, "messages": list(turns)})
    except Exception as error:  # an expression in it may raise anything
        raise TextError(f"the chat template refuses this conversation: {error}") from error
