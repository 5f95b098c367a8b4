"""Calibration: readings by hand; curves, intervals and verdicts of planted instruments; turning runs measured."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import calibration, claims, measure, stats
from prefdyn.findings.calibration import BY_NAME, EQUAL, READINGS
from prefdyn.findings.turned import TurnedAlignmentRun, TurnedTargetsRun, measuring
from prefdyn.lab import turning
from prefdyn.lab.fingerprint import modules_of
from prefdyn.lab.runs import RunStore
from prefdyn.lab.turning import Construction

NAMES = tuple(reading.name for reading in READINGS)


# --- readings --------------------------------------------------------------------------------------------------------


def tables(**changes) -> dict[str, pd.DataFrame]:
    """Five checkpoints at KL 0, 1, 3, 2, 4 with standard errors of 1, and four examples a probe.

    G is 4, 1.9, -4, 4, 4: surely above 0 at three of five, surely below at one; it turns twice among sure signs.
    """
    steps = [0, 1, 2, 3, 4]
    full = {
        "step": steps,
        "component": "full",
        "g": [4.0, 1.9, -4.0, 4.0, 4.0],
        "se": 1.0,
        "g_opt": [4.0, 4.0, 4.0, 4.0, 0.0],
        "se_opt": 1.0,
        "cosine": [0.1, 0.2, -0.3, 0.4, 0.1],
        "cosine_opt": [0.5, 0.5, math.nan, 0.5, 0.1],
        "logp_targets": [-9.0, -8.0, -8.5, -7.0, -6.0],
    }
    alignment = pd.concat([pd.DataFrame(full), pd.DataFrame(full).assign(component="positive", g=9.0, g_opt=9.0)])
    # every probe of two of [1, 1, 1, 1] is sure; of [3, -1, -1, -1] (sum 0) none is; of -1s all, of the other sign
    each = {0: [1.0] * 4, 1: [3.0, -1.0, -1.0, -1.0], 2: [-1.0] * 4, 3: [1.0] * 4, 4: [1.0] * 4}
    sequences = pd.DataFrame(
        [{"step": step, "example": i, "full": x} for step, row in each.items() for i, x in enumerate(row)]
    )
    declared, floor = [0.3, 0.3, 0.3, 0.1, 0.3], [0.1, 0.1, 0.4, 0.2, 0.1]
    chosen = pd.DataFrame(
        [
            {"step": step, "choice": name, "cosine": values[step]}
            for name, values in (("as declared", declared), ("responses: unrelated", floor), ("reduction: mean", floor))
            for step in steps
        ]
    )
    made = {
        "alignment": alignment.sample(frac=1.0, random_state=0),  # in any order
        "sequences": sequences,
        "targets": chosen,
        "checkpoints": pd.DataFrame({"step": steps, "kl": [0.0, 1.0, 3.0, 2.0, 4.0]}),
        "drift": pd.DataFrame({"step": steps, "distance": [0.8, 0.4, 0.6, 0.2, 0.0]}),
    }
    return made | changes


def test_readings_by_hand():
    """Flips: + (-) + : two; likelihood: up, down, up, up; replies: 0.8 by 0.4 + 0.2 + 0.4 + 0.2 = 1.2."""
    found = calibration.read(tables(), examples=2, limit=math.inf)
    expected = {
        "positive": 3 / 5,
        "positive, aware": 4 / 5,
        "positive, equal sequences": 3 / 5,  # 1, 0, 0, 1, 1
        "sure, equal sequences": 4 / 5,  # 1, 0, 1, 1, 1
        "cosine": 0.1,
        "cosine, aware": 0.4,  # of the four that are known
        "above floor": (0.2 + 0.2 - 0.1 - 0.1 + 0.2) / 5,
        "share above floor": 3 / 5,
        "no flips": -2,
        "likelihood rises": 3 / 4,
        "replies come nearer": 0.8 / 1.2,
    }
    assert set(NAMES) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
        assert found[name + EQUAL] == pytest.approx(value), name
    assert found["checkpoints"] == found["checkpoints" + EQUAL] == 5
    assert set(found) == {*BY_NAME, "checkpoints", "checkpoints" + EQUAL}


def test_readings_at_equal_kl_by_hand():
    """Up to a KL of 2 nats: steps 0, 1 and 3, of which 3 came back; distances stay those to the last replies."""
    found = calibration.read(tables(), examples=2, limit=2.0)
    expected = {
        "positive": 2 / 3,
        "positive, aware": 1.0,
        "positive, equal sequences": 2 / 3,
        "sure, equal sequences": 2 / 3,
        "cosine": 0.7 / 3,
        "cosine, aware": 0.5,
        "above floor": 0.1,
        "share above floor": 2 / 3,
        "no flips": 0,
        "likelihood rises": 1.0,
        "replies come nearer": 1.0,  # 0.8, 0.4, 0.2
    }
    for name, value in expected.items():
        assert found[name + EQUAL] == pytest.approx(value), name
    assert found["checkpoints"] == 5 and found["checkpoints" + EQUAL] == 3
    assert found["positive"] == 3 / 5


def test_readings_of_one_checkpoint_and_of_none():
    """Stretches between checkpoints need two; what cannot be read is unknown, and no error."""
    one = calibration.read(tables(), examples=2, limit=0.5)
    assert one["positive" + EQUAL] == 1.0 and one["checkpoints" + EQUAL] == 1
    assert math.isnan(one["likelihood rises" + EQUAL]) and math.isnan(one["replies come nearer" + EQUAL])
    none = calibration.read(tables(), examples=2, limit=-1.0)
    assert all(math.isnan(none[name + EQUAL]) for name in NAMES) and none["checkpoints" + EQUAL] == 0
    still = tables(drift=pd.DataFrame({"step": [0, 1], "distance": [0.0, 0.0]}))
    assert math.isnan(calibration.straightness(still))
    with pytest.raises(ValueError, match="no column responses: unrelated"):
        calibration.above_floor(tables(targets=tables()["targets"].query("choice == 'as declared'")))


def test_the_share_of_sure_signs_is_the_ledgers():
    """The same function and the same checkpoints as rule C1a."""
    rule = next(rule for rule in claims.RULES if rule.name == "C1a")
    table = tables()["alignment"].assign(seed=0)
    assert rule.measure(table).mean == calibration.surely_positive(tables())
    assert (calibration.SURE, calibration.NEARLY_ORTHOGONAL) == (claims.SURE, claims.NEARLY_ORTHOGONAL)


def test_how_far_all_constructions_come():
    """The smallest of final KLs, not of largest: 3 of the first seed, 1 of the second."""
    ends = {
        ("dpo", 0, "a"): [0, 5, 3],
        ("dpo", 0, "b"): [0, 2, 4],
        ("dpo", 1, "a"): [0, 1, 1],
        ("dpo", 1, "b"): [0, 9, 9],
    }
    table = pd.DataFrame(
        [
            {"method": m, "seed": s, "construction": c, "step": step, "kl": kl}
            for (m, s, c), path in ends.items()
            for step, kl in enumerate(path)
        ]
    ).sample(frac=1.0, random_state=1)
    assert calibration.equal_kl(table).to_dict() == {("dpo", 0): 3, ("dpo", 1): 1}


def test_truth():
    said = {("nothing", 1): "stable", ("nothing", 8): "stable", ("labels", 1): "stable", ("labels", 2): "moving",
        ("fact", 8): "moving", ("random", 1): "none", ("random", 8): "none"}  # fmt: skip
    assert {key: calibration.truth(Construction(*key)) for key in said} == said


def test_a_table_of_readings():
    """Sequences are equal: two examples of pairs are as many as four of others; each construction up to one KL."""
    stable, moving = Construction("nothing", 2), Construction("labels", 2)
    pairs = tables(sequences=tables()["sequences"].assign(a_rejected=0.0))
    far = tables()["checkpoints"].assign(kl=[0.0, 1.0, 3.0, 2.0, 2.5])
    runs = {
        ("dpo", 0, stable): pairs,
        ("dpo", 0, moving): pairs | {"checkpoints": far},
        ("sft", 0, stable): tables(),
    }
    assert calibration.equal_examples(runs) == dict(zip(runs, (2, 2, 4), strict=True))
    table = calibration.reading_table(runs)
    assert table["truth"].tolist() == ["stable", "moving", "stable"]
    assert table["construction"].tolist() == ["nothing, 2 phases", "labels, 2 phases", "nothing, 2 phases"]
    assert table["limit"].tolist() == [2.5, 2.5, 4.0]
    assert table["checkpoints at equal KL"].tolist() == [3, 4, 5]
    assert set(BY_NAME) < set(table)


def test_all_are_read_at_the_checkpoints_that_all_have():
    """The second construction has no checkpoint at the second step of five; another seed's are its own."""
    stable, moving = Construction("nothing", 2), Construction("labels", 2)
    fewer = {name: table[table["step"] != sorted({*table["step"]})[1]] for name, table in tables().items()}
    steps = sorted({*tables()["checkpoints"]["step"]})
    runs = {("dpo", 0, stable): tables(), ("dpo", 0, moving): fewer, ("dpo", 1, stable): tables()}
    read = calibration.at_common_steps(runs)
    left = [step for step in steps if step != steps[1]]
    for key, table in ((key, table) for key, own in read.items() for table in own.values()):
        assert sorted({*table["step"]}) == (steps if key[1] == 1 else left)
    assert calibration.reading_table(runs)["checkpoints"].tolist() == [4, 4, 5]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_curve_of_four_runs_by_hand():
    """Stable 0.9 and 0.4, others 0.6 and 0.1: three of four pairs are in order."""
    curve = calibration.roc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
    assert curve["threshold"].tolist() == [math.inf, 0.9, 0.6, 0.4, 0.1]
    assert curve["sensitivity"].tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve["false_positives"].tolist() == [0, 0, 0.5, 0.5, 1]
    assert np.trapezoid(curve["sensitivity"], curve["false_positives"]) == 0.75
    assert stats.auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False]) == 0.75


def test_ties_are_passed_together():
    """Stable 1 and 1, others 1 and 0: one of each kind ties twice, AUC (1/2 + 1/2 + 1 + 1) / 4."""
    curve = calibration.roc([1.0, 1.0, 1.0, 0.0], [True, True, False, False])
    assert curve.to_numpy().tolist() == [[math.inf, 0, 0], [1, 1, 0.5], [0, 1, 1]]
    assert np.trapezoid(curve["sensitivity"], curve["false_positives"]) == 0.75
    values, stable, seeds = [1.0, 1.0, 1.0, 0.0], [True, True, False, False], [0, 1, 0, 1]
    assert calibration.auc_interval(values, stable, seeds).mean == 0.75
    for values, stable in (([1.0], [True]), ([1.0, math.nan], [True, False]), ([1.0], [True, False])):
        with pytest.raises(ValueError, match="runs of both kinds"):
            calibration.roc(values, stable)


def test_the_area_under_a_curve_is_the_probability_of_order():
    rng = np.random.default_rng(0)
    values, stable = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    curve = calibration.roc(values, stable)
    assert np.trapezoid(curve["sensitivity"], curve["false_positives"]) == pytest.approx(stats.auc(values, stable))


def test_draws_of_seeds_keep_their_runs_together():
    """AUC of each draw against the pooled runs of the seeds drawn, one by one; the interval spans these values."""
    rng = np.random.default_rng(1)
    seeds = np.repeat([3, 5, 7], 4)
    stable = np.tile([True, False, False, True], 3)
    values = rng.integers(0, 5, 12).astype(float)
    wins, pairs = calibration._wins(values, stable, seeds)
    every = []
    for drawn in np.ndindex(3, 3, 3):
        rows = np.concatenate([np.flatnonzero(seeds == (3, 5, 7)[i]) for i in drawn])
        every.append(stats.auc(values[rows], stable[rows]))
        counts = np.bincount(drawn, minlength=3)
        assert counts @ wins @ counts / (counts @ pairs @ counts) == pytest.approx(every[-1])
    found = calibration.auc_interval(values, stable, seeds)
    # with three seeds the quantiles are the ends: norm.cdf(-sqrt(3 / 2) * 4.30) = 7e-8
    assert (found.low, found.high) == pytest.approx((min(every), max(every))) and found.n == 3


def test_no_interval_from_one_seed_or_one_kind():
    found = calibration.auc_interval([1.0, 0.0], [True, False], [0, 0])
    assert found.mean == 1.0 and math.isnan(found.low) and calibration.verdict(found) == "undecided"
    found = calibration.auc_interval([1.0, 0.0], [True, True], [0, 1])
    assert math.isnan(found.mean) and calibration.verdict(found) == "undecided"


def test_shares_count_seeds_and_not_runs():
    """Five seeds with all right: the lowest share p with p^5 = 0.025; as scipy has it for one run a seed."""
    for each in (1, 4):
        found = calibration.share_interval([True] * 5 * each, np.repeat(range(5), each))
        assert (found.mean, found.high, found.n) == (1.0, 1.0, 5)
        assert found.low == pytest.approx(0.025 ** (1 / 5))
    for hits in range(6):
        found = calibration.share_interval([i < hits for i in range(5)], range(5))
        exact = scipy.stats.binomtest(hits, 5).proportion_ci(0.95, "exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert math.isnan(calibration.share_interval([], []).mean)


def test_verdicts():
    said = {
        (0.81, 1.0): "tells",
        (0.8, 1.0): "undecided",  # 0.8 is not above 0.8
        (0.55, 0.95): "undecided",
        (0.45, 0.85): "undecided",  # a coin or a good one: too few runs
        (0.45, 0.79): "does not tell",
        (0.55, 0.79): "undecided",
        (0.55, 0.69): "does not tell",
        (0.0, 0.3): "does not tell",  # it tells the contrary
        (math.nan, math.nan): "undecided",
    }
    for (low, high), word in said.items():
        assert calibration.verdict(stats.Estimate(0.6, low, high, 5)) == word, (low, high)


def planted(values, seeds: int = 5, stable: int = 2, others: int = 3, name: str = "positive") -> pd.DataFrame:
    """A table of runs whose reading is values(stable [runs], seed [runs]); of the others one a seed has no target."""
    truth = np.tile(["stable"] * stable + ["moving"] * (others - 1) + ["none"], seeds)
    seed = np.repeat(np.arange(seeds), stable + others)
    return pd.DataFrame({"method": "dpo", "seed": seed, "truth": truth, name: values(truth == "stable", seed)})


def test_a_perfect_instrument_tells():
    """0.8 and more of stable runs, less of others; nothing is on the wrong side in any seed."""
    rng = np.random.default_rng(2)
    table = planted(lambda stable, seed: np.where(stable, 0.8, 0.0) + 0.2 * rng.random(len(stable)))
    for against, runs in (("moving + none", 25), ("moving", 20), ("none", 15)):
        found = calibration.calibrate(table, "positive", against)
        assert (found.auc.mean, found.auc.low, found.auc.high, found.verdict) == (1.0, 1.0, 1.0, "tells")
        assert (found.sensitivity.mean, found.specificity.mean) == (1.0, 1.0)
        assert found.sensitivity.low == found.specificity.low == pytest.approx(0.025 ** (1 / 5))
        assert (found.runs, found.missing) == (runs, 0)


def test_an_inverted_instrument_does_not_tell():
    found = calibration.calibrate(planted(lambda stable, seed: np.where(stable, 0.1, 0.9)), "positive")
    assert (found.auc.mean, found.auc.high, found.verdict) == (0.0, 0.0, "does not tell")
    assert (found.sensitivity.mean, found.specificity.mean) == (0.0, 0.0)


def test_an_instrument_that_always_says_the_same_does_not_tell():
    found = calibration.calibrate(planted(lambda stable, seed: np.ones(len(seed))), "positive")
    assert (found.auc.mean, found.auc.low, found.auc.high, found.verdict) == (0.5, 0.5, 0.5, "does not tell")
    assert (found.sensitivity.mean, found.specificity.mean) == (1.0, 0.0)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_useless_instrument_tells_in_one_of_a_hundred_at_most(own):
    """Random numbers, whose level may be a seed's own: 200 calibrations of five seeds; 0.5 in nearly all intervals.

    Of 200 with probability 0.92 it is expected in 184 give or take four times sqrt(200 * 0.92 * 0.08) = 3.8.
    """
    rng = np.random.default_rng(3)
    words, within = [], 0
    for _ in range(200):
        table = planted(lambda stable, seed: rng.standard_normal(len(seed)) + own * rng.standard_normal(5)[seed])
        values, stable = table["positive"].to_numpy(), (table["truth"] == "stable").to_numpy()
        found = calibration.auc_interval(values, stable, table["seed"].to_numpy(), draws=2000)
        words.append(calibration.verdict(found))
        within += found.low <= 0.5 <= found.high
    assert words.count("tells") <= 2 and words.count("does not tell") > 50 and within >= 168


def test_what_is_missing_is_left_out_and_counted():
    table = planted(lambda stable, seed: np.where(seed == 0, np.nan, stable.astype(float)))
    found = calibration.calibrate(table, "positive")
    assert (found.runs, found.missing, found.auc.n, found.auc.mean) == (20, 5, 4, 1.0)
    nothing = calibration.calibrate(table.assign(positive=math.nan), "positive")
    assert math.isnan(nothing.auc.mean) and nothing.verdict == "undecided" and nothing.missing == 25


def test_calibrations_of_methods_and_of_all():
    """A reading whose level differs by method tells within each and not over both: no one threshold serves."""
    own = planted(lambda stable, seed: 10.0 + stable)
    table = pd.concat([own, own.assign(method="ppo", positive=own["positive"] - 10)])
    found = calibration.calibrations(table).set_index(["method", "reading", "against"])
    assert len(found) == 9 and (found["threshold"] == 0.8).all() and (found["seeds"] == 5).all()
    assert found.loc["dpo", "verdict"].tolist() == found.loc["ppo", "verdict"].tolist() == ["tells"] * 3
    # (11 beats 10 and 0 and 1 is beaten by 10): of four combinations of methods three are in order
    whole = found.loc[("all", "positive", "moving + none")]
    assert whole["auc"] == 0.75 and whole["verdict"] != "tells" and whole["specificity"] == 0.5
    alone = calibration.calibrations(own.query("truth != 'none'"))
    assert alone["method"].unique().tolist() == ["dpo"] and alone["against"].tolist() == ["moving + none", "moving"]


def test_what_is_refused():
    table = planted(lambda stable, seed: stable.astype(float))
    with pytest.raises(ValueError, match="'positiv' against 'moving'; allowed: positive, "):
        calibration.calibrate(table, "positiv", "moving")
    with pytest.raises(ValueError, match="no column cosine"):
        calibration.calibrate(table, "cosine")
    with pytest.raises(ValueError, match="truth='still'"):
        calibration.calibrate(table.assign(truth="still"), "positive")


# --- measurements of turning runs ------------------------------------------------------------------------------------

SMALL = {
    "difficulty": "easy",
    "profile": "smoke",
    "pairs": 48,
    "check": 32,
    "demonstrations": 128,
    "validation": 8,
    "held_out": 12,
    "width": 16,
    "sft_steps": 40,
    "batch": 16,
    "epochs": 2.0,
    "checkpoints": 3,
    "lr": 5e-3,
    "schedule": "constant",
    "iterations": 4,
    "rollouts": 8,
    "group": 4,
    "ppo_batch": 4,
    "ppo_lr": 3e-3,
    "probe": 32,
    "ppo_probe": 16,
    "choice_probe": 16,
}
WORLD = check(SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


def turned(method: str, what: str, phases: int):
    if method == "sft":
        return turning.imitation(plan.run(WORLD, 0, "dpo"), Construction(what, phases))
    return turning.turning(plan.run(WORLD, 0, method), Construction(what, phases))


def measurements(run) -> list[TurnedAlignmentRun | TurnedTargetsRun]:
    """As the plain run of the method is measured, of imitation as of DPO."""
    choices = {name: plan.target_choices(WORLD)[name] for name in (calibration.DECLARED, calibration.FLOOR)}
    plain = plan.run(WORLD, 0, run.kind.removeprefix("turning_").replace("sft", "dpo"))
    specs = plan.alignment_run(WORLD, plain, "check"), plan.targets_run(WORLD, plain, choices)
    return [measuring(spec, run) for spec in specs]


def test_measurements_of_constructions_have_keys_of_their_own(store):
    """And come back from JSON as a study writes them down, with all that is turned."""
    runs = [turned(*key) for key in (("dpo", "nothing", 2), ("dpo", "labels", 2), ("dpo", "labels", 3),
        ("sft", "labels", 2), ("ppo", "labels", 2), ("ppo", "fact", 2), ("online_dpo", "labels", 2))]  # fmt: skip
    specs = [spec for run in runs for spec in measurements(run)]
    keys = [store.key(spec) for spec in specs]
    assert len(set(keys)) == len(keys) == 14
    for spec, key in zip(specs, keys, strict=True):
        again = type(spec).model_validate_json(spec.model_dump_json())
        assert again == spec and type(again.run) is type(spec.run) and store.key(again) == key
        assert spec.model_dump(mode="json")["run"]["turned"] == spec.run.turned
        modules = modules_of(spec)
        assert modules[0] == "prefdyn.findings.turned"
        assert ("prefdyn.methods.dpo" in modules) == (spec.run.kind == "turning_dpo")


@pytest.mark.parametrize("method", ["dpo", "ppo", "online_dpo"])
def test_where_nothing_is_turned_the_measurement_is_the_plain_one(store, method):
    plain = plan.alignment_run(WORLD, plan.run(WORLD, 0, method), "check")
    assert type(plain) is measure.AlignmentRun
    ours = store.get(measurements(turned(method, "nothing", 1))[0])
    for name in ("alignment", "sequences", "tokens"):
        pd.testing.assert_frame_equal(ours.frame(name), store.get(plain).frame(name), check_exact=True)


def test_turned_pairs_are_measured_from_the_update_on_that_is_trained_on_them(store):
    """Halves of 6: at step 3 the policy is still that of the run without turning, and all margins have the other sign.

    At step 2 they are the same, and at the last step those of what it was trained on.
    """
    ours, theirs = (
        store.get(measurements(turned("dpo", what, 2))[0]).frame("sequences").set_index(["step", "example"])
        for what in ("labels", "nothing")
    )
    assert ours.index.unique("step").tolist() == [0, 2, 3, 6]
    assert np.allclose(ours.loc[2]["margin"], theirs.loc[2]["margin"], atol=1e-4)
    assert np.allclose(ours.loc[3]["margin"], -theirs.loc[3]["margin"], atol=1e-4)
    assert theirs.loc[3]["margin"].abs().max() > 0.1
    assert ours.loc[6]["margin"].mean() > ours.loc[3]["margin"].mean()


def test_measurements_of_other_data_are_no_model(store):
    plain = plan.alignment_run(WORLD, plan.run(WORLD, 0, "ppo"), "check")
    with pytest.raises(ValueError, match="a run on pairs as one on rollouts"):
        measuring(plain, turned("dpo", "labels", 2))


def test_from_runs_to_a_calibration(store):
    """Two constructions of two methods and one seed: all is read, nothing is decided."""
    runs = {}
    for method in ("dpo", "sft"):
        for construction in (Construction("nothing", 2), Construction("labels", 2)):
            spec = turned(method, *construction)
            found = [store.get(each) for each in measurements(spec)]
            runs[method, 0, construction] = calibration.tables_of(store.get(spec), *found)
    table = calibration.reading_table(runs)
    assert table["truth"].tolist() == ["stable", "moving"] * 2
    for name in NAMES:
        assert table[name].notna().all(), name
    shares = [
        n for n in NAMES if n.startswith("positive") or "sure," in n or n in ("share above floor", "likelihood rises")
    ]
    assert table[shares].map(lambda x: 0 <= x <= 1).all(axis=None)
    for method, own in table.groupby("method"):
        ends = [
            store.get(turned(method, what, 2)).frame("checkpoints")["kl"].iloc[-1] for what in ("nothing", "labels")
        ]
        assert own["limit"].tolist() == [min(ends)] * 2
    whole = calibration.calibrations(table)
    assert set(whole["method"]) == {"all", "dpo", "sft"} and (whole["verdict"] == "undecided").all()
    assert len(whole) == 3 * 2 * len(BY_NAME)  # there is no run without a target
