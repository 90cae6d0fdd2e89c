"""What an ONNX folder says about itself: checksums, and the bytes that a token costs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.settings import MODEL_FILE
from mistill.folder import MANIFEST_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

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
    whole: dict[str, int] = {}
    rows = 0
    for node in graph:
        for place, value in enumerate(node.inputs):
            weight = _weight(value)
            if weight is None or node.op_type == "Reshape":
                continue
            if place in _ROW_READERS.get(node.op_type, ()):
                rows += weight.nbytes // weight.shape.numpy()[0]
            else:
                whole[str(weight.name)] = weight.nbytes
    return rows + sum(whole.values())


def _weight(value: ir.Value | None) -> ir.ExternalTensor | None:
    """The tensor of the data file that an operator reads, also through a change of its shape."""
    import onnx_ir as ir

    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape":
        value = producer.inputs[0]
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, ir.ExternalTensor) else None
