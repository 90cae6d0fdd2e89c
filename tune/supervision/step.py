"""One optimizer step of supervised tuning: what the assistant writes, and its gradient.

The loss is the cross-entropy with the next token, averaged over the kept positions of the whole
step: those whose next token the assistant writes. It does not depend on padding, on how documents
share blocks, on the size of micro-batches or on the number of processes.

B is batch, T positions, D width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistill.loss.batches import Batch, last_hidden_states, make_batch
from mistill.loss.heads import read_head
from mistill.loss.losses import HeadLoss, head_loss
from mistill.training.loop import StepSums, equal_shares, shares, summed, undo_divisions
from mistill.training.step_module import StepModule
from tune.supervision.noise import Place, noise_for

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from mistill.text.blocks import TokenBlocks
    from tune.settings import SupervisedSettings


class SupervisedStep(StepModule):
    """A model that answers with its loss on some blocks, or with what they cost it.

    Args:
        model: The model to tune.
        settings: Noise and memory.
    """

    def __init__(self, model: PreTrainedModel, settings: SupervisedSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def loss(self, batch: Batch, positions_in_step: int, noise: Tensor | None) -> HeadLoss:
        """The loss of one micro-batch.

        Args:
            batch: Some blocks.
            positions_in_step: Kept positions of the whole optimizer step.
            noise: Added to the embeddings, shape (B, T, D); None for none.

        Returns:
            The micro-batch's share of the step's loss.
        """
        with nullcontext() if noise is None else _added(self.model, noise):
            hidden = last_hidden_states(self.model, batch.ids, batch.positions)
        return self._head_loss(hidden, batch, positions_in_step)

    def cost(self, batch: Batch) -> Tensor:
        """What the kept tokens of some blocks cost the model, without a gradient.

        Args:
            batch: Some blocks.

        Returns:
            Sum of -log p(next token) in nats, scalar float64.
        """
        hidden = last_hidden_states(self.model, batch.ids, batch.positions)
        return self._head_loss(hidden, batch, 1).cross_entropy

    def _head_loss(self, hidden: Tensor, batch: Batch, positions_in_step: int) -> HeadLoss:
        return head_loss(
            hidden[batch.kept],
            read_head(self.model),
            None,
            batch.next_ids,
            positions_in_step=positions_in_step,
            cross_entropy=1.0,
            memory_mib=self.settings.loss_memory_mib,
        )


class _added:
    """Add noise to what the embedding gives, while the body runs."""

    def __init__(self, model: PreTrainedModel, noise: Tensor) -> None:
        self.embedding: Any = model.get_input_embeddings()
        self.noise = noise

    def __enter__(self) -> None:
        noise = self.noise
        self.hook = self.embedding.register_forward_hook(
            lambda module, ids, embedded: embedded + noise.to(embedded.dtype)
        )

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def accumulate_gradients(
    module: nn.Module,
    blocks: TokenBlocks,
    settings: SupervisedSettings,
    accelerator: Accelerator,
    step: int,
) -> StepSums:
    """Add up the gradient of one optimizer step, micro-batch by micro-batch.

    Args:
        module: A ``SupervisedStep``, prepared by the accelerator.
        blocks: The blocks of this step, for all processes; at least one position is kept.
        settings: How to tune.
        accelerator: The one that prepared the module.
        step: Number of the step, from 0; the noise follows from it.

    Returns:
        The sums of the step, over all processes.
    """
    kept = int(blocks.kept.sum())
    share = undo_divisions(accelerator)
    width = accelerator.unwrap_model(module).config.hidden_size if settings.neftune else 0
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for first, part in shares(blocks, settings.micro_batch_size, accelerator):
        batch = make_batch(part, accelerator.device)
        noise = None
        if settings.neftune:
            place = Place(settings.seed, step, first)
            noise = noise_for(batch.positions, width, settings.neftune, place)
        with accelerator.accumulate(module):
            result: HeadLoss = module("loss", batch, kept, noise)
            accelerator.backward(result.loss * share)
        nats += result.cross_entropy
    (total,) = summed(nats[None], accelerator)
    return StepSums(loss=total / kept, tokens=blocks.tokens, positions=kept)


def held_out_cost(
    module: nn.Module, held_out: TokenBlocks, settings: SupervisedSettings, accelerator: Accelerator
) -> tuple[float, int]:
    """What held-out text costs a model, over all processes, without noise.

    Args:
        module: A ``SupervisedStep``, prepared by the accelerator.
        held_out: For all processes.
        settings: Size of the micro-batches.
        accelerator: The one that prepared the module.

    Returns:
        Mean -log p(next token) in nats over the kept positions, and how many those are.
    """
    was_training = module.training
    module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for part, counts in equal_shares(held_out, settings.micro_batch_size, accelerator):
        batch = make_batch(part, accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            nats = module("cost", batch)
        if counts:
            sums += torch.stack([nats, nats.new_tensor(float(len(batch.next_ids)))])
    module.train(was_training)
    nats_in_all, positions = summed(sums, accelerator)
    return nats_in_all / positions, int(positions)
