"""Freed memory goes back to the system when it should."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_tensors_go_back_to_the_system() -> None:
    script = """
import sys, torch
from pathlib import Path
from mistill.training.memory import give_back, unmap_when_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "at once":
    assert unmap_when_freed()
torch.ones(7 << 20)  # freeing 28 MiB lets glibc keep smaller ones in its heap from now on
before = resident()
kept, freed = [], []
for _ in range(30):
    freed.append(torch.ones(2 << 20))
    kept.append(torch.ones(10_000))
del freed
if sys.argv[1] == "when asked":
    give_back()
print(resident() - before)
"""

    def left(answer: str) -> int:
        command = [sys.executable, "-c", script, answer]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return int(done.stdout)

    assert left("never") > 150 << 20
    assert left("at once") < 20 << 20
    assert left("when asked") < 20 << 20
