"""The report of a lens folder: one HTML file that needs nothing else, no server, no network and no script.

Sentences and captions are computed from the folder's tables; their words stand for stated rules. All text that comes
from data is escaped.
"""

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .report_figures import Drawn, figures
from .report_folder import Folder, Missing, ReportError, in_one_move, read
from .report_tokens import pictures
from .report_words import DASH, count, headline, listed, number, seen

__all__ = ["ReportError", "write"]

NAME = "report.html"
MOST_ROWS = 400  # of a table on the page
WORDS = (
    ("d", "the gradient of the mean log-likelihood of the target responses: the direction that makes them more likely"),
    ("G", "⟨d, −∇L⟩, in nats a unit of learning rate: a plain gradient step of size η on the loss L changes the "
     "mean log-likelihood of the targets by η·G, to first order"),
    ("w, a", "w = −∂L/∂log p of a token, a = ⟨∇log p, d⟩; G is the sum of w·a over tokens, so that parts of it are "
     "sums over fewer tokens"),
    ("positive, negative", "the tokens with w > 0 (the loss raises their log-prob) and with w < 0 (it lowers it)"),
    ("top, middle, bottom", "thirds of the units (pairs or tokens) by the strength with which the loss weighs them"),
    ("se", "standard error over examples; g ± 1.96 se is a 95% interval"),
)  # fmt: skip


def write(folder: Path) -> Path:
    """Write report.html into a lens folder, from its about.json and tables; return its path.

    Tables that a live measurement left as JSON lines are turned into parquet first. A table that is not there leaves
    out its part of the report, which says so. Raises ReportError, a ValueError, that names the file, and the key or
    column in it, that is missing or wrong; then a report that was there before stays as it is.
    """
    folder = Path(folder)
    page = _page(read(folder))
    in_one_move(folder / NAME, lambda path: path.write_text(page, encoding="utf-8"))
    return folder / NAME


def _page(folder: Folder) -> str:
    style = resources.files("prefdyn.book").joinpath("report.css").read_text(encoding="utf-8")
    title = _text(folder.about.title)
    sections = [
        ("found", "What was found", _found(folder)),
        ("figures", "In figures", _figures(folder)),
        ("tokens", "Which tokens it comes from", _tokens(folder)),
        ("data", "What was read and cut", _data(folder)),
        ("how", "How it was measured", _how(folder)),
        ("provenance", "Where it comes from", _provenance(folder)),
        ("numbers", "All numbers", _numbers(folder)),
    ]
    links = "".join(f"<li><a href='#{key}'>{name}</a></li>" for key, name, _ in sections)
    body = "".join(
        f"<section aria-labelledby='{key}'><h2 id='{key}'>{name}</h2>{inside}</section>"
        for key, name, inside in sections
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>{title}</title><style>{style}</style></head>\n<body><header><p class='quiet'>"
        f"A lens report{_made(folder)}</p><h1 dir='auto'>{title}</h1>{_lede(folder)}"
        f"<nav aria-label='On this page'><ul>{links}</ul></nav></header>\n<main>{body}</main></body></html>\n"
    )


# --- texts and tables ------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as escaped text: numbers in full, a dash for what is not known."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:g}".replace("-", "−") if np.isfinite(value) else DASH
    if isinstance(value, int | np.integer):
        return number(value)
    return html.escape(seen(str(value)))


def _rows(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a table of two columns; both are escaped."""
    body = "".join(
        f"<tr><th scope='row'>{_text(name)}</th><td dir='auto'>{_text(value)}</td></tr>" for name, value in rows
    )
    return f"<table class='pairs'><tbody>{body}</tbody></table>"


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: str = "") -> str:
    """A table in a region of its own that scrolls; of many rows the first and the last ones, and where all are."""
    shown, left = list(rows), ""
    if len(shown) > MOST_ROWS:
        half = MOST_ROWS // 2
        shown = shown[:half] + shown[-half:]
        where = f"; all are in {file}" if file else ""
        left = f"<p class='quiet'>The first and the last {half} of {number(len(rows))} rows{where}.</p>"
    head = "".join(f"<th scope='col'>{_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in shown)
    return (
        f"{left}<div class='scroll' role='region' aria-label='{html.escape(name, quote=True)}' tabindex='0'>"
        f"<table class='numbers'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>"


def _file(table: str) -> str:
    return f"<code>{table}.parquet</code>"


# --- sections --------------------------------------------------------------------------------------------------------


def _made(folder: Folder) -> str:
    return f", {_text(folder.about.made.replace('T', ' '))}" if folder.about.made else ""


def _lede(folder: Folder) -> str:
    """What was measured, in two sentences."""
    about, steps = folder.about, folder.steps()
    method = about.method.title or about.method.name or "a loss whose name is not known"
    if about.method.loss and about.method.loss not in (about.method.title, about.method.name):
        method += f" (loss: {about.method.loss})"
    where = f"at {count(len(steps), 'checkpoint')}" if about.kind == "after" else count(len(steps), "time")
    where += (
        f" ({'step' if len(steps) == 1 else 'steps'} {' to '.join(map(number, dict.fromkeys([steps[0], steps[-1]])))})"
        if steps
        else ""
    )
    shape = f"{number(about.model.parameters)} parameters, of which {number(about.model.moving)} are trained"
    if about.model.parameters and about.model.moving is not None:
        shape += f" ({number(100 * about.model.moving / about.model.parameters)}%)"
    kind = (about.model.model_extra or {}).get("class") or "a model whose class is not known"
    first = (
        f"{method} was measured {where}, on {number(about.data.used)} of {number(about.data.records)} records "
        f"of {about.data.name or 'data without a name'}."
    )
    second = (
        f"It asks whether a step on this loss makes {number(about.targets.count)} target responses "
        f"({about.targets.what or DASH}) more likely, for {kind} with {shape}."
    )
    return f"<p class='lede'>{_text(first)} {_text(second)}</p>"


def _found(folder: Folder) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in headline(folder))
    words = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in WORDS)
    return f"<ul class='found'>{items}</ul>{_folded('What the words mean', f'<dl>{words}</dl>')}"


def _figures(folder: Folder) -> str:
    drawn, lacking = figures(folder)
    left_out = "".join(f"<li>{_text(reason)}</li>" for reason in lacking)
    left_out = f"<p>Not drawn, since what they need is missing:</p><ul>{left_out}</ul>" if lacking else ""
    return f"<div class='figures'>{''.join(map(_figure, drawn))}</div>{left_out}"


def _figure(drawn: Drawn) -> str:
    return (
        f"<figure><h3>{_text(drawn.title)}</h3>{drawn.svg}<figcaption>{_text(drawn.caption)} "
        f"<span class='quiet'>The data: {_file(drawn.table)}, beside this file.</span></figcaption></figure>"
    )


def _tokens(folder: Folder) -> str:
    try:
        return pictures(folder)
    except Missing as missing:
        return f"<p>Left out: {_text(missing)}.</p>"


def _data(folder: Folder) -> str:
    data, targets = folder.about.data, folder.about.targets
    known = [count for count in data.left_out.values() if count is not None]
    rows = [
        ("data", data.name),
        ("records read", data.records),
        ("used", data.used),
        ("left out", sum(known)),
        *((f"left out: {reason}", many) for reason, many in data.left_out.items()),
        ("prompts cut", data.cut.prompts),
        ("chosen responses cut", data.cut.chosen),
        ("rejected responses cut", data.cut.rejected),
        ("longest prompt, tokens", data.max_prompt),
        ("longest response, tokens", data.max_response),
        ("targets", targets.what),
        ("target responses", targets.count),
        ("how targets were taken", targets.sentence),
    ]
    return _rows(rows)


def _how(folder: Folder) -> str:
    about = folder.about
    ways = {"forward": "forward mode", "central": "central differences"}
    cost, model = about.cost, about.model
    rows = [
        ("scores by", ways.get(about.accuracy.method, about.accuracy.method)),
        ("accuracy", about.accuracy.sentence),
        ("time", None if cost.seconds is None else f"{number(cost.seconds)} s"),
        ("share of the training time", None if cost.share is None else f"{number(100 * cost.share)}%"),
        ("rows a pass", cost.rows),
        ("memory", cost.memory),
        ("numbers of the model", model.dtype),
        ("adapter", model.adapter),
    ]
    notes = "".join(f"<li dir='auto'>{_text(note)}</li>" for note in [*about.notes, *folder.notes])
    return _rows(rows) + (f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "")


def _provenance(folder: Folder) -> str:
    about = folder.about
    command = f"<h3>Command</h3><pre><code>{_text(about.command)}</code></pre>" if about.command else ""
    rows = [
        ("method", about.method.name),
        ("loss", about.method.loss),
        *((f"setting: {name}", value) for name, value in (about.method.settings or {}).items()),
        ("reference", about.reference),
        ("hardware", about.hardware),
        ("packages", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
    ]
    if not about.models:
        return command + _rows(rows)
    models = [(model.step, model.name, model.sha256) for model in about.models]
    inside = _table("Models", ("step", "folder", "sha256"), models, "about.json")
    return command + _rows(rows) + _folded(f"The models: {count(len(models), 'folder')} and their hashes", inside)


def _numbers(folder: Folder) -> str:
    parts, lacking = [], []
    for name in ("alignment", "likelihood"):
        try:
            table = folder.table(name)
        except Missing as missing:
            lacking.append(f"<p>Left out: {_text(missing)}.</p>")
            continue
        rows = [
            [_cell(*pair) for pair in zip(table.columns, row, strict=True)] for row in table.itertuples(index=False)
        ]
        inside = _table(f"Table {name}", list(table.columns), rows, f"{name}.parquet")
        parts.append(_folded(f"{name}: {count(len(rows), 'row')}", inside))
    beside = listed([f"{name}.parquet" for name in folder.tables], 9)
    return "".join([*parts, *lacking]) + f"<p class='quiet'>Tables beside this file: {_text(beside)}.</p>"


def _cell(column: str, value: Any) -> Any:
    """A value of a table: counts in full, other numbers in four digits."""
    if isinstance(value, float):
        return number(int(value) if column == "n" and value.is_integer() else value, 4)
    return value
