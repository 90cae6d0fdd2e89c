"""A teacher asked about pieces of text, and its distributions sampled for storing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from distill.settings import TargetSettings
from distill.targets.shards import (
    Piece,
    find_pieces,
    piece_document,
)
from mistill.errors import FolderError
from mistill.text.blocks import TokenBlocks, pack

if TYPE_CHECKING:
    import torch

    from distill.targets.codec import StoredTargets
    from distill.teacher.teacher import LiveTeacher
    from mistill.loss.targets import DenseTargets


def ask(
    teacher: LiveTeacher, blocks: TokenBlocks, pieces: Sequence[Piece], settings: TargetSettings
) -> Iterator[tuple[list[int], int, StoredTargets]]:
    """Ask a teacher about some pieces of text, a batch of blocks at a time.

    Args:
        teacher: A running model.
        blocks: Where the pieces were found.
        pieces: The pieces.
        settings: How to keep what it says.

    Yields:
        Numbers of the pieces of a batch, how many tokens they have, and what the teacher says at
        their kept positions, one piece after the other.
    """
    import torch

    from mistill.loss.batches import make_batch

    device = next(teacher.model.parameters()).device
    packed = pack((piece_document(blocks, piece) for piece in pieces), settings.block_length)
    for start in range(0, len(packed), settings.batch_size):
        part = packed[start : start + settings.batch_size]
        part_pieces = find_pieces(part)
        numbers = [int(part.documents[piece.row, piece.start]) for piece in part_pieces]
        with torch.inference_mode():
            dense = teacher.targets(part, make_batch(part, device))
            yield numbers, part.tokens, keep(dense, part_pieces, settings)


def keep(dense: DenseTargets, pieces: Sequence[Piece], settings: TargetSettings) -> StoredTargets:
    """What is to be kept of a teacher's distributions.

    Args:
        dense: The distributions at N positions.
        pieces: Whose positions they are, one piece after the other.
        settings: How to keep them.

    Returns:
        Tokens of all N positions.

    Raises:
        FolderError: If the teacher computes something that is not a number.
    """
    import torch

    from distill.targets.codec import StoredTargets, count_draws
    from distill.targets.draws import (
        draw,
        entropy,
        multinomial_heights,
        systematic_heights,
        uniform_numbers,
    )
    from mistill.loss.losses import chunks

    if not dense.finite().all():
        raise FolderError(
            "the teacher computes hidden states that are infinite or not numbers, so that nothing "
            "can be learnt from it; its weights are damaged, or too large for its type"
        )
    device = dense.hidden.device
    wide = torch.float64 if dense.hidden.dtype == torch.float64 else torch.float32
    V = dense.vocabulary_size
    K = min(settings.top_k, V)
    each = 1 if settings.method == "systematic" else settings.draws
    u = torch.empty(0)
    if settings.method != "top_k":
        numbers = [
            uniform_numbers(piece.key, settings.seed, piece.positions, each) for piece in pieces
        ]
        u = torch.from_numpy(np.concatenate(numbers)).to(device)
    ids: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    # The heap of probabilities is float64 and as large as two more buffers.
    for rows, (a, b) in chunks(len(dense), V, wide, device, settings.memory_mib / 2, 2):
        log_p = dense.log_probabilities(rows, settings.temperature, out=a, scratch=b)
        if settings.method == "top_k":
            largest = log_p.topk(K, dim=-1)
            ids.append(largest.indices.cpu())
            values.append(largest.values.exp().cpu())
            continue
        p = torch.exp(log_p, out=b)
        spread = (
            systematic_heights(u[rows], settings.draws)
            if settings.method == "systematic"
            else multinomial_heights(u[rows])
        )
        ids.append(draw(p, spread).cpu())
        values.append(entropy(log_p, p).float().cpu())
    token_ids, token_values = torch.cat(ids).numpy(), torch.cat(values).numpy()
    if settings.method != "top_k":
        return count_draws(token_ids, token_values)
    sizes = np.full(len(token_ids), K)
    return StoredTargets(
        sizes, token_ids.reshape(-1), token_values.reshape(-1), np.zeros(len(token_ids), np.float32)
    )
