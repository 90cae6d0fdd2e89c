"""The Cholesky factor of a damped Hessian, made in the memory of one such matrix.

A Hessian of 14,336 inputs, as Mistral 7B has them, fills 0.8 GB; four copies of it would be more
than the layer itself. So the Cholesky factor grows in place, in the lower triangle, while the upper
one keeps the Hessian: if it turns out not to be positive, it is restored from there and damped
more.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns that are factored at once.
_BLOCK = 256


def damped_factor(A: Tensor, damp_percent: float) -> float:
    """Replace the lower triangle of a Hessian by its Cholesky factor L, with A + damping = L L^T.

    Args:
        A: Shape (K, K), symmetric, its diagonal above 0. Its lower triangle becomes L; what is
            above the diagonal stays.
        damp_percent: Share of the mean diagonal to add to the diagonal, at first. It is doubled
            until there is a factor.

    Returns:
        The share that was added in the end.

    Raises:
        ValueError: If A has no factor with all its mean diagonal added.
    """
    diagonal = A.diagonal().clone()
    damping = damp_percent
    while True:
        A.diagonal().copy_(diagonal + damping * diagonal.mean())
        if _factored(A):
            return damping
        if damping >= 1:
            raise ValueError("H is not a mean of x x^T: it has no Cholesky factor when damped")
        damping = min(1.0, 2 * damping)
        mirror_upper(A)


def rearranged(A: Tensor, order: Tensor) -> Tensor:
    """A copy of a matrix with rows and columns in another order.

    Args:
        A: Shape (K, K).
        order: Shape (K,), the row and column that comes at each position.

    Returns:
        Shape (K, K).
    """
    result = torch.empty_like(A)
    for start, end in _strips(len(A)):
        result[start:end] = A[order[start:end]][:, order]
    return result


def mirror_lower(A: Tensor) -> None:
    """Make a matrix symmetric from what is on and below its diagonal, in place.

    Args:
        A: Shape (K, K).
    """
    for start, end in _strips(len(A)):
        block = A[start:end, start:end]
        block.copy_(block.tril() + block.tril(-1).T)
        A[:start, start:end] = A[start:end, :start].T


def mirror_upper(A: Tensor) -> None:
    """Make a matrix symmetric from what is above its diagonal, in place; the diagonal stays.

    Args:
        A: Shape (K, K).
    """
    mirror_lower(A.T)


def _factored(A: Tensor) -> bool:
    """Cholesky's algorithm by blocks of columns; False where a pivot is not above 0."""
    for start, end in _strips(len(A)):
        before = A[start:end, :start]
        block = A[start:end, start:end]
        L, failed_at = torch.linalg.cholesky_ex(block.addmm(before, before.T, alpha=-1))
        if failed_at:
            return False
        block.copy_(block.triu(1) + L)
        below = A[end:, start:end]
        below.addmm_(A[end:, :start], before.T, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(L.T, below, upper=True, left=False))
    return True


def _strips(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]
