"""Simulated coverage: shapes and intervals by hand, and what the book says of them."""

import numpy as np
import pytest
from prefdyn.findings import coverage, paired, stats


@pytest.mark.parametrize("shape", coverage.SHAPES)
def test_effects_have_mean_0_and_deviation_1(shape):
    """A million draws: a mean within 0.005 is 5 deviations. t3 has no fourth moment: its deviation settles slowly."""
    for effects in coverage.SHAPES[shape]:
        x = effects(np.random.default_rng(0), (1_000_000,))
        assert x.mean() == pytest.approx(0, abs=0.005)
        assert x.std() == pytest.approx(1, abs=0.03 if shape in ("t3", "lognormal") else 0.005)


def test_shapes_by_hand():
    """Lognormal: median (1 - e^0.5) / 2.161 = -0.300. Collapse: a fifth below (-10 / 2 + 2) / sqrt 17 = -0.73."""
    rng = np.random.default_rng(1)
    assert np.median(coverage.lognormal(rng, (200_000,))) == pytest.approx(-0.300, abs=0.01)
    assert (coverage.collapse(rng, (200_000,)) < -0.73).mean() == pytest.approx(0.2, abs=0.005)


def test_cells_are_crossed():
    """Without rest, every cell is its seed's effect plus its prompt's: no interaction is left."""
    y = coverage.cells(np.random.default_rng(0), "lognormal", (4, 3, 8), (1.0, 2.0, 0.0))
    assert y.shape == (4, 3, 8)
    rest = y - y.mean(1, keepdims=True) - y.mean(2, keepdims=True) + y.mean((1, 2), keepdims=True)
    assert np.abs(rest).max() < 1e-12
    variances = coverage.cells(np.random.default_rng(0), "normal", (2_000, 5, 40), (1.0, 2.0, 3.0)).var((1, 2))
    assert variances.mean() == pytest.approx(0.8 * 1 + 4 * 39 / 40 + 9, rel=0.02)


def outside(found: list[stats.Estimate], truth: float) -> tuple[float, float]:
    """Share of intervals below and above which the truth lies."""
    return np.mean([truth < e.low for e in found]), np.mean([truth > e.high for e in found])


def test_misses_are_those_of_the_books_own_intervals():
    rng = np.random.default_rng(2)
    y = coverage.cells(rng, "t3", (60, 3, 8))
    found = [paired.crossed_interval(one) for one in y]
    for truth in (-0.5, 0.0, 0.8):
        assert coverage.misses(y, truth) == pytest.approx(outside(found, truth))
    assert coverage.misses(y, 9.0) == (0, 1)  # the truth lies above every interval
    plain = [stats.mean_interval(one) for one in y[..., 0]]
    assert coverage.misses(y[..., :1], 0.6) == pytest.approx(outside(plain, 0.6))
    rates = [paired.win_rate_interval(one, np.zeros_like(one)) for one in y]
    won = paired.wins(y, np.zeros_like(y))
    for truth in (0.05, 0.35, 0.6):
        assert coverage.misses_of_win_rate(won, truth) == pytest.approx(outside(rates, truth))
    assert coverage.misses_of_win_rate(won, 0.05)[0] > 0 < coverage.misses_of_win_rate(won, 0.95)[1]


def test_the_true_win_rate():
    """Normal: P(lead + N(0, 0.09 + 1 + 1) > 0). Of other shapes, the share of simulated outcomes."""
    from scipy.stats import norm

    rng = np.random.default_rng(3)
    deviation = np.linalg.norm(coverage.SIZES)
    found = coverage.true_win_rate(rng, "normal", 0.5 * deviation)
    assert found == pytest.approx(norm.cdf(0.5), abs=0.002)
    y = coverage.cells(rng, "lognormal", (3_000, 10, 10), (1.0, 1.0, 1.0))
    found = coverage.true_win_rate(rng, "lognormal", 0.2, (1.0, 1.0, 1.0))
    assert found == pytest.approx((y + 0.2 > 0).mean(), abs=0.01)


@pytest.fixture(scope="module")
def table():
    return coverage.coverage(repetitions=1_000)


def test_every_interval_and_shape_has_its_row(table):
    assert len(table) == 4 * 3 * 3 and not table.duplicated(["shape", "interval", "seeds"]).any()
    assert table.columns.tolist() == ["shape", "interval", "seeds", "prompts", "coverage", "below", "above"]
    assert np.allclose(table[["coverage", "below", "above"]].sum(axis=1), 1)
    assert (table["prompts"] == np.where(table["interval"] == "mean", 0, 128)).all()
    again = coverage.coverage(repetitions=1_000, seeds=(2,))
    assert again.equals(table[table["seeds"] == 2].reset_index(drop=True))


def test_what_the_intervals_can_claim(table):
    """1,000 repetitions: one deviation is 0.7% at 95%, 1.4% at 70%.

    Normal and t3 effects keep 95%. With skewed ones an interval over five seeds' values keeps about 82 and 70%, and a
    crossed one, where replies scatter more than seeds, more.
    """
    of = table.set_index(["shape", "interval", "seeds"])
    assert of.loc[["normal", "t3"], "coverage"].between(0.92, 0.99).all()
    mean = of["coverage"].xs("mean", level="interval").unstack()
    assert mean.loc["lognormal"].to_numpy() == pytest.approx([0.89, 0.84, 0.82], abs=0.05)
    assert mean.loc["collapse"].to_numpy() == pytest.approx([0.86, 0.75, 0.70], abs=0.06)
    crossed = of["coverage"].xs("crossed", level="interval").unstack()
    assert (crossed.loc[["lognormal", "collapse"]] > mean.loc[["lognormal", "collapse"]]).all(axis=None)


def test_skewed_effects_miss_on_the_side_of_their_tail(table):
    """Seeds with a tail upward give intervals that lie too low, those of which few collapse ones that lie too high."""
    means = table[(table["interval"] == "mean") & (table["seeds"] == 5)].set_index("shape")
    assert means.loc["lognormal", "above"] > 0.1 > 0.02 > means.loc["lognormal", "below"]
    assert means.loc["collapse", "below"] > 0.2 > 0.02 > means.loc["collapse", "above"]


def test_where_replies_scatter_most_the_shape_of_seeds_hardly_matters():
    """Seeds with a tenth of the deviation of replies: over 128 prompts both weigh alike, and 95% holds again."""
    found = coverage.coverage(seeds=(5,), repetitions=1_000, sizes=(0.1, 0.3, 1.0))
    crossed = found[found["interval"] == "crossed"].set_index("shape")["coverage"]
    assert (crossed > 0.91).all()


def test_sizes_by_hand_and_found_again():
    """0 6 0 and 2 4 6 have mean squares 6, 8, 8 (tests/test_paired.py): (6 - 8) / 3 is no variance, (8 - 8) / 2 none.

    1 5 and 3 11: seeds' means 3 and 7, MS_S = 2 (4 + 4) = 16, prompts' 2 and 8, MS_P = 2 (9 + 9) = 36, grand mean 5;
    residuals 1 - 3 - 2 + 5 = 1, all of size 1, MS_E = 4. Variances 12 / 2, 32 / 2 and 4.
    """
    assert coverage.sizes_of(np.array([[0.0, 6.0, 0.0], [2.0, 4.0, 6.0]])) == pytest.approx((0, 0, np.sqrt(8)))
    assert coverage.sizes_of(np.array([[1.0, 5.0], [3.0, 11.0]])) == pytest.approx((np.sqrt(6), 4, 2))
    y = coverage.cells(np.random.default_rng(4), "normal", (1, 200, 200), (1.0, 2.0, 3.0))[0]
    assert coverage.sizes_of(y) == pytest.approx((1, 2, 3), rel=0.15)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match=r"seeds=\(1, 3\); an interval needs at least 2"):
        coverage.coverage(seeds=(1, 3))
    with pytest.raises(ValueError, match="the last, of what is left, must be above 0"):
        coverage.coverage(sizes=(1.0, 1.0, 0.0))
