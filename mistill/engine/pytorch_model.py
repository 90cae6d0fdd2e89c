"""A transformers model as a running language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistill.engine.language_model import Choose, greedy
from mistill.errors import ContextError
from mistill.folders.folder import context_length
from mistill.pytorch.loading import load_pytorch

POSITIONS_AT_ONCE = 2048


class PytorchModel:
    """A model folder that runs in PyTorch.

    It is the reference for ONNX folders, and runs model folders that were not exported in
    benchmarks. It has no prefix cache: each ``stream`` reads its whole prompt, so that the time to
    first token is that of a first question.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load a folder.

        Args:
            folder: A float, GPTQ or NF4 folder.
            threads: Threads that PyTorch computes with, for the whole process; None leaves them.
            dtype: Type of weights and activations.

        Raises:
            FolderError: If the folder is broken or holds an ONNX graph.
            ArchitectureError: If it is neither Llama nor Mistral.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_pytorch(folder, dtype)
        self._context_length = context_length(Path(folder), self.model.config.to_dict())

    @property
    def vocabulary_size(self) -> int:
        """Number of logits per position, V."""
        return int(self.model.config.vocab_size)

    @property
    def context_length(self) -> int:
        """Most positions that the model can hold at once."""
        return self._context_length

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        if ids.ndim != 2:
            raise ValueError(f"ids must have the shape (B, T), got {ids.shape}")
        self._check(ids)
        rows, length = ids.shape
        scores = np.empty((rows, length, self.vocabulary_size), dtype=np.float32)
        step = max(1, POSITIONS_AT_ONCE // max(1, length))
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            with torch.inference_mode():
                output = self.model(self._to_device(ids[chunk]), use_cache=False)
                torch.from_numpy(scores[chunk]).copy_(output.logits)
        return scores

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``."""
        prompt = np.asarray(ids, dtype=np.int64)[None]
        if prompt.size == 0:
            raise ValueError("the prompt is empty; give at least one token")
        self._check(prompt)
        return self._tokens(prompt, choose)

    def _tokens(self, ids: NDArray[np.int64], choose: Choose) -> Iterator[int]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for _ in range(self.context_length - ids.shape[1]):
            # Entered for each token: inference mode would leak to the caller across a yield.
            with torch.inference_mode():
                output = self.model(
                    self._to_device(ids), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                scores = output.logits[0, -1].float().cpu().numpy()
            token = choose(scores)
            yield token
            ids = np.array([[token]], dtype=np.int64)

    def _to_device(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)

    def _check(self, ids: NDArray[np.int64]) -> None:
        if ids.shape[1] > self.context_length:
            raise ContextError(
                f"{ids.shape[1]} tokens do not fit the model's context of {self.context_length}; "
                "give fewer"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary_size:
            raise ValueError(
                f"token ids must lie between 0 and {self.vocabulary_size - 1}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
