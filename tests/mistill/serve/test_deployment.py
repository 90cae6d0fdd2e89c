"""The container, the service and the page of the documentation ask for what there is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mistill.cli.app import app
from mistill.serve.settings import Limits, ServeSettings
from tests.mistill.serve.running import RunningServer

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "examples" / "serve" / "Dockerfile").read_text("utf-8")
UNIT = (ROOT / "examples" / "serve" / "mistill-serve.service").read_text("utf-8")
GUIDE = (ROOT / "docs" / "serving.md").read_text("utf-8")


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words after mistill."""
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def commands() -> list[list[str]]:
    (entry_point,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    found = [json.loads(entry_point)]
    found += [shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)]
    found += [
        shlex.split(line) for line in re.findall(r"^\$ (mistill serve .*)$", GUIDE, re.MULTILINE)
    ]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one(words: list[str]) -> None:
    assert Path(words[0]).name == "mistill"
    bound = parsed(words[1:])
    assert isinstance(bound.get("settings", ServeSettings()), ServeSettings)
    assert bound["folder"]


def test_every_option_that_the_guide_names_exists() -> None:
    arguments = app["serve"].assemble_argument_collection(parse_docstring=True)
    names = {name for argument in arguments for name in argument.names}
    others = {"--read-only", "--tmpfs", "--cap-drop", "--security-opt"}  # of docker
    others |= {"--model", "--tasks", "--model_args"}  # of lm_eval
    others |= {"--clients", "--new-tokens"}  # of mistill bench serve
    named = set(re.findall(r"--[a-z][a-z_-]*", GUIDE)) - others
    assert len(named) > 10
    assert named <= names


def test_the_guide_names_every_route(server: RunningServer) -> None:
    for _, path in server.app.routes:
        assert path.rstrip("/") in GUIDE or path == "/"


def test_the_guide_gives_the_limits_and_defaults_that_hold() -> None:
    limits, settings = Limits(), ServeSettings()
    sampling = settings.sampling({})
    for words in (
        f"over {limits.body_bytes >> 20} MiB",
        f"more than {limits.headers} headers",
        f"{limits.header_bytes >> 10} KiB of them",
        f"over {limits.target_bytes >> 10} KiB",
        f"more than {limits.header_seconds:g} seconds, bodies",
        f"take more than {limits.body_seconds:g}, readers that stop for {limits.stalled_seconds:g}",
        f"end for {limits.drain_seconds:g} seconds",
        f"silent for {limits.ping_seconds:g} seconds",
        f"{settings.queue_seconds:g} seconds in the queue",
        f"temperature {sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}",
        f"({settings.max_new_tokens})",
        f"http://{settings.host}:{settings.port}/v1",
    ):
        assert words in " ".join(GUIDE.split()), words


def test_the_container_is_the_laptop_install_of_nobody() -> None:
    assert "[serve]" in DOCKERFILE
    assert "compress" not in DOCKERFILE
    assert re.search(r"^USER 65534:65534$", DOCKERFILE, re.MULTILINE)
    assert "MISTILL_API_KEY=" not in DOCKERFILE
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"):
        assert line in UNIT.splitlines()
