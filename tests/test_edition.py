"""The reader's edition, by its reference results: there is room to be better, and something to find."""

import json
from pathlib import Path

import pytest
from prefdyn.findings.claims import RULES

KEPT = Path(__file__).resolve().parents[1] / "data" / "reference" / "reader.json"
NUMBERS, INTERVALS = (json.loads(KEPT.read_text(encoding="utf-8"))[name] for name in ("numbers", "intervals"))


def number(name: str) -> tuple[float, list[float]]:
    """A number of the edition: its value, and that of each seed."""
    kept = NUMBERS[name]
    return kept["value"], kept["seeds"]


def test_claims_are_judged_on_five_seeds():
    assert INTERVALS.keys() == {rule.name for rule in RULES} and {kept["n"] for kept in INTERVALS.values()} == {5}


def test_the_supervised_policy_is_mediocre():
    """Its greedy replies earn 35 to 60% of what the best replies do; of 16 samples the best is clearly better."""
    assert 0.35 <= number("01-setting:sft_share")[0] <= 0.60
    best, greedy = number("01-setting:sft_best")[1], number("01-setting:sft_reward")[1]
    assert all(b > 1.5 * g for b, g in zip(best, greedy, strict=True))


def test_what_is_worth_most_is_rare_and_found_by_some():
    """The kind of reply that earns most has a probability between 0.1 and 3% before training, and more after it."""
    assert 0.001 <= number("01-setting:sft_ideal")[0] <= 0.03
    assert number("03-positive-negative:ideal_full")[0] > number("01-setting:sft_ideal")[0]


@pytest.mark.parametrize(
    ("share", "top"),
    [
        ("02-targets:room_dpo", "02-targets:top_dpo"),
        ("02-targets:room_ppo", "02-targets:top_ppo"),
        ("09-methods:most_share", "09-methods:most_top"),
    ],
)
def test_no_policy_is_at_its_ceiling(share, top):
    """At most 90% of what the best replies earn, and all points on at most half of the prompts."""
    assert number(share)[0] <= 0.90 and number(top)[0] <= 0.50


SAME = {
    "08-ledger:C1c": "02-targets:above_dpo",
    "08-ledger:C2b": "02-targets:ppo_gain",
    "08-ledger:C3a": "03-positive-negative:dpo_share",
    "08-ledger:C3c": "03-positive-negative:same_positive",
    "08-ledger:C3d": "03-positive-negative:same_negative",
    "08-ledger:C4a": "04-reweighting:correlation",
    "08-ledger:C4b": "04-reweighting:auc_worse",
    "08-ledger:C4c": "04-reweighting:road_last",
    "08-ledger:C5a": "03-positive-negative:ppo_share",
    "08-ledger:C5b": "03-positive-negative:entropy_same",
    "08-ledger:C5c": "03-positive-negative:coverage_same",
    "08-ledger:C6a": "04-reweighting:c6_g",
    "08-ledger:C6b": "04-reweighting:c6_direction",
    "08-ledger:C6c": "04-reweighting:c6_later_g",
    "08-ledger:C6d": "04-reweighting:c6_later",
    "07-prediction:c5_share_raw": "03-positive-negative:ppo_share",
}


@pytest.mark.parametrize(("one", "other"), SAME.items())
def test_a_quantity_that_is_told_twice_has_one_value(one, other):
    """In the ledger and in the chapter that measured it, seed by seed."""
    assert number(one)[1] == pytest.approx(number(other)[1], rel=1e-5, abs=1e-7)
