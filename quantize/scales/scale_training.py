"""Learning scales and norms as a task of the training loop: codes stay, what multiplies them moves.

N is kept positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mistill.folders.folder import copy_companions, read_config
from mistill.loss.batches import Batch, last_hidden_states, make_batch
from mistill.loss.heads import read_head
from mistill.loss.losses import HeadLoss, head_loss
from mistill.loss.targets import DenseTargets
from mistill.measures.kl import Fidelity, compare, predict
from mistill.pytorch.loading import load_pytorch, stored_tensors
from mistill.training.checkpoints import leave_out_frozen, own_randomness
from mistill.training.loop import (
    LoopOptions,
    StepSums,
    TrainingLoop,
    shares,
    summed,
    undo_divisions,
)
from mistill.training.step_module import StepModule, prepare_step
from mistill.weights.gptq_layout import HEAD, read_quantization
from mistill.weights.scaled_linear import ScaledLinear
from mistill.weights.tensor_files import TensorFiles, read_quantized
from mistill.weights.tensor_writer import TensorWriter
from quantize.scales.teacher_states import TeacherStates, ask_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from mistill.text.blocks import TokenBlocks
    from mistill.training.progress import TrainingProgress
    from quantize.settings import TuningSettings

# Share of the steps in which the learning rate rises.
_WARMUP = 0.1


class ScaledNorm(nn.Module):
    """A norm whose weight is frozen and multiplied by a gain that is trained.

    A weight of 0.1 and one of 10 change by the same share in a step, as scales do.
    """

    def __init__(self, norm: nn.Module) -> None:
        """Begin with the norm as it is.

        Args:
            norm: With a weight of shape (D,).
        """
        super().__init__()
        self.norm = norm
        self.gain = nn.Parameter(torch.ones_like(cast(Tensor, norm.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale by the root mean square, by the weight and by the gain.

        Args:
            x: Shape (..., D).

        Returns:
            The same shape.
        """
        y: Tensor = self.norm(x) * self.gain
        return y

    def tuned_weight(self) -> Tensor:
        """The weight that does the same without a gain, shape (D,)."""
        weight = cast(Tensor, self.norm.weight)
        return weight.detach() * self.gain.detach()


class ScaledModel:
    """A quantized model whose scales and norms can be trained, and what becomes of them on disk."""

    def __init__(self, folder: Path, *, norms: bool) -> None:
        """Load a model.

        Args:
            folder: A GPTQ folder.
            norms: Whether the weights of norms are trained too.
        """
        self.folder = folder
        self.model = load_pytorch(folder)
        self.model.requires_grad_(False)
        self._files = TensorFiles(folder)
        self.linears = dict(self._replace_linears())
        self.norms = dict(self._replace_norms()) if norms else {}

    def _replace_linears(self) -> Iterator[tuple[str, ScaledLinear]]:
        layout = read_quantization(read_config(self.folder))
        assert layout is not None, "open_folder calls a folder gptq only by its quantization"
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.qweight" in self._files and name != HEAD:
                linear = ScaledLinear(read_quantized(self._files, name, layout), module.bias)
                self.model.set_submodule(name, linear)
                yield name, linear

    def _replace_norms(self) -> Iterator[tuple[str, ScaledNorm]]:
        for name, module in list(self.model.named_modules()):
            if name.endswith("norm") and isinstance(getattr(module, "weight", None), nn.Parameter):
                norm = ScaledNorm(module)
                self.model.set_submodule(name, norm)
                yield name, norm

    def tuned(self) -> dict[str, Tensor]:
        """The tensors that are trained, by their names in the folder, in the types stored there."""
        tuned = {f"{name}.scales": linear.tuned_scales() for name, linear in self.linears.items()}
        tuned |= {f"{name}.weight": norm.tuned_weight() for name, norm in self.norms.items()}
        return {
            name: tensor.to("cpu", getattr(torch, self._files.dtype(name)))
            for name, tensor in tuned.items()
        }

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Let the model compute with what the folder would hold, while the body runs.

        Yields:
            Nothing.
        """
        modules: list[ScaledLinear | ScaledNorm] = [*self.linears.values(), *self.norms.values()]
        exact = [module.gain.detach().clone() for module in modules]
        stored = self.tuned()
        with torch.no_grad():
            for name, linear in self.linears.items():
                scales = cast(Tensor, linear.scales)
                _set_gain(linear.gain, stored[f"{name}.scales"], scales)
            for name, norm in self.norms.items():
                _set_gain(norm.gain, stored[f"{name}.weight"], cast(Tensor, norm.norm.weight))
        try:
            yield
        finally:
            with torch.no_grad():
                for module, gain in zip(modules, exact, strict=True):
                    module.gain.copy_(gain)

    def write(self, target: Path) -> None:
        """Write the folder with the tensors as they are now; all else is copied byte by byte.

        Args:
            target: The folder to make.
        """
        target.mkdir()
        tuned = self.tuned()
        with TensorWriter(target) as writer:
            for name, tensor in stored_tensors(self.folder):
                writer.add(name, tuned.get(name, tensor))
        for name in ("config.json", "quantize_config.json"):
            if (self.folder / name).is_file():
                (target / name).write_bytes((self.folder / name).read_bytes())
        copy_companions(self.folder, target)


def _set_gain(gain: Tensor, stored: Tensor, before: Tensor) -> None:
    """Make a gain what turns the old values into the stored ones; where those are 0 it is 1."""
    gain.copy_((stored.to(before) / before).nan_to_num_(nan=1.0))


class ScaleStep(StepModule):
    """A quantized model that answers with its loss on some blocks.

    Args:
        model: The model whose scales are trained.
        memory_mib: Memory for logits, in MiB.
    """

    def __init__(self, model: PreTrainedModel, memory_mib: float) -> None:
        super().__init__(model)
        self.memory_mib = memory_mib

    def loss(self, batch: Batch, targets: DenseTargets, positions_in_step: int) -> HeadLoss:
        """The loss of one micro-batch: KL(teacher || model).

        Args:
            batch: Some blocks.
            targets: What the teacher says at their kept positions.
            positions_in_step: Kept positions of the whole optimizer step.

        Returns:
            The micro-batch's share of the step's loss.
        """
        hidden = last_hidden_states(self.model, batch.ids, batch.positions)
        return head_loss(
            hidden[batch.kept],
            read_head(self.model),
            targets,
            batch.next_ids,
            positions_in_step=positions_in_step,
            memory_mib=self.memory_mib,
        )


def train_scales(
    scaled: ScaledModel,
    teacher: Path,
    training: TokenBlocks,
    held_out: TokenBlocks,
    settings: TuningSettings,
    *,
    accelerator: Accelerator,
    work: Path,
) -> TrainingProgress[Fidelity]:
    """Train scales and norms and leave the best model found in a folder.

    Args:
        scaled: The quantized model; changed in place, and not left at its best.
        teacher: The folder of the model to imitate.
        training: Blocks to learn from, each with at least one kept position.
        held_out: Blocks to measure KL on.
        settings: How to tune.
        accelerator: Device, precision, processes and accumulation steps, from ``accelerating``.
        work: A folder that holds the state of this run; empty, or as an interruption left it. All
            processes see it.

    Returns:
        The end of the run; ``best_model(work, step)`` is the folder of the best model, unless
        ``best_step`` is 0: then none was better than the one that came.

    Raises:
        TrainingError: If the loss is not a number.
    """
    said, judged = ask_teacher(teacher, training, held_out, accelerator, work)
    with own_randomness(settings.seed):
        leave_out_frozen(accelerator)
        module, optimizer = prepare_step(
            ScaleStep(scaled.model, settings.loss_memory_mib),
            accelerator,
            optimizer="adamw",
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        options = LoopOptions(
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            warmup=_WARMUP,
            max_gradient_norm=math.inf,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
        )
        loop = TrainingLoop(
            ScaleTuning(module, scaled, said, judged, held_out, settings, accelerator),
            module,
            optimizer,
            training,
            options,
            accelerator=accelerator,
            work=work,
            settings=settings,
        )
        return loop.to_the_end()


class ScaleTuning:
    """What scales learn from a teacher in a step, and how the model is judged."""

    doing = "tuning scales"
    measure = "held-out KL"
    evaluation_class = Fidelity

    def __init__(
        self,
        module: nn.Module,
        scaled: ScaledModel,
        teacher: TeacherStates,
        judged: TeacherStates,
        held_out: TokenBlocks,
        settings: TuningSettings,
        accelerator: Accelerator,
    ) -> None:
        """Gather what a step needs.

        Args:
            module: A ``ScaleStep``, prepared by the accelerator.
            scaled: The model in it.
            teacher: What the model to imitate says about the text that is learnt from.
            judged: What it says about the text to judge on.
            held_out: That text.
            settings: How to tune.
            accelerator: The one that prepared the module.
        """
        self.module, self.scaled, self.teacher, self.judged = module, scaled, teacher, judged
        self.held_out, self.settings, self.accelerator = held_out, settings, accelerator

    def announce(self, step: int, blocks: TokenBlocks) -> None:
        """Nothing has to be known ahead; see ``Task.announce``."""

    def gradients(self, step: int, blocks: TokenBlocks) -> StepSums:
        """The gradient of a step; see ``Task.gradients``."""
        kept = int(blocks.kept.sum())
        share = undo_divisions(self.accelerator)
        nats = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for _, part in shares(blocks, self.settings.micro_batch_size, self.accelerator):
            batch = make_batch(part, self.accelerator.device)
            targets = self.teacher.targets(part)
            with self.accelerator.accumulate(self.module):
                result: HeadLoss = self.module("loss", batch, targets, kept)
                self.accelerator.backward(result.loss * share)
            nats += result.divergence
        (total,) = summed(nats[None], self.accelerator)
        return StepSums(loss=total / kept, tokens=blocks.tokens, positions=kept)

    def explain(self, step: int, steps: int, blocks: TokenBlocks) -> None:
        """Only the learning rate can be to blame; see ``Task.explain``."""

    def evaluate(self) -> Fidelity:
        """Compare the model, as it would be stored, with its teacher; see ``Task.evaluate``."""
        model = self.scaled.model
        model.eval()
        with self.scaled.rounded():
            tuned = {"tuned": predict(model, self.held_out)}
        model.train()
        references = {"teacher": self.judged.predictions()}
        return compare(references, tuned, self.held_out)["tuned"]["teacher"]

    def height(self, evaluation: Fidelity) -> float:
        """KL(teacher || model)."""
        return evaluation.kl

    def save(self, weights: dict[str, Any], folder: Path) -> None:
        """Write the whole folder, with the scales and norms as they are now."""
        self.scaled.write(folder)
