"""What a model's checkpoint is: the content of the files that loading reads, or the commit that a hub name stands for.

A folder of a model holds more than the model: a README, the state of a training, what a download left. None of it
changes a result, so none of it counts.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # the first of these that is there
# A model may come with its own defaults for sampling, and with an adapter that is put onto its weights.
BESIDE_WEIGHTS = ("generation_config.json", "adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.*.json",  # for other versions of the library
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "tekken.json",
    "*.model",  # of sentencepiece
    "*.spm",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

State = tuple[int, ...]


def _state(path: Path) -> State:
    """What tells, without reading, that a file is no longer the same."""
    known = path.stat()
    return known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, state: State) -> str:
    """The hash of a file in this state: weights are read once, however often runs are planned."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=256)
def _json(path: Path, state: State) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError with the path."""
    try:
        value = _json(path, _state(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no JSON object")
    return value


def _weights(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights: one, or an index and its shards. Raises ValueError if one is missing."""
    named = _read(folder / CONFIG).get("transformers_weights")
    first = next((folder / name for name in ((named,) if named else WEIGHTS) if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder}: has no weights; needed: {named or ' or '.join(WEIGHTS)}")
    if not first.name.endswith(".index.json"):
        return [first]
    shards = _read(first).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{first}: names no shards")
    parts = [folder / name for name in sorted(set(shards.values()))]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{folder}: lacks weights that its index names: {', '.join(missing)}")
    return [first, *parts]


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """The configuration, which says what kind of tokenizer it is, and whatever kinds of tokenizers read."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: has no {CONFIG}, so it is no saved checkpoint")
    yield folder / CONFIG
    yield folder / "generation_config.json"  # which may name the end of text where the tokenizer names none
    for pattern in TOKENIZER:
        yield from folder.glob(pattern)


def _identity(folder: Path, files: set[Path]) -> str:
    known = {path.relative_to(folder).as_posix(): _hash(path, _state(path)) for path in files if path.is_file()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def identity(folder: Path) -> str:
    """Hash of all that loading a model and its tokenizer reads of a folder, and of nothing else.

    A file is read once in a process and again only when it has changed. Raises ValueError for no saved checkpoint.
    """
    beside = {folder / name for name in BESIDE_WEIGHTS}
    return _identity(folder, {*_tokenizer_files(folder), *_weights(folder)} | beside)


def tokenizer_identity(folder: Path) -> str:
    """Hash of all that loading the tokenizer alone reads of a folder. Raises ValueError for no saved checkpoint."""
    return _identity(folder, set(_tokenizer_files(folder)))


def unchanged(folder: Path, content: str, identify: Callable[[Path], str] = identity) -> None:
    """Raise ValueError if a folder is no longer the checkpoint that `identify` found to be `content`."""
    if identify(folder) != content:
        raise ValueError(
            f"model={str(folder)!r}: its files have changed since the runs that need it were planned; "
            "execute the notebook again from its parameters"
        )


@functools.cache
def _asked(name: str) -> str:
    """What the hub says; asked once, so that all runs of a process are of one commit."""
    return HfApi().model_info(name, timeout=20).sha


def hub_revision(name: str) -> str:
    """The commit that a model's name stands for now: as the hub says or, where it does not answer, the local cache.

    Raises ValueError with the name if neither knows it.
    """
    try:
        return _asked(name)
    except Exception as error:  # of whatever kind: offline, no such name, no right to it, a proxy in between
        said = str(error).strip().partition("\n")[0] or type(error).__name__
    try:
        kept = try_to_load_from_cache(name, CONFIG)
    except ValueError:  # no name that could be on the hub
        kept = None
    if not isinstance(kept, str):
        raise ValueError(
            f"model={name!r}: neither a folder nor known to the hub or to its local cache; allowed: 'scratch', a "
            f"folder with a saved checkpoint or the name of a model on the hub. The hub said: {said}"
        )
    return Path(kept).parent.name
