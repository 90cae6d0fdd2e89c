"""Instructions that a program can check, as IFEval writes them down.

Each prompt names its instructions and their numbers: no commas, at least 300 words, a title in
double angle brackets (Zhou et al., 2023, https://arxiv.org/abs/2311.07911, table 1). Those that
need a model of a language, or a tokenizer of sentences, are left to lm-evaluation-harness.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mistill.errors import TextError

Numbers = Mapping[str, Any]

_WORD = re.compile(r"\w+")
_BULLET = re.compile(r"^\s*[*\-](?![*\-])\s*\S.*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"(\*{1,2})[^\n*]*[^\s*][^\n*]*\1")
_PLACEHOLDER = re.compile(r"\[.*?\]")
_TITLE = re.compile(r"<<[^\n]+?>>")


def _compared(found: int, numbers: Numbers, wanted: str, relation: str = "relation") -> bool:
    words, number = numbers.get(relation, "at least"), int(numbers[wanted])
    return found < number if words == "less than" else found >= number


def _is_json(text: str) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _count(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _has_word(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _postscript(numbers: Numbers, text: str) -> bool:
    marker = str(numbers["postscript_marker"]).lower()
    pattern = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}.get(marker, re.escape(marker))
    return re.search(rf"\s*{pattern}.*$", text.lower(), re.MULTILINE) is not None


def _two_answers(text: str) -> bool:
    parts = [part.strip() for part in text.split("******") if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


_CHECKS: dict[str, Callable[[Numbers, str], bool]] = {
    "punctuation:no_comma": lambda numbers, text: "," not in text,
    "length_constraints:number_words": lambda numbers, text: _compared(
        len(_WORD.findall(text)), numbers, "num_words"
    ),
    "keywords:existence": lambda numbers, text: all(
        _count(word, text) for word in numbers["keywords"]
    ),
    "keywords:forbidden_words": lambda numbers, text: (
        not any(_has_word(word, text) for word in numbers["forbidden_words"])
    ),
    "keywords:frequency": lambda numbers, text: _compared(
        _count(str(numbers["keyword"]), text), numbers, "frequency"
    ),
    "keywords:letter_frequency": lambda numbers, text: _compared(
        text.lower().count(str(numbers["letter"]).lower()),
        numbers,
        "let_frequency",
        "let_relation",
    ),
    "change_case:english_lowercase": lambda numbers, text: text.islower(),
    "change_case:english_capital": lambda numbers, text: text.isupper(),
    "startend:quotation": lambda numbers, text: (
        len(text.strip()) > 1 and text.strip()[0] == '"' and text.strip()[-1] == '"'
    ),
    "startend:end_checker": lambda numbers, text: (
        text.strip().strip('"').lower().endswith(str(numbers["end_phrase"]).strip().lower())
    ),
    "detectable_format:title": lambda numbers, text: any(
        title.strip("<>").strip() for title in _TITLE.findall(text)
    ),
    "detectable_format:json_format": lambda numbers, text: _is_json(text),
    "detectable_format:number_bullet_lists": lambda numbers, text: (
        len(_BULLET.findall(text)) == int(numbers["num_bullets"])
    ),
    "detectable_format:number_highlighted_sections": lambda numbers, text: (
        len(_HIGHLIGHT.findall(text)) >= int(numbers["num_highlights"])
    ),
    "detectable_content:number_placeholders": lambda numbers, text: (
        len(_PLACEHOLDER.findall(text)) >= int(numbers["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "combination:two_responses": lambda numbers, text: _two_answers(text),
}

INSTRUCTIONS = tuple(_CHECKS)


def instructions_of(columns: Mapping[str, Any], origin: str) -> list[tuple[str, Numbers]]:
    """The instructions of a prompt, and their numbers.

    Args:
        columns: The columns of its row: ``instruction_id_list`` and ``kwargs``.
        origin: File and line, for messages.

    Returns:
        Names and numbers.

    Raises:
        TextError: If there are none, or one that is not known or lacks its numbers.
    """
    names, numbers = columns.get("instruction_id_list"), columns.get("kwargs")
    if isinstance(numbers, str):
        numbers = json.loads(numbers)
    if not isinstance(names, list | tuple) or not names:
        raise TextError(
            f"{origin} has no instruction_id_list; give prompts with instruction_id_list and "
            "kwargs, as IFEval has them"
        )
    if not isinstance(numbers, list | tuple) or len(numbers) != len(names):
        raise TextError(f"kwargs of {origin} should be a list with an object for each instruction")
    found: list[tuple[str, Numbers]] = []
    for name, one in zip(names, numbers, strict=True):
        if name not in _CHECKS:
            raise TextError(
                f"{origin} has the instruction {name!r:.80}, which mistill does not check; it "
                f"checks {', '.join(INSTRUCTIONS)}"
            )
        given = {key: value for key, value in dict(one or {}).items() if value is not None}
        try:
            _CHECKS[name](given, "text")
        except (KeyError, TypeError, ValueError) as error:
            raise TextError(f"{origin}: the instruction {name} lacks {error}") from error
        found.append((name, given))
    return found


def share_followed(instructions: Sequence[tuple[str, Numbers]], text: str) -> float:
    """The share of a prompt's instructions that an answer follows; an empty answer follows none.

    Args:
        instructions: From ``instructions_of``.
        text: An answer.

    Returns:
        From 0 to 1.
    """
    if not text.strip():
        return 0.0
    return sum(_CHECKS[name](numbers, text) for name, numbers in instructions) / len(instructions)
