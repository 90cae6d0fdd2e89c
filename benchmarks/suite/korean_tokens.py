"""Tokens that a Korean syllable takes in a vocabulary, and the syllables a second that follow.

    python -m benchmarks.suite.korean_tokens KOREAN.jsonl --vocabularies v0.1=tokenizer.model ...
    python -m benchmarks.suite.korean_tokens KOREAN.jsonl --laptop LAPTOP.json

Vocabularies are folders, or files of SentencePiece or of the library tokenizers; without any, they
are those of Mistral 7B v0.1 and v0.3 from the package ``mistral-common`` (``pip install
mistral-common``), which publishes them, and that of the embedded teacher. A syllable is one of the
11,172 characters from U+AC00 to U+D7A3. All tokens of the text count, those of its spaces, marks
and foreign words too, because a reply writes them all.

``--laptop`` names what ``benchmarks.suite.laptop`` printed, or its record: syllables a second of a
chatbot are the tokens a second that it wrote there over tokens a syllable. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.suite.page import last_document
from mistill.sources.source import resolve_model
from mistill.text.rows import read_rows
from mistill.text.vocabulary import Vocabulary, load_vocabulary

_PUBLISHED = {"Mistral v0.1": "tokenizer.model.v1"} | {
    "Mistral v0.3": "mistral_instruct_tokenizer_240323.model.v3"
}
_EMBEDDED = "@smollm2"


def is_syllable(character: str) -> bool:
    """Whether a character is a Korean syllable in one piece.

    Args:
        character: One character.

    Returns:
        True from U+AC00 to U+D7A3.
    """
    return "\uac00" <= character <= "\ud7a3"


def count(texts: Sequence[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """Syllables and tokens of texts.

    Args:
        texts: The texts.
        vocabulary: Their vocabulary.

    Returns:
        Both counts, tokens a syllable, and of the different syllables of the texts those that no
        token spells alone, so that two or more tokens share the bytes of one.
    """
    syllables = [character for text in texts for character in text if is_syllable(character)]
    tokens = sum(len(vocabulary.encode(text)) for text in texts)
    different = sorted(set(syllables))
    spelled = {vocabulary.token_bytes(token) for token in range(vocabulary.size)}
    cut = [one for one in different if one.encode() not in spelled]
    return {
        "vocabulary_size": vocabulary.size,
        "syllables": len(syllables),
        "tokens": tokens,
        "tokens_per_syllable": tokens / len(syllables),
        "different_syllables": len(different),
        "different_syllables_in_pieces": len(cut),
        "share_of_syllables_in_pieces": sum(one in set(cut) for one in syllables) / len(syllables),
    }


def tokens_per_second(laptop: Mapping[str, Any]) -> dict[str, float]:
    """The rate at which each row of the laptop wrote, after its first token.

    Args:
        laptop: What ``benchmarks.suite.laptop`` found.

    Returns:
        Tokens a second by the row's name, of rows that finished a reply.
    """
    rates = {}
    for name, row in laptop["rows"].items():
        if row["reply_seconds"]:
            first = row["first_token_seconds"][: len(row["reply_seconds"])]
            seconds = [
                last - start for last, start in zip(row["reply_seconds"], first, strict=True)
            ]
            rates[name] = (laptop["new_tokens"] - 1) / median(seconds)
    return rates


def _published() -> dict[str, Path]:
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        sys.exit(
            "mistral-common is not installed, whose files hold Mistral's vocabularies; install it "
            "with: pip install mistral-common, or name others with --vocabularies NAME=PATH"
        )
    data = Path(package.submodule_search_locations[0]) / "data"
    return {name: data / file for name, file in _PUBLISHED.items()}


def _opened(place: Path, folder: Path) -> Vocabulary:
    """The vocabulary of a folder or of a file, which gets a folder of its own."""
    if place.is_dir():
        return load_vocabulary(resolve_model(place))
    folder.mkdir()
    name = "tokenizer.json" if place.suffix == ".json" else "tokenizer.model"
    shutil.copyfile(place, folder / name)
    return load_vocabulary(resolve_model(folder))


def main() -> None:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", help="a .jsonl file, of which all texts are read")
    parser.add_argument("--vocabularies", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--laptop", type=Path, help="what benchmarks.suite.laptop printed")
    args = parser.parse_args()
    texts = [
        value
        for row in read_rows(args.texts)
        for value in row.value.values()
        if isinstance(value, str)
    ]
    if not any(is_syllable(character) for text in texts for character in text):
        parser.error(f"{args.texts} holds no Korean syllable")
    named = dict(word.split("=", 1) for word in args.vocabularies if "=" in word)
    if len(named) < len(args.vocabularies):
        parser.error("--vocabularies takes NAME=PATH, each name once")
    places = {name: Path(place) for name, place in named.items()} or _published()
    counts = {}
    with TemporaryDirectory() as folder:
        for number, (name, place) in enumerate(places.items()):
            counts[name] = count(texts, _opened(place, Path(folder) / str(number)))
    if not named:
        counts["SmolLM2"] = count(texts, load_vocabulary(resolve_model(_EMBEDDED)))
    report: dict[str, Any] = {
        "benchmark": "korean_tokens",
        "texts": args.texts,
        "vocabularies": counts,
    }
    if args.laptop is not None:
        written = args.laptop.read_text("utf-8")
        # A record is one document of many lines; an output ends in one of one line.
        laptop = json.loads(written) if written.startswith("{\n") else last_document(written)
        report["tokens_per_second"] = tokens_per_second(laptop.get("found", laptop))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
