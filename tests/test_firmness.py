"""How firmly verdicts stand: every draw of two and three seeds by hand, prompts, machines."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from prefdyn.findings import claims, firmness, paired, stats
from prefdyn.findings.claims import Finding, Rule
from prefdyn.findings.stats import Estimate


def rule(name: str, measure=None, predicted="above", threshold=0.0, table="values", columns=("seed", "x")) -> Rule:
    """A rule of the claim that its name begins with, on the mean of x over seeds unless another measure is given."""
    measure = measure or (lambda t: stats.mean_interval(t.groupby("seed")["x"].mean()))
    return Rule(name[:2], name, "", "", table, (), columns, measure, predicted, threshold, "")


def values(*x: float) -> dict:
    """The table of a value a seed; seeds have numbers that are no places."""
    return {("values",): pd.DataFrame({"seed": [7 * i + 3 for i in range(len(x))], "x": x})}


@pytest.fixture
def every_draw(monkeypatch):
    """All n^n draws of n seeds, and of prompts those that there are, in the place of random ones."""

    def drawn(size, draws, seed, stream):
        if stream == firmness.PROMPTS:
            return np.tile(np.arange(size), (draws, 1))
        return np.sort(list(itertools.product(range(size), repeat=size)), axis=1)

    monkeypatch.setattr(firmness, "_drawn", drawn)


def test_two_seeds_by_hand(every_draw):
    """10 and 11: 10.5 +- 12.7 x 0.5, surely above 0. Of 4 draws two hold both seeds; (10, 10) and (11, 11) hold one."""
    assert firmness.firmness([rule("C1a")], values(10, 11)) == {"C1a": 1 / 2, "C1": 1 / 2}
    # 1 and 2: 1.5 +- 6.35, undecided; so it is where one seed was drawn twice
    assert firmness.firmness([rule("C1a")], values(1, 2)) == {"C1a": 1, "C1": 1}


def test_three_seeds_by_hand(every_draw):
    """1, 2, 6: mean 3, deviation 2.65, half-width 4.303 x 2.65 / 1.73 = 6.57: undecided.

    Of 27 draws 6 hold all three seeds and 3 one seed alone: undecided. 3 each hold a twice and b once: mean
    (2a + b) / 3, half-width 4.303 |a - b| / 3 = 1.434 |a - b|. Only 2, 2, 1 has a lower end above 0:
    5/3 - 1.434 = 0.23; 1, 1, 2 has 4/3 - 1.434 = -0.10, and the others have |a - b| of 4 or 5.
    """
    rules = [rule("C1a"), rule("C1b", predicted="below")]
    assert firmness.firmness(rules[:1], values(1, 2, 6)) == {"C1a": 24 / 27, "C1": 24 / 27}
    # the same seeds for both: in these 3 draws C1b is against the prediction, the claim "partly" and not "inconclusive"
    shares = firmness.firmness(rules, values(1, 2, 6))
    assert shares == pytest.approx({"C1a": 24 / 27, "C1b": 24 / 27, "C1": 24 / 27})


def test_a_claim_may_stand_while_its_rules_turn(every_draw):
    """2, 2.1 and 6 above 0 and above 100: undecided and against, "not supported".

    2.03 +- 0.14 (3 draws) and 2.07 +- 0.14 (3 draws) turn C1a, and the claim to "partly". The other pairs do not: 2, 2,
    6 is 3.33 +- 5.74, 2, 6, 6 is 4.67 +- 5.74, 2.1, 2.1, 6 is 3.4 +- 5.59, 2.1, 6, 6 is 4.7 +- 5.59. C1b, against in
    all 24 draws of more than one seed, is undecided in 3, where C1a is too: "inconclusive".
    """
    shares = firmness.firmness([rule("C1a"), rule("C1b", threshold=100.0)], values(2, 2.1, 6))
    assert shares == pytest.approx({"C1a": 21 / 27, "C1b": 24 / 27, "C1": 18 / 27})


def test_equal_seeds_stand_as_firmly_as_their_number_allows(every_draw):
    """Intervals without width decide in every draw but those of one seed alone: 1 of n^(n-1)."""
    for n, share in ((2, 1 / 2), (3, 8 / 9), (4, 63 / 64)):
        assert firmness.firmness([rule("C1a")], values(*[1.0] * n))["C1a"] == pytest.approx(share)


def test_what_was_not_run_is_left_out():
    rules = [rule("C1a"), rule("C1b", table="nothing"), rule("C2a")]
    shares = firmness.firmness(rules, values(10.0, 10.1, 10.2))
    assert shares.keys() == {"C1a", "C1", "C2a", "C2"} and shares["C1"] is None
    assert shares["C2"] == shares["C2a"] == shares["C1a"] > 0.7
    # nor is there any firmness of one seed, or of what is not known
    for table in (values(1.0), values(1.0, math.nan)):
        assert firmness.firmness([rule("C1a")], table) == {"C1": None}
    assert firmness.firmness([], {}) == {}


def test_draws_in_which_a_measure_is_not_known_are_other_verdicts(every_draw):
    """Known only where 10 is drawn. Of 10 and 11 all draws of both have it, two of 4; the other two are one seed."""

    def needs_ten(t):
        return stats.mean_interval(t["x"] if t["x"].min() < 10.5 else [math.nan])

    assert firmness.firmness([rule("C1a", needs_ten)], values(10, 11))["C1a"] == 1 / 2
    # of 27 draws 8 have no 10, and of the other 19 one has nothing else
    assert firmness.firmness([rule("C1a", needs_ten)], values(10, 11, 11))["C1a"] == pytest.approx(18 / 27)


def answers(y: np.ndarray) -> dict:
    """The table of y [seeds, prompts], in no order, with a column that no rule reads."""
    rows = [(s, i, y[s, i], "text") for s in range(y.shape[0]) for i in range(y.shape[1])]
    table = pd.DataFrame(rows, columns=["seed", "index", "x", "reply"]).sample(frac=1, random_state=0)
    return {("values",): table}


def crossed(t: pd.DataFrame) -> Estimate:
    return paired.crossed_interval(paired.by_seed_and_prompt(t, "x"))


def test_prompts_are_drawn_too():
    """All seeds answer alike, one prompt of four is far off: seeds alone would leave every draw as it is."""
    y = np.tile([1.0, 1.1, 1.2, -8.0], (3, 1)) + 0.01 * np.arange(3)[:, None]
    by_prompt = rule("C1a", crossed, columns=("seed", "index", "x"))
    (share,) = {firmness.firmness([by_prompt], answers(y), draws=120)[name] for name in ("C1a", "C1")}
    # without the last prompt, (3/4)^4 = 0.32 of draws, an interval lies above 0; one seed alone, 1/9, is undecided
    assert claims.apply_rule(by_prompt, answers(y)["values",]).verdict == "undecided"
    assert share == pytest.approx(1 - 0.32 * 8 / 9, abs=0.13)
    assert firmness.firmness([by_prompt], answers(y[:, :3]), draws=120)["C1a"] == pytest.approx(8 / 9, abs=0.09)


def test_the_same_prompts_for_all_seeds_and_rules():
    """Two rules of one claim that differ in nothing, and cells that have to be a full grid in every draw."""
    y = np.random.default_rng(0).normal(0.3, 1, size=(3, 16))
    seen = []

    def keep(t):
        seen.append(paired.by_seed_and_prompt(t, "x"))
        return crossed(t)

    rules = [rule(name, keep, columns=("seed", "index", "x")) for name in ("C1a", "C2a")]
    shares = firmness.firmness(rules, answers(y), draws=30)
    assert shares["C1a"] == shares["C2a"] == shares["C1"] and len(seen) > 40
    # the wholes first, then both rules draw by draw
    assert all((one == other).all() for one, other in zip(seen[::2], seen[1::2], strict=True))
    for one in seen[2::2]:
        columns = {tuple(column) for column in one.T}
        seeds = [next(i for i in range(3) if set(row) <= set(y[i])) for row in one]
        assert one.shape == y.shape and seeds == sorted(seeds) and columns <= {tuple(c) for c in y[seeds].T}


def test_rows_of_a_draw_by_hand():
    """Seeds 5, 9 and prompts 0, 4; the second seed twice, the prompts turned: rows by their cell, in their order."""
    table = pd.DataFrame(
        {"seed": [9, 5, 9, 5, 9, 5], "index": [4, 0, 0, 4, 4, 0], "step": [0, 0, 0, 0, 1, 1], "x": list("abcdef")}
    )
    cells = firmness._cells(table)
    assert [[rows.tolist() for rows in one] for one in cells] == [[[1, 5], [3]], [[2], [0, 4]]]
    drawn = firmness.resampled(table, cells, np.array([1, 1, 0]), np.array([1, 0]))
    assert drawn["x"].tolist() == list("aec" + "aec" + "dbf")
    assert drawn["seed"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert drawn["index"].tolist() == [0, 0, 1] * 2 + [0, 1, 1]
    assert drawn["step"].tolist() == [0, 1, 0] * 2 + [0, 0, 1] and drawn.columns.tolist() == table.columns.tolist()
    # without prompts
    plain = table.drop(columns="index")
    drawn = firmness.resampled(plain, firmness._cells(plain), np.array([0, 0]), np.array([0]))
    assert drawn["x"].tolist() == list("bdf" * 2) and drawn["seed"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["seed"].tolist() == [9, 5, 9, 5, 9, 5]


def test_draws_are_the_same_again_and_others_with_another_seed():
    one = firmness._drawn(5, 50, 0, firmness.SEEDS)
    assert one.shape == (50, 5) and one.min() == 0 and one.max() == 4 and (np.diff(one) >= 0).all()
    assert (one == firmness._drawn(5, 50, 0, firmness.SEEDS)).all()
    for other in (firmness._drawn(5, 50, 1, firmness.SEEDS), firmness._drawn(5, 50, 0, firmness.PROMPTS)):
        assert (one != other).any()


def test_rules_of_the_ledger_can_be_drawn():
    """Measures that pivot on seeds, checkpoints and prompts find every seed and prompt once."""
    rng, seeds, steps = np.random.default_rng(0), (4, 5, 6), (0, 3, 6)
    g = pd.DataFrame(list(itertools.product(seeds, steps, ("full", "positive", "negative"))))
    g = g.set_axis(["seed", "step", "component"], axis=1)
    noise = rng.normal(size=(4, len(g)))
    g = g.assign(g=1 + noise[0], se=0.5, g_opt=1 + noise[1], se_opt=0.5, cosine=0.1 * noise[2])
    cells = list(itertools.product(("full", "positive", "negative"), seeds, range(6), steps))
    replies = pd.DataFrame(cells, columns=["label", "seed", "index", "step"])
    replies["reply"] = rng.integers(0, 2, len(replies)).astype(str)
    cells = list(itertools.product((0, 3, 6), seeds, range(6), ("plain", "shift", "late")))
    gains = pd.DataFrame(cells, columns=["step", "seed", "index", "variant"])
    gains["reward"] = rng.normal(size=len(gains)) + (gains["variant"] == "late")
    tables = {("G", "dpo"): g, ("replies of halves", "dpo"): replies, ("variants", "dpo"): gains}
    rules = [rule for rule in claims.RULES if (rule.table, *rule.methods) in tables]
    assert {"C1a", "C3a", "C3c", "C7a", "C7c", "S1a", "S2c"} <= {rule.name for rule in rules}
    shares = firmness.firmness(rules, tables, draws=12)
    known = {name: share for name, share in shares.items() if share is not None}
    assert known.keys() >= {rule.name for rule in rules} and all(0 <= share <= 1 for share in known.values())


def test_what_a_share_can_claim():
    """Five new seeds give a decided verdict again less often than draws of the five old ones do.

    80 sets of seeds, effects 0 to 4: about 93% of those with a share of 0.99 or more, one deviation 1.6%.
    """
    rng, found = np.random.default_rng(0), []
    for effect in np.linspace(0, 4, 80):
        x = rng.normal(effect, size=5)
        new = rng.normal(effect, size=(4_000, 5, 1))
        if stats.mean_interval(x).above_zero:
            own = rule("C1a", lambda t: stats.mean_interval(t["x"]))
            share = firmness.firmness([own], values(*x), draws=50)["C1a"]
            found.append((share, (new.mean((1, 2)) > paired.half_width(new)).mean()))
    share, again = np.array(found).T
    firm = share >= 0.99
    assert 0.88 < again[firm].mean() < 0.98 and again[~firm].mean() < 0.85 and share.mean() > again.mean()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="draws=0; at least 1"):
        firmness.firmness([rule("C1a")], values(1, 2), draws=0)
    with pytest.raises(ValueError, match="rule C1a: its table 'values' has no column y"):
        firmness.firmness([rule("C1a", columns=("seed", "y"))], values(1, 2))
    more = values(1, 2) | {("more",): values(1, 2, 3)["values",]}
    with pytest.raises(ValueError, match=r"rule C1b: its table has the seeds \[3, 10, 17\], that of C1a \["):
        firmness.firmness([rule("C1a"), rule("C1b", table="more")], more)


def finding(low: float, high: float, n: int = 3, name: str = "C1a", threshold: float = 0.5) -> Finding:
    return Finding(rule(name, threshold=threshold), Estimate((low + high) / 2, low, high, n, (low, high)), "undecided")


@pytest.mark.parametrize(
    ("low", "high", "edge"),
    [
        (0.59, 0.9, True),  # as predicted, by 0.09
        (0.61, 0.9, False),
        (0.1, 0.41, True),  # against the prediction
        (0.1, 0.39, False),
        (0.41, 0.9, True),  # undecided
        (0.1, 0.59, True),
        (0.1, 0.9, False),
        (0.5, 0.9, True),
        (math.nan, math.nan, False),
    ],
)
def test_on_the_edge(low, high, edge):
    assert firmness.on_the_edge(finding(low, high), 0.1) is edge
    assert not firmness.on_the_edge(finding(low, high), 0.0)


def test_nothing_is_on_the_edge_that_was_not_run():
    assert not firmness.on_the_edge(Finding(rule("C1a"), None, "not run"), 9.0)


def test_shifts_between_machines_by_hand():
    """C1a: its lower end moves by 0.1, its upper one by 0.3; C1b stands; C1c and C1d are on one machine each."""
    one = firmness.intervals([finding(0.2, 0.5), finding(1, 2, name="C1b"), finding(1, 2, name="C1c")])
    unknown = [finding(math.nan, math.nan, name="C1d"), Finding(rule("C1e"), None, "not run")]
    other = firmness.intervals([finding(0.1, 0.8), finding(1, 2, name="C1b"), *unknown, finding(0, 1, name="C1f")])
    assert one["C1a"] == {"mean": 0.35, "low": 0.2, "high": 0.5, "n": 3, "values": [0.2, 0.5]}
    assert other.keys() == {"C1a", "C1b", "C1f"}
    assert firmness.shifts(one, other) == firmness.shifts(other, one) == pytest.approx({"C1a": 0.3, "C1b": 0.0})
    assert json.loads(json.dumps(one)) == one
    with pytest.raises(ValueError, match="rule C1a: 3 and 5 seeds cannot be compared"):
        firmness.shifts(one, firmness.intervals([finding(0.1, 0.8, n=5)]))
