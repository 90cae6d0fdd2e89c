"""CTranslate2 as a ``LanguageModel``: its generator writes, its forward pass scores.

The end of a turn is never chosen, so that exactly the requested number of tokens is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note, import_library
from benchmarks.rivals.writing import GreedyEngine
from mistill.errors import FolderError
from mistill.shown import one_line


def describe(library: str) -> dict[str, str]:
    """Version of the installed package.

    Args:
        library: Ignored: the package has its own library.

    Returns:
        The version, and the types that it computes with on this processor.
    """
    package = import_library("ctranslate2", "ctranslate2")
    types = ", ".join(sorted(package.get_supported_compute_types("cpu")))
    return {"version": str(package.__version__), "system": f"computes with {types}"}


def open_rival(folder: Path, note: Note, threads: int) -> CTranslate2Model:
    """Open a converted folder.

    Args:
        folder: The folder.
        note: The note beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return CTranslate2Model(
        folder, compute_type=note.variant, context_length=note.context_length, threads=threads
    )


class CTranslate2Model(GreedyEngine):
    """A folder that CTranslate2 runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int

    def __init__(
        self, folder: Path, *, compute_type: str, context_length: int, threads: int
    ) -> None:
        """Open a folder.

        Args:
            folder: What its converter wrote.
            compute_type: What it computes with.
            context_length: Context of the model in tokens.
            threads: Threads to compute with.

        Raises:
            FolderError: If it cannot be opened.
        """
        package = import_library("ctranslate2", "ctranslate2")
        self._view = package.StorageView
        self._words: list[str] = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self.vocabulary_size = len(self._words)
        self.context_length = context_length
        try:
            self._generator = package.Generator(
                str(folder),
                device="cpu",
                compute_type=compute_type,
                inter_threads=1,
                intra_threads=threads,
            )
        except (RuntimeError, ValueError) as error:
            raise FolderError(f"ctranslate2 cannot open {folder}: {one_line(error)}") from error

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V); position t scores the token at t + 1.
        """
        lengths = np.full(len(ids), ids.shape[1], np.int32)
        logits = self._generator.forward_batch(
            self._view.from_array(np.ascontiguousarray(ids, np.int32)),
            self._view.from_array(lengths),
        )
        return np.array(logits, np.float32)[:, :, : self.vocabulary_size]

    def _greedily(self, prompt: list[int], count: int) -> Iterator[int]:
        if count < 1:
            return
        steps = self._generator.generate_tokens(
            [self._words[token] for token in prompt],
            max_length=count,
            min_length=count,
            sampling_topk=1,
        )
        for step in steps:
            yield int(step.token_id)
