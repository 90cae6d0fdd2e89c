"""What config.json says, where the weights beside it say otherwise.

Two entries contradict the weights of many published folders, and reading them as they stand gives
another model. A head that was trained on its own lies in the file while the config still ties it to
the embedding; and a padding token is -1, or the number after the last row of the embedding. Both
are settled as transformers settles them, once, where the config is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.gptq_format import EMBEDDING, HEAD
from mistill.folders.safetensors_file import StoredTensor, map_tensor
from mistill.folders.weight_files import tensor_homes, unread_index

# Architectures whose config class of transformers ties the tables unless told otherwise.
_TIED_BY_DEFAULT = ("smollm3",)

# What a table may be stored as: floats, and codes of GPTQ.
_PARTS = ("weight", "qweight", "qzeros", "scales", "g_idx")

# Numbers of a table that are compared at once.
_AT_ONCE = 1 << 22

_Home = tuple[Path, StoredTensor]


def settled_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose contradictions to the weights are settled.

    Args:
        folder: The folder of the config.
        config: Content of config.json.

    Returns:
        A copy: ``tie_word_embeddings`` is False where the files hold a head of its own, and
        ``pad_token_id`` is None where the embedding has no such row.
    """
    settled = dict(config)
    if _names_no_row(config):
        settled["pad_token_id"] = None
    if says_tied(config) and has_own_head(folder):
        settled["tie_word_embeddings"] = False
    return settled


def contradictions(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What was settled in a folder, in sentences.

    Args:
        folder: A model folder.
        config: Content of config.json, not settled.

    Returns:
        One sentence for each contradiction.
    """
    sentences = []
    if says_tied(config) and has_own_head(folder):
        sentences.append(
            "config.json ties the head to the embedding, but the file holds two tables that "
            "differ: the head is read from its own, as transformers does"
        )
    if _names_no_row(config):
        sentences.append(
            f"config.json names the padding token {config['pad_token_id']}, and the embedding has "
            f"{config.get('vocab_size')} rows: the model is read as one without a padding token"
        )
    index = unread_index(folder)
    if index is not None:
        sentences.append(
            f"{index} lies beside a single file of weights: the single file is read, as "
            "transformers does, and the index is not"
        )
    return sentences


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding.

    Args:
        config: Content of config.json.

    Returns:
        What it says, or what its architecture has where it says nothing.
    """
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT))


def has_own_head(folder: Path) -> bool:
    """Whether the files of a folder hold a head that differs from the embedding.

    Args:
        folder: A model folder.

    Returns:
        False if there is no such table, or both are equal.
    """
    if (folder / "model.onnx").is_file():
        return False
    try:
        homes = tensor_homes(folder)
    except (FolderError, OSError):
        return False  # whoever opens the folder lists what is wrong with its files
    embedding, head = (_table(homes, module) for module in (EMBEDDING, HEAD))
    if not embedding or not head:
        return False
    if embedding.keys() != head.keys():
        return True
    return any(
        _differ(*_with_file_state(embedding[part]), *_with_file_state(head[part]))
        for part in embedding
    )


def _names_no_row(config: Mapping[str, Any]) -> bool:
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if not isinstance(padding, int) or not isinstance(rows, int):
        return False  # whoever builds the model says what is wrong with them
    return not 0 <= padding < rows


def _table(homes: Mapping[str, _Home], module: str) -> dict[str, _Home]:
    parts = {part: homes.get(f"{module}.{part}") for part in _PARTS}
    return {part: home for part, home in parts.items() if home is not None}


def _with_file_state(home: _Home) -> tuple[Path, StoredTensor, tuple[int, int]]:
    """A tensor and what tells the state of its file apart from later ones."""
    status = home[0].stat()
    return (*home, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=64)
def _differ(
    file: Path,
    stored: StoredTensor,
    _state: tuple[int, int],
    other_file: Path,
    other: StoredTensor,
    _other_state: tuple[int, int],
) -> bool:
    """Whether two tensors hold different numbers."""
    if stored.shape != other.shape:
        return True
    ours = map_tensor(file, stored).reshape(-1)
    theirs = map_tensor(other_file, other).reshape(-1)
    for start in range(0, len(ours), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        if not np.array_equal(_numbers(ours[part], stored), _numbers(theirs[part], other)):
            return True
    return False


def _numbers(values: NDArray[Any], stored: StoredTensor) -> NDArray[Any]:
    if stored.dtype != "BF16":
        return values
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
