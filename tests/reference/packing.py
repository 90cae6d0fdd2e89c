"""Packing and the positions that count, written out one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.text.blocks import TokenBlocks


def best_fit(lengths: Sequence[int], block_length: int) -> list[list[tuple[int, int, int]]]:
    """Blocks as lists of (document, start, length): each piece into the fullest with room for it.

    Of equally full blocks, the one that has been waiting longest at that fullness is taken.
    """
    blocks: list[list[tuple[int, int, int]]] = []
    touched: list[int] = []
    time = 0
    for document, whole in enumerate(lengths):
        for start in range(0, whole, block_length):
            length = min(block_length, whole - start)
            rooms = [block_length - sum(piece[2] for piece in block) for block in blocks]
            fitting = [number for number, room in enumerate(rooms) if room >= length]
            if fitting:
                chosen = min(fitting, key=lambda number: (rooms[number], touched[number]))
            else:
                chosen = len(blocks)
                blocks.append([])
                touched.append(0)
            blocks[chosen].append((document, start, length))
            time += 1
            touched[chosen] = time
    return blocks


def kept_positions(blocks: TokenBlocks) -> list[tuple[int, int]]:
    """(block, position) pairs whose logits predict a token of the same document that counts."""
    found = []
    for row in range(len(blocks)):
        for t in range(blocks.block_length - 1):
            here, following = blocks.documents[row, t], blocks.documents[row, t + 1]
            if here != -1 and here == following and blocks.mask[row, t + 1]:
                found.append((row, t))
    return found


def positions(blocks: TokenBlocks) -> NDArray[Any]:
    """Positions counted from 0 in every document, one at a time."""
    counted = np.zeros_like(blocks.ids)
    for row in range(len(blocks)):
        for t in range(1, blocks.block_length):
            if blocks.documents[row, t] == blocks.documents[row, t - 1]:
                counted[row, t] = counted[row, t - 1] + 1
    return counted
