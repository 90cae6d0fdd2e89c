"""How config.json says that a model is stored as GPTQ codes, in AutoGPTQ's and gptqmodel's names.

Modules may differ in bits and groups: ``dynamic`` in ``quantization_config`` maps regular
expressions to what differs, with ``+:`` before those that are quantized and ``-:`` before those
that are left float, and the first that matches from the start of a module's name decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast, get_args

from mistill.bounded import OutOfBoundsError, call_bounded
from mistill.errors import FolderError

CheckpointFormat = Literal["gptq", "gptq_v2"]

SUPPORTED_BITS = (2, 3, 4, 8)
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class ModuleFormat:
    """How the codes of one module are to be read.

    Attributes:
        bits: Bits per code.
        group_size: Input columns that share a scale, -1 for the whole row.
        symmetric: Whether zeros are all in the middle of the code range.
    """

    bits: int
    group_size: int
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class GptqFormat:
    """What ``quantization_config`` in config.json says about the tensors beside it.

    Attributes:
        bits: Bits per code, 2, 3, 4 or 8.
        group_size: Input columns that share a scale, -1 for the whole row.
        symmetric: Whether zeros are all in the middle of the code range.
        activation_order: Whether columns were walked in the order of their activations, so that
            ``g_idx`` may mix the groups.
        checkpoint_format: Whether zeros are stored minus one ("gptq") or as they are ("gptq_v2").
        modules: Regular expressions and the format of the modules whose names they match from the
            start, None for modules left float; the first that matches decides.
        head: Whether the output head is quantized too.
        embedding: Whether the embedding is.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    activation_order: bool = False
    checkpoint_format: CheckpointFormat = "gptq"
    modules: tuple[tuple[str, ModuleFormat | None], ...] = ()
    head: bool = False
    embedding: bool = False

    def format_of(self, module: str) -> ModuleFormat | None:
        """How a module is stored.

        Args:
            module: Its name, such as ``model.layers.0.mlp.down_proj``.

        Returns:
            Its format, or None if it is left float.
        """
        if (module == HEAD and not self.head) or (module == EMBEDDING and not self.embedding):
            return None
        number = _matching(tuple(pattern for pattern, _ in self.modules), module)
        if number is not None:
            return self.modules[number][1]
        return ModuleFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def to_config(self, **facts: Any) -> dict[str, Any]:
        """What to write as ``quantization_config``, in the names of AutoGPTQ and gptqmodel.

        Args:
            **facts: Further entries, such as ``damp_percent``.

        Returns:
            A JSON-able dictionary; what has no ``dynamic`` and no tables, transformers, optimum
            and gptqmodel read.
        """
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.activation_order,
            "checkpoint_format": self.checkpoint_format,
            "lm_head": self.head,
        }
        if self.embedding:
            config["embedding"] = True
        if self.modules:
            config["dynamic"] = dict(_to_dynamic(*entry) for entry in self.modules)
        return {**config, **facts}


@cache
def _matching(patterns: tuple[str, ...], module: str) -> int | None:
    """The first expression that matches from the start, in a process with a bound of time."""
    if not patterns:
        return None
    try:
        number: int | None = call_bounded(
            "mistill.folders.gptq_format:first_match", list(patterns), module
        )
    except OutOfBoundsError as error:
        raise FolderError(
            f"an expression under dynamic in quantization_config {error} on the name {module}"
        ) from error
    return number


def first_match(patterns: Sequence[str], module: str) -> int | None:
    """Which expression matches the name of a module; for the worker process.

    Args:
        patterns: Regular expressions.
        module: The name, which they match from its start.

    Returns:
        Number of the first that does; None if none does.
    """
    return next((n for n, pattern in enumerate(patterns) if re.match(pattern, module)), None)


def _to_dynamic(pattern: str, form: ModuleFormat | None) -> tuple[str, dict[str, Any]]:
    if form is None:
        return f"-:{pattern}", {}
    entry = {"bits": form.bits, "group_size": form.group_size, "sym": form.symmetric}
    return f"+:{pattern}", entry


def read_quantization(config: Mapping[str, Any]) -> GptqFormat | None:
    """Read the GPTQ part of a config.json.

    Args:
        config: The whole config.json.

    Returns:
        None if the model is not quantized by GPTQ.

    Raises:
        FolderError: If it is, but in a way that mistill does not read.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "gptq":
        return None
    bits, group_size = _read_grid(quantization, "quantization_config")
    symmetric = bool(quantization.get("sym", True))
    name = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if name not in get_args(CheckpointFormat):
        raise FolderError(
            "mistill reads GPTQ weights in checkpoint_format gptq or gptq_v2, and this model has "
            f"{name!r}; convert it with the library that wrote it, or quantize the float model "
            "again"
        )
    if quantization.get("pack_dtype", "int32") != "int32":
        raise FolderError(
            f"mistill reads GPTQ codes packed in int32, and this model has pack_dtype "
            f"{quantization['pack_dtype']!r}; quantize the float model again"
        )
    base = ModuleFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=bool(quantization.get("desc_act", False)),
        checkpoint_format=cast(CheckpointFormat, name),
        modules=_read_dynamic(quantization.get("dynamic"), base),
        head=bool(quantization.get("lm_head", False)),
        embedding=bool(quantization.get("embedding", False)),
    )


def _read_grid(entry: Mapping[str, Any], origin: str) -> tuple[int, int]:
    try:
        bits, group_size = int(entry["bits"]), int(entry["group_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{origin} in config.json must give bits and group_size as whole numbers, not "
            f"bits {entry.get('bits')!r}, group_size {entry.get('group_size')!r}"
        ) from error
    if bits not in SUPPORTED_BITS:
        raise FolderError(
            f"mistill reads GPTQ weights of 2, 3, 4 or 8 bits, and {origin} says {bits}; quantize "
            "the float model again"
        )
    if group_size == 0 or group_size < -1:
        raise FolderError(
            f"group_size in {origin} must be above 0, or -1 for the whole row, got {group_size}"
        )
    return bits, group_size


def _read_dynamic(dynamic: Any, base: ModuleFormat) -> tuple[tuple[str, ModuleFormat | None], ...]:
    if not dynamic:
        return ()
    if not isinstance(dynamic, Mapping):
        raise FolderError(f"dynamic in quantization_config should be an object, not {dynamic!r}")
    modules: list[tuple[str, ModuleFormat | None]] = []
    for key, entry in dynamic.items():
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise FolderError(
                f"{key!r} under dynamic in quantization_config is not a regular expression: {error}"
            ) from error
        if key.startswith("-:"):
            modules.append((pattern, None))
            continue
        if not isinstance(entry, Mapping):
            raise FolderError(f"{key!r} under dynamic in quantization_config should be an object")
        merged = {"bits": base.bits, "group_size": base.group_size, **entry}
        bits, group_size = _read_grid(merged, f"{key!r} under dynamic in quantization_config")
        symmetric = bool(entry.get("sym", base.symmetric))
        form = ModuleFormat(bits=bits, group_size=group_size, symmetric=symmetric)
        modules.append((pattern, form))
    return tuple(modules)
