"""Studies: tables of settings whose runs need hours; what they ask, what is known of each, and whether it holds.

A study is a file NAME.yaml in data/studies; its table NAME.csv lies beside it, a row a cell. A chapter reads it by
`table`; `workflow` computes it.
"""

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from ..findings import stats, tuning
from ..findings.claims import RULES, Rule
from ..lab import recipes
from ..lab.fingerprint import code_fingerprint, modules_of
from ..lab.runs import Run, RunStore, project_root
from . import calibrating, params, plan
from .evidence import TABLES
from .judging import apply_rules
from .params import ParameterError, Parameters

KEYS = {
    "title": "a line",
    "about": "what is asked, in a sentence or two",
    "base": "parameters of all cells",
    "axes": "name: values; the cells are all combinations",
    "grids": "a list of such axes, instead of `axes`",
    "rules": "names of rules of the ledger, or of readings",
    "validated": "methods of these rules that are measured on validation prompts too; none if left out",
    "tolerances": "default or a column: {relative: a number, absolute: a number}",
}
AT_THE_END = ("reward_sampled", "reward_greedy", "kl")  # columns of checkpoints, of a method's last one
PROVENANCE = ("settings", "code", "versions", "hardware", "seconds", "finished")


class StudyError(ValueError):
    """A study that cannot be read or computed; the message says what is wrong and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in Python, and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_POWER_OF_TEN = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _POWER_OF_TEN, list("-+0123456789"))


@dataclass(frozen=True)
class Tolerance:
    """How far a value may be from the one that is kept: a part of that one, or a distance, whichever is more."""

    relative: float
    absolute: float

    def allows(self, kept: float) -> float:
        """The largest distance from `kept`."""
        return max(self.relative * abs(kept), self.absolute)


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Cell:
    """One row to be: what it is called along each axis that it has (`labels`), and its parameters, of one seed."""

    labels: dict[str, str]
    parameters: Parameters

    @property
    def seed(self) -> int:
        return self.parameters.seeds[0]

    def __str__(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())


@dataclass(frozen=True)
class Study:
    """What a file says: its cells in order, the rules that they are measured by, how far a check may be off."""

    name: str
    title: str
    about: str
    axes: tuple[str, ...]  # of all grids, the seed last
    cells: tuple[Cell, ...]
    rules: tuple[Rule, ...]
    validated: tuple[str, ...]  # methods whose reward on validation prompts is kept, by which a rate may be chosen
    tolerances: dict[str, Tolerance]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that its rules speak of."""
        return _methods(self.rules)

    @property
    def measures(self) -> tuple[str, ...]:
        """The columns of what is found."""
        return _measures(self.rules, self.validated)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the table."""
        return (*self.axes, *self.measures, *PROVENANCE)

    def tolerance(self, column: str) -> Tolerance:
        """How far a value of a column may be from the kept one; the number of parameters not at all."""
        return EXACT if column == "parameters" else self.tolerances.get(column, self.tolerances["default"])


def _methods(rules: Iterable[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(method for rule in rules for method in rule.methods))


def _measures(rules: tuple[Rule, ...], validated: tuple[str, ...]) -> tuple[str, ...]:
    ends = [f"{method}_{name}" for method in _methods(rules) for name in (*AT_THE_END, "best")]
    return (*(rule.name for rule in rules), *ends, *(f"{method}_validation" for method in validated), "parameters")


def folder() -> Path:
    """Where the studies of the book are."""
    return project_root() / "data" / "studies"


def names() -> list[str]:
    """The studies that there are."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def read(name: str) -> Study:
    """A study by its name. Raises StudyError that names the file, the key, what was given and what is allowed."""
    path = folder() / f"{name}.yaml"
    if not path.is_file():
        raise StudyError(f"{name!r}: no such study; there are: {', '.join(names()) or 'none in data/studies'}")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        return _study(name, given)
    except (yaml.YAMLError, StudyError) as error:
        raise StudyError(f"{path.name}: {error}") from error


def _need(holds: bool, key: str, given: Any, allowed: str) -> None:
    if not holds:
        raise StudyError(f"{key}: given {given!r}; allowed: {allowed}")


def _study(name: str, given: Any) -> Study:
    allowed = "; ".join(f"{key}: {what}" for key, what in KEYS.items())
    _need(isinstance(given, dict) and not given.keys() - KEYS.keys(), "keys", given and list(given), allowed)
    for key in ("title", "about"):
        _need(isinstance(given.get(key), str) and bool(given[key].strip()), key, given.get(key), KEYS[key])
    base = given.get("base", {})
    _need(isinstance(base, dict) and "seeds" not in base, "base", base, f"{KEYS['base']}; seeds are the axis seed")
    _need(("axes" in given) != ("grids" in given), "axes, grids", list(given), "one of the two")
    grids = given.get("grids", [given.get("axes")])
    _need(isinstance(grids, list) and bool(grids), "grids", grids, KEYS["grids"])
    rules = _rules(given.get("rules"))
    validated = given.get("validated", [])
    allowed = f"a list of some of {', '.join(_methods(rules))}, each once"
    listed = isinstance(validated, list) and all(validated.count(method) == 1 for method in validated)
    _need(listed and {*validated} <= {*_methods(rules)}, "validated", validated, allowed)
    measures = _measures(rules, tuple(validated))
    cells = [cell for axes in grids for cell in _grid(base, axes, {*measures, *PROVENANCE})]
    labels = [str(cell) for cell in cells]
    _need(len(set(labels)) == len(labels), "grids", grids, "each cell once")
    axes = dict.fromkeys(axis for cell in cells for axis in cell.labels if axis != "seed")
    return Study(
        name=name,
        title=given["title"].strip(),
        about=" ".join(given["about"].split()),
        axes=(*axes, "seed"),
        cells=tuple(cells),
        rules=rules,
        validated=tuple(validated),
        tolerances=_tolerances(given.get("tolerances"), measures),
    )


def _rules(given: Any) -> tuple[Rule, ...]:
    known = {rule.name: rule for rule in (*RULES, *calibrating.READINGS)}
    allowed = f"a list of some of {', '.join(known)}, each once"
    _need(isinstance(given, list) and bool(given), "rules", given, allowed)
    for name in given:
        _need(name in known and given.count(name) == 1, "rules", name, allowed)
    return tuple(known[name] for name in given)


def _tolerances(given: Any, columns: tuple[str, ...]) -> dict[str, Tolerance]:
    _need(isinstance(given, dict) and "default" in given, "tolerances", given, f"{KEYS['tolerances']}; with a default")
    allowed = f"default, {', '.join(column for column in columns if column != 'parameters')}"
    for column, value in given.items():
        _need(column == "default" or column in columns[:-1], "tolerances", column, allowed)
        sizes = isinstance(value, dict) and value.keys() == {"relative", "absolute"}
        numbers = sizes and all(isinstance(x, int | float) and 0 <= x < math.inf for x in value.values())
        _need(numbers, f"tolerances, {column}", value, "relative and absolute, numbers >= 0")
    return {column: Tolerance(**value) for column, value in given.items()}


def shown(value: Any) -> str:
    """A value as the table has it: numbers with six digits, what is not known as nothing."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value)


def _axis(axis: str, given: Any, taken: set[str]) -> dict[str, dict[str, Any]]:
    """The parameters that each value of an axis stands for, by its label."""
    _need(axis not in taken, "axes", axis, "a name that is no other column of the table")
    allowed = "a list of values of the parameter of that name, or label: {parameter: value}, at least one, each once"
    if axis != "seed" and isinstance(given, dict):
        values = {str(label): value for label, value in given.items()}
        _need(all(isinstance(value, dict) and value for value in values.values()), f"axes, {axis}", given, allowed)
        _need("seeds" not in {name for value in values.values() for name in value}, f"axes, {axis}", given, "no seeds")
    else:
        name = "seeds" if axis == "seed" else axis
        _need(isinstance(given, list), f"axes, {axis}", given, allowed)
        known = name in Parameters.model_fields and axis != "seeds"
        _need(known, "axes", axis, "seed, or the name of a parameter; of several parameters, label: {parameter: value}")
        values = {shown(value): {name: [value] if axis == "seed" else value} for value in given}
    _need(len(values) == len(given) > 0, f"axes, {axis}", given, allowed)
    return values


def _grid(base: dict, axes: Any, taken: set[str]) -> list[Cell]:
    """The cells of one product of axes."""
    _need(isinstance(axes, dict) and "seed" in axes, "axes", axes, f"{KEYS['axes']}; seed is one of them")
    values = {axis: _axis(axis, given, taken) for axis, given in axes.items()}
    cells = []
    for labels in itertools.product(*values.values()):
        chosen = dict(zip(values, labels, strict=True))
        parts = [values[axis][label] for axis, label in chosen.items()]
        given = [name for part in parts for name in part]
        _need(len(set(given)) == len(given), "axes", list(axes), "a parameter on one axis alone")
        try:
            parameters = params.check(base | {name: value for part in parts for name, value in part.items()})
        except ParameterError as error:
            raise StudyError(f"{', '.join(f'{axis} {label}' for axis, label in chosen.items())}: {error}") from error
        cells.append(Cell(chosen, parameters))
    same = [cell.parameters.model_dump_json() for cell in cells]
    twice = next((str(cell) for cell, one in zip(cells, same, strict=True) if same.count(one) > 1), "")
    _need(not twice, "axes", twice, "cells that differ in a parameter")
    return cells


def specs(study: Study, cell: Cell) -> list[recipes.Spec]:
    """What a cell's row is read from: the runs that its rules need, the plain run of each method, its validation.

    Raises StudyError for parameters that no run can have together.
    """
    p = cell.parameters
    asked = dict.fromkeys((rule.table, rule.methods) for rule in study.rules)
    try:
        needed = [spec for table, methods in asked for spec in TABLES[table].needs(p, *methods).values()]
        plain = {method: plan.run(p, cell.seed, method) for method in study.methods}
        return [*needed, *plain.values(), *_validations(study, p, cell.seed).values()]
    except ParameterError as error:
        raise StudyError(f"{study.name}, {cell}: {error}") from error


def _validations(study: Study, p: Parameters, seed: int) -> dict[str, tuning.ValidationRun]:
    return {method: plan.validation_run(p, seed, plan.run(p, seed, method)) for method in study.validated}


Key = Callable[[recipes.Spec], str]


def memo(key: Key) -> Key:
    """The same function, that works out the key of a spec once, however often it is asked for it."""
    known: dict[tuple[type, str], str] = {}

    def remembered(spec: recipes.Spec) -> str:
        asked = (type(spec), spec.model_dump_json())
        if asked not in known:
            known[asked] = key(spec)
        return known[asked]

    return remembered


def runs(key: Key, needed: Iterable[recipes.Spec]) -> dict[str, recipes.Spec]:
    """These runs and all that they rest on, by their keys, parents first."""
    found: dict[str, recipes.Spec] = {}
    for spec in needed:
        if key(spec) not in found:
            found |= runs(key, spec.parents()) | {key(spec): spec}
    return found


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings(study: Study, cell: Cell) -> str:
    """What tells a cell's settings from others: a hash of all that its runs are made of, their data and model with it.

    A parameter that none of these runs reads, such as one that is new, is none of it.
    """
    needed = [(spec.kind, spec.model_dump(mode="json", context="identity")) for spec in specs(study, cell)]
    return digest(json.dumps(needed, sort_keys=True))


def code(needed: Iterable[recipes.Spec]) -> str:
    """What tells the code of runs from other code, of all that they reach together."""
    return code_fingerprint(*sorted({module for spec in needed for module in modules_of(spec)}))[:12]


def _end(method: str, checkpoints: pd.DataFrame) -> dict[str, float]:
    """What a training run has come to: its last checkpoint, and the best reward of any."""
    last = checkpoints.sort_values("step").iloc[-1]
    ends = {f"{method}_{name}": float(last[name]) for name in AT_THE_END}
    return ends | {f"{method}_best": float(checkpoints["reward_sampled"].max())}


def _provenance(found: list[Run]) -> dict[str, str]:
    """With which packages, on what and in how many seconds runs were computed, and when the last was finished."""
    known = [run.json("provenance") for run in found]

    def once(texts: Iterable[str]) -> str:
        return "; ".join(sorted(set(texts)))

    hardware = [one["hardware"] for one in known]
    return {
        "versions": once(", ".join(f"{name} {v}" for name, v in sorted(one["versions"].items())) for one in known),
        "hardware": once(
            f"{on['machine']}, {on['cores']} cores, {on['accelerator'] or 'no accelerator'}" for on in hardware
        ),
        "seconds": f"{sum(one['seconds'] for one in known):.1f}",
        "finished": max(one["finished"] for one in known)[:10],
    }


def row(study: Study, cell: Cell, store: RunStore) -> dict[str, str]:
    """The row of a cell from its runs in the store. Raises StudyError if some are missing; nothing is computed."""
    p, needed = cell.parameters, runs(memo(store.key), specs(study, cell))
    found = {key: store.find(spec) for key, spec in needed.items()}
    if missing := [key for key, run in found.items() if run is None]:
        raise StudyError(f"{study.name}, {cell}: {len(missing)} of {len(found)} runs are missing: {missing[0]}, ...")
    findings = apply_rules(store, p, study.rules)
    values = {one.rule.name: one.found.mean if one.found else math.nan for one in findings}
    for method in study.methods:
        values |= _end(method, found[store.key(plan.run(p, cell.seed, method))].frame("checkpoints"))
    validations = _validations(study, p, cell.seed).items()
    values |= {f"{method}_validation": tuning.means(store, [(method, one)])["reward"][0] for method, one in validations}
    policy, _ = recipes.final_policy(found[store.key(plan.sft_run(p, cell.seed))])
    values |= {"parameters": policy.num_parameters()}
    provenance = {"settings": settings(study, cell), "code": code(needed.values())} | _provenance(list(found.values()))
    written = cell.labels | {name: shown(value) for name, value in values.items()} | provenance
    return {column: written.get(column, "") for column in study.columns}


def _labels(study: Study, kept: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(kept.get(axis, "") for axis in study.axes)


def kept_rows(study: Study) -> dict[int, dict[str, str]]:
    """The rows of the table, by the numbers of their cells; rows of cells that the study no longer has are left out."""
    path = folder() / f"{study.name}.csv"
    if not path.is_file():
        return {}
    numbers = {_labels(study, cell.labels): number for number, cell in enumerate(study.cells)}
    with path.open(newline="", encoding="utf-8") as file:
        known = {numbers.get(_labels(study, one)): one for one in csv.DictReader(file)}
    return {number: known[number] for number in sorted(known.keys() - {None})}


def changes(study: Study, kept: Mapping[int, Mapping[str, str]], now: Callable[[int], str]) -> dict[int, str]:
    """What has changed since rows were written, "" where nothing has: "columns", "settings" or "code", by number.

    Args: now, the code of a cell's runs today, by its number; asked where all else is as it was.
    """
    found = {}
    for number, one in kept.items():
        if any(column not in one for column in study.columns):
            found[number] = "columns"
        elif one["settings"] != settings(study, study.cells[number]):
            found[number] = "settings"
        else:
            found[number] = "" if one["code"] == now(number) else "code"
    return found


def code_today(study: Study, number: int) -> str:
    """The code that a cell's runs would be computed with now; methods may differ from cell to cell, and so may it."""
    return code(specs(study, study.cells[number]))


@dataclass(frozen=True)
class Table:
    """What is known of a study: its rows, and how they stand to the code of today.

    rows: a row a cell that is there, with the study's columns; numbers are numbers, what is not known is NaN. changed:
    for each row "", or what has changed since it was written: "settings", "code" or "columns".
    """

    study: Study
    rows: pd.DataFrame
    changed: tuple[str, ...]

    def __str__(self) -> str:
        """A sentence: how many cells are there, of which days and code, and whether that has changed since."""
        if not len(self.rows):
            return f"Of the {len(self.study.cells)} cells of the study {self.study.name} none is computed."
        days = sorted({*self.rows["finished"]})
        when = " to ".join(dict.fromkeys((days[0], days[-1])))
        outdated = [f"{self.changed.count(what)} ({what})" for what in sorted({*self.changed} - {""})]
        since = f"since then something has changed for {', '.join(outdated)}" if outdated else "unchanged since"
        return (
            f"{len(self.rows)} of {len(self.study.cells)} cells of the study {self.study.name}, computed {when} with "
            f"code {', '.join(sorted({*self.rows['code']}))}; {since}."
        )


def table(name: str) -> Table:
    """The table of a study as it is kept; nothing is computed. Raises StudyError for a study that cannot be read."""
    study = read(name)
    kept = kept_rows(study)
    full = [{column: one.get(column) or "" for column in study.columns} for one in kept.values()]
    rows = pd.DataFrame(full, columns=list(study.columns), dtype=str)
    for column in (*study.axes, *study.measures, "seconds"):
        numbers = pd.to_numeric(rows[column].replace("", math.nan), errors="coerce")
        if not (numbers.isna() & (rows[column] != "")).any():  # a label such as "0.1M" is no number
            rows[column] = numbers
    return Table(study, rows, tuple(changes(study, kept, lambda number: code_today(study, number)).values()))


OWN = "the book's own values"  # a setting that several grids of a study share


def judged(known: Table) -> pd.DataFrame:
    """The study's rules judged over seeds, under each of its settings.

    Columns: setting (its labels but for the seed, in words; OWN for the cells in which several grids meet, which come
    once, first), rule, found (Estimate over seeds), verdict. Left out are rules of which fewer than two seeds are known
    under a setting, and those that nothing along a grid touches: their values are the same at all of its settings.
    """
    axes = [axis for axis in known.study.axes if axis != "seed"]
    labels = known.rows[axes].map(lambda label: "" if pd.isna(label) else shown(label))
    grid = labels.apply(lambda row: ", ".join(axis for axis in axes if row[axis]), axis=1)
    setting = labels.apply(lambda row: ", ".join(f"{axis} {row[axis]}" for axis in axes if row[axis]), axis=1)
    shared = setting.map(_shared(known.study)).fillna(False).astype(bool)
    table = known.rows.assign(grid=grid, setting=setting.mask(shared, OWN)) if len(known.rows) else None
    rows = []
    for one in () if table is None else sorted(table["setting"].unique(), key=lambda name: name != OWN):
        own = table[table["setting"] == one]
        for rule in known.study.rules:
            values = own.drop_duplicates("seed")[rule.name].dropna()
            if len(values) > 1 and (one == OWN or _touches(table[table["grid"] == own["grid"].iloc[0]], rule.name)):
                found = stats.mean_interval(values)
                verdict = stats.judge(found, rule.predicted, rule.threshold)
                rows.append({"setting": one, "rule": rule.name, "found": found, "verdict": verdict})
    return pd.DataFrame(rows, columns=["setting", "rule", "found", "verdict"])


def _shared(study: Study) -> dict[str, bool]:
    """For each setting of a study, in words, whether another of its grids has the same parameters."""
    names: dict[str, set[str]] = {}
    for cell in study.cells:
        told = ", ".join(f"{axis} {label}" for axis, label in cell.labels.items() if axis != "seed")
        names.setdefault(cell.parameters.model_dump_json(), set()).add(told)
    return {name: len(alike) > 1 for alike in names.values() for name in alike}


def _touches(grid: pd.DataFrame, rule: str) -> bool:
    """Whether the value of a rule differs anywhere along a grid, for any seed; of one setting alone that is taken on
    trust."""
    each = grid.groupby("seed")[rule].nunique(dropna=True)
    return grid["setting"].nunique() < 2 or bool((each > 1).any())


def by_size(known: Table) -> dict[str, stats.Estimate]:
    """How much each rule's value grows for ten times as many parameters, over seeds, by rule.

    The slope of a straight line on log10(parameters) through all cells of a seed. Seeds that lack a cell or a value
    are left out, and so are rules of which fewer than two seeds are left. Intervals are as wide as so many rules at
    once ask for (Bonferroni).
    """
    axes = [axis for axis in known.study.axes if axis != "seed"]
    models = len({tuple(cell.labels[axis] for axis in axes if axis in cell.labels) for cell in known.study.cells})
    found = {}
    for rule in known.study.rules:
        whole = known.rows.dropna(subset=[rule.name])
        each = [own for _, own in whole.groupby("seed") if len(own) == models]
        slopes = [np.polyfit(np.log10(own["parameters"].astype(float)), own[rule.name], 1)[0] for own in each]
        if len(slopes) > 1:
            found[rule.name] = stats.mean_interval(slopes, level=1 - 0.05 / len(known.study.rules))
    return found


def chosen(study: Study, count: int, seed: int) -> list[int]:
    """Numbers of up to `count` cells, drawn at random from those whose rows are there with the settings of today.

    Raises StudyError if there are none.
    """
    kept = kept_rows(study)
    usable = [number for number, what in changes(study, kept, lambda _: "").items() if what in ("", "code")]
    if not usable:
        why = "their settings have changed since" if kept else "none is computed"
        raise StudyError(f"{study.name}: there is no cell to check ({why}); `prefdyn study run {study.name}` computes")
    drawn = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    return sorted(usable[i] for i in drawn)


def _verdict(kept: str, now: str, tolerance: Tolerance) -> str:
    if kept == now:
        return "identical"
    if not kept or not now or abs(float(now) - float(kept)) > tolerance.allows(float(kept)):
        return "differs"
    return "agrees"


def compare(study: Study, number: int, now: Mapping[str, str]) -> list[dict[str, str]]:
    """What is kept of a cell beside what was found again: dicts of cell, column, kept, now, tolerance and verdict.

    verdict: identical, agrees (not farther apart than the tolerance), or differs.
    """
    kept = kept_rows(study)[number]
    return [
        {
            "cell": str(study.cells[number]),
            "column": column,
            "kept": kept[column],
            "now": now[column],
            "tolerance": shown(study.tolerance(column).allows(float(kept[column] or 0))),
            "verdict": _verdict(kept[column], now[column], study.tolerance(column)),
        }
        for column in study.measures
    ]
