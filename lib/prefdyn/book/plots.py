"""The book's figures: one style, seeds as thin lines, their mean with its interval on top."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from ..findings.stats import Estimate, over_seeds

PAPER = "#fbfaf7"  # a background that suits light and dark pages
INK = "#2b2b33"
MARKS = {"as predicted": "+", "against the prediction": "–", "undecided": "?"}  # verdicts on rules
SHADES = {"as predicted": "blue", "against the prediction": "orange", "undecided": "grey"}
# Okabe and Ito's colours, told apart with colour-blindness too
COLOURS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "yellow": "#B58900",
    "grey": "#6b6b73",
}


def style() -> None:
    """Set the book's style for all figures that follow."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.labelsize": 11.5,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "legend.fontsize": 10.5,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        },
    )


def panels(rows: int, height: float = 2.9, **kwargs) -> tuple[Figure, list[Axes]]:
    """A column of `rows` panels, narrow enough to be read on a phone."""
    fig, axes = plt.subplots(rows, 1, figsize=(6.4, height * rows), squeeze=False, **kwargs)
    return fig, list(axes[:, 0])


def over_training(
    ax: Axes, table: pd.DataFrame, y: str, *, colour: str, label: str, x: str = "step", dash: str = "-"
) -> None:
    """Draw `y` over training: each seed thin, the mean over seeds thick, its 95% interval as a band."""
    for _, one in table.groupby("seed"):
        ax.plot(one[x], one[y], color=COLOURS[colour], lw=0.8, alpha=0.45, ls=dash)
    mean = over_seeds(table, x, y)
    ax.plot(mean[x], mean["mean"], color=COLOURS[colour], lw=2.2, ls=dash, label=label, marker="o", ms=3.5)
    if mean["low"].notna().any():
        ax.fill_between(mean[x], mean["low"], mean["high"], color=COLOURS[colour], alpha=0.15, lw=0)


def compare(
    ax: Axes, table: pd.DataFrame, y: str, by: str, colours: dict[str, str], x: str = "step", dash: str = "-"
) -> None:
    """Draw `y` over training for each value of the column `by` that `colours` names, as `over_training` does.

    Raises ValueError for a name that the table does not have.
    """
    missing = set(colours) - set(table[by])
    if missing:
        raise ValueError(f"compare: no {by} {sorted(missing)} in the table; there are {sorted(set(table[by]))}")
    for name, colour in colours.items():
        over_training(ax, table[table[by] == name], y, colour=colour, label=name, x=x, dash=dash)


def looks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """How to draw a line for each name: all colours with whole lines first, then with dashed and with dotted ones."""
    colours, dashes = list(COLOURS.values()), ("-", "--", ":", "-.")
    return {
        name: {"color": colours[i % len(colours)], "ls": dashes[i // len(colours) % len(dashes)]}
        for i, name in enumerate(names)
    }


def forest(
    ax: Axes, names: Sequence[str], found: Mapping[str, Sequence[Estimate]], small: float = 0.0, at: float = 0.0
) -> None:
    """Estimates with their intervals, a row a name, a colour a measure of `found`; dotted: `at`; grey: no more than
    `small` from it."""
    gap = 0.66 / max(1, len(found))
    for i, ((label, estimates), colour) in enumerate(zip(found.items(), COLOURS.values(), strict=False)):
        places = [row + (i - (len(found) - 1) / 2) * gap for row in range(len(names))]
        ax.plot([e.mean for e in estimates], places, "o", ms=5, color=colour, label=label)
        ax.hlines(places, [e.low for e in estimates], [e.high for e in estimates], lw=1.6, color=colour)
    ax.axvspan(at - small, at + small, color=COLOURS["grey"], alpha=0.15, lw=0)
    ax.axvline(at, color=COLOURS["grey"], lw=0.8, ls=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()


def marks(
    ax: Axes, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], tuple[str, str, float]]
) -> None:
    """A table of marks: cells, (row, column) -> (mark, name of a colour, strength of the colour from 0 to 1)."""
    for (row, column), (mark, colour, strength) in cells.items():
        x, y = columns.index(column), rows.index(row)
        ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=COLOURS[colour], alpha=strength, lw=0))
        ax.text(x, y, mark, ha="center", va="center", fontsize=11)
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="left")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def verdicts(first: tuple[str, Mapping[str, str]], others: pd.DataFrame) -> Figure:
    """Verdicts on rules as a table of marks: a setting a row, a rule a column, `first` on top and stronger.

    Args: first, how its row is called and its verdicts by rule. others, with the columns setting, rule and verdict;
    it names the rules that are shown.
    """
    settings, rules = ([*dict.fromkeys(others[name])] for name in ("setting", "rule"))
    title, verdicts = first
    told = [((title, rule), verdicts[rule], 0.7) for rule in rules if rule in verdicts]
    told += [((row.setting, row.rule), row.verdict, 0.4) for row in others.itertuples()]
    fig, ax = plt.subplots(figsize=(6.4, 0.27 * len(settings) + 1.4))
    marks(ax, [title, *settings], rules, {cell: (MARKS[word], SHADES[word], depth) for cell, word, depth in told})
    return fig


def signed_log(ax: Axes, axis: str, values: pd.Series) -> None:
    """A scale for `values` of either sign and many sizes on `axis` ("x" or "y"): logarithmic away from 0, few ticks."""
    size = values.abs()[values != 0]
    top = float(np.floor(np.log10(size.max())))
    bottom = max(float(np.floor(np.log10(size.quantile(0.2)))), top - 4)
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=10**bottom, linscale=0.5)
    powers = np.unique(np.linspace(bottom, top, 3).round())
    ticks = [*(-(10**powers)), 0, *(10**powers)]
    limits = values.min(), values.max()
    getattr(ax, f"{axis}axis").set_ticks(sorted(t for t in ticks if limits[0] <= t <= limits[1] or t == 0))
    getattr(ax, f"{axis}axis").set_minor_locator(NullLocator())
    room = 10**bottom
    getattr(ax, f"set_{axis}lim")(min(2 * limits[0], -room), max(2 * limits[1], room))


def zero_line(ax: Axes, at: float = 0.0) -> None:
    """A fine line where a quantity changes its meaning."""
    ax.axhline(at, color=COLOURS["grey"], lw=0.8, ls=":", zorder=0)
