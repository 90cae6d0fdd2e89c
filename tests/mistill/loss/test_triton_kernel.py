"""The kernel for GPUs, run by Triton's interpreter on the CPU, against its twin in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
CHECK = """
import torch
from mistill.loss import losses
from mistill.loss.divergences import FORWARD_KL
from mistill.loss.heads import Head, PlainWeight, as_head
from mistill.loss.targets import DenseTargets
from mistill.loss.triton_kernel import forward_kl_rows

assert losses.runs_triton(torch.device("cpu"))
torch.manual_seed(0)
for n, V in ((3, 61), (2, 4096), (2, 9001)):
    for temperature in (1.0, 2.0):
        student, teacher = 5 * torch.randn(n, V), 5 * torch.randn(n, V)
        log_q = torch.log_softmax(student.double() / temperature, -1)
        log_p = torch.log_softmax(teacher.double() / temperature, -1)
        slow = FORWARD_KL.rows(log_p.clone(), log_q, (torch.empty_like(log_q),), gradient=True)
        before = teacher.clone()
        alone = forward_kl_rows(student.clone(), teacher, temperature, gradient=False)
        fast = forward_kl_rows(student, teacher, temperature, gradient=True)
        assert torch.equal(teacher, before) and torch.equal(fast, alone)
        torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.double(), log_q, rtol=1e-4, atol=1e-7)
same = 20 * torch.randn(4, 500)
assert (forward_kl_rows(same.clone(), same, 1.0, gradient=False) < 1e-6).all()

# the whole head loss, with and without it
results = []
for fused in (True, False):
    losses._fuses = lambda *_, fused=fused: fused
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    targets = DenseTargets(torch.randn(9, 12), as_head(torch.randn(50, 12)))
    head = Head(PlainWeight(weight), scale=0.7)
    loss = losses.head_loss(
        hidden, head, targets, torch.zeros(9, dtype=torch.int64), positions_in_step=9,
        temperature=1.5, memory_mib=50 * 4 * 2 * 4 / 2**20,
    )
    loss.loss.backward()
    results.append((loss.loss, loss.divergence, hidden.grad, weight.grad))
for fast, slow in zip(*results):
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-7)
print("equal")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux alone")
def test_the_kernel_computes_what_its_twin_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_kernel_computes_what_its_twin_computes_on_a_gpu() -> None:
    from mistill.loss.divergences import FORWARD_KL
    from mistill.loss.triton_kernel import forward_kl_rows

    student, teacher = (5 * torch.randn(64, 32_000, device="cuda") for _ in range(2))
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    slow = FORWARD_KL.rows(log_p, log_q, (torch.empty_like(log_q),), gradient=True)
    fast = forward_kl_rows(student, teacher, 1.0, gradient=True)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student, log_q, rtol=1e-4, atol=1e-7)
