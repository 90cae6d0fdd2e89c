"""JSON that anybody may have written, parsed in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, MistillError


def parse_json(text: str | bytes, origin: str, error: type[MistillError] = FolderError) -> Any:
    """Parse JSON of a file or of a caller.

    Args:
        text: The text, or its bytes in UTF-8.
        origin: Where it comes from, such as the path of its file, for the message.
        error: What is raised.

    Returns:
        The value.

    Raises:
        MistillError: Of the class ``error``, if it is not UTF-8 or not JSON, if it is nested more
            deeply than Python follows, or if a number has thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise error(f"{origin} is not valid JSON: it is nested too deeply") from problem
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise error(f"{origin} is not valid JSON: {reason}") from problem


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: Path of the file.

    Returns:
        The object.

    Raises:
        FolderError: If the file is missing or is not a JSON object.
    """
    try:
        value = parse_json(file.read_bytes(), str(file))
    except FileNotFoundError as error:
        raise FolderError(f"{file} is missing") from error
    if not isinstance(value, dict):
        raise FolderError(f"{file} should hold a JSON object, not a {type(value).__name__}")
    return value
