"""A reward model from folder to folder.

It learns to score the better one of two answers higher (Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155, section 3.5), is evaluated on held-out pairs beside a judge that
knows nothing but which answer is longer, and is loaded again from the folder that was written
before that is published: a head that stayed behind would leave scores of chance.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mistill.errors import TrainingError
from mistill.folders.folder import REWARD_HEAD, FolderInfo, copy_companions
from mistill.folders.lineage import add_lineage, fingerprint, name_of_base
from mistill.folders.publishing import publish, refuse_existing
from mistill.preferences.reading import divided, read_pairs
from mistill.preferences.tokens import PairTokens, digest_of, pair_tokens
from mistill.settings import require, result_settings, settings_from
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import precision_of_its_own, this_process
from mistill.training.together import working_together
from tune.settings import RewardSettings
from tune.trainers.library import require_trl
from tune.trainers.opening import open_to_tune

if TYPE_CHECKING:
    from tune.options import RewardOptions

_log = logging.getLogger(__name__)

_SAME_RESULT = ("checkpoint_every", "gradient_checkpointing")
# How far scores of the written folder may be from those of the trained model, as a share of their
# spread: rounding of the layers to bfloat16, or sums in float32.
_NEAR, _NEAR_IN_FLOAT32 = 0.2, 1e-3


def reward(
    model: str | Path,
    target: str | Path,
    *,
    pairs: Texts,
    held_out: Texts | None = None,
    settings: RewardSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[RewardOptions],
) -> Path:
    """Train a reward model on pairs or rankings of answers, through TRL.

    The layers of a language model, with adapters beside their matrices, get a head of one number,
    which is read at the token that ends the answer. An interrupted call resumes from its last
    checkpoint when it is made again.

    With ``base="nf4"`` the frozen weights are held in 4 bits while training (QLoRA), and of the
    two ways to merge the one with the lower held-out loss is taken. Under ``accelerate launch`` or
    torchrun every process makes the same call and one of them writes; several learn the same as
    one.

    Args:
        model: The language model to start from, with a chat template: a float folder, or one in NF4
            for ``base="nf4"``; a Hub id, a .gguf file, or ``@smollm2``.
        target: The folder to make: a model for sequence classification with one output, merged,
            ``adapter/``, ``metrics.jsonl`` and ``tuning_report.json``.
        pairs: Pairs or rankings of answers.
        held_out: The same to evaluate on; a share of the prompts of ``pairs`` if not given.
        settings: How to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``RewardSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the folder is missing, broken or of a form that cannot be tuned.
        ArchitectureError: If the model is neither Llama nor Mistral, or its rows do not fit NF4.
        TextError: If the data are missing, a row is no preference, or margins are asked for and a
            pair has none.
        VocabularyError: If there is no chat template.
        TrainingError: If the model got no better, the loss was not a number, or the folder that
            was written scores otherwise than the model that was trained.
        MissingExtraError: If TRL or peft is not installed.
    """
    settings = settings_from(RewardSettings, settings, options)
    target = refuse_existing(target, overwrite, [model])
    require_trl(settings)
    info, vocabulary = open_to_tune(model, target, (pairs, held_out), settings)
    learned, judged = _read(pairs, held_out, vocabulary, settings)
    key = {
        "step": "reward",
        "settings": result_settings(settings, *_SAME_RESULT),
        "model": fingerprint(info.path),
        "pairs": digest_of(learned),
        "held_out": digest_of(judged),
        **vocabulary.date_key,
    }
    base = name_of_base(model, info.path)
    with (
        precision_of_its_own(),
        working_together(target, key, this_process(), overwrite) as work,
    ):
        facts = _train(work, info, base, vocabulary, learned, judged, settings)
        if this_process().is_main_process:
            add_lineage(
                work / "result",
                step="reward",
                settings=settings,
                source=info.path,
                pairs=sources_of(pairs),
                held_out=[] if held_out is None else sources_of(held_out),
                **facts,
            )
            publish(work, target, overwrite)
        this_process().wait_for_everyone()
    return target


def _read(
    pairs: Texts, held_out: Texts | None, vocabulary: Vocabulary, settings: RewardSettings
) -> tuple[list[PairTokens], list[PairTokens]]:
    def read(texts: Texts) -> Any:
        return read_pairs(
            texts,
            ranking=settings.ranking,
            seed=settings.seed,
            skip_bad_rows=settings.skip_bad_rows,
        )

    learned, judged = divided(
        read(pairs), None if held_out is None else read(held_out), settings.held_out_share
    )
    if settings.margins:
        without = [pair.origin for pair in learned if pair.margin is None]
        require(
            not without,
            f"margins are asked for, and {len(without)} of {len(learned)} pairs have none, the "
            f"first of them {without[0] if without else ''}; give each pair a margin or scores, or "
            "leave margins out",
        )
    return (
        pair_tokens(learned, vocabulary, settings.max_length, name="the pairs to learn from"),
        pair_tokens(judged, vocabulary, settings.max_length, name="the held-out pairs"),
    )


def _train(
    work: Path,
    info: FolderInfo,
    base: str,
    vocabulary: Vocabulary,
    learned: Sequence[PairTokens],
    judged: Sequence[PairTokens],
    settings: RewardSettings,
) -> dict[str, Any]:
    """Train, evaluate, gather in ``work/result`` what the target will hold, and say what it is.

    Processes that do not write have nothing to say.
    """
    from mistill.judging.likelihood import GROUP
    from mistill.pytorch.reward_model import scores
    from mistill.training.metrics import copy_metrics
    from tune.scoring.training import reward_figures, reward_trainer, rows_of
    from tune.trainers.arguments import between_evaluations, step_total
    from tune.trainers.ending import facts_of
    from tune.trainers.running import emptied, run_trainer
    from tune.trainers.shares import in_shares
    from tune.trainers.tuned_folder import write_report

    steps = step_total(settings, len(learned))
    every = between_evaluations(settings.evaluate_every, steps)
    trainer = reward_trainer(
        info,
        vocabulary,
        learned,
        judged,
        settings,
        work,
        steps=steps,
        checkpoint_every=settings.checkpoint_every or every,
    )
    run = run_trainer(
        trainer,
        work,
        steps=steps,
        what="learning rewards",
        evaluate=lambda step: reward_figures(
            in_shares(rows_of(judged), lambda rows: scores(trainer.model, rows), GROUP)
        ),
        every=every,
        keep=settings.keep,
    )
    if run.kept_step == 0:
        last = run.judged[max(run.judged)]
        emptied(work)
        raise TrainingError(
            f"the reward model got no better: its held-out loss was {run.judged[0]['loss']:.4f} "
            f"before and {last['loss']:.4f} after {run.steps} steps; lower learning_rate (now "
            f"{settings.peak_learning_rate:g}) or give more pairs"
        )
    if not this_process().is_main_process:
        return {}
    from tune.pairwise.figures import interval_of, length_figures

    before = run.judged[0]
    after: Mapping[str, float] = run.judged[run.kept_step]
    merging: dict[str, Any] = {}
    if settings.lora_rank:
        after, merging = _merged(work, info, base, trainer.model, judged, after, settings)
    else:
        _write_whole(work / "result", info, trainer.model, judged)
    lengths = {"learned": length_figures(learned), "held_out": length_figures(judged)}
    longer = lengths["held_out"]["longer_wins"] or 0.0
    report = {
        "rows": {"learned": len(learned), "held_out": len(judged)},
        "before": before,
        "after": after,
        **merging,
        "accuracy_interval": interval_of(after["accuracy"], len(judged)),
        "longer_wins": longer,
        "longer_wins_interval": interval_of(longer, len(judged)),
        "tokens_of_answers": lengths,
        **facts_of(run),
    }
    if after["accuracy"] <= max(longer, 1 - longer):
        _log.warning(
            "the reward model is right about %.0f%% of the held-out pairs, and a judge that knows "
            "only which answer is longer about %.0f%%; give more pairs, or pairs of like lengths",
            100 * after["accuracy"],
            100 * max(longer, 1 - longer),
        )
    result = work / "result"
    copy_metrics(work, result)
    write_report(result, report)
    told = ("before", "after", *merging, "accuracy_interval", "longer_wins", "steps", "kept_step")
    return {name: report[name] for name in (*told, "steps_done_again", "processes")}


def _merged(
    work: Path,
    info: FolderInfo,
    base: str,
    model: Any,
    judged: Sequence[PairTokens],
    trained: Mapping[str, float],
    settings: RewardSettings,
) -> tuple[Mapping[str, float], dict[str, Any]]:
    """Write the reward model with its adapters merged, beside 4 bits in the better way of two.

    Args:
        work: The folder of the run; ``result`` is made in it.
        info: The language model that came.
        base: Its name.
        model: The trainer's model.
        judged: Pairs to measure on.
        trained: Figures of that model.
        settings: How it was trained.

    Returns:
        Figures of what was written, and what a report says of the ways to merge.
    """
    from safetensors.torch import load_file

    from mistill.pytorch.reward_model import load_reward_model, scores, write_reward_model
    from mistill.training.adapters import WEIGHTS_FILE, load_adapters
    from tune.scoring.training import reward_figures, rows_of
    from tune.trainers.merged_folder import (
        AS_TRAINED,
        best_merge,
        merged_tensors,
        ways_to_merge,
    )
    from tune.trainers.placing import computes_in_bfloat16, type_of_base
    from tune.trainers.tuned_folder import ADAPTER_FOLDER, write_adapter

    device = this_process().device
    low = computes_in_bfloat16(settings, device)
    dtype = type_of_base(settings.base, device, low_precision=low)
    adapter = work / ADAPTER_FOLDER
    shutil.rmtree(adapter, ignore_errors=True)
    write_adapter(model, adapter, base)
    adapters = load_adapters(adapter)
    head = load_file(adapter / WEIGHTS_FILE)[f"base_model.model.{REWARD_HEAD}"]
    rows = rows_of(judged)
    as_trained = scores(model, rows)

    def merge(folder: Path, through: Any) -> Path:
        def parameters() -> Iterator[tuple[str, Any]]:
            for name, tensor in merged_tensors(info, adapters, through_nf4=through):
                if name != "lm_head.weight":
                    yield name, tensor
            yield REWARD_HEAD, head

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_reward_model(parameters(), model.config.pad_token_id, info.path, folder)
        copy_companions(info.path, folder)
        return folder

    ways = ways_to_merge(info, settings.base, dtype)
    folders = {name: merge(work / f"merged-{name}", through) for name, through in ways.items()}
    _prove(folders[AS_TRAINED[settings.base]], rows, as_trained)
    figures: Mapping[str, float] = trained
    merging: dict[str, Any] = {}
    best = folders[AS_TRAINED[settings.base]]
    if settings.base != "float":
        chosen = best_merge(
            folders, lambda folder: reward_figures(scores(load_reward_model(folder), rows))
        )
        best, figures = chosen.folder, chosen.figures
        merging = {
            "trained_after": trained,
            "merges": chosen.losses,
            "merged_into": chosen.into,
        }
    shutil.move(adapter, best / ADAPTER_FOLDER)
    shutil.rmtree(work / "result", ignore_errors=True)
    shutil.move(best, work / "result")
    return figures, merging


def _write_whole(result: Path, info: FolderInfo, model: Any, judged: Sequence[PairTokens]) -> None:
    """Write a reward model whose weights were all trained, in the type of its base."""
    from mistill.pytorch.reading import stored_tensors
    from mistill.pytorch.reward_model import scores, write_reward_model
    from tune.scoring.training import rows_of

    types = {name: tensor.dtype for name, tensor in stored_tensors(info.path)}
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    rows = rows_of(judged)
    trained = scores(model, rows)
    parameters = (
        (name, parameter.detach().to(types.get(name, parameter.dtype)))
        for name, parameter in model.named_parameters()
    )
    write_reward_model(parameters, model.config.pad_token_id, info.path, result)
    copy_companions(info.path, result)
    _prove(result, rows, trained)


def _prove(folder: Path, rows: Sequence[Sequence[int]], trained: Any) -> None:
    """Load what was written, and refuse it if it scores otherwise than what was trained."""
    import numpy as np
    import torch

    from mistill.pytorch.reading import stored_tensors
    from mistill.pytorch.reward_model import load_reward_model, scores

    exact = all(tensor.dtype == torch.float32 for _, tensor in stored_tensors(folder))
    near = _NEAR_IN_FLOAT32 if exact else _NEAR
    again = scores(load_reward_model(folder), rows)
    apart = float(np.abs(again - trained).max())
    if apart > near * max(float(np.std(trained)), 1e-2):
        raise TrainingError(
            f"the reward model scores held-out answers up to {apart:.4f} apart after it was "
            "written and read again; this is a fault of mistill: please report it"
        )
