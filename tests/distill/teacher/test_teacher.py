"""What is known of a teacher in part: samples and the most probable tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mistill.errors import SettingsError
from mistill.loss.divergences import Divergence
from mistill.loss.losses import head_loss
from mistill.loss.targets import SampledTargets, TopKTargets

N, V, D, K = 11, 37, 8, 5


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


HIDDEN, HEAD = numbers(0, N, D), numbers(1, V, D)
P = torch.softmax(numbers(2, N, V, scale=2.0), dim=-1)
NEXT = torch.arange(N)


def loss_and_gradients(targets: SampledTargets | TopKTargets, T: float = 1.0) -> list[Tensor]:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    result = head_loss(
        hidden,
        head,
        targets,
        NEXT,
        positions_in_step=N,
        temperature=T,
        memory_mib=3.5 * 3 * V * 8 / 2**20,
    )
    result.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [result.loss.detach(), hidden.grad, head.grad]


def by_autograd(loss_of_log_q: object, T: float = 1.0) -> list[Tensor]:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    log_q = torch.log_softmax(hidden @ head.t() / T, dim=-1)
    assert callable(loss_of_log_q)
    loss = T**2 * loss_of_log_q(log_q) / N
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [loss.detach(), hidden.grad, head.grad]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, his in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-6, atol=1e-9)


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1)


def test_a_sample_of_everything_is_the_whole_distribution() -> None:
    for T in (1.0, 2.0):
        targets = SampledTargets(torch.arange(V).expand(N, V), P, entropy(P), V, T)
        expected = by_autograd(lambda log_q: (P * (P.log() - log_q)).sum(), T)
        check(loss_and_gradients(targets, T), expected)


def test_a_sample_counts_each_drawn_token_by_its_share_of_the_draws() -> None:
    draws = torch.multinomial(P, 20, replacement=True, generator=torch.Generator().manual_seed(3))
    share = torch.zeros(N, V, dtype=torch.float64).scatter_add_(
        1, draws, torch.full(draws.shape, 1 / 20, dtype=torch.float64)
    )
    # one slot a draw, so that tokens repeat; and unused slots with weight 0
    ids = torch.cat([draws, torch.zeros(N, 3, dtype=torch.int64)], dim=1)
    weights = torch.cat([torch.full((N, 20), 1 / 20), torch.zeros(N, 3)], dim=1)
    targets = SampledTargets(ids, weights, entropy(P), V)
    expected = by_autograd(lambda log_q: (-(share * log_q)).sum() - entropy(P).sum())
    check(loss_and_gradients(targets), expected)


def test_samples_point_downhill_like_the_whole_distribution_on_average() -> None:
    dense = by_autograd(lambda log_q: (P * (P.log() - log_q)).sum())
    generator = torch.Generator().manual_seed(4)
    total = [torch.zeros_like(part) for part in dense]
    for _ in range(400):
        ids = torch.multinomial(P, 50, replacement=True, generator=generator)
        targets = SampledTargets(ids, torch.full((N, 50), 1 / 50), entropy(P), V)
        for sum_, part in zip(total, loss_and_gradients(targets), strict=True):
            sum_ += part / 400
    assert total[0].item() == pytest.approx(dense[0].item(), rel=0.02)
    for mine, his in zip(total[1:], dense[1:], strict=True):
        cosine = torch.cosine_similarity(mine.flatten(), his.flatten(), dim=0)
        assert cosine > 0.999
        assert mine.norm().item() == pytest.approx(his.norm().item(), rel=0.02)


def test_the_rest_of_a_top_k_is_one_bucket() -> None:
    top = P.topk(K, dim=-1)

    def bucketed(log_q: Tensor) -> Tensor:
        q = log_q.exp()
        q_top = q.gather(1, top.indices)
        p_tail, q_tail = 1 - top.values.sum(dim=-1), 1 - q_top.sum(dim=-1)
        kl = (top.values * (top.values / q_top).log()).sum()
        return kl + (p_tail * (p_tail / q_tail).log()).sum()

    targets = TopKTargets(top.indices, top.values, V)
    check(loss_and_gradients(targets), by_autograd(bucketed))
    whole = by_autograd(lambda log_q: (P * (P.log() - log_q)).sum())
    assert 0 < loss_and_gradients(targets)[0] < whole[0]


def test_a_top_k_that_holds_everything_has_an_empty_bucket() -> None:
    p = torch.zeros(N, V, dtype=torch.float64)
    p[:, :K] = torch.softmax(numbers(5, N, K), dim=-1)
    p[:, K - 1] = 1 - p[:, : K - 1].sum(dim=-1)
    targets = TopKTargets(torch.arange(K).expand(N, K), p[:, :K], V)
    expected = by_autograd(lambda log_q: (torch.xlogy(p, p) - p * log_q).sum())
    check(loss_and_gradients(targets), expected)


def test_a_part_of_the_teacher_teaches_forward_kl_at_its_own_temperature_only() -> None:
    sample = SampledTargets(torch.zeros(N, 1, dtype=torch.int64), torch.ones(N, 1), P[:, 0], V, 2.0)
    top = TopKTargets(torch.zeros(N, 1, dtype=torch.int64), P[:, :1], V)
    for targets, T in ((sample, 1.0), (top, 2.0)):
        with pytest.raises(SettingsError, match="cached at temperature"):
            loss_and_gradients(targets, T)
        with pytest.raises(SettingsError, match="reverse_kl needs the teacher's whole"):
            targets.require(Divergence("reverse_kl"), targets.temperature)
