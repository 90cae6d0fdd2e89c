"""Cost, checks and tuning of an ONNX folder as text and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mistill.cost_model.onnx_lint import Lint
from mistill.shown import facts_table, plain

if TYPE_CHECKING:
    from rich.console import RenderableType


def graph_facts(name: str, lint: Lint) -> RenderableType:
    """Operators of a graph, bytes that a step reads, and slow kernels.

    Args:
        name: The file of the graph.
        lint: Findings about the graph.

    Returns:
        A table.
    """
    counts = sorted(lint.operators.items(), key=lambda entry: -entry[1])
    cost, slow = lint.cost, len(lint.findings)
    rows = {
        "graph": f"{name}: {', '.join(f'{count} {kind}' for kind, count in counts[:6])}",
        "read per token": f"{cost.bytes_per_token / 1e6:,.1f} MB of weights, "
        f"{cost.packed_bytes_per_token / 1e6:,.1f} MB as ONNX Runtime packs them, and "
        f"{cost.cache_bytes_per_position / 1e3:,.1f} kB of KV cache for each earlier token",
        "slow kernels": "none known" if not slow else f"{slow}, listed below",
    }
    return facts_table(rows)


def manifest_facts(manifest: Mapping[str, Any]) -> RenderableType:
    """What was measured when an ONNX folder was exported.

    Args:
        manifest: Its manifest.json.

    Returns:
        A table.
    """
    rows = {}
    if manifest.get("ceiling_tokens_per_second"):
        rows["upper bound"] = (
            f"{manifest['ceiling_tokens_per_second']:,.0f} tokens/s at a memory bandwidth of "
            f"{manifest['memory_bytes_per_second'] / 1e9:.1f} GB/s"
        )
    if manifest.get("speed"):
        rows["speed"] = speed_in_words(manifest["speed"])
    parity = manifest.get("parity")
    rows["against PyTorch"] = (
        "not compared"
        if parity is None
        else f"mean KL {parity['mean_kl']:.2g} nats, same most probable token at "
        f"{parity['same_top']:.1%}, largest difference of a logit "
        f"{parity['max_difference']:.2g}, over {parity['positions']} positions"
    )
    codes = manifest.get("codes")
    if codes is not None:
        rows["codes"] = (
            f"{codes['codes']:,} in {codes['matrices']} matrices, the same bytes as the source"
        )
        if codes.get("decoded"):
            rows["codes"] += f"; {codes['decoded']} matrices are stored as floats, as requested"
    if manifest.get("float_columns"):
        rows["float columns"] = (
            f"{manifest['float_columns']} outlier columns behind each norm, multiplied in float32"
        )
    tuning = manifest.get("tuning")
    if tuning is not None:
        choices = "; ".join(f"{kind}: {kernel}" for kind, kernel in tuning["choices"].items())
        rows["tuned for"] = (
            f"{tuning['machine']}, {tuning['threads']} threads: {choices or 'no kernel was chosen'}"
        )
    return facts_table(rows)


def speed_in_words(speed: Mapping[str, float]) -> str:
    """What a chatbot that was made for a speed was asked for, and what became of it.

    Args:
        speed: The entry ``speed`` of its manifest.json.

    Returns:
        Tokens a second, on the processor that it was made on.
    """
    return (
        f"{speed['wanted']:g} tokens/s asked for, {speed['predicted']:.0f} predicted, "
        f"{speed['measured']:.0f} measured where it was made"
    )


def tuning_table(tuning: Mapping[str, Any]) -> RenderableType:
    """The times of matrix products that a tuned export was chosen by.

    Args:
        tuning: The entry ``tuning`` of a manifest.

    Returns:
        A table.
    """
    from rich.table import Table

    table = Table(
        title=plain(
            f"matrix products of all layers on {tuning['machine']}, {tuning['threads']} threads"
        ),
        caption="* is the chosen kernel: the fastest for a prompt of 512 tokens and a reply of "
        "128 among those that change no weight. Kernels in brackets would change weights.",
    )
    table.add_column("matrices")
    table.add_column("kernel")
    table.add_column("ms per token", justify="right")
    table.add_column("ms per prompt of 512", justify="right")
    last = None
    for row in tuning["table"]:
        matrices = f"{row['kind']}, {row['bits']} bits"
        kernel = row["kernel"] if row["allowed"] else f"({row['kernel']})"
        table.add_row(
            plain("" if matrices == last else matrices),
            plain(f"{kernel} *" if row["chosen"] else kernel),
            f"{row['token_ms']:.3f}",
            f"{row['prompt_ms']:.1f}" if row["prompt_ms"] else "",
        )
        last = matrices
    return table
