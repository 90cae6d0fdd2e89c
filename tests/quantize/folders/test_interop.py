"""Do our GPTQ folders mean to others what they mean to us?"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from export import to_onnx
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.weights.gptq_doctor import examine
from mistill.weights.gptq_layout import CheckpointFormat
from quantize import GptqSettings, to_gptq, to_rounding
from tests.gptq_matrix import ORDERS, SCALE_TYPES, Way, simple_folder
from tests.quantize.folders.interop_environment import NotInstallable, interop_python
from tests.reference.onnx_runner import OnnxRunner
from tests.tiny import SENTENCES, tiny_model

_LOADER = Path(__file__).with_name("load_with_gptqmodel.py")
_QUANTIZER = Path(__file__).with_name("quantize_with_gptqmodel.py")
_ROOT = Path(__file__).parents[3]

# Every pair of bits, symmetry, format, groups, order and scale type, not every combination.
_WAYS = [
    (
        Way(
            bits,
            symmetric,
            (-1, 32, 64, 128)[(number + turn) % 4],
            ORDERS[turn],
            SCALE_TYPES[(number + 2 * turn) % 3],
        ),
        checkpoint_format,
    )
    for number, (bits, symmetric, checkpoint_format) in enumerate(
        itertools.product((4, 8), (True, False), get_args(CheckpointFormat))
    )
    for turn in range(3)
]
_WAYS += [(Way(bits, False, 32, "dynamic", "float16"), "gptq_v2") for bits in (2, 3)]
# What gptqmodel is told to write, by name.
_THEIRS: dict[str, dict[str, Any]] = {
    "v1": {"bits": 4, "order": "static"},
    "v2": {"bits": 4, "order": "group", "symmetric": False},
    "desc_act": {"bits": 4, "order": "dynamic"},
    "8 bits": {"bits": 8, "order": "none", "group_size": -1},
    "3 bits": {"bits": 3, "symmetric": False},
    "2 bits": {"bits": 2},
}


def _python() -> Path:
    try:
        return interop_python()
    except NotInstallable as reason:
        pytest.skip(str(reason))


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        [_python(), *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _ids(tmp_path: Path) -> torch.Tensor:
    ids = np.random.default_rng(0).integers(5, 300, (2, 40))
    np.save(tmp_path / "ids.npy", ids)
    return torch.from_numpy(ids)


def _logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = load_pytorch(folder)(ids).logits.numpy()
    return found


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_every_way_to_store_codes_gives_others_our_logits(tmp_path: Path) -> None:
    folders = []
    for number, (way, checkpoint_format) in enumerate(_WAYS):
        # gptqmodel holds scales in float16: of float32 ones it takes the nearest.
        stored = replace(
            way, scale_type="float16" if way.scale_type == "float32" else way.scale_type
        )
        folder, _ = simple_folder(
            tmp_path / str(number),
            stored,
            checkpoint_format,
            hidden_size=128,
            intermediate_size=128,
            num_key_value_heads=4,
        )
        folders.append(folder)
    ids = _ids(tmp_path)
    _run(_LOADER, tmp_path / "ids.npy", "exact", *folders)
    for folder, stored_as in zip(folders, _WAYS, strict=True):
        ours, theirs = _logits(folder, ids), np.load(folder / "exact.npy")
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4, err_msg=str(stored_as))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_what_gptqmodel_writes_is_read_and_exported_as_it_reads_it(tmp_path: Path) -> None:
    source = tiny_model(
        tmp_path / "source", hidden_size=128, intermediate_size=128, num_key_value_heads=4
    )
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    options = {name: {"group_size": 32, **more} for name, more in _THEIRS.items()}
    _run(_QUANTIZER, source, text, tmp_path, json.dumps(options))
    folders = {name: tmp_path / name for name in _THEIRS}
    ids = _ids(tmp_path)
    _run(_LOADER, tmp_path / "ids.npy", "exact", *folders.values())
    for name, folder in folders.items():
        found, asked = examine(folder), GptqSettings(**_THEIRS[name])
        assert found.contradictions == ()
        assert found.symmetric == asked.symmetric
        assert found.checkpoint_format == ("gptq" if asked.symmetric else "gptq_v2")
        assert found.order == ("mixed" if asked.order == "dynamic" else "plain")
        assert found.bits == {asked.bits: 14}
        step = read_lineage(folder)[-1]
        assert step["backend"].startswith("gptqmodel 7")
        report = json.loads((folder / "quantize_report.json").read_text())
        assert len(report["modules"]) == 14
        assert all(one["loss"] > 0 and one["bits"] == asked.bits for one in report["modules"])
        ours, theirs = _logits(folder, ids), np.load(folder / "exact.npy")
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4, err_msg=name)
        made = to_onnx(
            folder, tmp_path / f"{name} onnx", head_bits=32, embedding_bits=32, accuracy_level=0
        )
        graph = OnnxRunner(made).logits(ids.numpy())
        np.testing.assert_allclose(graph, theirs, rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_transformers_with_optimum_and_gptqmodel_computes_our_logits(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    python = _python()
    folders = [
        to_gptq(
            model,
            tmp_path / f"{bits}-{symmetric}",
            texts=chats,
            bits=bits,
            symmetric=symmetric,
            group_size=32,
            samples=8,
            block_length=64,
        )
        for bits in (4, 8)
        for symmetric in (True, False)
    ]
    folders.append(to_rounding(model, tmp_path / "rows", group_size=-1))
    ids = np.random.default_rng(0).integers(5, 300, (2, 40))
    np.save(tmp_path / "ids.npy", ids)
    done = subprocess.run(
        [python, _LOADER, tmp_path / "ids.npy", *folders],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        with torch.no_grad():
            ours = load_pytorch(folder)(torch.from_numpy(ids)).logits.numpy()
        # The same numbers are multiplied in the same order; a sum may be split in another way.
        np.testing.assert_allclose(np.load(folder / "exact.npy"), ours, rtol=0, atol=1e-4)
        # Kernels in half precision: 8 bits of mantissa, over two layers.
        default = np.load(folder / "default.npy")
        assert np.abs(default - ours).max() < 0.1 * np.abs(ours).max()
