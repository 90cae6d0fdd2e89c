"""llama.cpp as a ``LanguageModel``, through the C functions of whichever build is at hand.

The functions are the same in the shared library of llama.cpp's own build, in llama-cpp-python and
in xllamacpp. Two structures of settings change from release to release: they are handled as blocks
of bytes that are larger than any of them, of which only the first three numbers of a context are
looked at; those are checked against their known defaults first. The settings are those of
llama.cpp's own ``llama-bench``: a cache in half precision, its own choice of flash attention,
batches of 2,048 in pieces of 512.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.engines import Note
from mistill.engine.language_model import Choose, greedy
from mistill.errors import FolderError, MissingExtraError

MODEL_FILE = "model.gguf"

# The first three numbers of llama_context_params: n_ctx, n_batch, n_ubatch.
_DEFAULTS = (512, 2048, 512)
_ROOM = 256
_SCORED_AT_ONCE = 128


class _Settings(ctypes.Structure):
    """Larger than llama_model_params and llama_context_params; passed on the stack like them."""

    _fields_ = (("words", ctypes.c_uint32 * _ROOM), ("align", ctypes.c_uint64))


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_print_system_info": (_TEXT, ()),
    "llama_model_default_params": (_Settings, ()),
    "llama_context_default_params": (_Settings, ()),
    "llama_model_load_from_file": (_POINTER, (_TEXT, _Settings)),
    "llama_init_from_model": (_POINTER, (_POINTER, _Settings)),
    "llama_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_n_ctx": (ctypes.c_uint32, (_POINTER,)),
    "llama_set_n_threads": (None, (_POINTER, _INT, _INT)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_batch_get_one": (_Batch, (_POINTER, _INT)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
}


def find_library() -> Path | None:
    """The library of llama.cpp in this Python.

    Returns:
        That of xllamacpp or else of llama-cpp-python; None if neither is installed.
    """
    for package, pattern in (("xllamacpp", "*.so"), ("llama_cpp", "lib/libllama.*")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob(pattern)):
                return file
    return None


def load_library(named: str) -> ctypes.CDLL:
    """Load llama.cpp.

    Args:
        named: Its library; empty for that of a package in this Python.

    Returns:
        Its functions.

    Raises:
        MissingExtraError: If there is none, or it lacks a function.
    """
    file = Path(named) if named else find_library()
    if file is None:
        raise MissingExtraError(
            "neither xllamacpp nor llama-cpp-python is installed here; install one with: "
            "pip install xllamacpp"
        )
    library = ctypes.CDLL(str(file))
    for name, (returns, takes) in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise MissingExtraError(f"{file.name} has no function {name}; take a newer llama.cpp")
        getattr(library, name).restype = returns
        getattr(library, name).argtypes = takes
    if hasattr(library, "ggml_backend_load_all"):
        library.ggml_backend_load_all()
    library.llama_backend_init()
    return library


def describe(library: str) -> dict[str, str]:
    """Version of the installed llama.cpp.

    Args:
        library: Its library; empty for that of a package in this Python.

    Returns:
        Its version, and the instructions that it reports.
    """
    loaded = load_library(library)
    return {
        "version": _version(loaded, library),
        "system": loaded.llama_print_system_info().decode(),
    }


def _version(loaded: ctypes.CDLL, library: str) -> str:
    versions = []
    if hasattr(loaded, "llama_version"):
        loaded.llama_version.restype = ctypes.c_char_p
        versions.append(loaded.llama_version().decode())
    if not library:
        from importlib.metadata import PackageNotFoundError, version

        for package in ("xllamacpp", "llama-cpp-python"):
            try:
                versions.append(f"{package} {version(package)}")
                break
            except PackageNotFoundError:
                continue
    return ", ".join(versions) or "not known"


def open_rival(folder: Path, note: Note, threads: int) -> LlamaCppModel:
    """Open a GGUF file.

    Args:
        folder: Where it is.
        note: The note beside it.
        threads: Threads to compute with.

    Returns:
        The running model.
    """
    return LlamaCppModel(
        folder / MODEL_FILE,
        threads=threads,
        context_length=note.context_length,
        library=note.library,
    )


class LlamaCppModel:
    """A GGUF file that llama.cpp runs; meets ``LanguageModel``.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int

    def __init__(self, file: Path, *, threads: int, context_length: int, library: str = "") -> None:
        """Open a file.

        Args:
            file: A GGUF file.
            threads: Threads to compute with.
            context_length: Most positions to hold at once; room is made when it is needed.
            library: llama.cpp's library; empty for that of a package in this Python.

        Raises:
            FolderError: If llama.cpp cannot open the file.
            MissingExtraError: If its settings are laid out otherwise than is known.
        """
        self._c = load_library(library)
        settings = self._c.llama_context_default_params()
        if tuple(settings.words[:3]) != _DEFAULTS:
            raise MissingExtraError(
                f"this llama.cpp's context begins with {tuple(settings.words[:3])} where "
                f"{_DEFAULTS} was expected; take a release of llama.cpp from 2024 to 2026"
            )
        self._model = self._c.llama_model_load_from_file(
            str(file).encode(), self._c.llama_model_default_params()
        )
        if not self._model:
            raise FolderError(f"llama.cpp cannot open {file}")
        vocabulary = self._c.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(self._c.llama_vocab_n_tokens(vocabulary))
        self.context_length = context_length
        self._threads = threads
        self._context: Any = None
        self.reserve(min(_DEFAULTS[0], context_length))

    def reserve(self, positions: int) -> None:
        """Make room for this many tokens; the cache of earlier texts is discarded.

        Args:
            positions: At most ``context_length``.
        """
        if self._context is not None:
            if positions <= int(self._c.llama_n_ctx(self._context)):
                return
            self._c.llama_free(self._context)
        settings = self._c.llama_context_default_params()
        settings.words[0] = positions
        self._context = self._c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise FolderError(f"llama.cpp makes no context of {positions} positions")
        self._c.llama_set_n_threads(self._context, self._threads, self._threads)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""
        self.reserve(ids.shape[1])
        scores = np.empty((*ids.shape, self.vocabulary_size), np.float32)
        for row, tokens in enumerate(ids):
            self._forget()
            for start in range(0, len(tokens), _SCORED_AT_ONCE):
                some = tokens[start : start + _SCORED_AT_ONCE]
                scores[row, start : start + len(some)] = self._read(some, len(some))
        return scores

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``."""
        self.reserve(len(ids))
        room = min(self.context_length, int(self._c.llama_n_ctx(self._context)))
        self._forget()
        return self._write(list(ids), choose, room)

    def _write(self, tokens: list[int], choose: Choose, room: int) -> Iterator[int]:
        position = 0
        while True:
            unread = np.asarray(tokens[position:], np.int32)
            position = len(tokens)
            for start in range(0, len(unread), _DEFAULTS[1]):
                scores = self._read(unread[start : start + _DEFAULTS[1]], 1)
            if position >= room:
                return
            tokens.append(choose(scores[0]))
            yield tokens[-1]

    def _forget(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def _read(self, tokens: NDArray[Any], scored: int) -> NDArray[np.float32]:
        """Read on; gives llama.cpp's own memory, (1, V) or one row for each of the tokens."""
        numbers = np.ascontiguousarray(tokens, np.int32)
        batch = self._c.llama_batch_get_one(numbers.ctypes.data, len(numbers))
        all_positions = np.ones(len(numbers), np.int8)
        if scored == len(numbers):
            batch.logits = all_positions.ctypes.data
        failed = self._c.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode ended with {failed}")
        logits = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (scored, self.vocabulary_size))
