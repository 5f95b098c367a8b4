"""What a chapter shows and leaves behind: figures that describe themselves, computed sentences, provenance.

Numbers travel with the outputs of the notebook (as metadata), not through files: executing a chapter with other
parameters elsewhere changes nothing in the book.
"""

import base64
import html
import io
import json
import string
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from ..findings.stats import Estimate
from ..lab.data import Dataset
from ..lab.runs import Run

KEY = "prefdyn"  # of the metadata that carries values
DIGEST = "pairs"  # what a page describes, by `Dataset.digest`
MOST_SEEDS = 32  # values behind a number that are kept with it: more are examples, not seeds


def figure(fig: Figure, name: str, caption: str, alt: str) -> None:
    """Display a figure with its number's name (for references), caption and alternative text, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    width = round(fig.get_figwidth() * 100)
    plt.close(fig)
    display(
        {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt},
        metadata={
            "image/png": {"width": width},
            "mystnb": {"image": {"alt": alt}, "figure": {"name": name, "caption": caption}},
        },
        raw=True,
    )


def say(text: str, **values: Any) -> None:
    """Display Markdown in which {name} stands for a computed value; the values are kept for other pages as shown here.

    Of an `Estimate` the values behind it, one a seed, and its interval are kept too: for the comparison with reference
    results.

    A value is a number, an `Estimate` or a text of our own (texts from data belong in `texts`); formats are those of
    `str.format`, e.g. {gain:+.1f}.
    """
    formats = {name: spec for _, name, spec, _ in string.Formatter().parse(text) if name}
    kept = {}
    for name, value in values.items():
        number = value.mean if isinstance(value, Estimate) else value
        number = number.item() if isinstance(number, np.generic) else number
        plain = number if isinstance(number, int | float | str) else str(number)
        kept[name] = {"value": plain, "text": format(value, formats.get(name, ""))}
        if isinstance(value, Estimate) and 0 < len(value.values) <= MOST_SEEDS:
            kept[name]["seeds"] = list(value.values)
        if isinstance(value, Estimate) and np.isfinite(value.low):
            kept[name] |= {"interval": [value.low, value.high], "n": value.n}
    shown = text.format(**values)
    display({"text/markdown": shown, "text/plain": shown}, metadata={KEY: {"values": kept}}, raw=True)


def data(known: Dataset) -> None:
    """Display what was read of a preference file, left out (by reason) and cut; of the world, what the limits change.

    The digest of the pairs stays with the output, so that a test can tell whether they are the ones that runs read.
    """
    account, kept = known.account, {DIGEST: known.digest()}
    if account.records or account.changed():
        texts(({"of the data": what, "": how_much} for what, how_much in account.rows()), **kept)
    else:
        shown = f"Data: {len(known.pairs)} pairs to train on, {len(known.check)} to check on; no text is cut."
        display({"text/markdown": shown, "text/plain": shown}, metadata={KEY: kept}, raw=True)


def markdown(text: str) -> None:
    """Display Markdown of our own as it is; texts from data belong in `texts`."""
    display({"text/markdown": text, "text/plain": text}, raw=True)


def table(frame: pd.DataFrame, digits: int = 2) -> None:
    """Display a table; all text in it is escaped, so data cannot become part of the page."""

    def number(x: float) -> str:
        return f"{x:.{digits}f}" if round(x, digits) else f"{0:.{digits}f}"  # never "-0.0"

    with pd.option_context("display.max_colwidth", None):
        shown = frame.to_html(index=False, escape=True, border=0, classes="dataframe", float_format=number, na_rep="–")
    display({"text/html": shown, "text/plain": frame.to_string(index=False)}, raw=True)


def texts(rows: Iterable[dict[str, Any]], **kept: Any) -> None:
    """Display rows of named texts (prompts, replies) as a table whose columns wrap, if any; all is escaped.

    kept: what stays with the output, unseen.
    """
    rows = list(rows)
    if not rows:
        return
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    plain = "\n".join(" | ".join(map(str, row.values())) for row in rows)
    display(
        {
            "text/html": f'<table class="dataframe texts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
            "text/plain": plain,
        },
        metadata={KEY: kept},
        raw=True,
    )


def shaded(rows: Iterable[tuple[str, Sequence[str], Sequence[float]]]) -> None:
    """Display texts whose tokens are shaded by a number: blue and underlined above 0, orange and dotted below.

    Args: rows of (name, tokens, one number a token). The shade is relative to the largest absolute number of its row,
    which is shown beside the name; each number is the title of its token. All text is escaped. Raises ValueError for a
    number that is not finite.
    """
    rows = [(name, list(tokens), list(values)) for name, tokens, values in rows]
    for name, _, values in rows:
        if not np.isfinite(np.asarray(values, float)).all():
            raise ValueError(f"shaded: a number of {name!r} is not finite")
    body, plain = [], []
    for name, tokens, values in rows:
        most = max(map(abs, values), default=0.0)
        spans = [_shade(token, value, most) for token, value in zip(tokens, values, strict=True)]
        head = f'{html.escape(name)}<br><span style="font-size:85%">most: {most:.2g}</span>'
        style = "text-align:left;white-space:nowrap"
        body.append(f'<tr><th scope="row" style="{style}">{head}</th><td>{" ".join(spans)}</td></tr>')
        plain.append(f"{name}: " + " ".join(f"{t} ({v:+.2g})" for t, v in zip(tokens, values, strict=True)))
    display(
        {
            "text/html": f'<table class="dataframe texts shaded"><tbody>{"".join(body)}</tbody></table>',
            "text/plain": "\n".join(plain),
        },
        raw=True,
    )


def _shade(token: str, value: float, most: float) -> str:
    """One token of `shaded`: on a light card of its own, so that it can be read on light and dark pages."""
    red, green, blue, line = (86, 160, 220, "solid") if value >= 0 else (240, 150, 70, "dotted")
    alpha = abs(value) / most if most > 0 else 0.0
    ground = ", ".join(f"{round(251 + (c - 251) * alpha)}" for c in (red, green, blue))
    style = f"background:rgb({ground});color:#1b1b22;border-bottom:2px {line} #55555f;padding:1px 3px;border-radius:3px"
    return f'<span style="{style}" title="{value:+.3g}">{html.escape(token.strip() or "␣")}</span>'


def provenance(runs: Iterable[Run], parameters: Any) -> None:
    """Display what a chapter's results come from: parameters, packages, runs and their time, how G was measured."""
    runs = list({run.key: run for run in runs}.values())
    known = [run.json("provenance") for run in runs]
    versions = known[0]["versions"]
    hardware = {
        f"{k['hardware']['system']} {k['hardware']['machine']}, {k['hardware']['accelerator'] or 'CPU'}, "
        f"{k['hardware']['threads']} thread(s) a run"
        for k in known
    }
    ways = {"forward": "forward mode", "central": "central differences"}
    measured = {ways[spec["method"]] for run in runs if (spec := run.json("spec")).get("kind") == "alignment"}
    left_out = {"dataset", *parameters.idle()}  # where a file lies is nobody's business, and the others had no part
    rows = [
        ("parameters", ", ".join(f"{k}={v!r}" for k, v in parameters.model_dump().items() if k not in left_out)),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("hardware", "; ".join(sorted(hardware))),
        ("runs", f"{len(runs)}, computed in {sum(k['seconds'] for k in known):.0f} s of one process"),
        ("keys", ", ".join(run.key for run in runs)),
    ]
    rows += [("G measured by", ", ".join(sorted(measured)))] if measured else []
    texts({"": name, "of these results": value} for name, value in rows)


def collect_values(notebook: dict) -> dict[str, dict]:
    """The values that `say` left in an executed notebook (as JSON), by name. Raises ValueError on a name used twice."""
    values: dict[str, dict] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            new = output.get("metadata", {}).get(KEY, {}).get("values", {})
            twice = {name for name in new if name in values and json.dumps(values[name]) != json.dumps(new[name])}
            if twice:
                raise ValueError(f"the chapter gives two different values for {sorted(twice)}")
            values |= new
    return values
