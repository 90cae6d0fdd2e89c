"""Keys and values in 8 bits: a quarter of the memory, and nearly the same predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export import to_onnx
from export.checks.parity import text_runner
from export.settings import OnnxSettings
from export.weights.architecture import read_architecture
from mistill.engine.onnx_model import OnnxModel
from mistill.errors import ExportError, SettingsError
from mistill.folders.folder import read_json
from tests.tiny import tiny_model

IDS = np.random.default_rng(5).integers(5, 384, 90)


def runner_of(folder: Path) -> Any:
    return text_runner(folder, read_architecture(read_json(folder / "config.json")))


@pytest.fixture(scope="module")
def folders(
    model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same float weights with both caches; read only."""
    folder = tmp_path_factory.mktemp("caches")
    texts = (str(chats),)
    floats = to_onnx(model, folder / "float")
    return floats, to_onnx(model, folder / "int8", cache="int8", cache_texts=texts)


def test_a_position_takes_a_quarter(folders: tuple[Path, Path]) -> None:
    manifests = [read_json(folder / "manifest.json") for folder in folders]
    per_position = 2 * 2 * 2 * 16
    assert [one["cache_bytes_per_position"] for one in manifests] == [
        4 * per_position,
        per_position,
    ]
    assert "cache" not in manifests[0]
    cache = manifests[1]["cache"]
    assert cache["bytes_per_position"] == per_position
    assert cache["float_bytes_per_position"] == 4 * per_position
    assert 500 < cache["calibration_tokens"] <= 2048
    assert 0 < cache["kl_to_float"] < 1e-3
    assert manifests[1]["parity"]["mean_kl"] < 1e-3
    sizes = []
    for folder in folders:
        engine = OnnxModel(folder, threads=1)
        next(engine.stream(IDS.tolist()))
        sizes.append(engine._cache.size_bytes)
    assert sizes[0] == 4 * sizes[1]


def test_what_is_kept_is_the_float_cache_on_the_grid_of_its_channels(
    folders: tuple[Path, Path],
) -> None:
    _, floats = runner_of(folders[0])(IDS, None)
    _, bytes_ = runner_of(folders[1])(IDS, None)
    scales = ir.load(folders[1] / "model.onnx").graph.initializers
    for part in ("key", "value"):
        # The first layer sees the same input in both graphs.
        scale = scales[f"layers.0.{part}.scale"].const_value
        assert scale is not None
        steps = np.clip(np.rint(floats[f"0.{part}"] / scale.numpy()), -128, 127)
        assert bytes_[f"0.{part}"].dtype == np.int8
        # A number in the middle between two steps may go either way.
        apart = np.abs(bytes_[f"0.{part}"].astype(int) - steps)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01


def test_the_scale_of_a_key_holds_at_every_position(folders: tuple[Path, Path]) -> None:
    """A text far beyond the calibration's is not cut off because its positions are later."""
    _, cache = runner_of(folders[0])(np.full(500, 7), None)
    scales = ir.load(folders[1] / "model.onnx").graph.initializers
    scale = scales["layers.0.key.scale"].const_value
    assert scale is not None
    limits = 127 * scale.numpy()
    lengths = np.hypot(cache["0.key"][..., :8], cache["0.key"][..., 8:])
    np.testing.assert_allclose(lengths.std(axis=2), 0, atol=1e-4)  # one token, only rotated
    np.testing.assert_array_equal(limits[..., :8], limits[..., 8:])
    assert (np.abs(cache["0.key"]).max(axis=2) < 1.5 * limits[:, :, 0]).all()


def test_read_at_once_in_chunks_or_again_after_rewinding_is_the_same(
    folders: tuple[Path, Path],
) -> None:
    run = runner_of(folders[1])
    whole, kept = run(IDS, None)
    cache, parts = None, []
    for start, end in ((0, 40), (40, 41), (41, 90)):
        logits, cache = run(IDS[start:end], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
    again, _ = run(IDS[60:], {name: array[:, :, :60] for name, array in kept.items()})
    np.testing.assert_allclose(again, whole[60:], atol=1e-4)


def test_the_engine_writes_with_it(folders: tuple[Path, Path]) -> None:
    stream = OnnxModel(folders[1], threads=1).stream(IDS.tolist())
    written = [next(stream) for _ in range(12)]
    run, text = runner_of(folders[1]), IDS.tolist()
    for token in written:
        assert token == run(np.array(text), None)[0][-1].argmax()
        text.append(token)


@pytest.mark.parametrize("options", [{"model_type": "llama"}, {"num_key_value_heads": 4}], ids=str)
def test_other_shapes_have_it_too(options: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", **options)
    exported = to_onnx(
        source, tmp_path / "onnx", precision="int8", cache="int8", cache_texts=(str(chats),)
    )
    assert read_json(exported / "manifest.json")["cache"]["kl_to_float"] < 2e-3


def test_scales_that_are_too_small_show(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.int8_cache.LARGEST_CODE", 127 * 8)
    with pytest.raises(ExportError, match="nats"):
        to_onnx(model, tmp_path / "onnx", cache="int8", cache_texts=(str(chats),))
    assert not (tmp_path / "onnx").exists()


def test_a_runtime_without_it_is_named(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = text_runner, []

    def runner(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("Unrecognized attribute: k_quant_type")
        return real(*args)

    monkeypatch.setattr("export.int8_cache.text_runner", runner)
    with pytest.raises(ExportError, match=r"ONNX Runtime .* k_quant_type.*leave cache at float32"):
        to_onnx(model, tmp_path / "onnx", cache="int8", cache_texts=(str(chats),))


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "int4"},
        {"cache": "int8", "portable": True},
        {"cache": "int8", "layout": "transformersjs"},
        {"cache_texts": ()},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="cache"):
        OnnxSettings(**options)


def test_the_settings_are_in_the_lineage(folders: tuple[Path, Path]) -> None:
    entry = json.loads((folders[1] / "lineage.json").read_text())[-1]
    assert entry["settings"]["cache"] == "int8"
