from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.figures.fidelity import Fidelity, agreements, divergences
from benchmarks.figures.perplexity import Perplexity, token_losses
from mistill.engine.log_probabilities import log_normalizers, row_blocks
from mistill.measures.uncertainty import mean_of, quartiles, standard_error_of_mean
from tests.reference.comparing import bootstrap_standard_error, kl_by_definition

LN2, LN3 = math.log(2), math.log(3)


def logits(seed: int, shape: tuple[int, int] = (40, 300)) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=shape) * 4).astype(np.float32)


def clustered(seed: int = 3, passages: int = 60) -> list[list[float]]:
    """Passages of unequal length whose tokens resemble each other."""
    random = np.random.default_rng(seed)
    return [
        list(random.normal(random.normal(3, 0.5), 1, size=random.integers(5, 80)))
        for _ in range(passages)
    ]


# --- perplexity ---------------------------------------------------------------------------------


def test_losses_of_hand_set_logits_are_those_worked_by_hand():
    # Weights 1, 1, 2 and 3, 1, 0: probabilities 1/4 and 3/4 of the tokens that came.
    scores = np.array([[0, 0, LN2], [LN3, 0, -np.inf]], np.float32)

    losses = token_losses(scores, np.array([1, 0]))

    assert losses == pytest.approx([math.log(4), math.log(4 / 3)], abs=1e-7)


def test_perplexity_is_the_geometric_mean_of_the_inverse_probabilities():
    found = Perplexity(losses=((math.log(4), math.log(4)), (math.log(4 / 3),)))

    assert found.tokens == 3
    assert found.value == pytest.approx((4 * 4 * 4 / 3) ** (1 / 3))


def test_perplexity_equals_transformers_loss(model: Path):
    import torch

    from mistill.engine.pytorch_model import PytorchModel

    running = PytorchModel(model)
    ids = np.random.default_rng(0).integers(0, running.vocabulary_size, size=(1, 90))
    with torch.inference_mode():
        tokens = torch.from_numpy(ids)
        theirs = float(running.model(tokens, labels=tokens).loss)

    losses = token_losses(running.logits(ids)[0, :-1], ids[0, 1:])

    # Both sum in float32 or better; the loss is about 7.
    assert losses.mean() == pytest.approx(theirs, abs=2e-6)


def test_a_large_offset_of_the_logits_changes_nothing():
    scores = logits(0)
    targets = np.arange(40)

    shifted = token_losses(scores + np.float32(4096), targets)

    # float32 holds numbers near 4096 to 2^-12 only, so that the logits themselves were rounded.
    assert shifted == pytest.approx(token_losses(scores, targets), abs=2**-11)


def test_normalizers_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch):
    scores = logits(1)
    whole = log_normalizers(scores)
    monkeypatch.setattr("mistill.engine.log_probabilities._ELEMENTS_AT_ONCE", 3 * 300 + 1)

    assert [block.stop - block.start for block in row_blocks(40, 300)][:2] == [3, 3]
    assert np.array_equal(log_normalizers(scores), whole)
    expected = np.log(np.exp(scores.astype(np.float64)).sum(axis=1))
    assert whole == pytest.approx(expected, abs=1e-6)


# --- fidelity -----------------------------------------------------------------------------------


def test_divergence_of_hand_set_logits_is_the_one_worked_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
    found = divergences(np.zeros((1, 2), np.float32), np.array([[0, LN3]], np.float32))

    assert found == pytest.approx([0.5 * math.log(4 / 3)], abs=1e-7)


def test_divergence_is_that_of_torch_and_of_the_definition():
    import torch
    from torch.distributions import Categorical, kl_divergence

    reference, model = logits(0), logits(1)

    found = divergences(reference, model)

    theirs = kl_divergence(
        Categorical(logits=torch.from_numpy(reference).double()),
        Categorical(logits=torch.from_numpy(model).double()),
    )
    # Products of float32 numbers up to 20, summed in float64.
    assert found == pytest.approx(theirs.numpy(), abs=3e-6)
    assert found[7] == pytest.approx(
        kl_by_definition(reference[7].tolist(), model[7].tolist()), abs=3e-6
    )


def test_divergence_goes_from_the_reference_to_the_model():
    reference, model = logits(0), logits(1)

    assert not np.allclose(divergences(reference, model), divergences(model, reference), atol=0.1)


def test_models_that_nearly_agree_keep_their_digits():
    import torch
    from torch.distributions import Categorical, kl_divergence

    reference = logits(0, (200, 5000))
    model = reference + 1e-2 * logits(1, (200, 5000)) + np.float32(3)

    found = divergences(reference, model).mean()

    theirs = kl_divergence(
        Categorical(logits=torch.from_numpy(reference).double()),
        Categorical(logits=torch.from_numpy(model).double()),
    ).mean()
    assert 1e-4 < float(theirs) < 1e-2
    assert found == pytest.approx(float(theirs), rel=1e-3)


def test_a_model_that_agrees_has_no_divergence_at_all():
    scores = logits(0)

    assert np.array_equal(divergences(scores, scores), np.zeros(40))
    assert agreements(scores, scores).all()
    shifted = scores + np.float32(0.25)
    assert (divergences(scores, shifted) >= 0).all()
    assert divergences(scores, shifted).max() < 1e-6


def test_divergences_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch):
    whole = divergences(logits(0), logits(1))
    monkeypatch.setattr("mistill.engine.log_probabilities._ELEMENTS_AT_ONCE", 7 * 300)

    assert np.array_equal(divergences(logits(0), logits(1)), whole)


def test_agreement_is_of_the_most_probable_tokens():
    reference = np.array([[1, 2, 3], [5, 0, 0], [0, 1, 0]], np.float32)
    model = np.array([[0, 0, 1], [1, 2, 0], [-3, -2, -9]], np.float32)

    assert agreements(reference, model).tolist() == [True, False, True]


def test_fidelity_takes_its_figures_over_all_tokens():
    found = Fidelity(divergences=((0.1, 0.2, 0.3), (0.8,)), agreements=((1, 0, 1), (0,)))

    assert found.mean_kl == pytest.approx(0.35)
    assert found.top1_agreement == 0.5
    # 99% of the way from the first to the last of four: 2.97 steps.
    assert found.kl_99th_percentile == pytest.approx(0.3 + 0.97 * 0.5)


# --- uncertainty --------------------------------------------------------------------------------


def test_standard_error_between_passages_is_the_one_worked_by_hand():
    # Sums 6 and 2, three tokens and one; mean 2. Deviations 6 - 3*2 = 0 and 2 - 2 = 0.
    assert standard_error_of_mean([[1, 2, 3], [2]]) == 0
    # Sums 3 and 5 over two tokens each; mean 2. sqrt(2 / 1 * (1 + 1)) / 4 = 1/2.
    assert standard_error_of_mean([[1, 2], [2, 3]]) == pytest.approx(0.5)


def test_standard_error_of_one_passage_is_that_of_its_tokens():
    assert standard_error_of_mean([[1, 2, 3, 4]]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert standard_error_of_mean([[1.5]]) is None


def test_standard_error_agrees_with_the_bootstrap():
    samples = clustered()

    ours = standard_error_of_mean(samples)

    # 4000 draws tell the bootstrap's own figure to about 1%; 60 passages differ from infinitely
    # many by about as much.
    assert ours == pytest.approx(
        bootstrap_standard_error(samples, lambda tokens: float(tokens.mean())), rel=0.06
    )


def test_standard_error_of_the_perplexity_agrees_with_the_bootstrap():
    samples = clustered()

    ours = Perplexity(losses=tuple(map(tuple, samples))).standard_error

    theirs = bootstrap_standard_error(samples, lambda tokens: math.exp(tokens.mean()))
    assert ours == pytest.approx(theirs, rel=0.08)


def test_tokens_that_resemble_each_other_widen_the_interval():
    samples = clustered()
    mixed = np.random.default_rng(0).permutation(np.concatenate(samples))
    ends = np.cumsum([len(passage) for passage in samples])[:-1]

    apart = standard_error_of_mean([list(part) for part in np.split(mixed, ends)])
    together = standard_error_of_mean(samples)

    assert apart is not None
    assert together is not None
    assert together > 2 * apart


def test_mean_weighs_tokens_alike_not_passages():
    assert mean_of([[1, 1, 1], [5]]) == 2


def test_quartiles_are_interpolated():
    assert quartiles([1, 2, 3, 4]) == (1.75, 2.5, 3.25)
    assert quartiles([7]) == (7, 7, 7)
