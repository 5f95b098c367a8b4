"""A lens folder, read and checked: about.json and its tables; those written line by line are turned into parquet."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

# Columns that a table must have; of these the ones that must hold whole numbers and text, all others are numbers.
COLUMNS = {
    "alignment": "step component g se g_opt se_opt n weight cosine cosine_opt logp_targets moved",
    "sequences": "step example full positive negative",
    "tokens": "step example side position token logp w a a_opt strength third",
    "groups": "step part group g cosine",
    "likelihood": "step kind logp se per_token n",
    "texts": "example side prompt response",
    "steps": "step g d_step norm cosine loss",
}
KEYS = {
    "alignment": ["step", "component"],
    "sequences": ["step", "example"],
    "tokens": ["step", "example", "side", "position"],
    "groups": ["step", "part", "group"],
    "likelihood": ["step", "kind"],
    "texts": ["example", "side"],
    "steps": ["step"],
}
WHOLE = {"step", "example", "side", "position"}
TEXT = {"component", "part", "group", "kind", "token", "prompt", "response"}


class ReportError(ValueError):
    """A lens folder that cannot be reported on; names the file and what of it is missing or wrong."""


class Missing(Exception):
    """A part of the report that a folder does not have the numbers for; says what is missing."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Method(_Part):
    """What was trained or measured."""

    name: str | None = None
    title: str | None = None
    settings: dict[str, Any] | None = None
    loss: str | None = None


class Targets(_Part):
    """The responses whose likelihood d raises."""

    what: str | None = None
    count: int | None = None
    sentence: str | None = None


class Checkpoint(_Part):
    """A folder with a model that was measured."""

    step: int | None = None
    name: str | None = None
    sha256: str | None = None


class Model(_Part):
    """The shape of the model; moving: how many of its parameters require a gradient."""

    parameters: int | None = None
    moving: int | None = None
    dtype: str | None = None
    adapter: str | None = None


class Cut(_Part):
    """How many texts of each sort were shortened."""

    prompts: int | None = None
    chosen: int | None = None
    rejected: int | None = None


class Data(_Part):
    """What was read, left out (reason -> count) and cut; limits in tokens."""

    name: str | None = None
    records: int | None = None
    used: int | None = None
    left_out: dict[str, int] = {}
    cut: Cut = Cut()
    max_prompt: int | None = None
    max_response: int | None = None

    @field_validator("left_out", "cut", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or {}


class Accuracy(_Part):
    """How scores were computed and checked."""

    method: str | None = None
    sentence: str | None = None


class Cost(_Part):
    """What the measurement took; share: of the training time."""

    seconds: float | None = None
    share: float | None = None
    rows: int | None = None
    memory: str | None = None


class About(_Part):
    """about.json: every key must be there; where it does not apply it is null or empty."""

    kind: Literal["after", "live"]
    title: str
    made: str | None
    command: str | None
    method: Method
    targets: Targets
    models: list[Checkpoint]
    reference: str | None
    model: Model
    data: Data
    accuracy: Accuracy
    cost: Cost
    versions: dict[str, str]
    hardware: str | None
    notes: list[str]

    @field_validator("method", "targets", "model", "data", "accuracy", "cost", "versions", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return value or {}

    @field_validator("models", "notes", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or []


@dataclass(frozen=True)
class Folder:
    """A lens folder: what is said about it, its tables by name, and what had to be noted while reading them."""

    about: About
    tables: dict[str, pd.DataFrame]
    notes: list[str] = field(default_factory=list)

    def table(self, name: str) -> pd.DataFrame:
        """A table. Raises Missing if it is not in the folder, or empty."""
        if name not in self.tables:
            raise Missing(f"the table {name} is not in this folder")
        if self.tables[name].empty:
            raise Missing(f"the table {name} has no rows")
        return self.tables[name]

    def component(self, name: str) -> pd.DataFrame:
        """The rows of `alignment` for a component, in the order of steps. Raises Missing if there are none."""
        table = self.table("alignment")
        rows = table[table["component"] == name].reset_index(drop=True)
        if rows.empty:
            raise Missing(f"the table alignment has no component {name!r}")
        return rows

    def steps(self) -> list[int]:
        """The steps at which G was measured, in order; empty without the table `alignment`."""
        return sorted(self.tables["alignment"]["step"].unique().tolist()) if "alignment" in self.tables else []

    @property
    def noun(self) -> str:
        """What a measured step is called."""
        return "checkpoint" if self.about.kind == "after" else "measurement"


def read(folder: Path) -> Folder:
    """Read and check a lens folder; tables that are there as JSON lines are written beside it as parquet.

    Numbers that are not finite are NaN in what is returned. Raises ReportError that names the file, and the key,
    column or row in it, that is missing or of another kind than it must be.
    """
    about = _about(folder / "about.json")
    tables, notes = {}, []
    for name in COLUMNS:
        lines, parquet = folder / f"{name}.jsonl", folder / f"{name}.parquet"
        if lines.exists():
            table, noted = _from_lines(lines)
            notes += noted
            in_one_move(parquet, table.to_parquet)
        elif parquet.exists():
            table = _checked(_parquet(parquet), parquet.name)
            if twice := int(table.duplicated(KEYS[name]).sum()):
                raise ReportError(
                    f"{parquet.name}: {twice} row(s) have the same {', '.join(KEYS[name])} as another row"
                )
        else:
            continue
        numbers = table.select_dtypes("number").columns
        finite = table.assign(**{c: table[c].where(np.isfinite(table[c])) for c in numbers if c not in WHOLE})
        order = [key for key in ("step", "example", "side", "position") if key in table]
        tables[name] = finite.sort_values(order, kind="stable", ignore_index=True)
    return Folder(about, tables, notes)


def in_one_move(path: Path, make: Callable[[Path], Any]) -> None:
    """Let `make` write a file beside `path` and move it there: nobody ever sees half of it. Raises ReportError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make(temporary)
        os.replace(temporary, path)
    except (ValueError, TypeError) as error:
        raise ReportError(f"{path.name} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _about(path: Path) -> About:
    if not path.is_file():
        raise ReportError(f"{path.name} is not in the folder {path.parent.name!r}: it is no lens folder")
    try:
        return About.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}" for e in error.errors())
        raise ReportError(f"{path.name} is not as a lens writes it: {wrong}") from error
    except ValueError as error:
        raise ReportError(f"{path.name} is not JSON: {error}") from error


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ReportError(f"{path.name} cannot be read: {error}") from error


def _from_lines(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table in a file of JSON lines, and notes on what of it is not shown.

    Training that was killed may leave a torn last line: it is left out. Training that went on from a checkpoint writes
    some steps again: the later rows count.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path.name} is not UTF-8: {error}") from error
    lines, notes, rows = text.split("\n"), [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                notes.append(f"The last line of {path.name} is torn (the writer was stopped) and left out.")
                continue
            raise ReportError(f"{path.name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ReportError(f"{path.name}, line {number} is no JSON object")
        rows.append({key: _whole_text(value) for key, value in row.items()})
    columns = None if rows else COLUMNS[path.stem].split()
    table = _checked(pd.DataFrame(rows, columns=columns), path.name)
    later = ~table.duplicated(KEYS[path.stem], keep="last")
    if again := int((~later).sum()):
        notes.append(
            f"{again} row(s) of {path.name} were written again later (training went on from a checkpoint): "
            "the later ones are shown."
        )
    return table[later].reset_index(drop=True), notes


def _whole_text(value: Any) -> Any:
    """A value whose text can be encoded: half a surrogate pair becomes the sign for what is no character."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with its columns as whole numbers, numbers and text. Raises ReportError that names a column."""
    wanted = COLUMNS[Path(name).stem].split()
    if lacking := [column for column in wanted if column not in table.columns]:
        have = ", ".join(map(str, table.columns)) or "none"
        raise ReportError(f"{name} has no column {', '.join(lacking)}; there are: {have}")
    made = {}
    for column in wanted:
        values = table[column].astype(object) if table[column].dtype == "category" else table[column]
        if column in TEXT:
            made[column] = values.astype(object).where(values.notna(), "").map(str).astype(object)
            continue
        try:
            numbers = pd.to_numeric(values).astype(float)
        except (ValueError, TypeError) as error:
            raise ReportError(f"{name}, column {column}: must hold numbers: {error}") from error
        if column in WHOLE:
            broken = ~np.isfinite(numbers) | (numbers % 1 != 0)
            if broken.any():
                given = values[broken].iloc[0]
                raise ReportError(f"{name}, column {column}: must hold whole numbers, given {given}")
            numbers = numbers.astype(np.int64)
        made[column] = numbers
    return table.assign(**made)
