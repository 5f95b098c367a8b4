"""What a chapter leaves behind: values, figures that describe themselves, tables that cannot become markup."""

import base64
import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from prefdyn import page, plots
from prefdyn.params import check
from prefdyn.runs import Run
from prefdyn.stats import Estimate

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


def test_provenance_names_parameters_versions_and_runs(shown, tmp_path):
    hardware = {"system": "Linux", "machine": "x86_64", "threads": 1, "accelerator": None}
    made = []
    for key in ("sft-1", "dpo-2"):
        (tmp_path / key).mkdir()
        kept = {"versions": {"torch": "2.x"}, "hardware": hardware, "seconds": 4.0}
        (tmp_path / key / "provenance.json").write_text(json.dumps(kept))
        made.append(Run(key, tmp_path / key))
    page.provenance([*made, made[0]], check({"beta": 0.25}))
    ((data, _),) = shown
    for expected in (
        "beta=0.25",
        "torch 2.x",
        "Linux x86_64, CPU, 1 thread(s) a run",
        "2, computed in 8 s",
        "sft-1, dpo-2",
    ):
        assert expected in data["text/plain"]
