"""What an ONNX folder says about itself: checksums, and the bytes that a token costs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from export.settings import MODEL_FILE
from mistill.folder import MANIFEST_FILE

# These read a few rows of a table, where every other operator reads its weights from end to end.
_ROW_READERS = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
}


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest itself.

    Args:
        folder: The folder.

    Returns:
        File name to ``bytes`` and ``sha256``.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST_FILE:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def bytes_per_token(folder: Path) -> int:
    """Bytes of weights that a step of one token reads, counted in the graph as it is on disk.

    A table that is read a row at a time counts one row for each operator that does so. Keys and
    values are not counted: they grow with the text.

    Args:
        folder: An ONNX folder.

    Returns:
        Bytes; divided into the speed of memory, they bound the tokens per second.
    """
    import onnx_ir as ir

    graph = ir.load(folder / MODEL_FILE).graph
    whole: set[str] = set()
    rows = 0
    for node in graph:
        for place, value in enumerate(node.inputs):
            source = _initializer(value, graph.initializers)
            if source is None:
                continue
            tensor = source.const_value
            assert tensor is not None
            if place in _ROW_READERS.get(node.op_type, ()):
                rows += tensor.nbytes // int(tensor.shape[0])
            elif node.op_type != "Reshape":
                assert source.name is not None
                whole.add(source.name)
    tensors = [graph.initializers[name].const_value for name in whole]
    return rows + sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _initializer(value: Any, initializers: Any) -> Any:
    """The weight that an operator reads, also through a change of its shape."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape":
        value = producer.inputs[0]
    return initializers.get(value.name)
