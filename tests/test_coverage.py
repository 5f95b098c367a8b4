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
    """1,000 repetitions, one deviation 0.7% at 95%, 1.2% at 80%."""
    by = table.set_index(["shape", "interval", "seeds"])["coverage"].unstack()
    print(by)


def test_one_seed_has_no_coverage():
    with pytest.raises(ValueError, match=r"seeds=\(1, 3\); an interval needs at least 2"):
        coverage.coverage(seeds=(1, 3))
