"""What ``mistill serve`` is given and prints."""

from __future__ import annotations

import logging
from dataclasses import dataclass

# cyclopts looks here for the types of inherited fields too.
from pathlib import Path  # noqa: F401
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mistill.engine.language_model import Provider  # noqa: F401
from mistill.serve.settings import ServeSettings

if TYPE_CHECKING:
    from mistill.serve.http.server import Server


@dataclass(frozen=True, kw_only=True)
class ServeCommandSettings(ServeSettings):
    """The settings of a server on a command line, where nobody says ``--no-no-key``."""

    no_key: Annotated[bool, Parameter(negative=())] = False


def print_address(server: Server) -> None:
    """Print where the server is, and log a line for each request from now on.

    Args:
        server: The server, which runs.
    """
    if server.has_page:
        print(f"the page: {server.address}/", flush=True)
    print(f"for clients: base_url {server.address}/v1, model {server.model}", flush=True)
    logging.getLogger("mistill.serve").setLevel(logging.INFO)
