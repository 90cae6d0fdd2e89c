"""A run of one or several processes in one hidden folder, and what is kept of it where it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.errors import TrainingError
from mistill.folders.folder import copy_companions
from mistill.folders.publishing import working

if TYPE_CHECKING:
    from accelerate import PartialState


@contextmanager
def working_together(
    target: Path, key: Mapping[str, Any], state: PartialState, overwrite: bool
) -> Iterator[Path]:
    """The hidden folder beside the target, which one process makes and all use.

    Args:
        target: The folder to make.
        key: What the result depends on.
        state: Knows the processes.
        overwrite: Whether state of other work is removed.

    Yields:
        The hidden folder.
    """
    if state.is_main_process:
        with working(target, key, anew=overwrite) as work:
            state.wait_for_everyone()
            yield work
    else:
        state.wait_for_everyone()
        yield target.parent / f".{target.name}.working"


@contextmanager
def keeping_the_best(work: Path, source: Path, state: PartialState) -> Iterator[None]:
    """Where training fails, keep the state of a run that found a better model, and say where.

    Args:
        work: The folder of the run.
        source: The model that came, whose companions a kept one gets.
        state: Knows the processes.

    Yields:
        Nothing.

    Raises:
        TrainingError: The one of the body, with the place of the best model in it.
    """
    try:
        yield
    except TrainingError as error:
        best = [folder for folder in work.glob("best-*") if not folder.suffix]
        if not best:
            if state.is_main_process:
                shutil.rmtree(work)
            raise
        if state.is_main_process:
            copy_companions(source, best[0])
        raise TrainingError(f"{error}; the best model until then is kept in {best[0]}") from error
