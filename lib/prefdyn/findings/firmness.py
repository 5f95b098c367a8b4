"""How firmly a verdict stands: would other seeds and prompts, or another machine, have given another one?

Bootstrap draws of seeds and prompts stand for the first question, the intervals of a second edition for the other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import claims, stats
from .claims import Finding, Rule

Table = tuple[str, ...]  # (name of the table, *methods)
LEVELS = ("seed", "index")  # the columns that number seeds and held-out prompts
SEEDS, PROMPTS = 0, 1  # two streams of random numbers


def firmness(
    rules: Iterable[Rule], tables: Mapping[Table, pd.DataFrame], draws: int = 100, seed: int = 0
) -> dict[str, float | None]:
    """Share of bootstrap draws in which a verdict is that on the whole data, for every rule and every claim.

    A draw takes as many seeds as there are, with replacement, the same for all rules; a seed that is drawn twice counts
    as two. Where a table has the column `index`, prompts are drawn likewise, the same for all seeds. On what is drawn
    the rules are measured and judged, and claims by all of their rules, as on the whole data.

    A draw in which all seeds are one has no spread, and is judged as the one seed that it is: no interval, every rule
    undecided. It comes up once in n^(n-1) draws: of many draws a verdict other than "undecided" and "inconclusive" can
    be that of 1/2 at most with two seeds, 8/9 with three, 624/625 with five, and two seeds that decide nothing stay
    undecided in every draw. A draw in which a measure is not known counts as another verdict.

    A share is no probability that new seeds give the same verdict: it is larger. Of n seeds drawn with replacement the
    variance is (n - 1) / n of theirs on average, 4/5 for five, so that draws differ less, and are surer, than new seeds
    would be. By simulation (a value a seed, normal; true effects from -4 to 4 standard deviations alike), five new
    seeds repeat a decided verdict in 93% where its share is 0.99 or more, in 78% where it is 0.9 to 0.99, in 67% where
    it is 0.5 to 0.9. Where prompts are drawn too, the scatter of single replies counts up to three times (2.5 times for
    five seeds): *The pigeonhole bootstrap*, Owen, 2007, https://doi.org/10.1214/07-AOAS122.

    Args: tables, (rule.table, *rule.methods) -> what the rule reads, with the column seed. draws, at least 1: with 100
    a share is known to 0.05 (one standard error) or better. seed, of the random numbers. Returns shares by name of a
    rule and by claim. A rule without a table, with one seed, or that measures what is not known here, is left out, and
    its claim is None. Raises ValueError for a missing column, or where two tables of a claim have other seeds.
    """
    if draws < 1:
        raise ValueError(f"firmness: draws={draws}; at least 1 is needed")
    rules = list(rules)
    whole = {rule.name: _whole(rule, tables) for rule in rules}
    by_table: dict[Table, list[Rule]] = {}
    for rule in rules:
        if whole[rule.name].verdict != "not run":
            by_table.setdefault((rule.table, *rule.methods), []).append(rule)
    drawn: dict[str, list[str]] = {}
    for key, own in by_table.items():
        drawn |= _verdicts(own, tables[key], draws, seed)
    shares: dict[str, float | None] = {name: _share(words, whole[name].verdict) for name, words in drawn.items()}
    for claim in dict.fromkeys(rule.claim for rule in rules):
        own = [rule for rule in rules if rule.claim == claim]
        shares[claim] = None
        if all(rule.name in drawn for rule in own):
            _require_same_seeds(own, tables)
            each = [_claim(own, words) for words in zip(*(drawn[rule.name] for rule in own), strict=True)]
            shares[claim] = _share(each, claims.verdict(whole[rule.name] for rule in own))
    return shares


def _whole(rule: Rule, tables: Mapping[Table, pd.DataFrame]) -> Finding:
    """The finding on the whole data, "not run" where there is no table, or one seed."""
    table = tables.get((rule.table, *rule.methods))
    if table is None or table["seed"].nunique() < 2:
        return Finding(rule, None, "not run")
    return claims.apply_rule(rule, table)


def _share(words: Sequence[str], whole: str) -> float:
    return sum(word == whole for word in words) / len(words)


def _claim(rules: Sequence[Rule], words: Sequence[str]) -> str:
    """The verdict on a claim from the verdicts on its rules."""
    return claims.verdict(Finding(rule, None, word) for rule, word in zip(rules, words, strict=True))


def _drawn(size: int, draws: int, seed: int, stream: int) -> np.ndarray:
    """Numbers 0 to size - 1 drawn with replacement, [draws, size] in ascending order.

    They depend on nothing but the arguments: rules and claims that are judged apart are judged on the same draws.
    """
    return np.sort(np.random.default_rng([seed, stream, size]).integers(size, size=(draws, size)), axis=1)


def _require_same_seeds(rules: Sequence[Rule], tables: Mapping[Table, pd.DataFrame]) -> None:
    """Raise ValueError that names a rule of a claim whose table has other seeds than the first one's."""
    seeds = [sorted(set(tables[rule.table, *rule.methods]["seed"])) for rule in rules]
    for rule, own in zip(rules, seeds, strict=True):
        if own != seeds[0]:
            raise ValueError(f"rule {rule.name}: its table has the seeds {own}, that of {rules[0].name} {seeds[0]}")


def _verdicts(rules: Sequence[Rule], table: pd.DataFrame, draws: int, seed: int) -> dict[str, list[str]]:
    """The verdicts in each of the draws on rules that read one table, by name of the rule."""
    read = {*LEVELS, *(column for rule in rules for column in rule.columns)}
    table = table[[column for column in table if column in read]]
    cells = _cells(table)
    seeds = _drawn(len(cells), draws, seed, SEEDS)
    if "index" in table:
        prompts = _drawn(len(cells[0]), draws, seed, PROMPTS)
        each = [_judge(rules, table, cells, *one) for one in zip(seeds, prompts, strict=True)]
    else:  # a draw is its seeds alone: of five there are 126 different ones, of three 10
        different, which = np.unique(seeds, axis=0, return_inverse=True)
        judged = [_judge(rules, table, cells, one, np.array([0])) for one in different]
        each = [judged[i] for i in which]
    return {rule.name: [words[i] for words in each] for i, rule in enumerate(rules)}


def _judge(
    rules: Sequence[Rule], table: pd.DataFrame, cells: list, seeds: np.ndarray, prompts: np.ndarray
) -> list[str]:
    """The verdicts on rules in one draw."""
    if len(set(seeds)) < 2:
        return ["undecided"] * len(rules)  # one seed has no interval, however often it is drawn
    drawn = resampled(table, cells, seeds, prompts)
    found = [rule.measure(drawn) for rule in rules]
    return [
        stats.judge(e, rule.predicted, rule.threshold) if math.isfinite(e.mean) else "not run"
        for rule, e in zip(rules, found, strict=True)
    ]


def _cells(table: pd.DataFrame) -> list[list[np.ndarray]]:
    """Positions of a table's rows by seed and prompt, both in ascending order; one prompt without the column index."""
    (seeds, s), (prompts, p) = (
        np.unique(table[level], return_inverse=True) if level in table else (np.zeros(1), np.zeros(len(table), int))
        for level in LEVELS
    )
    size = len(seeds) * len(prompts)
    cell = s * len(prompts) + p
    ends = np.cumsum(np.bincount(cell, minlength=size))[:-1]
    rows = np.split(np.argsort(cell, kind="stable"), ends)  # stable: rows of a cell stay in their order
    return [rows[i : i + len(prompts)] for i in range(0, size, len(prompts))]


def resampled(table: pd.DataFrame, cells: list, seeds: np.ndarray, prompts: np.ndarray) -> pd.DataFrame:
    """The rows of some seeds and prompts, each as often as it is named, under new numbers of seed and index.

    Args: cells, of `_cells(table)`: positions of rows, [all seeds][all prompts]; seeds and prompts, places in it. The
    new numbers, 0, 1, ..., are places in `seeds` and `prompts`: what is named twice has two numbers.
    """
    parts = [cells[s][p] for s in seeds for p in prompts]
    rows, sizes = np.concatenate(parts), [len(part) for part in parts]
    new = {
        "seed": np.repeat(np.arange(len(seeds)), len(prompts)),
        "index": np.tile(np.arange(len(prompts)), len(seeds)),
    }
    return pd.DataFrame(
        {name: np.repeat(new[name], sizes) if name in new else table[name].array.take(rows) for name in table}
    )


def intervals(findings: Iterable[Finding]) -> dict[str, dict[str, Any]]:
    """What another machine's intervals can be compared with: mean, low, high, n and values by rule, as JSON has it.

    Of the findings that have an interval.
    """
    return {
        f.rule.name: {
            "mean": f.found.mean, "low": f.found.low, "high": f.found.high, "n": f.found.n,
            "values": list(f.found.values),
        }
        for f in findings
        if f.found is not None and math.isfinite(f.found.low)
    }  # fmt: skip


def shifts(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How far the ends of intervals lie apart on two machines, by rule that both have judged, in the rule's unit.

    It is the larger difference of both ends, for either: two machines show one difference, and an end that stood still
    may have done so by luck.

    Args: two editions' `intervals`. Raises ValueError for a rule judged on unequal numbers of seeds: then it is not the
    machine alone that differs.
    """
    found = {}
    for name in (name for name in one if name in other):
        if one[name]["n"] != other[name]["n"]:
            raise ValueError(f"rule {name}: {one[name]['n']} and {other[name]['n']} seeds cannot be compared")
        found[name] = max(abs(one[name][end] - other[name][end]) for end in ("low", "high"))
    return found


def on_the_edge(finding: Finding, shift: float) -> bool:
    """Whether an end of the interval is nearer to the rule's threshold than `shift`: the verdict could turn.

    Args: shift, by how much ends differ between machines (`shifts`), in the rule's unit. False without an interval.
    """
    if finding.found is None or not math.isfinite(finding.found.low):
        return False
    return near({"low": finding.found.low, "high": finding.found.high}, finding.rule.threshold, shift)


def near(interval: Mapping[str, Any], threshold: float, shift: float) -> bool:
    """The same of an interval as `intervals` has it."""
    return any(abs(interval[end] - threshold) < shift for end in ("low", "high"))
