"""A server under the load of more and more clients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from benchmarks.figures.latency import SETTLE_SECONDS
from benchmarks.figures.machine import describe_machine
from benchmarks.serving.load import Level, quantiles, run_level
from benchmarks.serving.processes import running_folder
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.streams import Server
from benchmarks.settings import ServingSettings
from mistill.cost_model.processors import usable_threads, warn_if_busy
from mistill.errors import SettingsError
from mistill.progress import track
from mistill.settings import settings_dict, settings_from
from mistill.shown import visible

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.options import ServingOptions


@dataclass(frozen=True, kw_only=True)
class ServingReport:
    """What clients got of a server.

    Attributes:
        name: What was measured: a folder's name, or an address.
        settings: How it was loaded.
        machine: The machine of the clients, and of a folder's server.
        levels: By number of clients, a level for each round.
    """

    name: str
    settings: ServingSettings
    machine: dict[str, Any]
    levels: Mapping[int, Sequence[Level]]

    def figures(self) -> dict[int, dict[str, float | None]]:
        """The figures of each number of clients.

        Returns:
            Medians over the rounds by name, in seconds; quantiles are those of all rounds, and
            None where there was nothing to time.
        """
        one = self.levels[min(self.levels)]
        figures: dict[int, dict[str, float | None]] = {}
        for clients, rounds in self.levels.items():
            first = quantiles([s for level in rounds for s in level.first_token_seconds])
            gaps = quantiles([s for level in rounds for s in level.gap_seconds])
            speeds = [level.tokens_per_second for level in rounds]
            # Turns that were measured one after another met the same machine.
            ratios = [
                level.tokens_per_second / alone.tokens_per_second
                for level, alone in zip(rounds, one, strict=True)
            ]
            figures[clients] = {
                "tokens_per_second": statistics.median(speeds),
                "times_the_first": statistics.median(ratios),
                "first_token_p50": first["p50"],
                "first_token_p99": first["p99"],
                "gap_p50": gaps["p50"],
                "gap_p99": gaps["p99"],
                "tokens_per_event": statistics.mean(level.tokens_per_event for level in rounds),
                "failures": float(sum(level.failures for level in rounds)),
            }
            busy = [
                level.processor_seconds / level.new_tokens
                for level in rounds
                if level.processor_seconds is not None
            ]
            if busy:
                figures[clients]["processor_seconds_per_token"] = statistics.median(busy)
            peaks = [level.peak_bytes for level in rounds if level.peak_bytes is not None]
            if peaks:
                figures[clients]["peak_bytes"] = float(max(peaks))
        return figures

    def table(self) -> Table:
        """The figures for the terminal.

        Returns:
            A table of rich.
        """
        from rich.table import Table

        figures_of = self.figures()
        heads: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "tokens/s": lambda one: f"{one['tokens_per_second']:.1f}",
            "x": lambda one: f"{one['times_the_first']:.2f}",
            "first token, ms": lambda one: _middle_and_end(one, "first_token"),
            "gap, ms": lambda one: _middle_and_end(one, "gap"),
            "tokens/event": lambda one: f"{one['tokens_per_event']:.1f}",
            "failures": lambda one: f"{one['failures']:.0f}",
        }
        if any("peak_bytes" in one for one in figures_of.values()):
            heads["CPU ms"] = lambda one: f"{1000 * one['processor_seconds_per_token']:.1f}"
            heads["peak MB"] = lambda one: f"{one['peak_bytes'] / 1e6:.0f}"
        table = Table(
            title=f"{visible(self.name)} under load",
            title_justify="left",
            caption="first token and gap: median and 99th percentile; a gap lies between two "
            "events of a reply; CPU time is that of a token",
            caption_justify="left",
        )
        for head in ("clients", *heads):
            table.add_column(head, justify="right", no_wrap=True)
        for clients, one in figures_of.items():
            table.add_row(str(clients), *(cell(one) for cell in heads.values()))
        return table

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values.

        Returns:
            Figures by number of clients, and every level.
        """
        return {
            "benchmark": "serving",
            "name": self.name,
            "machine": self.machine,
            "settings": settings_dict(self.settings),
            "clients": {str(clients): values for clients, values in self.figures().items()},
            "levels": [level.to_dict() for rounds in self.levels.values() for level in rounds],
        }


def bench_serving(
    target: str | Path,
    *,
    settings: ServingSettings | None = None,
    **options: Unpack[ServingOptions],
) -> ServingReport:
    """Measure a server under the load of more and more clients.

    Args:
        target: An ONNX folder, which is served meanwhile, or the address of any server that speaks
            as OpenAI's does.
        settings: How it is loaded; or give the fields as options.
        **options: Fields of ``ServingSettings``.

    Returns:
        What the clients got.

    Raises:
        ServerError: If the server does not answer.
        SettingsError: If the target is neither a folder nor an address.
    """
    settings = settings_from(ServingSettings, settings, options)
    warn_if_busy(settings.threads or usable_threads())
    with ExitStack() as stack:
        process: int | None = None
        if Path(target).is_dir():
            server, process = stack.enter_context(
                running_folder(Path(target), threads=settings.threads)
            )
            name = Path(target).resolve().name
        elif "://" in str(target):
            key = settings.api_key_file
            server = Server(
                str(target),
                model=settings.model,
                key=None if key is None else key.read_text("utf-8").strip(),
            )
            name = server.url
        else:
            raise SettingsError(
                f"{target} is neither a folder nor an address; give an ONNX folder, or the address "
                "of a server such as http://127.0.0.1:8080"
            )
        levels = load_in_turns({name: (server, process)}, settings)[name]
    return ServingReport(
        name=name,
        settings=settings,
        machine=asdict(describe_machine(settings.threads or usable_threads())),
        levels=levels,
    )


def load_in_turns(
    servers: Mapping[str, tuple[Server, int | None]], settings: ServingSettings
) -> dict[str, dict[int, list[Level]]]:
    """Load several servers in turn, so that whatever else the machine does falls on all alike.

    Args:
        servers: By name, with the numbers of their processes.
        settings: How they are loaded.

    Returns:
        By name and number of clients, a level for each round.
    """
    prompts = {
        name: Prompts(server, settings.prompt_tokens, settings.seed)
        for name, (server, _) in servers.items()
    }
    levels: dict[str, dict[int, list[Level]]] = {
        name: {int(clients): [] for clients in settings.clients} for name in servers
    }
    turns = (1 + settings.rounds) * len(settings.clients) * len(servers)
    with track("loading servers", turns, "turns") as progress:
        # The first round warms up.
        for turn in range(1 + settings.rounds):
            for clients in map(int, settings.clients):
                for name, (server, process) in servers.items():
                    time.sleep(SETTLE_SECONDS)
                    level = run_level(
                        server,
                        prompts[name],
                        clients=clients,
                        requests=settings.requests,
                        new_tokens=settings.new_tokens,
                        process=process,
                    )
                    if turn:
                        levels[name][clients].append(level)
                    progress.advance()
    return levels


def _middle_and_end(figures: Mapping[str, float | None], name: str) -> str:
    """Median and 99th percentile, in milliseconds; a dash where nothing was timed."""
    both = [figures[f"{name}_{quantile}"] for quantile in ("p50", "p99")]
    return " / ".join("-" if seconds is None else f"{1000 * seconds:.0f}" for seconds in both)
