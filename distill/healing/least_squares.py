"""A ridge least-squares fit from sums over tokens, its ridge chosen on tokens that are left out.

The change of a matrix is found that takes the most off what its outputs miss:

    dW = argmin  sum_t w_t |x_t dW^T - r_t|^2  +  ridge mean(diag(H)) |dW|^2
    H  = sum_t w_t x_t x_t^T

with x_t an input of the matrix, r_t what its output misses and w_t the weight of the token. It is
the ridge regression of Hoerl and Kennard (1970), with the penalty on the change and not on the
matrix, so that without a reason to change nothing does. Only H (K, K) and sum w r x^T (N, K) are
kept: the text may be as long as it likes.

A small ridge fits the text, noise and all; a large one leaves the matrix as it was. Tokens that are
left out of the sums judge: of several ridges the one that misses them least is taken, and the fit
is then made on all tokens.

K is inputs, N outputs, t a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistill.pytorch.factor import damped_factor, mirror_lower, mirror_upper

# Rows of H that are summed at once: H is symmetric, and a strip ends at its own diagonal block.
_STRIP = 256


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
        change: What to add to the matrix, float32, shape (N, K).
        ridge: The ridge that was used.
        missed_before: Weighted mean square of what the outputs missed, over all tokens.
        missed_after: The same with the change.
    """

    change: Tensor
    ridge: float
    missed_before: float
    missed_after: float


class Equations:
    """The normal equations of a fit, to which tokens are added batch by batch."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        """Begin without tokens.

        Args:
            inputs: Columns of the matrix, K.
            outputs: Its rows, N.
            device: Where the tokens are, and the sums are made; the CPU if not given.
        """
        self._H = torch.zeros(inputs, inputs, device=device)
        self._C = torch.zeros(outputs, inputs, device=device)
        self._missed = 0.0
        self._numbers = 0
        self._left_out: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, r: Tensor, weights: Tensor, *, left_out: bool = False) -> None:
        """Add tokens.

        Args:
            x: Inputs of the matrix, shape (t, K).
            r: What its outputs miss, shape (t, N).
            weights: Weight of each token, shape (t,).
            left_out: Whether these tokens judge the ridge, before they are fitted like the others.
        """
        root = weights.sqrt()[:, None]
        x, r = x * root, r * root
        self._missed += r.square().sum(dtype=torch.float64).item()
        self._numbers += r.numel()
        if left_out:
            self._left_out.append((x, r))
        else:
            self._sum(x, r)

    def solve(self, ridges: Sequence[float]) -> Fit:
        """Fit, with the ridge of those given that misses the tokens left out least.

        Args:
            ridges: One ridge or more; where no tokens were left out the first is taken.

        Returns:
            The fit. Of inputs that are all zero no change is made.

        Raises:
            ValueError: If an input or what is missed is not a finite number.
        """
        ridge = ridges[0]
        if self._missed == 0:
            return Fit(torch.zeros_like(self._C), ridge, 0.0, 0.0)
        if len(ridges) > 1 and self._left_out:
            mirror_lower(self._H)
            errors = [self._missed_by(self._change(value)) for value in ridges]
            ridge = ridges[errors.index(min(errors))]
        for x, r in self._left_out:
            self._sum(x, r)
        self._left_out = []
        mirror_lower(self._H)
        change = self._change(ridge)
        # sum w |x dW^T - r|^2 = sum w |r|^2 - 2 <dW, C> + <dW H, dW>
        squares = (change @ self._H).mul_(change).sub_(2 * change * self._C)
        after = self._missed + squares.sum(dtype=torch.float64).item()
        return Fit(change, ridge, self._missed / self._numbers, max(0.0, after) / self._numbers)

    def change(self, ridge: float) -> Tensor:
        """The change of the matrix alone, of the tokens that were not left out.

        Args:
            ridge: The ridge.

        Returns:
            Shape (N, K). Of inputs that are all zero no change is made.

        Raises:
            ValueError: If an input or what is missed is not a finite number.
        """
        mirror_lower(self._H)
        return self._change(ridge)

    def _sum(self, x: Tensor, r: Tensor) -> None:
        K = len(self._H)
        for start in range(0, K, _STRIP):
            end = min(start + _STRIP, K)
            self._H[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])
        self._C.addmm_(r.T, x)

    def _change(self, ridge: float) -> Tensor:
        """Solve dW (H + damping) = C; H is whole before and after."""
        diagonal = self._H.diagonal().clone()
        if not (diagonal.isfinite().all() and self._C.isfinite().all()):
            raise ValueError("the inputs of the fit are not finite numbers")
        if not diagonal.any():
            return torch.zeros_like(self._C)
        damped_factor(self._H, ridge)
        L = self._H.tril()
        halfway = torch.linalg.solve_triangular(L.T, self._C, upper=True, left=False)
        change: Tensor = torch.linalg.solve_triangular(L, halfway, upper=False, left=False)
        mirror_upper(self._H)
        self._H.diagonal().copy_(diagonal)
        return change

    def _missed_by(self, change: Tensor) -> float:
        """What a change misses of the tokens that were left out."""
        return sum(
            (r - x @ change.T).square().sum(dtype=torch.float64).item() for x, r in self._left_out
        )
