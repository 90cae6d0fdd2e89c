"""The loss head against full logits, TRL's kernel and Liger's chunked loss: memory and time.

    python -m benchmarks.suite.loss_head --rivals-python PATH

Every method gets the same hidden states and heads, float32, and computes forward KL and the
gradients of the student's hidden states and head. Rivals live in an environment of their own
(trl==1.16.0 and liger-kernel==0.8.5, the latter installed without its dependencies), whose Python
is named; without it only full logits are compared. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.turns import paired_ratio, serve, summary, take_turns

METHODS = ("ours", "full logits", "trl", "liger")
SHAPES = {"paper": (32_000, 2_048, 1_024, 4_096), "small": (1_000, 64, 32, 48)}


def made(shape: str, kept: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of both models, and which positions count."""
    V, T, D, teacher_D = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / math.sqrt(math.sqrt(size[-1]))

    mask = (
        torch.rand(T, generator=generator) < kept if kept < 1 else torch.ones(T, dtype=torch.bool)
    )
    return numbers(T, D), numbers(V, D), numbers(T, teacher_D), numbers(V, teacher_D), mask


def ours(hidden: Tensor, head: Tensor, p_hidden: Tensor, p_head: Tensor, mask: Tensor) -> Tensor:
    """Mistill's."""
    from mistill.loss.heads import as_head
    from mistill.loss.losses import head_loss
    from mistill.loss.targets import DenseTargets

    kept = int(mask.sum())
    return head_loss(
        hidden[mask],
        head,
        DenseTargets(p_hidden[mask], as_head(p_head)),
        torch.zeros(kept, dtype=torch.int64),
        positions_in_step=kept,
    ).loss


def full_logits(
    hidden: Tensor, head: Tensor, p_hidden: Tensor, p_head: Tensor, mask: Tensor
) -> Tensor:
    """Both models' logits, as a training loop without a special head computes them."""
    log_q = torch.log_softmax(hidden @ head.t(), dim=-1)
    with torch.no_grad():
        log_p = torch.log_softmax(p_hidden @ p_head.t(), dim=-1)
    terms = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms[mask].sum() / mask.sum()


def trl(hidden: Tensor, head: Tensor, p_hidden: Tensor, p_head: Tensor, mask: Tensor) -> Tensor:
    """TRL's kernel, called as its trainer does without a GPU: all positions, then the mask."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    each, _ = ChunkedDivergenceFunction.apply(hidden, head, None, p_hidden, p_head, None, 0.0, 1.0)
    value: Tensor = each.masked_fill(~mask, 0).sum() / mask.sum()
    return value


def liger(hidden: Tensor, head: Tensor, p_hidden: Tensor, p_head: Tensor, mask: Tensor) -> Tensor:
    """Liger's chunked loss, its share of cross-entropy switched off."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256
    )
    labels = torch.where(mask, 0, -100)
    value: Tensor = loss(hidden, head, p_hidden, p_head, labels)
    return value


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "full logits": full_logits,
    "trl": trl,
    "liger": liger,
}


def child(method: str, shape: str, kept: float, threads: int) -> None:
    """One method, once for every line on standard input."""
    torch.set_num_threads(threads)
    hidden, head, p_hidden, p_head, mask = made(shape, kept)
    hidden.requires_grad_(), head.requires_grad_()

    def work() -> dict[str, float]:
        loss = LOSSES[method](hidden, head, p_hidden, p_head, mask)
        loss.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        figures = {"loss": loss.item(), "gradient_norm": head.grad.norm().item()}
        hidden.grad = head.grad = None
        return figures

    serve(work)


def exactness(shape: str) -> dict[str, float]:
    """Ours in float32 against the definition in float64, on 256 positions."""
    hidden, head, p_hidden, p_head, mask = made(shape, 1.0)
    few = slice(0, 256)
    hidden, p_hidden, mask = hidden[few], p_hidden[few], mask[few]
    errors: dict[str, Any] = {}
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = ours(*leaves, p_hidden, p_head, mask)
    loss.backward()
    exact = hidden.double().requires_grad_(), head.double().requires_grad_()
    true = full_logits(*exact, p_hidden.double(), p_head.double(), mask)
    true.backward()
    errors["loss_relative_error"] = abs(loss.item() / true.item() - 1)
    for name, mine, his in zip(("hidden", "head"), leaves, exact, strict=True):
        assert mine.grad is not None
        assert his.grad is not None
        cosine = torch.cosine_similarity(mine.grad.double().flatten(), his.grad.flatten(), dim=0)
        errors[f"{name}_gradient_cosine"] = cosine.item()
    errors["loss_of_a_model_with_itself"] = ours(p_hidden, p_head, p_hidden, p_head, mask).item()
    return errors


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals-python", help="Python that has trl and liger-kernel")
    parser.add_argument("--shape", choices=SHAPES, default="paper")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=float, default=1.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.shape, args.kept, args.threads)
        return
    report: dict[str, Any] = {"shape": SHAPES[args.shape], "threads": args.threads}
    for kept in (1.0, 0.5):
        commands = {}
        for method in METHODS:
            python = sys.executable if method in ("ours", "full logits") else args.rivals_python
            if python:
                module = [python, "-m", "benchmarks.suite.loss_head", "--shape", args.shape]
                options = ["--child", method, "--kept", str(kept), "--threads", str(args.threads)]
                commands[method] = [*module, *options]
        samples = take_turns(commands, args.rounds)
        table: dict[str, Any] = {}
        for method, turns in samples.items():
            table[method] = {
                "seconds": summary(turns, "seconds"),
                "peak_mib": summary(turns, "peak_mib"),
                "loss": turns[0]["loss"],
            }
            if method != "ours":
                table[method]["ours_seconds_ratio"] = paired_ratio(
                    samples["ours"], turns, "seconds"
                )
                table[method]["ours_peak_ratio"] = paired_ratio(samples["ours"], turns, "peak_mib")
        report[f"kept {kept:g}"] = table
    torch.set_num_threads(args.threads)
    report["exactness"] = exactness(args.shape)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
