"""The run store: nothing twice, nothing stale, nothing broken, nothing lost."""

import ast
import importlib
import json
import math
import multiprocessing
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from prefdyn import runs
from prefdyn.runs import RunStore, code_fingerprint
from toys.specs import Toy, arrive_and_get


@pytest.fixture
def traces(tmp_path):
    folder = tmp_path / "traces"
    folder.mkdir()
    return folder


@pytest.fixture
def toy(traces):
    """Make a toy spec whose traces lie in this test's folder."""
    return lambda name, **more: Toy(name=name, traces=str(traces), **more)


@pytest.fixture
def said():
    return []


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def store(root, said):
    return RunStore(root, said.append)


def computed(traces) -> list[str]:
    """Names of the runs that were computed, in order."""
    log = traces / "computed"
    return log.read_text().split() if log.exists() else []


def test_a_run_is_computed_once(store, root, toy, traces, said):
    first = store.get(toy("a"))
    assert first.json("result") == {"total": 1, "continued": False}
    assert store.get(toy("a")) == first == RunStore(root).get(toy("a"))
    assert computed(traces) == ["a"] and said == []
    assert [p.name for p in root.iterdir()] == [first.key]  # neither locks nor halves are left
    assert store.find(toy("b")) is None


def test_a_run_records_what_it_is_and_where_it_comes_from(store, toy):
    run = store.get(toy("a", value=7))
    assert run.json("spec") == toy("a", value=7).model_dump(mode="json")
    provenance = run.json("provenance")
    assert provenance["code"] == code_fingerprint("toys.specs")
    assert provenance["versions"].keys() == {*runs.NUMERIC_PACKAGES, "python"}
    assert provenance["seconds"] >= 0
    listed = {"spec.json", "provenance.json", "result.json", "half.json", "deeper/more.txt"}
    assert run.json("manifest").keys() == listed


def test_the_key_depends_on_the_spec_and_its_parents(store, toy):
    specs = [toy("a"), toy("a", value=2), toy("b"), toy("a", needs=(toy("b"),)), toy("a", needs=(toy("b", value=2),))]
    keys = [store.key(spec) for spec in specs]
    assert len(set(keys)) == len(keys) and all(key.startswith("toy-") for key in keys)
    assert store.key(toy("a")) == keys[0]


def test_the_key_depends_on_versions_and_code(store, toy, monkeypatch):
    key = store.key(toy("a"))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "versions", lambda: dict.fromkeys(runs.NUMERIC_PACKAGES, "0.0"))
        assert store.key(toy("a")) != key
    with monkeypatch.context() as patch:
        patch.setattr(runs, "code_fingerprint", lambda module: "other code")
        assert store.key(toy("a")) != key
    assert store.key(toy("a")) == key


PACKAGE = {
    "__init__": "",
    "top": '''"""Top."""
from typing import TYPE_CHECKING

from . import middle
if TYPE_CHECKING:
    from . import typed


def f(x):
    """Doc."""
    return middle.g(x)
''',
    "middle": "def g(x):\n    from .bottom import H\n    return H(x)\n",
    "bottom": "class H:\n    'Doc.'\n\n    def __init__(self, x):\n        self.x = x + 1\n",
    "typed": "T = 1\n",
    "apart": "A = 1\n",
}
EDITS = {
    # module, old, new, whether the results may change
    "comment": ("top", "return middle", "# a word\n    return middle", False),
    "docstring of a function": ("top", "Doc.", "Another.", False),
    "docstring of a module": ("top", "Top.", "Another.", False),
    "docstring of a class two imports away": ("bottom", "Doc.", "Another.", False),
    "layout": ("bottom", "x + 1", "(x\n            + 1)", False),
    "a module that is not imported": ("apart", "1", "2", False),
    "a module for type checkers only": ("typed", "1", "2", False),
    "code": ("top", "middle.g(x)", "middle.g(2 * x)", True),
    "code of an import": ("middle", "H(x)", "H(-x)", True),
    "code two imports away": ("bottom", "x + 1", "x + 2", True),
    "a new import": ("top", "from . import middle", "from . import apart, middle", True),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package on the path; yields its folder and how to fingerprint it as it is now."""
    folder = tmp_path / "sources" / "small_package"
    folder.mkdir(parents=True)
    for name, source in PACKAGE.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder.parent)

    def fingerprint() -> str:
        code_fingerprint.cache_clear()
        importlib.invalidate_caches()
        return code_fingerprint("small_package.top")

    yield folder, fingerprint
    code_fingerprint.cache_clear()
    sys.modules.pop("small_package", None)


@pytest.mark.parametrize("case", EDITS)
def test_the_fingerprint_changes_with_code_that_is_reached_and_nothing_else(package, case):
    folder, fingerprint = package
    module, old, new, changes = EDITS[case]
    before = fingerprint()
    source = PACKAGE[module]
    assert old in source
    (folder / f"{module}.py").write_text(source.replace(old, new))
    assert (fingerprint() != before) == changes


def test_results_do_not_depend_on_the_code_of_store_pages_or_command_line():
    reached, todo = set(), ["measure"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            source = Path(importlib.util.find_spec(f"prefdyn.{name}").origin).read_text(encoding="utf-8")
            todo += runs._siblings(ast.parse(source))
    assert reached >= {"measure", "recipes", "train", "alignment", "controls", "objectives", "policy", "data", "world"}
    assert not reached & {"runs", "page", "plots", "cli", "params", "plan", "stats"}


def test_a_run_that_was_interrupted_is_continued_and_this_is_said(store, root, toy, traces, said):
    (traces / "a.stop").touch()
    with pytest.raises(RuntimeError, match="told to stop"):
        store.get(toy("a"))
    key = store.key(toy("a"))
    assert (root / f"{key}.partial" / "half.json").exists()
    assert store.find(toy("a")) is None and store.list() == []
    (traces / "a.stop").unlink()
    run = RunStore(root, said.append).get(toy("a"))
    assert run.json("result")["continued"] and not (root / f"{key}.partial").exists()
    assert said == [f"run {key} was interrupted: continuing it"]


def flip(path):
    """Change one byte in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "a byte": (lambda f: flip(f / "result.json"), "result.json has changed"),
    "a byte further down": (lambda f: flip(f / "deeper/more.txt"), "deeper/more.txt has changed"),
    "a byte of the spec": (lambda f: flip(f / "spec.json"), "spec.json has changed"),
    "an empty file": (lambda f: (f / "result.json").write_text(""), "result.json has changed"),
    "a missing file": (lambda f: (f / "result.json").unlink(), "result.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"result.json": "0'),
        "manifest.json cannot be read",
    ),
    "another manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is empty"),
    "nothing left": (lambda f: [shutil.rmtree(f), f.mkdir()], "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_set_aside_and_computed_again(store, root, toy, traces, said, damage):
    run = store.get(toy("a"))
    do, what = DAMAGES[damage]
    do(run.folder)
    again = RunStore(root, said.append).get(toy("a"))
    assert again.json("result")["total"] == 1
    assert computed(traces) == ["a", "a"]
    (line,) = said
    aside = [p.name for p in root.iterdir() if ".damaged-" in p.name]
    assert run.key in line and what in line and aside[0] in line and len(aside) == 1


def test_damage_is_noticed_where_a_run_is_a_parent(store, root, toy, traces, said):
    parent = store.get(toy("parent", value=5))
    flip(parent.folder / "result.json")
    child = RunStore(root, said.append).get(toy("child", needs=(toy("parent", value=5),)))
    assert child.json("result")["total"] == 6 and len(said) == 1


def diamond(toy) -> Toy:
    """A run with two parents that wait for each other, and a grandparent of both."""
    first = toy("first", value=1)
    left = toy("left", value=10, needs=(first,), waits_for=("right.started",))
    right = toy("right", value=100, needs=(first,), waits_for=("left.started",))
    return toy("last", value=1000, needs=(left, right))


def test_what_does_not_depend_on_each_other_is_computed_at_once(store, toy, traces):
    """Left and right each wait until the other has started, which one process alone would never see.

    The sum counts the grandparent on both ways: 1000 + (10 + 1) + (100 + 1).
    """
    last = diamond(toy)
    other = toy("other")
    first, second, third = store.ensure([last, other, last], workers=2)
    assert first == third and first.json("result")["total"] == 1112
    assert second.json("result")["total"] == 1
    assert sorted(computed(traces)) == ["first", "last", "left", "other", "right"]
    assert computed(traces).index("last") > max(computed(traces).index(name) for name in ("left", "right"))
    assert store.ensure([last, other], workers=2) == [first, second]
    assert len(computed(traces)) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_does_not_lose_the_others(store, root, toy, traces, workers):
    (traces / "bad.stop").touch()
    bad, good, late = toy("bad"), toy("good"), toy("late")
    child = toy("child", needs=(bad,))
    with pytest.raises(RuntimeError, match="bad was told to stop") as error:
        store.ensure([child, good, late], workers=workers)
    notes = " ".join(error.value.__notes__)
    assert store.key(bad) in notes and "2 other runs are finished and kept; 1 were not started" in notes
    assert {row["key"] for row in store.list()} == {store.key(good), store.key(late)}
    (traces / "bad.stop").unlink()
    assert store.ensure([child], workers=1)[0].json("result")["total"] == 2
    assert sorted(computed(traces)) == ["bad", "bad", "child", "good", "late"]


def test_small_runs_need_no_processes(store, toy, monkeypatch):
    def no_pool(*args, **kwargs):
        raise AssertionError("a process for runs that are done at once")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", no_pool)
    made = store.ensure([toy("a", cost=1.0), toy("b", cost=1.0)])
    assert [run.json("result")["total"] for run in made] == [1, 1]


def test_two_processes_that_want_the_same_run_compute_it_once(root, toy, traces):
    """Each says that it has arrived; whichever computes waits for both, so that the other meets its lock."""
    spec = toy("shared", value=3, waits_for=("one", "two"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=arrive_and_get, args=(str(root), spec, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert computed(traces) == ["shared"]


def test_runs_can_be_listed_named_and_removed(store, root, toy, traces):
    made = {store.get(toy(name)).key for name in ("a", "b")}
    (root / "toy-0123.partial").mkdir()
    (root / "notes.txt").write_text("not a run")
    rows = store.list()
    assert {row["key"] for row in rows} == made
    assert all(row["kind"] == "toy" and row["megabytes"] >= 0 and row["seconds"] >= 0 for row in rows)
    assert [row["finished"] for row in rows] == sorted(row["finished"] for row in rows)
    one, other = sorted(made)
    assert store.named(one).key == one
    different = next(i for i in range(len(one)) if one[i] != other[i])
    assert store.named(one[: different + 1]).key == one
    with pytest.raises(KeyError, match="2 runs begin like that"):
        store.named("toy-")
    with pytest.raises(KeyError, match="no such run among 2"):
        store.named("dpo-")
    store.remove(one)
    assert [row["key"] for row in store.list()] == [other]
    store.ensure([toy("a"), toy("b")], workers=1)
    assert len(computed(traces)) == 3  # the removed one again, the other not


def test_a_damaged_run_does_not_hide_the_others_from_the_list(store, toy):
    runs_made = [store.get(toy(name)) for name in ("a", "b")]
    (runs_made[0].folder / "provenance.json").unlink()
    rows = store.list()
    assert [row["key"] for row in rows] == [runs_made[1].key, runs_made[0].key]
    assert rows[1]["finished"] == "damaged" and math.isnan(rows[1]["seconds"])


def test_tables_of_several_seeds_are_put_under_each_other(store, toy):
    specs = {seed: toy(f"seed {seed}") for seed in (3, 5)}
    for seed, spec in specs.items():
        pd.DataFrame({"x": [seed, seed + 1]}).to_parquet(store.get(spec).folder / "numbers.parquet")
    table = store.gather(specs, "numbers")
    assert table.to_dict("list") == {"x": [3, 4, 5, 6], "seed": [3, 3, 5, 5]}


def test_where_runs_are_kept(tmp_path, monkeypatch):
    """Where the variable says, or in the project that holds the current folder, or in the current folder."""
    monkeypatch.delenv("PREFDYN_RUNS", raising=False)
    project = tmp_path / "project"
    (project / "lib" / "prefdyn").mkdir(parents=True)
    (project / "notebooks" / "deep").mkdir(parents=True)
    monkeypatch.chdir(project / "notebooks" / "deep")
    assert RunStore().root == project / "data" / "runs"
    monkeypatch.chdir(tmp_path)
    assert RunStore().root == tmp_path / "data" / "runs"
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "elsewhere"))
    assert RunStore().root == tmp_path / "elsewhere"
    assert RunStore(tmp_path / "given").root == tmp_path / "given"


def test_what_is_said_goes_to_the_terminal_by_default(root, toy, capsys):
    run = RunStore(root).get(toy("a"))
    flip(run.folder / "result.json")
    RunStore(root).get(toy("a"))
    assert "is damaged" in capsys.readouterr().err
    assert json.loads((run.folder / "result.json").read_text())["total"] == 1
