"""The tokenizer that a GGUF file describes, and which of its tokens are special.

Faulty converters give special tokens, such as the end of a turn, the type of normal ones, so that a
rendered conversation is cut into their letters. llama.cpp makes special tokens of those that end a
turn, and transformers of those that the file names; the marks that only the chat template writes
are found in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from mistill.errors import VocabularyError
from mistill.folders.publishing import write_json
from mistill.sources.gguf_fields import GgufFile
from mistill.sources.tokenizer_parts import (
    Pieces,
    TokenType,
    begin_with,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

_log = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")
_NAMED = ("bos", "unknown", "padding", "seperator", "mask")  # spelt as in the format

# Texts by which llama.cpp knows tokens that end a turn, whatever type the file gives them.
_TURN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>"),
        *("<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    )
)


def special_ids(file: GgufFile) -> dict[str, int | None]:
    """The tokens that a file names.

    Args:
        file: A GGUF file.

    Returns:
        Ids by llama.cpp's names, such as ``eos`` or ``padding``; None where it names none.

    Raises:
        FolderError: If a name is given to something that is no token.
    """
    count = len(file.items(f"{_PREFIX}tokens", str))
    return {name: file.token(f"{_PREFIX}{name}_token_id", count) for name in (*_ENDS, *_NAMED)}


def ends_of(ids: Mapping[str, int | None]) -> list[int]:
    """Tokens that end a text and a turn, as the file names them.

    Args:
        ids: What ``special_ids`` returned.

    Returns:
        Ids, each once.
    """
    keys = (ids[name] for name in _ENDS)
    return list(dict.fromkeys(end for end in keys if end is not None))


def write_tokenizer(
    file: GgufFile, target: Path, ids: Mapping[str, int | None], context_length: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Args:
        file: A GGUF file.
        target: The folder to write into.
        ids: What ``special_ids`` returned.
        context_length: The most positions of a text.

    Raises:
        VocabularyError: If the vocabulary is of a kind that mistill does not know, or damaged.
    """
    template = file.text("tokenizer.chat_template")
    tokenizer = _tokenizer(file, ids, template or "")
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    texts = file.items(f"{_PREFIX}tokens", str)
    # A word that is named as padding stays a word: to name it here would make it a special token.
    added = tokenizer.get_added_tokens_decoder()
    specials = {
        ours: texts[token]
        for ours, name in keys.items()
        if (token := ids[name]) is not None and token in added
    }
    is_sentencepiece = file.text(f"{_PREFIX}model") == "llama"
    adds_bos = file.flag(f"{_PREFIX}add_bos_token", is_sentencepiece)
    if adds_bos and "bos_token" in specials:
        begin_with(tokenizer, specials["bos_token"])
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    settings = {
        # A specific class would replace the pre-tokenizer; this one takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **specials,
    }
    write_json(target / "tokenizer_config.json", settings)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, "utf-8")


def _tokenizer(file: GgufFile, ids: Mapping[str, int | None], template: str) -> Tokenizer:
    """The tokenizer, with special tokens that the file types as normal ones."""
    texts = file.items(f"{_PREFIX}tokens", str)
    kinds = _kinds(file, len(texts))
    ends = set(ends_of(ids)) | {token for token, text in enumerate(texts) if text in _TURN_ENDS}
    mistaken = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    changed = {token for token in ends if kinds[token] in mistaken}
    for token in changed:
        kinds[token] = TokenType.CONTROL
    tokenizer = _built(file, texts, kinds)
    marks = {token for token in ids.values() if token is not None} | {
        token for token, text in enumerate(texts) if _is_mark(text) and text in template
    }
    hidden = {
        token
        for token in marks
        if kinds[token] == TokenType.NORMAL
        and tokenizer.encode(texts[token], add_special_tokens=False).ids != [token]
    }
    changed |= hidden
    if changed:
        _log.warning(
            "%s says that %s are normal tokens; they are read as special ones, because it names "
            "them or its chat template writes them",
            file.name,
            ", ".join(sorted(repr(texts[token]) for token in changed)[:8]),
        )
    if not hidden:
        return tokenizer
    for token in hidden:
        kinds[token] = TokenType.CONTROL
    return _built(file, texts, kinds)


def _is_mark(text: str) -> bool:
    """Whether a token looks like what a chat template writes around a turn."""
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


def _kinds(file: GgufFile, count: int) -> list[TokenType]:
    if f"{_PREFIX}token_type" not in file:
        return [TokenType.NORMAL] * count
    try:
        kinds = [TokenType(kind) for kind in file.items(f"{_PREFIX}token_type", int)]
    except ValueError as error:
        raise _undescribed(file, error) from error
    if len(kinds) != count:
        raise _undescribed(file, f"it has {len(kinds)} token types for {count} tokens")
    return kinds


def _built(file: GgufFile, texts: list[str], kinds: list[TokenType]) -> Tokenizer:
    if len(set(texts)) < len(texts):
        raise _undescribed(file, "two of its tokens have the same text")
    model = file.text(f"{_PREFIX}model")
    if model not in ("gpt2", "llama"):
        raise VocabularyError(
            f"{file.name} has a vocabulary of the kind {model}; mistill reads GGUF files with the "
            "vocabularies gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    if model == "gpt2":
        merges = file.items(f"{_PREFIX}merges", str) if f"{_PREFIX}merges" in file else None
        if merges is None:
            raise _undescribed(file, f"it lacks the field {_PREFIX}merges")
        cut = str(file.text(f"{_PREFIX}pre"))
        try:
            return byte_level_tokenizer(Pieces(texts, kinds), merges, cut, file.name)
        except VocabularyError:
            raise
        except Exception as error:  # tokenizers raises nothing more precise
            raise _undescribed(file, error) from error
    scores = file.items(f"{_PREFIX}scores", float) if f"{_PREFIX}scores" in file else []
    if len(scores) != len(texts):
        raise _undescribed(file, f"it has {len(scores)} scores for {len(texts)} tokens")
    prefix = file.flag(f"{_PREFIX}add_space_prefix", True)
    try:
        return sentencepiece_tokenizer(Pieces(texts, kinds, scores), file.name, space_prefix=prefix)
    except VocabularyError:
        raise
    except Exception as error:
        raise _undescribed(file, error) from error


def _undescribed(file: GgufFile, reason: object) -> VocabularyError:
    return VocabularyError(f"{file.name} does not describe its vocabulary: {reason}")
