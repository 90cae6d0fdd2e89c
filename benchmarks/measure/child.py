"""A process that opens one folder and does nothing else, so that its memory is that of the model.

Started as ``python -m benchmarks.measure.child FOLDER``. It reads one JSON object per line from
stdin and answers each with one on stdout, until stdin ends:

    {"do": "prepare"}                                      import what the folder needs
    {"do": "open"}                                         load the model
    {"do": "turn", "prompt": [...], "new_tokens": 48, "seconds": 5.0}
                                                           read, write, and return the times
    {"do": "score", "ids": [...], "kept": [...], "write": PATH, "against": [PATH, ...]}
                                                           losses; distances from stored logits
    {"do": "memory"}                                       the kernel's count of this process

An answer with the key ``error`` says what went wrong. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.figures.energy import EnergyMeter
from benchmarks.figures.fidelity import agreements, divergences
from benchmarks.figures.footprint import own_memory
from benchmarks.figures.latency import (
    FEWEST_TOKENS,
    SETTLE_SECONDS,
    Turn,
    time_turn,
    turn_from_ticks,
)
from benchmarks.figures.passages import Passage
from benchmarks.figures.perplexity import token_losses
from benchmarks.rivals.engines import Note, describe, open_rival
from mistill.engine.language_model import LanguageModel, Provider
from mistill.engine.opening import open_model
from mistill.folders.folder import open_folder

# transformers imports what a name needs when it is first asked for that name.
_PYTORCH = (
    ("torch", "nn"),
    ("transformers", "LlamaForCausalLM"),
    ("mistill.engine.pytorch_model", "PytorchModel"),
)
_LIBRARIES: dict[str, tuple[tuple[str, str], ...]] = {
    "model": _PYTORCH,
    "gptq": _PYTORCH,
    "nf4": (*_PYTORCH, ("bitsandbytes", "nn")),
    "onnx": (("mistill.engine.onnx_model", "OnnxModel"),),
}


class Worker:
    """Opens one folder and takes measurements on request.

    Attributes:
        folder: The folder.
        threads: Threads that its engine computes with.
        note: What runs a rival's files; None for a folder of ours.
        provider: Execution provider, if it is an ONNX folder.
    """

    folder: Path
    threads: int
    note: Note | None
    provider: Provider

    def __init__(
        self, folder: Path, threads: int, note: Note | None = None, provider: Provider = "cpu"
    ) -> None:
        """Name a folder; nothing is loaded yet.

        Args:
            folder: The folder.
            threads: Threads that its engine computes with.
            note: What runs a rival's files; None for a folder of ours.
            provider: Execution provider, if it is an ONNX folder.
        """
        self.folder = folder
        self.provider = provider
        self.note = note
        self.threads = threads
        self._model: LanguageModel | None = None
        self._meter = EnergyMeter()

    @property
    def model(self) -> LanguageModel:
        """The running model, once it is open."""
        assert self._model is not None, "the first request is to open the model"
        return self._model

    def prepare(self) -> dict[str, Any]:
        """Import the libraries that the folder needs, so that they do not count as loading time.

        Returns:
            The form of the folder; of a rival, its description too.
        """
        note = self.note
        if note is not None:
            return {"form": note.engine, **describe(note.engine, note.library)}
        form = open_folder(self.folder).form
        for library, name in _LIBRARIES[form]:
            # What is missing is for open_model to say, in words.
            if importlib.util.find_spec(library.partition(".")[0]):
                getattr(importlib.import_module(library), name)
        return {"form": form}

    def open(self) -> dict[str, Any]:
        """Load the model.

        Returns:
            How long it took, and the number of logits.
        """
        start = time.perf_counter()
        if self.note is None:
            form = open_folder(self.folder).form
            provider = self.provider if form == "onnx" else "cpu"
            self._model = open_model(self.folder, threads=self.threads, provider=provider)
        else:
            self._model = open_rival(self.note, self.threads)
        seconds = time.perf_counter() - start
        return {"load_seconds": seconds, "vocabulary_size": self.model.vocabulary_size}

    def turn(
        self, prompt: list[int], new_tokens: int, seconds: float, transformers: bool = False
    ) -> dict[str, Any]:
        """Wait until the previous engine's threads are idle, then read a prompt and write.

        Args:
            prompt: Token ids.
            new_tokens: Tokens to write.
            seconds: Time after which a slow model stops.
            transformers: Write with transformers' own generate instead of our loop.

        Returns:
            The times.
        """
        reserve = getattr(self.model, "reserve", None)
        if reserve is not None:  # of a rival, called beforehand as its own benchmark does
            reserve(len(prompt) + new_tokens)
        time.sleep(SETTLE_SECONDS)
        if transformers:
            turn = time_generate(self.model, prompt, new_tokens=new_tokens, seconds=seconds)
        else:
            turn = time_turn(
                self.model,
                prompt,
                new_tokens=new_tokens,
                seconds=seconds,
                clock=time.perf_counter,
                meter=self._meter,
            )
        return asdict(turn)

    def score(
        self,
        ids: list[int],
        kept: list[bool],
        write: str | None = None,
        against: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Predict a passage.

        Args:
            ids: Token ids of the passage.
            kept: Which of the tokens after the first are scored.
            write: File to store the logits of the scored positions in.
            against: Files with other models' logits of those positions.

        Returns:
            The loss of each token and, for each of the files, its divergence and agreement.
        """
        passage = Passage(np.asarray(ids, np.int64), np.asarray(kept, bool))
        logits = self.model.logits(passage.ids[None])[0, :-1][passage.kept]
        scores: dict[str, Any] = {"losses": token_losses(logits, passage.targets).tolist()}
        if write is not None:
            np.save(write, logits)
        others = [np.load(file, mmap_mode="r") for file in against]
        scores["divergences"] = [divergences(other, logits).tolist() for other in others]
        scores["agreements"] = [agreements(other, logits).astype(int).tolist() for other in others]
        return scores

    def memory(self) -> dict[str, Any]:
        """Memory of this process.

        Returns:
            Its peak and present size.
        """
        return asdict(own_memory())

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Answer a request in this process; see ``Scorer.ask``."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "prepare": self.prepare,
            "open": self.open,
            "turn": self.turn,
            "score": self.score,
            "memory": self.memory,
        }
        return actions[do](**arguments)


class _Stopwatch:
    """A streamer of transformers that notes when every token arrives."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: object) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass

    def elapsed(self) -> float:
        return self.ticks[-1] - self.ticks[0]


def time_generate(model: Any, prompt: Sequence[int], *, new_tokens: int, seconds: float) -> Turn:
    """Let transformers' own greedy ``generate`` write, and note when every token arrives.

    Args:
        model: A PyTorch model of ours, whose ``model`` is that of transformers.
        prompt: Token ids.
        new_tokens: Tokens to write, the first one included; the end of a turn does not stop it.
        seconds: A slow model stops after this long, but never before 8 tokens.

    Returns:
        The times.
    """
    import torch

    ids = torch.tensor([list(prompt)])
    stopwatch = _Stopwatch()

    def late(written: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        enough = written.shape[1] - len(prompt) >= FEWEST_TOKENS
        return torch.tensor([enough and stopwatch.elapsed() > seconds])

    with torch.inference_mode():
        model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            stopping_criteria=[late],
            streamer=stopwatch,
        )
    # generate hands the prompt to the streamer first, just before it computes.
    return turn_from_ticks(len(prompt), stopwatch.ticks)


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more.

    Args:
        worker: Answers the requests.
        requests: One JSON object per line.
        answers: One JSON object per line.
    """
    for line in requests:
        try:
            answer = worker.ask(**json.loads(line))
        except Exception as error:  # all of it, traceback included, is for the parent to raise
            answer = {
                "error": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve one folder on stdin and stdout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure.child")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--rival", type=Note.from_json)
    arguments = parser.parse_args()
    # Libraries print; the answers get a channel of their own, and everything else goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        worker = Worker(arguments.folder, arguments.threads, arguments.rival, arguments.provider)
        serve(worker, sys.stdin, answers)


if __name__ == "__main__":
    main()
