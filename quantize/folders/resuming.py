"""The finished parts of a model that is being quantized, stored on disk layer by layer.

A layer is one safetensors file that appears whole or not at all, with its report in the header. The
hidden states that leave it are written before it, so that whoever finds the layer finds them too,
and go on with the same bits. After a kill at most one layer is done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistill.folders.publishing import replacing
from mistill.pytorch.layers import Batch
from mistill.weights.tensor_writer import TensorWriter
from quantize.folders.report import ModuleReport

_FACTS = "mistill"


class Part:
    """Tensors that are written together, and their reports."""

    def __init__(self) -> None:
        """Begin without tensors."""
        self.tensors: dict[str, Tensor] = {}
        self.reports: list[ModuleReport] = []
        self.float_names: list[str] = []

    def keep(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that stays float.

        Args:
            name: Its name in the model.
            tensor: Any type.
        """
        self.tensors[name] = tensor.contiguous()
        self.float_names.append(name)

    def add(self, tensors: Mapping[str, Tensor], report: ModuleReport) -> None:
        """Add a quantized matrix.

        Args:
            tensors: Its stored tensors, by name.
            report: Its report.
        """
        self.tensors.update(tensors)
        self.reports.append(report)


class PartStore:
    """The finished parts of one model in a working folder."""

    def __init__(self, folder: Path) -> None:
        """Look into a folder; nothing is read yet.

        Args:
            folder: From ``mistill.folders.publishing.working``; empty, or as a killed process
                left it.
        """
        self._folder = folder

    def finished(self, names: Sequence[str]) -> int:
        """How many parts are done, from the first on.

        Args:
            names: All parts in the order of the work: one before the layers, the layers, and one
                after them.

        Returns:
            Number of parts, all of them readable, and with them what leaves the last layer of
            them; 0 if that is lost.
        """
        count = 0
        while count < len(names) and _readable(self._file(names[count])):
            count += 1
        layers = count - 1
        lost = 0 < layers < len(names) - 1 and not _readable(self._hidden(layers))
        return 0 if lost else count

    def put(self, name: str, part: Part) -> None:
        """Store a part; when this returns it survives a kill of the process.

        Args:
            name: The part.
            part: What it holds.
        """
        facts = {"reports": [asdict(report) for report in part.reports], "kept": part.float_names}
        _save_whole(part.tensors, self._file(name), {_FACTS: json.dumps(facts)})

    def facts(self, name: str) -> tuple[list[ModuleReport], list[str]]:
        """The report of a finished part.

        Args:
            name: The part.

        Returns:
            The reports of its matrices, and the names of the tensors that stay float.
        """
        with safe_open(self._file(name), framework="pt") as opened:
            facts: dict[str, Any] = json.loads(opened.metadata()[_FACTS])
        return [ModuleReport(**report) for report in facts["reports"]], facts["kept"]

    def copy_to(self, writer: TensorWriter, name: str) -> None:
        """Copy the tensors of a part into the model that is being written.

        Args:
            writer: The model being written.
            name: The part.
        """
        with safe_open(self._file(name), framework="pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118  (not a dictionary)
                writer.add(tensor, opened.get_tensor(tensor))

    def put_hidden(self, after: int, *streams: Sequence[Batch]) -> None:
        """Store the hidden states after a layer.

        Args:
            after: How many layers are behind it.
            *streams: The batches of the quantized model, and for GPTAQ of the float one.
        """
        tensors = {
            f"{stream}.{number}": batch.hidden
            for stream, batches in enumerate(streams)
            for number, batch in enumerate(batches)
        }
        _save_whole(tensors, self._hidden(after), {})

    def get_hidden(self, after: int, *streams: Sequence[Batch]) -> None:
        """Load the hidden states after a layer.

        Args:
            after: How many layers are behind it.
            *streams: The batches that take it.
        """
        tensors = load_file(self._hidden(after))
        for stream, batches in enumerate(streams):
            for number, batch in enumerate(batches):
                batch.hidden = tensors[f"{stream}.{number}"]

    def drop_hidden(self, before: int) -> None:
        """Delete hidden states that are not needed any more.

        Args:
            before: Hidden states after fewer layers than this are deleted.
        """
        for file in self._folder.glob("hidden-*.safetensors"):
            if int(file.stem.rpartition("-")[2]) < before:
                file.unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"part-{name}.safetensors"

    def _hidden(self, after: int) -> Path:
        return self._folder / f"hidden-{after:05}.safetensors"


def _readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _save_whole(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    with replacing(file) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})
