"""Documents of a folder are held against their schemas, and named where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import to_onnx
from mistill.cli.app import main
from mistill.errors import FolderError
from mistill.folders.folder import open_folder, read_json
from mistill.folders.json_text import check
from mistill.folders.lineage import read_lineage
from mistill.folders.schemas import Config, OnnxManifest, is_plain_name

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def chatbot(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An ONNX folder; read only."""
    return to_onnx(model, tmp_path_factory.mktemp("chatbot") / "bot", parity_positions=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 2.0}, "num_hidden_layers in .* should be a whole number, not 2.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* of at most 100000, not 1000000000"),
        ({"vocab_size": -1}, "vocab_size in .* should be a whole number of at least 1, not -1"),
        ({"vocab_size": 10**30}, "vocab_size in .* of at most"),
        ({"hidden_size": True}, "hidden_size in .* should be a whole number, not True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in .* should be a number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps in .* should be a number, not 'x'"),
        ({"rope_parameters": [1]}, r"rope_parameters in .* should be an object, not \[1\]"),
        ({"rope_parameters": {"rope_theta": 0}}, r"rope_parameters\.rope_theta in .* above 0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "llama3 needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"sliding_window": 0}, "sliding_window in .* of at least 1, not 0"),
        ({"dtype": "float12"}, "dtype in .*float12"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id\[1\] in .* should be a whole number, not 'x'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"dtype": "\ud800"}, "half of a character, U[+]D800"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings in .* should be true or false"),
    ],
)
def test_a_value_of_a_config_that_no_model_has_is_named(model, tmp_path, capsys, changes, words):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FolderError, match=words):
        read_json(folder / "config.json")
    for command in (
        f"export {folder} {tmp_path / 'out'}",
        f"quantize rounding {folder} {tmp_path / 'out'} --group-size 32",
    ):
        assert main(command.split()) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["inspect", str(folder)]) == 1
    assert not (tmp_path / "out").exists()


def test_what_a_schema_does_not_name_may_hold_anything_and_null_is_what_is_missing():
    check({"vocab_size": 3, "mine": [{}], "sliding_window": None, "rope_scaling": None}, Config, "")


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("manifest.json", lambda v: v.update(parameters=0), "parameters"),
        ("manifest.json", lambda v: v.pop("parameters"), "lacks parameters"),
        ("manifest.json", lambda v: v.update(files=None), "files"),
        ("manifest.json", lambda v: v["files"].update(x=3), "should be an object"),
        ("manifest.json", lambda v: v["files"]["config.json"].pop("bytes"), "lacks bytes"),
        ("manifest.json", lambda v: v["files"].update({"a" * 999: {}}), "lacks bytes"),
        ("manifest.json", lambda v: v.update(parity={}), "parity in manifest.json lacks"),
        ("manifest.json", lambda v: v.update(tuning=3), "tuning"),
        ("genai_config.json", lambda v: v["model"].pop("context_length"), "lacks context_length"),
        ("genai_config.json", lambda v: v["model"].update(context_length=-1), "context_length"),
        ("genai_config.json", lambda v: v["model"].update(context_length=10**9), "can hold"),
        ("genai_config.json", lambda v: v.update(model=[1]), "model in genai_config.json"),
        ("config.json", lambda v: v.update(vocab_size=10**9), "more than the .* can hold"),
        ("config.json", lambda v: v.update(vocab_size=500), "manifest|vocab_size 500"),
        ("config.json", lambda v: v.update(num_hidden_layers=10**6), "of at most 100000"),
    ],
)
def test_a_chatbot_whose_small_files_lie_is_refused(
    chatbot: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    edit: Edit,
    words: str,
):
    bot = Path(shutil.copytree(chatbot, tmp_path / "bot"))
    value = json.loads((bot / file).read_text("utf-8"))
    edit(value)
    (bot / file).write_text(json.dumps(value))
    if file != "manifest.json":  # the manifest agrees with what was edited
        manifest = read_json(bot / "manifest.json")
        manifest["files"][file]["bytes"] = (bot / file).stat().st_size
        (bot / "manifest.json").write_text(json.dumps(manifest))
    assert main(["chat", str(bot)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert main(["inspect", str(bot)]) in (0, 1)
    with pytest.raises(FolderError, match=words):
        from mistill.engine.onnx_model import OnnxModel

        OnnxModel(bot)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "a" * 256])
def test_a_name_that_leads_elsewhere_is_no_file_of_a_folder(name):
    assert not is_plain_name(name)
    with pytest.raises(FolderError, match="no file of the folder"):
        check(
            {"parameters": 1, "files": {f"{name}/..": {"bytes": 1, "sha256": ""}}}, OnnxManifest, ""
        )


def test_an_index_that_names_files_elsewhere_is_refused(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match="weight_map should name a file of the folder"):
        open_folder(folder)


@pytest.mark.parametrize("entry", [1, {"settings": [1]}, {"step": "x", "settings": [1]}])
def test_a_lineage_of_other_types_is_refused(tmp_path, entry):
    (tmp_path / "lineage.json").write_text(json.dumps([entry]))
    with pytest.raises(FolderError, match=r"lineage\.json"):
        read_lineage(tmp_path)


def test_more_layers_than_the_weights_have_tensors_are_refused_before_any_is_made(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = read_json(folder / "config.json") | {"num_hidden_layers": 99_999}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="num_hidden_layers is 99999, more than the 21 tensors"):
        open_folder(folder)


def test_half_a_character_in_a_document_is_refused_and_a_whole_one_is_read(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"mine": "\\ud83d\\ude00"}')
    assert read_json(file) == {"mine": "\U0001f600"}
    file.write_text('{"mine": ["\\ud83d"]}')
    with pytest.raises(FolderError, match=r"half of a character, U\+D83D"):
        read_json(file)


def test_an_option_that_holds_half_of_a_character_is_refused_in_one_line():
    from distill.settings import TargetSettings
    from mistill.errors import SettingsError
    from mistill.settings import typed_options

    with pytest.raises(SettingsError, match="method holds half of a character, in"):
        typed_options(TargetSettings, {"method": "\ud800"})
