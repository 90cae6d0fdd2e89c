"""Free memory in made-up ``proc`` and ``sys`` folders."""

from __future__ import annotations

from pathlib import Path

from mistill.cost_model.free_memory import free_memory

GIB = 1 << 30


def a_root(root: Path, groups: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:  8388608 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def test_the_smallest_of_machine_and_control_groups_counts(tmp_path: Path) -> None:
    root = a_root(tmp_path, "0::/user/one\n")
    assert free_memory(root) == 8 * GIB
    group = root / "sys/fs/cgroup/user"
    (group / "one").mkdir(parents=True)
    for folder, limit in ((group, str(4 * GIB)), (group / "one", "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{3 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert free_memory(root) == 2 * GIB
    (group / "memory.current").write_text(f"{6 * GIB}\n")
    assert free_memory(root) == 0


def test_control_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    root = a_root(tmp_path, "4:memory:/box\n2:cpu:/box\n")
    group = root / "sys/fs/cgroup/memory/box"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (group / "memory.stat").write_text("total_inactive_file 4096\n")
    assert free_memory(root) == GIB + 4096


def test_a_system_that_does_not_tell_has_some(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 0
