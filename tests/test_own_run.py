"""The lens on a run that a trainer saved, as a chapter asks it: folders, questions, the same numbers, figures."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from prefdyn.book import cli, own_run, page, params, plots, report_figures, report_folder
from prefdyn.book.params import ParameterError, check
from prefdyn.book.report_figures import Drawn
from prefdyn.lab import folders, layouts, policy, recipes
from prefdyn.lab.runs import RunStore
from test_folders import make_run, write_pairs

CHAPTER = Path(__file__).resolve().parents[1] / "notebooks" / "12-your-model.ipynb"
SMALL = {
    "profile": "smoke", "seeds": [3], "pairs": 48, "check": 16, "demonstrations": 64, "validation": 4, "held_out": 8,
    "width": 16, "sft_steps": 8, "sft_batch": 8, "batch": 8, "epochs": 2.0, "checkpoints": 3, "probe": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def book(store, tmp_path_factory):
    """The book's own run, its folders, and its lens folder."""
    p, place = check(SMALL), tmp_path_factory.mktemp("place")
    store.ensure(own_run.specs(p))
    run = own_run.own_run(p, store, place)
    return p, run, own_run.measure(p, run, tell=lambda line: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of somebody else: run/checkpoint-2 and -4, their start, and pairs."""
    folder = tmp_path_factory.mktemp("theirs")
    make_run(folder, write_pairs(folder / "pairs.jsonl"), steps=(2, 4))
    return folder


def theirs(saved: Path, **changes) -> params.Parameters:
    given = {"profile": "smoke", "saved": str(saved), "dataset": str(saved / "pairs.jsonl"), "probe": 8}
    return check(given | {"reference": str(saved / "start")} | changes)


# What is asked


def test_saved_checkpoints_are_found_by_their_folder_or_a_pattern(saved):
    both = [saved / "checkpoint-2", saved / "checkpoint-4"]
    assert own_run.saved_folders(str(saved)) == own_run.saved_folders(f"{saved}/checkpoint-*") == both
    assert own_run.saved_folders(f"{saved}/checkpoint-4") == both[1:]
    for nothing in ("nowhere", f"{saved}/epoch-*", f"{saved}/pairs.jsonl"):
        with pytest.raises(ParameterError, match=r"saved: given .*, and there is no such folder; allowed: 'book', the"):
            own_run.saved_folders(nothing)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"saved": "x"}, "dataset: given 'world' (str), and saved='x' was not trained on it"),
        ({"saved": "x", "dataset": "a.jsonl", "lr": 0.1}, "lr: given 0.1; the book's own runs alone have it"),
        ({"saved": "x", "dataset": "a.jsonl", "model": "m"}, "model: given 'm'; the book's own runs alone have it"),
        ({"saved": "x", "dataset": "a.jsonl", "objective": "ipo", "beta": 0.2}, "beta: given 0.2; it is dpo's"),
        ({"reference": "some/model"}, "reference: given 'some/model'; saved checkpoints alone need one"),
        ({"objective": "dppo"}, "objective: given 'dppo' (str) (no such method of pairs; did you mean dpo?); allowed"),
        ({"objective": "ppo"}, "objective: given 'ppo' (str) (no such method of pairs"),
    ],
)
def test_what_nothing_would_read_is_refused_by_name(given, said):
    with pytest.raises(ParameterError) as error:
        check({"profile": "smoke"} | given)
    assert said in str(error.value)


def test_saved_runs_have_limits_of_their_own_and_need_no_model():
    given = {"profile": "paper", "saved": "x", "dataset": "a.jsonl"}
    assert (check(given).max_prompt, check(given | {"max_response": 9}).max_response) == (512, 9)
    assert check(given | {"profile": "smoke"}).max_response == 512 > check({"profile": "smoke"}).max_response
    assert params.command(check(given | {"max_response": 9}), "12", params.Parameters.model_fields) == (
        "prefdyn execute 12 -p profile=paper -p dataset=a.jsonl -p saved=x -p max_response=9"
    )


def test_of_saved_checkpoints_nothing_is_trained(saved, store):
    p = theirs(saved)
    run = own_run.own_run(p, store, saved / "unused")
    assert own_run.specs(p) == [] and run.reference == str(saved / "start") and run.out.parent == store.root / "lens"
    assert own_run.own_run(theirs(saved, reference=None), store, saved).reference is None


def test_the_book_s_own_run_is_trained_on_pairs():
    assert [spec.kind for spec in own_run.specs(check(SMALL | {"objective": "simpo"}))] == ["simpo", "alignment"]
    with pytest.raises(ParameterError, match=r"objective: given 'sft'.* allowed here: apo_zero"):
        own_run.specs(check(SMALL | {"objective": "sft"}))


def test_the_command_names_files_and_folders_alone(saved):
    p = theirs(saved, beta=0.25, max_response=9)
    typed = own_run.command(p, own_run.own_run(p, RunStore(saved / "runs"), saved))
    assert str(saved) not in typed and f"{saved.name}/checkpoint-*" in typed.split()
    assert "--pairs pairs.jsonl --reference start --beta 0.25 --probe 8 --max-prompt 512 --max-response 9" in typed
    other = theirs(saved, objective="orpo", reference=None)
    assert "--method orpo --probe" in own_run.command(other, own_run.own_run(other, RunStore(saved / "runs"), saved))
    spaced = own_run.OwnRun((saved / "checkpoint-2",), "my pairs.jsonl", None, saved)
    assert "my pairs.jsonl" in shlex.split(own_run.command(p, spaced))


def test_pairs_are_read_as_they_were_written(tmp_path):
    asked = (("system", "be brief"), ("user", "naïve?"))
    rows = [{"prompt": "a\nb", "chosen": "c", "rejected": " d"}, {"prompt": asked, "chosen": "yes", "rejected": "no"}]
    reading = layouts.read(str(own_run.write_pairs(rows, tmp_path / "pairs.jsonl")))
    found = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in reading.pairs]
    assert found == rows and not reading.left_out
    written = own_run.write_pairs(rows, tmp_path / "targets.jsonl", response="chosen")
    first = json.loads(written.read_text().splitlines()[0])
    assert first == {"prompt": "a\nb", "response": "c"}


# What is measured


def test_a_kept_run_becomes_what_a_trainer_leaves(book, store):
    p, run, _ = book
    trained = own_run.specs(p)[0]
    series = folders.read(run.folders)
    assert [c.step for c in series.checkpoints] == trained.steps() == [0, 4, 12]
    kept = recipes.load_checkpoint(store.get(trained), 4)[0].state_dict()
    found = policy.load(str(run.folders[1]))[0].state_dict()
    assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)
    known = recipes.dataset(trained.data)
    tokenizer = policy.load_tokenizer(str(run.folders[0]))
    assert tokenizer.get_vocab() == recipes.tokenizer_of(trained.data).get_vocab()
    assert len(layouts.read(run.pairs).pairs) == len(known.pairs) == p.pairs


def test_the_lens_on_folders_says_what_the_book_says(book, store, tmp_path):
    """At every checkpoint, of the whole and of both halves; asked of other responses it says something else."""
    p, run, out = book
    found = own_run.compare(p, store, run, tmp_path)
    assert len(found) == 9 and found["apart"].max() < 1e-4 and (found["size"] > 0).all()
    lens = report_folder.read(out).component("full")
    full = found[found["component"] == "full"].reset_index(drop=True)
    assert ((lens["g"] - full["lens"]).abs() / full["size"]).max() > 1e-2


def test_contributions_of_tokens_add_up_to_those_of_pairs(book):
    _, _, out = book
    folder = report_folder.read(out)
    low, high = own_run.extremes(folder)
    last = folder.table("sequences").query("step == step.max()").set_index("example")["full"]
    kept = last[folder.table("tokens")["example"].unique()]
    assert (kept.idxmin(), kept.idxmax()) == (low, high)
    rows = own_run.contributions(folder, low)
    names = [f"pair {low}, step {step}, {side}" for step in (0, 12) for side in ("chosen", "rejected")]
    assert [name for name, _, _ in rows] == names
    assert sum(rows[2][2]) + sum(rows[3][2]) == pytest.approx(last[low], rel=1e-4)


def test_errors_name_the_parameters_of_the_chapter(saved, store):
    def refused(**changes) -> str:
        p = theirs(saved, **changes)
        with pytest.raises(ParameterError) as error:
            own_run.measure(p, own_run.own_run(p, store, saved), tell=lambda line: None)
        return str(error.value)

    assert "dataset: given 'nowhere.jsonl'" in refused(dataset="nowhere.jsonl")
    assert "reference: objective='dpo' compares with a reference policy and none was given" in refused(reference=None)
    assert f"reference={str(saved / 'start')!r}: objective='sft' reads no reference" in refused(objective="sft")


# What is shown


def drawn(title: str = "G over training") -> Drawn:
    body = '<path style="stroke: var(--blue)"/><text style="fill: var(--ink)">G</text>'
    svg = f'<svg viewBox="0 0 300 150" role="img" aria-label="from &lt;a&gt; to b">{body}</svg>'
    return Drawn(title, svg, "It goes up.", "alignment")


def test_a_figure_of_the_report_stands_alone_in_the_book_s_colours(monkeypatch):
    shown = []
    monkeypatch.setattr(own_run, "display", lambda data, metadata, raw: shown.append((data, metadata)))
    own_run.show([drawn("another"), drawn()], ["not there", "G over training"], "fig-own")
    ((data, metadata),) = shown
    root = ElementTree.fromstring(data["image/svg+xml"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("height") == str(own_run.WIDTH // 2)
    assert plots.COLOURS["blue"] in root[0].get("style") and "var(" not in data["image/svg+xml"]
    assert metadata["mystnb"]["image"]["alt"] == data["text/plain"] == "from <a> to b"
    assert metadata["mystnb"]["figure"] == {"name": "fig-own", "caption": "**G over training.** It goes up."}


def test_every_figure_of_a_report_stands_alone(book, monkeypatch):
    shown = []
    monkeypatch.setattr(own_run, "display", lambda data, metadata, raw: shown.append(data["image/svg+xml"]))
    made, _ = report_figures.figures(report_folder.read(book[2]))
    for one in made:
        own_run.show(made, [one.title], "fig-own")
    assert len(shown) == len(made) >= 6
    for svg in shown:
        assert "var(" not in svg
        root = ElementTree.fromstring(svg)
        targets = {node.get("id") for node in root.iter()}
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= targets


def test_a_figure_that_cannot_be_drawn_is_named(monkeypatch):
    shown = []
    monkeypatch.setattr(page, "display", lambda data, **more: shown.append(data["text/plain"]))
    own_run.show([drawn("another")], ["By strength"], "fig-own")
    assert shown == ["*By strength*: not drawn, since these checkpoints do not have what it needs."]


def test_the_chapter_measures_a_run_of_somebody_else(saved, tmp_path, monkeypatch):
    """With one checkpoint too, where nothing goes over training."""
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    given = {"profile": "smoke", "saved": str(saved / "checkpoint-4"), "dataset": str(saved / "pairs.jsonl")}
    given |= {"objective": "orpo", "probe": 8}  # which compares with no reference
    notebook = nbformat.read(cli.execute_chapter(CHAPTER, given, tmp_path / "out.ipynb"), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join("".join(output["data"]["text/plain"]) for output in outputs if "data" in output)
    assert "*The two halves of the loss*: not drawn" in text and "not the book's" in text and "nan" not in text.lower()
    assert str(saved) not in text and sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 2
    (report,) = (tmp_path / "runs" / "lens").glob("*/report.html")
    assert report.parent.name in text
