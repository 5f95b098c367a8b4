"""Parameters: errors that say what to change, presets that hold together, and the runs that they describe."""

import ast
import json
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import IPython
import nbformat
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants
from IPython.core.inputtransformer2 import TransformerManager
from prefdyn.book import calibrating, params, plan, variants
from prefdyn.book.params import PRESETS, ParameterError, check, read_cells
from prefdyn.lab import policy
from prefdyn.lab.runs import RunStore
from prefdyn.lens import controls
from prefdyn.methods import registry
from toys.models import tiny_policy


def refused(**given) -> str:
    """The message with which parameters are refused."""
    with pytest.raises(ParameterError) as error:
        check(given)
    return str(error.value)


@pytest.mark.parametrize("profile", PRESETS)
@pytest.mark.parametrize("dataset", ["world", "some.jsonl"])
def test_every_preset_holds_together(profile, dataset):
    if profile == "paper" and dataset == "world":
        assert "give `model`" in refused(profile=profile)
        return
    model = "some/model" if profile == "paper" else "scratch"
    p = check({"profile": profile, "dataset": dataset, "model": model})
    assert p.model_dump() == params.presets(profile, dataset) | {"dataset": dataset, "model": model}
    assert p.width % (2 * p.heads) == 0
    assert p.batch <= p.pairs and p.probe <= max(p.pairs, p.demonstrations)
    assert p.ppo_batch <= p.rollouts and (dataset == "world" or p.reward == "learned")


@pytest.mark.parametrize("profile", ["smoke", "reader"])
def test_presets_of_the_world_describe_runs(profile):
    p = check({"profile": profile})
    for seed in p.seeds:
        run = plan.run(p, seed, "dpo")
        assert run.optimisation.steps == round(p.epochs * p.pairs / p.batch)
        assert run.sft.data.seed == run.sft.seed == run.optimisation.seed == seed
        assert len(run.steps()) == p.checkpoints
        rewarded = plan.run(p, seed, "ppo")
        assert (rewarded.sft, rewarded.control, rewarded.reward) == (run.sft, controls.FULL, None)
        assert (rewarded.optimisation.steps, rewarded.optimisation.batch_size) == (p.iterations, p.ppo_batch)


def test_nothing_given_is_the_reader_profile_of_the_world():
    assert check({}) == check({"profile": None, "beta": None}) == check({"profile": "reader", "dataset": "world"})


def test_none_means_from_the_profile_and_values_override_it():
    p = check({"profile": "smoke", "beta": 0.5, "pairs": None, "seeds": [4]})
    assert (p.beta, p.pairs, p.seeds) == (0.5, PRESETS["smoke"]["pairs"], [4])


def test_unknown_names_suggest_the_nearest():
    message = refused(betta=0.5)
    assert (
        "betta: no such parameter. Did you mean 'beta'?" in message
        and "There are: architecture, batch, beta" in message
    )
    assert "Did you mean" not in refused(zzzzzzzz=1)
    with pytest.raises(ParameterError, match=r"lr: no such parameter.* There are: beta, profile"):
        check({"lr": 0.1}, known=["profile", "beta"])


REFUSED = {
    "a text for a number": ({"pairs": "many"}, "pairs: given 'many' (str); allowed: a whole number >= 8"),
    "a fraction for a number": ({"pairs": 8.5}, "pairs: given 8.5 (float)"),
    "a truth for a number": ({"layers": True}, "layers: given True (bool)"),
    "a list for a number": ({"beta": [0.1]}, "beta: given [0.1] (list); allowed: a number > 0"),
    "too few": ({"pairs": 7}, "pairs: given 7 (int); allowed: a whole number >= 8"),
    "too much": ({"label_noise": 0.6}, "label_noise: given 0.6 (float); allowed: a number >= 0 and <= 0.5"),
    "zero": ({"beta": 0.0}, "beta: given 0.0 (float)"),
    "infinite": ({"epochs": float("inf")}, "epochs: given inf (float)"),
    "not a number": ({"lr": float("nan")}, "lr: given nan (float)"),
    "not among the choices": ({"method": "best"}, "method: given 'best' (str); allowed: one of auto, forward, central"),
    "a day that is not there": ({"today": "2025-02-30"}, "today: given '2025-02-30' (str) (day"),
    "a day in other words": (
        {"today": "1 May 2025"},
        "today: given '1 May 2025' (str) (no day as YYYY-MM-DD); allowed",
    ),
    "a day without dashes": ({"today": "20250501"}, "(no day as YYYY-MM-DD)"),
    "a day in other digits": ({"today": "٢٠٢٥-٠١-٠١"}, "(no day as YYYY-MM-DD)"),
    "a number for a day": ({"today": 2025}, "today: given 2025 (int); allowed: a text: the day"),
    "a table for a data set": ({"dataset": pd.DataFrame({"x": [1, 2]})}, "(DataFrame); allowed: a text: 'world', a"),
    "a function": ({"check": len}, "check: given <built-in function len> (builtin_function_or_method); allowed: a"),
    "a set of seeds": ({"seeds": {1, 2}}, "seeds: given {1, 2} (set)"),
    "fractions of an array": ({"seeds": np.array([0.5, 1.0])}, "seeds: given [0.5, 1.0] (list)"),
    "a range with a seed below 0": ({"seeds": range(-1, 2)}, "seeds: given [-1, 0, 1] (list) (no negative seed)"),
    "a NumPy number out of range": ({"beta": np.float32(-0.5)}, "beta: given -0.5 (float)"),
    "no dataset": ({"dataset": ""}, "dataset: given '' (str)"),
    "a number for a dataset": ({"dataset": 3}, "dataset: given 3 (int)"),
    "another profile": ({"profile": "huge"}, "profile: given 'huge' (str); allowed: one of smoke, reader, paper"),
    "a number for a profile": ({"profile": 3}, "profile: given 3 (int)"),
    "a seed twice": ({"seeds": [1, 2, 1]}, "seeds: given [1, 2, 1] (list) (each seed once)"),
    "a seed twice in a text": ({"seeds": "1,1"}, "(each seed once)"),
    "a negative seed": ({"seeds": [-1]}, "(no negative seed)"),
    "no seed": ({"seeds": []}, "seeds: given [] (list)"),
    "a seed that is no number": (
        {"seeds": [0, "x"]},
        "seeds: given [0, 'x'] (list); allowed: a list",
    ),
    "a text that is no seeds": ({"seeds": "0;1"}, "seeds: given '0;1' (str)"),
    "a number for a truth": ({"whiten": 1}, "whiten: given 1 (int); allowed: True or False"),
    "another reward": ({"reward": "loud"}, "reward: given 'loud' (str); allowed: one of true, learned"),
    "no clip": ({"clip": 0.0}, "clip: given 0.0 (float); allowed: a number > 0"),
    "more than no discount": ({"gamma": 1.5}, "gamma: given 1.5 (float); allowed: a number > 0 and <= 1"),
    "no training from scratch": ({"sft_steps": 0}, "sft_steps: given 0 (int)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_with_what_is_allowed(case):
    given, said = REFUSED[case]
    assert said in refused(**given)


def test_all_problems_are_told_at_once():
    message = refused(betta=1, pairs=1, method="x", profile="huge")
    assert message.count("\n") == 4 and all(name in message for name in ("betta", "pairs", "method", "profile"))


@pytest.mark.parametrize(("given", "seeds"), [("0,1, 2", [0, 1, 2]), ("7", [7]), (7, [7]), ([0, 5], [0, 5])])
def test_seeds_as_a_command_line_gives_them(given, seeds):
    assert check({"seeds": given}).seeds == seeds


def test_the_true_reward_as_a_command_line_gives_it():
    """There reward=true is read as a truth."""
    assert check({"reward": True}).reward == check({"reward": "true"}).reward == "true"
    assert "reward: given False (bool); allowed: one of true, learned" in refused(reward=False)


def test_a_whole_number_is_a_number():
    assert check({"beta": 1}).beta == 1.0


def test_every_parameter_has_a_meaning_and_a_preset():
    for name in params.Parameters.model_fields:
        allowed, meaning = params.meaning(name)
        assert allowed and meaning and meaning not in allowed
        assert all(name in params.presets(profile, "world") for profile in PRESETS)
    with pytest.raises(ParameterError, match="'huge'; allowed: one of smoke"):
        params.presets("huge", "world")


COMPUTED = {
    "a range": ({"seeds": range(3)}, {"seeds": [0, 1, 2]}),
    "a tuple": ({"seeds": (4, 5)}, {"seeds": [4, 5]}),
    "an array": ({"seeds": np.arange(2)}, {"seeds": [0, 1]}),
    "NumPy's whole numbers": ({"seeds": [np.int64(3)], "pairs": np.int32(64)}, {"seeds": [3], "pairs": 64}),
    "NumPy's numbers": ({"beta": np.float64(0.5), "lr": np.array(0.25)}, {"beta": 0.5, "lr": 0.25}),
    "NumPy's truths": ({"whiten": np.bool_(False)}, {"whiten": False}),
    "NumPy's texts": ({"optimizer": np.str_("sgd")}, {"optimizer": "sgd"}),
    "rows of an array": ({"dpo_negative": np.array([[0, 1], [8, 0]])}, {"dpo_negative": [[0, 1.0], [8, 0.0]]}),
    "rows of tuples": ({"dpo_negative": ((0, 1.0), (8, 0.5))}, {"dpo_negative": [[0, 1.0], [8, 0.5]]}),
    "names in a tuple": ({"variants": ("late", "early")}, {"variants": ["late", "early"]}),
    "a path": ({"dataset": PurePosixPath("a/b.jsonl")}, {"dataset": "a/b.jsonl"}),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_values_that_mean_one_thing_are_taken_as_that(case):
    """With plain types, as every file that names them shows them."""
    given, plain = COMPUTED[case]
    assert check(given) == check(plain)
    for name, value in plain.items():
        shown = check(given).model_dump(mode="json")[name]
        assert shown == value and type(shown) is type(value)


def test_the_day_that_is_told():
    assert check({}).today == "2025-01-01" and check({"today": "2024-02-29"}).today == "2024-02-29"


CELL = '# what a reader may change\nprofile = "smoke"\nbeta: float = None  # from the profile\nseeds = None'
ASKS = "from prefdyn import params\np = params.read()"


def read_after(*cells: str) -> params.Parameters:
    """What `read_cells` finds in a kernel that executed these cells, the last of which asks."""
    namespace: dict = {}
    for cell in cells[:-1]:
        try:
            exec(cell, namespace)
        except Exception:  # as in a kernel, which goes on
            continue
    return read_cells(cells, namespace)


SMOKE = {"profile": "smoke"}
READ = {
    "the cell": (["import os", CELL, ASKS], {}),
    "a computed value": ([CELL, "beta = 1/2", ASKS], {"beta": 0.5}),
    "a value computed in the cell": ([CELL.replace("None  #", "1 / 4  #"), ASKS], {"beta": 0.25}),
    "a value computed from another": (["half = 0.5", CELL, "beta = half / 2", ASKS], {"beta": 0.25}),
    "computed seeds": ([CELL, "seeds = list(range(5))", ASKS], {"seeds": [0, 1, 2, 3, 4]}),
    "seeds of a comprehension": ([CELL, "seeds = [2 * k for k in range(2)]", ASKS], {"seeds": [0, 2]}),
    "what papermill adds": (
        ["%magic", CELL, "# Parameters\nbeta = 0.5\nseeds = [3, 4]\n", ASKS],
        {"beta": 0.5, "seeds": [3, 4]},
    ),
    "with a profile": (
        [CELL, '# Parameters\nprofile = "reader"\nbeta = 0.5', ASKS],
        {"profile": "reader", "beta": 0.5},
    ),
    "the profile alone": ([CELL, 'profile = "reader"', ASKS], {"profile": "reader"}),
    "two cells of one's own": ([CELL, "beta = 0.5", "'seeds'\nseeds = [7]", ASKS], {"beta": 0.5, "seeds": [7]}),
    "several names at once": ([CELL, "beta, seeds = 0.5, [7]", ASKS], {"beta": 0.5, "seeds": [7]}),
    "the same value twice": ([CELL.replace("seeds", "lr"), "beta = lr = 0.5", ASKS], {"beta": 0.5, "lr": 0.5}),
    "not by assignment alone": ([CELL, "if True:\n    beta = 0.5", ASKS], {"beta": 0.5}),
    "with an import": ([CELL, "import math\nbeta = math.sqrt(4)", ASKS], {"beta": 2.0}),
    "by an operator": ([CELL, "beta = 2", "beta /= 4", ASKS], {"beta": 0.5}),
    "shown": ([CELL, "beta = 0.5\nbeta", ASKS], {"beta": 0.5}),
    "a word of explanation": ([CELL, "# nothing", "beta = 0.5", ASKS], {"beta": 0.5}),
    "a declaration": ([CELL, "beta: float", ASKS], {}),
    "taken away": ([CELL, "beta = 0.5", "del beta", ASKS], {}),
    "changed and executed again": ([CELL, ASKS, "plot()", CELL.replace("None  #", "0.7  #"), ASKS], {"beta": 0.7}),
    "changed and executed twice": ([CELL, CELL.replace("None  #", "0.7  #"), ASKS], {"beta": 0.7}),
    "a name more in the cell": ([CELL, CELL + "\nlr = 0.25", ASKS], {"lr": 0.25}),
    "another cell": ([CELL, ASKS, 'profile = "smoke"\nlr = 0.25', ASKS], {"lr": 0.25}),
    "after a mistake": ([CELL, "betta = 1", ASKS, CELL, "beta = 1", ASKS], {"beta": 1.0}),
    "asked again": ([CELL, "beta = 0.9", ASKS, "plot()", "x = 3", "plot()", ASKS], {"beta": 0.9}),
    "set later": ([CELL, ASKS, "plot()", "beta = 0.5", "plot()", ASKS], {"beta": 0.5}),
    "the profile, later": ([CELL, "beta = 0.9", ASKS, 'profile = "reader"', ASKS], {"profile": "reader", "beta": 0.9}),
    "an assignment before": (["x = 3", CELL, ASKS], {}),
}


@pytest.mark.parametrize("case", READ)
def test_parameters_are_what_the_names_of_the_cell_stand_for_now(case):
    cells, expected = READ[case]
    assert read_after(*cells) == check(SMOKE | expected)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["beta = 1/2", ASKS], {"beta": 0.5}),
        (["import os", "beta = 1/2", "os.sep", "seeds = [3]", ASKS], {"beta": 0.5, "seeds": [3]}),
        (["beta = 0.9", ASKS, "beta = 0.5", ASKS], {"beta": 0.5}),
        (["path, beta = 'x', 0.5", "plot()", "lr = 0.25", ASKS], {"beta": 0.5, "lr": 0.25}),
        (["pairs = 64\nlr = 0.25", "beta = 0.5", ASKS], {"pairs": 64, "lr": 0.25, "beta": 0.5}),
    ],
)
def test_a_notebook_of_ones_own_needs_no_profile(cells, expected):
    assert read_after(*cells) == check(expected)


UNREAD = {
    "papermill's name that the chapter has not": (
        [CELL, "# Parameters\nlr = 0.5", ASKS],
        "lr: no such parameter. There are: beta, profile, seeds",
    ),
    "a name that nobody has": ([CELL, "betta = 1/2", ASKS], "betta: no such parameter. Did you mean 'beta'? There are"),
    "two cells on": ([CELL, "beta = 0.5", "sseeds = [1]", ASKS], "sseeds: no such parameter. Did you mean 'seeds'?"),
    "with a profile": ([CELL, 'profile = "smoke"\nlr = 0.5', ASKS], "lr: no such parameter"),
    "in the cell itself": ([CELL + "\nbetta = 1", ASKS], "betta: no such parameter. Did you mean 'beta'?"),
    "in a notebook of one's own": (
        ["beta = 0.5\nsseeds = [1]", ASKS],
        "sseeds: no such parameter. Did you mean 'seeds'?",
    ),
    "right after, there": (["beta = 0.5", "sseeds = [1]", ASKS], "sseeds: no such parameter"),
    "infinite": ([CELL, "# Parameters\nbeta = float('inf')", ASKS], "beta: given inf (float); allowed: a number > 0"),
    "not a number": ([CELL, "# Parameters\nbeta = float('nan')", ASKS], "beta: given nan (float)"),
    "nothing that can be used": (
        [CELL, "beta = object", ASKS],
        "beta: given <class 'object'> (type); allowed: a number",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_cannot_be_read_is_named(case):
    cells, said = UNREAD[case]
    with pytest.raises(ParameterError) as error:
        read_after(*cells)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "cells", [[ASKS], ["rate = 0.5", ASKS], ["x = [y for y in z]", ASKS], ["(", ASKS], ["\0", ASKS]]
)
def test_without_a_parameters_cell_there_is_nothing_to_read(cells):
    with pytest.raises(ParameterError, match="no parameters cell"):
        read_after(*cells)


def test_a_notebook_reads_its_own_cells(monkeypatch):
    """`read` knows what was executed, and what names stand for, from the shell that runs it."""
    namespace = {"In": ["", CELL, "beta = 1/2", ASKS], "profile": "smoke", "beta": 1 / 2, "seeds": (1,)}
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=namespace))
    assert params.read() == check({"profile": "smoke", "beta": 0.5, "seeds": [1]})


def bound(node: ast.AST) -> set[str]:
    """The names that code binds in the scope of a notebook, other than in functions, classes and comprehensions."""
    names: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names |= {child.name} | {n for part in ast.walk(child) if isinstance(part, ast.Global) for n in part.names}
        elif isinstance(child, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            names |= {part.target.id for part in ast.walk(child) if isinstance(part, ast.NamedExpr)}
        elif not isinstance(child, ast.Lambda):
            if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
                names.add(child.id)
            elif isinstance(child, ast.alias):
                names.add(child.asname or child.name.partition(".")[0])
            elif isinstance(child, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and child.name:
                names.add(child.name)
            elif isinstance(child, ast.MatchMapping) and child.rest:
                names.add(child.rest)
            names |= bound(child)
    return names


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("a = b = 1\nc, (d, *e) = f()\ng: int = 2\nh += 1\ndel i", "abcdeghi"),
        ("for a, b in c:\n    d = 1\nelse:\n    e = 2", "abde"),
        ("with a as b, c as (d, e):\n    f = 1", "bdef"),
        ("if (a := b) and [c := d for e in f]:\n    pass", "ac"),
        ("import a, b.x, c.x as d\nfrom e import f, g as h", "abdfh"),
        ("try:\n    a = 1\nexcept b as c:\n    pass", "ac"),
        ("match a:\n    case [b, *c] | {'x': d, **e} as f:\n        pass", "bcdef"),
        ("def a(b):\n    global c\n    d = 1\nclass e:\n    f = 1\nlambda g: (h := g)", "ace"),
        ("a.b = c[d] = e(f=1)\n{g: h for g, h in i}", ""),
    ],
)
def test_names_that_code_binds(code, names):
    assert bound(ast.parse(code)) == set(names)


CHAPTERS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_chapter_gives_another_meaning_to_the_name_of_a_parameter(path):
    """`read` would find it, in the cell that imports it or when it is asked again."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    own = bound(ast.parse(tagged[0].source))
    elsewhere = [ast.parse(TransformerManager().transform_cell(cell.source)) for cell in cells if cell not in tagged]
    assert own <= params.Parameters.model_fields.keys()
    assert not {name for code in elsewhere for name in bound(code) & own}


def test_outside_of_a_notebook_there_is_another_way():
    with pytest.raises(ParameterError, match=r"elsewhere call params.check"):
        params.read()


SMALL = {
    "profile": "smoke", "pairs": 40, "check": 8, "batch": 8, "sft_batch": 8, "held_out": 6, "validation": 2,
    "max_response": 28,
}  # fmt: skip


def test_the_easy_world_has_presets_of_its_own():
    """Its best replies are shorter; what is given goes before."""
    easy, hard = (check({"profile": "reader", "difficulty": d}) for d in ("easy", "hard"))
    assert (easy.max_response, hard.max_response) == (28, 36) and hard == check({"profile": "reader"})
    assert check({"difficulty": "easy", "max_response": 30}).max_response == 30
    assert "difficulty=easy" in params.command(easy, "02", ["difficulty"])
    assert "max_response" not in params.command(easy, "02", ["max_response"])


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_steps_follow_from_epochs_and_pairs():
    """40 pairs in batches of 8 are 5 updates an epoch."""
    p = check(SMALL | {"epochs": 3.0})
    plain, even = plan.run(p, 0, "dpo"), plan.run(p, 0, "dpo", part="uniform")
    assert plain.optimisation.steps == even.optimisation.steps == 15 and plain.optimisation.schedule == "constant"
    assert plan.run(check(SMALL | {"schedule": "linear"}), 0, "dpo").optimisation.schedule == "linear"
    assert (plain.control, even.control) == (controls.FULL, controls.Control(part="uniform"))
    assert plain.parents()[0] == plain.sft == plan.sft_run(p, 0)


SIZES = {"probe": 33, "ppo_probe": 34, "choice_probe": 35}


def test_parameters_reach_the_measurements():
    targets = {"responses": "unrelated", "prompts": "train", "decoding": "greedy", "reduction": "mean"}
    p = check(SMALL | {f"target_{k}": v for k, v in targets.items()} | {"method": "central"} | SIZES)
    run = plan.run(p, 0, "dpo")
    measured = plan.alignment_run(p, run, probe="check")
    assert measured.targets.model_dump() == targets | {"count": 6}
    assert (measured.run, measured.probe, measured.size, measured.method) == (run, "check", 33, "central")
    choices = {"as declared": measured.targets}
    chosen = plan.targets_run(p, run, choices)
    assert (chosen.run, chosen.choices, chosen.probe, chosen.size) == (run, choices, "check", 35)
    assert plan.alignment_run(p, plan.run(p, 0, "ppo")).size == 34
    explored = plan.exploration_run(p.model_copy(update={"explore_prompts": 5, "explore_samples": 3}), run)
    assert (explored.run, explored.prompts, explored.samples) == (run, 5, 3)


@pytest.mark.parametrize(
    ("declared", "others"),
    [
        ({}, ["prompts: train", "decoding: sampled", "reduction: mean", "responses: chosen", "responses: unrelated"]),
        (
            {"target_prompts": "train", "target_decoding": "sampled", "target_reduction": "mean"},
            ["prompts: held_out", "decoding: greedy", "reduction: sum", "responses: chosen", "responses: unrelated"],
        ),
    ],
)
def test_each_choice_of_targets_differs_in_what_it_is_named_after(declared, others):
    """Beside what is declared there is one for each other value of each choice, with all else as declared."""
    p = check(SMALL | declared)
    choices = plan.target_choices(p)
    base = choices.pop("as declared")
    assert base == plan.alignment_run(p, plan.run(p, 0, "dpo")).targets and list(choices) == others
    for name, choice in choices.items():
        what, value = name.split(": ")
        assert choice.model_dump() == base.model_dump() | {what: value} != base.model_dump()


def test_supervised_fine_tuning_is_shared_between_label_noises(tmp_path):
    """Everything that reads labels has a run of its own for each noise; demonstrations and true rewards have none."""
    store, noisy = RunStore(tmp_path), [check(SMALL | {"label_noise": noise}) for noise in (0.0, 0.2, 0.4)]

    def plain(method):
        return lambda p, seed: plan.run(p, seed, method)

    for made in (plan.sft_run, plain("ppo"), plain("grpo")):
        assert len({store.key(made(p, 0)) for p in noisy}) == 1

    def learned(p, seed):
        return plan.run(p, seed, "ppo", reward="learned")

    for made in (plain("dpo"), plan.reward_run, learned, lambda p, seed: plan.run(p, seed, "dpo").scored()):
        runs = [made(p, 0) for p in noisy]
        assert len({store.key(run) for run in runs}) == 3
        assert [run.data.label_noise for run in runs] == [0.0, 0.2, 0.4] and len({run.sft for run in runs}) == 1
    for p in noisy:
        dpo, rewarded = plan.run(p, 0, "dpo"), plan.run(p, 0, "ppo", reward="learned")
        assert dpo.scored() == rewarded.scored() and dpo.parents() == [dpo.sft, dpo.scored()]
        assert rewarded.parents() == [dpo.sft, dpo.scored(), plan.reward_run(p, 0)]
        assert dpo.data == rewarded.data == rewarded.reward.data == plan.data_spec(p, 0)


def test_each_reward_has_its_leash(tmp_path):
    """A learned reward is believed only near the reference; what is given by name goes before either parameter."""
    p = check(SMALL | {"kl_coefficient": 0.1, "learned_kl": 0.7})
    for reward, coefficient in (("true", 0.1), ("learned", 0.7), (None, 0.1)):
        assert plan.run(p, 0, "ppo", reward=reward).kl_coefficient == coefficient
        assert [plan.run(p, 0, "ppo", reward=reward, leash=leash).kl_coefficient for leash in (0.0, 0.3)] == [0.0, 0.3]
    assert plan.run(p.model_copy(update={"reward": "learned"}), 0, "ppo") == plan.run(p, 0, "ppo", reward="learned")


def test_a_reward_model_sees_the_pairs_as_often_as_asked():
    """40 pairs, 4 times in batches of 8; a batch is never larger than the pairs there are."""
    p = check(SMALL | {"reward_epochs": 4.0})
    learned = plan.run(p, 0, "ppo", reward="learned")
    assert learned.reward == plan.reward_run(p, 0) and learned.reward.optimisation.steps == 20
    assert learned.parents()[0] == learned.sft == learned.reward.sft and learned.reward in learned.parents()
    large = plan.reward_run(p.model_copy(update={"batch": 64}), 0).optimisation
    assert (large.batch_size, large.steps) == (40, 4)


def test_a_file_with_fewer_pairs_makes_fewer_steps(preferences):
    """40 - 8 prompts are left; the check has its share of 8 / (64 + 8): 4 prompts, so 28 pairs to train on."""
    p = check(SMALL | {"dataset": str(preferences), "pairs": 64, "epochs": 2.0})
    assert plan.run(p, 0, "dpo").optimisation.steps == round(2 * 28 / 8)


def test_files_are_found_from_the_current_folder(preferences, monkeypatch):
    monkeypatch.chdir(preferences.parent)
    specs = [plan.data_spec(check(SMALL | {"dataset": str(path)}), 0) for path in (preferences, preferences.name)]
    assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": "nowhere.jsonl"}, "dataset: given 'nowhere.jsonl', and there is no such file"),
        ({"model": "./nowhere", "sft_steps": 0}, "model: given './nowhere', and there is no such folder"),
        ({"batch": 41}, "batch: given 41 (int), more than the 40 pairs to train on; allowed: 1 to 40"),
        ({"sft_batch": 4096}, "sft_batch: given 4096 (int), more than the 512 demonstrations; allowed: 1 to 512"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named_before_anything_runs(given, said):
    p = check(SMALL | given)
    with pytest.raises(ParameterError) as error:
        plan.run(p, 0, "dpo")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ppo_batch": 33}, "ppo_batch: given 33 (int), more than rollouts=32; allowed: 1 to 32"),
        # the world has 3,072 prompts; 8 are taken away
        ({"rollouts": 3065}, "rollouts: given 3065 (int), more than the 3064 training prompts; allowed: 2 to 3064"),
        ({"dataset": "FILE", "reward": "true"}, "reward: given 'true' (str), which only the world has; allowed"),
        # 40 - 8 prompts, 8 / (40 + 8) of these for the check pairs
        ({"dataset": "FILE", "rollouts": 28}, "rollouts: given 28 (int), more than the 27 training prompts"),
    ],
)
def test_settings_of_ppo_that_do_not_fit_are_named_before_anything_runs(preferences, given, said):
    p = check(SMALL | {k: str(preferences) if v == "FILE" else v for k, v in given.items()})
    with pytest.raises(ParameterError) as error:
        plan.run(p, 0, "ppo")
    assert said in str(error.value)


def test_as_many_rollouts_as_prompts_are_allowed(preferences):
    assert plan.run(check(SMALL | {"rollouts": 1528}), 0, "ppo").rollouts == 1528
    file = check(SMALL | {"dataset": str(preferences), "rollouts": 27, "ppo_batch": 27})
    assert plan.run(file, 0, "ppo").reward == plan.reward_run(file, 0)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"held_out": 3200}, "held_out=3200"), ({"validation": 3000, "held_out": 80}, "validation=3000")],
)
def test_a_world_that_cannot_be_split_is_an_error_that_names_the_setting(given, named):
    with pytest.raises(ValueError, match=named):
        plan.run(check(SMALL | given), 0, "dpo")


def test_a_checkpoint_is_identified_by_its_files(tmp_path):
    store = RunStore(tmp_path / "runs")
    for name in ("one", "same", "other"):
        policy.save(*tiny_policy(seed=1 if name == "other" else 0), tmp_path / name)
    specs = [plan.policy_spec(check(SMALL | {"model": str(tmp_path / n)})) for n in ("one", "same", "other")]
    assert specs[0].content == specs[1].content != specs[2].content
    keys = [store.key(plan.sft_run(check(SMALL | {"model": str(tmp_path / n)}), 0)) for n in ("one", "same", "other")]
    assert keys[0] == keys[1] != keys[2]


def test_a_model_on_the_hub_is_identified_by_the_commit_that_its_name_stands_for(tmp_path, monkeypatch):
    """A key changes when the name stands for another one; what a run loads is the commit of its spec."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    store, repository = RunStore(tmp_path / "runs"), tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    keys = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        snapshot = repository / "snapshots" / commit
        policy.save(*tiny_policy(), snapshot)
        (repository / "refs" / "main").write_text(commit)
        p = check(SMALL | {"model": "some/model"})
        spec = plan.policy_spec(p)
        assert (spec.model, spec.content, spec.revision) == ("some/model", commit, commit)
        keys.append(store.key(plan.sft_run(p, 0)))
    assert keys[0] == keys[2] != keys[1]


PPO = {
    "iterations": 7, "rollouts": 33, "temperature": 0.7, "ppo_epochs": 3, "ppo_batch": 15, "ppo_lr": 2e-3,
    "value_lr": 2e-3, "reward": "true", "reward_epochs": 9.0, "reward_lr": 2e-3, "clip": 0.3, "value_clip": 0.4,
    "learned_kl": 0.1, "kl_estimator": "k3", "gamma": 0.9, "lam": 0.9, "whiten": False, "stop_kl": 0.1,
}  # fmt: skip
EXPLORE = {"explore_prompts": 5, "explore_samples": 3}
MASS = {"mass_pairs": 5, "mass_samples": 3}
EARNING = {"earning_prompts": 5, "earning_samples": 3}
TURNED = {"calibrated": "ppo", "construction": "random"}
VARIANTS = {
    "switch_at": 0.25, "floor": 0.3, "negative_scale": 0.7, "dpo_positive": [(0, 0.1)], "dpo_negative": [(0, 0.2)],
    "ppo_positive": [(0, 0.3)], "ppo_negative": [(0, 0.4)],
}  # fmt: skip


def test_every_parameter_of_ppo_changes_the_key_of_its_runs_alone(tmp_path):
    """From a learned reward, whose leash is `learned_kl`; with the true one `kl_coefficient` is what counts."""
    store, p = RunStore(tmp_path), check(SMALL | {"reward": "learned"})
    others = [p.model_copy(update={name: value}) for name, value in PPO.items()]
    keys = [store.key(plan.run(q, 0, "ppo")) for q in (p, *others)]
    assert len({*keys, store.key(plan.run(p, 0, "ppo", part="top"))}) == len(PPO) + 2
    assert len({store.key(plan.run(q, 0, "dpo")) for q in (p, *others)}) == 1
    run = plan.run(p.model_copy(update=PPO), 0, "ppo", leash=0.3)
    same = PPO.keys() & type(run).model_fields.keys() - {"reward"}
    assert len(same) == 10 and {name: getattr(run, name) for name in same} == {name: PPO[name] for name in same}
    assert (run.epochs, run.reward, run.kl_coefficient, plan.alignment_run(p, run).run) == (3, None, 0.3, run)
    for own, reward in {"kl_coefficient": "true", "learned_kl": "learned"}.items():
        by_name = [
            store.key(plan.run(p.model_copy(update={name: 0.3}), 0, "ppo", reward=reward))
            for name in ("kl_coefficient", "learned_kl")
        ]
        unchanged = store.key(plan.run(p, 0, "ppo", reward=reward))
        assert [key != unchanged for key in by_name] == [name == own for name in ("kl_coefficient", "learned_kl")]


def test_every_parameter_of_exploration_changes_its_key(tmp_path):
    store, p = RunStore(tmp_path), check(SMALL)
    keys = {
        store.key(plan.exploration_run(q, plan.run(q, 0, "dpo")))
        for q in (p, *(p.model_copy(update={name: value}) for name, value in EXPLORE.items()))
    }
    assert len(keys) == 3


def test_every_parameter_of_mass_earning_and_known_targets_changes_their_keys_alone(tmp_path):
    store, p = RunStore(tmp_path), check(SMALL)
    makes = {
        "mass": (MASS, lambda q, run: plan.mass_run(q, 0, run)),
        "earning": (EARNING | {"sequences": 32}, lambda q, run: plan.earning_run(q, 0, run)),
        "turned": (TURNED, lambda q, run: calibrating.run(q, 0, q.calibrated, q.construction)),
    }
    plain = store.key(plan.run(p, 0, "dpo"))
    for changed, make in makes.values():
        others = [p.model_copy(update={name: value}) for name, value in changed.items()]
        assert len({store.key(make(q, plan.run(q, 0, "dpo"))) for q in (p, *others)}) == 1 + len(changed)
        assert {store.key(plan.run(q, 0, "dpo")) for q in others} == {plain}
    sizes = [plan.earning_run(p, 0, plan.run(p, 0, method)).size for method in ("dpo", "ppo")]
    assert sizes == [p.sequences // 2, p.sequences]


def test_every_parameter_of_variants_changes_the_key_of_some_of_them_alone(tmp_path):
    store, p = RunStore(tmp_path), check(SMALL | {"dpo_negative": [[0, 1.0]], "ppo_negative": [[0, 1.0]]})
    plain = {store.key(plan.run(p, 0, "dpo")), store.key(plan.run(p, 0, "ppo"))}

    def keys(q) -> set[str]:
        return {store.key(plan.variant_run(q, 0, m, name)) for m in ("dpo", "ppo") for name in variants.names(q, m)}

    assert len(keys(p)) == 4 + 1 + 7 + 1 and not keys(p) & plain
    for name, value in VARIANTS.items():
        q = p.model_copy(update={name: value})
        assert keys(q) != keys(p) and {store.key(plan.run(q, 0, "dpo")), store.key(plan.run(q, 0, "ppo"))} == plain


def test_every_parameter_that_shapes_a_run_changes_its_key(tmp_path):
    """Each is changed alone. What only a file, PPO or the memory uses does not count for DPO."""
    store, p = RunStore(tmp_path), check(SMALL)
    changed = {
        "seeds": None, "profile": None, "dataset": None, "difficulty": "easy", "model": None, "schedule": "linear",
        "pairs": 48, "check": 16, "demonstrations": 500, "label_noise": 0.1, "validation": 3, "held_out": 7,
        "max_prompt": 25, "max_response": 29, "vocab_size": 400, "architecture": "llama", "layers": 2, "width": 64,
        "heads": 4, "sft_steps": 61, "sft_lr": 2e-2, "sft_batch": 9, "beta": 0.2, "lr": 2e-3, "epochs": 3.0, "batch": 9,
        "micro_batch": 4, "optimizer": "sgd", "checkpoints": 5, "probe": 100, "target_responses": "chosen",
        "target_prompts": "train", "target_decoding": "sampled", "target_reduction": "mean", "method": "central",
        "today": "2024-12-31",
    }  # fmt: skip
    elsewhere = PPO.keys() | EXPLORE.keys() | VARIANTS.keys() | MASS.keys() | EARNING.keys() | TURNED.keys()
    elsewhere |= {"kl_coefficient", "ppo_probe", "choice_probe", "variants"}
    elsewhere |= {"methods", "compared_seeds", "rates", "sequences", "group", "saved", "reference", "objective"}
    assert changed.keys() | elsewhere == params.Parameters.model_fields.keys() and not changed.keys() & elsewhere
    changed |= dict.fromkeys(elsewhere)

    def key(p) -> str:
        return store.key(plan.alignment_run(p, plan.run(p, 0, "dpo")))

    keys = [key(p.model_copy(update={name: value})) for name, value in changed.items() if value is not None]
    assert len({key(p), *keys, store.key(plan.alignment_run(p, plan.run(p, 1, "dpo")))}) == len(keys) + 2
    assert key(p) == key(p.model_copy(update={"seeds": [9], "profile": "reader"}))


def test_a_checkpoint_must_be_able_to_read_what_it_is_given(tmp_path):
    model, tokenizer = tiny_policy()  # it reads 52 tokens
    policy.save(model, tokenizer, tmp_path / "small")
    given = {"profile": "smoke", "model": str(tmp_path / "small")}
    assert plan.policy_spec(check(given | {"max_prompt": 24, "max_response": 28})).content
    with pytest.raises(ParameterError, match=r"max_prompt, max_response: given 25 and 28 .* at most 52"):
        plan.policy_spec(check(given | {"max_prompt": 25, "max_response": 28}))


def test_the_command_of_a_chapter_names_what_differs_from_its_profile():
    assert params.command(check({}), "02-targets", ["profile"]) == "prefdyn execute 02-targets -p profile=reader"
    p = check({"profile": "smoke", "beta": 0.3, "seeds": [4, 5], "dataset": "my pairs.jsonl", "variants": ["late"]})
    said = params.command(p, "05", ["profile", "dataset", "seeds", "lr", "beta"])
    assert said == "prefdyn execute 05 -p profile=smoke -p 'dataset=my pairs.jsonl' -p 'seeds=[4, 5]' -p beta=0.3"


@pytest.mark.parametrize(
    "line", ["import os", "for i in range(2):\n    pass", "print(1)", "def f():\n    beta = 9", "seeds += [8]"]
)
def test_a_parameters_cell_that_does_more_than_assign_is_one_all_the_same(line):
    """With what papermill adds after it: the values of its names, and none from the profile in their place."""
    cell = f'profile = "smoke"\nseeds = [5, 6]\ndataset = "mine.jsonl"\nbeta = None\n{line}'
    namespace = {"profile": "smoke", "seeds": [5, 6], "dataset": "mine.jsonl", "beta": 0.5, "i": 1}
    p = read_cells(["import numpy", cell, "beta = 0.5", ASKS], namespace)
    assert (p.profile, p.seeds, p.dataset, p.beta) == ("smoke", [5, 6], "mine.jsonl", 0.5)
    with pytest.raises(ParameterError, match="betta: no such parameter"):
        read_cells(["import numpy", cell, "betta = 0.5", ASKS], namespace | {"betta": 0.5})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": "a.jsonl", "label_noise": 0.4}, "label_noise: given 0.4; only the world has it"),
        ({"dataset": "a.jsonl", "demonstrations": 500}, "demonstrations: given 500; only the world has it"),
        ({"model": "./here", "width": 32}, "width: given 32; a model from scratch alone has it"),
        ({"target_responses": "chosen", "target_decoding": "sampled"}, "target_decoding: given 'sampled'; chosen"),
    ],
)
def test_a_value_that_nothing_would_read_is_refused(given, said):
    with pytest.raises(ParameterError) as error:
        check({"profile": "smoke"} | given)
    assert said in str(error.value)
    check({"profile": "smoke"} | {name: value for name, value in given.items() if name in ("dataset", "model")})


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ("dpo", ["dpo"]),
        ("grpo, dpo,kto", ["grpo", "dpo", "kto"]),  # in the order in which they are given
        (["orpo", "ppo"], ["orpo", "ppo"]),
        (("rloo", np.str_("ipo")), ["rloo", "ipo"]),
        ("all", [*registry.names("pairs"), *registry.names("rollouts")]),
        (["all"], [*registry.names("pairs"), *registry.names("rollouts")]),
    ],
)
def test_methods_as_a_command_line_gives_them(given, methods):
    assert check({"methods": given}).methods == methods


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ("1e-4,1e-3", [1e-4, 1e-3]),
        (" 0.01 , 3", [0.01, 3.0]),
        ("2e-4", [2e-4]),
        (1e-3, [1e-3]),
        (1, [1.0]),
        ([1e-3, 2], [1e-3, 2.0]),
        ((1e-3,), [1e-3]),
        (np.array([1e-3, 1e-4]), [1e-3, 1e-4]),
    ],
)
def test_rates_as_a_command_line_gives_them(given, rates):
    found = check({"rates": given}).rates
    assert found == rates and all(type(rate) is float for rate in found)


OF_MANY = {
    "an unknown method": ({"methods": "dpo,simp"}, "methods: given 'dpo,simp' (str) (no such method: simp; did you"),
    "the nearest one": ({"methods": ["grpoo"]}, "(no such method: grpoo; did you mean grpo?); allowed: 'all', or a"),
    "a method like no other": ({"methods": "zzzzzz"}, "(no such method: zzzzzz); allowed: 'all', or a list of some of"),
    "what there is before them": ({"methods": "sft"}, "(no such method: sft)"),
    "all and one": ({"methods": "all,dpo"}, "(no such method: all)"),
    "a method twice": ({"methods": ["dpo", "ipo", "dpo"]}, "methods: given ['dpo', 'ipo', 'dpo'] (list) (each method"),
    "a method twice in a text": ({"methods": "dpo, dpo"}, "(each method once)"),
    "no method": ({"methods": ""}, "methods: given '' (str); allowed: 'all', or a list of some of apo_zero, "),
    "a number for a method": ({"methods": 3}, "methods: given 3 (int)"),
    "no rate": ({"rates": []}, "rates: given [] (list); allowed: a list of different numbers > 0, e.g. 1e-4,1e-3: le"),
    "a rate of 0": ({"rates": "1e-3,0"}, "rates: given '1e-3,0' (str) (rates above 0, each once); allowed: a list"),
    "a rate below 0": ({"rates": -1e-3}, "rates: given -0.001 (float) (rates above 0, each once)"),
    "a rate twice": ({"rates": [1e-3, 0.001]}, "(rates above 0, each once)"),
    "a rate twice in other words": ({"rates": "1e-3,0.001"}, "(rates above 0, each once)"),
    "a text for a rate": ({"rates": "fast"}, "rates: given 'fast' (str); allowed: a list of different numbers > 0"),
    "rates and a text": ({"rates": "1e-3,fast"}, "rates: given '1e-3,fast' (str); allowed"),
    "a text among rates": ({"rates": [1e-3, "fast"]}, "rates: given [0.001, 'fast'] (list); allowed"),
    "a truth for rates": ({"rates": True}, "rates: given True (bool); allowed: a list of different numbers > 0"),
    "a set of rates": ({"rates": {1e-3}}, "rates: given {0.001} (set); allowed"),
    "a truth among rates": ({"rates": [True]}, "rates: given [True] (list); allowed"),
    "an infinite rate": ({"rates": "inf"}, "rates: given 'inf' (str); allowed"),
    "a rate that is no number": ({"rates": [float("nan")]}, "rates: given [nan] (list); allowed"),
    "groups of one": ({"group": 1}, "group: given 1 (int); allowed: a whole number >= 2: replies to a prompt, of"),
    "half a reply": ({"group": 2.5}, "group: given 2.5 (float)"),
    "too few sequences": ({"sequences": 3}, "sequences: given 3 (int); allowed: a whole number >= 4: sequences on"),
    "a text for sequences": ({"sequences": "many"}, "sequences: given 'many' (str)"),
}


@pytest.mark.parametrize("case", OF_MANY)
def test_what_is_refused_of_many_methods_is_named_with_what_is_allowed(case):
    given, said = OF_MANY[case]
    assert said in refused(**given)


@pytest.mark.parametrize("name", registry.names())
def test_parameters_give_the_settings_that_they_are_said_to(name):
    """DPO's tie and PPO's clip; all others have their own, also those that call a setting by the same name."""
    p = check({"profile": "smoke", "beta": 0.7, "clip": 0.4})
    assert p.settings_of(name) == {"dpo": {"beta": 0.7}, "ppo": {"clip": 0.4}}.get(name, {})
    if name != "ppo" and registry.find(name).takes != "demonstrations":
        own = dict(registry.find(name).settings) | ({"beta": 0.7} if name == "dpo" else {})
        assert dict(plan.run(p, 0, name).settings) == own


def test_what_is_given_by_name_goes_before_parameters():
    p = check(SMALL | {"beta": 0.7, "clip": 0.4})
    assert plan.run(p, 0, "dpo", beta=0.2).settings == (("beta", 0.2),)
    assert plan.run(p, 0, "ppo").clip == 0.4 and plan.run(p, 0, "ppo", clip=0.3).clip == 0.3
    with pytest.raises(ValueError, match=r"dpo: no such setting: gamma\. There are: beta; and"):
        plan.run(p, 0, "dpo", gamma=0.2)


def test_only_methods_of_pairs_and_rollouts_start_from_a_policy():
    p = check(SMALL)
    with pytest.raises(
        ValueError, match="method='sft': takes demonstrations; allowed here: methods of pairs or of rollouts"
    ):
        plan.run(p, 0, "sft")
    with pytest.raises(ValueError, match=r"method='gpro': no such method. Did you mean 'grpo'\?"):
        plan.run(p, 0, "gpro")


def test_groups_are_as_large_as_parameters_say_and_fill_the_rollouts():
    p = check(SMALL | {"group": 2, "rollouts": 24})
    assert (plan.run(p, 0, "grpo").group, plan.run(p, 0, "grpo", group=8).group) == (2, 8)
    assert plan.run(p, 0, "grpo").rollouts == plan.run(p, 0, "grpo", group=8).rollouts == 24
    odd = check(SMALL | {"group": 5, "rollouts": 24})
    for asked in (lambda: plan.run(odd, 0, "grpo"), lambda: plan.run(p, 0, "rloo", group=5)):
        with pytest.raises(ParameterError, match=r"rollouts: given 24 \(int\); .* a multiple of 5 replies a prompt"):
            asked()
    assert plan.run(odd, 0, "ppo").rollouts == 24  # it has no groups


def test_parameters_of_many_methods_change_the_runs_that_read_them(tmp_path):
    """The group those of methods without a value model; methods, rates and sequences none: they say which to make."""
    store, p = RunStore(tmp_path), check(SMALL)

    def keys(q) -> list[str]:
        runs = [plan.run(q, 0, name) for name in ("dpo", "ppo", "grpo")]
        return [store.key(spec) for run in runs for spec in (run, plan.alignment_run(q, run))]

    others = {"methods": ["ipo"], "rates": [0.5], "sequences": 9}
    assert keys(p.model_copy(update=others)) == keys(p)
    changed = [a != b for a, b in zip(keys(p.model_copy(update={"group": 2})), keys(p), strict=True)]
    assert changed == [False] * 4 + [True] * 2
