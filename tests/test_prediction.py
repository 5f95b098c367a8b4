"""Does G predict? Intervals and qualities by hand."""

import math

import pandas as pd
import pytest
from prefdyn.findings import prediction

# checkpoints at 0, 2, 3; learning rates 0.1 a step; two optimiser steps in each
ALIGNMENT = pd.DataFrame(
    {
        "seed": [0] * 4,
        "step": [0, 2, 3, 0],
        "component": ["full", "full", "full", "positive"],
        "g": [5.0, -1.0, 2.0, 99.0],
        "g_opt": [10.0, 20.0, 30.0, 99.0],
        "moved": [0.9, 1.1, math.nan, 99.0],
        "logp_targets": [-8.0, -7.0, -5.5, -8.0],
    }
)
STEPS = pd.DataFrame({"seed": [0, 0, 0], "step": [0, 1, 2], "lr": [0.1, 0.1, 0.2]})


def test_intervals_by_hand():
    """From 0 to 2 the rates are 0.1 + 0.1, from 2 to 3 they are 0.2; the last checkpoint begins none."""
    table = prediction.intervals(ALIGNMENT.sample(frac=1, random_state=1), STEPS)
    assert table["step"].tolist() == [0, 2] and table["width"].tolist() == [2, 1]
    assert table["rate"].tolist() == pytest.approx([0.2, 0.2])
    assert table["raw"].tolist() == pytest.approx([1.0, -0.2])
    assert table["aware"].tolist() == pytest.approx([2.0, 4.0])
    assert table["update"].tolist() == pytest.approx([0.9, 1.1])
    assert table["change"].tolist() == pytest.approx([1.0, 1.5])
    twice = prediction.intervals(ALIGNMENT, STEPS.assign(updates=2))
    assert twice["raw"].tolist() == pytest.approx([2.0, -0.4]) and twice["update"].equals(table["update"])


def test_seeds_are_kept_apart():
    two = pd.concat([ALIGNMENT, ALIGNMENT.assign(seed=1)])
    steps = pd.concat([STEPS, STEPS.assign(seed=1, lr=1.0)])
    table = prediction.intervals(two, steps)
    assert table.groupby("seed")["rate"].sum().tolist() == pytest.approx([0.4, 3.0])


def test_quality_by_hand():
    """raw has one sign of two right and a correlation of -1 over two points; aware is twice too large."""
    table = pd.DataFrame(
        {"run": ["a", "a"], "raw": [1.0, -1.0], "aware": [2.0, 6.0], "update": [1.0, 3.0], "change": [1.0, 3.0]}
    )
    found = prediction.quality(table, ["run"]).set_index("prediction")
    assert found["sign"].to_dict() == {"raw": 0.5, "aware": 1.0, "update": 1.0}
    assert found["correlation"].to_dict() == pytest.approx({"raw": -1, "aware": 1, "update": 1})
    assert found["rank"].to_dict() == pytest.approx({"raw": -1, "aware": 1, "update": 1})
    assert found["ratio"].to_dict() == pytest.approx({"raw": (1 - 3) / 2, "aware": 0.5, "update": 1})
    assert (found["intervals"] == 2).all() and (found["run"] == "a").all()


def test_what_is_constant_or_missing_has_no_correlation():
    table = pd.DataFrame(
        {"run": ["a"] * 2, "raw": [1.0, 1.0], "aware": [math.nan, 2.0], "update": [0.0, 0.0], "change": [1.0, 3.0]}
    )
    found = prediction.quality(table, ["run"]).set_index("prediction")
    assert found["correlation"].isna().all()
    assert found.loc["aware", "intervals"] == 1 and math.isnan(found.loc["update", "ratio"])


@pytest.mark.parametrize("column", ["g_opt", "moved", "logp_targets"])
def test_missing_columns_are_named(column):
    with pytest.raises(ValueError, match=column):
        prediction.intervals(ALIGNMENT.drop(columns=column), STEPS)
    with pytest.raises(ValueError, match="lr"):
        prediction.intervals(ALIGNMENT, STEPS.drop(columns="lr"))


def test_one_checkpoint_has_no_interval():
    table = prediction.intervals(ALIGNMENT[ALIGNMENT["step"] == 0], STEPS)
    assert table.empty and {"raw", "aware", "update", "change", "seed"} <= set(table.columns)
