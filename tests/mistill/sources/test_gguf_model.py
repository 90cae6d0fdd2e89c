"""GGUF files of strangers: read as llama.cpp reads them, or refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mistill.errors import FolderError, MistillError
from mistill.folders.folder import read_json
from mistill.sources.gguf_rope import llama3_parameters
from mistill.sources.source import resolve_model
from mistill.text.vocabulary import load_vocabulary
from tests.mistill import made
from tests.tiny import tiny_model

IDS = np.random.default_rng(0).integers(5, 380, (1, 60))
ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return tiny_model(folder, model_type="llama", head_dim=16, rope_parameters=ROPE)


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


def refused(file: Path, tmp_path: Path) -> str:
    """The message of a refusal, after which nothing is in the cache."""
    with pytest.raises(MistillError) as error:
        resolve_model(file)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("mistill/gguf/*"))
    return str(error.value)


# --- rotary embedding ---------------------------------------------------------------------------

FACTOR = "llama.rope.scaling.factor"
TYPE = "llama.rope.scaling.type"
OLD = "llama.rope.scale_linear"


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({OLD: 4.0}, 4.0),
        ({FACTOR: 4.0}, 4.0),
        ({FACTOR: 4.0, TYPE: "linear"}, 4.0),
        ({FACTOR: 2.0, OLD: 4.0}, 2.0),
        ({FACTOR: 0.0}, 1.0),
        ({FACTOR: 0.0, OLD: 4.0}, 1.0),
        ({OLD: 0.0}, 1.0),
        ({FACTOR: 4.0, TYPE: "none"}, 1.0),
        ({OLD: 4.0, TYPE: "none"}, 1.0),
        ({TYPE: "linear"}, 1.0),
        ({FACTOR: 1.0}, 1.0),
    ],
    ids=str,
)
def test_linear_positions_are_scaled_as_llama_cpp_scales_them(
    fields: dict[str, Any], factor: float, llama: Path, tmp_path: Path
):
    folder = resolve_model(made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields))
    expected: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
    if factor != 1:
        expected |= {"rope_type": "linear", "factor": factor}
    assert read_json(folder / "config.json")["rope_parameters"] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {TYPE: "yarn", FACTOR: 4.0},
        {TYPE: "longrope"},
        {TYPE: "from the future"},
        {FACTOR: 4.0, "llama.rope.scaling.attn_factor": 0.5},
    ],
    ids=str,
)
def test_other_ways_to_scale_positions_are_refused(
    fields: dict[str, Any], llama: Path, tmp_path: Path
):
    file = made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields)
    assert "scales its rotary embedding in the way" in refused(file, tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "positions": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "positions": 64},
        {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "positions": 300},
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0, "positions": 4096},
    ],
    ids=str,
)
def test_a_bare_tensor_of_factors_is_the_scaling_that_made_it(
    rope: dict[str, float], tmp_path: Path
):
    positions = int(rope["positions"])
    parameters = {name: value for name, value in rope.items() if name != "positions"}
    source = tiny_model(
        tmp_path / "source",
        model_type="llama",
        head_dim=32,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "original_max_position_embeddings": positions,
            **parameters,
        },
    )
    frequencies = 5000.0 ** (-np.arange(0, 32, 2) / 32)
    factors = np.array([_llama_cpp_factor(f, positions, **parameters) for f in frequencies])
    file = made.write_gguf(
        tmp_path / "m.gguf", source, more={"rope_freqs.weight": factors.astype(np.float32)}
    )
    folder = resolve_model(file)
    assert read_json(folder / "config.json")["rope_parameters"]["rope_type"] == "llama3"
    np.testing.assert_allclose(logits(folder), logits(source), atol=1e-4)


def _llama_cpp_factor(
    frequency: float,
    positions: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
) -> float:
    """The factor that llama.cpp's converter writes, by its own rule of wavelengths."""
    wavelength = 2 * np.pi / frequency
    if wavelength < positions / high_freq_factor:
        return 1.0
    if wavelength > positions / low_freq_factor:
        return factor
    smooth = (positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return float(1 / ((1 - smooth) / factor + smooth))


def test_equal_factors_are_linear_scaling_and_others_are_refused(llama: Path, tmp_path: Path):
    def file(name: str, factors: list[float], **fields: Any) -> Path:
        tensor = np.array(factors, np.float32)
        return made.write_gguf(
            tmp_path / name, llama, metadata=fields, more={"rope_freqs.weight": tensor}
        )

    def rope(path: Path) -> dict[str, Any]:
        return dict(read_json(resolve_model(path) / "config.json")["rope_parameters"])

    assert rope(file("ones.gguf", [1.0] * 8)) == ROPE
    doubled = rope(file("both.gguf", [2.0] * 8, **{FACTOR: 2.0}))
    assert doubled == {**ROPE, "rope_type": "linear", "factor": 4.0}
    for factors, words in (
        ([1.0, 3, 1, 3, 1, 3, 1, 3], "no parameters of config.json give"),
        ([0.5] * 4 + [1.0] * 4, "no parameters of config.json give"),
        ([1.0] * 7, "should hold 8 numbers"),
        ([0.0] * 8, "a factor that is not above 0"),
        ([float("nan")] * 8, "a factor that is not above 0"),
    ):
        with pytest.raises(MistillError, match=words):
            resolve_model(file("other.gguf", factors))


def test_factors_of_no_scaling_have_no_parameters():
    frequencies = 1e4 ** (-np.arange(8) / 8)
    assert llama3_parameters(np.linspace(8.0, 1.0, 8), frequencies) is None


# --- several files ------------------------------------------------------------------------------


def pieces(llama: Path, place: Path, count: int = 3, **changes: Any) -> list[Path]:
    """A model in several files, as llama.cpp's gguf-split leaves it."""
    import gguf

    whole = gguf.GGUFReader(made.write_gguf(place / "whole.gguf", llama))
    names = [tensor.name for tensor in whole.tensors]
    share = -(-len(names) // count)
    files = []
    for number in range(count):
        file = place / f"m-{number + 1:05}-of-{count:05}.gguf"
        here = names[number * share : (number + 1) * share]
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        split |= changes.get(f"piece_{number}", {})
        if number == 0:
            absent = [name for name in names if name not in here]
            made.write_gguf(file, llama, metadata=split, without=absent)
        else:
            writer = gguf.GGUFWriter(file, "llama")
            for key, value in split.items():
                writer.add_uint16(key, value)
            for tensor in whole.tensors:
                if tensor.name in here:
                    writer.add_tensor(tensor.name, np.array(tensor.data))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        files.append(file)
    return files


def test_the_first_of_several_files_is_the_whole_model(llama: Path, tmp_path: Path):
    first, *_ = pieces(llama, tmp_path)
    folder = resolve_model(first)
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    np.testing.assert_array_equal(logits(folder), logits(llama))
    # Another last piece is another model.
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(FolderError, match="piece 1 of the 3"):
        resolve_model(first)


@pytest.mark.parametrize("piece", [1, 2])
def test_a_later_piece_is_refused_as_such(piece: int, llama: Path, tmp_path: Path):
    files = pieces(llama, tmp_path)
    message = refused(files[piece], tmp_path)
    assert f"is piece {piece + 1} of the 3 of a model; give the first piece" in message
    assert "llama-gguf-split --merge" in message


def test_pieces_that_do_not_belong_together_are_refused(llama: Path, tmp_path: Path):
    first, second, third = pieces(llama, tmp_path)
    renamed = second.rename(tmp_path / "elsewhere.gguf")
    assert "piece 1 of the 3" in refused(first, tmp_path)
    renamed.rename(second)
    kept = third.read_bytes()
    third.write_bytes(second.read_bytes())
    assert "does not say that it is piece 3 of 3" in refused(first, tmp_path)
    third.write_bytes(kept)
    other_name = first.rename(tmp_path / "model.gguf")
    assert "is piece 1 of the 3" in refused(other_name, tmp_path)


def test_pieces_with_too_few_tensors_are_refused(llama: Path, tmp_path: Path):
    first, *_ = pieces(llama, tmp_path, piece_0={"split.tensors.count": 99})
    assert "21 tensors, not the 99" in refused(first, tmp_path)


# --- tensors and fields -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "more", "words"),
    [
        (("blk.1.ffn_up.weight",), {}, "lacks the tensor blk.1.ffn_up.weight"),
        (("token_embd.weight",), {}, "lacks the tensor token_embd.weight"),
        ((), {"blk.2.ffn_up.weight": np.ones((2, 2), np.float32)}, "does not have: blk.2.ffn_up"),
        (
            ("blk.1.ffn_up.weight",),
            {"blk.1.ffn_up.weight": np.ones((64, 128), np.float32)},
            "has the shape (64, 128), and its fields describe (128, 64)",
        ),
        (
            ("output_norm.weight",),
            {"output_norm.weight": np.full(64, np.inf, np.float32)},
            "output_norm.weight of m.gguf holds a value that is infinite or not a number",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    absent: tuple[str, ...], more: dict[str, Any], words: str, llama: Path, tmp_path: Path
):
    file = made.write_gguf(tmp_path / "m.gguf", llama, without=absent, more=more)
    assert words in refused(file, tmp_path)


def test_a_bias_that_llama_cpp_leaves_out_is_0(llama: Path, tmp_path: Path):
    bias = np.arange(64, dtype=np.float32)
    file = made.write_gguf(tmp_path / "m.gguf", llama, more={"blk.0.attn_q.bias": bias})
    folder = resolve_model(file)
    assert read_json(folder / "config.json")["attention_bias"] is True
    tensors = load_file(folder / "model.safetensors")
    assert not tensors["model.layers.1.self_attn.o_proj.bias"].any()
    assert sorted(tensors["model.layers.0.self_attn.q_proj.bias"]) == sorted(bias)
    logits(folder)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"llama.attention.head_count": 0}, "at least 1, not 0"),
    "heads that share nothing": ({"llama.attention.head_count": 5}, "which no llama model has"),
    "heads per layer": ({"llama.attention.head_count": [4, 4]}, "not [4, 4]"),
    "no keys": ({"llama.attention.head_count_kv": 0}, "head_count_kv of m.gguf should be"),
    "a width of text": ({"llama.embedding_length": "64"}, "not '64'"),
    "another width": ({"llama.embedding_length": 32}, "its fields describe (384, 32)"),
    "billions of layers": ({"llama.block_count": 2**32 - 1}, "and the file holds 21 tensors"),
    "fewer layers": ({"llama.block_count": 1}, "a llama model does not have: blk.1"),
    "an epsilon of text": ({"llama.attention.layer_norm_rms_epsilon": "x"}, "a number, not 'x'"),
    "an infinite epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": float("inf")},
        "a number, not inf",
    ),
    "a base of text": ({"llama.rope.freq_base": "x"}, "freq_base of m.gguf should be a number"),
    "a base of 0": ({"llama.rope.freq_base": 0.0}, "freq_base of m.gguf is 0"),
    "a rope that is none": ({"mistill.rope_parameters": "[]"}, "does not describe a rotary"),
    "a rope of text": (
        {"mistill.rope_parameters": '{"rope_type": "linear", "factor": "x"}'},
        "factor 'x', which is not a number",
    ),
    "a rope of brackets": ({"mistill.rope_parameters": "[" * 100_000}, "nested too deeply"),
    "tokens of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "a list of texts, not [1, 2]"),
    "equal tokens": ({"tokenizer.ggml.tokens": ["a"] * 384}, "have the same text"),
    "few tokens": ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "fields describe (3, 64)"),
    "few types": ({"tokenizer.ggml.token_type": [1, 1]}, "2 token types for 384 tokens"),
    "another type": ({"tokenizer.ggml.token_type": [77] * 384}, "77 is not a valid TokenType"),
    "an unknown merge": ({"tokenizer.ggml.merges": ["zzz qqq"]}, "describe its vocabulary"),
    "half a merge": ({"tokenizer.ggml.merges": ["zzz"]}, "describe its vocabulary"),
    "an end of text": ({"tokenizer.ggml.eos_token_id": "x"}, "number of a token, not 'x'"),
    "an end that is none": ({"tokenizer.ggml.eos_token_id": 2**32 - 1}, "or no token"),
    "a template that is a number": ({"tokenizer.chat_template": 3}, "should be text, not 3"),
    "a flag of text": ({"tokenizer.ggml.add_bos_token": "yes"}, "true or false, not 'yes'"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_lies_is_named(case: str, llama: Path, tmp_path: Path):
    fields, words = FIELDS[case]
    file = made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields)
    assert words in refused(file, tmp_path)


@pytest.mark.parametrize("key", ["bos", "padding", "unknown"])
def test_a_name_for_a_token_that_is_none_names_none(key: str, llama: Path, tmp_path: Path):
    fields = {f"tokenizer.ggml.{key}_token_id": 2**32 - 1}
    folder = resolve_model(made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields))
    ours = {"bos": "bos_token", "padding": "pad_token", "unknown": "unk_token"}[key]
    assert ours not in read_json(folder / "tokenizer_config.json")


@pytest.mark.parametrize("count", [10**9, 2**62])
@pytest.mark.parametrize("inner", [0, 4, 8, 10])
def test_a_count_that_the_file_has_no_bytes_for_is_refused_at_once(
    inner: int, count: int, tmp_path: Path
):
    key = b"llama.block_count"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, inner, count)
    for counts in ((0, 1), (0, count), (count, 1)):
        file = tmp_path / "m.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + field)
        assert "is not a GGUF file, or is damaged" in refused(file, tmp_path)


# --- special tokens -----------------------------------------------------------------------------


def typed_normal(llama: Path, *contents: str) -> list[int]:
    """Types of all tokens, with those of some special tokens wrong."""
    definition = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    kinds = [1] * len(definition["model"]["vocab"])
    for entry in definition["added_tokens"]:
        kinds[entry["id"]] = 1 if entry["content"] in contents else 3
    return kinds


@pytest.mark.parametrize(
    "contents", [("<|im_end|>",), ("<|im_start|>",), ("<|im_start|>", "<|im_end|>", "</s>", "<s>")]
)
def test_marks_that_are_typed_as_normal_tokens_are_marks(
    contents: tuple[str, ...], llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fields = {"tokenizer.ggml.token_type": typed_normal(llama, *contents)}
    file = made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields)
    ours = load_vocabulary(resolve_model(file))
    theirs = load_vocabulary(llama)
    text = theirs.render([{"role": "user", "content": "rain"}], True) + "</s>"
    assert ours.encode(text) == theirs.encode(text)
    assert f"{contents[0]!r}" in caplog.text
    assert "read as special ones" in caplog.text


def test_a_word_that_is_named_as_padding_stays_a_word(llama: Path, tmp_path: Path):
    vocabulary = json.loads((llama / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    fields = {"tokenizer.ggml.padding_token_id": vocabulary["!"]}
    folder = resolve_model(made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields))
    ours, theirs = load_vocabulary(folder), load_vocabulary(llama)
    assert not ours.is_special(vocabulary["!"])
    assert ours.encode("Hey!!! No!") == theirs.encode("Hey!!! No!")


def test_without_types_the_names_and_the_template_tell(llama: Path, tmp_path: Path):
    fields = {"tokenizer.ggml.token_type": None}
    ours = load_vocabulary(
        resolve_model(made.write_gguf(tmp_path / "m.gguf", llama, metadata=fields))
    )
    text = ours.render([{"role": "user", "content": "rain"}], True)
    assert ours.encode(text) == load_vocabulary(llama).encode(text)
