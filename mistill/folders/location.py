"""Files in a folder that may lie on any file system that fsspec knows.

Targets are written by machines that may share nothing but a bucket. What they need of it is
little: to list, to read a part of a file, and to write a file that appears whole or not at all.
A path of this machine is read and written directly; ``s3://bucket/folder`` and the like go through
fsspec, whose driver for a kind of storage is a package of its own.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistill.errors import FolderError, MissingExtraError, missing_extra

PARTIAL = ".partial"

# Object stores: a file appears when its upload is complete, and renaming would upload it again.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2", "memory"}


@dataclass(frozen=True)
class Location:
    """A folder on any file system.

    ``location_of`` is the way to get one.

    Attributes:
        name: As the user wrote it.
        root: Its path within the file system.
        remote: The fsspec file system; None for a path of this machine.
    """

    name: str
    root: str
    remote: Any = None

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path | str:
        """What to hand to a user: a path on this machine, or else the address."""
        return Path(self.root) if self.remote is None else self.name

    def names(self) -> list[str]:
        """Names of all files and folders directly inside, sorted; none if there is no folder."""
        if self.remote is None:
            folder = Path(self.root)
            return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
        self.remote.invalidate_cache()
        try:
            paths = self.remote.ls(self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in paths)

    def exists(self, file: str) -> bool:
        """Whether there is a file of a name.

        Args:
            file: Name of the file.

        Returns:
            True for a file.
        """
        if self.remote is None:
            return (Path(self.root) / file).is_file()
        self.remote.invalidate_cache()
        return bool(self.remote.isfile(self._at(file)))

    def size(self, file: str) -> int:
        """Bytes of a file.

        Args:
            file: Name of the file.

        Returns:
            Bytes.

        Raises:
            FolderError: If it is missing.
        """
        try:
            if self.remote is None:
                return (Path(self.root) / file).stat().st_size
            return int(self.remote.size(self._at(file)))
        except FileNotFoundError as error:
            raise FolderError(f"{file} is missing from {self}") from error

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a file or a part of it.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            stop: Byte after the last; None for the end of the file.

        Returns:
            The bytes; fewer where the file ends before.

        Raises:
            FolderError: If it is missing.
        """
        try:
            if self.remote is None:
                with Path(self.root, file).open("rb") as opened:
                    opened.seek(start)
                    return opened.read() if stop is None else opened.read(stop - start)
            return bytes(self.remote.cat_file(self._at(file), start=start, end=stop))
        except FileNotFoundError as error:
            raise FolderError(f"{file} is missing from {self}") from error

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read parts of files, all at once where the file system can.

        Args:
            parts: File, first byte, and byte after the last.

        Returns:
            The bytes of each part.

        Raises:
            FolderError: If a file is missing.
        """
        if self.remote is None:
            return [self.read(*part) for part in parts]
        names, starts, stops = (list(column) for column in zip(*parts, strict=True))
        try:
            contents = self.remote.cat_ranges(
                [self._at(str(name)) for name in names], starts, stops
            )
        except FileNotFoundError as error:
            raise FolderError(f"a file is missing from {self}: {error}") from error
        for name, part in zip(names, contents, strict=True):
            if isinstance(part, Exception):
                raise FolderError(f"{name} of {self} cannot be read: {part}") from part
        return [bytes(part) for part in contents]

    def write(self, file: str, content: bytes) -> None:
        """Write a file that appears whole or not at all.

        Args:
            file: Its name; replaced if it exists.
            content: Content of the file.
        """
        partial = f".{file}.{uuid.uuid4().hex[:12]}{PARTIAL}"
        if self.remote is None:
            folder = Path(self.root)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / partial).open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            (folder / partial).replace(folder / file)
            return
        protocols = self.remote.protocol
        if _OBJECT_STORES.intersection([protocols] if isinstance(protocols, str) else protocols):
            self.remote.pipe_file(self._at(file), content)
            return
        self.remote.makedirs(self.root, exist_ok=True)
        self.remote.pipe_file(self._at(partial), content)
        self.remote.mv(self._at(partial), self._at(file))

    def remove(self, file: str) -> None:
        """Remove a file, if it is there.

        Args:
            file: Name of the file.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.remote is None:
                (Path(self.root) / file).unlink()
            else:
                self.remote.rm_file(self._at(file))

    def remove_partials(self, file: str) -> None:
        """Remove what killed processes left of a file that they were writing.

        Args:
            file: The name that it would have got.
        """
        for name in self.names():
            if name.startswith(f".{file}.") and name.endswith(PARTIAL):
                self.remove(name)

    def _at(self, file: str) -> str:
        return f"{self.root}/{file}"


def is_remote(path: str | Path) -> bool:
    """Whether a name is an address and not a path of this machine.

    Args:
        path: A path or an address.

    Returns:
        True for ``s3://bucket/folder`` and the like.
    """
    return isinstance(path, str) and "://" in path


def location_of(path: str | Path) -> Location:
    """Find the file system of a folder, which need not exist.

    Args:
        path: A path of this machine, or an address such as ``s3://bucket/folder``.

    Returns:
        The location.

    Raises:
        FolderError: If the address is of a kind that fsspec does not know.
        MissingExtraError: If the package for that kind of storage is not installed.
    """
    if not is_remote(path):
        return Location(str(path), str(Path(path).expanduser().absolute()))
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise missing_extra("fsspec", "compress") from error
    address = str(path).rstrip("/")
    try:
        remote, root = url_to_fs(address)
    except ImportError as error:
        raise MissingExtraError(f"{address} cannot be reached: {error}") from error
    except ValueError as error:
        raise FolderError(
            f"fsspec does not know the protocol of the address {address}: {error}"
        ) from error
    if "file" in ([remote.protocol] if isinstance(remote.protocol, str) else remote.protocol):
        return Location(address, root)
    return Location(address, root.rstrip("/"), remote)
