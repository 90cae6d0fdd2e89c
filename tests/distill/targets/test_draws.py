"""Draws stand for a distribution: without bias, evenly spread, and repeatable."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.targets.codec import count_draws
from distill.targets.draws import (
    draw,
    entropy,
    multinomial_heights,
    systematic_heights,
    uniform_numbers,
)
from mistill.loss.losses import head_loss
from mistill.loss.targets import SampledTargets
from tests.reference import targets as reference

V, N = 40, 50


def distributions(rows: int, seed: int = 0, vocabulary: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn((rows, vocabulary), generator=generator), dim=-1)


def systematic(p: Tensor, u: Tensor, draws: int = N) -> Tensor:
    return draw(p, systematic_heights(u, draws))


def shares(ids: Tensor, vocabulary: int = V) -> Tensor:
    """Draws as a distribution over the vocabulary, float64."""
    counts = torch.zeros((len(ids), vocabulary), dtype=torch.float64)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float64)) / ids.shape[1]


def test_draws_are_those_of_the_exact_walk_along_the_distribution() -> None:
    p = distributions(30)
    u = torch.rand((30, 1), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = systematic(p, u)
    for row in range(30):
        expected = reference.systematic_counts(p[row].tolist(), u[row].item(), N)
        assert Counter(ids[row].tolist()) == expected
    heights = multinomial_heights(torch.rand((30, N), dtype=torch.float64))
    ids = draw(p, heights)
    for row in range(30):
        assert ids[row].tolist() == reference.walk(p[row].tolist(), heights[row].tolist())


def test_a_token_is_drawn_a_whole_number_next_to_its_share_of_times() -> None:
    p = distributions(200)
    u = torch.rand((200, 1), dtype=torch.float64)
    expected = N * p.double() / p.double().sum(-1, keepdim=True)
    counts = (shares(systematic(p, u)) * N).round()
    assert (counts >= expected.floor()).all()
    assert (counts <= expected.ceil()).all()


def test_the_mean_over_all_starts_is_the_distribution() -> None:
    # Over an even grid of starts the mean is exact but for the grid's own width.
    starts = 4000
    p = distributions(1)
    u = (torch.arange(starts, dtype=torch.float64)[:, None] + 0.5) / starts
    mean = shares(systematic(p.expand(starts, V), u)).mean(dim=0)
    torch.testing.assert_close(mean, p[0].double(), rtol=0, atol=1.5 / starts / N)


def test_independent_draws_have_the_distribution_as_their_mean() -> None:
    rows = 4000
    p = distributions(1)
    u = torch.from_numpy(uniform_numbers(b"k" * 16, 0, rows, N))
    mean = shares(draw(p.expand(rows, V), multinomial_heights(u))).mean(dim=0)
    error = (mean - p[0].double()) / torch.sqrt(p[0].double() * (1 - p[0].double()) / (rows * N))
    assert error.abs().max() < 4.5  # standard errors, of 40 tokens


def test_systematic_draws_vary_less_than_independent_ones() -> None:
    p = torch.stack([torch.from_numpy(reference.zipf(2000, seed)) for seed in range(40)])
    p = p.repeat_interleave(50, dim=0)
    u = torch.rand((len(p), 1), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    even = systematic(p, u)
    apart = draw(p, multinomial_heights(torch.rand((len(p), N), dtype=torch.float64)))
    errors = [(shares(ids, 2000) - p).square().sum(dim=-1).mean() for ids in (even, apart)]
    assert errors[0] < 0.6 * errors[1]


def test_the_last_height_never_draws_a_token_that_cannot_be() -> None:
    p = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert set(systematic(p, torch.tensor([[u]], dtype=torch.float64))[0].tolist()) == {1, 3}
    assert draw(p, torch.ones((1, 1), dtype=torch.float64)).item() == 3
    assert draw(p, torch.zeros((1, 1), dtype=torch.float64)).item() == 1


def test_tokens_of_small_probability_keep_their_places_at_the_end_of_a_long_sum() -> None:
    # Beside a sum close to 1, float32 has no room for these: several would share one place.
    p = torch.full((1, 60_000), 1e-8)
    p[0, 0] = 1 - 6e-4
    wanted = torch.arange(100, 60_000, 599)
    edges = p[0].double().cumsum(dim=0)
    middles = (edges[wanted - 1] + edges[wanted]) / 2 / edges[-1]
    assert draw(p, middles[None])[0].tolist() == wanted.tolist()


def test_entropy_is_that_of_torch_also_with_impossible_tokens() -> None:
    p = distributions(20)
    p[:, :5] = 0
    p /= p.sum(dim=-1, keepdim=True)
    expected = torch.distributions.Categorical(probs=p.double(), validate_args=False).entropy()
    torch.testing.assert_close(entropy(p.log(), p).double(), expected, rtol=1e-5, atol=1e-5)
    certain = torch.eye(3)
    assert entropy(certain.log(), certain).tolist() == [0, 0, 0]


def test_numbers_depend_on_key_and_seed_alone() -> None:
    one = uniform_numbers(b"a" * 16, 0, 6, 2)
    assert (uniform_numbers(b"a" * 16, 0, 3, 2) == one[:3]).all()
    assert not np.intersect1d(one, uniform_numbers(b"b" * 16, 0, 6, 2)).size
    assert not np.intersect1d(one, uniform_numbers(b"a" * 16, 1, 6, 2)).size
    # Fixed for good: targets that are resumed by a later version must go on as they began.
    expected = [0.4188491245584537, 0.7557179996990803]
    assert uniform_numbers(bytes(range(16)), 7, 1, 2)[0].tolist() == expected


def test_numbers_are_even_between_0_and_1() -> None:
    u = uniform_numbers(b"a" * 16, 0, 20_000, 1)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * 20_000)


def sampled(p: Tensor, u: Tensor) -> SampledTargets:
    told = count_draws(systematic(p, u).numpy(), entropy(p.log(), p.clone()).float().numpy())
    ids, counts = told.padded()
    return SampledTargets(
        torch.from_numpy(ids),
        torch.from_numpy(counts) / N,
        torch.from_numpy(told.entropy),
        p.shape[1],
    )


def test_gradient_and_loss_over_many_samples_are_those_of_the_whole_distribution() -> None:
    rows, width = 3, 8
    generator = torch.Generator().manual_seed(3)
    p = distributions(rows, seed=2)
    hidden = torch.randn((rows, width), generator=generator, dtype=torch.float64)
    head = torch.randn((V, width), generator=generator, dtype=torch.float64)
    next_ids = torch.zeros(rows, dtype=torch.int64)

    logits = (hidden @ head.t()).requires_grad_()
    q = torch.log_softmax(logits, dim=-1)
    exact = (p.double() * (p.double().log() - q)).sum() / rows
    exact.backward()
    assert logits.grad is not None
    expected = logits.grad @ head

    def gradient(samples: int, seed: int) -> tuple[Tensor, float]:
        u = torch.from_numpy(uniform_numbers(b"s" * 16, seed, samples * rows, 1))
        many = hidden.repeat(samples, 1).requires_grad_()
        targets = sampled(p.repeat(samples, 1), u)
        found = head_loss(
            many, head, targets, next_ids.repeat(samples), positions_in_step=rows * samples
        )
        found.loss.backward()
        assert many.grad is not None
        return many.grad.view(samples, rows, width).sum(dim=0), found.loss.item()

    errors = []
    for samples in (10, 1000):
        apart = [gradient(samples, seed)[0] - expected for seed in range(4)]
        errors.append(torch.stack(apart).square().mean().sqrt().item())
    # A hundred times the samples, a tenth of the error.
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.6)
    assert errors[1] < 0.01 * expected.abs().max()
    assert gradient(2000, 9)[1] == pytest.approx(exact.item(), rel=0.002)
