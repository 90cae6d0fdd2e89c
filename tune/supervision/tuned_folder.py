"""Supervised tuning from folder to folder.

Everything that can be wrong with the settings, the folder and the text is found before a weight is
read. Then the loop of ``mistill.training.loop`` runs in a hidden folder beside the target, where it
keeps its checkpoints, so that the same call resumes what was interrupted. The target appears when
there is a model that got better, and not before.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mistill.errors import SettingsError, TrainingError
from mistill.folders.folder import FolderInfo
from mistill.folders.lineage import add_lineage, fingerprint, name_of_base
from mistill.folders.publishing import begun_on, publish, refuse_existing
from mistill.settings import require, result_settings, settings_from
from mistill.text.rows import Texts, check_texts, sources_of
from mistill.text.vocabulary import load_vocabulary
from mistill.training.together import keeping_the_best, working_together
from tune.settings import SupervisedSettings
from tune.supervision.reading import Reading, read_texts
from tune.supervision.result_folder import gather_result
from tune.trainers.other_text import check_other_text, read_other_text

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from mistill.training.progress import TrainingProgress
    from tune.options import SupervisedOptions
    from tune.supervision.trainer import HeldOut

_log = logging.getLogger(__name__)

# Settings that may change while a run is interrupted: they decide how long a step takes, how much
# memory it needs and what is noted on the way, not what is learned.
_SAME_RESULT = (
    "checkpoint_every",
    "evaluate_every",
    "gradient_checkpointing",
    "loss_memory_mib",
    "micro_batch_size",
    "other_tokens",
    "replies",
    "reply_tokens",
    "trackers",
)

# Steps below which a schedule with a warm-up makes little sense.
_FEW_STEPS = 10


def supervised(
    model: str | Path,
    target: str | Path,
    *,
    texts: Texts,
    held_out: Texts | None = None,
    other_texts: Texts | None = None,
    settings: SupervisedSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[SupervisedOptions],
) -> Path:
    """Tune a model on conversations: it learns to write what the assistant writes in them.

    With adapters (LoRA, by default) the target is the plain merged model, in the type of the one
    that came, and holds the adapter in ``adapter/`` as peft saves it. With ``base="nf4"`` the
    frozen weights are held in 4 bits while training (QLoRA); of the two ways to merge, into the
    weights that came and into those that 4 bits stand for, the one with the lower held-out
    cross-entropy is taken. ``lora_rank=0`` trains all weights, and the target is in float32.

    The model is judged on held-out text before, during and after, and the best one found is kept.
    An interrupted call resumes from its last checkpoint when it is made again, and ends with the
    same weights, bit for bit on a CPU. Under ``accelerate launch`` or torchrun every process makes
    the same call; one of them writes. Tokenizer, chat template and generation settings are those
    of the model that came, byte for byte.

    Args:
        model: The model to tune: a float folder, or one in NF4 for ``base="nf4"``; a Hub id, a
            GGUF file or ``@smollm2``.
        target: The folder to make: the tuned model, ``tuning_report.json``, ``metrics.jsonl`` and,
            if asked for, ``tensorboard/``.
        texts: Conversations to learn from; of plain text every token counts.
        held_out: Text to judge on; part of ``texts``, by prompt, if not given.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten; the shipped ``@demo-held-out`` if not given.
        settings: How to tune; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``SupervisedSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or does not fit the model.
        FolderError: If the folder is missing, broken or of a form that cannot be tuned.
        ArchitectureError: If the model is neither Llama nor Mistral, or its rows do not fit NF4.
        TextError: If there is too little text, a row that cannot be read, or one that is too long.
        TrainingError: If the model got no better, or the loss was not a number.
        MissingExtraError: If a library is asked for that is not installed.
    """
    settings = settings_from(SupervisedSettings, settings, options)
    target = refuse_existing(target, overwrite, [model])
    _require_libraries(settings)
    for given in (texts, held_out):
        if given is not None:
            check_texts(given, skip_bad_rows=settings.skip_bad_rows)
    check_other_text(other_texts, settings)
    info = _open_model(model, settings)
    require(
        settings.block_length <= info.context_length,
        f"a block_length of {settings.block_length} does not fit the model's context of "
        f"{info.context_length}; lower it",
    )
    vocabulary = load_vocabulary(info.path, today=begun_on(target))
    reading = read_texts(texts, held_out, vocabulary, settings)
    other = read_other_text(other_texts, vocabulary, info.context_length, settings)

    from mistill.training.processes import this_process

    state = this_process()
    key = {
        "settings": _result_settings(settings),
        "model": fingerprint(info.path),
        "texts": reading.training.digest,
        "held_out": reading.judged.digest,
        "processes": state.num_processes,
        **vocabulary.date_key,
    }
    with working_together(target, key, state, overwrite) as work:
        with keeping_the_best(work, info.path, state):
            progress = _train_in(work, info, reading, settings, name_of_base(model, info.path))
            if progress.best_step == 0:
                raise TrainingError(_complaint(progress, settings))
            if state.is_main_process:
                facts = gather_result(
                    work, progress, info, reading, other, vocabulary, settings, state
                )
        if state.is_main_process:
            add_lineage(
                work / "result",
                step="supervised",
                settings=settings,
                source=info.path,
                texts=list(sources_of(texts)),
                held_out=[] if held_out is None else list(sources_of(held_out)),
                other_texts=[] if other_texts is None else list(sources_of(other_texts)),
                **facts,
            )
            publish(work, target, overwrite)
        state.wait_for_everyone()
    return target


# --- before -------------------------------------------------------------------------------------


def _open_model(model: str | Path, settings: SupervisedSettings) -> FolderInfo:
    """Refuse a folder that cannot be tuned as the settings ask, before its weights are read."""
    from mistill.pytorch.loading import plain_config
    from tune.trainers.tuned_folder import tunable_folder

    info = tunable_folder(model, settings.base, [settings.lora_rank, *settings.ranks.values()])
    tied = plain_config(info.path).tie_word_embeddings
    if "lm_head" in settings.lora_targets and tied:
        raise SettingsError(
            f"the head of {model} is its embedding, and an adapter on it could not be merged "
            "without changing both; leave lm_head out of lora_targets"
        )
    return info


def _require_libraries(settings: SupervisedSettings) -> None:
    from mistill.training.metrics import require_trackers

    require_trackers(settings.trackers)
    if settings.optimizer != "adamw":
        from mistill.training.optimizers import require_optimizer

        require_optimizer(settings.optimizer)
    if settings.lora_rank:
        from mistill.training.adapters import require_peft

        require_peft()


def _result_settings(settings: SupervisedSettings) -> dict[str, Any]:
    """What the result depends on: with patience, also when the model is judged."""
    left_out = [name for name in _SAME_RESULT if not (settings.patience and "evaluate" in name)]
    return result_settings(settings, *left_out)


# --- during -------------------------------------------------------------------------------------


def _train_in(
    work: Path, info: FolderInfo, reading: Reading, settings: SupervisedSettings, base: str
) -> TrainingProgress[HeldOut]:
    """Train to the end; a run that has ended is not run again."""
    from mistill.training.checkpoints import run_once
    from mistill.training.processes import accelerating, loading_whole
    from tune.supervision.trainer import HeldOut, loop_options, train_model

    steps = loop_options(reading.training, settings).steps
    if steps < _FEW_STEPS:
        _log.warning(
            "the texts make %d steps of %d tokens; lower block_length or batch_size, or raise "
            "epochs, for more",
            steps,
            reading.training.tokens // len(reading.training) * settings.batch_size,
        )
    with accelerating(settings, logs=work) as accelerator:
        require_divisible(settings, accelerator)

        def run() -> TrainingProgress[HeldOut]:
            with loading_whole(accelerator):
                model = _load(info, settings, accelerator)
            return train_model(
                model,
                reading.training,
                reading.judged,
                settings,
                accelerator=accelerator,
                work=work,
                base=base,
            )

        return run_once(work, accelerator, HeldOut, run)


def require_divisible(settings: SupervisedSettings, accelerator: Accelerator) -> None:
    """Refuse four-bit weights where FSDP would change them, or ZeRO-3 divide them.

    Args:
        settings: How to tune.
        accelerator: Knows what accelerate has chosen.

    Raises:
        SettingsError: If they would.
    """
    if settings.base != "nf4":
        return
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        plugin: Any = accelerator.state.deepspeed_plugin
        if plugin.deepspeed_config["zero_optimization"]["stage"] == 3:
            raise SettingsError(
                "ZeRO-3 divides weights before they are quantized, and cannot hold base nf4; use "
                "ZeRO-2, by which every process has the 4-bit weights whole, or base float"
            )
    if kind == "FSDP" and accelerator.mixed_precision != "no":
        raise SettingsError(
            "FSDP would cast the weights that it gathers to bfloat16, and with base nf4 their "
            "codes too; set precision to float32, or use ZeRO-2 or several processes without FSDP"
        )


def _load(
    info: FolderInfo, settings: SupervisedSettings, accelerator: Accelerator
) -> PreTrainedModel:
    """The model as it is trained: what is frozen may be in bfloat16 or in four bits."""
    import torch

    from tune.trainers.placing import load_base

    dtype = _compute_dtype(accelerator) if settings.lora_rank else torch.float32
    # Float weights wait on the CPU until accelerate has decided who holds which.
    device = accelerator.device if settings.base == "nf4" else torch.device("cpu")
    model = load_base(info, settings.base, dtype, device)
    if settings.base == "nf4" and accelerator.distributed_type.value == "FSDP":
        from mistill.pytorch.four_bit import hold_codes_as

        hold_codes_as(model, dtype)
    return model


def _compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of frozen weights; under FSDP that of the adapters, which it divides with them."""
    import torch

    low = accelerator.mixed_precision == "bf16" and accelerator.distributed_type.value != "FSDP"
    return torch.bfloat16 if low else torch.float32


def _complaint(progress: TrainingProgress[HeldOut], settings: SupervisedSettings) -> str:
    """Why there is no model to publish."""
    return (
        f"the model got no better: its held-out cross-entropy was "
        f"{progress.before.cross_entropy:.4f} nats before and "
        f"{progress.last.cross_entropy:.4f} after {progress.tokens} tokens; lower learning_rate "
        f"(now {settings.peak_learning_rate:g}) or give more text of the kind to be learnt"
    )
