"""Tokens that stand in other files than tokenizer.json: those that transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from export import to_gguf
from mistill.cli.inspection import inspect_folder
from mistill.errors import VocabularyError
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import tiny_model

TEXT = "<|im_start|>user\nfind <pad> gulls<|im_end|>\n<|call|>  gulls <|done|>.</s> <image>"
CALL = {"content": "<|call|>", "special": True, "normalized": False}
END = {"__type": "AddedToken", "content": "<|im_end|>"}
DONE = {"content": "<|done|>", "special": False, "lstrip": True, "rstrip": True}


def edit(folder: Path, file: str, **changes: Any) -> Path:
    path = folder / file
    value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(value | changes), "utf-8")
    return path


def forget(folder: Path, *contents: str) -> Path:
    """Leave tokens out of the added tokens of tokenizer.json; the vocabulary still has them."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    kept = [entry for entry in tokenizer["added_tokens"] if entry["content"] not in contents]
    return edit(folder, "tokenizer.json", added_tokens=kept)


def config(folder: Path, **changes: Any) -> Path:
    return edit(folder, "tokenizer_config.json", **changes)


CASES: dict[str, Any] = {
    "a decoder": lambda folder: config(folder, added_tokens_decoder={"384": CALL, "385": DONE}),
    "a decoder out of order": lambda folder: config(
        folder, added_tokens_decoder={"385": DONE, "384": CALL}
    ),
    "a decoder that repeats": lambda folder: config(
        folder,
        added_tokens_decoder={
            "1": {"content": "<s>", "special": True},
            "384": CALL,
        },
    ),
    "older files": lambda folder: (
        edit(folder, "added_tokens.json", **{"<|call|>": 384, "<|done|>": 385}),
        edit(folder, "special_tokens_map.json", sep_token="<|call|>"),
    ),
    "an end by name": lambda folder: forget(folder, "<|im_end|>"),
    "an end by name as an object": lambda folder: (
        forget(folder, "<|im_end|>"),
        config(folder, eos_token={**END, "rstrip": True, "lstrip": True}),
    ),
    "padding by name": lambda folder: (forget(folder, "</s>"), config(folder, pad_token="</s>")),
    "a name that is in no vocabulary": lambda folder: config(folder, pad_token="<pad>"),
    "additional tokens": lambda folder: (
        forget(folder, "<|im_start|>"),
        config(folder, additional_special_tokens=["<|im_start|>", "<|call|>"]),
    ),
    "extra tokens": lambda folder: config(folder, extra_special_tokens=["<|call|>"]),
    "extra tokens by name": lambda folder: config(
        folder, extra_special_tokens={"image_token": "<image>"}
    ),
    "a model's own name": lambda folder: config(folder, image_token="<image>"),
}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few rows more than its tokenizer has tokens."""
    return tiny_model(tmp_path_factory.mktemp("marks") / "roomy", vocab_size=392)


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_other_files_are_those_of_transformers(case: str, roomy: Path, tmp_path: Path):
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(roomy, tmp_path / "copy"))
    CASES[case](folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_vocabulary(folder)
    expected = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT) == expected
    spans = ours.encode_spans(TEXT)
    assert spans.ids.tolist() == expected
    assert ours.decode(expected) == theirs.decode(expected)
    for token in set(expected) - {0}:
        assert ours.is_special(token) == (
            token in theirs.added_tokens_decoder and theirs.added_tokens_decoder[token].special
        )
    fields = GGUFReader(to_gguf(folder, tmp_path / "m.gguf")).fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    for token, entry in theirs.added_tokens_decoder.items():
        assert (texts[token], kinds[token]) == (entry.content, 3 if entry.special else 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"added_tokens_decoder": {"390": CALL}}, "the id 390, but it would get 384"),
        ({"added_tokens_decoder": {"x": CALL}}, "the id 'x', no whole number"),
        ({"added_tokens_decoder": {"384": "x"}}, "an added token that is none: 'x'"),
        ({"added_tokens_decoder": {"384": {"content": 1}}}, "an added token that is none"),
        (
            {"added_tokens_decoder": {"384": {**CALL, "lstrip": "no"}}},
            "an added token that is none",
        ),
    ],
)
def test_added_tokens_that_are_none_are_refused(
    changes: dict[str, Any], words: str, roomy: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(roomy, tmp_path / "copy"))
    config(folder, **changes)
    with pytest.raises(VocabularyError, match=words):
        load_vocabulary(folder)


@pytest.mark.parametrize("stated", [True, False])
def test_inspect_says_that_two_files_disagree_about_the_first_token(
    stated: bool, roomy: Path, tmp_path: Path
):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = Path(shutil.copytree(roomy, tmp_path / "copy"))
    if not stated:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    assert not any("contradict" in note for note in inspect_folder(folder).notes)
    config(folder, add_bos_token=stated)
    (note,) = (note for note in inspect_folder(folder).notes if "contradict" in note)
    assert ("text begins with" in note) == stated
    assert load_vocabulary(folder).adds_bos == stated
