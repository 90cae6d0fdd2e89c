"""An ONNX folder as a running model.

ONNX Runtime runs the graph; this file decides what it works on. The keys and values of the tokens
read so far stay in one buffer for each layer, which the graph reads and extends in place, so that
a step copies nothing and costs what its arithmetic costs. Taking tokens back is forgetting how
many of the buffer's positions count, so a new conversation starts where it first differs from the
last one.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mistill.errors import ContextError, FolderError
from mistill.folder import MANIFEST_FILE, open_folder, read_json
from mistill.language_model import Choose, greedy
from mistill.processors import usable_threads
from mistill.settings import require

CHUNK = 128
"""Positions of a prompt that are read at once; more are not faster, and an interrupt must wait."""

FIRST_CAPACITY = 512
"""Positions that the cache has room for at first."""

_CACHE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class OnnxModel:
    """A model that ONNX Runtime runs on the processor; meets ``LanguageModel``.

    Attributes:
        folder: The ONNX folder.
        vocabulary_size: Number of logits per position, V.
        context_length: Most positions that it can hold at once.
        threads: Threads that it computes with.
    """

    folder: Path
    vocabulary_size: int
    context_length: int
    threads: int

    def __init__(
        self, folder: str | Path, *, threads: int | None = None, context: int | None = None
    ) -> None:
        """Open an ONNX folder.

        Args:
            folder: The folder.
            threads: Threads to compute with; None takes the processors that this process may use.
            context: Most positions to hold at once; None takes what the model was made for.

        Raises:
            FolderError: If the folder is broken or holds another form of model.
        """
        info = open_folder(folder)
        if info.form != "onnx":
            raise FolderError(
                f"{folder} is a {info.form} folder, not an ONNX folder; make one of it with: "
                "mistill export"
            )
        require(threads is None or threads >= 1, f"threads must be 1 or more, not {threads}")
        require(
            context is None or 1 <= context <= info.context_length,
            f"context must be between 1 and the model's {info.context_length}, not {context}",
        )
        self.folder = info.path
        self.vocabulary_size = info.vocabulary_size
        self.context_length = context or info.context_length
        self.threads = threads or usable_threads()
        self._session = _open_session(info.path, self.threads)
        _check_graph(self._session, info.path, info.layers)
        self._cache = KeyValueCache(self._session, self.context_length)
        self._reader: object = None
        self._lock = threading.Lock()
        self._binding = self._session.io_binding()
        # What the binding points at now, and None while it is being changed: an interrupt between
        # two bindings must not leave the graph writing into memory that is gone.
        self._bound_cache: dict[str, onnxruntime.OrtValue] | None = None
        self._bound_tokens: NDArray[np.int64] | None = None
        self._ones = np.ones((1, self.context_length), np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._next_logits = np.empty((1, 1, self.vocabulary_size), np.float32)
        self._last_position = np.array([-1], np.int64)
        self._every_position = np.array([0], np.int64)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V); position t scores the token at t + 1.

        Raises:
            ValueError: If the ids have another shape, or one is not in the vocabulary.
            ContextError: If T exceeds the context.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids must have the shape (B, T), not {ids.shape}")
        rows = [self._checked(row.tolist()) for row in ids]
        scores = np.empty((*ids.shape, self.vocabulary_size), np.float32)
        with self._lock:
            self._reader = None
            for row, tokens in enumerate(rows):
                self._cache.rewind(0)
                for start in range(0, len(tokens), CHUNK):
                    end = min(start + CHUNK, len(tokens))
                    self._read(tokens[start:end], scores[row : row + 1, start:end])
        return scores

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after the ids given, one at a time, until the context is full.

        What the prompt shares with the text that was read last is not read again.

        Args:
            ids: The prompt, at least one token.
            choose: Picks a token from the logits (V,) of the last position, which the next step
                overwrites.

        Returns:
            An iterator over token ids, which ends when the prompt and they fill the context.

        Raises:
            ValueError: If the prompt is empty or holds an id that is not in the vocabulary.
            ContextError: If it exceeds the context.
        """
        return self._write(self._checked(ids), choose)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in ids]
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary_size:
            raise ValueError(
                f"token ids must lie between 0 and {self.vocabulary_size - 1}, got "
                f"{min(tokens)} to {max(tokens)}"
            )
        if len(tokens) > self.context_length:
            raise ContextError(
                f"the text has {len(tokens)} tokens and the context holds {self.context_length}; "
                "give a shorter one"
            )
        return tokens

    def _write(self, tokens: list[int], choose: Choose) -> Generator[int, None, None]:
        reader = object()
        while len(tokens) < self.context_length:
            with self._lock:
                if self._reader is not reader:
                    # Something else was read since: go back to where the two texts part. The
                    # last token is always read again, because its logits are what is asked for.
                    self._cache.rewind(common_prefix(self._cache.ids, tokens[:-1]))
                    self._reader = reader
                for start in range(len(self._cache.ids), len(tokens), CHUNK):
                    self._read(tokens[start : start + CHUNK], self._next_logits)
                token = choose(self._next_logits[0, 0])
            tokens.append(token)
            yield token

    def _read(self, tokens: list[int], scores: NDArray[np.float32]) -> None:
        """Run the graph over the tokens that follow those in the cache.

        Args:
            tokens: At most as many as the context has room for.
            scores: Where the logits go: of every position, shape (1, T, V), or of the last one
                if it is ``self._next_logits``.
        """
        end = len(self._cache.ids) + len(tokens)
        self._cache.reserve(end)
        self._bind_cache()
        step = len(tokens) == 1 and scores is self._next_logits
        inputs = self._token if step else np.empty((1, len(tokens)), np.int64)
        self._bind_tokens(inputs, scores)
        self._binding.bind_cpu_input("attention_mask", self._ones[:, :end])
        inputs[0] = tokens
        self._session.run_with_iobinding(self._binding)
        if scores is not self._next_logits:
            scores[:] = self._binding.get_outputs()[-1].numpy()
        self._cache.ids += tokens

    def _bind_cache(self) -> None:
        """Let the graph read and extend the cache in place."""
        values = self._cache.values
        if self._bound_cache is not values:
            self._bound_cache = None
            for name, value in values.items():
                self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                self._binding.bind_ortvalue_output(f"present.{name}", value)
            self._bound_cache = values

    def _bind_tokens(self, inputs: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Let the graph read tokens and write logits; nothing changes from step to step."""
        if self._bound_tokens is not inputs:
            self._bound_tokens = None
            last = scores is self._next_logits
            self._bind("input_ids", inputs)
            self._bind("first_logit", self._last_position if last else self._every_position)
            # Bound after the cache, and so the last of the outputs. A graph declares one position,
            # as it gives by default; ONNX Runtime makes room for more only by itself.
            if last:
                self._binding.bind_ortvalue_output("logits", _value(scores))
            else:
                self._binding.bind_output("logits")
            self._bound_tokens = inputs

    def _bind(self, name: str, array: NDArray[np.int64]) -> None:
        self._binding.bind_ortvalue_input(name, _value(array))


class KeyValueCache:
    """Keys and values of the tokens read so far, one buffer for each tensor of each layer.

    A buffer has room for more positions than are used, and more room is made by doubling it:
    room for the whole context at once would cost a laptop gigabytes that most chats never use.

    Attributes:
        ids: The tokens whose keys and values are in the buffers.
        values: The buffers by name, such as ``0.key``; a new dictionary when they have moved.
        context_length: Most positions there can be.
    """

    ids: list[int]
    values: dict[str, onnxruntime.OrtValue]
    context_length: int

    def __init__(self, session: onnxruntime.InferenceSession, context_length: int) -> None:
        """Make an empty cache for a graph.

        Args:
            session: The graph, whose inputs say how large a position is.
            context_length: Most positions there can be.
        """
        self.ids = []
        self.values = {}
        self.context_length = context_length
        self._capacity = 0
        self._arrays: dict[str, NDArray[Any]] = {}
        self._shapes = {
            entry.name.removeprefix("past_key_values."): (entry.shape, _CACHE_TYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }

    @property
    def size_bytes(self) -> int:
        """Memory that the buffers take."""
        return sum(array.nbytes for array in self._arrays.values())

    def rewind(self, count: int) -> None:
        """Forget all but the first tokens; what comes next overwrites their keys and values.

        Args:
            count: How many tokens to keep.
        """
        del self.ids[count:]

    def reserve(self, positions: int) -> None:
        """Make room for this many positions, and keep what is there.

        Args:
            positions: At most ``context_length``.
        """
        if positions <= self._capacity:
            return
        capacity = max(self._capacity, min(FIRST_CAPACITY, self.context_length))
        while capacity < positions:
            capacity = min(2 * capacity, self.context_length)
        used = len(self.ids)
        arrays = {}
        for name, (shape, kind) in self._shapes.items():
            arrays[name] = np.empty((1, shape[1], capacity, shape[3]), kind)
            if used:
                arrays[name][:, :, :used] = self._arrays[name][:, :, :used]
        self.values = {name: _value(array) for name, array in arrays.items()}
        self._arrays = arrays
        self._capacity = capacity


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share from the start.

    Args:
        first: Token ids.
        second: Token ids.

    Returns:
        At most the length of the shorter one.
    """
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return shared


def verify(folder: str | Path) -> None:
    """Compare every file of an ONNX folder with the checksums that it was exported with.

    Opening a folder compares sizes only, which takes no time; this reads every byte.

    Args:
        folder: The folder.

    Raises:
        FolderError: If a file is missing or differs; the message names all of them.
    """
    path = open_folder(folder).path
    changed = []
    for name, entry in read_json(path / MANIFEST_FILE)["files"].items():
        with (path / name).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
                changed.append(name)
    if changed:
        raise FolderError(
            f"{folder} is damaged: {', '.join(changed)} differ from the checksums in "
            f"{MANIFEST_FILE}; export it again"
        )


def _value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """An array as ONNX Runtime sees it: the same memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _open_session(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FolderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {folder / 'model.onnx'}: {reason}"
        ) from error


def _check_graph(session: onnxruntime.InferenceSession, folder: Path, layers: int) -> None:
    """Refuse a graph whose inputs and outputs are not those that this engine binds."""
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = {entry.name: entry.type for entry in session.get_inputs()}
    optional = {entry.name for entry in session.get_overridable_initializers()}
    outputs = {entry.name for entry in session.get_outputs()}
    wanted = {"input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)}
    wrong = [f"the input {name} is missing" for name in sorted(wanted - inputs.keys())]
    wrong += [f"the input {name} is not known" for name in sorted(inputs.keys() - wanted)]
    wrong += [
        f"the input {name} is a {inputs[name]}"
        for name in sorted(wanted & inputs.keys())
        if inputs[name] not in (_CACHE_TYPES if name.startswith("past") else ("tensor(int64)",))
    ]
    if "first_logit" not in optional:
        wrong.append("the optional input first_logit is missing")
    wanted = {"logits", *(f"present.{part}" for part in parts)}
    wrong += [f"the output {name} is missing" for name in sorted(wanted - outputs)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if wrong[4:] else ""
        raise FolderError(
            f"{folder / 'model.onnx'} is not a graph that this engine runs: "
            f"{', '.join(wrong[:4])}{more}; make it with: mistill export"
        )
