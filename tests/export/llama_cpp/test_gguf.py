"""A GGUF file says what its source says: read back, read by transformers, run by llama.cpp."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantize
from export import to_gguf
from export.llama_cpp.gguf_vocabulary import _tied_runs
from export.settings import GgufSettings, OnnxSettings
from export.weights.architecture import read_architecture
from export.weights.folder_weights import FolderWeights
from mistill import open_model
from mistill.errors import (
    ExportError,
    FolderError,
    SettingsError,
    TargetExistsError,
    VocabularyError,
)
from mistill.folders.folder import read_config, read_json
from mistill.sources.source import resolve_model
from mistill.sources.tokenizer_parts import read_sentencepiece
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from tests.export.sources import gptq_folder, nf4_folder
from tests.mistill import made
from tests.reference.llama_cpp import interleaved, log_probabilities
from tests.test_road import mistral_vocabulary
from tests.tiny import SENTENCES, tiny_model

IDS = np.random.default_rng(0).integers(0, 300, (1, 40))
TEXT = " ".join((*SENTENCES, "I'm 12345 and DON'T\n\n  x_y  (3.5) \t HTTPServer"))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama whose heads are of an unusual size and whose rope base is its own."""
    return tiny_model(
        tmp_path_factory.mktemp("models") / "llama",
        model_type="llama",
        head_dim=24,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )


def logits(folder: Path) -> Any:
    return open_model(folder).logits(IDS)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file, by the library's own reader."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def dequantized(tensor: Any) -> Any:
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


# --- round trips --------------------------------------------------------------------------------


def test_a_file_read_back_is_the_model_and_the_vocabulary_it_was_made_from(
    llama: Path, tmp_path: Path
):
    folder = resolve_model(to_gguf(llama, tmp_path / "tiny.gguf", dtype="float32"))
    np.testing.assert_array_equal(logits(folder), logits(llama))
    ours, theirs = read_json(llama / "config.json"), read_json(folder / "config.json")
    for name in ("head_dim", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"):
        assert theirs[name] == ours[name], name
    vocabulary, back = load_vocabulary(llama), load_vocabulary(folder)
    assert same_vocabulary(vocabulary, back) == []
    assert set(back.end_ids) == set(vocabulary.end_ids)
    assert (back.bos_id, back.adds_bos) == (vocabulary.bos_id, vocabulary.adds_bos)
    assert back.chat_template == vocabulary.chat_template
    assert back.special_tokens == vocabulary.special_tokens
    assert back.encode(TEXT) == vocabulary.encode(TEXT)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "rope_parameters": LLAMA3},
        {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ],
    ids=["window", "biases", "llama3", "linear"],
)
def test_what_some_models_have_is_read_back(options: dict[str, Any], tmp_path: Path):
    source = tiny_model(tmp_path / "model", **options)
    folder = resolve_model(to_gguf(source, tmp_path / "tiny.gguf", dtype="float32"))
    np.testing.assert_array_equal(logits(folder), logits(source))


def test_transformers_reads_the_same_logits_from_the_file(model: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    file = to_gguf(model, tmp_path / "tiny.gguf", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)


def test_rows_of_q_and_k_stand_as_llama_cpp_rotates_them(llama: Path, tmp_path: Path):
    _, tensors = read(to_gguf(llama, tmp_path / "tiny.gguf", dtype="float32"))
    stored = load_file(llama / "model.safetensors")
    for part, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        expected = interleaved(stored[f"model.layers.1.self_attn.{part}.weight"], heads)
        np.testing.assert_array_equal(tensors[f"blk.1.{theirs}.weight"].data, expected)
    assert "output.weight" not in tensors


def test_a_file_says_what_it_is(tmp_path: Path):
    source = tiny_model(tmp_path / "window", sliding_window=64)
    metadata, tensors = read(to_gguf(source, tmp_path / "tiny.gguf", dtype="q4_0"))
    # llama.cpp has no window for a llama: it may not go beyond it.
    assert metadata["llama.context_length"] == 64
    assert metadata["llama.attention.sliding_window"] == 64
    assert metadata["general.file_type"] == 2
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    lineage = json.loads(metadata["mistill.lineage"])
    assert (lineage[-1]["step"], lineage[-1]["settings"]["dtype"]) == ("gguf", "q4_0")
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == "F32"


# --- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "step"), [("float16", 0.0005), ("q8_0", 1 / 250), ("q4_1", 1 / 15), ("q4_0", 1 / 8)]
)
def test_rounding_stays_within_a_step_of_its_block(
    dtype: Any, step: float, model: Path, tmp_path: Path
):
    _, tensors = read(to_gguf(model, tmp_path / "tiny.gguf", dtype=dtype))
    weight = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    error = np.abs(dequantized(tensors["blk.0.ffn_up.weight"]) - weight).reshape(-1, 32)
    spread = np.abs(weight).reshape(-1, 32).max(-1, keepdims=True) * (2 if dtype == "q4_1" else 1)
    assert 0 < (error / spread).max() <= step * 1.05


def test_tables_may_have_a_type_of_their_own(model: Path, tmp_path: Path):
    _, tensors = read(to_gguf(model, tmp_path / "a.gguf", dtype="q4_0", table_dtype="float32"))
    stored = load_file(model / "model.safetensors")
    np.testing.assert_array_equal(tensors["output.weight"].data, stored["lm_head.weight"])
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [
        (4, True, "q4_0"),
        (3, True, "q4_0"),
        (4, True, "q4_1"),
        (4, True, "q8_0"),
        (4, False, "q8_0"),
        (8, True, "q8_0"),
    ],
)
def test_codes_that_fit_go_over_as_they_are(
    bits: int, symmetric: bool, dtype: Any, model: Path, tmp_path: Path, caplog: Any
):
    source, weights = gptq_folder(
        model, tmp_path / "gptq", bits=bits, group_size=64, symmetric=symmetric
    )
    with caplog.at_level(logging.WARNING):
        _, tensors = read(to_gguf(source, tmp_path / "tiny.gguf", dtype=dtype))
    assert caplog.text == ""
    for module, name, heads in (
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight", 0),
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q.weight", 4),
    ):
        expected = weights[module].dequantize()
        expected = interleaved(expected, heads) if heads else expected
        np.testing.assert_array_equal(dequantized(tensors[name]), expected)


@pytest.mark.parametrize(
    ("options", "matrices", "tables"),
    [
        (None, "F16", "F16"),
        ({"bits": 4}, "Q4_0", "Q8_0"),
        ({"bits": 3}, "Q4_0", "Q8_0"),
        ({"bits": 4, "symmetric": False}, "Q4_1", "Q8_0"),
        ({"bits": 8}, "Q8_0", "Q8_0"),
        ({"bits": 4, "act_order": True}, "F16", "F16"),
        ({"bits": 4, "group_size": 16}, "F16", "F16"),
    ],
)
def test_the_codes_of_a_folder_decide_where_no_type_is_asked_for(
    options: dict[str, Any] | None,
    matrices: str,
    tables: str,
    model: Path,
    tmp_path: Path,
    caplog: Any,
):
    source = model if options is None else gptq_folder(model, tmp_path / "gptq", **options)[0]
    with caplog.at_level(logging.WARNING):
        _, tensors = read(to_gguf(source, tmp_path / "tiny.gguf"))
    assert caplog.text == ""
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == matrices
    assert tensors["token_embd.weight"].tensor_type.name == tables


def test_each_matrix_of_mixed_bits_has_the_smallest_type_of_its_own(
    model: Path, tmp_path: Path, caplog: Any
):
    source = quantize.to_rounding(
        model,
        tmp_path / "mixed",
        bits=4,
        group_size=32,
        symmetric=False,
        overrides=("model.layers.0: bits=8", r".*v_proj: keep"),
        head_bits=8,
    )
    with caplog.at_level(logging.WARNING):
        metadata, tensors = read(to_gguf(source, tmp_path / "tiny.gguf"))
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.1.ffn_up.weight"] == types["blk.1.attn_q.weight"] == "Q4_1"
    assert types["blk.1.attn_v.weight"] == "F16"
    assert types["token_embd.weight"] == "Q8_0"
    assert metadata["general.file_type"] == 7  # most weights are in 8 bits
    # 8-bit codes of which a zero point is far from the middle fit no block.
    assert "were rounded again, to q8_0; dtype float16 loses less" in caplog.text
    with FolderWeights(
        source, read_architecture(read_config(source)), OnnxSettings(precision="float32")
    ) as weights:
        for name, module in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            exact = weights.exact(f"model.layers.1.{module}")
            found = dequantized(tensors[f"blk.1.{name}.weight"])
            np.testing.assert_allclose(found, exact, atol=np.abs(exact).max() * 2e-3)
    plain = to_gguf(source, tmp_path / "plain.gguf", dtype="float16")
    assert (tmp_path / "tiny.gguf").stat().st_size < 0.7 * plain.stat().st_size
    _, tensors = read(to_gguf(source, tmp_path / "tables.gguf", table_dtype="float32"))
    assert tensors["token_embd.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q4_1"


def test_offsets_of_asymmetric_codes_are_rounded_to_float16_alone(model: Path, tmp_path: Path):
    source, weights = gptq_folder(model, tmp_path / "gptq", bits=4, symmetric=False)
    _, tensors = read(to_gguf(source, tmp_path / "tiny.gguf", dtype="q4_1"))
    weight = weights["model.layers.0.mlp.up_proj"]
    found = dequantized(tensors["blk.0.ffn_up.weight"])
    offsets = np.abs(weight.scales.astype(np.float32) * weight.zeros)[:, weight.g_idx]
    error = np.abs(found - weight.dequantize())
    assert (error <= offsets * 2.0**-11 + 1e-7).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"act_order": True}, "q4_0"),
        ({"symmetric": False}, "q4_0"),
        ({"bits": 8}, "q4_1"),
        ({"bits": 8, "symmetric": False}, "q8_0"),
        ({"group_size": 16}, "q4_0"),
    ],
    ids=["act_order", "asymmetric", "8 bits", "8 bits asymmetric", "half a block"],
)
def test_codes_that_fit_no_blocks_are_rounded_again_and_it_is_said(
    options: dict[str, Any], dtype: Any, model: Path, tmp_path: Path, caplog: Any
):
    source, weights = gptq_folder(model, tmp_path / "gptq", **options)
    with caplog.at_level(logging.WARNING):
        _, tensors = read(to_gguf(source, tmp_path / "tiny.gguf", dtype=dtype))
    assert "the codes of 14 matrices do not fit the blocks" in caplog.text
    expected = weights["model.layers.0.mlp.up_proj"].dequantize()
    found = dequantized(tensors["blk.0.ffn_up.weight"])
    most = np.abs(expected).reshape(-1, 32).max(-1).max() * (1 / 100 if dtype == "q8_0" else 1 / 7)
    assert 0 < np.abs(found - expected).max() < most


@pytest.mark.parametrize("kind", ["gptq", "nf4"])
def test_quantized_sources_become_the_floats_they_stand_for(kind: str, model: Path, tmp_path: Path):
    source = tmp_path / "source"
    if kind == "nf4":
        nf4_folder(model, source)
    else:
        gptq_folder(model, source, act_order=True, symmetric=False)
    folder = resolve_model(to_gguf(source, tmp_path / "tiny.gguf", dtype="float32"))
    np.testing.assert_allclose(logits(folder), logits(source), atol=2e-5)


def test_rows_that_are_no_whole_blocks_become_float16_by_name(tmp_path: Path, caplog: Any):
    source = tiny_model(tmp_path / "model", intermediate_size=80)
    with caplog.at_level(logging.WARNING):
        _, tensors = read(to_gguf(source, tmp_path / "tiny.gguf", dtype="q4_0"))
    assert "2 matrices become float16" in caplog.text
    assert "model.layers.0.mlp.down_proj" in caplog.text
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"


# --- vocabularies -------------------------------------------------------------------------------


def sentencepiece_model(folder: Path, **settings: Any) -> Path:
    """A model whose tokenizer is a SentencePiece one, as Mistral 7B's is."""
    made.sentencepiece_folder(folder, **settings)
    size = 420
    tokenizer = folder.parent / "converted"
    shutil.copytree(resolve_model(folder), tokenizer)
    tiny_model(folder, vocab_size=size, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").unlink()
    return folder


def test_a_sentencepiece_vocabulary_is_read_back(tmp_path: Path):
    source = sentencepiece_model(tmp_path / "model")
    file = to_gguf(source, tmp_path / "tiny.gguf")
    vocabulary, back = load_vocabulary(source), load_vocabulary(resolve_model(file))
    assert same_vocabulary(vocabulary, back) == []
    assert back.adds_bos
    for text in (*SENTENCES, TEXT, "<s>[INST] x [/INST]</s>", "  two"):
        assert back.encode(text) == vocabulary.encode(text)
    metadata, _ = read(file)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


def test_the_vocabulary_of_mistral_has_the_scores_that_mistral_gave_it(tmp_path: Path):
    original = mistral_vocabulary()
    source = tiny_model(tmp_path / "model", vocab_size=32_000, num_hidden_layers=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    shutil.copyfile(original, source / "tokenizer.model")
    metadata, _ = read(to_gguf(source, tmp_path / "tiny.gguf"))
    pieces = read_sentencepiece(original)
    given = dict(zip(pieces.texts, pieces.scores, strict=True))
    found = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    # Pieces that merges join; of the others a score says nothing.
    merged = [piece for piece in given if len(piece) > 1 and not piece.startswith("<")]
    order = sorted(merged, key=lambda piece: -found[piece])
    scores = [given[piece] for piece in order]
    assert len(scores) > 28_000
    assert scores == sorted(scores, reverse=True)
    spaces = [found["\u2581" * length] for length in (*range(3, 15), 16)]
    assert len(set(spaces)) == 1


def test_runs_have_one_score_only_where_merges_of_the_same_character_mix():
    mixed = [(" ", " "), (" ", "   "), ("-", "-"), ("  ", " "), ("  ", "  "), ("--", "--")]
    assert _tied_runs(mixed) == {"   ": "    "}
    apart = [(" ", " "), ("  ", " "), (" ", "  "), ("  ", "  "), ("-", "-"), ("--", "-")]
    assert _tied_runs(apart) == {}


@pytest.mark.parametrize("template", [made.MISTRAL_V1, None])
def test_a_space_before_the_first_text_alone_is_left_out_of_conversations(
    template: str | None, tmp_path: Path, caplog: Any
):
    source = sentencepiece_model(tmp_path / "model", template=template, legacy=False)
    with caplog.at_level(logging.WARNING):
        metadata, _ = read(to_gguf(source, tmp_path / "tiny.gguf"))
    assert "puts a space before the first text only" in caplog.text
    assert metadata["tokenizer.ggml.add_space_prefix"] is (template is None)


def test_rows_without_a_token_are_unused_ones(tmp_path: Path):
    source = tiny_model(tmp_path / "model", vocab_size=400)
    metadata, _ = read(to_gguf(source, tmp_path / "tiny.gguf"))
    tokens = len(read_json(source / "tokenizer.json")["model"]["vocab"])
    assert metadata["tokenizer.ggml.tokens"][tokens:] == [f"[PAD{t}]" for t in range(tokens, 400)]
    assert set(metadata["tokenizer.ggml.token_type"][tokens:]) == {5}


def change_tokenizer(source: Path, target: Path, **entries: Any) -> Path:
    shutil.copytree(source, target)
    definition = read_json(target / "tokenizer.json")
    model = entries.pop("model", {})
    definition = {**definition, **entries, "model": {**definition["model"], **model}}
    (target / "tokenizer.json").write_text(json.dumps(definition))
    return target


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_the_way_to_cut_words_is_found_by_what_it_does(name: str, model: Path, tmp_path: Path):
    from tokenizers import Tokenizer

    from mistill.sources.tokenizer_parts import word_cutter

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.pre_tokenizer = word_cutter(name, "a test")
    cutter = json.loads(tokenizer.to_str())["pre_tokenizer"]
    words_first = {"ignore_merges": name in ("llama-bpe", "tekken")}
    source = change_tokenizer(model, tmp_path / "m", pre_tokenizer=cutter, model=words_first)
    metadata, _ = read(to_gguf(source, tmp_path / "tiny.gguf"))
    assert metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "in a way that mistill knows no name of in llama.cpp",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text (Lowercase)"),
        ({"model": {"ignore_merges": True}}, "in a way that mistill knows no name of in llama.cpp"),
        ({"model": {"merges": []}}, "has no merges, and llama.cpp opens no such vocabulary"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    change: dict[str, Any], message: str, model: Path, tmp_path: Path
):
    source = change_tokenizer(model, tmp_path / "changed", **change)
    with pytest.raises(VocabularyError, match=re.escape(message)):
        to_gguf(source, tmp_path / "tiny.gguf")
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*gguf*")) == []


@pytest.mark.parametrize("flag", ["rstrip", "lstrip", "single_word", None])
def test_tokens_that_a_tokenizer_finds_in_another_way_are_named(
    flag: str | None, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    added = read_json(model / "tokenizer.json")["added_tokens"]
    if flag is not None:
        added = [{**entry, flag: entry["content"].startswith("<|")} for entry in added]
    to_gguf(change_tokenizer(model, tmp_path / "m", added_tokens=added), tmp_path / "tiny.gguf")
    named = "which llama.cpp does not do" in caplog.text
    assert named == (flag is not None)
    assert ("<|im_start|>, <|im_end|>" in caplog.text) == named
    assert "<unk>" not in caplog.text


def test_merges_that_no_scores_give_are_refused(tmp_path: Path):
    source = sentencepiece_model(tmp_path / "model")
    definition = read_json(source / "tokenizer.json")
    merges = definition["model"]["merges"]
    for name, changed in (("short", merges[1:]), ("mixed", [*merges[60:], *merges[:60]])):
        target = change_tokenizer(source, tmp_path / name, model={"merges": changed})
        if name == "short":
            with pytest.raises(VocabularyError, match="that no SentencePiece scores express"):
                to_gguf(target, tmp_path / "tiny.gguf")
        else:  # another order has scores of its own
            back = load_vocabulary(resolve_model(to_gguf(target, tmp_path / "tiny.gguf")))
            assert back.encode(TEXT) == load_vocabulary(target).encode(TEXT)


# --- what is refused ----------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(model: Path, tmp_path: Path):
    target = tmp_path / "tiny.gguf"
    first = to_gguf(model, target).read_bytes()
    with pytest.raises(TargetExistsError):
        to_gguf(model, target)
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = dict(load_file(broken / "model.safetensors"))
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match="not a number"):
        to_gguf(broken, target, overwrite=True)
    assert target.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir() if "gguf" in file.name] == ["tiny.gguf"]
    to_gguf(model, target, overwrite=True, dtype="q8_0")
    assert len(target.read_bytes()) < len(first)
    with pytest.raises(FolderError, match="is a folder; give the name of the file"):
        to_gguf(model, tmp_path)


def test_a_weight_that_float16_cannot_hold_is_refused(model: Path, tmp_path: Path):
    source = shutil.copytree(model, tmp_path / "large")
    tensors = dict(load_file(source / "model.safetensors"))
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="too large for float16"):
        to_gguf(source, tmp_path / "tiny.gguf")


def test_nonsense_is_refused():
    with pytest.raises(SettingsError, match="dtype must be float32, float16, q8_0, q4_1 or q4_0"):
        GgufSettings(dtype="q5_k")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="table_dtype must be"):
        GgufSettings(table_dtype="int8")  # type: ignore[arg-type]


def test_the_command_makes_a_file(model: Path, tmp_path: Path, capsys: Any):
    from mistill.cli.app import main

    file = tmp_path / "tiny.gguf"
    assert main(["gguf", str(model), str(file), "--dtype", "q8_0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {
        "path": str(file),
        "form": "gguf",
        "dtype": "q8_0",
        "bytes": file.stat().st_size,
    }


# --- llama.cpp itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perplexity_program() -> Path:
    """llama.cpp's own, where MISTILL_LLAMA_CPP names the folder of its programs."""
    folder = os.environ.get("MISTILL_LLAMA_CPP")
    if not folder:
        pytest.skip("MISTILL_LLAMA_CPP names no folder with llama-perplexity")
    return Path(folder) / "llama-perplexity"


def differences(program: Path, source: Path, file: Path, folder: Path) -> Any:
    """Where llama.cpp's tokens differ, and by how much its predictions do within 14 nats."""
    text = TEXT * 3
    tokens, theirs = log_probabilities(program, file, text, folder, 64)
    vocabulary = load_vocabulary(source)
    expected = vocabulary.encode(text)
    if vocabulary.adds_bos and vocabulary.bos_id is not None:
        expected = [vocabulary.bos_id, *expected]
    assert tokens.reshape(-1).tolist() == expected[: tokens.size]
    rows = tokens[:1].astype(np.int64)
    ours = open_model(source).logits(rows)[0, 32:63].astype(np.float64)
    ours -= np.logaddexp.reduce(ours, axis=-1, keepdims=True)
    near = ours > ours.max(-1, keepdims=True) - 14
    return np.abs(ours - theirs[0])[near].max()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "llama", "rope_parameters": LLAMA3},
        {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "window", "llama3", "linear", "biases"],
)
def test_llama_cpp_predicts_what_the_source_does(
    options: dict[str, Any], perplexity_program: Path, tmp_path: Path
):
    source = tiny_model(tmp_path / "model", **options)
    file = to_gguf(source, tmp_path / "tiny.gguf", dtype="float32")
    # It writes predictions in steps of 16 / 65535 nats, and computes exp in its own way.
    assert differences(perplexity_program, source, file, tmp_path) < 1e-3


def test_llama_cpp_speaks_sentencepiece_as_the_source_does(
    perplexity_program: Path, tmp_path: Path
):
    source = sentencepiece_model(tmp_path / "model")
    file = to_gguf(source, tmp_path / "tiny.gguf", dtype="float32")
    assert differences(perplexity_program, source, file, tmp_path) < 1e-3


def test_llama_cpp_runs_the_codes_of_a_gptq_folder(perplexity_program: Path, tmp_path: Path):
    source = tiny_model(tmp_path / "model", seed=3, hidden_size=128, intermediate_size=256)
    codes, _ = gptq_folder(source, tmp_path / "gptq", group_size=64)
    file = to_gguf(codes, tmp_path / "tiny.gguf", dtype="q4_0", table_dtype="float32")
    # llama.cpp rounds activations to 8 bits for such products; the codes are the same.
    assert differences(perplexity_program, codes, file, tmp_path) < 0.6
    rounded = to_gguf(source, tmp_path / "rounded.gguf", dtype="q4_0", table_dtype="float32")
    assert differences(perplexity_program, codes, rounded, tmp_path) > 0.6
