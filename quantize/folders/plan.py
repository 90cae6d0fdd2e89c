"""The plan of a quantized folder: how each module is stored, and which tensors stay float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mistill.errors import SettingsError
from mistill.pytorch.loading import read_tensors
from mistill.pytorch.stages import MATRICES
from mistill.weights.gptq_layout import EMBEDDING, HEAD, GptqFormat, ModuleFormat, QuantizedWeight
from quantize.folders.float_model import FloatModel, require_fit
from quantize.gptq.rounding import round_weight
from quantize.overrides import require_matches
from quantize.settings import GptqSettings, GridSettings, RoundingSettings

# Scales tried for each group of a table that is rounded.
_TABLE_SEARCH = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How every module of a model is to be stored.

    Attributes:
        layout: How GPTQ tensors are stored, as config.json will say.
        embedding: How the embedding is stored; None if it stays float.
        head: How the head is stored; None likewise.
        head_table: The table that is written as the head: its own, or a quantized one that the
            embedding shares; None if it is a float embedding, which is written as such.
        matrices: Names of the matrices and tables that are quantized.
    """

    layout: GptqFormat
    embedding: ModuleFormat | None
    head: ModuleFormat | None
    head_table: str | None
    matrices: tuple[str, ...]


def make_plan(model: FloatModel, settings: GridSettings) -> Plan:
    """Decide how every module is stored, and refuse what does not fit.

    Args:
        model: The model.
        settings: How to quantize.

    Returns:
        The plan.

    Raises:
        SettingsError: If groups do not divide a matrix, an override matches nothing, or the two
            names of one table are to have different bits.
    """
    overrides = settings.module_formats()
    require_matches(overrides, model.matrices)
    forms = {name: settings.format_of(name) for name in model.matrices}
    for form in dict.fromkeys(form for form in forms.values() if form is not None):
        own = {name: model.matrices[name] for name in forms if forms[name] == form}
        require_fit(replace(model, matrices=own), form.bits, form.group_size)
    embedding, head = _tables(model, settings)
    tied = bool(model.config.tie_word_embeddings)
    tables = [(EMBEDDING, embedding)] if tied else [(EMBEDDING, embedding), (HEAD, head)]
    quantized = [name for name, form in forms.items() if form is not None]
    quantized += [name for name, form in tables if form is not None]
    used = [form for form in (*forms.values(), embedding, head) if form is not None]
    layout = GptqFormat(
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        activation_order=isinstance(settings, GptqSettings) and settings.order == "dynamic",
        checkpoint_format="gptq" if all(form.symmetric for form in used) else "gptq_v2",
        modules=(
            *(
                (name.replace(".", r"\.") + "$", form)
                for name, form in ((EMBEDDING, embedding), (HEAD, head))
                if form is not None
            ),
            *overrides,
        ),
        head=head is not None,
        embedding=embedding is not None,
    )
    head_table = (EMBEDDING if head is not None else None) if tied else HEAD
    return Plan(
        layout=layout,
        embedding=embedding,
        head=head,
        head_table=head_table,
        matrices=tuple(quantized),
    )


def _tables(
    model: FloatModel, settings: GridSettings
) -> tuple[ModuleFormat | None, ModuleFormat | None]:
    """How the embedding and the head are stored."""
    embedding, head = settings.embedding_bits, settings.head_bits
    if model.config.tie_word_embeddings:
        if embedding is not None and head is not None and embedding != head:
            raise SettingsError(
                f"the embedding and the head of this model are one table, which cannot have "
                f"{embedding} and {head} bits; give one of embedding_bits and head_bits"
            )
        embedding = head = embedding or head
    form = settings.default_format
    return (
        None if embedding is None else replace(form, bits=embedding),
        None if head is None else replace(form, bits=head),
    )


def read_table(model: FloatModel, name: str) -> Tensor:
    """Read the embedding or the head.

    Args:
        model: The float model.
        name: Its module.

    Returns:
        Shape (V, D), in the type it is stored in.
    """
    return read_tensors(model.folder, f"{name}.")["weight"]


def round_table(table: Tensor, settings: GridSettings, form: ModuleFormat) -> QuantizedWeight:
    """Round a table on the best of some scales for each group.

    Args:
        table: Shape (n, D), all rows or some: they do not touch one another.
        settings: How to quantize.
        form: Bits and groups of the table.

    Returns:
        The codes.
    """
    own = RoundingSettings(
        bits=form.bits,
        group_size=form.group_size,
        symmetric=form.symmetric,
        scale_type=settings.scale_type,
    )
    return round_weight(table, own, candidates=_TABLE_SEARCH)


def rounded_rows(settings: GridSettings, form: ModuleFormat) -> Callable[[Tensor], Tensor]:
    """A function that rounds rows of a table to their codes and back.

    Args:
        settings: How to quantize.
        form: Bits and groups of the table.

    Returns:
        A function of some rows (n, D).
    """
    return lambda rows: torch.from_numpy(round_table(rows, settings, form).dequantize())


def layer_rest(model: FloatModel, index: int, settings: GridSettings) -> dict[str, Tensor]:
    """The tensors of a layer that stay float: norms, biases, and matrices that an override keeps.

    Args:
        model: The float model.
        index: The layer.
        settings: How to quantize.

    Returns:
        Tensors by their names in the model.
    """
    layer = f"model.layers.{index}."
    quantized = {
        f"{name}.weight" for name in MATRICES if settings.format_of(f"{layer}{name}") is not None
    }
    return {
        f"{layer}{name}": tensor
        for name, tensor in read_tensors(model.folder, layer).items()
        if name not in quantized and not name.endswith("rotary_emb.inv_freq")
    }
