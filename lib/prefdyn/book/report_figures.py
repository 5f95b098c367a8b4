"""The figures of a report: small SVG whose text is text and whose colours are the page's, with computed captions."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import plots
from .report_folder import Folder, Missing
from .report_words import (
    SURE,
    at,
    changes,
    count,
    known,
    listed,
    number,
    said,
    seen,
    signed,
    signs,
    span,
    with_error,
)

SIZE = (4.6, 2.9)  # inches: as wide as a phone shows at its natural size, two beside each other on a desk
MOST_POINTS = 400  # of a line
MARKED = 40  # points up to which each gets a mark
APART = 11.0  # points between the labels of lines
ROOM = {"left": 0.17, "right": 0.77, "bottom": 0.17, "top": 0.95}  # of the axes within a figure; labels at the right
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefdyn",
    "text.parse_math": False,  # a name with $ in it is a name
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": False,
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 9.5),
}
ON_PAGE = {plots.INK: "ink", **{colour: name for name, colour in plots.COLOURS.items()}}
HALVES = {"positive": ("blue", "-"), "negative": ("orange", "--")}
THIRDS = {"top": ("blue", "-"), "middle": ("green", "--"), "bottom": ("orange", ":")}
KINDS = {"chosen": ("blue", "-"), "rejected": ("orange", "--"), "target": ("green", ":")}
PARTS_OF_LAYER = {"attention": ("blue", "-"), "mlp": ("orange", "--"), "norms": ("green", ":")}


@dataclass(frozen=True)
class Drawn:
    """A figure: its title, picture (SVG, named by `alt`), caption, and the table that it is drawn from."""

    title: str
    svg: str
    caption: str
    table: str


def figures(folder: Folder) -> tuple[list[Drawn], list[str]]:
    """All figures that a folder has the numbers for, and what is missing for the others."""
    over_time = [_g, _cosine, _g_opt, _halves, _thirds, _likelihoods, _moved]
    steps = folder.steps()
    makers = ([_components] if len(steps) == 1 else over_time) + [_layers]
    makers += [_every_step] if folder.about.kind == "live" else []
    drawn, lacking = [], []
    with matplotlib.rc_context():  # whoever trains beside this keeps their own style
        plots.style()
        matplotlib.rcParams.update(SETTINGS)
        for make in makers:
            try:
                drawn.append(make(folder))
            except Missing as missing:
                lacking.append(f"{make.__doc__.split(':')[0]}: {missing}.")
    return drawn, lacking


# --- drawing ---------------------------------------------------------------------------------------------------------


class _Panel:
    """One pair of axes whose lines are labelled at their ends."""

    def __init__(self, x: str, y: str, height: float = SIZE[1], room: dict[str, float] = ROOM):
        self.figure = Figure(figsize=(SIZE[0], height))
        self.ax: Axes = self.figure.subplots(gridspec_kw=room)
        self.ax.set(xlabel=x, ylabel=y)
        self.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4))
        self.ends: list[tuple[float, str, str]] = []

    def line(self, x, y, colour: str, dash: str = "-", label: str = "", se=None) -> None:
        """A line with its 95% band, of a point that stands alone a bar; few points get marks."""
        x, y = np.asarray(x, float), np.asarray(y, float)
        some = _thinned(len(x))
        style = {"marker": "o", "ms": 3.5} if len(x) <= MARKED else {}
        self.ax.plot(x[some], y[some], color=plots.COLOURS[colour], ls=dash, lw=1.8, **style)
        if se is not None and np.isfinite(se).any():
            half = SURE * np.asarray(se, float)
            band = {"color": plots.COLOURS[colour], "alpha": 0.16, "lw": 0}
            self.ax.fill_between(x[some], (y - half)[some], (y + half)[some], **band)
            alone = _alone(np.isfinite(y[some]))  # a band has no width there
            bar = {"fmt": "none", "ecolor": plots.COLOURS[colour], "elinewidth": 1.2, "alpha": 0.6}
            self.ax.errorbar(x[some][alone], y[some][alone], half[some][alone], **bar)
        if label and np.isfinite(y).any():
            self.ends.append((float(y[np.isfinite(y)][-1]), label, plots.COLOURS[colour]))

    def whole_steps(self) -> None:
        """Ticks at whole steps, few enough for five digits."""
        self.ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        self.ax.xaxis.set_major_formatter(lambda value, _: number(round(value)) if float(value).is_integer() else "")

    def svg(self, key: str, alt: str) -> str:
        """The figure as an SVG element of a page, with names of its own for what it refers to."""
        self._label_ends()
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True)
        return _for_page(buffer.getvalue(), key, alt)

    def _label_ends(self) -> None:
        """Labels beside the right end of the axes, at the height of their lines but never over each other."""
        low, high = self.ax.get_ylim()
        tall = self.figure.get_figheight() * 72 * (ROOM["top"] - ROOM["bottom"])
        wanted = sorted(((y - low) / (high - low) * tall, text, colour) for y, text, colour in self.ends)
        places: list[float] = []
        for y, _, _ in wanted:
            places.append(max(y, places[-1] + APART) if places else y)
        over = max(0.0, places[-1] - tall) if places else 0.0
        for place, (_, text, colour) in zip(places, wanted, strict=True):
            where = {"xy": (1, (place - over) / tall), "xycoords": "axes fraction", "textcoords": "offset points"}
            self.ax.annotate(text, xytext=(4, 0), va="center", color=colour, fontsize=9.5, **where)


def _alone(known: np.ndarray) -> np.ndarray:
    """Which of the known points have no known one beside them."""
    around = np.pad(known, 1)
    return known & ~around[:-2] & ~around[2:]


def _thinned(points: int) -> np.ndarray:
    """Which of `points` are drawn: all, or MOST_POINTS evenly spaced with the first and the last."""
    return np.unique(np.linspace(0, points - 1, min(points, MOST_POINTS)).round().astype(int))


def _thinning(points: int) -> str:
    """A sentence on what is not drawn."""
    return (
        f" Of {number(points)} points {number(MOST_POINTS)}, evenly spaced, are drawn." if points > MOST_POINTS else ""
    )


def _for_page(svg: str, key: str, alt: str) -> str:
    """An SVG file as an element of a page: colours by the page's variables, identifiers that start with `key`."""
    view = re.search(r'viewBox="([^"]*)"', svg)[1]
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{key}-', body).replace("url(#", f"url(#{key}-")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    for colour, name in ON_PAGE.items():
        body = re.sub(re.escape(colour), f"var(--{name})", body, flags=re.IGNORECASE)
    body = re.sub(r">\s+<", "><", body)
    # hundredths of a point are enough for places, while the numbers of texts stay as they are
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), body)
    return f'<svg viewBox="{view}" role="img" aria-label="{html.escape(alt)}">{body.strip()}</svg>'


# --- figures over training -------------------------------------------------------------------------------------------


def _over_steps(table: pd.DataFrame, value: str, error: str, y: str) -> _Panel:
    panel = _Panel("training step", y)
    panel.line(table["step"], table[value], "blue", se=table[error] if error else None)
    plots.zero_line(panel.ax)
    panel.whole_steps()
    return panel


def _extremes(table: pd.DataFrame, value: str) -> str:
    """Where a quantity is largest and smallest."""
    high, low = (table.loc[i] for i in (table[value].idxmax(), table[value].idxmin()))
    return (
        f"largest {signed(high[value])} at step {number(int(high['step']))}, "
        f"smallest {signed(low[value])} at step {number(int(low['step']))}"
    )


def _g(folder: Folder) -> Drawn:
    """G over training: the whole loss, with its band."""
    table = known(folder.component("full"), "g")
    panel = _over_steps(table, "g", "se", "G, nats a unit of learning rate")
    caption = (
        f"G of the whole loss is {said(signs(table), 'g', folder.noun)}. Line: g; band: g ± {SURE} se; dotted: 0. "
        f"It goes {span(table, 'g', 'se')}; {_extremes(table, 'g')}."
    )
    alt = f"G over training steps with its 95% band and a line at 0: {span(table, 'g', 'se')}."
    return Drawn("G over training", panel.svg("g", alt), caption + _thinning(len(table)), "alignment")


def _cosine(folder: Folder) -> Drawn:
    """Cosine: of d and the descent direction."""
    table = known(folder.component("full"), "cosine")
    panel = _over_steps(table, "cosine", "", "cosine of d and −∇L")
    above = int((table["cosine"] > 0).sum())
    caption = (
        f"The cosine of d and the descent direction −∇L is above 0 at {number(above)} of the "
        f"{count(len(table), folder.noun)} where it is known; {_extremes(table, 'cosine')}."
    )
    scaled = table[table["cosine_opt"].notna()]
    if len(scaled):
        panel.ends.append((float(table["cosine"].iloc[-1]), "plain", plots.COLOURS["blue"]))
        panel.line(scaled["step"], scaled["cosine_opt"], "orange", "--", "optimiser's")
        caption += f" As the optimiser scales the step (dashed): {_extremes(scaled, 'cosine_opt')}."
    alt = f"Cosine of d and the descent direction over training steps: {_extremes(table, 'cosine')}."
    return Drawn(
        "How well the directions agree", panel.svg("cosine", alt), caption + _thinning(len(table)), "alignment"
    )


def _g_opt(folder: Folder) -> Drawn:
    """G for the optimiser's steps: the whole loss, scaled as the optimiser scales a gradient."""
    table = known(folder.component("full"), "g_opt")
    panel = _over_steps(table, "g_opt", "se_opt", "G for the optimiser's step")
    clause = said(signs(table, "g_opt", "se_opt"), "g_opt", folder.noun)
    caption = f"G for a step as the optimiser scales it is {clause}. It goes {span(table, 'g_opt', 'se_opt')}."
    alt = f"G for the optimiser's steps over training, with its 95% band: {span(table, 'g_opt', 'se_opt')}."
    return Drawn("G for the optimiser's steps", panel.svg("g-opt", alt), caption + _thinning(len(table)), "alignment")


def _several(folder: Folder, looks: dict[str, tuple[str, str]]) -> tuple[_Panel, dict[str, pd.DataFrame]]:
    """Components over training in one panel, and the rows of each where G is known."""
    panel = _Panel("training step", "G, nats a unit of learning rate")
    found = {}
    for name, (colour, dash) in looks.items():
        rows = folder.component(name)
        known(rows, "g")
        panel.line(rows["step"], rows["g"], colour, dash, name, rows["se"])
        found[name] = rows[rows["g"].notna()].reset_index(drop=True)
    plots.zero_line(panel.ax)
    panel.whole_steps()
    return panel, found


def _halves(folder: Folder) -> Drawn:
    """Halves: tokens that the loss raises (positive) and lowers (negative)."""
    panel, found = _several(folder, HALVES)
    both = found["positive"].merge(found["negative"], on="step", suffixes=("", "_negative"))
    opposite = int((both["g"] * both["g_negative"] < 0).sum())
    each = "; ".join(f"{name} {span(rows, 'g', 'se')}" for name, rows in found.items())
    caption = (
        f"G of the tokens whose log-prob the loss raises (positive) and lowers (negative), bands ± {SURE} se: {each}. "
        f"The two have opposite signs at {number(opposite)} of {count(len(both), folder.noun)}."
    )
    alt = f"G of the positive and of the negative half over training steps: {each}."
    return Drawn("The two halves of the loss", panel.svg("halves", alt), caption + _thinning(len(both)), "alignment")


def _thirds(folder: Folder) -> Drawn:
    """Thirds: units by their strength."""
    panel, found = _several(folder, THIRDS)
    wide = pd.concat({name: rows.set_index("step")["g"] for name, rows in found.items()}, axis=1).dropna()
    largest = wide.abs().idxmax(axis=1).value_counts()
    each = ", ".join(f"{name} at {number(int(largest.get(name, 0)))}" for name in THIRDS)
    caption = (
        f"G of the thirds of units by strength, bands ± {SURE} se. Of {count(len(wide), folder.noun)} the largest |G| "
        f"is that of {each}."
    )
    if undefined := sorted(set(folder.steps()) - set(wide.index)):
        caption += f" Not known at {at(undefined)}: where all strengths are equal there are no thirds."
    alt = f"G of the top, middle and bottom third over training steps; the largest of the three: {each}."
    return Drawn("By strength", panel.svg("thirds", alt), caption + _thinning(len(wide)), "alignment")


def _likelihoods(folder: Folder) -> Drawn:
    """Log-probs: of chosen, rejected and target responses."""
    found = [change for change in changes(folder) if len(change.steps) > 1]
    if not found:
        raise Missing("the log-probs of two steps are needed")
    panel = _Panel("training step", "change, nats a response")
    for i, change in enumerate(found):
        colour, dash = KINDS.get(change.kind, (("pink", "yellow", "grey")[i % 3], "-."))
        panel.line(change.steps, change.since, colour, dash, _short(change.kind), change.se)
    plots.zero_line(panel.ax)
    panel.whole_steps()
    each = "; ".join(
        f"{seen(c.kind)} {with_error(c.since[-1], c.se[-1])} at step {number(int(c.steps[-1]))}" for c in found
    )
    banded = [seen(c.kind) for c in found if np.isfinite(c.se).any()]
    first = {int(c.steps[0]) for c in found}
    since = f"step {number(*first)}" if len(first) == 1 else "the first step at which it is known"
    caption = f"Mean log-likelihood of a response, as its change since {since}: {each}. "
    caption += (
        f"Bands (± {SURE} se of the change of the same responses): {listed(banded)}."
        if banded
        else "Standard errors of the changes are not known."
    )
    source = "likelihood" if "likelihood" in folder.tables else "alignment"
    alt = f"Change of mean log-likelihoods over training steps: {each}."
    longest = max(len(c.steps) for c in found)
    return Drawn("What log-probs did", panel.svg("logps", alt), caption + _thinning(longest), source)


def _moved(folder: Folder) -> Drawn:
    """Real updates: how far they went along d, and what the targets' log-likelihood did."""
    table = folder.component("full")
    real = table["logp_targets"].shift(-1) - table["logp_targets"]
    table = known(known(table.assign(real=real), "moved"), "real")
    panel = _Panel("training step at the start", "nats until the next one")
    panel.line(table["step"], table["moved"], "blue", "-", "⟨d, update⟩")
    panel.line(table["step"], table["real"], "green", ":", "real change")
    plots.zero_line(panel.ax)
    panel.whole_steps()
    same = int((np.sign(table["moved"]) == np.sign(table["real"])).sum())
    caption = (
        f"What the update to the next {folder.noun} promises to first order, ⟨d, update⟩, and what the targets' mean "
        f"log-likelihood then did: the same sign in {number(same)} of {count(len(table), 'interval')}. In sum "
        f"{signed(table['moved'].sum())} and {signed(table['real'].sum())} nats a response."
    )
    alt = f"Inner product of d with the real updates, beside the real change; same sign in {same} of {len(table)}."
    return Drawn("What the real updates did", panel.svg("moved", alt), caption + _thinning(len(table)), "alignment")


def _short(kind: str) -> str:
    """A kind of response as a label of at most 11 characters."""
    text = seen(kind)
    return text if len(text) <= 11 else f"{text[:10]}…"


# --- other figures ---------------------------------------------------------------------------------------------------


def _components(folder: Folder) -> Drawn:
    """G and its parts: at the only step."""
    names = [name for name in ("full", *HALVES, *THIRDS) if name in set(folder.table("alignment")["component"])]
    table = known(pd.concat([folder.component(name) for name in names]), "g")
    rows, tall = np.arange(len(table)), 0.32 * len(table) + 0.9
    room = {"left": 0.2, "right": 0.95, "bottom": 0.6 / tall, "top": 1 - 0.1 / tall}
    panel = _Panel("G, nats a unit of learning rate", "", tall, room)
    half = (SURE * table["se"]).fillna(0)
    panel.ax.hlines(rows, table["g"] - half, table["g"] + half, color=plots.COLOURS["blue"], lw=2)
    panel.ax.plot(table["g"], rows, "o", ms=5, color=plots.COLOURS["blue"])
    panel.ax.axvline(0, color=plots.COLOURS["grey"], lw=0.8, ls=":")
    panel.ax.set_yticks(rows, table["component"])
    panel.ax.set_ylim(len(table) - 0.5, -0.5)
    panel.ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4))
    each = "; ".join(f"{row.component} {with_error(row.g, row.se)}" for row in table.itertuples())
    step = number(folder.steps()[0])
    caption = f"G at step {step}, of the whole loss and of its parts, with g ± {SURE} se; dotted: 0. {each}."
    if lost := [name for name in names if name not in set(table["component"])]:
        caption += f" Not known: {listed(lost)} (where all strengths are equal there are no thirds)."
    return Drawn("G and its parts", panel.svg("parts", f"G at step {step} by component: {each}."), caption, "alignment")


def _places(groups: Sequence[str]) -> tuple[dict[str, tuple[float, str]], list[tuple[float, str]]]:
    """Where groups of parameters stand from input to output: {group: (place, part of its layer)} and ticks."""
    layers = sorted({int(m[1]) for g in groups if (m := re.fullmatch(r"layer (\d+) (\w+)", g))})
    gap = max(1.0, len(layers) / 10)
    ticks = [(float(i), str(layer)) for i, layer in enumerate(layers)]
    where = {g: (float(layers.index(int(m[1]))), m[2]) for g in groups if (m := re.fullmatch(r"layer (\d+) (\w+)", g))}
    outside = [g for g in groups if g not in where]
    before = [g for g in outside if g == "embedding"]
    for i, group in enumerate([g for g in outside if g not in before]):
        where[group] = (len(layers) - 1 + gap * (i + 1), "")
    for group in before:
        where[group] = (-gap, "")
    return where, [*ticks, *((where[g][0], _short(g)) for g in outside)]


def _layers(folder: Folder) -> Drawn:
    """By layer: where in the model the two directions meet."""
    groups = folder.table("groups")
    groups = known(groups[groups["part"] == "full"], "g")
    steps = sorted(groups["step"].unique().tolist())
    shown = list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]))
    where, ticks = _places(list(dict.fromkeys(groups["group"])))
    panel = _Panel("layer", "G of its parameters", height=1.75 * len(shown) + 1.0)
    figure = panel.figure
    figure.clear()
    tall = figure.get_figheight()
    room = ROOM | {"bottom": 0.95 / tall, "top": 1 - 0.3 / tall, "hspace": 0.28}
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False, gridspec_kw=room)[:, 0]
    for ax, step in zip(axes, shown, strict=True):
        _one_layer_panel(panel, ax, groups[groups["step"] == step], where, named=step == shown[0])
        ax.set_title(f"step {number(int(step))}", fontsize=9.5, color=plots.INK)
    _layer_ticks(axes[-1], ticks)
    middle = (ROOM["left"] + ROOM["right"]) / 2
    figure.text(middle, 0.04 / tall, "layer", ha="center", va="bottom", fontsize=9.5)
    panel.ax = axes[0]
    caption = " ".join(_largest(groups[groups["step"] == step], step) for step in shown)
    caption = f"G split by groups of parameters, from input to output. {caption}"
    alt = (
        f"G by layer and kind of parameters at {at(shown)}. {_largest(groups[groups['step'] == shown[-1]], shown[-1])}"
    )
    return Drawn("Where in the model", panel.svg("layers", alt), caption, "groups")


def _one_layer_panel(panel: _Panel, ax: Axes, rows: pd.DataFrame, where: dict, named: bool) -> None:
    """One step of `_layers`: a line for each part of a layer, a square for what is outside of the layers."""
    panel.ax = ax
    rows = rows.assign(place=[where[g][0] for g in rows["group"]], part_of=[where[g][1] for g in rows["group"]])
    panel.ends = []
    for part, (colour, dash) in PARTS_OF_LAYER.items():
        one = rows[rows["part_of"] == part].sort_values("place")
        if len(one):
            panel.line(one["place"], one["g"], colour, dash)
    for i, (part, (colour, dash)) in enumerate(PARTS_OF_LAYER.items()):
        if named and (rows["part_of"] == part).any():
            ax.plot([1.03, 1.09], [0.9 - 0.17 * i] * 2, color=plots.COLOURS[colour], ls=dash, transform=ax.transAxes,
                    clip_on=False)  # fmt: skip
            ax.text(1.1, 0.9 - 0.17 * i, part, transform=ax.transAxes, va="center", fontsize=9,
                    color=plots.COLOURS[colour])  # fmt: skip
    others = rows[rows["part_of"] == ""]
    ax.plot(others["place"], others["g"], "s", ms=4, color=plots.COLOURS["grey"])
    plots.zero_line(ax)
    ax.set_ylabel("G")
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))


def _layer_ticks(ax: Axes, ticks: list[tuple[float, str]]) -> None:
    """Names at the places of groups; of many layers some."""
    layers = [tick for tick in ticks if tick[1].isdigit()]
    every = max(1, -(-len(layers) // 8))
    kept = [*layers[::every], *(tick for tick in ticks if not tick[1].isdigit())]
    ax.set_xticks([place for place, _ in kept], [text for _, text in kept])
    for label, (_, text) in zip(ax.get_xticklabels(), kept, strict=True):
        if not text.isdigit():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def _largest(rows: pd.DataFrame, step: int) -> str:
    top = rows.loc[rows["g"].abs().idxmax()]
    return (
        f"At step {number(int(step))} the largest |G| is that of {seen(top['group'])}: {signed(top['g'])} "
        f"of {signed(rows['g'].sum())} in all."
    )


def _blocks(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Means over blocks of equally many rows, so that at most MOST_POINTS are left; and the size of a block."""
    size = -(-len(table) // MOST_POINTS)
    return table[["step", "g"]].groupby(np.arange(len(table)) // size).mean(), size


def _renewed(table: pd.DataFrame) -> Iterator[int]:
    """The steps at which d was measured anew."""
    yield from sorted({int(step) for step in table["d_step"].dropna()})


def _every_step(folder: Folder) -> Drawn:
    """Every step: the gradient that the optimiser got."""
    table = known(folder.table("steps"), "g")
    drawn, size = _blocks(table)
    panel = _Panel("training step", "g of the step's gradient")
    panel.ax.plot(drawn["step"], drawn["g"], color=plots.COLOURS["blue"], lw=1.1)
    plots.zero_line(panel.ax)
    renewed = list(_renewed(table))
    marked = [renewed[i] for i in _thinned(len(renewed))] if renewed else []
    ground = panel.ax.get_xaxis_transform()
    panel.ax.plot(marked, [0.02] * len(marked), "^", ms=5, color=plots.COLOURS["orange"], transform=ground)
    panel.whole_steps()
    above = int((table["g"] > 0).sum())
    caption = (
        f"⟨d, −gradient⟩ of the gradient that the optimiser got: above 0 at {number(above)} of "
        f"{count(len(table), 'step')}; {_extremes(table, 'g')}. One batch a step, so no standard error. "
        f"Triangles: d was renewed {count(len(renewed), 'time')}"
        + (f" (at {at(renewed)})." if renewed else ".")
        + (f" The line is the mean of {number(size)} steps at a time." if size > 1 else "")
    )
    alt = f"g at every training step: above 0 at {above} of {len(table)}; {_extremes(table, 'g')}."
    return Drawn("At every step of training", panel.svg("steps", alt), caption, "steps")
