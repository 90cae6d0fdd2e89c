"""What ``mistill serve`` prints."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistill.serve.http.server import Server


def print_address(server: Server) -> None:
    """Print where the server is, and log a line for each request from now on.

    Args:
        server: The server, which runs.
    """
    if server.has_page:
        print(f"the page: {server.address}/", flush=True)
    print(f"for clients: base_url {server.address}/v1, model {server.model}", flush=True)
    logging.getLogger("mistill.serve").setLevel(logging.INFO)
