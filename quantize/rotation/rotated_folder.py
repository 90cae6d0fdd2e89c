"""Turn the hidden states of a model so that none of their directions stands out.

In a trained model a few hidden dimensions are far larger than the rest, and a grid that has to hold
them has little left for the others. A model of Llama's kind computes the same if its hidden states
x become x Q for an orthogonal Q: a root mean square norm does not see a rotation once its gains
have moved into the matrices behind it, and every matrix that reads or writes hidden states takes Q
in (SliceGPT, Ashkboos et al., 2024a, section 3.1, https://arxiv.org/abs/2401.15024; QuaRot,
Ashkboos et al., 2024b, section 4, stage 1a, https://arxiv.org/abs/2404.00456). What comes out is a
plain folder of the same architecture that costs nothing more to run, except that a head which
shared its table with the embedding has one of its own now: the gains of the last norm are in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from mistill.folders.folder import copy_companions, read_config
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.progress import track
from mistill.pytorch.loading import read_tensors
from mistill.settings import settings_from
from mistill.weights.tensor_writer import TensorWriter
from quantize.folders.float_model import FloatModel, open_float
from quantize.rotation.hadamard import hadamard, random_rotation
from quantize.settings import RotationSettings

if TYPE_CHECKING:
    from quantize.options import RotationOptions

# The matrices of a layer that read hidden states, with the norm before them; and those that write.
_READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

# Rows of a table that are turned at once.
_ROWS_AT_ONCE = 8192


def rotate(
    source: str | Path,
    target: str | Path,
    *,
    settings: RotationSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[RotationOptions],
) -> Path:
    """Write the same model with its hidden states rotated, ready to be quantized.

    One layer is in memory at a time.

    Args:
        source: A float model folder.
        target: The float folder to make; its head has a table of its own.
        settings: Which rotation; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``RotationSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the source is broken or quantized already.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    settings = settings_from(RotationSettings, settings, options)
    target = refuse_existing(target, overwrite, [source])
    model = open_float(source)
    Q = random_rotation(model.config.hidden_size, settings.seed)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    layers = model.config.num_hidden_layers
    with (
        torch.inference_mode(),
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Rotating", total=layers, unit="layers") as progress,
    ):
        for name, tensor in _tables(model, Q):
            writer.add(name, tensor.to(dtype))
        for index in range(layers):
            prefix = f"model.layers.{index}."
            for name, tensor in rotate_layer(read_tensors(model.folder, prefix), Q):
                writer.add(f"{prefix}{name}", tensor.to(dtype))
            progress.advance(1)
        config = read_config(model.folder)
        config.pop("torch_dtype", None)
        config |= {"dtype": settings.dtype, "tie_word_embeddings": False}
        write_json(partial / "config.json", config)
        copy_companions(model.folder, partial)
        add_lineage(
            partial,
            step="rotate",
            settings=settings,
            source=model.folder,
            hadamard=hadamard(len(Q)) is not None,
            untied=bool(model.config.tie_word_embeddings),
        )
    return target


def rotate_layer(layer: dict[str, Tensor], Q: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Rotate what a layer reads and writes.

    Args:
        layer: The tensors of a decoder layer, by their names in it.
        Q: Shape (D, D), orthogonal, float64.

    Yields:
        Name and tensor, float64: norms of ones, and matrices that hold their gains and Q.
    """
    for name, tensor in layer.items():
        module, _, part = name.rpartition(".")
        wide = tensor.double()
        if module in _READERS and part == "weight":
            yield name, wide * layer[f"{_READERS[module]}.weight"].double() @ Q
        elif module in _WRITERS:
            yield name, Q.T @ wide if part == "weight" else wide @ Q
        elif module in _READERS.values():
            yield name, torch.ones_like(wide)
        elif not name.endswith("rotary_emb.inv_freq"):
            yield name, wide


def _tables(model: FloatModel, Q: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Embedding, last norm and head, the head with the gains of that norm."""
    table = read_tensors(model.folder, "model.embed_tokens.")["weight"]
    gains = read_tensors(model.folder, "model.norm.")["weight"].double()
    yield "model.embed_tokens.weight", _times(table, Q)
    yield "model.norm.weight", torch.ones_like(gains)
    if not model.config.tie_word_embeddings:
        table = read_tensors(model.folder, "lm_head.")["weight"]
    yield "lm_head.weight", _times(table, gains[:, None] * Q)


def _times(table: Tensor, factor: Tensor) -> Tensor:
    """A table times a matrix in float64, some rows at a time, as float32."""
    product = torch.empty(table.shape, dtype=torch.float32)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        product[rows] = table[rows].double() @ factor
    return product
