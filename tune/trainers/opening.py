"""What every way of tuning by TRL looks at before a weight is read."""

from __future__ import annotations

from pathlib import Path

from mistill.folders.folder import FolderInfo
from mistill.folders.publishing import begun_on
from mistill.settings import require
from mistill.text.rows import Texts, check_texts
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tune.settings import TrainerSettings


def open_to_tune(
    model: str | Path, target: Path, data: tuple[Texts | None, ...], settings: TrainerSettings
) -> tuple[FolderInfo, Vocabulary]:
    """Open a model that is to be tuned, and refuse data that are not there.

    Args:
        model: A folder, a Hub id, a .gguf file, or ``@smollm2``.
        target: The folder to make, which decides the day that a chat template writes.
        data: What is learned from and evaluated on; None is left out.
        settings: How to tune.

    Returns:
        The model's folder and vocabulary.

    Raises:
        SettingsError: If max_length does not fit the model's context.
        FolderError: If the folder is missing or broken, or holds weights that cannot be trained.
        ArchitectureError: If the model is neither Llama nor Mistral, or does not fit the settings.
        TextError: If data are missing.
    """
    for given in data:
        if given is not None:
            check_texts(given, skip_bad_rows=settings.skip_bad_rows)
    from mistill.pytorch.reading import require_finite_weights
    from tune.trainers.tuned_folder import tunable_folder

    info = tunable_folder(model, settings.base, [settings.lora_rank])
    require_finite_weights(info.path)
    require(
        settings.max_length <= info.context_length,
        f"a max_length of {settings.max_length} does not fit the model's context of "
        f"{info.context_length}; lower it",
    )
    return info, load_vocabulary(info.path, today=begun_on(target))
