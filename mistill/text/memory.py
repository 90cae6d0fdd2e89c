"""Texts that a program holds in memory, read as the rows of a file are.

A list of strings, of rows or of conversations, or a dataset of the library ``datasets``, stands
wherever the name of a text does. It gets a name of its own, by what it holds, under which the
lineage and errors speak of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mistill.errors import TextError

_WHAT_TO_GIVE = (
    "give a list of strings, of rows such as {'messages': [...]} or of conversations, a "
    "datasets.Dataset, or the name of a file; docs/data.md shows each"
)


class TextInMemory(str):
    """The name of a text in memory, and its rows.

    Attributes:
        rows: The rows; can be read more than once.
        tabular: Whether they come from a table, whose records have a null for every missing key.
    """

    rows: Iterable[Any]
    tabular: bool

    def __new__(cls, name: str, rows: Iterable[Any], *, tabular: bool = False) -> TextInMemory:
        """Name a text.

        Args:
            name: Its name.
            rows: Its rows.
            tabular: Whether they come from a table.

        Returns:
            The name, which has the rows.
        """
        text = super().__new__(cls, name)
        text.rows, text.tabular = rows, tabular
        return text


def is_dataset(value: Any) -> bool:
    """Whether something is a split of the library ``datasets``, which is not imported for that.

    Args:
        value: Anything.

    Returns:
        True for ``Dataset`` and ``IterableDataset``.

    Raises:
        TextError: If it is a dataset with several splits.
    """
    kind = type(value)
    if not kind.__module__.startswith("datasets."):
        return False
    if isinstance(value, Mapping):
        splits = ", ".join(map(str, value))
        raise TextError(f"the dataset has the splits {splits}; give one, such as dataset['train']")
    return hasattr(value, "features")


def dataset_in_memory(dataset: Any) -> TextInMemory:
    """Name a dataset.

    Args:
        dataset: A split.

    Returns:
        Its name and rows.
    """
    mark = getattr(dataset, "_fingerprint", None) or getattr(dataset, "split", None)
    return TextInMemory(f"datasets.{type(dataset).__name__} {mark}", dataset, tabular=True)


def list_in_memory(items: Sequence[Any]) -> TextInMemory:
    """Name a list of texts, rows or conversations.

    Args:
        items: What it holds.

    Returns:
        Its name and rows.

    Raises:
        TextError: If an item is none of these.
    """
    rows = [_row(item, number) for number, item in enumerate(items, 1)]
    content = json.dumps(rows, default=repr, sort_keys=True).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(content).hexdigest()[:12]
    count = f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
    return TextInMemory(f"{count} in memory ({digest})", rows)


def refused(value: Any) -> TextError:
    """The error for what is no text.

    Args:
        value: What was given.

    Returns:
        The error to raise.
    """
    return TextError(f"texts is a {type(value).__name__}; {_WHAT_TO_GIVE}")


def _row(item: Any, number: int) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        if set(item) == {"role", "content"}:
            raise TextError(
                f"item {number} of texts is a message; put the messages of a conversation into a "
                "list of their own: [[{'role': ..., 'content': ...}, ...], ...]"
            )
        return item
    if isinstance(item, Sequence) and all(isinstance(turn, Mapping) for turn in item):
        return {"messages": list(item)}
    raise TextError(f"item {number} of texts is a {type(item).__name__}; {_WHAT_TO_GIVE}")
