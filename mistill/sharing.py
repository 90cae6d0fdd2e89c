"""``mistill push``: a folder of ours to the Hub, looked at before anything is sent.

The upload is huggingface_hub's, which goes on where it was interrupted
(https://huggingface.co/docs/huggingface_hub/guides/upload).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, SettingsError, missing_extra
from mistill.folders.folder import open_folder
from mistill.folders.json_text import read_json_file
from mistill.folders.lineage import is_place, read_lineage
from mistill.folders.ownership import CARD_FILE, why_not_ours
from mistill.shown import one_line
from mistill.sources.hub import hub_answers

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
# Records that people read and that may name places of the machine that wrote them.
_RECORDS = ("*.json",)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is, or would be, sent.

    Attributes:
        repository: Where to, as owner/name.
        files: Name and bytes of every file.
        remarks: What the owner may want to mend before.
    """

    repository: str
    files: dict[str, int]
    remarks: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def push(
    folder: str | Path, repository: str, *, send: bool = False, private: bool = True
) -> Upload:
    """Send a folder to the Hub, or say what would be sent.

    Args:
        folder: A folder that mistill made.
        repository: Where to, as owner/name; made if it does not exist.
        send: Whether to send it; else nothing leaves the machine.
        private: Whether a new repository is seen by its owner alone.

    Returns:
        What was, or would be, sent.

    Raises:
        FolderError: If the folder is broken, holds what no step of mistill wrote, or names a place
            of this machine.
        SettingsError: If the repository is no owner/name.
        MissingExtraError: If huggingface_hub is not installed.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise SettingsError(f"the repository should be owner/name, not {repository!r:.80}")
    path = open_folder(folder, rewards=True).path
    _refuse_strangers(path)
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    upload = Upload(repository=repository, files=files, remarks=_remarks(path, files))
    if send:
        _send(path, repository, private)
    return upload


def _refuse_strangers(path: Path) -> None:
    """Refuse files that are not a step's, and records with paths of the machine."""
    why = why_not_ours(path, any_card=True)
    if why is not None:
        raise FolderError(f"{path} {why}; it is not sent")
    for pattern in _RECORDS:
        for file in sorted(path.glob(pattern)):
            place = _first_place(read_json_file(file))
            if place is not None:
                raise FolderError(
                    f"{file} names the place {place} of this machine; make the folder anew, or "
                    "take the place out"
                )


def _first_place(value: Any) -> str | None:
    """The first absolute path of several parts in a document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((place for item in value if (place := _first_place(item)) is not None), None)
    return value if isinstance(value, str) and is_place(value) else None


def _remarks(path: Path, files: dict[str, int]) -> tuple[str, ...]:
    remarks = []
    if CARD_FILE not in files:
        remarks.append(f"there is no {CARD_FILE}, which says what the model is")
    elif b"license:" not in (path / CARD_FILE).read_bytes().split(b"\n# ")[0]:
        remarks.append(f"{CARD_FILE} names no licence")
    if not read_lineage(path):
        remarks.append("there is no lineage.json, which says how the model was made")
    return tuple(remarks)


def _send(path: Path, repository: str, private: bool) -> None:
    if find_spec("huggingface_hub") is None:
        raise missing_extra("huggingface_hub", "compress")
    if not hub_answers():
        raise FolderError("the Hub cannot be reached; connect to the network, and repeat it")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=path, repo_type="model")
    except LocalTokenNotFoundError as error:
        raise FolderError("nobody is logged in at the Hub; log in with: hf auth login") from error
    except (HfHubHTTPError, OSError) as error:
        raise FolderError(
            f"{path} could not be sent to {repository}: {one_line(error, 300)}; the same command "
            "goes on"
        ) from error
