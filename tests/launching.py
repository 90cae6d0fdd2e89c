"""Programs in several processes that know of one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType


def launched(
    words: Sequence[object],
    folder: Path,
    processes: int = 2,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run a program as torchrun starts it, with one thread each.

    Args:
        words: The program's file or ``-m`` and its module, and its arguments.
        folder: Where it runs.
        processes: How many there are.
        environment: More variables.

    Returns:
        What became of it; its output as text.
    """
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
             **environment},
        capture_output=True, text=True, check=False, timeout=600, cwd=folder,
    )  # fmt: skip
