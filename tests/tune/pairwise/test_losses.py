"""The losses of preferences, against their definitions and against TRL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mistill.preferences.tokens import Answer, LabelledTokens, PairTokens
from tests.reference import preferences as twin
from tune.pairwise.figures import figures_of, length_figures
from tune.pairwise.losses import first_loss, label_losses, odds_losses, pair_losses
from tune.settings import PreferenceSettings

GENERATOR = np.random.default_rng(0)
CHOSEN, REJECTED = GENERATOR.normal(0, 5, (2, 20))
LENGTHS = GENERATOR.integers(1, 50, (2, 20)).astype(float)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "robust"])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_loss_of_a_pair_is_its_definition(loss, beta):
    ours = pair_losses(loss, CHOSEN, REJECTED, *LENGTHS, beta=beta, smoothing=0.2)
    theirs = [
        twin.pair_loss(loss, one, other, (int(first), int(second)), beta, 0.2)
        for one, other, first, second in zip(CHOSEN, REJECTED, *LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_the_loss_without_a_reference_is_its_definition():
    chosen, rejected = -np.abs(CHOSEN) - 1, -np.abs(REJECTED) - 1
    ours = odds_losses(chosen, rejected, *LENGTHS, beta=0.3)
    theirs = [
        twin.odds_loss(one, other, (int(first), int(second)), 0.3)
        for one, other, first, second in zip(chosen, rejected, *LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_the_loss_of_a_label_is_its_definition():
    good = CHOSEN > 1
    ours = label_losses(REJECTED, good, beta=0.4, good_weight=2.0, bad_weight=0.5)
    for loss, ratio, is_good in zip(ours, REJECTED, good, strict=True):
        wanted = (
            2.0 * (1 - twin.sigmoid(0.4 * ratio))
            if is_good
            else 0.5 * (1 - twin.sigmoid(-0.4 * ratio))
        )
        assert loss == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "robust"])
def test_the_first_loss_is_that_of_a_model_which_is_its_own_reference(loss):
    zeros = np.zeros(20)
    losses = pair_losses(loss, zeros, zeros, *LENGTHS, beta=0.3, smoothing=0.1)
    assert losses == pytest.approx([first_loss(loss, 0.3)] * 20)


def test_exchanged_answers_have_the_loss_of_the_opposite_margin():
    for loss in ("sigmoid", "sigmoid_norm"):
        right = pair_losses(loss, CHOSEN, REJECTED, *LENGTHS, beta=0.3)
        wrong = pair_losses(loss, REJECTED, CHOSEN, *LENGTHS[::-1], beta=0.3)
        # sigmoid(m) + sigmoid(-m) = 1
        assert np.exp(-right) + np.exp(-wrong) == pytest.approx(np.ones(20))


def test_losses_do_not_overflow():
    far = np.array([-1e4, 1e4])
    losses = pair_losses("sigmoid", far, -far, np.ones(2), np.ones(2), beta=1.0)
    assert losses == pytest.approx([2e4, 0.0])


# --- figures ------------------------------------------------------------------------------------


def pair(chosen_tokens, rejected_tokens):
    return PairTokens(
        Answer(tuple(range(2 + chosen_tokens)), 2), Answer(tuple(range(2 + rejected_tokens)), 2)
    )


def test_figures_count_pairs_and_take_a_tie_for_half():
    pairs = [pair(4, 2), pair(2, 4), pair(3, 3), pair(5, 1)]
    start = np.array([-5.0, -4.0, -3.0, -6.0, -2.0, -2.0, -9.0, -1.0])
    now = start + np.array([1.0, 0.0, -1.0, 0.0, 0.5, 0.5, -1.0, -3.0])
    settings = PreferenceSettings(beta=0.5)
    figures = figures_of(pairs, now, start, settings)
    assert figures.margin_accuracy == (1 + 0 + 0.5 + 1) / 4
    assert figures.likelier == (0.5 + 1 + 0.5 + 0) / 4
    assert figures.margin == (1 - 1 + 0 + 2) / 4
    assert figures.chosen == now[0::2].mean()
    assert figures.rejected == now[1::2].mean()
    margins = (1.0, -1.0, 0.0, 2.0)
    losses = [-math.log(twin.sigmoid(0.5 * margin)) for margin in margins]
    assert figures.loss == pytest.approx(sum(losses) / 4)
    assert figures_of(pairs, start, start, settings).margin_accuracy == 0.5
    lengths = length_figures(pairs)
    assert lengths == {"chosen": 3.5, "rejected": 2.5, "longer_wins": (1 + 0 + 0.5 + 1) / 4}


def test_figures_of_labels_count_what_moved_the_right_way():
    labelled = [LabelledTokens(Answer((1, 2, 3), 1), good) for good in (True, True, False)]
    figures = figures_of(
        labelled,
        np.array([-1.0, -5.0, -3.0]),
        np.array([-2.0, -4.0, -1.0]),
        PreferenceSettings(loss="kto"),
    )
    assert figures.margin_accuracy == 2 / 3
    assert figures.chosen == -3.0
    assert figures.rejected == -3.0
    assert figures.margin == 0.0 - (-2.0)


# --- against TRL --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "robust", "orpo"])
def test_a_batch_has_the_loss_of_trls_trainer(loss, model, pairs, tmp_path):
    from mistill.judging.likelihood import answer_log_probabilities
    from mistill.preferences.reading import read_pairs
    from mistill.preferences.tokens import pair_tokens
    from mistill.pytorch.loading import load_pytorch
    from mistill.text.vocabulary import load_vocabulary
    from tune.pairwise.training import answers_of, preference_trainer

    vocabulary = load_vocabulary(model)
    items = pair_tokens(read_pairs(pairs)[:4], vocabulary, 200, name="pairs")
    settings = PreferenceSettings(loss=loss, lora_rank=0, beta=0.2)
    loaded = load_pytorch(model)
    start = answer_log_probabilities(loaded, answers_of(items))
    trainer = preference_trainer(
        loaded,
        model,
        vocabulary,
        items,
        lambda answers, name: start,
        settings,
        tmp_path,
        steps=2,
        checkpoint_every=2,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        rows = [trainer.train_dataset[row] for row in range(4)]
        batch: Any = trainer.data_collator(rows)
        theirs = float(trainer.compute_loss(trainer.model.eval(), batch))
    now = answer_log_probabilities(trainer.model, answers_of(items))
    ours = figures_of(items, now, start, settings).loss
    if loss == "orpo":  # TRL's also learns the prompts; the odds ratio is what is compared
        better = now[0::2] / np.array([item.chosen.length for item in items])
        odds = figures_of(items, now, start, settings).loss + better.mean()
        nll = trainer._stored_metrics["train"]["nll_loss"][-1]
        assert odds == pytest.approx(theirs - nll, abs=1e-5)
    else:
        # float32 sums over some fifty tokens
        assert ours == pytest.approx(theirs, rel=1e-4)
