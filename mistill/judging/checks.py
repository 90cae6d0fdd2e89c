"""Whether an answer is what a machine can check: JSON of a schema, a pattern, code that runs.

Patterns and schemas may take for ever on some text, and so may code that a model wrote. All are
tried by a worker process with bounds of time and memory; what exceeds them is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mistill.bounded import SECONDS, OutOfBoundsError, call_bounded
from mistill.errors import SettingsError, missing_extra
from mistill.folders.json_text import parse_json, read_json_file

_FENCE = re.compile(r"```[A-Za-z0-9_+-]*\n(.*?)```", re.DOTALL)
# Seconds that code may run, a little less than the worker that starts it may wait.
_CODE_SECONDS = SECONDS - 1
_CODE_BYTES = 1 << 30

# Runs before the code: what a slip of a model could break is refused. It stops accidents and no
# attacker: code that must not see this machine belongs into a container.
_GUARD = """
import sys
def _guard(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (mode and set(str(mode)) & set("wax+")) or (flags or 0) & 3:
            raise PermissionError("code that is checked writes no files")
    elif event.split(".")[0] in ("socket", "subprocess", "shutil", "ctypes", "webbrowser"):
        raise PermissionError(event)
    elif event in ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
                   "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
                   "os.truncate", "os.chmod", "os.chown", "os.kill", "os.putenv", "pty.spawn",
                   "import" if arguments and arguments[0] in ("ctypes", "_ctypes") else ""):
        raise PermissionError(event)
sys.addaudithook(_guard)
del sys, _guard
"""


def read_schema(schema: str | Path) -> dict[str, Any]:
    """Read the JSON schema that answers are held against.

    Args:
        schema: A file, or the schema as JSON text.

    Returns:
        The schema.

    Raises:
        SettingsError: If it is no JSON schema.
        FolderError: If the file cannot be read.
        MissingExtraError: If jsonschema is not installed.
    """
    text = str(schema)
    if text.lstrip().startswith("{"):
        value = parse_json(text, "the JSON schema", SettingsError)
    else:
        value = read_json_file(Path(text).expanduser())
    if not isinstance(value, dict):
        raise SettingsError("a JSON schema must be a JSON object")
    try:
        from jsonschema import SchemaError, validators
    except ModuleNotFoundError as error:
        raise missing_extra("jsonschema", "tune") from error
    try:
        validators.validator_for(value).check_schema(value)
    except SchemaError as error:
        reason = " ".join(error.message.split())[:200]
        raise SettingsError(f"{_name(text)} is no JSON schema: {reason}") from error
    return value


def _name(text: str) -> str:
    return "the text" if text.lstrip().startswith("{") else text


def fits_schema(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON and fits a schema, nothing standing before or after it.

    Args:
        schema: From ``read_schema``.
        text: An answer.

    Returns:
        True if it does.
    """
    return _bounded("mistill.judging.checks:schema_fits", schema, text)


def schema_fits(schema: dict[str, Any], text: str) -> bool:
    """The same in this process; for the worker.

    Args:
        schema: From ``read_schema``.
        text: An answer.

    Returns:
        True if it does.
    """
    from jsonschema import validators

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    validator = validators.validator_for(schema)(schema)
    return bool(validator.is_valid(value))


def check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression.

    Args:
        pattern: A regular expression of Python.

    Raises:
        SettingsError: If it is none.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SettingsError(f"{pattern!r:.80} is no regular expression: {error}") from error


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern matches a whole text, white space around it left out.

    Args:
        pattern: A regular expression of Python; a dot matches line breaks too.
        text: An answer.

    Returns:
        True if it does.
    """
    return _bounded("mistill.judging.checks:pattern_matches", pattern, text.strip())


def pattern_matches(pattern: str, text: str) -> bool:
    """The same in this process; for the worker.

    Args:
        pattern: A regular expression.
        text: An answer.

    Returns:
        True if it matches all of the text.
    """
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def code_in(text: str) -> str:
    """The code of an answer: its fenced blocks joined, or all of it where there is none.

    Args:
        text: An answer.

    Returns:
        The code.
    """
    blocks = _FENCE.findall(text)
    return "\n".join(blocks) if blocks else text


def code_passes(text: str, tests: str) -> bool:
    """Whether the Python code of an answer runs, and the tests after it.

    It runs in a process of its own: with 4 seconds, 1 GiB of memory, an empty folder and
    environment, and no leave to write files, start processes or open connections. This stops
    accidents, not attackers.

    Args:
        text: An answer.
        tests: Python code with assertions, which runs behind the answer's.

    Returns:
        True if all of it ran to the end.
    """
    return _bounded("mistill.judging.checks:code_runs", code_in(text), tests)


def code_runs(code: str, tests: str) -> bool:
    """The same; for the worker, which starts the process.

    Args:
        code: Python code.
        tests: Code that runs behind it.

    Returns:
        True if it ended well.
    """
    # The mark comes last, and the code cannot know it: ending early passes no tests.
    mark = secrets.token_hex(16)
    program = f"{_GUARD}\n{code}\n\n{tests}\n\nprint({mark!r}, flush=True)\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-"],
                cwd=folder,
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                input=program.encode("utf-8", "replace"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_CODE_SECONDS,
                preexec_fn=_limit if os.name == "posix" else None,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.rstrip().endswith(mark.encode())


def _limit() -> None:
    """Bounds of the process that runs the code, of memory, time and files."""
    import resource

    for name, bounds in (
        ("RLIMIT_AS", (_CODE_BYTES, _CODE_BYTES)),
        ("RLIMIT_CPU", (int(_CODE_SECONDS), int(_CODE_SECONDS) + 1)),
        ("RLIMIT_FSIZE", (0, 0)),
        ("RLIMIT_CORE", (0, 0)),
    ):
        # macOS has RLIMIT_AS and refuses to set it. Anything else that is refused ends the code
        # before it begins.
        refused = (ValueError, OSError) if (name, sys.platform) == ("RLIMIT_AS", "darwin") else ()
        with contextlib.suppress(*refused):
            resource.setrlimit(getattr(resource, name), bounds)


def _bounded(function: str, *arguments: Any) -> bool:
    try:
        return bool(call_bounded(function, *arguments))
    except OutOfBoundsError:
        return False
