"""What an ONNX folder says about itself: the checksum of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mistill.folders.folder import MANIFEST_FILE


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest itself.

    Args:
        folder: The folder.

    Returns:
        File name to ``bytes`` and ``sha256``.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST_FILE:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.relative_to(folder).as_posix()] = {
                "bytes": file.stat().st_size,
                "sha256": digest,
            }
    return found
