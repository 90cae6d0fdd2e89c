"""Folders for CTranslate2, made by its own converter; our Python must be of its version."""

from __future__ import annotations

from benchmarks.rivals.making import Order, find_package, float_folder, run_offline
from mistill.settings import require

_TYPES = ("int8", "float32")

# Our own libraries first, and no mistral-common, which needs more than it says.
_CONVERT = (
    "import sys; sys.path.append({packages!r}); sys.modules['mistral_common'] = None; "
    "from ctranslate2.converters.transformers import main; main()"
)


def check_variant(variant: str) -> None:
    """Refuse a type that weights are not stored in.

    Args:
        variant: ``int8`` or ``float32``.
    """
    require(variant in _TYPES, f"ctranslate2's variants are {', '.join(_TYPES)}, not {variant!r}")


def make(order: Order) -> tuple[dict[str, str], str]:
    """Make a folder.

    Args:
        order: The weight format, the source and the folders.

    Returns:
        Settings of the engine, and how the folder was made.
    """
    weights, preparation = float_folder(order.source, order.scratch)
    package, python = find_package(order.environment, "ctranslate2", ("torch", "transformers"))
    command = [str(python), "-c", _CONVERT.format(packages=str(package.parent))]
    command += ["--model", str(weights), "--output_dir", str(order.folder)]
    command += ["--quantization", order.variant, "--force"]
    run_offline(command)
    how_made = f"{preparation}ct2-transformers-converter --quantization {order.variant}"
    return {"compute type": order.variant}, how_made
