"""Products of float32 matrices by the quicker of the two libraries that torch holds.

torch multiplies float32 matrices with MKL, which uses half the width of AVX-512 on processors of
AMD: 110 GFLOP/s on one core of Zen 5, where oneDNN reaches 255 and is as exact. torch hands such
products to oneDNN only once their factors may be rounded to bfloat16, and oneDNN rounds them only
where the processor has instructions for tiles of bfloat16 (AMX), as AMD's have not. So the
permission is given there, unless a product turns out to be rounded, and only while many positions
are computed at once: MKL is twice as fast for one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import torch

_PLAIN, _BY_ONE_DNN = "highest", "medium"

# Of the product below: 1e-6 in float32, 3e-3 with factors in bfloat16.
_ROUNDING = 1e-5


class _Users:
    """How many bodies of ``fast_products`` run, in all threads of the process."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.count = 0


_users = _Users()


@contextmanager
def fast_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices while the body runs, where it is faster and as exact.

    Nothing changes where there is a GPU, where somebody has chosen a precision of products
    (``torch.set_float32_matmul_precision``, or one of ``torch.backends``), and on processors of
    other makers than AMD.

    Yields:
        Nothing. torch's setting is one of the process; it is as before when the last body ends.
    """
    with _users.lock:  # held while the processor is looked at too, which changes the setting
        by_one_dnn = (_users.count > 0 or _nothing_is_chosen()) and one_dnn_is_better()
        if by_one_dnn:
            _users.count += 1
            torch.set_float32_matmul_precision(_BY_ONE_DNN)
    try:
        yield
    finally:
        if by_one_dnn:
            with _users.lock:
                _users.count -= 1
                if _users.count == 0:
                    torch.set_float32_matmul_precision(_PLAIN)


@cache
def one_dnn_is_better() -> bool:
    """Whether oneDNN is faster on this processor, and rounds no factor of a product.

    It is asked where no precision of products was chosen, and leaves it so.

    Returns:
        The answer, which holds for the whole process.
    """
    if (
        torch.accelerator.is_available()
        or not torch.backends.mkldnn.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not _is_amd()
    ):
        return False
    torch.set_float32_matmul_precision(_BY_ONE_DNN)
    try:
        return _error_of_a_product() < _ROUNDING
    finally:
        torch.set_float32_matmul_precision(_PLAIN)


def _nothing_is_chosen() -> bool:
    """Whether torch computes products as it comes."""
    try:
        return torch.get_float32_matmul_precision() == _PLAIN
    except RuntimeError:  # chosen for one backend, through torch.backends
        return False


def _is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is one of AMD's."""
    told = cpuinfo.read_text("utf-8", "replace") if cpuinfo.is_file() else platform.processor()
    return "AuthenticAMD" in told


def _error_of_a_product() -> float:
    """How far a product is from the exact one, relative to its length."""
    a, b = (torch.arange(64 * 512).mul(step).float().sin() for step in (7919, 104729))
    a, b = a.reshape(64, 512), b.reshape(512, 64)
    exact = a.double() @ b.double()
    return float((torch.mm(a, b).double() - exact).norm() / exact.norm())
