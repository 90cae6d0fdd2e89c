"""Which kernel multiplies each kind of matrix fastest on a processor.

The answer depends on the processor: small blocks cost time if integer products are fast, and codes
of 8 bits may be faster than codes of 4 if many tokens share them. Products of the model's own
shapes are timed, for one token and for a prompt, and for each kind of matrix the fastest kernel is
chosen of those that change no weight: a group may be split, and codes of 4 bits may be stored in 8.
The times can be saved as a probe, to tune a graph for that machine on another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.kernels.kernels import KERNELS, Timing
from export.kernels.probe import HERE, Probe, probe_here, read_probe
from export.settings import GraphOptions, OnnxSettings
from export.weights.architecture import EMBEDDING, HEAD, Architecture
from export.weights.folder_weights import FolderWeights
from export.weights.shapes import MatrixKind, StoredFormat, kind_of, product_shapes
from mistill.cost_model.products import Kernel

ANSWER = 128
"""Tokens of the reply, after a prompt of 512, whose time is minimized."""

AS_FAST = 1.1
"""Kernels within this ratio of the fastest count as equally fast. Of those, codes are not stored in
more bits, which would take memory, and the smallest block is chosen, which rounds least."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The chosen kernels, and the times that decided.

    Attributes:
        probe: The times that the kernels were chosen by.
        choices: The kernel of each kind of matrix, by the bits that its source has.
        table: A row for each kind and kernel: milliseconds a step and a prompt of 512 take in
            all layers, whether the source allows it, and whether it was chosen.
    """

    probe: Probe
    choices: Mapping[tuple[MatrixKind, int], Kernel]
    table: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The tuning as JSON values.

        Returns:
            The machine, the choices, the table, and the time of all products of a step.
        """
        chosen_rows = [row for row in self.table if row["chosen"]]
        return {
            "machine": self.probe.machine,
            "threads": self.probe.threads,
            "choices": {
                f"{kind}, {bits} bits": str(kernel) for (kind, bits), kernel in self.choices.items()
            },
            "products_ms_per_token": round(sum(row["token_ms"] for row in chosen_rows), 3),
            "products_ms_per_prompt": round(sum(row["prompt_ms"] for row in chosen_rows), 1),
            "table": list(self.table),
        }


def allowed(stored: StoredFormat, columns: int) -> list[Kernel]:
    """The kernels that change no weight.

    Args:
        stored: Format of the matrix in the source.
        columns: Number of columns of the matrix.

    Returns:
        Kernels that need no padding of the columns.
    """
    forms = {"int8"} if stored.bits == 8 else {"int4"} | ({"int8"} if stored.widens else set())
    return [
        kernel
        for kernel in KERNELS
        if kernel.form in forms
        and kernel.block <= stored.largest
        and stored.group % kernel.block == 0
        and columns % kernel.block == 0
    ]


def tune(
    probe: Probe, architecture: Architecture, stored: Mapping[MatrixKind, Iterable[StoredFormat]]
) -> Tuning:
    """Choose the fastest kernel for each kind of matrix.

    Args:
        probe: Times of the machine's kernels.
        architecture: Architecture of the decoder.
        stored: Formats of each kind of matrix in the source.

    Returns:
        The kernels, least in the time of a prompt of 512 and an answer of 128.
    """
    choices: dict[tuple[MatrixKind, int], Kernel] = {}
    table = []
    for kind, (rows, columns, count) in product_shapes(architecture).items():
        for matrix_format in _by_bits(stored.get(kind, ())):
            allowed_kernels = allowed(matrix_format, columns)
            timed = {
                kernel: timing
                for kernel in KERNELS
                if (timing := probe.timing(kernel, rows, columns)) is not None
            }
            times = {
                kernel: _seconds(kind, timed[kernel])
                for kernel in allowed_kernels
                if kernel in timed
            }
            best = _best(times)
            if best is not None:
                choices[kind, matrix_format.bits] = best
            for kernel, timing in timed.items():
                table.append(
                    {
                        "kind": kind,
                        "bits": matrix_format.bits,
                        "kernel": str(kernel),
                        "token_ms": round(1e3 * count * timing.token, 4),
                        "prompt_ms": 0.0
                        if kind == "head"
                        else round(1e3 * count * timing.prompt, 3),
                        "allowed": kernel in allowed_kernels,
                        "chosen": kernel == best,
                    }
                )
    return Tuning(probe=probe, choices=choices, table=table)


def tuning_for(
    settings: OnnxSettings,
    architecture: Architecture,
    weights: FolderWeights,
    options: GraphOptions,
) -> Tuning:
    """Choose kernels for the target that an export is tuned for.

    Args:
        settings: Settings of the export, with ``tune_for``.
        architecture: Architecture of the decoder.
        weights: Its weights, which say how they are stored.
        options: Bits of the head.

    Returns:
        The kernels.

    Raises:
        SettingsError: If the target is no probe.
    """
    assert settings.tune_for is not None
    shapes = [(rows, columns) for rows, columns, _ in product_shapes(architecture).values()]
    probe = probe_here(shapes) if settings.tune_for == HERE else read_probe(settings.tune_for)
    rounded_bits = {"int4": 4, "int8": 8}.get(settings.precision, 32)
    stored: dict[MatrixKind, set[StoredFormat]] = {}
    for module in architecture.shapes():
        kind = kind_of(module)
        matrix_format = None if kind is None else weights.stored_as(module, rounded_bits)
        if kind is not None and matrix_format is not None:
            stored.setdefault(kind, set()).add(matrix_format)
    head = weights.stored_as(EMBEDDING if architecture.tied else HEAD, options.head_bits)
    if head is not None and options.head_bits != 32:
        stored["head"] = {head}
    return tune(probe, architecture, stored)


def _by_bits(forms: Iterable[StoredFormat]) -> list[StoredFormat]:
    """For each number of bits, one format whose blocks fit the groups of all."""
    merged: dict[int, StoredFormat] = {}
    for stored_format in forms:
        other = merged.get(stored_format.bits, stored_format)
        merged[stored_format.bits] = replace(
            stored_format, group=math.gcd(stored_format.group, other.group)
        )
    return [merged[bits] for bits in sorted(merged)]


def _best(times: Mapping[Kernel, float]) -> Kernel | None:
    """The fastest kernel; of equally fast ones, that with the least memory and rounding."""
    least = min(times.values(), default=0.0)
    close = [kernel for kernel, seconds in times.items() if seconds <= AS_FAST * least]
    return min(close, key=lambda kernel: (kernel.form, kernel.block), default=None)


def _seconds(kind: MatrixKind, timing: Timing) -> float:
    """Time for a prompt and its reply; the head multiplies only one position of a prompt."""
    prompt = timing.token if kind == "head" else timing.prompt
    return prompt + ANSWER * timing.token
