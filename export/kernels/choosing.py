"""Which kernel multiplies each kind of matrix fastest, on the processor that will chat?

The answer depends on the processor: small blocks cost time where integer products are quick, and
codes of 8 bits may be read faster than codes of 4 where many tokens share them. So products of
the model's own shapes are timed, for one token and for a prompt, and for each kind of matrix the
fastest is taken of those that change no weight: a group may be split, and codes of 4 bits may be
stored in 8. A probe can be saved, and then stands for its machine on another one.
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
from export.weights.shapes import Kind, Stored, kind_of, product_shapes
from mistill.cost_model.products import Kernel

ANSWER = 128
"""Tokens of the answer for which a choice is made, after a prompt of 512."""

AS_FAST = 1.1
"""Kernels within this ratio of the fastest are as fast: codes are then not widened, which costs
memory, and the smallest block is taken, which rounds least."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The kernels that were chosen, and why.

    Attributes:
        probe: What they were chosen by.
        choices: The kernel of each kind of matrix, by the bits that its source has.
        table: A row for each kind and kernel: milliseconds a step and a prompt of 512 take in
            all layers, whether the source allows it, and whether it was chosen.
    """

    probe: Probe
    choices: Mapping[tuple[Kind, int], Kernel]
    table: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The tuning as JSON values.

        Returns:
            The machine, its choices, the table, and what the products of a step take.
        """
        chosen = [row for row in self.table if row["chosen"]]
        return {
            "machine": self.probe.machine,
            "threads": self.probe.threads,
            "choices": {
                f"{kind}, {bits} bits": str(kernel) for (kind, bits), kernel in self.choices.items()
            },
            "products_ms_per_token": round(sum(row["token_ms"] for row in chosen), 3),
            "products_ms_per_prompt": round(sum(row["prompt_ms"] for row in chosen), 1),
            "table": list(self.table),
        }


def allowed(stored: Stored, columns: int) -> list[Kernel]:
    """The kernels that change no weight.

    Args:
        stored: How the source stores the matrix.
        columns: Its columns.

    Returns:
        Kernels, of which none pads the columns if one does not have to.
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
    found: Probe, architecture: Architecture, stored: Mapping[Kind, Iterable[Stored]]
) -> Tuning:
    """Choose the fastest kernel for each kind of matrix.

    Args:
        found: What the machine's kernels take.
        architecture: The decoder.
        stored: How the source stores matrices of each kind.

    Returns:
        The kernels, least in the time of a prompt of 512 and an answer of 128.
    """
    choices: dict[tuple[Kind, int], Kernel] = {}
    table = []
    for kind, (rows, columns, count) in product_shapes(architecture).items():
        for form in _by_bits(stored.get(kind, ())):
            legal = allowed(form, columns)
            timed = {
                kernel: timing
                for kernel in KERNELS
                if (timing := found.timing(kernel, rows, columns)) is not None
            }
            times = {kernel: _seconds(kind, timed[kernel]) for kernel in legal if kernel in timed}
            best = _best(times)
            if best is not None:
                choices[kind, form.bits] = best
            for kernel, timing in timed.items():
                table.append(
                    {
                        "kind": kind,
                        "bits": form.bits,
                        "kernel": str(kernel),
                        "token_ms": round(1e3 * count * timing.token, 4),
                        "prompt_ms": 0.0
                        if kind == "head"
                        else round(1e3 * count * timing.prompt, 3),
                        "allowed": kernel in legal,
                        "chosen": kernel == best,
                    }
                )
    return Tuning(probe=found, choices=choices, table=table)


def tuning_for(
    settings: OnnxSettings,
    architecture: Architecture,
    weights: FolderWeights,
    options: GraphOptions,
) -> Tuning:
    """Choose kernels for the target that an export is tuned for.

    Args:
        settings: What was asked for; the target is given.
        architecture: The decoder.
        weights: Its weights, which say how they are stored.
        options: Bits of the head.

    Returns:
        The kernels.

    Raises:
        SettingsError: If the target is no probe.
    """
    assert settings.tune_for is not None
    shapes = [(rows, columns) for rows, columns, _ in product_shapes(architecture).values()]
    found = probe_here(shapes) if settings.tune_for == HERE else read_probe(settings.tune_for)
    rounded = {"int4": 4, "int8": 8}.get(settings.precision, 32)
    stored: dict[Kind, set[Stored]] = {}
    for module in architecture.shapes():
        kind = kind_of(module)
        form = None if kind is None else weights.stored_as(module, rounded)
        if kind is not None and form is not None:
            stored.setdefault(kind, set()).add(form)
    head = weights.stored_as(EMBEDDING if architecture.tied else HEAD, options.head_bits)
    if head is not None and options.head_bits != 32:
        stored["head"] = {head}
    return tune(found, architecture, stored)


def _by_bits(forms: Iterable[Stored]) -> list[Stored]:
    """Of forms with the same bits but several groups, one whose blocks fit them all."""
    merged: dict[int, Stored] = {}
    for form in forms:
        other = merged.get(form.bits, form)
        merged[form.bits] = replace(form, group=math.gcd(form.group, other.group))
    return [merged[bits] for bits in sorted(merged)]


def _best(times: Mapping[Kernel, float]) -> Kernel | None:
    """The fastest kernel; of several as fast, the smallest in memory and the finest in rounding."""
    least = min(times.values(), default=0.0)
    close = [kernel for kernel, seconds in times.items() if seconds <= AS_FAST * least]
    return min(close, key=lambda kernel: (kernel.form, kernel.block), default=None)


def _seconds(kind: Kind, timing: Timing) -> float:
    """Time in a prompt and its answer; the head multiplies one position of a prompt."""
    prompt = timing.token if kind == "head" else timing.prompt
    return prompt + ANSWER * timing.token
