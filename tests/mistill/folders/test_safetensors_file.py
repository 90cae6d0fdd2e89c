from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mistill.errors import FolderError
from mistill.folders.safetensors_file import NewTensor, map_tensor, read_header, write_safetensors


def file_with(path: Path, entry: dict[str, Any], data: bytes = b"abcdefgh") -> Path:
    text = json.dumps({"x": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_header_tells_where_each_tensor_lies(tmp_path: Path) -> None:
    tensors = {
        "half": torch.tensor([[1.5, -2.0], [0.25, 8.0]]).bfloat16(),
        "whole": torch.arange(5),
        "none": torch.empty(0, 3),
    }
    file = tmp_path / "some.safetensors"
    save_file(tensors, file, metadata={"made by": "hand"})

    header = read_header(file)

    assert header.metadata == {"made by": "hand"}
    content = file.read_bytes()
    for name, tensor in tensors.items():
        stored = header.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        data = content[stored.start : stored.start + stored.size]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert map_tensor(file, stored).tobytes() == data
    assert map_tensor(file, header.tensors["whole"]).tolist() == [0, 1, 2, 3, 4]


def test_what_is_written_as_a_stream_is_read_by_the_library(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, -7], np.int8)
    file = tmp_path / "new.safetensors"
    tensors = {
        "first": NewTensor("F32", (2, 3), 24, (bytes(row) for row in first)),
        "zwölf": NewTensor("I8", (2,), 2, [second.data]),
    }
    write_safetensors(file, tensors, {"about": "nothing"})

    loaded = load_file(file)
    np.testing.assert_array_equal(loaded["first"], first)
    np.testing.assert_array_equal(loaded["zwölf"], second)
    assert read_header(file).metadata == {"about": "nothing"}
    assert read_header(file).tensors["first"].start % 8 == 0


def test_chunks_of_another_size_are_noticed(tmp_path: Path) -> None:
    tensors = {"x": NewTensor("U8", (4,), 4, [b"abc"])}
    with pytest.raises(EOFError, match="x has 3 bytes where 4 were expected"):
        write_safetensors(tmp_path / "short", tensors)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "cut short"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "cut short: .* bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "contradicts itself or the file"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "contradicts itself"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}, "contradicts itself"),
        ({"dtype": "F32"}, "start is damaged"),
        ([], "start is damaged"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(entry: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=problem):
        read_header(file_with(tmp_path / "bad", entry))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{"])
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(FolderError, match="is not a safetensors file, or its start is damaged"):
        read_header(tmp_path / "bad")
