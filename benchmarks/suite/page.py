r"""Write the tables of the documentation from what the programs printed.

    python -m benchmarks.suite.page                       write every table anew
    python -m benchmarks.suite.page --check               say which is not what its JSON gives
    python -m benchmarks.suite.page --add NAME OUTPUT --command "WORDS"
                                                          keep what a program printed, then write

To add a table:

1. Run the program and keep its output: ``python -m benchmarks.suite.nf4_codec | tee OUTPUT``. Its
   last line is one JSON document; lines before it do no harm. A ``report.json`` that
   ``mistill bench --out`` wrote, or the output of ``mistill bench --json``, will do as well.
2. ``python -m benchmarks.suite.page --add nf4_codec OUTPUT --command "python -m ..."`` on the
   machine that ran it. ``benchmarks/results/nf4_codec.json`` then holds the document with the
   machine, the date and the command, without any place on this machine. NAME is the program's;
   a second run of the same program under other conditions is ``nf4_codec-small``: what follows
   the hyphen is its own.
3. Put two lines where the table shall stand, with an empty line around them, in a page that
   ``PAGES`` names; what is between them is written anew, the prose around them is yours:

       <!-- table nf4_codec -->
       <!-- end -->

4. A program whose table has no form yet gets a function of its name in ``step_tables.py`` or
   ``engine_tables.py`` beside this file, which turns its document into lines of Markdown, a place
   in the list of ``tables.py``, and a test.

A committed table is what its committed JSON gives, or a test fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures.machine import describe_machine
from benchmarks.suite import tables
from mistill.cost_model.processors import usable_threads
from mistill.folders.folder import read_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "preferences", "tuning")),
    ROOT / "README.md",
)

_BLOCK = re.compile(r"^<!-- table (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_COMPARISON = "mistill-comparison-"
# A path that begins at the root, or in somebody's home.
_PLACE = re.compile(r"(?<![\w.~/])(?:~/|/)(?:[\w.+@-]+/)+([\w.+@-]+)/?")


def keep(
    name: str, document: Mapping[str, Any], command: str, *, results: Path = RESULTS
) -> dict[str, Any]:
    """Keep what a program found, with the machine that it ran on.

    Args:
        name: The program, and after a hyphen what tells this run from others of it.
        document: What it printed.
        command: How it was called.
        results: Where to keep it.

    Returns:
        The record that was written.
    """
    contents = dict(document)
    if str(contents.get("schema")).startswith(_COMPARISON):
        contents = condensed(contents)
    threads = contents.get("threads") or usable_threads()
    machine = contents.pop("machine", None) or asdict(describe_machine(int(threads)))
    record: dict[str, Any] = _without_places(
        {
            "program": name.partition("-")[0],
            "command": command,
            "date": contents.pop("date", None) or datetime.now(UTC).date().isoformat(),
            "machine": machine,
            "found": contents,
        }
    )
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return record


def condensed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison without its raw samples, which the report of ``mistill bench --out`` holds.

    Args:
        report: What ``Comparison.to_json`` wrote.

    Returns:
        What its table needs, and the conditions.
    """
    models = [
        {name: model[name] for name in ("name", "form", "architecture", "layers", "summary")}
        for model in report["models"]
    ]
    text = {name: value for name, value in report["text"].items() if not isinstance(value, list)}
    kept = {name: report[name] for name in ("schema", "date", "machine", "settings", "reference")}
    return {
        **kept,
        "text": {**text, "sources": report["text"]["sources"]},
        "models": models,
    }


def written(page: str, results: Path = RESULTS) -> str:
    """A page with its tables written anew.

    Args:
        page: The text of the page.
        results: Where the records are.

    Returns:
        The text, changed between the marks only.

    Raises:
        ValueError: If a mark names what has no record, or no form.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        file = results / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"a table of {name} is wanted, and there is no {file.name}")
        lines = table_of(read_json(file))
        return "\n".join([f"<!-- table {name} -->", "", *lines, "", "<!-- end -->"])

    return _BLOCK.sub(block, page)


def table_of(record: Mapping[str, Any]) -> list[str]:
    """The lines of a table, and under what it holds.

    Args:
        record: What ``keep`` wrote.

    Returns:
        Markdown.

    Raises:
        ValueError: If there is no form for this program's table.
    """
    document = record["found"]
    program = record["program"]
    if str(document.get("schema")).startswith(_COMPARISON):
        program = "comparison"
    form = tables.FORMS.get(program)
    if form is None:
        raise ValueError(f"there is no form for {program}; write one in benchmarks/suite/tables.py")
    return [f"`{record['command']}`", "", *form(document), "", f"<sub>{conditions(record)}</sub>"]


def conditions(record: Mapping[str, Any]) -> str:
    """The machine, the libraries that matter and the date, in a line.

    Args:
        record: What ``keep`` wrote.

    Returns:
        The line.
    """
    machine = record["machine"]
    threads = record["found"].get("threads") or machine["threads"]
    vectors = [
        name for name in ("avx2", "avx512f", "avx512_vnni") if name in machine["instructions"]
    ]
    versions = machine["versions"]
    libraries = [
        f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions
    ]
    governor = machine["governor"]
    parts = [
        f"{machine['processor']}{' (virtual)' if machine['virtual'] else ''}, "
        f"{machine['usable_processors']} processors, {threads} "
        f"thread{'' if threads == 1 else 's'}",
        " ".join(vectors).replace("_", "-"),
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        f"governor {governor}" if governor else "governor not told",
        ", ".join(libraries),
        record["date"][:10],
    ]
    return "; ".join(filter(None, parts))


def outdated(pages: tuple[Path, ...] = PAGES, results: Path = RESULTS) -> list[str]:
    """What is not as the records give it.

    Args:
        pages: Files with marks.
        results: Where the records are.

    Returns:
        A line for each page that differs, and for each record that no page shows.
    """
    texts = {page: page.read_text("utf-8") for page in pages}
    complaints = [
        f"{page.name} is not what the results give; run python -m benchmarks.suite.page"
        for page, text in texts.items()
        if written(text, results) != text
    ]
    shown = {match[1] for text in texts.values() for match in _BLOCK.finditer(text)}
    complaints += [
        f"no page has a table of {file.stem}; put <!-- table {file.stem} --> where it belongs"
        for file in sorted(results.glob("*.json"))
        if file.stem not in shown
    ]
    return complaints


def write(pages: tuple[Path, ...] = PAGES, results: Path = RESULTS) -> None:
    """Write every table anew.

    Args:
        pages: Files with marks.
        results: Where the records are.
    """
    for page in pages:
        text = page.read_text("utf-8")
        new = written(text, results)
        if new != text:
            page.write_text(new, "utf-8")


def last_document(output: str) -> dict[str, Any]:
    """The JSON document that a program ended with.

    Args:
        output: What it printed, or the text of a report.

    Returns:
        The document.

    Raises:
        ValueError: If the last line is none.
    """
    last = output.rstrip().rpartition("\n")[2]
    document = json.loads(last)
    if not isinstance(document, dict):
        raise ValueError(f"the last line should be a JSON object, not {last[:80]}")
    return document


def _without_places(value: Any) -> Any:
    """The same without folders of this machine: the last part of a path is left."""
    if isinstance(value, str):
        return _PLACE.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    return value


def main() -> int:
    """Write, or check.

    Returns:
        1 if something is not as it should be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add", nargs=2, metavar=("NAME", "OUTPUT"))
    parser.add_argument("--command", help="how the program was called")
    args = parser.parse_args()
    if args.add:
        name, output = args.add
        if not args.command:
            parser.error("--add needs --command: how the program was called")
        keep(name, last_document(Path(output).read_text("utf-8")), args.command)
    if not args.check:
        write()
    complaints = outdated()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
