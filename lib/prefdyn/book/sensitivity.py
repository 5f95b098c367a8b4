"""Rules judged on the runs of some parameters, and with one parameter changed at a time; nothing is computed."""

import dataclasses
from collections.abc import Callable, Iterable

import pandas as pd

from ..findings import firmness, reference
from ..findings.claims import RULES, Finding, Rule, apply_rule
from ..lab.runs import RunStore, project_root
from ..methods import registry
from .evidence import TABLES, NotRun, measured
from .params import ParameterError, Parameters, presets

Tables = dict[tuple[str, ...], pd.DataFrame | Exception]


def apply_rules(store: RunStore, p: Parameters, rules: Iterable[Rule] = RULES) -> list[Finding]:
    """Judge rules on the runs that the store has for the parameters; nothing is computed.

    Raises ValueError for a rule whose table is none of TABLES, or lacks a column.
    """
    rules = list(rules)
    tables = read_tables(store, p, rules)
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


def firm(store: RunStore, p: Parameters, rules: Iterable[Rule] = RULES) -> dict[str, float | None]:
    """How firmly verdicts stand, by rule and by claim (`firmness.firmness`), on the runs that there are."""
    rules = list(rules)
    tables = read_tables(store, p, rules)
    there = {asked: table for asked, table in tables.items() if not isinstance(table, Exception)}
    return firmness.firmness(rules, there)


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


def _world(p: Parameters, changed: dict) -> dict:
    """What is changed in the world and changes nothing in a file."""
    return changed if p.dataset == "world" else {}


def _half_the_width(p: Parameters) -> dict:
    """Where the model is made here and heads allow it."""
    return {"width": p.width // 2} if p.model == "scratch" and p.width // 2 % (2 * p.heads) == 0 else {}


BOTH = ("pairs", "rollouts")
# Settings of the sensitivity table, one change at a time: how it is called, what is changed, and of which methods G is
# measured, by what they take.
ALTERNATIVES: dict[str, tuple[str, Callable[[Parameters], dict], tuple[str, ...]]] = {
    "probe": ("smaller probe", lambda p: {k: p.choice_probe for k in ("probe", "ppo_probe")}, BOTH),
    "seeds": ("other seeds", lambda p: {"seeds": [max(p.seeds) + 1 + i for i in range(len(p.seeds))]}, BOTH),
    "beta": ("beta x 3", lambda p: {"beta": 3 * p.beta}, ("pairs",)),
    "kl": (
        "KL coefficient x 4",
        lambda p: {k: 4 * getattr(p, k) for k in ("kl_coefficient", "learned_kl")},
        ("rollouts",),
    ),
    "lr": ("DPO's learning rate x 3", lambda p: {"lr": 3 * p.lr}, ("pairs",)),
    "ppo_lr": ("PPO's learning rate x 3", lambda p: {"ppo_lr": 3 * p.ppo_lr}, ("rollouts",)),
    "noise": ("more wrong labels", lambda p: _world(p, {"label_noise": min(0.5, p.label_noise + 0.2)}), BOTH),
    "width": ("half the width", _half_the_width, ("pairs",)),
    "decoding": ("D' sampled", lambda p: {"target_decoding": "sampled"}, ("pairs",)),
    "prompts": ("D' on training prompts", lambda p: {"target_prompts": "train"}, ("pairs",)),
    "reduction": ("D' mean over tokens", lambda p: {"target_reduction": "mean"}, ("pairs",)),
}


def alternative(p: Parameters, name: str) -> Parameters:
    """The parameters with one setting changed. Raises ValueError for another name than one of ALTERNATIVES."""
    if name not in ALTERNATIVES:
        raise ValueError(f"alternative {name!r}: there is none; there are: {', '.join(ALTERNATIVES)}")
    return p.model_copy(update=ALTERNATIVES[name][1](p))


def _smaller_probe(p: Parameters) -> Parameters:
    return alternative(p, "probe")


def sensitivity_runs(p: Parameters, name: str) -> list:
    """What the sensitivity table computes of an alternative: raw G, on the smaller probe, of what it changes."""
    changed, takes = alternative(p, name), ALTERNATIVES[name][2]
    judged = dict.fromkeys(method for rule in RULES if rule.table == "G" for method in rule.methods)
    methods = [method for method in judged if registry.find(method).takes in takes]
    same = {spec.model_dump_json() for method in methods for spec in measured(p, method).values()}
    return [
        small
        for method in methods
        for spec, small in zip(
            measured(changed, method).values(), measured(_smaller_probe(changed), method, False).values(), strict=True
        )
        if spec.model_dump_json() not in same
    ]


def sensitivity(store: RunStore, p: Parameters, name: str, rules: Iterable[Rule] = RULES) -> list[Finding]:
    """Judge rules under an alternative, on whatever runs of it there are: with the full probe, else the smaller one."""
    changed, rules = alternative(p, name), list(rules)
    pairs = zip(apply_rules(store, changed, rules), apply_rules(store, _smaller_probe(changed), rules), strict=True)
    return [small if whole.verdict == "not run" else whole for whole, small in pairs]
