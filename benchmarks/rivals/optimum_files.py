"""ONNX folders for optimum, made by its own exporter and quantizer."""

from __future__ import annotations

from benchmarks.figures.machine import describe_machine
from benchmarks.rivals.making import Order, float_folder, run_offline
from mistill.errors import ArchitectureError
from mistill.folders.folder import read_json
from mistill.settings import require

_VARIANTS = ("fp32", "int8", "int8+per_channel")
# Its quantizer writes for one set of instructions: the first of these that the machine has.
_INSTRUCTIONS = {
    "avx512_vnni": "--avx512_vnni",
    "avx512f": "--avx512",
    "avx2": "--avx2",
    "asimd": "--arm64",
}


def check_variant(variant: str) -> None:
    """Refuse a way to store weights that its tools have not.

    Args:
        variant: ``fp32``, ``int8`` or ``int8+per_channel``.
    """
    require(variant in _VARIANTS, f"optimum's variants are {', '.join(_VARIANTS)}, not {variant!r}")


def make(order: Order) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        order: The weight format, the source and the folders.

    Returns:
        Settings of its quantizer, and how the folder was made.

    Raises:
        ArchitectureError: If its graph would not run.
    """
    config = read_json(order.source.path / "config.json")
    usual = int(config["hidden_size"]) // int(config["num_attention_heads"])
    width = int(config.get("head_dim") or usual)
    if width != usual:
        raise ArchitectureError(
            f"optimum's ORTModelForCausalLM takes every head to be {usual} wide, hidden_size by "
            f"num_attention_heads, and those of {order.source.path} are {width}; leave optimum out"
        )
    weights, preparation = float_folder(order.source, order.scratch)
    command = [str(order.environment.python), "-P", "-m", "optimum.commands.optimum_cli"]
    export = ["export", "onnx", "--task", "text-generation-with-past"]
    # What int8 is made of is kept for both of its variants.
    graph = order.folder if order.variant == "fp32" else order.scratch / "optimum-float"
    if order.variant == "fp32" or not graph.exists():
        run_offline([*command, *export, "-m", str(weights), str(graph)])
    how_made = f"{preparation}optimum-cli {' '.join(export)}"
    if order.variant == "fp32":
        return {}, how_made
    flags = [quantizer_flag(describe_machine(1).instructions)]
    flags += ["--per_channel"] if order.variant.endswith("per_channel") else []
    quantize = [*command, "onnxruntime", "quantize", "--onnx_model", str(graph), *flags]
    run_offline([*quantize, "-o", str(order.folder)])
    return (
        {"instructions": flags[0].removeprefix("--")},
        f"{how_made}; optimum-cli onnxruntime quantize {' '.join(flags)}",
    )


def quantizer_flag(instructions: tuple[str, ...]) -> str:
    """For which instructions its quantizer shall write.

    Args:
        instructions: What the machine has.

    Returns:
        Its option; that of the oldest x86 ones where none is known.
    """
    flags = [flag for name, flag in _INSTRUCTIONS.items() if name in instructions]
    return flags[0] if flags else "--avx2"
