"""A model whose every use in training happens inside one ``forward``.

The wrappers of DDP, FSDP and DeepSpeed see a use of a parameter only there, and bring together
there what they divided.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mistill.pytorch.loading import quiet_transformers
from mistill.training.adapters import merged, scales_of
from mistill.training.lean import remember_less
from mistill.training.memory import unmap_when_freed
from mistill.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from mistill.training.processes import OptimizerName


class StepModule(nn.Module):
    """A model that answers by the methods of a subclass, such as with its loss on some text.

    Args:
        model: The model to train.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # What FSDP and DeepSpeed want to know of a transformers model.
        self.config = model.config
        self._no_split_modules = list(model._no_split_modules or [])

    def tie_weights(self) -> None:
        """Let embedding and head be one again, where they are."""
        self.model.tie_weights()

    def forward(self, what: str, *arguments: Any) -> Any:
        """Answer with what one of the methods returns.

        Args:
            what: Name of the method.
            *arguments: Its arguments.

        Returns:
            Its answer.
        """
        return getattr(self, what)(*arguments)


def prepare_step(
    module: StepModule,
    accelerator: Accelerator,
    *,
    optimizer: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    gradient_checkpointing: bool,
) -> tuple[nn.Module, Optimizer]:
    """Make a model ready to be trained, with the optimizer that moves its weights.

    Args:
        module: The model in its step; changed in place. What has no gradient stays as it is.
        accelerator: Device, precision and processes, from ``accelerating``.
        optimizer: Which optimizer.
        learning_rate: The rate to start with; above 0.
        weight_decay: Of matrices of the layers.
        gradient_checkpointing: Whether layers are computed again on the way back.

    Returns:
        Both as the accelerator prepared them.
    """
    model = module.model
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    remember_less(model)
    if accelerator.device.type == "cpu":
        unmap_when_freed()
    model.train()
    prepared: tuple[nn.Module, Optimizer] = accelerator.prepare(
        module,
        make_optimizer(
            model, name=optimizer, learning_rate=learning_rate, weight_decay=weight_decay
        ),
    )
    return prepared


def model_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights of the model in a ``StepModule``, by their names in the model.

    Args:
        weights: The state dict of the module.

    Returns:
        The state dict of its model.
    """
    return {name.removeprefix("model."): value for name, value in weights.items()}


def save_plain(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Save a trained model as a float32 folder of the plain architecture, adapters merged.

    Args:
        model: The model, for its config.
        weights: Its state dict, with adapters or without.
        folder: The folder to write config.json and safetensors to.
    """
    # DeepSpeed computes with, and has judged, weights of the precision that was asked for.
    whole = merged(weights, scales_of(model))
    plain = {name: value.float() for name, value in whole.items()}
    if model.config.tie_word_embeddings:
        plain.pop("lm_head.weight", None)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=plain)
