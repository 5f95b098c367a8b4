"""Rules judged on the runs that there are, where else they hold, and how firmly; nothing is computed."""

import dataclasses
from collections.abc import Iterable

import pandas as pd

from ..findings import firmness, reference
from ..findings.claims import RULES, Finding, Rule, apply_rule
from ..lab.runs import RunStore, project_root
from .evidence import TABLES, NotRun
from .params import ParameterError, Parameters, presets

Tables = dict[tuple[str, ...], pd.DataFrame | Exception]


def apply_rules(store: RunStore, p: Parameters, rules: Iterable[Rule] = RULES) -> list[Finding]:
    """Judge rules on the runs that the store has for the parameters; nothing is computed.

    Raises ValueError for a rule whose table is none of TABLES, or lacks a column.
    """
    rules = list(rules)
    return judge(rules, read_tables(store, p, rules))


def judge(rules: Iterable[Rule], tables: Tables) -> list[Finding]:
    """Judge rules on the tables of `read_tables`; where there is none, the finding says why."""
    findings = []
    for rule in rules:
        table = tables[rule.table, *rule.methods]
        if isinstance(table, Exception):
            findings.append(Finding(rule, None, "not run", str(table)))
        else:
            findings.append(apply_rule(rule, table))
    return findings


def read_tables(store: RunStore, p: Parameters, rules: Iterable[Rule] = RULES) -> Tables:
    """The tables that rules read, or why there is none, by (rule.table, *rule.methods); nothing is computed.

    Raises ValueError for a rule whose table is none of TABLES.
    """
    tables: Tables = {}
    for rule in rules:
        if rule.table not in TABLES:
            raise ValueError(f"rule {rule.name}: there is no table {rule.table!r}; there are: {', '.join(TABLES)}")
        asked = (rule.table, *rule.methods)
        if asked not in tables:
            try:
                tables[asked] = TABLES[rule.table].read(store, p, *rule.methods)
            except (NotRun, ParameterError) as missing:  # a variant may be impossible with these parameters
                tables[asked] = missing
    return tables


def firm(rules: Iterable[Rule], tables: Tables) -> dict[str, float | None]:
    """How firmly verdicts stand, by rule and by claim (`firmness.firmness`), on the tables that there are."""
    return firmness.firmness(rules, {asked: t for asked, t in tables.items() if not isinstance(t, Exception)})


def elsewhere(store: RunStore, p: Parameters, where: str, rules: Iterable[Rule] = RULES) -> dict[str, Finding]:
    """Rules tried on the methods that their field `where` names ("foil" or "yardstick"), by the rule's name."""
    named = ((rule, getattr(rule, where)) for rule in rules)
    tried = [dataclasses.replace(rule, methods=methods) for rule, methods in named if methods]
    return {finding.rule.name: finding for finding in apply_rules(store, p, tried)}


def machines(p: Parameters) -> tuple[reference.Intervals, reference.Intervals]:
    """The rules' intervals on the two machines of the profile's reference results.

    Empty where there are none, or where the parameters are not the profile's own.
    """
    if p.model_dump() != presets(p.profile, p.dataset, p.difficulty) | {"dataset": p.dataset}:
        return {}, {}
    first, second = (reference.path(project_root(), p.profile, second=second) for second in (False, True))
    return tuple(reference.read(path).get("intervals", {}) if path.is_file() else {} for path in (first, second))
