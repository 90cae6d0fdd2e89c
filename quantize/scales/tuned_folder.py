"""Train the scales and norms of a quantized model, whose codes stay as they are.

Trained are one factor for each scale and the weights of the norms, a few per cent of the bytes, by
lowering KL(teacher || quantized) on text for some tens of steps (compare norm tuning, Li et al.,
2023, https://arxiv.org/abs/2309.02784, and learned scales, Chen et al., 2024, section 3.2,
https://arxiv.org/abs/2407.11062). Scales are rounded to the type they are stored in before KL is
measured, and the model is published only if its KL on held-out text is lower.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mistill.errors import FolderError, TextError, TrainingError
from mistill.folders.folder import copy_companions, open_folder, read_config
from mistill.folders.lineage import add_lineage, fingerprint, installed_versions
from mistill.folders.publishing import begun_on, publish, refuse_existing, replacing, working
from mistill.measures.kl import Fidelity, Predictions, compare, kl_sum, predict
from mistill.progress import track
from mistill.pytorch.loading import load_pytorch, require_finite_weights, stored_tensors
from mistill.pytorch.products import fast_products
from mistill.settings import require, result_settings, settings_from
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks
from mistill.text.rows import Texts, check_texts
from mistill.text.vocabulary import load_vocabulary
from mistill.training.schedule import blocks_of_step, learning_rate_at
from mistill.weights.gptq_layout import HEAD, read_quantization
from mistill.weights.scaled_linear import ScaledLinear
from mistill.weights.tensor_files import TensorFiles, read_quantized
from mistill.weights.tensor_writer import TensorWriter
from quantize.calibration_text import draw_up_to
from quantize.measuring.fidelity import open_teacher
from quantize.settings import TuningSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantize.options import TuningOptions

# Positions whose logits exist at once, and steps between two states on disk.
_ROWS_AT_ONCE = 128
_STEPS_BETWEEN_STATES = 10

# Share of the steps in which the learning rate rises.
_WARMUP = 0.1


def tune(
    source: str | Path,
    target: str | Path,
    *,
    teacher: str | Path,
    texts: Texts,
    held_out: Texts | None = None,
    settings: TuningSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[TuningOptions],
) -> Path:
    """Train the scales and norms of a GPTQ folder against a teacher.

    Both models are in memory, the quantized one as its codes. The same call resumes after an
    interruption.

    Args:
        source: A GPTQ folder; its codes and zero points are copied byte by byte.
        target: The folder to make, in the same layout.
        teacher: The model to imitate: the float one that was quantized, or that one's teacher.
        texts: Text to train on; of several texts, as much of each as far as they go. Best is text
            that neither the model nor its calibration has seen.
        held_out: Text to measure KL on; some of ``texts`` if not given.
        settings: How to tune; or give its fields as options.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``TuningSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the source is not a GPTQ folder, or one of the two is broken.
        VocabularyError: If the two do not share every token.
        TextError: If there is too little text.
        TrainingError: If the tuned model is no closer to the teacher; nothing is published.
    """
    settings = settings_from(TuningSettings, settings, options)
    target = refuse_existing(target, overwrite, [source, teacher])
    check_texts(texts, skip_bad_rows=settings.skip_bad_rows)
    if held_out is not None:
        check_texts(held_out, skip_bad_rows=settings.skip_bad_rows)
    info = open_folder(resolve_model(source))
    if info.form != "gptq":
        raise FolderError(f"{source} is {info.kind}; give a GPTQ folder to tune")
    teacher_info = open_teacher(teacher, info.path)
    longest = min(info.context_length, teacher_info.context_length)
    require(
        settings.block_length <= longest,
        f"a block_length of {settings.block_length} does not fit the models' context of {longest} "
        "tokens; lower it",
    )
    for folder in (info.path, teacher_info.path):
        require_finite_weights(folder)
    today = begun_on(target)
    vocabulary = load_vocabulary(info.path, today=today)
    training, judging = _read_blocks(info.path, texts, held_out, settings, today)
    key = {
        "step": "tune",
        "source": fingerprint(info.path),
        "teacher": fingerprint(teacher_info.path),
        "settings": result_settings(settings),
        "versions": installed_versions(),
        "texts": training.digest,
        "held_out": judging.digest,
        **vocabulary.date_key,
    }
    with working(target, key, anew=overwrite) as work:
        tuner = _Tuner(info.path, teacher_info.path, settings)
        before, after = tuner.tune(training, judging, work)
        if after.kl >= before.kl:
            # The same call would end the same way: there is nothing to resume.
            shutil.rmtree(work)
            raise TrainingError(
                f"tuning changed the KL to {teacher} from {before.kl:.5f} to {after.kl:.5f} nats; "
                "the tuned model is not published; lower learning_rate (now "
                f"{settings.learning_rate:g}) or use the model as it is"
            )
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        tuner.write(result)
        add_lineage(
            result,
            step="tune",
            settings=settings,
            source=info.path,
            teacher=str(teacher_info.path),
            before=asdict(before),
            after=asdict(after),
        )
        publish(work, target, overwrite)
    return target


def _read_blocks(
    folder: Path, texts: Texts, held_out: Texts | None, settings: TuningSettings, today: date
) -> tuple[TokenBlocks, TokenBlocks]:
    """Blocks to train on and blocks to measure on, all with something to predict.

    They are drawn of every text alike, and from more than is needed, as those of a calibration are,
    so that few blocks serve both.
    """

    def read_blocks(some_texts: Texts, count: int) -> TokenBlocks:
        blocks = draw_up_to(
            count,
            settings.block_length,
            some_texts,
            folder,
            settings.seed,
            skip_bad_rows=settings.skip_bad_rows,
            today=today,
        )
        return blocks[np.flatnonzero(blocks.kept.any(axis=1))]

    most, apart = settings.steps * settings.batch_size, settings.held_out_blocks
    if held_out is not None:
        training, judging = read_blocks(texts, most), read_blocks(held_out, apart)
    else:
        blocks = read_blocks(texts, most + apart)
        apart = min(apart, len(blocks) // 2)
        held_out_places = np.linspace(0, len(blocks) - 1, apart).round().astype(np.int64)
        judging = blocks[held_out_places]
        training = blocks[np.setdiff1d(np.arange(len(blocks)), held_out_places)]
    for name, blocks in (("texts", training), ("held_out", judging)):
        if not len(blocks):
            raise TextError(f"{name} fill no block of {settings.block_length} tokens; give more")
    return training, judging


class _Tuner:
    """A quantized model whose scales are trained, and its teacher."""

    def __init__(self, folder: Path, teacher: Path, settings: TuningSettings) -> None:
        self.folder, self.settings = folder, settings
        self.teacher = load_pytorch(teacher)
        self.teacher.requires_grad_(False)
        self.model = load_pytorch(folder)
        self.model.requires_grad_(False)
        self.linears = dict(_replace_linears(self.model, folder))
        self.norms = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if settings.norms and name.endswith("norm.weight")
        }
        for parameter in self.norms.values():
            parameter.requires_grad_(True)

    @fast_products()
    def tune(
        self, training: TokenBlocks, judging: TokenBlocks, work: Path
    ) -> tuple[Fidelity, Fidelity]:
        """Take all steps; the fidelity to the teacher before and after."""
        settings = self.settings
        references = {"teacher": predict(self.teacher, judging)}

        def fidelity() -> Fidelity:
            with torch.inference_mode():
                model = {"tuned": predict(self.model, judging)}
                return compare(references, model, judging)["tuned"]["teacher"]

        before = fidelity()
        # A norm's weight of 0.1 and one of 10 change by the same share in a step, as scales do.
        start = {name: parameter.detach().clone() for name, parameter in self.norms.items()}
        factors = {name: torch.ones_like(value) for name, value in start.items()}
        trained = [linear.gain for linear in self.linears.values()] + list(factors.values())
        optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, betas=(0.9, 0.95))
        steps_done = _load_state(work, optimizer)
        self._set_norms(start, factors)
        with track("Tuning", total=settings.steps, unit="steps", done=steps_done) as progress:
            for step in range(steps_done, settings.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(
                        step, settings.steps, peak=settings.learning_rate, warmup=_WARMUP
                    )
                rows = blocks_of_step(step, len(training), settings.batch_size, settings.seed)
                loss = self._add_gradients(training[rows])
                for name, factor in factors.items():
                    gradient = self.norms[name].grad
                    factor.grad = None if gradient is None else gradient * start[name]
                    self.norms[name].grad = None
                optimizer.step()
                optimizer.zero_grad()
                self._set_norms(start, factors)
                if (step + 1) % _STEPS_BETWEEN_STATES == 0:
                    _save_state(work, optimizer, step + 1)
                progress.advance(1, f"KL {loss:.4f}")
        self._round()
        return before, fidelity()

    def _set_norms(self, start: dict[str, Tensor], factors: dict[str, Tensor]) -> None:
        for name, parameter in self.norms.items():
            parameter.data = start[name] * factors[name]

    def _add_gradients(self, blocks: TokenBlocks) -> float:
        """Add up the gradient of KL(teacher || model), a mean over the tokens of some blocks."""
        total = int(blocks.kept.sum())
        loss = 0.0
        for row in range(len(blocks)):
            part = blocks[row : row + 1]
            teacher = predict(self.teacher, part)
            ids, positions, kept = (
                torch.from_numpy(np.ascontiguousarray(array))
                for array in (part.ids, part.position_ids, part.kept)
            )
            body, head = cast(Any, self.model).model, cast(Any, self.model).lm_head
            hidden = body(input_ids=ids, position_ids=positions, use_cache=False)[0][kept]
            kl = torch.zeros(())
            for first in range(0, len(hidden), _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                kl = kl + checkpoint(
                    _kl_through_head, hidden[rows], head, teacher, rows, use_reentrant=False
                )
            (kl / total).backward()
            loss += float(kl.detach()) / total
        return loss

    def _round(self) -> None:
        """Round everything that was trained to the values that the folder will hold."""
        for name, tensor in self._tuned().items():
            module, _, last = name.rpartition(".")
            if last == "scales":
                linear = self.linears[module]
                stored = tensor.float() / cast(Any, linear).scales
                linear.gain.data = stored.nan_to_num_(nan=1.0)
            else:
                self.norms[name].data = tensor.float()

    def _tuned(self) -> dict[str, Tensor]:
        """The tensors that changed, by name, in the types that they are stored in."""
        files = TensorFiles(self.folder)
        tuned = {f"{name}.scales": linear.tuned_scales() for name, linear in self.linears.items()}
        tuned |= {name: parameter.detach() for name, parameter in self.norms.items()}
        return {
            name: tensor.to(getattr(torch, files.dtype(name))) for name, tensor in tuned.items()
        }

    def write(self, result: Path) -> None:
        """Write the weights with the tuned tensors, and copy the rest of the folder."""
        tuned = self._tuned()
        with TensorWriter(result) as writer:
            for name, tensor in stored_tensors(self.folder):
                writer.add(name, tuned.get(name, tensor))
        for name in ("config.json", "quantize_config.json"):
            if (self.folder / name).is_file():
                (result / name).write_bytes((self.folder / name).read_bytes())
        copy_companions(self.folder, result)


def _kl_through_head(hidden: Tensor, head: nn.Module, teacher: Predictions, rows: slice) -> Tensor:
    """Sum of KL(teacher || model) over some positions, from the model's last hidden states."""
    return kl_sum(teacher.logits(rows), head(hidden))


def _replace_linears(model: PreTrainedModel, folder: Path) -> Iterator[tuple[str, ScaledLinear]]:
    """Replace a model's float matrices by codes with trainable scales."""
    layout = read_quantization(read_config(folder))
    assert layout is not None, "open_folder calls a folder gptq only by its quantization"
    files = TensorFiles(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.qweight" in files and name != HEAD:
            linear = ScaledLinear(read_quantized(files, name, layout), module.bias)
            model.set_submodule(name, linear)
            yield name, linear


def _save_state(work: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[parameter]
        tensors |= {
            f"{number}.value": parameter.detach(),
            f"{number}.exp_avg": state["exp_avg"],
            f"{number}.exp_avg_sq": state["exp_avg_sq"],
        }
    with replacing(work / "state.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(step)})


def _load_state(work: Path, optimizer: torch.optim.Optimizer) -> int:
    """Load the state on disk, if there is one; the steps that were taken."""
    from safetensors import safe_open

    if not (work / "state.safetensors").is_file():
        return 0
    with safe_open(work / "state.safetensors", framework="pt") as file:
        step = int(file.metadata()["step"])
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            parameter.data = file.get_tensor(f"{number}.value")
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"{number}.exp_avg"),
                "exp_avg_sq": file.get_tensor(f"{number}.exp_avg_sq"),
            }
    return step
