"""Whether the Hub can be reached; its library finds that out by half a minute of retries."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE_SECONDS = 5.0
"""How long a name and a connection may take before the Hub counts as out of reach."""


def hub_answers(seconds: float = PATIENCE_SECONDS) -> bool:
    """Whether a connection to the Hub can be opened.

    Args:
        seconds: How long to wait for it.

    Returns:
        False in the library's offline mode too; True without looking where a proxy stands between.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies() or "all" in getproxies():
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=seconds).close()
        except OSError:
            return
        opened.set()

    # A resolver may take longer than any timeout of a socket.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()
