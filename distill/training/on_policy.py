"""Text that the student writes, for its teacher to score.

A student that learns only from text that others wrote never sees where its own mistakes lead. So
in some steps it goes on from the prompts of the texts in its own words, and the divergence from
what the teacher would have said is lowered there (GKD: Agarwal et al., 2023, algorithm 1,
https://arxiv.org/abs/2306.13649). No gradient flows through the drawing of tokens.

Each piece of text has a generator of its own, seeded by where the piece stands in the run: the
same tokens are drawn whatever the micro-batches and the processes, and after a resumption.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from mistill.text.blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Piece:
    """A run of one document inside a block.

    Attributes:
        row: The block.
        start: Its first position.
        stop: One past its last position.
        prompt: How many of its tokens are given; the student writes the others.
    """

    row: int
    start: int
    stop: int
    prompt: int


@dataclass(frozen=True)
class Place:
    """Where some blocks stand in a run.

    Attributes:
        seed: Of the run.
        step: Optimizer step, counted from 0.
        first: Number, within the step, of the first of the blocks.
    """

    seed: int
    step: int
    first: int


def find_pieces(blocks: TokenBlocks, prefix: int) -> list[Piece]:
    """The pieces that a student can write on, and how much of each it is given.

    A conversation's prompt ends where its first reply begins. Plain text has no prompt; there the
    student is given its first tokens.

    Args:
        blocks: Some blocks.
        prefix: How many tokens of plain text; at most half of it.

    Returns:
        Pieces in order; those without a token to be predicted are left out.
    """
    pieces = []
    for row, start, stop in blocks.runs.tolist():
        predicted = np.flatnonzero(blocks.mask[row, start:stop])
        if blocks.documents[row, start] < 0 or len(predicted) == 0:
            continue
        prompt = int(predicted[0])
        if prompt <= 1:
            prompt = max(1, min(prefix, (stop - start) // 2))
        pieces.append(Piece(row, start, stop, prompt))
    return pieces


def rewrite(
    student: PreTrainedModel,
    blocks: TokenBlocks,
    place: Place,
    *,
    temperature: float,
    prefix: int,
    together: bool,
) -> TokenBlocks:
    """Let a student write the rest of each piece.

    Args:
        student: The writer; in eval mode afterwards as before.
        blocks: Where the prompts come from.
        place: Seeds the drawing.
        temperature: Of the drawing, above 0.
        prefix: Tokens of plain text that are given.
        together: Whether other processes wait for each token, since the weights are divided.

    Returns:
        Blocks of the same shape: prompts, what the student wrote after them, to be predicted, and
        padding where it ended sooner.
    """
    pieces = find_pieces(blocks, prefix)
    if not pieces and not together:
        return blocks
    prompts = [blocks.ids[p.row, p.start : p.start + p.prompt] for p in pieces]
    limits = [p.stop - p.start - p.prompt for p in pieces]
    seeds: list[tuple[int, ...]] = [
        (place.seed, place.step, place.first + p.row, p.start) for p in pieces
    ]
    if not pieces:  # the others are writing, and need this process's share of the weights
        prompts, limits, seeds = [np.zeros(1, np.int64)], [1], [(0,)]
    replies = write(student, prompts, limits, seeds, temperature=temperature, together=together)
    ids, mask, documents = blocks.ids.copy(), blocks.mask.copy(), blocks.documents.copy()
    for piece, tokens in zip(pieces, replies, strict=False):
        begin = piece.start + piece.prompt
        end = begin + len(tokens)
        ids[piece.row, begin:end] = tokens
        mask[piece.row, piece.start : begin] = False
        mask[piece.row, begin:end] = True
        ids[piece.row, end : piece.stop] = 0
        mask[piece.row, end : piece.stop] = False
        documents[piece.row, end : piece.stop] = -1
    return TokenBlocks(ids, mask, documents)


def write(
    student: PreTrainedModel,
    prompts: Sequence[NDArray[np.int64]],
    limits: Sequence[int],
    seeds: Sequence[tuple[int, ...]],
    *,
    temperature: float,
    together: bool = False,
) -> list[NDArray[np.int64]]:
    """Draw tokens after some prompts, from each with a generator of its own.

    Args:
        student: The writer.
        prompts: Token ids, each at least one.
        limits: The most tokens to write after each, at least one.
        seeds: Of each generator.
        temperature: Above 0.
        together: Whether other processes wait for each token.

    Returns:
        What was written after each prompt, with the end-of-turn token where there was one.
    """
    device = student.device
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        attention[row, longest - len(prompt) :] = 1
    ends = _ends(student)
    was_training = student.training
    student.eval()
    with torch.no_grad(), _own_generation_config(student, ends):
        sequences: Tensor = student.generate(  # type: ignore[operator]
            inputs=ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=max(limits),
            logits_processor=[_Draw(seeds, temperature, device)],
            stopping_criteria=[_Limits(limits, longest)],
            synced_gpus=together,
        )
    student.train(was_training)
    answers = []
    for row, limit in enumerate(limits):
        tokens = sequences[row, longest : longest + limit].cpu().numpy()
        ended = np.flatnonzero(np.isin(tokens, ends))
        answers.append(tokens[: ended[0] + 1] if len(ended) else tokens)
    return answers


class _Draw(LogitsProcessor):
    """Leaves of each row's scores only the token that was drawn.

    The largest of ``logits / T - log E``, with E exponentially distributed, is a draw from
    softmax(logits / T) (the Gumbel-max trick).
    """

    def __init__(
        self, seeds: Sequence[tuple[int, ...]], temperature: float, device: torch.device
    ) -> None:
        self.temperature = temperature
        self.generators = [
            torch.Generator(device).manual_seed(
                int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
            )
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in enumerate(self.generators):
            noise[row].exponential_(generator=generator)
        return (scores.float() / self.temperature).sub_(noise.log_())


class _Limits(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, limits: Sequence[int], longest: int) -> None:
        self.ends = torch.tensor(limits) + longest

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids.shape[1] >= self.ends).to(input_ids.device)


def _ends(student: PreTrainedModel) -> list[int]:
    """Tokens that end a turn."""
    config: Any = student.generation_config
    ends = config.eos_token_id if config is not None else None
    if ends is None:
        ends = student.config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


@contextmanager
def _own_generation_config(student: PreTrainedModel, ends: list[int]) -> Iterator[None]:
    """Put aside the model's own wishes, such as a repetition penalty."""
    theirs = student.generation_config
    student.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends or None, pad_token_id=0
    )
    try:
        yield
    finally:
        student.generation_config = theirs


def is_on_policy(step: int, share: float) -> bool:
    """Whether the student writes the text of a step.

    Args:
        step: Counted from 0.
        share: Of the steps in which it does, 0 to 1.

    Returns:
        True in ``floor(share * n)`` of the first n steps, whatever n is, evenly spread.
    """
    return math.floor((step + 1) * share) > math.floor(step * share)
