"""Many methods on equal ground: the same plan as a single run's, the rate of the whole, as many sequences for each."""

import pandas as pd
import pytest
from prefdyn.book import comparison, plan, plots
from prefdyn.book.comparison import Entry
from prefdyn.book.params import check
from prefdyn.findings import tuning
from prefdyn.lab.runs import RunStore
from prefdyn.lens import controls
from prefdyn.methods import registry

SMALL = {
    "profile": "smoke",
    "seeds": [3, 1],
    "pairs": 24,
    "check": 16,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 6,
    "width": 16,
    "sft_steps": 20,
    "sft_batch": 16,
    "batch": 8,
    "epochs": 1.0,
    "checkpoints": 2,
    "iterations": 2,
    "rollouts": 12,
    "ppo_batch": 6,
    "rates": [5e-3, 1e-4],
    "sequences": 20,
    "probe": 5,
    "ppo_probe": 6,
}
P = check(SMALL)


def steep(pairs, *, slope=1.0):
    """A loss of one's own."""
    chosen, rejected = pairs.sums()
    return slope * (rejected - chosen)


ENTRIES = {
    "dpo": Entry("dpo", "dpo"),
    "weak tie": Entry("weak tie", "dpo", {"beta": 0.01}),
    "raising alone": Entry("raising alone", "grpo", part="positive"),
    "no clip": Entry("no clip", "grpo", {"clip": 1e6}, rate_of="grpo"),
    "grpo": Entry("grpo", "grpo"),
    "ppo": Entry("ppo", "ppo"),
    "steep": Entry("steep", steep, {"slope": 2.0}),
}
PLANNED = {
    "dpo": lambda seed, lr: plan.run(P, seed, "dpo", lr=lr),
    "weak tie": lambda seed, lr: plan.run(P, seed, "dpo", lr=lr, beta=0.01),
    "raising alone": lambda seed, lr: plan.run(P, seed, "grpo", "positive", lr=lr),
    "no clip": lambda seed, lr: plan.run(P, seed, "grpo", lr=lr, clip=1e6),
    "grpo": lambda seed, lr: plan.run(P, seed, "grpo", lr=lr),
    "ppo": lambda seed, lr: plan.run(P, seed, "ppo", lr=lr),
    "steep": lambda seed, lr: plan.run(P, seed, steep, lr=lr, slope=2.0),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_a_planned_run(name):
    run = ENTRIES[name].run(P, 7, 0.02)
    assert run == PLANNED[name](7, 0.02) and run.optimisation.lr == 0.02 and run.sft.seed == 7
    assert run.control == controls.Control(part="positive" if name == "raising alone" else "full")


def test_what_is_tuned_is_tried_at_every_rate_with_the_first_seed():
    """Rates in order, and none for what takes the rate of another entry."""
    found = comparison.grid(P, ENTRIES.values())
    names = [name for name in ENTRIES if name != "no clip"]
    assert [(name, spec.run.optimisation.lr) for name, spec in found] == [(n, lr) for n in names for lr in (1e-4, 5e-3)]
    for name, spec in found:
        assert spec == plan.validation_run(P, 3, PLANNED[name](3, spec.run.optimisation.lr))


RATES = {"dpo": 0.1, "weak tie": 0.2, "raising alone": 0.3, "ppo": 0.4, "steep": 0.5}


def test_each_entry_runs_at_its_rate_with_every_seed():
    """What switches one thing off takes the rate of the whole; without a rate nothing runs, and names are one's own."""
    with pytest.raises(ValueError, match=r"entry 'no clip': no learning rate of 'grpo' among \['dpo', "):
        comparison.runs(P, [ENTRIES[n] for n in ENTRIES if n != "grpo"], RATES)
    for made in (lambda e: comparison.runs(P, e, RATES), lambda e: comparison.grid(P, e)):
        with pytest.raises(ValueError, match="two entries are named 'dpo'; give each its own name"):
            made([ENTRIES["dpo"], ENTRIES["dpo"]])
    whole = comparison.runs(P, ENTRIES.values(), RATES | {"grpo": 0.6})
    assert list(whole) == [(name, seed) for name in ENTRIES for seed in (3, 1)]
    for (name, seed), run in whole.items():
        assert run == PLANNED[name](seed, (RATES | {"grpo": 0.6, "no clip": 0.6})[name])
    as_series = comparison.runs(P, ENTRIES.values(), pd.Series(RATES | {"grpo": 0.6}))
    assert as_series == whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("mine", lambda pairs: pairs.margin()), "written with def"),
        (("mine", "simp"), "Did you mean 'simpo'"),
        (("mine", "dpo", {"gamma": 1.0}), "dpo: no such setting: gamma"),
        (("mine", "dpo", {"beta": "0.1"}), r"dpo: beta: given '0.1' \(str\); allowed: a number"),
    ],
)
def test_an_entry_that_cannot_run_is_refused_when_it_is_made(given, said):
    with pytest.raises(ValueError, match=said):
        Entry(*given)


@pytest.mark.parametrize(("sequences", "pairs"), [(20, 10), (4, 2)])
def test_all_are_measured_on_as_many_sequences(sequences, pairs):
    """Two a pair, one a reply, not trained on; the probes of other chapters do not count."""
    p = P.model_copy(update={"sequences": sequences})
    trained = comparison.runs(p, ENTRIES.values(), RATES | {"grpo": 0.6})
    found = comparison.measured(p, trained)
    assert list(found) == list(trained)
    for key, spec in found.items():
        size = pairs if trained[key].takes == "pairs" else sequences
        assert spec == plan.alignment_run(P, trained[key], "check").model_copy(update={"size": size})
        assert spec.aware and spec.probe == "check"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


FEW = [ENTRIES["dpo"], ENTRIES["grpo"], ENTRIES["no clip"]]


def test_rates_are_tuned_on_what_the_store_computes(store):
    """The choice among the means of the grid, one for each entry that is tuned."""
    found = comparison.tuned(store, P, FEW)
    grid = comparison.grid(P, FEW)
    assert len(grid) == 4 and all(store.find(spec) for _, spec in grid)
    found_by = {(name, s.run.optimisation.lr): store.get(s).frame("validation") for name, s in grid}
    means = {key: table.groupby("step")["reward"].mean().max() for key, table in found_by.items()}
    pd.testing.assert_frame_equal(found, tuning.chosen(tuning.means(store, grid)))
    for row in found.itertuples():
        assert row.lr == max(sorted(P.rates), key=lambda lr, name=row.method: means[name, lr])
        assert row.reward == means[row.method, row.lr] and row.at_edge
    assert sorted(found["method"]) == ["dpo", "grpo"]


def test_tables_of_all_runs_stand_under_each_other(store):
    """As many examples as were asked for: ten pairs or twenty replies, of the policy at each checkpoint."""
    trained = comparison.runs(P, FEW[:2], {"dpo": 5e-3, "grpo": 5e-3})
    measured = comparison.measured(P, trained)
    store.ensure(measured.values(), workers=1)
    curves = comparison.gathered(store, trained, "checkpoints")
    own = {key: store.get(run).frame("checkpoints") for key, run in trained.items()}
    assert curves.columns.tolist() == [*own["dpo", 3].columns, "name", "seed"]
    assert len(curves) == 4 * P.checkpoints and curves.index.tolist() == list(range(len(curves)))
    for (name, seed), rows in curves.groupby(["name", "seed"]):
        kept = rows.drop(columns=["name", "seed"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, own[name, seed], check_exact=True)
    alignment = comparison.gathered(store, measured, "alignment")
    assert set(alignment.query("name == 'dpo'")["n"]) == {10} and set(alignment.query("name == 'grpo'")["n"]) == {20}


def test_a_figure_of_many_lines_tells_them_apart():
    """24 looks, all colours before the first dash; there are fewer methods than that."""
    names = [f"line {i}" for i in range(24)]
    found = plots.looks(names)
    assert list(found) == names and len({(look["color"], look["ls"]) for look in found.values()}) == 24
    assert [look["ls"] for look in found.values()] == ["-"] * 6 + ["--"] * 6 + [":"] * 6 + ["-."] * 6
    assert [found[name]["color"] for name in names[:6]] == list(plots.COLOURS.values())
    assert max(len(registry.names(takes)) for takes in ("pairs", "rollouts")) <= 24
