from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder, read_json, weight_files
from mistill.pytorch.loading import load_pytorch
from quantize import GptqSettings, gptq_settings, to_gptq

# As AutoGPTQ 0.7.1 writes it.
AUTO_GPTQ = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.05,
    "desc_act": True,
    "static_groups": True,
    "sym": False,
    "true_sequential": False,
    "model_name_or_path": "some/model",
    "model_file_base_name": "gptq_model-4bit-32g",
    "quant_method": "gptq",
    "checkpoint_format": "gptq_v2",
}
SMALL: dict[str, Any] = {"samples": 4, "block_length": 32}


def test_every_setting_of_autogptq_is_understood(tmp_path: Path) -> None:
    expected = GptqSettings(
        bits=4,
        group_size=32,
        damp_percent=0.05,
        order="static",
        symmetric=False,
        true_sequential=False,
        model_file_base_name="gptq_model-4bit-32g",
    )
    assert gptq_settings(AUTO_GPTQ) == expected
    file = tmp_path / "quantize_config.json"
    file.write_text(json.dumps(AUTO_GPTQ))
    assert gptq_settings(file) == gptq_settings(tmp_path) == expected
    assert gptq_settings(file, bits=8, samples=5).samples == 5
    file.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AUTO_GPTQ}))
    assert gptq_settings(tmp_path) == expected


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"desc_act": True}, {"order": "dynamic"}),
        ({"desc_act": True, "static_groups": False}, {"order": "dynamic"}),
        ({"desc_act": True, "static_groups": True}, {"order": "static"}),
        ({"static_groups": True}, {"order": "static"}),
        ({"desc_act": False}, {"order": "none"}),
        ({"desc_act": False, "act_group_aware": True}, {"order": "group"}),
        ({"act_group_aware": True}, {"order": "group"}),
        ({"act_group_aware": False}, {"order": "none"}),
        ({"sym": False}, {"symmetric": False}),
        ({"sym": True}, {"symmetric": True}),
        ({"mse": 0.0}, {"scale_search": 1}),
        ({"mse": 2.4}, {"scale_search": GptqSettings().scale_search}),
        ({"lm_head": True, "bits": 8}, {"head_bits": 8, "bits": 8}),
        ({"lm_head": False, "is_marlin_format": False, "pack_dtype": "int32"}, {}),
        (
            {
                "dynamic": {"-:.*down_proj": {}, "+:.*up": {"bits": 8, "sym": False}},
                "format": "gptq_v2",
            },
            {"overrides": (".*down_proj: keep", ".*up: bits=8, symmetric=false")},
        ),
        (
            {"lm_head": True, "dynamic": {r"+:lm_head$": {"bits": 8}}},
            {"head_bits": 8},
        ),
    ],
)
def test_each_name_has_one_meaning(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert gptq_settings(theirs) == GptqSettings(**ours)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sym": True, "symmetric": True}, "give either symmetric or sym, not both"),
        ({"desc_act": True, "order": "none"}, "give either order or desc_act"),
        ({"mse": 2.4, "scale_search": 3}, "give either scale_search or mse"),
        ({"lm_head": True, "head_bits": 8}, "give either head_bits or lm_head"),
        ({"desc_act": True, "act_group_aware": True}, "act_group_aware sorts whole groups"),
        ({"desc_act": False, "static_groups": True}, "static_groups needs columns that are sorted"),
        ({"sym": "yes"}, "sym must be true or false, got 'yes'"),
        ({"damp_auto_increment": 0.01}, "no option damp_auto_increment"),
        ({"descact": True}, "no option descact"),
        ({"quant_method": "awq"}, "quant_method must be gptq"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"pack_dtype": "int64"}, "'int64'"),
        ({"checkpoint_format": "gptq_v2"}, "symmetric codes are written as gptq, got"),
        ({"checkpoint_format": "gptq", "sym": False}, "asymmetric codes are written as gptq_v2"),
        ({"dynamic": {"+:.*up": {"adapter": 1}}}, "may set bits, group_size and sym"),
        ({"dynamic": {"+:.*up": {}}}, "may set bits, group_size and sym"),
        ({"dynamic": ["up"]}, "dynamic must be a dictionary"),
        ({"model_file_base_name": "a/b"}, "plain file name"),
        ({"model_file_base_name": ""}, "plain file name"),
    ],
)
def test_what_contradicts_or_has_no_counterpart_is_refused_by_name(
    options: dict[str, Any], said: str, model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        gptq_settings(options)
    with pytest.raises(SettingsError, match=said):
        to_gptq(model, tmp_path / "small", texts=chats, group_size=32, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_such_a_config_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"neither a quantize_config\.json nor"):
        gptq_settings(model)
    with pytest.raises(FolderError, match="missing"):
        gptq_settings(tmp_path / "nothing.json")


def test_to_gptq_takes_these_names_and_its_folder_gives_them_back(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    made = to_gptq(
        model,
        tmp_path / "small",
        texts=chats,
        bits=8,
        group_size=32,
        sym=True,
        desc_act=True,
        static_groups=True,
        **SMALL,
    )
    again = gptq_settings(made, **SMALL)
    assert again == GptqSettings(bits=8, group_size=32, order="static", **SMALL)
    second = to_gptq(model, tmp_path / "second", texts=chats, settings=again)
    files = (folder / "model.safetensors" for folder in (made, second))
    assert len({file.read_bytes() for file in files}) == 1


def test_the_name_of_the_weights_is_honoured(model: Path, chats: Path, tmp_path: Path) -> None:
    name = "gptq_model-4bit-32g"
    options = {"group_size": 32, **SMALL}
    made = to_gptq(model, tmp_path / "named", texts=chats, model_file_base_name=name, **options)
    plain = to_gptq(model, tmp_path / "plain", texts=chats, **options)
    assert [file.name for file in weight_files(made)] == [f"{name}.safetensors"]
    assert weight_files(made)[0].read_bytes() == weight_files(plain)[0].read_bytes()
    said = read_json(made / "quantize_config.json")
    assert (said["model_file_base_name"], said["bits"]) == (name, 4)
    assert open_folder(made).parameters == open_folder(plain).parameters
    load_pytorch(made)
