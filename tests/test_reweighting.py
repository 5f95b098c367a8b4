"""Tables of weights against values worked out by hand."""

import pandas as pd
import pytest
from prefdyn.findings import reweighting


def sequences(omega, step=1):
    return pd.DataFrame({"seed": 0, "step": step, "example": range(len(omega)), "omega": omega})


def test_thirds_are_named_and_steps_without_thirds_left_out():
    both = pd.concat([sequences([0.5, 0.5, 0.5], step=0), sequences([0.3, 0.5, 0.4])])
    named = reweighting.with_thirds(both, "omega")
    assert named["step"].tolist() == [1, 1, 1]
    assert named["third"].tolist() == ["bottom", "top", "middle"]


def test_thirds_that_a_table_has_are_only_named():
    table = pd.DataFrame({"seed": 0, "step": 0, "third": [2, -1, 0], "strength": [1.0, 5.0, 3.0]})
    assert reweighting.with_thirds(table, "strength")["third"].tolist() == ["top", "bottom"]


def test_signal_by_hand():
    # gaps 2, 1, -1 and omega 0.2, 0.3, 0.5: ranks run against each other, so the correlation is -1; the one turned
    # round has the largest omega (AUC 1) and half of the sum of weights
    pairs = [
        {"reward_chosen": 3.0, "reward_rejected": 1.0, "flipped": False},
        {"reward_chosen": 2.0, "reward_rejected": 1.0, "flipped": False},
        {"reward_chosen": 1.0, "reward_rejected": 2.0, "flipped": True},
    ]
    named = reweighting.with_thirds(sequences([0.2, 0.3, 0.5]), "omega")
    (row,) = reweighting.signal(named, {0: pairs}).to_dict("records")
    assert row["correlation"] == pytest.approx(-1)
    assert row["auc_flipped"] == row["auc_worse"] == 1
    assert row["share_flipped"] == pytest.approx(1 / 3) and row["weight_flipped"] == pytest.approx(0.5)
    assert (row["worse_top"], row["worse_middle"], row["worse_bottom"]) == (1, 0, 0)


def tokens():
    return pd.DataFrame(
        {
            "seed": 0,
            "step": 0,
            "kind": ["name", "name", "verb"],
            "third": ["top", "bottom", "bottom"],
            "strength": [3.0, 1.0, 0.5],
            "w": [0.3, -0.1, 0.05],
            "a": [2.0, 4.0, -2.0],
        }
    )


def test_push_and_top_share_by_hand():
    # names: 0.3*2 - 0.1*4 = 0.2 with |w| 0.4, so 0.5 a unit of weight; verbs: -0.1 with 0.05, so -2
    pushed = reweighting.push(tokens(), "kind").set_index("kind")
    assert pushed["g"].to_dict() == pytest.approx({"name": 0.2, "verb": -0.1})
    assert pushed["direction"].to_dict() == pytest.approx({"name": 0.5, "verb": -2.0})
    share = reweighting.top_share(tokens(), "kind").set_index("kind")
    assert share["share"].to_dict() == {"name": 0.5, "verb": 0.0}
    assert share["tokens"].to_dict() == {"name": 2, "verb": 1}


def test_spread_by_hand():
    row = reweighting.spread(tokens(), "strength").set_index("third").loc["bottom"]
    assert (row["median"], row["smallest"], row["largest"], row["n"]) == (0.75, 0.5, 1.0, 2)
