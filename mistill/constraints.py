"""Constrained decoding: replies that fit a JSON schema, a regular expression or a grammar.

Before each token, llguidance computes which tokens are allowed; the others get probability 0, and
the sampler picks among the rest. A reply can end only when it fits the constraint. A reply that
``max_new_tokens`` or a full context cuts short may not fit it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.bounded import OutOfBoundsError, call_bounded
from mistill.engine.language_model import Choose
from mistill.errors import FolderError, MissingExtraError, SettingsError, VocabularyError
from mistill.folders.json_text import parse_json
from mistill.shown import one_line
from mistill.text.vocabulary import Vocabulary

# White space as json.dumps writes it; a schema may set it under x-guidance. Arbitrary white space
# would let a model write nothing else until it is stopped.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_MARK = "\x02"
_STACK_BYTES = 512 << 10


@dataclass(frozen=True)
class Constraint:
    """A constraint on a reply; ``json_schema``, ``regex`` and ``lark`` make one.

    Attributes:
        kind: ``JSON schema``, ``regular expression`` or ``grammar``, for messages.
        grammar: The constraint as llguidance reads it.
    """

    kind: str
    grammar: str


def json_schema(schema: Mapping[str, Any] | str | Path) -> Constraint:
    """Constrain a reply to JSON that fits a schema.

    Args:
        schema: The schema, its text, or the path of a file that holds it.

    Returns:
        The constraint.

    Raises:
        SettingsError: If it is not a schema, or no JSON fits it.
    """
    if isinstance(schema, Path):
        schema = _text(schema)
    if isinstance(schema, str):
        schema = parse_json(schema, "the JSON schema", SettingsError)
    if not isinstance(schema, Mapping):
        raise SettingsError(f"a JSON schema must be a JSON object, not {json.dumps(schema)[:40]}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"the JSON schema is not JSON: {error}") from error
    return _compiled("JSON schema", text)


def regex(pattern: str) -> Constraint:
    """Constrain a reply to match a regular expression from start to end.

    Args:
        pattern: The expression, in the dialect of Rust's ``regex``: no look-around, no references.

    Returns:
        The constraint.

    Raises:
        SettingsError: If it is not such an expression.
    """
    return _compiled("regular expression", pattern)


def lark(grammar: str | Path) -> Constraint:
    """Constrain a reply to a context-free grammar.

    Args:
        grammar: The grammar in Lark's notation, beginning at ``start``, or the path of a file
            that holds it.

    Returns:
        The constraint.

    Raises:
        SettingsError: If it is not such a grammar.
    """
    text = _text(grammar) if isinstance(grammar, Path) else grammar
    return _compiled("grammar", text)


class ConstraintTokens:
    """The tokens of a vocabulary for llguidance, prepared once for many replies."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Give llguidance the text of every token.

        Args:
            vocabulary: Vocabulary of the model.

        Raises:
            VocabularyError: If no token ends a reply.
        """
        library = _library()
        if not vocabulary.end_ids:
            raise VocabularyError(
                f"{vocabulary!r} has no token that ends a reply, which constrained decoding needs"
            )
        self.size = vocabulary.size
        self.tokens = library.LLTokenizer(
            library.TokenizerWrapper(_Spellings(vocabulary)),
            n_vocab=vocabulary.size,
            eos_token=list(vocabulary.end_ids),
        )


class ConstrainedChoice:
    """Wraps a function that picks tokens, so that it picks among the allowed ones."""

    def __init__(self, constraint: Constraint, tokens: ConstraintTokens, choose: Choose) -> None:
        """Begin a reply.

        Args:
            constraint: The constraint on the reply.
            tokens: The tokens of the model.
            choose: Function that picks among the allowed tokens; other logits are minus infinity.
        """
        self._matcher = _library().LLMatcher(tokens.tokens, constraint.grammar, log_level=0)
        self._kind = constraint.kind
        self._choose = choose
        self._size = tokens.size
        self._bits = np.zeros(-(-tokens.size // 32), np.uint32)
        self._complain()

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token.

        Args:
            logits: Shape (V,); left as they are.

        Returns:
            The id of an allowed token.

        Raises:
            SettingsError: If the constraint is too complex, or allows no token.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._complain()
        # Every machine that ONNX Runtime runs on has the lowest byte first.
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._size]
        if not allowed.any():
            raise SettingsError(
                f"the {self._kind} allows no token of this vocabulary at this position"
            )
        token = self._choose(np.where(allowed, logits, np.float32(-np.inf)))
        self._matcher.consume_token(token)
        self._complain()
        return token

    @property
    def complete(self) -> bool:
        """Whether the reply so far fits the constraint."""
        return bool(self._matcher.is_accepting())

    def _complain(self) -> None:
        if self._matcher.is_error():
            reason = _without_state(self._matcher.get_error())
            raise SettingsError(f"the {self._kind} cannot constrain this reply: {reason}")


class _Spellings:
    """A vocabulary under the names that llguidance looks for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end_ids[0]
        self.bos_token_id = vocabulary.bos_id
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.size)]
        self.special_token_ids = [
            token for token in range(vocabulary.size) if vocabulary.is_special(token)
        ]
        self._vocabulary = vocabulary
        # SentencePiece puts a space before a text. A mark before the text takes that space, so that
        # the text is tokenized as inside a longer one.
        self._mark = vocabulary.encode(_MARK)
        self._longest = max(len(spelled) for spelled in self.tokens)
        self._ids = {
            spelled: token
            for token, spelled in enumerate(self.tokens)
            if spelled and not vocabulary.is_special(token)
        }

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that must follow."""
        ids = self._vocabulary.encode(_MARK + text.decode("utf-8", "replace"))
        rest = ids[len(self._mark) :]
        if ids[: len(self._mark)] == self._mark and self._spell(rest) == text:
            return rest
        return self._longest_first(text)

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def _longest_first(self, text: bytes) -> list[int]:
        """The longest tokens that spell the text, from its start as far as possible."""
        ids = []
        while text:
            lengths = range(min(self._longest, len(text)), 0, -1)
            length = next((length for length in lengths if text[:length] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids


def _compiled(kind: str, text: str) -> Constraint:
    """Compile a constraint in a process that it may crash, before it is compiled in this one."""
    _library()
    try:
        grammar, complaint = call_bounded("mistill.constraints:grammar_of", kind, text)
    except OutOfBoundsError as error:
        raise SettingsError(
            f"this {kind} cannot be used for constrained decoding: it {error}"
        ) from error
    if complaint:
        raise SettingsError(
            f"this {kind} cannot be used for constrained decoding: {_without_state(complaint)}"
        )
    return Constraint(kind, grammar)


def grammar_of(kind: str, text: str) -> tuple[str, str]:
    """A constraint as llguidance reads it, and what it says against it; for the worker process.

    Args:
        kind: ``JSON schema``, ``regular expression`` or ``grammar``.
        text: The schema in JSON, the expression, or the grammar.

    Returns:
        The grammar, and a complaint, which is empty for a sound one.
    """
    matcher = _library().LLMatcher
    results: list[tuple[str, str]] = []

    def compile_it() -> None:
        try:
            if kind == "JSON schema":
                grammar = matcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
            elif kind == "regular expression":
                grammar = matcher.grammar_from_regex(text)
            else:
                grammar = matcher.grammar_from_lark(text)
            complaint = matcher.validate_grammar(grammar)
            warns = complaint.startswith("WARNING")
            results.append((grammar, "" if warns else complaint))
        except BaseException as error:  # a panic of Rust too
            results.append(("", str(error) or type(error).__name__))

    # The stack is smaller than that of any thread that will compile it again.
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    return results[0]


def _without_state(complaint: str) -> str:
    """What llguidance says, without the parser's state that it adds."""
    return one_line(complaint.partition("<state>")[0])


def _text(file: Path) -> str:
    try:
        return file.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{file} cannot be read: {error}") from error


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "llguidance is not installed; install it with: pip install llguidance"
        ) from error
    return llguidance
