"""Text of strangers, as it may be shown: in a terminal, in a table, in Markdown.

Names of folders, entries of a lineage, error messages that quote a file and replies of a model
come from anybody. A terminal obeys control characters among them, and rich takes brackets for
markup; both pass through here first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def visible(text: str) -> str:
    r"""Text whose control characters, direction marks and lone surrogates are spelt out.

    Args:
        text: Any text.

    Returns:
        The same text, with ``\x1b`` for an escape character; line feeds and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else _spelt(letter) for letter in text
    )


def _spelt(letter: str) -> str:
    code = ord(letter)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: object, most: int | None = None) -> str:
    """Anything's text on one line, such as a library's error inside one of ours.

    Args:
        text: Anything; as ``str`` shows it.
        most: Characters after which it is cut off; by default it is not.

    Returns:
        The words, with one space between them.
    """
    return " ".join(str(text).split())[:most]


def escaped(text: str) -> str:
    """Escape the characters of names and replies that Markdown would interpret.

    Args:
        text: Any text.

    Returns:
        One line of Markdown.
    """
    line = one_line(visible(text).replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"([\\|`*\[\]])", r"\\\1", line)


def in_code(text: str) -> str:
    """Text that stands between backticks in Markdown, also in a table.

    Args:
        text: Any text.

    Returns:
        One line without a backtick or a bar, which would end the code or the cell.
    """
    return one_line(visible(text).replace("`", "'").replace("|", "/"))


def plain(text: object, style: str = "") -> Text:
    """Text for a table of rich: no markup, no links, no control characters.

    Args:
        text: Anything; as ``str`` shows it.
        style: Style of the whole text.

    Returns:
        The text.
    """
    from rich.text import Text

    return Text(visible(str(text)), style=style)


def facts_table(facts: Mapping[str, str]) -> Table:
    """Facts as a grid of names and values.

    Args:
        facts: Values by name.

    Returns:
        A row for each.
    """
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(plain(name, "bold"), plain(value))
    return table
