"""What is known of an ONNX folder's speed, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mistill.cost_model.onnx_lint import Lint

if TYPE_CHECKING:
    from rich.console import RenderableType


def graph_facts(name: str, lint: Lint) -> RenderableType:
    """A graph's operators and bytes.

    Args:
        name: Its file.
        lint: What was found in it.

    Returns:
        Something that rich prints.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    counts = sorted(lint.operators.items(), key=lambda entry: -entry[1])
    cost, slow = lint.cost, len(lint.findings)
    rows = {
        "graph": f"{name}: {', '.join(f'{count} {kind}' for kind, count in counts[:6])}",
        "a step reads": f"{cost.bytes_per_token / 1e6:,.1f} MB of weights, "
        f"{cost.packed_bytes_per_token / 1e6:,.1f} MB as ONNX Runtime packs them, and "
        f"{cost.cache_bytes_per_position / 1e3:,.1f} kB for each earlier token",
        "slow kernels": "none known" if not slow else f"{slow}, named below",
    }
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), Text(value))
    return table


def manifest_facts(manifest: Mapping[str, Any]) -> RenderableType:
    """What was measured when an ONNX folder was made.

    Args:
        manifest: Its manifest.json.

    Returns:
        Something that rich prints.
    """
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    rows = {}
    if manifest.get("ceiling_tokens_per_second"):
        rows["at most"] = (
            f"{manifest['ceiling_tokens_per_second']:,.0f} tokens/s, where memory gives "
            f"{manifest['memory_bytes_per_second'] / 1e9:.1f} GB/s"
        )
    parity = manifest.get("parity")
    rows["against PyTorch"] = (
        "not compared"
        if parity is None
        else f"mean KL {parity['mean_kl']:.2g} nats, same first token {parity['same_top']:.1%}, "
        f"largest difference of a logit {parity['max_difference']:.2g}, over "
        f"{parity['positions']} positions"
    )
    codes = manifest.get("codes")
    if codes is not None:
        rows["codes"] = (
            f"{codes['codes']:,} in {codes['matrices']} matrices, byte for byte the source's"
        )
        if codes.get("decoded"):
            rows["codes"] += f"; {codes['decoded']} matrices are floats here, as was asked for"
    if manifest.get("float_columns"):
        rows["in float32"] = (
            f"{manifest['float_columns']} columns behind each norm, whose activations are largest"
        )
    tuning = manifest.get("tuning")
    if tuning is not None:
        chosen = "; ".join(f"{kind}: {kernel}" for kind, kernel in tuning["choices"].items())
        rows["tuned for"] = (
            f"{tuning['machine']}, {tuning['threads']} threads: {chosen or 'nothing to choose'}"
        )
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    return table


def tuning_table(tuning: Mapping[str, Any]) -> RenderableType:
    """What a probe found, and what was chosen by it.

    Args:
        tuning: The entry of a manifest.

    Returns:
        Something that rich prints.
    """
    from rich.table import Table

    table = Table(
        title=f"products of all layers on {tuning['machine']}, {tuning['threads']} threads",
        caption="* is chosen: the least time for a prompt of 512 tokens and an answer of 128 "
        "among the kernels that change no weight; those in brackets would",
    )
    table.add_column("matrices")
    table.add_column("kernel")
    table.add_column("ms a token", justify="right")
    table.add_column("ms a prompt of 512", justify="right")
    last = None
    for row in tuning["table"]:
        place = f"{row['kind']}, {row['bits']} bits"
        kernel = row["kernel"] if row["allowed"] else f"({row['kernel']})"
        table.add_row(
            "" if place == last else place,
            f"{kernel} *" if row["chosen"] else kernel,
            f"{row['token_ms']:.3f}",
            f"{row['prompt_ms']:.1f}" if row["prompt_ms"] else "",
        )
        last = place
    return table
