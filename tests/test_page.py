"""What a chapter leaves behind: values, figures that describe themselves, tables that cannot become markup."""

import base64
import json
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from prefdyn.book import page, plots
from prefdyn.book.params import check
from prefdyn.findings.stats import Estimate, mean_interval
from prefdyn.lab.runs import Run

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: (data, metadata) pairs."""
    outputs = []
    monkeypatch.setattr(page, "display", lambda data, metadata=None, raw=None: outputs.append((data, metadata or {})))
    return outputs


def notebook(shown) -> dict:
    """A notebook, as JSON, whose cells left these outputs."""
    made = nbformat.v4.new_notebook()
    for data, metadata in shown:
        cell = nbformat.v4.new_code_cell(
            "", outputs=[nbformat.v4.new_output("display_data", data=data, metadata=metadata)]
        )
        made.cells.append(cell)
    made.cells.append(nbformat.v4.new_markdown_cell("text"))
    return json.loads(nbformat.writes(made))


def test_sentences_keep_the_values_in_them(shown):
    page.say(
        "It rose by {gain:+.1f} to {end} in {name}.",
        gain=np.float64(0.25),
        end=Estimate(0.63, 0.6, 0.66, 3),
        name="long runs",
    )
    ((data, _),) = shown
    assert data["text/markdown"] == data["text/plain"] == "It rose by +0.2 to 0.63 [0.60, 0.66] in long runs."
    values = page.collect_values(notebook(shown))
    assert {name: kept["value"] for name, kept in values.items()} == {"gain": 0.25, "end": 0.63, "name": "long runs"}
    assert {name: kept["text"] for name, kept in values.items()} == {
        "gain": "+0.2",
        "end": "0.63 [0.60, 0.66]",
        "name": "long runs",
    }


@pytest.mark.parametrize("value", [3, 0.5, np.int64(3), np.float32(0.5), np.float64(2.0)])
def test_numbers_stay_numbers(shown, value):
    page.say("{x}", x=value)
    kept = page.collect_values(notebook(shown))["x"]["value"]
    assert isinstance(kept, int | float) and kept == value


def test_a_name_has_one_value(shown):
    page.say("{a} {b}", a=1, b=2)
    page.say("{a} again", a=1)
    assert {name: kept["value"] for name, kept in page.collect_values(notebook(shown)).items()} == {"a": 1, "b": 2}
    page.say("{b} differs", b=3)
    with pytest.raises(ValueError, match=r"two different values for \['b'\]"):
        page.collect_values(notebook(shown))


def test_tables_escape_what_is_in_them(shown):
    long = "word " * 60
    page.table(pd.DataFrame({EVIL: [EVIL, long], "x": [0.123, np.nan]}))
    ((data, _),) = shown
    html = data["text/html"]
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "0.12" in html and "0.123" not in html and "–" in html
    assert long.strip() in html  # nothing is cut off


def test_texts_escape_what_is_in_them(shown):
    page.texts({EVIL: EVIL, "b": i} for i in range(2))
    ((data, _),) = shown
    assert "<script" not in data["text/html"] and data["text/html"].count("&lt;script&gt;") == 3
    assert data["text/plain"] == f"{EVIL} | 0\n{EVIL} | 1"


def shades(html: str) -> list[tuple[str, str, str, str]]:
    """Background, line, title and text of every token."""
    return re.findall(
        r'<span style="background:rgb\(([^)]*)\);[^"]*2px (\w+) [^"]*" title="([^"]*)">(.*?)</span>', html
    )


def test_tokens_are_shaded_by_their_number(shown):
    """Full colour at the largest of the row, half-way to the card's 251 at half of it, the card alone at 0."""
    page.shaded([("w", ["up", " half", "no", "down"], [2.0, 1.0, 0.0, -2.0]), ("a", ["x"], np.array([-1e-3]))])
    ((data, _),) = shown
    assert shades(data["text/html"]) == [
        ("86, 160, 220", "solid", "+2", "up"),
        ("168, 206, 236", "solid", "+1", "half"),  # (86 + 251) / 2 = 168.5, 205.5, 235.5: to the even number
        ("251, 251, 251", "solid", "+0", "no"),
        ("240, 150, 70", "dotted", "-2", "down"),
        ("240, 150, 70", "dotted", "-0.001", "x"),
    ]
    assert re.findall(r"most: ([^<]*)<", data["text/html"]) == ["2", "0.001"]
    assert data["text/plain"] == "w: up (+2)  half (+1) no (+0) down (-2)\na: x (-0.001)"


def test_shaded_tokens_and_names_cannot_become_markup(shown):
    page.shaded([(EVIL, [EVIL, "<eos>", '"', " \n"], [1.0, -1.0, 0.5, 0.25])])
    ((data, _),) = shown
    html = data["text/html"]
    assert "<script" not in html and html.count("&lt;script&gt;") == 2
    texts = [text for *_, text in shades(html)]
    assert texts[1:] == ["&lt;eos&gt;", "&quot;", "␣"]  # what would be invisible is shown


def test_there_may_be_nothing_to_shade(shown):
    page.shaded([("zeros", ["a", "b"], [0.0, -0.0]), ("empty", [], [])])
    page.shaded([])
    (data, _), (nothing, _) = shown
    assert [shade for shade, *_ in shades(data["text/html"])] == ["251, 251, 251"] * 2
    assert data["text/html"].count("<tr>") == 2 and "<tr>" not in nothing["text/html"]
    with pytest.raises(ValueError, match="shorter"):
        page.shaded([("w", ["a", "b"], [1.0])])


def test_figures_describe_themselves(shown):
    fig, _ = plots.panels(2)
    page.figure(fig, "fig-test", "A caption.", "Two empty panels.")
    ((data, metadata),) = shown
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == "Two empty panels."
    assert metadata["mystnb"]["image"]["alt"] == "Two empty panels."
    assert metadata["mystnb"]["figure"] == {"name": "fig-test", "caption": "A caption."}
    assert not plt.fignum_exists(fig.number)


def test_one_figure_is_one_file(shown):
    """The same figure gives the same bytes, so that re-executing a chapter changes nothing."""
    for _ in range(2):
        fig, (ax,) = plots.panels(1)
        ax.plot([0, 1], [1, 0])
        page.figure(fig, "fig-test", "A caption.", "A line that falls.")
    assert shown[0] == shown[1]


def test_seeds_are_thin_lines_and_their_mean_has_a_band():
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "step": [0, 1, 0, 1], "y": [1.0, 2.0, 3.0, 4.0]})
    fig, (ax, alone) = plots.panels(2)
    plots.over_training(ax, table, "y", colour="blue", label="two seeds")
    plots.over_training(alone, table.query("seed == 0"), "y", colour="orange", label="one seed")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [3, 4], [2, 3]]
    assert len(ax.collections) == 1
    assert len(alone.lines) == 2 and not alone.collections  # one seed has no interval
    plt.close(fig)


def test_curves_are_compared_by_name():
    """Each name has its seeds as thin lines without a label and one labelled mean, in its colour and in order."""
    rows = [("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0), ("b", 1, 5.0), ("left out", 0, 9.0)]
    table = pd.DataFrame(
        [(k, s, step, y + step) for k, s, y in rows for step in (0, 2)], columns=["k", "seed", "t", "y"]
    )
    fig, (ax,) = plots.panels(1)
    plots.compare(ax, table, "y", "k", {"b": "orange", "a": "blue"}, x="t", dash="--")
    assert ax.get_legend_handles_labels()[1] == ["b", "a"]
    drawn = [(line.get_ydata().tolist(), line.get_color(), line.get_linewidth() > 2) for line in ax.lines]
    assert drawn == [
        ([5, 7], plots.COLOURS["orange"], False),
        ([5, 7], plots.COLOURS["orange"], False),
        ([5, 7], plots.COLOURS["orange"], True),
        ([1, 3], plots.COLOURS["blue"], False),
        ([3, 5], plots.COLOURS["blue"], False),
        ([2, 4], plots.COLOURS["blue"], True),
    ]
    assert all(line.get_linestyle() == "--" and line.get_xdata().tolist() == [0, 2] for line in ax.lines)
    plt.close(fig)


def test_provenance_names_parameters_versions_and_runs(shown, tmp_path):
    hardware = {"system": "Linux", "machine": "x86_64", "threads": 1, "accelerator": None}
    made, specs = (
        [],
        {"sft-1": {}, "dpo-2": {"method": "dpo"}, "alignment-3": {"kind": "alignment", "method": "central"}},
    )
    for key in specs:
        (tmp_path / key).mkdir()
        kept = {"versions": {"torch": "2.x"}, "hardware": hardware, "seconds": 4.0}
        (tmp_path / key / "provenance.json").write_text(json.dumps(kept))
        (tmp_path / key / "spec.json").write_text(json.dumps(specs[key]))
        made.append(Run(key, tmp_path / key))
    page.provenance([*made, made[0]], check({"beta": 0.25}))
    ((data, _),) = shown
    for expected in (
        "beta=0.25",
        "torch 2.x",
        "Linux x86_64, CPU, 1 thread(s) a run",
        "3, computed in 12 s",
        "sft-1, dpo-2, alignment-3",
        "G measured by | central differences",
    ):
        assert expected in data["text/plain"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_shade_needs_a_number(value):
    with pytest.raises(ValueError, match="'step 0: w' is not finite"):
        page.shaded([("step 0: w", ["a", "b"], [1.0, value])])


def test_markdown_of_our_own_is_shown_as_it_is(shown):
    """Braces too, which in a sentence would stand for values."""
    page.markdown("**a** {b} [fig](02-targets.html#fig-g)")
    data, metadata = shown[0]
    assert data["text/markdown"] == data["text/plain"] == "**a** {b} [fig](02-targets.html#fig-g)" and not metadata


def test_the_seeds_behind_a_number_are_kept(shown):
    """For the comparison with reference results; a number without seeds has none."""
    page.say("{gain} {n}", gain=mean_interval([1.0, 2.0, 3.0]), n=3)
    kept = page.collect_values(notebook(shown))
    assert kept["gain"]["seeds"] == [1.0, 2.0, 3.0] and kept["gain"]["value"] == 2.0
    assert kept["gain"]["interval"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-3)  # 4.3027 / sqrt(3)
    assert "seeds" not in kept["n"]
    page.say("{many}", many=mean_interval(range(page.MOST_SEEDS + 1)))
    assert "seeds" not in page.collect_values(notebook(shown))["many"]


def test_signed_logarithmic_scales_have_few_ticks_and_a_zero():
    _, ax = plt.subplots()
    values = pd.Series([-300.0, -0.02, 0.5, 8.0, 1200.0, 0.0])
    ax.plot(values, values)
    for axis in ("x", "y"):
        plots.signed_log(ax, axis, values)
    for ticks in (ax.get_xticks(), ax.get_yticks()):
        assert 0 in ticks and 3 <= len(ticks) <= 7 and list(ticks) == sorted(ticks)
    assert ax.get_xscale() == ax.get_yscale() == "symlog"
    plt.close()


def test_forests_have_a_row_a_name_and_a_colour_a_measure():
    _, ax = plt.subplots()
    found = {
        "first": [Estimate(1.0, 0.5, 1.5, 3), Estimate(-2.0, -2.5, -1.5, 3)],
        "second": [Estimate(0.0, -1, 1, 3)] * 2,
    }
    plots.forest(ax, ["a", "b"], found, small=0.2)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and ax.yaxis_inverted()
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[1.0, -2.0], [0.0, 0.0]]
    assert [line.get_label() for line in dots] == ["first", "second"] and dots[0].get_color() != dots[1].get_color()
    spans = [tuple(segment[:, 0]) for c in ax.collections for segment in c.get_segments()]
    assert spans == [(0.5, 1.5), (-2.5, -1.5), (-1, 1), (-1, 1)]
    plt.close()


def test_marks_stand_in_their_cells():
    _, ax = plt.subplots()
    plots.marks(
        ax, ["r1", "r2"], ["c1", "c2", "c3"], {("r2", "c3"): ("+", "blue", 0.4), ("r1", "c1"): ("?", "grey", 0.1)}
    )
    assert {(t.get_text(), t.get_position()) for t in ax.texts} == {("+", (2, 1)), ("?", (0, 0))}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["c1", "c2", "c3"]
    assert [p.get_alpha() for p in ax.patches] == [0.4, 0.1]
    plt.close()


def test_no_rows_make_no_table(shown):
    page.texts([])
    assert shown == []
