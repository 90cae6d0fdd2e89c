"""Child processes that each run one model, started and asked by the process that measures.

Each opens one folder and waits. While one computes, the others sleep, so that they can take turns
round after round, and a disturbance of the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mistill.errors
from benchmarks.rivals.engines import Note
from benchmarks.rivals.environment import child_command
from mistill.engine.language_model import Provider
from mistill.errors import MistillError

_PACKAGES = Path(__file__).resolve().parents[2]


class Child:
    """A process that runs one model: ``python -m benchmarks.measure.child FOLDER``.

    A rival's folder says which Python runs it.

    Attributes:
        folder: The folder that it opens.
    """

    folder: Path

    def __init__(self, opened: Path | Note, threads: int, provider: Provider = "cpu") -> None:
        """Start the process; it opens the folder on the request ``open``.

        Args:
            opened: The folder that it opens, or a rival's files with what runs them.
            threads: Threads that its engine computes with.
            provider: Execution provider, if it is an ONNX folder.
        """
        note = opened if isinstance(opened, Note) else None
        self.folder = opened if isinstance(opened, Path) else Path(opened.folder)
        self._complaints = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # -P keeps the current folder out of the module path: a folder of the user's named
        # "benchmarks" or "mistill" there must not be taken for ours.
        ours = [sys.executable, "-P", "-m", "benchmarks.measure.child"]
        self._process = subprocess.Popen(
            [
                *(ours if note is None else child_command(note.python)),
                *(str(self.folder), "--threads", str(threads), "--provider", provider),
                *(() if note is None else ("--rival", note.to_json())),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
            env=_environment(threads, note),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, do: str, **arguments: Any) -> None:
        """Send a request without waiting for the answer.

        Args:
            do: The request; ``benchmarks.measure.child`` lists them.
            **arguments: Its arguments.
        """
        assert self._process.stdin is not None
        # A child that is gone is noticed, with its last words, when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to the earliest request that has none yet.

        Returns:
            The answer.

        Raises:
            MistillError: If the folder cannot be used, or the process was killed.
            RuntimeError: If the child failed in a way that is a bug of ours; with its traceback.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" not in answer:
            return answer
        error_class = getattr(mistill.errors, answer["error"], None)
        if isinstance(error_class, type) and issubclass(error_class, MistillError):
            raise error_class(answer["message"])
        if answer["error"] == "MemoryError":
            raise MistillError(f"there is not enough memory to measure {self.folder}")
        raise RuntimeError(f"while measuring {self.folder}:\n{answer['traceback']}")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer; see ``Scorer.ask``."""
        self.send(do, **arguments)
        return self.receive()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._complaints.close()

    def _death(self) -> Exception:
        code = self._process.wait()
        self._complaints.seek(0)
        output = self._complaints.read().strip()
        if code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            hint = "; is there memory enough for all models at once?" if code == -9 else ""
            return MistillError(f"the process that ran {self.folder} {reason}{hint}")
        return RuntimeError(f"the process that ran {self.folder} ended with {code}:\n{output}")


@contextlib.contextmanager
def start_children(
    opened: Sequence[Path | Note], threads: int, provider: Provider = "cpu"
) -> Iterator[list[Child]]:
    """Start one process for each folder, all at once; end them all when the body ends.

    Their libraries are imported by the time the body begins, but no model is open.

    Args:
        opened: Folders, and rivals' files with what runs them.
        threads: Threads that every engine computes with.
        provider: Execution provider of the ONNX folders.

    Yields:
        The processes, in the order of the folders.
    """
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(Child(one, threads, provider)) for one in opened]
        for child in started:
            child.send("prepare")
        for child in started:
            child.receive()
        yield started


def _environment(threads: int, note: Note | None) -> dict[str, str]:
    search = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # What our Python finds is no business of a rival's.
    paths = {"PYTHONPATH": os.pathsep.join(search)} if note is None else {}
    return {
        **inherited,
        **paths,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
