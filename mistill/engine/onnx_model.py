"""An ONNX folder as a running model.

ONNX Runtime runs the graph; this file manages its inputs. The KV cache is one buffer for each
layer, which the graph reads and extends in place, so that a step copies nothing. The cache is also
a prefix cache: a new prompt is read from where it first differs from the last text. A text that is
being written keeps its cache while others are read, so that several may be written in turn.

It is one file because the loops, their caches and the binding share one lock.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import get_args
from weakref import WeakKeyDictionary, ref

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mistill.cost_model.processors import MOST_THREADS, usable_threads
from mistill.engine import key_value_cache
from mistill.engine.key_value_cache import KeyValueCache, common_prefix
from mistill.engine.language_model import Choose, Provider, greedy
from mistill.engine.onnx_session import (
    check_graph,
    check_provider,
    graph_fingerprint,
    open_session,
    run_bound,
)
from mistill.engine.saved_cache import read_cache, write_cache
from mistill.errors import ContextError, FolderError
from mistill.folders.folder import open_folder
from mistill.settings import require, require_range

CHUNK = 128
"""Positions of a prompt that are read at once; more are not faster and delay interrupts."""


def chunk_size(left: int, most: int | None = None) -> int:
    """How many positions of a prompt are read next.

    ONNX Runtime computes the attention of a position that is read alone on another path, with
    other rounding than that of positions that are read together; and some of its products take two
    positions at a time, and round the last of an odd number otherwise. So chunks are even where
    more follows, and none has one position: what a prompt predicts does not depend on where it is
    cut, up to its last position.

    Args:
        left: Positions that are not read yet, at least 1.
        most: Most positions to read at once; None takes ``CHUNK``.

    Returns:
        At least 2 where two are left and three may be read.
    """
    size = min(most or CHUNK, left)
    if size < left and size > 2:
        size -= size % 2
        size -= 2 * (left - size == 1 and size > 2)
    return size


class Reader:
    """Stands for a loop that reads one growing text; while it lives, the text keeps its cache."""


class OnnxModel:
    """A model that ONNX Runtime runs on the processor; meets ``LanguageModel``.

    Attributes:
        folder: The ONNX folder.
        vocabulary_size: Number of logits per position, V.
        context_length: Most positions that it can hold at once.
        threads: Threads that it computes with.
        provider: Execution provider.
        alone: Whether it was opened to compute with no other model in turn.
        session: ONNX Runtime's session of the graph.
    """

    folder: Path
    vocabulary_size: int
    context_length: int
    threads: int
    provider: Provider
    alone: bool
    session: onnxruntime.InferenceSession

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        provider: Provider = "cpu",
        alone: bool = True,
    ) -> None:
        """Open an ONNX folder.

        Args:
            folder: Path of the folder.
            threads: Threads to compute with; None takes the processors that this process may use.
            context: Most positions to hold at once; None takes what the model was made for.
            provider: ``cpu``, or ``cuda``, ``tensorrt``, ``coreml`` or ``directml`` where ONNX
                Runtime has them.
            alone: Whether no other model computes in turn with this one, token by token, as a
                draft does. Between two steps the threads of a model that is alone keep their
                processors busy, so as to begin the next one at once; another model's steps would
                take twice as long meanwhile.

        Raises:
            FolderError: If the folder is broken or holds another form of model.
            MissingExtraError: If ONNX Runtime has no such provider here.
        """
        info = open_folder(folder)
        if info.form != "onnx":
            raise FolderError(
                f"{folder} is {info.kind}, not an ONNX folder; export it with: mistill export"
            )
        require_range("threads", threads, 1, MOST_THREADS)
        require(
            context is None or 1 <= context <= info.context_length,
            f"context must be between 1 and the model's {info.context_length}, not {context}",
        )
        require(
            provider in get_args(Provider),
            f"provider must be one of {', '.join(get_args(Provider))}, not {provider!r}",
        )
        check_provider(provider)
        self.folder = info.path
        self.provider = provider
        self.alone = alone
        self.vocabulary_size = info.vocabulary_size
        self.context_length = context or info.context_length
        self.threads = threads or usable_threads()
        self.session = open_session(info.path, self.threads, provider, alone)
        check_graph(self.session, info.path, info.layers, info.vocabulary_size)
        # The cache that the graph is bound to, the loop whose text it holds, and the caches of
        # other loops. Weak, so that a loop that nobody runs any more needs no end.
        self._cache = self._new_cache()
        self._reader: ref[Reader] | None = None
        self._kept: WeakKeyDictionary[Reader, KeyValueCache] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._binding = self.session.io_binding()
        # The bound cache and tokens; False or None while a binding changes, so that an interrupt
        # between two bindings cannot leave the graph writing to freed memory.
        self._bound_cache = False
        self._bound_tokens: NDArray[np.int64] | None = None
        self._ones = np.ones((1, self.context_length), np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._next_logits = np.empty((1, 1, self.vocabulary_size), np.float32)
        self._last_position = np.array([-1], np.int64)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        if ids.ndim != 2:
            raise ValueError(f"ids must have the shape (B, T), not {ids.shape}")
        rows = [self.checked(row.tolist()) for row in ids]
        scores = np.empty((*ids.shape, self.vocabulary_size), np.float32)
        with self._lock:
            self._turn_to(None, [])
            for row, tokens in enumerate(rows):
                self._cache.rewind(0)
                start = 0
                while start < len(tokens):
                    end = start + chunk_size(len(tokens) - start)
                    self._score(tokens[start:end], scores[row : row + 1, start:end])
                    start = end
        return scores

    def stream(
        self, ids: Sequence[int], choose: Choose = greedy, *, repeatable: bool = False
    ) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``.

        Args:
            ids: The prompt.
            choose: Picks a token from the logits (V,) of the last position.
            repeatable: Whether the tokens must depend on the prompt alone, to the last bit of their
                logits, and not on what was read or written before. ONNX Runtime rounds otherwise
                where it writes a token than where it reads one, so that earlier replies are then
                read again; see ``Job.repeatable``.

        Returns:
            Token ids, one at a time.
        """
        return self._write(self.checked(ids), choose, repeatable)

    def read(self, ids: Sequence[int], positions: int = 1) -> NDArray[np.float32]:
        """Scores of the next token at the last positions of a text.

        The prefix that the text shares with the last one is in the KV cache and not read again.

        Args:
            ids: The text, at least one token.
            positions: Of how many of its last positions to give the scores; more than one are
                read at once, which costs little more than one.

        Returns:
            Shape (positions, V), the caller's own.

        Raises:
            ValueError: If the text is empty or holds an id that is not in the vocabulary, or is
                shorter than the positions asked for.
            ContextError: If it exceeds the context.
        """
        tokens = self.checked(ids)
        if not 1 <= positions <= len(tokens):
            raise ValueError(f"positions must be between 1 and {len(tokens)}, not {positions}")
        return self.follow(Reader(), tokens, positions)

    def follow(self, reader: Reader, tokens: list[int], positions: int = 1) -> NDArray[np.float32]:
        """Like ``read``, for a loop that reads one growing text over and over.

        Args:
            reader: Stands for the loop. Between two calls with the same reader, only the last
                positions of the earlier text may change.
            tokens: Tokens that ``checked`` returned, and tokens that the model wrote.
            positions: Of how many of the last positions to give the scores.

        Returns:
            Shape (positions, V), the caller's own.
        """
        scores = np.empty((1, positions, self.vocabulary_size), np.float32)
        with self._lock:
            self._turn_to(reader, tokens[:-positions])
            self._cache.rewind(len(tokens) - positions)
            if positions == 1:
                self._read_on(tokens)
                scores[:] = self._next_logits
            else:
                self._read_on(tokens[:-positions])
                self._read(tokens[-positions:], scores)
        return scores.reshape(positions, -1)

    def save_cache(self, file: str | Path, **notes: str) -> Path:
        """Save the KV cache, so that another process need not read the text again.

        Args:
            file: A safetensors file to write; replaced if it exists.
            **notes: Texts to keep with it, by name.

        Returns:
            The file.
        """
        with self._lock:
            return write_cache(
                Path(file),
                self._cache.ids,
                self._cache.used(),
                read_together=self._cache.read_together,
                model=self.folder.name,
                fingerprint=graph_fingerprint(self.folder),
                notes=notes,
            )

    def restore_cache(self, file: str | Path) -> dict[str, str]:
        """Load a KV cache that ``save_cache`` wrote, as a prefix cache for later texts.

        Args:
            file: Path of the file.

        Returns:
            The notes that were kept with it.

        Raises:
            FolderError: If the file is damaged, or was written for another model.
            ContextError: If it holds more tokens than the context.
        """
        saved = read_cache(
            Path(file), model=self.folder.name, fingerprint=graph_fingerprint(self.folder)
        )
        if len(saved.ids) > self.context_length:
            raise ContextError(
                f"{file} holds {len(saved.ids)} tokens and the context only {self.context_length}; "
                "open the model with a longer context"
            )
        sound = all(0 <= token < self.vocabulary_size for token in saved.ids)
        if not (sound and self._cache.fits(saved.ids, saved.values)):
            raise FolderError(
                f"{file} is damaged: its tokens, keys and values do not fit this model's graph"
            )
        with self._lock:
            self._turn_to(None, [])
            self._cache.restore(saved.ids, saved.values, saved.read_together)
        return saved.notes

    def checked(self, ids: Sequence[int]) -> list[int]:
        """A text as a list of its own, if the model can read it.

        Args:
            ids: Token ids.

        Returns:
            The same.

        Raises:
            ValueError: If it is empty or holds an id that is not in the vocabulary.
            ContextError: If it exceeds the context.
        """
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

    def _write(
        self, tokens: list[int], choose: Choose, repeatable: bool
    ) -> Generator[int, None, None]:
        reader: Reader | None = Reader()
        # Read again: the last token, because its logits are needed, and in pairs the one before.
        prefix = tokens[: -2 if repeatable else -1]
        try:
            while len(tokens) < self.context_length:
                with self._lock:
                    self._turn_to(reader, prefix, repeatable)
                    self._read_on(tokens, repeatable)
                    prefix, repeatable = [], False
                    token = choose(self._next_logits[0, 0])
                tokens.append(token)
                yield token
        finally:
            reader = None  # an exception may keep this frame

    def _turn_to(
        self, reader: Reader | None, prefix: Sequence[int], repeatable: bool = False
    ) -> None:
        """Take the cache of a loop, or for a loop that begins one with what its text shares.

        Args:
            reader: The loop; None for a text that is read once.
            prefix: What a loop that begins may find in the cache and need not read.
            repeatable: Whether only positions that were read in pairs may be taken over.
        """
        last = None if self._reader is None else self._reader()
        if reader is not None and last is reader:
            return
        before = self._cache
        if last is not None:
            # In this order, so that an interrupt leaves no loop with the text of another.
            self._kept[last] = before
            self._unbind()
            self._cache = self._new_cache()
        self._reader = None
        if reader is not None and reader in self._kept:
            self._unbind()
            self._cache = self._kept.pop(reader)
        else:
            shared = common_prefix(before.ids, prefix)
            if repeatable:
                shared = min(shared, before.read_together)
                shared -= shared % 2
            if last is None:
                before.rewind(shared)
            elif before.window is None:
                self._cache.copy(before, shared)
        self._reader = None if reader is None else ref(reader)

    def _new_cache(self) -> KeyValueCache:
        # Buffers of CoreML and DirectML are in the processor's memory; ONNX Runtime copies them.
        on_gpu = self.provider in ("cuda", "tensorrt")
        device: key_value_cache.Device = "cuda" if on_gpu else "cpu"
        return KeyValueCache(self.session, self.context_length, device, self._unbind)

    def _read_on(self, tokens: list[int], repeatable: bool = False) -> None:
        """Read the tokens of a text that the cache lacks, for the logits of the last one."""
        self._cache.reserve(len(tokens))
        while (start := len(self._cache.ids)) < len(tokens):
            size = chunk_size(len(tokens) - start)
            if repeatable and start + size == len(tokens):
                self._read_in_pairs(tokens[start:])
            else:
                self._read(tokens[start : start + size], self._next_logits)

    def _read_in_pairs(self, tokens: list[int]) -> None:
        """Read the end of a prompt as an even number of positions, for the logits of its last."""
        end = len(self._cache.ids) + len(tokens)
        odd = len(tokens) % 2
        if odd and (end == self.context_length or not self._cache.can_take_back(end)):
            self._read(tokens, self._next_logits)
            return
        scores = np.empty((1, 2, self.vocabulary_size), np.float32)
        self._read([*tokens, tokens[-1]] if odd else tokens, scores)
        self._next_logits[:] = scores[:, :1] if odd else scores[:, 1:]
        self._cache.rewind(end)

    def _score(self, tokens: list[int], scores: NDArray[np.float32]) -> None:
        """Read tokens in pairs, so that they have the scores that they have in a longer text."""
        end = len(self._cache.ids) + len(tokens)
        if len(tokens) % 2 == 0 or end == self.context_length:
            self._read(tokens, scores)
            return
        paired = np.empty((1, len(tokens) + 1, self.vocabulary_size), np.float32)
        self._read([*tokens, tokens[-1]], paired)
        scores[:] = paired[:, :-1]
        self._cache.rewind(end)

    def _read(self, tokens: list[int], scores: NDArray[np.float32]) -> None:
        """Run the graph over the tokens that follow those in the cache.

        Args:
            tokens: At most as many as the context has room for.
            scores: Where the logits of the last positions go, shape (1, T or fewer, V); for one
                position it is ``self._next_logits``.
        """
        end = len(self._cache.ids) + len(tokens)
        self._cache.reserve(end)
        self._bind_cache()
        step = len(tokens) == 1 and scores is self._next_logits
        inputs = self._token if step else np.empty((1, len(tokens)), np.int64)
        self._bind_tokens(inputs, scores)
        self._binding.bind_cpu_input("attention_mask", self._ones[:, :end])
        inputs[0] = tokens
        run_bound(self.session, self._binding)
        if scores is not self._next_logits:
            scores[:] = self._binding.get_outputs()[-1].numpy()
        self._cache.extend(tokens)

    def _bind_cache(self) -> None:
        """Let the graph read and extend the cache in place."""
        if not self._bound_cache:
            for name, value in self._cache.values.items():
                self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                self._binding.bind_ortvalue_output(f"present.{name}", value)
            self._bound_cache = True

    def _unbind(self) -> None:
        """Release the buffers of the cache, which is about to move."""
        self._bound_cache, self._bound_tokens = False, None
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

    def _bind_tokens(self, inputs: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Bind tokens and logits, unless they are bound since the last step."""
        if self._bound_tokens is not inputs:
            self._bound_tokens = None
            last = scores is self._next_logits
            self._bind("input_ids", inputs)
            first = self._last_position if last else np.array([-scores.shape[1]], np.int64)
            self._bind("first_logit", first)
            # Bound after the cache, so that it is the last output. The graph declares one position,
            # its default; for more, ONNX Runtime must allocate the output.
            if last:
                self._binding.bind_ortvalue_output("logits", key_value_cache.as_value(scores))
            else:
                self._binding.bind_output("logits")
            self._bound_tokens = inputs

    def _bind(self, name: str, array: NDArray[np.int64]) -> None:
        self._binding.bind_ortvalue_input(name, key_value_cache.as_value(array))
