"""API keys: read from a file that only its owner can read, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from mistill.errors import FolderError, SettingsError
from mistill.folders.json_text import small_file
from mistill.serve.settings import ServeSettings
from mistill.settings import require

VARIABLE = "MISTILL_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]{16,512}")


class Keys:
    """The keys that open the server; without any, it is open.

    Only digests are held, so that no message and no dump of an object shows a key.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Take the keys.

        Args:
            keys: Each of 16 to 512 visible ASCII characters.

        Raises:
            SettingsError: If one has another form.
        """
        for key in keys:
            require(
                _KEY.fullmatch(key) is not None,
                "an API key must have 16 to 512 visible ASCII characters and no spaces; make one "
                "with: openssl rand -hex 24",
            )
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, offered: Sequence[bytes]) -> str | None:
        """Whose request it is.

        Args:
            offered: The keys that a request brings.

        Returns:
            A digest that stands for the key; empty where no key is needed, None where none of
            them fits.
        """
        if not self._digests:
            return ""
        owner = None
        for key in offered:
            digest = hashlib.sha256(key).digest()
            for known in self._digests:  # all of them, so that the time tells nothing
                if hmac.compare_digest(digest, known):
                    owner = digest.hex()
        return owner


def read_keys(settings: ServeSettings) -> Keys:
    """The keys of a server, from its file and the environment.

    Args:
        settings: Says which file, and on which address is served.

    Returns:
        The keys.

    Raises:
        SettingsError: If the address is one of a network and there is no key, or a key is weak.
        FolderError: If the file cannot be read, or others can read it.
    """
    keys = []
    if settings.api_key_file is not None:
        keys = _keys_of(settings.api_key_file.expanduser())
    if VARIABLE in os.environ:
        keys.append(os.environ[VARIABLE])
    if not keys and not settings.is_local and not settings.no_key:
        raise SettingsError(
            f"{settings.host} can be reached from other machines, so that the server needs an API "
            f"key: give --api-key-file FILE or set {VARIABLE}, or give --no-key to serve everybody"
        )
    require(
        not (keys and settings.no_key),
        f"give either --no-key or a key (--api-key-file, {VARIABLE}), not both",
    )
    return Keys(keys)


def _keys_of(file: Path) -> list[str]:
    content = small_file(file)
    if sys.platform != "win32":
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise FolderError(
                f"{file} holds API keys and can be read by others (mode {mode:03o}); run: chmod "
                f"600 {file}"
            )
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise FolderError(f"{file} should hold one API key a line, and is no text") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise FolderError(f"{file} holds no API key; write one a line")
    return keys
