from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import save_file

from mistill.errors import MissingExtraError, SettingsError
from mistill.folders.lineage import read_lineage
from mistill.weights.gptq_layout import GptqFormat
from quantize import GptqSettings, to_gptq
from quantize.folders.backends import gptqmodel_config

OPTIONS: dict[str, Any] = {"group_size": 32, "samples": 4, "block_length": 32}


class FakeQuantizer:
    """Takes what gptqmodel takes, and writes a folder without any model."""

    seen: ClassVar[dict[str, Any]] = {}

    @classmethod
    def load(cls, folder: str, config: dict[str, Any], device: str) -> FakeQuantizer:
        cls.seen |= {"folder": folder, "config": config, "device": device}
        return cls()

    def quantize(
        self, calibration: list[dict[str, list[int]]], batch_size: int, calibration_sort: None
    ) -> dict[str, list[dict[str, str]]]:
        self.seen["calibration"] = calibration
        Path("logs").mkdir()  # as gptqmodel does, wherever it is
        entry = {
            "layer": "0",
            "module": "mlp.down_proj",
            "loss": "0.5",
            "damp": "0.05",
            "time": "2",
        }
        return {"gptq": [entry]}

    def save(self, folder: str) -> None:
        import torch

        save_file({"model.norm.weight": torch.ones(64)}, Path(folder) / "model.safetensors")
        source = json.loads((Path(self.seen["folder"]) / "config.json").read_text())
        source["quantization_config"] = GptqFormat(bits=4, group_size=32).to_config()
        (Path(folder) / "config.json").write_text(json.dumps(source))


def fake_gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = types.ModuleType("gptqmodel")
    library.__version__ = "7.6.0"
    library.GPTQModel = FakeQuantizer
    library.QuantizeConfig = lambda **config: config
    monkeypatch.setitem(sys.modules, "gptqmodel", library)


def test_gptqmodel_gets_our_text_and_settings_in_its_words(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gptqmodel(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    made = to_gptq(
        model,
        tmp_path / "small",
        texts=chats,
        backend="gptqmodel",
        overrides=(".*down_proj: bits=8", ".*up_proj: keep"),
        **OPTIONS,
    )
    import os

    assert os.environ.pop("GPTQMODEL_CPU_WORKERS") == "2"
    seen = FakeQuantizer.seen
    assert seen["folder"] == str(model)
    assert seen["config"] == {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "static_groups": True,
        "act_group_aware": False,
        "damp_percent": 0.01,
        "mse": 2.4,
        "format": "gptq",
        "dynamic": {
            "+:.*down_proj": {"bits": 8, "group_size": 32, "sym": True},
            "-:.*up_proj": {},
        },
    }
    assert len(seen["calibration"]) == 4
    for block in seen["calibration"]:
        assert len(block["input_ids"]) == 32
        assert block["attention_mask"] == [1] * 32
    step = read_lineage(made)[-1]
    assert (step["step"], step["backend"]) == ("gptq", "gptqmodel 7.6.0")
    assert step["backend_settings"] == seen["config"]
    assert step["calibration"] == {"blocks": 4, "block_length": 32, "tokens": 128}
    report = json.loads((made / "quantize_report.json").read_text())
    (matrix,) = report["modules"]
    assert matrix["name"] == "model.layers.0.mlp.down_proj"
    assert (matrix["loss"], matrix["damping"], matrix["seconds"]) == (0.5, 0.05, 2.0)
    assert (matrix["bits"], matrix["group_size"]) == (8, 32)
    assert (made / "tokenizer.json").is_file()
    assert Path.cwd() == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]
    assert not (made / "logs").exists()


@pytest.mark.parametrize(
    ("order", "switches"),
    [
        ("none", (False, False, False)),
        ("group", (False, False, True)),
        ("dynamic", (True, False, False)),
        ("static", (True, True, False)),
    ],
)
def test_each_order_has_its_three_switches(order: Any, switches: tuple[bool, ...]) -> None:
    config = gptqmodel_config(GptqSettings(order=order, symmetric=False, scale_search=1))
    names = ("desc_act", "static_groups", "act_group_aware")
    assert tuple(config[name] for name in names) == switches
    assert (config["format"], config["mse"]) == ("gptq_v2", 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_type": "bfloat16"}, "no scale_type other than 'float16', got 'bfloat16'"),
        ({"head_bits": 8}, "no head_bits other than None, got 8"),
        ({"embedding_bits": 8}, "no embedding_bits"),
        ({"true_sequential": False}, "no true_sequential"),
        ({"method": "gptaq"}, "no method other than 'gptq'"),
        ({"model_file_base_name": "a"}, "no model_file_base_name"),
    ],
)
def test_what_gptqmodel_cannot_do_is_refused_by_name(
    options: dict[str, Any],
    said: str,
    model: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gptqmodel(monkeypatch)
    with pytest.raises(SettingsError, match=said):
        to_gptq(model, tmp_path / "small", texts=chats, backend="gptqmodel", **OPTIONS, **options)


def break_import(monkeypatch: pytest.MonkeyPatch, library: str, error: ImportError) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == library:
                raise error

    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize(
    ("backend", "error", "said"),
    [
        (
            "gptqmodel",
            ModuleNotFoundError("No module named 'gptqmodel'", name="gptqmodel"),
            "gptqmodel is not installed; with torch 2.13 and a C compiler: pip install",
        ),
        (
            "gptqmodel",
            ModuleNotFoundError("No module named 'requests'", name="requests"),
            "installed but cannot be imported: No module named 'requests'",
        ),
        (
            "auto_gptq",
            ModuleNotFoundError("No module named 'auto_gptq'", name="auto_gptq"),
            "auto_gptq is not installed, and installing it would not help.*no_init_weights",
        ),
        (
            "auto_gptq",
            ImportError(
                "cannot import name 'no_init_weights' from 'transformers.modeling_utils'",
                name="transformers.modeling_utils",
            ),
            "cannot be imported with transformers 5.*cannot import name 'no_init_weights'",
        ),
    ],
)
def test_a_library_that_cannot_be_imported_says_why_and_what_to_do(
    backend: Any,
    error: ImportError,
    said: str,
    model: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_import(monkeypatch, backend, error)
    with pytest.raises(MissingExtraError, match=said) as refused:
        to_gptq(model, tmp_path / "small", texts=chats, backend=backend, **OPTIONS)
    assert "leave backend out" in str(refused.value).lower()
    assert list(tmp_path.iterdir()) == []


def test_an_importable_auto_gptq_is_not_called_either(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "auto_gptq", types.ModuleType("auto_gptq"))
    with pytest.raises(SettingsError, match="is archived and mistill does not call it"):
        to_gptq(model, tmp_path / "small", texts=chats, backend="auto_gptq", **OPTIONS)


def test_a_backend_of_another_name_is_refused(model: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="backend must be one of mistill, gptqmodel, auto_gptq"):
        to_gptq(model, tmp_path / "small", texts=chats, backend="awq", **OPTIONS)  # type: ignore[arg-type]
