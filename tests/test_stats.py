"""Intervals by hand and by simulation; signs by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from prefdyn.findings import stats
from scipy import stats as scipy_stats


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt 3; the 97.5% quantile of t with 2 is 4.30265."""
    e = stats.mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (e.mean, e.low, e.high, e.n) == pytest.approx((2, 2 - half, 2 + half, 3))
    assert (e.low, e.high) == pytest.approx(scipy_stats.t.interval(0.95, 2, loc=2, scale=1 / math.sqrt(3)))
    # at 50% the quantile is 0.816497 = sqrt(2 / 3)
    assert stats.mean_interval([1.0, 2.0, 3.0], level=0.5).high == pytest.approx(2 + math.sqrt(2) / 3)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(n):
    """4,000 normal samples: a 95% interval misses in 5% +- 0.34%; within 93 to 97% is 5.8 deviations."""
    samples = np.random.default_rng(n).normal(0.7, 2.0, size=(4_000, n))
    intervals = [stats.mean_interval(row) for row in samples]
    covered = np.mean([e.low < 0.7 < e.high for e in intervals])
    assert 0.93 < covered < 0.97


def test_one_value_has_no_interval():
    e = stats.mean_interval([0.5])
    assert e.mean == 0.5 and math.isnan(e.low) and math.isnan(e.high) and not e.above_zero
    assert str(e) == "0.50 [no interval, n = 1]"
    for nothing in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least one value"):
            stats.mean_interval(nothing)


def test_estimates_know_their_values():
    """They do not count when estimates are compared, nor do they change how one prints."""
    e = stats.mean_interval(pd.Series([3.0, 1.0, 2.0]))
    assert e.values == (3.0, 1.0, 2.0) and e.prompts == 0
    assert stats.mean_interval([0.5]).values == (0.5,)
    plain = stats.Estimate(e.mean, e.low, e.high, e.n)
    assert plain.values == () and plain == e and str(plain) == str(e)


def test_an_interval_is_cut_at_what_is_possible():
    """0.5 and 0.9: mean 0.7, standard error 0.2, t quantile 12.7: far beyond 0 and 1. 0.50, 0.51, 0.52 stay inside."""
    wide = stats.mean_interval([0.5, 0.9])
    assert wide.low < 0 and wide.high > 1
    cut = stats.mean_interval([0.5, 0.9], within=(0, 1))
    assert (cut.mean, cut.low, cut.high, cut.n) == (pytest.approx(0.7), 0, 1, 2)
    half_open = stats.mean_interval([0.5, 0.9], within=(0, math.inf))
    assert half_open.low == 0 and half_open.high == wide.high
    inside = [0.50, 0.51, 0.52]
    assert stats.mean_interval(inside, within=(0, 1)) == stats.mean_interval(inside)
    assert stats.mean_interval([0.0, 1.0], within=(0, 1)).mean == 0.5  # the ends are possible
    for outside in ([0.5, 1.1], [-0.1], [0.5, 0.5, 2.0]):
        with pytest.raises(ValueError, match="outside of what is possible, 0 to 1"):
            stats.mean_interval(outside, within=(0, 1))
    assert math.isnan(stats.mean_interval([0.5, math.nan], within=(0, 1)).mean)


def test_estimates_print_with_their_interval():
    e = stats.Estimate(0.625, 0.5, 0.75, 3)
    assert str(e) == "0.62 [0.50, 0.75]"
    assert f"{e:+.1f}" == "+0.6 [+0.5, +0.8]"
    assert e.above_zero and not stats.Estimate(0.1, -0.1, 0.3, 3).above_zero


def test_over_seeds_by_hand():
    """Step 0: 1 and 3, mean 2, standard error 1, t quantile with 1 degree 12.7062. Step 1: one value."""
    table = pd.DataFrame({"step": [0, 0, 1], "seed": [0, 1, 0], "y": [1.0, 3.0, 5.0]})
    out = stats.over_seeds(table, "step", "y")
    assert out["step"].tolist() == [0, 1] and out["n"].tolist() == [2, 1] and out["mean"].tolist() == [2, 5]
    assert out["low"][0] == pytest.approx(2 - 12.706204736432095) and math.isnan(out["low"][1])
    by_two = stats.over_seeds(table.assign(kind="a"), ["kind", "step"], "y")
    assert by_two[["kind", "step"]].to_numpy().tolist() == [["a", 0], ["a", 1]]


def test_rank_correlation_against_its_definition():
    """Pearson's correlation of ranks, where equal numbers share the mean of their ranks."""

    def ranks(x) -> list[float]:
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, size=(2, 12)).tolist()
        assert stats.rank_correlation(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    # ranks 1, 2, 3 and 3, 1, 2 differ by 2, 1, 1: 1 - 6 * 6 / (3 * 8)
    assert stats.rank_correlation([0.1, 0.2, 9.0], [7.0, -1.0, 3.0]) == pytest.approx(-0.5)
    assert stats.rank_correlation(pd.Series([1.0, 2.0]), np.array([5.0, 50.0])) == pytest.approx(1)


def test_auc_against_all_pairs():
    """The share of (positive, negative) pairs in which the positive has the larger score, ties half."""
    rng = np.random.default_rng(0)
    for positives in (1, 5, 29):
        scores, positive = rng.integers(0, 8, size=30) / 4, np.arange(30) < positives
        wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
        assert stats.auc(scores, positive) == pytest.approx(np.mean(wins))
        assert stats.auc(pd.Series(-scores), positive.tolist()) == pytest.approx(1 - np.mean(wins))
    # 3 > 2, 3 > 1, 2 = 2, 2 > 1: 3.5 of 4
    assert stats.auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]) == 0.875


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2], [3, 3]), ([1], [2]), ([], [])])
def test_a_constant_has_no_rank_correlation(x, y):
    assert math.isnan(stats.rank_correlation(x, y))


@pytest.mark.parametrize("positive", [[True, True], [False, False], []])
def test_auc_needs_both_kinds(positive):
    assert math.isnan(stats.auc([1.0, 2.0][: len(positive)], positive))


def test_missing_numbers_are_not_ranked():
    assert math.isnan(stats.rank_correlation([1, math.nan, 3], [1, 2, 3]))
    assert math.isnan(stats.auc([1.0, math.nan, 3.0], [True, True, False]))


def test_signs_by_hand():
    """z = 1.96: +3, -3 and +2 standard errors are sure, +1 is not, the missing one does not count.

    Of 4 known ones, 2 are positive and 1 negative; the sure ones run + - +, two changes.
    """
    summary = stats.sign_summary([3.0, 1.0, -3.0, math.nan, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert summary == {"positive": 0.5, "negative": 0.25, "flips": 2.0}
    # at 68% one standard error is just enough: z = 0.9945
    assert stats.sign_summary([1.0, 1.0], [1.0, 1.0], level=0.68) == {"positive": 1, "negative": 0, "flips": 0}


def test_nothing_known_has_no_signs():
    assert all(math.isnan(v) for v in stats.sign_summary([math.nan], [1.0]).values())
    with pytest.raises(ValueError, match="differ in shape"):
        stats.sign_summary([1.0], [1.0, 2.0])


def test_gaps_are_read_where_both_paths_have_come_equally_far():
    """One path reaches x = 4 with y = 8 (and falls back); the other passes x = 4 half-way between y = 1 and y = 3."""
    rows = [("a", 0, 0.0, 0.0), ("a", 1, 4.0, 8.0), ("a", 2, 3.0, 99.0)]
    rows += [("b", 0, 2.0, 1.0), ("b", 1, 6.0, 3.0), ("b", 2, 5.0, 99.0)]
    table = pd.DataFrame(rows, columns=["who", "step", "x", "y"]).assign(seed=0)
    both = pd.concat([table, table.assign(seed=1, y=table["y"] * 10)]).sample(frac=1, random_state=0)
    assert stats.at_equal(both, "x", "y", "who", "a", "b").mean == pytest.approx((6 + 60) / 2)
    assert stats.at_equal(both, "x", "y", "who", "b", "a") == stats.mean_interval([-6, -60])


def test_paths_are_compared_along_what_both_cover():
    """One goes from x = 0 to 4, the other from 2 to 6: on 2 to 4, y = 2 x and y = x - 1 differ by x + 1."""
    rows = [("a", 0, 0.0, 0.0), ("a", 1, 4.0, 8.0), ("b", 0, 2.0, 1.0), ("b", 1, 6.0, 5.0)]
    table = pd.DataFrame(rows, columns=["who", "step", "x", "y"]).assign(seed=0)
    both = pd.concat([table, table.assign(seed=1, y=table["y"] * 10)]).sample(frac=1, random_state=0)
    assert stats.along(both, "x", "y", "who", "a", "b", places=3) == stats.mean_interval([4, 40])
    assert stats.along(both, "x", "y", "who", "b", "a") == stats.mean_interval([-4, -40])
    # paths that do not meet are compared where the later one begins; the other never comes there
    apart = table.assign(x=table["x"] + 9 * (table["who"] == "b"))
    assert math.isnan(stats.along(apart, "x", "y", "who", "a", "b").mean)


def test_differences_are_paired_by_seed():
    # by seed 1 - 0 = 1 and 12 - 10 = 2, though the rows come in another order
    table = pd.DataFrame({"control": ["a", "a", "b", "b"], "seed": [0, 1, 1, 0], "reward": [1.0, 12.0, 10.0, 0.0]})
    found = stats.differences(table, "control", "a", "b", ["reward"])["reward"]
    assert found.mean == pytest.approx(1.5) and found.n == 2


def test_rewards_are_compared_where_both_have_come_equally_far():
    # the first stops at kl 2 with reward 5; the second passes kl 2 halfway between its steps (0 to 4), at reward 4
    rows = [("a", 0, 0.0, 3.0), ("a", 1, 2.0, 5.0), ("b", 0, 0.0, 3.0), ("b", 1, 4.0, 5.0)]
    table = pd.DataFrame(rows, columns=["control", "step", "kl", "reward"]).assign(seed=0)
    found = stats.at_equal(table, "kl", "reward", "control", "a", "b")
    assert found.mean == pytest.approx(1.0) and found.n == 1


def test_steps_to_by_hand():
    """Seed 0 passes 3 between steps 10 (1) and 20 (5), at 10 + 10 * 2 / 4 = 15, and falls back later.

    Seed 1 starts above it, at step 0; seed 2 never reaches it; seed 3 reaches it exactly at the last step.
    """
    paths = {0: [0.0, 1.0, 5.0, 2.0], 1: [4.0, 1.0, 5.0, 6.0], 2: [0.0, 1.0, 2.0, 2.9], 3: [0.0, 2.0, 2.5, 3.0]}
    rows = [(seed, step, y) for seed, path in paths.items() for step, y in zip((0, 10, 20, 30), path, strict=True)]
    table = pd.DataFrame(rows, columns=["seed", "step", "reward"]).sample(frac=1, random_state=0)
    found = stats.steps_to(table, "step", "reward", 3.0)
    assert found.index.name == "seed" and found.index.tolist() == [0, 1, 2, 3]
    assert found.tolist() == pytest.approx([15, 0, math.nan, 30], nan_ok=True)
    # a checkpoint that is not known is stepped over: from 0 at step 0 to 5 at step 20, 3 lies at 12
    gap = table.assign(reward=table["reward"].where(table["step"] != 10))
    assert stats.steps_to(gap, "step", "reward", 3.0)[0] == pytest.approx(12)
    with pytest.raises(ValueError, match="more than one row with step = 0"):
        stats.steps_to(pd.concat([table, table[table["step"] == 0]]), "step", "reward", 3.0)


TABLE = pd.DataFrame({"seed": [0], "step": [1], "y": [2.0]})


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.over_seeds(TABLE, "kind", "y"),
        lambda: stats.over_seeds(TABLE, ["step", "kind"], "y"),
        lambda: stats.differences(TABLE, "kind", "a", "b", ["y"]),
        lambda: stats.at_equal(TABLE, "step", "y", "kind", "a", "b"),
        lambda: stats.along(TABLE, "step", "y", "kind", "a", "b"),
        lambda: stats.steps_to(TABLE, "step", "kind", 1.0),
    ],
)
def test_a_missing_column_is_named(call):
    with pytest.raises(ValueError, match="no column kind; there are: seed, step, y"):
        call()


def test_all_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column example, full; there are: seed, step, y"):
        stats.subsample_sureness(TABLE, 2)
    stats.require_columns(TABLE, ["y", "seed"])


def test_judge():
    inside, above = stats.Estimate(0.1, -0.1, 0.3, 3), stats.Estimate(0.7, 0.6, 0.8, 3)
    assert stats.judge(inside, "above") == "undecided"
    assert stats.judge(above, "above", at=0.5) == "as predicted"
    assert stats.judge(above, "below", at=0.5) == "against the prediction"
    assert stats.judge(stats.Estimate(0.7, float("nan"), float("nan"), 1), "above") == "undecided"
    with pytest.raises(ValueError, match="sideways"):
        stats.judge(above, "sideways")


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (0.0, 1.0),
        (1.0, 3.0),  # half-way from 1 to 5
        (2.0, 5.0),  # where it first comes so far
        (3.0, 14.5),  # half-way to 20 from 9, which counts as at 2
        (4.0, 20.0),  # its end, and not the fall after it
        (-7.0, 1.0),  # it begins beyond: read at its start
        (4.01, math.nan),
    ],
)
def test_a_path_is_read_where_it_has_come_so_far(at, expected):
    """x: 0, 2, back to 1, 4, and back to 3. While it is back at 1 it counts as at 2, where y goes from 5 to 9."""
    path = pd.DataFrame({"kl": [0.0, 2.0, 1.0, 4.0, 3.0], "y": [1.0, 5.0, 9.0, 20.0, 99.0]}, index=[7, 3, 3, 0, 1])
    before = path.copy()
    assert stats.read_at(path, "kl", "y", at) == pytest.approx(expected, nan_ok=True)
    pd.testing.assert_frame_equal(path, before)


@pytest.mark.parametrize(("at", "expected"), [(1.0, 5.0), (2.0, 5.0), (2.1, math.nan)])
def test_a_path_that_only_falls_back_is_its_start(at, expected):
    path = pd.DataFrame({"kl": [2.0, 1.0, 0.0], "y": [5.0, 6.0, 7.0]})
    assert stats.read_at(path, "kl", "y", at) == pytest.approx(expected, nan_ok=True)
