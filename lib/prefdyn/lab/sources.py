"""Where records come from: a file, a folder of files or the hub; JSON lines, arrays and parquet; read once, hashed.

Each record comes with its place. What cannot be read is an `Unusable` in its place, so that nothing is lost unsaid.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from pyarrow import parquet

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_DAMAGED = "the archive is damaged"


class DataError(ValueError):
    """A dataset that cannot be read or split as asked; the message says what was given and what is allowed."""


class Unusable(ValueError):
    """Why a record cannot be used: a short reason to be counted by, and what is particular to the record."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


Entry = tuple[str, dict | Unusable]  # a record with its place

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def brief(value: object) -> str:
    """A value for a message: short and printable, whatever it is."""
    return _REPR.repr(value)


def is_data_file(path: Path) -> bool:
    """Whether a file of this name is one that `read` reads."""
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def hub_name(source: str) -> tuple[str, str] | None:
    """(name, split) if `source` can only be a dataset on the hub, else None; the split is "" where none is given."""
    known = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", source)
    if known is None or is_data_file(Path(known[1])) or os.path.exists(source):
        return None
    return known[1], known[2] or ""


def _files(source: str) -> list[Path]:
    """The data files that a path stands for: itself, or those in a folder by name. Raises DataError or OSError."""
    path, allowed = Path(source), f"allowed: {', '.join(ENDINGS)}, a folder of these, or 'org/name' on the hub"
    if path.is_dir():
        if files := sorted(file for file in path.iterdir() if is_data_file(file) and file.is_file()):
            return files
        raise DataError(f"dataset: given {source!r}, a folder without a data file; {allowed}")
    if not path.exists():
        raise DataError(f"dataset: given {source!r}, no such file; a path is relative to {Path.cwd().name!r}")
    if not is_data_file(path):
        raise DataError(f"dataset: given {source!r}, not a file of a kind that can be read; {allowed}")
    return [path]


def passed_over(source: str) -> tuple[str, ...]:
    """Files in a folder of data that are not read, and folders in it with a slash; hidden ones do not count."""
    path = Path(source)
    if not path.is_dir():
        return ()
    others = [file for file in path.iterdir() if not file.name.startswith(".") and not is_data_file(file)]
    return tuple(sorted(f"{file.name}/" if file.is_dir() else file.name for file in others))


def _load(source: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The fingerprint of a local source, and its files (name, bytes): what is parsed is what was hashed."""
    try:
        files = [(file.name, file.read_bytes()) for file in _files(source)]
    except OSError as error:
        raise DataError(f"dataset: given {source!r}, which cannot be opened: {error}") from error
    digest = hashlib.sha256()
    for name, raw in files:
        if os.path.isdir(source):
            digest.update(os.fsencode(name) + b"\0" + len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest(), files


def fingerprint(source: str) -> str:
    """What tells the present content: a hash of bytes (of a folder, with the names), or "hub:commit[:split]".

    Without a network the commit of a dataset is that of the local cache. Raises DataError.
    """
    if (hub := hub_name(source)) is None:
        return _load(source)[0]
    name, split = hub
    try:
        commit = huggingface_hub.HfApi().dataset_info(name).sha
    except (HfHubHTTPError, HFValidationError) as error:  # the hub has answered, or never could
        raise DataError(f"dataset: given {source!r}, no such file, and the hub does not give it: {error}") from error
    except Exception as error:  # whatever the layers below raise where there is no network
        noted = Path(huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"))
        if not (noted / "refs/main").is_file():
            raise DataError(
                f"dataset: given {source!r}, no such file; the hub does not say its commit ({error}), "
                "and no dataset of this name is in the local cache"
            ) from error
        commit = (noted / "refs/main").read_text().strip()
    return ":".join(["hub", commit, *([split] if split else [])])


def _from_hub(source: str, content: str) -> Iterator[Entry]:
    """The rows of exactly the commit and split that `content` names."""
    name, split = hub_name(source)
    kind, _, rest = content.partition(":")
    commit, _, noted = rest.partition(":")
    if kind != "hub" or noted != split:
        raise DataError(f"dataset: given {source!r}: it has changed since the work was planned; start again")
    try:
        import datasets  # an extra, needed for the hub alone
    except ImportError as error:
        raise DataError(
            f"dataset: given {source!r}, no such file; to read it from the hub: pip install datasets"
        ) from error
    split = split or "train"
    try:
        rows = list(datasets.load_dataset(name, split=split, revision=commit))
    except Exception as error:  # what it raises is as varied as what is on the hub
        try:
            there = datasets.get_dataset_split_names(name, revision=commit)
        except Exception:  # the splits are not known: the first error has to do
            there = [split]
        if split not in there:
            raise DataError(
                f"dataset: given {source!r}, which has no split {split!r}; allowed: "
                + ", ".join(f"'{name}:{known}'" for known in there)
            ) from error
        raise DataError(f"dataset: given {source!r}, which the hub does not give: {error}") from error
    return ((f"record {number}", row) for number, row in enumerate(rows, 1))


def _unpacked(raw: bytes) -> tuple[bytes, str]:
    """Everything that can be unpacked of a gzip archive, and what is wrong with it ("" if nothing is)."""
    found = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as archive:
            while piece := archive.read1():
                found += piece
    except (OSError, EOFError, zlib.error) as error:
        return bytes(found), str(error)
    return bytes(found), ""


def _object(items: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises Unusable if a key is there twice: one of the values would be lost."""
    if len(known := dict(items)) < len(items):
        twice = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise Unusable("a JSON object has a key twice", brief(twice))
    return known


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _value(text: str, start: int = 0) -> tuple[object, int]:
    """The JSON value at `start`, or why it cannot be used, and its end. Raises Unusable where there is no end."""
    try:
        try:
            return _JSON.raw_decode(text, start)
        except Unusable as error:
            return error, json.JSONDecoder().raw_decode(text, start)[1]
    except RecursionError:
        raise Unusable("nested too deeply") from None
    except ValueError as error:
        raise Unusable("not valid JSON", str(error)) from None


def _only(text: str) -> object:
    """The one JSON value that a text is, or why it cannot be used."""
    try:
        value, end = _value(text)
    except Unusable as error:
        return error
    return value if end == len(text) else Unusable("not valid JSON", f"more after the value: character {end + 1}")


def _lines(raw: bytes, damage: str) -> Iterator[tuple[str, object]]:
    """The values of JSON lines. In a damaged archive the last, broken line stands for all that is lost."""
    lines = raw.split(b"\n")  # and nothing else: a text may hold other ends of lines
    for number, line in enumerate(lines[:-1] if damage else lines, 1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            yield f"line {number}", Unusable("text that is not valid Unicode", str(error))
        else:
            if text:
                yield f"line {number}", _only(text)
    if damage:
        yield f"after line {len(lines) - 1}", Unusable(_DAMAGED, damage)


def _elements(text: str, damage: str) -> Iterator[tuple[str, object]]:
    """The elements of a JSON array; where it breaks off, one stands for all that is lost."""
    blank = re.compile(r"[ \t\r\n]*")
    at, number = blank.match(text, text.index("[") + 1).end(), 0
    try:
        while text[at : at + 1] != "]":
            value, at = _value(text, at)
            number += 1
            yield f"record {number}", value
            at = blank.match(text, at).end()
            if text[at : at + 1] == ",":
                at = blank.match(text, at + 1).end()
            elif text[at : at + 1] != "]":
                raise Unusable("not valid JSON", f"no ',' or ']' at character {at + 1}")
        if not damage and text[at + 1 :].strip():
            raise Unusable("not valid JSON", "more after the end of the array")
    except Unusable as error:
        # without the end of an element there is no telling where the next one starts
        broken = Unusable(error.reason, f"{error.detail}; nothing from here on can be read".removeprefix("; "))
        yield f"after record {number}", Unusable(_DAMAGED, damage) if damage else broken
    else:
        if damage:
            yield f"after record {number}", Unusable(_DAMAGED, damage)


def _json(raw: bytes, damage: str) -> Iterator[tuple[str, object]]:
    """The records of a .json file: an array, one object, or lines of JSON."""
    # bytes that are no characters become halves of surrogate pairs, which no text may hold (see `_finished`)
    text = raw.decode("utf-8-sig", "surrogateescape").strip()
    if text.startswith("["):
        return _elements(text, damage)
    whole = _only(text)
    return iter([("record 1", whole)]) if isinstance(whole, dict) and not damage else _lines(raw, damage)


def _rows(raw: bytes, name: str) -> Iterator[tuple[str, object]]:
    """The rows of a parquet file as plain Python. Raises DataError if it is damaged."""
    number = 0
    try:
        table = parquet.ParquetFile(io.BytesIO(raw), page_checksum_verification=True)
        if twice := [column for column, n in Counter(table.schema_arrow.names).items() if n > 1]:
            raise DataError(f"dataset: {name!r} has the column {twice[0]!r} twice")
        for batch in table.iter_batches():
            for row in _plain(batch):
                number += 1
                yield f"record {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"dataset: {name!r} cannot be read after record {number}: {error}") from error


def _plain(batch: pyarrow.RecordBatch) -> list[dict | Unusable]:
    """Rows as plain Python, all at once unless one of them holds bytes that are no characters."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Unusable("text that is not valid Unicode", str(error))]
        return [row for at in range(batch.num_rows) for row in _plain(batch.slice(at, 1))]


def _entries(name: str, raw: bytes, several: bool) -> Iterator[Entry]:
    """The records of one file, and of one of several with its name."""
    kind = name.lower()
    if kind.endswith(".parquet"):
        found = _rows(raw, name)
    else:
        raw, damage = _unpacked(raw) if kind.endswith(".gz") else (raw, "")
        found = (_lines if kind.removesuffix(".gz").endswith(".jsonl") else _json)(raw, damage)
    for where, value in found:
        record = value if isinstance(value, dict | Unusable) else Unusable("not an object", brief(value))
        yield f"{name} {where}" if several else where, record


def entries(source: str, content: str | None = None) -> Iterator[Entry]:
    """The records of a source with their places: a file, a folder of files or the hub.

    content: the `fingerprint` noted when the work was planned; from the hub, exactly that commit is read. Raises
    DataError if the source cannot be read or is no longer what `content` says.
    """
    if hub_name(source) is not None:
        return _from_hub(source, content or fingerprint(source))
    digest, files = _load(source)
    if content not in (None, digest):
        raise DataError(f"dataset: given {source!r}: the file has changed since the work was planned; start again")
    several = os.path.isdir(source)
    return itertools.chain.from_iterable(_entries(name, raw, several) for name, raw in files)
