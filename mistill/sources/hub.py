"""Whether the Hub can be reached; its library finds that out by half a minute of retries."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

from mistill.errors import SettingsError

PATIENCE_SECONDS = 5.0
"""How long a name and a connection may take before the Hub counts as out of reach."""


def hub_answers(seconds: float = PATIENCE_SECONDS) -> bool:
    """Whether a connection to the Hub can be opened.

    Args:
        seconds: How long to wait for it.

    Returns:
        False in the library's offline mode too; True without looking where a proxy stands between.

    Raises:
        SettingsError: If HF_ENDPOINT is no address.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    scheme, host, port = _address(constants.ENDPOINT)
    if scheme in getproxies() or "all" in getproxies():
        return True
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except (OSError, UnicodeError):  # the second where no resolver takes the name
            return
        opened.set()

    # A resolver may take longer than any timeout of a socket.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()


def _address(endpoint: str) -> tuple[str, str, int]:
    """Scheme, name and port of the Hub."""
    try:
        address = urlsplit(endpoint)
        host, port = address.hostname, address.port
    except ValueError:
        host, port = None, None
    if host is None or address.scheme not in ("http", "https"):
        raise SettingsError(
            f"HF_ENDPOINT should be an address such as https://huggingface.co, not "
            f"{endpoint!r:.80}; set it to one, or unset it"
        )
    return address.scheme, host, port or (80 if address.scheme == "http" else 443)
