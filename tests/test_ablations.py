"""Variants beside their plain method: equal conditions are checked, differences are paired, costs are read by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import ablations
from prefdyn.findings.stats import Estimate
from prefdyn.lab.runs import Run, RunStore

SPEC = {"kind": "dpo", "beta": 0.1, "control": "full"}


def made(folder, **other) -> Run:
    """A run as it would be kept, with something different about it."""
    folder.mkdir(parents=True)
    known = {"spec": SPEC, "start": "abc", "order": [3, 1, 2], "first": "hello"} | other
    manifest = {"checkpoint-0.safetensors": known["start"]} if known["start"] else {}
    for name, value in (("spec", known["spec"]), ("manifest", manifest)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    pd.DataFrame({"step": range(3), "examples": known["order"]}).to_parquet(folder / "steps.parquet")
    replies = {"step": [0, 3], "index": [0, 0], "reply": [known["first"], f"end of {folder.name}"]}
    pd.DataFrame(replies).to_parquet(folder / "replies.parquet")
    return Run(folder.name, folder)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, []),
        ({"spec": SPEC | {"control": "shift"}}, []),
        ({"spec": SPEC | {"beta": 0.2}}, ["setting beta"]),
        ({"spec": SPEC | {"lam": 1.0}}, ["setting lam"]),
        ({"start": "abd"}, ["weights at the start"]),
        ({"start": None}, ["weights at the start"]),
        ({"order": [3, 2, 1]}, ["order of the data"]),
        ({"first": "bye"}, ["replies before training"]),
        ({"order": [1], "first": "bye"}, ["order of the data", "replies before training"]),
    ],
)
def test_what_differs_besides_the_control_is_found(tmp_path, other, expected):
    if "order" in other and len(other["order"]) == 1:
        other = other | {"order": [1, 1, 1]}
    assert ablations.unequal(made(tmp_path / "a", **other), made(tmp_path / "b")) == expected


def test_an_unfair_comparison_stops_with_its_name(tmp_path):
    runs = {
        ("plain", 0): made(tmp_path / "a"),
        ("plain", 1): made(tmp_path / "b"),
        ("shift", 0): made(tmp_path / "c"),
        ("shift", 1): made(tmp_path / "d"),
    }
    assert ablations.require_equal(runs) == 2
    runs["shift", 1] = made(tmp_path / "e", order=[1, 2, 3])
    with pytest.raises(ValueError, match="variant 'shift', seed 1, is not comparable: unequal order of the data"):
        ablations.require_equal(runs)


def test_real_variants_see_the_same_data_in_the_same_order(tmp_path):
    """Runs of the store, with another seed's and another learning rate's as counterexamples."""
    small = {
        "profile": "smoke", "pairs": 16, "check": 8, "demonstrations": 32, "validation": 8, "held_out": 6, "width": 16,
        "sft_steps": 4, "batch": 8, "epochs": 1.0, "checkpoints": 2, "iterations": 2, "rollouts": 6, "ppo_batch": 3,
    }  # fmt: skip
    p, store = check(small), RunStore(tmp_path)
    for method, variant in (("dpo", "shift"), ("ppo", "late")):
        baseline, run = store.get(plan.run(p, 0, method)), store.get(plan.variant_run(p, 0, method, variant))
        assert ablations.unequal(run, baseline) == []
        assert run.frame("steps")["examples"].nunique() == 2
        baseline_steps = plan.run(p, 0, method).steps()
        ends = [r.folder / f"checkpoint-{baseline_steps[-1]}.safetensors" for r in (run, baseline)]
        assert ends[0].read_bytes() != ends[1].read_bytes()
        other = store.get(plan.run(p, 1, method))
        assert {"weights at the start", "order of the data"} <= set(ablations.unequal(run, other))


def rewards(**finals: float) -> pd.DataFrame:
    """Two seeds, three prompts, steps 0, 1 and 3: rewards 1, 2 and the final one, plus seed and prompt."""
    return pd.DataFrame(
        {
            "variant": v,
            "seed": s,
            "index": i,
            "step": t,
            "reward": r + s + 10 * i + 0.1 * (s == 1 and i == 2 and t == 3),
        }
        for v, end in finals.items()
        for s in (0, 1)
        for i in (0, 1, 2)
        for t, r in ((0, 1.0), (1, 2.0), (3, end))
    )


def test_final_rewards_and_means_over_training_by_hand():
    table = rewards(plain=4.0).sample(frac=1, random_state=0)
    assert ablations.final(table, "plain") == pytest.approx(np.array([[4, 14, 24], [5, 15, 25.1]]))
    # trapezoids (1 + 2) / 2 * 1 and (2 + 4) / 2 * 2 over 3 steps: 2.5; the odd one adds 0.1 / 2 * 2 / 3
    expected = np.array([[2.5, 12.5, 22.5], [3.5, 13.5, 23.5 + 0.1 / 3]])
    assert ablations.over_training(table, "plain") == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"variant 'shift': not in the table; there are \['plain'\]"):
        ablations.final(table, "shift")
    with pytest.raises(ValueError, match="reward"):
        ablations.final(table.drop(columns="reward"), "plain")


def test_variants_are_compared_seed_by_seed_and_prompt_by_prompt():
    """Seeds and prompts move the rewards by up to 21 points; the difference is 1 in every cell."""
    table = ablations.compare(rewards(plain=4.0, better=5.0, same=4.0), ["better", "same"])
    better, same = (row for row in table.itertuples())
    assert better.difference.mean == pytest.approx(1.0) and better.difference.low == pytest.approx(1.0)
    assert same.difference.mean == 0 and better.win_rate.mean == 1.0 and same.win_rate.mean == 0.5
    assert same.effect == Estimate(0.0, 0.0, 0.0, 2)
    better_d = ablations.compare(rewards(plain=4.0, other=5.0), ["other"], ablations.over_training)["effect"][0]
    assert better_d.low <= better_d.mean <= better_d.high and better_d.n == 2
    assert better.p < 0.05 and table["adjusted"].ge(table["p"]).all()


def test_the_largest_effect_is_of_either_sign():
    rng = np.random.default_rng(0)
    table = rewards(plain=4.0, worse=2.0, better=5.0)
    table["reward"] += 0.05 * rng.normal(size=len(table))
    found = ablations.largest_effect(table)
    assert found.mean == pytest.approx(2.0, abs=0.15) and found.n == 2
    assert 0 <= found.low <= found.mean <= found.high
    with pytest.raises(ValueError, match="there is no variant"):
        ablations.largest_effect(rewards(plain=4.0))


def test_bounds_for_all_variants_are_wider_than_one_alone():
    rng = np.random.default_rng(1)
    table = rewards(plain=4.0, **{f"v{i}": 4.5 for i in range(6)})
    table["reward"] += 0.3 * rng.normal(size=len(table))
    one = table[table["variant"].isin(["plain", "v0"])]
    assert ablations.largest_effect(table).high > ablations.largest_effect(one).high


def test_overshoot_by_hand():
    rows = [("a", 0, 0, 1.0), ("a", 0, 1, 5.0), ("a", 0, 2, 3.5), ("b", 0, 0, 1.0), ("b", 0, 1, 2.0), ("b", 0, 2, 3.0)]
    table = pd.DataFrame(rows, columns=["variant", "seed", "step", "reward"]).sample(frac=1, random_state=0)
    found = ablations.overshoot(table, "reward").set_index("variant")["overshoot"]
    assert found.to_dict() == {"a": 1.5, "b": 0.0}


def test_one_seed_has_no_interval_of_its_effect():
    table = rewards(plain=4.0, better=5.0)
    found = ablations.compare(table[table["seed"] == 0], ["better"])["effect"][0]
    assert np.isnan(found.low) and np.isnan(found.high)
