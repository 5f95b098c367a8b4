"""Studies: read strictly, planned once, computed run by run, kept as a table that says what has changed, checked."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from prefdyn.book import cli, judging, params, plan, studies, workflow
from prefdyn.book.studies import StudyError, Tolerance
from prefdyn.lab.runs import RunStore
from snakemake.cli import get_argument_parser

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "data" / "studies"
TOY = """
title: Toy
about: >-
  A toy,
  in two lines.
base: {profile: smoke, pairs: 24, check: 8, demonstrations: 64, validation: 4, held_out: 4, batch: 8, sft_batch: 8,
  sft_steps: 4, checkpoints: 2, width: 16, probe: 8, method: forward}
axes:
  length: {short: {epochs: 1.0}, long: {epochs: 2.0, lr: 1e-2}}
  seed: [0]
rules: [C3a]
tolerances: {default: {relative: 0.1, absolute: 0.01}, C3a: {relative: 0, absolute: 0.5}}
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of its own with one study; the current folder is inside of it."""
    (tmp_path / "lib" / "prefdyn").mkdir(parents=True)
    shutil.copytree(STUDIES / "profiles", tmp_path / "data" / "studies" / "profiles")
    (tmp_path / "data" / "studies" / "toy.yaml").write_text(TOY)
    monkeypatch.chdir(tmp_path / "lib")
    monkeypatch.delenv("PREFDYN_RUNS", raising=False)
    return tmp_path


@pytest.fixture
def write(book):
    """Write the toy study with some of its text replaced."""

    def replaced(*changes: tuple[str, str]) -> None:
        text = TOY
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (book / "data" / "studies" / "toy.yaml").write_text(text)

    return replaced


@pytest.fixture
def call(monkeypatch, capfd):
    """Call `prefdyn study ...`; returns exit status, what was printed, and what went to the terminal as an error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prefdyn", "study", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def a_row(study: studies.Study, number: int, **values: str) -> dict[str, str]:
    """A row of a cell as it would be written, with made-up values."""
    cell = study.cells[number]
    made = dict.fromkeys(study.columns, "1") | cell.labels | {"settings": studies.settings(study, cell), "code": "abc"}
    return made | {"finished": "2026-01-02", "versions": "a 1", "hardware": "x"} | values


# --- reading ---------------------------------------------------------------------------------------------------------


def test_cells_are_the_combinations_of_the_axes(book, write):
    write(("seed: [0]", "seed: [3, 5]"))
    study = studies.read("toy")
    assert (study.name, study.title, study.about) == ("toy", "Toy", "A toy, in two lines.")
    assert study.axes == ("length", "seed") and study.methods == ("dpo",)
    assert [str(cell) for cell in study.cells] == [f"length {x}, seed {s}" for x in ("short", "long") for s in (3, 5)]
    p = study.cells[2].parameters
    assert (p.epochs, p.lr, p.seeds, p.pairs, p.profile) == (2.0, 1e-2, [3], 24, "smoke")
    assert study.cells[0].parameters.lr == params.presets("smoke", "world")["lr"]
    ends = ["dpo_reward_sampled", "dpo_reward_greedy", "dpo_kl", "dpo_best"]
    assert list(study.columns[:8]) == ["length", "seed", "C3a", *ends, "parameters"]


def test_cells_of_several_grids_leave_the_axes_of_others_empty(book, write):
    grids = "grids:\n  - {beta: [0.30, 1], seed: [0]}\n  - {lr: [1e-4], seed: [0]}\n"
    write((TOY[TOY.index("axes:") : TOY.index("rules:")], grids))
    study = studies.read("toy")
    assert study.axes == ("beta", "lr", "seed")
    assert [cell.labels for cell in study.cells] == [
        {"beta": "0.3", "seed": "0"},
        {"beta": "1", "seed": "0"},
        {"lr": "0.0001", "seed": "0"},
    ]
    assert [cell.parameters.beta for cell in study.cells] == [0.3, 1.0, 0.1]


REFUSED = {
    "a key that is none": (("title:", "titel:"), "keys: given ['titel'"),
    "no title": (("title: Toy", "title: ''"), "title: given ''; allowed: a line"),
    "a key twice": (("title: Toy", "title: Toy\ntitle: Toy"), "'title' is given twice"),
    "no YAML": (("title: Toy", "title: [Toy"), "toy.yaml: "),
    "seeds in the base": (("{profile: smoke,", "{seeds: [1],"), "seeds are the axis seed"),
    "an unknown parameter": (("epochs: 1.0", "epoch: 1.0"), "length short, seed 0: "),
    "the nearest parameter": (("epochs: 1.0", "epoch: 1.0"), "epoch: no such parameter. Did you mean 'epochs'?"),
    "out of range": (("epochs: 1.0", "epochs: 0"), "epochs: given 0 (int); allowed: a number > 0"),
    "a list of what is no parameter": (("length: {short: {epochs: 1.0}, long: {epochs: 2.0, lr: 1e-2}}", "length: [1]"),
        "axes: given 'length'; allowed: seed, or the name of a parameter"),
    "no values": (("seed: [0]", "seed: []"), "axes, seed: given []; allowed: a list"),
    "a value twice": (("seed: [0]", "seed: [0, 0]"), "axes, seed: given [0, 0]; allowed: a list"),
    "no seed": (("  seed: [0]\n", ""), "seed is one of them"),
    "the same cell twice": (("{epochs: 2.0, lr: 1e-2}", "{epochs: 1.0}"), "given 'length short, seed 0'; allowed: ce"),
    "a parameter on two axes": (("seed: [0]", "seed: [0]\n  lr: [1e-3]"), "a parameter on one axis alone"),
    "an axis called like a column": (("length: {", "seconds: {"), "given 'seconds'; allowed: a name that is no other"),
    "an unknown rule": (("[C3a]", "[C3x]"), "rules: given 'C3x'; allowed: a list of some of C1a, "),
    "a rule twice": (("[C3a]", "[C3a, C3a]"), "rules: given 'C3a'"),
    "a method that no rule reads": (("[C3a]", "[C3a]\nvalidated: [ppo]"), "validated: given ['ppo']; allowed: a list"),
    "a validated method twice": (("[C3a]", "[C3a]\nvalidated: [dpo, dpo]"), "some of dpo, each once"),
    "one validated method, no list": (("[C3a]", "[C3a]\nvalidated: dpo"), "validated: given 'dpo'; allowed: a list"),
    "no tolerance": (("{default: {relative: 0.1, absolute: 0.01}, ", "{"), "with a default"),
    "a tolerance of nothing": (("}, C3a: {", "}, C3b: {"), "tolerances: given 'C3b'; allowed: default, C3a, dpo_rew"),
    "half a tolerance": (("{relative: 0, absolute: 0.5}", "0.5"), "tolerances, C3a: given 0.5; allowed: relative and"),
    "grids and axes": (("rules:", "grids: []\nrules:"), "axes, grids: given"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(book, write, case):
    change, message = REFUSED[case]
    write(change)
    with pytest.raises(StudyError, match=r"^toy\.yaml: ") as error:
        studies.read("toy")
    assert message in str(error.value)


def test_a_study_that_is_not_there(book, call):
    assert call("check", "tony") == (2, "", "'tony': no such study; there are: toy\n")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_stand_in_the_order_of_the_cells_and_those_of_no_cell_are_left_out(book, write):
    study = studies.read("toy")
    for number in (1, 0):
        workflow.keep(study, number, a_row(study, number, C3a=f"0.{number}"))
    path = book / "data" / "studies" / "toy.csv"
    assert path.read_text().splitlines()[0] == ",".join(study.columns)
    assert [row["C3a"] for row in studies.kept_rows(study).values()] == ["0.0", "0.1"]
    write(("{short: {epochs: 1.0}, long:", "{long:"))
    study = studies.read("toy")
    assert [row["C3a"] for row in studies.kept_rows(study).values()] == ["0.1"]
    workflow.keep(study, 0, a_row(study, 0, C3a="0.5"))
    assert len(path.read_text().splitlines()) == 2 and not path.with_suffix(".csv.new").exists()


def test_a_table_says_what_has_changed_since(book, write):
    study = studies.read("toy")
    assert str(studies.table("toy")) == "Of the 2 cells of the study toy none is computed."
    now = studies.code_today(study, 0)
    workflow.keep(study, 0, a_row(study, 0, code=now, C3a="", finished="2026-01-05"))
    workflow.keep(study, 1, a_row(study, 1, code="123456789012"))
    table = studies.table("toy")
    assert table.changed == ("", "code")
    assert table.rows["length"].tolist() == ["short", "long"] and table.rows["seed"].tolist() == [0, 0]
    assert math.isnan(table.rows["C3a"][0]) and table.rows["C3a"][1] == 1.0
    assert table.rows["code"].tolist() == [now, "123456789012"]
    assert str(table) == (
        "2 of 2 cells of the study toy, computed 2026-01-02 to 2026-01-05 with code "
        f"{', '.join(sorted((now, '123456789012')))}; since then something has changed for 1 (code)."
    )
    write(("width: 16", "width: 32"))
    assert studies.table("toy").changed == ("settings", "settings")
    write(("[C3a]", "[C3a, C3b]"))
    table = studies.table("toy")
    assert table.changed == ("columns", "columns") and table.rows["C3b"].isna().all()
    study = studies.read("toy")
    workflow.keep(study, 1, a_row(study, 1, code=now))
    assert studies.table("toy").rows["length"].tolist() == ["long"]  # the other row has no C3b yet


def test_settings_are_what_a_cells_runs_are_made_of(book, write):
    study = studies.read("toy")
    cell = study.cells[0]

    def differ(**other) -> bool:
        changed = studies.Cell(cell.labels, cell.parameters.model_copy(update=other))
        return studies.settings(study, changed) != studies.settings(study, cell)

    assert differ(width=32) and differ(epochs=3.0) and differ(pairs=25) and differ(seeds=[1])
    assert not differ(compared_seeds=7) and not differ(sequences=48)  # chapter 9's; C3a reads none of its runs
    assert studies.settings(study, study.cells[1]) != studies.settings(study, cell)


def test_growth_with_the_number_of_parameters_by_hand(book, write):
    """Seed 0: 1 at 100, 3 at 1,000 parameters: 2 a power of ten; seed 1: 0 and 4. Seed 2 lacks a model."""
    write(("seed: [0]", "seed: [0, 1, 2]"))
    study = studies.read("toy")
    values = {(0, 0): (100, 1), (1, 0): (1000, 3), (0, 1): (100, 0), (1, 1): (1000, 4), (0, 2): (100, 9)}
    for number, cell in enumerate(study.cells):
        place = int(cell.labels["length"] == "long"), cell.seed
        if place in values:
            parameters, value = values[place]
            workflow.keep(study, number, a_row(study, number, C3a=str(value), parameters=str(parameters)))
    found = studies.by_size(studies.table("toy"))["C3a"]
    assert found.n == 2 and found.mean == pytest.approx(3) and sorted(found.values) == pytest.approx([2, 4])


def test_rules_are_judged_where_a_setting_touches_them_and_shared_cells_come_once(book, write):
    """Two grids that meet in epochs 1, lr 0.01; along lr nothing changes C3a, so it says nothing of C3a there."""
    grids = "grids: [{epochs: [1.0, 2.0], seed: [0, 1]}, {lr: [0.01, 0.1], seed: [0, 1]}]"
    axes = "axes:\n  length: {short: {epochs: 1.0}, long: {epochs: 2.0, lr: 1e-2}}\n  seed: [0]"
    write((axes, grids), ("base: {profile: smoke,", "base: {profile: smoke, epochs: 1.0, lr: 0.01,"))
    study = studies.read("toy")
    values = {("1", ""): (0.1, 0.2), ("2", ""): (0.9, 0.8), ("", "0.01"): (0.1, 0.2), ("", "0.1"): (0.1, 0.2)}
    for number, cell in enumerate(study.cells):
        place = {axis: cell.labels.get(axis, "") for axis in ("epochs", "lr")}
        value = values[place["epochs"], place["lr"]][cell.seed]
        workflow.keep(study, number, a_row(study, number, C3a=str(value), **place))
    found = studies.judged(studies.table("toy"))
    assert found["setting"].tolist() == [studies.OWN, "epochs 2"]
    assert [sorted(e.values) for e in found["found"]] == [[0.1, 0.2], [0.8, 0.9]]
    whole = studies.table("toy")
    few = studies.Table(study, whole.rows[whole.rows["seed"] == 0], ("",) * 4)
    assert not len(studies.judged(few)) and not len(studies.judged(studies.Table(study, whole.rows[:0], ())))


@pytest.mark.parametrize(
    ("kept", "now", "verdict"),
    [
        ("2", "2", "identical"),
        ("2", "2.19", "agrees"),  # a tenth of 2
        ("2", "1.79", "differs"),
        ("0.01", "0.06", "agrees"),  # 0.05 apart
        ("-0.01", "0.05", "differs"),
        ("", "", "identical"),
        ("1", "", "differs"),
        ("", "1", "differs"),
    ],
)
def test_verdicts(kept, now, verdict):
    assert studies._verdict(kept, now, Tolerance(0.1, 0.05)) == verdict


def test_the_number_of_parameters_may_not_be_off(book):
    study = studies.read("toy")
    assert study.tolerance("parameters") == studies.EXACT
    assert study.tolerance("C3a") == Tolerance(0, 0.5) and study.tolerance("dpo_kl") == Tolerance(0.1, 0.01)


# --- computing -------------------------------------------------------------------------------------------------------


def computed_here(study: studies.Study, number: int) -> tuple[RunStore, dict[str, str]]:
    """The store of the book with all runs of a cell, and its row."""
    store, cell = RunStore(), study.cells[number]
    for spec in studies.specs(study, cell):
        store.get(spec)
    return store, studies.row(study, cell, store)


def test_a_row_is_what_its_rules_and_its_runs_say(book):
    study = studies.read("toy")
    with pytest.raises(StudyError, match=r"toy, length long, seed 0: 4 of 4 runs are missing: sft-"):
        studies.row(study, study.cells[1], RunStore())
    store, row = computed_here(study, 1)
    p = study.cells[1].parameters
    (finding,) = judging.apply_rules(store, p, study.rules)
    run = store.get(plan.run(p, 0, "dpo"))
    checkpoints = run.frame("checkpoints")
    assert row["C3a"] == f"{finding.found.mean:.6g}" and row["length"] == "long" and row["seed"] == "0"
    assert row["dpo_kl"] == f"{checkpoints['kl'].iloc[-1]:.6g}"
    assert row["dpo_best"] == f"{checkpoints['reward_sampled'].max():.6g}"
    vocabulary = 144
    layer = 12 * 16 * 16 + 13 * 16  # weights of attention and hidden layer, biases of both, two norms
    assert row["parameters"] == str(layer + 2 * 16 + 2 * vocabulary * 16)
    runs = [store.get(spec) for spec in studies.runs(store.key, studies.specs(study, study.cells[1])).values()]
    assert len(runs) == 4  # SFT, reference, DPO, G
    assert row["seconds"] == f"{sum(run.json('provenance')['seconds'] for run in runs):.1f}"
    assert re.fullmatch(r"[0-9a-f]{12}", row["code"]) and row["code"] == studies.code_today(study, 1)
    assert "torch" in row["versions"] and "cores" in row["hardware"]
    assert workflow.again(study, 1) | {"seconds": row["seconds"], "finished": row["finished"]} == row


def test_rewards_on_validation_prompts_are_those_of_the_best_checkpoint(book, write):
    write(("rules: [C3a]", "rules: [C3a]\nvalidated: [dpo]"))
    study = studies.read("toy")
    store, row = computed_here(study, 0)
    p = study.cells[0].parameters
    rewards = store.get(plan.validation_run(p, 0, plan.run(p, 0, "dpo"))).frame("validation")
    by_hand = max(rewards["reward"][rewards["step"] == step].sum() / (4 * plan.SAMPLES) for step in rewards["step"])
    assert row["dpo_validation"] == f"{by_hand:.6g}"
    assert study.columns[5:9] == ("dpo_kl", "dpo_best", "dpo_validation", "parameters")


def test_a_study_is_computed_run_by_run_and_goes_on_where_it_was(book, call):
    """The long cell's row is there, so one cell is left; its SFT and reference are kept, DPO and G are not."""
    study = studies.read("toy")
    _, long = computed_here(study, 1)
    workflow.keep(study, 1, long)
    status, out, err = call("run", "toy", "--dry-run", "--cores", "1")
    assert status == 0 and "toy: 1 of 2 cells to do; 2 of their 4 runs are kept\n" in out
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", out, re.MULTILINE))
    assert jobs == {"alignment": "1", "dpo": "1", "row": "1", "rows": "1", "total": "4"}
    assert len(list((book / "data" / "runs").glob("*-*"))) == 4
    status, out, err = call("run", "toy", "--cores", "1")
    assert status == 0 and re.fullmatch("Using profile .*\n", err)
    assert out.splitlines()[-1].startswith("2 of 2 cells of the study toy, computed 20")
    assert out.endswith("unchanged since.\n")
    _, short = computed_here(study, 0)  # found in the store, not computed
    rows = studies.kept_rows(study)
    assert (rows[0], rows[1]) == (short, long)
    assert len(list((book / "data" / "runs").glob("*-*"))) == 6
    status, out, err = call("run", "toy")
    assert (status, err) == (0, "") and out.startswith("toy: 0 of 2 cells to do; 0 of their 0 runs are kept\n")


def test_what_is_no_longer_as_it_was_planned_is_refused(book, call, write):
    """Each in the process that Snakemake starts for it; nothing is written."""
    study, store = studies.read("toy"), RunStore()
    path = workflow.prepare(study, store).path
    sft, *_ = studies.runs(store.key, studies.specs(study, study.cells[0]))
    assert call("compute", "nowhere.json", "runs/dpo-0")[2].startswith("nowhere.json: no plan of a study")
    assert call("compute", str(path), "runs/dpo-0")[2] == "toy, dpo-0: no such run is planned\n"
    text = path.read_text()
    path.write_text(text.replace('"demonstrations": 64', '"demonstrations": 65'))
    status, _, err = call("compute", str(path), str(store.root / sft))
    assert status == 2 and err == (
        f"toy, {sft}: code or packages are not those it was planned with; call `study run` again\n"
    )
    path.write_text(text)
    assert call("row", str(path), "7", str(store.root))[2] == "toy, cell 7: its row is not planned\n"
    assert "4 of 4 runs are missing" in call("row", str(path), "0", str(store.root))[2]
    write(("width: 16", "width: 32"))
    status, _, err = call("row", str(path), "0", str(store.root))
    assert status == 2 and err == "toy, cell 0: its settings are not those planned; call `study run` again\n"
    assert not store.root.exists() and not studies.kept_rows(study)


def test_what_was_planned_is_planned_again_only_if_it_would_be_otherwise(book, write, monkeypatch):
    planned = []
    monkeypatch.setattr(studies, "code", lambda *a, code=studies.code: planned.append(a) or code(*a))
    study, store = studies.read("toy"), RunStore()
    first = workflow.prepare(study, store)
    assert (first.rows, first.runs, first.there, len(planned)) == (2, 6, 0, 2)
    workflow.keep(study, 0, a_row(study, 0, code=json.loads(first.path.read_text())["cells"][0]["code"]))
    second = workflow.prepare(study, store)
    assert (second.rows, second.runs, len(planned)) == (1, 4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "versions", lambda: {"torch": "0"})
        workflow.prepare(study, store)
    assert len(planned) == 4
    write(("width: 16", "width: 32"))
    assert workflow.prepare(studies.read("toy"), store).rows == 2 and len(planned) == 6


def test_a_study_is_computed_by_one_process_at_a_time(book, call):
    with workflow.alone("toy"):
        status, _, err = call("run", "toy")
    assert status == 2 and err == "toy: another process is computing it; wait for that one, or stop it\n"


def test_a_run_that_fails_is_said(book, call, write):
    write(("width: 16", "width: 18"))
    status, out, err = call("run", "toy", "--cores", "1")
    assert status == 2 and out == "toy: 2 of 2 cells to do; 0 of their 6 runs are kept\n"
    assert "width=18, heads=2: width must be a multiple of 2 * heads" in err
    assert err.endswith(
        "toy: 0 of 2 cells are there; what failed is said above or in .snakemake/log; "
        "the same command goes on from here\n"
    )


def test_a_check_finds_what_differs(book, call):
    study = studies.read("toy")
    assert call("check", "toy")[::2] == (
        2, "toy: there is no cell to check (none is computed); `prefdyn study run toy` computes\n",
    )  # fmt: skip
    _, row = computed_here(study, 0)
    workflow.keep(study, 0, row | {"code": "another"})
    status, out, err = call("check", "toy", "--cells", "2")
    assert (status, err) == (0, "") and out.endswith("of 6 values: 6 identical\n")
    assert out.splitlines()[0].endswith("since then something has changed for 1 (code).")
    assert out.splitlines()[1].split() == ["cell", "column", "kept", "now", "tolerance", "verdict"]
    workflow.keep(study, 0, row | {"dpo_kl": "9", "C3a": shown_off(row["C3a"], 0.25)})
    status, out, _ = call("check", "toy")
    assert status == 1 and "1 agrees" in out and "1 differs" in out
    assert re.search(r"length short, seed 0 +dpo_kl +9 +\S+ +0\.9 +differs", out)


def shown_off(text: str, by: float) -> str:
    """A number that is a little off."""
    return f"{float(text) + by:.6g}"


def test_which_cells_are_checked_depends_on_the_seed_alone(book, write):
    write(("seed: [0]", f"seed: {list(range(20))}"))
    study = studies.read("toy")
    for number in range(0, 40, 2):
        workflow.keep(study, number, a_row(study, number))
    first = studies.chosen(study, 3, seed=0)
    assert first == studies.chosen(study, 3, seed=0) and len(set(first)) == 3
    assert {number % 2 for number in first} == {0} and first != studies.chosen(study, 3, seed=1)
    assert studies.chosen(study, 99, seed=0) == list(range(0, 40, 2))


# --- where it is computed --------------------------------------------------------------------------------------------


PROFILES = ("kubernetes", "local", "slurm")


def plugins(given: dict) -> list[str]:
    """The packages that a profile needs beside Snakemake."""
    kinds = {"executor": given["executor"], "storage": given.get("default-storage-provider")}
    return [f"snakemake-{kind}-plugin-{name}" for kind, name in kinds.items() if name not in (None, "local")]


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_name_options_that_there_are_and_packages_that_are_missing(book, call, name):
    """Without its packages a profile is refused; with them, which CI has not, all that it would do is planned."""
    path = book / "data" / "studies" / "profiles" / name / "config.yaml"
    given = yaml.safe_load(path.read_text())
    options = {option.lstrip("-") for action in get_argument_parser()._actions for option in action.option_strings}
    assert given.keys() <= options
    if missing := [p for p in plugins(given) if importlib.util.find_spec(p.replace("-", "_")) is None]:
        message = f"profile {name!r}: Snakemake needs more packages for it: pip install {' '.join(missing)}\n"
        assert call("run", "toy", "--profile", name, "--dry-run") == (2, "", message)
        return
    if name == "kubernetes":  # a dry run looks into the bucket too
        offline = {"default-storage-provider": "fs", "default-storage-prefix": str(book / "bucket")}
        path.write_text(yaml.safe_dump(given | offline))
    status, out, err = call("run", "toy", "--profile", name, "--dry-run")
    assert status == 0 and re.search(r"^total +9$", out, re.MULTILINE), err
    assert not (book / "data" / "runs").exists()


def test_a_profile_that_is_not_there(book, call):
    status, _, err = call("run", "toy", "--profile", "moon")
    assert status == 2 and err == "profile: given 'moon'; allowed: one of kubernetes, local, slurm\n"


# --- those of the book -----------------------------------------------------------------------------------------------


def test_the_studies_of_the_book_can_be_read():
    known = {path.stem: studies.read(path.stem) for path in STUDIES.glob("*.yaml")}
    assert known.keys() >= {"backbones", "grids", "tiny"}
    backbones, grids = known["backbones"], known["grids"]
    assert len(backbones.cells) == 4 * 3 * 5 and len(grids.cells) == 5 * 5 * 3
    assert {cell.parameters.architecture for cell in backbones.cells} == {"gpt-neox", "llama", "qwen3", "gpt2"}
    claims = {rule.claim for rule in backbones.rules}
    assert claims == {"C1", "C2", "C3", "C5", "C6"}
    reader = params.presets("reader", "world")
    for axis in grids.axes[:-1]:
        values = [cell.parameters for cell in grids.cells if axis in cell.labels]
        assert reader[axis] in {getattr(p, axis) for p in values}, f"{axis}: the reader's own value is not among them"


def test_a_cell_of_the_tiny_study_comes_out_the_same(monkeypatch, call):
    monkeypatch.chdir(ROOT)
    assert len(studies.table("tiny").rows) == len(studies.read("tiny").cells) == 2
    status, out, err = call("check", "tiny", "--cells", "1")
    assert status == 0, out + err
