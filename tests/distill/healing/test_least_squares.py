"""A ridge least-squares fit from sums over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.healing.least_squares import Equations
from tests.reference.healing import least_squares


def problem(
    tokens: int, inputs: int, outputs: int, noise: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=rng) @ torch.randn(inputs, inputs, generator=rng)
    true = torch.randn(outputs, inputs, generator=rng) / inputs
    r = x @ true.T + noise * torch.randn(tokens, outputs, generator=rng)
    return x, r, torch.rand(tokens, generator=rng) + 0.1


@pytest.mark.parametrize("inputs", [7, 300])
@pytest.mark.parametrize("ridge", [0.01, 0.3, 3.0])
def test_the_change_is_that_of_lstsq(inputs: int, ridge: float) -> None:
    x, r, weights = problem(2 * inputs, inputs, 5)
    equations = Equations(inputs, 5)
    for rows in torch.arange(len(x)).split(11):
        equations.add(x[rows], r[rows], weights[rows])

    fit = equations.solve([ridge])

    double = [part.double().numpy() for part in (x, r, weights)]
    expected = least_squares(double[0], double[1], double[2], ridge)
    np.testing.assert_allclose(fit.change.numpy(), expected, atol=2e-4 * np.abs(expected).max())
    missed = weights[:, None] * (r - x @ torch.from_numpy(expected).T.float()) ** 2
    assert fit.ridge == ridge
    assert fit.missed_after == pytest.approx(float(missed.sum() / r.numel()), rel=1e-3)
    before = float((weights[:, None] * r**2).mean())
    assert fit.missed_before == pytest.approx(before, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_tokens_on_a_gpu_give_the_same_change() -> None:
    x, r, weights = problem(600, 300, 5)
    changes = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        equations = Equations(300, 5, device)
        equations.add(x.to(device), r.to(device), weights.to(device))
        changes.append(equations.solve([0.3]).change)
    assert changes[1].device.type == "cuda"
    torch.testing.assert_close(changes[1].cpu(), changes[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_ridge_is_the_one_that_misses_least_of_the_tokens_left_out(noise: float) -> None:
    x, r, weights = problem(200, 60, 4, noise)
    left_out = torch.zeros(200, dtype=torch.bool)
    left_out[150:] = True
    ridges = [0.001, 0.03, 1.0, 30.0]
    equations = Equations(60, 4)
    equations.add(x[left_out], r[left_out], weights[left_out], left_out=True)
    equations.add(x[~left_out], r[~left_out], weights[~left_out])

    fit = equations.solve(ridges)

    double = [part.double().numpy() for part in (x, r, weights)]
    seen, unseen = (~left_out).numpy(), left_out.numpy()
    errors = []
    for ridge in ridges:
        change = least_squares(double[0][seen], double[1][seen], double[2][seen], ridge)
        missed = double[1][unseen] - double[0][unseen] @ change.T
        errors.append((double[2][unseen][:, None] * missed**2).sum())
    assert fit.ridge == ridges[int(np.argmin(errors))]
    # The fit itself is made on all tokens.
    expected = least_squares(double[0], double[1], double[2], fit.ridge)
    np.testing.assert_allclose(fit.change.numpy(), expected, atol=2e-3 * np.abs(expected).max())


def test_noise_asks_for_a_firm_ridge_and_clean_text_for_a_weak_one() -> None:
    chosen = []
    for noise in (0.01, 300.0):
        x, r, weights = problem(200, 60, 4, noise)
        equations = Equations(60, 4)
        equations.add(x[150:], r[150:], weights[150:], left_out=True)
        equations.add(x[:150], r[:150], weights[:150])
        chosen.append(equations.solve([0.001, 1.0]).ridge)
    assert chosen == [0.001, 1.0]


def test_nothing_missed_changes_nothing_and_dead_inputs_stay_as_they_are() -> None:
    x, r, weights = problem(50, 8, 3)
    equations = Equations(8, 3)
    equations.add(x, torch.zeros_like(r), weights)
    fit = equations.solve([0.1])
    assert not fit.change.any()
    assert (fit.missed_before, fit.missed_after) == (0, 0)

    x[:, 2] = 0
    equations = Equations(8, 3)
    equations.add(x, r, weights)
    change = equations.solve([0.1]).change
    assert not change[:, 2].any()
    assert change[:, 3].all()

    equations = Equations(8, 3)
    equations.add(torch.zeros_like(x), r, weights)
    assert not equations.solve([0.1]).change.any()


@pytest.mark.parametrize("place", ["inputs", "missed"])
def test_what_is_not_a_number_is_refused(place: str) -> None:
    x, r, weights = problem(50, 8, 3)
    (x if place == "inputs" else r)[4, 1] = float("nan")
    equations = Equations(8, 3)
    equations.add(x, r, weights)
    with pytest.raises(ValueError, match="not finite"):
        equations.solve([0.1, 1.0])
