"""Preferences from folder to folder.

Everything that can be wrong with the settings, the folders and the data is found before a weight is
read. Training happens in a hidden folder beside the target, where the reference, the checkpoints
and the numbers are kept, so that the same call resumes what was interrupted. The target appears
when there is a model that got better, and not before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mistill.errors import TrainingError
from mistill.folders.folder import FolderInfo
from mistill.folders.lineage import add_lineage, fingerprint, name_of_base
from mistill.folders.publishing import publish, refuse_existing
from mistill.preferences.reading import divided, read_labelled, read_pairs
from mistill.preferences.tokens import Answer, digest_of, labelled_tokens, pair_tokens
from mistill.settings import result_settings, settings_from
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import precision_of_its_own, this_process
from mistill.training.together import working_together
from tune.settings import PreferenceSettings
from tune.trainers.library import require_trl
from tune.trainers.opening import open_to_tune
from tune.trainers.other_text import OtherText, check_other_text, read_other_text

if TYPE_CHECKING:
    from tune.options import PreferenceOptions
    from tune.trainers.ending import End
    from tune.trainers.running import Run

_log = logging.getLogger(__name__)

# Settings that decide how long a step takes and what is noted on the way, not what is learned.
_SAME_RESULT = ("checkpoint_every", "gradient_checkpointing", "other_tokens")
# Tokens of held-out answers on which the divergence from the start is measured.
_KL_TOKENS = 16_384
# Nats that the log-probability of a better answer may lose without a warning.
_LOST_NATS = 1.0


def preferences(
    model: str | Path,
    target: str | Path,
    *,
    pairs: Texts,
    held_out: Texts | None = None,
    other_texts: Texts | None = None,
    settings: PreferenceSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[PreferenceOptions],
) -> Path:
    """Teach a model which of two answers is better (DPO and its kin, KTO, ORPO), through TRL.

    The model is its own reference: what it holds the answers to be worth before it learns is
    computed once. It is evaluated on held-out pairs before, during and after; the best one found
    is what the target holds, its adapters merged, with the adapter beside it in ``adapter/``. An
    interrupted call resumes from its last checkpoint when it is made again.

    With ``base="nf4"`` the frozen weights are held in 4 bits while training (QLoRA), and of the
    two ways to merge the one with the lower held-out loss is taken, of the model that came as the
    reference. Under ``accelerate launch`` or torchrun every process makes the same call; one of
    them writes. Several processes learn the same as one, but with the loss kto, for which P
    processes are one with micro-batches of P times the rows.

    Args:
        model: The model to tune, with a chat template: a float folder, or one in NF4 for
            ``base="nf4"``; a Hub id, a .gguf file, or ``@smollm2``.
        target: The folder to make: the tuned model, ``adapter/``, ``metrics.jsonl`` and
            ``tuning_report.json``.
        pairs: Pairs or rankings of answers; for the loss kto labelled answers too.
        held_out: The same to evaluate on; a share of the prompts of ``pairs`` if not given.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten; the shipped ``@demo-held-out`` if not given.
        settings: The loss and how to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``PreferenceSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the folder is missing, broken or of a form that cannot be tuned.
        ArchitectureError: If the model is neither Llama nor Mistral, or its rows do not fit NF4.
        TextError: If the data are missing, or a row is no preference.
        VocabularyError: If there is no chat template.
        TrainingError: If the model got no better, or the loss was not a number.
        MissingExtraError: If TRL or peft is not installed.
    """
    settings = settings_from(PreferenceSettings, settings, options)
    target = refuse_existing(target, overwrite, [model])
    require_trl(settings)
    check_other_text(other_texts, settings)
    info, vocabulary = open_to_tune(model, target, (pairs, held_out), settings)
    learned, judged = _read(pairs, held_out, vocabulary, settings)
    other = read_other_text(other_texts, vocabulary, info.context_length, settings)
    key = {
        "step": "preferences",
        "settings": result_settings(settings, *_SAME_RESULT),
        "model": fingerprint(info.path),
        "pairs": digest_of(learned),
        "held_out": digest_of(judged),
        **vocabulary.date_key,
    }
    data = Data(learned, judged, other)
    with (
        precision_of_its_own(),
        working_together(target, key, this_process(), overwrite) as work,
    ):
        facts = _tune(work, info, name_of_base(model, info.path), vocabulary, data, settings)
        if this_process().is_main_process:
            add_lineage(
                work / "result",
                step="preferences",
                settings=settings,
                source=info.path,
                pairs=sources_of(pairs),
                held_out=[] if held_out is None else sources_of(held_out),
                other_texts=[] if other_texts is None else sources_of(other_texts),
                **facts,
            )
            publish(work, target, overwrite)
        this_process().wait_for_everyone()
    return target


@dataclass(frozen=True, eq=False)
class Data:
    """What a model learns from and is judged by.

    Attributes:
        learned: Judged answers to learn from.
        judged: Those to evaluate on.
        other: Text that it is not tuned on; None for none.
    """

    learned: Any
    judged: Any
    other: OtherText | None


def _read(
    pairs: Texts, held_out: Texts | None, vocabulary: Vocabulary, settings: PreferenceSettings
) -> tuple[Any, Any]:
    """What is learned and what is evaluated on, as tokens."""
    longest = settings.max_length

    def read(reader: Any, texts: Texts | None) -> Any:
        if texts is None:
            return None
        return reader(
            texts,
            ranking=settings.ranking,
            seed=settings.seed,
            skip_bad_rows=settings.skip_bad_rows,
        )

    labels = settings.loss == "kto"
    reader, tokens = (read_labelled, labelled_tokens) if labels else (read_pairs, pair_tokens)
    learned, judged = divided(read(reader, pairs), read(reader, held_out), settings.held_out_share)
    make: Any = tokens
    return (
        make(learned, vocabulary, longest, name="the pairs to learn from"),
        make(judged, vocabulary, longest, name="the held-out pairs"),
    )


def _tune(
    work: Path,
    info: FolderInfo,
    base: str,
    vocabulary: Vocabulary,
    data: Data,
    settings: PreferenceSettings,
) -> dict[str, Any]:
    """Train, evaluate, gather in ``work/result`` what the target will hold, and say what it is.

    Processes that do not write have nothing to say.
    """
    from mistill.judging.likelihood import GROUP, answer_log_probabilities
    from tune.pairwise.figures import figures_of
    from tune.pairwise.log_probabilities import recorded_log_probabilities
    from tune.pairwise.training import answers_of, preference_trainer
    from tune.trainers.arguments import between_evaluations, step_total
    from tune.trainers.ending import end_as_trained, load_to_look_at, merged_end
    from tune.trainers.placing import computes_in_bfloat16, load_base, type_of_base
    from tune.trainers.running import emptied, run_trainer
    from tune.trainers.shares import in_shares

    steps = step_total(settings, len(data.learned))
    every = between_evaluations(settings.evaluate_every, steps)
    device = this_process().device
    low = computes_in_bfloat16(settings, device)
    dtype = type_of_base(settings.base, device, low_precision=low)
    model = load_base(info, settings.base, dtype, device)
    held = (fingerprint(info.path), settings.base, dtype, low)

    def reference(answers: Sequence[Answer], name: str) -> Any:
        digest = hashlib.sha256(repr((*held, answers)).encode()).hexdigest()
        return recorded_log_probabilities(
            model, answers, work / f"reference-{name}.jsonl", digest, low_precision=low
        )

    held_out = answers_of(data.judged)
    start = reference(held_out, "held-out")
    trainer = preference_trainer(
        model,
        info.path,
        vocabulary,
        data.learned,
        reference,
        settings,
        work,
        steps=steps,
        checkpoint_every=settings.checkpoint_every or every,
    )

    def said_by(one: Any) -> Any:
        return answer_log_probabilities(one, held_out, low_precision=low)

    def evaluate(step: int) -> dict[str, Any]:
        now = in_shares(
            held_out,
            lambda some: answer_log_probabilities(trainer.model, some, low_precision=low),
            GROUP,
        )
        return figures_of(data.judged, now, start, settings).to_dict()

    run = run_trainer(
        trainer,
        work,
        steps=steps,
        what=f"learning preferences ({settings.loss})",
        evaluate=evaluate,
        every=every,
        keep=settings.keep,
    )
    if run.kept_step == 0:
        last = run.judged[max(run.judged)]
        emptied(work)
        raise TrainingError(
            f"the model got no better: its held-out loss was {run.judged[0]['loss']:.4f} before "
            f"and {last['loss']:.4f} after {run.steps} steps; lower learning_rate (now "
            f"{settings.peak_learning_rate:g}), raise beta or give more pairs"
        )
    if not this_process().is_main_process:
        return {}
    if settings.base == "float":
        end = end_as_trained(run, trainer.model)
    else:
        came = start if info.form == "nf4" else said_by(load_to_look_at(info.path, device))
        end = merged_end(
            work,
            info,
            run,
            trainer.model,
            base,
            settings,
            dtype,
            before=figures_of(data.judged, came, came, settings).to_dict(),
            measure=lambda one: figures_of(data.judged, said_by(one), came, settings).to_dict(),
        )
    return _finish(work, info, base, run, end, data, settings)


def _finish(
    work: Path,
    info: FolderInfo,
    base: str,
    run: Run,
    end: End,
    data: Data,
    settings: PreferenceSettings,
) -> dict[str, Any]:
    from mistill.pytorch.loading import load_pytorch
    from tune.pairwise.figures import interval_of, length_figures
    from tune.pairwise.training import answers_of
    from tune.trainers.ending import facts_of, write_end
    from tune.trainers.moved import divergence_from_start, forgetting
    from tune.trainers.tuned_folder import write_report

    learned, judged = data.learned, data.judged
    report = {
        "loss": settings.loss,
        "rows": {"learned": len(learned), "held_out": len(judged)},
        **end.told,
        "margin_accuracy_interval": interval_of(end.after["margin_accuracy"], len(judged)),
        "tokens_of_answers": {
            "learned": length_figures(learned),
            "held_out": length_figures(judged),
        },
        "kl": divergence_from_start(
            end.model, lambda: load_pytorch(info.path), answers_of(judged), _KL_TOKENS
        ),
        "other_text": forgetting(end.model, lambda: load_pytorch(info.path), data.other),
        "reference": {"model": fingerprint(info.path), "pairs": digest_of(learned)},
        **facts_of(run),
    }
    warn_of_displacement(end.before, end.after)
    write_end(work, info, base, end, settings)
    write_report(work / "result", report)
    told = (*end.told, "kl", "other_text", "steps", "kept_step", "steps_done_again", "processes")
    return {name: report[name] for name in told}


def warn_of_displacement(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Say so where the better answers became less likely, which a growing margin hides.

    Args:
        before: Figures of the start.
        after: Figures of the tuned model.
    """
    lost = before["chosen"] - after["chosen"]
    if lost > _LOST_NATS:
        _log.warning(
            "the better answers became less likely: log p fell by %.1f nats an answer, and that of "
            "the others by %.1f; what the model says instead is neither of the two: raise beta, "
            "lower learning_rate, or tune on the better answers first",
            lost,
            before["rejected"] - after["rejected"],
        )
