"""Energy from files that look like the kernel's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures.energy import EnergyMeter
from benchmarks.figures.latency import Latency, Turn, time_turn
from benchmarks.figures.machine import describe_machine
from tests.benchmarks.made import made_comparison

LIMIT = 262_143_328_850


def zone(root: Path, place: str, name: str, microjoules: int, limit: int = LIMIT) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 9_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 7_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_processors_and_memory_are_added_and_nothing_is_counted_twice(powercap: Path):
    meter = EnergyMeter(powercap)
    assert [counter.name for counter in meter.counters] == ["package-0", "dram", "package-1"]
    before = meter.read()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("4000000")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("11000000")
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("750000")
    (powercap / "intel-rapl:2" / "energy_uj").write_text("99000000")
    assert meter.joules(before, meter.read()) == pytest.approx(3.25)


def test_a_counter_that_begins_again_is_followed_over_its_limit(tmp_path: Path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", LIMIT - 1_500_000)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    file.write_text("500000")
    assert meter.joules(before, meter.read()) == pytest.approx(2.0)


def test_a_machine_without_counters_says_so(tmp_path: Path):
    for root in (tmp_path, tmp_path / "nowhere"):
        meter = EnergyMeter(root)
        assert meter.reason == "the machine has no energy counters"
        assert meter.joules(meter.read(), meter.read()) is None


def test_forbidden_counters_are_named_as_such(powercap: Path, monkeypatch: pytest.MonkeyPatch):
    read = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert EnergyMeter(powercap).reason == "only root may read the counters"


def test_a_report_says_why_it_has_no_energy(
    tmp_path: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch
):
    def shown(root: Path) -> str:
        monkeypatch.setattr("benchmarks.figures.machine.EnergyMeter", lambda: EnergyMeter(root))
        machine = describe_machine(1)
        found = replace(made_comparison(), machine=machine).to_markdown()
        return next(line for line in found.splitlines() if line.startswith("- Energy: "))

    assert (
        shown(tmp_path / "nowhere") == "- Energy: not available: the machine has no energy counters"
    )
    assert shown(powercap) == "- Energy: counters of package-0, dram, package-1"


class Spender:
    """A model that spends 3 joules on its prompt and 2 on every token after the first."""

    vocabulary_size, context_length = 10, 100

    def __init__(self, file: Path) -> None:
        self.file, self.spent = file, 0

    def logits(self, ids: Any) -> Any:
        raise NotImplementedError

    def stream(self, ids: Sequence[int], choose: Any = None) -> Iterator[int]:
        for joules in [3, *[2] * 50]:
            self.spent += joules
            self.file.write_text(str(self.spent * 1_000_000))
            yield 1


def test_only_what_writing_takes_is_counted(tmp_path: Path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    ticks = iter(range(100))
    turn = time_turn(
        Spender(file),
        [1, 2],
        new_tokens=5,
        seconds=100,
        clock=lambda: float(next(ticks)),
        meter=EnergyMeter(tmp_path),
    )
    assert turn.decode_joules == pytest.approx(8)
    assert Latency(turns=(turn,)).joules_per_token == pytest.approx(2)


def test_no_figure_is_given_where_no_machine_told():
    turn = Turn(prompt_tokens=1, first_token_seconds=1.0, token_seconds=(1.0, 1.0))
    told = Turn(
        prompt_tokens=1, first_token_seconds=1.0, token_seconds=(1.0, 1.0), decode_joules=3.0
    )
    assert Latency(turns=(turn,)).joules_per_token is None
    assert Latency(turns=(turn, told)).joules_per_token == 1.5
