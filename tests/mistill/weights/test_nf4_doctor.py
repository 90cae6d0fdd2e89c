"""NF4 folders: every way that bitsandbytes stores a weight is read, and contradictions named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import to_onnx
from mistill.cli.inspection import inspect_folder
from mistill.engine import OnnxModel
from mistill.errors import FolderError
from mistill.pytorch import load_pytorch
from mistill.weights.nf4_doctor import nf4_problems
from mistill.weights.nf4_layout import NF4_STATE
from quantize import dequantize
from tests.tiny import changed_config, changed_tensors, tiny_model

IDS = np.random.default_rng(0).integers(5, 380, (1, 24))
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        tmp_path_factory.mktemp("nf4") / "floats", hidden_size=256, intermediate_size=512
    )


def bitsandbytes_folder(
    floats: Path,
    target: Path,
    *,
    block: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
) -> tuple[Path, Path]:
    """The layers of a folder as bitsandbytes' functions store them, and what they decode to."""
    import bitsandbytes.functional as bnb

    storage_name = str(storage).removeprefix("torch.")
    stored = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": storage_name,
    }
    changed_config(floats, target, quantization_config=stored)
    plain = Path(shutil.copytree(floats, target.with_name(f"{target.name}-decoded")))
    tensors, decoded = {}, {}
    for name, weight in load_file(floats / "model.safetensors").items():
        tensors[name] = decoded[name] = weight
        if not name.endswith("_proj.weight"):
            continue
        codes, state = bnb.quantize_4bit(
            weight,
            blocksize=block,
            quant_type="nf4",
            compress_statistics=nested,
            quant_storage=storage,
        )
        tensors[name] = codes
        tensors |= {f"{name}.{part}": v for part, v in state.as_dict(packed=True).items()}
        decoded[name] = bnb.dequantize_4bit(codes, state).float().contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    save_file(decoded, plain / "model.safetensors", {"format": "pt"})
    return target, plain


def logits(folder: Path) -> Any:
    with torch.inference_mode():
        return load_pytorch(folder)(torch.from_numpy(IDS)).logits.numpy()


def divergence(expected: Any, found: Any) -> float:
    """Mean KL in nats."""
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (expected, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 128, 256])
def test_blocks_of_any_size_go_into_the_graph(
    block: int, nested: bool, floats: Path, tmp_path: Path
):
    folder, plain = bitsandbytes_folder(floats, tmp_path / "nf4", block=block, nested=nested)
    assert inspect_folder(folder).problems == ()
    expected = logits(plain)
    kinds: list[dict[str, Any]] = [{}, {"block_size": 16}, {"precision": "float32"}]
    for options in kinds:
        target = to_onnx(folder, tmp_path / "onnx", overwrite=True, parity_positions=0, **options)
        # Rounding explains a hundredth of a nat; scales of other blocks are off by a whole one.
        assert divergence(expected, OnnxModel(target).logits(IDS)) < 0.03
    to_onnx(folder, tmp_path / "compared", accuracy_level=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "storage",
    [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64],
    ids=str,
)
def test_codes_that_are_stored_as_other_numbers_are_the_same_codes(
    storage: torch.dtype, nested: bool, floats: Path, tmp_path: Path
):
    folder, plain = bitsandbytes_folder(floats, tmp_path / "nf4", nested=nested, storage=storage)
    assert inspect_folder(folder).problems == ()
    np.testing.assert_allclose(logits(folder), logits(plain), atol=2e-3)
    found = load_file(dequantize(folder, tmp_path / "found") / "model.safetensors")
    expected = load_file(plain / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
    graph = OnnxModel(to_onnx(folder, tmp_path / "onnx", precision="float32"))
    np.testing.assert_allclose(graph.logits(IDS), logits(plain), atol=1e-3)
    # As codes, which the export holds against the source's.
    graph = OnnxModel(to_onnx(folder, tmp_path / "codes", parity_positions=0))
    assert divergence(logits(plain), graph.logits(IDS)) < 0.03


def _state(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        name = f"{DOWN}.weight.{NF4_STATE}"
        state = json.loads(bytes(tensors[name].numpy())) | changes
        state = {name: value for name, value in state.items() if value is not None}
        tensors[name] = _letters(json.dumps(state))

    return change


def _letters(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _part(part: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.{part}"] = change(tensors[f"{DOWN}.{part}"])

    return edit


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no JSON": (_part(f"weight.{NF4_STATE}", lambda _: _letters("{")), "not valid JSON"),
    "deep JSON": (_part(f"weight.{NF4_STATE}", lambda _: _letters("[" * 60_000)), "JSON"),
    "a list": (_part(f"weight.{NF4_STATE}", lambda _: _letters("[1]")), "Expected 'object'"),
    "long": (_part(f"weight.{NF4_STATE}", lambda _: _letters(" " * 70_000)), "longer than"),
    "floats": (_part(f"weight.{NF4_STATE}", lambda t: t.float()), "letters of a JSON"),
    "no shape": (_state(shape=None), "missing required field 'shape'"),
    "shape below 0": (_state(shape=[-256, -512]), "Expected 'int' >= 1"),
    "three sizes": (_state(shape=[2, 128, 512]), "Expected 'array' of length 2"),
    "shape of text": (_state(shape="256"), "Expected 'array'"),
    "other shape": (_state(shape=[256, 510]), "bytes of codes"),
    "huge shape": (_state(shape=[10**12, 10**12]), "bytes of codes"),
    "blocks of 0": (_state(blocksize=0), "Expected 'int' >= 1"),
    "blocks of half": (_state(blocksize=32.5), "Expected 'int'"),
    "other blocks": (_state(blocksize=128), "in blocks of 128 need"),
    "fp4": (_state(quant_type="fp4"), "says 'fp4'; mistill reads NF4 only"),
    "nested blocks of 0": (_state(nested_blocksize=0), "Expected 'int' >= 1"),
    "nested huge": (_state(nested_blocksize=10**12), "nested_absmax holds 8 numbers"),
    "nested nothing": (_state(nested_offset=None), "does not say how the scales"),
    "scales too short": (_part("weight.absmax", lambda t: t[:-1]), "absmax holds 2047 numbers"),
    "scales of floats": (_part("weight.absmax", lambda t: t.float()), "should be of type U8"),
    "few levels": (_part("weight.quant_map", lambda t: t[:8]), "quant_map holds 8 numbers"),
    "a scale of nan": (
        _part("weight.nested_absmax", lambda t: t * float("nan")),
        "infinite or not a number",
    ),
    "codes too short": (_part("weight", lambda t: t[:-1]), "bytes of codes"),
    "another format": (
        lambda tensors: tensors.pop(f"{DOWN}.weight.{NF4_STATE}"),
        "another format than NF4",
    ),
    "no scales": (lambda tensors: tensors.pop(f"{DOWN}.weight.absmax"), "absmax is missing"),
    "no levels": (lambda tensors: tensors.pop(f"{DOWN}.weight.quant_map"), "quant_map is missing"),
}


@pytest.fixture(scope="module")
def sound(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = bitsandbytes_folder(floats, tmp_path_factory.mktemp("sound") / "nf4", nested=True)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_contradicts_itself_is_named_before_it_is_read(
    damage: str, sound: Path, tmp_path: Path
):
    change, words = DAMAGE[damage]
    folder = changed_tensors(sound, tmp_path / "damaged", change)
    (problem,) = nf4_problems(folder)
    assert DOWN in problem
    assert words in problem
    assert problem in inspect_folder(folder).problems
    for step in (
        lambda: dequantize(folder, tmp_path / "out"),
        lambda: to_onnx(folder, tmp_path / "out"),
        lambda: load_pytorch(folder),
    ):
        with pytest.raises(FolderError, match=DOWN):
            step()
    assert not (tmp_path / "out").exists()


def test_a_sound_weight_of_another_shape_than_the_config_says_is_refused(
    floats: Path, tmp_path: Path
):
    folder, _ = bitsandbytes_folder(floats, tmp_path / "nf4")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    for step in (load_pytorch, lambda folder: to_onnx(folder, tmp_path / "out")):
        with pytest.raises(FolderError, match=r"\(256, 512\)"):
            step(folder)


def test_a_weight_of_whole_numbers_is_no_float_weight(floats: Path, tmp_path: Path):
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.int8)

    folder = changed_tensors(floats, tmp_path / "int8", change)
    with pytest.raises(FolderError, match=r"down_proj.weight as I8, which is no type of floats"):
        load_pytorch(folder)
