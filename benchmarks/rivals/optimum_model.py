"""optimum as a ``LanguageModel``: its ``ORTModelForCausalLM``, with ONNX Runtime below it.

The loop is ours, as for PyTorch: the prompt at once, then a token at a time with the keys and
values that the last call gave. ``generate`` of transformers would take longer for the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note, import_library
from mistill.engine.language_model import Choose, greedy
from mistill.errors import FolderError
from mistill.shown import one_line

_PACKAGE = "'optimum-onnx[onnxruntime]'"


def describe(library: str) -> dict[str, str]:
    """Version of the installed package.

    Args:
        library: Ignored: the package has its own library.

    Returns:
        Versions of the package and of what it runs on.
    """
    from importlib.metadata import version

    # Both import what a name needs when it is first asked for that name.
    _ = import_library("optimum.onnxruntime", _PACKAGE).ORTModelForCausalLM
    _ = import_library("transformers", "transformers").LlamaConfig
    below = (f"{name} {version(name)}" for name in ("onnxruntime", "transformers", "torch"))
    return {"version": version("optimum-onnx"), "system": ", ".join(below)}


def open_rival(folder: Path, note: Note, threads: int) -> OptimumModel:
    """Open a folder.

    Args:
        folder: The folder.
        note: The note beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return OptimumModel(
        folder,
        vocabulary_size=note.vocabulary_size,
        context_length=note.context_length,
        threads=threads,
    )


class OptimumModel:
    """A folder that optimum runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int

    def __init__(
        self, folder: Path, *, vocabulary_size: int, context_length: int, threads: int
    ) -> None:
        """Open a folder.

        Args:
            folder: What its exporter wrote.
            vocabulary_size: Number of logits of the model.
            context_length: Context of the model in tokens.
            threads: Threads to compute with.

        Raises:
            FolderError: If it cannot be opened.
        """
        self._torch = import_library("torch", "torch")
        runtime = import_library("onnxruntime", "onnxruntime")
        optimum = import_library("optimum.onnxruntime", _PACKAGE)
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self._torch.set_num_threads(threads)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        (file,) = folder.glob("*.onnx")
        try:
            self._model = optimum.ORTModelForCausalLM.from_pretrained(
                folder, file_name=file.name, session_options=options, local_files_only=True
            )
        except Exception as error:
            raise FolderError(f"optimum cannot open {folder}: {one_line(error)}") from error

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        output = self._read(self._torch.from_numpy(np.ascontiguousarray(ids)), None, 0)
        return np.asarray(output.logits.numpy(), np.float32)

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``."""
        return self._write(list(ids), choose)

    def _write(self, unread: list[int], choose: Choose) -> Iterator[int]:
        cache, position = None, 0
        while position + len(unread) < self.context_length:
            output = self._read(self._torch.tensor([unread]), cache, position)
            position += len(unread)
            cache = output.past_key_values
            unread = [int(choose(output.logits[0, -1].numpy()))]
            yield unread[0]

    def _read(self, ids: Any, cache: Any, position: int) -> Any:
        with self._torch.inference_mode():
            return self._model(
                input_ids=ids,
                attention_mask=self._torch.ones(
                    (len(ids), position + ids.shape[1]), dtype=self._torch.int64
                ),
                past_key_values=cache,
                use_cache=True,
            )
