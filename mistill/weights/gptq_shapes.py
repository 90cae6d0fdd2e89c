"""The shapes and types that the four tensors of a GPTQ matrix must have to be read."""

from __future__ import annotations

from mistill.folders.gptq_format import SUPPORTED_BITS, ModuleFormat
from mistill.weights.code_words import codes_per_unit
from mistill.weights.tensor_files import TensorFiles

# The number of axes and the types of each tensor of a matrix; of several types the usual first.
_TENSORS: dict[str, tuple[int, tuple[str, ...]]] = {
    "qweight": (2, ("I32",)),
    "qzeros": (2, ("I32",)),
    "scales": (2, ("float16", "bfloat16", "float32")),
    "g_idx": (1, ("I32", "I64")),
}


def wrong_shapes(files: TensorFiles, module: str, form: ModuleFormat) -> str | None:
    """What is wrong with the shapes and types of a matrix's tensors.

    Args:
        files: The files.
        module: The matrix.
        form: Its format by config.json.

    Returns:
        A phrase that names a tensor; None if they make a matrix.
    """
    lacking = [name for name in ("qzeros", "scales") if f"{module}.{name}" not in files]
    if lacking:
        return f"{module}.{lacking[0]} is missing"
    of_another_kind = _wrong_kind(files, module)
    if of_another_kind:
        return of_another_kind
    rows, outputs = files.shape(f"{module}.qweight")
    if f"{module}.g_idx" in files:
        (columns,) = files.shape(f"{module}.g_idx")
        bits = rows * 32 / columns
        if bits != form.bits:
            shown = f"{bits:g}" if bits in SUPPORTED_BITS else f"{bits:.2f}"
            return f"config.json says {form.bits} bits, but {module} has codes of {shown}"
    columns = columns_of(files, module, form.bits)
    groups = 1 if form.group_size == -1 else -(-columns // form.group_size)
    stored = files.shape(f"{module}.scales")
    if stored != (groups, outputs):
        return (
            f"config.json says group_size {form.group_size}, which gives {module} scales of shape "
            f"{(groups, outputs)}, but they have the shape {stored}"
        )
    words = outputs * form.bits // 32
    if outputs % codes_per_unit(form.bits):
        words = -(-outputs // codes_per_unit(form.bits)) * (3 if form.bits == 3 else 1)
    if files.shape(f"{module}.qzeros") != (groups, words):
        stored = files.shape(f"{module}.qzeros")
        return f"{module}.qzeros should have the shape {(groups, words)}, but has {stored}"
    return None


def _wrong_kind(files: TensorFiles, module: str) -> str | None:
    """A tensor of another number of axes or another type than the layout has."""
    for name, (axes, types) in _TENSORS.items():
        tensor = f"{module}.{name}"
        if tensor not in files:
            continue
        if len(files.shape(tensor)) != axes or not files.count(tensor):
            kind = "vector" if axes == 1 else "matrix"
            return f"{tensor} should be a {kind}, but has the shape {files.shape(tensor)}"
        if files.dtype(tensor) not in types:
            return f"{tensor} should be of type {types[0]}, not {files.dtype(tensor)}"
    return None


def columns_of(files: TensorFiles, module: str, bits: int) -> int:
    """The number of input columns that a matrix has codes for.

    Args:
        files: The files.
        module: The matrix.
        bits: Bits per code.

    Returns:
        K.
    """
    return files.shape(f"{module}.qweight")[0] * 32 // bits
