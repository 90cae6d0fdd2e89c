"""The numbers of a run: one JSON object a line, and whatever trackers were asked for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.errors import MissingExtraError, missing_extra
from mistill.folders.publishing import write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS_FILE = "metrics.jsonl"
PROJECT = "mistill"
"""What the run is filed under by trackers, and the name of the folder with TensorBoard's files."""


Watch = Callable[[Mapping[str, Any]], object]
"""Takes the numbers of a step or of a judgement, as a line of ``metrics.jsonl`` holds them."""

_watches: ContextVar[tuple[Watch, ...]] = ContextVar("watches", default=())


@contextmanager
def watched_by(watch: Watch | None) -> Iterator[None]:
    """Hand the numbers of every run in the body to a function, too.

    Args:
        watch: The function; None hands them to nobody.

    Yields:
        Nothing.
    """
    token = _watches.set(_watches.get() if watch is None else (*_watches.get(), watch))
    try:
        yield
    finally:
        _watches.reset(token)


def copy_metrics(work: Path, result: Path) -> None:
    """Copy what a run noted into the folder that it publishes: ``metrics.jsonl``, ``tensorboard/``.

    Args:
        work: The folder of the run.
        result: A folder without them.
    """
    shutil.copyfile(work / METRICS_FILE, result / METRICS_FILE)
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", result / "tensorboard")


def require_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers whose libraries are not installed.

    Args:
        trackers: Names of libraries: tensorboard, trackio, wandb.

    Raises:
        MissingExtraError: If one is missing.
    """
    for name in trackers:
        try:
            missing = find_spec(name) is None
        except ValueError:  # a module without a spec, or one that was put away
            missing = True
        if missing and name == "tensorboard":
            raise missing_extra("tensorboard", "tensorboard")
        if missing:
            raise MissingExtraError(
                f"the tracker {name} is not installed; install it with: pip install {name}"
            )


class Metrics:
    """Numbers of every step and every judgement."""

    def __init__(self, work: Path, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        """Start the trackers.

        Args:
            work: The folder of the run.
            accelerator: Was made with the trackers' names.
            settings: What a tracker shows beside the run, by name.
        """
        self.file, self.accelerator = work / METRICS_FILE, accelerator
        if accelerator.log_with:
            config = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in settings.items()
            }
            accelerator.init_trackers(PROJECT, config)

    def keep_until(self, step: int) -> None:
        """Drop the lines that a resumed run will write again.

        Args:
            step: The last step to keep; -1 for none.
        """
        if not self.accelerator.is_main_process:
            return
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        earlier_lines = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # cut short by a kill; all that follows is newer than the checkpoint
            if entry["step"] <= step:
                earlier_lines.append(line + "\n")
        write_atomically(self.file, "".join(earlier_lines))

    def write(self, step: int, **values: Any) -> None:
        """Add a line.

        Args:
            step: Optimizer steps done.
            **values: Numbers, or mappings of them; what is not known is None.
        """
        if not self.accelerator.is_main_process:
            return
        line = _finite({"step": step, **values})
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
        for watch in _watches.get():
            watch(line)
        flat: dict[str, float | None] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat.update({f"{name}/{part}": number for part, number in value.items()})
            else:
                flat[f"train/{name}"] = value
        numbers = {name: number for name, number in flat.items() if number is not None}
        self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Let go of the trackers' files."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _finite(value: Any) -> Any:
    """A value without NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
