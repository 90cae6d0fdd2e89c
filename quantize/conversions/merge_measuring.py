"""Which way of merging an adapter is best, by what held-out text costs each result.

How close a merged model is to what was trained says which way is faithful, not which is better: on
a model whose quantization costs much, merging into the weights before quantization gives a better
model than the one that was trained. So the ways are compared by the cross-entropy of held-out text.
Where that text shows nothing that the adapter has learnt, it cannot judge, and closeness decides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistill.errors import TrainingError
from mistill.folders.folder import context_length, read_config
from mistill.measures.kl import Fidelity, Predictions, compare, next_token_losses, predict
from mistill.measures.significance import of_mean
from mistill.measures.uncertainty import Samples, mean_of
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import Texts
from mistill.text.vocabulary import load_vocabulary

_log = logging.getLogger(__name__)

# Tokens that the ways are compared on.
_BLOCKS, _LENGTH = 64, 256

# A quantized merge has to keep this share of what the adapter has learnt.
_LEAST_KEPT = 0.5

# Standard errors by which an adapter has to lower the cost of a text that shows what was learnt.
_ERRORS = 2.0


@dataclass(frozen=True, eq=False)
class Measured:
    """What some text says of a model.

    Attributes:
        fidelity: How close the model is to the reference.
        losses: -log p(next token), in nats, an array for every block.
    """

    fidelity: Fidelity
    losses: Samples

    @property
    def cross_entropy(self) -> float:
        """What a token costs on average, in nats."""
        return mean_of(self.losses)


def measure(
    reference: Path, models: Mapping[str, Path], texts: Texts, skip_bad_rows: bool
) -> dict[str, Measured]:
    """Compare folders with one, on some text.

    Args:
        reference: The folder to compare with.
        models: Folders by name, with the same vocabulary.
        texts: Text.
        skip_bad_rows: Whether rows that cannot be read are passed over.

    Returns:
        By name of the folder.

    Raises:
        TextError: If there is no text.
    """
    blocks = _blocks(reference, texts, skip_bad_rows)
    predicted: dict[Path, Predictions] = {}
    for folder in (reference, *models.values()):
        if folder not in predicted:
            predicted[folder] = predict(load_pytorch(folder), blocks)
    predictions = {name: predicted[folder] for name, folder in models.items()}
    fidelity = compare({"reference": predicted[reference]}, predictions, blocks)
    return {
        name: Measured(fidelity[name]["reference"], next_token_losses(one, blocks))
        for name, one in predictions.items()
    }


def better_way(
    ways: Mapping[str, Measured], base: Measured, trained: Measured
) -> tuple[str, dict[str, Any]]:
    """The way that the text costs least, and the figures for the record.

    The text shows what was learnt where the adapter makes it cheaper by more than two standard
    errors, taken between blocks; else the way that is closest to the reference is taken.

    Args:
        ways: What each way of merging comes to.
        base: What the adapter was trained on.
        trained: The same with the adapter.

    Returns:
        Its name, and JSON values.
    """
    shift = of_mean(base.losses, trained.losses)
    learnt = base.cross_entropy - trained.cross_entropy
    by = "cross_entropy"
    chosen = min(ways, key=lambda name: ways[name].cross_entropy)
    if learnt <= (0.0 if shift is None else _ERRORS * shift.error):
        by = "kl"
        chosen = min(ways, key=lambda name: ways[name].fidelity.kl)
        _log.warning(
            "the text costs %.4f nats a token without the adapter and %.4f with it, so that it "
            "does not show what was learnt, and the way that is closest to the float merged model "
            "is kept; give held-out text of the kind that the adapter was trained on",
            base.cross_entropy,
            trained.cross_entropy,
        )
    costs = {name: one.cross_entropy for name, one in ways.items()}
    return chosen, {
        "chosen": chosen,
        "chosen_by": by,
        "cross_entropy": {
            "base": base.cross_entropy,
            "trained": trained.cross_entropy,
            **costs,
        },
    }


def share_kept(base: Measured, trained: Measured, before: Measured, after: Measured) -> float:
    """The share of what an adapter has learnt that quantizing leaves.

    Args:
        base: What the adapter was trained on.
        trained: The same with the adapter: what it takes from the cost of the text was learnt.
        before: The base, quantized.
        after: The merged model, quantized likewise: what it takes from that cost is kept.

    Returns:
        1 where nothing is lost, 0 where the adapter might as well not be there.
    """
    learnt = base.cross_entropy - trained.cross_entropy
    return (before.cross_entropy - after.cross_entropy) / learnt


def require_kept(share: float) -> None:
    """Refuse a quantized merge that loses most of what the adapter has learnt.

    Args:
        share: From ``share_kept``.

    Raises:
        TrainingError: If it is less than half.
    """
    if share < _LEAST_KEPT:
        raise TrainingError(
            f"quantizing would lose what the adapter has learnt: {max(share, 0.0):.0%} of what it "
            "takes from the cost of the text is left; give more bits or smaller groups, or leave "
            "out texts to keep the merged model in floats"
        )


def _blocks(folder: Path, texts: Texts, skip_bad_rows: bool) -> TokenBlocks:
    length = min(_LENGTH, context_length(folder, read_config(folder)))
    documents = read_documents(
        texts,
        load_vocabulary(folder),
        limit=_BLOCKS * length,
        skip_bad_rows=skip_bad_rows,
        block_length=length,
    )
    return pack(documents, length)[:_BLOCKS]
