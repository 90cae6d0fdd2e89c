"""A model that scores a whole conversation with one number, from its last token.

The layers of a language model stand below a head of one row. The score is read at the last token of
a row, which ends the assistant's turn: transformers finds it by looking for what is not padding, so
that a model whose padding token ends turns too would be read one token early.

B is batch, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mistill.errors import FolderError
from mistill.folders.folder import (
    REWARD_HEAD,
    is_reward_folder,
    open_folder,
    read_config,
    tensor_headers,
)
from mistill.folders.publishing import write_json
from mistill.pytorch.loading import empty_model, load_pytorch, plain_config, require_readable
from mistill.pytorch.reading import read_tensors, require_finite, stored_tensors
from mistill.weights.tensor_writer import TensorWriter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tokens that pass through the model at once.
_TOKENS_AT_ONCE = 2048


def new_reward_model(
    folder: Path, padding: int, seed: int, *, base: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The layers of a language model below a new head.

    The head is drawn from a normal distribution of variance 1 / (D + 1) (Stiennon et al., 2020,
    https://arxiv.org/abs/2009.01325, appendix B.1).

    Args:
        folder: The folder of a language model.
        padding: The token that fills rows up; it must end none.
        seed: Decides the head.
        base: The language model, where it is loaded already; if None, it is loaded in float32.

    Returns:
        A model for sequence classification with one output, whose head is in float32.
    """
    layers = cast(Any, base or load_pytorch(folder, torch.float32)).model
    model = _with_layers(plain_config(folder), layers, padding)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    cast(Any, model).score.weight = nn.Parameter(weight)
    return model


def load_reward_model(folder: str | Path) -> PreTrainedModel:
    """Load a reward model, in float32 and eval mode.

    Args:
        folder: A folder that mistill tune reward made, or one of transformers' with a single
            output.

    Returns:
        A model for sequence classification.

    Raises:
        FolderError: If there is no head of one row, or a weight is missing or of another shape.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    info = open_folder(folder, rewards=True)
    require_readable(info)
    if info.form != "model" or not is_reward_folder(info.path):
        raise FolderError(
            f"{folder} is no reward model: it has no {REWARD_HEAD}; make one with mistill tune "
            "reward"
        )
    config = plain_config(info.path)
    with torch.device("meta"):
        model = _empty(config)
    expected = {name: tuple(one.shape) for name, one in model.named_parameters()}
    present = {name: one.shape for name, one in tensor_headers(info.path).items()}
    wrong = [name for name, shape in expected.items() if present.get(name) != shape]
    if wrong:
        stored = present.get(wrong[0])
        words = "it lacks it" if stored is None else f"it has {stored}"
        raise FolderError(
            f"{folder} should hold {wrong[0]} of shape {expected[wrong[0]]}, and {words}; make "
            "the reward model again"
        )
    layers = cast(Any, _layers_of(info.path, config, expected))
    padding = read_config(info.path).get("pad_token_id")
    reward = _with_layers(config, layers, 0 if padding is None else int(padding))
    head = read_tensors(info.path, REWARD_HEAD)[""].float()
    require_finite(REWARD_HEAD, head)
    cast(Any, reward).score.weight = nn.Parameter(head)
    reward.eval()
    return reward


def _layers_of(
    folder: Path, config: PreTrainedConfig, expected: dict[str, tuple[int, ...]]
) -> nn.Module:
    """The layers of a reward folder in float32."""
    model: Any = type(empty_model(config))(config)
    parameters = dict(model.model.named_parameters())
    with torch.no_grad():
        for name, tensor in stored_tensors(folder):
            if name in expected and name != REWARD_HEAD:
                require_finite(name, tensor)
                parameters[name.removeprefix("model.")].copy_(tensor)
    layers: nn.Module = model.model
    return layers


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    config.num_labels = 1
    model: PreTrainedModel = _classes()[config.model_type](config)
    return model


def _classes() -> dict[str, Any]:
    from transformers import LlamaForSequenceClassification, MistralForSequenceClassification

    return {
        "llama": LlamaForSequenceClassification,
        "mistral": MistralForSequenceClassification,
    }


def _with_layers(config: PreTrainedConfig, layers: nn.Module, padding: int) -> PreTrainedModel:
    config.pad_token_id = padding
    with torch.device("meta"):
        model: Any = _empty(config)
    model.model = layers
    model.score = nn.Linear(config.hidden_size, 1, bias=False)
    reward: PreTrainedModel = model
    return reward


def scores(model: Any, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The score of each row, read at its last token.

    Args:
        model: From ``new_reward_model`` or ``load_reward_model``; adapters in it count.
        rows: Token ids of N conversations, none empty.

    Returns:
        Shape (N,).
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    body, head = plain.model, plain.score
    totals = np.zeros(len(rows))
    training = model.training
    model.eval()
    device = next(plain.parameters()).device
    with torch.no_grad():
        for start, stop in _batches(rows):
            batch = rows[start:stop]
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(row)] = torch.tensor(row)
                mask[place, : len(row)] = 1
            states = body(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            last = torch.tensor([len(row) - 1 for row in batch], device=device)
            at_end = states[torch.arange(len(batch), device=device), last]
            totals[start:stop] = head(at_end)[:, 0].double().cpu().numpy()
    model.train(training)
    return totals


def _batches(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Where each batch of consecutive rows begins and ends."""
    batches, start, width = [], 0, 0
    for place, row in enumerate(rows):
        width = max(width, len(row))
        if place > start and (place + 1 - start) * width > _TOKENS_AT_ONCE:
            batches.append((start, place))
            start, width = place, len(row)
    return [*batches, (start, len(rows))] if len(rows) else []


def write_reward_model(
    parameters: Iterable[tuple[str, torch.Tensor]], padding: int, base: Path, folder: Path
) -> None:
    """Write a reward model.

    Args:
        parameters: Names and tensors of the model, without adapters, in the types in which they are
            stored: the layers in that of its base, and the head in float32.
        padding: The token that fills rows up.
        base: The folder of the language model that it was made from.
        folder: Where to; the folder is there.
    """
    with TensorWriter(folder) as writer:
        for name, parameter in parameters:
            writer.add(name, parameter.detach().cpu().contiguous())
    described = read_config(base)
    described.pop("quantization_config", None)
    config = {
        **described,
        "architectures": [_classes()[plain_config(base).model_type].__name__],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "pad_token_id": padding,
    }
    write_json(folder / "config.json", config)
