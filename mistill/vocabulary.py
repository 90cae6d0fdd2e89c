"""A folder's vocabulary, under the name that scripts import it by; see ``mistill.text``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.text.vocabulary import Vocabulary as Vocabulary
    from mistill.text.vocabulary import load_vocabulary as load_vocabulary

_HOMES = {
    "Vocabulary": "mistill.text.vocabulary",
    "load_vocabulary": "mistill.text.vocabulary",
}

__all__ = ["Vocabulary", "load_vocabulary"]
__getattr__ = lazy_exports(__name__, _HOMES)
