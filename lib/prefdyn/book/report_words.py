"""Numbers and texts as a report prints them, and the sentences that a lens folder's tables say by stated rules."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from .report_folder import Folder, Missing

DASH = "–"
SURE = 1.96  # standard errors: a 95% interval
FIRM = "\u00a0"  # a blank at which no line ends: within a rule
NAMED = 5  # steps that a sentence names at most
SIDES = {"chosen": 0, "rejected": 1}
SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
# Whatever would not be seen, or would turn the order of the text around it, gets a sign that is seen.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def number(value: Any, digits: int = 3) -> str:
    """A number in `digits` digits, a whole one in full; a dash where it is not known or not finite."""
    if value is None or value is pd.NA or not math.isfinite(value):
        return DASH
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace("-", "−")
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -3 <= power < 6:
        return f"{value:,.{max(0, digits - 1 - power)}f}".replace("-", "−")
    return f"{mantissa}×10{str(power).translate(SUPERSCRIPT)}".replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    """A number with its sign."""
    text = number(value, digits)
    return text if text == DASH or not value > 0 else f"+{text}"


def with_error(value: Any, error: Any) -> str:
    """A signed number with its standard error, where that is known."""
    known = error is not None and math.isfinite(error)
    return f"{signed(value)} (se {number(error)})" if known else signed(value)


def seen(text: str) -> str:
    """A text of data in which nothing hides: control characters, and those that turn the direction, show their code."""
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def listed(names: Sequence[Any], most: int = NAMED) -> str:
    """Names as a sentence has them: "0, 100 and 200"; of more than `most` the first ones and how many follow."""
    texts = [number(name) if isinstance(name, int | np.integer) else str(name) for name in names]
    if len(texts) > most:
        return f"{', '.join(texts[:most])} and {number(len(texts) - most)} more"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts) or "none"


def at(steps: Sequence[int]) -> str:
    """Steps by their numbers: "step 0", "steps 0 and 100"."""
    return f"step{'' if len(steps) == 1 else 's'} {listed(steps)}"


def count(many: int, noun: str) -> str:
    """How many of a thing: "1 checkpoint", "4 checkpoints"."""
    return f"{number(many)} {noun}{'' if many == 1 else 's'}"


def known(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows where a column is known. Raises Missing if there is none."""
    rows = table[table[column].notna()].reset_index(drop=True)
    if rows.empty:
        raise Missing(f"{column} is not known at any step")
    return rows


def signs(table: pd.DataFrame, value: str = "g", error: str = "se") -> dict[str, int]:
    """How many rows are surely positive, surely negative, neither, or of unknown error (or value)."""
    low, high = table[value] - SURE * table[error], table[value] + SURE * table[error]
    found = {"positive": int((low > 0).sum()), "negative": int((high < 0).sum())}
    unknown = int(low.isna().sum())
    return found | {"neither": len(table) - sum(found.values()) - unknown, "unknown": unknown}


def _rule(symbol: str, word: str) -> str:
    """What a word on the sign of a quantity stands for, kept on one line."""
    rules = {"positive": f"{symbol} − {SURE} se > 0", "negative": f"{symbol} + {SURE} se < 0"}
    return (rules | {"neither": f"|{symbol}| ≤ {SURE} se"})[word].replace(" ", FIRM)


def said(found: dict[str, int], symbol: str, noun: str) -> str:
    """The counts of `signs` as a clause, with the rules that the words stand for."""
    total = sum(found.values())
    clause = (
        f"surely positive ({_rule(symbol, 'positive')}) at {number(found['positive'])} of {count(total, noun)}, "
        f"surely negative ({_rule(symbol, 'negative')}) at {number(found['negative'])}, "
        f"neither at {number(found['neither'])}"
    )
    return clause + (f", without a known standard error at {number(found['unknown'])}" if found["unknown"] else "")


@dataclass(frozen=True)
class Lead:
    """|G positive| against |G negative|; steps where both are known, their difference, and its standard error.

    se: from the sequences' contributions, NaN where these are not in the folder or are not those behind G.
    """

    steps: np.ndarray
    difference: np.ndarray
    se: np.ndarray

    def turns(self) -> list[tuple[int, int, str, str]]:
        """Where the lead changes: (step before, step after, half before, half after)."""
        held = [
            (int(s), "positive" if d > 0 else "negative") for s, d in zip(self.steps, self.difference, strict=True) if d
        ]
        return [(s, t, a, b) for (s, a), (t, b) in pairwise(held) if a != b]


def lead(folder: Folder) -> Lead:
    """Which half of the loss moves the targets' likelihood more, step by step. Raises Missing."""
    halves = folder.component("positive").merge(folder.component("negative"), on="step", suffixes=("", "_negative"))
    halves = known(known(halves, "g"), "g_negative")
    sequences = folder.tables.get("sequences")
    errors = []
    for row in halves.itertuples():
        one = sequences[sequences["step"] == row.step] if sequences is not None else ()
        if len(one) < 2 or len(one) != row.n:
            errors.append(math.nan)
            continue
        each = np.sign(row.g) * one["positive"] - np.sign(row.g_negative) * one["negative"]
        errors.append(math.sqrt(len(one) * each.var(ddof=1)))
    difference = halves["g"].abs() - halves["g_negative"].abs()
    return Lead(halves["step"].to_numpy(), difference.to_numpy(), np.array(errors, float))


@dataclass(frozen=True)
class Change:
    """A mean log-likelihood, nats a response, over steps.

    logp: its level. since: its change since the first of `steps`; se: the standard error of that change over the same
    responses, NaN where it is not known.
    """

    kind: str
    steps: np.ndarray
    logp: np.ndarray
    since: np.ndarray
    se: np.ndarray


def changes(folder: Folder) -> list[Change]:
    """How the mean log-likelihood of each kind of response goes over the steps; one of one step too. Raises Missing.

    Not of those that were sampled anew at every step, whose differences are no changes.
    Standard errors of changes come from the responses whose tokens were kept, where these are all that a mean is over.
    """
    table = folder.tables.get("likelihood", pd.DataFrame(columns=["step", "kind", "logp", "n"]))
    kinds = {
        kind: known(rows, "logp")
        for kind, rows in table[table["kind"] != "sampled"].groupby("kind", sort=False)
        if rows["logp"].notna().any()
    }
    if "target" not in kinds and "alignment" in folder.tables:
        targets = folder.component("full").rename(columns={"logp_targets": "logp"}).assign(n=math.nan)
        if targets["logp"].notna().any():
            kinds["target"] = known(targets, "logp")
    if not kinds:
        raise Missing("the table likelihood is not in this folder, nor is logp_targets known")
    order = [*SIDES, *sorted(set(kinds) - {*SIDES, "target"}), "target"]
    return [_change(folder, kind, kinds[kind]) for kind in order if kind in kinds]


def _change(folder: Folder, kind: str, rows: pd.DataFrame) -> Change:
    logp, n = rows["logp"].to_numpy(float), rows["n"].to_numpy(float)
    se = np.full(len(rows), math.nan)
    if "tokens" in folder.tables and kind in SIDES:
        tokens = folder.tables["tokens"]
        one = tokens[tokens["side"] == SIDES[kind]]
        sums = one.groupby(["step", "example"])["logp"].sum(min_count=1).unstack("step")
        first = rows["step"].iloc[0]
        for i, step in enumerate(rows["step"]):
            if i and {first, step} <= set(sums.columns) and n[i] == n[0]:
                each = (sums[step] - sums[first]).dropna()
                if 2 <= len(each) == n[i]:
                    se[i] = each.std(ddof=1) / math.sqrt(len(each))
    return Change(kind, rows["step"].to_numpy(), logp, logp - logp[0], se)


def headline(folder: Folder) -> list[str]:
    """The sentences that a reader should leave with: sign of G, cosine, which half leads, what likelihoods did.

    What a folder lacks is said in place of the sentence.
    """
    sentences = []
    for make in (_sign, _cosine, _leads, _likelihoods):
        try:
            sentences.append(make(folder))
        except Missing as missing:
            sentences.append(f"Not known: {missing}.")
    return sentences


def span(table: pd.DataFrame, value: str, error: str) -> str:
    """From where to where a quantity goes: a clause with first and last value."""
    first, last = table.iloc[0], table.iloc[-1]
    return (
        f"from {with_error(first[value], first[error])} at step {number(int(first['step']))} "
        f"to {with_error(last[value], last[error])} at step {number(int(last['step']))}"
    )


def _sign(folder: Folder) -> str:
    full = known(folder.component("full"), "g")
    if len(folder.steps()) > 1:
        return f"G of the whole loss is {said(signs(full), 'g', folder.noun)}. It goes {span(full, 'g', 'se')}."
    row, found = full.iloc[0], signs(full)
    words = {
        "positive": f"surely positive ({_rule('g', 'positive')})",
        "negative": f"surely negative ({_rule('g', 'negative')})",
        "neither": f"neither surely positive nor surely negative ({_rule('g', 'neither')})",
        "unknown": "without a known standard error",
    }
    (word,) = [text for name, text in words.items() if found[name]]
    step = number(int(row["step"]))
    return f"At step {step}, the only {folder.noun}, G of the whole loss is {with_error(row['g'], row['se'])}: {word}."


def _cosine(folder: Folder) -> str:
    full = known(folder.component("full"), "cosine")
    low, high = full["cosine"].min(), full["cosine"].max()
    if len(folder.steps()) == 1:
        return f"The cosine of d and the descent direction −∇L is {signed(low)}."
    return (
        f"The cosine of d and the descent direction −∇L lies between {signed(low)} and {signed(high)} "
        f"(known at {number(len(full))} of {count(len(folder.steps()), folder.noun)})."
    )


def _leads(folder: Folder) -> str:
    found = lead(folder)
    sure = np.abs(found.difference) > SURE * found.se
    tested = int(np.isfinite(found.se).sum())
    rule = f"their difference is more than {SURE} of its standard errors"
    if len(folder.steps()) == 1:
        half = "positive" if found.difference[0] > 0 else "negative" if found.difference[0] < 0 else "neither"
        held = f"The larger half is the {half} one" if half != "neither" else "Both halves are of the same size"
        tail = f", se {number(found.se[0])}" if tested else ""
        return f"{held}: |G positive| − |G negative| is {signed(found.difference[0])}{tail}."
    text = (
        f"The positive half leads (|G positive| > |G negative|) at {number(int((found.difference > 0).sum()))} of "
        f"{count(len(found.steps), folder.noun)}"
    )
    text += f"; {rule} at {number(int(sure.sum()))} of {number(tested)}" if tested else ""
    turns = found.turns()
    if not turns:
        return f"{text}. Over training the lead does not turn."
    where = [f"from {a} to {b} between steps {number(s)} and {number(t)}" for s, t, a, b in turns]
    return f"{text}. Over training the lead turns {count(len(turns), 'time')}: {listed(where, 3)}."


def _likelihoods(folder: Folder) -> str:
    found = changes(folder)
    if max(len(change.steps) for change in found) == 1:
        each = [f"{number(c.logp[0])} for {_kind(c.kind)}" for c in found]
        return f"Mean log-likelihoods, in nats a response, are {listed(each)} (step {number(int(found[0].steps[0]))})."
    each = [
        f"by {with_error(c.since[-1], c.se[-1])} for {_kind(c.kind)} "
        f"(from {number(c.logp[0])} at step {number(int(c.steps[0]))} to {number(c.logp[-1])} "
        f"at step {number(int(c.steps[-1]))})"
        for c in found
        if len(c.steps) > 1
    ]
    return f"Mean log-likelihoods, in nats a response, changed {listed(each, 8)}."


def _kind(kind: str) -> str:
    names = {"chosen": "chosen responses", "rejected": "rejected responses", "target": "targets"}
    return names.get(kind, f"“{seen(kind)}”")
