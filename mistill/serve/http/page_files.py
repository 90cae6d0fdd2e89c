"""The files of the page to chat in, read once from the package.

Only these are served, by their exact addresses, so that no address leads anywhere else.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


class PageFile(NamedTuple):
    """A file of the page.

    Attributes:
        content: Its bytes.
        content_type: Its type.
    """

    content: bytes
    content_type: str


def page_files() -> dict[str, PageFile]:
    """The files of the page by their addresses.

    Returns:
        ``/`` is the page itself; the others lie below ``/static/``.
    """
    folder = files("mistill.serve").joinpath("page")
    if not folder.is_dir():
        return {}
    served = {}
    for file in folder.iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            address = "/" if file.name == "index.html" else f"/static/{file.name}"
            served[address] = PageFile(file.read_bytes(), kind)
    return served
