"""Tokens that other files than tokenizer.json add to a vocabulary.

transformers makes tokens of what ``added_tokens_decoder`` in tokenizer_config.json or the older
added_tokens.json list, and special tokens of those that a name is given to, such as ``eos_token``,
whatever tokenizer.json says of them. The files of fine-tuned models disagree in that. A model that
learnt ``<|end|>`` as one token must not read its letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mistill.errors import VocabularyError
from mistill.folders.schemas import optional_json

_CONFIG = "tokenizer_config.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_missing_tokens(folder: Path, definition: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Add the tokens that only the files beside tokenizer.json name, as transformers does.

    Args:
        folder: The folder of the files.
        definition: Content of tokenizer.json; its ``added_tokens`` are extended.
        tokenizer: The tokenizer of it; the tokens are added to it.

    Raises:
        VocabularyError: If a token would get another id than its file says.
    """
    settings = optional_json(folder / _CONFIG)
    listed = list(definition.get("added_tokens") or [])
    contents = {str(entry.get("content")) for entry in listed}
    for token, stated_id in (*_listed(folder, settings), *_named(folder, settings)):
        if not token.content or token.content in contents:
            continue
        contents.add(token.content)
        tokenizer.add_tokens([token])
        token_id = tokenizer.token_to_id(token.content)
        if stated_id not in (None, token_id):
            raise VocabularyError(
                f"{folder} gives the added token {token.content!r} the id {stated_id}, but it "
                f"would get {token_id}: tokens between them are missing from its tokenizer.json"
            )
        flags = {name: getattr(token, name) for name in _FLAGS}
        listed.append({"id": token_id, "content": token.content, **flags})
    definition["added_tokens"] = listed


def _listed(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[AddedToken, int | None]]:
    """Tokens with their ids, in the order of the ids."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        by_id = {_whole(key): entry for key, entry in decoder.items()}
        for token_id in sorted(by_id):
            yield _added_token(by_id[token_id]), token_id
        return
    ids = optional_json(folder / "added_tokens.json")
    specials = {token.content for token, _ in _named(folder, settings)}
    for content in sorted(ids, key=lambda content: _whole(ids[content])):
        special = content in specials
        token = AddedToken(content, normalized=not special, special=special)
        yield token, _whole(ids[content])


def _named(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[AddedToken, None]]:
    """Special tokens by the names of transformers, or of a model's own."""
    entries = dict(settings)
    if "added_tokens_decoder" not in settings:
        entries = {**optional_json(folder / "special_tokens_map.json"), **entries}
    values = [value for name, value in entries.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = entries.get(name) or []
        values += list(more.values()) if isinstance(more, Mapping) else more
    for value in values:
        if isinstance(value, str):
            yield AddedToken(value, special=True), None
        elif isinstance(value, Mapping) and isinstance(value.get("content"), str):
            yield _added_token({**value, "special": True}), None


def _added_token(entry: Any) -> AddedToken:
    content = entry.get("content") if isinstance(entry, Mapping) else None
    flags = {name: entry[name] for name in _FLAGS if name in entry} if content else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise VocabularyError(f"{_CONFIG} lists an added token that is none: {entry!r:.80}")
    return AddedToken(content, **flags)


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise VocabularyError(
            f"an added token has the id {value!r:.60}, no whole number"
        ) from error
