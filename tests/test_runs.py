"""The run store: nothing twice, nothing stale, nothing broken, nothing lost."""

import dataclasses
import errno
import fcntl
import functools
import importlib
import json
import math
import multiprocessing
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import claims, measure
from prefdyn.lab import fingerprint, policy, recipes, runs, train, world, worlds
from prefdyn.lab.runs import RunError, RunStore, code_fingerprint
from prefdyn.lab.world import TONES, Prompt, World
from prefdyn.lab.worlds import EASY, HARD
from prefdyn.lens import alignment, controls
from pydantic import BaseModel
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
    reached = {name.rpartition(".")[2] for name in fingerprint._reached("prefdyn.findings.measure")}
    assert reached >= {"measure", "recipes", "train", "alignment", "controls", "sft", "policy", "data"}
    assert reached >= {"world", "worlds"}
    assert not reached & {"runs", "page", "plots", "cli", "params", "plan", "stats"}


FLOORS = {
    "low/bottom": "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x - 1\n",
    "low/apart": "def h(x):\n    return x\n",
    "low/__init__": '"""A floor."""\n\nfrom .apart import h\nfrom .bottom import f\n',
    "high/top": "from ..low import bottom\nfrom ..low.bottom import f\n\n\ndef top(x):\n    return f(bottom.g(x))\n",
    "high/__init__": "",
    "__init__": "",
}


def test_the_fingerprint_follows_sub_packages(tmp_path, monkeypatch):
    """What a floor's list of names imports is not reached through it; a function that moves between modules is seen."""
    folder = tmp_path / "floors_package"
    for name, source in FLOORS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def now() -> str:
        code_fingerprint.cache_clear()
        importlib.invalidate_caches()
        return code_fingerprint("floors_package.high.top")

    first = now()
    (folder / "low/apart.py").write_text("def h(x):\n    return -x\n")
    (folder / "low/__init__.py").write_text("")
    assert now() == first
    (folder / "low/bottom.py").write_text(FLOORS["low/bottom"].replace("x + 1", "x + 2"))
    changed = now()
    assert changed != first
    (folder / "low/bottom.py").write_text("from .moved import f\n\n\ndef g(x):\n    return x - 1\n")
    (folder / "low/moved.py").write_text("def f(x):\n    return x + 2\n")
    assert now() not in (first, changed)
    code_fingerprint.cache_clear()


@functools.cache
def planned(measured: bool) -> BaseModel:
    """A DPO run of the world, or its measurement."""
    p = check({"profile": "smoke"})
    return plan.alignment_run(p, plan.run(p, 0, "dpo")) if measured else plan.run(p, 0, "dpo")


class OtherPrompt(Prompt):
    """Another class of that name."""


def like(function):
    """A function that says it is `function`."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


# How it is named: where it is, what is set there, to what. A frozen world is opened by its `vars`; what is in both
# worlds is changed where it is stated and where the worlds are listed.
CHANGED = {
    "a table": ("world.TONES", world, "TONES", dict(TONES, warm=("dear", "love"))),
    "a table in place": ("world.TONES", TONES, "warm", ("dear", "love")),
    "the order of a table": ("world.TONES", world, "TONES", dict(reversed(TONES.items()))),
    "a text": ("world.HEDGE", world, "HEDGE", "maybe"),
    "the type of a number": ("train.EPS", train, "EPS", 1),
    "a constant among several": ("train.BETAS", train, "BETAS", (0.9, 0.95)),
    "a number": ("measure.TOKENS_OF", measure, "TOKENS_OF", 5),
    "a marker": ("policy.REPLY", policy, "REPLY", "<answer>"),
    "what is put together": ("policy.CHAT_TEMPLATE", policy, "CHAT_TEMPLATE", "{{ messages }}"),
    "what is put together elsewhere": ("controls.SCALED", controls, "SCALED", ("positive",)),
    "what is made of literals": ("world._SIGN_OFF", world, "_SIGN_OFF", {}),
    "a pattern": ("world._CLOSING", world, "_CLOSING", re.compile("bye")),
    "a table of limits": ("alignment.TOLERANCES", alignment, "TOLERANCES", {}),
    "a function": ("world._draw_skill", world, "_draw_skill", lambda rng, skills: "expert"),
    "a function in its disguise": ("world._draw_skill", world, "_draw_skill", like(world._draw_skill)),
    "another of its functions": ("world._draw_skill", world, "_draw_skill", world.usable_skills),
    "a function, cached": ("world._draw_skill", world, "_draw_skill", functools.cache(world._draw_skill)),
    "a class": ("world.Prompt", world, "Prompt", OtherPrompt),
    "nothing": ("world.usable_skills", world, "usable_skills", None),
    "a method": ("world.World.reward", World, "reward", lambda self, prompt, reply: 7.0),
    "a method in its disguise": ("world.World.reward", World, "reward", like(World.reward)),
    "another of its methods": ("world.World.axes", World, "axes", World.answer_type),
    "a method, cached": ("world.World.reward", World, "reward", functools.cache(World.reward)),
    "no method": ("world.World.true_value", World, "true_value", None),
    "a property": ("world.Prompt.text", Prompt, "text", property(lambda self: "write")),
    "a property in its disguise": ("world.Prompt.text", Prompt, "text", property(like(Prompt.text.fget))),
    "a value for a property": ("world.Prompt.text", Prompt, "text", "write"),
    "a cached property": ("world.World.values", World, "values", functools.cached_property(lambda self: {})),
    "a cached property in its disguise": (
        "world.World.values", World, "values", functools.cached_property(like(World.values.func)),
    ),
    "a value for a cached property": ("world.World._clauses", World, "_clauses", {}),
    "a field of a world": ("worlds.EASY, worlds.WORLDS", vars(EASY), "weights", dict(EASY.weights, fact=3.0)),
    "a table of a world": ("worlds.EASY, worlds.WORLDS", EASY.weights, "fact", 3.0),
    "the order of a table of a world": (
        "worlds.EASY, worlds.WORLDS", vars(EASY), "weights", dict(reversed(EASY.weights.items())),
    ),
    "what is believed in a world": ("worlds.EASY, worlds.WORLDS", EASY.misconceptions, ("fox", "home"), "den"),
    "a field of nothing": ("worlds.EASY, worlds.WORLDS", vars(EASY), "animals", None),
    "the other world": ("worlds.HARD, worlds.WORLDS", HARD.citing, "sound", 1.0),
    "a method of one world": ("worlds.EASY", vars(EASY), "reward", lambda prompt, reply: 7.0),
    "what a world has kept": ("worlds.EASY", EASY.values, "home", ["den"]),
    "another world": ("worlds.EASY", worlds, "EASY", HARD),
    "another world of that name": ("worlds.WORLDS", worlds.WORLDS, "easy", HARD),
    "other worlds": ("worlds.WORLDS", worlds, "WORLDS", {"easy": EASY}),
}  # fmt: skip


def change(patch: pytest.MonkeyPatch, case: str) -> str:
    """Make one change of CHANGED; returns how it is named."""
    named, where, name, value = CHANGED[case]
    (patch.setitem if isinstance(where, dict) else patch.setattr)(where, name, value)
    return named


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_notebook_changes_in_the_library_is_refused_by_name(store, monkeypatch, case):
    """No key would tell, and other processes compute with the code as it is written. Set back, all is as before."""
    spec = planned(True)
    key = store.key(spec)
    with monkeypatch.context() as patch:
        named = change(patch, case)
        for ask in (store.key, store.find, store.get, lambda s: store.ensure([s]), lambda s: store.gather({0: s}, "x")):
            with pytest.raises(RunError) as error:
                ask(spec)
            said = str(error.value)
            assert said.startswith(f"{named}: not as the library's code has it") and "\n" not in said
            assert f"change it in {named.partition('.')[0]}.py and restart" in said
    assert store.key(spec) == key


@pytest.mark.parametrize("case", ["a table of a world", "another world", "what a world has kept", "a pattern"])
def test_what_is_changed_before_anything_is_asked_for_is_refused_and_can_be_set_back(store, monkeypatch, case):
    """What is computed from it is not taken to be changed, then or later."""
    spec = planned(False)
    fingerprint._derived.cache_clear()
    with monkeypatch.context() as patch:
        named = change(patch, case)
        with pytest.raises(RunError, match=f"^{re.escape(named)}: not as"):
            store.key(spec)
    assert store.key(spec)


def test_what_a_world_kept_of_a_table_that_was_changed_is_refused(store, monkeypatch):
    """The table is set back, but what was made of it would be used: also in the kernel that goes on like that."""
    monkeypatch.delitem(vars(EASY), "values", raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(EASY.misconceptions, ("fox", "home"), "moon")
        assert "moon" in EASY.values["home"]
    assert EASY.misconceptions["fox", "home"] == "barn" and "moon" in EASY.values["home"]
    with pytest.raises(RunError, match=r"^worlds\.EASY: not as"):
        store.key(planned(False))
    for name in vars(EASY).keys() - {field.name for field in dataclasses.fields(EASY)}:  # and what was made of it
        del vars(EASY)[name]
    assert store.key(planned(False)) and "moon" not in EASY.values["home"]


DEFINITIONS = """import functools
{decorator}
def f(x):
    return x
class C:
    {decorator}
    def m(x):
        return x
    class D:
        pass
"""


@pytest.mark.parametrize("decorator", ["", "@property", "@functools.cached_property", "@staticmethod", "@classmethod"])
def test_definitions_of_every_kind_are_known_as_own_or_replaced(tmp_path, monkeypatch, decorator):
    """In a module of the name of one that is open; the same function defined again is another one."""
    name = f"kinds_{decorator.rpartition('.')[2].strip('@')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    source = DEFINITIONS.format(decorator=decorator)
    (tmp_path / name / "world.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module, again = importlib.import_module(f"{name}.world"), {}
    assert fingerprint._stated_changes(module.__name__) == set()
    exec(source, again)
    for where, part in ((module, "f"), (module.C, "m"), (module.C, "D")):
        with monkeypatch.context() as patch:
            patch.setattr(where, part, vars(again["C"])[part] if where is module.C else again[part])
            said = part if where is module else f"C.{part}"
            assert fingerprint._stated_changes(module.__name__) == {(module.__name__, said)}
    assert fingerprint._stated_changes(module.__name__) == set()


def test_all_that_is_changed_is_named_at_once(store, monkeypatch):
    """First what is stated; once this is set back, what is computed."""
    monkeypatch.setitem(EASY.weights, "tone", 0.0)
    monkeypatch.setattr(policy, "CHAT_TEMPLATE", "{{ messages }}")
    with monkeypatch.context() as patch:
        patch.setattr(train, "BETAS", (0.9, 0.95))
        patch.setattr(World, "reward", None)
        patch.setitem(TONES, "warm", ("dear", "love"))
        named = r"^train\.BETAS, world\.TONES, world\.World\.reward: .* in train\.py, world\.py and"
        with pytest.raises(RunError, match=named):
            store.key(planned(False))
    named = r"^policy\.CHAT_TEMPLATE, worlds\.EASY, worlds\.WORLDS: .* in policy\.py, worlds\.py and"
    with pytest.raises(RunError, match=named):
        store.key(planned(False))


def test_what_no_result_depends_on_may_be_changed(store, monkeypatch):
    """Constants of modules that a run does not reach; functions outside of the world, as tests replace them."""
    key = store.key(planned(False))
    monkeypatch.setattr(claims, "SURE", 0.5)
    monkeypatch.setattr(measure, "TOKENS_OF", 5)
    monkeypatch.setattr(policy, "save", None)
    monkeypatch.setattr(world, "something", 1, raising=False)
    monkeypatch.setattr(World, "something", 1, raising=False)
    assert store.key(planned(False)) == key
    with pytest.raises(RunError, match=r"measure\.TOKENS_OF"):
        store.key(planned(True))


def test_what_a_spec_carries_may_be_changed_and_changes_its_key(store, monkeypatch):
    """In itself or in a spec within it; set back, it is the same run."""
    p = check({"profile": "smoke"})

    def keys() -> list[str]:
        run = plan.run(p, 0, "dpo")
        return [store.key(spec) for spec in (run, run.sft, run.scored(), plan.alignment_run(p, run))]

    before = keys()
    with monkeypatch.context() as patch:
        patch.setitem(world.SKILLS, "novice", world.SKILLS["novice"] | {"slip": 0.5})
        changed = keys()
        patch.setitem(EASY.weights, "fact", 3.0)
        with pytest.raises(RunError, match=r"^worlds\.EASY, worlds\.WORLDS: not"):
            keys()
    assert keys() == before and not set(changed) & set(before)
    monkeypatch.setattr(recipes.DataSpec, "carries", frozenset())
    monkeypatch.setitem(world.SKILLS, "expert", world.SKILLS["novice"])
    with pytest.raises(RunError, match=r"^world\.SKILLS: not"):
        keys()


def test_a_spec_of_a_notebook_has_no_key(store, monkeypatch):
    monkeypatch.setattr(Toy, "__module__", "__main__")
    with pytest.raises(RunError, match="Toy: is defined in a notebook"):
        store.key(Toy(name="a", traces="."))


def test_another_precision_is_another_result(store, toy):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RunError, match=r"default dtype is torch.float64, .* torch.set_default_dtype"):
            store.key(toy("a"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert store.key(toy("a"))


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


def failing(number: int):
    """What fails as the operating system does."""

    def call(*args, **kwargs):
        raise OSError(number, errno.errorcode[number])

    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_said(store, toy, traces, monkeypatch, number):
    """Also where the library of locks would put a mere file in place of one."""
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing(number))
        with pytest.raises(
            RunError, match=r"this file system has no locks; set PREFDYN_RUNS to a folder on one"
        ) as error:
            store.get(toy("a"))
    assert str(store.root) in str(error.value) and computed(traces) == []
    assert store.get(toy("a")).json("result")["total"] == 1


def test_a_library_that_knows_no_locks_is_said(store, toy, monkeypatch):
    def none(path):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(runs, "FileLock", none)
    with pytest.raises(RunError, match="this file system has no locks"):
        store.get(toy("a"))


def unwritable(case: str, root, monkeypatch) -> None:
    """Make it impossible to write into a folder of runs."""
    if case == "a file":
        root.write_text("")
    elif case == "in a file":
        root.parent.write_text("")
    elif case == "read-only":
        monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    elif case == "somebody's":
        root.mkdir()
        monkeypatch.setattr(runs, "FileLock", failing(errno.EACCES))


@pytest.mark.parametrize("case", ["a file", "in a file", "read-only", "somebody's"])
def test_a_folder_that_cannot_be_written_is_said(tmp_path, toy, traces, monkeypatch, case):
    root = tmp_path / "deeper" / "runs"
    root.parent.mkdir() if case != "in a file" else None
    unwritable(case, root, monkeypatch)
    with pytest.raises(RunError, match=r"runs: runs cannot be kept here \(.+\); set PREFDYN_RUNS to a folder") as error:
        RunStore(root).get(toy("a"))
    assert str(root) in str(error.value) and "\n" not in str(error.value) and computed(traces) == []


def test_a_damaged_run_that_cannot_be_set_aside_is_said(store, root, toy, monkeypatch):
    flip(store.get(toy("a")).folder / "result.json")
    monkeypatch.setattr(Path, "rename", failing(errno.EROFS))
    with pytest.raises(RunError, match="runs cannot be kept here"):
        RunStore(root).find(toy("a"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_is_full_is_said(store, toy, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "compute", failing(number))
        with pytest.raises(RunError, match=r"there is no room to keep runs .* set PREFDYN_RUNS to another folder"):
            store.get(toy("a"))
    assert store.get(toy("a")).json("result")["total"] == 1


def test_a_library_that_finds_no_room_says_so_in_its_own_way(store, toy, traces, monkeypatch):
    """Its error is told along; with room left it is an error like any other."""
    (traces / "a.stop").touch()
    with pytest.raises(RuntimeError, match=r"^a was told to stop"):
        store.get(toy("a"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"there is no room to keep runs \(a was told to stop\)"):
        store.get(toy("a"))
