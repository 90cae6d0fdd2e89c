"""CTranslate2 as a ``LanguageModel``: its generator writes, its forward pass scores.

The end of a turn is never chosen, so that so many tokens are written as asked.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note
from mistill.errors import FolderError, MissingExtraError
from mistill.language_model import Choose, greedy

# Its greedy loop is asked for this many tokens where no room was reserved.
_UNBOUNDED = 256


def _library() -> Any:
    try:
        return importlib.import_module("ctranslate2")
    except ImportError as error:
        raise MissingExtraError(
            f"ctranslate2 cannot be imported here ({error}); install it with: "
            "pip install ctranslate2"
        ) from error


def describe(library: str) -> dict[str, str]:
    """What is installed here.

    Args:
        library: Of no use: the package brings its own.

    Returns:
        The version, and the types that it computes with on this processor.
    """
    package = _library()
    types = ", ".join(sorted(package.get_supported_compute_types("cpu")))
    return {"version": str(package.__version__), "system": f"computes with {types}"}


def open_rival(folder: Path, note: Note, threads: int) -> CTranslate2Model:
    """Open a converted folder.

    Args:
        folder: The folder.
        note: What lies beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return CTranslate2Model(
        folder, compute_type=note.variant, context_length=note.context_length, threads=threads
    )


class CTranslate2Model:
    """A folder that CTranslate2 runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Most positions that it can hold at once.
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
            context_length: Most positions of the model.
            threads: Threads to compute with.

        Raises:
            FolderError: If it cannot be opened.
        """
        package = _library()
        self._view = package.StorageView
        self._words: list[str] = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self.vocabulary_size = len(self._words)
        self.context_length = context_length
        self._room = 0
        try:
            self._generator = package.Generator(
                str(folder),
                device="cpu",
                compute_type=compute_type,
                inter_threads=1,
                intra_threads=threads,
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FolderError(f"ctranslate2 cannot open {folder}: {reason}") from error

    def reserve(self, positions: int) -> None:
        """Write at most to this many positions in the texts that follow.

        Args:
            positions: At most ``context_length``.
        """
        self._room = positions

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V); position t scores the token at t + 1.
        """
        lengths = np.full(len(ids), ids.shape[1], np.int32)
        found = self._generator.forward_batch(
            self._view.from_array(np.ascontiguousarray(ids, np.int32)),
            self._view.from_array(lengths),
        )
        return np.array(found, np.float32)[:, :, : self.vocabulary_size]

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after the ids given, one at a time, until there is no room.

        Args:
            ids: The prompt, at least one token.
            choose: Picks a token from the logits (V,) of the last position; the engine's own
                greedy choice is taken in place of ours, and for any other the whole text is read
                again for every token, since the engine gives no logits while it writes.

        Returns:
            Token ids, one at a time.
        """
        prompt = list(ids)
        room = self._room if self._room > len(prompt) else len(prompt) + _UNBOUNDED
        count = min(room, self.context_length) - len(prompt)
        return (
            self._greedily(prompt, count)
            if choose is greedy
            else self._chosen(prompt, count, choose)
        )

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

    def _chosen(self, prompt: list[int], count: int, choose: Choose) -> Iterator[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(choose(self.logits(np.array([text]))[0, -1])))
            yield text[-1]
