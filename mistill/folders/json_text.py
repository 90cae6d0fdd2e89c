"""JSON that anybody may have written: parsed, and held against a schema, in one place."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from mistill.errors import FolderError, MistillError

MOST_BYTES = 1 << 30
"""Bytes of the largest JSON file that is read; a tokenizer of a million tokens takes a tenth."""

_TYPES = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "text",
}
# Of two such escapes one character is made; one alone is half of it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LIMITS = {">=": "of at least", "<=": "of at most", ">": "above", "<": "below"}


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
        if "integer string conversion" in reason:
            reason = f"a number has more than {sys.get_int_max_str_digits():,} digits"
        raise error(f"{origin} is not valid JSON: {reason}") from problem


def read_json_file(file: Path) -> Any:
    """Read a JSON file of a folder.

    Args:
        file: Path of the file.

    Returns:
        The value.

    Raises:
        FolderError: If it is missing, not a regular file, too large, or not JSON, or if a text in
            it holds half of a character.
    """
    content = small_file(file)
    value = parse_json(content, str(file))
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            raise FolderError(_half_character(file, problem)) from problem
    return value


def _half_character(origin: str | Path, problem: UnicodeEncodeError) -> str:
    half = f"U+{ord(problem.object[problem.start]):04X}"
    return f"{origin} holds half of a character, {half}, in a name or a value"


def small_file(file: Path) -> bytes:
    """Read a whole file that is not one of weights.

    Args:
        file: Path of the file.

    Returns:
        Its bytes.

    Raises:
        FolderError: If it is missing, not a regular file such as a pipe, or as large as weights.
    """
    if not file.exists():
        raise FolderError(f"{file} is missing")
    if not file.is_file():
        raise FolderError(f"{file} should be a file, and is a folder, a pipe or a device")
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise FolderError(f"{file} has {size} bytes; at most {MOST_BYTES} are read")
    return file.read_bytes()


def check(
    value: Any, schema: Any, origin: str | Path, error: type[MistillError] = FolderError
) -> Any:
    """Hold a parsed document against a schema; it is never read as something else.

    Args:
        value: The parsed document.
        schema: A struct of msgspec, or another type. Keys that it does not name may hold anything.
        origin: Where the document comes from, for the message.
        error: What is raised.

    Returns:
        The document as the type of the schema.

    Raises:
        MistillError: Of the class ``error``: names the key, what was expected and what it holds.
    """
    try:
        return msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as problem:
        raise error(_complaint(value, str(problem), origin)) from problem
    except RecursionError as problem:
        raise error(f"{origin} is nested too deeply") from problem
    except UnicodeEncodeError as problem:
        raise error(_half_character(origin, problem)) from problem


def _complaint(value: Any, problem: str, origin: str | Path) -> str:
    """What msgspec says, in words: such as "vocab_size in config.json should be ..., not -1"."""
    reason, _, path = problem.partition(" - at `$")
    place = path.rstrip("`").lstrip(".")
    where = f"{place} in {origin}" if place else str(origin)
    lacking = re.search(r"missing required field `([^`]*)`", reason)
    if lacking is not None:
        return f"{where} lacks {lacking[1]}"
    expected = re.match(r"Expected `([^`]*)`(?: (<=|>=|<|>) (\S+?))?(?:, got `([^`]*)`)?$", reason)
    if expected is None:
        return f"{where}: {reason}"
    kinds = [kind for kind in expected[1].split(" | ") if kind != "null"] or ["null"]
    words = " or ".join(_TYPES.get(kind, kind) for kind in kinds)
    if expected[2]:
        words += f" {_LIMITS[expected[2]]} {expected[3]}"
    known, actual = _at(value, place)
    got = f"{actual!r:.80}" if known else _TYPES.get(expected[4] or "", "another value")
    return f"{where} should be {words}, not {got}"


def _at(value: Any, place: str) -> tuple[bool, Any]:
    """The value at a place such as ``model.eos[1]``, and whether it is known which one it is."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", place):
        if index == "..." or (index and not isinstance(value, list)):
            return False, None
        if not index and not (isinstance(value, dict) and name in value):
            return False, None
        value = value[int(index)] if index else value[name]
    return True, value
