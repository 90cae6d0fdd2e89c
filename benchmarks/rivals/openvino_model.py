"""OpenVINO GenAI as a ``LanguageModel``: its pipeline writes, the same graph without it scores.

The pipeline is the one behind ``LLMPipeline`` on a processor, taken a step at a time, with the
settings of its own ``benchmark_genai.py``: nothing is kept from one prompt for the next. As there,
the end of a turn does not stop it. It shows no logits: for those the graph is compiled once more,
by OpenVINO itself with the same properties, when they are first asked for. By then the memory of
the pipeline has been read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note, import_library
from benchmarks.rivals.writing import GreedyEngine
from mistill.errors import FolderError
from mistill.shown import one_line

MODEL_FILE = "openvino_model.xml"

# Properties that turn off its own choices of precision: no narrower type, no 8-bit activations, no
# 8-bit KV cache.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
_DEVICE = "CPU"
_NO_LIMIT = 2**31 - 1


def describe(library: str) -> dict[str, str]:
    """Version of the installed package.

    Args:
        library: Ignored: the package has its own library.

    Returns:
        The version, and its default precision on this processor.
    """
    genai = import_library("openvino_genai", "openvino-genai")
    openvino = import_library("openvino", "openvino")
    core = openvino.Core()
    kinds = {
        "computes in": "INFERENCE_PRECISION_HINT",
        "keeps keys and values in": "KV_CACHE_PRECISION",
    }
    properties = [
        f"{label} {core.get_property(_DEVICE, name).to_string()}" for label, name in kinds.items()
    ]
    return {
        "version": str(genai.__version__).partition("-")[0],
        "system": ", ".join(
            [f"openvino {str(openvino.__version__).partition('-')[0]}", *properties]
        ),
    }


def open_rival(folder: Path, note: Note, threads: int) -> OpenVinoModel:
    """Open a graph.

    Args:
        folder: Where it is.
        note: The note beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return OpenVinoModel(
        folder,
        vocabulary_size=note.vocabulary_size,
        context_length=note.context_length,
        threads=threads,
        properties={name: note.settings[name] for name in EXACT if name in note.settings},
    )


class OpenVinoModel(GreedyEngine):
    """A graph that OpenVINO GenAI runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int

    def __init__(
        self,
        folder: Path,
        *,
        vocabulary_size: int,
        context_length: int,
        threads: int,
        properties: dict[str, str],
    ) -> None:
        """Open a folder.

        Args:
            folder: Of its intermediate representation.
            vocabulary_size: Number of logits of the model.
            context_length: Context of the model in tokens.
            threads: Threads to compute with.
            properties: Further properties of the CPU plugin, by name.

        Raises:
            FolderError: If it cannot be opened.
        """
        self._genai = import_library("openvino_genai", "openvino-genai")
        self._openvino = import_library("openvino", "openvino")
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self._folder = folder
        self._properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **properties}
        self._scorer: Any = None
        self._requests = 0
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = _NO_LIMIT
        try:
            self._pipeline = self._genai.ContinuousBatchingPipeline(
                str(folder), scheduler, _DEVICE, self._properties
            )
        except RuntimeError as error:
            raise FolderError(f"openvino-genai cannot open {folder}: {one_line(error)}") from error

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V); position t scores the token at t + 1.
        """
        if self._scorer is None:
            graph = self._openvino.Core().compile_model(
                str(self._folder / MODEL_FILE), _DEVICE, self._properties
            )
            self._scorer = graph.create_infer_request()
            self._inputs = {name for port in graph.inputs for name in port.get_names()}
        scores = np.empty((*ids.shape, self.vocabulary_size), np.float32)
        for row, tokens in enumerate(ids):
            self._scorer.reset_state()
            inputs = {
                "input_ids": tokens[None],
                "attention_mask": np.ones((1, len(tokens)), np.int64),
                "position_ids": np.arange(len(tokens))[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            self._scorer.infer({name: inputs[name] for name in self._inputs & set(inputs)})
            scores[row] = self._scorer.get_tensor("logits").data[0]
        return scores

    def _greedily(self, prompt: list[int], count: int) -> Iterator[int]:
        if count == 0:
            return
        settings = self._genai.GenerationConfig()
        settings.do_sample = False
        settings.ignore_eos = True
        settings.set_eos_token_id(0)  # of no effect, but without any it is refused
        settings.max_new_tokens = count
        self._requests += 1
        ids = self._openvino.Tensor(np.array([prompt], np.int64))
        writing = self._pipeline.add_request(self._requests, ids, settings)
        try:
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                while writing.can_read():
                    for written in writing.read().values():
                        yield from written.generated_ids
        finally:
            writing.cancel()
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
