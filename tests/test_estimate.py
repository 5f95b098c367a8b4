"""What something will cost, said before: the right runs, the right arithmetic, and not far from what then happens."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
import typer
from prefdyn.book import cli, estimate, params, plan
from prefdyn.lab import recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lens import alignment
from prefdyn.lens.batch import pad
from toys.models import tiny_policy
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPUTES_NONE = ("06-exact", "08-ledger")  # the one has no runs, the other reads those of the others
SMALL = {
    "profile": "smoke",
    "seeds": [0],
    "pairs": 64,
    "check": 32,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 16,
    "width": 16,
    "sft_steps": 30,
    "sft_batch": 16,
    "batch": 16,
    "epochs": 8.0,
    "iterations": 3,
    "rollouts": 8,
    "ppo_batch": 4,
    "checkpoints": 5,
    "probe": 48,
    "ppo_probe": 16,
    "explore_prompts": 3,
    "explore_samples": 2,
    "mass_pairs": 6,
    "mass_samples": 2,
}


def notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell holds the parameters."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


def small(known: list[str]) -> dict:
    return {name: value for name, value in SMALL.items() if name in known}


# Which runs


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda path: path.stem)
def test_what_a_chapter_asks_for_is_known_without_computing(source, tmp_path):
    asked = estimate.asked_for(source, {"profile": "smoke"}, tmp_path / "runs")
    store = estimate.Looking(tmp_path / "runs")
    todo, there = estimate.missing(store, [spec for group in asked.groups for spec in group])
    assert bool(todo) == (source.stem not in COMPUTES_NONE)
    assert not there and not (tmp_path / "runs").exists() and asked.cells > 10
    kinds = {spec.kind for spec in todo.values()}
    assert kinds >= {"01-setting": {"sft", "exploration"}, "09-methods": {"validation", "alignment"}}.get(
        source.stem, set()
    )
    for spec in todo.values():  # parents first
        assert all(list(todo).index(store.key(p)) < list(todo).index(store.key(spec)) for p in spec.parents())


@pytest.mark.parametrize("chapter", ["01-setting", "11-mass"])
def test_it_is_what_executing_the_chapter_computes(chapter, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    source = ROOT / "notebooks" / f"{chapter}.ipynb"
    given = small(list(cli.known_parameters(source)))
    asked = estimate.asked_for(source, given)
    todo, _ = estimate.missing(estimate.Looking(), [spec for group in asked.groups for spec in group])
    cli.execute_chapter(source, given, tmp_path / "out.ipynb")
    assert {row["key"] for row in RunStore().list()} == set(todo)
    left = estimate.estimate_chapter(source, given)
    assert left.missing == 0 and left.there > 0 and left.disk == 0
    assert "Nothing is to be computed: all" in str(left)


def test_only_what_leads_to_the_question_is_executed(tmp_path):
    source = notebook(
        tmp_path / "own.ipynb",
        'profile: str = "smoke"\nseeds: list = None',
        "from prefdyn.book import params, plan\nfrom prefdyn.lab.runs import RunStore\np = params.read()",
        "store, runs = RunStore(), []\nfor seed in p.seeds:\n    runs.append(plan.sft_run(p, seed))",
        'raise RuntimeError("a figure")',
        "%matplotlib inline\nhalf = runs[:1]",
        "half += [plan.exploration_run(p, half[0])]",
        "store.ensure(half)",
        "table = store.get(half[1]).frame('exploration')",
        "more = [plan.sft_run(p, len(table))]\nstore.ensure(more)",
    )
    asked = estimate.asked_for(source, {"seeds": [7, 8]}, tmp_path / "runs")
    assert [[(spec.kind, estimate._sft(spec).seed) for spec in group] for group in asked.groups] == [
        [("sft", 7), ("exploration", 7)]
    ]
    assert len(asked.notes) == 1 and "exploration-" in asked.notes[0] and "not in the estimate" in asked.notes[0]


def test_a_loss_of_ones_own_is_asked_for_as_it_is_written(tmp_path):
    source = notebook(
        tmp_path / "own.ipynb",
        'profile: str = "smoke"',
        "from prefdyn.book import params, plan\nfrom prefdyn.lab.runs import RunStore\np = params.read()",
        "import torch\n\n\ndef gentle(pairs, *, beta=0.3):\n    return -beta * pairs.margin()",
        "RunStore().ensure([plan.run(p, 0, gentle)])",
    )
    (group,) = estimate.asked_for(source, {}, tmp_path / "runs").groups
    assert group[0].kind == "gentle" and "-beta * pairs.margin()" in group[0].code


def test_wrong_names_are_refused_as_executing_does():
    with pytest.raises(cli.CommandError, match="no such chapter"):
        cli.chapter_path("99")
    with pytest.raises(params.ParameterError, match=r"bet: no such parameter\. Did you mean 'beta'"):
        estimate.estimate_chapter(CHAPTERS[1], {"bet": 1})
    with pytest.raises(params.ParameterError, match="layers: given 0"):
        estimate.estimate_chapter(CHAPTERS[1], {"layers": 0})


# Arithmetic


def test_the_pace_of_a_training_run_is_read_from_its_ticks():
    """Start 3 s, an update 1 s, a checkpoint 10 s at steps 0, 4 and 12, 0.5 s at the end."""
    made = plan.run(params.check(SMALL | {"checkpoints": 3}), 0, "dpo")
    made = estimate._reduced(made, estimate.Looking("nowhere"))
    assert made.steps() == [0, 4, 12]
    ticks = [3 + 10 + k + (10 if k > 4 else 0) for k in range(1, 13)]
    found = estimate.pace(made, ticks, ticks[-1] + 10 + 0.5)
    assert (found.once, found.update, found.checkpoint) == pytest.approx((3.5, 1.0, 10.0))
    whole = plan.run(params.check(SMALL), 0, "dpo")
    assert found.seconds(whole) == pytest.approx(3.5 + whole.optimisation.steps + 10 * 5)


def test_the_pace_of_a_measurement_and_of_what_ticks_once():
    run = plan.run(params.check(SMALL), 0, "dpo")
    measured = plan.alignment_run(params.check(SMALL | {"method": "forward"}), run)
    found = estimate.pace(measured, [2.0 + 3, 8.0, 11.0], 11.5)
    assert (found.once, found.checkpoint) == pytest.approx((2.5, 3.0))
    assert found.seconds(measured) == pytest.approx(2.5 + 3 * 5)
    once = estimate.pace(run.scored(), [4.0], 4.25)
    assert once.seconds(run.scored()) == pytest.approx(4.25)


def test_wall_time_is_that_of_runs_given_out_in_order():
    # two processes: a (4) and b (1); c (2) after b: ends at 3; d (5) needs both a and c: from 4 to 9
    seconds = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 5.0}
    needs = {"a": set(), "b": {"is there"}, "c": {"b"}, "d": {"a", "c"}}
    assert estimate.wall(seconds, needs, 2) == 9.0
    assert estimate.wall(seconds, needs, 1) == 12.0
    assert estimate.wall({}, {}, 2) == 0.0


def test_what_was_computed_before_is_the_measure(tmp_path):
    p = params.check(SMALL)
    store = RunStore(tmp_path / "runs", lambda text: None)
    seconds = [1.0, 5.0, 2.0]
    for seed, told in enumerate(seconds):
        run = store.get(plan.sft_run(p, seed))
        known = run.json("provenance") | {"seconds": told}
        (run.folder / "provenance.json").write_text(json.dumps(known))
    looking = estimate.Looking(tmp_path / "runs")
    found = estimate.of_runs("x", [[plan.sft_run(p, 4), plan.sft_run(p, 5)]], looking)
    assert found.seconds == 4.0 and found.by_kind["sft"].how == "3 such in the store"  # twice the median
    assert found.disk == pytest.approx(2 * sum(f.stat().st_size for f in run.folder.rglob("*") if f.is_file()), rel=0.1)
    larger = plan.sft_run(params.check(SMALL | {"width": 32}), 4)
    assert estimate.shape(larger) not in estimate.history(looking, [larger])


# What then happens


def some_runs() -> list[recipes.Spec]:
    p = params.check(SMALL | {"method": "forward"})
    trained = [plan.run(p, 0, "dpo", lr=lr) for lr in (1e-3, 3e-3)]
    return [*trained, *(plan.alignment_run(p, run, probe) for run in trained for probe in recipes.PROBES)]


def test_time_and_disk_are_within_half_of_what_then_happens(tmp_path):
    """Each is tried up to three times, since other work on a machine comes and goes: once must be near."""
    specs, ratios = some_runs(), []
    for attempt in range(3):
        root = tmp_path / f"runs-{attempt}"
        told = estimate.of_runs("some runs", [specs], estimate.Looking(root))
        assert not root.exists() and told.missing == 8 and told.processes == 1
        began = time.perf_counter()
        RunStore(root, lambda text: None).ensure(specs)
        ratios.append(told.seconds / (time.perf_counter() - began))
        disk = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
        assert 1 / 1.5 < told.disk / disk < 1.5
        if 1 / 1.5 < ratios[-1] < 1.5:
            return
    pytest.fail(f"estimated / real seconds: {ratios}")


PEAK = """
import json, sys
from pathlib import Path
import torch
from prefdyn.book import params, plan
from prefdyn.lab.runs import RunStore
torch.set_num_threads(1)
store = RunStore(sys.argv[1], lambda text: None)
p = params.check(json.loads(sys.argv[2]))
store.ensure([plan.run(p, 0, "dpo")], workers=1)
told = Path("/proc/self/status").read_text()  # getrusage would start from the peak of the process that started this one
print(1024 * int(told.partition("VmHWM:")[2].split()[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell a process's peak")
def test_memory_is_within_half_of_a_process_that_does_it(tmp_path):
    """Once with next to nothing beside the libraries, once with activations that weigh more than these."""
    above = []
    for sizes in ({}, {"batch": 192, "pairs": 192, "epochs": 2.0, "width": 64, "layers": 2, "heads": 4}):
        given = SMALL | {"sft_steps": 2, "checkpoints": 2} | sizes
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"runs-{len(sizes)}"), json.dumps(given)]
        peak = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        with estimate.company(0) as process:
            told = estimate.process_memory(plan.run(params.check(given), 0, "dpo"), process.memory)
        assert 1 / 1.5 < told / peak < 1.5
        above.append((told - process.memory, peak - process.memory))
    assert above[1][1] > 2 * above[0][1] and 1 / 1.5 < above[1][0] / above[1][1] < 1.5


def test_the_lens_takes_as_long_as_one_pass_says():
    model, tokenizer = tiny_policy(seed=0)
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 24, (64,), generator=rng).tolist()
    rows = [torch.randint(3, len(tokenizer), (n,), generator=rng).tolist() for n in lengths]
    batch = pad(rows, rows, tokenizer.pad_token_id)
    targets = batch.take(torch.arange(32))
    ratios = []
    for _ in range(4):
        told = estimate.lens_cost(model, batch, 5, targets=targets)
        began = time.perf_counter()
        d = alignment.target_direction(model, targets, size=8)
        alignment.token_scores(model, batch, d, size=8)
        alignment.gradient(model, [(part, part.response.float()) for _, part in batch.pieces(8)])
        ratios.append(told.checkpoint / (time.perf_counter() - began))
        if 1 / 1.5 < ratios[-1] < 1.5:
            break
    assert 1 / 1.5 < ratios[-1] < 1.5, ratios
    assert told.seconds == pytest.approx(5 * told.checkpoint, rel=0.3)
    assert told.disk == 5 * sum(lengths) * estimate.TOKEN
    twice = estimate.lens_cost(model, batch, 5, targets=targets, rows=16)
    assert twice.memory > told.memory > 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="checkpoints=0"):
        estimate.lens_cost(model, batch, 0)


def test_the_command_says_it_in_words_and_computes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    app = typer.Typer()
    app.command()(estimate.estimate)
    told = CliRunner().invoke(app, ["06", "-p", "profile=smoke"])
    assert told.exit_code == 0 and "Nothing is to be computed: no run is asked for" in told.output
    refused = CliRunner().invoke(app, ["study:tiny", "-p", "beta=1"])
    assert isinstance(refused.exception, params.ParameterError) and "a study has no parameters" in str(
        refused.exception
    )
    assert not (tmp_path / "runs").exists()


def test_durations_are_said_as_people_do():
    assert [estimate.duration(s) for s in (0.4, 59, 150, 9000)] == ["0 s", "59 s", "2 min", "2.5 h"]
