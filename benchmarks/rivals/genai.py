"""ONNX Runtime GenAI as a ``LanguageModel``, run as its own benchmark runs it.

A generator is made for every text, with room for that text and no more; the prompt is read by
``append_tokens`` and every token written by ``generate_next_token``, which also chooses it. As in
its own benchmark, the end of a turn is never chosen, so that exactly the requested number of tokens
is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note, import_library
from mistill.engine.language_model import Choose, greedy
from mistill.errors import FolderError
from mistill.shown import one_line


def describe(library: str) -> dict[str, str]:
    """Version of the installed package.

    Args:
        library: Ignored: the package has its own library.

    Returns:
        Versions of the package and of the ONNX Runtime below it.
    """
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("onnxruntime-genai", "onnxruntime"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not known"
    return {
        "version": str(
            getattr(
                import_library("onnxruntime_genai", "onnxruntime-genai"),
                "__version__",
                versions["onnxruntime-genai"],
            )
        ),
        "system": f"onnxruntime {versions['onnxruntime']}",
    }


def open_rival(folder: Path, note: Note, threads: int) -> GenaiModel:
    """Open a folder of its model builder.

    Args:
        folder: The folder.
        note: The note beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return GenaiModel(folder, threads=threads)


class GenaiModel:
    """A folder that ONNX Runtime GenAI runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int

    def __init__(self, folder: Path, *, threads: int) -> None:
        """Open a folder.

        Args:
            folder: What its model builder wrote.
            threads: Threads to compute with.

        Raises:
            FolderError: If it cannot be opened.
        """
        self._genai = import_library("onnxruntime_genai", "onnxruntime-genai")
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        self.vocabulary_size = int(described["vocab_size"])
        self.context_length = int(described["context_length"])
        self._room = self.context_length
        config = self._genai.Config(str(folder))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        try:
            self._model = self._genai.Model(config)
        except Exception as error:
            raise FolderError(
                f"onnxruntime-genai cannot open {folder}: {one_line(error)}"
            ) from error

    def reserve(self, positions: int) -> None:
        """Make room for this many positions in the texts that follow.

        Args:
            positions: At most ``context_length``.
        """
        self._room = positions

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        scores = np.empty((*ids.shape, self.vocabulary_size), np.float32)
        for row, tokens in enumerate(ids):
            self.reserve(len(tokens) + 1)
            generator = self._generator()
            generator.append_tokens(tokens.astype(np.int32))
            logits = np.asarray(generator.get_output("logits"), np.float32)
            if logits.shape[1] == len(tokens):
                scores[row] = logits[0, :, : self.vocabulary_size]
                continue
            generator = self._generator()
            for index, token in enumerate(tokens):
                generator.append_tokens(np.array([token], np.int32))
                logits_of_token = np.asarray(generator.get_output("logits"), np.float32)
                scores[row, index] = logits_of_token[0, -1, : self.vocabulary_size]
        return scores

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``."""
        if self._room <= len(ids):
            self._room = self.context_length
        return self._write(self._generator(), np.asarray(ids, np.int32), choose)

    def _generator(self) -> Any:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(
            do_sample=False, max_length=self._room, min_length=self._room, batch_size=1
        )
        return self._genai.Generator(self._model, settings)

    def _write(self, generator: Any, prompt: NDArray[np.int32], choose: Choose) -> Iterator[int]:
        generator.append_tokens(prompt)
        for _ in range(self._room - len(prompt)):
            if choose is greedy:
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
            else:
                scores = np.asarray(generator.get_logits(), np.float32).reshape(-1)
                token = int(choose(scores[: self.vocabulary_size]))
                generator.append_tokens(np.array([token], np.int32))
            yield token
