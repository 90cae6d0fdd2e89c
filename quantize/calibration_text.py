"""Draw the blocks of text that a model is calibrated and measured on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from mistill.text.blocks import Document, TokenBlocks, joined, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import load_vocabulary
from mistill.training.kept_back import is_kept_back
from quantize.settings import GptqSettings

_log = logging.getLogger(__name__)

# Blocks read for each one drawn, so that another seed draws others.
_POOL = 8


def draw_blocks(
    texts: Texts, folder: Path, settings: GptqSettings, *, today: date | None = None
) -> TokenBlocks:
    """Draw the blocks to calibrate on from the beginning of some text.

    Args:
        texts: What ``mistill.text.documents.read_documents`` reads.
        folder: The model, for its vocabulary.
        settings: How many blocks, of which length, and the seed.
        today: The day that a chat template writes; None takes the time of reading.

    Returns:
        As many blocks as asked for, in the order of the text, or all if there are fewer.

    Raises:
        TextError: If there is no text.
    """
    samples = settings.samples
    blocks = draw_up_to(
        samples,
        settings.block_length,
        texts,
        folder,
        settings.seed,
        skip_bad_rows=settings.skip_bad_rows,
        today=today,
    )
    if len(blocks) < samples:
        _log.warning("the text fills only %d of the %d blocks in samples", len(blocks), samples)
    return blocks


def draw_up_to(
    samples: int,
    block_length: int,
    texts: Texts,
    folder: Path,
    seed: int = 0,
    *,
    skip_bad_rows: bool = False,
    today: date | None = None,
    share_of: Callable[[str], float] = lambda _: 1.0,
) -> TokenBlocks:
    """Draw some blocks from the beginning of every text, or take all of a short one.

    Args:
        samples: Most blocks.
        block_length: Tokens in each.
        texts: What ``mistill.text.documents.read_documents`` reads; of several texts, as many
            blocks of each as far as they go.
        folder: The model, for its vocabulary.
        seed: Which blocks of a long text are drawn.
        skip_bad_rows: Whether rows that cannot be read are passed over and counted.
        today: The day that a chat template writes; None takes the time of reading.
        share_of: Gives for the name of a text the share of its documents to read, those that
            ``mistill.training.kept_back.is_kept_back`` names; 1 reads all.

    Returns:
        Blocks in the order of the text; those of several texts in turn.

    Raises:
        TextError: If there is no text.
    """
    vocabulary = load_vocabulary(folder, today=today)
    sources = sources_of(texts)
    most = _POOL * -(-samples // len(sources)) * block_length
    pools = []
    for source in sources:
        reading = partial(
            read_documents,
            source,
            vocabulary,
            skip_bad_rows=skip_bad_rows,
            block_length=block_length,
        )
        share, unseen = share_of(source), list[Document]()
        if 0 < share < 1:
            unseen = list(_up_to(most, (each for each in reading() if is_kept_back(each, share))))
        if share < 1 and not unseen:
            _log.warning("the model was trained on all of %s; give text it has not seen", source)
        pools.append(pack(unseen or reading(limit=most), block_length))
    generator = np.random.default_rng(seed)
    counts = equal_shares(samples, [len(pool) for pool in pools])
    drawn = [_draw(pool, n, generator) for pool, n in zip(pools, counts, strict=True) if n]
    return drawn[0] if len(drawn) == 1 else joined(drawn)


def _up_to(tokens: int, documents: Iterable[Document]) -> Iterator[Document]:
    """Documents until they have as many tokens; nothing behind the last is read."""
    for document in documents:
        yield document
        tokens -= len(document.ids)
        if tokens <= 0:
            return


def equal_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """How many to take of each of several supplies, as equal as their sizes allow.

    Args:
        total: How many to take together.
        sizes: How many there are of each.

    Returns:
        One number for each; together the total, or everything where there is less.
    """
    shares = [0] * len(sizes)
    # The smallest supply decides first; what it lacks is taken from the larger ones.
    for served, index in enumerate(sorted(range(len(sizes)), key=lambda item: sizes[item])):
        shares[index] = min(sizes[index], -(-(total - sum(shares)) // (len(sizes) - served)))
    return shares


def _draw(blocks: TokenBlocks, count: int, generator: np.random.Generator) -> TokenBlocks:
    """Some blocks at random, in their order; all if there are no more."""
    if len(blocks) <= count:
        return blocks
    return blocks[np.sort(generator.choice(len(blocks), count, replace=False))]
