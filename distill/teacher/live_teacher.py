"""A teacher that runs: in floats, in four bits, or spread over more memory than one GPU has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.teacher.teacher import LiveTeacher
from mistill.errors import SettingsError
from mistill.loss.batches import last_hidden_states
from mistill.loss.heads import Head, PlainWeight, compute_dtype, read_head
from mistill.loss.targets import DenseTargets
from mistill.pytorch.loading import load_pytorch, read_tensors
from mistill.pytorch.spread import load_spread, require_nf4_fits
from mistill.settings import environment_number

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from distill.settings import TrainSettings
    from mistill.folders.folder import FolderInfo
    from mistill.loss.batches import Batch
    from mistill.text.blocks import TokenBlocks


class _Answer(nn.Module):
    """A model that gives, from inside the wrapped forward, all that a loss needs of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Head]:
        hidden = last_hidden_states(self.model, batch.ids, batch.positions)[batch.kept]
        head = read_head(self.model)
        dtype = compute_dtype(hidden, head)
        return hidden.to(dtype), head.frozen(dtype)


@dataclass(frozen=True)
class DividedTeacher:
    """A running model whose layers are divided among the processes of a machine.

    Each layer is brought together while it computes. Embedding and head stay together. All
    processes of the machine ask equally often.

    Attributes:
        answer: The model, wrapped.
    """

    answer: nn.Module

    def targets(self, blocks: TokenBlocks, batch: Batch) -> DenseTargets:
        """Run the teacher over some blocks."""
        with torch.no_grad():
            return DenseTargets(*self.answer(batch))

    def expect(self, blocks: TokenBlocks) -> None:
        """Do nothing: a running model answers when it is asked."""


def divide(model: PreTrainedModel, device: torch.device) -> DividedTeacher:
    """Divide a model among the processes of each machine.

    Args:
        model: A float model, the same in every process, on the CPU.
        device: What this process computes on.

    Returns:
        The teacher; the model is changed in place.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = get_world_size()
    together = environment_number("LOCAL_WORLD_SIZE", processes, 1)
    machines = init_device_mesh(
        device.type, (processes // together, together), mesh_dim_names=("machine", "process")
    )
    answer = _Answer(model)
    layers: Any = model.get_decoder().layers
    for part in (*layers, answer):
        fully_shard(part, mesh=machines["process"])
    return DividedTeacher(answer.to(device))


@dataclass(frozen=True)
class SpreadTeacher:
    """A running model whose layers live on several devices, or wait in memory or on disk.

    Attributes:
        model: As accelerate's device map has laid it out.
        head: Its output head, on the device of the batches, wherever the model's own may be.
    """

    model: PreTrainedModel
    head: Head

    def targets(self, blocks: TokenBlocks, batch: Batch) -> DenseTargets:
        """Run the teacher over some blocks."""
        with torch.inference_mode():
            hidden = last_hidden_states(self.model, batch.ids, batch.positions)
            hidden = hidden.to(batch.kept.device)[batch.kept]
            dtype = compute_dtype(hidden, self.head)
            return DenseTargets(hidden.to(dtype), self.head.frozen(dtype))

    def expect(self, blocks: TokenBlocks) -> None:
        """Do nothing: a running model answers when it is asked."""


def require_teacher(info: FolderInfo, settings: TrainSettings) -> None:
    """Refuse a teacher that cannot be held as the settings ask, before its weights are read.

    Args:
        info: The teacher's folder.
        settings: How to train.

    Raises:
        SettingsError: If its weights are in a form that cannot be quantized or spread.
        ArchitectureError: If its rows do not fill blocks of four-bit weights.
        MissingExtraError: If bitsandbytes is wanted and not installed.
    """
    if settings.divide_teacher and info.form == "nf4":
        raise SettingsError(
            f"divide_teacher divides floats, and {info.path} holds nf4 weights; give the float "
            "model that they were made from"
        )
    if settings.teacher_device_map is not None and info.form == "gptq":
        raise SettingsError(
            f"teacher_device_map spreads float and NF4 teachers, and {info.path} holds gptq "
            "weights; give the float model that it was made from"
        )
    if settings.teacher_precision != "nf4" or info.form == "nf4":
        return
    if info.form != "model":
        raise SettingsError(
            f"teacher_precision nf4 is made from float weights, and {info.path} holds {info.form} "
            "weights; give the float model that it was made from, or another teacher_precision"
        )
    require_nf4_fits(info)


def load_teacher(
    info: FolderInfo,
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    quantized: bool = True,
    device_map: Mapping[str, Any] | None = None,
) -> LiveTeacher | SpreadTeacher | DividedTeacher:
    """Load a teacher as the settings ask.

    Args:
        info: The teacher's folder, which ``require_teacher`` has let pass.
        settings: How to train.
        accelerator: Knows the device and the precision.
        quantized: Whether a float teacher is turned into NF4 where the settings say so.
        device_map: Where each module goes, in place of the settings' rule.

    Returns:
        The teacher.
    """
    dtype = _dtype(settings, accelerator)
    device = accelerator.device
    spread = device_map or settings.teacher_device_map
    to_nf4 = quantized and settings.teacher_precision == "nf4" and info.form == "model"
    if not to_nf4 and spread is None:
        model = load_pytorch(info.path, dtype=dtype).requires_grad_(False)
        if settings.divide_teacher and accelerator.num_processes > 1:
            return divide(model, device)
        return LiveTeacher(model if model.device == device else model.to(device))
    model = load_spread(info, dtype, spread or {"": device}, nf4=to_nf4)
    model.requires_grad_(False)
    if spread is None:
        return LiveTeacher(model)
    table = "model.embed_tokens." if model.config.tie_word_embeddings else "lm_head."
    weight = read_tensors(info.path, table)["weight"].to(device, dtype)
    return SpreadTeacher(model, Head(PlainWeight(weight)))


def _dtype(settings: TrainSettings, accelerator: Accelerator) -> torch.dtype:
    if settings.teacher_precision in ("float32", "bfloat16"):
        dtype: torch.dtype = getattr(torch, settings.teacher_precision)
        return dtype
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
