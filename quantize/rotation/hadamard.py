"""Orthogonal matrices of any size that spread one large number evenly over many.

A Hadamard matrix holds only 1 and -1, and its rows are at right angles. There is one of order 1, 2
and, by Paley's first construction (1933), q + 1 for every prime q = 3 mod 4; the Kronecker product
of two is another (Sylvester, 1867). That reaches the widths of most models: 4096 = 2^12, and 576 =
12 * 12 * 4. For a width that it does not reach a random rotation does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASES = (12, 20, 24, 28, 44, 48, 60, 68, 72, 80, 84)


def random_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, of equal magnitudes where there is a Hadamard matrix.

    Signs are drawn for its rows (a randomized Hadamard transform: Ashkboos et al., 2024, section 3,
    https://arxiv.org/abs/2404.00456). Else it is the Q of a Gaussian matrix.

    Args:
        size: Its order, at least 1.
        seed: Of the signs, or of the Gaussian matrix.

    Returns:
        Shape (size, size), float64, Q Q^T = 1.
    """
    generator = torch.Generator().manual_seed(seed)
    H = hadamard(size)
    if H is None:
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        # The signs of R's diagonal make Q uniform over all rotations, and the same everywhere.
        return torch.mul(Q, R.diagonal().sign())
    signs = torch.randint(0, 2, (size, 1), generator=generator).double().mul_(2).sub_(1)
    return H.mul(signs).mul_(size**-0.5)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix.

    Args:
        size: Its order, at least 1.

    Returns:
        Shape (size, size), float64, of 1 and -1; None for an order that is not reached here.
    """
    if size & (size - 1) == 0:
        H = torch.ones(1, 1, dtype=torch.float64)
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while len(H) < size:
            H = torch.kron(H, step)
        return H
    for base in _BASES:
        if size % base == 0:
            rest = hadamard(size // base)
            first = _paley(base - 1)
            if rest is not None and first is not None:
                return torch.kron(first, rest)
    return None


def _paley(q: int) -> Tensor | None:
    """The matrix of order q + 1, for a prime q = 3 mod 4."""
    if q % 4 != 3 or any(q % divisor == 0 for divisor in range(2, int(q**0.5) + 1)):
        return None
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)])
    indices = torch.arange(q)
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1, -1
    S[1:, 1:] = character[(indices[:, None] - indices[None, :]) % q]
    return S + torch.eye(q + 1, dtype=torch.float64)
