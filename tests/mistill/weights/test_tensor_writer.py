from __future__ import annotations

import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file

from mistill.folders.folder import weight_files
from mistill.weights.tensor_writer import TensorWriter


def test_no_file_is_larger_than_asked_and_nothing_is_lost(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((25,), float(number)) for number in range(7)}
    with TensorWriter(tmp_path, shard_bytes=250) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    files = weight_files(tmp_path)
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_waits_to_be_written_holds_no_larger_tensor(tmp_path: Path) -> None:
    with TensorWriter(tmp_path) as writer:
        large = torch.arange(1000.0)
        writer.add("part", large[10:12])
        writer.add("turned", torch.arange(6.0).reshape(2, 3).T)
        gone = weakref.ref(large)
        del large
        assert gone() is None
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["part"].tolist() == [10, 11]
    assert stored["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
