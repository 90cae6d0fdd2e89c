"""Importance scores that were measured before, kept in the user's cache.

What a teacher makes of a text does not change, and students of several sizes are often cut from
one teacher. Scores lie in ``$XDG_CACHE_HOME/mistill/scores`` (``~/.cache/mistill/scores``), a
small safetensors file each, under a name made of the teacher's fingerprint and of the text's
tokens. A file appears whole or not at all. One that is damaged is said to be and measured anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistill.folders.lineage import fingerprint

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks

logger = logging.getLogger(__name__)

# Part of every name: raised when a measure changes.
_VERSION = 1


def score_folder() -> Path:
    """Where scores are kept.

    Returns:
        A folder that may or may not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mistill" / "scores"


def score_file(kind: str, teacher: Path, blocks: TokenBlocks) -> Path:
    """Where the scores of a teacher on a text are kept.

    Args:
        kind: What is measured.
        teacher: Its folder.
        blocks: The text, in the blocks that the teacher reads.

    Returns:
        A file that may or may not exist.
    """
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{kind}\0{_VERSION}\0{fingerprint(teacher)}\0{blocks.ids.shape}\0".encode())
    for array in (blocks.ids, blocks.mask, blocks.documents):
        key.update(array.tobytes())
    return score_folder() / f"{kind}-{key.hexdigest()}.safetensors"


def read_scores(file: Path) -> dict[str, Tensor] | None:
    """Read scores that were kept.

    Args:
        file: From ``score_file``.

    Returns:
        Tensors by name; None where there are none, or where the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            scores = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            stored = (opened.metadata() or {}).get("checksum")
    except (OSError, SafetensorError) as error:
        logger.warning("the cached scores %s are damaged (%s) and measured anew", file, error)
        return None
    if stored != _checksum(scores):
        logger.warning("the cached scores %s are damaged and measured anew", file)
        return None
    logger.info("scores were measured before: %s", file)
    return scores


def keep_scores(file: Path, scores: Mapping[str, Tensor]) -> None:
    """Keep scores for later; where that fails, say so and go on without.

    Args:
        file: From ``score_file``.
        scores: Tensors by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    ready = {name: tensor.contiguous() for name, tensor in scores.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(ready, partial, {"checksum": _checksum(ready)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logger.warning("the scores could not be kept for later in %s: %s", file.parent, error)


def _checksum(scores: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(scores.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
