"""KL between models is what the definition says, block by block and in small chunks of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.figures.fidelity import agreements, divergences
from benchmarks.figures.perplexity import token_losses
from mistill.errors import TextError, VocabularyError
from mistill.measures import kl
from mistill.measures.kl import Predictions, compare, predict
from mistill.measures.uncertainty import standard_error_of_mean
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary


@pytest.fixture(scope="module")
def blocks(teacher, chats) -> TokenBlocks:
    return pack(read_documents(chats, load_vocabulary(teacher)), 48)[:12]


def test_what_the_rows_say_is_what_the_whole_logits_say(teacher, model, blocks, monkeypatch):
    """Against the benchmarks' own arithmetic, on logits that were all made at once."""
    monkeypatch.setattr(kl, "_LOGITS_AT_ONCE", 7 * 384)
    monkeypatch.setattr(kl, "_TOKENS_AT_ONCE", 100)
    first, second = load_pytorch(teacher), load_pytorch(model)
    with torch.inference_mode():
        ids, places = torch.from_numpy(blocks.ids), torch.from_numpy(blocks.position_ids)
        whole = [m(ids, position_ids=places, use_cache=False).logits for m in (first, second)]
    kept = torch.from_numpy(blocks.kept)
    r, c = (logits[kept].numpy() for logits in whole)
    targets = blocks.ids[:, 1:][blocks.kept[:, :-1]]
    each = divergences(r, c)

    references = {"teacher": predict(first, blocks), "itself": predict(second, blocks)}
    found = compare(references, {"model": predict(second, blocks)}, blocks)["model"]
    measured = found["teacher"]
    # float32 logits of models that are computed in other batches differ in their last digits.
    assert measured.kl == pytest.approx(each.mean(), rel=1e-4)
    assert measured.kl > 0.1
    assert measured.kl_p99 == pytest.approx(np.quantile(each, 0.99), rel=1e-4)
    assert measured.agreement == agreements(r, c).mean()
    assert measured.perplexity == pytest.approx(math.exp(token_losses(c, targets).mean()), rel=1e-5)
    ours = kl.next_token_losses(predict(second, blocks), blocks)
    np.testing.assert_allclose(np.concatenate(ours), token_losses(c, targets), rtol=1e-4)
    assert [len(one) for one in ours] == [int(n) for n in blocks.kept.sum(axis=1) if n]
    assert measured.reference_perplexity == pytest.approx(
        math.exp(token_losses(r, targets).mean()), rel=1e-5
    )
    assert measured.tokens == len(targets)
    passages = np.split(each, np.cumsum(blocks.kept.sum(axis=1))[:-1])
    assert measured.kl_standard_error == pytest.approx(standard_error_of_mean(passages), rel=1e-3)
    assert (found["itself"].kl, found["itself"].agreement) == (0.0, 1.0)


def test_two_models_that_nearly_agree_keep_their_digits():
    """KL of a small change d of the logits is half the variance of d under p."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator)
    head = torch.randn(300, 16, generator=generator)
    change = 1e-3 * torch.randn(300, 16, generator=generator)
    ids = np.zeros((1, 65), np.int64)
    blocks = TokenBlocks(ids, np.ones_like(ids, bool), np.zeros_like(ids, np.int32))
    near = {"near": Predictions(hidden, head + change)}
    measured = compare({"reference": Predictions(hidden, head)}, near, blocks)["near"]["reference"]
    p = (hidden.double() @ head.double().T).softmax(dim=1)
    d = hidden.double() @ ((head + change).double() - head.double()).T
    variance = (p * d.square()).sum(1) - (p * d).sum(1).square()
    # The next term of the series is a thousandth of this one.
    assert measured.kl == pytest.approx(float(variance.mean() / 2), rel=0.01)
    assert measured.kl < 1e-5


def test_models_with_other_vocabularies_are_refused(blocks):
    few, many = (Predictions(torch.zeros(4, 8), torch.zeros(size, 8)) for size in (10, 12))
    with pytest.raises(VocabularyError, match="few 10, many 12"):
        compare({"few": few}, {"many": many}, blocks)


def test_text_without_a_token_to_predict_is_refused(blocks):
    silent = TokenBlocks(blocks.ids, np.zeros_like(blocks.mask), blocks.documents)
    one = Predictions(torch.zeros(0, 8), torch.zeros(10, 8))
    with pytest.raises(TextError, match="no token to predict"):
        compare({"one": one}, {"other": one}, silent)
