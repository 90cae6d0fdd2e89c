"""JSON that anybody may have written: parsed, and held against a schema, in one place."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from mistill.errors import FolderError, MistillError
from mistill.shown import one_line

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
        reason = one_line(problem, 200)
        if "integer string conversion" in reason:
            reason = f"a number has more than {sys.get_int_max_str_digits():,} digits"
        raise error(f"{origin} is not valid JSON: {reason}") from problem


def parse_message(content: bytes, depth: int, error: type[MistillError]) -> Any:
    """Parse JSON that came over a network, and nothing that other programs read another way.

    Args:
        content: The bytes.
        depth: Levels of nesting that are followed.
        error: What is raised; its message holds nothing of the content.

    Returns:
        The value.

    Raises:
        MistillError: Of the class ``error``, if it is not UTF-8 or not JSON, if it names a key
            twice, nests more deeply, or holds half of a character. NaN and Infinity, which JSON
            does not have, are read as Python reads them.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"the body is not UTF-8 at byte {problem.start}; send JSON in UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as problem:
        raise error(f"the body is not JSON: {problem.msg} at character {problem.pos}") from None
    except RecursionError:
        raise error(f"the body is nested more than {depth} levels deep") from None
    except ValueError as problem:
        reason = problem.args[0] if isinstance(problem, _RefusedError) else "a number is too long"
        raise error(f"the body is not JSON that mistill reads: {reason}") from None
    if _is_deeper(value, depth):
        raise error(f"the body is nested more than {depth} levels deep")
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise error("the body holds half of a character, such as \\ud800 alone") from None
    return value


class _RefusedError(ValueError):
    """JSON that Python would read."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _RefusedError("an object names a key twice")
    return entries


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more levels deep."""
    level = [value]
    for _ in range(depth):
        inside = (inner for outer in level for inner in items_of(outer))
        level = [inner for inner in inside if type(inner) in (dict, list)]
    return bool(level)


def items_of(value: Any) -> Iterable[Any]:
    """What a list or an object of JSON holds; nothing for another value."""
    if type(value) is dict:
        return value.values()
    return value if type(value) is list else ()


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
        raise error(_complaint(value, problem, origin)) from problem
    except RecursionError as problem:
        raise error(f"{origin} is nested too deeply") from problem
    except UnicodeEncodeError as problem:
        raise error(_half_character(origin, problem)) from problem


def place_of(problem: msgspec.ValidationError) -> str:
    """The place in a document that msgspec complains of, such as ``messages[3].content``."""
    return str(problem).partition(" - at `$")[2].rstrip("`").lstrip(".")


def expectation(problem: msgspec.ValidationError) -> tuple[str, str] | None:
    """What msgspec expected and what it came upon, in words.

    Args:
        problem: Its complaint.

    Returns:
        Such as ("a whole number of at least 1", "text"); None for a complaint of another kind.
    """
    reason = str(problem).partition(" - at `$")[0]
    expected = re.match(r"Expected `([^`]*)`(?: (<=|>=|<|>) (\S+?))?(?:, got `([^`]*)`)?$", reason)
    if expected is None:
        return None
    kinds = [kind for kind in expected[1].split(" | ") if kind != "null"] or ["null"]
    words = " or ".join(_TYPES.get(kind, kind) for kind in kinds)
    if expected[2]:
        words += f" {_LIMITS[expected[2]]} {expected[3]}"
    return words, _TYPES.get(expected[4] or "", "another value")


def _complaint(value: Any, problem: msgspec.ValidationError, origin: str | Path) -> str:
    """What msgspec says, in words: such as "vocab_size in config.json should be ..., not -1"."""
    reason, place = str(problem).partition(" - at `$")[0], place_of(problem)
    where = f"{place} in {origin}" if place else str(origin)
    lacking = re.search(r"missing required field `([^`]*)`", reason)
    if lacking is not None:
        return f"{where} lacks {lacking[1]}"
    words = expectation(problem)
    if words is None:
        return f"{where}: {reason}"
    known, actual = value_at(value, place)
    return f"{where} should be {words[0]}, not {f'{actual!r:.80}' if known else words[1]}"


def value_at(value: Any, place: str) -> tuple[bool, Any]:
    """The value at a place of a document.

    Args:
        value: The document.
        place: Such as ``model.eos[1]``.

    Returns:
        Whether it is known which value it is, and the value.
    """
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", place):
        if index == "..." or (index and not isinstance(value, list)):
            return False, None
        if not index and not (isinstance(value, dict) and name in value):
            return False, None
        value = value[int(index)] if index else value[name]
    return True, value
