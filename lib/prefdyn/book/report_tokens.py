"""Token pictures of a report: responses whose tokens are shaded by what they contribute to G."""

import html
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .report_folder import Folder
from .report_words import at, count, number, seen, signed

MOST_EXAMPLES = 5
MOST_TOKENS = 300  # of a response that are shown
SATURATED = 0.98  # quantile of |w a| among the tokens shown at a step, from which on the shade is full
SHADES = 9  # of each sign; report.css has as many
NAMED = 3  # tokens of a response whose numbers are written out
TEXT_LIMIT = 2000  # characters of a prompt that a lens folder keeps


@dataclass(frozen=True)
class _Scale:
    """How a number becomes a shade: `full` and above is the darkest."""

    full: float

    def shade(self, value: float) -> str:
        """The class of a token: p1 to p9 above 0, n1 to n9 below, none at 0 or where the number is not known."""
        if not np.isfinite(value) or value == 0 or not self.full > 0:
            return ""
        level = int(np.ceil(SHADES * min(1.0, abs(value) / self.full)))
        return f"{'p' if value > 0 else 'n'}{level}"


def pictures(folder: Folder) -> str:
    """HTML of the token pictures: some examples at the first and at the last step. Raises Missing.

    Where the two have no example in common, as where responses are sampled anew, those of the last step.
    """
    tokens = folder.table("tokens")
    tokens = tokens.assign(worth=tokens["w"] * tokens["a"])
    steps = sorted(tokens["step"].unique().tolist())
    ends = list(dict.fromkeys([steps[0], steps[-1]]))
    first, last = (set(tokens.loc[tokens["step"] == step, "example"]) for step in (steps[0], steps[-1]))
    apart = ""
    if not first & last:
        apart = f" At step {number(ends[0])} it was other examples, which are not shown."
        ends = ends[-1:]
    examples, rule = _picked(tokens, ends)
    rule += apart
    shown = tokens[tokens["example"].isin(examples) & tokens["step"].isin(ends)]
    shown = shown[shown.groupby(["step", "example", "side"]).cumcount() < MOST_TOKENS]
    scales, told = {}, []
    for step in ends:
        sizes = shown.loc[shown["step"] == step, "worth"].abs().dropna()
        scales[step] = _Scale(float(sizes.quantile(SATURATED)) if len(sizes) else 0.0)
        above = int((sizes > scales[step].full).sum())
        told.append(
            f"at step {number(step)} the shade is full from |w·a| = {number(scales[step].full)} on "
            f"({number(above)} of {count(len(sizes), 'token')} lie above)"
        )
    intro = (
        f"<p>{rule} Each token is shaded by w·a, what it contributes to G: <span class='p5'>solid underline, above "
        f"0</span> (learning from it makes the targets more likely), <span class='n5'>dotted underline, below "
        f"0</span>. The shade saturates at the {SATURATED:.0%} quantile of the sizes shown: {'; '.join(told)}.</p>"
    )
    intro += "" if "texts" in folder.tables else "<p>Prompts are not shown: the table texts is not in this folder.</p>"
    return intro + "".join(_example(folder, tokens, e, ends, scales, opened=i == 0) for i, e in enumerate(examples))


def _picked(tokens: pd.DataFrame, ends: list[int]) -> tuple[list[int], str]:
    """The examples to show, and the rule by which they were taken: from the lowest to the highest contribution."""
    inside = [set(tokens.loc[tokens["step"] == step, "example"]) for step in ends]
    both = sorted(set.intersection(*inside))
    last = tokens[(tokens["step"] == ends[-1]) & tokens["example"].isin(both)]
    order = last.groupby("example")["worth"].sum().sort_values(kind="stable").index.tolist()
    if len(order) <= MOST_EXAMPLES:
        return order, f"All {count(len(order), 'example')} whose tokens were kept at {at(ends)}."
    places = np.linspace(0, len(order) - 1, MOST_EXAMPLES).round().astype(int)
    rule = (
        f"Of the {number(len(order))} examples whose tokens were kept, {MOST_EXAMPLES} evenly spaced in the order of "
        f"their contribution to G at step {number(ends[-1])}, from the lowest to the highest."
    )
    return [order[i] for i in places], rule


def _example(folder: Folder, tokens: pd.DataFrame, example: int, ends: list[int], scales: dict, opened: bool) -> str:
    own = tokens[tokens["example"] == example]
    totals = [f"{signed(own.loc[own['step'] == step, 'worth'].sum())} at step {number(step)}" for step in ends]
    name = f"Example {number(int(example))}"
    parts = [_prompt(folder, example), "<div class='two'>"]
    paired = bool((tokens["side"] == 1).any())
    for step in ends:
        at_step = own[own["step"] == step]
        parts.append(f"<div><h4>Step {number(step)}</h4>{_of_pair(folder, example, step)}")
        for side, rows in at_step.groupby("side"):
            label = ("Chosen" if side == 0 else "Rejected") if paired else "Response"
            parts.append(_side(label, rows, scales[step]))
        parts.append("</div>")
    parts.append("</div>")
    summary = f"<summary><h3>{name}</h3> <span class='quiet'>contributes {' and '.join(totals)}</span></summary>"
    return f"<details class='example'{' open' if opened else ''}>{summary}{''.join(parts)}</details>"


def _prompt(folder: Folder, example: int) -> str:
    texts = folder.tables.get("texts")
    mine = texts[texts["example"] == example] if texts is not None else ()
    if not len(mine):
        return ""
    prompt = mine["prompt"].iloc[0]
    cut = (
        f" <span class='quiet'>(its first {number(TEXT_LIMIT)} characters)</span>" if len(prompt) >= TEXT_LIMIT else ""
    )
    return f"<p class='label'>Prompt{cut}</p><div class='text' dir='auto'>{html.escape(seen(prompt))}</div>"


def _of_pair(folder: Folder, example: int, step: int) -> str:
    """Strength and margin of a pair, where the table of sequences has them."""
    sequences = folder.tables.get("sequences")
    if sequences is None or not {"omega", "margin"} <= set(sequences.columns):
        return ""
    row = sequences[(sequences["step"] == step) & (sequences["example"] == example)]
    if row.empty:
        return ""
    omega, margin = (pd.to_numeric(row[name], errors="coerce").iloc[0] for name in ("omega", "margin"))
    return f"<p class='quiet'>strength ω {number(omega)}, margin {signed(margin)}</p>"


def _side(label: str, rows: pd.DataFrame, scale: _Scale) -> str:
    """One response: its name and sum, its shaded tokens, and the largest of them in numbers."""
    shown = rows.iloc[:MOST_TOKENS]
    cut = f"; the first {number(MOST_TOKENS)} of {number(len(rows))} tokens" if len(rows) > MOST_TOKENS else ""
    apart = "" if any(token != token.strip() for token in shown["token"]) else " "
    spans = apart.join(_token(row.token, row.worth, scale) for row in shown.itertuples())
    top = rows.loc[rows["worth"].abs().sort_values(ascending=False, kind="stable").index[:NAMED]]
    named = "; ".join(
        f"<bdi>“{html.escape(_visible(row.token).strip())}”</bdi> {signed(row.worth)}" for row in top.itertuples()
    )
    head = f"{label} <span class='quiet'>{signed(rows['worth'].sum())} in all{cut}</span>"
    return f"<h5>{head}</h5><div class='text tokens' dir='auto'>{spans}</div><p class='quiet'>Largest: {named}</p>"


def _visible(token: str) -> str:
    """A token as text that can be seen: line ends and tabulators as signs, nothing and blanks as an open box."""
    text = seen(token).replace("\n", "↵").replace("\t", "⇥")
    return text if text.strip() else text.replace(" ", "␣") or "␣"


def _token(token: str, value: float, scale: _Scale) -> str:
    """One token; after the sign of a line end the line does end."""
    shade = scale.shade(value)
    text = html.escape(seen(token).replace("\n", "↵\n").replace("\t", "⇥\t")) or "␣"
    return f"<span{f' class={shade}' if shade else ''} title='{signed(value)}'>{text}</span>"
