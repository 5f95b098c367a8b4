"""Computing studies: what is to be done is planned here, and done by Snakemake, a job for each run (study.smk).

`prepare` plans a study and writes it down; Snakemake calls `compute` for each run and `write_row` for each cell, in
processes of their own.
"""

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel

from ..lab.fingerprint import code_fingerprint
from ..lab.runs import RunStore, project_root, versions
from ..methods import registry
from . import studies
from .studies import Study, StudyError, kept_rows

BUILT_IN = ("local", "dryrun", "touch")  # Snakemake's own executors; all others are packages


def keep(study: Study, number: int, new: Mapping[str, str]) -> None:
    """Write the row of cell `number` into the table, which is replaced in one move.

    Rows that lack a column, of a rule that is new, are left out: filled up they would look finished.
    """
    path = studies.folder() / f"{study.name}.csv"
    with FileLock(_work(study.name).with_suffix(".lock")):
        whole = {i: row for i, row in kept_rows(study).items() if row.keys() >= {*study.columns}}
        rows = whole | {number: new}
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, study.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[i] for i in sorted(rows))
        beside = path.with_suffix(".csv.new")
        beside.write_text(text.getvalue(), encoding="utf-8")
        os.replace(beside, path)


def _work(name: str) -> Path:
    """What Snakemake needs for a study: this file, what was planned; beside it its marks in NAME/, and locks."""
    path = project_root() / ".snakemake" / "studies" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Inside, no other process plans or computes the study. Raises StudyError if one does."""
    try:
        with FileLock(_work(name).with_suffix(".running"), timeout=0):
            yield
    except Timeout as error:
        raise StudyError(f"{name}: another process is computing it; wait for that one, or stop it") from error


@dataclass(frozen=True)
class Plan:
    """What is to be done: rows to write, runs that they rest on, and how many of these the store has."""

    path: Path
    rows: int
    runs: int
    there: int


def prepare(study: Study, store: RunStore) -> Plan:
    """Plan the cells whose rows are not there, or not of today's settings and code, and write it down for Snakemake."""
    path, root, kept = _work(study.name), project_root(), kept_rows(study)
    known = _known(study, path) or _all_runs(study, store)
    cells = known["cells"]
    changed = studies.changes(study, kept, lambda number: cells[number]["code"])
    rows = {str(number): cells[number]["runs"] for number in range(len(cells)) if changed.get(number) != ""}
    inside = store.root.resolve().is_relative_to(root.resolve())
    place = {
        "study": study.name,
        "store": os.path.relpath(store.root, root) if inside else str(store.root.resolve()),
        "marks": os.path.relpath(path.with_suffix(""), root),
        "rows": rows,
    }
    path.write_text(json.dumps(known | place), encoding="utf-8")
    for mark in path.with_suffix("").glob("*"):  # the table alone says which rows are there
        mark.unlink()
    asked = {key for keys in rows.values() for key in keys}
    return Plan(path, len(rows), len(asked), sum((store.root / key).is_dir() for key in asked))


def _identity(study: Study) -> str:
    """What all keys of a study follow from: its cells and rules, the library's code and the versions of packages."""
    library = code_fingerprint(__name__, *map(registry.module_of, study.methods))
    rules = [rule.name for rule in study.rules]
    settings = [studies.settings(study, cell) for cell in study.cells]
    return studies.digest(json.dumps([library, versions(), rules, study.validated, settings]))


def _known(study: Study, path: Path) -> dict[str, Any] | None:
    """The runs of all cells as they were planned before, if they would be planned alike now."""
    with contextlib.suppress(OSError, ValueError):
        planned = json.loads(path.read_text(encoding="utf-8"))
        if planned.get("identity") == _identity(study):
            return planned
    return None


def _all_runs(study: Study, store: RunStore) -> dict[str, Any]:
    """The runs of all cells, for the file of a plan.

    Returns identity; cells, in order, each with its settings, its code and the keys of its runs; runs by their keys,
    parents first, each with its type, its spec and the keys of its parents.
    """
    key, cells, found = studies.memo(store.key), {}, {}
    for number in sorted(range(len(study.cells)), key=lambda i: study.cells[i].seed):  # a seed's data are made once
        own = studies.runs(key, studies.specs(study, study.cells[number]))
        found |= own
        cells[number] = {
            "settings": studies.settings(study, study.cells[number]),
            "code": studies.code(own.values()),
            "runs": list(own),
        }
    return {
        "identity": _identity(study),
        "cells": [cells[number] for number in range(len(cells))],
        "runs": {
            name: {
                "type": f"{type(spec).__module__}:{type(spec).__qualname__}",
                "spec": spec.model_dump(mode="json"),
                "parents": [key(parent) for parent in spec.parents()],
            }
            for name, spec in found.items()
        },
    }


def profiles() -> list[str]:
    """Where a study can be computed."""
    return sorted(path.parent.name for path in (studies.folder() / "profiles").glob("*/config.yaml"))


def profile(name: str) -> Path:
    """The folder of a Snakemake profile. Raises StudyError if there is none, or packages that it needs are missing."""
    if name not in profiles():
        raise StudyError(f"profile: given {name!r}; allowed: one of {', '.join(profiles())}")
    path = studies.folder() / "profiles" / name
    given = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    named = {"executor": given.get("executor"), "storage": given.get("default-storage-provider")}
    plugins = [f"snakemake-{kind}-plugin-{what}" for kind, what in named.items() if what not in (None, *BUILT_IN)]
    if missing := [plugin for plugin in plugins if importlib.util.find_spec(plugin.replace("-", "_")) is None]:
        raise StudyError(f"profile {name!r}: Snakemake needs more packages for it: pip install {' '.join(missing)}")
    return path


def command(planned: Plan, place: Path, dry_run: bool, cores: int | None, quiet: bool) -> list[str]:
    """The call of Snakemake that does what is planned.

    Its outputs appear whole and are named by their content, so age, interruption and its own records mean nothing; two
    studies at a time are kept apart by the store's locks.
    """
    arguments = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("study.smk"))]
    arguments += ["--configfile", os.path.relpath(planned.path, project_root())]
    arguments += ["--profile", str(place), "--workflow-profile", "none", "--rerun-triggers", "mtime", "--keep-going"]
    arguments += ["--ignore-incomplete", "--keep-incomplete", "--drop-metadata", "--nolock", "--nocolor"]
    arguments += ["--cores", str(cores)] if cores else []
    if dry_run:
        return [*arguments, "--dry-run", "--quiet", "rules", "host", "reason"]
    return [*arguments, "--quiet", *(["all"] if quiet else ["host", "reason"])]


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: no plan of a study; `prefdyn study run NAME` makes one, and computes") from error


def compute(path: Path, folder: Path) -> None:
    """Compute one run of the plan in `path` into `folder`, beside its parents.

    On one thread, so that its numbers do not depend on the number of cores. Raises StudyError for a run that was not
    planned, or whose code or packages are others by now.
    """
    planned, key, store = _read_plan(path), folder.name, RunStore(folder.parent)
    if key not in planned["runs"]:
        raise StudyError(f"{planned['study']}, {key}: no such run is planned")
    module, _, kind = planned["runs"][key]["type"].partition(":")
    spec_class: type[BaseModel] = getattr(importlib.import_module(module), kind)
    spec = spec_class.model_validate_json(json.dumps(planned["runs"][key]["spec"]))
    if store.key(spec) != key:
        raise StudyError(
            f"{planned['study']}, {key}: code or packages are not those it was planned with; call `study run` again"
        )
    torch.set_num_threads(1)
    store.get(spec)


def write_row(path: Path, number: int, store: RunStore) -> None:
    """Write the row of one cell of the plan in `path`, whose runs are in the store.

    Raises StudyError if the cell is no longer what was planned.
    """
    planned = _read_plan(path)
    study = studies.read(planned["study"])
    if str(number) not in planned["rows"]:
        raise StudyError(f"{study.name}, cell {number}: its row is not planned")
    cell = study.cells[number] if number < len(study.cells) else None
    if cell is None or studies.settings(study, cell) != planned["cells"][number]["settings"]:
        raise StudyError(f"{study.name}, cell {number}: its settings are not those planned; call `study run` again")
    keep(study, number, studies.row(study, cell, store))


def again(study: Study, number: int) -> dict[str, str]:
    """The row of a cell, all of whose runs are computed anew, in a store of their own and on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            store, cell = RunStore(place), study.cells[number]
            for spec in studies.specs(study, cell):
                store.get(spec)
            return studies.row(study, cell, store)
    finally:
        torch.set_num_threads(before)
